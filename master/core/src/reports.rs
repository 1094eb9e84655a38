//! What agents say of their tasks. Nothing in it is believed that an agent cannot know: tasks of other nodes, states
//! that only the master gives, addresses that are another node's.
//!
//! An address in a block that is nobody's is believed: a host has addresses from its blocks only, so this one was its
//! block until the store went back to a backup. It gets it back. One that is somebody else's by now has two owners, and
//! the task makes room.

use std::{collections::BTreeMap, sync::Arc};

use skein_api::{Block, NetworkId, NodeId, Task, TaskAddress, TaskId, TaskReport, TaskState, TaskStatus, address6};

use crate::{
    addresses::whole,
    command::{Context, Decision, Reply},
    core::Core,
    lookup::not_found,
    meta,
    model::{Change, Key, Kind, Object},
};

/// Blocks that a message of a host gives back to it.
type Regained = BTreeMap<(NetworkId, u32), Block>;

/// Whose an address is that a host says one of its tasks has.
enum Claim {
    /// The host's.
    Own,
    /// Nobody's: the host's again, with this block.
    Lost(Block),
    /// Somebody else's, in words.
    Taken(String),
    /// Not one that the task can have.
    Absurd,
}

impl Core {
    pub(crate) fn reports(&self, node: &NodeId, reports: &[TaskReport], ctx: &Context) -> Decision {
        if !self.model.nodes.contains_key(node) {
            return Err(not_found("node", node.as_str(), "node ls"));
        }
        // What earlier reports of the same message made of their tasks; none: gone.
        let mut after: BTreeMap<TaskId, Option<Task>> = BTreeMap::new();
        let mut regained = Regained::new();
        for report in reports {
            let known = match after.get(&report.task) {
                Some(task) => task.as_ref(),
                None => self.model.tasks.get(&report.task).map(|task| &**task),
            };
            let Some(known) = known.filter(|t| t.node.as_ref() == Some(node)) else { continue };
            if let Some(outcome) = self.report(known, node, report, &mut regained, ctx) {
                after.insert(report.task.clone(), outcome);
            }
        }
        let change = |(id, task): (TaskId, Option<Task>)| match task {
            Some(task) => Change::Upsert(Object::Task(Arc::new(task))),
            None => Change::Delete(Key { kind: Kind::Task, id: id.to_string() }),
        };
        let blocks = regained.into_values().map(|block| Change::Upsert(Object::Block(block)));
        Ok((blocks.chain(after.into_iter().map(change)).collect(), Reply::Done))
    }

    /// What one report makes of a task: `Some(None)` deletes it, `None` changes nothing. An earlier run or a state that
    /// was already passed changes nothing: reports are sent again until they are durable, so late and double ones are
    /// normal. A later run than the master knows of is the agent's own restart of a container task.
    fn report(
        &self,
        task: &Task,
        node: &NodeId,
        report: &TaskReport,
        regained: &mut Regained,
        ctx: &Context,
    ) -> Option<Option<Task>> {
        let (known, said) = (&task.status, &report.status);
        if said.state < TaskState::Accepted || said.state == TaskState::Orphaned {
            return None;
        }
        if said.state == TaskState::Remove {
            // Of whatever run: the agent may not have heard of the last start before the task was to be removed.
            return (task.desired_state == TaskState::Remove).then_some(None);
        }
        let container_task = task.service.is_none();
        if container_task && report.run < task.run {
            return None;
        }
        if known.state == TaskState::Orphaned {
            // The host was lost and is back. Its copy was replaced; once it has stopped there is nothing to remember.
            return said.state.is_terminal().then_some(None);
        }
        let new_run = container_task && report.run > task.run;
        let forward = skein_api::mutant!("state-backward")
            || said.state == known.state
            || (said.state > known.state && !known.state.is_terminal());
        if !new_run && !forward {
            return None;
        }
        let (mut status, taken) = self.believed(task, node, said, regained, ctx);
        let conflict = taken.filter(|_| !status.state.is_terminal());
        // A container task is the user's, and keeps its file system: it is named and left alone.
        let replace = conflict.is_some() && !container_task;
        let desired_state = if replace { task.desired_state.max(TaskState::Shutdown) } else { task.desired_state };
        if let Some(words) = conflict {
            status.err.get_or_insert(words);
        }
        let run = if new_run { report.run } else { task.run };
        if status == *known && run == task.run && desired_state == task.desired_state {
            return None;
        }
        let meta = meta::changed(&task.meta, ctx, desired_state != task.desired_state);
        Some(Some(Task { status, run, desired_state, meta, ..task.clone() }))
    }

    /// The status without addresses that are not the node's to give, and whose one of them is. Blocks that are the node's
    /// again come into `regained`.
    fn believed(
        &self,
        task: &Task,
        node: &NodeId,
        said: &TaskStatus,
        regained: &mut Regained,
        ctx: &Context,
    ) -> (TaskStatus, Option<String>) {
        let (mut status, mut taken) = (said.clone(), None);
        // A service task that has ended gives its addresses up.
        let keeps = task.service.is_none() || !said.state.is_terminal();
        status.addresses.retain(|address| match self.claim(task, node, address, regained, ctx) {
            Claim::Own => true,
            Claim::Lost(block) if keeps => {
                regained.insert((block.network.clone(), block.index), block);
                true
            }
            Claim::Taken(words) => {
                taken.get_or_insert(words);
                false
            }
            Claim::Lost(_) | Claim::Absurd => false,
        });
        (status, taken)
    }

    fn claim(&self, task: &Task, node: &NodeId, said: &TaskAddress, regained: &Regained, ctx: &Context) -> Claim {
        let attached = task.spec.networks.iter().any(|a| a.network == said.network.as_str());
        let network = self.model.networks.get(&said.network).filter(|_| attached);
        let Some((network, v4)) = network.zip(said.v4) else { return Claim::Absurd };
        let twin = said.v6.is_none_or(|v6| v6 == address6(network.subnet6, network.subnet4, v4));
        if !twin || !network.subnet4.contains(&v4) || network.is_reserved(v4) {
            return Claim::Absurd;
        }
        let Some(index) = network.block_index(v4) else { return Claim::Absurd };
        let words = |owner: String| {
            let name = self.model.node_name(node);
            let network = &network.spec.name;
            format!(
                "address {v4} of network {network} on {name} is {owner} too: a backup was restored that is older than it"
            )
        };
        let place = (network.id.clone(), index);
        match self.model.giver(network, v4) {
            Some(giver) if giver == node => return Claim::Own,
            Some(giver) => return Claim::Taken(words(format!("one of {}'s", self.model.node_name(giver)))),
            None if regained.contains_key(&place) => return Claim::Own,
            None if self.vip_blocks(network).contains(&index) => {
                return Claim::Taken(words("for virtual addresses".to_owned()));
            }
            None => {}
        }
        // Each block is one that some task here had its address from. A host that says more wants others' room.
        let blocks = self.model.node_blocks(&network.id, node).count()
            + regained.values().filter(|block| block.network == network.id).count();
        let there = |t: &&Task| t.spec.networks.iter().any(|a| a.network == network.id.as_str());
        if blocks > self.model.node_tasks(node).filter(there).count() {
            return Claim::Absurd;
        }
        Claim::Lost(whole(network, node, index, ctx))
    }
}

//! What agents say of their tasks. Nothing in it is believed that an agent cannot know: tasks of other nodes, states
//! that only the master gives, addresses outside the node's blocks.

use std::{collections::BTreeMap, sync::Arc};

use skein_api::{NodeId, Task, TaskId, TaskReport, TaskState, TaskStatus, address6};

use crate::{
    command::{Context, Decision, Reply},
    core::Core,
    lookup::not_found,
    meta,
    model::{Change, Key, Kind, Object},
};

impl Core {
    pub(crate) fn reports(&self, node: &NodeId, reports: &[TaskReport], ctx: &Context) -> Decision {
        if !self.model.nodes.contains_key(node) {
            return Err(not_found("node", node.as_str(), "node ls"));
        }
        // What earlier reports of the same message made of their tasks; none: gone.
        let mut after: BTreeMap<TaskId, Option<Task>> = BTreeMap::new();
        for report in reports {
            let known = match after.get(&report.task) {
                Some(task) => task.as_ref(),
                None => self.model.tasks.get(&report.task).map(|task| &**task),
            };
            let Some(known) = known.filter(|t| t.node.as_ref() == Some(node)) else { continue };
            if let Some(outcome) = self.report(known, node, report, ctx) {
                after.insert(report.task.clone(), outcome);
            }
        }
        let change = |(id, task): (TaskId, Option<Task>)| match task {
            Some(task) => Change::Upsert(Object::Task(Arc::new(task))),
            None => Change::Delete(Key { kind: Kind::Task, id: id.to_string() }),
        };
        Ok((after.into_iter().map(change).collect(), Reply::Done))
    }

    /// What one report makes of a task: `Some(None)` deletes it, `None` changes nothing. An earlier run or a state that
    /// was already passed changes nothing: reports are sent again until they are durable, so late and double ones are
    /// normal. A later run than the master knows of is the agent's own restart of a container task.
    fn report(&self, task: &Task, node: &NodeId, report: &TaskReport, ctx: &Context) -> Option<Option<Task>> {
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
        let status = self.believed(task, node, said);
        let run = if new_run { report.run } else { task.run };
        if status == *known && run == task.run {
            return None;
        }
        Some(Some(Task { status, run, meta: meta::changed(&task.meta, ctx, false), ..task.clone() }))
    }

    /// The status without addresses that are not the node's to give.
    fn believed(&self, task: &Task, node: &NodeId, said: &TaskStatus) -> TaskStatus {
        let mut status = said.clone();
        status.addresses.retain(|address| {
            let attached = task.spec.networks.iter().any(|a| a.network == address.network.as_str());
            let Some(network) = self.model.networks.get(&address.network).filter(|_| attached) else { return false };
            let Some(v4) = address.v4 else { return false };
            let owned = self.model.node_blocks(&network.id, node).any(|b| b.block4.contains(&v4));
            owned && address.v6.is_none_or(|v6| v6 == address6(network.subnet6, network.subnet4, v4))
        });
        status
    }
}

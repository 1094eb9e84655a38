//! Gone before stop: a task behind a virtual address, a port of every host or one of its own is told to stop when no host
//! leads new connections to it any more and its open ones have had time.
//!
//! ```text
//! shall stop ─> told to all members as draining ─> all acknowledged ──────┐
//!                     │ 5 s over: the laggards are named ─────────────────┴─> open connections have their time
//!                                                                                 └─> told to its own host ─> stops
//! ```
//!
//! Only for a planned stop of a task that was served, while another one of its service is served: with nobody to take
//! over, the wait would only make the gap longer. The end of a service, and of a node by force, does not wait.
//!
//! Memory of the leading master: a new one holds nothing back, so that what shall stop stops.

use std::collections::BTreeMap;

use skein_api::{Assignment, NetworkId, NodeId, Task, TaskId, TaskState};

use crate::{
    command::Now,
    core::Core,
    dispatch::{Batch, is_served},
    model::Object,
};

/// How long hosts may take to acknowledge: as for starts, see `readiness`.
const WAIT_MS: u64 = 5_000;

/// A task that is not told to stop yet.
#[derive(Clone, Debug)]
struct Drain {
    node: NodeId,
    /// Who has not acknowledged in which network, with the generation that told them.
    missing: BTreeMap<(NodeId, NetworkId), Option<u64>>,
    /// While somebody is missing: when to go on without. After that: when the open connections have had their time.
    until_mono_ms: u64,
    /// Time for open connections.
    open_ms: u64,
}

impl Drain {
    /// Nobody is missing any more.
    fn begin_to_end(&mut self, now: Now) {
        self.missing.clear();
        self.until_mono_ms = now.mono_ms + self.open_ms;
    }
}

/// Tasks that are not told to stop yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Draining {
    held: BTreeMap<TaskId, Drain>,
}

impl Draining {
    pub(crate) fn holds(&self, task: &TaskId) -> bool {
        !self.held.is_empty() && self.held.contains_key(task)
    }

    /// `node` was told what is in `batch`.
    pub(crate) fn told(&mut self, node: &NodeId, batch: &Batch) {
        if self.held.is_empty() {
            return;
        }
        for assignment in &batch.upserts {
            let Assignment::Endpoint(endpoint) = assignment else { continue };
            let held = self.held.get_mut(&endpoint.task).filter(|_| endpoint.draining);
            let key = (node.clone(), endpoint.network.clone());
            if let Some(generation) = held.and_then(|drain| drain.missing.get_mut(&key)) {
                generation.get_or_insert(batch.generation);
            }
        }
    }

    /// Takes out who is not missing any more.
    fn present(&mut self, now: Now, gone: impl Fn(&NodeId, Option<u64>) -> bool) {
        for drain in self.held.values_mut().filter(|drain| !drain.missing.is_empty()) {
            drain.missing.retain(|(node, _), told| !gone(node, *told));
            if drain.missing.is_empty() {
                drain.begin_to_end(now);
            }
        }
    }

    pub(crate) fn acked(&mut self, node: &NodeId, generation: u64, now: Now) {
        self.present(now, |missing, told| missing == node && told.is_some_and(|told| told <= generation));
    }

    /// A node is not reachable any more: nobody waits for it.
    pub(crate) fn forget(&mut self, node: &NodeId, now: Now) {
        self.present(now, |missing, _| missing == node);
    }
}

impl Core {
    /// A task changed: one that shall stop is held back, one that ended or shall run again is not.
    pub(crate) fn note_drain(&mut self, id: &TaskId, before: Option<&Object>) {
        let task = self.model.tasks.get(id);
        let stops = |task: &Task| task.status.state == TaskState::Running && task.desired_state > TaskState::Running;
        let Some(task) = task.filter(|task| stops(task)) else {
            // Its own host is told by what changed.
            self.draining.held.remove(id);
            return;
        };
        let Some(Object::Task(before)) = before else { return };
        if !is_served(before) || self.draining.holds(id) {
            return;
        }
        if let Some(drain) = self.drain_of(task) {
            self.draining.held.insert(id.clone(), drain);
        }
    }

    fn drain_of(&self, task: &Task) -> Option<Drain> {
        let service = self.model.services.get(task.service.as_ref()?)?;
        let node = task.node.clone().filter(|node| self.is_ready(node))?;
        let open_ms = service.spec.drain_ms();
        let others = self.model.service_tasks(&service.id).any(|other| other.id != task.id && is_served(other));
        let networks = self.model.task_networks(task);
        // Names alone lead to it by what clients remember: nobody could say when the last of them knows better.
        let led_to = !service.vips.is_empty() || !task.spec.ports.is_empty();
        if open_ms == 0 || networks.is_empty() || !led_to || !others {
            return None;
        }
        let of = |network: NetworkId| {
            let members: Vec<_> = self.model.members(&network).filter(|node| self.is_ready(node)).cloned().collect();
            members.into_iter().map(move |node| ((node, network.clone()), None))
        };
        let missing = networks.into_iter().flat_map(of).collect();
        Some(Drain { node, missing, until_mono_ms: self.now.mono_ms + WAIT_MS, open_ms })
    }

    /// Goes on without those that took too long, and lets stop whose connections have had their time.
    pub(crate) fn drain_tick(&mut self, now: Now) {
        let due = self.draining.held.iter_mut().filter(|(_, drain)| drain.until_mono_ms <= now.mono_ms);
        let (mut late, mut over) = (Vec::new(), Vec::new());
        for (id, drain) in due {
            if drain.missing.is_empty() {
                over.push(id.clone());
            } else {
                late.push((id.clone(), drain.missing.keys().map(|(node, _)| node.clone()).collect::<Vec<_>>()));
                drain.begin_to_end(now);
            }
        }
        for (id, mut laggards) in late {
            laggards.dedup();
            let name = |n: &NodeId| self.model.nodes.get(n).map_or_else(|| n.to_string(), |n| n.name.clone());
            let laggards = laggards.iter().map(name).collect::<Vec<_>>().join(", ");
            let task = self.model.tasks.get(&id).map_or_else(|| id.to_string(), |t| t.name.clone());
            let seconds = WAIT_MS / 1_000;
            self.readiness.notice(format!(
                "task {task} stops although {laggards} did not acknowledge within {seconds} s that it gets no more \
                 connections"
            ));
        }
        for id in over {
            self.end_drain(&id);
        }
    }

    /// Lets a task stop that is held back.
    pub(crate) fn end_drain(&mut self, id: &TaskId) {
        if let Some(drain) = self.draining.held.remove(id) {
            self.dispatch.mark(&drain.node, format!("task/{id}"));
        }
    }
}

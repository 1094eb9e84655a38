//! Ready before start: which hosts must have heard of a task's address before its container's process starts.
//!
//! An agent starts a container when its own host is told the container's endpoint. That word is held back until every
//! other reachable member of the network has acknowledged the endpoint, and with it the block that its address is from:
//! then the first packet, in either direction and by name, finds its way.
//!
//! ```text
//! address reported ─> held: told to the others ─> all acknowledged ──────┐
//!                            │ 5 s over: the laggards are named ─────────┴─> told to its own host ─> starts
//! ```
//!
//! Memory of the leading master: a new one holds nothing back, so a start is delayed by a lost master at most as long as
//! the agent waits by itself.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{Assignment, NetworkId, NodeId, Task, TaskId, TaskState};

use crate::{command::Now, core::Core, dispatch::Batch, model::Object};

/// How long others may take to acknowledge: a hundred times a round trip with its fsyncs.
const WAIT_MS: u64 = 5_000;

/// Words about laggards that are kept for the shell. More laggards at once have one cause.
const NOTICES_MAX: usize = 64;

/// An endpoint that its own host is not told yet.
#[derive(Clone, Debug)]
struct Held {
    node: NodeId,
    until_mono_ms: u64,
    /// Who has not acknowledged, with the generation that told them.
    missing: BTreeMap<NodeId, Option<u64>>,
}

/// Endpoints that their own hosts are not told yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readiness {
    held: BTreeMap<(TaskId, NetworkId), Held>,
    notices: Vec<String>,
}

/// An endpoint that its own host may be told now.
type Released = (NodeId, String);

fn released(key: &(TaskId, NetworkId), held: &Held) -> Released {
    (held.node.clone(), format!("endpoint/{}/{}", key.1, key.0))
}

impl Readiness {
    /// Takes entries out that nobody is missing from any more.
    fn release(&mut self) -> Vec<Released> {
        let mut out = Vec::new();
        self.held.retain(|key, held| {
            let keep = !held.missing.is_empty();
            if !keep {
                out.push(released(key, held));
            }
            keep
        });
        out
    }

    /// Something that the operator should know; of many at once the first are kept.
    pub(crate) fn notice(&mut self, words: String) {
        if self.notices.len() < NOTICES_MAX {
            self.notices.push(words);
        }
    }

    pub(crate) fn holds(&self, task: &TaskId, network: &NetworkId) -> bool {
        !self.held.is_empty() && self.held.contains_key(&(task.clone(), network.clone()))
    }

    /// `node` was told what is in `batch`.
    pub(crate) fn told(&mut self, node: &NodeId, batch: &Batch) {
        if self.held.is_empty() {
            return;
        }
        for assignment in &batch.upserts {
            let Assignment::Endpoint(endpoint) = assignment else { continue };
            let held = self.held.get_mut(&(endpoint.task.clone(), endpoint.network.clone()));
            if let Some(generation) = held.and_then(|h| h.missing.get_mut(node)) {
                // The first one counts: what follows only says more of the same address.
                generation.get_or_insert(batch.generation);
            }
        }
    }

    fn acked(&mut self, node: &NodeId, generation: u64) -> Vec<Released> {
        for held in self.held.values_mut() {
            if held.missing.get(node).is_some_and(|told| told.is_some_and(|told| told <= generation)) {
                held.missing.remove(node);
            }
        }
        self.release()
    }

    fn forget(&mut self, node: &NodeId) -> Vec<Released> {
        for held in self.held.values_mut() {
            held.missing.remove(node);
        }
        self.release()
    }
}

/// Addresses of a task that is not started yet.
fn addresses(task: &Task) -> BTreeSet<&NetworkId> {
    let waits = task.status.state < TaskState::Starting && task.desired_state == TaskState::Running;
    task.status.addresses.iter().filter(|_| waits).map(|a| &a.network).collect()
}

impl Core {
    /// A task changed: a new address is held back, that of a task which started or ended is not.
    pub(crate) fn note_readiness(&mut self, id: &TaskId, before: Option<&Object>) {
        let old = match before {
            Some(Object::Task(task)) => addresses(task),
            _ => BTreeSet::new(),
        };
        let Some((task, node)) = self.model.tasks.get(id).and_then(|t| Some((t, t.node.as_ref()?))) else {
            self.readiness.held.retain(|(task, _), _| task != id);
            return;
        };
        let new = addresses(task);
        if !self.readiness.held.is_empty() {
            // It is held back no more, and nothing else tells its own host: the endpoint is what it was.
            let dispatch = &mut self.dispatch;
            self.readiness.held.retain(|(task, network), _| {
                let gone = task == id && !new.contains(network);
                if gone {
                    dispatch.mark(node, format!("endpoint/{network}/{id}"));
                }
                !gone
            });
        }
        for network in new.difference(&old) {
            let others = self.model.members(network).filter(|n| *n != node && self.is_ready(n));
            let missing: BTreeMap<_, _> = others.map(|n| (n.clone(), None)).collect();
            if missing.is_empty() {
                continue;
            }
            let held = Held { node: node.clone(), until_mono_ms: self.now.mono_ms + WAIT_MS, missing };
            self.readiness.held.insert((id.clone(), (*network).clone()), held);
        }
    }

    /// The agent has everything up to `generation` in its ledger, and its network and names follow it.
    pub fn dispatch_acked(&mut self, node: &NodeId, generation: u64) {
        self.dispatch_follows(node, generation);
        self.draining.acked(node, generation, self.now);
        let released = self.readiness.acked(node, generation);
        self.tell_own_hosts(released);
    }

    /// A node is not reachable any more: nobody waits for it.
    pub(crate) fn readiness_without(&mut self, node: &NodeId) {
        self.draining.forget(node, self.now);
        let released = self.readiness.forget(node);
        self.tell_own_hosts(released);
    }

    /// Goes on without those that took too long.
    pub(crate) fn readiness_tick(&mut self, now: Now) {
        let late: Vec<_> = self
            .readiness
            .held
            .iter()
            .filter(|(_, h)| h.until_mono_ms <= now.mono_ms)
            .map(|(k, _)| k.clone())
            .collect();
        let mut released_now = Vec::new();
        for key in late {
            let Some(held) = self.readiness.held.remove(&key) else { continue };
            let name = |n: &NodeId| self.model.nodes.get(n).map_or_else(|| n.to_string(), |n| n.name.clone());
            let laggards: Vec<String> = held.missing.keys().map(name).collect();
            let task = self.model.tasks.get(&key.0).map_or_else(|| key.0.to_string(), |t| t.name.clone());
            let (seconds, laggards) = (WAIT_MS / 1_000, laggards.join(", "));
            self.readiness.notice(format!(
                "task {task} starts although {laggards} did not acknowledge its address within {seconds} s"
            ));
            released_now.push(released(&key, &held));
        }
        self.tell_own_hosts(released_now);
    }

    fn tell_own_hosts(&mut self, released: Vec<Released>) {
        for (node, key) in released {
            self.dispatch.mark(&node, key);
        }
    }

    /// What the operator should know, since the last call.
    pub fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.readiness.notices)
    }
}

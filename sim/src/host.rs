//! A host: its clock, its disk, its engine, and the agent on it.
//!
//! The agent's decisions are the ones that ship (`agent_core`: reconcile, admit, assignments, outbox, pulse, back-off,
//! leases). What stands here is its shell: the order of ledger, plan and action that `agent/src/executor` and
//! `agent/src/session.rs` keep, with model engine and model disk below.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
};

use agent_core::{
    Action, ActionError, ActionKey, AssignmentChange, Assignments, Desired, Memory, Observed, Outcome, Settings,
    TaskLocal, admit,
    lease::{AddressFamily, Leases},
    reconcile,
    session::{Backoff, Outbox, Pulse},
};
use skein_api::{Assignment, NetworkAssignment, NetworkId, NodeId, TaskAddress, TaskId, UnixMillis, address6};

use crate::{
    engine::Engine,
    kernel::KernelSide,
    net::{ConnId, Link},
    queue::Millis,
};

/// The world's first moment, as clocks that are right show it: 2026-01-01.
pub(crate) const EPOCH_MS: u64 = 1_767_225_600_000;

/// A clock: right but for an offset and a drift.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    pub(crate) offset_ms: i64,
    /// Parts per million; crystals have up to 100.
    pub(crate) drift_ppm: i64,
}

impl Clock {
    pub(crate) fn wall(&self, now_ms: Millis) -> UnixMillis {
        let now = i64::try_from(EPOCH_MS + now_ms).expect("this century");
        let drift = i64::try_from(now_ms).expect("some hours") * self.drift_ppm / 1_000_000;
        UnixMillis(u64::try_from(now + self.offset_ms + drift).unwrap_or(0))
    }
}

/// What the agent has on its host's disk. While an agent runs and its memory is durable, `assignments` and `tasks` are
/// the memory's, and stand here only again when it ends or the disk refuses ([`Host::part`]).
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    pub(crate) node: Option<NodeId>,
    pub(crate) assignments: Assignments,
    pub(crate) tasks: BTreeMap<TaskId, TaskLocal>,
    pub(crate) leases: Leases,
    /// Networks of this host: the assigned ones, and those that are no more but still have containers.
    pub(crate) networks: BTreeMap<NetworkId, NetworkAssignment>,
}

/// How the disk misbehaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskMoods {
    /// It takes nothing.
    pub(crate) full: bool,
    /// An earlier state of the ledger, for what damages or restores it.
    pub(crate) earlier: Option<(Assignments, BTreeMap<TaskId, TaskLocal>)>,
}

/// An action that has begun.
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) action: Action,
    /// It has its effect at this time; an event for an earlier time is an old one.
    pub(crate) due_ms: Millis,
    /// What it does was settled when it began.
    pub(crate) addresses: Option<Vec<TaskAddress>>,
    /// It waits until the master announces its task's addresses.
    pub(crate) waits: bool,
}

/// A session, as the agent sees it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) number: u32,
    pub(crate) conn: ConnId,
    pub(crate) live: bool,
    pub(crate) pulse: Pulse,
    pub(crate) began_ms: Millis,
    /// Batches that wait for the disk.
    pub(crate) applying: VecDeque<AssignmentChange>,
}

/// A running agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) assignments: Assignments,
    /// What memory has is on disk.
    pub(crate) durable: bool,
    pub(crate) confirmed: bool,
    pub(crate) memory: Memory,
    pub(crate) observed: Observed,
    /// Look at every container in the next round.
    pub(crate) look: bool,
    pub(crate) ops: BTreeMap<u32, Op>,
    pub(crate) ops_begun: u32,
    pub(crate) outbox: Outbox,
    pub(crate) session: Option<Session>,
    pub(crate) sessions: u32,
    pub(crate) backoff: Backoff,
    /// The time of the earliest round that an event will bring.
    pub(crate) round_at: Option<Millis>,
    /// A full set of assignments came: the master may not know what was last said.
    pub(crate) say_all: bool,
    /// Networks or peers changed since the kernel was last looked at.
    pub(crate) network_changed: bool,
    /// The last plan was empty, nothing is in flight, and nothing was touched since.
    pub(crate) settled: bool,
    /// It is stopped (SIGSTOP) until this time.
    pub(crate) paused_until: Millis,
}

/// What a round did, for the world to carry on.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    pub(crate) begun: Vec<u32>,
    pub(crate) wake_in_ms: Option<u64>,
    pub(crate) acted: bool,
}

/// A host.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) at: u32,
    pub(crate) name: String,
    pub(crate) on: bool,
    pub(crate) clock: Clock,
    pub(crate) link: Link,
    pub(crate) disk: Disk,
    pub(crate) disk_moods: DiskMoods,
    pub(crate) engine: Engine,
    /// Counts starts of the engine: its events belong to one.
    pub(crate) engine_run: u32,
    pub(crate) agent: Option<Agent>,
    /// Counts starts of the agent.
    pub(crate) agent_run: u32,
    /// Faults that keep the agent from running.
    pub(crate) held_down: u32,
    /// Since when packets do not pass in some direction.
    pub(crate) cut_since: Option<Millis>,
    /// Counts identities: a host that was removed joins as another node.
    pub(crate) lives: u32,
    /// The release of its agent.
    pub(crate) version: u32,
    /// Its kernel, if it is one of the sample.
    pub(crate) kernel: Option<Box<KernelSide>>,
}

impl Host {
    /// The agent starts from what the disk has.
    pub(crate) fn start_agent(&mut self) {
        self.agent_run += 1;
        let Disk { assignments, tasks, .. } = &self.disk;
        let memory = Memory { tasks: tasks.clone(), ..Memory::default() };
        let mut outbox = Outbox::default();
        let desired = Desired { assignments: assignments.documents(), confirmed: false };
        memory.reports(&desired).into_iter().for_each(|report| outbox.put_again(report));
        self.agent = Some(Agent {
            assignments: assignments.clone(),
            durable: true,
            confirmed: false,
            memory,
            observed: Observed::default(),
            look: true,
            ops: BTreeMap::new(),
            ops_begun: 0,
            outbox,
            session: None,
            sessions: 0,
            backoff: Backoff::default(),
            round_at: None,
            say_all: false,
            network_changed: false,
            settled: false,
            paused_until: 0,
        });
    }

    pub(crate) fn key(&self) -> String {
        format!("key-{}-{}", self.at, self.lives)
    }

    /// Writes what the agent remembers of its tasks; a disk that is full takes nothing.
    fn persist(&mut self, updates: &BTreeMap<TaskId, Option<TaskLocal>>) {
        let Some(agent) = &mut self.agent else { return };
        if updates.is_empty() {
            return;
        }
        if !agent.durable && !self.disk_moods.full {
            self.repair();
        }
    }

    /// The disk refuses from now on: it stays as it is, and memory goes on.
    pub(crate) fn part(&mut self) {
        let Some(agent) = self.agent.as_mut().filter(|a| a.durable) else { return };
        self.disk.assignments = agent.assignments.clone();
        self.disk.tasks = agent.memory.tasks.clone();
        agent.durable = false;
    }

    /// The agent's process ends.
    pub(crate) fn stop_agent(&mut self) -> Option<Agent> {
        self.part();
        self.agent.take()
    }

    /// Takes the first waiting batch in: the acknowledgement when it is durable, `Err` when the session is to end. A batch
    /// that no plan looks at (peers, endpoints) leaves an agent at rest.
    pub(crate) fn apply(&mut self) -> Result<Option<agent_core::Head>, String> {
        let Some(agent) = &mut self.agent else { return Ok(None) };
        let Some(change) = agent.session.as_mut().and_then(|s| s.applying.pop_front()) else { return Ok(None) };
        let fits = agent.assignments.check(&change).map_err(|e| e.to_string())?;
        let planned = |key: &str| key.starts_with("task/") || key.starts_with("network/");
        let matters = change.full
            || change.removes.iter().any(|key| planned(key))
            || change.upserts.iter().any(|a| matches!(a, Assignment::Task(_) | Assignment::Network(_)));
        agent.settled &= agent.confirmed && !matters;
        let of_network = |key: &str| key.starts_with("peer/") || key.starts_with("network/");
        agent.network_changed |= change.full
            || change.removes.iter().any(|key| of_network(key))
            || change.upserts.iter().any(|a| matches!(a, Assignment::Peer(_) | Assignment::Network(_)));
        agent.confirmed = true;
        let head = agent_core::Head { chain: change.chain.clone(), generation: change.generation };
        let full = change.full;
        if fits {
            agent.assignments.apply(change);
        }
        agent.say_all |= full;
        self.repair();
        Ok(self.agent.as_ref().is_some_and(|a| a.durable).then_some(head))
    }

    /// Writes the whole ledger anew, if the disk takes it.
    pub(crate) fn repair(&mut self) {
        let Some(agent) = self.agent.as_mut().filter(|a| !a.durable) else { return };
        if self.disk_moods.full {
            return;
        }
        agent.durable = true;
    }

    /// Looks at the engine, plans, remembers, reports and begins actions, as `Executor::round` does. `None` when the
    /// engine cannot be looked at.
    pub(crate) fn round(&mut self, now_ms: Millis) -> Option<Rounded> {
        if !self.engine.running {
            return None;
        }
        let wall = self.clock.wall(now_ms);
        let mut rounded = Rounded::default();
        for _ in 0..ROUNDS_MAX {
            self.look();
            let agent = self.agent.as_mut()?;
            let desired = Desired {
                assignments: agent.assignments.documents(),
                confirmed: agent.confirmed || skein_api::mutant!("hasty-removal"),
            };
            let plan = reconcile(&desired, &agent.observed, wall, &agent.memory, &Settings::default());
            agent.memory.apply(&plan);
            if std::mem::take(&mut agent.say_all) {
                agent.memory.reports(&desired).into_iter().for_each(|report| agent.outbox.put_again(report));
            }
            for report in &plan.reports {
                agent.outbox.put(report.clone());
            }
            agent.ops.retain(|_, op| {
                let cut = plan.cancel.contains(&op.action.key());
                if cut {
                    agent.observed.in_flight.remove(&op.action.key());
                    agent.look = true;
                }
                !cut
            });
            let in_flight: Vec<_> = agent.ops.values().map(|op| op.action.kind()).collect();
            let actions = admit::admit(in_flight, plan.actions.clone());
            rounded.acted |= !plan.is_empty();
            agent.settled = plan.is_empty() && agent.ops.is_empty();
            rounded.wake_in_ms = plan.wake_at.map(|at| at.since_ms(wall));
            let again = !plan.is_empty() && plan.actions.is_empty();
            self.persist(&plan.updates.tasks);
            for action in actions {
                rounded.begun.push(self.begin(action, now_ms));
            }
            if !again {
                break;
            }
        }
        Some(rounded)
    }

    fn look(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let touched = self.engine.take_events();
        if std::mem::take(&mut agent.look) {
            self.engine.missed = false;
            agent.observed.containers.clone_from(&self.engine.containers);
            agent.observed.networks.clone_from(&self.engine.networks);
            return;
        }
        for id in touched {
            match self.engine.containers.get(&id) {
                Some(container) => drop(agent.observed.containers.insert(id, container.clone())),
                None => drop(agent.observed.containers.remove(&id)),
            }
        }
    }

    fn begin(&mut self, action: Action, now_ms: Millis) -> u32 {
        let agent = self.agent.as_mut().expect("the agent plans");
        agent.ops_begun += 1;
        let number = agent.ops_begun;
        agent.observed.in_flight.insert(action.key(), action.kind());
        agent.ops.insert(number, Op { action, due_ms: now_ms, addresses: None, waits: false });
        number
    }

    /// A task of this host, as its agent knows it.
    pub(crate) fn assignment(&self, task: &TaskId) -> Option<&skein_api::TaskAssignment> {
        match self.agent.as_ref()?.assignments.documents().get(&format!("task/{task}")) {
            Some(Assignment::Task(task)) => Some(task),
            _ => None,
        }
    }

    /// Addresses for a task in all its networks: those that it has, or new ones. Containers have those of `used`.
    pub(crate) fn reserve(
        &mut self,
        task: &TaskId,
        used: &BTreeSet<(NetworkId, Ipv4Addr)>,
    ) -> Result<Vec<TaskAddress>, ActionError> {
        let later = |message: String| ActionError { message, fatal: false };
        let networks = self.assignment(task).map(|t| t.networks.clone()).unwrap_or_default();
        let mut addresses = Vec::new();
        for id in networks {
            let network =
                self.disk.networks.get(&id).ok_or_else(|| later(format!("network {id} is not known")))?.clone();
            let asked = self.assignment(task).and_then(|t| t.spec.static_address(&id));
            let in_use = |network: &NetworkId, address| used.contains(&(network.clone(), address));
            let reserved = self.disk.leases.reserve(&network, task, asked, in_use);
            let (v4, _) = reserved.map_err(|e| later(e.to_string()))?;
            let v6 = Some(address6(network.subnet6, network.subnet4, v4));
            addresses.push(TaskAddress { network: id, v4: Some(v4), v6 });
        }
        Ok(addresses)
    }

    /// Whether the master has announced the task's addresses to this host.
    pub(crate) fn announced(&self, task: &TaskId) -> bool {
        let Some((agent, assignment)) = self.agent.as_ref().zip(self.assignment(task)) else { return true };
        let known = |n: &NetworkId| agent.assignments.documents().contains_key(&format!("endpoint/{n}/{task}"));
        assignment.networks.iter().all(known)
    }

    /// What the engine asks of the network plugin when a container starts: both families of each address, under the
    /// container's MAC. The addresses that it has then.
    pub(crate) fn attach(&mut self, container: &str) -> Result<Vec<(NetworkId, Ipv4Addr)>, ActionError> {
        let later = |message: String| ActionError { message, fatal: false };
        let Some(c) = self.engine.containers.get(container) else { return Err(later("no such container".into())) };
        let (task, networks) = (c.task.clone(), c.networks.clone());
        let mut attached = Vec::new();
        for id in networks {
            let Some(network) = self.disk.networks.get(&id).cloned() else {
                return Err(later(format!("network {id} is not on this host")));
            };
            let mac = format!("{container}/{id}");
            let asked = self.assignment(&task).and_then(|t| t.spec.static_address(&id));
            let reserved = self.disk.leases.reserve(&network, &task, asked, |_, _| true);
            let (preferred, _) = reserved.map_err(|e| later(e.to_string()))?;
            for family in [AddressFamily::V4, AddressFamily::V6] {
                let given = self.disk.leases.request(&network, family, Some(preferred), Some(&mac));
                given.map_err(|e| later(e.to_string()))?;
            }
            attached.push((id, preferred));
        }
        Ok(attached)
    }

    /// A container ended: the engine gives its addresses back.
    pub(crate) fn detach(&mut self, networks: &[(NetworkId, Ipv4Addr)]) {
        for (network, address) in networks {
            for family in [AddressFamily::V4, AddressFamily::V6] {
                self.disk.leases.give_back(network, family, *address);
            }
        }
    }

    /// An action has ended: the memory takes its outcome in.
    pub(crate) fn record(&mut self, op: &Op, result: &Result<Outcome, ActionError>, now_ms: Millis) {
        let wall = self.clock.wall(now_ms);
        let Some(agent) = &mut self.agent else { return };
        let updates = agent.memory.record(&op.action, result, wall);
        agent.observed.in_flight.remove(&op.action.key());
        agent.settled = false;
        if matches!(op.action.key(), ActionKey::Network(_)) {
            agent.observed.networks.clone_from(&self.engine.networks);
        }
        self.persist(&updates.tasks);
    }

    /// Tasks with a running container, each with how many.
    pub(crate) fn running(&self) -> BTreeMap<&TaskId, usize> {
        let mut running = BTreeMap::new();
        for container in self.engine.live() {
            *running.entry(&container.task).or_default() += 1;
        }
        running
    }

    /// The network side follows the assignments: a network that was taken away stays while a container is in it, as
    /// `overlay/actor.rs` has it; leases go with their network.
    pub(crate) fn follow_networks(&mut self) {
        let Some(agent) = &self.agent else { return };
        let assigned = agent.assignments.documents().range("network/".to_owned().."network0".to_owned());
        let mut known: BTreeMap<NetworkId, NetworkAssignment> = assigned
            .filter_map(|(_, a)| if let Assignment::Network(n) = a { Some((n.id.clone(), n.clone())) } else { None })
            .collect();
        for used in self.engine.live().flat_map(|c| &c.networks) {
            if let (false, Some(network)) = (known.contains_key(used), self.disk.networks.get(used)) {
                known.insert(used.clone(), network.clone());
            }
        }
        if known != self.disk.networks {
            let keep: BTreeSet<NetworkId> = known.keys().cloned().collect();
            self.disk.leases.retain_networks(&keep);
            self.disk.networks = known;
        }
    }
}

/// Plans of one round that only remember or report; each makes room for the next.
const ROUNDS_MAX: usize = 16;

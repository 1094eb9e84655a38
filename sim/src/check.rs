//! What must hold: after each step on what it touched, in full from time to time, after faults, and at rest.
//!
//! The master's own invariants are production code (`Core::check`, `Core::check_touched`). Here is what only somebody
//! outside can see: what users were told against what is, what runs where against what was assigned, who has which
//! address, and that states only go forward across crashes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use master_core::{
    Core,
    dispatch::Batch,
    liveness::DETECTION_MS,
    model::{Change, Key, Kind, Object},
};
use skein_api::{Assignment, NetworkId, NodeId, ServiceSpec, Task, TaskId, TaskState};

use crate::{
    host::Host,
    queue::Millis,
    store::Store,
    users::{Known, User, Wanted},
    world::World,
};

/// How long addresses may have two holders after a backup was restored: until every host has been told what is.
const RESTORE_GRACE_MS: Millis = 180_000;
/// A host that cannot be heard is noticed after this long: detection, what was on its way, and a slow commit.
const NOTICE_MS: Millis = 2 * DETECTION_MS;
/// Of the tasks, how many of a hundred may be replaced because a large part of the hosts lost the master at once.
const RESCHEDULED_PERCENT_MAX: u64 = 15;

/// What the world remembers in order to judge.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    /// How far each task was durably seen to be.
    reached: BTreeMap<TaskId, (u64, TaskState)>,
    /// Who has an address, by host and container.
    addresses: BTreeMap<(NetworkId, Ipv4Addr), (u32, String)>,
    /// Addresses of each running container.
    held: BTreeMap<(u32, String), Vec<(NetworkId, Ipv4Addr)>>,
    restored_at: Option<Millis>,
    orphaned: u64,
    /// Tasks that were orphaned before a mass disconnect began.
    disconnect_from: Option<u64>,
}

impl Checker {
    /// A state is durable, whether or not the master knows.
    pub(crate) fn committed(&mut self, changes: &[Change]) {
        for change in changes {
            if let Change::Delete(Key { kind: Kind::Task, id }) = change {
                self.reached.remove(&TaskId::new(id));
            }
            if let Change::Upsert(Object::Task(task)) = change
                && task.status.state == TaskState::Orphaned
                && self.reached.get(&task.id).is_none_or(|(_, state)| *state != TaskState::Orphaned)
            {
                self.orphaned += 1;
            }
        }
    }

    /// Checks what a commit touched; `core` is the state after it, of a master that is up for so long.
    pub(crate) fn touched(&mut self, changes: &[Change], core: &Core, up_ms: Millis) -> Option<String> {
        for change in changes {
            match change {
                Change::Upsert(Object::Task(task)) => {
                    let here = (task.run, task.status.state);
                    if let Some(broken) = self.reached.get(&task.id).and_then(|before| backward(task, *before, here)) {
                        return Some(broken);
                    }
                    let lost =
                        here.1 == TaskState::Orphaned && self.reached.get(&task.id).is_some_and(|b| b.1 != here.1);
                    let there = task.node.as_ref().is_some_and(|n| core.model().nodes.contains_key(n));
                    if lost && there && up_ms < DETECTION_MS {
                        return Some(format!("task {} was given up by a master that is up for {up_ms} ms", task.name));
                    }
                    self.reached.insert(task.id.clone(), here);
                }
                Change::Delete(Key { kind: Kind::Task, id }) => drop(self.reached.remove(&TaskId::new(id))),
                _ => {}
            }
        }
        core.check_touched(changes).into_iter().next()
    }

    /// A master has read its store: nothing that was durable may be older there.
    pub(crate) fn master_loaded(&mut self, core: Option<&Core>) -> Option<String> {
        let core = core?;
        let tasks = &core.model().tasks;
        for (id, before) in &self.reached {
            let Some(task) = tasks.get(id) else { return Some(format!("task {id} was stored and is gone")) };
            let here = (task.run, task.status.state);
            if *before > here {
                return Some(format!("task {} was stored as {before:?} and is {here:?}", task.name));
            }
        }
        self.reached = tasks.values().map(|t| (t.id.clone(), (t.run, t.status.state))).collect();
        None
    }

    /// The store went back to a backup.
    pub(crate) fn restored(&mut self, now_ms: Millis, store: &Store) {
        self.restored_at = Some(now_ms);
        let task = |object: &Object| match object {
            Object::Task(task) => Some((task.id.clone(), (task.run, task.status.state))),
            _ => None,
        };
        self.reached = store.objects().filter_map(task).collect();
    }

    /// A host is told only what is its own.
    pub(crate) fn foreign(&self, node: &NodeId, batch: &Batch, core: &Core) -> Option<String> {
        let model = core.model();
        for document in &batch.upserts {
            let own = match document {
                Assignment::Task(t) => model.tasks.get(&t.id).is_some_and(|task| task.node.as_ref() == Some(node)),
                Assignment::Network(n) => model.is_member(&n.id, node),
                Assignment::Peer(p) => model.is_member(&p.network, node) && p.node != *node,
                Assignment::Service(s) => model.is_member(&s.network, node),
                Assignment::Endpoint(e) => model.is_member(&e.network, node),
            };
            if !own {
                return Some(format!("node {node} is told of {}, which is not its business", document.key()));
            }
        }
        None
    }

    pub(crate) fn container_started(
        &mut self,
        host: u32,
        container: &str,
        attached: Vec<(NetworkId, Ipv4Addr)>,
        now_ms: Millis,
    ) -> Option<String> {
        let excused = self.is_excused(now_ms);
        let me = (host, container.to_owned());
        let mut broken = None;
        for address in &attached {
            if let Some(other) = self.addresses.insert(address.clone(), me.clone())
                && !excused
            {
                broken = Some(format!("address {} has two owners: {other:?} and {me:?}", address.1));
            }
        }
        self.held.insert(me, attached);
        broken
    }

    /// A container's process ended; the addresses that it had.
    pub(crate) fn container_ended(&mut self, host: u32, container: &str) -> Vec<(NetworkId, Ipv4Addr)> {
        let me = (host, container.to_owned());
        let held = self.held.remove(&me).unwrap_or_default();
        for address in &held {
            if self.addresses.get(address) == Some(&me) {
                self.addresses.remove(address);
            }
        }
        held
    }

    /// Addresses of the containers that run on a host.
    pub(crate) fn addresses_of(&self, host: u32) -> BTreeSet<(NetworkId, Ipv4Addr)> {
        let own = self.held.range((host, String::new())..(host + 1, String::new()));
        own.flat_map(|(_, addresses)| addresses.iter().cloned()).collect()
    }

    /// Who has which address: the network and the address, the host and the container.
    pub(crate) fn addresses(&self) -> &BTreeMap<(NetworkId, Ipv4Addr), (u32, String)> {
        &self.addresses
    }

    /// A backup was restored not long ago: addresses may have two holders until every host has been told what is.
    pub(crate) fn is_excused(&self, now_ms: Millis) -> bool {
        self.restored_at.is_some_and(|at| now_ms - at < RESTORE_GRACE_MS)
    }

    pub(crate) fn disconnect_begins(&mut self) {
        self.disconnect_from.get_or_insert(self.orphaned);
    }

    /// How many tasks were replaced because of a mass disconnect; too many are named.
    pub(crate) fn disconnect_ends(&mut self) -> Option<String> {
        let from = self.disconnect_from.take()?;
        let (replaced, tasks) = (self.orphaned - from, self.reached.len() as u64);
        let max = (tasks * RESCHEDULED_PERCENT_MAX / 100).max(60);
        (replaced > max).then(|| format!("a mass disconnect replaced {replaced} of {tasks} tasks, {max} are allowed"))
    }
}

fn backward(task: &Task, before: (u64, TaskState), here: (u64, TaskState)) -> Option<String> {
    let again = before.0 == here.0 && before.1.is_terminal() && before.1 != here.1;
    let cleared = here.1 == TaskState::Remove || before.1 == TaskState::Orphaned || here.1 == TaskState::Orphaned;
    (here < before || (again && !cleared)).then(|| format!("task {} went from {before:?} to {here:?}", task.name))
}

impl World {
    /// Every invariant of the master, and what users were told.
    pub(crate) fn check_all(&self) -> Option<String> {
        let core = self.master.core()?;
        if let Some(broken) = core.check().into_iter().next() {
            return Some(broken);
        }
        let late = self.hosts.iter().find_map(|host| self.unnoticed(host, core));
        late.or_else(|| self.users.iter().find_map(|user| kept(user, core)))
    }

    /// A host that cannot be heard, and that the master should long have noticed.
    fn unnoticed(&self, host: &Host, core: &Core) -> Option<String> {
        let cut_ms = self.now_ms - host.cut_since.filter(|_| host.link.cut_up > 0)?;
        let looked_ms = self.now_ms.saturating_sub(self.master.looks_since_ms());
        let late = cut_ms.min(looked_ms) > NOTICE_MS;
        let ready = core.is_ready(host.disk.node.as_ref()?);
        (late && ready).then_some(format!("{} cannot be heard for {cut_ms} ms and counts as ready", host.name))
    }

    /// Whether the cluster is where it should be and nothing moves; else what is missing.
    pub(crate) fn unsettled(&mut self) -> Option<String> {
        let Some(core) = self.master.core() else { return Some("there is no master".into()) };
        if self.users.iter().any(User::is_open) {
            return Some("a user waits for an answer".into());
        }
        if core.has_timers() {
            return Some("a service waits for its next attempt".into());
        }
        for task in core.model().tasks.values() {
            let (state, desired) = (task.status.state, task.desired_state);
            let settled = match desired {
                TaskState::Running if task.node.is_none() => {
                    state == TaskState::Pending && !task.status.message.is_empty()
                }
                TaskState::Running => state >= TaskState::Running && state != TaskState::Orphaned,
                // Orphaned for good where no host has that identity: it was removed, or a backup knows it again.
                TaskState::Shutdown => {
                    let here = self.hosts.iter().any(|h| h.disk.node.is_some() && h.disk.node == task.node);
                    state.is_terminal() && (state != TaskState::Orphaned || !here)
                }
                _ => false,
            };
            if !settled {
                return Some(format!("task {} shall be {desired:?} and is {:?}", task.name, task.status));
            }
        }
        let hosts = self.hosts.iter().enumerate();
        let mut hosts = hosts.clone().skip(self.unsettled_at).chain(hosts.take(self.unsettled_at));
        let found = hosts.find_map(|(at, host)| Some((at, unsettled_host(host, core)?)));
        match found {
            Some((at, missing)) => {
                self.unsettled_at = at;
                Some(missing)
            }
            None => self.kernels_unsettled(),
        }
    }
}

/// What a user was told of its stack is there, or something that it asked for since.
fn kept(user: &User, core: &Core) -> Option<String> {
    let name = user.stack()?;
    let Known { answered, maybe, forgotten } = &user.known;
    let found: Vec<&ServiceSpec> = core.model().services.values().map(|s| &s.spec).collect();
    let found: BTreeMap<&str, &ServiceSpec> =
        found.into_iter().filter(|s| s.stack.as_deref() == Some(&name)).map(|s| (s.name.as_str(), s)).collect();
    let fits = |wanted: &Option<Wanted>| {
        let services = wanted.as_ref().map_or(&[][..], |w| &w.stack.services);
        services.len() == found.len()
            && services.iter().all(|s| {
                found.get(s.name.as_str()).is_some_and(|f| {
                    (f.mode, &f.task.container.image, &f.task.container.labels)
                        == (s.mode, &s.task.container.image, &s.task.container.labels)
                })
            })
    };
    let ok = *forgotten || fits(answered) || maybe.iter().any(fits);
    (!ok).then(|| format!("stack {name} is not what was acknowledged, nor what was asked for since"))
}

fn unsettled_host(host: &Host, core: &Core) -> Option<String> {
    let name = &host.name;
    let Some(agent) = &host.agent else { return Some(format!("{name} has no agent")) };
    let Some(node) = &host.disk.node else { return Some(format!("{name} has not joined")) };
    if !agent.session.as_ref().is_some_and(|s| s.live) {
        return Some(format!("{name} has no session"));
    }
    if let Some(report) = agent.outbox.pending().next() {
        return Some(format!("{name} has a report that nobody confirmed: {report:?}"));
    }
    if let Some(at) = agent.round_at {
        return Some(format!("{name} is to look again at {} s", at / 1_000));
    }
    if !agent.ops.is_empty() {
        return Some(format!("{name} still acts: {:?}", agent.ops.values().next().map(|op| &op.action)));
    }
    let running = host.running();
    for task in core.model().node_tasks(node) {
        let here = running.get(&task.id).copied().unwrap_or(0);
        let wanted = usize::from(task.status.state == TaskState::Running);
        if here != wanted {
            let known = agent.memory.tasks.get(&task.id).map(|l| (l.run, l.status.state, &l.status.message));
            let (run, state) = (task.run, task.status.state);
            return Some(format!(
                "{name} runs task {} {here} times, run {run} is {state:?}, the agent knows {known:?}",
                task.name
            ));
        }
    }
    let asked = core.full_documents(node);
    if asked != **agent.assignments.documents() {
        let known = agent.assignments.documents();
        let missing = asked.iter().find(|(k, d)| known.get(*k) != Some(d)).map(|(k, _)| k);
        let surplus = known.keys().find(|k| !asked.contains_key(*k));
        return Some(format!("{name} should know {missing:?} and should not know {surplus:?}"));
    }
    let stranger = running.keys().find(|id| core.model().tasks.get(id).is_none_or(|t| t.node.as_ref() != Some(node)));
    stranger.map(|id| format!("{name} runs a container of task {id}, which is not its own"))
}

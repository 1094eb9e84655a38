//! What follows from the desired state: tasks for services, replacement of ended and lost ones, placement, removal.
//!
//! A reconciler over the model: looks at services that something touched, compares what shall be with what is, and
//! stages the difference. Doing it twice changes nothing the second time.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{
    Availability, DependencyCondition, Health, NodeId, NodeState, RestartCondition, Service, ServiceId, ServiceMode,
    Task, TaskId, TaskState, TaskStatus, UnixMillis,
};

use crate::{
    command::Now,
    core::Core,
    meta,
    model::{Change, Key, Kind, Object},
    placement::{self, Pinned},
    rng::Rng,
    scheduler::Pin,
    workloads,
};

/// Rounds of one settling. Each round follows the changes of the one before it: tasks are made, placed, and their
/// predecessors removed in at most three; the rest is reserve. What is left then goes on in the next settling.
const ROUNDS_MAX: usize = 8;

/// Ended tasks that a slot keeps, for logs and `skein ps --all`.
const HISTORY_PER_SLOT: usize = 1;

/// Attempts without growing pauses.
const EVEN_ATTEMPTS: u32 = 3;

/// Longest pause between attempts.
const RESTART_DELAY_MS_MAX: u64 = 60_000;

/// A task that ran this long was well: attempts are counted anew.
const WELL_MS: u64 = 60_000;

/// Place of a task within its service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Number(u32),
    Node(NodeId),
}

fn slot_of(task: &Task) -> Slot {
    match (task.slot, &task.node) {
        (0, Some(node)) => Slot::Node(node.clone()),
        (number, _) => Slot::Number(number),
    }
}

fn is_live(task: &Task) -> bool {
    task.desired_state == TaskState::Running && !task.status.state.is_terminal()
}

/// What the restart policy says of a slot whose last task ended.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Leave it.
    Done,
    /// A new task now, counting so many attempts since then.
    Now(u32, UnixMillis),
    /// A new task at this time.
    At(UnixMillis),
}

impl Core {
    /// Does what is due: makes tasks, replaces ended and lost ones, places pending ones, removes what is over.
    pub fn settle(&mut self, now: Now, seed: u64) {
        let mut rng = Rng::new(seed);
        for _ in 0..ROUNDS_MAX {
            let services = std::mem::take(&mut self.dirty_services);
            let reap = std::mem::take(&mut self.reap);
            let wake = std::mem::take(&mut self.wake_pending);
            if services.is_empty() && reap.is_empty() && !wake {
                break;
            }
            for service in services {
                self.orchestrate(&service, now, &mut rng);
            }
            if wake {
                self.place_pending(now, &mut rng);
                self.grow_attachable(now, &mut rng);
            }
            for task in reap {
                self.reap(&task, now, &mut rng);
            }
            self.remove_networks();
        }
    }

    fn stage_task(&mut self, task: Task) {
        self.stage(Change::Upsert(Object::Task(Box::new(task))));
    }

    fn desire(&mut self, task: &Task, desired: TaskState, why: &str, now: Now) {
        if task.desired_state < desired {
            let meta = meta::changed(&task.meta, &meta::internal("orchestrator", why, now, 0), true);
            self.stage_task(Task { desired_state: desired, meta, ..task.clone() });
        }
    }

    fn orchestrate(&mut self, id: &ServiceId, now: Now, rng: &mut Rng) {
        let tasks: Vec<Task> = self.model.service_tasks(id).cloned().collect();
        let Some(service) = self.model.services.get(id).cloned() else {
            for task in &tasks {
                self.desire(task, TaskState::Remove, "service removed", now);
            }
            return;
        };
        let mut slots: BTreeMap<Slot, Vec<Task>> = BTreeMap::new();
        for task in tasks {
            let task = self.orphan_if_lost(task, now);
            slots.entry(slot_of(&task)).or_default().push(task);
        }
        let wanted: BTreeSet<Slot> = match service.spec.mode {
            ServiceMode::Replicated(n) => (1..=n).map(Slot::Number).collect(),
            ServiceMode::Global => self.global_nodes(&service).into_iter().map(Slot::Node).collect(),
        };
        for (slot, tasks) in slots.iter().filter(|(slot, _)| !wanted.contains(slot)) {
            // A node of a global service that is drained keeps its ended task for a while; a slot too many goes.
            let desired = if matches!(slot, Slot::Node(_)) { TaskState::Shutdown } else { TaskState::Remove };
            for task in tasks {
                self.desire(task, desired, "scaled down", now);
            }
        }
        for slot in wanted {
            let tasks = slots.remove(&slot).unwrap_or_default();
            self.orchestrate_slot(&service, &slot, tasks, now, rng);
        }
    }

    /// A task of a service whose node is lost counts as ended; its container may run on, the master cannot know.
    fn orphan_if_lost(&mut self, task: Task, now: Now) -> Task {
        let lost = task.node.as_ref().is_some_and(|n| self.node_status(n).state == NodeState::Down);
        if !lost || task.status.state.is_terminal() {
            return task;
        }
        let status = TaskStatus {
            state: TaskState::Orphaned,
            since: now.wall,
            message: "its node was lost".to_owned(),
            ..task.status.clone()
        };
        let meta = meta::changed(&task.meta, &meta::internal("orchestrator", "node lost", now, 0), true);
        let task = Task { status, meta, desired_state: TaskState::Shutdown.max(task.desired_state), ..task };
        self.stage_task(task.clone());
        task
    }

    fn orchestrate_slot(&mut self, service: &Service, slot: &Slot, tasks: Vec<Task>, now: Now, rng: &mut Rng) {
        let mut live: Vec<&Task> = tasks.iter().filter(|t| is_live(t)).collect();
        live.sort_by_key(|t| (t.meta.created_at, &t.id));
        let newest = live.pop();
        for task in live {
            self.desire(task, TaskState::Shutdown, "more than one in its slot", now);
        }
        if let Some(task) = newest {
            if task.spec_generation != service.meta.generation {
                self.desire(task, TaskState::Shutdown, "service changed", now);
            } else if self.is_drained(task) {
                self.desire(task, TaskState::Shutdown, "node drained", now);
            }
            return;
        }
        if tasks.iter().any(|t| !t.status.state.is_terminal() && t.node.is_some()) {
            // Stop first: the successor comes when the predecessor has stopped.
            return;
        }
        let last = tasks.iter().max_by_key(|t| (t.meta.created_at, t.attempt, &t.id));
        match next_attempt(service, last, now.wall) {
            Next::Done => {}
            Next::At(due) => {
                self.timers.insert((due, service.id.clone()));
            }
            Next::Now(attempt, since) => self.make_task(service, slot, attempt, since, now, rng),
        }
    }

    fn is_drained(&self, task: &Task) -> bool {
        let node = task.node.as_ref().and_then(|n| self.model.nodes.get(n));
        node.is_some_and(|n| n.spec.availability == Availability::Drain)
    }

    fn make_task(&mut self, service: &Service, slot: &Slot, attempt: u32, since: UnixMillis, now: Now, rng: &mut Rng) {
        let ctx = meta::internal("orchestrator", if attempt == 0 { "service" } else { "restart policy" }, now, 0);
        let (number, node, suffix) = match slot {
            Slot::Number(n) => (*n, None, n.to_string()),
            Slot::Node(node) => {
                let name = self.model.nodes.get(node).map_or(node.short(), |n| &n.name);
                (0, Some(node.clone()), name.to_owned())
            }
        };
        let task = Task {
            id: TaskId::new(rng.id()),
            meta: meta::created(&ctx),
            name: format!("{}.{suffix}", service.spec.name),
            service: Some(service.id.clone()),
            slot: number,
            spec: service.spec.task.clone(),
            spec_generation: service.meta.generation,
            node: None,
            desired_state: TaskState::Running,
            status: TaskStatus { state: TaskState::Pending, since: now.wall, ..TaskStatus::default() },
            attempt,
            attempts_since: since,
            ..Task::default()
        };
        match node {
            None => self.stage_task(task),
            // One of a global service is placed at once or not made: its node is what it is.
            Some(node) => {
                let pin = Pin { nodes: BTreeSet::from([node]), reason: "one on each node".to_owned() };
                let request = placement::compile(self, &task.spec, Some(service), Some(pin));
                if let Ok(Ok(node)) = request.map(|r| self.scheduler.place(&r, rng.next_u64())) {
                    self.assign(task, node, now, rng);
                }
            }
        }
    }

    /// Nodes that a global service shall be on.
    fn global_nodes(&self, service: &Service) -> Vec<NodeId> {
        let eligible = |node: &&skein_api::Node| {
            if node.spec.availability == Availability::Drain {
                return false;
            }
            let pin = Pin { nodes: BTreeSet::from([node.id.clone()]), reason: String::new() };
            placement::compile(self, &service.spec.task, Some(service), Some(pin))
                .is_ok_and(|request| self.scheduler.constraints_can_be_met(&request))
        };
        self.model.nodes.values().filter(eligible).map(|n| n.id.clone()).collect()
    }

    fn place_pending(&mut self, now: Now, rng: &mut Rng) {
        let mut pending: Vec<(UnixMillis, TaskId)> =
            self.pending.iter().map(|id| (self.model.tasks[id].meta.created_at, id.clone())).collect();
        pending.sort();
        for (_, id) in pending {
            let task = self.model.tasks[&id].clone();
            match self.try_place(&task, rng.next_u64()) {
                Ok(node) => self.assign(task, node, now, rng),
                Err(message) if message != task.status.message => {
                    let status = TaskStatus { message, ..task.status.clone() };
                    self.stage_task(Task { status, ..task });
                }
                Err(_) => {}
            }
        }
        let global = self.model.services.values().filter(|s| s.spec.mode == ServiceMode::Global);
        let global: Vec<ServiceId> = global.map(|s| s.id.clone()).collect();
        for service in global {
            self.orchestrate(&service, now, rng);
        }
    }

    /// A node for the task, or why there is none.
    fn try_place(&self, task: &Task, seed: u64) -> Result<NodeId, String> {
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        if let Some(service) = service
            && task.attempt == 0
            && let Some(unmet) = self.unmet_dependency(service)
        {
            return Err(unmet);
        }
        let pin = match placement::pinned(self, task) {
            Pinned::Free => None,
            Pinned::To(pin) => Some(pin),
            Pinned::Wait(why) => return Err(why),
        };
        let request = placement::compile(self, &task.spec, service, pin)?;
        self.scheduler.place(&request, seed).map_err(|rejection| rejection.summary())
    }

    /// What a service still waits for.
    fn unmet_dependency(&self, service: &Service) -> Option<String> {
        service.spec.depends_on.iter().find_map(|dependency| {
            let name = &dependency.service;
            let other = self.model.service_named(name)?;
            let tasks: Vec<&Task> = self.model.service_tasks(&other.id).collect();
            let running = |t: &&Task| is_live(t) && t.status.state == TaskState::Running;
            let healthy = |t: &&Task| running(t) && t.status.health.is_none_or(|h| h == Health::Healthy);
            let wanted = match other.spec.mode {
                ServiceMode::Replicated(n) => n as usize,
                ServiceMode::Global => 1,
            };
            let completed =
                |t: &&Task| t.status.state == TaskState::Complete && t.spec_generation == other.meta.generation;
            let (count, what) = match dependency.condition {
                DependencyCondition::ServiceStarted => (tasks.iter().copied().filter(running).count(), "to run"),
                DependencyCondition::ServiceHealthy => (tasks.iter().copied().filter(healthy).count(), "to be healthy"),
                DependencyCondition::ServiceCompletedSuccessfully => {
                    (tasks.iter().copied().filter(completed).count(), "to complete")
                }
            };
            (count < wanted).then(|| format!("waits for {name} {what}"))
        })
    }

    /// Puts a task on a node, with the addresses and volumes that it needs there.
    fn assign(&mut self, task: Task, node: NodeId, now: Now, rng: &mut Rng) {
        let ctx = meta::internal("scheduler", "placed", now, 0);
        let task = Task { node: Some(node.clone()), ..task };
        for id in self.model.task_networks(&task) {
            let there = self.model.network_tasks(&id).filter(|t| t.node.as_ref() == Some(&node)).count();
            let network = &self.model.networks[&id];
            match self.ensure_block(network, &node, there + 1, &ctx) {
                Ok(None) => {}
                Ok(Some(block)) => self.stage(Change::Upsert(Object::Block(block))),
                Err(message) => {
                    if message != task.status.message {
                        let status = TaskStatus { message, ..task.status.clone() };
                        self.stage_task(Task { node: None, status, ..task });
                    }
                    return;
                }
            }
        }
        for volume in self.new_volumes(&task, rng, &ctx) {
            self.stage(Change::Upsert(Object::Volume(volume)));
        }
        let status = TaskStatus { state: TaskState::Assigned, since: now.wall, ..TaskStatus::default() };
        let meta = meta::changed(&task.meta, &ctx, false);
        self.stage_task(Task { status, meta, ..task });
    }

    /// Networks for plain `docker run` are on every host that is there.
    fn grow_attachable(&mut self, now: Now, _rng: &mut Rng) {
        let ctx = meta::internal("allocator", "attachable network", now, 0);
        let mut missing = Vec::new();
        for network in self.model.networks.values().filter(|n| n.spec.attachable && !workloads::is_removed(n)) {
            let nodes = self.model.nodes.keys().filter(|node| !self.model.is_member(&network.id, node));
            missing.extend(nodes.map(|node| (network.clone(), node.clone())));
        }
        for (network, node) in missing {
            if let Ok(Some(block)) = self.ensure_block(&network, &node, 1, &ctx) {
                self.stage(Change::Upsert(Object::Block(block)));
            }
        }
    }

    /// Removes a task that is over, or asks its agent to.
    fn reap(&mut self, id: &TaskId, now: Now, _rng: &mut Rng) {
        let Some(task) = self.model.tasks.get(id).cloned() else { return };
        let on_node = task.node.as_ref().is_some_and(|n| self.model.nodes.contains_key(n));
        let stopping = task.desired_state > TaskState::Running;
        if stopping && task.desired_state == TaskState::Remove && (!on_node || task.status.state == TaskState::Remove) {
            self.stage(Change::Delete(Key { kind: Kind::Task, id: id.to_string() }));
            return;
        }
        if stopping && !on_node && !task.status.state.is_terminal() {
            let status = TaskStatus { state: TaskState::Shutdown, since: now.wall, ..task.status.clone() };
            self.stage_task(Task { status, ..task });
            return;
        }
        let Some(service) = task.service.clone().filter(|_| task.status.state.is_terminal()) else { return };
        let slot = slot_of(&task);
        let mut ended: Vec<Task> = self
            .model
            .service_tasks(&service)
            .filter(|t| t.status.state.is_terminal() && slot_of(t) == slot)
            .cloned()
            .collect();
        ended.sort_by_key(|t| std::cmp::Reverse((t.meta.created_at, t.attempt, t.id.clone())));
        for old in ended.into_iter().skip(HISTORY_PER_SLOT) {
            self.desire(&old, TaskState::Remove, "history", now);
        }
    }

    /// Networks of removed stacks go with their last task.
    fn remove_networks(&mut self) {
        let over = |n: &&skein_api::Network| {
            workloads::is_removed(n) && self.model.network_tasks(&n.id).next().is_none()
        };
        let doomed: Vec<_> = self.model.networks.values().filter(over).cloned().collect();
        for network in doomed {
            for change in self.delete_network(&network) {
                self.stage(change);
            }
        }
    }
}

/// What follows the last task of a slot.
fn next_attempt(service: &Service, last: Option<&Task>, now: UnixMillis) -> Next {
    let Some(last) = last else { return Next::Now(0, now) };
    if last.spec_generation != service.meta.generation {
        return Next::Now(0, now);
    }
    let policy = &service.spec.task.restart;
    match (last.status.state, policy.condition) {
        // Not its own doing: its node was lost or drained, or it was asked to stop.
        (TaskState::Orphaned | TaskState::Shutdown | TaskState::Remove, _) => return Next::Now(last.attempt.max(1), now),
        (_, RestartCondition::None) | (TaskState::Complete, RestartCondition::OnFailure) => return Next::Done,
        _ => {}
    }
    let ran_ms = last.status.since.since_ms(last.meta.created_at);
    let window_over = policy.window_ms > 0 && now.since_ms(last.attempts_since) > policy.window_ms;
    let well = policy.max_attempts.is_none() && ran_ms >= WELL_MS;
    let (attempts, since) = if window_over || well { (0, now) } else { (last.attempt, last.attempts_since) };
    if policy.max_attempts.is_some_and(|max| attempts >= max) {
        return Next::Done;
    }
    let growth = attempts.saturating_sub(EVEN_ATTEMPTS).min(6);
    let delay_ms = policy.delay_ms.saturating_mul(1 << growth).min(RESTART_DELAY_MS_MAX.max(policy.delay_ms));
    let due = last.status.since.min(now).plus_ms(delay_ms);
    if due > now { Next::At(due) } else { Next::Now(attempts + 1, since) }
}

#[cfg(test)]
mod tests {
    use skein_api::{Meta, RestartPolicy, ServiceSpec, TaskSpec};

    use super::*;

    fn check(policy: RestartPolicy, state: TaskState, attempt: u32, ended_ago_ms: u64, expected: Next) {
        let task = TaskSpec { restart: policy, ..TaskSpec::default() };
        let service = Service {
            meta: Meta { generation: 1, ..Meta::default() },
            spec: ServiceSpec { task, ..ServiceSpec::default() },
            ..Service::default()
        };
        let now = UnixMillis(1_000_000);
        let ended = UnixMillis(now.0 - ended_ago_ms);
        let last = Task {
            spec_generation: 1,
            attempt,
            meta: Meta { created_at: UnixMillis(ended.0 - 10), ..Meta::default() },
            status: TaskStatus { state, since: ended, ..TaskStatus::default() },
            ..Task::default()
        };
        assert_eq!(next_attempt(&service, Some(&last), now), expected, "{state:?} {attempt} {ended_ago_ms}");
    }

    #[test]
    fn restart_policy_decides_what_follows() {
        let (now, zero) = (UnixMillis(1_000_000), UnixMillis(0));
        let any = RestartPolicy::default();
        let none = RestartPolicy { condition: RestartCondition::None, ..any };
        let on_failure = RestartPolicy { condition: RestartCondition::OnFailure, ..any };
        let twice = RestartPolicy { max_attempts: Some(2), ..any };
        check(any, TaskState::Failed, 0, 5_000, Next::Now(1, zero));
        check(any, TaskState::Complete, 0, 5_000, Next::Now(1, zero));
        check(any, TaskState::Failed, 0, 1_000, Next::At(UnixMillis(now.0 + 4_000)));
        check(any, TaskState::Failed, 5, 5_000, Next::At(UnixMillis(now.0 + 15_000)));
        check(any, TaskState::Failed, 90, 0, Next::At(UnixMillis(now.0 + 60_000)));
        check(none, TaskState::Failed, 0, 9_000, Next::Done);
        check(on_failure, TaskState::Complete, 0, 9_000, Next::Done);
        check(on_failure, TaskState::Rejected, 0, 9_000, Next::Now(1, zero));
        check(twice, TaskState::Failed, 1, 9_000, Next::Now(2, zero));
        check(twice, TaskState::Failed, 2, 9_000, Next::Done);
        // Lost and drained ones are replaced whatever the policy says.
        check(none, TaskState::Orphaned, 0, 0, Next::Now(1, now));
        check(twice, TaskState::Shutdown, 2, 0, Next::Now(2, now));
    }
}

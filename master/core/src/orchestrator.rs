//! What follows from the desired state: tasks for services, replacement of ended and lost ones, placement, removal.
//!
//! A reconciler over the model: looks at services that something touched, compares what shall be with what is, and
//! stages the difference. Doing it twice changes nothing the second time.
//!
//! `updates`: how tasks follow a change of their service.

mod updates;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::{
    Availability, DependencyCondition, Health, NodeId, NodeState, RestartCondition, Service, ServiceId, ServiceMode,
    Task, TaskId, TaskSpec, TaskState, TaskStatus, UnixMillis,
};

use self::updates::Budget;
use crate::{
    addresses::Shortage,
    command::{Context, Now},
    core::Core,
    ingress, meta,
    model::{Change, Key, Kind, Object},
    pending::Cause,
    placement,
    rng::Rng,
    scheduler::Pin,
    starved::Lack,
    workloads,
};

/// Rounds of one settling. Each round follows the changes of the one before it: tasks are made, placed, and their
/// predecessors removed in at most three; the rest is reserve. What is left then goes on in the next settling.
const ROUNDS_MAX: usize = 8;

/// How often tokens and removed nodes are looked at that are kept for a while, for the first time so long after a start:
/// they are kept for days.
pub(crate) const EXPIRE_PERIOD_MS: u64 = 10 * 60 * 1_000;

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

/// The order in which the tasks of a slot were made, also within one millisecond.
fn age(task: &Task) -> (UnixMillis, u64, u32, &TaskId) {
    (task.meta.created_at, task.spec_generation, task.attempt, &task.id)
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
    /// A new task after so many milliseconds.
    After(u64),
}

/// One thing to do for a service.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// A task shall get to this state.
    Desire(TaskId, TaskState, &'static str),
    /// The successor of this task comes after so many milliseconds.
    Wait(TaskId, u64),
    /// A new task for the slot, counting so many attempts since then.
    Make(Slot, u32, UnixMillis),
}

impl Core {
    /// Does what is due: makes tasks, replaces ended and lost ones, places pending ones, removes what is over.
    /// Costs what changed since the last time, and nothing when nothing did.
    pub fn settle(&mut self, now: Now, seed: u64) {
        let mut rng = Rng::new(seed);
        self.made_room.clear();
        if now.mono_ms >= self.expire_at_ms {
            self.expire_at_ms = now.mono_ms + EXPIRE_PERIOD_MS;
            self.expire(now);
        }
        for _ in 0..ROUNDS_MAX {
            let mut services = std::mem::take(&mut self.dirty_services);
            let reap = std::mem::take(&mut self.reap);
            let wake = std::mem::take(&mut self.wake_pending);
            let nodes = std::mem::take(&mut self.dirty_nodes);
            let (grow, sweep) = (std::mem::take(&mut self.grow), std::mem::take(&mut self.sweep));
            for class in self.scheduler.take_woken() {
                self.pending.stir_class(class);
            }
            let stirred = self.pending.is_stirred();
            if services.is_empty() && nodes.is_empty() && reap.is_empty() && !wake && !stirred && !grow && !sweep {
                break;
            }
            for node in &nodes {
                // Every global service is tried there below.
                drop(self.starved.node_changed(node));
            }
            if wake {
                services.append(&mut self.starved.others());
                self.pending.stir_restless();
            }
            for service in &services {
                self.orchestrate(service, now, &mut rng);
            }
            for node in &nodes {
                self.grow_plain(node, now, &mut rng);
                self.orchestrate_node(node, &services, now, &mut rng);
            }
            if !self.holds.is_empty() {
                self.follow_holds(now, &mut rng);
            }
            if self.pending.is_stirred() {
                self.place_pending(now, &mut rng);
            }
            if grow {
                self.grow_everywhere(now, &mut rng);
            }
            let ended: BTreeSet<ServiceId> = reap.iter().filter_map(|task| self.reap(task, now)).collect();
            for service in ended {
                self.trim_history(&service, now);
            }
            if sweep {
                self.remove_networks();
            }
            if sweep || !nodes.is_empty() || !services.is_empty() {
                self.collect_blocks();
            }
            for network in std::mem::take(&mut self.fuller) {
                self.note_usage(&network, now);
            }
        }
    }

    pub(crate) fn stage_task(&mut self, task: Task) {
        self.stage(Change::Upsert(Object::Task(Arc::new(task))));
    }

    /// Asks for a later desired state; an earlier one or the same changes nothing.
    pub(crate) fn desire(&mut self, id: &TaskId, desired: TaskState, why: &str, now: Now) {
        let Some(task) = self.model.tasks.get(id).filter(|t| t.desired_state < desired) else { return };
        let meta = meta::changed(&task.meta, &meta::internal("orchestrator", why, now, 0), true);
        self.stage_task(Task { desired_state: desired, meta, ..Task::clone(task) });
    }

    fn orchestrate(&mut self, id: &ServiceId, now: Now, rng: &mut Rng) {
        let Some(service) = self.model.services.get(id).cloned() else {
            let tasks: Vec<TaskId> = self.model.service_tasks(id).map(|t| t.id.clone()).collect();
            for task in &tasks {
                self.desire(task, TaskState::Remove, "service removed", now);
                self.end_drain(task);
            }
            return;
        };
        self.ensure_vips(&service);
        let lost: Vec<TaskId> =
            self.model.service_tasks(id).filter(|t| self.is_lost(t)).map(|t| t.id.clone()).collect();
        for task in &lost {
            self.orphan(task, now);
        }
        let steps = self.plan_tasks(&service, now);
        self.take_steps(&service, steps, now, rng);
    }

    /// Global services on a node that changed, but those of `done`. O(global services, and the tasks of the node).
    fn orchestrate_node(&mut self, node: &NodeId, done: &BTreeSet<ServiceId>, now: Now, rng: &mut Rng) {
        let global = |s: &&Service| s.spec.mode == ServiceMode::Global && !done.contains(&s.id);
        let services: Vec<Service> = self.model.services.values().filter(global).cloned().collect();
        for service in services {
            let steps = self.plan_node(&service, node, now);
            self.take_steps(&service, steps, now, rng);
        }
    }

    fn take_steps(&mut self, service: &Service, steps: Vec<Step>, now: Now, rng: &mut Rng) {
        let mut spec = None;
        for step in steps {
            match step {
                Step::Desire(task, desired, why) => self.desire(&task, desired, why, now),
                Step::Wait(last, pause_ms) => {
                    let due = *self.pauses.entry(last).or_insert(now.mono_ms + pause_ms);
                    self.timers.insert((due, service.id.clone()));
                }
                Step::Make(slot, attempt, since) => {
                    let spec = spec.get_or_insert_with(|| self.spec_of(service)).clone();
                    self.make_task(service, spec, &slot, (attempt, since), now, rng);
                }
            }
        }
    }

    fn is_lost(&self, task: &Task) -> bool {
        !task.status.state.is_terminal() && task.node.as_ref().is_some_and(|node| self.loss.is_given_up(node))
    }

    /// A task of a service whose node is lost counts as ended; its container may run on, the master cannot know.
    fn orphan(&mut self, id: &TaskId, now: Now) {
        let Some(task) = self.model.tasks.get(id) else { return };
        let status = TaskStatus {
            state: TaskState::Orphaned,
            since: now.wall,
            message: "its node was lost".to_owned(),
            ..task.status.clone()
        };
        let meta = meta::changed(&task.meta, &meta::internal("orchestrator", "node lost", now, 0), true);
        let desired_state = TaskState::Shutdown.max(task.desired_state);
        self.stage_task(Task { status, meta, desired_state, ..Task::clone(task) });
    }

    /// What a service needs, slot by slot. O(its tasks), nothing is copied.
    fn plan_tasks(&self, service: &Service, now: Now) -> Vec<Step> {
        let mut slots: BTreeMap<Slot, Vec<&Task>> = BTreeMap::new();
        for task in self.model.service_tasks(&service.id) {
            slots.entry(slot_of(task)).or_default().push(task);
        }
        let global = service.spec.mode == ServiceMode::Global;
        let wanted: BTreeSet<Slot> = match service.spec.mode {
            ServiceMode::Replicated(n) => (1..=n).map(Slot::Number).collect(),
            ServiceMode::Global => match self.global_nodes(service, None) {
                Some(nodes) => nodes.into_iter().map(Slot::Node).collect(),
                // Expressions that this release does not understand: what runs goes on.
                None => slots.keys().cloned().collect(),
            },
        };
        let mut steps = Vec::new();
        for (slot, tasks) in slots.iter().filter(|(slot, _)| !wanted.contains(slot)) {
            // A node of a global service that is drained keeps its ended task for a while; a slot too many goes.
            let desired = if global && matches!(slot, Slot::Node(_)) { TaskState::Shutdown } else { TaskState::Remove };
            steps.extend(tasks.iter().map(|t| Step::Desire(t.id.clone(), desired, "scaled down")));
        }
        slots.retain(|slot, _| wanted.contains(slot));
        let mut budget = self.update_budget(service, &slots, now, &mut steps);
        for slot in wanted {
            let tasks = slots.remove(&slot).unwrap_or_default();
            self.plan_slot(service, slot, &tasks, &mut budget, now, &mut steps);
        }
        steps
    }

    /// What a global service needs on one node; nothing when its expressions are not understood.
    fn plan_node(&self, service: &Service, node: &NodeId, now: Now) -> Vec<Step> {
        let mut steps = Vec::new();
        let pin = Pin { nodes: BTreeSet::from([node.clone()]), reason: String::new() };
        let Some(wanted) = self.global_nodes(service, Some(pin)) else { return steps };
        let tasks: Vec<&Task> =
            self.model.node_tasks(node).filter(|t| t.service.as_ref() == Some(&service.id)).collect();
        if wanted.is_empty() {
            steps.extend(tasks.iter().map(|t| Step::Desire(t.id.clone(), TaskState::Shutdown, "scaled down")));
        } else {
            let mut budget = Self::update_budget_alone(service);
            self.plan_slot(service, Slot::Node(node.clone()), &tasks, &mut budget, now, &mut steps);
        }
        steps
    }

    fn plan_slot(
        &self,
        service: &Service,
        slot: Slot,
        tasks: &[&Task],
        budget: &mut Budget,
        now: Now,
        steps: &mut Vec<Step>,
    ) {
        let mut live: Vec<&Task> = tasks.iter().copied().filter(|t| is_live(t)).collect();
        live.sort_by_key(|t| age(t));
        if !live.is_empty() {
            return self.plan_live(service, slot, (&live, tasks), budget, now, steps);
        }
        if tasks.iter().any(|t| !t.status.state.is_terminal() && t.node.is_some()) {
            // The successor comes when the predecessor has stopped.
            return;
        }
        let last = tasks.iter().copied().max_by_key(|t| age(t));
        steps.extend(self.next_step(service, slot, last, now));
    }

    fn is_drained(&self, task: &Task) -> bool {
        let node = task.node.as_ref().and_then(|n| self.model.nodes.get(n));
        node.is_some_and(|n| n.spec.availability == Availability::Drain)
    }

    /// What the service's tasks run: one copy for all of them.
    fn spec_of(&self, service: &Service) -> Arc<TaskSpec> {
        let same = self.model.service_tasks(&service.id).find(|t| t.spec_generation == service.meta.generation);
        same.map_or_else(|| Arc::new(service.spec.task.clone()), |task| task.spec.clone())
    }

    /// Makes a task; the pair says how many attempts count since when.
    fn make_task(
        &mut self,
        service: &Service,
        spec: Arc<TaskSpec>,
        slot: &Slot,
        (attempt, attempts_since): (u32, UnixMillis),
        now: Now,
        rng: &mut Rng,
    ) {
        let ctx = meta::internal("orchestrator", if attempt == 0 { "service" } else { "restart policy" }, now, 0);
        let (number, node, suffix) = match slot {
            Slot::Number(n) => (*n, None, n.to_string()),
            Slot::Node(node) => (0, Some(node.clone()), self.model.node_name(node).to_owned()),
        };
        let task = Task {
            id: TaskId::new(rng.id()),
            meta: meta::created(&ctx),
            name: format!("{}.{suffix}", service.spec.name),
            service: Some(service.id.clone()),
            stack: service.spec.stack.clone(),
            slot: number,
            spec,
            spec_generation: service.meta.generation,
            node: None,
            desired_state: TaskState::Running,
            status: TaskStatus { state: TaskState::Pending, since: now.wall, ..TaskStatus::default() },
            attempt,
            attempts_since,
            ..Task::default()
        };
        let Some(node) = node else { return self.stage_task(task) };
        // One of a global service is placed at once or not made: its node is what it is.
        if let Err(lack) = self.place_global(task, node, now, rng) {
            self.starved.insert(service.id.clone(), lack);
        }
    }

    /// Places a task of a global service on its node.
    fn place_global(&mut self, task: Task, node: NodeId, now: Now, rng: &mut Rng) -> Result<(), Lack> {
        let pin = Pin { nodes: BTreeSet::from([node.clone()]), reason: "one on each node".to_owned() };
        let request = self.request(&task, Some(pin)).map_err(|refusal| match refusal.cause {
            Cause::Dependency(service) => Lack::Dependency(service),
            Cause::Room(_) | Cause::Other => Lack::Other,
        })?;
        if self.scheduler.place(&request, rng.next_u64()).is_err() {
            // What is elsewhere counts only for a task that follows another.
            let container = &task.spec.container;
            let shares = container.share.iter().next().is_some();
            let follows = shares || !container.volumes_from.is_empty() || !container.links.is_empty();
            return Err(if follows || request.looks_for_names() { Lack::Other } else { Lack::Room(node) });
        }
        self.assign(task, node, now, rng).map_err(|_| Lack::Other)
    }

    /// Nodes that a global service shall be on, of those of `pin` if it is given; `None` when its expressions are not
    /// understood.
    fn global_nodes(&self, service: &Service, pin: Option<Pin>) -> Option<Vec<NodeId>> {
        let request = placement::compile(self, &service.spec.task, Some(service), pin).ok()?;
        let mut nodes = self.scheduler.allowed(&request);
        nodes.retain(|id| self.model.nodes.get(id).is_some_and(|n| n.spec.availability != Availability::Drain));
        Some(nodes)
    }

    /// The service that a service still waits for, and for what of it.
    pub(crate) fn unmet_dependency(&self, service: &Service) -> Option<(ServiceId, String)> {
        service.spec.depends_on.iter().find_map(|dependency| {
            let name = &dependency.service;
            let other = self.model.service_named(name)?;
            let of_now = |t: &&Task| t.spec_generation == other.meta.generation;
            let tasks: Vec<&Task> = self.model.service_tasks(&other.id).filter(of_now).collect();
            let wanted = match other.spec.mode {
                ServiceMode::Replicated(n) => n as usize,
                ServiceMode::Global => tasks.iter().filter(|t| is_live(t)).count().max(1),
            };
            let running = |t: &Task| is_live(t) && t.status.state == TaskState::Running;
            let (met, what): (&dyn Fn(&Task) -> bool, _) = match dependency.condition {
                // One that has ended by itself was started too.
                DependencyCondition::ServiceStarted => {
                    (&|t| running(t) || (t.status.state.is_terminal() && t.status.exit_code.is_some()), "to run")
                }
                DependencyCondition::ServiceHealthy => {
                    (&|t| running(t) && t.status.health.is_none_or(|h| h == Health::Healthy), "to be healthy")
                }
                DependencyCondition::ServiceCompletedSuccessfully => {
                    (&|t| t.status.state == TaskState::Complete, "to complete")
                }
            };
            let slots: BTreeSet<Slot> = tasks.iter().copied().filter(|t| met(t)).map(slot_of).collect();
            if slots.len() >= wanted {
                return None;
            }
            let failed = tasks.iter().filter(|t| matches!(t.status.state, TaskState::Failed | TaskState::Rejected));
            let last = failed.max_by_key(|t| age(t)).map(|t| &t.status);
            let words = match last.map(|s| s.err.as_ref().unwrap_or(&s.message)) {
                Some(why) => format!("waits for {name} {what}; its last task failed: {why}"),
                None => format!("waits for {name} {what}"),
            };
            Some((other.id.clone(), words))
        })
    }

    /// Puts a task on a node, with the addresses and volumes that it needs there.
    ///
    /// # Errors
    /// When a network has no addresses left for the node; the task is as it was.
    pub(crate) fn assign(&mut self, task: Task, node: NodeId, now: Now, rng: &mut Rng) -> Result<(), String> {
        let ctx = meta::internal("scheduler", "placed", now, 0);
        let mut task = Task { node: Some(node.clone()), ..task };
        task.generic = placement::generic_ids(&self.model, &task);
        let mut blocks = Vec::new();
        for id in self.model.task_networks(&task) {
            let ctx = Context { seed: rng.next_u64(), ..ctx.clone() };
            match self.ensure_address(&self.model.networks[&id], &node, &task, &ctx) {
                Ok(block) => blocks.extend(block),
                Err(Shortage { message, freeze }) => {
                    if let Some(block) = freeze {
                        self.stage(Change::Upsert(Object::Block(*block)));
                    }
                    return Err(message);
                }
            }
        }
        for block in blocks {
            self.stage(Change::Upsert(Object::Block(block)));
        }
        for volume in self.new_volumes(&task, rng, &ctx) {
            self.stage(Change::Upsert(Object::Volume(volume)));
        }
        let status = TaskStatus { state: TaskState::Assigned, since: now.wall, ..TaskStatus::default() };
        let meta = meta::changed(&task.meta, &ctx, false);
        self.stage_task(Task { status, meta, ..task });
        Ok(())
    }

    /// Networks for plain `docker run`, and those of services with ports of every host, are on every host that is there.
    fn grow_everywhere(&mut self, now: Now, rng: &mut Rng) {
        let ctx = meta::internal("allocator", "network of every host", now, 0);
        let mut missing = Vec::new();
        let with_ports = ingress::networks(&self.model);
        let everywhere = |n: &&skein_api::Network| n.spec.attachable || with_ports.contains(&n.id);
        for network in self.model.networks.values().filter(|n| everywhere(n) && !workloads::is_removed(n)) {
            let nodes = self.model.nodes.keys().filter(|node| !self.model.is_member(&network.id, node));
            missing.extend(nodes.map(|node| (network.clone(), node.clone())));
        }
        for (network, node) in missing {
            let ctx = Context { seed: rng.next_u64(), ..ctx.clone() };
            let grown = self.ensure_block(&network, &node, 1, &ctx).unwrap_or_else(Shortage::into_freeze);
            if let Some(block) = grown {
                self.stage(Change::Upsert(Object::Block(block)));
            }
        }
    }

    /// Removes a task that is over, or asks its agent to; gives back its service when it may have too many ended ones.
    fn reap(&mut self, id: &TaskId, now: Now) -> Option<ServiceId> {
        let task = self.model.tasks.get(id)?;
        let ended = task.status.state.is_terminal();
        let on_node = task.node.as_ref().is_some_and(|n| self.model.nodes.contains_key(n));
        let stopping = task.desired_state > TaskState::Running;
        // A lost host learns on its return, from what it is not told any more, what to remove: nobody waits for it.
        let lost = task.node.as_ref().is_some_and(|n| self.node_status(n).state == NodeState::Down);
        let gone = !on_node || lost || task.status.state == TaskState::Remove;
        let removed = task.desired_state == TaskState::Remove && gone;
        if removed || (stopping && !on_node && !ended && task.service.is_some()) {
            // Also one that was never placed and never will be: there is nothing to remember of it.
            self.stage(Change::Delete(Key { kind: Kind::Task, id: id.to_string() }));
            return None;
        }
        if stopping && !on_node && !ended {
            let state = TaskState::Shutdown;
            let message = "stopped before it was placed".to_owned();
            let status = TaskStatus { state, message, since: now.wall, ..task.status.clone() };
            self.stage_task(Task { status, ..Task::clone(task) });
            return None;
        }
        task.service.clone().filter(|_| ended)
    }

    /// Asks agents to remove ended tasks of a service but the newest of each slot.
    fn trim_history(&mut self, service: &ServiceId, now: Now) {
        let mut slots: BTreeMap<Slot, Vec<&Task>> = BTreeMap::new();
        for task in self.model.service_tasks(service).filter(|t| t.status.state.is_terminal()) {
            slots.entry(slot_of(task)).or_default().push(task);
        }
        let mut old: Vec<TaskId> = Vec::new();
        for ended in slots.values_mut().filter(|ended| ended.len() > HISTORY_PER_SLOT) {
            ended.sort_by_key(|t| std::cmp::Reverse(age(t)));
            old.extend(ended.iter().skip(HISTORY_PER_SLOT).map(|t| t.id.clone()));
        }
        for task in old {
            self.desire(&task, TaskState::Remove, "history", now);
        }
    }

    /// Networks of removed stacks go with their last task.
    fn remove_networks(&mut self) {
        let over =
            |n: &&skein_api::Network| workloads::is_removed(n) && self.model.network_tasks(&n.id).next().is_none();
        let doomed: Vec<_> = self.model.networks.values().filter(over).cloned().collect();
        for network in doomed {
            for change in self.delete_network(&network) {
                self.stage(change);
            }
        }
    }
}

/// What follows the last task of a slot; `waited`: the pause after it is over.
fn next_attempt(service: &Service, last: Option<&Task>, now: UnixMillis, waited: bool) -> Next {
    let Some(last) = last else { return Next::Now(0, now) };
    if last.spec_generation != service.meta.generation {
        return Next::Now(0, now);
    }
    let policy = &service.spec.task.restart;
    match (last.status.state, policy.condition) {
        // Not its own doing: its node was lost or drained, or it was asked to stop.
        (TaskState::Orphaned | TaskState::Shutdown | TaskState::Remove, _) => {
            return Next::Now(last.attempt.max(1), now);
        }
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
    let left_ms = delay_ms.saturating_sub(now.since_ms(last.status.since));
    if waited || left_ms == 0 { Next::Now(attempts + 1, since) } else { Next::After(left_ms) }
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
        assert_eq!(next_attempt(&service, Some(&last), now, false), expected, "{state:?} {attempt} {ended_ago_ms}");
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
        check(any, TaskState::Failed, 0, 1_000, Next::After(4_000));
        check(any, TaskState::Failed, 5, 5_000, Next::After(15_000));
        check(any, TaskState::Failed, 90, 0, Next::After(60_000));
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

//! The decision: desired against observed, one task and one network at a time.
//!
//! Each task goes through three steps: what its container says becomes the status ([`Task::observe`]), an ended
//! container task may begin another run ([`Task::next_run`]), and then at most one action brings it nearer to what is
//! wanted ([`Task::act`]). Containers that no assignment knows are stopped and removed, once a master has confirmed
//! the assignments.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{DEFAULT_STOP_GRACE_MS, Health, NetworkId, TaskAssignment, TaskId, TaskState, TaskStatus, UnixMillis};

use crate::{
    Action, ActionKey, ActionKind, Container, ContainerState, Desired, FAILURE_PAUSE_MAX_MS, Failure, Memory, Observed,
    Plan, Settings, StopReason, TaskLocal,
    collect::{self, Ended},
    restart::{self, Restart},
    state,
};

/// Compares `desired` with `observed` and says what to do.
///
/// Idempotent: with the plan's updates applied and the same `observed`, the next plan differs at most by what time
/// brings. Nothing is planned for an object that has an action in flight. O(n log n) in documents and containers.
pub fn reconcile(
    desired: &Desired<'_>,
    observed: &Observed,
    now: UnixMillis,
    memory: &Memory,
    settings: &Settings,
) -> Plan {
    let mut plan = Plan::default();
    let mut by_task: BTreeMap<&TaskId, Vec<&Container>> = BTreeMap::new();
    for container in observed.containers.values() {
        by_task.entry(&container.task).or_default().push(container);
    }
    for containers in by_task.values_mut() {
        // The one that counts first: live, then newest. More than one is left over from a crash.
        containers
            .sort_by(|a, b| (b.state.is_live(), b.created_at, &b.id).cmp(&(a.state.is_live(), a.created_at, &a.id)));
    }
    let cx = Context { desired, observed, now, memory, by_task: &by_task };
    let mut ended = Vec::new();
    for assignment in desired.tasks().filter(|a| !observed.unseen.contains(&a.id)) {
        cx.assigned(assignment, &mut plan, &mut ended);
    }
    for surplus in collect::surplus(ended) {
        if cx.free(&ActionKey::Task(surplus.task.clone()), &mut plan) {
            plan.actions.push(Action::RemoveContainer { task: surplus.task, container: surplus.container });
        }
    }
    if desired.confirmed {
        cx.unknown_tasks(&mut plan);
    }
    cx.networks(&mut plan);
    cx.images(settings, &mut plan);
    plan.actions.sort_by_key(|a| (rank(a.kind()), a.key()));
    plan
}

/// What is remembered of a task that nothing is remembered of.
fn first_local(assignment: &TaskAssignment, container: Option<&Container>) -> TaskLocal {
    let mut local = TaskLocal {
        run: assignment.run,
        assigned_run: assignment.run,
        reserved: container.is_some() && !assignment.networks.is_empty(),
        ..TaskLocal::default()
    };
    if assignment.over && container.is_none() {
        local.status.state = TaskState::Shutdown;
        local.status.message = "has ended, and its container is gone".to_owned();
    }
    local
}

/// What frees something comes before what needs something.
fn rank(kind: ActionKind) -> u8 {
    match kind {
        ActionKind::EnsureEngineNetwork => 0,
        ActionKind::StopContainer => 1,
        ActionKind::RemoveContainer => 2,
        ActionKind::ReleaseTask => 3,
        ActionKind::StartContainer => 4,
        ActionKind::CreateContainer => 5,
        ActionKind::RemoveEngineNetwork => 6,
        ActionKind::RemoveImage => 7,
    }
}

struct Context<'a> {
    desired: &'a Desired<'a>,
    observed: &'a Observed,
    now: UnixMillis,
    memory: &'a Memory,
    by_task: &'a BTreeMap<&'a TaskId, Vec<&'a Container>>,
}

impl Context<'_> {
    /// Whether an action may begin: nothing in flight for the object, and no pause after a failure.
    fn free(&self, key: &ActionKey, plan: &mut Plan) -> bool {
        if self.observed.in_flight.contains_key(key) {
            return false;
        }
        match self.memory.failures.get(key) {
            // A pause that is longer than any was set before the clock went back: it is over.
            Some(failure)
                if failure.not_before > self.now && failure.not_before <= self.now.plus_ms(FAILURE_PAUSE_MAX_MS) =>
            {
                plan.wake(failure.not_before);
                false
            }
            _ => true,
        }
    }

    /// Cuts off what would only have to be undone.
    fn cancel_start(&self, task: &TaskId, plan: &mut Plan) {
        let key = ActionKey::Task(task.clone());
        let kind = self.observed.in_flight.get(&key);
        if matches!(kind, Some(ActionKind::CreateContainer | ActionKind::StartContainer)) {
            plan.cancel.insert(key);
        }
    }

    fn assigned(&self, assignment: &TaskAssignment, plan: &mut Plan, ended: &mut Vec<Ended>) {
        let containers: &[&Container] = self.by_task.get(&assignment.id).map_or(&[], |c| c);
        let container = containers.first().copied();
        let known = self.memory.tasks.get(&assignment.id);
        // Removed, and wanted again: a master that was restored from a backup does not know that it had it removed.
        let removed = |local: &&TaskLocal| local.status.state == TaskState::Remove;
        let back = known.filter(removed).is_some() && assignment.desired_state != TaskState::Remove;
        let mut task = Task {
            cx: self,
            assignment,
            container,
            local: known.filter(|_| !back).cloned().unwrap_or_else(|| first_local(assignment, container)),
        };
        let was_terminal = task.local.status.state.is_terminal();
        if !task.is_service() && assignment.over && task.live() && !was_terminal && task.local.run == assignment.run {
            // What runs here is not the run that the master knows as ended: it was restored from a backup.
            task.local.run += 1;
        }
        let status = task.observe();
        task.local.status = state::step(&task.local.status, status, self.now);
        if !was_terminal && task.local.status.state.is_terminal() {
            task.note_end();
            // The next run is another plan's: this end is to be reported first.
            plan.wake(self.now);
        }
        if was_terminal {
            task.next_run(plan);
        } else if task.user_start() && !task.live() && !task.local.status.state.is_terminal() {
            // It has not started yet, so this start is that one.
            task.local.assigned_run = assignment.run;
            task.local.run = task.local.run.max(assignment.run);
        }
        if !task.wants_running() {
            self.cancel_start(&assignment.id, plan);
        }
        let key = ActionKey::Task(assignment.id.clone());
        if let Some(action) = task.act(containers, ended)
            && self.free(&key, plan)
        {
            task.before(&action);
            plan.actions.push(action);
        }
        let local = task.local;
        if known.is_none_or(|k| k.status != local.status || k.run != local.run) {
            plan.reports.push(local.report(&assignment.id));
        }
        if known != Some(&local) {
            plan.updates.tasks.insert(assignment.id.clone(), Some(local));
        }
    }

    /// Containers and addresses of tasks that no assignment knows.
    fn unknown_tasks(&self, plan: &mut Plan) {
        for (task, containers) in self.by_task {
            if self.desired.task(task).is_some()
                || self.observed.unseen.contains(*task)
                || !self.free(&ActionKey::Task((*task).clone()), plan)
            {
                continue;
            }
            let container = containers[0];
            if !container.networks.is_empty() && !self.memory.tasks.contains_key(*task) {
                // Nothing else would give its addresses back once the container is gone.
                let local = TaskLocal { reserved: true, ..Default::default() };
                plan.updates.tasks.insert((*task).clone(), Some(local));
            }
            let (task, id) = ((*task).clone(), container.id.clone());
            plan.actions.push(if container.state.is_live() {
                Action::StopContainer { task, container: id, grace_ms: container.stop_grace_ms }
            } else {
                Action::RemoveContainer { task, container: id }
            });
        }
        for (task, local) in &self.memory.tasks {
            if self.desired.task(task).is_some() || self.observed.unseen.contains(task) {
                continue;
            }
            self.cancel_start(task, plan);
            if self.by_task.contains_key(task) {
                continue;
            }
            let key = ActionKey::Task(task.clone());
            if !local.reserved {
                if !self.observed.in_flight.contains_key(&key) {
                    plan.updates.tasks.insert(task.clone(), None);
                }
            } else if self.free(&key, plan) {
                plan.actions.push(Action::ReleaseTask { task: task.clone() });
            }
        }
    }

    fn networks(&self, plan: &mut Plan) {
        for network in self.desired.networks() {
            if !self.observed.networks.contains_key(&network.id)
                && self.free(&ActionKey::Network(network.id.clone()), plan)
            {
                plan.actions.push(Action::EnsureEngineNetwork { network: network.id.clone() });
            }
        }
        if !self.desired.confirmed || !self.observed.unseen.is_empty() {
            return;
        }
        let used: BTreeSet<&NetworkId> = self.observed.containers.values().flat_map(|c| &c.networks).collect();
        for (id, network) in &self.observed.networks {
            if !self.desired.has_network(id) && !used.contains(id) && self.free(&ActionKey::Network(id.clone()), plan) {
                let engine_id = network.engine_id.clone();
                plan.actions.push(Action::RemoveEngineNetwork { network: id.clone(), engine_id });
            }
        }
    }

    fn images(&self, settings: &Settings, plan: &mut Plan) {
        if !self.desired.confirmed || self.memory.images.is_empty() || !self.observed.unseen.is_empty() {
            return;
        }
        let mut referenced: BTreeSet<&str> = self.desired.tasks().map(|t| t.spec.container.image.as_str()).collect();
        referenced.extend(self.observed.containers.values().map(|c| c.image.as_str()));
        let (gone, next) = collect::images(&self.memory.images, &referenced, settings, self.now, &mut plan.updates);
        for image in gone {
            if self.free(&ActionKey::Image(image.clone()), plan) {
                plan.actions.push(Action::RemoveImage { image });
            }
        }
        if let Some(next) = next {
            plan.wake(next);
        }
    }
}

/// One assigned task on its way through a plan.
struct Task<'a> {
    cx: &'a Context<'a>,
    assignment: &'a TaskAssignment,
    container: Option<&'a Container>,
    local: TaskLocal,
}

impl Task<'_> {
    fn is_service(&self) -> bool {
        self.assignment.service.is_some()
    }

    fn wants_running(&self) -> bool {
        // One-shot: a service task that the master knows as ended has a successor, whatever brought this one back.
        let replaced = self.is_service() && self.assignment.over;
        !replaced
            && !matches!(self.assignment.desired_state, TaskState::Remove)
            && !self.assignment.desired_state.is_terminal()
    }

    fn in_flight(&self) -> Option<ActionKind> {
        self.cx.observed.in_flight.get(&ActionKey::Task(self.assignment.id.clone())).copied()
    }

    fn failure(&self) -> Option<&Failure> {
        self.cx.memory.failures.get(&ActionKey::Task(self.assignment.id.clone()))
    }

    fn live(&self) -> bool {
        self.container.is_some_and(|c| c.state.is_live())
    }

    /// Whether the container shows a start of this run.
    fn started(&self) -> bool {
        self.container
            .is_some_and(|c| c.state.is_live() || (c.started_at.0 != 0 && c.started_at != self.local.prev_started))
    }

    /// What the container says, as a status; `since` is left to [`state::step`].
    fn observe(&self) -> TaskStatus {
        let old = &self.local.status;
        if old.state.is_terminal() {
            return old.clone();
        }
        let mut status = match self.container {
            Some(c) if self.started() && c.state.is_live() => self.observe_live(c),
            Some(c) if self.started() => self.observe_ended(c),
            other => self.observe_not_started(other),
        };
        if let Some(c) = self.container {
            status.container_id = Some(c.id.clone());
            status.ports.clone_from(&c.ports);
        }
        status.addresses = match self.container {
            Some(c) if self.local.addresses.is_empty() => c.addresses.clone(),
            _ => self.local.addresses.clone(),
        };
        if status.err.is_none()
            && !status.state.is_terminal()
            && let Some(failure) = self.failure()
        {
            status.err = Some(failure.message.clone());
        }
        status
    }

    fn observe_live(&self, c: &Container) -> TaskStatus {
        let (state, message) = match c.health {
            None if c.state == ContainerState::Paused => (TaskState::Running, "paused"),
            None => (TaskState::Running, "running"),
            Some(Health::Healthy) => (TaskState::Running, "healthy"),
            Some(Health::Starting) => (TaskState::Starting, "waits for its health check"),
            // A service task is stopped and replaced; a container task goes on, as the engine alone would have it.
            Some(Health::Unhealthy) if self.is_service() => {
                (self.local.status.state.max(TaskState::Starting), "unhealthy")
            }
            Some(Health::Unhealthy) => (TaskState::Running, "unhealthy"),
        };
        // Healthy once is Running; the health itself is reported beside it.
        let state = state.max(self.local.status.state);
        let message = if self.local.stopping.is_some() { "stopping" } else { message };
        TaskStatus { state, message: message.into(), health: c.health, ..Default::default() }
    }

    fn observe_ended(&self, c: &Container) -> TaskStatus {
        let code = c.exit_code;
        let (state, message, err) = match self.local.stopping {
            Some(StopReason::Unhealthy) => (TaskState::Failed, "unhealthy".to_owned(), Some("unhealthy".to_owned())),
            Some(StopReason::Requested | StopReason::Restart) => {
                (TaskState::Shutdown, format!("stopped, exit code {code}"), None)
            }
            None if c.oom_killed => {
                let err = "killed for using more memory than its limit".to_owned();
                (TaskState::Failed, "out of memory".to_owned(), Some(err))
            }
            None if c.state == ContainerState::Dead => {
                (TaskState::Failed, "dead".to_owned(), Some("the engine could not remove the container".to_owned()))
            }
            None if code == 0 => (TaskState::Complete, "exited with 0".to_owned(), None),
            None => {
                let err = c.error.clone().filter(|e| !e.is_empty()).unwrap_or_else(|| format!("exited with {code}"));
                (TaskState::Failed, format!("exited with {code}"), Some(err))
            }
        };
        TaskStatus {
            state,
            message,
            err,
            exit_code: Some(code),
            oom_killed: c.oom_killed,
            health: c.health,
            ..Default::default()
        }
    }

    fn observe_not_started(&self, container: Option<&Container>) -> TaskStatus {
        let of = |state, message: &str| TaskStatus { state, message: message.into(), ..Default::default() };
        if let Some(rejected) = &self.local.rejected {
            return TaskStatus { err: Some(rejected.clone()), ..of(TaskState::Rejected, "could not be started") };
        }
        let old = self.local.status.state;
        match (container, self.in_flight()) {
            (_, Some(ActionKind::CreateContainer)) => {
                let progress = self.cx.observed.progress.get(&self.assignment.id);
                of(old.max(TaskState::Preparing), progress.map_or("preparing", |p| p))
            }
            (Some(_), Some(ActionKind::StartContainer)) => of(old.max(TaskState::Starting), "starting"),
            (None, None) if old >= TaskState::Starting => {
                let state = if self.wants_running() { TaskState::Failed } else { TaskState::Shutdown };
                let gone = "the container was removed by somebody else";
                TaskStatus { err: Some(gone.into()), ..of(state, "container is gone") }
            }
            (_, None) if !self.wants_running() => of(TaskState::Shutdown, "stopped before it was started"),
            (None, _) => match self.blocked() {
                Some((message, err)) => TaskStatus { err, ..of(old.max(TaskState::Accepted), &message) },
                None if old > TaskState::Accepted => of(old, "waits to be prepared"),
                None => of(TaskState::Accepted, "accepted"),
            },
            (Some(_), _) => of(old.max(TaskState::Ready), "container made"),
        }
    }

    /// What the container must wait for before it can be made, and what is wrong with that.
    fn blocked(&self) -> Option<(String, Option<String>)> {
        for network in &self.assignment.networks {
            if !self.cx.desired.has_network(network) {
                return Some((format!("waits for the assignment of network {}", network.short()), None));
            }
            if !self.cx.observed.networks.contains_key(network) {
                let failure = self.cx.memory.failures.get(&ActionKey::Network(network.clone()));
                let message = format!("waits for the engine to have network {}", network.short());
                return Some((message, failure.map(|f| f.message.clone())));
            }
        }
        for (task, _) in &self.assignment.volumes_from {
            let there = self.cx.by_task.get(task).is_some_and(|c| c[0].state != ContainerState::Removing);
            if !there {
                return Some((
                    format!("waits for the container of task {}, whose volumes it takes", task.short()),
                    None,
                ));
            }
        }
        for (key, with) in self.assignment.spec.container.share.iter() {
            let shared = self.assignment.share.iter().find(|(resolved, _)| *resolved == key);
            // The engine joins the namespaces of a running container only.
            let runs = |task: &TaskId| self.cx.by_task.get(task).is_some_and(|c| c[0].state == ContainerState::Running);
            if !shared.is_some_and(|(_, task)| runs(task)) {
                return Some((format!("waits for {with} to run here, whose namespace it shares ({key})"), None));
            }
        }
        None
    }

    /// Keeps count of runs that ended at once.
    fn note_end(&mut self) {
        let lasted = match self.container {
            Some(c) if self.started() => c.finished_at.since_ms(c.started_at),
            _ => 0,
        };
        self.local.quick_ends = if lasted >= restart::STABLE_MS { 0 } else { self.local.quick_ends.saturating_add(1) };
    }

    /// A user started it since this run began. The agent's own restarts raise `run` too, so it is the assignment's run
    /// that tells.
    fn user_start(&self) -> bool {
        !self.is_service() && self.assignment.run > self.local.assigned_run
    }

    /// Begins another run of an ended container task, if a user or its policy wants that.
    fn next_run(&mut self, plan: &mut Plan) {
        if self.is_service() || self.in_flight().is_some() || self.local.status.state == TaskState::Remove {
            return;
        }
        if !self.wants_running() {
            return self.end_unknown_run();
        }
        let run = self.local.run;
        if self.live() {
            // Somebody started it through the engine: it is wanted, so this is another run.
            if self.local.stopping.is_none() {
                self.begin_run(run + 1, self.local.prev_started);
                let status = self.observe();
                self.local.status = state::step(&self.local.status, status, self.cx.now);
            }
            return;
        }
        let started = self.container.map_or(UnixMillis(0), |c| c.started_at);
        if self.user_start() || self.local.status.state == TaskState::Shutdown {
            restart::reset(&mut self.local);
            self.begin_run(self.assignment.run.max(run + 1), started);
            return;
        }
        match restart::decide(&self.assignment.spec.restart, &self.local, self.cx.now) {
            Restart::Now => {
                restart::note(&self.assignment.spec.restart, &mut self.local, self.cx.now);
                self.begin_run(run + 1, started);
            }
            Restart::At(at) => plan.wake(at),
            Restart::Never => {}
        }
    }

    /// The master waits for the end of a run that this host knows nothing of, for its ledger went back to an earlier
    /// state: nothing of that run is here, and nobody wants it any more.
    fn end_unknown_run(&mut self) {
        let stop = self.assignment.desired_state == TaskState::Shutdown && !self.assignment.over;
        if stop && self.assignment.run > self.local.run && !self.live() {
            let started = self.container.map_or(UnixMillis(0), |c| c.started_at);
            self.begin_run(self.assignment.run, started);
            let status = self.observe();
            self.local.status = state::step(&self.local.status, status, self.cx.now);
        }
    }

    fn begin_run(&mut self, run: u64, prev_started: UnixMillis) {
        self.local.run = run;
        self.local.assigned_run = self.assignment.run;
        self.local.prev_started = prev_started;
        self.local.stopping = None;
        self.local.rejected = None;
        self.local.status = TaskStatus {
            state: TaskState::Accepted,
            since: self.cx.now,
            message: "to be started again".into(),
            container_id: self.container.map(|c| c.id.clone()),
            addresses: self.local.addresses.clone(),
            ports: self.container.map_or_else(Vec::new, |c| c.ports.clone()),
            ..Default::default()
        };
    }

    /// The one action that brings this task nearer to what is wanted.
    fn act(&mut self, containers: &[&Container], ended: &mut Vec<Ended>) -> Option<Action> {
        if let Some(surplus) = containers.get(1) {
            return Some(if surplus.state.is_live() { self.stop(surplus) } else { self.remove(surplus) });
        }
        let terminal = self.local.status.state.is_terminal();
        let Some(c) = self.container else { return self.act_without_container(terminal) };
        if c.state.is_live() {
            return self.act_on_live(c, terminal);
        }
        if self.assignment.desired_state == TaskState::Remove {
            return Some(self.remove(c));
        }
        if terminal {
            if self.is_service() {
                return self.act_on_ended(c, ended);
            }
            return None;
        }
        match c.state {
            ContainerState::Dead => Some(self.remove(c)),
            ContainerState::Removing => None,
            _ => Some(Action::StartContainer { task: self.assignment.id.clone(), container: c.id.clone() }),
        }
    }

    fn act_without_container(&mut self, terminal: bool) -> Option<Action> {
        let task = self.assignment.id.clone();
        let removing = self.assignment.desired_state == TaskState::Remove;
        if self.local.reserved && (removing || (terminal && self.is_service())) {
            return Some(Action::ReleaseTask { task });
        }
        if removing {
            if self.in_flight().is_none() {
                let status = TaskStatus { state: TaskState::Remove, message: "removed".into(), ..Default::default() };
                self.local.status = state::step(&self.local.status, status, self.cx.now);
            }
            return None;
        }
        (!terminal && self.wants_running() && self.blocked().is_none()).then_some(Action::CreateContainer { task })
    }

    fn act_on_live(&mut self, c: &Container, terminal: bool) -> Option<Action> {
        let unhealthy = self.is_service() && c.health == Some(Health::Unhealthy);
        let again = self.user_start();
        let reason = match self.local.stopping {
            Some(reason) => Some(reason),
            None if !self.wants_running() => Some(StopReason::Requested),
            // A service task is one-shot: what ended stays ended, whoever started it.
            None if terminal => Some(StopReason::Requested),
            None if unhealthy => Some(StopReason::Unhealthy),
            None if again => Some(StopReason::Restart),
            None => None,
        };
        self.local.stopping = reason;
        reason.map(|_| self.stop(c))
    }

    /// An ended service task: its addresses go back, its container is kept by the rule of [`collect`].
    fn act_on_ended(&mut self, c: &Container, ended: &mut Vec<Ended>) -> Option<Action> {
        if self.local.reserved {
            return Some(Action::ReleaseTask { task: self.assignment.id.clone() });
        }
        if c.state == ContainerState::Dead {
            return Some(self.remove(c));
        }
        ended.extend(self.assignment.service.clone().map(|service| Ended {
            service,
            slot: self.assignment.slot,
            at: c.finished_at.max(c.created_at),
            task: self.assignment.id.clone(),
            container: c.id.clone(),
        }));
        None
    }

    fn stop(&self, c: &Container) -> Action {
        let grace_ms = self.assignment.spec.container.stop_grace_ms.unwrap_or(DEFAULT_STOP_GRACE_MS);
        Action::StopContainer { task: self.assignment.id.clone(), container: c.id.clone(), grace_ms }
    }

    fn remove(&self, c: &Container) -> Action {
        Action::RemoveContainer { task: self.assignment.id.clone(), container: c.id.clone() }
    }

    /// What must be remembered before `action` begins: a crash in its middle must not lose it.
    fn before(&mut self, action: &Action) {
        let next = match action {
            Action::CreateContainer { .. } => {
                self.local.reserved |= !self.assignment.networks.is_empty();
                TaskStatus { state: TaskState::Preparing, message: "preparing".into(), ..self.local.status.clone() }
            }
            Action::StartContainer { .. } => {
                self.local.reserved |= !self.assignment.networks.is_empty();
                TaskStatus { state: TaskState::Starting, message: "starting".into(), ..self.local.status.clone() }
            }
            _ => return,
        };
        self.local.status = state::step(&self.local.status, TaskStatus { err: None, ..next }, self.cx.now);
    }
}

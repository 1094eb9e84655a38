//! How far a stack is: a state machine over its tasks. Pure; who feeds it lists and follows tasks.
//!
//! ```text
//!  list and events -> seen(task) -> Some(line to show)
//!                     outcome()  -> Waiting -> Done | Failed(why)
//! ```
//! A service is there when it has its number of tasks of the applied specification running (the agent says `running`
//! only once a health check passed), or completed where it may. It has failed when one of its slots failed
//! [`FAILURES_MAX`] times, or at once where nothing will replace the task.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{
    Health, NodeId, PlanAction, RestartCondition, Service, ServiceId, ServiceMode, StackPlan, Task, TaskId, TaskState,
};

/// Failures of one slot until waiting is given up: one may be bad luck, two a slow dependency.
pub(crate) const FAILURES_MAX: u32 = 3;

/// What to show of one task, now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// Name of the task without the stack's.
    pub(crate) name: String,
    /// What it does, where, and why.
    pub(crate) text: String,
    /// It runs, or has done its work.
    pub(crate) settled: bool,
}

/// Whether to go on waiting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Something is still to come.
    Waiting,
    /// All services are there.
    Done,
    /// At least one will not come: the slots that failed for good.
    Failed(Vec<String>),
}

struct Wanted {
    service: Service,
    /// Tasks of earlier specifications count too: the plan left the containers alone.
    any_generation: bool,
}

/// A slot: service, number, and for global services the node.
type Slot = (ServiceId, u32, Option<NodeId>);

/// The state of waiting for one stack.
pub(crate) struct Progress {
    stack: String,
    wanted: BTreeMap<ServiceId, Wanted>,
    nodes: BTreeMap<NodeId, String>,
    tasks: BTreeMap<TaskId, Task>,
    /// Tasks of the specification before.
    before: BTreeMap<TaskId, Task>,
    shown: BTreeMap<TaskId, String>,
    counted: BTreeSet<TaskId>,
    failures: BTreeMap<Slot, u32>,
}

impl Progress {
    /// Waiting for these services to be as `plan` made them.
    pub(crate) fn new(stack: &str, services: Vec<Service>, plan: &StackPlan, nodes: BTreeMap<NodeId, String>) -> Self {
        let planned = |name: &str| plan.items.iter().find(|i| i.kind == "service" && i.name == name).map(|i| i.action);
        let wanted = services.into_iter().filter_map(|service| {
            let action = planned(&service.spec.name);
            // Orphans are left as they are, whatever that is.
            (action != Some(PlanAction::Orphan)).then(|| {
                let any_generation = matches!(action, Some(PlanAction::Keep | PlanAction::Update));
                (service.id.clone(), Wanted { service, any_generation })
            })
        });
        Self {
            stack: stack.to_owned(),
            wanted: wanted.collect(),
            nodes,
            tasks: BTreeMap::new(),
            before: BTreeMap::new(),
            shown: BTreeMap::new(),
            counted: BTreeSet::new(),
            failures: BTreeMap::new(),
        }
    }

    /// Learns a node's name.
    pub(crate) fn node(&mut self, id: NodeId, name: String) {
        self.nodes.insert(id, name);
    }

    fn wanted(&self, task: &Task) -> Option<&Wanted> {
        let wanted = self.wanted.get(task.service.as_ref()?)?;
        let current = wanted.any_generation || task.spec_generation >= wanted.service.meta.generation;
        current.then_some(wanted)
    }

    /// Takes in the state of a task; gives back what to show when that changed.
    pub(crate) fn seen(&mut self, task: Task) -> Option<Line> {
        if self.wanted(&task).is_none() {
            let ours = task.service.as_ref().is_some_and(|service| self.wanted.contains_key(service));
            let news = self.before.get(&task.id).is_none_or(|k| k.meta.revision <= task.meta.revision);
            if ours && news {
                self.before.insert(task.id.clone(), task);
            }
            return None;
        }
        let known = self.tasks.get(&task.id);
        // A list may be older than events that came before it.
        if known.is_some_and(|k| k.meta.revision > task.meta.revision) {
            return None;
        }
        // Failures from before this watch began, of services that were not touched, are not news.
        let news = known.is_some() || !task.status.state.is_terminal() || !self.is_kept(&task);
        let failed = matches!(task.status.state, TaskState::Failed | TaskState::Rejected);
        if failed && self.counted.insert(task.id.clone()) && news {
            *self.failures.entry(slot(&task)).or_default() += 1;
        }
        let id = task.id.clone();
        let shows = news && (task.desired_state <= TaskState::Running || failed);
        let line = shows.then(|| self.line(&task));
        self.tasks.insert(id.clone(), task);
        let line = line?;
        (self.shown.insert(id, line.text.clone()).as_ref() != Some(&line.text)).then_some(line)
    }

    fn is_kept(&self, task: &Task) -> bool {
        self.wanted(task).is_some_and(|w| w.any_generation)
    }

    /// Forgets a task that is gone.
    pub(crate) fn gone(&mut self, id: &TaskId) {
        self.tasks.remove(id);
        self.before.remove(id);
        self.shown.remove(id);
    }

    fn line(&self, task: &Task) -> Line {
        let name = short_name(&task.name, &self.stack).to_owned();
        let node = task.node.as_ref().map(|id| self.nodes.get(id).map_or(id.short(), String::as_str));
        Line { name, text: describe(task, node), settled: self.settled(task) }
    }

    fn settled(&self, task: &Task) -> bool {
        match task.status.state {
            TaskState::Running => task.status.health != Some(Health::Unhealthy),
            TaskState::Complete => task.spec.restart.condition != RestartCondition::Any,
            _ => false,
        }
    }

    /// Tasks that are to run and do not yet, newest of each slot.
    fn unsettled<'a>(&'a self, service: &'a ServiceId) -> impl Iterator<Item = &'a Task> {
        let live = |t: &&Task| t.service.as_ref() == Some(service) && t.desired_state <= TaskState::Running;
        self.tasks.values().filter(live).filter(|t| !t.status.state.is_terminal() && !self.settled(t))
    }

    fn is_there(&self, wanted: &Wanted) -> bool {
        let id = &wanted.service.id;
        let of = |t: &&Task| t.service.as_ref() == Some(id) && t.desired_state <= TaskState::Running;
        // A completed task is asked to stop, so it counts whatever is wanted of it.
        let done = |t: &&Task| t.service.as_ref() == Some(id) && t.status.state == TaskState::Complete;
        let settled: BTreeSet<Slot> =
            self.tasks.values().filter(|t| (of(t) || done(t)) && self.settled(t)).map(slot).collect();
        match wanted.service.spec.mode {
            ServiceMode::Replicated(n) => settled.len() >= n as usize,
            // How many there are to be is not known here; those of before that go on are still to be replaced.
            ServiceMode::Global => {
                let goes_on = |t: &Task| of(&t) && !t.status.state.is_terminal();
                let before = self.before.values().any(goes_on);
                !settled.is_empty() && !before && self.unsettled(id).next().is_none()
            }
        }
    }

    /// Whether to go on waiting.
    pub(crate) fn outcome(&self) -> Outcome {
        let lost = |slot: &&Slot| {
            let wanted = &self.wanted[&slot.0].service.spec.task.restart;
            let n = self.failures[*slot];
            n >= FAILURES_MAX
                || wanted.condition == RestartCondition::None
                || wanted.max_attempts.is_some_and(|m| n > m)
        };
        let failed: Vec<String> = self.failures.keys().filter(lost).map(|s| self.slot_name(s)).collect();
        if !failed.is_empty() {
            return Outcome::Failed(failed);
        }
        if self.wanted.values().all(|w| self.is_there(w)) { Outcome::Done } else { Outcome::Waiting }
    }

    fn slot_name(&self, (service, number, node): &Slot) -> String {
        let name = self.wanted.get(service).map_or("?", |w| w.service.spec.name.as_str());
        let name = short_name(name, &self.stack);
        match node {
            Some(node) => format!("{name}.{}", self.nodes.get(node).map_or(node.short(), String::as_str)),
            None => format!("{name}.{number}"),
        }
    }

    /// Services that are not there, each with its full name, and what is known of the tasks that are missing.
    pub(crate) fn missing(&self) -> Vec<(String, Vec<Line>)> {
        let missing = self.wanted.values().filter(|w| !self.is_there(w));
        let lines = |w: &Wanted| {
            // The newest task of a slot says best what is wrong with it.
            let mut newest: BTreeMap<Slot, &Task> = BTreeMap::new();
            for task in self.tasks.values().filter(|t| t.service.as_ref() == Some(&w.service.id)) {
                let entry = newest.entry(slot(task)).or_insert(task);
                let worth = |t: &Task| (t.status.err.is_some() || t.status.state.is_terminal(), t.meta.created_at);
                if worth(task) > worth(entry) {
                    *entry = task;
                }
            }
            newest.into_values().filter(|t| !self.settled(t)).map(|t| self.line(t)).collect()
        };
        missing.map(|w| (w.service.spec.name.clone(), lines(w))).collect()
    }

    /// All tasks that are known, in the order of their names.
    pub(crate) fn tasks(&self) -> Vec<&Task> {
        let mut tasks: Vec<&Task> = self.tasks.values().filter(|t| t.desired_state <= TaskState::Running).collect();
        tasks.sort_by(|a, b| a.name.cmp(&b.name));
        tasks
    }
}

fn slot(task: &Task) -> Slot {
    let node = if task.slot == 0 { task.node.clone() } else { None };
    (task.service.clone().unwrap_or_default(), task.slot, node)
}

/// A name without the stack's prefix.
pub(crate) fn short_name<'a>(name: &'a str, stack: &str) -> &'a str {
    name.strip_prefix(stack).and_then(|n| n.strip_prefix('_')).filter(|n| !n.is_empty()).unwrap_or(name)
}

/// The word for a state, as the API writes it.
pub(crate) fn state_word(state: TaskState) -> &'static str {
    match state {
        TaskState::New => "new",
        TaskState::Pending => "pending",
        TaskState::Assigned => "assigned",
        TaskState::Accepted => "accepted",
        TaskState::Preparing => "preparing",
        TaskState::Ready => "ready",
        TaskState::Starting => "starting",
        TaskState::Running => "running",
        TaskState::Complete => "complete",
        TaskState::Shutdown => "shutdown",
        TaskState::Failed => "failed",
        TaskState::Rejected => "rejected",
        TaskState::Remove => "remove",
        TaskState::Orphaned => "orphaned",
    }
}

/// `running on dc1-a`, `failed on dc1-a: exited with 1`.
pub(crate) fn describe(task: &Task, node: Option<&str>) -> String {
    let status = &task.status;
    let mut text = state_word(status.state).to_owned();
    if let Some(node) = node {
        text = format!("{text} on {node}");
    }
    let health = status.health.filter(|h| *h == Health::Unhealthy).map(|_| "unhealthy".to_owned());
    let exit = status.exit_code.filter(|c| *c != 0).map(|c| format!("exited with {c}"));
    let oom = status.oom_killed.then(|| "killed: out of memory".to_owned());
    let message = Some(status.message.clone()).filter(|m| !m.is_empty() && status.state != TaskState::Running);
    let why = oom.or_else(|| status.err.clone().filter(|e| !e.is_empty())).or(health).or(message).or(exit);
    why.map_or_else(|| text.clone(), |why| format!("{text}: {why}"))
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;

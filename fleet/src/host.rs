//! One host: the assignments that it was given, a model of its engine, and the production plans between the two.
//!
//! Owns what the agent's ledger, executor and engine own together. The engine is a model: an action ends after a delay,
//! always well, and the container is then as the action leaves it. It must not know connections, clocks or threads: time
//! is an argument, and the same seed gives the same delays.

use std::collections::BTreeMap;

use agent_core::{
    Action, ActionError, ActionKind, AssignmentChange, Assignments, Container, ContainerState, Desired, EngineNetwork,
    Head, Memory, Mismatch, Observed, Outcome, Settings, admit::admit, reconcile,
};
use skein_api::{Assignment, DEFAULT_STOP_GRACE_MS, TaskId, TaskReport, TaskState, UnixMillis};

/// How long the engine takes for each kind of action, milliseconds: from, and below.
///
/// As measured with Docker on a small host, for an image that is there.
const fn delay_ms(kind: ActionKind) -> (u64, u64) {
    match kind {
        ActionKind::CreateContainer => (40, 120),
        ActionKind::StartContainer => (150, 400),
        ActionKind::StopContainer => (50, 200),
        ActionKind::RemoveContainer => (20, 60),
        ActionKind::EnsureEngineNetwork | ActionKind::RemoveEngineNetwork => (20, 60),
        ActionKind::ReleaseTask | ActionKind::RemoveImage => (1, 5),
    }
}

/// What a look at the host brought.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// For the master.
    pub reports: Vec<TaskReport>,
    /// When to look again, even if nothing comes from outside.
    pub wake_at: Option<UnixMillis>,
}

/// A host. O(tasks) for each look.
#[derive(Clone, Debug)]
pub struct Host {
    assignments: Assignments,
    confirmed: bool,
    memory: Memory,
    observed: Observed,
    /// Actions that have begun, by when they end.
    ends: BTreeMap<(UnixMillis, u64), Action>,
    serial: u64,
    random: u64,
}

impl Host {
    /// A host without tasks. `seed` decides how long its engine takes.
    pub fn new(seed: u64) -> Self {
        Self {
            assignments: Assignments::default(),
            confirmed: false,
            memory: Memory::default(),
            observed: Observed::default(),
            ends: BTreeMap::new(),
            serial: 0,
            random: seed,
        }
    }

    /// Where it stands, for `Hello`.
    pub fn head(&self) -> &Head {
        self.assignments.head()
    }

    /// Tasks whose last status is that they run.
    pub fn running(&self) -> impl Iterator<Item = &TaskId> {
        self.memory.tasks.iter().filter(|(_, local)| local.status.state == TaskState::Running).map(|(id, _)| id)
    }

    /// Takes a change of assignments in, as the agent's ledger does.
    ///
    /// # Errors
    /// It does not build on what is here: a new session must bring everything.
    pub fn take(&mut self, change: AssignmentChange) -> Result<(), Mismatch> {
        if self.assignments.check(&change)? {
            self.assignments.apply(change);
        }
        self.confirmed = true;
        Ok(())
    }

    /// The agent's process ended and began anew: containers, assignments and the memory on disk are still there.
    pub fn restart(&mut self) {
        self.confirmed = false;
        self.observed.in_flight.clear();
        self.ends.clear();
        self.memory.failures.clear();
    }

    /// Ends what is due, plans, begins what the plan says.
    pub fn turn(&mut self, now: UnixMillis) -> Turn {
        let mut turn = Turn::default();
        while let Some(entry) = self.ends.first_entry().filter(|e| e.key().0 <= now) {
            let action = entry.remove();
            self.observed.in_flight.remove(&action.key());
            let result = self.perform(&action, now);
            self.memory.record(&action, &result, now);
        }
        loop {
            let desired = Desired { assignments: self.assignments.documents(), confirmed: self.confirmed };
            let plan = reconcile(&desired, &self.observed, now, &self.memory, &Settings::default());
            self.memory.apply(&plan);
            for key in &plan.cancel {
                self.observed.in_flight.remove(key);
                self.ends.retain(|_, action| action.key() != *key);
            }
            // As the executor does: a plan that only remembered or said something may have made room for another.
            let again = !plan.is_empty() && plan.actions.is_empty() && plan.cancel.is_empty();
            turn.wake_at = plan.wake_at;
            turn.reports.extend(plan.reports);
            for action in admit(self.observed.in_flight.values().copied(), plan.actions) {
                self.begin(action, now);
            }
            if !again {
                break;
            }
        }
        if let Some(((ends, _), _)) = self.ends.first_key_value() {
            turn.wake_at = Some(turn.wake_at.map_or(*ends, |at| at.min(*ends)));
        }
        turn
    }

    fn begin(&mut self, action: Action, now: UnixMillis) {
        let (from, below) = delay_ms(action.kind());
        let ends = now.plus_ms(from + self.next_random() % (below - from));
        self.serial += 1;
        self.observed.in_flight.insert(action.key(), action.kind());
        self.ends.insert((ends, self.serial), action);
    }

    /// What an action makes of the engine.
    fn perform(&mut self, action: &Action, now: UnixMillis) -> Result<Outcome, ActionError> {
        let refused = |message: &str| Err(ActionError { message: message.to_owned(), fatal: false });
        match action {
            Action::CreateContainer { task } => {
                if self.observed.containers.values().any(|c| c.task == *task) {
                    return refused("the name is taken");
                }
                let Some(container) = self.container(task, now) else { return refused("no such task") };
                self.observed.containers.insert(container.id.clone(), container);
            }
            Action::StartContainer { container, .. } => {
                let Some(c) = self.observed.containers.get_mut(container) else { return refused("no such container") };
                (c.state, c.started_at) = (ContainerState::Running, now);
            }
            Action::StopContainer { container, .. } => {
                if let Some(c) = self.observed.containers.get_mut(container).filter(|c| c.state.is_live()) {
                    (c.state, c.exit_code, c.finished_at) = (ContainerState::Exited, 143, now);
                }
            }
            Action::RemoveContainer { container, .. } => {
                if self.observed.containers.get(container).is_some_and(|c| c.state.is_live()) {
                    return refused("it runs");
                }
                self.observed.containers.remove(container);
            }
            Action::EnsureEngineNetwork { network } => {
                let made = EngineNetwork { engine_id: format!("net-{network}"), name: network.to_string() };
                self.observed.networks.insert(network.clone(), made);
            }
            Action::RemoveEngineNetwork { network, .. } => {
                self.observed.networks.remove(network);
            }
            Action::ReleaseTask { .. } | Action::RemoveImage { .. } => {}
        }
        Ok(Outcome::default())
    }

    /// A new container of an assigned task. Its id is as long as an engine's.
    fn container(&mut self, task: &TaskId, now: UnixMillis) -> Option<Container> {
        let id: String = (0..4).map(|_| format!("{:016x}", self.next_random())).collect();
        let Some(Assignment::Task(assignment)) = self.assignments.documents().get(&format!("task/{task}")) else {
            return None;
        };
        let spec = &assignment.spec.container;
        Some(Container {
            id,
            task: task.clone(),
            service: assignment.service.clone(),
            slot: assignment.slot,
            stop_grace_ms: spec.stop_grace_ms.unwrap_or(DEFAULT_STOP_GRACE_MS),
            image: spec.image.clone(),
            networks: assignment.networks.iter().cloned().collect(),
            addresses: Vec::new(),
            ports: assignment.spec.ports.clone(),
            state: ContainerState::Created,
            exit_code: 0,
            oom_killed: false,
            error: None,
            health: None,
            created_at: now,
            started_at: UnixMillis(0),
            finished_at: UnixMillis(0),
        })
    }

    /// SplitMix64: a few instructions, and good enough for delays.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use skein_api::{ServiceId, TaskAssignment};

    use super::*;

    fn task(id: &str, desired_state: TaskState) -> Assignment {
        let service = Some(ServiceId::new("s"));
        Assignment::Task(Box::new(TaskAssignment { id: TaskId::new(id), service, desired_state, ..Default::default() }))
    }

    fn change(generation: u64, base: u64, full: bool, upserts: Vec<Assignment>) -> AssignmentChange {
        AssignmentChange { chain: "c".into(), full, base, generation, upserts, removes: Vec::new() }
    }

    /// Looks whenever the host wants to be looked at, until it wants nothing more; the last state of each task.
    fn settle(host: &mut Host, now: &mut u64) -> BTreeMap<String, TaskState> {
        let mut last = BTreeMap::new();
        for _ in 0..1_000 {
            let turn = host.turn(UnixMillis(*now));
            last.extend(turn.reports.into_iter().map(|r| (r.task.to_string(), r.status.state)));
            match turn.wake_at {
                Some(at) => *now = at.0.max(*now),
                None => return last,
            }
        }
        panic!("the host does not come to rest");
    }

    #[test]
    fn tasks_run_and_stop_and_a_restarted_agent_finds_them() {
        let (mut host, mut now) = (Host::new(7), 1_000);
        let tasks: Vec<_> = (0..20).map(|i| task(&format!("t{i:02}"), TaskState::Running)).collect();
        host.take(change(1, 0, true, tasks)).expect("it is everything");
        let states = settle(&mut host, &mut now);
        assert_eq!(states.len(), 20);
        assert!(states.values().all(|s| *s == TaskState::Running), "{states:?}");
        assert_eq!(host.running().count(), 20);
        // 20 containers, 8 at a time, of at least 40 + 150 ms.
        assert!(now - 1_000 >= 400, "{now}");

        host.restart();
        assert_eq!(settle(&mut host, &mut now), BTreeMap::new(), "nothing changed, so nothing is said");
        host.take(change(2, 1, false, vec![task("t00", TaskState::Shutdown)])).expect("it is the next one");
        let states = settle(&mut host, &mut now);
        assert_eq!(states, BTreeMap::from([("t00".to_owned(), TaskState::Shutdown)]));
        assert_eq!(host.running().count(), 19);
    }
}

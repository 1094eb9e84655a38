//! A small model of an engine below the same plans that the real one gets, with what it refuses.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::{
    Action, ActionError, ActionKey, Container, ContainerState, Desired, EngineNetwork, Memory, Observed, Outcome, Plan,
    Settings, reconcile,
};
use skein_api::*;

/// A host: desired state, engine, memory and a clock.
#[derive(Clone, Debug, Default)]
pub(crate) struct Host {
    pub(crate) assignments: BTreeMap<String, Assignment>,
    pub(crate) confirmed: bool,
    pub(crate) observed: Observed,
    pub(crate) memory: Memory,
    pub(crate) now: u64,
    pub(crate) reserved: BTreeSet<TaskId>,
    pub(crate) reports: Vec<TaskReport>,
    serial: u64,
}

/// How the model's engine answers an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Works,
    FailsOnce,
    FailsForGood,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { confirmed: true, now: 1_000_000, ..Default::default() }
    }

    pub(crate) fn assign(&mut self, task: TaskAssignment) {
        let a = Assignment::Task(Box::new(task));
        self.assignments.insert(a.key(), a);
    }

    pub(crate) fn assign_network(&mut self, id: &str) {
        let a = Assignment::Network(network(id));
        self.assignments.insert(a.key(), a);
    }

    pub(crate) fn unassign(&mut self, id: &str) {
        self.assignments.remove(&format!("task/{id}"));
    }

    pub(crate) fn desire(&mut self, id: &str, state: TaskState) {
        if let Some(Assignment::Task(t)) = self.assignments.get_mut(&format!("task/{id}")) {
            t.desired_state = state;
        }
    }

    pub(crate) fn plan(&mut self) -> Plan {
        let desired = Desired { assignments: &self.assignments, confirmed: self.confirmed };
        let now = UnixMillis(self.now);
        let plan = reconcile(&desired, &self.observed, now, &self.memory, &Settings::default());
        for report in &plan.reports {
            if let Some(last) = self.reports.iter().rev().find(|r| r.task == report.task) {
                assert!(report.run >= last.run, "runs only go forward: {last:?} then {report:?}");
                if report.run == last.run && report.status.state != last.status.state {
                    assert!(
                        agent_core::state::may_step(last.status.state, report.status.state),
                        "states only go forward: {last:?} then {report:?}"
                    );
                }
            }
        }
        let keys: BTreeSet<ActionKey> = plan.actions.iter().map(Action::key).collect();
        assert_eq!(keys.len(), plan.actions.len(), "one action per object: {plan:?}");
        for key in keys {
            assert!(!self.observed.in_flight.contains_key(&key), "in flight already: {key:?}");
        }
        for key in &plan.cancel {
            assert!(self.observed.in_flight.remove(key).is_some(), "cuts off what is not there: {key:?}");
        }
        self.reports.extend(plan.reports.clone());
        self.memory.apply(&plan);
        plan
    }

    /// Carries an action out as the engine would.
    pub(crate) fn run(&mut self, action: &Action, answer: Answer) {
        let result = match answer {
            Answer::Works => self.engine(action),
            Answer::FailsOnce => Err(ActionError { message: "timed out".into(), fatal: false }),
            Answer::FailsForGood => Err(ActionError { message: "no such thing".into(), fatal: true }),
        };
        self.observed.in_flight.remove(&action.key());
        self.memory.record(action, &result, UnixMillis(self.now));
    }

    fn engine(&mut self, action: &Action) -> Result<Outcome, ActionError> {
        let refused = |m: &str| Err(ActionError { message: m.into(), fatal: false });
        match action {
            Action::EnsureEngineNetwork { network } => {
                let engine_id = format!("e-{network}");
                let made = EngineNetwork { engine_id, name: network.to_string() };
                self.observed.networks.insert(network.clone(), made);
            }
            Action::CreateContainer { task } => {
                let Some(Assignment::Task(a)) = self.assignments.get(&format!("task/{task}")) else {
                    return refused("unknown task");
                };
                if self.observed.containers.values().any(|c| c.task == *task) {
                    return refused("name is taken");
                }
                self.serial += 1;
                let container = Container {
                    id: format!("c{}", self.serial),
                    task: task.clone(),
                    service: a.service.clone(),
                    slot: a.slot,
                    stop_grace_ms: 1_000,
                    image: a.spec.container.image.clone(),
                    networks: a.networks.iter().cloned().collect(),
                    addresses: vec![],
                    ports: vec![],
                    state: ContainerState::Created,
                    exit_code: 0,
                    oom_killed: false,
                    error: None,
                    health: None,
                    created_at: UnixMillis(self.now),
                    started_at: UnixMillis(0),
                    finished_at: UnixMillis(0),
                };
                if !a.networks.is_empty() {
                    self.reserved.insert(task.clone());
                }
                self.observed.containers.insert(container.id.clone(), container);
            }
            Action::StartContainer { container, .. } => {
                let now = self.now;
                let Some(c) = self.observed.containers.get_mut(container) else { return refused("no such container") };
                if !c.state.is_live() {
                    c.state = ContainerState::Running;
                    c.started_at = UnixMillis(now);
                    let Some(Assignment::Task(a)) = self.assignments.get(&format!("task/{}", c.task)) else {
                        return Ok(Outcome::default());
                    };
                    c.health = a.spec.container.healthcheck.as_ref().map(|_| Health::Starting);
                }
            }
            Action::StopContainer { container, .. } => self.end(container, 143),
            Action::RemoveContainer { container, .. } => {
                if self.observed.containers.get(container).is_some_and(|c| c.state.is_live()) {
                    return refused("it runs");
                }
                self.observed.containers.remove(container);
            }
            Action::ReleaseTask { task } => {
                self.reserved.remove(task);
            }
            Action::RemoveEngineNetwork { network, .. } => {
                let live = |c: &Container| c.state.is_live() && c.networks.contains(network);
                if self.observed.containers.values().any(live) {
                    return refused("has active endpoints");
                }
                self.observed.networks.remove(network);
            }
            Action::RemoveImage { .. } => {}
        }
        Ok(Outcome::default())
    }

    pub(crate) fn end(&mut self, container: &str, code: i64) {
        let now = self.now;
        if let Some(c) = self.observed.containers.get_mut(container)
            && c.state.is_live()
        {
            c.state = ContainerState::Exited;
            c.exit_code = code;
            c.finished_at = UnixMillis(now);
        }
    }

    /// Plans and does until nothing is left to do, letting time pass where the plan waits for it.
    pub(crate) fn settle(&mut self) {
        for _ in 0..400 {
            let plan = self.plan();
            for action in &plan.actions {
                self.run(action, Answer::Works);
            }
            if plan.is_empty() {
                match plan.wake_at {
                    Some(at) if at.0 < self.now + 3_600_000 => self.now = self.now.max(at.0),
                    _ => return,
                }
            }
            self.now += 1;
        }
        panic!("does not settle: {:?}", self.plan());
    }

    pub(crate) fn container(&self, task: &str) -> Option<&Container> {
        self.observed.containers.values().find(|c| c.task.as_str() == task)
    }

    pub(crate) fn container_mut(&mut self, task: &str) -> &mut Container {
        self.observed.containers.values_mut().find(|c| c.task.as_str() == task).expect("has a container")
    }

    pub(crate) fn end_task(&mut self, task: &str, code: i64) {
        let id = self.container(task).expect("has a container").id.clone();
        self.end(&id, code);
    }

    pub(crate) fn state(&self, task: &str) -> (u64, TaskState) {
        self.memory.tasks.get(&TaskId::new(task)).map(|l| (l.run, l.status.state)).expect("is known")
    }

    pub(crate) fn status(&self, task: &str) -> TaskStatus {
        self.memory.tasks[&TaskId::new(task)].status.clone()
    }
}

pub(crate) fn network(id: &str) -> NetworkAssignment {
    NetworkAssignment {
        id: NetworkId::new(id),
        name: id.into(),
        vni: 5_000,
        subnet4: "10.57.0.0/16".parse().expect("a subnet"),
        subnet6: "fd57::/64".parse().expect("a subnet"),
        gateway4: "10.57.0.1".parse().expect("an address"),
        gateway6: "fd57::1".parse().expect("an address"),
        mtu: 1450,
        internal: false,
        attachable: true,
        host_index: 1,
        blocks: vec![],
        frozen: Vec::new(),
    }
}

pub(crate) fn service_task(id: &str, slot: u32) -> TaskAssignment {
    TaskAssignment {
        id: TaskId::new(id),
        name: format!("web.{slot}"),
        service: Some(ServiceId::new("web")),
        slot,
        desired_state: TaskState::Running,
        run: 1,
        ..Default::default()
    }
}

pub(crate) fn container_task(id: &str) -> TaskAssignment {
    TaskAssignment { service: None, name: id.into(), slot: 0, ..service_task(id, 0) }
}

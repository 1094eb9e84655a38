//! Random histories: whatever users, containers, engines and crashes do, a host settles where it is wanted, and a
//! settled host has nothing left to plan.

use agent_core::{ContainerState, Memory};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_oneof, proptest};
use skein_api::*;

use crate::model::*;

const TASKS: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Clone, Debug)]
enum Step {
    /// Assign a task: which, service task, on a network, health check, run.
    Assign(usize, bool, bool, bool, u64),
    Desire(usize, TaskState),
    Unassign(usize),
    /// Plan; the first actions get these answers, the others stay in flight for ever (the agent dies).
    PlanAndDo(Vec<u8>),
    /// The agent is started again: what was in flight is forgotten.
    AgentRestart {
        ledger_lost: bool,
    },
    EngineRestart,
    Ends(usize, i64),
    Health(usize, bool),
    RemovedByHand(usize),
    StartedByHand(usize),
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let task = 0..TASKS.len();
    let desired = prop_oneof![Just(TaskState::Running), Just(TaskState::Shutdown), Just(TaskState::Remove)];
    prop_oneof![
        3 => (task.clone(), any::<bool>(), any::<bool>(), any::<bool>(), 1..4u64)
            .prop_map(|(t, s, n, h, r)| Step::Assign(t, s, n, h, r)),
        2 => (task.clone(), desired).prop_map(|(t, s)| Step::Desire(t, s)),
        1 => task.clone().prop_map(Step::Unassign),
        8 => prop::collection::vec(0..8u8, 0..6).prop_map(Step::PlanAndDo),
        1 => any::<bool>().prop_map(|ledger_lost| Step::AgentRestart { ledger_lost }),
        1 => Just(Step::EngineRestart),
        2 => (task.clone(), 0..3i64).prop_map(|(t, c)| Step::Ends(t, c)),
        2 => (task.clone(), any::<bool>()).prop_map(|(t, h)| Step::Health(t, h)),
        1 => task.clone().prop_map(Step::RemovedByHand),
        1 => task.prop_map(Step::StartedByHand),
        2 => (1..100_000u64).prop_map(Step::Time),
    ]
}

fn take(host: &mut Host, step: Step) {
    host.now += 1;
    match step {
        Step::Assign(t, service, net, health, run) => {
            let id = TASKS[t];
            // A task never changes what it is; a master only moves `run` forward.
            if let Some(Assignment::Task(old)) = host.assignments.get_mut(&format!("task/{id}")) {
                if old.service.is_none() {
                    old.run = old.run.max(run);
                }
                return;
            }
            // Ids are never used twice.
            let task = TaskId::new(id);
            if host.container(id).is_some() || host.memory.tasks.contains_key(&task) || host.reserved.contains(&task) {
                return;
            }
            let mut task = if service { service_task(id, t as u32 % 2) } else { container_task(id) };
            task.spec.container.healthcheck = health.then(Healthcheck::default);
            if net {
                host.assign_network("net");
                task.networks = vec![NetworkId::new("net")];
            }
            host.reports.retain(|r| r.task.as_str() != id);
            host.assign(task);
        }
        Step::Desire(t, state) => {
            let id = TASKS[t];
            let Some(Assignment::Task(a)) = host.assignments.get(&format!("task/{id}")) else { return };
            // Removal is final, and a service task is wanted once.
            let back = a.desired_state > state && (a.desired_state == TaskState::Remove || a.service.is_some());
            if !back {
                host.desire(id, state);
            }
        }
        Step::Unassign(t) => host.unassign(TASKS[t]),
        Step::PlanAndDo(answers) => {
            let plan = host.plan();
            for action in &plan.actions {
                host.observed.in_flight.insert(action.key(), action.kind());
            }
            for (action, answer) in plan.actions.iter().zip(answers) {
                host.now += 1;
                host.run(
                    action,
                    match answer {
                        0 => Answer::FailsForGood,
                        1 => Answer::FailsOnce,
                        _ => Answer::Works,
                    },
                );
            }
        }
        Step::AgentRestart { ledger_lost } => {
            host.observed.in_flight.clear();
            host.memory.failures.clear();
            if ledger_lost {
                host.memory = Memory::default();
                host.reports.clear();
                // Reservations are in the ledger too; the network side adopts those of containers that are there.
                let there: Vec<TaskId> = host.observed.containers.values().map(|c| c.task.clone()).collect();
                host.reserved.retain(|t| there.contains(t));
            }
        }
        Step::EngineRestart => {
            let ids: Vec<String> = host.observed.containers.keys().cloned().collect();
            ids.iter().for_each(|id| host.end(id, 137));
        }
        Step::Ends(t, code) => {
            if host.container(TASKS[t]).is_some() {
                host.end_task(TASKS[t], code);
            }
        }
        Step::Health(t, healthy) => {
            if host.container(TASKS[t]).is_some_and(|c| c.health.is_some()) {
                host.container_mut(TASKS[t]).health = Some(if healthy { Health::Healthy } else { Health::Unhealthy });
            }
        }
        Step::RemovedByHand(t) => {
            let id = TaskId::new(TASKS[t]);
            if !host.memory.tasks.contains_key(&id) {
                // A known limit: the ledger was lost, and a hand was faster than the next plan. Nobody remembers the
                // address then; it stays reserved until its network goes.
                host.reserved.remove(&id);
            }
            host.observed.containers.retain(|_, c| c.task.as_str() != TASKS[t]);
        }
        Step::StartedByHand(t) => {
            let now = host.now;
            if host.container(TASKS[t]).is_some_and(|c| !c.state.is_live()) {
                let c = host.container_mut(TASKS[t]);
                c.state = ContainerState::Running;
                c.started_at = UnixMillis(now);
            }
        }
        Step::Time(ms) => host.now += ms,
    }
}

fn check_settled(host: &mut Host) {
    let plan = host.plan();
    assert!(plan.is_empty(), "planning again plans something: {plan:?}");
    for c in host.observed.containers.values() {
        assert!(host.assignments.contains_key(&format!("task/{}", c.task)), "unknown container stays: {c:?}");
    }
    for a in host.assignments.values() {
        let Assignment::Task(a) = a else { continue };
        let (_, state) = host.state(a.id.as_str());
        let live = host.container(a.id.as_str()).is_some_and(|c| c.state.is_live());
        match a.desired_state {
            TaskState::Running if a.service.is_some() => {
                assert_eq!(live, !state.is_terminal(), "{:?}", host.status(a.id.as_str()));
            }
            // The default policy restarts for ever.
            TaskState::Running => assert!(live, "{:?}", host.status(a.id.as_str())),
            TaskState::Remove => assert_eq!((state, host.container(a.id.as_str())), (TaskState::Remove, None)),
            _ => assert!(!live && state.is_terminal()),
        }
    }
    for task in &host.reserved {
        let used = host.assignments.contains_key(&format!("task/{task}"));
        assert!(used, "addresses of {task} were never given back");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_history_converges(steps in prop::collection::vec(step(), 0..50)) {
        let mut host = Host::new();
        for step in steps {
            take(&mut host, step);
        }
        // From here on nobody interferes, and the agent is a new one.
        host.observed.in_flight.clear();
        host.settle();
        check_settled(&mut host);
    }
}

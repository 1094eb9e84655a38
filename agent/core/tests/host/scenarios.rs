//! Scenarios of one host, told as a user would.

use agent_core::{Action, ContainerState, Memory, StopReason};
use skein_api::*;

use crate::model::*;

fn kinds(actions: &[Action]) -> Vec<String> {
    actions.iter().map(|a| format!("{:?}", a.kind())).collect()
}

#[test]
fn a_service_task_goes_through_its_states() {
    let mut host = Host::new();
    host.assign_network("net");
    host.assign(TaskAssignment { networks: vec![NetworkId::new("net")], ..service_task("t", 1) });
    let plan = host.plan();
    assert_eq!(kinds(&plan.actions), ["EnsureEngineNetwork"]);
    assert_eq!(host.state("t"), (1, TaskState::Accepted));
    assert!(host.status("t").message.contains("waits for the engine to have network"));
    host.run(&plan.actions[0], Answer::Works);
    let plan = host.plan();
    assert_eq!(kinds(&plan.actions), ["CreateContainer"]);
    assert_eq!(host.state("t"), (1, TaskState::Preparing));
    host.run(&plan.actions[0], Answer::Works);
    let plan = host.plan();
    assert_eq!(kinds(&plan.actions), ["StartContainer"]);
    host.run(&plan.actions[0], Answer::Works);
    assert_eq!(host.plan().actions, []);
    assert_eq!(host.state("t"), (1, TaskState::Running));
    assert!(host.plan().is_empty());
}

#[test]
fn an_action_in_flight_is_not_planned_again() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    let plan = host.plan();
    host.observed.in_flight.insert(plan.actions[0].key(), plan.actions[0].kind());
    assert!(host.plan().is_empty());
    host.observed.progress.insert(TaskId::new("t"), "pulling image: 3 of 9 MB".into());
    let plan = host.plan();
    assert_eq!(plan.reports[0].status.message, "pulling image: 3 of 9 MB");
    assert!(host.plan().is_empty());
}

#[test]
fn a_pull_that_nobody_wants_any_more_is_cut_off() {
    for desired in [Some(TaskState::Shutdown), Some(TaskState::Remove), None] {
        let mut host = Host::new();
        host.assign(service_task("t", 1));
        let plan = host.plan();
        host.observed.in_flight.insert(plan.actions[0].key(), plan.actions[0].kind());
        match desired {
            Some(state) => host.desire("t", state),
            None => host.unassign("t"),
        }
        let plan = host.plan();
        assert_eq!((plan.actions.len(), plan.cancel.len()), (0, 1));
        host.settle();
        assert!(host.observed.containers.is_empty());
    }
}

#[test]
fn a_new_agent_adopts_without_an_action() {
    let mut host = Host::new();
    host.assign_network("net");
    host.assign(TaskAssignment { networks: vec![NetworkId::new("net")], ..service_task("t", 1) });
    host.assign(container_task("c"));
    host.settle();
    // The ledger kept everything: nothing to do, nothing to say.
    assert!(host.plan().is_empty());
    // The ledger's memory is lost too: nothing to do, and all statuses are said again.
    host.memory = Memory::default();
    host.reports.clear();
    let plan = host.plan();
    assert_eq!(plan.actions, []);
    assert_eq!(plan.reports.len(), 2);
    assert_eq!((host.state("t"), host.state("c")), ((1, TaskState::Running), (1, TaskState::Running)));
    assert!(host.plan().is_empty());
}

#[test]
fn a_run_that_a_damaged_ledger_forgot_ends_when_its_task_is_stopped() {
    let mut host = Host::new();
    let mut task = container_task("c");
    task.spec.restart.condition = RestartCondition::Any;
    host.assign(task.clone());
    host.settle();
    let earlier = host.memory.clone();
    // The agent starts it again by itself, and the master hears of the second run.
    host.end_task("c", 1);
    host.settle();
    assert_eq!(host.state("c"), (2, TaskState::Running));
    // Its ledger goes back to the first run, and the user stops the second one.
    host.memory = earlier;
    host.reports.clear();
    host.assign(TaskAssignment { run: 2, desired_state: TaskState::Shutdown, ..task });
    host.settle();
    assert_eq!(host.state("c"), (2, TaskState::Shutdown));
    assert!(host.plan().is_empty());
}

#[test]
fn an_ended_service_task_is_reported_and_never_restarted() {
    for (code, oom, state, message) in [
        (0, false, TaskState::Complete, "exited with 0"),
        (3, false, TaskState::Failed, "exited with 3"),
        (137, true, TaskState::Failed, "out of memory"),
    ] {
        let mut host = Host::new();
        host.assign(service_task("t", 1));
        host.settle();
        host.end_task("t", code);
        host.container_mut("t").oom_killed = oom;
        host.settle();
        let status = host.status("t");
        assert_eq!((status.state, status.message.as_str()), (state, message));
        assert_eq!((status.exit_code, status.oom_killed), (Some(code), oom));
        assert!(host.container("t").is_some(), "kept for its logs");
    }
}

#[test]
fn a_health_check_holds_running_back_and_ends_a_service_task() {
    let mut host = Host::new();
    let mut task = service_task("t", 1);
    task.spec.container.healthcheck = Some(Healthcheck::default());
    let mut container = TaskAssignment { id: TaskId::new("c"), ..container_task("c") };
    container.spec.container.healthcheck = Some(Healthcheck::default());
    host.assign(task);
    host.assign(container);
    host.settle();
    assert_eq!((host.state("t").1, host.status("t").health), (TaskState::Starting, Some(Health::Starting)));
    host.container_mut("t").health = Some(Health::Healthy);
    host.container_mut("c").health = Some(Health::Healthy);
    host.settle();
    assert_eq!(host.state("t").1, TaskState::Running);
    host.container_mut("t").health = Some(Health::Unhealthy);
    host.container_mut("c").health = Some(Health::Unhealthy);
    host.settle();
    assert_eq!((host.state("t").1, host.status("t").err.as_deref()), (TaskState::Failed, Some("unhealthy")));
    assert_eq!((host.state("c").1, host.status("c").health), (TaskState::Running, Some(Health::Unhealthy)));
}

#[test]
fn a_container_task_is_restarted_by_its_policy() {
    let mut host = Host::new();
    let mut task = container_task("c");
    task.spec.restart = RestartPolicy { max_attempts: Some(2), delay_ms: 5_000, ..Default::default() };
    host.assign(task);
    host.settle();
    let id = host.container("c").map(|c| c.id.clone());
    host.end_task("c", 1);
    let plan = host.plan();
    assert_eq!((kinds(&plan.actions), host.state("c")), (vec![], (1, TaskState::Failed)));
    assert_eq!(host.plan().wake_at, Some(UnixMillis(host.now + 5_000)));
    // An agent that is started anew waits for the rest of the same pause.
    host.memory.failures.clear();
    host.settle();
    assert_eq!(host.state("c"), (2, TaskState::Running));
    assert_eq!(host.container("c").map(|c| c.id.clone()), id, "the same container, the same file system");
    for _ in 0..3 {
        if host.container("c").is_some_and(|c| c.state.is_live()) {
            host.end_task("c", 1);
        }
        host.settle();
    }
    assert_eq!(host.state("c"), (3, TaskState::Failed), "two attempts and no more");
    // A user's start counts from what the master knew, and gives new attempts.
    if let Some(Assignment::Task(task)) = host.assignments.get_mut("task/c") {
        task.run = 2;
    }
    host.settle();
    assert_eq!(host.state("c"), (4, TaskState::Running));
}

#[test]
fn a_user_stops_and_starts_a_container_task() {
    let mut host = Host::new();
    host.assign(container_task("c"));
    host.settle();
    host.desire("c", TaskState::Shutdown);
    host.settle();
    assert_eq!((host.state("c"), host.status("c").exit_code), ((1, TaskState::Shutdown), Some(143)));
    assert!(host.plan().is_empty());
    host.assign(TaskAssignment { run: 2, ..container_task("c") });
    host.settle();
    assert_eq!(host.state("c"), (2, TaskState::Running));
    // Restart: only the run counter moves.
    let started = host.container("c").map(|c| c.started_at);
    host.assign(TaskAssignment { run: 3, ..container_task("c") });
    host.settle();
    assert_eq!(host.state("c"), (3, TaskState::Running));
    assert_ne!(host.container("c").map(|c| c.started_at), started);
}

#[test]
fn what_is_unknown_is_removed_only_when_confirmed() {
    let mut host = Host::new();
    host.assign_network("net");
    host.assign(TaskAssignment { networks: vec![NetworkId::new("net")], ..service_task("t", 1) });
    host.settle();
    host.assignments.clear();
    host.memory = Memory::default();
    host.confirmed = false;
    assert!(host.plan().is_empty());
    host.confirmed = true;
    let plan = host.plan();
    assert_eq!(plan.actions.len(), 1);
    assert!(matches!(&plan.actions[0], Action::StopContainer { grace_ms: 1_000, .. }), "{plan:?}");
    host.settle();
    assert!(host.observed.containers.is_empty() && host.observed.networks.is_empty());
    assert!(host.memory.tasks.is_empty());
}

#[test]
fn remove_takes_container_and_addresses_and_says_so() {
    let mut host = Host::new();
    host.assign_network("net");
    host.assign(TaskAssignment { networks: vec![NetworkId::new("net")], ..container_task("c") });
    host.settle();
    assert!(host.reserved.contains(&TaskId::new("c")));
    host.desire("c", TaskState::Remove);
    host.settle();
    assert!(host.observed.containers.is_empty() && host.reserved.is_empty());
    assert_eq!(host.state("c").1, TaskState::Remove);
}

#[test]
fn a_task_that_cannot_be_started_is_rejected() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    let plan = host.plan();
    host.run(&plan.actions[0], Answer::FailsForGood);
    host.settle();
    assert_eq!((host.state("t").1, host.status("t").err.as_deref()), (TaskState::Rejected, Some("no such thing")));
    assert!(host.observed.containers.is_empty());
}

#[test]
fn a_failed_action_waits_longer_each_time_and_tells_why() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    for pause in [1_000, 2_000, 4_000] {
        let plan = host.plan();
        assert_eq!(kinds(&plan.actions), ["CreateContainer"]);
        host.run(&plan.actions[0], Answer::FailsOnce);
        let plan = host.plan();
        assert_eq!((kinds(&plan.actions), plan.wake_at), (vec![], Some(UnixMillis(host.now + pause))));
        assert_eq!((host.state("t").1, host.status("t").err.as_deref()), (TaskState::Preparing, Some("timed out")));
        host.now += pause;
    }
    host.settle();
    assert_eq!((host.state("t").1, host.status("t").err), (TaskState::Running, None));
}

#[test]
fn the_engine_came_back_and_everything_had_ended() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    host.assign(container_task("c"));
    host.settle();
    for id in ["t", "c"] {
        host.end_task(id, 137);
    }
    host.settle();
    assert_eq!(host.state("t"), (1, TaskState::Failed));
    assert_eq!(host.state("c"), (2, TaskState::Running));
}

#[test]
fn one_ended_container_per_slot_is_kept() {
    let mut host = Host::new();
    for id in ["a", "b", "c"] {
        host.assign(service_task(id, 1));
        host.settle();
        host.end_task(id, 1);
        host.settle();
    }
    assert!(host.container("a").is_none() && host.container("b").is_none() && host.container("c").is_some());
    assert_eq!(host.state("a").1, TaskState::Failed, "its status stays");
}

#[test]
fn a_container_that_somebody_removed_is_reported() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    host.assign(container_task("c"));
    host.settle();
    host.observed.containers.clear();
    host.settle();
    assert_eq!(host.state("t").1, TaskState::Failed);
    assert!(host.container("t").is_none());
    assert_eq!(host.state("c"), (2, TaskState::Running), "a container task is made again by its policy");
}

#[test]
fn a_stop_is_finished_after_a_crash_in_its_middle() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    host.settle();
    host.desire("t", TaskState::Shutdown);
    let plan = host.plan();
    assert_eq!(kinds(&plan.actions), ["StopContainer"]);
    assert_eq!(host.memory.tasks[&TaskId::new("t")].stopping, Some(StopReason::Requested));
    // The agent dies here; the container ends meanwhile.
    host.end_task("t", 0);
    host.settle();
    assert_eq!(host.state("t").1, TaskState::Shutdown, "not Complete: it was asked to stop");
}

#[test]
fn volumes_come_from_a_container_that_is_there() {
    let mut host = Host::new();
    host.assign(TaskAssignment { volumes_from: vec![(TaskId::new("z"), false)], ..container_task("c") });
    let plan = host.plan();
    assert_eq!(plan.actions, []);
    assert!(host.status("c").message.contains("whose volumes it takes"));
    host.assign(container_task("z"));
    host.settle();
    assert_eq!(host.state("c"), (1, TaskState::Running));
}

#[test]
fn namespaces_are_those_of_a_container_that_runs() {
    let mut host = Host::new();
    let mut side = container_task("side");
    side.spec.container.share.network = Some("db".into());
    // The master does not know yet whose it is: a network of its own would be another container.
    host.assign(side.clone());
    assert_eq!(host.plan().actions, []);
    assert_eq!(host.status("side").message, "waits for db to run here, whose namespace it shares (network_mode)");
    side.share.network = Some(TaskId::new("db"));
    host.assign(side);
    assert_eq!(host.plan().actions, []);
    host.assign(container_task("db"));
    host.settle();
    assert_eq!(host.state("side"), (1, TaskState::Running));
}

#[test]
fn a_second_container_of_a_task_is_removed() {
    let mut host = Host::new();
    host.assign(service_task("t", 1));
    host.settle();
    let mut twin = host.container("t").expect("runs").clone();
    twin.id = "twin".into();
    twin.state = ContainerState::Created;
    host.observed.containers.insert(twin.id.clone(), twin);
    host.settle();
    assert_eq!(host.observed.containers.len(), 1);
    assert!(host.container("t").is_some_and(|c| c.state.is_live()));
}

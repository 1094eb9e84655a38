//! Scripts of tasks against the state machine.

use skein_api::{Meta, PlanItem, ServiceSpec, TaskStatus};

use super::*;

fn service(name: &str, mode: ServiceMode, restart: RestartCondition) -> Service {
    let mut spec = ServiceSpec { name: format!("shop_{name}"), mode, ..Default::default() };
    spec.task.restart.condition = restart;
    let meta = Meta { generation: 2, ..Default::default() };
    Service { id: ServiceId::new(name), meta, spec, vips: Vec::new() }
}

fn progress(services: Vec<Service>, action: PlanAction) -> Progress {
    let item =
        |s: &Service| PlanItem { kind: "service".into(), name: s.spec.name.clone(), action, differences: vec![] };
    let plan = StackPlan { items: services.iter().map(item).collect(), warnings: vec![] };
    let nodes = [(NodeId::new("n1"), "dc1-a".to_owned()), (NodeId::new("n2"), "dc1-b".to_owned())].into();
    Progress::new("shop", services, &plan, nodes)
}

/// `id service slot state [node]`
fn task(line: &str) -> Task {
    let words: Vec<&str> = line.split_whitespace().collect();
    let state: TaskState = serde_json::from_value(words[3].into()).unwrap();
    let mut task = Task {
        id: TaskId::new(words[0]),
        name: format!("shop_{}.{}", words[1], words[2]),
        service: Some(ServiceId::new(words[1])),
        slot: words[2].parse().unwrap(),
        spec_generation: 2,
        node: words.get(4).map(|n| NodeId::new(*n)),
        desired_state: TaskState::Running,
        status: TaskStatus { state, ..Default::default() },
        ..Default::default()
    };
    if matches!(state, TaskState::Failed | TaskState::Complete) {
        task.desired_state = TaskState::Shutdown;
        task.status.exit_code = Some(i64::from(state == TaskState::Failed));
    }
    task
}

/// Feeds tasks; gives back the lines that were shown and the outcome.
fn run(progress: &mut Progress, script: &[&str]) -> (Vec<String>, Outcome) {
    let lines =
        script.iter().filter_map(|l| progress.seen(task(l))).map(|l| format!("{}  {}", l.name, l.text)).collect();
    (lines, progress.outcome())
}

#[test]
fn a_service_comes_up() {
    let mut p = progress(vec![service("web", ServiceMode::Replicated(2), RestartCondition::Any)], PlanAction::Create);
    assert_eq!(p.outcome(), Outcome::Waiting);
    let script =
        ["a web 1 pending", "a web 1 assigned n1", "a web 1 assigned n1", "a web 1 running n1", "b web 2 starting n2"];
    let (lines, outcome) = run(&mut p, &script);
    assert_eq!(
        lines,
        ["web.1  pending", "web.1  assigned on dc1-a", "web.1  running on dc1-a", "web.2  starting on dc1-b"]
    );
    assert_eq!(outcome, Outcome::Waiting);
    assert_eq!(p.missing()[0].0, "shop_web");
    assert_eq!(p.missing()[0].1[0].text, "starting on dc1-b");
    assert_eq!(run(&mut p, &["b web 2 running n2"]).1, Outcome::Done);
    assert!(p.missing().is_empty());
}

#[test]
fn nothing_wanted_is_done() {
    assert_eq!(progress(vec![], PlanAction::Keep).outcome(), Outcome::Done);
    let none = service("web", ServiceMode::Replicated(0), RestartCondition::Any);
    assert_eq!(progress(vec![none], PlanAction::Create).outcome(), Outcome::Done);
}

#[test]
fn tasks_of_an_older_specification_do_not_count() {
    let web = || vec![service("web", ServiceMode::Replicated(1), RestartCondition::Any)];
    let mut old = task("a web 1 running n1");
    old.spec_generation = 1;
    let mut p = progress(web(), PlanAction::Recreate);
    assert_eq!((p.seen(old.clone()), p.outcome()), (None, Outcome::Waiting));
    assert_eq!(run(&mut p, &["b web 1 running n1"]).1, Outcome::Done);
    let mut p = progress(web(), PlanAction::Update);
    assert!(p.seen(old).is_some());
    assert_eq!(p.outcome(), Outcome::Done);
}

#[test]
fn repeated_failures_end_the_waiting() {
    let mut p = progress(vec![service("web", ServiceMode::Replicated(1), RestartCondition::Any)], PlanAction::Create);
    let script = ["a web 1 failed n1", "a web 1 failed n1", "b web 1 running n1", "b web 1 failed n1"];
    let (lines, outcome) = run(&mut p, &script);
    assert_eq!(
        lines,
        ["web.1  failed on dc1-a: exited with 1", "web.1  running on dc1-a", "web.1  failed on dc1-a: exited with 1"]
    );
    assert_eq!(outcome, Outcome::Waiting);
    assert_eq!(run(&mut p, &["c web 1 rejected n1"]).1, Outcome::Failed(vec!["web.1".into()]));
}

#[test]
fn one_failure_is_enough_where_nothing_restarts() {
    let mut p = progress(vec![service("job", ServiceMode::Replicated(1), RestartCondition::None)], PlanAction::Create);
    assert_eq!(run(&mut p, &["a job 1 failed n1"]).1, Outcome::Failed(vec!["job.1".into()]));
}

#[test]
fn a_job_may_complete() {
    let run_to_complete = |condition| {
        let mut p = progress(vec![service("job", ServiceMode::Replicated(1), condition)], PlanAction::Create);
        let mut done = task("a job 1 complete n1");
        std::sync::Arc::make_mut(&mut done.spec).restart.condition = condition;
        p.seen(done);
        p.outcome()
    };
    assert_eq!(run_to_complete(RestartCondition::OnFailure), Outcome::Done);
    assert_eq!(run_to_complete(RestartCondition::None), Outcome::Done);
    assert_eq!(run_to_complete(RestartCondition::Any), Outcome::Waiting);
}

#[test]
fn failures_from_before_are_no_news() {
    let web = vec![service("web", ServiceMode::Replicated(1), RestartCondition::Any)];
    let mut p = progress(web, PlanAction::Keep);
    let script = ["a web 1 failed n1", "b web 1 failed n1", "c web 1 failed n1", "d web 1 running n1"];
    assert_eq!(run(&mut p, &script), (vec!["web.1  running on dc1-a".into()], Outcome::Done));
}

#[test]
fn global_services_wait_for_all_their_tasks() {
    let mut p = progress(vec![service("mon", ServiceMode::Global, RestartCondition::Any)], PlanAction::Create);
    assert_eq!(p.outcome(), Outcome::Waiting);
    assert_eq!(run(&mut p, &["a mon 0 running n1", "b mon 0 starting n2"]).1, Outcome::Waiting);
    assert_eq!(run(&mut p, &["b mon 0 running n2"]).1, Outcome::Done);
}

#[test]
fn global_services_are_replaced_one_by_one() {
    let old = |line: &str| Task { spec_generation: 1, ..task(line) };
    let mut p = progress(vec![service("mon", ServiceMode::Global, RestartCondition::Any)], PlanAction::Recreate);
    p.seen(old("a mon 0 running n1"));
    p.seen(old("b mon 0 running n2"));
    assert_eq!(run(&mut p, &["c mon 0 running n1"]).1, Outcome::Waiting);
    p.seen(Task { desired_state: TaskState::Shutdown, ..old("a mon 0 running n1") });
    assert_eq!(p.outcome(), Outcome::Waiting, "one is still to be replaced");
    p.gone(&TaskId::new("b"));
    assert_eq!(run(&mut p, &["d mon 0 starting n2"]).1, Outcome::Waiting);
    assert_eq!(run(&mut p, &["d mon 0 running n2"]).1, Outcome::Done);
}

#[test]
fn orphans_and_strangers_are_not_waited_for() {
    let mut p = progress(vec![service("old", ServiceMode::Replicated(1), RestartCondition::Any)], PlanAction::Orphan);
    assert_eq!(run(&mut p, &["a other 1 failed n1"]), (vec![], Outcome::Done));
}

#[test]
fn older_news_and_gone_tasks() {
    let mut p = progress(vec![service("web", ServiceMode::Replicated(1), RestartCondition::Any)], PlanAction::Create);
    let mut new = task("a web 1 running n1");
    new.meta.revision = 9;
    assert!(p.seen(new).is_some());
    assert_eq!(run(&mut p, &["a web 1 starting n1"]), (vec![], Outcome::Done));
    p.gone(&TaskId::new("a"));
    assert_eq!(p.outcome(), Outcome::Waiting);
    assert!(p.tasks().is_empty());
}

#[test]
fn descriptions() {
    let check = |change: fn(&mut TaskStatus), expected: &str| {
        let mut t = task("a web 1 failed n1");
        change(&mut t.status);
        assert_eq!(describe(&t, Some("dc1-a")), expected);
    };
    check(|_| (), "failed on dc1-a: exited with 1");
    check(|s| s.message = "exited with 1".into(), "failed on dc1-a: exited with 1");
    check(|s| s.err = Some("no such image".into()), "failed on dc1-a: no such image");
    check(|s| s.oom_killed = true, "failed on dc1-a: killed: out of memory");
    check(
        |s| *s = TaskStatus { state: TaskState::Running, message: "started".into(), ..Default::default() },
        "running on dc1-a",
    );
    check(
        |s| *s = TaskStatus { state: TaskState::Running, health: Some(Health::Unhealthy), ..Default::default() },
        "running on dc1-a: unhealthy",
    );
    let pending = task("a web 1 pending");
    assert_eq!(describe(&pending, None), "pending");
    let check = |name: &str, expected: &str| assert_eq!(short_name(name, "shop"), expected);
    check("shop_web.1", "web.1");
    check("shop_", "shop_");
    check("shopping.1", "shopping.1");
}

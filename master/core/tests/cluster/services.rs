//! Services: spreading, scaling, changes, restarts, dependencies, and what binds tasks to hosts.

use master_core::Command;
use skein_api::{
    Availability, DependencyCondition, ExplainQuery, Health, PlanAction, Resources, RestartCondition, ServiceMode,
    TaskReport, TaskState, TaskStatus, VolumesFrom,
};

use crate::harness::{Cluster, With, constraint, link, needs, port, replicas, restart, service, stack, volume};

#[test]
fn replicas_spread_and_scale() {
    let mut c = Cluster::with_nodes(3);
    c.up(vec![service("web").with(|s| replicas(s, 6))]);
    assert_eq!(c.nodes_of("web"), ["n1", "n1", "n2", "n2", "n3", "n3"]);
    let before = c.live("web");
    let plan = c.up(vec![service("web").with(|s| replicas(s, 2))]);
    assert_eq!(plan.items[0].action, PlanAction::Update);
    assert_eq!(plan.items[0].differences, ["mode.replicated: 6 -> 2"]);
    let after = c.live("web");
    assert_eq!(after.iter().map(|t| t.slot).collect::<Vec<_>>(), [1, 2], "the highest slots go");
    assert!(after.iter().all(|t| before.iter().any(|b| b.id == t.id)), "the others are left alone");
    assert_eq!(c.model().tasks.len(), 2, "tasks of slots too many are removed");
    c.up(vec![service("web").with(|s| replicas(s, 0))]);
    assert_eq!(c.model().tasks.len(), 0);
}

#[test]
fn a_changed_service_is_recreated_stop_first() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| replicas(s, 2))]);
    let old = c.live("web");
    let plan = c.apply(stack(vec![service("web").with(|s| {
        replicas(s, 2);
        s.task.container.image = "nginx".into();
    })]));
    assert_eq!(plan.items[0].differences, ["task.container.image: \"busybox\" -> \"nginx\""]);
    assert!(c.live("web").is_empty(), "no new one while the old ones stop");
    c.rest();
    let new = c.live("web");
    assert_eq!(new.iter().map(|t| t.spec.container.image.as_str()).collect::<Vec<_>>(), ["nginx", "nginx"]);
    assert!(new.iter().all(|t| old.iter().all(|o| o.id != t.id)));
    let old = c.model().tasks.values().filter(|t| t.spec.container.image == "busybox");
    assert!(old.clone().all(|t| t.status.state == TaskState::Shutdown));
    assert_eq!(old.count(), 2, "one ended task of each slot is kept");
}

#[test]
fn a_service_that_changes_while_its_tasks_are_pending() {
    let mut c = Cluster::with_nodes(1);
    let much = |s: &mut skein_api::ServiceSpec, gib: u64| s.task.resources.reservations.mem_bytes = gib << 30;
    let other = || service("other").with(|s| much(s, 3));
    c.up(vec![other()]);
    c.up(vec![other(), service("web").with(|s| much(s, 2))]);
    assert_eq!(c.show("web"), ["web.1 pending no node fits: 1 node; memory reservation 2 gib took 1"]);
    c.up(vec![other(), service("web").with(|s| much(s, 1))]);
    assert_eq!(c.show("web"), ["web.1 running n1"]);
    assert_eq!(c.model().tasks.len(), 2, "nothing is remembered of a task that never had a node");
}

#[test]
fn ended_tasks_are_replaced_by_the_restart_policy() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![
        service("any"),
        service("fail").with(|s| restart(s, RestartCondition::OnFailure)),
        service("never").with(|s| restart(s, RestartCondition::None)),
        service("twice").with(|s| s.task.restart.max_attempts = Some(2)),
    ]);
    for (name, code, again) in
        [("any", 0, true), ("any", 1, true), ("fail", 1, true), ("fail", 0, false), ("never", 1, false)]
    {
        c.end(&format!("s_{name}.1"), code);
        assert!(c.live(name).is_empty(), "the pause has not passed");
        c.pass(1_000);
        assert_eq!(c.live(name).len(), usize::from(again), "{name} {code}");
    }
    for left in [1, 1, 0] {
        c.end("s_twice.1", 1);
        c.pass(1_000);
        assert_eq!(c.live("twice").len(), left);
    }
    let shown = c.task("s_twice.1");
    assert_eq!((shown.status.state, shown.attempt), (TaskState::Failed, 2));
}

#[test]
fn pauses_grow_and_survive_a_restart_of_the_master() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![service("web")]);
    let mut pauses = Vec::new();
    for _ in 0..6 {
        c.end("s_web.1", 1);
        c.restart_master();
        let ended = c.now.mono_ms;
        while c.live("web").is_empty() {
            c.pass(1_000);
        }
        pauses.push((c.now.mono_ms - ended) / 1_000);
    }
    assert_eq!(pauses, [1, 1, 1, 1, 2, 4], "even at first, then doubled");
}

#[test]
fn one_of_a_global_service_on_each_node_that_may_have_it() {
    let mut c = Cluster::with_nodes(3);
    c.label("n1", "disk", "ssd");
    c.label("n2", "disk", "ssd");
    c.up(vec![service("agent").with(|s| {
        s.mode = ServiceMode::Global;
        constraint(s, "node.labels.disk==ssd");
    })]);
    assert_eq!(c.show("agent"), ["agent.n1 running n1", "agent.n2 running n2"]);
    c.label("n3", "disk", "ssd");
    c.join("n4");
    c.label("n4", "disk", "ssd");
    c.rest();
    assert_eq!(c.nodes_of("agent"), ["n1", "n2", "n3", "n4"]);
    c.drain("n2", Availability::Drain);
    c.label("n3", "disk", "hdd");
    c.rest();
    assert_eq!(c.nodes_of("agent"), ["n1", "n4"]);
    c.drain("n2", Availability::Active);
    c.lose("n1");
    assert_eq!(c.nodes_of("agent"), ["n2", "n4"]);
    c.heal("n1");
    c.rest();
    assert_eq!(c.nodes_of("agent"), ["n1", "n2", "n4"]);
    c.up(vec![service("agent").with(|s| replicas(s, 1))]);
    assert_eq!(c.live("agent").len(), 1, "a global service may become a replicated one");
}

#[test]
fn global_tasks_wait_for_room_and_for_dependencies() {
    let mut c = Cluster::with_nodes(2);
    let global = |s: &mut skein_api::ServiceSpec| s.mode = ServiceMode::Global;
    c.up(vec![
        service("first").with(|s| restart(s, RestartCondition::None)),
        service("web").with(|s| {
            global(s);
            s.task.ports = vec![port(80)];
            needs(s, "first", DependencyCondition::ServiceCompletedSuccessfully);
        }),
        service("old").with(|s| {
            s.task.ports = vec![port(80)];
            constraint(s, "node==n1");
        }),
    ]);
    assert_eq!(c.nodes_of("web"), [""; 0]);
    assert_eq!(c.core.explain("s_web", &ExplainQuery::default()).unwrap().summary, "waits for s_first to complete");
    c.end("s_first.1", 0);
    c.rest();
    assert_eq!(c.nodes_of("web"), ["n2"], "the port of n1 is taken");
    c.ok(Command::ServiceRemove("s_old".into()));
    c.rest();
    assert_eq!(c.nodes_of("web"), ["n1", "n2"]);
}

#[test]
fn dependencies_hold_the_first_tasks_back() {
    use DependencyCondition::{ServiceCompletedSuccessfully, ServiceHealthy, ServiceStarted};
    let mut c = Cluster::with_nodes(1);
    let once = |s: &mut skein_api::ServiceSpec| restart(s, RestartCondition::None);
    c.apply(stack(vec![
        service("db").with(|s| replicas(s, 2)),
        service("job").with(once),
        service("a").with(|s| needs(s, "db", ServiceStarted)),
        service("b").with(|s| needs(s, "db", ServiceHealthy)),
        service("c").with(|s| needs(s, "job", ServiceCompletedSuccessfully)),
        service("d").with(|s| needs(s, "job", ServiceStarted)),
    ]));
    assert_eq!(c.show("a"), ["a.1 pending waits for s_db to run"]);
    assert_eq!(c.show("b"), ["b.1 pending waits for s_db to be healthy"]);
    assert_eq!(c.show("c"), ["c.1 pending waits for s_job to complete"]);
    // Both run by now, and one is not healthy yet.
    while c.live("db").iter().any(|t| t.status.state < TaskState::Running) {
        c.agents_step();
    }
    c.health("s_db.2", Health::Starting);
    assert!(c.live("a")[0].node.is_some());
    c.restart_master();
    c.rest();
    // What was healthy when it was looked at first may have been placed already; a new one shows it.
    c.end("s_job.1", 0);
    c.rest();
    assert_eq!((c.show("c"), c.show("d")), (vec!["c.1 running n1".to_owned()], vec!["d.1 running n1".to_owned()]));
    c.health("s_db.2", Health::Healthy);
    c.rest();
    assert_eq!(c.show("b"), ["b.1 running n1"]);
    // Only the first task waits: a restart does not.
    c.end("s_db.1", 1);
    c.end("s_a.1", 1);
    c.pass(1_000);
    assert_eq!(c.show("a"), ["a.1 running n1"]);
}

#[test]
fn a_dependency_that_failed_is_named() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![
        service("job").with(|s| restart(s, RestartCondition::None)),
        service("web").with(|s| needs(s, "job", DependencyCondition::ServiceCompletedSuccessfully)),
    ]);
    c.end("s_job.1", 3);
    assert_eq!(c.show("web"), ["web.1 pending waits for s_job to complete; its last task failed: exited with 3"]);
}

#[test]
fn a_volume_keeps_its_tasks_on_its_host() {
    let mut c = Cluster::with_nodes(3);
    let db = |image: &str| {
        service("db").with(|s| {
            volume(s, "s_data");
            s.task.container.image = image.into();
        })
    };
    c.up(vec![db("a")]);
    let home = c.nodes_of("db");
    c.up(vec![db("b"), service("web").with(|s| replicas(s, 4))]);
    assert_eq!(c.nodes_of("db"), home, "also when it is recreated and its host is the fullest");
    c.lose(&home[0]);
    let waits = format!(
        "db.1 pending no node fits: 3 nodes; 1 not ready; 2 ruled out because volume s_data lives on {} (lost)",
        home[0]
    );
    assert_eq!(c.show("db"), [waits], "never on another host with an empty volume");
    assert_eq!(c.live("web").iter().filter(|t| t.status.state == TaskState::Running).count(), 4);
    c.heal(&home[0]);
    c.rest();
    assert_eq!(c.nodes_of("db"), home);
    c.drain(&home[0], Availability::Drain);
    c.rest();
    assert!(c.show("db")[0].contains(&format!("volume s_data lives on {} (drained)", home[0])), "{:?}", c.show("db"));
}

#[test]
fn links_and_volumes_from_share_a_host() {
    let mut c = Cluster::with_nodes(3);
    c.apply(stack(vec![
        service("a").with(|s| link(s, "db")),
        service("b").with(|s| {
            s.task.container.volumes_from = vec![VolumesFrom { from: "s_db".into(), read_only: true }];
            replicas(s, 2);
        }),
        service("db").with(|s| constraint(s, "node==n3")),
    ]));
    c.rest();
    assert_eq!((c.nodes_of("a"), c.nodes_of("b")), (vec!["n3".into()], vec!["n3".into(), "n3".into()]));
    let explained = c.core.explain("s_a.1", &ExplainQuery::default()).unwrap();
    assert!(explained.summary.starts_with("runs on n3; now: 1 of 3 nodes fit"), "{explained:?}");
    // The agent is told whose volumes, by id, and again when that is another task.
    let source = |c: &Cluster| {
        let b = c.task("s_b.1");
        let docs = &c.agents[&c.node("n3")].docs;
        let skein_api::Assignment::Task(t) = &docs[&format!("task/{}", b.id)] else { panic!("a task") };
        t.volumes_from.clone()
    };
    assert_eq!(source(&c), [(c.live("db")[0].id.clone(), true)]);
    c.end("s_db.1", 1);
    c.pass(1_000);
    assert_eq!(source(&c), [(c.live("db")[0].id.clone(), true)]);
}

#[test]
fn a_host_port_is_held_by_one_task_per_node() {
    let mut c = Cluster::with_nodes(2);
    let web = |n| {
        service("web").with(|s| {
            replicas(s, n);
            s.task.ports = vec![port(80)];
        })
    };
    c.up(vec![web(3)]);
    assert_eq!(c.nodes_of("web"), ["n1", "n2"]);
    assert!(c.show("web").contains(&"web.3 pending no node fits: 2 nodes; host port 80/tcp took 2".to_owned()));
    // Another service that wants the port too waits, and the plan says so.
    let plan = c.up(vec![web(2), service("other").with(|s| s.task.ports = vec![port(80)])]);
    assert_eq!(plan.warnings, ["s_other waits: host port 80/tcp is taken on every node"]);
    assert_eq!(c.show("other"), ["other.1 pending no node fits: 2 nodes; host port 80/tcp took 2"]);
    c.up(vec![web(1), service("other").with(|s| s.task.ports = vec![port(80)])]);
    assert_eq!(c.live("other")[0].status.state, TaskState::Running);
}

#[test]
fn reservations_are_kept_and_given_back() {
    let mut c = Cluster::with_nodes(1);
    let half = Resources { nano_cpus: 2_000_000_000, mem_bytes: 1 << 30 };
    let web = |n| {
        service("web").with(|s| {
            replicas(s, n);
            s.task.resources.reservations = half;
        })
    };
    c.up(vec![web(3)]);
    assert_eq!(c.show("web")[2], "web.3 pending no node fits: 1 node; cpu reservation 2 took 1");
    c.end("s_web.1", 1);
    c.rest();
    assert_eq!(c.nodes_of("web").len(), 2, "the place of an ended task is free at once");
}

#[test]
fn a_large_service_does_not_take_every_place_from_a_small_one() {
    let mut c = Cluster::with_nodes(3);
    let gib = |name: &str, n: u32| {
        service(name).with(|s| {
            replicas(s, n);
            s.task.resources.reservations.mem_bytes = 1 << 30;
        })
    };
    let places: u64 = c.model().nodes.values().map(|n| n.description.offered.mem_bytes >> 30).sum();
    c.up(vec![gib("large", 1_000), gib("small", 3)]);
    assert_eq!(c.nodes_of("small").len(), 3);
    assert_eq!(c.nodes_of("large").len() as u64, places - 3, "and every place is taken");
}

#[test]
fn what_agents_report_tells_them_nothing_new() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![service("web")]);
    let (node, task) = (c.node("n1"), c.task("s_web.1"));
    assert_eq!(task.status.state, TaskState::Running);
    assert_eq!(c.core.dispatch_due(), []);
    let status = TaskStatus { message: "still running".into(), ..task.status };
    let reports = vec![TaskReport { task: task.id, run: task.run, status }];
    c.ok(Command::Reports { node: node.clone(), reports });
    assert_eq!(c.task("s_web.1").status.message, "still running");
    assert_eq!(c.core.dispatch_due(), [], "the task's document says what shall be, not what is");
}

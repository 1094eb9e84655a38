//! Room for services that count more.

use skein_api::{Availability, ExplainQuery, Preemption, Resources, ServiceSpec, StackApply, TaskState};

use crate::harness::{Cluster, With, constraint, container, port, replicas, service, stack};

const CPU: u64 = 1_000_000_000;

fn cpus(n: u64) -> impl Fn(&mut ServiceSpec) {
    move |s| s.task.resources.reservations = Resources { nano_cpus: n * CPU, mem_bytes: 0 }
}

/// A service that counts `priority` and may make room.
fn urgent(name: &str, priority: i32) -> ServiceSpec {
    service(name).with(|s| (s.task.placement.priority, s.task.placement.preempt) = (priority, true))
}

fn ranked(name: &str, priority: i32) -> ServiceSpec {
    service(name).with(|s| s.task.placement.priority = priority)
}

fn offered(c: &Cluster) -> u64 {
    c.model().nodes.values().next().expect("a node").description.offered.nano_cpus / CPU
}

#[test]
fn who_counts_more_gets_the_place_of_who_counts_least() {
    let mut c = Cluster::with_nodes(2);
    let all = offered(&c);
    // One on each host, which is full then.
    let least = ranked("least", -5).with(|s| (cpus(all)(s), constraint(s, "node==n2")).1);
    let less = ranked("less", 0).with(|s| (cpus(all)(s), constraint(s, "node==n1")).1);
    c.up(vec![least.clone(), less.clone()]);
    let most = urgent("most", 10).with(cpus(all));
    assert_eq!(
        foretold(&c, vec![least.clone(), less.clone(), most.clone()]),
        ["s_most.1 waits for room on n2, stops s_least.1"]
    );
    c.up(vec![least, less, most]);
    assert_eq!(c.show("most"), ["most.1 running n2"]);
    assert_eq!(c.show("less"), ["less.1 running n1"]);
    assert!(c.show("least")[0].starts_with("least.1 pending no node fits"), "{:?}", c.show("least"));
    let stopped = c.model().tasks.values().find(|t| t.name == "s_least.1" && t.desired_state > TaskState::Running);
    assert!(stopped.is_some(), "it is remembered");
}

fn up(services: Vec<ServiceSpec>) -> master_core::Command {
    master_core::Command::StackApply(Box::new(StackApply { stack: stack(services), ..StackApply::default() }))
}

/// What `skein up` warns of.
fn foretold(c: &Cluster, services: Vec<ServiceSpec>) -> Vec<String> {
    let apply = StackApply { stack: stack(services), dry_run: true, ..StackApply::default() };
    c.core.clone().preemptions(&apply).expect("a stack")
}

fn preemption(c: &Cluster, name: &str) -> Preemption {
    let why = c.core.clone().explain(name, &ExplainQuery::default()).expect("it is there");
    why.preemption.clone().unwrap_or_else(|| panic!("nothing is said of preemption: {why:?}"))
}

#[test]
fn every_task_of_a_plan_names_its_victims() {
    let mut c = Cluster::with_nodes(2);
    let all = offered(&c);
    let low = ranked("low", -5).with(|s| (cpus(all)(s), replicas(s, 2)).1);
    c.up(vec![low.clone()]);
    // Both of the first one go for the first two tasks, and nothing is left that the third could stop.
    let most = urgent("most", 10).with(|s| (cpus(all)(s), replicas(s, 3)).1);
    let at = |node: &str| c.live("low").into_iter().find(|t| t.node == Some(c.node(node))).expect("one each").name;
    let said = foretold(&c, vec![low.clone(), most.clone()]);
    let expected = [("1", "n1"), ("2", "n2")]
        .map(|(slot, node)| format!("s_most.{slot} waits for room on {node}, stops {}", at(node)));
    assert_eq!(said, expected);
    // On one node, one after the other.
    let mut c = Cluster::with_nodes(1);
    let half = ranked("half", 0).with(|s| (cpus(all / 2)(s), replicas(s, 2)).1);
    c.up(vec![half.clone()]);
    let pair = urgent("pair", 1).with(|s| (cpus(all / 2)(s), replicas(s, 2)).1);
    let said = foretold(&c, vec![half.clone(), pair.clone()]);
    assert_eq!(said.len(), 2, "{said:?}");
    c.up(vec![half, pair]);
    assert_eq!(c.show("pair"), ["pair.1 running n1", "pair.2 running n1"]);
    assert_eq!(foretold(&c, vec![urgent("pair", 1).with(|s| (cpus(all / 2)(s), replicas(s, 2)).1)]), [""; 0]);
}

#[test]
fn a_task_that_waits_says_whom_it_would_stop_or_why_that_does_not_help() {
    let mut c = Cluster::with_nodes(2);
    let all = offered(&c);
    c.run(container("alone").with(|t| {
        t.spec.resources.reservations.nano_cpus = all * CPU;
        t.spec.placement.constraints.push("node==n1".into());
    }));
    let low = ranked("low", 0).with(cpus(all));
    c.up(vec![low.clone()]);
    let late = urgent("late", 0).with(cpus(1));
    c.up(vec![low.clone(), late]);
    let none = preemption(&c, "s_late");
    assert_eq!((none.node, none.victims), (None, Vec::new()));
    assert_eq!(none.message, "no room can be made: 2 nodes; on 2 what stays takes too much CPU or memory");
    c.drain("n1", Availability::Pause);
    let tied = urgent("tied", 0).with(|s| (cpus(1)(s), s.task.placement.constraints.push("node!=n2".into())).0);
    c.up(vec![low.clone(), tied]);
    let message = preemption(&c, "s_tied").message;
    assert_eq!(message, "no room can be made: 2 nodes; 1 ruled out by what they are; 1 not ready, paused or drained");
    // While room is made.
    let first = urgent("first", 1).with(cpus(all));
    c.ok(up(vec![low, first]));
    let made = preemption(&c, "s_first");
    assert_eq!(made.message, "waits for room on n2, stops s_low.1");
    assert_eq!((made.node.as_deref(), made.victims), (Some("n2"), vec!["s_low.1".to_owned()]));
    c.rest();
    assert_eq!(c.show("first"), ["first.1 running n2"]);
    let why = c.core.clone().explain("s_first.1", &ExplainQuery::default()).expect("it is there");
    assert_eq!(why.preemption, None, "it runs");
    // What a next task would do, while none waits: nothing helps against an equal.
    let next = preemption(&c, "s_first").message;
    assert!(next.starts_with("no room can be made: 2 nodes; "), "{next}");
    let everywhere = urgent("everywhere", 9).with(|s| (cpus(1)(s), s.mode = skein_api::ServiceMode::Global).0);
    c.up(vec![everywhere]);
    assert_eq!(preemption(&c, "s_everywhere").message, "a global service makes no room: it has tasks where they fit");
}

#[test]
fn nobody_else_takes_what_is_given_back() {
    let mut c = Cluster::with_nodes(1);
    let all = offered(&c);
    assert!(all >= 2, "the test needs two CPUs");
    // As many small ones as fit; the big one needs the room of all of them.
    let small = service("small").with(|s| (cpus(1)(s), replicas(s, u32::try_from(all).expect("few"))).1);
    c.up(vec![small.clone()]);
    assert_eq!(c.live("small").iter().filter(|t| t.node.is_some()).count() as u64, all);
    c.up(vec![small, urgent("big", 1).with(cpus(all))]);
    assert_eq!(c.show("big"), ["big.1 running n1"]);
    assert!(c.live("small").iter().all(|t| t.node.is_none()), "their replacements wait");
}

#[test]
fn only_services_that_count_less_go_and_no_more_than_needed() {
    let mut c = Cluster::with_nodes(1);
    let all = offered(&c);
    let busy = service("busy").with(|s| (cpus(1)(s), replicas(s, u32::try_from(all - 1).expect("few"))).1);
    let holder = service("holder").with(|s| (cpus(1)(s), s.task.ports = vec![port(80)]).1);
    c.up(vec![busy.clone(), holder.clone()]);
    // The port is the holder's, so the holder goes and nobody else.
    c.up(vec![busy.clone(), holder.clone(), urgent("web", 1).with(|s| (cpus(1)(s), s.task.ports = vec![port(80)]).1)]);
    assert_eq!(c.show("web"), ["web.1 running n1"]);
    assert_eq!(c.live("busy").iter().filter(|t| t.node.is_some()).count() as u64, all - 1);
    // Equals stay, and so do container tasks.
    let mut c = Cluster::with_nodes(1);
    c.run(container("one").with(|t| t.spec.resources.reservations.nano_cpus = all * CPU));
    c.up(vec![urgent("late", 5).with(cpus(1))]);
    assert!(c.show("late")[0].starts_with("late.1 pending no node fits"), "{:?}", c.show("late"));
    let error = c.refused(up(vec![ranked("x", 1_001)]), "bad_request");
    assert_eq!(error.message, "s_x has priority 1001: -1000 to 1000 are possible");
}

#[test]
fn of_equals_few_go() {
    let mut c = Cluster::with_nodes(1);
    let all = offered(&c);
    // One large and as many small ones as fit beside it; what is asked for is the large one's room.
    let large = service("large").with(cpus(all / 2));
    let small = service("small").with(|s| (cpus(1)(s), replicas(s, u32::try_from(all - all / 2).expect("few"))).1);
    c.up(vec![large.clone(), small.clone()]);
    c.up(vec![large, small, urgent("most", 1).with(cpus(all / 2))]);
    assert_eq!(c.show("most"), ["most.1 running n1"]);
    assert!(c.show("large")[0].starts_with("large.1 pending"), "{:?}", c.show("large"));
    assert_eq!(c.live("small").iter().filter(|t| t.node.is_some()).count() as u64, all - all / 2);
}

#[test]
fn a_new_master_goes_on_and_two_that_preempt_do_not_push_each_other_out() {
    let mut c = Cluster::with_nodes(2);
    let all = offered(&c);
    let low = service("low").with(|s| (cpus(all)(s), replicas(s, 2)).1);
    c.up(vec![low.clone()]);
    let apply = |one: ServiceSpec, two: ServiceSpec| up(vec![low.clone(), one, two]);
    c.ok(apply(urgent("one", 1).with(cpus(all)), urgent("two", 2).with(cpus(all))));
    c.turn();
    c.restart_master();
    c.pass(60_000);
    assert_eq!((c.live("one")[0].node.is_some(), c.live("two")[0].node.is_some()), (true, true));
    let before = (c.live("one")[0].id.clone(), c.live("two")[0].id.clone());
    c.pass(60_000);
    assert_eq!((c.live("one")[0].id.clone(), c.live("two")[0].id.clone()), before, "they stay");
}

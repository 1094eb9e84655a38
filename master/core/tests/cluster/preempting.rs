//! Room for services that count more.

use skein_api::{Resources, ServiceSpec, StackApply, TaskState};

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
    let plan = c.ok(up(vec![least.clone(), less.clone(), most.clone()], true));
    let master_core::Reply::Plan(plan) = plan else { panic!("a plan") };
    assert_eq!(plan.warnings, ["s_most waits for room on n2, stops s_least.1"]);
    c.up(vec![least, less, most]);
    assert_eq!(c.show("most"), ["most.1 running n2"]);
    assert_eq!(c.show("less"), ["less.1 running n1"]);
    assert!(c.show("least")[0].starts_with("least.1 pending no node fits"), "{:?}", c.show("least"));
    let stopped = c.model().tasks.values().find(|t| t.name == "s_least.1" && t.desired_state > TaskState::Running);
    assert!(stopped.is_some(), "it is remembered");
}

fn up(services: Vec<ServiceSpec>, dry_run: bool) -> master_core::Command {
    let stack = stack(services);
    master_core::Command::StackApply(Box::new(StackApply { stack, dry_run, ..StackApply::default() }))
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
    let error = c.refused(up(vec![ranked("x", 1_001)], false), "bad_request");
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
    let apply = |one: ServiceSpec, two: ServiceSpec| up(vec![low.clone(), one, two], false);
    c.ok(apply(urgent("one", 1).with(cpus(all)), urgent("two", 2).with(cpus(all))));
    c.turn();
    c.restart_master();
    c.pass(60_000);
    assert_eq!((c.live("one")[0].node.is_some(), c.live("two")[0].node.is_some()), (true, true));
    let before = (c.live("one")[0].id.clone(), c.live("two")[0].id.clone());
    c.pass(60_000);
    assert_eq!((c.live("one")[0].id.clone(), c.live("two")[0].id.clone()), before, "they stay");
}

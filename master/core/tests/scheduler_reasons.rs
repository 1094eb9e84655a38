//! The words of all reasons of each node, and what to change. That there are as many reasons as the naive scheduler has is
//! in scheduler_oracle.rs.

use std::collections::BTreeMap;

use master_core::scheduler::{NodeFacts, Request, Scheduler};
use skein_api::{Availability, NodeId, PortPublish, Protocol, Resources, ServiceId, Strategy, TaskId, TaskSpec};

const GIB: u64 = 1 << 30;

fn node(name: &str, mem_gib: u64) -> NodeFacts {
    NodeFacts {
        id: NodeId::new(name),
        name: name.to_owned(),
        labels: BTreeMap::from([("disk".to_owned(), "ssd".to_owned())]),
        ready: true,
        offered: Resources { nano_cpus: 4_000_000_000, mem_bytes: mem_gib * GIB },
        ..NodeFacts::default()
    }
}

fn request(change: impl FnOnce(&mut TaskSpec)) -> Request {
    let mut spec = TaskSpec::default();
    change(&mut spec);
    Request::compile(&spec, Some(ServiceId::new("s")), None, Strategy::Spread).expect("it parses")
}

fn memory(gib: u64) -> Request {
    request(|spec| spec.resources.reservations.mem_bytes = gib * GIB)
}

fn put(scheduler: &mut Scheduler, task: &str, node: &str, request: &Request) {
    scheduler.apply_task(request.placed(TaskId::new(task), task.to_owned(), NodeId::new(node)));
}

#[test]
fn a_node_tells_all_its_reasons() {
    let mut scheduler = Scheduler::new();
    scheduler.apply_node(node("a", 4));
    scheduler.apply_node(NodeFacts {
        ready: false,
        availability: Availability::Drain,
        labels: BTreeMap::new(),
        ..node("b", 1)
    });
    put(&mut scheduler, "t1", "a", &memory(3));
    let asks = request(|spec| {
        spec.placement.constraints.push("node.labels.disk==ssd".into());
        spec.resources.reservations.mem_bytes = 2 * GIB;
    });
    let told: Vec<_> =
        scheduler.reasons(&asks, None).into_iter().map(|node| (node.node, node.reasons.join("; "))).collect();
    let a = "memory reservation 2 GiB: 1 GiB of memory free of 4 GiB of memory";
    let b = "not ready; drained; constraint node.labels.disk==ssd; memory reservation 2 GiB: 1 GiB of memory free of 1 GiB of memory";
    assert_eq!(told, [("a".to_owned(), a.to_owned()), ("b".to_owned(), b.to_owned())]);
    assert!(scheduler.reasons(&memory(1), None).iter().any(|node| node.reasons.is_empty()), "one fits");
}

#[test]
fn the_smallest_change_comes_first() {
    let check = |scheduler: &Scheduler, request: &Request, expected: &[&str]| {
        assert_eq!(scheduler.suggestions(request), expected);
    };
    let mut scheduler = Scheduler::new();
    ["a", "b", "c"].into_iter().for_each(|name| scheduler.apply_node(node(name, 4)));
    check(&scheduler, &memory(4), &[]);
    put(&mut scheduler, "t1", "a", &memory(3));
    put(&mut scheduler, "t2", "b", &memory(2));
    put(&mut scheduler, "t3", "c", &memory(4));
    check(
        &scheduler,
        &memory(3),
        &[
            "ask for 2 GiB of memory instead of 3 GiB of memory, or free 1 GiB of memory on b",
            "ask for 1 GiB of memory instead of 3 GiB of memory, or free 2 GiB of memory on a",
            "free 3 GiB of memory on c",
        ],
    );
    // By the share of the node, also where it has not so much at all: a quarter of 4 GiB before half of 8.
    let mut sizes = Scheduler::new();
    ["large", "small"].into_iter().zip([8, 4]).for_each(|(name, gib)| sizes.apply_node(node(name, gib)));
    put(&mut sizes, "t1", "large", &memory(7));
    check(
        &sizes,
        &memory(5),
        &[
            "ask for 4 GiB of memory at most, which is free on small",
            "ask for 1 GiB of memory instead of 5 GiB of memory, or free 4 GiB of memory on large",
        ],
    );
    scheduler.apply_node(NodeFacts { availability: Availability::Pause, ..node("d", 4) });
    assert_eq!(scheduler.suggestions(&memory(3))[0], "skein node activate d");
    let label = request(|spec| spec.placement.constraints.push("node.labels.zone==x".into()));
    check(&scheduler, &label, &["skein node label a zone=x", "skein node label b zone=x", "skein node label c zone=x"]);
    let port = PortPublish { protocol: Protocol::Tcp, container_port: 80, host_port: 80, host_ip: None };
    let web = request(|spec| spec.ports.push(port));
    let mut scheduler = Scheduler::new();
    scheduler.apply_node(node("a", 4));
    put(&mut scheduler, "w", "a", &web);
    check(&scheduler, &web, &["free host port 80/tcp on a, which is taken by w"]);
    let most = request(|spec| spec.placement.max_replicas_per_node = 1);
    check(&scheduler, &most, &["allow 2 replicas per node"]);
}

/// What takes so many CPUs, GiB and GPUs.
fn amounts(cpus: u64, gib: u64, gpus: u64) -> Request {
    request(|spec| {
        spec.resources.reservations = Resources { nano_cpus: cpus * 1_000_000_000, mem_bytes: gib * GIB };
        spec.resources.generic.insert("gpu".into(), gpus);
    })
}

#[test]
fn several_amounts_are_lowered_together_or_freed_together() {
    let host = || NodeFacts { generic: BTreeMap::from([("gpu".to_owned(), 2)]), ..node("a", 8) };
    let check = |taken: &Request, asks: &Request, expected: &[&str]| {
        let mut scheduler = Scheduler::new();
        scheduler.apply_node(host());
        put(&mut scheduler, "t", "a", taken);
        assert_eq!(scheduler.suggestions(asks), expected);
    };
    // Each alternative is enough on its own, and none says more than what is missing.
    let both = "ask for 1 CPU and 2 GiB of memory instead of 2 CPUs and 3 GiB of memory, or free 1 CPU and 1 GiB of memory on a";
    check(&amounts(3, 6, 0), &amounts(2, 3, 2), &[both]);
    // What is used up can only be freed, and then the rest is freed with it.
    check(&amounts(3, 6, 2), &amounts(2, 3, 1), &["free 1 CPU and 1 GiB of memory and 1 gpu on a"]);
    // What is larger than the node can only be lowered.
    check(&amounts(3, 6, 0), &amounts(2, 9, 0), &["ask for 1 CPU and 2 GiB of memory at most, which is free on a"]);
    check(&amounts(3, 6, 2), &amounts(5, 1, 1), &["ask for 1 CPU at most, and free 1 gpu on a"]);
    check(&amounts(4, 1, 0), &amounts(5, 1, 0), &[]);
    let mut scheduler = Scheduler::new();
    scheduler.apply_node(NodeFacts { slots: Some(1), ..host() });
    put(&mut scheduler, "t", "a", &amounts(4, 1, 0));
    assert_eq!(scheduler.suggestions(&amounts(1, 1, 0)), ["free 1 CPU and 1 container slot on a"]);
}

#[test]
fn slots_are_a_filter_where_a_node_counts_them() {
    let mut scheduler = Scheduler::new();
    scheduler.apply_node(node("a", 4));
    let filters = |scheduler: &Scheduler| {
        let found = scheduler.explain(&memory(1)).filters;
        found.into_iter().map(|tally| tally.filter).collect::<Vec<_>>()
    };
    assert_eq!(filters(&scheduler), ["node is ready", "node is active", "memory reservation 1 GiB"]);
    scheduler.apply_node(NodeFacts { slots: Some(0), ..node("b", 4) });
    assert_eq!(filters(&scheduler)[3], "container slots");
    let of_b = scheduler.reasons(&memory(1), None).into_iter().find(|node| node.node == "b").expect("it is there");
    assert_eq!(of_b.reasons, ["container slots: 0 container slots free of 0 container slots"]);
    scheduler.remove_node(&NodeId::new("b"));
    assert_eq!(filters(&scheduler).len(), 3);
}

#[test]
fn who_has_a_port_is_named() {
    let port = |ip: Option<&str>| PortPublish {
        protocol: Protocol::Tcp,
        container_port: 80,
        host_port: 8080,
        host_ip: ip.map(|ip| ip.parse().expect("an address")),
    };
    let web = |ip| request(|spec| spec.ports.push(port(ip)));
    let mut scheduler = Scheduler::new();
    scheduler.apply_node(node("a", 4));
    put(&mut scheduler, "one", "a", &web(Some("10.0.0.1")).in_service("shop_web"));
    put(&mut scheduler, "shop_web.2", "a", &web(Some("10.0.0.2")).in_service("shop_web"));
    put(
        &mut scheduler,
        "udp",
        "a",
        &request(|spec| {
            spec.ports.push(PortPublish { protocol: Protocol::Udp, ..port(None) });
        }),
    );
    let check = |asks: &Request, reason: &str| {
        assert_eq!(scheduler.reasons(asks, None)[0].reasons, [format!("host port {reason}")]);
        let (port, holders) = reason.split_once(": ").expect("a port and who has it");
        assert_eq!(scheduler.suggestions(asks), [format!("free host port {port} on a, which is {holders}")]);
    };
    check(&web(None), "8080/tcp: taken by one of service shop_web and shop_web.2");
    check(&web(Some("10.0.0.2")), "10.0.0.2:8080/tcp: taken by shop_web.2");
}

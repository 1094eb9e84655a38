//! Filters beyond labels and room, as tables of small cases: sets of nodes, volumes, services, counted things, and over
//! what the tasks of a service are spread.

use std::collections::{BTreeMap, BTreeSet};

use master_core::scheduler::{NodeFacts, Placed, Request, Scheduler};
use skein_api::{
    Availability, GenericOffer, Mount, MountKind, Node, NodeId, Overcommit, Preference, Resources, ServiceId, Strategy,
    TaskId, TaskSpec,
};

fn id(name: &str) -> NodeId {
    NodeId::new(format!("id-{name}"))
}

/// A ready node of 4 CPUs and 8 bytes with these labels; its id is `id-<name>`.
fn node(name: &str, labels: &[(&str, &str)]) -> NodeFacts {
    NodeFacts {
        id: id(name),
        name: name.to_owned(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ready: true,
        offered: Resources { nano_cpus: 4, mem_bytes: 8 },
        ..NodeFacts::default()
    }
}

fn cluster(nodes: impl IntoIterator<Item = NodeFacts>) -> Scheduler {
    let mut scheduler = Scheduler::new();
    nodes.into_iter().for_each(|facts| scheduler.apply_node(facts));
    scheduler
}

fn compile(spec: &TaskSpec) -> Request {
    let request = Request::compile(spec, Some(ServiceId::new("s")), None, Strategy::Spread);
    request.unwrap_or_else(|err| panic!("{err}")).in_service("shop_web")
}

fn spec(change: impl FnOnce(&mut TaskSpec)) -> TaskSpec {
    let mut spec = TaskSpec::default();
    change(&mut spec);
    spec
}

fn names(scheduler: &Scheduler, request: &Request) -> Vec<String> {
    let fitting = scheduler.fitting(request);
    fitting.iter().map(|id| scheduler.node(id).expect("a node of the cluster").name.clone()).collect()
}

/// Places and applies `count` tasks one by one; the names of their nodes.
fn run(scheduler: &mut Scheduler, request: &Request, count: u32) -> Vec<String> {
    let place = |step| {
        let node = scheduler.place(request, 0).unwrap_or_else(|rejection| panic!("{rejection}"));
        let name = scheduler.node(&node).expect("a node of the cluster").name.clone();
        scheduler.apply_task(request.placed(TaskId::new(format!("{name}-{step}")), String::new(), node));
        name
    };
    (0..count).map(place).collect()
}

#[test]
fn whitelists_hold_names_and_ids() {
    let mut scheduler = cluster([node("a", &[]), node("b", &[]), node("c", &[])]);
    let check = |whitelists: &[&str], expected: &[&str]| {
        let spec = spec(|s| s.placement.whitelists = whitelists.iter().map(|w| (*w).to_owned()).collect());
        assert_eq!(names(&scheduler, &compile(&spec)), expected, "{whitelists:?}");
    };
    check(&["node==a|c"], &["a", "c"]);
    check(&["whitelist:node==id-b|nobody"], &["b"]);
    check(&["node==a|c", "node==c|b"], &["c"]);
    let nowhere = spec(|s| s.placement.whitelists = vec!["node==x|y".to_owned()]);
    assert!(!scheduler.constraints_can_be_met(&compile(&nowhere)));
    assert_eq!(
        scheduler.place(&compile(&nowhere), 0).unwrap_err().summary(),
        "no node fits: 3 nodes; whitelist node==x|y took 3"
    );
    let from_env = spec(|s| s.container.env = BTreeMap::from([("whitelist:node".to_owned(), Some("=a|b".to_owned()))]));
    assert_eq!(names(&scheduler, &compile(&from_env)), ["a", "b"]);
    let label = ("com.docker.swarm.whitelists".to_owned(), r#"["node==b"]"#.to_owned());
    assert_eq!(names(&scheduler, &compile(&spec(|s| s.container.labels = BTreeMap::from([label])))), ["b"]);
}

#[test]
fn affinities_see_volumes_and_services() {
    let with = |name: &str, volumes: &[&str]| NodeFacts {
        volumes: volumes.iter().map(|v| (*v).to_owned()).collect::<BTreeSet<_>>(),
        ..node(name, &[])
    };
    let mut scheduler = cluster([with("a", &["data", "logs"]), with("b", &["logs"]), with("c", &[])]);
    scheduler.apply_task(Placed {
        task: TaskId::new("0123456789abcdef"),
        node: id("c"),
        service: Some(ServiceId::new("svc")),
        service_name: "shop_db".into(),
        ..Placed::default()
    });
    let check = |affinity: &str, expected: &[&str]| {
        let spec = spec(|s| s.placement.affinities = vec![affinity.to_owned()]);
        assert_eq!(names(&scheduler, &compile(&spec)), expected, "{affinity}");
    };
    check("volume==data", &["a"]);
    check("volume!=data", &["b", "c"]);
    check("volume==*", &["a", "b"]);
    check("volume==/^l/", &["a", "b"]);
    check("service==shop_db", &["c"]);
    check("affinity:service!=shop_*", &["a", "b"]);
    check("service==svc", &["c"]);
    check("container==0123456789ab", &["c"]);
    check("container==0123456789abcdef", &["c"]);
    check("container!=0123456789a", &["a", "b", "c"]);
}

#[test]
fn a_service_keeps_away_from_itself_in_batches_too() {
    let mut scheduler = cluster([node("a", &[]), node("b", &[])]);
    let apart = |expression: &str| compile(&spec(|s| s.placement.affinities = vec![expression.to_owned()]));
    let batch = scheduler.place_batch(&apart("service!=shop_web"), 3, 0);
    assert_eq!((batch.runs, batch.placed), (vec![(id("a"), 1), (id("b"), 1)], 2));
    assert_eq!(batch.rejection.unwrap().summary(), "no node fits: 2 nodes; affinity service!=shop_web took 2");
    let batch = scheduler.place_batch(&apart("service!=~shop_web"), 3, 0);
    assert_eq!(batch.runs, [(id("a"), 2), (id("b"), 1)]);
}

#[test]
fn what_a_class_keeps_of_its_next_nodes_knows_generic_resources() {
    let gpu = || BTreeMap::from([("gpu".to_owned(), 1)]);
    let mut scheduler = cluster(["a", "b"].map(|name| NodeFacts { generic: gpu(), ..node(name, &[]) }));
    scheduler.engine().be_restless();
    let request = compile(&spec(|s| s.resources.generic = gpu()));
    // Twice: the second time the class has a list of its next nodes.
    assert_eq!((scheduler.place(&request, 0).unwrap(), scheduler.place(&request, 0).unwrap()), (id("a"), id("a")));
    for name in ["a", "b"] {
        let task = Placed { task: TaskId::new(name), node: id(name), generic: gpu(), ..Placed::default() };
        scheduler.apply_task(task);
    }
    assert_eq!(
        scheduler.place(&request, 0).unwrap_err().summary(),
        "no node fits: 2 nodes; generic resource gpu 1 took 2"
    );
}

#[test]
fn generic_resources_and_slots_are_counted() {
    let with = |name: &str, gpus: u64, slots: Option<u64>| NodeFacts {
        generic: BTreeMap::from([("gpu".to_owned(), gpus)]),
        slots,
        ..node(name, &[])
    };
    let mut scheduler = cluster([with("a", 3, None), with("b", 1, Some(1)), node("c", &[])]);
    let gpus = |count| compile(&spec(|s| s.resources.generic = BTreeMap::from([("gpu".to_owned(), count)])));
    assert_eq!(names(&scheduler, &gpus(1)), ["a", "b"]);
    assert_eq!(names(&scheduler, &gpus(2)), ["a"]);
    assert_eq!(names(&scheduler, &gpus(0)), ["a", "b", "c"]);
    assert_eq!(
        scheduler.place(&gpus(4), 0).unwrap_err().summary(),
        "no node fits: 3 nodes; generic resource gpu 4 took 3"
    );
    let batch = scheduler.place_batch(&gpus(1), 5, 0);
    assert_eq!(batch.runs, [(id("a"), 3), (id("b"), 1)]);
    assert_eq!(run(&mut scheduler, &compile(&TaskSpec::default()), 5), ["a", "b", "c", "a", "c"]);
    assert_eq!(
        scheduler
            .place(
                &gpus(1).pinned(master_core::scheduler::Pin {
                    nodes: BTreeSet::from([id("b")]),
                    reason: "it is so".to_owned()
                }),
                0
            )
            .unwrap_err()
            .summary(),
        "no node fits: 3 nodes; 2 ruled out because it is so; container slots took 1"
    );
}

#[test]
fn a_node_offers_what_its_agent_and_the_ratio_say() {
    let mut host = Node { id: id("a"), ..Node::default() };
    host.description.offered = Resources { nano_cpus: 4_000, mem_bytes: 1_000 };
    host.description.engine_labels = BTreeMap::from([("containerslots".to_owned(), "3".to_owned())]);
    let ids = BTreeSet::from(["GPU-0".to_owned(), "GPU-1".to_owned()]);
    host.description.generic =
        BTreeMap::from([("gpu".to_owned(), GenericOffer::Named(ids)), ("ssd".to_owned(), GenericOffer::Count(4))]);
    let ratio = Overcommit { cpu_percent: 150, memory_percent: 90 };
    let facts = NodeFacts::new(&host, true, ratio);
    assert_eq!(facts.offered, Resources { nano_cpus: 6_000, mem_bytes: 900 });
    assert_eq!(facts.generic, BTreeMap::from([("gpu".to_owned(), 2), ("ssd".to_owned(), 4)]));
    assert_eq!(facts.slots, Some(3));
    host.description.overcommit = Some(Overcommit { cpu_percent: 200, ..Overcommit::default() });
    host.spec.labels = BTreeMap::from([("containerslots".to_owned(), "5".to_owned())]);
    let facts = NodeFacts::new(&host, true, ratio);
    assert_eq!((facts.offered, facts.slots), (Resources { nano_cpus: 8_000, mem_bytes: 1_000 }, Some(5)));
    host.spec.labels = BTreeMap::from([("containerslots".to_owned(), "many".to_owned())]);
    assert_eq!(NodeFacts::new(&host, true, ratio).slots, None);
}

#[test]
fn plugins_come_from_volumes_and_from_the_placement() {
    let mut scheduler = cluster([
        NodeFacts { volume_plugins: vec!["local".into(), "nfs".into()], ..node("a", &[]) },
        NodeFacts { network_plugins: vec!["weave".into()], ..node("b", &[]) },
    ]);
    let volume = |driver: Option<&str>| {
        let mount = Mount {
            kind: MountKind::Volume,
            source: None,
            target: "/data".into(),
            read_only: false,
            tmpfs_size_bytes: None,
            volume_driver: driver.map(str::to_owned),
        };
        compile(&spec(|s| s.container.mounts.push(mount)))
    };
    assert_eq!(names(&scheduler, &volume(Some("nfs"))), ["a"]);
    // Every engine has it, also one that did not say so.
    assert_eq!(names(&scheduler, &volume(Some("local"))), ["a", "b"]);
    assert_eq!(names(&scheduler, &volume(None)), ["a", "b"]);
    let network = compile(&spec(|s| s.placement.network_plugins = vec!["weave".to_owned()]));
    assert_eq!(run(&mut scheduler, &network, 1), ["b"]);
}

fn spread(keys: &[&str], strategy: Strategy) -> Request {
    compile(&spec(|s| {
        s.placement.preferences = keys.iter().map(|key| Preference::Spread((*key).to_owned())).collect();
        s.placement.strategy = Some(strategy);
    }))
}

#[test]
fn preferences_even_out_own_tasks_before_the_load() {
    // Three nodes in zone a, one in zone b, one without a zone, which is a zone of its own.
    let nodes = || {
        let zoned = |name, zone| node(name, &[("zone", zone)]);
        cluster([zoned("a1", "a"), zoned("a2", "a"), zoned("a3", "a"), zoned("b1", "b"), node("x", &[])])
    };
    let by_zone = spread(&["node.labels.zone"], Strategy::Spread);
    let mut scheduler = nodes();
    assert_eq!(run(&mut scheduler, &by_zone, 7), ["a1", "b1", "x", "a2", "b1", "x", "a3"]);
    let batch = nodes().place_batch(&by_zone, 7, 0);
    assert_eq!(batch.runs, [(id("a1"), 1), (id("a2"), 1), (id("a3"), 1), (id("b1"), 2), (id("x"), 2)]);
    // Between zones that stand equal the load decides.
    let mut scheduler = nodes();
    let other = Request::compile(&TaskSpec::default(), None, None, Strategy::Spread).unwrap();
    run(&mut scheduler, &other, 3);
    assert_eq!(run(&mut scheduler, &by_zone, 3), ["b1", "x", "a1"]);
    // Binpack fills a node of the zone whose turn it is.
    assert_eq!(run(&mut nodes(), &spread(&["zone"], Strategy::Binpack), 6), ["a1", "b1", "x", "a1", "b1", "x"]);
}

#[test]
fn preferences_nest() {
    let rack = |name, zone, rack| node(name, &[("zone", zone), ("rack", rack)]);
    let nodes = || cluster([rack("a1", "a", "1"), rack("a2", "a", "2"), rack("a3", "a", "2"), rack("b1", "b", "1")]);
    let nested = spread(&["node.labels.zone", "node.labels.rack"], Strategy::Spread);
    // Rack 1 of zone b is not rack 1 of zone a.
    assert_eq!(run(&mut nodes(), &nested, 6), ["a1", "b1", "a2", "b1", "a3", "b1"]);
    let runs = nodes().place_batch(&nested, 6, 0).runs;
    assert_eq!(runs, [(id("a1"), 1), (id("a2"), 1), (id("a3"), 1), (id("b1"), 3)]);
}

#[test]
fn tasks_on_their_way_out_do_not_hold_their_zone() {
    let zoned = |name, zone| node(name, &[("zone", zone)]);
    let mut scheduler = cluster([zoned("a1", "a"), zoned("a2", "a"), zoned("b1", "b"), zoned("b2", "b")]);
    let by_zone = spread(&["zone"], Strategy::Spread);
    assert_eq!(run(&mut scheduler, &by_zone, 4), ["a1", "b1", "a2", "b2"]);
    scheduler.apply_node(NodeFacts { ready: false, ..zoned("b2", "b") });
    assert_eq!(scheduler.place(&by_zone, 0), Ok(id("b1")), "its replacement stays in zone b");
    scheduler.apply_node(NodeFacts { availability: Availability::Drain, ..zoned("b2", "b") });
    assert_eq!(scheduler.place(&by_zone, 0), Ok(id("b1")));
    scheduler.apply_node(NodeFacts { availability: Availability::Pause, ..zoned("b2", "b") });
    assert_eq!(scheduler.place(&by_zone, 0), Ok(id("a1")), "a paused node keeps what it has");
}

#[test]
fn bad_preferences_whitelists_and_platforms_show_their_position() {
    let check = |spec: TaskSpec, expected: &str| {
        let err = Request::compile(&spec, None, None, Strategy::Spread).unwrap_err();
        assert_eq!(format!("{err}; {}", err.hint()), expected);
    };
    let preferences = |keys: &[&str]| {
        spec(|s| s.placement.preferences = keys.iter().map(|k| Preference::Spread((*k).into())).collect())
    };
    check(
        preferences(&["zone", "node.labels."]),
        "failed to parse preference `node.labels.` at column 1: expected the key of a label after `node.labels.`; \
         write for example `node.labels.zone`",
    );
    check(
        preferences(&["a", "b", "c", "d", "e"]),
        "failed to parse preference `e` at column 1: expected no more than 4 preferences; \
         write for example `node.labels.zone`",
    );
    check(
        spec(|s| s.placement.whitelists = vec!["node==a,b".into()]),
        "failed to parse whitelist `node==a,b` at column 8: expected the name or id of a node, and `|` before the \
         next; write for example `whitelist:node==dc1-a|dc1-b`",
    );
    check(
        spec(|s| s.container.platform = Some("linux//v8".into())),
        "failed to parse platform `linux//v8` at column 7: expected `os/architecture` with at most a variant after it; \
         write for example `linux/arm64`",
    );
}

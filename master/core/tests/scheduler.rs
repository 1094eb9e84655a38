//! The scheduler's rules as tables of small cases.

use std::collections::{BTreeMap, BTreeSet};

use master_core::scheduler::{
    ConstraintError, EXPRESSIONS_MAX, FilterKind, NodeFacts, Pin, Placed, Request, Scheduler, batch_seed,
    expressions_from_env, expressions_from_labels, is_expression_variable,
};
use skein_api::{Availability, NodeId, PortPublish, Protocol, Resources, ServiceId, Strategy, TaskId, TaskSpec};

const GIB: u64 = 1 << 30;
const CPU: u64 = 1_000_000_000;

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A ready node of 4 CPUs and 8 GiB; its id is `id-<name>`.
fn node(name: &str, labels: &[(&str, &str)]) -> NodeFacts {
    NodeFacts {
        id: id(name),
        name: name.to_owned(),
        labels: map(labels),
        os: "linux".to_owned(),
        arch: "x86_64".to_owned(),
        ready: true,
        offered: Resources { nano_cpus: 4 * CPU, mem_bytes: 8 * GIB },
        ..NodeFacts::default()
    }
}

fn id(name: &str) -> NodeId {
    NodeId::new(format!("id-{name}"))
}

fn cluster(nodes: impl IntoIterator<Item = NodeFacts>) -> Scheduler {
    let mut scheduler = Scheduler::new();
    nodes.into_iter().for_each(|facts| scheduler.apply_node(facts));
    scheduler
}

fn spec(constraints: &[&str]) -> TaskSpec {
    let mut spec = TaskSpec::default();
    spec.placement.constraints = constraints.iter().map(|text| (*text).to_owned()).collect();
    spec
}

fn compile(spec: &TaskSpec) -> Request {
    Request::compile(spec, Some(ServiceId::new("s")), None, Strategy::Spread).unwrap_or_else(|err| panic!("{err}"))
}

fn reserving(nano_cpus: u64, mem_bytes: u64) -> TaskSpec {
    let mut spec = TaskSpec::default();
    spec.resources.reservations = Resources { nano_cpus, mem_bytes };
    spec
}

/// Places one task and applies it; the name of its node.
fn run(scheduler: &mut Scheduler, request: &Request, task: &str) -> String {
    let node = scheduler.place(request, 0).unwrap_or_else(|rejection| panic!("{rejection}"));
    scheduler.apply_task(request.placed(TaskId::new(task), task.to_owned(), node.clone()));
    scheduler.node(&node).expect("a node of the cluster").name.clone()
}

fn names(scheduler: &Scheduler, request: &Request) -> Vec<String> {
    let fitting = scheduler.fitting(request);
    fitting.iter().map(|id| scheduler.node(id).expect("a node of the cluster").name.clone()).collect()
}

#[test]
fn constraints_select_nodes() {
    let scheduler = cluster([
        NodeFacts { storage_driver: "overlay2".into(), kernel: "6.1.0".into(), ..node("n1", &[("disk", "ssd")]) },
        NodeFacts { engine_labels: map(&[("disk", "ssd"), ("gpu", "a100")]), ..node("n2", &[("disk", "hdd")]) },
        NodeFacts {
            engine_labels: map(&[("disk", "ssd")]),
            arch: "aarch64".into(),
            hostname: "three.example".into(),
            site: "dc2".into(),
            ..node("n3", &[("storagedriver", "zfs")])
        },
    ]);
    let check = |expression: &str, expected: &[&str]| {
        assert_eq!(names(&scheduler, &compile(&spec(&[expression]))), expected, "{expression}");
    };
    check("node==n1", &["n1"]);
    check("node==id-n1", &["n1"]);
    check("node!=n1", &["n2", "n3"]);
    check("node.name==n*", &["n1", "n2", "n3"]);
    check("node.id==id-n2", &["n2"]);
    check("node.hostname==three.*", &["n3"]);
    check("node.site==dc2", &["n3"]);
    check("site!=dc2", &["n1", "n2"]);
    check("node.labels.disk==ssd", &["n1"]);
    check("engine.labels.disk==ssd", &["n2", "n3"]);
    // A bare key: the node's label hides the engine's, which hides the standard name.
    check("disk==ssd", &["n1", "n3"]);
    check("disk!=ssd", &["n2"]);
    check("storagedriver==overlay2", &["n1"]);
    check("storagedriver==zfs", &["n3"]);
    check("kernelversion==/^6\\./", &["n1"]);
    // What is absent matches no `==`, not even `*`, and every `!=`.
    check("gpu==*", &["n2"]);
    check("gpu!=a100", &["n1", "n3"]);
    check("node.platform.arch==amd64", &["n1", "n2"]);
    check("node.platform.arch!=arm64", &["n1", "n2"]);
    check("node.role==worker", &["n1", "n2", "n3"]);
    check("node.role==manager", &[]);
    check("constraint:disk==/(?i)SSD/", &["n1", "n3"]);
}

#[test]
fn soft_expressions_are_given_up_one_by_one() {
    let mut scheduler =
        cluster([node("n1", &[("zone", "a")]), node("n2", &[("zone", "b"), ("disk", "ssd")]), node("n3", &[])]);
    let place = |scheduler: &mut Scheduler, constraints: &[&str]| {
        let node = scheduler.place(&compile(&spec(constraints)), 0).unwrap();
        scheduler.node(&node).unwrap().name.clone()
    };
    assert_eq!(place(&mut scheduler, &["zone==~b"]), "n2");
    assert_eq!(place(&mut scheduler, &["zone==~nowhere", "disk==~ssd"]), "n2");
    assert_eq!(place(&mut scheduler, &["zone==~a", "disk==~ssd"]), "n1");
    assert_eq!(place(&mut scheduler, &["zone!=~a", "disk!=~ssd"]), "n3");
    scheduler.apply_node(NodeFacts { ready: false, ..node("n2", &[("zone", "b")]) });
    assert_eq!(place(&mut scheduler, &["zone==~b"]), "n1");
    let findings = scheduler.explain(&compile(&spec(&["zone==~b", "zone==~a"])));
    let lines: Vec<_> = findings.filters.iter().map(|t| (t.filter.as_str(), t.rejected, t.rejected_alone)).collect();
    assert_eq!(
        lines,
        [
            ("node is ready", 1, 1),
            ("node is active", 0, 0),
            ("constraint zone==~b (given up: no node would be left)", 0, 2),
            ("constraint zone==~a (met by 1 of 2)", 0, 2),
        ]
    );
}

#[test]
fn affinities_look_at_the_tasks_of_a_node() {
    let mut scheduler = cluster([node("n1", &[]), node("n2", &[]), node("n3", &[])]);
    scheduler.apply_task(Placed {
        task: TaskId::new("t1"),
        node: id("n2"),
        name: "db".into(),
        image: "host:5000/postgres:16".into(),
        labels: map(&[("tier", "data")]),
        ..Placed::default()
    });
    let check = |expression: &str, expected: &[&str]| {
        let mut spec = TaskSpec::default();
        spec.placement.affinities = vec![expression.to_owned()];
        assert_eq!(names(&scheduler, &compile(&spec)), expected, "{expression}");
    };
    check("container==db", &["n2"]);
    check("affinity:container==t1", &["n2"]);
    check("container!=d*", &["n1", "n3"]);
    check("image==*/postgres", &["n2"]);
    check("image==host:5000/postgres:16", &["n2"]);
    check("tier==data", &["n2"]);
    check("tier!=data", &["n1", "n3"]);
    check("container==nothing", &[]);
}

#[test]
fn an_anti_affinity_to_itself_spreads_a_batch() {
    let mut scheduler = cluster([node("n1", &[]), node("n2", &[])]);
    let mut spec = TaskSpec::default();
    spec.container.image = "redis:7".into();
    spec.placement.affinities = vec!["image!=redis".into()];
    let batch = scheduler.place_batch(&compile(&spec), 3, 0);
    assert_eq!(batch.runs, [(id("n1"), 1), (id("n2"), 1)]);
    assert_eq!(batch.rejection.unwrap().summary(), "no node fits: 2 nodes; affinity image!=redis took 2");
}

#[test]
fn resources_are_counted_by_reservation() {
    let mut scheduler = cluster([node("n1", &[])]);
    let request = compile(&reserving(CPU, 3 * GIB));
    run(&mut scheduler, &request, "t1");
    run(&mut scheduler, &request, "t2");
    let rejection = scheduler.place(&request, 0).unwrap_err();
    assert_eq!(rejection.summary(), "no node fits: 1 node; memory reservation 3 GiB took 1");
    scheduler.place(&compile(&reserving(2 * CPU, 2 * GIB)), 0).expect("exactly what is left");
    let rejection = scheduler.place(&compile(&reserving(2 * CPU + 1, 0)), 0).unwrap_err();
    assert_eq!(rejection.summary(), "no node fits: 1 node; cpu reservation 2.000000001 took 1");
    scheduler.remove_task(&TaskId::new("t1"));
    scheduler.place(&request, 0).expect("t1 gave back what it had");
    // Sums beyond u64 are no trouble: the second of these is refused, not wrapped around.
    scheduler
        .apply_node(NodeFacts { offered: Resources { nano_cpus: u64::MAX, mem_bytes: u64::MAX }, ..node("n1", &[]) });
    let all = compile(&reserving(u64::MAX, 0));
    scheduler.remove_task(&TaskId::new("t2"));
    run(&mut scheduler, &all, "t3");
    scheduler.place(&all, 0).expect_err("nothing is left");
    let forced = all.placed(TaskId::new("t4"), String::new(), id("n1"));
    scheduler.apply_task(forced);
    assert_eq!(scheduler.check(), Vec::<String>::new());
}

#[test]
fn host_ports_conflict_by_protocol_port_and_address() {
    let port = |host_port, ip: &str, udp: bool| PortPublish {
        protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
        container_port: 80,
        host_port,
        host_ip: (!ip.is_empty()).then(|| ip.parse().unwrap()),
    };
    let check = |taken: PortPublish, wanted: PortPublish, fits: bool| {
        let mut scheduler = cluster([node("n1", &[])]);
        let request = |port| compile(&TaskSpec { ports: vec![port], ..TaskSpec::default() });
        run(&mut scheduler, &request(taken), "t1");
        assert_eq!(scheduler.place(&request(wanted), 0).is_ok(), fits, "{taken:?} {wanted:?}");
    };
    check(port(80, "", false), port(80, "", false), false);
    check(port(80, "", false), port(81, "", false), true);
    check(port(80, "", false), port(80, "", true), true);
    check(port(80, "0.0.0.0", false), port(80, "10.0.0.1", false), false);
    check(port(80, "10.0.0.1", false), port(80, "10.0.0.2", false), true);
    check(port(80, "10.0.0.1", false), port(80, "fd00::1", false), true);
    check(port(80, "", false), port(80, "fd00::1", false), false);
    check(port(0, "", false), port(0, "", false), true);

    let mut scheduler = cluster([node("n1", &[])]);
    let web = compile(&TaskSpec { ports: vec![port(443, "10.0.0.1", false)], ..TaskSpec::default() });
    run(&mut scheduler, &web, "t1");
    assert_eq!(
        scheduler.place(&web, 0).unwrap_err().summary(),
        "no node fits: 1 node; host port 10.0.0.1:443/tcp took 1"
    );
}

#[test]
fn max_replicas_pins_and_platform() {
    let mut scheduler = cluster([node("n1", &[]), NodeFacts { arch: "aarch64".into(), ..node("n2", &[]) }]);
    let mut limited = TaskSpec::default();
    limited.placement.max_replicas_per_node = 1;
    let request = compile(&limited);
    assert_eq!(run(&mut scheduler, &request, "t1"), "n1");
    assert_eq!(run(&mut scheduler, &request, "t2"), "n2");
    let rejection = scheduler.place(&request, 0).unwrap_err();
    assert_eq!(rejection.summary(), "no node fits: 2 nodes; max replicas per node 1 took 2");

    let free = compile(&TaskSpec::default());
    let pin = |names: &[&str], reason: &str| Pin {
        nodes: names.iter().map(|name| id(name)).collect::<BTreeSet<_>>(),
        reason: reason.to_owned(),
    };
    let volume = pin(&["n2", "gone"], "volume data lives on n2");
    assert_eq!(names(&scheduler, &free.clone().pinned(volume.clone())), ["n2"]);
    let both = free.clone().pinned(volume).pinned(pin(&["n1"], "volumes_from web runs on n1"));
    assert_eq!(
        scheduler.place(&both, 0).unwrap_err().summary(),
        "no node fits: 2 nodes; 1 ruled out because volume data lives on n2; \
         1 ruled out because volumes_from web runs on n1"
    );
    assert!(!scheduler.constraints_can_be_met(&both));
    let mut arm = TaskSpec::default();
    arm.container.platform = Some("linux/arm64/v8".to_owned());
    assert_eq!(names(&scheduler, &compile(&arm)), ["n2"]);
    assert_eq!(names(&scheduler, &free), ["n1", "n2"]);
}

#[test]
fn what_a_node_is_outlasts_its_state() {
    let mut scheduler = cluster([
        NodeFacts { ready: false, ..node("n1", &[("zone", "a")]) },
        NodeFacts { availability: Availability::Drain, ..node("n2", &[("zone", "a")]) },
        node("n3", &[("zone", "b")]),
    ]);
    let request = compile(&spec(&["zone==a"]));
    assert_eq!(scheduler.allowed(&request), [id("n1"), id("n2")]);
    assert!(scheduler.constraints_can_be_met(&request));
    let rejection = scheduler.place(&request, 0).unwrap_err();
    assert_eq!(
        rejection.summary(),
        "no node fits: 3 nodes; 1 not ready; 1 paused or drained; constraint zone==a took 1"
    );
    let alone: Vec<_> = rejection.filters.iter().map(|tally| (tally.kind, tally.rejected_alone)).collect();
    let expected = [(FilterKind::Health, 1), (FilterKind::Availability, 1), (FilterKind::Constraint, 1)];
    assert_eq!(alone, expected);
    let explanation = rejection.into_explanation("web");
    assert_eq!((explanation.subject.as_str(), explanation.nodes, explanation.fitting), ("web", 3, 0));
    assert_eq!(explanation.filters[2].filter, "constraint zone==a");
    scheduler.apply_node(node("n1", &[("zone", "a")]));
    assert_eq!(scheduler.explain(&request).summary, "1 of 3 nodes fit; the next task goes to n1 (spread)");
    assert_eq!(Scheduler::new().place(&request, 0).unwrap_err().summary(), "no node fits: the cluster has no nodes");
}

#[test]
fn spread_takes_the_fewest_own_replicas_then_the_emptiest() {
    let mut scheduler = cluster([node("n1", &[]), node("n2", &[]), node("n3", &[])]);
    let other = Request::compile(&reserving(CPU, GIB), None, None, Strategy::Spread).unwrap();
    assert_eq!(run(&mut scheduler, &other, "o1"), "n1");
    assert_eq!(run(&mut scheduler, &other, "o2"), "n2");
    let web = compile(&TaskSpec::default());
    assert_eq!(run(&mut scheduler, &web, "w1"), "n3");
    // n3 has as many tasks as the others, but already one of web's.
    assert_eq!(run(&mut scheduler, &web, "w2"), "n1");
    assert_eq!(run(&mut scheduler, &web, "w3"), "n2");
}

#[test]
fn rankings_look_at_what_is_scarce() {
    let small = NodeFacts { offered: Resources { nano_cpus: CPU, mem_bytes: GIB }, ..node("small", &[]) };
    let mut scheduler = cluster([small, node("big", &[])]);
    let mut place = |spec: &TaskSpec, strategy| {
        let request = Request::compile(spec, None, None, strategy).unwrap();
        let node = scheduler.place(&request, 0).unwrap();
        scheduler.node(&node).unwrap().name.clone()
    };
    // Both are empty, so the lower position; half a CPU is half of the one and an eighth of the other.
    assert_eq!(place(&reserving(CPU / 2, 0), Strategy::Spread), "small");
    assert_eq!(place(&reserving(CPU / 2, 0), Strategy::Binpack), "small");
    // What reserves nothing takes a place only: equal, so the lower position.
    assert_eq!(place(&TaskSpec::default(), Strategy::Spread), "small");

    // What is least used gets as used as it can: one eighth of n1's CPU, one quarter of n2's memory. So n1 keeps its CPU
    // for those that need little memory.
    let mut scheduler = cluster([node("n1", &[]), node("n2", &[])]);
    let task = |id_: &str, node, nano_cpus, mem_bytes| Placed {
        task: TaskId::new(id_),
        node: id(node),
        reservations: Resources { nano_cpus, mem_bytes },
        ..Placed::default()
    };
    scheduler.apply_task(task("t1", "n1", 0, 6 * GIB));
    scheduler.apply_task(task("t2", "n2", 2 * CPU, GIB));
    let mut chosen =
        |spec: &TaskSpec| scheduler.place(&Request::compile(spec, None, None, Strategy::Binpack).unwrap(), 0).unwrap();
    assert_eq!(chosen(&reserving(CPU / 2, GIB)), id("n2"));
    // What it does not ask for does not matter to it.
    assert_eq!(chosen(&reserving(0, GIB)), id("n1"));
    assert_eq!(chosen(&reserving(CPU / 2, 0)), id("n2"));
    let request = Request::compile(&reserving(CPU / 2, GIB), None, None, Strategy::Binpack).unwrap();
    assert_eq!(scheduler.place_batch(&request, 5, 0).runs, [(id("n1"), 1), (id("n2"), 4)]);
}

#[test]
fn random_is_a_function_of_its_seed_and_reaches_every_node() {
    let mut scheduler = cluster((0..70).map(|i| node(&format!("n{i}"), &[])));
    let request = Request::compile(&TaskSpec::default(), None, None, Strategy::Random).unwrap();
    let mut place = |seed| scheduler.place(&request, seed).unwrap();
    assert_eq!(place(42), place(42));
    let reached: BTreeSet<NodeId> = (0..2_000).map(&mut place).collect();
    assert_eq!(reached.len(), 70);
    let expected = place(batch_seed(7, 0));
    assert_eq!(scheduler.place_batch(&request, 1, 7).runs, [(expected, 1)]);
}

#[test]
fn a_batch_fills_by_water_level_and_explains_the_rest() {
    let small = NodeFacts { offered: Resources { nano_cpus: CPU, mem_bytes: GIB }, ..node("small", &[]) };
    let mut scheduler = cluster([small, node("big", &[])]);
    let batch = scheduler.place_batch(&compile(&reserving(CPU, 0)), 9, 0);
    assert_eq!((batch.placed, batch.runs), (5, vec![(id("small"), 1), (id("big"), 4)]));
    assert_eq!(batch.rejection.unwrap().summary(), "no node fits: 2 nodes; cpu reservation 1 took 2");
    // Without a service there are no own replicas to keep even: half of the small one is set aside with one, and with
    // two still less of the big one.
    let loose = Request::compile(&reserving(CPU / 2, 0), None, None, Strategy::Spread).unwrap();
    assert_eq!(scheduler.place_batch(&loose, 3, 0).runs, [(id("small"), 1), (id("big"), 2)]);
    let none = scheduler.place_batch(&compile(&TaskSpec::default()), 0, 0);
    assert_eq!((none.placed, none.runs.len(), none.rejection), (0, 0, None));
}

#[test]
fn facts_come_in_any_order_and_more_than_once() {
    let request = compile(&reserving(3 * CPU, 0));
    let mut scheduler = Scheduler::new();
    let task = request.placed(TaskId::new("t1"), "t1".into(), id("n1"));
    scheduler.apply_task(task.clone());
    scheduler.apply_node(node("n1", &[]));
    scheduler.apply_task(task.clone());
    scheduler.place(&request, 0).expect_err("the task came before its node and counts");
    scheduler.remove_node(&id("n1"));
    scheduler.remove_node(&id("n1"));
    scheduler.apply_node(node("n2", &[]));
    assert_eq!(scheduler.position(&id("n2")).unwrap().index(), 0, "the freed position is used again");
    scheduler.place(&request, 0).expect("the newcomer does not inherit the load of who was there before");
    scheduler.apply_node(node("n1", &[]));
    assert_eq!(scheduler.fitting(&request), [id("n2")], "the task counts again when its node returns");
    // A task that moved counts on its new node only.
    scheduler.apply_task(Placed { node: id("n2"), ..task });
    assert_eq!(scheduler.fitting(&request), [id("n1")]);
    scheduler.remove_task(&TaskId::new("t1"));
    scheduler.remove_task(&TaskId::new("t1"));
    assert_eq!(scheduler.fitting(&request).len(), 2);
    assert_eq!(scheduler.check(), Vec::<String>::new());
}

#[test]
fn expressions_come_from_environment_and_labels_too() {
    let env: BTreeMap<String, Option<String>> = [
        ("PATH", Some("/bin")),
        // `-e constraint:disk==ssd`, split at the first `=` as every environment is.
        ("constraint:disk", Some("=ssd")),
        ("constraint:zone!", Some("a")),
        ("constraint:node==", Some("~n1")),
        ("affinity:image!", Some("~redis")),
        ("constraint:broken", None),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.map(str::to_owned)))
    .collect();
    let found = expressions_from_env(&env);
    assert_eq!(
        found.constraints,
        ["constraint:broken", "constraint:disk==ssd", "constraint:node===~n1", "constraint:zone!=a"]
    );
    assert_eq!(found.affinities, ["affinity:image!=~redis"]);
    assert!(is_expression_variable("constraint:disk") && !is_expression_variable("PATH"));

    let labels = map(&[("com.docker.swarm.constraints", r#"["disk==ssd"]"#), ("other", "x")]);
    assert_eq!(expressions_from_labels(&labels).unwrap().constraints, ["disk==ssd"]);
    let err = expressions_from_labels(&map(&[("com.docker.swarm.affinities", "disk==ssd")])).unwrap_err();
    assert_eq!((err.kind, err.column), ("affinity", 1));

    // All sources count, and the same one twice counts once.
    let mut spec = spec(&["node.labels.disk==ssd", "disk==ssd"]);
    spec.container.env.insert("constraint:disk".into(), Some("=ssd".into()));
    spec.container.env.insert("constraint:zone".into(), Some("=a".into()));
    spec.container.labels = labels;
    let rejection = Scheduler::new().place(&compile(&spec), 0).unwrap_err();
    let filters: Vec<_> = rejection.filters[2..].iter().map(|tally| tally.filter.as_str()).collect();
    assert_eq!(filters, ["constraint node.labels.disk==ssd", "constraint disk==ssd", "constraint zone==a"]);
}

#[test]
fn bad_expressions_fail_to_compile_with_their_position() {
    let compile = |spec: &TaskSpec| Request::compile(spec, None, None, Strategy::Spread);
    let err: ConstraintError = compile(&spec(&["disk==ssd", "zone=a"])).unwrap_err();
    assert_eq!((err.expression.as_str(), err.column), ("zone=a", 5));
    assert_eq!(err.caret(), "zone=a\n    ^");
    let mut from_env = TaskSpec::default();
    from_env.container.env.insert("constraint:disk".into(), Some("ssd".into()));
    let err = compile(&from_env).unwrap_err();
    assert_eq!((err.expression.as_str(), err.column), ("constraint:disk=ssd", 16));
    let many: Vec<String> = (0..=EXPRESSIONS_MAX).map(|i| format!("k{i}==~v")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    compile(&spec(&many[..EXPRESSIONS_MAX])).expect("as many as are allowed");
    let err = compile(&spec(&many)).unwrap_err();
    assert_eq!(err.expression, format!("k{EXPRESSIONS_MAX}==~v"));
    assert!(err.expected.contains("64"), "{err}");
}

//! Where tasks go: what only shows in a cluster that lives, with volumes, services and things that are given out.

use std::collections::{BTreeMap, BTreeSet};

use master_core::Command;
use skein_api::{
    Assignment, Availability, DependencyCondition, GenericOffer, Namespaces, NodeDescription, NodeUpdate, Overcommit,
    Preference, RestartCondition, StackApply, Task, TaskAssignment,
};

use crate::harness::{Cluster, With, constraint, container, needs, replicas, restart, service, stack, volume};

fn describe(c: &mut Cluster, node: &str, change: impl FnOnce(&mut NodeDescription)) {
    let description = Box::new(Cluster::description(node).with(change));
    c.ok(Command::Describe { node: c.node(node), description });
    c.rest();
}

fn assigned(c: &Cluster, task: &Task) -> TaskAssignment {
    let docs = &c.agents[task.node.as_ref().expect("it is placed")].docs;
    let Assignment::Task(document) = &docs[&format!("task/{}", task.id)] else { panic!("a task") };
    (**document).clone()
}

#[test]
fn a_service_is_spread_over_zones_and_stays_so() {
    let mut c = Cluster::with_nodes(5);
    for (node, zone) in [("n1", "a"), ("n2", "a"), ("n3", "a"), ("n4", "b")] {
        c.label(node, "zone", zone);
    }
    let web = |n| {
        service("web").with(|s| {
            replicas(s, n);
            s.task.placement.preferences = vec![Preference::Spread("node.labels.zone".into())];
        })
    };
    c.up(vec![web(6)]);
    // Two in each zone, and the node without a zone is one of its own.
    assert_eq!(c.nodes_of("web"), ["n1", "n2", "n4", "n4", "n5", "n5"]);
    c.lose("n4");
    c.rest();
    assert_eq!(c.nodes_of("web"), ["n1", "n2", "n3", "n5", "n5", "n5"]);
    c.drain("n5", Availability::Drain);
    c.rest();
    assert_eq!(c.nodes_of("web"), ["n1", "n1", "n2", "n2", "n3", "n3"]);
}

#[test]
fn affinities_follow_volumes_and_services_as_they_come() {
    let mut c = Cluster::with_nodes(3);
    let near = service("near").with(|s| s.task.placement.affinities.push("volume==s_data".into()));
    let apart = service("apart").with(|s| {
        s.task.placement.affinities.push("service!=s_apart".into());
        replicas(s, 4);
    });
    c.up(vec![near.clone(), apart.clone()]);
    assert_eq!(c.show("near"), ["near.1 pending no node fits: 3 nodes; affinity volume==s_data took 3"]);
    assert_eq!(c.nodes_of("apart"), ["n1", "n2", "n3"]);
    let db = service("db").with(|s| {
        volume(s, "s_data");
        constraint(s, "node==n2");
    });
    c.up(vec![near.clone(), apart.clone(), db.clone()]);
    assert_eq!(c.nodes_of("near"), ["n2"]);
    // What the service was called is known as long as its tasks are there.
    let far = service("far").with(|s| s.task.placement.affinities.push("service!=/^s_(apart|db)$/".into()));
    c.join("n4");
    c.rest();
    assert_eq!(c.nodes_of("apart"), ["n1", "n2", "n3", "n4"]);
    c.up(vec![near, apart, db, far]);
    assert_eq!(c.show("far"), ["far.1 pending no node fits: 4 nodes; affinity service!=/^s_(apart|db)$/ took 4"]);
    c.restart_master();
    c.rest();
    assert_eq!(c.nodes_of("apart"), ["n1", "n2", "n3", "n4"]);
    assert_eq!(c.nodes_of("near"), ["n2"]);
}

#[test]
fn namespaces_are_shared_on_one_host() {
    let mut c = Cluster::with_nodes(3);
    let side = |name: &str| {
        service(name).with(|s| {
            s.task.container.share = Namespaces { network: Some("s_db".into()), ..Namespaces::default() };
        })
    };
    let watch = service("watch").with(|s| s.task.container.share.pid = Some("s_db".into()));
    c.apply(stack(vec![side("side"), watch, service("db").with(|s| constraint(s, "node==n3"))]));
    c.rest();
    assert_eq!((c.nodes_of("side"), c.nodes_of("watch")), (vec!["n3".into()], vec!["n3".into()]));
    let db = |c: &Cluster| c.live("db")[0].id.clone();
    let share = |c: &Cluster, name: &str| assigned(c, &c.task(name)).share;
    assert_eq!(share(&c, "s_side.1"), Namespaces { network: Some(db(&c)), ..Namespaces::default() });
    // The agent is told of the next one too.
    c.end("s_db.1", 1);
    c.pass(1_000);
    assert_eq!(share(&c, "s_watch.1"), Namespaces { pid: Some(db(&c)), ..Namespaces::default() });

    let up = |services| Command::StackApply(Box::new(StackApply { stack: stack(services), ..StackApply::default() }));
    let error =
        c.refused(up(vec![side("lonely").with(|s| s.task.container.share.network = Some("s_no".into()))]), "not_found");
    assert_eq!(error.message, "s_lonely names s_no (network_mode), which is not there");
    let ports = side("a").with(|s| s.task.ports.push(crate::harness::port(80)));
    c.refused(up(vec![ports, service("db")]), "bad_request");
    let named = side("a").with(|s| s.task.container.hostname = Some("a".into()));
    let error = c.refused(up(vec![named, service("db")]), "bad_request");
    assert_eq!(
        error.message,
        "s_a shares the network of another one and can have no networks, ports, host name and extra hosts of its own"
    );
    let circle = service("db").with(|s| s.task.container.share.ipc = Some("s_side".into()));
    assert!(c.refused(up(vec![side("side"), circle]), "bad_request").message.contains("circle"));
}

#[test]
fn generic_resources_are_given_out_by_id() {
    let mut c = Cluster::with_nodes(2);
    let ids = |ids: &[&str]| GenericOffer::Named(ids.iter().map(|id| (*id).to_owned()).collect::<BTreeSet<_>>());
    describe(&mut c, "n1", |d| {
        d.generic = BTreeMap::from([("gpu".into(), ids(&["g0", "g1", "g2"])), ("seat".into(), GenericOffer::Count(2))]);
    });
    let wants = |kind: &str, count| (kind.to_owned(), count);
    let train = |n| {
        service("train").with(|s| {
            replicas(s, n);
            s.task.resources.generic = BTreeMap::from([wants("gpu", 1), wants("seat", 1)]);
        })
    };
    c.up(vec![train(3)]);
    assert_eq!(
        c.show("train")[2],
        "train.3 pending no node fits: 2 nodes; generic resource gpu 1 took 1; generic resource seat 1 took 1"
    );
    let given = |c: &Cluster| -> Vec<String> {
        let tasks = c.live("train");
        let placed = tasks.iter().filter(|t| t.node.is_some());
        placed.map(|t| assigned(c, t).generic.get("gpu").expect("a kind with ids").join(",")).collect()
    };
    assert_eq!(given(&c), ["g0", "g1"]);
    assert!(!c.live("train")[0].generic.contains_key("seat"), "one seat is like the other");
    // Who ends gives back, and a master that starts anew knows who has what.
    c.restart_master();
    c.end("s_train.1", 1);
    c.pass(1_000);
    assert_eq!(given(&c).into_iter().collect::<BTreeSet<_>>(), BTreeSet::from(["g0".into(), "g1".into()]));
    c.check();

    // A container keeps its own while it is stopped, as long as nobody else takes it.
    let one = |name: &str| container(name).with(|t| t.spec.resources.generic = BTreeMap::from([wants("gpu", 1)]));
    c.run(one("one"));
    assert_eq!(c.task("one").generic["gpu"], ["g2"]);
    c.ok(Command::ContainerStop("one".into()));
    c.rest();
    c.ok(Command::ContainerStart("one".into()));
    c.rest();
    c.ok(Command::ContainerStop("one".into()));
    c.rest();
    c.run(one("two"));
    assert_eq!(c.task("two").generic["gpu"], ["g2"]);
    let error = c.refused(Command::ContainerStart("one".into()), "no_node_fits");
    assert_eq!(error.message, "container task one had gpu g2 of node n1, which another task has now");
}

#[test]
fn more_is_set_aside_where_it_may_be() {
    let mut c = Cluster::with_nodes(1);
    let web = |gib: u64| {
        service("web").with(|s| {
            replicas(s, 2);
            s.task.resources.reservations.mem_bytes = gib << 30;
        })
    };
    c.up(vec![web(3)]);
    assert_eq!(c.nodes_of("web"), ["n1"]);
    describe(&mut c, "n1", |d| d.overcommit = Some(Overcommit { memory_percent: 150, ..Overcommit::default() }));
    assert_eq!(c.nodes_of("web"), ["n1", "n1"]);
    let slots =
        |n: &str| NodeUpdate { labels_add: [("containerslots".into(), n.into())].into(), ..NodeUpdate::default() };
    c.ok(Command::NodeUpdate { node: "n1".into(), update: slots("3") });
    let error = c.refused(Command::NodeUpdate { node: "n1".into(), update: slots("many") }, "bad_request");
    assert_eq!(error.message, "label containerslots is a number of tasks, found \"many\"");
    let more = service("more").with(|s| replicas(s, 2));
    c.up(vec![web(3), more]);
    assert_eq!(c.show("more"), ["more.1 running n1", "more.2 pending no node fits: 1 node; container slots took 1"]);
    // Fewer than there are tasks: they stay.
    c.ok(Command::NodeUpdate { node: "n1".into(), update: slots("1") });
    c.rest();
    assert_eq!((c.nodes_of("web"), c.nodes_of("more")), (vec!["n1".into(), "n1".into()], vec!["n1".into()]));
}

#[test]
fn what_can_never_be_is_refused_at_once() {
    let mut c = Cluster::with_nodes(2);
    let up = |services| Command::StackApply(Box::new(StackApply { stack: stack(services), ..StackApply::default() }));
    let both = service("web").with(|s| {
        constraint(s, "node.labels.zone==a");
        constraint(s, "node.labels.zone==b");
    });
    let error = c.refused(up(vec![both]), "contradictory_constraints");
    assert_eq!(
        error.message,
        "s_web: constraint node.labels.zone==a and constraint node.labels.zone==b can never both hold: \
         a node has one value of node.labels.zone"
    );
    let large = |gib: u64| service("web").with(|s| s.task.resources.reservations.mem_bytes = gib << 30);
    let error = c.refused(up(vec![large(5)]), "no_node_fits");
    assert_eq!(error.message, "s_web: 5 GiB of memory is more than the largest host offers: n1 has 4 GiB of memory");
    c.up(vec![large(4)]);
    let gpus = service("gpu").with(|s| s.task.resources.generic = BTreeMap::from([("a b".into(), 1)]));
    assert!(c.refused(up(vec![gpus]), "bad_request").message.contains("\"a b\" is no kind of generic resource"));
    let labels = service("web").with(|s| {
        s.task.container.labels.insert("k".into(), "x".repeat(20_000));
    });
    let error = c.refused(up(vec![labels]), "bad_request");
    assert_eq!(error.message, "s_web: value of label k has 20000 bytes, at most 16384 are possible");
    let wrong = BTreeMap::from([("a b".to_owned(), String::new())]);
    let network = skein_api::NetworkSpec { name: "n".into(), labels: wrong, ..Default::default() };
    assert!(
        c.refused(Command::NetworkCreate(network), "bad_request").message.starts_with("network n: label key \"a b\"")
    );
    let many: BTreeMap<String, String> = (0..257).map(|n| (format!("k{n}"), String::new())).collect();
    let update = NodeUpdate { labels_add: many, ..NodeUpdate::default() };
    let error = c.refused(Command::NodeUpdate { node: "n1".into(), update }, "bad_request");
    assert_eq!(error.message, "257 labels of one node, at most 256 are possible");
    let long = NodeUpdate { labels_add: [("k".into(), "x".repeat(513))].into(), ..NodeUpdate::default() };
    c.refused(Command::NodeUpdate { node: "n1".into(), update: long }, "bad_request");
    // A host is not turned away for what its engine is labelled with.
    describe(&mut c, "n1", |d| {
        d.engine_labels = BTreeMap::from([("a b".into(), "x".into()), ("ok".into(), "y".into())]);
        d.overcommit = Some(Overcommit { cpu_percent: 1, memory_percent: 100 });
    });
    let node = &c.model().nodes[&c.node("n1")].description;
    assert_eq!((node.engine_labels.len(), node.overcommit), (1, None));
}

#[test]
fn what_waits_is_tried_when_a_change_could_help_it_and_only_then() {
    let mut c = Cluster::with_nodes(2);
    let big = service("big").with(|s| {
        s.task.resources.reservations.nano_cpus = 3_000_000_000;
        replicas(s, 3);
    });
    let after = service("after").with(|s| needs(s, "job", DependencyCondition::ServiceCompletedSuccessfully));
    let job = service("job").with(|s| restart(s, RestartCondition::None));
    c.up(vec![big, job, after]);
    assert_eq!(c.nodes_of("big"), ["n1", "n2"]);
    let (mut tried, mut last) = (Vec::new(), c.core.placements_tried());
    let mut count = |c: &Cluster| {
        tried.push(c.core.placements_tried() - last);
        last = c.core.placements_tried();
    };
    for value in ["a", "b", "c", "d"] {
        c.label("n1", "zone", value);
        c.drain("n2", if value < "c" { Availability::Pause } else { Availability::Active });
    }
    count(&c);
    c.join("n3");
    c.rest();
    count(&c);
    assert_eq!(c.nodes_of("big"), ["n1", "n2", "n3"]);
    c.end("s_job.1", 0);
    c.rest();
    count(&c);
    assert_eq!(c.live("after").len(), 1);
    assert_eq!(c.show("after"), ["after.1 running n1"]);
    assert_eq!(tried, [0, 1, 1]);
}

//! Bad input: a clear message, and nothing changed.

use master_core::Command;
use skein_api::{
    Availability, ContainerCreate, DependencyCondition, NetworkAttachment, NodeUpdate, ServiceMode, ServiceSpec,
    StackApply, TokenCreate, TokenId,
};

use crate::harness::{Cluster, With, constraint, container, link, needs, network, replicas, service, stack};

fn up(services: Vec<ServiceSpec>) -> Command {
    Command::StackApply(Box::new(StackApply { stack: stack(services), ..StackApply::default() }))
}

fn check(c: &mut Cluster, services: Vec<ServiceSpec>, code: &str, message: &str) {
    let error = c.refused(up(services), code);
    assert_eq!(error.message, message);
}

#[test]
fn expressions() {
    let mut c = Cluster::new();
    let anywhere = || service("web").with(|s| constraint(s, "node.labels.disk==ssd"));
    c.up(vec![anywhere()]);
    assert_eq!(c.show("web"), ["web.1 pending no node fits: the cluster has no nodes"]);
    c.join("n1");
    c.join("n2");
    c.label("n1", "zone", "a");
    c.lose("n2");
    let strict = |expression: &str| service("new").with(|s| constraint(s, expression));
    let none = "s_new: no node fits: 2 nodes; 1 not ready; constraint node.labels.disk==ssd took 1";
    check(&mut c, vec![strict("node.labels.disk==ssd")], "no_node_fits", none);
    // Also where a container's environment or labels say it.
    let env = service("new").with(|s| {
        s.task.container.env.insert("constraint:disk".into(), Some("=ssd".into()));
    });
    assert!(c.refused(up(vec![env]), "no_node_fits").message.contains("constraint disk==ssd took 1"));
    let labels = service("new").with(|s| {
        s.task.container.labels.insert("com.docker.swarm.constraints".into(), "[\"disk==ssd\"]".into());
    });
    c.refused(up(vec![labels]), "no_node_fits");
    let create = container("one").with(|t| t.spec.placement.constraints.push("node==n9".into()));
    c.refused(Command::ContainerCreate(Box::new(create)), "no_node_fits");
    // A node that is down meets what it is labelled with.
    c.ok(up(vec![strict("node==n2")]));
    let error = c.refused(up(vec![strict("node.labels.disk=ssd")]), "bad_constraint");
    let lines: Vec<&str> = error.message.lines().collect();
    assert!(lines[0].starts_with("s_new: failed to parse constraint `node.labels.disk=ssd` at column 17"), "{lines:?}");
    assert_eq!(lines[1..], ["node.labels.disk=ssd", "                ^"]);
    assert!(error.hint.unwrap().starts_with("write for example"));
}

#[test]
fn more_tasks_than_a_cluster_runs() {
    let mut c = Cluster::with_nodes(1);
    let of = |name: &str, n| service(name).with(|s| replicas(s, n));
    let many = |last| vec![of("a", 65_535), of("b", 65_535), of("c", 65_535), of("d", last)];
    let error = c.refused(up(many(53_396)), "cluster_full");
    assert_eq!(error.message, "that would be 250001 tasks in all; a cluster runs at most 250000");
    let plan = |services| {
        let stack = stack(services);
        Command::StackApply(Box::new(StackApply { stack, dry_run: true, ..StackApply::default() }))
    };
    c.ok(plan(many(53_395)));
    c.ok(Command::ContainerCreate(Box::new(container("one"))));
    c.refused(plan(many(53_395)), "cluster_full");
    c.ok(plan(many(53_394)));
}

#[test]
fn services_that_cannot_be() {
    let mut c = Cluster::with_nodes(1);
    use DependencyCondition::ServiceStarted;
    let named = |name: &str| service(name).with(|s| s.task.container.container_name = Some("box".into()));
    let cases: Vec<(Vec<ServiceSpec>, &str, &str)> = vec![
        (vec![service("a"), service("a")], "bad_request", "service s_a stands twice in the stack"),
        (vec![service("a").with(|s| s.stack = None)], "bad_request", "service s_a names another stack"),
        (vec![service("a").with(|s| s.task.container.image.clear())], "bad_request", "s_a has no image"),
        (vec![service("a").with(|s| replicas(s, 65_536))], "bad_request", "65536 replicas of s_a: at most 65535"),
        (
            vec![service("a").with(|s| needs(s, "b", ServiceStarted))],
            "bad_request",
            "service s_a depends on s_b, which is not there",
        ),
        (vec![service("a").with(|s| link(s, "b"))], "not_found", "s_a names s_b (link), which is not there"),
        (
            vec![
                service("a").with(|s| needs(s, "b", ServiceStarted)),
                service("b").with(|s| link(s, "c")),
                service("c").with(|s| needs(s, "a", ServiceStarted)),
                service("d").with(|s| needs(s, "a", ServiceStarted)),
            ],
            "bad_request",
            "services need each other in a circle: s_a -> s_b -> s_c -> s_a",
        ),
        (
            vec![service("a").with(|s| s.task.ports = vec![crate::harness::port(80); 2])],
            "bad_request",
            "s_a publishes port 80 twice",
        ),
        (
            vec![service("a").with(|s| s.task.ports = (1..=4_097).map(crate::harness::port).collect())],
            "bad_request",
            "s_a publishes 4097 ports, at most 4096 are possible",
        ),
        (vec![service("a").with(|s| network(s, "no"))], "not_found", "external network no is not there"),
        (
            vec![service("a").with(|s| {
                network(s, "s_net");
                network(s, "s_net");
            })],
            "bad_request",
            "s_a names network s_net twice",
        ),
        (vec![named("a"), named("b")], "bad_request", "services s_a and s_b have the same container name box"),
        (
            vec![named("a").with(|s| replicas(s, 2))],
            "bad_request",
            "service s_a has the container name box, so it can have one task only",
        ),
        (
            vec![named("a").with(|s| s.mode = ServiceMode::Global)],
            "bad_request",
            "service s_a has the container name box, so it can have one task only",
        ),
    ];
    for (services, code, message) in cases {
        check(&mut c, services, code, message);
    }
    let mut twice = stack(vec![service("a").with(|s| network(s, "s_net"))]);
    twice.networks.push(twice.networks[0].clone());
    let error =
        c.refused(Command::StackApply(Box::new(StackApply { stack: twice, ..Default::default() })), "bad_request");
    assert_eq!(error.message, "network s_net stands twice in the stack");
}

#[test]
fn names_that_are_taken() {
    let mut c = Cluster::with_nodes(1);
    c.run(container("box"));
    c.up(vec![service("web").with(|s| s.task.container.container_name = Some("site".into()))]);
    for name in ["box", "site", "s_web.1"] {
        c.refused(Command::ContainerCreate(Box::new(container(name))), "name_taken");
    }
    let named = |name: &str| service("b").with(|s| s.task.container.container_name = Some(name.into()));
    let web = || service("web").with(|s| s.task.container.container_name = Some("site".into()));
    for name in ["box", "s_web.1"] {
        c.refused(up(vec![web(), named(name)]), "name_taken");
    }
    let foreign = stack(vec![service("web").with(|s| s.stack = Some("s2".into()))]).with(|s| s.name = "s2".into());
    let error =
        c.refused(Command::StackApply(Box::new(StackApply { stack: foreign, ..Default::default() })), "name_taken");
    assert_eq!(error.message, "service s_web is there already and belongs to stack s");
    c.refused(c.join_command("n1"), "name_taken");
    // Its own tasks do not stand in the way of a service.
    c.up(vec![web().with(|s| s.task.container.image = "nginx".into())]);
    assert_eq!(c.show("web"), ["web.1 running n1"]);
}

#[test]
fn commands_about_what_is_not_there_or_not_so() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![service("web")]);
    let update = |update| Command::NodeUpdate { node: "n1".into(), update };
    let create = |create: ContainerCreate| Command::ContainerCreate(Box::new(create));
    let token = |request| Command::TokenCreate { id: TokenId::new("x"), secret_sha256: "s".into(), request };
    let label = |key: &str| NodeUpdate { labels_add: [(key.into(), "v".into())].into(), ..NodeUpdate::default() };
    let cases = [
        (Command::NodeRemove { node: "n9".into(), force: true }, "not_found"),
        (Command::NodeRemove { node: "n1".into(), force: false }, "node_ready"),
        (update(NodeUpdate { labels_remove: vec!["no".into()], ..NodeUpdate::default() }), "not_found"),
        (update(label("a b")), "bad_name"),
        (token(TokenCreate { ttl_s: 0, ..TokenCreate::default() }), "bad_request"),
        (token(TokenCreate { ttl_s: u64::MAX, ..TokenCreate::default() }), "bad_request"),
        (token(TokenCreate { uses: 0, ..TokenCreate::default() }), "bad_request"),
        (Command::NetworkRemove("no".into()), "not_found"),
        (Command::StackRemove { name: "no".into(), volumes: false, dry_run: false }, "not_found"),
        (Command::ServiceRemove("no".into()), "not_found"),
        (Command::ContainerStop("no".into()), "not_found"),
        (Command::ContainerStop("s_web.1".into()), "service_task"),
        (Command::ContainerRemove { task: "s_web.1".into(), force: true }, "service_task"),
        (create(container("a b")), "bad_name"),
        (create(container("one").with(|t| t.spec.container.image.clear())), "bad_request"),
        (
            create(container("one").with(|t| {
                t.spec.networks = vec![NetworkAttachment { network: "no".into(), ..NetworkAttachment::default() }];
            })),
            "not_found",
        ),
        (
            create(container("one").with(|t| {
                let link = skein_api::Link { target: "no".into(), alias: "no".into() };
                t.spec.container.links = vec![link];
            })),
            "not_found",
        ),
    ];
    for (command, code) in cases {
        c.refused(command, code);
    }
    // The same again is no change, and no error.
    let before = c.model().clone();
    let active = NodeUpdate { availability: Some(Availability::Active), ..NodeUpdate::default() };
    c.ok(update(active));
    c.ok(Command::Describe { node: c.node("n1"), description: Box::new(Cluster::description("n1")) });
    assert_eq!(*c.model(), before);
}

#[test]
fn what_could_not_be_stored_is_taken_back() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("a")]);
    c.rest();
    let before = c.model().clone();
    let services = vec![service("a"), service("b").with(|s| replicas(s, 3)).with(|s| network(s, "s_net"))];
    let command = up(services);
    let ctx = c.context();
    let decide = |c: &mut Cluster| {
        c.core.execute(&command, &ctx).expect("it can be done");
        c.core.settle(c.now, 7);
        assert_ne!(*c.model(), before);
    };
    decide(&mut c);
    c.core.rollback();
    assert_eq!(*c.model(), before);
    assert_eq!(c.core.check(), Vec::<String>::new());
    assert!(c.core.take_staged().is_empty());
    // The second of two commits fails: what the first stored stays.
    decide(&mut c);
    let staged = c.core.take_staged();
    c.core.committed(staged[..1].to_vec(), 99);
    c.core.rollback();
    let stored = staged[0].key();
    let differ = |o: &master_core::model::Object| o.key() != stored;
    let left: Vec<_> = c.model().objects().into_iter().filter(differ).collect();
    assert_eq!(left, before.objects().into_iter().filter(differ).collect::<Vec<_>>());
    assert_ne!(*c.model(), before);
}

#[test]
fn an_object_that_no_store_takes_is_refused() {
    let mut c = Cluster::with_nodes(1);
    let mut large = service("a");
    large.task.container.env.insert("LARGE".into(), Some("x".repeat(300 << 10)));
    let error = c.refused(up(vec![large]), "too_large");
    assert!(error.message.ends_with("would take more than 262144 bytes"), "{error}");
}

//! Nodes: tokens and joining, liveness, drain, loss, return, removal, and restarts of the master.

use master_core::{
    Command, Reply,
    liveness::{DETECTION_MS, RETURN_MS},
};
use skein_api::{Availability, NodeState, RestartCondition, ServiceMode, TaskState, TokenCreate, TokenId, UnixMillis};

use crate::harness::{Cluster, With, container, needs, network, port, replicas, restart, service, volume};

fn token(c: &mut Cluster, id: &str, ttl_s: u64, uses: u32) {
    let request = TokenCreate { ttl_s, uses, node_labels: [("from".to_owned(), id.to_owned())].into() };
    c.ok(Command::TokenCreate { id: TokenId::new(id), secret_sha256: "secret".into(), request });
}

fn join(c: &Cluster, token_id: &str, secret: &str, name: &str) -> Command {
    match c.join_command(name) {
        Command::Join { key_digest, description, clock, .. } => Command::Join {
            token: TokenId::new(token_id),
            secret_sha256: secret.into(),
            key_digest,
            description,
            clock,
        },
        other => other,
    }
}

#[test]
fn tokens_end_by_time_by_use_and_by_revocation() {
    let mut c = Cluster::new();
    token(&mut c, "once", 60, 1);
    token(&mut c, "hour", 3_600, 9);
    c.refused(join(&c, "once", "wrong", "n1"), "token_unknown");
    c.refused(join(&c, "other", "secret", "n1"), "token_unknown");
    let first = join(&c, "once", "secret", "n1");
    let Reply::Node(id) = c.ok(first.clone()) else { panic!("a node") };
    assert_eq!(c.model().nodes[&id].spec.labels["from"], "once");
    // Its answer was lost: the same key asks again and is the same node.
    assert_eq!(c.ok(first), Reply::Node(id));
    assert_eq!(c.model().tokens[&TokenId::new("once")].uses, 1);
    let error = c.refused(join(&c, "once", "secret", "n2"), "token_used_up");
    assert_eq!(error.message, "join token once was for 1 hosts, which have joined");
    c.refused(join(&c, "hour", "secret", "n1"), "name_taken");
    c.pass(3_600_000 / 1_000);
    c.now.wall = c.now.wall.plus_ms(3_600_000);
    let error = c.refused(join(&c, "hour", "secret", "n2"), "token_expired");
    assert!(error.message.starts_with("join token hour expired "), "{error}");
    c.ok(Command::TokenRevoke(TokenId::new("hour")));
    c.refused(join(&c, "hour", "secret", "n2"), "token_unknown");
    c.refused(Command::TokenRevoke(TokenId::new("hour")), "not_found");
}

#[test]
fn useless_tokens_are_forgotten_after_a_week() {
    let mut c = Cluster::new();
    token(&mut c, "once", 365 * 24 * 3_600, 1);
    token(&mut c, "year", 365 * 24 * 3_600, 2);
    c.ok(join(&c, "once", "secret", "n1"));
    let later = |c: &mut Cluster, days: u64| {
        c.now.wall = c.now.wall.plus_ms(days * 24 * 3_600 * 1_000);
        c.now.mono_ms += days * 24 * 3_600 * 1_000;
        c.turn();
        c.model().tokens.keys().map(|t| t.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(later(&mut c, 6), ["once", "t", "year"]);
    assert_eq!(later(&mut c, 3), ["year"], "one was used up, one expired");
}

#[test]
fn a_clock_that_is_ahead_when_the_master_starts_makes_it_forget_nothing() {
    let mut c = Cluster::new();
    token(&mut c, "hour", 3_600, 1);
    let right = c.now.wall;
    c.now.wall = right.plus_ms(365 * 24 * 3_600 * 1_000);
    c.restart_master();
    c.turn();
    // Somebody sets the clock.
    c.now.wall = right;
    c.now.mono_ms += 11 * 60 * 1_000;
    c.turn();
    assert!(c.model().tokens.contains_key(&TokenId::new("hour")));
}

#[test]
fn a_clock_that_is_far_off_is_refused() {
    let mut c = Cluster::new();
    let at = |c: &Cluster, off_ms: i64| match join(c, "t", "s", "n1") {
        Command::Join { token, secret_sha256, key_digest, description, clock } => {
            let clock = UnixMillis(clock.0.saturating_add_signed(off_ms));
            Command::Join { token, secret_sha256, key_digest, description, clock }
        }
        other => other,
    };
    let error = c.refused(at(&c, 301_000), "clock_off");
    assert_eq!(error.message, "the host's clock is 301 s ahead of the master's; at most 300 s are allowed");
    let error = c.refused(at(&c, -7_200_000), "clock_off");
    assert!(error.message.starts_with("the host's clock is 7200 s behind"), "{error}");
    c.ok(at(&c, -299_000));
}

#[test]
fn a_node_is_lost_after_its_detection_period_and_not_before() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| replicas(s, 2))]);
    c.cut("n1");
    c.pass(DETECTION_MS - 1);
    assert_eq!(c.nodes_of("web"), ["n1", "n2"]);
    c.pass(1);
    assert_eq!(c.nodes_of("web"), ["n2", "n2"]);
    let lost = c.model().tasks.values().find(|t| t.status.state == TaskState::Orphaned).unwrap();
    assert_eq!(lost.status.message, "its node was lost");
    let view = c.core.node_view(&c.model().nodes[&c.node("n1")]).status.unwrap();
    assert_eq!((view.state, view.message.as_str()), (NodeState::Down, "no heartbeat for 15 s"));
}

#[test]
fn a_node_that_returns_stops_what_was_replaced() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| {
        replicas(s, 2);
        network(s, "s_net");
    })]);
    c.lose("n1");
    let n1 = c.node("n1");
    let orphan = c.model().tasks.values().find(|t| t.status.state == TaskState::Orphaned).unwrap().id.clone();
    assert_eq!(c.agents[&n1].tasks[&orphan].status.state, TaskState::Running, "its container runs on");
    c.heal("n1");
    c.rest();
    assert!(!c.model().tasks.contains_key(&orphan), "stopped, and nothing of it is remembered");
    assert!(!c.agents[&n1].tasks.contains_key(&orphan));
    assert_eq!(c.nodes_of("web"), ["n2", "n2"], "what runs is not moved back");
}

#[test]
fn a_stack_can_be_removed_while_a_host_is_lost() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| {
        replicas(s, 2);
        network(s, "s_net");
    })]);
    c.run(container("one"));
    let n1 = c.node("n1");
    c.lose("n1");
    c.down(false);
    c.ok(Command::ContainerRemove { task: "one".into(), force: true });
    c.rest();
    assert!(c.model().tasks.is_empty() && c.model().networks.is_empty(), "nobody waits for the lost host");
    assert_ne!(c.agents[&n1].tasks.len(), 0);
    c.heal("n1");
    c.rest();
    assert!(c.agents[&n1].docs.is_empty() && c.agents[&n1].tasks.is_empty(), "which cleans up when it returns");
}

#[test]
fn a_node_that_returns_keeps_its_ports_until_its_orphans_have_stopped() {
    let mut c = Cluster::with_nodes(1);
    c.up(vec![service("web").with(|s| s.task.ports = vec![port(80)])]);
    c.lose("n1");
    assert_eq!(c.show("web"), ["web.1 pending no node fits: 1 node; 1 not ready"]);
    c.heal("n1");
    // The words are looked at anew every few seconds.
    c.now.mono_ms += 5_000;
    c.core.tick(c.now);
    c.turn();
    assert_eq!(c.show("web"), ["web.1 pending no node fits: 1 node; host port 80/tcp took 1"]);
    c.rest();
    assert_eq!(c.show("web"), ["web.1 running n1"]);
}

#[test]
fn a_restarted_master_waits_before_it_calls_a_node_lost() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| replicas(s, 2))]);
    let ids = |c: &Cluster| c.live("web").into_iter().map(|t| (t.id, t.node)).collect::<Vec<_>>();
    let before = ids(&c);
    c.cut("n1");
    c.pass(DETECTION_MS - 1);
    c.restart_master();
    assert_eq!(c.core.node_status(&c.node("n1")).state, NodeState::Unknown);
    c.pass(RETURN_MS - 1);
    assert_eq!(ids(&c), before, "it could not have heard of it yet");
    c.pass(1);
    assert_eq!(c.nodes_of("web"), ["n2", "n2"]);
}

#[test]
fn a_restart_of_the_master_changes_nothing() {
    let mut c = Cluster::with_nodes(3);
    c.up(vec![
        service("web").with(|s| {
            replicas(s, 4);
            network(s, "s_net");
        }),
        service("all").with(|s| s.mode = ServiceMode::Global),
        service("job").with(|s| restart(s, RestartCondition::None)),
    ]);
    c.run(container("one"));
    c.end("s_job.1", 0);
    c.rest();
    let stored = c.store.clone();
    for _ in 0..2 {
        let (a, b) = (c.loaded(), c.loaded());
        assert_eq!(a.check(), [""; 0]);
        assert_eq!(a.model(), b.model());
        c.restart_master();
        assert_eq!(c.turn(), 0);
        c.pass(60_000);
    }
    assert_eq!(c.store, stored);
}

#[test]
fn a_paused_master_gives_nobody_up() {
    let mut c = Cluster::with_nodes(3);
    c.up(vec![service("web").with(|s| replicas(s, 3))]);
    let tasks = |c: &Cluster| c.model().tasks.keys().cloned().collect::<Vec<_>>();
    let before = tasks(&c);
    // Frozen for a minute: the clock is the first that it sees, heartbeats come after.
    c.now.mono_ms += 60_000;
    c.now.wall = c.now.wall.plus_ms(60_000);
    c.core.tick(c.now);
    c.pass(60_000);
    let nodes: Vec<_> = c.model().nodes.keys().cloned().collect();
    assert!(nodes.iter().all(|node| c.core.node_status(node).state == NodeState::Ready));
    assert_eq!(tasks(&c), before, "nothing was replaced");
}

#[test]
fn a_node_that_has_just_joined_is_not_called_lost() {
    let mut c = Cluster::with_nodes(1);
    c.pass(60_000);
    let Reply::Node(id) = c.ok(c.join_command("n2")) else { panic!("a node") };
    c.core.tick(c.now);
    assert_eq!(c.core.node_status(&id).state, NodeState::Unknown, "its detection period begins now");
}

#[test]
fn drain_moves_services_and_pause_only_keeps_new_ones_away() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| replicas(s, 4))]);
    c.run(container("one"));
    let home = c.model().nodes[&c.task("one").node.unwrap()].name.clone();
    let other = if home == "n1" { "n2" } else { "n1" };
    c.drain(&home, Availability::Drain);
    c.rest();
    assert_eq!(c.nodes_of("web"), [other; 4]);
    assert_eq!(c.task("one").status.state, TaskState::Running, "a container task is its owner's to move");
    c.drain(&home, Availability::Active);
    c.drain(other, Availability::Pause);
    c.up(vec![service("web").with(|s| replicas(s, 6))]);
    let nodes = c.nodes_of("web");
    assert_eq!(nodes.iter().filter(|n| **n == other).count(), 4);
    assert_eq!(nodes.iter().filter(|n| **n == home).count(), 2);
}

#[test]
fn removal_frees_everything_and_replaces_services() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![
        service("web").with(|s| {
            replicas(s, 2);
            network(s, "s_net");
        }),
        service("db").with(|s| volume(s, "s_data")),
        service("job").with(|s| restart(s, RestartCondition::None)),
        service("after").with(|s| needs(s, "job", skein_api::DependencyCondition::ServiceCompletedSuccessfully)),
    ]);
    c.end("s_job.1", 0);
    c.rest();
    let id = c.model().volume_named("s_data").unwrap().node.clone();
    let name = c.model().nodes[&id].name.clone();
    c.refused(Command::NodeRemove { node: name.clone(), force: false }, "node_ready");
    c.lose(&name);
    let error = c.refused(Command::NodeRemove { node: name.clone(), force: false }, "in_use");
    assert_eq!(error.message, format!("node {name} has volume s_data, which would be gone with it"));
    c.ok(Command::NodeRemove { node: name.clone(), force: true });
    c.rest();
    let model = c.model();
    assert!(model.tasks.values().all(|t| t.node.as_ref() != Some(&id)));
    assert!(model.blocks.values().all(|b| b.node != id));
    assert!(model.removed_nodes.contains_key(&id));
    assert_eq!((c.live("web").len(), c.live("db").len(), c.live("after").len()), (2, 1, 1));
    assert_eq!(c.live("job").len(), 0, "what was completed is not done again");
    // Late words of it are refused, and its identity is nobody's.
    c.refused(Command::Reports { node: id.clone(), reports: Vec::new() }, "not_found");
    c.core.session_opened(&id, c.now);
    assert!(!c.core.dispatch_open(&id, false, 0));
    assert!(c.core.dispatch_take(&id).is_none());
    assert_eq!(c.core.check(), [""; 0]);
    c.join(&name);
}

#[test]
fn a_host_cannot_take_anothers_address_nor_block_every_subnet() {
    let mut c = Cluster::with_nodes(2);
    let mut liar = Cluster::description("n2");
    liar.underlay4 = Cluster::description("n1").underlay4;
    let describe = |c: &Cluster, d: &skein_api::NodeDescription| Command::Describe {
        node: c.node("n2"),
        description: Box::new(d.clone()),
    };
    let error = c.refused(describe(&c, &liar), "address_taken");
    assert_eq!(error.message, "node n1 is ready and has this host's underlay address");
    let mut greedy = Cluster::description("n2");
    greedy.routes = vec!["0.0.0.0/1".parse().unwrap(), "128.0.0.0/1".parse().unwrap(), "10.0.0.0/24".parse().unwrap()];
    c.ok(describe(&c, &greedy));
    let kept = &c.model().nodes[&c.node("n2")].description.routes;
    assert_eq!(*kept, ["10.0.0.0/24".parse().unwrap()]);
    // A lost host's address is free for the host that was set up in its place.
    c.lose("n1");
    c.ok(describe(&c, &liar));
}

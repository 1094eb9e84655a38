//! Static addresses, and what is done when a network has no block left.

use std::net::Ipv4Addr;

use master_core::{Command, Reply};
use skein_api::{
    Assignment, ContainerCreate, EndpointMode, Freeze, NetworkAttachment, NetworkId, NetworkSpec, ServiceMode,
    ServiceSpec, StackSpec, TaskState,
};

use crate::harness::{Cluster, With, constraint, container, network, network_at, replicas, service, stack};

/// The stack `s` of these services, its network `s_net` with this subnet.
fn in_subnet(subnet: &str, services: Vec<ServiceSpec>) -> StackSpec {
    let mut spec = stack(services);
    spec.networks[0].subnet4 = Some(subnet.parse().unwrap());
    spec
}

fn at(name: &str, address: &str, node: &str) -> ServiceSpec {
    service(name).with(|s| network_at(s, "s_net", address)).with(|s| constraint(s, &format!("node=={node}")))
}

fn on(name: &str, node: &str, n: u32) -> ServiceSpec {
    service(name).with(|s| {
        replicas(s, n);
        network(s, "s_net");
        constraint(s, &format!("node=={node}"));
    })
}

fn apply(c: &mut Cluster, subnet: &str, services: Vec<ServiceSpec>) {
    c.apply(in_subnet(subnet, services));
    c.rest();
}

/// The addresses of a service's running tasks, in order.
fn addresses(c: &Cluster, service: &str) -> Vec<String> {
    let running = c.live(service).into_iter().filter(|t| t.status.state == TaskState::Running);
    let mut addresses: Vec<Ipv4Addr> = running.map(|t| t.status.addresses[0].v4.unwrap()).collect();
    addresses.sort();
    addresses.iter().map(Ipv4Addr::to_string).collect()
}

/// What a node gives out of `s_net`, and what of that is frozen.
fn told(c: &Cluster, node: &str) -> (Vec<String>, Vec<String>) {
    let id = c.model().network("s_net").unwrap().id.clone();
    let doc = c.agents[&c.node(node)].docs.get(&format!("network/{id}"));
    let Some(Assignment::Network(n)) = doc else { return Default::default() };
    let text = |f: &Freeze| f.prefix.to_string();
    (n.blocks.iter().map(|b| b.to_string()).collect(), n.frozen.iter().map(text).collect())
}

/// What a node knows of another's blocks of `s_net`.
fn routes(c: &Cluster, node: &str, peer: &str) -> Vec<String> {
    let id = c.model().network("s_net").unwrap().id.clone();
    match c.agents[&c.node(node)].docs.get(&format!("peer/{id}/{}", c.node(peer))) {
        Some(Assignment::Peer(p)) => p.blocks.iter().map(|b| b.to_string()).collect(),
        _ => Vec::new(),
    }
}

/// Without a virtual address.
fn dnsrr(spec: ServiceSpec) -> ServiceSpec {
    spec.with(|s| s.endpoint_mode = EndpointMode::Dnsrr)
}

const SUBNET: &str = "10.1.0.0/24";

#[test]
fn a_static_address_is_a_route_to_where_its_task_runs() {
    let mut c = Cluster::with_nodes(2);
    // .5 lies in the first block, which nobody has yet; .200 far behind.
    apply(&mut c, SUBNET, vec![at("a", "10.1.0.5", "n1"), at("b", "10.1.0.200", "n2")]);
    apply(&mut c, SUBNET, vec![at("a", "10.1.0.5", "n1"), at("b", "10.1.0.200", "n2"), on("c", "n1", 3)]);
    assert_eq!((addresses(&c, "a"), addresses(&c, "b")), (vec!["10.1.0.5".into()], vec!["10.1.0.200".into()]));
    assert_eq!(addresses(&c, "c"), ["10.1.0.2", "10.1.0.3", "10.1.0.4"]);
    let words = |w: &[&str]| w.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    assert_eq!(told(&c, "n1"), (words(&["10.1.0.0/28", "10.1.0.5/32"]), words(&["10.1.0.5/32"])));
    assert_eq!(told(&c, "n2"), (words(&["10.1.0.200/32"]), words(&["10.1.0.200/32"])));
    assert_eq!(routes(&c, "n1", "n2"), ["10.1.0.200/32"]);
    // It goes with its service, and comes back to another host.
    let moved = vec![at("a", "10.1.0.5", "n2"), at("b", "10.1.0.200", "n2"), on("c", "n1", 3)];
    apply(&mut c, SUBNET, moved.clone());
    assert_eq!(addresses(&c, "a"), ["10.1.0.5"]);
    assert_eq!(routes(&c, "n1", "n2"), ["10.1.0.5/32", "10.1.0.200/32"]);
    assert_eq!(told(&c, "n1"), (words(&["10.1.0.0/28"]), words(&["10.1.0.5/32"])), "carved out of its block");
    c.restart_master();
    apply(&mut c, SUBNET, moved[1..].to_vec());
    c.ok(Command::ServiceRemove("s_a".into()));
    c.rest();
    assert_eq!(told(&c, "n1").1, [""; 0]);
    assert_eq!(routes(&c, "n1", "n2"), ["10.1.0.200/32"], "nobody's again");
}

#[test]
fn a_static_address_in_another_hosts_block_waits_for_that_host() {
    let mut c = Cluster::with_nodes(2);
    apply(&mut c, SUBNET, vec![on("c", "n1", 2)]);
    let plain = |c: &mut Cluster, last| {
        let id = c.model().network("s_net").unwrap().id.clone();
        let n1 = c.node("n1");
        c.agents.get_mut(&n1).unwrap().plain.insert((id, Ipv4Addr::new(10, 1, 0, last)))
    };
    // The engine of n1 runs a container there that the master does not know.
    plain(&mut c, 9);
    c.agents.get_mut(&c.node("n1")).unwrap().slow = true;
    apply(&mut c, SUBNET, vec![on("c", "n1", 2), at("a", "10.1.0.9", "n2"), at("b", "10.1.0.10", "n2")]);
    let waits = "a.1 pending waits for host n1 to give up address 10.1.0.9 of its block 10.1.0.0/28";
    assert_eq!(c.show("a"), [waits]);
    c.agents.get_mut(&c.node("n1")).unwrap().slow = false;
    c.turn();
    c.rest();
    assert_eq!(addresses(&c, "b"), ["10.1.0.10"]);
    assert_eq!(c.show("a"), ["a.1 pending address 10.1.0.9 of network s_net is in use on host n1"]);
    c.agents.get_mut(&c.node("n1")).unwrap().plain.clear();
    c.rest();
    assert_eq!(addresses(&c, "a"), ["10.1.0.9"]);
    assert_eq!(told(&c, "n1").1, ["10.1.0.9/32", "10.1.0.10/32"]);
    // The host where its task ran is lost: the address follows to the next one.
    apply(&mut c, SUBNET, vec![on("c", "n1", 2), service("a").with(|s| network_at(s, "s_net", "10.1.0.9"))]);
    let first = c.nodes_of("a")[0].clone();
    c.lose(&first);
    c.pass(5_000);
    assert_eq!(addresses(&c, "a"), ["10.1.0.9"]);
    assert_ne!(c.nodes_of("a"), [first]);
}

#[test]
fn a_static_address_has_one_owner_who_is_named() {
    let mut c = Cluster::with_nodes(2);
    apply(&mut c, SUBNET, vec![at("a", "10.1.0.5", "n1"), on("c", "n1", 1)]);
    let vip = c.model().service_named("s_c").unwrap().vips[0].v4.to_string();
    let base = || vec![at("a", "10.1.0.5", "n1"), on("c", "n1", 1)];
    let mut refused = |address: &str, code: &str, message: &str| {
        let mut services = base();
        services.push(at("x", address, "n2"));
        let stack = in_subnet(SUBNET, services);
        let apply = skein_api::StackApply { stack, ..Default::default() };
        let error = c.refused(Command::StackApply(Box::new(apply)), code);
        assert_eq!(error.message, message);
        let mut create = container("x");
        create.spec.networks = vec![NetworkAttachment {
            network: "s_net".into(),
            ipv4: address.parse().ok(),
            ..NetworkAttachment::default()
        }];
        c.refused(
            Command::ContainerCreate(Box::new(create)),
            if code == "bad_address" { code } else { "address_taken" },
        );
    };
    refused("10.1.0.5", "address_taken", "services s_a and s_x have the same address 10.1.0.5");
    let owned = |what: &str, by: &str| format!("s_x: {what} of network s_net belongs to {by}");
    refused(&vip, "address_taken", &owned(&vip, "service s_c, as its virtual address"));
    refused("10.1.0.2", "address_taken", &owned("10.1.0.2", "task s_c.1"));
    refused("10.9.0.5", "bad_address", "s_x: 10.9.0.5 is outside of network s_net (10.1.0.0/24)");
    for reserved in ["10.1.0.0", "10.1.0.1", "10.1.0.255"] {
        let message = format!("s_x: {reserved} is the first, the last or the gateway's of network s_net");
        refused(reserved, "bad_address", &message);
    }
    // Two tasks cannot have it.
    for mode in [ServiceMode::Replicated(2), ServiceMode::Global] {
        let stack = in_subnet(SUBNET, vec![at("a", "10.1.0.5", "n1").with(|s| s.mode = mode)]);
        let apply = skein_api::StackApply { stack, ..Default::default() };
        let error = c.refused(Command::StackApply(Box::new(apply)), "bad_request");
        assert_eq!(error.message, "service s_a has the address 10.1.0.5, so it can have one task only");
    }
    // The service itself may name what its task has by chance.
    apply(&mut c, SUBNET, vec![at("a", "10.1.0.5", "n1"), at("c", "10.1.0.2", "n1")]);
    assert_eq!(addresses(&c, "c"), ["10.1.0.2"]);
    // Two services exchange theirs in one application.
    apply(&mut c, SUBNET, vec![at("a", "10.1.0.2", "n1"), at("c", "10.1.0.5", "n2")]);
    c.pass(10_000);
    assert_eq!((addresses(&c, "a"), addresses(&c, "c")), (vec!["10.1.0.2".into()], vec!["10.1.0.5".into()]));
}

#[test]
fn the_ipv6_address_belongs_to_the_ipv4_address() {
    let mut c = Cluster::with_nodes(1);
    let spec = NetworkSpec { name: "n".into(), subnet4: SUBNET.parse().ok(), ..NetworkSpec::default() };
    c.ok(Command::NetworkCreate(spec));
    let prefix = c.model().network("n").unwrap().subnet6.network().to_string();
    let create = |v4: Option<&str>, v6: Option<&str>| -> Command {
        let mut create: ContainerCreate = container("");
        let ipv6 = v6.map(|v6| format!("{prefix}{v6}").parse().unwrap());
        let attachment =
            NetworkAttachment { network: "n".into(), ipv4: v4.map(|a| a.parse().unwrap()), ipv6, aliases: vec![] };
        create.spec.networks = vec![attachment];
        Command::ContainerCreate(Box::new(create))
    };
    let error = c.refused(create(Some("10.1.0.9"), Some("7")), "bad_address").message;
    let words = format!("{prefix}7 does not belong to 10.1.0.9 in network n: {prefix}9 does");
    assert!(error.ends_with(&words), "{error}");
    c.refused(create(None, Some("1:9")), "bad_address");
    c.refused(create(None, Some("1")), "bad_address");
    let mut both = |command| {
        let Reply::Task(id) = c.ok(command) else { panic!("a task") };
        c.rest();
        let task = &c.model().tasks[&id];
        assert_eq!(task.spec.networks[0].ipv6, None, "one of the two is kept");
        task.status.addresses[0].v4.unwrap().to_string()
    };
    assert_eq!(both(create(Some("10.1.0.9"), Some("9"))), "10.1.0.9");
    assert_eq!(both(create(None, Some("c8"))), "10.1.0.200");
}

#[test]
fn subnets_of_any_size_serve_several_hosts() {
    for (subnet, capacity) in [("10.1.0.0/28", 13), ("10.1.0.0/29", 5), ("10.1.0.0/30", 1)] {
        let mut c = Cluster::with_nodes(3);
        let services = |n| ["n1", "n2", "n3"].map(|node| dnsrr(on(&format!("on-{node}"), node, n))).to_vec();
        let running = |c: &Cluster| ["n1", "n2", "n3"].map(|node| addresses(c, &format!("on-{node}")).len());
        apply(&mut c, subnet, services(1));
        assert_eq!(running(&c).iter().sum::<usize>(), capacity.min(3), "{subnet}: {:?}", running(&c));
        apply(&mut c, subnet, services(9));
        assert_eq!(running(&c).iter().sum::<usize>(), capacity, "{subnet}: {:?}", running(&c));
        let all = ["on-n1", "on-n2", "on-n3"].into_iter().flat_map(|name| c.live(name));
        let waiting = all.filter(|t| t.node.is_none()).map(|t| t.status.message).next().unwrap();
        let begin = format!("network s_net has no free address in {subnet}: of {capacity}, n");
        assert!(waiting.starts_with(&begin), "{waiting}");
    }
}

#[test]
fn a_full_network_takes_back_what_a_host_does_not_use_and_lends_single_addresses() {
    let mut c = Cluster::with_nodes(3);
    // Sixteen blocks of two addresses. n1 takes them all and then needs few.
    let subnet = "10.1.0.0/27";
    apply(&mut c, subnet, vec![dnsrr(on("a", "n1", 29))]);
    assert_eq!(addresses(&c, "a").len(), 29);
    let id = c.model().network("s_net").unwrap().id.clone();
    assert!(c.model().networks[&id].crowded);
    let said = c.core.take_notices();
    assert_eq!(said, ["network s_net is crowded: 29 of 29 addresses of 10.1.0.0/27 are in use"]);
    apply(&mut c, subnet, vec![dnsrr(on("a", "n1", 4))]);
    // The crowd is over, and what n1 has it keeps while nobody needs it.
    assert!(!c.model().networks[&id].crowded);
    assert_eq!(told(&c, "n1").0.len(), 15);
    let a = addresses(&c, "a");
    apply(&mut c, subnet, vec![dnsrr(on("a", "n1", 4)), dnsrr(on("b", "n2", 8))]);
    assert_eq!((addresses(&c, "a"), addresses(&c, "b").len()), (a, 8), "blocks that n1 does not use went to n2");
    assert_eq!(c.core.check(), Vec::<String>::new());

    // Now both use one address of each block: what n3 needs is lent.
    let mut c = Cluster::with_nodes(3);
    apply(&mut c, subnet, vec![dnsrr(on("a", "n1", 29))]);
    let last = |c: &Cluster| c.live("a").into_iter().map(|t| t.status.addresses[0].v4.unwrap()).collect::<Vec<_>>();
    let before = last(&c);
    // One container of each block ends for good: every second address is free.
    let id: NetworkId = c.model().network("s_net").unwrap().id.clone();
    apply(&mut c, subnet, vec![dnsrr(on("a", "n1", 0))]);
    let n1 = c.node("n1");
    let odd = before.iter().filter(|a| a.octets()[3] % 2 == 1);
    c.agents.get_mut(&n1).unwrap().plain = odd.map(|a| (id.clone(), *a)).collect();
    apply(&mut c, subnet, vec![dnsrr(on("a", "n1", 0)), dnsrr(on("b", "n3", 3))]);
    let lent = addresses(&c, "b");
    assert_eq!(lent.len(), 3, "{:?}", c.show("b"));
    assert!(lent.iter().all(|a| a.parse::<Ipv4Addr>().unwrap().octets()[3] % 2 == 0), "{lent:?}");
    let singles: Vec<String> = lent.iter().map(|a| format!("{a}/32")).collect();
    assert_eq!(told(&c, "n3").0, singles);
    assert_eq!(routes(&c, "n1", "n3"), singles);
    let frozen = told(&c, "n1").1;
    assert!(
        singles.iter().all(|s| {
            let single: ipnet::Ipv4Net = s.parse().unwrap();
            frozen.iter().any(|f| f.parse::<ipnet::Ipv4Net>().unwrap().contains(&single))
        }),
        "{frozen:?}"
    );
    // They survive a restart of the master, and serve again after a restart of the task.
    c.restart_master();
    c.end("s_b.1", 1);
    c.pass(10_000);
    assert_eq!(addresses(&c, "b").len(), 3);
    // n1's containers end: its frozen blocks are nobody's again, and n3 keeps what it borrowed.
    c.agents.get_mut(&n1).unwrap().plain.clear();
    c.rest();
    assert_eq!(told(&c, "n1").1.len(), 0, "{:?}", told(&c, "n1"));
    assert_eq!(told(&c, "n3").0, singles);
}

#[test]
fn a_host_whose_agent_cannot_freeze_is_not_asked() {
    let mut c = Cluster::with_nodes(2);
    for name in ["n1", "n2"] {
        let mut description = Cluster::description(name);
        description.freezes = false;
        c.ok(Command::Describe { node: c.node(name), description: Box::new(description) });
    }
    apply(&mut c, "10.1.0.0/28", vec![on("a", "n1", 12)]);
    apply(&mut c, "10.1.0.0/28", vec![on("a", "n1", 1), on("b", "n2", 1)]);
    let said = &c.show("b")[0];
    assert!(said.contains("has no free address in 10.1.0.0/28: of 13, n1 12 ("), "{said}");
    assert!(c.model().loose_blocks().next().is_none());
}

#[test]
fn an_attachable_network_leaves_each_host_a_block_and_counts_plain_containers() {
    let mut c = Cluster::with_nodes(2);
    let in_net = |n| {
        let mut spec = in_subnet("10.1.0.0/27", vec![dnsrr(on("a", "n1", n))]);
        spec.networks[0].attachable = true;
        spec
    };
    c.apply(in_net(0));
    c.rest();
    let id = c.model().network("s_net").unwrap().id.clone();
    assert_eq!((told(&c, "n1").0.len(), told(&c, "n2").0.len()), (1, 1));
    // The engine of n1 takes the addresses that it has: a task there gets others.
    let n1 = c.node("n1");
    let own: ipnet::Ipv4Net = told(&c, "n1").0[0].parse().unwrap();
    c.agents.get_mut(&n1).unwrap().plain.extend([own.network(), own.broadcast()].map(|a| (id.clone(), a)));
    c.rest();
    c.apply(in_net(1));
    c.rest();
    assert_eq!(addresses(&c, "a").len(), 1, "{:?}", c.show("a"));
    c.apply(in_net(40));
    c.rest();
    // 29 addresses, two of them are plain containers', two are in the block of n2.
    assert_eq!(addresses(&c, "a").len(), 25);
    assert_eq!((told(&c, "n2").0.len(), told(&c, "n2").1.len()), (1, 0), "n1 lacks addresses and gets not these");
}

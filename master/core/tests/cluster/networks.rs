//! Networks: numbers, subnets, blocks, their beginning and end.

use std::{collections::BTreeSet, net::Ipv4Addr};

use master_core::{Command, Reply};
use skein_api::{
    Assignment, AttachedContainer, Availability, EndpointMode, NetworkId, NetworkSpec, NodeDescription, NodeUpdate,
    ServiceAssignment, TaskAddress, TaskId, TaskState, Vip,
};

use crate::harness::{Cluster, With, constraint, network, port, replicas, service, stack};

fn create(name: &str, subnet: Option<&str>) -> Command {
    let subnet4 = subnet.map(|s| s.parse().unwrap());
    Command::NetworkCreate(NetworkSpec { name: name.into(), subnet4, ..NetworkSpec::default() })
}

#[test]
fn numbers_and_subnets_are_unique() {
    let mut c = Cluster::new();
    for i in 0..40 {
        c.ok(create(&format!("n{i}"), None));
    }
    c.ok(Command::NetworkRemove("n39".into()));
    c.ok(create("again", None));
    let again = c.model().network("again").unwrap().clone();
    assert_eq!(again.vni, 4_096 + 40, "a number is not used again so soon");
    assert_eq!(again.subnet4, "10.66.112.0/20".parse().unwrap(), "the first subnet that is free");
    let subnets: BTreeSet<_> = c.model().networks.values().map(|n| (n.subnet4, n.subnet6)).collect();
    assert_eq!(subnets.len(), 40);
}

#[test]
fn a_subnet_meets_no_network_and_no_route_of_a_host() {
    let mut c = Cluster::with_nodes(1);
    c.ok(create("a", Some("10.9.0.0/16")));
    for subnet in ["10.9.0.0/16", "10.9.7.0/24", "10.8.0.0/13", "10.0.0.0/8"] {
        let error = c.refused(create("b", Some(subnet)), "subnet_overlaps");
        assert!(error.message.ends_with("overlaps network a (10.9.0.0/16)"), "{error}");
    }
    let mut description = Cluster::description("n1");
    description.routes = vec!["10.64.0.0/12".parse().unwrap(), "172.17.0.0/16".parse().unwrap()];
    c.ok(Command::Describe { node: c.node("n1"), description: Box::new(description) });
    let error = c.refused(create("b", Some("172.17.9.0/24")), "subnet_overlaps");
    assert_eq!(error.message, "subnet 172.17.9.0/24 overlaps a route of host n1 (172.17.0.0/16)");
    c.ok(create("free", None));
    assert_eq!(c.model().network("free").unwrap().subnet4, "10.80.0.0/20".parse().unwrap(), "behind the route");
    // A resolver is one address, and no network is around it.
    let mut description = Cluster::description("n1");
    description.resolvers = vec!["10.64.3.3".parse().unwrap(), "192.0.2.53".parse().unwrap()];
    c.ok(Command::Describe { node: c.node("n1"), description: Box::new(description) });
    let error = c.refused(create("b", Some("192.0.2.0/24")), "subnet_overlaps");
    assert_eq!(error.message, "subnet 192.0.2.0/24 overlaps a resolver of host n1 (192.0.2.53)");
    c.ok(create("beside", None));
    assert_eq!(c.model().network("beside").unwrap().subnet4, "10.64.16.0/20".parse().unwrap());
    assert_eq!(c.core.take_notices(), [""; 0]);
    for subnet in ["10.1.0.0/31", "0.0.0.0/0"] {
        c.refused(create("b", Some(subnet)), "bad_subnet");
    }
}

#[test]
fn a_host_whose_routes_meet_a_network_is_told_of() {
    let mut c = Cluster::with_nodes(1);
    c.ok(create("a", Some("10.9.0.0/16")));
    let mut join = c.join_command("n2");
    if let Command::Join { description, .. } = &mut join {
        description.routes = vec!["10.0.0.0/8".parse().unwrap(), "172.16.0.0/12".parse().unwrap()];
    }
    c.ok(join);
    let said = "network a (10.9.0.0/16) overlaps a route of host n2 (10.0.0.0/8)";
    let end = ": neither can be reached there; choose another subnet or route";
    assert_eq!(c.core.take_notices(), [format!("{said}{end}")]);
    let usage = c.core.network_usage(c.model().network("a").unwrap());
    assert_eq!(usage.overlaps, ["route of host n2 (10.0.0.0/8)"]);
    // Said once; what comes later is said too.
    let mut description = c.model().nodes[&c.node("n2")].description.clone();
    description.resolvers = vec!["10.9.9.9".parse().unwrap()];
    c.ok(Command::Describe { node: c.node("n2"), description: Box::new(description.clone()) });
    let said = "network a (10.9.0.0/16) overlaps a resolver of host n2 (10.9.9.9)";
    assert_eq!(c.core.take_notices(), [format!("{said}{end}")]);
    description.underlay_mtu = 1_400;
    c.ok(Command::Describe { node: c.node("n2"), description: Box::new(description) });
    assert_eq!(c.core.take_notices(), [""; 0]);
}

#[test]
fn a_pool_that_is_used_up_is_said() {
    let mut c = Cluster::with_nodes(1);
    let mut description = Cluster::description("n1");
    description.routes = vec!["10.0.0.0/8".parse().unwrap()];
    c.ok(Command::Describe { node: c.node("n1"), description: Box::new(description) });
    let error = c.refused(create("a", None), "no_subnet");
    assert_eq!(error.message, "no /20 of the pool 10.64.0.0/10 is free on all hosts");
}

#[test]
fn blocks_grow_with_tasks_and_are_each_hosts_own() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| {
        replicas(s, 60);
        network(s, "s_net");
    })]);
    assert_eq!(c.live("web").iter().filter(|t| t.status.addresses.len() == 1).count(), 60);
    let id = c.model().network("s_net").unwrap().id.clone();
    for node in ["n1", "n2"] {
        let node = c.node(node);
        let blocks = c.model().node_blocks(&id, &node).count();
        assert!((2..=3).contains(&blocks), "30 tasks and slack in blocks of 16: {blocks}");
    }
    // Every host is told of the other's blocks, and every name.
    let docs = &c.agents[&c.node("n1")].docs;
    assert_eq!(docs.keys().filter(|k| k.starts_with("endpoint/")).count(), 60);
    assert_eq!(docs.keys().filter(|k| k.starts_with("peer/")).count(), 1);
}

#[test]
fn a_subnet_without_room_leaves_tasks_pending() {
    let mut c = Cluster::with_nodes(1);
    let mut spec = stack(vec![service("web").with(|s| {
        replicas(s, 20);
        network(s, "s_net");
    })]);
    spec.networks[0].subnet4 = Some("10.1.1.0/29".parse().unwrap());
    c.apply(spec);
    c.rest();
    assert_eq!(c.nodes_of("web").len(), 4, "8 addresses: 2 are the subnet's, 1 the gateway's, 1 the service's");
    let said = c.live("web").iter().find(|t| t.node.is_none()).unwrap().status.message.clone();
    assert_eq!(said, "network s_net has no free address in 10.1.1.0/29: of 5, n1 4 (4 in use), services 1");
}

#[test]
fn a_stacks_network_goes_with_its_last_task_unless_it_is_wanted_again() {
    let mut c = Cluster::with_nodes(1);
    let spec = || stack(vec![service("web").with(|s| network(s, "s_net"))]);
    c.apply(spec());
    c.rest();
    let id = c.model().network("s_net").unwrap().id.clone();
    c.down(false);
    assert!(c.model().network("s_net").is_some(), "its task still stops");
    c.refused(create("s_net", None), "in_use");
    c.apply(spec());
    c.rest();
    assert_eq!(c.model().network("s_net").unwrap().id, id, "taken back");
    assert_eq!(c.live("web").len(), 1);
    c.down(false);
    c.rest();
    assert!(c.model().network("s_net").is_none());
    assert!(c.agents[&c.node("n1")].docs.is_empty());
}

#[test]
fn a_network_in_use_is_not_removed() {
    let mut c = Cluster::with_nodes(1);
    c.ok(create("shared", None));
    c.up(vec![service("web").with(|s| network(s, "shared"))]);
    let error = c.refused(Command::NetworkRemove("shared".into()), "in_use");
    assert_eq!(error.message, "network shared is used by service s_web");
    c.down(false);
    c.rest();
    c.ok(Command::NetworkRemove("shared".into()));
    assert!(c.model().blocks.is_empty());
}

#[test]
fn an_attachable_network_is_on_every_host() {
    let mut c = Cluster::with_nodes(2);
    let spec = NetworkSpec { name: "plain".into(), attachable: true, ..NetworkSpec::default() };
    let Reply::Network(id) = c.ok(Command::NetworkCreate(spec)) else { panic!("a network") };
    c.join("n3");
    assert_eq!(c.model().members(&id).count(), 3);
}

#[test]
fn a_container_that_was_started_by_hand_has_its_names_on_every_host() {
    let mut c = Cluster::with_nodes(2);
    let spec = |name: &str, attachable| NetworkSpec { name: name.into(), attachable, ..NetworkSpec::default() };
    let Reply::Network(plain) = c.ok(Command::NetworkCreate(spec("plain", true))) else { panic!("a network") };
    c.up(vec![service("web").with(|s| network(s, "s_net"))]);
    c.rest();
    let services = c.model().network("s_net").unwrap().id.clone();
    let own = c.model().node_blocks(&plain, &c.node("n1")).next().unwrap().block4.hosts().nth(2);
    let container = |id: &str, network: &NetworkId, v4, names: &[&str]| AttachedContainer {
        id: TaskId::new(id),
        network: network.clone(),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        v4,
        v6: Some("fd00::bad".parse().unwrap()),
    };
    let describe = |c: &mut Cluster, node: &str, attached: Vec<AttachedContainer>| {
        let description = NodeDescription { attached, ..Cluster::description(node) };
        c.ok(Command::Describe { node: c.node(node), description: Box::new(description) });
    };
    let shown = |c: &Cluster| {
        let docs = &c.agents[&c.node("n2")].docs;
        let plain = docs.values().filter_map(|d| match d {
            Assignment::Endpoint(e) if e.plain => Some((e.task.to_string(), e.names.clone(), e.v4, e.v6)),
            _ => None,
        });
        plain.collect::<Vec<_>>()
    };
    let others = c.model().node_blocks(&plain, &c.node("n2")).next().unwrap().block4.hosts().nth(2);
    let attached = vec![
        container("c1", &plain, own, &["debug", "no name!", "d"]),
        // Not the host's to give, in a network that is for services alone, and without a name that can be one.
        container("c2", &plain, others, &["stolen"]),
        container("c3", &services, own, &["inside"]),
        container("c4", &plain, own, &["-"]),
    ];
    describe(&mut c, "n1", attached.clone());
    // The IPv6 address was not the one that belongs to the other.
    assert_eq!(shown(&c), [("c1".to_owned(), vec!["debug".to_owned(), "d".into()], own, None)]);
    assert_eq!(c.core.check(), Vec::<String>::new());
    let renamed = container("c1", &plain, own, &["other"]);
    describe(&mut c, "n1", vec![renamed]);
    assert_eq!(shown(&c)[0].1, ["other"]);
    describe(&mut c, "n1", Vec::new());
    assert_eq!(shown(&c), []);
    // Who joins later, or comes back, is told too; and of a host that was removed nothing stays.
    describe(&mut c, "n1", attached);
    c.join("n3");
    assert!(c.agents[&c.node("n3")].docs.contains_key(&format!("endpoint/{plain}/c1")));
    c.ok(Command::NodeRemove { node: "n1".into(), force: true });
    assert_eq!(shown(&c), []);
}

#[test]
fn the_least_mtu_of_the_members_holds() {
    let mut c = Cluster::with_nodes(3);
    c.up(vec![service("web").with(|s| {
        replicas(s, 2);
        network(s, "s_net");
        constraint(s, "node!=n3");
    })]);
    let mtu = |c: &Cluster, node: &str| {
        let docs = &c.agents[&c.node(node)].docs;
        docs.values().find_map(|d| if let Assignment::Network(n) = d { Some(n.mtu) } else { None })
    };
    assert_eq!((mtu(&c, "n1"), mtu(&c, "n3")), (Some(1_450), None));
    let mut description = Cluster::description("n2");
    (description.underlay_mtu, description.underlay4) = (1_400, None);
    c.ok(Command::Describe { node: c.node("n2"), description: Box::new(description) });
    assert_eq!((mtu(&c, "n1"), mtu(&c, "n2")), (Some(1_330), Some(1_330)));
}

#[test]
fn blocks_of_a_removed_host_are_given_out_last() {
    let mut c = Cluster::with_nodes(2);
    let web = |constraint_: &'static str| {
        service("web").with(move |s| {
            network(s, "s_net");
            constraint(s, constraint_);
        })
    };
    c.up(vec![web("node==n1")]);
    let block = |c: &Cluster| c.model().blocks.values().map(|b| b.index).collect::<Vec<_>>();
    assert_eq!(block(&c), [0]);
    c.ok(Command::NodeRemove { node: "n1".into(), force: true });
    assert_eq!(block(&c), [0_u32; 0]);
    c.up(vec![web("node==n2")]);
    assert_eq!(block(&c), [1], "the host that was cut off may still use block 0");
    // After the life of its certificate nothing of it is remembered.
    c.pass(1_000);
    c.now.wall = c.now.wall.plus_ms(26 * 3_600 * 1_000);
    c.now.mono_ms += 26 * 3_600 * 1_000;
    c.core.tick(c.now);
    c.turn();
    assert!(c.model().removed_nodes.is_empty());
    let update = NodeUpdate::default();
    c.ok(Command::NodeUpdate { node: "n2".into(), update });
}

#[test]
fn a_task_starts_when_every_host_of_its_network_knows_its_address() {
    let mut c = Cluster::with_nodes(3);
    let (n1, n2) = (c.node("n1"), c.node("n2"));
    let on = |name: &str, node: &str| {
        service(name).with(|s| network(s, "s_net")).with(|s| constraint(s, &format!("node.name=={node}")))
    };
    c.up(vec![on("a", "n1"), on("b", "n2"), on("c", "n3")]);
    c.rest();
    assert_eq!(c.task("s_c.1").status.state, TaskState::Running);
    // n2 takes nothing: a new task on n1 is made, told to n3, and not started.
    c.agents.get_mut(&n2).expect("joined").slow = true;
    c.up(vec![on("a", "n1"), on("b", "n2"), on("c", "n3"), on("d", "n1")]);
    c.rest();
    let d = c.task("s_d.1");
    let key = format!("endpoint/{}/{}", d.status.addresses[0].network, d.id);
    assert_eq!(d.status.state, TaskState::Ready);
    assert!(c.agents[&c.node("n3")].docs.contains_key(&key) && !c.agents[&n1].docs.contains_key(&key));
    // Once it acknowledges, the task starts.
    let mut acknowledged = c.clone();
    acknowledged.agents.get_mut(&n2).expect("joined").slow = false;
    acknowledged.turn();
    acknowledged.rest();
    assert_eq!(acknowledged.task("s_d.1").status.state, TaskState::Running);
    assert!(acknowledged.core.take_notices().is_empty());
    // When it never does, the deadline names it and goes on.
    let mut late = c.clone();
    late.pass(6_000);
    assert_eq!(late.task("s_d.1").status.state, TaskState::Running);
    let expected = "task s_d.1 starts although n2 did not acknowledge its address within 5 s";
    assert_eq!(late.core.take_notices(), [expected]);
    // A host that is lost is not waited for.
    c.agents.get_mut(&n2).expect("joined").connected = false;
    c.up(vec![on("a", "n1"), on("b", "n2"), on("c", "n3"), on("d", "n1"), on("e", "n3")]);
    c.pass(16_000);
    assert_eq!(c.task("s_e.1").status.state, TaskState::Running);
    assert_eq!(c.core.take_notices().len(), 2, "d and e, by their deadlines");
    c.up(vec![on("a", "n1"), on("c", "n3"), on("d", "n1"), on("e", "n3"), on("f", "n1")]);
    c.rest();
    assert_eq!(c.task("s_f.1").status.state, TaskState::Running, "without any time passing");
}

/// Two hosts with a task each, as a backup of the moment before they had addresses knows them. Since then one of `a`'s
/// host has got more blocks, and `a` an address of the last one.
fn backup_before_addresses() -> (Cluster, std::collections::BTreeMap<master_core::model::Key, Vec<u8>>, Ipv4Addr) {
    let mut c = Cluster::with_nodes(2);
    let on = |name: &str, node: &str, n: u32| {
        let spec = service(name).with(|s| network(s, "s_net")).with(|s| replicas(s, n));
        spec.with(|s| constraint(s, &format!("node.name=={node}")))
    };
    c.apply(stack(vec![on("a", "n1", 1), on("b", "n2", 1)]));
    let backup = c.store.clone();
    c.rest();
    c.up(vec![on("a", "n1", 1), on("b", "n2", 1), on("later", "n1", 30)]);
    let (n1, a) = (c.node("n1"), c.task("s_a.1"));
    let found = c.model().network("s_net").unwrap().clone();
    let last = c.model().node_blocks(&found.id, &n1).last().unwrap().clone();
    let mut taken = c.live("later").into_iter().filter(|t| last.block4.contains(&t.status.addresses[0].v4.unwrap()));
    let faster = taken.next().expect("the last block is in use");
    let address = faster.status.addresses[0].clone();
    let agent = c.agents.get_mut(&n1).expect("joined");
    // The agent makes containers as it likes: what came later was faster.
    let mut of = |task: &TaskId, addresses: &[TaskAddress]| {
        agent.tasks.get_mut(task).expect("it runs there").status.addresses = addresses.to_vec();
    };
    of(&faster.id, &a.status.addresses);
    of(&a.id, std::slice::from_ref(&address));
    (c, backup, address.v4.unwrap())
}

#[test]
fn an_address_that_a_restored_backup_does_not_know_is_its_hosts_again() {
    let (mut c, backup, address) = backup_before_addresses();
    let (n1, n2) = (c.node("n1"), c.node("n2"));
    c.restore(backup);
    let found = c.model().network("s_net").unwrap().clone();
    assert!(c.model().block_of(&found, address).is_none(), "the backup does not know");
    c.rest();
    assert_eq!(c.model().block_of(&found, address).map(|b| &b.node), Some(&n1));
    let a = c.task("s_a.1");
    assert_eq!((a.status.state, a.status.addresses[0].v4), (TaskState::Running, Some(address)));
    assert_eq!(c.live("a")[0].id, a.id, "and it was not replaced");
    let Some(Assignment::Peer(peer)) = c.agents[&n2].docs.get(&format!("peer/{}/{n1}", found.id)) else {
        panic!("n2 knows n1")
    };
    assert!(peer.blocks.iter().any(|block| block.contains(&address)), "n2 has the way there: {peer:?}");
}

#[test]
fn a_task_makes_room_whose_address_is_another_hosts_since_a_restore() {
    let (mut c, backup, address) = backup_before_addresses();
    let (n1, n2) = (c.node("n1"), c.node("n2"));
    c.cut("n1");
    c.restore(backup);
    c.rest();
    // n2 takes what is free, the lost block too.
    let more = service("more").with(|s| network(s, "s_net")).with(|s| replicas(s, 60));
    let mut spec = stack(vec![more.with(|s| constraint(s, "node.name==n2"))]);
    (spec.name, spec.services[0].stack) = ("more".into(), Some("more".into()));
    (spec.external_networks, spec.networks) = (vec!["s_net".into()], Vec::new());
    c.apply(spec);
    c.rest();
    let found = c.model().network("s_net").unwrap().clone();
    assert_eq!(c.model().block_of(&found, address).map(|b| &b.node), Some(&n2));
    let old = c.task("s_a.1").id;
    c.connect(&n1);
    c.agents_step();
    let words = format!(
        "address {address} of network s_net on n1 is one of n2's too: a backup was restored that is older than it"
    );
    let task = c.model().tasks[&old].clone();
    assert_eq!((task.status.err.clone(), task.desired_state), (Some(words), TaskState::Shutdown));
    c.rest();
    let new = &c.live("a")[0];
    assert_eq!((new.status.state, new.id != old), (TaskState::Running, true));
    assert_eq!(c.model().block_of(&found, new.status.addresses[0].v4.unwrap()).map(|b| &b.node), Some(&n1));
}

#[test]
fn a_host_that_lies_gets_no_more_blocks_than_it_has_tasks() {
    let (mut c, _, address) = backup_before_addresses();
    let (n2, b) = (c.node("n2"), c.task("s_b.1"));
    let found = c.model().network("s_net").unwrap().clone();
    let mut say = |v4: Ipv4Addr, v6| {
        let claimed = TaskAddress { network: found.id.clone(), v4: Some(v4), v6 };
        let status = skein_api::TaskStatus { addresses: vec![claimed], ..b.status.clone() };
        let report = skein_api::TaskReport { task: b.id.clone(), run: b.run, status };
        c.ok(Command::Reports { node: n2.clone(), reports: vec![report] });
        (c.model().node_blocks(&found.id, &n2).count(), c.task("s_b.1").desired_state)
    };
    let block = |index| Ipv4Addr::from(u32::from(found.block4(index).network()) + 3);
    assert_eq!(say("10.1.1.1".parse().unwrap(), None), (1, TaskState::Running), "of another network");
    assert_eq!(say(block(100), Some("fd00::1".parse().unwrap())), (1, TaskState::Running), "two that do not fit");
    assert_eq!(say(found.gateway4(), None), (1, TaskState::Running), "the gateway's");
    assert_eq!(say(block(100), None), (2, TaskState::Running), "it may be true");
    for index in 101..110 {
        assert_eq!(say(block(index), None), (2, TaskState::Running), "it cannot be true");
    }
    assert_eq!(say(address, None), (2, TaskState::Shutdown), "one of n1's: its own task ends, and nobody else's");
    assert_eq!(c.live("later").len(), 30);
}

fn vips(c: &Cluster, name: &str) -> Vec<Vip> {
    c.model().service_named(&format!("s_{name}")).unwrap().vips.clone()
}

/// The services that a node is told of, by their first name.
fn services_told(c: &Cluster, node: &str) -> std::collections::BTreeMap<String, ServiceAssignment> {
    let docs = c.agents[&c.node(node)].docs.values();
    let services = docs.filter_map(|d| if let Assignment::Service(s) = d { Some(s.clone()) } else { None });
    services.map(|s| (s.names[0].clone(), s)).collect()
}

#[test]
fn a_service_has_a_virtual_address_in_each_of_its_networks_for_life() {
    let mut c = Cluster::with_nodes(2);
    let web = |image: &'static str| {
        service("web").with(move |s| {
            replicas(s, 4);
            network(s, "s_front");
            network(s, "s_back");
            s.task.networks[1].aliases = vec!["shop".into(), "web".into()];
            s.task.container.image = image.into();
        })
    };
    let db = || service("db").with(|s| network(s, "s_back"));
    let alone = || service("alone").with(|s| (network(s, "s_back"), s.endpoint_mode = EndpointMode::Dnsrr).1);
    c.up(vec![web("one"), db(), alone()]);
    let (of_web, of_db) = (vips(&c, "web"), vips(&c, "db"));
    let names: Vec<_> = of_web.iter().map(|v| c.model().networks[&v.network].spec.name.as_str()).collect();
    assert_eq!((names, of_db.len()), (vec!["s_front", "s_back"], 1));
    assert_eq!(vips(&c, "alone"), []);
    assert_ne!(of_web[1].v4, of_db[0].v4);
    // From the end of the subnet, where no host's block is.
    let back = c.model().network("s_back").unwrap().clone();
    let last = u32::from(back.subnet4.broadcast()) >> 4;
    assert!([of_web[1].v4, of_db[0].v4].iter().all(|v4| u32::from(*v4) >> 4 == last), "{of_web:?} {of_db:?}");
    for node in ["n1", "n2"] {
        let told = services_told(&c, node);
        assert_eq!(told.keys().collect::<Vec<_>>(), ["db", "web"], "{node}");
    }
    let docs = &c.agents[&c.node("n1")].docs;
    let id = &c.model().service_named("s_web").unwrap().id;
    let Assignment::Service(told) = &docs[&format!("service/{}/{id}", back.id)] else { panic!("a service") };
    assert_eq!((&told.names[..], told.v4), (&["web", "s_web", "shop"].map(String::from)[..], of_web[1].v4));

    c.up(vec![web("two"), db(), alone()]);
    assert_eq!((vips(&c, "web"), vips(&c, "db")), (of_web.clone(), of_db.clone()), "kept when its tasks are replaced");
    c.up(vec![web("two").with(|s| s.endpoint_mode = EndpointMode::Dnsrr), db(), alone()]);
    assert_eq!(vips(&c, "web"), []);
    assert_eq!(services_told(&c, "n1").len(), 1);
    c.down(false);
    c.rest();
    assert!(c.agents[&c.node("n1")].docs.is_empty());
}

#[test]
fn virtual_addresses_leave_blocks_to_hosts() {
    let mut c = Cluster::with_nodes(3);
    // Sixteen blocks of one address; three of them can never be given.
    let services = (0..9).map(|i| service(&format!("w{i}")).with(|s| network(s, "s_net")));
    let mut spec = stack(services.collect());
    spec.networks[0].subnet4 = Some("10.1.1.0/28".parse().unwrap());
    c.apply(spec);
    c.rest();
    let with_vip = (0..9).filter(|i| !vips(&c, &format!("w{i}")).is_empty()).count();
    assert_eq!(with_vip, 4, "a quarter of the blocks");
    let network = c.model().network("s_net").unwrap().id.clone();
    assert!(c.model().members(&network).count() > 0, "hosts have addresses");
    let names = services_told(&c, "n1");
    assert_eq!(names.len(), 4);
    assert_eq!(c.core.check(), Vec::<String>::new());
}

/// What the hosts know of a task: whether each is told to lead to it, and what its own host is to do with it.
fn told_of(c: &Cluster, task: &skein_api::Task) -> (Vec<(bool, bool)>, Option<TaskState>) {
    let network = c.model().network("s_net").unwrap().id.clone();
    let endpoint = |node: &&str| match c.agents[&c.node(node)].docs.get(&format!("endpoint/{network}/{}", task.id)) {
        Some(Assignment::Endpoint(e)) => Some((e.healthy, e.draining)),
        _ => None,
    };
    let own = c.agents[task.node.as_ref().unwrap()].docs.get(&format!("task/{}", task.id));
    let desired = own.map(|doc| if let Assignment::Task(t) = doc { t.desired_state } else { panic!("a task") });
    (["n1", "n2"].iter().filter_map(endpoint).collect(), desired)
}

fn two_tasks(change: impl FnOnce(&mut skein_api::ServiceSpec)) -> Cluster {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![service("web").with(|s| {
        replicas(s, 2);
        network(s, "s_net");
        change(s);
    })]);
    c
}

#[test]
fn a_task_stops_when_nobody_leads_to_it_any_more() {
    let mut c = two_tasks(|_| ());
    let task = c.live("web").into_iter().find(|t| t.node == Some(c.node("n2"))).unwrap();
    assert_eq!(told_of(&c, &task), (vec![(true, false); 2], Some(TaskState::Running)));
    // One host is slow: it was told, and says nothing yet.
    c.agents.get_mut(&c.node("n1")).unwrap().slow = true;
    c.drain("n2", Availability::Drain);
    c.rest();
    assert_eq!(told_of(&c, &task), (vec![(true, false), (false, true)], Some(TaskState::Running)));
    c.pass(4_000);
    assert_eq!(told_of(&c, &task).1, Some(TaskState::Running), "a host has not acknowledged");
    c.agents.get_mut(&c.node("n1")).unwrap().slow = false;
    c.rest();
    assert_eq!(told_of(&c, &task), (vec![(false, true); 2], Some(TaskState::Running)));
    c.pass(4_000);
    assert_eq!(told_of(&c, &task).1, Some(TaskState::Running), "open connections have 5 s");
    assert_eq!(c.core.take_notices(), Vec::<String>::new());
    c.pass(2_000);
    assert_eq!(c.nodes_of("web"), ["n1", "n1"], "it stopped, and its successor runs elsewhere");
    assert!(c.agents[&c.node("n1")].docs.keys().all(|key| !key.ends_with(task.id.as_str())), "and is in no name");
}

#[test]
fn a_published_port_closes_before_its_task_stops() {
    let mut c = two_tasks(|s| {
        s.endpoint_mode = EndpointMode::Dnsrr;
        s.task.ports = vec![port(8080)];
    });
    let task = c.live("web").into_iter().find(|t| t.node == Some(c.node("n2"))).unwrap();
    c.drain("n2", Availability::Drain);
    c.rest();
    assert_eq!(told_of(&c, &task), (vec![(false, true); 2], Some(TaskState::Running)));
    c.pass(4_000);
    assert_eq!(told_of(&c, &task).1, Some(TaskState::Running), "open connections have 5 s");
    c.pass(2_000);
    assert_eq!(c.nodes_of("web"), ["n1"], "it stopped, and its successor waits for a free port");
}

#[test]
fn who_does_not_acknowledge_a_stop_is_named() {
    let mut c = two_tasks(|s| s.drain_ms = Some(2_000));
    c.agents.get_mut(&c.node("n1")).unwrap().slow = true;
    c.drain("n2", Availability::Drain);
    c.pass(6_000);
    let task = c.live("web").into_iter().find(|t| t.node == Some(c.node("n2")));
    assert!(task.is_none(), "its desired state is to stop");
    let said = "task s_web.2 stops although n1 did not acknowledge within 5 s that it gets no more connections";
    let said_too = said.replace("web.2", "web.1");
    let notices = c.core.take_notices();
    assert!(notices == [said] || notices == [said_too], "{notices:?}");
    c.agents.get_mut(&c.node("n1")).unwrap().slow = false;
    c.pass(3_000);
    assert_eq!(c.nodes_of("web"), ["n1", "n1"]);
}

#[test]
fn stops_that_nobody_takes_over_from_do_not_wait() {
    // The last one that is served.
    let mut c = two_tasks(|s| replicas(s, 1));
    let node = c.nodes_of("web")[0].clone();
    c.drain(&node, Availability::Drain);
    c.rest();
    assert_ne!(c.nodes_of("web"), [node], "replaced without time passing");
    // A service that wants no wait, and one without virtual addresses.
    let no_time: fn(&mut skein_api::ServiceSpec) = |s| s.drain_ms = Some(0);
    for change in [no_time, |s| s.endpoint_mode = EndpointMode::Dnsrr] {
        let mut c = two_tasks(change);
        c.drain("n2", Availability::Drain);
        c.rest();
        assert_eq!(c.nodes_of("web"), ["n1", "n1"]);
    }
    // The end of the service.
    let mut c = two_tasks(|_| ());
    c.down(false);
    c.rest();
    assert!(c.model().tasks.is_empty());
    // A master that starts anew.
    let mut c = two_tasks(|_| ());
    c.drain("n2", Availability::Drain);
    c.rest();
    assert_eq!(c.nodes_of("web").len(), 1);
    c.restart_master();
    c.pass(1_000);
    assert_eq!(c.nodes_of("web"), ["n1", "n1"]);
}

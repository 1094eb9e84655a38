//! Ports of every host.

use master_core::Command;
use skein_api::{Assignment, IngressPort, Protocol, ServiceSpec, StackApply};

use crate::harness::{Cluster, With, container, network, port, service, stack};

fn everywhere(published: u16, target: u16) -> IngressPort {
    IngressPort { protocol: Protocol::Tcp, published, target }
}

fn web(name: &str, published: u16) -> ServiceSpec {
    service(name).with(|s| {
        network(s, "s_front");
        s.ingress = vec![everywhere(published, 80)];
    })
}

/// The ports that a node is told of, with the network in which they lead to their service.
fn told(c: &Cluster, node: &str) -> Vec<(String, u16)> {
    let docs = c.agents[&c.node(node)].docs.values();
    let services = docs.filter_map(|doc| if let Assignment::Service(s) = doc { Some(s) } else { None });
    let ports = services
        .flat_map(|s| s.ports.iter().map(|port| (c.model().networks[&s.network].spec.name.clone(), port.published)));
    ports.collect()
}

#[test]
fn every_host_is_told_and_joins_the_network() {
    let mut c = Cluster::with_nodes(3);
    let mut spec = stack(vec![service("web").with(|s| {
        network(s, "s_back");
        network(s, "s_front");
        s.ingress = vec![everywhere(8080, 80), everywhere(8443, 443)];
    })]);
    spec.networks.iter_mut().find(|n| n.name == "s_back").expect("named above").internal = true;
    c.apply(spec.clone());
    c.rest();
    let ports = [("s_front".to_owned(), 8080), ("s_front".to_owned(), 8443)];
    for node in ["n1", "n2", "n3"] {
        assert_eq!(told(&c, node), ports, "{node}");
    }
    c.join("n4");
    c.rest();
    assert_eq!(told(&c, "n4"), ports);
    let back = c.model().network("s_back").expect("there").id.clone();
    assert_eq!(c.model().members(&back).count(), 1, "that one is where its task is");
    // Its tasks are found by name and port too.
    let front = c.model().network("s_front").expect("there").id.clone();
    let task = c.task("s_web.1").id;
    let Some(Assignment::Endpoint(endpoint)) = c.agents[&c.node("n4")].docs.get(&format!("endpoint/{front}/{task}"))
    else {
        panic!("an endpoint")
    };
    assert_eq!(endpoint.ports, [(Protocol::Tcp, 80), (Protocol::Tcp, 443)]);

    spec.services[0].ingress.remove(0);
    c.apply(spec);
    c.rest();
    assert_eq!(told(&c, "n4"), ports[1..]);
    assert_eq!(c.task("s_web.1").id, task, "no task is replaced for it");
    c.down(false);
    c.rest();
    assert!(c.agents[&c.node("n4")].docs.is_empty());
}

/// What is said to a stack `t` with this service.
fn refusal(c: &mut Cluster, service: ServiceSpec) -> String {
    let mut other = stack(vec![service]);
    "t".clone_into(&mut other.name);
    for service in &mut other.services {
        service.name = service.name.replace("s_", "t_");
        service.stack = Some("t".to_owned());
        for attachment in &mut service.task.networks {
            attachment.network = attachment.network.replace("s_", "t_");
        }
    }
    for network in &mut other.networks {
        network.name = network.name.replace("s_", "t_");
        network.stack = Some("t".to_owned());
    }
    let apply = StackApply { stack: other, remove_orphans: true, dry_run: false };
    c.refused(Command::StackApply(Box::new(apply)), "port_taken").message
}

#[test]
fn a_port_has_one_owner_in_the_cluster() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![web("web", 8080)]);
    c.rest();
    let own = "cannot publish port 8080/tcp: on every host it belongs to service s_web";
    assert_eq!(refusal(&mut c, web("other", 8080)), format!("t_other {own}"));
    let on_a_host = || service("other").with(|s| (network(s, "s_front"), s.task.ports = vec![port(8080)]).1);
    assert_eq!(refusal(&mut c, on_a_host()), format!("t_other {own}"));
    let mut create = container("box");
    create.spec.ports = vec![port(8080)];
    let said = c.refused(Command::ContainerCreate(Box::new(create.clone())), "port_taken").message;
    assert_eq!(said, format!("box {own}"));

    // The other way round, and what a task was given.
    c.down(false);
    c.rest();
    c.run(create);
    c.up(vec![on_a_host().with(|s| s.task.ports = vec![port(8081)])]);
    c.rest();
    let said = refusal(&mut c, web("web", 8080));
    assert_eq!(said, "t_web cannot publish port 8080/tcp: it is published by task box");
    let said = refusal(&mut c, web("web", 8081));
    assert_eq!(said, "t_web cannot publish port 8081/tcp: it is published by service s_other where its tasks are");
    // From one mode to the other, and to another service, in one go.
    c.up(vec![web("other", 8081)]);
    c.up(vec![web("other", 8082), web("web", 8081)]);
    c.rest();
    assert_eq!(told(&c, "n1").len(), 2);
}

#[test]
fn ports_that_lead_nowhere_are_refused() {
    let mut c = Cluster::with_nodes(1);
    let mut check = |says: &str, change: &dyn Fn(&mut ServiceSpec), internal: bool| {
        let mut spec = stack(vec![web("web", 8080).with(|s| change(s))]);
        spec.networks.iter_mut().for_each(|n| n.internal = internal);
        let apply = StackApply { stack: spec, remove_orphans: true, dry_run: true };
        let said = c.refused(Command::StackApply(Box::new(apply)), "bad_request").message;
        assert!(said.contains(says), "{said}");
    };
    check("is in no network that leads out", &|_| (), true);
    check("is in no network that leads out", &|s| s.task.networks.clear(), false);
    check("which lead by a virtual address", &|s| s.endpoint_mode = skein_api::EndpointMode::Dnsrr, false);
    check("0 is no port", &|s| s.ingress[0].published = 0, false);
    check("port 8080/tcp of every host twice", &|s| s.ingress.push(everywhere(8080, 81)), false);
    check("at most 4096", &|s| s.ingress = (1..=4097).map(|p| everywhere(p, 80)).collect(), false);
}

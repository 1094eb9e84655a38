//! Scripts of requests as engines send them, against the machine and what it persisted.

use super::*;
use crate::dns::zone::tests::network;

/// The machine with its disk: every request is decided, its changes applied to `disk`.
pub(super) struct World {
    known: BTreeMap<NetworkId, NetworkAssignment>,
    leases: Leases,
    state: PluginState,
    disk: BTreeMap<String, String>,
}

impl World {
    pub(super) fn new() -> Self {
        let mut services_only = network(3, "services", false);
        services_only.attachable = false;
        let networks = [network(1, "shop", false), network(2, "back", true), services_only];
        let known = networks.into_iter().map(|n| (n.id.clone(), n)).collect();
        let mut world = Self { known, leases: Leases::default(), state: PluginState::default(), disk: BTreeMap::new() };
        for (engine, ours) in [("e1", "net1"), ("e2", "net2"), ("e3", "net3")] {
            world.ok(create_network(engine, Some(ours), &[]));
        }
        world
    }

    pub(super) fn ask(&mut self, request: Request) -> Result<Outcome, Refusal> {
        let before = (self.state.clone(), self.leases.clone());
        let result = self.state.handle(&self.known, &mut self.leases, request);
        match &result {
            Ok(outcome) => {
                for change in &outcome.changes {
                    match change {
                        Change::Put(k, v) => drop(self.disk.insert(k.clone(), v.clone())),
                        Change::Delete(k) => drop(self.disk.remove(k)),
                    }
                }
            }
            Err(_) => assert_eq!((&self.state, &self.leases), (&before.0, &before.1), "a refusal changes nothing"),
        }
        let plugin = self.disk.iter().filter(|(k, _)| k.starts_with("plugin/"));
        let read = PluginState::load(&plugin.map(|(k, v)| (k.clone(), v.clone())).collect());
        assert_eq!(read, self.state, "the disk has what the memory has");
        for (key, json) in &self.disk {
            let document = self.state.document(key).or_else(|| self.leases.document(key));
            assert_eq!(document.as_ref(), Some(json), "{key}");
        }
        result
    }

    fn ok(&mut self, request: Request) -> Outcome {
        self.ask(request).unwrap()
    }

    fn refused(&mut self, request: Request) -> String {
        self.ask(request).unwrap_err().to_string()
    }

    fn address(&mut self, pool: &str, preferred: &str, mac: &str) -> String {
        let request = Request::RequestAddress {
            pool: pool.into(),
            address: preferred.into(),
            gateway: false,
            mac: Some(mac.into()),
        };
        match self.ok(request).reply {
            Reply::Address { address, .. } => address,
            other => panic!("{other:?}"),
        }
    }

    /// What an engine sends when a container starts.
    fn start(&mut self, n: u8, endpoint: &str, mac: &str, preferred: &str, task: Option<&str>) -> Outcome {
        let v4 = self.address(&format!("skein/net{n}/4"), preferred, mac);
        let v6 = self.address(&format!("skein/net{n}/6"), "", mac);
        self.ok(Request::CreateEndpoint {
            engine_network: format!("e{n}"),
            endpoint: endpoint.into(),
            address: v4,
            address6: v6,
            mac: mac.into(),
            task: task.map(str::to_owned),
        });
        self.ok(Request::Join { endpoint: endpoint.into(), sandbox: format!("/netns/{endpoint}") })
    }

    /// What an engine sends when a container stops, or after a crash.
    fn stop(&mut self, n: u8, endpoint: &str, v4: &str, v6: &str) {
        self.ok(Request::Leave { endpoint: endpoint.into() });
        self.ok(Request::DeleteEndpoint { endpoint: endpoint.into() });
        self.ok(Request::ReleaseAddress { pool: format!("skein/net{n}/4"), address: v4.into() });
        self.ok(Request::ReleaseAddress { pool: format!("skein/net{n}/6"), address: v6.into() });
    }
}

const MAC: &str = "02:42:00:00:00:01";
const MAC2: &str = "02:42:00:00:00:02";

fn create_network(engine: &str, ours: Option<&str>, pools: &[&str]) -> Request {
    Request::CreateNetwork {
        engine_network: engine.into(),
        network: ours.map(str::to_owned),
        internal: false,
        pools: pools.iter().map(|s| s.to_string()).collect(),
    }
}

fn port(host_port: u16, proto: Proto, host_ip: Option<&str>) -> PortBinding {
    let host_ip = host_ip.map(|ip| ip.parse().unwrap());
    PortBinding { proto, host_ip, host_port, host_port_end: host_port, port: 80 }
}

fn publish(endpoint: &str, ports: &[PortBinding]) -> Request {
    Request::Publish { endpoint: endpoint.into(), ports: ports.to_vec() }
}

#[test]
fn networks_of_plain_users_are_refused_with_a_hint() {
    let mut w = World::new();
    let pool = |pool: &str, network: Option<&str>| Request::RequestPool {
        pool: pool.into(),
        network: network.map(str::to_owned),
        v6: false,
    };
    assert!(w.refused(pool("", None)).contains("hint: skein network create"));
    assert!(w.refused(pool("172.30.0.0/16", None)).contains("hint: skein network create"));
    assert!(w.refused(create_network("e9", None, &["172.30.0.0/16"])).contains("hint: skein network create"));
    assert!(w.refused(create_network("e9", Some("net9"), &[])).contains("net9 is not on this host"));
    assert!(w.refused(create_network("e9", Some("net1"), &["172.30.0.0/16"])).contains("10.1.0.0/16"));
    assert!(w.refused(pool("172.30.0.0/16", Some("net1"))).contains("172.30.0.0/16 at the engine"));
    w.ok(create_network("e9", Some("net1"), &["10.1.0.0/16", "fd00:0:0:1::/64"]));
    let Reply::Pool { pool_id, pool, .. } = w.ok(pool("10.1.0.0/16", None)).reply else { panic!() };
    assert_eq!((pool_id.as_str(), pool.as_str()), ("skein/net1/4", "10.1.0.0/16"));
    w.ok(Request::DeleteNetwork { engine_network: "e9".into() });
    w.ok(Request::DeleteNetwork { engine_network: "e9".into() });
}

#[test]
fn a_container_starts_and_stops() {
    let mut w = World::new();
    let outcome = w.start(1, "p1", MAC, "", None);
    let json = serde_json::to_value(&outcome.reply).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "InterfaceName": {"SrcName": "skc-p1", "DstPrefix": "eth"},
            "Gateway": "10.1.0.1", "GatewayIPv6": "fd00:0:0:1::1",
            "StaticRoutes": [
                {"Destination": "10.1.0.1/32", "RouteType": 1, "NextHop": ""},
                {"Destination": "10.1.0.0/16", "RouteType": 0, "NextHop": "10.1.0.1"},
                {"Destination": "fd00:0:0:1::1/128", "RouteType": 1, "NextHop": ""},
                {"Destination": "fd00:0:0:1::/64", "RouteType": 0, "NextHop": "fd00:0:0:1::1"}],
            "DisableGatewayService": false,
        })
    );
    assert_eq!(outcome.effects, [Effect::Attach { endpoint: "p1".into() }]);
    let endpoint = w.state.endpoints()["p1"].clone();
    assert_eq!((endpoint.v4, endpoint.v6.unwrap()), ("10.1.1.0".parse().unwrap(), "fd00:0:0:1::100".parse().unwrap()));

    w.ok(Request::Leave { endpoint: "p1".into() });
    assert_eq!(w.state.joined(&NetworkId::new("net1")).count(), 0);
    let gone = w.ok(Request::DeleteEndpoint { endpoint: "p1".into() });
    assert_eq!(gone.effects, [Effect::Detach { network: NetworkId::new("net1"), endpoint: endpoint.to_netlib() }]);
    w.stop(1, "p1", "10.1.1.0", "fd00:0:0:1::100");
    assert_eq!(w.leases.held(&NetworkId::new("net1")), 0);
}

#[test]
fn internal_networks_have_no_gateway_and_no_ports() {
    let mut w = World::new();
    let outcome = w.start(2, "p1", MAC, "", None);
    let Reply::Join(join) = outcome.reply else { panic!() };
    assert_eq!((join.gateway.as_str(), join.gateway_ipv6.as_str(), join.disable_gateway_service), ("", "", true));
    assert_eq!(join.static_routes.len(), 4);
    assert!(w.refused(publish("p1", &[port(80, Proto::Tcp, None)])).contains("internal"));
}

#[test]
fn requests_may_come_twice() {
    let mut w = World::new();
    let first = w.start(1, "p1", MAC, "", None);
    assert_eq!(w.start(1, "p1", MAC, "", None), first);
    assert_eq!(w.leases.held(&NetworkId::new("net1")), 1);
    let wanted = [port(80, Proto::Tcp, None)];
    assert_eq!(w.ok(publish("p1", &wanted)).effects.len(), 1);
    assert_eq!(w.ok(publish("p1", &wanted)).effects, []);
    for _ in 0..2 {
        w.stop(1, "p1", "10.1.1.0", "fd00:0:0:1::100");
    }
    assert_eq!(w.disk.keys().filter(|k| k.starts_with(ENDPOINT_PREFIX)).count(), 0);
}

#[test]
fn an_engine_that_restarts_takes_down_and_starts_again() {
    let mut w = World::new();
    let net = w.known[&NetworkId::new("net1")].clone();
    let (sticky, _) = w.leases.reserve(&net, &TaskId::new("t1"), None, |_, _| false).unwrap();
    let v6 = address6(net.subnet6, net.subnet4, sticky).to_string();
    w.start(1, "p1", MAC, &sticky.to_string(), Some("t1"));
    w.start(1, "p2", MAC2, "", None);
    // The engine was killed and is back. It knows p1 and p2; we kept the networks that it does not create again.
    w.stop(1, "p1", &sticky.to_string(), &v6);
    w.stop(1, "p2", "10.1.1.1", "fd00:0:0:1::101");
    w.start(1, "p3", "02:42:00:00:00:03", &sticky.to_string(), Some("t1"));
    assert_eq!(w.state.endpoints()["p3"].v4, sticky, "sticky");
    // Killed again, and this time it forgot p3: the new endpoint with the same address takes its place.
    let leaked = w.state.endpoints()["p3"].to_netlib();
    let v4 = w.address("skein/net1/4", &sticky.to_string(), MAC2);
    let outcome = w.ok(Request::CreateEndpoint {
        engine_network: "e1".into(),
        endpoint: "p4".into(),
        address: v4,
        address6: String::new(),
        mac: String::new(),
        task: Some("t1".into()),
    });
    assert_eq!(outcome.effects, [Effect::Detach { network: net.id.clone(), endpoint: leaked }]);
    let mac = netlib::names::endpoint_mac(sticky).to_string();
    assert_eq!(outcome.reply, Reply::Endpoint { interface: ReplyInterface { mac_address: Some(mac) } });
    assert_eq!(w.state.endpoints().keys().collect::<Vec<_>>(), ["p4"]);
}

#[test]
fn ports_belong_to_one_container() {
    let mut w = World::new();
    w.start(1, "p1", MAC, "", Some("t1"));
    w.start(1, "p2", MAC2, "", None);
    use Proto::{Tcp, Udp};
    w.ok(publish("p1", &[port(80, Tcp, None), port(81, Tcp, Some("192.0.2.1"))]));
    assert_eq!(w.state.endpoints()["p1"].published().count(), 3, "both families, but one for the IPv4 address");
    let taken = |p: PortBinding| w.state.check_ports("p2", &[p]).err().map(|e| e.to_string());
    assert!(taken(port(80, Tcp, None)).unwrap().contains("port 80/tcp of this host is published by task t1"));
    assert!(taken(port(80, Tcp, Some("192.0.2.9"))).is_some());
    assert!(taken(port(81, Tcp, None)).is_some());
    assert_eq!(taken(port(81, Tcp, Some("192.0.2.9"))), None);
    assert_eq!(taken(port(80, Udp, None)), None);
    let leave = w.ok(Request::Leave { endpoint: "p1".into() });
    assert_eq!(leave.effects, [Effect::Ports { network: NetworkId::new("net1") }]);
    w.ok(publish("p2", &[port(80, Tcp, None)]));
}

#[test]
fn refusals() {
    let mut w = World::new();
    let create = |engine: &str, address: &str, mac: &str| Request::CreateEndpoint {
        engine_network: engine.into(),
        endpoint: "p1".into(),
        address: address.into(),
        address6: String::new(),
        mac: mac.into(),
        task: None,
    };
    assert!(w.refused(create("e9", "10.1.1.2/32", "")).contains("e9 is not on this host"));
    assert!(w.refused(create("e1", "10.1.1.2", "")).contains("\"10.1.1.2\" is not an IPv4 address"));
    assert!(w.refused(create("e1", "10.1.1.2/32", "zz")).contains("Ethernet"));
    assert!(w.refused(create("e3", "10.3.1.2/32", "")).contains("not attachable"));
    let join = Request::Join { endpoint: "p9".into(), sandbox: "s".into() };
    assert!(w.refused(join).contains("p9 is not known"));
    let ask = |pool: &str, address: &str, gateway| Request::RequestAddress {
        pool: pool.into(),
        address: address.into(),
        gateway,
        mac: None,
    };
    assert!(w.refused(ask("other/net1/4", "", false)).contains("not a pool"));
    assert!(w.refused(ask("skein/net1/5", "", false)).contains("not a pool"));
    assert!(w.refused(ask("skein/net1/4", "10.1.0.2", true)).contains("gateway 10.1.0.1"));
    assert!(w.refused(ask("skein/net1/4", "10.1.2.2", false)).contains("its blocks are 10.1.1.0/24"));
    assert!(w.refused(ask("skein/net1/4", "10.9.0.2", false)).contains("not an address of this network"));
    let reply = w.ok(ask("skein/net1/6", "", true)).reply;
    assert_eq!(reply, Reply::Address { address: "fd00:0:0:1::1/64".into(), data: BTreeMap::new() });
}

#[test]
fn a_container_in_two_networks_is_one_sandbox() {
    let mut w = World::new();
    w.start(1, "p1", MAC, "", None);
    w.start(2, "p2", MAC2, "", None);
    w.ok(Request::Join { endpoint: "p2".into(), sandbox: "/netns/p1".into() });
    let sandboxes = w.state.sandboxes();
    assert_eq!(sandboxes.len(), 1);
    let networks: Vec<_> = sandboxes[0].iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(networks, ["net1", "net2"]);
}

#[test]
fn a_damaged_endpoint_is_missed_until_the_engine_deletes_it() {
    let mut w = World::new();
    w.start(1, "p1", MAC, "", None);
    w.disk.insert("plugin/endpoint/p1".into(), "{\"network\":\"net".into());
    w.state = PluginState::load(&w.disk.clone().into_iter().filter(|(k, _)| k.starts_with("plugin/")).collect());
    assert_eq!(w.state.damaged().collect::<Vec<_>>(), ["plugin/endpoint/p1"]);
    assert!(w.state.misses_endpoints() && w.state.endpoints().is_empty());
    let gone = w.state.handle(&w.known, &mut w.leases, Request::DeleteEndpoint { endpoint: "p1".into() }).unwrap();
    assert_eq!(gone.changes, [Change::Delete("plugin/endpoint/p1".into())]);
    assert!(!w.state.misses_endpoints());
}

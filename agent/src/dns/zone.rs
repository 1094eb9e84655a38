//! What the names of this host's networks mean: an immutable table and its look-ups.
//!
//! Owns: building the table from the master's endpoints and finding names and addresses in it. Must not know: sockets,
//! packets, the clock, the kernel. No tasks, no channels: a [`Zone`] is built by the overlay's actor and shared by
//! pointer with the server's tasks.
//!
//! Shape and cost: per network one map from lower-case name to addresses and one from address to name; building is
//! O(names log names), a look-up O(networks of the client · log names).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use skein_api::{EndpointAssignment, NetworkAssignment, NetworkId, Protocol, ServiceAssignment, ServiceId};

/// Families of addresses that a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `A` (RFC 1035, 3.4.1).
    V4,
    /// `AAAA` (RFC 3596).
    V6,
    /// `ANY`: both.
    Both,
    /// Another type of record, which our names do not have: a known name answers with nothing.
    Neither,
}

/// What a look-up gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<T> {
    /// It is ours.
    Known(T),
    /// Not ours, but it may be somebody else's: ask the host's resolvers.
    Forward,
    /// Nobody's: a single label, an address in a subnet of ours, or asked from where nothing may leave.
    Unknown,
}

/// The addresses of a name. None means NODATA: of the asked family there is none, or nobody healthy bears the name.
pub type NameAnswer = Answer<Vec<IpAddr>>;

/// The first name of an address, with the network's name behind it.
pub type AddressAnswer = Answer<String>;

/// The servers behind a name (`SRV`): ports, with the names of those that listen on them.
pub type ServerAnswer = Answer<Vec<(u16, String)>>;

/// Who listens where: protocol, port, name with the network's behind it.
type Servers = BTreeSet<(Protocol, u16, String)>;

/// The endpoints that bear a name, by address.
type Members = BTreeSet<(Option<Ipv4Addr>, Option<Ipv6Addr>)>;

/// Names and addresses of one network.
#[derive(Clone, Debug, Default)]
struct NetworkZone {
    /// Lower-case name of the network, used as a suffix: `<name>.<network>`.
    name: String,
    subnet4: Option<Ipv4Net>,
    subnet6: Option<Ipv6Net>,
    internal: bool,
    /// Names of one endpoint alone.
    own: BTreeMap<String, Members>,
    /// Names shared by endpoints: only the healthy ones are listed, but the name stays known.
    shared: BTreeMap<String, Members>,
    reverse: BTreeMap<IpAddr, String>,
    /// By every name of an endpoint and of its service: the healthy ones whose ports are known.
    servers: BTreeMap<String, Servers>,
}

impl NetworkZone {
    fn find(&self, name: &str) -> Option<&Members> {
        self.own.get(name).or_else(|| self.shared.get(name))
    }

    /// Adds where an endpoint listens, under all its names and those of its service.
    fn add_servers(&mut self, e: &EndpointAssignment, of_service: &[String]) {
        let Some(first) = e.names.first().filter(|_| e.healthy && !e.ports.is_empty()) else { return };
        let target = format!("{}.{}", canonical(first), self.name);
        for name in e.names.iter().chain(&e.shared_names).chain(of_service) {
            let servers = self.servers.entry(canonical(name)).or_default();
            servers.extend(e.ports.iter().map(|(protocol, port)| (*protocol, *port, target.clone())));
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.subnet4.is_some_and(|n| n.contains(&a)),
            IpAddr::V6(a) => self.subnet6.is_some_and(|n| n.contains(&a)),
        }
    }
}

/// The names of every network that this host has, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Zone {
    networks: BTreeMap<NetworkId, NetworkZone>,
    /// Local containers with more than one network: by network and address, the networks they are in.
    clients: BTreeMap<(NetworkId, IpAddr), Vec<NetworkId>>,
}

impl Zone {
    /// Builds the table.
    ///
    /// The names of `services` answer with their virtual addresses, whether anybody is behind them or not: who connects is
    /// told at once. `sandboxes` lists for each local container the networks it is attached to with its addresses there:
    /// such a container gets answers from all its networks.
    pub fn build<'a>(
        networks: impl IntoIterator<Item = &'a NetworkAssignment>,
        services: impl IntoIterator<Item = &'a ServiceAssignment>,
        endpoints: impl IntoIterator<Item = &'a EndpointAssignment>,
        sandboxes: impl IntoIterator<Item = Vec<(NetworkId, Vec<IpAddr>)>>,
    ) -> Self {
        let mut zone = Self::default();
        for n in networks {
            let entry = zone.networks.entry(n.id.clone()).or_default();
            entry.name = canonical(&n.name);
            entry.subnet4 = Some(n.subnet4);
            entry.subnet6 = Some(n.subnet6);
            entry.internal = n.internal;
            let gateway = format!("gateway.{}", entry.name);
            entry.reverse.insert(IpAddr::V4(n.gateway4), gateway.clone());
            entry.reverse.insert(IpAddr::V6(n.gateway6), gateway);
        }
        let mut service_names: BTreeMap<(&NetworkId, &ServiceId), &[String]> = BTreeMap::new();
        for s in services {
            service_names.insert((&s.network, &s.service), &s.names);
            let Some(entry) = zone.networks.get_mut(&s.network) else {
                continue;
            };
            for name in &s.names {
                entry.shared.entry(canonical(name)).or_default().insert((Some(s.v4), Some(s.v6)));
            }
            if let Some(first) = s.names.first() {
                let name = format!("{}.{}", canonical(first), entry.name);
                entry.reverse.extend([IpAddr::V4(s.v4), IpAddr::V6(s.v6)].map(|a| (a, name.clone())));
            }
        }
        let (plain, ours): (Vec<_>, Vec<_>) = endpoints.into_iter().partition(|e| e.plain);
        for e in ours {
            let Some(entry) = zone.networks.get_mut(&e.network) else {
                continue;
            };
            for name in &e.names {
                entry.own.entry(canonical(name)).or_default().insert((e.v4, e.v6));
            }
            for name in &e.shared_names {
                let members = entry.shared.entry(canonical(name)).or_default();
                if e.healthy {
                    members.insert((e.v4, e.v6));
                }
            }
            let service = e.service.as_ref().and_then(|service| service_names.get(&(&e.network, service)));
            entry.add_servers(e, service.copied().unwrap_or_default());
            if let Some(first) = e.names.first().or(e.shared_names.first()) {
                let name = format!("{}.{}", canonical(first), entry.name);
                let addresses = e.v4.map(IpAddr::V4).into_iter().chain(e.v6.map(IpAddr::V6));
                entry.reverse.extend(addresses.map(|a| (a, name.clone())));
            }
        }
        zone.add_plain(&plain);
        for attached in sandboxes {
            let ids: Vec<NetworkId> = attached.iter().map(|(id, _)| id.clone()).collect();
            if ids.len() < 2 {
                continue;
            }
            for (id, addresses) in attached {
                for address in addresses {
                    zone.clients.insert((id.clone(), address), ids.clone());
                }
            }
        }
        zone
    }

    /// Containers that were started by hand: nobody takes a name of the cluster by calling a container so. Several of
    /// one name share it.
    fn add_plain(&mut self, endpoints: &[&EndpointAssignment]) {
        let free = |zone: &Self, e: &EndpointAssignment, name: &str| {
            zone.networks.get(&e.network).is_some_and(|entry| entry.find(name).is_none())
        };
        let of = |e: &EndpointAssignment| e.names.iter().map(|name| canonical(name)).collect::<Vec<_>>();
        let named: Vec<(&EndpointAssignment, Vec<String>)> =
            endpoints.iter().map(|e| (*e, of(e).into_iter().filter(|name| free(self, e, name)).collect())).collect();
        for (e, names) in named {
            let Some(entry) = self.networks.get_mut(&e.network) else { continue };
            if let Some(first) = names.first() {
                let name = format!("{first}.{}", entry.name);
                let addresses = e.v4.map(IpAddr::V4).into_iter().chain(e.v6.map(IpAddr::V6));
                entry.reverse.extend(addresses.map(|address| (address, name.clone())));
            }
            for name in names {
                entry.own.entry(name).or_default().insert((e.v4, e.v6));
            }
        }
    }

    /// The networks whose names a client sees: the one it asked through first.
    fn seen_by<'a>(&'a self, network: &'a NetworkId, client: IpAddr) -> Vec<&'a NetworkZone> {
        let others = self.clients.get(&(network.clone(), client)).into_iter().flatten().filter(|n| *n != network);
        std::iter::once(network).chain(others).filter_map(|id| self.networks.get(id)).collect()
    }

    /// Looks a name up for a client that asks through `network`. The name may have any case and a final dot.
    ///
    /// Order: each network of the client for the name as it stands, then for `<name>.<network>`. A name of several
    /// labels that is not found goes to the host's resolvers, even behind the name of a network (a network may be
    /// called like a top-level domain); a single label never does, nor anything that a client asks that is attached
    /// to internal networks only.
    pub fn name(&self, network: &NetworkId, client: IpAddr, name: &str, family: Family) -> NameAnswer {
        let name = canonical(name);
        let seen = self.seen_by(network, client);
        if let Some(members) = first_of(&seen, &name, NetworkZone::find) {
            return NameAnswer::Known(of_family(members, family));
        }
        // RFC 2782: a service name of ours exists as far as its host does, and has no addresses.
        if let Some(host) = srv_host(&name)
            && matches!(self.name(network, client, host, Family::Neither), NameAnswer::Known(_))
        {
            return NameAnswer::Known(Vec::new());
        }
        let single = !name.contains('.');
        if single || seen.iter().all(|n| n.internal) { NameAnswer::Unknown } else { NameAnswer::Forward }
    }

    /// Looks up who listens behind a name: `_<port>._<tcp|udp>.<name>` (RFC 2782, with the port's number as the
    /// service's name), or a name alone for every port of it.
    pub fn servers(&self, network: &NetworkId, client: IpAddr, name: &str) -> ServerAnswer {
        let name = canonical(name);
        match self.name(network, client, &name, Family::Neither) {
            NameAnswer::Forward => return ServerAnswer::Forward,
            NameAnswer::Unknown => return ServerAnswer::Unknown,
            NameAnswer::Known(_) => {}
        }
        let host = srv_host(&name).unwrap_or(&name);
        let asked = name.strip_suffix(host).filter(|prefix| !prefix.is_empty()).map(srv_port);
        let seen = self.seen_by(network, client);
        let servers = first_of(&seen, host, |n, name| n.servers.get(name));
        let fits = |(protocol, port, _): &&(Protocol, u16, String)| match asked {
            None => true,
            Some(asked) => asked == Some((*protocol, *port)),
        };
        let found = servers.into_iter().flatten().filter(fits);
        ServerAnswer::Known(found.map(|(_, port, target)| (*port, target.clone())).collect())
    }

    /// Looks up the name of an address for a client that asks through `network`.
    pub fn address(&self, network: &NetworkId, client: IpAddr, address: IpAddr) -> AddressAnswer {
        let seen = self.seen_by(network, client);
        if let Some(name) = seen.iter().find_map(|n| n.reverse.get(&address)) {
            return AddressAnswer::Known(name.clone());
        }
        let ours = self.networks.values().any(|n| n.contains(address));
        if ours || seen.iter().all(|n| n.internal) { AddressAnswer::Unknown } else { AddressAnswer::Forward }
    }

    /// Whether a client may ask the host's resolvers at all.
    pub fn may_forward(&self, network: &NetworkId, client: IpAddr) -> bool {
        self.seen_by(network, client).iter().any(|n| !n.internal)
    }
}

/// The form in which names are compared (RFC 4343): lower case, no final dot.
fn canonical(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// `web` of `_http._tcp.web`.
fn srv_host(name: &str) -> Option<&str> {
    let (service, rest) = name.split_once('.')?;
    let (proto, host) = rest.split_once('.')?;
    (service.starts_with('_') && proto.starts_with('_') && !host.starts_with('_')).then_some(host)
}

/// 80 and TCP of `_80._tcp.`.
fn srv_port(prefix: &str) -> Option<(Protocol, u16)> {
    let mut labels = prefix.split('.');
    let port = labels.next()?.strip_prefix('_')?.parse().ok()?;
    match labels.next()? {
        "_tcp" => Some((Protocol::Tcp, port)),
        "_udp" => Some((Protocol::Udp, port)),
        _ => None,
    }
}

/// What the first of some networks has under a name as it stands, or else under `<name>.<network>`.
fn first_of<'z, T>(
    seen: &[&'z NetworkZone],
    name: &str,
    get: impl Fn(&'z NetworkZone, &str) -> Option<&'z T>,
) -> Option<&'z T> {
    let within = |n: &'z NetworkZone| get(n, name.strip_suffix(&n.name)?.strip_suffix('.')?);
    seen.iter().find_map(|n| get(n, name)).or_else(|| seen.iter().find_map(|n| within(n)))
}

fn of_family(members: &Members, family: Family) -> Vec<IpAddr> {
    let v4 = members.iter().filter_map(|m| m.0).map(IpAddr::V4);
    let v6 = members.iter().filter_map(|m| m.1).map(IpAddr::V6);
    match family {
        Family::V4 => v4.collect(),
        Family::V6 => v6.collect(),
        Family::Both => v4.chain(v6).collect(),
        Family::Neither => Vec::new(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A network with subnet `10.<n>.0.0/16` and `fd00:0:0:<n>::/64`; host 1 owns `10.<n>.1.0/24`.
    pub(crate) fn network(n: u8, name: &str, internal: bool) -> NetworkAssignment {
        NetworkAssignment {
            id: NetworkId::new(format!("net{n}")),
            name: name.into(),
            vni: 4096 + u32::from(n),
            subnet4: format!("10.{n}.0.0/16").parse().unwrap(),
            subnet6: format!("fd00:0:0:{n:x}::/64").parse().unwrap(),
            gateway4: format!("10.{n}.0.1").parse().unwrap(),
            gateway6: format!("fd00:0:0:{n:x}::1").parse().unwrap(),
            mtu: 1450,
            internal,
            attachable: true,
            host_index: 1,
            blocks: vec![format!("10.{n}.1.0/24").parse().unwrap()],
            frozen: Vec::new(),
        }
    }

    pub(crate) fn endpoint(n: u8, last: u8, names: &[&str], shared: &[&str], healthy: bool) -> EndpointAssignment {
        EndpointAssignment {
            network: NetworkId::new(format!("net{n}")),
            task: skein_api::TaskId::new(format!("task-{n}-{last}")),
            service: None,
            node: skein_api::NodeId::new("node"),
            names: names.iter().map(|s| s.to_string()).collect(),
            shared_names: shared.iter().map(|s| s.to_string()).collect(),
            v4: Some(Ipv4Addr::new(10, n, 1, last)),
            v6: Some(format!("fd00:0:0:{n:x}::1{last:02x}").parse().unwrap()),
            ports: Vec::new(),
            healthy,
            plain: false,
            draining: false,
        }
    }

    /// A service with virtual address `10.<n>.250.<last>`.
    pub(crate) fn service(n: u8, name: &str, last: u8) -> ServiceAssignment {
        ServiceAssignment {
            network: NetworkId::new(format!("net{n}")),
            service: ServiceId::new(name),
            names: vec![name.into(), format!("stack_{name}")],
            v4: Ipv4Addr::new(10, n, 250, last),
            v6: format!("fd00:0:0:{n:x}::fa{last:02x}").parse().unwrap(),
            ports: Vec::new(),
        }
    }

    pub(crate) fn sample() -> Zone {
        let networks = [network(1, "shop_default", false), network(2, "Back", true), network(3, "dev", false)];
        let endpoints = [
            endpoint(1, 10, &["web.1"], &["web", "tasks.web"], true),
            endpoint(1, 11, &["web.2"], &["web", "tasks.web"], true),
            endpoint(1, 12, &["web.3"], &["web", "tasks.web"], false),
            endpoint(1, 20, &["cron.1"], &["cron"], false),
            endpoint(1, 21, &["api.1"], &["tasks.api"], false),
            endpoint(2, 30, &["db.1", "DB"], &["store"], true),
        ];
        let both = vec![
            (NetworkId::new("net1"), vec!["10.1.1.10".parse().unwrap()]),
            (NetworkId::new("net2"), vec!["10.2.1.31".parse().unwrap()]),
        ];
        Zone::build(&networks, &[service(1, "api", 7)], &endpoints, [both])
    }

    fn v4(last: &[(u8, u8)]) -> NameAnswer {
        NameAnswer::Known(last.iter().map(|(n, l)| IpAddr::V4(Ipv4Addr::new(10, *n, 1, *l))).collect())
    }

    #[test]
    fn names() {
        let zone = sample();
        let check = |net: &str, client: &str, name: &str, family, want: NameAnswer| {
            let got = zone.name(&NetworkId::new(net), client.parse().unwrap(), name, family);
            assert_eq!(got, want, "{net} {client} {name} {family:?}");
        };
        use Family::*;
        check("net1", "10.1.1.11", "web", V4, v4(&[(1, 10), (1, 11)]));
        check("net1", "10.1.1.11", "WEB.", V4, v4(&[(1, 10), (1, 11)]));
        check("net1", "10.1.1.11", "tasks.web", V4, v4(&[(1, 10), (1, 11)]));
        check("net1", "10.1.1.11", "web.3", V4, v4(&[(1, 12)]));
        check("net1", "10.1.1.11", "web.shop_default", V4, v4(&[(1, 10), (1, 11)]));
        check("net1", "10.1.1.11", "tasks.web.shop_default.", V4, v4(&[(1, 10), (1, 11)]));
        // A virtual address stands for its service, whoever is behind it.
        let vip = |text: &str| NameAnswer::Known(vec![text.parse().unwrap()]);
        check("net1", "10.1.1.11", "api", V4, vip("10.1.250.7"));
        check("net1", "10.1.1.11", "Stack_API.shop_default.", V6, vip("fd00:0:0:1::fa07"));
        check("net1", "10.1.1.11", "tasks.api", V4, NameAnswer::Known(vec![]));
        check("net2", "10.2.1.30", "api", V4, NameAnswer::Unknown);
        // Nobody healthy bears the name: it exists all the same.
        check("net1", "10.1.1.11", "cron", V4, NameAnswer::Known(vec![]));
        check("net1", "10.1.1.11", "web", Neither, NameAnswer::Known(vec![]));
        check("net1", "10.1.1.11", "_http._tcp.web", Neither, NameAnswer::Known(vec![]));
        check("net1", "10.1.1.11", "web.1", V6, NameAnswer::Known(vec!["fd00:0:0:1::10a".parse().unwrap()]));
        check("net1", "10.1.1.11", "nobody", V4, NameAnswer::Unknown);
        check("net1", "10.1.1.11", "example.org", V4, NameAnswer::Forward);
        check("net3", "10.3.1.11", "example.dev", V4, NameAnswer::Forward);
        // Names of networks that a client is not attached to do not exist for it.
        check("net1", "10.1.1.11", "db", V4, NameAnswer::Unknown);
        check("net1", "10.1.1.10", "db", V4, v4(&[(2, 30)]));
        check("net1", "10.1.1.10", "db.back", V4, v4(&[(2, 30)]));
        check("net2", "10.2.1.31", "web", V4, v4(&[(1, 10), (1, 11)]));
        check("net2", "10.2.1.31", "example.org", V4, NameAnswer::Forward);
        check("net2", "10.2.1.30", "example.org", V4, NameAnswer::Unknown);
        check("net9", "10.9.1.30", "example.org", V4, NameAnswer::Unknown);
    }

    #[test]
    fn containers_that_were_started_by_hand_take_no_name_of_others() {
        let plain = |last, names: &[&str]| EndpointAssignment { plain: true, ..endpoint(1, last, names, &[], true) };
        let endpoints = [
            plain(40, &["web", "debug"]),
            endpoint(1, 10, &["web.1"], &["web"], true),
            plain(41, &["api", "web.1", "Debug"]),
            plain(42, &["web"]),
        ];
        let zone = Zone::build(&[network(1, "shop", false)], &[service(1, "api", 7)], &endpoints, []);
        let name = |name: &str| zone.name(&NetworkId::new("net1"), "10.1.1.11".parse().unwrap(), name, Family::V4);
        assert_eq!(name("web"), v4(&[(1, 10)]));
        assert_eq!(name("web.1"), v4(&[(1, 10)]));
        assert_eq!(name("api"), NameAnswer::Known(vec!["10.1.250.7".parse().unwrap()]));
        assert_eq!(name("debug"), v4(&[(1, 40), (1, 41)]));
        let of = |last| zone.address(&NetworkId::new("net1"), "10.1.1.11".parse().unwrap(), [10, 1, 1, last].into());
        assert_eq!(of(41), AddressAnswer::Known("debug.shop".into()));
        assert_eq!(of(42), AddressAnswer::Unknown);
    }

    #[test]
    fn servers() {
        use Protocol::{Tcp, Udp};
        let with = |ports: &[(Protocol, u16)], service: Option<&str>, e: EndpointAssignment| EndpointAssignment {
            ports: ports.to_vec(),
            service: service.map(ServiceId::new),
            ..e
        };
        let endpoints = [
            with(&[(Tcp, 80), (Udp, 53)], Some("api"), endpoint(1, 21, &["api.1"], &["tasks.api"], true)),
            with(&[(Tcp, 80)], Some("api"), endpoint(1, 22, &["api.2"], &["tasks.api"], true)),
            with(&[(Tcp, 80)], Some("api"), endpoint(1, 23, &["api.3"], &["tasks.api"], false)),
            with(&[], None, endpoint(1, 24, &["quiet"], &[], true)),
        ];
        let zone = Zone::build(&[network(1, "shop", false)], &[service(1, "api", 7)], &endpoints, []);
        let check = |name: &str, want: &[(u16, &str)]| {
            let got = zone.servers(&NetworkId::new("net1"), "10.1.1.11".parse().unwrap(), name);
            assert_eq!(got, ServerAnswer::Known(want.iter().map(|(p, t)| (*p, t.to_string())).collect()), "{name}");
        };
        check("_80._tcp.api", &[(80, "api.1.shop"), (80, "api.2.shop")]);
        check("_80._TCP.stack_api.shop.", &[(80, "api.1.shop"), (80, "api.2.shop")]);
        check("_53._udp.tasks.api", &[(53, "api.1.shop")]);
        check("api", &[(80, "api.1.shop"), (80, "api.2.shop"), (53, "api.1.shop")]);
        check("_80._tcp.api.2", &[(80, "api.2.shop")]);
        check("_53._tcp.api", &[]);
        check("_http._tcp.api", &[]);
        check("_80._tcp.quiet", &[]);
        let other = |name: &str| zone.servers(&NetworkId::new("net1"), "10.1.1.11".parse().unwrap(), name);
        assert_eq!(other("nobody"), ServerAnswer::Unknown);
        assert_eq!(other("_80._tcp.nobody"), ServerAnswer::Forward);
        assert_eq!(other("_xmpp._tcp.example.org"), ServerAnswer::Forward);
    }

    #[test]
    fn addresses() {
        let zone = sample();
        let check = |net: &str, client: &str, address: &str, want: AddressAnswer| {
            let got = zone.address(&NetworkId::new(net), client.parse().unwrap(), address.parse().unwrap());
            assert_eq!(got, want, "{net} {client} {address}");
        };
        let known = |s: &str| AddressAnswer::Known(s.into());
        check("net1", "10.1.1.11", "10.1.1.10", known("web.1.shop_default"));
        check("net1", "10.1.1.11", "fd00:0:0:1::10a", known("web.1.shop_default"));
        check("net1", "10.1.1.11", "10.1.250.7", known("api.shop_default"));
        check("net1", "10.1.1.11", "fd00:0:0:1::fa07", known("api.shop_default"));
        check("net1", "10.1.1.11", "10.1.0.1", known("gateway.shop_default"));
        check("net1", "10.1.1.10", "10.2.1.30", known("db.1.back"));
        check("net1", "10.1.1.11", "10.2.1.30", AddressAnswer::Unknown);
        check("net1", "10.1.1.11", "10.1.1.99", AddressAnswer::Unknown);
        check("net1", "10.1.1.11", "192.0.2.1", AddressAnswer::Forward);
        check("net2", "10.2.1.30", "192.0.2.1", AddressAnswer::Unknown);
    }
}

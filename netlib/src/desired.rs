//! Owns what the layout is: from the caller's words to links, routes, neighbours and rules.
//!
//! ```text
//!  container            fabric of the network (own namespace)                      host's namespace
//!  eth0 10.57.1.7/32 == skv-0a390107   lo 10.57.0.1/32
//!                         10.57.1.7/32 dev skv-0a390107
//!                         10.57.2.0/24 nhid -> fe80::53:2 dev skvx  ~~~ VXLAN ~~~> UDP from the host's VTEP
//!                         unreachable 10.57.0.0/16 metric 9000
//!                         default via 169.254.83.1 dev skup ===================== ske-<vni>
//!                                                                                  10.57.1.0/24 via 169.254.83.2
//! ```
//!
//! IPv4 prefixes use the IPv6 next hop of their host (RFC 5549), so that one next hop object, one neighbour and one
//! forwarding entry per remote host serve both families. Pure. No tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    fast::{Fast, Local, Program, Role, Way},
    names,
    nft::{Chain, Hook, Set, Table},
    state::{Desired, LinkMake, LinkSpec, Nexthop, Owned, Route, RouteKey, SysctlIf, Target, VethPeer, Vxlan},
    types::{Endpoint, HostConfig, HostState, Ingress, InvalidState, NetworkState, PublishedPort},
};

/// Sysctls of a fabric. `rp_filter` of a link is the larger of `all` and its own, which it inherits from `default` when
/// it is made: 0 and 1 make every veth strict. Redirects would tell containers about neighbours they cannot reach. A new
/// namespace inherits IPv4 settings from the first one: `arp_ignore` there would keep the gateway on `lo` silent.
const FABRIC_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/conf/all/arp_ignore", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/arp_ignore", "0"),
    ("net/ipv4/conf/default/rp_filter", "1"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
];

/// The part of a network that lives in its fabric. `host_addrs` are the host's own addresses: a container that sends to
/// one of them at a published port is answered inside the fabric, else the answer would come back untranslated.
///
/// # Errors
/// When the state contradicts itself.
pub fn fabric(
    config: &HostConfig,
    state: &NetworkState,
    host_addrs: &BTreeSet<IpAddr>,
) -> Result<Desired, InvalidState> {
    state.validate(config)?;
    let mut want = Desired::empty(Owned::Fabric);
    want.sysctls = FABRIC_SYSCTLS.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned())).collect();
    add_gateway(&mut want, state);
    add_vxlan(&mut want, config, state);
    if !state.internal {
        add_uplink(&mut want, state);
    }
    for endpoint in state.endpoints.values() {
        add_endpoint(&mut want, state, endpoint);
    }
    if config.fast_path {
        want.fast = fast(config, state, host_addrs);
    }
    want.table = Some(fabric_table(config, state, host_addrs));
    Ok(want)
}

/// The rules of a fabric and nothing else of it: for a change of services, where the links need not be read.
///
/// # Errors
/// When the state contradicts itself.
pub fn fabric_rules(
    config: &HostConfig,
    state: &NetworkState,
    host_addrs: &BTreeSet<IpAddr>,
) -> Result<Desired, InvalidState> {
    state.validate(config)?;
    let mut want = Desired::empty(Owned::FabricRules);
    want.table = Some(fabric_table(config, state, host_addrs));
    Ok(want)
}

fn host_net(addr: IpAddr) -> IpNet {
    IpNet::from(addr)
}

fn add_gateway(want: &mut Desired, state: &NetworkState) {
    want.links.insert("lo".to_owned(), LinkSpec { make: LinkMake::Elsewhere, mac: None, mtu: None });
    // IPv6 too: there the agent's servers bind, also while no container is here.
    for gateway in [Some(IpAddr::V4(state.gateway4)), state.gateway6.map(IpAddr::V6)].into_iter().flatten() {
        want.addrs.insert(("lo".to_owned(), host_net(gateway)));
    }
    for subnet in [Some(IpNet::V4(state.subnet4)), state.subnet6.map(IpNet::V6)].into_iter().flatten() {
        let key = RouteKey { dst: subnet.trunc(), metric: names::UNREACHABLE_METRIC };
        want.routes.insert(key, Route::ours(Target::Unreachable));
    }
}

fn add_vxlan(want: &mut Desired, config: &HostConfig, state: &NetworkState) {
    let vxlan = Vxlan {
        vni: state.vni,
        local: config.vtep,
        port: config.vxlan_port,
        ttl: config.vxlan_ttl,
        dev: config.underlay_dev.clone(),
    };
    let dev = names::VXLAN_IFNAME.to_owned();
    let mac = names::vtep_mac(state.vni, config.host);
    want.links.insert(dev.clone(), LinkSpec { make: LinkMake::Vxlan(vxlan), mac: Some(mac), mtu: Some(state.mtu) });
    for (host, peer) in &state.peers {
        let (via, mac, id) = (names::host_nexthop(*host), names::vtep_mac(state.vni, *host), names::nexthop_id(*host));
        want.neighs.insert((dev.clone(), via), mac);
        want.fdb.insert((dev.clone(), mac), peer.vtep);
        want.nexthops.insert(id, Nexthop { dev: dev.clone(), via, protocol: names::RTPROT_SKEIN });
        for block in &peer.blocks {
            let route = Route { mtu: peer.mtu, ..Route::ours(Target::Nexthop(id)) };
            want.routes.insert(RouteKey::new(*block), route);
        }
    }
}

fn default_net(v4: bool) -> IpNet {
    if v4 { IpNet::V4(Ipv4Net::default()) } else { IpNet::V6(Ipv6Net::default()) }
}

fn add_uplink(want: &mut Desired, state: &NetworkState) {
    let dev = names::UPLINK_IFNAME.to_owned();
    let peer = VethPeer { name: names::host_uplink_ifname(state.vni), mac: names::uplink_host_mac(state.vni) };
    let spec = LinkSpec {
        make: LinkMake::VethPair(peer),
        mac: Some(names::uplink_fabric_mac(state.vni)),
        mtu: Some(state.mtu),
    };
    want.links.insert(dev.clone(), spec);
    let mut vias = vec![IpAddr::V4(names::UPLINK_HOST_V4)];
    vias.extend(state.subnet6.map(|_| IpAddr::V6(names::UPLINK_HOST_V6)));
    for via in vias {
        want.neighs.insert((dev.clone(), via), names::uplink_host_mac(state.vni));
        let target = Target::Dev { dev: dev.clone(), via: Some(via) };
        want.routes.insert(RouteKey::new(default_net(via.is_ipv4())), Route::ours(target));
    }
}

/// Adds what one container needs in the fabric. The same for a whole network and for the fast path of one container.
pub(crate) fn add_endpoint(want: &mut Desired, state: &NetworkState, endpoint: &Endpoint) {
    let dev = endpoint.fabric_ifname();
    let mtu = Some(endpoint.mtu.unwrap_or(state.mtu));
    let spec = LinkSpec { make: LinkMake::Elsewhere, mac: Some(names::gateway_mac(state.vni)), mtu };
    want.links.insert(dev.clone(), spec);
    // Neighbour discovery for an address on lo is not answered: each veth needs the gateway itself.
    if let (Some(gateway), Some(_)) = (state.gateway6, endpoint.addr6) {
        want.addrs.insert((dev.clone(), host_net(IpAddr::V6(gateway))));
    }
    for addr in endpoint.addrs() {
        want.neighs.insert((dev.clone(), addr), endpoint.mac);
        let target = Target::Dev { dev: dev.clone(), via: None };
        want.routes.insert(RouteKey::new(host_net(addr)), Route::ours(target));
    }
}

/// The fast path of a fabric. `None` where a virtual address lies in a block of some host: the programs would take it for
/// a container's. The master gives none such.
fn fast(config: &HostConfig, state: &NetworkState, host_addrs: &BTreeSet<IpAddr>) -> Option<Fast> {
    let blocks = || state.local_blocks.iter().chain(state.peers.values().flat_map(|peer| &peer.blocks));
    if state.services.keys().any(|vip| blocks().any(|block| block.contains(vip))) {
        return None;
    }
    let tunnel = names::VXLAN_IFNAME;
    let mut fast = Fast { careful: !state.services.is_empty(), ..Fast::default() };
    fast.ways.extend(state.subnet6.map(|subnet| (IpNet::V6(subnet.trunc()), Way::Nobody)));
    fast.ways.insert(IpNet::V4(state.subnet4.trunc()), Way::Nobody);
    // A port of every host that a container asks here may lead to another host, as a virtual address does. Addresses of
    // one link are not reached through another.
    let reached = |addr: &&IpAddr| !addr.is_loopback() && !matches!(addr, IpAddr::V6(a) if a.is_unicast_link_local());
    fast.ways.extend(host_addrs.iter().filter(reached).map(|addr| (host_net(*addr), Way::Nobody)));
    for (host, peer) in &state.peers {
        let way = match peer.mtu {
            None => Way::Peer { dev: tunnel.to_owned(), mac: names::vtep_mac(state.vni, *host) },
            // The routed way knows what fits, and tells who sends too much.
            Some(_) => Way::Here,
        };
        fast.ways.extend(peer.blocks.iter().map(|block| (*block, way.clone())));
    }
    fast.ways.extend(state.local_blocks.iter().map(|block| (*block, Way::Here)));
    for gateway in [Some(IpAddr::V4(state.gateway4)), state.gateway6.map(IpAddr::V6)].into_iter().flatten() {
        fast.ways.insert(host_net(gateway), Way::Here);
    }
    let source = names::gateway_mac(state.vni);
    fast.programs.insert(tunnel.to_owned(), Program { role: Role::In, source, mtu: state.mtu });
    for endpoint in state.endpoints.values() {
        add_fast(&mut fast, config, state, endpoint);
    }
    Some(fast)
}

/// Adds a container to the fast path.
pub(crate) fn add_fast(fast: &mut Fast, config: &HostConfig, state: &NetworkState, endpoint: &Endpoint) {
    let dev = endpoint.fabric_ifname();
    let source = names::vtep_mac(state.vni, config.host);
    fast.programs.insert(dev.clone(), Program { role: Role::Out, source, mtu: state.mtu });
    let local = Local { dev, mac: endpoint.mac };
    fast.locals.extend(endpoint.addrs().map(|addr| (addr, local.clone())));
}

/// A TCP connection is told of the smallest MTU on its way when it begins, in both directions: to other hosts by the
/// route's MTU, out of the cluster by the host's. Without it large answers depend on ICMP, which many networks drop.
const CLAMP: &str = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu";

fn chain(kind: &str, hook: &str, priority: i32, rules: Vec<String>) -> Chain {
    Chain { hook: Hook { kind: kind.to_owned(), hook: hook.to_owned(), priority }, rules }
}

fn fabric_table(config: &HostConfig, state: &NetworkState, host_addrs: &BTreeSet<IpAddr>) -> Table {
    let (container, uplink, port) = (names::ENDPOINT_PREFIX, names::UPLINK_IFNAME, config.vxlan_port);
    let mut table = Table { name: names::NFT_TABLE, sets: BTreeMap::new(), chains: BTreeMap::new() };
    // IPv4 has rp_filter for this; IPv6 has not. "::" is duplicate address detection, never forwarded.
    let spoof = format!(
        "iifname \"{container}*\" meta nfproto ipv6 ip6 saddr != {{ ::, fe80::/10 }} fib saddr . iif oif eq 0 counter drop"
    );
    table.chains.insert("spoof", chain("filter", "prerouting", -300, vec![spoof]));
    // Egress is masqueraded as the host, which is a VTEP that peers trust: VXLAN must not get that far.
    let inject = format!("oifname \"{uplink}\" udp dport {port} counter drop");
    table.chains.insert("inject", chain("filter", "forward", 0, vec![inject]));
    table.chains.insert("mss", chain("filter", "forward", 10, vec![CLAMP.to_owned()]));
    // Without published ports and services no rule here touches conntrack, and connections are not tracked.
    let mut targets = BTreeSet::new();
    let publishes = !state.internal && !state.published.is_empty();
    let ingress = state.ingress.as_ref().filter(|ingress| !state.internal && !ingress.ports.is_empty());
    if publishes || ingress.is_some() {
        add_host_addrs(&mut table, host_addrs);
    }
    if publishes {
        add_publish_sets(&mut table, &state.published);
        add_hairpin(&mut table);
        targets.extend(state.published.iter().map(|port| port.target));
    }
    let local: BTreeSet<IpAddr> = state.endpoints.values().flat_map(Endpoint::addrs).collect();
    if !state.services.is_empty() {
        add_services(&mut table, state);
        targets.extend(state.services.values().flat_map(|service| service.backends.intersection(&local)));
    }
    if let Some(ingress) = ingress {
        add_ingress(&mut table, state, ingress, &local);
    }
    if !state.services.is_empty() || table.chains.contains_key("publish") {
        add_own(&mut table, state, &targets);
    }
    table
}

/// Services: where they lead is one map per family, from the virtual address and a number to a backend. A connection
/// draws its number in a range that belongs to the number of backends, so one rule serves all services that have as
/// many; of the others it finds nothing and falls through to the next. Shape: one element per backend, one rule per
/// different number of backends; a connection looks as often.
///
/// Everything that connection tracking knows is translated, ping too. What could not be is refused.
fn add_services(table: &mut Table, state: &NetworkState) {
    let container = names::ENDPOINT_PREFIX;
    let mut vips = [Set::plain("ipv4_addr"), Set::plain("ipv6_addr")];
    let mut backends = [Set::numbered(false), Set::numbered(true)];
    let mut counts = [BTreeSet::new(), BTreeSet::new()];
    for (vip, service) in &state.services {
        let six = usize::from(vip.is_ipv6());
        vips[six].elements.insert(vip.to_string(), String::new());
        let count = service.backends.len();
        if count > 0 {
            counts[six].insert(count);
        }
        for (nth, backend) in service.backends.iter().enumerate() {
            let number = first_number(count) + nth;
            backends[six].elements.insert(format!("{vip} . {number}"), backend.to_string());
        }
    }
    let (mut lead, mut refuse) = (Vec::new(), Vec::new());
    for (six, (ip, v)) in [("ip", "4"), ("ip6", "6")].into_iter().enumerate() {
        lead.push(format!("iifname \"{container}*\" {ip} daddr != @vips{v} accept"));
        lead.extend(counts[six].iter().map(|count| {
            let number = format!("numgen random mod {count} offset {}", first_number(*count));
            format!("iifname \"{container}*\" dnat {ip} to {ip} daddr . {number} map @backends{v}")
        }));
        // After translation: what still is to go to a virtual address has nowhere to go.
        refuse.push(format!("{ip} daddr @vips{v} meta l4proto tcp reject with tcp reset"));
        refuse.push(format!("{ip} daddr @vips{v} reject with icmpx port-unreachable"));
    }
    let ([vips4, vips6], [backends4, backends6]) = (vips, backends);
    table.sets.extend([("vips4", vips4), ("vips6", vips6), ("backends4", backends4), ("backends6", backends6)]);
    table.chains.insert("service", chain("nat", "prerouting", -106, lead));
    table.chains.insert("refuse", chain("filter", "prerouting", -95, refuse));
}

/// The first number of the backends of a service that has `count` of them, 1 to [`crate::types::BACKENDS_MAX`]: the
/// count in the high half of 32 bits, where 65,536 is 0, which no service without backends takes.
fn first_number(count: usize) -> usize {
    (count & 0xffff) << 16
}

/// Ports of every host. What comes from outside was led by the host's own rules to this host's address in the network,
/// with the number of the port; a container here asks for an address of the host. Both are led to a backend, one on this
/// host if there is any: then the client's address is seen. To a backend elsewhere goes this host's address in the
/// network as the source, since the answers must come back by here. The map is like that of the services, from protocol,
/// port and a number.
fn add_ingress(table: &mut Table, state: &NetworkState, ingress: &Ingress, local: &BTreeSet<IpAddr>) {
    let (container, uplink, vxlan) = (names::ENDPOINT_PREFIX, names::UPLINK_IFNAME, names::VXLAN_IFNAME);
    let mut ports = Set::plain("inet_proto . inet_service");
    ports.elements.extend(ingress.ports.keys().map(|(proto, port)| (format!("{proto} . {port}"), String::new())));
    let (mut lead, mut refuse, mut back) = (Vec::new(), Vec::new(), Vec::new());
    for addr in ingress.addrs() {
        let six = addr.is_ipv6();
        let (ip, v) = if six { ("ip6", 6) } else { ("ip", 4) };
        let mut map = Set::numbered_ports(six);
        let mut counts = BTreeSet::new();
        for ((proto, number), port) in &ingress.ports {
            let service = port.vip(six).and_then(|vip| state.services.get(&vip));
            let backends: Vec<IpAddr> = service.map(|service| preferred(&service.backends, local)).unwrap_or_default();
            counts.extend(Some(backends.len()).filter(|count| *count > 0));
            for (nth, backend) in backends.iter().enumerate() {
                let key = format!("{proto} . {number} . {}", first_number(backends.len()) + nth);
                map.elements.insert(key, format!("{backend} . {}", port.target_port));
            }
        }
        table.sets.insert(if six { "ingress6" } else { "ingress4" }, map);
        let from = [
            format!("iifname \"{uplink}\" {ip} daddr {addr}"),
            format!("iifname \"{container}*\" {ip} daddr @host{v}"),
        ];
        for from in &from {
            lead.extend(counts.iter().map(|count| {
                let number = format!("numgen random mod {count} offset {}", first_number(*count));
                let key = format!("meta l4proto . th dport . {number}");
                format!("{from} meta l4proto {{ tcp, udp }} dnat {ip} to {key} map @ingress{v}")
            }));
            // After translation: what still asks for the port has nowhere to go.
            let asks = format!("{from} meta l4proto . th dport @ports");
            refuse.push(format!("{asks} meta l4proto tcp reject with tcp reset"));
            refuse.push(format!("{asks} reject with icmpx port-unreachable"));
        }
        back.push(format!("oifname \"{vxlan}\" ct status dnat ct original {ip} daddr {addr} snat {ip} to {addr}"));
    }
    table.sets.insert("ports", ports);
    table.chains.insert("ingress", chain("nat", "prerouting", -104, lead));
    table.chains.insert("refuse_ingress", chain("filter", "prerouting", -94, refuse));
    table.chains.insert("back", chain("nat", "postrouting", 94, back));
}

/// The backends on this host, or all of them where none is.
fn preferred(backends: &BTreeSet<IpAddr>, local: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
    let here: Vec<IpAddr> = backends.intersection(local).copied().collect();
    if here.is_empty() { backends.iter().copied().collect() } else { here }
}

fn add_host_addrs(table: &mut Table, host_addrs: &BTreeSet<IpAddr>) {
    let mut sets = [Set::plain("ipv4_addr"), Set::plain("ipv6_addr")];
    for addr in host_addrs {
        sets[usize::from(addr.is_ipv6())].elements.insert(addr.to_string(), String::new());
    }
    let [host4, host6] = sets;
    table.sets.extend([("host4", host4), ("host6", host6)]);
}

fn add_hairpin(table: &mut Table) {
    let container = names::ENDPOINT_PREFIX;
    let mut publish = Vec::new();
    for (ip, six) in [("ip", false), ("ip6", true)] {
        let host = if six { "host6" } else { "host4" };
        let from = format!("iifname \"{container}*\" {ip} daddr @{host} meta l4proto {{ tcp, udp }}");
        publish.extend(publish_rules(&from, six));
    }
    table.chains.insert("publish", chain("nat", "prerouting", -105, publish));
}

/// The way back for containers of this host, `targets`, that are led to themselves.
fn add_own(table: &mut Table, state: &NetworkState, targets: &BTreeSet<IpAddr>) {
    let mut selves = [Set::plain("ipv4_addr . ipv4_addr"), Set::plain("ipv6_addr . ipv6_addr")];
    for addr in targets {
        selves[usize::from(addr.is_ipv6())].elements.insert(format!("{addr} . {addr}"), String::new());
    }
    let [self4, self6] = selves;
    table.sets.extend([("self4", self4), ("self6", self6)]);
    // A container that calls itself would answer itself directly; the gateway as source brings the answer back here.
    let mut own = vec![format!("ct status dnat ip saddr . ip daddr @self4 snat ip to {}", state.gateway4)];
    if let Some(gateway) = state.gateway6 {
        own.push(format!("ct status dnat ip6 saddr . ip6 daddr @self6 snat ip6 to {gateway}"));
    }
    table.chains.insert("own", chain("nat", "postrouting", 95, own));
}

/// The two translations of a family, one address first, then every address. A look-up that finds nothing falls through.
fn publish_rules(from: &str, six: bool) -> [String; 2] {
    let (ip, v) = if six { ("ip6", 6) } else { ("ip", 4) };
    [
        format!("{from} dnat {ip} to {ip} daddr . meta l4proto . th dport map @one{v}"),
        format!("{from} dnat {ip} to meta l4proto . th dport map @any{v}"),
    ]
}

fn add_publish_sets(table: &mut Table, ports: &BTreeSet<PublishedPort>) {
    let mut one4 = Set::map("ipv4_addr . inet_proto . inet_service", "ipv4_addr . inet_service");
    let mut one6 = Set::map("ipv6_addr . inet_proto . inet_service", "ipv6_addr . inet_service");
    let mut any4 = Set::map("inet_proto . inet_service", "ipv4_addr . inet_service");
    let mut any6 = Set::map("inet_proto . inet_service", "ipv6_addr . inet_service");
    // Those that drain stand in no map: open connections know their way.
    for PublishedPort { proto, host_ip, host_port, target, target_port, .. } in ports.iter().filter(|p| !p.draining) {
        let value = format!("{target} . {target_port}");
        match (host_ip, target.is_ipv4()) {
            (None, v4) => {
                let map = if v4 { &mut any4 } else { &mut any6 };
                map.elements.insert(format!("{proto} . {host_port}"), value)
            }
            (Some(ip), v4) => {
                let map = if v4 { &mut one4 } else { &mut one6 };
                map.elements.insert(format!("{ip} . {proto} . {host_port}"), value)
            }
        };
    }
    table.sets.extend([("one4", one4), ("one6", one6), ("any4", any4), ("any6", any6)]);
}

/// The host's end of a network's uplink: up, with a neighbour and the routes to what lives on this host. `None` for an
/// internal network. `ipv6` says whether the host lets that link have IPv6.
pub fn uplink(state: &NetworkState, ipv6: bool) -> Option<Desired> {
    if state.internal {
        return None;
    }
    let dev = names::host_uplink_ifname(state.vni);
    let mut want = Desired::empty(Owned::Uplink(dev.clone()));
    // For calls to a published port of 127.0.0.1, see [`host_rules`]. A container cannot abuse it: a packet to 127/8 is
    // martian in the fabric and never gets here.
    want.sysctls.insert(format!("net/ipv4/conf/{dev}/route_localnet"), "1".to_owned());
    let spec =
        LinkSpec { make: LinkMake::Elsewhere, mac: Some(names::uplink_host_mac(state.vni)), mtu: Some(state.mtu) };
    want.links.insert(dev.clone(), spec);
    let ipv6 = ipv6 && state.subnet6.is_some();
    let mut vias = vec![IpAddr::V4(names::UPLINK_FABRIC_V4)];
    if ipv6 {
        vias.push(IpAddr::V6(names::UPLINK_FABRIC_V6));
    }
    for via in vias {
        want.neighs.insert((dev.clone(), via), names::uplink_fabric_mac(state.vni));
        for block in state.local_blocks.iter().filter(|block| block.addr().is_ipv4() == via.is_ipv4()) {
            let target = Target::Dev { dev: dev.clone(), via: Some(via) };
            want.routes.insert(RouteKey::new(*block), Route::ours(target));
        }
    }
    Some(want)
}

/// The host's sysctls, nft table and `DOCKER-USER` rules.
///
/// Published ports work for everybody who reaches an address of the host, with the true client address, and for the
/// host itself. A call to 127.0.0.1 works through `route_localnet` on our uplinks only (not on any other device) and is
/// masqueraded, since 127.0.0.1 cannot be a source on the wire. A call to `::1` does not work: IPv6 has no such switch.
///
/// # Errors
/// When the state contradicts itself.
pub fn host_rules(config: &HostConfig, state: &HostState) -> Result<Desired, InvalidState> {
    state.validate()?;
    let mut want = Desired::empty(Owned::HostRules);
    want.sysctls.insert("net/ipv4/ip_forward".to_owned(), "1".to_owned());
    if state.ipv6 {
        let forwarding = "net/ipv6/conf/all/forwarding".to_owned();
        want.sysctls.insert(forwarding.clone(), "1".to_owned());
        // A forwarding host ignores router advertisements unless told otherwise, and would lose its default route.
        want.sysctl_if = Some(SysctlIf {
            trigger: forwarding,
            pattern: "net/ipv6/conf/*/accept_ra".to_owned(),
            from: "1".to_owned(),
            to: "2".to_owned(),
        });
    }
    want.table = Some(host_table(config, state));
    want.docker_user = true;
    Ok(want)
}

/// Rules for VXLAN that comes to this host, and for VXLAN that it forwards. What they cannot see: a process in the host's
/// own namespace, a container with the host's network among them, sends as the host does.
fn vxlan_guards(port: u16) -> (Vec<String>, Vec<String>) {
    let guard = vec![
        format!("udp dport {port} meta nfproto ipv4 ip saddr != @vteps4 counter drop"),
        format!("udp dport {port} meta nfproto ipv6 ip6 saddr != @vteps6 counter drop"),
        // A container of the engine's own networks may send raw packets, with a VTEP as source. Only where containers
        // and virtual machines are plugged in: a real underlay may well be asymmetric.
        format!("meta iifkind {{ \"bridge\", \"veth\" }} udp dport {port} fib saddr . iif oif eq 0 counter drop"),
    ];
    // The engine masquerades its own containers as the host, which is a VTEP that peers trust. In this hook the
    // destination is the final one, and translation of the source is still to come. A known VTEP behind this host (a
    // virtual machine) may pass, if its address is routed to where the packet came from.
    let inject = ["4", "6"].map(|v| {
        let ip = if v == "4" { "ip" } else { "ip6" };
        [
            format!("udp dport {port} {ip} saddr @vteps{v} fib saddr . iif oif ne 0 accept"),
            format!("udp dport {port} {ip} daddr @vteps{v} counter drop"),
        ]
    });
    (guard, inject.concat())
}

fn host_table(config: &HostConfig, state: &HostState) -> Table {
    let (up, port) = (names::HOST_UPLINK_PREFIX, config.vxlan_port);
    let mut table = Table { name: names::NFT_TABLE, sets: BTreeMap::new(), chains: BTreeMap::new() };
    let mut vteps = [Set::plain("ipv4_addr"), Set::plain("ipv6_addr")];
    for vtep in &state.vteps {
        vteps[usize::from(vtep.is_ipv6())].elements.insert(vtep.to_string(), String::new());
    }
    let [vteps4, vteps6] = vteps;
    table.sets.extend([("vteps4", vteps4), ("vteps6", vteps6)]);
    add_publish_sets(&mut table, &state.published);

    let (guard, inject) = vxlan_guards(port);
    table.chains.insert("vxlan", chain("filter", "input", -5, guard));
    table.chains.insert("inject", chain("filter", "forward", -10, inject));
    // Into a network only what was asked for from inside or goes to a published port; networks do not see each other.
    let into = vec![
        format!("oifname \"{up}*\" ct state established,related accept"),
        format!("oifname \"{up}*\" ct status dnat accept"),
        format!("oifname \"{up}*\" counter drop"),
    ];
    table.chains.insert("into", chain("filter", "forward", -5, into));
    let clamp = ["iifname", "oifname"].map(|way| format!("{way} \"{up}*\" {CLAMP}"));
    table.chains.insert("mss", chain("filter", "forward", 10, clamp.to_vec()));
    // Translated before the kernel looks whether 127/8 may come from there at all: a neighbour that sends a packet to
    // 127.0.0.1 by our Ethernet address would reach what is published there for this host alone. Left as it is, the
    // packet is a martian. (IPv6 drops `::1` before any hook.)
    let mut publish = vec!["iifname != \"lo\" ip daddr 127.0.0.0/8 accept".to_owned()];
    publish.extend(publish_rules("fib daddr type local meta l4proto { tcp, udp }", false));
    publish.extend(publish_rules("fib daddr type local meta l4proto { tcp, udp }", true));
    table.chains.insert("publish", chain("nat", "prerouting", -105, publish));
    let mut publish_own = publish_rules("fib daddr type local meta l4proto { tcp, udp }", false).to_vec();
    publish_own.extend(publish_rules("ip6 daddr != ::1 fib daddr type local meta l4proto { tcp, udp }", true));
    table.chains.insert("publish_own", chain("nat", "output", -105, publish_own));
    let egress = vec![
        format!("oifname \"{up}*\" ip saddr 127.0.0.0/8 masquerade"),
        format!("iifname \"{up}*\" oifname != \"{up}*\" masquerade"),
    ];
    table.chains.insert("egress", chain("nat", "postrouting", 95, egress));
    table
}

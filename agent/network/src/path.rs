//! The way of a packet through this host: each hop wanted beside found, judged.
//!
//! Owns: which entries of the kernel a packet between two containers needs, in their order, and the words for each that
//! is not as it should be. Must not know: how the kernel is read. Pure; no tasks, no channels.
//!
//! ```text
//! container  guard      route  next hop  neighbour  forwarding  VXLAN    host's    route   neighbour  container
//! eth0     ─ skv-… ──▶  block ─▶ nhid ───▶ MAC ────▶ VTEP ────▶ device ─▶ guard ──▶ /32 ───▶ MAC ────▶ eth0
//! └──────────────────── the first host ────────────────────────────────┘ └──────── the other host ────────────┘
//! ```

use std::net::{IpAddr, SocketAddr};

use netlib::{
    Endpoint,
    look::Look,
    names,
    state::{Desired, Link, LinkSpec, Observed, Route, RouteKey, Target},
};
use skein_api::Hop;

/// What is done about an entry of ours that is not as it should be.
const REPAIRS_ITSELF: &str = "the agent puts it right within a second; if it stays so, `skein net status` and the log of \
                              the agent on that host say why";

/// What is done about one that was never wanted.
const NOT_TOLD: &str = "the host has not been told yet: `skein net status` shows whether it follows the master";

/// Compares one entry.
fn entry<T: PartialEq>(hop: &str, what: &str, want: Option<&T>, found: Option<&T>, text: impl Fn(&T) -> String) -> Hop {
    let say = |value: Option<&T>| value.map_or_else(|| "none".to_owned(), &text);
    let words = (say(want), say(found));
    match (want, found) {
        (Some(a), Some(b)) if a == b => Hop::fine(hop, words.0, words.1),
        (None, _) => Hop::broken(hop, words, format!("it knows no {what}"), NOT_TOLD),
        (Some(_), None) => Hop::broken(hop, words, format!("the {what} is gone"), REPAIRS_ITSELF),
        (Some(_), Some(_)) => {
            let fault = format!("the {what} is wrong: {} instead of {}", words.1, words.0);
            Hop::broken(hop, words, fault, REPAIRS_ITSELF)
        }
    }
}

fn target_text(target: &Target) -> String {
    match target {
        Target::Nexthop(id) => format!("next hop {id}"),
        Target::Dev { dev, via: Some(via) } => format!("via {via} on {dev}"),
        Target::Dev { dev, via: None } => format!("on {dev}"),
        Target::Unreachable => "unreachable".to_owned(),
        Target::Other => "some other way".to_owned(),
    }
}

/// The route that an address takes: the longest prefix, then the smallest metric.
fn route_to<'a>(
    routes: impl IntoIterator<Item = (&'a RouteKey, &'a Route)>,
    to: IpAddr,
) -> Option<(&'a RouteKey, &'a Route)> {
    let holds = |key: &RouteKey| key.dst.contains(&to);
    routes.into_iter().filter(|(key, _)| holds(key)).max_by_key(|(key, _)| (key.dst.prefix_len(), !key.metric))
}

/// The network's devices and rules in this host, which every packet needs.
fn common(look: &Look) -> Vec<Hop> {
    vec![link(look, names::VXLAN_IFNAME, "VXLAN device"), rules(look), sysctls(look)]
}

fn link(look: &Look, name: &str, what: &str) -> Hop {
    let hop = if name == names::VXLAN_IFNAME { "vxlan device" } else { "container's link" };
    let Some(want) = look.want.links.get(name) else {
        return Hop::broken(hop, ("none", "none"), format!("it knows no {what}"), NOT_TOLD);
    };
    let found = look.found.links.get(name);
    let wanted = link_text(name, want);
    let Some(found) = found else {
        let repair = if name == names::VXLAN_IFNAME {
            REPAIRS_ITSELF
        } else {
            "restart the container: the other end of its link was in it"
        };
        return Hop::broken(hop, (wanted, "none"), format!("the {what} {name} is gone"), repair);
    };
    match link_fault(want, found) {
        None => Hop::fine(hop, wanted.clone(), wanted),
        Some(fault) => {
            let words = (wanted, format!("{name}, {fault}"));
            Hop::broken(hop, words, format!("the {what} {name} is {fault}"), REPAIRS_ITSELF)
        }
    }
}

fn link_text(name: &str, want: &LinkSpec) -> String {
    let mac = want.mac.map(|mac| format!(", {mac}")).unwrap_or_default();
    let mtu = want.mtu.map(|mtu| format!(", mtu {mtu}")).unwrap_or_default();
    format!("{name}, up{mac}{mtu}")
}

fn link_fault(want: &LinkSpec, found: &Link) -> Option<String> {
    if !found.up {
        return Some("down".to_owned());
    }
    if let netlib::state::LinkMake::Vxlan(vxlan) = &want.make
        && found.kind != netlib::state::LinkKind::Vxlan(vxlan.clone())
    {
        return Some(format!("not the one of vni {} from {}", vxlan.vni, vxlan.local));
    }
    if let Some(mac) = want.mac.filter(|mac| *mac != found.mac) {
        return Some(format!("{} instead of {mac}", found.mac));
    }
    want.mtu.filter(|mtu| *mtu != found.mtu).map(|mtu| format!("of mtu {} instead of {mtu}", found.mtu))
}

fn rules(look: &Look) -> Hop {
    let want = look.want.table.as_ref().map(netlib::nft::Table::view);
    let said = |good: bool| if good { "table inet skein as wanted" } else { "another one" };
    match (&want, &look.found.table) {
        (want, found) if want == found => Hop::fine("rules", said(true), said(true)),
        (_, None) => Hop::broken("rules", (said(true), "none"), "the rules of the network are gone", REPAIRS_ITSELF),
        _ => Hop::broken("rules", (said(true), said(false)), "the rules of the network were changed", REPAIRS_ITSELF),
    }
}

fn sysctls(look: &Look) -> Hop {
    let differs = look.want.sysctls.iter().find(|(path, value)| look.found.sysctls.get(*path) != Some(value));
    match differs {
        None => Hop::fine("forwarding", "sysctls as wanted", "sysctls as wanted"),
        Some((path, value)) => {
            let name = path.replace('/', ".");
            let found = look.found.sysctls.get(path).cloned().unwrap_or_else(|| "none".to_owned());
            let words = (format!("{name} = {value}"), format!("{name} = {found}"));
            Hop::broken("forwarding", words, format!("sysctl {name} is {found} instead of {value}"), REPAIRS_ITSELF)
        }
    }
}

/// A container of this host: its link, its neighbour and its route, in that order.
fn local(look: &Look, endpoint: &Endpoint, address: IpAddr) -> Vec<Hop> {
    let dev = endpoint.fabric_ifname();
    let key = (dev.clone(), address);
    vec![
        link(look, &dev, "container's link"),
        entry(
            "container's neighbour",
            &format!("neighbour {address} on {dev}"),
            look.want.neighs.get(&key),
            look.found.neighs.get(&key),
            |mac| format!("{address} at {mac}"),
        ),
        route(look, "container's route", address),
    ]
}

fn route(look: &Look, hop: &str, to: IpAddr) -> Hop {
    let text = |(key, route): &(&RouteKey, &Route)| format!("{} {}", key.dst, target_text(&route.target));
    let (want, found) = (route_to(&look.want.routes, to), route_to(&look.found.routes, to));
    let leads = |route: &Route| route.target != Target::Unreachable;
    let say = |value: &Option<(&RouteKey, &Route)>| value.as_ref().map_or_else(|| "none".to_owned(), text);
    let words = (say(&want), say(&found));
    match (want.filter(|w| leads(w.1)), found.filter(|f| leads(f.1))) {
        (Some(a), Some(b)) if a.0 == b.0 && a.1.target == b.1.target => Hop::fine(hop, words.0, words.1),
        (None, _) => Hop::broken(hop, words, format!("it knows no host that has {to}"), NOT_TOLD),
        (Some(_), None) => Hop::broken(hop, words, format!("the route to {to} is gone"), REPAIRS_ITSELF),
        (Some(_), Some(_)) => {
            let fault = format!("the route to {to} is wrong: {} instead of {}", words.1, words.0);
            Hop::broken(hop, words, fault, REPAIRS_ITSELF)
        }
    }
}

/// The way from this host's fabric to the one that has `to`: route, next hop, neighbour, forwarding entry. `back` says
/// that it is the answers' way.
fn remote(look: &Look, to: IpAddr, back: bool) -> Vec<Hop> {
    let name = |hop: &str| if back { format!("{hop} back") } else { hop.to_owned() };
    let mut hops = vec![route(look, &name("route"), to)];
    let Some((_, Route { target: Target::Nexthop(id), .. })) = route_to(&look.want.routes, to) else { return hops };
    let (want, found) = (&look.want, &look.found);
    hops.push(entry(
        &name("next hop"),
        &format!("next hop {id}"),
        want.nexthops.get(id),
        found.nexthops.get(id),
        |hop| format!("{} on {}", hop.via, hop.dev),
    ));
    let Some(hop) = want.nexthops.get(id) else { return hops };
    let key = (hop.dev.clone(), hop.via);
    let (mac, there) = (want.neighs.get(&key), found.neighs.get(&key));
    hops.push(entry(&name("neighbour"), &format!("neighbour {}", hop.via), mac, there, |mac| mac.to_string()));
    let Some(mac) = mac else { return hops };
    let key = (hop.dev.clone(), *mac);
    let what = format!("forwarding entry of {mac}");
    hops.push(entry(&name("forwarding entry"), &what, want.fdb.get(&key), found.fdb.get(&key), |vtep| {
        format!("{mac} at VTEP {vtep}")
    }));
    hops
}

/// The underlay address to which packets for `to` go; none when they stay here or nobody has it.
pub fn vtep_of(want: &Desired, to: IpAddr) -> Option<IpAddr> {
    let (_, route) = route_to(&want.routes, to)?;
    let Target::Nexthop(id) = route.target else { return None };
    let hop = want.nexthops.get(&id)?;
    let mac = want.neighs.get(&(hop.dev.clone(), hop.via))?;
    want.fdb.get(&(hop.dev.clone(), *mac)).copied()
}

/// From a container of this host to `to`: out of its link and, if `to` is on another host, as far as the VXLAN device.
/// `look` is the network's fabric.
pub fn outgoing(
    look: &Look,
    from: &Endpoint,
    from_address: IpAddr,
    to: IpAddr,
    to_local: Option<&Endpoint>,
) -> Vec<Hop> {
    let mut hops = local(look, from, from_address);
    hops.extend(common(look));
    match to_local {
        Some(endpoint) => hops.extend(local(look, endpoint, to)),
        None => hops.extend(remote(look, to, false)),
    }
    hops
}

/// From another host to a container of this one, and the way back.
pub fn incoming(look: &Look, to: &Endpoint, to_address: IpAddr, from: IpAddr) -> Vec<Hop> {
    let mut hops = common(look);
    hops.extend(local(look, to, to_address));
    hops.extend(remote(look, from, true));
    hops
}

/// Whether the host lets VXLAN of `vtep` in: `host` is the host's own namespace.
pub fn guard(host: &Look, vtep: IpAddr) -> Hop {
    let set = if vtep.is_ipv4() { "vteps4" } else { "vteps6" };
    let (hop, wanted) = ("vxlan guard", format!("lets VXLAN of {vtep} in"));
    let wants = host.want.table.as_ref().and_then(|t| t.sets.get(set)).map(|set| &set.elements);
    let has = host.found.table.as_ref().and_then(|t| t.sets.get(set)).map(|(_, elements)| elements);
    if wants.is_none_or(|set| !set.contains_key(&vtep.to_string())) {
        let fault = format!("{vtep} is no host of the cluster for it, and its VXLAN is dropped");
        return Hop::broken(hop, (wanted, "drops it"), fault, NOT_TOLD);
    }
    match has {
        Some(set) if !set.contains_key(&vtep.to_string()) => {
            let fault = format!("{vtep} is not among the hosts whose VXLAN its guard lets in");
            Hop::broken(hop, (wanted, "drops it"), fault, REPAIRS_ITSELF)
        }
        Some(_) => Hop::fine(hop, wanted.clone(), wanted),
        // Nothing is dropped then; that the guard is gone is another trouble.
        None => Hop::unknown(hop, wanted, "the guard is gone"),
    }
}

/// Whether a virtual address leads to `backend` in this fabric.
pub fn virtual_address(look: &Look, vip: IpAddr, backend: IpAddr, healthy: bool) -> Hop {
    let (set, wanted) = (if vip.is_ipv4() { "backends4" } else { "backends6" }, format!("{vip} leads to {backend}"));
    let (asked, answers) = (vip.to_string(), backend.to_string());
    let leads = |key: &str, value: &str| key.split(" . ").next() == Some(asked.as_str()) && value == answers;
    let (hop, elements) = ("virtual address", look.want.table.as_ref().and_then(|t| t.sets.get(set)));
    if elements.is_none_or(|set| !set.elements.iter().any(|(key, value)| leads(key, value))) {
        let (fault, repair) = match healthy {
            true => (format!("{vip} does not lead to {backend}"), NOT_TOLD),
            false => (
                format!("{vip} does not lead to {backend}, which is not healthy or about to stop"),
                "`skein ps` and `skein logs` show why it is not healthy",
            ),
        };
        return Hop::broken(hop, (wanted, "it does not"), fault, repair);
    }
    let found = look.found.table.as_ref().and_then(|t| t.sets.get(set));
    match found.is_some_and(|(_, set)| set.iter().any(|(key, value)| leads(key, value))) {
        true => Hop::fine(hop, wanted.clone(), wanted),
        false => Hop::broken(
            hop,
            (wanted, "it does not"),
            format!("{vip} does not lead to {backend} any more"),
            REPAIRS_ITSELF,
        ),
    }
}

/// The container's own side of its link: the address, and a route to `to`. `inside` is the container's namespace.
pub fn container(inside: &Observed, address: IpAddr, gateway: IpAddr, to: IpAddr) -> Vec<Hop> {
    let holder = inside.addrs.iter().find(|(_, net)| net.addr() == address);
    let restart = "something in the container changed it: restart the container";
    let mut hops = Vec::new();
    let Some((dev, net)) = holder else {
        let fault = format!("the container does not have its address {address}");
        return vec![Hop::broken("container's address", (address.to_string(), "none"), fault, restart)];
    };
    let up = inside.links.get(dev).is_some_and(|link| link.up);
    let (wanted, found) = (format!("{address}, up"), format!("{net} on {dev}, {}", if up { "up" } else { "down" }));
    hops.push(match up {
        true => Hop::fine("container's address", wanted, found),
        false => {
            Hop::broken("container's address", (wanted, found), format!("{dev} in the container is down"), restart)
        }
    });
    let route = route_to(&inside.routes, to);
    let wanted = format!("{to} by way of {gateway}");
    let by_gateway =
        |route: &Route| matches!(&route.target, Target::Dev { via, dev: by } if *via == Some(gateway) && by == dev);
    hops.push(match route {
        Some((key, route)) if by_gateway(route) => {
            Hop::fine("container's own route", wanted, format!("{} {}", key.dst, target_text(&route.target)))
        }
        Some((key, route)) => {
            let found = format!("{} {}", key.dst, target_text(&route.target));
            let fault = format!("the container's route to {to} leads elsewhere: {found}");
            Hop::broken("container's own route", (wanted, found), fault, restart)
        }
        None => {
            let fault = format!("the container has no route to {to}");
            Hop::broken("container's own route", (wanted, "none"), fault, restart)
        }
    });
    hops
}

/// Whether a name leads where it should, in the answers of this host's name server.
pub fn name(asked: &str, answer: &[IpAddr], wanted: IpAddr) -> Hop {
    let list = |addresses: &[IpAddr]| match addresses {
        [] => "nothing".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let (want, found) = (format!("{asked} is {wanted}"), format!("{asked} is {}", list(answer)));
    if answer.contains(&wanted) {
        return Hop::fine("name", want, found);
    }
    let fault = format!("the name {asked} answers with {} instead of {wanted}", list(answer));
    let repair =
        "a name answers with healthy tasks only, and only in networks that the asker is in: `skein ps` shows health";
    Hop::broken("name", (want, found), fault, repair)
}

/// Whether anybody in the target's container listens on a port. `listeners` are the addresses where somebody waits.
pub fn socket(listeners: &[SocketAddr], proto: &str, address: IpAddr, port: u16) -> Hop {
    let wanted = format!("somebody listens on port {port}/{proto}");
    let of_port: Vec<&SocketAddr> = listeners.iter().filter(|l| l.port() == port).collect();
    // A socket of `::` takes IPv4 too, unless it says otherwise, which the table does not show.
    let reaches = |l: &&&SocketAddr| l.ip() == address || l.ip().is_unspecified();
    if let Some(found) = of_port.iter().find(reaches) {
        return Hop::fine("socket", wanted, found.to_string());
    }
    if let Some(found) = of_port.first() {
        let fault = format!("its program listens on {found} only, which nobody else reaches");
        let repair = format!("let the program listen on 0.0.0.0:{port}");
        return Hop::broken("socket", (wanted, found.to_string()), fault, repair);
    }
    let mut ports: Vec<u16> = listeners.iter().filter(|l| !l.ip().is_loopback()).map(SocketAddr::port).collect();
    ports.sort_unstable();
    ports.dedup();
    let ports: Vec<String> = ports.iter().take(8).map(|p| format!("{p}/{proto}")).collect();
    let (found, repair) = match ports.as_slice() {
        [] => {
            ("nobody listens on any port".to_owned(), "`skein logs` shows whether the program has started".to_owned())
        }
        some => (
            format!("it listens on {}", some.join(", ")),
            format!("use one of {}, or start what listens on {port}", some.join(", ")),
        ),
    };
    Hop::broken("socket", (wanted, found), format!("nobody in the container listens on port {port}/{proto}"), repair)
}

#[cfg(test)]
mod tests;

//! Owns the translation between typed state and rtnetlink messages, both ways.
//!
//! Next hop objects (RTM_*NEXTHOP) are written and read by hand, for the message crate does not have them.
//! It knows no sockets; device indices come from the caller. No tasks, no channels.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
    os::fd::RawFd,
};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NetlinkDeserializable, NetlinkHeader, NlasIterator,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
        RouteType,
    },
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use super::socket::Request;
use crate::{
    names,
    state::{Link, LinkKind, Nexthop, Observed, Route, RouteKey, Target, VethPeer, Vxlan},
    types::Mac,
};

// linux/rtnetlink.h and linux/nexthop.h.
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;
const NHA_ID: u16 = 1;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
/// `struct nhmsg`: family, scope, protocol, a reserved byte, 32 bits of flags.
const NHMSG_BYTES: usize = 8;
/// `NLA_TYPE_MASK`: without the bits for "nested" and "byte order".
const NLA_KIND_MASK: u16 = 0x3fff;

const PUT: u16 = NLM_F_CREATE | NLM_F_REPLACE;

fn family(addr: IpAddr) -> AddressFamily {
    if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn dump(message: RouteNetlinkMessage) -> Request {
    Request::new(&message, NLM_F_DUMP)
}

/// Asks for one link by name.
pub(super) fn get_link(name: &str) -> Request {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
    Request::new(&RouteNetlinkMessage::GetLink(message), 0)
}

/// Asks for one link by index.
pub(super) fn get_link_by_index(index: u32) -> Request {
    let message = LinkMessageBuilder::<LinkUnspec>::new().index(index).build();
    Request::new(&RouteNetlinkMessage::GetLink(message), 0)
}

/// Removes a link by name.
pub(super) fn delete_link(name: &str) -> Request {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
    Request::new(&RouteNetlinkMessage::DelLink(message), 0)
}

/// Makes a VXLAN device in the namespace `ns`, with its UDP socket in the namespace the message is sent from.
pub(super) fn create_vxlan(name: &str, vxlan: &Vxlan, dev: Option<u32>, mac: Mac, mtu: u32, ns: RawFd) -> Request {
    let mut builder = LinkVxlan::new(name, vxlan.vni).port(vxlan.port).ttl(vxlan.ttl).learning(false);
    builder = match vxlan.local {
        IpAddr::V4(local) => builder.local(local),
        IpAddr::V6(local) => builder.local6(local),
    };
    if let Some(dev) = dev {
        builder = builder.dev(dev);
    }
    let message = builder.address(mac.0.to_vec()).mtu(mtu).setns_by_fd(ns).build();
    Request::new(&RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Makes a veth pair with its other end in the namespace `peer_ns`.
pub(super) fn create_veth(name: &str, mac: Mac, mtu: u32, peer: &VethPeer, peer_ns: RawFd) -> Request {
    // Not IFF_UP: the kernel refuses a peer that is up before its other end (ENOTCONN).
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(&peer.name)
        .address(peer.mac.0.to_vec())
        .mtu(mtu)
        .setns_by_fd(peer_ns)
        .build();
    let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(mac.0.to_vec())
        .mtu(mtu)
        .build();
    Request::new(&RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Sets a link up and changes its address and MTU.
pub(super) fn set_link(index: u32, mac: Option<Mac>, mtu: Option<u32>) -> Request {
    let mut builder = LinkMessageBuilder::<LinkUnspec>::new().index(index).up();
    if let Some(mac) = mac {
        builder = builder.address(mac.0.to_vec());
    }
    if let Some(mtu) = mtu {
        builder = builder.mtu(mtu);
    }
    Request::new(&RouteNetlinkMessage::SetLink(builder.build()), 0)
}

/// Adds (or removes) an address, without duplicate address detection.
pub(super) fn address(index: u32, addr: IpNet, add: bool) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = family(addr.addr());
    message.header.prefix_len = addr.prefix_len();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(addr.addr()));
    if add {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Address(addr.addr()));
        return Request::new(&RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL);
    }
    Request::new(&RouteNetlinkMessage::DelAddress(message), 0)
}

/// Puts (with `mac`) or removes a permanent neighbour.
pub(super) fn neighbour(index: u32, addr: IpAddr, mac: Option<Mac>) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = family(addr);
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(addr)));
    let Some(mac) = mac else {
        return Request::new(&RouteNetlinkMessage::DelNeighbour(message), 0);
    };
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    Request::new(&RouteNetlinkMessage::NewNeighbour(message), PUT)
}

/// Puts or removes a forwarding entry of a VXLAN device (`bridge fdb … self`).
pub(super) fn fdb(index: u32, mac: Mac, vtep: IpAddr, put: bool) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(vtep)));
    if put {
        return Request::new(&RouteNetlinkMessage::NewNeighbour(message), PUT);
    }
    Request::new(&RouteNetlinkMessage::DelNeighbour(message), 0)
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(4 + value.len()).expect("an address has at most 16 bytes");
    body.extend(len.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

fn nhmsg(family: AddressFamily, protocol: u8) -> Vec<u8> {
    vec![u8::from(family), 0, protocol, 0, 0, 0, 0, 0]
}

/// Puts a next hop object.
pub(super) fn put_nexthop(id: u32, hop: &Nexthop, index: u32) -> Request {
    let mut body = nhmsg(family(hop.via), hop.protocol);
    attribute(&mut body, NHA_ID, &id.to_ne_bytes());
    attribute(&mut body, NHA_OIF, &index.to_ne_bytes());
    match hop.via {
        IpAddr::V4(via) => attribute(&mut body, NHA_GATEWAY, &via.octets()),
        IpAddr::V6(via) => attribute(&mut body, NHA_GATEWAY, &via.octets()),
    }
    Request { kind: RTM_NEWNEXTHOP, flags: PUT, body }
}

/// Removes a next hop object.
pub(super) fn delete_nexthop(id: u32) -> Request {
    let mut body = nhmsg(AddressFamily::Unspec, 0);
    attribute(&mut body, NHA_ID, &id.to_ne_bytes());
    Request { kind: RTM_DELNEXTHOP, flags: 0, body }
}

fn route_address(addr: IpAddr) -> RouteAddress {
    RouteAddress::from(addr)
}

/// A route's message; `index` of its device if it has one.
fn route_message(key: &RouteKey, route: &Route, index: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(key.dst.addr());
    message.header.destination_prefix_length = key.dst.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.kind = RouteType::Unicast;
    if key.dst.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(route_address(key.dst.addr())));
    }
    message.attributes.push(RouteAttribute::Priority(key.metric));
    message.attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    match &route.target {
        Target::Nexthop(id) => message.attributes.push(RouteAttribute::NhId(*id)),
        Target::Unreachable => message.header.kind = RouteType::Unreachable,
        Target::Dev { via, .. } => {
            message.attributes.extend(index.map(RouteAttribute::Oif));
            match via {
                Some(via) => {
                    message.header.flags = RouteFlags::Onlink;
                    message.attributes.push(RouteAttribute::Gateway(route_address(*via)));
                }
                None if key.dst.addr().is_ipv4() => message.header.scope = RouteScope::Link,
                None => {}
            }
        }
        Target::Other => {}
    }
    message
}

/// Adds a route, replacing what has its key or refusing to.
pub(super) fn put_route(key: &RouteKey, route: &Route, index: Option<u32>, replace: bool) -> Request {
    let message = RouteNetlinkMessage::NewRoute(route_message(key, route, index));
    Request::new(&message, if replace { PUT } else { NLM_F_CREATE | NLM_F_EXCL })
}

/// Removes exactly this route: destination, metric and protocol must agree.
pub(super) fn delete_route(key: &RouteKey, route: &Route) -> Request {
    let mut message = route_message(key, &Route { target: Target::Other, protocol: route.protocol, mtu: None }, None);
    message.header.scope = RouteScope::NoWhere;
    if route.target == Target::Unreachable {
        message.header.kind = RouteType::Unreachable;
    }
    Request::new(&RouteNetlinkMessage::DelRoute(message), 0)
}

/// The tables of a namespace, in the order in which [`Tables::add`] needs them: links first.
pub(super) fn dump_links() -> Request {
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
}

/// Asks for all addresses.
pub(super) fn dump_addresses() -> Request {
    dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
}

/// Asks for neighbours, or for forwarding entries.
pub(super) fn dump_neighbours(fdb: bool) -> Request {
    let mut message = NeighbourMessage::default();
    if fdb {
        message.header.family = AddressFamily::Bridge;
    }
    dump(RouteNetlinkMessage::GetNeighbour(message))
}

/// Asks for next hop objects.
pub(super) fn dump_nexthops() -> Request {
    Request { kind: RTM_GETNEXTHOP, flags: NLM_F_DUMP, body: nhmsg(AddressFamily::Unspec, 0) }
}

/// Asks for the main table's routes of a family, only ours or all.
pub(super) fn dump_routes(v4: bool, only_ours: bool) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    if only_ours {
        message.header.protocol = RouteProtocol::from(names::RTPROT_SKEIN);
    }
    dump(RouteNetlinkMessage::GetRoute(message))
}

/// A link's index, name and state. The underlay device of a VXLAN device stays an index, of another namespace.
pub(super) struct FoundLink {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) link: Link,
    pub(super) underlay: Option<u32>,
}

fn decode(kind: u16, body: &[u8]) -> io::Result<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    RouteNetlinkMessage::deserialize(&header, body)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("cannot parse message {kind}: {error}")))
}

/// Reads a link's message; `None` for another message.
pub(super) fn parse_link(kind: u16, body: &[u8]) -> io::Result<Option<FoundLink>> {
    let RouteNetlinkMessage::NewLink(message) = decode(kind, body)? else {
        return Ok(None);
    };
    let up = message.header.flags.contains(LinkFlags::Up);
    let loopback = message.header.flags.contains(LinkFlags::Loopback);
    let kind = if loopback { LinkKind::Loopback } else { LinkKind::Other };
    let mut found = FoundLink {
        index: message.header.index,
        name: String::new(),
        link: Link { kind, mac: Mac([0; 6]), mtu: 0, up },
        underlay: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name = name,
            LinkAttribute::Mtu(mtu) => found.link.mtu = mtu,
            LinkAttribute::Address(bytes) => found.link.mac = mac(&bytes).unwrap_or(found.link.mac),
            LinkAttribute::LinkInfo(infos) => parse_link_info(infos, &mut found),
            _ => {}
        }
    }
    Ok(Some(found))
}

/// An address of either family, by its length.
pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

fn parse_link_info(infos: Vec<LinkInfo>, found: &mut FoundLink) {
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Veth) => found.link.kind = LinkKind::Veth,
            LinkInfo::Data(InfoData::Vxlan(data)) => {
                let unset = IpAddr::from([0, 0, 0, 0]);
                let mut vxlan = Vxlan { vni: 0, local: unset, port: 0, ttl: 0, dev: None };
                let mut plain = true;
                for one in data {
                    match one {
                        InfoVxlan::Id(vni) => vxlan.vni = vni,
                        InfoVxlan::Local(local) => vxlan.local = IpAddr::V4(local),
                        InfoVxlan::Local6(local) => vxlan.local = IpAddr::V6(local),
                        InfoVxlan::Port(port) => vxlan.port = port,
                        InfoVxlan::Ttl(ttl) => vxlan.ttl = ttl,
                        InfoVxlan::Link(index) => found.underlay = Some(index).filter(|index| *index != 0),
                        InfoVxlan::Learning(learns) => plain = !learns,
                        _ => {}
                    }
                }
                // One that learns is not one we made: it must not compare as equal.
                found.link.kind = if plain { LinkKind::Vxlan(vxlan) } else { LinkKind::LearningVxlan(vxlan) };
            }
            _ => {}
        }
    }
}

/// A namespace's tables while they are read.
#[derive(Default)]
pub(super) struct Tables {
    pub(super) found: Observed,
    names: HashMap<u32, String>,
    /// VXLAN devices bound to an underlay device: name, and index in the host's namespace.
    pub(super) underlays: BTreeMap<String, u32>,
}

impl Tables {
    /// Adds one message of a dump. A message that is of no interest is passed over.
    pub(super) fn add(&mut self, kind: u16, body: &[u8]) -> io::Result<()> {
        if kind == RTM_NEWNEXTHOP {
            self.add_nexthop(body);
            return Ok(());
        }
        match decode(kind, body)? {
            RouteNetlinkMessage::NewLink(_) => {
                if let Some(found) = parse_link(kind, body)? {
                    self.names.insert(found.index, found.name.clone());
                    if let Some(index) = found.underlay {
                        self.underlays.insert(found.name.clone(), index);
                    }
                    self.found.links.insert(found.name, found.link);
                }
            }
            RouteNetlinkMessage::NewAddress(message) => self.add_address(&message),
            RouteNetlinkMessage::NewNeighbour(message) => self.add_neighbour(&message),
            RouteNetlinkMessage::NewRoute(message) => self.add_route(&message),
            _ => {}
        }
        Ok(())
    }

    fn add_address(&mut self, message: &AddressMessage) {
        // Link-local and loopback addresses are the kernel's own work.
        if message.header.scope != AddressScope::Universe {
            return;
        }
        let Some(dev) = self.names.get(&message.header.index) else {
            return;
        };
        // On a point-to-point link ADDRESS is the other side's; IPv6 without a peer has only ADDRESS.
        let mut addr = None;
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(local) => addr = Some(*local),
                AddressAttribute::Address(address) => addr = addr.or(Some(*address)),
                _ => {}
            }
        }
        if let Some(net) = addr.and_then(|addr| IpNet::new(addr, message.header.prefix_len).ok()) {
            self.found.addrs.insert((dev.clone(), net));
        }
    }

    fn add_neighbour(&mut self, message: &NeighbourMessage) {
        let Some(dev) = self.names.get(&message.header.ifindex) else {
            return;
        };
        let (mut addr, mut lladdr) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => addr = Some(IpAddr::V4(*v4)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => addr = Some(IpAddr::V6(*v6)),
                // A forwarding entry is of family "bridge", which leaves its VTEP as bytes.
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => addr = ip(bytes),
                NeighbourAttribute::LinkLayerAddress(bytes) => lladdr = mac(bytes),
                _ => {}
            }
        }
        let (Some(addr), Some(lladdr)) = (addr, lladdr) else {
            return;
        };
        let is_vxlan = matches!(self.found.links.get(dev).map(|link| &link.kind), Some(LinkKind::Vxlan(_)));
        if message.header.family == AddressFamily::Bridge {
            if is_vxlan && message.header.flags.contains(NeighbourFlags::Own) {
                self.found.fdb.insert((dev.clone(), lladdr), addr);
            }
        } else if message.header.state == NeighbourState::Permanent {
            self.found.neighs.insert((dev.clone(), addr), lladdr);
        }
    }

    fn add_nexthop(&mut self, body: &[u8]) {
        let Some(attrs) = body.get(NHMSG_BYTES..) else {
            return;
        };
        let protocol = body[2];
        let (mut id, mut dev, mut via) = (None, None, None);
        for nla in NlasIterator::new(attrs).flatten() {
            let value = nla.value();
            let word = || value.try_into().map(u32::from_ne_bytes).ok();
            match nla.kind() & NLA_KIND_MASK {
                NHA_ID => id = word(),
                NHA_OIF => dev = word().and_then(|index| self.names.get(&index)),
                NHA_GATEWAY => via = ip(value),
                _ => {}
            }
        }
        if let (Some(id), Some(dev), Some(via)) = (id, dev, via) {
            self.found.nexthops.insert(id, Nexthop { dev: dev.clone(), via, protocol });
        }
    }

    fn add_route(&mut self, message: &RouteMessage) {
        let Some((key, route)) = self.parse_route(message) else {
            return;
        };
        self.found.routes.insert(key, route);
    }

    fn parse_route(&self, message: &RouteMessage) -> Option<(RouteKey, Route)> {
        let header = &message.header;
        let zero = match header.address_family {
            AddressFamily::Inet => IpAddr::from([0; 4]),
            AddressFamily::Inet6 => IpAddr::from([0; 16]),
            _ => return None,
        };
        let (mut dst, mut metric, mut table) = (zero, 0, u32::from(header.table));
        let (mut dev, mut via, mut id, mut multipath, mut mtu) = (None, None, None, false, None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(v4)) => dst = IpAddr::V4(*v4),
                RouteAttribute::Destination(RouteAddress::Inet6(v6)) => dst = IpAddr::V6(*v6),
                RouteAttribute::Priority(priority) => metric = *priority,
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Oif(index) => dev = self.names.get(index).cloned(),
                RouteAttribute::Gateway(RouteAddress::Inet(v4)) => via = Some(IpAddr::V4(*v4)),
                RouteAttribute::Gateway(RouteAddress::Inet6(v6)) => via = Some(IpAddr::V6(*v6)),
                RouteAttribute::NhId(number) => id = Some(*number),
                RouteAttribute::MultiPath(_) => multipath = true,
                RouteAttribute::Metrics(metrics) => {
                    let of = |m: &RouteMetric| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None };
                    mtu = metrics.iter().find_map(of).filter(|mtu| *mtu > 0);
                }
                _ => {}
            }
        }
        if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.flags.contains(RouteFlags::Cloned) {
            return None;
        }
        let target = match (header.kind, id, dev) {
            (RouteType::Unreachable, ..) => Target::Unreachable,
            (RouteType::Unicast, Some(id), _) => Target::Nexthop(id),
            (RouteType::Unicast, None, Some(dev)) if !multipath => Target::Dev { dev, via },
            _ => Target::Other,
        };
        let dst = IpNet::new(dst, header.destination_prefix_length).ok()?;
        Some((RouteKey { dst, metric }, Route { target, protocol: u8::from(header.protocol), mtu }))
    }
}

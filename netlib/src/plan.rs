//! Owns the ordered difference between a wanted and a found state.
//!
//! Order: sysctls (links inherit them), guards, then what must go before it can be made again, then links, addresses,
//! neighbours, forwarding entries, next hops, routes, and the fast path, which knows its ways before anybody uses it;
//! stale things go last, routes before what they stand on, so that a prefix which moves to another host is replaced and
//! never absent. Planning on the result gives nothing.
//!
//! Pure: no kernel, no clock. No tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    fast::{FastFound, Local, Program, Way},
    nft::Table,
    state::{
        Desired, Direction, Family, LinkKind, LinkMake, LinkSpec, Nexthop, Observed, Owned, Route, RouteKey, Target,
        VethPeer, Vxlan,
    },
    types::Mac,
};

/// One change to a namespace. Displayed as what was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Write a sysctl.
    SetSysctl {
        /// Path under `/proc/sys`.
        path: String,
        /// New value.
        value: String,
    },
    /// Put our nft table in place of what is there, in one transaction.
    PutTable(Table),
    /// Replace the elements of some sets of our table, in one transaction.
    PutElements {
        /// The table with all its sets.
        table: Table,
        /// The sets whose elements differ, with those that were found.
        sets: BTreeMap<String, BTreeMap<String, String>>,
    },
    /// Remove a link with all that is on it.
    DeleteLink(String),
    /// Make a VXLAN device, down.
    CreateVxlan {
        /// Its name.
        name: String,
        /// What makes it.
        vxlan: Vxlan,
        /// Its Ethernet address.
        mac: Mac,
        /// Its MTU in bytes.
        mtu: u32,
    },
    /// Make a veth pair, down, the other end in the host's namespace. A link of that name there is refused (EEXIST).
    CreateVeth {
        /// Its name.
        name: String,
        /// Its Ethernet address.
        mac: Mac,
        /// MTU of both ends in bytes.
        mtu: u32,
        /// The other end.
        peer: VethPeer,
    },
    /// Change a link and set it up.
    SetLink {
        /// Its name.
        name: String,
        /// New Ethernet address; the kernel drops every neighbour of the link with the old one.
        mac: Option<Mac>,
        /// New MTU in bytes.
        mtu: Option<u32>,
    },
    /// Add an address without duplicate address detection.
    AddAddr(String, IpNet),
    /// Add or replace a permanent neighbour.
    PutNeigh(String, IpAddr, Mac),
    /// Add or replace a forwarding entry.
    PutFdb(String, Mac, IpAddr),
    /// Add or replace a next hop object.
    PutNexthop(u32, Nexthop),
    /// Add a route.
    PutRoute {
        /// Its key.
        key: RouteKey,
        /// Its value.
        route: Route,
        /// Replace what is there; else a route of that key is refused (EEXIST), for it is not ours.
        replace: bool,
    },
    /// Attach a program of the fast path to a device, in the place of another of ours.
    AttachFast(String, Program),
    /// Add or replace where a prefix leads on the fast path.
    PutWay(IpNet, Way),
    /// Remove a prefix from the fast path.
    DeleteWay(IpNet),
    /// Add or replace a container of the fast path.
    PutLocal {
        /// Its address.
        addr: IpAddr,
        /// Where it is.
        local: Local,
        /// It may have connections that were translated, so its packets shall go the routed way.
        routed: bool,
    },
    /// Remove a container from the fast path.
    DeleteLocal(IpAddr),
    /// Remove all of the fast path; packets go the routed way.
    RemoveFast,
    /// Accept our uplinks in `DOCKER-USER`, as its first rule.
    AcceptInDockerUser(Family, Direction),
    /// Remove a route of ours.
    DeleteRoute(RouteKey, Route),
    /// Remove a next hop object.
    DeleteNexthop(u32),
    /// Remove a neighbour.
    DeleteNeigh(String, IpAddr),
    /// Remove a forwarding entry.
    DeleteFdb(String, Mac, IpAddr),
    /// Remove an address.
    DeleteAddr(String, IpNet),
}

impl Op {
    /// Whether it is about the fast path, without which everything works.
    pub fn is_fast(&self) -> bool {
        matches!(
            self,
            Self::AttachFast(..)
                | Self::PutWay(..)
                | Self::DeleteWay(_)
                | Self::PutLocal { .. }
                | Self::DeleteLocal(_)
                | Self::RemoveFast
        )
    }

    /// Whether it puts something on the link `dev`, and so fails once that is gone.
    pub(crate) fn needs_link(&self, dev: &str) -> bool {
        match self {
            Self::SetSysctl { path, .. } => path.split('/').any(|part| part == dev),
            Self::SetLink { name, .. } => name == dev,
            Self::AddAddr(on, _) | Self::PutNeigh(on, ..) | Self::PutFdb(on, ..) => on == dev,
            Self::PutNexthop(_, hop) => hop.dev == dev,
            Self::PutRoute { route, .. } => matches!(&route.target, Target::Dev { dev: on, .. } if on == dev),
            Self::AttachFast(on, _) | Self::PutWay(_, Way::Peer { dev: on, .. }) => on == dev,
            Self::PutLocal { local, .. } => local.dev == dev,
            _ => false,
        }
    }
}

fn way_text(way: &Way) -> String {
    match way {
        Way::Peer { dev, mac } => format!("to {mac} on {dev}"),
        Way::Here => "to this host".to_owned(),
        Way::Nobody => "to no host".to_owned(),
    }
}

fn target_text(target: &Target) -> String {
    match target {
        Target::Nexthop(id) => format!("to next hop {id}"),
        Target::Dev { dev, via: Some(via) } => format!("via {via} on {dev}"),
        Target::Dev { dev, via: None } => format!("on {dev}"),
        Target::Unreachable => "as unreachable".to_owned(),
        Target::Other => "some other way".to_owned(),
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetSysctl { path, value } => {
                write!(f, "set sysctl {} to {value}", path.replace('/', "."))
            }
            Self::PutTable(table) => write!(f, "put nft table inet {}", table.name),
            Self::PutElements { table, sets } => {
                let sets: Vec<&str> = sets.keys().map(String::as_str).collect();
                write!(f, "put elements of {} in nft table inet {}", sets.join(", "), table.name)
            }
            Self::DeleteLink(name) => write!(f, "remove link {name}"),
            Self::CreateVxlan { name, vxlan, .. } => {
                write!(f, "make vxlan device {name} for vni {} from {}", vxlan.vni, vxlan.local)
            }
            Self::CreateVeth { name, peer, .. } => {
                write!(f, "make veth pair {name} and {}", peer.name)
            }
            Self::SetLink { name, mac, mtu } => {
                write!(f, "set link {name} up")?;
                mac.map_or(Ok(()), |mac| write!(f, ", address {mac}"))?;
                mtu.map_or(Ok(()), |mtu| write!(f, ", mtu {mtu}"))
            }
            Self::AddAddr(dev, addr) => write!(f, "add address {addr} to {dev}"),
            Self::PutNeigh(dev, addr, mac) => write!(f, "put neighbour {addr} at {mac} on {dev}"),
            Self::PutFdb(dev, mac, vtep) => {
                write!(f, "put forwarding entry {mac} to vtep {vtep} on {dev}")
            }
            Self::PutNexthop(id, hop) => {
                write!(f, "put next hop {id} via {} on {}", hop.via, hop.dev)
            }
            Self::PutRoute { key, route, .. } => {
                write!(f, "put route {} {}", key.dst, target_text(&route.target))?;
                route.mtu.map_or(Ok(()), |mtu| write!(f, ", mtu {mtu}"))
            }
            Self::AttachFast(dev, program) => write!(f, "attach program {} to {dev}", program.name()),
            Self::PutWay(net, way) => write!(f, "put fast way {net} {}", way_text(way)),
            Self::DeleteWay(net) => write!(f, "remove fast way {net}"),
            Self::PutLocal { addr, local, routed } => {
                write!(f, "put {addr} on {} on the fast path", local.dev)?;
                if *routed { write!(f, ", routed for now") } else { Ok(()) }
            }
            Self::DeleteLocal(addr) => write!(f, "remove {addr} from the fast path"),
            Self::RemoveFast => write!(f, "remove the fast path"),
            Self::AcceptInDockerUser(family, direction) => {
                let tool = if *family == Family::V4 { "iptables" } else { "ip6tables" };
                let way = if *direction == Direction::In { "from" } else { "to" };
                write!(f, "accept packets {way} overlay networks in {tool} chain DOCKER-USER")
            }
            Self::DeleteRoute(key, route) => {
                write!(f, "remove route {} {}", key.dst, target_text(&route.target))
            }
            Self::DeleteNexthop(id) => write!(f, "remove next hop {id}"),
            Self::DeleteNeigh(dev, addr) => write!(f, "remove neighbour {addr} from {dev}"),
            Self::DeleteFdb(dev, mac, _) => write!(f, "remove forwarding entry {mac} from {dev}"),
            Self::DeleteAddr(dev, addr) => write!(f, "remove address {addr} from {dev}"),
        }
    }
}

/// Operations in order, and what they cannot bring about.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// What to do, in this order.
    pub ops: Vec<Op>,
    /// Links made elsewhere that are not there; what depends on them was left out.
    pub missing: BTreeSet<String>,
}

/// The difference between what shall be and what is.
pub fn plan(want: &Desired, found: &Observed) -> Plan {
    let missing = want
        .links
        .iter()
        .filter(|(name, spec)| spec.make == LinkMake::Elsewhere && !found.links.contains_key(*name))
        .map(|(name, _)| name.clone())
        .collect();
    let mut planner = Planner { want, now: found.clone(), plan: Plan { ops: Vec::new(), missing } };
    planner.sysctls();
    planner.table();
    planner.links();
    planner.on_links();
    planner.routes();
    planner.fast();
    planner.docker_user();
    planner.remove_stale();
    planner.plan
}

struct Planner<'a> {
    want: &'a Desired,
    /// What was found, with the effect of each operation planned so far.
    now: Observed,
    plan: Plan,
}

impl Planner<'_> {
    fn push(&mut self, op: Op) {
        self.plan.ops.push(op);
    }

    fn present(&self, dev: &str) -> bool {
        !self.plan.missing.contains(dev)
    }

    fn sysctls(&mut self) {
        let differs = |path: &str| self.want.sysctls.get(path) != self.now.sysctls.get(path);
        let mut ops = Vec::new();
        if let Some(rule) = self.want.sysctl_if.as_ref().filter(|rule| differs(&rule.trigger)) {
            let (head, tail) = rule.pattern.split_once('*').unwrap_or((&rule.pattern, ""));
            for (path, value) in &self.now.sysctls {
                if path.starts_with(head) && path.ends_with(tail) && *value == rule.from {
                    ops.push(Op::SetSysctl { path: path.clone(), value: rule.to.clone() });
                }
            }
        }
        for (path, value) in &self.want.sysctls {
            let of_missing = path.split('/').any(|part| self.plan.missing.contains(part));
            if !of_missing && differs(path) {
                ops.push(Op::SetSysctl { path: path.clone(), value: value.clone() });
            }
        }
        self.plan.ops.extend(ops);
    }

    fn table(&mut self) {
        let Some(table) = &self.want.table else {
            return;
        };
        let want = table.view();
        match &self.now.table {
            Some(found) if *found == want => {}
            Some(found) if found.same_frame(&want) => {
                let differ = |(name, set): &(&String, &(String, _))| want.sets.get(*name) != Some(*set);
                let sets = found.sets.iter().filter(differ).map(|(name, (_, found))| (name.clone(), found.clone()));
                let sets = sets.collect();
                self.push(Op::PutElements { table: table.clone(), sets });
            }
            _ => self.push(Op::PutTable(table.clone())),
        }
    }

    fn links(&mut self) {
        for (name, spec) in &self.want.links {
            let fits = |kind: &LinkKind| match (&spec.make, kind) {
                (LinkMake::Vxlan(want), LinkKind::Vxlan(found)) => want == found,
                (LinkMake::VethPair(_), LinkKind::Veth) | (LinkMake::Elsewhere, _) => true,
                _ => false,
            };
            if self.now.links.get(name).is_some_and(|link| !fits(&link.kind)) {
                self.push(Op::DeleteLink(name.clone()));
                self.now.drop_link(name);
            }
            match self.now.links.get(name).cloned() {
                None => self.make_link(name, spec),
                Some(link) => {
                    let mac = spec.mac.filter(|mac| *mac != link.mac);
                    let mtu = spec.mtu.filter(|mtu| *mtu != link.mtu);
                    if mac.is_some() {
                        self.now.neighs.retain(|(dev, _), _| dev != name);
                    }
                    if mac.is_some() || mtu.is_some() || !link.up {
                        self.push(Op::SetLink { name: name.clone(), mac, mtu });
                    }
                }
            }
        }
    }

    fn make_link(&mut self, name: &str, spec: &LinkSpec) {
        let (mac, mtu) = (spec.mac.unwrap_or(Mac([0; 6])), spec.mtu.unwrap_or(0));
        let name = name.to_owned();
        match &spec.make {
            LinkMake::Elsewhere => return,
            LinkMake::Vxlan(vxlan) => {
                self.push(Op::CreateVxlan { name: name.clone(), vxlan: vxlan.clone(), mac, mtu });
            }
            LinkMake::VethPair(peer) => {
                self.push(Op::CreateVeth { name: name.clone(), mac, mtu, peer: peer.clone() });
            }
        }
        self.push(Op::SetLink { name, mac: None, mtu: None });
    }

    fn on_links(&mut self) {
        let want = self.want;
        for (dev, addr) in &want.addrs {
            if self.present(dev) && !self.now.addrs.contains(&(dev.clone(), *addr)) {
                self.push(Op::AddAddr(dev.clone(), *addr));
            }
        }
        for (key, mac) in &want.neighs {
            if self.present(&key.0) && self.now.neighs.get(key) != Some(mac) {
                self.push(Op::PutNeigh(key.0.clone(), key.1, *mac));
            }
        }
        for (key, vtep) in &want.fdb {
            if self.present(&key.0) && self.now.fdb.get(key) != Some(vtep) {
                self.push(Op::PutFdb(key.0.clone(), key.1, *vtep));
            }
        }
    }

    fn routes(&mut self) {
        let want = self.want;
        for (id, hop) in &want.nexthops {
            if self.present(&hop.dev) && self.now.nexthops.get(id) != Some(hop) {
                self.push(Op::PutNexthop(*id, hop.clone()));
            }
        }
        for (key, route) in &want.routes {
            let there = match &route.target {
                Target::Dev { dev, .. } => self.present(dev),
                _ => true,
            };
            if there && self.now.routes.get(key) != Some(route) {
                // A fabric is ours as a whole. In the host's namespace only our own routes are read, so what is not
                // found may still be somebody else's.
                let found = self.now.routes.get(key);
                let replace = want.owned == Owned::Fabric || found.is_some();
                let mut put = route.clone();
                // Asked for a route to a next hop object without metrics, Linux 6.18 takes any that it has to that object
                // (`fib_find_info_nh`), so the old one again, with its MTU. A metric of 0 is none, and is compared.
                put.mtu = put.mtu.or(found.and_then(|found| found.mtu).map(|_| 0));
                self.push(Op::PutRoute { key: *key, route: put, replace });
                self.now.routes.insert(*key, route.clone());
            }
        }
    }

    fn fast(&mut self) {
        let Some(found) = self.now.fast.clone() else {
            return;
        };
        let Some(want) = &self.want.fast else {
            if !found.programs.is_empty() {
                self.push(Op::RemoveFast);
            }
            return;
        };
        // Programs of another release, or with other constants: they share no maps with those that are wanted.
        let other = |(dev, name): (&String, &String)| want.programs.get(dev).is_some_and(|p| p.name() != *name);
        let found = if found.programs.iter().any(other) {
            self.push(Op::RemoveFast);
            FastFound::default()
        } else {
            found
        };
        for (net, way) in &want.ways {
            if found.ways.get(net) != Some(way) {
                self.push(Op::PutWay(*net, way.clone()));
            }
        }
        for (addr, local) in &want.locals {
            if self.present(&local.dev) && found.locals.get(addr) != Some(local) {
                self.push(Op::PutLocal { addr: *addr, local: local.clone(), routed: want.careful });
            }
        }
        for (dev, program) in &want.programs {
            if self.present(dev) && !found.programs.contains_key(dev) {
                self.push(Op::AttachFast(dev.clone(), *program));
            }
        }
        for net in found.ways.keys().filter(|net| !want.ways.contains_key(*net)) {
            self.plan.ops.push(Op::DeleteWay(*net));
        }
        let gone = |local: Option<&Local>| local.is_none_or(|local| self.plan.missing.contains(&local.dev));
        let stale: Vec<IpAddr> = found.locals.keys().filter(|addr| gone(want.locals.get(*addr))).copied().collect();
        self.plan.ops.extend(stale.into_iter().map(Op::DeleteLocal));
    }

    fn docker_user(&mut self) {
        if !self.want.docker_user {
            return;
        }
        for (family, found) in self.now.docker_user.clone() {
            for direction in [Direction::In, Direction::Out] {
                if !found.contains(&direction) {
                    self.push(Op::AcceptInDockerUser(family, direction));
                }
            }
        }
    }

    fn remove_stale(&mut self) {
        let want = self.want;
        let owned = &want.owned;
        let stale_links: Vec<String> = match owned {
            Owned::Fabric => self
                .now
                .links
                .keys()
                .filter(|name| owned.link(name) && !want.links.contains_key(*name))
                .cloned()
                .collect(),
            // The other end is in the fabric and goes with it.
            Owned::FabricRules | Owned::Uplink(_) | Owned::HostRules => Vec::new(),
        };
        for name in &stale_links {
            self.now.drop_link(name);
        }
        let mut ops = Vec::new();
        for (key, route) in &self.now.routes {
            if owned.route(route) && !want.routes.contains_key(key) {
                ops.push(Op::DeleteRoute(*key, route.clone()));
            }
        }
        for (id, hop) in &self.now.nexthops {
            let ours = hop.protocol == crate::names::RTPROT_SKEIN && *owned == Owned::Fabric;
            if ours && !want.nexthops.contains_key(id) {
                ops.push(Op::DeleteNexthop(*id));
            }
        }
        for key in self.now.neighs.keys().filter(|key| owned.link(&key.0) && !want.neighs.contains_key(*key)) {
            ops.push(Op::DeleteNeigh(key.0.clone(), key.1));
        }
        for (key, vtep) in self.now.fdb.iter().filter(|(key, _)| owned.link(&key.0) && !want.fdb.contains_key(*key)) {
            ops.push(Op::DeleteFdb(key.0.clone(), key.1, *vtep));
        }
        for addr in self.now.addrs.iter().filter(|addr| owned.link(&addr.0) && !want.addrs.contains(*addr)) {
            ops.push(Op::DeleteAddr(addr.0.clone(), addr.1));
        }
        ops.extend(stale_links.into_iter().map(Op::DeleteLink));
        self.plan.ops.extend(ops);
    }
}

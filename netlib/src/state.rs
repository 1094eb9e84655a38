//! Owns the kernel's state as typed data: links, addresses, routes, next hops, neighbours, forwarding entries, sysctls
//! and nft tables of one network namespace, both as wanted ([`Desired`]) and as found ([`Observed`]).
//!
//! Maps are keyed as the kernel keys them, so that "replace" and "exists already" mean the same here. It knows neither
//! how a state is wanted nor how it is read. No tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    fast::{Fast, FastFound, Way},
    names,
    nft::{Table, TableView},
    types::Mac,
};

/// What makes a VXLAN device; the kernel lets none of it change while it exists without a loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Underlay address packets leave from.
    pub local: IpAddr,
    /// UDP port.
    pub port: u16,
    /// TTL of the outer packets.
    pub ttl: u8,
    /// Name of the underlay device in the host's namespace, if bound to one.
    pub dev: Option<String>,
}

/// What a link is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A VXLAN device without learning. `learning` is always false in what we make.
    Vxlan(Vxlan),
    /// A VXLAN device that learns, which we never make.
    LearningVxlan(Vxlan),
    /// One end of a veth pair.
    Veth,
    /// `lo`.
    Loopback,
    /// Anything else.
    Other,
}

/// A link as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// What it is.
    pub kind: LinkKind,
    /// Its Ethernet address; zeros where it has none.
    pub mac: Mac,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is set up (IFF_UP).
    pub up: bool,
}

/// The other end of a veth pair to be made, in the host's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethPeer {
    /// Its name there.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Mac,
}

/// How a wanted link comes to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkMake {
    /// Made by us as a VXLAN device; made again when its [`Vxlan`] differs.
    Vxlan(Vxlan),
    /// Made by us as a veth pair with its other end in the host's namespace.
    VethPair(VethPeer),
    /// Made elsewhere: if it is missing, what depends on it is left out and the plan says so.
    Elsewhere,
}

/// A link as wanted; always up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSpec {
    /// How it comes to be.
    pub make: LinkMake,
    /// Its Ethernet address, if it matters.
    pub mac: Option<Mac>,
    /// Its MTU in bytes, if it matters.
    pub mtu: Option<u32>,
}

/// The key of a route in the main table: the kernel keeps one per destination and metric (TOS is always 0 here).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Destination prefix.
    pub dst: IpNet,
    /// Metric; for IPv6 never 0, the kernel makes that 1024.
    pub metric: u32,
}

impl RouteKey {
    /// A route with the default metric of its family.
    pub fn new(dst: IpNet) -> Self {
        Self { dst, metric: if matches!(dst, IpNet::V4(_)) { 0 } else { names::V6_DEFAULT_METRIC } }
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To a next hop object.
    Nexthop(u32),
    /// Out of a device, directly or by a neighbour on it that need not have a route (`onlink`).
    Dev {
        /// Name of the device.
        dev: String,
        /// The neighbour.
        via: Option<IpAddr>,
    },
    /// Nowhere (`unreachable`).
    Unreachable,
    /// Some other way that we never make.
    Other,
}

/// A route's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub target: Target,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Largest packet that may take it, bytes (RTAX_MTU); `None`: what its device takes.
    pub mtu: Option<u32>,
}

impl Route {
    /// A route of ours.
    pub fn ours(target: Target) -> Self {
        Self { target, protocol: names::RTPROT_SKEIN, mtu: None }
    }
}

/// A next hop object: a neighbour on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nexthop {
    /// Name of the device.
    pub dev: String,
    /// The neighbour's address; link-local, so that it is on the link by definition.
    pub via: IpAddr,
    /// Who made it (`nh_protocol`).
    pub protocol: u8,
}

/// Routes of the main table. In the host's namespace only ours are read; see [`crate::plan::Op::PutRoute`].
pub type Routes = BTreeMap<RouteKey, Route>;
/// Permanent neighbours by (device, address).
pub type Neighbours = BTreeMap<(String, IpAddr), Mac>;
/// Forwarding entries of VXLAN devices by (device, inner destination), with the VTEP.
pub type Fdb = BTreeMap<(String, Mac), IpAddr>;

/// Which part of a namespace a plan answers for. All else in it is foreign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owned {
    /// A fabric: every link with one of our names, everything on them, every route and next hop of protocol 83, our
    /// table, and the gateway on `lo`.
    Fabric,
    /// In a fabric: our table, and nothing else of it.
    FabricRules,
    /// In the host's namespace: one uplink, what is on it, and routes of protocol 83 over it.
    Uplink(String),
    /// In the host's namespace: sysctls, our table, the rules in `DOCKER-USER`.
    HostRules,
}

impl Owned {
    /// Whether a link is ours to change and, in a fabric, to remove.
    pub fn link(&self, name: &str) -> bool {
        match self {
            Self::Fabric => {
                name == names::VXLAN_IFNAME || name == names::UPLINK_IFNAME || name.starts_with(names::ENDPOINT_PREFIX)
            }
            Self::Uplink(uplink) => name == uplink,
            Self::FabricRules | Self::HostRules => false,
        }
    }

    /// Whether a route is ours to change and remove.
    pub fn route(&self, route: &Route) -> bool {
        route.protocol == names::RTPROT_SKEIN
            && match (self, &route.target) {
                (Self::Fabric, _) => true,
                (Self::Uplink(uplink), Target::Dev { dev, .. }) => dev == uplink,
                _ => false,
            }
    }
}

/// What a part of a namespace shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Which part.
    pub owned: Owned,
    /// Paths under `/proc/sys` with their values.
    pub sysctls: BTreeMap<String, String>,
    /// What must move out of the way first, if its trigger changes.
    pub sysctl_if: Option<SysctlIf>,
    /// Links by name.
    pub links: BTreeMap<String, LinkSpec>,
    /// Addresses by device.
    pub addrs: BTreeSet<(String, IpNet)>,
    /// Neighbours.
    pub neighs: Neighbours,
    /// Forwarding entries.
    pub fdb: Fdb,
    /// Next hop objects by id.
    pub nexthops: BTreeMap<u32, Nexthop>,
    /// Routes.
    pub routes: Routes,
    /// What takes the short way past routes and rules; `None`: nothing.
    pub fast: Option<Fast>,
    /// Our nft table; `None` where this part has none.
    pub table: Option<Table>,
    /// Whether `DOCKER-USER`, where it exists, shall accept our uplinks.
    pub docker_user: bool,
}

/// A sysctl that must move out of the way before another one changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SysctlIf {
    /// The sysctl whose change makes it necessary.
    pub trigger: String,
    /// Path with one `*` segment.
    pub pattern: String,
    /// The value that must go.
    pub from: String,
    /// Its replacement.
    pub to: String,
}

impl Desired {
    /// Nothing at all, of this part.
    pub fn empty(owned: Owned) -> Self {
        Self {
            owned,
            sysctls: BTreeMap::new(),
            sysctl_if: None,
            links: BTreeMap::new(),
            addrs: BTreeSet::new(),
            neighs: BTreeMap::new(),
            fdb: BTreeMap::new(),
            nexthops: BTreeMap::new(),
            routes: BTreeMap::new(),
            fast: None,
            table: None,
            docker_user: false,
        }
    }

    /// What must be read to make a plan for this.
    pub fn query(&self) -> Query {
        let mut sysctls: Vec<String> = self.sysctls.keys().cloned().collect();
        sysctls.extend(self.sysctl_if.iter().map(|rule| rule.pattern.clone()));
        Query {
            sysctls,
            objects: !matches!(self.owned, Owned::FabricRules | Owned::HostRules),
            only_our_routes: matches!(self.owned, Owned::Uplink(_)),
            fast: self.owned == Owned::Fabric,
            table: self.table.is_some(),
            docker_user: self.docker_user,
        }
    }
}

/// Which parts of a namespace to read: a host may have thousands of foreign routes and rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Query {
    /// Paths under `/proc/sys`, one segment may be `*`.
    pub sysctls: Vec<String>,
    /// Links, addresses, routes, neighbours, forwarding entries, next hops.
    pub objects: bool,
    /// Of the routes, only those of protocol 83.
    pub only_our_routes: bool,
    /// The fast path, where there can be one.
    pub fast: bool,
    /// Our nft table.
    pub table: bool,
    /// The `DOCKER-USER` chains.
    pub docker_user: bool,
}

/// An address family, where "v4" and "v6" say all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What a `DOCKER-USER` chain accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Packets that come from an uplink of ours.
    In,
    /// Packets that leave by one.
    Out,
}

/// What a namespace is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// Readable sysctls that were asked for, by path.
    pub sysctls: BTreeMap<String, String>,
    /// Links by name.
    pub links: BTreeMap<String, Link>,
    /// Addresses of global scope by device.
    pub addrs: BTreeSet<(String, IpNet)>,
    /// Permanent neighbours.
    pub neighs: Neighbours,
    /// Forwarding entries of VXLAN devices.
    pub fdb: Fdb,
    /// Next hop objects by id.
    pub nexthops: BTreeMap<u32, Nexthop>,
    /// Routes of the main table.
    pub routes: Routes,
    /// The fast path; `None` where it was not read, or the kernel has none.
    pub fast: Option<FastFound>,
    /// Our nft table, if it is there.
    pub table: Option<TableView>,
    /// Per family whose `DOCKER-USER` chain exists: which of our rules stand in it.
    pub docker_user: BTreeMap<Family, BTreeSet<Direction>>,
}

impl Observed {
    /// Removes what the kernel removes along with a link: what is on it and every next hop and route over it.
    pub fn drop_link(&mut self, name: &str) {
        self.links.remove(name);
        if let Some(fast) = &mut self.fast {
            fast.programs.remove(name);
            // They stay as long as a program does, and lead nowhere.
            fast.ways.retain(|_, way| !matches!(way, Way::Peer { dev, .. } if dev == name));
            if fast.programs.is_empty() {
                *fast = FastFound::default();
            }
        }
        self.drop_dependents(name);
    }

    /// Removes what the kernel removes when a link goes down or away.
    pub fn drop_dependents(&mut self, name: &str) {
        self.addrs.retain(|(dev, _)| dev != name);
        self.neighs.retain(|(dev, _), _| dev != name);
        self.fdb.retain(|(dev, _), _| dev != name);
        let gone: Vec<u32> = self.nexthops.iter().filter(|(_, hop)| hop.dev == name).map(|(id, _)| *id).collect();
        for id in gone {
            self.drop_nexthop(id);
        }
        self.routes.retain(|_, route| !matches!(&route.target, Target::Dev { dev, .. } if dev == name));
    }

    /// Removes a next hop and, as the kernel does, every route over it.
    pub fn drop_nexthop(&mut self, id: u32) {
        self.nexthops.remove(&id);
        self.routes.retain(|_, route| route.target != Target::Nexthop(id));
    }
}

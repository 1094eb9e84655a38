//! Owns the words in which a caller says what the network of one host shall be: the host itself, its overlay networks,
//! their peers and endpoints, published ports, and the report of what was changed.
//!
//! Plain data, checked by [`NetworkState::validate`] and [`HostState::validate`]. It knows neither netlink nor nft nor
//! the engine. No tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// UDP port of VXLAN (RFC 7348, section 8.7). Docker Swarm uses it too; a host that runs both needs another one here,
/// since the host's guard drops what does not come from a VTEP of ours.
pub const DEFAULT_VXLAN_PORT: u16 = 4789;
/// Where the namespaces of overlay networks are pinned. `/run` is empty after a boot, as the kernel's state is.
pub const DEFAULT_NETNS_DIR: &str = "/run/skein/netns";
/// Bytes that VXLAN adds inside an IPv4 packet: inner Ethernet 14 + VXLAN 8 + UDP 8 + IPv4 20.
pub const VXLAN_OVERHEAD_V4: u32 = 50;
/// Bytes that VXLAN adds inside an IPv6 packet: inner Ethernet 14 + VXLAN 8 + UDP 8 + IPv6 40.
pub const VXLAN_OVERHEAD_V6: u32 = 70;
/// Smallest MTU of a network: IPv6 needs 1280 bytes (RFC 8200, section 5).
pub const MTU_MIN: u32 = 1280;
/// Largest MTU of a network, the largest IP packet.
pub const MTU_MAX: u32 = 65_535;
/// A VNI has 24 bits (RFC 7348, section 5).
pub const VNI_MAX: u32 = (1 << 24) - 1;

/// The id of an overlay network: 1 to 64 of `[a-zA-Z0-9_.-]`, not starting with a dot or a dash, for it becomes a file
/// name (`sk-<id>`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkId(String);

impl NetworkId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for NetworkId {
    type Error = InvalidState;

    fn try_from(id: String) -> Result<Self, InvalidState> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-' || c == '.';
        let starts_well = id.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        if id.len() > 64 || !starts_well || !id.chars().all(word) {
            return Err(InvalidState(format!("network id {id:?} is not 1 to 64 of [a-zA-Z0-9_.-]")));
        }
        Ok(Self(id))
    }
}

impl FromStr for NetworkId {
    type Err = InvalidState;

    fn from_str(id: &str) -> Result<Self, InvalidState> {
        Self::try_from(id.to_owned())
    }
}

impl From<NetworkId> for String {
    fn from(id: NetworkId) -> Self {
        id.0
    }
}

/// The id of an endpoint (a container in a network), as the engine gives it. Free text, used as a key and in messages.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EndpointId(pub String);

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host's number in the cluster, unique, given by the master, 1 to 65535. MACs and next hops follow from it, so that
/// hosts need not exchange them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostIndex(pub u16);

impl fmt::Display for HostIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = InvalidState;

    fn from_str(text: &str) -> Result<Self, InvalidState> {
        let wrong = || InvalidState(format!("{text:?} is not an ethernet address"));
        let mut bytes = [0u8; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = InvalidState;

    fn try_from(text: String) -> Result<Self, InvalidState> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// What does not change while an agent runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    /// This host's number.
    pub host: HostIndex,
    /// This host's address on the underlay, the source of its VXLAN packets. All VTEPs of a cluster have one family.
    pub vtep: IpAddr,
    /// UDP port of VXLAN, the same on every host.
    pub vxlan_port: u16,
    /// MTU of the underlay device in bytes (see [`crate::Overlay::underlay_mtu`]).
    pub underlay_mtu: u32,
    /// Binds VXLAN to this device; `None` leaves the choice to the host's routes.
    pub underlay_dev: Option<String>,
    /// TTL of VXLAN packets, 1 to 255.
    pub vxlan_ttl: u8,
    /// Whether plain packets between hosts pass routes and rules, see [`crate::fast`]. Where the kernel cannot, or not
    /// with our programs, they do not, and nothing else is different.
    pub fast_path: bool,
    /// Where namespaces are pinned. It must lie in a mount namespace that outlives the agent: a service manager that
    /// gives the agent a private one takes every network along when the agent ends.
    pub netns_dir: PathBuf,
}

impl HostConfig {
    /// The usual settings for a host with this number and underlay address; without the fast path.
    pub fn new(host: HostIndex, vtep: IpAddr, underlay_mtu: u32) -> Self {
        Self {
            host,
            vtep,
            vxlan_port: DEFAULT_VXLAN_PORT,
            underlay_mtu,
            underlay_dev: None,
            vxlan_ttl: 64,
            fast_path: false,
            netns_dir: PathBuf::from(DEFAULT_NETNS_DIR),
        }
    }

    /// The largest MTU an overlay network can have on this underlay, in bytes.
    pub fn overlay_mtu_max(&self) -> u32 {
        overlay_mtu(self.underlay_mtu, self.vtep)
    }
}

/// The largest MTU an overlay can have, in bytes, over an underlay of `underlay_mtu` bytes with VTEPs of this family.
pub fn overlay_mtu(underlay_mtu: u32, vtep: IpAddr) -> u32 {
    underlay_mtu.saturating_sub(if vtep.is_ipv4() { VXLAN_OVERHEAD_V4 } else { VXLAN_OVERHEAD_V6 })
}

/// Another host of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its address on the underlay, of the same family as [`HostConfig::vtep`].
    pub vtep: IpAddr,
    /// The prefixes that live there: its blocks, and as /32 or /128 every address outside of its blocks.
    pub blocks: BTreeSet<IpNet>,
    /// Largest packet of the network that gets there whole, bytes, where the way to it takes less than the others'
    /// ([`crate::Overlay::path_mtus`]); [`MTU_MIN`] or more.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// A container's place in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// MAC of the container's interface ([`crate::names::endpoint_mac`] unless the user asked for another).
    pub mac: Mac,
    /// Its IPv4 address, unique in the network. The name of the veth's end in the fabric follows from it.
    pub addr4: Ipv4Addr,
    /// Its IPv6 address, in networks that have IPv6.
    pub addr6: Option<Ipv6Addr>,
    /// MTU of its link, bytes, as it was made; `None`: the network's. The two ends of a pair must agree, since a packet
    /// that is too large for the other end is lost without a word, and the container's end is not ours to change. So the
    /// link keeps its MTU when the network's changes.
    #[serde(default)]
    pub mtu: Option<u32>,
}

impl Endpoint {
    /// An endpoint with the MAC that follows from its address.
    pub fn new(addr4: Ipv4Addr, addr6: Option<Ipv6Addr>) -> Self {
        Self { mac: crate::names::endpoint_mac(addr4), addr4, addr6, mtu: None }
    }

    /// Its addresses.
    pub fn addrs(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [Some(IpAddr::V4(self.addr4)), self.addr6.map(IpAddr::V6)].into_iter().flatten()
    }

    /// Name of the veth's end in the fabric.
    pub fn fabric_ifname(&self) -> String {
        crate::names::endpoint_ifname(self.addr4)
    }
}

/// Transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Proto {
    /// The protocol's name in lower case, as nft and Docker write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A port of the host that leads to a container on the same host. IPv4 and IPv6 are two entries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Transport protocol.
    pub proto: Proto,
    /// Only this address of the host; `None` is every address, of the target's family.
    pub host_ip: Option<IpAddr>,
    /// Port on the host, 1 to 65535.
    pub host_port: u16,
    /// The container's address.
    pub target: IpAddr,
    /// The container's port, 1 to 65535.
    pub target_port: u16,
    /// The container is about to stop: new connections are not led to it, those that it has go on.
    #[serde(default)]
    pub draining: bool,
}

/// Ports that lead to services of a network on every host of it, whether a backend is on that host or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingress {
    /// An address of this host in the network that no container has. The host's own rules lead a port here, with the
    /// port's own number; and it is the source of what goes on to other hosts, so that the answers come back here.
    pub addr4: Ipv4Addr,
    /// The same in networks that have IPv6.
    pub addr6: Option<Ipv6Addr>,
    /// Where each port leads.
    pub ports: BTreeMap<(Proto, u16), IngressPort>,
}

/// Where a port of every host leads: to the backends of a service that are on this host, and to all where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressPort {
    /// The service, by its virtual IPv4 address in [`NetworkState::services`].
    pub vip4: Ipv4Addr,
    /// The service, by its virtual IPv6 address.
    pub vip6: Option<Ipv6Addr>,
    /// The backends' port, 1 to 65535.
    pub target_port: u16,
}

impl Ingress {
    /// The addresses of this host.
    pub fn addrs(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [Some(IpAddr::V4(self.addr4)), self.addr6.map(IpAddr::V6)].into_iter().flatten()
    }

    /// What the host's own rules need: every port leads to this host's address in the network, an entry per family.
    pub fn published(&self) -> impl Iterator<Item = PublishedPort> + '_ {
        self.ports.keys().flat_map(move |(proto, port)| {
            let to = |target| PublishedPort {
                proto: *proto,
                host_ip: None,
                host_port: *port,
                target,
                target_port: *port,
                draining: false,
            };
            self.addrs().map(to)
        })
    }
}

impl IngressPort {
    /// The service's virtual address of a family.
    pub fn vip(&self, six: bool) -> Option<IpAddr> {
        if six { self.vip6.map(IpAddr::V6) } else { Some(IpAddr::V4(self.vip4)) }
    }
}

/// A connection whose destination was translated, as connection tracking knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translated {
    /// The address that the client asked for.
    pub asked: IpAddr,
    /// Protocol and port that it asked for; none of what has no ports.
    pub port: Option<(Proto, u16)>,
    /// The address that answers.
    pub answers: IpAddr,
}

/// Most backends of one service: the number of one has 16 bits in the map of backends.
pub const BACKENDS_MAX: usize = 1 << 16;

/// Where a virtual address leads. IPv4 and IPv6 are two services.
///
/// An address that is in none of the sets is dead: connections to it are forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The containers, here or on other hosts, to which new connections go, each with the same chance. Without any, a
    /// client is refused: TCP by a reset, everything else by "port unreachable".
    pub backends: BTreeSet<IpAddr>,
    /// Those that get no new connections and keep what they have, whatever its protocol: they are about to stop.
    pub draining: BTreeSet<IpAddr>,
    /// Those that get no new connections and keep those of TCP: they are there, but not well. A client that sends
    /// datagrams from one port would stay with them for ever.
    pub unhealthy: BTreeSet<IpAddr>,
}

/// What one overlay network shall be on this host. The whole truth: an endpoint, peer or block that is not named here
/// is removed, so build it under the lock that also covers [`crate::Overlay::add_endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkState {
    /// Its id.
    pub id: NetworkId,
    /// VXLAN network identifier, 1 to 2^24-1, unique in the cluster.
    pub vni: u32,
    /// The IPv4 subnet of the network, cluster-wide.
    pub subnet4: Ipv4Net,
    /// The IPv6 subnet, if the network has one.
    pub subnet6: Option<Ipv6Net>,
    /// The gateway inside `subnet4`, the same on every host.
    pub gateway4: Ipv4Addr,
    /// The gateway inside `subnet6`; present exactly when `subnet6` is.
    pub gateway6: Option<Ipv6Addr>,
    /// MTU of the network in bytes, [`MTU_MIN`] to [`HostConfig::overlay_mtu_max`] of every host.
    pub mtu: u32,
    /// No way out of the network: no egress, no published ports.
    pub internal: bool,
    /// The prefixes whose addresses this host hands out, and as /32 or /128 local addresses outside of them.
    pub local_blocks: BTreeSet<IpNet>,
    /// The other hosts.
    pub peers: BTreeMap<HostIndex, Peer>,
    /// The containers on this host.
    pub endpoints: BTreeMap<EndpointId, Endpoint>,
    /// Ports published by containers of this network on this host, so that a container which calls its own host's
    /// address reaches them too. The same entries stand in [`HostState::published`].
    pub published: BTreeSet<PublishedPort>,
    /// Services by virtual address, of either family. Addresses of the subnets that no host hands out.
    pub services: BTreeMap<IpAddr, Service>,
    /// Ports of every host that lead to some of these services. None of an internal network.
    #[serde(default)]
    pub ingress: Option<Ingress>,
}

/// What the host's own namespace shall have, besides each network's uplink.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The VTEPs of all other hosts; only they may send to the VXLAN port, and VXLAN to them is forwarded for none but
    /// them.
    pub vteps: BTreeSet<IpAddr>,
    /// All published ports of this host, those of [`Ingress::published`] too.
    pub published: BTreeSet<PublishedPort>,
    /// This host's addresses in networks, [`Ingress::addrs`] of each: a connection that leads to one of them is forgotten
    /// when its port is not published there any more.
    #[serde(default)]
    pub ingress: BTreeSet<IpAddr>,
    /// Whether any network that is not internal has IPv6: the host then forwards IPv6.
    pub ipv6: bool,
}

/// What an `ensure_*` call did. Empty when the kernel was as wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// One sentence for each change, in order.
    pub changes: Vec<String>,
    /// What could not be done because something that is not ours is in the way; it was left alone.
    pub conflicts: Vec<String>,
    /// What failed of the fast path. Packets that it concerns go the routed way, so nothing else is wrong.
    pub routed: Vec<String>,
    /// Endpoints whose link is gone. The other end is in a container, so only a new connection brings them back.
    pub lost_endpoints: BTreeSet<EndpointId>,
}

impl Report {
    /// Whether nothing was changed and nothing is wrong.
    pub fn is_empty(&self) -> bool {
        let Self { changes, conflicts, routed, lost_endpoints } = self;
        changes.is_empty() && conflicts.is_empty() && routed.is_empty() && lost_endpoints.is_empty()
    }

    /// Appends what another report says.
    pub fn merge(&mut self, other: Self) {
        self.changes.extend(other.changes);
        self.conflicts.extend(other.conflicts);
        self.routed.extend(other.routed);
        self.lost_endpoints.extend(other.lost_endpoints);
    }
}

/// A desired state that contradicts itself. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid network state: {0}")]
pub struct InvalidState(pub String);

fn ensure(holds: bool, says: impl FnOnce() -> String) -> Result<(), InvalidState> {
    if holds { Ok(()) } else { Err(InvalidState(says())) }
}

impl NetworkState {
    /// Checks the state against itself and the host: ranges, families, gateways and blocks inside the subnets, no
    /// prefix in two places.
    ///
    /// # Errors
    /// The first contradiction, in words.
    pub fn validate(&self, config: &HostConfig) -> Result<(), InvalidState> {
        let id = &self.id;
        ensure((1..=VNI_MAX).contains(&self.vni), || {
            format!("vni {} of network {id} is not 1 to {VNI_MAX}", self.vni)
        })?;
        ensure(self.subnet4.contains(&self.gateway4), || {
            format!("gateway {} of network {id} is outside {}", self.gateway4, self.subnet4)
        })?;
        let both = match (self.subnet6, self.gateway6) {
            (Some(subnet), Some(gateway)) => subnet.contains(&gateway),
            (None, None) => true,
            _ => false,
        };
        ensure(both, || format!("network {id} needs an ipv6 gateway inside its ipv6 subnet, or neither"))?;
        let max = config.overlay_mtu_max().min(MTU_MAX);
        ensure((MTU_MIN..=max).contains(&self.mtu), || {
            format!("mtu {} of network {id} is not {MTU_MIN} to {max}, what the underlay carries", self.mtu)
        })?;
        self.validate_peers(config)?;
        let taken = self.validate_endpoints()?;
        self.validate_services(&taken)?;
        self.validate_ingress(&taken)?;
        validate_ports(&self.published)
    }

    fn validate_peers(&self, config: &HostConfig) -> Result<(), InvalidState> {
        let mut owner: BTreeMap<IpNet, HostIndex> = BTreeMap::new();
        let mut vteps = BTreeSet::from([config.vtep]);
        let local = self.local_blocks.iter().map(|block| (config.host, *block));
        let remote = self.peers.iter().flat_map(|(host, peer)| peer.blocks.iter().map(move |block| (*host, *block)));
        for (host, block) in local.chain(remote) {
            ensure(self.holds(block), || format!("block {block} of host {host} is outside network {}", self.id))?;
            ensure(block == block.trunc(), || format!("block {block} of host {host} has host bits set"))?;
            if let Some(other) = owner.insert(block, host) {
                return Err(InvalidState(format!("block {block} belongs to both host {other} and host {host}")));
            }
        }
        for (host, peer) in &self.peers {
            ensure(*host != config.host && host.0 != 0, || {
                format!("host {host} cannot be a peer of host {}", config.host)
            })?;
            ensure(peer.vtep.is_ipv4() == config.vtep.is_ipv4(), || {
                format!("vtep {} of host {host} and our own {} are of two families", peer.vtep, config.vtep)
            })?;
            ensure(vteps.insert(peer.vtep), || format!("vtep {} of host {host} is in use by another host", peer.vtep))?;
        }
        Ok(())
    }

    /// Answers which addresses are taken on this host.
    fn validate_endpoints(&self) -> Result<BTreeSet<IpAddr>, InvalidState> {
        let mut seen = BTreeSet::from([IpAddr::V4(self.gateway4)]);
        seen.extend(self.gateway6.map(IpAddr::V6));
        for (name, endpoint) in &self.endpoints {
            for addr in endpoint.addrs() {
                ensure(self.holds(IpNet::from(addr)), || format!("address {addr} of {name} is outside {}", self.id))?;
                ensure(seen.insert(addr), || format!("address {addr} of {name} is taken"))?;
            }
        }
        Ok(seen)
    }

    fn validate_services(&self, taken: &BTreeSet<IpAddr>) -> Result<(), InvalidState> {
        for (vip, service) in &self.services {
            ensure(self.holds(IpNet::from(*vip)), || format!("virtual address {vip} is outside {}", self.id))?;
            ensure(!taken.contains(vip), || format!("virtual address {vip} is taken"))?;
            ensure(service.backends.len() <= BACKENDS_MAX, || {
                format!("virtual address {vip} has {} backends, more than {BACKENDS_MAX}", service.backends.len())
            })?;
            for backend in &service.backends {
                let fits = vip.is_ipv4() == backend.is_ipv4() && self.holds(IpNet::from(*backend));
                ensure(fits && !self.services.contains_key(backend), || {
                    format!("virtual address {vip} cannot lead to {backend}")
                })?;
            }
        }
        Ok(())
    }

    fn validate_ingress(&self, taken: &BTreeSet<IpAddr>) -> Result<(), InvalidState> {
        let Some(ingress) = &self.ingress else { return Ok(()) };
        ensure(!self.internal, || format!("network {} is internal and has ports of every host", self.id))?;
        for addr in ingress.addrs() {
            let net = IpNet::from(addr);
            let ours = self.local_blocks.iter().any(|block| block.contains(&net));
            let free = !taken.contains(&addr) && !self.services.contains_key(&addr);
            ensure(ours && free, || format!("address {addr} cannot be this host's own in network {}", self.id))?;
        }
        for ((proto, port), IngressPort { vip4, vip6, target_port }) in &ingress.ports {
            let vips = [Some(IpAddr::V4(*vip4)), vip6.map(IpAddr::V6)];
            let known = vips.iter().flatten().all(|vip| self.services.contains_key(vip));
            ensure(known, || {
                format!("port {port}/{proto} leads to {vip4}, which is no service of network {}", self.id)
            })?;
            ensure(*port != 0 && *target_port != 0, || format!("port 0 cannot be published (of {vip4})"))?;
        }
        Ok(())
    }

    /// Whether a translated connection may go on: where it leads, the service of the virtual address or the port that it
    /// asked for still is. One that asked for another address came by a port of this host; it may go on to a container
    /// that is here, with whose end it is forgotten.
    pub fn keeps(&self, flow: &Translated) -> bool {
        let Translated { asked, port, answers } = *flow;
        let inside = self.holds(IpNet::from(asked));
        let by_port = || {
            let ingress = self.ingress.as_ref()?;
            let asks = !inside || ingress.addrs().any(|addr| addr == asked);
            let port = ingress.ports.get(&port.filter(|_| asks)?)?;
            self.services.get(&port.vip(answers.is_ipv6())?)
        };
        let Some(service) = self.services.get(&asked).or_else(by_port) else {
            return !inside && self.is_here(answers);
        };
        let Service { backends, draining, unhealthy } = service;
        let tcp = port.is_some_and(|(proto, _)| proto == Proto::Tcp);
        backends.contains(&answers) || draining.contains(&answers) || (tcp && unhealthy.contains(&answers))
    }

    /// Whether a container on this host has the address.
    fn is_here(&self, addr: IpAddr) -> bool {
        self.endpoints.values().any(|endpoint| endpoint.addrs().any(|own| own == addr))
    }

    /// Whether a prefix lies inside the network's subnets.
    pub fn holds(&self, prefix: IpNet) -> bool {
        match prefix {
            IpNet::V4(prefix) => self.subnet4.contains(&prefix),
            IpNet::V6(prefix) => self.subnet6.is_some_and(|subnet| subnet.contains(&prefix)),
        }
    }
}

impl HostState {
    /// Checks that no two published ports claim the same place.
    ///
    /// # Errors
    /// The first contradiction, in words.
    pub fn validate(&self) -> Result<(), InvalidState> {
        validate_ports(&self.published)
    }

    /// Whether a translated connection of the host's own namespace may go on: it leads elsewhere than to this host's
    /// addresses in networks, or its port is still published there.
    pub fn keeps(&self, flow: &Translated) -> bool {
        let published = |(proto, port)| {
            let same = |p: &PublishedPort| (p.proto, p.host_port, p.target) == (proto, port, flow.answers);
            self.published.iter().any(same)
        };
        !self.ingress.contains(&flow.answers) || flow.port.is_some_and(published)
    }
}

fn validate_ports(ports: &BTreeSet<PublishedPort>) -> Result<(), InvalidState> {
    let mut seen = BTreeSet::new();
    for port in ports {
        let PublishedPort { proto, host_ip, host_port, target, target_port, draining: _ } = port;
        ensure(*host_port != 0 && *target_port != 0, || format!("port 0 cannot be published (to {target})"))?;
        ensure(host_ip.is_none_or(|ip| ip.is_ipv4() == target.is_ipv4()), || {
            format!("port {host_port}/{proto}: host address and target {target} are of two families")
        })?;
        ensure(seen.insert((*proto, *host_ip, *host_port, target.is_ipv4())), || {
            format!("port {host_port}/{proto} is published twice")
        })?;
    }
    Ok(())
}

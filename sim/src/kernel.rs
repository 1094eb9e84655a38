//! The kernel's side of a host: what its agent makes of its assignments, on netlib's typed kernel.
//!
//! Translation (`agent_network`), layout, plan and driver (`netlib`) are the ones that ship; what stands here is the
//! order in which `agent/src/overlay/actor.rs` calls them, and a kernel that refuses, that others change, and in which
//! an agent dies between two operations. Some hosts of a world have one, since it costs as much as all else of a host.
//!
//! What must hold is looked at from outside: packets are walked through routes, next hops, neighbours and forwarding
//! entries from every host of the sample to every container of the cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use agent_core::ActionError;
use agent_network::Attached;
use netlib::{
    Endpoint, EndpointId, Error, HostConfig, HostIndex, Kernel, Mac, Proto, PublishedPort, Report, Scope, driver,
    fake::{FakeKernel, FakeState},
    kernel::{OpFailure, OpFailures},
    names,
    plan::Op,
    state::{Family, Link, LinkKind, Observed, Query, Route, RouteKey, Target},
};
use skein_api::{Assignment, NetworkAssignment, NetworkId, PeerAssignment, Protocol, address6};

use crate::{
    host::Host,
    queue::Millis,
    random::Random,
    world::{AgentEvent, World},
};

/// Hosts of a world that have a kernel, at most.
const SAMPLE_MAX: u32 = 16;
/// How often everything is looked at: `FULL_AUDIT` of the overlay.
pub(crate) const AUDIT_MS: Millis = 60_000;
/// From a change by others until it is looked at: `DEBOUNCE` of the overlay.
const DEBOUNCE_MS: Millis = 500;
/// Of a thousand changes by others, how many the watch does not tell of.
const UNSEEN: u64 = 300;
/// MTU of every underlay.
pub(crate) const UNDERLAY_MTU: u32 = 1_500;
/// ENOBUFS of Linux: netlink has no memory for it.
const ENOBUFS: i32 = 105;

/// How a kernel treats the agent, for as long as a fault lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KernelMoods {
    /// Of a thousand operations, how many it refuses.
    pub(crate) refuses: u64,
    /// The agent dies after so many more operations.
    pub(crate) dies_after: Option<u64>,
}

/// A container's place in one network.
#[derive(Clone, Debug)]
struct Place {
    network: NetworkId,
    attached: Attached,
    /// Name of the container's end of its link.
    ifname: String,
}

/// A host's kernel, and what the agent's network side remembers of containers.
#[derive(Debug)]
pub(crate) struct KernelSide {
    kernel: FakeKernel,
    pub(crate) moods: KernelMoods,
    /// The agent died of its mood, and is to come back with the fault's end.
    pub(crate) died: bool,
    places: BTreeMap<String, Vec<Place>>,
    /// The last look made everything as it should be.
    ensured: bool,
    /// What others have: in the host's namespace, and in fabrics.
    foreign: BTreeMap<Scope, String>,
}

/// The kernel as a fault shows it to the agent.
struct Moody<'a> {
    kernel: &'a FakeKernel,
    refuses: u64,
    rng: Mutex<Random>,
    /// Operations until the agent dies.
    left: AtomicU64,
}

impl Moody<'_> {
    fn dead() -> Error {
        Error::Worker("its changes")
    }

    /// Takes one operation; false when the agent died before it.
    fn take(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn is_dead(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }

    fn refused(&self) -> Option<io::Error> {
        let mut rng = self.rng.lock().expect("one thread");
        (self.refuses > 0 && rng.per_mille(self.refuses)).then(|| io::Error::from_raw_os_error(ENOBUFS))
    }
}

impl Kernel for Moody<'_> {
    fn networks(&self) -> Result<Vec<netlib::NetworkId>, Error> {
        if self.is_dead() { Err(Self::dead()) } else { self.kernel.networks() }
    }

    fn create_fabric(&self, id: &netlib::NetworkId) -> Result<bool, Error> {
        if self.take() { self.kernel.create_fabric(id) } else { Err(Self::dead()) }
    }

    fn remove_fabric(&self, id: &netlib::NetworkId) -> Result<bool, Error> {
        if self.take() { self.kernel.remove_fabric(id) } else { Err(Self::dead()) }
    }

    fn observe(&self, scope: &Scope, query: &Query) -> Result<Observed, Error> {
        if self.is_dead() {
            return Err(Self::dead());
        }
        match self.refused() {
            Some(source) => Err(Error::Observe { what: "links", scope: scope.clone(), source }),
            None => self.kernel.observe(scope, query),
        }
    }

    fn apply(&self, scope: &Scope, ops: &[Op]) -> Result<(), Error> {
        let mut failures = OpFailures::default();
        for (index, op) in ops.iter().enumerate() {
            if !self.take() {
                return Err(Self::dead());
            }
            let done = match self.refused() {
                Some(source) => Err(source),
                None => match self.kernel.apply(scope, std::slice::from_ref(op)) {
                    Err(Error::Apply { failures, .. }) => {
                        Err(failures.0.into_iter().next().expect("one failed").source)
                    }
                    other => Ok(other?),
                },
            };
            if let Err(source) = done {
                failures.0.push(OpFailure { index, what: op.to_string(), source });
            }
        }
        if failures.0.is_empty() {
            return Ok(());
        }
        Err(Error::Apply { scope: scope.clone(), total: ops.len(), failures })
    }

    fn forget_connections(
        &self,
        scope: &Scope,
        goes: &(dyn Fn(&netlib::Translated) -> bool + Sync),
    ) -> Result<usize, Error> {
        if self.is_dead() { Err(Self::dead()) } else { self.kernel.forget_connections(scope, goes) }
    }
}

/// Address of a host on the underlay.
pub(crate) fn underlay(host: u32) -> Ipv4Addr {
    let [_, b, c, d] = host.to_be_bytes();
    [198, 18 + b, c, d].into()
}

/// Whether a host of a world of so many has a kernel: a few, evenly spread.
pub(crate) fn is_sampled(host: u32, hosts: u32) -> bool {
    host.is_multiple_of(hosts.div_ceil(SAMPLE_MAX))
}

/// A host of the sample, for any number.
pub(crate) fn sampled(number: u32, hosts: u32) -> u32 {
    let step = hosts.div_ceil(SAMPLE_MAX);
    (number / step) * step
}

/// What is not ours in a namespace, in words. The containers' ends of their links are the engine's to make and remove, and
/// the loopback is the namespace's: it is down for a moment in one that is being made.
fn foreign(ns: &Observed) -> String {
    let ours = |dev: &str| dev.starts_with("sk") || dev.starts_with("c-");
    let links: Vec<_> = ns.links.iter().filter(|(name, _)| !ours(name) && *name != "lo").collect();
    let routes: Vec<_> = ns.routes.iter().filter(|(_, route)| route.protocol != names::RTPROT_SKEIN).collect();
    let addrs: Vec<_> = ns.addrs.iter().filter(|(dev, _)| !ours(dev) && dev != "lo").collect();
    let neighs: Vec<_> = ns.neighs.iter().filter(|((dev, _), _)| !ours(dev)).collect();
    format!("{links:?} {routes:?} {addrs:?} {neighs:?}")
}

/// Something of somebody else: a link with its route, address and neighbour.
fn plant(ns: &mut Observed, number: u8) {
    let dev = format!("eth{number}");
    let at = |last| IpAddr::from([198, 51, number, last]);
    let link = Link { kind: LinkKind::Other, mac: Mac([4, 0, 0, 0, 0, number]), mtu: UNDERLAY_MTU, up: true };
    let dst = format!("198.51.{number}.0/24").parse().expect("a prefix");
    ns.links.insert(dev.clone(), link);
    ns.addrs.insert((dev.clone(), at(1).into()));
    ns.neighs.insert((dev.clone(), at(2)), Mac([6; 6]));
    ns.routes.insert(RouteKey::new(dst), Route { target: Target::Dev { dev, via: None }, protocol: 4, mtu: None });
}

fn pick<'a, K: Clone + 'a>(keys: impl Iterator<Item = &'a K>, rng: &mut Random) -> Option<K> {
    let keys: Vec<&K> = keys.collect();
    (!keys.is_empty()).then(|| (*rng.pick(&keys)).clone())
}

/// Something of ours is taken away or changed by others. Links of containers are left alone: nobody can bring them back
/// without a new container.
fn meddle(state: &mut FakeState, rng: &mut Random) {
    let ours = |name: &str| name.starts_with("sk") && !name.starts_with(names::ENDPOINT_PREFIX);
    let Some(id) = pick(state.fabrics.keys(), rng) else { return };
    let Some(fabric) = state.fabrics.get_mut(&id) else { return };
    match rng.below(10) {
        0 => {
            let of_ours = fabric.routes.iter().filter(|(_, route)| route.protocol == names::RTPROT_SKEIN);
            let key = pick(of_ours.map(|(key, _)| key), rng);
            key.map(|key| fabric.routes.remove(&key));
        }
        1 => {
            let key = pick(fabric.neighs.keys().filter(|(dev, _)| dev.starts_with("sk")), rng);
            key.map(|key| fabric.neighs.remove(&key));
        }
        2 => {
            let key = pick(fabric.fdb.keys(), rng);
            key.map(|key| fabric.fdb.insert(key, underlay(9_999).into()));
        }
        3 => {
            let id = pick(fabric.nexthops.keys(), rng);
            if let Some(id) = id {
                fabric.drop_nexthop(id);
            }
        }
        4 => {
            let name = pick(fabric.links.keys().filter(|name| ours(name)), rng);
            if let Some(name) = name {
                state.delete_link(&Scope::Fabric(id), &name);
            }
        }
        5 => fabric.table = None,
        6 => drop(fabric.sysctls.insert("net/ipv4/ip_forward".into(), "0".into())),
        7 => {
            let name = pick(fabric.links.keys().filter(|name| name.starts_with("sk")), rng);
            if let Some(link) = name.and_then(|name| fabric.links.get_mut(&name)) {
                link.up = false;
            }
        }
        8 => state.host.routes.retain(|_, route| route.protocol != names::RTPROT_SKEIN),
        _ => state.host.table = None,
    }
}

impl KernelSide {
    pub(crate) fn new() -> Self {
        let mut side = Self {
            kernel: FakeKernel::new(),
            moods: KernelMoods::default(),
            died: false,
            places: BTreeMap::new(),
            ensured: false,
            foreign: BTreeMap::new(),
        };
        side.boot();
        side
    }

    /// The host has lost its power: its next kernel has what every host has, and nothing of ours.
    pub(crate) fn boot(&mut self) {
        self.kernel = FakeKernel::new();
        self.kernel.with(|state| {
            plant(&mut state.host, 0);
            // Docker's chains, for IPv4 only.
            state.host.docker_user.insert(Family::V4, BTreeSet::new());
        });
        self.places.clear();
        self.ensured = false;
        self.foreign = BTreeMap::from([(Scope::Host, self.kernel.with(|state| foreign(&state.host)))]);
    }

    fn moody(&self, seed: u64) -> Moody<'_> {
        Moody {
            kernel: &self.kernel,
            refuses: self.moods.refuses,
            rng: Mutex::new(Random::new(seed, 0)),
            left: AtomicU64::new(self.moods.dies_after.unwrap_or(u64::MAX)),
        }
    }

    /// After a call: how much longer the agent has.
    fn left(&mut self, left: u64) -> bool {
        self.moods.dies_after = self.moods.dies_after.map(|_| left);
        left == 0
    }

    /// Everything, as `ensure_all` of the overlay: networks, what is no more, the host. Goes on after a failure and gives
    /// the first.
    fn ensure_all(&self, kernel: &dyn Kernel, host: &Host, gone: &mut Vec<Scope>) -> Result<Report, Error> {
        let Some(agent) = &host.agent else { return Ok(Report::default()) };
        let known = &host.disk.networks;
        let documents = agent.assignments.documents().range("peer/".to_owned().."peer0".to_owned());
        let mut peers: BTreeMap<&NetworkId, Vec<&PeerAssignment>> = BTreeMap::new();
        for (_, document) in documents {
            if let Assignment::Peer(peer) = document
                && known.contains_key(&peer.network)
            {
                peers.entry(&peer.network).or_default().push(peer);
            }
        }
        let vtep = IpAddr::V4(underlay(host.at));
        let mut report = Report::default();
        let mut first = None;
        let mut note = |result: Result<Report, Error>| match result {
            Ok(more) => report.merge(more),
            Err(error) => drop(first.get_or_insert(error)),
        };
        for ours in known.values() {
            let peers = peers.get(&ours.id).into_iter().flatten().copied();
            note(self.ensure_network(kernel, ours, peers, vtep));
        }
        note(self.remove_unknown(kernel, known, gone));
        if let Some(ours) = known.values().next() {
            let published = self.places.values().flatten().flat_map(|place| place.attached.published.iter().cloned());
            let state = agent_network::host(known.values(), peers.into_values().flatten(), published, vtep);
            note(driver::ensure_host(kernel, &config(ours, vtep), &state));
        }
        first.map_or(Ok(report), Err)
    }

    fn ensure_network<'a>(
        &self,
        kernel: &dyn Kernel,
        ours: &NetworkAssignment,
        peers: impl Iterator<Item = &'a PeerAssignment>,
        vtep: IpAddr,
    ) -> Result<Report, Error> {
        let here = |place: &&Place| place.network == ours.id;
        let attached = self.places.values().flatten().filter(here);
        let attached = attached.map(|place| (EndpointId(place.ifname.clone()), place.attached.clone()));
        let (state, _) = agent_network::network(ours, peers, attached, vtep)?;
        driver::ensure_network(kernel, &config(ours, vtep), &state)
    }

    fn remove_unknown(
        &self,
        kernel: &dyn Kernel,
        known: &BTreeMap<NetworkId, NetworkAssignment>,
        gone: &mut Vec<Scope>,
    ) -> Result<Report, Error> {
        let mut report = Report::default();
        for id in kernel.networks()? {
            let network = NetworkId::new(id.as_str());
            let used = self.places.values().flatten().any(|place| place.network == network);
            if !known.contains_key(&network) && !used {
                driver::remove_network(kernel, &id)?;
                report.changes.push(format!("network {id}: removed"));
                gone.push(Scope::Fabric(id));
            }
        }
        Ok(report)
    }

    /// Whether a container's place of some network has this address here.
    fn leads_to(&self, network: &netlib::NetworkId, address: Ipv4Addr) -> bool {
        let key = RouteKey::new(IpAddr::V4(address).into());
        self.kernel.with(|state| {
            let route = state.fabrics.get(network).and_then(|fabric| fabric.routes.get(&key));
            route.is_some_and(|route| matches!(route.target, Target::Dev { .. }))
        })
    }
}

fn config(ours: &NetworkAssignment, vtep: IpAddr) -> HostConfig {
    HostConfig::new(HostIndex(ours.host_index), vtep, UNDERLAY_MTU)
}

/// Where a packet goes from a fabric.
enum Hop {
    /// To the container with this MAC.
    Here(Mac),
    /// Through the underlay, to a device with this MAC and VNI.
    Away { vtep: IpAddr, vni: u32, mac: Mac },
}

/// The kernel's way with a packet: the longest prefix, then its next hop, neighbour and forwarding entry.
fn forward(fabric: &Observed, to: IpAddr) -> Result<Hop, String> {
    let fits = fabric.routes.iter().filter(|(key, _)| key.dst.contains(&to));
    let best = fits.max_by_key(|(key, _)| (key.dst.prefix_len(), std::cmp::Reverse(key.metric)));
    let (key, route) = best.ok_or("there is no route")?;
    let up = |dev: &str| {
        let link = fabric.links.get(dev).filter(|link| link.up);
        link.ok_or_else(|| format!("{dev} is not there, or down"))
    };
    match &route.target {
        Target::Dev { dev, via: None } => {
            up(dev)?;
            let mac = fabric.neighs.get(&(dev.clone(), to)).ok_or_else(|| format!("{dev} has no neighbour {to}"))?;
            Ok(Hop::Here(*mac))
        }
        Target::Nexthop(id) => {
            let hop = fabric.nexthops.get(id).ok_or("its next hop is not there")?;
            let LinkKind::Vxlan(vxlan) = &up(&hop.dev)?.kind else { return Err(format!("{} is no VXLAN", hop.dev)) };
            let mac = fabric.neighs.get(&(hop.dev.clone(), hop.via));
            let mac = mac.ok_or_else(|| format!("next hop {} has no neighbour", hop.via))?;
            let vtep = fabric.fdb.get(&(hop.dev.clone(), *mac)).ok_or_else(|| format!("{mac} has no VTEP"))?;
            Ok(Hop::Away { vtep: *vtep, vni: vxlan.vni, mac: *mac })
        }
        other => Err(format!("the route of {} leads to {other:?}", key.dst)),
    }
}

impl World {
    fn look_at(&mut self, host: u32, at: Millis) {
        if self.hosts[host as usize].kernel.is_some() {
            self.agent_event_at(host, at, AgentEvent::Network);
        }
    }

    /// The agent starts: it looks at its kernel, and again once a minute.
    pub(crate) fn network_begins(&mut self, host: u32) {
        if self.hosts[host as usize].kernel.is_some() {
            self.look_at(host, self.now_ms);
            self.agent_event_at(host, self.now_ms + AUDIT_MS, AgentEvent::Audit);
        }
    }

    pub(crate) fn network_audit(&mut self, host: u32) {
        self.agent_event_at(host, self.now_ms + AUDIT_MS, AgentEvent::Audit);
        if !skein_api::mutant!("no-audit") {
            self.network_look(host);
        }
    }

    /// Brings the kernel to what the assignments say.
    pub(crate) fn network_look(&mut self, host: u32) {
        let seed = self.kernel_rng.bits();
        let h = &self.hosts[host as usize];
        let Some(side) = h.kernel.as_ref().filter(|_| h.agent.is_some()) else { return };
        let mut gone = Vec::new();
        let kernel = side.moody(seed);
        let result = side.ensure_all(&kernel, h, &mut gone);
        let left = kernel.left.into_inner();
        let Some(side) = &mut self.hosts[host as usize].kernel else { return };
        side.ensured = result.is_ok();
        side.foreign.retain(|scope, _| !gone.contains(scope));
        let dead = side.left(left);
        let changes = match result {
            Ok(report) => report.changes,
            Err(error) => vec![format!("failed: {error}")],
        };
        if !changes.is_empty() {
            self.last_action_ms = self.now_ms;
            self.trace.mix(&[self.now_ms, 11, u64::from(host), changes.len() as u64]);
            self.trace.line(self.now_ms, || format!("h{host}: network: {changes:?}"));
        }
        if dead {
            self.agent_event_at(host, self.now_ms, AgentEvent::Dies);
        }
    }

    /// The agent died in the middle of its operations; it comes back when the fault ends.
    pub(crate) fn agent_dies(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        let Some(side) = h.kernel.as_mut().filter(|side| side.moods.dies_after == Some(0)) else { return };
        (side.moods.dies_after, side.died) = (None, true);
        h.held_down += 1;
        self.agent_crash(host);
    }

    /// The engine attaches a container: its links are made before its process starts.
    pub(crate) fn network_attach(
        &mut self,
        host: u32,
        container: &str,
        addresses: &[(NetworkId, Ipv4Addr)],
    ) -> Result<(), ActionError> {
        let seed = self.kernel_rng.bits();
        let h = &mut self.hosts[host as usize];
        let Some(side) = &mut h.kernel else { return Ok(()) };
        let ports = h.engine.containers.get(container).map(|c| c.ports.clone()).unwrap_or_default();
        let mut places = Vec::new();
        let kernel = side.moody(seed);
        let mut result = Ok(());
        for (network, v4) in addresses {
            let Some(ours) = h.disk.networks.get(network) else { continue };
            let endpoint = Endpoint::new(*v4, Some(address6(ours.subnet6, ours.subnet4, *v4)));
            let published = ports.iter().filter(|port| port.host_port != 0).flat_map(|port| {
                let proto = match port.protocol {
                    Protocol::Tcp => Proto::Tcp,
                    Protocol::Udp => Proto::Udp,
                };
                endpoint.addrs().map(move |target| PublishedPort {
                    proto,
                    host_ip: None,
                    host_port: port.host_port,
                    target,
                    target_port: port.container_port,
                    draining: false,
                })
            });
            let attached = Attached { published: published.collect(), endpoint: endpoint.clone() };
            let place = Place { network: network.clone(), attached, ifname: format!("c-{container}-{}", places.len()) };
            result = agent_network::bare_network(ours)
                .map_err(Error::from)
                .and_then(|state| driver::add_endpoint(&kernel, &state, &endpoint, &place.ifname));
            if result.is_err() {
                break;
            }
            places.push(place);
        }
        let left = kernel.left.into_inner();
        let dead = side.left(left);
        side.places.insert(container.to_owned(), places);
        if let Err(error) = result {
            // The engine takes the container's namespace away again, and gives the addresses back.
            self.network_detach(host, container);
            self.hosts[host as usize].detach(addresses);
            if dead {
                self.agent_event_at(host, self.now_ms, AgentEvent::Dies);
            }
            return Err(ActionError { message: format!("failed to attach {container}: {error}"), fatal: false });
        }
        self.one_owner(host, addresses);
        if !ports.is_empty() {
            self.look_at(host, self.now_ms);
        }
        Ok(())
    }

    /// No other kernel leads to a container with one of these addresses.
    fn one_owner(&mut self, host: u32, addresses: &[(NetworkId, Ipv4Addr)]) {
        if self.checker.is_excused(self.now_ms) {
            return;
        }
        let others = self.hosts.iter().filter(|other| other.at != host && other.on);
        let mut taken = others.filter_map(|other| {
            let side = other.kernel.as_ref()?;
            let found = addresses.iter().find(|(network, address)| {
                network.as_str().parse().is_ok_and(|network| side.leads_to(&network, *address))
            })?;
            Some(format!("address {} is in the kernels of h{host} and {}", found.1, other.name))
        });
        if let Some(broken) = taken.next() {
            self.broken(broken);
        }
    }

    /// A container's process has ended: its namespace goes, and its ends of links with it.
    pub(crate) fn network_detach(&mut self, host: u32, container: &str) {
        let h = &mut self.hosts[host as usize];
        let Some(side) = &mut h.kernel else { return };
        let places = side.places.remove(container).unwrap_or_default();
        for place in &places {
            side.kernel.with(|state| state.delete_link(&Scope::Host, &place.ifname));
        }
        if h.agent.is_some() && !places.is_empty() {
            // The engine tells the plugin, which takes out what is left.
            self.look_at(host, self.now_ms + 1);
        }
    }

    /// The host is no member of any cluster any more: its agent leaves nothing.
    pub(crate) fn network_leaves(&mut self, host: u32) {
        let Some(side) = &mut self.hosts[host as usize].kernel else { return };
        for network in side.kernel.networks().unwrap_or_default() {
            // The typed kernel refuses no removal.
            let _ = driver::remove_network(&side.kernel, &network);
            side.foreign.remove(&Scope::Fabric(network));
        }
    }

    /// Others change what is ours, and make something of their own.
    pub(crate) fn kernel_meddle(&mut self, host: u32) {
        let rng = &mut self.kernel_rng;
        let h = &mut self.hosts[host as usize];
        let Some(side) = h.kernel.as_mut().filter(|_| h.on) else { return };
        side.kernel.with(|state| {
            for _ in 0..rng.within(1, 4) {
                meddle(state, rng);
            }
            if let Some(id) = pick(state.fabrics.keys(), rng).filter(|_| rng.per_mille(300))
                && let Some(fabric) = state.fabrics.get_mut(&id)
            {
                plant(fabric, 9);
                side.foreign.insert(Scope::Fabric(id), foreign(fabric));
            }
        });
        side.ensured = false;
        if h.agent.is_some() && !rng.per_mille(UNSEEN) {
            self.look_at(host, self.now_ms + DEBOUNCE_MS);
        }
    }

    /// What is not as it should be in the kernels of the sample, once all else is at rest.
    pub(crate) fn kernels_unsettled(&self) -> Option<String> {
        let vteps: BTreeMap<IpAddr, &Host> = self.hosts.iter().map(|h| (underlay(h.at).into(), h)).collect();
        let core = self.master.core()?;
        for host in &self.hosts {
            let (Some(side), Some(node)) = (&host.kernel, &host.disk.node) else { continue };
            if !side.ensured {
                return Some(format!("the kernel of {} is not as its agent wants it", host.name));
            }
            for ((network, address), (at, container)) in self.checker.addresses() {
                if !core.model().is_member(network, node) {
                    continue;
                }
                let Some(found) = core.model().networks.get(network) else { continue };
                let v6 = address6(found.subnet6, found.subnet4, *address);
                for to in [IpAddr::V4(*address), IpAddr::V6(v6)] {
                    let owner = &self.hosts[*at as usize];
                    if let Err(why) = walk(host, network, to, owner, &vteps) {
                        let name = &found.spec.name;
                        return Some(format!("from {} to {to} of {container} in {name}: {why}", host.name));
                    }
                }
            }
        }
        None
    }

    /// At rest a second look changes nothing, and what is of others is there.
    pub(crate) fn kernels_broken(&self) -> Option<String> {
        for host in &self.hosts {
            let Some(side) = &host.kernel else { continue };
            match side.ensure_all(&side.kernel, host, &mut Vec::new()) {
                Ok(report) if report.is_empty() => {}
                other => return Some(format!("a second look at the kernel of {} finds {other:?}", host.name)),
            }
            let state = side.kernel.with(|state| state.clone());
            for (scope, before) in &side.foreign {
                let now = match scope {
                    Scope::Host => Some(&state.host),
                    Scope::Fabric(id) => state.fabrics.get(id),
                };
                let now = now.map(foreign);
                if now.as_ref() != Some(before) {
                    return Some(format!("in {scope} of {} there was {before} of others, now {now:?}", host.name));
                }
            }
        }
        None
    }
}

/// A packet from a host's fabric to an address whose container runs on `owner`.
fn walk(
    from: &Host,
    network: &NetworkId,
    to: IpAddr,
    owner: &Host,
    vteps: &BTreeMap<IpAddr, &Host>,
) -> Result<(), String> {
    let id: netlib::NetworkId = network.as_str().parse().map_err(|e| format!("{e}"))?;
    let in_fabric = |host: &Host| {
        let side = host.kernel.as_ref().ok_or("it has no kernel")?;
        side.kernel.with(|state| match state.fabrics.get(&id) {
            Some(fabric) => forward(fabric, to),
            None => Err(format!("{} has no fabric", host.name)),
        })
    };
    let hop = in_fabric(from)?;
    let last = match hop {
        Hop::Here(_) if from.at != owner.at => return Err(format!("it ends at {}", from.name)),
        Hop::Here(mac) => mac,
        Hop::Away { vtep, vni, mac } => {
            let host = vteps.get(&vtep).ok_or_else(|| format!("{vtep} is no host"))?;
            if host.at != owner.at {
                return Err(format!("it goes to {}, not to {}", host.name, owner.name));
            }
            let Some(side) = &host.kernel else { return Ok(()) };
            side.kernel.with(|state| arrives(state, &id, underlay(from.at), vni, mac))?;
            match in_fabric(host)? {
                Hop::Here(mac) => mac,
                Hop::Away { vtep, .. } => return Err(format!("{} sends it on to {vtep}", host.name)),
            }
        }
    };
    let side = owner.kernel.as_ref().ok_or("it has no kernel")?;
    let mut places = side.places.values().flatten().filter(|place| place.network == *network);
    let wanted = places.find_map(|Place { attached: Attached { endpoint, .. }, .. }| {
        endpoint.addrs().any(|address| address == to).then_some(endpoint.mac)
    });
    if wanted != Some(last) { Err(format!("it is given to {last}, the container has {wanted:?}")) } else { Ok(()) }
}

/// A host takes a packet of another host: its guard knows the sender, and the network's device is the one that it is for.
fn arrives(state: &FakeState, id: &netlib::NetworkId, from: Ipv4Addr, vni: u32, mac: Mac) -> Result<(), String> {
    let guard = state.host.table.as_ref().and_then(|table| table.sets.get("vteps4"));
    if !guard.is_some_and(|(_, vteps)| vteps.contains_key(&from.to_string())) {
        return Err(format!("the guard there does not know {from}"));
    }
    let link = state.fabrics.get(id).and_then(|fabric| fabric.links.get(names::VXLAN_IFNAME)).filter(|link| link.up);
    let fits = link.is_some_and(|l| l.mac == mac && matches!(&l.kind, LinkKind::Vxlan(vxlan) if vxlan.vni == vni));
    if fits { Ok(()) } else { Err(format!("no device there takes {mac} in network {vni}: {link:?}")) }
}

//! The plugin's memory and its decisions: (state, request) -> (reply, effects, what to persist).
//!
//! Owns: which engine network is which of ours, and every endpoint that the engine made. Must not know: sockets, the
//! kernel, the engine, the disk. Pure; no tasks, no channels. The overlay's actor owns the one [`PluginState`].
//!
//! ```text
//!             CreateEndpoint            Join                  Publish
//!   (nothing) ─────────────▶ created ─────────▶ joined ◀──────────────▶ joined with ports
//!       ▲                      │  ▲               │         Revoke            │
//!       └──────────────────────┘  └───────────────┴───────────────────────────┘
//!           DeleteEndpoint                       Leave
//! ```
//! The engine never repeats CreateNetwork and RequestPool, neither after our restart nor after its own, so networks
//! and endpoints are on disk; a pool's id says all there is to know of it. Everything that takes down (Leave,
//! DeleteEndpoint, ReleaseAddress, DeleteNetwork, Revoke) succeeds for what is not there: an engine that starts after
//! a crash takes down what it remembers, and gives up on a container when that fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use agent_core::lease::{AddressFamily, Change, Holder, LeaseError, Leases};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlib::{Endpoint, Mac, Proto, PublishedPort};
use serde::{Deserialize, Serialize};
use skein_api::{NetworkAssignment, NetworkId, TaskId, address6};
use thiserror::Error;

use super::wire::{InterfaceName, JoinReply, PortBinding, Reply, ReplyInterface, Request, StaticRoute};

/// Keys of engine networks in the local state: `plugin/network/<engine's id>`.
pub const NETWORK_PREFIX: &str = "plugin/network/";
/// Keys of endpoints in the local state: `plugin/endpoint/<engine's id>`.
pub const ENDPOINT_PREFIX: &str = "plugin/endpoint/";
/// The name under which the engine knows both drivers.
pub const DRIVER: &str = "skein";
/// Start of a container's link before the engine moves it: `skc-` and 11 hex digits, 15 bytes of IFNAMSIZ's 16.
const CONTAINER_IFNAME_PREFIX: &str = "skc-";
const CONTAINER_IFNAME_DIGITS: usize = 11;

/// Why the engine's request was refused; shown to the user by the engine.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// A plain `docker network create`.
    #[error(
        "networks of driver {DRIVER} are made in the cluster, not at one engine; \
         hint: skein network create --attachable NAME, then docker run --network NAME"
    )]
    NotOurs,
    /// A network that the master has not given to this host.
    #[error("network {0} is not on this host; hint: skein network inspect {0}")]
    UnknownNetwork(String),
    /// The engine's network is not like ours.
    #[error("network {network} is {ours} in the cluster but {asked} at the engine")]
    Mismatch {
        /// Name of the network.
        network: String,
        /// Its subnet or kind.
        ours: String,
        /// What the engine said.
        asked: String,
    },
    /// A plain container in a network that is for services only.
    #[error("network {0} is not attachable; hint: skein network create --attachable makes one that is")]
    NotAttachable(String),
    /// An endpoint that was never made or is gone.
    #[error("endpoint {0} is not known")]
    UnknownEndpoint(String),
    /// The engine sent something that is not an address, a MAC or a pool.
    #[error("{value:?} is not {what}")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// What came.
        value: String,
    },
    /// No address.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A port that another container has.
    #[error("port {port}/{proto} of this host is published by {holder}")]
    PortTaken {
        /// Host port.
        port: u16,
        /// Protocol.
        proto: Proto,
        /// The other container, in words.
        holder: String,
    },
    /// A published port of an internal network.
    #[error("network {0} is internal: its containers cannot publish ports")]
    Internal(String),
}

/// Something to do in the kernel after the changes are on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make the endpoint's link.
    Attach {
        /// The endpoint.
        endpoint: String,
    },
    /// Remove the link of an endpoint that is gone.
    Detach {
        /// Its network.
        network: NetworkId,
        /// The endpoint, as the kernel has it.
        endpoint: Endpoint,
    },
    /// The published ports of this network changed.
    Ports {
        /// The network.
        network: NetworkId,
    },
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// For the engine, once the effects are done.
    pub reply: Reply,
    /// In this order, after the changes.
    pub effects: Vec<Effect>,
    /// For the disk.
    pub changes: Vec<Change>,
}

impl Outcome {
    fn reply(reply: Reply) -> Self {
        Self { reply, effects: Vec::new(), changes: Vec::new() }
    }
}

/// An endpoint that the engine made: a container in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginEndpoint {
    /// Our network.
    pub network: NetworkId,
    /// The task whose container it is; none for a plain `docker run`.
    pub task: Option<TaskId>,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address, if the engine's network has IPv6.
    pub v6: Option<Ipv6Addr>,
    /// MAC.
    pub mac: Mac,
    /// The container's namespace, while joined.
    pub sandbox: Option<String>,
    /// Published ports, with the host port that was taken.
    #[serde(default)]
    pub ports: Vec<PortBinding>,
    /// MTU of its link, bytes, as it was made; none: it was made by a release that did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

impl PluginEndpoint {
    /// For the kernel.
    pub fn to_netlib(&self) -> Endpoint {
        Endpoint { mac: self.mac, addr4: self.v4, addr6: self.v6, mtu: self.mtu }
    }

    /// The published ports as the kernel's maps have them: an entry per family.
    pub fn published(&self) -> impl Iterator<Item = PublishedPort> + '_ {
        self.ports.iter().flat_map(|port| {
            let targets = [Some(IpAddr::V4(self.v4)), self.v6.map(IpAddr::V6)].into_iter().flatten();
            targets.filter(|t| port.host_ip.is_none_or(|ip| ip.is_ipv4() == t.is_ipv4())).map(|target| PublishedPort {
                proto: port.proto,
                host_ip: port.host_ip,
                host_port: port.host_port,
                target,
                target_port: port.port,
                draining: false,
            })
        })
    }

    fn holder(&self, id: &str) -> String {
        match &self.task {
            Some(task) => format!("task {task} ({})", self.v4),
            None => format!("a container at {} (endpoint {})", self.v4, id.get(..12).unwrap_or(id)),
        }
    }
}

/// All that the engine told us and never repeats.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PluginState {
    networks: BTreeMap<String, NetworkId>,
    endpoints: BTreeMap<String, PluginEndpoint>,
    /// Keys of documents that cannot be read. An endpoint among them is a container of which nothing else is known.
    damaged: BTreeSet<String>,
}

impl PluginState {
    /// Reads the state back; see [`PluginState::damaged`] for what cannot be read.
    pub fn load(documents: &BTreeMap<String, String>) -> Self {
        let mut state = Self::default();
        for (key, json) in documents {
            if let (Some(id), Ok(network)) = (key.strip_prefix(NETWORK_PREFIX), serde_json::from_str(json)) {
                state.networks.insert(id.to_owned(), network);
            } else if let (Some(id), Ok(endpoint)) = (key.strip_prefix(ENDPOINT_PREFIX), serde_json::from_str(json)) {
                state.endpoints.insert(id.to_owned(), endpoint);
            } else {
                state.damaged.insert(key.clone());
            }
        }
        state
    }

    /// Keys of the documents that could not be read and are still there.
    pub fn damaged(&self) -> impl Iterator<Item = &str> {
        self.damaged.iter().map(String::as_str)
    }

    /// Whether this document could not be read and is still there.
    pub fn is_damaged(&self, key: &str) -> bool {
        self.damaged.contains(key)
    }

    /// Some endpoint cannot be read: there may be a container that nothing here knows. Its document goes when the
    /// engine deletes the endpoint.
    pub fn misses_endpoints(&self) -> bool {
        self.damaged.iter().any(|key| key.starts_with(ENDPOINT_PREFIX))
    }

    /// The document under this key, as it should be on disk; none: there should be none.
    pub fn document(&self, key: &str) -> Option<String> {
        match (key.strip_prefix(ENDPOINT_PREFIX), key.strip_prefix(NETWORK_PREFIX)) {
            (Some(id), _) => self.endpoints.get(id).map(to_json),
            (_, Some(id)) => self.networks.get(id).map(to_json),
            _ => None,
        }
    }

    /// Every endpoint, by the engine's id.
    pub fn endpoints(&self) -> &BTreeMap<String, PluginEndpoint> {
        &self.endpoints
    }

    /// Endpoints of a network whose containers are there.
    pub fn joined<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = (&'a String, &'a PluginEndpoint)> {
        self.endpoints.iter().filter(move |(_, e)| e.network == *network && e.sandbox.is_some())
    }

    /// Whether the engine has made anything of this network that is still there.
    pub fn uses(&self, network: &NetworkId) -> bool {
        self.endpoints.values().any(|e| e.network == *network)
    }

    /// Whether an endpoint has this address.
    pub fn has_address(&self, network: &NetworkId, address: Ipv4Addr) -> bool {
        self.endpoints.values().any(|e| e.network == *network && e.v4 == address)
    }

    /// For each local container, its networks with its addresses there.
    pub fn sandboxes(&self) -> Vec<Vec<(NetworkId, Vec<IpAddr>)>> {
        let mut found: BTreeMap<&str, Vec<(NetworkId, Vec<IpAddr>)>> = BTreeMap::new();
        for endpoint in self.endpoints.values() {
            let Some(sandbox) = &endpoint.sandbox else {
                continue;
            };
            let addresses = [Some(IpAddr::V4(endpoint.v4)), endpoint.v6.map(IpAddr::V6)];
            let entry = (endpoint.network.clone(), addresses.into_iter().flatten().collect());
            found.entry(sandbox).or_default().push(entry);
        }
        found.into_values().collect()
    }

    /// Notes with which MTU the link of an endpoint is made.
    pub fn set_mtu(&mut self, id: &str, mtu: u32) -> Option<Change> {
        let endpoint = self.endpoints.get_mut(id)?;
        endpoint.mtu = Some(mtu);
        Some(put_endpoint(id, endpoint))
    }

    /// Checks wanted ports against those of other endpoints.
    ///
    /// # Errors
    /// [`Refusal::PortTaken`] with the holder.
    pub fn check_ports(&self, endpoint: &str, ports: &[PortBinding]) -> Result<(), Refusal> {
        for wanted in ports {
            for (id, other) in self.endpoints.iter().filter(|(id, _)| *id != endpoint) {
                let overlaps = |p: &PortBinding| {
                    let same_ip = p.host_ip.is_none() || wanted.host_ip.is_none() || p.host_ip == wanted.host_ip;
                    p.proto == wanted.proto && p.host_port == wanted.host_port && same_ip
                };
                if other.ports.iter().any(overlaps) {
                    let (port, proto) = (wanted.host_port, wanted.proto);
                    return Err(Refusal::PortTaken { port, proto, holder: other.holder(id) });
                }
            }
        }
        Ok(())
    }

    /// Decides about a request. Nothing is changed when it is refused.
    ///
    /// `Publish` must come with concrete host ports: choosing one that is free on the host is the caller's work.
    ///
    /// # Errors
    /// A [`Refusal`] with words for the user.
    pub fn handle(
        &mut self,
        known: &BTreeMap<NetworkId, NetworkAssignment>,
        leases: &mut Leases,
        request: Request,
    ) -> Result<Outcome, Refusal> {
        match request {
            Request::Activate => Ok(Outcome::reply(Reply::Activate { implements: ["NetworkDriver", "IpamDriver"] })),
            Request::DriverCapabilities => {
                Ok(Outcome::reply(Reply::DriverCapabilities { scope: "local", connectivity_scope: "global" }))
            }
            Request::IpamCapabilities => Ok(Outcome::reply(Reply::IpamCapabilities {
                requires_mac_address: true,
                requires_request_replay: false,
            })),
            Request::DefaultAddressSpaces => Ok(Outcome::reply(Reply::AddressSpaces {
                local_default_address_space: "skein-local",
                global_default_address_space: "skein-global",
            })),
            Request::Nothing | Request::ReleasePool { .. } => Ok(Outcome::reply(Reply::Empty {})),
            Request::CreateNetwork { engine_network, network, internal, pools } => {
                self.create_network(known, engine_network, network, internal, &pools)
            }
            Request::DeleteNetwork { engine_network } => Ok(self.delete_network(&engine_network)),
            Request::CreateEndpoint { engine_network, endpoint, address, address6, mac, task } => {
                let wanted = Wanted { address: &address, address6: &address6, mac: &mac, task };
                self.create_endpoint(known, leases, &engine_network, endpoint, wanted)
            }
            Request::EndpointOperInfo { .. } => Ok(Outcome::reply(Reply::Info { value: BTreeMap::new() })),
            Request::DeleteEndpoint { endpoint } => Ok(self.delete_endpoint(&endpoint)),
            Request::Join { endpoint, sandbox } => self.join(known, &endpoint, sandbox),
            Request::Leave { endpoint } => Ok(self.leave(&endpoint)),
            Request::Publish { endpoint, ports } => self.publish(known, &endpoint, ports),
            Request::Revoke { endpoint } => Ok(self.set_ports(&endpoint, Vec::new())),
            Request::RequestPool { pool, network, v6 } => request_pool(known, &pool, network, v6),
            Request::RequestAddress { pool, address, gateway, mac } => {
                request_address(known, leases, &pool, &address, gateway, mac.as_deref())
            }
            Request::ReleaseAddress { pool, address } => Ok(release_address(known, leases, &pool, &address)),
        }
    }

    fn create_network(
        &mut self,
        known: &BTreeMap<NetworkId, NetworkAssignment>,
        engine_network: String,
        network: Option<String>,
        internal: bool,
        pools: &[String],
    ) -> Result<Outcome, Refusal> {
        let id = NetworkId::new(network.ok_or(Refusal::NotOurs)?);
        let ours = find_known(known, &id)?;
        for pool in pools {
            if !is_pool_of(ours, pool) {
                return Err(Refusal::Mismatch {
                    network: ours.name.clone(),
                    ours: format!("{} and {}", ours.subnet4, ours.subnet6),
                    asked: pool.clone(),
                });
            }
        }
        if internal && !ours.internal {
            return Err(Refusal::Mismatch {
                network: ours.name.clone(),
                ours: "not internal".into(),
                asked: "internal".into(),
            });
        }
        let change = Change::Put(format!("{NETWORK_PREFIX}{engine_network}"), to_json(&id));
        self.damaged.remove(change.key());
        self.networks.insert(engine_network, id);
        Ok(Outcome { changes: vec![change], ..Outcome::reply(Reply::Empty {}) })
    }

    fn delete_network(&mut self, engine_network: &str) -> Outcome {
        let mut outcome = Outcome::reply(Reply::Empty {});
        let key = format!("{NETWORK_PREFIX}{engine_network}");
        if self.networks.remove(engine_network).is_some() | self.damaged.remove(&key) {
            outcome.changes.push(Change::Delete(key));
        }
        outcome
    }

    fn create_endpoint(
        &mut self,
        known: &BTreeMap<NetworkId, NetworkAssignment>,
        leases: &Leases,
        engine_network: &str,
        id: String,
        wanted: Wanted<'_>,
    ) -> Result<Outcome, Refusal> {
        let unknown = || Refusal::UnknownNetwork(engine_network.to_owned());
        let network = self.networks.get(engine_network).ok_or_else(unknown)?.clone();
        let ours = find_known(known, &network)?;
        let v4 = parse::<Ipv4Net>(wanted.address, "an IPv4 address with its prefix length")?.addr();
        let v6 = match wanted.address6 {
            "" => None,
            text => Some(parse::<Ipv6Net>(text, "an IPv6 address with its prefix length")?.addr()),
        };
        let mac = match wanted.mac {
            "" => netlib::names::endpoint_mac(v4),
            text => parse(text, "an Ethernet address")?,
        };
        let leased_to = match leases.holder(&network, v4) {
            Some(Holder::Task { task, .. }) => Some(task.clone()),
            _ => None,
        };
        let task = wanted.task.map(TaskId::new).or(leased_to);
        if task.is_none() && !ours.attachable {
            return Err(Refusal::NotAttachable(ours.name.clone()));
        }
        let interface = ReplyInterface { mac_address: wanted.mac.is_empty().then(|| mac.to_string()) };
        let mut outcome = Outcome::reply(Reply::Endpoint { interface });
        // The address was given to the engine anew, so another endpoint that has it was leaked by an engine's crash.
        let leaked: Vec<String> = self
            .endpoints
            .iter()
            .filter(|(other, e)| **other != id && e.network == network && e.v4 == v4)
            .map(|(other, _)| other.clone())
            .collect();
        for other in leaked {
            let gone = self.delete_endpoint(&other);
            outcome.changes.extend(gone.changes);
            outcome.effects.extend(gone.effects);
        }
        let endpoint = PluginEndpoint { network, task, v4, v6, mac, sandbox: None, ports: Vec::new(), mtu: None };
        let change = put_endpoint(&id, &endpoint);
        self.damaged.remove(change.key());
        outcome.changes.push(change);
        self.endpoints.insert(id, endpoint);
        Ok(outcome)
    }

    fn delete_endpoint(&mut self, id: &str) -> Outcome {
        let mut outcome = Outcome::reply(Reply::Empty {});
        let key = format!("{ENDPOINT_PREFIX}{id}");
        if self.damaged.remove(&key) {
            // Its link is the next audit's: nobody knows which it was.
            outcome.changes.push(Change::Delete(key.clone()));
        }
        if let Some(endpoint) = self.endpoints.remove(id) {
            outcome.changes.push(Change::Delete(key));
            let network = endpoint.network.clone();
            if !endpoint.ports.is_empty() {
                outcome.effects.push(Effect::Ports { network: network.clone() });
            }
            outcome.effects.push(Effect::Detach { network, endpoint: endpoint.to_netlib() });
        }
        outcome
    }

    fn join(
        &mut self,
        known: &BTreeMap<NetworkId, NetworkAssignment>,
        id: &str,
        sandbox: String,
    ) -> Result<Outcome, Refusal> {
        let endpoint = self.endpoints.get_mut(id).ok_or_else(|| Refusal::UnknownEndpoint(id.to_owned()))?;
        let ours = find_known(known, &endpoint.network)?;
        endpoint.sandbox = Some(sandbox);
        let reply = Reply::Join(Box::new(join_reply(ours, endpoint, id)));
        Ok(Outcome {
            reply,
            effects: vec![Effect::Attach { endpoint: id.to_owned() }],
            changes: vec![put_endpoint(id, endpoint)],
        })
    }

    fn leave(&mut self, id: &str) -> Outcome {
        let mut outcome = self.set_ports(id, Vec::new());
        if let Some(endpoint) = self.endpoints.get_mut(id) {
            endpoint.sandbox = None;
            outcome.changes = vec![put_endpoint(id, endpoint)];
        }
        outcome
    }

    fn publish(
        &mut self,
        known: &BTreeMap<NetworkId, NetworkAssignment>,
        id: &str,
        ports: Vec<PortBinding>,
    ) -> Result<Outcome, Refusal> {
        let endpoint = self.endpoints.get(id).ok_or_else(|| Refusal::UnknownEndpoint(id.to_owned()))?;
        let ours = find_known(known, &endpoint.network)?;
        if ours.internal && !ports.is_empty() {
            return Err(Refusal::Internal(ours.name.clone()));
        }
        self.check_ports(id, &ports)?;
        Ok(self.set_ports(id, ports))
    }

    /// Replaces the ports of an endpoint.
    fn set_ports(&mut self, id: &str, mut ports: Vec<PortBinding>) -> Outcome {
        let mut outcome = Outcome::reply(Reply::Empty {});
        ports.sort();
        ports.dedup();
        if let Some(endpoint) = self.endpoints.get_mut(id)
            && endpoint.ports != ports
        {
            endpoint.ports = ports;
            outcome.changes.push(put_endpoint(id, endpoint));
            outcome.effects.push(Effect::Ports { network: endpoint.network.clone() });
        }
        outcome
    }

    /// Forgets endpoints and engine networks of networks that are not in `keep`.
    pub fn retain_networks(&mut self, keep: &BTreeSet<NetworkId>) -> Vec<Change> {
        let gone = self.networks.iter().filter(|(_, n)| !keep.contains(*n)).map(|(id, _)| id.clone());
        let gone: Vec<String> = gone.collect();
        gone.iter().flat_map(|id| self.delete_network(id).changes).collect()
    }
}

struct Wanted<'a> {
    address: &'a str,
    address6: &'a str,
    mac: &'a str,
    task: Option<String>,
}

/// Name of a container's link between its making and the engine's taking it.
pub fn container_ifname(endpoint: &str) -> String {
    let digits: String = endpoint.chars().filter(char::is_ascii_alphanumeric).take(CONTAINER_IFNAME_DIGITS).collect();
    format!("{CONTAINER_IFNAME_PREFIX}{digits}")
}

fn join_reply(ours: &NetworkAssignment, endpoint: &PluginEndpoint, id: &str) -> JoinReply {
    let on_link = |destination: String| StaticRoute { destination, route_type: 1, next_hop: String::new() };
    let by = |destination: String, next_hop: String| StaticRoute { destination, route_type: 0, next_hop };
    let mut static_routes =
        vec![on_link(format!("{}/32", ours.gateway4)), by(ours.subnet4.to_string(), ours.gateway4.to_string())];
    if endpoint.v6.is_some() {
        static_routes.push(on_link(format!("{}/128", ours.gateway6)));
        static_routes.push(by(ours.subnet6.to_string(), ours.gateway6.to_string()));
    }
    let gateway = |wanted: bool, text: String| if wanted { text } else { String::new() };
    JoinReply {
        interface_name: InterfaceName { src_name: container_ifname(id), dst_prefix: "eth".into() },
        gateway: gateway(!ours.internal, ours.gateway4.to_string()),
        gateway_ipv6: gateway(!ours.internal && endpoint.v6.is_some(), ours.gateway6.to_string()),
        static_routes,
        disable_gateway_service: ours.internal,
    }
}

fn request_pool(
    known: &BTreeMap<NetworkId, NetworkAssignment>,
    pool: &str,
    network: Option<String>,
    v6: bool,
) -> Result<Outcome, Refusal> {
    let ours = match network {
        Some(id) => find_known(known, &NetworkId::new(id))?,
        None => known.values().find(|n| is_pool_of(n, pool)).ok_or(Refusal::NotOurs)?,
    };
    let v6 = v6 || pool.contains(':');
    let subnet = if v6 { IpNet::V6(ours.subnet6) } else { IpNet::V4(ours.subnet4) };
    if !pool.is_empty() && !is_pool_of(ours, pool) {
        let asked = pool.to_owned();
        return Err(Refusal::Mismatch { network: ours.name.clone(), ours: subnet.to_string(), asked });
    }
    let pool_id = format!("{DRIVER}/{}/{}", ours.id, if v6 { 6 } else { 4 });
    Ok(Outcome::reply(Reply::Pool { pool_id, pool: subnet.to_string(), data: BTreeMap::new() }))
}

fn request_address(
    known: &BTreeMap<NetworkId, NetworkAssignment>,
    leases: &mut Leases,
    pool: &str,
    address: &str,
    gateway: bool,
    mac: Option<&str>,
) -> Result<Outcome, Refusal> {
    let (id, family) = parse_pool(pool)?;
    let ours = find_known(known, &id)?;
    let reply = |address: String| Outcome::reply(Reply::Address { address, data: BTreeMap::new() });
    let preferred: Option<IpAddr> = match address {
        "" => None,
        text => Some(parse(text, "an address")?),
    };
    if gateway {
        let (own, length) = match family {
            AddressFamily::V4 => (IpAddr::V4(ours.gateway4), ours.subnet4.prefix_len()),
            AddressFamily::V6 => (IpAddr::V6(ours.gateway6), ours.subnet6.prefix_len()),
        };
        if let Some(asked) = preferred.filter(|p| *p != own) {
            let (network, asked) = (ours.name.clone(), format!("with gateway {asked}"));
            return Err(Refusal::Mismatch { network, ours: format!("with gateway {own}"), asked });
        }
        return Ok(reply(format!("{own}/{length}")));
    }
    let preferred = match preferred {
        None => None,
        Some(asked) => {
            let malformed = Refusal::Malformed { what: "an address of this network", value: address.to_owned() };
            Some(ipv4_of(ours, asked).ok_or(malformed)?)
        }
    };
    let (v4, change) = leases.request(ours, family, preferred, mac)?;
    let text = match family {
        AddressFamily::V4 => format!("{v4}/32"),
        AddressFamily::V6 => format!("{}/128", address6(ours.subnet6, ours.subnet4, v4)),
    };
    Ok(Outcome { changes: vec![change], ..reply(text) })
}

fn release_address(
    known: &BTreeMap<NetworkId, NetworkAssignment>,
    leases: &mut Leases,
    pool: &str,
    address: &str,
) -> Outcome {
    let mut outcome = Outcome::reply(Reply::Empty {});
    if let Ok((id, family)) = parse_pool(pool)
        && let Some(ours) = known.get(&id)
        && let Some(v4) = address.parse().ok().and_then(|a| ipv4_of(ours, a))
    {
        outcome.changes.extend(leases.give_back(&id, family, v4));
    }
    outcome
}

/// The IPv4 address that an address of either family belongs to.
fn ipv4_of(ours: &NetworkAssignment, address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => ours.subnet4.contains(&v4).then_some(v4),
        IpAddr::V6(v6) => {
            let offset = u128::from(v6).checked_sub(u128::from(ours.subnet6.network()))?;
            let v4 = Ipv4Addr::from(u32::from(ours.subnet4.network()).checked_add(u32::try_from(offset).ok()?)?);
            ours.subnet4.contains(&v4).then_some(v4)
        }
    }
}

fn parse_pool(pool: &str) -> Result<(NetworkId, AddressFamily), Refusal> {
    let malformed = || Refusal::Malformed { what: "a pool of this driver", value: pool.to_owned() };
    let (id, family) =
        pool.strip_prefix(DRIVER).and_then(|p| p.strip_prefix('/')?.rsplit_once('/')).ok_or_else(malformed)?;
    let family = match family {
        "4" => AddressFamily::V4,
        "6" => AddressFamily::V6,
        _ => return Err(malformed()),
    };
    Ok((NetworkId::new(id), family))
}

fn is_pool_of(ours: &NetworkAssignment, pool: &str) -> bool {
    match pool.parse::<IpNet>() {
        Ok(IpNet::V4(net)) => net.trunc() == ours.subnet4.trunc(),
        Ok(IpNet::V6(net)) => net.trunc() == ours.subnet6.trunc(),
        Err(_) => false,
    }
}

fn find_known<'a>(
    known: &'a BTreeMap<NetworkId, NetworkAssignment>,
    id: &NetworkId,
) -> Result<&'a NetworkAssignment, Refusal> {
    known.get(id).ok_or_else(|| Refusal::UnknownNetwork(id.to_string()))
}

fn parse<T: std::str::FromStr>(text: &str, what: &'static str) -> Result<T, Refusal> {
    text.parse().map_err(|_| Refusal::Malformed { what, value: text.to_owned() })
}

fn put_endpoint(id: &str, endpoint: &PluginEndpoint) -> Change {
    Change::Put(format!("{ENDPOINT_PREFIX}{id}"), to_json(endpoint))
}

fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("only string keys, no failing implementation")
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

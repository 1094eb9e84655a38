//! The cluster's state in memory: typed objects by id, with the lookups that decisions need.
//!
//! Owns nothing but data. Changed only through [`Model::apply`], which keeps the secondary indexes; what a change
//! means is decided elsewhere. All maps are ordered, so that every walk over them is.

mod hosts;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, LazyLock},
};

use serde::{Deserialize, Serialize};
use skein_api::{
    AttachedContainer, Block, Network, NetworkId, Node, NodeId, Service, ServiceId, Task, TaskId, TaskSpec, TaskState,
    Token, TokenId, Volume, VolumeId,
};
use smallvec::SmallVec;

use self::hosts::Hosts;

/// Settings of the whole cluster, made once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// Identity.
    pub id: String,
    /// The 40 random bits of the cluster's ULA prefix `fdXX:XXXX:XXXX::/48` (RFC 4193, section 3.2.2).
    pub ula_global_id: u64,
    /// PEM of the CA certificate.
    pub ca_certificate_pem: String,
    /// PEM of the CA's private key.
    pub ca_key_pem: String,
    /// Highest VNI that was ever given; VNIs are not used again until the range wraps.
    pub last_vni: u32,
    /// Highest host index that was ever given.
    pub last_host_index: u16,
}

/// A node that was removed, remembered for as long as a certificate of it could be valid. Its identity is refused
/// because it is no node any more, with or without this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RemovedNode {
    /// The node.
    pub id: NodeId,
    /// Its name then.
    pub name: String,
    /// SHA-256 of its public key, hex.
    pub key_digest: String,
    /// When.
    pub removed_at: skein_api::UnixMillis,
    /// Blocks of addresses that it owned, by network and position. A host that was cut off may still run containers
    /// with these addresses, so other hosts get them last.
    pub blocks: Vec<(NetworkId, u32)>,
}

/// Kinds of objects; part of a key in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    Cluster,
    Node,
    RemovedNode,
    Token,
    Network,
    Block,
    Volume,
    Service,
    Task,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Cluster,
        Self::Node,
        Self::RemovedNode,
        Self::Token,
        Self::Network,
        Self::Block,
        Self::Volume,
        Self::Service,
        Self::Task,
    ];

    /// The kind as the store and events name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Node => "node",
            Self::RemovedNode => "removed-node",
            Self::Token => "token",
            Self::Network => "network",
            Self::Block => "block",
            Self::Volume => "volume",
            Self::Service => "service",
            Self::Task => "task",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.as_str() == name)
    }
}

/// Identity of an object in the store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Kind.
    pub kind: Kind,
    /// Id within the kind.
    pub id: String,
}

/// Any object of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Object {
    Cluster(Box<Cluster>),
    Node(Box<Node>),
    RemovedNode(RemovedNode),
    Token(Token),
    Network(Box<Network>),
    Block(Block),
    Volume(Volume),
    Service(Box<Service>),
    Task(Arc<Task>),
}

/// Id of a block: its network and position.
pub fn block_id(network: &NetworkId, index: u32) -> String {
    format!("{network}/{index}")
}

impl Object {
    /// The object's key.
    pub fn key(&self) -> Key {
        let (kind, id) = match self {
            Self::Cluster(_) => (Kind::Cluster, "cluster".to_owned()),
            Self::Node(o) => (Kind::Node, o.id.to_string()),
            Self::RemovedNode(o) => (Kind::RemovedNode, o.id.to_string()),
            Self::Token(o) => (Kind::Token, o.id.to_string()),
            Self::Network(o) => (Kind::Network, o.id.to_string()),
            Self::Block(o) => (Kind::Block, block_id(&o.network, o.index)),
            Self::Volume(o) => (Kind::Volume, o.id.to_string()),
            Self::Service(o) => (Kind::Service, o.id.to_string()),
            Self::Task(o) => (Kind::Task, o.id.to_string()),
        };
        Key { kind, id }
    }

    /// The object as the store keeps it.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.encode_to(&mut bytes);
        bytes
    }

    /// Appends what [`Self::encode`] gives.
    pub fn encode_to(&self, bytes: &mut Vec<u8>) {
        self.write(bytes);
    }

    /// Length of what [`Self::encode`] gives.
    pub fn encoded_len(&self) -> usize {
        /// Counts, and forgets.
        struct Length(usize);
        impl std::io::Write for Length {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0 += bytes.len();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut length = Length(0);
        self.write(&mut length);
        length.0
    }

    fn write(&self, to: impl std::io::Write) {
        let json = match self {
            Self::Cluster(o) => serde_json::to_writer(to, o),
            Self::Node(o) => serde_json::to_writer(to, &Node { status: None, ..(**o).clone() }),
            Self::RemovedNode(o) => serde_json::to_writer(to, o),
            Self::Token(o) => serde_json::to_writer(to, o),
            Self::Network(o) => serde_json::to_writer(to, o),
            Self::Block(o) => serde_json::to_writer(to, o),
            Self::Volume(o) => serde_json::to_writer(to, o),
            Self::Service(o) => serde_json::to_writer(to, o),
            Self::Task(o) => serde_json::to_writer(to, o),
        };
        json.expect("the objects have string keys only, so they are JSON");
    }

    /// Reads what [`Self::encode`] wrote, by this release or a neighbour.
    ///
    /// # Errors
    /// When the bytes are not an object of that kind.
    pub fn decode(kind: Kind, bytes: &[u8]) -> Result<Self, serde_json::Error> {
        Ok(match kind {
            Kind::Cluster => Self::Cluster(serde_json::from_slice(bytes)?),
            Kind::Node => Self::Node(serde_json::from_slice(bytes)?),
            Kind::RemovedNode => Self::RemovedNode(serde_json::from_slice(bytes)?),
            Kind::Token => Self::Token(serde_json::from_slice(bytes)?),
            Kind::Network => Self::Network(serde_json::from_slice(bytes)?),
            Kind::Block => Self::Block(serde_json::from_slice(bytes)?),
            Kind::Volume => Self::Volume(serde_json::from_slice(bytes)?),
            Kind::Service => Self::Service(serde_json::from_slice(bytes)?),
            Kind::Task => Self::Task(serde_json::from_slice(bytes)?),
        })
    }

    /// The object as events and the API show it: without secrets.
    pub fn public_json(&self) -> Option<serde_json::Value> {
        match self {
            Self::Cluster(_) | Self::RemovedNode(_) => None,
            Self::Token(t) => serde_json::to_value(Token { secret_sha256: String::new(), ..t.clone() }).ok(),
            other => serde_json::from_slice(&other.encode()).ok(),
        }
    }
}

/// One change of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The object is now this.
    Upsert(Object),
    /// The object is gone.
    Delete(Key),
}

impl Change {
    /// Which object it is about.
    pub fn key(&self) -> Key {
        match self {
            Self::Upsert(o) => o.key(),
            Self::Delete(k) => k.clone(),
        }
    }
}

/// The cluster's objects and the lookups over them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    /// Settings; `None` only before the cluster was made.
    pub cluster: Option<Cluster>,
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Nodes that were removed.
    pub removed_nodes: BTreeMap<NodeId, RemovedNode>,
    /// Join tokens.
    pub tokens: BTreeMap<TokenId, Token>,
    /// Networks by id.
    pub networks: BTreeMap<NetworkId, Network>,
    /// Blocks by network and position.
    pub blocks: BTreeMap<(NetworkId, u32), Block>,
    /// Volumes by id.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Services by id.
    pub services: BTreeMap<ServiceId, Service>,
    /// Tasks by id.
    pub tasks: BTreeMap<TaskId, Arc<Task>>,
    /// The tasks themselves: a service is planned by looking at all of its tasks.
    service_tasks: BTreeMap<ServiceId, BTreeMap<TaskId, Arc<Task>>>,
    node_tasks: BTreeMap<NodeId, BTreeSet<TaskId>>,
    network_tasks: BTreeMap<NetworkId, BTreeSet<TaskId>>,
    /// Tasks by the names of those whose volumes and namespaces they take.
    takers: BTreeMap<String, BTreeSet<TaskId>>,
    members: BTreeMap<NetworkId, BTreeMap<NodeId, BTreeSet<u32>>>,
    network_names: BTreeMap<String, NetworkId>,
    /// Virtual addresses by network. One that two services had would be found by `check`, so the last one stands here.
    vips: BTreeMap<NetworkId, BTreeMap<Ipv4Addr, ServiceId>>,
    /// Static addresses by network, with the services and tasks that name them.
    statics: BTreeMap<NetworkId, BTreeMap<Ipv4Addr, BTreeSet<Claimant>>>,
    /// Blocks that are frozen, and single addresses.
    loose_blocks: BTreeSet<(NetworkId, u32)>,
    service_names: BTreeMap<String, ServiceId>,
    volume_names: BTreeMap<String, VolumeId>,
    /// Names of the volumes on each node.
    node_volumes: BTreeMap<NodeId, BTreeSet<String>>,
    hosts: Hosts,
    /// Tasks by their names and by the container names that users chose, in order; nearly always one.
    task_names: BTreeMap<String, SmallVec<[TaskId; 1]>>,
    /// How many tasks are in each state; none in one that is not listed.
    task_states: BTreeMap<TaskState, u64>,
}

/// Who names a static address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claimant {
    /// A service.
    Service(ServiceId),
    /// A task, of a service or alone: until it is forgotten.
    Task(TaskId),
}

/// The static addresses of a task specification that names networks by id.
pub(crate) fn static_addresses(spec: &TaskSpec) -> impl Iterator<Item = (NetworkId, Ipv4Addr)> {
    spec.networks.iter().filter_map(|a| Some((NetworkId::new(&a.network), a.ipv4?)))
}

/// Names of those whose volumes and namespaces a task takes; one can stand there twice.
fn taken_from(task: &Task) -> impl Iterator<Item = &String> {
    let container = &task.spec.container;
    container.volumes_from.iter().map(|v| &v.from).chain(container.share.iter().map(|(_, with)| with))
}

/// Takes an id out from under a key; nothing is left of a key without ids.
fn drop_from<K: Ord, I: Ord>(map: &mut BTreeMap<K, BTreeSet<I>>, key: &K, id: &I) {
    if let Some(set) = map.get_mut(key) {
        set.remove(id);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

/// Names by which a task is found.
fn names(task: &Task) -> impl Iterator<Item = &String> {
    std::iter::once(&task.name).chain(&task.spec.container.container_name)
}

/// Whether two states of a task are found by the same lookups.
fn same_lookups(a: &Task, b: &Task) -> bool {
    a.name == b.name
        && a.service == b.service
        && a.node == b.node
        && (Arc::ptr_eq(&a.spec, &b.spec) || a.spec == b.spec)
}

impl Model {
    /// Applies one change and returns what was there before. Idempotent.
    pub fn apply(&mut self, change: &Change) -> Option<Object> {
        match change {
            Change::Upsert(object) => self.upsert(object.clone()),
            Change::Delete(key) => self.delete(key),
        }
    }

    fn upsert(&mut self, object: Object) -> Option<Object> {
        match object {
            Object::Cluster(o) => self.cluster.replace(*o).map(|o| Object::Cluster(Box::new(o))),
            Object::Node(o) => {
                let before = self.remove_node(&o.id);
                self.hosts.add(&o);
                self.nodes.insert(o.id.clone(), *o);
                before
            }
            Object::RemovedNode(o) => self.removed_nodes.insert(o.id.clone(), o).map(Object::RemovedNode),
            Object::Token(o) => self.tokens.insert(o.id.clone(), o).map(Object::Token),
            Object::Network(o) => {
                self.network_names.insert(o.spec.name.clone(), o.id.clone());
                self.networks.insert(o.id.clone(), *o).map(|o| Object::Network(Box::new(o)))
            }
            Object::Block(o) => {
                let before = self.delete(&Key { kind: Kind::Block, id: block_id(&o.network, o.index) });
                self.members.entry(o.network.clone()).or_default().entry(o.node.clone()).or_default().insert(o.index);
                if o.is_single() || o.frozen.is_some() {
                    self.loose_blocks.insert((o.network.clone(), o.index));
                }
                self.blocks.insert((o.network.clone(), o.index), o);
                before
            }
            Object::Volume(o) => {
                let before = self.delete(&Key { kind: Kind::Volume, id: o.id.to_string() });
                self.volume_names.insert(o.name.clone(), o.id.clone());
                self.node_volumes.entry(o.node.clone()).or_default().insert(o.name.clone());
                self.volumes.insert(o.id.clone(), o);
                before
            }
            Object::Service(o) => {
                let before = self.remove_service(&o.id);
                self.service_names.insert(o.spec.name.clone(), o.id.clone());
                for vip in &o.vips {
                    self.vips.entry(vip.network.clone()).or_default().insert(vip.v4, o.id.clone());
                }
                self.claim(&Claimant::Service(o.id.clone()), &o.spec.task);
                self.services.insert(o.id.clone(), *o);
                before
            }
            Object::Task(o) => {
                if let Some(before) = self.tasks.get_mut(&o.id).filter(|before| same_lookups(before, &o)) {
                    // Most changes are of the status, which no lookup follows.
                    let (old, new) = (before.status.state, o.status.state);
                    if let Some(same) = Self::in_service(&mut self.service_tasks, &o) {
                        *same = o.clone();
                    }
                    let before = std::mem::replace(before, o);
                    self.count_state(old, new);
                    return Some(Object::Task(before));
                }
                let before = self.remove_task(&o.id);
                self.index_task(&o);
                self.tasks.insert(o.id.clone(), o);
                before
            }
        }
    }

    fn delete(&mut self, key: &Key) -> Option<Object> {
        let id = &key.id;
        match key.kind {
            Kind::Cluster => self.cluster.take().map(|o| Object::Cluster(Box::new(o))),
            Kind::Node => self.remove_node(&NodeId::new(id)),
            Kind::RemovedNode => self.removed_nodes.remove(&NodeId::new(id)).map(Object::RemovedNode),
            Kind::Token => self.tokens.remove(&TokenId::new(id)).map(Object::Token),
            Kind::Network => {
                let network = self.networks.remove(&NetworkId::new(id))?;
                self.network_names.remove(&network.spec.name);
                Some(Object::Network(Box::new(network)))
            }
            Kind::Block => {
                let (network, index) = id.rsplit_once('/')?;
                let block = self.blocks.remove(&(NetworkId::new(network), index.parse().ok()?))?;
                self.loose_blocks.remove(&(block.network.clone(), block.index));
                if let Some(nodes) = self.members.get_mut(&block.network) {
                    if let Some(indexes) = nodes.get_mut(&block.node) {
                        indexes.remove(&block.index);
                        if indexes.is_empty() {
                            nodes.remove(&block.node);
                        }
                    }
                    if nodes.is_empty() {
                        self.members.remove(&block.network);
                    }
                }
                Some(Object::Block(block))
            }
            Kind::Volume => {
                let volume = self.volumes.remove(&VolumeId::new(id))?;
                self.volume_names.remove(&volume.name);
                if let Some(names) = self.node_volumes.get_mut(&volume.node) {
                    names.remove(&volume.name);
                    if names.is_empty() {
                        self.node_volumes.remove(&volume.node);
                    }
                }
                Some(Object::Volume(volume))
            }
            Kind::Service => self.remove_service(&ServiceId::new(id)),
            Kind::Task => self.remove_task(&TaskId::new(id)),
        }
    }

    /// Where a task stands under its service.
    fn in_service<'a>(
        services: &'a mut BTreeMap<ServiceId, BTreeMap<TaskId, Arc<Task>>>,
        task: &Task,
    ) -> Option<&'a mut Arc<Task>> {
        services.get_mut(task.service.as_ref()?)?.get_mut(&task.id)
    }

    /// A task that stands in for another for a moment.
    fn nothing() -> Arc<Task> {
        static NOTHING: LazyLock<Arc<Task>> = LazyLock::new(Arc::default);
        NOTHING.clone()
    }

    fn remove_node(&mut self, id: &NodeId) -> Option<Object> {
        let node = self.nodes.remove(id)?;
        self.hosts.remove(&node);
        Some(Object::Node(Box::new(node)))
    }

    fn remove_service(&mut self, id: &ServiceId) -> Option<Object> {
        let service = self.services.remove(id)?;
        self.service_names.remove(&service.spec.name);
        self.unclaim(&Claimant::Service(id.clone()), &service.spec.task);
        for vip in &service.vips {
            if let Some(vips) = self.vips.get_mut(&vip.network) {
                vips.remove(&vip.v4);
                if vips.is_empty() {
                    self.vips.remove(&vip.network);
                }
            }
        }
        Some(Object::Service(Box::new(service)))
    }

    fn claim(&mut self, claimant: &Claimant, spec: &TaskSpec) {
        for (network, address) in static_addresses(spec) {
            self.statics.entry(network).or_default().entry(address).or_default().insert(claimant.clone());
        }
    }

    fn unclaim(&mut self, claimant: &Claimant, spec: &TaskSpec) {
        for (network, address) in static_addresses(spec) {
            let Some(addresses) = self.statics.get_mut(&network) else { continue };
            drop_from(addresses, &address, claimant);
            if addresses.is_empty() {
                self.statics.remove(&network);
            }
        }
    }

    fn count_state(&mut self, old: TaskState, new: TaskState) {
        *self.task_states.entry(new).or_default() += 1;
        self.uncount_state(old);
    }

    fn uncount_state(&mut self, state: TaskState) {
        let count = self.task_states.get_mut(&state).expect("every task is counted");
        *count -= 1;
        if *count == 0 {
            self.task_states.remove(&state);
        }
    }

    fn index_task(&mut self, task: &Arc<Task>) {
        *self.task_states.entry(task.status.state).or_default() += 1;
        for name in names(task) {
            let named = self.task_names.entry(name.clone()).or_default();
            if let Err(at) = named.binary_search(&task.id) {
                named.insert(at, task.id.clone());
            }
        }
        if let Some(service) = &task.service {
            self.service_tasks.entry(service.clone()).or_default().insert(task.id.clone(), task.clone());
        }
        if let Some(node) = &task.node {
            self.node_tasks.entry(node.clone()).or_default().insert(task.id.clone());
        }
        for attachment in &task.spec.networks {
            let network = NetworkId::new(&attachment.network);
            self.network_tasks.entry(network).or_default().insert(task.id.clone());
        }
        self.claim(&Claimant::Task(task.id.clone()), &task.spec);
        for name in taken_from(task) {
            self.takers.entry(name.clone()).or_default().insert(task.id.clone());
        }
    }

    fn remove_task(&mut self, id: &TaskId) -> Option<Object> {
        let task = self.tasks.remove(id)?;
        self.uncount_state(task.status.state);
        for name in names(&task) {
            if let Some(named) = self.task_names.get_mut(name) {
                named.retain(|other| other != id);
                if named.is_empty() {
                    self.task_names.remove(name);
                }
            }
        }
        if let Some(service) = &task.service
            && let Some(tasks) = self.service_tasks.get_mut(service)
        {
            tasks.remove(id);
            if tasks.is_empty() {
                self.service_tasks.remove(service);
            }
        }
        if let Some(node) = &task.node {
            drop_from(&mut self.node_tasks, node, id);
        }
        for attachment in &task.spec.networks {
            drop_from(&mut self.network_tasks, &NetworkId::new(&attachment.network), id);
        }
        self.unclaim(&Claimant::Task(id.clone()), &task.spec);
        for name in taken_from(&task) {
            drop_from(&mut self.takers, name, id);
        }
        Some(Object::Task(task))
    }

    /// Enters the position in the store at which an object was committed.
    pub(crate) fn set_revision(&mut self, key: &Key, revision: u64) {
        let id = key.id.as_str();
        let meta = match key.kind {
            Kind::Cluster | Kind::RemovedNode => None,
            Kind::Node => self.nodes.get_mut(&NodeId::new(id)).map(|o| &mut o.meta),
            Kind::Token => self.tokens.get_mut(&TokenId::new(id)).map(|o| &mut o.meta),
            Kind::Network => self.networks.get_mut(&NetworkId::new(id)).map(|o| &mut o.meta),
            Kind::Block => {
                let at = id.rsplit_once('/').and_then(|(n, i)| Some((NetworkId::new(n), i.parse().ok()?)));
                at.and_then(|at| self.blocks.get_mut(&at)).map(|o| &mut o.meta)
            }
            Kind::Volume => self.volumes.get_mut(&VolumeId::new(id)).map(|o| &mut o.meta),
            Kind::Service => self.services.get_mut(&ServiceId::new(id)).map(|o| &mut o.meta),
            Kind::Task => {
                if let Some(task) = self.tasks.get_mut(&TaskId::new(id)) {
                    match Self::in_service(&mut self.service_tasks, task) {
                        Some(same) => {
                            // While it is the only one, it is changed in place.
                            *same = Self::nothing();
                            Arc::make_mut(task).meta.revision = revision;
                            *same = task.clone();
                        }
                        None => Arc::make_mut(task).meta.revision = revision,
                    }
                }
                None
            }
        };
        if let Some(meta) = meta {
            meta.revision = revision;
        }
    }

    /// The networks of a task in its order; those that no longer exist are left out. Tasks name networks by id.
    pub fn task_networks(&self, task: &Task) -> Vec<NetworkId> {
        let ids = task.spec.networks.iter().map(|a| NetworkId::new(&a.network));
        ids.filter(|id| self.networks.contains_key(id)).collect()
    }

    /// Tasks that take volumes or namespaces of the service or container task of that name, by id.
    pub fn takers(&self, name: &str) -> impl Iterator<Item = &TaskId> {
        self.takers.get(name).into_iter().flatten()
    }

    /// A network by name or id.
    pub fn network(&self, reference: &str) -> Option<&Network> {
        let id = self.network_names.get(reference).cloned().unwrap_or_else(|| NetworkId::new(reference));
        self.networks.get(&id)
    }

    /// A service by its full name.
    pub fn service_named(&self, name: &str) -> Option<&Service> {
        self.services.get(self.service_names.get(name)?)
    }

    /// The virtual addresses of a network with their services, in order.
    pub fn vips(&self, network: &NetworkId) -> impl Iterator<Item = (&Ipv4Addr, &ServiceId)> {
        self.vips.get(network).into_iter().flatten()
    }

    /// The static addresses of a network with who names them, in order.
    pub fn statics(&self, network: &NetworkId) -> impl Iterator<Item = (&Ipv4Addr, &BTreeSet<Claimant>)> {
        self.statics.get(network).into_iter().flatten()
    }

    /// Who names a static address.
    pub fn claimants(&self, network: &NetworkId, address: Ipv4Addr) -> impl Iterator<Item = &Claimant> {
        self.statics.get(network).and_then(|addresses| addresses.get(&address)).into_iter().flatten()
    }

    /// Blocks that are frozen, and single addresses, of all networks.
    pub fn loose_blocks(&self) -> impl Iterator<Item = &Block> {
        self.loose_blocks.iter().map(|key| &self.blocks[key])
    }

    /// The blocks of a network that are frozen, and single addresses.
    pub fn loose_blocks_of<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = &'a Block> {
        let range = (network.clone(), 0)..=(network.clone(), u32::MAX);
        self.loose_blocks.range(range).map(|key| &self.blocks[key])
    }

    /// Names of the volumes on a node.
    pub fn node_volumes(&self, node: &NodeId) -> impl Iterator<Item = &String> {
        self.node_volumes.get(node).into_iter().flatten()
    }

    /// A volume by name.
    pub fn volume_named(&self, name: &str) -> Option<&Volume> {
        self.volumes.get(self.volume_names.get(name)?)
    }

    /// What to call a node in words: its name, or the beginning of its id when it is gone.
    pub fn node_name<'a>(&'a self, id: &'a NodeId) -> &'a str {
        self.nodes.get(id).map_or(id.short(), |node| &node.name)
    }

    /// A node by name.
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.get(self.hosts.names.get(name)?)
    }

    /// The node with this key.
    pub fn node_of_key(&self, key_digest: &str) -> Option<&Node> {
        self.nodes.get(self.hosts.key_digests.get(key_digest)?)
    }

    /// Nodes that say that an address of the underlay is theirs, by id.
    pub fn nodes_at(&self, address: IpAddr) -> impl Iterator<Item = &Node> {
        self.hosts.underlays.get(&address).into_iter().flatten().map(|id| &self.nodes[id])
    }

    /// Whether a node has this number in the overlay.
    pub fn has_host_index(&self, index: u16) -> bool {
        self.hosts.indexes.contains(&index)
    }

    /// How many tasks are in each state that some task is in.
    pub fn task_states(&self) -> &BTreeMap<TaskState, u64> {
        &self.task_states
    }

    /// All tasks of a name, or whose container has it, by id.
    pub fn tasks_named(&self, name: &str) -> impl Iterator<Item = &Task> {
        self.task_names.get(name).into_iter().flatten().map(|id| &*self.tasks[id])
    }

    /// How many tasks have no service. O(services).
    pub fn container_tasks(&self) -> usize {
        self.tasks.len() - self.service_tasks.values().map(BTreeMap::len).sum::<usize>()
    }

    /// All tasks of a service, by id.
    pub fn service_tasks(&self, service: &ServiceId) -> impl Iterator<Item = &Task> {
        self.service_tasks.get(service).into_iter().flat_map(BTreeMap::values).map(|task| &**task)
    }

    /// All tasks on a node, by id.
    pub fn node_tasks(&self, node: &NodeId) -> impl Iterator<Item = &Task> {
        self.node_tasks.get(node).into_iter().flatten().map(|id| &*self.tasks[id])
    }

    /// All tasks that name a network, by id.
    pub fn network_tasks(&self, network: &NetworkId) -> impl Iterator<Item = &Task> {
        self.network_tasks.get(network).into_iter().flatten().map(|id| &*self.tasks[id])
    }

    /// The nodes that own blocks of a network.
    pub fn members(&self, network: &NetworkId) -> impl Iterator<Item = &NodeId> {
        self.members.get(network).into_iter().flat_map(|nodes| nodes.keys())
    }

    /// The networks that a node owns blocks of.
    pub fn node_networks(&self, node: &NodeId) -> impl Iterator<Item = &NetworkId> {
        self.members.iter().filter(move |(_, nodes)| nodes.contains_key(node)).map(|(network, _)| network)
    }

    /// A node's blocks of a network, in order.
    pub fn node_blocks(&self, network: &NetworkId, node: &NodeId) -> impl Iterator<Item = &Block> {
        self.members
            .get(network)
            .and_then(|nodes| nodes.get(node))
            .into_iter()
            .flatten()
            .map(|index| &self.blocks[&(network.clone(), *index)])
    }

    /// Ids of the containers in a network that were started by hand.
    pub(crate) fn attached(&self, network: &NetworkId) -> impl Iterator<Item = &TaskId> {
        self.hosts.attached.get(network).into_iter().flatten().map(|(id, _)| id)
    }

    /// Such a container, and its host.
    pub(crate) fn find_attached(&self, network: &NetworkId, id: &TaskId) -> Option<(&Node, &AttachedContainer)> {
        let (found, node) = self.hosts.attached.get(network)?.range((id.clone(), NodeId::default())..).next()?;
        let node = self.nodes.get(node).filter(|_| found == id)?;
        node.description.attached.iter().find(|c| c.id == *id && c.network == *network).map(|c| (node, c))
    }

    /// The single address of a network, if it has an owner of its own.
    pub fn single(&self, network: &Network, address: Ipv4Addr) -> Option<&Block> {
        self.blocks.get(&(network.id.clone(), network.single_index(address)))
    }

    /// The node that may give an address of a network to a container.
    pub fn giver(&self, network: &Network, address: Ipv4Addr) -> Option<&NodeId> {
        self.single(network, address).or_else(|| self.block_of(network, address)).map(|block| &block.node)
    }

    /// The block that an address of a network is in, if that has an owner.
    pub fn block_of(&self, network: &Network, address: Ipv4Addr) -> Option<&Block> {
        self.blocks.get(&(network.id.clone(), network.block_index(address)?))
    }

    /// Positions of the blocks of a network that have an owner, of single addresses too.
    pub fn owned_blocks(&self, network: &NetworkId) -> BTreeSet<u32> {
        let nodes = self.members.get(network).into_iter().flat_map(|nodes| nodes.values());
        nodes.flatten().copied().collect()
    }

    /// Is the node owner of a block of the network?
    pub fn is_member(&self, network: &NetworkId, node: &NodeId) -> bool {
        self.members.get(network).is_some_and(|nodes| nodes.contains_key(node))
    }

    /// All objects, in the order of [`Kind`] and id.
    pub fn objects(&self) -> Vec<Object> {
        let mut all = self.objects_but_tasks();
        all.extend(self.tasks.values().cloned().map(Object::Task));
        all
    }

    /// As [`Model::objects`], without the many.
    pub(crate) fn objects_but_tasks(&self) -> Vec<Object> {
        let mut all: Vec<Object> = Vec::new();
        all.extend(self.cluster.iter().cloned().map(|o| Object::Cluster(Box::new(o))));
        all.extend(self.nodes.values().cloned().map(|o| Object::Node(Box::new(o))));
        all.extend(self.removed_nodes.values().cloned().map(Object::RemovedNode));
        all.extend(self.tokens.values().cloned().map(Object::Token));
        all.extend(self.networks.values().cloned().map(|o| Object::Network(Box::new(o))));
        all.extend(self.blocks.values().cloned().map(Object::Block));
        all.extend(self.volumes.values().cloned().map(Object::Volume));
        all.extend(self.services.values().cloned().map(|o| Object::Service(Box::new(o))));
        all
    }
}

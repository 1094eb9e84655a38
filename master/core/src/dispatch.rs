//! What each agent shall be told: a set of documents per node, kept as what changed since it was last told.
//!
//! Each node has a sequence of generations. [`Core::dispatch_take`] turns what changed into the next one; an agent that
//! acknowledges generation `g` has everything up to it in its ledger. A node that comes with another chain (another
//! master, a lost ledger) or another generation gets everything.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{
    Assignment, AttachedContainer, EndpointAssignment, Health, Network, NetworkAssignment, NetworkId, Node,
    NodeDescription, NodeId, PeerAssignment, Protocol, Service, ServiceAssignment, ServiceId, ServiceSpec, Task,
    TaskAssignment, TaskId, TaskSpec, TaskState, Vip, address6,
};

use crate::{
    core::Core,
    ingress,
    model::{Key, Kind, Model, Object, static_addresses},
    placement,
};

/// VXLAN over IPv4: outer Ethernet 14 + IPv4 20 + UDP 8 + VXLAN 8 (RFC 7348, section 5).
const OVERHEAD4: u32 = 50;
/// VXLAN over IPv6: 20 more.
const OVERHEAD6: u32 = 70;
/// Assumed where a host did not say: Ethernet.
const MTU_DEFAULT: u32 = 1_500;
/// IPv6 does not work below (RFC 8200, section 5).
const MTU_MIN: u32 = 1_280;

/// Ports of one task that the name server knows: more than that nobody looks up, and they stand in every host's
/// documents.
const KNOWN_PORTS_MAX: usize = 64;

/// What changed for one node since it was last told.
#[derive(Clone, Debug, Default)]
struct Queue {
    generation: u64,
    /// The newest generation that the node has said to follow.
    acked: u64,
    /// Keys of documents to look at again.
    dirty: BTreeSet<String>,
    full: bool,
}

/// A set of documents to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// This is everything.
    pub full: bool,
    /// Generation that it builds on.
    pub base: u64,
    /// Generation that it makes.
    pub generation: u64,
    /// Documents that are now so.
    pub upserts: Vec<Assignment>,
    /// Keys of documents that are gone.
    pub removes: Vec<String>,
}

/// How far a node is with what it is to be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The generation that it was sent last.
    pub sent: u64,
    /// The one that it follows.
    pub acked: u64,
    /// There is more for it.
    pub waiting: bool,
}

/// What each node has to be told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dispatch {
    /// Of every node, and of no other.
    queues: BTreeMap<NodeId, Queue>,
    /// Nodes that have something to be told.
    due: BTreeSet<NodeId>,
    /// Nodes without a session: what they are to be told is kept, and they are not looked at in every turn.
    parked: BTreeSet<NodeId>,
}

impl Dispatch {
    fn add_node(&mut self, node: &NodeId) {
        if !self.queues.contains_key(node) {
            self.queues.insert(node.clone(), Queue { full: true, ..Queue::default() });
            self.due.insert(node.clone());
        }
    }

    pub(crate) fn remove_node(&mut self, node: &NodeId) {
        self.queues.remove(node);
        self.due.remove(node);
        self.parked.remove(node);
    }

    /// Looks at a document again. Of a node that is not (or no longer) there nothing is kept.
    pub(crate) fn mark(&mut self, node: &NodeId, key: String) {
        if skein_api::mutant!("lost-mark") && key.bytes().map(u32::from).sum::<u32>().is_multiple_of(8) {
            return;
        }
        let Some(queue) = self.queues.get_mut(node) else { return };
        if !queue.full {
            queue.dirty.insert(key);
            if !self.parked.contains(node) {
                self.due.insert(node.clone());
            }
        }
    }

    fn mark_members(&mut self, model: &Model, network: &NetworkId, key: &str, except: Option<&NodeId>) {
        for node in model.members(network).filter(|n| Some(*n) != except) {
            self.mark(node, key.to_owned());
        }
    }

    /// All documents of a network: they come to a node that has just become a member, and go with its last block.
    fn mark_network(&mut self, model: &Model, network: &NetworkId, node: &NodeId) {
        if self.queues.get(node).is_none_or(|queue| queue.full) {
            return;
        }
        for key in network_keys(model, network, node) {
            self.mark(node, key);
        }
    }

    /// Finds the documents that a change touches. `model` is the state after it.
    pub(crate) fn note(&mut self, model: &Model, key: &Key, before: Option<&Object>) {
        match (key.kind, before) {
            (Kind::Task, _) => self.note_task(model, &TaskId::new(&key.id), before),
            (Kind::Block, _) => self.note_block(model, key, before),
            (Kind::Network, _) => {
                let id = NetworkId::new(&key.id);
                self.mark_members(model, &id, &format!("network/{id}"), None);
                self.mark_attached(model, &id);
            }
            (Kind::Node, _) => self.note_node(model, &NodeId::new(&key.id), before),
            (Kind::Service, before) => {
                let before = match before {
                    Some(Object::Service(service)) => Some(&**service),
                    _ => None,
                };
                let id = ServiceId::new(&key.id);
                self.note_vips(model, &id, before);
                self.note_statics(
                    model,
                    [before, model.services.get(&id)].map(|s| s.map(|s| (&s.spec.task, s.meta.generation))),
                );
                if let Some(before) = before {
                    self.note_service(model, before);
                }
            }
            _ => {}
        }
    }

    fn note_task(&mut self, model: &Model, id: &TaskId, before: Option<&Object>) {
        let old = match before {
            Some(Object::Task(task)) => Some(&**task),
            _ => None,
        };
        let new = model.tasks.get(id).map(|task| &**task);
        // Most changes of a task are reports of how far its start has come, which no host needs to hear.
        let same_endpoint = old.zip(new).is_some_and(|(old, new)| same_endpoint(old, new));
        let same_assignment = old.zip(new).is_some_and(|(old, new)| same_assignment(old, new));
        self.note_statics(model, [old, new].map(|task| task.map(|task| (&*task.spec, 0))));
        for task in old.into_iter().chain(new) {
            if let Some(node) = task.node.as_ref().filter(|_| !same_assignment) {
                self.mark(node, format!("task/{id}"));
            }
            if same_endpoint {
                continue;
            }
            for network in model.task_networks(task) {
                self.mark_members(model, &network, &format!("endpoint/{network}/{id}"), None);
            }
        }
        if let Some(task) = new.or(old).filter(|_| !(same_assignment && same_endpoint)) {
            let service = task.service.as_ref().and_then(|s| model.services.get(s));
            self.note_takers(model, service.map_or(&task.name, |s| &s.spec.name));
        }
    }

    /// Static addresses are frozen where they lie in a host's block. Few specifications have one.
    fn note_statics(&mut self, model: &Model, specs: [Option<(&TaskSpec, u64)>; 2]) {
        let statics = |(spec, generation): (&TaskSpec, u64)| {
            static_addresses(spec).map(|(network, address)| (network, address, generation)).collect::<BTreeSet<_>>()
        };
        let [old, new] = specs.map(|spec| spec.map(statics).unwrap_or_default());
        for (network, ..) in old.symmetric_difference(&new) {
            self.mark_members(model, network, &format!("network/{network}"), None);
        }
    }

    /// Tasks that take volumes from a service or container task name the task that has them now.
    fn note_takers(&mut self, model: &Model, name: &str) {
        for taker in model.takers(name) {
            if let Some(node) = &model.tasks[taker].node {
                self.mark(node, format!("task/{taker}"));
            }
        }
    }

    /// What a service has in its networks: looked at where it had or has a virtual address, if its names or addresses are
    /// others.
    fn note_vips(&mut self, model: &Model, id: &ServiceId, before: Option<&Service>) {
        let documents = |s: &Service| s.vips.iter().map(|vip| service_document(model, s, vip)).collect::<Vec<_>>();
        let (old, new) = (before.map(documents), model.services.get(id).map(documents));
        if old == new {
            return;
        }
        let networks: BTreeSet<NetworkId> = old.into_iter().chain(new).flatten().map(|d| d.network).collect();
        for network in networks {
            self.mark_members(model, &network, &format!("service/{network}/{id}"), None);
        }
    }

    /// Names and ports of a service stand in the documents of its tasks, fewer names where it has a virtual address.
    fn note_service(&mut self, model: &Model, before: &Service) {
        let says = |s: &Service| {
            let vips: Vec<NetworkId> = s.vips.iter().map(|vip| vip.network.clone()).collect();
            (s.spec.name.clone(), s.spec.short_name.clone(), s.spec.stack.clone(), s.spec.ingress.clone(), vips)
        };
        if model.services.get(&before.id).map(says) == Some(says(before)) {
            return;
        }
        self.note_takers(model, &before.spec.name);
        for task in model.service_tasks(&before.id) {
            if let Some(node) = &task.node {
                self.mark(node, format!("task/{}", task.id));
            }
            for network in model.task_networks(task) {
                self.mark_members(model, &network, &format!("endpoint/{network}/{}", task.id), None);
            }
        }
    }

    fn note_block(&mut self, model: &Model, key: &Key, before: Option<&Object>) {
        let Some((network, index)) = key.id.rsplit_once('/') else { return };
        let network = NetworkId::new(network);
        let index = index.parse().unwrap_or(u32::MAX);
        let old = match before {
            Some(Object::Block(block)) => Some(block.node.clone()),
            _ => None,
        };
        let new = model.blocks.get(&(network.clone(), index)).map(|b| b.node.clone());
        let same_owner = old == new;
        self.mark_attached(model, &network);
        // A single address is frozen in the block that it is out of.
        let single = model.blocks.get(&(network.clone(), index)).or(match before {
            Some(Object::Block(block)) => Some(block),
            _ => None,
        });
        if let Some((block, of)) = single.filter(|b| b.is_single()).zip(model.networks.get(&network))
            && let Some(lender) = model.block_of(of, block.block4.addr())
        {
            self.mark(&lender.node, format!("network/{network}"));
        }
        for node in old.iter().chain(new.iter().filter(|_| !same_owner)) {
            let blocks = model.node_blocks(&network, node).count();
            self.mark(node, format!("network/{network}"));
            self.mark_members(model, &network, &format!("peer/{network}/{node}"), Some(node));
            if !same_owner && blocks <= 1 {
                // It has just become a member, or perhaps is none any more; the least MTU may be another now.
                self.mark_network(model, &network, node);
                self.mark_members(model, &network, &format!("network/{network}"), None);
            }
        }
    }

    fn note_node(&mut self, model: &Model, id: &NodeId, before: Option<&Object>) {
        let old = match before {
            Some(Object::Node(old)) => Some(&old.description),
            _ => None,
        };
        let new = model.nodes.get(id).map(|node| &node.description);
        self.note_attached(model, old, new);
        let Some(new) = new else { return };
        self.add_node(id);
        let Some(old) = old else { return };
        if (old.underlay4, old.underlay6, old.underlay_mtu) == (new.underlay4, new.underlay6, new.underlay_mtu) {
            return;
        }
        let networks: Vec<NetworkId> = model.node_networks(id).cloned().collect();
        for network in &networks {
            self.mark_members(model, network, &format!("peer/{network}/{id}"), Some(id));
            self.mark_members(model, network, &format!("network/{network}"), None);
        }
    }

    /// What is told of containers that were started by hand follows from their hosts' blocks, and from the network.
    fn mark_attached(&mut self, model: &Model, network: &NetworkId) {
        for id in model.attached(network) {
            self.mark_members(model, network, &format!("endpoint/{network}/{id}"), None);
        }
    }

    /// Containers that were started by hand are others than before.
    fn note_attached(&mut self, model: &Model, old: Option<&NodeDescription>, new: Option<&NodeDescription>) {
        let of = |description: Option<&NodeDescription>| -> BTreeSet<AttachedContainer> {
            description.into_iter().flat_map(|d| d.attached.iter().cloned()).collect()
        };
        for container in of(old).symmetric_difference(&of(new)) {
            let key = format!("endpoint/{}/{}", container.network, container.id);
            self.mark_members(model, &container.network, &key, None);
        }
    }
}

/// Whether two states of a task give the same document for its own host: what `Core::task_document` looks at.
fn same_assignment(old: &Task, new: &Task) -> bool {
    (&old.node, &old.name, &old.service, &old.stack, old.slot, old.run)
        == (&new.node, &new.name, &new.service, &new.stack, new.slot, new.run)
        && (old.desired_state, is_over(old)) == (new.desired_state, is_over(new))
        && old.spec == new.spec
}

/// Whether the task's present run has ended, as its host reported. An agent that knows nothing of it (a lost ledger, a
/// restored backup) must not run it again.
fn is_over(task: &Task) -> bool {
    task.status.state.is_terminal() && task.status.state != TaskState::Orphaned
}

/// Whether two states of a task give the same endpoint documents: what `Core::endpoint_document` looks at.
fn same_endpoint(old: &Task, new: &Task) -> bool {
    let ended = |t: &Task| t.status.state.is_terminal();
    (ended(old), is_served(old), is_draining(old), &old.node, &old.name, &old.service)
        == (ended(new), is_served(new), is_draining(new), &new.node, &new.name, &new.service)
        && old.status.addresses == new.status.addresses
        && old.spec == new.spec
}

/// Whether names lead to it: it runs, shall run, and nothing says that it is unwell.
pub(crate) fn is_served(task: &Task) -> bool {
    let running = task.status.state == TaskState::Running && task.desired_state == TaskState::Running;
    running && task.status.health.is_none_or(|h| h == Health::Healthy)
}

/// Whether it runs and is about to stop: no name leads to it any more, and its connections go on.
fn is_draining(task: &Task) -> bool {
    task.status.state == TaskState::Running && task.desired_state > TaskState::Running
}

/// Keys of all documents of a network that `node` may have, as a member.
fn network_keys(model: &Model, network: &NetworkId, node: &NodeId) -> BTreeSet<String> {
    let mut keys = BTreeSet::from([format!("network/{network}")]);
    keys.extend(model.members(network).filter(|n| *n != node).map(|n| format!("peer/{network}/{n}")));
    keys.extend(model.vips(network).map(|(_, service)| format!("service/{network}/{service}")));
    let tasks = model.network_tasks(network).map(|t| &t.id);
    keys.extend(tasks.chain(model.attached(network)).map(|id| format!("endpoint/{network}/{id}")));
    keys
}

/// What every host of the network is told of a service there.
fn service_document(model: &Model, service: &Service, vip: &Vip) -> ServiceAssignment {
    let attachment = service.spec.task.networks.iter().find(|a| a.network == vip.network.as_str());
    let mut names = vec![short_name(service).to_owned(), service.spec.name.clone()];
    names.extend(attachment.into_iter().flat_map(|a| a.aliases.clone()));
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    let leads = ingress::network_of(model, service) == Some(&vip.network);
    ServiceAssignment {
        network: vip.network.clone(),
        service: service.id.clone(),
        names,
        v4: vip.v4,
        v6: vip.v6,
        ports: service.spec.ingress.iter().filter(|_| leads).copied().collect(),
    }
}

/// Ports that a task listens on as its specification says: the first [`KNOWN_PORTS_MAX`] of those that it or its service
/// publishes and those that it exposes.
fn known_ports(spec: &TaskSpec, service: Option<&Service>) -> Vec<(Protocol, u16)> {
    let ingress = service.into_iter().flat_map(|service| &service.spec.ingress);
    let ingress = ingress.map(|port| (port.protocol, port.target));
    let published = spec.ports.iter().map(|port| (port.protocol, port.container_port)).chain(ingress);
    let exposed = spec.container.expose.iter().flat_map(|text| exposed(text));
    let ports: BTreeSet<_> = published.chain(exposed).take(KNOWN_PORTS_MAX).collect();
    ports.into_iter().collect()
}

/// The ports of `80`, `53/udp` or `8000-8003`; none of anything else.
fn exposed(text: &str) -> impl Iterator<Item = (Protocol, u16)> + use<> {
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    };
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let ports = protocol.zip(first.parse::<u16>().ok().zip(last.parse::<u16>().ok()));
    ports.into_iter().flat_map(|(protocol, (first, last))| (first..=last).map(move |port| (protocol, port)))
}

/// The name of a service within its stack.
fn short_name(service: &Service) -> &str {
    let ServiceSpec { short_name, name, .. } = &service.spec;
    if short_name.is_empty() { name } else { short_name }
}

impl Core {
    /// A session of `node` begins with what its ledger holds. `same_chain`: its ledger belongs to this core. True when
    /// nothing needs to be told; false too for a node that is not there, which is told nothing.
    pub fn dispatch_open(&mut self, node: &NodeId, same_chain: bool, generation: u64) -> bool {
        let Some(queue) = self.dispatch.queues.get_mut(node) else { return false };
        if !same_chain || (queue.generation != generation && !skein_api::mutant!("generation-ignored")) {
            queue.full = true;
            queue.dirty.clear();
        }
        queue.acked = if same_chain { generation } else { 0 };
        self.dispatch.parked.remove(node);
        let current = !queue.full && queue.dirty.is_empty();
        if !current {
            self.dispatch.due.insert(node.clone());
        }
        current
    }

    /// The node follows everything up to `generation`.
    pub(crate) fn dispatch_follows(&mut self, node: &NodeId, generation: u64) {
        if let Some(queue) = self.dispatch.queues.get_mut(node) {
            queue.acked = queue.acked.max(generation);
        }
    }

    /// How far a node is with what it is to be told; all zero for one that is not there.
    pub fn dispatch_progress(&self, node: &NodeId) -> Progress {
        let Some(queue) = self.dispatch.queues.get(node) else { return Progress::default() };
        let waiting = queue.full || !queue.dirty.is_empty();
        Progress { sent: queue.generation, acked: queue.acked, waiting }
    }

    /// A node has no session: it is not due before its next one begins, whatever changes for it.
    pub(crate) fn dispatch_park(&mut self, node: &NodeId) {
        if self.dispatch.due.remove(node) {
            self.dispatch.parked.insert(node.clone());
        }
    }

    /// Nodes that have something to be told, in order.
    pub fn dispatch_due(&self) -> Vec<NodeId> {
        self.dispatch.due.iter().cloned().collect()
    }

    /// What a node is to be told next; `None` when nothing. What was taken counts as told: when it does not arrive,
    /// the node's next session shows another generation and gets everything. Upserts come in the order of their keys,
    /// a full batch has no removes.
    pub fn dispatch_take(&mut self, node: &NodeId) -> Option<Batch> {
        if !self.dispatch.due.remove(node) {
            return None;
        }
        let queue = self.dispatch.queues.get_mut(node)?;
        let (full, dirty) = (std::mem::take(&mut queue.full), std::mem::take(&mut queue.dirty));
        let base = queue.generation;
        queue.generation += 1;
        let generation = queue.generation;
        let keys = if full { self.all_keys(node) } else { dirty };
        let (mut upserts, mut removes) = (Vec::new(), Vec::new());
        for key in keys {
            match self.document(node, &key) {
                Some(document) => upserts.push(document),
                None if full => {}
                None => removes.push(key),
            }
        }
        let batch = Batch { full, base, generation, upserts, removes };
        self.readiness.told(node, &batch);
        self.draining.told(node, &batch);
        Some(batch)
    }

    /// Everything that `node` is to know now, by key: what a full batch would have.
    pub fn full_documents(&self, node: &NodeId) -> BTreeMap<String, Assignment> {
        self.all_keys(node).into_iter().filter_map(|key| Some((key.clone(), self.document(node, &key)?))).collect()
    }

    fn all_keys(&self, node: &NodeId) -> BTreeSet<String> {
        let model = &self.model;
        let mut keys: BTreeSet<String> = model.node_tasks(node).map(|t| format!("task/{}", t.id)).collect();
        if skein_api::mutant!("foreign-objects") {
            keys.extend(model.tasks.keys().map(|id| format!("task/{id}")));
        }
        for network in model.node_networks(node) {
            keys.extend(network_keys(model, network, node));
        }
        keys
    }

    /// A document as `node` shall have it now; `None` when it shall not. A host sees only its own tasks, the networks
    /// that it has blocks of, and who else is in these.
    pub fn document(&self, node: &NodeId, key: &str) -> Option<Assignment> {
        let mut parts = key.split('/');
        let (kind, first, second) = (parts.next()?, parts.next()?, parts.next());
        if kind == "task" {
            let own =
                |t: &&std::sync::Arc<Task>| t.node.as_ref() == Some(node) || skein_api::mutant!("foreign-objects");
            let task = self.model.tasks.get(&TaskId::new(first)).filter(own)?;
            return Some(Assignment::Task(Box::new(self.task_document(task))));
        }
        let id = NetworkId::new(first);
        let network = self.model.networks.get(&id).filter(|n| self.model.is_member(&n.id, node))?;
        match (kind, second) {
            ("network", None) => Some(Assignment::Network(self.network_document(network, node)?)),
            ("peer", Some(peer)) if peer != node.as_str() => {
                Some(Assignment::Peer(self.peer_document(network, &NodeId::new(peer))?))
            }
            ("service", Some(service)) => {
                let service = self.model.services.get(&ServiceId::new(service))?;
                let vip = service.vips.iter().find(|vip| vip.network == id)?;
                Some(Assignment::Service(service_document(&self.model, service, vip)))
            }
            ("endpoint", Some(task)) => {
                let task = TaskId::new(task);
                let Some(task) = self.model.tasks.get(&task) else {
                    let (host, container) = self.model.find_attached(&id, &task)?;
                    return Some(Assignment::Endpoint(self.attached_document(network, host, container)?));
                };
                task.spec.networks.iter().find(|a| a.network == id.as_str())?;
                if task.node.as_ref() == Some(node) && self.readiness.holds(&task.id, &id) {
                    return None;
                }
                Some(Assignment::Endpoint(self.endpoint_document(network, task)?))
            }
            _ => None,
        }
    }

    fn task_document(&self, task: &Task) -> TaskAssignment {
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        let here = |name: &String| {
            let there = placement::live_tasks_of(&self.model, name);
            there.into_iter().find(|t| t.node == task.node).map(|t| t.id.clone())
        };
        let container = &task.spec.container;
        let from = container.volumes_from.iter().filter_map(|v| Some((here(&v.from)?, v.read_only)));
        TaskAssignment {
            id: task.id.clone(),
            name: task.name.clone(),
            service: task.service.clone(),
            service_name: service.map(|s| s.spec.name.clone()),
            stack: task.stack.clone(),
            slot: task.slot,
            spec: (*task.spec).clone(),
            networks: self.model.task_networks(task),
            volumes_from: from.collect(),
            share: container.share.map(here),
            generic: task.generic.clone(),
            desired_state: if self.draining.holds(&task.id) { TaskState::Running } else { task.desired_state },
            run: task.run,
            over: is_over(task),
        }
    }

    fn network_document(&self, network: &Network, node: &NodeId) -> Option<NetworkAssignment> {
        let host = self.model.nodes.get(node)?;
        Some(NetworkAssignment {
            id: network.id.clone(),
            name: network.spec.name.clone(),
            vni: network.vni,
            subnet4: network.subnet4,
            subnet6: network.subnet6,
            gateway4: network.gateway4(),
            gateway6: network.gateway6(),
            mtu: self.mtu(&network.id),
            internal: network.spec.internal,
            attachable: network.spec.attachable,
            host_index: host.host_index,
            blocks: self.model.node_blocks(&network.id, node).map(|b| b.block4).collect(),
            frozen: self.freezes(network, node),
        })
    }

    /// The least MTU of the members' underlays, less the encapsulation.
    fn mtu(&self, network: &NetworkId) -> u32 {
        let members: Vec<_> = self.model.members(network).filter_map(|n| self.model.nodes.get(n)).collect();
        let known = members.iter().map(|n| n.description.underlay_mtu).filter(|mtu| *mtu > 0);
        let underlay = known.min().unwrap_or(MTU_DEFAULT);
        let v4_only = members.iter().all(|n| n.description.underlay4.is_some());
        (underlay.saturating_sub(if v4_only { OVERHEAD4 } else { OVERHEAD6 })).max(MTU_MIN)
    }

    fn peer_document(&self, network: &Network, peer: &NodeId) -> Option<PeerAssignment> {
        let host = self.model.nodes.get(peer).filter(|_| self.model.is_member(&network.id, peer))?;
        Some(PeerAssignment {
            network: network.id.clone(),
            node: peer.clone(),
            host_index: host.host_index,
            underlay4: host.description.underlay4,
            underlay6: host.description.underlay6,
            blocks: self.model.node_blocks(&network.id, peer).map(|b| b.block4).collect(),
        })
    }

    fn endpoint_document(&self, network: &Network, task: &Task) -> Option<EndpointAssignment> {
        let node = task.node.clone()?;
        let address = task.status.addresses.iter().find(|a| a.network == network.id)?;
        if task.status.state.is_terminal() {
            return None;
        }
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        let attachment = task.spec.networks.iter().find(|a| a.network == network.id.as_str());
        let mut names = vec![task.name.clone()];
        names.extend(task.spec.container.container_name.clone());
        names.extend(task.spec.container.hostname.clone());
        let mut shared_names: Vec<String> = attachment.map(|a| a.aliases.clone()).unwrap_or_default();
        if let Some(service) = service {
            let (short, full) = (short_name(service), &service.spec.name);
            if service.vips.iter().any(|vip| vip.network == network.id) {
                // These are the virtual address's.
                shared_names.clear();
            } else {
                shared_names.extend([short.to_owned(), full.clone()]);
            }
            shared_names.extend([format!("tasks.{short}"), format!("tasks.{full}")]);
        }
        for names in [&mut names, &mut shared_names] {
            names.sort();
            names.dedup();
        }
        Some(EndpointAssignment {
            network: network.id.clone(),
            task: task.id.clone(),
            service: task.service.clone(),
            node,
            names,
            shared_names,
            v4: address.v4,
            v6: address.v6,
            ports: known_ports(&task.spec, service),
            healthy: is_served(task),
            plain: false,
            draining: is_draining(task),
        })
    }

    /// A container that was started by hand, as far as its host may say it: with an address of the host's blocks.
    fn attached_document(
        &self,
        network: &Network,
        host: &Node,
        container: &AttachedContainer,
    ) -> Option<EndpointAssignment> {
        if !network.spec.attachable {
            return None;
        }
        let v4 = container.v4.filter(|v4| self.model.giver(network, *v4) == Some(&host.id))?;
        let own6 = address6(network.subnet6, network.subnet4, v4);
        Some(EndpointAssignment {
            network: network.id.clone(),
            task: container.id.clone(),
            service: None,
            node: host.id.clone(),
            names: container.names.clone(),
            shared_names: Vec::new(),
            v4: Some(v4),
            v6: container.v6.filter(|v6| *v6 == own6),
            ports: Vec::new(),
            healthy: true,
            plain: true,
            draining: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exposed_ports() {
        let check = |text: &str, want: &[(Protocol, u16)]| {
            assert_eq!(exposed(text).collect::<Vec<_>>(), want, "{text}");
        };
        check("80", &[(Protocol::Tcp, 80)]);
        check("53/udp", &[(Protocol::Udp, 53)]);
        check("8000-8002/tcp", &[8000, 8001, 8002].map(|port| (Protocol::Tcp, port)));
        check("1/sctp", &[]);
        check("9-8", &[]);
        check("x", &[]);
        check("70000", &[]);
        let mut spec = TaskSpec::default();
        spec.container.expose = vec!["80".into(), "1-65535/udp".into()];
        spec.ports =
            vec![skein_api::PortPublish { protocol: Protocol::Tcp, container_port: 80, host_port: 0, host_ip: None }];
        assert_eq!(known_ports(&spec, None).len(), KNOWN_PORTS_MAX - 1, "one of them stands twice");
    }
}

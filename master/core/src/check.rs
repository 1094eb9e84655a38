//! The invariants of the state, checked over all of it.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{Block, Network, NetworkId, NodeId, Service, Task, TaskState, UpdateOrder, Vip, address6};

use crate::{
    core::Core,
    dispatch::is_served,
    model::{Change, Object},
    placement::{holds, placed},
    scheduler::Dimension,
};

/// Every broken invariant, one line each; empty when all is well.
pub(crate) fn check(core: &Core) -> Vec<String> {
    let mut broken = core.scheduler().check();
    unique_numbers(core, &mut broken);
    blocks(core, &mut broken);
    vips(core, &mut broken);
    tasks(core, &mut broken);
    for node in core.model().nodes.keys() {
        capacity(core, node, &mut broken);
    }
    rebuilt_index(core, &mut broken);
    broken
}

/// The invariants of what `changes` touched, in the state after them.
pub(crate) fn check_touched(core: &Core, changes: &[Change]) -> Vec<String> {
    let mut broken = Vec::new();
    let mut nodes = BTreeSet::new();
    for change in changes {
        match change {
            Change::Upsert(Object::Task(task)) => {
                // What was committed may have been changed again since, by the next turn.
                let Some(task) = core.model().tasks.get(&task.id) else { continue };
                one_task(core, task, &mut broken);
                nodes.extend(task.node.clone());
            }
            Change::Upsert(Object::Block(block)) => one_block(core, block, &mut broken),
            Change::Upsert(Object::Service(service)) => {
                if let Some(service) = core.model().services.get(&service.id) {
                    service_vips(core, service, &mut broken);
                }
            }
            _ => {}
        }
    }
    for node in &nodes {
        capacity(core, node, &mut broken);
    }
    broken
}

/// What the tasks on a node hold together is there, and no two of them have one port.
fn capacity(core: &Core, node: &NodeId, broken: &mut Vec<String>) {
    let Some(host) = core.model().nodes.get(node) else { return };
    let Some(facts) = core.scheduler().node(node) else { return };
    let mut taken: BTreeMap<Dimension, u64> = BTreeMap::new();
    let (mut ports, mut ids) = (BTreeSet::new(), BTreeSet::new());
    for task in core.model().node_tasks(node).filter(|task| holds(task)) {
        for (kind, id) in task.generic.iter().flat_map(|(kind, ids)| ids.iter().map(move |id| (kind, id))) {
            if !ids.insert((kind, id)) {
                broken.push(format!("{kind} {id} of node {} has two owners", host.name));
            }
        }
        let short = |(kind, given): &(&String, &Vec<String>)| {
            Some(given.len() as u64) != task.spec.resources.generic.get(*kind).copied()
        };
        if let Some((kind, given)) = task.generic.iter().find(short) {
            broken.push(format!("task {} has {} ids of {kind}, it asked for another number", task.id, given.len()));
        }
    }
    for placed in core.model().node_tasks(node).filter_map(|task| placed(core.model(), task)) {
        for (dimension, amount) in placed.takes() {
            let taken = taken.entry(dimension).or_default();
            *taken = taken.saturating_add(amount);
        }
        for port in placed.ports.iter().filter(|p| p.host_port != 0 && p.host_ip.is_none()) {
            if !ports.insert((port.protocol, port.host_port)) {
                broken.push(format!("port {} of node {} has two owners", port.host_port, host.name));
            }
        }
    }
    // Slots are a label: an operator may lower them under what is there.
    for (dimension, taken) in taken.into_iter().filter(|(dimension, _)| *dimension != Dimension::Slots) {
        if let Some(offered) = facts.offer(&dimension).filter(|offered| taken > *offered) {
            broken.push(format!("node {} offers {offered} of {dimension:?}, {taken} are held", host.name));
        }
    }
}

fn unique<K: Ord + std::fmt::Debug>(what: &str, items: impl Iterator<Item = (K, String)>, broken: &mut Vec<String>) {
    let mut seen: BTreeMap<K, String> = BTreeMap::new();
    for (key, owner) in items {
        if let Some(other) = seen.insert(key, owner.clone()) {
            broken.push(format!("{what} has two owners: {other} and {owner}"));
        }
    }
}

fn unique_numbers(core: &Core, broken: &mut Vec<String>) {
    let model = core.model();
    unique("vni", model.networks.values().map(|n| (n.vni, n.spec.name.clone())), broken);
    unique("network name", model.networks.values().map(|n| (n.spec.name.clone(), n.id.to_string())), broken);
    unique("host index", model.nodes.values().map(|n| (n.host_index, n.name.clone())), broken);
    unique("node name", model.nodes.values().map(|n| (n.name.clone(), n.id.to_string())), broken);
    unique("service name", model.services.values().map(|s| (s.spec.name.clone(), s.id.to_string())), broken);
    unique("volume name", model.volumes.values().map(|v| (v.name.clone(), v.id.to_string())), broken);
    let ports = model.services.values().flat_map(|s| s.spec.ingress.iter().map(move |port| (port, &s.spec.name)));
    let ports = ports.map(|(port, name)| ((port.protocol, port.published), name.clone()));
    unique("port of every host", ports, broken);
    for token in model.tokens.values().filter(|t| t.uses > t.uses_max) {
        broken.push(format!("token {} was used {} times, {} were allowed", token.id, token.uses, token.uses_max));
    }
    let mut networks: Vec<_> = model.networks.values().map(|n| (n.subnet4, &n.spec.name)).collect();
    networks.sort();
    for pair in networks.windows(2) {
        // Sorted by their first address, prefixes overlap only where neighbours do.
        if pair[0].0.contains(&pair[1].0.network()) {
            broken.push(format!("subnets of {} and {} overlap", pair[0].1, pair[1].1));
        }
    }
}

fn blocks(core: &Core, broken: &mut Vec<String>) {
    let model = core.model();
    for block in model.blocks.values() {
        one_block(core, block, broken);
    }
    let owners = model.blocks.values().map(|b| ((b.network.clone(), b.block4, b.is_single()), b.node.to_string()));
    unique("block", owners, broken);
    let live = model.tasks.values().filter(|t| !t.status.state.is_terminal());
    let used = live.flat_map(|t| t.status.addresses.iter().map(move |a| ((a.network.clone(), a.v4), t.id.to_string())));
    unique("address", used, broken);
}

/// A block that is still there belongs to a network and to a node.
fn one_block(core: &Core, block: &Block, broken: &mut Vec<String>) {
    let model = core.model();
    if !model.blocks.contains_key(&(block.network.clone(), block.index)) {
        return;
    }
    match model.networks.get(&block.network) {
        None => broken.push(format!("block {} belongs to no network", block.block4)),
        Some(n) if !n.subnet4.contains(&block.block4) => {
            broken.push(format!("block {} is outside {}", block.block4, n.subnet4));
        }
        Some(network) => one_giver(core, network, block, broken),
    }
    if let Some((vip, _)) = model.vips(&block.network).find(|(vip, _)| block.block4.contains(*vip)) {
        broken.push(format!("block {} of node {} holds the virtual address {vip}", block.block4, block.node));
    }
    if !model.nodes.contains_key(&block.node) {
        broken.push(format!("block {} belongs to no node", block.block4));
    }
}

/// Only one host gives out an address: a single one is frozen in the block that it is out of.
fn one_giver(core: &Core, network: &Network, block: &Block, broken: &mut Vec<String>) {
    if !block.is_single() {
        return;
    }
    let address = block.block4.addr();
    let claimed = core.model().claimants(&network.id, address).next().is_some();
    if block.borrowed && claimed {
        broken.push(format!("static address {address} is borrowed by node {}", block.node));
    }
    if let Some(around) = core.model().block_of(network, address).filter(|b| b.node != block.node) {
        let frozen = core.freezes(network, &around.node).iter().any(|f| f.prefix.contains(&address));
        if !frozen {
            broken.push(format!("address {address} is given out by nodes {} and {}", block.node, around.node));
        }
    }
}

fn vips(core: &Core, broken: &mut Vec<String>) {
    let services = core.model().services.values();
    let all = services.clone().flat_map(|s| s.vips.iter().map(move |vip| (vip, s.spec.name.clone())));
    unique("virtual address", all.map(|(vip, owner)| ((vip.network.clone(), vip.v4), owner)), broken);
    for service in services {
        service_vips(core, service, broken);
    }
}

/// The virtual addresses of a service: in networks that it names, usable, and in no host's block.
fn service_vips(core: &Core, service: &Service, broken: &mut Vec<String>) {
    let (model, name) = (core.model(), &service.spec.name);
    let mut networks = BTreeSet::new();
    for Vip { network, v4, v6 } in &service.vips {
        let Some(network) = model.networks.get(network) else {
            // It goes with the next look at the service.
            continue;
        };
        if !networks.insert(&network.id) {
            broken.push(format!("service {name} has two virtual addresses in network {}", network.spec.name));
        }
        if !network.subnet4.contains(v4) || network.is_reserved(*v4) {
            broken.push(format!("virtual address {v4} of service {name} cannot be one of {}", network.subnet4));
        }
        if *v6 != address6(network.subnet6, network.subnet4, *v4) {
            broken.push(format!("virtual addresses {v4} and {v6} of service {name} do not belong together"));
        }
        if let Some(claimant) = model.claimants(&network.id, *v4).next() {
            broken.push(format!("virtual address {v4} of service {name} is static for {claimant:?}"));
        }
        if let Some(owner) = model.giver(network, *v4) {
            broken.push(format!("virtual address {v4} of service {name} is in a block of node {owner}"));
        }
    }
}

fn tasks(core: &Core, broken: &mut Vec<String>) {
    let model = core.model();
    let live = |t: &Task| !t.status.state.is_terminal() && t.desired_state == TaskState::Running;
    let slots = model.tasks.values().filter(|t| live(t) && t.slot > 0);
    // One that is served may go on beside its successor.
    let order = |t: &Task| Some(model.services.get(t.service.as_ref()?)?.spec.update.order);
    let two = |t: &Task| order(t) == Some(UpdateOrder::StartFirst);
    let (double, single): (Vec<&Task>, Vec<&Task>) = slots.map(|t| &**t).partition(|t| two(t));
    unique("slot", single.into_iter().map(|t| ((t.service.clone(), t.slot), t.id.to_string())), broken);
    let served = |t: &Task| (t.service.clone(), t.slot, is_served(t));
    unique("slot", double.into_iter().map(|t| (served(t), t.id.to_string())), broken);
    let alone = model.tasks.values().filter(|t| t.service.is_none() && t.desired_state != TaskState::Remove);
    unique("container task name", alone.map(|t| (t.name.clone(), t.id.to_string())), broken);
    for task in model.tasks.values() {
        one_task(core, task, broken);
    }
    let known = core.pending.ids().filter(|id| !model.tasks.contains_key(id));
    broken.extend(known.map(|id| format!("task {id} is pending and not there")));
    broken.extend(core.pending.forgotten().map(|id| format!("task {id} is pending and nothing will try it")));
    for (class, id) in core.pending.waiting().filter(|(class, _)| core.scheduler.waits(*class)) {
        let request = model.tasks.get(id).and_then(|task| core.request(task, None).ok());
        let Some(request) = request else { continue };
        if core.scheduler.class_of(&request) == Some(class) && !core.scheduler.fitting(&request).is_empty() {
            broken.push(format!("task {id} waits for a node although one has room"));
        }
    }
    for (service, id) in core.pending.dependents() {
        if core.request(&model.tasks[id], None).is_ok() {
            broken.push(format!("task {id} waits for service {service}, which it need not"));
        }
    }
    // When they are to be tried in the next settling nothing is promised of them, nor where a node has no address left.
    for id in core.pending.restless().filter(|_| !core.wake_pending) {
        let task = &model.tasks[id];
        let request = core.request(task, None).ok().filter(|_| task.spec.networks.is_empty());
        if request.is_some_and(|request| !core.scheduler.fitting(&request).is_empty()) {
            broken.push(format!("task {id} waits although a node would take it"));
        }
    }
}

/// A task as the model, the list of pending ones and the scheduler have it.
fn one_task(core: &Core, task: &Task, broken: &mut Vec<String>) {
    task_invariants(core, task, broken);
    let live = !task.status.state.is_terminal() && task.desired_state == TaskState::Running;
    if (task.node.is_none() && live) != core.pending.contains(&task.id) {
        broken.push(format!("task {} is wrongly among the pending ones, or is missing there", task.id));
    }
    let known = match placed(core.model(), task) {
        Some(placed) => core.scheduler().knows(&placed),
        None => !core.scheduler().holds(&task.id),
    };
    if !known {
        broken.push(format!("the scheduler knows something else of task {}", task.id));
    }
}

fn task_invariants(core: &Core, task: &Task, broken: &mut Vec<String>) {
    let (model, id, state) = (core.model(), &task.id, task.status.state);
    if !matches!(task.desired_state, TaskState::Running | TaskState::Shutdown | TaskState::Remove) {
        broken.push(format!("task {id} shall be {:?}", task.desired_state));
    }
    let Some(node) = &task.node else {
        if !state.is_terminal() && state > TaskState::Pending {
            broken.push(format!("task {id} has no node and is {state:?}"));
        }
        return;
    };
    if !model.nodes.contains_key(node) {
        broken.push(format!("task {id} is on a node that is not there"));
    }
    if state < TaskState::Assigned {
        broken.push(format!("task {id} has a node and is {state:?}"));
    }
    for attachment in &task.spec.networks {
        let network = NetworkId::new(&attachment.network);
        if !model.networks.contains_key(&network) {
            broken.push(format!("task {id} names network {network}, which is not there"));
        } else if !model.is_member(&network, node) && (task.service.is_none() || !state.is_terminal()) {
            broken.push(format!("task {id} is on node {node}, which has no addresses of network {network}"));
        }
    }
    for address in task.status.addresses.iter().filter(|_| !state.is_terminal()) {
        let network = model.networks.get(&address.network);
        let owned = |v4| network.is_some_and(|network| model.giver(network, v4) == Some(node));
        if !address.v4.is_some_and(owned) {
            broken.push(format!("task {id} has address {:?} outside its node's blocks", address.v4));
        }
    }
}

/// The model's indexes equal ones that are built anew.
fn rebuilt_index(core: &Core, broken: &mut Vec<String>) {
    let mut rebuilt = crate::model::Model::default();
    for object in core.model().objects() {
        rebuilt.apply(&Change::Upsert(object));
    }
    if rebuilt != *core.model() {
        broken.push("the model's indexes differ from ones built anew".to_owned());
    }
}

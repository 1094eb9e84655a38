//! The invariants of the state, checked over all of it.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::TaskState;

use crate::{core::Core, model::Object};

/// Every broken invariant, one line each; empty when all is well.
pub(crate) fn check(core: &Core) -> Vec<String> {
    let mut broken = core.scheduler().check();
    unique_numbers(core, &mut broken);
    blocks(core, &mut broken);
    tasks(core, &mut broken);
    rebuilt_index(core, &mut broken);
    broken
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
    let networks: Vec<_> = model.networks.values().collect();
    for (i, a) in networks.iter().enumerate() {
        for b in &networks[i + 1..] {
            if a.subnet4.contains(&b.subnet4.network()) || b.subnet4.contains(&a.subnet4.network()) {
                broken.push(format!("subnets of {} and {} overlap", a.spec.name, b.spec.name));
            }
        }
    }
}

fn blocks(core: &Core, broken: &mut Vec<String>) {
    let model = core.model();
    for block in model.blocks.values() {
        match model.networks.get(&block.network) {
            None => broken.push(format!("block {} belongs to no network", block.block4)),
            Some(n) if !n.subnet4.contains(&block.block4) => {
                broken.push(format!("block {} is outside {}", block.block4, n.subnet4));
            }
            Some(_) => {}
        }
        if !model.nodes.contains_key(&block.node) {
            broken.push(format!("block {} belongs to no node", block.block4));
        }
    }
    let owners = model.blocks.values().map(|b| ((b.network.clone(), b.block4), b.node.to_string()));
    unique("block", owners, broken);
}

fn tasks(core: &Core, broken: &mut Vec<String>) {
    let model = core.model();
    let occupied = |t: &&skein_api::Task| !t.status.state.is_terminal();
    let live = |t: &&skein_api::Task| occupied(t) && t.desired_state == TaskState::Running;
    let slots = model.tasks.values().filter(live).filter(|t| t.slot > 0);
    unique("slot", slots.map(|t| ((t.service.clone(), t.slot), t.id.to_string())), broken);
    let addresses = model.tasks.values().filter(occupied).flat_map(|t| {
        t.status.addresses.iter().filter_map(|a| Some(((a.network.clone(), a.v4?), t.id.to_string())))
    });
    unique("address", addresses, broken);
    for task in model.tasks.values() {
        if let Some(node) = &task.node
            && !model.nodes.contains_key(node)
        {
            broken.push(format!("task {} is on a node that is not there", task.id));
        }
        if task.node.is_some() && task.status.state < TaskState::Assigned {
            broken.push(format!("task {} has a node and is {:?}", task.id, task.status.state));
        }
        let pending: BTreeSet<_> = core.pending.iter().collect();
        if pending.contains(&task.id) == task.node.is_some() && live(&task) {
            broken.push(format!("task {} is wrongly among the pending ones", task.id));
        }
    }
}

/// The model's indexes equal ones that are built anew.
fn rebuilt_index(core: &Core, broken: &mut Vec<String>) {
    let mut rebuilt = crate::model::Model::default();
    let mut objects: Vec<Object> = core.model().objects();
    objects.sort_by_key(Object::key);
    for object in objects {
        rebuilt.apply(&crate::model::Change::Upsert(object));
    }
    if rebuilt != *core.model() {
        broken.push("the model's indexes differ from ones built anew".to_owned());
    }
}

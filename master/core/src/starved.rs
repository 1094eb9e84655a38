//! Global services that miss a task on some node, and what may help them.
//!
//! Like [`crate::pending`] for what is not made before it has a place: a service that found no room on a node waits for a
//! change of that node, one that waits for another service for that, and any other for any change.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{NodeId, ServiceId};

/// What a service lacks on a node.
pub(crate) enum Lack {
    /// Room on this node.
    Room(NodeId),
    /// Another service, which must come first.
    Dependency(ServiceId),
    /// Something else: addresses, a name.
    Other,
}

/// Services by what they lack. O(log n) for each word, O(log n) for each that it wakes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Starved {
    rooms: BTreeMap<NodeId, BTreeSet<ServiceId>>,
    dependencies: BTreeMap<ServiceId, BTreeSet<ServiceId>>,
    others: BTreeSet<ServiceId>,
}

impl Starved {
    pub(crate) fn insert(&mut self, service: ServiceId, lack: Lack) {
        let services = match lack {
            Lack::Room(node) => self.rooms.entry(node).or_default(),
            Lack::Dependency(other) => self.dependencies.entry(other).or_default(),
            Lack::Other => &mut self.others,
        };
        services.insert(service);
    }

    /// Who may get a task on this node now.
    pub(crate) fn node_changed(&mut self, node: &NodeId) -> BTreeSet<ServiceId> {
        self.rooms.remove(node).unwrap_or_default()
    }

    /// Who waited for this service.
    pub(crate) fn service_changed(&mut self, service: &ServiceId) -> BTreeSet<ServiceId> {
        self.dependencies.remove(service).unwrap_or_default()
    }

    /// Who waited for anything else.
    pub(crate) fn others(&mut self) -> BTreeSet<ServiceId> {
        std::mem::take(&mut self.others)
    }
}

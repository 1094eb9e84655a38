//! Ports of every host: which service has one, through which network hosts lead to it, and who must not take the same.
//!
//! A port is told with the service's virtual address in its first network that is not internal, to all members of that
//! network; every host is made one. A port has one owner in the cluster: no other service has it on every host, and no
//! service or container task on some host. That is refused when it is asked for, so that scheduling need not know.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{
    ApiError, EndpointMode, IngressPort, Network, NetworkId, PORTS_MAX, PortPublish, Protocol, Service, ServiceId,
    ServiceSpec, TaskSpec, TaskState, Vip,
};

use crate::{
    core::Core,
    model::{Change, Key, Kind, Model, Object},
};

/// `8080/tcp`.
fn words((protocol, port): (Protocol, u16)) -> String {
    format!("{port}/{}", if protocol == Protocol::Udp { "udp" } else { "tcp" })
}

/// The network through which the ports of a service lead to it; none while it has no virtual address in one.
pub(crate) fn network_of<'a>(model: &Model, service: &'a Service) -> Option<&'a NetworkId> {
    let open = |vip: &&Vip| model.networks.get(&vip.network).is_some_and(|network| !network.spec.internal);
    service.vips.iter().find(open).filter(|_| !service.spec.ingress.is_empty()).map(|vip| &vip.network)
}

/// The networks that every host is in for the sake of ports. O(services).
pub(crate) fn networks(model: &Model) -> BTreeSet<&NetworkId> {
    model.services.values().filter_map(|service| network_of(model, service)).collect()
}

/// Checks the ports of a specification by themselves; its networks are named by id.
pub(crate) fn check_spec(spec: &ServiceSpec, networks: &[Network]) -> Result<(), ApiError> {
    let ServiceSpec { name, ingress, .. } = spec;
    let bad = |message: String| ApiError::new("bad_request", message);
    if ingress.is_empty() {
        return Ok(());
    }
    if ingress.len() > PORTS_MAX {
        return Err(bad(format!("{name} publishes {} ports, at most {PORTS_MAX} are possible", ingress.len())));
    }
    if let Some(port) = ingress.iter().find(|port| port.published == 0 || port.target == 0) {
        let message =
            format!("{name} publishes port {} of every host for {}: 0 is no port", port.published, port.target);
        return Err(bad(message));
    }
    let mut seen = BTreeSet::new();
    let mut all = ingress.iter().map(|port| (port.protocol, port.published));
    if let Some(twice) = all.find(|port| !seen.insert(*port)) {
        return Err(bad(format!("{name} publishes port {} of every host twice", words(twice))));
    }
    if spec.endpoint_mode == EndpointMode::Dnsrr {
        let message = format!("{name} publishes ports of every host, which lead by a virtual address: it has none");
        return Err(bad(message).with_hint("leave endpoint_mode out, or publish with mode: host"));
    }
    let open = |network: &&Network| {
        !network.spec.internal && spec.task.networks.iter().any(|a| a.network == network.id.as_str())
    };
    if !networks.iter().any(|network| open(&network)) {
        let message = format!("{name} publishes ports of every host and is in no network that leads out");
        return Err(bad(message).with_hint("attach it to a network that is not internal, or publish with mode: host"));
    }
    Ok(())
}

impl Core {
    /// Refuses a port that would have two owners after these changes of services and with one container task more. What
    /// is so already is not refused. O(services), and O(tasks) where ports of every host are new.
    pub(crate) fn check_ports(&self, changes: &[Change], more: Option<(&str, &TaskSpec)>) -> Result<(), ApiError> {
        let mut after: BTreeMap<&ServiceId, &ServiceSpec> =
            self.model.services.values().map(|service| (&service.id, &service.spec)).collect();
        let gone = |change: &Change| match change {
            Change::Delete(Key { kind: Kind::Service, id }) => Some(ServiceId::new(id)),
            _ => None,
        };
        let gone: BTreeSet<ServiceId> = changes.iter().filter_map(gone).collect();
        after.retain(|id, _| !gone.contains(*id));
        let mut turned = BTreeSet::new();
        for change in changes {
            if let Change::Upsert(Object::Service(service)) = change {
                after.insert(&service.id, &service.spec);
                turned.insert(&service.id);
            }
        }
        let mut owners: BTreeMap<(Protocol, u16), (&ServiceId, &str)> = BTreeMap::new();
        for (id, spec) in &after {
            for IngressPort { protocol, published, .. } in &spec.ingress {
                let port = (*protocol, *published);
                let Some((other, other_name)) = owners.insert(port, (id, &spec.name)) else { continue };
                let (asker, owner) = match turned.contains(id) {
                    true => (spec.name.as_str(), other_name),
                    false => (other_name, spec.name.as_str()),
                };
                if turned.contains(id) || turned.contains(other) {
                    return Err(taken(port, asker, &everywhere(owner), owner));
                }
            }
        }
        if owners.is_empty() {
            return Ok(());
        }
        let on_a_host = |ports: &[PortPublish]| {
            let fixed = ports.iter().filter(|port| port.host_port != 0);
            fixed.map(|port| (port.protocol, port.host_port)).find_map(|port| Some((port, *owners.get(&port)?)))
        };
        if let Some((name, spec)) = more
            && let Some((port, (_, owner))) = on_a_host(&spec.ports)
        {
            return Err(taken(port, name, &everywhere(owner), owner));
        }
        for (id, spec) in &after {
            let Some((port, (owner, name))) = on_a_host(&spec.task.ports) else { continue };
            if turned.contains(id) {
                return Err(taken(port, &spec.name, &everywhere(name), name));
            }
            if turned.contains(owner) {
                let what = format!("it is published by service {} where its tasks are", spec.name);
                return Err(taken(port, name, &what, &spec.name));
            }
        }
        self.check_tasks_ports(&owners, &turned)
    }

    /// Refuses new ports of every host that some task has on its host: a container task, or one that was given it.
    fn check_tasks_ports(
        &self,
        owners: &BTreeMap<(Protocol, u16), (&ServiceId, &str)>,
        turned: &BTreeSet<&ServiceId>,
    ) -> Result<(), ApiError> {
        let is_new = |owner: &ServiceId, (protocol, published): (Protocol, u16)| {
            let same = |port: &IngressPort| (port.protocol, port.published) == (protocol, published);
            turned.contains(owner) && !self.model.services.get(owner).is_some_and(|s| s.spec.ingress.iter().any(same))
        };
        let new: BTreeMap<_, _> = owners.iter().filter(|(port, (owner, _))| is_new(owner, **port)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for task in self.model.tasks.values().filter(|t| t.desired_state != TaskState::Remove) {
            // What a service task has by its specification goes with it, or was looked at with its service.
            let fixed = task.spec.ports.iter().filter(|_| task.service.is_none());
            let ended = task.status.state.is_terminal();
            let given = task.status.ports.iter().filter(|_| !ended && task.spec.ports.iter().any(|p| p.host_port == 0));
            let held = fixed.chain(given).map(|port| (port.protocol, port.host_port));
            if let Some((port, (_, name))) = held.into_iter().find_map(|port| new.get_key_value(&port)) {
                let what = format!("it is published by task {}", task.name);
                return Err(taken(**port, name, &what, name).with_hint("skein ps --all"));
            }
        }
        Ok(())
    }
}

fn everywhere(owner: &str) -> String {
    format!("on every host it belongs to service {owner}")
}

fn taken(port: (Protocol, u16), who: &str, what: &str, owner: &str) -> ApiError {
    let message = format!("{who} cannot publish port {}: {what}", words(port));
    ApiError::new("port_taken", message).with_hint(format!("skein service inspect {owner}"))
}

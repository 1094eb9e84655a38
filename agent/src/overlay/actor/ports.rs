//! Ports of the host: what containers publish, what is kept for tasks, and ports of every host.
//!
//! Owns: which of them this host holds, and so which of them lead anywhere. Must not know: what netlib makes of them. No
//! tasks and channels of its own.

use std::collections::{BTreeMap, BTreeSet};

use netlib::{Ingress, Proto};
use skein_api::{NetworkAssignment, NetworkId, TaskId, address6};

use super::{Actor, PortBinding, chain, disk::Topic};
use crate::{
    overlay::{
        OverlayError,
        claims::HostPort,
        desired::{self, Lead},
    },
    plugin::wire::Request,
};

impl Actor {
    /// Makes the ports of a task concrete that were left open, and holds them until its container publishes them. The
    /// same task gets the same again.
    pub(super) fn choose_ports(
        &mut self,
        task: TaskId,
        ports: &[PortBinding],
        avoid: &BTreeSet<(Proto, u16)>,
    ) -> Result<Vec<PortBinding>, OverlayError> {
        let answers = |chosen: &[PortBinding]| {
            let same = |(c, p): (&PortBinding, &PortBinding)| {
                (c.proto, c.host_ip, c.port) == (p.proto, p.host_ip, p.port) && [0, c.host_port].contains(&p.host_port)
            };
            chosen.len() == ports.len() && chosen.iter().zip(ports).all(same)
        };
        if let Some(chosen) = self.chosen.get(&task).filter(|c| answers(c)) {
            return Ok(chosen.clone());
        }
        let open: Vec<PortBinding> = ports.iter().filter(|p| p.host_port == 0).cloned().collect();
        let mut taken = self.claims.claim_but(&open, avoid)?.into_iter();
        let fill = |p: &PortBinding| match p.host_port {
            0 => taken.next().expect("one for each that was left open"),
            _ => p.clone(),
        };
        let chosen: Vec<PortBinding> = ports.iter().map(fill).collect();
        if !open.is_empty() {
            self.chosen.insert(task, chosen.clone());
        }
        Ok(chosen)
    }

    /// Whether a port is kept for a task other than the endpoint's.
    fn check_chosen(&self, endpoint: &str, ports: &[PortBinding]) -> Result<(), String> {
        let own = self.plugin.endpoints().get(endpoint).and_then(|e| e.task.as_ref());
        for (task, chosen) in self.chosen.iter().filter(|(task, _)| Some(*task) != own) {
            let clash = |w: &&PortBinding| chosen.iter().any(|c| (c.proto, c.host_port) == (w.proto, w.host_port));
            if let Some(port) = ports.iter().find(clash) {
                return Err(format!("port {}/{} of this host is kept for task {task}", port.host_port, port.proto));
            }
        }
        Ok(())
    }

    /// Makes the ports of a Publish concrete and ours, before anything is decided.
    pub(super) fn claim_ports(&mut self, request: Request) -> Result<Request, String> {
        let Request::Publish { endpoint, ports } = request else {
            return Ok(request);
        };
        if !ports.is_empty() {
            if !self.applied {
                return Err("the agent is still starting".into());
            }
            self.plugin.check_ports(&endpoint, &ports).map_err(|e| e.to_string())?;
            self.check_chosen(&endpoint, &ports)?;
            self.check_everywhere(&ports)?;
        }
        let ports = self.claims.claim(&ports).map_err(|e| chain(&e))?;
        Ok(Request::Publish { endpoint, ports })
    }

    /// Whether a port belongs to a service on every host.
    fn check_everywhere(&self, ports: &[PortBinding]) -> Result<(), String> {
        let leads = desired::leads(&self.services, &self.known);
        match ports.iter().find_map(|port| Some((port, leads.get(&(port.proto, port.host_port))?))) {
            None => Ok(()),
            Some((port, lead)) => {
                Err(format!("port {}/{} of every host belongs to service {}", port.host_port, port.proto, lead.service))
            }
        }
    }

    /// Holds exactly the ports that endpoints publish, those that were chosen for tasks, and those of every host that
    /// are free here: what leads into networks by the latter follows. One that somebody else has is told and left out.
    pub(super) fn hold_ports(&mut self) {
        let mut keep: BTreeSet<HostPort> = BTreeSet::new();
        for (id, endpoint) in self.plugin.endpoints() {
            if let Err(error) = self.claims.claim(&endpoint.ports) {
                tracing::warn!(endpoint = id, error = chain(&error), "a published port is not ours any more");
            }
            keep.extend(endpoint.ports.iter().map(|p| (p.proto, p.host_ip, p.host_port)));
        }
        let chosen = self.chosen.values().flatten();
        keep.extend(chosen.map(|p| (p.proto, p.host_ip, p.host_port)));
        let mut leads = desired::leads(&self.services, &self.known);
        let mut troubles = Vec::new();
        let mut trouble = |(proto, port): (Proto, u16), lead: &Lead, why: String| {
            let service = &lead.service;
            troubles
                .push(format!("port {port}/{proto} of service {service} does not lead there from this host: {why}"));
        };
        leads.retain(|at, lead| {
            let container = keep.iter().any(|(proto, _, port)| (*proto, *port) == *at);
            if container {
                trouble(*at, lead, "a container has it".to_owned());
            }
            !container
        });
        keep.extend(leads.keys().map(|(proto, port)| (*proto, None, *port)));
        self.claims.retain(&keep);
        let own = |ours: &NetworkAssignment| {
            let addr4 =
                self.leases.host(&ours.id).filter(|addr| ours.blocks.iter().any(|block| block.contains(addr)))?;
            let addr6 = Some(address6(ours.subnet6, ours.subnet4, addr4));
            Some((ours.id.clone(), Ingress { addr4, addr6, ports: BTreeMap::new() }))
        };
        self.ingress = self.known.values().filter_map(own).collect();
        for (at, lead) in leads {
            let (proto, port) = at;
            let Some(ingress) = self.ingress.get_mut(&lead.network) else {
                let name = self.known.get(&lead.network).map_or(lead.network.as_str(), |ours| &ours.name);
                trouble(at, &lead, format!("it has no address left in network {name}"));
                continue;
            };
            let binding = PortBinding { proto, host_ip: None, host_port: port, host_port_end: port, port };
            match self.claims.claim(&[binding]) {
                Ok(_) => drop(ingress.ports.insert(at, lead.to)),
                Err(error) => trouble(at, &lead, chain(&error)),
            }
        }
        self.trouble(Topic::Ports, (!troubles.is_empty()).then(|| troubles.join("; ")));
    }

    /// Takes an address of this host in each network that ports of every host lead into. Answers what to remember.
    pub(super) fn reserve_own(&mut self) -> Vec<super::Change> {
        let leads = desired::leads(&self.services, &self.known);
        let networks: BTreeSet<NetworkId> = leads.into_values().map(|lead| lead.network).collect();
        let mut changes = Vec::new();
        for network in networks.iter().filter_map(|id| self.known.get(id)) {
            match self.leases.reserve_host(network) {
                Ok((_, change)) => changes.extend(change),
                // What follows from it is told where ports are held.
                Err(error) => tracing::debug!(error = chain(&error), "this host gets no address of its own"),
            }
        }
        changes
    }
}

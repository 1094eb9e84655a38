//! The way from one container to another, as the host of either end sees it, and a probe from the first.
//!
//! Owns: what is looked at, and in which order. Must not know: how a hop is judged (`agent_network::path`). No channels;
//! what blocks runs on the blocking pool.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use agent_network::path;
use netlib::{look::Look, names};
use skein_api::{Hop, NET_LIST_MAX, PathEnd, PathQuestion, PathSide, Protocol, TaskId};
use skein_daemon::chain;

use super::{
    probe::{self, Outcome},
    sockets,
};
use crate::{
    dns::zone::{Answer, Family},
    overlay::{
        OverlayHandle,
        picture::{NetworkPicture, Picture},
    },
    plugin::state::PluginEndpoint,
};

/// What of this host is looked at.
struct Here<'a> {
    picture: &'a Picture,
    netlib: &'a netlib::Overlay,
    network: &'a NetworkPicture,
    /// The network's fabric.
    fabric: Look,
    /// The container of this end.
    container: &'a PluginEndpoint,
}

impl<'a> Here<'a> {
    /// Finds the end's container and looks at its network; else the hop that is in the way.
    async fn look(picture: &'a Picture, question: &PathQuestion, end: &PathEnd) -> Result<Self, Hop> {
        let told = "the host has not been told yet: `skein net status` shows whether it follows the master";
        let network = picture
            .networks
            .iter()
            .find(|n| n.ours.id == question.network)
            .ok_or_else(|| Hop::broken("network", ("there", "none"), "the network is not on that host", told))?;
        let of_end = |c: &&PluginEndpoint| match &c.task {
            Some(task) => *task == end.task,
            None => IpAddr::V4(c.v4) == end.address,
        };
        let container = network.containers.iter().find(of_end).ok_or_else(|| {
            let (name, network) = (&end.name, &network.ours.name);
            let fault = format!("the engine has no running container of {name} in network {network}");
            let repair = format!("`skein ps` and `skein logs {name}` show what became of it");
            Hop::broken("container", (name.as_str(), "none"), fault, repair)
        })?;
        let nothing = |why: String| Hop::broken("network", ("there", "none"), why, told);
        let netlib = picture.netlib.as_ref().ok_or_else(|| nothing("nothing was made of the network yet".into()))?;
        let state = network.state.as_ref().map_err(|why| nothing(why.clone()))?;
        let mut looks = netlib.look_network(state).await.map_err(|error| nothing(chain(&error)))?;
        Ok(Self { picture, netlib, network, fabric: looks.swap_remove(0), container })
    }

    /// The container's own side of its link.
    async fn inside(&self, address: IpAddr, to: IpAddr) -> Vec<Hop> {
        let gateway = IpAddr::V4(self.network.ours.gateway4);
        let Some(sandbox) = &self.container.sandbox else { return Vec::new() };
        match self.netlib.observe_at(sandbox.into()).await {
            Ok(inside) => path::container(&inside, address, gateway, to),
            Err(error) => vec![Hop::unknown("container's address", address.to_string(), chain(&error))],
        }
    }

    /// The device counters of the VXLAN device.
    async fn counted(&self) -> netlib::look::Device {
        let scope = self.fabric.scope.clone();
        self.netlib.counted(&scope).await.unwrap_or_default().device(names::VXLAN_IFNAME)
    }

    /// The container of the other end, where that is on this host too.
    fn local(&self, end: &PathEnd) -> Option<netlib::Endpoint> {
        let of_end = |c: &&PluginEndpoint| IpAddr::V4(c.v4) == end.address;
        self.network.containers.iter().find(of_end).map(PluginEndpoint::to_netlib)
    }
}

/// The way out of the first end's container, tried at the end.
pub(super) async fn from(overlay: &OverlayHandle, question: &PathQuestion) -> Result<PathSide, String> {
    let picture = overlay.picture().await.map_err(|e| e.to_string())?;
    let (from, to) = (&question.from, &question.to);
    let here = match Here::look(&picture, question, from).await {
        Ok(here) => here,
        Err(hop) => return Ok(PathSide { hops: vec![hop], ..PathSide::default() }),
    };
    let mut hops = Vec::new();
    if let Some(name) = &question.lookup {
        let found = match picture.zone.name(&question.network, from.address, name, Family::V4) {
            Answer::Known(addresses) => addresses,
            Answer::Forward | Answer::Unknown => Vec::new(),
        };
        hops.push(path::name(name, &found, question.vip.unwrap_or(to.address)));
    }
    if let Some(vip) = question.vip {
        let healthy =
            here.network.endpoints.iter().any(|e| e.v4.map(IpAddr::V4) == Some(to.address) && e.healthy && !e.draining);
        hops.push(path::virtual_address(&here.fabric, vip, to.address, healthy));
    }
    hops.extend(here.inside(from.address, question.vip.unwrap_or(to.address)).await);
    let local = here.local(to);
    let endpoint = here.container.to_netlib();
    hops.extend(path::outgoing(&here.fabric, &endpoint, from.address, to.address, local.as_ref()));
    if let Some(vtep) = path::vtep_of(&here.fabric.want, to.address) {
        hops.push(underlay(vtep, picture.vxlan_port).await);
    }
    let probe = attempt(&here, question).await;
    Ok(PathSide { hops, probe, vxlan_packets: here.counted().await.tx_packets, suspects: Vec::new() })
}

/// The way in to the second end's container, as far as the socket, and the answers' way back.
pub(super) async fn to(overlay: &OverlayHandle, question: &PathQuestion) -> Result<PathSide, String> {
    let picture = overlay.picture().await.map_err(|e| e.to_string())?;
    let (from, to) = (&question.from, &question.to);
    let here = match Here::look(&picture, question, to).await {
        Ok(here) => here,
        Err(hop) => return Ok(PathSide { hops: vec![hop], ..PathSide::default() }),
    };
    let mut hops = Vec::new();
    if from.node != to.node {
        hops.extend(guard(&here, from).await);
        hops.extend(path::incoming(&here.fabric, &here.container.to_netlib(), to.address, from.address));
    }
    hops.extend(here.inside(to.address, from.address).await);
    if let Some(port) = question.port {
        hops.push(socket(&here, question.proto, to.address, port).await);
    }
    let suspects = here.netlib.foreign_drops(&here.fabric.scope).await.unwrap_or_default();
    let suspects = suspects.into_iter().take(NET_LIST_MAX).collect();
    Ok(PathSide { hops, probe: None, vxlan_packets: here.counted().await.rx_packets, suspects })
}

/// Whether this host lets the other one's VXLAN in.
async fn guard(here: &Here<'_>, from: &PathEnd) -> Option<Hop> {
    let vtep = here.picture.vtep?;
    let peer = here.network.peers.iter().find(|peer| peer.node == from.node);
    let address = peer.and_then(|peer| match vtep {
        IpAddr::V4(_) => peer.underlay4.map(IpAddr::V4),
        IpAddr::V6(_) => peer.underlay6.map(IpAddr::V6),
    });
    let Some(address) = address else {
        let fault = format!("it does not know {} as a host of the network", from.node_name);
        let repair = "`skein net status` shows whether it follows the master";
        return Some(Hop::broken("vxlan guard", (from.node_name.as_str(), "unknown"), fault, repair));
    };
    let wanted = here.picture.host.as_ref()?;
    match here.netlib.look_host(wanted).await {
        Ok(look) => Some(path::guard(&look, address)),
        Err(error) => Some(Hop::unknown("vxlan guard", format!("lets VXLAN of {address} in"), chain(&error))),
    }
}

/// Who listens in the container.
async fn socket(here: &Here<'_>, proto: Protocol, address: IpAddr, port: u16) -> Hop {
    let word = proto_word(proto);
    let sandbox = here.container.sandbox.clone().unwrap_or_default();
    match here.netlib.run_at(sandbox.into(), "read sockets", sockets::waiting).await {
        Ok(waiting) => {
            let of_proto = waiting.into_iter().filter(|w| w.proto == proto).map(|w| w.address);
            path::socket(&of_proto.collect::<Vec<SocketAddr>>(), word, address, port)
        }
        Err(error) => Hop::unknown("socket", format!("somebody listens on port {port}/{word}"), chain(&error)),
    }
}

fn proto_word(proto: Protocol) -> &'static str {
    match proto {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// Runs blocking work in the host's own namespace, where every thread of the agent is.
async fn in_host<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// The underlay: a route to another host's address, and an answer to an echo request. No answer is no proof: hosts may
/// filter those.
async fn underlay(vtep: IpAddr, port: u16) -> Hop {
    let route = move || {
        let any: IpAddr = if vtep.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
        // Sends nothing: connecting only asks the routes.
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.connect((vtep, port))?;
        Ok((socket.local_addr()?.ip(), probe::echo(vtep)))
    };
    let (source, echo) = match in_host(route).await {
        Ok(found) => found,
        Err(error) => {
            let fault = format!("the host has no way to {vtep}, where the other host is: {error}");
            let repair = "put the host's route to the other hosts right";
            return Hop::broken("underlay", (format!("a route to {vtep}"), "none"), fault, repair);
        }
    };
    let (wanted, found) = (format!("{vtep} answers"), format!("leaves from {source}"));
    match echo {
        Outcome::Answered(took) => {
            Hop::fine("underlay", wanted, format!("{found}, answered after {} us", took.as_micros()))
        }
        Outcome::Unreachable(why) => Hop::broken(
            "underlay",
            (wanted, why.clone()),
            format!("{vtep}, where the other host is, cannot be reached on the underlay: {why}"),
            format!("look at cable, switch and routes between the hosts: ping {vtep}"),
        ),
        Outcome::Refused | Outcome::Silent => {
            let repair = format!("look at cable, switch, routes and firewalls between the hosts: ping {vtep}");
            let fault = format!("{vtep}, where the other host is, does not answer on the underlay");
            Hop { fault, repair, ..Hop::unknown("underlay", wanted, format!("{found}, no answer to an echo request")) }
        }
    }
}

/// From a container to an address outside of the overlay: the probe; from the host: the underlay before it.
pub(super) async fn reach(
    overlay: &OverlayHandle,
    task: Option<&TaskId>,
    to: IpAddr,
    port: Option<u16>,
    proto: Protocol,
) -> Result<Vec<Hop>, String> {
    let Some(task) = task else {
        let mut hops = vec![underlay(to, overlay.picture().await.map_err(|e| e.to_string())?.vxlan_port).await];
        let tried = in_host(move || Ok(probe::probe(to, port, proto))).await;
        hops.push(attempted(to, port, proto, tried.map_err(|e| e.to_string())));
        return Ok(hops);
    };
    let picture = overlay.picture().await.map_err(|e| e.to_string())?;
    let mut containers = picture.networks.iter().flat_map(|n| &n.containers);
    let sandbox = containers.find(|c| c.task.as_ref() == Some(task)).and_then(|c| c.sandbox.clone());
    let (Some(sandbox), Some(netlib)) = (sandbox, &picture.netlib) else {
        let why = "the container is in no overlay network: its own network is the engine's business";
        return Ok(vec![Hop::unknown("probe", wanted(to, port, proto), why)]);
    };
    let tried = netlib.run_at(sandbox.into(), "probe", move || Ok(probe::probe(to, port, proto))).await;
    Ok(vec![attempted(to, port, proto, tried.map_err(|e| chain(&e)))])
}

/// Tries it, from the container's own namespace.
async fn attempt(here: &Here<'_>, question: &PathQuestion) -> Option<Hop> {
    let sandbox = here.container.sandbox.clone()?;
    let (to, port, proto) = (question.vip.unwrap_or(question.to.address), question.port, question.proto);
    let tried = here.netlib.run_at(sandbox.into(), "probe", move || Ok(probe::probe(to, port, proto))).await;
    Some(attempted(to, port, proto, tried.map_err(|e| chain(&e))))
}

fn wanted(to: IpAddr, port: Option<u16>, proto: Protocol) -> String {
    match port {
        Some(port) => format!("{to} port {port}/{} answers", proto_word(proto)),
        None => format!("{to} answers an echo request"),
    }
}

fn attempted(to: IpAddr, port: Option<u16>, proto: Protocol, tried: Result<Outcome, String>) -> Hop {
    let wanted = wanted(to, port, proto);
    match tried {
        Err(error) => Hop::unknown("probe", wanted, error),
        Ok(outcome) => judged(&wanted, &outcome, proto == Protocol::Udp && port.is_some()),
    }
}

fn judged(wanted: &str, outcome: &Outcome, udp: bool) -> Hop {
    match outcome {
        Outcome::Answered(took) => Hop::fine("probe", wanted, format!("answered after {} us", took.as_micros())),
        Outcome::Silent if udp => {
            Hop::unknown("probe", wanted, "not refused; nothing was answered, which UDP need not")
        }
        Outcome::Silent => {
            Hop::broken("probe", (wanted, "no answer"), "nothing was answered", "see the hops before this one")
        }
        Outcome::Refused => {
            let repair = "`skein logs` shows whether the program has started";
            Hop::broken("probe", (wanted, "refused"), "the connection was refused: nobody listens there", repair)
        }
        Outcome::Unreachable(why) => {
            let fault = format!("it was answered that nothing gets there: {why}");
            Hop::broken("probe", (wanted, why.as_str()), fault, "see the hops before this one")
        }
    }
}

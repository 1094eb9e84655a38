//! The lab of the benchmark: two hosts with engines in a Swarm and in a cluster of ours at the same time, and a pair of
//! containers for each way from one to the other.
//!
//! | way | what is in it |
//! |---|---|
//! | underlay | the hosts themselves |
//! | VXLAN device | a VXLAN device whose only peer is the other host, straight in a container: the least that any VXLAN overlay does |
//! | Swarm | an attachable overlay of the engines' own Swarm mode |
//! | Skein | an attachable network of ours, without services, with the fast path |
//! | Skein, routed | the same network with the fast path switched off at both hosts |
//!
//! Three UDP ports keep the three kinds of VXLAN apart. No tasks, no channels.

use std::{fs, net::IpAddr};

use anyhow::{Context as _, Result, ensure};

use super::load::Path;
use crate::{
    cluster::{Cluster, NodeOptions, PATIENCE},
    lab::{Host, Lab, LabSpec, probe::Place, run, wait_for},
};

/// Name of our network.
pub(super) const NETWORK: &str = "bench";
/// Our VXLAN device in a fabric.
const TUNNEL: &str = "skvx";
/// Name of Swarm's network.
pub(super) const SWARM: &str = "bench-swarm";
/// Swarm's VXLAN port; ours is the usual one.
const SWARM_PORT: &str = "4790";
/// VXLAN port of the bare device.
const BARE_PORT: &str = "4791";
/// Bytes that VXLAN over IPv4 takes of the underlay's MTU of 1,500.
const MTU: &str = "1450";
/// What containers do that are only there to have a network.
const SLEEP: [&str; 3] = ["busybox", "sleep", "86400"];

/// A lab with both clusters.
#[derive(Debug)]
pub(super) struct Rig {
    pub(super) lab: Lab,
}

impl Rig {
    /// Makes it.
    ///
    /// # Errors
    /// The first failure; the lab is gone then.
    pub(super) fn up() -> Result<Self> {
        let lab = Lab::up(LabSpec::new(format!("overlay{}", std::process::id()), 2))?;
        lab.image("busybox")?;
        let rig = Self { lab };
        let fast = |host: &str| NodeOptions { fast_path: Some(true), ..NodeOptions::label("host", host) };
        let cluster = Cluster::up(&rig.lab, fast)?;
        cluster.skein(&["network", "create", "--attachable", NETWORK])?;
        rig.swarm()?;
        for host in rig.hosts() {
            wait_for("the network on each engine", PATIENCE, || {
                let names = host.docker(&["network", "ls", "--format", "{{.Name}}"])?;
                Ok(names.lines().any(|name| name == NETWORK).then_some(()))
            })
            .with_context(|| rig.lab.logs(20))?;
        }
        Ok(rig)
    }

    /// The client's host and the server's.
    pub(super) fn hosts(&self) -> [&Host; 2] {
        [self.lab.host("h1"), self.lab.host("h2")]
    }

    /// The cluster of ours.
    pub(super) fn cluster(&self) -> Cluster<'_> {
        Cluster::of(&self.lab)
    }

    /// Starts the agents anew with the fast path on or off, and waits until the kernel follows. Containers and their
    /// connections stay.
    ///
    /// # Errors
    /// An agent does not come back.
    pub(super) fn fast_path(&self, on: bool) -> Result<()> {
        // What the agent says of its first change of the kinds that it makes then.
        let said = if on { format!("to {TUNNEL}") } else { "remove the fast path".to_owned() };
        let count = |log: &str| log.lines().filter(|line| line.contains(&said)).count();
        for host in self.hosts() {
            let agent = self.cluster().process(host.name(), "skein-agent")?;
            let before = count(&agent.log()?);
            let path = host.dir().join("agent.toml");
            let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
            // Keys of the file stand before its tables.
            let rest = text.lines().filter(|line| !line.starts_with("fast_path")).collect::<Vec<_>>().join("\n");
            fs::write(&path, format!("fast_path = {on}\n{rest}\n"))?;
            agent.kill()?;
            let agent = self.cluster().start_agent(host.name())?;
            wait_for("the agent to change the fast path", PATIENCE, || {
                Ok((count(&agent.log()?) > before).then_some(()))
            })
            .with_context(|| agent.log_tail())?;
        }
        Ok(())
    }

    fn swarm(&self) -> Result<()> {
        let [first, second] = self.hosts();
        let address = first.ipv4().to_string();
        first.docker(&["swarm", "init", "--advertise-addr", &address, "--data-path-port", SWARM_PORT])?;
        let token = first.docker(&["swarm", "join-token", "-q", "worker"])?;
        let own = second.ipv4().to_string();
        second.docker(&["swarm", "join", "--advertise-addr", &own, "--token", &token, &format!("{address}:2377")])?;
        first.docker(&["network", "create", "--driver", "overlay", "--attachable", SWARM])?;
        Ok(())
    }

    /// All ways from the first host to the second.
    ///
    /// # Errors
    /// A container does not start.
    pub(super) fn paths(&self) -> Result<Vec<Path>> {
        let [first, second] = self.hosts();
        let underlay = Path::try_new("underlay", Place::host(first), Place::host(second), second.ipv4().into())?;
        let bare = self.bare()?;
        let mut paths = vec![underlay, bare];
        for (name, network) in [("Swarm", SWARM), ("Skein", NETWORK)] {
            let client = start(first, "client", network)?;
            let server = start(second, "server", network)?;
            let to = address_in(second, &server, network)?;
            paths.push(Path::try_new(name, Place::container(first, &client)?, Place::container(second, &server)?, to)?);
        }
        Ok(paths)
    }

    /// A VXLAN device in a container of each host, made in the host's network and moved.
    fn bare(&self) -> Result<Path> {
        let [first, second] = self.hosts();
        let mut places = Vec::new();
        for (host, other, address) in [(first, second, "10.99.0.1/24"), (second, first, "10.99.0.2/24")] {
            let name = start(host, "bare", "none")?;
            let pid = host.docker(&["inspect", "-f", "{{.State.Pid}}", &name])?;
            let (local, remote) = (host.ipv4().to_string(), other.ipv4().to_string());
            let make = ["ip", "link", "add", "bare0", "mtu", MTU, "type", "vxlan", "id", "77", "dstport", BARE_PORT];
            host.run(&[&make[..], &["local", &local, "remote", &remote, "nolearning"]].concat())?;
            host.run(&["ip", "link", "set", "bare0", "netns", &pid])?;
            let place = Place::container(host, &name)?;
            for args in [&["addr", "add", address, "dev", "bare0"][..], &["link", "set", "bare0", "up"]] {
                run(place.command("ip").args(args))?;
            }
            places.push(place);
        }
        let [client, server] = <[Place; 2]>::try_from(places).expect("one for each host");
        Path::try_new("VXLAN device", client, server, [10, 99, 0, 2].into())
    }
}

/// Starts a container that sleeps, and answers its name.
fn start(host: &Host, what: &str, network: &str) -> Result<String> {
    let name = format!("{network}-{what}");
    host.docker(&[&["run", "-d", "--name", &name, "--network", network][..], &SLEEP].concat())?;
    Ok(name)
}

fn address_in(host: &Host, container: &str, network: &str) -> Result<IpAddr> {
    let format = format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}");
    let text = host.docker(&["inspect", "-f", &format, container])?;
    ensure!(!text.is_empty(), "container {container} has no address in {network}");
    text.parse().with_context(|| format!("{text:?} is no address"))
}

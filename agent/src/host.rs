//! What this host is, for the cluster: the engine's word, the configuration, the underlay. Looked at again every
//! [`LOOK`] and sent to the master when it changed.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use skein_api::NodeDescription;
use skein_daemon::chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{config::Config, engine::Engine};

/// How often the host is looked at: labels of an engine and routes change rarely, and a minute later is soon enough.
const LOOK: Duration = Duration::from_secs(30);

/// Underlay addresses of this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Underlay {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6, never link-local.
    pub v6: Option<Ipv6Addr>,
}

/// The address from which this host would reach `target`. Sends nothing: connecting a UDP socket only asks the routes.
fn source_towards(target: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

/// The underlay addresses: those that are configured, else the one that leads to a master, with the other family's
/// address of the same interface.
///
/// # Errors
/// When neither is found.
pub fn underlay(config: &Config, masters: &[String]) -> io::Result<Underlay> {
    let (v4, v6) = config.underlay();
    if v4.is_some() || v6.is_some() {
        return Ok(Underlay { v4, v6 });
    }
    let targets = masters.iter().filter_map(|m| m.to_socket_addrs().ok()).flatten();
    let sources = targets.filter_map(|t| source_towards(t).ok()).filter(|a| !a.is_loopback());
    let Some(source) = sources.into_iter().next() else {
        return Err(io::Error::other("no address of this host leads to a master; set `underlay` in the configuration"));
    };
    let mut found = Underlay::default();
    let interfaces: Vec<_> = nix::ifaddrs::getifaddrs()?.collect();
    let address = |i: &nix::ifaddrs::InterfaceAddress| {
        let storage = i.address.as_ref()?;
        let v4 = storage.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    let device = interfaces.iter().find(|i| address(i) == Some(source)).map(|i| i.interface_name.clone());
    for interface in interfaces.iter().filter(|i| Some(&i.interface_name) == device.as_ref()) {
        match address(interface) {
            Some(IpAddr::V4(a)) if found.v4.is_none() => found.v4 = Some(a),
            Some(IpAddr::V6(a)) if found.v6.is_none() && !a.is_unicast_link_local() => found.v6 = Some(a),
            _ => {}
        }
    }
    match source {
        IpAddr::V4(a) => found.v4 = Some(a),
        IpAddr::V6(a) => found.v6 = Some(a),
    }
    Ok(found)
}

/// What looks at the host.
#[derive(Clone)]
pub struct Host {
    /// Configuration.
    pub config: Config,
    /// Name that it joins under, or joined under.
    pub name: String,
    /// The engine.
    pub engine: Engine,
    /// Addresses for the overlay.
    pub underlay: Underlay,
    /// Knows routes and MTU.
    pub kernel: Arc<netlib::linux::LinuxKernel>,
}

impl Host {
    /// Looks once.
    ///
    /// # Errors
    /// The engine or the kernel does not answer.
    pub async fn describe(&self) -> anyhow::Result<NodeDescription> {
        let engine = self.engine.describe().await?;
        let address = self.underlay.v4.map(IpAddr::V4).or(self.underlay.v6.map(IpAddr::V6));
        let kernel = self.kernel.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let mtu = address.map(|a| kernel.underlay_mtu(None, a)).transpose()?;
            Ok::<_, netlib::Error>((kernel.host_routes()?, mtu.unwrap_or(0)))
        });
        let (routes, underlay_mtu) = looked.await??;
        // A host route is one address, the master compares prefixes; both count.
        let mut routes: Vec<_> = routes.into_iter().map(|r| r.dst).collect();
        routes.sort();
        routes.dedup();
        Ok(NodeDescription {
            hostname: self.name.clone(),
            site: self.config.site.clone(),
            labels: self.config.labels.clone(),
            offered: self.config.offered(engine.capacity),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            underlay4: self.underlay.v4,
            underlay6: self.underlay.v6,
            vxlan_port: self.config.vxlan_port,
            underlay_mtu,
            routes,
            ..engine
        })
    }

    /// Looks again and again, and tells when something changed.
    pub async fn follow(self, description: watch::Sender<NodeDescription>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            match self.describe().await {
                Ok(new) => {
                    description.send_if_modified(|old| {
                        let changed = *old != new;
                        *old = new;
                        changed
                    });
                }
                Err(error) => tracing::warn!(error = chain(error.as_ref()), "host cannot be described, old word stays"),
            }
        }
    }
}

/// The files of a memory cgroup's limit: of version 1 and 2, whichever is mounted.
fn limit_files(parent: &str) -> [PathBuf; 2] {
    let parent = parent.trim_start_matches('/');
    [
        Path::new("/sys/fs/cgroup/memory").join(parent).join("memory.limit_in_bytes"),
        Path::new("/sys/fs/cgroup").join(parent).join("memory.max"),
    ]
}

/// Limits the parent cgroup of all containers to what the host offers. Idempotent.
///
/// # Errors
/// When there is no memory controller, or it refuses.
pub fn limit_cgroup(parent: &str, mem_bytes: u64) -> io::Result<()> {
    for file in limit_files(parent) {
        let Some(dir) = file.parent() else { continue };
        // The controller's root has the file's siblings; where it is not mounted there is nothing to make.
        if !dir.ancestors().skip(1).any(|d| d.join("cgroup.procs").exists()) {
            continue;
        }
        std::fs::create_dir_all(dir)?;
        if file.exists() {
            return std::fs::write(&file, mem_bytes.to_string());
        }
    }
    Err(io::Error::other(format!("no memory controller for cgroup {parent}")))
}

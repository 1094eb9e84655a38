//! What this host is, for the cluster: the engine's word, the configuration, the underlay, and what does not work.
//! Looked at again every `LOOK`, troubles at once, and sent to the master when it changed.
//!
//! [`cgroup`]: limits to what is offered. `troubles`: what does not work.
//!
//! Tasks: [`Host::follow`] is one. Channels: a `watch` with the description; it reads those of [`Sources`].

pub mod cgroup;
mod troubles;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use skein_api::NodeDescription;
use skein_daemon::chain;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

pub use self::troubles::Sources;
use crate::{config::Config, engine::Engine};

/// How often the host is looked at: labels of an engine and routes change rarely, and a minute later is soon enough.
const LOOK: Duration = Duration::from_secs(30);

/// Most routes that are told: the master takes no more.
const ROUTES_MAX: usize = 4_096;

/// From a change of the host's links, addresses or routes to the look at its underlay.
const SETTLE: Duration = Duration::from_millis(100);

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

/// Routes in as few prefixes as say the same, the largest first when there are too many: a router of the internet has a
/// million, and an overlay's subnet meets the large ones.
fn most_of(routes: Vec<IpNet>) -> Vec<IpNet> {
    let mut routes = IpNet::aggregate(&routes);
    routes.sort_by_key(|route| (route.prefix_len(), *route));
    routes.truncate(ROUTES_MAX);
    routes.sort();
    routes
}

/// The host's resolvers that are not on itself. A file that cannot be read names none.
fn resolvers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let all = crate::dns::upstream::parse_resolv_conf(&text).into_iter().map(|address| address.ip());
    all.filter(|ip| !ip.is_loopback()).collect()
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
    /// Masters that it may dial.
    pub masters: Vec<String>,
    /// Addresses for the overlay: looked at again when the host's links, addresses or routes change.
    pub underlay: Arc<watch::Sender<Underlay>>,
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
        let underlay = *self.underlay.borrow();
        let address = underlay.v4.map(IpAddr::V4).or(underlay.v6.map(IpAddr::V6));
        let kernel = self.kernel.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let mtu = address.map(|a| kernel.underlay_mtu(None, a)).transpose()?;
            Ok::<_, netlib::Error>((kernel.host_routes()?, mtu.unwrap_or(0)))
        });
        let (routes, underlay_mtu) = looked.await??;
        Ok(NodeDescription {
            hostname: self.name.clone(),
            site: self.config.site.clone(),
            labels: self.config.labels.clone(),
            offered: self.config.offered(engine.capacity),
            overcommit: self.config.overcommit,
            generic: self.config.generic.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            underlay4: underlay.v4,
            underlay6: underlay.v6,
            vxlan_port: self.config.vxlan_port,
            underlay_mtu,
            routes: most_of(routes.into_iter().map(|r| r.dst).collect()),
            resolvers: resolvers(),
            freezes: true,
            ..engine
        })
    }

    /// Looks at the underlay alone, without the engine: peers wait for this. One that is gone for a moment stays as it
    /// was.
    async fn look_at_underlay(&self, description: &watch::Sender<NodeDescription>) {
        let (host, before) = (self.clone(), *self.underlay.borrow());
        let looked = tokio::task::spawn_blocking(move || {
            let now = underlay(&host.config, &host.masters).ok()?;
            let address = now.v4.map(IpAddr::V4).or(now.v6.map(IpAddr::V6))?;
            Some((now, host.kernel.underlay_mtu(None, address).ok()?))
        });
        let Ok(Some((now, underlay_mtu))) = looked.await else { return };
        // The master first: its answer is what others follow.
        let old = description.borrow().clone();
        tell(description, NodeDescription { underlay4: now.v4, underlay6: now.v6, underlay_mtu, ..old });
        if now != before {
            self.underlay.send_replace(now);
        }
    }

    /// Looks again and again, and tells when something changed: troubles at once, the rest within `LOOK`.
    pub async fn follow(
        self,
        mut sources: Sources,
        description: watch::Sender<NodeDescription>,
        shutdown: CancellationToken,
    ) {
        let (mut next, mut ready, mut failed) = (Instant::now() + LOOK, true, None);
        let mut changes = sources.host_changes();
        loop {
            if changes != sources.host_changes() || Instant::now() >= next {
                // Changes come in bursts: an address goes before the next one comes.
                tokio::time::sleep(SETTLE).await;
                changes = sources.host_changes();
                self.look_at_underlay(&description).await;
            }
            let came_back = sources.engine_is_ready() && !ready;
            ready = sources.engine_is_ready();
            if came_back || Instant::now() >= next {
                next = Instant::now() + LOOK;
                // Cancel-safe: looking changes nothing.
                let looked = tokio::select! {
                    () = shutdown.cancelled() => return,
                    looked = timeout(LOOK, self.describe()) => looked,
                };
                let error = match looked {
                    Ok(Ok(new)) => {
                        tell(&description, sources.complete(new, None));
                        None
                    }
                    Ok(Err(error)) => Some(chain(error.as_ref())),
                    Err(_) => Some(format!("no answer within {} s", LOOK.as_secs())),
                };
                if let Some(error) = &error {
                    tracing::warn!(error, "host cannot be described, old word stays");
                }
                failed = error.map(|e| format!("this host cannot be described, its figures may be old: {e}"));
            }
            let old = description.borrow().clone();
            tell(&description, sources.complete(old, failed.clone()));
            // Cancel-safe: a token, watches and a timer.
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sources.changed() => {}
                () = sleep_until(next) => {}
            }
        }
    }
}

fn tell(description: &watch::Sender<NodeDescription>, new: NodeDescription) {
    description.send_if_modified(|old| {
        let changed = *old != new;
        *old = new;
        changed
    });
}

#[cfg(test)]
mod tests {
    use skein_api::AttachedContainer;

    use super::*;
    use crate::{
        engine::{EngineConfig, EngineState},
        executor::ExecutorStatus,
        ledger::LedgerState,
    };

    /// Well below `LOOK`, and far more than a message takes.
    const AT_ONCE: Duration = Duration::from_secs(10);

    #[test]
    fn routes_are_few_and_say_the_same() {
        let routes = |list: &[&str]| list.iter().map(|r| r.parse().unwrap()).collect::<Vec<IpNet>>();
        let given = routes(&["10.1.0.0/24", "10.0.0.0/16", "10.1.1.0/24", "10.0.9.1/32", "10.0.0.0/16", "fd00::/64"]);
        assert_eq!(most_of(given), routes(&["10.0.0.0/16", "10.1.0.0/23", "fd00::/64"]));
        // Two apart, so that no two are one: too many of them, and one that is larger.
        let host = |n: u32| IpNet::from(IpAddr::V4(Ipv4Addr::from(0x0b00_0000 + 2 * n)));
        let mut many: Vec<IpNet> = (0..5_000).map(host).collect();
        many.push("172.16.0.0/12".parse().unwrap());
        let most = most_of(many);
        assert_eq!((most.len(), most.last().map(IpNet::prefix_len)), (ROUTES_MAX, Some(12)));
    }

    #[tokio::test]
    async fn troubles_are_told_at_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let engine = Engine::new(EngineConfig::new(dir.path().join("none.sock"), "c1", "n1"));
        let (ledger_tx, ledger) = watch::channel(LedgerState::Durable);
        let (engine_tx, engine_rx) = watch::channel(EngineState::Ready);
        let (overlay_tx, overlay) = watch::channel(Vec::new());
        let (_executor_tx, executor) = watch::channel(ExecutorStatus::default());
        let (attached_tx, attached) = watch::channel(Vec::new());
        let (_addresses_tx, addresses) = watch::channel(Default::default());
        let (_host_tx, host) = watch::channel(0);
        let standing = vec!["standing".into()];
        let sources = Sources { standing, ledger, engine: engine_rx, overlay, addresses, host, executor, attached };
        let host = Host {
            config: Config::default(),
            name: "h1".into(),
            engine,
            masters: Vec::new(),
            underlay: Arc::new(watch::Sender::new(Underlay::default())),
            kernel: Arc::new(netlib::linux::LinuxKernel::try_new(dir.path()).expect("netlink")),
        };
        let (description_tx, mut description) = watch::channel(NodeDescription::default());
        let shutdown = CancellationToken::new();
        let follow = tokio::spawn(host.follow(sources, description_tx, shutdown.clone()));
        let mut wait = async |what: &str, expected: usize| {
            let told = description.wait_for(|d| {
                d.troubles.len() == expected && (what.is_empty() || d.troubles.iter().any(|t| t.contains(what)))
            });
            timeout(AT_ONCE, told).await.expect(what).expect("it runs").troubles.clone()
        };
        wait("standing", 1).await;
        ledger_tx.send_replace(LedgerState::Failing { error: "disk full".into() });
        wait("goes on from memory: disk full", 2).await;
        engine_tx.send_replace(EngineState::Unreachable { error: "refused".into() });
        wait("engine does not answer: refused", 3).await;
        overlay_tx.send_replace(vec!["network shop".into()]);
        assert_eq!(wait("overlay: network shop", 4).await[0], "standing");
        overlay_tx.send_replace(Vec::new());
        ledger_tx.send_replace(LedgerState::Durable);
        wait("engine does not answer", 2).await;
        overlay_tx.send_replace((0..40).map(|n| format!("{n}")).collect());
        assert_eq!(wait("and 27 more", 16).await.len(), 16);
        attached_tx.send_replace(vec![AttachedContainer::default()]);
        let told = description.wait_for(|d| d.attached.len() == 1);
        timeout(AT_ONCE, told).await.expect("at once").expect("it runs");
        shutdown.cancel();
        timeout(AT_ONCE, follow).await.expect("it ends").expect("without a panic");
    }
}

//! Owns the hosts, wires and containers of the kernel tests: nameless network namespaces that end with their last file
//! descriptor, so that nothing is left over, whatever happens to a test.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Command,
    thread,
    time::Duration,
};

use netlib::{Endpoint, EndpointId, HostConfig, HostIndex, NetworkState, Overlay, Peer, Proto, PublishedPort};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};
use serde_json::Value;

/// How long a connection that must work may take, on a machine with other work to do.
const CONNECT: Duration = Duration::from_secs(5);
/// How long one that must not work is waited for.
const REFUSE: Duration = Duration::from_millis(700);

/// Whether tests that need root are left out (`SKEIN_TEST_FAST`). Otherwise a missing privilege is a loud failure.
pub(crate) fn left_out() -> bool {
    if std::env::var_os("SKEIN_TEST_FAST").is_some() {
        return true;
    }
    assert!(nix::unistd::geteuid().is_root(), "kernel tests need root; SKEIN_TEST_FAST=1 leaves them out");
    false
}

/// A network namespace that lives as long as this.
pub(crate) struct Ns(File);

impl Ns {
    pub(crate) fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
            File::open("/proc/thread-self/ns/net").expect("own namespace")
        });
        let ns = Self(made.join().expect("namespace thread"));
        ns.sh("ip link set lo up");
        ns
    }

    pub(crate) fn of(file: File) -> Self {
        Self(file)
    }

    pub(crate) fn fd(&self) -> OwnedFd {
        self.0.as_fd().try_clone_to_owned().expect("dup")
    }

    /// A path for `ip link … netns PATH`, good while this is.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let body = || {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
                work()
            };
            scope.spawn(body).join().expect("thread in namespace")
        })
    }

    /// Runs a shell command inside; answers its output, or its errors.
    pub(crate) fn try_sh(&self, command: &str) -> Result<String, String> {
        let output = self.run(|| Command::new("sh").args(["-ec", command]).output().expect("sh"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    pub(crate) fn sh(&self, command: &str) -> String {
        self.try_sh(command).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    pub(crate) fn json(&self, command: &str) -> Value {
        let text = self.sh(command);
        let text = if text.trim().is_empty() { "[]" } else { &text };
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{command}: {error}: {text}"))
    }

    /// Connects from here to `addr`, where `listener` accepts. Answers the client's address as the listener sees it.
    pub(crate) fn connect(&self, addr: SocketAddr, listener: &TcpListener) -> io::Result<IpAddr> {
        self.connect_within(addr, listener, CONNECT)
    }

    /// Whether a connection is impossible.
    pub(crate) fn cut_off(&self, addr: SocketAddr, listener: &TcpListener) -> bool {
        self.connect_within(addr, listener, REFUSE).is_err()
    }

    fn connect_within(&self, addr: SocketAddr, listener: &TcpListener, limit: Duration) -> io::Result<IpAddr> {
        let client = self.run(|| TcpStream::connect_timeout(&addr, limit))?;
        let wait = TimeVal::new(5, 0);
        setsockopt(listener, sockopt::ReceiveTimeout, &wait).expect("timeout");
        let mine = client.local_addr()?;
        let (_server, seen) = listener.accept()?;
        // Without translation the port is the same too; with it, this still is our connection, the only one.
        assert!(seen.port() == mine.port() || seen.ip() != mine.ip(), "{seen} is not {mine}");
        Ok(seen.ip())
    }

    pub(crate) fn listen(&self, addr: &str) -> TcpListener {
        self.run(|| TcpListener::bind(addr).unwrap_or_else(|error| panic!("bind {addr}: {error}")))
    }
}

/// Hosts and a client on one bridge: host n has 10.99.0.n and fd99::n on `eth0`.
pub(crate) struct Lab {
    pub(crate) wire: Ns,
    pub(crate) hosts: Vec<Host>,
}

pub(crate) struct Host {
    pub(crate) ns: Ns,
    pub(crate) index: HostIndex,
    pub(crate) overlay: Overlay,
    pub(crate) dir: tempfile::TempDir,
    config: HostConfig,
}

impl Drop for Host {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            // A pin that cannot be removed is left for whoever looks into the temporary directory; nothing else to do.
            let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
        }
    }
}

impl Host {
    /// A second process on the same host, as after a kill.
    pub(crate) fn reborn(&self) -> Overlay {
        Overlay::try_new_in(self.config.clone(), self.ns.fd()).expect("overlay")
    }

    /// The same host at another address of the underlay, which it is given here.
    pub(crate) fn moved(&self, to: &str) -> Overlay {
        self.ns.sh(&format!("ip addr flush dev eth0 scope global; ip addr add {to}/24 dev eth0"));
        let config = HostConfig { vtep: to.parse().expect("address"), ..self.config.clone() };
        Overlay::try_new_in(config, self.ns.fd()).expect("overlay")
    }

    /// One that shall have no fast path.
    pub(crate) fn reborn_routed(&self) -> Overlay {
        let config = HostConfig { fast_path: false, ..self.config.clone() };
        Overlay::try_new_in(config, self.ns.fd()).expect("overlay")
    }

    /// The fabric of a network, as a namespace.
    pub(crate) fn fabric(&self, id: &str) -> Ns {
        Ns::of(File::open(self.dir.path().join(format!("sk-{id}"))).expect("fabric"))
    }
}

impl Lab {
    pub(crate) fn new(hosts: u16) -> Self {
        Self::with(hosts, false)
    }

    /// `six`: VTEPs are IPv6 addresses.
    pub(crate) fn with(hosts: u16, six: bool) -> Self {
        let wire = Ns::new();
        wire.sh("ip link add br0 type bridge; ip link set br0 up");
        let hosts = (1..=hosts).map(|nth| Host::new(&wire, HostIndex(nth), six)).collect();
        Self { wire, hosts }
    }

    /// Another machine on the underlay, at 10.99.0.`nth` and fd99::`nth`.
    pub(crate) fn machine(&self, nth: u16) -> Ns {
        machine(&self.wire, nth)
    }
}

fn machine(wire: &Ns, nth: u16) -> Ns {
    let ns = Ns::new();
    ns.sh(&format!(
        "ip link add eth0 type veth peer name h{nth} netns {wire}\n\
         ip addr add 10.99.0.{nth}/24 dev eth0; ip addr add fd99::{nth}/64 dev eth0 nodad; ip link set eth0 up",
        wire = wire.path()
    ));
    wire.sh(&format!("ip link set h{nth} master br0 up"));
    ns
}

impl Host {
    fn new(wire: &Ns, index: HostIndex, six: bool) -> Self {
        let ns = machine(wire, index.0);
        let dir = tempfile::Builder::new().prefix("skein-netns-").tempdir().expect("temporary directory");
        let mut config = HostConfig::new(index, vtep(index, six), 1500);
        config.netns_dir = dir.path().to_owned();
        // Both ways are in use: bound to a device, and by the routes.
        config.underlay_dev = six.then(|| "eth0".to_owned());
        config.fast_path = true;
        let overlay = Overlay::try_new_in(config.clone(), ns.fd()).expect("overlay");
        Self { ns, index, overlay, dir, config }
    }
}

pub(crate) fn vtep(host: HostIndex, six: bool) -> IpAddr {
    let text = if six { format!("fd99::{host}") } else { format!("10.99.0.{host}") };
    text.parse().expect("address")
}

/// Network `name` as host `here` of `hosts` sees it: 10.`vni`.0.0/16 and fd57:`vni`::/32, host n has block 10.vni.n.0/24.
pub(crate) fn network(name: &str, vni: u32, here: HostIndex, hosts: u16, six: bool) -> NetworkState {
    let block = |host: u16| {
        [format!("10.{vni}.{host}.0/24"), format!("fd57:{vni}:{host}::/48")].map(|net| net.parse().expect("net")).into()
    };
    let peer = |host: u16| (HostIndex(host), Peer { vtep: vtep(HostIndex(host), six), blocks: block(host), mtu: None });
    NetworkState {
        id: name.parse().expect("id"),
        vni,
        subnet4: format!("10.{vni}.0.0/16").parse().expect("net"),
        subnet6: Some(format!("fd57:{vni}::/32").parse().expect("net")),
        gateway4: format!("10.{vni}.0.1").parse().expect("address"),
        gateway6: Some(format!("fd57:{vni}::1").parse().expect("address")),
        mtu: if six { 1430 } else { 1450 },
        internal: false,
        local_blocks: block(here.0),
        peers: (1..=hosts).filter(|host| *host != here.0).map(peer).collect(),
        endpoints: Default::default(),
        published: Default::default(),
        services: Default::default(),
        ingress: None,
    }
}

/// Some hosts with one network, `blue`, and that network as each of them sees it.
pub(crate) async fn blue(hosts: u16) -> (Lab, Vec<NetworkState>) {
    let lab = Lab::new(hosts);
    let states: Vec<_> = lab.hosts.iter().map(|host| network("blue", 57, host.index, hosts, false)).collect();
    for (host, state) in lab.hosts.iter().zip(&states) {
        host.overlay.ensure_network(state).await.expect("network");
    }
    (lab, states)
}

/// One host with the network `blue`.
pub(crate) async fn blue_alone() -> (Lab, NetworkState) {
    let (lab, mut states) = blue(1).await;
    (lab, states.remove(0))
}

/// A published port that leads to `target`.
pub(crate) fn port(proto: Proto, host_ip: Option<&str>, host_port: u16, target: SocketAddr) -> PublishedPort {
    let host_ip = host_ip.map(|ip| ip.parse().expect("address"));
    PublishedPort { proto, host_ip, host_port, target: target.ip(), target_port: target.port(), draining: false }
}

/// A container, wired up as the engine does it from the answer to Join.
pub(crate) struct Container {
    pub(crate) ns: Ns,
    pub(crate) endpoint: Endpoint,
}

impl Container {
    pub(crate) fn addr4(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.endpoint.addr4, port))
    }

    pub(crate) fn addr6(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.endpoint.addr6.expect("has ipv6"), port))
    }
}

/// Starts container `nth` of a network on its host and adds it to `state`.
pub(crate) async fn container(host: &Host, state: &mut NetworkState, nth: u16) -> Container {
    let (vni, on) = (state.vni, host.index);
    let addr4 = format!("10.{vni}.{on}.{nth}").parse().expect("address");
    let addr6 = format!("fd57:{vni}:{on}::{nth}").parse().expect("address");
    let endpoint = Endpoint::new(addr4, Some(addr6));
    let id = EndpointId(format!("container-{nth}"));
    state.endpoints.insert(id, endpoint.clone());
    let temporary = format!("skc-{nth}");
    host.overlay.add_endpoint(state, &endpoint, &temporary).await.expect("endpoint");
    let ns = Ns::new();
    host.ns.sh(&format!("ip link set {temporary} netns {}", ns.path()));
    let (gw4, gw6) = (state.gateway4, state.gateway6.expect("has ipv6"));
    ns.sh(&format!(
        "ip link set {temporary} name eth0; ip addr add {addr4}/32 dev eth0; ip addr add {addr6}/128 dev eth0 nodad\n\
         ip link set eth0 up\n\
         ip route add {gw4}/32 dev eth0; ip -6 route add {gw6}/128 dev eth0\n\
         ip route add {} via {gw4}; ip -6 route add {} via {gw6}\n\
         ip route add default via {gw4}; ip -6 route add default via {gw6}",
        state.subnet4,
        state.subnet6.expect("has ipv6"),
    ));
    Container { ns, endpoint }
}

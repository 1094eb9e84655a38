//! Sockets that outlive the agent, because the service manager keeps a copy of each.
//!
//! Owns: the agent's side of systemd's file descriptor store. Sockets are given away when they are opened (sd_notify(3):
//! `FDSTORE=1`), come back at the next start (sd_listen_fds(3)) and are given up with their network
//! (`FDSTOREREMOVE=1`). Questions that arrive while no agent runs wait in the kept socket's queue and are answered by
//! the next one, instead of being refused by a host without a listener. Also says when the agent is ready and when it
//! stops. Must not know: what is served on the sockets, nor when networks come and go.
//!
//! A service manager that keeps nothing, or none at all, changes nothing else: sockets end with the agent then.
//!
//! No tasks, no channels. Messages are sent by whoever calls, each within `SEND_TIMEOUT`; a failure is logged and
//! costs the keeping of one socket, never the socket itself.

use std::{
    collections::BTreeMap,
    fmt, io,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::{AsFd, BorrowedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream},
    },
    str::FromStr,
    time::Duration,
};

use listenfd::ListenFd;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use skein_api::NetworkId;
use tokio::{io::AsyncReadExt, io::Interest, time::timeout};

use crate::plugin::socket::{self, LISTEN_FD_NAME, SocketError};

/// Sockets kept at most: UDP and TCP over IPv4 and IPv6 for 256 networks. The unit's `FileDescriptorStoreMax=` should
/// be one more, for the plugin's. Sockets over it work, but end with the agent.
pub const SOCKETS_MAX: usize = 1024;

/// Longest name of a kept descriptor, bytes (`FDNAME_MAX` of systemd).
const NAME_BYTES_MAX: usize = 255;

/// How long a message, or the manager's word that it has read one, may take. A manager that is busy for longer is
/// broken, and the network must not wait for it.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// First part of the name of each socket of ours.
const NAME_PREFIX: &str = "skein-dns";

/// Which protocol a kept socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP, listening.
    Tcp,
}

/// What a kept socket is: enough to tell whether it is still of use.
///
/// As text: `skein-dns_<udp|tcp>_<address>_<port>_<fabric>_<network>`, an IPv6 address with `-` for `:`, since the
/// latter separates names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SocketName {
    /// The network whose names are served.
    pub network: NetworkId,
    /// Inode of the network namespace that the socket is in. A kept socket keeps its namespace alive, so the kernel
    /// cannot give the number to another one meanwhile.
    pub fabric: u64,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it is bound.
    pub address: SocketAddr,
}

impl fmt::Display for SocketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Udp => "udp",
            Protocol::Tcp => "tcp",
        };
        let ip = self.address.ip().to_string().replace(':', "-");
        write!(f, "{NAME_PREFIX}_{protocol}_{ip}_{}_{}_{}", self.address.port(), self.fabric, self.network)
    }
}

/// A text that is no name of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to read the name of a kept socket")]
pub struct NotAName;

impl FromStr for SocketName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        // The network's id comes last, since it alone may contain the separator.
        let mut parts = text.splitn(6, '_');
        let mut next = || parts.next().ok_or(NotAName);
        if next()? != NAME_PREFIX {
            return Err(NotAName);
        }
        let protocol = match next()? {
            "udp" => Protocol::Udp,
            "tcp" => Protocol::Tcp,
            _ => return Err(NotAName),
        };
        let ip: IpAddr = next()?.replace('-', ":").parse().map_err(|_| NotAName)?;
        let port = next()?.parse().map_err(|_| NotAName)?;
        let fabric = next()?.parse().map_err(|_| NotAName)?;
        let network = next()?;
        if network.is_empty() {
            return Err(NotAName);
        }
        Ok(Self { network: NetworkId::new(network), fabric, protocol, address: SocketAddr::new(ip, port) })
    }
}

impl SocketName {
    /// The name as a service manager takes it: ASCII without control characters and colons, at most 255 bytes
    /// (`fdname_is_valid` of systemd).
    fn encoded(&self) -> Option<String> {
        let text = self.to_string();
        let valid = |b: u8| (b' '..127).contains(&b) && b != b':';
        (text.len() <= NAME_BYTES_MAX && text.bytes().all(valid)).then_some(text)
    }
}

/// The way to the service manager: the socket that `NOTIFY_SOCKET` names.
#[derive(Clone, Debug)]
pub struct Manager {
    address: UnixAddr,
}

impl Manager {
    /// The manager that started this process, if it left its address.
    #[allow(clippy::disallowed_methods, reason = "part of the service manager's protocol, not configuration")]
    pub fn from_env() -> Option<Self> {
        let Ok(address) = std::env::var("NOTIFY_SOCKET") else {
            tracing::info!("no service manager keeps the name server's sockets: they end with the agent");
            return None;
        };
        match Self::at(&address) {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!(address, %error, "failed to understand the address of the service manager");
                None
            }
        }
    }

    /// The manager at an address: a path, or `@name` in the abstract namespace (sd_notify(3)).
    ///
    /// # Errors
    /// The address is neither, or too long.
    pub fn at(address: &str) -> io::Result<Self> {
        let address = match address.strip_prefix('@') {
            Some(name) => UnixAddr::from_abstract_name(name)?,
            None if address.starts_with('/') => UnixAddr::from_pathname(address)?,
            None => return Err(io::Error::new(io::ErrorKind::Unsupported, "neither a path nor an abstract name")),
        };
        Ok(Self { address })
    }

    /// The agent does its work from now on (`READY=1`).
    pub async fn ready(&self) {
        self.tell("READY=1", None).await;
    }

    /// The agent is about to end (`STOPPING=1`).
    pub async fn stopping(&self) {
        self.tell("STOPPING=1", None).await;
    }

    /// `FDPOLL=0`: the manager would otherwise give up a socket for an error that waits to be read.
    async fn store(&self, name: &str, socket: BorrowedFd<'_>) -> bool {
        self.tell(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(socket)).await
    }

    async fn remove(&self, name: &str) -> bool {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None).await
    }

    /// Waits until the manager has read all that was sent before (`BARRIER=1`): it closes the descriptor then.
    async fn barrier(&self) {
        let wait = async {
            let (ours, theirs) = UnixStream::pair()?;
            self.send("BARRIER=1", Some(theirs.as_fd())).await?;
            drop(theirs);
            ours.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(ours)?.read(&mut [0]).await.map(drop)
        };
        match timeout(SEND_TIMEOUT, wait).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "failed to wait for the service manager"),
            Err(_) => tracing::warn!("the service manager did not answer in {SEND_TIMEOUT:?}"),
        }
    }

    async fn tell(&self, message: &str, fd: Option<BorrowedFd<'_>>) -> bool {
        let sent = timeout(SEND_TIMEOUT, self.send(message, fd)).await;
        match sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(message, %error, "failed to tell the service manager");
                false
            }
        }
    }

    /// A socket for each message: the manager may have been restarted since the last, and one that is connected can be
    /// waited for while the manager's queue is full.
    async fn send(&self, message: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&self.address)?;
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UnixDatagram::from_std(socket)?;
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = fd.as_slice();
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let text = [io::IoSlice::new(message.as_bytes())];
            sendmsg(&socket, &text, &mut control, SendFlags::NOSIGNAL).map(drop).map_err(io::Error::from)
        };
        socket.async_io(Interest::WRITABLE, send).await
    }
}

#[derive(Debug)]
enum Socket {
    Udp(UdpSocket),
    Tcp(TcpListener),
}

impl Socket {
    /// Takes the descriptor at that position if it is what its name says.
    fn take(fds: &mut ListenFd, index: usize, name: &SocketName) -> io::Result<Option<Self>> {
        let socket = match name.protocol {
            Protocol::Udp => fds.take_udp_socket(index)?.map(Self::Udp),
            Protocol::Tcp => fds.take_tcp_listener(index)?.map(Self::Tcp),
        };
        let Some(socket) = socket else { return Ok(None) };
        let bound = match &socket {
            Self::Udp(socket) => socket.set_nonblocking(true).and_then(|()| socket.local_addr())?,
            Self::Tcp(socket) => socket.set_nonblocking(true).and_then(|()| socket.local_addr())?,
        };
        Ok((bound == name.address).then_some(socket))
    }
}

/// The sockets that the service manager keeps for us. The default one keeps nothing.
#[derive(Debug, Default)]
pub struct FdStore {
    manager: Option<Manager>,
    /// What the manager has, at most [`SOCKETS_MAX`]; with the socket, as long as nobody has taken it.
    kept: BTreeMap<SocketName, Option<Socket>>,
    full: bool,
}

/// What a service manager handed over.
#[derive(Debug, Default)]
pub struct HandedOver {
    /// The socket of the engine's plugin.
    pub plugin: Option<UnixListener>,
    /// The sockets of the networks' name servers.
    pub sockets: FdStore,
}

impl HandedOver {
    /// Takes what the process was started with. Call it once, before anything else is opened; needs a tokio runtime.
    ///
    /// # Errors
    /// The plugin's socket is there but not usable. Other sockets that are not are given up.
    #[allow(clippy::disallowed_methods, reason = "part of the hand-over protocol, not configuration")]
    pub async fn take(manager: Option<Manager>) -> Result<Self, SocketError> {
        // listenfd reads the other variables.
        let names = std::env::var("LISTEN_FDNAMES").ok();
        Self::take_from(ListenFd::from_env(), names.as_deref(), manager).await
    }

    async fn take_from(mut fds: ListenFd, names: Option<&str>, manager: Option<Manager>) -> Result<Self, SocketError> {
        let plugin = socket::handed_over(&mut fds, names)?;
        let mut kept = BTreeMap::new();
        let mut useless = Vec::new();
        for (index, text) in names.unwrap_or_default().split(':').enumerate() {
            if !text.starts_with(NAME_PREFIX) {
                continue;
            }
            let taken = text.parse().ok().filter(|_| kept.len() < SOCKETS_MAX).and_then(|name: SocketName| {
                let socket = Socket::take(&mut fds, index, &name).ok().flatten()?;
                Some((name, socket))
            });
            match taken {
                Some((name, socket)) => drop(kept.insert(name, Some(socket))),
                // One that is no socket of the kind that its name says stays open: if a manager left a gap, the number
                // is now that of a file of our own.
                None => useless.push(text),
            }
        }
        if !kept.is_empty() || !useless.is_empty() {
            tracing::info!(kept = kept.len(), useless = useless.len(), "took over the name server's sockets");
        }
        if let Some(manager) = &manager {
            for text in useless {
                manager.remove(text).await;
            }
        }
        Ok(Self { plugin, sockets: FdStore { manager, kept, full: false } })
    }
}

impl FdStore {
    /// The kept UDP socket of this name, nonblocking, once.
    pub fn take_udp(&mut self, name: &SocketName) -> Option<UdpSocket> {
        match self.kept.get_mut(name)?.take()? {
            Socket::Udp(socket) => Some(socket),
            Socket::Tcp(_) => None,
        }
    }

    /// The kept TCP listener of this name, nonblocking, once.
    pub fn take_tcp(&mut self, name: &SocketName) -> Option<TcpListener> {
        match self.kept.get_mut(name)?.take()? {
            Socket::Tcp(listener) => Some(listener),
            Socket::Udp(_) => None,
        }
    }

    /// Has a socket kept from now on, unless it is or there is no manager. A failure is logged: the socket then ends
    /// with the agent.
    pub async fn keep(&mut self, name: SocketName, socket: BorrowedFd<'_>) {
        let Some(manager) = &self.manager else { return };
        if self.kept.contains_key(&name) {
            return;
        }
        if self.kept.len() >= SOCKETS_MAX {
            if !std::mem::replace(&mut self.full, true) {
                tracing::warn!(SOCKETS_MAX, "too many sockets to be kept: further ones end with the agent");
            }
            return;
        }
        if let Some(text) = name.encoded()
            && manager.store(&text, socket).await
        {
            self.kept.insert(name, None);
        }
    }

    /// Has the plugin's socket kept under the name by which it is handed over.
    pub async fn keep_plugin(&self, listener: &UnixListener) {
        if let Some(manager) = &self.manager {
            manager.store(LISTEN_FD_NAME, listener.as_fd()).await;
        }
    }

    /// Gives up the sockets that `which` names; its second argument tells whether the socket was taken or opened by us.
    /// When this returns the manager has closed them, and so their addresses are free unless we hold them.
    pub async fn release(&mut self, which: impl Fn(&SocketName, bool) -> bool) {
        let gone: Vec<SocketName> =
            self.kept.iter().filter(|(name, socket)| which(name, socket.is_none())).map(|(n, _)| n.clone()).collect();
        if gone.is_empty() {
            return;
        }
        self.full = false;
        for name in &gone {
            self.kept.remove(name);
            if let (Some(manager), Some(text)) = (&self.manager, name.encoded()) {
                manager.remove(&text).await;
            }
        }
        if let Some(manager) = &self.manager {
            manager.barrier().await;
        }
    }
}

#[cfg(test)]
mod tests;

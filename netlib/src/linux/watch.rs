//! Owns the sockets on which a namespace tells that something changed: rtnetlink groups and nftables.
//!
//! What changed is not kept, only that something did: a wake-up leads to a fresh observation. So a lost message
//! (ENOBUFS) is a wake-up like any other and nothing here can overflow.
//!
//! Tasks: [`follow`] is the body of one task per namespace, owned by [`crate::Watch`]. Channels: none.

use std::{io, os::fd::AsRawFd};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute},
};
use netlink_sys::{
    SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::sys::socket::{MsgFlags, recv};
use rtnetlink::MulticastGroup;
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    kernel::{Error, Scope},
    linux::LinuxKernel,
    names,
};

/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;
/// A notification has a few hundred bytes; more than one may come in a datagram.
const DATAGRAM_BYTES_MAX: usize = 32 * 1024;
/// Notifications read before the next wake-up is told, so that a storm cannot keep the task from telling.
const READS_MAX: usize = 256;

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Nexthop,
];

/// The two sockets of one namespace.
pub(crate) struct Feed {
    scope: Scope,
    route: AsyncFd<netlink_sys::Socket>,
    nft: AsyncFd<netlink_sys::Socket>,
}

fn subscribe(protocol: isize, groups: &[u32]) -> io::Result<netlink_sys::Socket> {
    let mut socket = netlink_sys::Socket::new(protocol)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}

#[allow(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
fn register(socket: netlink_sys::Socket) -> io::Result<AsyncFd<netlink_sys::Socket>> {
    // SAFETY: a `netlink_sys::Socket` owns its descriptor, always answers the same one, and closes it only when it is
    // dropped; the `AsyncFd` owns the socket and never gives it out.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}

impl Feed {
    /// Subscribes in a namespace. Needs a tokio runtime.
    pub(crate) fn open(kernel: &LinuxKernel, scope: &Scope) -> Result<Self, Error> {
        let verb = "subscribe to netlink notifications";
        let (route, nft) = kernel.run_in(scope, verb, || {
            let groups = GROUPS.map(|group| group as u32);
            Ok((subscribe(NETLINK_ROUTE, &groups)?, subscribe(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?))
        })?;
        let failed = |source| Error::Socket { verb: verb.to_owned(), scope: scope.clone(), source };
        let (route, nft) = (register(route).map_err(failed)?, register(nft).map_err(failed)?);
        Ok(Self { scope: scope.clone(), route, nft })
    }
}

/// Calls `wake` whenever the namespace has changed, until a socket breaks.
pub(crate) async fn follow(feed: Feed, wake: impl Fn(&Scope)) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        // `readable` is cancel-safe: it takes nothing.
        let (socket, is_route) = tokio::select! {
            ready = feed.route.readable() => (ready, true),
            ready = feed.nft.readable() => (ready, false),
        };
        let Ok(mut ready) = socket else { return };
        let mut matters = false;
        for _ in 0..READS_MAX {
            let fd = ready.get_inner().as_raw_fd();
            match ready.try_io(|_| Ok(recv(fd, &mut buffer, MsgFlags::empty())?)) {
                Ok(Ok(len)) => matters |= !is_route || concerns_us(&feed.scope, &buffer[..len]),
                // Messages were lost: look for ourselves.
                Ok(Err(error)) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => matters = true,
                Ok(Err(error)) => {
                    tracing::warn!(%error, scope = %feed.scope, "netlink notifications ended");
                    return;
                }
                Err(_would_block) => break,
            }
        }
        if matters {
            wake(&feed.scope);
        }
    }
}

/// On the host, neighbours come and go all the time; only those of our uplinks matter. In a fabric all is ours.
fn concerns_us(scope: &Scope, datagram: &[u8]) -> bool {
    if !matches!(scope, Scope::Host) {
        return true;
    }
    let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) else {
        return true;
    };
    let attributes = match message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewNeighbour(neighbour) | RouteNetlinkMessage::DelNeighbour(neighbour),
        ) => neighbour.attributes,
        _ => return true,
    };
    attributes.iter().any(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => *v4 == names::UPLINK_FABRIC_V4,
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => *v6 == names::UPLINK_FABRIC_V6,
        _ => false,
    })
}

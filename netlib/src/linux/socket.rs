//! Owns a blocking rtnetlink socket: batches of requests with one acknowledgement at the end, and dumps.
//!
//! A socket stays in the namespace it was opened in, whichever thread uses it. Every wait is bounded by
//! [`REPLY_TIMEOUT`]. It knows messages only as type, flags and bytes. No tasks, no channels.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd,
    time::Duration,
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{MsgFlags, getsockopt, recv, setsockopt, sockopt},
        time::TimeVal,
    },
};

/// Longest wait for one answer. The kernel answers at once, but for the RTNL lock: removing many links holds it for
/// some milliseconds each.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages in one send. Beyond 512 nothing gets faster; 16,384 in one send are refused.
const BATCH_MESSAGES_MAX: usize = 256;
/// Bytes in one send, a sixth of the default send buffer (212,992).
const BATCH_BYTES_MAX: usize = 32 * 1024;
/// Receive buffer in the kernel: 256 errors of a batch with their texts are about 64 KiB.
const RECEIVE_BUFFER_BYTES: usize = 1024 * 1024;
/// Largest datagram taken: the kernel fills at most 32 KiB in a dump.
const DATAGRAM_BYTES_MAX: usize = 64 * 1024;
/// Dumps are read again when the table changed meanwhile (NLM_F_DUMP_INTR), this often.
const DUMP_TRIES_MAX: usize = 5;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `NLMSGERR_ATTR_MSG`, the kernel's explanation of an error in words.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One message to the kernel.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) body: Vec<u8>,
}

impl Request {
    /// A request from a typed message. `flags` besides NLM_F_REQUEST.
    pub(super) fn new(message: &RouteNetlinkMessage, flags: u16) -> Self {
        let mut body = vec![0; message.buffer_len()];
        message.serialize(&mut body);
        Self { kind: message.message_type(), flags, body }
    }

    fn emit(&self, to: &mut Vec<u8>, seq: u32, extra_flags: u16) {
        let start = to.len();
        let len = u32::try_from(HEADER_BYTES + self.body.len()).expect("a message is far below 4 GiB");
        to.extend(len.to_ne_bytes());
        to.extend(self.kind.to_ne_bytes());
        to.extend((self.flags | NLM_F_REQUEST | extra_flags).to_ne_bytes());
        to.extend(seq.to_ne_bytes());
        to.extend(0u32.to_ne_bytes());
        to.extend(&self.body);
        to.resize(start + (HEADER_BYTES + self.body.len()).next_multiple_of(4), 0);
    }
}

/// Messages of an answer as (type, body), in order.
type Messages = Vec<(u16, Vec<u8>)>;

/// One message from the kernel.
pub(super) struct Reply<'a> {
    pub(super) kind: u16,
    flags: u16,
    seq: u32,
    pub(super) body: &'a [u8],
}

/// Splits a datagram into messages; stops at the first that is cut off.
pub(super) fn replies(mut datagram: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| datagram.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
        let len = word(0)? as usize;
        let (kind_flags, seq) = (datagram.get(4..8)?, word(8)?);
        let body = datagram.get(HEADER_BYTES..len)?;
        let kind = u16::from_ne_bytes([kind_flags[0], kind_flags[1]]);
        let flags = u16::from_ne_bytes([kind_flags[2], kind_flags[3]]);
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Reply { kind, flags, seq, body })
    })
}

/// The result in an NLMSG_ERROR or NLMSG_DONE: zero is an acknowledgement. The kernel's words come along if it has any.
pub(super) fn outcome(reply: &Reply<'_>) -> io::Result<()> {
    let code = reply.body.get(..4).map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    if code >= 0 {
        return Ok(());
    }
    let plain = io::Error::from_raw_os_error(code.saturating_neg());
    // NETLINK_CAP_ACK: of the request only its header (16 bytes) stands between code and attributes.
    let mut attrs = reply.body.get(4 + HEADER_BYTES..).unwrap_or(&[]);
    while let Some(head) = attrs.get(..4) {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]);
        let Some(value) = attrs.get(4..len) else {
            break;
        };
        if kind == NLMSGERR_ATTR_MSG {
            let text = String::from_utf8_lossy(value);
            return Err(io::Error::new(plain.kind(), format!("{} ({plain})", text.trim_end_matches('\0'))));
        }
        attrs = attrs.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Err(plain)
}

/// How many of these requests fit into one send; at least one.
fn chunk_len(requests: &[Request]) -> usize {
    let mut bytes = 0;
    let fits = |request: &&Request| {
        bytes += HEADER_BYTES + request.body.len().next_multiple_of(4);
        bytes <= BATCH_BYTES_MAX
    };
    requests.iter().take(BATCH_MESSAGES_MAX).take_while(fits).count().max(1)
}

/// A blocking rtnetlink socket.
pub(super) struct Socket {
    inner: netlink_sys::Socket,
    seq: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens an rtnetlink socket in the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        Self::open_for(NETLINK_ROUTE)
    }

    /// Opens a socket of another netlink protocol in the calling thread's namespace.
    pub(super) fn open_for(protocol: isize) -> io::Result<Self> {
        let mut inner = netlink_sys::Socket::new(protocol)?;
        inner.bind_auto()?;
        inner.set_cap_ack(true)?;
        inner.set_ext_ack(true)?;
        inner.set_netlink_get_strict_chk(true)?;
        let timeout = TimeVal::new(i64::try_from(REPLY_TIMEOUT.as_secs()).expect("10 fits"), 0);
        setsockopt(&inner, sockopt::ReceiveTimeout, &timeout)?;
        // The forced form goes beyond net.core.rmem_max and needs CAP_NET_ADMIN, as everything here.
        setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)?;
        Ok(Self { inner, seq: 0, buffer: vec![0; DATAGRAM_BYTES_MAX] })
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.inner.send(bytes, 0)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&mut self) -> io::Result<&[u8]> {
        let fd = self.inner.as_raw_fd();
        let len = loop {
            match recv(fd, &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                other => break other?,
            }
        };
        self.buffer.get(..len).ok_or_else(|| io::Error::other(format!("netlink datagram of {len} bytes is too large")))
    }

    /// Sends requests in their order and waits until all are done. Answers which failed, by position.
    pub(super) fn batch(&mut self, requests: &[Request]) -> io::Result<Vec<(usize, io::Error)>> {
        let mut failures = Vec::new();
        let mut done = 0;
        while done < requests.len() {
            let chunk = &requests[done..done + chunk_len(&requests[done..])];
            let first = self.seq.wrapping_add(1);
            let mut bytes = Vec::new();
            for (nth, request) in chunk.iter().enumerate() {
                self.seq = self.seq.wrapping_add(1);
                request.emit(&mut bytes, self.seq, if nth + 1 == chunk.len() { NLM_F_ACK } else { 0 });
            }
            self.send(&bytes)?;
            self.collect(first, chunk.len(), |at, error| failures.push((done + at, error)))?;
            done += chunk.len();
        }
        Ok(failures)
    }

    /// Reads answers until the one for the last of `count` messages from `first`.
    fn collect(&mut self, first: u32, count: usize, mut failed: impl FnMut(usize, io::Error)) -> io::Result<()> {
        loop {
            for reply in replies(self.receive()?) {
                let at = reply.seq.wrapping_sub(first) as usize;
                // An answer to a request that timed out earlier.
                if at >= count || reply.kind != NLMSG_ERROR {
                    continue;
                }
                if let Err(error) = outcome(&reply) {
                    failed(at, error);
                }
                if at + 1 == count {
                    return Ok(());
                }
            }
        }
    }

    /// Sends one request and waits for its acknowledgement.
    pub(super) fn execute(&mut self, request: Request) -> io::Result<()> {
        match self.batch(&[request])?.pop() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Reads a table, or the one object a request without NLM_F_DUMP asks for, as (type, body) in order.
    pub(super) fn read(&mut self, request: &Request) -> io::Result<Messages> {
        self.read_some(request, |kind, body| Some((kind, body.to_vec())))
    }

    /// As [`Socket::read`], but keeps only what `keep` makes of each object.
    pub(super) fn read_some<T>(
        &mut self,
        request: &Request,
        mut keep: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES_MAX {
            let (found, interrupted) = self.read_once(request, &mut keep)?;
            if !interrupted {
                return Ok(found);
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "the table kept changing while it was read"))
    }

    fn read_once<T>(
        &mut self,
        request: &Request,
        mut keep: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<(Vec<T>, bool)> {
        self.seq = self.seq.wrapping_add(1);
        let seq = self.seq;
        let dump = request.flags & NLM_F_DUMP == NLM_F_DUMP;
        let mut bytes = Vec::new();
        request.emit(&mut bytes, seq, 0);
        self.send(&bytes)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        loop {
            for reply in replies(self.receive()?).filter(|reply| reply.seq == seq) {
                interrupted |= reply.flags & NLM_F_DUMP_INTR != 0;
                match reply.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return outcome(&reply).map(|()| (found, interrupted));
                    }
                    kind => found.extend(keep(kind, reply.body)),
                }
                if !dump {
                    return Ok((found, interrupted));
                }
            }
        }
    }
}

/// What the way from `local` to `peer` takes, bytes. Sends nothing: connecting a UDP socket only asks the routes.
pub(super) fn path_mtu(local: IpAddr, peer: IpAddr) -> io::Result<u32> {
    /// Any port: nothing is sent (RFC 863: discard).
    const PORT: u16 = 9;
    let socket = UdpSocket::bind((local, 0))?;
    socket.connect((peer, PORT))?;
    let mtu = match peer {
        IpAddr::V4(_) => getsockopt(&socket, sockopt::IpMtu)?,
        IpAddr::V6(_) => ipv6_mtu(&socket)?,
    };
    u32::try_from(mtu).map_err(io::Error::other)
}

/// `IPV6_MTU` (ipv6(7)), which nix does not have.
#[allow(unsafe_code, reason = "a system call that no crate we use wraps")]
fn ipv6_mtu(socket: &UdpSocket) -> io::Result<libc::c_int> {
    let mut mtu: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("four");
    let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_MTU);
    // SAFETY: the descriptor is open for as long as `socket` lives; the kernel writes at most `len` bytes to `mtu`,
    // which has as many, and is the integer that this option gives.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &raw mut len) };
    Errno::result(result)?;
    Ok(mtu)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

    use netlink_packet_core::NLM_F_MULTIPART;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, send, socketpair};

    use super::*;

    const OBJECT: u16 = 99;

    /// A socket whose kernel is the other end.
    #[allow(unsafe_code, reason = "a netlink socket can be made of a descriptor only this way")]
    fn pair() -> (Socket, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).expect("socketpair");
        // SAFETY: the descriptor is open and handed over.
        let inner = unsafe { netlink_sys::Socket::from_raw_fd(ours.into_raw_fd()) };
        (Socket { inner, seq: 0, buffer: vec![0; DATAGRAM_BYTES_MAX] }, theirs)
    }

    /// One datagram: an object of `seq`, and the end of the dump.
    fn answer(seq: u32, object: u8, flags: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        let message = |kind, body: &[u8]| Request { kind, flags: NLM_F_MULTIPART | flags, body: body.to_vec() };
        message(OBJECT, &[object; 4]).emit(&mut bytes, seq, 0);
        message(NLMSG_DONE, &[0; 4]).emit(&mut bytes, seq, 0);
        bytes
    }

    fn dump(answers: &[Vec<u8>]) -> io::Result<Messages> {
        let (mut socket, kernel) = pair();
        for bytes in answers {
            send(kernel.as_raw_fd(), bytes, MsgFlags::empty()).expect("answer");
        }
        socket.read(&Request { kind: OBJECT, flags: NLM_F_DUMP, body: vec![0; 4] })
    }

    #[test]
    fn an_interrupted_dump_is_read_again_and_its_parts_are_not_mixed() {
        let whole = dump(&[answer(1, 1, NLM_F_DUMP_INTR), answer(2, 2, NLM_F_DUMP_INTR), answer(3, 3, 0)]);
        assert_eq!(whole.expect("third time"), [(OBJECT, vec![3; 4])]);
    }

    #[test]
    fn a_dump_that_is_always_interrupted_is_an_error() {
        let tries = u32::try_from(DUMP_TRIES_MAX).expect("fits");
        let answers: Vec<_> = (1..=tries).map(|seq| answer(seq, 1, NLM_F_DUMP_INTR)).collect();
        assert_eq!(dump(&answers).expect_err("never whole").kind(), io::ErrorKind::ResourceBusy);
    }

    #[test]
    fn an_answer_to_an_earlier_request_is_passed_over() {
        let whole = dump(&[answer(7, 7, NLM_F_DUMP_INTR), answer(1, 1, 0)]);
        assert_eq!(whole.expect("ours"), [(OBJECT, vec![1; 4])]);
    }
}

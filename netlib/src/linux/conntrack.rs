//! Owns forgetting translated connections whose container is gone. Without it a client that keeps sending UDP to a
//! published port would be translated to the old address for as long as it sends.
//!
//! Written by hand over nfnetlink (linux/netfilter/nfnetlink_conntrack.h). No tasks, no channels.

use std::{io, net::IpAddr};

use netlink_packet_core::{NLM_F_DUMP, NlasIterator};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{
    messages::ip,
    socket::{Request, Socket},
};
use crate::types::{Proto, Translated};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`.
const CT_GET: u16 = 0x0101;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`.
const CT_DELETE: u16 = 0x0102;
/// `struct nfgenmsg`: family, format number 0, resource id.
const NFGENMSG_BYTES: usize = 4;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
/// Without the bits for "nested" and "byte order".
const KIND_MASK: u16 = 0x3fff;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// The value of an attribute, and in it of another one.
pub(super) fn attribute(body: &[u8], kind: u16) -> Option<&[u8]> {
    let mut rest = body;
    while let Some(head) = rest.get(..4) {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let value = rest.get(4..len)?;
        if u16::from_ne_bytes([head[2], head[3]]) & KIND_MASK == kind {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    None
}

/// Source and destination of a tuple.
fn addresses(tuple: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let inner = attribute(tuple, CTA_TUPLE_IP)?;
    let (mut src, mut dst) = (None, None);
    for nla in NlasIterator::new(inner).flatten() {
        match nla.kind() & KIND_MASK {
            CTA_IP_V4_SRC | CTA_IP_V6_SRC => src = ip(nla.value()),
            CTA_IP_V4_DST | CTA_IP_V6_DST => dst = ip(nla.value()),
            _ => {}
        }
    }
    src.zip(dst)
}

/// Protocol and destination port of a tuple; none of what has no ports.
fn port(tuple: &[u8]) -> Option<(Proto, u16)> {
    let inner = attribute(tuple, CTA_TUPLE_PROTO)?;
    let proto = match attribute(inner, CTA_PROTO_NUM)? {
        [IPPROTO_TCP] => Proto::Tcp,
        [IPPROTO_UDP] => Proto::Udp,
        _ => return None,
    };
    let port = attribute(inner, CTA_PROTO_DST_PORT)?.try_into().ok()?;
    Some((proto, u16::from_be_bytes(port)))
}

/// The request that removes an entry, if its destination was translated (the answers come from elsewhere than the
/// questions went to) and `goes` says so.
pub(super) fn removal(entry: &[u8], goes: impl Fn(&Translated) -> bool) -> Option<Request> {
    let (head, attrs) = entry.split_at_checked(NFGENMSG_BYTES)?;
    let (orig, reply) = (attribute(attrs, CTA_TUPLE_ORIG)?, attribute(attrs, CTA_TUPLE_REPLY)?);
    let (_, asked) = addresses(orig)?;
    let (answers, _) = addresses(reply)?;
    if asked == answers || !goes(&Translated { asked, port: port(orig), answers }) {
        return None;
    }
    let mut body = vec![head[0], 0, 0, 0];
    let len = u16::try_from(4 + orig.len()).ok()?;
    body.extend(len.to_ne_bytes());
    body.extend((CTA_TUPLE_ORIG | NESTED).to_ne_bytes());
    body.extend(orig);
    Some(Request { kind: CT_DELETE, flags: 0, body })
}

/// Forgets every translated connection of which `goes` says so, in the calling thread's namespace. Answers how many
/// there were; one that ended meanwhile is fine.
pub(super) fn forget(goes: impl Fn(&Translated) -> bool) -> io::Result<usize> {
    let mut socket = Socket::open_for(NETLINK_NETFILTER)?;
    // Family 0: IPv4 and IPv6.
    let dump = Request { kind: CT_GET, flags: NLM_F_DUMP, body: vec![0; NFGENMSG_BYTES] };
    // Judged as they come: a busy host tracks hundreds of thousands.
    let removals = socket.read_some(&dump, |_, body| removal(body, &goes))?;
    for (_, error) in socket.batch(&removals)? {
        if error.kind() != io::ErrorKind::NotFound {
            return Err(error);
        }
    }
    Ok(removals.len())
}

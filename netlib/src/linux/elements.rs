//! Owns reading the elements of our nft sets and maps. `nft -j` takes some 20 µs for each, this a tenth.
//!
//! Written by hand over nfnetlink (linux/netfilter/nf_tables.h). A key or value is the parts of its type one after the
//! other, each filled up to four bytes; numbers of the network are big-endian, those of `numgen` are the host's. What is
//! of no type that we use comes out as hex, and so is no element of ours. No tasks, no channels.

use std::{collections::BTreeMap, fmt::Write as _, io};

use netlink_packet_core::{NLM_F_DUMP, NlasIterator};

use super::{
    conntrack::attribute,
    messages::ip,
    socket::{Request, Socket},
};

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETSETELEM`.
const GET_ELEMENTS: u16 = 0x0a0d;
/// `NFPROTO_INET`, then format number 0 and resource id of `struct nfgenmsg`.
const HEAD: [u8; 4] = [1, 0, 0, 0];
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

/// The elements of a set of our table. `kind`: the type of its keys, and of its values after ` : `.
pub(super) fn read(socket: &mut Socket, table: &str, set: &str, kind: &str) -> io::Result<BTreeMap<String, String>> {
    let mut body = HEAD.to_vec();
    for (attr, name) in [(NFTA_SET_ELEM_LIST_TABLE, table), (NFTA_SET_ELEM_LIST_SET, set)] {
        let len = u16::try_from(4 + name.len() + 1).expect("names are short");
        body.extend(len.to_ne_bytes());
        body.extend(attr.to_ne_bytes());
        body.extend(name.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let request = Request { kind: GET_ELEMENTS, flags: NLM_F_DUMP, body };
    let parts = socket.read_some(&request, |_, body| Some(parse(body, kind)))?;
    Ok(parts.into_iter().flatten().collect())
}

/// The elements of one message.
pub(super) fn parse(body: &[u8], kind: &str) -> Vec<(String, String)> {
    let (key_kind, value_kind) = kind.split_once(" : ").unwrap_or((kind, ""));
    let list = body.get(HEAD.len()..).and_then(|attrs| attribute(attrs, NFTA_SET_ELEM_LIST_ELEMENTS));
    let one = |element: &[u8]| {
        let value = |attr| attribute(attribute(element, attr)?, NFTA_DATA_VALUE);
        let key = text(value(NFTA_SET_ELEM_KEY)?, key_kind);
        Some((key, value(NFTA_SET_ELEM_DATA).map_or_else(String::new, |data| text(data, value_kind))))
    };
    NlasIterator::new(list.unwrap_or_default()).flatten().filter_map(|element| one(element.value())).collect()
}

/// A key or value as our own text has it.
fn text(mut bytes: &[u8], kind: &str) -> String {
    let mut out = String::new();
    for part in kind.split(" . ") {
        let (len, fits) = match part {
            "ipv4_addr" | "integer" => (4, 4),
            "ipv6_addr" => (16, 16),
            "inet_service" => (2, 4),
            "inet_proto" => (1, 4),
            _ => return hex(bytes),
        };
        let Some(raw) = bytes.get(..len) else { return hex(bytes) };
        bytes = bytes.get(fits..).unwrap_or_default();
        if !out.is_empty() {
            out.push_str(" . ");
        }
        // Writing to a string cannot fail.
        let _ = match (part, raw) {
            ("integer", [a, b, c, d]) => write!(out, "{}", u32::from_ne_bytes([*a, *b, *c, *d])),
            ("inet_service", [high, low]) => write!(out, "{}", u16::from_be_bytes([*high, *low])),
            (_, [6]) => write!(out, "tcp"),
            (_, [17]) => write!(out, "udp"),
            (_, [number]) => write!(out, "{number}"),
            (_, address) => match ip(address) {
                Some(address) => write!(out, "{address}"),
                None => write!(out, "{}", hex(address)),
            },
        };
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_read_by_their_types() {
        let check = |kind: &str, bytes: &[u8], expected: &str| assert_eq!(text(bytes, kind), expected, "{kind}");
        let number = (655_361_u32).to_ne_bytes();
        check("ipv4_addr", &[10, 57, 0, 7], "10.57.0.7");
        check("ipv4_addr . integer", &[&[10, 57, 240, 1][..], &number].concat(), "10.57.240.1 . 655361");
        let proto_port = [6, 0, 0, 0, 0x1f, 0x90, 0, 0];
        check("inet_proto . inet_service . integer", &[&proto_port[..], &number].concat(), "tcp . 8080 . 655361");
        check("ipv4_addr . inet_service", &[10, 57, 0, 7, 0, 53, 0, 0], "10.57.0.7 . 53");
        check("inet_proto . inet_service", &[17, 0, 0, 0, 0, 53], "udp . 53");
        let six = "fd57::107".parse::<std::net::Ipv6Addr>().expect("address").octets();
        check("ipv6_addr . inet_service", &[&six[..], &[0, 80, 0, 0]].concat(), "fd57::107 . 80");
        check("inet_proto", &[132], "132");
        check("ether_addr", &[2, 0, 0, 0, 0, 1], "0x020000000001");
        check("ipv4_addr . inet_service", &[10, 57, 0, 7], "0x");
    }
}

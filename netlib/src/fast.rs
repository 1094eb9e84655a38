//! Owns the fast path: what two small programs at the devices of a fabric do with a packet, as eBPF instructions, and
//! what they must know, as data.
//!
//! ```text
//!  container ==veth== skv-…  --[out]-->  skvx ~~~ VXLAN ~~~ skvx --[in]-->  the container itself
//! ```
//!
//! `out` runs where a container's packet enters the fabric, `in` where one comes out of the tunnel. A packet that is
//! plain in every respect is given its Ethernet addresses and sent on at once, past routing, netfilter and connection
//! tracking. Everything else goes the routed way as if the programs were not there: they never drop. So what they leave
//! out is only slower, and what they do must be what the routed way would have done:
//!
//! * **Plain**: TCP or UDP, without options, extension headers or fragments, TTL 2 or more, no larger than the network
//!   allows, from an address of that very veth to a block of another host, or the other way round.
//! * **Own address**: a container may only send as itself; a packet that comes out of the tunnel must come from a block
//!   of another host.
//! * **Virtual addresses** are translated by connection tracking in the client's fabric, in both directions. Whoever
//!   sends to an address of the network that no host owns is one of their clients: from that packet on, all its packets
//!   go the routed way. So is who sends to the host itself, where a port of every host may lead to another one. It is remembered in the entry of the address itself, so a new container begins anew.
//! * **On one host** packets always go the routed way: published ports are translated there.
//!
//! Instructions are assembled here (RFC 9669), so that no compiler is needed where Skein is built or run. Pure: no system
//! call. No tasks, no channels.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{nft::digest, types::Mac};

/// Which of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// At a container's veth: out into the tunnel.
    Out,
    /// At the tunnel: in to a container.
    In,
}

/// One program, with its constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// What it does.
    pub role: Role,
    /// Source of the frames that it sends: this host's VTEP, or the gateway.
    pub source: Mac,
    /// MTU of the network in bytes.
    pub mtu: u32,
}

/// Where a prefix of the network's addresses leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// To another host, out of the tunnel device `dev`.
    Peer {
        /// Name of the device.
        dev: String,
        /// MAC of the other host's device.
        mac: Mac,
    },
    /// To this host.
    Here,
    /// To no host: virtual addresses are among these.
    Nobody,
}

/// A container of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// The veth's end in the fabric.
    pub dev: String,
    /// MAC of the container's interface.
    pub mac: Mac,
}

/// What the fast path of a fabric shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fast {
    /// Programs by device.
    pub programs: BTreeMap<String, Program>,
    /// Where prefixes lead; the longest counts.
    pub ways: BTreeMap<IpNet, Way>,
    /// The containers by address.
    pub locals: BTreeMap<IpAddr, Local>,
    /// Containers that are not new may have connections that were translated: their packets go the routed way.
    pub careful: bool,
}

/// What the fast path of a fabric is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FastFound {
    /// Names of our programs by device.
    pub programs: BTreeMap<String, String>,
    /// Where prefixes lead.
    pub ways: BTreeMap<IpNet, Way>,
    /// The containers by address.
    pub locals: BTreeMap<IpAddr, Local>,
}

/// What the programs counted since they were loaded, in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FastCounters {
    /// From containers, sent on at once.
    pub out_fast: u64,
    /// From containers, left to the routed way.
    pub out_routed: u64,
    /// From the tunnel, sent on at once.
    pub in_fast: u64,
    /// From the tunnel, left to the routed way.
    pub in_routed: u64,
}

/// The maps that programs share, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Map {
    /// Address (16 bytes, IPv4 as `::ffff:a.b.c.d`) → index of the veth (u32), routed only (u32), MAC, 2 bytes of 0.
    Local,
    /// Prefix length (u32) and address → index of the tunnel, [`HERE`] or [`NOBODY`] (u32), MAC, 2 bytes of 0.
    Way,
    /// Number (u32, see [`COUNTERS`]) → packets (u64), for each processor.
    Count,
}

impl Map {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Local, Self::Way, Self::Count];

    /// Its name in the kernel, at most 15 bytes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "skein_local",
            Self::Way => "skein_way",
            Self::Count => "skein_count",
        }
    }
}

/// Value of a way that leads to this host.
pub const HERE: u32 = 0;
/// Value of a way that leads to no host.
pub const NOBODY: u32 = u32::MAX;
/// Entries of [`Map::Count`]: `out` fast and routed, `in` fast and routed.
pub const COUNTERS: u32 = 4;
/// Every name of a program of ours starts like this.
pub const PROGRAM_PREFIX: &str = "sk";

impl Program {
    /// Its name: the digest of its instructions, so that one of another release, or with other constants, is another.
    pub fn name(&self) -> String {
        let text: String = self.instructions().iter().map(Insn::to_string).collect();
        let role = if self.role == Role::Out { 'o' } else { 'i' };
        // The kernel keeps 15 bytes.
        format!("{PROGRAM_PREFIX}{role}{}", &digest(&text)[..12])
    }
}

/// An address as the maps keep it.
pub fn key_of(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The address of a key.
pub fn addr_of(key: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(key).to_canonical()
}

/// Bits before an IPv4 address in its key.
const MAPPED_BITS: u8 = 96;

/// A prefix as the map keeps it: length, address.
pub fn prefix_of(net: IpNet) -> (u32, [u8; 16]) {
    let mapped = if matches!(net, IpNet::V4(_)) { MAPPED_BITS } else { 0 };
    (u32::from(net.prefix_len() + mapped), key_of(net.network()))
}

/// The prefix of a key; `None` for one that we never write.
pub fn net_of(len: u32, key: [u8; 16]) -> Option<IpNet> {
    let len = u8::try_from(len).ok()?;
    match addr_of(key) {
        IpAddr::V4(v4) => Ipv4Net::new(v4, len.checked_sub(MAPPED_BITS)?).ok().map(IpNet::V4),
        IpAddr::V6(v6) => Ipv6Net::new(v6, len).ok().map(IpNet::V6),
    }
}

// --- instructions (RFC 9669) ---

/// One instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Insn {
    code: u8,
    dst: u8,
    src: u8,
    off: i16,
    imm: i32,
}

impl Insn {
    /// As the kernel takes it, in this machine's byte order. The descriptor of a map takes the place of its number.
    pub fn bytes(&self, descriptor: impl Fn(Map) -> i32) -> [u8; 8] {
        let imm = match (self.code, self.src) {
            (LOAD_64, MAP_DESCRIPTOR) => usize::try_from(self.imm).ok().and_then(|n| Map::ALL.get(n).copied()),
            _ => None,
        };
        let imm = imm.map_or(self.imm, descriptor).to_ne_bytes();
        let off = self.off.to_ne_bytes();
        // Bit-fields: the first is in the low half on little-endian machines.
        let registers =
            if cfg!(target_endian = "little") { self.src << 4 | self.dst } else { self.dst << 4 | self.src };
        [self.code, registers, off[0], off[1], imm[0], imm[1], imm[2], imm[3]]
    }
}

impl fmt::Display for Insn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, dst, src, off, imm } = self;
        writeln!(f, "{code:02x} r{dst} r{src} {off} {imm}")
    }
}

/// Registers: result, arguments 1 to 5, kept over calls 6 to 9, end of the stack.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R5: u8 = 5;
const CONTEXT: u8 = 6;
const PACKET: u8 = 7;
const PACKET_END: u8 = 8;
/// After both look-ups the packet itself is not needed any more.
const WAY: u8 = 8;
const LOCAL: u8 = 9;
const FRAME: u8 = 10;

/// Classes, sizes and modes.
const LOAD_64: u8 = 0x18;
const LOAD_W: u8 = 0x61;
const LOAD_H: u8 = 0x69;
const LOAD_B: u8 = 0x71;
const LOAD_DW: u8 = 0x79;
const STORE_IMM_W: u8 = 0x62;
const STORE_IMM_H: u8 = 0x6a;
const STORE_W: u8 = 0x63;
const STORE_H: u8 = 0x6b;
const STORE_DW: u8 = 0x7b;
const MOV: u8 = 0xbf;
const MOV_IMM: u8 = 0xb7;
const ADD_IMM: u8 = 0x07;
const AND_IMM: u8 = 0x57;
const GOTO: u8 = 0x05;
const IF_EQ: u8 = 0x15;
const IF_NE: u8 = 0x55;
const IF_GT_IMM: u8 = 0x25;
const IF_LT_IMM: u8 = 0xa5;
const IF_GT: u8 = 0x2d;
const IF_NE_REG: u8 = 0x5d;
/// With the low 32 bits only.
const IF_EQ_32: u8 = 0x16;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// Source "register" of a load of a map's descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// Helpers (bpf-helpers(7)).
const MAP_LOOKUP_ELEM: i32 = 1;
const SKB_STORE_BYTES: i32 = 9;
const REDIRECT: i32 = 23;
const REDIRECT_PEER: i32 = 155;

/// Fields of `struct __sk_buff` (linux/bpf.h).
const SKB_LEN: i16 = 0;
const SKB_PKT_TYPE: i16 = 4;
const SKB_PROTOCOL: i16 = 16;
const SKB_VLAN_PRESENT: i16 = 20;
const SKB_IFINDEX: i16 = 40;
const SKB_DATA: i16 = 76;
const SKB_DATA_END: i16 = 80;
const SKB_GSO_SIZE: i16 = 176;

/// `TCX_NEXT`: as if the program were not there.
const NEXT: i32 = -1;

/// Bytes before the IP header.
const ETH: i16 = 14;

/// Places on the stack, from its end: the key of a look-up (prefix length, address), the Ethernet addresses, a number.
const KEY: i16 = -24;
const ADDRESS: i16 = KEY + 4;
const FRAME_ADDRESSES: i16 = -40;
const NUMBER: i16 = -48;

/// Places in the maps' values, see [`Map`].
const LOCAL_INDEX: i16 = 0;
const LOCAL_ROUTED: i16 = 4;
const LOCAL_MAC: i16 = 8;
const WAY_INDEX: i16 = 0;
const WAY_MAC: i16 = 4;

/// A place to go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    V4,
    Found,
    Sized,
    Routed,
    Done(u8),
}

#[derive(Default)]
struct Assembler {
    code: Vec<Insn>,
    jumps: Vec<(usize, Label)>,
    labels: Vec<(Label, usize)>,
}

impl Assembler {
    fn put(&mut self, code: u8, dst: u8, src: u8, off: i16, imm: i32) {
        self.code.push(Insn { code, dst, src, off, imm });
    }

    fn jump(&mut self, code: u8, dst: u8, src: u8, imm: i32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.put(code, dst, src, 0, imm);
    }

    fn label(&mut self, label: Label) {
        self.labels.push((label, self.code.len()));
    }

    fn load(&mut self, size: u8, dst: u8, from: u8, off: i16) {
        self.put(size, dst, from, off, 0);
    }

    fn map(&mut self, dst: u8, map: Map) {
        self.put(LOAD_64, dst, MAP_DESCRIPTOR, 0, map as i32);
        self.put(0, 0, 0, 0, 0);
    }

    /// Looks up what stands on the stack at `key`; the result is in R0.
    fn look_up(&mut self, map: Map, key: i16) {
        self.map(R1, map);
        self.put(MOV, R2, FRAME, 0, 0);
        self.put(ADD_IMM, R2, 0, 0, i32::from(key));
        self.put(CALL, 0, 0, 0, MAP_LOOKUP_ELEM);
    }

    fn count(&mut self, number: u8) {
        self.put(STORE_IMM_W, FRAME, 0, NUMBER, i32::from(number));
        self.look_up(Map::Count, NUMBER);
        self.jump(IF_EQ, R0, 0, 0, Label::Done(number));
        self.load(LOAD_DW, R1, R0, 0);
        self.put(ADD_IMM, R1, 0, 0, 1);
        self.put(STORE_DW, R0, R1, 0, 0);
        self.label(Label::Done(number));
    }

    /// Copies 6 bytes.
    fn mac(&mut self, to: i16, from: u8, at: i16) {
        self.load(LOAD_W, R1, from, at);
        self.put(STORE_W, FRAME, R1, to, 0);
        self.load(LOAD_H, R1, from, at + 4);
        self.put(STORE_H, FRAME, R1, to + 4, 0);
    }

    fn finish(mut self) -> Vec<Insn> {
        for (at, label) in self.jumps {
            let (_, to) = self.labels.iter().find(|(known, _)| *known == label).expect("every label is set");
            let distance = i64::try_from(*to).expect("a short program") - i64::try_from(at).expect("short") - 1;
            self.code[at].off = i16::try_from(distance).expect("a short program");
        }
        self.code
    }
}

/// Two bytes as they stand in a packet, as a number that was loaded from there.
fn half(bytes: [u8; 2]) -> i32 {
    i32::from(u16::from_ne_bytes(bytes))
}

/// Where the fields of a family's header are, from the start of the frame.
struct Header {
    /// Bytes of a header without options.
    bytes: i16,
    protocol: i16,
    ttl: i16,
    source: i16,
    destination: i16,
    /// 32-bit words of an address.
    words: i16,
}

/// RFC 791, section 3.1.
const IPV4: Header =
    Header { bytes: 20, protocol: ETH + 9, ttl: ETH + 8, source: ETH + 12, destination: ETH + 16, words: 1 };
/// RFC 8200, section 3. An extension header stands where TCP or UDP would.
const IPV6: Header =
    Header { bytes: 40, protocol: ETH + 6, ttl: ETH + 7, source: ETH + 8, destination: ETH + 24, words: 4 };
const TCP: i32 = 6;
const UDP: i32 = 17;

impl Program {
    /// Its instructions.
    pub fn instructions(&self) -> Vec<Insn> {
        let mut a = Assembler::default();
        a.put(MOV, CONTEXT, R1, 0, 0);
        // PACKET_HOST is 0: for this device, neither broadcast nor somebody else's.
        for field in [SKB_PKT_TYPE, SKB_VLAN_PRESENT] {
            a.load(LOAD_W, R1, CONTEXT, field);
            a.jump(IF_NE, R1, 0, 0, Label::Routed);
        }
        a.load(LOAD_W, PACKET, CONTEXT, SKB_DATA);
        a.load(LOAD_W, PACKET_END, CONTEXT, SKB_DATA_END);
        a.load(LOAD_W, R1, CONTEXT, SKB_PROTOCOL);
        a.jump(IF_EQ, R1, 0, half([0x08, 0x00]), Label::V4);
        a.jump(IF_NE, R1, 0, half([0x86, 0xdd]), Label::Routed);
        self.family(&mut a, &IPV6);
        a.jump(GOTO, 0, 0, 0, Label::Found);
        a.label(Label::V4);
        self.family(&mut a, &IPV4);
        a.label(Label::Found);
        self.check_size(&mut a);
        self.send(&mut a);
        a.label(Label::Routed);
        a.count(self.counter() + 1);
        a.put(MOV_IMM, R0, 0, 0, NEXT);
        a.put(EXIT, 0, 0, 0, 0);
        a.finish()
    }

    /// Number of its counter of packets that were sent on; that of the others follows.
    fn counter(&self) -> u8 {
        if self.role == Role::Out { 0 } else { 2 }
    }

    /// Checks a family's header and looks up both ends.
    fn family(&self, a: &mut Assembler, header: &Header) {
        a.put(MOV, R1, PACKET, 0, 0);
        a.put(ADD_IMM, R1, 0, 0, i32::from(ETH + header.bytes));
        a.jump(IF_GT, R1, PACKET_END, 0, Label::Routed);
        a.load(LOAD_B, R1, PACKET, ETH);
        if header.words == 1 {
            // Version 4, 5 words of header: no options. Then neither "more fragments" nor an offset.
            a.jump(IF_NE, R1, 0, 0x45, Label::Routed);
            a.load(LOAD_H, R1, PACKET, ETH + 6);
            a.put(AND_IMM, R1, 0, 0, half([0x3f, 0xff]));
            a.jump(IF_NE, R1, 0, 0, Label::Routed);
        } else {
            a.put(AND_IMM, R1, 0, 0, 0xf0);
            a.jump(IF_NE, R1, 0, 0x60, Label::Routed);
        }
        a.load(LOAD_B, R1, PACKET, header.ttl);
        a.jump(IF_LT_IMM, R1, 0, 2, Label::Routed);
        let protocol = Label::Done(if header.words == 1 { 0x10 } else { 0x11 });
        a.load(LOAD_B, R1, PACKET, header.protocol);
        a.jump(IF_EQ, R1, 0, TCP, protocol);
        a.jump(IF_NE, R1, 0, UDP, Label::Routed);
        a.label(protocol);
        let (own, other) = match self.role {
            Role::Out => (header.source, header.destination),
            Role::In => (header.destination, header.source),
        };
        self.find_local(a, header, own);
        self.find_way(a, header, other);
    }

    fn key(&self, a: &mut Assembler, header: &Header, at: i16) {
        let first = 4 - header.words;
        // Words before an IPv4 address: 0, 0, ffff.
        for (word, bytes) in (0..first).zip([[0; 4], [0; 4], [0, 0, 0xff, 0xff]]) {
            a.put(STORE_IMM_W, FRAME, 0, ADDRESS + 4 * word, i32::from_ne_bytes(bytes));
        }
        for word in 0..header.words {
            a.load(LOAD_W, R1, PACKET, at + 4 * word);
            a.put(STORE_W, FRAME, R1, ADDRESS + 4 * (first + word), 0);
        }
    }

    /// The container's end: it must be known, and a sender must be at this very device.
    fn find_local(&self, a: &mut Assembler, header: &Header, at: i16) {
        self.key(a, header, at);
        a.look_up(Map::Local, ADDRESS);
        a.jump(IF_EQ, R0, 0, 0, Label::Routed);
        a.put(MOV, LOCAL, R0, 0, 0);
        if self.role == Role::Out {
            a.load(LOAD_W, R1, LOCAL, LOCAL_INDEX);
            a.load(LOAD_W, R2, CONTEXT, SKB_IFINDEX);
            a.jump(IF_NE_REG, R1, R2, 0, Label::Routed);
        }
        a.load(LOAD_W, R1, LOCAL, LOCAL_ROUTED);
        a.jump(IF_NE, R1, 0, 0, Label::Routed);
    }

    /// The other end: it must be on another host. Whoever sends to nobody goes the routed way from now on.
    fn find_way(&self, a: &mut Assembler, header: &Header, at: i16) {
        self.key(a, header, at);
        a.put(STORE_IMM_W, FRAME, 0, KEY, 128);
        a.look_up(Map::Way, KEY);
        a.jump(IF_EQ, R0, 0, 0, Label::Routed);
        a.put(MOV, WAY, R0, 0, 0);
        a.load(LOAD_W, R1, WAY, WAY_INDEX);
        a.jump(IF_EQ, R1, 0, HERE.cast_signed(), Label::Routed);
        let known = Label::Done(if header.words == 1 { 0x20 } else { 0x21 });
        let nobody = Label::Done(if header.words == 1 { 0x22 } else { 0x23 });
        a.jump(IF_EQ_32, R1, 0, NOBODY.cast_signed(), nobody);
        a.jump(GOTO, 0, 0, 0, known);
        a.label(nobody);
        if self.role == Role::Out {
            a.put(STORE_IMM_W, LOCAL, 0, LOCAL_ROUTED, 1);
        }
        a.jump(GOTO, 0, 0, 0, Label::Routed);
        a.label(known);
    }

    /// No larger than the network allows; of a large packet that is still to be cut, its segments.
    fn check_size(&self, a: &mut Assembler) {
        let mtu = i32::try_from(self.mtu).unwrap_or(i32::MAX - i32::from(ETH));
        let whole = Label::Done(0x30);
        a.load(LOAD_W, R1, CONTEXT, SKB_GSO_SIZE);
        a.jump(IF_EQ, R1, 0, 0, whole);
        // Plus the least headers of TCP over IPv4. What is still too large beyond that, the tunnel refuses.
        a.jump(IF_GT_IMM, R1, 0, (mtu - 20 - 20).max(0), Label::Routed);
        a.jump(GOTO, 0, 0, 0, Label::Sized);
        a.label(whole);
        a.load(LOAD_W, R1, CONTEXT, SKB_LEN);
        a.jump(IF_GT_IMM, R1, 0, mtu + i32::from(ETH), Label::Routed);
        a.label(Label::Sized);
    }

    /// Writes both Ethernet addresses and sends the packet on. Written by a helper: a direct store would make the kernel
    /// copy the head of every packet of which TCP keeps a clone, which is every one it sends.
    fn send(&self, a: &mut Assembler) {
        match self.role {
            Role::Out => a.mac(FRAME_ADDRESSES, WAY, WAY_MAC),
            Role::In => a.mac(FRAME_ADDRESSES, LOCAL, LOCAL_MAC),
        }
        let Mac([b0, b1, b2, b3, b4, b5]) = self.source;
        a.put(STORE_IMM_H, FRAME, 0, FRAME_ADDRESSES + 6, half([b0, b1]));
        a.put(STORE_IMM_W, FRAME, 0, FRAME_ADDRESSES + 8, i32::from_ne_bytes([b2, b3, b4, b5]));
        a.put(MOV, R1, CONTEXT, 0, 0);
        a.put(MOV_IMM, R2, 0, 0, 0);
        a.put(MOV, R3, FRAME, 0, 0);
        a.put(ADD_IMM, R3, 0, 0, i32::from(FRAME_ADDRESSES));
        a.put(MOV_IMM, R4, 0, 0, 12);
        a.put(MOV_IMM, R5, 0, 0, 0);
        a.put(CALL, 0, 0, 0, SKB_STORE_BYTES);
        a.jump(IF_NE, R0, 0, 0, Label::Routed);
        a.count(self.counter());
        let (value, at, helper) = match self.role {
            Role::Out => (WAY, WAY_INDEX, REDIRECT),
            Role::In => (LOCAL, LOCAL_INDEX, REDIRECT_PEER),
        };
        a.load(LOAD_W, R1, value, at);
        a.put(MOV_IMM, R2, 0, 0, 0);
        a.put(CALL, 0, 0, 0, helper);
        a.put(EXIT, 0, 0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> [Program; 2] {
        [Role::Out, Role::In].map(|role| Program { role, source: Mac([2, 0, 0, 1, 0, 3]), mtu: 1_450 })
    }

    #[test]
    fn jumps_lead_forward_to_an_instruction() {
        for program in programs() {
            let code = program.instructions();
            let second_half = |at: usize| at > 0 && code[at - 1].code == LOAD_64;
            for (at, insn) in code.iter().enumerate() {
                let jumps = insn.code & 7 >= 5 && ![CALL, EXIT].contains(&insn.code);
                if jumps && !second_half(at) {
                    assert!(insn.off >= 0, "{program:?} {at}: {insn}");
                    let to = at + 1 + usize::try_from(insn.off).expect("forward");
                    assert!(to < code.len() && !second_half(to), "{program:?} {at}: {insn}");
                }
            }
            assert_eq!(code.last().map(|insn| insn.code), Some(EXIT));
        }
    }

    #[test]
    fn a_name_tells_role_and_constants() {
        let [out, into] = programs();
        let names = [
            out.name(),
            into.name(),
            Program { mtu: 1_430, ..out }.name(),
            Program { source: Mac([2, 0, 0, 1, 0, 4]), ..out }.name(),
        ];
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 4, "{names:?}");
        assert!(names.iter().all(|name| name.len() == 15 && name.starts_with(PROGRAM_PREFIX)), "{names:?}");
        assert_eq!(out.name(), programs()[0].name());
    }

    #[test]
    fn prefixes_come_back_from_their_keys() {
        for text in ["10.57.0.0/16", "10.57.1.7/32", "0.0.0.0/0", "fd57::/32", "fd57:0:0:1::7/128"] {
            let net: IpNet = text.parse().expect("a prefix");
            let (len, key) = prefix_of(net);
            assert_eq!(net_of(len, key), Some(net), "{text}");
        }
        assert_eq!(prefix_of("10.57.0.0/16".parse().expect("a prefix")).0, 112);
        assert_eq!(net_of(64, key_of(IpAddr::from([10, 0, 0, 0]))), None, "a part of the mark of IPv4");
        assert_eq!(net_of(300, [0; 16]), None);
    }

    #[test]
    fn descriptors_take_the_place_of_maps() {
        let code = programs()[0].instructions();
        let loads: Vec<_> = code.iter().filter(|insn| insn.code == LOAD_64).collect();
        assert!(loads.len() >= 4);
        for load in loads {
            let bytes = load.bytes(|map| 70 + map as i32);
            assert_eq!(i32::from_ne_bytes(bytes[4..].try_into().expect("four bytes")), 70 + load.imm);
        }
    }
}

//! DNS messages: one question in, one answer (or a request to forward it) out.
//!
//! Owns: parsing and encoding (RFC 1035, EDNS of RFC 6891), and what is answered to malformed, strange or large
//! messages. Must not know: sockets and upstreams. Pure; no tasks, no channels. No input makes it panic.

use std::net::IpAddr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SRV},
    },
    serialize::binary::{BinEncodable, BinEncoder},
};
use skein_api::NetworkId;

use super::zone::{Answer, Family, Zone};

/// Life of our answers, seconds: short, since containers move; not 0, which some resolvers treat as an error.
pub const TTL_S: u32 = 2;

/// Least that a client takes over UDP (RFC 1035, 4.2.1), bytes.
pub const UDP_MIN_BYTES: u16 = 512;

/// Most that we send over UDP, bytes: fits in one packet of IPv6's least MTU (1280 - 40 - 8), the value that resolvers
/// agreed on in 2020.
pub const UDP_MAX_BYTES: u16 = 1232;

/// Most over TCP: what its 16 bit length can say.
pub const TCP_MAX_BYTES: u16 = u16::MAX;

/// Length of the fixed header, bytes (RFC 1035, 4.1.1).
const HEADER_BYTES: usize = 12;

/// Least length of a question, bytes: the root's name, type, class (RFC 1035, 4.1.2).
const QUESTION_BYTES_MIN: usize = 5;

/// Least length of a record, bytes: the root's name, type, class, time to live, length (RFC 1035, 4.1.3).
const RECORD_BYTES_MIN: usize = 11;

/// Who asks, and how.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// The network whose socket got the question.
    pub network: &'a NetworkId,
    /// Source address.
    pub client: IpAddr,
    /// Over TCP: large answers are possible.
    pub tcp: bool,
}

/// What to do with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Send this back.
    Reply(Vec<u8>),
    /// Ask the host's resolvers, with the packet as it is.
    Forward(Question),
    /// Not a question at all: an answer to it could start a loop between two servers.
    Drop,
}

/// A question that goes to the host's resolvers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The id that the client chose.
    pub id: u16,
    /// The question, to compare with the answer's.
    pub query: Query,
    /// Most bytes that the client takes.
    pub max_bytes: u16,
    /// The client sent EDNS.
    pub edns: bool,
}

/// Reads a message. The library makes room for as many questions and records as the header announces: 65,535 of each in
/// a packet of 12 bytes would take tens of megabytes. So the header must not announce more than the packet can hold.
fn read(packet: &[u8]) -> Option<Message> {
    let count = |at: usize| packet.get(at..at + 2).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]])));
    let records = count(6)? + count(8)? + count(10)?;
    let least = HEADER_BYTES + count(4)? * QUESTION_BYTES_MIN + records * RECORD_BYTES_MIN;
    if packet.len() < least {
        return None;
    }
    Message::from_vec(packet).ok()
}

/// Decides about one packet. `rotation` turns the order of the addresses of a shared name.
pub fn decide(zone: &Zone, asker: Asker<'_>, packet: &[u8], rotation: usize) -> Outcome {
    // QR is the highest bit of the third byte (RFC 1035, 4.1.1).
    if packet.len() < HEADER_BYTES || packet[2] & 0x80 != 0 {
        return Outcome::Drop;
    }
    let id = u16::from_be_bytes([packet[0], packet[1]]);
    let Some(message) = read(packet) else {
        return reply(Message::error_msg(id, OpCode::Query, ResponseCode::FormErr), UDP_MIN_BYTES);
    };
    let max_bytes = match asker.tcp {
        true => TCP_MAX_BYTES,
        false => message.max_payload().clamp(UDP_MIN_BYTES, UDP_MAX_BYTES),
    };
    let mut answer = Message::response(id, message.metadata.op_code);
    answer.metadata.recursion_desired = message.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.add_queries(message.queries.iter().cloned());
    if message.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_MAX_BYTES);
        answer.set_edns(edns);
    }
    if message.metadata.op_code != OpCode::Query {
        answer.metadata.response_code = ResponseCode::NotImp;
        return reply(answer, max_bytes);
    }
    let [query] = message.queries.as_slice() else {
        answer.metadata.response_code = ResponseCode::FormErr;
        return reply(answer, max_bytes);
    };
    if query.query_class() != DNSClass::IN {
        answer.metadata.response_code = ResponseCode::Refused;
        return reply(answer, max_bytes);
    }
    let records = match find(zone, asker, query, rotation) {
        Found::Records(records) => records,
        Found::Nobody => {
            answer.metadata.response_code = ResponseCode::NXDomain;
            Vec::new()
        }
        Found::Elsewhere => {
            let query = query.clone();
            return Outcome::Forward(Question { id, query, max_bytes, edns: message.edns.is_some() });
        }
    };
    answer.metadata.authoritative = true;
    answer.add_answers(records);
    reply(answer, max_bytes)
}

enum Found {
    Records(Vec<Record>),
    Nobody,
    Elsewhere,
}

fn find(zone: &Zone, asker: Asker<'_>, query: &Query, rotation: usize) -> Found {
    let name = query.name();
    let record = |data| Record::from_rdata(name.clone(), TTL_S, data);
    if query.query_type() == RecordType::PTR
        && let Some(address) = host_address(name)
    {
        return found(zone.address(asker.network, asker.client, address), |known| {
            // A name that does not fit the wire's rules (too long) is as good as none.
            match Name::from_ascii(known + ".") {
                Ok(known) => Found::Records(vec![record(RData::PTR(PTR(known)))]),
                Err(_) => Found::Nobody,
            }
        });
    }
    if query.query_type() == RecordType::SRV {
        return found(zone.servers(asker.network, asker.client, &plain(name)), |servers| {
            // A name that does not fit the wire's rules is as good as none. All have the same chance (RFC 2782).
            let named = rotated(servers, rotation).filter_map(|(port, target)| {
                let target = Name::from_ascii(target + ".").ok()?;
                Some(RData::SRV(SRV::new(0, 0, port, target)))
            });
            Found::Records(named.map(record).collect())
        });
    }
    let family = match query.query_type() {
        RecordType::A => Family::V4,
        RecordType::AAAA => Family::V6,
        RecordType::ANY => Family::Both,
        _ => Family::Neither,
    };
    found(zone.name(asker.network, asker.client, &plain(name), family), |addresses| {
        let data = rotated(addresses, rotation).map(|a| match a {
            IpAddr::V4(a) => RData::A(A(a)),
            IpAddr::V6(a) => RData::AAAA(AAAA(a)),
        });
        Found::Records(data.map(record).collect())
    })
}

fn found<T>(answer: Answer<T>, known: impl FnOnce(T) -> Found) -> Found {
    match answer {
        Answer::Known(what) => known(what),
        Answer::Unknown => Found::Nobody,
        Answer::Forward => Found::Elsewhere,
    }
}

/// All of them, from another one on at each question.
fn rotated<T>(mut all: Vec<T>, rotation: usize) -> impl Iterator<Item = T> {
    if !all.is_empty() {
        let turn = rotation % all.len();
        all.rotate_left(turn);
    }
    all.into_iter()
}

/// The labels with dots between them and nothing escaped: what the table's keys look like. Bytes that are not UTF-8
/// become a character that no key has.
fn plain(name: &Name) -> String {
    let labels: Vec<_> = name.iter().map(String::from_utf8_lossy).collect();
    labels.join(".")
}

/// The whole address that an `in-addr.arpa` or `ip6.arpa` name is about.
fn host_address(name: &Name) -> Option<IpAddr> {
    let net = name.parse_arpa_name().ok()?;
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

/// An answer without records to a forwarded question: what clients get when the host's resolvers fail.
pub fn failure(question: &Question, code: ResponseCode) -> Vec<u8> {
    let mut message = Message::error_msg(question.id, OpCode::Query, code);
    message.metadata.recursion_desired = true;
    message.metadata.recursion_available = true;
    message.add_query(question.query.clone());
    if question.edns {
        message.set_edns(Edns::new());
    }
    encode(&message, question.max_bytes)
}

/// Checks an upstream's answer and makes it fit the client: the client's id, and if it is too long for it, only the
/// question with the "truncated" bit. None: not an answer to this question.
pub fn relay(question: &Question, upstream_id: u16, mut packet: Vec<u8>) -> Option<Vec<u8>> {
    if packet.len() < HEADER_BYTES || packet[..2] != upstream_id.to_be_bytes() {
        return None;
    }
    let message = read(&packet)?;
    let ours = message.metadata.message_type == MessageType::Response
        && matches!(message.queries.as_slice(), [q] if q.name() == question.query.name()
            && q.query_type() == question.query.query_type() && q.query_class() == question.query.query_class());
    // A server that cannot read the question answers FORMERR without it.
    let bare_error = message.queries.is_empty() && message.metadata.response_code != ResponseCode::NoError;
    if !ours && !bare_error {
        return None;
    }
    if packet.len() > usize::from(question.max_bytes) {
        let mut short = message.truncate();
        short.metadata.id = question.id;
        return Some(encode(&short, question.max_bytes));
    }
    packet[..2].copy_from_slice(&question.id.to_be_bytes());
    Some(packet)
}

/// The "truncated" bit of an answer (RFC 1035, 4.1.1).
pub fn is_truncated(packet: &[u8]) -> bool {
    packet.get(2).is_some_and(|b| b & 0x02 != 0)
}

fn reply(message: Message, max_bytes: u16) -> Outcome {
    Outcome::Reply(encode(&message, max_bytes))
}

/// Encodes within a size; what does not fit is left out and the "truncated" bit set.
fn encode(message: &Message, max_bytes: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(usize::from(UDP_MIN_BYTES));
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(max_bytes);
    if message.emit(&mut encoder).is_ok() {
        return bytes;
    }
    // Not even the question fits or a name cannot be encoded: a bare failure, which always can.
    let bare = Message::error_msg(message.metadata.id, message.metadata.op_code, ResponseCode::ServFail);
    bare.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dns::zone::tests::{endpoint, network, sample};

    fn ask(name: &str, record_type: RecordType) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), record_type));
        message.to_vec().unwrap()
    }

    fn asker(network: &NetworkId, tcp: bool) -> Asker<'_> {
        Asker { network, client: "10.1.1.11".parse().unwrap(), tcp }
    }

    fn answer(zone: &Zone, packet: &[u8], rotation: usize, tcp: bool) -> Option<Message> {
        match decide(zone, asker(&NetworkId::new("net1"), tcp), packet, rotation) {
            Outcome::Reply(bytes) => Some(Message::from_vec(&bytes).unwrap()),
            Outcome::Forward(_) => None,
            Outcome::Drop => panic!("dropped"),
        }
    }

    #[test]
    fn questions() {
        let zone = sample();
        let check = |name: &str, t: RecordType, rotation: usize, code: ResponseCode, want: &[&str]| {
            let got = answer(&zone, &ask(name, t), rotation, false).unwrap();
            let data: Vec<String> = got.answers.iter().map(|r| r.data.to_string()).collect();
            assert_eq!(
                (got.metadata.response_code, data),
                (code, want.iter().map(|s| s.to_string()).collect()),
                "{name}"
            );
            assert_eq!(got.metadata.id, 7);
            assert!(got.answers.iter().all(|r| (1..=5).contains(&r.ttl)));
        };
        use ResponseCode::{NXDomain, NoError};
        check("web.", RecordType::A, 0, NoError, &["10.1.1.10", "10.1.1.11"]);
        check("web.", RecordType::A, 1, NoError, &["10.1.1.11", "10.1.1.10"]);
        check("wEb.", RecordType::A, 2, NoError, &["10.1.1.10", "10.1.1.11"]);
        check("web.1.", RecordType::AAAA, 0, NoError, &["fd00:0:0:1::10a"]);
        check("web.", RecordType::MX, 0, NoError, &[]);
        check("cron.", RecordType::A, 0, NoError, &[]);
        check("nobody.", RecordType::A, 0, NXDomain, &[]);
        check("10.1.1.10.IN-ADDR.arpa.", RecordType::PTR, 0, NoError, &["web.1.shop_default."]);
        check("99.1.1.10.in-addr.arpa.", RecordType::PTR, 0, NXDomain, &[]);
        check("11.1.1.10.in-addr.arpa.", RecordType::PTR, 0, NoError, &["web.2.shop_default."]);
        assert!(answer(&zone, &ask("example.org.", RecordType::A), 0, false).is_none());
    }

    #[test]
    fn servers_of_a_service() {
        let mut one = endpoint(1, 10, &["web.1"], &["web"], true);
        one.ports = vec![(skein_api::Protocol::Tcp, 80)];
        let zone = Zone::build(&[network(1, "shop_default", false)], &[], &[one], []);
        let got = answer(&zone, &ask("_80._tcp.web.", RecordType::SRV), 0, false).unwrap();
        let data: Vec<String> = got.answers.iter().map(|r| r.data.to_string()).collect();
        assert_eq!(data, ["0 0 80 web.1.shop_default."]);
        let got = answer(&zone, &ask("_81._tcp.web.", RecordType::SRV), 0, false).unwrap();
        assert_eq!((got.metadata.response_code, got.answers.len()), (ResponseCode::NoError, 0));
        assert!(answer(&zone, &ask("_xmpp._tcp.example.org.", RecordType::SRV), 0, false).is_none(), "forwarded");
    }

    #[test]
    fn strange_messages() {
        let zone = sample();
        let net = NetworkId::new("net1");
        assert_eq!(decide(&zone, asker(&net, false), &[1, 2, 3], 0), Outcome::Drop);
        let mut response = ask("web.", RecordType::A);
        response[2] |= 0x80;
        assert_eq!(decide(&zone, asker(&net, false), &response, 0), Outcome::Drop);
        let mut cut = ask("web.", RecordType::A);
        cut.truncate(cut.len() - 3);
        assert_eq!(answer(&zone, &cut, 0, false).unwrap().metadata.response_code, ResponseCode::FormErr);
        let mut status = ask("web.", RecordType::A);
        status[2] = 0x10;
        assert_eq!(answer(&zone, &status, 0, false).unwrap().metadata.response_code, ResponseCode::NotImp);
        let mut chaos = ask("web.", RecordType::A);
        let end = chaos.len();
        chaos[end - 1] = 3;
        assert_eq!(answer(&zone, &chaos, 0, false).unwrap().metadata.response_code, ResponseCode::Refused);
        let none = Message::new(7, MessageType::Query, OpCode::Query).to_vec().unwrap();
        assert_eq!(answer(&zone, &none, 0, false).unwrap().metadata.response_code, ResponseCode::FormErr);
    }

    #[test]
    fn large_answers_are_cut_over_udp_and_whole_over_tcp() {
        let endpoints: Vec<_> = (2..=201).map(|i| endpoint(1, i, &[], &["web"], true)).collect();
        let zone = Zone::build(&[network(1, "n", false)], &[], &endpoints, []);
        let packet = ask("web.", RecordType::A);
        let cut = answer(&zone, &packet, 0, false).unwrap();
        assert!(cut.metadata.truncation && cut.answers.len() < 200, "{}", cut.answers.len());
        let whole = answer(&zone, &packet, 0, true).unwrap();
        assert!(!whole.metadata.truncation);
        assert_eq!(whole.answers.len(), 200);
    }

    #[test]
    fn relayed_answers_must_match() {
        let zone = sample();
        let packet = ask("example.org.", RecordType::A);
        let Outcome::Forward(question) = decide(&zone, asker(&NetworkId::new("net1"), false), &packet, 0) else {
            panic!("not forwarded");
        };
        let answer_to = |name: &str, id: u16| {
            let mut m = Message::response(id, OpCode::Query);
            m.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
            m.to_vec().unwrap()
        };
        let good = relay(&question, 99, answer_to("example.org.", 99)).unwrap();
        assert_eq!(&good[..2], &7u16.to_be_bytes());
        assert_eq!(relay(&question, 99, answer_to("example.org.", 98)), None, "another id");
        assert_eq!(relay(&question, 99, answer_to("evil.org.", 99)), None, "another question");
        assert_eq!(relay(&question, 7, packet), None, "a question, not an answer");
        let failed = Message::from_vec(&failure(&question, ResponseCode::ServFail)).unwrap();
        assert_eq!((failed.metadata.id, failed.metadata.response_code), (7, ResponseCode::ServFail));
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet in proptest::collection::vec(any::<u8>(), 0..600), tcp: bool, rotation: usize) {
            let zone = sample();
            decide(&zone, asker(&NetworkId::new("net1"), tcp), &packet, rotation);
        }

        #[test]
        fn no_damaged_question_panics(at in 0usize..40, value: u8, cut in 0usize..40) {
            let zone = sample();
            let mut packet = ask("tasks.web.shop_default.", RecordType::A);
            let len = packet.len();
            packet[at.min(len - 1)] = value;
            packet.truncate(len - cut.min(len));
            let net = NetworkId::new("net1");
            if let Outcome::Forward(question) = decide(&zone, asker(&net, false), &packet, 0) {
                failure(&question, ResponseCode::ServFail);
                relay(&question, question.id, packet);
            }
        }
    }
}

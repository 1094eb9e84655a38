//! What the kernel and its tools answer, damaged or invented.

use std::net::IpAddr;

use netlink_packet_core::{NLMSG_DONE, NLMSG_ERROR};
use skein_fuzz::{Form, Verdict};

use super::{
    conntrack, elements,
    messages::{Tables, parse_link},
    socket::{outcome, replies},
    tools::{parse_docker_user, parse_table},
};
use crate::{
    names,
    plan::{Op, plan},
    state::{Desired, Direction, Observed, Owned},
};

/// Everything in a table hangs on a link of the same namespace.
fn hangs_together(found: &Observed) {
    let known = |dev: &String| assert!(found.links.contains_key(dev), "{dev} is no link");
    found.addrs.iter().for_each(|(dev, _)| known(dev));
    found.neighs.keys().for_each(|(dev, _)| known(dev));
    found.fdb.keys().for_each(|(dev, _)| known(dev));
    found.nexthops.values().for_each(|hop| known(&hop.dev));
}

/// Of what is not wanted only our own is removed, whatever the kernel says is there.
fn only_ours(op: &Op) {
    let ours = |dev: &String| assert!(Owned::Fabric.link(dev), "{op:?}");
    match op {
        Op::DeleteLink(dev) | Op::DeleteNeigh(dev, _) | Op::DeleteFdb(dev, ..) | Op::DeleteAddr(dev, _) => ours(dev),
        Op::DeleteRoute(_, route) => assert_eq!(route.protocol, names::RTPROT_SKEIN, "{op:?}"),
        Op::DeleteNexthop(_) => {}
        other => panic!("nothing is wanted: {other:?}"),
    }
}

/// Datagrams of rtnetlink, from their split into messages to the plan that is made of what they say.
#[test]
fn netlink() {
    // A message of 16 bytes may become a route of 200, held as the library's type, in the table and in the plan's copy.
    skein_fuzz::target!("netlink").inputs(8_000).memory(128, 64 << 10).run_mutants(Form::Bytes, |input| {
        let mut tables = Tables::default();
        let mut bytes = 0;
        for reply in replies(input) {
            bytes += reply.body.len();
            match reply.kind {
                NLMSG_ERROR | NLMSG_DONE => drop(outcome(&reply)),
                kind => {
                    // What `Tables` reads by hand, without the library, is refused here.
                    let read = tables.add(kind, reply.body).is_ok();
                    assert!(read || parse_link(kind, reply.body).is_err(), "a link was passed over");
                }
            }
        }
        assert!(bytes <= input.len(), "no byte is read twice");
        let found = tables.found;
        hangs_together(&found);
        let made = plan(&Desired::empty(Owned::Fabric), &found);
        made.ops.iter().for_each(only_ours);
        Verdict::from(found != Observed::default())
    });
}

/// Entries of the table of connections: only those that were translated to a container of ours are forgotten.
#[test]
fn conntrack_entries() {
    let target = IpAddr::from([10, 57, 1, 8]);
    skein_fuzz::target!("conntrack_entries").inputs(40_000).run_mutants(Form::Bytes, |input| {
        let Some(removal) = conntrack::removal(input, |flow| flow.answers == target) else {
            return Verdict::Refused;
        };
        assert!(removal.body.len() <= input.len(), "what is removed is named in the entry's own words");
        let ours = [10, 57, 1, 8];
        assert!(input.windows(4).any(|w| w == ours), "translated to {ours:?}");
        Verdict::Accepted
    });
}

/// Listings of `nft -j`.
#[test]
fn nft_tables() {
    skein_fuzz::target!("nft_tables").inputs(1_000).memory(256, 64 << 10).run_mutants(Form::Json, |input| {
        let Ok(json) = serde_json::from_slice(input) else { return Verdict::Refused };
        let Ok(Some(view)) = parse_table(&json) else { return Verdict::Refused };
        let rules: usize = view.chains.values().map(|(_, tags)| tags.len()).sum();
        let listed =
            json["nftables"].as_array().expect("it was read").iter().filter(|o| o.get("rule").is_some()).count();
        assert!(rules <= listed, "{rules} rules out of {listed}");
        assert!(view.same_frame(&view), "a table is like itself");
        Verdict::Accepted
    });
}

/// Elements of a map: as many as the message can have, and what is read of each is one line.
#[test]
fn nft_elements() {
    let kind = "inet_proto . inet_service . integer : ipv4_addr . inet_service";
    skein_fuzz::target!("nft_elements").inputs(40_000).run_mutants(Form::Bytes, |input| {
        let found = elements::parse(input, kind);
        // An element takes at least the heads of three attributes.
        assert!(found.len() * 12 <= input.len(), "{} elements in {} bytes", found.len(), input.len());
        let fine = |text: &String| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b" .:".contains(&byte));
        assert!(found.iter().all(|(key, value)| fine(key) && fine(value)), "{found:?}");
        Verdict::from(!found.is_empty())
    });
}

/// Listings of `iptables -S DOCKER-USER`.
#[test]
fn docker_user() {
    let words =
        &["-A DOCKER-USER", "-i", "-o", "ske-+", "-m comment", "--comment", "skein", "-j ACCEPT", "-j RETURN", "-s"];
    skein_fuzz::target!("docker_user").inputs(20_000).run_mutants(Form::Text(words), |input| {
        let text = String::from_utf8_lossy(input);
        let found = parse_docker_user(&text);
        for (direction, flag) in [(Direction::In, "-i"), (Direction::Out, "-o")] {
            let ours = |line: &str| [flag, "ske-+", "skein", "ACCEPT"].iter().all(|w| line.contains(w));
            assert!(!found.contains(&direction) || text.lines().any(ours), "{direction:?} was not there");
        }
        Verdict::from(!found.is_empty())
    });
}

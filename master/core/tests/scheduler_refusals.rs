//! What is refused before any scheduling: expressions that exclude each other, and requests larger than any host.

use std::collections::BTreeMap;

use master_core::scheduler::{NodeFacts, Request, Scheduler};
use proptest::{prelude::*, sample::select};
use skein_api::{NodeId, Resources, Strategy as Choice, TaskSpec};

const GIB: u64 = 1 << 30;
const CPU: u64 = 1_000_000_000;

/// A request with these expressions; those with a prefix are affinities and whitelists.
fn request(expressions: &[&str]) -> Request {
    let mut spec = TaskSpec::default();
    for text in expressions {
        let list = match text.split_once(':').map(|(kind, _)| kind) {
            Some("affinity") => &mut spec.placement.affinities,
            Some("whitelist") => &mut spec.placement.whitelists,
            _ => &mut spec.placement.constraints,
        };
        list.push((*text).to_owned());
    }
    Request::compile(&spec, None, None, Choice::Spread).unwrap_or_else(|err| panic!("{err}"))
}

#[test]
fn expressions_that_exclude_each_other_are_named() {
    let check = |expressions: &[&str], expected: &str| {
        let found = request(expressions).contradiction().map(|c| c.to_string());
        assert_eq!(found.as_deref().unwrap_or("none"), expected, "{expressions:?}");
    };
    check(
        &["zone==a", "disk==ssd", "zone==b"],
        "constraint zone==a and constraint zone==b can never both hold: a node has one value of zone",
    );
    check(
        &["zone==a", "zone!=a"],
        "constraint zone==a and constraint zone!=a can never both hold: zone!=a excludes all that zone==a allows",
    );
    check(
        &["node.labels.zone!=/^a/", "node.labels.zone==ab"],
        "constraint node.labels.zone!=/^a/ and constraint node.labels.zone==ab can never both hold: \
         node.labels.zone!=/^a/ excludes all that node.labels.zone==ab allows",
    );
    check(
        &["affinity:container==db", "affinity:container!=d*"],
        "affinity container==db and affinity container!=d* can never both hold: \
         container!=d* excludes all that container==db allows",
    );
    check(
        &["whitelist:node==a|b", "node!=/^[ab]$/"],
        "whitelist node==a|b and constraint node!=/^[ab]$/ can never both hold: \
         node!=/^[ab]$/ excludes all that node==a|b allows",
    );
    let some = |expressions: &[&str]| {
        assert!(request(expressions).contradiction().is_some(), "{expressions:?}");
    };
    some(&["zone==a", "zone==/^b/"]);
    some(&["zone==a*", "zone==b*"]);
    some(&["zone==*a", "zone==*b"]);
    some(&["zone==s*", "zone!=*"]);
    some(&["zone==ab*c", "zone!=a*"]);
    some(&["zone==/x/", "zone!=/x/"]);
    some(&["zone==/x/", "zone!=*"]);
    some(&["node.labels.zone==a", "zone==b"]);
    some(&["zone!=a*", "node.labels.zone==ab"]);
    some(&["node.id==a", "node.id==b"]);
    some(&["node.platform.arch==amd64", "node.platform.arch==arm64"]);
    some(&["node.ip==10.0.0.0/24", "node.ip!=10.0.0.0/8"]);
    some(&["affinity:volume==data", "affinity:volume!=data"]);
    some(&["affinity:service!=web", "affinity:service==web"]);
    let none = |expressions: &[&str]| check(expressions, "none");
    none(&["zone==a", "disk==b"]);
    none(&["zone==a", "zone==~b"]);
    none(&["zone!=a", "zone!=b"]);
    none(&["zone==a*", "zone==ab*", "zone==*c", "zone!=abd*"]);
    none(&["zone==a*", "zone!=ab"]);
    // A name and an id; two addresses; two containers.
    none(&["node==a", "node==b"]);
    none(&["node.ip==10.0.0.1", "node.ip==fd00::1"]);
    none(&["affinity:container==a", "affinity:container==b"]);
    // Two names of one architecture, and what begins one of them.
    none(&["node.platform.arch==amd64", "node.platform.arch==x86_64"]);
    none(&["node.platform.arch==amd64", "node.platform.arch==x86*"]);
    // A node without the label has the engine's.
    none(&["node.labels.zone!=a", "zone==a"]);
    none(&["engine.labels.zone==a", "zone==b"]);
}

/// Every combination of a node's and an engine's label, and an architecture: what an expression could tell apart.
fn all_nodes() -> Scheduler {
    const VALUES: &[Option<&str>] = &[None, Some(""), Some("a"), Some("b"), Some("ab"), Some("ba"), Some("aa")];
    let mut scheduler = Scheduler::new();
    for (n, zone) in VALUES.iter().enumerate() {
        for (m, engine) in VALUES.iter().enumerate() {
            for arch in ["", "x86_64", "aarch64"] {
                let label = |value: &Option<&str>| value.map(|v| ("zone".to_owned(), v.to_owned()));
                scheduler.apply_node(NodeFacts {
                    id: NodeId::new(format!("{n}{m}{arch}")),
                    name: VALUES[(n + m) % VALUES.len()].unwrap_or("b").to_owned(),
                    ready: true,
                    labels: label(zone).into_iter().collect(),
                    engine_labels: label(engine).into_iter().collect(),
                    arch: arch.to_owned(),
                    addresses: vec![format!("10.0.{n}.{m}"), format!("fd00::{n}")],
                    ..NodeFacts::default()
                });
            }
        }
    }
    scheduler
}

fn expression() -> impl Strategy<Value = String> {
    const KEYS: &[&str] = &["zone", "node.labels.zone", "engine.labels.zone", "node", "node.name"];
    const VALUES: &[&str] = &["a", "b", "ab", "a*", "*a", "*b", "*", "a*b", "/a/", "/^b/", "/^a|b$/", "/(?i)B$/"];
    let of_labels = (select(KEYS), select(VALUES));
    const ARCHS: &[&str] = &["amd64", "x86_64", "arm64", "x86*", "*64", "/arm/"];
    let of_archs = (Just("node.platform.arch"), select(ARCHS));
    const IPS: &[&str] = &["10.0.0.0/16", "10.0.1.0/24", "10.0.1.1", "fd00::/16", "fd00::1", "10.*"];
    let of_ips = (Just("node.ip"), select(IPS));
    let whitelists = select(vec!["whitelist:node==a|b", "whitelist:node==ab"]).prop_map(str::to_owned);
    let constraint = prop_oneof![4 => of_labels, 1 => of_archs, 1 => of_ips];
    let op = select(vec!["==", "==", "!="]);
    let written = (constraint, op).prop_map(|((key, value), op)| format!("{key}{op}{value}"));
    prop_oneof![9 => written, 1 => whitelists]
}

proptest! {
    // Some 0.3 s in the dev profile.
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_called_a_contradiction_holds_nowhere(expressions in prop::collection::vec(expression(), 2..4)) {
        let words: Vec<&str> = expressions.iter().map(String::as_str).collect();
        if request(&words).contradiction().is_some() {
            let nodes = NODES.with(|nodes| nodes.fitting(&request(&words)));
            prop_assert!(nodes.is_empty(), "{words:?} hold on {nodes:?}");
        }
    }
}

thread_local! {
    static NODES: Scheduler = all_nodes();
}

#[test]
fn a_request_larger_than_every_host_says_so() {
    let mut scheduler = Scheduler::new();
    for (name, zone, cpus, gib, gpus) in [("small", "a", 4, 64, 2), ("wide", "b", 16, 8, 0), ("far", "c", 64, 256, 8)] {
        scheduler.apply_node(NodeFacts {
            id: NodeId::new(format!("id-{name}")),
            name: name.to_owned(),
            labels: BTreeMap::from([("zone".to_owned(), zone.to_owned())]),
            // Whether it is ready now does not make it larger.
            ready: false,
            offered: Resources { nano_cpus: cpus * CPU, mem_bytes: gib * GIB },
            generic: BTreeMap::from([("gpu".to_owned(), gpus)]),
            slots: Some(0),
            ..NodeFacts::default()
        });
    }
    let check = |constraint: &str, nano_cpus: u64, mem_bytes: u64, gpus: u64, expected: &str| {
        let mut spec = TaskSpec::default();
        spec.placement.constraints = vec![constraint.to_owned()];
        spec.resources.reservations = Resources { nano_cpus, mem_bytes };
        spec.resources.generic = BTreeMap::from([("gpu".to_owned(), gpus)]);
        let request = Request::compile(&spec, None, None, Choice::Spread).unwrap();
        let found = scheduler.too_large(&request).map(|large| large.to_string());
        assert_eq!(found.as_deref().unwrap_or("fits"), expected);
    };
    check("zone==*", 64 * CPU, 256 * GIB, 8, "fits");
    check(
        "zone==*",
        0,
        300 * GIB,
        0,
        "300 GiB of memory is more than the largest host offers: far has 256 GiB of memory",
    );
    // Of the hosts that meet the constraints.
    check("zone!=c", 17 * CPU, 0, 0, "17 CPUs is more than the largest host offers: wide has 16 CPUs");
    check(
        "zone!=c",
        32 * CPU,
        0,
        3,
        "32 CPUs is more than the largest host offers: wide has 16 CPUs; \
         3 gpu is more than the largest host offers: small has 2 gpu",
    );
    check(
        "zone!=c",
        8 * CPU,
        32 * GIB,
        0,
        "no host offers 8 CPUs and 32 GiB of memory together: wide has the most CPU with 16 CPUs, \
         small has the most memory with 64 GiB of memory",
    );
    check("zone==nowhere", 100 * CPU, 0, 0, "fits");
}

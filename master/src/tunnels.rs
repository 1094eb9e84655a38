//! Checks the tunnels between hosts: every pair, one host with all others, and by itself hosts that have just joined.
//!
//! Owns: which pairs, over which network, when, and the one sentence. Must not know: how probes go. Hosts open places
//! first, then each sends to the others'; the streams that keep the places open end with the check.
//!
//! Tasks: [`watch_new`] is one. No channels; what it found is shared behind a lock.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use master_core::Core;
use skein_api::{
    ApiError, CHECKED_MAX, CheckReport, CheckTarget, HostCheck, NetQuestion, NetworkId, Node, NodeId, NodeState,
    PLACES_MAX, ProbePlace,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    ask::{Asked, Asker},
    broker::AgentStream,
    cluster,
};

/// How often new hosts are looked for.
const LOOK: Duration = Duration::from_secs(10);
/// How long after it joined a host counts as new: it is checked as soon as it has a network with others.
const NEW_FOR: Duration = Duration::from_secs(24 * 3_600);
/// With how many others a new host is checked: what is wrong with it shows with any of them.
const PARTNERS_MAX: usize = 4;
/// How soon a host is checked again that something is wrong with.
const AGAIN: Duration = Duration::from_secs(60);
/// New hosts that are checked in one look: each takes some tenths of a second, and some seconds when all is lost.
const NEW_MAX: usize = 8;

/// A pair, and the network whose tunnel it uses.
type Pairs = BTreeMap<(NodeId, NodeId), NetworkId>;

/// What is to be checked.
#[derive(Debug)]
pub struct Plan {
    hosts: Vec<Asked>,
    pairs: Pairs,
    /// Pairs without a network of both, by name.
    apart: Vec<(String, String)>,
}

impl Plan {
    /// All pairs, or those of one host. Of several networks of a pair the first by name is used: the tunnel between two
    /// hosts is the same for all of them.
    ///
    /// # Errors
    /// The node is not there, or there are too many hosts for all pairs.
    pub fn of(core: &Core, node: Option<&str>) -> Result<Self, ApiError> {
        let model = core.model();
        let one = node.map(|reference| model.find_node(reference).map(|node| node.id.clone())).transpose()?;
        let mut hosts: Vec<Asked> =
            model.nodes.values().map(|n| Asked { node: n.id.clone(), name: n.name.clone() }).collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        if one.is_none() && hosts.len() > CHECKED_MAX {
            let message = format!("{} hosts are too many pairs for one check, {CHECKED_MAX} can be", hosts.len());
            return Err(ApiError::new("too_many", message).with_hint("skein net check NODE"));
        }
        let mut networks: Vec<_> = model.networks.values().collect();
        networks.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        let mut of_host: BTreeMap<&NodeId, Vec<&NetworkId>> = BTreeMap::new();
        for network in networks {
            for member in model.members(&network.id) {
                of_host.entry(member).or_default().push(&network.id);
            }
        }
        let (mut pairs, mut apart) = (Pairs::new(), Vec::new());
        let mut pair = |a: &Asked, b: &Asked| {
            let theirs: BTreeSet<_> = of_host.get(&b.node).into_iter().flatten().collect();
            match of_host.get(&a.node).into_iter().flatten().find(|n| theirs.contains(n)) {
                Some(network) => drop(pairs.insert((a.node.clone(), b.node.clone()), (*network).clone())),
                None => apart.push((a.name.clone(), b.name.clone())),
            }
        };
        match one.and_then(|one| hosts.iter().find(|host| host.node == one)) {
            Some(one) => hosts.iter().filter(|host| host.node != one.node).for_each(|host| pair(one, host)),
            None => {
                for (at, a) in hosts.iter().enumerate() {
                    hosts.iter().skip(at + 1).for_each(|b| pair(a, b));
                }
            }
        }
        let partners: BTreeSet<NodeId> = pairs.keys().flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
        hosts.retain(|host| partners.contains(&host.node));
        Ok(Self { hosts, pairs, apart })
    }

    /// A host with some others that are ready, over one network. O(members of all networks).
    fn few(core: &Core, node: &NodeId) -> Option<Self> {
        let model = core.model();
        let host = |id: &NodeId| Some(Asked { node: id.clone(), name: model.nodes.get(id)?.name.clone() });
        let others = |network: &NetworkId| {
            let others = model.members(network).filter(|n| *n != node && core.is_ready(n));
            others.take(PARTNERS_MAX).cloned().collect::<Vec<_>>()
        };
        let (network, others) =
            model.node_networks(node).find_map(|n| Some((n, others(n))).filter(|(_, others)| !others.is_empty()))?;
        let pairs = others.iter().map(|other| ((node.clone(), other.clone()), network.clone())).collect();
        let hosts = std::iter::once(node).chain(&others).filter_map(host).collect();
        Some(Self { hosts, pairs, apart: Vec::new() })
    }

    /// The networks in which a host needs places.
    fn networks(&self, host: &NodeId) -> Vec<NetworkId> {
        let of_host = self.pairs.iter().filter(|((a, b), _)| a == host || b == host);
        let networks: BTreeSet<NetworkId> = of_host.map(|(_, network)| network.clone()).collect();
        networks.into_iter().take(PLACES_MAX).collect()
    }

    /// Hosts that answered and opened no place where one is needed.
    fn unopened(&self, places: &BTreeMap<NodeId, Vec<ProbePlace>>) -> Vec<String> {
        let mut found = BTreeSet::new();
        for ((a, b), network) in &self.pairs {
            for host in self.hosts.iter().filter(|host| host.node == *a || host.node == *b) {
                let opened = places.get(&host.node);
                let has = |all: &Vec<ProbePlace>| all.iter().any(|p| p.network == *network && !p.sockets.is_empty());
                if opened.is_some_and(|all| !has(all)) {
                    let (name, network) = (&host.name, network.short());
                    found.insert(format!("{name} has no free address for probes in network {network}"));
                }
            }
        }
        found.into_iter().collect()
    }

    /// Where a host sends to: the places of its partners that are open.
    fn targets(&self, host: &NodeId, places: &BTreeMap<NodeId, Vec<ProbePlace>>) -> Vec<CheckTarget> {
        let place = |node: &NodeId, network: &NetworkId| {
            places.get(node).into_iter().flatten().find(|place| place.network == *network).cloned()
        };
        let partner = |((a, b), network): (&(NodeId, NodeId), &NetworkId)| {
            let other = if a == host { b } else { a };
            let name = self.hosts.iter().find(|h| h.node == *other)?.name.clone();
            let own = place(host, network)?;
            let from = own.sockets.iter().map(|s| s.address).collect();
            Some(CheckTarget { node: other.clone(), name, place: place(other, network)?, from })
        };
        self.pairs.iter().filter(|((a, b), _)| a == host || b == host).filter_map(partner).collect()
    }
}

/// Hosts that are busy at a time: each sends from 32 threads.
const BUSY_MAX: usize = 32;

/// Does it.
pub async fn checked(asker: &Asker, plan: Plan) -> CheckReport {
    let open = |host: &Asked| {
        let (host, networks) = (host.clone(), plan.networks(&host.node));
        async move {
            let opened = asker.open::<Vec<ProbePlace>>(&host, &NetQuestion::Respond { networks }).await;
            (host, opened)
        }
    };
    let opened: Vec<_> = stream::iter(&plan.hosts).map(open).buffered(BUSY_MAX).collect().await;
    let (mut places, mut streams, mut answers) = (BTreeMap::new(), Vec::<AgentStream>::new(), Vec::new());
    for (host, opened) in opened {
        match opened {
            Ok((found, stream)) => {
                places.insert(host.node, found);
                streams.push(stream);
            }
            Err(error) => answers.push(host.answered(Err(error))),
        }
    }
    let send = |host: &Asked| {
        let (host, targets) = (host.clone(), plan.targets(&host.node, &places));
        async move {
            let answer = asker.ask::<HostCheck>(&host, &NetQuestion::Check { targets }).await;
            host.answered(answer)
        }
    };
    let senders: Vec<&Asked> = plan.hosts.iter().filter(|host| places.contains_key(&host.node)).collect();
    answers.extend(stream::iter(senders).map(send).buffered(BUSY_MAX).collect::<Vec<_>>().await);
    drop(streams);
    answers.sort_by(|a, b| a.name.cmp(&b.name));
    let unopened = plan.unopened(&places);
    summed(CheckReport { apart: plan.apart, unopened, hosts: answers, ..CheckReport::default() })
}

/// Adds the sentence.
fn summed(mut report: CheckReport) -> CheckReport {
    let checks = || report.hosts.iter().filter_map(|host| host.answer.as_ref());
    let pairs = checks().map(|check| check.pairs.len()).sum::<usize>();
    let faults = checks().map(|check| check.clashes.len() + usize::from(check.checksum_errors > 0)).sum::<usize>();
    let faults = faults + checks().flat_map(|check| &check.pairs).map(|pair| pair.faults.len()).sum::<usize>();
    let faults = faults + report.unopened.len();
    let silent = report.hosts.iter().filter(|host| host.error.is_some()).count();
    report.fine = faults == 0 && silent == 0;
    report.summary = match (report.fine, pairs) {
        (true, 0) => "nothing to check: no two hosts share a network".to_owned(),
        (true, _) => format!("all is well: {pairs} ways, UDP and TCP, up to the full size"),
        (false, _) => {
            let port = checks().any(|check| !check.clashes.is_empty());
            let hint = if port { "; repair: another `vxlan_port` for all agents" } else { "" };
            format!("{faults} faults on {pairs} ways, {silent} hosts do not answer{hint}")
        }
    };
    report
}

/// What is wrong with the tunnels of hosts that joined, by node.
#[derive(Clone, Debug, Default)]
pub struct Findings(Arc<Mutex<BTreeMap<NodeId, String>>>);

impl Findings {
    /// Adds to a node what was found, as one of its troubles.
    pub fn add_to(&self, node: &mut Node) {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        node.description.troubles.extend(found.get(&node.id).cloned());
    }

    fn set(&self, node: &NodeId, words: Option<String>) {
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match words {
            Some(words) => drop(found.insert(node.clone(), words)),
            None => drop(found.remove(node)),
        }
    }
}

/// The first faults of a report that are about this host.
fn words_of(report: &CheckReport, node: &NodeId) -> Option<String> {
    let mut words = Vec::new();
    for host in &report.hosts {
        // Who does not answer is another trouble, and an agent of an older release does not know the question.
        let own = host.node == *node;
        let Some(check) = &host.answer else { continue };
        if own {
            words.extend(check.clashes.clone());
        }
        let about = check.pairs.iter().filter(|pair| own || pair.node == *node);
        let say = |(name, fault): (&String, &String)| format!("{} -> {name}: {fault}", host.name);
        words.extend(about.flat_map(|pair| pair.faults.iter().map(|fault| (&pair.name, fault))).map(say));
    }
    let more = words.len().saturating_sub(2);
    words.truncate(2);
    let rest = if more > 0 { format!(", and {more} more") } else { String::new() };
    (!words.is_empty()).then(|| format!("skein net check: {}{rest}", words.join("; ")))
}

/// A host that is watched: when it was checked last, and whether all was well.
type Watched = BTreeMap<NodeId, (Instant, bool)>;

/// Checks hosts that have just joined, once they have a network with others, and again until all is well.
pub async fn watch_new(asker: Asker, findings: Findings, shutdown: CancellationToken) {
    let mut watched = Watched::new();
    loop {
        // Cancel-safe: a token and a timer.
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let settled: BTreeSet<NodeId> =
            watched.iter().filter(|(_, (at, fine))| *fine || at.elapsed() < AGAIN).map(|(id, _)| id.clone()).collect();
        let Ok((known, due)) = asker.cluster.query(move |core| due(core, &settled)).await else { return };
        watched.retain(|node, _| known.contains(node));
        for (node, plan) in due {
            // Dropping a check in the middle closes its places.
            let report = tokio::select! {
                () = shutdown.cancelled() => return,
                report = checked(&asker, plan) => report,
            };
            let words = words_of(&report, &node);
            if let Some(words) = &words {
                tracing::warn!(%node, words, "the tunnels of a new host do not work");
            }
            watched.insert(node.clone(), (Instant::now(), words.is_none()));
            findings.set(&node, words);
        }
    }
}

/// All nodes, and of those that are new and ready, and not `settled`, the ones that share a network with others.
fn due(core: &Core, settled: &BTreeSet<NodeId>) -> (BTreeSet<NodeId>, Vec<(NodeId, Plan)>) {
    let now = cluster::wall_now();
    let model = core.model();
    let new = |node: &&Node| u128::from(now.since_ms(node.meta.created_at)) < NEW_FOR.as_millis();
    let candidates = model.nodes.values().filter(new).filter(|n| !settled.contains(&n.id));
    let ready = candidates.filter(|n| core.node_status(&n.id).state == NodeState::Ready);
    let plan = |node: &Node| Some((node.id.clone(), Plan::few(core, &node.id)?));
    let due = ready.filter_map(plan).take(NEW_MAX).collect();
    (model.nodes.keys().cloned().collect(), due)
}

#[cfg(test)]
mod tests {
    use skein_api::{HostAnswer, PairCheck, ProbeSockets};

    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name)
    }

    #[test]
    fn each_host_sends_to_the_places_of_its_partners() {
        let host = |name: &str| Asked { node: node(name), name: name.to_owned() };
        let network = NetworkId::new("n");
        let plan = Plan {
            hosts: ["a", "b", "c"].map(host).into(),
            pairs: [((node("a"), node("b")), network.clone()), ((node("b"), node("c")), network.clone())].into(),
            apart: vec![("a".into(), "c".into())],
        };
        let place = |last: u8| {
            let sockets = vec![ProbeSockets { address: [10, 0, 0, last].into(), tcp: 1, udp: 2 }];
            vec![ProbePlace { network: network.clone(), sockets }]
        };
        let mut places = BTreeMap::from([(node("a"), place(1)), (node("b"), place(2)), (node("c"), place(3))]);
        let to = |host: &str, places: &_| {
            let targets = plan.targets(&node(host), places);
            targets.into_iter().map(|t| format!("{} from {}", t.name, t.from[0])).collect::<Vec<_>>()
        };
        assert_eq!(to("b", &places), ["a from 10.0.0.2", "c from 10.0.0.2"]);
        assert_eq!(to("a", &places), ["b from 10.0.0.1"]);
        places.remove(&node("c"));
        assert_eq!(to("b", &places), ["a from 10.0.0.2"], "who opened no place is not sent to");
        assert_eq!(plan.unopened(&places), Vec::<String>::new(), "c has not answered at all");
        places.insert(node("c"), Vec::new());
        assert_eq!(plan.unopened(&places), ["c has no free address for probes in network n"]);
        assert_eq!(plan.networks(&node("c")), [network]);
    }

    #[test]
    fn a_fault_or_a_silent_host_is_not_fine() {
        let host = |answer: Option<HostCheck>| HostAnswer {
            error: answer.is_none().then(|| "no".to_owned()),
            answer,
            ..HostAnswer::default()
        };
        let pair = |faults: &[&str]| PairCheck {
            faults: faults.iter().map(|f| (*f).into()).collect(),
            ..PairCheck::default()
        };
        let fine = |hosts: Vec<HostAnswer<HostCheck>>| summed(CheckReport { hosts, ..CheckReport::default() });
        let well = || HostCheck { pairs: vec![pair(&[])], ..HostCheck::default() };
        let report = fine(vec![host(Some(well()))]);
        assert!(report.fine && report.summary.contains("1 ways"), "{report:?}");
        assert!(!fine(vec![host(Some(well())), host(None)]).fine);
        assert!(!fine(vec![host(Some(HostCheck { pairs: vec![pair(&["lost"])], ..HostCheck::default() }))]).fine);
        let clash = fine(vec![host(Some(HostCheck { clashes: vec!["nc".into()], ..HostCheck::default() }))]);
        assert!(clash.summary.contains("another `vxlan_port`"), "{clash:?}");
    }

    #[test]
    fn what_is_wrong_with_a_host_is_told_in_few_words() {
        let pair = |to: &str, faults: &[&str]| PairCheck {
            node: node(to),
            name: to.to_owned(),
            faults: faults.iter().map(|f| (*f).to_owned()).collect(),
            ..PairCheck::default()
        };
        let host = |name: &str, pairs: Vec<PairCheck>| HostAnswer {
            node: node(name),
            name: name.to_owned(),
            answer: Some(HostCheck { pairs, ..HostCheck::default() }),
            ..HostAnswer::default()
        };
        let hosts =
            vec![host("a", vec![pair("b", &["x", "y"]), pair("c", &["z"])]), host("b", vec![pair("a", &["w"])])];
        let report = CheckReport { hosts, ..CheckReport::default() };
        let words = |name: &str| words_of(&report, &node(name));
        assert_eq!(words("b").as_deref(), Some("skein net check: a -> b: x; a -> b: y, and 1 more"));
        assert_eq!(words("c").as_deref(), Some("skein net check: a -> c: z"));
        assert_eq!(words("d"), None);
    }
}

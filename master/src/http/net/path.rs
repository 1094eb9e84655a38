//! `GET /v1/net/path`: from one container to another, hop by hop, told by the hosts of both.
//!
//! Owns: who is meant, whom to ask, and the one sentence. Must not know: how hosts look. No tasks, no channels.

use std::net::IpAddr;

use axum::{
    Json,
    extract::{Query, State},
};
use master_core::Core;
use serde::Deserialize;
use skein_api::{
    ApiError, Hop, HopState, NetQuestion, Network, Node, PathEnd, PathQuestion, PathReport, PathSide, Protocol,
    Service, Task, TaskState, did_you_mean,
};

use super::super::{Answer, Api, User};
use crate::ask::{Asked, Asker};

#[derive(Deserialize)]
pub(in super::super) struct PathQuery {
    from: String,
    to: String,
    port: Option<u16>,
    #[serde(default)]
    proto: Proto,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Proto {
    #[default]
    Tcp,
    Udp,
}

/// It has a health check, and does not pass it now.
fn unwell(task: &Task) -> bool {
    task.status.health.is_some_and(|health| health != skein_api::Health::Healthy)
}

/// Names that are looked at for the one that was meant.
const CANDIDATES_MAX: usize = 4_096;

/// What a user named.
#[derive(Clone)]
enum Place {
    Task(Box<Task>),
    /// A service and the task of it that is looked at; none when it has none that runs.
    Service(Box<Service>, Option<Box<Task>>),
    Node(Box<Node>),
}

impl Place {
    fn find(core: &Core, reference: &str) -> Result<Self, ApiError> {
        let model = core.model();
        let passing = |error: ApiError| if error.code == "not_found" { Ok(()) } else { Err(error) };
        match model.find_task(reference) {
            Ok(task) => return Ok(Self::Task(Box::new(task.clone()))),
            Err(error) => passing(error)?,
        }
        match model.find_service(reference) {
            Ok(service) => {
                let runs = |t: &&std::sync::Arc<Task>| t.status.state == TaskState::Running;
                let tasks = model.service_tasks(&service.id).filter_map(|t| model.tasks.get(&t.id)).filter(runs);
                // Those that are well first, then in the order of slots: the same question gets the same task.
                let task = tasks.min_by_key(|t| (unwell(t), t.slot, t.id.clone()));
                return Ok(Self::Service(Box::new(service.clone()), task.map(|t| Box::new(Task::clone(t)))));
            }
            Err(error) => passing(error)?,
        }
        match model.find_node(reference) {
            Ok(node) => return Ok(Self::Node(Box::new(node.clone()))),
            Err(error) => passing(error)?,
        }
        let names = model.tasks.values().map(|t| t.name.as_str());
        let names = names.chain(model.services.values().map(|s| s.spec.name.as_str()));
        let names = names.chain(model.nodes.values().map(|n| n.name.as_str()));
        let meant = did_you_mean(reference, names.take(CANDIDATES_MAX))
            .map(|name| format!("; did you mean {name:?}?"))
            .unwrap_or_default();
        let message = format!("no task, service or node {reference:?}{meant}");
        Err(ApiError::new("not_found", message).with_hint("skein ps; skein node ls"))
    }

    /// The task that is looked at.
    fn task(&self) -> Option<&Task> {
        match self {
            Self::Task(task) | Self::Service(_, Some(task)) => Some(task),
            Self::Service(_, None) | Self::Node(_) => None,
        }
    }

    /// The name that containers look up.
    fn name(&self) -> &str {
        match self {
            Self::Task(task) => &task.name,
            Self::Service(service, _) => &service.spec.name,
            Self::Node(node) => &node.name,
        }
    }
}

/// One of both, with the names of what it refers to.
#[derive(Clone)]
struct End {
    place: Place,
    node: Option<Node>,
    networks: Vec<Network>,
}

impl End {
    fn find(core: &Core, reference: &str) -> Result<Self, ApiError> {
        let model = core.model();
        let place = Place::find(core, reference)?;
        let node = match &place {
            Place::Node(node) => Some(node.id.clone()),
            other => other.task().and_then(|task| task.node.clone()),
        };
        let addresses = place.task().map(|task| task.status.addresses.as_slice()).unwrap_or_default();
        Ok(Self {
            node: node.and_then(|id| model.nodes.get(&id)).map(|node| core.node_view(node)),
            networks: addresses.iter().filter_map(|a| model.networks.get(&a.network)).cloned().collect(),
            place,
        })
    }

    /// `s_a.1 on h1`.
    fn words(&self) -> String {
        let on = self.node.as_ref().map(|node| format!(" on {}", node.name)).unwrap_or_default();
        match &self.place {
            Place::Task(task) => format!("{}{on}", task.name),
            Place::Service(service, Some(task)) => format!("service {} ({}{on})", service.spec.name, task.name),
            Place::Service(service, None) => format!("service {}", service.spec.name),
            Place::Node(node) => format!("node {}", node.name),
        }
    }

    /// Whether there is a running container, by the master's knowledge.
    fn running(&self) -> Hop {
        let name = self.place.name();
        let repair = format!("`skein explain {name}` and `skein logs {name}` say why");
        let Some(task) = self.place.task() else {
            let fault = format!("service {name} has no running task");
            return Hop::broken("task", ("running", "none"), fault, repair);
        };
        match (task.status.state, &self.node) {
            (TaskState::Running, Some(node)) => {
                Hop::fine("task", "running", format!("{} runs on {}", task.name, node.name))
            }
            (state, _) => {
                let state =
                    serde_json::to_value(state).ok().and_then(|v| Some(v.as_str()?.to_owned())).unwrap_or_default();
                let why = task.status.err.as_ref().unwrap_or(&task.status.message);
                let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
                let fault = format!("{} does not run: it is {state}{why}", task.name);
                Hop::broken("task", ("running".to_owned(), state), fault, repair)
            }
        }
    }

    fn end(&self, network: &Network) -> Option<PathEnd> {
        let (task, node) = (self.place.task()?, self.node.as_ref()?);
        let address = task.status.addresses.iter().find(|a| a.network == network.id)?.v4?;
        Some(PathEnd {
            task: task.id.clone(),
            name: task.name.clone(),
            node: node.id.clone(),
            node_name: node.name.clone(),
            address: address.into(),
        })
    }

    fn networks_text(&self) -> String {
        match self.networks.as_slice() {
            [] => "in no overlay network".to_owned(),
            some => format!("in {}", some.iter().map(|n| n.spec.name.as_str()).collect::<Vec<_>>().join(", ")),
        }
    }
}

pub(in super::super) async fn path(
    State(api): State<Api>,
    _: User,
    Query(query): Query<PathQuery>,
) -> Answer<PathReport> {
    if query.port == Some(0) {
        return Err(ApiError::new("bad_request", "port 0 is no port that anybody listens on").into());
    }
    let PathQuery { from, to, port, proto } = query;
    let ends = api.read(move |core| Ok::<_, ApiError>((End::find(core, &from)?, End::find(core, &to)?))).await??;
    let proto = match proto {
        Proto::Tcp => Protocol::Tcp,
        Proto::Udp => Protocol::Udp,
    };
    Ok(Json(told(&api.asker(), &ends.0, &ends.1, port, proto).await))
}

async fn told(asker: &Asker, from: &End, to: &End, port: Option<u16>, proto: Protocol) -> PathReport {
    let mut report = PathReport { from: from.words(), to: to.words(), ..PathReport::default() };
    if matches!((&from.place, &to.place), (Place::Node(_), _) | (_, Place::Node(_))) {
        report.hops = with_nodes(asker, from, to, port, proto).await;
        return judged(report, None);
    }
    report.hops = vec![from.running(), to.running()];
    if report.hops.iter().any(|hop| hop.state == HopState::Broken) {
        return judged(report, None);
    }
    let shared = from.networks.iter().find(|n| to.networks.iter().any(|m| m.id == n.id));
    let Some((network, a, b)) = shared.and_then(|n| Some((n, from.end(n)?, to.end(n)?))) else {
        let (x, y) = (from.networks_text(), to.networks_text());
        let fault = format!("{} is {x} and {} is {y}: they share no network", from.place.name(), to.place.name());
        let repair = "put both into one network (`networks:` in the compose file)";
        report.hops.push(Hop::broken("policy", ("a network of both".to_owned(), format!("{x}; {y}")), fault, repair));
        return judged(report, None);
    };
    report.network = Some(network.spec.name.clone());
    report.hops.push(Hop::fine("policy", "a network of both", &network.spec.name));
    let vip = match &to.place {
        Place::Service(service, _) => service.vips.iter().find(|v| v.network == network.id).map(|v| IpAddr::V4(v.v4)),
        Place::Task(_) | Place::Node(_) => None,
    };
    let lookup = Some(to.place.name().to_owned());
    let question = PathQuestion { network: network.id.clone(), from: a, to: b, vip, lookup, port, proto };
    let arrived = ask_both(asker, &question, &mut report.hops).await;
    judged(report, arrived)
}

/// Asks the hosts of both ends. Answers what became of VXLAN packets on the way, where that was found out.
async fn ask_both(asker: &Asker, question: &PathQuestion, hops: &mut Vec<Hop>) -> Option<Hop> {
    let (a, b) = (asked(&question.from), asked(&question.to));
    let to = NetQuestion::PathTo(Box::new(question.clone()));
    let before = asker.ask::<PathSide>(&b, &to).await;
    let there = asker.ask::<PathSide>(&a, &NetQuestion::PathFrom(Box::new(question.clone()))).await;
    let probe = there.as_ref().ok().and_then(|side| side.probe.clone());
    let sides = [(&a, there), (&b, before.clone())];
    for (host, side) in sides {
        match side {
            Ok(side) => hops.extend(side.hops.into_iter().map(|hop| Hop { node: host.name.clone(), ..hop })),
            Err(error) => {
                let hop = Hop::unknown("agent", "an answer", error.message);
                hops.push(Hop { node: host.name.clone(), ..hop });
            }
        }
    }
    let probe = Hop { node: a.name.clone(), ..probe? };
    // Looked for only where nothing else explains it.
    let lost = probe.state == HopState::Broken && hops.iter().all(|hop| hop.state != HopState::Broken);
    hops.push(probe);
    let before = before.ok().filter(|_| lost && a.node != b.node)?;
    let after = asker.ask::<PathSide>(&b, &to).await.ok()?;
    Some(vanished(question, &before, &after))
}

/// Where the probe's packets were lost, if all that is Skein's is as it should be.
fn vanished(question: &PathQuestion, before: &PathSide, after: &PathSide) -> Hop {
    let (a, b) = (&question.from.node_name, &question.to.node_name);
    let hop = if after.vxlan_packets > before.vxlan_packets {
        let fault =
            format!("packets arrive on {b}, and no answer comes back: something that is not Skein's drops them");
        Hop::broken(
            "arrival",
            ("VXLAN arrives", "it arrives"),
            fault,
            "look for rules in the container and on both hosts",
        )
    } else if let Some(rule) = after.suspects.first() {
        let fault = format!("VXLAN of {a} does not get in on {b}, where a rule that is not Skein's drops: {rule}");
        let repair = format!("let UDP from {a} to the VXLAN port in on {b}");
        Hop::broken("arrival", ("VXLAN arrives", "it does not"), fault, repair)
    } else {
        let fault = format!("VXLAN of {a} does not arrive on {b}: something between the hosts drops it");
        let repair = format!("let UDP to the VXLAN port pass between {a} and {b} (firewalls, cloud security groups)");
        Hop::broken("arrival", ("VXLAN arrives", "it does not"), fault, repair)
    };
    Hop { node: b.clone(), ..hop }
}

fn asked(end: &PathEnd) -> Asked {
    Asked { node: end.node.clone(), name: end.node_name.clone() }
}

/// A host at one end or at both: what of its network is the overlay's business.
async fn with_nodes(asker: &Asker, from: &End, to: &End, port: Option<u16>, proto: Protocol) -> Vec<Hop> {
    let mut hops = Vec::new();
    let container = |end: &End| !matches!(end.place, Place::Node(_));
    for end in [from, to].into_iter().filter(|end| container(end)) {
        hops.push(end.running());
    }
    if hops.iter().any(|hop| hop.state == HopState::Broken) {
        return hops;
    }
    let (mut target, mut port) = (to.node.as_ref().and_then(underlay), port);
    if let (Place::Node(_), Some(task)) = (&from.place, to.place.task()) {
        let published =
            task.status.ports.iter().find(|p| {
                p.protocol == proto && port.is_none_or(|port| port == p.container_port || port == p.host_port)
            });
        let Some(published) = published else {
            let fault = format!("hosts reach no container directly, and {} publishes no such port", task.name);
            let repair = "publish it (`ports:` in the compose file), or ask from a container of the same network";
            hops.push(Hop::broken("policy", ("a published port", "none"), fault, repair));
            return hops;
        };
        let word = format!("port {} of the host is published", published.host_port);
        hops.push(Hop::fine("policy", "a published port", word));
        port = Some(published.host_port);
        target = published.host_ip.filter(|ip| !ip.is_unspecified()).or(target);
    } else if let Some(task) = from.place.task()
        && !from.networks.is_empty()
        && from.networks.iter().all(|n| n.spec.internal)
    {
        let fault = format!("{} is in internal networks only, which have no way out", task.name);
        let repair = "put it into a network that is not internal too";
        hops.push(Hop::broken("policy", ("a way out".to_owned(), from.networks_text()), fault, repair));
        return hops;
    }
    let (Some(node), Some(target)) = (&from.node, target) else {
        hops.push(Hop::unknown("underlay", "an underlay address", "the host has told none"));
        return hops;
    };
    let task = from.place.task().map(|task| task.id.clone());
    let question = NetQuestion::Reach { task, to: target, port, proto };
    let host = Asked { node: node.id.clone(), name: node.name.clone() };
    match asker.ask::<Vec<Hop>>(&host, &question).await {
        Ok(found) => hops.extend(found.into_iter().map(|hop| Hop { node: host.name.clone(), ..hop })),
        Err(error) => hops.push(Hop { node: host.name.clone(), ..Hop::unknown("agent", "an answer", error.message) }),
    }
    hops
}

fn underlay(node: &Node) -> Option<IpAddr> {
    let d = &node.description;
    d.underlay4.map(IpAddr::V4).or(d.underlay6.map(IpAddr::V6))
}

/// Adds the sentence. The first broken hop before the probe is the reason; then what the hosts could only suspect; then
/// where the packets vanished.
fn judged(mut report: PathReport, arrival: Option<Hop>) -> PathReport {
    let of_probe = |hop: &&Hop| hop.hop == "probe";
    let broken = |hop: &&Hop| hop.state == HopState::Broken;
    let suspect = |hop: &&Hop| hop.state == HopState::Unknown && !hop.fault.is_empty();
    let probe = report.hops.iter().find(of_probe);
    let failed = probe.is_some_and(|probe| probe.state == HopState::Broken);
    let first = report.hops.iter().find(|hop| broken(hop) && !of_probe(hop)).cloned();
    let first = first.or_else(|| report.hops.iter().find(|hop| failed && suspect(hop)).cloned());
    let first = first.or(arrival.clone()).or_else(|| probe.filter(broken).cloned());
    report.hops.extend(arrival);
    let (from, to) = (&report.from, &report.to);
    let by = report.network.as_ref().map(|n| format!(" over network {n}")).unwrap_or_default();
    let probe = report.hops.iter().find(of_probe);
    report.works = false;
    report.summary = match (first, probe) {
        (Some(hop), _) => {
            let on = if hop.node.is_empty() { String::new() } else { format!("on {}: ", hop.node) };
            format!("{from} does not reach {to}{by}: {on}{}; repair: {}", hop.fault, hop.repair)
        }
        (None, Some(probe)) => {
            report.works = true;
            let verb = if probe.state == HopState::Fine { "reaches" } else { "should reach" };
            format!("{from} {verb} {to}{by}: {}", probe.found)
        }
        (None, None) => {
            let why = report.hops.iter().find(|hop| hop.state == HopState::Unknown).map(|hop| hop.found.clone());
            let why = why.unwrap_or_else(|| "nobody could try it".to_owned());
            format!("whether {from} reaches {to} is not known: {why}; repair: skein node ls shows which agents answer")
        }
    };
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(hops: Vec<Hop>, arrival: Option<Hop>) -> (bool, String) {
        let report = PathReport {
            from: "a on h1".into(),
            to: "b on h2".into(),
            network: Some("n".into()),
            hops,
            ..PathReport::default()
        };
        let report = judged(report, arrival);
        (report.works, report.summary)
    }

    fn on(node: &str, hop: Hop) -> Hop {
        Hop { node: node.into(), ..hop }
    }

    #[test]
    fn the_first_broken_hop_is_the_sentence() {
        let fine = || on("h1", Hop::fine("route", "x", "x"));
        let probe = |state| {
            on(
                "h1",
                Hop {
                    state,
                    found: "answered after 80 us".into(),
                    fault: "no answer".into(),
                    repair: "r".into(),
                    hop: "probe".into(),
                    ..Hop::default()
                },
            )
        };
        let broken = on("h2", Hop::broken("socket", ("s", "n"), "nobody listens", "start it"));
        let suspect = || {
            on(
                "h1",
                Hop {
                    fault: "192.0.2.2 does not answer".into(),
                    repair: "ping it".into(),
                    ..Hop::unknown("underlay", "w", "f")
                },
            )
        };
        let arrival = || on("h2", Hop::broken("arrival", ("w", "f"), "it is dropped", "let it in"));
        let check = |hops: Vec<Hop>, arrival: Option<Hop>, works: bool, summary: &str| {
            assert_eq!(report(hops, arrival), (works, summary.to_owned()));
        };
        check(
            vec![fine(), probe(HopState::Fine)],
            None,
            true,
            "a on h1 reaches b on h2 over network n: answered after 80 us",
        );
        check(
            vec![fine(), broken, probe(HopState::Broken)],
            Some(arrival()),
            false,
            "a on h1 does not reach b on h2 over network n: on h2: nobody listens; repair: start it",
        );
        check(
            vec![fine(), suspect(), probe(HopState::Broken)],
            Some(arrival()),
            false,
            "a on h1 does not reach b on h2 over network n: on h1: 192.0.2.2 does not answer; repair: ping it",
        );
        // Hosts may filter echo requests: what works is not made suspect by that.
        check(
            vec![suspect(), probe(HopState::Fine)],
            None,
            true,
            "a on h1 reaches b on h2 over network n: answered after 80 us",
        );
        check(
            vec![fine(), probe(HopState::Broken)],
            Some(arrival()),
            false,
            "a on h1 does not reach b on h2 over network n: on h2: it is dropped; repair: let it in",
        );
    }

    #[test]
    fn packets_that_vanish_are_looked_for() {
        let end = |name: &str| PathEnd {
            task: skein_api::TaskId::new(name),
            name: name.into(),
            node: skein_api::NodeId::new(name),
            node_name: format!("h-{name}"),
            address: "10.0.0.1".parse().expect("an address"),
        };
        let question = PathQuestion {
            network: skein_api::NetworkId::new("n"),
            from: end("a"),
            to: end("b"),
            vip: None,
            lookup: None,
            port: None,
            proto: Protocol::Tcp,
        };
        let side = |vxlan_packets, suspects: &[&str]| PathSide {
            vxlan_packets,
            suspects: suspects.iter().map(|s| (*s).to_owned()).collect(),
            ..PathSide::default()
        };
        let fault = |before, after| vanished(&question, &before, &after).fault;
        assert!(fault(side(5, &[]), side(8, &["x"])).contains("packets arrive on h-b"));
        assert!(
            fault(side(5, &[]), side(5, &["table ip f, chain i: drop"])).contains("drops: table ip f, chain i: drop")
        );
        assert!(fault(side(5, &[]), side(5, &[])).contains("something between the hosts drops it"));
    }
}

//! `skein net`: how the overlay is, as the hosts see it.

use std::fmt::Write as _;

use skein_api::{HostAnswer, NetStatus, ScopeStatus};

use super::App;
use crate::{
    args::NetCommand,
    fail::Failure,
    out::{age, now, table},
};

/// Runs one of these commands.
pub(super) async fn run(app: &App, command: NetCommand) -> Result<u8, Failure> {
    match command {
        NetCommand::Status { node } => status(app, node.as_deref()).await,
    }
}

async fn status(app: &App, node: Option<&str>) -> Result<u8, Failure> {
    let answers = app.client("skein net status")?.net_status(node).await?;
    if app.out.json {
        app.out.value(&answers)?;
    } else {
        app.out.text(&status_text(&answers))?;
    }
    Ok(0)
}

/// The hosts, their networks, then everything that is not as it should be, a line each.
fn status_text(answers: &[HostAnswer<NetStatus>]) -> String {
    let mut text = table(&["NODE", "VTEP", "GENERATION", "REPAIRS", "DNS", "STATE"], &host_rows(answers));
    let rows = network_rows(answers);
    if !rows.is_empty() {
        let heads = ["NODE", "NETWORK", "VNI", "MTU", "PEERS", "CONTAINERS", "ADDRESSES", "REPAIRS", "STATE"];
        let _ = write!(text, "\n{}", table(&heads, &rows));
    }
    let notes = notes(answers);
    if !notes.is_empty() {
        let _ = write!(text, "\n{}\n", notes.join("\n"));
    }
    text
}

/// `7`, or `6 of 7` while the host has not followed yet.
fn generation<T>(answer: &HostAnswer<T>) -> String {
    let (sent, acked) = (answer.generation_sent, answer.generation_acked);
    match (sent == acked, answer.waiting) {
        (true, false) => sent.to_string(),
        (true, true) => format!("{acked}, more waits"),
        (false, _) => format!("{acked} of {sent}"),
    }
}

fn host_rows(answers: &[HostAnswer<NetStatus>]) -> Vec<Vec<String>> {
    let row = |a: &HostAnswer<NetStatus>| {
        let generation = generation(a);
        let Some(s) = &a.answer else {
            return vec![a.name.clone(), "-".into(), generation, "-".into(), "-".into(), "no answer".into()];
        };
        let vtep = s.vtep.map_or_else(|| "-".to_owned(), |vtep| format!("{vtep} port {}", s.vxlan_port));
        let dns = format!("{} answered, {} forwarded", s.dns.answered_total, s.dns.forwarded_total);
        let state = if s.troubles.is_empty() { state(&s.host) } else { "troubles".into() };
        vec![a.name.clone(), vtep, generation, s.repairs_total.to_string(), dns, state]
    };
    answers.iter().map(row).collect()
}

fn network_rows(answers: &[HostAnswer<NetStatus>]) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for (answer, status) in answers.iter().filter_map(|a| Some((a, a.answer.as_ref()?))) {
        rows.extend(status.networks.iter().map(|n| {
            let (used, size) = n.blocks.iter().fold((0, 0), |(used, size), b| (used + b.used, size + b.size));
            vec![
                answer.name.clone(),
                n.name.clone(),
                n.vni.to_string(),
                n.mtu.to_string(),
                n.peers.to_string(),
                n.containers.to_string(),
                format!("{used} of {size}"),
                n.scope.repairs_total.to_string(),
                state(&n.scope),
            ]
        }));
    }
    rows
}

/// The state of a namespace in a word or two.
fn state(scope: &ScopeStatus) -> String {
    match (&scope.error, scope.differences_total) {
        (Some(_), _) => "not seen".into(),
        (None, 0) => "as wanted".into(),
        (None, 1) => "1 difference".into(),
        (None, n) => format!("{n} differences"),
    }
}

/// Everything that is not as it should be, and what was dropped.
fn notes(answers: &[HostAnswer<NetStatus>]) -> Vec<String> {
    let mut notes = Vec::new();
    for answer in answers {
        let name = &answer.name;
        if let Some(error) = &answer.error {
            notes.push(format!("{name}: no answer: {error}"));
        }
        let Some(status) = &answer.answer else { continue };
        notes.extend(status.troubles.iter().map(|trouble| format!("{name}: trouble: {trouble}")));
        scope_notes(&mut notes, name, &status.host);
        for network in &status.networks {
            let name = format!("{name}/{}", network.name);
            if network.mtu > network.mtu_max && network.mtu_max > 0 {
                let (mtu, max) = (network.mtu, network.mtu_max);
                notes.push(format!("{name}: MTU {mtu} is more than the {max} that this host's underlay carries"));
            }
            notes.extend(network.unreachable.iter().map(|node| format!("{name}: node {node} cannot be reached")));
            scope_notes(&mut notes, &name, &network.scope);
        }
        let dns = &status.dns;
        for (count, what) in [
            (dns.forward_failures_total, "forwarded names that no resolver answered"),
            (dns.rejected_total, "questions for names over a bound"),
        ] {
            if count > 0 {
                notes.push(format!("{name}: {count} {what}"));
            }
        }
        if status.lost_endpoints_total > 0 {
            let count = status.lost_endpoints_total;
            notes.push(format!("{name}: {count} times a container was seen without its link; hint: restart it"));
        }
    }
    notes
}

/// Repairs that are shown in the table's notes; JSON has more.
const REPAIRS_SHOWN: usize = 3;

fn scope_notes(notes: &mut Vec<String>, name: &str, scope: &ScopeStatus) {
    notes.extend(scope.error.iter().map(|error| format!("{name}: cannot be looked at: {error}")));
    notes.extend(scope.differences.iter().map(|what| format!("{name}: to be repaired: {what}")));
    if scope.differences_total > scope.differences.len() {
        notes.push(format!("{name}: and {} more", scope.differences_total - scope.differences.len()));
    }
    let shown = scope.repairs.iter().rev().take(REPAIRS_SHOWN).rev();
    notes.extend(shown.map(|r| format!("{name}: repaired {} ago: {}", age(r.at, now()), r.what)));
    notes.extend(scope.drops.iter().map(|(reason, packets)| format!("{name}: {packets} packets dropped: {reason}")));
}

#[cfg(test)]
mod tests {
    use skein_api::{BlockStatus, NetworkStatus};

    use super::*;

    #[test]
    fn a_status_is_two_tables_and_what_is_wrong() {
        let block = BlockStatus {
            block: "10.57.1.0/24".parse().unwrap(),
            block6: "fd57::100/120".parse().unwrap(),
            used: 3,
            size: 254,
        };
        let scope = ScopeStatus {
            differences: vec!["put route 10.57.2.0/24 to next hop 2".into()],
            differences_total: 2,
            repairs_total: 1,
            drops: [("VXLAN sent by a container".to_owned(), 7)].into(),
            ..ScopeStatus::default()
        };
        let network = NetworkStatus {
            name: "shop".into(),
            vni: 4096,
            mtu: 1450,
            mtu_max: 1400,
            peers: 1,
            containers: 2,
            blocks: vec![block],
            scope,
            ..NetworkStatus::default()
        };
        let status = NetStatus {
            vtep: Some("192.0.2.1".parse().unwrap()),
            vxlan_port: 4789,
            networks: vec![network],
            ..NetStatus::default()
        };
        let answers = [
            HostAnswer {
                name: "h1".into(),
                generation_sent: 7,
                generation_acked: 7,
                answer: Some(status),
                ..HostAnswer::default()
            },
            HostAnswer {
                name: "h2".into(),
                generation_sent: 7,
                generation_acked: 5,
                error: Some("the agent of node h2 is not connected".into()),
                ..HostAnswer::default()
            },
        ];
        assert_eq!(
            status_text(&answers),
            "\
NODE   VTEP                  GENERATION   REPAIRS   DNS                       STATE
h1     192.0.2.1 port 4789   7            0         0 answered, 0 forwarded   as wanted
h2     -                     5 of 7       -         -                         no answer

NODE   NETWORK   VNI    MTU    PEERS   CONTAINERS   ADDRESSES   REPAIRS   STATE
h1     shop      4096   1450   1       2            3 of 254    1         2 differences

h1/shop: MTU 1450 is more than the 1400 that this host's underlay carries
h1/shop: to be repaired: put route 10.57.2.0/24 to next hop 2
h1/shop: and 1 more
h1/shop: 7 packets dropped: VXLAN sent by a container
h2: no answer: the agent of node h2 is not connected
"
        );
    }
}

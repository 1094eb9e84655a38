//! `skein net`: how the overlay is, as the hosts see it.

use std::fmt::Write as _;

use skein_api::{
    CheckReport, ExposedBy, ExposedPort, Hop, HopState, HostAnswer, NetStatus, PathReport, Protocol, ScopeStatus,
};

use super::App;
use crate::{
    args::{NetCommand, ProtoArg},
    fail::{Failure, code},
    out::{age, now, table},
};

/// Runs one of these commands.
pub(super) async fn run(app: &App, command: NetCommand) -> Result<u8, Failure> {
    match command {
        NetCommand::Status { node } => status(app, node.as_deref()).await,
        NetCommand::Check { node } => {
            let report = app.client("skein net check")?.net_check(node.as_deref()).await?;
            app.out.show(&report, || check_text(&report))?;
            Ok(if report.fine { 0 } else { code::FAILED })
        }
        NetCommand::Exposed { node } => {
            let answers = app.client("skein net exposed")?.net_exposed(node.as_deref()).await?;
            app.out.show(&answers, || exposed_text(&answers))?;
            Ok(0)
        }
        NetCommand::Path { from, to, port, proto } => {
            let proto = match proto {
                ProtoArg::Tcp => Protocol::Tcp,
                ProtoArg::Udp => Protocol::Udp,
            };
            path(app, &app.client("skein net path")?.net_path(&from, &to, port, proto).await?)
        }
    }
}

async fn status(app: &App, node: Option<&str>) -> Result<u8, Failure> {
    let answers = app.client("skein net status")?.net_status(node).await?;
    app.out.show(&answers, || status_text(&answers))?;
    Ok(0)
}

/// Shows a path; 1 when it does not work.
fn path(app: &App, report: &PathReport) -> Result<u8, Failure> {
    app.out.show(report, || path_text(report))?;
    Ok(if report.works { 0 } else { code::FAILED })
}

/// Every hop as a row, then the sentence.
fn path_text(report: &PathReport) -> String {
    let state = |hop: &Hop| match hop.state {
        HopState::Fine => "ok",
        HopState::Broken => "BROKEN",
        HopState::Unknown => "?",
    };
    let node = |hop: &Hop| if hop.node.is_empty() { "-".to_owned() } else { hop.node.clone() };
    let row = |hop: &Hop| {
        let found = if hop.found == hop.wanted { String::new() } else { hop.found.clone() };
        vec![node(hop), hop.hop.clone(), state(hop).to_owned(), hop.wanted.clone(), found]
    };
    let rows: Vec<Vec<String>> = report.hops.iter().map(row).collect();
    format!("{}\n{}\n", table(&["NODE", "HOP", "STATE", "WANTED", "FOUND"], &rows), report.summary)
}

/// Every pair as a row, what is wrong as a line each, then the sentence.
fn check_text(report: &CheckReport) -> String {
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    for host in &report.hosts {
        let name = &host.name;
        notes.extend(host.error.iter().map(|error| format!("{name}: no answer: {error}")));
        let Some(check) = &host.answer else { continue };
        notes.extend(check.clashes.iter().map(|clash| format!("{name}: {clash}")));
        if check.checksum_errors > 0 {
            notes.push(format!("{name}: {} packets came in with a wrong checksum", check.checksum_errors));
        }
        for pair in &check.pairs {
            let took = pair.round_trip_us.map_or_else(|| "-".to_owned(), |us| us.to_string());
            let state = if pair.faults.is_empty() { "ok" } else { "BROKEN" };
            let family = if pair.v6 { "IPv6" } else { "IPv4" };
            let size = pair.largest_bytes.to_string();
            rows.push(vec![name.clone(), pair.name.clone(), family.into(), size, took, state.into()]);
            notes.extend(pair.faults.iter().map(|fault| format!("{name} -> {}: {fault}", pair.name)));
        }
    }
    notes.extend(report.unopened.iter().cloned());
    notes.extend(report.apart.iter().map(|(a, b)| format!("{a} and {b} share no network: nothing to check")));
    let mut text = table(&["FROM", "TO", "FAMILY", "LARGEST", "ROUND TRIP US", "STATE"], &rows);
    for note in notes {
        let _ = writeln!(text, "{note}");
    }
    let _ = writeln!(text, "{}", report.summary);
    text
}

/// Who reaches what: first what everybody reaches, then what only the host itself does.
fn exposed_text(answers: &[HostAnswer<Vec<ExposedPort>>]) -> String {
    let rows = |only_here: bool| -> Vec<Vec<String>> {
        let ports = answers.iter().flat_map(|a| a.answer.iter().flatten().map(move |port| (&a.name, port)));
        ports.filter(|(_, port)| port.only_here == only_here).map(|(name, port)| exposed_row(name, port)).collect()
    };
    let heads = ["NODE", "PORT", "ADDRESS", "BY", "WHO"];
    let mut text = table(&heads, &rows(false));
    let here = rows(true);
    if !here.is_empty() {
        let _ = write!(text, "\nonly from the host itself:\n{}", table(&heads, &here));
    }
    for answer in answers {
        if let Some(error) = &answer.error {
            let _ = write!(text, "\n{}: no answer: {error}\n", answer.name);
        }
    }
    text
}

fn exposed_row(node: &str, port: &ExposedPort) -> Vec<String> {
    let proto = match port.proto {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let (by, who) = match &port.by {
        ExposedBy::Published { task, name, network, target } => {
            let task = task.as_ref().map_or("a container of the engine", |task| task.short());
            let name = if name.is_empty() { task } else { name };
            ("published", format!("{name}, {target} in {network}"))
        }
        ExposedBy::Program { program } => ("program", program.clone()),
        ExposedBy::Vxlan { open_to } if open_to.is_empty() => ("vxlan", "nobody".to_owned()),
        ExposedBy::Vxlan { open_to } => {
            let all: Vec<String> = open_to.iter().map(ToString::to_string).collect();
            ("vxlan", format!("from {} only", all.join(", ")))
        }
        ExposedBy::Kernel => ("kernel", String::new()),
        ExposedBy::Unknown => ("?", String::new()),
    };
    let address = port.address.map_or_else(|| "any".to_owned(), |address| address.to_string());
    vec![node.to_owned(), format!("{}/{proto}", port.port), address, by.to_owned(), who]
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
    notes.extend(scope.drops.iter().map(|(reason, packets)| format!("{name}: {packets} dropped: {reason}")));
}

#[cfg(test)]
mod tests {
    use skein_api::{BlockStatus, NetworkStatus};

    use super::*;

    #[test]
    fn a_check_is_a_row_for_each_pair_and_a_line_for_each_fault() {
        let fault = "IPv4: packets of 1401 bytes and more are lost";
        let pair = |v6, faults: &[&str]| skein_api::PairCheck {
            name: "h2".into(),
            v6,
            round_trip_us: Some(80),
            largest_bytes: if faults.is_empty() { 1450 } else { 1400 },
            faults: faults.iter().map(|f| (*f).to_owned()).collect(),
            ..skein_api::PairCheck::default()
        };
        let check = skein_api::HostCheck {
            clashes: vec!["nc (pid 7) has UDP 0.0.0.0:4789 and eats VXLAN".into()],
            pairs: vec![pair(false, &[fault]), pair(true, &[])],
            ..skein_api::HostCheck::default()
        };
        let report = CheckReport {
            summary: "2 faults".into(),
            apart: vec![("h1".into(), "h3".into())],
            hosts: vec![HostAnswer { name: "h1".into(), answer: Some(check), ..HostAnswer::default() }],
            ..CheckReport::default()
        };
        assert_eq!(
            check_text(&report),
            "\
FROM   TO   FAMILY   LARGEST   ROUND TRIP US   STATE
h1     h2   IPv4     1400      80              BROKEN
h1     h2   IPv6     1450      80              ok
h1: nc (pid 7) has UDP 0.0.0.0:4789 and eats VXLAN
h1 -> h2: IPv4: packets of 1401 bytes and more are lost
h1 and h3 share no network: nothing to check
2 faults
"
        );
    }

    #[test]
    fn what_only_the_host_reaches_is_shown_apart() {
        let port = |port, address: Option<&str>, only_here, by| ExposedPort {
            proto: Protocol::Tcp,
            address: address.map(|a| a.parse().unwrap()),
            port,
            only_here,
            by,
        };
        let published = ExposedBy::Published {
            task: None,
            name: "web.1".into(),
            network: "shop".into(),
            target: "10.57.1.7:80".parse().unwrap(),
        };
        let ports = vec![
            port(22, None, false, ExposedBy::Program { program: "sshd (pid 8)".into() }),
            port(8080, Some("192.0.2.1"), false, published),
            port(631, Some("127.0.0.1"), true, ExposedBy::Kernel),
        ];
        let answers = [
            HostAnswer { name: "h1".into(), answer: Some(ports), ..HostAnswer::default() },
            HostAnswer { name: "h2".into(), error: Some("not connected".into()), ..HostAnswer::default() },
        ];
        assert_eq!(
            exposed_text(&answers),
            "\
NODE   PORT       ADDRESS     BY          WHO
h1     22/tcp     any         program     sshd (pid 8)
h1     8080/tcp   192.0.2.1   published   web.1, 10.57.1.7:80 in shop

only from the host itself:
NODE   PORT      ADDRESS     BY       WHO
h1     631/tcp   127.0.0.1   kernel

h2: no answer: not connected
"
        );
    }

    #[test]
    fn a_path_is_a_table_of_hops_and_a_sentence() {
        let report = PathReport {
            hops: vec![
                Hop::fine("policy", "a network of both", "shop"),
                Hop { node: "h1".into(), ..Hop::fine("route", "10.1.2.0/24 next hop 5", "10.1.2.0/24 next hop 5") },
                Hop { node: "h2".into(), ..Hop::broken("socket", ("port 80", "none"), "nobody listens", "start it") },
            ],
            summary: "a does not reach b: on h2: nobody listens; repair: start it".into(),
            ..PathReport::default()
        };
        assert_eq!(
            path_text(&report),
            "\
NODE   HOP      STATE    WANTED                   FOUND
-      policy   ok       a network of both        shop
h1     route    ok       10.1.2.0/24 next hop 5
h2     socket   BROKEN   port 80                  none

a does not reach b: on h2: nobody listens; repair: start it
"
        );
    }

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
h1/shop: 7 dropped: VXLAN sent by a container
h2: no answer: the agent of node h2 is not connected
"
        );
    }
}

//! `skein net`: what a user is told of the overlay, on two hosts where things are broken by hand.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{Lab, wait_for},
};

use super::{cluster, lab};
use crate::support::{Checks, skein};

const TWO: &str = r#"
services:
  a:
    image: net-tools
    command: ["sleep", "1000"]
    networks: [one, lonely]
    deploy: {placement: {constraints: ["node.labels.host==h1"]}}
  b:
    image: busybox
    command: ["sh", "-c", "mkdir /www; echo from-b > /www/index.html; exec httpd -f -p 80 -h /www"]
    networks: [one]
    ports: ["8080:80"]
    deploy: {placement: {constraints: ["node.labels.host==h2"]}}
  c:
    image: busybox
    command: ["sleep", "1000"]
    networks: [other]
    deploy: {placement: {constraints: ["node.labels.host==h2"]}}
  d:
    image: busybox
    command: ["sleep", "1000"]
    networks: [lonely]
    deploy: {placement: {constraints: ["node.labels.host==h1"]}}
networks: {one: {}, other: {}, lonely: {internal: true}}
"#;

/// Some checks on the same cluster, which they leave as they found it.
type Section = fn(&mut Checks, &Lab, &Cluster<'_>) -> Result<()>;

#[test]
fn what_is_broken_is_named() -> Result<()> {
    let lab = lab("net", 2, &["busybox", "net-tools"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", TWO)?;
    cluster.stack_up("s", &file)?;
    let sections: [(&str, Section); 8] = [
        ("status", status),
        ("exposed", exposed),
        ("check", check),
        ("paths", paths),
        ("entries", entries),
        ("underlay", underlay),
        ("joined", joined),
        ("inside", inside),
    ];
    let mut checks = Checks::default();
    for (name, section) in sections {
        let result = section(&mut checks, &lab, &cluster);
        checks.ok(name, result);
    }
    checks.finish().with_context(|| lab.logs(40))
}

/// Deletes the routes to other hosts' blocks, in a network's namespace.
const LOSE_ROUTES: &str = "for r in $(ip -4 route show proto 83 | grep nhid | cut -d' ' -f1); do ip route del $r; done";

/// The path of a network's namespace.
fn fabric(cluster: &Cluster<'_>, network: &str) -> Result<String> {
    let network = cluster.json(&["network", "inspect", network])?;
    let network = if network.is_array() { network[0].clone() } else { network };
    Ok(format!("/run/skein/netns/sk-{}", network["id"].as_str().context("no id")?))
}

/// The network of that name in a status of one host.
fn network<'a>(status: &'a Value, name: &str) -> Result<&'a Value> {
    let networks = status[0]["answer"]["networks"].as_array();
    networks.into_iter().flatten().find(|n| n["name"] == name).with_context(|| format!("no {name}: {status}"))
}

fn status(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let h1 = lab.host("h1");
    let quiet = wait_for("everything as wanted", PATIENCE, || {
        let status = cluster.json(&["net", "status", "h1"])?;
        let one = network(&status, "s_one")?;
        let same = status[0]["generation_sent"] == status[0]["generation_acked"];
        Ok((one["scope"]["differences_total"] == 0 && same).then_some(status))
    })?;
    let one = network(&quiet, "s_one")?;
    checks.ensure("peers", one["peers"] == 1 && one["containers"] == 1, one);
    checks.ensure("addresses", one["blocks"][0]["used"] == 1, one);
    let repairs = one["scope"]["repairs_total"].as_u64().context("no count")?;

    let netns = fabric(cluster, "s_one")?;
    h1.run(&["nsenter", &format!("--net={netns}"), "sh", "-c", LOSE_ROUTES])?;
    let repaired = wait_for("the repair", PATIENCE, || {
        let status = cluster.json(&["net", "status", "h1"])?;
        let one = network(&status, "s_one")?.clone();
        let more = one["scope"]["repairs_total"].as_u64() > Some(repairs);
        Ok((more && one["scope"]["differences_total"] == 0).then_some(one))
    })?;
    let words = repaired["scope"]["repairs"].to_string();
    checks.words("what was wrong", &words, &["put route", "to next hop"]);

    // A container that sends its own VXLAN, and one that sends as somebody else.
    let send = "for i in 1 2 3; do echo x | nc -u -w 1 -q 0 $0 4789; done";
    let vtep = lab.host("h2").ipv4().to_string();
    cluster.skein(&["exec", "s_a.1", "--", "sh", "-c", send, &vtep])?;
    let drops = wait_for("drops", PATIENCE, || {
        let status = cluster.json(&["net", "status", "h1"])?;
        let drops = network(&status, "s_one")?["scope"]["drops"].clone();
        Ok(drops["VXLAN sent by a container"].as_u64().map(|_| drops))
    });
    checks.ok("VXLAN of a container is counted", drops);

    let table = cluster.skein(&["net", "status"])?;
    checks.words("the table", &table, &["h1", "h2", "s_one", "s_other", "as wanted", "repaired", "dropped: "]);
    let said = skein(cluster, &["net", "status", "h3"])?;
    checks.refused("an unknown node", &said, 3, &["no node \"h3\"; did you mean \"h1\"?"]);

    cluster.process("h2", "skein-agent")?.kill()?;
    let answers = wait_for("no answer of h2", PATIENCE, || {
        let answers = cluster.json(&["net", "status"])?;
        Ok(answers[1]["error"].is_string().then_some(answers))
    })?;
    let fine = answers[0]["answer"].is_object() && answers[1]["name"] == "h2";
    checks.ensure("the other one answers", fine, &answers);
    ensure!(answers[1]["error"].as_str().is_some_and(|e| e.contains("not connected")), "{answers}");
    cluster.start_agent("h2")?;
    cluster.wait_for_nodes(2)
}

/// Asks for a path that does not work, and looks at its one sentence.
fn broken(checks: &mut Checks, cluster: &Cluster<'_>, name: &str, args: &[&str], words: &[&str]) -> Result<()> {
    let said = skein(cluster, &[&["net", "path"], args].concat())?;
    checks.ensure(name, said.code == 1, format_args!("{said:?}"));
    let sentence = said.out.lines().last().unwrap_or_default();
    checks.words(name, sentence, &[words, &["does not reach", "; repair: "]].concat());
    Ok(())
}

/// Asks for a path that works.
fn works(checks: &mut Checks, cluster: &Cluster<'_>, name: &str, args: &[&str]) -> Result<Value> {
    let said = skein(cluster, &[&["net", "path"], args, &["-o", "json"]].concat())?;
    checks.ensure(name, said.code == 0, format_args!("{said:?}"));
    Ok(serde_json::from_str(&said.out).unwrap_or_default())
}

fn paths(checks: &mut Checks, _: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let report = works(checks, cluster, "a service", &["s_a.1", "s_b", "--port", "80"])?;
    let hops: Vec<&str> =
        report["hops"].as_array().into_iter().flatten().filter_map(|hop| hop["hop"].as_str()).collect();
    for hop in
        ["policy", "name", "virtual address", "route", "forwarding entry", "underlay", "vxlan guard", "route back"]
    {
        checks.ensure("every hop", hops.contains(&hop), format_args!("{hop} is not in {hops:?}"));
    }
    checks.ensure("it answered", hops.last() == Some(&"probe") && hops.contains(&"socket"), format_args!("{hops:?}"));
    works(checks, cluster, "a task, echo", &["s_a", "s_b.1"])?;
    works(checks, cluster, "the way back", &["s_b.1", "s_a.1"])?;
    works(checks, cluster, "two hosts", &["h1", "h2"])?;
    works(checks, cluster, "a published port", &["h1", "s_b", "--port", "80"])?;
    works(checks, cluster, "out of the overlay", &["s_a.1", "h2"])?;

    let to_b = |port| ["s_a.1", "s_b", "--port", port];
    broken(checks, cluster, "wrong port", &to_b("81"), &["on h2: nobody", "port 81/tcp", "use one of 80/tcp"])?;
    let udp = [&to_b("80")[..], &["--proto", "udp"]].concat();
    broken(checks, cluster, "wrong protocol", &udp, &["nobody in the container listens on port 80/udp"])?;
    broken(
        checks,
        cluster,
        "no network of both",
        &["s_a.1", "s_c"],
        &["s_a.1 is in", "s_c is in s_other", "share no network"],
    )?;
    broken(checks, cluster, "internal", &["s_d.1", "h2"], &["s_d.1 is in internal networks only"])?;
    broken(checks, cluster, "not published", &["h1", "s_c.1"], &["hosts reach no container directly"])?;
    cluster.skein(&["exec", "s_b.1", "--", "httpd", "-p", "127.0.0.1:90", "-h", "/www"])?;
    broken(checks, cluster, "for itself only", &to_b("90"), &["listens on 127.0.0.1:90 only", "listen on 0.0.0.0:90"])?;
    let said = skein(cluster, &["net", "path", "s_a.1", "s_bb.1"])?;
    checks.refused("an unknown name", &said, 3, &["no task, service or node \"s_bb.1\"; did you mean \"s_b.1\"?"]);
    Ok(())
}

/// Entries of the kernel that are gone are named, if the question comes before the repair, half a second later.
fn entries(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let netns = format!("--net={}", fabric(cluster, "s_one")?);
    let cases = [
        ("route", LOSE_ROUTES),
        ("neighbour", "for n in $(ip neigh show dev skvx | cut -d' ' -f1); do ip neigh del $n dev skvx; done"),
        (
            "forwarding entry",
            "bridge fdb show dev skvx | grep dst | while read mac dst vtep rest; do bridge fdb del $mac dev skvx dst $vtep; done",
        ),
    ];
    for (hop, breaks) in cases {
        let named = wait_for(&format!("the {hop} to be named"), PATIENCE, || {
            lab.host("h1").run(&["nsenter", &netns, "sh", "-c", breaks])?;
            let said = skein(cluster, &["net", "path", "s_a.1", "s_b.1"])?;
            let sentence = said.out.lines().last().unwrap_or_default().to_owned();
            Ok((sentence.contains("on h1: the ") && sentence.contains(hop)).then_some(sentence))
        });
        if let Some(sentence) = checks.ok(hop, named) {
            checks.words(hop, &sentence, &["is gone", "puts it right within a second"]);
        }
        let again = || Ok((skein(cluster, &["net", "path", "s_a.1", "s_b.1"])?.code == 0).then_some(()));
        checks.ok("and is repaired", wait_for("the repair", PATIENCE, again));
    }
    Ok(())
}

fn underlay(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let ask = ["s_a.1", "s_b.1"];
    lab.cut("h1", "h2")?;
    broken(checks, cluster, "a cut", &ask, &["on h1: ", "does not answer on the underlay", "ping "])?;
    lab.heal()?;
    let h2 = lab.host("h2");
    h2.run(&[
        "nft",
        "add table ip foreign; add chain ip foreign in { type filter hook input priority -200; }; \
        add rule ip foreign in udp dport 4789 drop",
    ])?;
    let words = ["on h2: VXLAN of h1 does not get in", "table ip foreign, chain in: udp dport 4789 drop", "let UDP"];
    broken(checks, cluster, "a foreign rule", &ask, &words)?;
    h2.run(&["nft", "delete table ip foreign"])?;
    works(checks, cluster, "and without it", &ask)?;
    Ok(())
}

/// What a container does to itself; last, since nobody repairs it.
fn inside(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let task = cluster.task("s_a.1")?;
    let id = task["status"]["container_id"].as_str().context("no container")?;
    let pid = lab.host("h1").docker(&["inspect", "-f", "{{.State.Pid}}", id])?;
    lab.host("h1").run(&["nsenter", "-t", pid.trim(), "-n", "ip", "-4", "route", "flush", "table", "main"])?;
    broken(checks, cluster, "no route inside", &["s_a.1", "s_b.1"], &["on h1: the container has no route to"])
}

/// The published port with its task, a program with its process, VXLAN with the other host; loopback apart.
fn exposed(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let h2 = lab.host("h2");
    let mut programs = Vec::new();
    for (address, port) in [("0.0.0.0", "7001"), ("127.0.0.1", "7002")] {
        programs.push(h2.command("nc").args(["-l", address, port]).stdin(std::process::Stdio::piped()).spawn()?);
    }
    let named = wait_for("both programs", PATIENCE, || {
        let text = cluster.skein(&["net", "exposed", "h2"])?;
        Ok((text.contains("7001/tcp") && text.contains("7002/tcp")).then_some(text))
    });
    for program in &mut programs {
        program.kill()?;
        program.wait()?;
    }
    let text = named?;
    let (outside, inside) = text.split_once("only from the host itself").context("no second part")?;
    let line = |part: &str, port: &str| part.lines().find(|l| l.contains(port)).unwrap_or_default().to_owned();
    checks.words("published", &line(outside, "8080/tcp"), &["h2", "any", "published", "s_b.1", "in s_one"]);
    checks.words("a program", &line(outside, "7001/tcp"), &["any", "program", "nc", "(pid "]);
    let vtep = lab.host("h1").ipv4().to_string();
    checks.words("VXLAN", &line(outside, "4789/udp"), &["vxlan", "from", &vtep, "only"]);
    checks.words("loopback", &line(inside, "7002/tcp"), &["127.0.0.1", "program"]);
    checks.ensure("only there", !outside.contains("7002/tcp"), outside);
    Ok(())
}

/// All ways of two hosts; one that loses large packets, with the size; somebody else on the port; what a crash leaves.
fn check(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let h2 = lab.host("h2");
    let said = skein(cluster, &["net", "check"])?;
    checks.ensure("all is well", said.code == 0, format_args!("{said:?}"));
    checks.words("all is well", &said.out, &["all is well: 4 ways", "h1", "h2", "IPv4", "IPv6", "1450"]);
    let netns = format!("--net={}", fabric(cluster, "s_one")?);
    let given_back = || {
        let left = h2.run(&["nsenter", &netns, "ip", "-4", "-o", "addr", "show", "dev", "lo"])?;
        Ok((left.lines().count() == 2).then_some(()))
    };
    checks.ok("only 127.0.0.1 and the gateway are left", wait_for("the end of a check", PATIENCE, given_back));

    // VXLAN adds 50 bytes: packets of 1400 pass.
    let rule = "add table ip small; add chain ip small in { type filter hook input priority -200; }; \
        add rule ip small in udp dport 4789 meta length > 1450 drop";
    h2.run(&["nft", rule])?;
    let said = skein(cluster, &["net", "check", "h1"])?;
    checks.ensure("a way that loses large packets", said.code == 1, format_args!("{said:?}"));
    let words = ["h1 -> h2: IPv4: packets of 1401 bytes and more are lost, 1400 pass, and the network's MTU is 1450"];
    checks.words("with the size", &said.out, &words);
    h2.run(&["nft", "delete table ip small"])?;

    h2.run(&["ip", "link", "add", "foreign0", "type", "vxlan", "id", "77", "dstport", "4789"])?;
    let said = skein(cluster, &["net", "check"])?;
    let words = ["h2: device foreign0 (vni 77), which is not Skein's, uses UDP port 4789 too", "another `vxlan_port`"];
    checks.ensure("somebody else on the port", said.code == 1, format_args!("{said:?}"));
    checks.words("somebody else on the port", &said.out, &words);
    h2.run(&["ip", "link", "del", "foreign0"])?;
    Ok(())
}

/// A host that has just joined is checked by itself; while its tunnel loses large packets it says so.
fn joined(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let rule = "add table ip small; add chain ip small in { type filter hook input priority -200; }; \
        add rule ip small in udp dport 4789 meta length > 1450 drop";
    let h2 = lab.host("h2");
    h2.run(&["nft", rule])?;
    // A master that starts anew looks at all hosts that are new.
    cluster.process("master", "skein-master")?.kill()?;
    cluster.start_master()?;
    cluster.wait_for_nodes(2)?;
    let told = wait_for("the trouble of a new host", PATIENCE, || {
        let table = cluster.skein(&["node", "ls"])?;
        Ok(table.contains("skein net check: ").then_some(table))
    });
    if let Some(table) = checks.ok("a trouble", told) {
        checks.words("which", &table, &["h1 -> h2: IPv4: packets of 1401 bytes and more are lost"]);
    }
    h2.run(&["nft", "delete table ip small"])?;
    Ok(())
}

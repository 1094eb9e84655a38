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
networks: {one: {}, other: {}, lonely: {internal: true}}
"#;

#[test]
fn what_is_broken_is_named() -> Result<()> {
    let lab = lab("net", 2, &["busybox", "net-tools"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", TWO)?;
    cluster.stack_up("s", &file)?;
    let mut checks = Checks::default();
    status(&mut checks, &lab, &cluster)?;
    checks.finish().with_context(|| lab.logs(40))
}

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
    h1.run(&["nsenter", &format!("--net={netns}"), "ip", "route", "flush", "proto", "83", "type", "unicast"])?;
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
    checks.words("the table", &table, &["h1", "h2", "s_one", "s_other", "as wanted", "repaired", "packets dropped"]);
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

//! Join, place, talk, kill, rejoin: the main path and its recoveries.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{Lab, wait_for},
};

use super::{cluster, lab};

const TWO: &str = r#"
services:
  a:
    image: net-tools
    command: ["sh", "-c", "echo started; exec sleep 1000"]
    deploy: {placement: {constraints: ["node.labels.host==h1"]}}
  b:
    image: busybox
    command: ["sh", "-c", "mkdir /www; echo from-b > /www/index.html; exec httpd -f -p 80 -h /www"]
    networks: {default: {aliases: [web]}}
    ports: ["8080:80"]
    environment: ["constraint:host==h2"]
"#;

/// A shell's HTTP request.
fn get(host: &str) -> String {
    format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -N -w 2 {host} 80")
}

#[test]
fn services_on_two_hosts_find_each_other() -> Result<()> {
    let lab = lab("path", 2, &["busybox", "net-tools"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", TWO)?;
    let said = cluster.stack_up("s", &file)?;
    ensure!(said.contains("s_a") || said.is_empty(), "{said}");
    let (a, b) = (cluster.wait_for_running("s_a.1")?, cluster.wait_for_running("s_b.1")?);
    ensure!(cluster.node_name(&a["node"])? == "h1" && cluster.node_name(&b["node"])? == "h2");
    for name in ["b", "s_b", "web", "s_b.1", "tasks.b"] {
        let got = cluster.skein(&["exec", "s_a.1", "--", "sh", "-c", &get(name)])?;
        ensure!(got.contains("from-b"), "{name}: {got}");
    }
    virtual_address(&cluster, &b)?;
    ensure!(cluster.skein(&["logs", "s_a.1"])?.contains("started"));
    published_port(&lab)?;
    // The same file again changes nothing.
    let again = cluster.skein(&["up", "-f", &file.display().to_string(), "-p", "s", "--yes", "--dry-run"])?;
    ensure!(!again.contains("recreate"), "{again}");
    let answer = cluster.skein(&["what-if", "drain", "h1"])?;
    ensure!(answer.contains("1 task would find no place") && answer.contains("s_a.1"), "{answer}");
    agents_killed(&lab, &cluster, &a)?;
    master_killed(&cluster, &a)?;
    cluster.skein(&["down", "-p", "s", "--yes"])?;
    wait_for("no container to be left", PATIENCE, || {
        let left: Vec<String> = lab.engines().map(|h| h.docker(&["ps", "-aq"])).collect::<Result<Vec<_>>>()?;
        Ok(left.iter().all(String::is_empty).then_some(()))
    })
    .with_context(|| lab.logs(40))
}

/// The name of a service is its virtual address, which leads to the task on the other host; `tasks.` names the task.
fn virtual_address(cluster: &Cluster<'_>, b: &Value) -> Result<()> {
    let service: Value = serde_json::from_str(&cluster.skein(&["service", "inspect", "s_b", "-o", "json"])?)?;
    let service = if service.is_array() { service[0].clone() } else { service };
    let address = |of: &Value| -> Result<String> { Ok(of["v4"].as_str().context("no address")?.to_owned()) };
    let (vip, own) = (address(&service["vips"][0])?, address(&b["status"]["addresses"][0])?);
    for (name, expected) in [("b", &vip), ("web", &vip), ("tasks.b", &own)] {
        let found = cluster.skein(&["exec", "s_a.1", "--", "dig", "+short", name, "A"])?;
        ensure!(found.trim() == expected, "{name} is {expected}: {found}");
    }
    let servers = cluster.skein(&["exec", "s_a.1", "--", "dig", "+short", "_80._tcp.b", "SRV"])?;
    ensure!(servers.trim() == "0 0 80 s_b.1.s_default.", "{servers}");
    cluster.skein(&["exec", "s_a.1", "--", "ping", "-c", "1", "-W", "2", "b"])?;
    Ok(())
}

/// A published port works on the host that runs the container.
fn published_port(lab: &Lab) -> Result<()> {
    let ask =
        format!("exec 3<>/dev/tcp/{}/8080; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3", lab.host("h2").ipv4());
    let got = lab.host("master").run(&["timeout", "5", "bash", "-c", &ask])?;
    ensure!(got.contains("from-b"), "{got}");
    Ok(())
}

fn container_of(lab: &Lab, task: &Value) -> Result<String> {
    let id = task["status"]["container_id"].as_str().context("no container id")?;
    lab.host("h1").docker(&["inspect", "-f", "{{.Id}} {{.State.StartedAt}} {{.RestartCount}}", id])
}

/// Both agents die under load: no request is lost and no container restarted. Requests go to the name: look-ups that
/// come while no agent is there wait for the next one.
fn agents_killed(lab: &Lab, cluster: &Cluster<'_>, a: &Value) -> Result<()> {
    let before = container_of(lab, a)?;
    let id = a["status"]["container_id"].as_str().context("no container id")?;
    let get = get("b");
    let loops =
        format!("i=0; while [ $i -lt 300 ]; do {get} | grep -q from-b || echo lost; i=$((i+1)); done; echo done");
    let mut load = lab.host("h1").docker_command();
    let load = load.args(["exec", id, "sh", "-c", &loops]).stdout(std::process::Stdio::piped()).spawn()?;
    for host in ["h1", "h2"] {
        cluster.process(host, "skein-agent")?.signal(Signal::SIGKILL)?;
    }
    for host in ["h1", "h2"] {
        cluster.start_agent(host)?;
    }
    let output = load.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.trim() == "done", "requests were lost: {said}");
    cluster.wait_for_nodes(2)?;
    ensure!(container_of(lab, a)? == before, "the container was restarted");
    Ok(())
}

/// The master dies and comes back: the same tasks in the same containers.
fn master_killed(cluster: &Cluster<'_>, a: &Value) -> Result<()> {
    cluster.process("master", "skein-master")?.kill()?;
    cluster.start_master()?;
    cluster.wait_for_nodes(2)?;
    let now = cluster.wait_for_running("s_a.1")?;
    ensure!(now["id"] == a["id"] && now["status"]["container_id"] == a["status"]["container_id"], "{now}");
    Ok(())
}

//! What is behind a virtual address: it goes before it stops.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use xtask::{cluster::PATIENCE, lab::wait_for};

use super::{cluster, lab};

const SERVED: &str = r#"
services:
  web:
    image: busybox
    # Each answer takes a second, and the stop signal leaves it no time.
    command: ["sh", "-c", "mkdir -p /www/cgi-bin; cd /www/cgi-bin; (echo '#!/bin/sh'; echo sleep 1; echo echo
      Content-type: text/plain; echo echo; echo echo from-web) > slow; chmod +x slow; exec httpd -f -p 80 -h /www"]
    stop_signal: SIGKILL
    deploy: {replicas: 2, x-skein: {drain: 2s}}
  client:
    image: net-tools
    command: ["sleep", "1000"]
    deploy: {placement: {constraints: ["node.labels.host==h1"]}}
"#;

/// Eight clients, each with one request after the other over a connection of its own, until they are told to stop: at any
/// time some answers are still to come.
const LOAD: &str = "for i in 1 2 3 4 5 6 7 8; do (while [ ! -e /tmp/stop ]; do \
    printf 'GET /cgi-bin/slow HTTP/1.0\\r\\n\\r\\n' | nc -w 5 web 80 | grep -q from-web && echo answered || echo lost; touch /tmp/goes; \
    done) & done; wait";

#[test]
fn draining_a_node_loses_no_request() -> Result<()> {
    let lab = lab("served", 2, &["busybox", "net-tools"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", SERVED)?;
    cluster.stack_up("s", &file)?;
    let client = cluster.wait_for_running("s_client.1")?;
    let nodes_of_web = || -> Result<Vec<String>> {
        let tasks = cluster.tasks()?;
        let runs = tasks.iter().filter(|t| {
            let (name, state) = (t["name"].as_str().unwrap_or_default(), &t["status"]["state"]);
            name.starts_with("s_web.") && *state == "running" && t["desired_state"] == "running"
        });
        let mut nodes = runs.map(|t| cluster.node_name(&t["node"])).collect::<Result<Vec<_>>>()?;
        nodes.sort();
        Ok(nodes)
    };
    let until = |wanted: &[&str]| {
        wait_for(&format!("web to run on {wanted:?}"), PATIENCE, || Ok((nodes_of_web()? == wanted).then_some(())))
            .with_context(|| lab.logs(40))
    };
    until(&["h1", "h2"])?;

    let h1 = lab.host("h1");
    let id = client["status"]["container_id"].as_str().context("no container id")?;
    let load = h1.docker_command().args(["exec", id, "sh", "-c", LOAD]).stdout(Stdio::piped()).spawn()?;
    wait_for("the first answer", PATIENCE, || Ok(h1.docker(&["exec", id, "ls", "/tmp/goes"]).ok()))?;
    cluster.skein(&["node", "drain", "h2"])?;
    until(&["h1", "h1"])?;
    h1.docker(&["exec", id, "touch", "/tmp/stop"])?;
    let output = load.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |word: &str| said.lines().filter(|line| *line == word).count();
    ensure!(count("lost") == 0 && count("answered") > 16, "{} lost, {} answered", count("lost"), count("answered"));
    Ok(())
}

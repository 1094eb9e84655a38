//! Ports that lead to services: from every host, without losing a request when tasks are replaced or stop.

use std::{
    net::{IpAddr, SocketAddr},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{
        Host, Lab,
        probe::{Place, Probe, Request},
        wait_for,
    },
};

use super::{cluster, lab};

/// A service whose answers take half a second and name the client, and whose stop signal leaves them no time. It is
/// served from the moment it listens. `{round}`: what makes it another one.
const SERVED: &str = r#"
services:
  web:
    image: busybox
    environment: {ROUND: "{round}"}
    command:
      - sh
      - -c
      - |
        mkdir -p /www/cgi-bin; cd /www/cgi-bin
        cat > slow <<'END'
        #!/bin/sh
        sleep 0.5
        printf 'Content-type: text/plain\r\n\r\n'
        echo from-web $$REMOTE_ADDR.
        END
        chmod +x slow; touch ../ok
        exec httpd -f -p 80 -h /www
    stop_signal: SIGKILL
    healthcheck: {test: ["CMD-SHELL", "wget -q -O /dev/null http://127.0.0.1/ok"], interval: 1s, retries: 100}
    ports: [{target: 80, published: 8080, mode: ingress}]
    deploy:
      replicas: 1
      placement: {constraints: ["node.labels.host==h2"]}
      update_config: {order: start-first}
      x-skein: {drain: 2s}
  client:
    image: net-tools
    command: ["sleep", "1000"]
    deploy: {placement: {constraints: ["node.labels.host==h1"]}}
"#;

fn slow() -> Request {
    Request::get("/cgi-bin/slow")
}

fn at(host: &Host, port: u16) -> SocketAddr {
    SocketAddr::from((host.ipv4(), port))
}

/// Four clients in a container, each with one request after the other by the service's name, until they are told to stop.
const LOAD: &str = "for i in 1 2 3 4; do (while [ ! -e /tmp/stop ]; do \
    printf 'GET /cgi-bin/slow HTTP/1.0\\r\\n\\r\\n' | nc -w 5 web 80 | grep -q from-web && echo answered || echo lost; \
    done) & done; wait";

fn load(host: &Host, container: &str) -> Result<Child> {
    Ok(host.docker_command().args(["exec", container, "sh", "-c", LOAD]).stdout(Stdio::piped()).spawn()?)
}

/// The client that a backend names in its answer.
fn client_of(answer: &str) -> Result<IpAddr> {
    let address = answer.trim().trim_end_matches('.').rsplit(' ').next().context("no answer")?;
    let address: IpAddr = address.trim_matches(['[', ']']).parse().with_context(|| format!("answered {answer:?}"))?;
    Ok(address.to_canonical())
}

/// Puts the next round in place, and waits until what ran before has ended.
fn replace(cluster: &Cluster<'_>, up: &dyn Fn(u32) -> Result<()>, round: u32) -> Result<()> {
    let running = || -> Result<Vec<String>> {
        let tasks =
            cluster.tasks()?.into_iter().filter(|t| t["name"] == "s_web.1" && t["status"]["state"] == "running");
        Ok(tasks.filter_map(|t| t["id"].as_str().map(str::to_owned)).collect())
    };
    let before = running()?;
    up(round)?;
    let ended = || {
        let now = running()?;
        Ok((!now.is_empty() && now.iter().all(|id| !before.contains(id))).then_some(()))
    };
    wait_for("the old task to end", PATIENCE, ended)
}

#[test]
fn replacing_behind_a_port_of_every_host_loses_no_request() -> Result<()> {
    let lab = lab("everywhere", 3, &["busybox", "net-tools"])?;
    let cluster = cluster(&lab)?;
    let up = |round: u32| -> Result<()> {
        let file = cluster.compose_file("s", &SERVED.replace("{round}", &round.to_string()))?;
        cluster.stack_up("s", &file).map(drop)
    };
    // A program of h3 has the port: the others serve it all the same, and h3 says who has it.
    let [h1, h2, h3] = ["h1", "h2", "h3"].map(|name| lab.host(name));
    let listener = ["-d", "--name", "other", "--network", "host", "busybox", "nc", "-l", "-p", "8080"];
    h3.docker(&[&["run"], &listener[..]].concat())?;
    up(0)?;
    let client = cluster.wait_for_running("s_client.1")?;
    let id = client["status"]["container_id"].as_str().context("no container id")?.to_owned();
    cluster.wait_for_running("s_web.1")?;
    let outside = Place::host(h1);
    let trouble =
        "port 8080/tcp of service web does not lead there from this host: port 8080/tcp of this host is in use by";
    let told = || Ok(cluster.skein(&["node", "inspect", "h3"])?.contains(trouble).then_some(()));
    wait_for("h3 to say who has the port", PATIENCE, told).with_context(|| lab.logs(40))?;
    let reached = |host: &Host| {
        let answers = || Ok(slow().send(&outside, at(host, 8080)).ok());
        wait_for(&format!("an answer by {}", host.name()), PATIENCE, answers).with_context(|| lab.logs(40))
    };
    reached(h1)?;
    h3.docker(&["rm", "-f", "other"])?;
    // With the next change, or within a minute.
    replace(&cluster, &up, 1)?;

    // The host that has the backend keeps the client's address. Others, h3 has none of its tasks, have one of theirs.
    let network = cluster.json(&["network", "inspect", "s_default"])?;
    let subnet: ipnet::Ipv4Net = network["subnet4"].as_str().context("no subnet")?.parse()?;
    for (host, kept) in [(h2, true), (h1, false), (h3, false)] {
        let seen = client_of(&reached(host)?)?;
        let inside = matches!(seen, IpAddr::V4(seen) if subnet.contains(&seen));
        ensure!(if kept { seen == IpAddr::V4(h1.ipv4()) } else { inside }, "by {}: seen as {seen}", host.name());
    }
    ensure!(cluster.skein(&["ps"])?.contains("*:8080->80/tcp"), "skein ps shows it");
    ensure!(cluster.skein(&["service", "ls"])?.contains("*:8080->80/tcp"), "skein service ls shows it");
    let (code, said) = cluster.skein_fails(&["run", "-d", "-p", "8080:80", "busybox", "sleep", "1"])?;
    ensure!(code == 4 && said.contains("on every host it belongs to service s_web"), "{code}: {said}");

    let probes = [h1, h2, h3].map(|host| Probe::requests(&outside, at(host, 8080), slow(), Duration::from_millis(20)));
    let inside = load(h1, &id)?;
    for round in 2..=4 {
        replace(&cluster, &up, round).with_context(|| lab.logs(40))?;
    }
    for (probe, host) in probes.into_iter().zip(["h1", "h2", "h3"]) {
        let report = probe?.stop();
        ensure!(report.lost == 0 && report.sent > 10, "by {host}: {report:?}");
    }
    h1.docker(&["exec", &id, "touch", "/tmp/stop"])?;
    answered(inside, 20)
}

/// Nothing was lost, and at least so many were answered.
fn answered(load: Child, least: usize) -> Result<()> {
    let output = load.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |word: &str| said.lines().filter(|line| *line == word).count();
    let (lost, answered) = (count("lost"), count("answered"));
    ensure!(lost == 0 && answered >= least, "{lost} lost, {answered} answered");
    Ok(())
}

const ON_HOSTS: &str = r#"
services:
  web:
    image: busybox
    command:
      - sh
      - -c
      - |
        mkdir -p /www/cgi-bin; cd /www/cgi-bin
        cat > slow <<'END'
        #!/bin/sh
        touch /tmp/asked
        sleep 4
        printf 'Content-type: text/plain\r\n\r\n'
        echo from-web
        END
        chmod +x slow
        exec httpd -f -p 80 -h /www
    stop_signal: SIGKILL
    ports: ["8081:80"]
    deploy: {replicas: 2, endpoint_mode: dnsrr, x-skein: {drain: 8s}}
"#;

#[test]
fn a_published_port_closes_before_its_task_stops() -> Result<()> {
    let lab: Lab = lab("onhosts", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", ON_HOSTS)?;
    cluster.stack_up("s", &file)?;
    let [h1, h2] = ["h1", "h2"].map(|name| lab.host(name));
    let (outside, to) = (Place::host(h1), at(h2, 8081));
    let answers = || Ok(Request::get("/cgi-bin/slow").send(&outside, to).ok());
    wait_for("an answer", PATIENCE, answers).with_context(|| lab.logs(40))?;
    let task = cluster.tasks()?.into_iter().find(|t| {
        t["name"].as_str().is_some_and(|name| name.starts_with("s_web."))
            && cluster.node_name(&t["node"]).is_ok_and(|name| name == "h2")
    });
    let task = task.context("a task on h2")?;
    let (id, task) = (task["status"]["container_id"].as_str().context("no container")?.to_owned(), task["id"].clone());

    h2.docker(&["exec", &id, "rm", "/tmp/asked"])?;
    let from = outside.clone();
    let open = thread::spawn(move || Request::get("/cgi-bin/slow").send(&from, to));
    let asked = || Ok(h2.docker(&["exec", &id, "ls", "/tmp/asked"]).ok());
    wait_for("the request to be on its way", PATIENCE, asked)?;
    cluster.skein(&["node", "drain", "h2"])?;
    let refused = || match Request::get("/").send(&outside, to) {
        Err(error) if format!("{error:#}").contains("refused") => Ok(Some(())),
        _ => Ok(None),
    };
    wait_for("new connections to be refused", Duration::from_secs(3), refused).with_context(|| lab.logs(40))?;
    let state = |id: &Value| -> Result<Value> {
        let task = cluster.tasks()?.into_iter().find(|t| t["id"] == *id);
        Ok(task.context("it is kept")?["status"]["state"].clone())
    };
    ensure!(state(&task)? == "running", "its time is not over");
    match open.join() {
        Ok(answer) => ensure!(answer?.contains("from-web"), "the open request was answered"),
        Err(_) => bail!("the request's thread panicked"),
    }
    ensure!(state(&task)? == "running", "it was answered while there was time");
    wait_for("it to stop", PATIENCE, || Ok((state(&task)? != "running").then_some(())))
}

//! What goes comes back: hosts that are lost, agents, masters and engines that die, certificates that end, nodes that
//! are removed, and backups.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use skein_agent::identity::IdentityDir;
use xtask::{
    cluster::{Cluster, NodeOptions, PATIENCE, program},
    lab::{Host, Lab, Process, Spawn, Status, wait_for},
};

use super::{
    cluster, lab,
    support::{Checks, Said, container, containers, run, skein},
};

/// A service on each host that serves its host's name, and names to find them by.
pub(crate) const PAIR: &str = r#"
x-web: &web
  image: busybox
  command: ["sh", "-c", "mkdir -p /www; hostname > /www/index.html; exec httpd -f -p 80 -h /www"]
  stop_grace_period: 0s
services:
  a: {<<: *web, hostname: in-a, deploy: {placement: {constraints: ["node.labels.host==h1"]}}}
  b: {<<: *web, hostname: in-b, deploy: {placement: {constraints: ["node.labels.host==h2"]}}}
"#;

/// `skein exec FROM -- wget http://NAME/`, for so many seconds at most.
pub(crate) fn fetch(cluster: &Cluster<'_>, from: &str, name: &str, seconds: u32) -> Result<String> {
    let (url, seconds) = (format!("http://{name}/"), seconds.to_string());
    Ok(cluster.skein(&["exec", from, "--", "timeout", &seconds, "wget", "-qO-", &url])?.trim().to_owned())
}

/// Both directions work.
fn talk(cluster: &Cluster<'_>) -> Result<()> {
    let both = || [fetch(cluster, "s_a.1", "b", 3), fetch(cluster, "s_b.1", "a", 3)];
    wait_for("the two services to reach each other", PATIENCE, || {
        let [b, a] = both();
        Ok((b.is_ok_and(|t| t == "in-b") && a.is_ok_and(|t| t == "in-a")).then_some(()))
    })
    .with_context(|| format!("{:?}", both()))
}

fn node_state(cluster: &Cluster<'_>, name: &str) -> Result<String> {
    let nodes = cluster.json(&["node", "ls"])?;
    let node = nodes.as_array().into_iter().flatten().find(|n| n["name"] == name);
    Ok(node.and_then(|n| n["status"]["state"].as_str()).unwrap_or("gone").to_owned())
}

pub(crate) fn wait_for_node(cluster: &Cluster<'_>, name: &str, state: &str) -> Result<()> {
    wait_for(
        &format!("node {name} to be {state}"),
        PATIENCE,
        || Ok((node_state(cluster, name)? == state).then_some(())),
    )
}

#[test]
fn tasks_of_a_lost_host_are_replaced() -> Result<()> {
    let lab = lab("lost", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file(
        "s",
        "services:\n  \
         web: {image: busybox, command: [sleep, \"1000\"], deploy: {replicas: 2}, stop_grace_period: 0s}\n  \
         data: {image: busybox, command: [sleep, \"1000\"], volumes: [\"d:/d\"], stop_grace_period: 0s, \
         deploy: {placement: {constraints: [\"node.labels.host==h1\"]}}}\n\
         volumes: {d: }\n",
    )?;
    cluster.stack_up("s", &file)?;
    let webs = [cluster.wait_for_running("s_web.1")?, cluster.wait_for_running("s_web.2")?];
    let on_h1 = |t: &&Value| cluster.node_name(&t["node"]).is_ok_and(|n| n == "h1");
    let lost = webs.iter().find(on_h1).context("two replicas are not spread over two hosts")?;
    let (name, old) = (lost["name"].as_str().context("no name")?, container(lost)?);
    lab.cut("h1", "master")?;
    wait_for_node(&cluster, "h1", "down")?;
    let replaced = cluster.wait_for_running(name)?;
    let mut checks = Checks::default();
    checks.ensure("another task", replaced["id"] != lost["id"], &replaced);
    checks.ensure("elsewhere", cluster.node_name(&replaced["node"])? == "h2", &replaced);
    // Nobody told the host: without a master everything goes on.
    let state = lab.host("h1").docker(&["inspect", "-f", "{{.State.Status}}", old])?;
    checks.ensure("the lost host's container goes on", state == "running", state);
    // What can only run there waits, and says so.
    let why = cluster.skein(&["explain", "s_data"])?;
    checks.words("pinned task", &why, &["no node fits: 2 nodes", "1 not ready"]);

    lab.heal()?;
    wait_for_node(&cluster, "h1", "ready")?;
    wait_for("the old copy to be stopped", PATIENCE, || {
        let running = lab.host("h1").docker(&["ps", "-q", "--no-trunc"])?;
        Ok((!running.contains(old)).then_some(()))
    })?;
    let now = cluster.task(name)?;
    checks.ensure("the replacement stays", now["id"] == replaced["id"], &now);
    let data = cluster.wait_for_running("s_data.1")?;
    checks.ensure("the pinned task is back at its volume", cluster.node_name(&data["node"])? == "h1", &data);
    checks.finish().with_context(|| lab.logs(30))
}

/// Log lines with this text, to wait for one more than there were.
fn count_in_log(process: &Process, text: &str) -> Result<usize> {
    Ok(process.log()?.matches(text).count())
}

/// Kills an agent and starts it again; waits until it has a session and works.
fn restart_agent(cluster: &Cluster<'_>, host: &str, signal: Signal) -> Result<()> {
    let old = cluster.process(host, "skein-agent")?;
    let sessions = count_in_log(&old, "session begun")?;
    old.signal(signal)?;
    wait_for("the agent to end", PATIENCE, || Ok((!old.is_running()).then_some(())))?;
    let new = cluster.start_agent(host)?;
    wait_for("a session", PATIENCE, || Ok((count_in_log(&new, "session begun")? > sessions).then_some(())))
        .with_context(|| new.log_tail())
}

/// Runs a container of its own on each host to its end: what an agent had to do before is done then.
fn exercise(cluster: &Cluster<'_>, hosts: &[&str]) -> Result<()> {
    for host in hosts {
        let constraint = format!("node.labels.host=={host}");
        let said = skein(cluster, &["run", "--rm", "--constraint", &constraint, "busybox", "echo", host])?;
        ensure!(said.code == 0 && said.out.trim() == *host, "{said:?}");
    }
    Ok(())
}

/// Events of the engine about these containers since then, but for what `exec` makes.
fn events_of(host: &Host, ids: &[&str], since: &str) -> Result<Vec<String>> {
    let now = host.run(&["date", "+%s.%N"])?;
    let args = [
        "events",
        "--filter",
        "type=container",
        "--format",
        "{{.ID}} {{.Action}}",
        "--since",
        since,
        "--until",
        now.trim(),
    ];
    let all = host.docker(&args)?;
    let of_ours = |line: &&str| ids.iter().any(|id| line.starts_with(id)) && !line.contains(" exec_");
    Ok(all.lines().filter(of_ours).map(str::to_owned).collect())
}

#[test]
fn killed_agents_and_masters_touch_nothing() -> Result<()> {
    let lab = lab("killed", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", PAIR)?;
    cluster.stack_up("s", &file)?;
    cluster.skein(&["run", "-d", "--name", "alone", "--restart", "always", "busybox", "sleep", "1000"])?;
    let tasks =
        [cluster.wait_for_running("s_a.1")?, cluster.wait_for_running("s_b.1")?, cluster.wait_for_running("alone")?];
    let ids: Vec<&str> = tasks.iter().map(container).collect::<Result<_>>()?;
    talk(&cluster)?;
    let hosts = ["h1", "h2"];
    let before: Vec<String> = hosts.iter().map(|h| containers(lab.host(h))).collect::<Result<_>>()?;
    let since = lab.host("h1").run(&["date", "+%s.%N"])?;
    let mut checks = Checks::default();
    let mut untouched = |name: &str| -> Result<()> {
        exercise(&cluster, &hosts)?;
        talk(&cluster)?;
        for (host, before) in hosts.iter().zip(&before) {
            wait_for("containers of the exercise to go", PATIENCE, || {
                Ok((containers(lab.host(host))? == *before).then_some(()))
            })
            .with_context(|| {
                format!("{name}: {host} had\n{before}\nand has\n{}", containers(lab.host(host)).unwrap_or_default())
            })?;
            let events = events_of(lab.host(host), &ids, since.trim())?;
            checks.ensure(name, events.is_empty(), format_args!("events on {host}: {events:?}"));
        }
        for task in &tasks {
            let now = cluster.task(task["name"].as_str().unwrap_or_default())?;
            checks.ensure(name, now["id"] == task["id"] && now["run"] == task["run"], &now);
        }
        Ok(())
    };
    for host in hosts {
        restart_agent(&cluster, host, Signal::SIGKILL)?;
    }
    untouched("agents killed")?;
    let epoch = cluster.json(&["info"])?["epoch"].as_u64();
    cluster.process("master", "skein-master")?.kill()?;
    cluster.start_master()?;
    cluster.wait_for_nodes(2)?;
    untouched("master killed")?;
    cluster.process("master", "skein-master")?.kill()?;
    for host in hosts {
        cluster.process(host, "skein-agent")?.kill()?;
        cluster.start_agent(host)?;
    }
    cluster.start_master()?;
    cluster.wait_for_nodes(2)?;
    untouched("all killed")?;
    let now = cluster.json(&["info"])?["epoch"].as_u64();
    checks.ensure("each start is a term of its own", now == epoch.map(|e| e + 2), format_args!("{epoch:?} -> {now:?}"));
    checks.finish().with_context(|| lab.logs(30))
}

/// The whole state as the API shows it, without what is only memory.
fn state(cluster: &Cluster<'_>) -> Result<Value> {
    let mut nodes = cluster.json(&["node", "ls"])?;
    for node in nodes.as_array_mut().into_iter().flatten() {
        node.as_object_mut().context("a node is an object")?.remove("status");
    }
    let list = |args: &[&str]| cluster.json(args);
    Ok(serde_json::json!([
        nodes,
        list(&["ps", "--all"])?,
        list(&["network", "ls"])?,
        list(&["service", "ls"])?,
        list(&["token", "ls"])?,
        list(&["volume", "ls"])?
    ]))
}

#[test]
fn engines_restart_and_backups_bring_masters_back() -> Result<()> {
    let lab = lab("restore", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", PAIR)?;
    cluster.stack_up("s", &file)?;
    let on_h2 = ["--constraint", "node.labels.host==h2", "--restart", "always"];
    let args =
        [&["run", "-d", "--name", "alone"], &on_h2[..], &["busybox", "sh", "-c", "echo x >> /runs; exec sleep 1000"]]
            .concat();
    cluster.skein(&args)?;
    let alone = cluster.wait_for_running("alone")?;
    talk(&cluster)?;
    backup_and_restore(&lab, &cluster)?;
    talk(&cluster)?;

    // A crash of the engine: it ends all containers when it is back.
    lab.host("h2").stop_engine(Signal::SIGKILL)?;
    lab.host("h2").start_engine()?;
    cluster.wait_for_running("s_b.1")?;
    let again = wait_for("the container task to run again", PATIENCE, || {
        let runs = cluster.skein(&["exec", "alone", "--", "cat", "/runs"]).unwrap_or_default();
        let task = cluster.task("alone")?;
        Ok((runs.lines().count() == 2 && task["status"]["state"] == "running").then_some(task))
    })
    .with_context(|| lab.logs(30))?;
    let mut checks = Checks::default();
    checks.ensure("the same container", again["status"]["container_id"] == alone["status"]["container_id"], &again);
    checks.ensure("its second run", again["run"] == 2, &again);
    checks.ok("they talk again", talk(&cluster));
    checks.finish().with_context(|| format!("{}\n{}", cluster.skein(&["ps", "-a"]).unwrap_or_default(), lab.logs(40)))
}

fn restore(cluster: &Cluster<'_>, backup: &Path, data: &Path) -> Result<Said> {
    let mut command = cluster.master().command(program("skein-master")?);
    run(command.arg("--data-dir").arg(data).arg("restore").arg(backup))
}

fn backup_and_restore(lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let mut checks = Checks::default();
    let backup = lab.dir().join("backup");
    let path = backup.display().to_string();
    // Before the backup: what comes after it is lost with the store.
    let before = state(cluster)?;
    cluster.skein(&["backup", &path])?;
    let said = skein(cluster, &["backup", &path])?;
    checks.ensure("a backup is not overwritten", said.code != 0, format_args!("{said:?}"));
    checks.words("a backup is not overwritten", &said.err, &[&path]);
    let hosts: Vec<String> = lab.engines().map(containers).collect::<Result<_>>()?;
    let data = cluster.master().dir().join("skein-master");
    let said = restore(cluster, &backup, &data)?;
    checks.refused("restore beside a running master", &said, 1, &["has it open", "nothing was changed", "hint: "]);
    cluster.process("master", "skein-master")?.kill()?;
    let said = restore(cluster, &backup, &data)?;
    checks.refused("restore over a store", &said, 1, &["there is a store already", "nothing was changed", "hint: "]);
    fs::rename(&data, data.with_extension("lost"))?;
    let text = fs::read_to_string(&backup)?;
    let cut = lab.dir().join("cut-backup");
    fs::write(&cut, &text[..text.len() - 20])?;
    let said = restore(cluster, &cut, &data)?;
    checks.refused("half a backup", &said, 1, &["failed to read the backup", "nothing was changed"]);
    let said = restore(cluster, &backup, &data)?;
    checks.fine("restore", &said);
    cluster.start_master()?;
    cluster.wait_for_nodes(2)?;
    let now = state(cluster)?;
    checks.ensure("the same state", now == before, format_args!("{before:#}\nbecame\n{now:#}"));
    exercise(cluster, &["h1", "h2"])?;
    for (host, before) in lab.engines().zip(&hosts) {
        wait_for("containers as before", PATIENCE, || Ok((containers(host)? == *before).then_some(())))
            .with_context(|| format!("{before}\nbecame\n{}", containers(host).unwrap_or_default()))?;
    }
    checks.finish()
}

fn identity(lab: &Lab, host: &str) -> PathBuf {
    lab.host(host).dir().join("skein-agent/identity")
}

/// Puts a certificate that ended long ago in the place of a host's, for the same key.
fn expire(lab: &Lab, host: &str) -> Result<()> {
    let dir = identity(lab, host);
    let key = IdentityDir::new(dir.parent().context("no parent")?).ensure_key()?;
    let mut params = rcgen::CertificateParams::default();
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2020, 1, 2));
    fs::write(dir.join("certificate.pem"), params.self_signed(&key)?.pem())?;
    Ok(())
}

#[test]
fn nodes_recover_go_and_come_back() -> Result<()> {
    let lab = lab("nodes", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("s", PAIR)?;
    cluster.stack_up("s", &file)?;
    talk(&cluster)?;
    let mut checks = Checks::default();
    certificates(&mut checks, &lab, &cluster)?;
    removed(&mut checks, &lab, &cluster)?;
    left_and_back(&mut checks, &lab, &cluster)?;
    checks.finish().with_context(|| lab.logs(30))
}

/// A host whose certificate ended, and one that has lost it: the key proves who they are.
fn certificates(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let before: Vec<String> = lab.engines().map(containers).collect::<Result<_>>()?;
    let nodes = cluster.json(&["node", "ls"])?;
    for host in ["h1", "h2"] {
        let agent = cluster.process(host, "skein-agent")?;
        agent.signal(Signal::SIGTERM)?;
        wait_for("the agent to end", PATIENCE, || Ok((!agent.is_running()).then_some(())))?;
    }
    expire(lab, "h1")?;
    fs::remove_file(identity(lab, "h2").join("certificate.pem"))?;
    for host in ["h1", "h2"] {
        let agent = cluster.start_agent(host)?;
        agent.wait_for_log("certificate is over, asking for a new one", PATIENCE)?;
        let valid = wait_for("a new certificate", PATIENCE, || {
            let state_dir = lab.host(host).dir().join("skein-agent");
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            let left = IdentityDir::new(&state_dir).validity().map_or(0, |(_, to)| to - now.cast_signed());
            Ok((left > 0).then_some(left))
        })?;
        checks.ensure("a certificate of 24 h", (23 * 3_600..=24 * 3_600).contains(&valid), valid);
    }
    cluster.wait_for_nodes(2)?;
    exercise(cluster, &["h1", "h2"])?;
    talk(cluster)?;
    let now = cluster.json(&["node", "ls"])?;
    let ids =
        |nodes: &Value| nodes.as_array().into_iter().flatten().map(|n| n["id"].to_string()).collect::<BTreeSet<_>>();
    checks.ensure("the same nodes", ids(&now) == ids(&nodes), &now);
    for (host, before) in lab.engines().zip(before) {
        checks.ok(
            "no container was touched",
            wait_for("containers as before", PATIENCE, || Ok((containers(host)? == before).then_some(()))),
        );
    }
    Ok(())
}

/// `skein node rm` ends the agent and refuses its identity from then on.
fn removed(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let agent = cluster.process("h2", "skein-agent")?;
    cluster.skein(&["node", "rm", "--force", "h2"])?;
    checks.ensure("the agent ends", agent.wait(PATIENCE)? == Status::Exited(3), agent.log_tail());
    checks.ensure("the node is gone", node_state(cluster, "h2")? == "gone", "it is there");
    let again = cluster.start_agent("h2")?;
    checks.ensure("it stays refused", again.wait(PATIENCE)? == Status::Exited(3), again.log_tail());
    checks.words("it stays refused", &again.log()?, &["this node was removed from its cluster", "skein-agent leave"]);
    // A removed node's key gets no new certificate either.
    expire(lab, "h2")?;
    let again = cluster.start_agent("h2")?;
    checks.ensure("no recovery", again.wait(PATIENCE)? == Status::Exited(3), again.log_tail());
    // Its service waits for a host that fits.
    let why = cluster.skein(&["explain", "s_b"])?;
    checks.words("its service waits", &why, &["no node fits: 1 node; constraint node.labels.host==h2 took 1"]);
    Ok(())
}

/// What of ours is on a host: containers, engine networks, namespaces, links, tables.
fn ours(host: &Host) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut note = |what: &str, text: String| {
        found.extend(text.lines().filter(|l| !l.trim().is_empty()).map(|l| format!("{what} {}", l.trim())));
    };
    note("container", host.docker(&["ps", "-aq", "--filter", "label=io.skein.cluster"])?);
    note("network", host.docker(&["network", "ls", "--filter", "driver=skein", "--format", "{{.Name}}"])?);
    note("namespace", host.run(&["sh", "-c", "ls /run/skein/netns 2>/dev/null || true"])?);
    note("table", host.run(&["sh", "-c", "nft list tables | grep skein || true"])?);
    note("link", host.run(&["sh", "-c", "ip -o link | grep -o ' sk[a-z]*-[^:@]*' || true"])?);
    note("route", host.run(&["sh", "-c", "ip route show table all proto 83; ip -6 route show table all proto 83"])?);
    Ok(found)
}

/// Runs `skein-agent COMMAND` to its end as a service manager would: with the plugin's socket, which it keeps open.
fn agent(lab: &Lab, host: &str, command: &str) -> Result<Said> {
    let host = lab.host(host);
    let log = host.dir().join(format!("{command}.log"));
    match fs::remove_file(&log) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let spawn = Spawn::new(program("skein-agent")?).name(command).arg("--config").arg(host.dir().join("agent.toml"));
    let process = host.spawn(spawn.arg(command).plugin_socket())?;
    let code = match process.wait(PATIENCE)? {
        Status::Exited(code) => code,
        other => anyhow::bail!("skein-agent {command} did not end: {other:?}\n{}", process.log_tail()),
    };
    let text = process.log()?;
    Ok(Said { code, out: text.clone(), err: text })
}

/// `skein-agent leave` cleans the host, which can join again then.
fn left_and_back(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let host = lab.host("h2");
    // Somebody else's things stay.
    host.docker(&["run", "-d", "--name", "foreign", "busybox", "sleep", "1000"])?;
    let before = ours(host)?;
    checks.ensure(
        "something is there to clean",
        before.iter().any(|o| o.starts_with("container")),
        format_args!("{before:?}"),
    );
    let said = agent(lab, "h2", "leave")?;
    let out = checks.fine("leave", &said);
    checks.words("leave", &out, &["left the cluster", "skein node rm h2"]);
    let left = ours(host)?;
    checks.ensure("nothing of ours is left", left.is_empty(), format_args!("{left:?}"));
    let foreign = host.docker(&["inspect", "-f", "{{.State.Status}}", "foreign"])?;
    checks.ensure("a foreign container goes on", foreign == "running", foreign);
    checks.ensure("the identity is gone", !identity(lab, "h2").exists(), "it is there");
    let said = agent(lab, "h2", "leave")?;
    checks.refused("leave again", &said, 1, &["this host has not joined a cluster", "hint: skein-agent join"]);
    let said = agent(lab, "h2", "run")?;
    checks.refused("run without joining", &said, 1, &["this host has not joined a cluster", "hint: skein-agent join"]);

    let token = cluster.token(&[])?;
    let joined = cluster.join("h2", &token, &NodeOptions::label("host", "h2"));
    if checks.ok("joins again", joined).is_none() {
        return Ok(());
    }
    cluster.wait_for_nodes(2)?;
    checks.ok("its service runs there again", cluster.wait_for_running("s_b.1"));
    checks.ok("they talk again", talk(cluster));
    Ok(())
}

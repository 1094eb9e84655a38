//! What users run: containers, compose files with everything in them, networks, nodes, images.

use std::{fs, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::{
    cluster::{Cluster, NodeOptions, PATIENCE, program},
    lab::{Host, Lab, wait_for},
};

use super::{
    cluster, lab,
    scheduling::scheduling,
    support::{Checks, Said, container, revision, run, run_with_input, skein, wait_for_state},
};

/// `skein exec NAME -- sh -c SCRIPT`.
fn shell(cluster: &Cluster<'_>, name: &str, script: &str) -> Result<Said> {
    skein(cluster, &["exec", name, "--", "sh", "-c", script])
}

/// A script of a container says this.
fn says(checks: &mut Checks, cluster: &Cluster<'_>, name: &str, script: &str, expected: &str) {
    let what = format!("{name}: {script}");
    if let Some(said) = checks.ok(&what, shell(cluster, name, script)) {
        checks.ensure(&what, said.code == 0 && said.out.trim() == expected, format_args!("not {expected:?}: {said:?}"));
    }
}

/// A script of a container fails.
fn fails(checks: &mut Checks, cluster: &Cluster<'_>, name: &str, script: &str) {
    let what = format!("{name}: {script}");
    if let Some(said) = checks.ok(&what, shell(cluster, name, script)) {
        checks.ensure(&what, said.code == 1, format_args!("did not fail: {said:?}"));
    }
}

#[test]
fn containers_that_are_run() -> Result<()> {
    let lab = lab("run", 1, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let mut checks = Checks::default();
    stop_and_start(&mut checks, &cluster)?;
    exec_and_logs(&mut checks, &lab, &cluster)?;
    attached(&mut checks, &cluster)?;
    restarts(&mut checks, &cluster)?;
    checks.finish().with_context(|| lab.logs(30))
}

/// A container task keeps id, file system and name over stop and start; `rm` takes it away.
fn stop_and_start(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let said = skein(cluster, &["run", "-d", "--name", "box", "--stop-timeout", "0s", "busybox", "sleep", "1000"])?;
    let id = checks.fine("run -d", &said);
    let first = cluster.wait_for_running("box")?;
    checks.ensure("its id is printed", first["id"] == id.as_str(), &first);
    checks.ensure("its first run", first["run"] == 1, &first);
    shell(cluster, "box", "echo kept > /file")?;
    let said = skein(cluster, &["run", "-d", "--name", "box", "busybox", "true"])?;
    checks.refused(
        "a name that is taken",
        &said,
        4,
        &["container name box belongs to container task", "hint: skein ps"],
    );
    let said = skein(cluster, &["rm", "box"])?;
    checks.refused("rm of a running one", &said, 4, &["container task box runs", "hint: skein stop box"]);
    checks.fine("stop", &skein(cluster, &["stop", "box"])?);
    let stopped = wait_for_state(cluster, "box", &["shutdown", "failed", "complete"])?;
    checks.ensure("stopped", stopped["status"]["state"] == "shutdown", &stopped["status"]);
    checks.fine("start", &skein(cluster, &["start", "box"])?);
    let second = wait_for_state(cluster, "box", &["running"])?;
    checks.ensure("the same container", container(&second)? == container(&first)?, &second);
    checks.ensure("its second run", second["run"] == 2, &second);
    says(checks, cluster, "box", "cat /file", "kept");
    checks.fine("rm -f", &skein(cluster, &["rm", "-f", "box"])?);
    wait_for("the task to go", PATIENCE, || Ok(cluster.tasks()?.iter().all(|t| t["name"] != "box").then_some(())))
}

/// Exit codes, standard input and environment of `exec`; `logs` with its flags.
fn exec_and_logs(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let script = "echo one; echo two; echo oops >&2; until [ -f /go ]; do sleep 0.1; done; echo three";
    cluster.skein(&["run", "-d", "--name", "talker", "busybox", "sh", "-c", script])?;
    cluster.wait_for_running("talker")?;
    for code in [0, 7, 255] {
        let said = shell(cluster, "talker", &format!("exit {code}"))?;
        checks.ensure("exec's exit code", said.code == code, format_args!("not {code}: {said:?}"));
    }
    let said = skein(cluster, &["exec", "talker", "--", "no-such-program"])?;
    // The engine's own words and code; which stream they come on is the engine's choice.
    let words = format!("{}{}", said.out, said.err);
    checks.ensure(
        "exec of nothing",
        [126, 127].contains(&said.code) && words.contains("no-such-program"),
        format_args!("{said:?}"),
    );
    let mut command = cluster.skein_command()?;
    command.args(["exec", "-i", "-e", "X=y", "-w", "/tmp", "-u", "12:34", "talker", "--"]);
    let said =
        run_with_input(command.args(["sh", "-c", "cat; pwd; id -u; id -g; echo $X; echo err >&2"]), b"from stdin\n")?;
    checks.ensure("exec's surroundings", said.out == "from stdin\n/tmp\n12\n34\ny\n", format_args!("{said:?}"));
    checks.ensure("exec's standard error", said.err == "err\n", format_args!("{said:?}"));
    let large = vec![b'x'; 3 << 20];
    let said = run_with_input(cluster.skein_command()?.args(["exec", "-i", "talker", "--", "wc", "-c"]), &large)?;
    checks.ensure("3 MiB of input", said.out.trim() == large.len().to_string(), format_args!("{said:?}"));

    let said = skein(cluster, &["logs", "talker"])?;
    checks.ensure("logs", said.out == "one\ntwo\n" && said.err == "oops\n", format_args!("{said:?}"));
    let said = skein(cluster, &["logs", "--tail", "1", "-t", "talker"])?;
    checks.ensure("logs --tail -t", said.out.lines().count() + said.err.lines().count() == 1, format_args!("{said:?}"));
    let followed = lab.dir().join("followed");
    let mut follow = cluster.skein_command()?;
    let mut follow =
        follow.args(["logs", "-f", "talker"]).stdout(fs::File::create(&followed)?).stderr(Stdio::null()).spawn()?;
    let follows =
        wait_for("the first lines", PATIENCE, || Ok((fs::read_to_string(&followed)? == "one\ntwo\n").then_some(())));
    checks.ok("logs -f begins", follows);
    shell(cluster, "talker", "touch /go")?;
    let ended = wait_for("the end of the logs", PATIENCE, || Ok(follow.try_wait()?));
    match ended {
        Ok(status) => checks.ensure("logs -f ends with the container", status.success(), status),
        Err(e) => {
            follow.kill()?;
            checks.ensure("logs -f ends with the container", false, e);
        }
    }
    let text = fs::read_to_string(&followed)?;
    checks.ensure("logs -f", text == "one\ntwo\nthree\n", &text);
    let ended = wait_for_state(cluster, "talker", &["complete", "failed"])?;
    checks.ensure("complete", ended["status"]["state"] == "complete" && ended["status"]["exit_code"] == 0, &ended);
    let said = skein(cluster, &["logs", "talker"])?;
    checks.ensure("logs of an ended one", said.out == "one\ntwo\nthree\n", format_args!("{said:?}"));
    let said = skein(cluster, &["exec", "talker", "--", "true"])?;
    checks.ensure("exec in an ended one", said.code == 1 || said.code == 4, format_args!("{said:?}"));
    Ok(())
}

/// `skein run` in the foreground: output, exit code, flags.
fn attached(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let said = skein(cluster, &["run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 9"])?;
    checks.ensure("exit code of run", said.code == 9, format_args!("{said:?}"));
    checks.ensure("output of run", said.out == "out\n" && said.err.contains("err\n"), format_args!("{said:?}"));
    let flags =
        ["--hostname", "in-run", "-u", "5:6", "-w", "/tmp", "-e", "X=y", "--add-host", "other.example:192.0.2.7"];
    let more = ["--read-only", "--tmpfs", "/scratch", "--cap-drop", "ALL", "--init", "--entrypoint", "sh"];
    let script = "hostname; id -u; pwd; echo $X; grep -c 192.0.2.7 /etc/hosts; touch /x 2>/dev/null || echo read-only; \
                  touch /scratch/x && echo scratch; grep CapBnd /proc/self/status | tr -d '\\t'";
    let args = [&["run", "--rm"], &flags[..], &more[..], &["busybox", "-c", script]].concat();
    let said = skein(cluster, &args)?;
    let expected = "in-run\n5\n/tmp\ny\n1\nread-only\nscratch\nCapBnd:0000000000000000\n";
    checks.ensure("flags of run", said.out == expected, format_args!("not {expected:?}: {said:?}"));
    let said = skein(cluster, &["run", "--name", "noprog", "busybox", "no-such-program"])?;
    checks.refused("no such program", &said, 1, &["noprog", "rejected", "no-such-program"]);
    let said = skein(cluster, &["run", "--rm", "-m", "16m", "busybox", "tail", "/dev/zero"])?;
    checks.ensure("out of memory ends run", said.code == 137, format_args!("{said:?}"));
    Ok(())
}

/// A container task is restarted by its policy, in the same container.
fn restarts(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let script = "echo x >> /runs; exit 3";
    cluster.skein(&["run", "-d", "--name", "again", "--restart", "on-failure:2", "busybox", "sh", "-c", script])?;
    let ended = wait_for("the restarts to be used up", PATIENCE, || {
        let task = cluster.tasks()?.into_iter().find(|t| t["name"] == "again");
        Ok(task.filter(|t| t["run"] == 3 && t["status"]["state"] == "failed"))
    })
    .with_context(|| cluster.skein(&["ps", "-a", "-o", "json"]).unwrap_or_default())?;
    checks.ensure("its exit code", ended["status"]["exit_code"] == 3, &ended);
    let listed = cluster.skein(&["ps", "--all"])?;
    checks.words("ps says why", &listed, &["again", "exited with 3"]);
    Ok(())
}

const FULL: &str = r#"
x-quick: &quick {image: busybox, stop_grace_period: 0s, command: [sleep, "1000"]}
services:
  full:
    <<: *quick
    entrypoint: [sh, -c]
    command: ["sleep 1000"]
    working_dir: /tmp
    user: "1000:1000"
    hostname: in-full
    container_name: the-full
    environment: {A: one}
    env_file: vars.env
    extra_hosts: ["other.example:192.0.2.7"]
    tmpfs: ["/scratch:size=1m"]
    read_only: true
    cap_drop: [ALL]
    labels: {team: "x-${TEAM:-none}"}
    init: true
    expose: ["9000"]
    stop_signal: SIGINT
    mem_limit: 64m
    cpus: 0.5
  store:
    <<: *quick
    command: [sh, -c, "echo stored > /data/file; mkdir /www; echo from-store > /www/index.html; exec httpd -f -p 80 -h /www"]
    volumes: ["data:/data"]
    ports: ["80"]
    deploy: {placement: {constraints: ["node.labels.host==h2"]}}
  reader: {<<: *quick, volumes: ["data:/data:ro"], depends_on: [store]}
  from: {<<: *quick, volumes_from: ["store:ro"]}
  linked: {<<: *quick, links: ["store:database"]}
  job: {<<: *quick, command: ["true"]}
  after-job: {<<: *quick, depends_on: {job: {condition: service_completed_successfully}}}
volumes: {data: }
"#;

#[test]
fn a_compose_file_with_everything() -> Result<()> {
    let lab = lab("full", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("f", FULL)?;
    fs::write(file.with_file_name("vars.env"), "B=two\n")?;
    fs::write(file.with_file_name(".env"), "TEAM=blue\n")?;
    cluster.stack_up("f", &file)?;
    let mut checks = Checks::default();
    let full = cluster.wait_for_running("f_full.1")?;
    for (script, expected) in [
        ("id -u", "1000"),
        ("pwd", "/tmp"),
        ("hostname", "in-full"),
        ("echo $A$B", "onetwo"),
        ("grep -c '192.0.2.7.*other.example' /etc/hosts", "1"),
        ("touch /scratch/x && echo yes", "yes"),
        ("grep CapBnd /proc/self/status | tr -d '\\t'", "CapBnd:0000000000000000"),
        ("cat /proc/1/comm | grep -c init", "1"),
    ] {
        says(&mut checks, &cluster, "f_full.1", script, expected);
    }
    fails(&mut checks, &cluster, "f_full.1", "touch /x 2>/dev/null");
    let node = cluster.node_name(&full["node"])?;
    let of_engine = "{{index .Config.Labels \"team\"}} {{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.Config.StopSignal}} {{.HostConfig.RestartPolicy.Name}}";
    let seen = lab.host(&node).docker(&["inspect", "-f", of_engine, container(&full)?])?;
    checks.ensure("the engine's word", seen == "x-blue 67108864 500000000 SIGINT no", &seen);
    beside_each_other(&mut checks, &lab, &cluster)?;
    changed_file(&mut checks, &lab, &cluster)?;
    checks.finish().with_context(|| format!("{}\n{}", cluster.skein(&["ps", "-a"]).unwrap_or_default(), lab.logs(20)))
}

/// Volumes, links, names and ports of the store's neighbours.
fn beside_each_other(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    for name in ["f_store.1", "f_reader.1", "f_from.1", "f_linked.1"] {
        let task = cluster.wait_for_running(name)?;
        checks.ensure("on the host of the volume", cluster.node_name(&task["node"])? == "h2", &task);
    }
    for name in ["f_reader.1", "f_from.1"] {
        says(checks, cluster, name, "cat /data/file", "stored");
        fails(checks, cluster, name, "echo x 2>/dev/null > /data/file");
    }
    says(checks, cluster, "f_linked.1", "timeout 3 wget -qO- http://database/", "from-store");
    says(checks, cluster, "f_linked.1", "timeout 3 wget -qO- http://store/", "from-store");
    says(checks, cluster, "f_linked.1", "ping -c 1 -W 3 the-full > /dev/null && echo there", "there");
    let volumes = cluster.skein(&["volume", "ls"])?;
    checks.words("volume ls", &volumes, &["f_data", "h2"]);
    let store = cluster.task("f_store.1")?;
    let port = store["status"]["ports"][0]["host_port"].as_u64().context("no port was chosen")?;
    let ask =
        format!("exec 3<>/dev/tcp/{}/{port}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3", lab.host("h2").ipv4());
    let got = lab.host("master").run(&["timeout", "5", "bash", "-c", &ask])?;
    checks.words("the port that was chosen", &got, &["from-store"]);
    let job = wait_for_state(cluster, "f_job.1", &["complete"])?;
    checks.ensure("a job's exit code", job["status"]["exit_code"] == 0, &job);
    checks.ok("what waited for the job", cluster.wait_for_running("f_after-job.1"));
    Ok(())
}

/// The ids of a stack's live tasks by name.
fn ids(cluster: &Cluster<'_>, stack: &str) -> Result<Vec<(String, String)>> {
    let tasks = cluster.json(&["ps", "--stack", stack])?;
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let mut ids: Vec<_> = tasks.as_array().into_iter().flatten().map(|t| (text(&t["name"]), text(&t["id"]))).collect();
    ids.sort();
    Ok(ids)
}

/// `up` again: the difference is shown, only what changed is made anew, orphans go when asked, `down` takes all.
fn changed_file(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let changed = FULL
        .replace("A: one", "A: changed")
        .replace("mem_limit: 64m", "mem_limit: 32m")
        .replace("  from: {<<: *quick, volumes_from: [\"store:ro\"]}\n", "");
    let file = cluster.compose_file("f", &changed)?;
    let file = file.display().to_string();
    let up = ["up", "-f", &file, "-p", "f", "--yes"];
    let (before, revision_before) = (ids(cluster, "f")?, revision(cluster)?);
    let said = skein(cluster, &[&up[..], &["--dry-run"]].concat())?;
    let plan = checks.fine("dry run", &said);
    let words = [
        "! recreate  service  f_full",
        "task.container.env.A: changed",
        "67108864 -> 33554432",
        "? orphan    service  f_from",
        "= keep      service  f_store",
        "1 to recreate",
        "--remove-orphans",
    ];
    checks.words("dry run", &plan, &words);
    checks.ensure("a dry run changes nothing", revision(cluster)? == revision_before, "the revision");
    checks.fine("up again", &skein(cluster, &up)?);
    let after = ids(cluster, "f")?;
    let differs: Vec<&(String, String)> = before.iter().filter(|t| !after.contains(t)).collect();
    checks.ensure(
        "only the changed one is made anew",
        differs.len() == 1 && differs[0].0 == "f_full.1",
        format_args!("{differs:?}"),
    );
    checks.ensure("the orphan stays", after.iter().any(|(name, _)| name == "f_from.1"), format_args!("{after:?}"));
    says(checks, cluster, "f_full.1", "echo $A", "changed");
    checks.fine("without orphans", &skein(cluster, &[&up[..], &["--remove-orphans"]].concat())?);
    wait_for("the orphan to go", PATIENCE, || {
        Ok(ids(cluster, "f")?.iter().all(|(name, _)| name != "f_from.1").then_some(()))
    })?;
    let again = skein(cluster, &[&up[..], &["--dry-run"]].concat())?;
    checks.ensure(
        "nothing is left to do",
        !again.out.contains("recreate") && !again.out.contains("orphan"),
        &again.out,
    );
    checks.fine("down", &skein(cluster, &["down", "-p", "f", "--yes"])?);
    wait_for("no container to be left", PATIENCE, || {
        let left = lab.engines().map(|h| h.docker(&["ps", "-aq"])).collect::<Result<Vec<_>>>()?;
        Ok(left.iter().all(String::is_empty).then_some(()))
    })?;
    checks.words("volumes stay", &cluster.skein(&["volume", "ls"])?, &["f_data"]);
    checks.fine("down --volumes", &skein(cluster, &["down", "-p", "f", "--volumes", "--yes"])?);
    checks.ensure("volumes went", !cluster.skein(&["volume", "ls"])?.contains("f_data"), "it is there");
    Ok(())
}

const ENDS: &str = r#"
x-quick: &quick {image: busybox, stop_grace_period: 0s, command: [sleep, "1000"]}
services:
  once: {<<: *quick, command: ["false"], restart: "no"}
  flaky:
    <<: *quick
    command: [sh, -c, "exit 4"]
    deploy: {restart_policy: {condition: on-failure, delay: 100ms, max_attempts: 2}}
  greedy: {<<: *quick, command: [tail, /dev/zero], mem_limit: 16m, restart: "no"}
  sick:
    <<: *quick
    restart: "no"
    healthcheck: {test: [CMD, "false"], interval: 200ms, retries: 2, start_period: 0s}
  slow:
    <<: *quick
    healthcheck: {test: [CMD, test, -f, /ready], interval: 200ms, retries: 1000}
  after: {<<: *quick, depends_on: {slow: {condition: service_healthy}}}
"#;

#[test]
fn tasks_that_end_and_tasks_that_wait() -> Result<()> {
    let lab = lab("ends", 1, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let file = cluster.compose_file("e", ENDS)?;
    let mut checks = Checks::default();
    let said = skein(&cluster, &["up", "-f", &file.display().to_string(), "-p", "e", "--yes"])?;
    let hint = said.err.lines().last().unwrap_or_default();
    checks.refused(
        "up",
        &said,
        1,
        &["stack e did not come up: ", " failed\n", " failed on h1: ", "hint: skein logs e_"],
    );
    checks.ensure("a hint to what failed", !hint.contains("e_slow") && !hint.contains("e_after"), hint);
    let ended = |name: &str| wait_for_state(&cluster, name, &["failed", "rejected"]);
    let once = ended("e_once.1")?;
    checks.ensure("restart: no", once["status"]["exit_code"] == 1, &once);
    let greedy = ended("e_greedy.1")?;
    checks.ensure(
        "out of memory",
        greedy["status"]["oom_killed"] == true && greedy["status"]["exit_code"] == 137,
        &greedy,
    );
    checks.words("ps says why", &cluster.skein(&["ps", "--all"])?, &["out of memory", "exited with 1"]);
    let sick = ended("e_sick.1")?;
    checks.words("unhealthy", &sick["status"].to_string(), &["unhealthy"]);
    let last = wait_for("the attempts to be used up", PATIENCE, || {
        let task = cluster.tasks()?.into_iter().find(|t| t["name"] == "e_flaky.1" && t["attempt"] == 2);
        Ok(task.filter(|t| t["status"]["state"] == "failed"))
    })?;
    checks.ensure("replaced, not restarted", last["run"].as_u64().unwrap_or(0) <= 1, &last);
    let live: Vec<Value> = cluster.tasks()?.into_iter().filter(|t| t["name"] == "e_once.1").collect();
    checks.ensure("not replaced", live.len() == 1, format_args!("{live:?}"));

    let waiting = cluster.task("e_after.1")?;
    checks.ensure("waits for health", waiting["status"]["state"] == "pending", &waiting);
    checks.words("says for what", &waiting["status"]["message"].to_string(), &["waits for e_slow to be healthy"]);
    let slow = cluster.task("e_slow.1")?;
    checks.ensure("not running before it is healthy", slow["status"]["state"] == "starting", &slow);
    lab.host("h1").docker(&["exec", container(&slow)?, "touch", "/ready"])?;
    checks.ok("healthy at last", cluster.wait_for_running("e_slow.1"));
    checks.ok("and what waited", cluster.wait_for_running("e_after.1"));
    checks.words("ps shows health", &cluster.skein(&["ps"])?, &["(healthy)"]);
    checks.finish().with_context(|| format!("{}\n{}", cluster.skein(&["ps", "-a"]).unwrap_or_default(), lab.logs(20)))
}

fn ping(host: &Host, network: &str, target: &str) -> Result<Said> {
    run(host.docker_command().args([
        "run",
        "--rm",
        "--network",
        network,
        "busybox",
        "ping",
        "-c",
        "1",
        "-W",
        "3",
        target,
    ]))
}

#[test]
fn networks_that_users_make() -> Result<()> {
    let lab = lab("nets", 2, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let mut checks = Checks::default();
    let create = ["network", "create", "--attachable", "--subnet", "10.66.0.0/24", "shared"];
    let id = checks.fine("create", &skein(&cluster, &create)?);
    checks.refused("a name that is taken", &skein(&cluster, &create)?, 4, &["a network named shared is there already"]);
    let said = skein(&cluster, &["network", "create", "--subnet", "10.66.0.128/25", "other"])?;
    checks.refused("an overlap", &said, 4, &["overlaps network shared (10.66.0.0/24)"]);
    cluster.skein(&["network", "create", "--internal", "closed"])?;
    checks.words("ls", &cluster.skein(&["network", "ls"])?, &["shared", "10.66.0.0/24", "closed", "yes"]);
    let shown = cluster.json(&["network", "inspect", "shared"])?;
    checks.ensure("inspect", shown["id"] == id.as_str() && shown["spec"]["attachable"] == true, &shown);

    for host in lab.engines() {
        wait_for("the network on each engine", PATIENCE, || {
            let names = host.docker(&["network", "ls", "--filter", "driver=skein", "--format", "{{.Name}}"])?;
            Ok(names.lines().any(|n| n == "shared").then_some(()))
        })
        .with_context(|| lab.logs(20))?;
    }
    let (h1, h2) = (lab.host("h1"), lab.host("h2"));
    let by_hand = ["run", "-d", "--name", "plain", "--network-alias", "alias", "--network", "shared"];
    h1.docker(&[&by_hand[..], &["busybox", "sleep", "1000"]].concat())?;
    let address =
        h1.docker(&["inspect", "-f", "{{(index .NetworkSettings.Networks \"shared\").IPAddress}}", "plain"])?;
    for host in [h1, h2] {
        checks.fine(&format!("plain docker run on {} reaches h1's", host.name()), &ping(host, "shared", &address)?);
    }
    tasks_in_networks(&mut checks, &lab, &cluster, &address)?;
    h1.docker(&["rm", "-f", "plain"])?;
    for network in ["shared", "closed"] {
        checks.fine("rm", &skein(&cluster, &["network", "rm", network])?);
    }
    for host in lab.engines() {
        wait_for("the engine's networks to go", PATIENCE, || {
            let left = host.docker(&["network", "ls", "-q", "--filter", "driver=skein"])?;
            Ok(left.is_empty().then_some(()))
        })?;
    }
    checks.finish().with_context(|| lab.logs(20))
}

/// Tasks across hosts: names, the way out, and none out of an internal network.
fn tasks_in_networks(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>, plain: &str) -> Result<()> {
    for (name, network, host) in
        [("o1", "shared", "h1"), ("o2", "shared", "h2"), ("c1", "closed", "h1"), ("c2", "closed", "h2")]
    {
        let constraint = format!("node.labels.host=={host}");
        let args =
            ["run", "-d", "--name", name, "--network", network, "--stop-timeout", "0s", "--constraint", &constraint];
        cluster.skein(&[&args[..], &["busybox", "sleep", "1000"]].concat())?;
    }
    for name in ["o1", "o2", "c1", "c2"] {
        cluster.wait_for_running(name)?;
    }
    let reach = |target: &str| format!("ping -c 1 -W 2 {target} > /dev/null && echo there");
    let outside = lab.host("master").ipv4().to_string();
    says(checks, cluster, "o1", &reach("o2"), "there");
    says(checks, cluster, "o2", &reach("o1"), "there");
    says(checks, cluster, "o2", &reach(plain), "there");
    // The names of the container that was started by hand, on both hosts.
    for (from, name) in [("o1", "plain"), ("o2", "plain"), ("o2", "alias"), ("o2", "plain.shared")] {
        says(checks, cluster, from, &reach(name), "there");
    }
    fails(checks, cluster, "c2", &reach("plain"));
    says(checks, cluster, "o1", &reach(&outside), "there");
    says(checks, cluster, "c1", &reach("c2"), "there");
    says(checks, cluster, "c2", &reach("c1"), "there");
    for target in [&outside, plain, "192.0.2.1"] {
        fails(checks, cluster, "c1", &reach(target));
    }
    fails(checks, cluster, "o1", &reach("c1"));
    let said = skein(cluster, &["network", "rm", "shared"])?;
    checks.refused("rm of one in use", &said, 4, &["network shared is used by", "hint: "]);
    checks.fine("rm -f", &skein(cluster, &["rm", "-f", "o1", "o2", "c1", "c2"])?);
    wait_for("the tasks to go", PATIENCE, || Ok(cluster.tasks()?.is_empty().then_some(())))
}

#[test]
fn nodes_images_and_remote_users() -> Result<()> {
    let lab = lab("ops", 2, &["busybox"])?;
    let cluster = Cluster::up(&lab, |host| NodeOptions::label("host", host).generic("gpu", &["GPU-0", "GPU-1"]))?;
    let mut checks = Checks::default();
    drains(&mut checks, &cluster)?;
    labels(&mut checks, &cluster)?;
    scheduling(&mut checks, &cluster)?;
    pulls(&mut checks, &lab, &cluster)?;
    json_everywhere(&mut checks, &lab, &cluster)?;
    remote(&mut checks, &lab, &cluster)?;
    checks.finish().with_context(|| lab.logs(20))
}

/// Hosts of the live tasks of a service.
pub(crate) fn hosts_of(cluster: &Cluster<'_>, service: &str) -> Result<Vec<String>> {
    let tasks = cluster.json(&["ps", "--service", service])?;
    let running =
        tasks.as_array().cloned().unwrap_or_default().into_iter().filter(|t| t["status"]["state"] == "running");
    let mut hosts: Vec<String> = running.map(|t| cluster.node_name(&t["node"])).collect::<Result<_>>()?;
    hosts.sort();
    Ok(hosts)
}

pub(crate) fn wait_for_hosts(cluster: &Cluster<'_>, service: &str, expected: &[&str]) -> Result<()> {
    wait_for(&format!("{service} on {expected:?}"), PATIENCE, || {
        Ok((hosts_of(cluster, service)? == expected).then_some(()))
    })
    .with_context(|| cluster.skein(&["ps", "-a"]).unwrap_or_default())
}

fn drains(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let text = "services:\n  web: {image: busybox, command: [sleep, \"1000\"], stop_grace_period: 0s, deploy: {replicas: 2}}\n";
    let file = cluster.compose_file("d", text)?;
    cluster.stack_up("d", &file)?;
    checks.ok("spread", wait_for_hosts(cluster, "d_web", &["h1", "h2"]));
    checks.fine("drain", &skein(cluster, &["node", "drain", "h1"])?);
    checks.ok("drained", wait_for_hosts(cluster, "d_web", &["h2", "h2"]));
    checks.words("node ls", &cluster.skein(&["node", "ls"])?, &["drain"]);
    checks.words("explain", &cluster.skein(&["explain", "d_web"])?, &["h2"]);
    let said =
        skein(cluster, &["run", "-d", "--name", "stuck", "--constraint", "node.labels.host==h1", "busybox", "true"])?;
    checks.fine("a task for a drained node waits", &said);
    let why = cluster.skein(&["explain", "stuck"])?;
    checks.words("and says why", &why, &["no node fits", "1 paused or drained"]);
    checks.fine("activate", &skein(cluster, &["node", "activate", "h1"])?);
    checks.ok("it runs then", wait_for_state(cluster, "stuck", &["complete"]));
    checks.ok("nothing moves back", wait_for_hosts(cluster, "d_web", &["h2", "h2"]));
    Ok(())
}

fn labels(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    checks.fine("label", &skein(cluster, &["node", "label", "h1", "disk=ssd", "rack=r1"])?);
    let run = ["run", "--rm", "--constraint", "node.labels.disk==ssd", "busybox", "echo", "fast"];
    let said = skein(cluster, &run)?;
    checks.ensure("a constraint on it", said.code == 0 && said.out == "fast\n", format_args!("{said:?}"));
    let node = cluster.json(&["node", "inspect", "h1"])?;
    let labels = &node["spec"]["labels"];
    checks.ensure("inspect", labels["disk"] == "ssd" && labels["rack"] == "r1", labels);
    checks.fine("label away", &skein(cluster, &["node", "label", "h1", "disk-"])?);
    let said = skein(cluster, &run)?;
    checks.refused(
        "nothing meets it any more",
        &said,
        5,
        &["no node fits: 2 nodes; constraint node.labels.disk==ssd took 2"],
    );
    let said = skein(cluster, &["node", "label", "h1", "disk-"])?;
    checks.refused("a label that is not there", &said, 3, &["node h1 has no label \"disk\""]);
    Ok(())
}

/// An image that only a registry has, and one that none has.
fn pulls(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let registry = lab.registry()?;
    let image = format!("{registry}/pulled:1");
    lab.host("h1").docker(&["tag", "busybox", &image])?;
    lab.host("h1").docker(&["push", &image])?;
    let on_h2 = ["run", "--rm", "--constraint", "node.labels.host==h2"];
    let said = skein(cluster, &[&on_h2[..], &[&image, "echo", "pulled"]].concat())?;
    checks.ensure("an image of the registry", said.code == 0 && said.out == "pulled\n", format_args!("{said:?}"));
    let missing = format!("{registry}/nobodys:1");
    let said = skein(cluster, &[&on_h2[..], &[&missing, "true"]].concat())?;
    checks.refused("an image that is not there", &said, 1, &["rejected", "failed to get image", &missing]);
    Ok(())
}

/// `-o json` gives JSON.
fn json_everywhere(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let file = lab.dir().join("compose/d/docker-compose.yml").display().to_string();
    let commands: &[&[&str]] = &[
        &["info"],
        &["ps"],
        &["ps", "--all"],
        &["node", "ls"],
        &["node", "inspect", "h1"],
        &["service", "ls"],
        &["service", "inspect", "d_web"],
        &["network", "ls"],
        &["network", "inspect", "d_default"],
        &["network", "create", "from-json"],
        &["volume", "ls"],
        &["stack", "ls"],
        &["token", "ls"],
        &["token", "create"],
        &["cert", "issue", "eva"],
        &["explain", "d_web"],
        &["context", "ls"],
        &["up", "-f", &file, "-p", "d", "--dry-run"],
        &["up", "-f", &file, "-p", "d", "--yes"],
        &["down", "-p", "d", "--dry-run"],
        &["down", "-p", "d", "--yes"],
    ];
    for command in commands {
        checks.ok(&command.join(" "), cluster.json(command));
    }
    // Behind an image everything is the container's.
    let said = skein(cluster, &["-o", "json", "run", "-d", "--name", "json", "busybox", "true"])?;
    let task: Value = serde_json::from_str(&checks.fine("run", &said))?;
    checks.ensure("run -d", task["name"] == "json", &task);
    for line in cluster.skein(&["-o", "json", "stop", "json"])?.lines().take(1) {
        checks.ensure("stop", line.starts_with('{'), line);
    }
    Ok(())
}

/// A user over TCP: a certificate is needed, and a node's is not one.
fn remote(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let host = cluster.master();
    let certs = host.dir().join("certs").display().to_string();
    checks.fine("cert issue", &skein(cluster, &["cert", "issue", "--out", &certs, "alice"])?);
    let remote = |dir: &str, args: &[&str]| -> Result<Said> {
        let mut command = host.command(program("skein")?);
        command.args(["--host", "tcp://127.0.0.1:7440", "--tls-dir", dir]);
        run(command.args(args))
    };
    checks.fine("with a certificate", &remote(&certs, &["node", "label", "h1", "by=alice"])?);
    let node = cluster.json(&["node", "inspect", "h1"])?;
    checks.ensure("it is known who did it", node["meta"]["changed_by"]["who"] == "user:alice", &node["meta"]);
    let nodes = host.dir().join("node-certs");
    fs::create_dir_all(&nodes)?;
    let identity = lab.host("h1").dir().join("skein-agent/identity");
    for (from, to) in [("ca.pem", "ca.pem"), ("certificate.pem", "cert.pem"), ("key.pem", "key.pem")] {
        fs::copy(identity.join(from), nodes.join(to))?;
    }
    let said = remote(&nodes.display().to_string(), &["info"])?;
    checks.refused(
        "with a node's certificate",
        &said,
        1,
        &["this call needs a user's certificate", "hint: skein cert issue"],
    );
    ensure!(
        run(host.command("curl").args(["-sk", "--max-time", "5", "https://127.0.0.1:7440/v1/info"]))?
            .out
            .contains("forbidden")
    );
    Ok(())
}

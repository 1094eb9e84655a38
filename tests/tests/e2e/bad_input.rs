//! Bad input of every kind: a clear message, the right exit code, and nothing changed.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use redb::{ReadableDatabase as _, ReadableTable as _};
use xtask::{
    cluster::{Cluster, NodeOptions, PATIENCE, program},
    lab::{Host, Lab, Process, Spawn, wait_for},
};

use super::{
    cluster, lab,
    support::{Checks, Said, ask_to_join, ca_of, revision, run, skein},
};

/// `skein-agent join` on h2.
fn join(cluster: &Cluster<'_>, master: &str, token: &str, more: &[&str]) -> Result<Said> {
    run(cluster.agent_command("h2")?.args(["join", "--master", master, "--token", token]).args(more))
}

/// A master of another cluster, on the same host.
fn other_master(cluster: &Cluster<'_>) -> Result<(Process, String)> {
    let host = cluster.master();
    let socket = "/run/skein/other.sock";
    let spawn = Spawn::new(program("skein-master")?)
        .name("other-master")
        .args(["--listen", "[::]:7441", "--socket", socket, "--data-dir"])
        .arg(host.dir().join("other-master"));
    let process = host.spawn(spawn)?;
    process.wait_for_log("master ready", PATIENCE)?;
    let socket = format!("unix://{}", host.path(socket).display());
    let said = run(std::process::Command::new(program("skein")?).args(["--host", &socket, "token", "create"]))?;
    ensure!(said.code == 0, "{said:?}");
    Ok((process, said.out.trim().to_owned()))
}

fn swap_ca(token: &str, ca_sha256: &str) -> Result<String> {
    Ok(token.replacen(&ca_of(token)?, ca_sha256, 1))
}

#[test]
fn hosts_that_may_not_join() -> Result<()> {
    let lab = lab("badjoin", 2, &[])?;
    let cluster = Cluster::of(&lab);
    cluster.start_master()?;
    let used_up = cluster.token(&[])?;
    cluster.join("h1", &used_up, &NodeOptions::label("host", "h1"))?;
    cluster.wait_for_nodes(1)?;
    cluster.configure("h2", &NodeOptions::default())?;
    let good = cluster.token(&["--uses", "2"])?;
    let expired = cluster.token(&["--ttl", "1s"])?;
    wait_for("a token to expire", PATIENCE, || {
        let listed = cluster.skein(&["token", "ls"])?;
        Ok(listed.contains("expired").then_some(()))
    })?;
    let (other, foreign) = other_master(&cluster)?;
    let (before, nodes, tokens) =
        (revision(&cluster)?, cluster.skein(&["node", "ls", "-o", "json"])?, tokens(&cluster)?);

    let mut checks = Checks::default();
    let master = cluster.master_address();
    refused_tokens(&mut checks, &cluster, &master, [&expired, &used_up, &foreign, &good])?;
    let said = join(&cluster, &format!("{}:7441", cluster.master().ipv4()), &good, &[])?;
    checks.refused("another CA", &said, 1, &["not signed by the CA that the token names", "hint: ", ":7441"]);
    let said = join(&cluster, &master, &good, &["--name", "h1"])?;
    checks.refused(
        "duplicate name",
        &said,
        1,
        &["a node named h1 is there already", "hint: skein node rm h1", "--name OTHER"],
    );
    let ca = ca_of(&good)?;
    for (hours, word) in [(1, "3600 s ahead of"), (-1, "s behind")] {
        let said = ask_to_join(&cluster, "h2", &ca, &good, hours * 3_600_000)?;
        // The clock goes on while the request is on its way.
        let word = if hours > 0 && said.contains("3599") { "3599 s ahead of" } else { word };
        checks.words("clock far off", &said, &["[clock_off] the host's clock is", word, "at most 300 s", "hint: "]);
    }
    no_engine(&mut checks, &cluster, &master, &good)?;
    checks.ensure("nothing stored on the host", !identity_of(&lab, "h2").join("node.json").exists(), "a membership");
    checks.ensure(
        "no certificate on the host",
        !identity_of(&lab, "h2").join("certificate.pem").exists(),
        "a certificate",
    );
    let now = revision(&cluster)?;
    checks.ensure("nothing changed", now == before, format_args!("revision {before} -> {now}"));
    checks.ensure("tokens", tokens == self::tokens(&cluster)?, "a token was used");
    let now: serde_json::Value = serde_json::from_str(&cluster.skein(&["node", "ls", "-o", "json"])?)?;
    let before: serde_json::Value = serde_json::from_str(&nodes)?;
    checks.ensure("nodes", now == before, format_args!("{before} -> {now}"));
    other.kill()?;
    // After all that, the good token still works.
    let said = join(&cluster, &master, &good, &[])?;
    checks.fine("the good token", &said);
    let again = join(&cluster, &master, &good, &[])?;
    checks.refused("joined already", &again, 1, &["this host is already node h2", "hint: skein-agent leave"]);
    two_agents(&mut checks, &lab, &cluster)?;
    checks.finish().with_context(|| lab.logs(20))
}

fn tokens(cluster: &Cluster<'_>) -> Result<serde_json::Value> {
    cluster.json(&["token", "ls"])
}

fn identity_of(lab: &Lab, host: &str) -> std::path::PathBuf {
    lab.host(host).dir().join("skein-agent/identity")
}

/// Expired, used up, foreign, malformed and unknown tokens.
fn refused_tokens(checks: &mut Checks, cluster: &Cluster<'_>, master: &str, tokens: [&str; 4]) -> Result<()> {
    let [expired, used_up, foreign, good] = tokens;
    let said = join(cluster, master, expired, &[])?;
    checks.refused("expired token", &said, 1, &["refused", "join token", "expired", "hint: skein token create"]);
    let said = join(cluster, master, used_up, &[])?;
    checks.refused(
        "used-up token",
        &said,
        1,
        &["was for 1 hosts, which have joined", "hint: skein token create --uses N"],
    );
    for malformed in ["", "nonsense", "SKEIN-1-abc", &good[..good.len() - 1], &good.replacen("SKEIN-1", "SKEIN-9", 1)] {
        let said = join(cluster, master, malformed, &[])?;
        checks.refused(
            &format!("malformed token {malformed:?}"),
            &said,
            1,
            &["this is not a join token", "hint: copy the whole line"],
        );
    }
    let said = join(cluster, master, foreign, &[])?;
    checks.refused(
        "foreign token",
        &said,
        1,
        &["not signed by the CA that the token names", "belongs to another cluster"],
    );
    // The master itself refuses it too, whatever the host has checked.
    let said = ask_to_join(cluster, "h2", &ca_of(good)?, foreign, 0)?;
    checks.words(
        "foreign token, asked all the same",
        &said,
        &["[token_foreign]", "another cluster", "hint: skein token create"],
    );
    let made_up = swap_ca(foreign, &ca_of(good)?)?;
    let said = join(cluster, master, &made_up, &[])?;
    checks.refused("unknown token", &said, 1, &["[token_unknown]", "is not one of this cluster's"]);
    Ok(())
}

/// An engine that does not answer: named with its socket.
fn no_engine(checks: &mut Checks, cluster: &Cluster<'_>, master: &str, token: &str) -> Result<()> {
    let said = join(cluster, master, token, &["--engine-socket", "/run/nobody.sock"])?;
    checks.refused("no engine", &said, 1, &["failed to reach the engine at /run/nobody.sock"]);
    let said = join(cluster, "master:1", token, &[])?;
    checks.refused("no master", &said, 1, &["failed to connect to the master at master:1", "refused"]);
    let bad = cluster.master().dir().join("bad.toml");
    fs::write(&bad, "state_dri = \"/x\"\n")?;
    let said = run(cluster.master().command(program("skein-agent")?).arg("--config").arg(&bad).arg("run"))?;
    checks.refused("agent configuration", &said, 64, &["bad.toml", "state_dri", "state_dir"]);
    fs::write(&bad, "subnet_prefix = 40\n")?;
    let said = run(cluster.master().command(program("skein-master")?).arg("--config").arg(&bad))?;
    checks.refused("master configuration", &said, 64, &["configuration key `subnet_prefix`: 40 is not 16 to 28"]);
    Ok(())
}

/// A second agent on a host: the first one's ledger and plugin socket are taken.
fn two_agents(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let host = lab.host("h1");
    let second = host.dir().join("second-agent");
    copy_dir(&identity_of(lab, "h1"), &second.join("identity"))?;
    let agent = |state: &Path| -> Result<Said> {
        let mut command = host.command("timeout");
        command.arg("20").arg(program("skein-agent")?).arg("--config").arg(host.dir().join("agent.toml"));
        run(command.arg("--state-dir").arg(state).arg("run"))
    };
    let said = agent(&host.dir().join("skein-agent"))?;
    checks.refused("second agent", &said, 1, &["failed to lock the ledger", "another agent uses it"]);
    let said = agent(&second)?;
    checks.refused(
        "plugin socket taken",
        &said,
        1,
        &["plugin socket taken: /run/docker/plugins/skein.sock is served by process"],
    );
    checks.ensure("first agent", cluster.process("h1", "skein-agent").is_ok(), "it is gone");
    Ok(())
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// A compose file, what `skein up` ends with, and words of its message.
type BadFile = (&'static str, &'static str, i32, &'static [&'static str]);

const BAD_FILES: &[BadFile] = &[
    ("bad YAML", "services:\n  web:\n    image: [a\n", 64, &["docker-compose.yml:"]),
    (
        "unknown key",
        "services:\n  web:\n    imgae: busybox\n",
        64,
        &["unknown key \"imgae\" in services.web", "docker-compose.yml:3:5", "hint: did you mean \"image\"?"],
    ),
    (
        "wrong type",
        "services:\n  web:\n    image: busybox\n    ports: 80\n",
        64,
        &["services.web.ports", "expected", "docker-compose.yml:4:12"],
    ),
    (
        "cycle",
        "services:\n  a: {image: i, depends_on: [b]}\n  b: {image: i, depends_on: [c]}\n  c: {image: i, depends_on: [a]}\n",
        64,
        &["services need each other in a circle: a -> b -> c -> a", "a needs b (depends_on)", "docker-compose.yml:3:"],
    ),
    (
        "undefined network",
        "services:\n  web:\n    image: busybox\n    networks: [back]\nnetworks: {bakc: }\n",
        64,
        &["there is no network \"back\" in the file", "docker-compose.yml:4:", "did you mean \"bakc\"?"],
    ),
    (
        "undefined volume",
        "services:\n  web:\n    image: busybox\n    volumes: [\"data:/d\"]\n",
        64,
        &["there is no volume \"data\" in the file", "docker-compose.yml:4:"],
    ),
    (
        "undefined variable",
        "services:\n  web:\n    image: busybox:${TAG_OF_NOBODY:?say which}\n",
        64,
        &["the required variable TAG_OF_NOBODY is not set or empty: say which", "docker-compose.yml:3:"],
    ),
    (
        "unknown external network",
        "services:\n  web: {image: busybox, networks: [n]}\nnetworks: {n: {external: true, name: nobodys}}\n",
        3,
        &["nobodys", "hint: "],
    ),
    (
        "constraint that cannot parse",
        "services:\n  web:\n    image: busybox\n    deploy: {placement: {constraints: [\"node.labels.disk=ssd\"]}}\n",
        1,
        &["failed to parse constraint `node.labels.disk=ssd` at column 17", "                ^", "hint: "],
    ),
    (
        "constraint in the environment that cannot parse",
        "services:\n  web:\n    image: busybox\n    environment: [\"constraint:host==/(/\"]\n",
        1,
        &["failed to parse constraint", "at column", "hint: "],
    ),
    (
        "constraint that no node meets",
        "services:\n  web:\n    image: busybox\n    deploy: {placement: {constraints: [\"node.labels.host==h9\"]}}\n",
        5,
        &["no node fits: 1 node; constraint node.labels.host==h9 took 1", "hint: skein node ls"],
    ),
];

#[test]
fn compose_files_that_cannot_be() -> Result<()> {
    let lab = lab("badfile", 1, &["busybox"])?;
    let cluster = cluster(&lab)?;
    let before = revision(&cluster)?;
    let mut checks = Checks::default();
    for (name, text, code, words) in BAD_FILES {
        let file = cluster.compose_file("bad", text)?;
        let said = skein(&cluster, &["up", "-f", &file.display().to_string(), "-p", "bad", "--yes"])?;
        checks.refused(name, &said, *code, words);
        let now = revision(&cluster)?;
        checks.ensure(name, now == before, format_args!("revision {before} -> {now}"));
    }
    let strict = "services:\n  web: {image: busybox, shm_size: 64m}\n";
    let file = cluster.compose_file("bad", strict)?;
    let said = skein(&cluster, &["up", "-f", &file.display().to_string(), "--strict", "--yes"])?;
    checks.refused("strict", &said, 64, &["services.web.shm_size has no effect", "docker-compose.yml:2:"]);
    bad_commands(&mut checks, &lab, &cluster)?;
    let now = revision(&cluster)?;
    checks.ensure("nothing changed", now == before, format_args!("revision {before} -> {now}"));
    ports_in_use(&mut checks, &lab, &cluster)?;
    checks.finish().with_context(|| lab.logs(20))
}

/// Commands that name what is not there or cannot be.
fn bad_commands(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let underlay = lab.host("h1").ipv4();
    let [a, b, c, _] = underlay.octets();
    let subnet = format!("{a}.{b}.{c}.0/25");
    let cases: &[(&str, &[&str], i32, &[&str])] = &[
        (
            "subnet of a host",
            &["network", "create", "--subnet", &subnet, "n"],
            4,
            &["overlaps a route of host h1", "hint: "],
        ),
        (
            "subnet too small",
            &["network", "create", "--subnet", "10.9.9.0/31", "n"],
            1,
            &["is not between a /8 and a /30"],
        ),
        ("no such task", &["exec", "nobody", "--", "true"], 3, &["nobody"]),
        ("no such node", &["node", "drain", "h9"], 3, &["h9"]),
        ("no such network", &["network", "rm", "nobodys"], 3, &["nobodys"]),
        ("no such stack", &["down", "-p", "nobodys", "--yes"], 3, &["nobodys"]),
        ("node that is ready", &["node", "rm", "h1"], 4, &["node h1 is ready", "hint: skein node drain h1"]),
        (
            "bad constraint of run",
            &["run", "-d", "--constraint", "x=y", "busybox"],
            1,
            &["failed to parse constraint `x=y` at column 2"],
        ),
        (
            "unknown network of run",
            &["run", "-d", "--network", "nobodys", "busybox"],
            3,
            &["nobodys", "hint: skein network create"],
        ),
        ("wrong usage", &["up", "--nonsense"], 2, &["--nonsense"]),
    ];
    for (name, args, code, words) in cases {
        let said = skein(cluster, args)?;
        checks.refused(name, &said, *code, words);
    }
    let said = run(cluster.skein_command()?.args(["--host", "unix:///run/nobody.sock", "info"]))?;
    checks.ensure("no master", said.code == 6 || said.code == 2, format_args!("{said:?}"));
    Ok(())
}

/// Two tasks that want one port of the only host, and a port that another process of the host has.
fn ports_in_use(checks: &mut Checks, lab: &Lab, cluster: &Cluster<'_>) -> Result<()> {
    let text = "services:\n  \
        a: {image: busybox, command: [sleep, \"1000\"], ports: [\"8080:80\"], stop_grace_period: 0s}\n  \
        b: {image: busybox, command: [sleep, \"1000\"], ports: [\"8080:80\"], depends_on: [a], stop_grace_period: 0s}\n";
    let file = cluster.compose_file("ports", text)?;
    let up = ["up", "-f", &file.display().to_string(), "-p", "ports", "--yes", "--timeout", "5s"];
    let said = skein(cluster, &up)?;
    let words =
        ["did not come up", "b.1", "host port", "8080", "took 1", "0 of 1 nodes fit", "hint: skein explain ports_b"];
    checks.refused("port of another task", &said, 5, &words);
    checks.ok("the port's owner", cluster.wait_for_running("ports_a.1"));
    let said = skein(cluster, &["down", "-p", "ports", "--yes"])?;
    checks.fine("down", &said);
    // A process of the host itself.
    let host = lab.host("h1");
    let listener = host.spawn(Spawn::new("busybox").name("listener").args(["nc", "-l", "-p", "8081"]))?;
    wait_for("the listener", PATIENCE, || {
        let listening = host.run(&["ss", "-Htln", "sport", "=", ":8081"])?;
        Ok((!listening.trim().is_empty()).then_some(()))
    })?;
    let said = skein(cluster, &["run", "--name", "taken", "-p", "8081:80", "busybox", "sleep", "1000"])?;
    checks.refused("port of another process", &said, 1, &["8081", "in use"]);
    let on_overlay = ["run", "--name", "taken2", "--network", "kept", "-p", "8081:80", "busybox", "sleep", "1000"];
    checks.fine("network", &skein(cluster, &["network", "create", "kept"])?);
    let said = skein(cluster, &on_overlay)?;
    checks.refused("port of another process, on an overlay", &said, 1, &["8081", "in use"]);
    listener.kill()
}

/// Starts a master on these data in the host and gives back what it says, if it ends by itself as it should.
fn start_on(host: &Host, data: &Path) -> Result<Said> {
    let mut command = host.command("timeout");
    command.arg("20").arg(program("skein-master")?).env("RUST_LOG", "error");
    run(command.args(["--listen", "[::]:7442", "--socket", "/run/skein/second.sock", "--data-dir"]).arg(data))
}

#[test]
fn stores_that_cannot_be_used() -> Result<()> {
    let lab = lab("badstore", 0, &[])?;
    let cluster = Cluster::of(&lab);
    let master = cluster.start_master()?;
    let host = cluster.master();
    let data = host.dir().join("skein-master");
    let network = cluster.json(&["network", "create", "kept"])?;
    let mut checks = Checks::default();
    let before = revision(&cluster)?;
    let said = start_on(host, &data)?;
    let pid = format!("process {}", master.id().pid);
    checks.refused("second master", &said, 1, &["failed to lock the store in", &pid, "nothing was changed", "hint: "]);
    checks.ensure("the first master goes on", revision(&cluster)? == before, "it changed");
    master.signal(Signal::SIGTERM)?;
    wait_for("the master to end", PATIENCE, || Ok((!master.is_running()).then_some(())))?;

    let store = data.join("store.redb");
    let good = fs::read(&store)?;
    let id = network["id"].as_str().context("no id")?;
    damaged(&mut checks, host, &lab.dir().join("damaged"), &good, id)?;
    newer(&mut checks, host, &lab.dir().join("newer"), &good)?;
    // The store that all this was copied from is as it was.
    cluster.start_master()?;
    checks.ok("the store", cluster.json(&["network", "inspect", "kept"]));
    cluster.process("master", "skein-master")?.kill()?;
    disk_full(&mut checks, &cluster)?;
    checks.finish().with_context(|| lab.logs(20))
}

/// One flipped bit of a record's value, a file cut short, and a file of something else.
fn damaged(checks: &mut Checks, host: &Host, dir: &Path, good: &[u8], id: &str) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut check = |name: &str, bytes: &[u8], words: &[&str]| -> Result<()> {
        fs::write(dir.join("store.redb"), bytes)?;
        let said = start_on(host, dir)?;
        checks.refused(
            name,
            &said,
            1,
            &["failed to load the store", "no record was changed", "hint: keep the damaged directory"],
        );
        checks.words(name, &said.err, words);
        checks.ensure(name, fs::read(dir.join("store.redb"))? == bytes, "the file was changed");
        Ok(())
    };
    let at = |needle: &[u8]| good.windows(needle.len()).position(|w| w == needle);
    // Its key is `network`, NUL, id; the value with its spec follows somewhere behind.
    let key = at([b"network\0", id.as_bytes()].concat().as_slice()).context("the record is not in the file")?;
    let value =
        good[key..].windows(4).position(|w| w == b"kept").context("the record's value is not in the file")? + key;
    let mut flipped = good.to_vec();
    flipped[value] ^= 1;
    check("flipped bit", &flipped, &[&format!("record network/{id} is damaged")])?;
    check("cut short", &good[..good.len() / 2], &["damaged"])?;
    check("empty file", &[], &["it is empty"])?;
    check("another file", b"#!/bin/sh\nthis is no store\n", &["damaged"])
}

const META: redb::TableDefinition<'static, &str, &[u8]> = redb::TableDefinition::new("meta");
const RECORDS: redb::TableDefinition<'static, &[u8], &[u8]> = redb::TableDefinition::new("records");

/// Everything that is in a store's file.
fn contents(file: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let db = redb::Database::open(file)?;
    let read = db.begin_read()?;
    let mut all = Vec::new();
    for entry in read.open_table(META)?.iter()? {
        let (key, value) = entry?;
        all.push((key.value().as_bytes().to_vec(), value.value().to_vec()));
    }
    for entry in read.open_table(RECORDS)?.iter()? {
        let (key, value) = entry?;
        all.push((key.value().to_vec(), value.value().to_vec()));
    }
    Ok(all)
}

/// A store that a later release wrote: the format's mark says so, the rest is as it is.
fn newer(checks: &mut Checks, host: &Host, dir: &Path, good: &[u8]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let file = dir.join("store.redb");
    fs::write(&file, good)?;
    // Number, build's name, and the first 8 bytes of SHA-256 over domain, length and these two.
    let mark = [&99_u32.to_le_bytes()[..], b"99.0.0"].concat();
    let length = u64::try_from(mark.len())?.to_le_bytes();
    let sum = ring::digest::digest(&ring::digest::SHA256, &[b"skein format", &length[..], &mark].concat());
    let mark = [&mark[..], &sum.as_ref()[..8]].concat();
    {
        let db = redb::Database::open(&file)?;
        let write = db.begin_write()?;
        write.open_table(META)?.insert("format", mark.as_slice())?;
        write.commit()?;
    }
    let before = contents(&file)?;
    let said = start_on(host, dir)?;
    let words = ["it has format 99", "no record was changed", "hint: use skein-master 99.0.0 or a newer one"];
    checks.refused("newer format", &said, 1, &words);
    // The database engine notes in its header that it had the file open; everything else is as it was.
    checks.ensure("newer format", contents(&file)? == before, "something in the file was changed");
    Ok(())
}

/// A file system of 4 MiB that fills up under a running master, and one that is full before the first start.
fn disk_full(checks: &mut Checks, cluster: &Cluster<'_>) -> Result<()> {
    let host = cluster.master();
    // The data directory of the harness: what is there now is hidden below.
    let data = host.dir().join("skein-master").display().to_string();
    let ballast = format!("{data}/ballast");
    let fill = ["sh", "-c", "cat /dev/zero > \"$0\" 2>/dev/null; test -s \"$0\"", &ballast];
    host.run(&["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", &data])?;
    host.run(&fill)?;
    let said = start_on(host, Path::new(&data))?;
    checks.refused("full before the first start", &said, 1, &["the disk is full", "hint: make room on the disk"]);
    host.run(&["rm", &ballast])?;
    let left = host.run(&["ls", &data])?;
    checks.ensure("no half store is left", !left.split_whitespace().any(|f| f == "store.redb"), &left);

    cluster.start_master()?;
    host.run(&fill)?;
    let mut kept = Vec::new();
    let refused = loop {
        let name = format!("n{}", kept.len());
        let subnet = format!("10.77.{}.0/24", kept.len());
        // Large enough together that the file must grow soon.
        let labels: Vec<String> = (0..4).map(|key| format!("k{key}={}", "x".repeat(15_000))).collect();
        let mut args = vec!["network", "create", &name, "--subnet", &subnet];
        args.extend(labels.iter().flat_map(|label| ["--label", label.as_str()]));
        let said = skein(cluster, &args)?;
        if said.code != 0 {
            break said;
        }
        kept.push(name);
        ensure!(kept.len() < 200, "the disk does not fill");
    };
    checks.refused("disk full", &refused, 1, &["the disk is full", "hint: "]);
    let info = cluster.skein(&["info"])?;
    checks.words("info says so", &info, &["read-only:", "the disk is full"]);
    host.run(&["rm", &ballast])?;
    wait_for("the master to take changes again", PATIENCE, || {
        Ok((skein(cluster, &["network", "create", "after"])?.code == 0).then_some(()))
    })?;
    // One whose commit failed may be there or not; every acknowledged one is.
    let networks = cluster.json(&["network", "ls"])?;
    let names: Vec<&str> =
        networks.as_array().into_iter().flatten().filter_map(|n| n["spec"]["name"].as_str()).collect();
    for name in &kept {
        checks.ensure("acknowledged before the disk was full", names.contains(&name.as_str()), name);
    }
    checks.words("the invariants", &cluster.skein(&["debug", "check"])?, &["all invariants hold"]);
    cluster.process("master", "skein-master")?.kill()?;
    host.run(&["umount", &data]).map(drop)
}

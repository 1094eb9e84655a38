//! The agent's network side under real engines: two hosts of the lab, plain `docker` commands, kernel tools to look.
//!
//! The program under test is `network-side`: overlay, plugin and name server without a session, fed from a file. What
//! is expected is what a user sees: names resolve, pings and connections arrive, nothing is lost over a `kill -9`,
//! names neither.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xtask::lab::{Host, Lab, LabSpec, Process, Spawn, wait_for};

/// Nothing here takes longer on two busy cores.
const PATIENCE: Duration = Duration::from_secs(60);
const NETWORK: &str = "0123456789abcdef";
/// An internal network; host 1 has a container in it called `vault`.
const BACK: &str = "fedcba9876543210";

/// One endpoint: host 1 or 2, last byte of the address, names, healthy.
type Named = (u8, u8, &'static [&'static str], &'static [&'static str], bool);

struct Side<'a> {
    host: &'a Host,
    index: u8,
    peer: &'a Host,
}

impl Side<'_> {
    fn assignments(&self, networks: bool, names: &[Named]) -> Value {
        let peer_index = 3 - self.index;
        let network = json!({
            "id": NETWORK, "name": "shop", "vni": 4711, "subnet4": "10.57.0.0/16", "subnet6": "fd57:0:0:1::/64",
            "gateway4": "10.57.0.1", "gateway6": "fd57:0:0:1::1", "mtu": 1450, "internal": false, "attachable": true,
            "host_index": self.index, "blocks": [format!("10.57.{}.0/24", self.index)],
        });
        let back = json!({
            "id": BACK, "name": "back", "vni": 4712, "subnet4": "10.58.0.0/16", "subnet6": "fd57:0:0:2::/64",
            "gateway4": "10.58.0.1", "gateway6": "fd57:0:0:2::1", "mtu": 1450, "internal": true, "attachable": true,
            "host_index": self.index, "blocks": [format!("10.58.{}.0/24", self.index)],
        });
        let vault = json!({
            "network": BACK, "task": "vault", "node": "node1", "names": ["vault"], "shared_names": [], "healthy": true,
            "v4": "10.58.1.9", "v6": "fd57:0:0:2::109",
        });
        let peer = json!({
            "network": NETWORK, "node": self.peer.name(), "host_index": peer_index, "underlay4": self.peer.ipv4(),
            "underlay6": null, "blocks": [format!("10.57.{peer_index}.0/24")],
        });
        let mut endpoints: Vec<Value> = names
            .iter()
            .map(|(host, last, own, shared, healthy)| {
                json!({
                    "network": NETWORK, "task": format!("task-{host}-{last}"), "node": format!("node{host}"),
                    "names": own, "shared_names": shared, "healthy": healthy,
                    "v4": format!("10.57.{host}.{last}"), "v6": format!("fd57:0:0:1::{host:x}{last:02x}"),
                })
            })
            .collect();
        endpoints.push(vault);
        let (networks, peers) = if networks { (json!([network, back]), json!([peer])) } else { (json!([]), json!([])) };
        json!({"underlay4": self.host.ipv4(), "networks": networks, "peers": peers, "endpoints": endpoints})
    }

    fn dir(&self) -> std::path::PathBuf {
        self.host.dir().join("network-side")
    }

    fn write(&self, assignments: &Value) -> Result<()> {
        fs::create_dir_all(self.dir())?;
        fs::write(self.dir().join("assignments.new"), assignments.to_string())?;
        Ok(fs::rename(self.dir().join("assignments.new"), self.dir().join("assignments.json"))?)
    }

    /// Starts the program and waits for its `count`th apply.
    fn start(&self, log: &str) -> Result<Process> {
        let _ = fs::remove_file(self.dir().join("applied"));
        let spawn = Spawn::new(env!("CARGO_BIN_EXE_network-side"))
            .arg(self.dir())
            .name(log)
            .plugin_socket()
            .fd_store("network-side");
        let process = self.host.spawn(spawn)?;
        self.applied(1).with_context(|| process.log_tail())?;
        Ok(process)
    }

    fn applied(&self, count: u32) -> Result<()> {
        wait_for(&format!("apply {count} of {}", self.host.name()), PATIENCE, || {
            let text = fs::read_to_string(self.dir().join("applied")).unwrap_or_default();
            let (done, failure) = text.split_once(' ').unwrap_or_default();
            ensure!(failure.is_empty(), "apply failed on {}: {failure}", self.host.name());
            Ok((done == count.to_string()).then_some(()))
        })
    }

    /// The engine's network for one of ours; `n` is the second byte of its subnet.
    fn create_network(&self, name: &str, id: &str, n: u8) -> Result<()> {
        let option = format!("io.skein.network={id}");
        let (subnet4, gateway4) = (format!("10.{n}.0.0/16"), format!("10.{n}.0.1"));
        let (subnet6, gateway6) = (format!("fd57:0:0:{}::/64", n - 56), format!("fd57:0:0:{}::1", n - 56));
        self.host.docker(&[
            "network",
            "create",
            "-d",
            "skein",
            "--ipam-driver",
            "skein",
            "-o",
            &option,
            "--ipam-opt",
            &option,
            "--ipv6",
            "--subnet",
            &subnet4,
            "--gateway",
            &gateway4,
            "--subnet",
            &subnet6,
            "--gateway",
            &gateway6,
            name,
        ])?;
        Ok(())
    }

    fn run(&self, name: &str, args: &[&str], command: &[&str]) -> Result<String> {
        let start = ["run", "-d", "--name", name, "--network", "shop", "--dns", "10.57.0.1"];
        self.host.docker(&[&start[..], args, &["busybox"], command].concat())
    }

    fn exec(&self, container: &str, command: &[&str]) -> Result<String> {
        self.host.docker(&[&["exec", container][..], command].concat())
    }

    /// A command in the network's fabric.
    fn fabric(&self, command: &[&str]) -> Result<String> {
        let namespace = format!("--net=/run/skein/netns/sk-{NETWORK}");
        self.host.run(&[&["nsenter", &namespace, "--"][..], command].concat())
    }

    fn address(&self, container: &str) -> Result<String> {
        self.host.docker(&["inspect", "-f", "{{.NetworkSettings.Networks.shop.IPAddress}}", container])
    }
}

fn lab() -> Result<Lab> {
    let mut spec = LabSpec::new(format!("ov{}", std::process::id()), 2);
    spec.hosts.retain(|host| host.engine);
    let lab = Lab::up(spec)?;
    for image in ["busybox", "net-tools"] {
        lab.image(image)?;
    }
    Ok(lab)
}

fn sides(lab: &Lab) -> (Side<'_>, Side<'_>) {
    let hosts: Vec<&Host> = lab.engines().collect();
    let side = |index: u8| Side { host: hosts[usize::from(index - 1)], index, peer: hosts[usize::from(2 - index)] };
    (side(1), side(2))
}

const NAMES: [Named; 3] = [
    (1, 10, &["web.1"], &["web", "tasks.web"], true),
    (2, 20, &["db.1"], &["db"], true),
    (2, 21, &["db.2"], &["db"], false),
];

fn fails(result: Result<String>, words: &str) -> Result<()> {
    let Err(error) = result else { anyhow::bail!("did not fail with {words:?}") };
    let text = format!("{error:#}");
    ensure!(text.contains(words), "{words:?} is not in: {text}");
    Ok(())
}

#[test]
fn containers_of_two_engines_are_one_network() -> Result<()> {
    let lab = lab()?;
    let (a, b) = sides(&lab);
    for side in [&a, &b] {
        side.write(&side.assignments(true, &NAMES))?;
        side.start("side-1")?;
        side.create_network("shop", NETWORK, 57)?;
        side.create_network("back", BACK, 58)?;
    }
    fails(a.host.docker(&["network", "create", "-d", "skein", "mine"]), "hint: skein network create")?;
    fails(
        a.host.docker(&["network", "create", "-d", "skein", "--ipam-driver", "skein", "mine"]),
        "hint: skein network create",
    )?;

    a.run("web", &["--ip", "10.57.1.10"], &["sleep", "1000000"])?;
    b.run("db", &["--ip", "10.57.2.20"], &["sleep", "1000000"])?;
    b.run("plain", &[], &["sleep", "1000000"])?;
    talk(&a, &b)?;
    single_addresses(&a, &b)?;
    names(&a)?;
    two_networks(&a, &b)?;
    names_wait(&a, &b)?;
    adoption(&a, &b)?;
    repair(&a, &b)?;
    ports(&a, &b)?;
    engine_crash(&a, &b)?;
    goodbye(&a, &b)?;
    drop(lab);
    Ok(())
}

fn talk(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    let plain = b.address("plain")?;
    ensure!(plain == "10.57.2.0" || plain.starts_with("10.57.2."), "{plain} is not of host 2's block");
    for target in ["10.57.2.20", plain.as_str()] {
        a.exec("web", &["ping", "-c", "2", "-W", "2", target]).with_context(|| diagnose(a, b))?;
    }
    a.exec("web", &["ping6", "-c", "2", "-W", "2", "fd57:0:0:1::214"]).with_context(|| diagnose(a, b))?;
    let interfaces = a.exec("web", &["ip", "-o", "link"])?;
    ensure!(!interfaces.contains("eth1"), "the engine added a bridge of its own: {interfaces}");
    Ok(())
}

/// An address of host 2's block goes to host 1: it is a route of its own everywhere, and host 2 gives it to nobody.
fn single_addresses(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    let lent = "10.57.2.200";
    let (mut on_a, mut on_b) = (a.assignments(true, &NAMES), b.assignments(true, &NAMES));
    let single = json!(format!("{lent}/32"));
    on_a["networks"][0]["blocks"].as_array_mut().context("a list")?.push(single.clone());
    on_b["peers"][0]["blocks"].as_array_mut().context("a list")?.push(single.clone());
    on_b["networks"][0]["frozen"] = json!([{"prefix": single, "ticket": 5}]);
    a.write(&on_a)?;
    b.write(&on_b)?;
    for side in [a, b] {
        side.applied(2)?;
    }
    a.run("lent", &["--ip", lent], &["sleep", "1000000"])?;
    for target in [lent, "fd57:0:0:1::2c8"] {
        for (side, from) in [(b, "db"), (a, "web")] {
            let ping = if target.contains(':') { "ping6" } else { "ping" };
            side.exec(from, &[ping, "-c", "2", "-W", "2", target]).with_context(|| diagnose(a, b))?;
        }
    }
    a.exec("lent", &["ping", "-c", "1", "-W", "2", "10.57.2.20"])?;
    let run = ["run", "--rm", "--network", "shop", "--ip", lent, "busybox", "true"];
    fails(b.host.docker(&run), "is kept for another container")?;
    a.host.docker(&["rm", "-f", "lent"])?;
    for side in [a, b] {
        side.write(&side.assignments(true, &NAMES))?;
        side.applied(3)?;
    }
    fails(a.host.docker(&run), "is not one that this host can give")?;
    b.host.docker(&run)?;
    Ok(())
}

fn names(a: &Side<'_>) -> Result<()> {
    let look = |name: &str| a.exec("web", &["nslookup", name]);
    for name in ["db", "DB", "db.1", "db.shop", "tasks.web"] {
        ensure!(look(name)?.contains("10.57."), "{name}: {}", look(name)?);
    }
    ensure!(!look("db")?.contains("10.57.2.21"), "an unhealthy one is listed");
    ensure!(look("10.57.2.20")?.contains("db.1.shop"), "reverse");
    a.exec("web", &["ping", "-c", "1", "-W", "2", "db"])?;
    let nobody = a.exec("web", &["sh", "-c", "nslookup nobody || true"])?;
    ensure!(nobody.contains("NXDOMAIN"), "{nobody}");
    Ok(())
}

/// Networks are apart, but a container in two of them reaches both and knows the names of both; an internal one has no
/// way out.
fn two_networks(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    let underlay = b.host.ipv4().to_string();
    a.exec("web", &["ping", "-c", "1", "-W", "2", &underlay]).with_context(|| diagnose(a, b))?;
    let inner = ["run", "-d", "--name", "vault", "--network", "back", "--ip", "10.58.1.9", "--dns", "10.58.0.1"];
    a.host.docker(&[&inner[..], &["busybox", "sleep", "1000000"]].concat())?;
    let routes = a.exec("vault", &["ip", "route"])?;
    ensure!(!routes.contains("default") && !a.exec("vault", &["ip", "link"])?.contains("eth1"), "{routes}");
    for out in ["10.57.1.10", &underlay] {
        ensure!(a.exec("vault", &["ping", "-c", "1", "-W", "1", out]).is_err(), "{out} is reached from inside");
    }
    ensure!(a.exec("web", &["ping", "-c", "1", "-W", "1", "10.58.1.9"]).is_err(), "not attached yet");
    a.host.docker(&["network", "connect", "back", "web"])?;
    a.exec("web", &["ping", "-c", "1", "-W", "2", "vault"]).with_context(|| diagnose(a, b))?;
    a.exec("web", &["ping", "-c", "1", "-W", "2", "db"])?;
    for (side, container, name) in [(b, "db", "vault"), (a, "vault", "example.org"), (a, "vault", "db")] {
        let answer = side.exec(container, &["sh", "-c", &format!("nslookup {name} || true")])?;
        ensure!(answer.contains("NXDOMAIN"), "{container} asks for {name}: {answer}");
    }
    a.host.docker(&["network", "disconnect", "back", "web"])?;
    a.exec("web", &["ping", "-c", "1", "-W", "2", "db"])?;
    a.host.docker(&["rm", "-f", "vault"])?;
    Ok(())
}

/// How long the agents stay away in [`names_wait`].
const AWAY: Duration = Duration::from_secs(1);

/// Looks a remote name up until told to stop, and says what it got instead of an answer.
const LOOK: &str = "name=$1 address=$2 how=$3
touch /tmp/looks.$$
while ! [ -e /tmp/stop ]; do
    said=$(dig $how $name 2>&1)
    case \"$said\" in *$address*) echo found ;; *) echo lost: \"$said\" ;; esac
done";

/// How a container looks names up before the agents are killed: as users do, since a question that an agent has read
/// dies with it and is asked again.
const BEFORE: [&str; 1] = [""];

/// And while they are away: asked once, through the engine's resolver, which never answers a question that is refused,
/// and over a connection to the name server.
const MEANWHILE: [&str; 2] = ["+tries=1", "+tries=1 +tcp @10.57.0.1"];

/// Both agents are killed and stay away for a while: no look-up fails, those that come meanwhile wait.
fn names_wait(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    let looked_up = [(a, "db", "10.57.2.20"), (b, "web", "10.57.1.10")];
    let mut looks = Vec::new();
    let mut look = |hows: &[&str]| -> Result<()> {
        for (side, name, address) in looked_up {
            for how in hows {
                let mut look = side.host.docker_command();
                look.args(["exec", "looker", "sh", "-c", LOOK, "sh", name, address, how]);
                looks.push((side, look.stdout(Stdio::piped()).spawn()?));
            }
        }
        Ok(())
    };
    let looking = |count: usize| {
        wait_for("containers that look names up", PATIENCE, || {
            let on = |side: &Side<'_>| Ok(side.exec("looker", &["ls", "/tmp"])?.matches("looks.").count());
            let counts: Vec<usize> = looked_up.iter().map(|(side, ..)| on(side)).collect::<Result<_>>()?;
            Ok(counts.iter().all(|n| *n == count).then_some(()))
        })
    };
    for (side, ..) in looked_up {
        let run = ["run", "-d", "--name", "looker", "--network", "shop", "--dns", "10.57.0.1", "net-tools"];
        side.host.docker(&[&run[..], &["sleep", "1000000"]].concat())?;
    }
    look(&BEFORE)?;
    looking(BEFORE.len())?;
    for side in [a, b] {
        side.host.process("side-1")?.context("it runs")?.kill()?;
    }
    let gone = Instant::now();
    look(&MEANWHILE)?;
    looking(BEFORE.len() + MEANWHILE.len())?;
    wait_for("a while without agents", PATIENCE, || Ok((gone.elapsed() >= AWAY).then_some(())))?;
    for side in [a, b] {
        let again = side.start("side-1")?;
        ensure!(again.log()?.contains("took over the name server's sockets"), "{}", again.log_tail());
    }
    for (side, look) in looks {
        side.exec("looker", &["touch", "/tmp/stop"])?;
        let said = String::from_utf8(look.wait_with_output()?.stdout)?;
        ensure!(said.contains("found") && !said.contains("lost"), "{}: {said}", side.host.name());
    }
    for side in [a, b] {
        side.host.docker(&["rm", "-f", "looker"])?;
    }
    Ok(())
}

/// Killed under traffic: no packet lost, nothing changed in the kernel by the one that comes after.
fn adoption(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    let before = (a.fabric(&["ip", "-d", "address"])?, a.fabric(&["ip", "route"])?);
    let ping = ["exec", "web", "ping", "-i", "0.01", "-c", "600", "-q", "10.57.2.20"];
    let ping = a.host.docker_command().args(ping).stdout(Stdio::piped()).spawn()?;
    for side in [a, b] {
        side.host.process("side-1")?.context("it runs")?.kill()?;
        let second = side.start("side-2")?;
        let log = second.log()?;
        ensure!(!log.contains("changed the kernel's state"), "not adopted:\n{log}");
    }
    let output = String::from_utf8(ping.wait_with_output()?.stdout)?;
    ensure!(output.contains(" 0% packet loss"), "{output}");
    let after = (a.fabric(&["ip", "-d", "address"])?, a.fabric(&["ip", "route"])?);
    ensure!(before == after, "{before:?}\n{after:?}");
    a.exec("web", &["nslookup", "db"])?;
    Ok(())
}

fn repair(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    a.fabric(&["ip", "route", "del", "10.57.2.0/24"])?;
    wait_for("the route back", PATIENCE, || Ok(a.fabric(&["ip", "route"])?.contains("10.57.2.0/24").then_some(())))?;
    a.exec("web", &["ping", "-c", "1", "-W", "2", "10.57.2.20"]).with_context(|| diagnose(a, b))?;
    let log = a.host.process("side-2")?.context("it runs")?.log()?;
    ensure!(log.contains("repaired the kernel's state"), "{log}");
    Ok(())
}

/// A published port works from another host and shows the client's address; a taken one names its holder.
fn ports(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    let serve = "mkdir -p /w/cgi-bin && printf '#!/bin/sh\\necho\\necho from $REMOTE_ADDR\\n' >/w/cgi-bin/who && \
                 chmod +x /w/cgi-bin/who && exec httpd -f -p 80 -h /w";
    a.run("httpd", &["-p", "8080:80"], &["sh", "-c", serve])?;
    // Not wget: a static busybox's getaddrinfo crashes on hosts whose resolver it was not built with.
    let ask = format!("printf 'GET /cgi-bin/who HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 2 {} 8080", a.host.ipv4());
    // The server listens on a socket of both families, which shows IPv4 addresses as mapped ones.
    let want = format!("from [::ffff:{}]", b.host.ipv4());
    wait_for("the published port", PATIENCE, || {
        let got = b.host.run(&["sh", "-c", &ask]).unwrap_or_default();
        Ok(got.contains(&want).then_some(()))
    })
    .with_context(|| diagnose(a, b))?;
    fails(a.run("second", &["-p", "8080:80"], &["true"]), "port 8080/tcp of this host is published by")?;
    a.host.docker(&["rm", "-f", "second"])?;

    let mut other = a.host.command("busybox").args(["nc", "-l", "-p", "9090"]).spawn()?;
    let held =
        wait_for("the other process", PATIENCE, || Ok(a.host.run(&["ss", "-ltn"])?.contains(":9090").then_some(())))
            .and_then(|()| {
                fails(a.run("third", &["-p", "9090:80"], &["true"]), "port 9090/tcp of this host is in use by process")
            });
    other.kill()?;
    other.wait()?;
    held?;
    a.host.docker(&["rm", "-f", "third", "httpd"])?;
    let gone = b.host.run(&["sh", "-c", &ask]);
    ensure!(!gone.unwrap_or_default().contains("from"), "the port is still published");
    Ok(())
}

/// The engine is killed and comes back: it takes down what it remembers, and containers start again with their address.
fn engine_crash(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    b.host.stop_engine(Signal::SIGKILL)?;
    b.host.start_engine()?;
    b.host.docker(&["start", "db", "plain"])?;
    ensure!(b.address("db")? == "10.57.2.20");
    wait_for("the way to the restarted container", PATIENCE, || {
        Ok(a.exec("web", &["ping", "-c", "1", "-W", "1", "10.57.2.20"]).is_ok().then_some(()))
    })
    .with_context(|| diagnose(a, b))
}

/// Containers, networks and fabrics go, and leave nothing behind.
fn goodbye(a: &Side<'_>, b: &Side<'_>) -> Result<()> {
    // Host 2 loses its networks while containers use them: they stay until the last one has left.
    b.write(&b.assignments(false, &[]))?;
    b.applied(2)?;
    let plain = b.address("plain")?;
    b.exec("db", &["ping", "-c", "1", "-W", "2", &plain]).with_context(|| diagnose(a, b))?;
    a.host.docker(&["rm", "-f", "web"])?;
    b.host.docker(&["rm", "-f", "db", "plain"])?;
    for side in [a, b] {
        side.host.docker(&["network", "rm", "shop", "back"])?;
        let state: Vec<String> = fs::read_dir(side.dir().join("state/network"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with("plugin"))
            .collect();
        ensure!(state.is_empty(), "left on {}: {state:?}", side.host.name());
        if side.index == 1 {
            let links = side.fabric(&["ip", "-o", "link"])?;
            ensure!(!links.contains("skv-"), "left on {}: {links}", side.host.name());
            side.write(&side.assignments(false, &[]))?;
            side.applied(2)?;
        }
        let left = side.host.run(&["ls", "/run/skein/netns"])?;
        ensure!(left.trim().is_empty(), "left on {}: {left}", side.host.name());
        let rules = side.host.run(&["nft", "list", "tables"])?;
        ensure!(!rules.contains("inet skein"), "left on {}: {rules}", side.host.name());
        side.host.process("side-2")?.context("it runs")?.kill()?;
        let script = "echo kept: $LISTEN_FDNAMES";
        let spawn = Spawn::new("sh").args(["-c", script]).name("kept").fd_store("network-side");
        let kept = side.host.spawn(spawn)?;
        kept.wait(PATIENCE)?;
        ensure!(kept.log()?.trim() == "kept:", "sockets of networks that are gone are kept: {}", kept.log()?);
    }
    Ok(())
}

/// What one would look at by hand, for a failure's message.
fn diagnose(a: &Side<'_>, b: &Side<'_>) -> String {
    let mut text = String::new();
    for side in [a, b] {
        text.push_str(&format!("--- {}\n", side.host.name()));
        for command in [&["ip", "-d", "address"][..], &["ip", "route"], &["ip", "neigh"], &["nft", "list", "ruleset"]] {
            text.push_str(&side.fabric(command).unwrap_or_else(|e| format!("{e:#}")));
        }
        text.push_str(&side.host.run(&["nft", "list", "table", "inet", "skein"]).unwrap_or_else(|e| format!("{e:#}")));
        for log in ["side-1", "side-2"] {
            if let Ok(Some(process)) = side.host.process(log) {
                text.push_str(&process.log_tail());
            }
        }
    }
    text
}

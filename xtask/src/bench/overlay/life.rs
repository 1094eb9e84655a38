//! What happens around traffic: how long a container takes to its first packet, what its network costs at the plugin,
//! how soon a changed virtual address holds everywhere, and what is done while nothing happens.
//!
//! Each function gives the figures of one round. The engine is asked through `docker`, our plugin through its socket as
//! the engine asks it. Threads end with the call that started them; no channels.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::rig::{NETWORK, Rig};
use crate::{
    cluster::PATIENCE,
    lab::{Host, PLUGIN_SOCKET, probe::Place, run, wait_for},
};

/// Where the first packet of a new container is waited for.
const PORT: u16 = 5_303;
/// How long a plugin call may take.
const CALL_WITHIN: Duration = Duration::from_secs(10);
/// How long nothing happens.
const AT_REST: Duration = Duration::from_secs(10);

/// Waits for a connection while `make` makes a container that connects; milliseconds from the one to the other.
fn until_connected(at: &Place, make: impl FnOnce() -> Result<()>) -> Result<f64> {
    let listener =
        at.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("failed to listen for a container"))?;
    listener.set_nonblocking(true)?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            wait_for("the first packet", PATIENCE, || match listener.accept() {
                Ok(_) => Ok(Some(began.elapsed())),
                Err(_) => Ok(None),
            })
        });
        make()?;
        let took = waiting.join().unwrap_or_else(|_| anyhow::bail!("the thread that waits panicked"))?;
        Ok(took.as_secs_f64() * 1e3)
    })
}

/// What a new container does: connect, again and again until it is answered.
fn knock(to: impl std::fmt::Display) -> String {
    format!("until nc -w 1 {to} {PORT} < /dev/null; do :; done")
}

/// `docker run` on a host with this network, until a connection of the container is accepted at `to`.
pub(super) fn engine_start_ms(host: &Host, network: &str, at: &Place, to: std::net::IpAddr) -> Result<f64> {
    const NAME: &str = "bench-first";
    let took = until_connected(at, || {
        let knock = knock(to);
        host.docker(&["run", "-d", "--name", NAME, "--network", network, "busybox", "sh", "-c", &knock]).map(drop)
    });
    host.docker(&["rm", "-f", NAME])?;
    took
}

/// `skein run` on the first host, the same. What it has more than [`engine_start_ms`] are master, agent, and the wait
/// until the other hosts know its names.
pub(super) fn cluster_start_ms(rig: &Rig, at: &Place, to: std::net::IpAddr, round: u32) -> Result<f64> {
    let name = format!("bench-first-{round}");
    let cluster = rig.cluster();
    let took = until_connected(at, || {
        let args = ["run", "-d", "--name", &name, "--network", NETWORK, "--constraint", "node.labels.host==h1"];
        cluster.skein(&[&args[..], &["busybox", "sh", "-c", &knock(to)]].concat()).map(drop)
    });
    cluster.skein(&["rm", "-f", &name])?;
    took
}

/// The plugin of a host, called as its engine calls it.
pub(super) struct Plugin<'a> {
    host: &'a Host,
    /// The engine's id of our network.
    engine_network: String,
    /// Pools by family, and whether there is one of IPv6.
    pools: Vec<String>,
}

impl<'a> Plugin<'a> {
    /// For our network on this host.
    ///
    /// # Errors
    /// The network is not there.
    pub(super) fn of(rig: &Rig, host: &'a Host) -> Result<Self> {
        let engine_network = host.docker(&["network", "inspect", "-f", "{{.Id}}", NETWORK])?;
        let shown = rig.cluster().json(&["network", "inspect", NETWORK])?;
        let id = shown["id"].as_str().context("the network has no id")?;
        let six = host.docker(&["network", "inspect", "-f", "{{.EnableIPv6}}", NETWORK])? == "true";
        let pools = ["4", "6"].iter().take(1 + usize::from(six)).map(|v| format!("skein/{id}/{v}")).collect();
        Ok(Self { host, engine_network, pools })
    }

    /// One call, with its answer; milliseconds are added to `spent`.
    fn call(&self, method: &str, body: &Value, spent: &mut f64) -> Result<Value> {
        let (body, began) = (body.to_string(), Instant::now());
        let path = self.host.path(PLUGIN_SOCKET);
        let mut stream = UnixStream::connect(&path).with_context(|| format!("failed to call {}", path.display()))?;
        stream.set_read_timeout(Some(CALL_WITHIN))?;
        let head = format!(
            "POST /{method} HTTP/1.1\r\nHost: plugin\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).context("failed to send")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("failed to read an answer")?;
        *spent += began.elapsed().as_secs_f64() * 1e3;
        let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of its head")?;
        ensure!(head.contains(" 200 "), "{method} failed: {answer}");
        serde_json::from_str(body).with_context(|| format!("{method} was answered {body:?}"))
    }

    /// Makes an endpoint and takes it away again; milliseconds of the calls up to the container's start, and of those
    /// after its end.
    ///
    /// # Errors
    /// A call fails.
    pub(super) fn endpoint_ms(&self, number: u32) -> Result<(f64, f64)> {
        let [.., high, low] = number.to_be_bytes();
        let (mac, endpoint) = (format!("02:42:00:00:{high:02x}:{low:02x}"), format!("bench-endpoint-{number}"));
        let (mut up, mut down) = (0.0, 0.0);
        let mut addresses = Vec::new();
        for pool in &self.pools {
            let body = json!({ "PoolID": pool, "Address": "",
                "Options": { "com.docker.network.endpoint.macaddress": mac } });
            let answer = self.call("IpamDriver.RequestAddress", &body, &mut up)?;
            addresses.push(answer["Address"].as_str().context("no address was given")?.to_owned());
        }
        let (network, none) = (&self.engine_network, String::new());
        let interface = json!({ "Address": addresses[0], "AddressIPv6": addresses.get(1).unwrap_or(&none),
            "MacAddress": mac });
        let ids = json!({ "NetworkID": network, "EndpointID": endpoint });
        let with = |key: &str, value: Value| {
            let mut body = ids.clone();
            body[key] = value;
            body
        };
        self.call("NetworkDriver.CreateEndpoint", &with("Interface", interface), &mut up)?;
        let sandbox = json!(format!("/var/run/docker/netns/{endpoint}"));
        self.call("NetworkDriver.Join", &with("SandboxKey", sandbox), &mut up)?;
        self.call("NetworkDriver.EndpointOperInfo", &ids, &mut up)?;
        self.call("NetworkDriver.Leave", &ids, &mut down)?;
        self.call("NetworkDriver.DeleteEndpoint", &ids, &mut down)?;
        for (pool, address) in self.pools.iter().zip(&addresses) {
            let address = address.split('/').next().unwrap_or_default();
            self.call("IpamDriver.ReleaseAddress", &json!({ "PoolID": pool, "Address": address }), &mut down)?;
        }
        Ok((up, down))
    }
}

/// A stack whose service `web` has a virtual address, and a container on each host that keeps the network there.
fn stack(replicas: usize) -> String {
    STACK.replace("REPLICAS", &replicas.to_string())
}

const STACK: &str = "services:
  web:
    image: busybox
    command: sleep 86400
    stop_grace_period: 0s
    deploy: {replicas: REPLICAS, x-skein: {drain: 0s}}
  everywhere:
    image: busybox
    command: sleep 86400
    deploy: {mode: global, endpoint_mode: dnsrr}
";

/// Brings the stack to so many replicas, and waits until they run.
fn scale(rig: &Rig, replicas: usize) -> Result<()> {
    let cluster = rig.cluster();
    let file = cluster.compose_file("vip", &stack(replicas))?;
    cluster.stack_up("vip", &file).map(drop)
}

/// Starts the service whose virtual address [`vip_change_ms`] changes, and answers the fabrics of its network.
pub(super) fn vip_service(rig: &Rig) -> Result<Vec<Place>> {
    scale(rig, 2)?;
    let id = network_id(rig, "vip_default")?;
    Ok(fabrics(rig, &id))
}

fn network_id(rig: &Rig, name: &str) -> Result<String> {
    let shown = rig.cluster().json(&["network", "inspect", name])?;
    Ok(shown["id"].as_str().with_context(|| format!("network {name} has no id"))?.to_owned())
}

fn fabrics(rig: &Rig, network: &str) -> Vec<Place> {
    let path = format!("/run/skein/netns/sk-{network}");
    rig.hosts().map(|host| Place::pinned(host, &path)).into()
}

/// How many backends stand in a fabric's map.
fn backends(fabric: &Place) -> Result<usize> {
    let text = run(fabric.command("nft").args(["-j", "list", "map", "inet", "skein", "backends4"]))?;
    let listed: Value = serde_json::from_str(&text).context("nft printed no JSON")?;
    let maps =
        listed["nftables"].as_array().into_iter().flatten().filter_map(|object| object["map"]["elem"].as_array());
    Ok(maps.map(Vec::len).sum())
}

/// From the command that takes one of two backends away until no fabric leads to it any more, in milliseconds. Puts it
/// back and waits for that.
pub(super) fn vip_change_ms(rig: &Rig, fabrics: &[Place]) -> Result<f64> {
    let all = |wanted: usize| -> Result<()> {
        for fabric in fabrics {
            wait_for("the virtual address to change", PATIENCE, || Ok((backends(fabric)? == wanted).then_some(())))?;
        }
        Ok(())
    };
    all(2)?;
    let began = Instant::now();
    let took = std::thread::scope(|scope| {
        let command = scope.spawn(|| scale(rig, 1));
        let changed = all(1).map(|()| began.elapsed());
        command.join().unwrap_or_else(|_| anyhow::bail!("the thread of the command panicked"))?;
        changed
    })?;
    scale(rig, 2)?;
    all(2)?;
    Ok(took.as_secs_f64() * 1e3)
}

/// What is done while nothing happens.
pub(super) struct AtRest {
    /// Changes that the kernel told of in the network's fabrics.
    pub(super) changes: f64,
    /// CPU of both agents, in percent of a core.
    pub(super) agents_percent: f64,
}

/// Looks on for ten seconds.
pub(super) fn at_rest(rig: &Rig) -> Result<AtRest> {
    let fabrics = fabrics(rig, &network_id(rig, NETWORK)?);
    let seconds = AT_REST.as_secs().to_string();
    let watch = |fabric: &Place| {
        let mut command = fabric.command("timeout");
        command.args([&seconds, "ip", "monitor", "link", "address", "route", "neigh", "nexthop"]);
        // It ends by the time limit, so its exit code says nothing.
        command.output().context("failed to start ip monitor").map(|output| output.stdout)
    };
    let before = agents_ticks(rig)?;
    let texts: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = fabrics.iter().map(|fabric| scope.spawn(|| watch(fabric))).collect();
        threads.into_iter().map(|thread| thread.join().expect("the thread of a command does not panic")).collect()
    });
    let mut changes = 0;
    for text in texts {
        changes += String::from_utf8_lossy(&text?).lines().count();
    }
    let ticks = agents_ticks(rig)? - before;
    #[allow(clippy::cast_precision_loss, reason = "a few lines")]
    Ok(AtRest { changes: changes as f64, agents_percent: ticks / AT_REST.as_secs_f64() })
}

/// CPU time of both agents in ticks of 10 ms (proc(5), `/proc/pid/stat`).
fn agents_ticks(rig: &Rig) -> Result<f64> {
    let mut all = 0.0;
    for host in rig.hosts() {
        let pid = rig.cluster().process(host.name(), "skein-agent")?.id().pid;
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The program's name may hold spaces; what follows its last parenthesis does not.
        let rest = text.rsplit_once(')').context("not a stat line")?.1;
        let times = rest.split_ascii_whitespace().skip(11).take(2);
        all += times.filter_map(|word| word.parse::<f64>().ok()).sum::<f64>();
    }
    Ok(all)
}

//! Two containers on two hosts that nobody may disturb, and the probes between them.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::{
    cluster::{Cluster, PATIENCE},
    lab::{
        Host, Lab,
        probe::{Place, Probe, Report, Request},
        wait_for,
    },
};

use super::support::{Checks, container, inspect};

/// The published port of `b`, on h2.
const PORT: u16 = 8080;

/// Where packets are echoed, in the container.
const ECHO_PORT: u16 = 49_007;

/// A thousand packets in a second: a gap of a few milliseconds shows.
const PACKET_EVERY: Duration = Duration::from_millis(1);

/// A request is a connection of its own, and most of what it costs is on this machine's two cores.
const REQUEST_EVERY: Duration = Duration::from_millis(10);

/// Serves the name of its host.
const SERVE: &str = "mkdir -p /www; hostname > /www/index.html; exec httpd -f -p 80 -h /www";

/// `a` on h1 and `b` on h2, container tasks: no service replaces them, so they stay what they are whatever happens to a
/// node. Packets go from one to the other through the overlay, requests from h1 to the published port.
pub(crate) struct Watched {
    hosts: [Host; 2],
    ids: [String; 2],
    before: [String; 2],
    packets: Probe,
    requests: Probe,
}

impl Watched {
    /// Starts both, and waits until they reach each other.
    pub(crate) fn start(lab: &Lab, cluster: &Cluster<'_>) -> Result<Self> {
        cluster.skein(&["network", "create", "mesh"])?;
        let run = |name: &str, host: &str, more: &[&str]| -> Result<Value> {
            let constraint = format!("node.labels.host=={host}");
            let flags = ["run", "-d", "--name", name, "--hostname", name, "--network", "mesh", "--restart", "always"];
            let image = ["--constraint", &constraint, "busybox", "sh", "-c", SERVE];
            cluster.skein(&[&flags[..], more, &image[..]].concat())?;
            cluster.wait_for_running(name)
        };
        let published = format!("{PORT}:80");
        let tasks = [run("a", "h1", &[])?, run("b", "h2", &["-p", &published])?];
        let ids = [container(&tasks[0])?.to_owned(), container(&tasks[1])?.to_owned()];
        let hosts = [lab.host("h1").clone(), lab.host("h2").clone()];
        let before = [seen(&hosts[0], &ids[0])?, seen(&hosts[1], &ids[1])?];
        let places = [Place::container(&hosts[0], &ids[0])?, Place::container(&hosts[1], &ids[1])?];
        let overlay = address(&hosts[1], &ids[1])?;
        let published = SocketAddr::from((hosts[1].ipv4(), PORT));
        let get = Request::get("/");
        wait_for("b to be reached", PATIENCE, || {
            let overlay = get.send(&places[0], SocketAddr::new(overlay, 80));
            let published = get.send(&Place::host(&hosts[0]), published);
            Ok([overlay, published].iter().all(|r| r.as_ref().is_ok_and(|t| t.trim() == "b")).then_some(()))
        })?;
        let packets = Probe::packets(&places[0], &places[1], SocketAddr::new(overlay, ECHO_PORT), PACKET_EVERY)?;
        let requests = Probe::requests(&Place::host(&hosts[0]), published, get, REQUEST_EVERY)?;
        Ok(Self { hosts, ids, before, packets, requests })
    }

    /// What the probes saw since then: packets, requests. Waits until that is known.
    pub(crate) fn since(&self, from: Instant) -> [(&'static str, Report); 2] {
        let now = Instant::now();
        [("packets", self.packets.window(from, now)), ("requests", self.requests.window(from, now))]
    }

    /// Notes a failure if anything was lost since then, or nothing was sent.
    pub(crate) fn lost_nothing(&self, checks: &mut Checks, name: &str, from: Instant) {
        for (what, report) in self.since(from) {
            checks.ensure(&format!("{name}: no {what} lost"), report.lost == 0 && report.answered > 0, &report);
        }
    }

    /// The containers are the same, and were not restarted.
    pub(crate) fn untouched(&self) -> Result<()> {
        for ((host, id), before) in self.hosts.iter().zip(&self.ids).zip(&self.before) {
            let now = seen(host, id)?;
            ensure!(now == *before, "container on {}: {before} became {now}", host.name());
        }
        Ok(())
    }

    /// Ends the probes and says what they saw in all: packets, requests.
    pub(crate) fn stop(self) -> [Report; 2] {
        [self.packets.stop(), self.requests.stop()]
    }
}

/// What tells whether a container was touched. Of this one alone: others may be on their way out.
fn seen(host: &Host, id: &str) -> Result<String> {
    inspect(host, &[id]).with_context(|| format!("container {id} is gone from {}", host.name()))
}

/// Its address in the overlay, which is its only network.
fn address(host: &Host, id: &str) -> Result<IpAddr> {
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = host.docker(&["inspect", "-f", format, id])?;
    address.parse().with_context(|| format!("{address:?} is no address"))
}

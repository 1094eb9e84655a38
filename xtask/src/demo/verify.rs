//! What the demo claims, each looked at with another tool than the one that did it.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cluster::{Cluster, PATIENCE},
    lab::{
        Lab,
        probe::{Place, Probe, Report, Request},
        wait_for,
    },
};

/// Port that the compose file publishes.
const PORT: u16 = 8080;

/// Packets that show that traffic goes by the overlay.
const PACKETS: usize = 10;

/// How long what was killed stays away, under load: long enough for everybody to notice.
const AWAY: Duration = Duration::from_secs(1);

/// One claim, and what was seen of it.
pub(super) struct Check {
    /// The claim.
    pub(super) what: &'static str,
    /// What was seen, or what was wrong.
    pub(super) result: Result<String>,
}

struct Demo<'a> {
    lab: &'a Lab,
    cluster: &'a Cluster<'a>,
}

/// Looks at every claim; one that fails does not keep the others from being looked at.
pub(super) fn all(lab: &Lab, cluster: &Cluster<'_>) -> Vec<Check> {
    let demo = Demo { lab, cluster };
    let check = |what, result| Check { what, result };
    vec![
        check("a row written through the application is in the database", demo.row()),
        check("application and database are on different hosts, where their labels say", demo.placed()),
        check("packets between them are VXLAN on the underlay", demo.encapsulated()),
        check("both agents killed under load: no request lost, no container restarted", demo.agents_killed()),
        check("master killed under load: no request lost, no container restarted", demo.master_killed()),
    ]
}

impl Demo<'_> {
    fn client(&self) -> Place {
        Place::host(self.cluster.master())
    }

    /// The application's published port, on the host that runs it.
    fn app(&self) -> Result<SocketAddr> {
        let task = self.cluster.task("shop_app.1")?;
        let node = self.cluster.node_name(&task["node"])?;
        Ok(SocketAddr::from((self.lab.host(&node).ipv4(), PORT)))
    }

    fn row(&self) -> Result<String> {
        let text = format!("written by process {}", std::process::id());
        let body = serde_json::json!({ "text": text }).to_string();
        let answer: Value = serde_json::from_str(&Request::post("/rows", body).send(&self.client(), self.app()?)?)?;
        let id = answer["id"].as_i64().with_context(|| format!("the application gave no id: {answer}"))?;
        let query = format!("select text from demo_rows where id = {id}");
        let found = self.cluster.skein(&["exec", "shop_db.1", "--", "psql", "-U", "postgres", "-tAc", &query])?;
        ensure!(found.trim() == text, "psql in the database's container found {found:?}");
        Ok(format!("psql in shop_db.1 finds row {id}"))
    }

    fn placed(&self) -> Result<String> {
        let node = |task: &str| -> Result<String> { self.cluster.node_name(&self.cluster.task(task)?["node"]) };
        let (app, db) = (node("shop_app.1")?, node("shop_db.1")?);
        ensure!(app == "h1" && db == "h2", "application on {app}, database on {db}");
        Ok(format!("application on {app} (instance=java, 2 GiB), database on {db} (instance=db, 512 MiB)"))
    }

    /// On the database's host: the packets come as VXLAN, and none to the database's port comes bare.
    fn encapsulated(&self) -> Result<String> {
        let host = self.lab.host("h2");
        let vxlan = host.capture("udp port 4789")?;
        let bare = host.capture("tcp port 5432")?;
        for _ in 0..PACKETS {
            Request::get("/rows").send(&self.client(), self.app()?)?;
        }
        vxlan.wait_for(PACKETS, PATIENCE)?;
        let lines = vxlan.lines()?;
        let inner = lines.iter().find(|line| line.contains("5432"));
        let inner = inner.context("no VXLAN packet carries the database's port")?;
        ensure!(bare.lines()?.is_empty(), "packets to the database's port go bare on the underlay");
        Ok(format!("{} packets, such as {}", lines.len(), inner.trim()))
    }

    /// What the engines say of the two containers: id, start time, restarts.
    fn containers(&self) -> Result<Vec<String>> {
        let container = |host: &str, task: &str| -> Result<String> {
            let task = self.cluster.task(task)?;
            let id = task["status"]["container_id"].as_str().context("the task has no container")?;
            self.lab.host(host).docker(&["inspect", "-f", "{{.Id}} {{.State.StartedAt}} {{.RestartCount}}", id])
        };
        Ok(vec![container("h1", "shop_app.1")?, container("h2", "shop_db.1")?])
    }

    /// Disturbs the cluster under load and expects that nobody noticed.
    fn undisturbed(&self, disturb: impl FnOnce() -> Result<()>) -> Result<String> {
        let before = self.containers()?;
        let write = Request::post("/rows", r#"{"text":"load"}"#);
        let load = Probe::requests(&self.client(), self.app()?, write, Duration::ZERO)?;
        let disturbed = disturb();
        let report = load.stop();
        disturbed?;
        ensure!(report.lost == 0, "requests were lost: {report}");
        let Report { answered, slowest, .. } = report;
        ensure!(answered > 0, "no request was made");
        ensure!(self.containers()? == before, "a container was restarted");
        Ok(format!("{answered} requests, 0 lost, slowest {} ms", slowest.as_millis()))
    }

    fn agents_killed(&self) -> Result<String> {
        self.undisturbed(|| {
            let sessions = self.sessions()?;
            for host in ["h1", "h2"] {
                self.cluster.process(host, "skein-agent")?.signal(Signal::SIGKILL)?;
            }
            std::thread::sleep(AWAY);
            for host in ["h1", "h2"] {
                self.cluster.start_agent(host)?;
            }
            // Both have new sessions, and what they report is what the master knew.
            wait_for("both agents to be back", PATIENCE, || Ok((self.sessions()? >= sessions + 2).then_some(())))?;
            self.cluster.wait_for_nodes(3)
        })
    }

    /// Sessions that the master has seen beginning, by its log.
    fn sessions(&self) -> Result<usize> {
        let log = self.cluster.process(crate::lab::MASTER, "skein-master")?.log()?;
        Ok(log.lines().filter(|line| line.contains("session opened")).count())
    }

    fn master_killed(&self) -> Result<String> {
        self.undisturbed(|| {
            self.cluster.process(crate::lab::MASTER, "skein-master")?.kill()?;
            std::thread::sleep(AWAY);
            self.cluster.start_master()?;
            self.cluster.wait_for_nodes(3)
        })
    }
}

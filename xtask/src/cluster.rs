//! A real cluster in a lab: `skein-master` on the master host, `skein-agent` on each host with an engine.
//!
//! Owns where their state is and how they are started, killed and asked. Used by the demo and by the end-to-end tests.
//! The programs are those that were built beside this one; nothing here knows what they do inside.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::lab::{Host, Lab, Process, Spawn, wait_for};

/// Programs that a cluster consists of, and the demo's application.
pub const PROGRAMS: [&str; 4] = ["skein", "skein-master", "skein-agent", "demo-app"];

/// Nothing in a lab takes longer on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Port of the master.
const PORT: u16 = 7440;

/// A program of this workspace, as it was built beside this one.
///
/// # Errors
/// When it was not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("failed to find this program")?;
    // Tests are in target/<profile>/deps, programs one level up.
    let dirs = me.ancestors().skip(1).take(2);
    let found = dirs.map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("failed to find program {name}; hint: cargo build --workspace --bins"))
}

/// How a host takes part.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// Labels of the agent's configuration.
    pub labels: Vec<(String, String)>,
    /// Memory that it offers, such as `512MiB`; enforced by its containers' parent cgroup.
    pub memory: Option<String>,
    /// Whether the overlay has its fast path; `None` leaves that to the agent.
    pub fast_path: Option<bool>,
    /// Ids of generic resources by kind.
    pub generic: Vec<(String, Vec<String>)>,
}

impl NodeOptions {
    /// A host with one label.
    pub fn label(key: &str, value: &str) -> Self {
        Self { labels: vec![(key.to_owned(), value.to_owned())], ..Self::default() }
    }

    /// The same with an offer of memory.
    #[must_use]
    pub fn memory(self, memory: &str) -> Self {
        Self { memory: Some(memory.to_owned()), ..self }
    }

    /// The same with generic resources of one more kind.
    #[must_use]
    pub fn generic(mut self, kind: &str, ids: &[&str]) -> Self {
        self.generic.push((kind.to_owned(), ids.iter().map(|id| (*id).to_owned()).collect()));
        self
    }
}

/// A cluster in a lab.
#[derive(Debug)]
pub struct Cluster<'a> {
    lab: &'a Lab,
}

impl<'a> Cluster<'a> {
    /// The cluster of a lab; nothing is started.
    pub fn of(lab: &'a Lab) -> Self {
        Self { lab }
    }

    /// Starts a master and waits until it answers.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn start_master(&self) -> Result<Process> {
        let host = self.master();
        let data = host.dir().join("skein-master");
        let spawn = Spawn::new(program("skein-master")?).arg("--data-dir").arg(data);
        let spawn = spawn.arg("--socket").arg(self.socket()).env("RUST_LOG", "info");
        let process = host.spawn(spawn)?;
        self.wait_for_master().with_context(|| process.log_tail())?;
        Ok(process)
    }

    /// Waits until the master answers.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_for_master(&self) -> Result<()> {
        wait_for("the master to answer", PATIENCE, || Ok(self.skein(&["info"]).is_ok().then_some(())))
    }

    /// The host of the master.
    pub fn master(&self) -> &'a Host {
        self.lab.host(crate::lab::MASTER)
    }

    /// The master's socket: below its host's directory, so that it has the same path inside and outside.
    pub fn socket(&self) -> PathBuf {
        self.master().dir().join("skein.sock")
    }

    /// The running process of that name on a host.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, host: &str, name: &str) -> Result<Process> {
        let found = self.lab.host(host).process(name)?;
        found.with_context(|| format!("no process {name} on host {host}"))
    }

    /// Address that agents dial.
    pub fn master_address(&self) -> String {
        format!("{}:{PORT}", self.master().ipv4())
    }

    /// A command line of `skein` against this master.
    ///
    /// # Errors
    /// When the program was not built.
    pub fn skein_command(&self) -> Result<Command> {
        let mut command = Command::new(program("skein")?);
        command.arg("--host").arg(format!("unix://{}", self.socket().display()));
        command.env("NO_COLOR", "1").env_remove("SKEIN_HOST").stdin(std::process::Stdio::null());
        Ok(command)
    }

    /// Runs `skein` and returns its standard output.
    ///
    /// # Errors
    /// It does not exit with 0; with what it said.
    pub fn skein(&self, args: &[&str]) -> Result<String> {
        let output = self.skein_command()?.args(args).output().context("failed to start skein")?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "skein {} failed ({})\n{stdout}{stderr}", args.join(" "), output.status);
        Ok(stdout.into_owned())
    }

    /// Runs `skein … -o json`.
    ///
    /// # Errors
    /// As [`Cluster::skein`], and when it does not print JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.skein(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("skein {} printed no JSON: {text}", args.join(" ")))
    }

    /// Runs `skein` expecting a failure; returns its exit code and what it said on standard error.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn skein_fails(&self, args: &[&str]) -> Result<(i32, String)> {
        let output = self.skein_command()?.args(args).output().context("failed to start skein")?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            bail!("skein {} succeeded: {}", args.join(" "), String::from_utf8_lossy(&output.stdout));
        }
        Ok((output.status.code().unwrap_or(-1), stderr))
    }

    /// A new join token.
    ///
    /// # Errors
    /// As [`Cluster::json`].
    pub fn token(&self, args: &[&str]) -> Result<String> {
        let created = self.json(&[&["token", "create"], args].concat())?;
        let token = created["token"].as_str().context("no token in the answer")?;
        Ok(token.to_owned())
    }

    /// Writes a host's agent configuration and returns its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, host: &str, options: &NodeOptions) -> Result<PathBuf> {
        let host = self.lab.host(host);
        let mut text = format!("state_dir = \"{}\"\n", host.dir().join("skein-agent").display());
        text.push_str(&format!("cgroup_parent = \"/skein-lab/{}/{}/containers\"\n", self.lab.name(), host.name()));
        if let Some(on) = options.fast_path {
            text.push_str(&format!("fast_path = {on}\n"));
        }
        if let Some(memory) = &options.memory {
            text.push_str(&format!("offer = {{ memory = \"{memory}\" }}\n"));
        }
        text.push_str("[labels]\n");
        for (key, value) in &options.labels {
            text.push_str(&format!("{key:?} = {value:?}\n"));
        }
        text.push_str("[generic]\n");
        for (kind, ids) in &options.generic {
            text.push_str(&format!("{kind:?} = {ids:?}\n"));
        }
        let path = host.dir().join("agent.toml");
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path)
    }

    /// A command line of `skein-agent` on a host, with its configuration.
    ///
    /// # Errors
    /// When the program was not built.
    pub fn agent_command(&self, host: &str) -> Result<Command> {
        let host = self.lab.host(host);
        let mut command = host.command(program("skein-agent")?);
        command.arg("--config").arg(host.dir().join("agent.toml"));
        Ok(command)
    }

    /// Makes a host a node, and starts its agent.
    ///
    /// # Errors
    /// With what the agent said.
    pub fn join(&self, host: &str, token: &str, options: &NodeOptions) -> Result<Process> {
        self.configure(host, options)?;
        let mut command = self.agent_command(host)?;
        let address = self.master_address();
        let output = command.args(["join", "--master", &address, "--token", token]).output()?;
        ensure!(output.status.success(), "failed to join {host}: {}", String::from_utf8_lossy(&output.stderr));
        self.start_agent(host)
    }

    /// Starts a host's agent. Does not wait.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&self, host: &str) -> Result<Process> {
        let host = self.lab.host(host);
        let spawn = Spawn::new(program("skein-agent")?)
            .arg("--config")
            .arg(host.dir().join("agent.toml"))
            .arg("run")
            .env("RUST_LOG", "info")
            .plugin_socket()
            .fd_store("skein-agent");
        host.spawn(spawn)
    }

    /// Starts a master and joins every host with an engine; waits until all are ready.
    ///
    /// # Errors
    /// The first failure.
    pub fn up(lab: &'a Lab, options: impl Fn(&str) -> NodeOptions) -> Result<Self> {
        let cluster = Self::of(lab);
        cluster.start_master()?;
        let hosts: Vec<&Host> = lab.engines().collect();
        let token = cluster.token(&["--uses", &hosts.len().to_string()])?;
        for host in &hosts {
            cluster.join(host.name(), &token, &options(host.name()))?;
        }
        cluster.wait_for_nodes(hosts.len())?;
        Ok(cluster)
    }

    /// Waits until this many nodes are ready.
    ///
    /// # Errors
    /// They are not.
    pub fn wait_for_nodes(&self, count: usize) -> Result<()> {
        wait_for(&format!("{count} ready nodes"), PATIENCE, || {
            let nodes = self.json(&["node", "ls"])?;
            let ready = nodes.as_array().into_iter().flatten().filter(|n| n["status"]["state"] == "ready").count();
            Ok((ready == count).then_some(()))
        })
        .with_context(|| self.lab.logs(20))
    }

    /// All tasks, ended ones too.
    ///
    /// # Errors
    /// As [`Cluster::json`].
    pub fn tasks(&self) -> Result<Vec<Value>> {
        let tasks = self.json(&["ps", "--all"])?;
        Ok(tasks.as_array().cloned().unwrap_or_default())
    }

    /// The live task of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn task(&self, name: &str) -> Result<Value> {
        let tasks = self.tasks()?;
        let wanted = tasks.iter().filter(|t| t["name"] == name && t["desired_state"] == "running");
        // One that ended is wanted to run for as long as it is listed, beside its replacement.
        let ended = |t: &&Value| {
            let state = t["status"]["state"].as_str().unwrap_or_default();
            ["complete", "shutdown", "failed", "rejected", "orphaned"].contains(&state)
        };
        wanted.min_by_key(ended).cloned().with_context(|| format!("no live task {name}"))
    }

    /// Waits until a task of that name runs, and returns it.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_for_running(&self, name: &str) -> Result<Value> {
        wait_for(&format!("task {name} to run"), PATIENCE, || {
            Ok(self.task(name).ok().filter(|t| t["status"]["state"] == "running"))
        })
        .with_context(|| format!("{}\n{}", self.skein(&["ps", "--all"]).unwrap_or_default(), self.lab.logs(20)))
    }

    /// Name of the node with that id.
    ///
    /// # Errors
    /// There is none.
    pub fn node_name(&self, id: &Value) -> Result<String> {
        let nodes = self.json(&["node", "ls"])?;
        let found = nodes.as_array().into_iter().flatten().find(|n| n["id"] == *id);
        Ok(found.and_then(|n| n["name"].as_str()).with_context(|| format!("no node {id}"))?.to_owned())
    }

    /// Writes a compose file into a directory of its own below the lab's and returns its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn compose_file(&self, stack: &str, text: &str) -> Result<PathBuf> {
        let dir = self.lab.dir().join("compose").join(stack);
        fs::create_dir_all(&dir)?;
        let path = dir.join("docker-compose.yml");
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Applies a compose file under a stack's name and waits until it runs.
    ///
    /// # Errors
    /// With what `skein up` said.
    pub fn stack_up(&self, stack: &str, file: &Path) -> Result<String> {
        self.skein(&["up", "-f", &file.display().to_string(), "-p", stack, "--yes"]).with_context(|| self.lab.logs(40))
    }
}

//! A real master and a fleet of agents, as processes: started, killed, asked and measured.
//!
//! Owns both processes and their directory; dropping it ends and removes them. Used by the benchmark and by the tests at
//! a reduced size. No lab and no privileges: the agents' engines are models, everything is on the loopback.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use skein_api::{
    ContainerSpec, NodeUpdate, ResourceRequirements, Resources, ServiceMode, ServiceSpec, StackApply, StackSpec,
    TaskSpec, TokenCreate,
    client::{Client, ClientError},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Addresses that agents dial: one local port range for each, since a fleet uses more ports than one range has.
const ADDRESSES: u8 = 8;

/// Pause between two looks at the fleet.
const POLL: Duration = Duration::from_millis(20);

/// How long a master may take to answer after its start: it reads and verifies its store.
const START_WITHIN: Duration = Duration::from_secs(60);

/// What the fleet counted (`skein_fleet::fleet::Status`).
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Status {
    /// Agents that have joined.
    pub joined: usize,
    /// Sessions that stand.
    pub sessions: usize,
    /// Tasks that run and whose master has confirmed it.
    pub running: usize,
    /// Reports sent.
    pub reports: usize,
    /// Why sessions and joins failed, and how often.
    pub failures: std::collections::BTreeMap<String, usize>,
}

/// What users of the API do (`skein-fleet users`).
#[derive(Clone, Debug)]
pub struct Users {
    /// Connections that ask one thing after the other.
    pub readers: usize,
    /// Questions of all of them together.
    pub gets: usize,
    /// What they ask for, in turn.
    pub paths: Vec<String>,
    /// Connections that read events meanwhile.
    pub watchers: usize,
    /// Connections that ask for all tasks and do not read the answer.
    pub stuck: usize,
}

/// What came of it (`skein_fleet::users::Outcome`).
#[derive(Clone, Debug, Deserialize)]
pub struct UsersOutcome {
    /// Answers, all of them good.
    pub answers: usize,
    /// Seconds until the last.
    pub seconds: f64,
    /// Milliseconds for one answer: half of them took at most this.
    pub median_ms: f64,
    /// Milliseconds of the slowest.
    pub slowest_ms: f64,
    /// Bytes of events that all watchers read.
    pub event_bytes: u64,
    /// Connections that did not read and were cut.
    pub cut: usize,
}

/// The programs of a rig.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `skein-master`.
    pub master: PathBuf,
    /// `skein-fleet`.
    pub fleet: PathBuf,
}

/// A master and its fleet.
#[derive(Debug)]
pub struct Rig {
    dir: TempDir,
    programs: Programs,
    port: u16,
    client: Client,
    runtime: Runtime,
    master: Option<Child>,
    fleet: Child,
    fleet_stdin: ChildStdin,
    fleet_stdout: BufReader<ChildStdout>,
}

/// A program's process that does not outlive a failed start of the rig.
struct Guard(Option<Child>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start_master(programs: &Programs, dir: &Path, port: u16) -> Result<Child> {
    let log = fs::File::options().create(true).append(true).open(dir.join("master.log"))?;
    Command::new(&programs.master)
        .arg("--data-dir")
        .arg(dir.join("store"))
        .arg("--socket")
        .arg(dir.join("master.sock"))
        .args(["--listen", &format!("[::]:{port}")])
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("failed to start {}", programs.master.display()))
}

impl Rig {
    /// Starts a master with an empty store, and a fleet without agents that may join it `hosts_max` times.
    ///
    /// # Errors
    /// A program does not start.
    pub fn start(programs: Programs, hosts_max: u32) -> Result<Self> {
        let dir = tempfile::tempdir().context("failed to make a directory")?;
        // Taken and given back: nothing else on this machine asks for this one within the next second.
        let port = TcpListener::bind("[::]:0")?.local_addr()?.port();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = Client::unix(dir.path().join("master.sock")).with_request_timeout(Duration::from_secs(120));
        let mut master = Guard(Some(start_master(&programs, dir.path(), port)?));
        answers(&runtime, &client)?;
        let token = TokenCreate { uses: hosts_max, ttl_s: 24 * 3_600, ..TokenCreate::default() };
        let token = runtime.block_on(client.token_create(&token))?.token;
        let mut command = Command::new(&programs.fleet);
        command.args(["agents", "--token", &token]).stdin(Stdio::piped()).stdout(Stdio::piped());
        for at in 1..=ADDRESSES {
            command.args(["--master", &format!("127.0.0.{at}:{port}")]);
        }
        let mut fleet = command.spawn().with_context(|| format!("failed to start {}", programs.fleet.display()))?;
        let fleet_stdin = fleet.stdin.take().context("it was asked for a pipe")?;
        let fleet_stdout = BufReader::new(fleet.stdout.take().context("it was asked for a pipe")?);
        let master = master.0.take();
        Ok(Self { dir, programs, port, client, runtime, master, fleet, fleet_stdin, fleet_stdout })
    }

    /// Gives the fleet a command (see `skein-fleet`) and returns what it counted.
    ///
    /// # Errors
    /// The fleet does not know it, or has ended.
    pub fn tell(&mut self, command: &str) -> Result<Status> {
        writeln!(self.fleet_stdin, "{command}").context("the fleet has ended")?;
        let mut line = String::new();
        self.fleet_stdout.read_line(&mut line).context("the fleet has ended")?;
        serde_json::from_str(&line).with_context(|| format!("the fleet answered {command:?} with {line:?}"))
    }

    /// Waits until the fleet's counters are as they should be; how long it took.
    ///
    /// # Errors
    /// They are not within `within`; with the counters and the end of the master's log.
    pub fn wait(&mut self, what: &str, within: Duration, ready: impl Fn(&Status) -> bool) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let status = self.tell("status")?;
            if ready(&status) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > within {
                bail!("failed to see {what} within {within:?}: {status:?}\n{}", self.log_tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks the master over its socket.
    ///
    /// # Errors
    /// What the client says.
    pub fn ask<T, F: Future<Output = Result<T, ClientError>>>(&self, call: impl FnOnce(Client) -> F) -> Result<T> {
        Ok(self.runtime.block_on(call(self.client.clone()))?)
    }

    /// Applies the stack `name` with so many services of so many tasks each.
    ///
    /// # Errors
    /// The master refuses.
    pub fn apply(&self, name: &str, services: u32, replicas: u32) -> Result<()> {
        let apply = StackApply { stack: stack(name, services, replicas), ..StackApply::default() };
        self.ask(|client| async move { client.stack_apply(&apply).await })?;
        Ok(())
    }

    /// Lets many users at the API, and meanwhile changes a label of a host again and again: what the users saw, and how
    /// long each change took, seconds, the slowest last.
    ///
    /// # Errors
    /// A user got no answer, or the master refuses a change.
    pub fn users(&self, users: &Users) -> Result<(UsersOutcome, Vec<f64>)> {
        let mut command = Command::new(&self.programs.fleet);
        command.arg("users").arg("--socket").arg(self.dir.path().join("master.sock"));
        for (flag, count) in [
            ("--readers", users.readers),
            ("--gets", users.gets),
            ("--watchers", users.watchers),
            ("--stuck", users.stuck),
        ] {
            command.args([flag, &count.to_string()]);
        }
        for path in &users.paths {
            command.args(["--path", path]);
        }
        let child = command.stdout(Stdio::piped()).spawn().context("failed to start the users")?;
        let mut child = Guard(Some(child));
        let users = child.0.as_mut().context("just started")?;
        let mut changes = Vec::new();
        while users.try_wait()?.is_none() {
            let value = changes.len().to_string();
            let update = NodeUpdate { labels_add: [("changed".to_owned(), value)].into(), ..NodeUpdate::default() };
            let began = Instant::now();
            self.ask(|client| async move { client.node_update("fleet-00001", &update).await })?;
            changes.push(began.elapsed().as_secs_f64());
            std::thread::sleep(POLL);
        }
        changes.sort_by(f64::total_cmp);
        let output = child.0.take().context("just started")?.wait_with_output()?;
        ensure!(output.status.success(), "the users failed ({})", output.status);
        Ok((serde_json::from_slice(&output.stdout).context("the users printed no outcome")?, changes))
    }

    /// Kills the master with SIGKILL.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill_master(&mut self) -> Result<()> {
        if let Some(mut master) = self.master.take() {
            master.kill()?;
            master.wait()?;
        }
        Ok(())
    }

    /// Starts the master again, with the same store; returns when it answers.
    ///
    /// # Errors
    /// It does not.
    pub fn start_master(&mut self) -> Result<()> {
        self.master = Some(start_master(&self.programs, self.dir.path(), self.port)?);
        answers(&self.runtime, &self.client).with_context(|| self.log_tail())
    }

    /// CPU time of the master's process until now, all threads (`proc(5)`, fields 14 and 15 of `stat`).
    ///
    /// # Errors
    /// It does not run.
    pub fn master_cpu(&self) -> Result<Duration> {
        cpu(self.master_pid()?)
    }

    /// CPU time of the fleet's process until now.
    ///
    /// # Errors
    /// It does not run.
    pub fn fleet_cpu(&self) -> Result<Duration> {
        cpu(self.fleet.id())
    }

    /// Memory of the master's process now, and the most it had, KiB (`VmRSS` and `VmHWM` of `/proc/PID/status`).
    ///
    /// # Errors
    /// It does not run.
    pub fn master_memory_kib(&self) -> Result<(u64, u64)> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.master_pid()?))?;
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).context("not in the status")?;
            let number = line.split_ascii_whitespace().nth(1).context("no number")?;
            number.parse::<u64>().context("not a number")
        };
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// Bytes of the store's files.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn store_bytes(&self) -> Result<u64> {
        let files = fs::read_dir(self.dir.path().join("store"))?;
        files.map(|file| Ok(file?.metadata()?.len())).sum()
    }

    /// The last lines of the master's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.dir.path().join("master.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn master_pid(&self) -> Result<u32> {
        Ok(self.master.as_ref().context("the master does not run")?.id())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for child in self.master.iter_mut().chain([&mut self.fleet]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn answers(runtime: &Runtime, client: &Client) -> Result<()> {
    let began = Instant::now();
    loop {
        match runtime.block_on(client.info()) {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() > START_WITHIN => return Err(error).context("the master does not answer"),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn cpu(pid: u32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The program's name may hold spaces; what follows its last parenthesis does not.
    let rest = text.rsplit_once(')').context("not a stat line")?.1;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut ticks = || -> Result<u64> { Ok(fields.next().context("too few fields")?.parse()?) };
    let (user, system) = (ticks()?, ticks()?);
    /// `USER_HZ`: 100 on every architecture that the kernel has had since 2.6.
    const TICKS_PER_S: u64 = 100;
    Ok(Duration::from_millis((user + system) * 1_000 / TICKS_PER_S))
}

/// A stack of usual services: an image, some environment and labels, reservations; no networks, whose documents grow with
/// the hosts in them and are measured by themselves.
fn stack(name: &str, services: u32, replicas: u32) -> StackSpec {
    let environment = |i: u32| (format!("SETTING_{i}"), Some(format!("value of setting {i}")));
    let service = |number: u32| {
        let short_name = format!("s{number:03}");
        let container = ContainerSpec {
            image: "registry.example.com/team/service:1.27.4".to_owned(),
            env: (0..5).map(environment).collect(),
            labels: [("team".to_owned(), "load".to_owned()), ("tier".to_owned(), "web".to_owned())].into(),
            ..ContainerSpec::default()
        };
        let reservations = Resources { nano_cpus: 50_000_000, mem_bytes: 64 << 20 };
        let resources = ResourceRequirements { reservations, ..ResourceRequirements::default() };
        ServiceSpec {
            name: format!("{name}_{short_name}"),
            stack: Some(name.to_owned()),
            short_name,
            mode: ServiceMode::Replicated(replicas),
            task: TaskSpec { container, resources, ..TaskSpec::default() },
            ..ServiceSpec::default()
        }
    };
    StackSpec { name: name.to_owned(), services: (0..services).map(service).collect(), ..StackSpec::default() }
}

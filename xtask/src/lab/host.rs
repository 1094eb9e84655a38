//! One host of a lab, as tests and the demo use it: commands, processes and the engine inside it.
//!
//! A [`Host`] is a cheap handle; it owns nothing, and several programs may hold one for the same host. No tasks, no
//! channels.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::capture::Capture;
use super::control::{ProcessInfo, Request, Response, SpawnRequest, Status, call};
use super::engine::{self, ENGINE_SOCKET};
use super::process::{ProcessId, run, tail, wait_for};

/// Lines of a log that are worth showing in an error.
const LOG_TAIL_LINES: usize = 20;

/// How long an engine that was asked to stop may take: it stops its containers first, ten seconds each at most.
const ENGINE_STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A host of a lab that is up.
#[derive(Clone, Debug)]
pub struct Host {
    pub(super) lab: String,
    pub(super) name: String,
    pub(super) index: usize,
    pub(super) engine: bool,
    pub(super) ipv4: Ipv4Addr,
    pub(super) ipv6: Ipv6Addr,
    pub(super) dir: PathBuf,
    pub(super) holder: ProcessId,
    pub(super) engine_options: Vec<String>,
}

impl Host {
    /// Host name, also its name in every host's `/etc/hosts`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the lab it belongs to.
    #[must_use]
    pub fn lab(&self) -> &str {
        &self.lab
    }

    /// Whether it has an engine.
    #[must_use]
    pub fn has_engine(&self) -> bool {
        self.engine
    }

    /// Address on the underlay, prefix length 24.
    #[must_use]
    pub fn ipv4(&self) -> Ipv4Addr {
        self.ipv4
    }

    /// Address on the underlay, prefix length 64.
    #[must_use]
    pub fn ipv6(&self) -> Ipv6Addr {
        self.ipv6
    }

    /// Directory of the host, the same path inside and outside: logs, and room for state of what is tested. `down`
    /// removes it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The process that keeps the host's namespaces alive.
    #[must_use]
    pub fn holder(&self) -> ProcessId {
        self.holder
    }

    /// The path outside the host of a path inside it, above all below its private `/run`.
    #[must_use]
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.pid));
        root.join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// The engine's unix socket, as a path that works outside the host.
    #[must_use]
    pub fn engine_socket(&self) -> PathBuf {
        self.path(ENGINE_SOCKET)
    }

    /// A command that runs in the host's namespaces (network, mount, UTS, cgroup), as a child of the caller. Its
    /// working directory is `/`, so paths must be absolute.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.holder.pid.to_string());
        command.args(["--net", "--mount", "--uts", "--cgroup", "--"]).arg(program);
        for name in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "DOCKER_API_VERSION"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs a command line in the host to its end and returns its standard output.
    ///
    /// # Errors
    /// It cannot be started or does not exit with 0; with its standard error.
    pub fn run<S: AsRef<OsStr>>(&self, argv: &[S]) -> Result<String> {
        let Some((program, args)) = argv.split_first() else { bail!("failed to run nothing") };
        run(self.command(program).args(args)).with_context(|| format!("failed on host {}", self.name))
    }

    /// The `docker` command line against this host's engine.
    #[must_use]
    pub fn docker_command(&self) -> Command {
        let mut command = self.command("docker");
        command.arg("--host").arg(format!("unix://{ENGINE_SOCKET}"));
        command
    }

    /// Runs `docker` with these arguments to its end and returns its standard output, without the last line's end.
    ///
    /// # Errors
    /// It does not exit with 0; with its standard error.
    pub fn docker<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String> {
        let text =
            run(self.docker_command().args(args)).with_context(|| format!("failed on the engine of {}", self.name))?;
        Ok(text.trim_end().to_owned())
    }

    /// Starts a process as a child of the host: it goes on when the caller ends. Its output is appended to
    /// `<dir>/<name>.log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, spawn: Spawn) -> Result<Process> {
        let log = self.dir.join(format!("{}.log", spawn.name));
        let mut env = spawn.env;
        env.entry("HOME".to_owned()).or_insert_with(|| "/root".to_owned());
        let request = SpawnRequest {
            name: spawn.name,
            argv: spawn.argv,
            env,
            log: log.clone(),
            plugin_socket: spawn.plugin_socket,
            fd_store: spawn.fd_store,
        };
        match call(&self.dir, &Request::Spawn(request)).with_context(|| format!("failed on host {}", self.name))? {
            Response::Spawned { id } => Ok(Process { host_dir: self.dir.clone(), id, log }),
            other => bail!("failed to understand the answer {other:?}"),
        }
    }

    /// The processes that [`Host::spawn`] started, running and lately ended ones.
    ///
    /// # Errors
    /// The holder does not answer.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>> {
        match call(&self.dir, &Request::List)? {
            Response::Processes { processes } => Ok(processes),
            other => bail!("failed to understand the answer {other:?}"),
        }
    }

    /// The running process of this name that [`Host::spawn`] started last, if there is one.
    ///
    /// # Errors
    /// The holder does not answer.
    pub fn process(&self, name: &str) -> Result<Option<Process>> {
        let found = self.processes()?.into_iter().filter(|info| info.name == name && info.status == Status::Running);
        let newest = found.max_by_key(|info| info.id.start_ticks);
        Ok(newest.map(|info| Process { host_dir: self.dir.clone(), id: info.id, log: info.log }))
    }

    /// Starts the engine, if it does not run, and waits until it is ready.
    ///
    /// # Errors
    /// The host is to have no engine; or it does not become ready, with the end of its log.
    pub fn start_engine(&self) -> Result<()> {
        if !self.engine {
            bail!("failed to start an engine on {}: the host is to have none", self.name);
        }
        if self.engine_process()?.is_some_and(|process| process.is_running()) {
            return Ok(());
        }
        engine::start(self, &self.engine_options).map(drop)
    }

    /// Sends the engine a signal and waits for its end. `SIGTERM` stops it with its containers, `SIGKILL` is a crash:
    /// containers go on.
    ///
    /// # Errors
    /// It does not run, or does not end in time.
    pub fn stop_engine(&self, signal: Signal) -> Result<()> {
        let process = self
            .engine_process()?
            .with_context(|| format!("failed to stop the engine of {}: not running", self.name))?;
        process.signal(signal)?;
        match process.wait(ENGINE_STOP_TIMEOUT)? {
            Status::Running => {
                bail!("failed to stop the engine of {} with {signal} in {ENGINE_STOP_TIMEOUT:?}", self.name)
            }
            _ => Ok(()),
        }
    }

    fn engine_process(&self) -> Result<Option<Process>> {
        self.process(engine::PROCESS)
    }

    /// Whether the engine answers now.
    #[must_use]
    pub fn engine_answers(&self) -> bool {
        engine::ping(&self.engine_socket())
    }

    /// Records what passes the host's underlay interface, from now on. `filter` is one of `pcap-filter(7)`, such as
    /// `udp port 4789`; empty means everything.
    ///
    /// # Errors
    /// `tcpdump` does not start, with what it says.
    pub fn capture(&self, filter: &str) -> Result<Capture> {
        Capture::start(self, filter)
    }
}

/// What to start in a host.
#[derive(Clone, Debug)]
pub struct Spawn {
    name: String,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    plugin_socket: bool,
    fd_store: Option<String>,
}

impl Spawn {
    /// A program, found by its path or in the usual directories. It is known under its file name.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref().to_string_lossy().into_owned();
        let name = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self { name, argv: vec![program], env: BTreeMap::new(), plugin_socket: false, fd_store: None }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.argv.push(arg.as_ref().to_string_lossy().into_owned());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// A variable of its environment, which otherwise holds only `PATH`, `HOME` and `LANG`.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Another name than the program's, for the log file and [`Host::process`].
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Hands over the listening socket of the network plugin, as `sd_listen_fds(3)` says: descriptor 3,
    /// `LISTEN_FDS=1`, `LISTEN_PID` its own number, `LISTEN_FDNAMES=skein-plugin`. The socket is made for the first
    /// process that asks for it and then stays: connections made while no process has it wait in its queue.
    #[must_use]
    pub fn plugin_socket(mut self) -> Self {
        self.plugin_socket = true;
        self
    }

    /// Keeps descriptors for it, as systemd's file descriptor store does (sd_notify(3)): what it sends to
    /// `NOTIFY_SOCKET` with `FDSTORE=1` is handed over to the next process that is started for the same `service`,
    /// after the plugin's socket, until `FDSTOREREMOVE=1` or the end of the host. Starting a process again is what
    /// `systemctl restart` is: nothing is given up when one ends, in whatever way.
    #[must_use]
    pub fn fd_store(mut self, service: impl Into<String>) -> Self {
        self.fd_store = Some(service.into());
        self
    }
}

/// A process that [`Host::spawn`] started.
#[derive(Clone, Debug)]
pub struct Process {
    host_dir: PathBuf,
    id: ProcessId,
    log: PathBuf,
}

impl Process {
    /// Its identity.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.id.is_alive()
    }

    /// Sends it, and nothing below it, a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        call(&self.host_dir, &Request::Signal { pid: self.id.pid, signal: signal as i32 }).map(drop)
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// It has ended already.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        wait_for(&format!("process {} gone", self.id.pid), Duration::from_secs(10), || {
            Ok((!self.is_running()).then_some(()))
        })
    }

    /// Waits for its end; `Status::Running` when `timeout` came first.
    ///
    /// # Errors
    /// The holder does not answer.
    pub fn wait(&self, timeout: Duration) -> Result<Status> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        match call(&self.host_dir, &Request::Wait { pid: self.id.pid, timeout_ms })? {
            Response::Status { status } => Ok(status),
            other => bail!("failed to understand the answer {other:?}"),
        }
    }

    /// The file its output goes to; earlier processes of the same name wrote there too.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// All of its log file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| format!("failed to read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The last lines of its log file.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, LOG_TAIL_LINES)
    }

    /// Waits until its log file holds a text.
    ///
    /// # Errors
    /// It ends without having written it, or the time is over; with the end of the log.
    pub fn wait_for_log(&self, text: &str, timeout: Duration) -> Result<()> {
        wait_for(&format!("{text:?} in {}", self.log.display()), timeout, || {
            let running = self.is_running();
            if self.log()?.contains(text) {
                return Ok(Some(()));
            }
            if !running {
                bail!("failed to see {text:?} in {}: the process ended", self.log.display());
            }
            Ok(None)
        })
        .with_context(|| format!("the log ends with:\n{}", self.log_tail()))
    }
}

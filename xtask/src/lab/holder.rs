//! The process that is a host: it keeps the namespaces alive and is the parent of what runs in them.
//!
//! `xtask lab holder LAB HOST` is started by `lab up`, enters the host's network namespace, makes its mount, UTS and
//! cgroup namespaces, and then serves the control socket. It reaps what its children leave behind, as an init does,
//! but is *not* PID 1 of a PID namespace: an engine that is never reaps its shims and hangs after about a thousand
//! containers. Like systemd's socket activation it holds the listening socket of the agent's plugin, so that an
//! engine never finds it missing while an agent restarts. The socket is made for the first process that asks for it
//! and is kept from then on, not earlier: an engine (20.10) asks every plugin before it makes a named volume, and
//! waits without a limit for one that listens and never answers. `fdstore` keeps what else processes leave to it.
//!
//! Threads: `reaper` (collects ended children), one per connection (at most [`CONNECTIONS_MAX`]), those of `fdstore`,
//! and the main one, which accepts. They share the [`Table`] under one lock; no channels.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, sethostname, setsid};

use super::control::{PROTOCOL, ProcessInfo, Request, Response, SOCKET, SpawnRequest, Status, read_message};
use super::fdstore::{Inherited, Stores};
use super::process::{ProcessId, namespace};
use super::spec::{DataRoot, LabState, host_dir};
use super::{cgroup, engine, underlay};

/// Where an engine looks for the agent's network plugin.
pub const PLUGIN_SOCKET: &str = "/run/docker/plugins/skein.sock";

/// The name under which the plugin's socket is handed over (`LISTEN_FDNAMES`, `sd_listen_fds_with_names(3)`).
pub const PLUGIN_SOCKET_NAME: &str = "skein-plugin";

/// `PATH` of everything in a host. A holder gives its children nothing of the environment of who created the lab.
pub(super) const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Connections served at a time: a test waits for a few processes, never for dozens. More are refused.
const CONNECTIONS_MAX: usize = 64;

/// Ended processes that are remembered, for `wait` after the end.
const ENDED_MAX: usize = 256;

/// Where descriptors that are handed over begin (`SD_LISTEN_FDS_START`).
const LISTEN_FDS_START: usize = 3;

/// How long a client may take to send its line.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the holder of one host until it is killed.
///
/// # Errors
/// Names the step of the set-up that failed.
pub(super) fn run(lab: &str, host: &str) -> Result<()> {
    let state = LabState::load(lab)?.with_context(|| format!("failed to find lab {lab}"))?;
    let dir = host_dir(lab, host);
    let engine = state.spec.hosts.iter().any(|spec| spec.name == host && spec.engine);
    // Fails for the leader of a process group, which has no terminal to lose.
    let _ = setsid();
    let hierarchies = enter_namespaces(lab, host)?;
    mount_private(&dir, &state, host, engine, &hierarchies)?;
    sethostname(host).with_context(|| format!("failed to set the host name {host}"))?;
    prctl::set_child_subreaper(true).context("failed to become the reaper of the host")?;
    let control = listen(&dir.join(SOCKET))?;
    let shared = Arc::new(Shared {
        table: Mutex::new(Table::default()),
        changed: Condvar::new(),
        connections: AtomicUsize::new(0),
        plugin: OnceLock::new(),
        stores: Stores::default(),
    });
    let reaper = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("reaper".to_owned())
        .spawn(move || reaper.reap())
        .context("failed to start the reaper")?;
    for stream in control.incoming() {
        let stream = stream.context("failed to accept on the control socket")?;
        let server = Arc::clone(&shared);
        if server.connections.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            reply(&stream, &Response::Failed { error: format!("more than {CONNECTIONS_MAX} connections") });
            server.connections.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        std::thread::Builder::new()
            .name("connection".to_owned())
            .spawn(move || {
                server.serve(&stream);
                server.connections.fetch_sub(1, Ordering::SeqCst);
            })
            .context("failed to start a thread")?;
    }
    Ok(())
}

/// Returns the hierarchies as the machine has them: seen from inside, their roots lie outside.
fn enter_namespaces(lab: &str, host: &str) -> Result<cgroup::SeenHierarchies> {
    let path = underlay::netns_path(lab, host);
    let netns = File::open(&path).with_context(|| format!("failed to open {}", path.display()))?;
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).with_context(|| format!("failed to enter {}", path.display()))?;
    // Before the namespace is made: its root is where the process is then.
    cgroup::enter(lab, host)?;
    let hierarchies = cgroup::see()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWCGROUP)
        .context("failed to make mount, UTS and cgroup namespaces")?;
    Ok(hierarchies)
}

/// Gives the host its own `/run`, `/sys`, control groups, name files, and memory for its engine.
fn mount_private(
    dir: &Path,
    state: &LabState,
    host: &str,
    engine: bool,
    hierarchies: &cgroup::SeenHierarchies,
) -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("failed to separate the mounts of the host")?;
    // What is mounted below /run now would stay alive under the new mount: above all the namespaces of other labs.
    detach_below("/run")?;
    tmpfs("/run", "mode=755,size=256m")?;
    // Shows this namespace's devices in /sys/class/net.
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, none)
        .context("failed to mount /sys")?;
    // Not every kernel has it, and only programs that pin maps ask for it.
    let _ = mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::MS_NOSUID, none);
    cgroup::mount_private(hierarchies)?;
    for (name, text) in [
        ("resolv.conf", underlay::resolv_conf(state, host)),
        ("hostname", format!("{host}\n")),
        ("hosts", underlay::hosts_file(state)),
    ] {
        let source = dir.join(name);
        fs::write(&source, text).with_context(|| format!("failed to write {}", source.display()))?;
        bind_file(&source, &Path::new("/etc").join(name))?;
    }
    if engine {
        let data = engine::data_root(dir);
        fs::create_dir_all(&data).with_context(|| format!("failed to create {}", data.display()))?;
        if state.spec.data_root == DataRoot::Tmpfs {
            tmpfs(&data, "mode=711")?;
        }
    }
    Ok(())
}

fn tmpfs(target: impl AsRef<Path>, options: &str) -> Result<()> {
    let target = target.as_ref();
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options))
        .with_context(|| format!("failed to mount a tmpfs on {}", target.display()))
}

/// Detaches every mount at or below a directory, the youngest first.
pub(super) fn detach_below(dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    let text = fs::read_to_string("/proc/self/mountinfo").context("failed to read /proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| point.replace("\\040", " "));
    let mut below: Vec<PathBuf> = points.map(PathBuf::from).filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    for point in below {
        match umount2(&point, MntFlags::MNT_DETACH) {
            // Gone with the one above it.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => {
                return Err(e).with_context(|| format!("failed to unmount {}", point.display()));
            }
        }
    }
    Ok(())
}

/// Puts a file in the place of another one. A machine that lacks the file keeps lacking it: nothing is made outside
/// the host. A link into `/run` (resolv.conf of systemd-resolved) is followed to the host's own `/run`.
fn bind_file(source: &Path, target: &Path) -> Result<()> {
    if let Ok(link) = fs::read_link(target) {
        let mut real = PathBuf::new();
        for part in target.parent().unwrap_or(Path::new("/")).join(link).components() {
            match part {
                std::path::Component::ParentDir => drop(real.pop()),
                part => real.push(part),
            }
        }
        if real.starts_with("/run")
            && let Some(parent) = real.parent()
        {
            fs::create_dir_all(parent).with_context(|| format!("failed to create {}", parent.display()))?;
            fs::copy(source, &real).with_context(|| format!("failed to write {}", real.display()))?;
            return Ok(());
        }
    }
    let none: Option<&str> = None;
    match mount(Some(source), target, none, MsFlags::MS_BIND, none) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => {
            Err(e).with_context(|| format!("failed to put {} in place of {}", source.display(), target.display()))
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("failed to create {}", parent.display()))?;
    }
    let listener = UnixListener::bind(path).with_context(|| format!("failed to listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("failed to protect {}", path.display()))?;
    Ok(listener)
}

/// The children of the holder, by number.
#[derive(Default)]
struct Table {
    processes: BTreeMap<i32, ProcessInfo>,
    /// Ended ones, oldest first, at most [`ENDED_MAX`].
    ended: VecDeque<i32>,
}

struct Shared {
    table: Mutex<Table>,
    /// Told when a child was started or has ended.
    changed: Condvar,
    connections: AtomicUsize,
    /// The plugin's listening socket, once a process has asked for it.
    plugin: OnceLock<OwnedFd>,
    stores: Stores,
}

impl Shared {
    /// A thread that panicked left the table whole: every change of it is one insertion.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects ended children for ever, its own and those that were left to it.
    ///
    /// It looks first without collecting, then collects under the lock: `Command::spawn` itself waits for a child
    /// whose `exec` failed and panics if somebody else did.
    fn reap(&self) {
        loop {
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Ok(status) => {
                    let mut table = self.lock();
                    if let Some(pid) = status.pid()
                        && let Ok(status) = waitpid(pid, Some(WaitPidFlag::WNOHANG))
                    {
                        table.end(pid, status);
                        self.changed.notify_all();
                    }
                }
                Err(Errno::ECHILD) => {
                    // No child, hence no grandchild either: only a new one can change that.
                    let table = self.lock();
                    drop(self.changed.wait_timeout(table, Duration::from_millis(500)));
                }
                Err(_) => {}
            }
        }
    }

    fn serve(&self, stream: &UnixStream) {
        let answer = stream
            .set_read_timeout(Some(REQUEST_TIMEOUT))
            .context("failed to set a time limit")
            .and_then(|()| read_message(stream))
            .and_then(|request| self.answer(request));
        let response = answer.unwrap_or_else(|e| Response::Failed { error: format!("{e:#}") });
        reply(stream, &response);
    }

    fn answer(&self, request: Request) -> Result<Response> {
        match request {
            Request::Ping => {
                let holder = ProcessId::current()?;
                let mount_ns = namespace(holder.pid, "mnt").context("failed to read the mount namespace")?;
                Ok(Response::Pong { protocol: PROTOCOL, holder, mount_ns })
            }
            Request::Spawn(request) => Ok(Response::Spawned { id: self.spawn(request)? }),
            Request::Signal { pid, signal } => self.signal(pid, signal).map(|()| Response::Done),
            Request::Wait { pid, timeout_ms } => {
                Ok(Response::Status { status: self.wait(pid, Duration::from_millis(timeout_ms))? })
            }
            Request::List => Ok(Response::Processes { processes: self.lock().processes.values().cloned().collect() }),
        }
    }

    fn spawn(&self, request: SpawnRequest) -> Result<ProcessId> {
        let Some((program, args)) = request.argv.split_first() else { bail!("failed to start nothing") };
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&request.log)
            .with_context(|| format!("failed to open {}", request.log.display()))?;
        let log_too = log.try_clone().context("failed to share the log file")?;
        let mut handed_over: Vec<(String, OwnedFd)> = Vec::new();
        if request.plugin_socket {
            handed_over.push((PLUGIN_SOCKET_NAME.to_owned(), self.plugin_socket()?));
        }
        let mut notify = None;
        if let Some(service) = &request.fd_store {
            let (path, kept) = self.stores.open(service)?;
            notify = Some(path);
            handed_over.extend(kept);
        }
        // Descriptors that children inherit are there only while nobody else starts one.
        let mut table = self.lock();
        let mut inherited = Vec::new();
        let mut command = if handed_over.is_empty() {
            let mut command = Command::new(program);
            command.args(args);
            command
        } else {
            for (_, fd) in &handed_over {
                inherited.push(Inherited::try_new(fd)?);
            }
            let names: Vec<&str> = handed_over.iter().map(|(name, _)| name.as_str()).collect();
            let mut command = Command::new("/bin/bash");
            command.args(["-c", &hand_over(&inherited), "bash", program]).args(args);
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
            command
        };
        command.envs(notify.map(|path| ("NOTIFY_SOCKET", path)));
        command.stdin(Stdio::null()).stdout(log).stderr(log_too).envs(&request.env).process_group(0);
        let child = command.spawn().with_context(|| format!("failed to start {program}"))?;
        let pid = i32::try_from(child.id()).context("failed to represent the process number")?;
        // The child cannot be reaped before the lock is released, so its entry is there.
        let id = ProcessId::of(pid).with_context(|| format!("failed to read /proc/{pid}/stat"))?;
        let info =
            ProcessInfo { id, name: request.name, argv: request.argv, log: request.log, status: Status::Running };
        table.processes.insert(pid, info);
        self.changed.notify_all();
        Ok(id)
    }

    /// The lock keeps two callers from making the socket twice.
    fn plugin_socket(&self) -> Result<OwnedFd> {
        let _table = self.lock();
        if self.plugin.get().is_none() {
            let _ = self.plugin.set(listen(Path::new(PLUGIN_SOCKET))?.into());
        }
        let socket = self.plugin.get().context("failed to keep the plugin socket")?;
        socket.try_clone().context("failed to share the plugin socket")
    }

    fn signal(&self, pid: i32, signal: i32) -> Result<()> {
        let signal = nix::sys::signal::Signal::try_from(signal)
            .with_context(|| format!("failed to understand signal number {signal}"))?;
        let table = self.lock();
        match table.processes.get(&pid) {
            Some(info) if info.status == Status::Running => nix::sys::signal::kill(Pid::from_raw(pid), signal)
                .with_context(|| format!("failed to send {signal} to process {pid}")),
            Some(_) => bail!("failed to send {signal} to process {pid}: it has ended"),
            None => bail!("failed to send {signal} to process {pid}: not started by this host"),
        }
    }

    fn wait(&self, pid: i32, timeout: Duration) -> Result<Status> {
        let deadline = Instant::now() + timeout;
        let mut table = self.lock();
        loop {
            let Some(info) = table.processes.get(&pid) else {
                bail!("failed to wait for process {pid}: not started by this host")
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if info.status != Status::Running || left.is_zero() {
                return Ok(info.status);
            }
            table = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Table {
    fn end(&mut self, pid: Pid, status: WaitStatus) {
        let Some(info) = self.processes.get_mut(&pid.as_raw()) else {
            return;
        };
        info.status = match status {
            WaitStatus::Exited(_, code) => Status::Exited(code),
            WaitStatus::Signaled(_, signal, _) => Status::Signaled(signal as i32),
            _ => return,
        };
        self.ended.push_back(pid.as_raw());
        if self.ended.len() > ENDED_MAX
            && let Some(oldest) = self.ended.pop_front()
            && self.processes.get(&oldest).is_some_and(|info| info.status != Status::Running)
        {
            self.processes.remove(&oldest);
        }
    }
}

/// Script that gives descriptors the places of `sd_listen_fds(3)`, which begin at 3. `LISTEN_PID` must be the number of
/// the process itself, which only it knows before it runs; `exec` keeps it. For bash: others know only one digit. Each
/// redirection is a command of its own: within one, bash 5.2 keeps what it closes at 10 and up, and closed the tenth of
/// the descriptors with it.
fn hand_over(inherited: &[Inherited]) -> String {
    let place = |(i, fd): (usize, &Inherited)| {
        format!("exec {}<&{number}; exec {number}<&-; ", LISTEN_FDS_START + i, number = fd.number())
    };
    let places: String = inherited.iter().enumerate().map(place).collect();
    format!("{places}export LISTEN_PID=$$; exec \"$@\"")
}

/// A client that has gone away needs no answer.
fn reply(mut stream: &UnixStream, response: &Response) {
    let _ = serde_json::to_vec(response).map_err(io::Error::from).and_then(|mut line| {
        line.push(b'\n');
        stream.write_all(&line)
    });
}

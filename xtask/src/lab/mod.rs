//! The lab: several Linux hosts with an engine each, on one machine, for tests, benchmarks and the demo.
//!
//! A host is a network, mount, UTS and cgroup namespace with a real `dockerd` of its own, on an underlay bridge with
//! IPv4 and IPv6. Owns: making and removing hosts ([`Lab::up`], [`down()`]), what runs in them ([`Host`]), faults of
//! the underlay ([`Lab::cut`], [`Lab::limit`]), images without a registry ([`Lab::image`]), and the `lab` command
//! line ([`cli`]). Must not know: anything of Skein; whoever uses a lab starts masters and agents in it.
//!
//! | module | owns |
//! |---|---|
//! | `spec` | names, addresses, the state file |
//! | `underlay` | switch, cables, cuts and limits |
//! | `relay` | delay, loss and reordering in a cable |
//! | `cgroup` | a control-group tree per host |
//! | `holder`, `control` | the process that is a host, and how to talk to it |
//! | `engine`, `host`, `capture` | what one does with a host |
//! | `probe` | steady packets and requests, and what became of each |
//! | `image` | images from the machine's own programs |
//! | `down` | removal, also after a crash |
//!
//! What a lab leaves on the machine bears its name: `/var/lib/skein-lab/<lab>`, `/run/netns/sklab-<lab>.<host>`,
//! `/skein-lab/<lab>` in every control-group hierarchy. Mounts live in the hosts' mount namespaces only. No channels;
//! `up` and `image` use scoped threads, one per host.

mod capture;
mod cgroup;
pub mod cli;
mod control;
mod down;
mod engine;
mod fdstore;
mod holder;
mod host;
mod image;
pub mod probe;
mod process;
mod relay;
mod spec;
mod underlay;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

pub use capture::Capture;
pub use control::{ProcessInfo, Status};
pub use down::{Removed, all_labs, down, down_all};
pub use engine::{ENGINE_SOCKET, REGISTRY_PORT};
pub use holder::{PLUGIN_SOCKET, PLUGIN_SOCKET_NAME};
pub use host::{Host, Process, Spawn};
pub use image::IMAGES;
pub use process::{ProcessId, run, wait_for};
pub use relay::{Counters, Impairment, RelayState};
pub use spec::{DataRoot, HOST_NAME_MAX, HOSTS_MAX, HostSpec, LAB_NAME_MAX, LabSpec, MASTER, STATE_ROOT};
pub use underlay::{UNDERLAY_INTERFACE, parse_rate};

use control::{PROTOCOL, Request, Response, call};
use spec::{HostState, LabState, Phase, host_dir};

/// How long a holder may take to answer, on a machine where many are started at a time.
const HOLDER_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the registry may take to listen.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(15);

/// Programs without which there is no lab, with the Debian package of each.
const TOOLS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("dockerd", "docker.io"),
    ("docker", "docker.io"),
    ("iptables", "iptables"),
    ("tcpdump", "tcpdump"),
];

/// A lab that is up.
///
/// One that [`Lab::up`] has made is taken down when the value is dropped, unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    state: LabState,
    hosts: Vec<Host>,
    owned: bool,
}

impl Lab {
    /// Makes a lab, or adopts the one of this name if it is healthy and has the same specification; an adopted lab is
    /// not taken down on drop.
    ///
    /// # Errors
    /// Everything that can be checked is checked before the first change. What was made before a later failure is
    /// removed, and the error holds the ends of the logs.
    pub fn up(spec: LabSpec) -> Result<Self> {
        spec.validate()?;
        check_machine(&spec)?;
        if let Some(state) = LabState::load(&spec.name)? {
            return Self::adopt(state, &spec);
        }
        let leftovers = underlay::namespaces(&spec.name);
        ensure!(
            leftovers.is_empty() && !cgroup::labs()?.contains(&spec.name),
            "failed to create lab {0}: an earlier one left something behind\nhint: cargo xtask lab down --name {0}",
            spec.name
        );
        let state = LabState::reserve(&spec)?;
        match Self::create(state) {
            Ok(lab) => Ok(lab),
            Err(e) => match down(&spec.name) {
                Ok(_) => Err(e),
                Err(left) => Err(e.context(format!("{left:#}"))),
            },
        }
    }

    fn create(mut state: LabState) -> Result<Self> {
        let holder = holder_program()?;
        underlay::create(&state)?;
        let started: Vec<Result<HostState>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..state.spec.hosts.len())
                .map(|index| {
                    let (state, holder) = (&state, &holder);
                    scope.spawn(move || start_holder(state, index, holder))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a thread that starts a host does not panic"))
                .collect()
        });
        for (host, started) in state.spec.hosts.iter().zip(started) {
            state.hosts.push(started.with_context(|| format!("failed to start host {}", host.name))?);
        }
        state.save()?;
        let mut lab = Self { hosts: hosts_of(&state), state, owned: false };
        lab.on_engines(Host::start_engine)?;
        lab.state.phase = Phase::Up;
        lab.state.save()?;
        lab.owned = true;
        Ok(lab)
    }

    fn adopt(state: LabState, spec: &LabSpec) -> Result<Self> {
        let name = &spec.name;
        ensure!(
            state.spec == *spec,
            "failed to create lab {name}: one with other hosts or options exists\nhint: cargo xtask lab down --name {name}"
        );
        let lab = Self { hosts: hosts_of(&state), state, owned: false };
        if let Some(problem) = lab.problems().first() {
            bail!("failed to adopt lab {name}: {problem}\nhint: cargo xtask lab down --name {name}");
        }
        Ok(lab)
    }

    /// The lab of this name that exists. It is not taken down on drop.
    ///
    /// # Errors
    /// There is none.
    pub fn open(name: &str) -> Result<Self> {
        spec::check_name("lab", name, LAB_NAME_MAX)?;
        let state = LabState::load(name)?
            .with_context(|| format!("failed to find lab {name}\nhint: cargo xtask lab up --hosts 3 --name {name}"))?;
        Ok(Self { hosts: hosts_of(&state), state, owned: false })
    }

    /// Leaves the lab as it is when the value is dropped.
    pub fn keep(&mut self) {
        self.owned = false;
    }

    /// Takes the lab down.
    ///
    /// # Errors
    /// Lists what could not be removed.
    pub fn down(mut self) -> Result<Removed> {
        self.owned = false;
        down(&self.state.spec.name)
    }

    /// Name of the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.state.spec.name
    }

    /// What the lab was made from.
    #[must_use]
    pub fn spec(&self) -> &LabSpec {
        &self.state.spec
    }

    /// Directory of the lab's state.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        spec::lab_dir(self.name())
    }

    /// All hosts in the order of the specification.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host of this name.
    ///
    /// # Panics
    /// There is none: in a test, a mistake in the test. See [`Lab::find_host`].
    #[must_use]
    pub fn host(&self, name: &str) -> &Host {
        self.find_host(name).expect("the host is in the specification")
    }

    /// The host of this name.
    ///
    /// # Errors
    /// Names the hosts that exist.
    pub fn find_host(&self, name: &str) -> Result<&Host> {
        self.hosts.iter().find(|host| host.name == name).with_context(|| {
            let names: Vec<&str> = self.hosts.iter().map(Host::name).collect();
            format!("failed to find host {name} in lab {}: there are {}", self.name(), names.join(", "))
        })
    }

    /// The hosts that have an engine.
    pub fn engines(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter().filter(|host| host.engine)
    }

    /// What is wrong with the lab, nothing if it is healthy.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.state.phase == Phase::Starting {
            let creator = self.state.creator;
            let fate = if creator.is_alive() { "is making it" } else { "ended while making it" };
            problems.push(format!("not complete: process {} {fate}", creator.pid));
        }
        for host in &self.hosts {
            match call(&host.dir, &Request::Ping) {
                Ok(Response::Pong { protocol: PROTOCOL, .. }) if host.engine && !host.engine_answers() => {
                    problems.push(format!("the engine of {} does not answer", host.name));
                }
                Ok(Response::Pong { protocol: PROTOCOL, .. }) => {}
                Ok(_) => problems.push(format!("the holder of {} is of another build", host.name)),
                Err(e) => problems.push(format!("host {}: {e:#}", host.name)),
            }
        }
        problems
    }

    /// Drops all frames between two hosts on the underlay, in both directions, established connections included.
    ///
    /// # Errors
    /// A host does not exist, or the two are one.
    pub fn cut(&self, a: &str, b: &str) -> Result<()> {
        underlay::cut(self.name(), self.find_host(a)?.index, Some(self.find_host(b)?.index))
    }

    /// Drops all frames between a host and all others.
    ///
    /// # Errors
    /// The host does not exist.
    pub fn isolate(&self, host: &str) -> Result<()> {
        underlay::cut(self.name(), self.find_host(host)?.index, None)
    }

    /// Ends all cuts and isolations.
    ///
    /// # Errors
    /// The lab is down.
    pub fn heal(&self) -> Result<()> {
        underlay::heal(self.name())
    }

    /// Limits what a host sends and what it receives on the underlay, to `bits_per_second` each; `None` ends it.
    ///
    /// # Errors
    /// The host does not exist, or `tc` refuses the rate.
    pub fn limit(&self, host: &str, bits_per_second: Option<u64>) -> Result<()> {
        underlay::limit(self.name(), self.find_host(host)?.index, host, bits_per_second)
    }

    /// Does this to all frames from and to a host from now on: puts a relay into its cable, or tells the one that is
    /// there. `seed` decides what chance does; it counts when the relay is put in.
    ///
    /// # Errors
    /// The host does not exist or has a limit, a value is out of its range, or there is no `ethtool`.
    pub fn relay(&self, host: &str, impairment: Impairment, seed: u64) -> Result<()> {
        relay::set(&self.state, self.find_host(host)?.index, impairment, seed)
    }

    /// Takes the relay out of a host's cable; frames that wait in it are lost. Without one nothing happens.
    ///
    /// # Errors
    /// The host does not exist.
    pub fn unrelay(&self, host: &str) -> Result<()> {
        relay::remove(&self.state, self.find_host(host)?.index)
    }

    /// What the relay of a host does and has done; nothing when there is none.
    ///
    /// # Errors
    /// The host does not exist, or its relay has died.
    pub fn relay_state(&self, host: &str) -> Result<Option<RelayState>> {
        relay::state_of(&self.state, self.find_host(host)?.index)
    }

    /// The cuts in force as pairs of names; a host that is isolated has no second name.
    ///
    /// # Errors
    /// The lab is down.
    pub fn cuts(&self) -> Result<Vec<(String, Option<String>)>> {
        let name = |i: usize| self.hosts.get(i).map(|host| host.name.clone()).unwrap_or_default();
        let underlay::Cuts { pairs, alone } = underlay::cuts(self.name())?;
        let pairs = pairs.into_iter().map(|(a, b)| (name(a), Some(name(b))));
        Ok(pairs.chain(alone.into_iter().map(|a| (name(a), None))).collect())
    }

    /// The limit of a host as `tc` shows it, empty if there is none.
    ///
    /// # Errors
    /// The host does not exist.
    pub fn limit_of(&self, host: &str) -> Result<String> {
        underlay::limit_text(self.name(), self.find_host(host)?.index)
    }

    /// Builds one of [`IMAGES`] from this machine's programs, unless an equal one was built before, and loads it into
    /// every engine. Tags: the name and `latest`.
    ///
    /// # Errors
    /// The name is unknown; a program it needs is missing, with the package that has it; an engine refuses it.
    pub fn image(&self, name: &str) -> Result<()> {
        let archive = image::build(name)?;
        self.on_engines(|host| image::load(host, name, &archive))
    }

    /// The same for one host only.
    ///
    /// # Errors
    /// As [`Lab::image`].
    pub fn image_on(&self, host: &str, name: &str) -> Result<()> {
        image::load(self.find_host(host)?, name, &image::build(name)?)
    }

    /// Starts a real registry on the master host, if it does not run, and returns its address, `master:5000`. Every
    /// engine accepts it without TLS.
    ///
    /// # Errors
    /// There is no master host, or no `docker-registry` on this machine, or it does not start.
    pub fn registry(&self) -> Result<String> {
        let host = self.find_host(MASTER)?;
        let address = format!("{MASTER}:{REGISTRY_PORT}");
        let ready = || -> Result<Option<()>> {
            let url = format!("http://127.0.0.1:{REGISTRY_PORT}/v2/");
            Ok(host.run(&["curl", "-fsS", "--max-time", "5", &url]).ok().map(drop))
        };
        if host.process("docker-registry")?.is_some() && ready()?.is_some() {
            return Ok(address);
        }
        ensure!(
            find_program("docker-registry").is_some(),
            "failed to find docker-registry\nhint: apt-get install docker-registry"
        );
        let data = host.dir.join("registry");
        fs::create_dir_all(&data).with_context(|| format!("failed to create {}", data.display()))?;
        let config = serde_json::json!({
            "version": "0.1",
            "storage": { "filesystem": { "rootdirectory": data }, "delete": { "enabled": true } },
            "http": { "addr": format!(":{REGISTRY_PORT}") },
        });
        let path = host.dir.join("registry.yml");
        // JSON is YAML.
        fs::write(&path, config.to_string()).with_context(|| format!("failed to write {}", path.display()))?;
        let process = host.spawn(Spawn::new("docker-registry").arg("serve").arg(&path))?;
        wait_for("the registry ready", REGISTRY_TIMEOUT, || {
            ensure!(process.is_running(), "the registry ended:\n{}", process.log_tail());
            ready()
        })?;
        Ok(address)
    }

    /// The ends of all logs of the lab, for the report of a failed test.
    #[must_use]
    pub fn logs(&self, lines: usize) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            let entries = fs::read_dir(&host.dir).into_iter().flatten().filter_map(Result::ok);
            let mut logs: Vec<PathBuf> =
                entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "log")).collect();
            logs.sort();
            for log in logs {
                text.push_str(&format!("--- {}\n{}\n", log.display(), process::tail(&log, lines)));
            }
        }
        text
    }

    /// Does the same on all engines at once; the first error counts.
    fn on_engines(&self, work: impl Fn(&Host) -> Result<()> + Sync) -> Result<()> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self.engines().map(|host| scope.spawn(|| work(host))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("a thread of a lab does not panic"))
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        // Not a log: the report of a test that fails, whose evidence is about to be removed.
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.logs(LOG_LINES_AFTER_PANIC).as_bytes());
        }
        if let Err(e) = down(self.name()) {
            let _ = writeln!(std::io::stderr(), "{e:#}");
        }
    }
}

/// Lines shown of each log when a test fails.
const LOG_LINES_AFTER_PANIC: usize = 30;

fn hosts_of(state: &LabState) -> Vec<Host> {
    let holder = |name: &str| {
        state
            .hosts
            .iter()
            .find(|host| host.name == name)
            .map_or(ProcessId { pid: -1, start_ticks: 0 }, |host| host.holder)
    };
    let specs = state.spec.hosts.iter().enumerate();
    specs
        .map(|(index, spec)| Host {
            lab: state.spec.name.clone(),
            name: spec.name.clone(),
            index,
            engine: spec.engine,
            ipv4: state.ipv4(index),
            ipv6: state.ipv6(index),
            dir: host_dir(&state.spec.name, &spec.name),
            holder: holder(&spec.name),
            engine_options: state.spec.engine_options.clone(),
        })
        .collect()
}

/// Starts the holder of the host at `index` and waits until it answers.
fn start_holder(state: &LabState, index: usize, program: &Path) -> Result<HostState> {
    let (lab, host) = (&state.spec.name, &state.spec.hosts[index]);
    let dir = host_dir(lab, &host.name);
    fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    if host.engine {
        engine::write_config(state, &dir)?;
    }
    let log = dir.join("holder.log");
    let output = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
    let errors = output.try_clone().context("failed to share the log file")?;
    let mut child = Command::new(program)
        .args(["lab", "holder", lab, &host.name])
        .env_clear()
        .envs([("PATH", holder::HOST_PATH), ("LANG", "C.UTF-8"), ("HOME", "/root")])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("failed to start {}", program.display()))?;
    wait_for(&format!("the holder of {}", host.name), HOLDER_TIMEOUT, || {
        if let Some(status) = child.try_wait().context("failed to look after the holder")? {
            bail!("the holder ended: {status}");
        }
        match call(&dir, &Request::Ping) {
            Ok(Response::Pong { protocol: PROTOCOL, holder, mount_ns }) => {
                Ok(Some(HostState { name: host.name.clone(), holder, mount_ns }))
            }
            Ok(_) => bail!("{} is of another build\nhint: cargo build -p xtask", program.display()),
            Err(_) => Ok(None),
        }
    })
    .with_context(|| format!("its log ends with:\n{}", process::tail(&log, 20)))
}

/// The program that is started as a holder: this one if it is `xtask`, else the `xtask` beside a test's program
/// (`target/debug/deps/lab-…` → `target/debug/xtask`).
fn holder_program() -> Result<PathBuf> {
    let me = std::env::current_exe().context("failed to find the running program")?;
    if me.file_name().is_some_and(|name| name == "xtask") {
        return Ok(me);
    }
    let found = me.ancestors().skip(1).take(3).map(|dir| dir.join("xtask")).find(|path| path.is_file());
    found.with_context(|| {
        format!("failed to find the program xtask beside {}\nhint: cargo build -p xtask", me.display())
    })
}

/// Checks everything that can be checked before the first change.
fn check_machine(spec: &LabSpec) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "failed to create lab {}: only root can make namespaces\nhint: sudo -E env \"PATH=$PATH\" cargo xtask lab up",
        spec.name
    );
    let mut missing: Vec<&str> =
        TOOLS.iter().filter(|(program, _)| find_program(program).is_none()).map(|(_, package)| *package).collect();
    missing.dedup();
    ensure!(
        missing.is_empty(),
        "failed to create lab {}: programs are missing\nhint: apt-get install {}",
        spec.name,
        missing.join(" ")
    );
    holder_program()?;
    let filesystems = fs::read_to_string("/proc/filesystems").context("failed to read /proc/filesystems")?;
    // A module that is not loaded yet is not listed; an engine loads it. Where modules cannot be loaded it must be.
    ensure!(
        filesystems.contains("\toverlay\n") || Path::new("/proc/modules").exists(),
        "failed to create lab {}: the kernel has no overlayfs",
        spec.name
    );
    if spec.data_root == DataRoot::Disk {
        fs::create_dir_all(STATE_ROOT).with_context(|| format!("failed to create {STATE_ROOT}"))?;
        let kind = nix::sys::statfs::statfs(STATE_ROOT).with_context(|| format!("failed to look at {STATE_ROOT}"))?;
        ensure!(
            kind.filesystem_type() != nix::sys::statfs::OVERLAYFS_SUPER_MAGIC,
            "failed to create lab {}: {STATE_ROOT} is on overlayfs, where engines cannot keep data",
            spec.name
        );
    }
    Ok(())
}

/// Looks a program up where administrators' shells do: tools of iproute2 are not in every user's `PATH`.
fn find_program(name: &str) -> Option<PathBuf> {
    holder::HOST_PATH.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

//! Holds the cluster's containers to what the host offers, by limits of their parent cgroup.
//!
//! Owns: the parent's name, its limits, and what of an offer cannot be enforced. Must not know: containers; the engine
//! puts them below the parent. No tasks, no channels.
//!
//! | engine's driver | parent | limits are written by |
//! |---|---|---|
//! | cgroupfs, version 1 | `/skein` | us: `memory.limit_in_bytes`, `cpu.cfs_quota_us` |
//! | cgroupfs, version 2 | `/skein` | us: `memory.max`, `cpu.max`, with the controllers enabled above it |
//! | systemd | `skein.slice` | systemd, as runtime properties of the slice: it would undo what others write |

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use skein_api::Resources;
use thiserror::Error;
use tokio::{process::Command, time::timeout};

use crate::{
    config::{Config, ConfigError},
    engine::{CgroupDriver, Engine, EngineError},
};

/// Parent of all containers where something is offered and the operator names none.
pub const DEFAULT_PARENT: &str = "/skein";
/// The same for an engine that makes its cgroups through systemd.
pub const DEFAULT_SLICE: &str = "skein.slice";
/// Where control groups are mounted (cgroups(7)).
const CGROUPS: &str = "/sys/fs/cgroup";
/// Period of CPU quotas, µs: the kernel's default (sched-bwc).
const CPU_PERIOD_US: u64 = 100_000;
/// Least quota that the kernel takes, µs.
const CPU_QUOTA_US_MIN: u64 = 1_000;
/// How long systemd may take to set a property.
const SYSTEMCTL_TIMEOUT: Duration = Duration::from_secs(20);

/// Why an offer cannot be enforced.
#[derive(Debug, Error)]
pub enum OfferError {
    /// The amount is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The engine does not tell what makes its cgroups.
    #[error("failed to ask the engine for its cgroup driver")]
    Engine(#[source] EngineError),
    /// Nothing to set limits with.
    #[error(
        "failed to limit what containers use: the engine has no cgroup driver; hint: remove `offer` or use `reserve`"
    )]
    NoDriver,
    /// A parent that this engine refuses.
    #[error(
        "failed to use cgroup_parent {0}: this engine makes cgroups through systemd, which wants a name like {DEFAULT_SLICE}"
    )]
    NotASlice(String),
    /// A parent that leads somewhere else.
    #[error("failed to use cgroup_parent {0}: it must not contain `..`")]
    BadPath(String),
    /// The kernel has no such controller, or it is not mounted.
    #[error("failed to limit cgroup {parent}: no {controller} controller under {root}")]
    NoController {
        /// The parent.
        parent: String,
        /// `memory` or `cpu`.
        controller: &'static str,
        /// Where cgroups are.
        root: PathBuf,
    },
    /// The kernel refused.
    #[error("failed to write {value} to {file}")]
    Write {
        /// The control file.
        file: PathBuf,
        /// The value.
        value: String,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// systemd refused.
    #[error("failed to set {property} of {slice}: {reason}")]
    Systemd {
        /// The slice.
        slice: String,
        /// With its value.
        property: String,
        /// What systemctl said.
        reason: String,
    },
}

/// An offer that is enforced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enforced {
    /// Parent cgroup of all containers; none: the engine's own.
    pub parent: Option<String>,
    /// What is not enforced although it is offered: CPUs, never memory.
    pub warnings: Vec<String>,
}

/// Sets the limits of the parent cgroup to what is offered. Idempotent. Call it before containers are made, and give
/// the parent to [`Engine::set_cgroup_parent`].
///
/// # Errors
/// The memory that is offered cannot be enforced.
pub async fn enforce(config: &Config, engine: &Engine) -> Result<Enforced, OfferError> {
    let offer = config.offer.resources("offer")?;
    if offer == Resources::default() {
        return Ok(Enforced { parent: config.cgroup_parent.clone(), warnings: Vec::new() });
    }
    let driver = engine.cgroup_driver().await.map_err(OfferError::Engine)?;
    let parent = parent_of(config.cgroup_parent.as_deref(), driver)?;
    // The operator's own parent may have limits of its own for what is not offered; ours has none but these.
    let limits = Limits { parent: &parent, offer, ours: config.cgroup_parent.is_none() };
    let warnings = match driver {
        CgroupDriver::Systemd => limits.by_systemd(Path::new("systemctl")).await?,
        CgroupDriver::Cgroupfs | CgroupDriver::None => limits.by_files(Path::new(CGROUPS))?,
    };
    for warning in &warnings {
        tracing::warn!(parent, warning, "the offer is not enforced in full");
    }
    Ok(Enforced { parent: Some(parent), warnings })
}

fn parent_of(configured: Option<&str>, driver: CgroupDriver) -> Result<String, OfferError> {
    match (configured, driver) {
        (_, CgroupDriver::None) => Err(OfferError::NoDriver),
        (None, CgroupDriver::Cgroupfs) => Ok(DEFAULT_PARENT.to_owned()),
        (None, CgroupDriver::Systemd) => Ok(DEFAULT_SLICE.to_owned()),
        (Some(parent), _) if parent.split('/').any(|part| part == "..") => Err(OfferError::BadPath(parent.to_owned())),
        (Some(parent), CgroupDriver::Systemd) if !parent.ends_with(".slice") || parent.contains('/') => {
            Err(OfferError::NotASlice(parent.to_owned()))
        }
        (Some(parent), _) => Ok(parent.to_owned()),
    }
}

struct Limits<'a> {
    parent: &'a str,
    /// 0 is no limit.
    offer: Resources,
    ours: bool,
}

impl Limits<'_> {
    fn memory(&self) -> Option<u64> {
        Some(self.offer.mem_bytes).filter(|n| *n > 0)
    }

    /// Of [`CPU_PERIOD_US`].
    fn quota_us(&self) -> Option<u64> {
        let quota = self.offer.nano_cpus / (1_000_000_000 / CPU_PERIOD_US);
        (self.offer.nano_cpus > 0).then(|| quota.max(CPU_QUOTA_US_MIN))
    }

    /// The answer is what is not enforced.
    fn by_files(&self, root: &Path) -> Result<Vec<String>, OfferError> {
        let unified = root.join("cgroup.controllers").exists();
        let (memory, cpu) =
            if unified { (self.memory_v2(root), self.cpu_v2(root)) } else { (self.memory_v1(root), self.cpu_v1(root)) };
        if self.memory().is_some() {
            memory?;
        }
        Ok(match cpu {
            Err(error) if self.quota_us().is_some() => {
                vec![format!("offer.cpus is not enforced: {}", skein_daemon::chain(&error))]
            }
            _ => Vec::new(),
        })
    }

    fn memory_v1(&self, root: &Path) -> Result<(), OfferError> {
        let dir = self.dir_v1(root, "memory")?;
        // Before Linux 5.11 the limit would otherwise not count what is below.
        let _ = std::fs::write(dir.join("memory.use_hierarchy"), "1");
        match self.memory() {
            Some(bytes) => write(&dir.join("memory.limit_in_bytes"), &bytes.to_string()),
            None if self.ours => write(&dir.join("memory.limit_in_bytes"), "-1"),
            None => Ok(()),
        }
    }

    fn cpu_v1(&self, root: &Path) -> Result<(), OfferError> {
        let dir = self.dir_v1(root, "cpu")?;
        match self.quota_us() {
            Some(quota) => {
                write(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
                write(&dir.join("cpu.cfs_quota_us"), &quota.to_string())
            }
            None if self.ours => write(&dir.join("cpu.cfs_quota_us"), "-1"),
            None => Ok(()),
        }
    }

    fn dir_v1(&self, root: &Path, controller: &'static str) -> Result<PathBuf, OfferError> {
        let top = root.join(controller);
        if !top.join("cgroup.procs").exists() {
            return Err(OfferError::NoController { parent: self.parent.to_owned(), controller, root: root.to_owned() });
        }
        make(&top.join(self.parent.trim_start_matches('/')))
    }

    fn memory_v2(&self, root: &Path) -> Result<(), OfferError> {
        let dir = self.dir_v2(root, "memory")?;
        match self.memory() {
            Some(bytes) => write(&dir.join("memory.max"), &bytes.to_string()),
            None if self.ours => write(&dir.join("memory.max"), "max"),
            None => Ok(()),
        }
    }

    fn cpu_v2(&self, root: &Path) -> Result<(), OfferError> {
        let dir = self.dir_v2(root, "cpu")?;
        match self.quota_us() {
            Some(quota) => write(&dir.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}")),
            None if self.ours => write(&dir.join("cpu.max"), &format!("max {CPU_PERIOD_US}")),
            None => Ok(()),
        }
    }

    /// The parent's directory with the controller enabled in all above it (cgroup-v2, "Controlling Controllers").
    fn dir_v2(&self, root: &Path, controller: &'static str) -> Result<PathBuf, OfferError> {
        let has = |dir: &Path, file: &str| {
            let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
            text.split_whitespace().any(|c| c == controller)
        };
        if !has(root, "cgroup.controllers") {
            return Err(OfferError::NoController { parent: self.parent.to_owned(), controller, root: root.to_owned() });
        }
        let mut dir = root.to_owned();
        for part in self.parent.split('/').filter(|p| !p.is_empty()) {
            if !has(&dir, "cgroup.subtree_control") {
                write(&dir.join("cgroup.subtree_control"), &format!("+{controller}"))?;
            }
            dir = make(&dir.join(part))?;
        }
        Ok(dir)
    }

    /// The answer is what is not enforced.
    async fn by_systemd(&self, systemctl: &Path) -> Result<Vec<String>, OfferError> {
        let memory = match self.memory() {
            Some(bytes) => Some(format!("MemoryMax={bytes}")),
            None => self.ours.then(|| "MemoryMax=infinity".to_owned()),
        };
        // systemd counts in whole percents of one CPU.
        let cpu = match self.quota_us() {
            Some(quota) => Some(format!("CPUQuota={}%", quota.div_ceil(CPU_PERIOD_US / 100))),
            None => self.ours.then(|| "CPUQuota=".to_owned()),
        };
        if let Some(property) = memory {
            self.property(systemctl, property).await?;
        }
        let mut warnings = Vec::new();
        if let Some(property) = cpu
            && let Err(error) = self.property(systemctl, property).await
        {
            warnings.push(format!("offer.cpus is not enforced: {}", skein_daemon::chain(&error)));
        }
        Ok(warnings)
    }

    /// Until the next boot, at which the agent sets it again.
    async fn property(&self, systemctl: &Path, property: String) -> Result<(), OfferError> {
        let mut command = Command::new(systemctl);
        command.args(["set-property", "--runtime", self.parent, &property]).stdin(Stdio::null()).kill_on_drop(true);
        let reason = match timeout(SYSTEMCTL_TIMEOUT, command.output()).await {
            Ok(Ok(output)) if output.status.success() => return Ok(()),
            Ok(Ok(output)) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Ok(Err(error)) => format!("{}: {error}", systemctl.display()),
            Err(_) => format!("no answer within {} s", SYSTEMCTL_TIMEOUT.as_secs()),
        };
        Err(OfferError::Systemd { slice: self.parent.to_owned(), property, reason })
    }
}

fn make(dir: &Path) -> Result<PathBuf, OfferError> {
    let failed = |source| OfferError::Write { file: dir.to_owned(), value: "a directory".to_owned(), source };
    std::fs::create_dir_all(dir).map_err(failed)?;
    Ok(dir.to_owned())
}

fn write(file: &Path, value: &str) -> Result<(), OfferError> {
    std::fs::write(file, value).map_err(|source| OfferError::Write {
        file: file.to_owned(),
        value: value.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn offer(cpus: u64, mem_bytes: u64) -> Limits<'static> {
        Limits { parent: "/skein", offer: Resources { nano_cpus: cpus, mem_bytes }, ours: true }
    }

    fn put(root: &Path, file: &str, text: &str) {
        fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        fs::write(root.join(file), text).unwrap();
    }

    #[test]
    fn the_parent_has_the_form_of_the_engines_driver() {
        use CgroupDriver::{Cgroupfs, None as Nobody, Systemd};
        let check = |configured, driver, expected: Result<&str, &str>| {
            let found = parent_of(configured, driver).map_err(|e| e.to_string());
            match expected {
                Ok(parent) => assert_eq!(found.as_deref(), Ok(parent)),
                Err(words) => assert!(found.as_ref().is_err_and(|e| e.contains(words)), "{found:?}"),
            }
        };
        check(None, Cgroupfs, Ok("/skein"));
        check(None, Systemd, Ok("skein.slice"));
        check(Some("/lab/h1"), Cgroupfs, Ok("/lab/h1"));
        check(Some("/lab/../h1"), Cgroupfs, Err("must not contain"));
        check(Some("my.slice"), Systemd, Ok("my.slice"));
        check(Some("/skein"), Systemd, Err("wants a name like skein.slice"));
        check(None, Nobody, Err("no cgroup driver"));
    }

    #[test]
    fn version_1() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let missing = offer(0, 512).by_files(root).unwrap_err().to_string();
        assert!(missing.contains("no memory controller"), "{missing}");
        put(root, "memory/cgroup.procs", "");
        let warnings = offer(1_500_000_000, 512).by_files(root).unwrap();
        assert!(warnings[0].starts_with("offer.cpus is not enforced"), "memory counts, CPUs are only warned of");
        put(root, "cpu/cgroup.procs", "");
        assert_eq!(offer(1_500_000_000, 512).by_files(root).unwrap(), Vec::<String>::new());
        let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();
        assert_eq!(read("memory/skein/memory.limit_in_bytes"), "512");
        assert_eq!(
            (read("cpu/skein/cpu.cfs_period_us"), read("cpu/skein/cpu.cfs_quota_us")),
            ("100000".into(), "150000".into())
        );
        // An offer that is gone leaves no limit behind.
        offer(0, 512).by_files(root).unwrap();
        assert_eq!(read("cpu/skein/cpu.cfs_quota_us"), "-1");
    }

    #[test]
    fn version_2() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, "cgroup.controllers", "cpuset cpu memory pids");
        put(root, "cgroup.subtree_control", "memory pids");
        let nested = Limits { parent: "/a/b", offer: Resources { nano_cpus: 1, mem_bytes: 1024 }, ours: true };
        assert_eq!(nested.by_files(root).unwrap(), Vec::<String>::new());
        let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+cpu", "memory was on already");
        assert_eq!(read("a/cgroup.subtree_control"), "+cpu", "the last of the two");
        assert_eq!((read("a/b/memory.max"), read("a/b/cpu.max")), ("1024".into(), "1000 100000".into()));
        put(root, "cgroup.controllers", "cpuset pids");
        assert!(nested.by_files(root).unwrap_err().to_string().contains("no memory controller"));
    }

    #[tokio::test]
    async fn systemd_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("systemctl");
        let log = dir.path().join("log");
        let text = format!(
            "#!/bin/sh\necho \"$@\" >> {}\ncase \"$4\" in CPU*) echo no such property >&2; exit 1;; esac\n",
            log.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let limits = Limits { parent: "skein.slice", ..offer(1_500_000_000, 512) };
        let warnings = limits.by_systemd(&script).await.unwrap();
        assert!(warnings[0].contains("no such property"), "{warnings:?}");
        let asked = fs::read_to_string(&log).unwrap();
        assert_eq!(
            asked,
            "set-property --runtime skein.slice MemoryMax=512\nset-property --runtime skein.slice CPUQuota=150%\n"
        );
        let gone = limits.by_systemd(&dir.path().join("nothing")).await.unwrap_err().to_string();
        assert!(gone.contains("MemoryMax=512 of skein.slice"), "{gone}");
    }
}

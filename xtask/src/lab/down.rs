//! Taking a lab away, whole or in whatever state a crash left it.
//!
//! Nothing here trusts that the lab is complete: processes are found by the lab's network and mount namespaces, its
//! control groups and their descent; namespaces and directories by name. Everything found that way is the lab's, and
//! nothing else is touched. Errors are collected, and the work goes on. No tasks, no channels.
//!
//! Processes are killed, not asked: a stopping engine calls its network plugin for every container, which takes 25 to
//! 45 s each when the agent is gone, and nothing it could save would be kept.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::holder::detach_below;
use super::process::{self, ProcessId, add_descendants, namespace, wait_for};
use super::spec::{LAB_NAME_MAX, LabState, check_name, lab_dir, names};
use super::{cgroup, underlay};

/// How long killed processes may take to be gone: many containers on a busy machine.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What `down` has removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Processes killed.
    pub processes: usize,
    /// Network namespaces.
    pub namespaces: usize,
    /// Whether there was a state directory.
    pub state: bool,
}

/// Takes a lab away. A lab that does not exist is no error: then nothing is removed.
///
/// # Errors
/// All steps are tried; the error lists those that failed.
pub fn down(lab: &str) -> Result<Removed> {
    check_name("lab", lab, LAB_NAME_MAX)?;
    let me = ProcessId::current()?.pid;
    let targets = Targets::find(lab);
    ensure!(
        !targets.contains(lab, me),
        "failed to take lab {lab} down: called from inside it\nhint: call it from a shell outside the lab"
    );
    let mut removed = Removed::default();
    let mut errors: Vec<String> = Vec::new();
    let mut note = |result: Result<()>| {
        if let Err(e) = result {
            errors.push(format!("{e:#}"));
        }
    };

    note(kill_all(lab, &targets).map(|n| removed.processes = n));
    for name in underlay::namespaces(lab) {
        note(underlay::remove(&name).map(|()| removed.namespaces += 1));
    }
    note(cgroup::remove(lab));
    let dir = lab_dir(lab);
    note(detach_below(&dir));
    note(match fs::remove_dir_all(&dir) {
        Ok(()) => {
            removed.state = true;
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("failed to remove {}", dir.display())),
    });
    if !errors.is_empty() {
        bail!("failed to remove all of lab {lab}:\n{}", errors.join("\n"));
    }
    Ok(removed)
}

/// All labs of which anything is left, by their state, network namespaces or control groups.
///
/// # Errors
/// A directory cannot be listed.
pub fn all_labs() -> Result<Vec<String>> {
    let mut all: BTreeSet<String> = names()?.into_iter().collect();
    all.extend(underlay::labs());
    all.extend(cgroup::labs()?);
    Ok(all.into_iter().filter(|name| check_name("lab", name, LAB_NAME_MAX).is_ok()).collect())
}

/// By what the lab's processes are known.
struct Targets {
    net: BTreeSet<u64>,
    mount: BTreeSet<u64>,
}

impl Targets {
    fn find(lab: &str) -> Self {
        let names = underlay::namespaces(lab);
        let net = names.iter().filter_map(|name| process::namespace_at(&Path::new("/run/netns").join(name))).collect();
        // An unreadable state file costs one of several marks only.
        let hosts = LabState::load(lab).ok().flatten().map(|state| state.hosts).unwrap_or_default();
        // An inode may be used again once its namespace is gone: it is the lab's for certain while the holder lives.
        let alive = hosts.iter().filter(|host| host.holder.is_alive());
        let mount = alive.map(|host| host.mount_ns).collect();
        Self { net, mount }
    }

    fn contains(&self, lab: &str, pid: i32) -> bool {
        cgroup::contains(lab, pid)
            || namespace(pid, "net").is_some_and(|ns| self.net.contains(&ns))
            || namespace(pid, "mnt").is_some_and(|ns| self.mount.contains(&ns))
    }
}

/// Kills until none is left: a process may be born while the list is read. Returns how many were killed.
fn kill_all(lab: &str, targets: &Targets) -> Result<usize> {
    let mut killed: BTreeSet<i32> = BTreeSet::new();
    wait_for(&format!("the processes of lab {lab} gone"), KILL_TIMEOUT, || {
        let mut members: BTreeSet<i32> =
            process::all()?.into_iter().filter(|pid| targets.contains(lab, *pid)).collect();
        add_descendants(&mut members)?;
        let ids: Vec<ProcessId> =
            members.iter().filter_map(|pid| ProcessId::of(*pid)).filter(ProcessId::is_alive).collect();
        // Engines first, so that none restarts what dies after it.
        let (engines, rest): (Vec<ProcessId>, Vec<ProcessId>) =
            ids.iter().partition(|id| matches!(process::program(id.pid).as_str(), "dockerd" | "containerd"));
        for id in engines.iter().chain(&rest) {
            id.signal(Signal::SIGKILL)?;
            killed.insert(id.pid);
        }
        Ok(ids.is_empty().then_some(()))
    })?;
    Ok(killed.len())
}

/// Takes every lab away.
///
/// # Errors
/// Lists what failed; all labs are tried.
pub fn down_all() -> Result<Vec<(String, Removed)>> {
    let mut removed = Vec::new();
    let mut errors = Vec::new();
    for name in all_labs()? {
        match down(&name) {
            Ok(what) => removed.push((name, what)),
            Err(e) => errors.push(format!("{e:#}")),
        }
    }
    if !errors.is_empty() {
        bail!("{}", errors.join("\n"));
    }
    Ok(removed)
}

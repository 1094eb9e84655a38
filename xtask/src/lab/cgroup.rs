//! A control-group tree of its own for every host.
//!
//! Each host lives in `/skein-lab/<lab>/<host>` of every hierarchy (version 1, version 2 or both) and in a cgroup
//! namespace that shows this directory as the root. Engines and agents of different hosts may so use the same paths
//! (`/docker`, an agent's own parent), a limit set in one host holds for that host alone, and `down` finds whatever
//! was started by the directory it is in.
//!
//! Knows nothing of networks or engines. No tasks, no channels.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::process::wait_for;

/// Directory below the root of every hierarchy that holds all labs.
const ROOT: &str = "skein-lab";

/// How long a directory whose processes were just killed may stay busy.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount_point: PathBuf,
    /// Controllers or `name=…` of version 1, nothing for version 2.
    v1: Option<String>,
}

impl Hierarchy {
    fn is_v2(&self) -> bool {
        self.v1.is_none()
    }

    fn has(&self, controller: &str) -> bool {
        self.v1.as_deref().is_some_and(|list| list.split(',').any(|name| name == controller))
    }
}

/// All hierarchies whose root is visible here.
fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("failed to read /proc/self/mountinfo")?;
    Ok(parse(&text))
}

/// `proc(5)`: `id parent major:minor root mount-point options… - fstype source super-options`.
fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(&"/"), Some(mount_point), Some(kind)) = (left.get(3), left.get(4), right.first()) else {
            continue;
        };
        let v1 = match *kind {
            "cgroup2" => None,
            "cgroup" => {
                let ignored = ["rw", "ro", "xattr", "clone_children", "noprefix", "none"];
                let options = right.get(2).copied().unwrap_or_default().split(',');
                let kept: Vec<&str> =
                    options.filter(|o| !ignored.contains(o) && !o.starts_with("release_agent=")).collect();
                Some(kept.join(","))
            }
            _ => continue,
        };
        if !found.iter().any(|other| other.v1 == v1) {
            found.push(Hierarchy { mount_point: PathBuf::from(mount_point), v1 });
        }
    }
    found
}

/// Moves the calling process into the host's directory of every hierarchy.
///
/// # Errors
/// Names the directory that could not be made or entered.
pub(super) fn enter(lab: &str, host: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let mut dir = hierarchy.mount_point.clone();
        for part in [ROOT, lab, host] {
            if hierarchy.is_v2() {
                enable_controllers(&dir);
            }
            let parent = dir.clone();
            dir.push(part);
            match fs::create_dir(&dir) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => {
                    return Err(e).with_context(|| format!("failed to create {}", dir.display()));
                }
            }
            if hierarchy.has("cpuset") {
                // A new cpuset is empty and lets nobody in.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    fs::read(parent.join(file))
                        .and_then(|value| fs::write(dir.join(file), value))
                        .with_context(|| format!("failed to copy {file} to {}", dir.display()))?;
                }
            }
        }
        fs::write(dir.join("cgroup.procs"), "0").with_context(|| format!("failed to enter {}", dir.display()))?;
    }
    Ok(())
}

/// Lets the children of a version 2 directory use what the directory has. Best effort: a controller that cannot be
/// handed down is one that the engine reports as missing.
fn enable_controllers(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_ascii_whitespace() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Mounts the hierarchies afresh on `/sys/fs/cgroup`, rooted at the caller's cgroup namespace. To be called after
/// `unshare(CLONE_NEWCGROUP | CLONE_NEWNS)` with the hierarchies that were visible before.
///
/// # Errors
/// Names the mount that failed.
pub(super) fn mount_private(seen: &SeenHierarchies) -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    let do_mount = |kind: &str, target: &Path, options: Option<&str>| {
        mount(Some(kind), target, Some(kind), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, options)
            .with_context(|| format!("failed to mount {kind} on {}", target.display()))
    };
    if let [only] = seen.0.as_slice()
        && only.is_v2()
    {
        do_mount("cgroup2", base, None)?;
        // Version 2 allows no processes beside children that have controllers.
        let leaf = base.join("init");
        fs::create_dir_all(&leaf).with_context(|| format!("failed to create {}", leaf.display()))?;
        fs::write(leaf.join("cgroup.procs"), "0").with_context(|| format!("failed to enter {}", leaf.display()))?;
        enable_controllers(base);
        return Ok(());
    }
    do_mount("tmpfs", base, Some("mode=755"))?;
    for hierarchy in &seen.0 {
        let Some(name) = hierarchy.mount_point.file_name() else {
            continue;
        };
        let target = base.join(name);
        fs::create_dir_all(&target).with_context(|| format!("failed to create {}", target.display()))?;
        match &hierarchy.v1 {
            None => do_mount("cgroup2", &target, None)?,
            Some(v1) if v1.starts_with("name=") => do_mount("cgroup", &target, Some(&format!("none,{v1}")))?,
            Some(v1) => {
                do_mount("cgroup", &target, Some(v1))?;
                for controller in v1.split(',').filter(|controller| name != *controller) {
                    symlink(name, base.join(controller))
                        .with_context(|| format!("failed to link {controller} to {}", target.display()))?;
                }
            }
        }
    }
    Ok(())
}

/// The hierarchies of the machine, remembered while they can still be seen.
pub(super) struct SeenHierarchies(Vec<Hierarchy>);

/// Looks at the hierarchies of the machine.
pub(super) fn see() -> Result<SeenHierarchies> {
    hierarchies().map(SeenHierarchies)
}

/// Whether `/proc/<pid>/cgroup` shows the process below a lab's directory.
pub(super) fn contains(lab: &str, pid: i32) -> bool {
    let inside = format!(":/{ROOT}/{lab}/");
    fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.lines().any(|line| line.contains(&inside)))
}

/// Names of labs that have left a directory in some hierarchy.
pub(super) fn labs() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for hierarchy in hierarchies()? {
        let Ok(entries) = fs::read_dir(hierarchy.mount_point.join(ROOT)) else {
            continue;
        };
        let dirs = entries.filter_map(Result::ok).filter(|entry| entry.path().is_dir());
        names.extend(dirs.filter_map(|entry| entry.file_name().into_string().ok()));
    }
    Ok(names)
}

/// Removes a lab's directories from every hierarchy.
///
/// # Errors
/// Names the directory that stays busy.
pub(super) fn remove(lab: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let root = hierarchy.mount_point.join(ROOT);
        let dir = root.join(lab);
        let mut last = None;
        wait_for(&format!("{} removed", dir.display()), REMOVE_TIMEOUT, || match remove_tree(&dir) {
            Ok(()) => Ok(Some(())),
            Err(e) => {
                last = Some(e);
                Ok(None)
            }
        })
        .with_context(|| last.map(|e| e.to_string()).unwrap_or_default())?;
        // Other labs may be in it: the kernel refuses then.
        let _ = fs::remove_dir(&root);
    }
    Ok(())
}

/// Control files vanish with their directory, so only directories are removed, deepest first.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_of_both_versions() {
        let hybrid = "\
30 20 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
34 30 0:27 /docker /elsewhere rw - cgroup cgroup rw,cpu,cpuacct
";
        let found = parse(hybrid);
        let kinds: Vec<Option<&str>> = found.iter().map(|h| h.v1.as_deref()).collect();
        assert_eq!(kinds, [Some("cpu,cpuacct"), Some("name=systemd"), None]);
        assert!(found[0].has("cpu") && !found[0].has("cpuset"));
        let unified = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse(unified), [Hierarchy { mount_point: PathBuf::from("/sys/fs/cgroup"), v1: None }]);
    }
}

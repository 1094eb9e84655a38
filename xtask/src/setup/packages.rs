//! Installs packages with apt-get without letting them start, enable or configure anything that was not asked for.
//!
//! What a package would do by itself, and what is done about it:
//! - start its daemon: `policy-rc.d` forbids it (invoke-rc.d(8), deb-systemd-invoke(1p)) while apt-get runs;
//! - be started at the next boot: units and init scripts that are enabled afterwards and were not before are disabled;
//! - PostgreSQL makes a cluster on port 5432: a drop-in for pg_createcluster(1) says no while apt-get runs;
//! - needrestart restarts the host's daemons: suspended;
//! - replace or remove other packages: `--no-upgrade`, `--no-remove`.
//!
//! No package touches the firewall but by a daemon's start, so that holds too. Must not decide *what* is installed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::guard::{SignalsHeld, TemporaryFile, holds_leftover, lock, recover};
use super::needs::{Need, find_binary};
use super::plan::choose_packages;
use crate::ui;

const POLICY: &str = "/usr/sbin/policy-rc.d";
/// Included by the distribution's `createcluster.conf`, whose `create_main_cluster` it overrides. The file itself
/// cannot be written beforehand: it is a configuration file under ucf(1), which would ask about it.
const NO_CLUSTER: &str = "/etc/postgresql-common/createcluster.d/zz-skein-setup.conf";
const LOCK: &str = "/run/skein-setup.lock";
const LISTS: &str = "/var/lib/apt/lists";
/// How long to wait for another apt-get or dpkg, in seconds: longer than a usual unattended upgrade.
const APT_LOCK_TIMEOUT_S: u32 = 300;

/// Removes what a set-up that was killed left on the host.
///
/// # Errors
/// I/O errors on the files in question.
pub fn recover_leftovers() -> anyhow::Result<()> {
    for path in [POLICY, NO_CLUSTER] {
        recover(Path::new(path)).with_context(|| format!("failed to restore {path} after an interrupted set-up"))?;
    }
    // No package ships this directory; when it is empty, a set-up made it. Else it stays.
    if let Some(dir) = Path::new(NO_CLUSTER).parent() {
        let _ = std::fs::remove_dir(dir);
    }
    Ok(())
}

/// Whether a set-up that was killed, or one that runs right now, has its temporary files on the host.
pub fn leftovers() -> bool {
    [POLICY, NO_CLUSTER].iter().any(|path| holds_leftover(Path::new(path)))
}

/// Takes the lock that makes set-ups one after another; held as long as the returned file lives.
///
/// # Errors
/// I/O errors on the lock file.
pub fn lock_host() -> anyhow::Result<std::fs::File> {
    lock(Path::new(LOCK), || ui::note("another set-up runs on this host; waiting for it"))
        .with_context(|| format!("failed to take the lock {LOCK}"))
}

/// Whether apt-get can be used.
pub fn apt_installed() -> bool {
    find_binary("apt-get").is_some() && find_binary("dpkg").is_some()
}

/// Whether package lists were ever fetched.
pub fn lists_present() -> bool {
    std::fs::read_dir(LISTS).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.contains("_Packages") // also compressed: _Packages.lz4, .gz
        })
    })
}

/// Installs what meets the needs. When a package is unknown or cannot be fetched, the lists may be old: they are
/// fetched and it is tried once more.
///
/// # Errors
/// No source offers a package; apt-get failed twice. Temporary changes are undone in every case.
pub fn install(missing: &[&'static Need], update_lists: bool) -> anyhow::Result<()> {
    let _signals = SignalsHeld::try_hold().context("failed to hold back signals")?;
    let _policy =
        TemporaryFile::put(Path::new(POLICY), "#!/bin/sh\n", "# 101: action forbidden by policy\nexit 101\n", 0o755)
            .with_context(|| format!("failed to write {POLICY}"))?;
    let _no_cluster = TemporaryFile::put(Path::new(NO_CLUSTER), "", "create_main_cluster = false\n", 0o644)
        .with_context(|| format!("failed to write {NO_CLUSTER}"))?;
    let before = autostarts(Path::new("/"));
    let installed = install_with_retry(missing, update_lists);
    // Also after a failure: some of the packages may be there by now.
    let disabled = disable(&before, &autostarts(Path::new("/")));
    installed?;
    disabled
}

fn install_with_retry(missing: &[&'static Need], update_lists: bool) -> anyhow::Result<()> {
    if update_lists {
        update()?;
    }
    match choose_and_install(missing) {
        Err(error) if !update_lists => {
            ui::note(&format!("{error:#}; fetching the package lists and trying once more"));
            update()?;
            choose_and_install(missing)
        }
        result => result,
    }
}

fn choose_and_install(missing: &[&'static Need]) -> anyhow::Result<()> {
    let names: BTreeSet<&str> = missing.iter().flat_map(|need| need.packages).copied().collect();
    let packages = choose_packages(missing, &available(&names)?)?;
    let mut args = vec!["install", "--yes", "--no-install-recommends", "--no-remove", "--no-upgrade"];
    args.extend(packages);
    apt_get(&args)
}

fn update() -> anyhow::Result<()> {
    apt_get(&["update"])
}

fn apt_get(args: &[&str]) -> anyhow::Result<()> {
    let line = format!("apt-get {}", args.join(" "));
    ui::note(&line);
    let status = Command::new("apt-get")
        .args(["-q", "-o", "Dpkg::Use-Pty=0", "-o", &format!("DPkg::Lock::Timeout={APT_LOCK_TIMEOUT_S}")])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("NEEDRESTART_SUSPEND", "1")
        .env("LC_ALL", "C")
        .env("PATH", system_path())
        .stdin(Stdio::null())
        .status()
        .context("failed to start apt-get")?;
    if !status.success() {
        bail!("failed to run `{line}`: {status}");
    }
    Ok(())
}

/// dpkg refuses to work without the sbin directories, which a user's PATH may lack after `sudo -E`.
fn system_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin");
    path
}

/// Those of `names` that could be installed from the configured sources.
fn available(names: &BTreeSet<&str>) -> anyhow::Result<BTreeSet<String>> {
    let output = Command::new("apt-cache")
        .arg("policy")
        .args(names)
        .env("LC_ALL", "C")
        .output()
        .context("failed to start apt-cache")?;
    Ok(parse_policy(&String::from_utf8_lossy(&output.stdout)))
}

/// Package names with a candidate, from `apt-cache policy`: a line `name:` and below it `  Candidate: <release>`.
fn parse_policy(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut name = "";
    for line in text.lines() {
        if let Some(candidate) = line.trim_start().strip_prefix("Candidate: ") {
            if candidate != "(none)" {
                found.insert(name.to_owned());
            }
        } else if !line.starts_with(' ') {
            name = line.trim_end_matches(':');
        }
    }
    found
}

/// Something that starts at boot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Autostart {
    /// A systemd unit that another unit wants or requires by a link in `/etc`.
    Unit(String),
    /// An init script with a start link in a runlevel.
    Script(String),
}

/// What starts at boot, under a root directory.
fn autostarts(root: &Path) -> BTreeSet<Autostart> {
    let mut found = BTreeSet::new();
    for dir in entries(&root.join("etc/systemd/system")) {
        if has_extension(&dir, "wants") || has_extension(&dir, "requires") {
            found.extend(entries(&dir).iter().filter_map(|link| file_name(link)).map(Autostart::Unit));
        }
    }
    for level in 0..=6 {
        for link in entries(&root.join(format!("etc/rc{level}.d"))) {
            // S<two digits><name>: started in this runlevel; K: stopped.
            let name = file_name(&link).unwrap_or_default();
            if let Some(script) = name.strip_prefix('S').and_then(|rest| rest.get(2..)) {
                found.insert(Autostart::Script(script.to_owned()));
            }
        }
    }
    found
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).map(|list| list.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name()?.to_str().map(str::to_owned)
}

/// Disables what starts at boot now and did not before. All are tried; the failures are reported together.
fn disable(before: &BTreeSet<Autostart>, after: &BTreeSet<Autostart>) -> anyhow::Result<()> {
    let mut failures = Vec::new();
    // Scripts first: update-rc.d may enable or disable the unit of the same name with them.
    let new: Vec<&Autostart> = after.difference(before).collect();
    for item in new.iter().rev() {
        let mut command = match item {
            Autostart::Script(name) => {
                let mut command = Command::new("update-rc.d");
                command.args([name.as_str(), "disable"]);
                command
            }
            Autostart::Unit(name) if find_binary("systemctl").is_some() => {
                let mut command = Command::new("systemctl");
                command.args(["--quiet", "disable", name.as_str()]);
                command
            }
            Autostart::Unit(name) => {
                let mut command = Command::new("deb-systemd-helper");
                command.args(["disable", name.as_str()]);
                command
            }
        };
        let output = command.env("PATH", system_path()).stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) => failures.push(format!("{item:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => failures.push(format!("{item:?}: {error}")),
        }
    }
    if !new.is_empty() {
        let names: Vec<&str> = new.iter().map(|item| item.name()).collect();
        ui::note(&format!("not started and not enabled at boot: {}", names.join(", ")));
    }
    if !failures.is_empty() {
        bail!("failed to disable what packages enabled at boot: {}", failures.join("; "));
    }
    Ok(())
}

impl Autostart {
    fn name(&self) -> &str {
        match self {
            Self::Unit(name) | Self::Script(name) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_of_apt_cache() {
        let text = "docker.io:\n  Installed: (none)\n  Candidate: 20.10.24+dfsg1-1\n  Version table:\n     20.10.24 500\n\
                    docker-cli:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n\
                    nftables:\n  Installed: 1.0.6-2\n  Candidate: 1.0.6-2\n";
        assert_eq!(parse_policy(text), ["docker.io".to_owned(), "nftables".to_owned()].into());
        assert!(parse_policy("").is_empty());
    }

    #[test]
    fn new_autostarts_are_found() {
        let root = tempfile::tempdir().unwrap();
        let add = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            // Links as on a real host: their target need not exist.
            std::os::unix::fs::symlink("/nowhere", path).unwrap();
        };
        add("etc/systemd/system/multi-user.target.wants/ssh.service");
        add("etc/rc3.d/S01ssh");
        let before = autostarts(root.path());
        add("etc/systemd/system/multi-user.target.wants/docker.service");
        add("etc/systemd/system/sockets.target.wants/docker.socket");
        add("etc/systemd/system/dbus-org.example.service");
        add("etc/rc2.d/S02docker");
        add("etc/rc3.d/S02docker");
        add("etc/rc0.d/K01docker");
        let after = autostarts(root.path());
        let new: Vec<_> = after.difference(&before).cloned().collect();
        assert_eq!(
            new,
            [
                Autostart::Unit("docker.service".into()),
                Autostart::Unit("docker.socket".into()),
                Autostart::Script("docker".into())
            ]
        );
    }

    #[test]
    fn a_host_without_either_init_has_no_autostarts() {
        let root = tempfile::tempdir().unwrap();
        assert!(autostarts(root.path()).is_empty());
    }

    #[test]
    fn nothing_new_disables_nothing() {
        let same = BTreeSet::from([Autostart::Script("ssh".into())]);
        disable(&same, &same).unwrap();
    }
}

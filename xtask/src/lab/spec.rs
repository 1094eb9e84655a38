//! What a lab consists of: names, addresses, and the state file that lets later calls find it.
//!
//! Owns the naming rules (everything a lab leaves on the machine can be found by the lab's name), the address plan
//! and the format of `state.json`. Knows nothing of how namespaces or engines are made. No tasks, no channels.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::process::ProcessId;

/// Where every lab keeps its state: one directory per lab, one below it per host.
pub const STATE_ROOT: &str = "/var/lib/skein-lab";

/// Name of the host that has no engine and is meant for the master.
pub const MASTER: &str = "master";

/// Longest name of a lab in bytes. With [`HOST_NAME_MAX`] the control socket's path stays below the 107 bytes of
/// `sockaddr_un`: 18 + 20 + 1 + 32 + 1 + 12 = 84.
pub const LAB_NAME_MAX: usize = 20;

/// Longest name of a host in bytes, see [`LAB_NAME_MAX`].
pub const HOST_NAME_MAX: usize = 32;

/// Most hosts of one lab: their addresses end in 10 to 209.
pub const HOSTS_MAX: usize = 200;

/// Labs that can exist at the same time: one per value of the third byte of 198.18.x.0/24.
const SLOTS: u16 = 256;

/// Format of `state.json`. A file with another number is not adopted, only taken down.
const STATE_FORMAT: u32 = 1;

/// One host of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSpec {
    /// Host name: lower-case letters, digits and inner hyphens, at most [`HOST_NAME_MAX`] bytes.
    pub name: String,
    /// Whether the host runs a `dockerd` of its own.
    pub engine: bool,
}

/// Where an engine keeps images, layers and volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataRoot {
    /// In memory, gone with the host and free of a disk's `fsync`. Loading an image takes as long as on disk.
    #[default]
    Tmpfs,
    /// In the lab's state directory, so that `fsync` has its real cost. Refused where that lies on overlayfs, since
    /// an engine's overlay2 driver cannot stack on it.
    Disk,
}

/// A whole lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabSpec {
    /// Name of the lab: lower-case letters, digits and inner hyphens, at most [`LAB_NAME_MAX`] bytes.
    pub name: String,
    /// The hosts; their order decides their addresses.
    pub hosts: Vec<HostSpec>,
    /// Where engines keep their data.
    pub data_root: DataRoot,
    /// `live-restore` of every engine: containers go on while their engine is stopped. Off, as a fresh installation.
    pub live_restore: bool,
    /// MTU of the underlay in bytes, 1280 to 9000.
    pub mtu: u16,
    /// Further command-line options for every `dockerd`.
    pub engine_options: Vec<String>,
}

impl LabSpec {
    /// A lab with a `master` host and `engines` hosts `h1`, `h2`, … with an engine each.
    pub fn new(name: impl Into<String>, engines: usize) -> Self {
        let master = HostSpec { name: MASTER.to_owned(), engine: false };
        let engines = (1..=engines).map(|i| HostSpec { name: format!("h{i}"), engine: true });
        Self {
            name: name.into(),
            hosts: std::iter::once(master).chain(engines).collect(),
            data_root: DataRoot::default(),
            live_restore: false,
            mtu: 1500,
            engine_options: Vec::new(),
        }
    }

    /// The same lab with one more host.
    #[must_use]
    pub fn host(mut self, name: impl Into<String>, engine: bool) -> Self {
        self.hosts.push(HostSpec { name: name.into(), engine });
        self
    }

    /// Checks names and bounds.
    ///
    /// # Errors
    /// Names the first value that is out of its range.
    pub fn validate(&self) -> Result<()> {
        check_name("lab", &self.name, LAB_NAME_MAX)?;
        ensure!(
            !self.hosts.is_empty() && self.hosts.len() <= HOSTS_MAX,
            "failed to plan lab {}: {} hosts, expected 1 to {HOSTS_MAX}",
            self.name,
            self.hosts.len()
        );
        ensure!(
            (1280..=9000).contains(&self.mtu),
            "failed to plan lab {}: mtu {} is outside 1280 to 9000",
            self.name,
            self.mtu
        );
        for (i, host) in self.hosts.iter().enumerate() {
            check_name("host", &host.name, HOST_NAME_MAX)?;
            ensure!(host.name != SWITCH, "failed to plan lab {}: the host name {SWITCH} is reserved", self.name);
            if self.hosts.iter().take(i).any(|other| other.name == host.name) {
                bail!("failed to plan lab {}: two hosts are named {}", self.name, host.name);
            }
        }
        Ok(())
    }
}

/// Stands in names for the namespace that holds the underlay's bridge.
pub(super) const SWITCH: &str = "switch";

/// Refuses what could not be part of a path, a namespace's name and a host name alike.
pub(super) fn check_name(kind: &str, name: &str, max: usize) -> Result<()> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |b: Option<&u8>| b.is_some_and(|b| inner(*b) && *b != b'-');
    let bytes = name.as_bytes();
    ensure!(
        bytes.len() <= max && bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last()),
        "failed to accept {kind} name {name:?}: expected 1 to {max} lower-case letters, digits and inner hyphens"
    );
    Ok(())
}

/// How far a lab has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// Being made, or its creator crashed while it was.
    Starting,
    /// Complete.
    Up,
}

/// What the state file says of one host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct HostState {
    pub(super) name: String,
    pub(super) holder: ProcessId,
    /// Inode of the host's mount namespace, by which its processes are found even when nothing else is left.
    pub(super) mount_ns: u64,
}

/// `state.json` of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LabState {
    pub(super) format: u32,
    pub(super) spec: LabSpec,
    pub(super) slot: u8,
    pub(super) phase: Phase,
    pub(super) creator: ProcessId,
    pub(super) hosts: Vec<HostState>,
}

impl LabState {
    /// Address of the host at `index` on the underlay: 198.18.slot.(10 + index), prefix length 24. 198.18.0.0/15 is
    /// set aside for tests of devices (RFC 2544), so that it collides with no engine's pool and no overlay.
    pub(super) fn ipv4(&self, index: usize) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.slot, host_byte(index))
    }

    /// IPv6 address of the host at `index`: fd53:6b6c:slot::(10 + index), prefix length 64.
    pub(super) fn ipv6(&self, index: usize) -> Ipv6Addr {
        Ipv6Addr::new(0xfd53, 0x6b6c, u16::from(self.slot), 0, 0, 0, 0, u16::from(host_byte(index)))
    }

    pub(super) fn load(name: &str) -> Result<Option<Self>> {
        let path = state_file(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("failed to read {}", path.display())),
        };
        let state: Self =
            serde_json::from_slice(&bytes).with_context(|| format!("failed to parse {}", path.display()))?;
        ensure!(
            state.format == STATE_FORMAT,
            "failed to use {}: format {} is not {STATE_FORMAT}\nhint: cargo xtask lab down --name {name}",
            path.display(),
            state.format
        );
        Ok(Some(state))
    }

    /// Writes the file beside its place and renames it, so that a reader never sees half of it.
    pub(super) fn save(&self) -> Result<()> {
        let path = state_file(&self.spec.name);
        let tmp = path.with_extension("json.new");
        let bytes = serde_json::to_vec_pretty(self).context("failed to encode the lab's state")?;
        fs::write(&tmp, bytes)
            .and_then(|()| fs::rename(&tmp, &path))
            .with_context(|| format!("failed to write {}", path.display()))
    }

    /// Takes a free slot and the name, and writes the first state file.
    ///
    /// # Errors
    /// Says so when the name is taken or every slot is.
    pub(super) fn reserve(spec: &LabSpec) -> Result<Self> {
        let _lock = lock(Path::new(STATE_ROOT), "labs")?;
        ensure!(!lab_dir(&spec.name).exists(), "failed to create lab {}: it exists already", spec.name);
        let used: Vec<u8> =
            names()?.iter().filter_map(|name| Self::load(name).ok().flatten()).map(|state| state.slot).collect();
        let slot = (0..SLOTS)
            .filter_map(|slot| u8::try_from(slot).ok())
            .find(|slot| !used.contains(slot))
            .with_context(|| format!("failed to find a free subnet: {SLOTS} labs exist"))?;
        let dir = lab_dir(&spec.name);
        fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let creator = ProcessId::current()?;
        let state =
            Self { format: STATE_FORMAT, spec: spec.clone(), slot, phase: Phase::Starting, creator, hosts: vec![] };
        state.save()?;
        Ok(state)
    }
}

fn host_byte(index: usize) -> u8 {
    u8::try_from(10 + index).expect("HOSTS_MAX keeps the last byte at 209 or less")
}

/// Directory of a lab.
pub(super) fn lab_dir(lab: &str) -> PathBuf {
    Path::new(STATE_ROOT).join(lab)
}

/// Directory of a host: control socket, logs, configuration, engine data.
pub(super) fn host_dir(lab: &str, host: &str) -> PathBuf {
    lab_dir(lab).join(host)
}

fn state_file(lab: &str) -> PathBuf {
    lab_dir(lab).join("state.json")
}

/// Names of all labs that have a state directory, sorted.
pub(super) fn names() -> Result<Vec<String>> {
    let entries = match fs::read_dir(STATE_ROOT) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e).with_context(|| format!("failed to list {STATE_ROOT}")),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| check_name("lab", name, LAB_NAME_MAX).is_ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Takes an exclusive lock that ends when the value is dropped or its process ends. Lock files start with a dot, so
/// that they are never taken for a lab.
pub(super) fn lock(dir: &Path, name: &str) -> Result<Flock<File>> {
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let path = dir.join(format!(".{name}.lock"));
    let file = File::create(&path).with_context(|| format!("failed to open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("failed to lock {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let check = |name: &str, ok: bool| {
            assert_eq!(check_name("lab", name, LAB_NAME_MAX).is_ok(), ok, "{name:?}");
        };
        check("a", true);
        check("lab-2", true);
        check("12345678901234567890", true);
        check("123456789012345678901", false);
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "..", "a_b", "ä"] {
            check(bad, false);
        }
    }

    #[test]
    fn spec_rejects_duplicates_and_reserved_names() {
        assert!(LabSpec::new("x", 3).validate().is_ok());
        assert!(LabSpec::new("x", 1).host("h1", true).validate().is_err());
        assert!(LabSpec::new("x", 1).host(SWITCH, false).validate().is_err());
        assert!(LabSpec::new("x", HOSTS_MAX).validate().is_err());
        assert!(LabSpec { mtu: 1000, ..LabSpec::new("x", 1) }.validate().is_err());
    }

    #[test]
    fn addresses_follow_the_order_of_hosts() {
        let spec = LabSpec::new("x", 2);
        let creator = ProcessId { pid: 1, start_ticks: 0 };
        let state = LabState { format: 1, spec, slot: 7, phase: Phase::Up, creator, hosts: vec![] };
        assert_eq!(state.ipv4(0).to_string(), "198.18.7.10");
        assert_eq!(state.ipv6(2).to_string(), "fd53:6b6c:7::c");
        assert_eq!(state.ipv4(HOSTS_MAX - 1).octets()[3], 209);
    }
}

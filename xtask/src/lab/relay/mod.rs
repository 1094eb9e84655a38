//! A relay in a host's cable: frames that come late, not at all, twice or in another order, for kernels without netem.
//!
//! ```text
//!  host                switch's namespace
//!  eth0 ─────────── pI  (port of the bridge)                                        without a relay
//!  eth0 ─────────── cI ══ relay process ══ uI ─────────── pI  (port of the bridge)    with one
//! ```
//!
//! The port keeps its name, so that cuts hold with and without a relay. Checksums and segments are left to the sender's
//! software while it is there (`ethtool`): a relay must see the frames that a wire would, not the bundles of 64 KiB, with
//! no checksum yet, that the kernel hands from one end of a veth pair to the other.
//!
//! | module | owns |
//! |---|---|
//! | `shape` | what becomes of a frame; pure |
//! | `process` | the process, its sockets and queue |
//!
//! Here: putting a relay in and out, and asking it. No tasks, no channels.

pub(super) mod process;
mod shape;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

pub use shape::Impairment;

use super::control::exchange;
use super::process::{ProcessId, run, tail, wait_for};
use super::spec::{LabState, SWITCH, host_dir};
use super::underlay::{self, BRIDGE, UNDERLAY_INTERFACE, batch, in_netns, netns, port};
use super::{find_program, holder, holder_program};

/// How long a relay may take to start, to answer and to end.
const RELAY_TIMEOUT: Duration = Duration::from_secs(10);

/// Offloads that hand over frames which no wire would carry: checksums left out, segments bundled.
const OFFLOADS: [&str; 4] = ["tx", "sg", "gso", "gro"];

/// What a relay is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Question {
    Look,
    Set { impairment: Impairment },
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum Answer {
    State(RelayState),
    Failed { error: String },
}

/// What a relay does and has done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelayState {
    /// The process.
    pub process: ProcessId,
    /// What happens to frames now.
    pub impairment: Impairment,
    /// What has happened to frames, in both directions.
    pub counters: Counters,
}

/// Frames since a relay was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Passed on.
    pub passed: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Of those passed on, the ones that were so twice.
    pub duplicated: u64,
    /// Of those passed on, the ones that were not delayed.
    pub overtook: u64,
    /// Dropped because too many waited.
    pub overflowed: u64,
}

/// Device of the cable in the switch's namespace, while a relay holds it.
fn host_end(index: usize) -> String {
    format!("c{index}")
}

/// Device towards the bridge.
fn switch_end(index: usize) -> String {
    format!("u{index}")
}

fn socket_path(host_dir: &Path) -> PathBuf {
    host_dir.join("relay.sock")
}

/// Does this to the frames of a host from now on; puts a relay into its cable when there is none.
pub(super) fn set(state: &LabState, index: usize, impairment: Impairment, seed: u64) -> Result<()> {
    impairment.validate()?;
    if !is_plugged(state, index)? {
        plug(state, index, seed)?;
    }
    ask(state, index, &Question::Set { impairment }).map(drop)
}

/// Takes the relay out of a host's cable. One that is not there is no error.
pub(super) fn remove(state: &LabState, index: usize) -> Result<()> {
    if !is_plugged(state, index)? {
        return Ok(());
    }
    // One that has died does not answer; its cable is put right all the same.
    if let Ok(relay) = ask(state, index, &Question::Look) {
        relay.process.signal(Signal::SIGKILL)?;
        wait_for("the relay gone", RELAY_TIMEOUT, || Ok((!relay.process.is_alive()).then_some(())))?;
    }
    let (lab, host, port) = (&state.spec.name, &state.spec.hosts[index].name, port(index));
    let cable = host_end(index);
    batch(
        Some(&netns(lab, SWITCH)),
        &format!(
            "link del {port}\nlink set {cable} down\nlink set {cable} name {port}\n\
             link set {port} alias {host} master {BRIDGE} up\n"
        ),
    )?;
    offloads(state, index, true)
}

/// What the relay of a host does; nothing when there is none.
pub(super) fn state_of(state: &LabState, index: usize) -> Result<Option<RelayState>> {
    if !is_plugged(state, index)? {
        return Ok(None);
    }
    ask(state, index, &Question::Look).map(Some)
}

fn ask(state: &LabState, index: usize, question: &Question) -> Result<RelayState> {
    let host = &state.spec.hosts[index].name;
    let path = socket_path(&host_dir(&state.spec.name, host));
    let answer = exchange(&path, question, RELAY_TIMEOUT)
        .with_context(|| format!("failed to ask the relay of {host}\nhint: cargo xtask lab relay {host} off"))?;
    match answer {
        Answer::State(state) => Ok(state),
        Answer::Failed { error } => bail!("{error}"),
    }
}

fn is_plugged(state: &LabState, index: usize) -> Result<bool> {
    let links = run(in_netns(&state.spec.name, SWITCH, "ip").args(["-o", "link", "show"]))?;
    let name = format!(" {}@", host_end(index));
    Ok(links.contains(&name))
}

/// Switches what a wire does not have off or on, where frames begin that reach the relay.
fn offloads(state: &LabState, index: usize, on: bool) -> Result<()> {
    let host = &state.spec.hosts[index].name;
    for (place, device) in [(SWITCH, port(index)), (host, UNDERLAY_INTERFACE.to_owned())] {
        let mut command = in_netns(&state.spec.name, place, "ethtool");
        command.args(["-K", &device]);
        run(command.args(OFFLOADS.iter().flat_map(|what| [*what, if on { "on" } else { "off" }])))?;
    }
    Ok(())
}

fn plug(state: &LabState, index: usize, seed: u64) -> Result<()> {
    let (lab, host, mtu) = (&state.spec.name, &state.spec.hosts[index].name, state.spec.mtu);
    ensure!(
        find_program("ethtool").is_some(),
        "failed to put a relay into the cable of {host}: ethtool is missing\nhint: apt-get install ethtool"
    );
    ensure!(
        underlay::limit_text(lab, index)?.is_empty(),
        "failed to put a relay into the cable of {host}: it has a limit\nhint: cargo xtask lab limit {host} none"
    );
    let (port, cable, uplink) = (port(index), host_end(index), switch_end(index));
    // A device can only get another name while it is down. Without addresses of its own nothing but the relay sends there.
    batch(
        Some(&netns(lab, SWITCH)),
        &format!(
            "link set {port} down\nlink set {port} nomaster\nlink set {port} name {cable}\n\
             link add {port} mtu {mtu} type veth peer name {uplink} mtu {mtu}\n\
             link set {cable} addrgenmode none\nlink set {cable} up\n\
             link set {uplink} addrgenmode none\nlink set {uplink} up\n\
             link set {port} alias {host} master {BRIDGE} up\n"
        ),
    )?;
    offloads(state, index, false)?;
    let dir = host_dir(lab, host);
    let log = dir.join("relay.log");
    let output = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
    let errors = output.try_clone().context("failed to share the log file")?;
    let program = holder_program()?.display().to_string();
    let mut child = in_netns(lab, SWITCH, &program)
        .args(["lab", "relay-process", lab, host, &seed.to_string()])
        .env_clear()
        .envs([("PATH", holder::HOST_PATH), ("LANG", "C.UTF-8")])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("failed to start {program}"))?;
    wait_for(&format!("the relay of {host}"), RELAY_TIMEOUT, || {
        if let Some(status) = child.try_wait().context("failed to look after the relay")? {
            bail!("the relay ended: {status}");
        }
        Ok(ask(state, index, &Question::Look).ok())
    })
    .with_context(|| format!("its log ends with:\n{}", tail(&log, 20)))
    .map(drop)
}

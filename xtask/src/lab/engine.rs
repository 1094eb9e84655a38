//! The engine of a host: a real `dockerd`, configured, started through the holder, and asked whether it is ready.
//!
//! Knows nothing of images. No tasks, no channels.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::host::{Host, Process, Spawn};
use super::process::wait_for;
use super::spec::{LabState, MASTER};

/// The engine's socket, inside the host.
pub const ENGINE_SOCKET: &str = "/run/docker.sock";

/// Port of [`super::Lab::registry`] on the master host.
pub const REGISTRY_PORT: u16 = 5000;

/// The name the engine's process has in [`Host::processes`].
pub(super) const PROCESS: &str = "dockerd";

/// How long an engine may take to answer. Alone it takes half a second; 47 s were seen when plugins were missing.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the engine of the host with this directory keeps its data.
pub(super) fn data_root(host_dir: &Path) -> PathBuf {
    host_dir.join("docker")
}

/// Writes the engine's configuration. Everything is said in the file and the file is named on the command line, so
/// that the machine's own `/etc/docker/daemon.json` has no effect.
pub(super) fn write_config(state: &LabState, host_dir: &Path) -> Result<()> {
    let registry = state.spec.hosts.iter().position(|host| host.name == MASTER);
    let insecure: Vec<String> = registry
        .map(|i| {
            let (v4, v6) = (state.ipv4(i), state.ipv6(i));
            vec![
                format!("{MASTER}:{REGISTRY_PORT}"),
                format!("{v4}:{REGISTRY_PORT}"),
                format!("[{v6}]:{REGISTRY_PORT}"),
            ]
        })
        .unwrap_or_default();
    // /run is the host's own: the usual paths are private already, and tools find them.
    let config = json!({
        "hosts": [format!("unix://{ENGINE_SOCKET}")],
        "data-root": data_root(host_dir),
        "exec-root": "/run/docker",
        "pidfile": "/run/docker.pid",
        "storage-driver": "overlay2",
        "live-restore": state.spec.live_restore,
        "insecure-registries": insecure,
    });
    let path = config_file(host_dir);
    let text = serde_json::to_vec_pretty(&config).context("failed to encode the engine's configuration")?;
    fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
}

fn config_file(host_dir: &Path) -> PathBuf {
    host_dir.join("daemon.json")
}

/// Starts the engine and waits until it answers.
///
/// # Errors
/// With the end of the engine's log, when it exits or does not answer in time.
pub(super) fn start(host: &Host, options: &[String]) -> Result<Process> {
    let spawn = Spawn::new("dockerd").name(PROCESS).arg("--config-file").arg(config_file(host.dir()));
    let process = host.spawn(options.iter().fold(spawn, Spawn::arg))?;
    let socket = host.engine_socket();
    wait_for(&format!("the engine of {} ready", host.name()), READY_TIMEOUT, || {
        if !process.is_running() {
            bail!("the engine of {} ended", host.name());
        }
        Ok(ping(&socket).then_some(()))
    })
    .with_context(|| {
        format!("failed to start the engine of {}; its log ends with:\n{}", host.name(), process.log_tail())
    })?;
    Ok(process)
}

/// Docker Engine API, `GET /_ping`.
pub(super) fn ping(socket: &Path) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")?;
        let mut answer = [0; 64];
        let n = stream.read(&mut answer)?;
        let line = answer.get(..n).unwrap_or_default();
        Ok(line.starts_with(b"HTTP/1.0 200") || line.starts_with(b"HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

//! The host's container engine, through its API on a unix socket (Docker Engine API 1.40 and later).
//!
//! Owns the client, the translation of our words into the engine's and back, and the labels that mark what is ours. It
//! must not know assignments' histories, plans or the ledger: it does one thing at a time as told. No tasks of its
//! own; [`Engine::events`] returns a stream that its reader drives.
//!
//! An engine that does not answer is [`EngineError::Unreachable`], and [`Engine::state`] says so; the next call that
//! is answered ends that state. The API version is negotiated at the first call after each loss, since an engine may
//! be upgraded while we run.

mod attached;
mod containers;
pub mod create;
mod error;
mod events;
#[cfg(test)]
mod fuzz;
mod images;
pub mod labels;
mod networks;
mod streams;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bollard::{API_DEFAULT_VERSION, Docker, errors::Error as Bollard, models::SystemInfo};
use skein_api::NodeDescription;
use tokio::sync::watch;

pub use self::{
    attached::Named,
    containers::Inspected,
    error::EngineError,
    events::EngineEvent,
    images::Pulled,
    networks::EngineNetworkSpec,
    streams::{ExecOutput, ExecProcess, LogStream},
};

/// Longest wait for an answer of the engine, seconds. Creating a container on a loaded host takes seconds; a stop gets
/// its grace on top.
pub const CALL_TIMEOUT_S: u64 = 120;

/// How to reach the engine, and whose it is for.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Its unix socket.
    pub socket: PathBuf,
    /// Id of the cluster; goes into every label.
    pub cluster: String,
    /// Id of the node.
    pub node: String,
    /// Parent cgroup of all containers, if the host's operator wants one.
    pub cgroup_parent: Option<String>,
    /// Log files of a container: size of each.
    pub log_max_size: String,
    /// Log files of a container: how many.
    pub log_max_files: u32,
}

impl EngineConfig {
    /// The defaults: logs take at most 3 files of 10 MB per container.
    pub fn new(socket: impl Into<PathBuf>, cluster: impl Into<String>, node: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            cluster: cluster.into(),
            node: node.into(),
            cgroup_parent: None,
            log_max_size: "10m".into(),
            log_max_files: 3,
        }
    }
}

/// Whether the engine answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EngineState {
    /// Not asked yet.
    #[default]
    Unknown,
    /// It does.
    Ready,
    /// It does not.
    Unreachable {
        /// Why.
        error: String,
    },
}

/// The engine. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    config: EngineConfig,
    client: Mutex<Option<Docker>>,
    state: watch::Sender<EngineState>,
    cgroup_parent: Mutex<Option<String>>,
}

/// Who makes the engine's cgroups (Docker Engine API, `SystemInfo.CgroupDriver`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The engine itself: parents are paths.
    Cgroupfs,
    /// systemd: parents are slices, and their limits are systemd's to set.
    Systemd,
    /// Nobody: a rootless engine without delegation.
    None,
}

impl Engine {
    /// An engine that is reached at the first call.
    pub fn new(config: EngineConfig) -> Self {
        let state = watch::Sender::new(EngineState::Unknown);
        let cgroup_parent = Mutex::new(config.cgroup_parent.clone());
        Self { shared: Arc::new(Shared { config, client: Mutex::new(None), state, cgroup_parent }) }
    }

    /// Parent cgroup of the containers that are made from now on; none: the engine's own.
    pub fn cgroup_parent(&self) -> Option<String> {
        self.shared.cgroup_parent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets it: which form it has follows from the engine's [`CgroupDriver`], which is known only when it answers.
    pub fn set_cgroup_parent(&self, parent: Option<String>) {
        *self.shared.cgroup_parent.lock().unwrap_or_else(PoisonError::into_inner) = parent;
    }

    /// How it is reached.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Whether it answers, by the last call.
    pub fn state(&self) -> watch::Receiver<EngineState> {
        self.shared.state.subscribe()
    }

    fn socket(&self) -> &Path {
        &self.shared.config.socket
    }

    /// The client, with the API version that both sides speak.
    async fn client(&self) -> Result<Docker, EngineError> {
        if let Some(client) = &*self.shared.client.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok(client.clone());
        }
        let path = self.socket().to_string_lossy();
        let connected =
            async { Docker::connect_with_unix(&path, CALL_TIMEOUT_S, API_DEFAULT_VERSION)?.negotiate_version().await };
        match connected.await {
            Ok(client) => {
                *self.shared.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(client.clone());
                self.say(EngineState::Ready);
                Ok(client)
            }
            Err(error) => Err(self.failed("reach", "the engine", error)),
        }
    }

    /// The client for a call that takes up to `extra` longer than others.
    async fn client_for(&self, extra: Duration) -> Result<Docker, EngineError> {
        Ok(self.client().await?.with_timeout(Duration::from_secs(CALL_TIMEOUT_S) + extra))
    }

    fn failed(&self, verb: &'static str, thing: &str, error: Bollard) -> EngineError {
        let error = EngineError::from_bollard(error, self.socket(), verb, thing);
        if let EngineError::Unreachable { reason, .. } = &error {
            *self.shared.client.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.say(EngineState::Unreachable { error: reason.clone() });
        } else {
            self.say(EngineState::Ready);
        }
        error
    }

    fn say(&self, state: EngineState) {
        self.shared.state.send_if_modified(|s| {
            // Its reason may change from call to call: the first one stays.
            let both = |a: &EngineState, b: &EngineState| std::mem::discriminant(a) == std::mem::discriminant(b);
            let new = !both(s, &state);
            if new {
                match &state {
                    EngineState::Unreachable { error } => {
                        tracing::warn!(socket = %self.socket().display(), error, "engine does not answer");
                    }
                    _ => tracing::info!(socket = %self.socket().display(), "engine answers"),
                }
                *s = state;
            }
            new
        });
    }

    /// The engine's part of a node's description: the host's name, what it has, and what the engine is. The fields
    /// that only the agent knows keep their defaults (Docker Engine API, `GET /info`).
    pub async fn describe(&self) -> Result<NodeDescription, EngineError> {
        let client = self.client().await?;
        let info = client.info().await.map_err(|e| self.failed("describe", "the engine", e))?;
        Ok(read_info(info))
    }

    /// Who makes its cgroups (Docker Engine API, `GET /info`).
    pub async fn cgroup_driver(&self) -> Result<CgroupDriver, EngineError> {
        use bollard::models::SystemInfoCgroupDriverEnum as Driver;
        let client = self.client().await?;
        let info = client.info().await.map_err(|e| self.failed("describe", "the engine", e))?;
        Ok(match info.cgroup_driver {
            Some(Driver::SYSTEMD) => CgroupDriver::Systemd,
            // Engines older than the field have no other.
            Some(Driver::CGROUPFS | Driver::EMPTY) | None => CgroupDriver::Cgroupfs,
            Some(Driver::NONE) => CgroupDriver::None,
        })
    }

    /// Whether the engine answers now.
    pub async fn ping(&self) -> Result<(), EngineError> {
        let client = self.client().await?;
        client.ping().await.map(|_| self.say(EngineState::Ready)).map_err(|e| self.failed("ping", "the engine", e))
    }
}

fn read_info(info: SystemInfo) -> NodeDescription {
    let plugins = info.plugins.unwrap_or_default();
    let label = |l: String| match l.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => (l, String::new()),
    };
    let positive = |n: Option<i64>| u64::try_from(n.unwrap_or(0)).unwrap_or(0);
    NodeDescription {
        hostname: info.name.unwrap_or_default(),
        capacity: skein_api::Resources {
            nano_cpus: positive(info.ncpu).saturating_mul(1_000_000_000),
            mem_bytes: positive(info.mem_total),
        },
        os: info.os_type.unwrap_or_default(),
        arch: info.architecture.unwrap_or_default(),
        operating_system: info.operating_system.unwrap_or_default(),
        kernel: info.kernel_version.unwrap_or_default(),
        engine_version: info.server_version.unwrap_or_default(),
        engine_labels: info.labels.unwrap_or_default().into_iter().map(label).collect(),
        storage_driver: info.driver.unwrap_or_default(),
        execution_driver: info.default_runtime.unwrap_or_default(),
        volume_plugins: plugins.volume.unwrap_or_default(),
        network_plugins: plugins.network.unwrap_or_default(),
        ..Default::default()
    }
}

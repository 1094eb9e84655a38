//! A model of a container engine: typed state, refuses what a real engine refuses, and fails, lies and restarts when a
//! fault says so. Knows no time but the one it is told, and nothing of the agent above it.

use std::collections::{BTreeMap, BTreeSet};

use agent_core::{ActionError, Container, ContainerState, EngineNetwork};
use skein_api::{Health, NetworkId, TaskAssignment, TaskId, UnixMillis};

/// How an engine misbehaves, for as long as a fault lasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moods {
    /// Of a thousand calls, how many fail without effect.
    pub(crate) fails: u64,
    /// Of a thousand calls, how many have their effect and yet answer with an error (a time-out).
    pub(crate) times_out: u64,
    /// Calls take this many times as long; 0 counts as 1.
    pub(crate) slow: u64,
    /// Its events get lost: what changes is seen at the next full look only.
    pub(crate) mute: bool,
}

/// One host's engine.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    pub(crate) running: bool,
    pub(crate) moods: Moods,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) networks: BTreeMap<NetworkId, EngineNetwork>,
    /// Images that were pulled.
    pub(crate) images: BTreeSet<String>,
    /// Containers that its events told of since they were last taken.
    touched: BTreeSet<String>,
    /// Events got lost since everything was last looked at.
    pub(crate) missed: bool,
    serial: u64,
}

fn refused(message: impl Into<String>) -> ActionError {
    ActionError { message: message.into(), fatal: false }
}

impl Engine {
    /// An engine that runs and has nothing.
    pub(crate) fn new() -> Self {
        Self { running: true, ..Self::default() }
    }

    fn touch(&mut self, id: &str) {
        if self.moods.mute {
            self.missed = true;
        } else {
            self.touched.insert(id.to_owned());
        }
    }

    /// Somebody looks at a container, whatever its events tell.
    pub(crate) fn look_at(&mut self, id: &str) {
        self.touched.insert(id.to_owned());
    }

    /// Somebody looks for the container of a task.
    pub(crate) fn look_at_task(&mut self, task: &TaskId) {
        let found = self.containers.values().find(|c| c.task == *task).map(|c| c.id.clone());
        self.touched.extend(found);
    }

    /// What its events told since the last call.
    pub(crate) fn take_events(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.touched)
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.touched.is_empty()
    }

    /// Makes a container; the name follows from the task, so there is one per task.
    pub(crate) fn create(&mut self, task: &TaskAssignment, host: u32, now: UnixMillis) -> Result<String, ActionError> {
        if let Some(there) = self.containers.values().find(|c| c.task == task.id) {
            // As the driver: a container of that name which carries the task's label is the one that was wanted.
            return Ok(there.id.clone());
        }
        if let Some(missing) = task.networks.iter().find(|n| !self.networks.contains_key(n)) {
            return Err(refused(format!("network {missing} not found")));
        }
        self.serial += 1;
        let id = format!("{host:05x}-{:06x}", self.serial);
        let spec = &task.spec.container;
        let container = Container {
            id: id.clone(),
            task: task.id.clone(),
            service: task.service.clone(),
            slot: task.slot,
            stop_grace_ms: spec.stop_grace_ms.unwrap_or(skein_api::DEFAULT_STOP_GRACE_MS),
            image: spec.image.clone(),
            networks: task.networks.iter().cloned().collect(),
            addresses: Vec::new(),
            ports: task.spec.ports.clone(),
            state: ContainerState::Created,
            exit_code: 0,
            oom_killed: false,
            error: None,
            health: spec.healthcheck.as_ref().map(|_| Health::Starting),
            created_at: now,
            started_at: UnixMillis(0),
            finished_at: UnixMillis(0),
        };
        self.images.insert(spec.image.clone());
        self.containers.insert(id.clone(), container);
        self.touch(&id);
        Ok(id)
    }

    /// Starts a container; true when it did not run before.
    pub(crate) fn start(&mut self, id: &str, now: UnixMillis) -> Result<bool, ActionError> {
        let Some(c) = self.containers.get_mut(id) else { return Err(refused(format!("no such container: {id}"))) };
        if c.state.is_live() {
            return Ok(false);
        }
        // An engine whose clock went back still shows another start.
        let now = if now == c.started_at { now.plus_ms(1) } else { now };
        (c.state, c.started_at) = (ContainerState::Running, now);
        c.health = c.health.map(|_| Health::Starting);
        self.touch(id);
        Ok(true)
    }

    /// Ends a container's process; true when it ran.
    pub(crate) fn end(&mut self, id: &str, exit_code: i64, now: UnixMillis) -> bool {
        let Some(c) = self.containers.get_mut(id).filter(|c| c.state.is_live()) else { return false };
        (c.state, c.exit_code, c.finished_at) = (ContainerState::Exited, exit_code, now);
        self.touch(id);
        true
    }

    pub(crate) fn remove(&mut self, id: &str) -> Result<(), ActionError> {
        if self.containers.get(id).is_some_and(|c| c.state.is_live()) {
            return Err(refused(format!("cannot remove container {id}: it is running")));
        }
        if self.containers.remove(id).is_some() {
            self.touch(id);
        }
        Ok(())
    }

    pub(crate) fn set_health(&mut self, id: &str, health: Health) {
        if let Some(c) = self.containers.get_mut(id).filter(|c| c.state.is_live() && c.health.is_some()) {
            c.health = Some(health);
            self.touch(id);
        }
    }

    pub(crate) fn ensure_network(&mut self, network: &NetworkId) {
        let made = EngineNetwork { engine_id: format!("e-{network}"), name: network.to_string() };
        self.networks.insert(network.clone(), made);
    }

    pub(crate) fn remove_network(&mut self, network: &NetworkId) -> Result<(), ActionError> {
        if self.containers.values().any(|c| c.state.is_live() && c.networks.contains(network)) {
            return Err(refused(format!("network {network} has active endpoints")));
        }
        self.networks.remove(network);
        Ok(())
    }

    /// Ids of the containers that run.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Container> {
        self.containers.values().filter(|c| c.state.is_live())
    }
}

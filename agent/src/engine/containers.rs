//! Containers of ours: list, inspect, create, start, stop, remove.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use agent_core::{Container, ContainerState, EngineNetwork};
use bollard::{
    models::{ContainerInspectResponse, ContainerStateStatusEnum as Status, HealthStatusEnum, NetworkSettings},
    query_parameters::{
        CreateContainerOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder,
        RemoveContainerOptionsBuilder, StartContainerOptions, StopContainerOptionsBuilder,
    },
};
use skein_api::{DEFAULT_STOP_GRACE_MS, Health, NetworkId, ServiceId, TaskAddress, TaskAssignment, TaskId, UnixMillis};

use super::{
    Engine, EngineConfig, EngineError,
    create::{self, CreateInput},
    labels,
};

/// A container of ours, and to which of the engine's networks it is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// In the core's words.
    pub container: Container,
    /// Names of its networks in the engine.
    pub attached: BTreeSet<String>,
    /// With a terminal: its output is one stream.
    pub tty: bool,
}

impl Engine {
    /// Ids of all our containers, ended ones too.
    pub async fn list(&self) -> Result<Vec<String>, EngineError> {
        Ok(self.list_tasks().await?.into_keys().collect())
    }

    /// Ids of all our containers, ended ones too, with the task that the label names. Waits for no container.
    pub async fn list_tasks(&self) -> Result<BTreeMap<String, Option<TaskId>>, EngineError> {
        self.list_labelled(labels::CLUSTER, &self.config().cluster).await
    }

    async fn list_labelled(&self, label: &str, value: &str) -> Result<BTreeMap<String, Option<TaskId>>, EngineError> {
        let filter = format!("{label}={value}");
        let options = ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&HashMap::from([("label", vec![filter])]))
            .build();
        let client = self.client().await?;
        let found = client.list_containers(Some(options)).await.map_err(|e| self.failed("list", "containers", e))?;
        let task = |labels: Option<HashMap<String, String>>| Some(TaskId::new(labels?.remove(labels::TASK)?));
        Ok(found.into_iter().filter_map(|c| Some((c.id?, task(c.labels)))).collect())
    }

    /// One container by the engine's id or name; none: it is gone, or it is not ours.
    pub async fn inspect(
        &self,
        id: &str,
        networks: &BTreeMap<NetworkId, EngineNetwork>,
    ) -> Result<Option<Inspected>, EngineError> {
        let client = self.client().await?;
        match client.inspect_container(id, None::<InspectContainerOptions>).await {
            Ok(answer) => Ok(read(answer, &self.config().cluster, networks)),
            Err(error) => match self.failed("inspect", &format!("container {id}"), error) {
                error if error.is_not_found() => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The container of a task: the one that runs, else the newest.
    pub async fn find(&self, task: &TaskId) -> Result<Option<Inspected>, EngineError> {
        let mut best: Option<Inspected> = None;
        for id in self.list_labelled(labels::TASK, task.as_str()).await?.into_keys() {
            if let Some(found) = self.inspect(&id, &BTreeMap::new()).await? {
                let order = |i: &Inspected| (i.container.state.is_live(), i.container.created_at);
                if best.as_ref().is_none_or(|b| order(b) < order(&found)) {
                    best = Some(found);
                }
            }
        }
        Ok(best)
    }

    /// Makes the container and returns the engine's id. If one of this name is there from before a crash and is the
    /// task's, that one is returned.
    pub async fn create(&self, assignment: &TaskAssignment, input: &CreateInput) -> Result<String, EngineError> {
        let name = create::container_name(assignment);
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let config = EngineConfig { cgroup_parent: self.cgroup_parent(), ..self.config().clone() };
        let body = create::request(&config, assignment, input);
        let client = self.client().await?;
        match client.create_container(Some(options), body).await {
            Ok(made) => {
                for warning in made.warnings {
                    tracing::warn!(container = name, warning, "engine warned when it made a container");
                }
                Ok(made.id)
            }
            Err(error) => {
                let error = self.failed("create", &format!("container {name}"), error);
                if matches!(error, EngineError::Conflict { .. })
                    && let Ok(Some(found)) = self.inspect(&name, &BTreeMap::new()).await
                    && found.container.task == assignment.id
                {
                    return Ok(found.container.id);
                }
                Err(error)
            }
        }
    }

    /// Starts it; one that runs is no error.
    pub async fn start(&self, id: &str) -> Result<(), EngineError> {
        let client = self.client().await?;
        let started = client.start_container(id, None::<StartContainerOptions>).await;
        started.map_err(|e| self.failed("start", &format!("container {id}"), e))
    }

    /// Stop signal, then SIGKILL after `grace`; returns when it has ended. One that does not run is no error.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<(), EngineError> {
        // The API counts in whole seconds; less than the user's time would be a broken promise.
        let seconds = i32::try_from(grace.as_millis().div_ceil(1_000)).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        let client = self.client_for(grace).await?;
        match client.stop_container(id, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.failed("stop", &format!("container {id}"), error) {
                error if error.is_not_found() => Ok(()),
                error => Err(error),
            },
        }
    }

    /// SIGKILL at once (the fence).
    pub async fn kill(&self, id: &str) -> Result<(), EngineError> {
        self.stop(id, Duration::ZERO).await
    }

    /// Removes one that does not run, with its anonymous volumes; one that is gone is no error.
    pub async fn remove(&self, id: &str) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::default().v(true).force(false).build();
        let client = self.client().await?;
        match client.remove_container(id, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.failed("remove", &format!("container {id}"), error) {
                error if error.is_not_found() => Ok(()),
                error => Err(error),
            },
        }
    }
}

pub(super) fn read(
    answer: ContainerInspectResponse,
    cluster: &str,
    networks: &BTreeMap<NetworkId, EngineNetwork>,
) -> Option<Inspected> {
    let config = answer.config?;
    let labels = config.labels?;
    if labels.get(labels::CLUSTER).map(String::as_str) != Some(cluster) {
        return None;
    }
    let state = answer.state?;
    let settings = answer.network_settings.unwrap_or_default();
    let attached = settings.networks.iter().flatten().map(|(name, _)| name.clone()).collect();
    let time = |text: Option<&String>| text.and_then(|t| parse_time(t)).unwrap_or_default();
    let number = |label: &str| labels.get(label).and_then(|v| v.parse::<u64>().ok());
    let container = Container {
        id: answer.id?,
        task: TaskId::new(labels.get(labels::TASK)?.as_str()),
        service: labels.get(labels::SERVICE).map(|s| ServiceId::new(s.as_str())),
        slot: number(labels::SLOT).and_then(|n| n.try_into().ok()).unwrap_or(0),
        stop_grace_ms: number(labels::STOP_GRACE_MS).unwrap_or(DEFAULT_STOP_GRACE_MS),
        image: labels.get(labels::IMAGE).cloned().or(config.image).unwrap_or_default(),
        networks: labels.get(labels::NETWORKS).iter().flat_map(|l| l.split(',')).map(NetworkId::new).collect(),
        addresses: addresses(&settings, networks),
        ports: create::ports_of(answer.host_config.as_ref().and_then(|h| h.port_bindings.as_ref())),
        state: match state.status? {
            Status::CREATED => ContainerState::Created,
            Status::RUNNING | Status::RESTARTING | Status::STOPPING => ContainerState::Running,
            Status::PAUSED => ContainerState::Paused,
            Status::REMOVING => ContainerState::Removing,
            Status::DEAD => ContainerState::Dead,
            Status::EXITED | Status::EMPTY => ContainerState::Exited,
        },
        exit_code: state.exit_code.unwrap_or(0),
        oom_killed: state.oom_killed.unwrap_or(false),
        error: state.error.filter(|e| !e.is_empty()),
        health: match state.health.and_then(|h| h.status) {
            Some(HealthStatusEnum::STARTING) => Some(Health::Starting),
            Some(HealthStatusEnum::HEALTHY) => Some(Health::Healthy),
            Some(HealthStatusEnum::UNHEALTHY) => Some(Health::Unhealthy),
            Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY) | None => None,
        },
        created_at: time(answer.created.as_ref()),
        started_at: time(state.started_at.as_ref()),
        finished_at: time(state.finished_at.as_ref()),
    };
    Some(Inspected { container, attached, tty: config.tty.unwrap_or(false) })
}

fn addresses(settings: &NetworkSettings, networks: &BTreeMap<NetworkId, EngineNetwork>) -> Vec<TaskAddress> {
    let Some(endpoints) = &settings.networks else { return Vec::new() };
    networks
        .iter()
        .filter_map(|(id, network)| {
            let endpoint = endpoints.get(&network.name)?;
            let v4 = endpoint.ip_address.as_deref().and_then(|a| a.parse().ok());
            let v6 = endpoint.global_ipv6_address.as_deref().and_then(|a| a.parse().ok());
            (v4.is_some() || v6.is_some()).then(|| TaskAddress { network: id.clone(), v4, v6 })
        })
        .collect()
}

/// The engine's times: RFC 3339 in UTC with up to nine digits after the point. The year 1 stands for never.
fn parse_time(text: &str) -> Option<UnixMillis> {
    let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-');
    let year: i32 = date.next()?.parse().ok()?;
    let month: u8 = date.next()?.parse().ok()?;
    let day: u8 = date.next()?.parse().ok()?;
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let mut clock = clock.split(':');
    let hour: u8 = clock.next()?.parse().ok()?;
    let minute: u8 = clock.next()?.parse().ok()?;
    let second: u8 = clock.next()?.parse().ok()?;
    let millis: String = fraction.chars().chain("000".chars()).take(3).collect();
    let date = time::Date::from_calendar_date(year, month.try_into().ok()?, day).ok()?;
    let at = date.with_hms(hour, minute, second).ok()?.assume_utc().unix_timestamp();
    let at = u64::try_from(at).unwrap_or(0);
    Some(UnixMillis(if at == 0 { 0 } else { at * 1_000 + millis.parse::<u64>().ok()? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, expected) in [
            ("2024-02-29T12:34:56.123456789Z", Some(1_709_210_096_123)),
            ("2024-02-29T12:34:56.5Z", Some(1_709_210_096_500)),
            ("1970-01-01T00:00:01Z", Some(1_000)),
            ("0001-01-01T00:00:00Z", Some(0)),
            ("yesterday", None),
        ] {
            assert_eq!(parse_time(text), expected.map(UnixMillis), "{text}");
        }
    }
}

//! Finding objects by what a user typed: a name, an id, or a unique prefix of one.

use skein_api::{ApiError, Network, Node, NodeId, Service, Task, TaskId, TaskState, did_you_mean};

use crate::{core::Core, model::Model};

/// Shortest prefix of an id that counts as a reference.
const MIN_PREFIX: usize = 4;

/// Names that are looked at for the one that was meant; a mistyped name costs at most some milliseconds.
const CANDIDATES_MAX: usize = 4_096;

/// A refusal because something is not there.
pub(crate) fn not_found(kind: &str, reference: &str, list: &str) -> ApiError {
    ApiError::new("not_found", format!("no {kind} {reference:?}")).with_hint(format!("skein {list}"))
}

/// As [`not_found`], with the name among `names` that was probably meant.
pub(crate) fn mistyped<'a>(kind: &str, reference: &str, list: &str, names: impl Iterator<Item = &'a str>) -> ApiError {
    let mut refusal = not_found(kind, reference, list);
    if let Some(meant) = did_you_mean(reference, names.take(CANDIDATES_MAX)) {
        refusal.message.push_str(&format!("; did you mean {meant:?}?"));
    }
    refusal
}

/// Picks the one item whose name or id is `reference`, or whose id starts with it.
fn pick<'a, T: 'a>(
    items: impl Iterator<Item = &'a T> + Clone,
    reference: &str,
    id: impl Fn(&'a T) -> &'a str,
    name: impl Fn(&'a T) -> &'a str,
    kind: &str,
    list: &str,
) -> Result<&'a T, ApiError> {
    let exact = items.clone().find(|i| name(i) == reference || id(i) == reference);
    if let Some(item) = exact {
        return Ok(item);
    }
    let mut found = items.clone().filter(|i| reference.len() >= MIN_PREFIX && id(i).starts_with(reference));
    match (found.next(), found.next()) {
        (Some(item), None) => Ok(item),
        (Some(_), Some(_)) => {
            Err(ApiError::new("ambiguous", format!("more than one {kind} starts with {reference:?}")))
        }
        (None, _) => Err(mistyped(kind, reference, list, items.map(name))),
    }
}

impl Model {
    /// The node that a user means.
    ///
    /// # Errors
    /// None or more than one.
    pub fn find_node(&self, reference: &str) -> Result<&Node, ApiError> {
        if let Some(node) = self.node_named(reference).or_else(|| self.nodes.get(&NodeId::new(reference))) {
            return Ok(node);
        }
        pick(self.nodes.values(), reference, |n| n.id.as_str(), |n| &n.name, "node", "node ls")
    }

    /// The network that a user means.
    ///
    /// # Errors
    /// None or more than one.
    pub fn find_network(&self, reference: &str) -> Result<&Network, ApiError> {
        pick(self.networks.values(), reference, |n| n.id.as_str(), |n| &n.spec.name, "network", "network ls")
    }

    /// The service that a user means.
    ///
    /// # Errors
    /// None or more than one.
    pub fn find_service(&self, reference: &str) -> Result<&Service, ApiError> {
        pick(self.services.values(), reference, |s| s.id.as_str(), |s| &s.spec.name, "service", "service ls")
    }

    /// The task that a user means: by id, or the newest of that name, live ones first; the container name of a
    /// compose file counts too.
    ///
    /// # Errors
    /// None or more than one.
    pub fn find_task(&self, reference: &str) -> Result<&Task, ApiError> {
        let rank = |t: &&Task| {
            let live = !t.status.state.is_terminal() && t.desired_state == TaskState::Running;
            (live, t.status.state == TaskState::Running, t.meta.created_at, t.id.clone())
        };
        if let Some(task) = self.tasks_named(reference).max_by_key(rank) {
            return Ok(task);
        }
        if let Some(task) = self.tasks.get(&TaskId::new(reference)) {
            return Ok(task);
        }
        pick(self.tasks.values().map(|t| &**t), reference, |t| t.id.as_str(), |t| &t.name, "task", "ps --all")
    }
}

impl Core {
    /// A service task may be shown by a user, but only a container task may be stopped, started and removed alone.
    pub(crate) fn container_task(&self, reference: &str) -> Result<&Task, ApiError> {
        let task = self.model.find_task(reference)?;
        match task.service.as_ref().and_then(|s| self.model.services.get(s)) {
            None => Ok(task),
            Some(service) => Err(ApiError::new(
                "service_task",
                format!("task {} belongs to service {}, which would replace it", task.name, service.spec.name),
            )
            .with_hint(format!("skein service rm {}", service.spec.name))),
        }
    }
}

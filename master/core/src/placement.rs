//! Between the model and the scheduler: what a node is, what a task takes, where a task may not go.

use std::collections::BTreeSet;

use skein_api::{ApiError, Explanation, MountKind, NodeId, Service, Task, TaskSpec, TaskState};

use crate::{
    core::Core,
    model::Model,
    scheduler::{Pin, Placed, Request},
};

/// What a task takes of its node; `None` when it has none or has ended.
pub(crate) fn placed(model: &Model, task: &Task) -> Option<Placed> {
    let node = task.node.clone().filter(|node| model.nodes.contains_key(node))?;
    if task.status.state.is_terminal() {
        return None;
    }
    let container = &task.spec.container;
    Some(Placed {
        task: task.id.clone(),
        node,
        service: task.service.clone(),
        name: container.container_name.clone().unwrap_or_else(|| task.name.clone()),
        image: container.image.clone(),
        labels: container.labels.clone(),
        reservations: task.spec.resources.reservations,
        ports: task.spec.ports.clone(),
    })
}

/// Where a task can only go because of what is there already.
pub(crate) enum Pinned {
    /// Nowhere in particular.
    Free,
    /// To these nodes, for this reason.
    To(Pin),
    /// Not known yet: what it depends on is not placed.
    Wait(String),
}

/// Named volumes, `volumes_from` and `links` keep a task on the host of what they name.
pub(crate) fn pinned(core: &Core, task: &Task) -> Pinned {
    let model = &core.model;
    let mut nodes: Option<BTreeSet<NodeId>> = None;
    let mut reasons = Vec::new();
    let mut narrow = |to: BTreeSet<NodeId>, reason: String| {
        reasons.push(reason);
        nodes = Some(match nodes.take() {
            Some(known) => known.intersection(&to).cloned().collect(),
            None => to,
        });
    };
    let container = &task.spec.container;
    for mount in container.mounts.iter().filter(|m| m.kind == MountKind::Volume) {
        let Some(volume) = mount.source.as_ref().and_then(|name| model.volume_named(name)) else { continue };
        narrow(BTreeSet::from([volume.node.clone()]), format!("volume {} lives there", volume.name));
    }
    let from = container.volumes_from.iter().map(|v| (&v.from, "volumes_from"));
    let links = container.links.iter().map(|l| (&l.target, "link"));
    for (name, what) in from.chain(links) {
        let hosts = hosts_of(model, name);
        if hosts.is_empty() {
            return Pinned::Wait(format!("waits for {name} ({what}) to be placed"));
        }
        narrow(hosts, format!("{what} {name} runs there"));
    }
    match nodes {
        None => Pinned::Free,
        Some(nodes) => Pinned::To(Pin { nodes, reason: reasons.join("; ") }),
    }
}

/// Nodes that run live tasks of a service or container task.
fn hosts_of(model: &Model, name: &str) -> BTreeSet<NodeId> {
    live_tasks_of(model, name).into_iter().filter_map(|t| t.node.clone()).collect()
}

/// Live tasks of a service, by its full name, or the container task of that name.
pub(crate) fn live_tasks_of<'a>(model: &'a Model, name: &str) -> Vec<&'a Task> {
    let live = |t: &&Task| t.desired_state == TaskState::Running && !t.status.state.is_terminal();
    match model.service_named(name) {
        Some(service) => model.service_tasks(&service.id).filter(live).collect(),
        None => model.tasks.values().filter(|t| t.service.is_none() && t.name == name).filter(live).collect(),
    }
}

/// Checks placement expressions, and that some node could ever meet them: labels, names and platform are looked at,
/// liveness, free resources and ports are not, they come and go.
///
/// # Errors
/// `bad_constraint` with the position, `no_node_fits` with counts per filter.
pub(crate) fn check(core: &Core, name: &str, spec: &TaskSpec) -> Result<(), ApiError> {
    let request = compile(core, spec, None, None).map_err(|message| {
        ApiError::new("bad_constraint", format!("{name}: {message}")).with_hint("see docs/placement.md for the syntax")
    })?;
    if spec.placement.constraints.is_empty() || core.scheduler.constraints_can_be_met(&request) {
        return Ok(());
    }
    let why = core.scheduler.explain(&request).into_explanation(name);
    Err(ApiError::new("no_node_fits", format!("{name}: {}", why.summary))
        .with_hint("skein node ls, then skein node label NODE KEY=VALUE"))
}

pub(crate) fn compile(
    core: &Core,
    spec: &TaskSpec,
    service: Option<&Service>,
    pin: Option<Pin>,
) -> Result<Request, String> {
    let service = service.map(|s| s.id.clone());
    Request::compile(spec, service, pin, core.settings.strategy).map_err(|e| e.to_string())
}

impl Core {
    /// Why a task or the next task of a service is where it is, or nowhere.
    ///
    /// # Errors
    /// When neither is found.
    pub fn explain(&self, reference: &str) -> Result<Explanation, ApiError> {
        let (name, spec, service, task) = match self.model.find_service(reference) {
            Ok(service) => {
                let waiting = self.model.service_tasks(&service.id).find(|t| self.pending.contains(&t.id));
                (service.spec.name.clone(), &service.spec.task, Some(service), waiting)
            }
            Err(_) => {
                let task = self.model.find_task(reference)?;
                let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
                (task.name.clone(), &task.spec, service, Some(task))
            }
        };
        let pin = match task.map(|t| pinned(self, t)) {
            Some(Pinned::To(pin)) => Some(pin),
            Some(Pinned::Wait(why)) => {
                return Ok(Explanation { subject: name, summary: why, ..Explanation::default() });
            }
            Some(Pinned::Free) | None => None,
        };
        let request = compile(self, spec, service, pin).map_err(|e| ApiError::new("bad_constraint", e))?;
        let mut explanation = self.scheduler.explain(&request).into_explanation(&name);
        if let Some(task) = task {
            let node = task.node.as_ref().and_then(|n| self.model.nodes.get(n));
            if let Some(node) = node {
                explanation.summary = format!("runs on {}; now: {}", node.name, explanation.summary);
            } else if !task.status.message.is_empty() && task.status.message != explanation.summary {
                explanation.summary = format!("{}; {}", task.status.message, explanation.summary);
            }
        }
        Ok(explanation)
    }
}

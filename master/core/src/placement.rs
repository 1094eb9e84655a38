//! Between the model and the scheduler: what a node is, what a task takes, where a task may not go.
//!
//! Decisions that stand here:
//! - A task holds its ports and reservations from its assignment until its container has ended for good ([`holds`]).
//! - An expression that no node can meet is refused while there are nodes; what comes and goes (liveness, free
//!   resources, host ports taken by others) never is: such a task waits, and says for what.
//! - Volumes, `volumes_from`, `links` and shared namespaces pin. A pin to a host that is lost, paused or drained waits for it: a volume
//!   that lives elsewhere is never replaced by an empty one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::{
    ApiError, Availability, ExplainQuery, Explanation, GenericOffer, MountKind, Node, NodeExplanation, NodeId,
    NodeState, Overcommit, Preemption, RestartCondition, Service, ServiceMode, Task, TaskId, TaskSpec, TaskState,
};

use crate::{
    core::Core,
    lookup::mistyped,
    model::Model,
    pending::{Cause, Refusal},
    scheduler::{ConstraintError, FilterKind, NodeFacts, NodeReasons, Pin, Placed, Request, Scheduler},
    workloads::shared_hosts,
};

/// Whether a task with a node holds its ports and reservations there.
///
/// - Until its container has ended. One that was orphaned may run on, so it holds its place until its node says more.
/// - A container task that ended and that its agent starts again by its policy holds it in between. Stopped by a user
///   or ended for good it does not, as with a single engine: another may have the port when it is started again.
pub(crate) fn holds(task: &Task) -> bool {
    if !task.status.state.is_terminal() || task.status.state == TaskState::Orphaned {
        return true;
    }
    let comes_back = match task.spec.restart.condition {
        RestartCondition::None => false,
        RestartCondition::OnFailure => task.status.state != TaskState::Complete,
        RestartCondition::Any => true,
    };
    task.service.is_none() && task.desired_state == TaskState::Running && comes_back
}

/// What a task takes of its node; `None` when it has none or holds nothing there.
pub(crate) fn placed(model: &Model, task: &Task) -> Option<Placed> {
    let node = task.node.clone().filter(|node| model.nodes.contains_key(node))?;
    if !holds(task) {
        return None;
    }
    let container = &task.spec.container;
    Some(Placed {
        task: task.id.clone(),
        service: task.service.clone(),
        service_name: service_name(task, &model.nodes[&node]).to_owned(),
        node,
        name: container.container_name.clone().unwrap_or_else(|| task.name.clone()),
        image: container.image.clone(),
        labels: container.labels.clone(),
        reservations: task.spec.resources.reservations,
        generic: task.spec.resources.generic.clone(),
        ports: task.spec.ports.clone(),
    })
}

/// Name of a task's service, from the task's own: that stays when the service is removed before its tasks.
fn service_name<'a>(task: &'a Task, node: &Node) -> &'a str {
    if task.service.is_none() {
        return "";
    }
    // `<service>.<slot>`, of a global one `<service>.<node name>`.
    let suffix = if task.slot > 0 { task.slot.to_string() } else { node.name.clone() };
    task.name.strip_suffix(&suffix).and_then(|name| name.strip_suffix('.')).unwrap_or(&task.name)
}

/// What the scheduler knows of a node.
pub(crate) fn facts(model: &Model, node: &Node, ready: bool, overcommit: Overcommit) -> NodeFacts {
    NodeFacts::new(node, ready, overcommit).with_volumes(model.node_volumes(&node.id).cloned())
}

/// Ids of generic resources for a task on its node: of each kind that has ids there, the first that no other task
/// holds. Kinds that are only counted are left out.
pub(crate) fn generic_ids(model: &Model, task: &Task) -> BTreeMap<String, Vec<String>> {
    let Some(node) = task.node.as_ref().and_then(|id| model.nodes.get(id)) else { return BTreeMap::new() };
    let held = held_ids(model, &node.id, &task.id);
    let asks = task.spec.resources.generic.iter().filter(|(_, count)| **count > 0);
    let given = asks.filter_map(|(kind, count)| match node.description.generic.get(kind)? {
        GenericOffer::Count(_) => None,
        GenericOffer::Named(ids) => {
            let free = ids.iter().filter(|id| !held.contains(&(kind.as_str(), id.as_str())));
            Some((kind.clone(), free.take(usize::try_from(*count).unwrap_or(usize::MAX)).cloned().collect()))
        }
    });
    given.collect()
}

/// Kinds and ids that tasks on a node hold, but for one task.
fn held_ids<'a>(model: &'a Model, node: &NodeId, but: &TaskId) -> BTreeSet<(&'a str, &'a str)> {
    let others = model.node_tasks(node).filter(|t| t.id != *but && !t.generic.is_empty() && holds(t));
    let kinds = others.flat_map(|t| &t.generic);
    kinds.flat_map(|(kind, ids)| ids.iter().map(move |id| (kind.as_str(), id.as_str()))).collect()
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

/// Named volumes, `volumes_from`, `links` and shared namespaces keep a task on the host of what they name.
pub(crate) fn pinned(core: &Core, task: &Task) -> Pinned {
    let model = &core.model;
    let mut nodes: Option<BTreeSet<NodeId>> = None;
    let mut reasons = Vec::new();
    let mut narrow = |to: BTreeSet<NodeId>, reason: String| {
        reasons.push(format!("{reason} {}", names_of(core, &to)));
        nodes = Some(match nodes.take() {
            Some(known) => known.intersection(&to).cloned().collect(),
            None => to,
        });
    };
    let container = &task.spec.container;
    for mount in container.mounts.iter().filter(|m| m.kind == MountKind::Volume) {
        let Some(volume) = mount.source.as_ref().and_then(|name| model.volume_named(name)) else { continue };
        narrow(BTreeSet::from([volume.node.clone()]), format!("volume {} lives on", volume.name));
    }
    for (what, name) in shared_hosts(&task.spec) {
        let hosts = hosts_of(model, name);
        if hosts.is_empty() {
            return Pinned::Wait(format!("waits for {name} ({what}) to be placed"));
        }
        narrow(hosts, format!("{what} {name} runs on"));
    }
    match nodes {
        None => Pinned::Free,
        Some(nodes) => Pinned::To(Pin { nodes, reason: reasons.join(", ") }),
    }
}

/// Names of nodes for people; those that take no tasks now with the reason.
fn names_of(core: &Core, nodes: &BTreeSet<NodeId>) -> String {
    /// More than that help nobody.
    const SHOWN_MAX: usize = 3;
    let name = |id: &NodeId| {
        let Some(node) = core.model.nodes.get(id) else { return id.short().to_owned() };
        let why = match (core.liveness.status(id).state, node.spec.availability) {
            (NodeState::Down, _) => " (lost)",
            (NodeState::Unknown, _) => " (not heard of yet)",
            (NodeState::Ready, Availability::Drain) => " (drained)",
            (NodeState::Ready, Availability::Pause) => " (paused)",
            (NodeState::Ready, Availability::Active) => "",
        };
        format!("{}{why}", node.name)
    };
    let mut names: Vec<String> = nodes.iter().take(SHOWN_MAX).map(name).collect();
    if nodes.len() > SHOWN_MAX {
        names.push(format!("{} more", nodes.len() - SHOWN_MAX));
    }
    names.join(" and ")
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
        None => model.tasks_named(name).filter(|t| t.service.is_none() && t.name == name).filter(live).collect(),
    }
}

/// Refuses expressions that do not parse, and such as can never hold together.
///
/// # Errors
/// `bad_constraint` with the position under the expression; `contradictory_constraints` with both.
pub(crate) fn check_syntax(core: &Core, name: &str, spec: &TaskSpec) -> Result<Request, ApiError> {
    let request = compile(core, spec, None, None).map_err(|error| bad_constraint(name, &error))?;
    match request.contradiction() {
        None => Ok(request),
        Some(contradiction) => Err(ApiError::new("contradictory_constraints", format!("{name}: {contradiction}"))
            .with_hint("remove one of them, or make it soft with `==~` or `!=~`")),
    }
}

fn bad_constraint(name: &str, error: &ConstraintError) -> ApiError {
    ApiError::new("bad_constraint", format!("{name}: {error}\n{}", error.caret())).with_hint(error.hint())
}

/// Checks that some node could ever meet what a task asks of a node: labels, names, platform and plugins are looked
/// at, and whether it is larger than any host; liveness, free resources and ports are not, they come and go. A cluster
/// without nodes refuses nothing.
///
/// # Errors
/// `no_node_fits` with counts per filter, or with what is too large and the largest host.
pub(crate) fn check(core: &Core, name: &str, spec: &TaskSpec) -> Result<(), ApiError> {
    let request = check_syntax(core, name, spec)?;
    if core.model.nodes.is_empty() {
        return Ok(());
    }
    if let Some(large) = core.scheduler.too_large(&request) {
        return Err(ApiError::new("no_node_fits", format!("{name}: {large}"))
            .with_hint("reserve less, or add a larger host; skein node ls shows what each offers"));
    }
    if core.scheduler.constraints_can_be_met(&request) {
        return Ok(());
    }
    let why = core.scheduler.explain(&request).into_explanation(name);
    Err(ApiError::new("no_node_fits", format!("{name}: {}", why.summary))
        .with_hint("skein node ls, then skein node label NODE KEY=VALUE"))
}

/// Where the host ports of a specification are free, among the nodes that it could ever be on: `None` when it asks
/// for none or some node has room, else which port is taken everywhere.
pub(crate) fn ports_taken(core: &Core, spec: &TaskSpec, service: Option<&Service>) -> Option<String> {
    if core.model.nodes.is_empty() || spec.ports.iter().all(|p| p.host_port == 0) {
        return None;
    }
    let request = compile(core, spec, service, None).ok()?;
    let nodes = core.model.nodes.len();
    let port = core
        .scheduler
        .explain(&request)
        .filters
        .into_iter()
        .find(|f| f.kind == FilterKind::Port && f.rejected_alone as usize == nodes);
    port.map(|f| format!("{} is taken on every node", f.filter))
}

pub(crate) fn compile(
    core: &Core,
    spec: &TaskSpec,
    service: Option<&Service>,
    pin: Option<Pin>,
) -> Result<Request, ConstraintError> {
    let request = Request::compile(spec, service.map(|s| s.id.clone()), pin, core.settings.strategy)?;
    Ok(match service {
        Some(service) => request.in_service(&service.spec.name),
        None => request,
    })
}

/// Refuses to start a stopped container task again where another has taken what it held.
///
/// # Errors
/// `node_unreachable` when its node is lost, `no_node_fits` with what is taken.
pub(crate) fn check_room(core: &Core, task: &Task) -> Result<(), ApiError> {
    let Some(node) = task.node.as_ref().and_then(|id| core.model.nodes.get(id)) else { return Ok(()) };
    let Task { name, spec, .. } = task;
    if core.liveness.status(&node.id).state == NodeState::Down {
        let message = format!("container task {name} is on node {}, which is lost", node.name);
        return Err(ApiError::new("node_unreachable", message).with_hint("skein node ls"));
    }
    if placed(&core.model, task).is_some() {
        return Ok(());
    }
    let request = compile(core, spec, None, None).map_err(|error| bad_constraint(name, &error))?;
    let held = held_ids(&core.model, &node.id, &task.id);
    let own = task.generic.iter().flat_map(|(kind, ids)| ids.iter().map(move |id| (kind.as_str(), id.as_str())));
    if let Some((kind, id)) = own.into_iter().find(|own| held.contains(own)) {
        let message =
            format!("container task {name} had {kind} {id} of node {}, which another task has now", node.name);
        return Err(ApiError::new("no_node_fits", message).with_hint(format!("skein ps --node {}", node.name)));
    }
    // Its node alone, as if it were ready and active: a paused node keeps what it has.
    let known = facts(&core.model, node, true, core.settings.overcommit);
    let alone = alone(core, NodeFacts { availability: Availability::Active, ..known }, |_| true);
    let taken = |kind| matches!(kind, FilterKind::Port | FilterKind::Resources);
    match alone.explain(&request).filters.into_iter().find(|f| f.rejected > 0 && taken(f.kind)) {
        None => Ok(()),
        Some(filter) => {
            let message = format!("container task {name} does not fit on node {} now: {}", node.name, filter.filter);
            Err(ApiError::new("no_node_fits", message).with_hint(format!("skein ps --node {}", node.name)))
        }
    }
}

/// A scheduler that knows one node and those of its tasks that `stays` tells: for what could be there.
pub(crate) fn alone(core: &Core, facts: NodeFacts, stays: impl Fn(&Task) -> bool) -> Scheduler {
    let mut alone = Scheduler::new();
    let there = core.model.node_tasks(&facts.id).filter(|task| stays(task));
    there.filter_map(|task| placed(&core.model, task)).for_each(|place| alone.apply_task(place));
    alone.apply_node(facts);
    alone
}

/// `nodes`: whether single nodes are asked about, and which one alone.
fn explained(scheduler: &Scheduler, request: &Request, name: &str, nodes: Option<Option<&Node>>) -> Explanation {
    let mut explanation = scheduler.explain(request).into_explanation(name);
    explanation.suggestions = scheduler.suggestions(request);
    if let Some(only) = nodes {
        let all = scheduler.reasons(request, only.map(|node| &node.id)).into_iter();
        explanation.per_node = all.map(|NodeReasons { node, reasons }| NodeExplanation { node, reasons }).collect();
    }
    explanation
}

impl Core {
    /// Why a task or the next task of a service is where it is, or nowhere. Changes nothing: a task that has its place
    /// is taken out of the scheduler while it is asked about, so that it does not stand in its own way.
    ///
    /// # Errors
    /// When neither is found, or the node that is asked about is not.
    pub fn explain(&mut self, reference: &str, query: &ExplainQuery) -> Result<Explanation, ApiError> {
        let only = query.node.as_ref().map(|node| self.model.find_node(node)).transpose()?;
        let (name, spec, service, task) = match self.model.find_service(reference) {
            Ok(service) => {
                let waiting = self.model.service_tasks(&service.id).find(|t| self.pending.contains(&t.id));
                (service.spec.name.clone(), &service.spec.task, Some(service), waiting)
            }
            Err(_) => {
                let task = self.model.find_task(reference).map_err(|error| self.no_subject(reference, error))?;
                let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
                (task.name.clone(), &*task.spec, service, Some(task))
            }
        };
        let place = task.and_then(|t| t.node.as_ref()).and_then(|n| self.model.nodes.get(n));
        let like = Task { spec: Arc::new(spec.clone()), service: service.map(|s| s.id.clone()), ..Task::default() };
        let waits = match (place, self.wait_for(task.unwrap_or(&like))) {
            (None, Err(refusal)) => Some(refusal.message),
            _ => None,
        };
        if let Some(summary) = waits {
            return Ok(Explanation { subject: name, summary, ..Explanation::default() });
        }
        let pin = match pinned(self, task.unwrap_or(&like)) {
            Pinned::To(pin) => Some(pin),
            Pinned::Free | Pinned::Wait(_) => None,
        };
        let request = compile(self, spec, service, pin).map_err(|error| bad_constraint(&name, &error))?;
        let nodes = (query.nodes || only.is_some()).then_some(only);
        let mut explanation = match task.filter(|_| place.is_some()) {
            Some(task) => self.scheduler.without(&task.id, |others| explained(others, &request, &name, nodes)),
            None => explained(&self.scheduler, &request, &name, nodes),
        };
        if explanation.fitting == 0 && place.is_none() && spec.placement.preempt {
            explanation.preemption = match service.map(|service| service.spec.mode) {
                Some(ServiceMode::Replicated(_)) => Some(self.preemption(task.unwrap_or(&like), &request)),
                Some(ServiceMode::Global) => Some(Preemption {
                    message: "a global service makes no room: it has tasks where they fit".to_owned(),
                    ..Preemption::default()
                }),
                None => None,
            };
        }
        if let (Some(task), Some(node)) = (task, place) {
            let verb = if task.status.state.is_terminal() { "ran" } else { "runs" };
            explanation.summary = format!("{verb} on {}; now: {}", node.name, explanation.summary);
        }
        Ok(explanation)
    }

    /// Neither a service nor a task has this name.
    fn no_subject(&self, reference: &str, error: ApiError) -> ApiError {
        if error.code != "not_found" {
            return error;
        }
        let services = self.model.services.values().map(|service| service.spec.name.as_str());
        let tasks = self.model.tasks.values().map(|task| task.name.as_str());
        mistyped("service or task", reference, "ps", services.chain(tasks))
    }

    /// What must come first: a dependency of the service's first tasks, or what the task shall share a host with.
    pub(crate) fn wait_for(&self, task: &Task) -> Result<Option<Pin>, Refusal> {
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        if let Some(service) = service
            && task.attempt == 0
            && let Some((other, message)) = self.unmet_dependency(service)
        {
            return Err(Refusal { message, cause: Cause::Dependency(other), request: None });
        }
        if let Some(message) = self.static_holder(task) {
            return Err(message.into());
        }
        match pinned(self, task) {
            Pinned::Free => Ok(None),
            Pinned::To(pin) => Ok(Some(pin)),
            Pinned::Wait(why) => Err(why.into()),
        }
    }
}

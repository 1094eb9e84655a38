//! What users run: stacks, services and container tasks. Decides what a request changes; the orchestrator follows up.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use skein_api::{
    ApiError, ContainerCreate, MountKind, Network, PlanAction, PlanItem, Service, ServiceId, ServiceMode, ServiceSpec,
    StackApply, StackPlan, StackSpec, Task, TaskId, TaskSpec, TaskState, TaskStatus, Volume,
};

use crate::{
    admit::check_name,
    command::{Context, Decision, Reply},
    core::Core,
    meta,
    model::{Change, Key, Kind, Object},
    placement,
    rng::Rng,
};

/// Most replicas of one service. A slot is a small integer in names and in DNS answers; 65,535 is far above both.
const REPLICAS_MAX: u32 = 65_535;

impl Core {
    pub(crate) fn stack_apply(&self, apply: &StackApply, ctx: &Context) -> Decision {
        let stack = &apply.stack;
        check_name("stack", &stack.name)?;
        let mut rng = Rng::new(ctx.seed);
        let (mut plan, mut changes) = (StackPlan::default(), Vec::new());
        let networks = self.plan_networks(stack, &mut plan, &mut changes, &mut rng, ctx)?;
        self.check_stack(stack, &networks)?;
        for spec in &stack.services {
            self.plan_service(spec, &networks, &mut plan, &mut changes, &mut rng, ctx)?;
        }
        for volume in &stack.volumes {
            let action = if self.model.volume_named(volume).is_some() { PlanAction::Keep } else { PlanAction::Create };
            plan.items.push(PlanItem { kind: "volume".into(), name: volume.clone(), action, differences: Vec::new() });
        }
        self.plan_orphans(apply, &mut plan, &mut changes);
        plan.items.sort_by(|a, b| (&a.kind, &a.name).cmp(&(&b.kind, &b.name)));
        let changes = if apply.dry_run { Vec::new() } else { changes };
        Ok((changes, Reply::Plan(plan)))
    }

    /// Networks of the stack: those that are there and those to be made.
    fn plan_networks(
        &self,
        stack: &StackSpec,
        plan: &mut StackPlan,
        changes: &mut Vec<Change>,
        rng: &mut Rng,
        ctx: &Context,
    ) -> Result<Vec<Network>, ApiError> {
        let (mut cluster, mut all, mut made) = (self.cluster()?, Vec::new(), Vec::new());
        for name in &stack.external_networks {
            let network = self.model.network(name).ok_or_else(|| {
                ApiError::new("not_found", format!("external network {name} is not there"))
                    .with_hint(format!("skein network create {name}"))
            })?;
            all.push(network.clone());
        }
        for spec in &stack.networks {
            let item = |action| PlanItem { kind: "network".into(), name: spec.name.clone(), action, differences: vec![] };
            if let Some(network) = self.model.network(&spec.name) {
                check_owner("network", &spec.name, network.spec.stack.as_deref(), &stack.name)?;
                let changed = network.spec.internal != spec.internal
                    || spec.subnet4.is_some_and(|s| s.trunc() != network.subnet4);
                if changed {
                    let message = format!("network {} is there with another subnet or `internal`", spec.name);
                    return Err(ApiError::new("in_use", message)
                        .with_hint(format!("skein down -p {}, then skein up again", stack.name)));
                }
                plan.items.push(item(PlanAction::Keep));
                if is_removed(network) {
                    // Was about to go with its last task; it stays now.
                    let spec = skein_api::NetworkSpec { stack: Some(stack.name.clone()), ..network.spec.clone() };
                    changes.push(Change::Upsert(Object::Network(Box::new(Network { spec, ..network.clone() }))));
                }
                all.push(network.clone());
            } else {
                let network = self.new_network(spec, &made, &mut cluster, rng, ctx)?;
                plan.items.push(item(PlanAction::Create));
                made.push(network);
            }
        }
        if !made.is_empty() {
            changes.push(Change::Upsert(Object::Cluster(Box::new(cluster))));
            changes.extend(made.iter().cloned().map(|n| Change::Upsert(Object::Network(Box::new(n)))));
        }
        all.extend(made);
        Ok(all)
    }

    /// Checks that need the whole stack: names, dependencies, ports on a single host are each their filter's.
    fn check_stack(&self, stack: &StackSpec, networks: &[Network]) -> Result<(), ApiError> {
        let mut names = BTreeSet::new();
        for service in &stack.services {
            if !names.insert(service.name.as_str()) {
                return Err(ApiError::new("bad_request", format!("service {} stands twice in the stack", service.name)));
            }
            check_name("service", &service.name)?;
            if service.stack.as_deref() != Some(&stack.name) {
                return Err(ApiError::new("bad_request", format!("service {} names another stack", service.name)));
            }
        }
        for service in &stack.services {
            for dependency in &service.depends_on {
                if !names.contains(dependency.service.as_str()) {
                    let message = format!("service {} depends on {}, which is not there", service.name, dependency.service);
                    return Err(ApiError::new("bad_request", message));
                }
            }
            self.check_spec(&service.name, &service.task, networks)?;
        }
        Ok(())
    }

    /// Checks one task specification against the cluster.
    fn check_spec(&self, name: &str, spec: &TaskSpec, networks: &[Network]) -> Result<(), ApiError> {
        let bad = |message: String| ApiError::new("bad_request", message);
        if spec.container.image.is_empty() {
            return Err(bad(format!("{name} has no image")));
        }
        for attachment in &spec.networks {
            let wanted = &attachment.network;
            if !networks.iter().any(|n| n.spec.name == *wanted || n.id.as_str() == wanted) {
                return Err(ApiError::new("not_found", format!("{name} names network {wanted}, which is not there"))
                    .with_hint(format!("skein network create {wanted}")));
            }
        }
        let mut ports = BTreeSet::new();
        for port in spec.ports.iter().filter(|p| p.host_port != 0) {
            if !ports.insert((port.protocol, port.host_port, port.host_ip)) {
                return Err(bad(format!("{name} publishes port {} twice", port.host_port)));
            }
        }
        placement::check(self, name, spec)
    }

    fn plan_service(
        &self,
        spec: &ServiceSpec,
        networks: &[Network],
        plan: &mut StackPlan,
        changes: &mut Vec<Change>,
        rng: &mut Rng,
        ctx: &Context,
    ) -> Result<(), ApiError> {
        if let ServiceMode::Replicated(n) = spec.mode
            && n > REPLICAS_MAX
        {
            return Err(ApiError::new("bad_request", format!("{} replicas of {}: at most {REPLICAS_MAX}", n, spec.name)));
        }
        let mut spec = spec.clone();
        resolve_networks(&mut spec.task, networks);
        if let Some(name) = &spec.task.container.container_name {
            self.check_container_name(name, Some(&spec.name))?;
        }
        let item = |action, differences| PlanItem { kind: "service".into(), name: spec.name.clone(), action, differences };
        let Some(known) = self.model.service_named(&spec.name) else {
            let service = Service { id: ServiceId::new(rng.id()), meta: meta::created(ctx), spec: spec.clone() };
            plan.items.push(item(PlanAction::Create, Vec::new()));
            changes.push(Change::Upsert(Object::Service(Box::new(service))));
            return Ok(());
        };
        check_owner("service", &spec.name, known.spec.stack.as_deref(), spec.stack.as_deref().unwrap_or_default())?;
        if known.spec == spec {
            plan.items.push(item(PlanAction::Keep, Vec::new()));
            return Ok(());
        }
        let recreate = known.spec.task != spec.task;
        let differences = differences(&known.spec, &spec);
        plan.items.push(item(if recreate { PlanAction::Recreate } else { PlanAction::Update }, differences));
        // Only a changed task specification is a new generation of it: tasks remember which one they were made from.
        let meta = meta::changed(&known.meta, ctx, recreate);
        changes.push(Change::Upsert(Object::Service(Box::new(Service { id: known.id.clone(), meta, spec }))));
        Ok(())
    }

    /// A container name must be nobody else's.
    fn check_container_name(&self, name: &str, service: Option<&str>) -> Result<(), ApiError> {
        check_name("container", name)?;
        let of_service = self.model.services.values().find(|s| {
            s.spec.task.container.container_name.as_deref() == Some(name) && Some(s.spec.name.as_str()) != service
        });
        let owner = match of_service {
            Some(other) => Some(format!("service {}", other.spec.name)),
            None => {
                let alone = self.model.tasks.values().find(|t| t.service.is_none() && t.name == name);
                alone.map(|t| format!("container task {}", t.id.short()))
            }
        };
        match owner {
            None => Ok(()),
            Some(owner) => Err(ApiError::new("name_taken", format!("container name {name} belongs to {owner}"))
                .with_hint("skein ps --all")),
        }
    }

    fn plan_orphans(&self, apply: &StackApply, plan: &mut StackPlan, changes: &mut Vec<Change>) {
        let stack = &apply.stack;
        let action = if apply.remove_orphans { PlanAction::Remove } else { PlanAction::Orphan };
        let of_stack = |s: &Option<String>| s.as_deref() == Some(&stack.name);
        let services = self.model.services.values().filter(|s| of_stack(&s.spec.stack));
        for service in services.filter(|s| !stack.services.iter().any(|w| w.name == s.spec.name)) {
            plan.items.push(plan_item("service", &service.spec.name, action));
            if apply.remove_orphans {
                changes.push(Change::Delete(Key { kind: Kind::Service, id: service.id.to_string() }));
            }
        }
    }

    pub(crate) fn stack_remove(&self, name: &str, volumes: bool, dry_run: bool, _ctx: &Context) -> Decision {
        let of_stack = |s: &Option<String>| s.as_deref() == Some(name);
        let (mut plan, mut changes) = (StackPlan::default(), Vec::new());
        let services: Vec<&Service> = self.model.services.values().filter(|s| of_stack(&s.spec.stack)).collect();
        for service in &services {
            plan.items.push(plan_item("service", &service.spec.name, PlanAction::Remove));
            changes.push(Change::Delete(Key { kind: Kind::Service, id: service.id.to_string() }));
        }
        for network in self.model.networks.values().filter(|n| of_stack(&n.spec.stack)) {
            let foreign = self.model.network_tasks(&network.id).find(|t| {
                t.service.as_ref().is_none_or(|s| !services.iter().any(|removed| removed.id == *s))
                    && t.desired_state == TaskState::Running
            });
            if let Some(task) = foreign {
                plan.warnings.push(format!("network {} stays: task {} uses it", network.spec.name, task.name));
                continue;
            }
            plan.items.push(plan_item("network", &network.spec.name, PlanAction::Remove));
            // The network itself goes when its last task is gone: its hosts need it until then.
            let mut doomed = network.clone();
            doomed.spec.stack = Some(removed_stack(name));
            changes.push(Change::Upsert(Object::Network(Box::new(doomed))));
        }
        for volume in self.model.volumes.values().filter(|v| of_stack(&v.stack)) {
            let action = if volumes { PlanAction::Remove } else { PlanAction::Keep };
            plan.items.push(plan_item("volume", &volume.name, action));
            if volumes {
                changes.push(Change::Delete(Key { kind: Kind::Volume, id: volume.id.to_string() }));
            }
        }
        if plan.items.is_empty() {
            return Err(ApiError::new("not_found", format!("no stack {name:?}")).with_hint("skein service ls"));
        }
        plan.items.sort_by(|a, b| (&a.kind, &a.name).cmp(&(&b.kind, &b.name)));
        Ok((if dry_run { Vec::new() } else { changes }, Reply::Plan(plan)))
    }

    pub(crate) fn service_remove(&self, reference: &str, _ctx: &Context) -> Decision {
        let service = self.model.find_service(reference)?;
        Ok((vec![Change::Delete(Key { kind: Kind::Service, id: service.id.to_string() })], Reply::Done))
    }

    pub(crate) fn container_create(&self, create: &ContainerCreate, ctx: &Context) -> Decision {
        let mut rng = Rng::new(ctx.seed);
        let id = TaskId::new(rng.id());
        let name = if create.name.is_empty() { format!("run-{}", id.short()) } else { create.name.clone() };
        self.check_container_name(&name, None)?;
        let networks: Vec<Network> =
            create.spec.networks.iter().filter_map(|a| self.model.network(&a.network)).cloned().collect();
        self.check_spec(&name, &create.spec, &networks)?;
        let mut spec = create.spec.clone();
        resolve_networks(&mut spec, &networks);
        let task = Task {
            id: id.clone(),
            meta: meta::created(ctx),
            name,
            spec,
            desired_state: TaskState::Running,
            status: TaskStatus { state: TaskState::Pending, since: ctx.now.wall, ..TaskStatus::default() },
            run: 1,
            ..Task::default()
        };
        Ok((vec![Change::Upsert(Object::Task(Box::new(task)))], Reply::Task(id)))
    }

    pub(crate) fn container_stop(&self, reference: &str, ctx: &Context) -> Decision {
        self.container_desire(reference, TaskState::Shutdown, ctx)
    }

    pub(crate) fn container_start(&self, reference: &str, ctx: &Context) -> Decision {
        self.container_desire(reference, TaskState::Running, ctx)
    }

    fn container_desire(&self, reference: &str, desired: TaskState, ctx: &Context) -> Decision {
        let task = self.container_task(reference)?;
        let id = task.id.clone();
        let ended = task.status.state.is_terminal();
        if task.desired_state == TaskState::Remove {
            return Err(ApiError::new("in_use", format!("task {} is being removed", task.name)));
        }
        if task.desired_state == desired && !(desired == TaskState::Running && ended) {
            return Ok((Vec::new(), Reply::Task(id)));
        }
        let mut task = Task { desired_state: desired, meta: meta::changed(&task.meta, ctx, true), ..task.clone() };
        if desired == TaskState::Running {
            // A new run: states begin again, addresses and the file system stay.
            let state = if task.node.is_some() { TaskState::Assigned } else { TaskState::Pending };
            task.run += 1;
            task.status = TaskStatus {
                state,
                since: ctx.now.wall,
                container_id: task.status.container_id.clone(),
                addresses: task.status.addresses.clone(),
                ..TaskStatus::default()
            };
        }
        Ok((vec![Change::Upsert(Object::Task(Box::new(task)))], Reply::Task(id)))
    }

    pub(crate) fn container_remove(&self, reference: &str, force: bool, ctx: &Context) -> Decision {
        let task = self.container_task(reference)?;
        let runs = !task.status.state.is_terminal() && task.status.state > TaskState::Pending;
        if runs && !force {
            return Err(ApiError::new("running", format!("container task {} runs", task.name))
                .with_hint(format!("skein stop {0}, or skein rm --force {0}", task.name)));
        }
        let task = Task {
            desired_state: TaskState::Remove,
            meta: meta::changed(&task.meta, ctx, true),
            ..task.clone()
        };
        Ok((vec![Change::Upsert(Object::Task(Box::new(task)))], Reply::Done))
    }

    /// Volumes that a task placed on `node` brings into being.
    pub(crate) fn new_volumes(&self, task: &Task, rng: &mut Rng, ctx: &Context) -> Vec<Volume> {
        let Some(node) = &task.node else { return Vec::new() };
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        let mut made: BTreeMap<String, Volume> = BTreeMap::new();
        for mount in &task.spec.container.mounts {
            let (MountKind::Volume, Some(name)) = (mount.kind, &mount.source) else { continue };
            if self.model.volume_named(name).is_none() && !made.contains_key(name) {
                let volume = Volume {
                    id: skein_api::VolumeId::new(rng.id()),
                    meta: meta::created(ctx),
                    name: name.clone(),
                    stack: service.and_then(|s| s.spec.stack.clone()),
                    node: node.clone(),
                };
                made.insert(name.clone(), volume);
            }
        }
        made.into_values().collect()
    }
}

/// The stack name of networks that go when their last task is gone. `/` cannot stand in a stack's name.
pub(crate) fn removed_stack(name: &str) -> String {
    format!("removed/{name}")
}

/// Is this a network that goes when its last task is gone?
pub(crate) fn is_removed(network: &Network) -> bool {
    network.spec.stack.as_deref().is_some_and(|s| s.starts_with("removed/"))
}

fn plan_item(kind: &str, name: &str, action: PlanAction) -> PlanItem {
    PlanItem { kind: kind.to_owned(), name: name.to_owned(), action, differences: Vec::new() }
}

fn check_owner(kind: &str, name: &str, owner: Option<&str>, stack: &str) -> Result<(), ApiError> {
    if owner == Some(stack) || owner == Some(&removed_stack(stack)) {
        return Ok(());
    }
    let owner = owner.map_or("no stack".to_owned(), |o| format!("stack {o}"));
    Err(ApiError::new("name_taken", format!("{kind} {name} is there already and belongs to {owner}")))
}

/// Tasks name networks by id, so that they stay theirs whatever names do.
fn resolve_networks(spec: &mut TaskSpec, networks: &[Network]) {
    for attachment in &mut spec.networks {
        let found = networks.iter().find(|n| n.spec.name == attachment.network || n.id.as_str() == attachment.network);
        if let Some(network) = found {
            attachment.network = network.id.to_string();
        }
    }
}

/// What differs between two specifications, one line per value: `task.container.image: a -> b`.
fn differences(before: &ServiceSpec, after: &ServiceSpec) -> Vec<String> {
    fn walk(path: &str, before: &Value, after: &Value, out: &mut Vec<String>) {
        match (before, after) {
            (Value::Object(a), Value::Object(b)) => {
                let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
                for key in keys {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(&path, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), out);
                }
            }
            (a, b) if a == b => {}
            // Environment may hold secrets: that it differs is said, its value is not.
            (_, _) if path.starts_with("task.container.env.") => out.push(format!("{path}: changed")),
            (a, b) => out.push(format!("{path}: {a} -> {b}")),
        }
    }
    let json = |spec| serde_json::to_value(spec).expect("a specification is JSON");
    let mut out = Vec::new();
    walk("", &json(before), &json(after), &mut out);
    out
}

//! What users run: stacks, services and container tasks. Decides what a request changes; the orchestrator follows up.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use serde_json::Value;
use skein_api::{
    ApiError, ContainerCreate, DRAIN_MS_MAX, GENERIC_KINDS_MAX, LABEL_KEY_EXPECTED, MountKind, Network,
    NetworkAttachment, NetworkId, NetworkSpec, PORTS_MAX, PRIORITY_MAX, PlanAction, PlanItem, Service, ServiceId,
    ServiceMode, ServiceSpec, StackApply, StackPlan, StackSpec, Task, TaskId, TaskSpec, TaskState, TaskStatus,
    UPDATE_DELAY_MS_MAX, Volume, address4, check_labels, is_label_key,
};

use crate::{
    admit::check_name,
    command::{Context, Decision, Reply},
    core::Core,
    ingress, meta,
    model::{Change, Key, Kind, Object},
    placement,
    rng::Rng,
};

/// Most replicas of one service. A slot is a small integer in names and in DNS answers; 65,535 is far above both.
const REPLICAS_MAX: u32 = 65_535;

/// Most tasks that a cluster is asked to run, those of global services counted on each node. A master holds some 5 KB
/// for each (docs/limits.md): a mistyped number is refused before it takes the memory of the machine.
const TASKS_MAX: u64 = 250_000;

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
        plan_volumes(self, stack, &mut plan);
        self.plan_orphans(apply, &mut plan, &mut changes);
        self.check_tasks(&changes, 0)?;
        self.check_ports(&changes, None)?;
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
            check_stays(network)?;
            all.push(network.clone());
        }
        for spec in &stack.networks {
            let item = |action| plan_item("network", &spec.name, action);
            if let Some(network) = self.model.network(&spec.name) {
                check_owner("network", &spec.name, network.spec.stack.as_deref(), &stack.name)?;
                check_labels(&spec.labels)
                    .map_err(|e| ApiError::new("bad_request", format!("network {}: {e}", spec.name)))?;
                let changed = network.spec.internal != spec.internal
                    || spec.subnet4.is_some_and(|s| s.trunc() != network.subnet4);
                if changed {
                    let message = format!("network {} is there with another subnet or `internal`", spec.name);
                    return Err(ApiError::new("in_use", message)
                        .with_hint(format!("skein down -p {}, then skein up again", stack.name)));
                }
                let labels = |n: &NetworkSpec| (n.attachable, n.labels.clone());
                let update = labels(&network.spec) != labels(spec);
                plan.items.push(item(if update { PlanAction::Update } else { PlanAction::Keep }));
                if update || is_removed(network) {
                    // One that was about to go with its last task stays now.
                    let meta = meta::changed(&network.meta, ctx, update);
                    let spec = NetworkSpec { subnet4: network.spec.subnet4, ..spec.clone() };
                    changes.push(Change::Upsert(Object::Network(Box::new(Network { spec, meta, ..network.clone() }))));
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

    /// Checks that need the whole stack: names, and what its services need of each other.
    fn check_stack(&self, stack: &StackSpec, networks: &[Network]) -> Result<(), ApiError> {
        let bad = |message: String| Err(ApiError::new("bad_request", message));
        let mut names = BTreeSet::new();
        let mut containers: BTreeMap<&str, &str> = BTreeMap::new();
        for service in &stack.services {
            let name = service.name.as_str();
            check_name("service", name)?;
            if !names.insert(name) {
                return bad(format!("service {name} stands twice in the stack"));
            }
            if service.stack.as_deref() != Some(&stack.name) {
                return bad(format!("service {name} names another stack"));
            }
            let Some(container) = service.task.container.container_name.as_deref() else { continue };
            if let Some(other) = containers.insert(container, name) {
                return bad(format!("services {other} and {name} have the same container name {container}"));
            }
            if !matches!(service.mode, ServiceMode::Replicated(0 | 1)) {
                return bad(format!("service {name} has the container name {container}, so it can have one task only"));
            }
        }
        for service in &stack.services {
            if let Some(dependency) = service.depends_on.iter().find(|d| !names.contains(d.service.as_str())) {
                let message = format!("service {} depends on {}, which is not there", service.name, dependency.service);
                return bad(message);
            }
            if let Err(e) = check_labels(&service.labels) {
                return bad(format!("{name}: {e}", name = service.name));
            }
            self.check_references(&service.name, &service.task, &names)?;
            self.check_spec(&service.name, &service.task, networks)?;
        }
        self.check_statics(stack, networks, &names)?;
        match cycle(&stack.services) {
            None => Ok(()),
            Some(path) => bad(format!("services need each other in a circle: {path}")),
        }
    }

    /// Static addresses are nobody else's, in this stack too, and of services that have one task.
    fn check_statics(&self, stack: &StackSpec, networks: &[Network], names: &BTreeSet<&str>) -> Result<(), ApiError> {
        let mut taken: BTreeMap<(&NetworkId, Ipv4Addr), &str> = BTreeMap::new();
        for service in &stack.services {
            let name = service.name.as_str();
            for (network, address) in self.static_addresses(name, &service.task, networks, names)? {
                if !matches!(service.mode, ServiceMode::Replicated(0 | 1)) {
                    let message = format!("service {name} has the address {address}, so it can have one task only");
                    return Err(ApiError::new("bad_request", message));
                }
                if let Some(other) = taken.insert((&network.id, address), name) {
                    let message = format!("services {other} and {name} have the same address {address}");
                    return Err(ApiError::new("address_taken", message));
                }
            }
        }
        Ok(())
    }

    /// The static addresses that a specification asks for, checked.
    fn static_addresses<'a>(
        &self,
        name: &str,
        spec: &TaskSpec,
        networks: &'a [Network],
        ours: &BTreeSet<&str>,
    ) -> Result<Vec<(&'a Network, Ipv4Addr)>, ApiError> {
        let mut found = Vec::new();
        for attachment in &spec.networks {
            let network = networks.iter().find(|n| is_of(attachment, n));
            let Some(network) = network else { continue };
            let address = self.static_address(name, attachment, network, ours)?;
            found.extend(address.map(|address| (network, address)));
        }
        Ok(found)
    }

    /// What a task shares a host with must be there: one of `names`, a service or a container task.
    fn check_references(&self, name: &str, spec: &TaskSpec, names: &BTreeSet<&str>) -> Result<(), ApiError> {
        let there = |other: &str| {
            let alone = |t: &Task| t.service.is_none() && t.name == other && t.desired_state != TaskState::Remove;
            names.contains(other)
                || self.model.service_named(other).is_some()
                || self.model.tasks_named(other).any(alone)
        };
        match shared_hosts(spec).find(|(_, other)| !there(other)) {
            None => Ok(()),
            Some((what, other)) => {
                let message = format!("{name} names {other} ({what}), which is not there");
                Err(ApiError::new("not_found", message).with_hint("skein ps --all"))
            }
        }
    }

    /// Checks one task specification against the cluster, but for what only scheduling knows.
    fn check_spec(&self, name: &str, spec: &TaskSpec, networks: &[Network]) -> Result<(), ApiError> {
        let bad = |message: String| ApiError::new("bad_request", message);
        if spec.container.image.is_empty() {
            return Err(bad(format!("{name} has no image")));
        }
        if spec.ports.len() > PORTS_MAX {
            return Err(bad(format!("{name} publishes {} ports, at most {PORTS_MAX} are possible", spec.ports.len())));
        }
        check_counts(name, spec)?;
        let priority = spec.placement.priority;
        if priority.unsigned_abs() > PRIORITY_MAX.unsigned_abs() {
            return Err(bad(format!("{name} has priority {priority}: -{PRIORITY_MAX} to {PRIORITY_MAX} are possible")));
        }
        check_labels(&spec.container.labels).map_err(|e| bad(format!("{name}: {e}")))?;
        let container = &spec.container;
        let own = !spec.networks.is_empty() || !spec.ports.is_empty();
        // The engine refuses these too, when it is too late.
        let own = own || container.hostname.is_some() || !container.extra_hosts.is_empty();
        if container.share.network.is_some() && own {
            let what = "networks, ports, host name and extra hosts";
            return Err(bad(format!("{name} shares the network of another one and can have no {what} of its own")));
        }
        let mut attached = BTreeSet::new();
        for NetworkAttachment { network: wanted, .. } in &spec.networks {
            let Some(network) = networks.iter().find(|n| n.spec.name == *wanted || n.id.as_str() == wanted) else {
                return Err(ApiError::new("not_found", format!("{name} names network {wanted}, which is not there"))
                    .with_hint(format!("skein network create {wanted}")));
            };
            if !attached.insert(&network.id) {
                return Err(bad(format!("{name} names network {wanted} twice")));
            }
        }
        let mut ports = BTreeSet::new();
        for port in spec.ports.iter().filter(|p| p.host_port != 0) {
            if !ports.insert((port.protocol, port.host_port, port.host_ip)) {
                return Err(bad(format!("{name} publishes port {} twice", port.host_port)));
            }
        }
        placement::check_syntax(self, name, spec).map(|_| ())
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
            return Err(ApiError::new(
                "bad_request",
                format!("{} replicas of {}: at most {REPLICAS_MAX}", n, spec.name),
            ));
        }
        if spec.drain_ms() > DRAIN_MS_MAX {
            let message =
                format!("{} drains for {} ms: at most {DRAIN_MS_MAX} are possible", spec.name, spec.drain_ms());
            return Err(ApiError::new("bad_request", message));
        }
        if spec.update.delay_ms > UPDATE_DELAY_MS_MAX {
            let delay_ms = spec.update.delay_ms;
            let message = format!("{} pauses for {delay_ms} ms: at most {UPDATE_DELAY_MS_MAX} are possible", spec.name);
            return Err(ApiError::new("bad_request", message));
        }
        let mut spec = spec.clone();
        resolve_networks(&mut spec.task, networks);
        ingress::check_spec(&spec, networks)?;
        let fits = placement::check(self, &spec.name, &spec.task);
        if let Some(name) = &spec.task.container.container_name {
            self.check_container_name(name, Some(&spec.name))?;
        }
        let item = |action, differences| PlanItem { differences, ..plan_item("service", &spec.name, action) };
        let known = self.model.service_named(&spec.name);
        if let Some(known) = known {
            let stack = spec.stack.as_deref().unwrap_or_default();
            check_owner("service", &spec.name, known.spec.stack.as_deref(), stack)?;
            if known.spec == spec {
                plan.items.push(item(PlanAction::Keep, Vec::new()));
                // It is as it was; that it would not be placed again is worth a word, not a refusal.
                plan.warnings.extend(fits.err().map(|error| error.message));
                return Ok(());
            }
        }
        fits?;
        // Its tasks wait until the port is free: who has it may go, and nodes may come.
        let taken = placement::ports_taken(self, &spec.task, known);
        let own = known.is_some_and(|k| k.spec.task.ports == spec.task.ports);
        plan.warnings.extend(taken.filter(|_| !own).map(|what| format!("{} waits: {what}", spec.name)));
        let Some(known) = known else {
            plan.items.push(item(PlanAction::Create, Vec::new()));
            let meta = meta::created(ctx);
            let service = Service { id: ServiceId::new(rng.id()), meta, spec, vips: Vec::new() };
            changes.push(Change::Upsert(Object::Service(Box::new(service))));
            return Ok(());
        };
        let recreate = known.spec.task != spec.task;
        let differences = differences(&known.spec, &spec);
        plan.items.push(item(if recreate { PlanAction::Recreate } else { PlanAction::Update }, differences));
        // Only a changed task specification is a new generation of it: tasks remember which one they were made from.
        let meta = meta::changed(&known.meta, ctx, recreate);
        changes.push(Change::Upsert(Object::Service(Box::new(Service { meta, spec, ..known.clone() }))));
        Ok(())
    }

    /// Refuses what would ask for more tasks than a cluster may have: these changes of services and so many container
    /// tasks more. What asks for no more than there is already passes, whatever the number. O(services).
    fn check_tasks(&self, changes: &[Change], containers: u64) -> Result<(), ApiError> {
        let of = |service: &Service| match service.spec.mode {
            ServiceMode::Replicated(n) => u64::from(n),
            ServiceMode::Global => self.model.nodes.len() as u64,
        };
        let there = self.model.services.values().map(of).sum::<u64>() + self.model.container_tasks() as u64;
        let (mut more, mut less) = (containers, 0);
        for change in changes {
            let (id, after) = match change {
                Change::Upsert(Object::Service(service)) => (service.id.clone(), of(service)),
                Change::Delete(Key { kind: Kind::Service, id }) => (ServiceId::new(id.clone()), 0),
                _ => continue,
            };
            more += after;
            less += self.model.services.get(&id).map_or(0, of);
        }
        let wanted = there + more - less;
        if wanted <= TASKS_MAX.max(there) {
            return Ok(());
        }
        let message = format!("that would be {wanted} tasks in all; a cluster runs at most {TASKS_MAX}");
        Err(ApiError::new("cluster_full", message).with_hint("skein service ls"))
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
                let own = service.and_then(|name| self.model.service_named(name)).map(|s| &s.id);
                let of_this = |t: &Task| own.is_some() && t.service.as_ref() == own;
                let same = |t: &&Task| t.name == name && t.desired_state != TaskState::Remove && !of_this(t);
                self.model.tasks_named(name).find(same).map(|t| match &t.service {
                    Some(_) => format!("a service task ({})", t.id.short()),
                    None => format!("container task {}", t.id.short()),
                })
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
        let networks = self.model.networks.values().filter(|n| of_stack(&n.spec.stack));
        for network in networks.filter(|n| !stack.networks.iter().any(|w| w.name == n.spec.name)) {
            if apply.remove_orphans {
                self.plan_network_removal(network, &stack.name, plan, changes);
            } else {
                plan.items.push(plan_item("network", &network.spec.name, action));
            }
        }
    }

    /// A network goes when its last task is gone: its hosts need it until then. It stays while others use it.
    fn plan_network_removal(&self, network: &Network, stack: &str, plan: &mut StackPlan, changes: &mut Vec<Change>) {
        let name = &network.spec.name;
        if let Some(user) = self.foreign_user(network, stack) {
            plan.items.push(plan_item("network", name, PlanAction::Keep));
            plan.warnings.push(format!("network {name} stays: {user} uses it"));
            return;
        }
        plan.items.push(plan_item("network", name, PlanAction::Remove));
        let mut doomed = network.clone();
        doomed.spec.stack = Some(removed_stack(stack));
        changes.push(Change::Upsert(Object::Network(Box::new(doomed))));
    }

    /// Who else than a stack uses a network: a service of another one, or a container task, stopped ones too.
    fn foreign_user(&self, network: &Network, stack: &str) -> Option<String> {
        let names = |spec: &TaskSpec| spec.networks.iter().any(|a| a.network == network.id.as_str());
        let foreign = |s: &&Service| s.spec.stack.as_deref() != Some(stack) && names(&s.spec.task);
        if let Some(service) = self.model.services.values().find(foreign) {
            return Some(format!("service {}", service.spec.name));
        }
        let alone = |t: &&Task| t.service.is_none() && t.desired_state != TaskState::Remove;
        self.model.network_tasks(&network.id).find(alone).map(|t| format!("container task {}", t.name))
    }

    pub(crate) fn stack_remove(&self, name: &str, volumes: bool, dry_run: bool, _ctx: &Context) -> Decision {
        let of_stack = |s: &Option<String>| s.as_deref() == Some(name);
        let (mut plan, mut changes) = (StackPlan::default(), Vec::new());
        for service in self.model.services.values().filter(|s| of_stack(&s.spec.stack)) {
            plan.items.push(plan_item("service", &service.spec.name, PlanAction::Remove));
            changes.push(Change::Delete(Key { kind: Kind::Service, id: service.id.to_string() }));
        }
        for network in self.model.networks.values().filter(|n| of_stack(&n.spec.stack)) {
            self.plan_network_removal(network, name, &mut plan, &mut changes);
        }
        for volume in self.model.volumes.values().filter(|v| of_stack(&v.stack)) {
            self.plan_volume_removal(volume, name, volumes, &mut plan, &mut changes);
        }
        if plan.items.is_empty() {
            return Err(ApiError::new("not_found", format!("no stack {name:?}")).with_hint("skein service ls"));
        }
        plan.items.sort_by(|a, b| (&a.kind, &a.name).cmp(&(&b.kind, &b.name)));
        Ok((if dry_run { Vec::new() } else { changes }, Reply::Plan(plan)))
    }

    /// The cluster forgets where a volume is; the data is the engine's, and agents delete no data.
    fn plan_volume_removal(
        &self,
        volume: &Volume,
        stack: &str,
        remove: bool,
        plan: &mut StackPlan,
        changes: &mut Vec<Change>,
    ) {
        let name = &volume.name;
        let mounts = |spec: &TaskSpec| volume_names(spec).any(|v| v == name);
        let foreign = |s: &&Service| s.spec.stack.as_deref() != Some(stack) && mounts(&s.spec.task);
        let alone = |t: &&Task| t.service.is_none() && t.desired_state != TaskState::Remove && mounts(&t.spec);
        let service = self.model.services.values().find(foreign).map(|s| format!("service {}", s.spec.name));
        let user = service
            .or_else(|| self.model.node_tasks(&volume.node).find(alone).map(|t| format!("container task {}", t.name)));
        let action = if remove && user.is_none() { PlanAction::Remove } else { PlanAction::Keep };
        plan.items.push(plan_item("volume", name, action));
        if !remove {
            return;
        }
        if let Some(user) = user {
            plan.warnings.push(format!("volume {name} stays: {user} uses it"));
            return;
        }
        let node = self.model.node_name(&volume.node);
        plan.warnings.push(format!(
            "volume {name} is forgotten, its data stays on node {node}; to delete it, there: docker volume rm {name}"
        ));
        changes.push(Change::Delete(Key { kind: Kind::Volume, id: volume.id.to_string() }));
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
        self.check_tasks(&[], 1)?;
        self.check_ports(&[], Some((&name, &create.spec)))?;
        let networks: Vec<Network> =
            create.spec.networks.iter().filter_map(|a| self.model.network(&a.network)).cloned().collect();
        if let Some(network) = networks.iter().find(|n| is_removed(n)) {
            check_stays(network)?;
        }
        self.check_references(&name, &create.spec, &BTreeSet::new())?;
        self.check_spec(&name, &create.spec, &networks)?;
        self.static_addresses(&name, &create.spec, &networks, &BTreeSet::new())?;
        placement::check(self, &name, &create.spec)?;
        let mut spec = create.spec.clone();
        resolve_networks(&mut spec, &networks);
        let task = Task {
            id: id.clone(),
            meta: meta::created(ctx),
            name,
            spec: Arc::new(spec),
            desired_state: TaskState::Running,
            status: TaskStatus { state: TaskState::Pending, since: ctx.now.wall, ..TaskStatus::default() },
            run: 1,
            ..Task::default()
        };
        Ok((vec![Change::Upsert(Object::Task(Arc::new(task)))], Reply::Task(id)))
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
            placement::check_room(self, &self.model.tasks[&id])?;
            // A new run: states begin again, addresses and the file system stay.
            let state = if task.node.is_some() { TaskState::Assigned } else { TaskState::Pending };
            task.run = task.run.saturating_add(1);
            task.status = TaskStatus {
                state,
                since: ctx.now.wall,
                container_id: task.status.container_id.clone(),
                addresses: task.status.addresses.clone(),
                ..TaskStatus::default()
            };
        } else if task.status.state == TaskState::Assigned && task.run > 1 {
            // Its agent has said nothing of this run. If it never hears of it, it will not: for it the run before has
            // ended, and nothing is to be done.
            (task.status.state, task.status.since) = (TaskState::Shutdown, ctx.now.wall);
            task.status.message = "stopped before it was started again".to_owned();
        }
        Ok((vec![Change::Upsert(Object::Task(Arc::new(task)))], Reply::Task(id)))
    }

    pub(crate) fn container_remove(&self, reference: &str, force: bool, ctx: &Context) -> Decision {
        let task = self.container_task(reference)?;
        let runs = !task.status.state.is_terminal() && task.status.state > TaskState::Pending;
        if runs && !force {
            return Err(ApiError::new("running", format!("container task {} runs", task.name))
                .with_hint(format!("skein stop {0}, or skein rm --force {0}", task.name)));
        }
        let task =
            Task { desired_state: TaskState::Remove, meta: meta::changed(&task.meta, ctx, true), ..task.clone() };
        Ok((vec![Change::Upsert(Object::Task(Arc::new(task)))], Reply::Done))
    }

    /// Volumes that a task placed on `node` brings into being.
    pub(crate) fn new_volumes(&self, task: &Task, rng: &mut Rng, ctx: &Context) -> Vec<Volume> {
        let Some(node) = &task.node else { return Vec::new() };
        let mut made: BTreeMap<String, Volume> = BTreeMap::new();
        for mount in &task.spec.container.mounts {
            let (MountKind::Volume, Some(name)) = (mount.kind, &mount.source) else { continue };
            if self.model.volume_named(name).is_none() && !made.contains_key(name) {
                let volume = Volume {
                    id: skein_api::VolumeId::new(rng.id()),
                    meta: meta::created(ctx),
                    name: name.clone(),
                    // One with a name of its own was there before the stack, or is shared: it does not go with it.
                    stack: task.stack.clone().filter(|stack| name.starts_with(&format!("{stack}_"))),
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

/// Refuses to use a network that is on its way out.
fn check_stays(network: &Network) -> Result<(), ApiError> {
    if !is_removed(network) {
        return Ok(());
    }
    let message = format!("network {} is being removed and goes with its last task", network.spec.name);
    Err(ApiError::new("in_use", message).with_hint("skein ps --all, then try again"))
}

/// Checks the amounts of generic resources.
fn check_counts(name: &str, spec: &TaskSpec) -> Result<(), ApiError> {
    let kinds = &spec.resources.generic;
    if kinds.len() > GENERIC_KINDS_MAX {
        let message = format!(
            "{name} asks for {} kinds of generic resources, at most {GENERIC_KINDS_MAX} are possible",
            kinds.len()
        );
        return Err(ApiError::new("bad_request", message));
    }
    match kinds.keys().find(|kind| !is_label_key(kind)) {
        None => Ok(()),
        Some(kind) => {
            let message = format!("{name}: {kind:?} is no kind of generic resource: expected {LABEL_KEY_EXPECTED}");
            Err(ApiError::new("bad_request", message).with_hint("write for example `gpu=1`"))
        }
    }
}

/// Names of the named volumes of a task.
fn volume_names(spec: &TaskSpec) -> impl Iterator<Item = &String> {
    let volumes = spec.container.mounts.iter().filter(|m| m.kind == MountKind::Volume);
    volumes.filter_map(|m| m.source.as_ref())
}

/// What a task must share a host with, and why.
pub(crate) fn shared_hosts(spec: &TaskSpec) -> impl Iterator<Item = (&'static str, &str)> {
    let links = spec.container.links.iter().map(|l| ("link", l.target.as_str()));
    let volumes = spec.container.volumes_from.iter().map(|v| ("volumes_from", v.from.as_str()));
    volumes.chain(links).chain(spec.container.share.iter().map(|(key, with)| (key, with.as_str())))
}

/// A circle in what services wait for, as a path; services outside the list end it.
fn cycle(services: &[ServiceSpec]) -> Option<String> {
    let needs = |s: &ServiceSpec| -> BTreeSet<String> {
        let shared = shared_hosts(&s.task).map(|(_, name)| name.to_owned());
        s.depends_on.iter().map(|d| d.service.clone()).chain(shared).collect()
    };
    let mut left: BTreeMap<&str, BTreeSet<String>> = services.iter().map(|s| (s.name.as_str(), needs(s))).collect();
    // Those whose needs are all met go; what is left at the end is in a circle or leads to one.
    loop {
        let count = left.len();
        let names: BTreeSet<String> = left.keys().map(|k| (*k).to_owned()).collect();
        left.retain(|_, needs| needs.iter().any(|n| names.contains(n)));
        if left.len() == count {
            break;
        }
    }
    let mut at: String = (*left.keys().next()?).to_owned();
    let mut path: Vec<String> = Vec::new();
    while !path.contains(&at) {
        let next = left[at.as_str()].iter().find(|n| left.contains_key(n.as_str())).cloned();
        path.push(at);
        at = next.expect("each service that is left needs one that is left");
    }
    let start = path.iter().position(|name| *name == at).unwrap_or(0);
    path.push(at);
    Some(path[start..].join(" -> "))
}

/// Volumes come into being with the first task that mounts them, on its host.
fn plan_volumes(core: &Core, stack: &StackSpec, plan: &mut StackPlan) {
    for name in &stack.volumes {
        let used = stack.services.iter().any(|s| volume_names(&s.task).any(|v| v == name));
        let action = match core.model.volume_named(name) {
            Some(_) => PlanAction::Keep,
            None if used => PlanAction::Create,
            None => {
                plan.warnings.push(format!("volume {name} is not made: no service mounts it"));
                continue;
            }
        };
        plan.items.push(plan_item("volume", name, action));
    }
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

/// Tasks name networks by id, so that they stay theirs whatever names do, and static addresses as IPv4.
fn resolve_networks(spec: &mut TaskSpec, networks: &[Network]) {
    for attachment in &mut spec.networks {
        if let Some(network) = networks.iter().find(|n| is_of(attachment, n)) {
            attachment.network = network.id.to_string();
            let of6 = |v6| address4(network.subnet6, network.subnet4, v6);
            attachment.ipv4 = attachment.ipv4.or(attachment.ipv6.take().and_then(of6));
        }
    }
}

fn is_of(attachment: &NetworkAttachment, network: &Network) -> bool {
    network.spec.name == attachment.network || network.id.as_str() == attachment.network
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

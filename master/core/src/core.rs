//! The core: model, scheduler index, liveness and the work that is due, behind four verbs.
//!
//! ```text
//! execute(command) ─┐                                   ┌─> take_staged() -> the shell commits
//! liveness, tick ───┴─> stage(change): model, index,  ──┤
//! settle() ─────────┘   dirty marks, dispatch marks     └─> take_dispatch() after the commit
//! ```
//!
//! A change is applied to memory when it is decided, and leaves the core only after the shell has made it durable:
//! replies, events and assignments wait for the commit, reads are served between commits. When a commit fails the
//! shell takes it back ([`Core::rollback`]) and loads a new core from the store, so memory never runs ahead of what was
//! promised.
//! This way one commit carries a command together with everything that follows from it (its tasks, their placement),
//! and a batch of commands with one fsync.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::{
    ApiError, NetworkId, Node, NodeId, NodeStatus, Overcommit, ServiceId, Strategy, Task, TaskId, TaskSpec, TaskState,
    UpdateConfig,
};

use crate::{
    command::{Command, Context, Decision, Now, Reply},
    dispatch::Dispatch,
    drain::Draining,
    liveness::Liveness,
    loss::Loss,
    model::{Change, Key, Kind, Model, Object},
    orchestrator::EXPIRE_PERIOD_MS,
    pending::Pending,
    placement,
    preempt::Hold,
    readiness::Readiness,
    scheduler::Scheduler,
    starved::Starved,
};

/// Largest object, as the store keeps it. A service has its specification once and each task a copy; 256 KiB is 250 times
/// a usual one, and a transaction of the store takes 64 of them.
const OBJECT_BYTES_MAX: usize = 256 << 10;

/// How often tasks that wait for a node are tried only to say anew why they wait. They are placed at once when a node has
/// room, so this is for the reader: while ten thousand hosts join, each would change the reason.
const REWORD_PERIOD_MS: u64 = 5_000;

/// Settings that decisions depend on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Used where neither service nor task names a strategy.
    pub strategy: Strategy,
    /// How much may be set aside on nodes that have no ratio of their own.
    pub overcommit: Overcommit,
    /// Subnets for networks that name none are cut from this.
    pub subnet_pool: ipnet::Ipv4Net,
    /// Prefix length of such a subnet.
    pub subnet_prefix: u8,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            strategy: Strategy::Spread,
            overcommit: Overcommit::default(),
            subnet_pool: "10.64.0.0/10".parse().expect("a valid prefix"),
            // 1,024 networks of 4,096 addresses each.
            subnet_prefix: 20,
        }
    }
}

/// Decides everything; knows no clock, socket or file.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) settings: Settings,
    pub(crate) model: Model,
    pub(crate) scheduler: Scheduler,
    pub(crate) liveness: Liveness,
    pub(crate) loss: Loss,
    pub(crate) dispatch: Dispatch,
    pub(crate) readiness: Readiness,
    pub(crate) draining: Draining,
    staged: Vec<Change>,
    /// What takes the staged changes back, in the order in which they were staged.
    undo: Vec<(Key, Change)>,
    /// Of the last [`Core::take_staged`]: the last object in order, and the last one that the shell committed.
    batch: (Option<Key>, Option<Key>),
    /// Services to look at in the next [`Core::settle`].
    pub(crate) dirty_services: BTreeSet<ServiceId>,
    /// Tasks without a node.
    pub(crate) pending: Pending,
    /// Room that is made for tasks that wait.
    pub(crate) holds: BTreeMap<TaskId, Hold>,
    /// For whom the last settling made room, and how, in words.
    pub(crate) made_room: Vec<String>,
    /// Something changed that may let a task be placed that waits for something else than a node with room.
    pub(crate) wake_pending: bool,
    /// Nodes changed: what waiting tasks say of them may be out of date.
    stale_words: bool,
    /// When waiting tasks are asked again at the earliest, by monotonic clock.
    reword_at_ms: u64,
    /// Tasks to look at for removal.
    pub(crate) reap: BTreeSet<TaskId>,
    /// When services with a pause before their next attempt are due, by monotonic clock: wall clocks jump.
    pub(crate) timers: BTreeSet<(u64, ServiceId)>,
    /// Tasks that ended and whose successor waits, with when it is due by monotonic clock. Set once per task: the time of
    /// its end is the word of its host's clock, and may be ahead of ours for as long as it likes.
    pub(crate) pauses: BTreeMap<TaskId, u64>,
    /// Global services that miss a task on some node.
    pub(crate) starved: Starved,
    /// Nodes that changed: global services may want a task there, or none any more.
    pub(crate) dirty_nodes: BTreeSet<NodeId>,
    /// Nodes or networks came, or blocks were freed: networks for plain `docker run` may miss some host.
    pub(crate) grow: bool,
    /// Networks changed or tasks went: a removed stack's network may be without tasks.
    pub(crate) sweep: bool,
    /// Networks whose addresses more, or fewer, may have.
    pub(crate) fuller: BTreeSet<NetworkId>,
    /// Monotonic time of the next look at what is kept for a while.
    pub(crate) expire_at_ms: u64,
    /// The latest time that the shell told.
    pub(crate) now: Now,
}

impl Core {
    /// A core over the objects of a store. Nodes count as unknown until they have had time to return, from `now`
    /// on: a restarted master calls no node lost before it could have heard of it.
    pub fn load(settings: Settings, objects: Vec<Object>, now: Now) -> Self {
        let mut core = Self {
            settings,
            model: Model::default(),
            scheduler: Scheduler::default(),
            liveness: Liveness::default(),
            loss: Loss::new(now.mono_ms),
            dispatch: Dispatch::default(),
            readiness: Readiness::default(),
            draining: Draining::default(),
            staged: Vec::new(),
            undo: Vec::new(),
            batch: (None, None),
            dirty_services: BTreeSet::new(),
            pending: Pending::default(),
            holds: BTreeMap::new(),
            made_room: Vec::new(),
            wake_pending: true,
            stale_words: false,
            reword_at_ms: now.mono_ms,
            reap: BTreeSet::new(),
            timers: BTreeSet::new(),
            pauses: BTreeMap::new(),
            starved: Starved::default(),
            dirty_nodes: BTreeSet::new(),
            grow: true,
            sweep: true,
            fuller: BTreeSet::new(),
            // A host that boots may have a clock that is years ahead until somebody sets it.
            expire_at_ms: now.mono_ms + EXPIRE_PERIOD_MS,
            now,
        };
        let mut objects = objects;
        objects.sort_by_cached_key(Object::key);
        // As they were made, the tasks of a service share its specification.
        let mut specs: BTreeMap<ServiceId, Arc<TaskSpec>> = BTreeMap::new();
        for mut object in objects {
            if let Object::Task(task) = &mut object
                && let Some(service) = task.service.clone()
            {
                let known = specs.entry(service).or_insert_with(|| task.spec.clone());
                if !Arc::ptr_eq(known, &task.spec) && *known == task.spec {
                    Arc::make_mut(task).spec = known.clone();
                }
            }
            core.enter(object);
        }
        core.look_at_everything();
        core
    }

    /// Enters an object that is durable already.
    pub(crate) fn enter(&mut self, object: Object) {
        self.note(&Change::Upsert(object));
    }

    /// The next settling leaves nothing out.
    pub(crate) fn look_at_everything(&mut self) {
        self.dirty_services = self.model.services.keys().cloned().collect();
        self.reap = self.model.tasks.keys().cloned().collect();
    }

    /// Enters where in the store an object was that [`Core::load`] was given.
    pub fn loaded(&mut self, key: &Key, revision: u64) {
        self.model.set_revision(key, revision);
    }

    /// The state, to read.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The placement index, to read.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Decides a command without changing anything.
    ///
    /// # Errors
    /// The refusal, as the user shall see it.
    pub fn decide(&self, command: &Command, ctx: &Context) -> Decision {
        use Command as C;
        match command {
            C::InitCluster(cluster) => self.init_cluster(cluster),
            C::Join { token, secret_sha256, key_digest, description, clock } => {
                self.join(token, secret_sha256, key_digest, description, *clock, ctx)
            }
            C::Describe { node, description } => self.describe(node, description, ctx),
            C::NodeUpdate { node, update } => self.node_update(node, update, ctx),
            C::NodeRemove { node, force } => self.node_remove(node, *force, ctx),
            C::TokenCreate { id, secret_sha256, request } => self.token_create(id, secret_sha256, request, ctx),
            C::TokenRevoke(id) => self.token_revoke(id),
            C::NetworkCreate(spec) => self.network_create(spec, ctx),
            C::NetworkRemove(reference) => self.network_remove(reference),
            C::StackApply(apply) => self.stack_apply(apply, ctx),
            C::StackRemove { name, volumes, dry_run } => self.stack_remove(name, *volumes, *dry_run, ctx),
            C::ServiceRemove(reference) => self.service_remove(reference, ctx),
            C::ContainerCreate(create) => self.container_create(create, ctx),
            C::ContainerStop(reference) => self.container_stop(reference, ctx),
            C::ContainerStart(reference) => self.container_start(reference, ctx),
            C::ContainerRemove { task, force } => self.container_remove(task, *force, ctx),
            C::Reports { node, reports } => self.reports(node, reports, ctx),
        }
    }

    /// Decides a command and stages what it changes.
    ///
    /// # Errors
    /// The refusal; then nothing was staged.
    pub fn execute(&mut self, command: &Command, ctx: &Context) -> Result<Reply, ApiError> {
        self.now = ctx.now;
        let (changes, reply) = self.decide(command, ctx)?;
        let too_large = |c: &&Change| matches!(c, Change::Upsert(o) if o.encoded_len() > OBJECT_BYTES_MAX);
        if let Some(change) = changes.iter().find(too_large) {
            let Key { kind, id } = change.key();
            let message = format!("{} {id} would take more than {OBJECT_BYTES_MAX} bytes", kind.as_str());
            return Err(ApiError::new("too_large", message));
        }
        for change in changes {
            self.stage(change);
        }
        Ok(reply)
    }

    /// Applies a change to memory and keeps it for the next commit.
    pub(crate) fn stage(&mut self, change: Change) {
        let key = change.key();
        let undo = match self.note(&change) {
            Some(before) => Change::Upsert(before),
            None => Change::Delete(key.clone()),
        };
        self.undo.push((key, undo));
        self.staged.push(change);
    }

    /// The shell could not commit what was staged: memory is again what the last commit made it.
    pub fn rollback(&mut self) {
        self.staged.clear();
        let (_, kept) = std::mem::take(&mut self.batch);
        for (key, change) in std::mem::take(&mut self.undo).into_iter().rev() {
            if Some(key) > kept {
                self.note(&change);
            }
        }
    }

    /// What was staged since the last call: for each object its last change, in the order of keys.
    pub fn take_staged(&mut self) -> Vec<Change> {
        let mut last: BTreeMap<Key, Change> = BTreeMap::new();
        for change in std::mem::take(&mut self.staged) {
            last.insert(change.key(), change);
        }
        self.batch = (last.last_key_value().map(|(key, _)| key.clone()), None);
        last.into_values().collect()
    }

    /// The shell committed `changes` at `revision`: all or the first of those that [`Core::take_staged`] gave, in its
    /// order.
    pub fn committed(&mut self, changes: Vec<Change>, revision: u64) {
        for change in changes {
            let key = change.key();
            // Nobody else has the object then, so it need not be copied to get its revision.
            drop(change);
            self.model.set_revision(&key, revision);
            self.batch.1 = Some(key);
        }
        // A large batch goes in several commits: what is still to come can still be taken back.
        if self.batch.0.is_none() || self.batch.0 == self.batch.1 {
            self.undo.clear();
            self.batch = (None, None);
        }
    }

    /// Applies a change to the model, the index and the lists of work. Returns what was there before.
    fn note(&mut self, change: &Change) -> Option<Object> {
        let before = self.model.apply(change);
        let key = change.key();
        match key.kind {
            Kind::Node => {
                let id = NodeId::new(&key.id);
                self.note_node(&id);
                self.note_overlaps(&id, before.as_ref());
                if before.is_none() {
                    self.grow = true;
                    // One that a rollback brings back: its tasks hold again what they held there.
                    let placed = self.model.node_tasks(&id).filter_map(|t| placement::placed(&self.model, t));
                    for placed in placed.collect::<Vec<_>>() {
                        self.scheduler.apply_task(placed);
                    }
                }
            }
            Kind::Task => {
                self.note_task(&TaskId::new(&key.id), before.as_ref());
                self.note_readiness(&TaskId::new(&key.id), before.as_ref());
                self.note_drain(&TaskId::new(&key.id), before.as_ref());
            }
            Kind::Service => {
                self.dirty_services.insert(ServiceId::new(&key.id));
                self.dirty_services.append(&mut self.starved.service_changed(&ServiceId::new(&key.id)));
                // Ports of every host may need a network on every host.
                self.grow |= matches!(change, Change::Upsert(Object::Service(s)) if !s.spec.ingress.is_empty());
                self.pending.stir_every_dependent();
                self.wake_pending = true;
            }
            Kind::Volume => {
                let node = match (before.as_ref(), &change) {
                    (_, Change::Upsert(Object::Volume(volume))) | (Some(Object::Volume(volume)), _) => Some(volume),
                    _ => None,
                };
                if let Some(node) = node.map(|volume| volume.node.clone()) {
                    self.note_facts(&node);
                }
                self.wake_pending = true;
            }
            Kind::Network => (self.grow, self.sweep) = (true, true),
            Kind::Block if matches!(change, Change::Delete(_)) => (self.grow, self.wake_pending) = (true, true),
            Kind::Cluster | Kind::RemovedNode | Kind::Token | Kind::Block => {}
        }
        self.dispatch.note(&self.model, &key, before.as_ref());
        before
    }

    /// What the scheduler knows of a node follows the model and its liveness.
    fn note_facts(&mut self, id: &NodeId) {
        if let Some(node) = self.model.nodes.get(id) {
            let facts = placement::facts(&self.model, node, self.liveness.is_ready(id), self.settings.overcommit);
            self.scheduler.apply_node(facts);
            self.dirty_services.append(&mut self.starved.node_changed(id));
        }
    }

    fn note_node(&mut self, id: &NodeId) {
        match self.model.nodes.get(id) {
            Some(node) => {
                self.liveness.ensure(id, self.now);
                let facts = placement::facts(&self.model, node, self.liveness.is_ready(id), self.settings.overcommit);
                self.scheduler.apply_node(facts);
            }
            None => {
                self.liveness.remove(id);
                self.loss.forget(id);
                self.scheduler.remove_node(id);
                self.dispatch.remove_node(id);
                self.readiness_without(id);
                self.grow = true;
            }
        }
        (self.wake_pending, self.stale_words) = (true, true);
        self.mark_node_services(id);
        self.dirty_nodes.insert(id.clone());
    }

    /// A host has routes or resolvers of its own where a network is: it joined later, or they came later.
    fn note_overlaps(&mut self, id: &NodeId, before: Option<&Object>) {
        let Some(node) = self.model.nodes.get(id) else { return };
        let old = match before {
            Some(Object::Node(old)) => Some(&**old),
            _ => None,
        };
        let told = |node: &Node| (node.description.routes.clone(), node.description.resolvers.clone());
        if old.map(told) == Some(told(node)) {
            return;
        }
        let known = old.map(|old| self.overlaps_of(old)).unwrap_or_default();
        for words in self.overlaps_of(node).difference(&known) {
            self.readiness.notice(format!("{words}: neither can be reached there; choose another subnet or route"));
        }
    }

    /// Services with tasks on a node, which may want to do something about its change.
    fn mark_node_services(&mut self, id: &NodeId) {
        let with_tasks = self.model.node_tasks(id).filter_map(|t| t.service.clone());
        self.dirty_services.extend(with_tasks);
        self.reap.extend(self.model.node_tasks(id).map(|t| t.id.clone()));
    }

    /// A task of a service began, got on, ended or went: what waits for it may go on.
    fn note_dependency(&mut self, service: Option<&ServiceId>) {
        if let Some(service) = service {
            self.pending.stir_dependents(service);
            self.dirty_services.append(&mut self.starved.service_changed(service));
        }
    }

    fn note_fuller(&mut self, task: Option<&Task>) {
        let attachments = task.into_iter().flat_map(|t| &t.spec.networks);
        self.fuller.extend(attachments.map(|a| NetworkId::new(&a.network)));
    }

    /// What a task holds on a node changed.
    fn note_place(&mut self, node: Option<&NodeId>) {
        if let Some(node) = node {
            self.dirty_services.append(&mut self.starved.node_changed(node));
        }
    }

    /// Follows a task. What it makes others look at is narrow, since most reports only say how far a start has come:
    /// its service when it has more or fewer live tasks, pending tasks when a place or a dependency may have come.
    fn note_task(&mut self, id: &TaskId, before: Option<&Object>) {
        let old = match before {
            Some(Object::Task(task)) => Some(&**task),
            _ => None,
        };
        let Some(task) = self.model.tasks.get(id).cloned() else {
            self.dirty_services.extend(old.and_then(|t| t.service.clone()));
            self.note_fuller(old);
            self.note_dependency(old.and_then(|t| t.service.as_ref()));
            self.note_place(old.and_then(|t| t.node.as_ref()));
            self.pending.remove(id);
            self.pauses.remove(id);
            self.scheduler.remove_task(id);
            (self.wake_pending, self.sweep) = (true, true);
            return;
        };
        let ended = task.status.state.is_terminal();
        let turned = old.is_none_or(|old| {
            (old.status.state.is_terminal(), old.desired_state, &old.node, old.spec_generation)
                != (ended, task.desired_state, &task.node, task.spec_generation)
        });
        if turned {
            self.dirty_services.extend(task.service.clone());
            self.note_fuller(Some(&task));
        }
        // What waits for one to be served before it replaces the next.
        let arrived = task.status.state == TaskState::Running
            && old.is_none_or(|old| (old.status.state, old.status.health) != (task.status.state, task.status.health));
        let service = task.service.as_ref().and_then(|service| self.model.services.get(service));
        if arrived && service.is_some_and(|service| service.spec.update != UpdateConfig::default()) {
            self.dirty_services.extend(task.service.clone());
        }
        if ended && old.is_some_and(|old| !old.status.state.is_terminal()) {
            // One after it was replaced; what comes now is one before its successor.
            self.pauses.remove(id);
        }
        let pending = task.node.is_none() && task.desired_state == TaskState::Running && !ended;
        if pending {
            self.pending.insert(&task);
        } else {
            self.pending.remove(id);
        }
        self.wake_pending |= (turned && !pending) || arrived;
        let status = |t: &Task| (t.status.state, t.status.health, t.status.exit_code);
        let counts = ended || task.status.state == TaskState::Running;
        if turned || (counts && old.is_none_or(|old| status(old) != status(&task))) {
            self.note_dependency(task.service.as_ref());
        }
        // What a task takes follows from these: most reports change none of them.
        let same_place = old.is_some_and(|old| {
            old.node == task.node
                && Arc::ptr_eq(&old.spec, &task.spec)
                && placement::holds(old) == placement::holds(&task)
        });
        if !same_place {
            self.note_place(old.and_then(|t| t.node.as_ref()));
            self.note_place(task.node.as_ref());
            match placement::placed(&self.model, &task) {
                Some(placed) => self.scheduler.apply_task(placed),
                None => self.scheduler.remove_task(id),
            }
        }
        if ended || task.desired_state > TaskState::Running {
            self.reap.insert(id.clone());
        }
    }

    /// The agent of `node` has a session now. A node that was removed is not heard.
    pub fn session_opened(&mut self, node: &NodeId, now: Now) {
        self.heartbeat(node, now);
    }

    /// A heartbeat of `node` came; O(log nodes) unless it makes the node ready.
    pub fn heartbeat(&mut self, node: &NodeId, now: Now) {
        self.now = now;
        if self.liveness.heard(node, now) {
            self.liveness_changed(node, now);
        }
    }

    /// Looks at clocks: nodes that were silent for too long, and attempts that are due.
    pub fn tick(&mut self, now: Now) {
        self.now = now;
        self.liveness.look(now);
        for node in self.liveness.overdue(now) {
            if self.liveness.refresh(&node, now) {
                self.liveness_changed(&node, now);
            }
        }
        self.give_up_nodes(now);
        self.readiness_tick(now);
        self.drain_tick(now);
        if self.stale_words && now.mono_ms >= self.reword_at_ms {
            (self.stale_words, self.reword_at_ms) = (false, now.mono_ms + REWORD_PERIOD_MS);
            self.pending.stir_waiting();
        }
        while let Some((due, service)) = self.timers.first().cloned() {
            if due > now.mono_ms {
                break;
            }
            self.timers.pop_first();
            self.dirty_services.insert(service);
            self.wake_pending = true;
        }
    }

    fn liveness_changed(&mut self, node: &NodeId, now: Now) {
        self.note_liveness(node);
        if self.liveness.is_ready(node) {
            // A host that is back is a place for tasks, and changes nothing for those that it has: after a restart of
            // the master all of them come back at once.
            self.loss.forget(node);
        } else {
            self.loss.silent(node, now.mono_ms);
            self.mark_node_services(node);
            self.readiness_without(node);
        }
    }

    /// A node came or went. In no agent's documents: names of a lost host's containers go with their tasks.
    fn note_liveness(&mut self, node: &NodeId) {
        self.note_facts(node);
        (self.wake_pending, self.stale_words) = (true, true);
        self.dirty_nodes.insert(node.clone());
    }

    /// A node is lost and given up at once, as if it had been silent and there were credit for it.
    pub(crate) fn lose(&mut self, node: &NodeId, now: Now) {
        self.liveness.lose(node, now);
        self.loss.give_up_now(node);
        self.note_liveness(node);
        self.mark_node_services(node);
        self.readiness_without(node);
    }

    /// Silent nodes are given up as far as it is allowed at once; their services look for other places then.
    fn give_up_nodes(&mut self, now: Now) {
        let (gone, waiting) = self.loss.give_up(self.model.nodes.len() as u64, now.mono_ms);
        for node in &gone {
            self.mark_node_services(node);
        }
        if let Some(waiting) = waiting {
            self.readiness.notice(format!(
                "many nodes are silent at once: the tasks of {waiting} of them are replaced one node after the other, in \
                 case they come back; `skein node rm --force` gives one up at once"
            ));
        }
    }

    /// Whether some service waits for a pause before its next attempt.
    pub fn has_timers(&self) -> bool {
        !self.timers.is_empty() || self.stale_words
    }

    /// Liveness of a node.
    pub fn node_status(&self, node: &NodeId) -> NodeStatus {
        self.liveness.status(node)
    }

    /// A node with its liveness.
    pub fn node_view(&self, node: &Node) -> Node {
        Node { status: Some(self.liveness.status(&node.id)), ..node.clone() }
    }

    /// Is the node known to be reachable?
    pub fn is_ready(&self, node: &NodeId) -> bool {
        self.liveness.is_ready(node)
    }

    /// Checks every invariant over the whole state; for tests and `GET /v1/check`.
    pub fn check(&self) -> Vec<String> {
        crate::check::check(self)
    }

    /// Checks the invariants of what `changes` touched; O(changes, and the tasks of their nodes). The state is the one
    /// after them.
    pub fn check_touched(&self, changes: &[Change]) -> Vec<String> {
        crate::check::check_touched(self, changes)
    }
}

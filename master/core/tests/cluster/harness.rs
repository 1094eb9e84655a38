//! A cluster of the real core and pure fake agents.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use master_core::{
    Command, Context, Core, Now, Reply, Settings,
    liveness::DETECTION_MS,
    model::{Change, Cluster as ClusterObject, Key, Model, Object},
};
use skein_api::{
    ApiError, Assignment, Availability, ContainerCreate, Dependency, DependencyCondition, Health, Link, Mount,
    MountKind, NetworkAttachment, NetworkId, NetworkSpec, NodeDescription, NodeId, NodeUpdate, Origin, PlanAction,
    PortPublish, Resources, RestartCondition, ServiceMode, ServiceSpec, StackApply, StackPlan, StackSpec, Task,
    TaskAddress, TaskAssignment, TaskId, TaskReport, TaskState, TaskStatus, TokenCreate, TokenId, UnixMillis, address6,
};

/// Turns after which a cluster that nobody disturbs must be at rest: a start takes five reports, and a stop, its
/// removal and a successor follow each other at most a few times.
const TURNS_MAX: usize = 60;

/// What a fake agent knows of one task.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Local {
    pub(crate) run: u64,
    pub(crate) status: TaskStatus,
}

/// A fake agent: a ledger of documents, and containers that do as they are told, one step at a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Agent {
    /// Its packets arrive.
    pub(crate) connected: bool,
    /// Its session takes nothing for now, so that what it is to be told piles up.
    pub(crate) slow: bool,
    chain: u64,
    generation: u64,
    pub(crate) docs: BTreeMap<String, Assignment>,
    pub(crate) tasks: BTreeMap<TaskId, Local>,
    /// The newest report of each task until the master confirmed it.
    pub(crate) unconfirmed: BTreeMap<TaskId, TaskReport>,
    /// Everything that was ever reported, for replays.
    pub(crate) said: Vec<TaskReport>,
    /// Addresses of containers that the engine runs by itself.
    pub(crate) plain: BTreeSet<(NetworkId, Ipv4Addr)>,
}

impl Agent {
    fn take(&mut self, chain: u64, batch: master_core::dispatch::Batch) {
        if batch.full {
            self.docs.clear();
        } else {
            assert_eq!((self.chain, self.generation), (chain, batch.base), "a batch builds on what the agent has");
        }
        (self.chain, self.generation) = (chain, batch.generation);
        for document in batch.upserts {
            self.docs.insert(document.key(), document);
        }
        for key in batch.removes {
            self.docs.remove(&key);
        }
    }

    fn assignments(&self) -> Vec<TaskAssignment> {
        let task = |d: &Assignment| if let Assignment::Task(t) = d { Some((**t).clone()) } else { None };
        self.docs.values().filter_map(task).collect()
    }

    pub(crate) fn put(&mut self, task: &TaskId, local: Local) {
        let report = TaskReport { task: task.clone(), run: local.run, status: local.status.clone() };
        self.said.push(report.clone());
        self.unconfirmed.insert(task.clone(), report);
        self.tasks.insert(task.clone(), local);
    }

    /// One step of everything that has a step to make; true when something moved.
    pub(crate) fn step(&mut self, now: Now) -> bool {
        let assigned = self.assignments();
        let known: BTreeSet<TaskId> = assigned.iter().map(|a| a.id.clone()).collect();
        let before = self.tasks.len();
        self.tasks.retain(|id, _| known.contains(id));
        self.unconfirmed.retain(|id, _| known.contains(id));
        let mut moved = before != self.tasks.len();
        for task in assigned {
            if let Some(local) = self.next(&task, now) {
                self.put(&task.id, local);
                moved = true;
            }
        }
        moved
    }

    fn next(&self, task: &TaskAssignment, now: Now) -> Option<Local> {
        let first = || Local { run: task.run, status: status(TaskState::Accepted, now) };
        let Some(local) = self.tasks.get(&task.id) else { return Some(first()) };
        let (state, wanted) = (local.status.state, task.desired_state);
        let to = |state| {
            Some(Local { run: local.run, status: TaskStatus { state, since: now.wall, ..local.status.clone() } })
        };
        match wanted {
            // A later start is wanted: this run ends first, if it has not.
            TaskState::Running if task.service.is_none() && task.run > local.run => {
                if state.is_terminal() {
                    Some(first())
                } else {
                    to(TaskState::Shutdown)
                }
            }
            TaskState::Remove if state.is_terminal() && state != TaskState::Remove => to(TaskState::Remove),
            TaskState::Remove | TaskState::Shutdown if !state.is_terminal() => to(TaskState::Shutdown),
            TaskState::Running => match state {
                TaskState::Accepted => to(TaskState::Preparing),
                TaskState::Preparing => {
                    let addresses = self.addresses(task)?;
                    let status = TaskStatus { state: TaskState::Ready, addresses, ..local.status.clone() };
                    Some(Local { run: local.run, status })
                }
                // The process starts when this host is told the container's names: everybody else knows them by then.
                TaskState::Ready if task.networks.iter().all(|n| self.knows(n, &task.id)) => to(TaskState::Starting),
                TaskState::Starting => to(TaskState::Running),
                _ => None,
            },
            _ => None,
        }
    }

    fn knows(&self, network: &NetworkId, task: &TaskId) -> bool {
        self.docs.contains_key(&format!("endpoint/{network}/{task}"))
    }

    /// Addresses that are in use of those that are frozen here, by ticket.
    fn frozen(&self) -> BTreeMap<u64, Vec<Ipv4Addr>> {
        let used = self.used(true);
        let networks = self.docs.values().filter_map(|d| if let Assignment::Network(n) = d { Some(n) } else { None });
        let all = networks.flat_map(|n| n.frozen.iter().map(move |f| (n, f)));
        let inside = |id: &NetworkId, prefix: ipnet::Ipv4Net| {
            used.iter().filter(|(n, a)| n == id && prefix.contains(a)).map(|(_, a)| *a).collect()
        };
        all.filter(|(_, f)| f.ticket != 0).map(|(n, f)| (f.ticket, inside(&n.id, f.prefix))).collect()
    }

    /// Addresses that somebody has here; those of ended tasks too, if so asked: their containers are still there.
    fn used(&self, ended: bool) -> BTreeSet<(NetworkId, Ipv4Addr)> {
        let tasks = self.tasks.values().filter(|t| ended || !t.status.state.is_terminal());
        let of_tasks = tasks.flat_map(|t| t.status.addresses.iter().filter_map(|a| Some((a.network.clone(), a.v4?))));
        of_tasks.chain(self.plain.iter().cloned()).collect()
    }

    /// Free addresses in the task's networks, from this host's blocks.
    fn addresses(&self, task: &TaskAssignment) -> Option<Vec<TaskAddress>> {
        let used = self.used(false);
        let free = |id: &NetworkId| {
            let Some(Assignment::Network(network)) = self.docs.get(&format!("network/{id}")) else { return None };
            let all = network
                .blocks
                .iter()
                .flat_map(|b| (u32::from(b.network())..=u32::from(b.broadcast())).map(Ipv4Addr::from));
            let asked = task.spec.static_address(id);
            let may = |a: Ipv4Addr| match asked {
                Some(asked) => a == asked,
                None => !network.frozen.iter().any(|f| f.prefix.contains(&a)),
            };
            let free = |a: &Ipv4Addr| {
                *a > network.gateway4 && *a != network.subnet4.broadcast() && !used.contains(&(id.clone(), *a))
            };
            let v4 = all.into_iter().find(|a| may(*a) && free(a))?;
            let v6 = Some(address6(network.subnet6, network.subnet4, v4));
            Some(TaskAddress { network: id.clone(), v4: Some(v4), v6 })
        };
        task.networks.iter().map(free).collect()
    }
}

fn status(state: TaskState, now: Now) -> TaskStatus {
    TaskStatus { state, since: now.wall, ..TaskStatus::default() }
}

/// The master's core, its store and its agents.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    pub(crate) core: Core,
    /// What a restarted master reads: bytes, as the real store has them.
    pub(crate) store: BTreeMap<Key, Vec<u8>>,
    pub(crate) agents: BTreeMap<NodeId, Agent>,
    pub(crate) now: Now,
    chain: u64,
    seed: u64,
    revision: u64,
    /// How far each task was seen to be: its run and state only go forward.
    reached: BTreeMap<TaskId, (u64, TaskState)>,
    /// Whether it was restored from a backup: what was given since then may be given again before its host is heard.
    restored: bool,
}

pub(crate) fn settings() -> Settings {
    Settings::default()
}

impl Cluster {
    /// A cluster with a token `t` of many uses and no nodes.
    pub(crate) fn new() -> Self {
        let now = Now { wall: UnixMillis(1_700_000_000_000), mono_ms: 1_000_000 };
        let core = Core::load(settings(), Vec::new(), now);
        let mut cluster = Self {
            core,
            store: BTreeMap::new(),
            agents: BTreeMap::new(),
            now,
            chain: 1,
            seed: 1,
            revision: 0,
            reached: BTreeMap::new(),
            restored: false,
        };
        let object = ClusterObject { id: "c".into(), ula_global_id: 0x12_3456_789a, ..ClusterObject::default() };
        cluster.ok(Command::InitCluster(Box::new(object)));
        let request = TokenCreate { ttl_s: 24 * 3_600, uses: 1_000, ..TokenCreate::default() };
        cluster.ok(Command::TokenCreate { id: TokenId::new("t"), secret_sha256: "s".into(), request });
        cluster
    }

    /// A cluster of `n` ready nodes, `n1` to `n<n>`.
    pub(crate) fn with_nodes(n: usize) -> Self {
        let mut cluster = Self::new();
        for i in 1..=n {
            cluster.join(&format!("n{i}"));
        }
        cluster.rest();
        cluster
    }

    pub(crate) fn model(&self) -> &Model {
        self.core.model()
    }

    pub(crate) fn context(&mut self) -> Context {
        self.seed += 1;
        Context { now: self.now, origin: Origin { who: "test".into(), why: String::new() }, seed: self.seed }
    }

    pub(crate) fn execute(&mut self, command: &Command) -> Result<Reply, ApiError> {
        let ctx = self.context();
        self.core.execute(command, &ctx)
    }

    /// A command that is accepted, with everything that follows from it at once.
    pub(crate) fn ok(&mut self, command: Command) -> Reply {
        let reply = self.execute(&command).unwrap_or_else(|e| panic!("{command:?}: {e}"));
        self.turn();
        reply
    }

    /// A command that is refused with this code; nothing changes by it.
    pub(crate) fn refused(&mut self, command: Command, code: &str) -> ApiError {
        self.turn();
        let before = self.model().clone();
        let error = match self.execute(&command) {
            Ok(reply) => panic!("not refused: {command:?}: {reply:?}"),
            Err(error) => error,
        };
        assert_eq!(error.code, code, "{error}");
        assert_eq!(*self.model(), before, "a refusal changes nothing");
        assert_eq!(self.turn(), 0, "a refusal has no consequences");
        error
    }

    pub(crate) fn description(name: &str) -> NodeDescription {
        let resources = Resources { nano_cpus: 4_000_000_000, mem_bytes: 4 << 30 };
        let last: u8 = name.trim_start_matches('n').parse().unwrap_or(200);
        NodeDescription {
            hostname: name.into(),
            capacity: resources,
            offered: resources,
            os: "linux".into(),
            arch: "x86_64".into(),
            underlay4: Some(Ipv4Addr::new(192, 0, 2, last)),
            underlay_mtu: 1_500,
            freezes: true,
            ..NodeDescription::default()
        }
    }

    pub(crate) fn join_command(&self, name: &str) -> Command {
        Command::Join {
            token: TokenId::new("t"),
            secret_sha256: "s".into(),
            key_digest: format!("key of {name} {}", self.seed),
            description: Box::new(Self::description(name)),
            clock: self.now.wall,
        }
    }

    /// A host joins and opens its session.
    pub(crate) fn join(&mut self, name: &str) -> NodeId {
        let Reply::Node(id) = self.ok(self.join_command(name)) else { panic!("a join answers with a node") };
        self.agents.insert(id.clone(), Agent::default());
        self.connect(&id);
        id
    }

    pub(crate) fn connect(&mut self, id: &NodeId) {
        let agent = self.agents.get_mut(id).expect("the node has an agent");
        agent.connected = true;
        self.core.dispatch_open(id, agent.chain == self.chain, agent.generation);
        self.core.session_opened(id, self.now);
        self.turn();
    }

    pub(crate) fn cut(&mut self, node: &str) {
        let id = self.node(node);
        self.agents.get_mut(&id).expect("the node has an agent").connected = false;
    }

    /// A batch leaves the master and never arrives: the session breaks.
    pub(crate) fn lose_batch(&mut self, node: &NodeId) {
        self.core.dispatch_take(node);
        self.agents.get_mut(node).expect("the node has an agent").connected = false;
    }

    pub(crate) fn heal(&mut self, node: &str) {
        let id = self.node(node);
        self.connect(&id);
    }

    pub(crate) fn node(&self, name: &str) -> NodeId {
        self.model().node_named(name).unwrap_or_else(|| panic!("node {name}")).id.clone()
    }

    /// Settles, commits, checks everything, and tells the agents. Returns how many objects changed.
    pub(crate) fn turn(&mut self) -> usize {
        self.seed += 1;
        self.core.settle(self.now, self.seed);
        let changes = self.commit();
        // The connection of a removed node is cut, and its identity is refused.
        let model = self.core.model();
        self.agents.retain(|node, _| model.nodes.contains_key(node));
        self.check();
        self.tell();
        changes
    }

    fn commit(&mut self) -> usize {
        let changes = self.core.take_staged();
        for change in &changes {
            match change {
                Change::Upsert(object) => self.store.insert(object.key(), object.encode()),
                Change::Delete(key) => self.store.remove(key),
            };
        }
        if !changes.is_empty() {
            self.revision += 1;
            self.core.committed(changes.clone(), self.revision);
        }
        changes.len()
    }

    /// Every invariant, and that states go forward.
    pub(crate) fn check(&mut self) {
        let broken = self.core.check();
        assert!(broken.is_empty(), "{broken:#?}");
        self.check_addresses();
        let mut reached = BTreeMap::new();
        for task in self.core.model().tasks.values() {
            let here = (task.run, task.status.state);
            if let Some(before) = self.reached.get(&task.id) {
                assert!(*before <= here, "task {} went from {before:?} back to {here:?}", task.name);
                let over = before.0 == here.0 && before.1.is_terminal();
                assert!(!over || *before == here, "task {} ended twice: {before:?}, {here:?}", task.name);
            }
            reached.insert(task.id.clone(), here);
        }
        self.reached = reached;
    }

    /// Delivers assignments to connected agents, and compares each ledger with a full one.
    fn tell(&mut self) {
        // What one acknowledges may be what another waits to be told.
        loop {
            let takes = |n: &NodeId| self.agents.get(n).is_some_and(|a| a.connected && !a.slow);
            let Some(node) = self.core.dispatch_due().into_iter().find(takes) else { break };
            let Some(batch) = self.core.dispatch_take(&node) else { break };
            let generation = batch.generation;
            self.agents.get_mut(&node).expect("it takes").take(self.chain, batch);
            self.core.dispatch_acked(&node, generation);
        }
        let mut asked = self.core.clone();
        for (node, agent) in self.agents.iter().filter(|(_, a)| a.connected && !a.slow) {
            asked.dispatch_open(node, false, 0);
            let full = asked.dispatch_take(node).map(|b| b.upserts).unwrap_or_default();
            let full: BTreeMap<String, Assignment> = full.into_iter().map(|d| (d.key(), d)).collect();
            assert_eq!(agent.docs, full, "what node {node} was told step by step is the whole");
            own_objects_only(self.core.model(), node, &agent.docs);
        }
    }

    /// Connected agents make one step and report; true when something moved.
    pub(crate) fn agents_step(&mut self) -> bool {
        let mut moved = false;
        let ids: Vec<NodeId> = self.agents.keys().cloned().collect();
        for id in ids {
            moved |= self.agents.get_mut(&id).expect("listed").step(self.now);
            moved |= self.deliver(&id);
            moved |= self.answer(&id);
        }
        moved
    }

    /// The engine of a node runs a container by itself on the `pick`th address that is free, or ends one.
    pub(crate) fn plain_container(&mut self, node: &NodeId, pick: usize) {
        let agent = self.agents.get_mut(node).expect("listed");
        if let Some(one) = agent.plain.first().filter(|_| pick.is_multiple_of(3)).cloned() {
            agent.plain.remove(&one);
            return;
        }
        let used = agent.used(true);
        let networks = agent.docs.values().filter_map(|d| if let Assignment::Network(n) = d { Some(n) } else { None });
        let all = networks.filter(|n| n.attachable).flat_map(|n| {
            let addresses = n.blocks.iter().flat_map(|b| u32::from(b.network())..=u32::from(b.broadcast()));
            let free = addresses.map(Ipv4Addr::from).filter(|a| {
                *a > n.gateway4 && *a != n.subnet4.broadcast() && !n.frozen.iter().any(|f| f.prefix.contains(a))
            });
            free.map(|a| (n.id.clone(), a)).collect::<Vec<_>>()
        });
        let free: Vec<_> = all.filter(|one| !used.contains(one)).collect();
        if let Some(one) = pick.checked_rem(free.len()).map(|at| free[at].clone()) {
            agent.plain.insert(one);
        }
    }

    /// Every address that is in use, with who has it: no two have the same.
    fn check_addresses(&self) {
        if self.restored {
            return;
        }
        let mut seen: BTreeMap<(NetworkId, Ipv4Addr), String> = BTreeMap::new();
        for (node, agent) in self.agents.iter().filter(|(node, _)| self.core.is_ready(node)) {
            let placed = agent.tasks.iter().filter(|(id, l)| {
                let task = self.model().tasks.get(*id);
                !l.status.state.is_terminal() && task.is_some_and(|t| !t.status.state.is_terminal())
            });
            let of = |l: &Local| l.status.addresses.iter().map(|a| (a.network.clone(), a.v4.expect("given"))).collect();
            let tasks = placed.map(|(id, l)| (id.to_string(), of(l)));
            let plain = (format!("a plain container of {node}"), agent.plain.iter().cloned().collect());
            for (who, addresses) in tasks.chain([plain]) {
                let addresses: Vec<(NetworkId, Ipv4Addr)> = addresses;
                for address in addresses {
                    if let Some(other) = seen.insert(address.clone(), who.clone()) {
                        panic!("address {} belongs to {other} and {who}", address.1);
                    }
                }
            }
        }
    }

    /// Delivers what an agent has to say of frozen addresses, if it is connected and that is news.
    pub(crate) fn answer(&mut self, node: &NodeId) -> bool {
        let agent = &self.agents[node];
        let (frozen, known) = (agent.frozen(), &self.model().nodes[node].description);
        let mut plain_addresses = BTreeMap::new();
        for (network, _) in &agent.plain {
            *plain_addresses.entry(network.clone()).or_default() += 1;
        }
        if !agent.connected || (&frozen, &plain_addresses) == (&known.frozen, &known.plain_addresses) {
            return false;
        }
        let description = Box::new(NodeDescription { frozen, plain_addresses, ..known.clone() });
        self.ok(Command::Describe { node: node.clone(), description });
        true
    }

    /// Delivers what an agent has to say, if it is connected.
    pub(crate) fn deliver(&mut self, node: &NodeId) -> bool {
        let agent = self.agents.get_mut(node).expect("listed");
        if !agent.connected || agent.unconfirmed.is_empty() {
            return false;
        }
        let reports = std::mem::take(&mut agent.unconfirmed).into_values().collect();
        self.ok(Command::Reports { node: node.clone(), reports });
        true
    }

    /// Until nothing moves any more, without time passing.
    pub(crate) fn rest(&mut self) {
        for _ in 0..TURNS_MAX {
            let moved = self.agents_step();
            if self.turn() == 0 && !moved {
                return;
            }
        }
        panic!("the cluster does not come to rest");
    }

    /// Time passes in steps of a second, with heartbeats of the connected agents; then rest.
    pub(crate) fn pass(&mut self, ms: u64) {
        let until = self.now.mono_ms + ms;
        while self.now.mono_ms < until {
            let step = (until - self.now.mono_ms).min(1_000);
            self.now.mono_ms += step;
            self.now.wall = self.now.wall.plus_ms(step);
            self.beat();
            self.core.tick(self.now);
            self.turn();
            self.agents_step();
        }
        self.rest();
    }

    fn beat(&mut self) {
        for (node, _) in self.agents.iter().filter(|(_, a)| a.connected) {
            self.core.heartbeat(node, self.now);
        }
    }

    /// The master is killed and starts again from what it stored; agents connect again.
    pub(crate) fn restart_master(&mut self) {
        self.core = self.loaded();
        self.chain += 1;
        let connected: Vec<NodeId> = self.agents.iter().filter(|(_, a)| a.connected).map(|(n, _)| n.clone()).collect();
        for node in connected {
            self.connect(&node);
        }
    }

    /// The store goes back to an earlier state; agents learn of it as they connect again, and then say everything anew.
    pub(crate) fn restore(&mut self, backup: BTreeMap<Key, Vec<u8>>) {
        (self.store, self.reached, self.restored) = (backup, BTreeMap::new(), true);
        for agent in self.agents.values_mut() {
            let again = |(id, local): (&TaskId, &Local)| {
                (id.clone(), TaskReport { task: id.clone(), run: local.run, status: local.status.clone() })
            };
            agent.unconfirmed = agent.tasks.iter().map(again).collect();
        }
        self.restart_master();
    }

    /// A core read from the store.
    pub(crate) fn loaded(&self) -> Core {
        let decode = |(key, bytes): (&Key, &Vec<u8>)| Object::decode(key.kind, bytes).expect("what was encoded");
        Core::load(settings(), self.store.iter().map(decode).collect(), self.now)
    }

    /// A node was silent for long enough to be lost.
    pub(crate) fn lose(&mut self, node: &str) {
        self.cut(node);
        self.pass(DETECTION_MS);
    }

    pub(crate) fn drain(&mut self, node: &str, availability: Availability) {
        let update = NodeUpdate { availability: Some(availability), ..NodeUpdate::default() };
        self.ok(Command::NodeUpdate { node: node.into(), update });
    }

    pub(crate) fn label(&mut self, node: &str, key: &str, value: &str) {
        let update = NodeUpdate { labels_add: [(key.into(), value.into())].into(), ..NodeUpdate::default() };
        self.ok(Command::NodeUpdate { node: node.into(), update });
    }

    /// Applies a stack of these services, which are brought to rest.
    pub(crate) fn up(&mut self, services: Vec<ServiceSpec>) -> StackPlan {
        let plan = self.apply(stack(services));
        self.rest();
        plan
    }

    pub(crate) fn apply(&mut self, stack: StackSpec) -> StackPlan {
        let apply = StackApply { stack, ..StackApply::default() };
        match self.ok(Command::StackApply(Box::new(apply))) {
            Reply::Plan(plan) => plan,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn down(&mut self, volumes: bool) -> StackPlan {
        let command = Command::StackRemove { name: "s".into(), volumes, dry_run: false };
        let Reply::Plan(plan) = self.ok(command) else { panic!("a stack's command answers with a plan") };
        plan
    }

    pub(crate) fn run(&mut self, create: ContainerCreate) -> TaskId {
        let Reply::Task(id) = self.ok(Command::ContainerCreate(Box::new(create))) else { panic!("a task") };
        self.rest();
        id
    }

    /// Live tasks of a service of the stack `s`, by slot.
    pub(crate) fn live(&self, service: &str) -> Vec<Task> {
        let Some(service) = self.model().service_named(&format!("s_{service}")) else { return Vec::new() };
        let live = |t: &&Task| t.desired_state == TaskState::Running && !t.status.state.is_terminal();
        let mut tasks: Vec<Task> = self.model().service_tasks(&service.id).filter(live).cloned().collect();
        tasks.sort_by_key(|t| (t.slot, t.name.clone()));
        tasks
    }

    /// `web.1 running n1` for each live task of a service, or with what it waits for instead of a node.
    pub(crate) fn show(&self, service: &str) -> Vec<String> {
        let node = |t: &Task| t.node.as_ref().map(|n| self.model().nodes[n].name.clone());
        let line = |t: &Task| {
            let place = node(t).unwrap_or_else(|| t.status.message.clone());
            format!("{} {:?} {place}", t.name.trim_start_matches("s_"), t.status.state).to_lowercase()
        };
        self.live(service).iter().map(line).collect()
    }

    /// Nodes of the live tasks of a service.
    pub(crate) fn nodes_of(&self, service: &str) -> Vec<String> {
        let name = |t: &Task| t.node.as_ref().map(|n| self.model().nodes[n].name.clone());
        let mut nodes: Vec<String> = self.live(service).iter().filter_map(name).collect();
        nodes.sort();
        nodes
    }

    pub(crate) fn task(&self, name: &str) -> Task {
        self.model().find_task(name).unwrap_or_else(|e| panic!("{e}")).clone()
    }

    /// The container of a task ends by itself.
    pub(crate) fn end(&mut self, task: &str, code: i64) {
        let task = self.task(task);
        let node = task.node.clone().expect("it is placed");
        let state = if code == 0 { TaskState::Complete } else { TaskState::Failed };
        let agent = self.agents.get_mut(&node).expect("listed");
        let local = agent.tasks[&task.id].clone();
        let message = format!("exited with {code}");
        let status = TaskStatus { exit_code: Some(code), message, ..status(state, self.now) };
        agent.put(&task.id, Local { status, ..local });
        self.deliver(&node);
    }

    pub(crate) fn health(&mut self, task: &str, health: Health) {
        let task = self.task(task);
        let node = task.node.clone().expect("it is placed");
        let agent = self.agents.get_mut(&node).expect("listed");
        let mut local = agent.tasks[&task.id].clone();
        local.status.health = Some(health);
        agent.put(&task.id, local);
        self.deliver(&node);
    }
}

/// A host sees its own tasks, the networks that it has blocks of, and their members.
fn own_objects_only(model: &Model, node: &NodeId, docs: &BTreeMap<String, Assignment>) {
    for document in docs.values() {
        let own = match document {
            Assignment::Task(t) => model.tasks[&t.id].node.as_ref() == Some(node),
            Assignment::Network(n) => model.is_member(&n.id, node),
            Assignment::Peer(p) => p.node != *node && model.is_member(&p.network, node),
            Assignment::Service(s) => model.is_member(&s.network, node),
            Assignment::Endpoint(e) => model.is_member(&e.network, node),
        };
        assert!(own, "node {node} was told of {}", document.key());
    }
}

/// The stack `s` with these services, and the networks and volumes that they name.
pub(crate) fn stack(services: Vec<ServiceSpec>) -> StackSpec {
    let mut networks: BTreeSet<String> = BTreeSet::new();
    let mut volumes: BTreeSet<String> = BTreeSet::new();
    for service in &services {
        networks.extend(service.task.networks.iter().map(|a| a.network.clone()));
        volumes.extend(service.task.container.mounts.iter().filter_map(|m| m.source.clone()));
    }
    let own = |name: &String| name.starts_with("s_");
    let network = |name: String| NetworkSpec { name, stack: Some("s".into()), ..NetworkSpec::default() };
    StackSpec {
        name: "s".into(),
        external_networks: networks.iter().filter(|n| !own(n)).cloned().collect(),
        networks: networks.into_iter().filter(own).map(network).collect(),
        volumes: volumes.into_iter().collect(),
        services,
    }
}

/// A service of the stack `s` that restarts at once.
pub(crate) fn service(name: &str) -> ServiceSpec {
    let mut spec = ServiceSpec {
        name: format!("s_{name}"),
        short_name: name.into(),
        stack: Some("s".into()),
        ..ServiceSpec::default()
    };
    spec.task.container.image = "busybox".into();
    spec.task.restart.delay_ms = 1_000;
    spec
}

/// Builders of what tests change in a service.
pub(crate) trait With: Sized {
    fn with(self, change: impl FnOnce(&mut Self)) -> Self;
}

impl<T> With for T {
    fn with(mut self, change: impl FnOnce(&mut T)) -> T {
        change(&mut self);
        self
    }
}

pub(crate) fn replicas(spec: &mut ServiceSpec, n: u32) {
    spec.mode = ServiceMode::Replicated(n);
}

pub(crate) fn restart(spec: &mut ServiceSpec, condition: RestartCondition) {
    spec.task.restart.condition = condition;
}

pub(crate) fn needs(spec: &mut ServiceSpec, service: &str, condition: DependencyCondition) {
    spec.depends_on.push(Dependency { service: format!("s_{service}"), condition });
}

pub(crate) fn constraint(spec: &mut ServiceSpec, expression: &str) {
    spec.task.placement.constraints.push(expression.into());
}

pub(crate) fn network(spec: &mut ServiceSpec, name: &str) {
    spec.task.networks.push(NetworkAttachment { network: name.into(), ..NetworkAttachment::default() });
}

/// As [`network`], with a static address.
pub(crate) fn network_at(spec: &mut ServiceSpec, name: &str, address: &str) {
    network(spec, name);
    let attachment = spec.task.networks.last_mut().expect("just added");
    attachment.ipv4 = Some(address.parse().expect("an address"));
}

pub(crate) fn volume(spec: &mut ServiceSpec, name: &str) {
    spec.task.container.mounts.push(Mount {
        kind: MountKind::Volume,
        source: Some(name.into()),
        target: "/data".into(),
        read_only: false,
        tmpfs_size_bytes: None,
        volume_driver: None,
    });
}

pub(crate) fn link(spec: &mut ServiceSpec, service: &str) {
    spec.task.container.links.push(Link { target: format!("s_{service}"), alias: service.into() });
}

pub(crate) fn port(host_port: u16) -> PortPublish {
    PortPublish { protocol: Default::default(), container_port: 80, host_port, host_ip: None }
}

pub(crate) fn container(name: &str) -> ContainerCreate {
    let mut create = ContainerCreate { name: name.into(), ..ContainerCreate::default() };
    create.spec.container.image = "busybox".into();
    create.spec.restart.condition = RestartCondition::None;
    create
}

/// The plan as lines: `service s_web create`.
pub(crate) fn lines(plan: &StackPlan) -> Vec<String> {
    let action = |a: PlanAction| format!("{a:?}").to_lowercase();
    plan.items.iter().map(|i| format!("{} {} {}", i.kind, i.name, action(i.action))).collect()
}

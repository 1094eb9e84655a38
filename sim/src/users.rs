//! Who asks for changes: deployers with a stack each, operators of nodes and networks, and people who run containers.
//!
//! Each user has one request open at a time and asks again when no answer came, as a client does. What was answered is
//! what the checker holds the master to; what was asked and not answered may or may not have happened.

use master_core::{Command, Reply};
use skein_api::{
    ApiError, Availability, ContainerCreate, Dependency, DependencyCondition, Healthcheck, NetworkAttachment,
    NetworkSpec, NodeUpdate, Origin, PortPublish, Resources, RestartCondition, ServiceMode, ServiceSpec, StackApply,
    StackSpec, TaskSpec,
};

use crate::{
    master::{Asker, Incoming},
    queue::Millis,
    random::Random,
    world::{Event, World},
};

/// The token that every host joins with.
pub(crate) const TOKEN: &str = "token";
/// SHA-256 of its secret; the core only compares.
pub(crate) const SECRET: &str = "secret";
/// Services of a stack at most.
const SERVICES_MAX: u64 = 4;
/// What one task reserves: 5 of 64 tasks fit on a host thirteen times.
const TASK: Resources = Resources { nano_cpus: 100_000_000, mem_bytes: 64 << 20 };
/// A refused or unanswered request is repeated after this long.
const AGAIN_MS: (Millis, Millis) = (1_000, 3_000);

/// A stack as its deployer thinks of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) stack: StackSpec,
}

/// What is known of a stack: the last answered state, and what was asked for since without an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// None: no such stack.
    pub(crate) answered: Option<Wanted>,
    pub(crate) maybe: Vec<Option<Wanted>>,
    /// A backup was restored: nothing is known before the next answer.
    pub(crate) forgotten: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    Deployer {
        stack: usize,
        networked: bool,
    },
    Operator,
    Runner {
        names: u64,
    },
    /// Containers that come and go as in a recorded trace.
    Replayer {
        next: usize,
    },
}

#[derive(Clone, Debug)]
struct Request {
    command: Command,
    /// What the stack is when it succeeds.
    outcome: Option<Option<Wanted>>,
}

/// A user.
#[derive(Clone, Debug)]
pub(crate) struct User {
    kind: Kind,
    rng: Random,
    pub(crate) known: Known,
    open: Option<Request>,
    /// It was sent and not answered.
    sent: bool,
    serial: u64,
}

/// One arrival of a recorded trace.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Milliseconds after the trace began.
    pub at_ms: u64,
    /// How long it stays, milliseconds.
    pub lasts_ms: u64,
    /// CPU, nano-CPUs.
    pub nano_cpus: u64,
    /// Memory, bytes.
    pub mem_bytes: u64,
}

impl User {
    fn new(kind: Kind, seed: u64, at: usize) -> Self {
        let rng = Random::new(seed, 1_000 + at as u64);
        Self { kind, rng, known: Known::default(), open: None, sent: false, serial: 0 }
    }

    /// Waits for an answer, or will ask again.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The stack that this user deploys.
    pub(crate) fn stack(&self) -> Option<String> {
        match self.kind {
            Kind::Deployer { stack, .. } => Some(stack_name(stack)),
            _ => None,
        }
    }
}

fn stack_name(stack: usize) -> String {
    format!("s{stack}")
}

impl World {
    /// The users of this world.
    pub(crate) fn make_users(&mut self) {
        let seed = self.config.seed;
        let agents = self.config.agents as usize;
        let stacks = (agents / 25).clamp(3, 60);
        for stack in 0..stacks {
            self.users.push(User::new(Kind::Deployer { stack, networked: stack % 6 == 0 }, seed, stack));
        }
        let operators = (agents / 400).clamp(1, 4);
        for at in 0..operators {
            self.users.push(User::new(Kind::Operator, seed, 500 + at));
        }
        for at in 0..2 {
            self.users.push(User::new(Kind::Runner { names: 8 }, seed, 600 + at));
        }
        if !self.arrivals.is_empty() {
            self.users.push(User::new(Kind::Replayer { next: 0 }, seed, 700));
        }
        for at in 0..self.users.len() {
            let first = 2_000 + self.users[at].rng.below(4_000);
            self.queue.push(first, Event::User(u32::try_from(at).expect("few users")));
        }
    }

    /// A user acts: repeats what is open, or thinks of something new.
    pub(crate) fn user_acts(&mut self, at: u32) {
        let user = &mut self.users[at as usize];
        if user.sent {
            return;
        }
        let again = user.rng.within(AGAIN_MS.0, AGAIN_MS.1);
        if self.master.process.is_none() {
            self.queue.push(self.now_ms + again, Event::User(at));
            return;
        }
        if self.users[at as usize].open.is_none() {
            let Some(request) = self.user_thinks(at as usize) else { return };
            self.users[at as usize].open = Some(request);
        }
        let user = &mut self.users[at as usize];
        let Some(request) = user.open.clone() else { return };
        user.sent = true;
        if let Some(outcome) = request.outcome {
            user.known.maybe.push(outcome);
        }
        let origin = Origin { who: format!("user-{at}"), why: String::new() };
        self.stats.requests += 1;
        let command = Box::new(request.command);
        self.master_take(Incoming::Command { command, origin, asker: Asker::User(at) });
    }

    /// An answer has come.
    pub(crate) fn user_hears(&mut self, at: u32, answer: Result<Reply, ApiError>) {
        let user = &mut self.users[at as usize];
        user.sent = false;
        let Some(request) = user.open.take() else { return };
        self.trace.mix(&[self.now_ms, 4, u64::from(at), u64::from(answer.is_ok())]);
        match answer {
            Ok(_) => {
                self.stats.answered += 1;
                if let Some(outcome) = request.outcome {
                    user.known = Known { answered: outcome, maybe: Vec::new(), forgotten: false };
                }
            }
            Err(error) if error.code == "read_only" || error.code == "not_stored" => {
                // Nothing is known of it when the store does not know.
                if error.code == "read_only" && request.outcome.is_some() {
                    user.known.maybe.pop();
                }
                user.open = Some(request);
                let again = user.rng.within(AGAIN_MS.0, AGAIN_MS.1);
                self.queue.push(self.now_ms + again, Event::User(at));
                return;
            }
            Err(_) => {
                self.stats.refused += 1;
                if request.outcome.is_some() {
                    user.known.maybe.pop();
                }
            }
        }
        if let Some(pause) = self.user_pause(at as usize) {
            self.queue.push(self.now_ms + pause, Event::User(at));
        }
    }

    /// The master died: nobody knows what became of open requests.
    pub(crate) fn users_cut_off(&mut self) {
        for at in 0..self.users.len() {
            let user = &mut self.users[at];
            if std::mem::take(&mut user.sent) {
                let again = user.rng.within(AGAIN_MS.0, AGAIN_MS.1);
                self.queue.push(self.now_ms + again, Event::User(u32::try_from(at).expect("few users")));
            }
        }
    }

    /// A backup was restored: what was answered since may be gone.
    pub(crate) fn users_forget(&mut self) {
        for user in &mut self.users {
            user.known.forgotten = true;
        }
    }

    fn user_pause(&mut self, at: usize) -> Option<Millis> {
        let until_ms = self.config.quiet_from_ms();
        let user = &mut self.users[at];
        let pause = match user.kind {
            Kind::Deployer { .. } => user.rng.pause(self.config.deploy_every_ms),
            Kind::Operator => user.rng.pause(20_000),
            Kind::Runner { .. } => user.rng.pause(10_000),
            Kind::Replayer { next } => {
                let due = self.arrivals.get(next)?.at_ms;
                due.saturating_sub(self.now_ms).max(1)
            }
        };
        (self.now_ms + pause < until_ms).then_some(pause)
    }

    fn user_thinks(&mut self, at: usize) -> Option<Request> {
        let kind = self.users[at].kind.clone();
        match kind {
            Kind::Deployer { stack, networked } => {
                let request = self.deploy(at, stack, networked);
                Some(request)
            }
            Kind::Operator => Some(Request { command: self.operate(at), outcome: None }),
            Kind::Runner { names } => Some(Request { command: self.run_container(at, names), outcome: None }),
            Kind::Replayer { next } => self.replay(at, next),
        }
    }

    fn deploy(&mut self, at: usize, number: usize, networked: bool) -> Request {
        let (replicas, global) = (self.config.replicas(), self.config.agents <= 400);
        let user = &mut self.users[at];
        let name = stack_name(number);
        user.serial += 1;
        let rev = user.serial;
        let mut stack = user.known.answered.clone().map(|w| w.stack).unwrap_or_default();
        let fresh = stack.services.is_empty();
        let roll = user.rng.below(20);
        if !fresh && roll == 0 {
            let command = Command::StackRemove { name, volumes: user.rng.per_mille(500), dry_run: false };
            return Request { command, outcome: Some(None) };
        }
        stack.name.clone_from(&name);
        let networks = networked.then(|| NetworkSpec {
            name: format!("{name}_net"),
            stack: Some(name.clone()),
            ..NetworkSpec::default()
        });
        stack.networks = networks.into_iter().collect();
        let first = stack.services.len();
        if fresh || (roll < 4 && (first as u64) < SERVICES_MAX) {
            let more = if fresh { user.rng.within(1, 3) as usize } else { 1 };
            for index in first..first + more {
                stack.services.push(service(&mut user.rng, &name, index, networked, replicas, global));
            }
        } else {
            let index = user.rng.index(stack.services.len());
            let service = &mut stack.services[index];
            match (roll, service.mode) {
                (4..=5, _) if index > 0 => drop(stack.services.remove(index)),
                (4..=12, ServiceMode::Replicated(_)) => {
                    service.mode = ServiceMode::Replicated(u32::try_from(user.rng.below(replicas * 2)).expect("small"));
                }
                // Nothing changes.
                (13, _) => {}
                _ => drop(service.task.container.labels.insert("rev".into(), rev.to_string())),
            }
        }
        let known: Vec<String> = stack.services.iter().map(|s| s.name.clone()).collect();
        for service in &mut stack.services {
            service.depends_on.retain(|d| known.contains(&d.service));
        }
        let outcome = Some(Some(Wanted { stack: stack.clone() }));
        let apply = StackApply { stack, remove_orphans: true, dry_run: false };
        Request { command: Command::StackApply(Box::new(apply)), outcome }
    }

    fn operate(&mut self, at: usize) -> Command {
        let hosts = self.hosts.len() as u64;
        let user = &mut self.users[at];
        user.serial += 1;
        let node = format!("h{}", user.rng.below(hosts));
        let network = format!("plain{}", user.rng.below(3));
        let update = |update| Command::NodeUpdate { node: node.clone(), update };
        match user.rng.below(24) {
            0..=7 => {
                let zone = user.rng.pick(&["a", "b", "c"]).to_string();
                let labels_add = [("zone".to_owned(), zone)].into();
                update(NodeUpdate { labels_add, ..NodeUpdate::default() })
            }
            8..=10 => update(NodeUpdate { availability: Some(Availability::Drain), ..NodeUpdate::default() }),
            11..=12 => update(NodeUpdate { availability: Some(Availability::Pause), ..NodeUpdate::default() }),
            13..=18 => update(NodeUpdate { availability: Some(Availability::Active), ..NodeUpdate::default() }),
            19..=20 => Command::NodeRemove { node, force: true },
            21 => Command::NetworkRemove(network),
            _ => Command::NetworkCreate(NetworkSpec {
                name: network,
                // On every host that is there: only where there are few.
                attachable: hosts <= 300,
                ..NetworkSpec::default()
            }),
        }
    }

    fn run_container(&mut self, at: usize, names: u64) -> Command {
        let user = &mut self.users[at];
        user.serial += 1;
        let name = format!("c{at}-{}", user.rng.below(names));
        match user.rng.below(10) {
            0..=1 => Command::ContainerStop(name),
            2..=3 => Command::ContainerStart(name),
            4 => Command::ContainerRemove { task: name, force: true },
            roll => {
                let mut create = ContainerCreate { name, ..ContainerCreate::default() };
                create.spec.container.image = image(&mut user.rng, roll == 9);
                create.spec.resources.reservations = TASK;
                let policies = [RestartCondition::None, RestartCondition::OnFailure, RestartCondition::Any];
                create.spec.restart.condition = *user.rng.pick(&policies);
                Command::ContainerCreate(Box::new(create))
            }
        }
    }

    fn replay(&mut self, at: usize, next: usize) -> Option<Request> {
        let arrival = *self.arrivals.get(next)?;
        self.users[at].kind = Kind::Replayer { next: next + 1 };
        let mut create = ContainerCreate { name: format!("vm-{next}"), ..ContainerCreate::default() };
        create.spec.container.image = format!("job:{}", arrival.lasts_ms);
        create.spec.resources.reservations = Resources { nano_cpus: arrival.nano_cpus, mem_bytes: arrival.mem_bytes };
        create.spec.restart.condition = RestartCondition::None;
        Some(Request { command: Command::ContainerCreate(Box::new(create)), outcome: None })
    }

    /// The cluster's first commands: itself and the token that hosts join with.
    pub(crate) fn found_cluster(&mut self) {
        let cluster = master_core::model::Cluster {
            id: "c".into(),
            ula_global_id: 0x12_3456_789a,
            ..master_core::model::Cluster::default()
        };
        for command in [Command::InitCluster(Box::new(cluster)), token()] {
            let origin = Origin { who: "local".into(), why: "first start".into() };
            self.master_take(Incoming::Command { command: Box::new(command), origin, asker: Asker::Nobody });
        }
    }
}

/// The request for the token that every host joins with.
pub(crate) fn token() -> Command {
    Command::TokenCreate {
        id: skein_api::TokenId::new(TOKEN),
        secret_sha256: SECRET.into(),
        request: skein_api::TokenCreate { ttl_s: 365 * 24 * 3_600, uses: u32::MAX, ..Default::default() },
    }
}

/// What a container does by its image: runs on, ends after a while, or fails after a while.
fn image(rng: &mut Random, short: bool) -> String {
    if !short {
        return format!("app-{}", rng.below(6));
    }
    let verb = rng.pick(&["job", "fail"]).to_string();
    format!("{verb}:{}", rng.within(500, 90_000))
}

fn service(rng: &mut Random, stack: &str, index: usize, networked: bool, replicas: u64, global: bool) -> ServiceSpec {
    let mut spec = ServiceSpec {
        name: format!("{stack}_w{index}"),
        short_name: format!("w{index}"),
        stack: Some(stack.to_owned()),
        mode: ServiceMode::Replicated(u32::try_from(rng.within(1, replicas * 2)).expect("small")),
        task: TaskSpec::default(),
        ..ServiceSpec::default()
    };
    let short = rng.per_mille(150) && !networked;
    spec.task.container.image = image(rng, short);
    spec.task.resources.reservations = TASK;
    spec.task.restart.delay_ms = 1_000;
    if short {
        let policies = [RestartCondition::None, RestartCondition::OnFailure, RestartCondition::Any];
        spec.task.restart.condition = *rng.pick(&policies);
        // What ends all the time is not to be the whole load.
        spec.mode = ServiceMode::Replicated(3);
    }
    if networked {
        spec.task.networks =
            vec![NetworkAttachment { network: format!("{stack}_net"), ..NetworkAttachment::default() }];
        spec.mode = ServiceMode::Replicated(u32::try_from(rng.within(1, 12)).expect("small"));
    }
    match rng.below(12) {
        0 => {
            let host_port = u16::try_from(8_000 + rng.below(50)).expect("a port");
            spec.task.ports =
                vec![PortPublish { protocol: Default::default(), container_port: 80, host_port, host_ip: None }];
        }
        1 if global && !networked => spec.mode = ServiceMode::Global,
        2 => spec.task.placement.constraints = vec![format!("node.labels.zone!={}", rng.pick(&["a", "b"]))],
        3 | 4 => {
            spec.task.container.healthcheck = Some(Healthcheck { test: vec!["true".into()], ..Default::default() })
        }
        5 if index > 0 => {
            spec.depends_on =
                vec![Dependency { service: format!("{stack}_w0"), condition: DependencyCondition::ServiceStarted }]
        }
        6 => spec.task.placement.max_replicas_per_node = 2,
        _ => {}
    }
    spec
}

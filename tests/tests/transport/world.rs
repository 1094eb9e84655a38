//! A cluster on a simulated network, and what scenarios do with it.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, UNIX_EPOCH},
};

use master_core::{Command, Core, Reply};
use skein_api::{
    Assignment, ContainerCreate, ContainerSpec, NodeId, NodeState, Origin, Placement, ServiceMode, ServiceSpec,
    StackApply, StackSpec, Task, TaskId, TaskSpec, TokenCreate,
};
use skein_master::{cluster::Handle, pki};

use crate::{
    agent::AgentHost,
    history::History,
    machine,
    master::{self, MasterHost, PORT},
};

/// Hosts that a master may run on; both see the same disk, one has it at a time.
pub(crate) const MASTERS: [&str; 2] = ["m1", "m2"];

/// Simulated time per step: how exact arrivals of messages are.
const STEP: Duration = Duration::from_millis(20);

/// What a message may take from host to host, milliseconds. Each link has its own, which a seed draws.
const LATENCY_MS_MAX: usize = 60;

/// Simulated time between two looks at everything.
const LOOKS_EVERY: Duration = Duration::from_millis(100);

/// Longest simulated time of one scenario; none comes near it.
const AT_MOST: Duration = Duration::from_secs(3_600);

/// After the last fault: a back-off of 7.5 s at most, a connection that hangs for 10 s, then some round trips.
pub(crate) const CONVERGES_WITHIN: Duration = Duration::from_secs(30);

/// Segments that a host's TCP holds for a reader, per connection: one message of gRPC is one or two.
const TCP_SEGMENTS: usize = 256;

/// Runs a scenario with its seeds: 1, or what `SKEIN_SEED` says, each on a thread of its own.
#[allow(clippy::print_stderr, reason = "a failed run is repeated with its seed")]
pub(crate) fn scenario(agents: usize, act: impl Fn(&mut World) + Copy + Send + 'static) {
    let wanted = std::env::var("SKEIN_SEED").unwrap_or_else(|_| "1".to_owned());
    let (first, last) = wanted.split_once("..").unwrap_or((&wanted, &wanted));
    let parse = |seed: &str| seed.parse::<u64>().expect("SKEIN_SEED is a number, or FIRST..LAST");
    for seed in parse(first)..=parse(last) {
        eprintln!("SKEIN_SEED={seed}");
        simulate(seed, agents, act);
    }
}

/// Runs one seed, and returns what happened. A failure shows the end of it.
#[allow(clippy::print_stderr, reason = "what led to a failure is what one needs to see")]
pub(crate) fn simulate(seed: u64, agents: usize, act: impl FnOnce(&mut World) + Send + 'static) -> String {
    let history = History::default();
    let of_thread = history.clone();
    let run = move || {
        machine::begin(seed);
        let _following = of_thread.follow();
        act(&mut World::new(seed, agents, of_thread.clone()));
    };
    let thread = std::thread::Builder::new().name("simulation".to_owned()).spawn(run).expect("a thread can be started");
    if let Err(panic) = thread.join() {
        eprintln!("{}\nthe above led to the failure; again with SKEIN_SEED={seed}", history.tail());
        std::panic::resume_unwind(panic);
    }
    history.text()
}

/// What a master knows, as far as scenarios look.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// Who is heard of.
    pub(crate) nodes: Nodes,
    /// Tasks by id.
    pub(crate) tasks: BTreeMap<TaskId, Task>,
    /// Documents of each node's tasks, by node id and key.
    pub(crate) documents: BTreeMap<String, BTreeMap<String, Assignment>>,
    /// Broken invariants.
    pub(crate) findings: Vec<String>,
}

impl View {
    fn of(core: &Core) -> Self {
        let model = core.model();
        let mut documents: BTreeMap<String, BTreeMap<String, Assignment>> = BTreeMap::new();
        for node in model.nodes.keys() {
            let keys = model.node_tasks(node).map(|t| format!("task/{}", t.id));
            let held = keys.filter_map(|key| Some((key.clone(), core.document(node, &key)?))).collect();
            documents.insert(node.to_string(), held);
        }
        Self {
            nodes: Nodes::of(core),
            tasks: model.tasks.iter().map(|(id, t)| (id.clone(), (**t).clone())).collect(),
            documents,
            findings: core.check(),
        }
    }
}

/// Each node's state, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nodes(BTreeMap<String, NodeState>);

impl Nodes {
    fn of(core: &Core) -> Self {
        let state = |id: &NodeId| core.node_status(id).state;
        Self(core.model().nodes.iter().map(|(id, n)| (n.name.clone(), state(id))).collect())
    }

    /// Whether a node's heartbeats come.
    pub(crate) fn is_ready(&self, agent: &AgentHost) -> bool {
        self.0.get(&agent.name) == Some(&NodeState::Ready)
    }

    /// Whether a node counts as lost.
    pub(crate) fn is_down(&self, agent: &AgentHost) -> bool {
        self.0.get(&agent.name) == Some(&NodeState::Down)
    }
}

/// The simulation.
pub(crate) struct World {
    /// Hosts and network.
    pub(crate) sim: turmoil::Sim<'static>,
    /// What happened so far.
    pub(crate) history: History,
    /// Hosts with agents.
    pub(crate) agents: Vec<Rc<AgentHost>>,
    masters: BTreeMap<&'static str, Rc<MasterHost>>,
    leading: &'static str,
    made: usize,
}

impl World {
    /// A master on the first host, and agents that have joined and are ready.
    fn new(seed: u64, agents: usize, history: History) -> Self {
        let mut builder = turmoil::Builder::new();
        builder
            .rng_seed(seed)
            .epoch(UNIX_EPOCH)
            .simulation_duration(AT_MOST)
            .tick_duration(STEP)
            .tcp_capacity(TCP_SEGMENTS);
        let first = Rc::new(MasterHost::default());
        first.runs.set(true);
        let second = Rc::new(MasterHost { disk: first.disk.clone(), ..MasterHost::default() });
        let mut world = Self {
            sim: builder.build(),
            history,
            agents: Vec::new(),
            masters: BTreeMap::from([(MASTERS[0], first), (MASTERS[1], second)]),
            leading: MASTERS[0],
            made: 0,
        };
        for (name, host) in world.masters.clone() {
            world.sim.host(name, move || master::run(host.clone()));
        }
        world.until("the master runs", Duration::from_secs(5), |w| w.handle().is_some());
        let token = world.token(agents);
        for i in 1..=agents {
            world.add_agent(&format!("a{i}"), &token);
        }
        world.until_ready(CONVERGES_WITHIN);
        world
    }

    /// A join token for that many hosts, with the CA's digest.
    fn token(&mut self, uses: usize) -> (String, String) {
        let digest = self.masters[self.leading].ca_digest.borrow().clone();
        let (id, secret, token) = pki::new_token(&digest);
        let request = TokenCreate { uses: u32::try_from(uses.max(1)).expect("some"), ..TokenCreate::default() };
        let secret_sha256 = pki::sha256_hex(secret.as_bytes());
        self.command(Command::TokenCreate { id, secret_sha256, request }).expect("a healthy master gives tokens");
        (token, digest)
    }

    fn add_agent(&mut self, name: &str, token: &(String, String)) {
        let masters = MASTERS.map(|m| format!("{m}:{PORT}")).to_vec();
        let host = Rc::new(AgentHost::new(name.to_owned(), masters));
        host.token.replace(token.clone());
        let software = host.clone();
        self.sim.host(name, move || software.clone().run());
        for master in MASTERS {
            let latency_ms = 1 + machine::below(LATENCY_MS_MAX) as u64;
            self.sim.set_link_latency(name, master, Duration::from_millis(latency_ms));
        }
        self.agents.push(host);
    }

    // --- time ---

    /// One step of simulated time.
    pub(crate) fn step(&mut self) {
        if let Err(error) = self.sim.step() {
            panic!("a host failed: {error}");
        }
        machine::passed(self.sim.elapsed());
    }

    /// Lets simulated time pass.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.pass_while("", time, |_| true);
    }

    /// Lets simulated time pass. Safety: this holds all the while.
    pub(crate) fn pass_while(&mut self, what: &str, time: Duration, mut holds: impl FnMut(&mut Self) -> bool) {
        let end = self.sim.elapsed() + time;
        while self.sim.elapsed() < end {
            assert!(holds(self), "did not stay so: {what}");
            self.step();
        }
    }

    /// Liveness: what is expected comes within that time.
    pub(crate) fn until(&mut self, what: &str, within: Duration, mut reached: impl FnMut(&mut Self) -> bool) {
        let end = self.sim.elapsed() + within;
        while !reached(self) {
            assert!(self.sim.elapsed() < end, "not within {within:?}: {what}");
            self.step();
        }
    }

    /// Drives a future that waits for a host.
    pub(crate) fn wait<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        let end = self.sim.elapsed() + CONVERGES_WITHIN;
        loop {
            if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return done;
            }
            assert!(self.sim.elapsed() < end, "no answer within {CONVERGES_WITHIN:?}");
            self.step();
        }
    }

    /// Every clock jumps ahead, as after a pause of everything.
    pub(crate) fn everybody_sleeps(&self, seconds: i64) {
        self.note(format_args!("every clock jumps by {seconds} s"));
        self.agents.iter().for_each(|a| a.clock.jump(seconds));
        self.masters.values().for_each(|m| m.clock.jump(seconds));
    }

    /// Simulated time, milliseconds.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.sim.elapsed().as_millis()).expect("an hour at most")
    }

    /// How often something was logged so far; all words in one line.
    pub(crate) fn said(&self, words: &[&str]) -> usize {
        self.history.times_ms(words).len()
    }

    /// Writes what a scenario does into the history.
    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        tracing::info!(target: "scenario", "{what}");
    }

    // --- the master ---

    /// The host that a master runs on, or ran on last.
    pub(crate) fn leading(&self) -> &'static str {
        self.leading
    }

    /// The host of that name.
    pub(crate) fn master(&self) -> Rc<MasterHost> {
        self.masters[self.leading].clone()
    }

    fn handle(&self) -> Option<Handle> {
        self.masters[self.leading].handle.borrow().clone()
    }

    fn end_master(&mut self) {
        let host = self.master();
        host.disk.kill();
        host.handle.replace(None);
        host.runs.set(false);
        self.sim.crash(self.leading);
    }

    /// kill -9 of the master: its host refuses connections from now on.
    pub(crate) fn kill_master(&mut self) {
        self.note(format_args!("master {} is killed", self.leading));
        self.end_master();
        self.sim.bounce(self.leading);
    }

    /// The master's host loses power: nothing answers, and nobody is told.
    pub(crate) fn power_off_master(&mut self) {
        let name = self.leading;
        self.note(format_args!("the host of master {name} loses power"));
        let agents: Vec<String> = self.agents.iter().map(|a| a.name.clone()).collect();
        agents.iter().for_each(|agent| self.sim.partition(agent.as_str(), name));
        self.end_master();
        agents.iter().for_each(|agent| self.sim.repair(agent.as_str(), name));
    }

    /// Starts a master on a host, with what the disk has.
    pub(crate) fn start_master(&mut self, name: &'static str) {
        self.note(format_args!("master {name} starts"));
        self.leading = name;
        self.master().runs.set(true);
        self.sim.bounce(name);
        self.until("the master runs", Duration::from_secs(5), |w| w.handle().is_some());
    }

    /// Asks the master for a change, and waits for the answer.
    pub(crate) fn command(&mut self, command: Command) -> Result<Reply, skein_api::ApiError> {
        let handle = self.handle().expect("a master runs");
        let origin = Origin { who: "scenario".into(), why: "scenario".into() };
        self.wait(async move { handle.command(command, origin).await })
    }

    /// Whom the master hears of now.
    pub(crate) fn nodes(&mut self) -> Nodes {
        let handle = self.handle().expect("a master runs");
        self.wait(async move { handle.query(Nodes::of).await }).expect("the loop runs")
    }

    /// Where each agent's host is, as it says of itself.
    pub(crate) fn sites(&mut self) -> Vec<String> {
        let handle = self.handle().expect("a master runs");
        let names: Vec<String> = self.agents.iter().map(|a| a.name.clone()).collect();
        let sites = move |core: &Core| {
            let nodes = names.iter().filter_map(|name| core.model().node_named(name));
            nodes.map(|node| node.description.site.clone()).collect()
        };
        self.wait(async move { handle.query(sites).await }).expect("the loop runs")
    }

    /// What the master knows now.
    pub(crate) fn view(&mut self) -> View {
        let handle = self.handle().expect("a master runs");
        self.wait(async move { handle.query(View::of).await }).expect("the loop runs")
    }

    // --- agents ---

    /// The agent with that number, from 1.
    pub(crate) fn agent(&self, number: usize) -> Rc<AgentHost> {
        self.agents[number - 1].clone()
    }

    /// kill -9 of an agent.
    pub(crate) fn kill_agent(&mut self, number: usize) {
        let host = self.agent(number);
        self.note(format_args!("agent {} is killed", host.name));
        host.process.replace(None);
        self.sim.crash(host.name.as_str());
    }

    /// An agent's host loses power: its master is told nothing.
    pub(crate) fn power_off_agent(&mut self, number: usize) {
        let (name, master) = (self.agent(number).name.clone(), self.leading);
        self.note(format_args!("the host of agent {name} loses power"));
        self.sim.partition(name.as_str(), master);
        self.kill_agent(number);
        self.sim.repair(name.as_str(), master);
    }

    /// Starts an agent again.
    pub(crate) fn start_agent(&mut self, number: usize) {
        let name = self.agent(number).name.clone();
        self.note(format_args!("agent {name} starts"));
        self.sim.bounce(name.as_str());
    }

    /// No message passes between an agent and the masters.
    pub(crate) fn cut(&mut self, number: usize) {
        let name = self.agent(number).name.clone();
        self.note(format_args!("agent {name} is cut off"));
        MASTERS.iter().for_each(|master| self.sim.partition(name.as_str(), *master));
    }

    /// Messages pass again. What was lost meanwhile stays lost: connections of before hang.
    pub(crate) fn heal(&mut self, number: usize) {
        let name = self.agent(number).name.clone();
        self.note(format_args!("agent {name} is reached again"));
        MASTERS.iter().for_each(|master| self.sim.repair(name.as_str(), *master));
    }

    // --- work ---

    /// A container task on that agent's host.
    pub(crate) fn create(&mut self, agent: usize) -> TaskId {
        self.create_with(agent, BTreeMap::new())
    }

    /// A container task of 16 KiB on that agent's host.
    pub(crate) fn create_large(&mut self, agent: usize) -> TaskId {
        self.create_with(agent, BTreeMap::from([("LARGE".to_owned(), Some("x".repeat(16 << 10)))]))
    }

    fn create_with(&mut self, agent: usize, env: BTreeMap<String, Option<String>>) -> TaskId {
        self.made += 1;
        let name = format!("c{}", self.made);
        let container = ContainerSpec { image: "app".into(), env, ..ContainerSpec::default() };
        let constraints = vec![format!("node.hostname == a{agent}")];
        let placement = Placement { constraints, ..Placement::default() };
        let spec = TaskSpec { container, placement, ..TaskSpec::default() };
        match self.command(Command::ContainerCreate(Box::new(ContainerCreate { name, spec }))) {
            Ok(Reply::Task(id)) => id,
            other => panic!("a container was not made: {other:?}"),
        }
    }

    /// A service with that many replicas, spread over all hosts.
    pub(crate) fn serve(&mut self, replicas: u32) {
        let container = ContainerSpec { image: "app".into(), ..ContainerSpec::default() };
        let service = ServiceSpec {
            name: "stack_web".into(),
            stack: Some("stack".into()),
            short_name: "web".into(),
            task: TaskSpec { container, ..TaskSpec::default() },
            mode: ServiceMode::Replicated(replicas),
            ..ServiceSpec::default()
        };
        let stack = StackSpec { name: "stack".into(), services: vec![service], ..StackSpec::default() };
        let apply = StackApply { stack, ..StackApply::default() };
        self.command(Command::StackApply(Box::new(apply))).expect("a stack that fits");
        let count = usize::try_from(replicas).expect("a few");
        self.until("every replica is told of", CONVERGES_WITHIN, |w| w.view().tasks.len() == count);
    }

    /// One change at random: a container made, stopped, started or removed. One that the master refuses, because it comes
    /// at a wrong moment, is no failure.
    pub(crate) fn change(&mut self) {
        let view = self.view();
        let tasks: Vec<&TaskId> = view.tasks.keys().collect();
        if tasks.is_empty() || machine::below(2) == 0 {
            let agent = 1 + machine::below(self.agents.len());
            self.create(agent);
            return;
        }
        let task = tasks[machine::below(tasks.len())].to_string();
        let command = match machine::below(3) {
            0 => Command::ContainerStop(task),
            1 => Command::ContainerStart(task),
            _ => Command::ContainerRemove { task, force: true },
        };
        if let Err(refusal) = self.command(command) {
            self.note(format_args!("refused: {}", refusal.code));
        }
    }

    /// Some changes at random.
    pub(crate) fn changes(&mut self, count: usize) {
        for _ in 0..count {
            self.change();
        }
    }

    /// A container task on every host.
    pub(crate) fn one_each(&mut self) {
        for agent in 1..=self.agents.len() {
            self.create(agent);
        }
    }

    /// Every host that runs something says something new of it.
    pub(crate) fn everybody_speaks(&self, note: &str) {
        let said: usize = self.agents.iter().map(|a| a.chatter(note)).sum();
        assert!(said > 0, "nothing runs, so nothing was tried");
    }

    // --- what is expected ---

    /// Whether the master hears of all these agents.
    pub(crate) fn are_ready(&mut self, agents: impl IntoIterator<Item = usize>) -> bool {
        let nodes = self.nodes();
        agents.into_iter().all(|number| nodes.is_ready(&self.agent(number)))
    }

    /// Liveness: every node is heard of.
    pub(crate) fn until_ready(&mut self, within: Duration) {
        let all = 1..=self.agents.len();
        self.until("every node is ready", within, |w| w.are_ready(all.clone()));
    }

    /// Liveness and safety after the last fault: every node is ready, every ledger holds what the master wants of it, the
    /// master knows the last word about every task, nothing waits, no invariant is broken.
    pub(crate) fn converges(&mut self, within: Duration) {
        let end = self.sim.elapsed() + within;
        loop {
            let view = self.view();
            assert!(view.findings.is_empty(), "broken invariants: {:?}", view.findings);
            let missing = self.missing(&view);
            if missing.is_empty() {
                return;
            }
            assert!(self.sim.elapsed() < end, "did not converge within {within:?}: {missing}");
            self.pass(LOOKS_EVERY);
        }
    }

    /// What is not yet as it shall be; empty when all is well.
    fn missing(&self, view: &View) -> String {
        for agent in &self.agents {
            let name = &agent.name;
            let Some(process) = agent.process.borrow().clone() else { return format!("{name} does not run") };
            if !view.nodes.is_ready(agent) {
                return format!("{name} is not ready");
            }
            if view.documents.get(&process.node) != Some(&*process.ledger.assignments()) {
                return format!("the ledger of {name} is not what the master wants");
            }
            let pending = process.reports.pending();
            if !pending.is_empty() {
                return format!("{} reports of {name} are not confirmed: {:?}", pending.len(), pending[0]);
            }
            for key in process.ledger.assignments().keys() {
                let id = TaskId::new(key.trim_start_matches("task/"));
                let (known, said) = (view.tasks.get(&id), agent.word(&id));
                if known.map(|t| &t.status) != said.as_ref().map(|r| &r.status) {
                    return format!("of {id} on {name} the master knows {known:?}, the last word was {said:?}");
                }
            }
        }
        String::new()
    }
}

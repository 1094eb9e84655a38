//! An agent on a simulated host: what `skein-agent` is made of towards the master, with stand-ins for what is below: the
//! network side and the executor with its engine.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::future::LocalBoxFuture;
use skein_agent::{
    engine::{Engine, EngineConfig},
    executor::Reports,
    identity::{self, Dial, IdentityDir, Membership},
    ledger::Ledger,
    overlay::{OverlayError, Wanted},
    session::{Ended, Follow, Session},
};
use skein_api::{
    Assignment, NodeDescription, Resources, TaskAssignment, TaskId, TaskReport, TaskState, TaskStatus, UnixMillis,
    grpc::{self, agent_client::AgentClient},
};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::machine::Clock;

/// What a kernel takes to follow a change, and an engine to start a container. Not nothing: what the session sends then
/// leaves at another simulated moment than the one at which the ledger's thread was waited for, and does not depend on
/// when in that moment it was done.
const KERNEL_TAKES: Duration = Duration::from_millis(3);
const ENGINE_TAKES: Duration = Duration::from_millis(17);

/// Pause between attempts to join.
const JOIN_PAUSE: Duration = Duration::from_secs(1);

/// A host with an agent. What is here outlives the agent's process.
pub(crate) struct AgentHost {
    /// Name of host and node.
    pub(crate) name: String,
    /// Addresses of masters.
    pub(crate) masters: Vec<String>,
    /// Its wall clock.
    pub(crate) clock: Clock,
    /// Join token, and the digest of the CA that it pins.
    pub(crate) token: RefCell<(String, String)>,
    /// What the agent's process has, while it runs.
    pub(crate) process: RefCell<Option<Process>>,
    /// Why it ended for good.
    pub(crate) ended: RefCell<Option<String>>,
    /// What its network side was told.
    pub(crate) seen: Seen,
    /// What runs at the host's next start in the place of the agent, if something does.
    pub(crate) instead: RefCell<Option<Instead>>,
    /// The newest word about each task.
    words: RefCell<BTreeMap<TaskId, TaskReport>>,
    dir: TempDir,
}

/// Another program with the host's identity.
pub(crate) type Instead = Rc<dyn Fn(Rc<AgentHost>) -> LocalBoxFuture<'static, turmoil::Result>>;

/// What a scenario sees of a running agent.
#[derive(Clone)]
pub(crate) struct Process {
    /// Its node.
    pub(crate) node: String,
    /// Its ledger.
    pub(crate) ledger: Ledger,
    /// Reports that the master has not confirmed.
    pub(crate) reports: Reports,
    /// What the host is.
    pub(crate) description: watch::Sender<NodeDescription>,
}

/// What a healthy host is.
fn description(name: &str) -> NodeDescription {
    let capacity = Resources { nano_cpus: 64_000_000_000, mem_bytes: 64 << 30 };
    let (os, arch) = ("linux".to_owned(), "x86_64".to_owned());
    NodeDescription { hostname: name.to_owned(), capacity, offered: capacity, os, arch, ..Default::default() }
}

/// A directory in memory where there is one: an agent's fsyncs are many, and what a disk loses is tested elsewhere.
fn state_dir() -> TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let made = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
    made.expect("a temporary directory can be made")
}

impl AgentHost {
    /// A host that has not joined.
    pub(crate) fn new(name: String, masters: Vec<String>) -> Self {
        Self {
            name,
            masters,
            clock: Clock::default(),
            token: RefCell::default(),
            process: RefCell::default(),
            ended: RefCell::default(),
            seen: Seen::default(),
            instead: RefCell::default(),
            words: RefCell::default(),
            dir: state_dir(),
        }
    }

    /// Its key and certificates.
    pub(crate) fn identity(&self) -> IdentityDir {
        IdentityDir::new(self.dir.path())
    }

    /// Joins with the token, as `skein-agent join` does, until a master takes it.
    async fn join(&self) -> Result<Membership, Box<dyn std::error::Error>> {
        let identity = self.identity();
        let (token, pin) = self.token.borrow().clone();
        for attempt in 0_usize.. {
            let master = &self.masters[attempt % self.masters.len()];
            let Ok(mut client) = identity::connect(&Net, master, identity::pinned_tls(&pin)?).await else {
                tokio::time::sleep(JOIN_PAUSE).await;
                continue;
            };
            let request = grpc::JoinRequest {
                token,
                csr_der: identity::signing_request(&identity.ensure_key()?)?,
                description_json: serde_json::to_vec(&description(&self.name))?,
                clock_unix_ms: wall_ms(),
            };
            let answer = client.join(request).await?.into_inner();
            let masters = self.masters.clone();
            let membership = Membership { node: answer.node_id, masters, cluster: pin, name: self.name.clone() };
            identity.store(&answer.certificate_pem, &answer.ca_pem, Some(&membership))?;
            return Ok(membership);
        }
        unreachable!("attempts are counted in a usize")
    }

    /// Runs the agent until the host crashes or the node was removed.
    pub(crate) async fn run(self: Rc<Self>) -> turmoil::Result {
        self.clock.install();
        let instead = self.instead.borrow().clone();
        if let Some(instead) = instead {
            return instead(self).await;
        }
        let membership = match self.identity().membership()? {
            Some(membership) => membership,
            None => self.join().await?,
        };
        let ledger = Ledger::open(&self.dir.path().join("ledger"))?;
        let reports = Reports::default();
        let process = Process {
            node: membership.node.clone(),
            ledger: ledger.clone(),
            reports: reports.clone(),
            description: watch::Sender::new(description(&self.name)),
        };
        self.seen.begin(&membership.node);
        let session = Session {
            net: Net,
            membership,
            identity: self.identity(),
            ledger: ledger.clone(),
            overlay: NetworkSide { seen: self.seen.clone(), ledger },
            engine: Engine::new(EngineConfig::new(self.dir.path().join("no-engine.sock"), "", "")),
            reports,
            description: process.description.subscribe(),
        };
        session.follow().await;
        let executor = tokio::task::spawn_local(self.clone().execute(process.clone()));
        self.process.replace(Some(process));
        let ended = session.run(CancellationToken::new()).await;
        executor.abort();
        assert!(matches!(ended, Ended::Removed(_)), "{ended}");
        self.ended.replace(Some(ended.to_string()));
        Ok(())
    }

    /// In the place of executor and engine: every task is soon where it shall be.
    async fn execute(self: Rc<Self>, process: Process) {
        let mut changed = process.ledger.changed();
        loop {
            tokio::time::sleep(ENGINE_TAKES).await;
            let assignments = process.ledger.assignments();
            for assignment in assignments.values() {
                if let Assignment::Task(task) = assignment {
                    self.say(&process, task, "");
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Reports of a task that it is where it shall be, with `note` as its message.
    fn say(&self, process: &Process, task: &TaskAssignment, note: &str) {
        let mut words = self.words.borrow_mut();
        let old = words.get(&task.id).filter(|old| old.run == task.run && old.status.state == task.desired_state);
        let message = match old {
            Some(old) if note.is_empty() => old.status.message.clone(),
            _ => note.to_owned(),
        };
        let since = old.map_or_else(|| UnixMillis(wall_ms()), |old| old.status.since);
        let status = TaskStatus { state: task.desired_state, since, message, ..Default::default() };
        let report = TaskReport { task: task.id.clone(), run: task.run, status };
        words.insert(task.id.clone(), report.clone());
        process.reports.put(report);
    }

    /// Says something new of every task that runs here. Returns how many there are.
    pub(crate) fn chatter(&self, note: &str) -> usize {
        let Some(process) = self.process.borrow().clone() else { return 0 };
        let assignments = process.ledger.assignments();
        let tasks = assignments.values().filter_map(|a| match a {
            Assignment::Task(task) if task.desired_state == TaskState::Running => Some(task),
            _ => None,
        });
        tasks.map(|task| self.say(&process, task, note)).count()
    }

    /// The newest word about a task.
    pub(crate) fn word(&self, task: &TaskId) -> Option<TaskReport> {
        self.words.borrow().get(task).cloned()
    }
}

/// A connection with the host's certificate, for what runs in the place of its agent.
pub(crate) async fn connect(host: &AgentHost) -> Result<AgentClient<Channel>, Box<dyn std::error::Error>> {
    Ok(identity::connect(&Net, &host.masters[0], host.identity().tls(true)?).await?)
}

/// The first message of a session of that protocol version, of a host whose ledger is empty.
pub(crate) fn hello(host: &AgentHost, protocol: u32) -> grpc::AgentMessage {
    let description_json = serde_json::to_vec(&description(&host.name)).expect("a description is JSON");
    let hello = grpc::Hello { protocol, description_json, clock_unix_ms: wall_ms(), ..Default::default() };
    grpc::AgentMessage { body: Some(grpc::agent_message::Body::Hello(hello)) }
}

fn wall_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).expect("within some years of 2026")
}

/// The simulated network, for an agent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Net;

impl Dial for Net {
    type Stream = turmoil::net::TcpStream;

    async fn dial(&self, address: &str) -> io::Result<Self::Stream> {
        turmoil::net::TcpStream::connect(address).await
    }
}

/// In the place of the overlay: remembers what the ledger held each time that it was told to follow, and checks that the
/// ledger only ever goes forward. Cheap to clone; all clones are one.
#[derive(Clone)]
pub(crate) struct NetworkSide {
    seen: Seen,
    ledger: Ledger,
}

/// What a network side was told, and whether it hangs.
#[derive(Clone, Default)]
pub(crate) struct Seen {
    log: Arc<Mutex<Log>>,
    stuck: Arc<watch::Sender<bool>>,
}

/// Assignments by key.
type Held = Arc<BTreeMap<String, Assignment>>;

#[derive(Default)]
struct Log {
    node: String,
    /// What the ledger held at each generation that it was at, by chain in the order of their coming.
    chains: Vec<(String, BTreeMap<u64, Held>)>,
    follows: usize,
}

impl Seen {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("nobody panics while holding this lock")
    }

    fn begin(&self, node: &str) {
        node.clone_into(&mut self.log().node);
    }

    /// Lets the network side hang from now on, as a kernel may, or go on.
    pub(crate) fn set_stuck(&self, stuck: bool) {
        self.stuck.send_replace(stuck);
    }

    /// How often the network side was told something.
    pub(crate) fn follows(&self) -> usize {
        self.log().follows
    }

    /// Every generation that the ledger was at, by chain.
    pub(crate) fn generations(&self) -> Vec<(String, Vec<u64>)> {
        self.log().chains.iter().map(|(chain, seen)| (chain.clone(), seen.keys().copied().collect())).collect()
    }

    /// Safety: within a chain generations only grow, a chain that was left never comes back, and the same generation
    /// always means the same documents.
    fn check(&self, ledger: &Ledger) {
        let (head, assignments) = (ledger.head(), ledger.assignments());
        let mut log = self.log();
        log.follows += 1;
        if head.chain.is_empty() {
            return;
        }
        if log.chains.last().is_none_or(|(chain, _)| *chain != head.chain) {
            let known = log.chains.iter().any(|(chain, _)| *chain == head.chain);
            assert!(!known, "{}: chain {} came back", log.node, head.chain);
            log.chains.push((head.chain.clone(), BTreeMap::new()));
        }
        let node = log.node.clone();
        let (_, seen) = log.chains.last_mut().expect("just pushed, if it was not there");
        if let Some((&last, held)) = seen.last_key_value() {
            assert!(head.generation >= last, "{node}: generation {} after {last}", head.generation);
            if head.generation == last {
                assert!(**held == *assignments, "{node}: generation {last} came with other documents");
            }
        }
        seen.insert(head.generation, assignments);
    }
}

impl Follow for NetworkSide {
    async fn follow(&self, _: Wanted) -> Result<(), OverlayError> {
        self.seen.check(&self.ledger);
        tokio::time::sleep(KERNEL_TAKES).await;
        let mut stuck = self.seen.stuck.subscribe();
        stuck.wait_for(|stuck| !stuck).await.expect("the sender is in `seen`");
        Ok(())
    }

    async fn answer(&self, _: skein_api::NetQuestion) -> Result<skein_agent::inspect::Reply, String> {
        Err("this host has no kernel to look at".to_owned())
    }
}

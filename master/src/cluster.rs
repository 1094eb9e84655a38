//! The one loop: owns the core and the store, takes events, commits what they change, then lets effects out.
//!
//! ```text
//! HTTP, agents ──Event──> loop: execute … settle ─> commit (one for the whole batch) ─┬─> replies
//!                           ^                                                         └─> assignments to sessions
//!                           └── reads are served between commits
//! ```
//!
//! Users' events are not its business: they come from the store's own watch. Task: one. Channels: one bounded `mpsc` in
//! ([`QUEUE`]); a `watch` of the store's position out; one bounded `mpsc` per agent session, whose slow readers are simply told later and
//! then everything at once, because what an agent is told is computed from the state when it can take it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use master_core::{
    Command, Context, Core, Now, Reply, Settings,
    leader::{self, Leader},
    liveness::heartbeat_ms,
    model::{Change, Key, Kind, Object},
};
use skein_api::{ApiError, Assignment, NodeId, Origin, TaskReport, UnixMillis, grpc};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use crate::{
    pki,
    server::Connections,
    store::{Epoch, Key as StoreKey, Op, Store, StoreError, StoreHealth, Txn, TxnOutcome},
};

/// Events that may wait. Each sender awaits room, so a full queue slows clients and agents down and loses nothing.
pub const QUEUE: usize = 4_096;

/// Events taken into one commit: enough to fill a disk that does 400 fsync/s with 200,000 changes/s.
const BATCH_MAX: usize = 512;

/// Reads that may wait. Each sender awaits room: who asks for much waits longer, and nobody else does.
pub const READS: usize = 1_024;

/// How long reads are served before changes have their turn again: a few fsyncs. One read takes microseconds, or some
/// milliseconds where it lists everything.
const READS_FOR: Duration = Duration::from_millis(10);

/// How often clocks are looked at and heartbeats are answered. One wake-up of the loop serves all that came since: with
/// 10,000 agents some 200.
const TICK: Duration = Duration::from_millis(100);

/// How long ago the loop may have looked at heartbeats for one to be acknowledged at once, and not by the loop: ten ticks. An
/// acknowledgement says that the loop lives, and agents wait for 15 s before they believe that it does not.
const ALIVE_MS: u64 = 1_000;

/// Changes of one store transaction; the store takes 16,384. More (a stack of many thousand tasks) goes in several: then a
/// failure in the middle leaves a beginning, which settling completes.
const TXN_CHANGES_MAX: usize = 4_096;

/// Bytes of one store transaction; the store takes 16 MiB, and one object has at most 256 KiB.
const TXN_BYTES_MAX: usize = 8 << 20;

/// Pause before the store is opened again after a failure.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// Name of the lead that a master takes.
const LEAD: &str = "master";

/// Takes an answer, with the state right after the commit.
type Answer = Box<dyn FnOnce(leader::Answer, &Core) + Send>;
type Query = Box<dyn FnOnce(&mut Core) + Send>;

/// What a session's agent is sent.
///
/// A queue has room for 64 whether they are used or not: boxed, that is half a kilobyte for each agent and not three.
pub type SessionTx = mpsc::Sender<Box<SessionItem>>;

/// A message to an agent, or why its session ends.
pub type SessionItem = Result<grpc::MasterMessage, tonic::Status>;

/// A session of an agent, as the loop knows it.
pub struct SessionOpen {
    /// Whose.
    pub node: NodeId,
    /// To the agent.
    pub tx: SessionTx,
    /// Cuts the connection.
    pub cancel: CancellationToken,
    /// What the agent's ledger holds.
    pub chain: String,
    /// Its generation.
    pub generation: u64,
}

enum Event {
    Command { command: Box<Command>, origin: Origin, reply: Answer },
    SessionOpen(Box<SessionOpen>, oneshot::Sender<u64>),
    SessionClosed { node: NodeId, session: u64 },
    Acked { node: NodeId, chain: String, generation: u64 },
    OpenStream { node: NodeId, message: grpc::OpenStream, reply: oneshot::Sender<Result<(), ApiError>> },
}

/// A heartbeat that the loop has not looked at.
struct Beat {
    session: u64,
    /// Its number, when it is still to be acknowledged.
    seq: Option<u64>,
}

/// The last heartbeat of each node since the loop's last tick. At most one per node, so it needs no bound of its own, and an
/// agent that sends thousands is as cheap as any.
struct Beats {
    waiting: Mutex<BTreeMap<NodeId, Beat>>,
    /// When the loop last took them, milliseconds since `started`.
    taken_ms: AtomicU64,
    /// How often agents shall send them.
    period_ms: AtomicU32,
    started: Instant,
}

impl Beats {
    fn new(started: Instant) -> Self {
        let beats =
            Self { waiting: Mutex::default(), taken_ms: AtomicU64::new(0), period_ms: AtomicU32::default(), started };
        beats.suit(0);
        beats
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Beat>> {
        self.waiting.lock().expect("nobody panics while holding this lock")
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Asks for them as often as suits a cluster of so many nodes.
    fn suit(&self, nodes: usize) {
        let period_ms = u32::try_from(heartbeat_ms(nodes)).expect("some seconds");
        self.period_ms.store(period_ms, Ordering::Relaxed);
    }

    fn acknowledge(&self, tx: &SessionTx, seq: u64) {
        let ack = grpc::HeartbeatAck { seq, period_ms: self.period_ms.load(Ordering::Relaxed) };
        // A session that takes nothing is slow or dead; the next acknowledgement or its end tells.
        let _ = tx.try_send(message(grpc::master_message::Body::HeartbeatAck(ack)));
    }

    fn take(&self) -> BTreeMap<NodeId, Beat> {
        // A number alone: nothing is read by it that another thread wrote.
        self.taken_ms.store(self.now_ms(), Ordering::Relaxed);
        std::mem::take(&mut *self.lock())
    }

    /// Whether the loop took heartbeats a moment ago.
    fn are_taken(&self) -> bool {
        self.now_ms().saturating_sub(self.taken_ms.load(Ordering::Relaxed)) <= ALIVE_MS
    }
}

/// To the loop, from everywhere.
#[derive(Clone)]
pub struct Handle {
    tx: mpsc::Sender<Event>,
    reads: mpsc::Sender<Query>,
    beats: Arc<Beats>,
    position: watch::Receiver<Position>,
}

/// Where the store is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Last commit.
    pub revision: u64,
    /// This master's term of office.
    pub epoch: u64,
    /// Why the store takes no writes, while it does not.
    pub read_only: Option<String>,
}

fn gone() -> ApiError {
    ApiError::new("shutting_down", "this master is shutting down")
}

impl Handle {
    /// Asks for a change; answered once it is durable.
    ///
    /// # Errors
    /// The refusal; then nothing changed.
    pub async fn command(&self, command: Command, origin: Origin) -> Result<Reply, ApiError> {
        self.command_and_read(command, origin, |_, reply| reply).await
    }

    /// Asks for a change, and reads the state that its commit leaves. A [`Handle::query`] after it would wait behind all
    /// others that read, and may see the next change.
    ///
    /// # Errors
    /// As [`Handle::command`].
    pub async fn command_and_read<T: Send + 'static>(
        &self,
        command: Command,
        origin: Origin,
        read: impl FnOnce(&Core, Reply) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let (tx, answer) = oneshot::channel();
        let reply: Answer = Box::new(move |answer, core| {
            // The asker may have gone; then nobody misses the answer.
            let _ = tx.send(answer.map(|reply| read(core, reply)));
        });
        let event = Event::Command { command: Box::new(command), origin, reply };
        self.tx.send(event).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Reads the state, between two commits.
    ///
    /// # Errors
    /// When the master shuts down.
    pub async fn query<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Core) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        self.ask(|core| read(core)).await
    }

    /// As [`Handle::query`], for questions that put back what they change.
    ///
    /// # Errors
    /// When the master shuts down.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Core) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        let query: Query = Box::new(move |core| {
            // The asker may have gone; then nobody misses the answer.
            let _ = reply.send(question(core));
        });
        self.reads.send(query).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// A session began. Returns its number.
    ///
    /// # Errors
    /// When the master shuts down.
    pub async fn session_open(&self, session: SessionOpen) -> Result<u64, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.tx.send(Event::SessionOpen(Box::new(session), reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// A session ended.
    pub async fn session_closed(&self, node: NodeId, session: u64) {
        // A loop that is gone needs no telling.
        let _ = self.tx.send(Event::SessionClosed { node, session }).await;
    }

    /// A heartbeat came. While the loop lives it is acknowledged at once: the connection is at hand, and a hundred
    /// milliseconds later it would have to be fetched into the CPU's caches again. Otherwise the loop acknowledges it, once
    /// it has time.
    pub fn heartbeat(&self, node: NodeId, session: u64, seq: u64, tx: &SessionTx) {
        let at_once = self.beats.are_taken();
        if at_once {
            self.beats.acknowledge(tx, seq);
        }
        self.beats.lock().insert(node, Beat { session, seq: (!at_once).then_some(seq) });
    }

    /// An agent has a generation in its ledger.
    pub async fn acked(&self, node: NodeId, chain: String, generation: u64) {
        let _ = self.tx.send(Event::Acked { node, chain, generation }).await;
    }

    /// Asks a node to open a stream.
    ///
    /// # Errors
    /// `node_unreachable`.
    pub async fn open_stream(&self, node: NodeId, message: grpc::OpenStream) -> Result<(), ApiError> {
        let (reply, answer) = oneshot::channel();
        self.tx.send(Event::OpenStream { node, message, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Where the store is now.
    pub fn position(&self) -> Position {
        self.position.borrow().clone()
    }
}

/// How to reach an agent that has a session.
struct Link {
    tx: SessionTx,
    cancel: CancellationToken,
}

/// The loop's state.
pub struct Cluster {
    leader: Leader<Link, Answer>,
    settings: Settings,
    store: Arc<dyn Store>,
    epoch: Epoch,
    rx: mpsc::Receiver<Event>,
    reads: mpsc::Receiver<Query>,
    beats: Arc<Beats>,
    connections: Connections,
    started: Instant,
    /// While it is read-only: when the store is tried again.
    reopen_at: Instant,
    revision: u64,
    position: watch::Sender<Position>,
}

/// Reads a core out of the store.
async fn load(store: &dyn Store, settings: &Settings, now: Now) -> anyhow::Result<(Core, u64)> {
    let snapshot = store.snapshot().await?;
    let revision = snapshot.revision.0;
    let mut objects = Vec::with_capacity(snapshot.records.len());
    for record in snapshot.records {
        let Some(kind) = Kind::parse(&record.key.kind) else {
            anyhow::bail!("the store has a record of unknown kind {}: a newer skein-master wrote it", record.key);
        };
        let object = Object::decode(kind, &record.value)
            .map_err(|e| anyhow::anyhow!("failed to read record {} of the store: {e}", record.key))?;
        objects.push((object, record.revision.0));
    }
    // Keys, not objects: what nobody else has is changed in place.
    let revisions: Vec<(Key, u64)> = objects.iter().map(|(object, revision)| (object.key(), *revision)).collect();
    let mut core = Core::load(settings.clone(), objects.into_iter().map(|(o, _)| o).collect(), now);
    revisions.iter().for_each(|(key, revision)| core.loaded(key, *revision));
    Ok((core, revision))
}

impl Cluster {
    /// Takes the lead and loads the state; makes the cluster on the first start.
    ///
    /// # Errors
    /// What the store says.
    pub async fn start(
        store: Arc<dyn Store>,
        settings: Settings,
        connections: Connections,
    ) -> anyhow::Result<(Self, Handle)> {
        let epoch = store.lead(LEAD, Duration::from_secs(10)).await?;
        let started = Instant::now();
        let (core, revision) = load(&*store, &settings, now(started)).await?;
        let (position, seen) = watch::channel(Position { revision, epoch: epoch.0, read_only: None });
        let (tx, rx) = mpsc::channel(QUEUE);
        let (reads_tx, reads) = mpsc::channel(READS);
        let beats = Arc::new(Beats::new(started));
        let handle = Handle { tx, reads: reads_tx, beats: beats.clone(), position: seen };
        let leader = Leader::new(core, pki::random_hex(8));
        let mut cluster = Self {
            leader,
            settings,
            store,
            epoch,
            rx,
            reads,
            beats,
            connections,
            started,
            reopen_at: started,
            revision,
            position,
        };
        if cluster.leader.core().model().cluster.is_none() {
            cluster.init().await?;
        }
        Ok((cluster, handle))
    }

    async fn init(&mut self) -> anyhow::Result<()> {
        let id = pki::random_hex(16);
        let (ca_certificate_pem, ca_key_pem) = pki::new_ca(&id)?;
        let cluster = master_core::model::Cluster {
            id,
            ula_global_id: pki::random_u64() & 0xff_ffff_ffff,
            ca_certificate_pem,
            ca_key_pem,
            ..Default::default()
        };
        let ctx = self.context(Origin { who: "local".into(), why: "first start".into() });
        let (reply, mut answer) = oneshot::channel();
        // Looked at below.
        let reply: Answer = Box::new(move |answer, _| drop(reply.send(answer)));
        self.leader.command(&Command::InitCluster(Box::new(cluster)), &ctx, reply);
        self.finish().await;
        answer.try_recv().map_err(|_| gone())??;
        tracing::info!("cluster made");
        Ok(())
    }

    /// The CA, for the listener.
    ///
    /// # Errors
    /// When what the store has is not one.
    pub fn ca(&self) -> anyhow::Result<pki::Ca> {
        let cluster = self.leader.core().model().cluster.as_ref().expect("made by `start`");
        Ok(pki::Ca::load(&cluster.ca_certificate_pem, &cluster.ca_key_pem)?)
    }

    fn context(&self, origin: Origin) -> Context {
        Context { now: now(self.started), origin, seed: pki::random_u64() }
    }

    /// Runs until `shutdown`; then refuses new events, commits what it has, and gives the lead up.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            // Cancel-safe: `recv_many` takes nothing when it is dropped before it is ready, a tick that is lost comes again.
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = tick.tick() => {
                    // Before the clock is looked at: a loop that was busy must not call those lost whom it kept waiting.
                    self.heartbeats();
                    self.leader.tick(now(self.started));
                }
                taken = self.rx.recv_many(&mut batch, BATCH_MAX) => {
                    if taken == 0 {
                        break;
                    }
                }
                Some(read) = self.reads.recv() => {
                    read(self.leader.core_to_ask());
                    self.serve_reads();
                    continue;
                }
            }
            self.turn(std::mem::take(&mut batch)).await;
            self.serve_reads();
        }
        self.rx.close();
        for link in self.leader.sessions() {
            link.cancel.cancel();
        }
        if let Err(error) = self.store.resign(self.epoch).await {
            tracing::warn!(%error, "failed to give up the lead");
        }
    }

    /// One turn: decide all, commit once, let effects out.
    async fn turn(&mut self, batch: Vec<Event>) {
        for event in batch {
            match event {
                Event::Command { command, origin, reply } => {
                    let ctx = self.context(origin);
                    self.leader.command(&command, &ctx, reply);
                }
                Event::SessionOpen(session, reply) => self.session_open(*session, reply),
                Event::SessionClosed { node, session } => {
                    if self.leader.session_closed(&node, session) {
                        tracing::info!(%node, "session closed");
                    }
                }
                Event::Acked { node, chain, generation } => self.leader.acked(&node, &chain, generation),
                Event::OpenStream { node, message, reply } => {
                    // The asker may have gone; then nobody misses the answer.
                    let _ = reply.send(self.open_stream(&node, message));
                }
            }
        }
        self.finish().await;
        for notice in self.leader.take_notices() {
            tracing::warn!(notice, "operator should know");
        }
        self.tell_agents();
    }

    /// Commits what the turn decided, then lets its answers out.
    async fn finish(&mut self) {
        self.commit().await;
        self.position.send_replace(Position {
            revision: self.revision,
            epoch: self.epoch.0,
            read_only: self.leader.read_only().map(str::to_owned),
        });
        for (node, link) in self.leader.dismissed() {
            if let Some(link) = link {
                let removed = grpc::Removed { reason: "removed from the cluster".into() };
                // If the agent cannot take it, the cut connection and the refused reconnect tell it.
                let _ = link.tx.try_send(message(grpc::master_message::Body::Removed(removed)));
            }
            self.connections.cut(node.as_str());
        }
        for (reply, answer) in self.leader.replies() {
            reply(answer, self.leader.core());
        }
    }

    fn session_open(&mut self, session: SessionOpen, reply: oneshot::Sender<u64>) {
        let SessionOpen { node, tx, cancel, chain, generation } = session;
        let link = Link { tx: tx.clone(), cancel: cancel.clone() };
        let Some(opened) = self.leader.session_open(&node, link, &chain, generation, now(self.started)) else {
            cancel.cancel();
            let _ = reply.send(0);
            return;
        };
        if let Some(old) = opened.replaced {
            old.cancel.cancel();
        }
        if opened.current {
            let assignments = grpc::Assignments { chain, base: generation, generation, ..Default::default() };
            // The queue is new: there is room.
            let _ = tx.try_send(message(grpc::master_message::Body::Assignments(assignments)));
        }
        tracing::info!(%node, current = opened.current, generation, "session opened");
        let _ = reply.send(opened.number);
    }

    /// Takes in the heartbeats since the last tick, and acknowledges those that were not.
    fn heartbeats(&mut self) {
        let now = now(self.started);
        for (node, Beat { session, seq }) in self.beats.take() {
            let Some(link) = self.leader.heartbeat(&node, session, now) else { continue };
            if let Some(seq) = seq {
                self.beats.acknowledge(&link.tx, seq);
            }
        }
        self.beats.suit(self.leader.core().model().nodes.len());
    }

    /// Serves reads that wait, for a while: what changes the state comes first.
    fn serve_reads(&mut self) {
        let until = Instant::now() + READS_FOR;
        while let Ok(read) = self.reads.try_recv() {
            read(self.leader.core_to_ask());
            if Instant::now() >= until {
                break;
            }
        }
    }

    fn open_stream(&mut self, node: &NodeId, open: grpc::OpenStream) -> Result<(), ApiError> {
        let unreachable = || {
            ApiError::new("node_unreachable", format!("the agent of node {} is not connected", node.short()))
                .with_hint("skein node ls")
        };
        let link = self.leader.session(node).ok_or_else(unreachable)?;
        link.tx.try_send(message(grpc::master_message::Body::OpenStream(open))).map_err(|_| unreachable())
    }

    /// Makes durable what the turn decided; where the store refuses, memory goes back, then follows the store.
    async fn commit(&mut self) {
        if self.leader.read_only().is_some() && Instant::now() >= self.reopen_at {
            self.recover().await;
            return;
        }
        let mut rest = self.leader.settle(now(self.started), pki::random_u64()).into_iter();
        while !rest.as_slice().is_empty() {
            let (ops, taken) = transaction(rest.as_slice());
            let changes: Vec<Change> = rest.by_ref().take(taken).collect();
            let outcome = self.store.txn(Txn { epoch: self.epoch, guards: Vec::new(), ops }).await;
            match outcome {
                Ok(TxnOutcome::Committed(revision)) => {
                    self.leader.committed(changes, revision.0);
                    self.revision = revision.0;
                    // A hundred thousand tasks are seconds: nobody shall think meanwhile that this master is gone.
                    self.heartbeats();
                }
                other => {
                    let why = describe(&other, &self.store.health().borrow());
                    tracing::error!(reason = why, "store refused a commit, master is read-only");
                    self.leader.refused(why);
                    self.recover().await;
                    return;
                }
            }
        }
    }

    /// Opens the store again and loads the state from it: memory must not hold what the store does not.
    async fn recover(&mut self) {
        let reopened = async {
            self.store.reopen().await?;
            let epoch = self.store.lead(LEAD, Duration::from_secs(10)).await?;
            let (core, revision) = load(&*self.store, &self.settings, now(self.started)).await?;
            anyhow::Ok((epoch, core, revision))
        };
        match reopened.await {
            Ok((epoch, core, revision)) => {
                tracing::info!(%epoch, "store opened again");
                (self.epoch, self.revision) = (epoch, revision);
                self.leader.resumed(core, pki::random_hex(8), now(self.started));
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "failed to open the store again");
                self.reopen_at = Instant::now() + REOPEN_PAUSE;
            }
        }
    }

    /// Sends each session what its agent does not know yet, as far as it can take it.
    fn tell_agents(&mut self) {
        for node in self.leader.due() {
            let Some(link) = self.leader.session(&node) else { continue };
            let tx = link.tx.clone();
            let Ok(permit) = tx.try_reserve() else { continue };
            let Some(batch) = self.leader.batch(&node) else { continue };
            let upserts = batch.upserts.iter().map(document).collect();
            let assignments = grpc::Assignments {
                chain: self.leader.chain().to_owned(),
                full: batch.full,
                base: batch.base,
                generation: batch.generation,
                upserts,
                removes: batch.removes,
            };
            permit.send(message(grpc::master_message::Body::Assignments(assignments)));
        }
    }
}

fn message(body: grpc::master_message::Body) -> Box<SessionItem> {
    Box::new(Ok(grpc::MasterMessage { body: Some(body) }))
}

fn document(assignment: &Assignment) -> grpc::Document {
    let json = serde_json::to_vec(assignment).expect("an assignment has string keys only, so it is JSON");
    grpc::Document { key: assignment.key(), json }
}

/// The operations of the first changes, as many as one transaction takes, and how many these are; at least one.
fn transaction(changes: &[Change]) -> (Vec<Op>, usize) {
    let (mut ops, mut bytes) = (Vec::new(), 0);
    let mut text = Vec::new();
    for change in changes.iter().take(TXN_CHANGES_MAX) {
        let op = op(change, &mut text);
        if let Op::Put { value, .. } = &op {
            bytes += value.len();
        }
        if bytes > TXN_BYTES_MAX && !ops.is_empty() {
            break;
        }
        ops.push(op);
    }
    let taken = ops.len();
    (ops, taken)
}

/// The operation of a change. `text` is written over: values are kept for watchers for a while, so each gets as many bytes as
/// it has, and not what a growing text took.
fn op(change: &Change, text: &mut Vec<u8>) -> Op {
    let key = change.key();
    let key = StoreKey::new(key.kind.as_str(), key.id);
    match change {
        Change::Upsert(object) => {
            text.clear();
            object.encode_to(text);
            Op::Put { key, value: Bytes::copy_from_slice(text) }
        }
        Change::Delete(_) => Op::Delete { key },
    }
}

fn describe(outcome: &Result<TxnOutcome, StoreError>, health: &StoreHealth) -> String {
    match (outcome, health) {
        (Ok(TxnOutcome::Committed(revision)), _) => format!("committed at {revision}"),
        (Ok(TxnOutcome::Conflict(conflict)), _) => format!("another writer was there: {conflict:?}"),
        // The cause is what a person can act on; whether the change was kept shows once the store is open again.
        (Ok(TxnOutcome::Unknown), StoreHealth::ReadOnly(reason)) => {
            format!("{reason}; the store does not know whether it kept it")
        }
        (Ok(TxnOutcome::Unknown), _) => "the store does not know whether it kept it".to_owned(),
        (Err(error), _) => error.to_string(),
    }
}

fn now(started: Instant) -> Now {
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let wall_ms = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
    let mono_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    Now { wall: UnixMillis(wall_ms), mono_ms }
}

/// The wall clock.
pub fn wall_now() -> UnixMillis {
    now(Instant::now()).wall
}

/// The command of an agent's reports.
pub fn reports(node: NodeId, reports: Vec<TaskReport>) -> Command {
    Command::Reports { node, reports }
}

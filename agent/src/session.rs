//! The agent's one connection: keeps a session with a master, takes assignments into the ledger, sends reports and
//! heartbeats, opens the streams that the master asks for, and renews the certificate.
//!
//! ```text
//! connect ─> hello ─> ┌ assignments ─> ledger ─> overlay follows ─> ack ┐
//!    ^                │ heartbeat every 5 s, description when it changed │── until it breaks
//!    └── back-off <── └ reports <─ executor; OpenStream ─> streams       ┘
//! ```
//!
//! Tasks: the loop of [`Session::run`]; one per open stream, all in a `JoinSet` that ends with the connection; one that
//! applies assignments, so that a slow disk or kernel delays no heartbeat. Channels: messages out (`OUT`), assignments
//! to apply (`APPLY`); both wait for room.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_core::session::{Backoff, Pulse};
use rand::Rng as _;
use skein_api::{
    AGENT_PROTOCOL, Assignment, NetQuestion, NodeDescription, StreamRequest, TaskId, TaskReport,
    grpc::{self, agent_client::AgentClient, agent_message, master_message},
};
use skein_daemon::chain;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

use crate::{
    engine::Engine,
    executor::Reports,
    identity::{self, Dial, IdentityDir, Membership},
    inspect::{self, Reply},
    ledger::{AssignmentChange, Ledger, LedgerError},
    overlay::{OverlayError, OverlayHandle, Wanted},
    streams::{self, FRAMES_BUFFERED, Frame},
};

/// Messages on their way to the master. Heartbeats and acknowledgements are small and rare; reports wait for room.
const OUT: usize = 64;

/// Batches of assignments that wait for disk and kernel. The master sends the next one when there is room, with all that
/// changed meanwhile.
const APPLY: usize = 8;

/// Most reports in one message: 256 of about 1 KiB.
const REPORTS_MAX: usize = 256;

/// Streams at a time: each has a connection to the engine.
const STREAMS_MAX: usize = 256;

/// How long a master may take to read the last frames of a stream: its user may be slow.
const LAST_FRAMES: Duration = Duration::from_secs(60);

/// How long the master may take to answer a single call.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// How often the ledger's disk is tried again while it refuses, and the certificate's age is looked at.
const UPKEEP: Duration = Duration::from_secs(10);

/// The network side of the host, as the session needs it.
pub trait Follow: Clone + Send + Sync + 'static {
    /// Makes this the whole of what the host shall have; returns when kernel and names follow it. Idempotent.
    fn follow(&self, wanted: Wanted) -> impl Future<Output = Result<(), OverlayError>> + Send;

    /// Answers a question, or says in words why not.
    fn answer(&self, question: NetQuestion) -> impl Future<Output = Result<Reply, String>> + Send;
}

impl Follow for OverlayHandle {
    async fn follow(&self, wanted: Wanted) -> Result<(), OverlayError> {
        self.apply(wanted).await
    }

    async fn answer(&self, question: NetQuestion) -> Result<Reply, String> {
        inspect::answer(self, question).await
    }
}

/// What a session works with.
#[derive(Clone)]
pub struct Session<D, F> {
    /// How masters are reached.
    pub net: D,
    /// Whose it is and where masters are.
    pub membership: Membership,
    /// Key and certificate.
    pub identity: IdentityDir,
    /// Assignments.
    pub ledger: Ledger,
    /// Network side.
    pub overlay: F,
    /// For streams.
    pub engine: Engine,
    /// From the executor.
    pub reports: Reports,
    /// What the host is, now.
    pub description: watch::Receiver<NodeDescription>,
}

/// Why the agent stops for good.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// Asked to.
    #[error("shutting down")]
    Shutdown,
    /// The cluster does not know this node any more.
    #[error("this node was removed from its cluster: {0}")]
    Removed(String),
}

enum Broken {
    Removed(String),
    Failed(String),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        let removed = status.code() == Code::PermissionDenied && status.message().starts_with("[removed]");
        if removed {
            return Self::Removed(status.message().to_owned());
        }
        Self::Failed(status.message().to_owned())
    }
}

/// A call that a stuck master does not hold up.
async fn within<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Broken> {
    match tokio::time::timeout(CALL_WITHIN, call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Broken::Failed(format!("the master gave no answer within {} s", CALL_WITHIN.as_secs()))),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn unix_ms() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn message(body: agent_message::Body) -> grpc::AgentMessage {
    grpc::AgentMessage { body: Some(body) }
}

fn json<T: serde::Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("the protocol's documents are JSON")
}

impl<D: Dial, F: Follow> Session<D, F> {
    /// Keeps a session until `shutdown`, or until the node was removed.
    pub async fn run(self, shutdown: CancellationToken) -> Ended {
        let mut backoff = Backoff::default();
        for attempt in 0_usize.. {
            let address = &self.membership.masters[attempt % self.membership.masters.len()];
            let began = Instant::now();
            // Dropping a session in the middle loses nothing: reports stay until confirmed, assignments are in the ledger
            // or come again.
            let broken = tokio::select! {
                () = shutdown.cancelled() => return Ended::Shutdown,
                broken = self.once(address) => broken,
            };
            match broken {
                Broken::Removed(why) => return Ended::Removed(why),
                Broken::Failed(why) => tracing::warn!(master = address, reason = why, "session ended"),
            }
            let pause_ms = backoff.after(millis(began.elapsed()), rand::rng().random());
            tokio::select! {
                () = shutdown.cancelled() => return Ended::Shutdown,
                () = tokio::time::sleep(Duration::from_millis(pause_ms)) => {}
            }
        }
        unreachable!("attempts are counted in a usize")
    }

    /// One session, from connecting to its end.
    async fn once(&self, address: &str) -> Broken {
        match self.try_once(address).await {
            Ok(()) => Broken::Failed("the master ended it".to_owned()),
            Err(broken) => broken,
        }
    }

    async fn connect(&self, address: &str, authenticated: bool) -> Result<AgentClient<Channel>, Broken> {
        let tls = self.identity.tls(authenticated).map_err(|e| Broken::Failed(chain(&e)))?;
        identity::connect(&self.net, address, tls).await.map_err(|e| Broken::Failed(e.to_string()))
    }

    async fn try_once(&self, address: &str) -> Result<(), Broken> {
        if self.certificate_left() <= 0.0 {
            self.recover(address).await?;
        }
        let mut client = self.connect(address, true).await?;
        let (tx, rx) = mpsc::channel(OUT);
        let head = self.ledger.head();
        let description = self.description.borrow().clone();
        let hello = grpc::Hello {
            protocol: AGENT_PROTOCOL,
            description_json: json(&description),
            generation: head.generation,
            chain: head.chain,
            clock_unix_ms: unix_ms(),
        };
        tx.send(message(agent_message::Body::Hello(hello))).await.expect("the receiver is in this function");
        let inbound = within(client.session(ReceiverStream::new(rx))).await?.into_inner();
        self.reports.begin_session();
        tracing::info!(master = address, "session begun");
        let renew_at = rand::rng().random_range(0.45..0.55);
        Live { session: self, client, tx, streams: JoinSet::new(), renew_at }.run(inbound).await
    }

    /// Share of the certificate's life that is left; 0 when it is over or unreadable.
    fn certificate_left(&self) -> f64 {
        let Ok((from, to)) = self.identity.validity() else { return 0.0 };
        let now = i64::try_from(unix_ms() / 1_000).unwrap_or(i64::MAX);
        #[allow(clippy::cast_precision_loss, reason = "a share of some hours")]
        let left = (to - now) as f64 / (to - from).max(1) as f64;
        left.max(0.0)
    }

    /// A new certificate for a host that was off for longer than the old one lived: the key proves who it is.
    async fn recover(&self, address: &str) -> Result<(), Broken> {
        let failed = |e: identity::IdentityError| Broken::Failed(chain(&e));
        tracing::info!("certificate is over, asking for a new one");
        let csr_der = identity::signing_request(&self.identity.ensure_key().map_err(failed)?).map_err(failed)?;
        let mut client = self.connect(address, false).await?;
        let node_id = self.membership.node.clone();
        let request = grpc::RecoverRequest { node_id, csr_der, clock_unix_ms: unix_ms() };
        let answer = within(client.recover(request)).await?.into_inner();
        self.identity.store(&answer.certificate_pem, &answer.ca_pem, None).map_err(failed)
    }

    async fn renew(&self, client: &mut AgentClient<Channel>) -> Result<(), Broken> {
        let failed = |e: identity::IdentityError| Broken::Failed(chain(&e));
        let csr_der = identity::signing_request(&self.identity.ensure_key().map_err(failed)?).map_err(failed)?;
        let answer = within(client.renew(grpc::RenewRequest { csr_der })).await?.into_inner();
        self.identity.store(&answer.certificate_pem, &answer.ca_pem, None).map_err(failed)?;
        tracing::info!("certificate renewed");
        Ok(())
    }

    /// Lets the network follow the ledger, which needs no master. False when it does not, which is logged and tried again by the overlay.
    pub async fn follow(&self) -> bool {
        let assignments = self.ledger.assignments();
        match self.overlay.follow(Wanted::of(assignments.values())).await {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(error = chain(&error), "network does not follow the assignments");
                false
            }
        }
    }

    /// Takes one batch in; the acknowledgement when disk and network have it.
    async fn take(&self, batch: grpc::Assignments) -> Result<Option<grpc::Ack>, Broken> {
        let parse = |d: grpc::Document| {
            serde_json::from_slice::<Assignment>(&d.json)
                .map_err(|e| Broken::Failed(format!("failed to read assignment {}: {e}", d.key)))
        };
        let upserts = batch.upserts.into_iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let (chain_name, generation) = (batch.chain.clone(), batch.generation);
        let change = AssignmentChange {
            chain: batch.chain,
            full: batch.full,
            base: batch.base,
            generation,
            upserts,
            removes: batch.removes,
        };
        let ledger = self.ledger.clone();
        let applied = tokio::task::spawn_blocking(move || ledger.apply(change)).await;
        let durable = match applied.expect("the ledger does not panic") {
            Ok(()) => true,
            Err(error @ LedgerError::Write { .. }) => {
                tracing::error!(error = chain(&error), "ledger is only in memory");
                false
            }
            // The sequence broke: a new session brings everything.
            Err(error) => return Err(Broken::Failed(chain(&error))),
        };
        let follows = self.follow().await;
        Ok((durable && follows).then_some(grpc::Ack { generation, chain: chain_name }))
    }
}

fn tasks(reported: grpc::Reported) -> Vec<TaskId> {
    reported.task_ids.into_iter().map(TaskId::new).collect()
}

/// A session that stands.
struct Live<'a, D, F> {
    session: &'a Session<D, F>,
    client: AgentClient<Channel>,
    tx: mpsc::Sender<grpc::AgentMessage>,
    streams: JoinSet<()>,
    /// Share of the certificate's life at which it is renewed: half, spread over a tenth, so that agents that joined
    /// together do not renew together.
    renew_at: f64,
}

impl<D: Dial, F: Follow> Live<'_, D, F> {
    async fn run(mut self, mut inbound: tonic::Streaming<grpc::MasterMessage>) -> Result<(), Broken> {
        let session = self.session;
        let (apply_tx, mut apply_rx) = mpsc::channel::<grpc::Assignments>(APPLY);
        let out = self.tx.clone();
        // Applied one after the other and beside the loop: a slow disk must not delay heartbeats.
        let apply = async move {
            while let Some(batch) = apply_rx.recv().await {
                if let Some(ack) = session.take(batch).await?
                    && out.send(message(agent_message::Body::Ack(ack))).await.is_err()
                {
                    break;
                }
            }
            Ok::<_, Broken>(())
        };
        tokio::pin!(apply);
        let (mut reports, mut description) = (session.reports.changed(), session.description.clone());
        reports.mark_changed();
        let underlay = {
            let told = description.borrow();
            (told.underlay4, told.underlay6)
        };
        let began = Instant::now();
        let now_ms = || millis(began.elapsed());
        let mut pulse = Pulse::new(now_ms());
        let beat = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(beat);
        let mut upkeep = tokio::time::interval(UPKEEP);
        loop {
            // Cancel-safe: messages, watches and timers keep what is not taken; `apply` is polled in place, not dropped.
            tokio::select! {
                // While too much waits for disk and kernel nothing is read: the master then keeps what changed together.
                received = inbound.message(), if apply_tx.capacity() > 0 => {
                    let Some(received) = received? else { return Ok(()) };
                    pulse.heard(now_ms());
                    match received.body {
                        Some(master_message::Body::HeartbeatAck(ack)) => {
                            pulse.acknowledged(ack.period_ms.into());
                        }
                        Some(master_message::Body::Assignments(batch)) => {
                            apply_tx.try_send(batch).expect("there was room before the message was read");
                        }
                        Some(master_message::Body::OpenStream(open)) => self.open_stream(open),
                        Some(master_message::Body::Removed(removed)) => return Err(Broken::Removed(removed.reason)),
                        Some(master_message::Body::Reported(reported)) => {
                            session.reports.reported(&tasks(reported));
                            self.send_reports().await?;
                        }
                        Some(master_message::Body::Refused(reported)) => session.reports.refused(&tasks(reported)),
                        // A newer master's message that this protocol version may pass over.
                        None => {}
                    }
                }
                result = &mut apply => return result,
                () = &mut beat => {
                    if pulse.is_silent(now_ms()) && apply_tx.capacity() > 0 {
                        return Err(Broken::Failed("the master acknowledges no heartbeats".into()));
                    }
                    let (seq, pause_ms) = pulse.beat(rand::rng().random());
                    self.send(agent_message::Body::Heartbeat(grpc::Heartbeat { seq })).await?;
                    // Those that the master could not take, and those that wait although it is silent.
                    self.report(session.reports.unsent(REPORTS_MAX)).await?;
                    beat.as_mut().reset(Instant::now() + Duration::from_millis(pause_ms));
                }
                changed = reports.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.send_reports().await?;
                }
                changed = description.changed() => {
                    if changed.is_ok() {
                        let now = description.borrow_and_update().clone();
                        if underlay != (now.underlay4, now.underlay6) {
                            // The connection may hang on an address that is gone. A new one brings the description.
                            return Err(Broken::Failed("this host's underlay address changed".into()));
                        }
                        let json = json(&now);
                        self.send(agent_message::Body::DescriptionJson(json)).await?;
                    }
                }
                _ = upkeep.tick() => self.upkeep().await?,
                Some(_) = self.streams.join_next() => {}
            }
        }
    }

    async fn send(&self, body: agent_message::Body) -> Result<(), Broken> {
        let gone = |_| Broken::Failed("the connection was cut".into());
        self.tx.send(message(body)).await.map_err(gone)
    }

    /// Sends the next reports, unless the last ones are not answered.
    async fn send_reports(&self) -> Result<(), Broken> {
        self.report(self.session.reports.next(REPORTS_MAX)).await
    }

    async fn report(&self, reports: Vec<TaskReport>) -> Result<(), Broken> {
        if reports.is_empty() {
            return Ok(());
        }
        self.send(agent_message::Body::ReportsJson(json(&reports))).await
    }

    async fn upkeep(&mut self) -> Result<(), Broken> {
        let ledger = self.session.ledger.clone();
        let repaired = tokio::task::spawn_blocking(move || ledger.repair()).await;
        if let Err(error) = repaired.expect("the ledger does not panic") {
            tracing::error!(error = chain(&error), "ledger is only in memory");
        }
        if self.session.certificate_left() < self.renew_at {
            match self.session.renew(&mut self.client).await {
                Ok(()) => {}
                Err(removed @ Broken::Removed(_)) => return Err(removed),
                // There is half of its life left to try again.
                Err(Broken::Failed(why)) => tracing::warn!(reason = why, "certificate was not renewed"),
            }
        }
        Ok(())
    }

    /// Opens a stream that the master asked for, in a task of its own.
    fn open_stream(&mut self, open: grpc::OpenStream) {
        if self.streams.len() >= STREAMS_MAX {
            tracing::warn!("stream refused, too many are open");
            return;
        }
        let (mut client, engine, overlay) =
            (self.client.clone(), self.session.engine.clone(), self.session.overlay.clone());
        self.streams.spawn(async move {
            if let Err(error) = stream(&mut client, &engine, &overlay, open).await {
                tracing::debug!(error, "stream ended");
            }
        });
    }
}

/// One stream, from its opening to its end.
async fn stream(
    client: &mut AgentClient<Channel>,
    engine: &Engine,
    overlay: &impl Follow,
    open: grpc::OpenStream,
) -> Result<(), String> {
    let request: StreamRequest = serde_json::from_slice(&open.request_json).map_err(|e| e.to_string())?;
    let (out_tx, out_rx) = mpsc::channel(FRAMES_BUFFERED);
    let (in_tx, in_rx) = mpsc::channel(FRAMES_BUFFERED);
    let first = grpc::StreamFrame { body: Some(grpc::stream_frame::Body::StreamId(open.stream_id)) };
    let outbound = tokio_stream::once(first).chain(ReceiverStream::new(out_rx).map(Frame::into_wire));
    let mut inbound = client.stream(outbound).await.map_err(|s| s.message().to_owned())?.into_inner();
    let serve = async move {
        match request {
            StreamRequest::Net { question } => streams::send(overlay.answer(question).await, out_tx).await,
            request => streams::serve(engine, request, in_rx, out_tx).await,
        }
    };
    let feed = async move {
        // Until the master ends the call: that is the user's end. A process that takes no input does not end it.
        while let Ok(Some(frame)) = inbound.message().await {
            if let Some(frame) = Frame::from_wire(frame) {
                let _ = in_tx.send(frame).await;
            }
        }
    };
    tokio::pin!(serve, feed);
    // Dropping `serve` in the middle only drops its connections to the engine.
    tokio::select! {
        () = &mut serve => {
            // Returning would cancel the call, and with it the last frames on their way: the master ends it.
            let _ = tokio::time::timeout(LAST_FRAMES, feed).await;
        }
        () = &mut feed => {}
    }
    Ok(())
}

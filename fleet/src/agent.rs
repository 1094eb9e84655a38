//! One agent: its identity and its session, as `skein-agent` keeps them, around a modelled [`Host`].
//!
//! Owns what the real agent's `session` and `identity` own, less what belongs to a disk, a kernel or a user's streams.
//! Connections, certificate requests and the queue of reports are the real agent's own code. Tasks: [`Agent::run`] is
//! one, beside those of its connection.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use agent_core::{
    AssignmentChange, Head,
    session::{Backoff, Outbox, Pulse},
};
use anyhow::{Context as _, Result, bail};
use rcgen::KeyPair;
use rustls::{
    ClientConfig, RootCertStore,
    client::{Resumption, WebPkiServerVerifier},
    crypto::{CryptoProvider, ring},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use skein_agent::identity;
use skein_api::{
    AGENT_PROTOCOL, Assignment, JoinToken, NodeDescription, Resources, TaskId, TaskReport, UnixMillis,
    grpc::{self, agent_client::AgentClient, agent_message, master_message},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{fleet::Counters, host::Host};

/// Messages on their way to the master, as in the real agent.
const OUT: usize = 64;

/// Most reports in one message, as in the real agent.
const REPORTS_MAX: usize = 256;

/// Attempts to join before an agent is given up.
const JOIN_ATTEMPTS: u32 = 10;

/// How long the master may take to answer a call; longer than the real agent's, since the fleet shares the cores with it.
const CALL_WITHIN: Duration = Duration::from_secs(30);

/// What all agents share.
pub struct Shared {
    /// Addresses of the master, `host:port`; each agent takes one by its number, so that local ports suffice.
    pub masters: Vec<String>,
    /// The join token, as it was given to the operator.
    pub token: String,
    /// What was counted.
    pub counters: Counters,
    provider: Arc<CryptoProvider>,
    /// Trust in the cluster's CA; the first agent that joins makes it.
    verifier: OnceLock<Arc<WebPkiServerVerifier>>,
}

impl Shared {
    /// For agents of the master at `masters` that join with `token`.
    pub fn new(masters: Vec<String>, token: String) -> Self {
        let provider = Arc::new(ring::default_provider());
        Self { masters, token, counters: Counters::default(), provider, verifier: OnceLock::new() }
    }
}

/// What an agent is wanted to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Say nothing more, as a host that hangs.
    pub silent: bool,
    /// Counts restarts of the agent's process.
    pub restarts: u32,
}

/// One agent.
pub struct Agent {
    shared: Arc<Shared>,
    number: u32,
    host: Host,
    reports: Outbox,
    wish: watch::Receiver<Wish>,
    /// Tasks that run and whose master knows it.
    confirmed: usize,
}

/// Name of the host with this number.
pub fn name(number: u32) -> String {
    format!("fleet-{number:05}")
}

/// What a host of the fleet says of itself: a usual small server.
fn describe(number: u32) -> NodeDescription {
    let offered = Resources { nano_cpus: 8_000_000_000, mem_bytes: 32 << 30 };
    let rack = format!("r{:03}", number / 40);
    NodeDescription {
        hostname: name(number),
        labels: [("rack".to_owned(), rack), ("disk".to_owned(), "ssd".to_owned())].into(),
        capacity: offered,
        offered,
        os: "linux".to_owned(),
        arch: "x86_64".to_owned(),
        operating_system: "Debian GNU/Linux 13 (trixie)".to_owned(),
        kernel: "6.12.48-amd64".to_owned(),
        engine_version: "28.4.0".to_owned(),
        storage_driver: "overlay2".to_owned(),
        volume_plugins: vec!["local".to_owned()],
        network_plugins: ["bridge", "host", "ipvlan", "macvlan", "null", "overlay"].map(str::to_owned).into(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        underlay4: Some(Ipv4Addr::from(0x0a00_0000 + number)),
        vxlan_port: 4_789,
        underlay_mtu: 1_500,
        routes: vec!["192.168.0.0/24".parse().expect("a valid prefix")],
        ..NodeDescription::default()
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn message(body: agent_message::Body) -> grpc::AgentMessage {
    grpc::AgentMessage { body: Some(body) }
}

fn tasks(reported: grpc::Reported) -> Vec<TaskId> {
    reported.task_ids.into_iter().map(TaskId::new).collect()
}

fn json<T: serde::Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("the protocol's documents are JSON")
}

async fn within<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T> {
    let answer = tokio::time::timeout(CALL_WITHIN, call).await.context("the master gave no answer")?;
    answer.map_err(|status| anyhow::anyhow!("{}", status.message()))
}

impl Agent {
    /// An agent that has not joined.
    pub fn new(shared: Arc<Shared>, number: u32, wish: watch::Receiver<Wish>) -> Self {
        Self { shared, number, host: Host::new(number.into()), reports: Outbox::default(), wish, confirmed: 0 }
    }

    fn address(&self) -> &str {
        &self.shared.masters[self.number as usize % self.shared.masters.len()]
    }

    /// Joins the cluster, several times if it must: places for joining hosts are few, and refused when they are taken.
    ///
    /// # Errors
    /// The last refusal.
    pub async fn join(&self) -> Result<Arc<ClientConfig>> {
        let mut backoff = Backoff::default();
        for attempt in 1.. {
            match self.try_join().await {
                Ok(tls) => return Ok(Arc::new(tls)),
                Err(error) if attempt == JOIN_ATTEMPTS => return Err(error),
                Err(_) => self.shared.counters.retries.add(1),
            }
            tokio::time::sleep(Duration::from_millis(backoff.after(0, rand::random()))).await;
        }
        unreachable!("the last attempt returns")
    }

    async fn try_join(&self) -> Result<ClientConfig> {
        let pin = JoinToken::parse(&self.shared.token).map_err(|e| anyhow::anyhow!("{e}"))?;
        let key = KeyPair::generate()?;
        let mut client =
            identity::connect(&identity::Tcp, self.address(), identity::pinned_tls(&pin.ca_sha256)?).await?;
        let request = grpc::JoinRequest {
            token: self.shared.token.clone(),
            csr_der: identity::signing_request(&key)?,
            description_json: json(&describe(self.number)),
            clock_unix_ms: unix_ms(),
        };
        let answer = within(client.join(request)).await?.into_inner();
        self.tls(&key, &answer)
    }

    /// TLS that trusts the cluster's CA and shows this node's certificate.
    fn tls(&self, key: &KeyPair, answer: &grpc::JoinResponse) -> Result<ClientConfig> {
        let verifier = match self.shared.verifier.get() {
            Some(verifier) => verifier.clone(),
            None => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(answer.ca_pem.as_bytes())?)?;
                let provider = self.shared.provider.clone();
                let made = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
                self.shared.verifier.get_or_init(|| made).clone()
            }
        };
        let certificate = CertificateDer::from_pem_slice(answer.certificate_pem.as_bytes())?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let mut config = ClientConfig::builder_with_provider(self.shared.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // The real agent makes its configuration anew for each connection, so it never resumes either.
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// Keeps a session for ever.
    pub async fn run(mut self, tls: Arc<ClientConfig>) {
        let mut backoff = Backoff::default();
        loop {
            let began = Instant::now();
            if let Err(error) = self.session(&tls).await {
                self.shared.counters.broken(&error);
            }
            let pause = backoff.after(ms(began.elapsed()), rand::random());
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// One session, from connecting to its end.
    async fn session(&mut self, tls: &ClientConfig) -> Result<()> {
        let client = identity::connect(&identity::Tcp, self.address(), tls.clone()).await?;
        let (tx, rx) = mpsc::channel(OUT);
        let Head { chain, generation } = self.host.head().clone();
        let hello = grpc::Hello {
            protocol: AGENT_PROTOCOL,
            description_json: json(&describe(self.number)),
            generation,
            chain,
            clock_unix_ms: unix_ms(),
        };
        tx.send(message(agent_message::Body::Hello(hello))).await.context("the receiver is in this function")?;
        let mut call: AgentClient<Channel> = client.clone();
        let inbound = within(call.session(ReceiverStream::new(rx))).await?.into_inner();
        self.reports.begin_session();
        self.shared.counters.sessions.add(1);
        let ended = self.live(&tx, inbound).await;
        self.shared.counters.sessions.sub(1);
        ended
    }

    /// A session that stands.
    async fn live(
        &mut self,
        tx: &mpsc::Sender<grpc::AgentMessage>,
        mut inbound: tonic::Streaming<grpc::MasterMessage>,
    ) -> Result<()> {
        let mut wish = self.wish.clone();
        let restarts = wish.borrow().restarts;
        let (began, mut pulse) = (Instant::now(), Pulse::new(0));
        let beat = tokio::time::sleep(Duration::ZERO);
        let wake = tokio::time::sleep(Duration::MAX);
        tokio::pin!(beat, wake);
        self.look(wake.as_mut());
        self.send_reports(tx).await?;
        loop {
            // Cancel-safe: messages, watches and timers keep what is not taken.
            tokio::select! {
                received = inbound.message() => {
                    let Some(received) = received.map_err(|s| anyhow::anyhow!("{}", s.message()))? else {
                        bail!("the master ended it");
                    };
                    pulse.heard(ms(began.elapsed()));
                    match received.body {
                        Some(master_message::Body::HeartbeatAck(ack)) => {
                            pulse.acknowledged(ack.period_ms.into());
                        }
                        Some(master_message::Body::Assignments(batch)) => {
                            self.take(batch, tx).await?;
                            self.look(wake.as_mut());
                            self.send_reports(tx).await?;
                        }
                        Some(master_message::Body::Reported(reported)) => {
                            self.reports.reported(&tasks(reported));
                            self.count_running();
                            self.send_reports(tx).await?;
                        }
                        // Sent again with the next heartbeat.
                        Some(master_message::Body::Refused(refused)) => self.reports.refused(&tasks(refused)),
                        Some(master_message::Body::Removed(removed)) => bail!("removed: {}", removed.reason),
                        Some(master_message::Body::OpenStream(_)) | None => {}
                    }
                }
                () = &mut beat => {
                    if pulse.is_silent(ms(began.elapsed())) {
                        bail!("the master acknowledges no heartbeats");
                    }
                    let (seq, pause) = pulse.beat(rand::random());
                    send(tx, agent_message::Body::Heartbeat(grpc::Heartbeat { seq })).await?;
                    let reports = self.reports.unsent(REPORTS_MAX);
                    self.report(reports, tx).await?;
                    beat.as_mut().reset(Instant::now() + Duration::from_millis(pause));
                }
                () = &mut wake => {
                    self.look(wake.as_mut());
                    self.send_reports(tx).await?;
                }
                changed = wish.changed() => {
                    changed.context("the fleet ended")?;
                    if wish.borrow_and_update().silent {
                        // A host that hangs: its kernel keeps the connection, nothing answers.
                        wish.wait_for(|w| !w.silent).await.context("the fleet ended")?;
                        pulse.heard(ms(began.elapsed()));
                    }
                    if wish.borrow().restarts != restarts {
                        self.host.restart();
                        self.wish = wish;
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Takes a batch of assignments in and acknowledges it.
    async fn take(&mut self, batch: grpc::Assignments, tx: &mpsc::Sender<grpc::AgentMessage>) -> Result<()> {
        let parse = |d: grpc::Document| serde_json::from_slice::<Assignment>(&d.json);
        let change = AssignmentChange {
            chain: batch.chain.clone(),
            full: batch.full,
            base: batch.base,
            generation: batch.generation,
            upserts: batch.upserts.into_iter().map(parse).collect::<Result<_, _>>()?,
            removes: batch.removes,
        };
        self.host.take(change)?;
        send(tx, agent_message::Body::Ack(grpc::Ack { generation: batch.generation, chain: batch.chain })).await
    }

    /// Looks at the host and sets the timer for the next look.
    fn look(&mut self, wake: std::pin::Pin<&mut tokio::time::Sleep>) {
        let now = unix_ms();
        let turn = self.host.turn(UnixMillis(now));
        for report in turn.reports {
            self.reports.put(report);
        }
        let pause = turn.wake_at.map_or(Duration::MAX, |at| Duration::from_millis(at.0.saturating_sub(now)));
        // A timer that is too far away to be told never rings, which is what is meant.
        wake.reset(Instant::now() + pause.min(Duration::from_secs(365 * 24 * 3_600)));
        self.count_running();
    }

    /// Sends the next reports, unless the last ones are not answered.
    async fn send_reports(&mut self, tx: &mpsc::Sender<grpc::AgentMessage>) -> Result<()> {
        let reports = self.reports.next(REPORTS_MAX);
        self.report(reports, tx).await
    }

    async fn report(&self, reports: Vec<TaskReport>, tx: &mpsc::Sender<grpc::AgentMessage>) -> Result<()> {
        if reports.is_empty() {
            return Ok(());
        }
        self.shared.counters.reports.add(reports.len());
        send(tx, agent_message::Body::ReportsJson(json(&reports))).await
    }

    /// Keeps the count of tasks that run and whose master has confirmed it.
    fn count_running(&mut self) {
        let pending: BTreeSet<TaskId> = self.reports.pending().map(|r| r.task.clone()).collect();
        let confirmed = self.host.running().filter(|task| !pending.contains(*task)).count();
        let counter = &self.shared.counters.running;
        counter.add(confirmed);
        counter.sub(std::mem::replace(&mut self.confirmed, confirmed));
    }
}

async fn send(tx: &mpsc::Sender<grpc::AgentMessage>, body: agent_message::Body) -> Result<()> {
    tx.send(message(body)).await.ok().context("the connection was cut")
}

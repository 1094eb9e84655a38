//! The embedded store: a handle for many tasks, one thread that writes.
//!
//! Owns: the writer thread, its channel, group commit, the lead, the read-only state after a failure. Must not know: how
//! records are encoded, where the file is.
//!
//! One thread per open store, "store-writer". It takes one bounded channel of requests in order; adjacent transactions
//! form a group, which becomes one redb transaction with one fsync. While that fsync runs, the next group gathers, so the
//! group grows with the load and a lone transaction waits for nobody. The thread ends, closing the store in order, on
//! [`EmbeddedStore::close`] or when the last handle is dropped.

use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::backup::{self, BackupSummary};
use super::db::{Applied, Engine, Fault};
use super::medium::{DirMedium, Medium};
use super::watch::{Feed, Source};
use super::{
    Epoch, FaultKind, ReadOnlyReason, Revision, Snapshot, Store, StoreError, StoreHealth, TXN_BYTES_MAX, Txn,
    TxnOutcome, Watch,
};

/// Requests that wait for the writer. A full group takes one fsync of about 2.5 ms, so a request that finds the channel full
/// waits for two or three groups, about 10 ms; that is back-pressure on the API, not a failure. Memory: see
/// [`QUEUE_BYTES_MAX`].
pub const QUEUE_REQUESTS_MAX: usize = 1024;
/// Bytes of the transactions that wait or are being written: four of the largest (16 MiB each). Who comes later waits.
pub const QUEUE_BYTES_MAX: usize = 4 * TXN_BYTES_MAX;
/// Transactions in one group: what fits in half the channel, so that one half gathers while the other is written.
pub const GROUP_TXNS_MAX: usize = QUEUE_REQUESTS_MAX / 2;
/// How long the writer waits for more work before it seals. Longer than the gaps in a busy stretch, so that the seal's fsync
/// comes once after it; short, because until then damage to the last commit would go unnoticed.
pub const SEAL_AFTER: Duration = Duration::from_millis(50);

/// Counters since the store was opened, for metrics and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Transactions that changed something.
    pub commits_total: u64,
    /// redb transactions that they took: one fsync each.
    pub groups_total: u64,
    /// Seals after a moment without work.
    pub seals_total: u64,
    /// Of `commits_total`, those before the last such seal.
    pub sealed_commits_total: u64,
}

#[derive(Debug, Default)]
struct Counters {
    commits: AtomicU64,
    groups: AtomicU64,
    seals: AtomicU64,
    sealed_commits: AtomicU64,
}

/// A handle to an open embedded store. Clones share the store.
#[derive(Clone, Debug)]
pub struct EmbeddedStore {
    requests_tx: mpsc::Sender<Request>,
    budget: Arc<Semaphore>,
    source: Source,
    health_rx: watch::Receiver<StoreHealth>,
    counters: Arc<Counters>,
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

#[derive(Debug)]
enum Request {
    Txn(Waiting),
    Snapshot(Reply<Snapshot>),
    Lead { name: String, reply: Reply<Epoch> },
    Resign { epoch: Epoch, reply: Reply<()> },
    Reopen(Reply<Revision>),
    Close(Reply<()>),
}

#[derive(Debug)]
struct Waiting {
    txn: Txn,
    reply: Reply<TxnOutcome>,
    /// Its share of [`QUEUE_BYTES_MAX`], given back with the reply.
    _permit: OwnedSemaphorePermit,
}

impl EmbeddedStore {
    /// Opens the store in `dir`, or makes one when there is none, and verifies all of it. Blocks: about a second for 10^5
    /// records.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::FormatTooNew`], [`StoreError::Damaged`], [`StoreError::Failed`],
    /// [`StoreError::Io`]; each leaves the file as it was.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_medium(DirMedium::lock(dir)?)
    }

    /// Like [`EmbeddedStore::open`], on another storage; for durability tests.
    ///
    /// # Errors
    /// As of [`EmbeddedStore::open`].
    pub fn open_medium<M: Medium>(medium: M) -> Result<Self, StoreError> {
        let place = medium.place();
        let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
        let (requests_tx, requests_rx) = mpsc::channel(QUEUE_REQUESTS_MAX);
        let (health_tx, health_rx) = watch::channel(StoreHealth::Writable);
        let counters = Arc::new(Counters::default());
        let writer_counters = Arc::clone(&counters);
        let body = move || {
            let opened = Engine::open(medium);
            let engine = match opened {
                Ok(engine) => engine,
                Err(error) => {
                    let _ = opened_tx.send(Err(error));
                    return;
                }
            };
            let (feed, source) = super::watch::feed(engine.revision());
            let _ = opened_tx.send(Ok(source));
            let counters = writer_counters;
            Writer { engine, feed, leader: None, read_only: None, health_tx, counters }.run(requests_rx);
        };
        let io_error = |source| StoreError::Io { verb: "start the writer of", path: place.clone().into(), source };
        std::thread::Builder::new().name("store-writer".to_owned()).spawn(body).map_err(io_error)?;
        let source = opened_rx.recv().map_err(|_| StoreError::Closed)??;
        let budget = Arc::new(Semaphore::new(QUEUE_BYTES_MAX));
        Ok(Self { requests_tx, budget, source, health_rx, counters })
    }

    /// Waits for what was sent before, closes the store in order and gives its lock back. Other handles then get
    /// [`StoreError::Closed`].
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`] when the last write fails: the store is closed, but not marked as clean.
    pub async fn close(&self) -> Result<(), StoreError> {
        let closed = self.ask(Request::Close).await;
        // The lock goes with the thread's last step, after its reply.
        self.requests_tx.closed().await;
        closed
    }

    /// Writes a consistent backup of the store as it is now. Holds a copy of all records in memory meanwhile.
    ///
    /// # Errors
    /// Those of [`Store::snapshot`], and [`StoreError::Io`] from `writer`.
    pub async fn backup(&self, writer: impl Write) -> Result<BackupSummary, StoreError> {
        let snapshot = self.snapshot().await?;
        backup::backup(&snapshot, writer)
    }

    /// Counters since the store was opened.
    pub fn stats(&self) -> StoreStats {
        let Counters { commits, groups, seals, sealed_commits } = &*self.counters;
        StoreStats {
            commits_total: commits.load(Ordering::Relaxed),
            groups_total: groups.load(Ordering::Relaxed),
            seals_total: seals.load(Ordering::Relaxed),
            sealed_commits_total: sealed_commits.load(Ordering::Relaxed),
        }
    }

    async fn send_txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        // Permits count bytes; u32 holds the 16 MiB that `check` allows, and an empty transaction costs one.
        let permits = u32::try_from(txn.bytes().max(1)).expect("a checked transaction has at most 16 MiB");
        let permit = Arc::clone(&self.budget).acquire_many_owned(permits).await.map_err(|_| StoreError::Closed)?;
        let (reply, reply_rx) = oneshot::channel();
        let waiting = Waiting { txn, reply, _permit: permit };
        self.requests_tx.send(Request::Txn(waiting)).await.map_err(|_| StoreError::Closed)?;
        // A writer that is gone without a reply may have written.
        reply_rx.await.unwrap_or(Ok(TxnOutcome::Unknown))
    }

    fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> impl Future<Output = Result<T, StoreError>> {
        let (reply, reply_rx) = oneshot::channel();
        let request = request(reply);
        async move {
            self.requests_tx.send(request).await.map_err(|_| StoreError::Closed)?;
            reply_rx.await.map_err(|_| StoreError::Closed)?
        }
    }
}

impl Store for EmbeddedStore {
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        Box::pin(self.send_txn(txn))
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, StoreError>> {
        Box::pin(self.ask(Request::Snapshot))
    }

    fn watch(&self, from: Revision) -> Watch {
        self.source.watch(from)
    }

    fn lead(&self, name: &str, _ttl: Duration) -> BoxFuture<'_, Result<Epoch, StoreError>> {
        let name = name.to_owned();
        Box::pin(self.ask(|reply| Request::Lead { name, reply }))
    }

    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.ask(move |reply| Request::Resign { epoch, reply }))
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(self.ask(Request::Reopen))
    }

    fn health(&self) -> watch::Receiver<StoreHealth> {
        self.health_rx.clone()
    }
}

struct Leader {
    name: String,
    epoch: Epoch,
}

struct Writer<M: Medium> {
    engine: Engine<M>,
    feed: Feed,
    leader: Option<Leader>,
    read_only: Option<ReadOnlyReason>,
    health_tx: watch::Sender<StoreHealth>,
    counters: Arc<Counters>,
}

impl<M: Medium> Writer<M> {
    fn run(mut self, mut requests_rx: mpsc::Receiver<Request>) {
        // A runtime for this thread alone: a timed wait on the channel is all that it does.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "failed to start the store's writer");
                return;
            }
        };
        let mut requests = Vec::with_capacity(GROUP_TXNS_MAX);
        let mut close_reply = None;
        while close_reply.is_none() {
            if self.engine.needs_seal() {
                let wait = requests_rx.recv_many(&mut requests, GROUP_TXNS_MAX);
                // Cancel-safe by recv_many's documentation: a wait that is given up has taken nothing.
                match runtime.block_on(async { tokio::time::timeout(SEAL_AFTER, wait).await }) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(_) => {
                        self.seal();
                        continue;
                    }
                }
            } else if requests_rx.blocking_recv_many(&mut requests, GROUP_TXNS_MAX) == 0 {
                break;
            }
            let mut group = Vec::new();
            for request in requests.drain(..) {
                match request {
                    Request::Txn(waiting) => group.push(waiting),
                    other => {
                        self.commit(std::mem::take(&mut group));
                        if let Some(reply) = self.answer(other) {
                            close_reply = Some(reply);
                        }
                    }
                }
            }
            self.commit(group);
        }
        let Self { engine, feed, health_tx, .. } = self;
        let closed = engine.close().map_err(|fault| StoreError::ReadOnly { reason: fault.reason });
        if let Err(error) = &closed {
            tracing::warn!(%error, "failed to close the store in order");
        }
        drop(feed);
        health_tx.send_replace(StoreHealth::Closed);
        if let Some(reply) = close_reply {
            let _ = reply.send(closed);
        }
        // `requests_rx` goes last, with the lock already given back: see `EmbeddedStore::close`.
        drop(requests_rx);
    }

    fn commit(&mut self, group: Vec<Waiting>) {
        if group.is_empty() {
            return;
        }
        if let Some(reason) = &self.read_only {
            for waiting in group {
                let _ = waiting.reply.send(Err(StoreError::ReadOnly { reason: reason.clone() }));
            }
            return;
        }
        let txns: Vec<&Txn> = group.iter().map(|waiting| &waiting.txn).collect();
        match self.engine.apply(&txns, self.leader.as_ref().map(|leader| leader.epoch)) {
            Ok(Applied { outcomes, commits }) => {
                self.counters.commits.fetch_add(commits.len() as u64, Ordering::Relaxed);
                self.counters.groups.fetch_add(u64::from(!commits.is_empty()), Ordering::Relaxed);
                self.feed.publish(commits);
                for (waiting, outcome) in group.into_iter().zip(outcomes) {
                    let _ = waiting.reply.send(Ok(outcome));
                }
            }
            Err(fault) => {
                let reason = self.fail(&fault);
                for waiting in group {
                    // Conflicts of a failed group are unknown as well: they may rest on what was not written.
                    let reply = match fault.maybe_durable {
                        true => Ok(TxnOutcome::Unknown),
                        false => Err(StoreError::ReadOnly { reason: reason.clone() }),
                    };
                    let _ = waiting.reply.send(reply);
                }
            }
        }
    }

    /// Answers all but transactions; gives the reply back for a close.
    fn answer(&mut self, request: Request) -> Option<Reply<()>> {
        match request {
            Request::Txn(waiting) => self.commit(vec![waiting]),
            Request::Snapshot(reply) => {
                let snapshot = self.writable(Engine::snapshot);
                let _ = reply.send(snapshot);
            }
            Request::Lead { name, reply } => {
                let _ = reply.send(self.lead(name));
            }
            Request::Resign { epoch, reply } => {
                self.leader = self.leader.take().filter(|leader| leader.epoch != epoch);
                let _ = reply.send(Ok(()));
            }
            Request::Reopen(reply) => {
                let _ = reply.send(self.reopen());
            }
            Request::Close(reply) => return Some(reply),
        }
        None
    }

    fn lead(&mut self, name: String) -> Result<Epoch, StoreError> {
        if let Some(Leader { name, epoch }) = &self.leader {
            return Err(StoreError::LeadHeld { holder: name.clone(), epoch: *epoch });
        }
        let epoch = self.writable(Engine::begin_epoch)?;
        tracing::info!(%name, %epoch, "leading");
        self.leader = Some(Leader { name, epoch });
        Ok(epoch)
    }

    fn reopen(&mut self) -> Result<Revision, StoreError> {
        self.leader = None;
        match self.engine.reopen() {
            Ok(()) => {
                let revision = self.engine.revision();
                self.read_only = None;
                self.feed.restart(revision);
                self.health_tx.send_replace(StoreHealth::Writable);
                tracing::info!(%revision, "store is writable again");
                Ok(revision)
            }
            Err(error) => {
                let kind = match &error {
                    StoreError::Damaged { .. } => FaultKind::Damaged,
                    StoreError::Failed { reason, .. } => reason.kind,
                    _ => FaultKind::Engine,
                };
                self.fail(&Fault { reason: ReadOnlyReason { kind, detail: error.to_string() }, maybe_durable: false });
                Err(error)
            }
        }
    }

    fn seal(&mut self) {
        match self.engine.seal() {
            Ok(()) => {
                self.counters.seals.fetch_add(1, Ordering::Relaxed);
                let commits = self.counters.commits.load(Ordering::Relaxed);
                self.counters.sealed_commits.store(commits, Ordering::Relaxed);
            }
            Err(fault) => {
                self.fail(&fault);
            }
        }
    }

    fn writable<T>(&mut self, f: impl FnOnce(&mut Engine<M>) -> Result<T, Fault>) -> Result<T, StoreError> {
        if let Some(reason) = &self.read_only {
            return Err(StoreError::ReadOnly { reason: reason.clone() });
        }
        f(&mut self.engine).map_err(|fault| StoreError::ReadOnly { reason: self.fail(&fault) })
    }

    /// Turns the store read-only.
    fn fail(&mut self, fault: &Fault) -> ReadOnlyReason {
        let reason = fault.reason.clone();
        tracing::error!(%reason, "store is read-only");
        self.read_only = Some(reason.clone());
        self.health_tx.send_replace(StoreHealth::ReadOnly(reason.clone()));
        reason
    }
}

//! The ledger: what the master wants of this host, and what the host must remember, on its own disk.
//!
//! Owns the assignments with their chain and generation, and small local documents of the agent's other parts
//! ([`Ledger::put_local`]). It must not know the master's session nor the engine. No tasks; two `watch` channels:
//! [`Ledger::changed`] counts changes of the assignments, [`Ledger::state`] says whether the disk takes them. Writing
//! calls block for one fsync (about 2.5 ms here): call them from the blocking pool.
//!
//! **A full or failing disk is survived**: the change is taken into memory and the call returns the error, so the
//! host goes on as the master wants, while the session does not acknowledge what is not durable. [`Ledger::repair`]
//! writes everything anew as soon as the disk takes it.
//!
//! **A change costs its own size**, not the ledger's: it is one appended record. The file is rewritten when it is
//! larger than [`COMPACT_MIN_BYTES`] and more than twice what is live.

mod log;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use agent_core::{AssignmentChange, Head};
use agent_core::{Assignments, Mismatch};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use skein_api::Assignment;
use thiserror::Error;
use tokio::sync::watch;

use self::log::{Loaded, Log};

/// Smaller files are not worth rewriting.
pub const COMPACT_MIN_BYTES: u64 = 1024 * 1024;
/// Documents per record when the file is rewritten.
const SNAPSHOT_CHUNK: usize = 1_000;
/// Name of the file in the ledger's directory.
const FILE: &str = "ledger.log";

/// Why the ledger did not do as asked.
#[derive(Debug, Error)]
pub enum LedgerError {
    /// The file cannot be opened or read.
    #[error("failed to open the ledger {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Another agent has it open.
    #[error("failed to lock the ledger in {path}: another agent uses it")]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The disk did not take a change; memory has it.
    #[error("failed to write the ledger {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Cause: often "no space left on device".
        #[source]
        source: io::Error,
    },
    /// A change does not build on what is here: ask the master for everything.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

/// Whether the disk holds what memory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LedgerState {
    /// It does.
    #[default]
    Durable,
    /// The disk refuses; memory goes on.
    Failing {
        /// What it says, with its cause.
        error: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
enum Record {
    Assign(AssignmentChange),
    Local { puts: BTreeMap<String, Option<Value>> },
}

/// The ledger. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Ledger {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    state: watch::Sender<LedgerState>,
    confirmed: watch::Sender<bool>,
    /// Held for as long as the ledger is open: one agent per directory.
    _lock: fs::File,
}

struct Inner {
    log: Log,
    assignments: Assignments,
    /// Full sets that were taken since it was opened.
    full_sets: u64,
    locals: BTreeMap<String, Value>,
    /// Size of the file after it was last written anew.
    live_bytes: u64,
    damage: Option<String>,
}

impl Ledger {
    /// Opens the ledger in `dir`, which is made if it is absent (mode 0700).
    ///
    /// What a crash tore is cut off. A damaged file is set aside, what is good of it is kept, and the head is empty, so
    /// that the master sends everything; [`Ledger::damage`] tells. When the disk does not take the mended file, or that of
    /// an earlier format anew, memory goes on as after any failed write. Waits up to two seconds for another agent to end.
    pub fn open(dir: &Path) -> Result<Self, LedgerError> {
        let path = dir.join(FILE);
        let open_error = |source| LedgerError::Open { path: path.clone(), source };
        make_dir(dir).map_err(open_error)?;
        let lock = fs::OpenOptions::new().create(true).append(true).open(dir.join("lock")).map_err(open_error)?;
        if !skein_daemon::lock_soon(&lock).map_err(open_error)? {
            return Err(LedgerError::Locked { path: dir.to_owned() });
        }
        let Loaded { log, records, damage, refused } = Log::open(&path).map_err(open_error)?;
        let Replayed { assignments, locals, damage } = replay_all(&records, damage);
        let live_bytes = log.len();
        let state = refused.map_or(LedgerState::Durable, |error| failing(&log, &error));
        let inner = Inner { log, assignments, full_sets: 0, locals, live_bytes, damage };
        Ok(Self {
            shared: Arc::new(Shared {
                inner: Mutex::new(inner),
                changed: watch::Sender::new(0),
                state: watch::Sender::new(state),
                confirmed: watch::Sender::new(false),
                _lock: lock,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change of `Inner` is complete before anything can panic.
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it stands: for `Hello`.
    pub fn head(&self) -> Head {
        self.lock().assignments.head().clone()
    }

    /// All assignments by key.
    pub fn assignments(&self) -> Arc<BTreeMap<String, Assignment>> {
        self.lock().assignments.documents().clone()
    }

    /// All assignments by key, with how often everything was taken since this ledger was opened. A full set means that
    /// the master may not know what this host last said: another term of office, a restored backup.
    pub fn assignments_and_full_sets(&self) -> (Arc<BTreeMap<String, Assignment>>, u64) {
        let inner = self.lock();
        (inner.assignments.documents().clone(), inner.full_sets)
    }

    /// What was wrong with the file when it was opened.
    pub fn damage(&self) -> Option<String> {
        self.lock().damage.clone()
    }

    /// Counts changes of the assignments and of the confirmation.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Whether the disk takes what it is given.
    pub fn state(&self) -> watch::Receiver<LedgerState> {
        self.shared.state.subscribe()
    }

    /// A master said, since this agent started, that the assignments are complete. Until then nothing on the host is
    /// removed for being unknown. [`Ledger::apply`] does this by itself; call it when the master's first answer says
    /// that the head of `Hello` is current.
    pub fn confirm(&self) {
        if self.shared.confirmed.send_if_modified(|c| !std::mem::replace(c, true)) {
            self.shared.changed.send_modify(|n| *n += 1);
        }
    }

    /// Whether a master confirmed the assignments.
    pub fn is_confirmed(&self) -> bool {
        *self.shared.confirmed.borrow()
    }

    /// Takes a change of assignments in, durably. Blocks for one fsync.
    ///
    /// The same generation of the same chain again is accepted and changes nothing. On [`LedgerError::Write`] memory
    /// has the change and the disk has not: do not acknowledge it. On the other errors nothing changed.
    pub fn apply(&self, change: AssignmentChange) -> Result<(), LedgerError> {
        let full = change.full;
        let mut inner = self.lock();
        if !inner.assignments.check(&change)? {
            drop(inner);
            self.confirm();
            return Ok(());
        }
        let record = Record::Assign(change);
        let bytes = if full { Vec::new() } else { serde_json::to_vec(&record).expect("assignments are plain data") };
        let Record::Assign(change) = record else { unreachable!("made above") };
        inner.assignments.apply(change);
        inner.full_sets += u64::from(full);
        // A full set is everything anyway, and leaves everything before it dead.
        let written = if full { self.compact(&mut inner) } else { self.write(&mut inner, &bytes) };
        drop(inner);
        self.shared.changed.send_modify(|n| *n += 1);
        self.confirm();
        written
    }

    /// Forgets every assignment and every local document (`leave`). Blocks for one fsync.
    pub fn clear(&self) -> Result<(), LedgerError> {
        let mut inner = self.lock();
        inner.assignments = Assignments::default();
        inner.locals.clear();
        let written = self.compact(&mut inner);
        drop(inner);
        self.shared.changed.send_modify(|n| *n += 1);
        written
    }

    /// Puts (or with `None` removes) one local document. Keys are `<part>/<id>`. Blocks for one fsync.
    pub fn put_local(&self, key: &str, value: Option<Value>) -> Result<(), LedgerError> {
        self.put_locals(BTreeMap::from([(key.to_owned(), value)]))
    }

    /// Puts and removes local documents together: all or none survive a crash. Blocks for one fsync.
    pub fn put_locals(&self, puts: BTreeMap<String, Option<Value>>) -> Result<(), LedgerError> {
        if puts.is_empty() {
            return Ok(());
        }
        let mut inner = self.lock();
        put_all(&mut inner.locals, &puts);
        let bytes = serde_json::to_vec(&Record::Local { puts }).expect("JSON values are plain data");
        self.write(&mut inner, &bytes)
    }

    /// One local document.
    pub fn local(&self, key: &str) -> Option<Value> {
        self.lock().locals.get(key).cloned()
    }

    /// Local documents whose key begins with `prefix`.
    pub fn locals(&self, prefix: &str) -> BTreeMap<String, Value> {
        let inner = self.lock();
        let from = inner.locals.range(prefix.to_owned()..);
        from.take_while(|(key, _)| key.starts_with(prefix)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Brings the disk up to memory after a failure; nothing to do otherwise. Call it from time to time.
    pub fn repair(&self) -> Result<(), LedgerError> {
        let mut inner = self.lock();
        if inner.log.is_broken() { self.compact(&mut inner) } else { Ok(()) }
    }

    fn write(&self, inner: &mut Inner, bytes: &[u8]) -> Result<(), LedgerError> {
        let dead = inner.log.len() > COMPACT_MIN_BYTES.max(2 * inner.live_bytes);
        if dead || inner.log.is_broken() {
            return self.compact(inner);
        }
        let written = inner.log.append(bytes);
        self.said(inner, written)
    }

    /// Writes everything that memory has into a new file.
    fn compact(&self, inner: &mut Inner) -> Result<(), LedgerError> {
        let mut payloads = Vec::new();
        let mut push = |record: &Record| payloads.push(serde_json::to_vec(record).expect("plain data"));
        // The head comes last: it is right only when everything before it is there.
        let documents: Vec<&Assignment> = inner.assignments.documents().values().collect();
        push(&Record::Assign(AssignmentChange { full: true, ..Default::default() }));
        for chunk in documents.chunks(SNAPSHOT_CHUNK) {
            let upserts = chunk.iter().map(|a| (*a).clone()).collect();
            push(&Record::Assign(AssignmentChange { upserts, ..Default::default() }));
        }
        let locals: Vec<(&String, &Value)> = inner.locals.iter().collect();
        for chunk in locals.chunks(SNAPSHOT_CHUNK) {
            let puts = chunk.iter().map(|(k, v)| ((*k).clone(), Some((*v).clone()))).collect();
            push(&Record::Local { puts });
        }
        let Head { chain, generation } = inner.assignments.head().clone();
        push(&Record::Assign(AssignmentChange { chain, generation, ..Default::default() }));
        let written = Log::rewrite(inner.log.path(), payloads.iter().map(Vec::as_slice)).map(|log| {
            inner.live_bytes = log.len();
            inner.log = log;
        });
        self.said(inner, written)
    }

    fn said(&self, inner: &Inner, written: io::Result<()>) -> Result<(), LedgerError> {
        let state = match &written {
            Ok(()) => LedgerState::Durable,
            Err(error) => failing(&inner.log, error),
        };
        self.shared.state.send_if_modified(|s| {
            let new = *s != state;
            if new {
                match &state {
                    LedgerState::Durable => tracing::info!("ledger is durable again"),
                    LedgerState::Failing { error } => tracing::error!(error, "ledger cannot be written"),
                }
                *s = state;
            }
            new
        });
        written.map_err(|source| LedgerError::Write { path: inner.log.path().to_owned(), source })
    }
}

fn failing(log: &Log, error: &io::Error) -> LedgerState {
    LedgerState::Failing { error: format!("{}: {error}", log.path().display()) }
}

/// What the records of a file come to.
#[derive(Default)]
struct Replayed {
    assignments: Assignments,
    locals: BTreeMap<String, Value>,
    damage: Option<String>,
}

fn replay_all(records: &[Vec<u8>], damage: Option<String>) -> Replayed {
    let mut all = Replayed { damage, ..Replayed::default() };
    for bytes in records {
        match serde_json::from_slice(bytes) {
            Ok(Record::Assign(change)) => all.assignments.apply(change),
            Ok(Record::Local { puts }) => put_all(&mut all.locals, &puts),
            // Its checksum is right, so another release wrote it. The master sends it again.
            Err(error) => {
                all.damage = all.damage.or_else(|| Some(format!("a record is of another release: {error}")));
            }
        }
    }
    if all.damage.is_some() {
        all.assignments.distrust();
    }
    all
}

fn put_all(locals: &mut BTreeMap<String, Value>, puts: &BTreeMap<String, Option<Value>>) {
    for (key, value) in puts {
        match value {
            Some(value) => locals.insert(key.clone(), value.clone()),
            None => locals.remove(key),
        };
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

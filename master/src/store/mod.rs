//! The store: typed objects with revisions, durable before anybody sees them.
//!
//! Owns: the [`Store`] trait (in the words of its consumer, the master's loop), the embedded implementation
//! [`EmbeddedStore`] on redb, its checksums and digests, the exclusive lock on its directory, backup and restore.
//!
//! Must not know: what an object means. A record is a kind, an id, a revision and bytes.
//!
//! Tasks and channels: one thread per open embedded store ("store-writer"), fed through one bounded channel; see
//! [`embedded`]. Watches read a bounded ring of commits; see [`watch`].
//!
//! ```text
//! loop ──txn──▶ channel ──▶ writer thread: drain ─▶ one redb write transaction ─▶ one fsync ─▶ reply to each
//!                                                                      └─▶ ring of commits ─▶ watches
//! ```

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

pub mod backup;
mod db;
pub mod embedded;
mod error;
#[cfg(test)]
mod fuzz;
pub mod medium;
mod record;
pub mod watch;

pub use backup::{BackupSummary, backup, backup_to_file, read_backup, restore, restore_medium};
pub use embedded::{EmbeddedStore, StoreStats};
pub use error::{Damage, FaultKind, InvalidTxn, ReadOnlyReason, StoreError};
pub use watch::{Watch, WatchError};

/// Longest kind in bytes. Kinds are names from our own source (`node`, `service`); 64 is generous.
pub const KIND_BYTES_MAX: usize = 64;
/// Longest id in bytes. Docker-style ids have 64 and names up to 255; four times that leaves room for composed ids.
pub const ID_BYTES_MAX: usize = 1024;
/// Largest value in bytes. The largest user object is a secret or config (500 KiB in Docker's swarm mode); etcd's default
/// limit for a request is 1.5 MiB, so one record still fits there.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most guards plus operations in one transaction. The largest change of the master is a batch of placements; bigger
/// batches are cut by the caller, so that one transaction never delays the others by more than a few ten milliseconds.
pub const TXN_STEPS_MAX: usize = 16_384;
/// Most bytes (keys and values) in one transaction: 16,384 small objects of 1 KiB, or 16 of the largest.
pub const TXN_BYTES_MAX: usize = 16 << 20;

/// A position in the store: the number of the last transaction that changed something. 0 is the empty store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A master's term of office; grows with each new lead, over restarts too. 0 is nobody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one record.
///
/// `kind` has 1 to [`KIND_BYTES_MAX`] bytes of `a-z`, `0-9`, `-`, `_`, `.`; `id` has 1 to [`ID_BYTES_MAX`] bytes without
/// control characters. Checked by [`Txn::check`], which every store calls first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The type of the object, such as `service`.
    pub kind: String,
    /// The object's id within its kind.
    pub id: String,
}

impl Key {
    /// A key of the given kind and id; validity is checked when it is used.
    pub fn new(kind: impl Into<String>, id: impl Into<String>) -> Self {
        Self { kind: kind.into(), id: id.into() }
    }

    fn is_valid(&self) -> bool {
        let kind_char = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
        (1..=KIND_BYTES_MAX).contains(&self.kind.len())
            && self.kind.bytes().all(kind_char)
            && (1..=ID_BYTES_MAX).contains(&self.id.len())
            && !self.id.chars().any(char::is_control)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.id)
    }
}

/// A condition on a record that must hold for a transaction to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The record was last written by exactly this revision.
    RevisionIs {
        /// Which record.
        key: Key,
        /// The revision that the caller has seen.
        revision: Revision,
    },
    /// There is no such record.
    Absent {
        /// Which record.
        key: Key,
    },
}

impl Guard {
    /// The record that the guard is about.
    pub fn key(&self) -> &Key {
        match self {
            Self::RevisionIs { key, .. } | Self::Absent { key } => key,
        }
    }
}

/// One change of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes the record, whether it exists or not.
    Put {
        /// Which record.
        key: Key,
        /// At most [`VALUE_BYTES_MAX`] bytes.
        value: Bytes,
    },
    /// Removes the record; no error and no change when it does not exist.
    Delete {
        /// Which record.
        key: Key,
    },
}

impl Op {
    /// The record that the operation changes.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// A transaction: all of its operations become durable together, or none does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Txn {
    /// The writer's term. It is a field rather than a guard so that no write can forget it.
    pub epoch: Epoch,
    /// All of them must hold, on the state before the first operation.
    pub guards: Vec<Guard>,
    /// Each key at most once. May be empty: then the transaction only asks whether its guards hold.
    pub ops: Vec<Op>,
}

impl Txn {
    /// Refuses what no store could keep: bad keys, values over their limit, a key changed twice.
    pub fn check(&self) -> Result<(), InvalidTxn> {
        let steps = self.guards.len() + self.ops.len();
        if steps > TXN_STEPS_MAX {
            return Err(InvalidTxn::TooManySteps { steps });
        }
        let mut keys = self.guards.iter().map(Guard::key).chain(self.ops.iter().map(Op::key));
        if let Some(key) = keys.find(|key| !key.is_valid()) {
            return Err(InvalidTxn::BadKey { key: key.clone() });
        }
        let mut changed = std::collections::BTreeSet::new();
        for op in &self.ops {
            if !changed.insert(op.key()) {
                return Err(InvalidTxn::ChangedTwice { key: op.key().clone() });
            }
            if let Op::Put { key, value } = op
                && value.len() > VALUE_BYTES_MAX
            {
                return Err(InvalidTxn::ValueTooLarge { key: key.clone(), value_bytes: value.len() });
            }
        }
        let txn_bytes = self.bytes();
        if txn_bytes > TXN_BYTES_MAX {
            return Err(InvalidTxn::TooLarge { txn_bytes });
        }
        Ok(())
    }

    /// Bytes of keys and values, which queues are bounded by.
    pub fn bytes(&self) -> usize {
        let key_bytes = |key: &Key| key.kind.len() + key.id.len();
        let guards: usize = self.guards.iter().map(|guard| key_bytes(guard.key())).sum();
        let ops: usize = self
            .ops
            .iter()
            .map(|op| {
                key_bytes(op.key())
                    + match op {
                        Op::Put { value, .. } => value.len(),
                        Op::Delete { .. } => 0,
                    }
            })
            .sum();
        guards + ops
    }
}

/// What became of a transaction.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Durable. The revision is the transaction's own, or the store's present one when nothing changed.
    Committed(Revision),
    /// Nothing was applied, because this did not hold.
    Conflict(Conflict),
    /// It may be durable or not. The caller must reload (for the embedded store: [`Store::reopen`], then
    /// [`Store::snapshot`]) before it decides anything that depends on it.
    Unknown,
}

/// Why a transaction was not applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// The writer's term is over.
    Epoch {
        /// The term of the present leader, or of the last one.
        current: Epoch,
    },
    /// A guard did not hold.
    Record {
        /// The record that the guard is about.
        key: Key,
        /// The record's revision; `None` when there is no such record.
        found: Option<Revision>,
    },
}

/// One record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub key: Key,
    /// The transaction that wrote it last.
    pub revision: Revision,
    /// Its bytes.
    pub value: Bytes,
}

/// All records at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The revision that the records are the state of; the one to give to [`Store::watch`].
    pub revision: Revision,
    /// The last term that was given out.
    pub epoch: Epoch,
    /// Ordered by kind, then id.
    pub records: Vec<Record>,
}

/// One committed transaction, as a watch reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Its revision; those of a watch grow by exactly one in the embedded store, and strictly in every store.
    pub revision: Revision,
    /// Its operations, without deletes that found nothing.
    pub ops: Vec<Op>,
}

/// Whether the store takes writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreHealth {
    /// It does.
    Writable,
    /// It does not, until [`Store::reopen`] succeeds.
    ReadOnly(ReadOnlyReason),
    /// It has been closed, or its writer is gone.
    Closed,
}

/// Where the master's objects are durable.
///
/// All methods may be called from many tasks. Transactions that one task sends one after the other, awaiting each, are
/// applied in that order; concurrent ones in any order, each of them whole. Dropping a future does not take back a
/// request that was sent.
pub trait Store: Send + Sync + 'static {
    /// Applies `txn` if its epoch is the present leader's and all guards hold; returns once it is durable.
    ///
    /// # Errors
    /// [`StoreError::Invalid`], [`StoreError::ReadOnly`] (surely not applied), [`StoreError::Closed`] (surely not applied).
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>>;

    /// All records, consistent at one revision.
    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, StoreError>>;

    /// Commits after revision `from`, without gaps. A reader that falls too far behind is told to take a new snapshot
    /// ([`WatchError::Lagged`]), as is one that asks for a revision that is no longer kept.
    fn watch(&self, from: Revision) -> Watch;

    /// Takes the lead under `name`, for as long as the store is told about life at least every `ttl`, and returns the new
    /// term. The embedded store's lead lasts until [`Store::resign`], [`Store::reopen`] or the end of the process, whatever
    /// `ttl` is: nobody else can have its file.
    ///
    /// # Errors
    /// [`StoreError::LeadHeld`] while somebody leads.
    fn lead(&self, name: &str, ttl: Duration) -> BoxFuture<'_, Result<Epoch, StoreError>>;

    /// Gives the lead up; does nothing when `epoch` is not the present term. Later writes with `epoch` conflict.
    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Opens the store again after a failure, verifies everything, and returns the revision that was found. Ends the lead.
    /// Allowed on a healthy store too.
    ///
    /// # Errors
    /// What opening may return; the store is then read-only, and this may be called again.
    fn reopen(&self) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// The present health, and its changes.
    fn health(&self) -> tokio::sync::watch::Receiver<StoreHealth>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn txn(guards: Vec<Guard>, ops: Vec<Op>) -> Txn {
        Txn { epoch: Epoch(1), guards, ops }
    }

    fn put(kind: &str, id: &str, value_bytes: usize) -> Op {
        Op::Put { key: Key::new(kind, id), value: vec![0; value_bytes].into() }
    }

    #[test]
    fn keys() {
        let check = |kind: &str, id: &str, ok: bool| {
            assert_eq!(txn(vec![], vec![put(kind, id, 1)]).check().is_ok(), ok, "{kind:?} {id:?}");
            let guard = Guard::Absent { key: Key::new(kind, id) };
            assert_eq!(txn(vec![guard], vec![]).check().is_ok(), ok, "{kind:?} {id:?}");
        };
        check("node", "a", true);
        check("node-2_x.y", "a/b c ü", true);
        check("", "a", false);
        check("node", "", false);
        check("Node", "a", false);
        check("no/de", "a", false);
        check("no\0de", "a", false);
        check("node", "a\0", false);
        check("node", "a\n", false);
        check(&"k".repeat(KIND_BYTES_MAX), &"i".repeat(ID_BYTES_MAX), true);
        check(&"k".repeat(KIND_BYTES_MAX + 1), "a", false);
        check("node", &"i".repeat(ID_BYTES_MAX + 1), false);
    }

    #[test]
    fn limits() {
        assert!(txn(vec![], vec![put("k", "a", VALUE_BYTES_MAX)]).check().is_ok());
        let error = txn(vec![], vec![put("k", "a", VALUE_BYTES_MAX + 1)]).check().unwrap_err();
        assert!(matches!(error, InvalidTxn::ValueTooLarge { value_bytes, .. } if value_bytes == VALUE_BYTES_MAX + 1));

        let many = (0..=TXN_STEPS_MAX).map(|i| put("k", &i.to_string(), 1)).collect();
        assert!(matches!(txn(vec![], many).check(), Err(InvalidTxn::TooManySteps { .. })));

        let large = (0..=16).map(|i| put("k", &i.to_string(), VALUE_BYTES_MAX)).collect();
        assert!(matches!(txn(vec![], large).check(), Err(InvalidTxn::TooLarge { .. })));

        let twice = vec![put("k", "a", 1), Op::Delete { key: Key::new("k", "a") }];
        assert!(matches!(txn(vec![], twice).check(), Err(InvalidTxn::ChangedTwice { .. })));
    }
}

//! What can go wrong with a store, in words for the person who has to repair it.
//!
//! Owns: the error types, their stable codes and hints. Must not know: how a failure is found.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::{Epoch, KIND_BYTES_MAX, Key, Revision, TXN_BYTES_MAX, TXN_STEPS_MAX, VALUE_BYTES_MAX};

/// A store operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has this store open.
    #[error("failed to lock the store in {}: {} has it open; nothing was changed", path.display(), holder(*pid))]
    InUse {
        /// The store's directory.
        path: PathBuf,
        /// The process that has it, when it could be read.
        pid: Option<u32>,
    },
    /// A newer build wrote this store.
    #[error(
        "failed to open the store {place}: it has format {found}, this build ({this_build}) reads up to format {supported}; \
         it was written by version {written_by}; no record was changed"
    )]
    FormatTooNew {
        /// The store's file.
        place: String,
        /// The format number in the file.
        found: u32,
        /// The newest format this build reads.
        supported: u32,
        /// The build that wrote the format number.
        written_by: String,
        /// This build.
        this_build: &'static str,
    },
    /// What was read is not what was written.
    #[error("failed to load the store {place}: {damage}; no record was changed")]
    Damaged {
        /// The store's or the backup's file.
        place: String,
        /// What is wrong.
        damage: Damage,
    },
    /// The store takes no writes since an earlier failure. The transaction that gets this was not applied.
    #[error("failed to write to the store: it is read-only since: {reason}")]
    ReadOnly {
        /// The failure that did it.
        reason: ReadOnlyReason,
    },
    /// The store's engine failed to open or read.
    #[error("failed to open the store {place}: {reason}")]
    Failed {
        /// The store's file.
        place: String,
        /// The failure.
        reason: ReadOnlyReason,
    },
    /// Somebody leads already.
    #[error("failed to take the lead: {holder} leads with epoch {epoch}")]
    LeadHeld {
        /// The leader's name.
        holder: String,
        /// Its term.
        epoch: Epoch,
    },
    /// The transaction breaks a limit; nothing was changed.
    #[error("failed to accept the transaction")]
    Invalid(#[from] InvalidTxn),
    /// There is a store where none may be.
    #[error("failed to restore into {}: there is a store already; nothing was changed", path.display())]
    Exists {
        /// The store's file.
        path: PathBuf,
    },
    /// A backup cannot be read as one.
    #[error("failed to read the backup: line {line}: {problem}; nothing was changed")]
    BadBackup {
        /// Counted from 1.
        line: u64,
        /// What is wrong with the line.
        problem: String,
    },
    /// A file operation around the store failed.
    #[error("failed to {verb} {}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The store was closed.
    #[error("failed to reach the store: it is closed")]
    Closed,
}

impl StoreError {
    /// A stable name for programs and documentation.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "store-in-use",
            Self::FormatTooNew { .. } => "store-format-too-new",
            Self::Damaged { .. } => "store-damaged",
            Self::ReadOnly { .. } => "store-read-only",
            Self::Failed { .. } => "store-failed",
            Self::LeadHeld { .. } => "store-lead-held",
            Self::Invalid(_) => "store-invalid-txn",
            Self::Exists { .. } => "store-exists",
            Self::BadBackup { .. } => "store-bad-backup",
            Self::Io { .. } => "store-io",
            Self::Closed => "store-closed",
        }
    }

    /// What to do about it, for the `hint:` line of an error message.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::InUse { path, pid: Some(pid) } => {
                format!(
                    "see who it is with `ps -p {pid}`, or give this master another directory than {}",
                    path.display()
                )
            }
            Self::InUse { path, pid: None } => {
                format!(
                    "find the process with `fuser {}/store.lock`, or give this master another directory",
                    path.display()
                )
            }
            Self::FormatTooNew { written_by, .. } => format!("use skein-master {written_by} or a newer one"),
            Self::Damaged { .. } => {
                "keep the damaged directory for examination and restore the last backup into an empty one: \
                 `skein-master restore BACKUP --data-dir NEW_DIR`"
                    .to_owned()
            }
            Self::ReadOnly { reason } | Self::Failed { reason, .. } if reason.kind == FaultKind::DiskFull => {
                "make room on the disk; the master reopens the store by itself".to_owned()
            }
            Self::Exists { path } => format!("restore into an empty directory, or move {} away first", path.display()),
            Self::BadBackup { .. } => {
                "use another backup; every backup is verified as a whole before it is used".to_owned()
            }
            _ => return None,
        };
        Some(hint)
    }
}

fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

/// How a store turned out to be other than it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// This record does not match its own checksum.
    Record {
        /// `kind/id`, or the raw bytes in hexadecimal when they are not a key.
        key: String,
    },
    /// Records are missing or were not written by the last transaction.
    Set {
        /// How many records there must be.
        count_expected: u64,
        /// How many there are.
        count_found: u64,
    },
    /// The store's own head record is missing or does not match its checksum.
    Head {
        /// Which one.
        name: &'static str,
    },
    /// The database file does not hold together.
    File {
        /// The engine's words.
        detail: String,
    },
    /// The store is older than what it has already acknowledged to this process.
    WentBack {
        /// The last revision acknowledged.
        acknowledged: Revision,
        /// The revision found.
        found: Revision,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record { key } => {
                write!(f, "record {key} is damaged: its checksum does not match")
            }
            Self::Set { count_expected, count_found } if count_expected != count_found => {
                write!(f, "records are missing or foreign: {count_found} found, {count_expected} expected")
            }
            Self::Set { count_found, .. } => {
                write!(f, "the set of {count_found} records does not match its digest")
            }
            Self::Head { name } => write!(f, "its head record `{name}` is missing or damaged"),
            Self::File { detail } => write!(f, "its file is damaged ({detail})"),
            Self::WentBack { acknowledged, found } => {
                write!(f, "it is at revision {found}, but revision {acknowledged} was acknowledged")
            }
        }
    }
}

/// Why a transaction is not accepted. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTxn {
    /// A key does not have the form of [`Key`].
    #[error("bad key {key:?}: a kind has 1 to {KIND_BYTES_MAX} bytes of a-z 0-9 - _ . and an id no control characters")]
    BadKey {
        /// The key.
        key: Key,
    },
    /// Two operations on one key have no order that every store would keep.
    #[error("key {key} is changed twice")]
    ChangedTwice {
        /// The key.
        key: Key,
    },
    /// A value over [`VALUE_BYTES_MAX`].
    #[error("the value of {key} has {value_bytes} bytes, more than {VALUE_BYTES_MAX}")]
    ValueTooLarge {
        /// The key.
        key: Key,
        /// The value's size.
        value_bytes: usize,
    },
    /// More guards and operations than [`TXN_STEPS_MAX`].
    #[error("{steps} guards and operations, more than {TXN_STEPS_MAX}")]
    TooManySteps {
        /// Their number.
        steps: usize,
    },
    /// More bytes than [`TXN_BYTES_MAX`].
    #[error("{txn_bytes} bytes, more than {TXN_BYTES_MAX}")]
    TooLarge {
        /// Their number.
        txn_bytes: usize,
    },
}

/// The kind of failure that made a store read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No space left on the device, or a quota.
    DiskFull,
    /// Any other failed read, write or sync.
    Io,
    /// A record or page that is read differs from what was written.
    Damaged,
    /// The database engine panicked or reported a broken invariant.
    Engine,
}

/// Why a store takes no writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOnlyReason {
    /// The kind, for decisions.
    pub kind: FaultKind,
    /// The engine's or the kernel's words, for people.
    pub detail: String,
}

impl fmt::Display for ReadOnlyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FaultKind::DiskFull => write!(f, "the disk is full ({})", self.detail),
            FaultKind::Io => write!(f, "input or output failed ({})", self.detail),
            FaultKind::Damaged => write!(f, "damage was found ({})", self.detail),
            FaultKind::Engine => write!(f, "the database engine failed ({})", self.detail),
        }
    }
}

//! What a failure of redb means: its errors, its panics, and which of them leave a commit in doubt.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::super::{Damage, FaultKind, ReadOnlyReason, record};

/// A failure of the database, after which it is not used until it is opened again.
#[derive(Clone, Debug)]
pub(in super::super) struct Fault {
    pub(in super::super) reason: ReadOnlyReason,
    /// Whether the transaction may be durable all the same.
    pub(in super::super) maybe_durable: bool,
}

pub(super) fn guarded<T>(f: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(panic_fault(panic.as_ref())))
}

pub(super) fn panic_fault(panic: &(dyn std::any::Any + Send)) -> Fault {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Fault { reason: engine_reason(&format!("it panicked: {}", text.unwrap_or("no text"))), maybe_durable: false }
}

pub(super) fn engine_reason(detail: &str) -> ReadOnlyReason {
    ReadOnlyReason { kind: FaultKind::Engine, detail: detail.to_owned() }
}

pub(super) fn io_reason(error: &std::io::Error) -> ReadOnlyReason {
    use std::io::ErrorKind;
    let kind = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FaultKind::DiskFull,
        // redb's word for "not one of my files", and what a file gives that is shorter than it was.
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => FaultKind::Damaged,
        _ => FaultKind::Io,
    };
    ReadOnlyReason { kind, detail: error.to_string() }
}

pub(super) fn fault(error: impl Into<redb::Error>) -> Fault {
    let error = error.into();
    let reason = match &error {
        redb::Error::Io(error) => io_reason(error),
        redb::Error::Corrupted(detail) => ReadOnlyReason { kind: FaultKind::Damaged, detail: detail.clone() },
        redb::Error::PreviousIo | redb::Error::Backend(_) => {
            ReadOnlyReason { kind: FaultKind::Io, detail: error.to_string() }
        }
        _ => engine_reason(&error.to_string()),
    };
    Fault { reason, maybe_durable: false }
}

pub(super) fn damaged(damage: &Damage) -> Fault {
    Fault { reason: ReadOnlyReason { kind: FaultKind::Damaged, detail: damage.to_string() }, maybe_durable: false }
}

pub(super) fn damaged_record(key: &[u8]) -> Fault {
    damaged(&Damage::Record { key: record::describe_key(key) })
}

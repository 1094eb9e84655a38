//! The embedded store's synchronous part: redb, verified.
//!
//! Owns: the two tables, group transactions, the head; [`mod@load`] opens and verifies, [`mod@fault`] names failures.
//! Must not know: threads, channels. Everything here runs on the writer thread.
//!
//! Tables: `meta` holds the format mark and the [`Head`]; `records` holds every record under its encoded key. The head is
//! written in the same redb transaction as the records it counts.
//!
//! What redb does and does not do, as read in redb 4.6 and seen in the durability tests:
//! - A page that is read is not verified; only `check_integrity` and the repair after a crash verify pages. So the store is
//!   always opened with the integrity check (it reads all records anyway), and every record carries our checksum.
//! - With one fsync per commit, a commit that does not verify at open is taken for a torn one, and redb falls back to the
//!   commit before, silently. After a crash that is right; after damage it would lose the last transaction. The way out is
//!   [`Engine::seal`]: a commit of the head alone, made as soon as the store is idle and when it is closed. Then both
//!   commits in the file hold the same records, and falling back to either is harmless. (A two-phase commit would also do
//!   it, for a second fsync on every group. The window left is damage to the very last group, before any idle moment, in a store that
//!   then crashed: 42 of 300 flipped bits there took the last transaction away. After the seal, none of 866 changed a
//!   record unseen.)
//! - Debug builds panic on damage where release builds return an error; both are caught here.

mod fault;
mod load;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::medium::Medium;
use super::record::{self, Head};
use super::{Commit, Conflict, Damage, Epoch, Guard, Op, Revision, Snapshot, StoreError, Txn, TxnOutcome};

pub(super) use fault::Fault;
use fault::{damaged, damaged_record, engine_reason, fault, guarded, panic_fault};
pub(super) use load::create;
use load::{existing, failed, load};

const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const RECORDS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("records");
const META_FORMAT: &str = "format";
const META_HEAD: &str = "head";

/// What one group of transactions came to.
pub(super) struct Applied {
    /// One for each transaction, in order.
    pub(super) outcomes: Vec<TxnOutcome>,
    /// Those that changed something.
    pub(super) commits: Vec<Commit>,
}

/// An open store.
pub(super) struct Engine<M: Medium> {
    medium: M,
    /// `None` after a failure.
    db: Option<Database>,
    /// As of the last durable commit.
    head: Head,
    /// Whether a transaction was committed since the last seal.
    unsealed: bool,
}

impl<M: Medium> Engine<M> {
    /// Opens and verifies the store, or makes a new one when there is none.
    pub(super) fn open(mut medium: M) -> Result<Self, StoreError> {
        let backend = match existing(&mut medium)? {
            Some(backend) => backend,
            None => {
                create(&mut medium, Head { clean: true, ..Head::default() }, &[])?;
                existing(&mut medium)?.ok_or_else(|| failed(&medium, engine_reason("the new store is not there")))?
            }
        };
        let (db, head) = load(&mut medium, backend)?;
        Ok(Self { medium, db: Some(db), head, unsealed: false })
    }

    /// Opens the store again, and checks that nothing is gone that was acknowledged.
    pub(super) fn reopen(&mut self) -> Result<(), StoreError> {
        self.discard();
        let backend = existing(&mut self.medium)?
            .ok_or_else(|| failed(&self.medium, engine_reason("the store's file is gone")))?;
        let (db, head) = load(&mut self.medium, backend)?;
        let behind = head.revision < self.head.revision || head.epoch < self.head.epoch;
        let differs =
            head.revision == self.head.revision && (head.count, head.digest) != (self.head.count, self.head.digest);
        if behind || differs {
            discard(db);
            let damage =
                Damage::WentBack { acknowledged: Revision(self.head.revision), found: Revision(head.revision) };
            return Err(StoreError::Damaged { place: self.medium.place(), damage });
        }
        self.head = head;
        self.db = Some(db);
        self.unsealed = false;
        Ok(())
    }

    /// The last durable revision.
    pub(super) fn revision(&self) -> Revision {
        Revision(self.head.revision)
    }

    /// The last term given out.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.head.epoch)
    }

    /// Whether [`Engine::seal`] has something to do.
    pub(super) fn needs_seal(&self) -> bool {
        self.unsealed && self.db.is_some()
    }

    /// Applies a group in order, in one redb transaction with one fsync. `leader` is the present term, if any.
    ///
    /// After an error nothing of the group is acknowledged and the database is closed.
    pub(super) fn apply(&mut self, txns: &[&Txn], leader: Option<Epoch>) -> Result<Applied, Fault> {
        let head = self.head;
        let (applied, head) = self.with_db(|db| {
            let mut next = head;
            let mut applied = Applied { outcomes: Vec::with_capacity(txns.len()), commits: Vec::new() };
            let write = begin(db)?;
            {
                let mut table = write.open_table(RECORDS).map_err(fault)?;
                for txn in txns {
                    let outcome = apply_one(&mut table, &mut next, txn, leader, &mut applied.commits)?;
                    applied.outcomes.push(outcome);
                }
            }
            if applied.commits.is_empty() {
                write.abort().map_err(fault)?;
            } else {
                commit(write, &next)?;
            }
            Ok((applied, next))
        })?;
        self.head = head;
        self.unsealed |= !applied.commits.is_empty();
        Ok(applied)
    }

    /// Begins a new term.
    pub(super) fn begin_epoch(&mut self) -> Result<Epoch, Fault> {
        self.commit_head(Head { epoch: self.head.epoch + 1, ..self.head })?;
        Ok(self.epoch())
    }

    /// Makes both commits in the file hold the present records; see the module's text.
    pub(super) fn seal(&mut self) -> Result<(), Fault> {
        self.commit_head(Head { seals: self.head.seals + 1, ..self.head })
    }

    /// Marks the store as closed in order, and closes it.
    pub(super) fn close(mut self) -> Result<(), Fault> {
        if self.db.is_none() {
            return Ok(());
        }
        self.commit_head(Head { seals: self.head.seals + 1, clean: true, ..self.head })?;
        let Some(db) = self.db.take() else {
            return Ok(());
        };
        guarded(|| db.close().map_err(fault))
    }

    /// All records, verified.
    pub(super) fn snapshot(&mut self) -> Result<Snapshot, Fault> {
        let head = self.head;
        self.with_db(|db| {
            let mut records = Vec::new();
            let read = db.begin_read().map_err(fault)?;
            let table = read.open_table(RECORDS).map_err(fault)?;
            for entry in table.iter().map_err(fault)? {
                let (key, bytes) = entry.map_err(fault)?;
                let record = record::verify_record(key.value(), bytes.value())
                    .and_then(|verified| verified.to_record(key.value()))
                    .ok_or_else(|| damaged_record(key.value()))?;
                records.push(record);
            }
            if records.len() as u64 != head.count {
                let damage = Damage::Set { count_expected: head.count, count_found: records.len() as u64 };
                return Err(damaged(&damage));
            }
            Ok(Snapshot { revision: Revision(head.revision), epoch: Epoch(head.epoch), records })
        })
    }

    fn commit_head(&mut self, head: Head) -> Result<(), Fault> {
        self.with_db(|db| commit(begin(db)?, &head))?;
        self.head = head;
        self.unsealed = false;
        Ok(())
    }

    /// Runs `f` on the database, and closes that after any failure: its memory cannot be trusted to agree with its file.
    fn with_db<T>(&mut self, f: impl FnOnce(&Database) -> Result<T, Fault>) -> Result<T, Fault> {
        let Some(db) = &self.db else {
            return Err(Fault { reason: engine_reason("it is closed after an earlier failure"), maybe_durable: false });
        };
        let result = guarded(|| f(db));
        if result.is_err() {
            self.discard();
        }
        result
    }

    fn discard(&mut self) {
        if let Some(db) = self.db.take() {
            discard(db);
        }
    }
}

/// Drops a database whose own clean-up may fail as well.
fn discard(db: Database) {
    // The failure that led here has been reported; this one adds nothing.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
}

fn apply_one(
    table: &mut redb::Table<'_, &'static [u8], &'static [u8]>,
    head: &mut Head,
    txn: &Txn,
    leader: Option<Epoch>,
    commits: &mut Vec<Commit>,
) -> Result<TxnOutcome, Fault> {
    if leader != Some(txn.epoch) {
        return Ok(TxnOutcome::Conflict(Conflict::Epoch { current: Epoch(head.epoch) }));
    }
    for guard in &txn.guards {
        let found = read(table, &record::encode_key(guard.key()))?.map(|(revision, _)| Revision(revision));
        let wanted = match guard {
            Guard::RevisionIs { revision, .. } => Some(*revision),
            Guard::Absent { .. } => None,
        };
        if found != wanted {
            return Ok(TxnOutcome::Conflict(Conflict::Record { key: guard.key().clone(), found }));
        }
    }
    let revision = head.revision + 1;
    let mut effective = Vec::with_capacity(txn.ops.len());
    for op in &txn.ops {
        let key = record::encode_key(op.key());
        let old = read(table, &key)?;
        if let Some((_, share)) = old {
            head.count -= 1;
            head.digest = head.digest.wrapping_sub(share);
        }
        match op {
            Op::Put { value, .. } => {
                let (bytes, share) = record::encode_record(&key, revision, value);
                table.insert(key.as_slice(), bytes.as_slice()).map_err(fault)?;
                head.count += 1;
                head.digest = head.digest.wrapping_add(share);
                effective.push(op.clone());
            }
            Op::Delete { .. } if old.is_some() => {
                table.remove(key.as_slice()).map_err(fault)?;
                effective.push(op.clone());
            }
            Op::Delete { .. } => {}
        }
    }
    if !effective.is_empty() {
        head.revision = revision;
        commits.push(Commit { revision: Revision(revision), ops: effective });
    }
    Ok(TxnOutcome::Committed(Revision(head.revision)))
}

/// Revision and share of a record; verified, since redb does not.
fn read(
    table: &redb::Table<'_, &'static [u8], &'static [u8]>,
    key: &[u8],
) -> Result<Option<(u64, record::Share)>, Fault> {
    let Some(bytes) = table.get(key).map_err(fault)? else {
        return Ok(None);
    };
    match record::verify_record(key, bytes.value()) {
        Some(verified) => Ok(Some((verified.revision, verified.share))),
        None => Err(damaged_record(key)),
    }
}

fn begin(db: &Database) -> Result<WriteTransaction, Fault> {
    let mut write = db.begin_write().map_err(fault)?;
    write.set_durability(Durability::Immediate).map_err(fault)?;
    Ok(write)
}

/// Writes the head and commits. An error here is the one after which nobody knows what is on the disk.
fn commit(write: WriteTransaction, head: &Head) -> Result<(), Fault> {
    {
        let mut meta = write.open_table(META).map_err(fault)?;
        meta.insert(META_HEAD, head.encode().as_slice()).map_err(fault)?;
    }
    let result = catch_unwind(AssertUnwindSafe(|| write.commit().map_err(fault)));
    result
        .unwrap_or_else(|panic| Err(panic_fault(panic.as_ref())))
        .map_err(|fault| Fault { maybe_durable: true, ..fault })
}

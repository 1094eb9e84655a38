//! Making, opening and verifying a store's file.
//!
//! Owns: what is checked before a store is used. Must not know: transactions.

use redb::backends::InMemoryBackend;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageBackend};

use super::super::medium::Medium;
use super::super::record::{self, FORMAT, FormatMark, Head};
use super::super::{Damage, FaultKind, ReadOnlyReason, Record, StoreError};
use super::fault::{Fault, fault, guarded, io_reason};
use super::{META, META_FORMAT, META_HEAD, RECORDS, begin, commit, discard};

/// redb's page cache. The model in memory is the read path, so this only serves the pages on the way to a write: 64 MiB
/// are 16,384 pages, more than all of a store of 100,000 records of 500 bytes.
const CACHE_BYTES: usize = 64 << 20;
/// The largest damaged file that is copied into memory to name the damaged record: five times a store of 100,000 records of
/// 500 bytes. A larger one is refused just as well, without the name.
const EXAMINED_BYTES_MAX: usize = 256 << 20;

/// Makes a new store of `records` with `head`'s revision and epoch; it is there as a whole or not at all.
pub(in super::super) fn create<M: Medium>(
    medium: &mut M,
    mut head: Head,
    records: &[Record],
) -> Result<(), StoreError> {
    let backend = medium.scratch().map_err(|error| failed(medium, io_reason(&error)))?;
    let made = guarded(|| {
        let db = builder().create_with_backend(backend).map_err(fault)?;
        let write = begin(&db)?;
        {
            let mut table = write.open_table(RECORDS).map_err(fault)?;
            for record in records {
                let key = record::encode_key(&record.key);
                let (bytes, share) = record::encode_record(&key, record.revision.0, &record.value);
                table.insert(key.as_slice(), bytes.as_slice()).map_err(fault)?;
                head.count += 1;
                head.digest = head.digest.wrapping_add(share);
            }
            let mut meta = write.open_table(META).map_err(fault)?;
            meta.insert(META_FORMAT, FormatMark::current().encode().as_slice()).map_err(fault)?;
        }
        commit(write, &head)?;
        // The seal, so that the newest commit alone is never all there is.
        head.seals += 1;
        commit(begin(&db)?, &head)?;
        db.close().map_err(fault)
    });
    made.map_err(|fault| failed(medium, fault.reason))?;
    medium.publish().map_err(|error| failed(medium, io_reason(&error)))
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder.set_check_integrity_on_open(true);
    builder.set_repair_callback(|session| {
        tracing::debug!(progress = session.progress(), "verifying the store's file");
    });
    builder
}

pub(super) fn existing<M: Medium>(medium: &mut M) -> Result<Option<M::Backend>, StoreError> {
    medium.existing().map_err(|error| failed(medium, io_reason(&error)))
}

/// Opens and verifies everything; what is damaged is named as closely as it can be.
pub(super) fn load<M: Medium>(medium: &mut M, backend: M::Backend) -> Result<(Database, Head), StoreError> {
    load_verified(medium, backend).map_err(|error| match error {
        StoreError::Damaged { place, damage: Damage::File { detail } } => {
            StoreError::Damaged { place, damage: find_damaged_record(medium).unwrap_or(Damage::File { detail }) }
        }
        error => error,
    })
}

/// Which record it is that makes redb call its file damaged. Looks into a copy in memory, opened without redb's check; that
/// works when the file was closed in order, since redb insists on its check after a crash.
fn find_damaged_record<M: Medium>(medium: &mut M) -> Option<Damage> {
    let copy = copy_in_memory(&medium.existing().ok()??)?;
    let damage = guarded(|| {
        let db = Database::builder().create_with_backend(copy).map_err(fault)?;
        let read = db.begin_read().map_err(fault)?;
        for entry in read.open_table(RECORDS).map_err(fault)?.iter().map_err(fault)? {
            let (key, bytes) = entry.map_err(fault)?;
            if record::decode_key(key.value()).is_none() || record::verify_record(key.value(), bytes.value()).is_none()
            {
                return Ok(Some(Damage::Record { key: record::describe_key(key.value()) }));
            }
        }
        Ok(None)
    });
    damage.ok()?
}

fn copy_in_memory(file: &impl StorageBackend) -> Option<InMemoryBackend> {
    let file_bytes = file.len().ok()?;
    let mut bytes = vec![0; usize::try_from(file_bytes).ok().filter(|bytes| *bytes <= EXAMINED_BYTES_MAX)?];
    file.read(0, &mut bytes).ok()?;
    let copy = InMemoryBackend::new();
    copy.set_len(file_bytes).ok()?;
    copy.write(0, &bytes).ok()?;
    Some(copy)
}

/// The file's pages, the format, the head, each record, the set of records.
fn load_verified<M: Medium>(medium: &M, backend: M::Backend) -> Result<(Database, Head), StoreError> {
    let place = medium.place();
    // redb makes a new database of an empty file; a store never leaves one behind.
    match backend.len() {
        Ok(0) => {
            let damage = Damage::File { detail: "it is empty".to_owned() };
            return Err(StoreError::Damaged { place, damage });
        }
        Ok(_) => {}
        Err(error) => return Err(failed(medium, io_reason(&error))),
    }
    let db =
        guarded(|| builder().create_with_backend(backend).map_err(fault)).map_err(|fault| open_error(&place, fault))?;
    match guarded(|| Ok(verify(&db, &place))) {
        Ok(Ok(head)) => {
            // From here until the close in order, a stop is an unclean one.
            let opened = Head { clean: false, seals: head.seals + 1, ..head };
            match guarded(|| commit(begin(&db)?, &opened)) {
                Ok(()) => {
                    tracing::info!(revision = head.revision, records = head.count, clean = head.clean, "store is open");
                    Ok((db, opened))
                }
                Err(fault) => {
                    discard(db);
                    Err(StoreError::Failed { place, reason: fault.reason })
                }
            }
        }
        Ok(Err(error)) => {
            discard(db);
            Err(error)
        }
        Err(fault) => {
            discard(db);
            Err(open_error(&place, fault))
        }
    }
}

fn verify(db: &Database, place: &str) -> Result<Head, StoreError> {
    let engine = |error: redb::Error| open_error(place, fault(error));
    let damaged = |damage| StoreError::Damaged { place: place.to_owned(), damage };
    let read = db.begin_read().map_err(|error| engine(error.into()))?;
    let meta = match read.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::Storage(error)) => return Err(engine(error.into())),
        Err(_) => return Err(damaged(Damage::Head { name: "meta" })),
    };
    let mark = meta.get(META_FORMAT).map_err(|error| engine(error.into()))?;
    let mark = mark
        .and_then(|bytes| FormatMark::decode(bytes.value()))
        .ok_or_else(|| damaged(Damage::Head { name: META_FORMAT }))?;
    if mark.format > FORMAT {
        return Err(StoreError::FormatTooNew {
            place: place.to_owned(),
            found: mark.format,
            supported: FORMAT,
            written_by: mark.written_by,
            this_build: env!("CARGO_PKG_VERSION"),
        });
    }
    let head = meta.get(META_HEAD).map_err(|error| engine(error.into()))?;
    let head =
        head.and_then(|bytes| Head::decode(bytes.value())).ok_or_else(|| damaged(Damage::Head { name: META_HEAD }))?;

    let table = match read.open_table(RECORDS) {
        Ok(table) => table,
        Err(redb::TableError::Storage(error)) => return Err(engine(error.into())),
        Err(_) => return Err(damaged(Damage::Head { name: "records" })),
    };
    let (mut count, mut digest) = (0_u64, 0_u128);
    for entry in table.iter().map_err(|error| engine(error.into()))? {
        let (key, bytes) = entry.map_err(|error| engine(error.into()))?;
        let known = record::decode_key(key.value()).and_then(|_| record::verify_record(key.value(), bytes.value()));
        let Some(verified) = known else {
            return Err(damaged(Damage::Record { key: record::describe_key(key.value()) }));
        };
        count += 1;
        digest = digest.wrapping_add(verified.share);
    }
    // The table's own length is another number that no page checksum covers.
    let len = table.len().map_err(|error| engine(error.into()))?;
    if (count, digest) != (head.count, head.digest) || len != count {
        return Err(damaged(Damage::Set { count_expected: head.count, count_found: count }));
    }
    Ok(head)
}

pub(super) fn failed<M: Medium>(medium: &M, reason: ReadOnlyReason) -> StoreError {
    StoreError::Failed { place: medium.place(), reason }
}

/// What a failure means while opening: an engine that stumbles over a file that it wrote itself says that the file is damaged.
fn open_error(place: &str, fault: Fault) -> StoreError {
    let place = place.to_owned();
    match fault.reason.kind {
        FaultKind::Damaged | FaultKind::Engine => {
            StoreError::Damaged { place, damage: Damage::File { detail: fault.reason.detail } }
        }
        FaultKind::DiskFull | FaultKind::Io => StoreError::Failed { place, reason: fault.reason },
    }
}

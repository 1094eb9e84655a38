//! Backup and restore: one file of JSON lines that a person can read and that proves itself.
//!
//! Owns: the file's format. Must not know: redb.
//!
//! First line: format, revision, epoch, number of records, the build. Then one line per record, its value in base64 and with
//! a checksum of its own, so that damage is named by key. Last line: the SHA-256 of every byte before it. Text, because a
//! backup is what is left when nothing else works; a value costs a third more than in binary.
//!
//! A backup holds private keys, as the store does: keep it readable by its owner alone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use skein_daemon::hex;

use super::medium::{DirMedium, Medium};
use super::record::{self, Head};
use super::{
    Damage, Epoch, ID_BYTES_MAX, KIND_BYTES_MAX, Key, Record, Revision, Snapshot, StoreError, VALUE_BYTES_MAX,
};

/// The newest backup format that is read, and the one that is written.
const BACKUP_FORMAT: u32 = 1;
/// Longest line: a value in base64 (4/3), kind and id as JSON (at most 6 bytes for one), and 256 bytes of names and numbers.
const LINE_BYTES_MAX: usize = VALUE_BYTES_MAX.div_ceil(3) * 4 + 6 * (KIND_BYTES_MAX + ID_BYTES_MAX) + 256;
/// How far a restored store's epoch lies beyond the backup's: epochs must grow over a restore too, so that a write of a
/// term since the backup is never taken for one of the present. Those terms are lost, but hardly a million.
const RESTORE_EPOCH_STEP: u64 = 1_000_000;

/// The last epoch that a backup may have: one beyond it leaves no room for the step.
const EPOCH_MAX: u64 = u64::MAX - RESTORE_EPOCH_STEP;

/// What is in a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupSummary {
    /// The store's revision at the backup.
    pub revision: Revision,
    /// Number of records.
    pub records: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    skein_backup: u32,
    revision: u64,
    epoch: u64,
    records: u64,
    written_by: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    kind: String,
    id: String,
    revision: u64,
    value: String,
    sum: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Trailer {
    sha256: String,
}

/// Writes `snapshot` as a backup. The caller makes `writer` durable.
///
/// # Errors
/// [`StoreError::Io`] when `writer` fails.
pub fn backup(snapshot: &Snapshot, writer: impl Write) -> Result<BackupSummary, StoreError> {
    write_all(snapshot, writer).map_err(|source| StoreError::Io {
        verb: "write",
        path: "the backup".into(),
        source,
    })?;
    Ok(BackupSummary { revision: snapshot.revision, records: snapshot.records.len() as u64 })
}

/// Writes `snapshot` into a new file (mode 0600) and makes it durable. What is there already is not touched; a file that
/// could not be finished is removed.
///
/// # Errors
/// [`StoreError::Io`], also when `path` exists.
pub fn backup_to_file(snapshot: &Snapshot, path: &Path) -> Result<BackupSummary, StoreError> {
    let io_error = |verb| move |source| StoreError::Io { verb, path: path.to_owned(), source };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io_error("create"))?;
    let written = write_all(snapshot, &file).and_then(|()| file.sync_all()).and_then(|()| {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir)?.sync_all()
    });
    if let Err(source) = written {
        // The first error is the one to report.
        let _ = fs::remove_file(path);
        return Err(io_error("write")(source));
    }
    Ok(BackupSummary { revision: snapshot.revision, records: snapshot.records.len() as u64 })
}

fn write_all(snapshot: &Snapshot, writer: impl Write) -> io::Result<()> {
    let mut out = Hashed { inner: BufWriter::new(writer), context: Context::new(&SHA256) };
    out.line(&Header {
        skein_backup: BACKUP_FORMAT,
        revision: snapshot.revision.0,
        epoch: snapshot.epoch.0,
        records: snapshot.records.len() as u64,
        written_by: env!("CARGO_PKG_VERSION").to_owned(),
    })?;
    for Record { key, revision, value } in &snapshot.records {
        out.line(&Line {
            kind: key.kind.clone(),
            id: key.id.clone(),
            revision: revision.0,
            value: BASE64.encode(value),
            sum: sum(key, revision.0, value),
        })?;
    }
    let sha256 = hex(out.context.clone().finish().as_ref());
    out.line(&Trailer { sha256 })?;
    out.inner.flush()
}

struct Hashed<W: Write> {
    inner: BufWriter<W>,
    context: Context,
}

impl<W: Write> Hashed<W> {
    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.context.update(&line);
        self.inner.write_all(&line)
    }
}

/// The record's checksum in the store, in hexadecimal.
pub(super) fn sum(key: &Key, revision: u64, value: &[u8]) -> String {
    let (bytes, _) = record::encode_record(&record::encode_key(key), revision, value);
    hex(&bytes[..8])
}

/// Reads and verifies a whole backup.
///
/// # Errors
/// [`StoreError::BadBackup`] with the line, [`StoreError::Damaged`] with the record's key, [`StoreError::FormatTooNew`],
/// [`StoreError::Io`].
pub fn read_backup(reader: impl Read) -> Result<Snapshot, StoreError> {
    let mut lines = Lines { reader: BufReader::new(reader), line: 0, context: Context::new(&SHA256) };
    let header: Header = lines.parse("not the first line of a backup")?;
    if header.skein_backup > BACKUP_FORMAT {
        return Err(StoreError::FormatTooNew {
            place: "backup".to_owned(),
            found: header.skein_backup,
            supported: BACKUP_FORMAT,
            written_by: header.written_by,
            this_build: env!("CARGO_PKG_VERSION"),
        });
    }
    if header.epoch > EPOCH_MAX {
        return Err(lines.bad(format!("epoch {} is not 0 to {EPOCH_MAX}", header.epoch)));
    }
    let mut records: Vec<Record> = Vec::new();
    for _ in 0..header.records {
        let line: Line = lines.parse("not a record")?;
        let key = Key::new(line.kind, line.id);
        let value = BASE64.decode(&line.value).map_err(|error| lines.bad(format!("value of {key}: {error}")))?;
        if !key.is_valid() || value.len() > VALUE_BYTES_MAX || line.revision > header.revision {
            return Err(lines.bad(format!("record {key} breaks a limit")));
        }
        if sum(&key, line.revision, &value) != line.sum {
            return Err(StoreError::Damaged {
                place: "backup".to_owned(),
                damage: Damage::Record { key: key.to_string() },
            });
        }
        if records.last().is_some_and(|last| last.key >= key) {
            return Err(lines.bad(format!("record {key} is out of order")));
        }
        records.push(Record { key, revision: Revision(line.revision), value: value.into() });
    }
    let expected = hex(lines.context.clone().finish().as_ref());
    let trailer: Trailer =
        lines.parse("not the last line; the backup is cut short or has more records than it says")?;
    if trailer.sha256 != expected {
        return Err(lines.bad("the digest of the whole backup does not match".to_owned()));
    }
    if !lines.next()?.is_empty() {
        return Err(lines.bad("something follows the last line".to_owned()));
    }
    Ok(Snapshot { revision: Revision(header.revision), epoch: Epoch(header.epoch), records })
}

struct Lines<R: Read> {
    reader: BufReader<R>,
    line: u64,
    context: Context,
}

impl<R: Read> Lines<R> {
    /// The next line with its end; empty at the end of the file.
    fn next(&mut self) -> Result<Vec<u8>, StoreError> {
        self.line += 1;
        let mut line = Vec::new();
        let read = (&mut self.reader).take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line);
        read.map_err(|source| StoreError::Io { verb: "read", path: "the backup".into(), source })?;
        self.context.update(&line);
        Ok(line)
    }

    fn parse<T: serde::de::DeserializeOwned>(&mut self, otherwise: &str) -> Result<T, StoreError> {
        let line = self.next()?;
        match serde_json::from_slice(&line) {
            Ok(value) if line.ends_with(b"\n") => Ok(value),
            Ok(_) => Err(self.bad("the line has no end".to_owned())),
            Err(error) => Err(self.bad(format!("{otherwise} ({error})"))),
        }
    }

    fn bad(&self, problem: String) -> StoreError {
        StoreError::BadBackup { line: self.line, problem }
    }
}

/// Makes a store in `dir` from a backup. The whole backup is verified before anything is written, and the store appears in
/// one step. Its epoch lies far beyond the backup's, so that agents accept the master that opens it.
///
/// # Errors
/// Those of [`read_backup`]; [`StoreError::Exists`] when there is a store, damaged or not; [`StoreError::InUse`];
/// [`StoreError::Failed`], [`StoreError::Io`].
pub fn restore(reader: impl Read, dir: &Path) -> Result<BackupSummary, StoreError> {
    let snapshot = read_backup(reader)?;
    let mut medium = DirMedium::lock(dir)?;
    if medium.exists()? {
        return Err(StoreError::Exists { path: medium.path() });
    }
    restore_medium(&snapshot, &mut medium)
}

/// The same on any storage, where there is no store, from a backup that was read; for durability tests.
///
/// # Errors
/// [`StoreError::Failed`], [`StoreError::Io`].
pub fn restore_medium<M: Medium>(snapshot: &Snapshot, medium: &mut M) -> Result<BackupSummary, StoreError> {
    let epoch = snapshot.epoch.0 + RESTORE_EPOCH_STEP;
    let head = Head { revision: snapshot.revision.0, epoch, clean: true, ..Head::default() };
    super::db::create(medium, head, &snapshot.records)?;
    Ok(BackupSummary { revision: snapshot.revision, records: snapshot.records.len() as u64 })
}

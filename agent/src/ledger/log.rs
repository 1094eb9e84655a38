//! The ledger's file: an append-only log of checksummed records, rewritten when most of it is dead.
//!
//! Owns the bytes on disk and what may be believed of them after a crash. Must not know what the records mean. No
//! tasks, no channels; every call blocks for as long as the disk takes.
//!
//! ```text
//! file   = magic "SKLEDGR1" record*
//! record = length u32 LE, CRC-32 of the payload u32 LE, payload (JSON)
//! ```
//!
//! Each append is one write and one fsync, so at most the last record can be torn: what follows the last good record
//! is then shorter than that record says, or zeros (a file grows before its data arrives). Anything else is damage,
//! and is told apart, since it means that records which were durable are lost.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// First bytes of the file; the last one is the format's number.
pub(super) const MAGIC: &[u8; 8] = b"SKLEDGR1";
/// Bytes before a record's payload.
const HEADER: usize = 8;
/// Largest payload, bytes. A full set of assignments with 100,000 documents of 500 bytes takes 50 MB.
pub(super) const RECORD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// What a file was found to hold.
pub(super) struct Loaded {
    pub(super) log: Log,
    /// Payloads in order.
    pub(super) records: Vec<Vec<u8>>,
    /// Why records are missing that were durable once, if so.
    pub(super) damage: Option<String>,
}

/// The open file.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// Up to here the file is good.
    len: u64,
    /// A write failed and could not be undone: only a rewrite helps.
    broken: bool,
}

impl Log {
    /// Opens or makes the file. A torn last record is cut off; a damaged file is set aside as `<path>.damaged`, and
    /// what was good of it is returned.
    pub(super) fn open(path: &Path) -> io::Result<Loaded> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(mut file) => {
                file.read_to_end(&mut bytes)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let log = Self::rewrite(path, std::iter::empty())?;
                return Ok(Loaded { log, records: Vec::new(), damage: None });
            }
            Err(error) => return Err(error),
        }
        let (records, good, damage) = parse(&bytes);
        if damage.is_some() {
            let mut aside = path.as_os_str().to_owned();
            aside.push(".damaged");
            fs::rename(path, &aside)?;
            let log = Self::rewrite(path, records.iter().map(Vec::as_slice))?;
            return Ok(Loaded { log, records, damage });
        }
        let file = OpenOptions::new().write(true).open(path)?;
        if good < bytes.len() as u64 {
            file.set_len(good)?;
            file.sync_all()?;
        }
        let log = Self { path: path.to_owned(), file, len: good, broken: false };
        Ok(Loaded { log, records, damage: None })
    }

    /// Makes the file anew with these payloads: beside it, then over it.
    pub(super) fn rewrite<'a>(path: &Path, payloads: impl Iterator<Item = &'a [u8]>) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let made = (|| {
            let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            let mut out = io::BufWriter::new(&file);
            out.write_all(MAGIC)?;
            let mut len = MAGIC.len() as u64;
            for payload in payloads {
                let record = encode(payload)?;
                out.write_all(&record)?;
                len += record.len() as u64;
            }
            out.flush()?;
            drop(out);
            file.sync_all()?;
            fs::rename(&beside, path)?;
            sync_dir(path)?;
            Ok(Self { path: path.to_owned(), file, len, broken: false })
        })();
        if made.is_err() {
            // On a full disk the half-made file must not take the rest of it.
            let _ = fs::remove_file(&beside);
        }
        made
    }

    /// Appends one record; it is on disk when this returns. After an error the file is as before, or `broken`.
    pub(super) fn append(&mut self, payload: &[u8]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier write could not be undone"));
        }
        let record = encode(payload)?;
        let written = self.file.write_all_at(&record, self.len).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // After a failed fsync nobody knows what is on disk, so the file is not written to again until then.
            self.broken = true;
            let _ = self.file.set_len(self.len);
            return Err(error);
        }
        self.len += record.len() as u64;
        Ok(())
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether only [`Log::rewrite`] can help.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

pub(super) fn encode(payload: &[u8]) -> io::Result<Vec<u8>> {
    if payload.len() > RECORD_BYTES_MAX {
        return Err(io::Error::other(format!("a record of {} bytes is too large", payload.len())));
    }
    let mut record = Vec::with_capacity(HEADER + payload.len());
    record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    record.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
    record.extend_from_slice(payload);
    Ok(record)
}

/// The good records, how many bytes they take, and the damage behind them, if it is not just a torn write.
pub(super) fn parse(bytes: &[u8]) -> (Vec<Vec<u8>>, u64, Option<String>) {
    let mut records = Vec::new();
    if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC[..] {
        return (records, 0, Some("it does not begin as a ledger of this format".into()));
    }
    let mut at = MAGIC.len();
    while at < bytes.len() {
        let rest = &bytes[at..];
        if rest.len() < HEADER || rest.iter().all(|b| *b == 0) {
            return (records, at as u64, None);
        }
        let word = |i: usize| u32::from_le_bytes([rest[i], rest[i + 1], rest[i + 2], rest[i + 3]]);
        let (len, crc) = (word(0) as usize, word(4));
        // An empty record is never written, and eight zeros would be one.
        if len == 0 || len > RECORD_BYTES_MAX {
            return (records, at as u64, Some(format!("the record at byte {at} has an impossible length")));
        }
        let Some(payload) = rest.get(HEADER..HEADER + len) else { return (records, at as u64, None) };
        if crc32fast::hash(payload) != crc {
            let last = rest.len() == HEADER + len;
            let damage = (!last).then(|| format!("the record at byte {at} does not match its checksum"));
            return (records, at as u64, damage);
        }
        records.push(payload.to_vec());
        at += HEADER + len;
    }
    (records, at as u64, None)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

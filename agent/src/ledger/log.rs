//! The ledger's file: an append-only log of checksummed records, rewritten when most of it is dead.
//!
//! Owns the bytes on disk and what may be believed of them after a crash. Must not know what the records mean. No
//! tasks, no channels; every call blocks for as long as the disk takes.
//!
//! ```text
//! file   = magic "SKLEDGR2", nonce 8 bytes, record*
//! record = length u32 LE, head u32 LE, sum u32 LE, payload (JSON)
//! head   = CRC-32 of the nonce, of all lengths and payloads before, and of this length
//! sum    = the same, and of this payload
//! ```
//!
//! So a record is right in one place of one file only: what a disk wrote elsewhere, left where it was before, or brings
//! back from a file that was here earlier (each has its own nonce) is found out, once in 2^32 not. `head` makes a length
//! trustworthy before anything is skipped by it.
//!
//! Each append is one write and one fsync, so at most the last record can be torn: what follows the last good record
//! is then shorter than that record says, or zeros (a file grows before its data arrives). Anything else is damage,
//! and is told apart, since it means that records which were durable are lost.
//!
//! Format 1 had no nonce and no head, and a CRC-32 of each payload alone. It is read, and written anew as format 2.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rand::Rng as _;

/// First bytes of the file; the last one is the format's number.
pub(super) const MAGIC: &[u8; 8] = b"SKLEDGR2";
/// The same of the format before.
pub(super) const MAGIC_1: &[u8; 8] = b"SKLEDGR1";
/// Bytes before the first record: magic and nonce.
pub(super) const PREAMBLE: usize = MAGIC.len() + 8;
/// Bytes before a record's payload.
pub(super) const HEADER: usize = 12;
/// The same in format 1: length, CRC-32.
const HEADER_1: usize = 8;
/// Largest payload, bytes. A full set of assignments with 100,000 documents of 500 bytes takes 50 MB.
pub(super) const RECORD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// What a file was found to hold.
pub(super) struct Loaded {
    pub(super) log: Log,
    /// Payloads in order.
    pub(super) records: Vec<Vec<u8>>,
    /// Why records are missing that were durable once, if so.
    pub(super) damage: Option<String>,
    /// The file had to be written anew and the disk did not take it: the log is broken, the records are right.
    pub(super) refused: Option<io::Error>,
}

/// The open file.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// Up to here the file is good.
    len: u64,
    /// The last record's sum, which the next one's continue.
    sum: u32,
    /// A write failed and could not be undone: only a rewrite helps.
    broken: bool,
}

impl Log {
    /// Opens or makes the file. A torn last record is cut off. A damaged file is kept as `<path>.damaged`, as far as the
    /// disk takes it, and what was good of it is returned; a file of format 1 is written anew.
    pub(super) fn open(path: &Path) -> io::Result<Loaded> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let log = Self::rewrite(path, std::iter::empty())?;
                return Ok(Loaded { log, records: Vec::new(), damage: None, refused: None });
            }
            Err(error) => return Err(error),
        };
        let Parsed { records, good, sum, damage, current } = parse(&bytes);
        let file = OpenOptions::new().write(true).open(path)?;
        let log = Self { path: path.to_owned(), file, len: good, sum, broken: false };
        if damage.is_some() {
            keep_aside(path, &bytes);
        }
        if damage.is_some() || !current {
            let (log, refused) = match Self::rewrite(path, records.iter().map(Vec::as_slice)) {
                Ok(log) => (log, None),
                Err(error) => (Self { broken: true, ..log }, Some(error)),
            };
            return Ok(Loaded { log, records, damage, refused });
        }
        if good < bytes.len() as u64 {
            log.file.set_len(good)?;
            log.file.sync_all()?;
        }
        Ok(Loaded { log, records, damage: None, refused: None })
    }

    /// Makes the file anew with these payloads: beside it, then over it.
    pub(super) fn rewrite<'a>(path: &Path, payloads: impl Iterator<Item = &'a [u8]>) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let made = (|| {
            let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            let mut out = io::BufWriter::new(&file);
            let nonce: [u8; 8] = rand::rng().random();
            out.write_all(&preamble(nonce))?;
            let (mut len, mut sum) = (PREAMBLE as u64, crc32fast::hash(&nonce));
            for payload in payloads {
                let record = encode(sum, payload)?;
                out.write_all(&record.bytes)?;
                len += record.bytes.len() as u64;
                sum = record.sum;
            }
            out.flush()?;
            drop(out);
            file.sync_all()?;
            fs::rename(&beside, path)?;
            sync_dir(path)?;
            Ok(Self { path: path.to_owned(), file, len, sum, broken: false })
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
        let record = encode(self.sum, payload)?;
        let written = self.file.write_all_at(&record.bytes, self.len).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // After a failed fsync nobody knows what is on disk, so the file is not written to again until then.
            self.broken = true;
            let _ = self.file.set_len(self.len);
            return Err(error);
        }
        self.len += record.bytes.len() as u64;
        self.sum = record.sum;
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

/// What a file begins with.
pub(super) fn preamble(nonce: [u8; 8]) -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    bytes[..MAGIC.len()].copy_from_slice(MAGIC);
    bytes[MAGIC.len()..].copy_from_slice(&nonce);
    bytes
}

/// A record as bytes, with the sum that the next one continues.
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    pub(super) sum: u32,
}

/// `before` is the sum of the record before, or of the nonce.
pub(super) fn encode(before: u32, payload: &[u8]) -> io::Result<Encoded> {
    if payload.len() > RECORD_BYTES_MAX {
        return Err(io::Error::other(format!("a record of {} bytes is too large", payload.len())));
    }
    let len = (payload.len() as u32).to_le_bytes();
    let head = crc_after(before, &len);
    let sum = crc_after(head, payload);
    let bytes = [&len[..], &head.to_le_bytes(), &sum.to_le_bytes(), payload].concat();
    Ok(Encoded { bytes, sum })
}

/// CRC-32 of what has the CRC-32 `before`, and of `bytes` behind it.
fn crc_after(before: u32, bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new_with_initial(before);
    crc.update(bytes);
    crc.finalize()
}

/// What may be believed of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Payloads of the good records.
    pub(super) records: Vec<Vec<u8>>,
    /// Bytes up to their end; 0: it is no ledger.
    pub(super) good: u64,
    /// The last one's sum; without meaning unless `current`.
    pub(super) sum: u32,
    /// What is behind them, if it is not just a torn write.
    pub(super) damage: Option<String>,
    /// It has the format that is written.
    pub(super) current: bool,
}

pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed { records: Vec::new(), good: 0, sum: 0, damage: None, current: false };
    let (mut at, header) = match bytes.first_chunk() {
        Some(magic) if magic == MAGIC && bytes.len() >= PREAMBLE => (PREAMBLE, HEADER),
        Some(magic) if magic == MAGIC_1 => (MAGIC_1.len(), HEADER_1),
        _ => {
            parsed.damage = Some("it does not begin as a ledger of this format".into());
            return parsed;
        }
    };
    parsed.current = header == HEADER;
    parsed.sum = crc32fast::hash(&bytes[MAGIC.len()..at]);
    let ended = loop {
        let next = if parsed.current { record(&bytes[at..], parsed.sum) } else { record_1(&bytes[at..]) };
        match next {
            Ok((payload, sum)) => {
                parsed.records.push(payload.to_vec());
                parsed.sum = sum;
                at += header + payload.len();
            }
            Err(ended) => break ended,
        }
    };
    parsed.good = at as u64;
    parsed.damage = match ended {
        Ended::Here => None,
        Ended::Damaged(what) => Some(format!("the record at byte {at} {what}")),
    };
    parsed
}

/// Why there are no more records.
enum Ended {
    /// The file ends, or what follows is the beginning of a record that was not acknowledged.
    Here,
    /// Records that were durable are lost.
    Damaged(&'static str),
}

/// The payload and the sum of the record that `rest` begins with, behind one with the sum `before`.
fn record(rest: &[u8], before: u32) -> Result<(&[u8], u32), Ended> {
    let Some((header, behind)) = rest.split_at_checked(HEADER) else { return Err(Ended::Here) };
    let head = crc_after(before, &header[..4]);
    let (len, sum) = (word(header, 0) as usize, word(header, 2));
    if word(header, 1) != head || len > RECORD_BYTES_MAX {
        // Pages that arrive out of order may leave a hole here with data behind it. That looks like damage, and costs no
        // more than a full set from the master.
        let torn = behind.iter().all(|b| *b == 0);
        return Err(if torn { Ended::Here } else { Ended::Damaged("does not belong there, or its length is damaged") });
    }
    let payload = behind.get(..len).ok_or(Ended::Here)?;
    match crc_after(head, payload) == sum {
        true => Ok((payload, sum)),
        false if behind.len() == len => Err(Ended::Here),
        false => Err(Ended::Damaged("does not match its checksum")),
    }
}

/// The same in format 1, where a record's sum is of its payload alone.
fn record_1(rest: &[u8]) -> Result<(&[u8], u32), Ended> {
    let Some((header, behind)) = rest.split_at_checked(HEADER_1) else { return Err(Ended::Here) };
    if rest.iter().all(|b| *b == 0) {
        return Err(Ended::Here);
    }
    let (len, sum) = (word(header, 0) as usize, word(header, 1));
    // An empty record is never written, and eight zeros would be one.
    if len == 0 || len > RECORD_BYTES_MAX {
        return Err(Ended::Damaged("has an impossible length"));
    }
    let payload = behind.get(..len).ok_or(Ended::Here)?;
    match crc32fast::hash(payload) == sum {
        true => Ok((payload, sum)),
        false if behind.len() == len => Err(Ended::Here),
        false => Err(Ended::Damaged("does not match its checksum")),
    }
}

/// Word `i` of a header.
fn word(header: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(*header[4 * i..].first_chunk().expect("a header has that many words"))
}

/// For whoever wants to know what became of it. The disk may not take it: that is no reason to stop.
fn keep_aside(path: &Path, bytes: &[u8]) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    if let Err(error) = fs::write(&aside, bytes) {
        tracing::warn!(path = %path.display(), %error, "damaged ledger cannot be kept aside");
        let _ = fs::remove_file(&aside);
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

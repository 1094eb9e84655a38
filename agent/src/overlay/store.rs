//! What the network side keeps on this host's disk: engine networks, endpoints, addresses, the last networks.
//!
//! Owns: the trait and a store of one small file per key. Must not know: what the documents mean. No tasks, no
//! channels; calls block for as long as the disk takes and belong on the blocking pool.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

pub use agent_core::lease::Change;
use thiserror::Error;

/// Largest document, bytes: an endpoint with 200 published ports takes 20 KB.
pub const DOCUMENT_BYTES_MAX: u64 = 1024 * 1024;

/// Longest key, bytes: escaped at worst threefold and with its ending it stays within a file name's 255.
pub const KEY_BYTES_MAX: usize = 80;

/// A failure of the disk below the local state. The memory's state goes on.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Reading failed.
    #[error("failed to read local state {path}")]
    Read {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Writing failed: a full disk, most often.
    #[error("failed to write local state {key} under {path}")]
    Write {
        /// Key of the document.
        key: String,
        /// Directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Small JSON documents by key, durable when a call returns. The agent's ledger is one, [`DirStore`] another.
pub trait LocalStore: Send + Sync + 'static {
    /// Every document whose key starts with `prefix`, also damaged ones: whoever reads them tells.
    ///
    /// # Errors
    /// The disk failed.
    fn load(&self, prefix: &str) -> Result<BTreeMap<String, String>, StoreError>;

    /// Makes one change durable; twice is the same as once.
    ///
    /// # Errors
    /// The disk failed; the document is then the old or the new one, never a mixture.
    fn write(&self, change: &Change) -> Result<(), StoreError>;
}

/// A directory with one file per document, each written to a temporary file, synced and renamed.
#[derive(Debug)]
pub struct DirStore {
    dir: PathBuf,
    /// One writer at a time: temporary files share a name.
    writing: Mutex<()>,
}

const TEMPORARY: &str = ".writing";
const ENDING: &str = ".json";

impl DirStore {
    /// A store in this directory, which is made if it is not there.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn try_open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(|source| StoreError::Read { path: dir.clone(), source })?;
        Ok(Self { dir, writing: Mutex::default() })
    }

    fn put(&self, key: &str, json: &str) -> io::Result<()> {
        if key.len() > KEY_BYTES_MAX || json.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let temporary = self.dir.join(TEMPORARY);
        let mut file = File::create(&temporary)?;
        file.write_all(json.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(file_name(key)))?;
        sync_dir(&self.dir)
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        match fs::remove_file(self.dir.join(file_name(key))) {
            Ok(()) => sync_dir(&self.dir),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl LocalStore for DirStore {
    fn load(&self, prefix: &str) -> Result<BTreeMap<String, String>, StoreError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| StoreError::Read { path, source }
        };
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.dir).map_err(failed(&self.dir))? {
            let path = entry.map_err(failed(&self.dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let Some(key) = name.strip_suffix(ENDING).and_then(key_of) else {
                continue;
            };
            if !key.starts_with(prefix) {
                continue;
            }
            // One damaged document must not keep the agent from starting. None of ours is too large or not UTF-8, and
            // nothing at all is not JSON either.
            let small = fs::metadata(&path).map_err(failed(&path))?.len() <= DOCUMENT_BYTES_MAX;
            let bytes = if small { fs::read(&path).map_err(failed(&path))? } else { Vec::new() };
            found.insert(key, String::from_utf8(bytes).unwrap_or_default());
        }
        Ok(found)
    }

    fn write(&self, change: &Change) -> Result<(), StoreError> {
        let _one = self.writing.lock().unwrap_or_else(|e| e.into_inner());
        let (key, result) = match change {
            Change::Put(key, json) => (key, self.put(key, json)),
            Change::Delete(key) => (key, self.delete(key)),
        };
        result.map_err(|source| StoreError::Write { key: key.clone(), path: self.dir.clone(), source })
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The key with every byte that is not a letter, digit, `-` or `_` as `%xx`, so that it is one path component.
fn file_name(key: &str) -> String {
    let mut name = String::with_capacity(key.len() + ENDING.len());
    for byte in key.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name + ENDING
}

fn key_of(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_come_back_after_a_reopen_and_a_torn_write_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::try_open(dir.path()).unwrap();
        let put = |k: &str, v: &str| store.write(&Change::Put(k.into(), v.into())).unwrap();
        put("lease/n/10.0.0.1", "1");
        put("lease/n/10.0.0.1", "2");
        put("lease/n/ünï", "3");
        put("other/x", "4");
        store.write(&Change::Delete("other/y".into())).unwrap();
        fs::write(dir.path().join(TEMPORARY), "half of a docu").unwrap();
        drop(store);

        let store = DirStore::try_open(dir.path()).unwrap();
        let found: Vec<_> = store.load("lease/").unwrap().into_iter().collect();
        assert_eq!(found, [("lease/n/10.0.0.1".into(), "2".into()), ("lease/n/ünï".into(), "3".into())]);
        fs::write(dir.path().join(file_name("other/x")), [b'"', 0xff, b'"']).unwrap();
        assert_eq!(store.load("other/").unwrap()["other/x"], "", "damaged, but told");
        store.write(&Change::Delete("other/x".into())).unwrap();
        assert!(store.load("other/").unwrap().is_empty());
        let long = "k".repeat(KEY_BYTES_MAX + 1);
        assert!(matches!(store.write(&Change::Put(long, "".into())), Err(StoreError::Write { .. })));
    }
}

//! Where the embedded store's bytes are: a directory in production, a faulty disk in durability tests.
//!
//! Owns: the store's directory, its lock, the creation of the file in one step. Must not know: what is in the file.

use std::fmt::Debug;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use redb::StorageBackend;
use redb::backends::FileBackend;

use super::StoreError;

/// The database within the store's directory.
pub const STORE_FILE: &str = "store.redb";
/// The database before it is complete; never read, always overwritten.
pub const SCRATCH_FILE: &str = "store.redb.new";
/// Locked for as long as the store is open; holds the process id of who has it.
pub const LOCK_FILE: &str = "store.lock";

/// Gives redb its storage, again and again: a store that failed is opened anew.
pub trait Medium: Send + 'static {
    /// The storage.
    type Backend: StorageBackend;

    /// The storage of the store that is there; `None` when there is none. Only one is alive at a time.
    fn existing(&mut self) -> io::Result<Option<Self::Backend>>;

    /// An empty storage for a new store, which is not there until [`Medium::publish`].
    fn scratch(&mut self) -> io::Result<Self::Backend>;

    /// Makes the scratch the store, durably and in one step.
    fn publish(&mut self) -> io::Result<()>;

    /// Names the storage in messages.
    fn place(&self) -> String;
}

/// A directory of this process alone.
#[derive(Debug)]
pub struct DirMedium {
    dir: PathBuf,
    /// The lock is held by this open file, so the kernel gives it back however the process ends.
    _lock: File,
}

impl DirMedium {
    /// Locks the store's directory, which is made when it does not exist (mode 0700: the store holds private keys).
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process (or another store of this one) still has it after two seconds;
    /// [`StoreError::Io`].
    pub fn lock(dir: &Path) -> Result<Self, StoreError> {
        let io_error = |verb| move |source| StoreError::Io { verb, path: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("make directory"))?;
        let dir = &dir.canonicalize().map_err(io_error("find"))?;
        let path = dir.join(LOCK_FILE);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open the lock file in"))?;
        if !skein_daemon::lock_soon(&lock).map_err(io_error("lock"))? {
            let mut pid = String::new();
            // Only for the message: the holder may be about to write it, or of another user.
            let _ = lock.read_to_string(&mut pid);
            return Err(StoreError::InUse { path: dir.to_owned(), pid: pid.trim().parse().ok() });
        }
        // A full disk must not keep a store from being read, and the id is only for the message above.
        let _ = lock
            .set_len(0)
            .and_then(|()| lock.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(lock, "{}", std::process::id()));
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// The store's file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(STORE_FILE)
    }

    /// Whether there is a store, damaged or not.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be read.
    pub fn exists(&self) -> Result<bool, StoreError> {
        let path = self.path();
        path.try_exists().map_err(|source| StoreError::Io { verb: "look for", path, source })
    }
}

/// A file without redb's own locks: the directory's lock is stronger, and a database that failed while it was dropped would
/// keep them, so that the store could not be opened again.
#[derive(Debug)]
pub struct UnlockedFile(FileBackend);

impl UnlockedFile {
    fn try_new(file: File) -> io::Result<Self> {
        FileBackend::new(file).map(Self).map_err(io::Error::other)
    }
}

impl StorageBackend for UnlockedFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}

impl Medium for DirMedium {
    type Backend = UnlockedFile;

    fn existing(&mut self) -> io::Result<Option<UnlockedFile>> {
        let file = match OpenOptions::new().read(true).write(true).open(self.path()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // After a failed fsync the kernel may keep pages that never reached the disk, and calls them clean. Reading them
        // back would show transactions as durable that are not; dropped, they are read from the disk.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        UnlockedFile::try_new(file).map(Some)
    }

    fn scratch(&mut self) -> io::Result<UnlockedFile> {
        let path = self.dir.join(SCRATCH_FILE);
        UnlockedFile::try_new(
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?,
        )
    }

    fn publish(&mut self) -> io::Result<()> {
        let scratch = self.dir.join(SCRATCH_FILE);
        File::open(&scratch)?.sync_all()?;
        fs::rename(&scratch, self.path())?;
        File::open(&self.dir)?.sync_all()?;
        // The directory itself may be new.
        match self.dir.parent() {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        }
    }

    fn place(&self) -> String {
        self.path().display().to_string()
    }
}

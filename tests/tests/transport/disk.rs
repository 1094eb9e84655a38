//! The disk of a simulated master: memory that outlives the master's process, and may refuse writes.
//!
//! Owns: the store's bytes. Must not know: what is in them. What a disk loses in a crash is tested with the store itself;
//! here a process dies, whose writes the kernel still has.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use redb::StorageBackend;
use skein_master::store::medium::Medium;

/// A disk. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    image: Mutex<Image>,
    full: AtomicBool,
    /// Counts the processes that had the disk: one that was killed writes nothing any more, though its threads end later.
    life: AtomicU64,
}

#[derive(Debug, Default)]
struct Image {
    bytes: Vec<u8>,
    published: bool,
}

impl Disk {
    /// The medium of the master that starts now.
    pub(crate) fn medium(&self) -> Mounted {
        Mounted { disk: self.clone(), life: self.0.life.load(Ordering::SeqCst) }
    }

    /// The master that has it is killed.
    pub(crate) fn kill(&self) {
        let _whole = self.image();
        self.0.life.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether writes are refused from now on.
    pub(crate) fn set_full(&self, full: bool) {
        self.0.full.store(full, Ordering::SeqCst);
    }

    fn image(&self) -> MutexGuard<'_, Image> {
        self.0.image.lock().expect("nobody panics while holding this lock")
    }
}

/// A disk in the hands of one process.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    disk: Disk,
    life: u64,
}

impl Mounted {
    /// The bytes, to change them.
    fn writable(&self) -> io::Result<MutexGuard<'_, Image>> {
        let image = self.disk.image();
        if self.disk.0.life.load(Ordering::SeqCst) != self.life {
            return Err(io::Error::other("this process was killed"));
        }
        if self.disk.0.full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(image)
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

impl StorageBackend for Mounted {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.image().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (image, start) = (self.disk.image(), index(offset)?);
        let bytes = start.checked_add(out.len()).and_then(|end| image.bytes.get(start..end));
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.writable()?.bytes.resize(index(len)?, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.writable().map(drop)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (mut image, start) = (self.writable()?, index(offset)?);
        let end = start.checked_add(data.len());
        let bytes = end.and_then(|end| image.bytes.get_mut(start..end));
        bytes.ok_or_else(|| io::Error::other("a write beyond the end"))?.copy_from_slice(data);
        Ok(())
    }
}

impl Medium for Mounted {
    type Backend = Self;

    fn existing(&mut self) -> io::Result<Option<Self>> {
        Ok(self.disk.image().published.then(|| self.clone()))
    }

    fn scratch(&mut self) -> io::Result<Self> {
        self.writable()?.bytes.clear();
        Ok(self.clone())
    }

    fn publish(&mut self) -> io::Result<()> {
        self.writable()?.published = true;
        Ok(())
    }

    fn place(&self) -> String {
        "simulated disk".to_owned()
    }
}

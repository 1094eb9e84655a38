//! A disk in memory that keeps the order of every write, length change and sync, so that the disk after a crash at any of
//! them can be made: unsynced sectors are lost, kept, torn and reordered at will.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;
use skein_master::store::medium::Medium;

/// What happened to the disk, in order.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write { offset: usize, data: Vec<u8> },
    SetLen(usize),
    Sync,
}

/// Which unsynced sectors survive a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Survivors {
    None,
    All,
    /// Each sector of so many bytes has one of its unsynced contents or the synced one, at random.
    Random {
        sector_bytes: usize,
    },
    /// Nearly all: one in ten is lost.
    Most,
    /// Only the first sector, where the database's header is: the newest root, without what it points to.
    HeaderOnly,
    /// All but the first sector.
    AllButHeader,
}

impl Survivors {
    pub(crate) const EVERY: [Survivors; 7] = [
        Survivors::None,
        Survivors::All,
        Survivors::Random { sector_bytes: 512 },
        Survivors::Random { sector_bytes: 4096 },
        Survivors::Most,
        Survivors::HeaderOnly,
        Survivors::AllButHeader,
    ];

    fn sector_bytes(self) -> usize {
        match self {
            Survivors::Random { sector_bytes } => sector_bytes,
            _ => 512,
        }
    }

    /// Which of `contents` versions survives; 0 is the synced one.
    fn pick(self, sector: usize, contents: usize, rng: &mut StdRng) -> usize {
        let last = contents - 1;
        match self {
            Survivors::None => 0,
            Survivors::All => last,
            Survivors::Random { .. } => rng.random_range(0..=last),
            Survivors::Most => {
                if rng.random_bool(0.1) {
                    0
                } else {
                    last
                }
            }
            Survivors::HeaderOnly => {
                if sector == 0 {
                    last
                } else {
                    0
                }
            }
            Survivors::AllButHeader => {
                if sector == 0 {
                    0
                } else {
                    last
                }
            }
        }
    }
}

/// The disk after a crash: `synced`, and of `unsynced` what survives.
pub(crate) fn crashed(synced: &[u8], unsynced: &[Step], survivors: Survivors, rng: &mut StdRng) -> Vec<u8> {
    let sector_bytes = survivors.sector_bytes();
    let at = |bytes: &[u8], sector: usize| {
        let mut content = vec![0; sector_bytes];
        let start = (sector * sector_bytes).min(bytes.len());
        let end = (start + sector_bytes).min(bytes.len());
        content[..end - start].copy_from_slice(&bytes[start..end]);
        content
    };
    let mut view = synced.to_vec();
    let mut lens = vec![synced.len()];
    let mut contents: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
    for step in unsynced {
        let range = match step {
            Step::Write { offset, data } => {
                view[*offset..offset + data.len()].copy_from_slice(data);
                *offset..offset + data.len()
            }
            Step::SetLen(len) => {
                let gone = *len..view.len().max(*len);
                view.resize(*len, 0);
                lens.push(*len);
                gone
            }
            Step::Sync => unreachable!("what was before a sync is synced"),
        };
        if range.is_empty() {
            continue;
        }
        for sector in range.start / sector_bytes..range.end.div_ceil(sector_bytes) {
            let versions = contents.entry(sector).or_insert_with(|| vec![at(synced, sector)]);
            versions.push(at(&view, sector));
        }
    }
    // The length is metadata of the file system, not part of the header's sector.
    let len = match survivors {
        Survivors::HeaderOnly => lens[lens.len() - 1],
        _ => lens[survivors.pick(1, lens.len(), rng)],
    };
    let longest = lens.iter().copied().max().unwrap_or(0).next_multiple_of(sector_bytes);
    let mut image = synced.to_vec();
    image.resize(longest.max(image.len()), 0);
    for (sector, versions) in contents {
        let start = sector * sector_bytes;
        let content = &versions[survivors.pick(sector, versions.len(), rng)];
        if start + sector_bytes <= image.len() {
            image[start..start + sector_bytes].copy_from_slice(content);
        }
    }
    image.resize(len, 0);
    image
}

/// The disk after all of `log`.
pub(crate) fn replay(log: &[Step]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for step in log {
        match step {
            Step::Write { offset, data } => bytes[*offset..offset + data.len()].copy_from_slice(data),
            Step::SetLen(len) => bytes.resize(*len, 0),
            Step::Sync => {}
        }
    }
    bytes
}

/// What goes wrong at a step, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The call returns an error; a sync leaves the disk as after a crash.
    Error,
    /// The call panics, as a bug in the engine would.
    Panic,
}

#[derive(Debug, Default)]
struct Inner {
    view: Vec<u8>,
    /// As of the last sync.
    synced: Vec<u8>,
    log: Vec<Step>,
    /// Where in the log the last sync is.
    synced_at: usize,
    published: bool,
    /// Where in the log the store appeared.
    published_at: Option<usize>,
    syncs: usize,
    failure: Option<(usize, Failure)>,
    /// Something failed: what is unsynced is in doubt when the store is opened again.
    failed: bool,
    capacity_bytes: Option<usize>,
    gate_closed: bool,
    blocked: bool,
}

/// A handle to a simulated disk; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    shared: Arc<(Mutex<Inner>, Condvar)>,
}

impl Disk {
    /// A disk that holds a store's file.
    pub(crate) fn with_image(image: Vec<u8>) -> Self {
        let disk = Self::default();
        {
            let mut inner = disk.inner();
            inner.view.clone_from(&image);
            inner.synced = image;
            inner.published = true;
        }
        disk
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A simulated panic poisons the lock by design.
        self.shared.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn medium(&self) -> DiskMedium {
        DiskMedium { disk: self.clone() }
    }

    pub(crate) fn log_len(&self) -> usize {
        self.inner().log.len()
    }

    pub(crate) fn log(&self) -> Vec<Step> {
        self.inner().log.clone()
    }

    /// Steps that were done when a store appeared on it.
    pub(crate) fn published_at(&self) -> Option<usize> {
        self.inner().published_at
    }

    pub(crate) fn syncs(&self) -> usize {
        self.inner().syncs
    }

    pub(crate) fn view(&self) -> Vec<u8> {
        self.inner().view.clone()
    }

    /// Fails the call that would be log entry number `step`.
    pub(crate) fn fail_at(&self, step: usize, failure: Failure) {
        self.inner().failure = Some((step, failure));
    }

    /// Takes back a failure that has not come yet.
    pub(crate) fn clear_failure(&self) {
        self.inner().failure = None;
    }

    pub(crate) fn set_capacity(&self, capacity_bytes: Option<usize>) {
        self.inner().capacity_bytes = capacity_bytes;
    }

    /// Lets syncs wait (`true`) or go on.
    pub(crate) fn set_gate(&self, closed: bool) {
        self.inner().gate_closed = closed;
        self.shared.1.notify_all();
    }

    /// Whether a sync waits at the gate.
    pub(crate) fn is_blocked(&self) -> bool {
        self.inner().blocked
    }

    fn record(&self, step: Step) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.failure.is_some_and(|(at, _)| at == inner.log.len()) {
            let (at, failure) = inner.failure.take().expect("just seen");
            inner.failed = true;
            match failure {
                Failure::Error => {
                    return Err(io::Error::other(format!("simulated failure at step {at}")));
                }
                Failure::Panic => {
                    drop(inner);
                    panic!("simulated panic at step {at}");
                }
            }
        }
        let end = match &step {
            Step::Write { offset, data } => offset + data.len(),
            Step::SetLen(_) | Step::Sync => 0,
        };
        if inner.capacity_bytes.is_some_and(|capacity| end > capacity) {
            inner.failed = true;
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        match &step {
            Step::Write { offset, data } => {
                if end > inner.view.len() {
                    return Err(io::Error::other("a write beyond the end"));
                }
                inner.view[*offset..end].copy_from_slice(data);
            }
            Step::SetLen(len) => inner.view.resize(*len, 0),
            Step::Sync => {
                while inner.gate_closed {
                    inner.blocked = true;
                    inner = self.shared.1.wait(inner).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                inner.blocked = false;
                let view = inner.view.clone();
                inner.synced = view;
                inner.synced_at = inner.log.len() + 1;
                inner.syncs += 1;
            }
        }
        inner.log.push(step);
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner().view.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = self.inner();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = start.checked_add(out.len()).and_then(|end| inner.view.get(start..end));
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Step::SetLen(usize::try_from(len).map_err(io::Error::other)?))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.record(Step::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.record(Step::Write { offset: usize::try_from(offset).map_err(io::Error::other)?, data: data.to_vec() })
    }
}

/// The store's medium on a simulated disk.
#[derive(Debug)]
pub(crate) struct DiskMedium {
    disk: Disk,
}

impl Medium for DiskMedium {
    type Backend = Disk;

    fn existing(&mut self) -> io::Result<Option<Disk>> {
        let mut inner = self.disk.inner();
        if inner.failed {
            // The page cache was dropped: what is read now is what the failed writes and syncs left on the disk.
            let unsynced = inner.log[inner.synced_at..].to_vec();
            let mut rng = StdRng::seed_from_u64(inner.log.len() as u64);
            let survivors = Survivors::EVERY[rng.random_range(0..Survivors::EVERY.len())];
            let image = crashed(&inner.synced, &unsynced, survivors, &mut rng);
            inner.view.clone_from(&image);
            inner.synced = image;
            inner.synced_at = inner.log.len();
            inner.failed = false;
        }
        let published = inner.published;
        drop(inner);
        Ok(published.then(|| self.disk.clone()))
    }

    fn scratch(&mut self) -> io::Result<Disk> {
        let mut inner = self.disk.inner();
        // As with O_TRUNC on a file that a crash left behind.
        inner.view.clear();
        inner.synced.clear();
        inner.synced_at = inner.log.len();
        inner.failed = false;
        drop(inner);
        Ok(self.disk.clone())
    }

    fn publish(&mut self) -> io::Result<()> {
        self.disk.record(Step::Sync)?;
        let mut inner = self.disk.inner();
        (inner.published, inner.published_at) = (true, Some(inner.log.len()));
        Ok(())
    }

    fn place(&self) -> String {
        "simulated disk".to_owned()
    }
}

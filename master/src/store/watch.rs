//! Watches: the store's own commits, in order, to any number of readers.
//!
//! Owns: the bounded ring of recent commits and the readers' positions in it. Must not know: how a commit became durable.
//!
//! A watch is a position in one shared ring, woken by one `watch` channel that holds the last revision; so a slow reader
//! costs nothing, and one that falls out of the ring is told so.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::{Commit, Key, Op, Revision};

/// Most commits kept for readers. At the 400 groups/s that a disk gives and 10 commits in each, a reader may be away for
/// a second.
pub const RING_COMMITS_MAX: usize = 4096;
/// Most bytes of keys and values kept for readers; the values are shared with whoever wrote them. 4096 commits of 8 KiB.
pub const RING_BYTES_MAX: usize = 32 << 20;

/// Why a watch gives no more commits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// Commits that the reader has not seen are gone; take a new snapshot and watch from there.
    #[error("failed to follow the store: commits after revision {after} are no longer kept, the oldest is {oldest}")]
    Lagged {
        /// The last revision that the reader has seen.
        after: Revision,
        /// The oldest revision that a reader can still watch from.
        oldest: Revision,
    },
    /// The store was closed.
    #[error("failed to follow the store: it is closed")]
    Closed,
}

/// A reader of the store's commits.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    after: Revision,
    last_rx: watch::Receiver<Revision>,
}

impl Watch {
    /// The next commit. Cancel-safe: nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// After an error, all later calls return an error as well; a new watch is needed.
    pub async fn next(&mut self) -> Result<Arc<Commit>, WatchError> {
        loop {
            // Before the look into the ring, so that a commit between the two wakes us.
            let closed = self.last_rx.has_changed().is_err();
            self.last_rx.mark_unchanged();
            if let Some(commit) = self.shared.ring().after(self.after)? {
                self.after = commit.revision;
                return Ok(commit);
            }
            if closed || self.last_rx.changed().await.is_err() {
                return Err(WatchError::Closed);
            }
        }
    }
}

#[derive(Debug)]
struct Shared {
    ring: Mutex<Ring>,
}

impl Shared {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        // No code panics while it holds the lock, and the ring is whole after each of its methods.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Ring {
    /// Revisions without gaps, oldest first.
    commits: VecDeque<Arc<Commit>>,
    ring_bytes: usize,
    /// Commits after this revision are in the ring.
    oldest: Revision,
}

impl Ring {
    fn after(&self, after: Revision) -> Result<Option<Arc<Commit>>, WatchError> {
        match after.0.checked_sub(self.oldest.0) {
            None => Err(WatchError::Lagged { after, oldest: self.oldest }),
            Some(index) => Ok(usize::try_from(index).ok().and_then(|index| self.commits.get(index)).cloned()),
        }
    }

    fn push(&mut self, commit: Commit) {
        self.ring_bytes += commit_bytes(&commit);
        self.commits.push_back(Arc::new(commit));
        while self.commits.len() > RING_COMMITS_MAX || self.ring_bytes > RING_BYTES_MAX {
            let Some(gone) = self.commits.pop_front() else {
                break;
            };
            self.ring_bytes -= commit_bytes(&gone);
            self.oldest = gone.revision;
        }
    }
}

fn commit_bytes(commit: &Commit) -> usize {
    let key_bytes = |key: &Key| key.kind.len() + key.id.len();
    let op_bytes = |op: &Op| match op {
        Op::Put { key, value } => key_bytes(key) + value.len(),
        Op::Delete { key } => key_bytes(key),
    };
    commit.ops.iter().map(op_bytes).sum()
}

/// Where the writer puts its commits. Watches end when it is dropped.
#[derive(Debug)]
pub(super) struct Feed {
    shared: Arc<Shared>,
    last_tx: watch::Sender<Revision>,
}

/// Makes watches.
#[derive(Clone, Debug)]
pub(super) struct Source {
    shared: Arc<Shared>,
    last_rx: watch::Receiver<Revision>,
}

/// A ring that begins after `revision`.
pub(super) fn feed(revision: Revision) -> (Feed, Source) {
    let ring = Ring { commits: VecDeque::new(), ring_bytes: 0, oldest: revision };
    let shared = Arc::new(Shared { ring: Mutex::new(ring) });
    let (last_tx, last_rx) = watch::channel(revision);
    (Feed { shared: Arc::clone(&shared), last_tx }, Source { shared, last_rx })
}

impl Feed {
    /// Shows `commits` to all readers, in order and without gaps after those before.
    pub(super) fn publish(&self, commits: Vec<Commit>) {
        let Some(last) = commits.last().map(|commit| commit.revision) else {
            return;
        };
        let mut ring = self.shared.ring();
        for commit in commits {
            ring.push(commit);
        }
        drop(ring);
        self.last_tx.send_replace(last);
    }

    /// After a reopen at `revision`: what is between the last commit shown and there was never seen here, so that readers
    /// behind it must resync.
    pub(super) fn restart(&self, revision: Revision) {
        let mut ring = self.shared.ring();
        let last = ring.commits.back().map_or(ring.oldest, |commit| commit.revision);
        if last != revision {
            ring.commits.clear();
            ring.ring_bytes = 0;
            ring.oldest = revision;
        }
        drop(ring);
        self.last_tx.send_replace(revision);
    }
}

impl Source {
    /// A reader of what comes after `from`.
    pub(super) fn watch(&self, from: Revision) -> Watch {
        Watch { shared: Arc::clone(&self.shared), after: from, last_rx: self.last_rx.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(revision: u64, value_bytes: usize) -> Commit {
        let op = Op::Put { key: Key::new("k", "i"), value: vec![0; value_bytes].into() };
        Commit { revision: Revision(revision), ops: vec![op] }
    }

    #[tokio::test]
    async fn a_reader_sees_each_commit_once_and_then_the_end() {
        let (feed, source) = feed(Revision(3));
        feed.publish(vec![commit(4, 1), commit(5, 1)]);
        let mut watch = source.watch(Revision(4));
        assert_eq!(watch.next().await.unwrap().revision, Revision(5));
        feed.publish(vec![commit(6, 1)]);
        drop(feed);
        assert_eq!(watch.next().await.unwrap().revision, Revision(6));
        assert_eq!(watch.next().await, Err(WatchError::Closed));
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken() {
        let (feed, source) = feed(Revision(0));
        let mut watch = source.watch(Revision(0));
        let reader = tokio::spawn(async move { watch.next().await });
        tokio::task::yield_now().await;
        feed.publish(vec![commit(1, 1)]);
        assert_eq!(reader.await.unwrap().unwrap().revision, Revision(1));
    }

    #[tokio::test]
    async fn the_ring_is_bounded_in_count_and_bytes() {
        let (feed, source) = feed(Revision(0));
        feed.publish((1..=RING_COMMITS_MAX as u64 + 2).map(|revision| commit(revision, 1)).collect());
        let oldest = Revision(2);
        let after = Revision(1);
        assert_eq!(source.watch(after).next().await, Err(WatchError::Lagged { after, oldest }));
        assert_eq!(source.watch(oldest).next().await.unwrap().revision, Revision(3));

        let first = RING_COMMITS_MAX as u64 + 3;
        feed.publish((first..first + 40).map(|revision| commit(revision, 1 << 20)).collect());
        let ring = source.shared.ring();
        assert!(ring.ring_bytes <= RING_BYTES_MAX && ring.commits.len() < 40);
    }

    #[tokio::test]
    async fn a_restart_further_on_tells_readers_to_resync() {
        let (feed, source) = feed(Revision(0));
        feed.publish(vec![commit(1, 1)]);
        let mut watch = source.watch(Revision(1));
        feed.restart(Revision(1));
        feed.publish(vec![commit(2, 1)]);
        assert_eq!(watch.next().await.unwrap().revision, Revision(2));
        feed.restart(Revision(3));
        assert_eq!(watch.next().await, Err(WatchError::Lagged { after: Revision(2), oldest: Revision(3) }));
    }
}

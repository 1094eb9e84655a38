//! The actor's disk, and what does not work.
//!
//! Owns: what could not be written yet, and the words for the host's operator. Must not know: what documents mean. No
//! tasks and channels of its own; writes run on the blocking pool.

use super::{Actor, Change, NetworkId, StoreError, chain};

/// Written to find out whether a disk that refused takes documents again.
const PROBE_KEY: &str = "overlay/probe";

/// What a trouble is about; there is at most one per topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Topic {
    /// A document that cannot be read.
    Damage(String),
    /// The disk refuses.
    Disk,
    /// The host's own namespace.
    Host,
    /// Networks that should be gone.
    Cleanup,
    /// Ports of every host that do not lead anywhere from this one.
    Ports,
    /// A network.
    Network(NetworkId),
}

impl Actor {
    /// Notes that a topic is in trouble, or not any more. Whoever watches is told of changes only.
    pub(super) fn trouble(&mut self, topic: Topic, words: Option<String>) {
        match words {
            Some(words) => drop(self.troubles.insert(topic, words)),
            None => drop(self.troubles.remove(&topic)),
        }
        self.tell_troubles();
    }

    /// Forgets troubles of networks and documents that are no more.
    pub(super) fn retain_troubles(&mut self) {
        self.troubles.retain(|topic, _| match topic {
            Topic::Network(id) => self.known.contains_key(id),
            Topic::Damage(key) => self.plugin.is_damaged(key),
            Topic::Disk | Topic::Host | Topic::Cleanup | Topic::Ports => true,
        });
        self.tell_troubles();
    }

    fn tell_troubles(&self) {
        self.shared.troubles.send_if_modified(|told| {
            let now: Vec<String> = self.troubles.values().cloned().collect();
            let changed = *told != now;
            *told = now;
            changed
        });
    }

    /// Makes changes durable, in order.
    ///
    /// # Errors
    /// The disk refused; some of them may have been written.
    pub(super) async fn persist(&mut self, changes: impl IntoIterator<Item = Change>) -> Result<(), StoreError> {
        let changes: Vec<Change> = changes.into_iter().collect();
        if changes.is_empty() {
            return Ok(());
        }
        let keys: Vec<String> = changes.iter().map(|c| c.key().to_owned()).collect();
        // A full disk still takes deletions: they prove nothing.
        let proves = changes.iter().any(|c| matches!(c, Change::Put(..)));
        let store = self.store.clone();
        let write = move || changes.iter().try_for_each(|change| store.write(change));
        let result = tokio::task::spawn_blocking(write).await.expect("stores do not panic");
        match &result {
            Ok(()) => {
                keys.iter().for_each(|key| drop(self.behind.remove(key)));
                if self.behind.is_empty() && proves {
                    self.trouble(Topic::Disk, None);
                }
            }
            Err(error) => self.trouble(Topic::Disk, Some(chain(error))),
        }
        result
    }

    /// As [`Actor::persist`]; what the disk refuses is written with the next full audit, unless it changed by then.
    pub(super) async fn persist_or_warn(&mut self, changes: impl IntoIterator<Item = Change>) {
        let changes: Vec<Change> = changes.into_iter().collect();
        if let Err(error) = self.persist(changes.clone()).await {
            tracing::warn!(error = chain(&error), "local state on disk is behind: it is written again later");
            // At most one change per document.
            self.behind.extend(changes.into_iter().map(|c| (c.key().to_owned(), c)));
        }
    }

    /// Writes these documents as memory has them: takes back what was perhaps written before a failure.
    pub(super) async fn rewrite(&mut self, keys: &[String]) {
        let as_it_is = |key: &String| match self.plugin.document(key).or_else(|| self.leases.document(key)) {
            Some(json) => Some(Change::Put(key.clone(), json)),
            // What cannot be read cannot be written either, but is to stay.
            None => (!self.plugin.is_damaged(key)).then(|| Change::Delete(key.clone())),
        };
        let changes: Vec<Change> = keys.iter().filter_map(as_it_is).collect();
        self.persist_or_warn(changes).await;
    }

    /// Tries again what the disk refused.
    pub(super) async fn write_behind(&mut self) {
        let mut behind: Vec<Change> = self.behind.values().cloned().collect();
        if behind.is_empty() && self.troubles.contains_key(&Topic::Disk) {
            behind.push(Change::Put(PROBE_KEY.to_owned(), "true".to_owned()));
        }
        if !behind.is_empty() {
            self.persist_or_warn(behind).await;
        }
    }
}

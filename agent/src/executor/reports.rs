//! The last report of each task, until the master has it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_core::session::Outbox;
use skein_api::{TaskId, TaskReport};
use tokio::sync::watch;

/// The [`Outbox`] that executor and session share. Cheap to clone; all clones are one.
///
/// For the session: [`Reports::begin_session`] when one begins, then [`Reports::next`] whenever [`Reports::changed`] moves
/// and after [`Reports::reported`], which is for each `Reported` of the master; [`Reports::unsent`] with each heartbeat.
#[derive(Clone, Default)]
pub struct Reports {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    outbox: Mutex<Outbox>,
    changed: watch::Sender<u64>,
}

impl Reports {
    fn lock(&self) -> MutexGuard<'_, Outbox> {
        // Every change of the outbox is complete before anything can panic.
        self.shared.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new word about a task; it takes the place of the older one.
    pub fn put(&self, report: TaskReport) {
        if self.lock().put(report) {
            self.shared.changed.send_modify(|n| *n += 1);
        }
    }

    /// See [`Outbox::put_again`].
    pub(super) fn put_again(&self, reports: impl IntoIterator<Item = TaskReport>) {
        let mut outbox = self.lock();
        reports.into_iter().for_each(|report| outbox.put_again(report));
        drop(outbox);
        self.shared.changed.send_modify(|n| *n += 1);
    }

    /// See [`Outbox::refused`].
    pub fn refused<'a>(&self, tasks: impl IntoIterator<Item = &'a TaskId>) {
        self.lock().refused(tasks);
    }

    /// Moves whenever there is something to send.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// See [`Outbox::begin_session`].
    pub fn begin_session(&self) {
        self.lock().begin_session();
        self.shared.changed.send_modify(|n| *n += 1);
    }

    /// See [`Outbox::next`].
    pub fn next(&self, max: usize) -> Vec<TaskReport> {
        self.lock().next(max)
    }

    /// See [`Outbox::unsent`].
    pub fn unsent(&self, max: usize) -> Vec<TaskReport> {
        self.lock().unsent(max)
    }

    /// See [`Outbox::reported`].
    pub fn reported<'a>(&self, tasks: impl IntoIterator<Item = &'a TaskId>) {
        self.lock().reported(tasks);
    }

    /// Everything that the master has not confirmed.
    pub fn pending(&self) -> Vec<TaskReport> {
        self.lock().pending().cloned().collect()
    }
}

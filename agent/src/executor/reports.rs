//! The last report of each task, until the master has it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use skein_api::{TaskId, TaskReport};
use tokio::sync::watch;

/// Reports on their way to the master: one per task, the newest. Bounded by the number of tasks on the host. Cheap to
/// clone; all clones are one.
///
/// For the session: [`Reports::begin_session`] when one begins, then [`Reports::unsent`] whenever
/// [`Reports::changed`] moves, and [`Reports::reported`] for each `Reported` of the master.
#[derive(Clone, Default)]
pub struct Reports {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    pending: Mutex<BTreeMap<TaskId, Pending>>,
    changed: watch::Sender<u64>,
}

struct Pending {
    report: TaskReport,
    /// Sent in this session in the form that it has now.
    sent: bool,
    /// Sent in this session in whatever form, and not answered.
    outstanding: u32,
}

impl Reports {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<TaskId, Pending>> {
        self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new word about a task; it takes the place of the older one.
    pub(super) fn put(&self, report: TaskReport) {
        let mut pending = self.lock();
        match pending.get_mut(&report.task) {
            Some(old) if old.report == report => return,
            Some(old) => {
                old.report = report;
                old.sent = false;
            }
            None => {
                pending.insert(report.task.clone(), Pending { report, sent: false, outstanding: 0 });
            }
        }
        drop(pending);
        self.shared.changed.send_modify(|n| *n += 1);
    }

    /// Moves whenever there is something to send.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// A session begins: everything that the master has not confirmed is to be sent again.
    pub fn begin_session(&self) {
        for pending in self.lock().values_mut() {
            pending.sent = false;
            pending.outstanding = 0;
        }
        self.shared.changed.send_modify(|n| *n += 1);
    }

    /// At most `max` reports that this session has not sent in their present form; they count as sent now.
    pub fn unsent(&self, max: usize) -> Vec<TaskReport> {
        let mut pending = self.lock();
        let unsent = pending.values_mut().filter(|p| !p.sent).take(max);
        unsent
            .map(|p| {
                p.sent = true;
                p.outstanding = p.outstanding.saturating_add(1);
                p.report.clone()
            })
            .collect()
    }

    /// The master has made one report of each of these tasks durable. Answers come in the order of the reports, so a
    /// task whose newer report is on its way keeps it.
    pub fn reported<'a>(&self, tasks: impl IntoIterator<Item = &'a TaskId>) {
        let mut pending = self.lock();
        for task in tasks {
            let Some(entry) = pending.get_mut(task) else { continue };
            entry.outstanding = entry.outstanding.saturating_sub(1);
            if entry.sent && entry.outstanding == 0 {
                pending.remove(task);
            }
        }
    }

    /// Everything that the master has not confirmed.
    pub fn pending(&self) -> Vec<TaskReport> {
        self.lock().values().map(|p| p.report.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use skein_api::{TaskState, TaskStatus};

    use super::*;

    fn report(task: &str, state: TaskState) -> TaskReport {
        let status = TaskStatus { state, ..Default::default() };
        TaskReport { task: TaskId::new(task), run: 1, status }
    }

    #[test]
    fn the_newest_report_stays_until_it_is_confirmed() {
        let reports = Reports::default();
        let changed = reports.changed();
        reports.put(report("a", TaskState::Starting));
        reports.put(report("b", TaskState::Running));
        assert!(changed.has_changed().expect("is open"));
        assert_eq!(reports.unsent(10).len(), 2);
        assert_eq!(reports.unsent(10), []);
        reports.put(report("a", TaskState::Running));
        // The answer to the first report of `a` does not cost the second.
        reports.reported(&[TaskId::new("a"), TaskId::new("b"), TaskId::new("unknown")]);
        assert_eq!(reports.pending(), [report("a", TaskState::Running)]);
        assert_eq!(reports.unsent(10), [report("a", TaskState::Running)]);
        // The connection is lost before the answer: it is sent again.
        reports.begin_session();
        assert_eq!(reports.unsent(10), [report("a", TaskState::Running)]);
        reports.reported(&[TaskId::new("a")]);
        assert_eq!(reports.pending(), []);
    }

    #[test]
    fn two_forms_on_their_way_need_two_answers() {
        let reports = Reports::default();
        reports.put(report("a", TaskState::Starting));
        reports.unsent(10);
        reports.put(report("a", TaskState::Running));
        assert_eq!(reports.unsent(1).len(), 1);
        reports.reported(&[TaskId::new("a")]);
        assert_eq!(reports.pending().len(), 1);
        reports.reported(&[TaskId::new("a")]);
        assert_eq!(reports.pending().len(), 0);
    }
}

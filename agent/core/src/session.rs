//! What a session with a master decides: when to say that we live, when to give the master up, when to come back, and
//! which reports are still to be sent.
//!
//! ```text
//! report ─put─> unsent ─next()─> on its way ─reported()─> forgotten
//!                 ^                  │
//!                 └── a newer word, refused(), a new session, another term of the master
//! ```
//!
//! One message of reports is on its way at a time, and one more with each heartbeat. While the master is busy the newest
//! word about a task so takes the place of those before it, and a start that passes through four states costs the master
//! one commit; when it is not, each is told at once. An agent that reads no answers, because its kernel hangs, still says
//! what its containers do.
//!
//! Must not know the connection or the clock: time is an argument, in milliseconds of a clock that never goes back.

use std::collections::BTreeMap;

use skein_api::{TaskId, TaskReport};

/// Until the first acknowledgement says otherwise.
pub const HEARTBEAT_MS: u64 = 5_000;
/// What a master may ask for: ten a second to one a minute.
const HEARTBEAT_MS_RANGE: (u64, u64) = (100, 60_000);
/// Heartbeats without a word of the master after which the session is given up: as many as the master allows.
pub const SILENT_PERIODS: u64 = 3;
/// First pause between attempts to connect.
pub const BACKOFF_MIN_MS: u64 = 200;
/// Longest pause between attempts to connect.
pub const BACKOFF_MAX_MS: u64 = 5_000;
/// A session that lasted this long was well: the next pause is the first again.
pub const WELL_MS: u64 = 10_000;

/// The heartbeats of one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulse {
    period_ms: u64,
    seq: u64,
    heard_at_ms: u64,
}

impl Pulse {
    /// A session that begins now.
    pub fn new(now_ms: u64) -> Self {
        Self { period_ms: HEARTBEAT_MS, seq: 0, heard_at_ms: now_ms }
    }

    /// The master said something.
    pub fn heard(&mut self, now_ms: u64) {
        self.heard_at_ms = now_ms;
    }

    /// The master acknowledged a heartbeat and wants them this often.
    pub fn acknowledged(&mut self, period_ms: u64) {
        self.period_ms = period_ms.clamp(HEARTBEAT_MS_RANGE.0, HEARTBEAT_MS_RANGE.1);
    }

    /// Whether the master was silent for too long. Pings only show that its process lives; its loop has acknowledged
    /// nothing.
    pub fn is_silent(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.heard_at_ms) > self.period_ms * SILENT_PERIODS
    }

    /// The next heartbeat's number, and the pause after it: four to five fifths of the period, by `random` in 0..1, so
    /// that agents which a master's return brought back at once do not stay in step.
    pub fn beat(&mut self, random: f64) -> (u64, u64) {
        self.seq += 1;
        (self.seq, jittered(self.period_ms, 0.8, 1.0, random))
    }
}

/// Pauses between attempts to connect: doubled from one to the next, spread by half.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    pause_ms: u64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { pause_ms: BACKOFF_MIN_MS }
    }
}

impl Backoff {
    /// The pause after an attempt that lasted `lasted_ms`, by `random` in 0..1.
    pub fn after(&mut self, lasted_ms: u64, random: f64) -> u64 {
        if lasted_ms >= WELL_MS {
            self.pause_ms = BACKOFF_MIN_MS;
        }
        let pause_ms = jittered(self.pause_ms, 0.5, 1.5, random);
        self.pause_ms = (self.pause_ms * 2).min(BACKOFF_MAX_MS);
        pause_ms
    }
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at most minutes"
)]
fn jittered(ms: u64, least: f64, most: f64, random: f64) -> u64 {
    (ms as f64 * (least + (most - least) * random)) as u64
}

/// Reports on their way to the master: one per task, the newest. Bounded by the number of tasks on the host.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    pending: BTreeMap<TaskId, Pending>,
    /// How many reports are on their way.
    on_way: u64,
}

#[derive(Clone, Debug)]
struct Pending {
    report: TaskReport,
    /// Sent in this session in the form that it has now.
    sent: bool,
    /// How often it was sent in this session, in whatever form, and not answered.
    on_way: u32,
}

impl Outbox {
    /// A new word about a task; it takes the place of the older one. False when it is the same.
    pub fn put(&mut self, report: TaskReport) -> bool {
        match self.pending.get_mut(&report.task) {
            Some(old) if old.report == report => return false,
            Some(old) => (old.report, old.sent) = (report, false),
            None => {
                self.pending.insert(report.task.clone(), Pending { report, sent: false, on_way: 0 });
            }
        }
        true
    }

    /// The word about a task once more, whatever was said before: another term of the master may not know it.
    pub fn put_again(&mut self, report: TaskReport) {
        match self.pending.get_mut(&report.task) {
            Some(old) => (old.report, old.sent) = (report, false),
            None => drop(self.put(report)),
        }
    }

    /// A session begins: everything that the master has not confirmed is to be sent again.
    pub fn begin_session(&mut self) {
        self.on_way = 0;
        for pending in self.pending.values_mut() {
            (pending.sent, pending.on_way) = (false, 0);
        }
    }

    /// What [`Outbox::unsent`] gives, for one message; nothing while an earlier one is not answered in full: ask again
    /// after [`Outbox::reported`].
    pub fn next(&mut self, max: usize) -> Vec<TaskReport> {
        if self.on_way > 0 { Vec::new() } else { self.unsent(max) }
    }

    /// At most `max` reports that this session has not sent in their present form; they count as sent now.
    pub fn unsent(&mut self, max: usize) -> Vec<TaskReport> {
        if skein_api::mutant!("lost-report") {
            return std::mem::take(&mut self.pending).into_values().map(|p| p.report).collect();
        }
        let unsent = self.pending.values_mut().filter(|p| !p.sent).take(max);
        let reports: Vec<TaskReport> = unsent
            .map(|p| {
                p.sent = true;
                p.on_way += 1;
                p.report.clone()
            })
            .collect();
        self.on_way += reports.len() as u64;
        reports
    }

    /// The answer to one report of a task that is on its way, if there is one.
    fn answered(&mut self, task: &TaskId) -> Option<&mut Pending> {
        let entry = self.pending.get_mut(task).filter(|entry| entry.on_way > 0)?;
        entry.on_way -= 1;
        self.on_way -= 1;
        Some(entry)
    }

    /// The master has made one report of each of these tasks durable. Answers come in the order of the reports, so a task
    /// whose newer report is on its way, or still to be sent, keeps it.
    pub fn reported<'a>(&mut self, tasks: impl IntoIterator<Item = &'a TaskId>) {
        for task in tasks {
            if self.answered(task).is_some_and(|entry| entry.sent && entry.on_way == 0) {
                self.pending.remove(task);
            }
        }
    }

    /// The master could not make one report of each of these tasks durable: they are to be sent again. When is for the
    /// caller to choose; with every heartbeat is often enough.
    pub fn refused<'a>(&mut self, tasks: impl IntoIterator<Item = &'a TaskId>) {
        for task in tasks {
            if let Some(entry) = self.answered(task) {
                entry.sent = false;
            }
        }
    }

    /// Everything that the master has not confirmed.
    pub fn pending(&self) -> impl Iterator<Item = &TaskReport> {
        self.pending.values().map(|p| &p.report)
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

    fn pending(outbox: &Outbox) -> Vec<TaskReport> {
        outbox.pending().cloned().collect()
    }

    #[test]
    fn the_newest_report_stays_until_it_is_confirmed() {
        let mut outbox = Outbox::default();
        assert!(outbox.put(report("a", TaskState::Starting)));
        assert!(!outbox.put(report("a", TaskState::Starting)), "the same again");
        outbox.put(report("b", TaskState::Running));
        assert_eq!(outbox.unsent(10).len(), 2);
        assert_eq!(outbox.unsent(10), []);
        outbox.put(report("a", TaskState::Running));
        // The answer to the first report of `a` does not cost the second.
        outbox.reported(&[TaskId::new("a"), TaskId::new("b"), TaskId::new("unknown")]);
        assert_eq!(pending(&outbox), [report("a", TaskState::Running)]);
        assert_eq!(outbox.unsent(10), [report("a", TaskState::Running)]);
        // The connection is lost before the answer: it is sent again.
        outbox.begin_session();
        assert_eq!(outbox.unsent(10), [report("a", TaskState::Running)]);
        outbox.reported(&[TaskId::new("a")]);
        assert_eq!(pending(&outbox), []);
    }

    #[test]
    fn one_message_is_on_its_way_and_what_waits_is_the_newest() {
        let mut outbox = Outbox::default();
        for task in ["a", "b", "c"] {
            outbox.put(report(task, TaskState::Preparing));
        }
        assert_eq!(outbox.next(2), [report("a", TaskState::Preparing), report("b", TaskState::Preparing)]);
        for state in [TaskState::Starting, TaskState::Running] {
            outbox.put(report("a", state));
        }
        assert_eq!(outbox.next(2), []);
        // Answers may come in parts, and some of them twice.
        outbox.reported(&[TaskId::new("a"), TaskId::new("a")]);
        assert_eq!(outbox.next(2), [], "b is not answered");
        outbox.refused(&[TaskId::new("b")]);
        assert_eq!(outbox.next(2), [report("a", TaskState::Running), report("b", TaskState::Preparing)]);
        outbox.reported(&[TaskId::new("a"), TaskId::new("b")]);
        assert_eq!(outbox.next(2), [report("c", TaskState::Preparing)]);
        // No answer for a heartbeat long: it goes all the same, and each needs an answer of its own.
        outbox.put(report("c", TaskState::Running));
        assert_eq!(outbox.unsent(2), [report("c", TaskState::Running)]);
        outbox.reported(&[TaskId::new("c")]);
        assert_eq!(pending(&outbox), [report("c", TaskState::Running)]);
        outbox.reported(&[TaskId::new("c")]);
        assert_eq!((pending(&outbox), outbox.next(2)), (vec![], vec![]));
    }

    #[test]
    fn two_forms_on_their_way_need_two_answers() {
        let mut outbox = Outbox::default();
        outbox.put(report("a", TaskState::Starting));
        outbox.unsent(10);
        outbox.put(report("a", TaskState::Running));
        assert_eq!(outbox.unsent(1).len(), 1);
        outbox.reported(&[TaskId::new("a")]);
        assert_eq!(pending(&outbox).len(), 1);
        outbox.reported(&[TaskId::new("a")]);
        assert_eq!(pending(&outbox).len(), 0);
    }

    #[test]
    fn what_was_refused_is_sent_again() {
        let mut outbox = Outbox::default();
        outbox.put(report("a", TaskState::Running));
        outbox.unsent(10);
        outbox.refused(&[TaskId::new("a"), TaskId::new("unknown")]);
        assert_eq!(outbox.unsent(10), [report("a", TaskState::Running)]);
        outbox.reported(&[TaskId::new("a")]);
        assert_eq!(pending(&outbox), []);
        // Another term of the master: said once more, and no answer to what was said before costs it.
        outbox.put(report("a", TaskState::Complete));
        outbox.unsent(10);
        outbox.put_again(report("a", TaskState::Complete));
        outbox.reported(&[TaskId::new("a")]);
        assert_eq!(outbox.unsent(10), [report("a", TaskState::Complete)]);
        outbox.reported(&[TaskId::new("a")]);
        assert_eq!(pending(&outbox), []);
    }

    #[test]
    fn a_silent_master_is_given_up() {
        let mut pulse = Pulse::new(1_000);
        assert_eq!(pulse.beat(0.0), (1, 4_000));
        assert_eq!(pulse.beat(0.5), (2, 4_500));
        assert!(!pulse.is_silent(16_000));
        assert!(pulse.is_silent(16_001));
        pulse.heard(16_001);
        pulse.acknowledged(1_000);
        assert!(!pulse.is_silent(19_001));
        assert!(pulse.is_silent(19_002));
        pulse.acknowledged(0);
        assert_eq!(pulse.beat(0.5), (3, 90), "never faster than ten times a second");
    }

    #[test]
    fn pauses_double_until_a_session_was_well() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u64> = (0..7).map(|_| backoff.after(0, 0.5)).collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!(backoff.after(WELL_MS, 0.0), 100);
        assert_eq!(backoff.after(0, 0.999), 599);
    }
}

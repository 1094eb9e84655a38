//! The loop that makes the engine's containers what the ledger says.
//!
//! Owns what was observed of the engine, the memory of the core, and the actions in flight. It decides nothing:
//! `agent_core::reconcile` does, and its plan is carried out as it stands; what fails is left to the next plan. It must
//! not know the master's session, the kernel or the disk's format.
//!
//! Tasks: [`Executor::run`] is one, and owns in a [`JoinSet`] the engine's event stream and one task per action.
//! Channels: ledger changes and [`ExecutorHandle::wake`] wake it, events come by an `mpsc` of `EVENTS_BUFFERED` (a
//! full one holds the engine's stream back), words of progress by one of `PROGRESS_BUFFERED` (a full one drops them).
//! Reports leave through [`Reports`], figures through a `watch` of [`ExecutorStatus`].
//!
//! A container whose inspection takes longer than `INSPECT_TIMEOUT` keeps its old view and is looked at by a task of
//! its own (`looks`): an engine that hangs over one container must not hold up the others.
//!
//! It looks at single containers when an event or an action was about them, and at everything every
//! [`RESYNC_PERIOD`], at start, and whenever the engine's events begin anew.

mod actions;
mod looks;
mod network;
mod ports;
mod reports;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use agent_core::{
    Action, ActionError, ActionKey, Desired, ImageUse, Memory, Observed, Outcome, TaskLocal, Updates, admit::admit,
    reconcile,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use skein_api::{Assignment, TaskId, UnixMillis};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::Instant,
};

use self::{
    actions::{Sight, Tools},
    looks::{Look, Looks},
    ports::PortChooser,
};
pub use agent_core::Settings;
/// What [`Executor::run`] ends by.
pub use tokio_util::sync::CancellationToken;

pub use self::{network::NetworkSide, ports::RANGE as HOST_PORT_RANGE, reports::Reports};
use crate::{
    engine::{Engine, EngineError, EngineEvent},
    ledger::{Ledger, LedgerState},
};

/// How often everything is looked at, event or not.
pub const RESYNC_PERIOD: Duration = Duration::from_secs(30);
/// Events that wait: an engine that starts 100 containers at once makes about 300.
const EVENTS_BUFFERED: usize = 512;
/// Words of progress that wait.
const PROGRESS_BUFFERED: usize = 64;
/// An engine that failed to answer is looked at again after this.
const RETRY_PERIOD: Duration = Duration::from_secs(2);
/// A disk that refused is tried again after this: each try writes the whole ledger.
const REPAIR_PERIOD: Duration = Duration::from_secs(30);
/// How long actions may go on when the agent is told to end. What is cut off is found and finished by the next agent.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);
/// Where the core's memory of tasks is in the ledger.
const TASK_PREFIX: &str = "executor/task/";
/// Where its memory of images is.
const IMAGE_PREFIX: &str = "executor/image/";

/// Figures and troubles of the executor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecutorStatus {
    /// Rounds of looking and planning since the start.
    pub rounds: u64,
    /// Actions begun since the start.
    pub actions: u64,
    /// Containers of ours.
    pub containers: usize,
    /// Engine networks of ours.
    pub networks: usize,
    /// Actions that have not ended.
    pub in_flight: usize,
    /// Nothing to do by the last plan, on a fresh look.
    pub settled: bool,
    /// What fails, in words.
    pub failures: Vec<String>,
    /// Those of them that are about this host, and in no task's status.
    pub troubles: Vec<String>,
}

/// What others hold of a running executor. Cheap to clone.
#[derive(Clone)]
pub struct ExecutorHandle {
    reports: Reports,
    wake: Arc<Notify>,
    status: watch::Receiver<ExecutorStatus>,
}

impl ExecutorHandle {
    /// Reports for the master.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Figures; changes with every round.
    pub fn status(&self) -> watch::Receiver<ExecutorStatus> {
        self.status.clone()
    }

    /// Looks at everything now: something outside changed that no event tells.
    pub fn wake(&self) {
        self.wake.notify_one();
    }
}

/// The executor. See the module's text.
pub struct Executor<N> {
    tools: Arc<Tools<N>>,
    ledger: Ledger,
    settings: Settings,
    reports: Reports,
    wake: Arc<Notify>,
    status_tx: watch::Sender<ExecutorStatus>,
    progress_rx: mpsc::Receiver<(TaskId, String)>,
    memory: Memory,
    observed: Observed,
    look: Look,
    looks: Looks,
    running: JoinSet<Finished>,
    in_flight: BTreeMap<Id, (Action, AbortHandle)>,
    /// Ended, and kept as in flight until what they did to this container was looked at.
    ended: Vec<(ActionKey, Option<String>)>,
    /// Documents of an earlier agent that could not be read.
    unreadable: Vec<String>,
    /// What the ends of actions changed in the memory; written with the next plan.
    unwritten: BTreeMap<String, Option<Value>>,
    stale: bool,
    /// Full sets of assignments after which everything was reported again.
    full_sets: u64,
    next_repair: Instant,
}

type Finished = (Result<Outcome, ActionError>, Option<String>);

impl<N: NetworkSide> Executor<N> {
    /// An executor over these parts; it does nothing before [`Executor::run`]. The last statuses of all tasks are in its
    /// reports at once.
    pub fn new(engine: Engine, ledger: Ledger, network: Arc<N>, settings: Settings) -> (Self, ExecutorHandle) {
        let (progress_tx, progress_rx) = mpsc::channel(PROGRESS_BUFFERED);
        let (status_tx, status) = watch::channel(ExecutorStatus::default());
        let reports = Reports::default();
        let wake = Arc::new(Notify::new());
        let handle = ExecutorHandle { reports: reports.clone(), wake: wake.clone(), status };
        let mut unreadable = Vec::new();
        let memory = Memory {
            tasks: stored(&ledger, TASK_PREFIX, salvaged, &mut unreadable).map(|(k, v)| (TaskId::new(k), v)).collect(),
            // An image that is not known to be ours is never collected: the safe side.
            images: stored(&ledger, IMAGE_PREFIX, |_| None::<ImageUse>, &mut unreadable).collect(),
            ..Default::default()
        };
        let assignments = ledger.assignments();
        let desired = Desired { assignments: &assignments, confirmed: false };
        reports.put_again(memory.reports(&desired));
        let tools = Tools { engine, network, ports: PortChooser::default(), progress_tx };
        let executor = Self {
            tools: Arc::new(tools),
            ledger,
            settings,
            reports,
            wake,
            status_tx,
            progress_rx,
            memory,
            observed: Observed::default(),
            look: Look { everything: true, ..Default::default() },
            looks: Looks::default(),
            running: JoinSet::new(),
            in_flight: BTreeMap::new(),
            ended: Vec::new(),
            unwritten: BTreeMap::new(),
            unreadable,
            stale: true,
            full_sets: 0,
            next_repair: Instant::now(),
        };
        (executor, handle)
    }

    /// Works until `shutdown`, then lets actions end for 10 s. Containers go on.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let (events_tx, mut events_rx) = mpsc::channel(EVENTS_BUFFERED);
        let engine = self.tools.engine.clone();
        let mut helpers = JoinSet::new();
        helpers.spawn(async move { engine.events(events_tx).await });
        let mut ledger_changed = self.ledger.changed();
        let mut next_resync = Instant::now() + RESYNC_PERIOD;
        loop {
            // Cancel-safe: what was seen until then counts, and what is still to be looked at stays so.
            let seen = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                seen = self.observe() => seen,
            };
            let wake_at = self.round(seen).await;
            let mut until = next_resync;
            if let Some(pause) = wake_at {
                until = until.min(Instant::now() + pause);
            }
            // Every branch is cancel-safe: channels, a notification, a set of tasks and a timer.
            tokio::select! {
                () = shutdown.cancelled() => break,
                event = events_rx.recv() => {
                    self.take_event(event);
                    while let Ok(event) = events_rx.try_recv() {
                        self.take_event(Some(event));
                    }
                }
                Some((task, words)) = self.progress_rx.recv() => {
                    self.observed.progress.insert(task, words);
                }
                Some(ended) = self.running.join_next_with_id() => self.take_end(ended),
                Some(answered) = self.looks.answered() => self.looks.take(answered, &mut self.observed, &mut self.look),
                changed = ledger_changed.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                () = self.wake.notified() => self.look.everything = true,
                () = tokio::time::sleep_until(until) => {
                    if Instant::now() >= next_resync {
                        self.look.everything = true;
                    }
                }
            }
            if self.look.everything {
                next_resync = Instant::now() + RESYNC_PERIOD;
            }
        }
        let drained = async {
            while let Some(ended) = self.running.join_next_with_id().await {
                self.take_end(ended);
            }
        };
        if tokio::time::timeout(SHUTDOWN_GRACE, drained).await.is_err() {
            tracing::warn!("actions were cut off; the next agent finishes them");
        }
        let unwritten = std::mem::take(&mut self.unwritten);
        self.persist(unwritten).await;
    }

    fn take_event(&mut self, event: Option<EngineEvent>) {
        match event {
            Some(EngineEvent::Container(id)) => {
                self.look.containers.insert(id);
            }
            // The stream only ends with us; looking at everything is right in any case.
            Some(EngineEvent::Resync) | None => self.look.everything = true,
        }
    }

    fn take_end(&mut self, ended: Result<(Id, Finished), JoinError>) {
        let (id, (result, container)) = match ended {
            Ok((id, finished)) => (id, finished),
            Err(error) if error.is_cancelled() => {
                // The plan wanted that: no failure, but nobody knows how far it came.
                self.ended.extend(self.in_flight.remove(&error.id()).map(|(action, _)| (action.key(), None)));
                self.look.everything = true;
                return;
            }
            Err(error) => {
                let message = "the action panicked, which is a bug".to_owned();
                (error.id(), (Err(ActionError { message, fatal: false }), None))
            }
        };
        let Some((action, _)) = self.in_flight.remove(&id) else { return };
        let key = action.key();
        match &result {
            Ok(_) => tracing::debug!(?action, "action done"),
            Err(error) => tracing::warn!(?action, error = error.message, fatal = error.fatal, "action failed"),
        }
        let mut touched = None;
        match &action {
            Action::EnsureEngineNetwork { .. } | Action::RemoveEngineNetwork { .. } => self.look.networks = true,
            Action::StartContainer { container, .. }
            | Action::StopContainer { container, .. }
            | Action::RemoveContainer { container, .. } => {
                self.look.containers.insert(container.clone());
                touched = Some(container.clone());
            }
            Action::CreateContainer { task } => {
                self.observed.progress.remove(task);
                match container {
                    Some(id) => {
                        self.look.containers.insert(id.clone());
                        touched = Some(id);
                    }
                    // It may have been made all the same.
                    None => self.look.everything = true,
                }
            }
            Action::ReleaseTask { .. } | Action::RemoveImage { .. } => {}
        }
        let updates = self.memory.record(&action, &result, now());
        self.ended.push((key, touched));
        self.unwritten.extend(puts(&updates, &Memory::default()));
    }

    async fn observe(&mut self) -> Result<(), EngineError> {
        self.looks.observe(&self.tools.engine, &mut self.look, &mut self.observed).await
    }

    /// Plans, remembers, reports, begins actions. The answer is how long the next round may wait.
    async fn round(&mut self, seen: Result<(), EngineError>) -> Option<Duration> {
        if let Err(error) = seen {
            if !self.stale {
                tracing::warn!(%error, "engine cannot be looked at");
            }
            self.stale = true;
            self.look.everything = true;
            self.say(false, Some(error.to_string()));
            return Some(RETRY_PERIOD);
        }
        self.stale = false;
        let looks = &self.looks;
        for (key, _) in self.ended.extract_if(.., |(_, touched)| !touched.as_ref().is_some_and(|c| looks.waits_for(c)))
        {
            self.observed.in_flight.remove(&key);
        }
        let (assignments, full_sets) = self.ledger.assignments_and_full_sets();
        let desired = Desired { assignments: &assignments, confirmed: self.ledger.is_confirmed() };
        let now = now();
        let plan = reconcile(&desired, &self.observed, now, &self.memory, &self.settings);
        // On disk before it is done, and before the master hears of it.
        let mut unwritten = std::mem::take(&mut self.unwritten);
        unwritten.extend(puts(&plan.updates, &self.memory));
        self.persist(unwritten).await;
        self.memory.apply(&plan);
        if std::mem::replace(&mut self.full_sets, full_sets) != full_sets {
            self.reports.put_again(self.memory.reports(&desired));
        }
        for report in &plan.reports {
            tracing::info!(
                task = %report.task, run = report.run, state = ?report.status.state, message = report.status.message,
                "task changed"
            );
            self.reports.put(report.clone());
        }
        for (action, abort) in self.in_flight.values() {
            if plan.cancel.contains(&action.key()) {
                abort.abort();
            }
        }
        let settled = plan.is_empty() && self.running.is_empty();
        // A plan that only remembered or said something may have made room for another; its like is empty the next time.
        let look_again = !plan.is_empty() && plan.actions.is_empty() && plan.cancel.is_empty();
        for action in admit(self.in_flight.values().map(|(a, _)| a.kind()), plan.actions) {
            self.begin(action, &assignments);
        }
        self.repair_ledger().await;
        self.say(settled, None);
        if look_again {
            return Some(Duration::ZERO);
        }
        plan.wake_at.map(|at| Duration::from_millis(at.since_ms(now)))
    }

    fn say(&self, settled: bool, trouble: Option<String>) {
        let failures = self.memory.failures.values().map(|f| f.message.clone());
        self.status_tx.send_modify(|s| {
            s.rounds += 1;
            s.containers = self.observed.containers.len();
            s.networks = self.observed.networks.len();
            s.in_flight = self.running.len();
            s.settled = settled;
            s.troubles = self.looks.failures().chain(self.unreadable.iter().cloned()).collect();
            s.failures = trouble.into_iter().chain(s.troubles.iter().cloned()).chain(failures).collect();
        });
    }

    fn begin(&mut self, action: Action, assignments: &BTreeMap<String, Assignment>) {
        let sight = self.sight(&action, assignments);
        let tools = self.tools.clone();
        tracing::debug!(?action, "action begins");
        self.observed.in_flight.insert(action.key(), action.kind());
        self.status_tx.send_modify(|s| s.actions += 1);
        let spawned = {
            let action = action.clone();
            self.running.spawn(async move { tools.execute(&action, sight).await })
        };
        self.in_flight.insert(spawned.id(), (action, spawned));
    }

    fn sight(&self, action: &Action, assignments: &BTreeMap<String, Assignment>) -> Sight {
        let assignment = match action.key() {
            ActionKey::Task(task) => match assignments.get(&format!("task/{task}")) {
                Some(Assignment::Task(task)) => Some((**task).clone()),
                _ => None,
            },
            _ => None,
        };
        let container_of = |task: &TaskId| self.observed.containers.values().find(|c| c.task == *task);
        let volumes_from = assignment.iter().flat_map(|a| &a.volumes_from);
        let share = assignment.as_ref().map(|a| a.share.map(|t| Some(container_of(t)?.id.clone())));
        Sight {
            share: share.unwrap_or_default(),
            volumes_from: volumes_from.filter_map(|(t, ro)| Some((container_of(t)?.id.clone(), *ro))).collect(),
            networks: self.observed.networks.clone(),
            used_ports: self
                .observed
                .containers
                .values()
                .flat_map(|c| &c.ports)
                .map(|p| (p.protocol, p.host_port))
                .collect(),
            assignment,
        }
    }

    async fn persist(&self, puts: BTreeMap<String, Option<Value>>) {
        if puts.is_empty() {
            return;
        }
        let ledger = self.ledger.clone();
        let written = tokio::task::spawn_blocking(move || ledger.put_locals(puts)).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::debug!("memory is ahead of the ledger");
        }
    }

    async fn repair_ledger(&mut self) {
        if *self.ledger.state().borrow() == LedgerState::Durable || Instant::now() < self.next_repair {
            return;
        }
        self.next_repair = Instant::now() + REPAIR_PERIOD;
        let ledger = self.ledger.clone();
        let repaired = tokio::task::spawn_blocking(move || ledger.repair()).await;
        if matches!(repaired, Ok(Ok(()))) {
            tracing::info!("ledger was written anew");
        }
    }
}

/// The local documents that `updates` change on disk.
fn puts(updates: &Updates, before: &Memory) -> BTreeMap<String, Option<Value>> {
    let json = |v: Result<Value, serde_json::Error>| v.expect("memory is plain data");
    let mut puts = BTreeMap::new();
    for (task, local) in &updates.tasks {
        let words_only = match (local, before.tasks.get(task)) {
            (Some(new), Some(old)) => new.same_on_disk(old),
            _ => false,
        };
        if !words_only {
            puts.insert(format!("{TASK_PREFIX}{task}"), local.as_ref().map(|l| json(serde_json::to_value(l))));
        }
    }
    for (image, used) in &updates.images {
        puts.insert(format!("{IMAGE_PREFIX}{image}"), used.map(|u| json(serde_json::to_value(u))));
    }
    puts
}

/// The documents of an earlier agent. One that cannot be read is named in `unreadable` and is what `instead` makes of it.
fn stored<T: DeserializeOwned>(
    ledger: &Ledger,
    prefix: &str,
    instead: impl Fn(&Value) -> Option<T>,
    unreadable: &mut Vec<String>,
) -> impl Iterator<Item = (String, T)> {
    let mut found = Vec::new();
    for (key, value) in ledger.locals(prefix) {
        let id = key[prefix.len()..].to_owned();
        match T::deserialize(&value) {
            Ok(known) => found.push((id, known)),
            Err(error) => {
                tracing::error!(key, %error, "local document cannot be read, the safe side is taken");
                unreadable.push(format!("local document {key} cannot be read: {error}"));
                found.extend(instead(&value).map(|known| (id, known)));
            }
        }
    }
    found.into_iter()
}

/// A task's memory from a document that cannot be read as a whole: its runs must not go back, what it may hold is given
/// back at its end, and nothing says that it was ever asked to stop.
fn salvaged(value: &Value) -> Option<TaskLocal> {
    let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    let (run, assigned_run) = (number("run"), number("assigned_run"));
    Some(TaskLocal { run, assigned_run, reserved: true, ..Default::default() })
}

fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;

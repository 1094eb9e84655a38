//! Looks at the engine: which containers and networks of ours it has, and what they are.
//!
//! Owns what is still to be looked at, and the containers over which the engine hangs. Must not know: plans, actions.
//!
//! Tasks: one per container over which the engine hangs, in a `JoinSet`; it asks again and again, at most
//! [`SLOW_INSPECTS_MAX`] of them at a time, and ends with the answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use agent_core::{Container, Observed};
use futures_util::StreamExt;
use skein_api::TaskId;
use tokio::{
    sync::Semaphore,
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use crate::engine::{Engine, EngineError};

/// Longest wait for the engine's word on one container before the others go on without it. An inspection takes some
/// milliseconds; an engine that starts a hundred containers was seen to take one to two seconds.
pub(super) const INSPECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the lists of containers and networks, which wait for no container.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// Containers inspected at a time.
const INSPECTS_MAX: usize = 8;
/// Patient inspections at a time, of containers over which the engine hangs.
const SLOW_INSPECTS_MAX: usize = 16;
/// Pause between two of them for one container.
const SLOW_PAUSE: Duration = Duration::from_secs(5);

/// What must be looked at before the next plan.
#[derive(Default)]
pub(super) struct Look {
    pub(super) everything: bool,
    pub(super) networks: bool,
    pub(super) containers: BTreeSet<String>,
}

impl Look {
    fn is_empty(&self) -> bool {
        !self.everything && !self.networks && self.containers.is_empty()
    }
}

/// A container over which the engine hung, and what it says now; none: it is gone, or not ours.
pub(super) type Answered = (String, Option<Container>);

/// A container over which the engine hangs.
struct Slow {
    /// Whose it is, as far as that is known without the engine's word.
    task: Option<TaskId>,
    /// Why its view is old, in words.
    why: String,
    /// Something happened to it since it is being asked for.
    again: bool,
    asking: AbortHandle,
}

/// See the module's text.
pub(super) struct Looks {
    limit: Duration,
    slow: BTreeMap<String, Slow>,
    tasks: JoinSet<Answered>,
    permits: Arc<Semaphore>,
}

impl Default for Looks {
    fn default() -> Self {
        Self {
            limit: INSPECT_TIMEOUT,
            slow: BTreeMap::new(),
            tasks: JoinSet::new(),
            permits: Arc::new(Semaphore::new(SLOW_INSPECTS_MAX)),
        }
    }
}

impl Looks {
    /// Another limit than [`INSPECT_TIMEOUT`].
    #[cfg(test)]
    pub(super) fn with_limit(limit: Duration) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Brings `observed` up to date with what `look` names, but for containers over which the engine hangs: those keep
    /// their old view, if they have one, until [`Looks::answered`]. Cancel-safe: `look` is emptied at the end.
    ///
    /// # Errors
    /// The engine does not answer at all, or not to the lists; `observed` is then older than it should be.
    pub(super) async fn observe(
        &mut self,
        engine: &Engine,
        look: &mut Look,
        observed: &mut Observed,
    ) -> Result<(), EngineError> {
        if look.is_empty() {
            return Ok(());
        }
        if look.everything || look.networks {
            observed.networks = listed("networks", engine.networks()).await?;
        }
        let mut ids: BTreeMap<String, Option<TaskId>> = if look.everything {
            let ids = listed("containers", engine.list_tasks()).await?;
            observed.containers.retain(|id, _| ids.contains_key(id));
            self.slow.retain(|id, slow| {
                let stays = ids.contains_key(id);
                if !stays {
                    slow.asking.abort();
                }
                stays
            });
            ids
        } else {
            let task = |id: &String| observed.containers.get(id).map(|c| c.task.clone());
            look.containers.iter().map(|id| (id.clone(), task(id))).collect()
        };
        for (id, slow) in &mut self.slow {
            // A full look is no news of this container; an event or the end of an action is.
            slow.again |= look.containers.contains(id);
            ids.remove(id);
        }
        let (networks, limit) = (&observed.networks, self.limit);
        let seen: Vec<_> = futures_util::stream::iter(ids)
            .map(|(id, task)| async move { (timeout(limit, engine.inspect(&id, networks)).await, id, task) })
            .buffer_unordered(INSPECTS_MAX)
            .collect()
            .await;
        let mut unreachable = None;
        for (found, id, task) in seen {
            match found {
                Ok(Ok(found)) => see(observed, id, found.map(|f| f.container)),
                Ok(Err(error)) if error.is_unreachable() => unreachable = Some(error),
                Ok(Err(error)) => self.ask_on(engine, observed, (id, task), error.to_string()),
                Err(_) => {
                    let why = format!("the engine hangs over container {id}: no word within {limit:?}");
                    self.ask_on(engine, observed, (id, task), why);
                }
            }
        }
        self.note_unseen(observed);
        match unreachable {
            Some(error) => Err(error),
            None => {
                *look = Look::default();
                Ok(())
            }
        }
    }

    fn note_unseen(&self, observed: &mut Observed) {
        let unseen = self.slow.iter().filter(|(id, _)| !observed.containers.contains_key(*id));
        observed.unseen = unseen.filter_map(|(_, slow)| slow.task.clone()).collect();
    }

    fn ask_on(&mut self, engine: &Engine, observed: &Observed, (id, task): (String, Option<TaskId>), why: String) {
        tracing::warn!(container = id, why, "container keeps its old view, the others go on");
        let (engine, networks, permits, asked) =
            (engine.clone(), observed.networks.clone(), self.permits.clone(), id.clone());
        let asking = self.tasks.spawn(async move {
            loop {
                let permit = permits.acquire().await.expect("the semaphore is never closed");
                // Under the engine's own, far longer limit.
                if let Ok(found) = engine.inspect(&asked, &networks).await {
                    return (asked, found.map(|f| f.container));
                }
                drop(permit);
                tokio::time::sleep(SLOW_PAUSE).await;
            }
        });
        if let Some(old) = self.slow.insert(id, Slow { task, why, again: false, asking }) {
            old.asking.abort();
        }
    }

    /// The next container that the engine hung over and has a word on; none when there is no such container.
    /// Cancel-safe.
    pub(super) async fn answered(&mut self) -> Option<Answered> {
        loop {
            match self.tasks.join_next().await? {
                Ok(answered) => return Some(answered),
                // Cut off because it is gone.
                Err(_) => continue,
            }
        }
    }

    /// Takes an answer in.
    pub(super) fn take(&mut self, (id, found): Answered, observed: &mut Observed, look: &mut Look) {
        // Else it has gone meanwhile.
        let Some(slow) = self.slow.remove(&id) else { return };
        tracing::info!(container = id, "engine has a word on the container again");
        if slow.again {
            look.containers.insert(id.clone());
        }
        see(observed, id, found);
        self.note_unseen(observed);
    }

    /// Whether the engine hangs over this container.
    pub(super) fn waits_for(&self, id: &str) -> bool {
        self.slow.contains_key(id)
    }

    /// Over which containers it hangs, in words.
    pub(super) fn failures(&self) -> impl Iterator<Item = String> {
        self.slow.values().map(|s| s.why.clone())
    }
}

fn see(observed: &mut Observed, id: String, found: Option<Container>) {
    match found {
        Some(container) => drop(observed.containers.insert(container.id.clone(), container)),
        None => drop(observed.containers.remove(&id)),
    }
}

async fn listed<T>(what: &str, list: impl Future<Output = Result<T, EngineError>>) -> Result<T, EngineError> {
    match timeout(LIST_TIMEOUT, list).await {
        Ok(result) => result,
        Err(_) => Err(EngineError::TimedOut { verb: "list", thing: what.to_owned() }),
    }
}

//! Placing the tasks that wait for a node.
//!
//! Tasks of one service ask for the same, so they are placed together: the filters look at all nodes once for a batch,
//! not once for each task. Batches of different services take turns, each sixteen times as far as the one before, so that a
//! service of ten thousand does not take the last place from a service of ten.

use std::collections::{BTreeMap, VecDeque};

use skein_api::{MountKind, NodeId, ServiceId, Task, TaskId, TaskStatus, UnixMillis};

use crate::{
    command::Now,
    core::Core,
    placement,
    rng::Rng,
    scheduler::{Pin, Request},
};

/// What tasks have in common that ask for the same: their service, which of its specifications, and whether they wait
/// for its dependencies.
type Class = (ServiceId, u64, bool);

/// Tasks in the order in which they are placed: the older first, then by turns of their slots.
type Order = (UnixMillis, u32, Option<Class>);

fn class_of(task: &Task) -> Option<Class> {
    task.service.clone().map(|service| (service, task.spec_generation, task.attempt == 0))
}

/// The turn in which a slot is placed: slots below 16, below 256, and so on. A batch on 10,000 nodes takes milliseconds,
/// so a hundred services of a thousand tasks must not take a turn for each task.
fn turn_of(slot: u32) -> u32 {
    slot.checked_ilog2().unwrap_or(0) / 4
}

/// Whether the first of several equal tasks may change where the next ones can go, other than by taking its place: a
/// volume that it makes, a name that another looks for.
fn one_by_one(task: &Task, request: &Request) -> bool {
    let container = &task.spec.container;
    let named = container.mounts.iter().any(|m| m.kind == MountKind::Volume && m.source.is_some());
    named || !container.volumes_from.is_empty() || !container.links.is_empty() || request.looks_for_names()
}

/// Whether two sentences differ in their numbers at most.
fn same_words(a: &str, b: &str) -> bool {
    let words = |c: &char| !c.is_ascii_digit();
    a == b || a.chars().filter(words).eq(b.chars().filter(words))
}

impl Core {
    /// Gives nodes to tasks that have none, as far as there are nodes for them.
    pub(crate) fn place_pending(&mut self, now: Now, rng: &mut Rng) {
        let mut groups: BTreeMap<Order, Vec<(u32, TaskId)>> = BTreeMap::new();
        for id in &self.pending {
            let task = &self.model.tasks[id];
            let order = (task.meta.created_at, turn_of(task.slot), class_of(task));
            groups.entry(order).or_default().push((task.slot, id.clone()));
        }
        // What is placed in this pass frees nothing, so a refusal stands for all of a class; what it may fulfil (an
        // affinity, a link) is tried in the next round.
        let mut refused: BTreeMap<Class, String> = BTreeMap::new();
        for ((.., class), mut tasks) in groups {
            tasks.sort();
            let mut tasks: VecDeque<TaskId> = tasks.into_iter().map(|(_, id)| id).collect();
            let Some(class) = class else {
                for id in tasks {
                    if let Err(message) = self.place_one(&id, now, rng) {
                        self.explain_waiting(&id, &message);
                    }
                }
                continue;
            };
            let outcome = match refused.get(&class) {
                Some(message) => Err(message.clone()),
                None => self.place_class(&mut tasks, now, rng),
            };
            if let Err(message) = outcome {
                for id in tasks {
                    self.explain_waiting(&id, &message);
                }
                refused.insert(class, message);
            }
        }
    }

    /// Places tasks of one class and takes them out of `tasks`, until one finds no place.
    fn place_class(&mut self, tasks: &mut VecDeque<TaskId>, now: Now, rng: &mut Rng) -> Result<(), String> {
        let Some(first) = tasks.front().map(|id| &self.model.tasks[id]) else { return Ok(()) };
        let request = self.request(first, None)?;
        if one_by_one(first, &request) {
            while let Some(id) = tasks.front().cloned() {
                self.place_one(&id, now, rng)?;
                tasks.pop_front();
            }
            return Ok(());
        }
        let count = u32::try_from(tasks.len()).unwrap_or(u32::MAX);
        let batch = self.scheduler.place_batch(&request, count, rng.next_u64());
        for (node, copies) in batch.runs {
            for _ in 0..copies {
                let id = tasks.front().expect("no more were placed than there are");
                self.assign(Task::clone(&self.model.tasks[id]), node.clone(), now, rng)?;
                tasks.pop_front();
            }
        }
        batch.rejection.map_or(Ok(()), |rejection| Err(rejection.summary()))
    }

    fn place_one(&mut self, id: &TaskId, now: Now, rng: &mut Rng) -> Result<(), String> {
        let task = &self.model.tasks[id];
        let node = self.try_place(task, None, rng.next_u64())?;
        self.assign(Task::clone(task), node, now, rng)
    }

    /// A task goes on waiting, and says for what. Where only numbers are others than before the task keeps its words:
    /// otherwise every node that comes or goes would change every task that waits, and `explain` counts anew anyway.
    fn explain_waiting(&mut self, id: &TaskId, message: &str) {
        let task = &self.model.tasks[id];
        if !same_words(message, &task.status.message) {
            let status = TaskStatus { message: message.to_owned(), ..task.status.clone() };
            self.stage_task(Task { status, ..Task::clone(task) });
        }
    }

    /// What a task asks of a node, or what it waits for.
    fn request(&self, task: &Task, on: Option<Pin>) -> Result<Request, String> {
        let pin = self.wait_for(task)?;
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        let request = placement::compile(self, &task.spec, service, pin).map_err(|error| error.to_string())?;
        Ok(match on {
            Some(pin) => request.pinned(pin),
            None => request,
        })
    }

    /// A node for the task, or why there is none.
    pub(crate) fn try_place(&self, task: &Task, on: Option<Pin>, seed: u64) -> Result<NodeId, String> {
        let request = self.request(task, on)?;
        self.scheduler.place(&request, seed).map_err(|rejection| rejection.summary())
    }
}

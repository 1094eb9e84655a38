//! Placing the tasks that wait for a node.
//!
//! Tasks of one service ask for the same, so they are placed together: the filters look at all nodes once for a batch,
//! not once for each task. Batches of different services take turns, each sixteen times as far as the one before, so that a
//! service of ten thousand does not take the last place from a service of ten.
//!
//! A class that found no node is not tried again until something can help it. What keeps it waiting says what that is:
//! when it is the nodes, the scheduler tells of the first that has room ([`crate::scheduler::Scheduler::wait`]), by index;
//! when it is another service that must come first, a change of that service or of its tasks; when it is something else
//! (a pin, the name of a container, addresses), any change that may be it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use skein_api::{MountKind, ServiceId, Task, TaskId, TaskStatus, UnixMillis};

use crate::{
    command::Now,
    core::Core,
    placement,
    rng::Rng,
    scheduler::{ClassId, Pin, Request},
};

/// What tasks have in common that ask for the same: their service, which of its specifications, and whether they wait
/// for its dependencies.
type Class = (ServiceId, u64, bool);

/// Tasks that wait together: those of a class, or one container task.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Class(Class),
    Task(TaskId),
}

/// Tasks in the order in which they are placed: those that count more first, then the older, then by turns of their slots.
type Order = (Reverse<i32>, UnixMillis, u32, Group);

/// Tasks without a node, and what may help them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pending {
    tasks: BTreeMap<TaskId, Group>,
    groups: BTreeMap<Group, BTreeSet<TaskId>>,
    /// To be tried in the next settling.
    stirred: BTreeSet<Group>,
    /// What waits for something else than nodes.
    restless: BTreeSet<Group>,
    /// What waits for a node of a class of the scheduler.
    waiting: BTreeMap<ClassId, BTreeSet<Group>>,
    /// What waits for a service.
    dependents: BTreeMap<ServiceId, BTreeSet<Group>>,
    /// How often a group was tried.
    tried: u64,
}

impl Pending {
    /// Enters a task, which is tried soon, unless it is there.
    pub(crate) fn insert(&mut self, task: &Task) {
        if self.tasks.contains_key(&task.id) {
            return;
        }
        let group = class_of(task).map_or_else(|| Group::Task(task.id.clone()), Group::Class);
        self.groups.entry(group.clone()).or_default().insert(task.id.clone());
        self.stirred.insert(group.clone());
        self.tasks.insert(task.id.clone(), group);
    }

    /// Takes a task out, if it is there.
    pub(crate) fn remove(&mut self, id: &TaskId) {
        let Some(group) = self.tasks.remove(id) else { return };
        let tasks = self.groups.get_mut(&group).expect("every task is in its group");
        tasks.remove(id);
        if tasks.is_empty() {
            self.groups.remove(&group);
            self.stirred.remove(&group);
            self.restless.remove(&group);
        }
    }

    pub(crate) fn contains(&self, id: &TaskId) -> bool {
        self.tasks.contains_key(id)
    }

    /// Every one, by id.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &TaskId> {
        self.tasks.keys()
    }

    /// A group goes on waiting.
    fn wait(&mut self, group: Group, cause: Cause) {
        let groups = match cause {
            Cause::Room(class) => self.waiting.entry(class).or_default(),
            Cause::Dependency(service) => self.dependents.entry(service).or_default(),
            Cause::Other => &mut self.restless,
        };
        groups.insert(group);
    }

    /// Groups that waited are tried again, as far as they have tasks: what waits is not looked up when its last one goes.
    fn stir(&mut self, groups: impl IntoIterator<Item = Group>) {
        self.stirred.extend(groups.into_iter().filter(|group| self.groups.contains_key(group)));
    }

    /// Something changed that is not a node with room.
    pub(crate) fn stir_restless(&mut self) {
        self.stirred.append(&mut self.restless);
    }

    /// A task is tried again.
    pub(crate) fn stir_task(&mut self, id: &TaskId) {
        self.stirred.extend(self.tasks.get(id).cloned());
    }

    /// A node has room for a class.
    pub(crate) fn stir_class(&mut self, class: ClassId) {
        let groups = self.waiting.remove(&class).unwrap_or_default();
        self.stir(groups);
    }

    /// Services changed: what waits for one may wait for another now.
    pub(crate) fn stir_every_dependent(&mut self) {
        let groups = std::mem::take(&mut self.dependents);
        self.stir(groups.into_values().flatten());
    }

    /// A task of a service changed.
    pub(crate) fn stir_dependents(&mut self, service: &ServiceId) {
        let groups = self.dependents.remove(service).unwrap_or_default();
        self.stir(groups);
    }

    /// What waits for nodes shall say anew why.
    pub(crate) fn stir_waiting(&mut self) {
        let groups = std::mem::take(&mut self.waiting);
        self.stir(groups.into_values().flatten());
    }

    /// One task of each group that waits for a node of a class, with that class.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (ClassId, &TaskId)> {
        let groups = self.waiting.iter().flat_map(|(class, groups)| groups.iter().map(|group| (*class, group)));
        groups.filter_map(|(class, group)| Some((class, self.groups.get(group)?.first()?)))
    }

    /// One task of each group that waits for a service, with that service.
    pub(crate) fn dependents(&self) -> impl Iterator<Item = (&ServiceId, &TaskId)> {
        let groups = self.dependents.iter().flat_map(|(service, groups)| groups.iter().map(move |g| (service, g)));
        groups.filter_map(|(service, group)| Some((service, self.groups.get(group)?.first()?)))
    }

    /// One task of each group that waits for something else.
    pub(crate) fn restless(&self) -> impl Iterator<Item = &TaskId> {
        self.restless.iter().filter_map(|group| self.groups.get(group)?.first())
    }

    /// Tasks that nothing would ever try again.
    pub(crate) fn forgotten(&self) -> impl Iterator<Item = &TaskId> {
        let kept = |group: &Group| {
            let mut waiting = self.waiting.values().chain(self.dependents.values());
            self.stirred.contains(group)
                || self.restless.contains(group)
                || waiting.any(|groups| groups.contains(group))
        };
        self.groups.iter().filter(move |(group, _)| !kept(group)).filter_map(|(_, tasks)| tasks.first())
    }

    /// Whether any is to be tried.
    pub(crate) fn is_stirred(&self) -> bool {
        !self.stirred.is_empty()
    }
}

/// What may end a wait.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    /// A node with room, of which the scheduler will tell.
    Room(ClassId),
    /// A service that must come first.
    Dependency(ServiceId),
    /// Something else.
    Other,
}

/// Why a task or a group goes on waiting.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) message: String,
    pub(crate) cause: Cause,
    /// What found no node, when the nodes are the reason.
    pub(crate) request: Option<Box<Request>>,
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self { message, cause: Cause::Other, request: None }
    }
}

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
    /// Gives nodes to those tasks without one that something may have helped, as far as there are nodes for them.
    pub(crate) fn place_pending(&mut self, now: Now, rng: &mut Rng) {
        let mut batches: BTreeMap<Order, Vec<(u32, TaskId)>> = BTreeMap::new();
        for group in std::mem::take(&mut self.pending.stirred) {
            for id in self.pending.groups.get(&group).into_iter().flatten() {
                let task = &self.model.tasks[id];
                let priority = Reverse(task.spec.placement.priority);
                let order = (priority, task.meta.created_at, turn_of(task.slot), group.clone());
                batches.entry(order).or_default().push((task.slot, id.clone()));
            }
        }
        // What is placed in this pass frees nothing, so a refusal stands for all of a group; what it may fulfil (an
        // affinity, a link) is tried in the next round.
        let mut refused: BTreeMap<Group, String> = BTreeMap::new();
        for ((.., group), mut tasks) in batches {
            tasks.sort();
            let mut tasks: VecDeque<TaskId> = tasks.into_iter().map(|(_, id)| id).collect();
            let message = match refused.get(&group) {
                Some(message) => message.clone(),
                None => match self.place_group(&group, &mut tasks, now, rng) {
                    Ok(()) => continue,
                    Err(refusal) => {
                        if let Some(request) = &refusal.request {
                            self.preempt(tasks.iter(), request, now);
                        }
                        self.pending.wait(group.clone(), refusal.cause);
                        refused.insert(group, refusal.message.clone());
                        refusal.message
                    }
                },
            };
            for id in tasks.into_iter().filter(|id| !self.holds.contains_key(id)).collect::<Vec<_>>() {
                self.explain_waiting(&id, &message);
            }
        }
    }

    /// Places tasks of one group and takes them out of `tasks`, until one finds no place.
    fn place_group(
        &mut self,
        group: &Group,
        tasks: &mut VecDeque<TaskId>,
        now: Now,
        rng: &mut Rng,
    ) -> Result<(), Refusal> {
        let Some(first) = tasks.front().map(|id| self.model.tasks[id].clone()) else { return Ok(()) };
        self.pending.tried += 1;
        let request = self.request(&first, None)?;
        if matches!(group, Group::Task(_)) || one_by_one(&first, &request) {
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
        match batch.rejection {
            None => Ok(()),
            Some(rejection) => Err(self.no_room(&request, rejection.summary())),
        }
    }

    fn place_one(&mut self, id: &TaskId, now: Now, rng: &mut Rng) -> Result<(), Refusal> {
        let task = self.model.tasks[id].clone();
        let request = self.request(&task, None)?;
        match self.scheduler.place(&request, rng.next_u64()) {
            Ok(node) => Ok(self.assign(Task::clone(&task), node, now, rng)?),
            Err(rejection) => Err(self.no_room(&request, rejection.summary())),
        }
    }

    /// How often so far waiting tasks were tried, those of a service together: what changes cost.
    pub fn placements_tried(&self) -> u64 {
        self.pending.tried
    }

    fn no_room(&mut self, request: &Request, message: String) -> Refusal {
        let cause = self.scheduler.wait(request).map_or(Cause::Other, Cause::Room);
        let request = Some(Box::new(request.clone()));
        Refusal { message, cause, request }
    }

    /// A task goes on waiting, and says for what. Where only numbers are others than before the task keeps its words:
    /// otherwise every node that comes or goes would change every task that waits, and `explain` counts anew anyway.
    pub(crate) fn explain_waiting(&mut self, id: &TaskId, message: &str) {
        let task = &self.model.tasks[id];
        if !same_words(message, &task.status.message) {
            let status = TaskStatus { message: message.to_owned(), ..task.status.clone() };
            self.stage_task(Task { status, ..Task::clone(task) });
        }
    }

    /// What a task asks of a node, or what it waits for.
    pub(crate) fn request(&self, task: &Task, on: Option<Pin>) -> Result<Request, Refusal> {
        let pin = self.wait_for(task)?;
        let service = task.service.as_ref().and_then(|s| self.model.services.get(s));
        let request = placement::compile(self, &task.spec, service, pin).map_err(|error| error.to_string())?;
        Ok(match on {
            Some(pin) => request.pinned(pin),
            None => request,
        })
    }
}

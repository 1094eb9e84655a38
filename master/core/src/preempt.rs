//! Preemption: a service that may makes room for itself by stopping tasks of services that count less.
//!
//! Decisions that stand here:
//! - Opt-in, and by services alone: who preempts says so (`placement.preempt`), only tasks of services of a lower
//!   `placement.priority` are stopped, and container tasks never.
//! - The plan names the node and its victims before anything happens; it stops as few as possible, of those that count
//!   least: compared by the highest priority among them, then by their number, then by the node's position.
//! - From the plan on the room is **held**: the scheduler counts the waiting task on the node beside its victims, so
//!   that nobody else takes what they give back bit by bit. The hold ends when they have gone, or are wanted again, or
//!   the task or the node is no more.
//! - Victims are replaced like any other task that was asked to stop: where there is room. They can preempt only what
//!   counts less than themselves, so nothing goes round in circles.
//!
//! Holds are memory of the leading master. A new one plans anew, and counts what is stopping already as gone.

use std::{cmp::Reverse, collections::BTreeSet};

use skein_api::{Node, NodeId, Task, TaskId, TaskState};

use crate::{
    command::Now,
    core::Core,
    placement::{facts, placed},
    rng::Rng,
    scheduler::{Pin, Request, Scheduler},
};

/// Nodes of a plan that are looked at in detail: those first in the table where the tasks that count less would leave
/// room.
const NODES_MAX: usize = 32;

/// Tasks of one service for which room is made in one pass.
const PLANS_PER_PASS: usize = 16;

/// Room that is made for a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    pub(crate) node: NodeId,
    /// Tasks that must go; some may be on their way already.
    pub(crate) victims: BTreeSet<TaskId>,
}

/// What a hold is called in the scheduler.
fn hold_id(task: &TaskId) -> TaskId {
    TaskId::new(format!("hold:{task}"))
}

impl Core {
    /// Makes room for tasks of one request that found none, as far as that is allowed.
    pub(crate) fn preempt<'a>(&mut self, tasks: impl Iterator<Item = &'a TaskId>, request: &Request, now: Now) {
        for id in tasks.take(PLANS_PER_PASS) {
            let Some(task) = self.model.tasks.get(id).cloned() else { continue };
            if !task.spec.placement.preempt || self.holds.contains_key(id) {
                continue;
            }
            let Some(hold) = self.plan_preemption(&task, request) else { return };
            let (service, name) = (String::new(), task.name.clone());
            let taken = request.placed(hold_id(id), service, hold.node.clone());
            // Not a replica: only its amounts and ports are taken.
            self.scheduler.apply_task(crate::scheduler::Placed {
                service: None,
                service_name: String::new(),
                labels: Default::default(),
                image: String::new(),
                ..taken
            });
            for victim in &hold.victims {
                self.desire(victim, TaskState::Shutdown, &format!("preempted by {name}"), now);
            }
            self.explain_waiting(id, &self.words_of(&hold));
            self.holds.insert(id.clone(), hold);
        }
    }

    /// `waits for room on h1, stops log.1 and log.2`
    pub(crate) fn words_of(&self, hold: &Hold) -> String {
        let node = self.model.nodes.get(&hold.node).map_or(hold.node.short(), |node| &node.name);
        let names: Vec<&str> =
            hold.victims.iter().filter_map(|id| Some(self.model.tasks.get(id)?.name.as_str())).collect();
        match names.is_empty() {
            true => format!("waits for room on {node}"),
            false => format!("waits for room on {node}, stops {}", names.join(" and ")),
        }
    }

    /// Where room can be made for a task, and what has to go for it: none when there is no such place.
    pub(crate) fn plan_preemption(&self, task: &Task, request: &Request) -> Option<Hold> {
        if !task.spec.placement.preempt {
            return None;
        }
        let held: BTreeSet<&NodeId> = self.holds.values().map(|hold| &hold.node).collect();
        let nodes = self.scheduler.allowed(request).into_iter().filter(|node| !held.contains(node));
        let nodes = nodes.filter_map(|id| self.model.nodes.get(&id));
        let plans = nodes.filter_map(|node| self.plan_on(task, request, node)).take(NODES_MAX);
        let (_, hold) = plans.min_by(|(a, _), (b, _)| a.cmp(b))?;
        Some(hold)
    }

    /// The cheapest set of victims on one node, with what it costs: their highest priority and their number.
    fn plan_on(&self, task: &Task, request: &Request, node: &Node) -> Option<((i32, usize), Hold)> {
        let priority = task.spec.placement.priority;
        let mut alone = Scheduler::new();
        let ready = self.liveness.is_ready(&node.id);
        alone.apply_node(facts(&self.model, node, ready, self.settings.overcommit));
        let (mut going, mut less) = (BTreeSet::new(), Vec::new());
        for other in self.model.node_tasks(&node.id) {
            let Some(place) = placed(&self.model, other) else { continue };
            let served = other.service.is_some();
            if served && other.desired_state > TaskState::Running {
                going.insert(other.id.clone());
            } else if served && other.spec.placement.priority < priority {
                less.push((other, place));
            } else {
                alone.apply_task(place);
            }
        }
        alone.place(request, 0).ok()?;
        // Back come those that count most, the oldest first; who does not fit beside them is a victim.
        less.sort_by_key(|(other, _)| {
            (Reverse(other.spec.placement.priority), other.meta.created_at, other.id.clone())
        });
        let (mut highest, mut victims) = (i32::MIN, going);
        let mut count = 0;
        for (other, place) in less {
            alone.apply_task(place);
            if alone.place(request, 0).is_err() {
                alone.remove_task(&other.id);
                highest = highest.max(other.spec.placement.priority);
                victims.insert(other.id.clone());
                count += 1;
            }
        }
        Some(((highest, count), Hold { node: node.id.clone(), victims }))
    }

    /// Holds whose victims have gone give their task its place; those that have lost their reason end.
    pub(crate) fn follow_holds(&mut self, now: Now, rng: &mut Rng) {
        for id in self.holds.keys().cloned().collect::<Vec<_>>() {
            let hold = &self.holds[&id];
            let victim = |id: &TaskId| self.model.tasks.get(id).filter(|task| placed(&self.model, task).is_some());
            let still_there: Vec<_> = hold.victims.iter().filter_map(victim).collect();
            let wanted_again = still_there.iter().any(|task| task.desired_state == TaskState::Running);
            let waits = self.pending.contains(&id) && self.liveness.is_ready(&hold.node);
            if waits && !wanted_again && !still_there.is_empty() {
                continue;
            }
            let Hold { node, .. } = self.holds.remove(&id).expect("listed just now");
            self.scheduler.remove_task(&hold_id(&id));
            if waits && !wanted_again {
                self.place_held(&id, node, now, rng);
            }
            self.pending.stir_task(&id);
        }
    }

    /// The room is there: the task gets it, unless something came in between; then it waits as before.
    fn place_held(&mut self, id: &TaskId, node: NodeId, now: Now, rng: &mut Rng) {
        let task = self.model.tasks[id].clone();
        let pin = Pin { nodes: BTreeSet::from([node]), reason: "room was made".to_owned() };
        let Ok(request) = self.request(&task, Some(pin)) else { return };
        if let Ok(node) = self.scheduler.place(&request, rng.next_u64()) {
            // Without addresses for it the task goes on waiting, and says so when it is tried again.
            _ = self.assign(Task::clone(&task), node, now, rng);
        }
    }
}

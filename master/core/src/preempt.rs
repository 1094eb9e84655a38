//! Preemption: a service that may makes room for itself by stopping tasks of services that count less.
//!
//! Decisions that stand here:
//! - Opt-in, and by services alone: who preempts says so (`placement.preempt`), only tasks of services of a lower
//!   `placement.priority` are stopped, and container tasks never.
//! - The plan names the node and its victims before anything happens. On a node those that count most stay, of equal ones
//!   the smallest, so that few go; nodes are compared by the highest priority among their victims, then by the number of
//!   victims, then by position.
//! - From the plan on the room is **held**: the scheduler counts the waiting task on the node beside its victims, so
//!   that nobody else takes what they give back bit by bit. The hold ends when the task fits, or nothing is left that
//!   will go, or the task or the node is no more.
//! - Victims are replaced like any other task that was asked to stop: where there is room. They can preempt only what
//!   counts less than themselves, so nothing goes round in circles.
//!
//! Holds are memory of the leading master. A new one plans anew, and counts what is stopping already as gone.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use skein_api::{Availability, Node, NodeId, Preemption, Resources, Task, TaskId, TaskState};

use crate::{
    command::Now,
    core::Core,
    placement::{alone, holds, placed},
    rng::Rng,
    scheduler::{Pin, Request, millionths},
};

/// Nodes of a plan that are looked at in detail: those first in the table where tasks that count less or are going take
/// enough.
const NODES_MAX: usize = 32;

/// Tasks of one service for which room is made in one pass.
const PLANS_PER_PASS: usize = 16;

/// Room that is made for a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    pub(crate) node: NodeId,
    /// Tasks that are stopped for it.
    pub(crate) victims: BTreeSet<TaskId>,
}

/// Whether room for a task may be made on a node that can have it by what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// It is not ready, or takes no tasks.
    Away,
    /// Room is being made there for another task.
    Held,
    /// What must stay leaves too little CPU or memory.
    Full,
    /// Worth a detailed plan.
    Open,
}

/// What a task does for which room is made, and to whom.
const WAITS: [&str; 2] = ["waits", "stops"];

/// What a hold is called in the scheduler.
pub(crate) fn hold_id(task: &TaskId) -> TaskId {
    TaskId::new(format!("hold:{task}"))
}

impl Core {
    /// Makes room for tasks of one request that found none, as far as that is allowed.
    pub(crate) fn preempt<'a>(&mut self, tasks: impl Iterator<Item = &'a TaskId>, request: &Request, now: Now) {
        for id in tasks.take(PLANS_PER_PASS) {
            let Some(task) = self.model.tasks.get(id).cloned() else { continue };
            if task.service.is_none() || !task.spec.placement.preempt || self.holds.contains_key(id) {
                continue;
            }
            let Some(hold) = self.plan_preemption(&task, request) else { return };
            let name = task.name.clone();
            let taken = request.placed(hold_id(id), String::new(), hold.node.clone());
            // Not a replica: only its amounts and ports are taken.
            self.scheduler.apply_task(crate::scheduler::Placed {
                service: None,
                service_name: String::new(),
                labels: Default::default(),
                image: String::new(),
                ..taken
            });
            let words = self.words_of(&hold, WAITS);
            self.explain_waiting(id, &words);
            self.made_room.push(format!("{name} {words}"));
            for victim in &hold.victims {
                self.desire(victim, TaskState::Shutdown, &format!("preempted by {name}"), now);
            }
            self.holds.insert(id.clone(), hold);
        }
    }

    /// `waits for room on h1, stops log.1 and log.2`; with other verbs for a plan that nobody follows yet.
    fn words_of(&self, hold: &Hold, [waits, stops]: [&str; 2]) -> String {
        let node = self.model.node_name(&hold.node);
        let names: Vec<&str> =
            hold.victims.iter().filter_map(|id| Some(self.model.tasks.get(id)?.name.as_str())).collect();
        match names.is_empty() {
            true => format!("{waits} for room on {node}"),
            false => format!("{waits} for room on {node}, {stops} {}", names.join(" and ")),
        }
    }

    /// Where room can be made for a task, and what has to go for it: none when there is no such place.
    fn plan_preemption(&self, task: &Task, request: &Request) -> Option<Hold> {
        let open = self.standings(task, request).filter(|(_, standing)| *standing == Standing::Open);
        self.best_plan(task, request, open.map(|(node, _)| node))
    }

    /// The cheapest plan on the first of some nodes that are worth one.
    fn best_plan<'a>(&self, task: &Task, request: &Request, open: impl Iterator<Item = &'a Node>) -> Option<Hold> {
        let plans = open.take(NODES_MAX).filter_map(|node| self.plan_on(task, request, node));
        plans.min_by(|(a, _), (b, _)| a.cmp(b)).map(|(_, hold)| hold)
    }

    /// The nodes that can have a task by what they are, with what room may be made there; each is looked at when it is
    /// asked for.
    fn standings(&self, task: &Task, request: &Request) -> impl Iterator<Item = (&Node, Standing)> {
        let held: BTreeSet<&NodeId> = self.holds.values().map(|hold| &hold.node).collect();
        let nodes = self.scheduler.allowed(request).into_iter().filter_map(|id| self.model.nodes.get(&id));
        let (priority, asks) = (task.spec.placement.priority, request.reservations());
        nodes.map(move |node| (node, self.standing(node, priority, asks, &held)))
    }

    /// A look at a node before the detailed plan: O(its tasks).
    fn standing(&self, node: &Node, priority: i32, asks: Resources, held: &BTreeSet<&NodeId>) -> Standing {
        if !self.liveness.is_ready(&node.id) || node.spec.availability != Availability::Active {
            return Standing::Away;
        }
        if held.contains(&node.id) {
            return Standing::Held;
        }
        let Some(offered) = self.scheduler.node(&node.id).map(|facts| facts.offered) else { return Standing::Away };
        let stays = self.model.node_tasks(&node.id).filter(|task| holds(task) && !is_free(task, priority));
        let (mut cpus, mut memory) = (u128::from(asks.nano_cpus), u128::from(asks.mem_bytes));
        for task in stays {
            cpus += u128::from(task.spec.resources.reservations.nano_cpus);
            memory += u128::from(task.spec.resources.reservations.mem_bytes);
        }
        match cpus <= u128::from(offered.nano_cpus) && memory <= u128::from(offered.mem_bytes) {
            true => Standing::Open,
            false => Standing::Full,
        }
    }

    /// What preemption does for a task that no node fits: the room that is being made for it, the plan that it would
    /// follow, or why there is none.
    pub(crate) fn preemption(&self, task: &Task, request: &Request) -> Preemption {
        if let Some(hold) = self.holds.get(&task.id) {
            return self.told(hold, WAITS);
        }
        let standings: Vec<(&Node, Standing)> = self.standings(task, request).collect();
        let open = standings.iter().filter(|(_, standing)| *standing == Standing::Open).map(|(node, _)| *node);
        match self.best_plan(task, request, open) {
            Some(hold) => self.told(&hold, ["would wait", "would stop"]),
            None => Preemption { message: self.why_no_room(&standings), ..Preemption::default() },
        }
    }

    fn told(&self, hold: &Hold, verbs: [&str; 2]) -> Preemption {
        let victims = hold.victims.iter().filter_map(|id| Some(self.model.tasks.get(id)?.name.clone()));
        Preemption {
            message: self.words_of(hold, verbs),
            node: self.model.nodes.get(&hold.node).map(|node| node.name.clone()),
            victims: victims.collect(),
        }
    }

    /// `no room can be made: 4 nodes; 1 not ready, paused or drained; on 3 what stays takes too much CPU or memory`
    fn why_no_room(&self, standings: &[(&Node, Standing)]) -> String {
        let all = self.model.nodes.len();
        let mut counts: BTreeMap<Standing, usize> = BTreeMap::new();
        for (_, standing) in standings {
            *counts.entry(*standing).or_default() += 1;
        }
        let of = |standing| counts.get(&standing).copied().unwrap_or(0);
        let parts = [
            (all - standings.len(), "{} ruled out by what they are"),
            (of(Standing::Away), "{} not ready, paused or drained"),
            (of(Standing::Held), "on {} room is made for other tasks"),
            (of(Standing::Full), "on {} what stays takes too much CPU or memory"),
            (of(Standing::Open).min(NODES_MAX), "on {} what stays has what it needs"),
            (of(Standing::Open).saturating_sub(NODES_MAX), "{} were not looked at"),
        ];
        let mut text = format!("no room can be made: {all} {}", if all == 1 { "node" } else { "nodes" });
        for (count, words) in parts.into_iter().filter(|(count, _)| *count > 0) {
            text.push_str("; ");
            text.push_str(&words.replacen("{}", &count.to_string(), 1));
        }
        text
    }

    /// The cheapest set of victims on one node, with what it costs: their highest priority and their number.
    fn plan_on(&self, task: &Task, request: &Request, node: &Node) -> Option<((i32, usize), Hold)> {
        let priority = task.spec.placement.priority;
        let known = self.scheduler.node(&node.id)?;
        let mut alone = alone(self, known.clone(), |other| !is_free(other, priority));
        if alone.fitting(request).is_empty() {
            return None;
        }
        let less = self.model.node_tasks(&node.id).filter(|other| is_free(other, priority));
        let mut less: Vec<_> = less.filter_map(|other| Some((other, placed(&self.model, other)?))).collect();
        less.retain(|(other, _)| other.desired_state == TaskState::Running);
        // Back come those that count most, of equal ones the smallest, then the oldest: who does not fit then goes.
        less.sort_by_key(|(other, _)| {
            let size = share_of(other.spec.resources.reservations, known.offered);
            (Reverse(other.spec.placement.priority), size, other.meta.created_at, other.id.clone())
        });
        let (mut highest, mut victims) = (i32::MIN, BTreeSet::new());
        for (other, place) in less {
            alone.apply_task(place);
            if alone.fitting(request).is_empty() {
                alone.remove_task(&other.id);
                highest = highest.max(other.spec.placement.priority);
                victims.insert(other.id.clone());
            }
        }
        Some(((highest, victims.len()), Hold { node: node.id.clone(), victims }))
    }

    /// Holds whose task fits give it its place; those that have lost their reason end.
    pub(crate) fn follow_holds(&mut self, now: Now, rng: &mut Rng) {
        for id in self.holds.keys().cloned().collect::<Vec<_>>() {
            let hold = &self.holds[&id];
            let node = self.scheduler.node(&hold.node).filter(|facts| facts.ready);
            let task = self.model.tasks.get(&id).filter(|_| self.pending.contains(&id));
            let (fits, going) = match (node, task.map(|task| self.request(task, None))) {
                (Some(node), Some(Ok(request))) => {
                    let going = |task: &Task| task.desired_state > TaskState::Running && holds(task);
                    let fits = !alone(self, node.clone(), |_| true).fitting(&request).is_empty();
                    (fits, self.model.node_tasks(&node.id).any(going))
                }
                _ => (false, false),
            };
            if !fits && going {
                continue;
            }
            let Hold { node, .. } = self.holds.remove(&id).expect("listed just now");
            self.scheduler.remove_task(&hold_id(&id));
            if fits {
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

/// Whether a task's place can be had by who counts so much: it is going anyway, or is a service's that counts less.
fn is_free(task: &Task, priority: i32) -> bool {
    let going = task.desired_state > TaskState::Running;
    task.service.is_some() && (going || task.spec.placement.priority < priority)
}

/// The larger share of an offer that an amount is, in millionths.
fn share_of(amount: Resources, offered: Resources) -> u64 {
    millionths(amount.nano_cpus, offered.nano_cpus).max(millionths(amount.mem_bytes, offered.mem_bytes))
}

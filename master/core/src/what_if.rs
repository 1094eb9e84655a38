//! What would happen if: a question to a copy of the cluster.
//!
//! Owns the copy's short future: the change that is asked about, then settling and hosts that do at once what they are
//! told, until nothing changes any more. Decisions are the master's own, so the answer is what would happen if every
//! container started and every host answered; how long it takes, and what fails on the way, it does not know.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::{
    ApiError, Availability, Meta, Node, NodeId, NodeUpdate, Resources, StackApply, StackPlan, Task, TaskState,
    TaskStatus, WHAT_IF_NODES_MAX, WhatIf, WhatIfAnswer, WhatIfNode, WhatIfTask,
};

use crate::{
    command::{Command, Context, Now, Reply},
    core::Core,
    meta,
    model::{Change, Object},
    placement,
    rng::Rng,
};

/// Rounds of a copy's future. A chain of services that depend on each other takes one for each.
const ROUNDS_MAX: usize = 200;

/// Sentences of a plan about room that its tasks make for themselves; the others are counted.
const ROOMS_MAX: usize = 20;

/// Where live tasks are, by name, with what they wait for.
type Places = BTreeMap<String, (Option<NodeId>, String)>;

impl Core {
    /// Answers a question; this core is a copy and of no use afterwards. O(tasks) per round.
    ///
    /// # Errors
    /// A node that is not there, a number of hosts that is too large, or the refusal of the stack.
    pub fn what_if(mut self, question: &WhatIf) -> Result<WhatIfAnswer, ApiError> {
        let now = self.now;
        // What is under way already is not an effect of the question.
        self.live_on(now);
        let (before, loads) = (self.places(), self.loads());
        let mut lost = BTreeSet::new();
        let mut plan = None;
        match question {
            WhatIf::NodeDown(nodes) => {
                for node in self.named(nodes)? {
                    self.lose(&node, now);
                    lost.insert(node);
                }
            }
            WhatIf::Drain(nodes) => {
                for node in self.named(nodes)? {
                    let update = NodeUpdate { availability: Some(Availability::Drain), ..NodeUpdate::default() };
                    self.execute(&Command::NodeUpdate { node: node.to_string(), update }, &context(now))?;
                }
            }
            WhatIf::AddNode { like, count } => self.add_like(like, *count, now)?,
            WhatIf::Up(apply) => {
                let apply = StackApply { dry_run: false, ..(**apply).clone() };
                let reply = self.execute(&Command::StackApply(Box::new(apply)), &context(now))?;
                plan = if let Reply::Plan(plan) = reply { Some(plan) } else { None };
            }
        }
        let rooms = self.live_on(now);
        Ok(WhatIfAnswer { rooms, ..self.answer(&before, &loads, &lost, plan) })
    }

    /// Which tasks would be stopped when a stack is applied, so that others have room: one sentence for each task that
    /// makes room for itself, in the order in which they would; this core is a copy and of no use afterwards.
    ///
    /// # Errors
    /// The refusal of the stack.
    pub fn preemptions(mut self, apply: &StackApply) -> Result<Vec<String>, ApiError> {
        let now = self.now;
        self.live_on(now);
        let apply = StackApply { dry_run: false, ..apply.clone() };
        self.execute(&Command::StackApply(Box::new(apply)), &context(now))?;
        let mut rooms = self.live_on(now);
        if rooms.len() > ROOMS_MAX {
            let more = rooms.split_off(ROOMS_MAX).len();
            rooms.push(format!("{more} more tasks make room for themselves"));
        }
        Ok(rooms)
    }

    /// Nodes by name, id or prefix.
    fn named(&self, references: &[String]) -> Result<Vec<NodeId>, ApiError> {
        references.iter().map(|reference| self.model.find_node(reference).map(|node| node.id.clone())).collect()
    }

    /// Hosts like one that is there: its labels, its platform and what it offers.
    fn add_like(&mut self, like: &str, count: u32, now: Now) -> Result<(), ApiError> {
        if count == 0 || count > WHAT_IF_NODES_MAX {
            let message = format!("{count} hosts: 1 to {WHAT_IF_NODES_MAX} can be asked about");
            return Err(ApiError::new("bad_request", message));
        }
        let model = self.model.find_node(like)?.clone();
        let mut rng = Rng::new(1);
        for number in 1..=count {
            let name = format!("{}-new-{number}", model.name);
            let mut node = Node {
                id: NodeId::new(rng.id()),
                meta: Meta::default(),
                name: name.clone(),
                host_index: self.free_host_index(0)?,
                key_digest: rng.id(),
                status: None,
                ..model.clone()
            };
            node.spec.availability = Availability::Active;
            node.description.hostname = name;
            (node.description.underlay4, node.description.underlay6) = (None, None);
            let id = node.id.clone();
            self.stage(Change::Upsert(Object::Node(Box::new(node))));
            self.session_opened(&id, now);
        }
        Ok(())
    }

    /// Settles and obeys until nothing changes. Returns for whom room was made on the way.
    fn live_on(&mut self, now: Now) -> Vec<String> {
        let mut rooms = Vec::new();
        for round in 0..ROUNDS_MAX {
            self.settle(now, round as u64);
            rooms.append(&mut self.made_room);
            let decided = !self.take_staged().is_empty();
            if !self.obey(now) && !decided {
                break;
            }
        }
        rooms
    }

    /// Every host that is there has done what it was told; true when that changed anything.
    fn obey(&mut self, now: Now) -> bool {
        let reached = |task: &Task| task.node.as_ref().is_some_and(|node| self.is_ready(node));
        let next = |task: &Task| match (task.desired_state, task.status.state) {
            (_, state) if state.is_terminal() => None,
            (TaskState::Running, state) if state < TaskState::Running => Some(TaskState::Running),
            (TaskState::Running, _) => None,
            _ => Some(TaskState::Shutdown),
        };
        let tasks = self.model.tasks.values().filter(|task| reached(task));
        let changed: Vec<Task> = tasks
            .filter_map(|task| {
                let status = TaskStatus { state: next(task)?, since: now.wall, ..TaskStatus::default() };
                Some(Task { status, ..Task::clone(task) })
            })
            .collect();
        let any = !changed.is_empty();
        for task in changed {
            self.stage(Change::Upsert(Object::Task(Arc::new(task))));
        }
        any
    }

    /// Live tasks by name.
    fn places(&self) -> Places {
        let live = |task: &&Arc<Task>| task.desired_state == TaskState::Running && !task.status.state.is_terminal();
        let place = |task: &Arc<Task>| (task.name.clone(), (task.node.clone(), task.status.message.clone()));
        self.model.tasks.values().filter(live).map(place).collect()
    }

    /// Tasks of each node that hold their place, and what they set aside.
    fn loads(&self) -> BTreeMap<NodeId, (u32, Resources)> {
        let mut loads: BTreeMap<NodeId, (u32, Resources)> = BTreeMap::new();
        for task in self.model.tasks.values().filter(|task| placement::holds(task)) {
            let Some(node) = &task.node else { continue };
            let (count, sum) = loads.entry(node.clone()).or_default();
            let takes = task.spec.resources.reservations;
            *count += 1;
            sum.nano_cpus = sum.nano_cpus.saturating_add(takes.nano_cpus);
            sum.mem_bytes = sum.mem_bytes.saturating_add(takes.mem_bytes);
        }
        loads
    }

    fn answer(
        &self,
        before: &Places,
        loads: &BTreeMap<NodeId, (u32, Resources)>,
        lost: &BTreeSet<NodeId>,
        plan: Option<StackPlan>,
    ) -> WhatIfAnswer {
        let after = self.places();
        let name = |id: &Option<NodeId>| {
            let id = id.as_ref()?;
            Some(self.model.nodes.get(id).map_or_else(|| id.short().to_owned(), |node| node.name.clone()))
        };
        let mut tasks = Vec::new();
        for task in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
            let (from, to) = (before.get(task), after.get(task));
            let stays_lost = to.and_then(|(node, _)| node.as_ref()).is_some_and(|node| lost.contains(node));
            let unchanged = from.map(|(node, _)| node) == to.map(|(node, _)| node);
            if unchanged && !stays_lost {
                continue;
            }
            let message = match to {
                Some((Some(_), _)) if stays_lost => "lost with its host: container tasks are not replaced".to_owned(),
                Some((None, why)) => why.clone(),
                None => "removed".to_owned(),
                Some(_) => String::new(),
            };
            let from = from.and_then(|(node, _)| name(node));
            let to = to.filter(|_| !stays_lost).and_then(|(node, _)| name(node));
            tasks.push(WhatIfTask { name: task.clone(), from, to, message });
        }
        let now = self.loads();
        let nodes = self.model.nodes.values().filter_map(|node| {
            let (tasks_before, reserved_before) = loads.get(&node.id).copied().unwrap_or_default();
            // What holds its place on a lost host until it is heard of again is of no use to anybody.
            let there = now.get(&node.id).filter(|_| !lost.contains(&node.id));
            let (tasks_after, reserved_after) = there.copied().unwrap_or_default();
            let (name, offered) = (node.name.clone(), node.description.offered);
            let changed = (tasks_before, reserved_before) != (tasks_after, reserved_after);
            changed.then_some(WhatIfNode { name, tasks_before, tasks_after, reserved_before, reserved_after, offered })
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        WhatIfAnswer { summary: summary(&tasks), tasks, nodes, rooms: Vec::new(), plan }
    }
}

/// `2 tasks would move, 1 would wait`.
fn summary(tasks: &[WhatIfTask]) -> String {
    let count = |of: &dyn Fn(&WhatIfTask) -> bool| tasks.iter().filter(|task| of(task)).count();
    let removed = |task: &WhatIfTask| task.to.is_none() && task.message == "removed";
    let parts = [
        (count(&|task| task.from.is_some() && task.to.is_some()), "would move"),
        (count(&|task| task.from.is_none() && task.to.is_some()), "would start"),
        (count(&|task| task.to.is_none() && !removed(task)), "would find no place"),
        (count(&removed), "would be removed"),
    ];
    let words = parts.iter().filter(|(count, _)| *count > 0);
    let words: Vec<String> =
        words.map(|(count, verb)| format!("{count} {} {verb}", if *count == 1 { "task" } else { "tasks" })).collect();
    if words.is_empty() { "no task would be elsewhere".to_owned() } else { words.join(", ") }
}

fn context(now: Now) -> Context {
    meta::internal("what-if", "a question", now, 2)
}

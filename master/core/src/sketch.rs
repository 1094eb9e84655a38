//! Copies of a core for questions, made where they are asked.
//!
//! A core is mostly indexes, and copying those takes longer than the loop may stand still: at 10,000 nodes and 100,000
//! tasks a third of a second. A sketch has what they follow from, objects by reference where there are many of them, and
//! what does not follow from objects: who is heard of, positions of nodes, room that is held. The copy decides as the
//! original does; of what agents were told it knows nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::{NodeId, ServiceId, Task, TaskId};

use crate::{
    command::Now,
    core::{Core, Settings},
    liveness::Liveness,
    loss::Loss,
    model::Object,
    preempt::{Hold, hold_id},
    scheduler::{NodeFacts, Placed},
};

/// What a copy is made from.
#[derive(Debug)]
pub struct Sketch {
    settings: Settings,
    /// All but the tasks.
    objects: Vec<Object>,
    tasks: Vec<Arc<Task>>,
    /// Nodes by their position in the scheduler's table.
    table: Vec<Option<NodeId>>,
    liveness: Liveness,
    loss: Loss,
    holds: BTreeMap<TaskId, Hold>,
    /// What the holds take.
    held: Vec<Placed>,
    timers: BTreeSet<(u64, ServiceId)>,
    pauses: BTreeMap<TaskId, u64>,
    now: Now,
}

impl Core {
    /// What a copy can be made from, elsewhere. O(objects), some milliseconds per 100,000.
    pub fn sketch(&self) -> Sketch {
        Sketch {
            settings: self.settings.clone(),
            objects: self.model.objects_but_tasks(),
            tasks: self.model.tasks.values().cloned().collect(),
            table: self.scheduler.table().map(|id| id.cloned()).collect(),
            liveness: self.liveness.clone(),
            loss: self.loss.clone(),
            holds: self.holds.clone(),
            held: self.holds.keys().filter_map(|id| self.scheduler.task(&hold_id(id))).collect(),
            timers: self.timers.clone(),
            pauses: self.pauses.clone(),
            now: self.now,
        }
    }
}

impl Sketch {
    /// The copy. Takes as long as reading a store into memory.
    pub fn into_core(self) -> Core {
        let mut core = Core::load(self.settings, Vec::new(), self.now);
        core.liveness = self.liveness;
        let (nodes, others): (Vec<_>, Vec<_>) =
            self.objects.into_iter().partition(|object| matches!(object, Object::Node(_)));
        let mut nodes: BTreeMap<String, Object> = nodes.into_iter().map(|node| (node.key().id, node)).collect();
        // In the order of the table; what stands in for a gap goes when all have their positions.
        let mut gaps = Vec::new();
        for (at, id) in self.table.iter().enumerate() {
            match id.as_ref().and_then(|id| nodes.remove(id.as_str())) {
                Some(node) => core.enter(node),
                None => {
                    let id = NodeId::new(format!("gap {at}"));
                    core.scheduler.apply_node(NodeFacts { id: id.clone(), ..NodeFacts::default() });
                    gaps.push(id);
                }
            }
        }
        gaps.iter().for_each(|id| core.scheduler.remove_node(id));
        others.into_iter().for_each(|object| core.enter(object));
        self.tasks.into_iter().for_each(|task| core.enter(Object::Task(task)));
        self.held.into_iter().for_each(|held| core.scheduler.apply_task(held));
        (core.loss, core.holds, core.timers, core.pauses) = (self.loss, self.holds, self.timers, self.pauses);
        core.look_at_everything();
        core
    }
}

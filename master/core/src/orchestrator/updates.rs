//! How the tasks of a service follow a change of it: in which order a task is replaced, and how many at a time.
//!
//! Stop first: a task is told to stop, and its successor comes when it has. Start first: a task that is served goes on
//! until its successor in the slot is, so that with the time for open connections (`drain`) nothing is lost:
//!
//! ```text
//! old is served ─> successor made ─> successor is served ─> old shall stop ─> drains ─> stops
//!                       │ it ends ──────> the restart policy says when the next is tried; the old one goes on
//! ```
//!
//! A slot is *on its way* from the moment its task of before the change is given up, or its successor made, until a task
//! of the new generation is served and the service's pause is over. No more slots than `parallelism` begin while others
//! are on their way; what is not served anyway has nothing to lose and does not wait.

use std::collections::BTreeMap;

use skein_api::{Service, Task, TaskState, UpdateConfig, UpdateOrder};

use super::{Next, Slot, Step, age, is_live, next_attempt};
use crate::{command::Now, core::Core, dispatch::is_served};

/// How many more slots of a service may begin to follow its change.
pub(super) struct Budget(usize);

impl Budget {
    /// One more, if it may.
    fn take(&mut self) -> bool {
        let may = self.0 > 0;
        self.0 = self.0.saturating_sub(1);
        may
    }
}

/// Where a slot is on its way to the service's present generation.
enum Stage {
    /// Its youngest task is served and of before.
    Before,
    /// Neither.
    OnItsWay,
    /// This task is of now and is served.
    There(skein_api::TaskId),
    /// Its task of now has completed.
    Over,
}

impl Core {
    /// What may begin now, of all slots of a service; adds the pauses that are to be waited for. O(tasks) where there is
    /// a bound and something to replace.
    pub(super) fn update_budget(
        &self,
        service: &Service,
        slots: &BTreeMap<Slot, Vec<&Task>>,
        now: Now,
        steps: &mut Vec<Step>,
    ) -> Budget {
        let UpdateConfig { parallelism, delay_ms, .. } = service.spec.update;
        if parallelism == 0 {
            return Budget(usize::MAX);
        }
        let generation = service.meta.generation;
        if !slots.values().flatten().any(|task| is_live(task) && task.spec_generation != generation) {
            return Budget(0);
        }
        let mut on_their_way = 0;
        for tasks in slots.values() {
            match stage(tasks, generation) {
                Stage::Before | Stage::Over => {}
                Stage::OnItsWay => on_their_way += 1,
                Stage::There(task) if delay_ms > 0 && self.pauses.get(&task).is_none_or(|due| *due > now.mono_ms) => {
                    on_their_way += 1;
                    steps.push(Step::Wait(task, delay_ms));
                }
                Stage::There(_) => {}
            }
        }
        Budget((parallelism as usize).saturating_sub(on_their_way))
    }

    /// What may begin where one slot is looked at alone: everything or, of a service with a bound, nothing. Its other
    /// tasks bring all of it to be looked at.
    pub(super) fn update_budget_alone(service: &Service) -> Budget {
        Budget(if service.spec.update.parallelism == 0 { usize::MAX } else { 0 })
    }

    /// Replaces what a slot has that is live, if it is to be replaced. `live` in order of age, not empty.
    pub(super) fn plan_live(
        &self,
        service: &Service,
        slot: Slot,
        (live, tasks): (&[&Task], &[&Task]),
        budget: &mut Budget,
        now: Now,
        steps: &mut Vec<Step>,
    ) {
        let start_first = service.spec.update.order == UpdateOrder::StartFirst;
        let keeper = live.iter().copied().rev().find(|task| start_first && is_served(task));
        let Some((newest, older)) = live.split_last() else { return };
        let changed = newest.spec_generation != service.meta.generation;
        let before = matches!(stage(tasks, service.meta.generation), Stage::Before);
        let stop = |task: &Task, why| Step::Desire(task.id.clone(), TaskState::Shutdown, why);
        if !changed && !self.is_drained(newest) {
            // Its predecessor goes when it is served itself.
            let goes = older.iter().filter(|task| keeper.is_none_or(|keeper| keeper.id != task.id));
            let why = if start_first { "its successor is served" } else { "more than one in its slot" };
            steps.extend(goes.map(|task| stop(task, why)));
            return;
        }
        let Some(keeper) = keeper else {
            steps.extend(older.iter().map(|task| stop(task, "more than one in its slot")));
            if !changed {
                steps.push(stop(newest, "node drained"));
            } else if !before || budget.take() {
                steps.push(stop(newest, "service changed"));
            }
            return;
        };
        steps.extend(live.iter().filter(|task| task.id != keeper.id).map(|task| stop(task, "service changed")));
        if before && !budget.take() {
            return;
        }
        let tried = tasks.iter().filter(|task| task.status.state.is_terminal() && age(task) > age(keeper));
        let last = tried.max_by_key(|task| age(task)).copied();
        steps.extend(self.next_step(service, slot, last, now));
    }

    /// What follows the last task of a slot, as a step.
    pub(super) fn next_step(&self, service: &Service, slot: Slot, last: Option<&Task>, now: Now) -> Option<Step> {
        let waited = last.and_then(|t| self.pauses.get(&t.id)).is_some_and(|due| *due <= now.mono_ms);
        match next_attempt(service, last, now.wall, waited) {
            Next::Done => None,
            Next::After(pause_ms) => last.map(|task| Step::Wait(task.id.clone(), pause_ms)),
            Next::Now(attempt, since) => Some(Step::Make(slot, attempt, since)),
        }
    }
}

fn stage(tasks: &[&Task], generation: u64) -> Stage {
    let Some(last) = tasks.iter().max_by_key(|task| age(task)) else { return Stage::OnItsWay };
    match (last.spec_generation == generation, is_served(last)) {
        (true, true) => Stage::There(last.id.clone()),
        (true, false) if last.status.state == TaskState::Complete => Stage::Over,
        (false, true) => Stage::Before,
        _ => Stage::OnItsWay,
    }
}

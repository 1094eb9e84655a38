//! How many actions run at a time: which of a plan's may begin beside those that are in flight.

use crate::{Action, ActionKind};

/// Preparations (with their pulls) at a time: more only share the same disk and line.
pub const CREATES_MAX: usize = 8;
/// Stops at a time: they mostly wait for a grace period.
pub const STOPS_MAX: usize = 64;
/// Other actions at a time.
pub const OTHERS_MAX: usize = 8;

/// Index of the class, and how many of it may run.
fn class(kind: ActionKind) -> (usize, usize) {
    match kind {
        ActionKind::CreateContainer => (0, CREATES_MAX),
        ActionKind::StopContainer => (1, STOPS_MAX),
        _ => (2, OTHERS_MAX),
    }
}

/// The first of `actions` that find room, in order. The others are in the next plan, which the end of any action brings
/// about.
pub fn admit(in_flight: impl IntoIterator<Item = ActionKind>, actions: Vec<Action>) -> Vec<Action> {
    let mut running = [0_usize; 3];
    for kind in in_flight {
        running[class(kind).0] += 1;
    }
    let mut admitted = actions;
    admitted.retain(|action| {
        let (class, max) = class(action.kind());
        let room = running[class] < max;
        running[class] += usize::from(room);
        room
    });
    admitted
}

#[cfg(test)]
mod tests {
    use skein_api::TaskId;

    use super::*;

    #[test]
    fn each_class_has_its_own_room() {
        let create = |n: usize| Action::CreateContainer { task: TaskId::new(format!("c{n}")) };
        let release = |n: usize| Action::ReleaseTask { task: TaskId::new(format!("r{n}")) };
        let plan: Vec<Action> = (0..10).flat_map(|n| [create(n), release(n)]).collect();
        let running = [ActionKind::CreateContainer, ActionKind::StopContainer];
        let admitted = admit(running, plan.clone());
        let of = |kind| admitted.iter().filter(|a| a.kind() == kind).count();
        assert_eq!((of(ActionKind::CreateContainer), of(ActionKind::ReleaseTask)), (CREATES_MAX - 1, OTHERS_MAX));
        assert_eq!(admitted[0], plan[0], "the first come first");
    }
}

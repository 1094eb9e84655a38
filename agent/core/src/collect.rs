//! What is collected, and when.
//!
//! - An **ended container of a service task** is kept while it is the newest ended one of its slot, so that its logs
//!   can be read; an older one is removed with its anonymous volumes. It goes at once when the master wants the task
//!   removed or no longer knows it.
//! - A **container task** keeps its container until it is removed: its file system is the user's.
//! - An **image** is removed when *we* pulled it and no task and no container of ours referred to it for
//!   [`IMAGE_UNUSED_MS`] (a setting). Images that were there before, or that somebody else uses, stay.
//! - Named volumes are never collected.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{ServiceId, TaskId, UnixMillis};

use crate::{ImageUse, Settings, Updates};

/// Ended containers that are kept per slot of a service.
pub const ENDED_KEPT_PER_SLOT: usize = 1;
/// An image that was unused for this long is removed: a day.
pub const IMAGE_UNUSED_MS: u64 = 24 * 3_600_000;
/// How exactly the last use of an image is remembered: one write per image and hour.
pub const IMAGE_TOUCH_MS: u64 = 3_600_000;

/// An ended container of a service task that is still assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) service: ServiceId,
    pub(crate) slot: u32,
    /// When it ended (or was made, if it never started).
    pub(crate) at: UnixMillis,
    pub(crate) task: TaskId,
    pub(crate) container: String,
}

/// Those of `ended` that go, in a stable order.
pub(crate) fn surplus(mut ended: Vec<Ended>) -> Vec<Ended> {
    // Newest first within a slot; the id settles ties.
    ended.sort_by(|a, b| (&a.service, a.slot, b.at, &b.task).cmp(&(&b.service, b.slot, a.at, &a.task)));
    let mut slot: Option<(ServiceId, u32)> = None;
    let mut seen = 0;
    ended.retain(|e| {
        if slot.as_ref().is_none_or(|(service, n)| (service, *n) != (&e.service, e.slot)) {
            slot = Some((e.service.clone(), e.slot));
            seen = 0;
        }
        seen += 1;
        seen > ENDED_KEPT_PER_SLOT
    });
    ended
}

/// Which images go now, when the next one may, and which last uses to remember.
pub(crate) fn images(
    known: &BTreeMap<String, ImageUse>,
    referenced: &BTreeSet<&str>,
    settings: &Settings,
    now: UnixMillis,
    updates: &mut Updates,
) -> (Vec<String>, Option<UnixMillis>) {
    let mut gone = Vec::new();
    let mut next: Option<UnixMillis> = None;
    for (image, used) in known {
        if referenced.contains(image.as_str()) {
            if now.since_ms(used.last_used) >= IMAGE_TOUCH_MS {
                updates.images.insert(image.clone(), Some(ImageUse { last_used: now }));
            }
        } else if let Some(unused_ms) = settings.image_unused_ms {
            let at = used.last_used.plus_ms(unused_ms);
            if at <= now {
                gone.push(image.clone());
            } else {
                next = Some(next.map_or(at, |n| n.min(at)));
            }
        }
    }
    (gone, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(service: &str, slot: u32, at: u64, task: &str) -> Ended {
        Ended {
            service: ServiceId::new(service),
            slot,
            at: UnixMillis(at),
            task: TaskId::new(task),
            container: format!("c-{task}"),
        }
    }

    #[test]
    fn the_newest_of_a_slot_stays() {
        let all = vec![ended("a", 1, 5, "1"), ended("b", 1, 1, "2"), ended("a", 1, 9, "3"), ended("a", 2, 1, "4")];
        let gone: Vec<String> = surplus(all).into_iter().map(|e| e.task.to_string()).collect();
        assert_eq!(gone, ["1"]);
    }

    #[test]
    fn images_go_when_unused_for_long() {
        let known = BTreeMap::from([
            ("old".to_owned(), ImageUse { last_used: UnixMillis(0) }),
            ("used".to_owned(), ImageUse { last_used: UnixMillis(0) }),
            ("young".to_owned(), ImageUse { last_used: UnixMillis(5_000) }),
        ]);
        let mut updates = Updates::default();
        let now = UnixMillis(IMAGE_UNUSED_MS);
        let answer = images(&known, &BTreeSet::from(["used"]), &Settings::default(), now, &mut updates);
        assert_eq!(answer, (vec!["old".to_owned()], Some(UnixMillis(IMAGE_UNUSED_MS + 5_000))));
        assert_eq!(updates.images, BTreeMap::from([("used".to_owned(), Some(ImageUse { last_used: now }))]));
        let off = Settings { image_unused_ms: None };
        assert_eq!(images(&known, &BTreeSet::new(), &off, now, &mut Updates::default()), (vec![], None));
    }
}

//! What tasks are like that are alike: interned once, so that placing one more is a few additions.
//!
//! Owns what a task takes and by what filters find it, without its identity. It must not know nodes. A profile lives
//! as long as a task has it; its id is used again afterwards.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use super::{class::ClassId, columns::DIMENSIONS, interner::Services};
use crate::scheduler::facts::Placed;

/// A profile by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProfileId(pub(super) u32);

impl ProfileId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Profile {
    /// A task of this profile with neither identity, name nor node.
    pub(super) like: Placed,
    pub(super) amounts: [u64; DIMENSIONS],
    /// See [`Services`]; 0 for none.
    pub(super) service: u32,
    /// Classes for which a task of this profile changes more than amounts on its node, a port or an affinity; and
    /// whether that can decide if they may go there.
    pub(super) touches: Vec<(ClassId, bool)>,
    /// Tasks that have it.
    pub(super) tasks: u32,
}

/// All profiles.
#[derive(Clone, Debug, Default)]
pub(super) struct Profiles {
    pub(super) all: Vec<Profile>,
    free: Vec<ProfileId>,
    /// By a hash of what they are; the few of one hash are compared.
    by_hash: BTreeMap<u64, Vec<ProfileId>>,
}

impl Profiles {
    /// The profile of a task, counted once more; true when it is new.
    pub(super) fn intern(&mut self, task: &Placed, services: &mut Services) -> (ProfileId, bool) {
        let same = self.by_hash.entry(hash(task)).or_default();
        if let Some(id) = same.iter().find(|id| alike(&self.all[id.index()].like, task)) {
            self.all[id.index()].tasks += 1;
            return (*id, false);
        }
        let like = Placed { task: Default::default(), node: Default::default(), name: String::new(), ..task.clone() };
        let amounts = [task.reservations.nano_cpus, task.reservations.mem_bytes];
        let service = services.intern(task.service.as_ref());
        let profile = Profile { like, amounts, service, touches: Vec::new(), tasks: 1 };
        let id = self.free.pop().unwrap_or_else(|| {
            self.all.push(Profile::default());
            ProfileId(u32::try_from(self.all.len() - 1).expect("fewer profiles than 2^32"))
        });
        self.all[id.index()] = profile;
        same.push(id);
        (id, true)
    }

    /// Counts a task less.
    pub(super) fn release(&mut self, id: ProfileId, services: &mut Services) {
        let profile = &mut self.all[id.index()];
        profile.tasks -= 1;
        if profile.tasks > 0 {
            return;
        }
        let hash = hash(&profile.like);
        services.release(profile.service);
        *profile = Profile::default();
        let same = self.by_hash.get_mut(&hash).expect("it was entered under its hash");
        same.retain(|other| *other != id);
        if same.is_empty() {
            self.by_hash.remove(&hash);
        }
        self.free.push(id);
    }

    /// Those that some task has.
    pub(super) fn used(&self) -> impl Iterator<Item = ProfileId> + '_ {
        let used = self.all.iter().enumerate().filter(|(_, profile)| profile.tasks > 0);
        used.map(|(at, _)| ProfileId(u32::try_from(at).expect("fewer profiles than 2^32")))
    }
}

fn hash(task: &Placed) -> u64 {
    let mut hasher = DefaultHasher::new();
    task.service.as_ref().map(|service| service.as_str()).hash(&mut hasher);
    (&task.image, &task.labels, task.reservations.nano_cpus, task.reservations.mem_bytes).hash(&mut hasher);
    hasher.finish()
}

/// Whether two tasks have the same profile.
pub(super) fn alike(a: &Placed, b: &Placed) -> bool {
    let Placed { task: _, node: _, name: _, service, service_name, image, labels, reservations, generic, ports } = a;
    *service == b.service
        && *service_name == b.service_name
        && *image == b.image
        && *labels == b.labels
        && *reservations == b.reservations
        && *generic == b.generic
        && *ports == b.ports
}

//! Deliberate bugs, which the simulation must find (feature `mutants`; without it every question is a constant `false`).
//!
//! A core asks `mutant!("name")` at the place of the bug. Which one is active is set once per process.

/// The bugs that a process may have, each with what it does.
pub const MUTANTS: &[(&str, &str)] = &[
    ("lost-fsync", "the store acknowledges a commit that a crash then loses"),
    ("early-reply", "users are answered before the commit"),
    ("no-rollback", "a refused commit stays in memory"),
    ("stale-index-bit", "the scheduler keeps a removed task's resources and ports in its index"),
    ("no-capacity", "placement does not look at free resources"),
    ("block-twice", "a block of addresses is given although another host has it"),
    ("state-backward", "a late report takes a task back to an earlier state"),
    ("lost-mark", "a host is not told of one change in eight"),
    ("foreign-objects", "a host is told of tasks of other hosts"),
    ("generation-ignored", "a new session gets no full set although its ledger is at another generation"),
    ("lost-report", "a report is forgotten when it is sent, not when it is confirmed"),
    ("hasty-removal", "an agent removes what it does not know before a master confirmed its assignments"),
    ("lease-reuse", "an address is given again while a task has it"),
    ("hasty-master", "a restarted master calls silent nodes lost at once"),
    ("endless-patience", "a master never calls a silent node lost"),
    ("lost-peer", "an agent leaves one of the other hosts out of each network"),
    ("lost-vtep", "an agent's guard of the VXLAN port leaves one of the other hosts out"),
    ("no-audit", "an agent looks at its kernel only when its assignments change"),
    ("unchecked-records", "a record of the store is used in whatever place it is found"),
    ("version-unchecked", "a master serves an agent that speaks a later version"),
    ("mass-loss", "every silent node is given up at once, however many there are"),
];

/// Sets the active bug of this process, before anything else runs.
///
/// # Errors
/// When the name is none of [`MUTANTS`], another one is active already, or this build has no mutants.
pub fn activate(name: &str) -> Result<(), String> {
    let Some((name, _)) = MUTANTS.iter().find(|(known, _)| *known == name) else {
        return Err(format!("there is no deliberate bug named {name}"));
    };
    active::set(name)
}

#[cfg(feature = "mutants")]
mod active {
    use std::sync::OnceLock;

    static ACTIVE: OnceLock<&str> = OnceLock::new();

    pub(super) fn set(name: &'static str) -> Result<(), String> {
        ACTIVE.set(name).map_err(|_| "a deliberate bug is active already".to_owned())
    }

    /// Whether this is the active bug.
    #[doc(hidden)]
    pub fn is(name: &str) -> bool {
        ACTIVE.get().is_some_and(|active| *active == name)
    }
}

#[cfg(not(feature = "mutants"))]
mod active {
    pub(super) fn set(_: &'static str) -> Result<(), String> {
        Err("this build has no deliberate bugs: build with the feature `mutants`".to_owned())
    }

    /// Never: this build has none.
    #[doc(hidden)]
    #[inline(always)]
    pub fn is(_: &str) -> bool {
        false
    }
}

pub use active::is;

/// Whether the named deliberate bug is active; `false` at compile time without the feature `mutants`.
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutant::is($name)
    };
}

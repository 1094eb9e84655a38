//! The embedded store against disks that lose, tear, reorder, fail, fill up and flip bits; and the conformance suite that
//! every store has to pass.

#![expect(clippy::print_stderr, reason = "the tests say how much they tried")]

mod conformance;
mod crash;
mod disk;
mod faults;
mod files;
mod flips;
mod workload;

/// Whether everything is tried, instead of as much as fits into a run of CI (`SKEIN_LONG=1`).
#[allow(clippy::disallowed_methods, reason = "how long a test runs is the caller's choice")]
fn long() -> bool {
    std::env::var_os("SKEIN_LONG").is_some_and(|value| !value.is_empty())
}

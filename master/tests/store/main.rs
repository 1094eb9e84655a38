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

//! Automation of this repository: set-up, checks, the lab, the demo.
//!
//! A library as well as a program, since the end-to-end tests run in the same lab and check the same needs. Modules:
//! - [`bench`](mod@bench): benchmarks, and the page that their figures stand on
//! - [`cli`]: the commands of `cargo xtask`; the one place where they are wired
//! - [`cluster`]: a real cluster in a lab
//! - [`demo`]: the main job, shown and verified
//! - [`fuzz`]: bad input for parsers, for as long as asked
//! - [`lab`]: several hosts with an engine each, on this machine
//! - [`setup`]: what a host needs, and its installation
//! - [`sim`]: whole clusters in one thread, from one seed
//! - [`test`](mod@test): what CI runs, in order
//! - [`tidy`]: rules of this repository that no other tool checks
//! - [`ui`]: lines on standard error

pub mod bench;
pub mod cli;
pub mod cluster;
pub mod demo;
pub mod fuzz;
pub mod lab;
pub mod setup;
pub mod sim;
pub mod test;
pub mod tidy;
pub mod ui;

//! The agent protocol as it ships, on both ends, over a simulated network: TLS, gRPC, sessions, the loop with its real
//! store, ledgers and identities in real files.
//!
//! ```text
//! scenario ── drives ──> World ─┬─ turmoil: hosts, links, simulated time
//!   (a test)                    ├─ master host: server, agents, loop, store on a disk in memory
//!                               ├─ agent hosts: session, identity, ledger; stand-ins below: network side, executor
//!                               └─ History: what both sides logged, with simulated time
//! ```
//!
//! Each test is one seed, printed first: `SKEIN_SEED=N` runs another, `SKEIN_SEED=A..B` runs many. docs/testing.md says
//! what is simulated and what is real.
#![allow(unsafe_code, reason = "clock and randomness of a simulation are below the C library: see `machine`")]

mod agent;
mod clocks;
mod disk;
mod history;
mod machine;
mod master;
mod masters;
mod partitions;
mod seeds;
mod skew;
mod slow;
mod storms;
mod world;

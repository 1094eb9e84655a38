//! The master's decisions as a whole: a cluster of the real core and pure fake agents that keep ledgers, run tasks and
//! report.
//!
//! - `harness`: the cluster and its agents; every turn checks every invariant
//! - `services`, `containers`, `stacks`, `networks`, `ingress`, `updates`, `nodes`: one scenario per behaviour
//! - `addresses`: static and borrowed ones, and networks that are full
//! - `placing`: where tasks go, and what they are given there
//! - `explaining`, `what_if`: questions; what is proposed or foretold is what then happens
//! - `preempting`: room for what counts more; `preempting_oracle` tries every set of victims
//! - `memory`: what a task costs
//! - `refusals`: bad input changes nothing
//! - `random`: random histories, and what holds in and after each of them

mod addresses;
mod containers;
mod explaining;
mod harness;
mod ingress;
mod memory;
mod networks;
mod nodes;
mod placing;
mod preempting;
mod preempting_oracle;
mod random;
mod refusals;
mod services;
mod stacks;
mod updates;
mod what_if;
mod what_if_random;

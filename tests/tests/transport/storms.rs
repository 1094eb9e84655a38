//! Everybody comes back at once.

use std::time::Duration;

use crate::world::{CONVERGES_WITHIN, World, scenario};

const AGENTS: usize = 30;

/// A window in which arrivals are counted: a handshake costs the master a few milliseconds of a core.
const WINDOW_MS: u64 = 250;

/// At most this share of all agents in one window; without jitter nearly all would be in one.
const CROWD_MAX: usize = AGENTS / 2;

/// Most sessions that began within one window since `from_ms`.
fn crowd(world: &World, from_ms: u64) -> usize {
    let mut began = world.history.times_ms(&["session begun"]);
    began.retain(|at| *at >= from_ms);
    let within = |from: u64| began.iter().filter(|at| (from..from + WINDOW_MS).contains(*at)).count();
    began.iter().map(|at| within(*at)).max().unwrap_or(0)
}

/// A master that is killed three times under thirty agents: each time all are back, spread in time, and nothing is lost.
#[test]
fn a_master_that_returns_is_not_run_over() {
    scenario(AGENTS, |world| {
        world.changes(20);
        world.one_each();
        for round in 1..=3 {
            world.kill_master();
            // Long enough for every agent's back-off to be at its longest.
            world.pass(Duration::from_secs(20));
            world.start_master(world.leading());
            let from_ms = world.now_ms();
            world.until_ready(CONVERGES_WITHIN);
            let crowd = crowd(world, from_ms);
            assert!(crowd <= CROWD_MAX, "{crowd} of {AGENTS} agents within {WINDOW_MS} ms");
            world.everybody_speaks(&format!("round {round}"));
            world.changes(5);
        }
        world.converges(CONVERGES_WITHIN);
    });
}

/// Every agent is cut off at the same moment and for long: all are down, all come back, nothing changed meanwhile.
#[test]
fn a_whole_cluster_that_was_cut_off_comes_back() {
    scenario(AGENTS, |world| {
        world.changes(20);
        world.converges(CONVERGES_WITHIN);
        let before = world.view().tasks;
        for round in 0..2 {
            (1..=AGENTS).for_each(|agent| world.cut(agent));
            world.until("every node is down", Duration::from_secs(25), |w| {
                let nodes = w.nodes();
                w.agents.iter().all(|a| nodes.is_down(a))
            });
            (1..=AGENTS).for_each(|agent| world.heal(agent));
            let from_ms = world.now_ms();
            world.converges(CONVERGES_WITHIN);
            let crowd = crowd(world, from_ms);
            assert!(crowd <= CROWD_MAX, "round {round}: {crowd} of {AGENTS} agents within {WINDOW_MS} ms");
        }
        assert_eq!(world.view().tasks, before, "containers stay where they are");
    });
}

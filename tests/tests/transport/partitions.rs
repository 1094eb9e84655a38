//! Links that lose everything, one way or both, and connections that only one side believes in.

use std::time::Duration;

use crate::{
    machine,
    world::{CONVERGES_WITHIN, World, scenario},
};

/// The master calls a silent node down after 15 s, and looks at clocks every 300 ms. The last heartbeat before the silence
/// may be 5 s old.
const DOWN_AFTER: std::ops::RangeInclusive<u64> = 9_500..=15_500;

/// A broken connection is noticed by a ping (sent after 5 s of silence, lost after 5 s more) or by three heartbeats
/// without an answer.
const NOTICED_WITHIN: Duration = Duration::from_secs(17);

fn is_down(world: &mut World, agent: usize) -> bool {
    let host = world.agent(agent);
    world.nodes().is_down(&host)
}

/// Two of six hosts are cut off. They alone are down, in time and not before; what was changed and said meanwhile arrives.
#[test]
fn cut_off_hosts_are_down_and_the_others_are_not() {
    scenario(6, |world| {
        world.changes(20);
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        let from_ms = world.now_ms();
        (1..=2).for_each(|agent| world.cut(agent));
        world.changes(5);
        let others = |w: &mut World| w.are_ready(3..=6);
        let mut down_ms = None;
        world.pass_while("the others are ready", Duration::from_secs(40), |w| {
            if down_ms.is_none() && is_down(w, 1) {
                down_ms = Some(w.now_ms() - from_ms);
            }
            others(w)
        });
        let down_ms = down_ms.expect("a host that was cut off is down");
        assert!(DOWN_AFTER.contains(&down_ms), "down after {down_ms} ms");
        world.create(1);
        world.everybody_speaks("meanwhile");
        (1..=2).for_each(|agent| world.heal(agent));
        world.converges(CONVERGES_WITHIN);
    });
}

/// One direction of a link fails: both sides notice, whichever it is, and all is well when it is back.
#[test]
fn one_way_is_no_way() {
    scenario(3, |world| {
        world.changes(10);
        world.converges(CONVERGES_WITHIN);
        let master = world.leading();
        for (from, to) in [("a1", master), (master, "a1")] {
            world.note(format_args!("nothing comes from {from} to {to}"));
            world.sim.partition_oneway(from, to);
            let ended = world.said(&["a1", "session ended"]);
            world.create(1);
            world.agent(1).chatter("one way");
            world.until("the agent gives up", NOTICED_WITHIN, |w| w.said(&["a1", "session ended"]) > ended);
            world.until("the master gives up", Duration::from_secs(20), |w| is_down(w, 1));
            world.pass_while("the others are ready", Duration::from_secs(10), |w| w.are_ready(2..=3));
            world.sim.repair_oneway(from, to);
            world.converges(CONVERGES_WITHIN);
        }
    });
}

/// The agent's host loses power and is back before the master has noticed: two sessions of one node, of which the newer
/// counts, and stays when the older one ends.
#[test]
fn a_host_that_lost_power_replaces_its_own_session() {
    scenario(3, |world| {
        world.changes(10);
        world.converges(CONVERGES_WITHIN);
        // Nothing is sent meanwhile, so that nobody tells the master of the older connection's end.
        world.power_off_agent(1);
        world.start_agent(1);
        world.until("the newer session is there", Duration::from_secs(5), |w| w.said(&["session opened"]) == 4);
        assert_eq!(world.said(&["session closed"]), 0, "the older one was open until then");
        world.pass_while("the node is ready", Duration::from_secs(40), |w| w.are_ready(1..=3));
        world.create(1);
        world.converges(CONVERGES_WITHIN);
    });
}

/// The master's host loses power: agents notice though nobody tells them, and find it again.
#[test]
fn a_master_that_vanished_is_noticed() {
    scenario(5, |world| {
        world.changes(10);
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        world.power_off_master();
        let ended = world.said(&["session ended"]);
        world.until("every agent gives up", NOTICED_WITHIN, |w| w.said(&["session ended"]) >= ended + w.agents.len());
        world.everybody_speaks("nobody hears");
        world.start_master(world.leading());
        world.converges(CONVERGES_WITHIN);
    });
}

/// A network that holds everything back for some seconds, and then delivers it, ends no session and loses nothing.
#[test]
fn a_stall_ends_no_session() {
    scenario(3, |world| {
        world.changes(10);
        world.converges(CONVERGES_WITHIN);
        let begun = world.said(&["session begun"]);
        let master = world.leading();
        for _ in 0..3 {
            world.sim.hold("a1", master);
            world.create(1);
            world.agent(1).chatter("held back");
            world.pass(Duration::from_secs(4));
            world.sim.release("a1", master);
            world.converges(Duration::from_secs(10));
        }
        assert_eq!(world.said(&["session begun"]), begun);
    });
}

/// Links that fail at random, for two minutes, under changes and reports.
#[test]
fn flapping_links_lose_nothing() {
    scenario(6, |world| {
        for round in 0..40 {
            let agent = 1 + machine::below(6);
            match machine::below(4) {
                0 => world.cut(agent),
                1 => world.heal(agent),
                2 => world.changes(3),
                _ => {
                    world.agent(agent).chatter(&format!("round {round}"));
                }
            }
            world.pass(Duration::from_millis(500 + 100 * machine::below(50) as u64));
        }
        (1..=6).for_each(|agent| world.heal(agent));
        world.converges(CONVERGES_WITHIN);
    });
}

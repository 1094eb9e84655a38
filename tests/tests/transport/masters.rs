//! A master that dies, moves, or cannot write.

use std::time::Duration;

use crate::world::{CONVERGES_WITHIN, MASTERS, World, scenario};

/// The same store, a new process: every agent is attached again and told everything anew, which changes nothing.
#[test]
fn a_restarted_master_changes_nothing() {
    scenario(6, |world| {
        world.changes(20);
        world.converges(CONVERGES_WITHIN);
        let before = world.view().tasks;
        let follows: usize = world.agents.iter().map(|a| a.seen.follows()).sum();
        world.kill_master();
        world.start_master(world.leading());
        let told = |w: &World| w.agents.iter().map(|a| a.seen.follows()).sum::<usize>() - follows;
        world.until("each agent is told", CONVERGES_WITHIN, |w| told(w) >= w.agents.len());
        world.pass(Duration::from_secs(10));
        world.converges(CONVERGES_WITHIN);
        assert_eq!(world.view().tasks, before);
        assert_eq!(told(world), world.agents.len(), "each agent is told once");
        for agent in &world.agents {
            assert_eq!(agent.seen.generations().len(), 2, "{}: one chain per term", agent.name);
        }
    });
}

/// The store moves to another host, whose address the agents have too. What was said meanwhile arrives there.
#[test]
fn a_master_on_another_host_is_found() {
    scenario(6, |world| {
        world.changes(20);
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        for to in [MASTERS[1], MASTERS[0]] {
            world.power_off_master();
            world.everybody_speaks(to);
            world.pass(Duration::from_secs(8));
            world.start_master(to);
            // An attempt at the address that is dead takes 10 s.
            world.converges(CONVERGES_WITHIN + Duration::from_secs(10));
            world.changes(5);
        }
        world.converges(CONVERGES_WITHIN);
    });
}

/// Reports that a master could not make durable are confirmed once it can, in the same session.
#[test]
fn reports_outlast_a_master_that_cannot_write() {
    scenario(4, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        let begun = world.said(&["session begun"]);
        world.master().disk.set_full(true);
        world.everybody_speaks("refused");
        world.until("the master is read-only", Duration::from_secs(5), |w| w.said(&["master is read-only"]) > 0);
        world.everybody_speaks("refused too");
        world.pass_while("every node is ready", Duration::from_secs(20), |w| w.are_ready(1..=4));
        world.master().disk.set_full(false);
        world.converges(CONVERGES_WITHIN);
        assert_eq!(world.said(&["session begun"]), begun, "sessions go on");
        let view = world.view();
        assert!(view.tasks.values().all(|t| t.status.message == "refused too"), "{view:?}");
    });
}

/// A master that is killed while it cannot write: the next one has what was durable, and gets the rest.
#[test]
fn reports_outlast_a_master_that_dies_read_only() {
    scenario(4, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        world.master().disk.set_full(true);
        world.everybody_speaks("refused");
        world.until("the master is read-only", Duration::from_secs(5), |w| w.said(&["master is read-only"]) > 0);
        world.kill_master();
        world.master().disk.set_full(false);
        world.start_master(world.leading());
        world.converges(CONVERGES_WITHIN);
    });
}

/// What a host says of itself, too: a master that cannot write keeps the session, and has it once it can.
#[test]
fn a_description_outlasts_a_master_that_cannot_write() {
    scenario(2, |world| {
        let describe = |world: &World, site: &str| {
            let process = world.agent(1).process.borrow().clone().expect("it runs");
            process.description.send_modify(|description| site.clone_into(&mut description.site));
        };
        world.master().disk.set_full(true);
        describe(world, "first");
        world.until("the master is read-only", Duration::from_secs(5), |w| w.said(&["master is read-only"]) > 0);
        describe(world, "second");
        world.pass_while("every node is ready", Duration::from_secs(20), |w| w.are_ready(1..=2));
        // A new session of a host whose description the master does not have yet.
        world.kill_agent(2);
        world.start_agent(2);
        world.pass(Duration::from_secs(2));
        world.master().disk.set_full(false);
        world.until("the master knows", Duration::from_secs(10), |w| w.sites() == ["second", ""]);
        assert_eq!(world.said(&["\"a1\"", "session begun"]), 1, "the session goes on");
    });
}

/// With the age of the last heartbeat it is longer than the 15 s after which a silent node is lost.
const HELD_UP: Duration = Duration::from_millis(16_500);

/// A disk that hangs for some seconds holds the master up, which must not take its own silence for that of its agents:
/// no node is lost, and no task replaced.
#[test]
fn a_master_that_was_held_up_loses_nobody() {
    scenario(4, |world| {
        world.serve(8);
        world.converges(CONVERGES_WITHIN);
        let tasks = world.view().tasks;
        for _ in 0..3 {
            world.master().hangs.send_replace(true);
            world.everybody_speaks("held up");
            world.pass(HELD_UP);
            world.master().hangs.send_replace(false);
            world.pass_while("every node is ready", Duration::from_secs(6), |w| w.are_ready(1..=4));
        }
        world.converges(CONVERGES_WITHIN);
        assert!(world.view().tasks.keys().eq(tasks.keys()), "no task is replaced");
    });
}

/// A master that hangs for good is given up, though its process still answers pings; it is found again when it goes on.
#[test]
fn a_master_that_hangs_is_given_up() {
    scenario(3, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        world.master().hangs.send_replace(true);
        world.everybody_speaks("nobody hears");
        world.until("every agent gives up", Duration::from_secs(22), |w| {
            w.said(&["acknowledges no heartbeats"]) == w.agents.len()
        });
        world.pass(Duration::from_secs(20));
        world.master().hangs.send_replace(false);
        world.converges(CONVERGES_WITHIN);
    });
}

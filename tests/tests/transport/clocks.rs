//! Certificates that end, and clocks that are wrong.

use std::time::Duration;

use crate::world::{CONVERGES_WITHIN, World, scenario};

const HOUR_S: i64 = 3_600;
const YEAR_S: i64 = 365 * 24 * HOUR_S;

/// Agents look at their certificates every 10 s.
const RENEWS_WITHIN: Duration = Duration::from_secs(12);

fn renewals(world: &World, agent: &str) -> usize {
    world.said(&[agent, "certificate renewed"])
}

/// At half of its life a certificate is renewed, within the session.
#[test]
fn certificates_are_renewed_in_their_sessions() {
    scenario(4, |world| {
        world.one_each();
        world.everybody_sleeps(11 * HOUR_S - 1_200);
        world.pass(RENEWS_WITHIN);
        assert_eq!(world.said(&["certificate renewed"]), 0, "not before its time");
        world.everybody_sleeps(3 * HOUR_S);
        world.pass(RENEWS_WITHIN);
        (1..=4).for_each(|agent| assert_eq!(renewals(world, &format!("\"a{agent}\"")), 1));
        assert_eq!(world.said(&["session ended"]), 0);
        world.converges(CONVERGES_WITHIN);
    });
}

/// A host that is cut off when the time comes renews when it is back, by the session that it then has.
#[test]
fn a_renewal_waits_for_the_network() {
    scenario(3, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        world.cut(1);
        world.everybody_sleeps(14 * HOUR_S);
        world.pass(Duration::from_secs(30));
        assert_eq!((renewals(world, "\"a1\""), renewals(world, "\"a2\"")), (0, 1));
        world.heal(1);
        world.converges(CONVERGES_WITHIN);
        world.until("it is renewed", RENEWS_WITHIN, |w| renewals(w, "\"a1\"") == 1);
        assert_eq!(world.said(&["certificate is over"]), 0);
    });
}

/// A host that was cut off for longer than its certificate lived gets a new one by its key. So does one that was off.
#[test]
fn a_host_recovers_from_a_certificate_that_ended() {
    scenario(4, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        world.cut(1);
        world.kill_agent(2);
        world.everybody_sleeps(25 * HOUR_S);
        world.pass(Duration::from_secs(30));
        // Those that were connected all the while renew by the connection that stood.
        assert_eq!((renewals(world, "\"a3\""), renewals(world, "\"a4\"")), (1, 1));
        world.heal(1);
        world.start_agent(2);
        world.converges(CONVERGES_WITHIN);
        for agent in ["\"a1\"", "\"a2\""] {
            assert!(world.said(&[agent, "certificate is over"]) > 0, "{agent}");
        }
    });
}

/// A removed node is told so, however old its certificate is, and does not come back.
#[test]
fn a_removed_node_cannot_recover() {
    scenario(2, |world| {
        world.cut(1);
        world.until("it is down", Duration::from_secs(25), |w| !w.are_ready([1]));
        world.pass(Duration::from_secs(10));
        let command = master_core::Command::NodeRemove { node: "a1".into(), force: true };
        world.command(command).expect("a node that is down can be removed");
        world.everybody_sleeps(25 * HOUR_S);
        world.heal(1);
        world.until("it ends", CONVERGES_WITHIN, |w| w.agent(1).ended.borrow().is_some());
        let ended = world.agent(1).ended.borrow().clone().unwrap_or_default();
        assert!(ended.contains("[removed]") && ended.contains("hint: skein-agent leave"), "{ended}");
    });
}

/// A clock that is wrong ends no session. At the next hello it is refused, in words that say what to do, and nobody else
/// notices; set right, the host is back.
fn wrong_clock(seconds: i64, words: &'static [&'static str]) {
    let begun = |world: &World| world.said(&["\"a1\"", "session begun"]);
    let act = move |world: &mut World| {
        world.agent(1).clock.jump(seconds);
        world.create(1);
        world.pass_while("every node is ready", Duration::from_secs(30), |w| w.are_ready(1..=3));
        assert_eq!(begun(world), 1);
        world.kill_agent(1);
        world.start_agent(1);
        world.pass(Duration::from_secs(15));
        assert!(world.said(words) > 0, "{words:?}");
        assert_eq!(begun(world), 1);
        assert!(world.are_ready(2..=3));
        world.agent(1).clock.correct();
        world.converges(CONVERGES_WITHIN);
    };
    scenario(3, act);
}

#[test]
fn a_clock_an_hour_ahead() {
    wrong_clock(HOUR_S, &["\"a1\"", "[clock_off]", "ahead of", "hint: "]);
}

#[test]
fn a_clock_an_hour_behind() {
    wrong_clock(-HOUR_S, &["\"a1\"", "is not valid at this host's time", "hint: the clock"]);
}

#[test]
fn a_clock_a_year_ahead() {
    wrong_clock(YEAR_S, &["\"a1\"", "is not valid at this host's time", "hint: the clock"]);
}

#[test]
fn a_clock_a_year_behind() {
    wrong_clock(-YEAR_S, &["\"a1\"", "is not valid at this host's time", "hint: the clock"]);
}

//! A real master and a fleet of real protocol clients, at a size for every run: that all of it works, not how fast.
//! `cargo xtask bench scale` does the same at full size and measures it.

use std::time::Duration;

use anyhow::{Result, ensure};
use skein_api::{Availability, ExplainQuery, NodeUpdate};
use xtask::{
    bench::scale::rig::{Programs, Rig, Users},
    cluster::program,
};

/// Nothing here takes longer in a development build on two busy cores.
const PATIENCE: Duration = Duration::from_secs(60);

fn rig(agents: u32) -> Result<Rig> {
    let programs = Programs { master: program("skein-master")?, fleet: program("skein-fleet")? };
    let mut rig = Rig::start(programs, agents)?;
    rig.tell(&format!("join {agents}"))?;
    rig.wait("all agents to have a session", PATIENCE, |s| s.sessions == agents as usize)?;
    Ok(rig)
}

#[test]
fn a_fleet_runs_its_tasks_and_a_killed_master_changes_nothing() -> Result<()> {
    let (agents, services, replicas) = (200_u32, 4_u32, 500_u32);
    let tasks = u64::from(services * replicas);
    let mut rig = rig(agents)?;
    rig.apply("load", services, replicas)?;
    rig.wait("all tasks to run", PATIENCE, |s| s.running as u64 == tasks)?;
    let before = rig.ask(|client| async move { client.info().await })?;
    assert_eq!(before.tasks, [("running".to_owned(), tasks)].into());
    assert_eq!(before.nodes, [("ready".to_owned(), u64::from(agents))].into());

    rig.kill_master()?;
    rig.wait("all sessions to end", PATIENCE, |s| s.sessions == 0)?;
    rig.start_master()?;
    rig.wait("all agents to come back", PATIENCE, |s| s.sessions == agents as usize)?;
    // What agents say on their return is said once they have everything again: a restart of a task, or its removal, would
    // be a change by then. A change that is asked for now is the first one since.
    rig.apply("after", 1, 1)?;
    rig.wait("the new task to run", PATIENCE, |s| s.running as u64 == tasks + 1)?;
    let all = rig.ask(|client| async move { client.tasks(&Default::default()).await })?;
    let changed =
        all.iter().filter(|t| t.stack.as_deref() == Some("load") && t.meta.revision > before.revision).count();
    ensure!(changed == 0, "{changed} tasks were changed by the master's death");
    assert_eq!(all.len() as u64, tasks + 1);
    let broken: Vec<String> = rig.ask(|client| async move { client.check().await })?;
    assert_eq!(broken, Vec::<String>::new());
    Ok(())
}

#[test]
fn many_users_and_slow_readers_hold_nobody_up() -> Result<()> {
    let mut rig = rig(50)?;
    // 2,000 tasks are 3 MB as JSON, more than a socket buffers.
    rig.apply("load", 2, 1_000)?;
    rig.wait("all tasks to run", PATIENCE, |s| s.running == 2_000)?;
    let paths =
        ["/v1/info", "/v1/nodes", "/v1/nodes/fleet-00007", "/v1/tasks/load_s000.7", "/v1/tasks?node=fleet-00009"];
    let users = Users { readers: 100, gets: 2_000, paths: paths.map(str::to_owned).into(), watchers: 50, stuck: 10 };
    let (outcome, changes) = rig.users(&users)?;
    assert_eq!(outcome.answers, users.gets);
    assert_eq!(outcome.cut, users.stuck);
    // Every watcher saw the changes: each is some hundred bytes.
    assert!(outcome.event_bytes > 100 * users.watchers as u64, "{outcome:?}");
    // A second is the bound; a test machine may be five times slower.
    let slowest = changes.last().copied().unwrap_or_default();
    assert!(slowest < 5.0, "a change took {slowest} s: {outcome:?}");
    assert_eq!(rig.tell("status")?.sessions, 50);
    Ok(())
}

#[test]
fn questions_are_answered_over_http() -> Result<()> {
    let mut rig = rig(3)?;
    rig.apply("load", 1, 3)?;
    rig.wait("all tasks to run", PATIENCE, |s| s.running == 3)?;
    let all = ExplainQuery { nodes: true, node: None };
    let why = rig.ask(|client| async move { client.explain("load_s000", &all).await })?;
    assert_eq!((why.nodes, why.fitting, why.per_node.len()), (3, 3, 3));
    assert!(why.suggestions.is_empty() && why.per_node.iter().all(|node| node.reasons.is_empty()), "{why:?}");
    for node in why.per_node.iter().skip(1) {
        let update = NodeUpdate { availability: Some(Availability::Drain), ..NodeUpdate::default() };
        rig.ask(|client| async move { client.node_update(&node.node, &update).await })?;
    }
    let first = why.per_node[0].node.clone();
    let update = NodeUpdate { availability: Some(Availability::Pause), ..NodeUpdate::default() };
    rig.ask(|client| async move { client.node_update(&first, &update).await })?;
    let one = ExplainQuery { nodes: false, node: Some(why.per_node[0].node.clone()) };
    let now = rig.ask(|client| async move { client.explain("load_s000", &one).await })?;
    assert_eq!((now.fitting, now.per_node.len(), now.suggestions.len()), (0, 1, 3), "{now:?}");
    assert_eq!(now.per_node[0].reasons, ["paused"]);
    assert!(now.suggestions.contains(&format!("skein node activate {}", why.per_node[0].node)), "{now:?}");
    for (subject, node, words) in [
        ("load_s000", "fleet-0001", "no node \"fleet-0001\"; did you mean \"fleet-00001\"?"),
        ("load_s00", "fleet-00001", "no service or task \"load_s00\"; did you mean \"load_s000\"?"),
    ] {
        let query = ExplainQuery { nodes: false, node: Some(node.to_owned()) };
        let error = rig.ask(|client| async move { client.explain(subject, &query).await });
        let error = format!("{:#}", error.expect_err("it is not there"));
        assert!(error.contains(words), "{error}");
    }
    Ok(())
}

//! The same seed gives the same history, in another process too.

use std::{path::Path, process::Command, time::Duration};

use crate::world::{CONVERGES_WITHIN, MASTERS, World, simulate};

/// Names the file that the history of one seed goes to.
const FILE: &str = "SKEIN_TRANSPORT_HISTORY";

/// Some of everything.
fn mixed(world: &mut World) {
    world.changes(10);
    world.one_each();
    world.cut(2);
    world.changes(10);
    world.pass(Duration::from_secs(20));
    world.heal(2);
    world.kill_master();
    world.kill_agent(3);
    world.pass(Duration::from_secs(5));
    world.start_agent(3);
    world.start_master(MASTERS[1]);
    world.agents[0].chatter("after the change");
    world.converges(CONVERGES_WITHIN);
}

#[test]
fn the_same_seed_gives_the_same_history() {
    if let Ok(file) = std::env::var(FILE) {
        // In a process of its own: tokio's order of ready branches counts the runtimes that a process has made.
        let seed = std::env::var("SKEIN_SEED").expect("the other process gave one").parse().expect("a number");
        std::fs::write(file, simulate(seed, 4, mixed)).expect("a file in a directory of the test");
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let run = |seed: &str, file: &Path| {
        let own = std::env::current_exe().expect("a test program has a path");
        let mut command = Command::new(own);
        command
            .args(["--exact", "seeds::the_same_seed_gives_the_same_history"])
            .env(FILE, file)
            .env("SKEIN_SEED", seed);
        assert!(command.status().expect("it can be started").success());
        std::fs::read_to_string(file).expect("just written")
    };
    let first = run("7", &dir.path().join("first"));
    let second = run("7", &dir.path().join("second"));
    let difference = first.lines().zip(second.lines()).find(|(a, b)| a != b);
    assert_eq!(difference, None);
    assert_eq!(first.len(), second.len());
    assert!(first.lines().filter(|l| l.contains("session begun")).count() >= 6, "a history without sessions");
    assert_ne!(first, run("8", &dir.path().join("other")), "another seed gives another history");
}

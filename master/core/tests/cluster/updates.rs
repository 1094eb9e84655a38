//! How tasks follow a change of their service: order, how many at a time, pauses.

use skein_api::{
    Availability, RestartCondition, ServiceSpec, Task, TaskId, TaskState, TaskStatus, UpdateConfig, UpdateOrder,
};

use crate::harness::{Cluster, Local, With, network, replicas, restart, service};

fn web(image: &str, n: u32, update: UpdateConfig) -> ServiceSpec {
    service("web").with(|s| {
        replicas(s, n);
        network(s, "s_net");
        s.task.container.image = image.to_owned();
        s.update = update;
    })
}

const START_FIRST: UpdateConfig = UpdateConfig { order: UpdateOrder::StartFirst, parallelism: 0, delay_ms: 0 };

fn served(c: &Cluster) -> Vec<Task> {
    let runs = |t: &Task| t.status.state == TaskState::Running;
    c.live("web").into_iter().filter(runs).collect()
}

fn images(tasks: &[Task]) -> String {
    tasks.iter().map(|t| t.spec.container.image.as_str()).collect::<Vec<_>>().join(" ")
}

/// Lets time pass step by step until nothing is left to do, and answers the least and the most tasks that were live and
/// the least that were served.
fn watch(c: &mut Cluster) -> (usize, usize, usize) {
    let mut seen = (usize::MAX, 0, usize::MAX);
    for _ in 0..60 {
        let (live, served) = (c.live("web").len(), served(c).len());
        seen = (seen.0.min(live), seen.1.max(live), seen.2.min(served));
        if !c.agents_step() {
            c.pass(500);
        }
    }
    c.rest();
    seen
}

#[test]
fn a_successor_starts_first() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![web("one", 2, START_FIRST)]);
    assert_eq!(images(&served(&c)), "one one");
    c.execute(&apply(web("two", 2, START_FIRST))).expect("applied");
    c.turn();
    assert_eq!(c.live("web").len(), 4, "successors are made, and nothing stops");
    assert_eq!(watch(&mut c), (2, 4, 2));
    assert_eq!(images(&served(&c)), "two two");
    let ended = c.model().tasks.values().filter(|t| t.status.state == TaskState::Shutdown).count();
    assert_eq!(ended, 2, "the old ones have stopped");
}

fn apply(service: ServiceSpec) -> master_core::Command {
    let stack = crate::harness::stack(vec![service]);
    master_core::Command::StackApply(Box::new(skein_api::StackApply { stack, remove_orphans: true, dry_run: false }))
}

#[test]
fn so_many_at_a_time_and_a_pause_after_each() {
    let by_two = UpdateConfig { parallelism: 2, ..UpdateConfig::default() };
    for (update, expected) in [
        (by_two, (3, 5, 3)),
        (UpdateConfig { order: UpdateOrder::StartFirst, ..by_two }, (5, 7, 5)),
        (UpdateConfig { parallelism: 1, ..START_FIRST }, (5, 6, 5)),
    ] {
        let mut c = Cluster::with_nodes(2);
        c.up(vec![web("one", 5, update)]);
        c.execute(&apply(web("two", 5, update))).expect("applied");
        c.turn();
        assert_eq!(watch(&mut c), expected, "{update:?}");
        assert_eq!(images(&served(&c)), "two two two two two", "{update:?}");
    }
    // Each is to be there for a minute before the next.
    let slowly = UpdateConfig { parallelism: 1, delay_ms: 60_000, order: UpdateOrder::StartFirst };
    let mut c = Cluster::with_nodes(2);
    c.up(vec![web("one", 3, slowly)]);
    c.up(vec![web("two", 3, slowly)]);
    for expected in ["two one one", "two two one", "two two two"] {
        assert_eq!(images(&served(&c)), expected);
        c.pass(50_000);
        assert_eq!(images(&served(&c)), expected);
        c.pass(11_000);
    }
}

/// The task of this image, which is to be replaced or to replace.
fn of_image(c: &Cluster, image: &str) -> Option<Task> {
    c.live("web").into_iter().find(|t| t.spec.container.image == image)
}

/// The container of a task ends before it was served.
fn fail(c: &mut Cluster, task: &TaskId) {
    let node = c.model().tasks[task].node.clone().expect("placed");
    let status =
        TaskStatus { state: TaskState::Failed, since: c.now.wall, exit_code: Some(1), ..TaskStatus::default() };
    c.agents.get_mut(&node).expect("listed").put(task, Local { run: 0, status });
    c.deliver(&node);
}

#[test]
fn what_fails_holds_the_others_back_and_stops_nothing() {
    let one_by_one = UpdateConfig { parallelism: 1, ..START_FIRST };
    let mut c = Cluster::with_nodes(2);
    c.up(vec![web("one", 2, one_by_one)]);
    c.execute(&apply(web("two", 2, one_by_one))).expect("applied");
    c.turn();
    for _ in 0..3 {
        let successor = of_image(&c, "two").expect("it is tried again").id;
        fail(&mut c, &successor);
        assert_eq!(images(&served(&c)), "one one");
        assert_eq!(of_image(&c, "two"), None, "after a pause");
        for _ in 0..12 {
            if of_image(&c, "two").is_none() {
                c.now.mono_ms += 1_000;
                c.now.wall = c.now.wall.plus_ms(1_000);
                c.core.tick(c.now);
                c.turn();
            }
        }
    }
    // With no more attempts the old ones go on, and another change goes on from there.
    let never = |image: &str| web(image, 2, one_by_one).with(|s| restart(s, RestartCondition::None));
    c.execute(&apply(never("three"))).expect("applied");
    c.turn();
    let successor = of_image(&c, "three").expect("made").id;
    fail(&mut c, &successor);
    c.pass(60_000);
    assert_eq!(images(&served(&c)), "one one");
    c.up(vec![web("four", 2, one_by_one)]);
    c.pass(20_000);
    assert_eq!(images(&served(&c)), "four four");
}

#[test]
fn a_drained_node_keeps_its_task_until_the_next_one_is_there() {
    let mut c = Cluster::with_nodes(2);
    c.up(vec![web("one", 1, START_FIRST)]);
    let from = c.nodes_of("web")[0].clone();
    c.drain(&from, Availability::Drain);
    c.turn();
    assert_eq!(watch(&mut c).2, 1, "one is served at any time");
    assert_ne!(c.nodes_of("web"), std::slice::from_ref(&from));
    // With no other place it stays; whoever wants the node empty sees why in the list of tasks.
    let to = c.nodes_of("web")[0].clone();
    c.drain(&to, Availability::Drain);
    c.pass(20_000);
    assert_eq!(c.nodes_of("web").len(), 1);
    assert_eq!(served(&c).len(), 1);
    c.drain(&from, Availability::Active);
    c.pass(20_000);
    assert_eq!(c.nodes_of("web"), [from]);
}

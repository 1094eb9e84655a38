//! Questions about random clusters: what the answer foretells is what then happens when the same is done.

use std::{cell::RefCell, collections::BTreeMap};

use proptest::{prelude::*, test_runner::TestRunner};
use skein_api::{
    Availability, Preference, Resources, ServiceMode, ServiceSpec, StackApply, Strategy as Placing, Task, TaskState,
    WhatIf,
};

use crate::harness::{Cluster, With, constraint, port, replicas, service, stack};

const NODES: usize = 4;

/// What a service asks for.
#[derive(Clone, Debug)]
struct Ask {
    replicas: u32,
    global: bool,
    half_cpus: u64,
    half_gib: u64,
    port: bool,
    zone: Option<&'static str>,
    max_per_node: u32,
    over_zones: bool,
    binpack: bool,
    apart: bool,
    priority: i32,
    preempt: bool,
}

fn ask() -> impl Strategy<Value = Ask> {
    let place = (
        prop_oneof![2 => Just(None), 1 => Just(Some("a")), 1 => Just(Some("b"))],
        prop_oneof![3 => Just(0_u32), 1 => 1_u32..3],
        any::<[bool; 2]>(),
        prop::bool::weighted(0.15),
    );
    let counts = (-1..3_i32, prop::bool::weighted(0.3));
    let size = (1_u32..5, prop::bool::weighted(0.15), 0_u64..5, 0_u64..5, prop::bool::weighted(0.15));
    (size, place, counts).prop_map(|(size, place, (priority, preempt))| {
        let (replicas, global, half_cpus, half_gib, port) = size;
        let (zone, max_per_node, [over_zones, binpack], apart) = place;
        Ask {
            replicas,
            global,
            half_cpus,
            half_gib,
            port,
            zone,
            max_per_node,
            over_zones,
            binpack,
            apart,
            priority,
            preempt,
        }
    })
}

fn spec(at: usize, ask: &Ask) -> ServiceSpec {
    service(&format!("v{at}")).with(|s| {
        replicas(s, ask.replicas);
        if ask.global {
            s.mode = ServiceMode::Global;
        }
        let task = &mut s.task;
        task.resources.reservations =
            Resources { nano_cpus: ask.half_cpus * 500_000_000, mem_bytes: ask.half_gib << 29 };
        task.ports = ask.port.then(|| port(80)).into_iter().collect();
        task.placement.max_replicas_per_node = ask.max_per_node;
        task.placement.strategy = ask.binpack.then_some(Placing::Binpack);
        (task.placement.priority, task.placement.preempt) = (ask.priority, ask.preempt);
        if ask.over_zones {
            task.placement.preferences.push(Preference::Spread("node.labels.zone".into()));
        }
        if ask.apart {
            task.placement.affinities.push(format!("affinity:service!=s_v{at}"));
        }
        if let Some(zone) = ask.zone {
            constraint(s, &format!("node.labels.zone=={zone}"));
        }
    })
}

fn specs(asks: &[Ask]) -> Vec<ServiceSpec> {
    asks.iter().enumerate().map(|(at, ask)| spec(at, ask)).collect()
}

#[derive(Clone, Debug)]
enum Question {
    Drain(usize),
    Down(usize),
    Add,
    Up(Change),
}

/// What is applied next: nothing that stops tasks by itself. Of several that end, which place is free first is up to
/// their hosts, and no answer knows it. One new service at most: which of two comes first is up to their ids.
#[derive(Clone, Debug)]
struct Change {
    more_of_first: u32,
    new: Vec<Ask>,
}

impl Change {
    fn specs(&self, asks: &[Ask]) -> Vec<ServiceSpec> {
        let mut next = specs(asks);
        if let ServiceMode::Replicated(replicas) = &mut next[0].mode {
            *replicas += self.more_of_first;
        }
        next.extend(self.new.iter().enumerate().map(|(at, ask)| spec(asks.len() + at, ask)));
        next
    }
}

fn question() -> impl Strategy<Value = Question> {
    prop_oneof![
        (1..=NODES).prop_map(Question::Drain),
        (1..=NODES).prop_map(Question::Down),
        Just(Question::Add),
        (0_u32..3, prop::collection::vec(ask(), 0..2))
            .prop_map(|(more_of_first, new)| Question::Up(Change { more_of_first, new })),
    ]
}

/// Where each live task is; none for one that waits.
type Places = BTreeMap<String, Option<String>>;

fn places(c: &Cluster) -> Places {
    let live = |t: &&std::sync::Arc<Task>| t.desired_state == TaskState::Running && !t.status.state.is_terminal();
    let node = |t: &Task| t.node.as_ref().map(|node| c.model().nodes[node].name.clone());
    c.model().tasks.values().filter(live).map(|t| (t.name.clone(), node(t))).collect()
}

#[test]
fn answers_come_true() {
    // By kind of question: how often something was elsewhere, and how often something found no place.
    let seen = RefCell::new(BTreeMap::<&str, [u32; 2]>::new());
    let config = ProptestConfig { cases: 96, max_shrink_iters: 300, failure_persistence: None, ..Default::default() };
    let all = (prop::collection::vec(ask(), 1..6), question());
    TestRunner::new(config)
        .run(&all, |(asks, question)| check(&asks, &question, &seen))
        .expect("what was answered comes true");
    let seen = seen.into_inner();
    assert!(seen.len() == 4 && seen.values().all(|[moved, _]| *moved > 2), "each question is asked: {seen:?}");
    assert!(seen.values().map(|[_, waits]| waits).sum::<u32>() > 8, "some find no place: {seen:?}");
}

fn check(
    asks: &[Ask],
    question: &Question,
    seen: &RefCell<BTreeMap<&'static str, [u32; 2]>>,
) -> Result<(), TestCaseError> {
    let mut c = Cluster::with_nodes(0);
    // The first position of the table is free, and the next new host takes it.
    c.join("gone");
    (1..=NODES).for_each(|n| drop(c.join(&format!("n{n}"))));
    c.rest();
    c.cut("gone");
    c.ok(master_core::Command::NodeRemove { node: "gone".into(), force: true });
    // n1 stays as it is: a new host is like it.
    for (node, zone) in [("n2", "a"), ("n3", "b"), ("n4", "a")] {
        c.label(node, "zone", zone);
    }
    c.up(specs(asks));
    c.pass(10_000);
    let (kind, asked) = match question {
        Question::Drain(node) => ("drain", WhatIf::Drain(vec![format!("n{node}")])),
        Question::Down(node) => ("node-down", WhatIf::NodeDown(vec![format!("n{node}")])),
        Question::Add => ("add-node", WhatIf::AddNode { like: "n1".into(), count: 1 }),
        Question::Up(change) => {
            let apply = StackApply { stack: stack(change.specs(asks)), remove_orphans: true, dry_run: true };
            ("up", WhatIf::Up(Box::new(apply)))
        }
    };
    let mut foretold = places(&c);
    let answer = c.core.sketch().into_core().what_if(&asked).expect("an answer");
    for task in &answer.tasks {
        match task.message.as_str() {
            "removed" => drop(foretold.remove(&task.name)),
            _ => drop(foretold.insert(task.name.clone(), task.to.clone())),
        }
    }
    if answer.rooms.len() > 1 {
        // Several stop for others: which place is free first is up to their hosts.
        return Ok(());
    }
    match question {
        Question::Drain(node) => c.drain(&format!("n{node}"), Availability::Drain),
        Question::Down(node) => c.lose(&format!("n{node}")),
        Question::Add => drop(c.join("n1-new-1")),
        Question::Up(change) => {
            let apply = StackApply { stack: stack(change.specs(asks)), remove_orphans: true, dry_run: false };
            c.ok(master_core::Command::StackApply(Box::new(apply)));
        }
    }
    c.pass(120_000);
    prop_assert_eq!(places(&c), foretold, "{:?}", answer);
    let [moved, waits] = seen.borrow().get(kind).copied().unwrap_or_default();
    let found = |to: bool| u32::from(answer.tasks.iter().any(|t| t.to.is_some() == to && t.message != "removed"));
    seen.borrow_mut().insert(kind, [moved + found(true), waits + found(false)]);
    Ok(())
}

//! What questions cost the master's loop: explanations, and the copy behind every what-if.

use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Duration};

use master_core::{Core, Now, Settings, model::Object, rng::Rng};
use skein_api::{
    ExplainQuery, Meta, Node, NodeDescription, NodeId, Resources, Service, ServiceId, ServiceMode, ServiceSpec, Task,
    TaskId, TaskSpec, TaskState, TaskStatus, UnixMillis, WhatIf,
};

use crate::figures::{cpu, figure, goal, percentile};

const TASKS_PER_NODE: u32 = 10;
const TASKS_PER_SERVICE: u32 = 100;

/// No question shall hold the loop longer, ms: heartbeats and changes wait meanwhile.
const LOOP_MS_MAX: f64 = 20.0;

/// Repetitions of a question; the median counts.
const ROUNDS: usize = 15;

pub(crate) fn run(nodes: usize) {
    let nodes = u32::try_from(nodes).expect("few nodes");
    let case = format!("{nodes} nodes, {} tasks, questions", nodes * TASKS_PER_NODE);
    let mut core = cluster(nodes);
    let mut ask = |reference: &'static str, nodes: bool| {
        let query = ExplainQuery { nodes, node: None };
        time(|| drop(black_box(core.explain(reference, &query)).expect("it is there")))
    };
    let asked = [
        ("explain a service", ask("service-3", false)),
        ("explain a task that runs", ask("service-3.7", false)),
        ("explain a task that waits", ask("large.1", false)),
        ("explain a task that waits, every node", ask("large.1", true)),
        ("explain a task that makes room", ask("urgent.1", false)),
        ("explain a task that can make no room", ask("helpless.1", false)),
    ];
    let one = ExplainQuery { nodes: false, node: Some("node-17".to_owned()) };
    let on_node = time(|| drop(black_box(core.explain("service-3", &one)).expect("it is there")));
    let unknown = time(|| drop(black_box(core.explain("nothing", &one)).expect_err("it is not there")));
    let others = [
        ("explain a service on one node", on_node),
        ("explain what is not there", unknown),
        ("sketch for a what-if", time(|| drop(black_box(core.sketch())))),
    ];
    for (metric, ms) in asked.into_iter().chain(others) {
        goal(&case, metric, "ms", ms, LOOP_MS_MAX);
    }
    for (metric, question) in [
        ("what-if drain, beside the loop", WhatIf::Drain(vec!["node-17".to_owned()])),
        ("what-if node-down, beside the loop", WhatIf::NodeDown(vec!["node-17".to_owned()])),
        ("what-if add-node, beside the loop", WhatIf::AddNode { like: "node-17".to_owned(), count: 1 }),
    ] {
        let mut samples = Vec::new();
        for _ in 0..3 {
            let sketch = core.sketch();
            let began = cpu();
            black_box(sketch.into_core().what_if(&question)).expect("an answer");
            samples.push(micros(cpu() - began));
        }
        figure(&case, metric, "ms", percentile(&mut samples, 0.5) / 1_000.0);
    }
}

/// Milliseconds of CPU time, the median.
fn time(mut question: impl FnMut()) -> f64 {
    let mut samples = Vec::new();
    for _ in 0..ROUNDS {
        let began = cpu();
        question();
        samples.push(micros(cpu() - began));
    }
    percentile(&mut samples, 0.5) / 1_000.0
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A cluster at rest where every host is nine tenths full, and three services wait: for more than any host has left, for room
/// that can be made, and for room that cannot.
fn cluster(nodes: u32) -> Core {
    let now = Now { wall: UnixMillis(1_700_000_000_000), mono_ms: 1_000_000 };
    let share = |tenths: u64| Resources { nano_cpus: tenths * 400_000_000, mem_bytes: tenths * (1 << 30) };
    let zones = |i: u32| {
        BTreeMap::from([("zone".to_owned(), format!("z{}", i % 8)), ("rack".to_owned(), format!("r{}", i % 512))])
    };
    // As a master makes them: comparing ids is a good part of every question.
    let mut rng = Rng::new(11);
    let ids: Vec<NodeId> = (0..nodes).map(|_| NodeId::new(rng.id())).collect();
    let mut objects = Vec::new();
    for (i, id) in (0..).zip(ids.iter().cloned()) {
        let description = NodeDescription {
            hostname: format!("node-{i}"),
            offered: share(TASKS_PER_NODE.into()),
            os: "linux".to_owned(),
            arch: "x86_64".to_owned(),
            labels: zones(i),
            ..NodeDescription::default()
        };
        let name = format!("node-{i}");
        objects.push(Object::Node(Box::new(Node { id, name, host_index: index(i), description, ..Node::default() })));
    }
    let mut add = |name: String, replicas: u32, spec: TaskSpec, place: &dyn Fn(u32) -> Option<u32>| {
        let id = ServiceId::new(rng.id());
        let task_spec = Arc::new(spec.clone());
        for slot in 1..=replicas {
            let node = place(slot);
            let state = if node.is_some() { TaskState::Running } else { TaskState::Pending };
            objects.push(Object::Task(Arc::new(Task {
                id: TaskId::new(rng.id()),
                name: format!("{name}.{slot}"),
                service: Some(id.clone()),
                slot,
                spec_generation: 1,
                spec: task_spec.clone(),
                node: node.map(|node| ids[node as usize].clone()),
                desired_state: TaskState::Running,
                status: TaskStatus { state, ..TaskStatus::default() },
                ..Task::default()
            })));
        }
        let mode = ServiceMode::Replicated(replicas);
        let spec = ServiceSpec { name: name.clone(), short_name: name, mode, task: spec, ..ServiceSpec::default() };
        let meta = Meta { generation: 1, ..Meta::default() };
        objects.push(Object::Service(Box::new(Service { id, meta, spec, vips: Default::default() })));
    };
    let spec = |tenths: u64| {
        let mut spec = TaskSpec::default();
        spec.container.image = "app".to_owned();
        spec.resources.reservations = share(tenths);
        spec
    };
    for service in 0..nodes * TASKS_PER_NODE / TASKS_PER_SERVICE {
        let mut spec = spec(1);
        // So one tenth of each host stays free.
        let layer = service * TASKS_PER_SERVICE / nodes;
        if layer == 0 {
            spec.resources.reservations = Resources::default();
        }
        spec.placement.priority = if layer.is_multiple_of(2) { 0 } else { -1 };
        let place = |slot: u32| Some((service * TASKS_PER_SERVICE + slot) % nodes);
        add(format!("service-{service}"), TASKS_PER_SERVICE, spec, &place);
    }
    add("large".to_owned(), 1, spec(5), &|_| None);
    for (name, priority) in [("urgent", 0), ("helpless", -1)] {
        let mut spec = spec(5);
        (spec.placement.priority, spec.placement.preempt) = (priority, true);
        add(name.to_owned(), 1, spec, &|_| None);
    }
    let mut core = Core::load(Settings::default(), objects, now);
    ids.iter().for_each(|id| core.heartbeat(id, now));
    core.settle(now, 1);
    drop(core.take_staged());
    core
}

fn index(node: u32) -> u16 {
    u16::try_from(node + 1).expect("few nodes")
}

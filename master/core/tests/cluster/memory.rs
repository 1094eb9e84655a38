//! What the state costs in memory, counted by the allocator: of a hundred thousand tasks each kilobyte is 100 MB.

use allocation_counter::measure;
use skein_api::{TaskAddress, TaskId};

use crate::harness::{Cluster, With, network, replicas, service};

/// Nodes and tasks per node of the measured cluster.
const NODES: usize = 8;
const TASKS_PER_NODE: u32 = 25;

/// For each task, at most; see the printed line for what it comes to.
const BYTES_MAX: i64 = 1_800;

/// A loaded core's bytes, of them the model's and the scheduler's.
fn bytes(c: &Cluster) -> (i64, i64, i64) {
    let mut loaded = None;
    let all = measure(|| loaded = Some(c.loaded())).bytes_current;
    let core = loaded.expect("loaded just now");
    let mut copy = None;
    // A copy shares the tasks themselves.
    let model = measure(|| copy = Some(core.model().clone())).bytes_current;
    let mut copy = None;
    let scheduler = measure(|| copy = Some(core.scheduler().clone())).bytes_current;
    drop((copy, core));
    (all, model, scheduler)
}

/// As real hosts report: with an id of the engine, a word, and who said it.
fn as_reported(c: &mut Cluster) {
    for (at, task) in c.live("web").into_iter().enumerate() {
        let node = task.node.clone().expect("it is placed");
        let agent = c.agents.get_mut(&node).expect("joined");
        let mut local = agent.tasks[&task.id].clone();
        local.status.container_id = Some(format!("{at:064x}"));
        local.status.message = "running".into();
        agent.put(&task.id, local);
    }
    c.rest();
}

#[test]
#[expect(clippy::print_stderr, reason = "the figures are for who changes a structure")]
fn a_task_costs_little_memory() {
    let mut c = Cluster::with_nodes(NODES);
    let web = |n| {
        service("web").with(|s| replicas(s, n)).with(|s| network(s, "s_net")).with(|s| {
            let labels = &mut s.task.container.labels;
            labels
                .extend([("com.example.team".to_owned(), "shop".to_owned()), ("tier".to_owned(), "front".to_owned())]);
        })
    };
    c.up(vec![web(1)]);
    let (empty, empty_model, empty_scheduler) = bytes(&c);
    let n = NODES as u32 * TASKS_PER_NODE;
    c.up(vec![web(n)]);
    as_reported(&mut c);
    let (full, full_model, full_scheduler) = bytes(&c);
    let each = |full: i64, empty: i64| (full - empty) / i64::from(n);
    let all = each(full, empty);
    let (model, scheduler) = (each(full_model, empty_model), each(full_scheduler, empty_scheduler));
    let object = size_of::<skein_api::Task>();
    eprintln!(
        "a task costs {all} bytes: {scheduler} in the scheduler, {model} in lookups, its own {object} and what they own; \
         an id has {}, an address {}",
        size_of::<TaskId>(),
        size_of::<TaskAddress>()
    );
    assert!(all <= BYTES_MAX, "{all} bytes for each task");
}

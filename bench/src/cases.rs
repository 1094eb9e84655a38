//! The cases of the scheduler.

use std::hint::black_box;

use master_core::{
    rng::Rng,
    scheduler::{Request, Work, naive::Naive},
};
use quanta::Clock;
use skein_api::{NodeId, ServiceId, Strategy, TaskId, TaskSpec};

use crate::{
    calibration,
    figures::{cpu_per, figure, goal, percentile},
    world::{Features, World, node, request},
};

/// Operations per sample of a median.
const PER_SAMPLE: usize = 16;

pub(crate) fn run(sizes: &[usize]) {
    let (mut cycles, mut words) = (Vec::new(), Vec::new());
    for nodes in sizes {
        calibration::run(*nodes);
        words.push((*nodes, mixed(*nodes, 64, Features::Plain)));
        mixed(*nodes, 1_000, Features::Plain);
        mixed(*nodes, 64, Features::All);
        cycles.push((*nodes, one_class(*nodes)));
        batches(*nodes);
        changes(*nodes);
        // Its time grows with nodes times tasks: minutes for one placement on 100,000 nodes.
        if *nodes <= 10_000 {
            beside_the_naive(*nodes);
        }
    }
    let ratio = |figures: &[(usize, f64)]| {
        let of = |size| figures.iter().find(|(nodes, _)| *nodes == size).map(|(_, figure)| *figure);
        Some(of(100_000)? / of(10_000)?)
    };
    let case = "100000 against 10000 nodes";
    if let (Some(cycle), Some(words)) = (ratio(&cycles), ratio(&words)) {
        goal(case, "place and remove, CPU", "times", cycle, 1.3);
        goal(case, "words of sets that a placement looks at, p99.9", "times", words, 1.0);
    }
}

/// Services in turn, one removal for each placement. Returns how many words of sets a placement looks at, p99.9.
fn mixed(nodes: usize, services: usize, features: Features) -> f64 {
    let all = if features == Features::All { ", all features" } else { "" };
    let case = format!("{nodes} nodes, {services} classes{all}");
    let mut world = World::new(nodes, services, nodes * 5, features);
    // Warm, and far from the state in which it was filled.
    churn(&mut world, nodes.max(100_000));
    let clock = Clock::new();
    let mut samples: Vec<u64> = Vec::new();
    for _ in 0..20_000 {
        for _ in 0..PER_SAMPLE {
            world.remove();
        }
        let chosen: [usize; PER_SAMPLE] = std::array::from_fn(|_| world.any_service());
        let began = clock.raw();
        for service in chosen {
            world.place(service);
        }
        samples.push(clock.delta_as_nanos(began, clock.raw()));
    }
    let p50 = percentile(&mut samples, 0.5) / PER_SAMPLE as f64;
    samples.clear();
    for _ in 0..200_000 {
        world.remove();
        let service = world.any_service();
        let began = clock.raw();
        world.place(black_box(service));
        samples.push(clock.delta_as_nanos(began, clock.raw()));
    }
    let tails = [percentile(&mut samples, 0.99), percentile(&mut samples, 0.999)];
    let operations = 500_000;
    let cycle = cpu_per(operations, || churn(&mut world, operations));
    let mut works = Vec::with_capacity(200_000);
    for _ in 0..200_000 {
        world.remove();
        let service = world.any_service();
        world.place(service);
        works.push(world.scheduler.engine().work());
    }
    let goals = match (nodes, features) {
        (10_000, Features::Plain) => [Some(50.0), Some(250.0), None],
        (100_000, Features::Plain) => [Some(60.0), Some(300.0), Some(2_000.0)],
        (100_000, Features::All) => [None, Some(1_000.0), None],
        _ => [None; 3],
    };
    let metrics = ["place, p50", "place, p99", "place, p99.9"];
    for ((metric, value), at_most) in metrics.into_iter().zip([p50, tails[0], tails[1]]).zip(goals) {
        match at_most {
            Some(at_most) => goal(&case, metric, "ns", value, at_most),
            None => figure(&case, metric, "ns", value),
        }
    }
    figure(&case, "place and remove, CPU", "ns", cycle);
    let counted = |metric, count: fn(&Work) -> u64| {
        let mut counts: Vec<u64> = works.iter().map(count).collect();
        let tail = percentile(&mut counts, 0.999);
        figure(&case, &format!("{metric} that a placement looks at, p50"), "number", percentile(&mut counts, 0.5));
        figure(&case, &format!("{metric} that a placement looks at, p99.9"), "number", tail);
        tail
    };
    let words = counted("words of sets", |work| work.words);
    counted("cache lines at most", Work::lines);
    let bytes = world.scheduler.engine().bytes() as f64 / nodes as f64;
    if nodes == 100_000 {
        goal(&case, "memory of the engine", "B/node", bytes, 300.0);
    } else {
        figure(&case, "memory of the engine", "B/node", bytes);
    }
    figure(&case, "placements refused since the start", "number", world.refused as f64);
    words
}

fn churn(world: &mut World, operations: usize) {
    for _ in 0..operations {
        world.remove();
        let service = world.any_service();
        world.place(service);
    }
}

/// One class alone; nanoseconds of CPU per cycle.
fn one_class(nodes: usize) -> f64 {
    let mut world = World::new(nodes, 1, nodes / 2, Features::Plain);
    churn(&mut world, nodes.max(100_000));
    let operations = 1_000_000;
    let cycle = cpu_per(operations, || churn(&mut world, operations));
    let case = format!("{nodes} nodes, one class");
    match nodes {
        10_000 => goal(&case, "place and remove, CPU", "ns", cycle, 50.0),
        100_000 => goal(&case, "place and remove, CPU", "ns", cycle, 65.0),
        _ => figure(&case, "place and remove, CPU", "ns", cycle),
    }
    cycle
}

/// Many equal tasks at once, in a cluster that is in use.
fn batches(nodes: usize) {
    let mut world = World::new(nodes, 64, nodes * 2, Features::Plain);
    let mut open = TaskSpec::default();
    open.resources.reservations.nano_cpus = 10_000_000;
    let service = ServiceId::new("batch");
    let anywhere = Request::compile(&open, Some(service), None, Strategy::Spread).expect("parses");
    let class = world.scheduler.class(&anywhere);
    let like = anywhere.placed(TaskId::default(), String::new(), NodeId::default());
    let profile = world.scheduler.engine().profile(&like);
    for (count, at_most) in [(1_000, 15.0), (nodes, 500.0)] {
        let mut samples = Vec::new();
        for _ in 0..50 {
            churn(&mut world, 100);
            let clock = Clock::new();
            let began = clock.raw();
            let runs = world.scheduler.engine().batch(class, profile, count as u32);
            samples.push(clock.delta_as_nanos(began, clock.raw()));
            black_box(runs.len());
        }
        let median = percentile(&mut samples, 0.5) / 1_000.0;
        let case = format!("{nodes} nodes, a batch of {count}");
        if nodes == 100_000 {
            goal(&case, "time, median", "µs", median, at_most);
        } else {
            figure(&case, "time, median", "µs", median);
        }
    }
}

/// What is not a placement: nodes that come and go, new classes, explanations.
fn changes(nodes: usize) {
    let mut world = World::new(nodes, 64, nodes * 2, Features::Plain);
    let case = format!("{nodes} nodes, 64 classes");
    let mut rng = Rng::new(9);
    let facts: Vec<_> = (0..200).map(|at| node(nodes + at, nodes, &mut rng)).collect();
    let mut rest = facts.clone().into_iter();
    world.scheduler.apply_node(rest.next().expect("200 of them"));
    figure(
        &case,
        "add a node",
        "µs",
        cpu_per(199, || rest.by_ref().for_each(|facts| world.scheduler.apply_node(facts))) / 1e3,
    );
    let remove = || facts.iter().for_each(|facts| world.scheduler.remove_node(&facts.id));
    figure(&case, "remove a node", "µs", cpu_per(200, remove) / 1e3);
    let requests: Vec<_> = (0..50).map(|n| request(10_000 + n, Features::Plain, &mut rng)).collect();
    let new = || requests.iter().for_each(|request| _ = black_box(world.scheduler.class(request)));
    figure(&case, "a new class", "µs", cpu_per(50, new) / 1e3);
    let explain = || requests.iter().for_each(|request| drop(black_box(world.scheduler.explain(request))));
    let explained = cpu_per(50, explain) / 1e3;
    let fresh: Vec<_> = (0..50).map(|n| request(20_000 + n, Features::Plain, &mut rng)).collect();
    let explain = || fresh.iter().for_each(|request| drop(black_box(world.scheduler.explain(request))));
    figure(&case, "explain a request that was never placed", "µs", cpu_per(50, explain) / 1e3);
    let counted = calibration::count_filters(nodes, 8) / 1e3;
    figure(&case, "AND and count of 8 rows, alone and in turn", "µs", counted);
    goal(&case, "explain, 8 filters", "µs", explained, 1.1 * counted);
}

/// The same question to the scheduler that looks at every node and task.
fn beside_the_naive(nodes: usize) {
    let mut naive = Naive::default();
    let mut rng = Rng::new(42);
    (0..nodes).for_each(|at| naive.apply_node(node(at, nodes, &mut rng)));
    let requests: Vec<_> = (0..10).map(|n| request(n, Features::Plain, &mut rng)).collect();
    for task in 0..nodes {
        let request = &requests[task % requests.len()];
        let host = NodeId::new(format!("node{:020}", rng.next_u64() % nodes as u64));
        naive.apply_task(request.placed(TaskId::new(format!("t{task}")), String::new(), host));
    }
    let place = || requests.iter().for_each(|request| drop(black_box(naive.place(request, 0))));
    figure(&format!("{nodes} nodes, naive"), "place", "µs", cpu_per(10, place) / 1e3);
}

//! The replay on a made-up trace: what holds of the scheduler on any trace holds here.

use skein_api::Strategy;
use skein_packing::{
    fleet::{Loads, fleet},
    replay::{apart, churn, fill, hosts_used},
    rules::Rule,
    trace::{Arrival, Size},
};

const BINPACK: Rule = Rule::Skein(Strategy::Binpack);
const SPREAD: Rule = Rule::Skein(Strategy::Spread);
const RANDOM: Rule = Rule::Skein(Strategy::Random);

/// `count` arrivals of mostly small tasks in two shapes, one a minute.
fn made_up(count: u64) -> Vec<Arrival> {
    let mut state = 20_171_122_u64;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let arrival = |at| {
        let cores = [1, 1, 1, 2, 2, 4, 8][draw(7) as usize];
        let per_core = if draw(4) == 0 { 7 * 1024 } else { 1792 };
        let stays_s = (draw(10) > 0).then(|| 60 * (1 + draw(300)));
        Arrival { at_s: 300 + at * 60, size: Size { cores, mem_mib: cores * per_core }, stays_s, batch: at }
    };
    (0..count).map(arrival).collect()
}

#[test]
fn equal_tasks_that_only_arrive_stand_at_most_one_apart() {
    let task =
        |cores, mem_mib| vec![Arrival { at_s: 0, size: Size { cores, mem_mib }, stays_s: None, batch: 0 }; 1_500];
    let hosts = fleet(&[(64, 192)], 50);
    // By CPU, by memory, by steps of a share that hold many tasks, by places alone.
    for (cores, mem_mib) in [(2, 3_584), (1, 8_000), (0, 100), (0, 0)] {
        assert!(apart(SPREAD, &hosts, &task(cores, mem_mib)) <= 1, "{cores} cores, {mem_mib} MiB");
    }
}

#[test]
fn binpack_leaves_no_more_behind_than_a_best_fit() {
    let arrivals = made_up(3_000);
    let hosts = fleet(&[(32, 128), (64, 128), (64, 256), (128, 256)], 60);
    let cpu = |rule| {
        let filled = fill(rule, &hosts, &arrivals);
        assert!(filled.rejected, "{rule:?} never rejected");
        filled.allocated.0
    };
    assert!(cpu(BINPACK) >= cpu(Rule::BestFit), "{} and {}", cpu(BINPACK), cpu(Rule::BestFit));
}

#[test]
fn binpack_opens_few_hosts_and_spread_all() {
    let arrivals = made_up(1_000);
    let hosts = fleet(&[(64, 256)], 200);
    let used = |rule| hosts_used(rule, &hosts, &arrivals).unwrap();
    let (binpack, bound) = used(BINPACK);
    assert!(binpack as u64 >= bound && binpack as f64 <= 1.05 * bound as f64, "{binpack} for {bound}");
    assert_eq!(used(SPREAD).0, 200);
}

#[test]
fn a_batch_goes_where_its_tasks_would_go_one_by_one() {
    let hosts = fleet(&[(32, 128), (64, 128), (64, 256)], 12);
    for rule in [BINPACK, SPREAD, Rule::BestFit, Rule::FirstFit] {
        let mut alone = made_up(200);
        alone = alone.into_iter().flat_map(|one| std::iter::repeat_n(one, 7)).collect();
        let together = fill(rule, &hosts, &alone);
        (0..).zip(&mut alone).for_each(|(at, one)| one.batch = at);
        let one_by_one = fill(rule, &hosts, &alone);
        assert!(together.rejected, "the fleet fills");
        assert_eq!((together.placed, together.allocated), (one_by_one.placed, one_by_one.allocated), "{rule:?}");
    }
}

#[test]
fn all_that_ends_gives_its_place_back() {
    let arrivals = made_up(3_000);
    let hosts = fleet(&[(16, 112), (32, 128)], 40);
    // Each rejection is checked against all hosts, each placement against its host.
    for rule in [BINPACK, SPREAD, RANDOM, Rule::BestFit, Rule::FirstFit, Rule::FewestTasks, Rule::LeastLoaded] {
        let out = churn(rule, &hosts, &arrivals);
        assert_eq!(out.decisions, 3_000);
        assert!(out.rejections > 0 && out.rejections < 1_500, "{rule:?} rejected {}", out.rejections);
    }
    assert!(churn(SPREAD, &hosts, &arrivals).imbalance < churn(RANDOM, &hosts, &arrivals).imbalance);
}

#[test]
fn loads_count_what_is_left() {
    let mut loads = Loads::new(fleet(&[(16, 112), (32, 256)], 2));
    let large = Size { cores: 16, mem_mib: 112 << 10 };
    assert_eq!((loads.slots(large), loads.empty()), (3, 2));
    loads.add(1, Size { cores: 8, mem_mib: 1 << 10 });
    assert_eq!((loads.slots(large), loads.empty()), (2, 1));
    assert!((loads.allocated().0 - 100.0 * 8.0 / 48.0).abs() < 1e-9);
    assert!((loads.imbalance() - 12.5).abs() < 1e-9, "{}", loads.imbalance());
}

//! Who chooses the host: the scheduler by one of its strategies, or a full scan by another rule.

use std::collections::BTreeMap;

use master_core::scheduler::{NodeFacts, Request, Scheduler};
use skein_api::{NodeId, Resources, Strategy, TaskId, TaskSpec};

use crate::{fleet::Loads, trace::Size};

/// A way to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The scheduler under a strategy.
    Skein(Strategy),
    /// Every host is looked at. The smallest dot product of what the task asks for and what would stay free, in shares of
    /// the host's CPU and memory.
    BestFit,
    /// The first host on which it fits.
    FirstFit,
    /// Every host is looked at. The fewest tasks, as Swarm spreads.
    FewestTasks,
    /// Every host is looked at. The smallest larger share of CPU and memory with the task.
    LeastLoaded,
}

impl Rule {
    /// As it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Skein(Strategy::Spread) => "spread",
            Self::Skein(Strategy::Binpack) => "binpack",
            Self::Skein(Strategy::Random) => "random",
            Self::BestFit => "best fit (full scan)",
            Self::FirstFit => "first fit (full scan)",
            Self::FewestTasks => "fewest tasks (full scan)",
            Self::LeastLoaded => "least loaded (full scan)",
        }
    }

    /// A chooser for a fleet on which nothing runs.
    pub fn chooser(self, offered: &[Size]) -> Chooser {
        match self {
            Self::Skein(strategy) => Chooser::Skein(Box::new(Skein::new(strategy, offered))),
            rule => Chooser::Scan(rule),
        }
    }

    /// How much a host is liked less for a task that fits there.
    fn cost(self, loads: &Loads, host: usize, size: Size) -> f64 {
        let (cpu, memory) = loads.shares_with(host, size);
        match self {
            Self::BestFit => {
                let offered = loads.offered[host];
                let asked = (size.cores as f64 / offered.cores as f64, size.mem_mib as f64 / offered.mem_mib as f64);
                asked.0 * (1.0 - cpu) + asked.1 * (1.0 - memory)
            }
            Self::LeastLoaded => cpu.max(memory),
            Self::FewestTasks => f64::from(loads.tasks[host]),
            Self::FirstFit | Self::Skein(_) => 0.0,
        }
    }
}

/// A rule with what it remembers.
#[derive(Debug)]
pub enum Chooser {
    /// The scheduler.
    Skein(Box<Skein>),
    /// A rule that looks at every host.
    Scan(Rule),
}

impl Chooser {
    /// Hosts for `count` tasks of one size, which are entered into `loads`; fewer where no host has room for more. `first`
    /// is the number of the first task, of which no two are equal.
    pub fn place(&mut self, loads: &mut Loads, first: u32, count: u32, size: Size) -> Vec<usize> {
        match self {
            Self::Skein(skein) => {
                let hosts = skein.place(first, count, size);
                hosts.iter().for_each(|host| loads.add(*host, size));
                hosts
            }
            Self::Scan(rule) => {
                let next = |_| scan(*rule, loads, size).inspect(|host| loads.add(*host, size));
                (0..count).map_while(next).collect()
            }
        }
    }

    /// A task has ended.
    pub fn remove(&mut self, task: u32) {
        if let Self::Skein(skein) = self {
            skein.scheduler.remove_task(&task_id(task));
        }
    }
}

/// The cheapest host; of equal ones the first.
fn scan(rule: Rule, loads: &Loads, size: Size) -> Option<usize> {
    let mut fitting = (0..loads.offered.len()).filter(|host| loads.fits(*host, size));
    if rule == Rule::FirstFit {
        return fitting.next();
    }
    fitting.map(|host| (rule.cost(loads, host, size), host)).min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, host)| host)
}

/// The scheduler with a fleet.
#[derive(Debug)]
pub struct Skein {
    scheduler: Scheduler,
    strategy: Strategy,
    hosts: BTreeMap<NodeId, usize>,
    requests: BTreeMap<Size, Request>,
}

impl Skein {
    fn new(strategy: Strategy, offered: &[Size]) -> Self {
        let mut scheduler = Scheduler::new();
        let mut hosts = BTreeMap::new();
        for (host, size) in offered.iter().enumerate() {
            let id = NodeId::new(format!("host-{host}"));
            let facts = NodeFacts { id: id.clone(), ready: true, offered: resources(*size), ..NodeFacts::default() };
            scheduler.apply_node(facts);
            hosts.insert(id, host);
        }
        Self { scheduler, strategy, hosts, requests: BTreeMap::new() }
    }

    /// One request of the scheduler's batch placement.
    fn place(&mut self, first: u32, count: u32, size: Size) -> Vec<usize> {
        let strategy = self.strategy;
        let request = self.requests.entry(size).or_insert_with(|| {
            let mut spec = TaskSpec::default();
            spec.resources.reservations = resources(size);
            Request::compile(&spec, None, None, strategy).expect("there are no expressions in it")
        });
        let batch = self.scheduler.place_batch(request, count, u64::from(first));
        let nodes = batch.runs.into_iter().flat_map(|(node, copies)| std::iter::repeat_n(node, copies as usize));
        let place = |(task, node): (u32, NodeId)| {
            let host = self.hosts[&node];
            self.scheduler.apply_task(request.placed(task_id(task), String::new(), node));
            host
        };
        (first..).zip(nodes).map(place).collect()
    }
}

fn task_id(task: u32) -> TaskId {
    TaskId::new(format!("task-{task}"))
}

fn resources(size: Size) -> Resources {
    Resources { nano_cpus: size.cores * 1_000_000_000, mem_bytes: size.mem_mib << 20 }
}

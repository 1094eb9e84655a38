//! A cluster to measure on: nodes with twenty labels, services with three constraints, tasks that come and go.

use std::collections::BTreeMap;

use master_core::{
    rng::Rng,
    scheduler::{ClassId, NodeFacts, NodeIdx, ProfileId, Request, Scheduler},
};
use skein_api::{Availability, NodeId, PortPublish, Preference, Resources, ServiceId, Strategy, TaskId, TaskSpec};

/// How many values each label has; 0: one for each node.
const VALUES: [u64; 20] = [2, 2, 3, 3, 4, 4, 5, 6, 8, 8, 10, 12, 16, 16, 32, 64, 100, 256, 1_000, 0];

/// Labels that constraints use: the first ones.
const USED: u64 = 10;

/// Zones and racks of the preferences.
const ZONES: u64 = 3;

/// What services ask for beside three constraints, CPU and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Features {
    /// Nothing.
    Plain,
    /// Every kind: some publish a port, keep away from themselves or others, prefer a label, spread over zones, or take
    /// a generic resource.
    All,
}

/// A cluster in a steady state.
pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) services: Vec<Service>,
    /// What runs, for the next removal.
    pub(crate) running: Vec<(u32, NodeIdx)>,
    pub(crate) rng: Rng,
    /// Placements that found no node: not the work that is to be measured, so the number is shown.
    pub(crate) refused: u64,
}

pub(crate) struct Service {
    pub(crate) class: ClassId,
    pub(crate) profile: ProfileId,
}

pub(crate) fn node(at: usize, nodes: usize, rng: &mut Rng) -> NodeFacts {
    let value = |values: &u64, rng: &mut Rng| if *values == 0 { at as u64 } else { rng.next_u64() % values };
    let mut labels: BTreeMap<String, String> = VALUES
        .iter()
        .enumerate()
        .map(|(label, values)| (format!("l{label}"), format!("v{}", value(values, rng))))
        .collect();
    labels.insert("zone".into(), format!("z{}", rng.next_u64() % ZONES));
    let cpus = [16, 32, 64][(rng.next_u64() % 3) as usize];
    NodeFacts {
        id: NodeId::new(format!("node{at:020}")),
        name: format!("host-{at}-of-{nodes}"),
        hostname: format!("host-{at}"),
        labels,
        os: "linux".into(),
        arch: "x86_64".into(),
        operating_system: "Debian GNU/Linux 12 (bookworm)".into(),
        kernel: "6.1.0-18-amd64".into(),
        engine_version: "20.10.24".into(),
        storage_driver: "overlay2".into(),
        availability: Availability::Active,
        ready: true,
        offered: Resources { nano_cpus: cpus * 1_000_000_000, mem_bytes: (cpus * 4) << 30 },
        generic: if at.is_multiple_of(8) { BTreeMap::from([("gpu".to_owned(), 4)]) } else { BTreeMap::new() },
        ..NodeFacts::default()
    }
}

/// The request of one service: three constraints, CPU and memory, and what its number gives it of the features.
pub(crate) fn request(number: u64, features: Features, rng: &mut Rng) -> Request {
    let mut spec = TaskSpec::default();
    let mut labels: Vec<u64> = (0..USED).collect();
    for _ in 0..3 {
        let label = labels.swap_remove((rng.next_u64() % labels.len() as u64) as usize);
        let value = rng.next_u64() % VALUES[label as usize];
        let op = if VALUES[label as usize] > 4 { "!=" } else { "==" };
        spec.placement.constraints.push(format!("l{label}{op}v{value}"));
    }
    spec.resources.reservations = Resources {
        nano_cpus: 100_000_000 * (1 + rng.next_u64() % 20),
        mem_bytes: (64 << 20) * (1 + rng.next_u64() % 32),
    };
    spec.container.image = format!("image-{number}:1");
    spec.container.labels.insert("tier".into(), ["front", "back"][(number % 2) as usize].into());
    if features == Features::All {
        match number % 8 {
            0 => spec.ports.push(port(8_000 + number as u16)),
            1 => spec.placement.affinities.push(format!("service!=s{number}")),
            2 => spec.placement.affinities.push("tier!=~front".into()),
            3 => spec.placement.constraints.push("l10==~v1".into()),
            4 | 5 => {
                let zone = |key: &str| Preference::Spread(format!("node.labels.{key}"));
                spec.placement.preferences = vec![zone("zone"), zone("l5")];
            }
            6 => spec.placement.max_replicas_per_node = 4,
            _ => drop(spec.resources.generic.insert("gpu".to_owned(), 1)),
        }
    }
    let service = ServiceId::new(format!("s{number}"));
    Request::compile(&spec, Some(service), None, Strategy::Spread).expect("it parses")
}

fn port(host_port: u16) -> PortPublish {
    PortPublish { protocol: Default::default(), container_port: 80, host_port, host_ip: None }
}

impl World {
    /// `tasks` are placed one by one, in turn for each service.
    pub(crate) fn new(nodes: usize, services: usize, tasks: usize, features: Features) -> Self {
        let mut rng = Rng::new(42);
        let mut scheduler = Scheduler::new();
        for at in 0..nodes {
            scheduler.apply_node(node(at, nodes, &mut rng));
        }
        let services = (0..services as u64)
            .map(|number| {
                let request = request(number, features, &mut rng);
                let class = scheduler.class(&request);
                let like = request.placed(TaskId::default(), String::new(), NodeId::default());
                let profile = scheduler.engine().profile(&like);
                Service { class, profile }
            })
            .collect();
        let mut world = Self { scheduler, services, running: Vec::with_capacity(tasks), rng, refused: 0 };
        for task in 0..tasks {
            world.place(task % world.services.len());
        }
        world
    }

    /// One placement: select and commit.
    #[inline]
    pub(crate) fn place(&mut self, service: usize) {
        let Service { class, profile, .. } = self.services[service];
        if let Some(idx) = self.scheduler.engine().select(class) {
            self.scheduler.engine().commit(profile, idx);
            self.running.push((service as u32, idx));
        } else {
            self.refused += 1;
        }
    }

    /// Any service, evenly.
    #[inline]
    pub(crate) fn any_service(&mut self) -> usize {
        (self.rng.next_u64() % self.services.len() as u64) as usize
    }

    /// Takes one task out, any.
    #[inline]
    pub(crate) fn remove(&mut self) -> usize {
        let at = (self.rng.next_u64() % self.running.len() as u64) as usize;
        let (service, idx) = self.running.swap_remove(at);
        let profile = self.services[service as usize].profile;
        self.scheduler.engine().release(profile, idx);
        service as usize
    }
}

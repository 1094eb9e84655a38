//! What goes wrong, and when: a schedule that follows from the seed and can be thinned out, and how each fault is done.

use std::fmt;

use crate::{
    engine::Moods,
    host::Host,
    kernel,
    master::CrashAt,
    net::{AGENT_SILENCE_MS, End, MASTER_SILENCE_MS},
    queue::Millis,
    random::Random,
    version,
    world::{Event, World},
};

/// Which faults a run may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// None: what costs time here costs it always.
    Calm,
    /// A random choice of all kinds, with random rates: another for each seed.
    Swarm,
    /// Crashes, pauses and restarts of masters, agents, engines and hosts.
    Processes,
    /// Partitions in one or both directions, half-open connections, delay and loss.
    Network,
    /// Clocks that jump by up to a year and drift.
    Clocks,
    /// Disks that are full, damaged, or go back to an earlier state.
    Disks,
    /// Engines that are slow, fail, lie and restart.
    Engines,
    /// 30, 60 and 100 % of the hosts lose the master at once.
    Storm,
    /// Releases side by side: master and agents are upgraded one after the other, in any order.
    Releases,
    /// Kernels that refuse and that others change, agents that die between two operations, hosts without power.
    Kernels,
}

/// Some hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hosts {
    Few(Vec<u32>),
    /// So many of a hundred, chosen by a salt.
    Share {
        percent: u64,
        salt: u64,
    },
}

impl Hosts {
    fn list(&self, hosts: u32) -> Vec<u32> {
        match self {
            Self::Few(few) => few.clone(),
            Self::Share { percent, salt } => {
                let chosen = |host: &u32| Random::new(*salt, u64::from(*host)).below(100) < *percent;
                (0..hosts).filter(chosen).collect()
            }
        }
    }
}

/// One thing that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    MasterCrash(Option<CrashAt>),
    MasterPause,
    MasterDiskFull,
    MasterDiskSlow(u64),
    MasterUnknown(bool),
    MasterRestore,
    MasterClock(i64),
    AgentCrash(Hosts),
    AgentPause(Hosts),
    HostReboot(Hosts),
    EngineRestart(Hosts),
    EngineMoods(Hosts, Moods),
    ContainersDie(Hosts),
    LedgerFull(Hosts),
    /// The ledger is damaged: its good beginning is used.
    LedgerDamaged(Hosts),
    LedgerLost(Hosts),
    Clock(Hosts, i64),
    Partition {
        hosts: Hosts,
        up: bool,
        down: bool,
    },
    SlowNetwork {
        hosts: Hosts,
        delay_ms: u64,
        loss: u64,
    },
    MassDisconnect(Hosts),
    /// Kernels that refuse so many of a thousand operations.
    KernelRefuses(Hosts, u64),
    /// Others change what is ours in the kernel, and add what is theirs.
    KernelMeddled(Hosts),
    /// The agent dies after so many operations of the kernel.
    AgentDiesInKernel(Hosts, u64),
    /// A record of the store is written in the place of another.
    MasterMisdirects,
    /// The master is replaced by one of the next release.
    MasterUpgrade,
    /// Agents are replaced by those of the next release.
    AgentUpgrade(Hosts),
}

/// A fault with its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) at_ms: Millis,
    pub(crate) for_ms: Millis,
    pub(crate) kind: Kind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s, for {} ms: {:?}", self.at_ms / 1_000, self.for_ms, self.kind)
    }
}

/// Kinds of faults as profiles choose them.
const KINDS: u64 = 26;
/// Which of them each profile has.
fn kinds(profile: Profile) -> &'static [u64] {
    match profile {
        Profile::Calm => &[],
        Profile::Swarm => {
            &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
        }
        Profile::Processes => &[0, 0, 1, 5, 7, 7, 8, 9, 10],
        Profile::Network => &[17, 17, 18],
        Profile::Clocks => &[6, 16, 16],
        Profile::Disks => &[2, 3, 4, 5, 13, 14, 15],
        Profile::Engines => &[10, 11, 11, 12],
        Profile::Storm => &[19],
        Profile::Releases => &[0, 7, 24, 25, 25, 25],
        Profile::Kernels => &[7, 9, 10, 12, 20, 21, 21, 22, 22],
    }
}

/// Mean pause between two faults.
const EVERY_MS: u64 = 12_000;
/// A year, and the other jumps of clocks.
const JUMPS_MS: [i64; 6] = [-31_536_000_000, 31_536_000_000, -3_600_000, 3_600_000, -2_000, 2_000];

/// The schedule of a run: follows from seed, profile, size and length alone.
pub(crate) fn schedule(seed: u64, profile: Profile, hosts: u32, until_ms: Millis) -> Vec<Fault> {
    let mut rng = Random::new(seed, 3);
    let all = kinds(profile);
    if all.is_empty() {
        return Vec::new();
    }
    // Swarm testing: most seeds have a few kinds only, so that one does not hide another.
    let chosen: Vec<u64> = if profile == Profile::Swarm {
        let share = rng.within(150, 1_000);
        let mut some: Vec<u64> = all.iter().copied().filter(|_| rng.per_mille(share)).collect();
        if some.is_empty() {
            some.push(rng.below(KINDS));
        }
        some
    } else {
        all.to_vec()
    };
    let every = rng.within(EVERY_MS / 3, EVERY_MS * 2);
    let mut faults = Vec::new();
    // The cluster comes up first; half of the runs begin in the middle of it.
    let mut at_ms = if rng.per_mille(500) { 4_000 } else { 45_000 };
    loop {
        at_ms += rng.pause(every);
        if at_ms >= until_ms {
            return faults;
        }
        let kind = *rng.pick(&chosen);
        let (kind, for_ms) = fault(&mut rng, kind, hosts);
        let for_ms = for_ms.min(until_ms - at_ms);
        faults.push(Fault { at_ms, for_ms, kind });
    }
}

fn few(rng: &mut Random, hosts: u32) -> Hosts {
    let count = match rng.below(10) {
        0..=5 => 1,
        6..=8 => rng.within(2, 6),
        _ => rng.within(1, u64::from(hosts) / 8 + 1),
    };
    Hosts::Few((0..count).map(|_| u32::try_from(rng.below(u64::from(hosts))).expect("a host")).collect())
}

fn fault(rng: &mut Random, kind: u64, hosts: u32) -> (Kind, Millis) {
    let short = rng.within(100, 8_000);
    let long = rng.within(1_000, 60_000);
    let any = if rng.per_mille(600) { short } else { long };
    let jump = *rng.pick(&JUMPS_MS);
    match kind {
        0 => {
            let points = [
                None,
                None,
                Some(CrashAt::BeforeCommit),
                Some(CrashAt::AfterCommit),
                Some(CrashAt::AfterReplies),
                Some(CrashAt::AmongAgents),
            ];
            (Kind::MasterCrash(*rng.pick(&points)), any)
        }
        1 => (Kind::MasterPause, any),
        2 => (Kind::MasterDiskFull, any),
        3 => (Kind::MasterDiskSlow(rng.within(20, 1_500)), any),
        4 => (Kind::MasterUnknown(rng.per_mille(500)), 0),
        5 => (Kind::MasterRestore, short),
        6 => (Kind::MasterClock(jump), long),
        7 => (Kind::AgentCrash(few(rng, hosts)), any),
        8 => (Kind::AgentPause(few(rng, hosts)), any),
        9 => (Kind::HostReboot(few(rng, hosts)), rng.within(5_000, 60_000)),
        10 => (Kind::EngineRestart(few(rng, hosts)), any),
        11 => {
            let moods = Moods {
                fails: rng.below(600),
                times_out: rng.below(300),
                slow: rng.within(1, 20),
                mute: rng.per_mille(300),
            };
            (Kind::EngineMoods(few(rng, hosts), moods), long)
        }
        12 => (Kind::ContainersDie(few(rng, hosts)), 0),
        13 => (Kind::LedgerFull(few(rng, hosts)), long),
        14 => (Kind::LedgerDamaged(few(rng, hosts)), short),
        15 => (Kind::LedgerLost(few(rng, hosts)), short),
        16 => (Kind::Clock(few(rng, hosts), jump), long),
        17 => {
            let (up, down) = *rng.pick(&[(true, true), (true, true), (true, false), (false, true)]);
            (Kind::Partition { hosts: few(rng, hosts), up, down }, any)
        }
        18 => {
            let delay_ms = rng.within(20, 3_000);
            (Kind::SlowNetwork { hosts: few(rng, hosts), delay_ms, loss: rng.below(200) }, long)
        }
        20 => (Kind::KernelRefuses(few(rng, hosts), rng.within(5, 400)), any),
        21 => (Kind::KernelMeddled(few(rng, hosts)), 0),
        22 => (Kind::AgentDiesInKernel(few(rng, hosts), rng.below(60)), long),
        23 => (Kind::MasterMisdirects, short),
        24 => (Kind::MasterUpgrade, short),
        25 => {
            let half = Hosts::Share { percent: rng.within(10, 90), salt: rng.bits() };
            let hosts = if rng.per_mille(500) { half } else { few(rng, hosts) };
            (Kind::AgentUpgrade(hosts), short)
        }
        _ => {
            let percent = *rng.pick(&[30, 60, 100]);
            (Kind::MassDisconnect(Hosts::Share { percent, salt: rng.bits() }), rng.within(5_000, 90_000))
        }
    }
}

impl World {
    /// A fault of the schedule begins.
    pub(crate) fn fault_begins(&mut self, at: u32) {
        let Fault { kind, for_ms, .. } = self.faults[at as usize].clone();
        self.stats.faults += 1;
        self.trace.mix(&[self.now_ms, 5, u64::from(at)]);
        self.trace.line(self.now_ms, || format!("fault {at}: {kind:?} for {for_ms} ms"));
        match &kind {
            Kind::MasterCrash(None) => {
                self.master.held_down += 1;
                self.master_crash();
            }
            Kind::MasterCrash(point) => self.master.crash_at = *point,
            Kind::MasterPause => {
                self.master.paused_until = self.now_ms + for_ms;
                self.master.held_until_ms = self.master.paused_until;
            }
            Kind::MasterDiskFull => self.master.moods.full = true,
            Kind::MasterDiskSlow(ms) => self.master.moods.slow_ms = *ms,
            Kind::MasterUnknown(kept) => self.master.moods.unknown = Some(*kept),
            Kind::MasterRestore => self.restore(),
            Kind::MasterClock(by) => self.master.clock.offset_ms += by,
            Kind::AgentCrash(some) => self.each(some, Self::agent_held_down),
            Kind::AgentPause(some) => self.each(some, |world, host| world.agent_pause(host, for_ms)),
            Kind::HostReboot(some) => self.each(some, |world, host| {
                world.hosts[host as usize].held_down += 1;
                world.host_off(host);
            }),
            Kind::EngineRestart(some) => self.each(some, Self::engine_stop),
            Kind::EngineMoods(some, moods) => self.each_host(some, |host| host.engine.moods = *moods),
            Kind::ContainersDie(some) => self.each(some, Self::containers_die),
            Kind::LedgerFull(some) => self.each_host(some, |host| {
                host.disk_moods.full = true;
                host.part();
            }),
            Kind::LedgerDamaged(some) | Kind::LedgerLost(some) => {
                let lost = matches!(kind, Kind::LedgerLost(_));
                self.each(some, |world, host| {
                    world.agent_held_down(host);
                    world.damage_ledger(host, lost);
                });
            }
            Kind::Clock(some, by) => self.each_host(some, |host| host.clock.offset_ms += by),
            Kind::Partition { hosts, up, down } => self.each(hosts, |world, host| world.cut(host, *up, *down)),
            Kind::SlowNetwork { hosts, delay_ms, loss } => {
                self.each_host(hosts, |host| (host.link.delay_ms, host.link.loss) = (*delay_ms, *loss));
            }
            Kind::MassDisconnect(some) => {
                self.checker.disconnect_begins();
                self.each(some, |world, host| world.cut(host, true, true));
            }
            Kind::KernelRefuses(some, refuses) => {
                self.each_kernel(some, |side| side.moods.refuses = *refuses);
            }
            Kind::KernelMeddled(some) => {
                let hosts = self.config.agents;
                self.each(some, |world, host| world.kernel_meddle(kernel::sampled(host, hosts)));
            }
            // Without a backup nothing would be left to go back to.
            Kind::MasterMisdirects => self.master.moods.misdirects = self.master.backup.is_some(),
            Kind::MasterUpgrade => {
                self.master.held_down += 1;
                self.master_crash();
            }
            Kind::AgentUpgrade(some) => self.each(some, Self::agent_held_down),
            Kind::AgentDiesInKernel(some, after) => {
                self.each_kernel(some, |side| side.moods.dies_after = Some(after + 1));
            }
        }
        self.queue.push(self.now_ms + for_ms, Event::FaultEnds(at));
    }

    /// It is over.
    pub(crate) fn fault_ends(&mut self, at: u32) {
        let kind = self.faults[at as usize].kind.clone();
        self.trace.line(self.now_ms, || format!("fault {at} ends"));
        match &kind {
            Kind::MasterCrash(None) | Kind::MasterRestore => {
                self.master.held_down -= 1;
                self.master_start();
            }
            // A point that no turn reached is left out.
            Kind::MasterCrash(_) => self.master.crash_at = None,
            Kind::MasterPause => self.master_resumes(),
            Kind::MasterDiskFull => self.master.moods.full = false,
            Kind::MasterDiskSlow(_) => self.master.moods.slow_ms = 0,
            Kind::MasterUnknown(_) | Kind::ContainersDie(_) | Kind::AgentPause(_) | Kind::KernelMeddled(_) => {}
            Kind::KernelRefuses(some, _) => self.each_kernel(some, |side| side.moods.refuses = 0),
            // What is wrong on the disk shows when it is read.
            Kind::MasterMisdirects => {
                self.master.moods.misdirects = false;
                self.master_crash();
                self.master_start();
            }
            Kind::MasterUpgrade => {
                self.master.version = (self.master.version + 1).min(version::LAST);
                self.master.held_down -= 1;
                self.master_start();
            }
            Kind::AgentUpgrade(some) => self.each(some, |world, host| {
                let h = &mut world.hosts[host as usize];
                h.version = (h.version + 1).min(version::LAST);
                h.held_down -= 1;
                world.agent_start(host);
            }),
            Kind::AgentDiesInKernel(some, _) => {
                let hosts = self.config.agents;
                self.each(some, |world, host| world.agent_back(kernel::sampled(host, hosts)));
            }
            Kind::MasterClock(by) => self.master.clock.offset_ms -= by,
            Kind::AgentCrash(some) | Kind::LedgerDamaged(some) | Kind::LedgerLost(some) => {
                self.each(some, |world, host| {
                    world.hosts[host as usize].held_down -= 1;
                    world.agent_start(host);
                });
            }
            Kind::HostReboot(some) => self.each(some, |world, host| {
                world.hosts[host as usize].held_down -= 1;
                world.host_on(host);
            }),
            Kind::EngineRestart(some) => self.each(some, Self::engine_start),
            Kind::EngineMoods(some, _) => self.each_host(some, |host| host.engine.moods = Moods::default()),
            Kind::LedgerFull(some) => self.each_host(some, |host| host.disk_moods.full = false),
            Kind::Clock(some, by) => self.each_host(some, |host| host.clock.offset_ms -= by),
            Kind::Partition { hosts, up, down } => self.each(hosts, |world, host| world.heal(host, *up, *down)),
            Kind::SlowNetwork { hosts, .. } => {
                self.each_host(hosts, |host| (host.link.delay_ms, host.link.loss) = (0, 0));
            }
            Kind::MassDisconnect(some) => {
                self.each(some, |world, host| world.heal(host, true, true));
                if let Some(broken) = self.checker.disconnect_ends() {
                    self.broken(broken);
                }
            }
        }
    }

    fn each(&mut self, some: &Hosts, mut act: impl FnMut(&mut Self, u32)) {
        for host in some.list(self.config.agents) {
            act(self, host);
        }
    }

    fn each_host(&mut self, some: &Hosts, mut act: impl FnMut(&mut Host)) {
        self.each(some, |world, host| act(&mut world.hosts[host as usize]));
    }

    /// Of each of these hosts, the kernel of the one of the sample that stands for it.
    fn each_kernel(&mut self, some: &Hosts, mut act: impl FnMut(&mut kernel::KernelSide)) {
        let hosts = self.config.agents;
        self.each(some, |world, host| {
            if let Some(side) = &mut world.hosts[kernel::sampled(host, hosts) as usize].kernel {
                act(side);
            }
        });
    }

    /// The agent does not die between operations any more; if it did, it starts again.
    fn agent_back(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        let Some(side) = &mut h.kernel else { return };
        side.moods.dies_after = None;
        if std::mem::take(&mut side.died) {
            h.held_down -= 1;
            self.agent_start(host);
        }
    }

    fn agent_held_down(&mut self, host: u32) {
        self.hosts[host as usize].held_down += 1;
        self.agent_crash(host);
    }

    /// The store goes back to a backup; without one the master only starts anew.
    pub(crate) fn restore(&mut self) {
        self.master.held_down += 1;
        self.master_crash();
        if let Some(store) = self.master.backup.clone() {
            self.master.store = store;
            self.users_forget();
            self.checker.restored(self.now_ms, &self.master.store);
        }
    }

    /// Packets of a host stop in these directions; keep-alives notice later, each end for itself.
    fn cut(&mut self, host: u32, up: bool, down: bool) {
        let link = &mut self.hosts[host as usize].link;
        link.cut_up += u32::from(up);
        link.cut_down += u32::from(down);
        // A keep-alive needs both ways.
        for conn in self.conns.of_host(host) {
            for (end, after) in [(End::Agent, AGENT_SILENCE_MS), (End::Master, MASTER_SILENCE_MS)] {
                self.queue.push(self.now_ms + after, Event::Silent { conn, end });
            }
        }
        self.hosts[host as usize].cut_since.get_or_insert(self.now_ms);
    }

    fn heal(&mut self, host: u32, up: bool, down: bool) {
        let link = &mut self.hosts[host as usize].link;
        link.cut_up -= u32::from(up);
        link.cut_down -= u32::from(down);
        if link.cut_up == 0 && link.cut_down == 0 {
            self.hosts[host as usize].cut_since = None;
        }
        // Retransmissions come some time after the network is back.
        for conn in self.conns.of_host(host) {
            let later = self.now_ms + self.net_rng.within(10, 1_500);
            self.rearm(conn, later);
        }
    }
}

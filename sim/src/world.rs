//! The world: one seed, one queue, one thread. Takes the next event, lets the part that it is about act, checks.

use std::fs::File;

use crate::{
    check::Checker,
    engine::Engine,
    faults::{self, Fault, Profile},
    host::{Clock, Disk, DiskMoods, Host},
    kernel::{self, KernelSide},
    master::Master,
    net::{ConnId, Conns, End, Link, ToAgent, ToMaster},
    queue::{Millis, Queue},
    random::Random,
    trace::{Trace, Verdict},
    users::{Arrival, User},
    version::Readings,
};

/// After the faults, so long may it take until all is as it should be: the longest pause between attempts (60 s) twice,
/// the longest back-off, detection and the slowest start.
const CONVERGE_MS: Millis = 240_000;
/// Then, so long nothing may move.
const REST_MS: Millis = 65_000;
/// How often everything is checked; what a commit touched is checked with it.
const FULL_CHECK_MS: Millis = 60_000;
/// In a long run, from then on a fifteenth as often.
const OFTEN_CHECKED_MS: Millis = 600_000;
/// Faults that come together are followed by one full check.
const FULL_CHECK_GAP_MS: Millis = 20_000;

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// The seed of everything.
    pub seed: u64,
    /// How many hosts.
    pub agents: u32,
    /// How long, simulated; faults and users end before, so that there is time to come to rest.
    pub for_ms: u64,
    /// Tasks per host, roughly.
    pub tasks_per_agent: u64,
    /// Mean pause between two changes of one stack.
    pub deploy_every_ms: u64,
    /// Which faults.
    pub profile: Profile,
    /// Of the schedule, only these faults; none: all.
    pub only: Option<Vec<u32>>,
}

impl Config {
    /// When faults and users end.
    pub(crate) fn quiet_from_ms(&self) -> Millis {
        self.for_ms.saturating_sub(CONVERGE_MS + REST_MS).max(self.for_ms / 3)
    }

    /// Replicas of a service, on average, that make for the wanted number of tasks: stacks of two services and a half.
    pub(crate) fn replicas(&self) -> u64 {
        let tasks = u64::from(self.agents) * self.tasks_per_agent;
        let stacks = u64::from(self.agents / 25).clamp(3, 60);
        (tasks * 2 / (stacks * 5)).max(2)
    }
}

/// What happens to an agent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AgentEvent {
    Connect,
    GiveUp(u32),
    Beat(u32),
    Applied(u32),
    Round,
    Resync,
    Done(u32),
    Resumed,
    /// It looks at its kernel.
    Network,
    Audit,
    /// It dies between two operations of the kernel.
    Dies,
}

/// What happens at an engine by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum EngineEvent {
    Ends { container: u32, start: u64, failed: bool },
    Healthy { container: u32, start: u64 },
}

/// What happens to the master.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MasterEvent {
    Tick,
    Committed,
    Resumed,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    Up(ConnId),
    Down(ConnId),
    Silent {
        conn: ConnId,
        end: End,
    },
    Agent {
        host: u32,
        run: u32,
        what: AgentEvent,
    },
    Engine {
        host: u32,
        run: u32,
        what: EngineEvent,
    },
    MasterStart,
    /// Its operator has restored a backup.
    MasterRestored,
    MasterUpgrade,
    Master {
        run: u32,
        what: MasterEvent,
    },
    User(u32),
    Fault(u32),
    FaultEnds(u32),
    FullCheck,
}

/// Figures of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Events of the queue.
    pub events: u64,
    /// Heartbeats sent.
    pub heartbeats: u64,
    /// Faults that struck.
    pub faults: u64,
    /// Requests of users.
    pub requests: u64,
    /// Of them, done.
    pub answered: u64,
    /// Of them, refused for good.
    pub refused: u64,
    /// Actions of agents.
    pub actions: u64,
    /// Commits of the store.
    pub commits: u64,
    /// Tasks at the end.
    pub tasks: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Verdict.
    pub verdict: Verdict,
    /// When, simulated milliseconds.
    pub at_ms: u64,
    /// Hash of everything that happened.
    pub hash: u64,
    /// Figures.
    pub stats: Stats,
    /// Numbers of the schedule's faults, with their words.
    pub faults: Vec<(u32, String)>,
}

/// One world.
#[derive(Debug)]
pub struct World {
    pub(crate) config: Config,
    pub(crate) now_ms: Millis,
    pub(crate) queue: Queue,
    pub(crate) trace: Trace,
    pub(crate) stats: Stats,
    pub(crate) checker: Checker,
    pub(crate) master: Master,
    pub(crate) hosts: Vec<Host>,
    pub(crate) conns: Conns,
    pub(crate) users: Vec<User>,
    pub(crate) arrivals: Vec<Arrival>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) net_rng: Random,
    pub(crate) kernel_rng: Random,
    pub(crate) readings: Readings,
    pub(crate) last_action_ms: Millis,
    /// The host that was found unsettled last: the first to ask the next time.
    pub(crate) unsettled_at: usize,
    checked_ms: Millis,
    /// What the last full check saw: the master's run, its revision, and how many faults had begun or ended.
    checked: Option<(u32, u64, u64)>,
    /// Faults that began or ended.
    turns: u64,
    verdict: Option<Verdict>,
}

impl World {
    /// A world at its first moment. `arrivals`: containers that come and go as in a recorded trace.
    pub fn new(config: Config, arrivals: Vec<Arrival>, trace: Option<File>) -> Self {
        let seed = config.seed;
        let faults = faults::schedule(seed, config.profile, config.agents, config.quiet_from_ms());
        let mut rng = Random::new(seed, 1);
        let host = |at: u32| Host {
            at,
            name: format!("h{at}"),
            on: true,
            clock: Clock { offset_ms: 0, drift_ppm: i64::try_from(rng.below(201)).expect("small") - 100 },
            link: Link::default(),
            disk: Disk::default(),
            disk_moods: DiskMoods::default(),
            engine: Engine::new(),
            engine_run: 0,
            agent: None,
            agent_run: 0,
            held_down: 0,
            cut_since: None,
            lives: 0,
            version: crate::version::FIRST,
            kernel: kernel::is_sampled(at, config.agents).then(|| Box::new(KernelSide::new())),
        };
        let hosts = (0..config.agents).map(host).collect();
        let mut world = Self {
            now_ms: 0,
            queue: Queue::default(),
            trace: Trace::new(trace),
            stats: Stats::default(),
            checker: Checker::default(),
            master: Master::new(seed),
            hosts,
            conns: Conns::default(),
            users: Vec::new(),
            arrivals,
            faults,
            net_rng: Random::new(seed, 4),
            kernel_rng: Random::new(seed, 5),
            readings: Readings::default(),
            last_action_ms: 0,
            unsettled_at: 0,
            checked_ms: 0,
            checked: None,
            turns: 0,
            verdict: None,
            config,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.master_start();
        for host in 0..self.config.agents {
            self.agent_start(host);
        }
        self.make_users();
        let chosen = |at: u32| self.config.only.as_ref().is_none_or(|only| only.contains(&at));
        for at in (0..u32::try_from(self.faults.len()).expect("some faults")).filter(|at| chosen(*at)) {
            self.queue.push(self.faults[at as usize].at_ms, Event::Fault(at));
        }
        self.queue.push(FULL_CHECK_MS, Event::FullCheck);
    }

    /// An invariant does not hold: the run ends after this event.
    pub(crate) fn broken(&mut self, why: String) {
        self.trace.line(self.now_ms, || format!("BROKEN: {why}"));
        self.verdict.get_or_insert(Verdict::Safety(why));
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        let quiet_ms = self.config.quiet_from_ms();
        let verdict = self
            .run_until(quiet_ms)
            .or_else(|| self.converge(quiet_ms))
            .or_else(|| self.rest())
            .unwrap_or(Verdict::Passed);
        self.stats.events = self.queue.made();
        self.stats.commits = self.master.store.revision;
        self.stats.tasks = self.master.core().map_or(0, |core| core.model().tasks.len() as u64);
        let chosen = |at: &u32| self.config.only.as_ref().is_none_or(|only| only.contains(at));
        let numbered = (0..).zip(&self.faults).filter(|(at, _)| chosen(at));
        Outcome {
            verdict,
            at_ms: self.now_ms,
            hash: self.trace.hash(),
            stats: self.stats,
            faults: numbered.map(|(at, fault)| (at, fault.to_string())).collect(),
        }
    }

    fn run_until(&mut self, until_ms: Millis) -> Option<Verdict> {
        while let Some((at_ms, event)) = self.queue.pop(until_ms) {
            self.now_ms = at_ms;
            self.step(event);
            if self.verdict.is_some() {
                return self.verdict.take();
            }
        }
        self.now_ms = until_ms;
        None
    }

    /// Faults and users are over: all must come to be as it should, within a bound.
    fn converge(&mut self, from_ms: Millis) -> Option<Verdict> {
        let until_ms = from_ms + CONVERGE_MS;
        loop {
            let next = self.now_ms + 5_000;
            if let Some(verdict) = self.run_until(next) {
                return Some(verdict);
            }
            let missing = self.unsettled();
            match missing {
                None => return None,
                Some(missing) if next >= until_ms => {
                    return Some(Verdict::Liveness(format!(
                        "{} s after the last fault, {missing}",
                        CONVERGE_MS / 1_000
                    )));
                }
                Some(_) => {}
            }
        }
    }

    /// Then it stays so, and nothing moves.
    fn rest(&mut self) -> Option<Verdict> {
        let (from_ms, commits) = (self.now_ms, self.master.store.revision);
        if let Some(verdict) = self.run_until(from_ms + REST_MS) {
            return Some(verdict);
        }
        if let Some(missing) = self.unsettled() {
            return Some(Verdict::Liveness(format!("it was at rest, and then {missing}")));
        }
        if self.last_action_ms > from_ms {
            return Some(Verdict::Liveness("agents still act although all is as it should be".into()));
        }
        if self.master.store.revision != commits {
            return Some(Verdict::Liveness("the master still commits although all is as it should be".into()));
        }
        self.check_all().or_else(|| self.kernels_broken()).map(Verdict::Safety)
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Up(conn) => self.arrives_up(conn),
            Event::Down(conn) => self.arrives_down(conn),
            Event::Silent { conn, end } => self.silent(conn, end),
            Event::Agent { host, run, what } => self.agent_event(host, run, what),
            Event::Engine { host, run, what } => self.engine_event(host, run, what),
            Event::MasterStart => self.master_start(),
            Event::MasterRestored => {
                self.master.held_down -= 1;
                self.master_start();
            }
            Event::MasterUpgrade => self.master_upgraded(),
            Event::Master { run, what } => self.master_event(run, what),
            Event::User(user) => self.user_acts(user),
            Event::Fault(at) => {
                self.turns += 1;
                self.fault_begins(at);
            }
            Event::FaultEnds(at) => {
                self.turns += 1;
                self.fault_ends(at);
                if self.now_ms >= self.checked_ms + FULL_CHECK_GAP_MS {
                    self.full_check();
                }
            }
            Event::FullCheck => {
                let often = self.now_ms < OFTEN_CHECKED_MS;
                let pause = if often { FULL_CHECK_MS } else { 15 * FULL_CHECK_MS };
                if self.now_ms >= self.checked_ms + pause {
                    self.full_check();
                }
                // A backup reads every record: one that is damaged ends it.
                let due = self.master.backup.is_none() || self.net_rng.per_mille(300);
                if due && self.master.store.verify().is_ok() {
                    self.master.backup = Some(self.master.store.clone());
                }
                self.queue.push(self.checked_ms + pause, Event::FullCheck);
            }
        }
    }

    /// Checks everything, unless nothing was committed and nothing struck since the last time: what hosts say then is that
    /// they live.
    fn full_check(&mut self) {
        self.checked_ms = self.now_ms;
        let seen = (self.master.run, self.master.store.revision, self.turns);
        if self.checked == Some(seen) {
            return;
        }
        if self.master.is_between_commits() {
            self.checked = Some(seen);
        }
        if self.master.is_between_commits()
            && let Some(broken) = self.check_all()
        {
            self.broken(broken);
        }
    }

    // --- packets ---

    fn delay(&mut self, host: u32) -> Millis {
        let link = self.hosts[host as usize].link;
        let mut delay = self.net_rng.within(1, 3) + self.net_rng.below(link.delay_ms + 1);
        if link.loss > 0 && self.net_rng.per_mille(link.loss) {
            // TCP's retransmission: 200 ms at least (RFC 6298 allows less than its 1 s), then more.
            delay += self.net_rng.within(200, 1_500);
        }
        delay
    }

    pub(crate) fn send_up(&mut self, conn: ConnId, message: ToMaster) {
        let Some(host) = self.conns.get(conn).filter(|c| c.agent_open).map(|c| c.host) else { return };
        let at = self.now_ms + self.delay(host);
        if let Some(at) = self.conns.get(conn).and_then(|c| c.up.push(at, message)) {
            self.queue.push(at, Event::Up(conn));
        }
    }

    pub(crate) fn send_down(&mut self, conn: ConnId, message: ToAgent) {
        let Some(host) = self.conns.get(conn).filter(|c| c.master_open).map(|c| c.host) else { return };
        let at = self.now_ms + self.delay(host);
        if let Some(at) = self.conns.get(conn).and_then(|c| c.down.push(at, message)) {
            self.queue.push(at, Event::Down(conn));
        }
    }

    /// One end closes: the other learns it in order, behind what was sent before.
    pub(crate) fn close(&mut self, conn: ConnId, end: End) {
        match end {
            End::Agent => self.send_up(conn, ToMaster::End),
            End::Master => self.send_down(conn, ToAgent::End),
        }
        self.conns.close(conn, end);
    }

    /// Makes sure that what waits in a connection is delivered.
    pub(crate) fn rearm(&mut self, conn: ConnId, at_ms: Millis) {
        let Some(c) = self.conns.get(conn) else { return };
        if let Some(at) = c.up.arm(at_ms) {
            self.queue.push(at, Event::Up(conn));
        }
        let Some(c) = self.conns.get(conn) else { return };
        if let Some(at) = c.down.arm(at_ms) {
            self.queue.push(at, Event::Down(conn));
        }
    }

    fn arrives_up(&mut self, conn: ConnId) {
        let now_ms = self.now_ms;
        let stopped = now_ms < self.master.paused_until;
        let Some(c) = self.conns.get(conn) else { return };
        c.up.armed = false;
        // A cut, a stopped process or a busy reader: it is looked at again when that is over.
        if self.hosts[c.host as usize].link.cut_up > 0 || stopped || c.busy || !c.master_open {
            return;
        }
        let Some((_, message)) = c.up.messages.pop_front() else { return };
        if let Some(at) = c.up.arm(now_ms) {
            self.queue.push(at, Event::Up(conn));
        }
        self.master_hears(conn, message);
    }

    fn arrives_down(&mut self, conn: ConnId) {
        let now_ms = self.now_ms;
        let Some(c) = self.conns.get(conn) else { return };
        c.down.armed = false;
        let host = &self.hosts[c.host as usize];
        let stopped = host.agent.as_ref().is_some_and(|a| now_ms < a.paused_until);
        if host.link.cut_down > 0 || stopped || !c.agent_open {
            return;
        }
        let Some((_, message)) = c.down.messages.pop_front() else { return };
        if let Some(at) = c.down.arm(now_ms) {
            self.queue.push(at, Event::Down(conn));
        }
        if matches!(message, ToAgent::End) {
            self.agent_sees_end(conn);
        } else {
            self.agent_hears(conn, message);
        }
    }

    /// A keep-alive of one end has had no answer, if the network was cut all the time.
    fn silent(&mut self, conn: ConnId, end: End) {
        let Some(c) = self.conns.get(conn) else { return };
        let (host, agent_open) = (c.host, c.agent_open);
        let silence = if end == End::Agent { crate::net::AGENT_SILENCE_MS } else { crate::net::MASTER_SILENCE_MS };
        let cut = self.hosts[host as usize].cut_since.is_some_and(|since| self.now_ms - since >= silence);
        match end {
            End::Agent if cut => self.agent_sees_end(conn),
            // The host lost its power, or cannot be reached.
            End::Master if cut || !agent_open => self.master_sees_end(conn),
            End::Agent | End::Master => {}
        }
    }

    /// The master was stopped and goes on: what has arrived meanwhile is read.
    pub(crate) fn master_resumes(&mut self) {
        let now_ms = self.now_ms;
        if now_ms < self.master.paused_until {
            return;
        }
        let run = self.master.run;
        self.master.held_until_ms = now_ms;
        self.queue.push(now_ms, Event::Master { run, what: MasterEvent::Resumed });
        for conn in self.conns.of(|c| c.master_open) {
            self.rearm(conn, now_ms);
        }
    }
}

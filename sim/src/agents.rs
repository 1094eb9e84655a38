//! The agents' events: connecting, hearing, beating, acting.

use agent_core::{
    Action, ActionError, Outcome,
    session::{Outbox, Pulse},
};
use skein_api::{Health, NodeDescription, Resources, TaskId, TaskReport};

use crate::{
    host::{Op, Session},
    kernel::{UNDERLAY_MTU, underlay},
    net::{ConnId, End, ToAgent, ToMaster},
    queue::Millis,
    version,
    world::{AgentEvent, EngineEvent, Event, World},
};

/// How often everything is looked at: `RESYNC_PERIOD` of the executor.
const RESYNC_MS: Millis = 30_000;
/// An engine that failed to answer is looked at again after this: `RETRY_PERIOD` of the executor.
const ENGINE_RETRY_MS: Millis = 2_000;
/// How long a call may take: `CALL_WITHIN` of the session.
const CALL_MS: Millis = 10_000;
/// How long a start waits for its names: `ANNOUNCED_TIMEOUT` of the overlay.
const ANNOUNCED_MS: Millis = 10_000;
/// Reports of one message: `REPORTS_MAX` of the session.
const REPORTS_MAX: usize = 256;
/// One append to the ledger.
const LEDGER_MS: (Millis, Millis) = (1, 5);
/// What every host offers.
pub(crate) const OFFERED: Resources = Resources { nano_cpus: 4_000_000_000, mem_bytes: 8 << 30 };

impl World {
    pub(crate) fn agent_event_at(&mut self, host: u32, at: Millis, what: AgentEvent) {
        let run = self.hosts[host as usize].agent_run;
        self.queue.push(at, Event::Agent { host, run, what });
    }

    /// The agent's process starts, if nothing keeps it down.
    pub(crate) fn agent_start(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        if !h.on || h.held_down > 0 || h.agent.is_some() {
            return;
        }
        h.start_agent();
        self.trace.mix(&[self.now_ms, 6, u64::from(host)]);
        self.trace.line(self.now_ms, || format!("h{host}: agent starts"));
        let spread = self.net_rng.below(200);
        self.agent_event_at(host, self.now_ms, AgentEvent::Round);
        self.agent_event_at(host, self.now_ms + spread, AgentEvent::Connect);
        self.agent_event_at(host, self.now_ms + RESYNC_MS, AgentEvent::Resync);
        self.network_begins(host);
    }

    /// The agent's process ends, at once. Its kernel closes its connections; the engine goes on with what it was asked.
    pub(crate) fn agent_crash(&mut self, host: u32) {
        self.agent_gone(host, true);
    }

    fn agent_gone(&mut self, host: u32, kernel_lives: bool) {
        let Some(agent) = self.hosts[host as usize].stop_agent() else { return };
        self.trace.mix(&[self.now_ms, 7, u64::from(host)]);
        self.trace.line(self.now_ms, || format!("h{host}: agent dies"));
        for conn in self.conns.of_host(host) {
            if kernel_lives {
                self.close(conn, End::Agent);
            } else {
                self.conns.close(conn, End::Agent);
                let at = self.now_ms + crate::net::MASTER_SILENCE_MS;
                self.queue.push(at, Event::Silent { conn, end: End::Master });
            }
        }
        if kernel_lives {
            // Half of what was on its way at the engine comes to pass.
            for op in agent.ops.into_values() {
                if self.net_rng.per_mille(500) {
                    // Nobody hears of it.
                    let _ = self.effect(host, &op);
                }
            }
        }
    }

    pub(crate) fn agent_pause(&mut self, host: u32, for_ms: Millis) {
        let until = self.now_ms + for_ms;
        if let Some(agent) = &mut self.hosts[host as usize].agent {
            agent.paused_until = until;
            // What has arrived meanwhile is read then.
            self.agent_event_at(host, until, AgentEvent::Resumed);
        }
    }

    pub(crate) fn host_off(&mut self, host: u32) {
        self.agent_gone(host, false);
        self.engine_stop(host);
        let h = &mut self.hosts[host as usize];
        h.on = false;
        h.engine.moods = Default::default();
        if let Some(kernel) = &mut h.kernel {
            kernel.boot();
        }
    }

    pub(crate) fn host_on(&mut self, host: u32) {
        self.hosts[host as usize].on = true;
        self.engine_start(host);
        self.agent_start(host);
    }

    /// The engine ends and takes its containers with it.
    pub(crate) fn engine_stop(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        if !h.engine.running {
            return;
        }
        h.engine.running = false;
        h.engine_run += 1;
        let ids: Vec<String> = h.engine.live().map(|c| c.id.clone()).collect();
        for id in ids {
            self.container_ends(host, &id, 137);
        }
    }

    pub(crate) fn engine_start(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        if !h.on || h.engine.running {
            return;
        }
        h.engine.running = true;
        if let Some(agent) = &mut h.agent {
            // Its events begin anew: everything is looked at.
            (agent.look, agent.settled) = (true, false);
            self.round_at(host, self.now_ms);
        }
    }

    /// Every container of a host ends by itself.
    pub(crate) fn containers_die(&mut self, host: u32) {
        let ids: Vec<String> = self.hosts[host as usize].engine.live().map(|c| c.id.clone()).collect();
        for id in ids {
            self.container_ends(host, &id, 1);
        }
        self.engine_told(host);
    }

    pub(crate) fn damage_ledger(&mut self, host: u32, lost: bool) {
        let h = &mut self.hosts[host as usize];
        let earlier = h.disk_moods.earlier.clone().filter(|_| !lost).unwrap_or_default();
        (h.disk.assignments, h.disk.tasks) = earlier;
        // The ledger knows that it was damaged: the master is asked for everything.
        h.disk.assignments.distrust();
    }

    fn container_ends(&mut self, host: u32, id: &str, exit_code: i64) {
        let h = &mut self.hosts[host as usize];
        let wall = h.clock.wall(self.now_ms);
        if !h.engine.end(id, exit_code, wall) {
            return;
        }
        let released = self.checker.container_ended(host, id);
        self.hosts[host as usize].detach(&released);
        self.network_detach(host, id);
    }

    /// The engine has events: its agent looks, unless they get lost.
    fn engine_told(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        let told = h.engine.has_events();
        if let Some(agent) = h.agent.as_mut().filter(|_| told) {
            agent.settled = false;
            self.round_at(host, self.now_ms + 1);
        }
    }

    pub(crate) fn engine_event(&mut self, host: u32, run: u32, what: EngineEvent) {
        if self.hosts[host as usize].engine_run != run {
            return;
        }
        let (EngineEvent::Ends { container, start, .. } | EngineEvent::Healthy { container, start }) = what;
        let id = format!("{host:05x}-{container:06x}");
        let wanted = self.hosts[host as usize].engine.containers.get(&id);
        // Of an earlier start: that process has ended.
        if wanted.is_none_or(|c| c.started_at.0 != start) {
            return;
        }
        match what {
            EngineEvent::Ends { failed, .. } => self.container_ends(host, &id, i64::from(failed)),
            EngineEvent::Healthy { .. } => self.hosts[host as usize].engine.set_health(&id, Health::Healthy),
        }
        self.engine_told(host);
    }

    pub(crate) fn agent_event(&mut self, host: u32, run: u32, what: AgentEvent) {
        let h = &mut self.hosts[host as usize];
        if h.agent_run != run {
            return;
        }
        let Some(agent) = &mut h.agent else { return };
        if self.now_ms < agent.paused_until {
            let until = agent.paused_until;
            self.queue.push(until, Event::Agent { host, run, what });
            return;
        }
        match what {
            AgentEvent::Connect => self.connect(host),
            AgentEvent::GiveUp(number) => self.give_up(host, number),
            AgentEvent::Beat(number) => self.beat(host, number),
            AgentEvent::Applied(number) => self.applied(host, number),
            AgentEvent::Round => {
                if agent.round_at.is_some_and(|at| at <= self.now_ms) {
                    agent.round_at = None;
                }
                self.round(host);
            }
            AgentEvent::Resync => self.resync(host),
            AgentEvent::Done(number) => self.op_done(host, number),
            AgentEvent::Network => self.network_look(host),
            AgentEvent::Audit => self.network_audit(host),
            AgentEvent::Dies => self.agent_dies(host),
            AgentEvent::Resumed => {
                for conn in self.conns.of_host(host) {
                    self.rearm(conn, self.now_ms);
                }
            }
        }
    }

    /// Makes sure that a round comes at `at` or before.
    fn round_at(&mut self, host: u32, at: Millis) {
        let Some(agent) = &mut self.hosts[host as usize].agent else { return };
        if agent.round_at.is_none_or(|known| known > at) {
            agent.round_at = Some(at);
            self.agent_event_at(host, at, AgentEvent::Round);
        }
    }

    fn resync(&mut self, host: u32) {
        self.agent_event_at(host, self.now_ms + RESYNC_MS, AgentEvent::Resync);
        let sample = self.net_rng.per_mille(16);
        let h = &mut self.hosts[host as usize];
        h.repair();
        let Some(agent) = &mut h.agent else { return };
        if agent.settled && !h.engine.missed && !agent.look && !sample {
            // `reconcile` is a function of what has not changed; some are asked all the same.
            return;
        }
        let was_settled = agent.settled && !h.engine.missed && !agent.look && agent.round_at.is_none();
        agent.look = true;
        let acted = self.round(host);
        if was_settled && acted {
            self.broken(format!("h{host}: an agent that was at rest acts again although nothing changed"));
        }
    }

    fn round(&mut self, host: u32) -> bool {
        let h = &mut self.hosts[host as usize];
        let Some(rounded) = h.round(self.now_ms) else {
            self.round_at(host, self.now_ms + ENGINE_RETRY_MS);
            return false;
        };
        if let Some(pause) = rounded.wake_in_ms {
            self.round_at(host, self.now_ms + pause.max(1));
        }
        self.stats.actions += rounded.begun.len() as u64;
        for number in rounded.begun {
            self.op_begins(host, number);
        }
        self.flush(host);
        rounded.acted
    }

    /// Settles how long an action takes, and what it takes from the network side.
    fn op_begins(&mut self, host: u32, number: u32) {
        self.last_action_ms = self.now_ms;
        let used = self.checker.addresses_of(host);
        let h = &mut self.hosts[host as usize];
        let Some(op) = h.agent.as_ref().and_then(|a| a.ops.get(&number)) else { return };
        let action = op.action.clone();
        if let (Action::StopContainer { task, .. } | Action::RemoveContainer { task, .. }, Some(agent)) =
            (&action, &h.agent)
            && !agent.confirmed
            && h.assignment(task).is_none()
        {
            let broken = format!("h{host}: {action:?} of an unknown task before a master confirmed the assignments");
            return self.broken(broken);
        }
        let rng = &mut self.net_rng;
        let mut waits = false;
        let mut addresses = None;
        let took = match &action {
            Action::CreateContainer { task } => {
                let image = h.assignment(task).map(|t| t.spec.container.image.clone()).unwrap_or_default();
                addresses = h.reserve(task, &used).ok();
                let pull = if h.engine.images.contains(&image) { 0 } else { rng.within(500, 8_000) };
                pull + rng.within(50, 400)
            }
            Action::StartContainer { task, .. } => {
                addresses = h.reserve(task, &used).ok();
                waits = !h.announced(task);
                if waits { ANNOUNCED_MS } else { rng.within(100, 600) }
            }
            Action::StopContainer { grace_ms, .. } => rng.within(20, (*grace_ms).max(20)),
            Action::RemoveContainer { .. } => rng.within(20, 200),
            Action::EnsureEngineNetwork { .. } | Action::RemoveEngineNetwork { .. } => rng.within(10, 100),
            Action::ReleaseTask { .. } => 1,
            Action::RemoveImage { .. } => rng.within(10, 500),
        };
        let due_ms = self.now_ms + took * h.engine.moods.slow.max(1);
        self.trace.mix(&[self.now_ms, 8, u64::from(host), u64::from(number), due_ms]);
        self.trace.line(self.now_ms, || format!("h{host}: {action:?}"));
        if let Some(op) = h.agent.as_mut().and_then(|a| a.ops.get_mut(&number)) {
            (op.due_ms, op.waits, op.addresses) = (due_ms, waits, addresses);
        }
        self.agent_event_at(host, due_ms, AgentEvent::Done(number));
    }

    fn op_done(&mut self, host: u32, number: u32) {
        let h = &mut self.hosts[host as usize];
        let due = h.agent.as_ref().and_then(|a| a.ops.get(&number)).is_some_and(|op| op.due_ms <= self.now_ms);
        if !due {
            return;
        }
        let Some(op) = h.agent.as_mut().and_then(|a| a.ops.remove(&number)) else { return };
        let moods = h.engine.moods;
        let timed_out = || ActionError { message: "the engine gave no answer in time".into(), fatal: false };
        let at_engine = !matches!(op.action, Action::ReleaseTask { .. });
        let result = if at_engine && !h.engine.running {
            Err(ActionError { message: "cannot connect to the engine".into(), fatal: false })
        } else if at_engine && self.net_rng.per_mille(moods.fails) {
            Err(timed_out())
        } else {
            let result = self.effect(host, &op);
            if at_engine && self.net_rng.per_mille(moods.times_out) { Err(timed_out()) } else { result }
        };
        let h = &mut self.hosts[host as usize];
        h.record(&op, &result, self.now_ms);
        h.follow_networks();
        self.trace.mix(&[self.now_ms, 9, u64::from(host), u64::from(number), u64::from(result.is_ok())]);
        // What the action touched is looked at before the next plan.
        match &op.action {
            Action::StartContainer { container, .. }
            | Action::StopContainer { container, .. }
            | Action::RemoveContainer { container, .. } => h.engine.look_at(container),
            Action::CreateContainer { task } => h.engine.look_at_task(task),
            _ => {}
        }
        self.round_at(host, self.now_ms);
    }

    /// What an action does to engine and network side.
    fn effect(&mut self, host: u32, op: &Op) -> Result<Outcome, ActionError> {
        let now_ms = self.now_ms;
        let h = &mut self.hosts[host as usize];
        let wall = h.clock.wall(now_ms);
        let later = |message: &str| ActionError { message: message.into(), fatal: false };
        match &op.action {
            Action::EnsureEngineNetwork { network } => h.engine.ensure_network(network),
            Action::RemoveEngineNetwork { network, .. } => h.engine.remove_network(network)?,
            Action::CreateContainer { task } => {
                let Some(assignment) = h.assignment(task).cloned() else {
                    return Err(later("the task is not assigned any more"));
                };
                let addresses = op.addresses.clone().ok_or_else(|| later("no address is free"))?;
                h.engine.create(&assignment, host, wall)?;
                return Ok(Outcome { addresses: Some(addresses), pulled: None });
            }
            Action::StartContainer { task, container } => return self.start(host, task, container),
            Action::StopContainer { container, .. } => self.container_ends(host, container, 143),
            Action::RemoveContainer { container, .. } => h.engine.remove(container)?,
            Action::ReleaseTask { task } => {
                let used = self.checker.addresses_of(host);
                let h = &mut self.hosts[host as usize];
                h.disk.leases.release(task, |network, address| used.contains(&(network.clone(), address)));
            }
            Action::RemoveImage { image } => drop(h.engine.images.remove(image)),
        }
        Ok(Outcome::default())
    }

    fn start(&mut self, host: u32, task: &TaskId, container: &str) -> Result<Outcome, ActionError> {
        let h = &mut self.hosts[host as usize];
        let live = h.engine.containers.get(container).is_some_and(|c| c.state.is_live());
        let attached = if live { Vec::new() } else { h.attach(container)? };
        self.network_attach(host, container, &attached)?;
        let h = &mut self.hosts[host as usize];
        let wall = h.clock.wall(self.now_ms);
        if h.engine.start(container, wall)? {
            let c = &h.engine.containers[container];
            let (start, image, health) = (c.started_at.0, c.image.clone(), c.health.is_some());
            let run = h.engine_run;
            let number = container.rsplit('-').next().and_then(|n| u32::from_str_radix(n, 16).ok()).unwrap_or(0);
            let after: Option<Millis> = image.split_once(':').and_then(|(_, ms)| ms.parse().ok());
            // At the end of the run nothing ends by itself any more: then all must come to rest.
            if let Some((after, (verb, _))) = after.zip(image.split_once(':'))
                && self.now_ms.saturating_add(after) < self.config.quiet_from_ms()
            {
                let what = EngineEvent::Ends { container: number, start, failed: verb == "fail" };
                self.queue.push(self.now_ms + after, Event::Engine { host, run, what });
            }
            if health {
                let after = self.net_rng.within(500, 4_000);
                let what = EngineEvent::Healthy { container: number, start };
                self.queue.push(self.now_ms + after, Event::Engine { host, run, what });
            }
            self.trace.mix(&[self.now_ms, 10, u64::from(host), u64::from(number)]);
            if let Some(broken) = self.checker.container_started(host, container, attached, self.now_ms) {
                self.broken(broken);
            }
        }
        let used = self.checker.addresses_of(host);
        let h = &mut self.hosts[host as usize];
        let addresses = h.reserve(task, &used).ok();
        Ok(Outcome { addresses, pulled: None })
    }

    // --- the session ---

    fn connect(&mut self, host: u32) {
        let h = &mut self.hosts[host as usize];
        let Some(agent) = &mut h.agent else { return };
        if agent.session.is_some() {
            return;
        }
        agent.sessions += 1;
        let number = agent.sessions;
        let cut = h.link.cut_up > 0 || h.link.cut_down > 0;
        let listening = self.master.process.is_some();
        if cut || !listening {
            // Refused at once, or no answer within the call's time.
            let lasted = if cut { CALL_MS } else { 1 };
            let pause = lasted + agent.backoff.after(lasted, self.net_rng.unit());
            return self.agent_event_at(host, self.now_ms + pause, AgentEvent::Connect);
        }
        let node = h.disk.node.clone();
        let conn = self.conns.open(host, node.clone().unwrap_or_default());
        let pulse = Pulse::new(self.now_ms);
        let session = Session { number, conn, live: false, pulse, began_ms: self.now_ms, applying: Default::default() };
        agent.session = Some(session);
        let clock = h.clock.wall(self.now_ms);
        let mut description = description(host, &h.name);
        if h.version > self.master.version {
            match version::as_read(&description) {
                Ok(read) => description = read,
                Err(error) => return self.broken(format!("the master cannot read what h{host} says: {error}")),
            }
        }
        let h = &self.hosts[host as usize];
        let Some(agent) = &h.agent else { return };
        let description = Box::new(description);
        let first = match node {
            None => ToMaster::Join { key: h.key(), description, clock },
            Some(_) => {
                ToMaster::Hello { version: h.version, head: agent.assignments.head().clone(), description, clock }
            }
        };
        self.send_up(conn, first);
        self.agent_event_at(host, self.now_ms + CALL_MS, AgentEvent::GiveUp(number));
    }

    fn session(&mut self, host: u32, number: u32) -> Option<&mut Session> {
        self.hosts[host as usize].agent.as_mut()?.session.as_mut().filter(|s| s.number == number)
    }

    /// A call was not answered in time.
    fn give_up(&mut self, host: u32, number: u32) {
        if self.session(host, number).is_some_and(|s| !s.live) {
            self.end_session(host);
        }
    }

    /// The session is over, for whatever reason: its connection is closed, the next attempt comes after a pause.
    fn end_session(&mut self, host: u32) {
        let random = self.net_rng.unit();
        let now_ms = self.now_ms;
        let Some(agent) = &mut self.hosts[host as usize].agent else { return };
        let Some(session) = agent.session.take() else { return };
        let pause = agent.backoff.after(now_ms - session.began_ms, random);
        self.close(session.conn, End::Agent);
        self.agent_event_at(host, now_ms + pause, AgentEvent::Connect);
    }

    /// The agent's end of a connection was closed by the master, or gave up.
    pub(crate) fn agent_sees_end(&mut self, conn: ConnId) {
        let Some(c) = self.conns.get(conn) else { return };
        let host = c.host;
        let current = |w: &Self| {
            let session = w.hosts[host as usize].agent.as_ref().and_then(|a| a.session.as_ref());
            session.is_some_and(|s| s.conn == conn)
        };
        if current(self) {
            self.end_session(host);
        } else {
            self.close(conn, End::Agent);
        }
    }

    /// A message of the master has arrived.
    pub(crate) fn agent_hears(&mut self, conn: ConnId, message: ToAgent) {
        let Some(c) = self.conns.get(conn) else { return };
        let host = c.host;
        let h = &mut self.hosts[host as usize];
        let now_ms = self.now_ms;
        let Some(agent) = &mut h.agent else { return };
        let Some(session) = agent.session.as_mut().filter(|s| s.conn == conn) else { return };
        session.pulse.heard(now_ms);
        match message {
            ToAgent::End => self.end_session(host),
            ToAgent::Removed => self.removed(host),
            ToAgent::Joined(node) => {
                self.trace.line(now_ms, || format!("h{host}: is node {node}"));
                h.disk.node = Some(node);
                agent.session = None;
                self.close(conn, End::Agent);
                self.agent_event_at(host, now_ms + 1, AgentEvent::Connect);
            }
            ToAgent::Opened => {
                session.live = true;
                let number = session.number;
                agent.outbox.begin_session();
                self.flush(host);
                self.beat(host, number);
            }
            ToAgent::OfLaterRelease => {}
            ToAgent::HeartbeatAck => session.pulse.acknowledged(master_core::liveness::HEARTBEAT_MS),
            ToAgent::Assignments(change) => {
                session.applying.push_back(*change);
                if session.applying.len() == 1 {
                    let number = session.number;
                    let took = self.net_rng.within(LEDGER_MS.0, LEDGER_MS.1);
                    self.agent_event_at(host, now_ms + took, AgentEvent::Applied(number));
                }
            }
            ToAgent::Reported(tasks) => {
                agent.outbox.reported(tasks.iter());
                self.flush(host);
            }
            ToAgent::Refused(tasks) => agent.outbox.refused(tasks.iter()),
        }
    }

    /// The cluster does not know this host any more: its operator lets it leave, and join as another node.
    fn removed(&mut self, host: u32) {
        self.agent_gone(host, true);
        let h = &mut self.hosts[host as usize];
        h.lives += 1;
        h.disk = Default::default();
        let ids: Vec<String> = h.engine.live().map(|c| c.id.clone()).collect();
        for id in ids {
            self.container_ends(host, &id, 137);
        }
        let h = &mut self.hosts[host as usize];
        h.engine.containers.clear();
        h.engine.networks.clear();
        h.engine.take_events();
        self.network_leaves(host);
        self.agent_start(host);
    }

    fn beat(&mut self, host: u32, number: u32) {
        let now_ms = self.now_ms;
        let random = self.net_rng.unit();
        let Some(session) = self.session(host, number).filter(|s| s.live) else { return };
        if session.pulse.is_silent(now_ms) {
            return self.end_session(host);
        }
        let (_, pause) = session.pulse.beat(random);
        let conn = session.conn;
        self.send_up(conn, ToMaster::Heartbeat);
        self.stats.heartbeats += 1;
        // Reports that the master could not take go with it, and those that wait although it is silent.
        self.report(host, Outbox::unsent);
        self.agent_event_at(host, now_ms + pause, AgentEvent::Beat(number));
    }

    /// The disk has taken a batch, or refused it.
    fn applied(&mut self, host: u32, number: u32) {
        if self.session(host, number).is_none() {
            return;
        }
        let h = &mut self.hosts[host as usize];
        let applied = h.apply();
        h.follow_networks();
        // The kernel follows before the master hears of it.
        if h.agent.as_mut().is_some_and(|a| std::mem::take(&mut a.network_changed)) {
            self.network_look(host);
        }
        let h = &mut self.hosts[host as usize];
        let ack = match applied {
            Ok(ack) => ack,
            Err(_) => return self.end_session(host),
        };
        if self.net_rng.per_mille(5)
            && let Some(agent) = &h.agent
        {
            // A state that a damaged disk may show again.
            h.disk_moods.earlier = Some((agent.assignments.clone(), agent.memory.tasks.clone()));
        }
        let Some(session) = self.session(host, number) else { return };
        let (conn, more) = (session.conn, !session.applying.is_empty());
        if let Some(head) = ack {
            self.send_up(conn, ToMaster::Ack(head));
        }
        if more {
            let took = self.net_rng.within(LEDGER_MS.0, LEDGER_MS.1);
            self.agent_event_at(host, self.now_ms + took, AgentEvent::Applied(number));
        }
        self.starts_go_on(host);
        if self.hosts[host as usize].agent.as_ref().is_some_and(|a| !a.settled) {
            self.round_at(host, self.now_ms);
        }
    }

    /// Starts that waited for their names, which may have come.
    fn starts_go_on(&mut self, host: u32) {
        let h = &self.hosts[host as usize];
        let Some(agent) = &h.agent else { return };
        let ready = agent.ops.iter().filter_map(|(number, op)| match &op.action {
            Action::StartContainer { task, .. } if op.waits && h.announced(task) => Some(*number),
            _ => None,
        });
        for number in ready.collect::<Vec<u32>>() {
            let due_ms = self.now_ms + self.net_rng.within(100, 600);
            let agent = self.hosts[host as usize].agent.as_mut();
            if let Some(op) = agent.and_then(|a| a.ops.get_mut(&number)) {
                (op.due_ms, op.waits) = (due_ms, false);
            }
            self.agent_event_at(host, due_ms, AgentEvent::Done(number));
        }
    }

    /// Sends the next reports, unless the last ones are not answered.
    fn flush(&mut self, host: u32) {
        self.report(host, Outbox::next);
    }

    fn report(&mut self, host: u32, take: fn(&mut Outbox, usize) -> Vec<TaskReport>) {
        let Some(agent) = &mut self.hosts[host as usize].agent else { return };
        let Some(session) = agent.session.as_ref().filter(|s| s.live) else { return };
        let conn = session.conn;
        let reports = take(&mut agent.outbox, REPORTS_MAX);
        if !reports.is_empty() {
            self.send_up(conn, ToMaster::Reports(reports));
        }
    }
}

/// What a host says of itself.
fn description(host: u32, name: &str) -> NodeDescription {
    NodeDescription {
        hostname: name.into(),
        capacity: OFFERED,
        offered: OFFERED,
        os: "linux".into(),
        arch: "x86_64".into(),
        underlay4: Some(underlay(host)),
        underlay_mtu: UNDERLAY_MTU,
        ..NodeDescription::default()
    }
}

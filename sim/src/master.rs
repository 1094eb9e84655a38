//! The master's process: its loop, its store and its listeners, around the leader that ships.
//!
//! The order of a turn is that of `master/src/cluster.rs`: decide a batch, commit, dismiss, answer, tell agents. The
//! order of a session's reader is that of `master/src/agents.rs`: one message after the other, each answered before
//! the next.

use std::{collections::VecDeque, rc::Rc};

use agent_core::{AssignmentChange, Head};
use master_core::{
    Command, Context, Core, Now, Reply, Settings, check_clock,
    leader::{Answer, Leader},
    model::Change,
};
use skein_api::{ApiError, NodeDescription, NodeId, Origin, TaskId, UnixMillis};

use crate::{
    host::Clock,
    net::{ConnId, End, SESSION_QUEUE, ToAgent, ToMaster},
    queue::Millis,
    random::Random,
    store::Store,
    version,
    world::{Event, MasterEvent, World},
};

/// Events of one turn: `BATCH_MAX` of the loop.
const BATCH_MAX: usize = 512;
/// How often clocks are looked at: `TICK` of the loop.
pub(crate) const TICK_MS: Millis = 300;
/// Pause before the store is opened again: `REOPEN_PAUSE` of the loop.
const REOPEN_MS: Millis = 1_000;
/// Changes of one transaction: `TXN_CHANGES_MAX` of the loop.
const TXN_CHANGES_MAX: usize = 4_096;
/// A commit takes 1 to 4 ms, and a millisecond more for each thousand changes.
const COMMIT_MS: (Millis, Millis) = (1, 4);

/// Who waits for an answer of the loop.
#[derive(Clone, Debug)]
pub(crate) enum Asker {
    /// The cluster's own first command.
    Nobody,
    User(u32),
    Join(ConnId),
    /// A hello: its description is stored first, then the session opens.
    Hello(ConnId, Head),
    Reports(ConnId, Rc<[TaskId]>),
}

/// What waits for the loop.
#[derive(Debug)]
pub(crate) enum Incoming {
    Command { command: Box<Command>, origin: Origin, asker: Asker },
    SessionOpen { conn: ConnId, node: NodeId, head: Head },
    SessionClosed { node: NodeId, session: u64 },
    Heartbeat { node: NodeId, session: u64 },
    Acked { node: NodeId, head: Head },
}

/// Where a master is killed in its next turn that commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CrashAt {
    /// Decided, and nothing written.
    BeforeCommit,
    /// Written, and nobody told.
    AfterCommit,
    /// Users are answered, agents are not told.
    AfterReplies,
    /// Some agents are told, others not.
    AmongAgents,
}

/// How the store's disk misbehaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoreMoods {
    /// It takes nothing.
    pub(crate) full: bool,
    /// The next commit's outcome is not known: true, it was kept; false, it was not.
    pub(crate) unknown: Option<bool>,
    /// Each commit takes so many milliseconds more.
    pub(crate) slow_ms: u64,
    /// A record of the next commit lands in the place of another.
    pub(crate) misdirects: bool,
}

/// A commit on its way.
#[derive(Debug)]
struct Committing {
    changes: Vec<Change>,
    /// So many of them are durable.
    done: usize,
    /// It fails, for this reason.
    refused: Option<String>,
}

/// The process, as long as it lives.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) leader: Leader<ConnId, Asker>,
    started_ms: Millis,
    inbox: VecDeque<Incoming>,
    committing: Option<Committing>,
    reopen_at: Millis,
}

/// The master's machine.
#[derive(Debug)]
pub(crate) struct Master {
    pub(crate) process: Option<Process>,
    /// Counts starts.
    pub(crate) run: u32,
    pub(crate) paused_until: Millis,
    pub(crate) clock: Clock,
    /// What is durable.
    pub(crate) store: Store,
    /// Its release.
    pub(crate) version: u32,
    /// It is to be upgraded, since agents are ahead of it.
    behind: bool,
    pub(crate) moods: StoreMoods,
    /// A copy of the store, for a restore.
    pub(crate) backup: Option<Store>,
    pub(crate) crash_at: Option<CrashAt>,
    pub(crate) rng: Random,
    /// It was stopped, waited long for its disk, or read its store anew, until then.
    pub(crate) held_until_ms: Millis,
    /// Faults that keep it from running.
    pub(crate) held_down: u32,
    chains: u64,
}

impl Master {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            process: None,
            run: 0,
            paused_until: 0,
            clock: Clock::default(),
            store: Store::default(),
            version: version::FIRST,
            behind: false,
            moods: StoreMoods::default(),
            backup: None,
            crash_at: None,
            rng: Random::new(seed, 2),
            held_until_ms: 0,
            held_down: 0,
            chains: 0,
        }
    }

    pub(crate) fn core(&self) -> Option<&Core> {
        self.process.as_ref().map(|p| p.leader.core())
    }

    /// Since when it has looked at its clock all the time; a pause or a held-up commit begins anew.
    pub(crate) fn looks_since_ms(&self) -> Millis {
        self.process.as_ref().map_or(Millis::MAX, |p| p.started_ms.max(self.held_until_ms))
    }

    /// No commit is on its way: memory is what was promised.
    pub(crate) fn is_between_commits(&self) -> bool {
        self.process.as_ref().is_some_and(|p| p.committing.is_none())
    }

    /// Reads a core out of the store, through the bytes that the real store keeps.
    fn load(&mut self, now: Now) -> Result<(Core, String), String> {
        self.store.verify()?;
        let objects = self.store.read()?;
        self.chains += 1;
        Ok((Core::load(Settings::default(), objects, now), format!("chain-{}", self.chains)))
    }
}

impl World {
    pub(crate) fn master_now(&self) -> Now {
        let started = self.master.process.as_ref().map_or(self.now_ms, |p| p.started_ms);
        Now { wall: self.master.clock.wall(self.now_ms), mono_ms: 1_000 + self.now_ms - started }
    }

    fn context(&mut self, origin: Origin) -> Context {
        Context { now: self.master_now(), origin, seed: self.master.rng.bits() }
    }

    /// The process starts: reads the store, takes the lead, listens.
    pub(crate) fn master_start(&mut self) {
        if self.master.process.is_some() || self.master.held_down > 0 {
            return;
        }
        if self.master.moods.full && !self.master.store.is_empty() {
            // It cannot take the lead, which is a write. Its service manager starts it again.
            self.queue.push(self.now_ms + REOPEN_MS, Event::MasterStart);
            return;
        }
        let now = Now { wall: self.master.clock.wall(self.now_ms), mono_ms: 1_000 };
        let loaded = self.master.load(now);
        let (core, chain) = match loaded {
            Ok(loaded) => loaded,
            Err(damage) => return self.store_damaged(damage),
        };
        self.master.run += 1;
        let fresh = core.model().cluster.is_none();
        self.master.process = Some(Process {
            leader: Leader::new(core, chain),
            started_ms: self.now_ms,
            inbox: VecDeque::new(),
            committing: None,
            reopen_at: 0,
        });
        self.trace.mix(&[self.now_ms, 1, u64::from(self.master.run)]);
        self.trace.line(self.now_ms, || "master starts".to_owned());
        if let Some(broken) = self.checker.master_loaded(self.master.core()) {
            self.broken(broken);
        }
        if fresh {
            self.found_cluster();
        }
        self.queue.push(self.now_ms + TICK_MS, Event::Master { run: self.master.run, what: MasterEvent::Tick });
    }

    /// The process ends, at once. Its kernel closes its connections.
    pub(crate) fn master_crash(&mut self) {
        let Some(_process) = self.master.process.take() else { return };
        self.trace.mix(&[self.now_ms, 2]);
        self.trace.line(self.now_ms, || "master dies".to_owned());
        self.master.paused_until = 0;
        for conn in self.conns.of(|c| c.master_open) {
            self.close(conn, End::Master);
        }
        self.users_cut_off();
    }

    /// An event for the loop.
    pub(crate) fn master_take(&mut self, incoming: Incoming) {
        let Some(process) = &mut self.master.process else { return };
        process.inbox.push_back(incoming);
        self.master_turns();
    }

    pub(crate) fn master_event(&mut self, run: u32, what: MasterEvent) {
        if run != self.master.run || self.master.process.is_none() {
            return;
        }
        if self.now_ms < self.master.paused_until {
            self.queue.push(self.master.paused_until, Event::Master { run, what });
            return;
        }
        match what {
            MasterEvent::Tick => {
                self.queue.push(self.now_ms + TICK_MS, Event::Master { run, what: MasterEvent::Tick });
                let now = self.master_now();
                let idle = self.master.process.as_mut().is_some_and(|p| {
                    let idle = p.committing.is_none();
                    if idle {
                        p.leader.tick(now);
                    }
                    idle
                });
                if idle {
                    self.master_turn();
                    self.master_turns();
                }
            }
            MasterEvent::Committed => self.commit_done(),
            // What came while it was stopped.
            MasterEvent::Resumed => self.master_turns(),
        }
    }

    /// Turns, as long as something waits and no commit is on its way.
    fn master_turns(&mut self) {
        loop {
            let ready = self.now_ms >= self.master.paused_until
                && self.master.process.as_ref().is_some_and(|p| p.committing.is_none() && !p.inbox.is_empty());
            if !ready {
                return;
            }
            self.master_turn();
        }
    }

    fn master_turn(&mut self) {
        for _ in 0..BATCH_MAX {
            let Some(incoming) = self.master.process.as_mut().and_then(|p| p.inbox.pop_front()) else { break };
            self.master_decide(incoming);
        }
        let now = self.master_now();
        let seed = self.master.rng.bits();
        let Some(process) = &mut self.master.process else { return };
        if process.leader.read_only().is_some() && self.now_ms >= process.reopen_at {
            self.recover();
            return self.effects();
        }
        let changes = process.leader.settle(now, seed);
        if changes.is_empty() {
            return self.effects();
        }
        if self.master.crash_at == Some(CrashAt::BeforeCommit) {
            self.master.crash_at = None;
            return self.master_killed();
        }
        if skein_api::mutant!("early-reply") {
            self.answer();
        }
        let refused = self.master.moods.full.then(|| "no space left on device".to_owned());
        let Some(process) = &mut self.master.process else { return };
        process.committing = Some(Committing { changes, done: 0, refused });
        self.commit_next();
    }

    fn commit_next(&mut self) {
        let Some(committing) = self.master.process.as_ref().and_then(|p| p.committing.as_ref()) else { return };
        let changes = (committing.changes.len() - committing.done).min(TXN_CHANGES_MAX) as u64;
        let took = self.master.rng.within(COMMIT_MS.0, COMMIT_MS.1) + changes / 1_000 + self.master.moods.slow_ms;
        let run = self.master.run;
        self.queue.push(self.now_ms + took, Event::Master { run, what: MasterEvent::Committed });
    }

    /// The disk has answered.
    fn commit_done(&mut self) {
        if self.master.moods.slow_ms > 0 {
            self.master.held_until_ms = self.now_ms;
        }
        let Some(mut committing) = self.master.process.as_mut().and_then(|p| p.committing.take()) else { return };
        let unknown = self.master.moods.unknown.take();
        let end = (committing.done + TXN_CHANGES_MAX).min(committing.changes.len());
        let lost = skein_api::mutant!("lost-fsync") && self.master.rng.per_mille(20);
        if (committing.refused.is_none() && !lost && unknown.is_none()) || unknown == Some(true) {
            let changes = &committing.changes[committing.done..end];
            let Master { store, moods, rng, version, .. } = &mut self.master;
            match store.write(changes, *version == version::LAST, moods.misdirects.then_some(rng)) {
                Ok(strayed) => moods.misdirects &= !strayed,
                Err(damage) => return self.store_damaged(damage),
            }
            self.checker.committed(changes);
        }
        let revision = self.master.store.revision;
        let now_ms = self.now_ms;
        let Some(process) = &mut self.master.process else { return };
        if unknown.is_some() {
            committing.refused = Some("the store does not know whether it kept it".to_owned());
        }
        if let Some(why) = committing.refused {
            self.trace.line(now_ms, || format!("commit refused: {why}"));
            process.leader.refused(why);
            process.reopen_at = now_ms;
            self.recover();
        } else {
            process.leader.committed(committing.changes[committing.done..end].to_vec(), revision);
            self.trace.mix(&[now_ms, 3, revision, (end - committing.done) as u64]);
            let up_ms = now_ms - process.started_ms;
            let changes = &committing.changes[committing.done..end];
            let touched = self.checker.touched(changes, process.leader.core(), up_ms);
            if let Some(broken) = touched {
                return self.broken(broken);
            }
            committing.done = end;
            if end < committing.changes.len() {
                process.committing = Some(committing);
                return self.commit_next();
            }
        }
        if self.master.crash_at == Some(CrashAt::AfterCommit) {
            self.master.crash_at = None;
            return self.master_killed();
        }
        self.effects();
        self.master_turns();
    }

    /// The store names what is damaged and is not used. Its operator restores a backup, after a while.
    fn store_damaged(&mut self, damage: String) {
        self.trace.mix(&[self.now_ms, 12]);
        self.trace.line(self.now_ms, || format!("the store is refused: {damage}"));
        if self.master.backup.is_none() {
            return self.broken(format!("the master cannot read its store: {damage}"));
        }
        self.restore();
        let back = self.now_ms + self.master.rng.within(1_000, 15_000);
        self.queue.push(back, Event::MasterRestored);
    }

    /// A master of the next release starts in this one's place.
    pub(crate) fn master_upgraded(&mut self) {
        self.master.behind = false;
        if self.master.version < version::LAST {
            self.master.version += 1;
            self.trace.line(self.now_ms, || "the master is upgraded".to_owned());
            self.master_crash();
            self.queue.push(self.now_ms + REOPEN_MS, Event::MasterStart);
        }
    }

    /// An agent speaks a later version: it is refused, and somebody upgrades the master.
    fn refuse_later(&mut self, conn: ConnId) {
        self.close(conn, End::Master);
        if !std::mem::replace(&mut self.master.behind, true) {
            let soon = self.now_ms + self.master.rng.within(5_000, 40_000);
            self.queue.push(soon, Event::MasterUpgrade);
        }
    }

    /// The store is opened and read again, if its disk takes the lead's record.
    fn recover(&mut self) {
        let now = self.master_now();
        if self.master.moods.full {
            if let Some(process) = &mut self.master.process {
                process.reopen_at = self.now_ms + REOPEN_MS;
            }
            return;
        }
        let (core, chain) = match self.master.load(now) {
            Ok(loaded) => loaded,
            Err(damage) => return self.store_damaged(damage),
        };
        self.trace.line(self.now_ms, || "store opened again".to_owned());
        if let Some(broken) = self.checker.master_loaded(Some(&core)) {
            self.broken(broken);
        }
        if let Some(process) = &mut self.master.process {
            process.leader.resumed(core, chain, now);
        }
        // Who is heard of is memory of the core that failed: the new one begins to listen.
        self.master.held_until_ms = self.now_ms;
    }

    /// What may be said after a turn: dismissals, answers, assignments.
    fn effects(&mut self) {
        let Some(process) = &mut self.master.process else { return };
        for (node, conn) in process.leader.dismissed() {
            if let Some(conn) = conn {
                self.send_down(conn, ToAgent::Removed);
            }
            for conn in self.conns.of(|c| c.master_open && c.node == node) {
                self.close(conn, End::Master);
            }
        }
        self.answer();
        if self.master.crash_at == Some(CrashAt::AfterReplies) {
            self.master.crash_at = None;
            return self.master_killed();
        }
        let Some(process) = &mut self.master.process else { return };
        // What the operator should know is logged; nothing follows from it.
        process.leader.take_notices();
        let due = process.leader.due();
        let half = due.len() / 2;
        for (told, node) in due.into_iter().enumerate() {
            if told == half && self.master.crash_at == Some(CrashAt::AmongAgents) {
                self.master.crash_at = None;
                return self.master_killed();
            }
            self.tell(&node);
        }
    }

    fn master_killed(&mut self) {
        self.master_crash();
        let back = self.now_ms + self.master.rng.within(200, 3_000);
        self.queue.push(back, Event::MasterStart);
    }

    fn answer(&mut self) {
        let Some(process) = &mut self.master.process else { return };
        for (asker, answer) in process.leader.replies() {
            self.master_reply(asker, answer);
        }
    }

    fn tell(&mut self, node: &NodeId) {
        let Some(process) = &mut self.master.process else { return };
        let Some(conn) = process.leader.session(node).copied() else { return };
        if self.conns.get(conn).is_some_and(|c| c.down.messages.len() >= SESSION_QUEUE) {
            return;
        }
        let chain = process.leader.chain().to_owned();
        let Some(batch) = process.leader.batch(node) else { return };
        if let Some(foreign) = self.checker.foreign(node, &batch, process.leader.core()) {
            return self.broken(foreign);
        }
        let host = self.conns.get(conn).map(|c| c.host);
        let earlier = host.is_some_and(|host| self.hosts[host as usize].version < self.master.version);
        let upserts = if earlier {
            self.send_down(conn, ToAgent::OfLaterRelease);
            let readings = &mut self.readings;
            match batch.upserts.into_iter().map(|document| readings.read(node, document)).collect() {
                Ok(upserts) => upserts,
                Err(error) => return self.broken(format!("node {node} cannot read what it is told: {error}")),
            }
        } else {
            batch.upserts
        };
        let change = AssignmentChange {
            chain,
            full: batch.full,
            base: batch.base,
            generation: batch.generation,
            upserts,
            removes: batch.removes,
        };
        self.trace.line(self.now_ms, || {
            let keys: Vec<String> = change.upserts.iter().map(skein_api::Assignment::key).collect();
            let (chain, base, generation) = (&change.chain, change.base, change.generation);
            format!("node {node} is told {chain} {base} -> {generation}: {keys:?}, without {:?}", change.removes)
        });
        self.send_down(conn, ToAgent::Assignments(Box::new(change)));
    }

    fn master_decide(&mut self, incoming: Incoming) {
        let now = self.master_now();
        match incoming {
            Incoming::Command { command, origin, asker } => {
                let ctx = self.context(origin);
                if let Some(process) = &mut self.master.process {
                    process.leader.command(&command, &ctx, asker);
                }
            }
            Incoming::SessionOpen { conn, node, head } => self.open_session(conn, &node, &head, now),
            Incoming::SessionClosed { node, session } => {
                if let Some(process) = &mut self.master.process {
                    process.leader.session_closed(&node, session);
                }
            }
            Incoming::Heartbeat { node, session } => {
                let process = self.master.process.as_mut();
                if let Some(conn) = process.and_then(|p| p.leader.heartbeat(&node, session, now).copied()) {
                    self.send_down(conn, ToAgent::HeartbeatAck);
                }
            }
            Incoming::Acked { node, head } => {
                if let Some(process) = &mut self.master.process {
                    process.leader.acked(&node, &head.chain, head.generation);
                }
            }
        }
    }

    fn open_session(&mut self, conn: ConnId, node: &NodeId, head: &Head, now: Now) {
        let Some(process) = &mut self.master.process else { return };
        let Some(opened) = process.leader.session_open(node, conn, &head.chain, head.generation, now) else {
            return self.close(conn, End::Master);
        };
        if let Some(old) = opened.replaced {
            self.close(old, End::Master);
        }
        // An agent that was replaced meanwhile has closed its end.
        let host = self.conns.get(conn).filter(|c| c.agent_open).map(|c| c.host);
        if let Some(host) = host.filter(|host| self.hosts[*host as usize].version > self.master.version) {
            return self.broken(format!("h{host} has a session, and speaks a later version than its master"));
        }
        if let Some(c) = self.conns.get(conn) {
            c.session = Some(opened.number);
        }
        self.send_down(conn, ToAgent::Opened);
        if opened.current {
            let Head { chain, generation } = head.clone();
            let change = AssignmentChange { chain, base: generation, generation, ..Default::default() };
            self.send_down(conn, ToAgent::Assignments(Box::new(change)));
        }
        self.reader_goes_on(conn);
    }

    /// The master's end of a connection was closed by the agent, or gave up.
    pub(crate) fn master_sees_end(&mut self, conn: ConnId) {
        let Some(c) = self.conns.get(conn) else { return };
        let (node, session) = (c.node.clone(), c.session.take());
        self.close(conn, End::Master);
        if let Some(session) = session {
            self.master_take_later(Incoming::SessionClosed { node, session });
        }
    }

    /// A message of an agent has arrived.
    pub(crate) fn master_hears(&mut self, conn: ConnId, message: ToMaster) {
        let Some(c) = self.conns.get(conn) else { return };
        let (node, session) = (c.node.clone(), c.session);
        let wall = self.master.clock.wall(self.now_ms);
        match message {
            ToMaster::End => self.master_sees_end(conn),
            ToMaster::Join { key, description, clock } => {
                c.busy = true;
                let origin = Origin { who: format!("host:{}", description.hostname), why: "join".into() };
                let command = Command::Join {
                    token: skein_api::TokenId::new(crate::users::TOKEN),
                    secret_sha256: crate::users::SECRET.into(),
                    key_digest: key,
                    description,
                    clock,
                };
                let command = Box::new(command);
                self.master_take(Incoming::Command { command, origin, asker: Asker::Join(conn) });
            }
            ToMaster::Hello { version, .. }
                if version > self.master.version && !skein_api::mutant!("version-unchecked") =>
            {
                self.refuse_later(conn);
            }
            ToMaster::Hello { head, description, clock, .. } => {
                c.busy = true;
                self.hello(conn, node, head, description, clock, wall);
            }
            ToMaster::Heartbeat => {
                if let Some(session) = session {
                    self.master_take(Incoming::Heartbeat { node, session });
                }
            }
            ToMaster::Ack(head) => self.master_take(Incoming::Acked { node, head }),
            ToMaster::Reports(reports) => {
                c.busy = true;
                let tasks = reports.iter().map(|r| r.task.clone()).collect();
                let origin = Origin { who: format!("node:{node}"), why: "task report".into() };
                let command = Box::new(Command::Reports { node, reports });
                self.master_take(Incoming::Command { command, origin, asker: Asker::Reports(conn, tasks) });
            }
        }
    }

    fn hello(
        &mut self,
        conn: ConnId,
        node: NodeId,
        head: Head,
        description: Box<NodeDescription>,
        clock: UnixMillis,
        wall: UnixMillis,
    ) {
        let known = self.master.core().is_some_and(|core| core.model().nodes.contains_key(&node));
        if !known {
            self.send_down(conn, ToAgent::Removed);
            return self.close(conn, End::Master);
        }
        if check_clock(clock, wall).is_err() {
            return self.close(conn, End::Master);
        }
        let origin = Origin { who: format!("node:{node}"), why: "host description".into() };
        let command = Box::new(Command::Describe { node, description });
        self.master_take(Incoming::Command { command, origin, asker: Asker::Hello(conn, head) });
    }

    fn master_reply(&mut self, asker: Asker, answer: Answer) {
        match asker {
            Asker::Nobody => {}
            Asker::User(user) => self.user_hears(user, answer),
            Asker::Join(conn) => {
                match answer {
                    Ok(Reply::Node(node)) => {
                        if let Some(c) = self.conns.get(conn) {
                            c.node = node.clone();
                        }
                        self.send_down(conn, ToAgent::Joined(node));
                    }
                    Ok(_) => self.broken("a join answers with a node".into()),
                    Err(refusal) => self.join_refused(conn, &refusal),
                }
                self.close(conn, End::Master);
            }
            Asker::Hello(conn, head) => match answer {
                Ok(_) => {
                    let Some(node) = self.conns.get(conn).map(|c| c.node.clone()) else { return };
                    self.master_take_later(Incoming::SessionOpen { conn, node, head });
                }
                Err(_) => self.close(conn, End::Master),
            },
            Asker::Reports(conn, tasks) => self.reported(conn, tasks, answer),
        }
    }

    /// A host may not join: its operator does what the hint says.
    fn join_refused(&mut self, conn: ConnId, refusal: &ApiError) {
        let Some(host) = self.conns.get(conn).map(|c| c.host) else { return };
        let command = match refusal.code.as_str() {
            // A node that a backup brought back, and that this host was before.
            "name_taken" => Command::NodeRemove { node: self.hosts[host as usize].name.clone(), force: true },
            // The master's clock was a year ahead for a while.
            "token_unknown" | "token_expired" => crate::users::token(),
            _ => return,
        };
        let origin = Origin { who: "operator".into(), why: refusal.message.clone() };
        self.master_take_later(Incoming::Command { command: Box::new(command), origin, asker: Asker::Nobody });
    }

    fn reported(&mut self, conn: ConnId, tasks: Rc<[TaskId]>, answer: Result<Reply, ApiError>) {
        match answer {
            Ok(_) => {
                self.send_down(conn, ToAgent::Reported(tasks));
                self.reader_goes_on(conn);
            }
            // Not durable: the agent keeps them and sends them again.
            Err(error) if error.code == "read_only" || error.code == "not_stored" => {
                self.send_down(conn, ToAgent::Refused(tasks));
                self.reader_goes_on(conn);
            }
            // The agent sees why, then the end.
            Err(_) => self.master_sees_end(conn),
        }
    }

    /// In the middle of a turn's effects: it waits for the next turn.
    fn master_take_later(&mut self, incoming: Incoming) {
        if let Some(process) = &mut self.master.process {
            process.inbox.push_back(incoming);
            let run = self.master.run;
            self.queue.push(self.now_ms, Event::Master { run, what: MasterEvent::Resumed });
        }
    }

    fn reader_goes_on(&mut self, conn: ConnId) {
        let now_ms = self.now_ms;
        let Some(c) = self.conns.get(conn) else { return };
        c.busy = false;
        if let Some(at) = c.up.arm(now_ms) {
            self.queue.push(at, Event::Up(conn));
        }
    }
}

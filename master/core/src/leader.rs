//! A master's term of office, without its sockets and its store: who has a session, what a turn decides, what may be
//! said once it is durable.
//!
//! ```text
//! command, heartbeat, session … ─> settle() ─> the shell commits ─┬─ committed() ─> replies(), dismissed(), batch(node)
//!           (a turn takes many)                                   └─ refused() ──> refusals; read-only until resumed()
//! ```
//!
//! The shell owns what a session and an asker are made of: `S` leads to an agent, `R` to whoever waits for an answer.
//! Nothing here waits; a turn ends with [`Leader::replies`].

use std::collections::BTreeMap;

use skein_api::{ApiError, NodeId};

use crate::{
    command::{Command, Context, Now, Reply},
    core::Core,
    dispatch::Batch,
    model::Change,
};

/// The answer to a command.
pub type Answer = Result<Reply, ApiError>;

/// A session of an agent.
#[derive(Clone, Debug)]
struct Session<S> {
    number: u64,
    link: S,
}

/// What a new session begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened<S> {
    /// The session's number; later ones are higher.
    pub number: u64,
    /// The node's session until now, which ends: the same identity from two places is a half-open connection, or a
    /// copy, and the newer one is the host.
    pub replaced: Option<S>,
    /// The agent's ledger is complete. It is to be told so: it waits for that word before it removes what it does not
    /// know.
    pub current: bool,
}

/// One term: the core, the sessions, and the answers that wait for the commit.
#[derive(Clone, Debug)]
pub struct Leader<S, R> {
    core: Core,
    /// Names this term's sequence of generations: a new one after each load, so that agents get everything anew.
    chain: String,
    sessions: BTreeMap<NodeId, Session<S>>,
    sessions_opened: u64,
    read_only: Option<String>,
    replies: Vec<(R, Answer)>,
    /// Nodes that this turn removes.
    removed: Vec<NodeId>,
}

impl<S, R> Leader<S, R> {
    /// A term that begins with what the store holds. `chain` is a new random name.
    pub fn new(core: Core, chain: String) -> Self {
        Self {
            core,
            chain,
            sessions: BTreeMap::new(),
            sessions_opened: 0,
            read_only: None,
            replies: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// The state, to read.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// The state, for questions that put back what they change.
    pub fn core_to_ask(&mut self) -> &mut Core {
        &mut self.core
    }

    /// Name of this term's sequence of generations.
    pub fn chain(&self) -> &str {
        &self.chain
    }

    /// Why nothing can be changed, while it cannot.
    pub fn read_only(&self) -> Option<&str> {
        self.read_only.as_deref()
    }

    /// Decides a command; the answer comes out of [`Leader::replies`] at the end of the turn.
    pub fn command(&mut self, command: &Command, ctx: &Context, reply: R) {
        let answer = match &self.read_only {
            // What changes nothing needs no store: agents keep their sessions.
            Some(why) => match self.core.decide(command, ctx) {
                Ok((changes, reply)) if changes.is_empty() => Ok(reply),
                Ok(_) => Err(read_only(why)),
                Err(refusal) => Err(refusal),
            },
            None => self.core.execute(command, ctx),
        };
        if let (Command::NodeRemove { .. }, Ok(Reply::Node(node))) = (command, &answer) {
            self.removed.push(node.clone());
        }
        self.replies.push((reply, answer));
    }

    /// A session of a node begins, with what its ledger holds. `None`: there is no such node, cut the connection.
    pub fn session_open(
        &mut self,
        node: &NodeId,
        link: S,
        chain: &str,
        generation: u64,
        now: Now,
    ) -> Option<Opened<S>> {
        if !self.core.model().nodes.contains_key(node) {
            // It was removed while its connection was being made.
            return None;
        }
        self.sessions_opened += 1;
        let number = self.sessions_opened;
        let replaced = self.sessions.insert(node.clone(), Session { number, link }).map(|old| old.link);
        let current = self.core.dispatch_open(node, chain == self.chain, generation);
        self.core.session_opened(node, now);
        Some(Opened { number, replaced, current })
    }

    /// A session ended; false when the node has another by now.
    pub fn session_closed(&mut self, node: &NodeId, number: u64) -> bool {
        let known = self.sessions.get(node).is_some_and(|s| s.number == number);
        if known {
            self.sessions.remove(node);
        }
        known
    }

    /// The session of a node, if it has one.
    pub fn session(&self, node: &NodeId) -> Option<&S> {
        self.sessions.get(node).map(|s| &s.link)
    }

    /// A heartbeat came. The session that it came by is to acknowledge it; `None` when that is not the node's session.
    pub fn heartbeat(&mut self, node: &NodeId, number: u64, now: Now) -> Option<&S> {
        let session = self.sessions.get(node).filter(|s| s.number == number)?;
        self.core.heartbeat(node, now);
        Some(&session.link)
    }

    /// An agent has a generation in its ledger. One of another term says nothing.
    pub fn acked(&mut self, node: &NodeId, chain: &str, generation: u64) {
        if chain == self.chain {
            self.core.dispatch_acked(node, generation);
        }
    }

    /// Looks at clocks.
    pub fn tick(&mut self, now: Now) {
        self.core.tick(now);
    }

    /// Does what follows from this turn's commands, and says what to commit: for each object its last change, in the
    /// order of keys. Nothing while it is read-only.
    pub fn settle(&mut self, now: Now, seed: u64) -> Vec<Change> {
        if self.read_only.is_some() {
            return Vec::new();
        }
        self.core.settle(now, seed);
        self.core.take_staged()
    }

    /// The store has `changes`, all or the first of those that [`Leader::settle`] gave.
    pub fn committed(&mut self, changes: Vec<Change>, revision: u64) {
        self.core.committed(changes, revision);
    }

    /// The store did not take what is still to be committed, or does not know. Memory goes back to what is known to be
    /// durable, the turn's answers become refusals, and nothing can be changed until [`Leader::resumed`].
    pub fn refused(&mut self, why: String) {
        if skein_api::mutant!("no-rollback") {
            return;
        }
        self.core.rollback();
        let refusal = ApiError::new("not_stored", format!("the change was not made durable: {why}"))
            .with_hint("try again; skein info shows whether the store takes writes");
        for (_, answer) in &mut self.replies {
            // A refusal stands; what was to be changed was not.
            if answer.is_ok() {
                *answer = Err(refusal.clone());
            }
        }
        self.removed.clear();
        self.read_only = Some(why);
    }

    /// The store is open again and was read into `core`; a new chain begins, and every session is told everything. A node
    /// whose removal was kept although the store did not know is dismissed.
    pub fn resumed(&mut self, core: Core, chain: String, now: Now) {
        (self.core, self.chain, self.read_only) = (core, chain, None);
        for node in self.sessions.keys() {
            if !self.core.model().nodes.contains_key(node) {
                self.removed.push(node.clone());
            }
            self.core.dispatch_open(node, false, 0);
            self.core.session_opened(node, now);
        }
    }

    /// The answers of this turn, which may leave now.
    pub fn replies(&mut self) -> Vec<(R, Answer)> {
        std::mem::take(&mut self.replies)
    }

    /// Nodes that this turn removed, durably, with their sessions: they are told, and every connection of theirs is cut.
    pub fn dismissed(&mut self) -> Vec<(NodeId, Option<S>)> {
        let removed = std::mem::take(&mut self.removed);
        removed.into_iter().map(|node| (node.clone(), self.sessions.remove(&node).map(|s| s.link))).collect()
    }

    /// Nodes that have a session and something to be told, in order. O(those nodes): the others are looked at once.
    pub fn due(&mut self) -> Vec<NodeId> {
        let (due, without): (Vec<_>, Vec<_>) =
            self.core.dispatch_due().into_iter().partition(|node| self.sessions.contains_key(node));
        for node in &without {
            self.core.dispatch_park(node);
        }
        due
    }

    /// What a node is to be told next, once its session can take it.
    pub fn batch(&mut self, node: &NodeId) -> Option<Batch> {
        self.core.dispatch_take(node)
    }

    /// Every session, to end them.
    pub fn sessions(&self) -> impl Iterator<Item = &S> {
        self.sessions.values().map(|s| &s.link)
    }

    /// What the operator should know, since the last call.
    pub fn take_notices(&mut self) -> Vec<String> {
        self.core.take_notices()
    }
}

fn read_only(why: &str) -> ApiError {
    ApiError::new("read_only", format!("the master takes no changes: {why}")).with_hint("skein info")
}

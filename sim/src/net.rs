//! The network between hosts and master: connections that deliver in order, late, or not any more.
//!
//! A session is one TCP connection. Loss, duplication and reordering of packets are below it: what it shows of them is
//! delay, up to the time-outs of its keep-alive, and a cut. What was on its way when a connection ends is lost; what
//! each side believes of it until it notices is the half-open connection.

use std::{collections::VecDeque, rc::Rc};

use agent_core::{AssignmentChange, Head};
use skein_api::{NodeDescription, NodeId, TaskId, TaskReport, UnixMillis};

use crate::queue::Millis;

/// The agent's end gives a connection up after this long without a byte: keep-alive interval and time-out of
/// `agent/src/identity.rs`, 5 s each.
pub(crate) const AGENT_SILENCE_MS: Millis = 10_000;
/// The master's end: interval and time-out of `master/src/server.rs`, 10 s each.
pub(crate) const MASTER_SILENCE_MS: Millis = 20_000;
/// Messages that wait for an agent: `SESSION_QUEUE` of `master/src/agents.rs`.
pub(crate) const SESSION_QUEUE: usize = 64;

/// From an agent.
#[derive(Debug)]
pub(crate) enum ToMaster {
    Join { key: String, description: Box<NodeDescription>, clock: UnixMillis },
    Hello { version: u32, head: Head, description: Box<NodeDescription>, clock: UnixMillis },
    Heartbeat,
    Ack(Head),
    Reports(Vec<TaskReport>),
    End,
}

/// From the master.
#[derive(Debug)]
pub(crate) enum ToAgent {
    Joined(NodeId),
    /// The session stands.
    Opened,
    HeartbeatAck,
    Assignments(Box<AssignmentChange>),
    Reported(Rc<[TaskId]>),
    Refused(Rc<[TaskId]>),
    Removed,
    /// A message of a kind that the agent's release does not know.
    OfLaterRelease,
    End,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Agent,
    Master,
}

/// A connection by its place and the count of those that had the place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConnId {
    pub(crate) at: u32,
    pub(crate) turn: u32,
}

/// Messages in one direction, each with the time of its arrival.
#[derive(Debug)]
pub(crate) struct Pipe<M> {
    pub(crate) messages: VecDeque<(Millis, M)>,
    /// An event will deliver the first.
    pub(crate) armed: bool,
    last_ms: Millis,
}

impl<M> Default for Pipe<M> {
    fn default() -> Self {
        Self { messages: VecDeque::new(), armed: false, last_ms: 0 }
    }
}

impl<M> Pipe<M> {
    /// Puts a message in that would arrive at `at_ms`, but never before the one ahead of it. The time of arrival when
    /// an event is to be made for it.
    pub(crate) fn push(&mut self, at_ms: Millis, message: M) -> Option<Millis> {
        let at_ms = at_ms.max(self.last_ms);
        self.last_ms = at_ms;
        self.messages.push_back((at_ms, message));
        (!std::mem::replace(&mut self.armed, true)).then_some(at_ms)
    }

    /// When the next message is to be delivered, if one waits and no event will.
    pub(crate) fn arm(&mut self, now_ms: Millis) -> Option<Millis> {
        let at_ms = self.messages.front()?.0;
        (!std::mem::replace(&mut self.armed, true)).then_some(at_ms.max(now_ms))
    }
}

/// A connection of an agent with the master.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) turn: u32,
    pub(crate) host: u32,
    pub(crate) agent_open: bool,
    pub(crate) master_open: bool,
    pub(crate) up: Pipe<ToMaster>,
    pub(crate) down: Pipe<ToAgent>,
    /// The master's reader waits for an answer of the loop.
    pub(crate) busy: bool,
    /// Whose it is, as its certificate says.
    pub(crate) node: NodeId,
    /// The session's number at the master, once it stands.
    pub(crate) session: Option<u64>,
}

/// All connections; places are used again.
#[derive(Debug, Default)]
pub(crate) struct Conns {
    conns: Vec<Conn>,
    free: Vec<u32>,
    /// Connections of each host; closed ones are taken out when the host makes another.
    hosts: Vec<Vec<ConnId>>,
}

impl Conns {
    pub(crate) fn open(&mut self, host: u32, node: NodeId) -> ConnId {
        let conn = |turn| Conn {
            turn,
            host,
            agent_open: true,
            master_open: true,
            up: Pipe::default(),
            down: Pipe::default(),
            busy: false,
            node,
            session: None,
        };
        let id = match self.free.pop() {
            Some(at) => {
                let place = &mut self.conns[at as usize];
                let turn = place.turn + 1;
                *place = conn(turn);
                ConnId { at, turn }
            }
            None => {
                let at = u32::try_from(self.conns.len()).expect("fewer connections than 2^32");
                self.conns.push(conn(0));
                ConnId { at, turn: 0 }
            }
        };
        let host = host as usize;
        self.hosts.resize_with(self.hosts.len().max(host + 1), Vec::new);
        let mut own = std::mem::take(&mut self.hosts[host]);
        own.retain(|id| self.get(*id).is_some());
        own.push(id);
        self.hosts[host] = own;
        id
    }

    /// Connections of a host, in the order in which they were made.
    pub(crate) fn of_host(&self, host: u32) -> Vec<ConnId> {
        self.hosts.get(host as usize).cloned().unwrap_or_default()
    }

    /// The connection, unless both ends are closed.
    pub(crate) fn get(&mut self, id: ConnId) -> Option<&mut Conn> {
        self.conns.get_mut(id.at as usize).filter(|c| c.turn == id.turn && (c.agent_open || c.master_open))
    }

    /// Closes one end; the other end, if it is still open.
    pub(crate) fn close(&mut self, id: ConnId, end: End) -> bool {
        let Some(conn) = self.get(id) else { return false };
        let (open, other) = match end {
            End::Agent => (&mut conn.agent_open, conn.master_open),
            End::Master => (&mut conn.master_open, conn.agent_open),
        };
        if !std::mem::replace(open, false) {
            return false;
        }
        match end {
            // What it had sent may still arrive; what was sent to it does not.
            End::Agent => conn.down.messages.clear(),
            End::Master => conn.up.messages.clear(),
        }
        if !other {
            conn.up.messages.clear();
            conn.down.messages.clear();
            self.free.push(id.at);
        }
        other
    }

    /// Connections of which an end is open, in order.
    pub(crate) fn of(&self, wanted: impl Fn(&Conn) -> bool) -> Vec<ConnId> {
        let open = self.conns.iter().enumerate().filter(|(_, c)| (c.agent_open || c.master_open) && wanted(c));
        open.map(|(at, c)| ConnId { at: u32::try_from(at).expect("counted in u32"), turn: c.turn }).collect()
    }
}

/// A host's way to the master.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// Faults that keep packets from going up.
    pub(crate) cut_up: u32,
    /// Faults that keep packets from coming down.
    pub(crate) cut_down: u32,
    /// Added to each delay, at most.
    pub(crate) delay_ms: u64,
    /// Of a thousand messages, how many wait for a retransmission.
    pub(crate) loss: u64,
}

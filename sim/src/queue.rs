//! The one queue of the world: events by time, and by the order in which they were made within one millisecond.

use std::{cmp::Reverse, collections::BinaryHeap};

use crate::world::Event;

/// Milliseconds since the world began.
pub(crate) type Millis = u64;

#[derive(Clone, Copy, Debug)]
struct Entry {
    at_ms: Millis,
    seq: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at_ms, self.seq) == (other.at_ms, other.seq)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at_ms, self.seq).cmp(&(other.at_ms, other.seq))
    }
}

/// A heap of (time, sequence). O(log n) for each event in and out; no two events are equal, so their order is total.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    heap: BinaryHeap<Reverse<Entry>>,
    seq: u64,
}

impl Queue {
    pub(crate) fn push(&mut self, at_ms: Millis, event: Event) {
        self.seq += 1;
        self.heap.push(Reverse(Entry { at_ms, seq: self.seq, event }));
    }

    /// The next event, unless it comes after `until_ms`.
    pub(crate) fn pop(&mut self, until_ms: Millis) -> Option<(Millis, Event)> {
        if self.heap.peek()?.0.at_ms > until_ms {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| (entry.at_ms, entry.event))
    }

    /// Events that were made so far.
    pub(crate) fn made(&self) -> u64 {
        self.seq
    }
}

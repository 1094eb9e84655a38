//! What does not work on this host, and who was started on it by hand, gathered from the parts that know.
//!
//! Owns: the lists that go to the master. Must not know: how the parts work. No tasks; it reads a `watch` of each part.

use std::future::pending;

use skein_api::{AttachedContainer, NodeDescription};
use tokio::sync::watch;

use crate::{engine::EngineState, executor::ExecutorStatus, ledger::LedgerState, overlay::AddressUse};

/// Most troubles that are told; more are counted.
const TROUBLES_MAX: usize = 16;
/// Longest text of one, characters: a path and two causes.
const TROUBLE_CHARS_MAX: usize = 400;

/// The parts that have something to say of the host.
pub struct Sources {
    /// Known since the start, for as long as the agent runs.
    pub standing: Vec<String>,
    /// The ledger's disk.
    pub ledger: watch::Receiver<LedgerState>,
    /// The engine.
    pub engine: watch::Receiver<EngineState>,
    /// The network.
    pub overlay: watch::Receiver<Vec<String>>,
    /// Addresses in use: no trouble, but told at once like one, since another host may wait for it.
    pub addresses: watch::Receiver<AddressUse>,
    /// Counts changes of the host's own links, addresses and routes.
    pub host: watch::Receiver<u64>,
    /// Containers.
    pub executor: watch::Receiver<ExecutorStatus>,
    /// Containers in our networks that were started by hand. No trouble, and told as soon.
    pub attached: watch::Receiver<Vec<AttachedContainer>>,
}

impl Sources {
    /// Waits until one of them has another word. Cancel-safe.
    pub async fn changed(&mut self) {
        tokio::select! {
            () = moved(&mut self.ledger) => {}
            () = moved(&mut self.engine) => {}
            () = moved(&mut self.overlay) => {}
            () = moved(&mut self.addresses) => {}
            () = moved(&mut self.host) => {}
            () = moved(&mut self.executor) => {}
            () = moved(&mut self.attached) => {}
        }
    }

    /// How often the host's own links, addresses or routes changed.
    pub fn host_changes(&self) -> u64 {
        *self.host.borrow()
    }

    /// The description with what the parts say now.
    pub fn complete(&self, description: NodeDescription, more: Option<String>) -> NodeDescription {
        let AddressUse { frozen, plain } = self.addresses.borrow().clone();
        let attached = self.attached.borrow().clone();
        NodeDescription { troubles: self.words(more), frozen, plain_addresses: plain, attached, ..description }
    }

    /// Whether the engine answers, by the last call.
    pub fn engine_is_ready(&self) -> bool {
        *self.engine.borrow() == EngineState::Ready
    }

    /// All troubles now, with `more`, in a fixed order.
    fn words(&self, more: Option<String>) -> Vec<String> {
        let mut all = self.standing.clone();
        if let LedgerState::Failing { error } = &*self.ledger.borrow() {
            all.push(format!("the ledger cannot be written, this host goes on from memory: {error}"));
        }
        match &*self.engine.borrow() {
            EngineState::Unreachable { error } => all.push(format!("the engine does not answer: {error}")),
            // Its absence is the reason that is told already.
            EngineState::Ready | EngineState::Unknown => all.extend(more),
        }
        all.extend(self.overlay.borrow().iter().map(|t| format!("overlay: {t}")));
        all.extend(self.executor.borrow().troubles.iter().cloned());
        for text in &mut all {
            if text.chars().count() > TROUBLE_CHARS_MAX {
                *text = text.chars().take(TROUBLE_CHARS_MAX - 1).chain(['…']).collect();
            }
        }
        if all.len() > TROUBLES_MAX {
            let left = all.len() - (TROUBLES_MAX - 1);
            all.truncate(TROUBLES_MAX - 1);
            all.push(format!("and {left} more"));
        }
        all
    }
}

/// A part that has ended has no more words.
async fn moved<T>(part: &mut watch::Receiver<T>) {
    if part.changed().await.is_err() {
        pending().await
    }
}

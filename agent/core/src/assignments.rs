//! What a master wants of this host: its documents, and where they stand in that master's sequence of generations.
//!
//! Owns the rule by which a change is taken in or refused. Must not know how it came or where it is kept.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use skein_api::Assignment;
use thiserror::Error;

/// Where a host stands in a master's sequence of assignments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The sequence; empty: none, everything is needed.
    pub chain: String,
    /// Position in it.
    pub generation: u64,
}

/// A change of assignments, as a master sends it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignmentChange {
    /// The sequence.
    pub chain: String,
    /// `upserts` is everything.
    pub full: bool,
    /// Generation that it builds on; without meaning when `full`.
    pub base: u64,
    /// Generation afterwards.
    pub generation: u64,
    /// New and changed documents.
    pub upserts: Vec<Assignment>,
    /// Keys of documents that are gone.
    pub removes: Vec<String>,
}

/// Why a change does not fit; a new session brings everything.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Mismatch {
    /// It does not build on what is here.
    #[error("failed to apply assignments {base} -> {generation} of chain {chain:?}: the ledger is at {at} of {have:?}")]
    Gap {
        /// Chain of the change.
        chain: String,
        /// Generation that it builds on.
        base: u64,
        /// Its own generation.
        generation: u64,
        /// The chain that is here.
        have: String,
        /// Its generation.
        at: u64,
    },
    /// It is older than what is here.
    #[error("failed to apply assignments of generation {generation}: the ledger is at {at} already")]
    Stale {
        /// Generation of the change.
        generation: u64,
        /// The generation that is here.
        at: u64,
    },
}

/// The documents of this host with their [`Head`]. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assignments {
    head: Head,
    documents: Arc<BTreeMap<String, Assignment>>,
}

impl Assignments {
    /// Where it stands: for `Hello`.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// All documents by key.
    pub fn documents(&self) -> &Arc<BTreeMap<String, Assignment>> {
        &self.documents
    }

    /// Whether `change` builds on what is here: true to take it in, false when it is here already (the same generation of
    /// the same chain, or the word that the head of `Hello` is current).
    ///
    /// # Errors
    /// [`Mismatch`].
    pub fn check(&self, change: &AssignmentChange) -> Result<bool, Mismatch> {
        if change.full {
            return Ok(true);
        }
        let Head { chain, generation: at } = &self.head;
        let known = change.chain == *chain && !chain.is_empty();
        if known && change.generation == *at {
            return Ok(false);
        }
        if known && change.generation < *at {
            return Err(Mismatch::Stale { generation: change.generation, at: *at });
        }
        if !known || change.base != *at {
            let AssignmentChange { chain, base, generation, .. } = change.clone();
            return Err(Mismatch::Gap { chain, base, generation, have: self.head.chain.clone(), at: *at });
        }
        Ok(true)
    }

    /// Takes a change in without asking [`Assignments::check`]: one that was checked, or one from this host's own disk.
    pub fn apply(&mut self, change: AssignmentChange) {
        let documents = Arc::make_mut(&mut self.documents);
        if change.full {
            documents.clear();
        }
        for key in &change.removes {
            documents.remove(key);
        }
        documents.extend(change.upserts.into_iter().map(|a| (a.key(), a)));
        self.head = Head { chain: change.chain, generation: change.generation };
    }

    /// What is here may not be all: the next session asks for everything.
    pub fn distrust(&mut self) {
        self.head = Head::default();
    }
}

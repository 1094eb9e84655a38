//! Typed identifiers and times: an id of one kind cannot be passed where another is meant.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Wraps an id that was made by a master or read from one.
            pub fn new(id: impl Into<String>) -> Self {
                Self(id.into())
            }
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
            /// The first 12 characters, as tables show it.
            pub fn short(&self) -> &str {
                self.0.get(..12).unwrap_or(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A host of the cluster.
    NodeId
);
id_type!(
    /// A service: a task specification and how many of it shall run.
    ServiceId
);
id_type!(
    /// A task: one container on one host, of a service or on its own.
    TaskId
);
id_type!(
    /// An overlay network.
    NetworkId
);
id_type!(
    /// A named volume, local to one host.
    VolumeId
);
id_type!(
    /// A join token; the secret part is not in it.
    TokenId
);

/// A point in time, milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This time plus `ms` milliseconds; stays at the end of time instead of wrapping.
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
    /// Milliseconds since `earlier`; 0 when `earlier` is later.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What every object of the cluster has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// Counts changes of this object's specification, from 1.
    pub generation: u64,
    /// Position in the store of the last change of this object; 0 until it was stored.
    pub revision: u64,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it last changed.
    pub updated_at: UnixMillis,
    /// Who asked for the last change and why.
    pub changed_by: Origin,
}

/// Who asked for a change, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// `user:<name>`, `node:<id>`, `local:<uid>` or the part of the master that decided it (`orchestrator`, …).
    pub who: String,
    /// In a few words: `skein up`, `node lost`, `container exited with 1`.
    pub why: String,
}

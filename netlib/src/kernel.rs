//! Owns the trait through which plans reach a kernel, and the errors of everything that does.
//!
//! The trait speaks the planner's words; the real kernel ([`crate::linux`]) and the simulated one ([`crate::fake`])
//! implement it, below the path that ships. No tasks, no channels.

use std::{fmt, io, net::IpAddr, path::PathBuf};

use ipnet::IpNet;

use crate::{
    plan::Op,
    state::{Observed, Query},
    types::{InvalidState, NetworkId, Translated},
};

/// One network namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The host's (the engine's) own.
    Host,
    /// The fabric of a network.
    Fabric(NetworkId),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Fabric(id) => write!(f, "network {id}"),
        }
    }
}

/// A route of the host that is not ours, for overlap checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoute {
    /// Its destination; never a default route.
    pub dst: IpNet,
    /// The device it leads out of, if it leads out of one.
    pub dev: Option<String>,
}

/// Why the network could not be brought to, or read from, a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The desired state contradicts itself; nothing was changed.
    #[error(transparent)]
    Invalid(#[from] InvalidState),
    /// A namespace could not be made, entered or removed.
    #[error("failed to {verb} namespace {path}")]
    Namespace {
        /// What was tried.
        verb: &'static str,
        /// Its file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// There is no such network on this host.
    #[error("failed to find network {0} on this host")]
    NoNetwork(NetworkId),
    /// A socket could not be opened or used.
    #[error("failed to {verb} in {scope}")]
    Socket {
        /// What was tried, with its address where it has one.
        verb: String,
        /// Where.
        scope: Scope,
        /// The system's answer.
        source: io::Error,
    },
    /// State could not be read from the kernel.
    #[error("failed to read {what} of {scope}")]
    Observe {
        /// What was read.
        what: &'static str,
        /// Where.
        scope: Scope,
        /// The kernel's or the tool's answer.
        source: io::Error,
    },
    /// Some operations of a plan failed; the others were done.
    #[error("failed to apply {} of {total} changes to {scope}, first: {}", failures.len(), failures.first().map_or("", |one| one.what.as_str()))]
    Apply {
        /// Where.
        scope: Scope,
        /// Operations in the plan.
        total: usize,
        /// What failed, in order; never empty.
        #[source]
        failures: OpFailures,
    },
    /// No link of the host has this address.
    #[error("failed to find the device with address {0}")]
    NoDevice(IpAddr),
    /// The underlay device is not there.
    #[error("failed to find the underlay device {0:?}")]
    NoUnderlay(String),
    /// The process ends, or a worker thread died.
    #[error("failed to finish {0}: its worker is gone")]
    Worker(&'static str),
}

/// One operation that failed.
#[derive(Debug)]
pub struct OpFailure {
    /// Its position in the plan.
    pub index: usize,
    /// The operation in words.
    pub what: String,
    /// The kernel's or the tool's answer.
    pub source: io::Error,
}

/// Operations that failed, in the plan's order.
#[derive(Debug, Default)]
pub struct OpFailures(pub Vec<OpFailure>);

impl OpFailures {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn first(&self) -> Option<&OpFailure> {
        self.0.first()
    }
}

impl fmt::Display for OpFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Failures named in a message; a broken host can have one for each of 10,000 operations.
        const SHOWN_MAX: usize = 4;
        for (nth, failure) in self.0.iter().take(SHOWN_MAX).enumerate() {
            let comma = if nth == 0 { "" } else { "; " };
            write!(f, "{comma}{}: {}", failure.what, failure.source)?;
        }
        if self.0.len() > SHOWN_MAX {
            write!(f, "; and {} more", self.0.len() - SHOWN_MAX)?;
        }
        Ok(())
    }
}

impl std::error::Error for OpFailures {}

/// The kernel of one host, as the planner's executor needs it.
///
/// Calls block. Different scopes may be used at the same time; one scope's calls are the caller's to order.
pub trait Kernel: Send + Sync {
    /// Networks whose fabric exists.
    ///
    /// # Errors
    /// When the directory of namespaces cannot be read.
    fn networks(&self) -> Result<Vec<NetworkId>, Error>;

    /// Makes a network's fabric, an empty namespace, unless it exists. Answers whether it was made.
    ///
    /// # Errors
    /// When the namespace cannot be made or pinned.
    fn create_fabric(&self, id: &NetworkId) -> Result<bool, Error>;

    /// Removes a fabric with all its links. Answers whether there was one.
    ///
    /// # Errors
    /// When a link or the pin cannot be removed.
    fn remove_fabric(&self, id: &NetworkId) -> Result<bool, Error>;

    /// Whether this kernel can have a fast path, and takes our programs.
    ///
    /// # Errors
    /// Why not, in words.
    fn fast_path(&self) -> Result<(), String> {
        Err("not in this kernel".to_owned())
    }

    /// Reads a namespace.
    ///
    /// # Errors
    /// When there is no such fabric or it cannot be read.
    fn observe(&self, scope: &Scope, query: &Query) -> Result<Observed, Error>;

    /// Executes operations in their order. A failed one does not stop the others; removing what is gone is a success.
    ///
    /// # Errors
    /// [`Error::Apply`] with all that failed.
    fn apply(&self, scope: &Scope, ops: &[Op]) -> Result<(), Error>;

    /// Forgets every connection whose destination was translated and of which `goes` says so. Answers how many there
    /// were.
    ///
    /// # Errors
    /// When there is no such fabric or connection tracking cannot be read.
    fn forget_connections(&self, scope: &Scope, goes: &(dyn Fn(&Translated) -> bool + Sync)) -> Result<usize, Error>;
}

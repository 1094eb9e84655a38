//! The network of one Skein host: desired state -> plan -> kernel.
//!
//! Owns everything Skein has in a host's kernel: per overlay network a namespace (*the fabric*) with a VXLAN device,
//! routes, neighbours and forwarding entries to the other hosts, a veth to each container and an uplink to the host, and
//! two small programs that let plain packets pass all of it; in
//! the host's namespace the routes into those uplinks, one nft table, and two accepting rules in `DOCKER-USER`.
//! It must not know the master, the engine's protocol or how states are stored.
//!
//! ```text
//! types ---desired--> Desired --+
//!                               +--plan (pure)--> [Op] --Kernel::apply--> linux | fake
//! Kernel::observe --> Observed -+
//! ```
//!
//! * [`types`], [`names`]: what callers say, and the names that follow from it.
//! * [`state`], [`nft`]: the kernel's state as typed data.
//! * [`desired`]: what it shall be. [`plan`]: the ordered difference. [`fast`]: the programs of the fast path. All pure.
//! * [`kernel`]: the trait that both kernels implement; [`driver`]: observe, plan, apply, report.
//! * [`look`]: wanted beside found, and what was counted, for people's questions.
//! * [`linux`]: the real kernel. [`fake`]: one that holds typed state and refuses what the real one refuses.
//! * [`Overlay`]: the asynchronous face of it all.
//!
//! State is adopted, never rebuilt: a fresh process that asks for what is there plans nothing and loses no packet.
//! Only what is ours by interface name, route protocol 83 or table name is ever changed or removed.
//!
//! Tasks: one per watched namespace (see [`Watch`]); everything else runs on the blocking pool.

pub mod desired;
pub mod driver;
pub mod fake;
pub mod fast;
pub mod kernel;
pub mod linux;
pub mod look;
pub mod names;
pub mod nft;
mod overlay;
pub mod plan;
pub mod state;
pub mod types;

pub use kernel::{Error, HostRoute, Kernel, Scope};
pub use overlay::{Overlay, Watch};
pub use types::{
    Endpoint, EndpointId, HostConfig, HostIndex, HostState, Ingress, IngressPort, InvalidState, Mac, NetworkId,
    NetworkState, Peer, Proto, PublishedPort, Report, Service, Translated,
};

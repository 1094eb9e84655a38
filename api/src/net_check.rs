//! Every pair of hosts through the real tunnel, as `skein net check` tells it.
//!
//! Hosts open *places* (addresses of their own blocks in a network, where probes are echoed) for as long as the master
//! holds the stream, then each sends to the places of the others.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{NetworkId, NodeId};

/// Networks in which one question opens places: with some 200 bytes each, the answer is one frame.
pub const PLACES_MAX: usize = 64;

/// Hosts of which every pair is checked at a time: each sends to 127 others in both families. More are checked one by
/// one against all.
pub const CHECKED_MAX: usize = 128;

/// Where probes of a network are echoed on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbePlace {
    /// The network.
    pub network: NetworkId,
    /// IPv4, then IPv6; a family that the network does not have there is absent.
    pub sockets: Vec<ProbeSockets>,
}

/// An address with what echoes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeSockets {
    /// The address.
    pub address: IpAddr,
    /// TCP port.
    pub tcp: u16,
    /// UDP port.
    pub udp: u16,
}

/// Sends to the place of another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckTarget {
    /// The other host.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// The place there.
    pub place: ProbePlace,
    /// Addresses of this host in that network, from which probes go.
    pub from: Vec<IpAddr>,
}

/// What one host found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostCheck {
    /// What else uses the UDP port of VXLAN on it, in words.
    pub clashes: Vec<String>,
    /// Packets with a wrong checksum that came in meanwhile.
    pub checksum_errors: u64,
    /// Each other host in each family.
    pub pairs: Vec<PairCheck>,
}

/// One host to another in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PairCheck {
    /// The other host.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// The network whose tunnel was used.
    pub network: NetworkId,
    /// IPv6 inside the tunnel.
    pub v6: bool,
    /// Shortest round trip of a small datagram, microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_trip_us: Option<u64>,
    /// Largest IP packet that came back, bytes; 0: none.
    pub largest_bytes: u32,
    /// What is wrong, a sentence each.
    pub faults: Vec<String>,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckReport {
    /// Nothing is wrong.
    pub fine: bool,
    /// One sentence.
    pub summary: String,
    /// Pairs that share no network: there is no tunnel to check.
    pub apart: Vec<(String, String)>,
    /// Hosts that had no free address for probes in a network that they need one in, a sentence each.
    pub unopened: Vec<String>,
    /// Each host.
    pub hosts: Vec<crate::HostAnswer<HostCheck>>,
}

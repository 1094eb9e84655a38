//! What the overlay wants and remembers at one moment, for questions that are answered beside the actor.
//!
//! Owns: the form of it, and the memory of repairs. Must not know: the kernel. No tasks, no channels.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use netlib::{HostState, NetworkState};
use skein_api::{BlockStatus, EndpointAssignment, NET_LIST_MAX, NetworkAssignment, PeerAssignment, Repair, UnixMillis};

use crate::{
    dns::{DnsServer, Zone},
    plugin::state::PluginEndpoint,
};

/// Namespaces of which repairs are remembered: with [`NET_LIST_MAX`] of some 100 bytes each, 1.6 MB at most.
const REPAIRED_MAX: usize = 1024;

/// What the overlay wants and remembers.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Source of VXLAN packets.
    pub vtep: Option<IpAddr>,
    /// UDP port of VXLAN.
    pub vxlan_port: u16,
    /// The kernel's side; none before the first network.
    pub netlib: Option<netlib::Overlay>,
    /// What the host's namespace shall have; none before the first network.
    pub host: Option<HostState>,
    /// Every network.
    pub networks: Vec<NetworkPicture>,
    /// The name server.
    pub dns: Arc<DnsServer>,
    /// The names that it serves.
    pub zone: Arc<Zone>,
    /// What does not work.
    pub troubles: Vec<String>,
}

/// One network.
#[derive(Clone, Debug)]
pub struct NetworkPicture {
    /// As the master assigned it.
    pub ours: NetworkAssignment,
    /// What the kernel shall have; in words, why that cannot be said.
    pub state: Result<NetworkState, String>,
    /// The other hosts.
    pub peers: Vec<PeerAssignment>,
    /// Those without an underlay address of our family, by node id.
    pub unreachable: Vec<String>,
    /// Every name and address in it.
    pub endpoints: Vec<EndpointAssignment>,
    /// The containers on this host.
    pub containers: Vec<PluginEndpoint>,
    /// This host's blocks.
    pub blocks: Vec<BlockStatus>,
}

/// Who something is told of: `network <name>`, or the host.
pub fn of_network(name: &str) -> String {
    format!("network {name}")
}

/// The host's own namespace, in words.
pub const OF_HOST: &str = "the host's namespace";

/// What was repaired since the start, by namespace.
#[derive(Debug, Default)]
pub struct Repairs(Mutex<BTreeMap<String, (u64, VecDeque<Repair>)>>);

impl Repairs {
    /// Remembers changes that nobody asked for.
    pub(super) fn note(&self, what: &str, changes: &[String]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if changes.is_empty() || (all.len() >= REPAIRED_MAX && !all.contains_key(what)) {
            return;
        }
        let (total, last) = all.entry(what.to_owned()).or_default();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let at = UnixMillis(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        for change in changes {
            *total += 1;
            if last.len() == NET_LIST_MAX {
                last.pop_front();
            }
            last.push_back(Repair { at, what: change.clone() });
        }
    }

    /// How many there were in a namespace, and the last of them.
    pub fn of(&self, what: &str) -> (u64, Vec<Repair>) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(what).map(|(total, last)| (*total, last.iter().cloned().collect())).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_repairs_are_remembered_and_all_are_counted() {
        let repairs = Repairs::default();
        let change = |n: usize| format!("put route {n}");
        repairs.note("network a", &(0..NET_LIST_MAX + 2).map(change).collect::<Vec<_>>());
        repairs.note("network a", &[]);
        let (total, last) = repairs.of("network a");
        assert_eq!((total, last.len()), (NET_LIST_MAX as u64 + 2, NET_LIST_MAX));
        assert_eq!((last[0].what.as_str(), last[15].what.as_str()), ("put route 2", "put route 17"));
        assert_eq!(repairs.of("network b"), (0, Vec::new()));
    }
}

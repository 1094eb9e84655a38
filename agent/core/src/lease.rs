//! Who has which address of this host's blocks.
//!
//! Owns: handing out IPv4 addresses (the IPv6 address of a container follows from its IPv4 address), sticky ones for
//! tasks and passing ones for the engine's own requests. Must not know: the engine, the kernel, the disk: every call
//! says what to persist. Pure; no tasks, no channels.
//!
//! ```text
//!            reserve                      release, not used by the engine
//!   free ───────────────▶ held by task ─────────────────────────────────────▶ released
//!     │                        │ release while the engine uses it                ▲
//!     │   RequestAddress       ▼            ReleaseAddress of both families      │
//!     └──────────────────▶ held by engine ───────────────────────────────────────┘
//! ```
//! Free addresses that nobody ever had are taken first, in order; then the one that was released first: a name that a
//! client still remembers leads nowhere rather than to a stranger.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use skein_api::{FREEZES_MAX, NetworkAssignment, NetworkId, TaskId};
use thiserror::Error;

/// One change of the documents that the network side keeps on this host's disk, by key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The document under this key is now this JSON.
    Put(String, String),
    /// There is no document under this key.
    Delete(String),
}

impl Change {
    /// Key of the document.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// Keys of leases in the local state: `lease/<network>/<address>`.
pub const LEASE_PREFIX: &str = "lease/";

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "holder", rename_all = "lowercase")]
pub enum Holder {
    /// A task, until it is released: over stop and start.
    Task {
        /// The task.
        task: TaskId,
        /// The MAC under which the engine asked for it last; links its requests for both families.
        mac: Option<String>,
    },
    /// The engine, for a container that is no task of ours, until it releases what it asked for.
    Engine {
        /// The MAC under which the engine asked.
        mac: Option<String>,
        /// It has the IPv4 address.
        v4: bool,
        /// It has the IPv6 address.
        v6: bool,
    },
    /// This host itself, as the source of what it leads into the network from outside. Until the network is gone.
    Host,
    /// Nobody; `seq` counts releases, so that the oldest is reused first.
    Released {
        /// Position in the order of releases.
        seq: u64,
    },
}

/// Which of an endpoint's two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Why no address was given.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LeaseError {
    /// Every address of the blocks is in use.
    #[error("no address is free in network {network}: all {total} of this host's blocks are in use")]
    Exhausted {
        /// Name of the network.
        network: String,
        /// How many addresses the blocks have for containers.
        total: u64,
    },
    /// An address that this host does not own or that is not for containers.
    #[error("address {address} is not one that this host can give in network {network}: its blocks are {blocks}")]
    NotOurs {
        /// The address.
        address: Ipv4Addr,
        /// Name of the network.
        network: String,
        /// The host's blocks, separated by spaces.
        blocks: String,
    },
    /// An address that is kept for a task that the master names.
    #[error(
        "address {address} of network {network} is kept for another container; hint: skein network inspect {network}"
    )]
    Kept {
        /// The address.
        address: Ipv4Addr,
        /// Name of the network.
        network: String,
    },
    /// Somebody has it.
    #[error("address {address} of network {network} is in use by {holder}")]
    InUse {
        /// The address.
        address: Ipv4Addr,
        /// Name of the network.
        network: String,
        /// The holder, in words.
        holder: String,
    },
}

/// All leases of this host.
///
/// One ordered map per network; a lookup is O(log n), a new address O(n) in the size of the blocks at worst.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    networks: BTreeMap<NetworkId, BTreeMap<Ipv4Addr, Holder>>,
    released: u64,
}

impl Leases {
    /// Reads leases back. Documents that cannot be read are returned by key: their addresses count as free, which is
    /// safe only because a container that uses one is found as an endpoint and passed to [`Leases::adopt`].
    pub fn load(documents: &BTreeMap<String, String>) -> (Self, Vec<String>) {
        let (mut leases, mut damaged) = (Self::default(), Vec::new());
        for (key, json) in documents {
            let place = key.strip_prefix(LEASE_PREFIX).and_then(|k| k.rsplit_once('/'));
            let parsed = place.and_then(|(n, a)| Some((NetworkId::new(n), a.parse::<Ipv4Addr>().ok()?)));
            match (parsed, serde_json::from_str::<Holder>(json)) {
                (Some((network, address)), Ok(holder)) => {
                    if let Holder::Released { seq } = holder {
                        leases.released = leases.released.max(seq + 1);
                    }
                    leases.networks.entry(network).or_default().insert(address, holder);
                }
                _ => damaged.push(key.clone()),
            }
        }
        (leases, damaged)
    }

    /// Makes sure that an address which an endpoint uses is not given again.
    pub fn adopt(&mut self, network: &NetworkId, address: Ipv4Addr, mac: Option<String>) -> Option<Change> {
        match self.holder(network, address) {
            None | Some(Holder::Released { .. }) => {
                Some(self.set(network, address, Holder::Engine { mac, v4: true, v6: true }))
            }
            Some(_) => None,
        }
    }

    /// Who has an address.
    pub fn holder(&self, network: &NetworkId, address: Ipv4Addr) -> Option<&Holder> {
        self.networks.get(network)?.get(&address)
    }

    /// The task's address in a network: the one it has, else `asked`, which is its own by the master's word, else a new
    /// one. An address that is asked for is taken from another task whose container does not have it any more (`in_use`):
    /// the master gives it to one at a time, and remembers ended ones for their logs.
    ///
    /// # Errors
    /// [`LeaseError::Exhausted`]; of one that is asked for [`LeaseError::NotOurs`] or [`LeaseError::InUse`].
    pub fn reserve(
        &mut self,
        network: &NetworkAssignment,
        task: &TaskId,
        asked: Option<Ipv4Addr>,
        in_use: impl Fn(&NetworkId, Ipv4Addr) -> bool,
    ) -> Result<(Ipv4Addr, Option<Change>), LeaseError> {
        let mine = |h: &Holder| matches!(h, Holder::Task { task: t, .. } if t == task);
        if let Some(address) = self.find(&network.id, mine) {
            return Ok((address, None));
        }
        let address = match asked {
            None => self.free(network)?,
            Some(address) => self.free_for_task(network, address, in_use)?,
        };
        Ok((address, Some(self.set(&network.id, address, Holder::Task { task: task.clone(), mac: None }))))
    }

    /// This host's own address in a network: the one it has, or a new one.
    ///
    /// # Errors
    /// [`LeaseError::Exhausted`].
    pub fn reserve_host(&mut self, network: &NetworkAssignment) -> Result<(Ipv4Addr, Option<Change>), LeaseError> {
        if let Some(address) = self.find(&network.id, |holder| *holder == Holder::Host) {
            return Ok((address, None));
        }
        let address = self.free(network)?;
        Ok((address, Some(self.set(&network.id, address, Holder::Host))))
    }

    /// An address that the master gave to a task, if nobody uses it.
    fn free_for_task(
        &self,
        network: &NetworkAssignment,
        address: Ipv4Addr,
        in_use: impl Fn(&NetworkId, Ipv4Addr) -> bool,
    ) -> Result<Ipv4Addr, LeaseError> {
        if !usable(network, address) {
            return Err(not_ours(network, address));
        }
        let holder = match self.holder(&network.id, address) {
            None | Some(Holder::Released { .. }) => return Ok(address),
            Some(Holder::Task { .. }) if !in_use(&network.id, address) => return Ok(address),
            Some(Holder::Task { task, .. }) => format!("task {task}"),
            Some(Holder::Host) => "the host itself".to_owned(),
            Some(Holder::Engine { mac, .. }) => {
                format!("a container with MAC {}", mac.as_deref().unwrap_or("unknown"))
            }
        };
        Err(LeaseError::InUse { address, network: network.name.clone(), holder })
    }

    /// How many addresses containers have in each network that are no tasks of ours.
    pub fn plain(&self) -> BTreeMap<NetworkId, u32> {
        let count = |addresses: &BTreeMap<Ipv4Addr, Holder>| {
            let plain = addresses.values().filter(|h| matches!(h, Holder::Engine { .. }));
            u32::try_from(plain.count()).unwrap_or(u32::MAX)
        };
        let all = self.networks.iter().map(|(network, addresses)| (network.clone(), count(addresses)));
        all.filter(|(_, count)| *count > 0).collect()
    }

    /// For each freeze of the networks that has a ticket: the addresses that somebody has, in order.
    pub fn frozen<'a>(
        &self,
        networks: impl IntoIterator<Item = &'a NetworkAssignment>,
    ) -> BTreeMap<u64, Vec<Ipv4Addr>> {
        let asked = |network: &'a NetworkAssignment| network.frozen.iter().map(|freeze| (&network.id, *freeze));
        let freezes = networks.into_iter().flat_map(asked).filter(|(_, freeze)| freeze.ticket != 0);
        let held = |network: &NetworkId, prefix: Ipv4Net| {
            let known = self.networks.get(network);
            let inside = known.into_iter().flat_map(|k| k.range(prefix.network()..=prefix.broadcast()));
            inside.filter(|(_, h)| !matches!(h, Holder::Released { .. })).map(|(address, _)| *address).collect()
        };
        freezes.take(FREEZES_MAX).map(|(network, freeze)| (freeze.ticket, held(network, freeze.prefix))).collect()
    }

    /// Gives up every address of a task. One that the engine still uses stays until the engine releases it.
    pub fn release(&mut self, task: &TaskId, in_use: impl Fn(&NetworkId, Ipv4Addr) -> bool) -> Vec<Change> {
        let mut mine = Vec::new();
        for (network, addresses) in &self.networks {
            for (address, holder) in addresses {
                if let Holder::Task { task: t, mac } = holder
                    && t == task
                {
                    mine.push((network.clone(), *address, mac.clone()));
                }
            }
        }
        let mut changes = Vec::new();
        for (network, address, mac) in mine {
            let holder = match in_use(&network, address) {
                true => Holder::Engine { mac, v4: true, v6: true },
                false => self.next_released(),
            };
            changes.push(self.set(&network, address, holder));
        }
        changes
    }

    /// An address for the engine: `preferred` if it names one, else the one it has under this MAC in the other family,
    /// else a new one. Asking again under the same MAC gives the same.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn request(
        &mut self,
        network: &NetworkAssignment,
        family: AddressFamily,
        preferred: Option<Ipv4Addr>,
        mac: Option<&str>,
    ) -> Result<(Ipv4Addr, Change), LeaseError> {
        let same = |h: &Holder| match h {
            Holder::Task { mac: m, .. } | Holder::Engine { mac: m, .. } => mac.is_some() && m.as_deref() == mac,
            Holder::Host | Holder::Released { .. } => false,
        };
        let address = match preferred {
            Some(address) => self.check_preferred(network, family, address, mac)?,
            None => match self.find(&network.id, same) {
                Some(address) => address,
                None => self.free(network)?,
            },
        };
        let (had4, had6) = match self.holder(&network.id, address) {
            Some(Holder::Task { task, .. }) => {
                let holder = Holder::Task { task: task.clone(), mac: mac.map(str::to_owned) };
                return Ok((address, self.set(&network.id, address, holder)));
            }
            Some(Holder::Engine { v4, v6, .. }) => (*v4, *v6),
            _ => (false, false),
        };
        let (v4, v6) = (had4 || family == AddressFamily::V4, had6 || family == AddressFamily::V6);
        Ok((address, self.set(&network.id, address, Holder::Engine { mac: mac.map(str::to_owned), v4, v6 })))
    }

    fn check_preferred(
        &self,
        network: &NetworkAssignment,
        family: AddressFamily,
        address: Ipv4Addr,
        mac: Option<&str>,
    ) -> Result<Ipv4Addr, LeaseError> {
        let in_use = |holder: String| LeaseError::InUse { address, network: network.name.clone(), holder };
        match self.holder(&network.id, address) {
            // Sticky: the task's container comes back for it, after a stop or after a crash that released nothing.
            Some(Holder::Task { .. }) => return Ok(address),
            Some(Holder::Engine { mac: m, v4, v6 }) => {
                let taken = if family == AddressFamily::V4 { *v4 } else { *v6 };
                let same = mac.is_some() && m.as_deref() == mac;
                if taken && !same {
                    return Err(in_use(format!("a container with MAC {}", m.as_deref().unwrap_or("unknown"))));
                }
            }
            Some(Holder::Host) => return Err(in_use("this host itself".to_owned())),
            Some(Holder::Released { .. }) | None => {}
        }
        if !usable(network, address) {
            return Err(not_ours(network, address));
        }
        // The other family of an address that the engine has already belongs to it.
        if !is_free_to_give(network, address)
            && !matches!(self.holder(&network.id, address), Some(Holder::Engine { .. }))
        {
            return Err(LeaseError::Kept { address, network: network.name.clone() });
        }
        Ok(address)
    }

    /// The engine gives one family's address back. A task keeps its own; unknown ones are no error.
    pub fn give_back(&mut self, network: &NetworkId, family: AddressFamily, address: Ipv4Addr) -> Option<Change> {
        let Some(Holder::Engine { mac, v4, v6 }) = self.holder(network, address).cloned() else {
            return None;
        };
        let (v4, v6) = (v4 && family != AddressFamily::V4, v6 && family != AddressFamily::V6);
        let holder = if v4 || v6 { Holder::Engine { mac, v4, v6 } } else { self.next_released() };
        Some(self.set(network, address, holder))
    }

    /// Forgets all leases of networks that are not in `keep`.
    pub fn retain_networks(&mut self, keep: &BTreeSet<NetworkId>) -> Vec<Change> {
        let mut changes = Vec::new();
        self.networks.retain(|network, addresses| {
            let kept = keep.contains(network);
            if !kept {
                changes.extend(addresses.keys().map(|a| Change::Delete(key(network, *a))));
            }
            kept
        });
        changes
    }

    /// The networks in which a task has an address.
    pub fn networks_of(&self, task: &TaskId) -> Vec<NetworkId> {
        let has = |h: &Holder| matches!(h, Holder::Task { task: t, .. } if t == task);
        self.networks.iter().filter(|(_, a)| a.values().any(has)).map(|(n, _)| n.clone()).collect()
    }

    /// Addresses of a network that the engine asked for and has, with the MAC and whether it has the IPv6 address too.
    /// A task's stays here while its container does not run.
    pub fn asked_for(&self, network: &NetworkId) -> impl Iterator<Item = (Ipv4Addr, &str, bool)> {
        self.networks.get(network).into_iter().flatten().filter_map(|(address, holder)| match holder {
            Holder::Task { mac: Some(mac), .. } => Some((*address, mac.as_str(), true)),
            Holder::Engine { mac: Some(mac), v6, .. } => Some((*address, mac.as_str(), *v6)),
            _ => None,
        })
    }

    /// The document under this key, as it should be on disk; none: there should be none.
    pub fn document(&self, key: &str) -> Option<String> {
        let (network, address) = key.strip_prefix(LEASE_PREFIX)?.rsplit_once('/')?;
        let holder = self.holder(&NetworkId::new(network), address.parse().ok()?)?;
        Some(json(holder))
    }

    /// This host's own address in a network, if it has one.
    pub fn host(&self, network: &NetworkId) -> Option<Ipv4Addr> {
        self.find(network, |holder| *holder == Holder::Host)
    }

    /// How many addresses are held, by tasks, by the engine or by this host.
    pub fn held(&self, network: &NetworkId) -> usize {
        let addresses = self.networks.get(network).into_iter().flatten();
        addresses.filter(|(_, h)| !matches!(h, Holder::Released { .. })).count()
    }

    /// The addresses of tasks whose id begins so.
    pub fn of_tasks(&self, prefix: &str) -> Vec<(NetworkId, Ipv4Addr, TaskId)> {
        let all = self.networks.iter().flat_map(|(network, held)| held.iter().map(move |(a, h)| (network, *a, h)));
        let of_task = all.filter_map(|(network, address, holder)| match holder {
            Holder::Task { task, .. } if task.as_str().starts_with(prefix) => {
                Some((network.clone(), address, task.clone()))
            }
            _ => None,
        });
        of_task.collect()
    }

    /// How many addresses of a block are held, and how many it has that can be given.
    pub fn used_of(&self, network: &NetworkAssignment, block: Ipv4Net) -> (u64, u64) {
        let inside = self.networks.get(&network.id).into_iter().flatten().filter(|(a, _)| block.contains(*a));
        let used = inside.filter(|(_, h)| !matches!(h, Holder::Released { .. })).count();
        let size = addresses(&block).filter(|a| usable(network, *a)).count();
        (used as u64, size as u64)
    }

    fn find(&self, network: &NetworkId, wanted: impl Fn(&Holder) -> bool) -> Option<Ipv4Addr> {
        self.networks.get(network)?.iter().find(|(_, h)| wanted(h)).map(|(a, _)| *a)
    }

    fn free(&self, network: &NetworkAssignment) -> Result<Ipv4Addr, LeaseError> {
        let known = self.networks.get(&network.id).filter(|_| !skein_api::mutant!("lease-reuse"));
        let fresh = network
            .blocks
            .iter()
            .flat_map(addresses)
            .find(|a| is_free_to_give(network, *a) && known.is_none_or(|k| !k.contains_key(a)));
        if let Some(address) = fresh {
            return Ok(address);
        }
        let oldest = known.into_iter().flatten().filter_map(|(a, h)| match h {
            Holder::Released { seq } if is_free_to_give(network, *a) => Some((*seq, *a)),
            _ => None,
        });
        oldest.min().map(|(_, a)| a).ok_or_else(|| {
            let total = network.blocks.iter().flat_map(addresses);
            let total = total.filter(|a| is_free_to_give(network, *a)).count() as u64;
            LeaseError::Exhausted { network: network.name.clone(), total }
        })
    }

    fn next_released(&mut self) -> Holder {
        self.released += 1;
        Holder::Released { seq: self.released - 1 }
    }

    fn set(&mut self, network: &NetworkId, address: Ipv4Addr, holder: Holder) -> Change {
        let json = json(&holder);
        self.networks.entry(network.clone()).or_default().insert(address, holder);
        Change::Put(key(network, address), json)
    }
}

/// Every address of a block, first and last included: blocks are routed, not broadcast domains.
fn addresses(block: &Ipv4Net) -> impl Iterator<Item = Ipv4Addr> + use<> {
    (u32::from(block.network())..=u32::from(block.broadcast())).map(Ipv4Addr::from)
}

/// Whether this host may give the address to a container: in its blocks, and not the subnet's network, broadcast or
/// gateway address.
fn usable(network: &NetworkAssignment, address: Ipv4Addr) -> bool {
    let reserved = [network.subnet4.network(), network.subnet4.broadcast(), network.gateway4];
    network.blocks.iter().any(|b| b.contains(&address)) && !reserved.contains(&address)
}

/// Whether it may be given to a container that asks for none by name.
fn is_free_to_give(network: &NetworkAssignment, address: Ipv4Addr) -> bool {
    usable(network, address) && !network.frozen.iter().any(|freeze| freeze.prefix.contains(&address))
}

fn not_ours(network: &NetworkAssignment, address: Ipv4Addr) -> LeaseError {
    let blocks: Vec<String> = network.blocks.iter().map(Ipv4Net::to_string).collect();
    LeaseError::NotOurs { address, network: network.name.clone(), blocks: blocks.join(" ") }
}

fn json(holder: &Holder) -> String {
    serde_json::to_string(holder).expect("a holder has only string keys")
}

fn key(network: &NetworkId, address: Ipv4Addr) -> String {
    format!("{LEASE_PREFIX}{network}/{address}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use skein_api::Freeze;

    use super::*;

    /// A network whose first /29 is this host's: .2 to .7 for containers.
    fn small() -> NetworkAssignment {
        NetworkAssignment {
            id: NetworkId::new("small"),
            name: "small".into(),
            vni: 1,
            subnet4: "10.1.0.0/16".parse().unwrap(),
            subnet6: "fd00:0:0:1::/64".parse().unwrap(),
            gateway4: "10.1.0.1".parse().unwrap(),
            gateway6: "fd00:0:0:1::1".parse().unwrap(),
            mtu: 1450,
            internal: false,
            attachable: false,
            host_index: 1,
            blocks: vec!["10.1.0.0/29".parse().unwrap()],
            frozen: Vec::new(),
        }
    }

    /// No container has an address.
    fn idle(_: &NetworkId, _: Ipv4Addr) -> bool {
        false
    }

    fn task(n: u8) -> TaskId {
        TaskId::new(format!("t{n}"))
    }

    fn last(address: Ipv4Addr) -> u8 {
        address.octets()[3]
    }

    #[test]
    fn sticky_then_oldest_released_first() {
        let (n, mut leases) = (small(), Leases::default());
        let reserve = |l: &mut Leases, i| l.reserve(&n, &task(i), None, idle).map(|(a, _)| last(a));
        for i in 2..=7 {
            assert_eq!(reserve(&mut leases, i), Ok(i));
        }
        assert_eq!(reserve(&mut leases, 4), Ok(4), "sticky");
        assert!(matches!(reserve(&mut leases, 8), Err(LeaseError::Exhausted { total: 6, .. })));
        for i in [5, 3, 6] {
            assert_eq!(leases.release(&task(i), |_, _| false).len(), 1);
        }
        assert_eq!(leases.release(&task(9), |_, _| false), []);
        for (i, want) in [(10, 5), (11, 3), (12, 6)] {
            assert_eq!(reserve(&mut leases, i), Ok(want));
        }
        leases.release(&task(7), |_, _| false);
        let (own, change) = leases.reserve_host(&n).map(|(a, change)| (last(a), change)).expect("one is free");
        assert_eq!((own, change.is_some()), (7, true));
        assert_eq!(leases.reserve_host(&n).map(|(a, change)| (last(a), change)), Ok((7, None)), "sticky");
        let taken = leases.request(&n, AddressFamily::V4, "10.1.0.7".parse().ok(), Some("02:00:00:00:00:01"));
        assert!(matches!(taken, Err(LeaseError::InUse { .. })), "{taken:?}");
        assert_eq!(leases.host(&n.id).map(last), Some(7));
        // The last address of a subnet is never given.
        let mut end = small();
        end.blocks = vec!["10.1.255.252/30".parse().unwrap()];
        end.id = NetworkId::new("end");
        let got: Vec<_> =
            (0..4).map(|i| leases.reserve(&end, &task(i), None, idle).map(|(a, _)| last(a)).ok()).collect();
        assert_eq!(got, [Some(252), Some(253), Some(254), None]);
    }

    #[test]
    fn the_engine_gets_one_pair_per_mac_and_frees_it_with_both() {
        use AddressFamily::{V4, V6};
        let (n, mut leases) = (small(), Leases::default());
        let ask = |l: &mut Leases, f, p: Option<u8>, m: &str| {
            let preferred = p.map(|p| Ipv4Addr::new(10, 1, 0, p));
            l.request(&n, f, preferred, Some(m)).map(|(a, _)| last(a))
        };
        assert_eq!(ask(&mut leases, V4, None, "a"), Ok(2));
        assert_eq!(ask(&mut leases, V4, None, "b"), Ok(3));
        assert_eq!(ask(&mut leases, V6, None, "b"), Ok(3));
        assert_eq!(ask(&mut leases, V6, None, "a"), Ok(2));
        assert_eq!(ask(&mut leases, V4, None, "a"), Ok(2), "asked again");
        assert!(matches!(ask(&mut leases, V4, Some(3), "c"), Err(LeaseError::InUse { .. })));
        assert!(matches!(ask(&mut leases, V4, Some(1), "c"), Err(LeaseError::NotOurs { .. })), "the gateway");
        assert!(matches!(ask(&mut leases, V4, Some(9), "c"), Err(LeaseError::NotOurs { .. })), "another's block");
        let address = Ipv4Addr::new(10, 1, 0, 2);
        leases.give_back(&n.id, V4, address).unwrap();
        assert_eq!(leases.held(&n.id), 2, "its IPv6 address is still in use");
        leases.give_back(&n.id, V6, address).unwrap();
        assert_eq!((leases.held(&n.id), leases.give_back(&n.id, V6, address)), (1, None));
    }

    #[test]
    fn a_task_keeps_its_address_over_stop_and_crash() {
        use AddressFamily::{V4, V6};
        let (n, mut leases) = (small(), Leases::default());
        let (address, _) = leases.reserve(&n, &task(1), None, idle).unwrap();
        for mac in ["first", "second", "after a crash without release"] {
            assert_eq!(leases.request(&n, V4, Some(address), Some(mac)).unwrap().0, address);
            assert_eq!(leases.request(&n, V6, None, Some(mac)).unwrap().0, address, "linked by MAC");
        }
        assert_eq!(leases.give_back(&n.id, V4, address), None);
        // Released while its container is still there: only the engine's release frees it.
        leases.release(&task(1), |_, _| true);
        assert_eq!(leases.held(&n.id), 1);
        leases.give_back(&n.id, V4, address).unwrap();
        leases.give_back(&n.id, V6, address).unwrap();
        assert_eq!(leases.held(&n.id), 0);
    }

    #[test]
    fn frozen_addresses_are_for_those_who_ask_for_them() {
        use AddressFamily::{V4, V6};
        let (mut n, mut leases) = (small(), Leases::default());
        let at = |last| Ipv4Addr::new(10, 1, 0, last);
        leases.request(&n, V4, Some(at(6)), Some("m")).unwrap();
        n.frozen = vec![
            Freeze { prefix: "10.1.0.2/32".parse().unwrap(), ticket: 0 },
            Freeze { prefix: "10.1.0.6/31".parse().unwrap(), ticket: 7 },
        ];
        let frozen = |l: &Leases| l.frozen([&n]).into_iter().collect::<Vec<_>>();
        assert_eq!(frozen(&leases), [(7, vec![at(6)])], "in use when it was frozen");
        // Nobody gets one by chance, or by naming it to the engine.
        let given: Vec<_> = (3..=6).map(|i| leases.reserve(&n, &task(i), None, idle).map(|(a, _)| last(a))).collect();
        assert_eq!(given[..3], [Ok(3), Ok(4), Ok(5)]);
        assert!(matches!(given[3], Err(LeaseError::Exhausted { total: 3, .. })), "{given:?}");
        let refused = leases.request(&n, V4, Some(at(2)), Some("x"));
        assert!(matches!(refused, Err(LeaseError::Kept { .. })), "{refused:?}");
        assert_eq!(leases.request(&n, V6, None, Some("m")).map(|(a, _)| a), Ok(at(6)), "what it has it keeps");
        // The task that the master gave it to does, and its container gets it from the engine.
        assert_eq!(leases.reserve(&n, &task(1), Some(at(2)), idle).map(|(a, _)| a), Ok(at(2)));
        assert_eq!(leases.request(&n, V4, Some(at(2)), Some("t")).map(|(a, _)| a), Ok(at(2)));
        assert_eq!(leases.reserve(&n, &task(1), Some(at(2)), idle).map(|(_, c)| c), Ok(None), "sticky");
        // Its successor, once its own container is gone.
        let busy = leases.reserve(&n, &task(9), Some(at(2)), |_, a| a == at(2)).unwrap_err();
        assert_eq!(busy.to_string(), "address 10.1.0.2 of network small is in use by task t1");
        assert_eq!(leases.reserve(&n, &task(9), Some(at(2)), idle).map(|(a, _)| a), Ok(at(2)));
        assert_eq!(leases.release(&task(1), idle), [], "it has nothing to give back");
        for (asked, why) in [(at(6), "in use"), (at(1), "the gateway"), (at(9), "another host's")] {
            assert!(leases.reserve(&n, &task(8), Some(asked), idle).is_err(), "{why}");
        }
        for family in [V4, V6] {
            leases.give_back(&n.id, family, at(6)).unwrap();
        }
        assert_eq!(frozen(&leases), [(7, vec![])]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Reserve(u8),
        Release(u8),
        Request(u8),
        GiveBack(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..9u8).prop_map(Step::Reserve),
            (0..9u8).prop_map(Step::Release),
            (0..9u8).prop_map(Step::Request),
            (0..9u8).prop_map(Step::GiveBack),
        ]
    }

    proptest! {
        /// No two holders share an address, and what was persisted gives the same leases back.
        #[test]
        fn addresses_are_unique_and_durable(steps in proptest::collection::vec(step(), 0..60)) {
            let (n, mut leases) = (small(), Leases::default());
            let mut disk = BTreeMap::new();
            let mut tasks: BTreeMap<u8, Ipv4Addr> = BTreeMap::new();
            let mut macs: BTreeMap<u8, Ipv4Addr> = BTreeMap::new();
            for step in steps {
                let changes: Vec<Change> = match step {
                    Step::Reserve(i) => leases.reserve(&n, &task(i), None, idle).map(|(a, c)| {
                        tasks.insert(i, a);
                        c
                    }).ok().flatten().into_iter().collect(),
                    Step::Release(i) => {
                        tasks.remove(&i);
                        leases.release(&task(i), |_, _| false)
                    }
                    Step::Request(i) => leases.request(&n, AddressFamily::V4, None, Some(&format!("m{i}")))
                        .map(|(a, c)| {
                            macs.insert(i, a);
                            c
                        }).ok().into_iter().collect(),
                    Step::GiveBack(i) => macs.remove(&i)
                        .and_then(|a| leases.give_back(&n.id, AddressFamily::V4, a)).into_iter().collect(),
                };
                for change in changes {
                    match change {
                        Change::Put(k, v) => { disk.insert(k, v); }
                        Change::Delete(k) => { disk.remove(&k); }
                    }
                }
                let held: BTreeSet<_> = tasks.values().chain(macs.values()).collect();
                prop_assert_eq!(held.len(), tasks.len() + macs.len());
                prop_assert!(held.iter().all(|a| (2..=7).contains(&last(**a))));
                prop_assert_eq!(leases.held(&n.id), held.len());
            }
            let (read, damaged) = Leases::load(&disk);
            prop_assert_eq!(damaged, Vec::<String>::new());
            prop_assert_eq!(read.networks, leases.networks);
        }
    }
}

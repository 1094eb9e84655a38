//! Owns looking: what a part of a namespace shall be beside what it is, without changing anything, and what the kernel
//! has counted there.
//!
//! For questions of people; the way from a wanted state to a report is [`crate::driver`]'s. Blocking, over any
//! [`Kernel`]. No tasks, no channels.

use std::collections::BTreeMap;

use crate::{
    desired, driver,
    kernel::{Error, Kernel, Scope},
    plan::plan,
    state::{Desired, Observed},
    types::{HostConfig, HostState, NetworkState},
};

/// A part of a namespace: wanted beside found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// Which namespace.
    pub scope: Scope,
    /// What it shall be.
    pub want: Desired,
    /// What it is.
    pub found: Observed,
}

impl Look {
    /// What would have to be done to bring the one to the other, in words; empty when all is as it shall be.
    pub fn differences(&self) -> Vec<String> {
        let plan = plan(&self.want, &self.found);
        let missing = plan.missing.iter().map(|link| format!("link {link} is gone"));
        missing.chain(plan.ops.iter().map(ToString::to_string)).collect()
    }
}

/// Looks at a network's fabric and, unless it is internal, at the host's end of its uplink.
///
/// # Errors
/// When the state is invalid, there is no such fabric, or it cannot be read.
pub fn network(kernel: &dyn Kernel, config: &HostConfig, state: &NetworkState) -> Result<Vec<Look>, Error> {
    let want = desired::fabric(config, state, &driver::host_addrs(kernel, config, state)?)?;
    let mut looks = vec![look(kernel, Scope::Fabric(state.id.clone()), want)?];
    let ipv6 = !state.internal && state.subnet6.is_some() && driver::uplink_has_ipv6(kernel, state)?;
    if let Some(want) = desired::uplink(state, ipv6) {
        looks.push(look(kernel, Scope::Host, want)?);
    }
    Ok(looks)
}

/// Looks at what is ours in the host's namespace: sysctls, table, `DOCKER-USER`.
///
/// # Errors
/// When the state is invalid or the namespace cannot be read.
pub fn host(kernel: &dyn Kernel, config: &HostConfig, state: &HostState) -> Result<Look, Error> {
    look(kernel, Scope::Host, desired::host_rules(config, state)?)
}

fn look(kernel: &dyn Kernel, scope: Scope, want: Desired) -> Result<Look, Error> {
    let found = kernel.observe(&scope, &want.query())?;
    Ok(Look { scope, want, found })
}

/// What the kernel has counted in a namespace since the counting things were made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counted {
    /// Packets that counting rules of our table matched, by chain.
    pub rules: BTreeMap<String, u64>,
    /// Devices by name.
    pub devices: BTreeMap<String, Device>,
    /// Counters of IP, UDP and TCP, such as `IpExt.InNoRoutes` and `Udp.InCsumErrors` (`/proc/net/snmp`,
    /// `/proc/net/netstat`) and `Ip6InNoRoutes` (`/proc/net/snmp6`).
    pub protocols: BTreeMap<String, u64>,
}

impl Counted {
    /// Packets that the rules of a chain counted; 0 where there is none.
    pub fn rule(&self, chain: &str) -> u64 {
        self.rules.get(chain).copied().unwrap_or_default()
    }

    /// A protocol's counter; 0 where there is none.
    pub fn protocol(&self, name: &str) -> u64 {
        self.protocols.get(name).copied().unwrap_or_default()
    }

    /// A device's counters; zeroes where there is none.
    pub fn device(&self, name: &str) -> Device {
        self.devices.get(name).copied().unwrap_or_default()
    }
}

/// Counters of a device (`/proc/net/dev`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Device {
    /// Packets received.
    pub rx_packets: u64,
    /// Received ones that were broken.
    pub rx_errors: u64,
    /// Received ones that were dropped.
    pub rx_dropped: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Ones that could not be sent: of a VXLAN device, those without a forwarding entry or a route too.
    pub tx_errors: u64,
    /// Ones that were dropped instead of sent.
    pub tx_dropped: u64,
}

/// Reads `/proc/net/dev`: two lines of heads, then `name: 8 numbers received, 8 sent`.
pub(crate) fn parse_devices(text: &str) -> BTreeMap<String, Device> {
    let device = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let n: Vec<u64> = numbers.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [rx_packets, rx_errors, rx_dropped, tx_packets, tx_errors, tx_dropped] =
            [*n.get(1)?, *n.get(2)?, *n.get(3)?, *n.get(9)?, *n.get(10)?, *n.get(11)?];
        let device = Device { rx_packets, rx_errors, rx_dropped, tx_packets, tx_errors, tx_dropped };
        Some((name.trim().to_owned(), device))
    };
    text.lines().filter_map(device).collect()
}

/// Reads `/proc/net/snmp` and `/proc/net/netstat`: pairs of lines, heads and numbers, each behind `Group:`.
pub(crate) fn parse_groups(text: &str) -> BTreeMap<String, u64> {
    let mut counters = BTreeMap::new();
    let mut lines = text.lines();
    while let (Some(heads), Some(numbers)) = (lines.next(), lines.next()) {
        let (Some((group, heads)), Some((same, numbers))) = (heads.split_once(':'), numbers.split_once(':')) else {
            continue;
        };
        if group == same {
            let pairs = heads.split_whitespace().zip(numbers.split_whitespace());
            counters.extend(pairs.filter_map(|(head, n)| Some((format!("{group}.{head}"), n.parse().ok()?))));
        }
    }
    counters
}

/// Reads `/proc/net/snmp6`: a name and a number a line.
pub(crate) fn parse_pairs(text: &str) -> BTreeMap<String, u64> {
    let pair = |line: &str| {
        let (name, number) = line.split_once(char::is_whitespace)?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fake::FakeKernel,
        types::{HostIndex, Peer},
    };

    fn state() -> NetworkState {
        let peer = Peer {
            mtu: None,
            vtep: "192.0.2.2".parse().expect("an address"),
            blocks: ["10.57.2.0/24".parse().expect("a block")].into(),
        };
        NetworkState {
            id: "blue".parse().expect("an id"),
            vni: 4096,
            subnet4: "10.57.0.0/16".parse().expect("a subnet"),
            subnet6: None,
            gateway4: "10.57.0.1".parse().expect("an address"),
            gateway6: None,
            mtu: 1450,
            internal: false,
            local_blocks: ["10.57.1.0/24".parse().expect("a block")].into(),
            peers: [(HostIndex(2), peer)].into(),
            endpoints: BTreeMap::new(),
            published: Default::default(),
            services: BTreeMap::new(),
            ingress: None,
        }
    }

    #[test]
    fn counters_are_read_as_the_kernel_prints_them() {
        let devices = parse_devices(
            "Inter-|   Receive                                                |  Transmit\n \
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n  \
             skvx: 840 10 1 2 0 0 0 0 980 11 3 4 0 0 0 0\n",
        );
        let skvx = Device { rx_packets: 10, rx_errors: 1, rx_dropped: 2, tx_packets: 11, tx_errors: 3, tx_dropped: 4 };
        assert_eq!(devices, BTreeMap::from([("skvx".to_owned(), skvx)]));
        let groups = parse_groups("TcpExt: A IPReversePathFilter\nTcpExt: 1 5\nIpExt: InNoRoutes\nIpExt: 2\nodd\n");
        let expected = [("IpExt.InNoRoutes", 2), ("TcpExt.A", 1), ("TcpExt.IPReversePathFilter", 5)];
        assert_eq!(groups, expected.map(|(name, n)| (name.to_owned(), n)).into());
        assert_eq!(parse_pairs("Ip6InNoRoutes   \t7\nodd\n"), BTreeMap::from([("Ip6InNoRoutes".to_owned(), 7)]));
    }

    #[test]
    fn a_network_as_it_shall_be_has_no_differences_and_another_one_names_them() {
        let kernel = FakeKernel::default();
        let vtep = "192.0.2.1".parse().expect("an address");
        let config = HostConfig::new(HostIndex(1), vtep, 1500);
        let state = state();
        driver::ensure_network(&kernel, &config, &state).expect("ensured");
        let looks = network(&kernel, &config, &state).expect("looks");
        assert_eq!(looks.iter().flat_map(Look::differences).collect::<Vec<_>>(), Vec::<String>::new());
        let mut other = state.clone();
        other.peers.values_mut().for_each(|peer| peer.vtep = "192.0.2.9".parse().expect("an address"));
        let looks = network(&kernel, &config, &other).expect("looks");
        let words = looks[0].differences().join("; ");
        assert!(words.contains("put forwarding entry") && words.contains("192.0.2.9"), "{words}");
    }
}

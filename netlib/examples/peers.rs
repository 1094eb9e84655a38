//! Measures what many remote hosts cost in a fabric: routes to 10,000 of them, each with a block of its own, in a
//! namespace of its own. Needs root.
//!
//! `cargo run --release -p netlib --example peers [HOSTS] [ROUNDS]` prints one JSON object a line: medians of so many
//! rounds. Time is wall time of the calls that an agent makes; memory is the growth of all slab caches (objects in use
//! times their size, `slabinfo(5)`), which others' work disturbs by some percent.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlib::{HostConfig, HostIndex, NetworkState, Peer, driver, linux::LinuxKernel};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkHeader, NetlinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage, route::RouteMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns, unshare},
};

type Error = Box<dyn std::error::Error>;

/// Families in which a peer has a block.
#[derive(Clone, Copy, PartialEq)]
enum Families {
    V4,
    Both,
}

fn state(hosts: u16, families: Families) -> Result<NetworkState, Error> {
    let mut peers = BTreeMap::new();
    for host in 2..hosts + 2 {
        // Blocks of 16 addresses from 10.64.0.0 on, and what follows from them in IPv6.
        let block = Ipv4Net::new(Ipv4Addr::from(0x0a40_0000 + u32::from(host) * 16), 28)?;
        let mut blocks = BTreeSet::from([IpNet::V4(block)]);
        if families == Families::Both {
            let offset = u128::from(host) * 16;
            let first = Ipv6Addr::from(Ipv6Addr::new(0xfd57, 0, 0, 0, 0, 0, 0, 0).to_bits() + offset);
            blocks.insert(IpNet::V6(Ipv6Net::new(first, 124)?));
        }
        let vtep = IpAddr::from(Ipv4Addr::from(0x0a80_0000 + u32::from(host)));
        peers.insert(HostIndex(host), Peer { vtep, blocks, mtu: None });
    }
    Ok(NetworkState {
        id: "bench".parse()?,
        vni: 5_001,
        subnet4: "10.64.0.0/10".parse()?,
        subnet6: Some("fd57::/64".parse()?),
        gateway4: Ipv4Addr::new(10, 64, 0, 1),
        gateway6: Some("fd57::1".parse()?),
        mtu: 1_450,
        internal: true,
        local_blocks: ["10.64.0.16/28".parse()?].into(),
        peers,
        endpoints: BTreeMap::new(),
        published: Default::default(),
        services: BTreeMap::new(),
        ingress: None,
    })
}

/// Bytes in use in all slab caches.
fn slab_bytes() -> Result<f64, Error> {
    let text = fs::read_to_string("/proc/slabinfo")?;
    let cache = |line: &str| {
        let mut words = line.split_whitespace().skip(1).map(str::parse::<f64>);
        let (active, _, size) = (words.next()?.ok()?, words.next()?, words.next()?.ok()?);
        Some(active * size)
    };
    Ok(text.lines().skip(2).filter_map(cache).sum())
}

/// The same once nothing is being freed any more: the namespace of the round before goes in the background.
fn settled_slab_bytes() -> Result<f64, Error> {
    const PAUSE: Duration = Duration::from_millis(100);
    let mut before = slab_bytes()?;
    for _ in 0..100 {
        std::thread::sleep(PAUSE);
        let now = slab_bytes()?;
        if (now - before).abs() < 65_536.0 {
            return Ok(now);
        }
        before = now;
    }
    Ok(before)
}

/// Reads all routes of a family inside a namespace, as the kernel sends them; answers how many there were.
fn dump(netns: &Path, family: AddressFamily) -> Result<(usize, f64), Error> {
    let work = || -> Result<(usize, f64), Error> {
        setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut message = NetlinkMessage::new(header, RouteNetlinkMessage::GetRoute(route).into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let begun = Instant::now();
        socket.send(&bytes, 0)?;
        let (mut count, mut buffer) = (0, Vec::with_capacity(64 * 1024));
        loop {
            buffer.clear();
            socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while let Some(head) = rest.get(..6) {
                let len = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
                match u16::from_ne_bytes([head[4], head[5]]) {
                    NLMSG_DONE => return Ok((count, begun.elapsed().as_secs_f64() * 1e3)),
                    NLMSG_ERROR => return Err("the kernel refused to list its routes".into()),
                    _ => count += 1,
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
            }
        }
    };
    // A thread of its own: a namespace belongs to a thread.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| work().map_err(|error| error.to_string()));
        thread.join().unwrap_or_else(|_| Err("the thread in the namespace panicked".to_owned()))
    })
    .map_err(Error::from)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Figures of all rounds by metric, unit and goal.
#[derive(Default)]
struct Figures(Vec<(&'static str, &'static str, Option<f64>, Vec<f64>)>);

impl Figures {
    fn add(&mut self, metric: &'static str, unit: &'static str, at_most: Option<f64>, value: f64) {
        match self.0.iter_mut().find(|known| known.0 == metric) {
            Some(known) => known.3.push(value),
            None => self.0.push((metric, unit, at_most, vec![value])),
        }
    }

    fn print(self, case: &str) -> Result<(), Error> {
        let mut out = std::io::stdout();
        for (metric, unit, at_most, mut values) in self.0 {
            let value = median(&mut values);
            let figure = serde_json::json!(
                { "case": case, "metric": metric, "unit": unit, "value": value, "at_most": at_most });
            writeln!(out, "{figure}")?;
        }
        Ok(())
    }
}

fn measure(hosts: u16, rounds: usize, dir: &Path) -> Result<(), Error> {
    let mut config = HostConfig::new(HostIndex(1), IpAddr::from([192, 0, 2, 1]), 1_500);
    config.netns_dir = dir.to_owned();
    let kernel = LinuxKernel::try_new(dir)?;
    let mut figures = Figures::default();
    for _ in 0..rounds {
        let mut per_family = [0.0; 2];
        for (nth, families) in [Families::V4, Families::Both].into_iter().enumerate() {
            let mut state = state(hosts, families)?;
            let peers = std::mem::take(&mut state.peers);
            driver::ensure_network(&kernel, &config, &state)?;
            state.peers = peers;
            let before = settled_slab_bytes()?;
            let timed = |expect_changes: bool| -> Result<f64, Error> {
                let begun = Instant::now();
                let report = driver::ensure_network(&kernel, &config, &state)?;
                let ms = begun.elapsed().as_secs_f64() * 1e3;
                if report.is_empty() == expect_changes {
                    return Err(format!("{} changes", report.changes.len()).into());
                }
                Ok(ms)
            };
            let programmed = timed(true)?;
            per_family[nth] = (slab_bytes()? - before) / f64::from(hosts);
            let again = timed(false)?;
            let netns = dir.join("sk-bench");
            let (count, v4) = dump(&netns, AddressFamily::Inet)?;
            if count < usize::from(hosts) {
                return Err(format!("{count} routes").into());
            }
            if families == Families::V4 {
                figures.add("programmed, IPv4", "ms", Some(1_000.0), programmed);
                figures.add("routes dumped, IPv4", "ms", Some(50.0), v4);
                figures.add("all read, compared, nothing to do, IPv4", "ms", None, again);
            } else {
                let (_, v6) = dump(&netns, AddressFamily::Inet6)?;
                figures.add("programmed, both families", "ms", None, programmed);
                figures.add("routes dumped, IPv6", "ms", Some(50.0), v6);
                figures.add("all read, compared, nothing to do, both families", "ms", None, again);
            }
            driver::remove_network(&kernel, &state.id)?;
        }
        figures.add("slab per host, IPv4", "B", Some(1_300.0), per_family[0]);
        figures.add("slab per host, IPv6 beside IPv4", "B", Some(1_300.0), per_family[1] - per_family[0]);
    }
    figures.print(&format!("{hosts} remote hosts"))
}

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let hosts = args.next().map_or(Ok(10_000), |text| text.parse::<u16>())?.clamp(1, 60_000);
    let rounds = args.next().map_or(Ok(5), |text| text.parse::<usize>())?.max(1);
    unshare(CloneFlags::CLONE_NEWNET)?;
    let dir = tempfile::tempdir()?;
    let measured = measure(hosts, rounds, dir.path());
    for entry in fs::read_dir(dir.path())?.flatten() {
        // Left only where removing it failed, which has been said.
        let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
    }
    measured
}

//! Measures what services cost in a fabric's rules: 1,000 services of 10 backends each, both families, in a namespace of
//! its own. Needs root.
//!
//! `cargo run --release -p netlib --example services [ROUNDS]` prints the median of so many rounds (5), in milliseconds of
//! wall time: all of it put at once, one backend changed, and nothing to do. Each includes reading the table back.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Instant,
};

use netlib::{HostConfig, HostIndex, NetworkState, Service, driver, linux::LinuxKernel};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, unshare},
};

const SERVICES: u16 = 1_000;
const BACKENDS: u16 = 10;

type Error = Box<dyn std::error::Error>;

/// Backend `nth` of service `service`, after `round` changes of its first one.
fn backend(service: u16, nth: u16, round: u16) -> [IpAddr; 2] {
    let number = service * BACKENDS + nth + if (service, nth) == (0, 0) { 20_000 + round } else { 256 };
    let [high, low] = number.to_be_bytes();
    [Ipv4Addr::new(10, 57, high, low).into(), Ipv6Addr::new(0xfd57, 0, 0, 0, 0, 0, 1, number).into()]
}

fn services(count: u16, round: u16) -> BTreeMap<IpAddr, Service> {
    let mut all = BTreeMap::new();
    for service in 0..count {
        let [high, low] = (0xf000 + service).to_be_bytes();
        let vip6 = Ipv6Addr::new(0xfd57, 0, 0, 0, 0, 0, 2, service);
        let vips: [IpAddr; 2] = [Ipv4Addr::new(10, 57, high, low).into(), vip6.into()];
        for (family, vip) in vips.into_iter().enumerate() {
            let backends = (0..BACKENDS).map(|nth| backend(service, nth, round)[family]).collect();
            all.insert(vip, Service { backends, ..Service::default() });
        }
    }
    all
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn measure(rounds: u16, dir: &std::path::Path) -> Result<(), Error> {
    let mut config = HostConfig::new(HostIndex(1), IpAddr::from([192, 0, 2, 1]), 1_500);
    config.netns_dir = dir.to_owned();
    let kernel = LinuxKernel::try_new(dir)?;
    let mut state = NetworkState {
        id: "bench".parse()?,
        vni: 5_000,
        subnet4: "10.57.0.0/16".parse()?,
        subnet6: Some("fd57::/64".parse()?),
        gateway4: Ipv4Addr::new(10, 57, 0, 1),
        gateway6: Some("fd57::1".parse()?),
        mtu: 1_450,
        internal: true,
        local_blocks: ["10.57.0.0/24".parse()?].into(),
        peers: BTreeMap::new(),
        endpoints: BTreeMap::new(),
        published: Default::default(),
        services: BTreeMap::new(),
        ingress: None,
    };
    driver::ensure_network(&kernel, &config, &state)?;
    let mut timed = |services: BTreeMap<IpAddr, Service>| -> Result<f64, Error> {
        state.services = services;
        let begun = Instant::now();
        driver::ensure_rules(&kernel, &config, &state)?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    let (mut whole, mut one, mut nothing) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        timed(BTreeMap::new())?;
        whole.push(timed(services(SERVICES, round))?);
        one.push(timed(services(SERVICES, round + 1))?);
        nothing.push(timed(services(SERVICES, round + 1))?);
    }
    let mut out = std::io::stdout();
    writeln!(out, "all of {SERVICES} services with {BACKENDS} backends, both families: {:.0} ms", median(whole))?;
    writeln!(out, "one backend of them: {:.0} ms", median(one))?;
    writeln!(out, "nothing: {:.0} ms", median(nothing))?;
    driver::remove_network(&kernel, &state.id)?;
    Ok(())
}

fn main() -> Result<(), Error> {
    let rounds = std::env::args().nth(1).map_or(Ok(5), |text| text.parse::<u16>())?.max(1);
    unshare(CloneFlags::CLONE_NEWNET)?;
    let dir = tempfile::tempdir()?;
    let measured = measure(rounds, dir.path());
    for entry in std::fs::read_dir(dir.path())?.flatten() {
        // Left only where removing it failed, which has been said.
        let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
    }
    measured
}

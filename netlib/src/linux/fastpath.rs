//! Owns the fast path of one fabric in the real kernel: its programs, maps and attachments.
//!
//! Nothing is pinned and nothing is remembered: programs live as long as the devices they are attached to, maps as long
//! as the programs. A process that comes later finds both by what is attached, so the agent may be killed at any time.
//! Everything here runs on a thread inside the fabric. No tasks, no channels.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    net::IpAddr,
};

use nix::{
    errno::Errno,
    net::if_::{if_nameindex, if_nametoindex},
};

use super::bpf;
use crate::{
    fast::{self, COUNTERS, FastCounters, FastFound, HERE, Local, Map, NOBODY, Program, Role, Way},
    names,
    plan::Op,
    types::Mac,
};

/// Most containers of a network on a host that take the fast path; the table's frame takes 16 bytes for each.
const LOCALS_MAX: u32 = 4_096;
/// Most prefixes of a network: 65,535 hosts, both families, twice. Memory is taken by prefix.
const WAYS_MAX: u32 = 1 << 18;

fn create(map: Map) -> io::Result<bpf::Map> {
    let (kind, key, value, max) = match map {
        Map::Local => (bpf::MapKind::Hash, 16, 16, LOCALS_MAX),
        Map::Way => (bpf::MapKind::Prefixes, 20, 12, WAYS_MAX),
        Map::Count => (bpf::MapKind::PerCpu, 4, 8, COUNTERS),
    };
    bpf::Map::create(kind, map.name(), key, value, max)
}

fn is_ours(program: &bpf::Program) -> bool {
    let rest = program.name.strip_prefix(fast::PROGRAM_PREFIX).unwrap_or_default();
    rest.len() == 13 && rest.starts_with(['o', 'i']) && rest[1..].bytes().all(|b| b.is_ascii_hexdigit())
}

fn carries_programs(dev: &str) -> bool {
    dev == names::VXLAN_IFNAME || dev.starts_with(names::ENDPOINT_PREFIX)
}

/// Devices that may carry a program, by name; and the names of all by index.
fn devices() -> io::Result<(BTreeMap<String, u32>, BTreeMap<u32, String>)> {
    let all = if_nameindex()?;
    let named = all.iter().map(|one| (one.name().to_string_lossy().into_owned(), one.index()));
    let named: BTreeMap<String, u32> = named.collect();
    let by_index = named.iter().map(|(name, index)| (*index, name.clone())).collect();
    Ok((named.into_iter().filter(|(name, _)| carries_programs(name)).collect(), by_index))
}

/// Whether this kernel has what the fast path needs, asked of the namespace's `lo`.
///
/// # Errors
/// Why it has not.
pub(super) fn probe() -> io::Result<()> {
    bpf::Program::attached(if_nametoindex("lo")?).map(drop)
}

/// What is attached, and the maps behind it.
struct Attached {
    programs: BTreeMap<String, bpf::Program>,
    maps: BTreeMap<Map, bpf::Map>,
}

impl Attached {
    /// Looks at these devices. The maps are those of the first program found.
    fn find<'a>(devices: impl IntoIterator<Item = (&'a String, &'a u32)>) -> io::Result<Self> {
        let mut found = Self { programs: BTreeMap::new(), maps: BTreeMap::new() };
        for (dev, index) in devices {
            let attached = match bpf::Program::attached(*index) {
                Ok(attached) => attached,
                // The container ended meanwhile.
                Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => continue,
                Err(error) => return Err(error),
            };
            let Some(program) = attached.into_iter().find(is_ours) else { continue };
            if found.maps.is_empty() {
                for id in &program.maps {
                    let (map, name) = bpf::Map::open(*id)?;
                    if let Some(which) = Map::ALL.into_iter().find(|which| which.name() == name) {
                        found.maps.insert(which, map);
                    }
                }
            }
            found.programs.insert(dev.clone(), program);
        }
        Ok(found)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn mac(bytes: &[u8], at: usize) -> Mac {
    Mac(bytes.get(at..at + 6).and_then(|mac| mac.try_into().ok()).unwrap_or_default())
}

/// Reads the fast path of the thread's fabric.
pub(super) fn read() -> io::Result<FastFound> {
    let (devices, names) = devices()?;
    let attached = Attached::find(&devices)?;
    // A device that is gone has no name, and so is another than the one that is wanted.
    let name = |index: u32| names.get(&index).cloned().unwrap_or_default();
    let mut found = FastFound::default();
    found.programs.extend(attached.programs.iter().map(|(dev, program)| (dev.clone(), program.name.clone())));
    if let Some(map) = attached.maps.get(&Map::Way) {
        for (key, value) in map.entries()? {
            let addr = key.get(4..20).and_then(|addr| addr.try_into().ok()).unwrap_or_default();
            let way = match word(&value, 0) {
                HERE => Way::Here,
                NOBODY => Way::Nobody,
                index => Way::Peer { dev: name(index), mac: mac(&value, 4) },
            };
            found.ways.extend(fast::net_of(word(&key, 0), addr).map(|net| (net, way)));
        }
    }
    if let Some(map) = attached.maps.get(&Map::Local) {
        for (key, value) in map.entries()? {
            let addr = fast::addr_of(key.try_into().unwrap_or_default());
            found.locals.insert(addr, Local { dev: name(word(&value, 0)), mac: mac(&value, 8) });
        }
    }
    Ok(found)
}

/// Reads the counters of the thread's fabric; zeros where no program is.
pub(super) fn counters() -> io::Result<FastCounters> {
    let (devices, _) = devices()?;
    let attached = Attached::find(&devices)?;
    let Some(map) = attached.maps.get(&Map::Count) else { return Ok(FastCounters::default()) };
    let sum = |number: u32| -> io::Result<u64> {
        let values = map.get(&number.to_ne_bytes())?;
        Ok(values.chunks_exact(8).map(|value| u64::from_ne_bytes(value.try_into().expect("eight bytes"))).sum())
    };
    Ok(FastCounters { out_fast: sum(0)?, out_routed: sum(1)?, in_fast: sum(2)?, in_routed: sum(3)? })
}

/// Executes operations on the fast path of the thread's fabric, in their order; answers those that failed, by position.
pub(super) fn apply(ops: &[Op]) -> io::Result<Vec<(usize, io::Error)>> {
    let (devices, _) = devices()?;
    // The tunnel knows; only where it has no program are all containers' devices looked at.
    let tunnel = devices.get_key_value(names::VXLAN_IFNAME);
    let mut attached = Attached::find(tunnel)?;
    if attached.maps.is_empty() {
        attached = Attached::find(&devices)?;
    }
    let mut run = Run { attached, loaded: BTreeMap::new() };
    let mut failed = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        if let Err(error) = run.execute(op) {
            failed.push((at, error));
        }
    }
    Ok(failed)
}

/// Whether an error is the kernel's judgement of a program, and not that its device is gone or memory is short.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    let passing = [Errno::ENODEV, Errno::ENOENT, Errno::ENOMEM];
    !error.raw_os_error().is_some_and(|code| passing.iter().any(|errno| *errno as i32 == code))
}

/// Removes every program of ours from the thread's fabric.
pub(super) fn remove() -> io::Result<()> {
    let (devices, _) = devices()?;
    for (dev, program) in Attached::find(&devices)?.programs {
        match program.detach(devices[&dev]) {
            // The device went meanwhile, and the program with it.
            Err(error) if matches!(error.raw_os_error(), Some(code) if gone(code)) => {}
            other => other?,
        }
    }
    Ok(())
}

fn gone(code: i32) -> bool {
    [Errno::ENODEV, Errno::ENOENT].iter().any(|errno| *errno as i32 == code)
}

struct Run {
    attached: Attached,
    /// Programs by name, of those that were loaded or found in this run.
    loaded: BTreeMap<String, bpf::Program>,
}

impl Run {
    /// A map that is there.
    fn map(&self, map: Map) -> io::Result<&bpf::Map> {
        self.attached.maps.get(&map).ok_or_else(|| Errno::ENOENT.into())
    }

    /// Makes the maps if they are not there. Only ways do: a container that is known while the ways are not could reach
    /// a virtual address unnoticed.
    fn make_maps(&mut self) -> io::Result<()> {
        for map in Map::ALL {
            if let Entry::Vacant(vacant) = self.attached.maps.entry(map) {
                vacant.insert(create(map)?);
            }
        }
        Ok(())
    }

    fn execute(&mut self, op: &Op) -> io::Result<()> {
        match op {
            Op::AttachFast(dev, program) => self.attach(dev, program),
            Op::PutWay(net, way) => {
                let (index, mac) = match way {
                    Way::Peer { dev, mac } => (if_nametoindex(dev.as_str())?, *mac),
                    Way::Here => (HERE, Mac([0; 6])),
                    Way::Nobody => (NOBODY, Mac([0; 6])),
                };
                let value = [&index.to_ne_bytes()[..], &mac.0, &[0; 2]].concat();
                self.make_maps()?;
                self.map(Map::Way)?.put(&way_key(*net), &value)
            }
            Op::DeleteWay(net) => self.delete(Map::Way, &way_key(*net)),
            Op::PutLocal { addr, local, routed } => self.put_local(*addr, local, *routed),
            Op::DeleteLocal(addr) => self.delete(Map::Local, &fast::key_of(*addr)),
            Op::RemoveFast => {
                remove()?;
                self.attached = Attached { programs: BTreeMap::new(), maps: BTreeMap::new() };
                self.loaded.clear();
                Ok(())
            }
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn put_local(&self, addr: IpAddr, local: &Local, routed: bool) -> io::Result<()> {
        let index = if_nametoindex(local.dev.as_str())?;
        let value = [&index.to_ne_bytes()[..], &u32::from(routed).to_ne_bytes(), &local.mac.0, &[0; 2]].concat();
        self.map(Map::Local)?.put(&fast::key_of(addr), &value)
    }

    fn delete(&self, map: Map, key: &[u8]) -> io::Result<()> {
        // Without programs there are no maps, and nothing to remove.
        match self.attached.maps.get(&map).map_or(Ok(()), |map| map.delete(key)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn attach(&mut self, dev: &str, program: &Program) -> io::Result<()> {
        let index = if_nametoindex(dev)?;
        let old = bpf::Program::attached(index)?.into_iter().find(is_ours);
        let name = program.name();
        if old.as_ref().is_some_and(|old| old.name == name) {
            return Ok(());
        }
        self.load(&name, program)?.attach(index, old.as_ref())
    }

    /// The program of this name with the fabric's maps: loaded before in this run, attached elsewhere, or loaded now.
    fn load(&mut self, name: &str, program: &Program) -> io::Result<&bpf::Program> {
        if !self.loaded.contains_key(name) {
            let elsewhere = match program.role {
                // Any other container's.
                Role::Out => self.other_container(name)?,
                Role::In => None,
            };
            let loaded = match elsewhere {
                Some(found) => found,
                None => {
                    let maps: Vec<i32> = Map::ALL
                        .map(|map| self.map(map).map(bpf::Map::descriptor))
                        .into_iter()
                        .collect::<Result<_, _>>()?;
                    let descriptor = |map: Map| maps[map as usize];
                    let code: Vec<[u8; 8]> = program.instructions().iter().map(|insn| insn.bytes(descriptor)).collect();
                    bpf::Program::load(name, &code)?
                }
            };
            self.loaded.insert(name.to_owned(), loaded);
        }
        Ok(&self.loaded[name])
    }

    /// That program, if one of some containers of this fabric has it; loading it anew takes longer than looking.
    fn other_container(&self, name: &str) -> io::Result<Option<bpf::Program>> {
        /// Containers that are looked at: all have the same but for a moment.
        const LOOKED_AT: usize = 2;
        let (devices, _) = devices()?;
        let containers = devices.iter().filter(|(dev, _)| dev.starts_with(names::ENDPOINT_PREFIX));
        let found = Attached::find(containers.take(LOOKED_AT))?;
        Ok(found.programs.into_values().find(|program| program.name == name))
    }
}

fn way_key(net: ipnet::IpNet) -> Vec<u8> {
    let (len, addr) = fast::prefix_of(net);
    [&len.to_ne_bytes()[..], &addr].concat()
}

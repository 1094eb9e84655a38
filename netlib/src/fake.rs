//! Owns a kernel for simulations and tests: typed state of one host, which refuses what the real kernel refuses, with
//! the same error numbers.
//!
//! It stands below the planner and the driver, in the real kernel's place. Time does not pass in it and nothing is
//! random. No tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Mutex, MutexGuard},
};

use nix::errno::Errno;

use crate::{
    fast::{FastFound, Way},
    kernel::{Error, Kernel, OpFailure, OpFailures, Scope},
    names,
    nft::TableView,
    plan::Op,
    state::{Link, LinkKind, Nexthop, Observed, Query, Route, RouteKey, Target, Vxlan},
    types::{Mac, NetworkId, Translated},
};

/// A simulated host's kernel.
#[derive(Debug, Default)]
pub struct FakeKernel {
    state: Mutex<FakeState>,
}

/// The state of a [`FakeKernel`].
#[derive(Debug, Clone, PartialEq)]
pub struct FakeState {
    /// The host's own namespace.
    pub host: Observed,
    /// Fabrics by network.
    pub fabrics: BTreeMap<NetworkId, Observed>,
    /// The other end of each veth, both ways, by (namespace, name).
    pub veths: BTreeMap<(Scope, String), (Scope, String)>,
    /// Translated connections, and where they are tracked.
    pub connections: Vec<(Scope, Translated)>,
    /// Operations applied so far.
    pub applied: u64,
}

impl Default for FakeState {
    fn default() -> Self {
        Self {
            host: fresh_namespace(true),
            fabrics: BTreeMap::new(),
            veths: BTreeMap::new(),
            connections: Vec::new(),
            applied: 0,
        }
    }
}

/// A new namespace has a loopback device that is down, and the kernel's default sysctls.
fn fresh_namespace(up: bool) -> Observed {
    let lo = Link { kind: LinkKind::Loopback, mac: Mac([0; 6]), mtu: 65_536, up };
    Observed { links: BTreeMap::from([("lo".to_owned(), lo)]), ..Observed::default() }
}

/// Sysctls that exist per link, with the value they start with.
const LINK_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/conf/*/route_localnet", "0"),
    ("net/ipv6/conf/*/accept_ra", "1"),
    ("net/ipv6/conf/*/disable_ipv6", "0"),
];
/// Sysctls that exist in every namespace, with the value they start with.
const NS_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/conf/all/arp_ignore", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/all/send_redirects", "1"),
    ("net/ipv4/conf/default/arp_ignore", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv4/conf/default/send_redirects", "1"),
    ("net/ipv4/ip_forward", "0"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/all/forwarding", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
];

fn matches(pattern: &str, path: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == path,
        Some((head, tail)) => {
            path.len() > head.len() + tail.len()
                && path.starts_with(head)
                && path.ends_with(tail)
                && !path[head.len()..path.len() - tail.len()].contains('/')
        }
    }
}

/// Every sysctl a namespace has, with what was set in it.
fn sysctls(ns: &Observed) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> =
        NS_SYSCTLS.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned())).collect();
    for name in ns.links.keys() {
        all.extend(LINK_SYSCTLS.iter().map(|(path, value)| (path.replace('*', name), (*value).to_owned())));
    }
    for (path, value) in &ns.sysctls {
        all.entry(path.clone()).and_modify(|old| old.clone_from(value));
    }
    all
}

fn refuse(errno: Errno) -> Result<(), io::Error> {
    Err(io::Error::from_raw_os_error(errno as i32))
}

impl FakeKernel {
    /// A host with nothing but `lo`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at or changes the state behind the planner's back, as an administrator or a fault would.
    pub fn with<T>(&self, change: impl FnOnce(&mut FakeState) -> T) -> T {
        change(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, FakeState> {
        // A panic while the lock was held is a failed test; its state does no further harm.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl FakeState {
    fn ns(&mut self, scope: &Scope) -> Result<&mut Observed, Error> {
        match scope {
            Scope::Host => Ok(&mut self.host),
            Scope::Fabric(id) => self.fabrics.get_mut(id).ok_or_else(|| Error::NoNetwork(id.clone())),
        }
    }

    /// Removes a link, the other end of a veth too, as the kernel does.
    pub fn delete_link(&mut self, scope: &Scope, name: &str) {
        if let Some((peer_scope, peer_name)) = self.veths.remove(&(scope.clone(), name.to_owned())) {
            self.veths.remove(&(peer_scope.clone(), peer_name.clone()));
            self.drop_link(&peer_scope, &peer_name);
        }
        self.drop_link(scope, name);
    }

    fn drop_link(&mut self, scope: &Scope, name: &str) {
        if let Ok(ns) = self.ns(scope) {
            ns.drop_link(name);
            ns.sysctls.retain(|path, _| !path.split('/').any(|part| part == name));
        }
    }

    fn execute(&mut self, scope: &Scope, op: &Op) -> Result<(), io::Error> {
        self.applied += 1;
        match op {
            Op::DeleteLink(name) if name == "lo" => refuse(Errno::EOPNOTSUPP),
            Op::DeleteLink(name) => {
                self.delete_link(scope, name);
                Ok(())
            }
            Op::CreateVxlan { name, vxlan, mac, mtu } => self.create_vxlan(scope, name, vxlan, *mac, *mtu),
            Op::CreateVeth { name, mac, mtu, peer } => {
                let taken = |ns: &Observed, name: &str| ns.links.contains_key(name);
                if taken(&self.host, &peer.name) || self.ns(scope).is_ok_and(|ns| taken(ns, name)) {
                    return refuse(Errno::EEXIST);
                }
                let end = |mac| Link { kind: LinkKind::Veth, mac, mtu: *mtu, up: false };
                self.host.links.insert(peer.name.clone(), end(peer.mac));
                self.ns(scope).map_err(io::Error::other)?.links.insert(name.clone(), end(*mac));
                let (here, there) = ((scope.clone(), name.clone()), (Scope::Host, peer.name.clone()));
                self.veths.insert(here.clone(), there.clone());
                self.veths.insert(there, here);
                Ok(())
            }
            _ => execute_in(self.ns(scope).map_err(io::Error::other)?, op),
        }
    }

    fn create_vxlan(&mut self, scope: &Scope, name: &str, vxlan: &Vxlan, mac: Mac, mtu: u32) -> Result<(), io::Error> {
        // All VXLAN sockets are the host's: a VNI is there once per port and underlay device.
        let twin = |link: &Link| {
            matches!(&link.kind, LinkKind::Vxlan(other)
                if (other.vni, other.port, &other.dev) == (vxlan.vni, vxlan.port, &vxlan.dev))
        };
        if self.fabrics.values().chain([&self.host]).any(|ns| ns.links.values().any(twin)) {
            return refuse(Errno::EEXIST);
        }
        if vxlan.dev.as_ref().is_some_and(|dev| !self.host.links.contains_key(dev)) {
            return refuse(Errno::ENODEV);
        }
        let ns = self.ns(scope).map_err(io::Error::other)?;
        if ns.links.contains_key(name) {
            return refuse(Errno::EEXIST);
        }
        let link = Link { kind: LinkKind::Vxlan(vxlan.clone()), mac, mtu, up: false };
        ns.links.insert(name.to_owned(), link);
        Ok(())
    }
}

fn is_up(ns: &Observed, dev: &str) -> Result<(), io::Error> {
    match ns.links.get(dev) {
        None => refuse(Errno::ENODEV),
        Some(link) if !link.up => refuse(Errno::ENETDOWN),
        Some(_) => Ok(()),
    }
}

fn exists(ns: &Observed, dev: &str) -> Result<(), io::Error> {
    if ns.links.contains_key(dev) { Ok(()) } else { refuse(Errno::ENODEV) }
}

/// The operations that touch one namespace only.
fn execute_in(ns: &mut Observed, op: &Op) -> Result<(), io::Error> {
    match op {
        Op::SetSysctl { path, value } => {
            if !sysctls(ns).contains_key(path) {
                return refuse(Errno::ENOENT);
            }
            ns.sysctls.insert(path.clone(), value.clone());
        }
        Op::PutTable(table) => ns.table = Some(table.view()),
        Op::PutElements { table, sets } => return put_elements(ns, &table.view(), sets.keys()),
        Op::SetLink { name, mac, mtu } => {
            let Some(link) = ns.links.get_mut(name) else {
                return refuse(Errno::ENODEV);
            };
            link.up = true;
            link.mtu = mtu.unwrap_or(link.mtu);
            if let Some(mac) = mac {
                link.mac = *mac;
                ns.neighs.retain(|(dev, _), _| dev != name);
            }
        }
        Op::AddAddr(dev, addr) => {
            exists(ns, dev)?;
            if !ns.addrs.insert((dev.clone(), *addr)) {
                return refuse(Errno::EEXIST);
            }
        }
        Op::PutNeigh(dev, addr, mac) => {
            exists(ns, dev)?;
            ns.neighs.insert((dev.clone(), *addr), *mac);
        }
        Op::PutFdb(dev, mac, vtep) => {
            let Some(link) = ns.links.get(dev) else {
                return refuse(Errno::ENODEV);
            };
            let LinkKind::Vxlan(vxlan) = &link.kind else {
                return refuse(Errno::EOPNOTSUPP);
            };
            if vxlan.local.is_ipv4() != vtep.is_ipv4() {
                return refuse(Errno::EAFNOSUPPORT);
            }
            ns.fdb.insert((dev.clone(), *mac), *vtep);
        }
        Op::PutNexthop(id, hop) => return put_nexthop(ns, *id, hop),
        Op::PutRoute { key, route, replace } => return put_route(ns, key, route, *replace),
        Op::AcceptInDockerUser(family, direction) => {
            let Some(rules) = ns.docker_user.get_mut(family) else {
                return refuse(Errno::ENOENT);
            };
            rules.insert(*direction);
        }
        Op::DeleteRoute(key, _) => drop(ns.routes.remove(key)),
        Op::DeleteNexthop(id) => ns.drop_nexthop(*id),
        Op::DeleteNeigh(dev, addr) => drop(ns.neighs.remove(&(dev.clone(), *addr))),
        Op::DeleteFdb(dev, mac, _) => drop(ns.fdb.remove(&(dev.clone(), *mac))),
        Op::DeleteAddr(dev, addr) => drop(ns.addrs.remove(&(dev.clone(), *addr))),
        Op::AttachFast(..)
        | Op::PutWay(..)
        | Op::DeleteWay(_)
        | Op::PutLocal { .. }
        | Op::DeleteLocal(_)
        | Op::RemoveFast => return execute_fast(ns, op),
        Op::DeleteLink(_) | Op::CreateVxlan { .. } | Op::CreateVeth { .. } => {
            return refuse(Errno::EINVAL);
        }
    }
    Ok(())
}

fn put_nexthop(ns: &mut Observed, id: u32, hop: &Nexthop) -> Result<(), io::Error> {
    is_up(ns, &hop.dev)?;
    let link_local = matches!(hop.via, IpAddr::V6(via) if via.is_unicast_link_local());
    if !link_local {
        return refuse(Errno::ENETUNREACH);
    }
    ns.nexthops.insert(id, hop.clone());
    Ok(())
}

fn put_route(ns: &mut Observed, key: &RouteKey, route: &Route, replace: bool) -> Result<(), io::Error> {
    match &route.target {
        Target::Nexthop(id) if !ns.nexthops.contains_key(id) => return refuse(Errno::EINVAL),
        Target::Dev { dev, .. } => is_up(ns, dev)?,
        _ => {}
    }
    if !replace && ns.routes.contains_key(key) {
        return refuse(Errno::EEXIST);
    }
    ns.routes.insert(*key, Route { mtu: route.mtu.filter(|mtu| *mtu > 0), ..route.clone() });
    Ok(())
}

fn put_elements<'a>(
    ns: &mut Observed,
    want: &TableView,
    sets: impl Iterator<Item = &'a String> + Clone,
) -> Result<(), io::Error> {
    let Some(table) = &mut ns.table else {
        return refuse(Errno::ENOENT);
    };
    if !sets.clone().all(|name| table.sets.contains_key(name)) {
        return refuse(Errno::ENOENT);
    }
    for name in sets {
        if let (Some(old), Some(new)) = (table.sets.get_mut(name), want.sets.get(name)) {
            old.1.clone_from(&new.1);
        }
    }
    Ok(())
}

/// The operations on the fast path.
fn execute_fast(ns: &mut Observed, op: &Op) -> Result<(), io::Error> {
    let dev = match op {
        Op::AttachFast(dev, _) | Op::PutWay(_, Way::Peer { dev, .. }) => Some(dev),
        Op::PutLocal { local, .. } => Some(&local.dev),
        _ => None,
    };
    dev.map_or(Ok(()), |dev| exists(ns, dev))?;
    let fast = ns.fast.get_or_insert_default();
    match op {
        Op::AttachFast(dev, program) => drop(fast.programs.insert(dev.clone(), program.name())),
        Op::PutWay(net, way) => drop(fast.ways.insert(*net, way.clone())),
        Op::DeleteWay(net) => drop(fast.ways.remove(net)),
        Op::PutLocal { addr, local, .. } => drop(fast.locals.insert(*addr, local.clone())),
        Op::DeleteLocal(addr) => drop(fast.locals.remove(addr)),
        _ => *fast = FastFound::default(),
    }
    Ok(())
}

impl Kernel for FakeKernel {
    fn fast_path(&self) -> Result<(), String> {
        Ok(())
    }

    fn networks(&self) -> Result<Vec<NetworkId>, Error> {
        Ok(self.lock().fabrics.keys().cloned().collect())
    }

    fn create_fabric(&self, id: &NetworkId) -> Result<bool, Error> {
        let mut state = self.lock();
        let fresh = !state.fabrics.contains_key(id);
        if fresh {
            state.fabrics.insert(id.clone(), fresh_namespace(false));
        }
        Ok(fresh)
    }

    fn remove_fabric(&self, id: &NetworkId) -> Result<bool, Error> {
        let mut state = self.lock();
        let scope = Scope::Fabric(id.clone());
        let links: BTreeSet<String> = match state.fabrics.get(id) {
            Some(fabric) => fabric.links.keys().cloned().collect(),
            None => return Ok(false),
        };
        for name in links {
            state.delete_link(&scope, &name);
        }
        state.fabrics.remove(id);
        Ok(true)
    }

    fn observe(&self, scope: &Scope, query: &Query) -> Result<Observed, Error> {
        let mut state = self.lock();
        let ns = state.ns(scope)?.clone();
        let wanted = |path: &String| query.sysctls.iter().any(|pattern| matches(pattern, path));
        let mut found = Observed {
            sysctls: sysctls(&ns).into_iter().filter(|(path, _)| wanted(path)).collect(),
            ..Observed::default()
        };
        if query.objects {
            let sysctls = std::mem::take(&mut found.sysctls);
            found = Observed { sysctls, fast: None, table: None, docker_user: BTreeMap::new(), ..ns.clone() };
            if query.only_our_routes {
                found.routes.retain(|_, route| route.protocol == names::RTPROT_SKEIN);
            }
        }
        if query.fast {
            found.fast = Some(ns.fast.unwrap_or_default());
        }
        if query.table {
            found.table = ns.table;
        }
        if query.docker_user {
            found.docker_user = ns.docker_user;
        }
        Ok(found)
    }

    fn forget_connections(&self, scope: &Scope, goes: &(dyn Fn(&Translated) -> bool + Sync)) -> Result<usize, Error> {
        let mut state = self.lock();
        state.ns(scope)?;
        let before = state.connections.len();
        state.connections.retain(|(at, flow)| at != scope || !goes(flow));
        Ok(before - state.connections.len())
    }

    fn apply(&self, scope: &Scope, ops: &[Op]) -> Result<(), Error> {
        let mut state = self.lock();
        state.ns(scope)?;
        let mut failures = OpFailures::default();
        for (index, op) in ops.iter().enumerate() {
            if let Err(source) = state.execute(scope, op) {
                failures.0.push(OpFailure { index, what: op.to_string(), source });
            }
        }
        if failures.0.is_empty() {
            Ok(())
        } else {
            Err(Error::Apply { scope: scope.clone(), total: ops.len(), failures })
        }
    }
}

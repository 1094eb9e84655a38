//! Owns the real kernel: namespaces, rtnetlink, sysctls, nft and iptables behind [`Kernel`].
//!
//! A [`LinuxKernel`] belongs to the namespace of the thread that opened it (*the host's*). It keeps one netlink socket
//! per namespace, behind a mutex; a fabric's socket is always locked before the host's. What it caches about a fabric
//! is checked against the pinned file, so a fabric that was removed and made again is noticed.
//! Everything here blocks, bounded by time limits. No tasks, no channels (the private module `watch` has both).

mod bpf;
mod conntrack;
mod elements;
mod fastpath;
#[cfg(test)]
mod fuzz;
mod messages;
mod netns;
mod socket;
mod sysctl;
mod tools;
pub(crate) mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use ipnet::IpNet;
use nix::errno::Errno;

use self::socket::{Request, Socket};
use crate::{
    fast::FastCounters,
    kernel::{Error, HostRoute, Kernel, OpFailure, OpFailures, Scope},
    look::{self, Counted},
    names,
    nft::{Forms, Table},
    plan::Op,
    state::{Direction, LinkKind, Observed, Query, Target, Vxlan},
    types::{Mac, NetworkId, Translated},
};

/// An open namespace.
struct Namespace {
    file: File,
    /// Inode of the namespace, its identity.
    inode: u64,
    socket: Mutex<Socket>,
}

impl Namespace {
    fn open(file: File) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        let socket = Mutex::new(netns::run_in(file.as_fd(), Socket::open)?);
        Ok(Self { file, inode, socket })
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        // Requests and answers are matched by number, so a socket is good after a panic elsewhere.
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernel of the host this process runs on.
pub struct LinuxKernel {
    netns_dir: PathBuf,
    host: Namespace,
    fabrics: Mutex<HashMap<NetworkId, Arc<Namespace>>>,
    /// How nft prints our rules. What it prints for a text is always the same, so this is no memory of the kernel.
    forms: Mutex<Forms>,
    /// Whether the kernel has the hook that the fast path needs, or why not; asked once.
    fast_hook: OnceLock<Result<(), String>>,
    /// Why it refused a program of ours. It would again.
    fast_refused: OnceLock<String>,
}

/// Most rules whose form is remembered, about 100 bytes each. A fabric has some 8, of which 2 are its own; beyond this
/// all are learnt again, 10 to 20 ms for a table.
const FORMS_MAX: usize = 4096;

impl std::fmt::Debug for LinuxKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinuxKernel").field("netns_dir", &self.netns_dir).finish_non_exhaustive()
    }
}

fn host_error(verb: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Socket { verb: verb.to_owned(), scope: Scope::Host, source }
}

impl LinuxKernel {
    /// Opens the kernel with the calling thread's network namespace as the host's.
    ///
    /// # Errors
    /// When the namespace or a netlink socket cannot be opened, for want of privilege for example.
    pub fn try_new(netns_dir: &Path) -> Result<Self, Error> {
        let own = netns::own().map_err(host_error("open the host's namespace"))?;
        Self::try_new_in(netns_dir, own.into())
    }

    /// Opens the kernel with the given network namespace as the host's.
    ///
    /// # Errors
    /// As [`LinuxKernel::try_new`].
    pub fn try_new_in(netns_dir: &Path, host: OwnedFd) -> Result<Self, Error> {
        let host = Namespace::open(host.into()).map_err(host_error("open a netlink socket"))?;
        Ok(Self {
            netns_dir: netns_dir.to_owned(),
            host,
            fabrics: Mutex::default(),
            forms: Mutex::default(),
            fast_hook: OnceLock::new(),
            fast_refused: OnceLock::new(),
        })
    }

    /// What a network's fast path counted.
    ///
    /// # Errors
    /// When there is no such fabric or it cannot be read.
    pub fn fast_counters(&self, id: &NetworkId) -> Result<FastCounters, Error> {
        self.run_in(&Scope::Fabric(id.clone()), "read the fast path's counters", fastpath::counters)
    }

    /// Why a program of the fast path was refused, if one was.
    pub fn fast_path_refused(&self) -> Option<&str> {
        self.fast_refused.get().map(String::as_str)
    }

    fn fast_hook(&self) -> &Result<(), String> {
        self.fast_hook.get_or_init(|| {
            let probed = netns::run_in(self.host.file.as_fd(), fastpath::probe);
            probed.map_err(|error| format!("the kernel has no tcx (Linux 6.6 has): {error}"))
        })
    }

    fn pin(&self, id: &NetworkId) -> PathBuf {
        self.netns_dir.join(names::netns_name(id))
    }

    fn fabric(&self, id: &NetworkId) -> Result<Arc<Namespace>, Error> {
        let path = self.pin(id);
        let failed = |source| Error::Namespace { verb: "open", path: path.clone(), source };
        let file = netns::open(&path).map_err(failed)?;
        let mut fabrics = self.fabrics.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = file else {
            fabrics.remove(id);
            return Err(Error::NoNetwork(id.clone()));
        };
        let inode = file.metadata().map_err(failed)?.ino();
        if let Some(known) = fabrics.get(id).filter(|known| known.inode == inode) {
            return Ok(Arc::clone(known));
        }
        let opened = Arc::new(Namespace::open(file).map_err(failed)?);
        fabrics.insert(id.clone(), Arc::clone(&opened));
        Ok(opened)
    }

    /// Runs `work` on a thread inside a namespace; what it opens stays in there.
    pub(crate) fn run_in<T: Send>(
        &self,
        scope: &Scope,
        verb: &str,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> Result<T, Error> {
        let result = match scope {
            Scope::Host => netns::run_in(self.host.file.as_fd(), work),
            Scope::Fabric(id) => netns::run_in(self.fabric(id)?.file.as_fd(), work),
        };
        result.map_err(|source| Error::Socket { verb: verb.to_owned(), scope: scope.clone(), source })
    }

    /// Binds a UDP socket, nonblocking, inside a namespace.
    ///
    /// # Errors
    /// When there is no such fabric or the address cannot be bound.
    pub fn udp_socket_in(&self, scope: &Scope, addr: SocketAddr) -> Result<UdpSocket, Error> {
        self.run_in(scope, &format!("bind udp {addr}"), || {
            let socket = UdpSocket::bind(addr)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
    }

    /// Binds a TCP listener, nonblocking, inside a namespace.
    ///
    /// # Errors
    /// When there is no such fabric or the address cannot be bound.
    pub fn tcp_listener_in(&self, scope: &Scope, addr: SocketAddr) -> Result<TcpListener, Error> {
        self.run_in(scope, &format!("listen on tcp {addr}"), || {
            let listener = TcpListener::bind(addr)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
    }

    /// The host's routes that are not ours and not default routes, both families, in order.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn host_routes(&self) -> Result<Vec<HostRoute>, Error> {
        let failed = |source| Error::Observe { what: "routes", scope: Scope::Host, source };
        let tables = read_tables(&mut self.host.socket(), false).map_err(failed)?;
        let foreign = tables.found.routes.into_iter().filter(|(key, route)| {
            route.protocol != names::RTPROT_SKEIN && key.dst.prefix_len() > 0 && route.target != Target::Unreachable
        });
        let routes = foreign.map(|(key, route)| HostRoute {
            dst: key.dst,
            dev: match route.target {
                Target::Dev { dev, .. } => Some(dev),
                _ => None,
            },
        });
        Ok(routes.filter(|route| !is_link_local(route.dst)).collect())
    }

    /// Runs `work` on a thread inside the namespace that `path` shows: a container's. What it opens stays in there.
    ///
    /// # Errors
    /// When there is no namespace at that path, or what `work` says.
    pub fn run_at<T: Send>(
        &self,
        path: &Path,
        verb: &str,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> Result<T, Error> {
        let failed = |source| Error::Namespace { verb: "open", path: path.to_owned(), source };
        let gone = || failed(io::Error::from(io::ErrorKind::NotFound));
        let file = netns::open(path).map_err(failed)?.ok_or_else(gone)?;
        let named = |source| Error::Namespace { verb: "use", path: path.to_owned(), source: worded(verb, source) };
        netns::run_in(file.as_fd(), work).map_err(named)
    }

    /// Reads the links, addresses and routes of the namespace that `path` shows.
    ///
    /// # Errors
    /// When there is no namespace at that path or it cannot be read.
    pub fn observe_at(&self, path: &Path) -> Result<Observed, Error> {
        let read = || read_tables(&mut Socket::open()?, false);
        Ok(self.run_at(path, "read links and routes", read)?.found)
    }

    /// What the kernel has counted in a namespace.
    ///
    /// # Errors
    /// When there is no such fabric or the counters cannot be read.
    pub fn counted(&self, scope: &Scope) -> Result<Counted, Error> {
        self.run_in(scope, "read counters", || {
            let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
            // Without IPv6 there is no such file.
            let mut protocols = look::parse_pairs(&read("snmp6").unwrap_or_default());
            protocols.extend(look::parse_groups(&read("snmp")?));
            protocols.extend(look::parse_groups(&read("netstat")?));
            Ok(Counted { rules: tools::nft_counted()?, devices: look::parse_devices(&read("dev")?), protocols })
        })
    }

    /// Rules in tables of others that may drop packets on their way into a namespace, VXLAN on `port` among them.
    ///
    /// # Errors
    /// When there is no such fabric or nft cannot list rules.
    pub fn foreign_drops(&self, scope: &Scope, port: u16) -> Result<Vec<String>, Error> {
        self.run_in(scope, "list rules", || tools::nft_foreign_drops(port))
    }

    /// MTU in bytes of the host's device `dev`, or else of the one that has `addr`.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn underlay_mtu(&self, dev: Option<&str>, addr: IpAddr) -> Result<u32, Error> {
        let query = Query { objects: true, only_our_routes: true, ..Query::default() };
        let found = self.observe(&Scope::Host, &query)?;
        let holder = || found.addrs.iter().find(|(_, net)| net.addr() == addr).map(|(dev, _)| dev.as_str());
        let name = dev.or_else(holder).ok_or(Error::NoDevice(addr))?;
        found.links.get(name).map(|link| link.mtu).ok_or_else(|| Error::NoUnderlay(name.to_owned()))
    }

    /// What the host's way to each of these addresses takes, bytes, from the address `local`: the MTU of the device or of
    /// the route, or what the kernel has learnt of it. Addresses without a way are left out. About 20 us each.
    ///
    /// # Errors
    /// When the host's namespace cannot be entered.
    pub fn path_mtus(&self, local: IpAddr, peers: &BTreeSet<IpAddr>) -> Result<BTreeMap<IpAddr, u32>, Error> {
        self.run_in(&Scope::Host, "ask for the mtu of paths", || {
            Ok(peers.iter().filter_map(|peer| Some((*peer, socket::path_mtu(local, *peer).ok()?))).collect())
        })
    }

    /// Removes our nft table and `DOCKER-USER` rules from the host's namespace.
    ///
    /// # Errors
    /// When nft or iptables refuses.
    pub fn remove_host_rules(&self) -> Result<(), Error> {
        self.run_in(&Scope::Host, "remove rules", || {
            tools::nft_remove()?;
            for family in tools::docker_user_read().into_keys() {
                tools::docker_user_remove(family, Direction::In)?;
                tools::docker_user_remove(family, Direction::Out)?;
            }
            Ok(())
        })
    }

    /// The forms of a table's rules. Without them the table still does its work, so failing to learn them is no error.
    fn forms(&self, table: &Table) -> Forms {
        let known = |forms: &Forms| -> Option<Forms> {
            table.tags().map(|tag| forms.get(&tag).map(|form| (tag, form.clone()))).collect()
        };
        let lock = || self.forms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(forms) = known(&lock()) {
            return forms;
        }
        match netns::run_in_new(|| tools::nft_learn(table)) {
            Ok(learnt) => {
                let mut forms = lock();
                if forms.len() + learnt.len() > FORMS_MAX {
                    forms.clear();
                }
                forms.extend(learnt.clone());
                learnt
            }
            Err(error) => {
                tracing::warn!(%error, "failed to learn how nft prints our rules: rewritten ones go unnoticed");
                Forms::new()
            }
        }
    }

    /// Gives the underlay devices of VXLAN devices their names, which only the host's namespace knows.
    fn name_underlays(&self, tables: &mut messages::Tables) -> io::Result<()> {
        for (name, index) in std::mem::take(&mut tables.underlays) {
            let answer = self.host.socket().read(&messages::get_link_by_index(index));
            let dev = match answer {
                Ok(found) => found.first().map(|(kind, body)| messages::parse_link(*kind, body)).transpose()?.flatten(),
                // Gone a moment ago: it does not match, and that is right.
                Err(_) => None,
            };
            let dev = dev.map_or_else(|| format!("index {index}"), |found| found.name);
            if let Some(LinkKind::Vxlan(vxlan)) = tables.found.links.get_mut(&name).map(|link| &mut link.kind) {
                vxlan.dev = Some(dev);
            }
        }
        Ok(())
    }
}

/// The same error with what was tried before it.
fn worded(verb: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("failed to {verb}: {error}"))
}

fn is_link_local(net: IpNet) -> bool {
    matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local() || net.addr().is_multicast())
}

/// Reads links, addresses, neighbours, forwarding entries, next hops and routes.
fn read_tables(socket: &mut Socket, only_our_routes: bool) -> io::Result<messages::Tables> {
    let mut tables = messages::Tables::default();
    let requests = [
        messages::dump_links(),
        messages::dump_addresses(),
        messages::dump_neighbours(false),
        messages::dump_neighbours(true),
        messages::dump_nexthops(),
        messages::dump_routes(true, only_our_routes),
        messages::dump_routes(false, only_our_routes),
    ];
    for request in requests {
        match socket.read(&request) {
            Ok(found) => {
                for (kind, body) in found {
                    if let Err(error) = tables.add(kind, &body) {
                        // An object of a kind the crate cannot read is not ours.
                        tracing::debug!(%error, "passed over a netlink object");
                    }
                }
            }
            // A namespace that never had an IPv4 route has no main table yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tables)
}

impl Kernel for LinuxKernel {
    fn fast_path(&self) -> Result<(), String> {
        self.fast_refused.get().map_or_else(|| self.fast_hook().clone(), |why| Err(why.clone()))
    }

    fn networks(&self) -> Result<Vec<NetworkId>, Error> {
        let failed = |source| Error::Namespace { verb: "list", path: self.netns_dir.clone(), source };
        let entries = match fs::read_dir(&self.netns_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut networks = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let id = entry.file_name().to_str().and_then(names::network_of_netns);
            if let Some(id) = id
                && netns::open(&entry.path()).map_err(failed)?.is_some()
            {
                networks.push(id);
            }
        }
        networks.sort();
        Ok(networks)
    }

    fn create_fabric(&self, id: &NetworkId) -> Result<bool, Error> {
        let path = self.pin(id);
        netns::create(&path).map_err(|source| Error::Namespace { verb: "make", path, source })
    }

    fn remove_fabric(&self, id: &NetworkId) -> Result<bool, Error> {
        let path = self.pin(id);
        let failed = |source| Error::Namespace { verb: "remove", path: path.clone(), source };
        let existed = match self.fabric(id) {
            Ok(fabric) => {
                // By hand: the kernel removes a dead namespace's devices later, and until then the VNI is taken.
                let mut socket = fabric.socket();
                let tables = read_tables(&mut socket, true).map_err(failed)?;
                for (name, _) in tables.found.links.iter().filter(|(_, link)| link.kind != LinkKind::Loopback) {
                    forgive(socket.execute(messages::delete_link(name))).map_err(failed)?;
                }
                true
            }
            Err(Error::NoNetwork(_)) => false,
            Err(error) => return Err(error),
        };
        self.fabrics.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        netns::remove(&path).map_err(failed)?;
        Ok(existed)
    }

    fn observe(&self, scope: &Scope, query: &Query) -> Result<Observed, Error> {
        let fabric = match scope {
            Scope::Host => None,
            Scope::Fabric(id) => Some(self.fabric(id)?),
        };
        let ns = fabric.as_deref().unwrap_or(&self.host);
        let failed = |what| move |source| Error::Observe { what, scope: scope.clone(), source };
        let mut found = Observed::default();
        if query.objects {
            let mut tables =
                read_tables(&mut ns.socket(), query.only_our_routes).map_err(failed("links and routes"))?;
            self.name_underlays(&mut tables).map_err(failed("underlay devices"))?;
            found = tables.found;
        }
        if !query.sysctls.is_empty() {
            found.sysctls =
                netns::run_in(ns.file.as_fd(), || Ok(sysctl::read(&query.sysctls))).map_err(failed("sysctls"))?;
        }
        if query.fast && self.fast_hook().is_ok() {
            let read = netns::run_in(ns.file.as_fd(), fastpath::read).map_err(failed("fast path"))?;
            found.fast = Some(read);
        }
        if query.table {
            found.table = netns::run_in(ns.file.as_fd(), tools::nft_read).map_err(failed("nft table"))?;
        }
        if query.docker_user {
            found.docker_user =
                netns::run_in(ns.file.as_fd(), || Ok(tools::docker_user_read())).map_err(failed("iptables"))?;
        }
        Ok(found)
    }

    fn forget_connections(&self, scope: &Scope, goes: &(dyn Fn(&Translated) -> bool + Sync)) -> Result<usize, Error> {
        self.run_in(scope, "forget connections", || conntrack::forget(goes))
    }

    fn apply(&self, scope: &Scope, ops: &[Op]) -> Result<(), Error> {
        let fabric = match scope {
            Scope::Host => None,
            Scope::Fabric(id) => Some(self.fabric(id)?),
        };
        let ns = fabric.as_deref().unwrap_or(&self.host);
        let mut run = Run {
            kernel: self,
            host: &self.host,
            ns,
            socket: ns.socket(),
            indices: HashMap::new(),
            batch: Vec::new(),
            failed: BTreeMap::new(),
        };
        let mut at = 0;
        while at < ops.len() {
            let fast = ops[at..].iter().take_while(|op| op.is_fast()).count();
            if fast > 0 {
                run.fast(at, &ops[at..at + fast]);
            } else {
                run.execute(at, &ops[at]);
            }
            at += fast.max(1);
        }
        run.flush();
        if run.failed.is_empty() {
            return Ok(());
        }
        let failures =
            run.failed.into_iter().map(|(index, source)| OpFailure { index, what: ops[index].to_string(), source });
        Err(Error::Apply { scope: scope.clone(), total: ops.len(), failures: OpFailures(failures.collect()) })
    }
}

/// What was to be removed is gone: the goal is reached.
fn forgive(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

fn is_gone(error: &io::Error) -> bool {
    // ESRCH and ENODEV have no kind of their own, and with the kernel's words the number is gone: compare both ways.
    let gone = [Errno::ENOENT, Errno::ESRCH, Errno::ENODEV, Errno::ENXIO, Errno::EADDRNOTAVAIL];
    let text = error.to_string();
    gone.iter().any(|errno| {
        error.raw_os_error() == Some(*errno as i32)
            || text.contains(&io::Error::from_raw_os_error(*errno as i32).to_string())
    })
}

/// One execution of a plan. Small messages gather in `batch` until one that must be alone.
struct Run<'a> {
    kernel: &'a LinuxKernel,
    host: &'a Namespace,
    ns: &'a Namespace,
    socket: MutexGuard<'a, Socket>,
    /// Device indices by name, for this run only: an index is good as long as its device.
    indices: HashMap<String, u32>,
    /// Position, whether a failure because it is gone is fine, request.
    batch: Vec<(usize, bool, Request)>,
    failed: BTreeMap<usize, io::Error>,
}

impl Run<'_> {
    fn note(&mut self, at: usize, result: io::Result<()>) {
        if let Err(error) = result {
            self.failed.entry(at).or_insert(error);
        }
    }

    fn flush(&mut self) {
        let (marks, requests): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.batch).into_iter().map(|(at, removes, request)| ((at, removes), request)).unzip();
        match self.socket.batch(&requests) {
            Ok(failures) => {
                for (nth, error) in failures {
                    let (at, removes) = marks[nth];
                    if !(removes && is_gone(&error)) {
                        self.note(at, Err(error));
                    }
                }
            }
            // Which of them were done is not known; the next observation tells.
            Err(error) => {
                for (at, _) in marks {
                    self.note(at, Err(io::Error::new(error.kind(), error.to_string())));
                }
            }
        }
    }

    fn alone(&mut self, at: usize, work: impl FnOnce(&mut Self) -> io::Result<()>) {
        self.flush();
        let result = work(self);
        self.note(at, result);
    }

    fn index(&mut self, dev: &str) -> io::Result<u32> {
        if let Some(index) = self.indices.get(dev) {
            return Ok(*index);
        }
        let index = link_index(&mut self.socket, dev)?;
        self.indices.insert(dev.to_owned(), index);
        Ok(index)
    }

    /// Queues a request that needs a device's index.
    fn on_dev(&mut self, at: usize, dev: &str, removes: bool, request: impl FnOnce(u32) -> Request) {
        match self.index(dev) {
            Ok(index) => self.batch.push((at, removes, request(index))),
            Err(error) if removes && is_gone(&error) => {}
            Err(error) => self.note(at, Err(error)),
        }
    }

    fn execute(&mut self, at: usize, op: &Op) {
        match op {
            Op::SetSysctl { path, value } => {
                self.alone(at, |run| netns::run_in(run.ns.file.as_fd(), || sysctl::write(path, value)));
            }
            Op::PutTable(table) => self.nft(at, &table.replace_text(&self.kernel.forms(table))),
            Op::PutElements { table, sets } => self.alone(at, |run| {
                netns::run_in(run.ns.file.as_fd(), || {
                    // What was found may not be there any more: then all of it.
                    tools::nft_apply(&table.difference_text(sets))
                        .or_else(|_| tools::nft_apply(&table.elements_text(sets.keys())))
                })
            }),
            Op::AcceptInDockerUser(family, direction) => self
                .alone(at, |run| netns::run_in(run.ns.file.as_fd(), || tools::docker_user_accept(*family, *direction))),
            Op::DeleteLink(name) => self.alone(at, |run| {
                run.indices.remove(name);
                forgive(run.socket.execute(messages::delete_link(name)))
            }),
            Op::CreateVxlan { name, vxlan, mac, mtu } => {
                self.alone(at, |run| run.create_vxlan(name, vxlan, *mac, *mtu));
            }
            Op::CreateVeth { name, mac, mtu, peer } => self.alone(at, |run| {
                run.socket.execute(messages::create_veth(name, *mac, *mtu, peer, run.host.file.as_raw_fd()))
            }),
            Op::SetLink { name, mac, mtu } => self.alone(at, |run| {
                let index = run.index(name)?;
                run.socket.execute(messages::set_link(index, *mac, *mtu))
            }),
            _ => self.queue(at, op),
        }
    }

    /// Queues an operation that is one small message.
    fn queue(&mut self, at: usize, op: &Op) {
        match op {
            Op::AddAddr(dev, addr) => self.on_dev(at, dev, false, |index| messages::address(index, *addr, true)),
            Op::DeleteAddr(dev, addr) => self.on_dev(at, dev, true, |index| messages::address(index, *addr, false)),
            Op::PutNeigh(dev, addr, mac) => {
                self.on_dev(at, dev, false, |index| messages::neighbour(index, *addr, Some(*mac)));
            }
            Op::DeleteNeigh(dev, addr) => self.on_dev(at, dev, true, |index| messages::neighbour(index, *addr, None)),
            Op::PutFdb(dev, mac, vtep) => {
                self.on_dev(at, dev, false, |index| messages::fdb(index, *mac, *vtep, true));
            }
            Op::DeleteFdb(dev, mac, vtep) => {
                self.on_dev(at, dev, true, |index| messages::fdb(index, *mac, *vtep, false));
            }
            Op::PutNexthop(id, hop) => {
                self.on_dev(at, &hop.dev, false, |index| messages::put_nexthop(*id, hop, index));
            }
            Op::DeleteNexthop(id) => self.batch.push((at, true, messages::delete_nexthop(*id))),
            Op::PutRoute { key, route, replace } => match &route.target {
                Target::Dev { dev, .. } => {
                    self.on_dev(at, dev, false, |index| messages::put_route(key, route, Some(index), *replace));
                }
                _ => self.batch.push((at, false, messages::put_route(key, route, None, *replace))),
            },
            Op::DeleteRoute(key, route) => self.batch.push((at, true, messages::delete_route(key, route))),
            // These have to be alone, see `execute` and `fast`.
            Op::AttachFast(..)
            | Op::PutWay(..)
            | Op::DeleteWay(_)
            | Op::PutLocal { .. }
            | Op::DeleteLocal(_)
            | Op::RemoveFast
            | Op::SetSysctl { .. }
            | Op::PutTable(_)
            | Op::PutElements { .. }
            | Op::AcceptInDockerUser(..)
            | Op::DeleteLink(_)
            | Op::CreateVxlan { .. }
            | Op::CreateVeth { .. }
            | Op::SetLink { .. } => {}
        }
    }

    /// Executes operations on the fast path that follow each other, all on one thread in the namespace. A program that is
    /// refused ends the fast path of this fabric, and of the others when they are looked at next.
    fn fast(&mut self, from: usize, ops: &[Op]) {
        self.flush();
        match netns::run_in(self.ns.file.as_fd(), || fastpath::apply(ops)) {
            Ok(failed) => {
                for (nth, error) in failed {
                    if matches!(ops[nth], Op::AttachFast(..)) && fastpath::is_refusal(&error) {
                        self.refuse_fast(&error);
                    }
                    self.note(from + nth, Err(error));
                }
            }
            Err(error) => {
                for nth in 0..ops.len() {
                    self.note(from + nth, Err(io::Error::new(error.kind(), error.to_string())));
                }
            }
        }
    }

    fn refuse_fast(&self, error: &io::Error) {
        if self.kernel.fast_refused.set(format!("the kernel refuses our program: {error}")).is_ok() {
            tracing::warn!(%error, "the kernel refuses the fast path's programs: packets go the routed way");
        }
        if let Err(error) = netns::run_in(self.ns.file.as_fd(), fastpath::remove) {
            tracing::warn!(%error, "failed to remove the fast path");
        }
    }

    fn nft(&mut self, at: usize, text: &str) {
        self.alone(at, |run| netns::run_in(run.ns.file.as_fd(), || tools::nft_apply(text)));
    }

    fn create_vxlan(&mut self, name: &str, vxlan: &Vxlan, mac: Mac, mtu: u32) -> io::Result<()> {
        let mut host = self.host.socket();
        let dev = vxlan.dev.as_deref().map(|dev| link_index(&mut host, dev)).transpose()?;
        host.execute(messages::create_vxlan(name, vxlan, dev, mac, mtu, self.ns.file.as_raw_fd()))
    }
}

fn link_index(socket: &mut Socket, name: &str) -> io::Result<u32> {
    let found = socket.read(&messages::get_link(name))?;
    let link = found.first().map(|(kind, body)| messages::parse_link(*kind, body)).transpose()?.flatten();
    link.map(|found| found.index).ok_or_else(|| io::Error::from_raw_os_error(Errno::ENODEV as i32))
}

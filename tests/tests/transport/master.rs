//! A master on a simulated host: what `skein-master` is made of, less its unix socket.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::Duration,
};

use futures_util::future::BoxFuture;
use skein_master::{
    agents::Agents,
    broker::Broker,
    cluster::{Cluster, Handle},
    config::Config,
    http,
    server::{Connections, Listener, Server},
    store::{EmbeddedStore, Epoch, Revision, Snapshot, Store, StoreError, StoreHealth, Txn, TxnOutcome, Watch},
    tls,
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{disk::Disk, machine::Clock, skew};

/// Port of every master.
pub(crate) const PORT: u16 = 7440;

/// A host that a master may run on.
#[derive(Default)]
pub(crate) struct MasterHost {
    /// Its disk; two hosts may share one, of whom one runs at a time.
    pub(crate) disk: Disk,
    /// Whether writes to the disk hang.
    pub(crate) hangs: watch::Sender<bool>,
    /// Its wall clock.
    pub(crate) clock: Clock,
    /// Whether the host runs a master when it starts; else nobody listens on its port.
    pub(crate) runs: Cell<bool>,
    /// Whether that master is of a newer version.
    pub(crate) newer: Cell<bool>,
    /// To the loop, while it runs.
    pub(crate) handle: RefCell<Option<Handle>>,
    /// SHA-256 of the CA's certificate, once it is known.
    pub(crate) ca_digest: RefCell<String>,
}

/// Runs the master, if the host is to have one, until the host crashes.
pub(crate) async fn run(host: Rc<MasterHost>) -> turmoil::Result {
    host.clock.install();
    if !host.runs.get() {
        return std::future::pending().await;
    }
    let embedded = EmbeddedStore::open_medium(host.disk.medium())?;
    let shutdown = CancellationToken::new();
    let (connections, tasks) = (Connections::default(), TaskTracker::new());
    let store = Arc::new(Still { store: embedded.clone(), hangs: host.hangs.subscribe() });
    let (cluster, handle) = Cluster::start(store, Config::default().settings(), connections.clone()).await?;
    let ca = Arc::new(cluster.ca()?);
    let broker = Broker::default();
    let agents = Agents { cluster: handle.clone(), ca: ca.clone(), broker: broker.clone(), tasks: tasks.clone() };
    let api = http::Api::new(handle.clone(), ca.clone(), broker, embedded, tasks.clone());
    let router = if host.newer.get() { skew::newer(agents) } else { http::router(api, agents) };
    let server = Server::new(router, shutdown.clone(), tasks, connections);
    let resolver = Arc::new(tls::Resolver::new(&ca, &[])?);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls::server_config(&ca, resolver)?));
    server.listen_tls(Net::bind().await?, acceptor);
    host.ca_digest.replace(ca.digest());
    host.handle.replace(Some(handle));
    tokio::spawn(cluster.run(shutdown)).await?;
    Err("the loop ended by itself".into())
}

/// The simulated network, for a server.
pub(crate) struct Net(turmoil::net::TcpListener);

impl Net {
    /// Listens on every address of the host.
    pub(crate) async fn bind() -> io::Result<Self> {
        turmoil::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await.map(Self)
    }
}

impl Listener for Net {
    type Stream = turmoil::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, SocketAddr)> {
        self.0.accept().await
    }
}

/// The store, in a simulation: it has a thread and a disk of its own, and simulated time stands still while they work.
struct Still {
    store: EmbeddedStore,
    /// Whether writes hang, as on a disk that does not answer.
    hangs: watch::Receiver<bool>,
}

/// Runs a future to its end on the calling thread, which does nothing else meanwhile: no other thread's pace is seen by
/// the simulation.
fn stand_still<'a, T: Send + 'a>(work: impl Future<Output = T> + Send) -> BoxFuture<'a, T> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Box::pin(std::future::ready(done));
        }
        std::thread::park();
    }
}

impl Store for Still {
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        let mut hangs = self.hangs.clone();
        Box::pin(async move {
            hangs.wait_for(|hangs| !hangs).await.expect("the host outlives its master");
            stand_still(self.store.txn(txn)).await
        })
    }

    fn snapshot(&self) -> BoxFuture<'_, Result<Snapshot, StoreError>> {
        stand_still(self.store.snapshot())
    }

    fn watch(&self, from: Revision) -> Watch {
        self.store.watch(from)
    }

    fn lead(&self, name: &str, ttl: Duration) -> BoxFuture<'_, Result<Epoch, StoreError>> {
        stand_still(self.store.lead(name, ttl))
    }

    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        stand_still(self.store.resign(epoch))
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        stand_still(self.store.reopen())
    }

    fn health(&self) -> watch::Receiver<StoreHealth> {
        self.store.health()
    }
}

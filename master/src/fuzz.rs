//! A small cluster for fuzz targets: the real loop, store and router over memory, the same for every input.
//!
//! Three nodes with sessions, a network, a token, a stack of two services and a container. Each [`World`] starts from one
//! image of a store, so an input depends on nothing that ran before it. Runs on the calling thread, but for the store's
//! writer.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use axum::{Router, body::Body};
use http::Request;
use master_core::{Command, Context, Core, Now, Reply, Settings, model::Object};
use redb::StorageBackend;
use serde_json::json;
use skein_api::{NodeDescription, NodeId, Origin, Resources, TokenId, UnixMillis};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::{
    agents::Agents,
    broker::Broker,
    cluster::{Cluster, Handle, SessionOpen, SessionTx},
    http::{Api, router},
    pki::{self, Identity},
    server::{ConnInfo, Connections},
    store::{EmbeddedStore, Key, Op, Store as _, Txn, TxnOutcome, medium::Medium},
};

/// Names of the nodes.
pub(crate) const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// Room for what the master tells an agent that does not listen: more than one input makes it say.
const SESSION_ROOM: usize = 64;

/// How long a request waits for a stream that nobody opens.
const STREAM_PATIENCE: Duration = Duration::from_millis(20);

/// A file in memory.
#[derive(Clone, Debug, Default)]
struct Image(Arc<Mutex<Vec<u8>>>);

impl Image {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().expect("nobody panics while holding this lock")
    }

    fn range(&self, offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        Ok(start..start + length)
    }
}

impl StorageBackend for Image {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let range = self.range(offset, out.len())?;
        out.copy_from_slice(self.bytes().get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes().resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        self.bytes().get_mut(range).ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(data);
        Ok(())
    }
}

/// A store's storage in memory.
#[derive(Debug)]
struct InMemory {
    image: Image,
    is_there: bool,
}

impl Medium for InMemory {
    type Backend = Image;

    fn existing(&mut self) -> io::Result<Option<Image>> {
        Ok(self.is_there.then(|| self.image.clone()))
    }

    fn scratch(&mut self) -> io::Result<Image> {
        Ok(self.image.clone())
    }

    fn publish(&mut self) -> io::Result<()> {
        self.is_there = true;
        Ok(())
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}

/// The cluster that every input meets, as objects.
pub(crate) fn objects() -> Vec<Object> {
    let mut core = Core::load(Settings::default(), Vec::new(), Now::default());
    let mut step = 0;
    let mut run = |core: &mut Core, command: Command| {
        step += 1;
        let now = Now { wall: UnixMillis(1_700_000_000_000), mono_ms: step };
        let ctx = Context { now, origin: Origin::default(), seed: step };
        let reply = core.execute(&command, &ctx).unwrap_or_else(|e| panic!("{command:?}: {}", e.message));
        core.settle(now, step);
        reply
    };
    let (ca_certificate_pem, ca_key_pem) = pki::new_ca("fuzz").expect("a CA can be made");
    let cluster =
        master_core::model::Cluster { id: "fuzz".into(), ca_certificate_pem, ca_key_pem, ..Default::default() };
    run(&mut core, Command::InitCluster(Box::new(cluster)));
    let request = serde_json::from_value(json!({ "uses": 9, "ttl_s": 3_600 })).expect("a token's request");
    let (token, secret_sha256) = (TokenId::new("0123456789ab"), pki::sha256_hex(b"secret"));
    run(&mut core, Command::TokenCreate { id: token.clone(), secret_sha256: secret_sha256.clone(), request });
    for (at, name) in NODES.iter().enumerate() {
        let description = NodeDescription {
            hostname: (*name).to_owned(),
            offered: Resources { nano_cpus: 4_000_000_000, mem_bytes: 8 << 30 },
            underlay4: Some([10, 0, 0, at as u8 + 1].into()),
            os: "linux".into(),
            arch: "x86_64".into(),
            ..NodeDescription::default()
        };
        let join = Command::Join {
            token: token.clone(),
            secret_sha256: secret_sha256.clone(),
            key_digest: format!("key of {name}"),
            description: Box::new(description),
            clock: UnixMillis(1_700_000_000_000),
        };
        let Reply::Node(id) = run(&mut core, join) else { panic!("a join answers with a node") };
        core.session_opened(&id, Now { wall: UnixMillis(1_700_000_000_000), mono_ms: 100 });
    }
    let network = serde_json::from_value(json!({ "name": "lan", "attachable": true })).expect("a network");
    run(&mut core, Command::NetworkCreate(network));
    let stack = serde_json::from_value(json!({ "stack": { "name": "shop", "external_networks": ["lan"], "services": [
        { "name": "shop_web", "short_name": "web", "stack": "shop", "mode": { "replicated": 3 }, "task": {
            "container": { "image": "nginx" }, "networks": [{ "network": "lan" }] } },
        { "name": "shop_log", "short_name": "log", "stack": "shop", "mode": "global", "task": {
            "container": { "image": "log" } } } ] } }));
    run(&mut core, Command::StackApply(Box::new(stack.expect("a stack"))));
    let container =
        json!({ "name": "tool", "spec": { "container": { "image": "tool" }, "networks": [{ "network": "lan" }] } });
    run(&mut core, Command::ContainerCreate(Box::new(serde_json::from_value(container).expect("a container"))));
    assert_eq!(core.check(), Vec::<String>::new());
    let placed = core.model().tasks.values().filter(|t| t.node.is_some()).count();
    assert_eq!(placed, 7, "every task of the small cluster has a node");
    core.model().objects()
}

/// A closed store with [`objects`].
fn store_image() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let image = Image::default();
        let medium = InMemory { image: image.clone(), is_there: false };
        runtime().block_on(async {
            let store = EmbeddedStore::open_medium(medium).expect("a store in memory opens");
            let epoch = store.lead("fuzz", Duration::from_secs(1)).await.expect("nobody else leads");
            let put =
                |o: Object| Op::Put { key: Key::new(o.key().kind.as_str(), o.key().id), value: o.encode().into() };
            let txn = Txn { epoch, guards: Vec::new(), ops: objects().into_iter().map(put).collect() };
            let outcome = store.txn(txn).await.expect("a store in memory writes");
            assert!(matches!(outcome, TxnOutcome::Committed(_)), "{outcome:?}");
            store.resign(epoch).await.expect("we lead");
            store.close().await.expect("a store in memory closes");
        });
        image.bytes().to_vec()
    })
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made")
}

/// A master on the small cluster.
pub(crate) struct World {
    runtime: Runtime,
    /// The loop.
    pub(crate) handle: Handle,
    router: Router,
    shutdown: CancellationToken,
}

impl World {
    /// A fresh one, with a session of each node.
    pub(crate) fn new() -> Self {
        let image = Image(Arc::new(Mutex::new(store_image().to_vec())));
        let runtime = runtime();
        let shutdown = CancellationToken::new();
        let (handle, router) = runtime.block_on(async {
            let medium = InMemory { image, is_there: true };
            let store = EmbeddedStore::open_medium(medium).expect("a store in memory opens");
            let started = Cluster::start(Arc::new(store.clone()), Settings::default(), Connections::default()).await;
            let (cluster, handle) = started.expect("the loop starts");
            let ca = Arc::new(cluster.ca().expect("the store has a CA"));
            let (broker, tasks) = (Broker::default(), TaskTracker::new());
            let agents =
                Agents { cluster: handle.clone(), ca: ca.clone(), broker: broker.clone(), tasks: tasks.clone() };
            let api = Api::new(handle.clone(), ca.clone(), broker, store, tasks);
            tokio::spawn(cluster.run(shutdown.clone()));
            (handle, router(api, agents))
        });
        let world = Self { runtime, handle, router, shutdown };
        for name in NODES {
            world.open_session(name);
        }
        world
    }

    /// Waits for something of this master.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Reads the state.
    pub(crate) fn read<T: Send + 'static>(&self, read: impl FnOnce(&Core) -> T + Send + 'static) -> T {
        self.wait(self.handle.query(read)).expect("the loop is alive")
    }

    /// The id of a node.
    pub(crate) fn node(&self, name: &str) -> NodeId {
        let name = name.to_owned();
        self.read(move |core| core.model().find_node(&name).expect("a node of the small cluster").id.clone())
    }

    /// A new session of a node: its number, and the way to its agent.
    pub(crate) fn open_session(&self, name: &str) -> (u64, SessionTx) {
        let (tx, mut rx) = mpsc::channel(SESSION_ROOM);
        let node = self.node(name);
        // An agent that takes what it is told.
        self.runtime.spawn(async move { while rx.recv().await.is_some() {} });
        let cancel = CancellationToken::new();
        let session = SessionOpen { node, tx: tx.clone(), cancel, chain: String::new(), generation: 0 };
        (self.wait(self.handle.session_open(session)).expect("the loop is alive"), tx)
    }

    /// What the local operator is answered: status and body.
    pub(crate) fn request(&self, method: &str, path: &str, body: Vec<u8>) -> Option<(u16, Vec<u8>)> {
        let info = ConnInfo { identity: Identity::Local(0), cancel: CancellationToken::new() };
        let request = Request::builder().method(method).uri(path).extension(info).body(Body::from(body)).ok()?;
        // Logs and what is told of networks come from agents, and here none opens a stream; the master would wait for it.
        let of_agent = path.contains("/logs") || path.contains("/net/");
        let patience = if of_agent { STREAM_PATIENCE } else { Duration::MAX };
        self.wait(async {
            let answered = tokio::time::timeout(patience, self.router.clone().oneshot(request)).await;
            let response = answered.ok()?.expect("the router always answers");
            let status = response.status().as_u16();
            // Events go on for ever.
            if response.headers().get("content-type").is_some_and(|v| v == "text/event-stream") {
                return Some((status, Vec::new()));
            }
            let body = axum::body::to_bytes(response.into_body(), usize::MAX).await;
            Some((status, body.expect("a body of this process comes whole").to_vec()))
        })
    }

    /// Every invariant holds, and the loop is alive to say so.
    pub(crate) fn check(&self) {
        assert_eq!(self.read(Core::check), Vec::<String>::new());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

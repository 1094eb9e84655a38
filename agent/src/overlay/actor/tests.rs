//! The actor without a kernel: what it remembers when the disk refuses, and what it holds.

use std::sync::Mutex;

use skein_api::Protocol as Transport;

use super::*;
use crate::{
    dns::{UpstreamSource, zone::tests::network},
    overlay::{ClaimError, OverlayHandle, store::DirStore},
    plugin::wire::Request,
};

/// A disk that refuses documents of this prefix.
struct Faulty {
    dir: DirStore,
    refuse: Mutex<Option<&'static str>>,
}

impl LocalStore for Faulty {
    fn load(&self, prefix: &str) -> Result<BTreeMap<String, String>, StoreError> {
        self.dir.load(prefix)
    }

    fn write(&self, change: &Change) -> Result<(), StoreError> {
        let refused = self.refuse.lock().unwrap().is_some_and(|prefix| change.key().starts_with(prefix));
        if refused && matches!(change, Change::Put(..)) {
            let source = std::io::Error::from_raw_os_error(nix::errno::Errno::ENOSPC as i32);
            return Err(StoreError::Write { key: change.key().to_owned(), path: "/disk".into(), source });
        }
        self.dir.write(change)
    }
}

struct World {
    _dir: tempfile::TempDir,
    disk: Arc<Faulty>,
    actor: Actor,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::try_open(dir.path().join("network")).unwrap();
        let ours = network(1, "shop", false);
        let json = serde_json::to_string(&ours).unwrap();
        store.write(&Change::Put("overlay/network/net1".into(), json)).unwrap();
        let disk = Arc::new(Faulty { dir: store, refuse: Mutex::default() });
        Self { actor: Self::load(&dir, &disk), _dir: dir, disk }
    }

    fn load(dir: &tempfile::TempDir, disk: &Arc<Faulty>) -> Actor {
        let config = OverlayConfig {
            underlay4: None,
            underlay6: None,
            vxlan_port: 4789,
            fast_path: true,
            netns_dir: dir.path().join("netns"),
            state_dir: dir.path().to_owned(),
        };
        let dns = DnsServer::new(UpstreamSource::Fixed(vec![]));
        Actor::load(config, disk.clone(), dns, FdStore::default(), Arc::default()).unwrap()
    }

    fn refuse(&self, prefix: Option<&'static str>) {
        *self.disk.refuse.lock().unwrap() = prefix;
    }

    fn troubles(&self) -> Vec<String> {
        self.actor.shared.troubles.borrow().clone()
    }

    async fn endpoint(&mut self, id: &str, mac: &str, task: Option<&str>) -> Result<(), String> {
        let pool = "skein/net1/4".to_owned();
        let address = Request::RequestAddress { pool, address: String::new(), gateway: false, mac: Some(mac.into()) };
        let crate::plugin::wire::Reply::Address { address, .. } = self.actor.plugin_request(address).await? else {
            panic!("an address")
        };
        let create = Request::CreateEndpoint {
            engine_network: "e1".into(),
            endpoint: id.into(),
            address,
            address6: String::new(),
            mac: mac.into(),
            task: task.map(str::to_owned),
        };
        self.actor.plugin_request(create).await.map(drop)
    }

    async fn engine_network(&mut self) {
        let create = Request::CreateNetwork {
            engine_network: "e1".into(),
            network: Some("net1".into()),
            internal: false,
            pools: vec![],
        };
        self.actor.plugin_request(create).await.unwrap();
    }
}

const MAC: &str = "02:42:00:00:00:01";

#[tokio::test]
async fn what_the_disk_refuses_was_never_there() {
    let mut w = World::new();
    w.engine_network().await;
    let net = NetworkId::new("net1");
    w.refuse(Some("plugin/endpoint/"));
    let error = w.endpoint("p1", MAC, None).await.unwrap_err();
    assert!(error.contains("failed to write local state plugin/endpoint/p1"), "{error}");
    assert!(w.actor.plugin.endpoints().is_empty() && !w.actor.plugin.uses(&net), "the network can go");
    assert!(w.troubles()[0].contains("No space left"), "{:?}", w.troubles());

    w.refuse(Some("lease/"));
    let before = w.actor.leases.clone();
    assert!(w.endpoint("p2", "02:42:00:00:00:02", None).await.is_err());
    assert_eq!(w.actor.leases, before, "a refused address is free");
    let task = TaskId::new("t1");
    for _ in 0..2 {
        let refused = w.actor.reserve(&task, &net, None).await;
        assert!(matches!(refused, Err(OverlayError::Store(_))), "also when it is asked again: {refused:?}");
    }
    assert_eq!(w.actor.leases, before);

    w.refuse(None);
    w.endpoint("p1", MAC, None).await.unwrap();
    w.actor.reserve(&task, &net, None).await.unwrap();
    assert_eq!(w.troubles(), Vec::<String>::new(), "said no longer");
}

#[tokio::test]
async fn what_was_taken_down_is_taken_from_the_disk_later() {
    let mut w = World::new();
    let net = network(1, "shop", false);
    let (task, key) = (TaskId::new("t1"), "lease/net1/10.1.1.0");
    w.actor.reserve(&task, &net.id, None).await.unwrap();
    w.refuse(Some("lease/"));
    let changes = w.actor.leases.release(&task, |_, _| false);
    w.actor.persist_or_warn(changes).await;
    assert!(w.disk.load("lease/").unwrap()[key].contains("task"));
    w.refuse(None);
    w.actor.write_behind().await;
    assert!(w.disk.load("lease/").unwrap()[key].contains("released"));
    assert!(w.actor.behind.is_empty() && w.troubles().is_empty());
}

#[tokio::test]
async fn a_container_whose_endpoint_is_damaged_keeps_its_network() {
    let mut w = World::new();
    w.engine_network().await;
    w.endpoint("p1", MAC, None).await.unwrap();
    w.disk.write(&Change::Put("plugin/endpoint/p1".into(), "{\"network\":".into())).unwrap();
    w.actor = World::load(&w._dir, &w.disk);
    let net = NetworkId::new("net1");
    assert!(w.troubles()[0].contains("local state plugin/endpoint/p1 is damaged"), "{:?}", w.troubles());
    assert!(w.actor.uses(&net), "the network stays when the master takes it away");
    let vtep = "192.0.2.1".parse().unwrap();
    let links = |a: &Actor| {
        let (state, _) = desired::network(&a.known[&net], &[], (&a.plugin, &a.draining), &a.leases, vtep).unwrap();
        state.endpoints.into_values().map(|e| e.mac.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(links(&w.actor), [MAC], "its link is wanted");
    w.actor.plugin_request(Request::DeleteEndpoint { endpoint: "p1".into() }).await.unwrap();
    assert_eq!((links(&w.actor), w.troubles()), (vec![], vec![]));
    assert!(!w.disk.load("plugin/").unwrap().contains_key("plugin/endpoint/p1"));
}

#[tokio::test]
async fn a_chosen_port_is_the_tasks_until_it_is_released() {
    let mut w = World::new();
    w.engine_network().await;
    let (t1, t2) = (TaskId::new("t1"), TaskId::new("t2"));
    let open = PortBinding { proto: netlib::Proto::Tcp, host_ip: None, host_port: 0, host_port_end: 0, port: 80 };
    let fixed = PortBinding { host_port: 8080, host_port_end: 8080, port: 81, ..open.clone() };
    let wanted = [open.clone(), fixed.clone()];
    let first = w.actor.choose_ports(t1.clone(), &wanted, &BTreeSet::new()).unwrap();
    assert_eq!(first[1], fixed);
    let avoid = BTreeSet::from([(netlib::Proto::Tcp, first[0].host_port + 1)]);
    let second = w.actor.choose_ports(t2, &wanted[..1], &avoid).unwrap();
    assert!(second[0].host_port > first[0].host_port + 1, "neither the first task's nor one to avoid");
    assert_eq!(w.actor.choose_ports(t1.clone(), &wanted, &avoid).unwrap(), first, "asked again");
    assert!(std::net::TcpListener::bind(("0.0.0.0", first[0].host_port)).is_err(), "it is held");

    w.endpoint("p1", MAC, None).await.unwrap();
    w.actor.applied = true;
    let publish = Request::Publish { endpoint: "p1".into(), ports: vec![first[0].clone()] };
    let refused = w.actor.plugin_request(publish).await.unwrap_err();
    assert!(refused.contains("is kept for task t1"), "{refused}");
    let (reply, _answer) = tokio::sync::oneshot::channel();
    w.actor.message(Message::Release { task: t1, reply }).await;
    assert!(std::net::TcpListener::bind(("0.0.0.0", first[0].host_port)).is_ok(), "it is free");
}

#[tokio::test]
async fn ports_of_every_host_are_held_here_unless_somebody_has_them() {
    let mut w = World::new();
    w.engine_network().await;
    // Two that are free, as far as can be known, and one that a program has.
    let listeners = [0; 3].map(|_| std::net::TcpListener::bind("0.0.0.0:0").unwrap());
    let ports = listeners.each_ref().map(|l| l.local_addr().unwrap().port());
    let [first, second, taken] = listeners;
    drop((first, second));
    let port = |published| skein_api::IngressPort { protocol: Transport::Tcp, published, target: 80 };
    let web = crate::dns::zone::tests::service(1, "web", 200);
    w.actor.services = vec![ServiceAssignment { ports: ports.map(port).to_vec(), ..web.clone() }];
    let changes = w.actor.reserve_own();
    assert_eq!(changes.len(), 1);
    w.actor.persist_or_warn(changes).await;
    w.actor.hold_ports();
    let net = NetworkId::new("net1");
    let ingress = &w.actor.ingress[&net];
    let led: Vec<u16> = ingress.ports.keys().map(|(_, port)| *port).collect();
    assert_eq!(led, BTreeSet::from([ports[0], ports[1]]).into_iter().collect::<Vec<_>>());
    assert_eq!(w.disk.load("lease/").unwrap()[&format!("lease/net1/{}", ingress.addr4)], r#"{"holder":"host"}"#);
    let said = format!(
        "port {}/tcp of service web does not lead there from this host: port {0}/tcp of this host is in use",
        ports[2]
    );
    assert!(w.troubles()[0].contains(&said), "{:?}", w.troubles());
    assert!(std::net::TcpListener::bind(("0.0.0.0", ports[0])).is_err(), "it is held");

    // No container gets one of them; it goes on where it was with the next look.
    w.endpoint("p1", MAC, None).await.unwrap();
    w.actor.applied = true;
    let binding =
        |port| PortBinding { proto: netlib::Proto::Tcp, host_ip: None, host_port: port, host_port_end: port, port: 80 };
    let publish = Request::Publish { endpoint: "p1".into(), ports: vec![binding(ports[0])] };
    let refused = w.actor.plugin_request(publish).await.unwrap_err();
    assert!(refused.contains("of every host belongs to service web"), "{refused}");
    drop(taken);
    w.actor.hold_ports();
    assert_eq!((w.actor.ingress[&net].ports.len(), w.troubles()), (3, vec![]));
    assert_eq!(w.actor.reserve_own(), [], "the address stays");

    // Withdrawn: free for others, and nothing leads in.
    w.actor.services = vec![web];
    w.actor.hold_ports();
    assert!(w.actor.ingress[&net].ports.is_empty() && std::net::TcpListener::bind(("0.0.0.0", ports[0])).is_ok());
}

#[tokio::test]
async fn the_executors_ports_are_chosen_by_the_overlay() {
    use crate::executor::NetworkSide;
    let dir = tempfile::tempdir().unwrap();
    let config = OverlayConfig {
        underlay4: None,
        underlay6: None,
        vxlan_port: 4789,
        fast_path: true,
        netns_dir: dir.path().join("netns"),
        state_dir: dir.path().to_owned(),
    };
    let store = Arc::new(config.open_store().unwrap());
    let (handle, _task) =
        OverlayHandle::try_start(config, store, UpstreamSource::Fixed(vec![]), FdStore::default()).unwrap();
    let mut task = skein_api::TaskAssignment { id: TaskId::new("t1"), ..Default::default() };
    let publish = skein_api::PortPublish { protocol: Transport::Udp, container_port: 53, host_port: 0, host_ip: None };
    task.spec.ports = vec![publish];
    let chosen = NetworkSide::choose_ports(&handle, &task, &BTreeSet::new()).await.unwrap().unwrap();
    assert!(crate::executor::HOST_PORT_RANGE.contains(&chosen[0].host_port));
    let error: OverlayError = ClaimError::NoneFree { first: 1, last: 2, proto: netlib::Proto::Udp }.into();
    assert_eq!(error.to_string(), "no port from 1 to 2/udp of this host is free");
}

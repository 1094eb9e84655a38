//! The agent's engine driver, executor and streams against a real engine, one lab host each.
//!
//! The network side is a small one that uses the engine's own bridge driver, so that everything here holds without
//! an overlay.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use skein_agent::{
    engine::{Engine, EngineConfig, EngineNetworkSpec, EngineState},
    executor::{CancellationToken, Executor, ExecutorHandle, NetworkSide, Settings},
    ledger::{AssignmentChange, Ledger, LedgerError, LedgerState},
    streams::{FRAMES_BUFFERED, Frame, serve},
};
use skein_api::{
    Assignment, ContainerSpec, ExecOptions, Health, Healthcheck, LogOptions, Mount, MountKind, NetworkAssignment,
    NetworkId, PortPublish, Protocol, Resources, RestartCondition, RestartPolicy, ServiceId, StreamRequest,
    TaskAddress, TaskAssignment, TaskId, TaskReport, TaskSpec, TaskState,
};
use tokio::{sync::mpsc, task::JoinHandle};
use xtask::lab::{Host, Lab, LabSpec, wait_for};

/// Far more than anything here takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Networks of the engine's bridge driver, 10.<200 + n>.0.0/24; addresses from .10 on, sticky.
#[derive(Default)]
struct Bridges {
    networks: Vec<NetworkAssignment>,
    leases: Mutex<BTreeMap<(TaskId, NetworkId), u8>>,
}

impl Bridges {
    fn new(count: u8) -> Self {
        let of = |n: u8| NetworkAssignment {
            id: NetworkId::new(format!("net{n}")),
            name: format!("bridge{n}"),
            vni: 1,
            subnet4: format!("10.{}.0.0/24", 200 + n).parse().expect("a subnet"),
            subnet6: format!("fd00:{n}::/64").parse().expect("a subnet"),
            gateway4: [10, 200 + n, 0, 1].into(),
            gateway6: format!("fd00:{n}::1").parse().expect("an address"),
            mtu: 1450,
            internal: false,
            attachable: true,
            host_index: 1,
            blocks: vec![],
            frozen: Vec::new(),
        };
        Self { networks: (1..=count).map(of).collect(), ..Default::default() }
    }
}

impl NetworkSide for Bridges {
    async fn engine_network(&self, network: &NetworkId) -> Option<EngineNetworkSpec> {
        let network = self.networks.iter().find(|n| n.id == *network)?;
        let mut spec = EngineNetworkSpec::overlay(network);
        spec.driver = "bridge".into();
        spec.ipam_driver = "default".into();
        spec.options.clear();
        Some(spec)
    }

    async fn reserve(&self, task: &TaskAssignment, network: &NetworkId) -> Result<TaskAddress, String> {
        let index = self.networks.iter().position(|n| n.id == *network).ok_or("no such network")?;
        let mut leases = self.leases.lock().expect("nothing panics here");
        let next = (10..250).find(|a| !leases.iter().any(|((_, n), l)| n == network && l == a)).ok_or("full")?;
        let lease = *leases.entry((task.id.clone(), network.clone())).or_insert(next);
        let v4 = Ipv4Addr::new(10, 201 + u8::try_from(index).expect("few"), 0, lease);
        Ok(TaskAddress { network: network.clone(), v4: Some(v4), v6: None })
    }

    async fn release(&self, task: &TaskId) {
        self.leases.lock().expect("nothing panics here").retain(|(t, _), _| t != task);
    }

    fn dns_servers(&self, networks: &[NetworkId]) -> Vec<IpAddr> {
        if networks.is_empty() { vec![] } else { vec![[10, 99, 0, 1].into()] }
    }

    async fn ready(&self, _task: &TaskId) -> Result<(), String> {
        Ok(())
    }
}

/// An agent without a master: the test writes its ledger.
struct Agent {
    engine: Engine,
    ledger: Ledger,
    network: Arc<Bridges>,
    handle: ExecutorHandle,
    running: JoinHandle<()>,
}

impl Agent {
    fn start(host: &Host, dir: &Path, network: Arc<Bridges>) -> Self {
        Self::start_with(host, dir, network, Settings::default())
    }

    fn start_with(host: &Host, dir: &Path, network: Arc<Bridges>, settings: Settings) -> Self {
        let engine = Engine::new(EngineConfig::new(host.engine_socket(), "cluster1", "node1"));
        // An agent that was "killed" inside this process may still have a write on the blocking pool.
        let open = || match Ledger::open(dir) {
            Err(LedgerError::Locked { .. }) => Ok(None),
            opened => Ok(Some(opened?)),
        };
        let ledger = wait_for("the ledger unlocked", PATIENCE, open).expect("the ledger opens");
        let (executor, handle) = Executor::new(engine.clone(), ledger.clone(), network.clone(), settings);
        let running = tokio::spawn(executor.run(CancellationToken::new()));
        Self { engine, ledger, network, handle, running }
    }

    /// As `kill -9`: nothing is finished, nothing is flushed.
    async fn kill(self) -> Arc<Bridges> {
        self.running.abort();
        let _ = self.running.await;
        self.network
    }

    /// Makes these the only assignments.
    fn assign(&self, tasks: impl IntoIterator<Item = TaskAssignment>) {
        let networks = self.network.networks.iter().cloned().map(Assignment::Network);
        let upserts = networks.chain(tasks.into_iter().map(|t| Assignment::Task(Box::new(t)))).collect();
        let generation = self.ledger.head().generation + 1;
        let change = AssignmentChange { chain: "m".into(), full: true, generation, upserts, ..Default::default() };
        self.ledger.apply(change).expect("the disk takes it");
    }

    fn report(&self, task: &str) -> Option<TaskReport> {
        self.handle.reports().pending().into_iter().find(|r| r.task.as_str() == task)
    }

    async fn reaches(&self, task: &str, run: u64, state: TaskState) -> TaskReport {
        let what = format!("task {task} in run {run} {state:?}");
        let seen = || self.report(task).filter(|r| r.run == run && r.status.state == state);
        until(&what, || format!("{:#?} {:#?}", self.report(task), self.handle.status().borrow()), seen).await
    }

    async fn settled(&self) {
        let mut status = self.handle.status();
        let before = status.borrow().rounds;
        self.handle.wake();
        let settled = status.wait_for(|s| s.settled && s.rounds > before);
        tokio::time::timeout(PATIENCE, settled).await.expect("settles in time").expect("the executor runs");
    }

    async fn stream(&self, request: StreamRequest, input: Vec<Frame>) -> Vec<Frame> {
        let (input_tx, input_rx) = mpsc::channel(FRAMES_BUFFERED);
        let (output_tx, mut output_rx) = mpsc::channel(FRAMES_BUFFERED);
        let engine = self.engine.clone();
        let serving = tokio::spawn(async move { serve(&engine, request, input_rx, output_tx).await });
        for frame in input {
            input_tx.send(frame).await.expect("is read");
        }
        let mut frames = Vec::new();
        while let Some(frame) = tokio::time::timeout(PATIENCE, output_rx.recv()).await.expect("ends in time") {
            frames.push(frame);
        }
        serving.await.expect("does not panic");
        frames
    }

    async fn exec(&self, task: &str, argv: &[&str], stdin: Option<&[u8]>) -> (String, String, Frame) {
        let options = ExecOptions {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            stdin: stdin.is_some(),
            ..Default::default()
        };
        let request = StreamRequest::Exec { task: TaskId::new(task), options };
        let input = stdin.map_or_else(Vec::new, |b| vec![Frame::Stdin(b.to_vec().into()), Frame::StdinClosed]);
        split(self.stream(request, input).await)
    }

    async fn logs(&self, task: &str, options: LogOptions) -> (String, String, Frame) {
        let request = StreamRequest::Logs { task: TaskId::new(task), options };
        split(self.stream(request, vec![]).await)
    }
}

fn split(mut frames: Vec<Frame>) -> (String, String, Frame) {
    let last = frames.pop().expect("there is a last frame");
    let (mut out, mut err) = (Vec::new(), Vec::new());
    for frame in frames {
        match frame {
            Frame::Stdout(bytes) => out.extend_from_slice(&bytes),
            Frame::Stderr(bytes) => err.extend_from_slice(&bytes),
            other => panic!("{other:?} is not output"),
        }
    }
    let text = |bytes| String::from_utf8(bytes).expect("is text");
    (text(out), text(err), last)
}

async fn until<T>(what: &str, state: impl Fn() -> String, mut seen: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = seen() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} was not seen in time: {}", state());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn lab(name: &str) -> Lab {
    let lab = Lab::up(LabSpec::new(name, 1)).unwrap_or_else(|e| panic!("{e:#}"));
    lab.image("busybox").unwrap_or_else(|e| panic!("{e:#}"));
    lab
}

fn task(id: &str, script: &str) -> TaskAssignment {
    TaskAssignment {
        id: TaskId::new(id),
        name: format!("{id}-name"),
        desired_state: TaskState::Running,
        run: 1,
        spec: TaskSpec {
            container: ContainerSpec {
                image: "busybox".into(),
                command: Some(vec!["sh".into(), "-c".into(), script.into()]),
                stop_grace_ms: Some(1_000),
                ..Default::default()
            },
            restart: RestartPolicy { condition: RestartCondition::None, ..Default::default() },
            ..Default::default()
        },
        ..Default::default()
    }
}

fn service(id: &str, script: &str) -> TaskAssignment {
    TaskAssignment { service: Some(ServiceId::new(format!("s-{id}"))), slot: 1, ..task(id, script) }
}

/// Sleeps for ever and ends at once when it is asked to.
const WAIT: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

/// The engine's ids and start times: equal before and after means that nothing was touched.
fn fingerprint(host: &Host) -> BTreeSet<String> {
    let ids = host.docker(&["ps", "-aq", "--no-trunc"]).expect("docker ps");
    ids.lines()
        .map(|id| {
            host.docker(&["inspect", "-f", "{{.Id}} {{.State.StartedAt}} {{.State.Pid}}", id]).expect("docker inspect")
        })
        .collect()
}

fn inspect(host: &Host, name: &str) -> Value {
    let text = host.docker(&["inspect", name]).expect("docker inspect");
    serde_json::from_str::<Value>(&text).expect("is JSON")[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_are_made_adopted_and_removed() {
    let lab = lab("engine-life");
    let host = lab.host("h1");
    host.docker(&["run", "-d", "--name", "foreign", "busybox", "sleep", "1000"]).expect("a foreign container runs");
    let dir = tempfile::tempdir().expect("a directory");
    let agent = Agent::start(host, dir.path(), Arc::new(Bridges::new(2)));

    let mut web = service("web", WAIT);
    web.networks = agent.network.networks.iter().map(|n| n.id.clone()).collect();
    web.spec.ports = vec![PortPublish { protocol: Protocol::Tcp, container_port: 80, host_port: 0, host_ip: None }];
    web.spec.resources.limits = Resources { nano_cpus: 500_000_000, mem_bytes: 64 << 20 };
    web.spec.container.env = BTreeMap::from([("GREETING".into(), Some("hello world".into()))]);
    let mut data = task("data", WAIT);
    data.spec.container.mounts = vec![Mount {
        kind: MountKind::Volume,
        source: Some("shop_data".into()),
        target: "/data".into(),
        read_only: false,
        tmpfs_size_bytes: None,
        volume_driver: None,
    }];
    let user = TaskAssignment { volumes_from: vec![(TaskId::new("data"), true)], ..task("user", WAIT) };
    agent.assign([web.clone(), data.clone(), user.clone()]);
    for id in ["web", "data", "user"] {
        agent.reaches(id, 1, TaskState::Running).await;
    }
    agent.settled().await;

    let status = agent.report("web").expect("is reported").status;
    assert_eq!(
        status.addresses.iter().filter_map(|a| a.v4).collect::<Vec<_>>(),
        [Ipv4Addr::new(10, 201, 0, 10), Ipv4Addr::new(10, 202, 0, 10)]
    );
    assert!((32_768..=60_999).contains(&status.ports[0].host_port), "{:?}", status.ports);
    let seen = inspect(host, "web-name.web");
    assert_eq!(seen["HostConfig"]["RestartPolicy"]["Name"], "no");
    assert_eq!(seen["HostConfig"]["LogConfig"]["Config"]["max-size"], "10m");
    assert_eq!(
        (&seen["HostConfig"]["Memory"], &seen["HostConfig"]["NanoCpus"]),
        (&(64 << 20).into(), &500_000_000.into())
    );
    assert_eq!(seen["HostConfig"]["Dns"][0], "10.99.0.1");
    assert_eq!(seen["Config"]["Labels"]["io.skein.cluster"], "cluster1");
    assert_eq!(seen["NetworkSettings"]["Networks"]["bridge1"]["IPAddress"], "10.201.0.10");
    assert_eq!(seen["NetworkSettings"]["Networks"]["bridge2"]["IPAddress"], "10.202.0.10");

    let (out, _, end) = agent.exec("web", &["sh", "-c", "echo $GREETING; cat; exit 7"], Some(b"from stdin\n")).await;
    assert_eq!((out.as_str(), end), ("hello world\nfrom stdin\n", Frame::Exit(7)));
    agent.exec("data", &["sh", "-c", "echo kept > /data/f"], None).await;
    assert_eq!(agent.exec("user", &["cat", "/data/f"], None).await.0, "kept\n");
    let (_, error, end) = agent.exec("user", &["touch", "/data/g"], None).await;
    assert!(error.contains("Read-only") && end == Frame::Exit(1), "{error} {end:?}");

    // Another agent on the same ledger and engine: nothing is done.
    let before = fingerprint(host);
    let network = agent.kill().await;
    let agent = Agent::start(host, dir.path(), network);
    agent.settled().await;
    agent.ledger.confirm();
    agent.settled().await;
    assert_eq!(agent.handle.status().borrow().actions, 0);
    assert_eq!(fingerprint(host), before);
    assert_eq!(agent.report("web").expect("said again").status.state, TaskState::Running);

    // A container that no assignment knows goes, the foreign one stays; so do named volumes.
    agent.assign([TaskAssignment { desired_state: TaskState::Remove, ..data.clone() }]);
    agent.reaches("data", 1, TaskState::Remove).await;
    until(
        "removal",
        || format!("{:?}", agent.handle.status().borrow()),
        || (agent.handle.status().borrow().containers == 0).then_some(()),
    )
    .await;
    agent.assign([]);
    agent.settled().await;
    assert_eq!(host.docker(&["ps", "-a", "--format", "{{.Names}}"]).expect("docker ps"), "foreign");
    assert_eq!(host.docker(&["volume", "ls", "-q"]).expect("docker volume ls"), "shop_data");
    assert!(agent.network.leases.lock().expect("nothing panics").is_empty());
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_at_any_point_is_continued_by_the_next() {
    let lab = lab("engine-kill");
    let host = lab.host("h1");
    let dir = tempfile::tempdir().expect("a directory");
    let mut network = Arc::new(Bridges::new(2));
    let tasks = || {
        (0..6).map(|i| {
            let mut task = if i % 2 == 0 { service(&format!("k{i}"), WAIT) } else { task(&format!("k{i}"), WAIT) };
            task.networks = vec![NetworkId::new("net1"), NetworkId::new("net2")];
            task
        })
    };
    // Each life is a little longer than the one before, over the time that six starts take: here time is the input.
    for life in (0..12u64).map(|n| Duration::from_millis(40 * n * n / 4)) {
        let agent = Agent::start(host, dir.path(), network);
        agent.assign(tasks());
        let _ = tokio::time::timeout(life, std::future::pending::<()>()).await;
        network = agent.kill().await;
    }
    let agent = Agent::start(host, dir.path(), network);
    agent.assign(tasks());
    for i in 0..6 {
        agent.reaches(&format!("k{i}"), 1, TaskState::Running).await;
    }
    agent.settled().await;
    let names = host.docker(&["ps", "-a", "--format", "{{.Names}} {{.State}}"]).expect("docker ps");
    let names: BTreeSet<&str> = names.lines().collect();
    let expected: Vec<String> = (0..6).map(|i| format!("k{i}-name.k{i} running")).collect();
    assert_eq!(names, expected.iter().map(String::as_str).collect());
    for i in 0..6 {
        let seen = inspect(host, &format!("k{i}-name.k{i}"));
        let networks = seen["NetworkSettings"]["Networks"].as_object().expect("is an object");
        assert_eq!(networks.keys().collect::<Vec<_>>(), ["bridge1", "bridge2"]);
    }
    // And on the way down.
    agent.assign([]);
    let _ = tokio::time::timeout(Duration::from_millis(300), std::future::pending::<()>()).await;
    let network = agent.kill().await;
    let agent = Agent::start(host, dir.path(), network);
    agent.assign([]);
    agent.settled().await;
    assert_eq!(host.docker(&["ps", "-aq"]).expect("docker ps"), "");
    assert!(agent.network.leases.lock().expect("nothing panics").is_empty());
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_reported_with_their_reasons() {
    let lab = lab("engine-ends");
    let host = lab.host("h1");
    let dir = tempfile::tempdir().expect("a directory");
    let agent = Agent::start(host, dir.path(), Arc::new(Bridges::new(0)));

    let mut greedy = service("greedy", "x=a; while :; do x=$x$x; done");
    greedy.spec.resources.limits.mem_bytes = 16 << 20;
    let mut sick = service("sick", WAIT);
    sick.spec.container.healthcheck = Some(Healthcheck {
        test: vec!["CMD-SHELL".into(), "test -e /healthy".into()],
        interval_ms: 500,
        timeout_ms: 5_000,
        start_period_ms: 0,
        retries: 2,
    });
    let well = TaskAssignment {
        id: TaskId::new("well"),
        service: None,
        spec: TaskSpec {
            container: ContainerSpec {
                command: Some(vec!["sh".into(), "-c".into(), format!("touch /healthy; {WAIT}")]),
                ..sick.spec.container.clone()
            },
            ..sick.spec.clone()
        },
        ..sick.clone()
    };
    let mut nothing = service("nothing", "");
    nothing.spec.container.command = Some(vec!["/no/such/program".into()]);
    let mut unknown = service("unknown", "");
    unknown.spec.container.image = "localhost:1/none".into();
    let mut again = task("again", "exit 3");
    again.spec.restart =
        RestartPolicy { condition: RestartCondition::OnFailure, delay_ms: 10, max_attempts: Some(2), window_ms: 0 };
    agent.assign([
        service("good", "echo out; echo err >&2"),
        service("bad", "exit 5"),
        greedy,
        sick,
        well,
        nothing,
        unknown,
        again,
    ]);

    assert_eq!(agent.reaches("good", 1, TaskState::Complete).await.status.exit_code, Some(0));
    assert_eq!(agent.logs("good", LogOptions::default()).await, ("out\n".into(), "err\n".into(), Frame::Exit(0)));
    let bad = agent.reaches("bad", 1, TaskState::Failed).await.status;
    assert_eq!((bad.exit_code, bad.message.as_str()), (Some(5), "exited with 5"));
    let greedy = agent.reaches("greedy", 1, TaskState::Failed).await.status;
    assert!(greedy.oom_killed && greedy.message == "out of memory", "{greedy:?}");
    let nothing = agent.reaches("nothing", 1, TaskState::Rejected).await.status;
    assert!(nothing.err.as_ref().is_some_and(|e| e.contains("/no/such/program")), "{nothing:?}");
    assert_eq!(agent.reaches("sick", 1, TaskState::Failed).await.status.err.as_deref(), Some("unhealthy"));
    assert_eq!(agent.reaches("well", 1, TaskState::Running).await.status.health, Some(Health::Healthy));
    let again = agent.reaches("again", 3, TaskState::Failed).await;
    assert_eq!(again.status.exit_code, Some(3));
    // No registry answers: said, and tried again, since it may come back.
    let what = "the words about a registry that does not answer";
    let err = until(
        what,
        || format!("{:?}", agent.report("unknown")),
        || agent.report("unknown").filter(|r| r.status.state == TaskState::Preparing).and_then(|r| r.status.err),
    )
    .await;
    assert!(
        err.contains("failed to get image localhost:1/none: it is not on this host, and pulling it failed"),
        "{err}"
    );
    assert!(matches!(agent.exec("bad", &["true"], None).await.2, Frame::Error(e) if e.contains("does not run")));
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_goes_and_comes_back() {
    let lab = lab("engine-back");
    let host = lab.host("h1");
    let dir = tempfile::tempdir().expect("a directory");
    let agent = Agent::start(host, dir.path(), Arc::new(Bridges::new(1)));
    let mut always = task("always", WAIT);
    always.networks = vec![agent.network.networks[0].id.clone()];
    always.spec.restart = RestartPolicy { delay_ms: 10, ..Default::default() };
    agent.assign([service("once", WAIT), always.clone()]);
    agent.reaches("once", 1, TaskState::Running).await;
    let address = agent.reaches("always", 1, TaskState::Running).await.status.addresses;

    let mut state = agent.engine.state();
    host.stop_engine(Signal::SIGTERM).expect("the engine ends");
    let gone = state.wait_for(|s| matches!(s, EngineState::Unreachable { .. }));
    tokio::time::timeout(PATIENCE, gone).await.expect("is noticed").expect("is open");
    host.start_engine().expect("the engine starts");
    // It stopped the containers; the service task is the master's to replace, the container task is ours to restart.
    let once = agent.report("once").map(|r| r.run);
    assert_eq!(once, Some(1));
    let again = agent.reaches("always", 2, TaskState::Running).await;
    assert_eq!(again.status.addresses, address, "sticky");
    until(
        "the end of the service task",
        || format!("{:?}", agent.report("once")),
        || agent.report("once").filter(|r| r.run == 1 && r.status.state.is_terminal()),
    )
    .await;
    assert_eq!(*agent.engine.state().borrow(), EngineState::Ready);

    // A user stops and starts it: the same container, another run.
    let id = agent.report("always").and_then(|r| r.status.container_id);
    agent.assign([TaskAssignment { desired_state: TaskState::Shutdown, ..always.clone() }]);
    agent.reaches("always", 2, TaskState::Shutdown).await;
    agent.assign([TaskAssignment { run: 3, ..always.clone() }]);
    assert_eq!(agent.reaches("always", 3, TaskState::Running).await.status.container_id, id);
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_come_from_the_host_first_and_then_from_a_registry() {
    let lab = lab("engine-pull");
    let host = lab.host("h1");
    let registry = lab.registry().unwrap_or_else(|e| panic!("{e:#}"));
    let image = format!("{registry}/tools/busybox:1");
    for args in [["tag", "busybox", &image].as_slice(), &["push", "-q", &image], &["rmi", &image]] {
        host.docker(args).unwrap_or_else(|e| panic!("{e:#}"));
    }
    let dir = tempfile::tempdir().expect("a directory");
    let agent = Agent::start(host, dir.path(), Arc::new(Bridges::new(0)));
    let of = |id: &str, image: &str| {
        let mut task = service(id, WAIT);
        task.spec.container.image = image.to_owned();
        task
    };
    let missing = format!("{registry}/tools/none:1");
    agent.assign([of("pulled", &image), of("missing", &missing), of("local", "busybox")]);
    agent.reaches("pulled", 1, TaskState::Running).await;
    agent.reaches("local", 1, TaskState::Running).await;
    let err = agent.reaches("missing", 1, TaskState::Rejected).await.status.err.expect("says why");
    assert!(err.contains(&missing), "{err}");
    agent.settled().await;
    let pulled: Vec<String> = agent.ledger.locals("executor/image/").into_keys().collect();
    assert_eq!(pulled, [format!("executor/image/{image}")], "only what we pulled may ever be collected");

    // Nobody wants it any more: it goes when it was unused for long, and what was there before stays.
    agent.assign([]);
    agent.settled().await;
    assert!(agent.engine.has_image(&image).await.expect("the engine answers"), "not before its time");
    let network = agent.kill().await;
    let agent = Agent::start_with(host, dir.path(), network, Settings { image_unused_ms: Some(1) });
    agent.ledger.confirm();
    agent.settled().await;
    assert!(!agent.engine.has_image(&image).await.expect("the engine answers"));
    assert!(agent.engine.has_image("busybox").await.expect("the engine answers"));
    agent.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_follow_hold_back_and_end_with_their_reader() {
    let lab = lab("engine-streams");
    let host = lab.host("h1");
    let dir = tempfile::tempdir().expect("a directory");
    let agent = Agent::start(host, dir.path(), Arc::new(Bridges::new(0)));
    agent.assign([service("talks", &format!("i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done; {WAIT}"))]);
    agent.reaches("talks", 1, TaskState::Running).await;
    let id = TaskId::new("talks");
    until("the last line", String::new, || {
        let logs = host.docker(&["logs", "talks-name.talks"]).expect("docker logs");
        logs.ends_with("line 49").then_some(())
    })
    .await;
    let tail = agent.logs("talks", LogOptions { tail: Some(2), ..Default::default() }).await;
    assert_eq!(tail, ("line 48\nline 49\n".into(), String::new(), Frame::Exit(0)));

    // A followed log ends here as soon as its reader goes.
    let (_input_tx, input_rx) = mpsc::channel(1);
    let (output_tx, mut output_rx) = mpsc::channel(1);
    let options = LogOptions { follow: true, ..Default::default() };
    let (engine, request) = (agent.engine.clone(), StreamRequest::Logs { task: id.clone(), options });
    let serving = tokio::spawn(async move { serve(&engine, request, input_rx, output_tx).await });
    assert!(matches!(output_rx.recv().await, Some(Frame::Stdout(_))));
    drop(output_rx);
    tokio::time::timeout(PATIENCE, serving).await.expect("ends in time").expect("does not panic");

    // 8 MiB through channels of a few frames, in pieces, and a terminal with a size.
    let argv = ["sh", "-c", "dd if=/dev/zero bs=65536 count=128 2>/dev/null"].map(str::to_owned).to_vec();
    let request = StreamRequest::Exec { task: id.clone(), options: ExecOptions { argv, ..Default::default() } };
    let frames = agent.stream(request, vec![]).await;
    let bytes: usize = frames.iter().map(|f| if let Frame::Stdout(b) = f { b.len() } else { 0 }).sum();
    assert_eq!((bytes, frames.last()), (8 << 20, Some(&Frame::Exit(0))));
    assert!(frames.iter().all(|f| !matches!(f, Frame::Stdout(b) if b.len() > 32 * 1024)));
    let argv = ["sh", "-c", "read x; stty size; exit 4"].map(str::to_owned).to_vec();
    let options = ExecOptions { argv, tty: true, stdin: true, ..Default::default() };
    let input = vec![Frame::Resize { rows: 33, columns: 101 }, Frame::Stdin("go\n".into())];
    let (out, _, end) = split(agent.stream(StreamRequest::Exec { task: id, options }, input).await);
    assert!(out.contains("33 101") && end == Frame::Exit(4), "{out} {end:?}");
    let nobody = StreamRequest::Logs { task: TaskId::new("nobody"), options: LogOptions::default() };
    assert!(matches!(&agent.stream(nobody, vec![]).await[..], [Frame::Error(e)] if e.contains("has no container")));
    agent.kill().await;
}

#[test]
fn a_full_disk_under_the_ledger_is_said_and_survived() {
    use nix::{
        mount::{MntFlags, MsFlags, mount, umount2},
        sched::{CloneFlags, unshare},
    };
    // A mount namespace of its own, on a thread that ends with the test.
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("needs root");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private");
        let dir = tempfile::tempdir().expect("a directory");
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k")).expect("a small disk");
        let at = dir.path().join("ledger");
        let ledger = Ledger::open(&at).expect("opens");
        let change = |base: u64, tasks: Vec<TaskAssignment>| AssignmentChange {
            chain: "m".into(),
            full: base == 0,
            base,
            generation: base + 1,
            upserts: tasks.into_iter().map(|t| Assignment::Task(Box::new(t))).collect(),
            ..Default::default()
        };
        ledger.apply(change(0, vec![task("a", "one")])).expect("there is room");
        std::fs::write(dir.path().join("filler"), vec![1; 40_000]).expect("there is room");
        let error = ledger.apply(change(1, vec![task("b", &"x".repeat(40_000))])).expect_err("there is none");
        assert!(error.to_string().contains("failed to write the ledger"), "{error}");
        assert_eq!(ledger.assignments().len(), 2, "memory goes on");
        assert!(matches!(&*ledger.state().borrow(), LedgerState::Failing { error } if error.contains("No space")));
        assert!(ledger.repair().is_err());
        std::fs::remove_file(dir.path().join("filler")).expect("room is made");
        ledger.repair().expect("there is room again");
        assert_eq!(*ledger.state().borrow(), LedgerState::Durable);
        drop(ledger);
        let ledger = Ledger::open(&at).expect("opens again");
        assert_eq!((ledger.assignments().len(), ledger.head().generation, ledger.damage()), (2, 2, None));
        drop(ledger);
        umount2(dir.path(), MntFlags::MNT_DETACH).expect("is unmounted");
    })
    .join()
    .expect("the test's thread does not panic");
}

//! Clients that change objects without a pause and remember what was acknowledged, and the comparison with what is there.
//!
//! Several writers use the native API: networks made and removed, a label each, join tokens, and, where there are hosts, the
//! size of a service. Whatever happens to the master: every acknowledged change must be there, a change that was under
//! way may be there or not, and the master's own check of its invariants must find nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;
use skein_api::{
    ContainerSpec, NetworkSpec, NodeUpdate, ServiceMode, ServiceSpec, StackApply, StackSpec, TaskSpec, TokenCreate,
    client::{Client, ClientError},
};
use tokio::{runtime::Runtime, task::JoinSet};
use xtask::{cluster::PATIENCE, lab::wait_for};

/// Writers at a time: their changes share commits.
const WRITERS: usize = 4;

/// Networks that a writer keeps before it removes some: the pool has 1,024 subnets.
const NETWORKS_MAX: usize = 40;

/// A request must come to an end by itself, even if the master is paused: one that was given up could still be done, after
/// the comparison. Longer than any pause of a test.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Name of the stack whose service changes its size, and of the service within the cluster.
const CHURN: (&str, &str) = ("churn", "churn_work");

/// Most tasks of that service.
const CHURN_MAX: u32 = 4;

/// A variable of whoever runs the tests.
#[allow(clippy::disallowed_methods, reason = "how long a test runs is the caller's choice")]
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

/// Rounds in CI, or with `SKEIN_LONG=1`.
pub(crate) fn rounds(ci: usize, long: usize) -> usize {
    if variable("SKEIN_LONG").is_some() { long } else { ci }
}

/// The seed of this run, from `SKEIN_SEED` if that is set; printed, since a failed run is repeated with it.
#[allow(clippy::print_stderr, reason = "a failed run is repeated with its seed")]
pub(crate) fn seed() -> Result<u64> {
    let seed = match variable("SKEIN_SEED") {
        Some(seed) => seed.parse().context("SKEIN_SEED is not a number")?,
        None => rand::rng().random(),
    };
    eprintln!("SKEIN_SEED={seed}");
    Ok(seed)
}

/// A change that was sent and not answered.
#[derive(Clone, Debug)]
enum Change {
    Create(String),
    Remove(String),
    Label(u64),
    Token,
    Scale(u32),
}

/// What one writer knows to be so.
#[derive(Clone, Debug, Default)]
struct Known {
    networks: BTreeSet<String>,
    removed: BTreeSet<String>,
    tokens: BTreeSet<String>,
    label: u64,
    /// Tasks of the service, for the writer that changes it.
    scale: Option<u32>,
}

/// One client and what it knows.
struct Writer {
    id: usize,
    /// The node whose label it changes.
    node: String,
    client: Client,
    rng: StdRng,
    serial: u64,
    known: Known,
    in_doubt: Option<Change>,
    /// Its next change is one of the service.
    scale_next: bool,
}

impl Writer {
    fn key(&self) -> String {
        format!("writer-{}", self.id)
    }

    fn choose(&mut self) -> Change {
        self.serial += 1;
        if std::mem::take(&mut self.scale_next) {
            return Change::Scale(self.rng.random_range(1..=CHURN_MAX));
        }
        let networks = &self.known.networks;
        match self.rng.random_range(0..10) {
            0..4 if networks.len() < NETWORKS_MAX => Change::Create(format!("w{}-{}", self.id, self.serial)),
            0..6 if !networks.is_empty() => {
                let at = self.rng.random_range(0..networks.len());
                Change::Remove(networks.iter().nth(at).cloned().unwrap_or_default())
            }
            0..9 => Change::Label(self.serial),
            _ => Change::Token,
        }
    }

    /// Sends one change; what was acknowledged is noted.
    async fn change(&mut self, change: &Change) -> Result<(), ClientError> {
        match change {
            Change::Create(name) => {
                self.client.network_create(&NetworkSpec { name: name.clone(), ..NetworkSpec::default() }).await?;
            }
            Change::Remove(name) => self.client.network_remove(name).await?,
            Change::Label(value) => {
                let labels_add = BTreeMap::from([(self.key(), value.to_string())]);
                self.client.node_update(&self.node, &NodeUpdate { labels_add, ..NodeUpdate::default() }).await?;
            }
            Change::Token => {
                let request = TokenCreate { ttl_s: 3_600, uses: 1, ..TokenCreate::default() };
                self.known.tokens.insert(self.client.token_create(&request).await?.info.id.to_string());
            }
            Change::Scale(replicas) => drop(self.client.stack_apply(&churn(*replicas)).await?),
        }
        self.done(change);
        Ok(())
    }

    /// A change is known to have happened.
    fn done(&mut self, change: &Change) {
        match change {
            Change::Create(name) => drop(self.known.networks.insert(name.clone())),
            Change::Remove(name) => {
                self.known.networks.remove(name);
                self.known.removed.insert(name.clone());
            }
            Change::Label(value) => self.known.label = *value,
            Change::Scale(replicas) => self.known.scale = Some(*replicas),
            // Its name is in the answer.
            Change::Token => {}
        }
    }

    /// Changes objects until it shall stop, or the master is gone or takes no changes.
    async fn run(mut self, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicUsize>) -> Result<Self> {
        while !stop.load(Ordering::Relaxed) {
            let change = self.choose();
            match self.change(&change).await {
                Ok(()) => drop(acknowledged.fetch_add(1, Ordering::Relaxed)),
                // It may be there or not, and so may what was sent over a connection that broke.
                Err(ClientError::Api { error, .. }) if error.code == "not_stored" => {
                    self.in_doubt = Some(change);
                    return Ok(self);
                }
                Err(ClientError::Api { error, .. }) if error.code == "read_only" => return Ok(self),
                Err(e) if e.is_unreachable() => {
                    self.in_doubt = Some(change);
                    return Ok(self);
                }
                Err(e) => bail!("writer {} was refused {change:?}: {e}", self.id),
            }
        }
        Ok(self)
    }

    fn label(&self, state: &State) -> u64 {
        state.labels.get(&self.key()).map_or(0, |v| v.parse().unwrap_or(0))
    }

    /// Compares what is there with what was acknowledged; what was in doubt is known from now on.
    fn verify(&mut self, state: &State) -> Result<()> {
        let label = self.label(state);
        if let Some(change) = self.in_doubt.take() {
            let there = match &change {
                Change::Create(name) => state.networks.contains(name),
                Change::Remove(name) => !state.networks.contains(name),
                Change::Label(value) => label == *value,
                Change::Scale(replicas) => state.scale == Some(*replicas),
                Change::Token => false,
            };
            if there {
                self.done(&change);
            }
        }
        let Known { networks, removed, tokens, scale, .. } = &self.known;
        let lost: Vec<&String> = networks.difference(&state.networks).collect();
        ensure!(lost.is_empty(), "writer {}: acknowledged networks are lost: {lost:?}", self.id);
        let back: Vec<&String> = removed.intersection(&state.networks).collect();
        ensure!(back.is_empty(), "writer {}: removed networks are back: {back:?}", self.id);
        let lost: Vec<&String> = tokens.difference(&state.tokens).collect();
        ensure!(lost.is_empty(), "writer {}: acknowledged tokens are lost: {lost:?}", self.id);
        ensure!(label == self.known.label, "writer {}: label {} became {label}", self.id, self.known.label);
        ensure!(scale.is_none() || *scale == state.scale, "size {scale:?} became {:?}", state.scale);
        Ok(())
    }

    /// Compares what is there with what was known before and after the moment as of which it is; takes it over.
    fn verify_between(&mut self, before: &Known, after: &Known, state: &State) -> Result<()> {
        let id = self.id;
        let lost: Vec<&String> =
            before.networks.difference(&after.removed).filter(|n| !state.networks.contains(*n)).collect();
        ensure!(lost.is_empty(), "writer {id}: networks from before the backup are lost: {lost:?}");
        let back: Vec<&String> = before.removed.intersection(&state.networks).collect();
        ensure!(back.is_empty(), "writer {id}: networks that were removed before the backup are back: {back:?}");
        let lost: Vec<&String> = before.tokens.difference(&state.tokens).collect();
        ensure!(lost.is_empty(), "writer {id}: tokens from before the backup are lost: {lost:?}");
        let label = self.label(state);
        ensure!((before.label..=after.label).contains(&label), "writer {id}: label {label}");
        let prefix = format!("w{id}-");
        self.known = Known {
            networks: state.networks.iter().filter(|n| n.starts_with(&prefix)).cloned().collect(),
            removed: before.removed.clone(),
            tokens: before.tokens.clone(),
            label,
            scale: after.scale.and(state.scale),
        };
        self.in_doubt = None;
        Ok(())
    }
}

/// The service with this many tasks.
fn churn(replicas: u32) -> StackApply {
    let container = ContainerSpec {
        image: "busybox".into(),
        command: Some(vec!["sleep".into(), "1000".into()]),
        stop_grace_ms: Some(0),
        ..ContainerSpec::default()
    };
    let service = ServiceSpec {
        name: CHURN.1.into(),
        stack: Some(CHURN.0.into()),
        task: TaskSpec { container, ..TaskSpec::default() },
        mode: ServiceMode::Replicated(replicas),
        ..ServiceSpec::default()
    };
    let stack = StackSpec { name: CHURN.0.into(), services: vec![service], ..StackSpec::default() };
    StackApply { stack, ..StackApply::default() }
}

/// What the master says is there.
struct State {
    networks: BTreeSet<String>,
    tokens: BTreeSet<String>,
    labels: BTreeMap<String, String>,
    scale: Option<u32>,
}

impl State {
    async fn read(client: &Client, node: &str) -> Result<Self, ClientError> {
        let services = client.services(Some(CHURN.0)).await?;
        let scale = services.iter().find_map(|service| match service.spec.mode {
            ServiceMode::Replicated(replicas) => Some(replicas),
            ServiceMode::Global => None,
        });
        Ok(Self {
            networks: client.networks().await?.into_iter().map(|n| n.spec.name).collect(),
            tokens: client.tokens().await?.into_iter().map(|t| t.id.to_string()).collect(),
            labels: client.node(node).await?.spec.labels,
            scale,
        })
    }
}

/// `GET /v1/check`: every broken invariant.
fn check(socket: &Path) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(b"GET /v1/check HTTP/1.0\r\nHost: skein\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.contains(" 200 "), "{answer}");
    Ok(serde_json::from_str(body)?)
}

/// What was known at a moment, to compare a backup with.
pub(crate) struct Mark(Vec<Known>);

/// The writers, at work or at rest.
pub(crate) struct History {
    runtime: Runtime,
    socket: PathBuf,
    node: String,
    churn: bool,
    writers: Vec<Writer>,
    running: JoinSet<Result<Writer>>,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
}

impl History {
    /// Writers at rest, who know nothing yet. They change labels of this node, and the size of a service if `churn`.
    pub(crate) fn new(socket: PathBuf, node: &str, churn: bool, seed: u64) -> Result<Self> {
        // Two threads: whoever kills must not stop the writers.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let client = Client::unix(&socket).with_request_timeout(REQUEST_TIMEOUT);
        let writer = |id: usize| Writer {
            id,
            node: node.to_owned(),
            client: client.clone(),
            rng: StdRng::seed_from_u64(seed.wrapping_add(id as u64)),
            serial: 0,
            known: Known::default(),
            in_doubt: None,
            scale_next: false,
        };
        let writers = (0..WRITERS).map(writer).collect();
        let (running, stop, acknowledged) = Default::default();
        Ok(Self { runtime, socket, node: node.to_owned(), churn, writers, running, stop, acknowledged })
    }

    /// Puts the writers to work. The first resizes the service once.
    pub(crate) fn start(&mut self) {
        self.stop = Arc::default();
        self.acknowledged = Arc::default();
        for mut writer in self.writers.drain(..) {
            writer.scale_next = self.churn && writer.id == 0;
            self.running.spawn_on(writer.run(self.stop.clone(), self.acknowledged.clone()), self.runtime.handle());
        }
    }

    /// Waits for so many acknowledgements since the start. Writers that gave up have a reason, which `settle` tells.
    pub(crate) fn wait_for(&self, acknowledgements: usize) -> Result<()> {
        wait_for(&format!("{acknowledgements} acknowledged changes"), PATIENCE, || {
            let enough = self.acknowledged.load(Ordering::Relaxed) >= acknowledgements;
            let tasks = self.runtime.metrics().num_alive_tasks();
            Ok((enough || tasks == 0).then_some(()))
        })
    }

    /// Waits until the writers have given up.
    pub(crate) fn wait_for_end(&self) -> Result<()> {
        wait_for("the writers to be refused", PATIENCE, || {
            Ok((self.runtime.metrics().num_alive_tasks() == 0).then_some(()))
        })
    }

    /// Waits until so many more changes are acknowledged than now.
    pub(crate) fn wait_for_more(&self, acknowledgements: usize) -> Result<()> {
        self.wait_for(self.acknowledged.load(Ordering::Relaxed) + acknowledgements)
    }

    /// Lets the writers rest; waits for what they have under way. Returns how much was acknowledged since the start.
    pub(crate) fn settle(&mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        let running = &mut self.running;
        let all = self.runtime.block_on(async {
            let mut all = Vec::new();
            while let Some(writer) = running.join_next().await {
                all.push(writer??);
            }
            anyhow::Ok(all)
        })?;
        self.writers = all;
        self.writers.sort_by_key(|w| w.id);
        Ok(self.acknowledged.load(Ordering::Relaxed))
    }

    fn state(&self) -> Result<State> {
        Ok(self.runtime.block_on(State::read(&Client::unix(&self.socket), &self.node))?)
    }

    /// Compares what writers at rest know with what the master says is there, and lets it check its invariants.
    pub(crate) fn verify(&mut self) -> Result<()> {
        let state = self.state()?;
        for writer in &mut self.writers {
            writer.verify(&state)?;
        }
        self.check()
    }

    fn check(&self) -> Result<()> {
        let broken = check(&self.socket)?;
        ensure!(broken == Value::Array(Vec::new()), "invariants are broken: {broken}");
        Ok(())
    }

    /// What writers at rest know.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.writers.iter().map(|w| w.known.clone()).collect())
    }

    /// After a restore of a backup that was made between the two: all from before it is there, what came until after it may
    /// be. Whatever happened since is not.
    pub(crate) fn verify_between(&mut self, before: &Mark, after: &Mark) -> Result<()> {
        let state = self.state()?;
        for (writer, (before, after)) in self.writers.iter_mut().zip(before.0.iter().zip(&after.0)) {
            writer.verify_between(before, after, &state)?;
        }
        self.check()
    }

    /// Objects that writers at rest know of.
    pub(crate) fn known(&self) -> usize {
        self.writers.iter().map(|w| w.known.networks.len() + w.known.tokens.len() + w.known.removed.len()).sum()
    }

    /// How many tasks the service shall have.
    pub(crate) fn churn_tasks(&self) -> usize {
        let known = self.writers.first().and_then(|w| w.known.scale);
        known.map_or(0, |n| usize::try_from(n).unwrap_or(usize::MAX))
    }
}

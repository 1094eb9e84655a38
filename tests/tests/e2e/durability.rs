//! What was acknowledged is there, whenever the master is killed.
//!
//! Several writers change objects through the native API without a pause; the master is killed with `kill -9` after a
//! random number of acknowledgements and started again. Then every acknowledged change must be there, a change that was
//! under way may be there or not, and the master's own check of its invariants must find nothing. 10 rounds, 50 with
//! `SKEIN_LONG=1`; the seed is printed, and taken from `SKEIN_SEED`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;
use skein_api::{
    NetworkSpec, NodeUpdate, TokenCreate,
    client::{Client, ClientError},
};
use tokio::{sync::mpsc, task::JoinSet};
use xtask::{cluster::Cluster, lab::Lab};

use super::{lab, support::add_node};

/// Rounds in CI and with `SKEIN_LONG=1`.
const ROUNDS: (usize, usize) = (10, 50);

/// Writers at a time: their changes share commits.
const WRITERS: usize = 4;

/// Acknowledgements before a kill, at most: a few hundred commits.
const ACKNOWLEDGED_MAX: usize = 300;

/// Networks that a writer keeps before it removes some: the pool has 1,024 subnets.
const NETWORKS_MAX: usize = 40;

/// A change that was sent and not answered.
#[derive(Debug)]
enum Change {
    Create(String),
    Remove(String),
    Label(u64),
    Token,
}

/// One client and what it knows to be so.
struct Writer {
    id: usize,
    client: Client,
    rng: StdRng,
    serial: u64,
    networks: BTreeSet<String>,
    removed: BTreeSet<String>,
    tokens: BTreeSet<String>,
    label: u64,
    in_doubt: Option<Change>,
}

impl Writer {
    fn new(id: usize, client: Client, seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed.wrapping_add(id as u64));
        let (networks, removed, tokens) = Default::default();
        Self { id, client, rng, serial: 0, networks, removed, tokens, label: 0, in_doubt: None }
    }

    fn key(&self) -> String {
        format!("writer-{}", self.id)
    }

    fn choose(&mut self) -> Change {
        self.serial += 1;
        match self.rng.random_range(0..10) {
            0..4 if self.networks.len() < NETWORKS_MAX => Change::Create(format!("w{}-{}", self.id, self.serial)),
            0..6 if !self.networks.is_empty() => {
                let at = self.rng.random_range(0..self.networks.len());
                Change::Remove(self.networks.iter().nth(at).cloned().unwrap_or_default())
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
                self.networks.insert(name.clone());
            }
            Change::Remove(name) => {
                self.client.network_remove(name).await?;
                self.networks.remove(name);
                self.removed.insert(name.clone());
            }
            Change::Label(value) => {
                let labels_add = BTreeMap::from([(self.key(), value.to_string())]);
                self.client.node_update("n1", &NodeUpdate { labels_add, ..NodeUpdate::default() }).await?;
                self.label = *value;
            }
            Change::Token => {
                let request = TokenCreate { ttl_s: 3_600, uses: 1, ..TokenCreate::default() };
                self.tokens.insert(self.client.token_create(&request).await?.info.id.to_string());
            }
        }
        Ok(())
    }

    /// Changes objects until the master is gone.
    async fn run(mut self, acknowledged: mpsc::Sender<()>) -> Result<Self> {
        loop {
            let change = self.choose();
            match self.change(&change).await {
                Ok(()) => drop(acknowledged.send(()).await),
                Err(e) if e.is_unreachable() => {
                    self.in_doubt = Some(change);
                    return Ok(self);
                }
                Err(e) => bail!("writer {} was refused {change:?}: {e}", self.id),
            }
        }
    }

    /// Compares what is there with what was acknowledged; what was in doubt is known from now on.
    fn verify(&mut self, state: &State) -> Result<()> {
        let label = state.labels.get(&self.key()).map_or(0, |v| v.parse().unwrap_or(0));
        match self.in_doubt.take() {
            Some(Change::Create(name)) if state.networks.contains(&name) => drop(self.networks.insert(name)),
            Some(Change::Remove(name)) if !state.networks.contains(&name) => {
                self.networks.remove(&name);
                self.removed.insert(name);
            }
            Some(Change::Label(value)) if label == value => self.label = value,
            _ => {}
        }
        let lost: Vec<&String> = self.networks.difference(&state.networks).collect();
        ensure!(lost.is_empty(), "writer {}: acknowledged networks are lost: {lost:?}", self.id);
        let back: Vec<&String> = self.removed.intersection(&state.networks).collect();
        ensure!(back.is_empty(), "writer {}: removed networks are back: {back:?}", self.id);
        let lost: Vec<&String> = self.tokens.difference(&state.tokens).collect();
        ensure!(lost.is_empty(), "writer {}: acknowledged tokens are lost: {lost:?}", self.id);
        ensure!(label == self.label, "writer {}: label {} was acknowledged, {label} is there", self.id, self.label);
        Ok(())
    }
}

/// What the master says is there.
struct State {
    networks: BTreeSet<String>,
    tokens: BTreeSet<String>,
    labels: BTreeMap<String, String>,
}

impl State {
    async fn read(client: &Client) -> Result<Self, ClientError> {
        Ok(Self {
            networks: client.networks().await?.into_iter().map(|n| n.spec.name).collect(),
            tokens: client.tokens().await?.into_iter().map(|t| t.id.to_string()).collect(),
            labels: client.node("n1").await?.spec.labels,
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

/// One round: load, kill, start, compare.
async fn round(
    cluster: &Cluster<'_>,
    socket: &Path,
    writers: Vec<Writer>,
    acknowledgements: usize,
) -> Result<Vec<Writer>> {
    let (tx, mut rx) = mpsc::channel(2 * ACKNOWLEDGED_MAX);
    let mut running = JoinSet::new();
    for writer in writers {
        running.spawn(writer.run(tx.clone()));
    }
    drop(tx);
    for _ in 0..acknowledgements {
        // Writers that give up have a reason, which is told below.
        if rx.recv().await.is_none() {
            break;
        }
    }
    let killed = cluster.process("master", "skein-master").and_then(|p| p.kill());
    drop(rx);
    let mut writers = Vec::new();
    while let Some(writer) = running.join_next().await {
        writers.push(writer??);
    }
    killed?;
    cluster.start_master()?;
    let state = State::read(&Client::unix(socket)).await?;
    for writer in &mut writers {
        writer.verify(&state)?;
    }
    let broken = check(socket)?;
    ensure!(broken == Value::Array(Vec::new()), "invariants are broken: {broken}");
    Ok(writers)
}

#[allow(clippy::disallowed_methods, reason = "how long a test runs is the caller's choice")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

#[allow(clippy::print_stderr, reason = "a failed run is repeated with its seed")]
fn seed() -> Result<u64> {
    let seed = match variable("SKEIN_SEED") {
        Some(seed) => seed.parse().context("SKEIN_SEED is not a number")?,
        None => rand::rng().random(),
    };
    eprintln!("SKEIN_SEED={seed}");
    Ok(seed)
}

async fn rounds(lab: &Lab, seed: u64) -> Result<()> {
    let cluster = Cluster::of(lab);
    cluster.start_master()?;
    add_node(&cluster, "n1")?;
    let socket = cluster.socket();
    let mut rng = StdRng::seed_from_u64(seed);
    let client = Client::unix(&socket);
    let mut writers: Vec<Writer> = (0..WRITERS).map(|id| Writer::new(id, client.clone(), seed)).collect();
    let count = if variable("SKEIN_LONG").is_some() { ROUNDS.1 } else { ROUNDS.0 };
    for number in 0..count {
        let acknowledgements = rng.random_range(1..=ACKNOWLEDGED_MAX);
        writers = round(&cluster, &socket, writers, acknowledgements)
            .await
            .with_context(|| format!("seed {seed}, round {number}, killed after {acknowledgements}"))?;
    }
    // A master that is not there loses nothing.
    let kept: usize = writers.iter().map(|w| w.networks.len() + w.tokens.len() + w.removed.len()).sum();
    ensure!(kept > count, "hardly anything was acknowledged: {kept}");
    Ok(())
}

#[test]
fn killed_masters_lose_nothing_acknowledged() -> Result<()> {
    let seed = seed()?;
    let lab = lab("durable", 0, &[])?;
    // Two threads: the one that kills must not stop the writers.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(rounds(&lab, seed)).with_context(|| lab.logs(20))
}

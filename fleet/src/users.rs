//! Many users of the API at once, over the local socket: readers of objects, readers of events, and some that stop
//! reading.
//!
//! Tasks: one per connection and its driver, in `JoinSet`s that end with [`run`].

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, body::Bytes, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::Barrier,
    task::JoinSet,
};

/// How long readers that stopped reading wait to be cut: three times the master's limit of 20 s.
const CUT_WITHIN: Duration = Duration::from_secs(60);

/// What users do.
#[derive(Clone, Debug)]
pub struct Users {
    /// The master's socket.
    pub socket: PathBuf,
    /// Connections that ask one thing after the other.
    pub readers: usize,
    /// Questions of all of them together.
    pub gets: usize,
    /// What they ask for, in turn.
    pub paths: Vec<String>,
    /// Connections that read events until the readers are done.
    pub watchers: usize,
    /// Connections that ask for a path, and then read nothing of the answer.
    pub stuck: usize,
    /// The path that those ask for: its answer must be larger than what sockets buffer.
    pub stuck_path: String,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Answers, all with status 200.
    pub answers: usize,
    /// Seconds until the last.
    pub seconds: f64,
    /// Milliseconds for one answer: half of them took at most this.
    pub median_ms: f64,
    /// Milliseconds of the slowest.
    pub slowest_ms: f64,
    /// Bytes of events that all watchers read.
    pub event_bytes: u64,
    /// Connections that did not read and were cut.
    pub cut: usize,
}

async fn connect(socket: &Path) -> Result<(SendRequest<Empty<Bytes>>, tokio::task::JoinHandle<()>)> {
    let stream = UnixStream::connect(socket).await.context("failed to connect to the master")?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with its sender.
    let driver = tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok((sender, driver))
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(path).header("host", "skein").body(Empty::new()).expect("a path of our own")
}

/// Asks `count` times, beginning at another path than its neighbours; milliseconds of each.
async fn reader(users: Arc<Users>, number: usize, count: usize, begin: Arc<Barrier>) -> Result<Vec<f64>> {
    let connected = connect(&users.socket).await;
    begin.wait().await;
    let (mut sender, _driver) = connected?;
    let mut times = Vec::with_capacity(count);
    for at in 0..count {
        let path = &users.paths[(number + at) % users.paths.len()];
        let began = Instant::now();
        sender.ready().await?;
        let answer = sender.send_request(get(path)).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        ensure!(status == 200, "GET {path}: {status}: {}", String::from_utf8_lossy(&body));
        times.push(began.elapsed().as_secs_f64() * 1_000.0);
    }
    Ok(times)
}

/// Reads events until it is aborted; counts bytes.
async fn watcher(users: Arc<Users>, begin: Arc<Barrier>, bytes: Arc<crate::fleet::Counter>) -> Result<()> {
    let connected = connect(&users.socket).await;
    begin.wait().await;
    let (mut sender, _driver) = connected?;
    let answer = sender.send_request(get("/v1/events")).await?;
    ensure!(answer.status() == 200, "events: {}", answer.status());
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        bytes.add(frame?.data_ref().map_or(0, Bytes::len));
    }
    Ok(())
}

/// Asks and does not read; waits until the master has cut it, which shows as an end in the middle of the answer.
async fn stuck(users: Arc<Users>, begin: Arc<Barrier>) -> Result<()> {
    let connected = UnixStream::connect(&users.socket).await;
    begin.wait().await;
    let mut stream = connected?;
    let request = format!("GET {} HTTP/1.1\r\nhost: skein\r\n\r\n", users.stuck_path);
    stream.write_all(request.as_bytes()).await?;
    // A peer that closed its side is seen without reading what it sent before.
    tokio::time::timeout(CUT_WITHIN, closed(&stream)).await.context("the master did not cut it")??;
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    ensure!(!rest.ends_with(b"0\r\n\r\n"), "the whole answer fitted into the socket: ask for more");
    Ok(())
}

async fn closed(stream: &UnixStream) -> Result<()> {
    loop {
        if stream.ready(tokio::io::Interest::READABLE).await?.is_read_closed() {
            return Ok(());
        }
        // Readable for as long as nobody reads: look again a little later.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Lets the users at the master, and waits for all of them.
///
/// # Errors
/// An answer that was none.
pub async fn run(users: Users) -> Result<Outcome> {
    let begin = Arc::new(Barrier::new(users.readers + users.watchers + users.stuck + 1));
    let (users, bytes) = (Arc::new(users), Arc::new(crate::fleet::Counter::default()));
    let (mut readers, mut watchers, mut stucks) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    for number in 0..users.readers {
        let count = users.gets / users.readers + usize::from(number < users.gets % users.readers);
        readers.spawn(reader(users.clone(), number, count, begin.clone()));
    }
    for _ in 0..users.watchers {
        watchers.spawn(watcher(users.clone(), begin.clone(), bytes.clone()));
    }
    for _ in 0..users.stuck {
        stucks.spawn(stuck(users.clone(), begin.clone()));
    }
    begin.wait().await;
    let began = Instant::now();
    let mut times = Vec::with_capacity(users.gets);
    while let Some(done) = readers.join_next().await {
        times.extend(done??);
    }
    let seconds = began.elapsed().as_secs_f64();
    if let Some(early) = watchers.try_join_next() {
        early??;
        anyhow::bail!("a watcher ended before it was told to");
    }
    watchers.shutdown().await;
    let mut cut = 0;
    while let Some(done) = stucks.join_next().await {
        done??;
        cut += 1;
    }
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times.get((times.len() * share / 100).min(times.len().saturating_sub(1))).copied();
    Ok(Outcome {
        answers: times.len(),
        seconds,
        median_ms: at(50).unwrap_or_default(),
        slowest_ms: at(100).unwrap_or_default(),
        event_bytes: u64::try_from(bytes.get()).unwrap_or(u64::MAX),
        cut,
    })
}

//! HTTP from inside a host: single requests, and a steady load that counts what was lost.
//!
//! One thread per load, in the host's network namespace; ended and joined by [`Load::stop`] or on drop.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::lab::Host;

/// A request that takes longer is lost. The application itself gives its database 5 s.
const REQUEST_WITHIN: Duration = Duration::from_secs(8);

/// Enters the network namespace of a host with the calling thread, which must not be used for anything else.
fn enter(host: &Host) -> Result<()> {
    let path = format!("/proc/{}/ns/net", host.holder().pid);
    let namespace = File::open(&path).with_context(|| format!("failed to open {path}"))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("failed to enter {path}"))
}

/// One request; the body of an answer with status 200 to 299.
fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, REQUEST_WITHIN)?;
    stream.set_read_timeout(Some(REQUEST_WITHIN))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: demo\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of its head")?;
    let status: u16 = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("the answer has no status")?;
    ensure!((200..300).contains(&status), "status {status}: {body}");
    Ok(body.to_owned())
}

/// One request from inside a host.
///
/// # Errors
/// No answer, or one that is no success.
pub(super) fn http(host: &Host, address: SocketAddr, method: &str, path: &str, body: &str) -> Result<String> {
    // A thread of its own: a namespace belongs to a thread.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(host)?;
            request(address, method, path, body)
        });
        thread.join().unwrap_or_else(|_| bail!("the request's thread panicked"))
    })
}

/// What a load saw.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Requests that were answered well.
    pub(super) answered: u64,
    /// Requests that were not, with the reason.
    pub(super) lost: Vec<String>,
    /// The longest answered one.
    pub(super) slowest: Duration,
}

/// Requests one after the other, each writing a row.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Tally>>>,
}

impl Load {
    /// Begins.
    pub(super) fn start(host: &Host, address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, host) = (stop.clone(), host.clone());
        let thread = std::thread::spawn(move || {
            enter(&host)?;
            let mut tally = Tally::default();
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                match request(address, "POST", "/rows", r#"{"text":"load"}"#) {
                    Ok(_) => tally.answered += 1,
                    Err(error) => tally.lost.push(format!("{error:#}")),
                }
                tally.slowest = tally.slowest.max(began.elapsed());
            }
            Ok(tally)
        });
        Self { stop, thread: Some(thread) }
    }

    /// Ends, and says what was seen.
    ///
    /// # Errors
    /// The thread could not enter the host.
    pub(super) fn stop(mut self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the load was stopped already")?;
        thread.join().unwrap_or_else(|_| bail!("the load's thread panicked"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its failure was not asked for.
            drop(thread.join());
        }
    }
}

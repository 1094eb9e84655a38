//! How a lab talks with the holder of a host: one JSON line there, one back, over a unix socket.
//!
//! Owns the messages and the client. Knows nothing of how a holder does its work. No tasks, no channels; a call blocks
//! its thread for as long as its time limit says.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::process::ProcessId;

/// Number of this protocol. A holder that speaks another one was started by another build of this program.
pub(super) const PROTOCOL: u32 = 2;

/// Longest message in bytes: command lines and environments of tests, with much room.
pub(super) const MESSAGE_BYTES_MAX: u64 = 1 << 20;

/// How long a holder may take for anything but waiting.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Name of the socket in a host's directory.
pub(super) const SOCKET: &str = "control.sock";

/// What a holder is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(super) enum Request {
    Ping,
    Spawn(SpawnRequest),
    /// Sends a signal to a process that the holder started.
    Signal {
        pid: i32,
        signal: i32,
    },
    /// Waits for the end of a process that the holder started.
    Wait {
        pid: i32,
        timeout_ms: u64,
    },
    List,
}

/// A process to start.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SpawnRequest {
    pub(super) name: String,
    pub(super) argv: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) log: PathBuf,
    pub(super) plugin_socket: bool,
    /// The service whose descriptor store the process uses.
    pub(super) fd_store: Option<String>,
}

/// What a holder answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(super) enum Response {
    Pong { protocol: u32, holder: ProcessId, mount_ns: u64 },
    Spawned { id: ProcessId },
    Done,
    Status { status: Status },
    Processes { processes: Vec<ProcessInfo> },
    Failed { error: String },
}

/// What became of a process in a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It runs.
    Running,
    /// It ended with this code, 0 to 255.
    Exited(i32),
    /// It was ended by the signal with this number.
    Signaled(i32),
}

/// A process that the holder started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its identity.
    pub id: ProcessId,
    /// The name it was started under, also of its log file.
    pub name: String,
    /// Its command line.
    pub argv: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
    /// What became of it.
    pub status: Status,
}

/// Asks the holder of the host with this directory.
///
/// # Errors
/// The holder does not answer, or says no.
pub(super) fn call(host_dir: &Path, request: &Request) -> Result<Response> {
    let wait = match request {
        Request::Wait { timeout_ms, .. } => Duration::from_millis(*timeout_ms),
        _ => Duration::ZERO,
    };
    let path = host_dir.join(SOCKET);
    let response = exchange(&path, request, ANSWER_TIMEOUT + wait)
        .with_context(|| format!("failed to ask the holder at {}", path.display()))?;
    match response {
        Response::Failed { error } => bail!("{error}"),
        response => Ok(response),
    }
}

/// Sends one line, reads one line.
pub(super) fn exchange<Q: Serialize, A: DeserializeOwned>(path: &Path, request: &Q, timeout: Duration) -> Result<A> {
    let mut stream = UnixStream::connect(path).context("failed to connect: is the host up?")?;
    stream.set_read_timeout(Some(timeout)).context("failed to set a time limit")?;
    let mut line = serde_json::to_vec(request).context("failed to encode the request")?;
    line.push(b'\n');
    stream.write_all(&line).context("failed to send the request")?;
    read_message(&stream)
}

/// Reads one line of at most [`MESSAGE_BYTES_MAX`].
pub(super) fn read_message<T: DeserializeOwned>(stream: &UnixStream) -> Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(MESSAGE_BYTES_MAX)).read_line(&mut line).context("failed to read a message")?;
    serde_json::from_str(&line).with_context(|| format!("failed to parse a message of {} bytes", line.len()))
}

//! The process that is a relay: it reads frames at one end of a host's cable and sends them at the other, when and if its
//! [`Impairment`] says.
//!
//! `xtask lab relay-process LAB HOST SEED` is started by `Lab::relay` in the switch's network namespace, with two packet
//! sockets (`packet(7)`), one bound to each end. Two threads: the main one moves frames, `control` answers on the control
//! socket; they share [`Shared`] under a lock. No channels. Frames that wait are bounded by [`QUEUED_BYTES_MAX`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::shape::{Fate, Impairment, Shaper};
use super::{Answer, Counters, Question, RelayState, host_end, socket_path, switch_end};
use crate::lab::control::read_message;
use crate::lab::process::ProcessId;
use crate::lab::spec::{LabState, host_dir};

/// Bytes of the frames that wait for their time: a second at 500 Mbit/s. Those that find it full are dropped and counted.
const QUEUED_BYTES_MAX: usize = 64 << 20;

/// Room in each socket for what comes while the other side is served: a quarter of a second at 500 Mbit/s.
const SOCKET_BYTES: usize = 16 << 20;

/// Frames taken from one end before the other has its turn and frames that are due leave.
const BATCH_FRAMES: usize = 64;

/// Longest frame: offloads are off, so the underlay's MTU (9,000 at most) and the header; with room.
const FRAME_BYTES_MAX: usize = 16 << 10;

/// How long a client of the control socket may take to send its line.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(5);

/// What both threads use.
#[derive(Debug, Default)]
struct Shared {
    impairment: Impairment,
    counters: Counters,
}

type Lock = Arc<Mutex<Shared>>;

/// A thread that panicked left the values whole: each is set in one step.
fn lock(shared: &Lock) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Relays until it is killed.
///
/// # Errors
/// An end of the cable cannot be opened or has gone.
pub(in crate::lab) fn run(lab: &str, host: &str, seed: u64) -> Result<()> {
    let state = LabState::load(lab)?.with_context(|| format!("failed to find lab {lab}"))?;
    let index = state.spec.hosts.iter().position(|spec| spec.name == host);
    let index = index.with_context(|| format!("failed to find host {host} in lab {lab}"))?;
    let ends = [open_end(&host_end(index))?, open_end(&switch_end(index))?];
    let shared = Lock::default();
    let control = listen(&socket_path(&host_dir(lab, host)))?;
    let answers = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || serve(&control, &answers))
        .context("failed to start a thread")?;
    Relay::new(ends, seed, shared).run()
}

/// A socket that sees every frame that comes in at a device, and none that goes out.
fn open_end(device: &str) -> Result<OwnedFd> {
    let addresses = getifaddrs().context("failed to list devices")?;
    let link = addresses.filter(|a| a.interface_name == device).find_map(|a| a.address?.as_link_addr().copied());
    let link = link.with_context(|| format!("failed to find device {device}"))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
        .context("failed to open a packet socket")?;
    setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BYTES).context("failed to enlarge a socket")?;
    setsockopt(&fd, sockopt::SndBufForce, &SOCKET_BYTES).context("failed to enlarge a socket")?;
    // The protocol in `link` is 0, which keeps the socket's own (net/packet/af_packet.c, packet_bind).
    bind(fd.as_raw_fd(), &link).with_context(|| format!("failed to bind to {device}"))?;
    Ok(fd)
}

fn listen(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("failed to remove {}", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(path).with_context(|| format!("failed to listen on {}", path.display()))
}

/// Answers one question after the other.
fn serve(control: &UnixListener, shared: &Lock) {
    for stream in control.incoming().flatten() {
        let answer = answer(&stream, shared).unwrap_or_else(|e| Answer::Failed { error: format!("{e:#}") });
        // A client that has gone away needs no answer.
        if let Ok(mut line) = serde_json::to_vec(&answer) {
            line.push(b'\n');
            let _ = (&stream).write_all(&line);
        }
    }
}

fn answer(stream: &UnixStream, shared: &Lock) -> Result<Answer> {
    stream.set_read_timeout(Some(QUESTION_TIMEOUT)).context("failed to set a time limit")?;
    let question: Question = read_message(stream)?;
    let mut shared = lock(shared);
    if let Question::Set { impairment } = question {
        impairment.validate()?;
        shared.impairment = impairment;
    }
    let Shared { impairment, counters } = *shared;
    Ok(Answer::State(RelayState { process: ProcessId::current()?, impairment, counters }))
}

/// A frame that waits. The earliest is the greatest, as [`BinaryHeap`] wants it; those of one time leave as they came.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    order: Reverse<(Duration, u64)>,
    to: usize,
    frame: Vec<u8>,
}

struct Relay {
    /// Towards the host and towards the switch.
    ends: [OwnedFd; 2],
    /// For what comes in at each end.
    shapers: [Shaper; 2],
    began: Instant,
    serial: u64,
    waiting: BinaryHeap<Waiting>,
    waiting_bytes: usize,
    shared: Lock,
}

impl Relay {
    fn new(ends: [OwnedFd; 2], seed: u64, shared: Lock) -> Self {
        let shapers = [Shaper::new(seed), Shaper::new(seed.wrapping_add(1))];
        let (serial, waiting, waiting_bytes) = Default::default();
        Self { ends, shapers, began: Instant::now(), serial, waiting, waiting_bytes, shared }
    }

    fn run(mut self) -> Result<()> {
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        loop {
            self.wait()?;
            for from in 0..self.ends.len() {
                self.take(from, &mut buffer)?;
            }
            self.release()?;
        }
    }

    /// Until a frame comes or one is due.
    fn wait(&self) -> Result<()> {
        let now = self.began.elapsed();
        let left = self.waiting.peek().map(|next| next.order.0.0.saturating_sub(now));
        let left = left.map(|d| Timespec { tv_sec: d.as_secs().cast_signed(), tv_nsec: d.subsec_nanos().into() });
        let mut polled = self.ends.each_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
        match poll(&mut polled, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e).context("failed to wait for frames"),
        }
    }

    /// Takes what has come in at one end.
    fn take(&mut self, from: usize, buffer: &mut [u8]) -> Result<()> {
        let Shared { impairment, mut counters } = *lock(&self.shared);
        for _ in 0..BATCH_FRAMES {
            let bytes = match recv(self.ends[from].as_raw_fd(), buffer, MsgFlags::MSG_TRUNC) {
                Ok(bytes) => bytes,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e).context("failed to receive a frame"),
            };
            let Some(frame) = buffer.get(..bytes) else {
                counters.overflowed += 1;
                continue;
            };
            match self.shapers[from].admit(self.began.elapsed(), bytes, &impairment) {
                Fate::Lost => counters.lost += 1,
                Fate::Overflowed => counters.overflowed += 1,
                Fate::Leaves { .. } if self.waiting_bytes + 2 * bytes > QUEUED_BYTES_MAX => counters.overflowed += 1,
                Fate::Leaves { due, copy_due, overtakes } => {
                    counters.passed += 1;
                    counters.duplicated += u64::from(copy_due.is_some());
                    counters.overtook += u64::from(overtakes);
                    let frame = frame.to_vec();
                    if let Some(copy_due) = copy_due {
                        self.queue(copy_due, 1 - from, frame.clone());
                    }
                    self.queue(due, 1 - from, frame);
                }
            }
        }
        lock(&self.shared).counters = counters;
        Ok(())
    }

    fn queue(&mut self, due: Duration, to: usize, frame: Vec<u8>) {
        self.serial += 1;
        self.waiting_bytes += frame.len();
        self.waiting.push(Waiting { order: Reverse((due, self.serial)), to, frame });
    }

    /// Sends what is due.
    fn release(&mut self) -> Result<()> {
        let now = self.began.elapsed();
        while let Some(next) = self.waiting.peek()
            && next.order.0.0 <= now
        {
            let Some(Waiting { to, frame, .. }) = self.waiting.pop() else { break };
            self.waiting_bytes -= frame.len();
            match send(self.ends[to].as_raw_fd(), &frame, MsgFlags::empty()) {
                Ok(_) | Err(Errno::EINTR) => {}
                // As a full queue of a device.
                Err(Errno::EAGAIN | Errno::ENOBUFS) => lock(&self.shared).counters.overflowed += 1,
                Err(e) => return Err(e).context("failed to send a frame"),
            }
        }
        Ok(())
    }
}

//! Probes: packets or requests at a steady pace from one network to another, and what became of each of them.
//!
//! For everything that must not be noticed: a probe runs while something is killed, paused or cut, and then says how
//! much was sent and lost, in all or in a [window of time](Probe::window), and the longest silence. A probe needs
//! no program in the container: its sockets are made by threads that enter the [`Place`]'s network.
//!
//! Threads: a probe of packets has one that sends, one that hears answers and one that echoes; a probe of requests has one.
//! All end when the probe is [stopped](Probe::stop) or dropped. They share the record under a lock; no channels.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};

use super::host::Host;

/// A request that is not answered within this time is lost. Longer than TCP's first four repetitions (1, 3, 7 and 15 s after
/// it), so that a lost packet is no lost request.
const REQUEST_WITHIN: Duration = Duration::from_secs(16);

/// A packet that is not answered within this time is lost: far longer than any delay that is made on purpose.
const PACKET_WITHIN: Duration = Duration::from_secs(2);

/// How often threads that wait for packets look whether they shall end.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Room for packets while a thread is not given a processor: at 1,000 packets of 768 bytes (with the kernel's share) in a
/// second, five seconds.
const SOCKET_BYTES: usize = 4 << 20;

/// Bytes of a packet: its number, and what makes it as long as a small request.
const PACKET_BYTES: usize = 64;

/// A network that a probe can begin or end in.
#[derive(Clone, Debug)]
pub struct Place {
    name: String,
    namespace: PathBuf,
}

impl Place {
    /// The network of a host.
    #[must_use]
    pub fn host(host: &Host) -> Self {
        let namespace = format!("/proc/{}/ns/net", host.holder().pid);
        Self { name: host.name().to_owned(), namespace: namespace.into() }
    }

    /// The network that is pinned at a path inside a host.
    #[must_use]
    pub fn pinned(host: &Host, path: &str) -> Self {
        Self { name: format!("{}:{path}", host.name()), namespace: host.path(path) }
    }

    /// The network of a running container.
    ///
    /// # Errors
    /// The engine does not know it, or it does not run.
    pub fn container(host: &Host, id: &str) -> Result<Self> {
        let pid = host.docker(&["inspect", "-f", "{{.State.Pid}}", id])?;
        ensure!(pid != "0", "failed to enter container {id} on {}: it does not run", host.name());
        Ok(Self { name: format!("{}/{id}", host.name()), namespace: format!("/proc/{pid}/ns/net").into() })
    }

    /// A command in this network, and in no other namespace of the place.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace.display())).arg("--").arg(program);
        command
    }

    /// Does `work` on a thread in this network, and waits for it. Sockets that it makes stay there, whoever uses them.
    ///
    /// # Errors
    /// The network cannot be entered, or what `work` gives.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        // A thread of its own: a namespace belongs to a thread.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let namespace = File::open(&self.namespace)
                    .with_context(|| format!("failed to open {}", self.namespace.display()))?;
                setns(namespace, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("failed to enter the network of {}", self.name))?;
                work()
            });
            thread.join().unwrap_or_else(|_| bail!("the thread in the network of {} panicked", self.name))
        })
    }

    /// A socket of this network: it stays there, whoever uses it.
    fn udp_socket(&self, port: u16) -> Result<UdpSocket> {
        self.within(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
                .with_context(|| format!("failed to bind port {port} in {}", self.name))?;
            setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BYTES).context("failed to enlarge a socket")?;
            socket.set_read_timeout(Some(LOOK_AGAIN)).context("failed to set a time limit")?;
            Ok(socket)
        })
    }
}

/// An HTTP request that is made again and again.
#[derive(Clone, Debug)]
pub struct Request {
    method: &'static str,
    path: String,
    body: String,
}

impl Request {
    /// `GET`.
    pub fn get(path: impl Into<String>) -> Self {
        Self { method: "GET", path: path.into(), body: String::new() }
    }

    /// `POST` of JSON.
    pub fn post(path: impl Into<String>, body: impl Into<String>) -> Self {
        Self { method: "POST", path: path.into(), body: body.into() }
    }

    /// Makes it once, on a connection of its own; the body of an answer with status 200 to 299.
    ///
    /// # Errors
    /// No answer in time, or one that is no success.
    pub fn send(&self, from: &Place, to: SocketAddr) -> Result<String> {
        from.within(|| self.exchange(to))
    }

    fn exchange(&self, to: SocketAddr) -> Result<String> {
        let Self { method, path, body } = self;
        let mut stream = TcpStream::connect_timeout(&to, REQUEST_WITHIN).context("failed to connect")?;
        stream.set_read_timeout(Some(REQUEST_WITHIN)).context("failed to set a time limit")?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: probe\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).context("failed to send")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("failed to read the answer")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of its head")?;
        let status: u16 = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("the answer has no status")?;
        ensure!((200..300).contains(&status), "status {status}: {body}");
        Ok(body.to_owned())
    }
}

/// What a probe saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Packets or requests sent.
    pub sent: usize,
    /// Of these, answered.
    pub answered: usize,
    /// Of these, not answered; those that are still on their way are neither.
    pub lost: usize,
    /// When, since the probe began, and why the first of them was lost.
    pub first_loss: Option<(Duration, String)>,
    /// The longest time without an answer, before the first and after the last one too.
    pub longest_gap: Duration,
    /// The longest time that one was waited for.
    pub slowest: Duration,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sent, answered, lost, first_loss, longest_gap, slowest } = self;
        write!(f, "{sent} sent, {answered} answered, {lost} lost")?;
        write!(f, ", longest gap {} ms, slowest {} ms", longest_gap.as_millis(), slowest.as_millis())?;
        match first_loss {
            Some((at, why)) => write!(f, "; the first lost after {:.3} s: {why}", at.as_secs_f64()),
            None => Ok(()),
        }
    }
}

#[derive(Debug)]
enum Outcome {
    Waiting,
    /// After this time.
    Answered(Duration),
    Lost(String),
}

/// Everything that was sent.
#[derive(Debug)]
struct Record {
    /// In order: when, since the probe began, and what became of it.
    all: Vec<(Duration, Outcome)>,
    /// What is not answered within this time is lost.
    within: Duration,
}

impl Record {
    fn new(within: Duration) -> Self {
        Self { all: Vec::new(), within }
    }

    fn begin(&mut self, at: Duration) -> usize {
        self.all.push((at, Outcome::Waiting));
        self.all.len() - 1
    }

    /// The first outcome counts: an answer may come twice.
    fn end(&mut self, index: usize, outcome: Outcome) {
        if let Some((_, slot @ Outcome::Waiting)) = self.all.get_mut(index) {
            *slot = outcome;
        }
    }

    /// What was sent from `from` on and before `to`, seen at `now`.
    fn report(&self, from: Duration, to: Duration, now: Duration) -> Report {
        let mut report = Report::default();
        let mut answers = vec![from];
        let window = self.all.iter().filter(|(at, _)| (from..to).contains(at));
        for (at, outcome) in window {
            report.sent += 1;
            let why = match outcome {
                Outcome::Answered(after) => {
                    report.answered += 1;
                    report.slowest = report.slowest.max(*after);
                    answers.push(*at + *after);
                    continue;
                }
                Outcome::Waiting if now.saturating_sub(*at) < self.within => continue,
                Outcome::Waiting => format!("no answer within {:?}", self.within),
                Outcome::Lost(why) => why.clone(),
            };
            report.lost += 1;
            report.first_loss.get_or_insert((*at, why));
        }
        answers.sort_unstable();
        let last = answers.last().copied().unwrap_or(from);
        answers.push(to.min(now).max(last));
        report.longest_gap = answers.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
        report
    }

    /// Whether something that was sent in the window may still be answered in time.
    fn is_waiting(&self, from: Duration, to: Duration, now: Duration) -> bool {
        let mut window = self.all.iter().filter(|(at, _)| (from..to).contains(at));
        window.any(|(at, outcome)| matches!(outcome, Outcome::Waiting) && now.saturating_sub(*at) < self.within)
    }
}

/// What a probe's threads share.
#[derive(Debug)]
struct Shared {
    began: Instant,
    /// Nothing is sent any more.
    sent_all: AtomicBool,
    /// Every thread ends.
    stop: AtomicBool,
    record: Mutex<Record>,
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn sent_all(&self) -> bool {
        self.sent_all.load(Ordering::Relaxed)
    }

    /// Sleeps until the next beat. Beats that were missed, for want of a processor, are left out: no burst follows.
    fn beat(&self, next: &mut Duration, every: Duration) {
        *next = (*next + every).max(self.began.elapsed());
        std::thread::sleep(next.saturating_sub(self.began.elapsed()));
    }
}

/// A running probe.
#[derive(Debug)]
pub struct Probe {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Probe {
    fn new(within: Duration) -> Self {
        let record = Mutex::new(Record::new(within));
        let (sent_all, stop) = Default::default();
        let shared = Shared { began: Instant::now(), sent_all, stop, record };
        Self { shared: Arc::new(shared), threads: Vec::new() }
    }

    fn thread(&mut self, work: impl FnOnce(&Shared) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        self.threads.push(std::thread::spawn(move || work(&shared)));
    }

    /// Sends a UDP packet each `every` from one place to an address of another, where it is echoed.
    ///
    /// # Errors
    /// A place cannot be entered, or the port is taken there.
    pub fn packets(from: &Place, to: &Place, address: SocketAddr, every: Duration) -> Result<Self> {
        let echo = to.udp_socket(address.port())?;
        let socket = from.udp_socket(0)?;
        socket.connect(address).with_context(|| format!("failed to find a way to {address}"))?;
        let answers = socket.try_clone().context("failed to share a socket")?;
        let mut probe = Self::new(PACKET_WITHIN);
        probe.thread(move |shared| send_packets(shared, &socket, every));
        probe.thread(move |shared| hear_answers(shared, &answers));
        probe.thread(move |shared| echo_packets(shared, &echo));
        Ok(probe)
    }

    /// Makes requests one after the other, at most one each `every`, each on a connection of its own.
    ///
    /// # Errors
    /// The place cannot be entered.
    pub fn requests(from: &Place, to: SocketAddr, request: Request, every: Duration) -> Result<Self> {
        // Entered once before, so that a wrong place is told here.
        from.within(|| Ok(()))?;
        let mut probe = Self::new(REQUEST_WITHIN);
        let from = from.clone();
        probe.thread(move |shared| {
            let all = from.within(|| {
                make_requests(shared, &request, to, every);
                Ok(())
            });
            if let Err(e) = all {
                let mut record = shared.record();
                let index = record.begin(shared.began.elapsed());
                record.end(index, Outcome::Lost(format!("{e:#}")));
            }
        });
        Ok(probe)
    }

    /// What was seen so far.
    #[must_use]
    pub fn report(&self) -> Report {
        let now = self.shared.began.elapsed();
        self.shared.record().report(Duration::ZERO, now, now)
    }

    /// What became of everything that was sent between two moments. Waits until that is known.
    #[must_use]
    pub fn window(&self, from: Instant, to: Instant) -> Report {
        let since = |at: Instant| at.saturating_duration_since(self.shared.began);
        let (from, to) = (since(from), since(to));
        while self.shared.record().is_waiting(from, to, self.shared.began.elapsed()) {
            std::thread::sleep(LOOK_AGAIN);
        }
        self.shared.record().report(from, to, self.shared.began.elapsed())
    }

    /// Ends the probe; waits for what is on its way.
    #[must_use]
    pub fn stop(mut self) -> Report {
        self.shared.sent_all.store(true, Ordering::Relaxed);
        let report = self.window(self.shared.began, Instant::now());
        self.end();
        report
    }

    fn end(&mut self) {
        self.shared.sent_all.store(true, Ordering::Relaxed);
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // What a thread had to say is in the record.
            drop(thread.join());
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.end();
    }
}

fn send_packets(shared: &Shared, socket: &UdpSocket, every: Duration) {
    let mut next = Duration::ZERO;
    let mut packet = [0; PACKET_BYTES];
    while !shared.sent_all() {
        let index = shared.record().begin(shared.began.elapsed());
        packet[..8].copy_from_slice(&(index as u64).to_be_bytes());
        if let Err(e) = socket.send(&packet) {
            shared.record().end(index, Outcome::Lost(format!("failed to send: {e}")));
        }
        shared.beat(&mut next, every);
    }
}

fn hear_answers(shared: &Shared, socket: &UdpSocket) {
    let mut packet = [0; PACKET_BYTES];
    while !shared.stopped() {
        // An error is the end of the time limit, or an ICMP message: then the packet stays unanswered.
        if socket.recv(&mut packet).is_ok_and(|bytes| bytes == PACKET_BYTES) {
            let index = u64::from_be_bytes(packet[..8].try_into().expect("eight bytes"));
            let mut record = shared.record();
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            if let Some((at, _)) = record.all.get(index) {
                let after = shared.began.elapsed().saturating_sub(*at);
                record.end(index, Outcome::Answered(after));
            }
        }
    }
}

fn echo_packets(shared: &Shared, socket: &UdpSocket) {
    let mut packet = [0; PACKET_BYTES];
    while !shared.stopped() {
        if let Ok((bytes, from)) = socket.recv_from(&mut packet) {
            // What cannot be sent stays unanswered, which is counted.
            let _ = socket.send_to(&packet[..bytes], from);
        }
    }
}

fn make_requests(shared: &Shared, request: &Request, to: SocketAddr, every: Duration) {
    let mut next = Duration::ZERO;
    while !shared.sent_all() {
        let begin = shared.began.elapsed();
        let index = shared.record().begin(begin);
        let outcome = match request.exchange(to) {
            Ok(_) => Outcome::Answered(shared.began.elapsed() - begin),
            Err(e) => Outcome::Lost(format!("{e:#}")),
        };
        shared.record().end(index, outcome);
        shared.beat(&mut next, every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Ten sent, one each 10 ms, answered after 1 ms; but the fourth and fifth are lost, and the last is on its way.
    fn record() -> Record {
        let mut record = Record::new(ms(5_000));
        for i in 0..10 {
            let index = record.begin(ms(10 * i));
            match i {
                3 => record.end(index, Outcome::Lost("refused".to_owned())),
                4 | 9 => {}
                _ => record.end(index, Outcome::Answered(ms(1))),
            }
        }
        record
    }

    #[test]
    fn a_report_counts_each_once_and_finds_the_gap() {
        let report = record().report(ms(0), ms(200), ms(4_000));
        assert_eq!((report.sent, report.answered, report.lost), (10, 7, 1));
        assert_eq!(report.first_loss, Some((ms(30), "refused".to_owned())));
        assert_eq!(report.slowest, ms(1));
        assert_eq!(report.longest_gap, ms(119), "from the last answer to the end of the window");
        let later = record().report(ms(0), ms(85), ms(9_000));
        assert_eq!((later.sent, later.answered, later.lost), (9, 7, 2), "an answer that never came is a loss");
        assert_eq!(later.longest_gap, ms(30), "from the third answer to the sixth");
    }

    #[test]
    fn a_window_leaves_out_what_was_sent_outside_of_it() {
        let report = record().report(ms(50), ms(80), ms(9_000));
        assert_eq!((report.sent, report.answered, report.lost, report.first_loss), (3, 3, 0, None));
        assert_eq!(record().report(ms(500), ms(600), ms(9_000)).sent, 0);
    }

    #[test]
    fn the_first_outcome_of_each_counts() {
        let mut record = record();
        record.end(0, Outcome::Lost("late".to_owned()));
        record.end(3, Outcome::Answered(ms(5)));
        record.end(100, Outcome::Answered(ms(5)));
        assert_eq!(record.report(ms(0), ms(40), ms(50)).lost, 1);
        assert!(record.is_waiting(ms(0), ms(100), ms(100)));
        assert!(!record.is_waiting(ms(0), ms(40), ms(100)));
        assert!(!record.is_waiting(ms(0), ms(100), ms(9_000)));
    }
}

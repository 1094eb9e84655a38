//! What loads a path between two networks, and how fast it was: streams by `iperf3`, single exchanges and small
//! datagrams by threads of this program that enter the two networks.
//!
//! Sender and receiver share the machine's cores with the kernel's work for both hosts, so figures are those of the
//! whole path. Threads end with the call that started them. No channels.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    process::{Child, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use crate::lab::probe::Place;

/// Bytes of a request, of its answer, and of a datagram.
const BYTES: usize = 64;
/// Where exchanges and datagrams go; `iperf3` has its usual 5201.
const PORT: u16 = 5_301;
/// How long a connection or an answer may take.
const WITHIN: Duration = Duration::from_secs(5);
/// How long datagrams that were sent may take to arrive.
const STRAGGLERS: Duration = Duration::from_millis(100);
/// Receive buffer for datagrams, so that a pause of the receiver is no loss: some 10,000 of them.
const DATAGRAM_BUFFER_BYTES: usize = 8 << 20;

/// Two networks and a way from one to the other.
#[derive(Debug)]
pub(super) struct Path {
    /// What it is called in the table.
    pub(super) name: &'static str,
    pub(super) client: Place,
    pub(super) server: Place,
    /// Address at which the client reaches the server.
    pub(super) to: IpAddr,
    /// The server's `iperf3`.
    iperf: Child,
}

impl Drop for Path {
    fn drop(&mut self) {
        let _ = self.iperf.kill();
        let _ = self.iperf.wait();
    }
}

/// What streams achieved.
pub(super) struct Streams {
    /// Received, in 10^9 bits of payload a second.
    pub(super) gbit_per_s: f64,
    /// Seconds that the machine's cores were busy for 10^9 bits: both ends and all that is between them.
    pub(super) cpu_s_per_gbit: f64,
}

/// Seconds that all cores together were busy since the machine started (proc(5), `/proc/stat`).
fn busy_s() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("failed to read /proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    ensure!(ticks.len() >= 8, "/proc/stat has too few fields: {line}");
    /// `USER_HZ`, 100 everywhere.
    const TICKS_PER_S: f64 = 100.0;
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy: f64 = ticks.iter().take(8).sum::<f64>() - ticks[3] - ticks[4];
    Ok(busy / TICKS_PER_S)
}

impl Path {
    /// Starts the server's `iperf3`.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn try_new(name: &'static str, client: Place, server: Place, to: IpAddr) -> Result<Self> {
        let mut command = server.command("iperf3");
        let iperf = command.arg("-s").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let iperf = iperf.context("failed to start iperf3\nhint: apt-get install iperf3")?;
        Ok(Self { name, client, server, to, iperf })
    }

    /// TCP, so many streams at a time, for so long.
    ///
    /// # Errors
    /// `iperf3` fails, with what it says.
    pub(super) fn streams(&self, count: u32, seconds: u32) -> Result<Streams> {
        let began = Instant::now();
        loop {
            let before = busy_s()?;
            let mut command = self.client.command("iperf3");
            command.args(["-J", "-c", &self.to.to_string(), "-t", &seconds.to_string(), "-P", &count.to_string()]);
            let output = command.output().context("failed to start iperf3")?;
            let busy = busy_s()? - before;
            let said: Value = serde_json::from_slice(&output.stdout).context("iperf3 printed no JSON")?;
            let received = &said["end"]["sum_received"];
            if let (true, Some(bits), Some(bytes)) =
                (output.status.success(), received["bits_per_second"].as_f64(), received["bytes"].as_f64())
            {
                return Ok(Streams { gbit_per_s: bits / 1e9, cpu_s_per_gbit: busy / (bytes * 8.0 / 1e9) });
            }
            let why = said["error"].as_str().unwrap_or("no reason given");
            // Its server may still be starting, or closing the connections of the run before.
            ensure!(began.elapsed() < WITHIN, "iperf3 over {} failed: {why}", self.name);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// TCP requests of 64 bytes one after the other on one connection, each answered by as many: mean time of one, in
    /// microseconds.
    ///
    /// # Errors
    /// The connection fails.
    pub(super) fn round_trip_us(&self, duration: Duration) -> Result<f64> {
        let listener = self
            .server
            .within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("failed to listen for requests"))?;
        std::thread::scope(|scope| {
            let server = scope.spawn(|| -> Result<()> {
                let (mut stream, _) = listener.accept().context("failed to accept")?;
                stream.set_nodelay(true)?;
                let mut buffer = [0; BYTES];
                while let Ok(()) = stream.read_exact(&mut buffer) {
                    stream.write_all(&buffer)?;
                }
                Ok(())
            });
            let mut stream = self.connect()?;
            let (mut buffer, mut count, began) = ([7; BYTES], 0_u32, Instant::now());
            while began.elapsed() < duration {
                stream.write_all(&buffer).context("failed to send")?;
                stream.read_exact(&mut buffer).context("failed to read an answer")?;
                count += 1;
            }
            let mean_us = began.elapsed().as_secs_f64() * 1e6 / f64::from(count);
            drop(stream);
            match server.join() {
                Ok(result) => result.map(|()| mean_us),
                Err(_) => bail!("the server of requests panicked"),
            }
        })
    }

    fn connect(&self) -> Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&(self.to, PORT).into(), WITHIN).context("failed to connect");
        let stream = match self.client.within(connect) {
            Ok(stream) => stream,
            Err(error) => {
                // The server would wait for ever.
                let knock = || Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?);
                self.server.within(knock)?;
                return Err(error.context(format!("over {}", self.name)));
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(WITHIN))?;
        Ok(stream)
    }

    /// UDP datagrams of 64 bytes as fast as one thread sends them: how many arrive in a second.
    ///
    /// # Errors
    /// A socket cannot be made, or nothing arrives.
    pub(super) fn datagrams_per_s(&self, duration: Duration) -> Result<f64> {
        let receiver = self.server.within(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("failed to bind for datagrams")?;
            setsockopt(&socket, sockopt::RcvBufForce, &DATAGRAM_BUFFER_BYTES).context("failed to enlarge a socket")?;
            socket.set_read_timeout(Some(STRAGGLERS))?;
            Ok(socket)
        })?;
        let sender = self.client.within(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect((self.to, PORT)).with_context(|| format!("failed to find a way to {}", self.to))?;
            Ok(socket)
        })?;
        let done = AtomicBool::new(false);
        let received = std::thread::scope(|scope| {
            let counting = scope.spawn(|| {
                let (mut buffer, mut count) = ([0; 2 * BYTES], 0_u32);
                loop {
                    match receiver.recv(&mut buffer) {
                        Ok(_) => count += 1,
                        Err(error) if error.kind() == ErrorKind::WouldBlock && done.load(Ordering::Relaxed) => break,
                        Err(_) => {}
                    }
                }
                count
            });
            let began = Instant::now();
            while began.elapsed() < duration {
                for _ in 0..64 {
                    // A full queue is part of what is measured.
                    let _ = sender.send(&[7; BYTES]);
                }
            }
            done.store(true, Ordering::Relaxed);
            counting.join()
        });
        let Ok(received) = received else { bail!("the counter of datagrams panicked") };
        ensure!(received > 0, "no datagram arrived over {}", self.name);
        Ok(f64::from(received) / duration.as_secs_f64())
    }
}

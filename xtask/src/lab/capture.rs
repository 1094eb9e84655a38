//! What was on the wire: `tcpdump` on the underlay interface of a host, into a file.
//!
//! No tasks, no channels; the recording process is a child of the caller and ends with the [`Capture`].

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::host::Host;
use super::process::{run, tail, wait_for};
use super::underlay::UNDERLAY_INTERFACE;

/// How long `tcpdump` may take to open its socket or to flush its file.
const TCPDUMP_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes kept of each packet: enough for outer and inner headers and the start of a payload.
const SNAP_BYTES: &str = "256";

/// Packets kept at most; then the recording ends by itself.
const PACKETS_MAX: &str = "100000";

/// A running or finished recording.
#[derive(Debug)]
pub struct Capture {
    file: PathBuf,
    child: Child,
}

impl Capture {
    pub(super) fn start(host: &Host, filter: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = host.dir().join(format!("capture-{}-{number}.pcap", std::process::id()));
        let log = file.with_extension("log");
        let errors = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
        let mut command = host.command("tcpdump");
        // Immediate mode and -U: a packet is in the file when it was on the wire, so that a test can wait for it.
        command.args(["-Z", "root", "-n", "-U", "--immediate-mode", "-s", SNAP_BYTES, "-c", PACKETS_MAX]);
        command.args(["-i", UNDERLAY_INTERFACE, "-w"]).arg(&file);
        command.args((!filter.is_empty()).then_some(filter));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.spawn().context("failed to start tcpdump")?;
        let mut capture = Self { file, child };
        wait_for("tcpdump listening", TCPDUMP_TIMEOUT, || {
            if tail(&log, 20).contains("listening on") {
                return Ok(Some(()));
            }
            match capture.child.try_wait().context("failed to look after tcpdump")? {
                Some(status) => bail!("failed to record on {}: {status}\n{}", host.name(), tail(&log, 20)),
                None => Ok(None),
            }
        })?;
        Ok(capture)
    }

    /// The pcap file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// One line of text per packet recorded so far, as `tcpdump -nn` prints them (with VXLAN's inner packets).
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn lines(&self) -> Result<Vec<String>> {
        // Status 1 with output means that the last packet is half written: the lines before it count.
        let output = Command::new("tcpdump")
            .args(["-nn", "-r"])
            .arg(&self.file)
            .stdin(Stdio::null())
            .output()
            .context("failed to start tcpdump")?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter(|line| !line.starts_with(char::is_whitespace)).map(str::to_owned).collect())
    }

    /// All text of the packets recorded so far, continuation lines included.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn text(&self) -> Result<String> {
        run(Command::new("tcpdump").args(["-nn", "-r"]).arg(&self.file))
    }

    /// Waits until at least `count` packets are recorded.
    ///
    /// # Errors
    /// Fewer came in time.
    pub fn wait_for(&self, count: usize, timeout: Duration) -> Result<()> {
        wait_for(&format!("{count} packets in {}", self.file.display()), timeout, || {
            Ok((self.lines()?.len() >= count).then_some(()))
        })
    }

    /// Ends the recording. Doing so twice changes nothing.
    ///
    /// # Errors
    /// `tcpdump` does not end.
    pub fn stop(&mut self) -> Result<()> {
        // nsenter has become tcpdump by exec: the child is the recorder itself.
        if let Ok(pid) = i32::try_from(self.child.id())
            && self.child.try_wait().context("failed to look after tcpdump")?.is_none()
        {
            kill(Pid::from_raw(pid), Signal::SIGINT).context("failed to interrupt tcpdump")?;
            wait_for("tcpdump ended", TCPDUMP_TIMEOUT, || self.child.try_wait().context("failed to wait for tcpdump"))?;
        }
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.stop().is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

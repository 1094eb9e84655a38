//! Processes as `/proc` shows them: identity that survives reuse of numbers, namespaces, waiting with a deadline.
//!
//! Knows nothing of labs. No tasks, no channels.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Pause between two looks at a predicate: short against everything waited for, long against the cost of a look.
const POLL_INTERVAL: Duration = Duration::from_millis(15);

/// A process, and not another one that got its number later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`proc(5)`, stat field 22).
    pub start_ticks: u64,
}

/// The fields of `/proc/<pid>/stat` that are used here.
pub(super) struct Stat {
    pub(super) state: char,
    pub(super) parent: i32,
    pub(super) start_ticks: u64,
}

impl ProcessId {
    /// The calling process.
    pub(super) fn current() -> Result<Self> {
        let pid = Pid::this().as_raw();
        Self::of(pid).with_context(|| format!("failed to read /proc/{pid}/stat"))
    }

    /// The process that has this number now.
    pub(super) fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|stat| Self { pid, start_ticks: stat.start_ticks })
    }

    /// Whether it still runs. A zombie does not, once its last thread is gone: it holds no namespace, file or mount any
    /// more. A killed leader is a zombie while another of its threads still waits for the disk, with all files open.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|stat| {
            stat.start_ticks == self.start_ticks && (!matches!(stat.state, 'Z' | 'X') || self.threads() > 1)
        })
    }

    fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid)).map_or(0, Iterator::count)
    }

    /// Sends a signal; a process that is gone is no error.
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(e) => Err(e).with_context(|| format!("failed to send {signal} to process {}", self.pid)),
        }
    }
}

/// Reads `/proc/<pid>/stat`; nothing if there is no such process.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The command's name stands in parentheses and may hold spaces and parentheses itself: the last one counts.
fn parse_stat(text: &str) -> Option<Stat> {
    let rest = text.get(text.rfind(')')? + 1..)?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

/// Numbers of all processes.
pub(super) fn all() -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc").context("failed to list /proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Inode of a namespace of a process, `kind` as in `/proc/<pid>/ns/`. Nothing for zombies.
pub(super) fn namespace(pid: i32, kind: &str) -> Option<u64> {
    let meta = fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok()?;
    Some(meta.ino())
}

/// Inode of the namespace that is mounted on a file; nothing for a plain file, which a name in `/run/netns` is after a
/// reboot where `/run` is kept.
pub(super) fn namespace_at(path: &Path) -> Option<u64> {
    let (file, own) = (fs::metadata(path).ok()?, fs::metadata("/proc/self/ns/net").ok()?);
    (file.dev() == own.dev()).then(|| file.ino())
}

/// Name of a process's program (first 15 bytes).
pub(super) fn program(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim_end().to_owned()).unwrap_or_default()
}

/// Adds every descendant of the members.
pub(super) fn add_descendants(members: &mut BTreeSet<i32>) -> Result<()> {
    let parents: Vec<(i32, i32)> = all()?.into_iter().filter_map(|pid| Some((pid, stat(pid)?.parent))).collect();
    loop {
        let before = members.len();
        for (pid, parent) in &parents {
            if members.contains(parent) {
                members.insert(*pid);
            }
        }
        if members.len() == before {
            return Ok(());
        }
    }
}

/// Waits until `ready` gives a value.
///
/// # Errors
/// What `ready` returns, at once; after `timeout`, a text that says what was waited for.
pub fn wait_for<T>(what: &str, timeout: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("failed to see {what} within {timeout:?}");
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Runs a command to its end and returns what it wrote to standard output.
///
/// # Errors
/// Names the command line, its status and what it wrote to standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| explain_missing(command, e))?;
    if !output.status.success() {
        bail!(
            "failed to run {}: {}\n{}",
            command_line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("failed to read the output of {}: not UTF-8", command_line(command)))
}

fn explain_missing(command: &Command, error: io::Error) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("failed to start {}", command_line(command)))
}

/// A command as one would type it.
pub(super) fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Last `lines` lines of a text file, empty if it cannot be read.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_odd_program_names() {
        let text = "42 (a) b (c)) S 7 42 42 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 98765 1000 10";
        let stat = parse_stat(text).expect("well formed");
        assert_eq!((stat.state, stat.parent, stat.start_ticks), ('S', 7, 98765));
        assert!(parse_stat("42 (x").is_none());
    }

    #[test]
    fn a_reused_number_is_another_process() {
        let me = ProcessId::current().expect("proc is mounted");
        assert!(me.is_alive());
        assert!(!ProcessId { start_ticks: me.start_ticks + 1, ..me }.is_alive());
    }

    #[test]
    fn run_tells_status_and_error_output() {
        let error = run(Command::new("sh").args(["-c", "echo oops >&2; exit 3"])).expect_err("exits with 3");
        let text = format!("{error:#}");
        assert!(text.contains("oops") && text.contains('3'), "{text}");
    }
}

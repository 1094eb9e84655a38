//! What happened: everything that master and agents logged, and what the scenario did, one line each with simulated time.

use std::{
    fmt::{self, Write as _},
    io,
    sync::{Arc, Mutex},
};

use tracing::subscriber::DefaultGuard;
use tracing_subscriber::{
    EnvFilter,
    fmt::{MakeWriter, format::Writer, time::FormatTime},
};

use crate::machine;

/// Both daemons from `info` on; of the network only the host that runs, as a span.
const FILTER: &str = "info,turmoil=warn,turmoil[node]=info";

/// Lines of a failed run that are shown.
const SHOWN: usize = 60;

/// The lines. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub(crate) struct History(Arc<Mutex<String>>);

impl History {
    /// Takes what the calling thread logs from now on, until the guard is dropped.
    pub(crate) fn follow(&self) -> DefaultGuard {
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(FILTER))
            .with_ansi(false)
            .with_timer(SimulatedTime)
            .with_writer(self.clone());
        tracing::subscriber::set_default(subscriber.finish())
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        self.0.lock().expect("nobody panics while holding this lock").clone()
    }

    /// When lines with these words were written, in order: milliseconds of simulated time.
    pub(crate) fn times_ms(&self, words: &[&str]) -> Vec<u64> {
        let text = self.text();
        let lines = text.lines().filter(|line| words.iter().all(|word| line.contains(word)));
        let time = |line: &str| line.split_once(' ').and_then(|(time, _)| time.replace('.', "").parse().ok());
        lines.filter_map(time).collect()
    }

    /// The last lines, for a failed run.
    pub(crate) fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN)..].join("\n")
    }
}

struct SimulatedTime;

impl FormatTime for SimulatedTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let elapsed = machine::elapsed();
        write!(writer, "{}.{:03}", elapsed.as_secs(), elapsed.subsec_millis())
    }
}

impl io::Write for History {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = std::str::from_utf8(bytes).map_err(io::Error::other)?;
        self.0.lock().expect("nobody panics while holding this lock").write_str(text).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for History {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

//! What goes to the user: data to standard output, messages to standard error; tables, JSON, colours, ages.
//!
//! Nothing else in this crate writes to either, but the progress bars of `up` (standard error) and raw streams of `exec`
//! and `logs`, which use [`stdout`] and [`stderr`].

use std::{
    io::{self, IsTerminal, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use skein_api::UnixMillis;

use crate::fail::{Failure, stdout_failed};

/// How to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    /// JSON instead of tables.
    pub(crate) json: bool,
    /// Colours on standard output.
    pub(crate) colour: bool,
    /// Standard error is a terminal that may be drawn on.
    pub(crate) live: bool,
    /// A person can be asked.
    pub(crate) ask: bool,
}

impl Out {
    /// Finds out what the process is connected to. `no_colour`: NO_COLOR is set and not empty (no-color.org).
    pub(crate) fn detect(json: bool, no_colour: bool, dumb: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let live = io::stderr().is_terminal() && !dumb;
        Self {
            json,
            colour: terminal && !no_colour && !dumb && !json,
            live: live && !json,
            ask: io::stdin().is_terminal() && io::stderr().is_terminal(),
        }
    }

    /// Writes text as it is.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        stdout(text.as_bytes())
    }

    /// Writes a line.
    pub(crate) fn line(&self, line: &str) -> Result<(), Failure> {
        stdout(format!("{line}\n").as_bytes())
    }

    /// Writes a value as indented JSON.
    pub(crate) fn value(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).expect("the API's types have string keys only");
        self.line(&text)
    }

    /// Writes a value as JSON, or what people read of it.
    pub(crate) fn show(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.json { self.value(value) } else { self.text(&text()) }
    }

    /// Writes a value as JSON on one line, for streams.
    pub(crate) fn value_line(&self, value: &impl Serialize) -> Result<(), Failure> {
        self.line(&serde_json::to_string(value).expect("the API's types have string keys only"))
    }

    /// Writes a list: JSON, or a table of rows.
    pub(crate) fn list<T: Serialize>(
        &self,
        items: &[T],
        headers: &[&str],
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<(), Failure> {
        if self.json {
            return self.value(&items);
        }
        self.text(&table(headers, &items.iter().map(row).collect::<Vec<_>>()))
    }

    /// Says something that is no data. Cannot fail: there is nobody left to tell.
    pub(crate) fn note(&self, text: &str) {
        stderr(format!("{}\n", text.trim_end_matches('\n')).as_bytes());
    }

    /// Asks a yes-or-no question; no answer is no.
    pub(crate) fn confirm(&self, question: &str) -> bool {
        stderr(format!("{question} [y/N] ").as_bytes());
        let mut answer = String::new();
        let _ = io::stdin().read_line(&mut answer);
        matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
    }
}

/// Writes bytes to standard output at once.
pub(crate) fn stdout(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| stdout_failed(&e))
}

/// Writes bytes to standard error at once, if it is still there.
pub(crate) fn stderr(bytes: &[u8]) {
    let mut out = io::stderr().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// A table without borders, columns three spaces apart, no white space at the ends of lines.
pub(crate) fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headers);
    for row in rows {
        // A cell is one line: a message with line breaks would tear the table.
        table.add_row(row.iter().map(|cell| cell.replace(['\n', '\r', '\t'], " ")));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3)).set_cell_alignment(CellAlignment::Left);
    }
    let mut out = String::new();
    for line in table.to_string().lines() {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Now, by this machine's clock.
pub(crate) fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// An age in its largest unit: `5s`, `3m`, `2h`, `4d`.
pub(crate) fn age(since: UnixMillis, now: UnixMillis) -> String {
    if since.0 == 0 {
        return "-".into();
    }
    span(now.since_ms(since) / 1000)
}

/// A time span of whole seconds in its largest unit.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        s if s < 120 => format!("{s}s"),
        s if s < 2 * 3_600 => format!("{}m", s / 60),
        s if s < 2 * 86_400 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

/// Bytes in a unit that keeps at most four digits: `512MiB`, `1.5GiB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 10.0 && value.fract() >= 0.05 {
        format!("{value:.1}{}", UNITS[unit])
    } else {
        format!("{value:.0}{}", UNITS[unit])
    }
}

/// CPUs from billionths: `2`, `0.5`.
pub(crate) fn cpus(nano: u64) -> String {
    format!("{}", (nano as f64 / 1e7).round() / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables() {
        let rows =
            [vec!["web.1".into(), "dc1-a".into(), "running".into()], vec!["ü".into(), String::new(), "a\nb".into()]];
        assert_eq!(
            table(&["NAME", "NODE", "STATE"], &rows),
            "NAME    NODE    STATE\nweb.1   dc1-a   running\nü               a b\n"
        );
        assert_eq!(table(&["NAME"], &[]), "NAME\n");
    }

    #[test]
    fn units() {
        let check = |got: String, expected: &str| assert_eq!(got, expected);
        check(age(UnixMillis(1_000), UnixMillis(91_500)), "90s");
        check(age(UnixMillis(1_000), UnixMillis(500)), "0s");
        check(age(UnixMillis(0), UnixMillis(500)), "-");
        check(span(600), "10m");
        check(span(7_200), "2h");
        check(span(400_000), "4d");
        check(bytes(0), "0B");
        check(bytes(512 << 20), "512MiB");
        check(bytes(3 << 29), "1.5GiB");
        check(bytes(2 << 30), "2GiB");
        check(cpus(500_000_000), "0.5");
        check(cpus(2_000_000_000), "2");
    }
}

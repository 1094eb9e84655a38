//! Where the rows of a benchmark go: a JSON file, and its part of `docs/benchmarks.md`.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::rows::{Row, table};

/// What stands above the first benchmark.
const HEAD: &str = "# Benchmarks

Written by `cargo xtask bench NAME`, each part anew by its own run; `--json FILE` gives the same rows to programs.
";

/// Writes the rows as a JSON list.
///
/// # Errors
/// The file cannot be written.
pub fn write_json(path: &Path, rows: &[Row]) -> Result<()> {
    let text = serde_json::to_string_pretty(rows)? + "\n";
    fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}

/// Replaces the part of `name` in the page, or adds it at the end. `notes` are paragraphs below the table: what the
/// figures mean, and where the time goes where a goal was missed.
///
/// # Errors
/// The file cannot be read or written.
pub fn write_docs(page: &Path, name: &str, title: &str, rows: &[Row], notes: &[String]) -> Result<()> {
    let text = match fs::read_to_string(page) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => HEAD.to_owned(),
        Err(e) => return Err(e).with_context(|| format!("failed to read {}", page.display())),
    };
    let mut part = format!("## {title}\n\n{}\n\n{}", machine(), table(rows));
    for note in notes {
        part.push_str(&format!("\n{note}\n"));
    }
    fs::write(page, replaced(&text, name, &part)).with_context(|| format!("failed to write {}", page.display()))
}

/// The text with the part between this benchmark's marks replaced.
fn replaced(text: &str, name: &str, part: &str) -> String {
    let (begin, end) = (format!("<!-- bench {name} -->\n"), format!("<!-- end of bench {name} -->\n"));
    let whole = format!("{begin}\n{part}\n{end}");
    let found = text.find(&begin).and_then(|from| Some((from, from + text[from..].find(&end)? + end.len())));
    match found {
        Some((from, to)) => format!("{}{whole}{}", &text[..from], &text[to..]),
        None => format!("{}\n{whole}", text.trim_end().to_owned() + "\n"),
    }
}

/// The machine and the day, in one line.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let memory = field(&read("/proc/meminfo"), "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    let kernel = read("/proc/sys/kernel/osrelease");
    let memory_gib = memory.unwrap_or_default() >> 20;
    format!("{cores} cores ({cpu}), {memory_gib} GiB, Linux {}.", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_benchmark_replaces_its_own_part_only() {
        let one = replaced("# Page\n", "a", "first\n");
        let two = replaced(&one, "b", "second\n");
        let three = replaced(&two, "a", "third\n");
        let expected = "# Page\n\n<!-- bench a -->\n\nthird\n\n<!-- end of bench a -->\n\n\
                        <!-- bench b -->\n\nsecond\n\n<!-- end of bench b -->\n";
        assert_eq!(three, expected);
        assert_eq!(replaced(&three, "a", "third\n"), three);
    }
}

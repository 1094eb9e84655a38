//! Where something stands in a user's files, and how a problem with it is shown.
//!
//! Owns source texts, positions and the one format of errors and warnings. Must not know what the texts mean.

use std::fmt::{self, Write as _};

/// A place in one of the [`Sources`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pos {
    /// Index of the file in the order in which it was added.
    pub file: usize,
    /// Line, from 1; 0 means the file as a whole.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// The files that were read: their names as users know them, and their text.
#[derive(Debug, Default)]
pub struct Sources {
    files: Vec<(String, String)>,
}

impl Sources {
    /// Adds a file; positions in it use the index that is returned.
    pub fn add(&mut self, name: &str, text: &str) -> usize {
        self.files.push((name.to_owned(), text.to_owned()));
        self.files.len() - 1
    }

    /// Name of a file.
    pub fn name(&self, file: usize) -> &str {
        self.files.get(file).map_or("?", |(name, _)| name)
    }

    /// Text of a file.
    pub fn text(&self, file: usize) -> &str {
        self.files.get(file).map_or("", |(_, text)| text)
    }

    fn line(&self, pos: Pos) -> Option<&str> {
        self.text(pos.file).lines().nth(pos.line.checked_sub(1)?)
    }
}

/// One thing that is wrong, or that the user should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where; none when it is about no single place.
    pub at: Option<Pos>,
    /// What, lower case.
    pub message: String,
    /// More places that belong to it, each with its own words: the edges of a cycle.
    pub notes: Vec<(Pos, String)>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem at a place.
    pub fn at(pos: Pos, message: impl Into<String>) -> Self {
        Self { at: Some(pos), message: message.into(), notes: Vec::new(), hint: None }
    }

    /// A problem of no single place.
    pub fn general(message: impl Into<String>) -> Self {
        Self { at: None, message: message.into(), notes: Vec::new(), hint: None }
    }

    /// The same with a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Shows it for people: `<severity>: <message>`, the place with its source line and a caret, notes, hint.
    pub fn render(&self, severity: &str, sources: &Sources) -> String {
        let mut out = format!("{severity}: {}\n", self.message);
        if let Some(pos) = self.at {
            place(&mut out, pos, sources, "");
        }
        for (pos, note) in &self.notes {
            place(&mut out, *pos, sources, note);
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(out, "hint: {hint}");
        }
        out
    }
}

/// Longest part of a source line that is shown.
const LINE_CHARS_MAX: usize = 160;

fn place(out: &mut String, pos: Pos, sources: &Sources, note: &str) {
    let note = if note.is_empty() { String::new() } else { format!(": {note}") };
    let name = sources.name(pos.file);
    let Some(line) = sources.line(pos) else {
        // Behind the last line, where a parser notices that something was not closed.
        let place = if pos.line > 0 { format!(":{}:{}", pos.line, pos.column) } else { String::new() };
        let _ = writeln!(out, "  at {name}{place}{note}");
        return;
    };
    let _ = writeln!(out, "  at {name}:{}:{}{note}", pos.line, pos.column);
    let shown: String =
        line.chars().take(LINE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    let gutter = pos.line.to_string();
    let _ = writeln!(out, "  {gutter} | {}", shown.trim_end());
    if pos.column <= LINE_CHARS_MAX {
        let _ = writeln!(out, "  {:1$} | {2:3$}^", "", gutter.len(), "", pos.column - 1);
    }
}

/// Everything that is wrong with a compose file; at least one problem.
#[derive(Debug)]
pub struct ComposeError {
    /// What is wrong, in the order of the file.
    pub problems: Vec<Problem>,
    /// The texts that the positions are about.
    pub sources: Sources,
}

/// Problems shown at most: more than a screen helps nobody.
const PROBLEMS_SHOWN_MAX: usize = 20;

impl fmt::Display for ComposeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in self.problems.iter().take(PROBLEMS_SHOWN_MAX) {
            f.write_str(&problem.render("error", &self.sources))?;
        }
        match self.problems.len().saturating_sub(PROBLEMS_SHOWN_MAX) {
            0 => Ok(()),
            more => writeln!(f, "error: and {more} more"),
        }
    }
}

impl std::error::Error for ComposeError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rendering() {
        let mut sources = Sources::default();
        let file = sources.add("a.yml", "one\n\tüb: x\n");
        let pos = |line, column| Pos { file, line, column };
        let mut problem = Problem::at(pos(2, 6), "bad value").hint("write y");
        problem.notes.push((pos(1, 1), "seen here".into()));
        assert_eq!(
            problem.render("error", &sources),
            "error: bad value\n  at a.yml:2:6\n  2 |  üb: x\n    |      ^\n  at a.yml:1:1: seen here\n  1 | one\n    | ^\nhint: write y\n"
        );
        assert_eq!(Problem::at(pos(0, 0), "empty").render("warning", &sources), "warning: empty\n  at a.yml\n");
    }
}

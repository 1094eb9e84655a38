//! Checks on the text of a single file: module docs, length, white space, links.
//!
//! Must not know which files there are; links are the one thing looked up on disk.

use std::path::Path;

use super::Finding;

/// Lines that a Rust file may have: one screen of an outline, one reading.
const LINES_MAX: usize = 800;

/// Files that may be longer, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// A Rust file opens with its module doc, before anything else.
pub(super) fn check_module_doc(path: &Path, text: &str) -> Option<Finding> {
    let good = text.lines().next().is_some_and(|line| line.starts_with("//! ") && line.len() > "//! ".len());
    (!good).then(|| Finding::new(path, 1, "does not open with a `//!` line that says what the module owns"))
}

/// A Rust file has at most [`LINES_MAX`] lines.
pub(super) fn check_length(path: &Path, text: &str) -> Option<Finding> {
    let lines = text.lines().count();
    if lines <= LINES_MAX || LONG_FILES.iter().any(|(long, _reason)| path == Path::new(long)) {
        return None;
    }
    Some(Finding::new(path, 0, format!("has {lines} lines, more than {LINES_MAX}: split it by meaning")))
}

/// No tabs, no carriage returns, nothing behind the end of a line, a line end at the end of the file.
pub(super) fn check_whitespace(path: &Path, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in text.split('\n').enumerate() {
        let problem = if line.contains('\r') {
            "carriage return"
        } else if line.contains('\t') {
            "tab"
        } else if line.ends_with(' ') {
            "white space at the end of the line"
        } else {
            continue;
        };
        findings.push(Finding::new(path, index + 1, problem));
    }
    if !text.is_empty() && !text.ends_with('\n') {
        findings.push(Finding::new(path, 0, "no line end at the end of the file"));
    }
    findings
}

/// Links of a Markdown file into the repository lead somewhere.
pub(super) fn check_links(root: &Path, path: &Path, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut fenced = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for target in link_targets(line) {
            let file = target.split('#').next().unwrap_or_default();
            let elsewhere = file.contains("://") || file.starts_with("mailto:");
            if file.is_empty() || elsewhere {
                continue;
            }
            let full = match file.strip_prefix('/') {
                Some(from_root) => root.join(from_root),
                None => root.join(path).parent().unwrap_or(root).join(file),
            };
            if !full.exists() {
                findings.push(Finding::new(path, index + 1, format!("link to {file}, which does not exist")));
            }
        }
    }
    findings
}

/// Targets of `[text](target)`, `[text](target "title")` and `[label]: target`, outside of code spans.
fn link_targets(line: &str) -> Vec<String> {
    // The odd parts between back quotes are code.
    let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
    let mut targets = Vec::new();
    let mut rest = prose.as_str();
    while let Some(start) = rest.find("](") {
        rest = &rest[start + 2..];
        let end = rest.find([')', ' ']).unwrap_or(rest.len());
        targets.push(rest[..end].trim_matches(['<', '>']).to_owned());
    }
    if prose.starts_with('[')
        && let Some((_, target)) = prose.split_once("]: ")
    {
        targets.extend(target.split_whitespace().next().map(str::to_owned));
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path() -> &'static Path {
        Path::new("docs/a.md")
    }

    #[test]
    fn module_docs() {
        assert_eq!(check_module_doc(path(), "//! Owns this.\nuse x;\n"), None);
        for bad in ["", "use x;\n", "// Owns this.\n", "\n//! Late.\n", "//!\n", "//! \n", "#![allow(x)]\n//! Late.\n"]
        {
            assert!(check_module_doc(path(), bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn length() {
        assert_eq!(check_length(path(), &"x\n".repeat(LINES_MAX)), None);
        let finding = check_length(path(), &"x\n".repeat(LINES_MAX + 1)).unwrap();
        assert!(finding.message.contains("has 801 lines"), "{finding}");
    }

    #[test]
    fn white_space() {
        let check = |text: &str, expected: &[(usize, &str)]| {
            let found = check_whitespace(path(), text);
            let found: Vec<(usize, &str)> = found.iter().map(|f| (f.line, f.message.as_str())).collect();
            assert_eq!(found, expected, "{text:?}");
        };
        check("", &[]);
        check("a\n\n b\n", &[]);
        check("a \nb\tc\nd\r\n", &[(1, "white space at the end of the line"), (2, "tab"), (3, "carriage return")]);
        check("a", &[(0, "no line end at the end of the file")]);
    }

    #[test]
    fn links() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("docs")).unwrap();
        for name in ["README.md", "docs/a.md", "docs/b.md"] {
            std::fs::write(root.path().join(name), "").unwrap();
        }
        let broken = |text: &str| check_links(root.path(), path(), text).len();
        for good in [
            "[b](b.md) [up](../README.md#install) [root](/docs/b.md \"title\")",
            "[web](https://example.org/x) [here](#part) <mailto:a@b>",
            "`[code](gone.md)` and [real](b.md)",
            "```\n[code](gone.md)\n```",
            "[label]: b.md",
            "![picture](b.md)",
        ] {
            assert_eq!(broken(good), 0, "{good}");
        }
        for bad in ["[x](gone.md)", "[x](b.md) [y](../gone.md#z)", "[label]: gone.md", "```\n```\n[x](gone.md)"] {
            assert_eq!(broken(bad), 1, "{bad}");
        }
    }
}

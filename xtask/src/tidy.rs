//! Rules of this repository that no other tool checks: layout of files, inheritance of manifests, purity of the cores.
//!
//! Every check is a function from text to findings, with a good and a bad sample in its tests; this module reads the
//! files and prints. It changes nothing.

mod manifest;
mod purity;
mod text;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::{test, ui};

/// Something to correct.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// File, relative to the root of the repository.
    pub path: PathBuf,
    /// Line, counted from 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl Finding {
    fn new(path: &Path, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_path_buf(), line, message: message.into() }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path.display(), self.message),
            line => write!(f, "{}:{line}: {}", self.path.display(), self.message),
        }
    }
}

/// Directories that hold nothing of ours.
const SKIPPED_DIRS: &[&str] = &[".git", "target", "node_modules", ".vagrant"];

/// Directories of test input and stored output, which may be ugly on purpose.
const SAMPLE_DIRS: &[&str] = &["testdata", "fixtures", "samples", "snapshots"];

/// Runs every check on a repository and prints what it finds.
///
/// # Errors
/// When there are findings, or a file cannot be read.
pub fn run(root: &Path) -> anyhow::Result<()> {
    let findings = check(root)?;
    for finding in &findings {
        ui::note(&finding.to_string());
    }
    if !findings.is_empty() {
        bail!("failed to find everything tidy: {} findings", findings.len());
    }
    Ok(())
}

/// Every finding in a repository, by path and line.
///
/// # Errors
/// When a file cannot be read, or cargo metadata fails.
pub fn check(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let mut files = Vec::new();
    walk(root, Path::new(""), &mut files)?;
    let mut findings = Vec::new();
    for path in &files {
        check_file(root, path, &mut findings)?;
    }
    findings.extend(purity::check_dependencies(&test::metadata(root)?)?);
    findings.sort();
    Ok(findings)
}

fn check_file(root: &Path, path: &Path, findings: &mut Vec<Finding>) -> anyhow::Result<()> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !["rs", "md", "toml", "yml", "yaml"].contains(&extension) || is_sample(path) {
        return Ok(());
    }
    let content = std::fs::read(root.join(path)).with_context(|| format!("failed to read {}", path.display()))?;
    let Ok(content) = String::from_utf8(content) else {
        findings.push(Finding::new(path, 0, "is not UTF-8"));
        return Ok(());
    };
    findings.extend(text::check_whitespace(path, &content));
    match extension {
        "rs" => {
            findings.extend(text::check_module_doc(path, &content));
            findings.extend(text::check_length(path, &content));
            if purity::is_core_source(path) {
                findings.extend(purity::check_source(path, &content));
            }
        }
        "md" => findings.extend(text::check_links(root, path, &content)),
        "toml" if path.file_name().is_some_and(|name| name == "Cargo.toml") && path.components().count() > 1 => {
            findings.extend(manifest::check(path, &content));
        }
        _ => {}
    }
    Ok(())
}

fn is_sample(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str().to_str().is_some_and(|name| SAMPLE_DIRS.contains(&name)))
}

/// Every file below `root/dir`, relative to the root. Symbolic links are not followed.
fn walk(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let full = root.join(dir);
    let entries = std::fs::read_dir(&full).with_context(|| format!("failed to list {}", full.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("failed to list {}", full.display()))?;
        let name = entry.file_name();
        let path = dir.join(&name);
        let kind = entry.file_type().with_context(|| format!("failed to look at {}", path.display()))?;
        if kind.is_file() {
            files.push(path);
        } else if kind.is_dir() && !name.to_str().is_some_and(|name| SKIPPED_DIRS.contains(&name)) {
            walk(root, &path, files)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_leaves_out_what_is_not_ours_and_samples_are_known() {
        let root = tempfile::tempdir().unwrap();
        for path in ["a/x.rs", "target/y.rs", ".git/z.rs", "a/testdata/w.rs", ".ci/run"] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let mut files = Vec::new();
        walk(root.path(), Path::new(""), &mut files).unwrap();
        files.sort();
        assert_eq!(files, [".ci/run", "a/testdata/w.rs", "a/x.rs"].map(PathBuf::from));
        assert!(is_sample(Path::new("a/testdata/w.rs")));
        assert!(!is_sample(Path::new("a/x.rs")));
    }

    #[test]
    fn a_file_is_given_to_the_checks_of_its_kind() {
        let root = tempfile::tempdir().unwrap();
        let check = |path: &str, content: &str| {
            let full = root.path().join(path);
            std::fs::create_dir_all(full.parent().unwrap()).unwrap();
            std::fs::write(full, content).unwrap();
            let mut findings = Vec::new();
            check_file(root.path(), Path::new(path), &mut findings).unwrap();
            findings.len()
        };
        assert_eq!(check("a/src/lib.rs", "//! Docs.\n"), 0);
        assert_eq!(check("a/src/lib.rs", "fn f() {}\n"), 1);
        assert_eq!(check("master/core/src/lib.rs", "//! Docs.\nuse std::fs;\n"), 1);
        assert_eq!(check("a/README.md", "[gone](gone.md)\n"), 1);
        assert_eq!(check("a/Cargo.toml", "[package]\nname = \"a\"\n"), 6);
        assert_eq!(check("a/picture.svg", "trailing \n"), 0);
        assert_eq!(check("a/testdata/bad.rs", "trailing \n"), 0);
    }

    #[test]
    fn findings_read_like_a_compilers() {
        assert_eq!(Finding::new(Path::new("a.rs"), 3, "is wrong").to_string(), "a.rs:3: is wrong");
        assert_eq!(Finding::new(Path::new("a.rs"), 0, "is wrong").to_string(), "a.rs: is wrong");
    }
}

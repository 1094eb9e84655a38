//! The file system of an image, first as a list, then as a directory.
//!
//! A recipe fills a [`Rootfs`]; nothing is written before it is known that the cache lacks the image. Knows nothing of
//! image formats. No tasks, no channels.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::super::find_program;
use super::super::process::run;

/// Directories that are links on machines with one tree of programs; an image gets the same links.
const MAYBE_LINKS: [&str; 4] = ["/bin", "/sbin", "/lib", "/lib64"];

/// Owner of what is not root's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// One entry of the file system.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    Directory {
        mode: u32,
        owner: Option<Owner>,
    },
    Link(PathBuf),
    Text {
        text: String,
        mode: u32,
    },
    /// Copy of a file of this machine.
    File(PathBuf),
}

/// What is done to the written tree at last, with the tree's path; it may run programs.
type Finish = Box<dyn Fn(&Path) -> Result<()>>;

/// A file system by path inside the image.
#[derive(Default)]
pub(super) struct Rootfs {
    pub(super) entries: BTreeMap<PathBuf, Entry>,
    /// Last step and a text that changes with what it does, for the digest.
    pub(super) finish: Option<(String, Finish)>,
}

impl Rootfs {
    /// The frame every image has: names, temporary directories, links of the machine's layout.
    pub(super) fn base(&mut self) {
        for link in MAYBE_LINKS {
            if let Ok(target) = fs::read_link(link) {
                self.link(target, link);
            }
        }
        for (path, mode) in [("/tmp", 0o1777), ("/var/tmp", 0o1777), ("/root", 0o700), ("/run", 0o755)] {
            self.directory(path, mode, None);
        }
        self.link("/run", "/var/run");
        self.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n", 0o644);
        self.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644);
        self.text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\nservices: files\n", 0o644);
    }

    pub(super) fn directory(&mut self, path: impl AsRef<Path>, mode: u32, owner: Option<Owner>) {
        self.entries.insert(path.as_ref().to_owned(), Entry::Directory { mode, owner });
    }

    pub(super) fn link(&mut self, target: impl AsRef<Path>, path: impl AsRef<Path>) {
        self.entries.insert(path.as_ref().to_owned(), Entry::Link(target.as_ref().to_owned()));
    }

    pub(super) fn text(&mut self, path: impl AsRef<Path>, text: impl Into<String>, mode: u32) {
        self.entries.insert(path.as_ref().to_owned(), Entry::Text { text: text.into(), mode });
    }

    /// A file of this machine at another place. Links are followed.
    pub(super) fn file_as(&mut self, source: impl AsRef<Path>, path: impl AsRef<Path>) {
        self.entries.insert(path.as_ref().to_owned(), Entry::File(source.as_ref().to_owned()));
    }

    /// A file of this machine at its own place, if there is one.
    pub(super) fn file_if_there(&mut self, path: &str) {
        if Path::new(path).is_file() {
            self.file_as(path, path);
        }
    }

    /// A tree of this machine at its own place, without what `keep` refuses.
    pub(super) fn tree(&mut self, dir: &Path, keep: &dyn Fn(&Path) -> bool) -> Result<()> {
        let entries = fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("failed to list {}", dir.display()))?.path();
            if !keep(&path) {
                continue;
            }
            if path.is_dir() {
                self.tree(&path, keep)?;
            } else if path.is_file() {
                self.file_as(&path, &path);
            }
        }
        Ok(())
    }

    /// A program by name, found as in a shell, with its libraries.
    pub(super) fn program(&mut self, name: &str, package: &str) -> Result<()> {
        let path = find_program(name)
            .with_context(|| format!("failed to find the program {name}\nhint: apt-get install {package}"))?;
        self.programs(&[path])
    }

    /// Programs or libraries of this machine at their own places, with everything `ldd(1)` names.
    pub(super) fn programs(&mut self, paths: &[PathBuf]) -> Result<()> {
        for path in paths {
            self.file_as(path, real_place(path));
        }
        for library in libraries(paths)? {
            self.file_as(&library, real_place(&library));
        }
        Ok(())
    }

    /// Writes everything below an empty directory.
    pub(super) fn write_to(&self, dir: &Path) -> Result<()> {
        fs::create_dir(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("failed to set the mode of {}", dir.display()))?;
        // Shorter paths come first, so that /lib is a link before anything is put below it.
        for (path, entry) in &self.entries {
            let target = dir.join(path.strip_prefix("/").unwrap_or(path));
            write(&target, entry).with_context(|| format!("failed to write {}", path.display()))?;
        }
        match &self.finish {
            Some((_, finish)) => finish(dir),
            None => Ok(()),
        }
    }
}

fn write(target: &Path, entry: &Entry) -> Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).context("failed to create its directory")?;
    }
    match entry {
        Entry::Directory { mode, owner } => {
            fs::create_dir_all(target)?;
            if let Some(Owner { uid, gid }) = owner {
                chown(target, Some(*uid), Some(*gid))?;
            }
            fs::set_permissions(target, fs::Permissions::from_mode(*mode))?;
        }
        Entry::Link(to) => symlink(to, target)?,
        Entry::Text { text, mode } => {
            fs::write(target, text)?;
            fs::set_permissions(target, fs::Permissions::from_mode(*mode))?;
        }
        // Copies the mode too, and follows links.
        Entry::File(source) => {
            fs::copy(source, target).with_context(|| format!("failed to copy {}", source.display()))?;
        }
    }
    Ok(())
}

/// The same path with its directory's links followed (`/lib/x` → `/usr/lib/x`), the last part kept: a library is
/// asked for by its soname, not by the file behind it.
fn real_place(path: &Path) -> PathBuf {
    let parent = path.parent().and_then(|parent| fs::canonicalize(parent).ok());
    match (parent, path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// All libraries of programs, the dynamic linker included. Nothing for static ones.
fn libraries(paths: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    if paths.is_empty() {
        return Ok(BTreeSet::new());
    }
    let output = Command::new("ldd").args(paths).output().context("failed to start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // ldd exits with 1 when one of the files is static; that is said on standard output and no failure here.
    let (found, missing) = parse_ldd(&text);
    ensure!(missing.is_empty(), "failed to find the libraries {} of {paths:?}", missing.join(", "));
    Ok(found)
}

/// Lines are `name => /path (0x…)`, `/path (0x…)`, `name (0x…)` (in the kernel) or `name => not found`.
fn parse_ldd(text: &str) -> (BTreeSet<PathBuf>, Vec<String>) {
    let (mut found, mut missing) = (BTreeSet::new(), Vec::new());
    for line in text.lines().filter(|line| line.starts_with(char::is_whitespace)) {
        let (name, place) = line.trim().split_once(" => ").unwrap_or(("", line.trim()));
        let place = place.split(" (0x").next().unwrap_or_default();
        if place == "not found" {
            missing.push(name.to_owned());
        } else if Path::new(place).is_absolute() {
            found.insert(tidy_path(Path::new(place)));
        }
    }
    (found, missing)
}

/// Without `..` and `.`: programs with a relative search path have their libraries shown so.
fn tidy_path(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(tidy.pop()),
            Component::CurDir => {}
            part => tidy.push(part),
        }
    }
    tidy
}

/// Runs a command whose output nobody reads.
pub(super) fn quietly(command: &mut Command) -> Result<()> {
    run(command).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output() {
        let text = "\
/usr/bin/a:
\tlinux-vdso.so.1 (0x00007ffc)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f)
\tlibodd.so => /opt/x/bin/../lib/libodd.so (0x00007f)
\tlibgone.so.1 => not found
/usr/bin/b:
\tstatically linked
";
        let (found, missing) = parse_ldd(text);
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2", "/opt/x/lib/libodd.so"];
        assert_eq!(found, expected.iter().map(PathBuf::from).collect());
        assert_eq!(missing, ["libgone.so.1"]);
    }

    #[test]
    fn a_tree_is_written_with_modes_and_links() {
        let mut root = Rootfs::default();
        root.directory("/tmp", 0o1777, None);
        root.text("/etc/x", "y", 0o640);
        root.link("x", "/etc/z");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tree = dir.path().join("rootfs");
        root.write_to(&tree).expect("written");
        assert_eq!(fs::read_to_string(tree.join("etc/z")).expect("the link leads to x"), "y");
        let mode = |path: &str| fs::metadata(tree.join(path)).expect("it is there").permissions().mode() & 0o7777;
        assert_eq!((mode("tmp"), mode("etc/x")), (0o1777, 0o640));
    }
}

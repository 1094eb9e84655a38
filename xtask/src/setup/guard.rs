//! What is changed on the host only for as long as packages are being installed: files put in place and taken away
//! again, signals held back meanwhile, one set-up at a time.
//!
//! Must not know what is installed. It survives its own crash: every file carries [`MARKER`], and the next set-up
//! restores what the last one left.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::emulate_default_handler;

/// First words of every temporary file, by which a left-over is known.
pub const MARKER: &str = "# put here by skein's set-up for as long as it installs packages";

/// Suffix of a file of the host that had to make room.
const SAVED_SUFFIX: &str = ".skein-saved";

/// A file that exists for as long as this value does. What stood in its place comes back afterwards.
#[derive(Debug)]
pub struct TemporaryFile {
    path: PathBuf,
    /// Directories that did not exist before, innermost first.
    created_dirs: Vec<PathBuf>,
}

impl TemporaryFile {
    /// Puts `contents`, after the marker, at `path`. `first_line` stands before the marker (a `#!` must).
    /// Restores first what a crashed set-up left.
    ///
    /// # Errors
    /// I/O errors; nothing is changed then.
    pub fn put(path: &Path, first_line: &str, contents: &str, mode: u32) -> io::Result<Self> {
        recover(path)?;
        let mut created_dirs = Vec::new();
        if let Some(parent) = path.parent() {
            created_dirs = parent.ancestors().take_while(|dir| !dir.exists()).map(Path::to_path_buf).collect();
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        // From here on the value's drop undoes what was done.
        let file = Self { path: path.to_path_buf(), created_dirs };
        if path.symlink_metadata().is_ok() {
            std::fs::rename(path, saved(path))?;
        }
        let mut out = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        write!(out, "{first_line}{MARKER}\n{contents}")?;
        Ok(file)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // Errors have nowhere to go, and the next set-up tries again.
        let _ = recover(&self.path);
        for dir in &self.created_dirs {
            let _ = std::fs::remove_dir(dir); // fails, rightly, when something else lives there by now
        }
    }
}

/// Takes away a temporary file at `path` and brings back what it replaced. Does nothing where there is neither.
///
/// # Errors
/// I/O errors other than "not found".
pub fn recover(path: &Path) -> io::Result<()> {
    if is_ours(path) {
        std::fs::remove_file(path)?;
    }
    let saved = saved(path);
    if saved.symlink_metadata().is_ok() && path.symlink_metadata().is_err() {
        std::fs::rename(saved, path)?;
    }
    Ok(())
}

/// Whether there is anything for [`recover`] to do at `path`.
pub fn holds_leftover(path: &Path) -> bool {
    is_ours(path) || saved(path).symlink_metadata().is_ok()
}

fn is_ours(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|text| text.windows(MARKER.len()).any(|window| window == MARKER.as_bytes()))
}

fn saved(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SAVED_SUFFIX);
    PathBuf::from(name)
}

/// Holds back SIGINT, SIGTERM and SIGHUP while it lives. A signal that comes meanwhile takes effect at its end, when
/// everything is restored. Programs started meanwhile get them as usual (handlers, unlike a signal mask, are not
/// inherited): Ctrl-C at a terminal ends the installation itself, and this process follows.
#[derive(Debug)]
pub struct SignalsHeld {
    released: Arc<AtomicBool>,
    /// Number of the last signal that came, 0 for none.
    caught: Arc<AtomicUsize>,
}

impl SignalsHeld {
    /// Starts holding.
    ///
    /// # Errors
    /// As sigaction(2).
    pub fn try_hold() -> io::Result<Self> {
        let held = Self { released: Arc::default(), caught: Arc::default() };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // Handlers stay for the rest of the process, so the default has to be acted out after the release.
            flag::register_conditional_default(signal, Arc::clone(&held.released))?;
            let number = usize::try_from(signal).expect("signal numbers are positive");
            flag::register_usize(signal, Arc::clone(&held.caught), number)?;
        }
        Ok(held)
    }
}

impl Drop for SignalsHeld {
    fn drop(&mut self) {
        self.released.store(true, Ordering::SeqCst);
        match i32::try_from(self.caught.load(Ordering::SeqCst)) {
            Ok(0) | Err(_) => {}
            Ok(signal) => {
                let _ = emulate_default_handler(signal); // ends the process; an error means it goes on
            }
        }
    }
}

/// Waits until no other set-up runs on this host; holds until dropped, or until the process ends in whatever way.
///
/// # Errors
/// I/O errors on the lock file.
pub fn lock(path: &Path, on_wait: impl FnOnce()) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            on_wait();
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_file_and_its_directories_vanish() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/policy");
        let file = TemporaryFile::put(&path, "#!/bin/sh\n", "exit 101\n", 0o755).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("#!/bin/sh\n# put here by skein"), "{text}");
        assert!(text.ends_with("\nexit 101\n"));
        let status = std::process::Command::new(&path).status().unwrap();
        assert_eq!(status.code(), Some(101));
        drop(file);
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn the_hosts_own_file_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy");
        std::fs::write(&path, "theirs").unwrap();
        let file = TemporaryFile::put(&path, "", "ours", 0o644).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("ours"));
        drop(file);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_crash_is_repaired_by_the_next_set_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy");
        std::fs::write(&path, "theirs").unwrap();
        std::mem::forget(TemporaryFile::put(&path, "", "ours", 0o644).unwrap());
        drop(TemporaryFile::put(&path, "", "ours again", 0o644).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
    }

    #[test]
    fn a_crash_between_the_two_steps_is_repaired_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy");
        std::fs::write(saved(&path), "theirs").unwrap();
        recover(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
    }

    #[test]
    fn a_file_of_the_host_is_not_taken_for_a_left_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy");
        std::fs::write(&path, "theirs").unwrap();
        recover(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
    }

    #[test]
    fn the_lock_is_exclusive_and_ends_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock(&path, || panic!("nobody holds it")).unwrap();
        let second = OpenOptions::new().write(true).open(&path).unwrap();
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        second.try_lock().unwrap();
    }
}

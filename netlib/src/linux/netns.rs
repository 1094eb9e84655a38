//! Owns namespaces as files: making, pinning, entering and removing them.
//!
//! A namespace lives as long as its bind mount, so it survives any end of the process. Threads that enter one are
//! started for that and end right after: no thread of a runtime is ever in a foreign namespace.
//! It knows nothing of what is inside. No tasks, no channels.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};

/// The calling thread's own namespace. `/proc/self` would be the main thread's.
const OWN_NS: &str = "/proc/thread-self/ns/net";
/// Threads here do a system call or start a tool: 256 KiB is plenty.
const STACK_BYTES: usize = 256 * 1024;

/// Opens the calling thread's namespace.
pub(super) fn own() -> io::Result<File> {
    File::open(OWN_NS)
}

/// Runs `work` on a thread of its own, after `enter` has put it where it belongs.
fn on_thread<T: Send>(
    enter: impl FnOnce() -> io::Result<()> + Send,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let body = move || enter().and_then(|()| work());
        let worker = thread::Builder::new().name("netns".into()).stack_size(STACK_BYTES).spawn_scoped(scope, body)?;
        worker.join().map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    })
}

/// Runs `work` inside a namespace. What it opens stays there; processes it starts run there.
pub(super) fn run_in<T: Send>(ns: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_thread(|| Ok(setns(ns, CloneFlags::CLONE_NEWNET)?), work)
}

/// Runs `work` inside an empty namespace that ends with it.
pub(super) fn run_in_new<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_thread(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?), work)
}

/// Whether a file is a pinned namespace, not what a crash between creating and mounting left behind.
fn is_pinned(path: &Path) -> io::Result<bool> {
    match File::open(path) {
        Ok(file) => Ok(fstatfs(file.as_fd())?.filesystem_type() == NSFS_MAGIC),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens a pinned namespace; `None` if there is none.
pub(super) fn open(path: &Path) -> io::Result<Option<File>> {
    if is_pinned(path)? { File::open(path).map(Some) } else { Ok(None) }
}

/// Makes and pins a namespace unless it is there. Answers whether it was made.
pub(super) fn create(path: &Path) -> io::Result<bool> {
    if is_pinned(path)? {
        return Ok(false);
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    on_thread(
        || Ok(unshare(CloneFlags::CLONE_NEWNET)?),
        || Ok(mount(Some(OWN_NS), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?),
    )?;
    Ok(true)
}

/// Removes a pin. The namespace itself goes when nothing else holds it.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    if is_pinned(path)? {
        umount2(path, MntFlags::MNT_DETACH)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

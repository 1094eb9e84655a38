//! The lock on a data directory, waited for: a process that was killed gives its locks back only when the kernel has
//! taken its memory apart, and whoever starts the next one at once need not know that.

use std::{
    fs::{File, TryLockError},
    io, thread,
    time::{Duration, Instant},
};

/// How long a killed predecessor may take to go.
const WAIT: Duration = Duration::from_secs(2);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// Locks a file exclusively (flock(2)); `false` when another process still has it after two seconds. Blocks meanwhile.
///
/// # Errors
/// What the kernel says but that the file is locked.
pub fn lock_soon(file: &File) -> io::Result<bool> {
    let deadline = Instant::now() + WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(PAUSE),
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_predecessor_that_is_going_is_waited_for_and_one_that_stays_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let first = File::create(&path).expect("a file");
        let second = File::create(&path).expect("a file");
        assert!(lock_soon(&first).expect("locks"));
        assert!(!lock_soon(&second).expect("says so"));
        let going = thread::spawn(move || {
            thread::sleep(Duration::from_millis(150));
            drop(first);
        });
        assert!(lock_soon(&second).expect("locks"));
        going.join().expect("no panic");
    }
}

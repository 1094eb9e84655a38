//! The wall clock and the randomness of a simulation.
//!
//! Owns: `clock_gettime` and `getrandom` of this test program, which take the place of the C library's. On the thread of a
//! simulation the wall clock is the simulation's, as far off as each host's clock is, and randomness comes from its seed:
//! ids, jitter, the order of hash maps; ring, which makes keys, asks the kernel itself. On every other thread (the store's writer, the pool for blocking calls) both
//! are the system's. Monotonic time needs nothing: tokio's clock is paused on the hosts of a simulation.
//!
//! The crate mad-turmoil does the same for the whole process, which is too much here: a thread with a runtime of its own,
//! as the store has, overflows its stack in its `clock_gettime`; other threads read a clock that stands at 1970; and no
//! host's clock can differ from another's.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::runtime::{Handle, Id};

/// When simulations begin: 1 January 2026.
const EPOCH: Duration = Duration::from_secs(1_767_225_600);

/// How far a host's wall clock is ahead of the simulation's, seconds. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock(Rc<Cell<i64>>);

impl Clock {
    /// Moves the clock by that many seconds.
    pub(crate) fn jump(&self, seconds: i64) {
        self.0.set(self.0.get() + seconds);
    }

    /// The clock shows the right time again.
    pub(crate) fn correct(&self) {
        self.0.set(0);
    }

    /// Makes it the clock of the host that calls. A restarted host calls again.
    pub(crate) fn install(&self) {
        let runtime = Handle::current().id();
        MACHINE.with_borrow_mut(|m| m.as_mut().map(|m| m.clocks.push((runtime, self.clone()))));
    }
}

struct Machine {
    seed: u64,
    /// Of this host in this millisecond: what one host draws does not change what others, or it later, will.
    rng: StdRng,
    moment: (Option<Id>, u128),
    /// For scenarios alone.
    choices: StdRng,
    /// Of each runtime that there was. No hash map: its order would be drawn before there is a seed.
    clocks: Vec<(Id, Clock)>,
    /// Simulated time when it was last seen: outside of hosts there is none.
    elapsed: Duration,
}

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

/// Makes the calling thread that of a simulation. For good: a simulation has a thread of its own.
pub(crate) fn begin(seed: u64) {
    let rng = StdRng::seed_from_u64(seed);
    let (moment, choices) = ((None, 0), rng.clone());
    MACHINE.set(Some(Machine { seed, rng, moment, choices, clocks: Vec::new(), elapsed: Duration::ZERO }));
}

/// A random number of the simulation, for scenarios.
pub(crate) fn below(bound: usize) -> usize {
    MACHINE.with_borrow_mut(|m| m.as_mut().expect("a simulation's thread").choices.random_range(0..bound))
}

/// Outside of hosts it is now this late.
pub(crate) fn passed(elapsed: Duration) {
    MACHINE.with_borrow_mut(|m| m.as_mut().expect("a simulation's thread").elapsed = elapsed);
}

/// Simulated time since the beginning.
pub(crate) fn elapsed() -> Duration {
    MACHINE
        .try_with(|m| {
            let mut machine = m.try_borrow_mut().ok()?;
            let machine = machine.as_mut()?;
            machine.elapsed = turmoil::sim_elapsed().unwrap_or(machine.elapsed);
            Some(machine.elapsed)
        })
        .ok()
        .flatten()
        .unwrap_or_default()
}

/// The wall clock of the host that runs on this thread; none on a thread that is no simulation's.
fn wall_clock() -> Option<Duration> {
    let simulated = MACHINE.try_with(|m| m.try_borrow().is_ok_and(|m| m.is_some())).unwrap_or(false);
    if !simulated {
        return None;
    }
    let now = EPOCH + elapsed();
    let runtime = Handle::try_current().ok().map(|h| h.id());
    let ahead = MACHINE.with_borrow(|m| {
        let (_, clock) = m.as_ref()?.clocks.iter().find(|(id, _)| Some(*id) == runtime)?;
        Some(clock.0.get())
    });
    let ahead = ahead.unwrap_or(0);
    let by = Duration::from_secs(ahead.unsigned_abs());
    Some(if ahead < 0 { now.saturating_sub(by) } else { now + by })
}

/// Fills from the seed; false on a thread that is no simulation's.
fn seeded(buffer: &mut [u8]) -> bool {
    let now = elapsed();
    let runtime = Handle::try_current().ok().map(|h| h.id());
    let fill = |m: &RefCell<Option<Machine>>| {
        let Ok(mut machine) = m.try_borrow_mut() else { return false };
        let Some(machine) = machine.as_mut() else { return false };
        let moment = (runtime, now.as_millis());
        if machine.moment != moment {
            let host = machine.clocks.iter().position(|(id, _)| Some(*id) == runtime).map_or(0, |i| i as u64 + 1);
            machine.moment = moment;
            machine.rng = StdRng::seed_from_u64(machine.seed ^ (now.as_millis() as u64) << 16 ^ host << 48);
        }
        machine.rng.fill_bytes(buffer);
        true
    };
    MACHINE.try_with(fill).unwrap_or(false)
}

/// clock_gettime(2). Takes the place of the C library's in this program.
///
/// # Safety
/// As of the C library's: `time` is valid for a write.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    let wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE).then(wall_clock).flatten();
    if let Some(now) = wall {
        let tv_sec = i64::try_from(now.as_secs()).expect("within some years of 2026");
        // SAFETY: the caller promises that `time` can be written.
        unsafe { time.write(libc::timespec { tv_sec, tv_nsec: i64::from(now.subsec_nanos()) }) };
        return 0;
    }
    // SAFETY: the call that the C library makes, with the caller's own arguments.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    libc::c_int::try_from(result).expect("0 or -1")
}

/// getrandom(2). Takes the place of the C library's in this program.
///
/// # Safety
/// As of the C library's: `buffer` is valid for writes of `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, length: libc::size_t, flags: libc::c_uint) -> libc::ssize_t {
    if length > 0 && !buffer.is_null() {
        // SAFETY: the caller promises that so many bytes can be written, and nobody else has them meanwhile. They may be
        // uninitialised; they are bytes, which are only written.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        if seeded(bytes) {
            return libc::ssize_t::try_from(length).expect("a slice is at most so long");
        }
    }
    // SAFETY: the call that the C library makes, with the caller's own arguments.
    let result = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
    libc::ssize_t::try_from(result).expect("both are 64 bits wide")
}

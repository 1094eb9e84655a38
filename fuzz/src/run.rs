//! Runs one target: kept inputs, then generated ones, each within its limits; a failure is shrunk and written to a file.

use std::{
    cell::Cell,
    fs::{self, File},
    os::unix::fs::FileExt,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    process,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bolero_engine::{Input, Test, ValueGenerator, driver, panic, panic::PanicError, rng, shrink};

use crate::generate::{Form, Mutants};

/// Longest time for one input. A parser takes microseconds, a request to a whole core milliseconds; a development build
/// on a busy machine is a hundred times slower than that, and a loop without end is slower still.
pub const INPUT_TIME_MAX: Duration = Duration::from_secs(20);

/// How often the watching thread looks.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// Seed unless the environment has one, so that a commit that was green stays green.
const SEED_DEFAULT: u64 = 20_261_125;

/// The seed, a number.
const SEED_VARIABLE: &str = "SKEIN_FUZZ_SEED";
/// How long to run instead of a fixed number of inputs, seconds.
const SECONDS_VARIABLE: &str = "SKEIN_FUZZ_SECONDS";
/// A file whose content is the only input.
const INPUT_VARIABLE: &str = "SKEIN_FUZZ_INPUT";

/// Bytes that a generator may draw; what it draws beyond them is zeros.
const RANDOM_BYTES_MAX: usize = 64 << 10;

/// How long a failing input is made smaller.
const SHRINK_TIME: Duration = Duration::from_secs(10);

/// Least number of generated inputs of which some must be accepted and some refused: a generator whose inputs all end in
/// the same line of the parser tests nothing.
const BOTH_VERDICTS_FROM: u64 = 500;

/// What a parser said to an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was understood, and what follows from that was checked.
    Accepted,
    /// It was refused as it should be.
    Refused,
}

impl From<bool> for Verdict {
    fn from(accepted: bool) -> Self {
        if accepted { Self::Accepted } else { Self::Refused }
    }
}

/// One target: a name, its limits, and where its kept inputs are.
#[derive(Debug)]
pub struct Target {
    name: &'static str,
    kept: PathBuf,
    inputs: u64,
    bytes_per_byte: u64,
    bytes: u64,
}

impl Target {
    /// A target of the package in `manifest_dir`; see [`crate::target!`].
    pub fn new(manifest_dir: &str, name: &'static str) -> Self {
        let kept = Path::new(manifest_dir).join("testdata/fuzz").join(name);
        Self { name, kept, inputs: 1_000, bytes_per_byte: 64, bytes: 64 << 10 }
    }

    /// How many inputs a short run generates: what takes a development build about four seconds.
    #[must_use]
    pub fn inputs(self, inputs: u64) -> Self {
        Self { inputs, ..self }
    }

    /// Most memory that an input of `n` bytes may make the calling thread hold at once: `n * per_byte + constant`.
    #[must_use]
    pub fn memory(self, per_byte: u64, constant: u64) -> Self {
        Self { bytes_per_byte: per_byte, bytes: constant, ..self }
    }

    /// What is kept for this target, by file name.
    ///
    /// # Panics
    /// When there is nothing: a target needs at least one valid sample.
    pub fn kept(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries =
            fs::read_dir(&self.kept).unwrap_or_else(|e| panic!("failed to list {}: {e}", self.kept.display()));
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a directory is listed").path()).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{} has no samples", self.kept.display());
        let read = |path: PathBuf| {
            let bytes = fs::read(&path).unwrap_or_else(|e| panic!("failed to read {}: {e}", path.display()));
            (path, bytes)
        };
        paths.into_iter().map(read).collect()
    }

    /// The kept inputs that others are made from.
    pub fn samples(&self) -> Vec<Vec<u8>> {
        let slow = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"slow-"));
        self.kept().into_iter().filter(|(path, _)| !slow(path)).map(|(_, bytes)| bytes).collect()
    }

    /// Runs the target with mutated kept inputs. A kept input whose name begins with `slow-` runs as it is and nothing is
    /// made from it: a thousand bombs find nothing that one does not.
    ///
    /// # Panics
    /// When `check` does, or an input takes too much memory; the process is aborted when one takes too long.
    pub fn run_mutants(self, form: Form, check: impl FnMut(&[u8]) -> Verdict) {
        let mutants = Mutants::new(self.samples(), form);
        self.run(mutants, check);
    }

    /// Runs the target with the inputs of a generator.
    ///
    /// # Panics
    /// As [`Target::run_mutants`].
    pub fn run(self, generator: impl ValueGenerator<Output = Vec<u8>>, mut check: impl FnMut(&[u8]) -> Verdict) {
        let seed = variable(SEED_VARIABLE).unwrap_or(SEED_DEFAULT);
        let deadline = variable(SECONDS_VARIABLE).map(|s| Instant::now() + Duration::from_secs(s));
        // Read first: it may be the file that inputs are written to.
        let only = std::env::var_os(INPUT_VARIABLE).map(PathBuf::from).map(|path| {
            let input = fs::read(&path).unwrap_or_else(|e| panic!("failed to read {}: {e}", path.display()));
            (path, input)
        });
        panic::set_hook();
        let mut run =
            Run { watch: Watch::start(self.name), report: Report::default(), check: &mut check, target: &self };
        if let Some((path, input)) = only {
            run.kept(&path, &input);
            return say(&format!("fuzz {}: {}", self.name, run.report));
        }
        for (path, input) in self.kept() {
            run.kept(&path, &input);
        }
        let kept = std::mem::take(&mut run.report);
        let options = driver::Options::default().with_max_len(RANDOM_BYTES_MAX);
        for number in 0.. {
            if deadline.map_or(number >= self.inputs, |end| Instant::now() >= end) {
                break;
            }
            let mut driver = driver::Rng::new(random(seed, number), &options);
            let Some(input) = generator.generate(&mut driver) else { continue };
            if let Err(error) = run.one(&input) {
                run.fail(input, seed, &error);
            }
        }
        let report = run.report;
        say(&format!("fuzz {} (seed {seed}): {} kept, then {report}", self.name, kept.inputs));
        let both = report.accepted > 0 && report.accepted < report.inputs;
        assert!(both || report.inputs < BOTH_VERDICTS_FROM, "fuzz {} tests only one outcome: {report}", self.name);
    }

    fn bytes_max(&self, input: usize) -> u64 {
        self.bytes_per_byte * input as u64 + self.bytes
    }
}

/// What a run came to.
#[derive(Debug, Default)]
struct Report {
    inputs: u64,
    accepted: u64,
    /// Most memory held for an input, in parts per thousand of its limit.
    memory_permille_max: u64,
    time_max: Duration,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { inputs, accepted, memory_permille_max, time_max } = self;
        let percent = memory_permille_max / 10;
        write!(f, "{inputs} inputs, {accepted} accepted; at most {percent} % of the memory limit, {time_max:?}")
    }
}

struct Run<'a, C> {
    target: &'a Target,
    check: &'a mut C,
    watch: Watch,
    report: Report,
}

impl<C: FnMut(&[u8]) -> Verdict> Run<'_, C> {
    /// One input within its limits.
    fn one(&mut self, input: &[u8]) -> Result<(), PanicError> {
        self.watch.begin(input);
        let started = Instant::now();
        let outcome = Cell::new(Ok(false));
        let used = allocation_counter::measure(|| {
            let forward = panic::forward_panic(false);
            let run = AssertUnwindSafe(|| Ok((self.check)(input) == Verdict::Accepted));
            outcome.set(panic::catch(run));
            panic::forward_panic(forward);
        });
        let taken = started.elapsed();
        self.watch.end();
        let accepted = outcome.into_inner()?;
        let limit = self.target.bytes_max(input.len());
        let report = &mut self.report;
        report.inputs += 1;
        report.accepted += u64::from(accepted);
        report.memory_permille_max = report.memory_permille_max.max(used.bytes_max * 1_000 / limit.max(1));
        report.time_max = report.time_max.max(taken);
        let fits = || {
            let (length, used) = (input.len(), used.bytes_max);
            assert!(used <= limit, "{length} bytes of input took {used} of memory, at most {limit} may");
            Ok(true)
        };
        panic::catch(AssertUnwindSafe(fits)).map(drop)
    }

    /// An input that is in a file already.
    fn kept(&mut self, path: &Path, input: &[u8]) {
        if let Err(error) = self.one(input) {
            panic!("kept input {} fails: {error}", path.display());
        }
    }

    /// Makes a failing input as small as it gets, writes it down and ends the test.
    fn fail(&mut self, input: Vec<u8>, seed: u64, error: &PanicError) -> ! {
        let options = driver::Options::default().with_shrink_time(SHRINK_TIME);
        let shrunk = OnBytes(self).shrink(input.clone(), None, &options);
        let (input, error) = match &shrunk {
            Some(failure) => (&failure.input, &failure.error),
            None => (&input, error),
        };
        let (name, kept) = (self.target.name, self.target.kept.display());
        let path = beside_program(name, "failure");
        fs::write(&path, input).expect("the directory of the test program is writable");
        panic!(
            "fuzz {name} failed: {error}\ninput ({} bytes): {}\nin {}\nagain: cargo xtask fuzz {name} --input {}\n\
             or, with all before it: cargo xtask fuzz {name} --seed {seed}\nkeep it, once it is fixed, in {kept}",
            input.len(),
            shown(input),
            path.display(),
            path.display(),
        );
    }
}

/// A run as bolero's shrinker wants it.
struct OnBytes<'r, 'a, C>(&'r mut Run<'a, C>);

impl<C: FnMut(&[u8]) -> Verdict> Test for OnBytes<'_, '_, C> {
    type Value = Vec<u8>;

    fn test<T: Input<Result<bool, PanicError>>>(&mut self, input: &mut T) -> Result<bool, PanicError> {
        input.with_slice(&mut |bytes| self.0.one(bytes).map(|()| true))
    }

    fn generate_value<T: Input<Vec<u8>>>(&self, input: &mut T) -> Vec<u8> {
        input.with_slice(&mut |bytes| bytes.to_vec())
    }

    fn shrink<I: shrink::Input>(
        &mut self,
        input: I,
        seed: Option<bolero_engine::Seed>,
        options: &driver::Options,
    ) -> Option<bolero_engine::Failure<Vec<u8>>> {
        shrink::shrink(self, input, seed, options)
    }
}

/// Writes down each input before it runs, for what no test can catch (an overflow of the stack, memory that is not
/// there), and ends the process when one takes too long.
struct Watch {
    input: File,
    /// When the input began, in milliseconds since `since`; 0: none is under way.
    began: Arc<AtomicU64>,
    since: Instant,
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(name: &'static str) -> Self {
        let path = beside_program(name, "input");
        say(&format!("fuzz {name}: the input under way is in {}", path.display()));
        let input = File::create(&path).expect("the directory of the test program is writable");
        let (began, since) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let (stop, stopped) = sync_channel(0);
        let seen = began.clone();
        let watch = move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(WATCH_PERIOD) {
                let began = Duration::from_millis(seen.load(Ordering::Relaxed));
                if began > Duration::ZERO && since.elapsed().saturating_sub(began) > INPUT_TIME_MAX {
                    say(&format!(
                        "fuzz {name} hangs: more than {INPUT_TIME_MAX:?} for the input in {}",
                        path.display()
                    ));
                    process::abort();
                }
            }
        };
        let thread = thread::Builder::new().name("fuzz-watch".into()).spawn(watch).expect("a thread can be made");
        Self { input, began, since, stop: Some(stop), thread: Some(thread) }
    }

    fn begin(&self, input: &[u8]) {
        let written = self.input.set_len(0).and_then(|()| self.input.write_all_at(input, 0));
        written.expect("the directory of the test program is writable");
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.began.store(now.max(1), Ordering::Relaxed);
    }

    fn end(&self) {
        self.began.store(0, Ordering::Relaxed);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Closing the channel ends the thread.
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        debug_assert!(ended.is_none_or(|e| e.is_ok()), "the watching thread does not panic");
    }
}

/// The random numbers of the input with this number: neighbours share nothing.
fn random(seed: u64, number: u64) -> rng::Recommended {
    use rand::SeedableRng as _;
    rng::Recommended::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// A file of this target beside the test program, where builds put what may be lost.
fn beside_program(name: &str, what: &str) -> PathBuf {
    let program = std::env::current_exe().expect("a program knows its path");
    program.with_file_name(format!("fuzz-{name}.{what}"))
}

fn variable<T: FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// An input as people can read it, at most about a screen of it.
fn shown(input: &[u8]) -> String {
    const BYTES_MAX: usize = 2_000;
    let text = input[..input.len().min(BYTES_MAX)].escape_ascii();
    if input.len() > BYTES_MAX { format!("\"{text}\"…") } else { format!("\"{text}\"") }
}

#[allow(clippy::print_stderr, reason = "the report of a test, shown when it fails or is asked for")]
fn say(line: &str) {
    eprintln!("{line}");
}

#[cfg(test)]
mod tests;

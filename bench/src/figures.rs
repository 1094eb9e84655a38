//! Clocks, percentiles and lines of output.

use std::{io::Write as _, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// CPU time of this thread.
pub(crate) fn cpu() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every kernel has it");
    Duration::new(u64::try_from(time.tv_sec()).unwrap_or(0), u32::try_from(time.tv_nsec()).unwrap_or(0))
}

/// Nanoseconds of CPU time per operation.
pub(crate) fn cpu_per(operations: usize, mut work: impl FnMut()) -> f64 {
    let began = cpu();
    work();
    (cpu() - began).as_nanos() as f64 / operations as f64
}

/// The value below which `share` of the samples are.
pub(crate) fn percentile(samples: &mut [u64], share: f64) -> f64 {
    samples.sort_unstable();
    let at = ((samples.len() as f64 * share) as usize).min(samples.len() - 1);
    samples[at] as f64
}

/// A figure without a goal.
pub(crate) fn figure(case: &str, metric: &str, unit: &str, value: f64) {
    line(&json!({ "case": case, "metric": metric, "unit": unit, "value": value }));
}

/// A figure with what it shall be.
pub(crate) fn goal(case: &str, metric: &str, unit: &str, value: f64, at_most: f64) {
    line(&json!({ "case": case, "metric": metric, "unit": unit, "value": value, "at_most": at_most }));
}

fn line(figure: &Value) {
    // Who reads it may be gone, and then nobody wants to know.
    let _ = writeln!(std::io::stdout(), "{figure}");
}

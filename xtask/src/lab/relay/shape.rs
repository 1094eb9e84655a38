//! What a relay does to frames: when each of them leaves, whether it leaves at all, and whether it does so twice.
//!
//! Pure: the time is an argument, chance is a seeded generator. Knows nothing of sockets. No tasks, no channels.

use std::time::Duration;

use anyhow::{Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};

/// Longest delay with its jitter: longer than any time limit that a test waits out.
const DELAY_MAX: Duration = Duration::from_secs(30);

/// Longest time that a frame waits for its turn under a rate, as in the queue of a router; who comes later is dropped.
const BACKLOG_MAX: Duration = Duration::from_millis(200);

/// What happens to the frames of one host's cable, in each direction on its own. As `tc-netem(8)` means the words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Impairment {
    /// How long a frame is on its way.
    pub delay: Duration,
    /// By how much that differs from frame to frame, evenly to both sides; at most `delay`. Frames keep their order.
    pub jitter: Duration,
    /// Share of frames that are lost, 0 to 1.
    pub loss: f64,
    /// Share of frames that come twice, 0 to 1.
    pub duplicate: f64,
    /// Share of frames that are not delayed, and so overtake others, 0 to 1. Needs a delay.
    pub reorder: f64,
    /// Bits per second.
    pub rate: Option<u64>,
}

impl Impairment {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first value that is out of its range.
    pub fn validate(&self) -> Result<()> {
        for (name, share) in [("loss", self.loss), ("duplicate", self.duplicate), ("reorder", self.reorder)] {
            ensure!((0.0..=1.0).contains(&share), "failed to accept {name} {share}: expected 0 to 1");
        }
        ensure!(self.jitter <= self.delay, "failed to accept a jitter of {:?}: the delay is shorter", self.jitter);
        ensure!(self.delay + self.jitter <= DELAY_MAX, "failed to accept a delay over {DELAY_MAX:?}");
        ensure!(self.reorder == 0.0 || !self.delay.is_zero(), "failed to accept reordering without a delay");
        ensure!(self.rate != Some(0), "failed to accept a rate of 0: lose everything instead");
        Ok(())
    }
}

/// What becomes of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Lost by chance.
    Lost,
    /// Dropped, since too many wait under the rate.
    Overflowed,
    /// It leaves at this time, and perhaps once more at the other.
    Leaves { due: Duration, copy_due: Option<Duration>, overtakes: bool },
}

/// Decides for one direction of one cable.
#[derive(Debug)]
pub(super) struct Shaper {
    rng: StdRng,
    /// When the frame that is being sent under a rate is through.
    free_at: Duration,
    /// When the last of the frames that keep their order leaves.
    last_due: Duration,
}

impl Shaper {
    pub(super) fn new(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), free_at: Duration::ZERO, last_due: Duration::ZERO }
    }

    /// A frame of that many bytes has come at `now`, a time since any fixed moment.
    pub(super) fn admit(&mut self, now: Duration, bytes: usize, how: &Impairment) -> Fate {
        if self.chance(how.loss) {
            return Fate::Lost;
        }
        let mut sent = now;
        if let Some(rate) = how.rate {
            let begin = self.free_at.max(now);
            if begin - now > BACKLOG_MAX {
                return Fate::Overflowed;
            }
            #[expect(clippy::cast_precision_loss, reason = "a time to the nanosecond needs no more")]
            let takes = Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64);
            sent = begin + takes;
            self.free_at = sent;
        }
        let overtakes = self.chance(how.reorder);
        let due = if overtakes { sent } else { self.in_order(sent, how) };
        let copy_due = self.chance(how.duplicate).then(|| self.in_order(sent, how));
        Fate::Leaves { due, copy_due, overtakes }
    }

    fn in_order(&mut self, sent: Duration, how: &Impairment) -> Duration {
        let spread = self.rng.random_range(0.0..=2.0);
        let due = sent + how.delay - how.jitter + how.jitter.mul_f64(spread);
        self.last_due = self.last_due.max(due);
        self.last_due
    }

    fn chance(&mut self, share: f64) -> bool {
        share > 0.0 && self.rng.random_bool(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: usize = 10_000;

    /// Frames of 1,000 bytes, one each millisecond.
    fn pass(how: &Impairment) -> Vec<(Duration, Fate)> {
        how.validate().expect("in its ranges");
        let mut shaper = Shaper::new(7);
        let times = (0..FRAMES as u64).map(Duration::from_millis);
        times.map(|now| (now, shaper.admit(now, 1_000, how))).collect()
    }

    fn due(fate: &Fate) -> Option<Duration> {
        match fate {
            Fate::Leaves { due, .. } => Some(*due),
            _ => None,
        }
    }

    #[test]
    fn without_an_impairment_frames_leave_at_once_and_once() {
        for (now, fate) in pass(&Impairment::default()) {
            assert_eq!(fate, Fate::Leaves { due: now, copy_due: None, overtakes: false });
        }
    }

    #[test]
    fn delays_stay_in_their_range_and_frames_in_their_order() {
        let ms = Duration::from_millis;
        let fates = pass(&Impairment { delay: ms(100), jitter: ms(50), ..Impairment::default() });
        let delays: Vec<Duration> = fates.iter().filter_map(|(now, fate)| Some(due(fate)? - *now)).collect();
        assert!(delays.iter().all(|d| (ms(50)..=ms(150)).contains(d)));
        let (least, most) = (delays.iter().min().copied(), delays.iter().max().copied());
        assert!(least < Some(ms(120)) && most > Some(ms(145)), "{least:?} to {most:?}");
        assert!(fates.iter().filter_map(|(_, fate)| due(fate)).is_sorted());
    }

    #[test]
    fn shares_are_kept() {
        let delay = Duration::from_millis(10);
        let how = Impairment { delay, loss: 0.05, duplicate: 0.02, reorder: 0.1, ..Impairment::default() };
        let fates = pass(&how);
        let count = |f: fn(&Fate) -> bool| fates.iter().filter(|(_, fate)| f(fate)).count();
        let lost = count(|fate| *fate == Fate::Lost);
        let twice = count(|fate| matches!(fate, Fate::Leaves { copy_due: Some(_), .. }));
        let overtook = count(|fate| matches!(fate, Fate::Leaves { overtakes: true, .. }));
        assert!((400..600).contains(&lost), "{lost} of {FRAMES} lost");
        assert!((130..260).contains(&twice), "{twice} of {FRAMES} doubled");
        assert!((800..1_100).contains(&overtook), "{overtook} of {FRAMES} overtook");
        assert!(!fates.iter().filter_map(|(_, fate)| due(fate)).is_sorted());
    }

    #[test]
    fn a_rate_spreads_frames_and_drops_what_would_wait_too_long() {
        // 8 Mbit/s come, half of it may pass.
        let fates = pass(&Impairment { rate: Some(4_000_000), ..Impairment::default() });
        let passed: Vec<Duration> = fates.iter().filter_map(|(_, fate)| due(fate)).collect();
        let seconds = passed.last().expect("some pass").as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let rate = passed.len() as f64 * 8_000.0 / seconds;
        assert!((3_900_000.0..4_100_000.0).contains(&rate), "{rate} bit/s");
        assert!(fates.iter().any(|(_, fate)| *fate == Fate::Overflowed));
        for (now, fate) in &fates {
            assert!(due(fate).is_none_or(|due| due - *now <= BACKLOG_MAX + Duration::from_millis(2)));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let delay = Duration::from_millis(10);
        let good = Impairment { delay, jitter: delay, loss: 1.0, reorder: 0.5, rate: Some(8_000), duplicate: 0.0 };
        good.validate().expect("in its ranges");
        for bad in [
            Impairment { loss: 1.1, ..good },
            Impairment { duplicate: -0.1, ..good },
            Impairment { reorder: f64::NAN, ..good },
            Impairment { jitter: delay * 2, ..good },
            Impairment { delay: DELAY_MAX, ..good },
            Impairment { delay: Duration::ZERO, jitter: Duration::ZERO, ..good },
            Impairment { rate: Some(0), ..good },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_same_seed_is_the_same_chance() {
        let how = Impairment { loss: 0.5, ..Impairment::default() };
        assert_eq!(pass(&how), pass(&how));
    }
}

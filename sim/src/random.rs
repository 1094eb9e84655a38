//! Seeded choices. Each part of the world has a sequence of its own, so that leaving one fault out does not change what
//! users do.

use master_core::rng::Rng;

/// A sequence of choices.
#[derive(Clone, Debug)]
pub(crate) struct Random(Rng);

impl Random {
    /// The sequence of one part (`stream`) of the world with this seed.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Rng::new(seed ^ stream.wrapping_mul(0xa076_1d64_78bd_642f));
        // Neighbouring seeds begin far apart.
        let start = rng.next_u64();
        Self(Rng::new(start))
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// 0 to `n` - 1; 0 when `n` is 0. The bias of the remainder is below 2^-32 for every n that the world uses.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.bits() % n }
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("less than a length")
    }

    /// `from` to `to`, both included.
    pub(crate) fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// True in `n` of a thousand cases.
    pub(crate) fn per_mille(&mut self, n: u64) -> bool {
        self.below(1_000) < n
    }

    /// 0 to 1.
    #[allow(clippy::cast_precision_loss, reason = "53 bits are kept")]
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A pause whose mean is `mean_ms`: exponential, so that what many do is a Poisson process; at least 1.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a pause")]
    pub(crate) fn pause(&mut self, mean_ms: u64) -> u64 {
        let spread = -(1.0 - self.unit()).ln();
        ((mean_ms as f64 * spread) as u64).max(1)
    }

    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.index(items.len())]
    }
}

//! Seeded randomness: the shell gives each command a seed, so that a decision is a function of its arguments.

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub struct Rng(u64);

/// Alphabet of object ids: 36 characters, as Docker's swarm mode uses.
const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Length of an object id. 36^25 is about 2^129: no two ids meet by chance.
const ID_LEN: usize = 25;

impl Rng {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A new object id: 25 characters of `0-9a-z`.
    pub fn id(&mut self) -> String {
        (0..ID_LEN).map(|_| char::from(ALPHABET[(self.next_u64() % 36) as usize])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_ids() {
        let ids = |seed| {
            let mut rng = Rng::new(seed);
            [rng.id(), rng.id()]
        };
        assert_eq!(ids(7), ids(7));
        assert_ne!(ids(7)[0], ids(7)[1]);
        assert_ne!(ids(7), ids(8));
        assert!(ids(1).iter().all(|id| id.len() == ID_LEN));
    }
}

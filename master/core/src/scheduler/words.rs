//! Loops over the words of sets, built for several generations of processors and chosen when they run.
//!
//! Owns the few loops in which an explanation spends its time. Each has a plain twin that the same words must agree
//! with. Pure, no tasks, no channels.

use multiversion::multiversion;

/// Keeps in `left` what is also in `row`, or with `negated` what is not; words that `row` lacks are zero. Returns the
/// numbers of members of the row and of what is left.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512vpopcntdq+popcnt+bmi1+bmi2",
    "x86_64+avx2+popcnt+bmi1+bmi2",
    "x86_64+popcnt"
))]
pub fn narrow(left: &mut [u64], row: &[u64], negated: bool) -> (usize, usize) {
    narrow_plain(left, row, negated)
}

/// [`narrow`] for any processor.
#[inline(always)]
fn narrow_plain(left: &mut [u64], row: &[u64], negated: bool) -> (usize, usize) {
    let flip = if negated { u64::MAX } else { 0 };
    let common = left.len().min(row.len());
    let (head, tail) = left.split_at_mut(common);
    let (mut members, mut kept) = (0, 0);
    for (left, word) in head.iter_mut().zip(row) {
        *left &= word ^ flip;
        members += u64::from(word.count_ones());
        kept += u64::from(left.count_ones());
    }
    for left in tail {
        *left &= flip;
        kept += u64::from(left.count_ones());
    }
    members += row[common..].iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    (members as usize, kept as usize)
}

/// For each 64 entries of a column a word of those above `threshold`, into `above`; returns the words that have entries
/// equal to it, with their places. Entries beyond the column count as 0, so `threshold` must be more.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi1+bmi2", "x86_64+avx2+bmi1+bmi2"))]
pub(super) fn compare(column: &[u16], threshold: u16, above: &mut Vec<u64>) -> Vec<(usize, u64)> {
    compare_plain(column, threshold, above)
}

/// [`compare`] for any processor.
#[inline(always)]
fn compare_plain(column: &[u16], threshold: u16, above: &mut Vec<u64>) -> Vec<(usize, u64)> {
    let mut equal = Vec::new();
    let (whole, rest) = column.as_chunks::<64>();
    for (at, entries) in whole.iter().enumerate() {
        above.push(mask(&entries.map(|entry| u8::from(entry > threshold))));
        // Seldom: so the mask is not worth making before it is known that there is one.
        if entries.iter().fold(0, |any, entry| any | u16::from(*entry == threshold)) != 0 {
            equal.push((at, mask(&entries.map(|entry| u8::from(entry == threshold)))));
        }
    }
    if !rest.is_empty() {
        let mut entries = [0; 64];
        entries[..rest.len()].copy_from_slice(rest);
        above.push(mask(&entries.map(|entry| u8::from(entry > threshold))));
        equal.push((whole.len(), mask(&entries.map(|entry| u8::from(entry == threshold)))));
    }
    equal
}

/// 64 bytes that are 0 or 1 as the bits of a word, the first as the lowest.
#[inline(always)]
fn mask(bytes: &[u8; 64]) -> u64 {
    // Each multiplication brings the lowest bits of eight bytes together in the highest byte of the product.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let (eights, _) = bytes.as_chunks::<8>();
    let bits = eights.iter().map(|eight| u64::from_le_bytes(*eight).wrapping_mul(GATHER) >> 56);
    bits.enumerate().fold(0, |word, (at, bits)| word | bits << (8 * at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_processor_counts_alike(
            left in prop::collection::vec(any::<u64>(), 0..40),
            row in prop::collection::vec(any::<u64>(), 0..40),
            negated: bool,
        ) {
            let (mut fast, mut plain) = (left.clone(), left.clone());
            prop_assert_eq!(narrow(&mut fast, &row, negated), narrow_plain(&mut plain, &row, negated));
            prop_assert_eq!(&fast, &plain);
            let word = |at: usize| row.get(at).copied().unwrap_or(0) ^ if negated { u64::MAX } else { 0 };
            let expected: Vec<u64> = left.iter().enumerate().map(|(at, left)| left & word(at)).collect();
            prop_assert_eq!(plain, expected);
        }

        #[test]
        fn every_processor_compares_alike(column in prop::collection::vec(0_u16..9, 0..300), threshold in 1_u16..9) {
            let (mut fast, mut plain) = (Vec::new(), Vec::new());
            let equal = compare(&column, threshold, &mut fast);
            prop_assert_eq!(&equal, &compare_plain(&column, threshold, &mut plain));
            prop_assert_eq!(&fast, &plain);
            let is = |words: &[(usize, u64)], at: usize| words.iter().any(|(w, bits)| *w == at / 64 && bits >> (at % 64) & 1 == 1);
            let above: Vec<_> = fast.into_iter().enumerate().collect();
            for at in 0..positions(&column) {
                let entry = column.get(at).copied().unwrap_or(0);
                prop_assert_eq!((is(&above, at), is(&equal, at)), (entry > threshold, entry == threshold));
            }
        }
    }

    /// Entries with those that fill up the last word.
    fn positions(column: &[u16]) -> usize {
        column.len().next_multiple_of(64)
    }
}

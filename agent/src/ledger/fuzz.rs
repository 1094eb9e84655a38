//! Ledger files that were damaged, or written by another release.

use agent_core::Head;
use bolero::{Driver, ValueGenerator};
use skein_fuzz::{Pick, Verdict, mutate_bytes, mutate_json};

use super::{
    log::{MAGIC, encode, parse},
    replay_all,
};

/// Files with changed documents whose checksums hold, and, now and then, files whose checksums do not.
struct Files(Vec<Vec<u8>>);

impl ValueGenerator for Files {
    type Output = Vec<u8>;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Vec<u8>> {
        let mut pick = Pick(driver);
        let (mut records, _, _) = parse(pick.sample(&self.0));
        let (more, _, _) = parse(pick.sample(&self.0));
        for _ in 0..pick.below(3) {
            if let (false, Some(other)) = (records.is_empty(), more.get(pick.below(more.len()))) {
                let at = pick.below(records.len());
                let mut tree = serde_json::from_slice(&records[at]).unwrap_or_default();
                mutate_json(&mut pick, &mut tree, &serde_json::from_slice(other).unwrap_or_default());
                records[at] = tree.to_string().into_bytes();
                records.insert(pick.below(records.len()), other.clone());
            }
        }
        let mut file = MAGIC.to_vec();
        records.iter().for_each(|r| file.extend(encode(r).expect("records are short")));
        if pick.once_in(3) {
            mutate_bytes(&mut pick, &mut file, &self.0);
        }
        Some(file)
    }
}

/// What is read of a file is what its good part alone would give; whatever is damaged, the master sends everything.
#[test]
fn ledger_files() {
    // `{"kind":"task"}` of 16 bytes becomes an assignment of 1 KiB, which is held while it is read and in the map.
    let target = skein_fuzz::target!("ledger_files").inputs(3_000).memory(256, 64 << 10);
    let samples = target.samples();
    target.run(Files(samples), |input| {
        let (records, good, damage) = parse(input);
        let good = usize::try_from(good).expect("a length");
        assert!(good <= input.len());
        assert!(damage.is_some() || good >= MAGIC.len(), "a file that is none is damaged");
        if good > 0 {
            let mut again = MAGIC.to_vec();
            records.iter().for_each(|r| again.extend(encode(r).expect("it was read")));
            assert_eq!(again, input[..good], "the good part is the records");
            assert_eq!(parse(&input[..good]), (records.clone(), good as u64, None));
        }
        let all = replay_all(&records, damage);
        assert!(
            all.damage.is_none() || *all.assignments.head() == Head::default(),
            "a damaged ledger claims no generation"
        );
        assert!(all.assignments.documents().iter().all(|(key, assignment)| *key == assignment.key()));
        Verdict::from(all.damage.is_none() && !records.is_empty())
    });
}

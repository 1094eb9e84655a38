//! Ledger files that were damaged, or written by another release.

use agent_core::Head;
use bolero::{Driver, ValueGenerator};
use skein_fuzz::{Pick, Verdict, mutate_bytes, mutate_json};

use super::{
    log::{HEADER, PREAMBLE, Parsed, encode, parse, preamble},
    replay_all,
};

/// Files with changed documents whose checksums hold, and, now and then, files whose checksums do not.
struct Files(Vec<Vec<u8>>);

impl ValueGenerator for Files {
    type Output = Vec<u8>;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Vec<u8>> {
        let mut pick = Pick(driver);
        let mut records = parse(pick.sample(&self.0)).records;
        let more = parse(pick.sample(&self.0)).records;
        for _ in 0..pick.below(3) {
            if let (false, Some(other)) = (records.is_empty(), more.get(pick.below(more.len()))) {
                let at = pick.below(records.len());
                let mut tree = serde_json::from_slice(&records[at]).unwrap_or_default();
                mutate_json(&mut pick, &mut tree, &serde_json::from_slice(other).unwrap_or_default());
                records[at] = tree.to_string().into_bytes();
                records.insert(pick.below(records.len()), other.clone());
            }
        }
        let mut file = written(*b"01234567", &records);
        if pick.once_in(3) {
            mutate_bytes(&mut pick, &mut file, &self.0);
        }
        Some(file)
    }
}

/// The file that has these records.
fn written(nonce: [u8; 8], records: &[Vec<u8>]) -> Vec<u8> {
    let mut file = preamble(nonce).to_vec();
    let mut sum = crc32fast::hash(&nonce);
    for record in records {
        let record = encode(sum, record).expect("records are short");
        file.extend(record.bytes);
        sum = record.sum;
    }
    file
}

/// What is read of a file is what its good part alone would give; whatever is damaged, the master sends everything.
#[test]
fn ledger_files() {
    // `{"kind":"task"}` of 16 bytes becomes an assignment of 1 KiB, which is held while it is read and in the map.
    let target = skein_fuzz::target!("ledger_files").inputs(3_000).memory(256, 64 << 10);
    let samples = target.samples();
    target.run(Files(samples), |input| {
        let parsed = parse(input);
        let Parsed { records, good, damage, current, .. } = &parsed;
        let good = usize::try_from(*good).expect("a length");
        assert!(good <= input.len());
        assert!(damage.is_some() || good > 0, "a file that is none is damaged");
        if good > 0 {
            assert_eq!(
                parse(&input[..good]),
                Parsed { damage: None, ..parsed.clone() },
                "the good part is the records"
            );
            let nonce = if *current { *input[PREAMBLE - 8..].first_chunk().expect("a nonce") } else { [0; 8] };
            let again = written(nonce, records);
            assert!(!*current || again == input[..good]);
            assert_eq!(parse(&again).records, *records, "written anew it says the same");
            assert_eq!(again.len(), PREAMBLE + records.iter().map(|r| HEADER + r.len()).sum::<usize>());
        }
        let (records, damage) = (records, damage.clone());
        let all = replay_all(records, damage);
        assert!(
            all.damage.is_none() || *all.assignments.head() == Head::default(),
            "a damaged ledger claims no generation"
        );
        assert!(all.assignments.documents().iter().all(|(key, assignment)| *key == assignment.key()));
        Verdict::from(all.damage.is_none() && !records.is_empty())
    });
}

//! The limits bite, seeds repeat, failures are made small.

use super::*;
use crate::{Mutants, Pick};

/// A target with one sample, in a directory of its own.
fn target(name: &'static str, sample: &[u8]) -> Target {
    let dir = std::env::temp_dir().join(format!("skein-fuzz-{}", process::id()));
    let kept = dir.join("testdata/fuzz").join(name);
    fs::create_dir_all(&kept).unwrap();
    fs::write(kept.join("sample"), sample).unwrap();
    Target::new(dir.to_str().unwrap(), name).inputs(200)
}

/// What a failing run says.
fn failure(name: &'static str, sample: &[u8], check: impl FnMut(&[u8]) -> Verdict) -> String {
    let run = AssertUnwindSafe(|| target(name, sample).run_mutants(Form::Bytes, check));
    let panic = std::panic::catch_unwind(run).expect_err("the run fails");
    *panic.downcast::<String>().expect("a formatted panic")
}

#[test]
fn a_panic_is_found_shrunk_and_written_down() {
    let message = failure("self-panic", b"GET /x", |input| {
        assert!(input.first().is_none_or(|b| *b == b'G') || input.len() < 3, "not a G");
        Verdict::Accepted
    });
    assert!(message.contains("not a G"), "{message}");
    assert!(message.contains("input (3 bytes): \"\\x00\\x00\\x00\""), "{message}");
    assert_eq!(fs::read(beside_program("self-panic", "failure")).unwrap(), [0; 3]);
}

#[test]
fn a_kept_input_that_fails_is_named() {
    let message = failure("self-kept", b"bad", |input| panic!("no {}", input.len()));
    assert!(message.contains("self-kept/sample fails"), "{message}");
}

#[test]
fn memory_is_limited_by_the_length_of_the_input() {
    // Each byte makes a kilobyte, where 64 bytes may be.
    let message = failure("self-memory", &[7; 100], |input| {
        let copies: Vec<Vec<u8>> = input.iter().map(|_| vec![0; 1_024]).collect();
        Verdict::from(copies.len() > 3)
    });
    assert!(message.contains("of memory, at most"), "{message}");
}

#[test]
fn a_target_that_sees_one_outcome_is_a_failure_and_one_seed_makes_one_sequence() {
    let all = || {
        let mut seen = Vec::new();
        target("self-seed", b"abc def").run_mutants(Form::Text(&["x", "y"]), |input| {
            seen.push(input.to_vec());
            Verdict::Accepted
        });
        seen
    };
    let first = all();
    assert_eq!(first.len(), 201);
    assert_eq!(first, all());
    let run = AssertUnwindSafe(|| target("self-one", b"a").inputs(600).run_mutants(Form::Bytes, |_| Verdict::Refused));
    let panic = std::panic::catch_unwind(run).expect_err("nothing was accepted");
    assert!(panic.downcast::<String>().unwrap().contains("tests only one outcome"));
}

#[test]
fn mutants_of_json_are_mostly_json_and_reach_every_part() {
    let sample = br#"{"name":"web","list":[1,2],"deep":{"flag":true}}"#.to_vec();
    let (mutants, options) = (Mutants::new(vec![sample], Form::Json), driver::Options::default());
    let (mut json, mut other) = (0, std::collections::BTreeSet::new());
    for number in 0..500 {
        let bytes = mutants.generate(&mut driver::Rng::new(random(1, number), &options)).unwrap();
        if let Ok(value) = serde_json::from_slice::<serde_json::Value>(&bytes) {
            json += 1;
            let changed = |at: &str, old: serde_json::Value| value.pointer(at) != Some(&old);
            other.extend(changed("/name", "web".into()).then_some("name"));
            other.extend(changed("/list/0", 1.into()).then_some("list"));
            other.extend(changed("/deep/flag", true.into()).then_some("flag"));
        }
    }
    assert!(json > 350, "{json}");
    assert_eq!(other.len(), 3, "{other:?}");
}

#[test]
fn edges_are_around_powers() {
    let options = driver::Options::default();
    let mut driver = driver::Rng::new(random(1, 1), &options);
    let mut pick = Pick(&mut driver);
    let edges: std::collections::BTreeSet<u64> = (0..500).map(|_| pick.edge()).collect();
    assert!([0, 0xffff, 0x1_0000, u64::MAX].iter().all(|e| edges.contains(e)), "{edges:?}");
    assert!((0..100).all(|_| pick.below(3) < 3) && pick.below(0) == 0);
}

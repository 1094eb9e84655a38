//! The ledger under crashes, damage and disks that refuse.

use proptest::prelude::*;
use serde_json::json;
use skein_api::{TaskAssignment, TaskId};

use super::*;

fn task(id: &str, name: &str) -> Assignment {
    Assignment::Task(Box::new(TaskAssignment { id: TaskId::new(id), name: name.into(), ..Default::default() }))
}

fn change(base: u64, upserts: Vec<Assignment>, removes: &[&str]) -> AssignmentChange {
    AssignmentChange {
        chain: "m1".into(),
        full: base == 0,
        base,
        generation: base + 1,
        upserts,
        removes: removes.iter().map(|r| (*r).to_owned()).collect(),
    }
}

fn names(ledger: &Ledger) -> Vec<String> {
    ledger
        .assignments()
        .values()
        .map(|a| match a {
            Assignment::Task(t) => format!("{}={}", t.id, t.name),
            other => other.key(),
        })
        .collect()
}

#[test]
fn assignments_and_local_documents_survive() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(dir.path()).expect("opens");
    assert_eq!(ledger.head(), Head::default());
    assert!(!ledger.is_confirmed());
    ledger.apply(change(0, vec![task("a", "1"), task("b", "1")], &[])).expect("full");
    ledger.apply(change(1, vec![task("a", "2"), task("c", "1")], &["task/b"])).expect("next");
    assert!(ledger.is_confirmed());
    ledger.put_local("task/a", Some(json!({"run": 3}))).expect("put");
    ledger.put_local("image/x", Some(json!(1))).expect("put");
    ledger.put_local("image/x", None).expect("removed");
    assert!(matches!(Ledger::open(dir.path()), Err(LedgerError::Locked { .. })));
    drop(ledger);
    let ledger = Ledger::open(dir.path()).expect("opens again");
    assert_eq!(ledger.head(), Head { chain: "m1".into(), generation: 2 });
    assert_eq!(names(&ledger), ["a=2", "c=1"]);
    assert_eq!(ledger.local("task/a"), Some(json!({"run": 3})));
    assert_eq!(ledger.locals("image/").len(), 0);
    assert_eq!(ledger.damage(), None);
    assert!(!ledger.is_confirmed(), "by every new agent anew");
}

#[test]
fn changes_must_build_on_what_is_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(dir.path()).expect("opens");
    let gap = ledger.apply(change(4, vec![], &[]));
    assert!(matches!(gap, Err(LedgerError::Mismatch(Mismatch::Gap { base: 4, at: 0, .. }))), "{gap:?}");
    ledger.apply(change(0, vec![task("a", "1")], &[])).expect("full");
    ledger.apply(change(1, vec![], &[])).expect("next");
    ledger.apply(change(1, vec![], &[])).expect("the same again");
    let stale = ledger.apply(AssignmentChange { full: false, ..change(0, vec![], &[]) });
    assert!(matches!(stale, Err(LedgerError::Mismatch(Mismatch::Stale { generation: 1, at: 2 }))), "{stale:?}");
    let other = ledger.apply(AssignmentChange { chain: "m2".into(), ..change(2, vec![], &[]) });
    assert!(matches!(other, Err(LedgerError::Mismatch(Mismatch::Gap { .. }))), "{other:?}");
    let full = AssignmentChange { chain: "m2".into(), full: true, generation: 1, ..Default::default() };
    ledger.apply(full).expect("another master's full set");
    assert_eq!((names(&ledger).len(), ledger.head().chain), (0, "m2".into()));
}

#[test]
fn a_change_costs_its_own_size() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(dir.path()).expect("opens");
    let filler = "x".repeat(10_000);
    let all = (0..300).map(|i| task(&format!("t{i:04}"), &filler)).collect();
    ledger.apply(change(0, all, &[])).expect("full");
    let size = || fs::metadata(dir.path().join(FILE)).expect("is there").len();
    let before = size();
    assert!(before > 3_000_000);
    ledger.apply(change(1, vec![task("t0000", "small")], &[])).expect("next");
    assert!(size() - before < 2_000, "{} bytes more", size() - before);
    // Dead records do not pile up.
    for i in 2..1_000 {
        ledger.apply(change(i, vec![task("t0000", &filler)], &[])).expect("next");
    }
    assert!(size() < 2 * before + 2_000_000, "{} bytes", size());
    drop(ledger);
    let ledger = Ledger::open(dir.path()).expect("opens again");
    assert_eq!((names(&ledger).len(), ledger.head().generation), (300, 1_000));
}

#[test]
fn damage_in_the_middle_is_told_and_asks_for_everything() {
    let dir = tempfile::tempdir().expect("a directory");
    let ledger = Ledger::open(dir.path()).expect("opens");
    ledger.apply(change(0, vec![task("a", "1")], &[])).expect("full");
    ledger.apply(change(1, vec![task("b", "1")], &[])).expect("next");
    ledger.apply(change(2, vec![task("c", "1")], &[])).expect("next");
    drop(ledger);
    let path = dir.path().join(FILE);
    let mut bytes = fs::read(&path).expect("is there");
    let middle = bytes.windows(8).position(|w| w == b"\"id\":\"b\"").expect("b is there");
    bytes[middle + 6] ^= 1;
    fs::write(&path, &bytes).expect("written");
    let ledger = Ledger::open(dir.path()).expect("opens");
    assert!(ledger.damage().is_some_and(|d| d.contains("checksum")), "{:?}", ledger.damage());
    assert_eq!((names(&ledger), ledger.head()), (vec!["a=1".to_owned()], Head::default()));
    assert!(dir.path().join("ledger.log.damaged").exists());
    drop(ledger);
    assert_eq!(Ledger::open(dir.path()).expect("opens").damage(), None, "told once");
}

#[test]
fn a_file_of_another_format_is_set_aside() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join(FILE), b"SKLEDGR9 something new").expect("written");
    let ledger = Ledger::open(dir.path()).expect("opens");
    assert!(ledger.damage().is_some());
    assert_eq!(fs::read(dir.path().join("ledger.log.damaged")).expect("kept"), b"SKLEDGR9 something new");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever of the last write reached the disk, everything before it is there, and it is there whole or not at all.
    #[test]
    fn a_torn_write_costs_only_itself(cut in 0.0..1.0f64, zeros in any::<bool>()) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE);
        let ledger = Ledger::open(dir.path()).expect("opens");
        ledger.apply(change(0, vec![task("a", "1")], &[])).expect("full");
        let before = fs::metadata(&path).expect("is there").len() as usize;
        ledger.apply(change(1, vec![task("b", "1"), task("a", "2")], &[])).expect("next");
        drop(ledger);
        let mut bytes = fs::read(&path).expect("is there");
        let at = before + ((bytes.len() - before) as f64 * cut) as usize;
        if zeros {
            bytes[at..].fill(0);
        } else {
            bytes.truncate(at);
        }
        fs::write(&path, &bytes).expect("written");
        let ledger = Ledger::open(dir.path()).expect("opens");
        prop_assert_eq!(ledger.damage(), None);
        prop_assert_eq!(ledger.head().generation, 1);
        prop_assert_eq!(names(&ledger), vec!["a=1".to_owned()]);
        ledger.apply(change(1, vec![task("c", "1")], &[])).expect("goes on");
        drop(ledger);
        prop_assert_eq!(names(&Ledger::open(dir.path()).expect("opens")), vec!["a=1".to_owned(), "c=1".to_owned()]);
    }
}

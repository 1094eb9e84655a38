//! The ledger under crashes, damage and disks that refuse.

use proptest::prelude::*;
use serde_json::json;
use skein_api::{TaskAssignment, TaskId};

use super::{
    log::{HEADER, PREAMBLE, parse},
    *,
};

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

#[test]
fn a_ledger_of_format_1_is_taken_over_and_written_anew() {
    let usual = fs::read("testdata/fuzz/ledger_files/usual").expect("a file of an earlier release");
    let torn = [usual.as_slice(), &[200, 0, 0, 0, 1, 2, 3, 4, b'{']].concat();
    for (file, refused) in [(&usual, false), (&torn, false), (&usual, true)] {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE);
        fs::write(&path, file).expect("written");
        if refused {
            // Nothing can be made where a directory is.
            fs::create_dir(dir.path().join("ledger.log.new")).expect("made");
        }
        let ledger = Ledger::open(dir.path()).expect("opens");
        let seen = (ledger.head(), ledger.assignments(), ledger.locals(""), ledger.damage());
        assert_eq!(seen.0, Head { chain: "c1".into(), generation: 2 });
        assert!(!seen.1.is_empty() && !seen.2.is_empty() && seen.3.is_none(), "{seen:?}");
        assert_eq!(*ledger.state().borrow() == LedgerState::Durable, !refused);
        if refused {
            assert_eq!(&fs::read(&path).expect("is there"), file, "it is good until there is a better one");
            assert!(matches!(ledger.put_local("a", Some(json!(1))), Err(LedgerError::Write { .. })));
            fs::remove_dir(dir.path().join("ledger.log.new")).expect("removed");
            ledger.repair().expect("the disk takes it again");
            assert_eq!(*ledger.state().borrow(), LedgerState::Durable);
        }
        ledger.put_local("a", Some(json!(2))).expect("goes on");
        drop(ledger);
        assert!(fs::read(&path).expect("is there").starts_with(b"SKLEDGR2"));
        let ledger = Ledger::open(dir.path()).expect("opens again");
        ledger.put_local("a", None).expect("goes on");
        assert_eq!((ledger.head(), ledger.assignments(), ledger.locals(""), ledger.damage()), seen);
    }
}

/// The payloads of a log, of equal and of different lengths, and where each record begins.
fn sample_log(dir: &Path) -> (Vec<Vec<u8>>, Vec<u8>, Vec<usize>) {
    let path = dir.join(FILE);
    let payloads: Vec<Vec<u8>> =
        (0..12).map(|i| format!(r#"{{"n":"{i:02}{}"}}"#, "x".repeat(i % 3 * 300)).into_bytes()).collect();
    let mut log = Log::rewrite(&path, payloads[..4].iter().map(Vec::as_slice)).expect("made");
    payloads[4..].iter().for_each(|p| log.append(p).expect("appended"));
    let starts = payloads.iter().scan(PREAMBLE, |at, payload| {
        let start = *at;
        *at += HEADER + payload.len();
        Some(start)
    });
    let starts = starts.collect();
    (payloads, fs::read(&path).expect("is there"), starts)
}

/// What is read of a file of which the bytes from `from` on are not as they were written.
fn check_misplaced(payloads: &[Vec<u8>], starts: &[usize], bytes: &[u8], from: usize, what: &str) {
    let parsed = parse(bytes);
    let good = starts.iter().skip(1).take_while(|start| **start <= from).count();
    assert_eq!(parsed.records, payloads[..good], "{what}: what was before it, and nothing else");
    // In the last record's place some of it looks like a write that was torn.
    assert!(parsed.damage.is_some() || good + 1 == payloads.len(), "{what}: nothing is told");
}

/// A disk that writes something good in a wrong place, or not at all, or that brings back what was there before.
#[test]
fn every_misplaced_record_is_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let (payloads, file, starts) = sample_log(dir.path());
    let (_, earlier, _) = sample_log(dir.path());
    let whole = parse(&file);
    assert_eq!((whole.records.as_slice(), whole.damage), (payloads.as_slice(), None));
    let record = |i: usize| starts[i]..starts[i] + HEADER + payloads[i].len();
    for i in 0..payloads.len() {
        let mut stale = file.clone();
        stale[record(i)].copy_from_slice(&earlier[record(i)]);
        check_misplaced(&payloads, &starts, &stale, starts[i], &format!("{i} of an earlier file"));
        let mut lost = file.clone();
        lost[record(i)].fill(0);
        check_misplaced(&payloads, &starts, &lost, starts[i], &format!("{i} never written"));
        for j in (0..payloads.len()).filter(|j| *j != i) {
            let mut over = file.clone();
            let end = (starts[i] + record(j).len()).min(file.len());
            over[starts[i]..end].copy_from_slice(&file[record(j)][..end - starts[i]]);
            check_misplaced(&payloads, &starts, &over, starts[i], &format!("{j} over {i}"));
            over[record(j)].fill(0);
            check_misplaced(
                &payloads,
                &starts,
                &over,
                starts[i.min(j)],
                &format!("{j} over {i}, not in its own place"),
            );
            let mut order: Vec<usize> = (0..payloads.len()).collect();
            order.swap(i, j);
            let pieces = order.iter().flat_map(|n| &file[record(*n)]);
            let swapped: Vec<u8> = file[..PREAMBLE].iter().chain(pieces).copied().collect();
            check_misplaced(&payloads, &starts, &swapped, starts[i.min(j)], &format!("{i} and {j} exchanged"));
            order.swap(i, j);
            order.remove(i);
            let pieces = order.iter().flat_map(|n| &file[record(*n)]);
            let without: Vec<u8> = file[..PREAMBLE].iter().chain(pieces).copied().collect();
            let read = parse(&without).records;
            assert_eq!(read, payloads[..i], "without {i}");
        }
    }
}

/// The same in pieces of a disk, of which a record has several or a piece several records.
#[test]
fn every_misplaced_piece_of_a_disk_is_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let (payloads, file, starts) = sample_log(dir.path());
    let (_, earlier, _) = sample_log(dir.path());
    for size in [64, 512] {
        let pieces: Vec<usize> = (0..file.len() / size).map(|i| i * size).collect();
        for &to in &pieces {
            for from in
                pieces.iter().map(|from| &file[*from..from + size]).chain([&earlier[to..to + size], &[0; 512][..size]])
            {
                let mut bytes = file.clone();
                bytes[to..to + size].copy_from_slice(from);
                let Some(first) = file.iter().zip(&bytes).position(|(was, is)| was != is) else { continue };
                let parsed = parse(&bytes);
                if first < PREAMBLE {
                    // Where the earlier file's beginning is whole, its first records are: what follows is damage.
                    assert!(payloads.starts_with(&parsed.records) && parsed.damage.is_some());
                    continue;
                }
                check_misplaced(&payloads, &starts, &bytes, first, &format!("{size} bytes at {to}"));
            }
        }
    }
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

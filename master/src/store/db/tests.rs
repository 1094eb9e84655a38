//! The engine on real files that were changed behind its back.

use std::path::Path;

use redb::AccessGuard;

use super::*;
use crate::store::medium::{DirMedium, STORE_FILE};
use crate::store::record::{FORMAT, FormatMark};
use crate::store::{FaultKind, Key, Record};

/// A closed store of ten records in `dir`.
fn make(dir: &Path) {
    let mut medium = DirMedium::lock(dir).unwrap();
    let record = |i: u64| Record { key: Key::new("node", format!("n{i}")), revision: Revision(i), value: "v".into() };
    let records: Vec<_> = (1..=10).map(record).collect();
    create(&mut medium, Head { revision: 10, epoch: 2, clean: true, ..Head::default() }, &records).unwrap();
}

fn open(dir: &Path) -> Result<Engine<DirMedium>, StoreError> {
    Engine::open(DirMedium::lock(dir).unwrap())
}

/// What a refusal says after `change` was made to the file behind the store's back, by redb's own means.
fn refusal(change: impl FnOnce(&WriteTransaction)) -> StoreError {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    open(dir.path()).unwrap().close().unwrap();
    let db = Database::open(dir.path().join(STORE_FILE)).unwrap();
    let write = db.begin_write().unwrap();
    change(&write);
    write.commit().unwrap();
    drop(db);
    open(dir.path()).err().expect("must be refused")
}

fn edit(write: &WriteTransaction, key: &Key, change: impl FnOnce(&mut Vec<u8>)) {
    let mut table = write.open_table(RECORDS).unwrap();
    let key = record::encode_key(key);
    let mut bytes =
        table.get(key.as_slice()).unwrap().map(|bytes: AccessGuard<'_, &[u8]>| bytes.value().to_vec()).unwrap();
    change(&mut bytes);
    table.insert(key.as_slice(), bytes.as_slice()).unwrap();
}

#[test]
fn a_newer_format_names_the_version_to_use() {
    let error = refusal(|write| {
        let mark = FormatMark { format: 7, written_by: "9.8.7".to_owned() };
        write.open_table(META).unwrap().insert(META_FORMAT, mark.encode().as_slice()).unwrap();
    });
    assert!(matches!(error, StoreError::FormatTooNew { found: 7, supported: FORMAT, .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("format 7") && text.contains("reads up to format 1"), "{text}");
    assert_eq!(error.hint().as_deref(), Some("use skein-master 9.8.7 or a newer one"));
}

#[test]
fn a_damaged_record_is_named() {
    let key = Key::new("node", "n3");
    let error = refusal(|write| edit(write, &key, |bytes| bytes[16] ^= 1));
    assert!(error.to_string().contains("record node/n3 is damaged"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("skein-master restore")));
}

#[test]
fn a_flipped_bit_in_the_file_is_named_by_its_record() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    let path = dir.path().join(STORE_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    let (stored, _) = record::encode_record(&record::encode_key(&Key::new("node", "n4")), 4, b"v");
    let places: Vec<_> = bytes.windows(stored.len()).enumerate().filter(|(_, window)| *window == stored).collect();
    let places: Vec<_> = places.into_iter().map(|(at, _)| at).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at + stored.len() - 1] ^= 4;
    }
    std::fs::write(&path, &bytes).unwrap();
    let error = open(dir.path()).err().expect("must be refused");
    assert!(error.to_string().contains("record node/n4 is damaged"), "{error}");
}

#[test]
fn a_record_moved_or_taken_away_or_put_back_is_seen() {
    let (n1, n2) = (record::encode_key(&Key::new("node", "n1")), record::encode_key(&Key::new("node", "n2")));
    let error = refusal(|write| {
        write.open_table(RECORDS).unwrap().remove(n1.as_slice()).unwrap();
    });
    assert!(error.to_string().contains("9 found, 10 expected"), "{error}");

    let error = refusal(|write| {
        let mut table = write.open_table(RECORDS).unwrap();
        let bytes = table.remove(n1.as_slice()).unwrap().map(|bytes| bytes.value().to_vec()).unwrap();
        table.insert(n2.as_slice(), bytes.as_slice()).unwrap();
    });
    assert!(error.to_string().contains("record node/n2 is damaged"), "{error}");

    // An older content of the record, in itself whole.
    let error = refusal(|write| {
        let (bytes, _) = record::encode_record(&n1, 1, b"older");
        write.open_table(RECORDS).unwrap().insert(n1.as_slice(), bytes.as_slice()).unwrap();
    });
    assert!(error.to_string().contains("does not match its digest"), "{error}");
}

#[test]
fn a_missing_head_or_table_is_seen() {
    for name in [META_HEAD, META_FORMAT] {
        let error = refusal(|write| {
            write.open_table(META).unwrap().remove(name).unwrap();
        });
        assert!(error.to_string().contains(&format!("head record `{name}` is missing")), "{error}");
    }
    let error = refusal(|write| {
        write.delete_table(META).unwrap();
    });
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    let error = refusal(|write| {
        write.delete_table(RECORDS).unwrap();
    });
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}

#[test]
fn damage_while_open_is_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    let mut engine = open(dir.path()).unwrap();
    let key = Key::new("node", "n5");
    let db = engine.db.as_ref().unwrap();
    let write = db.begin_write().unwrap();
    edit(&write, &key, |bytes| bytes[0] ^= 1);
    write.commit().unwrap();
    let txn = Txn { epoch: Epoch(2), guards: vec![], ops: vec![Op::Delete { key }] };
    let fault = engine.apply(&[&txn], Some(Epoch(2))).err().expect("must not use it");
    assert!(fault.reason.kind == FaultKind::Damaged && fault.reason.detail.contains("node/n5"), "{}", fault.reason);
    assert!(!fault.maybe_durable);
    assert!(engine.snapshot().is_err(), "closed until it is opened again");
    assert!(engine.reopen().is_err(), "and that finds it too");
}

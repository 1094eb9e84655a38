//! The store's directory, its lock, backup and restore, on real files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use skein_master::store::medium::{SCRATCH_FILE, STORE_FILE};
use skein_master::store::{
    EmbeddedStore, Epoch, Key, Op, Revision, Snapshot, Store, StoreError, Txn, TxnOutcome, backup_to_file, restore,
};

async fn write(store: &EmbeddedStore, ids: std::ops::Range<usize>) -> (Epoch, Revision) {
    let epoch = store.lead("test", Duration::from_secs(1)).await.unwrap();
    let mut last = Revision(0);
    for i in ids {
        let op = Op::Put { key: Key::new("node", format!("n{i}")), value: format!("value \0 {i}").into() };
        match store.txn(Txn { epoch, guards: vec![], ops: vec![op] }).await.unwrap() {
            TxnOutcome::Committed(revision) => last = revision,
            other => panic!("{other:?}"),
        }
    }
    (epoch, last)
}

async fn backup_of(dir: &Path) -> (Vec<u8>, Snapshot) {
    let store = EmbeddedStore::open(dir).unwrap();
    write(&store, 0..6).await;
    let mut file = Vec::new();
    let summary = store.backup(&mut file).await.unwrap();
    let snapshot = store.snapshot().await.unwrap();
    assert_eq!((summary.revision, summary.records), (snapshot.revision, 6));
    store.close().await.unwrap();
    (file, snapshot)
}

#[tokio::test]
async fn a_second_master_is_refused_and_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    let error = EmbeddedStore::open(dir.path()).unwrap_err();
    let pid = std::process::id();
    assert!(matches!(&error, StoreError::InUse { pid: Some(found), .. } if *found == pid), "{error}");
    let text = error.to_string();
    assert!(text.contains(&dir.path().display().to_string()) && text.contains(&format!("process {pid}")), "{text}");
    write(&store, 0..1).await;
    store.close().await.unwrap();
    EmbeddedStore::open(dir.path()).unwrap().close().await.unwrap();
}

#[tokio::test]
async fn a_store_outlives_its_process_and_epochs_grow() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b");
    let mut epochs = Vec::new();
    for i in 0..4 {
        let store = EmbeddedStore::open(&path).unwrap();
        let snapshot = store.snapshot().await.unwrap();
        assert_eq!((snapshot.revision, snapshot.records.len()), (Revision(i), usize::try_from(i).unwrap()));
        let id = usize::try_from(i).unwrap();
        epochs.push(write(&store, id..id + 1).await.0);
        store.close().await.unwrap();
    }
    assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&path.join(STORE_FILE))), (0o700, 0o600));
    assert!(!path.join(SCRATCH_FILE).exists());
}

#[tokio::test]
async fn what_is_not_a_store_is_refused_and_left_alone() {
    let check = |content: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(STORE_FILE);
        fs::write(&path, content).unwrap();
        let error = EmbeddedStore::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("skein-master restore")));
        assert_eq!(fs::read(&path).unwrap(), content);
    };
    check(b"");
    check(b"hello");
    check(&[0; 100_000]);
    check(&[0xff; 100_000]);
}

#[tokio::test]
async fn a_file_cut_short_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    backup_of(dir.path()).await;
    let whole = fs::read(dir.path().join(STORE_FILE)).unwrap();
    for len in [1, 100, 320, 4096, 8192, 20_000] {
        fs::write(dir.path().join(STORE_FILE), &whole[..len]).unwrap();
        let error = EmbeddedStore::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{len}: {error}");
    }
}

#[tokio::test]
async fn a_store_left_half_made_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(SCRATCH_FILE), b"half").unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    assert_eq!(store.snapshot().await.unwrap(), Snapshot::default());
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_file_that_went_back_is_refused_by_reopen() {
    let dir = tempfile::tempdir().unwrap();
    backup_of(dir.path()).await;
    let path = dir.path().join(STORE_FILE);
    let old = fs::read(&path).unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    write(&store, 6..8).await;
    fs::write(dir.path().join("old"), &old).unwrap();
    fs::rename(dir.path().join("old"), &path).unwrap();
    let error = store.reopen().await.unwrap_err();
    assert!(error.to_string().contains("acknowledged"), "{error}");
    assert!(matches!(store.snapshot().await, Err(StoreError::ReadOnly { .. })));
}

#[tokio::test]
async fn a_backup_restores_everything() {
    let dir = tempfile::tempdir().unwrap();
    let (file, before) = backup_of(&dir.path().join("old")).await;
    let new = dir.path().join("new");
    let summary = restore(&file[..], &new).unwrap();
    assert_eq!((summary.revision, summary.records), (before.revision, 6));
    let store = EmbeddedStore::open(&new).unwrap();
    let after = store.snapshot().await.unwrap();
    assert_eq!((&after.records, after.revision), (&before.records, before.revision));
    assert!(after.epoch.0 > before.epoch.0 + 1000, "agents have seen later epochs than the backup's");
    let (_, revision) = write(&store, 6..7).await;
    assert_eq!(revision, Revision(before.revision.0 + 1));
    store.close().await.unwrap();

    // As a file: its owner's alone, and never over another.
    let path = dir.path().join("backup");
    backup_to_file(&before, &path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), file);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(backup_to_file(&after, &path), Err(StoreError::Io { .. })));
    assert_eq!(fs::read(&path).unwrap(), file);

    // Neither over a store, nor over a damaged one.
    assert!(matches!(restore(&file[..], &new), Err(StoreError::Exists { .. })));
    fs::write(new.join(STORE_FILE), b"damaged").unwrap();
    assert!(matches!(restore(&file[..], &new), Err(StoreError::Exists { .. })));
    assert_eq!(fs::read(new.join(STORE_FILE)).unwrap(), b"damaged");
}

#[tokio::test]
async fn a_damaged_backup_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (file, _) = backup_of(&dir.path().join("old")).await;
    let new = dir.path().join("new");
    for byte in 0..file.len() {
        let mut damaged = file.clone();
        damaged[byte] ^= 1 << (byte % 7);
        assert!(restore(&damaged[..], &new).is_err(), "byte {byte}");
        assert!(restore(&file[..byte], &new).is_err(), "cut to {byte}");
    }
    assert!(restore([&file[..], b"{}\n"].concat().as_slice(), &new).is_err());
    assert!(!new.exists(), "verified before anything is written");

    let text = String::from_utf8(file).unwrap();
    let other = text.replace("dmFsdWUgACAy", "dmFsdWUgACAz");
    assert_ne!(other, text);
    let error = restore(other.as_bytes(), &new).unwrap_err();
    assert!(error.to_string().contains("node/n2"), "{error}");
    let newer = text.replacen("\"skein_backup\":1", "\"skein_backup\":9", 1);
    assert!(matches!(restore(newer.as_bytes(), &new), Err(StoreError::FormatTooNew { found: 9, .. })));
}

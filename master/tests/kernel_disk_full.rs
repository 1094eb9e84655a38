//! The embedded store on a real file system that is full. Needs root: it mounts a small tmpfs, in a mount namespace of a
//! thread of its own, which ends with the thread and the store's.

use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use skein_master::store::{EmbeddedStore, Epoch, FaultKind, Key, Op, Store, StoreError, Txn, TxnOutcome};

/// Runs `f` where `dir` is an empty file system of 4 MiB that nobody else sees.
fn on_a_small_disk(dir: &Path, f: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let none: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNS).expect("needs root: a mount namespace");
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
                .expect("mounts of the namespace can be made private");
            mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some("size=4m")).expect("needs root: a tmpfs");
            f();
            umount(dir).expect("nothing is open on it");
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

async fn put(store: &EmbeddedStore, epoch: Epoch, i: usize) -> Result<TxnOutcome, StoreError> {
    let op = Op::Put { key: Key::new("config", i.to_string()), value: vec![1; 50_000].into() };
    store.txn(Txn { epoch, guards: vec![], ops: vec![op] }).await
}

async fn fill_and_recover(dir: &Path) {
    let store = EmbeddedStore::open(&dir.join("store")).unwrap();
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 1 << 20]).unwrap();
    let epoch = store.lead("test", Duration::from_secs(1)).await.unwrap();
    let mut written = 0;
    while let Ok(TxnOutcome::Committed(_)) = put(&store, epoch, written).await {
        written += 1;
        assert!(written < 1000, "the disk does not fill");
    }
    let error = put(&store, epoch, written).await.unwrap_err();
    assert!(matches!(&error, StoreError::ReadOnly { reason } if reason.kind == FaultKind::DiskFull), "{error}");

    std::fs::remove_file(&ballast).unwrap();
    store.reopen().await.unwrap();
    let found = store.snapshot().await.unwrap().records.len();
    assert!(found == written || found == written + 1, "{found} of {written}");
    let epoch = store.lead("test", Duration::from_secs(1)).await.unwrap();
    assert!(matches!(put(&store, epoch, written + 1).await, Ok(TxnOutcome::Committed(_))));
    store.close().await.unwrap();
}

#[test]
fn a_full_file_system_is_named_and_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    on_a_small_disk(dir.path(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(fill_and_recover(dir.path()));
    });
}

//! Disks that fail while the store is open: read-only with a name for it, and back by reopening. And group commit, counted.

use std::time::Duration;

use futures_util::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use skein_master::store::{
    EmbeddedStore, Epoch, FaultKind, Key, Op, ReadOnlyReason, Store, StoreError, StoreHealth, Txn, TxnOutcome,
};

use crate::disk::{Disk, Failure};
use crate::long;
use crate::workload::{Model, apply, model_of, random_txn, until};

const TTL: Duration = Duration::from_secs(15);

/// Twelve transactions with one failure at `step`, and another one at the step `again` of the reopening that follows;
/// returns whether the last of them struck.
async fn survive(step: usize, failure: Failure, again: Option<usize>) -> bool {
    let what = format!("{failure:?} at step {step}, again {again:?}");
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let mut epoch = store.lead("test", TTL).await.unwrap();
    let offset = disk.log_len();
    disk.fail_at(offset + step, failure);
    let mut rng = StdRng::seed_from_u64(3);
    let mut model = Model::new();
    let mut struck = false;
    for i in 0..12 {
        let txn = random_txn(epoch, 6, &mut rng);
        let ops = txn.ops.clone();
        let maybe = match store.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => {
                apply(&mut model, revision, &ops);
                continue;
            }
            Ok(TxnOutcome::Unknown) => true,
            Err(StoreError::ReadOnly { reason }) => {
                let kind = if failure == Failure::Panic { FaultKind::Engine } else { FaultKind::Io };
                assert_eq!(reason.kind, kind, "{what}: {reason}");
                false
            }
            other => panic!("{what}: transaction {i}: {other:?}"),
        };
        struck = true;
        assert!(matches!(*store.health().borrow(), StoreHealth::ReadOnly(_)), "{what}");
        let refused = store.txn(random_txn(epoch, 6, &mut rng)).await;
        assert!(matches!(refused, Err(StoreError::ReadOnly { .. })), "{what}: {refused:?}");
        assert!(matches!(store.snapshot().await, Err(StoreError::ReadOnly { .. })), "{what}");

        let mut reopened = Err(StoreError::Closed);
        if let Some(again) = again {
            disk.fail_at(disk.log_len() + again, failure);
            reopened = store.reopen().await;
            disk.clear_failure();
            struck = reopened.is_err();
            let refused = store.txn(random_txn(epoch, 6, &mut rng)).await;
            assert!(!struck || matches!(refused, Err(StoreError::ReadOnly { .. })), "{what}: {refused:?}");
        }
        let revision = match reopened {
            Ok(revision) => revision,
            Err(_) => store.reopen().await.unwrap_or_else(|error| panic!("{what}: {error}")),
        };
        assert_eq!(*store.health().borrow(), StoreHealth::Writable);
        let found = model_of(&store.snapshot().await.unwrap());
        if found != model {
            assert!(maybe, "{what}: a transaction that surely failed is there");
            apply(&mut model, revision, &ops);
            assert!(found == model, "{what}: half a transaction is there");
        }
        epoch = store.lead("test", TTL).await.unwrap();
    }
    assert!(model_of(&store.snapshot().await.unwrap()) == model, "{what}");
    if let Err(error) = store.close().await {
        // The failure came with the close's own writes.
        assert!(!struck && matches!(error, StoreError::ReadOnly { .. }), "{what}: {error}");
        struck = true;
    }
    disk.clear_failure();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(model_of(&store.snapshot().await.unwrap()) == model, "{what}: after the close");
    struck
}

#[tokio::test]
async fn an_error_at_any_step_is_survived() {
    let mut step = 0;
    while survive(step, Failure::Error, None).await {
        step += 1;
    }
    assert!(step > 50, "only {step} steps");
}

#[tokio::test]
async fn a_panic_at_any_step_is_survived() {
    let mut step = 0;
    while survive(step, Failure::Panic, None).await {
        step += 1;
    }
    assert!(step > 50, "only {step} steps");
}

#[tokio::test]
async fn an_error_while_reopening_is_survived() {
    // Each of the first failures, or of CI's choice of them, then one at each step of what follows.
    let (every, mut struck) = (if long() { 1 } else { 13 }, 0);
    for step in (0..60).step_by(every) {
        for failure in [Failure::Error, Failure::Panic] {
            let mut again = 0;
            while survive(step, failure, Some(again)).await {
                again += 1;
            }
            struck += again;
        }
    }
    eprintln!("{struck} failures while reopening");
    assert!(struck > 20, "only {struck} failures while reopening");
}

#[tokio::test]
async fn a_full_disk_is_named_and_left_behind() {
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let epoch = store.lead("test", TTL).await.unwrap();
    disk.set_capacity(Some(disk.view().len() + 100_000));
    let large = |epoch: Epoch, i: usize| {
        let op = Op::Put { key: Key::new("large", i.to_string()), value: vec![1; 50_000].into() };
        store.txn(Txn { epoch, guards: vec![], ops: vec![op] })
    };
    let mut written = 0;
    loop {
        match large(epoch, written).await {
            Ok(TxnOutcome::Committed(_)) => written += 1,
            Ok(TxnOutcome::Unknown) | Err(_) => break,
            other => panic!("{other:?}"),
        }
        assert!(written < 1000, "the disk does not fill");
    }
    let Err(error @ StoreError::ReadOnly { reason: ReadOnlyReason { kind: FaultKind::DiskFull, .. } }) =
        large(epoch, written).await
    else {
        panic!("not named as a full disk")
    };
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("room")));

    // Reopening may work or not while the disk is full; either way nothing is lost.
    let _ = store.reopen().await;
    disk.set_capacity(None);
    store.reopen().await.unwrap();
    let found = store.snapshot().await.unwrap().records.len();
    assert!(found == written || found == written + 1, "{found} of {written}");
    let epoch = store.lead("test", TTL).await.unwrap();
    assert!(matches!(large(epoch, written + 1).await, Ok(TxnOutcome::Committed(_))));
}

#[tokio::test]
async fn many_transactions_share_a_sync() {
    const TXNS: usize = 400;
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let epoch = store.lead("test", TTL).await.unwrap();
    let put = |i: usize| {
        let op = Op::Put { key: Key::new("k", i.to_string()), value: "x".into() };
        store.txn(Txn { epoch, guards: vec![], ops: vec![op] })
    };
    let before = disk.syncs();
    // The first holds the disk; the others gather meanwhile.
    disk.set_gate(true);
    let gathered = async {
        until("the first sync", || disk.is_blocked()).await;
        let rest = join_all((1..TXNS).map(put));
        let open = async {
            tokio::task::yield_now().await;
            disk.set_gate(false);
        };
        tokio::join!(rest, open).0
    };
    let (first, rest) = tokio::join!(put(0), gathered);
    for outcome in rest.into_iter().chain([first]) {
        assert!(matches!(outcome, Ok(TxnOutcome::Committed(_))), "{outcome:?}");
    }
    let syncs = disk.syncs() - before;
    // One for the first, one for the rest, and perhaps a seal.
    assert!(syncs <= 4, "{TXNS} transactions took {syncs} syncs");
    let stats = store.stats();
    assert_eq!(stats.commits_total, TXNS as u64);
    assert!(stats.groups_total <= 3, "{stats:?}");
    assert_eq!(store.snapshot().await.unwrap().records.len(), TXNS);
}

#[tokio::test]
async fn a_closed_store_says_so() {
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let other = store.clone();
    let mut watch = store.watch(store.snapshot().await.unwrap().revision);
    store.close().await.unwrap();
    assert!(matches!(other.snapshot().await, Err(StoreError::Closed)));
    assert!(matches!(other.lead("x", TTL).await, Err(StoreError::Closed)));
    assert_eq!(*other.health().borrow(), StoreHealth::Closed);
    assert!(watch.next().await.is_err());
    assert!(matches!(other.close().await, Err(StoreError::Closed)));
}

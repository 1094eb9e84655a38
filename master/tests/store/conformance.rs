//! What every store promises to the master's loop. Takes a fresh store and nothing else, so that each implementation runs
//! the same checks.

use std::sync::Arc;
use std::time::Duration;

use skein_master::store::{
    Conflict, EmbeddedStore, Epoch, Guard, InvalidTxn, Key, Op, Revision, Snapshot, Store, StoreError, StoreHealth,
    Txn, TxnOutcome, VALUE_BYTES_MAX,
};

use crate::disk::Disk;

const TTL: Duration = Duration::from_secs(15);

fn put(id: &str, value: &str) -> Op {
    Op::Put { key: Key::new("node", id), value: value.to_owned().into() }
}

fn delete(id: &str) -> Op {
    Op::Delete { key: Key::new("node", id) }
}

fn absent(id: &str) -> Guard {
    Guard::Absent { key: Key::new("node", id) }
}

fn revision_is(id: &str, revision: Revision) -> Guard {
    Guard::RevisionIs { key: Key::new("node", id), revision }
}

async fn txn(store: &dyn Store, epoch: Epoch, guards: Vec<Guard>, ops: Vec<Op>) -> TxnOutcome {
    store.txn(Txn { epoch, guards, ops }).await.expect("the transaction is valid and the store is healthy")
}

async fn committed(store: &dyn Store, epoch: Epoch, ops: Vec<Op>) -> Revision {
    match txn(store, epoch, Vec::new(), ops).await {
        TxnOutcome::Committed(revision) => revision,
        other => panic!("not committed: {other:?}"),
    }
}

fn contents(snapshot: &Snapshot) -> Vec<(String, Revision, String)> {
    let text = |value: &[u8]| String::from_utf8(value.to_vec()).expect("the test writes text");
    snapshot.records.iter().map(|record| (record.key.to_string(), record.revision, text(&record.value))).collect()
}

/// Runs every check, one after the other, on one store that holds nothing yet.
pub(crate) async fn conformance(store: Arc<dyn Store>) {
    let store = &*store;
    assert_eq!(*store.health().borrow(), StoreHealth::Writable);
    assert!(store.snapshot().await.expect("a fresh store can be read").records.is_empty());
    let epoch = epochs_fence(store).await;
    records_and_revisions(store, epoch).await;
    guards_are_all_or_nothing(store, epoch).await;
    invalid_is_refused(store, epoch).await;
    watches_follow(store, epoch).await;
    concurrent_counters(store, epoch).await;
    reopening_ends_the_lead(store, epoch).await;
}

async fn epochs_fence(store: &dyn Store) -> Epoch {
    let nobody = txn(store, Epoch(0), vec![], vec![put("fence", "0")]).await;
    assert!(matches!(nobody, TxnOutcome::Conflict(Conflict::Epoch { .. })), "{nobody:?}");
    let first = store.lead("one", TTL).await.expect("nobody leads");
    assert!(first > Epoch(0));
    let held = store.lead("two", TTL).await;
    assert!(
        matches!(&held, Err(StoreError::LeadHeld { holder, epoch }) if holder == "one" && *epoch == first),
        "{held:?}"
    );
    committed(store, first, vec![put("fence", "1")]).await;

    store.resign(first).await.expect("a leader may resign");
    store.resign(first).await.expect("and again");
    let resigned = txn(store, first, vec![], vec![put("fence", "2")]).await;
    assert!(matches!(resigned, TxnOutcome::Conflict(Conflict::Epoch { .. })), "{resigned:?}");
    let second = store.lead("two", TTL).await.expect("the lead is free");
    assert!(second > first);
    let late = txn(store, first, vec![], vec![put("fence", "3")]).await;
    assert_eq!(late, TxnOutcome::Conflict(Conflict::Epoch { current: second }));
    store.resign(first).await.expect("resigning a past term does nothing");
    committed(store, second, vec![delete("fence")]).await;
    assert!(store.snapshot().await.unwrap().records.is_empty());
    second
}

async fn records_and_revisions(store: &dyn Store, epoch: Epoch) {
    let first = committed(store, epoch, vec![put("b", "1"), put("a", "1")]).await;
    let second = committed(store, epoch, vec![put("b", "2")]).await;
    assert!(second > first);
    let snapshot = store.snapshot().await.unwrap();
    assert_eq!((snapshot.revision, snapshot.epoch), (second, epoch));
    let expected = [("node/a", first, "1"), ("node/b", second, "2")].map(|(k, r, v)| (k.to_owned(), r, v.to_owned()));
    assert_eq!(contents(&snapshot), expected);

    let third = committed(store, epoch, vec![delete("a"), put("empty", "")]).await;
    let expected =
        [("node/b", second, "2"), ("node/empty", third, "")].map(|(k, r, v)| (k.to_owned(), r, v.to_owned()));
    assert_eq!(contents(&store.snapshot().await.unwrap()), expected);

    // What changes nothing makes no revision.
    assert_eq!(committed(store, epoch, vec![]).await, third);
    assert_eq!(committed(store, epoch, vec![delete("a")]).await, third);
    assert_eq!(store.snapshot().await.unwrap().revision, third);
}

async fn guards_are_all_or_nothing(store: &dyn Store, epoch: Epoch) {
    let seen = committed(store, epoch, vec![put("g", "1")]).await;
    let before = store.snapshot().await.unwrap();
    let record = |found| TxnOutcome::Conflict(Conflict::Record { key: Key::new("node", "g"), found });

    let exists = txn(store, epoch, vec![absent("g")], vec![put("g", "x"), put("h", "x")]).await;
    assert_eq!(exists, record(Some(seen)));
    let other = txn(store, epoch, vec![absent("h"), revision_is("g", Revision(seen.0 + 1))], vec![put("h", "x")]).await;
    assert_eq!(other, record(Some(seen)));
    let gone = txn(store, epoch, vec![revision_is("none", seen)], vec![put("h", "x")]).await;
    assert_eq!(gone, TxnOutcome::Conflict(Conflict::Record { key: Key::new("node", "none"), found: None }));
    assert_eq!(store.snapshot().await.unwrap(), before, "a conflict changes nothing");

    // Guards look at the state before the operations.
    let holds = txn(store, epoch, vec![absent("h"), revision_is("g", seen)], vec![put("h", "1"), delete("g")]).await;
    assert!(matches!(holds, TxnOutcome::Committed(_)));
    let again = txn(store, epoch, vec![revision_is("g", seen)], vec![put("g", "x")]).await;
    assert_eq!(again, record(None));
    let asks = txn(store, epoch, vec![absent("g")], vec![]).await;
    assert!(matches!(asks, TxnOutcome::Committed(_)));
}

async fn invalid_is_refused(store: &dyn Store, epoch: Epoch) {
    let before = store.snapshot().await.unwrap();
    let bad_key = Op::Put { key: Key::new("No", "a"), value: "x".into() };
    let too_large = Op::Put { key: Key::new("node", "large"), value: vec![0; VALUE_BYTES_MAX + 1].into() };
    for ops in [vec![put("i", "x"), bad_key], vec![put("i", "x"), too_large], vec![put("i", "x"), delete("i")]] {
        let refused = store.txn(Txn { epoch, guards: vec![], ops }).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
    let twice = store.txn(Txn { epoch, guards: vec![], ops: vec![delete("i"), delete("i")] }).await;
    assert!(matches!(twice, Err(StoreError::Invalid(InvalidTxn::ChangedTwice { .. }))), "{twice:?}");
    assert_eq!(store.snapshot().await.unwrap(), before);
    let largest = Op::Put { key: Key::new("node", "large"), value: vec![7; VALUE_BYTES_MAX].into() };
    committed(store, epoch, vec![largest]).await;
    committed(store, epoch, vec![delete("large")]).await;
}

async fn watches_follow(store: &dyn Store, epoch: Epoch) {
    let start = store.snapshot().await.unwrap().revision;
    let first = committed(store, epoch, vec![put("w", "1"), delete("never-there")]).await;
    let mut watch = store.watch(start);
    let mut late = store.watch(first);
    let second = committed(store, epoch, vec![put("w", "2"), put("v", "1")]).await;
    let _ = txn(store, epoch, vec![absent("w")], vec![put("w", "conflict")]).await;
    let third = committed(store, epoch, vec![delete("w"), delete("v")]).await;

    let commit = watch.next().await.unwrap();
    assert_eq!((commit.revision, &commit.ops[..]), (first, &[put("w", "1")][..]));
    let commit = watch.next().await.unwrap();
    assert_eq!((commit.revision, &commit.ops[..]), (second, &[put("w", "2"), put("v", "1")][..]));
    let commit = watch.next().await.unwrap();
    assert_eq!((commit.revision, &commit.ops[..]), (third, &[delete("w"), delete("v")][..]));
    assert_eq!(late.next().await.unwrap().revision, second);

    let waiting = async { watch.next().await.unwrap().revision };
    let (seen, wrote) = tokio::join!(waiting, committed(store, epoch, vec![put("w", "3")]));
    assert_eq!(seen, wrote);
}

/// Optimistic increments by many tasks lose none.
async fn concurrent_counters(store: &dyn Store, epoch: Epoch) {
    let increment = |_| async {
        let mut tries = 0;
        loop {
            tries += 1;
            assert!(tries < 100, "no progress");
            let snapshot = store.snapshot().await.unwrap();
            let record = snapshot.records.iter().find(|record| record.key == Key::new("node", "count"));
            let (guard, next) = match record {
                None => (absent("count"), 1),
                Some(record) => {
                    let text = std::str::from_utf8(&record.value).unwrap();
                    (revision_is("count", record.revision), text.parse::<u64>().unwrap() + 1)
                }
            };
            if let TxnOutcome::Committed(_) =
                txn(store, epoch, vec![guard], vec![put("count", &next.to_string())]).await
            {
                return;
            }
        }
    };
    futures_util::future::join_all((0..16).map(increment)).await;
    let snapshot = store.snapshot().await.unwrap();
    let record = snapshot.records.iter().find(|record| record.key == Key::new("node", "count")).unwrap();
    assert_eq!(record.value, "16");
}

async fn reopening_ends_the_lead(store: &dyn Store, epoch: Epoch) {
    let before = store.snapshot().await.unwrap();
    assert_eq!(store.reopen().await.unwrap(), before.revision);
    assert_eq!(store.snapshot().await.unwrap(), before);
    let fenced = txn(store, epoch, vec![], vec![put("z", "1")]).await;
    assert!(matches!(fenced, TxnOutcome::Conflict(Conflict::Epoch { .. })), "{fenced:?}");
    let next = store.lead("three", TTL).await.unwrap();
    assert!(next > epoch);
    committed(store, next, vec![put("z", "1")]).await;
}

#[tokio::test]
async fn the_embedded_store_conforms_on_a_simulated_disk() {
    let store = EmbeddedStore::open_medium(Disk::default().medium()).unwrap();
    conformance(Arc::new(store.clone())).await;
    store.close().await.unwrap();
}

#[tokio::test]
async fn the_embedded_store_conforms_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("new")).unwrap();
    conformance(Arc::new(store.clone())).await;
    store.close().await.unwrap();
}

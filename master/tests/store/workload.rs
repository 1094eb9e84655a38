//! A workload with a known answer at every revision, and the comparison with what a store holds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::Rng;
use rand::rngs::StdRng;
use skein_master::store::{Epoch, Key, Op, Revision, Snapshot, Txn};

/// Records without revisions: what a snapshot must show.
pub(crate) type Model = BTreeMap<Key, (Revision, Bytes)>;

pub(crate) fn key(id: usize) -> Key {
    Key::new(["node", "service", "task"][id % 3], format!("id-{id}"))
}

/// One to five changes of a few keys; values from nothing to two pages.
pub(crate) fn random_txn(epoch: Epoch, keys: usize, rng: &mut StdRng) -> Txn {
    let mut ops: BTreeMap<Key, Op> = BTreeMap::new();
    for _ in 0..rng.random_range(1..=5) {
        let key = key(rng.random_range(0..keys));
        let op = match rng.random_range(0..10) {
            0..2 => Op::Delete { key: key.clone() },
            roll => {
                let value_bytes = if roll < 8 { rng.random_range(0..400) } else { rng.random_range(2000..9000) };
                Op::Put { key: key.clone(), value: (0..value_bytes).map(|_| rng.random()).collect::<Vec<u8>>().into() }
            }
        };
        ops.insert(key, op);
    }
    Txn { epoch, guards: Vec::new(), ops: ops.into_values().collect() }
}

pub(crate) fn apply(model: &mut Model, revision: Revision, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Put { key, value } => model.insert(key.clone(), (revision, value.clone())),
            Op::Delete { key } => model.remove(key),
        };
    }
}

pub(crate) fn model_of(snapshot: &Snapshot) -> Model {
    let records = snapshot.records.iter();
    records.map(|record| (record.key.clone(), (record.revision, record.value.clone()))).collect()
}

/// Waits until `done`, for ten seconds at most.
pub(crate) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen in 10 s");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

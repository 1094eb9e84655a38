//! Single flipped bits, anywhere in the file: refused, or without effect; never silently wrong.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use skein_master::store::{EmbeddedStore, Store, StoreError, TxnOutcome};

use crate::disk::{Disk, replay};
use crate::workload::{Model, model_of, random_txn, until};

/// Bytes of redb's header: two commit slots and what selects between them.
const HEADER_BYTES: usize = 320;

/// A store with forty transactions, sealed, and closed in order if `close`.
async fn make(close: bool) -> (Vec<u8>, Model) {
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let epoch = store.lead("test", Duration::from_secs(1)).await.unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..40 {
        let outcome = store.txn(random_txn(epoch, 30, &mut rng)).await.unwrap();
        assert!(matches!(outcome, TxnOutcome::Committed(_)));
    }
    let model = model_of(&store.snapshot().await.unwrap());
    until("the seal", || store.stats().sealed_commits_total == store.stats().commits_total).await;
    if close {
        store.close().await.unwrap();
    }
    (disk.view(), model)
}

async fn flip(image: &[u8], model: &Model, bits: impl Iterator<Item = usize>) -> (usize, usize) {
    let (mut refused, mut harmless) = (0, 0);
    for bit in bits {
        let mut damaged = image.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let found = match EmbeddedStore::open_medium(Disk::with_image(damaged).medium()) {
            Ok(store) => store.snapshot().await,
            Err(error) => Err(error),
        };
        match found {
            Ok(snapshot) => {
                assert!(model_of(&snapshot) == *model, "bit {bit} of byte {} changes the records silently", bit / 8);
                harmless += 1;
            }
            Err(StoreError::Damaged { .. } | StoreError::Failed { .. } | StoreError::ReadOnly { .. }) => refused += 1,
            Err(error) => panic!("bit {bit}: {error}"),
        }
    }
    (refused, harmless)
}

async fn flips(close: bool, offset: usize) {
    let (image, model) = make(close).await;
    let mut rng = StdRng::seed_from_u64(offset as u64);
    let header = (0..HEADER_BYTES * 8).filter(|bit| (bit + offset).is_multiple_of(7));
    let (refused, harmless) = flip(&image, &model, header).await;
    eprintln!("header: {refused} refused, {harmless} harmless");

    // Where something is; the rest of the file is free pages.
    let used: Vec<usize> = (HEADER_BYTES..image.len()).filter(|byte| image[*byte] != 0).collect();
    let bits: Vec<usize> =
        (0..500).map(|_| used[rng.random_range(0..used.len())] * 8 + rng.random_range(0..8)).collect();
    let (refused, harmless) = flip(&image, &model, bits.into_iter()).await;
    eprintln!("pages: {refused} refused, {harmless} harmless");
    assert!(refused > 20, "the flips hit nothing: {refused} refused, {harmless} harmless");
}

/// Damage to the very last commit, before it was sealed, looks like a commit torn by a crash. The one thing it can do is to
/// take that commit away, as a whole.
#[tokio::test]
async fn a_flipped_bit_before_the_seal_takes_the_last_commit_at_most() {
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let epoch = store.lead("test", Duration::from_secs(1)).await.unwrap();
    let mut rng = StdRng::seed_from_u64(6);
    let mut models = Vec::new();
    let mut steps = 0;
    for _ in 0..20 {
        let outcome = store.txn(random_txn(epoch, 30, &mut rng)).await.unwrap();
        assert!(matches!(outcome, TxnOutcome::Committed(_)));
        steps = disk.log_len();
        models.push(model_of(&store.snapshot().await.unwrap()));
    }
    let image = replay(&disk.log()[..steps]);
    let used: Vec<usize> = (0..image.len()).filter(|byte| image[*byte] != 0).collect();
    let (mut refused, mut right, mut before) = (0, 0, 0);
    for i in 0..300 {
        let byte = if i % 3 == 0 { rng.random_range(0..HEADER_BYTES) } else { used[rng.random_range(0..used.len())] };
        let mut damaged = image.clone();
        damaged[byte] ^= 1 << rng.random_range(0..8);
        let Ok(store) = EmbeddedStore::open_medium(Disk::with_image(damaged).medium()) else {
            refused += 1;
            continue;
        };
        let found = model_of(&store.snapshot().await.unwrap());
        match models.iter().rev().position(|model| *model == found) {
            Some(0) => right += 1,
            Some(1) => before += 1,
            back => panic!("byte {byte}: {back:?} commits back"),
        }
    }
    eprintln!("unsealed: {refused} refused, {right} right, {before} without the last commit");
}

#[tokio::test]
async fn flipped_bits_in_a_closed_store_are_never_silent() {
    flips(true, 1).await;
}

#[tokio::test]
async fn flipped_bits_in_a_sealed_store_are_never_silent() {
    flips(false, 4).await;
}

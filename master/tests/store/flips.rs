//! Flipped bits and bytes, anywhere in the file: refused with a name, or without effect, now and later; never silently wrong.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use skein_master::store::{EmbeddedStore, Store, StoreError, TxnOutcome};

use crate::disk::{Disk, replay};
use crate::long;
use crate::workload::{Model, apply, model_of, random_txn, until};

/// Bytes of redb's header: two commit slots and what selects between them.
const HEADER_BYTES: usize = 320;

/// Bytes of a page of redb.
const PAGE_BYTES: usize = 4096;

/// Of the bytes of a small store's pages, one in so many is flipped in CI. No divisor of anything, so that no field is left
/// out.
const SWEEP_STEP: usize = 229;

/// A store with so many transactions on so many keys, sealed, and closed in order if `close`.
async fn make(close: bool, txns: usize, keys: usize) -> (Vec<u8>, Model) {
    let disk = Disk::default();
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
    let epoch = store.lead("test", Duration::from_secs(1)).await.unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..txns {
        let outcome = store.txn(random_txn(epoch, keys, &mut rng)).await.unwrap();
        assert!(matches!(outcome, TxnOutcome::Committed(_)));
    }
    let model = model_of(&store.snapshot().await.unwrap());
    until("the seal", || store.stats().sealed_commits_total == store.stats().commits_total).await;
    if close {
        store.close().await.unwrap();
    }
    (disk.view(), model)
}

/// What came of flips: damage that was named, and without effect.
#[derive(Debug, Default)]
struct Tally {
    refused: usize,
    harmless: usize,
}

impl Tally {
    /// Opens the image with one byte changed by `mask`. It is refused with a name for the place, or what it holds is right,
    /// and stays so when the store goes on: damage to what says which pages are free would show only then.
    async fn flip(&mut self, image: &[u8], model: &Model, byte: usize, mask: u8) {
        let what = format!("byte {byte} of {}, changed by {mask:#04x}", image.len());
        let mut damaged = image.to_vec();
        damaged[byte] ^= mask;
        let disk = Disk::with_image(damaged);
        let refusal = match EmbeddedStore::open_medium(disk.medium()) {
            Ok(store) => go_on(store, &disk, model, &what).await.err(),
            Err(error) => Some(error),
        };
        match refusal {
            None => self.harmless += 1,
            Some(error @ (StoreError::Damaged { .. } | StoreError::Failed { .. } | StoreError::ReadOnly { .. })) => {
                self.refused += 1;
                let text = error.to_string();
                let named = text.contains("simulated disk") || matches!(error, StoreError::ReadOnly { .. });
                assert!(named && error.hint().is_some(), "{what}: {text}");
            }
            Some(error) => panic!("{what}: {error}"),
        }
    }
}

/// Compares, changes, closes, and opens again.
async fn go_on(store: EmbeddedStore, disk: &Disk, model: &Model, what: &str) -> Result<(), StoreError> {
    let snapshot = store.snapshot().await?;
    assert!(model_of(&snapshot) == *model, "{what}: the records are silently others");
    let epoch = store.lead("test", Duration::from_secs(1)).await?;
    let mut rng = StdRng::seed_from_u64(9);
    let mut model = model.clone();
    for _ in 0..3 {
        let txn = random_txn(epoch, 30, &mut rng);
        match store.txn(txn.clone()).await? {
            TxnOutcome::Committed(revision) => apply(&mut model, revision, &txn.ops),
            other => panic!("{what}: {other:?}"),
        }
    }
    store.close().await?;
    let again = EmbeddedStore::open_medium(disk.medium())?.snapshot().await?;
    assert!(model_of(&again) == model, "{what}: the records are silently others later");
    Ok(())
}

async fn flips(close: bool, seed: u64) {
    let (image, model) = make(close, 40, 30).await;
    let mut rng = StdRng::seed_from_u64(seed);
    let used: Vec<usize> = (0..image.len()).filter(|byte| image[*byte] != 0).collect();
    let mut tally = Tally::default();
    for _ in 0..300 {
        let byte = used[rng.random_range(0..used.len())];
        tally.flip(&image, &model, byte, 1 << rng.random_range(0..8)).await;
    }
    eprintln!("large store: {tally:?}");
    assert!(tally.refused > 10, "the flips hit nothing: {tally:?}");
}

/// Every byte of the header and of every page of a small store in which anything was ever written; in CI one in
/// [`SWEEP_STEP`] of the pages' bytes.
async fn sweep(close: bool) {
    let (image, model) = make(close, 6, 5).await;
    let page_used = |page: usize| image[page * PAGE_BYTES..].iter().take(PAGE_BYTES).any(|byte| *byte != 0);
    let used: Vec<usize> = (0..image.len() / PAGE_BYTES).filter(|page| page_used(*page)).collect();
    let (mut header, mut pages) = (Tally::default(), Tally::default());
    for byte in 0..HEADER_BYTES {
        header.flip(&image, &model, byte, 1 << (byte % 8)).await;
        if long() {
            header.flip(&image, &model, byte, 0xff).await;
        }
    }
    let bytes = used.iter().flat_map(|page| page * PAGE_BYTES..(page + 1) * PAGE_BYTES);
    let step = if long() { 1 } else { SWEEP_STEP };
    for byte in bytes.skip_while(|byte| *byte < HEADER_BYTES).step_by(step) {
        // A closed store's byte loses all its bits, a sealed one's a single one: both kinds of damage, at half the time.
        pages.flip(&image, &model, byte, if close { 0xff } else { 1 << (byte / step % 8) }).await;
    }
    eprintln!("{} of {} pages used; header: {header:?}; pages: {pages:?}", used.len(), image.len() / PAGE_BYTES);
    assert!(header.refused > 20 && pages.refused > 50, "the flips hit nothing: {header:?}, {pages:?}");
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

#[tokio::test]
async fn no_flipped_byte_of_a_small_closed_store_is_silent() {
    sweep(true).await;
}

#[tokio::test]
async fn no_flipped_byte_of_a_small_sealed_store_is_silent() {
    sweep(false).await;
}

//! A crash at every write, length change and sync of a workload: what was acknowledged is there, nothing is there by half.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use skein_master::store::{
    EmbeddedStore, Epoch, Key, Op, Revision, Store, Txn, TxnOutcome, read_backup, restore_medium,
};

use crate::disk::{Disk, Step, Survivors, crashed, replay};
use crate::long;
use crate::workload::{Model, apply, model_of, random_txn, until};

/// What the store must hold, given where the crash was.
struct Truth {
    /// The records at each revision.
    models: Vec<Model>,
    /// (steps that were done when it was seen, revision, epoch), in order.
    acknowledged: Vec<(usize, Revision, Epoch)>,
    /// Taken while changes were made.
    backups: Vec<Vec<u8>>,
}

impl Truth {
    /// The least that must be there after a crash at `step`.
    fn at(&self, step: usize) -> (Revision, Epoch) {
        let seen = self.acknowledged.iter().take_while(|(done, ..)| *done <= step);
        seen.fold((Revision(0), Epoch(0)), |(revision, epoch), (_, r, e)| (revision.max(*r), epoch.max(*e)))
    }
}

struct Recorder {
    disk: Disk,
    store: EmbeddedStore,
    epoch: Epoch,
    commits: Mutex<BTreeMap<Revision, Vec<Op>>>,
    acknowledged: Mutex<Vec<(usize, Revision, Epoch)>>,
}

impl Recorder {
    async fn commit(&self, mut txn: Txn) {
        txn.epoch = self.epoch;
        let TxnOutcome::Committed(revision) = self.store.txn(txn.clone()).await.unwrap() else {
            panic!("nothing conflicts here");
        };
        self.acknowledged.lock().unwrap().push((self.disk.log_len(), revision, self.epoch));
        self.commits.lock().unwrap().insert(revision, txn.ops);
    }
}

/// Two sessions: single transactions, groups, an idle moment with its seal, a large and a shrinking store.
async fn record() -> (Disk, Truth) {
    let disk = Disk::default();
    let mut rng = StdRng::seed_from_u64(7);
    let mut models = vec![Model::new()];
    let (mut acknowledged, mut backups) = (Vec::new(), Vec::new());
    for session in 0..2 {
        let store = EmbeddedStore::open_medium(disk.medium()).unwrap();
        let epoch = store.lead("recorder", Duration::from_secs(1)).await.unwrap();
        acknowledged.push((disk.log_len(), Revision(0), epoch));
        let recorder =
            Recorder { disk: disk.clone(), store, epoch, commits: Mutex::default(), acknowledged: Mutex::default() };
        for _ in 0..8 {
            recorder.commit(random_txn(epoch, 12, &mut rng)).await;
        }
        let sealed = || recorder.store.stats().sealed_commits_total == recorder.store.stats().commits_total;
        until("the seal", sealed).await;
        for _ in 0..2 {
            // Apart in their keys, so that the order within the group does not matter to the model.
            let group = (0..10).map(|i| {
                let key = Key::new("group", format!("{session}-{i}"));
                let value = vec![rng.random(); rng.random_range(0..3000)].into();
                Txn { epoch, guards: vec![], ops: vec![Op::Put { key, value }] }
            });
            let group = join_all(group.collect::<Vec<_>>().into_iter().map(|txn| recorder.commit(txn)));
            let mut file = Vec::new();
            let (_, backup) = tokio::join!(group, recorder.store.backup(&mut file));
            backup.unwrap();
            backups.push(file);
        }
        let large = (0..16).map(|i| Op::Put { key: Key::new("large", format!("{i}")), value: vec![i; 30_000].into() });
        recorder.commit(Txn { epoch, guards: vec![], ops: large.collect() }).await;
        let all = (0..16).map(|i| Op::Delete { key: Key::new("large", format!("{i}")) });
        recorder.commit(Txn { epoch, guards: vec![], ops: all.collect() }).await;
        for _ in 0..4 {
            recorder.commit(random_txn(epoch, 12, &mut rng)).await;
        }
        recorder.store.close().await.unwrap();
        for (revision, ops) in recorder.commits.into_inner().unwrap() {
            let mut model = models[models.len() - 1].clone();
            apply(&mut model, revision, &ops);
            if revision.0 == models.len() as u64 {
                models.push(model);
            } else {
                assert_eq!(model, models[models.len() - 1], "only what changes nothing makes no revision");
            }
        }
        acknowledged.extend(recorder.acknowledged.into_inner().unwrap());
    }
    acknowledged.sort();
    (disk, Truth { models, acknowledged, backups })
}

/// Opens what a crash left and compares; returns the disk with the log of the recovery.
async fn check(image: Vec<u8>, least: (Revision, Epoch), models: &[Model], what: &str) -> Disk {
    let disk = Disk::with_image(image);
    let store = EmbeddedStore::open_medium(disk.medium()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let snapshot = store.snapshot().await.unwrap();
    assert!(snapshot.revision >= least.0, "{what}: at {}, acknowledged {}", snapshot.revision, least.0);
    assert!(snapshot.epoch >= least.1, "{what}: epoch {}, acknowledged {}", snapshot.epoch, least.1);
    let expected = usize::try_from(snapshot.revision.0).ok().and_then(|revision| models.get(revision));
    let expected = expected.unwrap_or_else(|| panic!("{what}: revision {} was never made", snapshot.revision));
    assert!(model_of(&snapshot) == *expected, "{what}: not the records of revision {}", snapshot.revision);
    // Handles gone: the writer closes on its own. Its lock is this disk alone.
    store.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
    disk
}

/// All crashes at steps `from..` of `log` on a disk that held `synced`: calls `each(step, synced, unsynced)`.
async fn each_crash(log: &[Step], synced: Vec<u8>, mut each: impl AsyncFnMut(usize, &[u8], &[Step])) {
    let mut synced = synced;
    let mut since = 0;
    for (step, entry) in log.iter().enumerate() {
        // At a sync the crash comes during it: nothing of what it covers is sure yet.
        let end = if matches!(entry, Step::Sync) { step } else { step + 1 };
        each(step, &synced, &log[since..end]).await;
        if matches!(entry, Step::Sync) {
            for done in &log[since..step] {
                match done {
                    Step::Write { offset, data } => synced[*offset..offset + data.len()].copy_from_slice(data),
                    Step::SetLen(len) => synced.resize(*len, 0),
                    Step::Sync => {}
                }
            }
            since = step + 1;
        }
    }
}

// Two halves, so that two cores share the work.
#[tokio::test]
async fn nothing_acknowledged_is_lost_at_any_even_crash_point() {
    crash_everywhere(0).await;
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_at_any_odd_crash_point() {
    crash_everywhere(1).await;
}

/// Crashes at each step of the workload that is `parity` modulo 2.
async fn crash_everywhere(parity: usize) {
    let (disk, truth) = record().await;
    let log = disk.log();
    // Before the first lead the store is being made, and appears in one step.
    let made = truth.acknowledged[0].0;
    let mut rng = StdRng::seed_from_u64(11);
    let (mut points, mut images, mut again) = (0_usize, 0_usize, 0_usize);
    each_crash(&log, Vec::new(), async |step, synced, unsynced| {
        if step < made || step % 2 != parity {
            return;
        }
        points += 1;
        // Losing all is the one that always matters; of the others, the kinds take turns.
        let turn = Survivors::EVERY[2 + step / 2 % 5];
        let other = Survivors::EVERY[2 + (step / 2 + 2) % 5];
        let some = [Survivors::None, Survivors::All, turn, other];
        for &survivors in if long() { &Survivors::EVERY[..] } else { &some } {
            images += 1;
            let what = format!("crash at step {step} of {}, survivors {survivors:?}", log.len());
            let image = crashed(synced, unsynced, survivors, &mut rng);
            let least = truth.at(step);
            let recovered = check(image.clone(), least, &truth.models, &what).await;
            if !images.is_multiple_of(if long() { 5 } else { 79 }) {
                continue;
            }
            // And crashes during the recovery.
            each_crash(&recovered.log(), image, async |step, synced, unsynced| {
                again += 1;
                let survivors = Survivors::EVERY[again % 7];
                let what = format!("{what}, then at step {step} of the recovery, survivors {survivors:?}");
                let image = crashed(synced, unsynced, survivors, &mut rng);
                check(image, least, &truth.models, &what).await;
            })
            .await;
        }
    })
    .await;
    eprintln!("{points} crash points, {images} images, {again} crashes during recovery");
    assert!(points > 150, "only {points} crash points");
    assert!(again > 100, "only {again} crashes during recovery");
}

/// A backup is of one moment, whatever goes on; a restore from it is there whole or not at all, and its steps are crashed too.
#[tokio::test]
async fn a_restore_is_whole_or_not_there_at_any_crash_point() {
    let (_, truth) = record().await;
    let mut rng = StdRng::seed_from_u64(13);
    for file in &truth.backups {
        let snapshot = read_backup(&file[..]).unwrap();
        let revision = usize::try_from(snapshot.revision.0).unwrap();
        assert!(model_of(&snapshot) == truth.models[revision], "a backup is not as it was at {revision}");
        let disk = Disk::default();
        restore_medium(&snapshot, &mut disk.medium()).unwrap();
        let published = disk.published_at().expect("it is there now");
        let log = disk.log();
        let mut points = 0;
        each_crash(&log, Vec::new(), async |step, synced, unsynced| {
            // Before, nothing is there by construction of the disk, as of a directory: it appears with a rename.
            if step < published {
                return;
            }
            points += 1;
            for survivors in Survivors::EVERY {
                let what = format!("restore crashed at step {step} of {}, survivors {survivors:?}", log.len());
                let image = crashed(synced, unsynced, survivors, &mut rng);
                let least = (snapshot.revision, Epoch(snapshot.epoch.0 + 1));
                check(image, least, &truth.models, &what).await;
            }
        })
        .await;
        // The moment after its last step counts as well, and may be the only one.
        let whole = replay(&log);
        let least = (snapshot.revision, Epoch(snapshot.epoch.0 + 1));
        check(whole, least, &truth.models, "a restore without a crash").await;
        assert!(published > 5, "only {published} steps before it is there, {points} after");
    }
    assert_eq!(truth.backups.len(), 4);
}

//! The master's disk: records under their keys, sealed as `master/src/store/record.rs` seals them.
//!
//! Each record has a sum over its key and revision, and the head has the number of records and the sum of all sums, so
//! that one that was written in another's place shows twice: the place has a record of another key, and the place that it
//! was meant for still has the earlier one. (The real sums cover the bytes too; flipped bits are in the store's tests.)

use std::collections::BTreeMap;

use master_core::model::{Change, Key, Object};

use crate::{random::Random, version};

/// A record.
#[derive(Clone, Debug)]
struct Stored {
    object: Object,
    /// It went through its bytes since it was written: reading them again gives the same.
    read: bool,
    /// A later release wrote it, with fields that this one does not know.
    newer: bool,
    revision: u64,
    sum: u64,
}

/// All records, and the head.
#[derive(Clone, Debug, Default)]
pub(crate) struct Store {
    records: BTreeMap<Key, Stored>,
    pub(crate) revision: u64,
    count: u64,
    digest: u64,
}

/// FNV-1a over the key, then the finish of SplitMix64.
fn sum(key: &Key, revision: u64) -> u64 {
    let bytes = key.kind.as_str().bytes().chain([0]).chain(key.id.bytes()).chain(revision.to_le_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash ^ (hash >> 31)
}

impl Store {
    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub(crate) fn objects(&self) -> impl Iterator<Item = &Object> {
        self.records.values().map(|stored| &stored.object)
    }

    /// Writes one transaction, whole or not at all. `misdirected`: one of its records lands in the place of another.
    /// True when one did.
    ///
    /// # Errors
    /// A record that would be replaced is damaged.
    pub(crate) fn write(
        &mut self,
        changes: &[Change],
        newer: bool,
        misdirected: Option<&mut Random>,
    ) -> Result<bool, String> {
        let checked = !skein_api::mutant!("unchecked-records");
        let damaged = |key: &Key| self.records.get(key).is_some_and(|there| there.sum != sum(key, there.revision));
        if let Some(key) = changes.iter().map(Change::key).find(|key| checked && damaged(key)) {
            return Err(format!("record {}/{} is damaged", key.kind.as_str(), key.id));
        }
        self.revision += 1;
        let mut astray = misdirected.and_then(|rng| self.astray(changes, rng));
        let strayed = astray.is_some();
        for change in changes {
            let key = change.key();
            if let Some(before) = self.records.get(&key) {
                self.digest = self.digest.wrapping_sub(before.sum);
                self.count -= 1;
            }
            match change {
                Change::Upsert(object) => {
                    let sum = sum(&key, self.revision);
                    let record = Stored { object: object.clone(), read: false, newer, revision: self.revision, sum };
                    self.digest = self.digest.wrapping_add(sum);
                    self.count += 1;
                    let place = match astray.take_if(|(meant, _)| *meant == key) {
                        Some((_, place)) => place,
                        None => key,
                    };
                    self.records.insert(place, record);
                }
                Change::Delete(_) => drop(self.records.remove(&key)),
            }
        }
        Ok(strayed)
    }

    /// Which record is to go astray, and the place of another one of its kind that it lands in.
    fn astray(&self, changes: &[Change], rng: &mut Random) -> Option<(Key, Key)> {
        let upserts: Vec<Key> = changes.iter().filter(|c| matches!(c, Change::Upsert(_))).map(Change::key).collect();
        if upserts.is_empty() {
            return None;
        }
        let meant = rng.pick(&upserts).clone();
        let written: Vec<Key> = changes.iter().map(Change::key).collect();
        let others = self.records.keys().filter(|key| key.kind == meant.kind && !written.contains(key));
        let others: Vec<&Key> = others.collect();
        (!others.is_empty()).then(|| (meant, (*rng.pick(&others)).clone()))
    }

    /// Every record is one of its place, and all of them are there.
    ///
    /// # Errors
    /// What is damaged.
    pub(crate) fn verify(&self) -> Result<(), String> {
        if skein_api::mutant!("unchecked-records") {
            return Ok(());
        }
        let mut digest = 0_u64;
        for (key, stored) in &self.records {
            if stored.sum != sum(key, stored.revision) {
                return Err(format!("record {}/{} is damaged", key.kind.as_str(), key.id));
            }
            digest = digest.wrapping_add(stored.sum);
        }
        let whole = digest == self.digest && self.records.len() as u64 == self.count;
        if whole { Ok(()) } else { Err("records are missing, or older than the head".to_owned()) }
    }

    /// Reads every record, through the bytes that the real store keeps. The store is verified.
    ///
    /// # Errors
    /// Bytes that are no object of their kind.
    pub(crate) fn read(&mut self) -> Result<Vec<Object>, String> {
        let mut objects = Vec::with_capacity(self.records.len());
        for (key, stored) in &mut self.records {
            if !stored.read {
                let mut bytes = stored.object.encode();
                if stored.newer {
                    bytes = version::with_unknown_fields(&bytes)?;
                }
                stored.object = Object::decode(key.kind, &bytes).map_err(|e| format!("record {key:?}: {e}"))?;
                stored.read = true;
            }
            objects.push(stored.object.clone());
        }
        Ok(objects)
    }
}

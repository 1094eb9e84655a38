//! How records and the store's head look as bytes, and the sums that prove them.
//!
//! Owns: encodings, the checksum of each record, the digest of the set. Must not know: redb, files.
//!
//! One SHA-256 per record (over kind, id, revision and value) gives both sums: 8 bytes are the record's checksum, stored
//! with it, and 16 bytes are its share of the set digest, which is the sum of all shares modulo 2^128. Reasons: a sum does
//! not depend on order and takes a record out as easily as in, so one transaction costs a hash per record it touches, not
//! a pass over the store; two cuts of one hash need no second algorithm; 64 bits miss a random damage once in 2^64, where a
//! CRC of 32 bits over a store of 10^5 records would be in reach; ring's SHA-256 does 0.2 to 2 GB/s. The sums protect
//! against accidents (flipped bits, lost, stale and misplaced pages), not against somebody who can write the file.

use bytes::Bytes;
use ring::digest::{Context, SHA256};

use super::{Key, Record, Revision};

/// The format that this build writes, and the newest it reads. Raise it with any change of an encoding in this file.
pub(super) const FORMAT: u32 = 1;

const CHECKSUM_BYTES: usize = 8;
const REVISION_BYTES: usize = 8;
const RECORD_HEADER_BYTES: usize = CHECKSUM_BYTES + REVISION_BYTES;

/// A record's share of the set digest.
pub(super) type Share = u128;

fn hash(domain: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(domain);
    for part in parts {
        // Lengths first, so that no two lists of parts hash the same bytes.
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn checksum(sum: &[u8; 32]) -> [u8; CHECKSUM_BYTES] {
    *sum.first_chunk().expect("32 bytes hold 8")
}

fn record_hash(key: &[u8], revision: u64, value: &[u8]) -> [u8; 32] {
    hash(b"skein record", &[key, &revision.to_le_bytes(), value])
}

fn share(sum: &[u8; 32]) -> Share {
    Share::from_le_bytes(*sum[CHECKSUM_BYTES..].first_chunk().expect("24 bytes hold 16"))
}

/// `kind`, NUL, `id`: sorts by kind, then id, and is unique because neither holds a NUL.
pub(super) fn encode_key(key: &Key) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(key.kind.len() + 1 + key.id.len());
    bytes.extend_from_slice(key.kind.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(key.id.as_bytes());
    bytes
}

/// The inverse of [`encode_key`]; `None` for bytes it does not make.
pub(super) fn decode_key(bytes: &[u8]) -> Option<Key> {
    let (kind, id) = std::str::from_utf8(bytes).ok()?.split_once('\0')?;
    let key = Key::new(kind, id);
    key.is_valid().then_some(key)
}

/// A name for a key that may be damaged itself.
pub(super) fn describe_key(bytes: &[u8]) -> String {
    match decode_key(bytes) {
        Some(key) => key.to_string(),
        None => bytes.iter().fold("0x".to_owned(), |hex, byte| format!("{hex}{byte:02x}")),
    }
}

/// Checksum, revision, value; and the record's share of the set digest.
pub(super) fn encode_record(key: &[u8], revision: u64, value: &[u8]) -> (Vec<u8>, Share) {
    let sum = record_hash(key, revision, value);
    let mut bytes = Vec::with_capacity(RECORD_HEADER_BYTES + value.len());
    bytes.extend_from_slice(&checksum(&sum));
    bytes.extend_from_slice(&revision.to_le_bytes());
    bytes.extend_from_slice(value);
    (bytes, share(&sum))
}

/// A record whose checksum held.
pub(super) struct Verified<'a> {
    pub(super) revision: u64,
    pub(super) value: &'a [u8],
    pub(super) share: Share,
}

/// The inverse of [`encode_record`]; `None` when the checksum does not hold.
pub(super) fn verify_record<'a>(key: &[u8], bytes: &'a [u8]) -> Option<Verified<'a>> {
    let (stored, rest) = bytes.split_first_chunk::<CHECKSUM_BYTES>()?;
    let (revision, value) = rest.split_first_chunk::<REVISION_BYTES>()?;
    let revision = u64::from_le_bytes(*revision);
    let sum = record_hash(key, revision, value);
    (checksum(&sum) == *stored).then(|| Verified { revision, value, share: share(&sum) })
}

impl Verified<'_> {
    /// The record with its own copy of the bytes; `None` when the key is not one of ours.
    pub(super) fn to_record(&self, key: &[u8]) -> Option<Record> {
        let key = decode_key(key)?;
        Some(Record { key, revision: Revision(self.revision), value: Bytes::copy_from_slice(self.value) })
    }
}

/// What the store knows about itself; written with every transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// The last transaction's number.
    pub(super) revision: u64,
    /// The last term that was given out.
    pub(super) epoch: u64,
    /// How many records there are.
    pub(super) count: u64,
    /// The sum of their shares.
    pub(super) digest: Share,
    /// How often the head was written without a transaction; keeps two heads of one revision apart.
    pub(super) seals: u64,
    /// Whether the last writer closed the store in order.
    pub(super) clean: bool,
}

impl Head {
    const BODY_BYTES: usize = 8 * 4 + 16 + 1;

    /// Little-endian fields in the order of the struct, then their checksum.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BODY_BYTES + CHECKSUM_BYTES);
        for number in [self.revision, self.epoch, self.count, self.seals] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.digest.to_le_bytes());
        bytes.push(u8::from(self.clean));
        let sum = checksum(&hash(b"skein head", &[&bytes]));
        bytes.extend_from_slice(&sum);
        bytes
    }

    /// The inverse of [`Head::encode`]; `None` when the checksum does not hold.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, stored) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
        if body.len() != Self::BODY_BYTES || checksum(&hash(b"skein head", &[body])) != *stored {
            return None;
        }
        let number = |at: usize| u64::from_le_bytes(*body[at * 8..].first_chunk().expect("the length was checked"));
        let digest = Share::from_le_bytes(*body[32..].first_chunk().expect("the length was checked"));
        let clean = body[48] == 1;
        Some(Self { revision: number(0), epoch: number(1), count: number(2), seals: number(3), digest, clean })
    }
}

/// The format number and the build that wrote it. This encoding is the one that never changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FormatMark {
    pub(super) format: u32,
    pub(super) written_by: String,
}

impl FormatMark {
    /// This build's mark.
    pub(super) fn current() -> Self {
        Self { format: FORMAT, written_by: env!("CARGO_PKG_VERSION").to_owned() }
    }

    /// Number, build's name, checksum.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.format.to_le_bytes().to_vec();
        bytes.extend_from_slice(self.written_by.as_bytes());
        let sum = checksum(&hash(b"skein format", &[&bytes]));
        bytes.extend_from_slice(&sum);
        bytes
    }

    /// The inverse of [`FormatMark::encode`]; `None` when the checksum does not hold.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, stored) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
        if checksum(&hash(b"skein format", &[body])) != *stored {
            return None;
        }
        let (format, written_by) = body.split_first_chunk::<4>()?;
        let written_by = std::str::from_utf8(written_by).ok()?.to_owned();
        Some(Self { format: u32::from_le_bytes(*format), written_by })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_record_is_seen() {
        let key = encode_key(&Key::new("node", "n1"));
        let (bytes, share) = encode_record(&key, 7, b"value");
        let verified = verify_record(&key, &bytes).unwrap();
        assert_eq!((verified.revision, verified.value, verified.share), (7, b"value".as_slice(), share));

        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(verify_record(&key, &damaged).is_none(), "bit {bit}");
        }
        for bit in 0..key.len() * 8 {
            let mut damaged = key.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(verify_record(&damaged, &bytes).is_none(), "key bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(verify_record(&key, &bytes[..len]).is_none(), "cut to {len}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_head_is_seen() {
        let head = Head { revision: 1, epoch: 2, count: 3, digest: 4 << 100, seals: 5, clean: true };
        let mark = FormatMark::current();
        assert_eq!(Head::decode(&head.encode()), Some(head));
        assert_eq!(FormatMark::decode(&mark.encode()), Some(mark.clone()));
        for bit in 0..head.encode().len() * 8 {
            let mut damaged = head.encode();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::decode(&damaged), None, "bit {bit}");
        }
        for bit in 0..mark.encode().len() * 8 {
            let mut damaged = mark.encode();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(FormatMark::decode(&damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn keys_keep_their_order_and_names() {
        let keys = [("a", "z"), ("a-b", "a"), ("b", "a"), ("b", "ä")];
        let mut encoded: Vec<_> = keys.iter().map(|(kind, id)| encode_key(&Key::new(*kind, *id))).collect();
        for (bytes, (kind, id)) in encoded.iter().zip(keys) {
            assert_eq!(decode_key(bytes), Some(Key::new(kind, id)));
            assert_eq!(describe_key(bytes), format!("{kind}/{id}"));
        }
        let sorted = encoded.clone();
        encoded.sort();
        assert_eq!(encoded, sorted);
        assert_eq!(describe_key(b"\xff\x01"), "0xff01");
    }
}

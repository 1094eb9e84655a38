//! Records and backups that were damaged, edited, or written by another release.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bolero::{Driver, ValueGenerator};
use master_core::{
    Core, Now, Settings,
    model::{Kind, Object},
};
use ring::digest::{SHA256, digest};
use serde_json::Value;
use skein_fuzz::{Form, Pick, Verdict, mutate_bytes, mutate_json};

use super::{
    Key,
    backup::{backup, read_backup, sum},
    record::{self, FormatMark, Head},
};
use crate::fuzz::objects;

/// `kind` and, on the next line, the record: what is decoded is encoded as it was read, and no core stumbles over it.
#[test]
fn store_records() {
    let small = objects();
    // A task of `{}` takes 1 KiB; the core holds the small cluster and its index beside it.
    let target = skein_fuzz::target!("store_records").inputs(700).memory(1 << 10, 4 << 20);
    target.run_mutants(Form::Script, |input| {
        let Some(at) = input.iter().position(|b| *b == b' ') else { return Verdict::Refused };
        let Some(kind) = str::from_utf8(&input[..at]).ok().and_then(Kind::parse) else { return Verdict::Refused };
        let Ok(object) = Object::decode(kind, &input[at + 1..]) else { return Verdict::Refused };
        let again = Object::decode(kind, &object.encode()).expect("what was written is read");
        assert_eq!((again.key(), again.encode()), (object.key(), object.encode()));
        let mut objects: Vec<Object> = small.iter().filter(|o| o.key() != object.key()).cloned().collect();
        objects.push(object);
        let mut core = Core::load(Settings::default(), objects, Now::default());
        core.settle(Now::default(), 1);
        // It may be an impossible cluster, and then it says so; it must be able to.
        core.check();
        Verdict::Accepted
    });
}

/// Keys, records, heads and format marks as bytes: only what was written so is read.
#[test]
fn record_bytes() {
    skein_fuzz::target!("record_bytes").inputs(20_000).memory(16, 4 << 10).run_mutants(Form::Bytes, |input| {
        if let Some(key) = record::decode_key(input) {
            assert_eq!(record::encode_key(&key), input);
        }
        assert!(!record::describe_key(input).is_empty() || input.is_empty());
        let head = Head::decode(input);
        assert!(head.is_none_or(|h| Head::decode(&h.encode()) == Some(h)), "{head:?}");
        let mark = FormatMark::decode(input);
        assert!(mark.as_ref().is_none_or(|m| m.encode() == input), "{mark:?}");
        let key = b"node\0n1";
        let verified = record::verify_record(key, input);
        if let Some(verified) = &verified {
            assert_eq!(record::encode_record(key, verified.revision, verified.value).0, input);
        }
        Verdict::from(head.is_some() || mark.is_some() || verified.is_some() || record::decode_key(input).is_some())
    });
}

/// A backup of these lines whose sums hold, as far as its lines still have them.
fn sealed(lines: &mut [Value]) -> Vec<u8> {
    let mut file = Vec::new();
    for line in lines {
        let text = |name: &str| line.get(name).and_then(Value::as_str).map(str::to_owned);
        let (kind, id, value) = (text("kind"), text("id"), text("value").and_then(|v| BASE64.decode(v).ok()));
        if let (Some(kind), Some(id), Some(value)) = (kind, id, value) {
            let revision = line.get("revision").and_then(Value::as_u64).unwrap_or_default();
            line["sum"] = sum(&Key::new(kind, id), revision, &value).into();
        }
        if line.get("sha256").is_some() {
            line["sha256"] = skein_daemon::hex(digest(&SHA256, &file).as_ref()).into();
        }
        file.extend(line.to_string().into_bytes());
        file.push(b'\n');
    }
    file
}

/// Backups with changed lines, most of them with sums that hold all the same.
struct Backups(Vec<Vec<u8>>);

impl ValueGenerator for Backups {
    type Output = Vec<u8>;

    fn generate<D: Driver>(&self, driver: &mut D) -> Option<Vec<u8>> {
        let mut pick = Pick(driver);
        let mut lines: Vec<Value> =
            pick.sample(&self.0).split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        for _ in 0..pick.below(3) {
            let at = pick.below(lines.len());
            match pick.below(4) {
                0 if lines.len() > 1 => drop(lines.remove(at)),
                1 => lines.insert(at, lines[at].clone()),
                _ => {
                    let other = lines[pick.below(lines.len())].clone();
                    mutate_json(&mut pick, &mut lines[at], &other);
                }
            }
        }
        let mut file = sealed(&mut lines);
        if pick.once_in(8) {
            mutate_bytes(&mut pick, &mut file, &[]);
        }
        Some(file)
    }
}

/// What is read of a backup is what a backup of it says.
#[test]
fn backups() {
    // A line is held as it is and as values, its value in base64 and decoded.
    let target = skein_fuzz::target!("backups").inputs(3_000).memory(32, 64 << 10);
    let samples = target.samples();
    target.run(Backups(samples), |input| {
        let Ok(snapshot) = read_backup(input) else { return Verdict::Refused };
        let mut again = Vec::new();
        backup(&snapshot, &mut again).expect("memory takes it");
        assert_eq!(read_backup(&again[..]).expect("what was written is read"), snapshot);
        Verdict::Accepted
    });
}

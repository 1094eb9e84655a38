//! Typed identifiers and times: an id of one kind cannot be passed where another is meant.

use std::{cmp::Ordering, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes of an id that stand in place: those that masters make have 25. With length and tag it is 32 bytes.
const IN_PLACE_MAX: usize = 30;

/// The text of an id. Ids are copied and compared far more often than read: copying allocates nothing, and of two ids by
/// chance the first eight bytes, which are one number, tell the order.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Text {
    /// Zeroes follow the text. What fits is always here, so equal texts are equal values.
    InPlace { len: u8, bytes: [u8; IN_PLACE_MAX] },
    /// Longer than any id: what somebody gave as one, in order to be told that nothing has it.
    Elsewhere(Box<str>),
}

impl Text {
    fn new(text: &str) -> Self {
        let mut bytes = [0; IN_PLACE_MAX];
        match (bytes.get_mut(..text.len()), u8::try_from(text.len())) {
            (Some(place), Ok(len)) => {
                place.copy_from_slice(text.as_bytes());
                Self::InPlace { len, bytes }
            }
            _ => Self::Elsewhere(text.into()),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::InPlace { len, bytes } => &bytes[..usize::from(*len)],
            Self::Elsewhere(text) => text.as_bytes(),
        }
    }

    fn as_str(&self) -> &str {
        match self {
            Self::InPlace { .. } => std::str::from_utf8(self.as_bytes()).expect("it was made of text"),
            Self::Elsewhere(text) => text,
        }
    }
}

impl Ord for Text {
    /// The order of the texts.
    #[inline]
    fn cmp(&self, other: &Self) -> Ordering {
        if let (Self::InPlace { bytes: a, .. }, Self::InPlace { bytes: b, .. }) = (self, other) {
            // The zeroes behind a short text order it before every longer one that begins with it.
            let first = |[b0, b1, b2, b3, b4, b5, b6, b7, ..]: &[u8; IN_PLACE_MAX]| {
                u64::from_be_bytes([*b0, *b1, *b2, *b3, *b4, *b5, *b6, *b7])
            };
            let order = first(a).cmp(&first(b));
            if order.is_ne() {
                return order;
            }
        }
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl PartialOrd for Text {
    #[inline]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Default for Text {
    fn default() -> Self {
        Self::new("")
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Text;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text::new(text))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Text);

        impl $name {
            /// Wraps an id that was made by a master or read from one.
            pub fn new(id: impl AsRef<str>) -> Self {
                Self(Text::new(id.as_ref()))
            }
            /// The id as text.
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
            /// The first 12 characters, as tables show it.
            pub fn short(&self) -> &str {
                let id = self.as_str();
                id.get(..12).unwrap_or(id)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

id_type!(
    /// A host of the cluster.
    NodeId
);
id_type!(
    /// A service: a task specification and how many of it shall run.
    ServiceId
);
id_type!(
    /// A task: one container on one host, of a service or on its own.
    TaskId
);
id_type!(
    /// An overlay network.
    NetworkId
);
id_type!(
    /// A named volume, local to one host.
    VolumeId
);
id_type!(
    /// A join token; the secret part is not in it.
    TokenId
);

/// A point in time, milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This time plus `ms` milliseconds; stays at the end of time instead of wrapping.
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
    /// Milliseconds since `earlier`; 0 when `earlier` is later.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What every object of the cluster has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// Counts changes of this object's specification, from 1.
    pub generation: u64,
    /// Position in the store of the last change of this object; 0 until it was stored.
    pub revision: u64,
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it last changed.
    pub updated_at: UnixMillis,
    /// Who asked for the last change and why.
    pub changed_by: Origin,
}

/// Who asked for a change, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// `user:<name>`, `node:<id>`, `local:<uid>` or the part of the master that decided it (`orchestrator`, …).
    pub who: String,
    /// In a few words: `skein up`, `node lost`, `container exited with 1`.
    pub why: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_ordered_shown_and_written_as_their_texts_are() {
        let made = "k3vqe0z7p1m9x2c8b4n6a5s0d";
        let long = "a name of 31 bytes and no id at";
        let texts = ["", "\0", "a", "a\0", "ab", "abcdefgh", "abcdefgh\0", "abcdefghi", "abcdefgz", "\u{e9}t\u{e9}"];
        let texts =
            [&texts[..], &[made, &made[..24], &long[..30], long, "a name of 31 bytes and no id at all"]].concat();
        for a in &texts {
            let id = TaskId::new(a);
            assert_eq!((id.as_str(), id.to_string().as_str(), format!("{id:?}")), (*a, *a, format!("TaskId({a:?})")));
            let written = serde_json::to_string(&id).expect("text is JSON");
            assert_eq!(written, serde_json::to_string(a).expect("text is JSON"));
            assert_eq!(serde_json::from_str::<TaskId>(&written).expect("it was written just now"), id);
            for b in &texts {
                let other = TaskId::new(b);
                assert_eq!((id.cmp(&other), id == other), (a.cmp(b), a == b), "{a:?} and {b:?}");
            }
        }
        assert_eq!((size_of::<TaskId>(), long.len()), (32, IN_PLACE_MAX + 1));
    }
}

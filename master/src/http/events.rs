//! Changes as server-sent events (the HTML standard, section 9.2), rendered once for all who read them.
//!
//! A commit may have thousands of changes and there may be a thousand readers: the text of the last commits is kept, so
//! that each is decoded and written once. A reader keeps its place in the store's own ring and nothing else; one that is
//! too slow falls out of it and is told so.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use futures_util::stream;
use http::{HeaderValue, header};
use master_core::model::{Kind, Object};

use crate::store::{Commit, Op, Watch, WatchError};

/// A comment is sent when there was nothing else for so long, so that a reader sees that the master lives.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Texts that are kept: readers that follow are rarely further apart.
const TEXTS_MAX: usize = 64;

/// Bytes of the texts that are kept; one commit has at most 8 MiB, but the last is kept whatever its size.
const TEXTS_BYTES_MAX: usize = 16 << 20;

/// The texts of the last commits, by revision. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub(super) struct Texts(Arc<Mutex<VecDeque<(u64, Bytes)>>>);

impl Texts {
    fn of(&self, commit: &Commit) -> Bytes {
        let revision = commit.revision.0;
        let known =
            |texts: &VecDeque<(u64, Bytes)>| texts.iter().find(|(of, _)| *of == revision).map(|(_, t)| t.clone());
        let lock = || self.0.lock().expect("nobody panics while holding this lock");
        if let Some(text) = known(&lock()) {
            return text;
        }
        // Two readers may do the same work at the same time; a lock held meanwhile would stop all others.
        let text = render(commit);
        let mut texts = lock();
        if known(&texts).is_none() {
            texts.push_back((revision, text.clone()));
            let bytes = |texts: &VecDeque<(u64, Bytes)>| texts.iter().map(|(_, text)| text.len()).sum::<usize>();
            while texts.len() > TEXTS_MAX || (texts.len() > 1 && bytes(&texts) > TEXTS_BYTES_MAX) {
                texts.pop_front();
            }
        }
        text
    }
}

/// The answer to a reader of events, from its place in the ring on.
pub(super) fn answer(watch: Watch, texts: Texts) -> Response {
    let parts = stream::unfold(Some(watch), move |watch| {
        let texts = texts.clone();
        async move {
            let mut watch = watch?;
            // Cancel-safe: a watch keeps its place when it is given up.
            match tokio::time::timeout(KEEPALIVE, watch.next()).await {
                Ok(Ok(commit)) => Some((Ok::<_, Infallible>(texts.of(&commit)), Some(watch))),
                Ok(Err(WatchError::Closed)) => None,
                Ok(Err(lagged)) => Some((Ok(format!("event: missed\ndata: {lagged}\n\n").into()), None)),
                Err(_) => Some((Ok(Bytes::from_static(b":\n\n")), Some(watch))),
            }
        }
    });
    let mut response = Response::new(Body::from_stream(parts));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn render(commit: &Commit) -> Bytes {
    let revision = commit.revision.0;
    let mut text = Vec::new();
    for op in &commit.ops {
        let key = op.key();
        let Some(kind) = Kind::parse(&key.kind) else { continue };
        let object = match op {
            // What is no business of users (the CA's key) has no public form.
            Op::Put { value, .. } => match Object::decode(kind, value).ok().and_then(|o| o.public_json()) {
                Some(object) => Some(object),
                None => continue,
            },
            Op::Delete { .. } => None,
        };
        let event = skein_api::Event { revision, kind: kind.as_str().to_owned(), id: key.id.clone(), object };
        text.extend_from_slice(format!("event: change\nid: {revision}\ndata: ").as_bytes());
        // JSON on one line: what is not printable is escaped in its strings.
        serde_json::to_writer(&mut text, &event).expect("an event has string keys only, so it is JSON");
        text.extend_from_slice(b"\n\n");
    }
    text.into()
}

//! Lists as JSON, written while they are read: a hundred thousand tasks are 150 MB as text, and a reader that takes them
//! slowly must not cost that.

use std::collections::VecDeque;

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use futures_util::stream;
use http::{HeaderValue, header};
use serde::Serialize;

/// Bytes that are written at a time, about: what a socket takes at once.
const CHUNK_BYTES: usize = 64 << 10;

/// A JSON array of `items`, as an answer.
pub(super) fn answer<T: Serialize + Send + 'static>(items: Vec<T>) -> Response {
    // `None` once the end was written.
    let rest = Some((true, VecDeque::from(items)));
    let chunks = stream::unfold(rest, |rest| async move {
        let (first, mut items) = rest?;
        let (bytes, done) = chunk(first, &mut items);
        Some((Ok::<_, std::convert::Infallible>(bytes), (!done).then_some((false, items))))
    });
    let mut response = Response::new(Body::from_stream(chunks));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The next part of the text, and whether it is the last.
fn chunk<T: Serialize>(first: bool, items: &mut VecDeque<T>) -> (Bytes, bool) {
    let mut bytes = Vec::with_capacity(CHUNK_BYTES + CHUNK_BYTES / 4);
    let mut separator = if first { b'[' } else { b',' };
    while let Some(item) = items.pop_front() {
        bytes.push(separator);
        separator = b',';
        serde_json::to_writer(&mut bytes, &item).expect("the API's objects have string keys only, so they are JSON");
        if bytes.len() >= CHUNK_BYTES && !items.is_empty() {
            return (bytes.into(), false);
        }
    }
    if first && bytes.is_empty() {
        bytes.push(b'[');
    }
    bytes.push(b']');
    (bytes.into(), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_make_one_list() {
        for count in [0, 1, 3, 5_000] {
            let items: Vec<String> = (0..count).map(|i| format!("item {i:050}")).collect();
            let (mut rest, mut text, mut parts) = (VecDeque::from(items.clone()), Vec::new(), 0);
            loop {
                let (bytes, done) = chunk(parts == 0, &mut rest);
                text.extend_from_slice(&bytes);
                parts += 1;
                if done {
                    break;
                }
            }
            let read: Vec<String> = serde_json::from_slice(&text).unwrap();
            assert_eq!(read, items);
            assert_eq!(parts, 1 + text.len() / (CHUNK_BYTES + 70), "{count}");
        }
    }
}

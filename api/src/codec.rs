//! Protobuf messages on the wire of the agent protocol, with buffers that suit thousands of quiet connections.
//!
//! A session mostly carries heartbeats of some 10 bytes. tonic's own codec sets 8 KiB aside for each direction of each
//! call, for as long as it lasts; these buffers begin small and grow with what is sent. By themselves they would never
//! shrink: a `BytesMut` that nobody shares takes its old memory again, so a host that was once told of ten tasks would cost
//! 20 KiB ever after. Who still holds a part of it makes it take new memory, and that is done here on purpose: what came
//! in last is held by the decoder, what went out last by [`shed`], until the next message comes; then the large buffer
//! goes.

use std::marker::PhantomData;

use bytes::{Buf as _, Bytes};
use http_body_util::{BodyExt as _, combinators::MapFrame};
use hyper::body::{Body, Frame};
use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// First size of a buffer, bytes: a heartbeat or an acknowledgement with room to spare.
const BUFFER_BYTES: usize = 256;

/// Messages that are ready are sent together up to this many bytes. A larger one so ends its buffer, which has no room
/// left then: what follows needs another.
const TOGETHER_BYTES: usize = 1 << 10;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
}

/// The body of an answer whose buffer gives the memory of a large message back with the message after it.
pub fn shed<B: Body<Data = Bytes>>(body: B) -> MapFrame<B, impl FnMut(Frame<Bytes>) -> Frame<Bytes> + Send + 'static> {
    let mut held = None;
    body.map_frame(move |frame: Frame<Bytes>| {
        let large = frame.data_ref().filter(|data| data.len() >= TOGETHER_BYTES).cloned();
        drop(std::mem::replace(&mut held, large));
        frame
    })
}

/// Writes messages into buffers that are as large as they need.
#[derive(Debug)]
pub(crate) struct Writer<T>(PhantomData<T>);

impl<T: Message> Encoder for Writer<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.reserve(item.encoded_len());
        item.encode(to).map_err(|e| Status::internal(e.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// Reads messages; has a part of the last one's buffer, if that was large.
#[derive(Debug)]
pub(crate) struct Reader<U> {
    held: Bytes,
    reads: PhantomData<U>,
}

impl<U: Message + Default> Decoder for Reader<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let len = from.remaining();
        let item = if len < TOGETHER_BYTES {
            self.held = Bytes::new();
            U::decode(from)
        } else {
            self.held = from.copy_to_bytes(len);
            U::decode(self.held.clone())
        };
        item.map(Some).map_err(|e| Status::internal(e.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// The codec of every call; the generated code makes one per call.
#[derive(Debug, Clone)]
pub(crate) struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = Writer<T>;
    type Decoder = Reader<U>;

    fn encoder(&mut self) -> Self::Encoder {
        Writer(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        Reader { held: Bytes::new(), reads: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, task::Poll};

    use tokio::sync::mpsc;
    use tonic::codec::{Codec as _, EncodeBody, SingleMessageCompressionOverride, Streaming};

    use super::*;
    use crate::grpc::Document;

    const LARGE_BYTES: usize = 20_000;

    fn document(bytes: usize) -> Document {
        Document { key: "task/1".into(), json: vec![b' '; bytes] }
    }

    /// What is given through the channel, as it is needed.
    fn stream<T: Send + 'static>(mut rx: mpsc::Receiver<T>) -> impl futures_util::Stream<Item = T> + Send {
        futures_util::stream::poll_fn(move |cx| rx.poll_recv(cx))
    }

    /// Bytes that are allocated after a small, a large, and another small message have gone through a body, since before the
    /// first of them.
    fn kept(shed_it: bool) -> i64 {
        let (tx, rx) = mpsc::channel::<Result<Document, Status>>(1);
        let encoder = Codec::<Document, Document>::default().encoder();
        let body = EncodeBody::new_server(encoder, stream(rx), None, SingleMessageCompressionOverride::default(), None);
        let body = if shed_it { tonic::body::Body::new(shed(body)) } else { tonic::body::Body::new(body) };
        let mut body = pin!(body);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let mut send = |bytes: usize| {
            tx.try_send(Ok(document(bytes))).unwrap();
            let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) else { panic!() };
            assert!(frame.data_ref().unwrap().len() > bytes);
        };
        send(10);
        let allocated = allocation_counter::measure(|| {
            for bytes in [LARGE_BYTES, 10, 10] {
                send(bytes);
            }
        });
        allocated.bytes_current
    }

    #[test]
    fn a_body_gives_the_memory_of_a_large_message_back() {
        assert!(kept(true) < 1_000, "{}", kept(true));
        // Else neither would be needed.
        assert!(kept(false) > LARGE_BYTES as i64 / 2, "{}", kept(false));
    }

    #[test]
    fn a_reader_gives_the_memory_of_a_large_message_back() {
        let (tx, rx) = mpsc::channel::<Result<Frame<Bytes>, Status>>(1);
        let body = http_body_util::StreamBody::new(stream(rx));
        let decoder = Codec::<Document, Document>::default().decoder();
        let mut messages = Streaming::<Document>::new_request(decoder, body, None, None);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let mut receive = |bytes: usize| {
            let message = document(bytes).encode_to_vec();
            let len = u32::try_from(message.len()).unwrap();
            let wire = [&[0][..], &len.to_be_bytes(), &message].concat();
            // In parts, as they come: the header may be cut as well.
            for part in [&wire[..3], &wire[3..8], &wire[8..]] {
                tx.try_send(Ok(Frame::data(Bytes::copy_from_slice(part)))).unwrap();
                match pin!(messages.message()).poll(&mut cx) {
                    Poll::Pending => assert!(part.len() < 6),
                    Poll::Ready(got) => assert_eq!(got.unwrap(), Some(document(bytes))),
                }
            }
        };
        receive(10);
        let allocated = allocation_counter::measure(|| {
            for bytes in [LARGE_BYTES, 10, 10] {
                receive(bytes);
            }
        });
        assert!(allocated.bytes_current < 1_000, "{allocated:?}");
    }
}

//! Protobuf messages on the wire of the agent protocol, with buffers that suit thousands of quiet connections.
//!
//! A session mostly carries heartbeats of some 10 bytes. tonic's own codec sets 8 KiB aside for each direction of each
//! call, for as long as it lasts; these buffers begin small and grow with what is sent.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::BufferSettings;
use tonic_prost::{ProstDecoder, ProstEncoder};

/// First size of a buffer, bytes: a heartbeat or an acknowledgement with room to spare.
const BUFFER_BYTES: usize = 256;

/// Messages that are ready are sent together up to this many bytes (tonic's own default).
const TOGETHER_BYTES: usize = 32 << 10;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
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
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(buffers())
    }
}

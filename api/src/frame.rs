//! The frames of log and exec streams (docs/api.md): pure encoding and decoding of bytes, no I/O.
//!
//! A frame is `[type: u8, 0, 0, 0, length: u32 big-endian]` and then `length` bytes, the stream format of the Docker
//! Engine API ("Attach to a container") with types 3 to 6 of our own.

/// Bytes before each payload.
pub const HEADER_BYTES: usize = 8;

/// Most bytes in one payload: longer data is split by [`encode`], a longer frame is refused by [`Decoder`].
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STDIN_END: u8 = 3;
const RESIZE: u8 = 4;
const EXIT: u8 = 5;
const FAILURE: u8 = 6;

/// One unit of a log or exec stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes for the process.
    Stdin(Vec<u8>),
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// No more standard input will come.
    StdinEnd,
    /// The user's terminal has this size now, in characters.
    Resize {
        /// Lines.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// The process ended with this code; nothing follows.
    Exit(i64),
    /// The stream broke off for this reason; nothing follows.
    Failure(String),
}

/// Bytes that are not a frame. The stream cannot be read any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A type that docs/api.md does not list.
    #[error("failed to read a frame: unknown type {0}")]
    UnknownType(u8),
    /// Longer than [`PAYLOAD_BYTES_MAX`].
    #[error("failed to read a frame: its length of {0} bytes is over the limit of {PAYLOAD_BYTES_MAX}")]
    TooLong(u32),
    /// A payload of fixed size has another one.
    #[error("failed to read a frame: type {kind} cannot have {length} bytes")]
    WrongLength {
        /// Type of the frame.
        kind: u8,
        /// Length that it came with.
        length: usize,
    },
}

fn put(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("payloads are at most PAYLOAD_BYTES_MAX long");
    out.extend_from_slice(&[kind, 0, 0, 0]);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(payload);
}

fn put_data(out: &mut Vec<u8>, kind: u8, data: &[u8]) {
    for chunk in data.chunks(PAYLOAD_BYTES_MAX) {
        put(out, kind, chunk);
    }
}

/// Appends a frame to `out`. Data over [`PAYLOAD_BYTES_MAX`] becomes several frames, empty data none; a longer failure
/// text is cut.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
    match frame {
        Frame::Stdin(data) => put_data(out, STDIN, data),
        Frame::Stdout(data) => put_data(out, STDOUT, data),
        Frame::Stderr(data) => put_data(out, STDERR, data),
        Frame::StdinEnd => put(out, STDIN_END, &[]),
        Frame::Resize { rows, columns } => {
            let [r0, r1] = rows.to_be_bytes();
            let [c0, c1] = columns.to_be_bytes();
            put(out, RESIZE, &[r0, r1, c0, c1]);
        }
        Frame::Exit(code) => put(out, EXIT, &code.to_be_bytes()),
        Frame::Failure(text) => put(out, FAILURE, &text.as_bytes()[..text.len().min(PAYLOAD_BYTES_MAX)]),
    }
}

impl Frame {
    /// This frame as bytes; see [`encode`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        encode(self, &mut out);
        out
    }

    fn from_parts(kind: u8, payload: &[u8]) -> Result<Self, FrameError> {
        let wrong = || FrameError::WrongLength { kind, length: payload.len() };
        Ok(match kind {
            STDIN => Self::Stdin(payload.to_vec()),
            STDOUT => Self::Stdout(payload.to_vec()),
            STDERR => Self::Stderr(payload.to_vec()),
            STDIN_END if payload.is_empty() => Self::StdinEnd,
            STDIN_END => return Err(wrong()),
            RESIZE => {
                let [r0, r1, c0, c1] = payload.try_into().map_err(|_| wrong())?;
                Self::Resize { rows: u16::from_be_bytes([r0, r1]), columns: u16::from_be_bytes([c0, c1]) }
            }
            EXIT => Self::Exit(i64::from_be_bytes(payload.try_into().map_err(|_| wrong())?)),
            FAILURE => Self::Failure(String::from_utf8_lossy(payload).into_owned()),
            other => return Err(FrameError::UnknownType(other)),
        })
    }
}

/// Turns bytes that arrive in pieces of any size into frames. Holds at most one incomplete frame and what was pushed
/// behind it: take all frames after each push.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` when more bytes are needed.
    ///
    /// # Errors
    /// The bytes are not a frame; the stream is lost then, every further call fails the same way.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some(&[kind, _, _, _, l0, l1, l2, l3]) = rest.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if kind > FAILURE {
            return Err(FrameError::UnknownType(kind));
        }
        if length as usize > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        let end = HEADER_BYTES + length as usize;
        let Some(payload) = rest.get(HEADER_BYTES..end) else { return Ok(None) };
        let frame = Frame::from_parts(kind, payload)?;
        self.start += end;
        Ok(Some(frame))
    }

    /// Bytes of an incomplete frame are waiting: a stream that ends now was cut off.
    pub fn is_partial(&self) -> bool {
        self.start < self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Frame> {
        vec![
            Frame::Stdin(b"in".to_vec()),
            Frame::Stdout(b"out\n".to_vec()),
            Frame::Stderr(vec![0, 255]),
            Frame::StdinEnd,
            Frame::Resize { rows: 24, columns: 300 },
            Frame::Exit(-1),
            Frame::Exit(137),
            Frame::Failure("node \u{fc}ber is gone".into()),
        ]
    }

    #[test]
    fn frames_survive_any_split() {
        let mut bytes = Vec::new();
        all().iter().for_each(|f| encode(f, &mut bytes));
        for size in 1..=bytes.len() {
            let (mut decoder, mut got) = (Decoder::new(), Vec::new());
            for piece in bytes.chunks(size) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(frame);
                }
            }
            assert_eq!(got, all(), "pieces of {size}");
            assert!(!decoder.is_partial());
        }
    }

    #[test]
    fn bytes_on_the_wire_are_as_documented() {
        let check = |frame: Frame, expected: &[u8]| assert_eq!(frame.to_bytes(), expected, "{frame:?}");
        check(Frame::Stdout(b"hi".to_vec()), &[1, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']);
        check(Frame::StdinEnd, &[3, 0, 0, 0, 0, 0, 0, 0]);
        check(Frame::Resize { rows: 1, columns: 258 }, &[4, 0, 0, 0, 0, 0, 0, 4, 0, 1, 1, 2]);
        check(Frame::Exit(3), &[5, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 3]);
        check(Frame::Stdin(Vec::new()), &[]);
    }

    #[test]
    fn long_data_is_split() {
        let data = vec![7; PAYLOAD_BYTES_MAX + 5];
        let mut decoder = Decoder::new();
        decoder.push(&Frame::Stdout(data).to_bytes());
        let mut lengths = Vec::new();
        while let Some(Frame::Stdout(part)) = decoder.next_frame().unwrap() {
            lengths.push(part.len());
        }
        assert_eq!(lengths, [PAYLOAD_BYTES_MAX, 5]);
    }

    #[test]
    fn bad_bytes_are_refused() {
        let check = |bytes: &[u8], expected: &str| {
            let mut decoder = Decoder::new();
            decoder.push(bytes);
            assert_eq!(decoder.next_frame().unwrap_err().to_string(), expected);
        };
        check(b"HTTP/1.1", "failed to read a frame: unknown type 72");
        check(
            &[1, 0, 0, 0, 255, 0, 0, 0],
            "failed to read a frame: its length of 4278190080 bytes is over the limit of 1048576",
        );
        check(&[5, 0, 0, 0, 0, 0, 0, 1, 9], "failed to read a frame: type 5 cannot have 1 bytes");
        check(&[3, 0, 0, 0, 0, 0, 0, 1, 9], "failed to read a frame: type 3 cannot have 1 bytes");
    }
}

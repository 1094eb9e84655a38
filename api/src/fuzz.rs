//! Frames and join tokens from strangers.

use skein_fuzz::{Form, Verdict};

use crate::{
    JoinToken,
    frame::{Decoder, Frame, FrameError, PAYLOAD_BYTES_MAX, encode},
};

/// All frames of a stream that comes in pieces of `size`; the error that ended it; whether one was cut off.
fn decode(bytes: &[u8], size: usize) -> (Vec<Frame>, Option<FrameError>, bool) {
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    for piece in bytes.chunks(size.max(1)) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next_frame(), Err(error.clone()), "a lost stream stays lost");
                    return (frames, Some(error), false);
                }
            }
        }
    }
    (frames, None, decoder.is_partial())
}

/// Log and exec streams: the same frames in whatever pieces they come, and what was read is written back as it was.
#[test]
fn frames() {
    // A frame of 8 bytes takes 32 in memory, and five lists of them are held at once.
    skein_fuzz::target!("frames").inputs(20_000).memory(64, 16 << 10).run_mutants(Form::Bytes, |input| {
        let whole = decode(input, input.len());
        let size = input.first().map_or(1, |b| usize::from(*b % 16));
        assert_eq!(decode(input, size), whole, "in pieces of {size}");
        let (frames, error, partial) = whole;
        let mut bytes = Vec::new();
        frames.iter().for_each(|f| encode(f, &mut bytes));
        let empty = |f: &Frame| matches!(f, Frame::Stdin(d) | Frame::Stdout(d) | Frame::Stderr(d) if d.is_empty());
        // Empty data is not written, and text that was no UTF-8 may have grown out of one frame.
        let long = frames.iter().any(|f| matches!(f, Frame::Failure(text) if text.len() > PAYLOAD_BYTES_MAX));
        if !long {
            let expected: Vec<Frame> = frames.iter().filter(|f| !empty(f)).cloned().collect();
            assert_eq!(decode(&bytes, 7), (expected, None, false));
        }
        Verdict::from(error.is_none() && !partial && !frames.is_empty())
    });
}

/// Join tokens: what is understood is written back as it was.
#[test]
fn join_tokens() {
    let words = &["SKEIN-1-", "SKEIN-2-", "-", "--", "é", "g", "\u{2010}", "0123456789abcdef"];
    skein_fuzz::target!("join_tokens").inputs(30_000).run_mutants(Form::Text(words), |input| {
        let Ok(text) = str::from_utf8(input) else { return Verdict::Refused };
        match JoinToken::parse(text) {
            Ok(JoinToken { ca_sha256, id, secret }) => {
                assert_eq!(format!("SKEIN-1-{ca_sha256}-{id}-{secret}"), text.trim());
                Verdict::Accepted
            }
            Err(error) => {
                // Whatever it was, it may be a secret with a typing mistake: it is not repeated.
                assert!(input.len() < 30 || !error.message.contains(text), "{}", error.message);
                Verdict::Refused
            }
        }
    });
}

//! Serves one log or exec stream that the master asked for.
//!
//! Owns the way between an engine's stream and [`Frame`]s on two bounded channels; it must not know gRPC calls or the
//! session (the conversions to and from the protocol's frame are all it knows of them). [`serve`] runs in its caller's
//! task and ends when the engine's side ends or when nobody receives frames any more.
//!
//! Back-pressure: a slow reader fills [`FRAMES_BUFFERED`] frames of at most [`FRAME_BYTES_MAX`] (512 KiB), then the
//! engine's stream is not read on; standard input the same the other way.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use skein_api::{
    ExecOptions, LogOptions, StreamRequest, TaskId,
    grpc::{Resize, StreamFrame, stream_frame::Body},
};
use tokio::{io::AsyncWriteExt, sync::mpsc, time::Instant};

use crate::{
    engine::{Engine, EngineError, ExecOutput, Inspected, LogStream},
    inspect::Reply,
};

/// Depth of the channels on either side of [`serve`].
pub const FRAMES_BUFFERED: usize = 16;
/// Largest piece of output in one frame, bytes; well under gRPC's 4 MiB.
pub const FRAME_BYTES_MAX: usize = 32 * 1024;
/// How long an ended exec may take to show its exit code: the engine closes the stream shortly before it knows.
const EXIT_CODE_WAIT: Duration = Duration::from_secs(10);
/// How long an answer may hold something: a check of the largest kind takes half a minute.
pub const HELD_MAX: Duration = Duration::from_secs(120);
/// How often that is looked at.
const EXIT_CODE_POLL: Duration = Duration::from_millis(20);

/// One frame of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the process.
    Stdin(Bytes),
    /// Standard input ended.
    StdinClosed,
    /// The terminal has another size.
    Resize {
        /// Characters.
        rows: u16,
        /// Characters.
        columns: u16,
    },
    /// From the process.
    Stdout(Bytes),
    /// From the process.
    Stderr(Bytes),
    /// The end, with the exit code of an exec (0 for logs).
    Exit(i64),
    /// The end, with a failure.
    Error(String),
}

impl Frame {
    /// From the protocol; none: a frame without a meaning here (a stream id, an empty one, another release's).
    pub fn from_wire(frame: StreamFrame) -> Option<Self> {
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        Some(match frame.body? {
            Body::StreamId(_) => return None,
            Body::Stdin(bytes) => Self::Stdin(bytes.into()),
            Body::Stdout(bytes) => Self::Stdout(bytes.into()),
            Body::Stderr(bytes) => Self::Stderr(bytes.into()),
            Body::StdinClosed(_) => Self::StdinClosed,
            Body::Resize(Resize { rows, columns }) => Self::Resize { rows: size(rows), columns: size(columns) },
            Body::Exit(code) => Self::Exit(code),
            Body::Error(error) => Self::Error(error),
        })
    }

    /// To the protocol.
    pub fn into_wire(self) -> StreamFrame {
        let body = match self {
            Self::Stdin(bytes) => Body::Stdin(bytes.into()),
            Self::StdinClosed => Body::StdinClosed(true),
            Self::Resize { rows, columns } => Body::Resize(Resize { rows: rows.into(), columns: columns.into() }),
            Self::Stdout(bytes) => Body::Stdout(bytes.into()),
            Self::Stderr(bytes) => Body::Stderr(bytes.into()),
            Self::Exit(code) => Body::Exit(code),
            Self::Error(error) => Body::Error(error),
        };
        StreamFrame { body: Some(body) }
    }

    /// The first frame of an agent's stream.
    pub fn hello(stream_id: &str) -> StreamFrame {
        StreamFrame { body: Some(Body::StreamId(stream_id.to_owned())) }
    }
}

/// Why a stream ended before its time.
enum End {
    /// Nobody receives frames.
    Gone,
    Failed(String),
}

impl From<EngineError> for End {
    fn from(error: EngineError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Serves `request`. The last frame is [`Frame::Exit`] or [`Frame::Error`], unless the receiver of `output` was dropped:
/// that ends everything here at once (a process that was started in a container goes on, as with the engine's own
/// client). An `input` that ends closes the standard input and nothing else.
pub async fn serve(engine: &Engine, request: StreamRequest, input: mpsc::Receiver<Frame>, output: mpsc::Sender<Frame>) {
    let gone = output.clone();
    let served = async {
        match request {
            StreamRequest::Logs { task, options } => logs(engine, &task, &options, &output).await,
            StreamRequest::Exec { task, options } => exec(engine, &task, &options, input, &output).await,
            StreamRequest::Net { .. } => Err(End::Failed("the engine knows nothing of networks".into())),
        }
    };
    // Cancelled in the middle, `served` only drops its connections to the engine.
    let ended = tokio::select! {
        ended = served => ended,
        () = gone.closed() => Err(End::Gone),
    };
    let last = match ended {
        Ok(code) => Frame::Exit(code),
        Err(End::Failed(error)) => Frame::Error(error),
        Err(End::Gone) => return,
    };
    // Nobody there to hear the last word is an end like any other.
    let _ = gone.send(last).await;
}

/// Sends an answer and the end, or why there is none. With something held the end comes when nobody receives frames any
/// more, or after [`HELD_MAX`].
pub async fn send(answer: Result<Reply, String>, output: mpsc::Sender<Frame>) {
    let Reply { json, held } = match answer {
        Ok(answer) => answer,
        // Nobody there to hear it is an end like any other, here and below.
        Err(why) => return drop(output.send(Frame::Error(why)).await),
    };
    let mut bytes = Bytes::from(json);
    while !bytes.is_empty() {
        let part = bytes.split_to(bytes.len().min(FRAME_BYTES_MAX));
        if output.send(Frame::Stdout(part)).await.is_err() {
            return;
        }
    }
    if held.is_some() {
        let _ = tokio::time::timeout(HELD_MAX, output.closed()).await;
    }
    drop(held);
    let _ = output.send(Frame::Exit(0)).await;
}

async fn find(engine: &Engine, task: &TaskId) -> Result<Inspected, End> {
    let found = engine.find(task).await?;
    found.ok_or_else(|| End::Failed(format!("task {} has no container on this host", task.short())))
}

async fn logs(engine: &Engine, task: &TaskId, options: &LogOptions, output: &mpsc::Sender<Frame>) -> Result<i64, End> {
    let container = find(engine, task).await?.container.id;
    let mut stream = engine.logs(&container, options).await?;
    forward(&mut stream, output).await?;
    Ok(0)
}

async fn forward(stream: &mut LogStream, output: &mpsc::Sender<Frame>) -> Result<(), End> {
    while let Some(piece) = stream.next().await {
        let (mut bytes, frame): (Bytes, fn(Bytes) -> Frame) = match piece? {
            ExecOutput::Stdout(bytes) => (bytes, Frame::Stdout),
            ExecOutput::Stderr(bytes) => (bytes, Frame::Stderr),
        };
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(FRAME_BYTES_MAX));
            output.send(frame(part)).await.map_err(|_| End::Gone)?;
        }
    }
    Ok(())
}

async fn exec(
    engine: &Engine,
    task: &TaskId,
    options: &ExecOptions,
    mut input: mpsc::Receiver<Frame>,
    output: &mpsc::Sender<Frame>,
) -> Result<i64, End> {
    if options.argv.is_empty() {
        return Err(End::Failed("no command was given".into()));
    }
    let found = find(engine, task).await?;
    if !found.container.state.is_live() {
        return Err(End::Failed(format!("the container of task {} does not run", task.short())));
    }
    let mut process = engine.exec(&found.container.id, options).await?;
    let id = process.id.clone();
    let feed = async {
        while let Some(frame) = input.recv().await {
            match frame {
                Frame::Stdin(bytes) => {
                    let written = async {
                        process.input.write_all(&bytes).await?;
                        process.input.flush().await
                    };
                    // A process that no longer reads is not a failure of the stream.
                    if written.await.is_err() {
                        break;
                    }
                }
                Frame::StdinClosed => break,
                Frame::Resize { rows, columns } => {
                    if let Err(error) = engine.exec_resize(&id, rows, columns).await {
                        tracing::debug!(%error, "terminal keeps its size");
                    }
                }
                _ => {}
            }
        }
        let _ = process.input.shutdown().await;
        // The size may still change after the end of the input.
        while let Some(frame) = input.recv().await {
            if let Frame::Resize { rows, columns } = frame {
                let _ = engine.exec_resize(&id, rows, columns).await;
            }
        }
        std::future::pending::<()>().await;
    };
    // `forward` ends with the process; cancelling `feed` then loses only input that nobody reads.
    tokio::select! {
        ended = forward(&mut process.output, output) => ended?,
        () = feed => {}
    }
    let deadline = Instant::now() + EXIT_CODE_WAIT;
    loop {
        if let Some(code) = engine.exec_exit_code(&id).await? {
            return Ok(code);
        }
        if Instant::now() >= deadline {
            return Err(End::Failed("the engine did not say how the process ended".into()));
        }
        tokio::time::sleep(EXIT_CODE_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_document_is_sent_whole_in_frames_of_a_bounded_size() {
        let (tx, mut rx) = mpsc::channel(FRAMES_BUFFERED);
        let document: Vec<u8> = (0..FRAME_BYTES_MAX * 2 + 5).map(|n| n as u8).collect();
        send(Ok(Reply { json: document.clone(), held: None }), tx.clone()).await;
        let mut got = Vec::new();
        while let Some(Frame::Stdout(part)) = rx.recv().await {
            assert!(part.len() <= FRAME_BYTES_MAX);
            got.extend_from_slice(&part);
        }
        assert_eq!(got, document);
        let (held_tx, held_rx) = tokio::sync::oneshot::channel::<()>();
        let (out, mut frames) = mpsc::channel(FRAMES_BUFFERED);
        let held = Reply { json: b"[]".to_vec(), held: Some(Box::new(held_tx)) };
        let sending = tokio::spawn(send(Ok(held), out));
        assert_eq!(frames.recv().await, Some(Frame::Stdout(Bytes::from_static(b"[]"))));
        assert!(!sending.is_finished(), "it lives as long as the stream");
        drop(frames);
        assert!(held_rx.await.is_err(), "and no longer");
        send(Err("no".into()), tx).await;
        assert_eq!(rx.recv().await, Some(Frame::Error("no".into())));
    }

    #[test]
    fn frames_come_back_from_the_wire_as_they_went() {
        for frame in [
            Frame::Stdin(Bytes::from_static(b"in")),
            Frame::StdinClosed,
            Frame::Resize { rows: 24, columns: 80 },
            Frame::Stdout(Bytes::from_static(b"out")),
            Frame::Stderr(Bytes::from_static(b"err")),
            Frame::Exit(3),
            Frame::Error("no".into()),
        ] {
            assert_eq!(Frame::from_wire(frame.clone().into_wire()), Some(frame));
        }
        assert_eq!(Frame::from_wire(Frame::hello("s1")), None);
        assert_eq!(Frame::from_wire(StreamFrame::default()), None);
    }
}

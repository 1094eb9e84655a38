//! Logs and exec: frames between a user's HTTP connection and an agent's stream.

use axum::{
    body::{Body, Bytes},
    extract::{Path, Query, State},
    response::Response,
};
use futures_util::StreamExt as _;
use http::{HeaderValue, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use skein_api::{
    ApiError, ExecOptions, LogOptions, NodeId, StreamRequest, TaskId,
    frame::{Decoder, Frame},
    grpc::{self, stream_frame::Body as Wire},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Api, Failure, User, parse};
use crate::broker::AgentStream;

/// Bytes read from a user at a time.
const READ_BYTES: usize = 64 << 10;

/// The task that a user means, and its node.
async fn locate(api: &Api, reference: String) -> Result<(TaskId, NodeId), Failure> {
    let found = api.read(move |core| {
        let task = core.model().find_task(&reference)?;
        let node = task.node.clone().ok_or_else(|| {
            ApiError::new("not_placed", format!("task {} has no node yet: {}", task.name, task.status.message))
                .with_hint(format!("skein explain {}", task.name))
        })?;
        Ok::<_, ApiError>((task.id.clone(), node))
    });
    Ok(found.await??)
}

/// An agent's frame as users get it. `None` for frames that say nothing to a user.
fn to_user(frame: grpc::StreamFrame) -> Option<Frame> {
    match frame.body? {
        Wire::Stdout(bytes) => Some(Frame::Stdout(bytes)),
        Wire::Stderr(bytes) => Some(Frame::Stderr(bytes)),
        Wire::Exit(code) => Some(Frame::Exit(code)),
        Wire::Error(text) => Some(Frame::Failure(text)),
        Wire::StreamId(_) | Wire::Stdin(_) | Wire::StdinClosed(_) | Wire::Resize(_) => None,
    }
}

/// A user's frame as agents get it.
fn to_agent(frame: Frame) -> Option<grpc::StreamFrame> {
    let body = match frame {
        Frame::Stdin(bytes) => Wire::Stdin(bytes),
        Frame::StdinEnd => Wire::StdinClosed(true),
        Frame::Resize { rows, columns } => Wire::Resize(grpc::Resize { rows: rows.into(), columns: columns.into() }),
        Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit(_) | Frame::Failure(_) => return None,
    };
    Some(grpc::StreamFrame { body: Some(body) })
}

pub(super) async fn logs(
    State(api): State<Api>,
    _: User,
    Path(reference): Path<String>,
    Query(options): Query<LogOptions>,
) -> Result<Response, Failure> {
    let (task, node) = locate(&api, reference).await?;
    let stream = api.broker.open(&api.cluster, node, &StreamRequest::Logs { task, options }).await?;
    let AgentStream { frames, to_agent } = stream;
    let frames = frames.filter_map(move |frame| {
        // Held until the user's side is dropped: its end tells the agent to stop reading.
        let _open = &to_agent;
        let bytes = match frame {
            Ok(frame) => to_user(frame).filter(|f| !matches!(f, Frame::Exit(_))).map(|f| f.to_bytes()),
            Err(status) => Some(Frame::Failure(status.message().to_owned()).to_bytes()),
        };
        std::future::ready(bytes.map(|b| Ok::<_, std::convert::Infallible>(Bytes::from(b))))
    });
    let mut response = Response::new(Body::from_stream(frames));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/vnd.skein.frames"));
    Ok(response)
}

pub(super) async fn exec(
    State(api): State<Api>,
    _: User,
    Path(reference): Path<String>,
    mut request: axum::extract::Request,
) -> Result<Response, Failure> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let body = axum::body::to_bytes(request.into_body(), READ_BYTES)
        .await
        .map_err(|e| Failure(ApiError::new("bad_request", e.to_string())))?;
    let options: ExecOptions = parse(&body)?;
    if options.argv.is_empty() {
        return Err(Failure(ApiError::new("bad_request", "argv is empty")));
    }
    let upgrade = upgrade
        .ok_or_else(|| Failure(ApiError::new("bad_request", "exec needs HTTP/1.1 with `Upgrade: skein-exec`")))?;
    let (task, node) = locate(&api, reference).await?;
    let stream = api.broker.open(&api.cluster, node, &StreamRequest::Exec { task, options }).await?;
    api.tasks.spawn(async move {
        match upgrade.await {
            Ok(user) => relay(TokioIo::new(user), stream).await,
            Err(error) => tracing::debug!(%error, "exec connection was not upgraded"),
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("skein-exec"));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    Ok(response)
}

/// Carries frames both ways until the agent's side ends; the end of the user's input does not end the output.
async fn relay(user: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static, stream: AgentStream) {
    let (mut read, mut write) = tokio::io::split(user);
    let AgentStream { mut frames, to_agent: tx } = stream;
    let input = async move {
        let (mut decoder, mut buffer) = (Decoder::new(), vec![0; READ_BYTES]);
        'read: while let Ok(n @ 1..) = read.read(&mut buffer).await {
            decoder.push(&buffer[..n]);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => {
                        let Some(frame) = to_agent(frame) else { continue };
                        if tx.send(Ok(frame)).await.is_err() {
                            break 'read;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(%error, "exec input is not frames");
                        break 'read;
                    }
                }
            }
        }
    };
    let output = async {
        loop {
            let frame = match frames.message().await {
                Ok(Some(frame)) => to_user(frame),
                Ok(None) => break,
                Err(status) => Some(Frame::Failure(status.message().to_owned())),
            };
            let Some(frame) = frame else { continue };
            let end = matches!(frame, Frame::Exit(_) | Frame::Failure(_));
            if write.write_all(&frame.to_bytes()).await.is_err() || end {
                break;
            }
        }
        // The user sees the end; a connection that is gone needs none.
        let _ = write.shutdown().await;
    };
    // The end of the user's input is no end; that of the process is.
    tokio::select! {
        () = output => {}
        () = async { input.await; std::future::pending().await } => {}
    }
}

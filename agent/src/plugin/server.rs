//! HTTP for the engine: one POST per request of the plugin protocol.
//!
//! Owns: connections, bodies, time limits, and the form in which errors reach the engine. Must not know: what the
//! answers are: it asks the overlay's actor. It never asks the engine: some of the engine's locks are held while it
//! waits for us, so a handler that inspects a container deadlocks until the engine gives up.
//!
//! Tasks: one that accepts, below it one per connection, all in one set that [`PluginServer`] owns and aborts on drop.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};

use super::wire::{ParseError, Request};
use crate::overlay::OverlayHandle;

/// How long a request may take: below the 15 s after which engines were seen to give up, so that they learn why.
pub const HANDLER_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest body, bytes: 4096 published ports take 500 KB.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;

/// Connections at once. An engine opens one per request under way; more wait in the socket's backlog.
pub const CONNECTIONS_MAX: usize = 128;

/// Pause after a failure to accept (too many open files), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Media type of the protocol (Docker plugin API).
const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// The running server; dropping it ends it. The listener's file stays: whoever handed it over owns it.
#[derive(Debug)]
pub struct PluginServer {
    tasks: JoinSet<()>,
}

impl PluginServer {
    /// Serves the protocol on a listener; must be called within a tokio runtime.
    ///
    /// # Errors
    /// The listener cannot be registered with the runtime.
    pub fn try_start(listener: std::os::unix::net::UnixListener, overlay: OverlayHandle) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, overlay));
        Ok(Self { tasks })
    }

    /// Waits until the server ends, which it does only by a panic: for the agent's main loop to notice.
    pub async fn ended(&mut self) {
        self.tasks.join_next().await;
    }
}

async fn accept(listener: UnixListener, overlay: OverlayHandle) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let overlay = overlay.clone();
                connections.spawn(async move {
                    connection(stream, overlay).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection of the engine");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, overlay: OverlayHandle) {
    let service = service_fn(move |request| {
        let overlay = overlay.clone();
        async move { Ok::<_, Infallible>(respond(request, overlay).await) }
    });
    if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "connection of the engine ended");
    }
}

async fn respond(request: http::Request<Incoming>, overlay: OverlayHandle) -> Response<Full<Bytes>> {
    let method = request.uri().path().to_owned();
    let (status, body) = match timeout(HANDLER_TIMEOUT, answer(request, &method, overlay)).await {
        Ok(Ok(body)) => (StatusCode::OK, body),
        Ok(Err((status, error))) => {
            tracing::warn!(method, error, "refused a request of the engine");
            (status, failure(&error))
        }
        Err(_) => {
            let error = format!("no answer within {} s", HANDLER_TIMEOUT.as_secs());
            tracing::warn!(method, error, "failed to answer the engine");
            (StatusCode::OK, failure(&error))
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(MEDIA_TYPE));
    response
}

/// Both drivers' words for a failure: network drivers are asked for `Err`, IPAM drivers for `Error` (libnetwork
/// `drivers/remote/api.Response`, `ipams/remote/api.Response`). An engine that finds only the other one takes the
/// failure for an empty success: "invalid CIDR address:" was seen.
fn failure(error: &str) -> String {
    json!({ "Err": error, "Error": error }).to_string()
}

async fn answer(
    request: http::Request<Incoming>,
    method: &str,
    overlay: OverlayHandle,
) -> Result<String, (StatusCode, String)> {
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await;
    let body = body.map_err(|e| (StatusCode::BAD_REQUEST, format!("failed to read the request: {e}")))?.to_bytes();
    tracing::debug!(method, body = %String::from_utf8_lossy(body.trim_ascii()), "request of the engine");
    let request = Request::parse(method, &body).map_err(|e| {
        // Engines take 404 as "this plugin does not have that" and go on; any other failure ends what they do.
        let unknown = matches!(e, ParseError::UnknownMethod(_));
        (if unknown { StatusCode::NOT_FOUND } else { StatusCode::OK }, e.to_string())
    })?;
    let reply = overlay.plugin(request).await.map_err(|error| (StatusCode::OK, error))?;
    let body = serde_json::to_string(&reply).map_err(|e| (StatusCode::OK, e.to_string()))?;
    tracing::debug!(method, body, "answered the engine");
    Ok(body)
}

#[cfg(test)]
mod tests;

//! The two listeners: TCP with mutual TLS for agents and remote users, a unix socket for the local operator.
//!
//! One HTTP service behind both. Tasks: one per listener, one per connection and what they spawn, all in one `TaskTracker`; each
//! connection has a token that cuts it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use crate::{
    pki::{self, Identity},
    stall::Unstalled,
};

/// Connections at a time. Agents have one each (10,000), users a few; the rest is room.
const CONNECTIONS_MAX: usize = 16_384;

/// Connections without a certificate at a time, and how long each may last. A thousand hosts that join at once take some
/// seconds more.
const ANONYMOUS_MAX: usize = 64;
const ANONYMOUS_WITHIN: Duration = Duration::from_secs(30);

/// No limit: ten years.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// How long a removed node's connections last, for the word that it was removed.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A handshake takes two round trips; a client that is slower holds a place that others need.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);

/// Handshakes at a time. Each costs a millisecond of CPU on both sides; ten thousand agents that come back at once must not
/// all be served at the same time, so slowly that each gives up and begins anew. Those that wait do so in the kernel.
const HANDSHAKES_MAX: usize = 512;

/// A peer that answers no ping for this long is gone, whatever TCP still believes.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A peer that takes nothing of what waits for it for so long is cut; one that lost its line for a moment is not.
const STALLED_WITHIN: Duration = Duration::from_secs(20);

/// Where agents and remote users come from: this host's TCP, or the network of a simulation.
pub trait Listener: Send + Sync + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, and where it comes from. Cancel-safe: one that is not taken stays in the queue.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = Self::accept(self).await?;
        // Small messages both ways: Nagle would only delay them. Users' HTTP/1 has no pings, so TCP asks. A socket that
        // refuses either is broken anyway.
        let _ = stream.set_nodelay(true);
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE * 6).with_interval(KEEPALIVE);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        Ok((stream, peer))
    }
}

/// Who is at the other end, and how to end it. In the extensions of every request.
#[derive(Clone, Debug)]
pub struct ConnInfo {
    /// Who.
    pub identity: Identity,
    /// Cuts the connection.
    pub cancel: CancellationToken,
}

/// The open connections of each node, to cut them all at once. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<HashMap<String, Vec<CancellationToken>>>>);

impl Connections {
    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<String, Vec<CancellationToken>>> {
        self.0.lock().expect("nobody panics while holding this lock")
    }

    fn add(&self, node: &str, cancel: &CancellationToken) {
        let mut open = self.open();
        let tokens = open.entry(node.to_owned()).or_default();
        tokens.retain(|t| !t.is_cancelled());
        tokens.push(cancel.clone());
    }

    /// Cuts every connection of a node, a moment later: what was just said to it still leaves.
    pub fn cut(&self, node: &str) {
        let Some(tokens) = self.open().remove(node) else { return };
        tokio::spawn(async move {
            tokio::time::sleep(LAST_WORDS).await;
            tokens.iter().for_each(CancellationToken::cancel);
        });
    }
}

/// Serves connections until cancelled.
#[derive(Clone)]
pub struct Server {
    /// What answers requests.
    pub router: Router,
    /// Ends everything.
    pub shutdown: CancellationToken,
    /// Connections and listeners.
    pub tasks: TaskTracker,
    /// The nodes' ones among them.
    pub connections: Connections,
    /// Room for connections.
    places: Arc<Semaphore>,
    /// Room for those without a certificate.
    anonymous: Arc<Semaphore>,
    /// Room for handshakes.
    handshakes: Arc<Semaphore>,
}

impl Server {
    /// A server without listeners.
    pub fn new(router: Router, shutdown: CancellationToken, tasks: TaskTracker, connections: Connections) -> Self {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let anonymous = Arc::new(Semaphore::new(ANONYMOUS_MAX));
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        Self { router, shutdown, tasks, connections, places, anonymous, handshakes }
    }

    /// Serves one connection until its end, or until it is cut; `_place` is its room.
    async fn serve<S>(self, stream: S, identity: Identity, _place: OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let cancel = self.shutdown.child_token();
        if let Identity::Node { id, .. } = &identity {
            self.connections.add(id, &cancel);
        }
        // A host that joins needs two calls; what has no certificate may not stay.
        let (_place, lifetime) = match identity {
            Identity::Anonymous => match self.anonymous.clone().try_acquire_owned() {
                Ok(place) => (Some(place), ANONYMOUS_WITHIN),
                Err(_) => return tracing::warn!("connection refused, all places for joining hosts are taken"),
            },
            _ => (None, FOR_EVER),
        };
        let end = cancel.clone();
        let _ended = end.drop_guard();
        let info = ConnInfo { identity, cancel: cancel.clone() };
        let service = self.router.map_request(move |mut request: http::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(info.clone());
            request.map(axum::body::Body::new)
        });
        let stream = Unstalled::new(stream, STALLED_WITHIN);
        let mut builder = Builder::new(TokioExecutor::new());
        builder.http2().timer(TokioTimer::new()).keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE);
        builder.http1().timer(TokioTimer::new());
        let connection =
            builder.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(service));
        tokio::select! {
            result = connection => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
            }
            // Dropping the connection closes it: requests in flight end with it.
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(lifetime) => {}
        }
    }

    /// The next connection; none when the server ends.
    async fn next<T, F: Future<Output = io::Result<T>>>(&self, accept: impl Fn() -> F) -> Option<T> {
        loop {
            // Cancel-safe: a connection that is not taken stays in the listener's queue.
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return None,
                accepted = accept() => accepted,
            };
            match accepted {
                Ok(connection) => return Some(connection),
                // Out of descriptors, most likely: wait until some are free.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    /// Accepts mutual TLS on `listener`.
    pub fn listen_tls(&self, listener: impl Listener, acceptor: TlsAcceptor) {
        let server = self.clone();
        self.tasks.spawn(async move {
            loop {
                let handshakes = server.handshakes.clone();
                let shaking = handshakes.acquire_owned().await.expect("the semaphore is never closed");
                let Some((stream, peer)) = server.next(|| listener.accept()).await else { break };
                let Ok(place) = server.places.clone().try_acquire_owned() else {
                    tracing::warn!(%peer, "connection refused, all places are taken");
                    continue;
                };
                let (server, acceptor) = (server.clone(), acceptor.clone());
                server.tasks.clone().spawn(async move {
                    let shaken = tokio::time::timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await;
                    drop(shaking);
                    match shaken {
                        Ok(Ok(tls)) => {
                            let certificate = tls.get_ref().1.peer_certificates().and_then(|c| c.first());
                            let identity = match certificate {
                                None => Some(Identity::Anonymous),
                                Some(certificate) => pki::identity(certificate),
                            };
                            match identity {
                                // A task of its own: this one has room for a handshake, which would stay with it.
                                Some(identity) => drop(server.tasks.clone().spawn(server.serve(tls, identity, place))),
                                None => tracing::warn!(%peer, "connection refused, its certificate names no role"),
                            }
                        }
                        Ok(Err(error)) => tracing::debug!(%peer, %error, "handshake failed"),
                        Err(_) => tracing::debug!(%peer, "handshake took too long"),
                    }
                });
            }
        });
    }

    /// Accepts the local operator on `listener`.
    pub fn listen_unix(&self, listener: UnixListener) {
        let server = self.clone();
        self.tasks.spawn(async move {
            while let Some((stream, _)) = server.next(|| listener.accept()).await {
                let Ok(place) = server.places.clone().try_acquire_owned() else {
                    tracing::warn!("local connection refused, all places are taken");
                    continue;
                };
                let uid = stream.peer_cred().map(|c| c.uid()).unwrap_or(u32::MAX);
                server.tasks.spawn(server.clone().serve(stream, Identity::Local(uid), place));
            }
        });
    }
}

/// A failure to listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process serves the socket.
    #[error("failed to listen on {0}: another process serves it")]
    Served(PathBuf),
    /// The path is taken by something that is not a socket.
    #[error("failed to listen on {0}: there is a file that is not a socket")]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("failed to listen on {path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens on a unix socket that only root (or the process's user) may use. A socket that a dead process left is
/// replaced, one that is served is not.
///
/// # Errors
/// As [`BindError`] says.
pub fn bind_unix(path: &Path) -> Result<UnixListener, BindError> {
    let io = |source| BindError::Io { path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(io)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(BindError::NotASocket(path.to_owned())),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(BindError::Served(path.to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(io)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(io)?;
    Ok(listener)
}

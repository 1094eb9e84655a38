//! Typed client of the native API (docs/api.md) over a unix socket or mutual TLS.
//!
//! Owns: connecting, time limits, turning answers into types and failures into [`ClientError`]. Must not know: contexts,
//! terminals, how failures are shown. Each call has a connection of its own (a user's command makes a handful of them),
//! driven by one spawned task that ends with the connection; streams keep theirs until they are dropped.

mod net;

use std::{
    collections::VecDeque,
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls};

use crate::{
    ApiError, CertBundle, CertRequest, ClusterInfo, ContainerCreate, Event, ExecOptions, ExplainQuery, Explanation,
    LogOptions, Network, NetworkSpec, Node, NodeUpdate, Service, StackApply, StackPlan, Task, Token, TokenCreate,
    TokenCreated, Volume, WhatIf, WhatIfAnswer,
    frame::{Decoder, Frame, FrameError, encode},
};

/// How long connecting, with the TLS handshake, may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a call may take until its whole answer is there; for streams, until they begin. An answer waits for one
/// commit of the store (milliseconds) and, for exec and logs, for an agent (its own limit is below this).
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer that is read: 100,000 tasks of about 2 KiB each.
pub const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Longest single event of an event stream: one object with its keys.
pub const EVENT_BYTES_MAX: usize = 16 << 20;

/// The value of `Upgrade` for exec.
pub const EXEC_PROTOCOL: &str = "skein-exec";

/// Where a master is reached.
#[derive(Clone, Debug)]
enum Endpoint {
    Unix(PathBuf),
    Tls { host: String, port: u16, name: ServerName<'static>, config: Arc<rustls::ClientConfig> },
}

/// Who a client is and whom it trusts, all PEM.
#[derive(Clone)]
pub struct TlsIdentity {
    /// The cluster's CA.
    pub ca_pem: Vec<u8>,
    /// Certificate of the user, with its chain.
    pub certificate_pem: Vec<u8>,
    /// Private key of the user.
    pub key_pem: Vec<u8>,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsIdentity(..)")
    }
}

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection: nothing was sent.
    #[error("failed to reach the master at {endpoint}")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        source: io::Error,
    },
    /// The certificates or the address cannot be used.
    #[error("failed to set up TLS: {0}")]
    Tls(String),
    /// The master understood and said no.
    #[error("{error}")]
    Api {
        /// HTTP status.
        status: u16,
        /// What it said.
        error: ApiError,
    },
    /// No answer within [`REQUEST_TIMEOUT`]. A change may have happened or not.
    #[error("failed to {call}: the master at {endpoint} did not answer within {} s", after.as_secs())]
    Timeout {
        /// Method and path.
        call: String,
        /// Where.
        endpoint: String,
        /// The limit.
        after: Duration,
    },
    /// The connection broke. A change may have happened or not.
    #[error("failed to {call}: the connection to the master at {endpoint} broke")]
    Broken {
        /// Method and path.
        call: String,
        /// Where.
        endpoint: String,
        /// Why.
        source: io::Error,
    },
    /// Something answered that does not speak this API.
    #[error("failed to {call}: unexpected answer from {endpoint}: {what}")]
    Unexpected {
        /// Method and path.
        call: String,
        /// Where.
        endpoint: String,
        /// What is wrong with it.
        what: String,
    },
}

impl ClientError {
    /// HTTP status of the master's answer, if there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Api { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The stable code of the master's answer, if there was one.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Api { error, .. } => Some(&error.code),
            _ => None,
        }
    }

    /// No master answered at all, or not in time.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Timeout { .. } | Self::Broken { .. })
    }

    /// What the user may do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Some(
                "the socket is for the local operator: run as root, or use a certificate (`skein context create`)"
                    .into(),
            ),
            Self::Connect { .. } => {
                Some("is skein-master running? `skein context ls` shows which master is meant".into())
            }
            Self::Api { error, .. } => error.hint.clone(),
            Self::Timeout { .. } | Self::Broken { .. } => Some("`skein info` shows how the master is".into()),
            Self::Tls(_) | Self::Unexpected { .. } => None,
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A client of one master. Cheap to clone; holds no connection.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    why: Option<String>,
    request_timeout: Duration,
}

impl Client {
    /// A client of the master that listens on this unix socket.
    pub fn unix(path: impl AsRef<Path>) -> Self {
        Self { endpoint: Endpoint::Unix(path.as_ref().into()), why: None, request_timeout: REQUEST_TIMEOUT }
    }

    /// A client of the master at this TCP address, with mutual TLS. `server_name` is the name that its certificate must
    /// have, when it is not [`crate::MASTER_NAME`], which every master's has: identity is the CA's word, whatever address
    /// was dialled.
    ///
    /// # Errors
    /// [`ClientError::Tls`]: a PEM text cannot be used, or the key is not the certificate's.
    pub fn tls(host: &str, port: u16, server_name: Option<&str>, identity: &TlsIdentity) -> Result<Self, ClientError> {
        let tls = |what: &str, why: &dyn std::fmt::Display| ClientError::Tls(format!("{what}: {why}"));
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&identity.ca_pem) {
            let certificate = certificate.map_err(|e| tls("CA certificate", &e))?;
            roots.add(certificate).map_err(|e| tls("CA certificate", &e))?;
        }
        if roots.is_empty() {
            return Err(ClientError::Tls("CA certificate: no certificate in it".into()));
        }
        let chain = CertificateDer::pem_slice_iter(&identity.certificate_pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| tls("client certificate", &e))?;
        let key = PrivateKeyDer::from_pem_slice(&identity.key_pem).map_err(|e| tls("client key", &e))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| tls("protocol versions", &e))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|e| tls("client certificate and key", &e))?;
        // The master's port speaks HTTP/2 to agents and HTTP/1.1, which has upgrades, to users.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = server_name.unwrap_or(crate::MASTER_NAME);
        let name = ServerName::try_from(name.to_owned()).map_err(|e| tls(&format!("server name {name:?}"), &e))?;
        let endpoint = Endpoint::Tls { host: host.into(), port, name, config: Arc::new(config) };
        Ok(Self { endpoint, why: None, request_timeout: REQUEST_TIMEOUT })
    }

    /// The same client, saying with each request why it is made (header `Skein-Why`).
    pub fn with_why(mut self, why: &str) -> Self {
        // A header's value is visible ASCII; anything else in a reason is not worth a failure.
        let visible: String = why.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
        self.why = (!visible.is_empty()).then_some(visible);
        self
    }

    /// The same client with another limit than [`REQUEST_TIMEOUT`].
    pub fn with_request_timeout(mut self, limit: Duration) -> Self {
        self.request_timeout = limit;
        self
    }

    /// Where the master is, as a user writes it: `unix:///…` or `tcp://host:port`.
    pub fn endpoint(&self) -> String {
        match &self.endpoint {
            Endpoint::Unix(path) => format!("unix://{}", path.display()),
            Endpoint::Tls { host, port, .. } if host.contains(':') => format!("tcp://[{host}]:{port}"),
            Endpoint::Tls { host, port, .. } => format!("tcp://{host}:{port}"),
        }
    }

    async fn connect_now(&self) -> io::Result<Box<dyn Stream>> {
        match &self.endpoint {
            Endpoint::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            Endpoint::Tls { host, port, name, config } => {
                let tcp = TcpStream::connect((host.as_str(), *port)).await?;
                tcp.set_nodelay(true)?;
                Ok(Box::new(TlsConnector::from(config.clone()).connect(name.clone(), tcp).await?))
            }
        }
    }

    async fn connect(&self) -> Result<http1::SendRequest<Full<Bytes>>, ClientError> {
        let failed = |source| ClientError::Connect { endpoint: self.endpoint(), source };
        let late =
            || io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()));
        let stream = timeout(CONNECT_TIMEOUT, self.connect_now()).await.map_err(|_| failed(late()))?.map_err(failed)?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(io::Error::other(e)))?;
        // Ends with the connection: when the answer's body and the sender are dropped.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    /// Sends one request and waits for the head of the answer; an answer that is no success becomes an error.
    async fn send(&self, call: &Call) -> Result<http::Response<Incoming>, ClientError> {
        let mut sender = self.connect().await?;
        let mut request = Request::builder().method(call.method.clone()).uri(&call.path).header(header::HOST, "skein");
        if let Some(why) = &self.why {
            request = request.header("skein-why", why);
        }
        if call.upgrade {
            request = request.header(header::CONNECTION, "upgrade").header(header::UPGRADE, EXEC_PROTOCOL);
        }
        if call.body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(call.body.clone().unwrap_or_default()))
            .map_err(|e| self.unexpected(call, format!("the request cannot be written: {e}")))?;
        let response = sender.send_request(request).await.map_err(|e| self.broken(call, e))?;
        let status = response.status();
        if status.is_success() || (call.upgrade && status == StatusCode::SWITCHING_PROTOCOLS) {
            return Ok(response);
        }
        let body = self.read(call, response).await?;
        let error = serde_json::from_slice::<ApiError>(&body).ok().filter(|e| !e.message.is_empty());
        Err(match error {
            Some(error) => ClientError::Api { status: status.as_u16(), error },
            None => self.unexpected(call, format!("status {status} without a reason")),
        })
    }

    async fn read(&self, call: &Call, response: http::Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(body.map_err(|e| self.broken(call, e))?.to_bytes())
    }

    async fn limited<T>(
        &self,
        call: &Call,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        let late =
            |_| ClientError::Timeout { call: call.to_string(), endpoint: self.endpoint(), after: self.request_timeout };
        timeout(self.request_timeout, work).await.map_err(late)?
    }

    async fn bytes(&self, call: Call) -> Result<Bytes, ClientError> {
        self.limited(&call, async { self.read(&call, self.send(&call).await?).await }).await
    }

    async fn json<T: DeserializeOwned>(&self, call: Call) -> Result<T, ClientError> {
        let name = call.to_string();
        let body = self.bytes(call).await?;
        serde_json::from_slice(&body).map_err(|e| ClientError::Unexpected {
            call: name,
            endpoint: self.endpoint(),
            what: format!("not the JSON that it should be: {e}"),
        })
    }

    async fn done(&self, call: Call) -> Result<(), ClientError> {
        self.bytes(call).await.map(drop)
    }

    fn broken(&self, call: &Call, e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Broken { call: call.to_string(), endpoint: self.endpoint(), source: io::Error::other(e) }
    }

    fn unexpected(&self, call: &Call, what: String) -> ClientError {
        ClientError::Unexpected { call: call.to_string(), endpoint: self.endpoint(), what }
    }
}

/// One request, as it goes out and as errors name it.
struct Call {
    method: Method,
    path: String,
    body: Option<Bytes>,
    upgrade: bool,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.method, self.path.split('?').next().unwrap_or_default())
    }
}

impl Call {
    fn new(method: Method, segments: &[&str]) -> Self {
        let mut path = String::from("/v1");
        for segment in segments {
            path.push('/');
            path.push_str(&percent(segment));
        }
        Self { method, path, body: None, upgrade: false }
    }
    fn get(segments: &[&str]) -> Self {
        Self::new(Method::GET, segments)
    }
    fn query(mut self, key: &str, value: Option<impl std::fmt::Display>) -> Self {
        if let Some(value) = value {
            self.path.push(if self.path.contains('?') { '&' } else { '?' });
            let _ = write!(self.path, "{key}={}", percent(&value.to_string()));
        }
        self
    }
    fn json(mut self, body: &impl Serialize) -> Self {
        self.body = Some(serde_json::to_vec(body).expect("the API's types have string keys only").into());
        self
    }
}

/// Percent-encodes everything but the unreserved characters (RFC 3986 section 2.3).
fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Which tasks to list; everything unset lists the live ones of the whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskFilter {
    /// Of this stack.
    pub stack: Option<String>,
    /// Of this service: id, prefix or name.
    pub service: Option<String>,
    /// On this node: id, prefix or name.
    pub node: Option<String>,
    /// Ended ones too.
    pub all: bool,
}

/// The calls of docs/api.md, in its order. A `reference` is an id, a unique prefix of one, or a name.
///
/// # Errors
/// Each fails with any [`ClientError`]; after `Timeout` and `Broken` a change may have happened.
impl Client {
    /// What the master says of itself and the cluster.
    pub async fn info(&self) -> Result<ClusterInfo, ClientError> {
        self.json(Call::get(&["info"])).await
    }
    /// All nodes.
    pub async fn nodes(&self) -> Result<Vec<Node>, ClientError> {
        self.json(Call::get(&["nodes"])).await
    }
    /// One node.
    pub async fn node(&self, reference: &str) -> Result<Node, ClientError> {
        self.json(Call::get(&["nodes", reference])).await
    }
    /// Changes labels or availability of a node.
    pub async fn node_update(&self, reference: &str, update: &NodeUpdate) -> Result<Node, ClientError> {
        self.json(Call::new(Method::PATCH, &["nodes", reference]).json(update)).await
    }
    /// Removes a node and refuses its identity from now on; one that is ready needs `force`.
    pub async fn node_remove(&self, reference: &str, force: bool) -> Result<(), ClientError> {
        self.done(Call::new(Method::DELETE, &["nodes", reference]).query("force", force.then_some(true))).await
    }
    /// All join tokens, without their secrets.
    pub async fn tokens(&self) -> Result<Vec<Token>, ClientError> {
        self.json(Call::get(&["tokens"])).await
    }
    /// Makes a join token.
    pub async fn token_create(&self, token: &TokenCreate) -> Result<TokenCreated, ClientError> {
        self.json(Call::new(Method::POST, &["tokens"]).json(token)).await
    }
    /// Takes a join token back.
    pub async fn token_revoke(&self, id: &str) -> Result<(), ClientError> {
        self.done(Call::new(Method::DELETE, &["tokens", id])).await
    }
    /// All networks.
    pub async fn networks(&self) -> Result<Vec<Network>, ClientError> {
        self.json(Call::get(&["networks"])).await
    }
    /// One network.
    pub async fn network(&self, reference: &str) -> Result<Network, ClientError> {
        self.json(Call::get(&["networks", reference])).await
    }
    /// Makes a network.
    pub async fn network_create(&self, spec: &NetworkSpec) -> Result<Network, ClientError> {
        self.json(Call::new(Method::POST, &["networks"]).json(spec)).await
    }
    /// Removes a network that nothing uses.
    pub async fn network_remove(&self, reference: &str) -> Result<(), ClientError> {
        self.done(Call::new(Method::DELETE, &["networks", reference])).await
    }
    /// All services, or those of a stack.
    pub async fn services(&self, stack: Option<&str>) -> Result<Vec<Service>, ClientError> {
        self.json(Call::get(&["services"]).query("stack", stack)).await
    }
    /// One service.
    pub async fn service(&self, reference: &str) -> Result<Service, ClientError> {
        self.json(Call::get(&["services", reference])).await
    }
    /// Removes a service and its tasks.
    pub async fn service_remove(&self, reference: &str) -> Result<(), ClientError> {
        self.done(Call::new(Method::DELETE, &["services", reference])).await
    }
    /// Tasks.
    pub async fn tasks(&self, filter: &TaskFilter) -> Result<Vec<Task>, ClientError> {
        let call = Call::get(&["tasks"])
            .query("stack", filter.stack.as_ref())
            .query("service", filter.service.as_ref())
            .query("node", filter.node.as_ref())
            .query("all", filter.all.then_some(true));
        self.json(call).await
    }
    /// One task.
    pub async fn task(&self, reference: &str) -> Result<Task, ClientError> {
        self.json(Call::get(&["tasks", reference])).await
    }
    /// Makes and starts a container task.
    pub async fn container_create(&self, create: &ContainerCreate) -> Result<Task, ClientError> {
        self.json(Call::new(Method::POST, &["containers"]).json(create)).await
    }
    /// Stops a container task; it stays and can be started again.
    pub async fn task_stop(&self, reference: &str) -> Result<Task, ClientError> {
        self.json(Call::new(Method::POST, &["tasks", reference, "stop"])).await
    }
    /// Starts a container task again.
    pub async fn task_start(&self, reference: &str) -> Result<Task, ClientError> {
        self.json(Call::new(Method::POST, &["tasks", reference, "start"])).await
    }
    /// Removes a container task; one that runs needs `force`.
    pub async fn task_remove(&self, reference: &str, force: bool) -> Result<(), ClientError> {
        self.done(Call::new(Method::DELETE, &["tasks", reference]).query("force", force.then_some(true))).await
    }
    /// All named volumes.
    pub async fn volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.json(Call::get(&["volumes"])).await
    }
    /// Names of all stacks.
    pub async fn stacks(&self) -> Result<Vec<String>, ClientError> {
        self.json(Call::get(&["stacks"])).await
    }
    /// Applies a stack, or plans it only.
    pub async fn stack_apply(&self, apply: &StackApply) -> Result<StackPlan, ClientError> {
        self.json(Call::new(Method::PUT, &["stacks", &apply.stack.name]).json(apply)).await
    }
    /// Removes a stack, or plans it only.
    pub async fn stack_remove(&self, name: &str, volumes: bool, dry_run: bool) -> Result<StackPlan, ClientError> {
        let call = Call::new(Method::DELETE, &["stacks", name])
            .query("volumes", volumes.then_some(true))
            .query("dry_run", dry_run.then_some(true));
        self.json(call).await
    }
    /// Why a task or service is where it is.
    pub async fn explain(&self, reference: &str, query: &ExplainQuery) -> Result<Explanation, ClientError> {
        let call = Call::get(&["explain", reference])
            .query("nodes", query.nodes.then_some(true))
            .query("node", query.node.as_deref());
        self.json(call).await
    }
    /// What would happen if; nothing is changed.
    pub async fn what_if(&self, question: &WhatIf) -> Result<WhatIfAnswer, ClientError> {
        self.json(Call::new(Method::POST, &["what-if"]).json(question)).await
    }
    /// Invariants of the cluster's state that are broken, a sentence each.
    pub async fn check(&self) -> Result<Vec<String>, ClientError> {
        self.json(Call::get(&["check"])).await
    }
    /// Changes as they happen, after revision `from` or from now on.
    pub async fn events(&self, from: Option<u64>) -> Result<EventStream, ClientError> {
        let call = Call::get(&["events"]).query("from", from);
        let response = self.limited(&call, self.send(&call)).await?;
        Ok(EventStream { body: response.into_body(), decoder: SseDecoder::default(), client: self.clone(), call })
    }
    /// Log lines of a task.
    pub async fn logs(&self, reference: &str, options: &LogOptions) -> Result<FrameStream, ClientError> {
        let call = Call::get(&["tasks", reference, "logs"])
            .query("follow", options.follow.then_some(true))
            .query("tail", options.tail)
            .query("since_unix_s", (options.since_unix_s != 0).then_some(options.since_unix_s))
            .query("timestamps", options.timestamps.then_some(true));
        let response = self.limited(&call, self.send(&call)).await?;
        Ok(FrameStream { body: response.into_body(), decoder: Decoder::new(), client: self.clone(), call })
    }
    /// Runs a process in a task's container.
    pub async fn exec(&self, reference: &str, options: &ExecOptions) -> Result<(ExecReader, ExecWriter), ClientError> {
        let mut call = Call::new(Method::POST, &["tasks", reference, "exec"]).json(options);
        call.upgrade = true;
        let upgraded = self
            .limited(&call, async {
                let response = self.send(&call).await?;
                if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                    return Err(self.unexpected(&call, format!("status {} instead of 101", response.status())));
                }
                hyper::upgrade::on(response).await.map_err(|e| self.broken(&call, e))
            })
            .await?;
        let (read, write) = tokio::io::split(TokioIo::new(upgraded));
        let (client, name) = (self.clone(), call.to_string());
        Ok((
            ExecReader { read, decoder: Decoder::new(), client, call },
            ExecWriter { write, call: name, endpoint: self.endpoint() },
        ))
    }
    /// Issues a client certificate.
    pub async fn cert_issue(&self, request: &CertRequest) -> Result<CertBundle, ClientError> {
        self.json(Call::new(Method::POST, &["certs"]).json(request)).await
    }
    /// The store's backup.
    pub async fn backup(&self) -> Result<Bytes, ClientError> {
        self.bytes(Call::get(&["backup"])).await
    }
}

/// Name of the event that says: the reader was too slow and events are missing.
const MISSED: &str = "missed";

/// An event of a server-sent event stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SseEvent {
    /// Its name; empty when it has none.
    pub name: String,
    /// Its data, lines joined.
    pub data: String,
}

/// Splits a server-sent event stream (WHATWG HTML, section 9.2.6) into its events. Comments (`:`), which keep the
/// connection alive, and fields other than `event` and `data` are skipped.
#[derive(Debug, Default)]
pub struct SseDecoder {
    line: Vec<u8>,
    event: SseEvent,
    ready: VecDeque<SseEvent>,
}

impl SseDecoder {
    /// Adds bytes as they came; whole events can be taken with [`Self::next_event`] then.
    ///
    /// # Errors
    /// An event is longer than [`EVENT_BYTES_MAX`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.len() + self.event.data.len() > EVENT_BYTES_MAX {
                return Err(format!("an event is longer than {EVENT_BYTES_MAX} bytes"));
            }
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.end_of_line(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']));
            }
        }
        Ok(())
    }

    fn end_of_line(&mut self, line: &str) {
        let value = |rest: &str| rest.strip_prefix(' ').unwrap_or(rest).to_owned();
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            if !event.data.is_empty() {
                self.ready.push_back(event);
            }
        } else if let Some(data) = line.strip_prefix("data:") {
            if !self.event.data.is_empty() {
                self.event.data.push('\n');
            }
            self.event.data.push_str(&value(data));
        } else if let Some(name) = line.strip_prefix("event:") {
            self.event.name = value(name);
        }
    }

    /// The next whole event.
    pub fn next_event(&mut self) -> Option<SseEvent> {
        self.ready.pop_front()
    }
}

/// Changes as they happen.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    decoder: SseDecoder,
    client: Client,
    call: Call,
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Call({self})")
    }
}

/// The next piece of a body; `None` at its end.
async fn next_piece(body: &mut Incoming) -> Result<Option<Bytes>, hyper::Error> {
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

impl EventStream {
    /// The next change; `None` when the master ended the stream, or this reader was so slow that changes are missing:
    /// open a new one and list anew then. Cancel safe: what was read is kept.
    ///
    /// # Errors
    /// The connection broke, or an event cannot be read.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(SseEvent { name, data }) = self.decoder.next_event() {
                if name == MISSED {
                    return Ok(None);
                }
                let bad = |e| self.client.unexpected(&self.call, format!("an event is not one: {e}"));
                return serde_json::from_str(&data).map(Some).map_err(bad);
            }
            let Some(piece) = next_piece(&mut self.body).await.map_err(|e| self.client.broken(&self.call, e))? else {
                return Ok(None);
            };
            self.decoder.push(&piece).map_err(|what| self.client.unexpected(&self.call, what))?;
        }
    }
}

fn bad_frame(client: &Client, call: &Call, e: &FrameError) -> ClientError {
    client.unexpected(call, e.to_string())
}

/// Log frames of one task.
#[derive(Debug)]
pub struct FrameStream {
    body: Incoming,
    decoder: Decoder,
    client: Client,
    call: Call,
}

impl FrameStream {
    /// The next frame; `None` at the end. Cancel safe: what was read is kept.
    ///
    /// # Errors
    /// The connection broke, also in the middle of a frame, or the bytes are no frames.
    pub async fn next(&mut self) -> Result<Option<Frame>, ClientError> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(|e| bad_frame(&self.client, &self.call, &e))? {
                return Ok(Some(frame));
            }
            match next_piece(&mut self.body).await.map_err(|e| self.client.broken(&self.call, e))? {
                Some(piece) => self.decoder.push(&piece),
                None if self.decoder.is_partial() => {
                    return Err(self.client.broken(&self.call, "it ended in the middle of a frame"));
                }
                None => return Ok(None),
            }
        }
    }
}

/// What a process says: [`Frame::Stdout`], [`Frame::Stderr`], at last [`Frame::Exit`] or [`Frame::Failure`].
#[derive(Debug)]
pub struct ExecReader {
    read: ReadHalf<TokioIo<hyper::upgrade::Upgraded>>,
    decoder: Decoder,
    client: Client,
    call: Call,
}

/// Bytes read from an exec stream at a time.
const EXEC_READ_BYTES: usize = 32 << 10;

impl ExecReader {
    /// The next frame; `None` at the end of the stream. Cancel safe: what was read is kept.
    ///
    /// # Errors
    /// The connection broke or the bytes are no frames.
    pub async fn next(&mut self) -> Result<Option<Frame>, ClientError> {
        let mut buffer = vec![0; EXEC_READ_BYTES];
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(|e| bad_frame(&self.client, &self.call, &e))? {
                return Ok(Some(frame));
            }
            match self.read.read(&mut buffer).await.map_err(|e| self.client.broken(&self.call, e))? {
                0 if self.decoder.is_partial() => {
                    return Err(self.client.broken(&self.call, "it ended in the middle of a frame"));
                }
                0 => return Ok(None),
                n => self.decoder.push(&buffer[..n]),
            }
        }
    }
}

/// What a process is told: [`Frame::Stdin`], [`Frame::StdinEnd`], [`Frame::Resize`].
#[derive(Debug)]
pub struct ExecWriter {
    write: WriteHalf<TokioIo<hyper::upgrade::Upgraded>>,
    call: String,
    endpoint: String,
}

impl ExecWriter {
    /// Sends a frame. Not cancel safe: a frame that was cut off ruins the stream.
    ///
    /// # Errors
    /// [`ClientError::Broken`].
    pub async fn send(&mut self, frame: &Frame) -> Result<(), ClientError> {
        let mut bytes = Vec::new();
        encode(frame, &mut bytes);
        let sent = async {
            self.write.write_all(&bytes).await?;
            self.write.flush().await
        };
        sent.await.map_err(|source| ClientError::Broken {
            call: self.call.clone(),
            endpoint: self.endpoint.clone(),
            source,
        })
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;

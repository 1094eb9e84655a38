//! The agent protocol's server: joining, certificates, sessions and streams.
//!
//! Each call takes its identity from the connection ([`ConnInfo`]) and checks it against the state: a removed node's
//! certificate is refused from the moment of its removal, however long it would be valid.

#[cfg(test)]
mod fuzz;

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::Map};
use master_core::{Command, Reply, liveness::HEARTBEAT_MS};
use skein_api::{AGENT_PROTOCOL, ApiError, NodeDescription, NodeId, Origin, TaskReport, UnixMillis, grpc};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    broker::Broker,
    cluster::{self, Handle, SessionItem, SessionOpen, SessionTx},
    pki::{self, Ca, Identity},
    server::ConnInfo,
};

/// Messages on their way to an agent. Assignments are computed when there is room, so a slow agent costs one message.
const SESSION_QUEUE: usize = 64;

/// Ids in answers to reports that wait for room in an agent's queue: half a megabyte. Above it the agent is not read any
/// more, its heartbeats neither.
const ANSWERS_MAX: usize = 16_384;

/// What the agent service works with.
pub struct Agents {
    /// The loop.
    pub cluster: Handle,
    /// Signs certificates.
    pub ca: Arc<Ca>,
    /// Streams that were asked for.
    pub broker: Broker,
    /// Where session readers run.
    pub tasks: TaskTracker,
}

/// A refusal as gRPC carries it: the code in the message's front, so that agents and people both can read it.
fn status(error: ApiError) -> Status {
    let hint = error.hint.map(|h| format!("; hint: {h}")).unwrap_or_default();
    let text = format!("[{}] {}{hint}", error.code, error.message);
    match error.code.as_str() {
        "read_only" | "not_stored" | "shutting_down" => Status::unavailable(text),
        "removed" | "token_unknown" | "token_expired" | "token_used_up" | "token_foreign" => {
            Status::permission_denied(text)
        }
        _ => Status::invalid_argument(text),
    }
}

fn bad(message: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("[bad_request] {message}"))
}

fn conn<T>(request: &Request<T>) -> ConnInfo {
    request.extensions().get::<ConnInfo>().cloned().expect("the server puts it into every request")
}

impl Agents {
    /// The calling node, if it still belongs to the cluster.
    async fn node<T>(&self, request: &Request<T>) -> Result<(NodeId, ConnInfo), Status> {
        let conn = conn(request);
        let Identity::Node { id, key_digest } = conn.identity.clone() else {
            return Err(Status::unauthenticated("[not_a_node] this call needs a node's certificate"));
        };
        let id = NodeId::new(id);
        let asked = id.clone();
        let known = self.cluster.query(move |core| core.model().nodes.get(&asked).map(|n| n.key_digest == key_digest));
        match known.await.map_err(status)? {
            Some(true) => Ok((id, conn)),
            Some(false) => Err(Status::unauthenticated("[wrong_key] the certificate's key is not the node's")),
            None => Err(removed(&id)),
        }
    }

    fn certificate(&self, csr_der: &[u8], node: &NodeId) -> Result<Response<grpc::JoinResponse>, Status> {
        let certificate_pem = self.ca.sign_node(csr_der, node.as_str()).map_err(bad)?;
        Ok(Response::new(grpc::JoinResponse {
            node_id: node.to_string(),
            certificate_pem,
            ca_pem: self.ca.certificate_pem().to_owned(),
        }))
    }
}

fn removed(node: &NodeId) -> Status {
    status(
        ApiError::new("removed", format!("node {} was removed from the cluster", node.short()))
            .with_hint("skein-agent leave, then join again with a new token"),
    )
}

#[tonic::async_trait]
impl grpc::agent_server::Agent for Agents {
    async fn join(&self, request: Request<grpc::JoinRequest>) -> Result<Response<grpc::JoinResponse>, Status> {
        let request = request.into_inner();
        let (token, secret_sha256) = pki::parse_token(&request.token, &self.ca.digest()).map_err(status)?;
        let key_digest = pki::csr_key_digest(&request.csr_der).map_err(bad)?;
        let description: NodeDescription = serde_json::from_slice(&request.description_json).map_err(bad)?;
        let origin = Origin { who: format!("host:{}", description.hostname), why: "join".into() };
        let command = Command::Join {
            token,
            secret_sha256,
            key_digest,
            description: Box::new(description),
            clock: UnixMillis(request.clock_unix_ms),
        };
        let Reply::Node(node) = self.cluster.command(command, origin).await.map_err(status)? else {
            return Err(Status::internal("a join answers with a node"));
        };
        tracing::info!(%node, "node joined");
        self.certificate(&request.csr_der, &node)
    }

    async fn recover(&self, request: Request<grpc::RecoverRequest>) -> Result<Response<grpc::JoinResponse>, Status> {
        let request = request.into_inner();
        master_core::check_clock(UnixMillis(request.clock_unix_ms), cluster::wall_now()).map_err(status)?;
        let node = NodeId::new(request.node_id);
        // The request's signature is checked with its digest: whoever sends it holds the key. A replayed request gives a
        // certificate for that same key, which is of no use without it.
        let key_digest = pki::csr_key_digest(&request.csr_der).map_err(bad)?;
        let asked = node.clone();
        let known = self.cluster.query(move |core| core.model().nodes.get(&asked).map(|n| n.key_digest.clone()));
        match known.await.map_err(status)? {
            Some(digest) if digest == key_digest => self.certificate(&request.csr_der, &node),
            Some(_) => Err(Status::permission_denied("[wrong_key] the key is not the one that joined")),
            None => Err(removed(&node)),
        }
    }

    async fn renew(&self, request: Request<grpc::RenewRequest>) -> Result<Response<grpc::JoinResponse>, Status> {
        let (node, conn) = self.node(&request).await?;
        let request = request.into_inner();
        let digest = pki::csr_key_digest(&request.csr_der).map_err(bad)?;
        if !matches!(&conn.identity, Identity::Node { key_digest, .. } if *key_digest == digest) {
            return Err(Status::permission_denied("[wrong_key] a renewal keeps the node's key"));
        }
        self.certificate(&request.csr_der, &node)
    }

    type SessionStream = Map<ReceiverStream<Box<SessionItem>>, fn(Box<SessionItem>) -> SessionItem>;

    async fn session(
        &self,
        request: Request<Streaming<grpc::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (node, conn) = self.node(&request).await?;
        let mut messages = request.into_inner();
        let Some(first) = messages.message().await? else { return Err(bad("the session ended before its hello")) };
        let Some(grpc::agent_message::Body::Hello(hello)) = first.body else {
            return Err(bad("the first message of a session is hello"));
        };
        if hello.protocol == 0 || hello.protocol > AGENT_PROTOCOL {
            return Err(Status::failed_precondition(format!(
                "[protocol] the agent speaks protocol {}, this master up to {AGENT_PROTOCOL}; hint: upgrade the master first",
                hello.protocol
            )));
        }
        master_core::check_clock(UnixMillis(hello.clock_unix_ms), cluster::wall_now()).map_err(status)?;
        let described = describe(&self.cluster, &node, &hello.description_json).await?;
        let (tx, rx) = mpsc::channel(SESSION_QUEUE);
        let session = SessionOpen {
            node: node.clone(),
            tx: tx.clone(),
            cancel: conn.cancel.clone(),
            chain: hello.chain,
            generation: hello.generation,
        };
        let number = self.cluster.session_open(session).await.map_err(status)?;
        let undescribed = (!described).then_some(hello.description_json);
        let (reported, refused) = (Vec::new(), Vec::new());
        let reader = Reader { cluster: self.cluster.clone(), node, number, tx, reported, refused, undescribed };
        // Ends with the connection: `messages` fails when it is cut.
        self.tasks.spawn(reader.run(messages));
        Ok(Response::new(ReceiverStream::new(rx).map(|item| *item)))
    }

    type StreamStream = ReceiverStream<Result<grpc::StreamFrame, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<grpc::StreamFrame>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let (node, _) = self.node(&request).await?;
        let mut frames = request.into_inner();
        let Some(grpc::StreamFrame { body: Some(grpc::stream_frame::Body::StreamId(id)) }) = frames.message().await?
        else {
            return Err(bad("the first frame of a stream is its id"));
        };
        match self.broker.opened(&node, &id, frames) {
            Some(from_user) => Ok(Response::new(ReceiverStream::new(from_user))),
            None => Err(Status::not_found("[not_found] nobody waits for this stream")),
        }
    }
}

/// Longest text of an agent that is kept. An engine's error may quote whole files.
const TEXT_BYTES_MAX: usize = 4 << 10;

fn shorten(text: &mut String) {
    if text.len() > TEXT_BYTES_MAX {
        let end = (0..=TEXT_BYTES_MAX).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
}

/// Whether the store did not take a change that is right in itself.
fn is_passing(error: &ApiError) -> bool {
    error.code == "read_only" || error.code == "not_stored"
}

/// Takes in what a host says of itself; false when that could not be made durable.
async fn describe(cluster: &Handle, node: &NodeId, json: &[u8]) -> Result<bool, Status> {
    let description = Box::new(serde_json::from_slice(json).map_err(bad)?);
    let origin = Origin { who: format!("node:{node}"), why: "host description".into() };
    match cluster.command(Command::Describe { node: node.clone(), description }, origin).await {
        Ok(_) => Ok(true),
        Err(error) if is_passing(&error) => Ok(false),
        Err(error) => Err(status(error)),
    }
}

/// Reads one agent's session.
struct Reader {
    cluster: Handle,
    node: NodeId,
    number: u64,
    tx: SessionTx,
    /// Tasks whose reports are durable, as often as they are; the agent has not been told.
    reported: Vec<String>,
    /// Tasks whose reports could not be made durable; the agent has not been told.
    refused: Vec<String>,
    /// A description that could not be made durable: tried again with each heartbeat.
    undescribed: Option<Vec<u8>>,
}

impl Reader {
    async fn run(mut self, mut messages: Streaming<grpc::AgentMessage>) {
        loop {
            match messages.message().await {
                Ok(Some(message)) => {
                    if let Err(error) = self.handled(message).await {
                        tracing::warn!(node = %self.node, %error, "session message refused");
                        // The agent sees why, then the end; one that reads nothing sees only the end.
                        let _ = self.tx.try_send(Box::new(Err(error)));
                        break;
                    }
                    self.answer().await;
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(node = %self.node, %error, "session broke");
                    break;
                }
            }
        }
        self.cluster.session_closed(self.node, self.number).await;
    }

    async fn describe(&mut self, json: Vec<u8>) -> Result<(), Status> {
        let described = describe(&self.cluster, &self.node, &json).await?;
        self.undescribed = (!described).then_some(json);
        Ok(())
    }

    /// Sends the answers that wait, if there is room. An agent whose kernel hangs reads nothing for as long, and lives: its
    /// heartbeats are to be heard meanwhile.
    async fn answer(&mut self) {
        use grpc::master_message::Body;
        let wrap: [fn(grpc::Reported) -> Body; 2] = [Body::Reported, Body::Refused];
        let full = self.reported.len() + self.refused.len() >= ANSWERS_MAX;
        // The agent counts answers, so which of the two comes first is the same to it.
        for (waiting, wrap) in [&mut self.reported, &mut self.refused].into_iter().zip(wrap) {
            if waiting.is_empty() {
                continue;
            }
            let permit = if full { self.tx.reserve().await.ok() } else { self.tx.try_reserve().ok() };
            let Some(permit) = permit else { return };
            let body = wrap(grpc::Reported { task_ids: std::mem::take(waiting) });
            permit.send(Box::new(Ok(grpc::MasterMessage { body: Some(body) })));
        }
    }

    async fn handle(&mut self, message: grpc::AgentMessage) -> Result<(), Status> {
        use grpc::agent_message::Body;
        let node = self.node.clone();
        match message.body {
            Some(Body::Heartbeat(heartbeat)) => {
                self.cluster.heartbeat(node, self.number, heartbeat.seq, &self.tx);
                if let Some(json) = self.undescribed.take() {
                    self.describe(json).await?;
                }
            }
            Some(Body::Ack(ack)) => self.cluster.acked(node, ack.chain, ack.generation).await,
            Some(Body::DescriptionJson(json)) => self.describe(json).await?,
            Some(Body::ReportsJson(json)) => self.reports(node, &json).await?,
            Some(Body::Hello(_)) => return Err(bad("a session has one hello")),
            // A newer agent's message: it knows from the protocol version that this master may pass it over.
            None => {}
        }
        Ok(())
    }

    /// Handles a message. While it waits for the loop nothing more is read, heartbeats neither: it is not the agent that is
    /// silent then, so its heartbeats are counted for it.
    async fn handled(&mut self, message: grpc::AgentMessage) -> Result<(), Status> {
        let (cluster, node, number, tx) = (self.cluster.clone(), self.node.clone(), self.number, self.tx.clone());
        let mut handling = std::pin::pin!(self.handle(message));
        loop {
            let period = Duration::from_millis(HEARTBEAT_MS);
            // Cancel-safe: `handling` is polled in place, a timer that is dropped is made anew.
            tokio::select! {
                biased;
                handled = &mut handling => return handled,
                () = tokio::time::sleep(period) => cluster.heartbeat(node.clone(), number, 0, &tx),
            }
        }
    }

    async fn reports(&mut self, node: NodeId, json: &[u8]) -> Result<(), Status> {
        let mut reports: Vec<TaskReport> = serde_json::from_slice(json).map_err(bad)?;
        for status in reports.iter_mut().map(|r| &mut r.status) {
            shorten(&mut status.message);
            status.err.as_mut().map(shorten);
        }
        let task_ids: Vec<String> = reports.iter().map(|r| r.task.to_string()).collect();
        let origin = Origin { who: format!("node:{node}"), why: "task report".into() };
        match self.cluster.command(cluster::reports(node, reports), origin).await {
            Ok(_) => self.reported.extend(task_ids),
            // Not durable: the agent keeps them, and sends them again in this session.
            Err(error) if is_passing(&error) => self.refused.extend(task_ids),
            Err(error) => return Err(status(error)),
        }
        Ok(())
    }
}

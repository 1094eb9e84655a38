//! Brings together the user who asked for a stream and the agent that opens it.
//!
//! The user's request waits here under a random name; the agent's `Stream` call brings that name. What then flows,
//! flows between the two directly, with HTTP/2's flow control behind it: nothing is kept here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use skein_api::{ApiError, NodeId, StreamRequest, grpc};
use tokio::sync::{mpsc, oneshot};

use crate::{cluster::Handle, pki};

/// How long an agent may take to open a stream. It has a connection already; a round trip and a container lookup.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Frames on their way to an agent: keystrokes and pasted text of at most 64 KiB each.
const TO_AGENT: usize = 16;

/// Both directions of an open stream.
pub struct AgentStream {
    /// From the agent.
    pub frames: tonic::Streaming<grpc::StreamFrame>,
    /// To the agent; closing it ends the stream.
    pub to_agent: mpsc::Sender<Result<grpc::StreamFrame, tonic::Status>>,
}

struct Waiting {
    node: NodeId,
    ready: oneshot::Sender<AgentStream>,
}

/// Streams that were asked for and are not open yet.
#[derive(Clone, Default)]
pub struct Broker(Arc<Mutex<HashMap<String, Waiting>>>);

impl Broker {
    /// Asks `node` for a stream and waits until it opened it.
    ///
    /// # Errors
    /// `node_unreachable`.
    pub async fn open(&self, cluster: &Handle, node: NodeId, request: &StreamRequest) -> Result<AgentStream, ApiError> {
        let stream_id = pki::random_hex(16);
        let (ready, opened) = oneshot::channel();
        self.waiting().insert(stream_id.clone(), Waiting { node: node.clone(), ready });
        let request_json = serde_json::to_vec(request).expect("a request is JSON");
        let asked = cluster.open_stream(node.clone(), grpc::OpenStream { stream_id: stream_id.clone(), request_json });
        let result = match asked.await {
            Ok(()) => tokio::time::timeout(OPEN_WITHIN, opened).await.ok().and_then(Result::ok).ok_or_else(|| {
                let message =
                    format!("node {} did not open the stream within {} s", node.short(), OPEN_WITHIN.as_secs());
                ApiError::new("node_unreachable", message)
            }),
            Err(error) => Err(error),
        };
        self.waiting().remove(&stream_id);
        result
    }

    /// The agent of `node` opened the stream of that name; the frames for it come out of the receiver.
    pub fn opened(
        &self,
        node: &NodeId,
        stream_id: &str,
        frames: tonic::Streaming<grpc::StreamFrame>,
    ) -> Option<mpsc::Receiver<Result<grpc::StreamFrame, tonic::Status>>> {
        let mut waiting = self.waiting();
        // Names are secret and random, and still: a node gets no stream that another was asked for.
        if waiting.get(stream_id).is_none_or(|w| w.node != *node) {
            return None;
        }
        let entry = waiting.remove(stream_id)?;
        let (to_agent, from_user) = mpsc::channel(TO_AGENT);
        entry.ready.send(AgentStream { frames, to_agent }).ok()?;
        Some(from_user)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<String, Waiting>> {
        self.0.lock().expect("nobody panics while holding this lock")
    }
}

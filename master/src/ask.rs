//! Questions to the network sides of agents: typed JSON over a stream, bounded in size and time.
//!
//! Owns: how long and how much. Must not know: what questions mean. An answer is collected in its asker's task; the
//! agent opens a stream for it as for logs ([`crate::broker`]). No tasks and channels of its own.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use serde::de::DeserializeOwned;
use skein_api::{
    ApiError, HostAnswer, NET_ANSWER_BYTES_MAX, NetQuestion, NodeId, StreamRequest, grpc::stream_frame::Body,
};

use crate::{
    broker::{AgentStream, Broker},
    cluster::Handle,
};

/// How long an answer may take once its stream is open: the agent's own limit of 15 s and some for the way.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Agents that are asked at a time: with answers of some kilobytes each, and one message on each connection.
const ASKED_MAX: usize = 64;

/// Who asks: the loop, and what brings streams together.
#[derive(Clone)]
pub struct Asker {
    /// The loop.
    pub cluster: Handle,
    /// Streams.
    pub broker: Broker,
}

/// A host to ask.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
}

impl Asked {
    /// What it said, or why it said nothing.
    pub fn answered<T>(self, answer: Result<T, ApiError>) -> HostAnswer<T> {
        let (answer, error) = match answer {
            Ok(answer) => (Some(answer), None),
            Err(error) => (None, Some(error.message)),
        };
        let Self { node, name } = self;
        HostAnswer { node, name, generation_sent: 0, generation_acked: 0, waiting: false, answer, error }
    }

    fn refused(&self, why: &str) -> ApiError {
        ApiError::new("not_answered", format!("node {}: {why}", self.name))
    }

    fn read<T: DeserializeOwned>(&self, json: &[u8]) -> Result<T, ApiError> {
        serde_json::from_slice(json).map_err(|e| self.refused(&format!("the answer cannot be read: {e}")))
    }
}

impl Asker {
    /// Asks one agent.
    ///
    /// # Errors
    /// `node_unreachable`: no session, or no answer in time. `not_answered`: what the agent said instead.
    pub async fn ask<T: DeserializeOwned>(&self, asked: &Asked, question: &NetQuestion) -> Result<T, ApiError> {
        let mut open = self.stream(asked, question).await?;
        let refused = |why: String| asked.refused(&why);
        let collect = async {
            let mut json = Vec::new();
            loop {
                let frame = open.frames.message().await.map_err(|status| refused(status.message().to_owned()))?;
                match frame.and_then(|frame| frame.body) {
                    Some(Body::Stdout(part)) if json.len() + part.len() <= NET_ANSWER_BYTES_MAX => json.extend(part),
                    Some(Body::Stdout(_)) => return Err(refused("the answer is too long".to_owned())),
                    Some(Body::Exit(_)) => return Ok(json),
                    Some(Body::Error(why)) => return Err(refused(why)),
                    Some(_) => {}
                    None => return Err(refused("the answer broke off".to_owned())),
                }
            }
        };
        let late = |_| {
            let seconds = ANSWER_WITHIN.as_secs();
            ApiError::new("node_unreachable", format!("node {} gave no answer within {seconds} s", asked.name))
        };
        let json = tokio::time::timeout(ANSWER_WITHIN, collect).await.map_err(late)??;
        asked.read(&json)
    }

    /// Asks one agent for something that lasts as long as the stream that comes with the answer. The answer is one frame.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub async fn open<T: DeserializeOwned>(
        &self,
        asked: &Asked,
        question: &NetQuestion,
    ) -> Result<(T, AgentStream), ApiError> {
        let mut open = self.stream(asked, question).await?;
        let refused = |why: String| asked.refused(&why);
        let first = tokio::time::timeout(ANSWER_WITHIN, open.frames.message()).await;
        let first = first.map_err(|_| refused("no answer in time".to_owned()))?;
        let json = match first.map_err(|status| refused(status.message().to_owned()))?.and_then(|frame| frame.body) {
            Some(Body::Stdout(json)) => json,
            Some(Body::Error(why)) => return Err(refused(why)),
            _ => return Err(refused("the answer broke off".to_owned())),
        };
        Ok((asked.read(&json)?, open))
    }

    async fn stream(&self, asked: &Asked, question: &NetQuestion) -> Result<AgentStream, ApiError> {
        let request = StreamRequest::Net { question: question.clone() };
        self.broker.open(&self.cluster, asked.node.clone(), &request).await
    }

    /// Asks several agents the same, beside each other. The answers come in the order of `asked`.
    pub async fn ask_all<T: DeserializeOwned>(&self, asked: Vec<Asked>, question: &NetQuestion) -> Vec<HostAnswer<T>> {
        let one = |asked: Asked| async move {
            let node = asked.node.clone();
            let progress = self.cluster.query(move |core| core.dispatch_progress(&node)).await.unwrap_or_default();
            let answer = self.ask(&asked, question).await;
            HostAnswer {
                generation_sent: progress.sent,
                generation_acked: progress.acked,
                waiting: progress.waiting,
                ..asked.answered(answer)
            }
        };
        stream::iter(asked).map(one).buffered(ASKED_MAX).collect().await
    }
}

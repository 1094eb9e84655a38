//! Agents and masters of different versions side by side.

use std::{pin::Pin, rc::Rc, time::Duration};

use axum::Router;
use futures_util::{Stream, StreamExt as _, stream};
use prost::Message as _;
use skein_api::{
    AGENT_PROTOCOL,
    grpc::{self, agent_server::Agent},
};
use skein_master::agents::Agents;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    agent::{self, AgentHost},
    world::{CONVERGES_WITHIN, scenario},
};

/// A message of a kind that is not known here yet is one without content: what both sides pass over below.
#[test]
fn an_unknown_kind_is_an_empty_message() {
    // Field 31, two bytes: a message whose first field is 1.
    let newer = [0xfa, 0x01, 0x02, 0x08, 0x01];
    assert_eq!(grpc::AgentMessage::decode(&newer[..]), Ok(grpc::AgentMessage { body: None }));
    assert_eq!(grpc::MasterMessage::decode(&newer[..]), Ok(grpc::MasterMessage { body: None }));
}

/// An agent of that protocol version, which puts a message of an unknown kind before each heartbeat.
async fn other_version(host: Rc<AgentHost>, protocol: u32) -> turmoil::Result {
    loop {
        let mut client = agent::connect(&host).await?;
        let (tx, rx) = mpsc::channel(4);
        tx.send(agent::hello(&host, protocol)).await?;
        match client.session(ReceiverStream::new(rx)).await {
            Ok(inbound) => {
                let mut inbound = inbound.into_inner();
                for seq in 1.. {
                    tx.send(grpc::AgentMessage { body: None }).await?;
                    let body = grpc::agent_message::Body::Heartbeat(grpc::Heartbeat { seq });
                    tx.send(grpc::AgentMessage { body: Some(body) }).await?;
                    let acknowledged = |m: &grpc::MasterMessage| matches!(&m.body, Some(grpc::master_message::Body::HeartbeatAck(ack)) if ack.seq == seq);
                    while !inbound.message().await?.is_some_and(|m| acknowledged(&m)) {}
                    tracing::info!(protocol, "heartbeat acknowledged");
                    tokio::time::sleep(Duration::from_secs(4)).await;
                }
            }
            Err(refusal) => {
                assert_eq!(refusal.code(), Code::FailedPrecondition, "{refusal}");
                tracing::info!(protocol, reason = refusal.message(), "version refused");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// What a master speaks it serves, unknown kinds and all; what it does not speak it refuses in words; the agents beside
/// notice nothing.
#[test]
fn versions_live_side_by_side() {
    scenario(4, |world| {
        world.one_each();
        world.converges(CONVERGES_WITHIN);
        let versions = [0, AGENT_PROTOCOL, AGENT_PROTOCOL + 1];
        for (number, protocol) in (1..).zip(versions) {
            world.kill_agent(number);
            world.agent(number).instead.replace(Some(Rc::new(move |host| Box::pin(other_version(host, protocol)))));
            world.start_agent(number);
        }
        world.pass(Duration::from_secs(20));
        world.pass_while("those that are served are ready", Duration::from_secs(20), |w| w.are_ready([2, 4]));
        assert!(world.said(&["heartbeat acknowledged"]) >= 8, "a session of a known version goes on");
        assert!(!world.are_ready([1]) && !world.are_ready([3]), "who is refused is not heard of");
        let newer = format!("[protocol] the agent speaks protocol {}", AGENT_PROTOCOL + 1);
        assert!(world.said(&["version refused", &newer, "hint: upgrade the master first"]) >= 10);
        for number in 1..=versions.len() {
            world.kill_agent(number);
            world.agent(number).instead.replace(None);
            world.start_agent(number);
        }
        world.converges(CONVERGES_WITHIN);
    });
}

/// A newer master: it puts a message of an unknown kind before each one that is known.
pub(crate) struct Newer(Agents);

/// The agent protocol of a newer master.
pub(crate) fn newer(agents: Agents) -> Router {
    let service = grpc::agent_server::AgentServer::new(Newer(agents));
    tonic::service::Routes::new(service).prepare().into_axum_router()
}

#[tonic::async_trait]
impl Agent for Newer {
    async fn join(&self, request: Request<grpc::JoinRequest>) -> Result<Response<grpc::JoinResponse>, Status> {
        self.0.join(request).await
    }

    async fn recover(&self, request: Request<grpc::RecoverRequest>) -> Result<Response<grpc::JoinResponse>, Status> {
        self.0.recover(request).await
    }

    async fn renew(&self, request: Request<grpc::RenewRequest>) -> Result<Response<grpc::JoinResponse>, Status> {
        self.0.renew(request).await
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<grpc::MasterMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<grpc::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let messages = self.0.session(request).await?.into_inner();
        let unknown = || Ok(grpc::MasterMessage { body: None });
        Ok(Response::new(Box::pin(messages.flat_map(move |known| stream::iter([unknown(), known])))))
    }

    type StreamStream = <Agents as Agent>::StreamStream;

    async fn stream(
        &self,
        request: Request<Streaming<grpc::StreamFrame>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        self.0.stream(request).await
    }
}

/// Agents pass over what they do not know of a newer master, and do the rest.
#[test]
fn a_newer_master_is_followed() {
    scenario(3, |world| {
        world.changes(10);
        world.kill_master();
        world.master().newer.set(true);
        world.start_master(world.leading());
        world.changes(10);
        world.converges(CONVERGES_WITHIN);
        let ended = world.said(&["session ended"]);
        world.pass_while("every node is ready", Duration::from_secs(20), |w| w.are_ready(1..=3));
        assert_eq!(world.said(&["session ended"]), ended);
    });
}

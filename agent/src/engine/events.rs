//! The engine's events, as hints to look again.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::{Engine, labels};

/// First pause before events are asked for again.
const RETRY_MIN: Duration = Duration::from_millis(250);
/// Longest such pause: an engine that is back is noticed within it.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Events are asked for from this long before now, so that none is lost between two connections.
const OVERLAP_S: u64 = 2;

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEvent {
    /// Events begin (again): look at everything.
    Resync,
    /// This container, by the engine's id.
    Container(String),
}

impl Engine {
    /// Sends events of our containers for ever; ends when nobody listens. After each loss of the
    /// connection it pauses (250 ms doubled, at most 5 s), begins anew and says [`EngineEvent::Resync`].
    pub async fn events(&self, out: mpsc::Sender<EngineEvent>) {
        let mut pause = RETRY_MIN;
        loop {
            if let Ok(client) = self.client().await {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
                let label = format!("{}={}", labels::CLUSTER, self.config().cluster);
                // Events of networks carry no labels to filter by; the full look on the timer sees those.
                let filters = HashMap::from([
                    ("type", vec!["container".to_owned()]),
                    ("label", vec![label]),
                    ("event", CONTAINER_EVENTS.iter().map(|e| (*e).to_owned()).collect()),
                ]);
                let options = EventsOptionsBuilder::default()
                    .since(&now.saturating_sub(OVERLAP_S).to_string())
                    .filters(&filters)
                    .build();
                let mut events = std::pin::pin!(client.events(Some(options)));
                if out.send(EngineEvent::Resync).await.is_err() {
                    return;
                }
                while let Some(event) = tokio::select! {
                    event = events.next() => event,
                    () = out.closed() => return,
                } {
                    match event {
                        Ok(event) => {
                            pause = RETRY_MIN;
                            if let Some(id) = event.actor.and_then(|a| a.id)
                                && out.send(EngineEvent::Container(id)).await.is_err()
                            {
                                return;
                            }
                        }
                        Err(error) => {
                            self.failed("follow", "events", error);
                            break;
                        }
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = out.closed() => return,
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}

/// Events after which a container is another (Docker Engine API, `GET /events`); exec's are noise.
const CONTAINER_EVENTS: [&str; 10] =
    ["create", "start", "die", "oom", "pause", "unpause", "destroy", "health_status", "rename", "restart"];

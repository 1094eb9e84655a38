//! What containers are called that somebody started with the host's own engine in networks of the cluster
//! (`docker run --network`).
//!
//! Owns the list of them, which goes to the master with the host's description. It must not know what names are for.
//! The plugin hears of a container's endpoint but not of its name, and must not ask the engine, which waits for it: so
//! names are looked up afterwards, and until each endpoint has one.
//!
//! Tasks: [`follow`] is one, owned by its caller. Channels: it reads the overlay's `watch` of endpoints and writes one
//! of containers.

use std::{collections::BTreeMap, time::Duration};

use skein_api::AttachedContainer;
use skein_daemon::chain;
use tokio::sync::watch;

use crate::{
    engine::{Engine, Named},
    overlay::{ByHand, OverlayHandle},
};

/// How often names are looked at when nothing happens: `docker rename` is told by nobody.
const LOOK: Duration = Duration::from_secs(30);
/// First pause while an endpoint has no name yet: its container is being started.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Tells who is there, for ever; ends with the overlay.
pub async fn follow(engine: Engine, overlay: OverlayHandle, found: watch::Sender<Vec<AttachedContainer>>) {
    let mut endpoints = overlay.by_hand();
    let mut pause = RETRY_MIN;
    loop {
        let there = endpoints.borrow_and_update().clone();
        let named = match there.is_empty() {
            true => Ok(BTreeMap::new()),
            false => engine.attached().await,
        };
        let complete = match named {
            Ok(named) => {
                let containers = containers(&there, &named);
                let complete = containers.len() == there.len();
                found.send_if_modified(|old| {
                    let changed = *old != containers;
                    *old = containers;
                    changed
                });
                complete
            }
            Err(error) => {
                tracing::debug!(error = chain(&error), "containers in networks of the cluster keep their names");
                false
            }
        };
        pause = if complete { RETRY_MIN } else { (pause * 2).min(RETRY_MAX) };
        // Cancel-safe: a watch and a timer.
        tokio::select! {
            changed = endpoints.changed() => match changed {
                Ok(()) => pause = RETRY_MIN,
                Err(_) => return,
            },
            () = tokio::time::sleep(if complete { LOOK } else { pause }) => {}
        }
    }
}

/// Those of whom name and address are known, in order.
fn containers(endpoints: &BTreeMap<String, ByHand>, named: &BTreeMap<String, Named>) -> Vec<AttachedContainer> {
    let one = |(id, endpoint): (&String, &ByHand)| {
        let Named { container, names } = named.get(id)?.clone();
        let ByHand { network, v4, v6 } = endpoint.clone();
        Some(AttachedContainer { id: container, network, names, v4: Some(v4), v6 })
    };
    let mut all: Vec<_> = endpoints.iter().filter_map(one).collect();
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use skein_api::{NetworkId, TaskId};

    use super::*;

    #[test]
    fn an_endpoint_without_a_name_waits() {
        let at = |last| ByHand { network: NetworkId::new("n1"), v4: [10, 0, 0, last].into(), v6: None };
        let endpoints = BTreeMap::from([("e1".to_owned(), at(1)), ("e2".to_owned(), at(2))]);
        let debug = Named { container: TaskId::new("c2"), names: vec!["debug".into()] };
        let gone = Named { container: TaskId::new("c3"), names: vec!["gone".into()] };
        let found = containers(&endpoints, &BTreeMap::from([("e2".into(), debug), ("e3".into(), gone)]));
        assert_eq!(
            found,
            [AttachedContainer {
                id: TaskId::new("c2"),
                network: NetworkId::new("n1"),
                names: vec!["debug".into()],
                v4: Some([10, 0, 0, 2].into()),
                v6: None,
            }]
        );
    }
}

//! `/v1/net/…`: questions about networks that agents answer.
//!
//! Owns: who is asked. Must not know: how hosts look. No tasks, no channels.

mod path;

use axum::{
    Json,
    extract::{Query, State},
};
use serde::Deserialize;
use skein_api::{CheckReport, ExposedBy, ExposedPort, HostAnswer, NetQuestion, NetStatus};

pub(super) use self::path::path;
use super::{Answer, Api, Failure, User};
use crate::{
    ask::{Asked, Asker},
    tunnels::{Plan, checked},
};

impl Api {
    /// Asks agents.
    pub(super) fn asker(&self) -> Asker {
        Asker { cluster: self.cluster.clone(), broker: self.broker.clone() }
    }

    /// The node that a user means, or all, by name.
    async fn asked(&self, node: Option<String>) -> Result<Vec<Asked>, Failure> {
        let asked = |node: &skein_api::Node| Asked { node: node.id.clone(), name: node.name.clone() };
        let found = self.read(move |core| match node {
            Some(reference) => core.model().find_node(&reference).map(|node| vec![asked(node)]),
            None => Ok(core.model().nodes.values().map(asked).collect()),
        });
        let mut found = found.await??;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

#[derive(Deserialize)]
pub(super) struct OfNode {
    node: Option<String>,
}

pub(super) async fn status(
    State(api): State<Api>,
    _: User,
    Query(OfNode { node }): Query<OfNode>,
) -> Answer<Vec<HostAnswer<NetStatus>>> {
    let asked = api.asked(node).await?;
    Ok(Json(api.asker().ask_all(asked, &NetQuestion::Status).await))
}

pub(super) async fn exposed(
    State(api): State<Api>,
    _: User,
    Query(OfNode { node }): Query<OfNode>,
) -> Answer<Vec<HostAnswer<Vec<ExposedPort>>>> {
    let asked = api.asked(node).await?;
    let mut answers: Vec<HostAnswer<Vec<ExposedPort>>> = api.asker().ask_all(asked, &NetQuestion::Exposed).await;
    // Agents know tasks by id only.
    let named = api.read(move |core| {
        let all = answers.iter_mut().filter_map(|a| a.answer.as_mut()).flatten();
        for port in all {
            if let ExposedBy::Published { task: Some(task), name, .. } = &mut port.by
                && let Some(task) = core.model().tasks.get(task)
            {
                name.clone_from(&task.name);
            }
        }
        answers
    });
    Ok(Json(named.await?))
}

pub(super) async fn check(
    State(api): State<Api>,
    _: User,
    Query(OfNode { node }): Query<OfNode>,
) -> Answer<CheckReport> {
    let plan = api.read(move |core| Plan::of(core, node.as_deref())).await??;
    Ok(Json(checked(&api.asker(), plan).await))
}

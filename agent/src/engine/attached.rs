//! Containers that are not ours in networks that are: what they are called.

use std::collections::{BTreeMap, HashMap};

use bollard::query_parameters::{InspectContainerOptions, ListContainersOptionsBuilder};
use skein_api::{ATTACHED_MAX, TaskId};

use super::{Engine, EngineError, labels};

/// Digits of the engine's ids that tell containers apart, as many as our own ids nearly have.
const ID_DIGITS: usize = 24;
/// Digits of the engine's ids that it adds to a container's aliases.
const SHORT_ID_DIGITS: usize = 12;

/// The container behind an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The first digits of the engine's id.
    pub container: TaskId,
    /// Its name, then its aliases in the endpoint's network, in order.
    pub names: Vec<String>,
}

impl Engine {
    /// Running containers in our networks that somebody else started, at most [`ATTACHED_MAX`], by the engine's ids of
    /// their endpoints.
    ///
    /// # Errors
    /// The engine does not answer, or refuses.
    pub async fn attached(&self) -> Result<BTreeMap<String, Named>, EngineError> {
        let networks = self.networks().await?;
        let mut found = BTreeMap::new();
        if networks.is_empty() {
            return Ok(found);
        }
        let ids = networks.values().map(|network| network.engine_id.clone()).collect();
        let options = ListContainersOptionsBuilder::default().filters(&HashMap::from([("network", ids)])).build();
        let client = self.client().await?;
        let all = client.list_containers(Some(options)).await.map_err(|e| self.failed("list", "containers", e))?;
        let ours = |labels: &HashMap<String, String>| labels.get(labels::CLUSTER) == Some(&self.config().cluster);
        let others = all.into_iter().filter(|c| !c.labels.as_ref().is_some_and(ours)).filter_map(|c| c.id);
        for id in others.take(ATTACHED_MAX) {
            // A list has no aliases. One that has ended meanwhile is not there any more.
            match client.inspect_container(&id, None::<InspectContainerOptions>).await {
                Ok(container) => {
                    let name = container.name.unwrap_or_default();
                    let settings = container.network_settings.and_then(|s| s.networks).unwrap_or_default();
                    for endpoint in settings.into_values() {
                        let Some(endpoint_id) = endpoint.endpoint_id.filter(|id| !id.is_empty()) else { continue };
                        let named = named(&id, &name, endpoint.aliases.unwrap_or_default());
                        found.insert(endpoint_id, named);
                    }
                }
                Err(error) => match self.failed("inspect", &format!("container {id}"), error) {
                    error if error.is_not_found() => {}
                    error => return Err(error),
                },
            }
        }
        Ok(found)
    }
}

fn named(id: &str, name: &str, aliases: Vec<String>) -> Named {
    let short = id.get(..SHORT_ID_DIGITS).unwrap_or(id);
    let mut names = vec![name.trim_start_matches('/').to_owned()];
    for alias in aliases {
        if alias != short && !names.contains(&alias) {
            names.push(alias);
        }
    }
    Named { container: TaskId::new(id.get(..ID_DIGITS).unwrap_or(id)), names }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_container_s_and_its_aliases() {
        let id = "0123456789abcdef0123456789abcdef";
        let found = named(id, "/debug", vec!["0123456789ab".into(), "d".into(), "debug".into()]);
        assert_eq!(found, Named { container: TaskId::new(&id[..24]), names: vec!["debug".into(), "d".into()] });
    }
}

//! Images: what is on the host is used; what is not is pulled.

use std::collections::BTreeMap;

use bollard::query_parameters::{CreateImageOptionsBuilder, RemoveImageOptionsBuilder};
use futures_util::StreamExt;

use super::{Engine, EngineError};

/// Layers whose progress is summed up; a manifest has at most 127 in practice.
const LAYERS_MAX: usize = 1_024;
/// Longest pause between two words of a registry, seconds; beyond it the pull has failed.
const PULL_SILENCE_S: u64 = 300;

/// Where an image came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// It was on the host.
    No,
    /// We pulled it.
    Yes,
}

/// `name[:tag][@digest]` as (name with registry, tag or digest). Without either the tag is `latest`: the engine would
/// otherwise pull every tag.
fn split_reference(image: &str) -> (String, String) {
    if let Some((name, digest)) = image.split_once('@') {
        return (name.to_owned(), digest.to_owned());
    }
    match image.rsplit_once(':') {
        // A colon before the last slash belongs to the registry's port.
        Some((name, tag)) if !tag.contains('/') => (name.to_owned(), tag.to_owned()),
        _ => (image.to_owned(), "latest".to_owned()),
    }
}

/// Bytes of the layers that are still coming.
#[derive(Default)]
pub(super) struct Progress(BTreeMap<String, (i64, i64)>);

impl Progress {
    pub(super) fn take(&mut self, layer: Option<String>, current: Option<i64>, total: Option<i64>) -> Option<String> {
        let (layer, current, total) = (layer?, current?, total.filter(|t| *t > 0)?);
        if self.0.len() < LAYERS_MAX || self.0.contains_key(&layer) {
            self.0.insert(layer, (current, total));
        }
        let (done, all) = self.0.values().fold((0_i64, 0_i64), |(d, a), (c, t)| {
            // An engine may say anything.
            (d.saturating_add(*c), a.saturating_add(*t))
        });
        Some(format!("{} of {} MB", done / 1_000_000, all.div_euclid(1_000_000).max(1)))
    }
}

impl Engine {
    /// Whether the image is on the host.
    pub async fn has_image(&self, image: &str) -> Result<bool, EngineError> {
        let client = self.client().await?;
        match client.inspect_image(image).await {
            Ok(_) => Ok(true),
            Err(error) => match self.failed("inspect", &format!("image {image}"), error) {
                error if error.is_not_found() => Ok(false),
                error => Err(error),
            },
        }
    }

    /// Has the image on the host: what is there is used as it is (images may have been loaded by hand, and no registry
    /// may be in reach); otherwise it is pulled. `progress` hears a few words now and then.
    pub async fn ensure_image(
        &self,
        image: &str,
        mut progress: impl FnMut(String) + Send,
    ) -> Result<Pulled, EngineError> {
        if self.has_image(image).await? {
            return Ok(Pulled::No);
        }
        progress(format!("pulling {image}"));
        let (name, tag) = split_reference(image);
        let options = CreateImageOptionsBuilder::default().from_image(&name).tag(&tag).build();
        let client = self.client().await?;
        let mut stream = std::pin::pin!(client.create_image(Some(options), None, None));
        let mut bytes = Progress::default();
        let silence = std::time::Duration::from_secs(PULL_SILENCE_S);
        loop {
            let step = match tokio::time::timeout(silence, stream.next()).await {
                Ok(Some(step)) => step,
                Ok(None) => break,
                Err(_) => {
                    let message = format!("nothing came for {PULL_SILENCE_S} s");
                    return Err(EngineError::Image { image: image.to_owned(), message, missing: false });
                }
            };
            let step = step.map_err(|e| self.pull_failed(image, e))?;
            let detail = step.progress_detail.unwrap_or_default();
            if let Some(words) = bytes.take(step.id, detail.current, detail.total) {
                progress(format!("pulling {image}: {words}"));
            }
        }
        // Some engines end the stream without a word when they are stopped in between.
        if self.has_image(image).await? {
            tracing::info!(image, "image pulled");
            return Ok(Pulled::Yes);
        }
        let message = "the pull ended and the image is not there".to_owned();
        Err(EngineError::Image { image: image.to_owned(), message, missing: false })
    }

    fn pull_failed(&self, image: &str, error: bollard::errors::Error) -> EngineError {
        let message = match self.failed("pull", &format!("image {image}"), error) {
            EngineError::NotFound { message, .. }
            | EngineError::Refused { message, .. }
            | EngineError::Conflict { message, .. } => message,
            other => return other,
        };
        // The registry's words (Docker Registry HTTP API V2, errors) and the engine's for a bad reference.
        let missing =
            ["manifest unknown", "not found", "repository does not exist", "invalid reference", "access denied"]
                .iter()
                .any(|words| message.contains(words));
        EngineError::Image { image: image.to_owned(), message, missing }
    }

    /// Removes an image by reference; one that is gone is no error, one in use is [`EngineError::Conflict`].
    pub async fn remove_image(&self, image: &str) -> Result<(), EngineError> {
        let client = self.client().await?;
        let options = RemoveImageOptionsBuilder::default().force(false).build();
        match client.remove_image(image, Some(options), None).await {
            Ok(_) => Ok(()),
            Err(error) => match self.failed("remove", &format!("image {image}"), error) {
                error if error.is_not_found() => Ok(()),
                error => Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        for (image, name, tag) in [
            ("busybox", "busybox", "latest"),
            ("busybox:1.36", "busybox", "1.36"),
            ("localhost:5000/busybox", "localhost:5000/busybox", "latest"),
            ("localhost:5000/a/b:x", "localhost:5000/a/b", "x"),
            ("busybox@sha256:00ff", "busybox", "sha256:00ff"),
        ] {
            assert_eq!(split_reference(image), (name.to_owned(), tag.to_owned()), "{image}");
        }
    }

    #[test]
    fn progress_sums_layers_up() {
        let mut progress = Progress::default();
        assert_eq!(progress.take(Some("a".into()), Some(1_000_000), Some(4_000_000)).as_deref(), Some("1 of 4 MB"));
        assert_eq!(progress.take(Some("b".into()), Some(3_000_000), Some(6_000_000)).as_deref(), Some("4 of 10 MB"));
        assert_eq!(progress.take(Some("b".into()), None, None), None);
    }
}

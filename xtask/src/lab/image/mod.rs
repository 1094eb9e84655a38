//! Images without a registry: made from this machine's own programs and the libraries they need.
//!
//! Owns the names of the images, the cache of built archives, and loading them into engines. An archive is found
//! again by a digest over everything that goes into it, so that a second build costs no more than reading the inputs.
//! Knows nothing of what uses the images. No tasks, no channels.

mod archive;
mod recipes;
mod rootfs;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::host::Host;
use super::process::run;
use super::spec::{STATE_ROOT, lock};

/// The images that can be built: an init-less shell with the usual applets, a PostgreSQL server that is initialised
/// and ready, the demo's application, and tools to look at networks.
pub const IMAGES: [&str; 4] = ["busybox", "postgres", "demo-app", "net-tools"];

/// What a container of an image does unless told otherwise (OCI image configuration, `config`).
#[derive(Default)]
struct Config {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    exposed_ports: Vec<String>,
    volumes: Vec<String>,
    stop_signal: Option<String>,
    working_dir: Option<String>,
}

/// Builds an image, unless the cache has it, and returns the archive for `docker load`.
///
/// # Errors
/// The name is unknown, or a program is missing.
pub(super) fn build(name: &str) -> Result<PathBuf> {
    let recipe: fn(&mut rootfs::Rootfs) -> Result<Config> = match name {
        "busybox" => recipes::busybox,
        "postgres" => recipes::postgres,
        "demo-app" => recipes::demo_app,
        "net-tools" => recipes::net_tools,
        _ => bail!("failed to build image {name:?}: unknown\nhint: there are {}", IMAGES.join(", ")),
    };
    let cache = Path::new(STATE_ROOT).join(".images");
    let _lock = lock(&cache, name)?;

    let mut root = rootfs::Rootfs::default();
    let config = recipe(&mut root).with_context(|| format!("failed to build image {name}"))?;
    let key = archive::key(name, &root, &config)?;
    let target = cache.join(format!("{name}-{key}.tar"));
    if target.is_file() {
        return Ok(target);
    }
    let work =
        tempfile::tempdir_in(&cache).with_context(|| format!("failed to create a directory in {}", cache.display()))?;
    root.write_to(&work.path().join("rootfs")).with_context(|| format!("failed to build image {name}"))?;
    let fresh = archive::write(name, work.path(), &config)?;
    remove_older(&cache, name);
    fs::rename(&fresh, &target).with_context(|| format!("failed to write {}", target.display()))?;
    Ok(target)
}

/// Archives of earlier states of this machine are of no use any more. Best effort: they only cost space.
fn remove_older(cache: &Path, name: &str) {
    for entry in fs::read_dir(cache).into_iter().flatten().filter_map(Result::ok) {
        let file = entry.file_name().to_string_lossy().into_owned();
        let rest = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        if rest.is_some_and(|rest| rest.strip_suffix(".tar").is_some_and(is_key)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Keys are hexadecimal, names of images hold other letters: `net` is not taken for `net-tools`.
fn is_key(text: &str) -> bool {
    text.len() == archive::KEY_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Loads an archive into the engine of a host, unless it has that very image.
pub(super) fn load(host: &Host, name: &str, archive: &Path) -> Result<()> {
    let wanted = archive::image_id(archive)?;
    let format = ["image", "inspect", "--format", "{{.Id}}", name];
    if host.docker(&format).is_ok_and(|id| id == wanted) {
        return Ok(());
    }
    run(host.docker_command().args(["load", "--quiet", "--input"]).arg(archive))
        .map(drop)
        .with_context(|| format!("failed to load image {name} on host {}", host.name()))
}

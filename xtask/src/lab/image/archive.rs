//! The archive that `docker load` reads (Docker Image Specification v1.2: `manifest.json`, a configuration and one
//! layer), and the digest it is cached under.
//!
//! Layers are packed by `tar`, which every distribution has, with sorted names and fixed times, so that equal inputs
//! give an equal image. Knows nothing of recipes. No tasks, no channels.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use ring::digest;
use serde_json::{Value, json};

use super::rootfs::{Entry, Rootfs, quietly};
use super::{Config, is_key};
use crate::lab::process::run;

/// Digits of a cache key: half of a SHA-256, plenty against chance.
pub(super) const KEY_DIGITS: usize = 32;

/// Part of every key: to be raised when the way of packing changes.
const PACKING: &str = "1";

/// Bytes read at a time.
const BUFFER_BYTES: usize = 256 * 1024;

/// Digest over all that decides the contents of an image.
pub(super) fn key(name: &str, root: &Rootfs, config: &Config) -> Result<String> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut add = |part: &[u8]| {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        context.update(part);
    };
    add(PACKING.as_bytes());
    add(config_json(config, "").to_string().as_bytes());
    add(name.as_bytes());
    add(root.finish.as_ref().map(|(text, _)| text.as_bytes()).unwrap_or_default());
    for (path, entry) in &root.entries {
        add(path.as_os_str().as_encoded_bytes());
        match entry {
            Entry::File(source) => {
                add(b"file");
                add(file_digest(source)?.as_bytes());
            }
            other => add(format!("{other:?}").as_bytes()),
        }
    }
    let mut text = hex(context.finish().as_ref());
    text.truncate(KEY_DIGITS);
    debug_assert!(is_key(&text), "remove_older must recognise it");
    Ok(text)
}

fn file_digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("failed to read {}", path.display()))?;
        if n == 0 {
            return Ok(hex(context.finish().as_ref()));
        }
        context.update(buffer.get(..n).unwrap_or_default());
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Packs `work/rootfs` and returns the archive, which is in `work` too.
pub(super) fn write(name: &str, work: &Path, config: &Config) -> Result<PathBuf> {
    let image = work.join("image");
    fs::create_dir(&image).with_context(|| format!("failed to create {}", image.display()))?;
    let layer = image.join("layer.tar");
    tar(&work.join("rootfs"), &layer)?;
    let text = config_json(config, &file_digest(&layer)?).to_string();
    let id = hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
    let config_name = format!("{id}.json");
    let manifest = json!([{ "Config": config_name, "RepoTags": [format!("{name}:latest")], "Layers": ["layer.tar"] }]);
    for (file, text) in [(config_name.as_str(), text), ("manifest.json", manifest.to_string())] {
        let path = image.join(file);
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
    }
    let archive = work.join("image.tar");
    tar(&image, &archive)?;
    Ok(archive)
}

fn tar(dir: &Path, target: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--mtime=@0", "--numeric-owner", "--format=gnu", "--create", "--file"]).arg(target);
    command.arg("--directory").arg(dir).arg(".");
    quietly(&mut command)
}

/// The image's configuration. The time of creation is fixed, since it is part of the image's id.
fn config_json(config: &Config, layer_digest: &str) -> Value {
    let set = |names: &[String]| -> Value {
        names.iter().map(|name| (name.clone(), json!({}))).collect::<serde_json::Map<_, _>>().into()
    };
    let mut run = json!({
        "Env": config.env, "Entrypoint": config.entrypoint, "Cmd": config.cmd,
        "ExposedPorts": set(&config.exposed_ports), "Volumes": set(&config.volumes),
        "WorkingDir": config.working_dir.as_deref().unwrap_or("/"),
    });
    if let Some(signal) = &config.stop_signal {
        run["StopSignal"] = json!(signal);
    }
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    json!({
        "architecture": architecture, "os": "linux", "created": "1970-01-01T00:00:00Z", "config": run,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer_digest}")] },
        "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "xtask lab image" }],
    })
}

/// The id an engine gives to the image in an archive: the digest of its configuration.
pub(super) fn image_id(archive: &Path) -> Result<String> {
    let text =
        run(Command::new("tar").args(["--extract", "--to-stdout", "--file"]).arg(archive).arg("./manifest.json"))?;
    let manifest: Value = serde_json::from_str(&text).context("failed to parse the manifest of an archive")?;
    let config = manifest[0]["Config"].as_str().and_then(|name| name.strip_suffix(".json"));
    config.map(|id| format!("sha256:{id}")).context("failed to find the configuration in an archive")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(text: &str) -> Rootfs {
        let mut root = Rootfs::default();
        root.text("/etc/x", text, 0o644);
        root
    }

    #[test]
    fn the_key_follows_the_contents() {
        let key_of = |text: &str, cmd: &str| {
            let config = Config { cmd: vec![cmd.to_owned()], ..Config::default() };
            key("x", &tiny(text), &config).expect("no files to read")
        };
        assert_eq!(key_of("a", "b"), key_of("a", "b"));
        assert_ne!(key_of("a", "b"), key_of("c", "b"));
        assert_ne!(key_of("a", "b"), key_of("a", "c"));
    }

    #[test]
    fn equal_inputs_give_an_equal_image() {
        let id = || {
            let dir = tempfile::tempdir().expect("a temporary directory");
            tiny("a").write_to(&dir.path().join("rootfs")).expect("written");
            image_id(&write("x", dir.path(), &Config::default()).expect("packed")).expect("readable")
        };
        assert_eq!(id(), id());
    }
}

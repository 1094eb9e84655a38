//! `volumes` and `tmpfs` of a service: named and anonymous volumes, paths of the host, memory.
//!
//! Sources of named volumes stay the names of the file here. The short form's parser is used by `skein run -v` too.

use std::path::{Component, Path, PathBuf};

use skein_api::{Mount, MountKind};

use super::{
    keys,
    problem::Pos,
    service::Surroundings,
    values,
    walk::{Cx, Fields},
    yaml::{Node, Value},
};

/// A mount, and options of it that have no effect.
pub(crate) struct Short {
    pub(crate) mount: Mount,
    pub(crate) no_effect: Vec<String>,
}

/// Reads `[source:]target[:options]`. Sources that start with `/`, `.` or `~` are paths, all else names volumes.
pub(crate) fn short(text: &str, base: &Path, home: Option<&str>) -> Result<Short, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [source, target] => (Some(source), target, ""),
        [source, target, options] => (Some(source), target, options),
        _ => return Err(format!("expected [SOURCE:]TARGET[:OPTIONS], found {text:?}")),
    };
    check_target(target)?;
    let mut mount = Mount {
        kind: MountKind::Volume,
        source: None,
        target: target.into(),
        read_only: false,
        tmpfs_size_bytes: None,
        volume_driver: None,
    };
    if let Some(source) = source {
        if source.starts_with(['/', '.', '~']) {
            mount.kind = MountKind::Bind;
            mount.source = Some(absolute(source, base, home)?);
        } else {
            values::check_name("volume", source)?;
            mount.source = Some(source.into());
        }
    }
    let mut no_effect = Vec::new();
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option {
            "ro" => mount.read_only = true,
            "rw" => mount.read_only = false,
            "z" | "Z" | "cached" | "delegated" | "consistent" => no_effect.push(option.to_owned()),
            _ => return Err(format!("unknown or unsupported option {option:?} in {text:?}; expected ro or rw")),
        }
    }
    Ok(Short { mount, no_effect })
}

/// A mount of memory: `/path[:size=64m,…]`.
pub(crate) fn tmpfs_short(text: &str) -> Result<Short, String> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    check_target(target)?;
    let mut mount = Mount {
        kind: MountKind::Tmpfs,
        source: None,
        target: target.into(),
        read_only: false,
        tmpfs_size_bytes: None,
        volume_driver: None,
    };
    let mut no_effect = Vec::new();
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => mount.tmpfs_size_bytes = Some(values::size_bytes(size)?),
            _ if option == "ro" => mount.read_only = true,
            _ => no_effect.push(option.to_owned()),
        }
    }
    Ok(Short { mount, no_effect })
}

fn check_target(target: &str) -> Result<(), String> {
    if target.starts_with('/') && !target.trim_end_matches('/').is_empty() {
        return Ok(());
    }
    Err(format!("expected an absolute path inside the container, found {target:?}"))
}

/// A path of the host, made absolute without looking at the disk: the host may be another machine.
fn absolute(source: &str, base: &Path, home: Option<&str>) -> Result<String, String> {
    let path = match source.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            let home = home.ok_or_else(|| format!("{source:?} needs the variable HOME, which is not set"))?;
            PathBuf::from(home).join(rest.trim_start_matches('/'))
        }
        Some(_) => return Err(format!("home directories of other users are not supported: {source:?}")),
        None => base.join(source),
    };
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    Ok(clean.to_string_lossy().into_owned())
}

/// Reads all mounts of a service, with the place of each.
pub(super) fn mounts(cx: &mut Cx, f: &Fields<'_>, around: &Surroundings<'_>) -> (Vec<Mount>, Vec<Pos>) {
    let mut found: Vec<(Mount, Pos)> = Vec::new();
    if let Some((node, path)) = f.get("volumes") {
        for (i, item) in cx.list(node, &path).iter().enumerate() {
            let path = format!("{path}[{i}]");
            let mount = match &item.value {
                Value::Map(_) => long(cx, item, &path, around),
                _ => {
                    let parsed = cx.parsed(item, &path, |t| short(t, around.project_dir, around.home.as_deref()));
                    parsed.map(|s| without_effect(cx, item.pos, &path, s))
                }
            };
            found.extend(mount.map(|m| (m, item.pos)));
        }
    }
    if let Some((node, path)) = f.get("tmpfs") {
        for (text, pos) in cx.word_or_words(node, &path) {
            match tmpfs_short(&text) {
                Ok(s) => found.push((without_effect(cx, pos, &path, s), pos)),
                Err(e) => cx.error(pos, format!("{path}: {e}")),
            }
        }
    }
    for (i, (mount, pos)) in found.iter().enumerate() {
        if found[..i].iter().any(|(m, _)| m.target == mount.target) {
            cx.error(*pos, format!("{}: two mounts have the target {:?}", f.path, mount.target));
        }
        if let (MountKind::Bind, Some(source)) = (mount.kind, &mount.source) {
            cx.warn(
                *pos,
                format!("{}: {source} must exist on the host that runs the task; it is not copied there", f.path),
            );
        }
    }
    found.into_iter().unzip()
}

fn without_effect(cx: &mut Cx, pos: Pos, path: &str, short: Short) -> Mount {
    for option in short.no_effect {
        cx.no_effect(pos, format!("{path}: the option {option:?} has no effect"));
    }
    short.mount
}

fn long(cx: &mut Cx, node: &Node, path: &str, around: &Surroundings<'_>) -> Option<Mount> {
    let f = cx.fields(node, path, keys::MOUNT)?;
    const KINDS: &[(&str, MountKind)] =
        &[("volume", MountKind::Volume), ("bind", MountKind::Bind), ("tmpfs", MountKind::Tmpfs)];
    let Some((kind_node, kind_path)) = f.get("type") else {
        cx.error(node.pos, format!("{path}: expected the key \"type\""));
        return None;
    };
    let kind = cx.one_of(kind_node, &kind_path, KINDS)?;
    let Some((target_node, target_path)) = f.get("target") else {
        cx.error(node.pos, format!("{path}: expected the key \"target\""));
        return None;
    };
    let target = cx.parsed(target_node, &target_path, |t| check_target(t).map(|()| t.to_owned()))?;
    let source = match (kind, f.get("source")) {
        (MountKind::Tmpfs, Some((n, p))) => {
            cx.error(n.pos, format!("{p}: a tmpfs has no source"));
            None
        }
        (MountKind::Bind, Some((n, p))) => {
            Some(cx.parsed(n, &p, |t| absolute(t, around.project_dir, around.home.as_deref()))?)
        }
        (MountKind::Volume, Some((n, p))) => {
            Some(cx.parsed(n, &p, |t| values::check_name("volume", t).map(|()| t.to_owned()))?)
        }
        (MountKind::Bind, None) => {
            cx.error(node.pos, format!("{path}: expected the key \"source\""));
            return None;
        }
        (_, None) => None,
    };
    let read_only = f.get("read_only").and_then(|(n, p)| cx.bool(n, &p)).unwrap_or(false);
    let mut size = None;
    for (key, table, own) in [
        ("bind", keys::MOUNT_BIND, MountKind::Bind),
        ("volume", keys::MOUNT_VOLUME, MountKind::Volume),
        ("tmpfs", keys::MOUNT_TMPFS, MountKind::Tmpfs),
    ] {
        let Some((node, path)) = f.get(key) else { continue };
        let Some(options) = cx.fields(node, &path, table) else { continue };
        if own != kind {
            cx.error(node.pos, format!("{path}: the type of the mount is not {key}"));
        }
        size = options.get("size").and_then(|(n, p)| cx.parsed(n, &p, values::size_bytes)).or(size);
    }
    Some(Mount { kind, source, target, read_only, tmpfs_size_bytes: size, volume_driver: None })
}

//! The flags of `skein run` to a [`ContainerCreate`]. Pure: files and the environment come in as functions.

use std::{collections::BTreeMap, path::Path};

use skein_api::{
    ContainerCreate, ContainerSpec, DeviceRequest, LABEL_KEY_EXPECTED, Link, Mount, MountKind, NetworkAttachment,
    Placement, ResourceRequirements, Resources, Strategy, TaskSpec, VolumesFrom, is_label_key,
};

use crate::{
    args::{RunArgs, StrategyArg},
    compose::{self, dotenv, values},
};

/// What the flags depend on besides themselves.
pub(crate) struct Surroundings<'a> {
    /// Current directory, absolute.
    pub(crate) dir: &'a Path,
    /// A variable of the caller.
    pub(crate) lookup: &'a dyn Fn(&str) -> Option<String>,
    /// Reads a file.
    pub(crate) read: &'a dyn Fn(&Path) -> std::io::Result<String>,
}

/// Builds the request.
///
/// # Errors
/// Which flag is wrong, and how.
pub(crate) fn container(args: &RunArgs, around: &Surroundings<'_>) -> Result<ContainerCreate, String> {
    let name = args.name.clone().unwrap_or_default();
    if !name.is_empty() {
        values::check_name("container", &name).map_err(|e| format!("--name: {e}"))?;
    }
    let (env, placement) = environment(args, around)?;
    let mut spec = TaskSpec {
        container: ContainerSpec { env, ..process(args)? },
        resources: resources(args)?,
        restart: compose::parse_restart(&args.restart).map_err(|e| format!("--restart: {e}"))?,
        ..Default::default()
    };
    mounts(args, around, &mut spec.container)?;
    for port in &args.publish {
        spec.ports.extend(values::ports_short(port).map_err(|e| format!("--publish: {e}"))?);
    }
    spec.placement = placement;
    spec.placement.network_plugins.clone_from(&args.network_plugin);
    spec.placement.strategy = args.strategy.map(|s| match s {
        StrategyArg::Spread => Strategy::Spread,
        StrategyArg::Binpack => Strategy::Binpack,
        StrategyArg::Random => Strategy::Random,
    });
    for network in &args.network {
        match network.as_str() {
            // Docker's names for the engine's own network.
            "bridge" | "default" => {}
            "host" | "none" => return Err(format!("--network: {network:?} is not supported; name an overlay network")),
            _ if network.starts_with("container:") => {
                spec.container.share.network = shared("--network", Some(network))?;
            }
            _ => {
                let (network, aliases) = (network.clone(), args.network_alias.clone());
                spec.networks.push(NetworkAttachment { network, aliases, ..NetworkAttachment::default() })
            }
        }
    }
    match &mut spec.networks[..] {
        [only] => (only.ipv4, only.ipv6) = (args.ip, args.ip6),
        _ if args.ip.is_some() || args.ip6.is_some() => {
            return Err("--ip, --ip6: an address needs exactly one overlay network; hint: --network NAME".into());
        }
        _ => {}
    }
    if spec.container.share.network.is_some() && !(spec.networks.is_empty() && spec.ports.is_empty()) {
        return Err("--network: with the network of another one it has no networks and ports of its own".into());
    }
    if !args.placement_pref.is_empty() {
        return Err(
            "--placement-pref: one container has no replicas to spread; preferences are for services, in a compose \
                    file: deploy.placement.preferences"
                .into(),
        );
    }
    gpus(args, &mut spec)?;
    for link in &args.link {
        let (target, alias) = link.split_once(':').unwrap_or((link, link));
        if target.is_empty() || alias.is_empty() {
            return Err(format!("--link: expected NAME or NAME:ALIAS, found {link:?}"));
        }
        spec.container.links.push(Link { target: target.into(), alias: alias.into() });
    }
    spec.container.share.pid = shared("--pid", args.pid.as_ref())?;
    spec.container.share.ipc = shared("--ipc", args.ipc.as_ref())?;
    Ok(ContainerCreate { name, spec })
}

/// `--gpus 2`: as many of the generic resource `gpu`, handed over by the engine.
fn gpus(args: &RunArgs, spec: &mut TaskSpec) -> Result<(), String> {
    let Some(text) = &args.gpus else { return Ok(()) };
    let count = match text.parse::<u64>() {
        Ok(count) if count > 0 => count,
        _ => return Err(format!("--gpus: expected how many, such as 1, found {text:?}")),
    };
    let kind = "gpu".to_owned();
    if spec.resources.generic.insert(kind.clone(), count).is_some() {
        return Err("--gpus: --generic-resource sets gpu aside too; give one of both".into());
    }
    spec.container.devices.push(DeviceRequest { capabilities: vec![kind.clone()], kind, ..DeviceRequest::default() });
    Ok(())
}

/// `container:NAME`.
fn shared(flag: &str, given: Option<&String>) -> Result<Option<String>, String> {
    let Some(text) = given else { return Ok(None) };
    match text.strip_prefix("container:") {
        Some(name) if !name.is_empty() => Ok(Some(name.to_owned())),
        _ => Err(format!("{flag}: expected container:NAME, found {text:?}")),
    }
}

fn process(args: &RunArgs) -> Result<ContainerSpec, String> {
    let stop_grace_ms = match &args.stop_timeout {
        // Docker's flag is a plain number of seconds.
        Some(text) => match text.parse::<u64>() {
            Ok(s) => Some(s.saturating_mul(1_000)),
            Err(_) => Some(values::duration_ms(text).map_err(|e| format!("--stop-timeout: {e}"))?),
        },
        None => None,
    };
    let mut labels = BTreeMap::new();
    for label in &args.label {
        let (key, value) = label.split_once('=').unwrap_or((label, ""));
        if key.is_empty() {
            return Err(format!("--label: expected KEY=VALUE, found {label:?}"));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    for host in &args.add_host {
        let address = host.split_once(':').map(|(_, a)| a.trim_matches(['[', ']']));
        if !address.is_some_and(|a| a == "host-gateway" || a.parse::<std::net::IpAddr>().is_ok()) {
            return Err(format!("--add-host: expected NAME:ADDRESS, found {host:?}"));
        }
    }
    // As docker run: one word, no shell splitting; empty clears the image's.
    let entrypoint = args.entrypoint.as_ref().map(|e| if e.is_empty() { Vec::new() } else { vec![e.clone()] });
    Ok(ContainerSpec {
        image: args.image.clone(),
        entrypoint,
        command: (!args.command.is_empty()).then(|| args.command.clone()),
        labels,
        hostname: args.hostname.clone(),
        user: args.user.clone(),
        working_dir: args.workdir.clone(),
        platform: args.platform.clone(),
        privileged: args.privileged,
        read_only: args.read_only,
        init: args.init.then_some(true),
        cap_add: args.cap_add.clone(),
        cap_drop: args.cap_drop.clone(),
        extra_hosts: args.add_host.clone(),
        stop_signal: args.stop_signal.clone(),
        stop_grace_ms,
        ..Default::default()
    })
}

type Environment = (BTreeMap<String, Option<String>>, Placement);

/// Variables and expressions: `-e constraint:key==value` is classic Swarm's spelling of `--constraint`.
fn environment(args: &RunArgs, around: &Surroundings<'_>) -> Result<Environment, String> {
    let mut entries: Vec<(String, Option<String>)> = Vec::new();
    for file in &args.env_file {
        let path = around.dir.join(file);
        let text = (around.read)(&path).map_err(|e| format!("--env-file: failed to read {}: {e}", path.display()))?;
        let read = dotenv::parse(&text, false, around.lookup);
        entries.extend(read.map_err(|e| format!("--env-file: {}:{}: {}", path.display(), e.line, e.message))?);
    }
    for variable in &args.env {
        entries.push(match variable.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (variable.clone(), None),
        });
    }
    let whitelist = |text: &String| if text.contains("==") { text.clone() } else { format!("node=={text}") };
    let mut env = BTreeMap::new();
    let mut placement = Placement {
        constraints: args.constraint.clone(),
        affinities: args.affinity.clone(),
        whitelists: args.whitelist.iter().map(whitelist).collect(),
        ..Placement::default()
    };
    for (name, value) in entries {
        let to = match name.split_once(':').map(|(kind, _)| kind) {
            Some("constraint") => &mut placement.constraints,
            Some("affinity") => &mut placement.affinities,
            Some("whitelist") => &mut placement.whitelists,
            _ if name.is_empty() => return Err("--env: expected NAME or NAME=VALUE".into()),
            _ => {
                let value = value.or_else(|| (around.lookup)(&name));
                env.insert(name, value);
                continue;
            }
        };
        match value {
            Some(value) => to.push(format!("{name}={value}")),
            None => return Err(format!("--env: {name:?} is a placement expression without an operator")),
        }
    }
    Ok((env, placement))
}

fn resources(args: &RunArgs) -> Result<ResourceRequirements, String> {
    let size = |flag: &str, text: &Option<String>| match text {
        Some(text) => values::size_bytes(text).map_err(|e| format!("{flag}: {e}")),
        None => Ok(0),
    };
    let cpus = |flag: &str, text: &Option<String>| match text {
        Some(text) => values::nano_cpus(text).map_err(|e| format!("{flag}: {e}")),
        None => Ok(0),
    };
    let limits = Resources { nano_cpus: cpus("--cpus", &args.cpus)?, mem_bytes: size("--memory", &args.memory)? };
    let reservations = Resources {
        nano_cpus: cpus("--cpus-reservation", &args.cpus_reservation)?,
        mem_bytes: size("--memory-reservation", &args.memory_reservation)?,
    };
    let mut generic = BTreeMap::new();
    for text in &args.generic_resource {
        let (kind, count) = text.split_once('=').unwrap_or((text, "1"));
        let Ok(count) = count.parse::<u64>() else {
            return Err(format!("--generic-resource: expected KIND=COUNT such as gpu=1, found {text:?}"));
        };
        if !is_label_key(kind) {
            return Err(format!("--generic-resource: {kind:?} is no kind: expected {LABEL_KEY_EXPECTED}"));
        }
        if generic.insert(kind.to_owned(), count).is_some() {
            return Err(format!("--generic-resource: the kind {kind:?} is given twice"));
        }
    }
    Ok(ResourceRequirements { reservations, limits, generic })
}

fn mounts(args: &RunArgs, around: &Surroundings<'_>, container: &mut ContainerSpec) -> Result<(), String> {
    let home = (around.lookup)("HOME");
    let volumes = args.volume.iter().map(|v| ("--volume", compose::parse_volume(v, around.dir, home.as_deref())));
    let tmpfs = args.tmpfs.iter().map(|t| ("--tmpfs", compose::parse_tmpfs(t)));
    for (flag, parsed) in volumes.chain(tmpfs) {
        let short = parsed.map_err(|e| format!("{flag}: {e}"))?;
        if let Some(option) = short.no_effect.first() {
            return Err(format!("{flag}: the option {option:?} has no effect"));
        }
        if container.mounts.iter().any(|m| m.target == short.mount.target) {
            return Err(format!("{flag}: two mounts have the target {:?}", short.mount.target));
        }
        let named = short.mount.kind == MountKind::Volume && short.mount.source.is_some();
        let volume_driver = args.volume_driver.clone().filter(|driver| named && driver != "local");
        container.mounts.push(Mount { volume_driver, ..short.mount });
    }
    for from in &args.volumes_from {
        let (name, mode) = from.rsplit_once(':').unwrap_or((from, "rw"));
        if !matches!(mode, "ro" | "rw") || name.is_empty() {
            return Err(format!("--volumes-from: expected NAME or NAME:ro, found {from:?}"));
        }
        container.volumes_from.push(VolumesFrom { from: name.into(), read_only: mode == "ro" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    /// What the flags change, as JSON without what is at its default.
    fn check(line: &[&str], expected: &str) {
        let cli = Cli::try_parse_from(["skein", "run"].iter().chain(line)).unwrap();
        let Command::Run(args) = cli.command else { panic!() };
        let lookup = |name: &str| match name {
            "HOME" => Some("/root".to_owned()),
            "TOKEN" => Some("t".into()),
            _ => None,
        };
        let read = |path: &Path| match path.to_str() {
            Some("/my dir/vars") => Ok("A=file\nB=$TOKEN\n".to_owned()),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        };
        let around = Surroundings { dir: Path::new("/my dir"), lookup: &lookup, read: &read };
        let got = match container(&args, &around) {
            Ok(create) => {
                let whole = serde_json::to_value(&create).unwrap();
                let default = serde_json::to_value(ContainerCreate::default()).unwrap();
                difference(&whole, &default).unwrap_or_default().to_string()
            }
            Err(e) => e,
        };
        let common = r#""restart":{"condition":"none"}"#;
        assert_eq!(got.replace(&format!(",{common}"), "").replace(common, ""), expected, "{line:?}");
    }

    fn difference(a: &serde_json::Value, b: &serde_json::Value) -> Option<serde_json::Value> {
        use serde_json::Value::Object;
        match (a, b) {
            (Object(a), Object(b)) => {
                let fields = a.iter().filter_map(|(k, v)| match b.get(k) {
                    Some(other) => Some((k.clone(), difference(v, other)?)),
                    None => Some((k.clone(), v.clone())),
                });
                let fields: serde_json::Map<_, _> = fields.collect();
                (!fields.is_empty()).then_some(Object(fields))
            }
            _ => (a != b).then(|| a.clone()),
        }
    }

    #[test]
    fn flags() {
        check(&["busybox"], r#"{"spec":{"container":{"image":"busybox"}}}"#);
        check(
            &["--name", "x", "busybox", "sh", "-c", "a b"],
            r#"{"name":"x","spec":{"container":{"command":["sh","-c","a b"],"image":"busybox"}}}"#,
        );
        check(
            &["-e", "A=1", "-e", "TOKEN", "-e", "NONE", "--env-file", "vars", "i"],
            r#"{"spec":{"container":{"env":{"A":"1","B":"t","NONE":null,"TOKEN":"t"},"image":"i"}}}"#,
        );
        check(
            &["--whitelist", "a|b", "-e", "whitelist:node==a|c", "i"],
            r#"{"spec":{"container":{"image":"i"},"placement":{"whitelists":["node==a|b","whitelist:node==a|c"]}}}"#,
        );
        check(
            &["--generic-resource", "gpu=2", "--generic-resource", "licence", "--platform", "linux/arm64", "i"],
            r#"{"spec":{"container":{"image":"i","platform":"linux/arm64"},"resources":{"generic":{"gpu":2,"licence":1}}}}"#,
        );
        check(
            &["--gpus", "2", "--reserve-cpu", "0.5", "--reserve-memory", "1g", "i"],
            r#"{"spec":{"container":{"devices":[{"capabilities":["gpu"],"driver":"","kind":"gpu"}],"image":"i"},"resources":{"generic":{"gpu":2},"reservations":{"mem_bytes":1073741824,"nano_cpus":500000000}}}}"#,
        );
        check(
            &["--link", "db", "--link", "shop_web:web", "i"],
            r#"{"spec":{"container":{"image":"i","links":[{"alias":"db","target":"db"},{"alias":"web","target":"shop_web"}]}}}"#,
        );
        check(
            &["--net", "container:db", "--pid", "container:web", "--ipc", "container:web", "i"],
            r#"{"spec":{"container":{"image":"i","share":{"ipc":"web","network":"db","pid":"web"}}}}"#,
        );
        check(
            &["-v", "data:/d", "-v", "/anon", "--volume-driver", "nfs", "--network-plugin", "weave", "i"],
            r#"{"spec":{"container":{"image":"i","mounts":[{"kind":"volume","read_only":false,"source":"data","target":"/d","tmpfs_size_bytes":null,"volume_driver":"nfs"},{"kind":"volume","read_only":false,"source":null,"target":"/anon","tmpfs_size_bytes":null}]},"placement":{"network_plugins":["weave"]}}}"#,
        );
        check(
            &["-e", "constraint:disk==ssd", "--constraint", "node==a", "-e", "affinity:container!=~db", "i"],
            r#"{"spec":{"container":{"image":"i"},"placement":{"affinities":["affinity:container!=~db"],"constraints":["node==a","constraint:disk==ssd"]}}}"#,
        );
        check(
            &["-v", "data:/data", "-v", "./x:/x:ro", "-v", "~/y:/y", "-v", "/anon", "i"],
            r#"{"spec":{"container":{"image":"i","mounts":[{"kind":"volume","read_only":false,"source":"data","target":"/data","tmpfs_size_bytes":null},{"kind":"bind","read_only":true,"source":"/my dir/x","target":"/x","tmpfs_size_bytes":null},{"kind":"bind","read_only":false,"source":"/root/y","target":"/y","tmpfs_size_bytes":null},{"kind":"volume","read_only":false,"source":null,"target":"/anon","tmpfs_size_bytes":null}]}}}"#,
        );
        check(
            &["--net", "front", "--ip", "10.0.0.5", "--ip6", "fd00::5", "i"],
            r#"{"spec":{"container":{"image":"i"},"networks":[{"aliases":[],"ipv4":"10.0.0.5","ipv6":"fd00::5","network":"front"}]}}"#,
        );
        check(
            &["-p", "8080:80", "-p", "[::1]:53:53/udp", "i"],
            r#"{"spec":{"container":{"image":"i"},"ports":[{"container_port":80,"host_ip":null,"host_port":8080,"protocol":"tcp"},{"container_port":53,"host_ip":"::1","host_port":53,"protocol":"udp"}]}}"#,
        );
        check(
            &["--network", "front", "--net", "bridge", "--network-alias", "w", "i"],
            r#"{"spec":{"container":{"image":"i"},"networks":[{"aliases":["w"],"network":"front"}]}}"#,
        );
        check(
            &["-m", "512m", "--cpus", "0.5", "--memory-reservation", "256m", "i"],
            r#"{"spec":{"container":{"image":"i"},"resources":{"limits":{"mem_bytes":536870912,"nano_cpus":500000000},"reservations":{"mem_bytes":268435456}}}}"#,
        );
        check(
            &[
                "--entrypoint",
                "",
                "--init",
                "--privileged",
                "--cap-add",
                "NET_ADMIN",
                "-u",
                "1:2",
                "-w",
                "/w",
                "-l",
                "a=b",
                "i",
            ],
            r#"{"spec":{"container":{"cap_add":["NET_ADMIN"],"entrypoint":[],"image":"i","init":true,"labels":{"a":"b"},"privileged":true,"user":"1:2","working_dir":"/w"}}}"#,
        );
        check(
            &["--restart", "on-failure:3", "--stop-timeout", "5", "--stop-signal", "SIGINT", "--hostname", "h", "i"],
            r#"{"spec":{"container":{"hostname":"h","image":"i","stop_grace_ms":5000,"stop_signal":"SIGINT"},"restart":{"condition":"on-failure","max_attempts":3}}}"#,
        );
        check(
            &[
                "--volumes-from",
                "a:ro",
                "--tmpfs",
                "/run:size=1m",
                "--strategy",
                "binpack",
                "--add-host",
                "h:10.0.0.1",
                "i",
            ],
            r#"{"spec":{"container":{"extra_hosts":["h:10.0.0.1"],"image":"i","mounts":[{"kind":"tmpfs","read_only":false,"source":null,"target":"/run","tmpfs_size_bytes":1048576}],"volumes_from":[{"from":"a","read_only":true}]},"placement":{"strategy":"binpack"}}}"#,
        );
    }

    #[test]
    fn wrong_flags_are_named() {
        check(&["-m", "lots", "i"], "--memory: expected a size such as 64m or 1.5g, found \"lots\"");
        check(&["--cpus", "x", "i"], "--cpus: expected a number of CPUs such as 0.5, found \"x\"");
        check(&["-p", "x", "i"], "--publish: expected a port of 1 to 65535 or a range of them, found \"x\"");
        check(&["-v", "a:b", "i"], "--volume: expected an absolute path inside the container, found \"b\"");
        check(
            &["-v", "/a:/b:rx", "i"],
            "--volume: unknown or unsupported option \"rx\" in \"/a:/b:rx\"; expected ro or rw",
        );
        check(&["-v", "/a", "--tmpfs", "/a", "i"], "--tmpfs: two mounts have the target \"/a\"");
        check(
            &["--restart", "maybe", "i"],
            "--restart: expected no, always, unless-stopped or on-failure[:attempts], found \"maybe\"",
        );
        check(&["--network", "host", "i"], "--network: \"host\" is not supported; name an overlay network");
        check(
            &["-e", "constraint:disk", "i"],
            "--env: \"constraint:disk\" is a placement expression without an operator",
        );
        check(&["--pid", "host", "i"], "--pid: expected container:NAME, found \"host\"");
        check(
            &["--net", "container:db", "-p", "80:80", "i"],
            "--network: with the network of another one it has no networks and ports of its own",
        );
        check(
            &["--generic-resource", "gpu=all", "i"],
            "--generic-resource: expected KIND=COUNT such as gpu=1, found \"gpu=all\"",
        );
        check(&["--gpus", "all", "i"], "--gpus: expected how many, such as 1, found \"all\"");
        check(
            &["--gpus", "1", "--generic-resource", "gpu=1", "i"],
            "--gpus: --generic-resource sets gpu aside too; give one of both",
        );
        check(&["--link", "db:", "i"], "--link: expected NAME or NAME:ALIAS, found \"db:\"");
        check(
            &["--placement-pref", "spread=node.labels.zone", "i"],
            "--placement-pref: one container has no replicas to spread; preferences are for services, in a compose file: \
             deploy.placement.preferences",
        );
        check(&["--env-file", "none", "i"], "--env-file: failed to read /my dir/none: entity not found");
        check(&["--add-host", "h", "i"], "--add-host: expected NAME:ADDRESS, found \"h\"");
        check(&["--stop-timeout", "x", "i"], "--stop-timeout: expected a duration such as 1m30s, found \"x\"");
    }
}

//! One service of a compose file.
//!
//! Owns: every key of a service but `deploy` and mounts. Names of other services, networks and volumes stay those of the
//! file here; [`super::project`] resolves them. Must not know other services.

use std::{io, path::Path};

use skein_api::{
    ContainerSpec, DependencyCondition, Healthcheck, IngressPort, Link, NetworkAttachment, PORTS_MAX, Placement,
    PortPublish, ServiceSpec, VolumesFrom,
};

use super::{
    deploy, dotenv, keys, mounts,
    problem::Pos,
    values,
    walk::{Cx, Entry, Fields},
    yaml::{Node, Value},
};

/// What the surroundings of the file provide.
pub(super) struct Surroundings<'a> {
    /// Absolute directory that relative paths start from.
    pub(super) project_dir: &'a Path,
    /// The user's home directory, for `~`.
    pub(super) home: Option<String>,
    /// Reads a file as text.
    pub(super) read: &'a dyn Fn(&Path) -> io::Result<String>,
    /// The value of a variable.
    pub(super) lookup: &'a dyn Fn(&str) -> Option<String>,
}

/// Why a service needs another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Need {
    /// Name of the other one in the file.
    pub(super) on: String,
    pub(super) condition: DependencyCondition,
    pub(super) required: bool,
    /// `depends_on`, `links`, `volumes_from`, or a namespace: `network_mode`, `pid`, `ipc`.
    pub(super) by: &'static str,
    pub(super) pos: Pos,
}

/// A service whose references are still names of the file.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) key: String,
    pub(super) pos: Pos,
    pub(super) spec: ServiceSpec,
    pub(super) needs: Vec<Need>,
    /// Networks by their names in the file; `None`: `network_mode`, no overlay network.
    pub(super) networks: Option<Vec<(NetworkAttachment, Pos)>>,
    pub(super) profiles: Vec<String>,
    pub(super) restart_given: bool,
    pub(super) mounts_pos: Vec<Pos>,
}

/// Reads one service.
pub(super) fn service(cx: &mut Cx, key: &str, pos: Pos, node: &Node, around: &Surroundings<'_>) -> Option<Draft> {
    let path = format!("services.{key}");
    if let Err(e) = values::check_name("service", key) {
        cx.error(pos, e);
    }
    if node.is_null() {
        cx.error(pos, format!("{path}: expected a mapping, found nothing"));
        return None;
    }
    let f = cx.fields(node, &path, keys::SERVICE)?;
    let mut spec = ServiceSpec { short_name: key.to_owned(), ..Default::default() };
    image(cx, &f, pos, &mut spec.task.container);
    process(cx, &f, &mut spec.task.container);
    spec.task.placement = environment(cx, &f, &mut spec.task.container, around);
    isolation(cx, &f, &mut spec.task.container);
    ports(cx, &f, &mut spec);
    let (found, mounts_pos) = mounts::mounts(cx, &f, around);
    spec.task.container.mounts = found;
    let mut needs = depends_on(cx, &f);
    needs.extend(links(cx, &f, &mut spec.task.container));
    needs.extend(volumes_from(cx, &f, &mut spec.task.container));
    needs.extend(namespaces(cx, &f, &mut spec.task.container));
    let restart_given = deploy::deploy(cx, &f, pos, &mut spec);
    let networks = networks(cx, &f);
    let profiles = f.get("profiles").map(|(n, p)| cx.words(n, &p)).unwrap_or_default();
    let profiles = profiles.into_iter().map(|(p, _)| p).collect();
    Some(Draft { key: key.to_owned(), pos, spec, needs, networks, profiles, restart_given, mounts_pos })
}

fn image(cx: &mut Cx, f: &Fields<'_>, pos: Pos, c: &mut ContainerSpec) {
    if let Some((node, path)) = f.get("image") {
        c.image = cx.word(node, &path).unwrap_or_default();
        return;
    }
    let at = f.key_pos("build").unwrap_or(pos);
    if f.get("build").is_some() {
        cx.error_hint(
            at,
            format!("{}: images are not built here, and without `image` there is none to run", f.path),
            "build it (`docker build -t NAME DIR`), bring it to the hosts (push it to a registry, or `docker save NAME | \
             docker load` on each host), and say `image: NAME`",
        );
    } else {
        cx.error(at, format!("{}: expected the key \"image\"", f.path));
    }
}

/// A command: a list, or a line that is split as a shell does.
fn argv(cx: &mut Cx, f: &Fields<'_>, key: &str) -> Option<Vec<String>> {
    let (node, path) = f.get(key)?;
    match &node.value {
        Value::Scalar { .. } => cx.parsed(node, &path, values::shell_words),
        _ => Some(cx.words(node, &path).into_iter().map(|(w, _)| w).collect()),
    }
}

fn process(cx: &mut Cx, f: &Fields<'_>, c: &mut ContainerSpec) {
    c.command = argv(cx, f, "command");
    c.entrypoint = argv(cx, f, "entrypoint");
    // Empty is as good as absent: `user: "${USER_ID:-}"` is a usual way to leave it to the image.
    let mut word = |key| f.get(key).and_then(|(n, p)| cx.text(n, &p)).filter(|t| !t.is_empty());
    c.hostname = word("hostname");
    c.user = word("user");
    c.working_dir = word("working_dir");
    c.stop_signal = word("stop_signal");
    c.container_name = word("container_name");
    if let (Some(name), Some((node, path))) = (&c.container_name, f.get("container_name"))
        && let Err(e) = values::check_name("container", name)
    {
        cx.error(node.pos, format!("{path}: {e}"));
    }
    c.stop_grace_ms = f.get("stop_grace_period").and_then(|(n, p)| cx.parsed(n, &p, values::duration_ms));
    let mut flag = |key| f.get(key).and_then(|(n, p)| cx.bool(n, &p));
    c.init = flag("init");
    c.tty = flag("tty").unwrap_or(false);
    c.stdin_open = flag("stdin_open").unwrap_or(false);
    c.healthcheck = healthcheck(cx, f);
    if let Some((node, path)) = f.get("labels") {
        let entries = cx.entries(node, &path, &['=']);
        c.labels = entries.into_iter().map(|e| (e.name, e.value.unwrap_or_default())).collect();
    }
    if let Some((node, path)) = f.get("expose") {
        for (text, pos) in cx.words(node, &path) {
            match values::ports_short(&text) {
                Ok(ports) if ports.iter().all(|p| p.host_port == 0 && p.host_ip.is_none()) => c.expose.push(text),
                Ok(_) => cx.error(pos, format!("{path}: expected a port of the container only, found {text:?}")),
                Err(e) => cx.error(pos, format!("{path}: {e}")),
            }
        }
    }
}

fn isolation(cx: &mut Cx, f: &Fields<'_>, c: &mut ContainerSpec) {
    c.platform = f.get("platform").and_then(|(n, p)| cx.word(n, &p));
    let mut flag = |key| f.get(key).and_then(|(n, p)| cx.bool(n, &p)).unwrap_or(false);
    c.privileged = flag("privileged");
    c.read_only = flag("read_only");
    let mut list = |key| -> Vec<String> {
        let words = f.get(key).map(|(n, p)| cx.words(n, &p)).unwrap_or_default();
        words.into_iter().map(|(w, _)| w).collect()
    };
    c.cap_add = list("cap_add");
    c.cap_drop = list("cap_drop");
    let Some((node, path)) = f.get("extra_hosts") else { return };
    for Entry { name, value, pos } in cx.entries(node, &path, &['=', ':']) {
        let address = value.unwrap_or_default();
        let bare = address.trim().trim_start_matches('[').trim_end_matches(']');
        if name.is_empty() || (bare != "host-gateway" && bare.parse::<std::net::IpAddr>().is_err()) {
            let found = format!("{name}:{address}");
            cx.error(pos, format!("{path}: expected a name and an IP address such as db:10.0.0.5, found {found:?}"));
        } else {
            c.extra_hosts.push(format!("{name}:{bare}"));
        }
    }
}

fn healthcheck(cx: &mut Cx, f: &Fields<'_>) -> Option<Healthcheck> {
    let (node, path) = f.get("healthcheck")?;
    let f = cx.fields(node, &path, keys::HEALTHCHECK)?;
    let mut check = Healthcheck::default();
    if let Some((node, path)) = f.get("test") {
        check.test = match &node.value {
            Value::Scalar { .. } => cx.text(node, &path).map(|line| vec!["CMD-SHELL".into(), line]).unwrap_or_default(),
            _ => cx.words(node, &path).into_iter().map(|(w, _)| w).collect(),
        };
        let first = check.test.first().map(String::as_str);
        let fits = match first {
            Some("NONE") => check.test.len() == 1,
            Some("CMD") => check.test.len() > 1,
            Some("CMD-SHELL") => check.test.len() == 2,
            _ => false,
        };
        if !fits && matches!(node.value, Value::List(_)) {
            let expected = "[\"CMD\", program, argument…], [\"CMD-SHELL\", line] or [\"NONE\"]";
            cx.error(node.pos, format!("{path}: expected {expected}, found {:?}", check.test));
        }
    }
    let mut ms = |key| f.get(key).and_then(|(n, p)| cx.parsed(n, &p, values::duration_ms)).unwrap_or(0);
    check.interval_ms = ms("interval");
    check.timeout_ms = ms("timeout");
    check.start_period_ms = ms("start_period");
    check.retries = f.get("retries").and_then(|(n, p)| cx.number(n, &p)).unwrap_or(0);
    if let Some((node, path)) = f.get("disable")
        && cx.bool(node, &path) == Some(true)
    {
        if !check.test.is_empty() && check.test != ["NONE"] {
            cx.error(node.pos, format!("{}: expected either \"disable: true\" or \"test\", found both", f.path));
        }
        check.test = vec!["NONE".into()];
    }
    Some(check)
}

/// Fills the environment; gives back what is a placement expression instead (classic Swarm's way to write them).
fn environment(cx: &mut Cx, f: &Fields<'_>, c: &mut ContainerSpec, around: &Surroundings<'_>) -> Placement {
    let mut entries = env_files(cx, f, around);
    if let Some((node, path)) = f.get("environment") {
        entries.extend(cx.entries(node, &path, &['=']));
    }
    let mut placement = Placement::default();
    for Entry { name, value, pos } in entries {
        let to = match name.split_once(':').map(|(kind, _)| kind) {
            Some("constraint") => Some(&mut placement.constraints),
            Some("affinity") => Some(&mut placement.affinities),
            Some("whitelist") => Some(&mut placement.whitelists),
            _ => None,
        };
        match (to, value) {
            (Some(to), Some(value)) => to.push(format!("{name}={value}")),
            (Some(_), None) => cx.error_hint(
                pos,
                format!("{}: {name:?} is a placement expression without an operator", f.path),
                "write constraint:key==value",
            ),
            (None, _) if name.is_empty() || name.contains(char::is_whitespace) => {
                cx.error(pos, format!("{}: {name:?} cannot be the name of a variable", f.path));
            }
            (None, Some(value)) => {
                c.env.insert(name, Some(value));
            }
            (None, None) => {
                let value = (around.lookup)(&name);
                c.env.insert(name, value);
            }
        }
    }
    placement
}

fn env_files(cx: &mut Cx, f: &Fields<'_>, around: &Surroundings<'_>) -> Vec<Entry> {
    let Some((node, path)) = f.get("env_file") else { return Vec::new() };
    let items = match &node.value {
        Value::List(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let mut out = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let path = if items.len() > 1 { format!("{path}[{i}]") } else { path.clone() };
        let (mut name, mut required, mut raw) = (None, true, false);
        if let Value::Map(_) = item.value {
            let Some(f) = cx.fields(item, &path, keys::ENV_FILE) else { continue };
            name = f.get("path").and_then(|(n, p)| cx.word(n, &p));
            required = f.get("required").and_then(|(n, p)| cx.bool(n, &p)).unwrap_or(true);
            raw = f.get("format").and_then(|(n, p)| cx.one_of(n, &p, &[("raw", true)])).unwrap_or(false);
            if f.get("path").is_none() {
                cx.error(item.pos, format!("{path}: expected the key \"path\""));
            }
        } else {
            name = cx.word(item, &path).or(name);
        }
        let Some(name) = name else { continue };
        let file = around.project_dir.join(&name);
        let text = match (around.read)(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound && !required => continue,
            Err(e) => {
                cx.error(item.pos, format!("{path}: failed to read {}: {e}", file.display()));
                continue;
            }
        };
        match dotenv::parse(&text, raw, around.lookup) {
            Ok(variables) => {
                out.extend(variables.into_iter().map(|(name, value)| Entry { name, value, pos: item.pos }));
            }
            Err(e) => cx.error(item.pos, format!("{path}: {}:{}: {}", file.display(), e.line, e.message)),
        }
    }
    out
}

/// Ports of the host that runs a task, and ports of every host.
fn ports(cx: &mut Cx, f: &Fields<'_>, spec: &mut ServiceSpec) {
    let Some((node, path)) = f.get("ports") else { return };
    let (host, everywhere) = (&mut spec.task.ports, &mut spec.ingress);
    // Each is compared with those before it, also where it is one of them.
    let mut given = 0;
    for (i, item) in cx.list(node, &path).iter().enumerate() {
        let path = format!("{path}[{i}]");
        let (ports, ingress) = match &item.value {
            Value::Map(_) => port_long(cx, item, &path).unwrap_or_default(),
            _ => (cx.parsed(item, &path, values::ports_short).unwrap_or_default(), false),
        };
        given += ports.len();
        if given > PORTS_MAX {
            cx.error(item.pos, format!("{path}: a service publishes at most {PORTS_MAX} ports"));
            break;
        }
        for port in ports {
            let clash = |p: &&PortPublish| {
                p.host_port != 0
                    && (p.host_port, p.protocol) == (port.host_port, port.protocol)
                    && (ingress || p.host_ip == port.host_ip || p.host_ip.is_none() || port.host_ip.is_none())
            };
            let new = IngressPort { protocol: port.protocol, published: port.host_port, target: port.container_port };
            let meets = |p: &&IngressPort| (p.published, p.protocol) == (new.published, new.protocol);
            let twice = host.iter().any(|p| clash(&p) && (ingress || *p != port));
            if twice || everywhere.iter().any(|p| meets(&p) && (!ingress || *p != new)) {
                cx.error(item.pos, format!("{path}: the host's port {} is published twice", port.host_port));
            } else if ingress && !everywhere.contains(&new) {
                everywhere.push(new);
            } else if !ingress && !host.contains(&port) {
                host.push(port);
            }
        }
    }
}

/// The ports, and whether they are ports of every host.
fn port_long(cx: &mut Cx, node: &Node, path: &str) -> Option<(Vec<PortPublish>, bool)> {
    let f = cx.fields(node, path, keys::PORT)?;
    let Some((target, target_path)) = f.get("target") else {
        cx.error(node.pos, format!("{path}: expected the key \"target\""));
        return None;
    };
    let protocol = f.get("protocol").and_then(|(n, p)| cx.parsed(n, &p, values::protocol)).unwrap_or_default();
    let host = f.get("published").and_then(|(n, p)| cx.text(n, &p));
    let host_ip = f
        .get("host_ip")
        .and_then(|(n, p)| cx.parsed(n, &p, |t| t.parse().map_err(|_| format!("expected an IP address, found {t:?}"))));
    const MODES: &[(&str, bool)] = &[("host", false), ("ingress", true)];
    let ingress = f.get("mode").and_then(|(node, path)| cx.one_of(node, &path, MODES)).unwrap_or(false);
    let ports = cx.parsed(target, &target_path, |t| values::pair_ports(t, host.as_deref(), host_ip, protocol))?;
    if ingress && ports.iter().any(|port| port.host_port == 0) {
        let message = format!("{path}: mode ingress expects the key \"published\": the port of every host");
        cx.error_hint(node.pos, message, "write for example {target: 80, published: 8080, mode: ingress}");
        return None;
    }
    if let Some((node, path)) = f.get("host_ip").filter(|_| ingress) {
        cx.error(node.pos, format!("{path}: a port of mode ingress is open on all addresses of every host"));
        return None;
    }
    Some((ports, ingress))
}

fn depends_on(cx: &mut Cx, f: &Fields<'_>) -> Vec<Need> {
    use DependencyCondition::{ServiceCompletedSuccessfully, ServiceHealthy, ServiceStarted};
    const CONDITIONS: &[(&str, DependencyCondition)] = &[
        ("service_started", ServiceStarted),
        ("service_healthy", ServiceHealthy),
        ("service_completed_successfully", ServiceCompletedSuccessfully),
    ];
    let Some((node, path)) = f.get("depends_on") else { return Vec::new() };
    let need =
        |on: &str, pos| Need { on: on.to_owned(), condition: ServiceStarted, required: true, by: "depends_on", pos };
    if !matches!(node.value, Value::Map(_)) {
        return cx.words(node, &path).iter().map(|(on, pos)| need(on, *pos)).collect();
    }
    let mut out = Vec::new();
    for (key, value) in cx.map(node, &path).unwrap_or_default() {
        let mut need = need(&key.text, key.pos);
        if let Some(f) = cx.fields(value, &format!("{path}.{}", key.text), keys::DEPENDS_ON) {
            if let Some((n, p)) = f.get("condition") {
                need.condition = cx.one_of(n, &p, CONDITIONS).unwrap_or_default();
            }
            need.required = f.get("required").and_then(|(n, p)| cx.bool(n, &p)).unwrap_or(true);
        }
        out.push(need);
    }
    out
}

fn implicit(on: &str, by: &'static str, pos: Pos) -> Need {
    Need { on: on.to_owned(), condition: DependencyCondition::ServiceStarted, required: true, by, pos }
}

fn links(cx: &mut Cx, f: &Fields<'_>, c: &mut ContainerSpec) -> Vec<Need> {
    let words = f.get("links").map(|(n, p)| cx.words(n, &p)).unwrap_or_default();
    let mut needs = Vec::new();
    for (text, pos) in words {
        let (target, alias) = text.split_once(':').unwrap_or((&text, &text));
        c.links.push(Link { target: target.into(), alias: alias.into() });
        needs.push(implicit(target, "links", pos));
    }
    needs
}

fn volumes_from(cx: &mut Cx, f: &Fields<'_>, c: &mut ContainerSpec) -> Vec<Need> {
    let Some((node, path)) = f.get("volumes_from") else { return Vec::new() };
    let mut needs = Vec::new();
    for (text, pos) in cx.words(node, &path) {
        let (rest, mode) = match text.rsplit_once(':') {
            Some((rest, mode @ ("ro" | "rw"))) => (rest, mode),
            _ => (text.as_str(), "rw"),
        };
        let from = match rest.strip_prefix("container:") {
            Some(container) => container,
            None => {
                needs.push(implicit(rest, "volumes_from", pos));
                rest
            }
        };
        if from.is_empty() || from.contains(':') {
            cx.error(pos, format!("{path}: expected SERVICE, SERVICE:ro or container:NAME, found {text:?}"));
        }
        c.volumes_from.push(VolumesFrom { from: from.into(), read_only: mode == "ro" });
    }
    needs
}

/// `network_mode`, `pid` and `ipc` of another one: `service:NAME` of the file, or `container:NAME` of the cluster.
fn namespaces(cx: &mut Cx, f: &Fields<'_>, c: &mut ContainerSpec) -> Vec<Need> {
    let mut needs = Vec::new();
    let all = [("network_mode", &mut c.share.network), ("pid", &mut c.share.pid), ("ipc", &mut c.share.ipc)];
    for (key, with) in all {
        let Some((node, path)) = f.get(key) else { continue };
        let Some(mode) = cx.word(node, &path) else { continue };
        let other = match mode.split_once(':') {
            Some(("service", other)) if !other.is_empty() => {
                needs.push(implicit(other, key, node.pos));
                other
            }
            Some(("container", other)) if !other.is_empty() => other,
            // Looked at with the networks.
            _ if key == "network_mode" => continue,
            _ => {
                let message = format!("{path}: {mode:?} is refused: expected \"service:NAME\" or \"container:NAME\"");
                cx.error_hint(node.pos, message, "remove the key if the service can do without it");
                continue;
            }
        };
        *with = Some(other.to_owned());
    }
    needs
}

fn networks(cx: &mut Cx, f: &Fields<'_>) -> Option<Vec<(NetworkAttachment, Pos)>> {
    if let Some((node, path)) = f.get("network_mode") {
        let mode = cx.word(node, &path).unwrap_or_default();
        if f.get("networks").is_some() {
            cx.error(node.pos, format!("{}: expected either \"network_mode\" or \"networks\", found both", f.path));
        }
        let shared = mode.starts_with("service:") || mode.starts_with("container:");
        if shared && f.get("ports").is_some() {
            cx.error(node.pos, format!("{path}: with the network of another one it has no ports of its own"));
        }
        if mode != "bridge" && !shared {
            let message = format!(
                "{path}: {mode:?} is refused: expected \"bridge\", the engine's own network, \"service:NAME\" or \
                 \"container:NAME\""
            );
            cx.error_hint(
                node.pos,
                message,
                "leave it out: services of a stack share an overlay network and find each other by name",
            );
        }
        return None;
    }
    let Some((node, path)) = f.get("networks") else { return Some(Vec::new()) };
    let attachment = |name: &str| NetworkAttachment { network: name.into(), ..NetworkAttachment::default() };
    if !matches!(node.value, Value::Map(_)) {
        return Some(cx.words(node, &path).iter().map(|(name, pos)| (attachment(name), *pos)).collect());
    }
    let mut out = Vec::new();
    for (key, value) in cx.map(node, &path).unwrap_or_default() {
        let mut to = attachment(&key.text);
        let mut priority = 0i64;
        if let Some(f) = cx.fields(value, &format!("{path}.{}", key.text), keys::SERVICE_NETWORK) {
            let aliases = f.get("aliases").map(|(n, p)| cx.words(n, &p)).unwrap_or_default();
            to.aliases = aliases.into_iter().map(|(a, _)| a).collect();
            to.ipv4 = f.get("ipv4_address").and_then(|(n, p)| cx.address(n, &p));
            to.ipv6 = f.get("ipv6_address").and_then(|(n, p)| cx.address(n, &p));
            priority = f.get("priority").and_then(|(n, p)| cx.number(n, &p)).unwrap_or(0);
        }
        out.push((priority, to, key.pos));
    }
    // Stable: networks of equal priority stay in the order of the file.
    out.sort_by_key(|(priority, ..)| std::cmp::Reverse(*priority));
    Some(out.into_iter().map(|(_, to, pos)| (to, pos)).collect())
}

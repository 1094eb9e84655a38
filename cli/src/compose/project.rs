//! The whole file: networks, volumes, and how services refer to them and to each other.
//!
//! Owns names in the cluster (`<stack>_<name>`), the default network, profiles, and cycles. Must not know files or
//! variables.

use std::collections::{BTreeMap, BTreeSet};

use skein_api::{
    Dependency, DependencyCondition, MountKind, NetworkAttachment, NetworkSpec, RestartCondition, StackSpec,
    did_you_mean,
};

use super::{
    keys,
    problem::{Pos, Problem},
    service::{Draft, Need, Surroundings, service},
    values,
    walk::{Cx, Fields},
    yaml::{Key, Node, Value},
};

/// Name of the network that services without `networks` share (Compose specification, "Networks").
const DEFAULT_NETWORK: &str = "default";

/// A network or volume of the top level.
struct Resource<T> {
    pos: Pos,
    /// Name in the cluster.
    name: String,
    /// What to make; none: it is external.
    spec: Option<T>,
    used: bool,
}

type Resources<T> = BTreeMap<String, Resource<T>>;

/// Reads a whole merged and interpolated file.
pub(super) fn project(
    cx: &mut Cx,
    root: &Node,
    stack: &str,
    profiles: &BTreeSet<String>,
    around: &Surroundings<'_>,
) -> Option<StackSpec> {
    let f = cx.fields(root, "", keys::TOP)?;
    let section = |key: &str| f.get(key).map(|(node, _)| node);
    let mut networks = resources(cx, section("networks"), "networks", stack, network);
    let mut volumes = resources(cx, section("volumes"), "volumes", stack, volume);
    let Some(services) = section("services") else {
        cx.error(Pos { line: 0, ..root.pos }, "expected the key \"services\" with at least one service");
        return None;
    };
    let mut drafts = Vec::new();
    for (Key { pos, text }, node) in cx.map(services, "services")? {
        if !text.starts_with("x-") {
            drafts.extend(service(cx, text, *pos, node, around));
        }
    }
    let keys: Vec<String> = drafts.iter().map(|d| d.key.clone()).collect();
    let left_out = leave_out(cx, &mut drafts, profiles);
    dependencies(cx, &mut drafts, &keys, &left_out);
    cycles(cx, &drafts);
    container_names(cx, &drafts);
    jobs(&mut drafts);
    for draft in &mut drafts {
        attach(cx, draft, stack, &mut networks);
        mount(cx, draft, &mut volumes);
        qualify(draft, stack, &keys);
        for affinity in &mut draft.spec.task.placement.affinities {
            let volume = |name: &str| volumes.get(name).map(|volume| volume.name.clone());
            let service = |name: &str| keys.iter().any(|key| key == name).then(|| format!("{stack}_{name}"));
            if let Some(full) = full_affinity(affinity, service, volume) {
                *affinity = full;
            }
        }
    }
    link_names(&mut drafts);
    unused(cx, &networks, "network");
    unused(cx, &volumes, "volume");
    let names = |all: Vec<(String, bool)>, external| -> Vec<String> {
        let set: BTreeSet<String> = all.into_iter().filter(|(_, e)| *e == external).map(|(n, _)| n).collect();
        set.into_iter().collect()
    };
    let used_volumes = volumes.into_values().filter(|v| v.used).map(|v| (v.name, v.spec.is_none())).collect();
    let used_networks: Vec<_> = networks.into_values().filter(|n| n.used).collect();
    let external = used_networks.iter().map(|n| (n.name.clone(), n.spec.is_none())).collect();
    Some(StackSpec {
        name: stack.to_owned(),
        external_networks: names(external, true),
        networks: used_networks.into_iter().filter_map(|n| n.spec).collect(),
        volumes: names(used_volumes, false),
        services: drafts.into_iter().map(|d| d.spec).collect(),
    })
}

/// Reads a section of the top level: `read` gives what to make of one entry that is not external.
fn resources<T>(
    cx: &mut Cx,
    section: Option<&Node>,
    path: &str,
    stack: &str,
    read: fn(&mut Cx, &Fields<'_>, &str, &str) -> T,
) -> Resources<T> {
    let mut out = Resources::new();
    let Some(section) = section else { return out };
    let table = if path == "networks" { keys::NETWORK } else { keys::VOLUME };
    for (Key { pos, text }, node) in cx.map(section, path).unwrap_or_default() {
        if text.starts_with("x-") {
            continue;
        }
        let Some(f) = cx.fields(node, &format!("{path}.{text}"), table) else { continue };
        if let Err(e) = values::check_name(path.trim_end_matches('s'), text) {
            cx.error(*pos, e);
        }
        let given = f.get("name").and_then(|(n, p)| cx.word(n, &p));
        let (external, old_name) = external(cx, &f);
        let name = match (external, given.or(old_name)) {
            (_, Some(name)) => name,
            (true, None) => text.clone(),
            (false, None) => format!("{stack}_{text}"),
        };
        if let Err(e) = values::check_name(path.trim_end_matches('s'), &name) {
            cx.error(*pos, e);
        }
        let spec = if external {
            for (key, _) in table.iter().filter(|(k, _)| !matches!(*k, "external" | "name")) {
                if let (Some(at), Some(_)) = (f.key_pos(key), f.get(key)) {
                    cx.error(
                        at,
                        format!(
                            "{}.{key}: the {} is external, nothing else can be said of it",
                            f.path,
                            path.trim_end_matches('s')
                        ),
                    );
                }
            }
            None
        } else {
            Some(read(cx, &f, &name, stack))
        };
        out.insert(text.clone(), Resource { pos: *pos, name, spec, used: false });
    }
    out
}

/// `external: true`, or the older `external: {name: x}`.
fn external(cx: &mut Cx, f: &Fields<'_>) -> (bool, Option<String>) {
    let Some((node, path)) = f.get("external") else { return (false, None) };
    match &node.value {
        Value::Map(_) => {
            let name = cx.fields(node, &path, &[("name", keys::Support::Yes)]).and_then(|f| f.get("name"));
            let name = name.and_then(|(n, p)| cx.word(n, &p));
            (true, name)
        }
        _ => (cx.bool(node, &path).unwrap_or(false), None),
    }
}

fn network(cx: &mut Cx, f: &Fields<'_>, name: &str, stack: &str) -> NetworkSpec {
    let mut spec = NetworkSpec { name: name.to_owned(), stack: Some(stack.to_owned()), ..Default::default() };
    if let Some((node, path)) = f.get("driver") {
        match cx.word(node, &path).as_deref() {
            Some("overlay" | "default") | None => {}
            Some("bridge") => {
                cx.warn(node.pos, format!("{path}: \"bridge\" becomes an overlay network over all hosts"))
            }
            Some(other) => cx.error_hint(
                node.pos,
                format!("{path}: the driver {other:?} is refused: networks of a cluster are overlays"),
                "remove the key",
            ),
        }
    }
    if let Some((node, path)) = f.get("driver_opts") {
        for (key, _) in cx.map(node, &path).unwrap_or_default() {
            if key.text == "encrypted" {
                cx.error(key.pos, format!("{path}.encrypted is refused: encryption is not supported yet"));
            } else {
                cx.no_effect(key.pos, format!("{path}.{} has no effect: not supported yet", key.text));
            }
        }
    }
    let mut flag = |key| f.get(key).and_then(|(n, p)| cx.bool(n, &p)).unwrap_or(false);
    spec.internal = flag("internal");
    spec.attachable = flag("attachable");
    if let Some((node, path)) = f.get("labels") {
        let entries = cx.entries(node, &path, &['=']);
        spec.labels = entries.into_iter().map(|e| (e.name, e.value.unwrap_or_default())).collect();
    }
    if let Some((node, path)) = f.get("ipam")
        && let Some(f) = cx.fields(node, &path, keys::IPAM)
    {
        ipam(cx, &f, &mut spec);
    }
    spec
}

fn ipam(cx: &mut Cx, f: &Fields<'_>, spec: &mut NetworkSpec) {
    if let Some((node, path)) = f.get("driver")
        && let Some(driver) = cx.word(node, &path).filter(|d| d != "default")
    {
        cx.error(node.pos, format!("{path}: the driver {driver:?} is refused: addresses are given out by the overlay"));
    }
    let Some((node, path)) = f.get("config") else { return };
    for (i, item) in cx.list(node, &path).iter().enumerate() {
        let Some(f) = cx.fields(item, &format!("{path}[{i}]"), keys::IPAM_CONFIG) else { continue };
        let Some((node, path)) = f.get("subnet") else { continue };
        let subnet = cx.parsed(node, &path, |t| {
            t.parse::<ipnet::IpNet>().map_err(|_| format!("expected a subnet such as 10.5.0.0/16, found {t:?}"))
        });
        match subnet {
            Some(ipnet::IpNet::V4(net)) if net.trunc() != net => {
                let message = format!("{path}: expected the first address of the subnet, {}, found {net}", net.trunc());
                cx.error(node.pos, message);
            }
            Some(ipnet::IpNet::V4(_)) if spec.subnet4.is_some() => {
                cx.error(node.pos, format!("{path}: a network has one IPv4 subnet, found a second one"));
            }
            Some(ipnet::IpNet::V4(net)) => spec.subnet4 = Some(net),
            Some(ipnet::IpNet::V6(_)) => {
                cx.no_effect(node.pos, format!("{path} has no effect: the cluster chooses IPv6 subnets"));
            }
            None => {}
        }
    }
}

/// The driver of a volume; none: the engine's own.
fn volume(cx: &mut Cx, f: &Fields<'_>, _name: &str, _stack: &str) -> Option<String> {
    let (node, path) = f.get("driver")?;
    cx.word(node, &path).filter(|driver| driver != "local")
}

/// Takes the services out whose profiles are not active, as Compose does; gives back their names.
fn leave_out(cx: &mut Cx, drafts: &mut Vec<Draft>, active: &BTreeSet<String>) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    drafts.retain(|draft| {
        let on = draft.profiles.is_empty() || active.contains("*") || draft.profiles.iter().any(|p| active.contains(p));
        if !on {
            let problem =
                Problem::at(draft.pos, format!("services.{} is left out: none of its profiles is active", draft.key));
            cx.warnings.push(problem.hint(format!("--profile {}", draft.profiles[0])));
            out.insert(draft.key.clone());
        }
        on
    });
    out
}

fn dependencies(cx: &mut Cx, drafts: &mut [Draft], keys: &[String], left_out: &BTreeSet<String>) {
    for draft in drafts {
        let name = draft.key.clone();
        draft.needs.retain(|need| {
            let Need { on, by, pos, required, .. } = need;
            if keys.contains(on) && !left_out.contains(on) {
                return true;
            }
            if !required {
                cx.warn(*pos, format!("services.{name}.{by}: {on:?} is not there and not required"));
            } else if left_out.contains(on) {
                cx.error(
                    *pos,
                    format!("services.{name}.{by}: the service {on:?} is left out: none of its profiles is active"),
                );
            } else {
                let problem =
                    Problem::at(*pos, format!("services.{name}.{by}: there is no service {on:?} in the file"));
                let meant = did_you_mean(on, keys.iter().map(String::as_str));
                cx.errors.push(match meant {
                    Some(meant) => problem.hint(format!("did you mean {meant:?}?")),
                    None => problem,
                });
            }
            false
        });
        // What was said in depends_on stands before what links and volumes_from imply: the first of a name counts.
        let mut seen = BTreeSet::new();
        draft.spec.depends_on = draft
            .needs
            .iter()
            .filter(|n| seen.insert(n.on.clone()))
            .map(|n| Dependency { service: n.on.clone(), condition: n.condition })
            .collect();
    }
}

/// Reports the first cycle that is found from each service, each cycle once, with the place of every step.
fn cycles(cx: &mut Cx, drafts: &[Draft]) {
    let by_key: BTreeMap<&str, &Draft> = drafts.iter().map(|d| (d.key.as_str(), d)).collect();
    let mut done = BTreeSet::new();
    for draft in drafts {
        // Iterative: a chain may be as long as the file.
        let mut path: Vec<(&Draft, usize)> = vec![(draft, 0)];
        while let Some((at, next)) = path.last_mut() {
            let Some(need) = at.needs.get(*next) else {
                done.insert(at.key.as_str());
                path.pop();
                continue;
            };
            *next += 1;
            if let Some(start) = path.iter().position(|(d, _)| d.key == need.on) {
                let cycle = &path[start..];
                let names: Vec<&str> = cycle.iter().map(|(d, _)| d.key.as_str()).chain([need.on.as_str()]).collect();
                let steps = cycle.iter().map(|(d, next)| (d, &d.needs[next - 1]));
                let notes: Vec<_> =
                    steps.map(|(d, n)| (n.pos, format!("{} needs {} ({})", d.key, n.on, n.by))).collect();
                let mut problem =
                    Problem::general(format!("services need each other in a circle: {}", names.join(" -> ")));
                problem.notes = notes;
                cx.errors.push(problem);
            } else if let Some(on) = by_key.get(need.on.as_str()).filter(|d| !done.contains(d.key.as_str())) {
                path.push((on, 0));
            }
        }
    }
}

fn container_names(cx: &mut Cx, drafts: &[Draft]) {
    let mut seen: BTreeMap<&str, &Draft> = BTreeMap::new();
    for draft in drafts {
        let Some(name) = &draft.spec.task.container.container_name else { continue };
        if let Some(first) = seen.insert(name, draft) {
            let mut problem = Problem::at(
                draft.pos,
                format!("services.{} and services.{} have the same container_name {name:?}", first.key, draft.key),
            );
            problem.notes.push((first.pos, "the other one".into()));
            cx.errors.push(problem);
        }
    }
}

/// A service that others wait for until it completes must be able to: without word from the user it is replaced only
/// when it failed, or its host was lost.
fn jobs(drafts: &mut [Draft]) {
    let awaited: BTreeSet<String> = drafts
        .iter()
        .flat_map(|d| &d.spec.depends_on)
        .filter(|d| d.condition == DependencyCondition::ServiceCompletedSuccessfully)
        .map(|d| d.service.clone())
        .collect();
    for draft in drafts.iter_mut().filter(|d| !d.restart_given && awaited.contains(&d.key)) {
        draft.spec.task.restart.condition = RestartCondition::OnFailure;
    }
}

fn attach(cx: &mut Cx, draft: &mut Draft, stack: &str, networks: &mut Resources<NetworkSpec>) {
    let Some(mut attachments) = draft.networks.take() else { return };
    if attachments.is_empty() {
        attachments
            .push((NetworkAttachment { network: DEFAULT_NETWORK.into(), ..NetworkAttachment::default() }, draft.pos));
    }
    for (mut attachment, pos) in attachments {
        if attachment.network == DEFAULT_NETWORK {
            networks.entry(DEFAULT_NETWORK.into()).or_insert_with(|| {
                let name = format!("{stack}_{DEFAULT_NETWORK}");
                let spec = NetworkSpec { name: name.clone(), stack: Some(stack.into()), ..Default::default() };
                Resource { pos, name, spec: Some(spec), used: true }
            });
        }
        let known: Vec<String> = networks.keys().cloned().collect();
        match networks.get_mut(&attachment.network) {
            Some(network) => {
                network.used = true;
                attachment.network.clone_from(&network.name);
                let given = &mut draft.spec.task.networks;
                if given.iter().any(|a| a.network == attachment.network) {
                    cx.error(pos, format!("services.{}.networks: {:?} is given twice", draft.key, attachment.network));
                } else {
                    given.push(attachment);
                }
            }
            None => undefined(cx, &draft.key, "network", &attachment.network, pos, &known),
        }
    }
}

fn mount(cx: &mut Cx, draft: &mut Draft, volumes: &mut Resources<Option<String>>) {
    let known: Vec<String> = volumes.keys().cloned().collect();
    for (mount, pos) in draft.spec.task.container.mounts.iter_mut().zip(&draft.mounts_pos) {
        let (MountKind::Volume, Some(source)) = (mount.kind, &mut mount.source) else { continue };
        match volumes.get_mut(source) {
            Some(volume) => {
                volume.used = true;
                mount.volume_driver = volume.spec.clone().flatten();
                source.clone_from(&volume.name);
            }
            None => undefined(cx, &draft.key, "volume", source, *pos, &known),
        }
    }
}

fn undefined(cx: &mut Cx, service: &str, kind: &str, name: &str, pos: Pos, known: &[String]) {
    let hint = match did_you_mean(name, known.iter().map(String::as_str)) {
        Some(meant) => format!("did you mean {meant:?}?"),
        None => format!("add it to {kind}s: at the top level, with `external: true` if it is there already"),
    };
    cx.error_hint(pos, format!("services.{service}: there is no {kind} {name:?} in the file"), hint);
}

/// Turns the names of the file into the cluster's.
fn qualify(draft: &mut Draft, stack: &str, keys: &[String]) {
    let full = |key: &str| format!("{stack}_{key}");
    let spec = &mut draft.spec;
    spec.name = full(&draft.key);
    spec.stack = Some(stack.to_owned());
    for dependency in &mut spec.depends_on {
        dependency.service = full(&dependency.service);
    }
    for link in &mut spec.task.container.links {
        link.target = full(&link.target);
    }
    for from in &mut spec.task.container.volumes_from {
        // `container:NAME` names a container of the cluster, unless a service of the file was meant.
        if draft.needs.iter().any(|n| n.by == "volumes_from" && n.on == from.from) && keys.contains(&from.from) {
            from.from = full(&from.from);
        }
    }
    let share = &mut spec.task.container.share;
    for (key, with) in [("network_mode", &mut share.network), ("pid", &mut share.pid), ("ipc", &mut share.ipc)] {
        let Some(with) = with else { continue };
        if draft.needs.iter().any(|n| n.by == key && n.on == *with) {
            *with = full(with);
        }
    }
}

/// An affinity to a service or volume of the file, by its name in the cluster; none for any other. Only a plain name
/// can be one of the file: a glob or regex is about names in the cluster.
fn full_affinity(
    text: &str,
    service: impl Fn(&str) -> Option<String>,
    volume: impl Fn(&str) -> Option<String>,
) -> Option<String> {
    let op_at = text.find("==").or_else(|| text.find("!="))?;
    let (key, rest) = text.split_at(op_at);
    let value_at = if rest[2..].starts_with('~') { 3 } else { 2 };
    let (op, value) = rest.split_at(value_at);
    let full = match key.trim().trim_start_matches("affinity:").trim() {
        "service" => service(value.trim()),
        "volume" => volume(value.trim()),
        _ => None,
    }?;
    Some(format!("{key}{op}{full}"))
}

/// Makes a link's other name an alias of its target, in the networks that the two share: the agents' DNS has no names
/// that a single container sees.
fn link_names(drafts: &mut [Draft]) {
    let mut names = Vec::new();
    for task in drafts.iter().map(|d| &d.spec.task) {
        let networks: Vec<String> = task.networks.iter().map(|n| n.network.clone()).collect();
        names.extend(task.container.links.iter().map(|l| (l.target.clone(), l.alias.clone(), networks.clone())));
    }
    for (target, alias, networks) in names {
        for draft in drafts.iter_mut().filter(|d| d.spec.name == target && d.key != alias) {
            let shared = draft.spec.task.networks.iter_mut().filter(|n| networks.contains(&n.network));
            for attachment in shared.filter(|n| !n.aliases.contains(&alias)) {
                attachment.aliases.push(alias.clone());
            }
        }
    }
}

fn unused<T>(cx: &mut Cx, resources: &Resources<T>, kind: &str) {
    for (key, resource) in resources.iter().filter(|(_, r)| !r.used) {
        cx.warn(resource.pos, format!("the {kind} {key:?} is not used by any service and not made"));
    }
}

//! `deploy`, and the older keys of a service that say the same: replicas, resources, restarts, placement.
//!
//! Owns what happens when both are given: the same value is fine, different ones are an error.

use std::collections::BTreeMap;

use skein_api::{
    DeviceRequest, EndpointMode, LABEL_KEY_EXPECTED, PREFERENCES_MAX, Placement, Preference, RestartCondition,
    RestartPolicy, ServiceMode, ServiceSpec, Strategy, UpdateConfig, UpdateOrder, is_label_key,
};

use super::{
    keys,
    problem::Pos,
    values,
    walk::{Cx, Fields},
    yaml::{Node, Value},
};

/// A value, where it stands, and the path of its key.
type Given<T> = Option<(T, Pos, String)>;

/// Reads `deploy` and its older forms into `spec`. True when the file says how to restart.
pub(super) fn deploy(cx: &mut Cx, f: &Fields<'_>, pos: Pos, spec: &mut ServiceSpec) -> bool {
    let d = f.get("deploy").and_then(|(node, path)| cx.fields(node, &path, keys::DEPLOY));
    mode(cx, f, d.as_ref(), pos, spec);
    resources(cx, f, d.as_ref(), spec);
    let restart_given = restart(cx, f, d.as_ref(), spec);
    let Some(d) = d else { return restart_given };
    if let Some((node, path)) = d.get("labels") {
        let entries = cx.entries(node, &path, &['=']);
        spec.labels = entries.into_iter().map(|e| (e.name, e.value.unwrap_or_default())).collect();
    }
    const ENDPOINT_MODES: &[(&str, EndpointMode)] = &[("vip", EndpointMode::Vip), ("dnsrr", EndpointMode::Dnsrr)];
    if let Some(mode) = d.get("endpoint_mode").and_then(|(node, path)| cx.one_of(node, &path, ENDPOINT_MODES)) {
        spec.endpoint_mode = mode;
    }
    if let Some((node, path)) = d.get("update_config")
        && let Some(u) = cx.fields(node, &path, keys::UPDATE_CONFIG)
    {
        spec.update = update(cx, &u);
    }
    if let Some(own) = d.get("x-skein").and_then(|(node, path)| cx.fields(node, &path, keys::DEPLOY_OWN)) {
        spec.drain_ms = own.get("drain").and_then(|(node, path)| cx.parsed(node, &path, values::duration_ms));
    }
    if let Some((node, path)) = d.get("placement")
        && let Some(p) = cx.fields(node, &path, keys::PLACEMENT)
    {
        placement(cx, &p, &mut spec.task.placement);
    }
    restart_given
}

/// How tasks follow a change; one at a time where the file does not say (the specification's default).
fn update(cx: &mut Cx, u: &Fields<'_>) -> UpdateConfig {
    const ORDERS: &[(&str, UpdateOrder)] =
        &[("stop-first", UpdateOrder::StopFirst), ("start-first", UpdateOrder::StartFirst)];
    const ACTIONS: &[(&str, bool)] = &[("pause", true), ("continue", false), ("rollback", false)];
    if let Some((node, path)) = u.get("failure_action")
        && cx.one_of(node, &path, ACTIONS) == Some(false)
    {
        let message = format!("{path}: only pause is supported yet: what fails holds the other tasks back");
        cx.no_effect(node.pos, message);
    }
    UpdateConfig {
        order: u.get("order").and_then(|(n, p)| cx.one_of(n, &p, ORDERS)).unwrap_or_default(),
        parallelism: u.get("parallelism").and_then(|(n, p)| cx.number(n, &p)).unwrap_or(1),
        delay_ms: u.get("delay").and_then(|(n, p)| cx.parsed(n, &p, values::duration_ms)).unwrap_or(0),
    }
}

fn placement(cx: &mut Cx, p: &Fields<'_>, placement: &mut Placement) {
    let list = |cx: &mut Cx, f: &Fields<'_>, key: &str| -> Vec<String> {
        let words = f.get(key).map(|(node, path)| cx.words(node, &path)).unwrap_or_default();
        words.into_iter().map(|(word, _)| word).collect()
    };
    placement.constraints.extend(list(cx, p, "constraints"));
    placement.max_replicas_per_node = p.get("max_replicas_per_node").and_then(|(n, p)| cx.number(n, &p)).unwrap_or(0);
    if let Some((node, path)) = p.get("preferences") {
        for (i, item) in cx.list(node, &path).iter().enumerate() {
            let path = format!("{path}[{i}]");
            let Some(f) = cx.fields(item, &path, keys::PREFERENCE) else { continue };
            match f.get("spread") {
                Some((node, path)) => placement.preferences.extend(cx.word(node, &path).map(Preference::Spread)),
                None => {
                    cx.error(item.pos, format!("{path}: expected the key \"spread\", such as spread: node.labels.zone"))
                }
            }
        }
        if let Some(more) = cx.list(node, &path).get(PREFERENCES_MAX) {
            cx.error(more.pos, format!("{path}: at most {PREFERENCES_MAX} preferences"));
        }
    }
    let Some(own) = p.get("x-skein").and_then(|(node, path)| cx.fields(node, &path, keys::PLACEMENT_OWN)) else {
        return;
    };
    const STRATEGIES: &[(&str, Strategy)] =
        &[("spread", Strategy::Spread), ("binpack", Strategy::Binpack), ("random", Strategy::Random)];
    placement.strategy = own.get("strategy").and_then(|(node, path)| cx.one_of(node, &path, STRATEGIES));
    placement.priority = own.get("priority").and_then(|(node, path)| cx.number(node, &path)).unwrap_or(0);
    placement.preempt = own.get("preempt").and_then(|(node, path)| cx.bool(node, &path)).unwrap_or(false);
    placement.affinities.extend(list(cx, &own, "affinities"));
    placement.network_plugins.extend(list(cx, &own, "network_plugins"));
    if let Some((node, path)) = own.get("whitelist") {
        let names: Vec<String> = cx.word_or_words(node, &path).into_iter().map(|(name, _)| name).collect();
        match names.is_empty() {
            true => cx.error(node.pos, format!("{path}: expected names of nodes, found none")),
            false => placement.whitelists.push(format!("node=={}", names.join("|"))),
        }
    }
}

/// One value of two keys that mean the same.
fn either<T: PartialEq + Copy>(cx: &mut Cx, a: Given<T>, b: Given<T>) -> Option<T> {
    if let (Some((x, pos, a)), Some((y, other, b))) = (&a, &b)
        && x != y
    {
        cx.error(*pos, format!("{a} and {b} differ: give one of them, or both the same value"));
        if let Some(problem) = cx.errors.last_mut() {
            problem.notes.push((*other, "the other one".into()));
        }
    }
    a.or(b).map(|(v, ..)| v)
}

fn mode(cx: &mut Cx, f: &Fields<'_>, d: Option<&Fields<'_>>, pos: Pos, spec: &mut ServiceSpec) {
    let mut number = |f: Option<&Fields<'_>>, key: &str| -> Given<u32> {
        let (node, path) = f?.get(key)?;
        Some((cx.number(node, &path)?, node.pos, path))
    };
    let (scale, replicas) = (number(Some(f), "scale"), number(d, "replicas"));
    let count = either(cx, scale, replicas);
    let global = d.and_then(|d| d.get("mode")).and_then(|(node, path)| {
        let word = cx.word(node, &path)?;
        match word.as_str() {
            "replicated" => Some(false),
            "global" => {
                if count.is_some() {
                    cx.error(node.pos, format!("{path}: a global service has no number of replicas"));
                }
                Some(true)
            }
            "replicated-job" | "global-job" => {
                cx.error_hint(
                    node.pos,
                    format!("{path}: jobs are not supported yet"),
                    "use `restart: \"no\"` and let others wait with `condition: service_completed_successfully`",
                );
                None
            }
            _ => {
                cx.error(node.pos, format!("{path}: expected replicated or global, found {word:?}"));
                None
            }
        }
    });
    spec.mode = if global == Some(true) { ServiceMode::Global } else { ServiceMode::Replicated(count.unwrap_or(1)) };
    let several = match spec.mode {
        ServiceMode::Global => Some("one on each node".to_owned()),
        ServiceMode::Replicated(n) if n > 1 => Some(n.to_string()),
        ServiceMode::Replicated(_) => None,
    };
    if let (Some(several), Some(name)) = (several, &spec.task.container.container_name) {
        let at = f.key_pos("container_name").unwrap_or(pos);
        let message =
            format!("{}: container_name {name:?} is for one container, but the service has {several}", f.path);
        cx.error_hint(at, message, "remove container_name; the service's name reaches all its tasks");
    }
}

fn resources(cx: &mut Cx, f: &Fields<'_>, d: Option<&Fields<'_>>, spec: &mut ServiceSpec) {
    let r = d.and_then(|d| d.get("resources")).and_then(|(n, p)| cx.fields(n, &p, keys::RESOURCES));
    let r = r.as_ref();
    let limits = r.and_then(|r| r.get("limits")).and_then(|(n, p)| cx.fields(n, &p, keys::LIMITS));
    let kept = r.and_then(|r| r.get("reservations")).and_then(|(n, p)| cx.fields(n, &p, keys::RESERVATIONS));
    let (limits, kept) = (limits.as_ref(), kept.as_ref());
    let mut read = |f: Option<&Fields<'_>>, key: &str, parse: fn(&str) -> Result<u64, String>| -> Given<u64> {
        let (node, path) = f?.get(key)?;
        Some((cx.parsed(node, &path, parse)?, node.pos, path))
    };
    let mem_limit = (read(Some(f), "mem_limit", values::size_bytes), read(limits, "memory", values::size_bytes));
    let mem_kept = (read(Some(f), "mem_reservation", values::size_bytes), read(kept, "memory", values::size_bytes));
    let cpus = (read(Some(f), "cpus", values::nano_cpus), read(limits, "cpus", values::nano_cpus));
    let cpus_kept = read(kept, "cpus", values::nano_cpus);
    let at = [&mem_kept.0, &mem_kept.1].into_iter().flatten().next().map(|(_, pos, _)| *pos);
    let cpus_at = cpus_kept.as_ref().map(|(_, pos, _)| *pos);
    let res = &mut spec.task.resources;
    res.limits.mem_bytes = either(cx, mem_limit.0, mem_limit.1).unwrap_or(0);
    res.reservations.mem_bytes = either(cx, mem_kept.0, mem_kept.1).unwrap_or(0);
    res.limits.nano_cpus = either(cx, cpus.0, cpus.1).unwrap_or(0);
    res.reservations.nano_cpus = cpus_kept.map_or(0, |(v, ..)| v);
    res.generic = kept.map(|kept| generic_resources(cx, kept)).unwrap_or_default();
    let wanted = kept.and_then(|kept| kept.get("devices"));
    if let Some((node, path)) = wanted {
        devices(cx, node, &path, None, spec);
    }
    if let Some((node, path)) = f.get("gpus") {
        match node.value {
            Value::Scalar { .. } => cx.error_hint(
                node.pos,
                format!("{path}: expected a list with counts: each GPU is set aside for one container"),
                "write for example gpus: [{count: 1}]",
            ),
            _ => devices(cx, node, &path, Some("gpu"), spec),
        }
    }
    let res = &spec.task.resources;
    let over = |kept: u64, limit: u64| limit > 0 && kept > limit;
    if let (Some(at), true) = (at, over(res.reservations.mem_bytes, res.limits.mem_bytes)) {
        cx.error(at, format!("{}: more memory is reserved than the limit allows", f.path));
    }
    if let (Some(at), true) = (cpus_at, over(res.reservations.nano_cpus, res.limits.nano_cpus)) {
        cx.error(at, format!("{}: more CPUs are reserved than the limit allows", f.path));
    }
}

/// Kinds and how many of each.
fn generic_resources(cx: &mut Cx, kept: &Fields<'_>) -> BTreeMap<String, u64> {
    let mut kinds = BTreeMap::new();
    let Some((node, path)) = kept.get("generic_resources") else { return kinds };
    for (i, item) in cx.list(node, &path).iter().enumerate() {
        let path = format!("{path}[{i}]");
        let Some(f) = cx.fields(item, &path, keys::GENERIC_RESOURCE) else { continue };
        let spec = f.get("discrete_resource_spec").and_then(|(n, p)| cx.fields(n, &p, keys::DISCRETE_RESOURCE));
        let Some(spec) = spec else {
            cx.error(item.pos, format!("{path}: expected the key \"discrete_resource_spec\" with kind and value"));
            continue;
        };
        let kind = spec.get("kind").and_then(|(n, p)| cx.word(n, &p));
        let value = spec.get("value").and_then(|(n, p)| cx.number::<u64>(n, &p));
        let (Some(kind), Some(value)) = (kind, value) else {
            if spec.get("kind").is_none() || spec.get("value").is_none() {
                cx.error(item.pos, format!("{}: expected the keys \"kind\" and \"value\"", spec.path));
            }
            continue;
        };
        if !is_label_key(&kind) {
            cx.error(item.pos, format!("{}: {kind:?} is no kind: expected {LABEL_KEY_EXPECTED}", spec.path));
        } else if kinds.insert(kind.clone(), value).is_some() {
            cx.error(item.pos, format!("{path}: the kind {kind:?} is given twice"));
        }
    }
    kinds
}

/// Devices: each is asked of the engine, and counted as the generic resource that its first capability names. In `gpus`
/// that is `gpu`, said or not.
fn devices(cx: &mut Cx, node: &Node, path: &str, first: Option<&str>, spec: &mut ServiceSpec) {
    for (i, item) in cx.list(node, path).iter().enumerate() {
        let path = format!("{path}[{i}]");
        let Some(f) = cx.fields(item, &path, keys::DEVICE) else { continue };
        let words = f.get("capabilities").map(|(n, p)| cx.words(n, &p)).unwrap_or_default();
        let words = words.into_iter().map(|(word, _)| word).filter(|word| Some(word.as_str()) != first);
        let capabilities: Vec<String> = first.map(str::to_owned).into_iter().chain(words).collect();
        let Some(kind) = capabilities.first().cloned().filter(|kind| is_label_key(kind)) else {
            cx.error(item.pos, format!("{path}: expected the key \"capabilities\", such as capabilities: [gpu]"));
            continue;
        };
        let count = match f.get("count") {
            Some((n, p)) => cx.parsed(n, &p, |text| match text.parse::<u64>() {
                Ok(count) if count > 0 => Ok(count),
                // The engine's word for what nobody else uses, which a cluster cannot know.
                _ if matches!(text, "all" | "-1") => {
                    Err("all devices of a host cannot be asked for: say how many".into())
                }
                _ => Err(format!("expected a whole number above 0, found {text:?}")),
            }),
            None => {
                cx.error(item.pos, format!("{path}: expected the key \"count\", such as count: 1"));
                None
            }
        };
        let driver = f.get("driver").and_then(|(n, p)| cx.word(n, &p)).unwrap_or_default();
        let options = f.get("options").map(|(n, p)| cx.entries(n, &p, &['='])).unwrap_or_default();
        let options = options.into_iter().map(|e| (e.name, e.value.unwrap_or_default())).collect();
        if spec.task.resources.generic.insert(kind.clone(), count.unwrap_or(0)).is_some() {
            cx.error(item.pos, format!("{path}: the kind {kind:?} is given twice"));
        }
        spec.task.container.devices.push(DeviceRequest { kind, driver, capabilities, options });
    }
}

/// `no`, `always`, `unless-stopped`, `on-failure[:attempts]`.
pub(crate) fn parse_restart(text: &str) -> Result<RestartPolicy, String> {
    let policy = |condition, max_attempts| RestartPolicy { condition, max_attempts, ..Default::default() };
    match text {
        "no" | "false" => Ok(policy(RestartCondition::None, None)),
        "always" | "unless-stopped" => Ok(policy(RestartCondition::Any, None)),
        "on-failure" => Ok(policy(RestartCondition::OnFailure, None)),
        _ => match text.strip_prefix("on-failure:").map(str::parse::<u32>) {
            Some(Ok(n)) => Ok(policy(RestartCondition::OnFailure, (n > 0).then_some(n))),
            _ => Err(format!("expected no, always, unless-stopped or on-failure[:attempts], found {text:?}")),
        },
    }
}

fn restart(cx: &mut Cx, f: &Fields<'_>, d: Option<&Fields<'_>>, spec: &mut ServiceSpec) -> bool {
    let old = f.get("restart").and_then(|(n, p)| cx.parsed(n, &p, parse_restart).map(|r| (r, n.pos, p)));
    let new = d.and_then(|d| d.get("restart_policy"));
    let Some((node, path)) = new else {
        let given = old.is_some();
        spec.task.restart = old.map(|(r, ..)| r).unwrap_or_default();
        return given;
    };
    if let Some((_, pos, old)) = old {
        cx.warn(pos, format!("{old} has no effect: {path} is given and wins"));
    }
    let Some(r) = cx.fields(node, &path, keys::RESTART_POLICY) else { return true };
    const CONDITIONS: &[(&str, RestartCondition)] = &[
        ("none", RestartCondition::None),
        ("on-failure", RestartCondition::OnFailure),
        ("any", RestartCondition::Any),
    ];
    let mut policy = RestartPolicy::default();
    if let Some((n, p)) = r.get("condition") {
        policy.condition = cx.one_of(n, &p, CONDITIONS).unwrap_or_default();
    }
    if let Some((n, p)) = r.get("delay") {
        policy.delay_ms = cx.parsed(n, &p, values::duration_ms).unwrap_or_default();
    }
    policy.max_attempts = r.get("max_attempts").and_then(|(n, p)| cx.number(n, &p));
    policy.window_ms = r.get("window").and_then(|(n, p)| cx.parsed(n, &p, values::duration_ms)).unwrap_or(0);
    spec.task.restart = policy;
    true
}

//! Who belongs to the cluster: tokens, joining, describing and removing nodes.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use skein_api::{
    ATTACHED_MAX, ATTACHED_NAMES_MAX, ApiError, AttachedContainer, FREEZES_MAX, GENERIC_IDS_MAX, GENERIC_KINDS_MAX,
    GenericOffer, LABELS_MAX, Node, NodeDescription, NodeId, NodeSpec, NodeUpdate, OVERCOMMIT_PERCENT, Task, TaskState,
    TaskStatus, Token, TokenCreate, TokenId, UnixMillis, check_node_label, is_label_key,
};

use crate::{
    command::{Context, Decision, Now, Reply},
    core::Core,
    lookup::not_found,
    meta,
    model::{Change, Cluster, Key, Kind, Object, RemovedNode, block_id},
    rng::Rng,
};

/// How far a joining host's clock may be off. Certificates are valid for 24 h, their renewal starts at half of it,
/// and times in listings come from hosts: five minutes disturb none of these, more is a host to be mended first.
const CLOCK_SKEW_MAX_MS: u64 = 5 * 60 * 1_000;

/// How long tokens are kept that are of no use any more, so that a refusal can say why: a week.
const TOKEN_KEPT_MS: u64 = 7 * 24 * 3_600 * 1_000;

/// How long a removed node is remembered: the longest life of its certificate, 24 h, and the clock skew on both sides
/// with room to spare.
const REMOVED_KEPT_MS: u64 = 25 * 3_600 * 1_000;

/// Routes of a host that are kept, for the choice of subnets: a host with a full routing table has a million, which say
/// nothing about private subnets.
const ROUTES_MAX: usize = 4_096;

/// Networks in which a host's engine runs containers by itself.
const PLAIN_NETWORKS_MAX: usize = 1_024;

/// Resolvers that a host may report; it asks three.
const RESOLVERS_MAX: usize = 16;

/// Addresses of the largest block, a /24.
const BLOCK_ADDRESSES_MAX: usize = 256;

/// Shorter prefixes are default routes in parts, and would leave no subnet.
const ROUTE_PREFIX_MIN: u8 = 8;

/// Longest lifetime of a token: a year.
const TOKEN_TTL_S_MAX: u64 = 365 * 24 * 3_600;

/// Refuses a host whose clock is far off.
///
/// # Errors
/// `clock_off`, saying how far and in which direction.
pub fn check_clock(host: UnixMillis, master: UnixMillis) -> Result<(), ApiError> {
    let (ahead, off_ms) = (host > master, host.0.abs_diff(master.0));
    if off_ms <= CLOCK_SKEW_MAX_MS {
        return Ok(());
    }
    let direction = if ahead { "ahead of" } else { "behind" };
    let message =
        format!("the host's clock is {} s {direction} the master's; at most 300 s are allowed", off_ms / 1_000);
    Err(ApiError::new("clock_off", message).with_hint("set the host's clock, for example: chronyc makestep"))
}

impl Core {
    pub(crate) fn init_cluster(&self, cluster: &Cluster) -> Decision {
        if self.model.cluster.is_some() {
            return Err(ApiError::new("conflict", "the cluster is there already"));
        }
        Ok((vec![Change::Upsert(Object::Cluster(Box::new(cluster.clone())))], Reply::Done))
    }

    pub(crate) fn join(
        &self,
        token: &TokenId,
        secret_sha256: &str,
        key_digest: &str,
        description: &NodeDescription,
        clock: UnixMillis,
        ctx: &Context,
    ) -> Decision {
        let now = ctx.now.wall;
        let known = self.model.tokens.get(token).filter(|t| t.secret_sha256 == secret_sha256);
        let Some(token) = known else {
            return Err(ApiError::new("token_unknown", format!("join token {token} is not one of this cluster's"))
                .with_hint("skein token create"));
        };
        check_clock(clock, now)?;
        if let Some(node) = self.model.node_of_key(key_digest) {
            // The answer to an earlier attempt was lost: the same key is the same node, and uses no more of the token.
            return Ok((Vec::new(), Reply::Node(node.id.clone())));
        }
        if token.expires_at <= now {
            let ago_s = now.since_ms(token.expires_at) / 1_000;
            return Err(ApiError::new("token_expired", format!("join token {} expired {ago_s} s ago", token.id))
                .with_hint("skein token create"));
        }
        if token.uses >= token.uses_max {
            let message = format!("join token {} was for {} hosts, which have joined", token.id, token.uses_max);
            return Err(ApiError::new("token_used_up", message).with_hint("skein token create --uses N"));
        }
        let name = &description.hostname;
        check_name("node", name)?;
        if let Some(other) = self.model.node_named(name) {
            let message = format!("a node named {name} is there already ({})", other.id.short());
            return Err(ApiError::new("name_taken", message)
                .with_hint(format!("skein node rm {name}, or join with: skein-agent join --name OTHER")));
        }
        let description = self.admit_description(None, description)?;
        let cluster = self.model.cluster.clone().ok_or_else(|| ApiError::new("not_ready", "no cluster yet"))?;
        let host_index = self.free_host_index(cluster.last_host_index)?;
        let node = Node {
            id: NodeId::new(Rng::new(ctx.seed).id()),
            meta: meta::created(ctx),
            name: name.clone(),
            spec: NodeSpec { labels: token.node_labels.clone(), ..NodeSpec::default() },
            description,
            host_index,
            key_digest: key_digest.to_owned(),
            status: None,
        };
        let id = node.id.clone();
        let used = Token { uses: token.uses + 1, meta: meta::changed(&token.meta, ctx, false), ..token.clone() };
        let changes = vec![
            Change::Upsert(Object::Cluster(Box::new(Cluster { last_host_index: host_index, ..cluster }))),
            Change::Upsert(Object::Token(used)),
            Change::Upsert(Object::Node(Box::new(node))),
        ];
        Ok((changes, Reply::Node(id)))
    }

    /// The next host index after the last one given, skipping those in use; 1 to 65,534.
    pub(crate) fn free_host_index(&self, last: u16) -> Result<u16, ApiError> {
        let following = (last.saturating_add(1)..u16::MAX).chain(1..=last);
        following
            .into_iter()
            .find(|index| *index != 0 && !self.model.has_host_index(*index))
            .ok_or_else(|| ApiError::new("cluster_full", "the overlay numbers at most 65,534 hosts"))
    }

    pub(crate) fn describe(&self, node: &NodeId, description: &NodeDescription, ctx: &Context) -> Decision {
        let Some(known) = self.model.nodes.get(node) else {
            return Err(not_found("node", node.as_str(), "node ls"));
        };
        let description = self.admit_description(Some(node), description)?;
        if known.description == description {
            return Ok((Vec::new(), Reply::Done));
        }
        let node = Node { description, meta: meta::changed(&known.meta, ctx, false), ..known.clone() };
        Ok((vec![Change::Upsert(Object::Node(Box::new(node)))], Reply::Done))
    }

    /// What a host says of itself, as far as it may: an agent must not take another host's traffic, nor block every subnet.
    fn admit_description(&self, node: Option<&NodeId>, said: &NodeDescription) -> Result<NodeDescription, ApiError> {
        let addresses = said.underlay4.map(IpAddr::V4).into_iter().chain(said.underlay6.map(IpAddr::V6));
        let mut same = addresses.flat_map(|address| self.model.nodes_at(address));
        // A host that is not heard of may have been set up anew under another name.
        if let Some(other) = same.find(|other| Some(&other.id) != node && self.is_ready(&other.id)) {
            let message = format!("node {} is ready and has this host's underlay address", other.name);
            return Err(ApiError::new("address_taken", message)
                .with_hint("give each host an address of its own, or set `underlay` in the agent's configuration"));
        }
        let mut description = said.clone();
        description.routes.retain(|r| r.prefix_len() >= ROUTE_PREFIX_MIN);
        description.routes.truncate(ROUTES_MAX);
        admit_attached(&mut description.attached);
        description.resolvers.truncate(RESOLVERS_MAX);
        while description.frozen.len() > FREEZES_MAX {
            description.frozen.pop_last();
        }
        while description.plain_addresses.len() > PLAIN_NETWORKS_MAX {
            description.plain_addresses.pop_last();
        }
        // What does not fit is no answer: it must not look as if fewer were in use.
        description.frozen.retain(|_, in_use| in_use.len() <= BLOCK_ADDRESSES_MAX);
        admit_labels(&mut description.labels);
        admit_labels(&mut description.engine_labels);
        admit_generic(&mut description.generic);
        description.overcommit = said.overcommit.filter(|ratio| {
            OVERCOMMIT_PERCENT.contains(&ratio.cpu_percent) && OVERCOMMIT_PERCENT.contains(&ratio.memory_percent)
        });
        Ok(description)
    }

    pub(crate) fn node_update(&self, reference: &str, update: &NodeUpdate, ctx: &Context) -> Decision {
        let known = self.model.find_node(reference)?;
        let mut spec = known.spec.clone();
        for (key, value) in &update.labels_add {
            check_label(key, value)?;
            spec.labels.insert(key.clone(), value.clone());
        }
        for key in &update.labels_remove {
            if spec.labels.remove(key).is_none() {
                return Err(ApiError::new("not_found", format!("node {} has no label {key:?}", known.name))
                    .with_hint(format!("skein node inspect {}", known.name)));
            }
        }
        check_label_count(spec.labels.len())?;
        spec.availability = update.availability.unwrap_or(spec.availability);
        if spec == known.spec {
            return Ok((Vec::new(), Reply::Node(known.id.clone())));
        }
        let node = Node { spec, meta: meta::changed(&known.meta, ctx, true), ..known.clone() };
        let id = node.id.clone();
        Ok((vec![Change::Upsert(Object::Node(Box::new(node)))], Reply::Node(id)))
    }

    pub(crate) fn node_remove(&self, reference: &str, force: bool, ctx: &Context) -> Decision {
        let node = self.model.find_node(reference)?;
        if self.is_ready(&node.id) && !force {
            return Err(ApiError::new("node_ready", format!("node {} is ready and may run tasks", node.name))
                .with_hint(format!("skein node drain {0}, then skein node rm --force {0}", node.name)));
        }
        if !force && let Some(lost) = self.lost_with(node) {
            return Err(ApiError::new("in_use", format!("node {} has {lost}, which would be gone with it", node.name))
                .with_hint(format!("skein node rm --force {}", node.name)));
        }
        let blocks = || self.model.blocks.values().filter(|b| b.node == node.id);
        let mut changes = vec![
            Change::Delete(Key { kind: Kind::Node, id: node.id.to_string() }),
            Change::Upsert(Object::RemovedNode(RemovedNode {
                id: node.id.clone(),
                name: node.name.clone(),
                key_digest: node.key_digest.clone(),
                removed_at: ctx.now.wall,
                blocks: blocks().map(|b| (b.network.clone(), b.index)).collect(),
            })),
        ];
        let delete = |kind, id| Change::Delete(Key { kind, id });
        changes.extend(self.model.node_tasks(&node.id).map(|task| match task_without_node(task, ctx) {
            Some(task) => Change::Upsert(Object::Task(Arc::new(task))),
            None => delete(Kind::Task, task.id.to_string()),
        }));
        changes.extend(blocks().map(|b| delete(Kind::Block, block_id(&b.network, b.index))));
        let volumes = self.model.volumes.values().filter(|v| v.node == node.id);
        changes.extend(volumes.map(|v| delete(Kind::Volume, v.id.to_string())));
        Ok((changes, Reply::Node(node.id.clone())))
    }

    /// What only this host has, in words: volumes and container tasks are replaced nowhere.
    fn lost_with(&self, node: &Node) -> Option<String> {
        /// More than that help nobody.
        const SHOWN_MAX: usize = 3;
        let volumes = self.model.volumes.values().filter(|v| v.node == node.id).map(|v| format!("volume {}", v.name));
        let tasks = self.model.node_tasks(&node.id).filter(|t| t.service.is_none());
        let mut all: Vec<String> = volumes.chain(tasks.map(|t| format!("container task {}", t.name))).collect();
        if all.len() > SHOWN_MAX {
            let more = all.split_off(SHOWN_MAX).len();
            all.push(format!("{more} more"));
        }
        (!all.is_empty()).then(|| all.join(", "))
    }

    pub(crate) fn token_create(
        &self,
        id: &TokenId,
        secret_sha256: &str,
        request: &TokenCreate,
        ctx: &Context,
    ) -> Decision {
        if request.ttl_s == 0 || request.ttl_s > TOKEN_TTL_S_MAX {
            return Err(ApiError::new("bad_request", format!("ttl_s {} is not 1 to {TOKEN_TTL_S_MAX}", request.ttl_s)));
        }
        if request.uses == 0 {
            return Err(ApiError::new("bad_request", "uses must be at least 1"));
        }
        for (key, value) in &request.node_labels {
            check_label(key, value)?;
        }
        check_label_count(request.node_labels.len())?;
        let token = Token {
            id: id.clone(),
            meta: meta::created(ctx),
            secret_sha256: secret_sha256.to_owned(),
            expires_at: ctx.now.wall.plus_ms(request.ttl_s * 1_000),
            uses_max: request.uses,
            uses: 0,
            node_labels: request.node_labels.clone(),
        };
        Ok((vec![Change::Upsert(Object::Token(token))], Reply::Done))
    }

    /// Forgets tokens and removed nodes that nobody can ask for any more.
    pub(crate) fn expire(&mut self, now: Now) {
        let over = |since: UnixMillis, kept_ms| since.plus_ms(kept_ms) <= now.wall;
        let useless = |t: &&Token| {
            over(t.expires_at, TOKEN_KEPT_MS) || (t.uses >= t.uses_max && over(t.meta.updated_at, TOKEN_KEPT_MS))
        };
        let tokens = self.model.tokens.values().filter(useless).map(|t| (Kind::Token, t.id.to_string()));
        let removed = self.model.removed_nodes.values().filter(|n| over(n.removed_at, REMOVED_KEPT_MS));
        let keys: Vec<_> = tokens.chain(removed.map(|n| (Kind::RemovedNode, n.id.to_string()))).collect();
        for (kind, id) in keys {
            self.stage(Change::Delete(Key { kind, id }));
        }
    }

    pub(crate) fn token_revoke(&self, id: &TokenId) -> Decision {
        if !self.model.tokens.contains_key(id) {
            return Err(not_found("token", id.as_str(), "token ls"));
        }
        Ok((vec![Change::Delete(Key { kind: Kind::Token, id: id.to_string() })], Reply::Done))
    }
}

/// A service task whose node is gone stays known, so that its successor counts on and what was completed is not done
/// again; a container task, and what was to be removed anyway, is gone.
fn task_without_node(task: &Task, ctx: &Context) -> Option<Task> {
    if task.service.is_none() || task.desired_state == TaskState::Remove {
        return None;
    }
    let status = if task.status.state.is_terminal() {
        task.status.clone()
    } else {
        let (state, message) = (TaskState::Orphaned, "its node was removed".to_owned());
        TaskStatus { state, since: ctx.now.wall, message, addresses: Vec::new(), ..task.status.clone() }
    };
    let meta = meta::changed(&task.meta, ctx, false);
    Some(Task { node: None, status, desired_state: TaskState::Shutdown, meta, ..task.clone() })
}

/// Longest name: a DNS label.
const NAME_MAX: usize = 63;

/// Keeps of containers that were started by hand what can be names, within the bounds.
fn admit_attached(attached: &mut Vec<AttachedContainer>) {
    attached.truncate(ATTACHED_MAX);
    for container in attached.iter_mut() {
        container.names.retain(|name| check_name("container", name).is_ok());
        container.names.truncate(ATTACHED_NAMES_MAX);
    }
    attached.retain(|container| !container.names.is_empty());
    attached.sort();
    attached.dedup_by(|a, b| (&a.id, &a.network) == (&b.id, &b.network));
}

/// Refuses names that DNS, the engine or a shell would trip over: `[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}`.
pub(crate) fn check_name(kind: &str, name: &str) -> Result<(), ApiError> {
    let body = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let valid =
        name.len() <= NAME_MAX && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(body);
    if valid {
        return Ok(());
    }
    let message = format!("{kind} name {name:?} is not letters, digits, `_`, `.` and `-`, 1 to {NAME_MAX} of them");
    Err(ApiError::new("bad_name", message))
}

fn check_label(key: &str, value: &str) -> Result<(), ApiError> {
    let code = if is_label_key(key) { "bad_request" } else { "bad_name" };
    check_node_label(key, value).map_err(|message| ApiError::new(code, message))
}

fn check_label_count(count: usize) -> Result<(), ApiError> {
    if count <= LABELS_MAX {
        return Ok(());
    }
    Err(ApiError::new("bad_request", format!("{count} labels of one node, at most {LABELS_MAX} are possible")))
}

/// The labels that a host may have; the others are left out, as an engine's may be anything.
fn admit_labels(labels: &mut BTreeMap<String, String>) {
    labels.retain(|key, value| check_node_label(key, value).is_ok());
    while labels.len() > LABELS_MAX {
        labels.pop_last();
    }
}

/// The generic resources that a host may have.
fn admit_generic(generic: &mut BTreeMap<String, GenericOffer>) {
    generic.retain(|kind, offer| match offer {
        GenericOffer::Count(_) => is_label_key(kind),
        GenericOffer::Named(ids) => is_label_key(kind) && ids.len() <= GENERIC_IDS_MAX,
    });
    while generic.len() > GENERIC_KINDS_MAX {
        generic.pop_last();
    }
}

//! What a task asks for, compiled once: parsed expressions, amounts and ports, and the filters in their order.
//!
//! Owns the order of the filters and how each is named to a user. It must not know which nodes there are. Pure, no
//! tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use skein_api::{
    MountKind, NodeId, PREFERENCES_MAX, PortPublish, Preference as PreferenceSpec, Protocol, Resources, ServiceId,
    Strategy, TaskId, TaskSpec,
};

use super::{
    expr::{
        AFFINITY_PREFIX, Affinity, AnyAffinity, CONSTRAINT_PREFIX, Constraint, ConstraintError, ExprKind, Expression,
        NodeKey, Platform, WHITELIST_PREFIX, list_error, parse_affinity, parse_constraint, parse_platform,
        parse_preference, parse_whitelist,
    },
    facts::{Dimension, HostAddr, Placed, TaskAttr, amounts, image_names, service_names},
};

/// Expressions of one request, constraints, affinities and whitelists together: the soft ones are bits of a `u64` in
/// a rank.
pub const EXPRESSIONS_MAX: usize = 64;

/// Labels of a container that hold expressions as a JSON list (Docker Swarm's names).
const CONSTRAINTS_LABEL: &str = "com.docker.swarm.constraints";
const AFFINITIES_LABEL: &str = "com.docker.swarm.affinities";
const WHITELISTS_LABEL: &str = "com.docker.swarm.whitelists";

/// The volume driver that every engine has.
const LOCAL_DRIVER: &str = "local";

/// A task's needs, ready for any number of placements. Compile once per specification, not once per task.
#[derive(Clone, Debug)]
pub struct Request {
    pub(super) service: Option<ServiceId>,
    pub(super) service_name: String,
    pub(super) pins: Vec<Pin>,
    pub(super) whitelists: Vec<Constraint>,
    pub(super) constraints: Vec<Constraint>,
    pub(super) volume_affinities: Vec<Constraint>,
    pub(super) affinities: Vec<Affinity>,
    pub(super) soft: Vec<Soft>,
    pub(super) platform: Option<Platform>,
    pub(super) volume_plugins: BTreeSet<String>,
    pub(super) network_plugins: BTreeSet<String>,
    pub(super) reservations: Resources,
    pub(super) generic: BTreeMap<String, u64>,
    /// What a task takes of a node, by dimension; never 0.
    pub(super) asks: Vec<(Dimension, u64)>,
    /// With a fixed host port, each claim once.
    pub(super) ports: Vec<PortPublish>,
    /// 0: no limit.
    pub(super) max_replicas: u32,
    /// The outer before the inner.
    pub(super) preferences: Vec<Preference>,
    pub(super) strategy: Strategy,
    pub(super) image: String,
    pub(super) labels: BTreeMap<String, String>,
}

/// A set of nodes of which one must be taken, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pin {
    /// Ids that no node has are allowed; an empty set fits nowhere.
    pub nodes: BTreeSet<NodeId>,
    /// In a few words: `volume pgdata lives there`, `volumes_from web runs there`.
    pub reason: String,
}

/// An attribute over whose values the tasks of a service are spread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Preference {
    /// As the user wrote it.
    pub(super) text: String,
    pub(super) key: NodeKey,
}

/// An expression that is given up when no node would be left.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Soft {
    Constraint(Constraint),
    VolumeAffinity(Constraint),
    Affinity(Affinity),
}

impl Soft {
    fn filter(&self) -> Filter<'_> {
        match self {
            Self::Constraint(constraint) => Filter::Constraint(constraint),
            Self::VolumeAffinity(affinity) => Filter::VolumeAffinity(affinity),
            Self::Affinity(affinity) => Filter::Affinity(affinity),
        }
    }
}

impl Request {
    /// Compiles a task's needs.
    ///
    /// Expressions come from the placement, from the container's environment and from its labels
    /// ([`expressions_from_env`], [`expressions_from_labels`]); the same expression twice counts once.
    /// `service` is the service whose replicas are counted; [`Request::in_service`] adds its name. `default` is the
    /// cluster's strategy. A `pin` ties the task to nodes; [`Request::pinned`] adds more.
    ///
    /// # Errors
    /// The first expression that does not parse, or one above [`EXPRESSIONS_MAX`] or [`PREFERENCES_MAX`].
    pub fn compile(
        spec: &TaskSpec,
        service: Option<ServiceId>,
        pin: Option<Pin>,
        default: Strategy,
    ) -> Result<Self, ConstraintError> {
        let (container, placement) = (&spec.container, &spec.placement);
        let drivers = container.mounts.iter().filter(|mount| mount.kind == MountKind::Volume);
        let drivers = drivers.filter_map(|mount| mount.volume_driver.clone()).filter(|driver| driver != LOCAL_DRIVER);
        let generic: BTreeMap<_, _> =
            spec.resources.generic.iter().filter(|(_, n)| **n > 0).map(|(kind, n)| (kind.clone(), *n)).collect();
        let mut request = Self {
            service,
            service_name: String::new(),
            pins: pin.into_iter().collect(),
            whitelists: Vec::new(),
            constraints: Vec::new(),
            volume_affinities: Vec::new(),
            affinities: Vec::new(),
            soft: Vec::new(),
            platform: container.platform.as_deref().map(parse_platform).transpose()?,
            volume_plugins: drivers.collect(),
            network_plugins: placement.network_plugins.iter().cloned().collect(),
            reservations: spec.resources.reservations,
            asks: amounts(spec.resources.reservations, &generic).collect(),
            generic,
            ports: Vec::new(),
            max_replicas: placement.max_replicas_per_node,
            preferences: Vec::new(),
            strategy: placement.strategy.unwrap_or(default),
            image: container.image.clone(),
            labels: container.labels.clone(),
        };
        request.add_expressions(spec)?;
        request.add_preferences(&placement.preferences)?;
        for port in spec.ports.iter().filter(|port| port.host_port != 0) {
            if !request.ports.iter().any(|known| claim(known) == claim(port)) {
                request.ports.push(*port);
            }
        }
        Ok(request)
    }

    /// As a task of the service of that name.
    pub fn in_service(self, name: impl Into<String>) -> Self {
        Self { service_name: name.into(), ..self }
    }

    fn add_expressions(&mut self, spec: &TaskSpec) -> Result<(), ConstraintError> {
        let (placement, from_env) = (&spec.placement, expressions_from_env(&spec.container.env));
        let from_labels = expressions_from_labels(&spec.container.labels)?;
        for text in placement.whitelists.iter().chain(&from_env.whitelists).chain(&from_labels.whitelists) {
            self.check_count(ExprKind::Whitelist, text)?;
            let whitelist = parse_whitelist(text)?;
            if !self.whitelists.contains(&whitelist) {
                self.whitelists.push(whitelist);
            }
        }
        for text in placement.constraints.iter().chain(&from_env.constraints).chain(&from_labels.constraints) {
            self.check_count(ExprKind::Constraint, text)?;
            add(parse_constraint(text)?, &mut self.constraints, &mut self.soft, Soft::Constraint);
        }
        for text in placement.affinities.iter().chain(&from_env.affinities).chain(&from_labels.affinities) {
            self.check_count(ExprKind::Affinity, text)?;
            match parse_affinity(text)? {
                AnyAffinity::Tasks(affinity) => add(affinity, &mut self.affinities, &mut self.soft, Soft::Affinity),
                AnyAffinity::Volumes(affinity) => {
                    add(affinity, &mut self.volume_affinities, &mut self.soft, Soft::VolumeAffinity)
                }
            }
        }
        Ok(())
    }

    fn add_preferences(&mut self, preferences: &[PreferenceSpec]) -> Result<(), ConstraintError> {
        for PreferenceSpec::Spread(text) in preferences {
            if self.preferences.len() == PREFERENCES_MAX {
                let expected = format!("no more than {PREFERENCES_MAX} preferences");
                return Err(list_error(ExprKind::Preference, text, 1, expected));
            }
            let preference = Preference { text: text.trim().to_owned(), key: parse_preference(text)? };
            // A second time it would tell nothing apart.
            if self.preferences.iter().all(|known| known.key != preference.key) {
                self.preferences.push(preference);
            }
        }
        Ok(())
    }

    fn check_count(&self, kind: ExprKind, text: &str) -> Result<(), ConstraintError> {
        let constraints = self.whitelists.len() + self.constraints.len() + self.volume_affinities.len();
        if constraints + self.affinities.len() + self.soft.len() < EXPRESSIONS_MAX {
            return Ok(());
        }
        Err(list_error(kind, text, 1, format!("no more than {EXPRESSIONS_MAX} expressions in all")))
    }

    /// Only these nodes. Each call is a filter of its own, so that an explanation counts them apart.
    pub fn pinned(mut self, pin: Pin) -> Self {
        self.pins.push(pin);
        self
    }

    /// The strategy that chooses among the nodes that fit.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// What such a task sets aside on its node.
    pub fn reservations(&self) -> Resources {
        self.reservations
    }

    /// The task that such a request becomes on `node` under this name.
    pub fn placed(&self, task: TaskId, name: String, node: NodeId) -> Placed {
        Placed {
            task,
            node,
            service: self.service.clone(),
            service_name: self.service_name.clone(),
            name,
            image: self.image.clone(),
            labels: self.labels.clone(),
            reservations: self.reservations,
            generic: self.generic.clone(),
            ports: self.ports.clone(),
        }
    }

    /// Whether a task of this request on a node makes an affinity match there. Names are not known before a task
    /// has one, so affinities to a container do not see the request's own tasks.
    pub(super) fn matches_itself(&self, affinity: &Affinity) -> bool {
        match &affinity.key {
            TaskAttr::Container => false,
            TaskAttr::Image => image_names(&self.image).iter().any(|name| affinity.pattern.matches(name)),
            TaskAttr::Service => {
                service_names(self.service.as_ref(), &self.service_name).any(|name| affinity.pattern.matches(name))
            }
            TaskAttr::Label(key) => self.labels.get(key).is_some_and(|value| affinity.pattern.matches(value)),
        }
    }

    /// Whether an affinity looks for a container by its name: then a task of this request may be what the next one looks
    /// for, and a batch would not see it.
    pub fn looks_for_names(&self) -> bool {
        let by_name = |affinity: &Affinity| affinity.key == TaskAttr::Container;
        let soft_by_name = |soft: &Soft| matches!(soft, Soft::Affinity(affinity) if by_name(affinity));
        self.affinities.iter().any(by_name) || self.soft.iter().any(soft_by_name)
    }

    /// Whether two requests place their tasks alike, so that one class serves both.
    pub(super) fn same_class(&self, other: &Self) -> bool {
        self.service == other.service
            && self.service_name == other.service_name
            && self.pins == other.pins
            && self.whitelists == other.whitelists
            && self.constraints == other.constraints
            && self.volume_affinities == other.volume_affinities
            && self.affinities == other.affinities
            && self.soft == other.soft
            && self.platform == other.platform
            && self.volume_plugins == other.volume_plugins
            && self.network_plugins == other.network_plugins
            && self.asks == other.asks
            && self.ports == other.ports
            && self.max_replicas == other.max_replicas
            && self.preferences == other.preferences
            && self.strategy == other.strategy
            && self.image == other.image
            && self.labels == other.labels
    }

    /// Feeds what tells most classes apart to a hash.
    pub(super) fn hash_class(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash as _;
        self.service.as_ref().map(ServiceId::as_str).hash(hasher);
        self.constraints.iter().for_each(|constraint| constraint.text.hash(hasher));
        (self.reservations.nano_cpus, self.reservations.mem_bytes, &self.image, &self.labels).hash(hasher);
    }

    /// Whether placing it is worth a class: not what is tied to nodes or looks for single containers, since each such
    /// request is another, and not a choice by seed, which looks at all nodes anyway.
    pub(super) fn has_class(&self) -> bool {
        self.pins.is_empty() && !self.looks_for_names() && self.strategy != Strategy::Random
    }

    /// The hard filters in their order. Those that ask for nothing are left out.
    pub(super) fn filters(&self) -> Vec<Filter<'_>> {
        let mut filters = vec![Filter::Health, Filter::Availability];
        filters.extend(self.pins.iter().map(Filter::Pinned));
        filters.extend(self.whitelists.iter().map(Filter::Whitelist));
        filters.extend(self.constraints.iter().map(Filter::Constraint));
        filters.extend(self.volume_affinities.iter().map(Filter::VolumeAffinity));
        filters.extend(self.affinities.iter().map(Filter::Affinity));
        filters.extend(self.platform.iter().map(Filter::Platform));
        filters.extend(self.volume_plugins.iter().map(|name| Filter::VolumePlugin(name)));
        filters.extend(self.network_plugins.iter().map(|name| Filter::NetworkPlugin(name)));
        filters.extend(self.asks.iter().map(|(dimension, amount)| Filter::Amount(dimension, *amount)));
        filters.extend(self.ports.iter().map(Filter::Port));
        if let (Some(service), true) = (&self.service, self.max_replicas > 0) {
            filters.push(Filter::MaxReplicas { service, max: self.max_replicas });
        }
        filters
    }

    /// The soft expressions as filters, in the order in which they are tried.
    pub(super) fn soft_filters(&self) -> Vec<Filter<'_>> {
        self.soft.iter().map(Soft::filter).collect()
    }
}

/// Adds an expression to the hard ones of its kind or to the soft ones, unless it is there.
fn add<K>(
    expression: Expression<K>,
    hard: &mut Vec<Expression<K>>,
    soft: &mut Vec<Soft>,
    kind: fn(Expression<K>) -> Soft,
) {
    if !expression.soft {
        if !hard.contains(&expression) {
            hard.push(expression);
        }
        return;
    }
    let expression = kind(expression);
    if !soft.contains(&expression) {
        soft.push(expression);
    }
}

/// What two entries for the same claim have in common.
fn claim(port: &PortPublish) -> (Protocol, u16, HostAddr) {
    (port.protocol, port.host_port, HostAddr::of(port))
}

/// Which rule took nodes away; the text beside it says with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FilterKind {
    /// The node is not ready.
    Health,
    /// The node is paused or drained.
    Availability,
    /// A volume or a dependency lives elsewhere.
    Pinned,
    /// A set of nodes.
    Whitelist,
    /// A constraint expression.
    Constraint,
    /// An affinity expression.
    Affinity,
    /// Operating system or architecture.
    Platform,
    /// A volume or network plugin.
    Plugin,
    /// CPU, memory, generic resources or container slots.
    Resources,
    /// A port of the host.
    Port,
    /// Replicas of the service per node.
    MaxReplicas,
}

/// One filter of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Filter<'a> {
    Health,
    Availability,
    Pinned(&'a Pin),
    Whitelist(&'a Constraint),
    Constraint(&'a Constraint),
    /// Where volumes lie.
    VolumeAffinity(&'a Constraint),
    Affinity(&'a Affinity),
    Platform(&'a Platform),
    VolumePlugin(&'a str),
    NetworkPlugin(&'a str),
    Amount(&'a Dimension, u64),
    Port(&'a PortPublish),
    MaxReplicas {
        service: &'a ServiceId,
        max: u32,
    },
}

impl Filter<'_> {
    /// Whether this follows from what a node *is* rather than from its state and load, so that a node that does not
    /// pass now will only pass after someone changed its labels or the specification.
    pub(super) fn is_lasting(&self) -> bool {
        match self {
            Self::Pinned(_) | Self::Whitelist(_) | Self::Constraint(_) | Self::Platform(_) => true,
            Self::VolumePlugin(_) | Self::NetworkPlugin(_) => true,
            // Volumes come and go with the tasks that use them.
            Self::Health | Self::Availability | Self::Affinity(_) | Self::VolumeAffinity(_) => false,
            Self::Amount(..) | Self::Port(_) | Self::MaxReplicas { .. } => false,
        }
    }

    pub(super) fn kind(&self) -> FilterKind {
        match self {
            Self::Health => FilterKind::Health,
            Self::Availability => FilterKind::Availability,
            Self::Pinned(_) => FilterKind::Pinned,
            Self::Constraint(_) => FilterKind::Constraint,
            Self::Whitelist(_) => FilterKind::Whitelist,
            Self::Affinity(_) | Self::VolumeAffinity(_) => FilterKind::Affinity,
            Self::Platform(_) => FilterKind::Platform,
            Self::VolumePlugin(_) | Self::NetworkPlugin(_) => FilterKind::Plugin,
            Self::Amount(..) => FilterKind::Resources,
            Self::Port(_) => FilterKind::Port,
            Self::MaxReplicas { .. } => FilterKind::MaxReplicas,
        }
    }
}

impl fmt::Display for Filter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Health => f.write_str("node is ready"),
            Self::Availability => f.write_str("node is active"),
            Self::Pinned(pin) => f.write_str(&pin.reason),
            Self::Constraint(constraint) => write!(f, "constraint {constraint}"),
            Self::Whitelist(whitelist) => write!(f, "whitelist {whitelist}"),
            Self::VolumeAffinity(affinity) => write!(f, "affinity {affinity}"),
            Self::Affinity(affinity) => write!(f, "affinity {affinity}"),
            Self::Platform(Platform { os, arch }) if arch.is_empty() => write!(f, "platform {os}"),
            Self::Platform(Platform { os, arch }) if os.is_empty() => write!(f, "platform {arch}"),
            Self::Platform(Platform { os, arch }) => write!(f, "platform {os}/{arch}"),
            Self::VolumePlugin(name) => write!(f, "volume plugin {name}"),
            Self::NetworkPlugin(name) => write!(f, "network plugin {name}"),
            Self::Amount(Dimension::Cpu, nano_cpus) => write!(f, "cpu reservation {}", Cpus(*nano_cpus)),
            Self::Amount(Dimension::Memory, bytes) => write!(f, "memory reservation {}", Bytes(*bytes)),
            Self::Amount(Dimension::Generic(kind), count) => write!(f, "generic resource {kind} {count}"),
            Self::Amount(Dimension::Slots, _) => f.write_str("container slots"),
            Self::Port(port) => write!(f, "host port {}", HostPort(port)),
            Self::MaxReplicas { max, .. } => write!(f, "max replicas per node {max}"),
        }
    }
}

/// An amount of a dimension as users read it: `1.5 CPUs`, `2 GiB of memory`, `3 gpu`.
pub(super) struct Amount<'a>(pub(super) &'a Dimension, pub(super) u64);

impl fmt::Display for Amount<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Dimension::Cpu if self.1 == 1_000_000_000 => f.write_str("1 CPU"),
            Dimension::Cpu => write!(f, "{} CPUs", Cpus(self.1)),
            Dimension::Memory => write!(f, "{} of memory", Bytes(self.1)),
            Dimension::Generic(kind) => write!(f, "{} {kind}", self.1),
            Dimension::Slots if self.1 == 1 => f.write_str("1 container slot"),
            Dimension::Slots => write!(f, "{} container slots", self.1),
        }
    }
}

/// CPUs as users write them: `1.5`.
struct Cpus(u64);

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NANOS: u64 = 1_000_000_000;
        let fraction = format!("{:09}", self.0 % NANOS);
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{}", self.0 / NANOS),
            fraction => write!(f, "{}.{fraction}", self.0 / NANOS),
        }
    }
}

/// Bytes in the largest binary unit that shows them exactly, so that two different amounts never read the same.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match units.into_iter().find(|(_, size)| self.0 > 0 && self.0.is_multiple_of(*size)) {
            Some((unit, size)) => write!(f, "{} {unit}", self.0 / size),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// A published port as users write it: `80/tcp`, `10.0.0.1:53/udp`.
struct HostPort<'a>(&'a PortPublish);

impl fmt::Display for HostPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.host_ip {
            None => {}
            Some(IpAddr::V4(ip)) => write!(f, "{ip}:")?,
            Some(IpAddr::V6(ip)) => write!(f, "[{ip}]:")?,
        }
        let protocol = match self.0.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}/{protocol}", self.0.host_port)
    }
}

/// Expressions found outside the placement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expressions {
    /// With their prefix, as written.
    pub constraints: Vec<String>,
    /// With their prefix, as written.
    pub affinities: Vec<String>,
    /// With their prefix, as written.
    pub whitelists: Vec<String>,
}

/// The expressions in a container's environment (Docker Swarm: `-e constraint:disk==ssd`).
///
/// An environment is split at the first `=`, so the variable `constraint:disk` has the value `=ssd`; put together
/// again it is the expression. A variable without a value is an incomplete expression and is returned as such, so
/// that compiling it fails rather than ignoring it.
pub fn expressions_from_env(env: &BTreeMap<String, Option<String>>) -> Expressions {
    let mut found = Expressions::default();
    for (name, value) in env {
        let list = match name {
            _ if name.starts_with(CONSTRAINT_PREFIX) => &mut found.constraints,
            _ if name.starts_with(AFFINITY_PREFIX) => &mut found.affinities,
            _ if name.starts_with(WHITELIST_PREFIX) => &mut found.whitelists,
            _ => continue,
        };
        list.push(value.as_ref().map_or_else(|| name.clone(), |value| format!("{name}={value}")));
    }
    found
}

/// Whether a variable of this name steers placement and is not meant for the process in the container.
pub fn is_expression_variable(name: &str) -> bool {
    [CONSTRAINT_PREFIX, AFFINITY_PREFIX, WHITELIST_PREFIX].iter().any(|prefix| name.starts_with(prefix))
}

/// The expressions in a container's labels (Docker Swarm: `com.docker.swarm.constraints='["disk==ssd"]'`).
///
/// # Errors
/// A label of that name that is not a JSON list of strings; the column is within the label's value.
pub fn expressions_from_labels(labels: &BTreeMap<String, String>) -> Result<Expressions, ConstraintError> {
    let list = |label: &str, kind| match labels.get(label) {
        None => Ok(Vec::new()),
        Some(json) => serde_json::from_str::<Vec<String>>(json).map_err(|err| {
            list_error(kind, json, err.column(), format!("a JSON list of strings in the label {label}"))
        }),
    };
    Ok(Expressions {
        constraints: list(CONSTRAINTS_LABEL, ExprKind::Constraint)?,
        affinities: list(AFFINITIES_LABEL, ExprKind::Affinity)?,
        whitelists: list(WHITELISTS_LABEL, ExprKind::Whitelist)?,
    })
}

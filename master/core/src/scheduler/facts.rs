//! What the scheduler knows of nodes and tasks, free of the API's shapes.
//!
//! Owns the attributes that expressions can name and the overlap of published addresses. It must not know how the
//! facts are indexed. Pure, no tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use skein_api::{Availability, Node, NodeId, Overcommit, PortPublish, Resources, SLOTS_LABEL, ServiceId, TaskId};

use super::expr::NodeKey;

/// What is counted on a node. The order is that of the filters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dimension {
    /// Billionths of a CPU.
    Cpu,
    /// Bytes of memory.
    Memory,
    /// Things of this kind: GPUs, licences.
    Generic(String),
    /// Tasks; each takes one.
    Slots,
}

impl Dimension {
    /// In a word, for sentences.
    pub fn name(&self) -> &str {
        match self {
            Self::Cpu => "CPU",
            Self::Memory => "memory",
            Self::Generic(kind) => kind,
            Self::Slots => "container slots",
        }
    }
}

/// One node as the scheduler sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Identity.
    pub id: NodeId,
    /// Unique name in the cluster.
    pub name: String,
    /// Labels of the node: the operator's over the agent's own.
    pub labels: BTreeMap<String, String>,
    /// Labels of the engine.
    pub engine_labels: BTreeMap<String, String>,
    /// Data centre or other place; empty: none.
    pub site: String,
    /// The host's own name.
    pub hostname: String,
    /// `linux`.
    pub os: String,
    /// As Docker names it: `x86_64`, `aarch64`.
    pub arch: String,
    /// Name of the distribution.
    pub operating_system: String,
    /// Kernel release.
    pub kernel: String,
    /// Version of the engine.
    pub engine_version: String,
    /// Storage driver of the engine.
    pub storage_driver: String,
    /// What the engine runs containers with.
    pub execution_driver: String,
    /// Addresses in the underlay.
    pub addresses: Vec<String>,
    /// Whether new tasks may come.
    pub availability: Availability,
    /// Whether the node is there.
    pub ready: bool,
    /// What the cluster may set aside of it: what the agent offers, times the overcommit ratio.
    pub offered: Resources,
    /// How many there are of each kind of generic resource.
    pub generic: BTreeMap<String, u64>,
    /// Most tasks that may hold a place; none: no limit.
    pub slots: Option<u64>,
    /// Names of the cluster's volumes that live here.
    pub volumes: BTreeSet<String>,
    /// Volume plugins of the engine.
    pub volume_plugins: Vec<String>,
    /// Network plugins of the engine.
    pub network_plugins: Vec<String>,
}

impl NodeFacts {
    /// The facts of a node. `ready` is the caller's knowledge of its liveness, `overcommit` the cluster's ratio for
    /// nodes that have none of their own.
    pub fn new(node: &Node, ready: bool, overcommit: Overcommit) -> Self {
        let said = &node.description;
        let mut labels = said.labels.clone();
        labels.extend(node.spec.labels.clone());
        let slots = labels.get(SLOTS_LABEL).or_else(|| said.engine_labels.get(SLOTS_LABEL));
        let ips = [said.underlay4.map(|ip| ip.to_string()), said.underlay6.map(|ip| ip.to_string())];
        Self {
            id: node.id.clone(),
            name: node.name.clone(),
            // Checked where it comes in; what is not a number limits nothing.
            slots: slots.and_then(|text| text.parse().ok()),
            labels,
            engine_labels: said.engine_labels.clone(),
            site: said.site.clone(),
            hostname: said.hostname.clone(),
            os: said.os.clone(),
            arch: said.arch.clone(),
            operating_system: said.operating_system.clone(),
            kernel: said.kernel.clone(),
            engine_version: said.engine_version.clone(),
            storage_driver: said.storage_driver.clone(),
            execution_driver: said.execution_driver.clone(),
            addresses: ips.into_iter().flatten().collect(),
            availability: node.spec.availability,
            ready,
            offered: committed(said.offered, said.overcommit.unwrap_or(overcommit)),
            generic: said.generic.iter().map(|(kind, offer)| (kind.clone(), offer.count())).collect(),
            volumes: BTreeSet::new(),
            volume_plugins: said.volume_plugins.clone(),
            network_plugins: said.network_plugins.clone(),
        }
    }

    /// With these volumes living here.
    pub fn with_volumes(self, volumes: impl IntoIterator<Item = String>) -> Self {
        Self { volumes: volumes.into_iter().collect(), ..self }
    }

    /// How much of a dimension may be set aside here; none: any amount. A kind that the node does not have is 0.
    pub fn offer(&self, dimension: &Dimension) -> Option<u64> {
        match dimension {
            Dimension::Cpu => Some(self.offered.nano_cpus),
            Dimension::Memory => Some(self.offered.mem_bytes),
            Dimension::Generic(kind) => Some(self.generic.get(kind).copied().unwrap_or(0)),
            Dimension::Slots => self.slots,
        }
    }

    /// Whether expressions, plugins and generic resources see the same node, whatever its state.
    pub(super) fn is_same_host(&self, other: &Self) -> bool {
        self.generic == other.generic && self.attributes().eq(other.attributes())
    }

    /// Whether new tasks may come.
    pub(super) fn takes_tasks(&self) -> bool {
        self.ready && self.availability == Availability::Active
    }

    /// Whether what runs here stays: the node is there and not drained.
    pub(super) fn keeps_tasks(&self) -> bool {
        self.ready && self.availability != Availability::Drain
    }

    /// The value by which preferences tell nodes apart: the first one of the first attribute that the node has; empty
    /// where it has none.
    pub(super) fn value_of(&self, key: &NodeKey) -> &str {
        let (NodeKey::Any(attrs) | NodeKey::First(attrs)) = key;
        attrs.iter().find_map(|attr| self.value(attr)).unwrap_or_default()
    }

    /// The first value of an attribute; O(1) or O(log labels).
    fn value(&self, attr: &NodeAttr) -> Option<&str> {
        let text = match attr {
            NodeAttr::Id => self.id.as_str(),
            NodeAttr::Name => &self.name,
            NodeAttr::Hostname => &self.hostname,
            NodeAttr::Role => ROLE,
            NodeAttr::Site => &self.site,
            NodeAttr::Os => &self.os,
            NodeAttr::Arch => &self.arch,
            NodeAttr::OperatingSystem => &self.operating_system,
            NodeAttr::Kernel => &self.kernel,
            NodeAttr::EngineVersion => &self.engine_version,
            NodeAttr::StorageDriver => &self.storage_driver,
            NodeAttr::ExecutionDriver => &self.execution_driver,
            NodeAttr::NodeLabel(key) => return self.labels.get(key).map(String::as_str),
            NodeAttr::EngineLabel(key) => return self.engine_labels.get(key).map(String::as_str),
            // Not keys of preferences.
            NodeAttr::Ip | NodeAttr::Volume | NodeAttr::VolumePlugin | NodeAttr::NetworkPlugin => return None,
        };
        Some(text).filter(|text| !text.is_empty())
    }

    /// Every attribute with its value, as the index stores them. What is empty is absent.
    pub(super) fn attributes(&self) -> impl Iterator<Item = (NodeAttr, &str)> {
        let standard = [
            (NodeAttr::Id, self.id.as_str()),
            (NodeAttr::Name, &self.name),
            (NodeAttr::Hostname, &self.hostname),
            (NodeAttr::Role, ROLE),
            (NodeAttr::Site, &self.site),
            (NodeAttr::Os, &self.os),
            (NodeAttr::Arch, &self.arch),
            (NodeAttr::Arch, arch_alias(&self.arch).unwrap_or_default()),
            (NodeAttr::OperatingSystem, &self.operating_system),
            (NodeAttr::Kernel, &self.kernel),
            (NodeAttr::EngineVersion, &self.engine_version),
            (NodeAttr::StorageDriver, &self.storage_driver),
            (NodeAttr::ExecutionDriver, &self.execution_driver),
        ];
        let ips = self.addresses.iter().map(|ip| (NodeAttr::Ip, ip.as_str()));
        let volumes = self.volumes.iter().map(|name| (NodeAttr::Volume, name.as_str()));
        let labels = self.labels.iter().map(|(k, v)| (NodeAttr::NodeLabel(k.clone()), v.as_str()));
        let engine = self.engine_labels.iter().map(|(k, v)| (NodeAttr::EngineLabel(k.clone()), v.as_str()));
        let volume = self.volume_plugins.iter().map(|p| (NodeAttr::VolumePlugin, p.as_str()));
        let network = self.network_plugins.iter().map(|p| (NodeAttr::NetworkPlugin, p.as_str()));
        standard
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .chain(labels)
            .chain(engine)
            .chain(volume)
            .chain(network)
            .chain(volumes)
            .chain(ips)
    }
}

/// What may be set aside of an offer.
fn committed(offered: Resources, ratio: Overcommit) -> Resources {
    let scale =
        |amount: u64, percent: u32| u64::try_from(u128::from(amount) * u128::from(percent) / 100).unwrap_or(u64::MAX);
    Resources {
        nano_cpus: scale(offered.nano_cpus, ratio.cpu_percent),
        mem_bytes: scale(offered.mem_bytes, ratio.memory_percent),
    }
}

/// What an expression, a plugin or a platform filter looks at on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NodeAttr {
    Id,
    Name,
    Hostname,
    Role,
    Site,
    Os,
    /// As the engine says it, and as image manifests do: `x86_64` and `amd64`.
    Arch,
    OperatingSystem,
    Kernel,
    EngineVersion,
    StorageDriver,
    ExecutionDriver,
    /// Addresses in the underlay, as text.
    Ip,
    NodeLabel(String),
    EngineLabel(String),
    VolumePlugin,
    NetworkPlugin,
    /// Names of volumes.
    Volume,
}

/// Masters run no tasks, so every node is a worker.
pub(super) const ROLE: &str = "worker";

/// The other name of an architecture: engines say what `uname -m` says, image manifests what Go says (GOARCH).
pub(super) fn arch_alias(arch: &str) -> Option<&'static str> {
    match arch {
        "x86_64" => Some("amd64"),
        "aarch64" => Some("arm64"),
        "armv7l" => Some("arm"),
        "i386" | "i686" => Some("386"),
        _ => None,
    }
}

/// A task that holds its place: what it takes from its node, and by what affinities find it.
///
/// Callers apply tasks that have a node and whose container runs or will run, and remove the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Identity; affinities to a container match it too.
    pub task: TaskId,
    /// Where it is. The node need not be known (yet).
    pub node: NodeId,
    /// Its service, if it has one.
    pub service: Option<ServiceId>,
    /// The service's name; empty: none.
    pub service_name: String,
    /// What affinities to a container match beside the id; empty: nothing.
    pub name: String,
    /// Image reference as the user wrote it.
    pub image: String,
    /// Labels of the container.
    pub labels: BTreeMap<String, String>,
    /// What it sets aside on its node.
    pub reservations: Resources,
    /// What it sets aside of generic resources, by kind.
    pub generic: BTreeMap<String, u64>,
    /// Its published ports; those with host port 0 claim nothing.
    pub ports: Vec<PortPublish>,
}

/// What an affinity looks at on the tasks of a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TaskAttr {
    /// Id, its first 12 characters, or name.
    Container,
    /// Reference as written, and without its tag and digest.
    Image,
    /// Name or id of the service.
    Service,
    Label(String),
}

impl Placed {
    /// Every attribute with its value, as the index stores them for a task of this name; each pair once. Ids are looked up
    /// among the tasks.
    pub(super) fn attributes<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (TaskAttr, &'a str)> {
        let name = Some((TaskAttr::Container, name)).filter(|(_, name)| !name.is_empty());
        let images = image_names(&self.image).into_iter().map(|image| (TaskAttr::Image, image));
        let labels = self.labels.iter().map(|(k, v)| (TaskAttr::Label(k.clone()), v.as_str()));
        let id = self.service.as_ref().filter(|id| id.as_str() != self.service_name);
        let service = service_names(id, &self.service_name).map(|name| (TaskAttr::Service, name));
        name.into_iter().chain(images).chain(service).chain(labels)
    }

    /// What it takes of its node, in the order of [`Dimension`]; no amount is 0.
    pub fn takes(&self) -> impl Iterator<Item = (Dimension, u64)> + '_ {
        amounts(self.reservations, &self.generic)
    }
}

/// What a task takes of its node, in the order of [`Dimension`]; no amount is 0.
pub(super) fn amounts(
    reservations: Resources,
    generic: &BTreeMap<String, u64>,
) -> impl Iterator<Item = (Dimension, u64)> + '_ {
    let first = [(Dimension::Cpu, reservations.nano_cpus), (Dimension::Memory, reservations.mem_bytes)];
    let generic = generic.iter().map(|(kind, count)| (Dimension::Generic(kind.clone()), *count));
    let all = first.into_iter().chain(generic).chain([(Dimension::Slots, 1)]);
    all.filter(|(_, amount)| *amount > 0)
}

/// The names by which an affinity finds a service.
pub(super) fn service_names<'a>(id: Option<&'a ServiceId>, name: &'a str) -> impl Iterator<Item = &'a str> + use<'a> {
    id.map(ServiceId::as_str).into_iter().chain(Some(name).filter(|name| !name.is_empty()))
}

/// The names by which an affinity finds an image: as written, and the repository alone.
pub(super) fn image_names(image: &str) -> Vec<&str> {
    if image.is_empty() {
        return Vec::new();
    }
    let untagged = image.split('@').next().unwrap_or(image);
    // A colon before the last slash belongs to a registry's port.
    let name_at = untagged.rfind('/').map_or(0, |slash| slash + 1);
    let repository = untagged[name_at..].find(':').map_or(untagged, |colon| &untagged[..name_at + colon]);
    if repository == image { vec![image] } else { vec![image, repository] }
}

/// Whether two published ports cannot be bound on one host: one port and protocol, at addresses that overlap.
pub(super) fn ports_conflict(a: &PortPublish, b: &PortPublish) -> bool {
    a.host_port != 0
        && (a.protocol, a.host_port) == (b.protocol, b.host_port)
        && HostAddr::of(a).overlaps(HostAddr::of(b))
}

/// The address part of a published port, with its wildcards told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum HostAddr {
    /// None given: every address of both families.
    Any,
    /// `0.0.0.0`
    AnyV4,
    /// `::`
    AnyV6,
    One(IpAddr),
}

impl HostAddr {
    pub(super) fn of(port: &PortPublish) -> Self {
        // An IPv4-mapped IPv6 address binds the IPv4 port (RFC 4291, 2.5.5.2).
        match port.host_ip.map(|ip| ip.to_canonical()) {
            None => Self::Any,
            Some(IpAddr::V4(ip)) if ip.is_unspecified() => Self::AnyV4,
            Some(IpAddr::V6(ip)) if ip.is_unspecified() => Self::AnyV6,
            Some(ip) => Self::One(ip),
        }
    }

    /// Whether both cannot be bound to one port of one host.
    pub(super) fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::AnyV4, other) | (other, Self::AnyV4) => other.is_v4(),
            (Self::AnyV6, other) | (other, Self::AnyV6) => other.is_v6(),
            (Self::One(a), Self::One(b)) => a == b,
        }
    }

    fn is_v4(self) -> bool {
        matches!(self, Self::AnyV4 | Self::One(IpAddr::V4(_)))
    }

    fn is_v6(self) -> bool {
        matches!(self, Self::AnyV6 | Self::One(IpAddr::V6(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_with_and_without_their_tag() {
        let check = |image: &str, expected: &[&str]| assert_eq!(image_names(image), expected, "{image}");
        check("", &[]);
        check("redis", &["redis"]);
        check("redis:7", &["redis:7", "redis"]);
        check("host:5000/a/redis", &["host:5000/a/redis"]);
        check("host:5000/a/redis:7", &["host:5000/a/redis:7", "host:5000/a/redis"]);
        check("a/redis:7@sha256:00ff", &["a/redis:7@sha256:00ff", "a/redis"]);
        check("redis@sha256:00ff", &["redis@sha256:00ff", "redis"]);
    }

    #[test]
    fn addresses_overlap_by_family_and_wildcard() {
        let addr = |ip: &str| {
            let host_ip = (!ip.is_empty()).then(|| ip.parse().unwrap());
            HostAddr::of(&PortPublish { protocol: Default::default(), container_port: 80, host_port: 80, host_ip })
        };
        let check = |a: &str, b: &str, expected| {
            assert_eq!(addr(a).overlaps(addr(b)), expected, "{a} {b}");
            assert_eq!(addr(b).overlaps(addr(a)), expected, "{b} {a}");
        };
        check("", "", true);
        check("", "10.0.0.1", true);
        check("", "fd00::1", true);
        check("0.0.0.0", "0.0.0.0", true);
        check("0.0.0.0", "10.0.0.1", true);
        check("0.0.0.0", "::", false);
        check("0.0.0.0", "fd00::1", false);
        check("::", "fd00::1", true);
        check("::", "10.0.0.1", false);
        check("10.0.0.1", "10.0.0.1", true);
        check("10.0.0.1", "10.0.0.2", false);
        check("10.0.0.1", "::ffff:10.0.0.1", true);
    }

    #[test]
    fn the_operators_labels_win_over_the_agents() {
        let mut node = Node::default();
        node.description.labels = BTreeMap::from([("a".into(), "agent".into()), ("b".into(), "agent".into())]);
        node.spec.labels = BTreeMap::from([("a".into(), "operator".into())]);
        let facts = NodeFacts::new(&node, true, Overcommit::default());
        assert_eq!(facts.labels["a"], "operator");
        assert_eq!(facts.labels["b"], "agent");
        assert!(facts.ready);
    }
}

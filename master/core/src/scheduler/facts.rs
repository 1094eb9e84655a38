//! What the scheduler knows of nodes and tasks, free of the API's shapes.
//!
//! Owns the attributes that expressions can name and the overlap of published addresses. It must not know how the
//! facts are indexed. Pure, no tasks, no channels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use skein_api::{Availability, Node, NodeId, PortPublish, Resources, ServiceId, TaskId};

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
    /// Whether new tasks may come.
    pub availability: Availability,
    /// Whether the node is there.
    pub ready: bool,
    /// What the cluster may use of it.
    pub offered: Resources,
    /// Volume plugins of the engine.
    pub volume_plugins: Vec<String>,
    /// Network plugins of the engine.
    pub network_plugins: Vec<String>,
}

impl NodeFacts {
    /// The facts of a node; `ready` is the caller's knowledge of its liveness.
    pub fn new(node: &Node, ready: bool) -> Self {
        let said = &node.description;
        let mut labels = said.labels.clone();
        labels.extend(node.spec.labels.clone());
        Self {
            id: node.id.clone(),
            name: node.name.clone(),
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
            availability: node.spec.availability,
            ready,
            offered: said.offered,
            volume_plugins: said.volume_plugins.clone(),
            network_plugins: said.network_plugins.clone(),
        }
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
        ];
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
    NodeLabel(String),
    EngineLabel(String),
    VolumePlugin,
    NetworkPlugin,
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
    /// What affinities to a container match beside the id; empty: nothing.
    pub name: String,
    /// Image reference as the user wrote it.
    pub image: String,
    /// Labels of the container.
    pub labels: BTreeMap<String, String>,
    /// What it sets aside on its node.
    pub reservations: Resources,
    /// Its published ports; those with host port 0 claim nothing.
    pub ports: Vec<PortPublish>,
}

/// What an affinity looks at on the tasks of a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TaskAttr {
    /// Id or name.
    Container,
    /// Reference as written, and without its tag and digest.
    Image,
    Label(String),
}

impl Placed {
    /// Every attribute with its value, as the index stores them; each pair once.
    pub(super) fn attributes(&self) -> BTreeSet<(TaskAttr, &str)> {
        let name = Some((TaskAttr::Container, self.name.as_str())).filter(|(_, name)| !name.is_empty());
        let images = image_names(&self.image).into_iter().map(|image| (TaskAttr::Image, image));
        let labels = self.labels.iter().map(|(k, v)| (TaskAttr::Label(k.clone()), v.as_str()));
        let own_id = (TaskAttr::Container, self.task.as_str());
        std::iter::once(own_id).chain(name).chain(images).chain(labels).collect()
    }
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
        let facts = NodeFacts::new(&node, true);
        assert_eq!(facts.labels["a"], "operator");
        assert_eq!(facts.labels["b"], "agent");
        assert!(facts.ready);
    }
}

//! From an assigned task to the engine's request for its container. Pure.

use std::{collections::HashMap, net::IpAddr};

use agent_core::EngineNetwork;
use bollard::models::{
    ContainerCreateBody, DeviceRequest as EngineDeviceRequest, HealthConfig, HostConfig, HostConfigLogConfig,
    Mount as EngineMount, MountTmpfsOptions, MountType, MountVolumeOptions, MountVolumeOptionsDriverConfig,
    NetworkingConfig, PortBinding, PortMap, RestartPolicy, RestartPolicyNameEnum,
};
use skein_api::{
    DEFAULT_STOP_GRACE_MS, DeviceRequest, Healthcheck, Mount, MountKind, Namespaces, PortPublish, Protocol,
    TaskAddress, TaskAssignment,
};

use super::{EngineConfig, labels, networks::endpoint};

/// Ports that one `expose` range may stand for.
const EXPOSE_RANGE_MAX: u16 = 1_024;

/// Everything about a container that the assignment alone does not say.
#[derive(Clone, Debug, Default)]
pub struct CreateInput {
    /// The engine's networks, in the order of the assignment's.
    pub networks: Vec<EngineNetwork>,
    /// Reserved addresses, in the same order.
    pub addresses: Vec<TaskAddress>,
    /// Resolvers; empty: the engine's own.
    pub dns: Vec<IpAddr>,
    /// Published ports; none has host port 0.
    pub ports: Vec<PortPublish>,
    /// Containers whose volumes to take, by the engine's id, and whether read-only.
    pub volumes_from: Vec<(String, bool)>,
    /// Containers whose namespaces to share, by the engine's id.
    pub share: Namespaces<String>,
}

/// Variable that tells a container what it got of a kind of generic resource (as Docker's swarm mode names it).
const GENERIC_VARIABLE: &str = "DOCKER_RESOURCE_";

/// The engine's name of a task's container: unique, since service tasks of one slot share their name in the cluster.
/// Names of ours must not be names that users look up: the engine's own DNS would answer them.
pub fn container_name(assignment: &TaskAssignment) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '-' };
    let name: String = assignment.name.chars().map(allowed).collect();
    // The engine wants a letter or digit first.
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let name = if name.is_empty() { "task" } else { name };
    format!("{name}.{}", assignment.id.short())
}

/// The request (Docker Engine API, `POST /containers/create`).
pub fn request(config: &EngineConfig, assignment: &TaskAssignment, input: &CreateInput) -> ContainerCreateBody {
    let spec = &assignment.spec.container;
    let grace_ms = spec.stop_grace_ms.unwrap_or(DEFAULT_STOP_GRACE_MS);
    ContainerCreateBody {
        image: Some(spec.image.clone()),
        hostname: spec.hostname.clone(),
        user: spec.user.clone(),
        working_dir: spec.working_dir.clone(),
        env: Some(environment(assignment)),
        cmd: spec.command.clone(),
        // One empty string clears the image's; an empty list would inherit it.
        entrypoint: spec.entrypoint.clone().map(|e| if e.is_empty() { vec![String::new()] } else { e }),
        labels: Some(container_labels(config, assignment, grace_ms)),
        tty: Some(spec.tty),
        open_stdin: Some(spec.stdin_open),
        stop_signal: spec.stop_signal.clone(),
        stop_timeout: i64::try_from(grace_ms.div_ceil(1_000)).ok(),
        healthcheck: spec.healthcheck.as_ref().map(health),
        exposed_ports: Some(exposed(&spec.expose, &input.ports)),
        networking_config: input.networks.first().map(|network| NetworkingConfig {
            endpoints_config: Some(HashMap::from([(
                network.name.clone(),
                endpoint(&assignment.id, input.addresses.first()),
            )])),
        }),
        host_config: Some(host_config(config, assignment, input)),
        ..Default::default()
    }
}

/// What the user gave, and what the task got of generic resources: ids, or how many where they have none.
fn environment(assignment: &TaskAssignment) -> Vec<String> {
    // "NAME" without "=" takes the variable away.
    let given = assignment.spec.container.env.iter();
    let mut env: Vec<String> = given.map(|(k, v)| v.as_ref().map_or(k.clone(), |v| format!("{k}={v}"))).collect();
    for (kind, count) in assignment.spec.resources.generic.iter().filter(|(_, count)| **count > 0) {
        let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let name: String = kind.chars().map(letter).collect();
        let value = assignment.generic.get(kind).map_or_else(|| count.to_string(), |ids| ids.join(","));
        // The last of two of one name counts.
        env.push(format!("{GENERIC_VARIABLE}{name}={value}"));
    }
    env
}

fn host_config(config: &EngineConfig, assignment: &TaskAssignment, input: &CreateInput) -> HostConfig {
    let spec = &assignment.spec.container;
    let resources = &assignment.spec.resources;
    let amount = |n: u64| i64::try_from(n).ok().filter(|n| *n > 0);
    let list = |l: &[String]| (!l.is_empty()).then(|| l.to_vec());
    HostConfig {
        memory: amount(resources.limits.mem_bytes),
        memory_reservation: amount(resources.reservations.mem_bytes),
        nano_cpus: amount(resources.limits.nano_cpus),
        cgroup_parent: config.cgroup_parent.clone(),
        init: spec.init,
        privileged: Some(spec.privileged),
        readonly_rootfs: Some(spec.read_only),
        device_requests: (!spec.devices.is_empty())
            .then(|| spec.devices.iter().map(|device| device_request(assignment, device)).collect()),
        cap_add: list(&spec.cap_add),
        cap_drop: list(&spec.cap_drop),
        extra_hosts: list(&spec.extra_hosts),
        dns: (!input.dns.is_empty()).then(|| input.dns.iter().map(IpAddr::to_string).collect()),
        mounts: Some(spec.mounts.iter().map(|m| mount(config, m)).collect()),
        volumes_from: Some(
            input
                .volumes_from
                .iter()
                .map(|(container, read_only)| format!("{container}:{}", if *read_only { "ro" } else { "rw" }))
                .collect(),
        ),
        port_bindings: Some(bindings(&input.ports)),
        network_mode: container_mode(&input.share.network).or_else(|| input.networks.first().map(|n| n.name.clone())),
        pid_mode: container_mode(&input.share.pid),
        ipc_mode: container_mode(&input.share.ipc),
        // Restarts are the agent's: a booting engine must not start what nobody wants any more.
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".into()),
            config: Some(HashMap::from([
                ("max-size".to_owned(), config.log_max_size.clone()),
                ("max-file".to_owned(), config.log_max_files.to_string()),
            ])),
        }),
        ..Default::default()
    }
}

/// Devices: those with the ids that the task got, or as many as it asks for.
fn device_request(assignment: &TaskAssignment, device: &DeviceRequest) -> EngineDeviceRequest {
    let ids = assignment.generic.get(&device.kind).cloned();
    let count = assignment.spec.resources.generic.get(&device.kind).and_then(|n| i64::try_from(*n).ok());
    EngineDeviceRequest {
        driver: Some(device.driver.clone()).filter(|driver| !driver.is_empty()),
        count: count.filter(|_| ids.is_none()),
        device_ids: ids,
        capabilities: Some(vec![device.capabilities.clone()]),
        options: (!device.options.is_empty()).then(|| device.options.clone().into_iter().collect()),
    }
}

/// The namespace of another container (Docker Engine API, `HostConfig`).
fn container_mode(container: &Option<String>) -> Option<String> {
    container.as_ref().map(|id| format!("container:{id}"))
}

fn container_labels(config: &EngineConfig, assignment: &TaskAssignment, grace_ms: u64) -> HashMap<String, String> {
    let spec = &assignment.spec.container;
    let mut all: HashMap<String, String> = spec
        .labels
        .iter()
        .filter(|(k, _)| !k.starts_with(labels::PREFIX))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let networks: Vec<&str> = assignment.networks.iter().map(skein_api::NetworkId::as_str).collect();
    let ours = [
        (labels::CLUSTER, Some(config.cluster.clone())),
        (labels::NODE, Some(config.node.clone())),
        (labels::TASK, Some(assignment.id.to_string())),
        (labels::TASK_NAME, Some(assignment.name.clone())),
        (labels::SERVICE, assignment.service.as_ref().map(ToString::to_string)),
        (labels::SERVICE_NAME, assignment.service_name.clone()),
        (labels::STACK, assignment.stack.clone()),
        (labels::SLOT, Some(assignment.slot.to_string())),
        (labels::RUN, Some(assignment.run.to_string())),
        (labels::STOP_GRACE_MS, Some(grace_ms.to_string())),
        (labels::NETWORKS, (!networks.is_empty()).then(|| networks.join(","))),
        (labels::IMAGE, Some(spec.image.clone())),
    ];
    all.extend(ours.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?))));
    all
}

fn mount(config: &EngineConfig, mount: &Mount) -> EngineMount {
    EngineMount {
        target: Some(mount.target.clone()),
        source: mount.source.clone(),
        typ: Some(match mount.kind {
            MountKind::Volume => MountType::VOLUME,
            // In this form the engine refuses a path that is not there, instead of making an empty directory: on a
            // host among many that would be data that seems lost.
            MountKind::Bind => MountType::BIND,
            MountKind::Tmpfs => MountType::TMPFS,
        }),
        read_only: Some(mount.read_only),
        volume_options: (mount.kind == MountKind::Volume).then(|| MountVolumeOptions {
            labels: Some(HashMap::from([(labels::CLUSTER.to_owned(), config.cluster.clone())])),
            driver_config: mount
                .volume_driver
                .as_ref()
                .map(|name| MountVolumeOptionsDriverConfig { name: Some(name.clone()), options: None }),
            ..Default::default()
        }),
        tmpfs_options: mount
            .tmpfs_size_bytes
            .filter(|_| mount.kind == MountKind::Tmpfs)
            .map(|size| MountTmpfsOptions { size_bytes: i64::try_from(size).ok(), ..Default::default() }),
        ..Default::default()
    }
}

/// Nanoseconds from milliseconds; 0 inherits in both.
fn nanos(ms: u64) -> Option<i64> {
    Some(i64::try_from(ms.saturating_mul(1_000_000)).unwrap_or(i64::MAX))
}

fn health(check: &Healthcheck) -> HealthConfig {
    HealthConfig {
        test: Some(check.test.clone()),
        interval: nanos(check.interval_ms),
        timeout: nanos(check.timeout_ms),
        start_period: nanos(check.start_period_ms),
        retries: Some(i64::from(check.retries)),
        start_interval: None,
    }
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// `80/tcp` of published and of exposed ports; `3000`, `3000/udp` and `3000-3005` are understood, the rest is left out
/// (it is documentation).
fn exposed(expose: &[String], ports: &[PortPublish]) -> Vec<String> {
    let mut all: Vec<String> = ports.iter().map(|p| format!("{}/{}", p.container_port, protocol(p.protocol))).collect();
    for text in expose {
        let (range, proto) = text.split_once('/').unwrap_or((text, "tcp"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
            all.extend((first..=last).take(EXPOSE_RANGE_MAX.into()).map(|port| format!("{port}/{proto}")));
        }
    }
    all.sort();
    all.dedup();
    all
}

fn bindings(ports: &[PortPublish]) -> PortMap {
    let mut map = PortMap::new();
    for port in ports {
        let key = format!("{}/{}", port.container_port, protocol(port.protocol));
        map.entry(key).or_default().get_or_insert_with(Vec::new).push(PortBinding {
            host_ip: port.host_ip.map(|ip| ip.to_string()),
            host_port: Some(port.host_port.to_string()),
        });
    }
    map
}

/// Published ports as an inspected container shows them; sorted.
pub(super) fn ports_of(map: Option<&PortMap>) -> Vec<PortPublish> {
    let mut ports = Vec::new();
    for (key, bound) in map.into_iter().flatten() {
        let Some((port, proto)) = key.split_once('/') else { continue };
        let (Ok(container_port), Some(protocol)) = (
            port.parse(),
            match proto {
                "tcp" => Some(Protocol::Tcp),
                "udp" => Some(Protocol::Udp),
                _ => None,
            },
        ) else {
            continue;
        };
        for binding in bound.iter().flatten() {
            let host_port = binding.host_port.as_deref().and_then(|p| p.parse().ok()).unwrap_or(0);
            let host_ip = binding.host_ip.as_deref().and_then(|ip| ip.parse().ok());
            ports.push(PortPublish { protocol, container_port, host_port, host_ip });
        }
    }
    ports.sort();
    ports
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use skein_api::{ContainerSpec, NetworkId, Resources, ServiceId, TaskId, TaskSpec};

    use super::*;

    fn config() -> EngineConfig {
        EngineConfig::new("/run/docker.sock", "cl", "n1")
    }

    fn assignment(container: ContainerSpec) -> TaskAssignment {
        TaskAssignment {
            id: TaskId::new("0123456789abcdef"),
            name: "shop_web.1".into(),
            service: Some(ServiceId::new("s1")),
            slot: 1,
            run: 1,
            spec: TaskSpec { container, ..Default::default() },
            ..Default::default()
        }
    }

    fn host(container: ContainerSpec) -> HostConfig {
        request(&config(), &assignment(container), &CreateInput::default()).host_config.expect("is set")
    }

    #[test]
    fn names_are_unique_and_legal() {
        for (name, expected) in
            [("shop_web.1", "shop_web.1.0123456789ab"), ("-ü x", "x.0123456789ab"), ("", "task.0123456789ab")]
        {
            let task = TaskAssignment { name: name.into(), ..assignment(ContainerSpec::default()) };
            assert_eq!(container_name(&task), expected);
        }
    }

    #[test]
    fn the_process_is_as_specified() {
        let body = request(
            &config(),
            &assignment(ContainerSpec {
                image: "busybox".into(),
                entrypoint: Some(vec![]),
                command: Some(vec!["sh".into()]),
                env: BTreeMap::from([("A".into(), Some("1=2".into())), ("B".into(), None)]),
                stop_grace_ms: Some(1_500),
                stop_signal: Some("SIGINT".into()),
                healthcheck: Some(Healthcheck {
                    test: vec!["CMD".into(), "true".into()],
                    interval_ms: 2_000,
                    ..Default::default()
                }),
                expose: vec!["53/udp".into(), "8000-8001".into(), "what".into()],
                ..Default::default()
            }),
            &CreateInput::default(),
        );
        assert_eq!(body.entrypoint, Some(vec![String::new()]));
        assert_eq!(body.env, Some(vec!["A=1=2".into(), "B".into()]));
        assert_eq!((body.stop_timeout, body.stop_signal.as_deref()), (Some(2), Some("SIGINT")));
        assert_eq!(body.healthcheck.and_then(|h| h.interval), Some(2_000_000_000));
        assert_eq!(body.exposed_ports, Some(vec!["53/udp".into(), "8000/tcp".into(), "8001/tcp".into()]));
        assert_eq!(body.networking_config, None, "the engine's default bridge");
    }

    #[test]
    fn generic_resources_are_told_and_users_cannot_forge_them() {
        let mut task = assignment(ContainerSpec {
            env: BTreeMap::from([("DOCKER_RESOURCE_GPU".into(), Some("all".into()))]),
            ..Default::default()
        });
        task.spec.resources.generic = BTreeMap::from([("gpu".into(), 2), ("fast-ssd".into(), 1), ("none".into(), 0)]);
        task.generic = BTreeMap::from([("gpu".into(), vec!["GPU-0".into(), "GPU-3".into()])]);
        let expected = ["DOCKER_RESOURCE_GPU=all", "DOCKER_RESOURCE_FAST_SSD=1", "DOCKER_RESOURCE_GPU=GPU-0,GPU-3"];
        assert_eq!(environment(&task), expected);
    }

    #[test]
    fn devices_are_those_that_were_given_out() {
        let device = DeviceRequest { kind: "gpu".into(), capabilities: vec!["gpu".into()], ..Default::default() };
        let mut task = assignment(ContainerSpec { devices: vec![device.clone()], ..Default::default() });
        task.spec.resources.generic = BTreeMap::from([("gpu".into(), 2)]);
        let counted = device_request(&task, &device);
        assert_eq!((counted.count, counted.device_ids), (Some(2), None));
        task.generic = BTreeMap::from([("gpu".into(), vec!["GPU-0".into(), "GPU-3".into()])]);
        let requests = request(&config(), &task, &CreateInput::default()).host_config.and_then(|h| h.device_requests);
        let named = requests.expect("are asked for").remove(0);
        assert_eq!((named.count, named.device_ids), (None, Some(vec!["GPU-0".into(), "GPU-3".into()])));
        assert_eq!((named.driver, named.capabilities), (None, Some(vec![vec!["gpu".to_owned()]])));
    }

    #[test]
    fn namespaces_and_volume_drivers_are_asked_of_the_engine() {
        let input = CreateInput {
            share: Namespaces { network: Some("c1".into()), pid: Some("c2".into()), ipc: None },
            ..Default::default()
        };
        let body = request(&config(), &assignment(ContainerSpec::default()), &input);
        let host = body.host_config.expect("is set");
        let modes = (host.network_mode.as_deref(), host.pid_mode.as_deref(), host.ipc_mode);
        assert_eq!(modes, (Some("container:c1"), Some("container:c2"), None));
        let mount = Mount {
            kind: MountKind::Volume,
            source: Some("data".into()),
            target: "/data".into(),
            read_only: false,
            tmpfs_size_bytes: None,
            volume_driver: Some("nfs".into()),
        };
        let engine = super::mount(&config(), &mount).volume_options.expect("is a volume");
        assert_eq!(engine.driver_config.and_then(|d| d.name).as_deref(), Some("nfs"));
    }

    #[test]
    fn labels_say_whose_it_is_and_users_cannot_forge_them() {
        let user = BTreeMap::from([("a".to_owned(), "b".to_owned()), (labels::TASK.to_owned(), "other".to_owned())]);
        let body = request(
            &config(),
            &assignment(ContainerSpec { labels: user, image: "i".into(), ..Default::default() }),
            &CreateInput::default(),
        );
        let labels = body.labels.expect("are set");
        for (key, value) in [
            ("a", "b"),
            (labels::CLUSTER, "cl"),
            (labels::NODE, "n1"),
            (labels::TASK, "0123456789abcdef"),
            (labels::SERVICE, "s1"),
            (labels::SLOT, "1"),
            (labels::STOP_GRACE_MS, "10000"),
            (labels::IMAGE, "i"),
        ] {
            assert_eq!(labels.get(key).map(String::as_str), Some(value), "{key}");
        }
    }

    #[test]
    fn the_host_side_is_bounded_and_never_restarts() {
        let config = host(ContainerSpec::default());
        assert_eq!(config.restart_policy.and_then(|p| p.name), Some(RestartPolicyNameEnum::NO));
        let log = config.log_config.expect("is set");
        assert_eq!(log.config.and_then(|c| c.get("max-size").cloned()).as_deref(), Some("10m"));
        assert_eq!((config.memory, config.nano_cpus, config.dns), (None, None, None));
        let mut task = assignment(ContainerSpec::default());
        task.spec.resources.limits = Resources { nano_cpus: 500_000_000, mem_bytes: 1 << 28 };
        task.spec.resources.reservations.mem_bytes = 1 << 27;
        let body = request(
            &EngineConfig { cgroup_parent: Some("/skein".into()), ..self::config() },
            &task,
            &CreateInput::default(),
        );
        let config = body.host_config.expect("is set");
        assert_eq!((config.memory, config.memory_reservation), (Some(1 << 28), Some(1 << 27)));
        assert_eq!((config.nano_cpus, config.cgroup_parent.as_deref()), (Some(500_000_000), Some("/skein")));
    }

    #[test]
    fn mounts_are_volumes_binds_and_tmpfs() {
        let of = |kind, source: Option<&str>, size| Mount {
            kind,
            source: source.map(Into::into),
            target: "/x".into(),
            read_only: true,
            tmpfs_size_bytes: size,
            volume_driver: None,
        };
        let mounts = vec![
            of(MountKind::Volume, Some("shop_data"), None),
            of(MountKind::Bind, Some("/srv"), None),
            of(MountKind::Tmpfs, None, Some(1024)),
        ];
        let made = host(ContainerSpec { mounts, ..Default::default() }).mounts.expect("are set");
        let kinds: Vec<_> = made.iter().map(|m| (m.typ, m.source.as_deref(), m.read_only)).collect();
        assert_eq!(
            kinds,
            [
                (Some(MountType::VOLUME), Some("shop_data"), Some(true)),
                (Some(MountType::BIND), Some("/srv"), Some(true)),
                (Some(MountType::TMPFS), None, Some(true)),
            ]
        );
        assert_eq!(made[2].tmpfs_options.as_ref().and_then(|t| t.size_bytes), Some(1024));
    }

    #[test]
    fn the_first_network_comes_with_the_container() {
        let task = TaskAssignment { networks: vec![NetworkId::new("n")], ..assignment(ContainerSpec::default()) };
        let address = TaskAddress { network: NetworkId::new("n"), v4: Some([10, 57, 1, 7].into()), v6: None };
        let input = CreateInput {
            networks: vec![EngineNetwork { engine_id: "e".into(), name: "shop_default".into() }],
            addresses: vec![address],
            dns: vec![[10, 57, 0, 1].into()],
            volumes_from: vec![("c1".into(), true)],
            ..Default::default()
        };
        let body = request(&config(), &task, &input);
        let host = body.host_config.expect("is set");
        assert_eq!(host.network_mode.as_deref(), Some("shop_default"));
        assert_eq!((host.dns, host.volumes_from), (Some(vec!["10.57.0.1".into()]), Some(vec!["c1:ro".into()])));
        let endpoints = body.networking_config.and_then(|n| n.endpoints_config).expect("are set");
        let endpoint = &endpoints["shop_default"];
        let ipam = endpoint.ipam_config.clone().expect("is set");
        assert_eq!((ipam.ipv4_address.as_deref(), ipam.ipv6_address), (Some("10.57.1.7"), None));
        assert_eq!(endpoint.driver_opts.as_ref().map(|o| o[labels::TASK].as_str()), Some("0123456789abcdef"));
        assert_eq!(endpoint.aliases, None);
    }

    #[test]
    fn ports_come_back_as_they_went() {
        let ports = vec![
            PortPublish { protocol: Protocol::Tcp, container_port: 80, host_port: 8080, host_ip: None },
            PortPublish {
                protocol: Protocol::Tcp,
                container_port: 80,
                host_port: 8081,
                host_ip: Some([127, 0, 0, 1].into()),
            },
            PortPublish { protocol: Protocol::Udp, container_port: 53, host_port: 53, host_ip: None },
        ];
        assert_eq!(ports_of(Some(&bindings(&ports))), ports);
    }
}

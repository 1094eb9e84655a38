//! Every key of the Compose specification and what becomes of it.
//!
//! The tables are the truth that docs/compose.md repeats for people (a test compares them). A key is supported, warned
//! of (it has no effect here; an error with `--strict`), or refused (without it data, security or meaning would change).

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// Taken.
    Yes,
    /// No effect, for this reason.
    Warn(&'static str),
    /// An error, for this reason, with this hint.
    Refuse(&'static str, &'static str),
}

use Support::{Refuse, Warn, Yes};

/// The keys of one kind of mapping.
pub type Table = &'static [(&'static str, Support)];

const LATER: &str = "not supported yet";
const REMOVE: &str = "remove the key if the service can do without it";
const ISOLATION: &str = "it changes how the container is isolated, which is not supported yet";

/// The whole file.
pub const TOP: Table = &[
    ("version", Yes),
    ("name", Yes),
    ("services", Yes),
    ("networks", Yes),
    ("volumes", Yes),
    ("secrets", Refuse("secrets are not supported yet", "mount a file of the host, or use `environment`")),
    ("configs", Refuse("configs are not supported yet", "mount a file of the host, or use `environment`")),
    ("include", Refuse("include is not supported yet", "give the files one after the other with `-f`")),
    ("models", Refuse("models are not supported", REMOVE)),
];

/// A service.
pub const SERVICE: Table = &[
    ("annotations", Warn(LATER)),
    ("attach", Warn("logs are shown by `skein logs`")),
    ("blkio_config", Warn(LATER)),
    ("build", Warn("images are not built here; the image must be there already")),
    ("cap_add", Yes),
    ("cap_drop", Yes),
    ("cgroup", Refuse(ISOLATION, REMOVE)),
    ("cgroup_parent", Refuse("the agent sets the parent cgroup", "use `deploy.resources.limits`")),
    ("command", Yes),
    ("configs", Refuse("configs are not supported yet", "mount a file of the host, or use `environment`")),
    ("container_name", Yes),
    ("cpu_count", Warn("use `cpus`")),
    ("cpu_percent", Warn("use `cpus`")),
    ("cpu_period", Warn("use `cpus`")),
    ("cpu_quota", Warn("use `cpus`")),
    ("cpu_rt_period", Warn(LATER)),
    ("cpu_rt_runtime", Warn(LATER)),
    ("cpu_shares", Warn("use `deploy.resources.reservations.cpus`")),
    ("cpus", Yes),
    ("cpuset", Warn(LATER)),
    ("credential_spec", Refuse("it is for Windows containers", REMOVE)),
    ("depends_on", Yes),
    ("deploy", Yes),
    ("develop", Warn("it is for development on one machine")),
    ("device_cgroup_rules", Refuse("access to devices is not supported yet", REMOVE)),
    ("devices", Refuse("access to devices is not supported yet", "`privileged: true` gives all devices of the host")),
    ("dns", Warn("the agent serves DNS and forwards the rest to the host's servers")),
    ("dns_opt", Warn("the agent serves DNS")),
    ("dns_search", Warn("the agent serves DNS")),
    ("domainname", Warn(LATER)),
    ("entrypoint", Yes),
    ("env_file", Yes),
    ("environment", Yes),
    ("expose", Yes),
    ("extends", Refuse("extends is not supported yet", "use a YAML anchor and `<<`, or a second file with `-f`")),
    ("external_links", Refuse("external_links are not supported", "put both services on one external network")),
    ("extra_hosts", Yes),
    ("gpus", Yes),
    ("group_add", Refuse("it changes what the container may read, which is not supported yet", "use `user: uid:gid`")),
    ("healthcheck", Yes),
    ("hostname", Yes),
    ("image", Yes),
    ("init", Yes),
    ("ipc", Yes),
    ("isolation", Refuse("it is for Windows containers", REMOVE)),
    ("label_file", Refuse("label files are not supported yet", "use `labels`")),
    ("labels", Yes),
    ("links", Yes),
    ("logging", Warn("logs are kept by the agent, bounded; see `skein logs`")),
    ("mac_address", Warn("addresses are given out by the overlay")),
    ("mem_limit", Yes),
    ("mem_reservation", Yes),
    ("mem_swappiness", Warn(LATER)),
    ("memswap_limit", Warn(LATER)),
    ("models", Refuse("models are not supported", REMOVE)),
    ("network_mode", Yes),
    ("networks", Yes),
    ("oom_kill_disable", Warn(LATER)),
    ("oom_score_adj", Warn(LATER)),
    ("pid", Yes),
    ("pids_limit", Warn(LATER)),
    ("platform", Yes),
    ("ports", Yes),
    ("post_start", Refuse("hooks are not supported yet", "start the command from the image's entry point")),
    ("pre_stop", Refuse("hooks are not supported yet", "handle the stop signal in the container")),
    ("privileged", Yes),
    ("profiles", Yes),
    ("provider", Refuse("providers are not supported", REMOVE)),
    ("pull_policy", Warn("an image is pulled when the host does not have it")),
    ("read_only", Yes),
    ("restart", Yes),
    ("runtime", Refuse("it changes what runs the container, which is not supported yet", REMOVE)),
    ("scale", Yes),
    ("secrets", Refuse("secrets are not supported yet", "mount a file of the host, or use `environment`")),
    ("security_opt", Refuse("security options are not supported yet", REMOVE)),
    ("shm_size", Warn("the engine's default is taken; mount a tmpfs at /dev/shm for another size")),
    ("stdin_open", Yes),
    ("stop_grace_period", Yes),
    ("stop_signal", Yes),
    ("storage_opt", Warn(LATER)),
    ("sysctls", Warn(LATER)),
    ("tmpfs", Yes),
    ("tty", Yes),
    ("ulimits", Warn(LATER)),
    ("use_api_socket", Refuse("it gives the engine to the container, which is not supported", REMOVE)),
    ("user", Yes),
    ("userns_mode", Refuse(ISOLATION, REMOVE)),
    ("uts", Refuse(ISOLATION, REMOVE)),
    ("volumes", Yes),
    ("volumes_from", Yes),
    ("working_dir", Yes),
];

/// `healthcheck`.
pub const HEALTHCHECK: Table = &[
    ("disable", Yes),
    ("interval", Yes),
    ("retries", Yes),
    ("start_interval", Warn(LATER)),
    ("start_period", Yes),
    ("test", Yes),
    ("timeout", Yes),
];

/// One of `depends_on`.
pub const DEPENDS_ON: Table =
    &[("condition", Yes), ("required", Yes), ("restart", Warn("a service is not restarted with what it depends on"))];

/// One of `env_file`.
pub const ENV_FILE: Table = &[("format", Yes), ("path", Yes), ("required", Yes)];

/// One of `ports` in the long form.
pub const PORT: Table = &[
    ("app_protocol", Yes),
    ("host_ip", Yes),
    ("mode", Yes),
    ("name", Yes),
    ("protocol", Yes),
    ("published", Yes),
    ("target", Yes),
];

/// One of `volumes` of a service in the long form.
pub const MOUNT: Table = &[
    ("bind", Yes),
    ("consistency", Warn("it has no effect on Linux")),
    ("image", Refuse("mounting images is not supported", REMOVE)),
    ("read_only", Yes),
    ("source", Yes),
    ("target", Yes),
    ("tmpfs", Yes),
    ("type", Yes),
    ("volume", Yes),
];

/// `bind` of a mount.
pub const MOUNT_BIND: Table = &[
    ("create_host_path", Warn("the path must exist on the host")),
    ("propagation", Refuse("mount propagation is not supported yet", REMOVE)),
    ("recursive", Refuse("recursive options are not supported yet", REMOVE)),
    ("selinux", Warn(LATER)),
];

/// `volume` of a mount.
pub const MOUNT_VOLUME: Table = &[
    ("labels", Warn(LATER)),
    ("nocopy", Refuse("it changes what an empty volume is filled with, which is not supported yet", REMOVE)),
    ("subpath", Refuse("it changes which data is mounted, which is not supported yet", REMOVE)),
];

/// `tmpfs` of a mount.
pub const MOUNT_TMPFS: Table = &[("mode", Warn(LATER)), ("size", Yes)];

/// One of `networks` of a service.
pub const SERVICE_NETWORK: Table = &[
    ("aliases", Yes),
    ("driver_opts", Warn(LATER)),
    ("gw_priority", Warn(LATER)),
    ("interface_name", Warn(LATER)),
    ("ipv4_address", Yes),
    ("ipv6_address", Yes),
    ("link_local_ips", Warn(LATER)),
    ("mac_address", Warn("addresses are given out by the overlay")),
    ("priority", Yes),
];

/// `deploy`.
pub const DEPLOY: Table = &[
    ("endpoint_mode", Yes),
    ("labels", Yes),
    ("mode", Yes),
    ("placement", Yes),
    ("replicas", Yes),
    ("resources", Yes),
    ("restart_policy", Yes),
    ("rollback_config", Warn(LATER)),
    ("update_config", Yes),
    ("x-skein", Yes),
];

/// `deploy.update_config`.
pub const UPDATE_CONFIG: Table = &[
    ("delay", Yes),
    ("failure_action", Yes),
    ("max_failure_ratio", Warn(LATER)),
    ("monitor", Warn(LATER)),
    ("order", Yes),
    ("parallelism", Yes),
];

/// `deploy.x-skein`: what the specification has no key for.
pub const DEPLOY_OWN: Table = &[("drain", Yes)];

/// `deploy.resources`.
pub const RESOURCES: Table = &[("limits", Yes), ("reservations", Yes)];

/// `deploy.resources.limits`.
pub const LIMITS: Table = &[("cpus", Yes), ("memory", Yes), ("pids", Warn(LATER))];

/// `deploy.resources.reservations`.
pub const RESERVATIONS: Table = &[("cpus", Yes), ("devices", Yes), ("generic_resources", Yes), ("memory", Yes)];

/// One of `deploy.resources.reservations.devices`.
pub const DEVICE: Table = &[
    ("capabilities", Yes),
    ("count", Yes),
    ("device_ids", Refuse("which devices are free is known when the task is placed", "use `count`")),
    ("driver", Yes),
    ("options", Yes),
];

/// One of `deploy.resources.reservations.generic_resources`.
pub const GENERIC_RESOURCE: Table = &[("discrete_resource_spec", Yes)];

/// `discrete_resource_spec` of a generic resource.
pub const DISCRETE_RESOURCE: Table = &[("kind", Yes), ("value", Yes)];

/// `deploy.placement`.
pub const PLACEMENT: Table =
    &[("constraints", Yes), ("max_replicas_per_node", Yes), ("preferences", Yes), ("x-skein", Yes)];

/// One of `deploy.placement.preferences`.
pub const PREFERENCE: Table = &[("spread", Yes)];

/// `deploy.placement.x-skein`: what the specification has no key for.
pub const PLACEMENT_OWN: Table = &[
    ("affinities", Yes),
    ("network_plugins", Yes),
    ("preempt", Yes),
    ("priority", Yes),
    ("strategy", Yes),
    ("whitelist", Yes),
];

/// `deploy.restart_policy`.
pub const RESTART_POLICY: Table = &[("condition", Yes), ("delay", Yes), ("max_attempts", Yes), ("window", Yes)];

/// One of the top level's `networks`.
pub const NETWORK: Table = &[
    ("attachable", Yes),
    ("driver", Yes),
    ("driver_opts", Yes),
    ("enable_ipv4", Warn("a network always has both IPv4 and IPv6")),
    ("enable_ipv6", Warn("a network always has both IPv4 and IPv6")),
    ("external", Yes),
    ("internal", Yes),
    ("ipam", Yes),
    ("labels", Yes),
    ("name", Yes),
];

/// `ipam` of a network.
pub const IPAM: Table = &[("config", Yes), ("driver", Yes), ("options", Warn(LATER))];

/// One of `ipam.config`.
pub const IPAM_CONFIG: Table = &[
    ("aux_addresses", Warn("addresses are given out by the overlay")),
    ("gateway", Warn("the gateway is the first address of the subnet")),
    ("ip_range", Warn("each host owns blocks of the whole subnet")),
    ("subnet", Yes),
];

/// One of the top level's `volumes`.
pub const VOLUME: Table = &[
    ("driver", Yes),
    ("driver_opts", Refuse("it changes where the data is, which is not supported yet", "mount a path of the host")),
    ("external", Yes),
    ("labels", Warn(LATER)),
    ("name", Yes),
];

/// All tables, by the heading under which docs/compose.md has them.
pub const ALL: &[(&str, Table)] = &[
    ("Top level", TOP),
    ("services.*", SERVICE),
    ("services.*.healthcheck", HEALTHCHECK),
    ("services.*.depends_on.*", DEPENDS_ON),
    ("services.*.env_file[]", ENV_FILE),
    ("services.*.ports[]", PORT),
    ("services.*.volumes[]", MOUNT),
    ("services.*.volumes[].bind", MOUNT_BIND),
    ("services.*.volumes[].volume", MOUNT_VOLUME),
    ("services.*.volumes[].tmpfs", MOUNT_TMPFS),
    ("services.*.networks.*", SERVICE_NETWORK),
    ("services.*.gpus[]", DEVICE),
    ("services.*.deploy", DEPLOY),
    ("services.*.deploy.update_config", UPDATE_CONFIG),
    ("services.*.deploy.x-skein", DEPLOY_OWN),
    ("services.*.deploy.resources", RESOURCES),
    ("services.*.deploy.resources.limits", LIMITS),
    ("services.*.deploy.resources.reservations", RESERVATIONS),
    ("services.*.deploy.resources.reservations.devices[]", DEVICE),
    ("services.*.deploy.resources.reservations.generic_resources[]", GENERIC_RESOURCE),
    ("services.*.deploy.resources.reservations.generic_resources[].discrete_resource_spec", DISCRETE_RESOURCE),
    ("services.*.deploy.placement", PLACEMENT),
    ("services.*.deploy.placement.preferences[]", PREFERENCE),
    ("services.*.deploy.placement.x-skein", PLACEMENT_OWN),
    ("services.*.deploy.restart_policy", RESTART_POLICY),
    ("networks.*", NETWORK),
    ("networks.*.ipam", IPAM),
    ("networks.*.ipam.config[]", IPAM_CONFIG),
    ("volumes.*", VOLUME),
];

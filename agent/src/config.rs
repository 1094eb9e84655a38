//! The agent's configuration: file, then environment, then flags; read and checked once.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use skein_api::{
    GENERIC_IDS_MAX, GENERIC_KINDS_MAX, GenericOffer, LABEL_KEY_EXPECTED, LABELS_MAX, OVERCOMMIT_PERCENT, Overcommit,
    Resources, check_node_label, is_label_key,
};
pub use skein_daemon::ConfigError;
use skein_daemon::{LogFormat, check_absolute, read_config};

/// Where a configuration is read from unless a flag says otherwise. It need not be there.
pub const DEFAULT_FILE: &str = "/etc/skein/agent.toml";

/// What `skein-agent` runs with.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Identity, ledger, addresses.
    pub state_dir: PathBuf,
    /// The engine's API.
    pub engine_socket: PathBuf,
    /// Where the engine finds the network plugin, when no socket is passed in.
    pub plugin_socket: PathBuf,
    /// Where the overlay's network namespaces are pinned.
    pub netns_dir: PathBuf,
    /// Name of the node; default is the host's.
    pub name: Option<String>,
    /// Data centre or other place.
    pub site: String,
    /// Labels of the node; the operator's win.
    pub labels: BTreeMap<String, String>,
    /// Underlay addresses; default: those of the interface that leads to the master.
    pub underlay: Vec<IpAddr>,
    /// UDP port of VXLAN, the same on every host.
    pub vxlan_port: u16,
    /// Whether plain packets between hosts take the fast path, where the kernel has what it needs.
    pub fast_path: bool,
    /// What the cluster may use of this host; default: all of it less `reserve`.
    pub offer: Amount,
    /// What the cluster may not use.
    pub reserve: Amount,
    /// How much more than that may be set aside, in percent: `{ cpu_percent = 150 }`. Default: the cluster's.
    pub overcommit: Option<Overcommit>,
    /// Generic resources of this host, by kind: a number, or a list of ids.
    pub generic: BTreeMap<String, GenericOffer>,
    /// Parent cgroup of all containers, limited to `offer` where there is one. Default: `/skein`, or `skein.slice` for
    /// an engine that uses systemd, where something is offered; else the engine's own.
    pub cgroup_parent: Option<String>,
    /// Images that tasks used are removed when unused for this many hours; 0 keeps them.
    pub image_retention_hours: u32,
    /// `text` or `json`.
    pub log_format: LogFormat,
}

/// An amount of CPU and memory, as people write it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Amount {
    /// CPUs, such as 1.5.
    pub cpus: Option<f64>,
    /// Bytes, or with a unit: `512MiB`, `2GiB`.
    pub memory: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/skein/agent".into(),
            engine_socket: "/var/run/docker.sock".into(),
            plugin_socket: crate::plugin::DEFAULT_PLUGIN_SOCKET.into(),
            netns_dir: "/run/skein/netns".into(),
            name: None,
            site: String::new(),
            labels: BTreeMap::new(),
            underlay: Vec::new(),
            vxlan_port: 4_789,
            fast_path: false,
            offer: Amount::default(),
            reserve: Amount::default(),
            overcommit: None,
            generic: BTreeMap::new(),
            cgroup_parent: None,
            image_retention_hours: 24,
            log_format: LogFormat::Text,
        }
    }
}

/// Values from flags and environment; each wins over the file's.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Overrides {
    /// Configuration file (TOML).
    #[arg(long, env = "SKEIN_AGENT_CONFIG", global = true)]
    pub config: Option<PathBuf>,
    /// Identity, ledger, addresses.
    #[arg(long, env = "SKEIN_AGENT_STATE_DIR", global = true)]
    pub state_dir: Option<PathBuf>,
    /// The engine's API.
    #[arg(long, env = "SKEIN_AGENT_ENGINE_SOCKET", global = true)]
    pub engine_socket: Option<PathBuf>,
}

impl Config {
    /// Reads the file (a missing default one counts as empty), lays `overrides` over it, and checks the result.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut config: Self = read_config(overrides.config.as_deref(), Path::new(DEFAULT_FILE))?;
        if let Some(v) = &overrides.state_dir {
            config.state_dir.clone_from(v);
        }
        if let Some(v) = &overrides.engine_socket {
            config.engine_socket.clone_from(v);
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_absolute(&[
            ("state_dir", &self.state_dir),
            ("engine_socket", &self.engine_socket),
            ("plugin_socket", &self.plugin_socket),
            ("netns_dir", &self.netns_dir),
        ])?;
        if self.vxlan_port == 0 {
            return Err(ConfigError::value("vxlan_port", "0 is not a port"));
        }
        if self.underlay.iter().filter(|a| a.is_ipv4()).count() > 1
            || self.underlay.iter().filter(|a| a.is_ipv6()).count() > 1
        {
            return Err(ConfigError::value("underlay", "at most one IPv4 and one IPv6 address"));
        }
        self.offer.resources("offer")?;
        self.reserve.resources("reserve")?;
        if self.labels.len() > LABELS_MAX {
            return Err(ConfigError::value("labels", format!("{} labels, at most {LABELS_MAX}", self.labels.len())));
        }
        for (key, value) in &self.labels {
            check_node_label(key, value).map_err(|message| ConfigError::value("labels", message))?;
        }
        if let Some(Overcommit { cpu_percent, memory_percent }) = self.overcommit
            && let Some(wrong) = [cpu_percent, memory_percent].iter().find(|p| !OVERCOMMIT_PERCENT.contains(p))
        {
            return Err(ConfigError::value("overcommit", format!("{wrong} percent is not 10 to 10000")));
        }
        self.check_generic()
    }

    fn check_generic(&self) -> Result<(), ConfigError> {
        let bad = |message: String| Err(ConfigError::value("generic", message));
        if self.generic.len() > GENERIC_KINDS_MAX {
            return bad(format!("{} kinds, at most {GENERIC_KINDS_MAX}", self.generic.len()));
        }
        for (kind, offer) in &self.generic {
            if !is_label_key(kind) {
                return bad(format!("{kind:?} is no kind: expected {LABEL_KEY_EXPECTED}"));
            }
            let GenericOffer::Named(ids) = offer else { continue };
            if ids.len() > GENERIC_IDS_MAX {
                return bad(format!("{kind} has {} ids, at most {GENERIC_IDS_MAX}", ids.len()));
            }
            // They stand in one variable, with commas between them.
            let wrong = |id: &&String| id.is_empty() || id.contains(|c: char| c == ',' || c.is_control());
            if let Some(id) = ids.iter().find(wrong) {
                return bad(format!("{id:?} is no id of {kind}: expected text without commas"));
            }
        }
        Ok(())
    }

    /// What the cluster may use of `capacity`.
    pub fn offered(&self, capacity: Resources) -> Resources {
        let amount = |a: &Amount, key| a.resources(key).unwrap_or_default();
        let (offer, reserve) = (amount(&self.offer, "offer"), amount(&self.reserve, "reserve"));
        let one = |offer: u64, capacity: u64, reserve: u64| {
            if offer > 0 { offer.min(capacity) } else { capacity.saturating_sub(reserve) }
        };
        Resources {
            nano_cpus: one(offer.nano_cpus, capacity.nano_cpus, reserve.nano_cpus),
            mem_bytes: one(offer.mem_bytes, capacity.mem_bytes, reserve.mem_bytes),
        }
    }

    /// The underlay addresses that were set.
    pub fn underlay(&self) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let v4 = self.underlay.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
        let v6 = self.underlay.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
        (v4, v6)
    }
}

impl Amount {
    /// The amount; what is absent is 0.
    ///
    /// # Errors
    /// A value that is not an amount, under `key`.
    pub fn resources(&self, key: &'static str) -> Result<Resources, ConfigError> {
        let bad = |message: String| ConfigError::value(key, message);
        let cpus = self.cpus.unwrap_or(0.0);
        if !(0.0..=1e6).contains(&cpus) {
            return Err(bad(format!("{cpus} CPUs")));
        }
        let mem_bytes = match &self.memory {
            None => 0,
            Some(text) => {
                parse_bytes(text).ok_or_else(|| bad(format!("memory {text:?} is not like 512MiB or 2GiB")))?
            }
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 1e15, checked above")]
        Ok(Resources { nano_cpus: (cpus * 1e9) as u64, mem_bytes })
    }
}

/// Bytes with a unit: powers of 1,024 with or without the `i`, as engines read them.
fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let shift = match text[digits..].trim().to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |text: &str, expected: Option<u64>| assert_eq!(parse_bytes(text), expected, "{text}");
        check("512", Some(512));
        check("512MiB", Some(512 << 20));
        check("512m", Some(512 << 20));
        check("2 GiB", Some(2 << 30));
        check("1tb", Some(1 << 40));
        check("1.5g", None);
        check("many", None);
        check("99999999999g", None);
    }

    #[test]
    fn what_is_offered() {
        let gib = 1 << 30;
        let capacity = Resources { nano_cpus: 4_000_000_000, mem_bytes: 8 * gib };
        let config = |text: &str| toml::from_str::<Config>(text).unwrap();
        assert_eq!(config("").offered(capacity), capacity);
        let offer = config("offer = { memory = \"512MiB\" }").offered(capacity);
        assert_eq!(offer, Resources { nano_cpus: 4_000_000_000, mem_bytes: gib / 2 });
        let reserve = config("reserve = { cpus = 0.5, memory = \"1GiB\" }").offered(capacity);
        assert_eq!(reserve, Resources { nano_cpus: 3_500_000_000, mem_bytes: 7 * gib });
        assert_eq!(config("offer = { memory = \"99GiB\" }").offered(capacity).mem_bytes, 8 * gib);
    }

    #[test]
    fn generic_resources_are_counted_or_named() {
        let text = "generic = { gpu = [\"GPU-0\", \"GPU-1\"], licence = 3 }\novercommit = { cpu_percent = 150 }";
        let config = toml::from_str::<Config>(text).unwrap();
        config.check().unwrap();
        let named = ["GPU-0", "GPU-1"].map(str::to_owned).into();
        assert_eq!(config.generic["gpu"], GenericOffer::Named(named));
        assert_eq!(config.generic["licence"], GenericOffer::Count(3));
        assert_eq!(config.overcommit, Some(Overcommit { cpu_percent: 150, memory_percent: 100 }));
    }

    #[test]
    fn what_scheduling_md_shows_is_good() {
        let doc = include_str!("../../docs/scheduling.md");
        let block = doc.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("it shows one");
        let config = toml::from_str::<Config>(block).unwrap();
        config.check().unwrap();
        assert_eq!((config.generic["gpu"].count(), config.generic["licence"].count()), (2, 3));
    }

    #[test]
    fn a_wrong_key_is_named() {
        let error = |text: &str| toml::from_str::<Config>(text).unwrap().check().unwrap_err().to_string();
        assert_eq!(
            error("offer = { memory = \"much\" }"),
            "configuration key `offer`: memory \"much\" is not like 512MiB or 2GiB"
        );
        assert_eq!(error("state_dir = \"x\""), "configuration key `state_dir`: x is not an absolute path");
        assert_eq!(
            error("overcommit = { cpu_percent = 5 }"),
            "configuration key `overcommit`: 5 percent is not 10 to 10000"
        );
        let bad_id = "configuration key `generic`: \"a,b\" is no id of gpu: expected text without commas";
        assert_eq!(error("generic = { gpu = [\"a,b\"] }"), bad_id);
        assert!(error("generic = { \"a b\" = 1 }").contains("\"a b\" is no kind: expected letters"));
        assert!(error("labels = { \"a b\" = \"x\" }").contains("configuration key `labels`: label key \"a b\""));
        assert_eq!(error("vxlan_port = 0"), "configuration key `vxlan_port`: 0 is not a port");
        assert!(toml::from_str::<Config>("stat_dir = \"/x\"").unwrap_err().to_string().contains("unknown field"));
    }
}

//! The agent's configuration: file, then environment, then flags; read and checked once.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use skein_api::Resources;
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
    /// What the cluster may use of this host; default: all of it less `reserve`.
    pub offer: Amount,
    /// What the cluster may not use.
    pub reserve: Amount,
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
            offer: Amount::default(),
            reserve: Amount::default(),
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
    fn a_wrong_key_is_named() {
        let error = |text: &str| toml::from_str::<Config>(text).unwrap().check().unwrap_err().to_string();
        assert_eq!(
            error("offer = { memory = \"much\" }"),
            "configuration key `offer`: memory \"much\" is not like 512MiB or 2GiB"
        );
        assert_eq!(error("state_dir = \"x\""), "configuration key `state_dir`: x is not an absolute path");
        assert_eq!(error("vxlan_port = 0"), "configuration key `vxlan_port`: 0 is not a port");
        assert!(toml::from_str::<Config>("stat_dir = \"/x\"").unwrap_err().to_string().contains("unknown field"));
    }
}

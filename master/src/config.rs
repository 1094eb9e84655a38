//! The master's configuration: file, then environment, then flags; read and checked once.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;
use master_core::Settings;
use serde::Deserialize;
use skein_api::{DEFAULT_PORT, DEFAULT_SOCKET, OVERCOMMIT_PERCENT, Overcommit, Strategy};
use skein_daemon::{ConfigError, LogFormat, check_absolute, read_config};

/// Where a configuration is read from unless a flag says otherwise. It need not be there.
pub const DEFAULT_FILE: &str = "/etc/skein/master.toml";

/// What `skein-master` runs with.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Store and keys; only root may read it.
    pub data_dir: PathBuf,
    /// TCP address for agents and remote users; mutual TLS only.
    pub listen: SocketAddr,
    /// Unix socket for the local operator.
    pub socket: PathBuf,
    /// Further names and addresses of this master, for its certificate.
    pub names: Vec<String>,
    /// Strategy where a service names none.
    pub strategy: Strategy,
    /// How much may be set aside on nodes that have no ratio of their own.
    pub overcommit: Overcommit,
    /// Subnets for networks that name none are cut from this.
    pub subnet_pool: Ipv4Net,
    /// Prefix length of such a subnet, 16 to 28.
    pub subnet_prefix: u8,
    /// `text` or `json`.
    pub log_format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        let settings = Settings::default();
        Self {
            data_dir: "/var/lib/skein/master".into(),
            listen: SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, DEFAULT_PORT)),
            socket: DEFAULT_SOCKET.into(),
            names: Vec::new(),
            strategy: settings.strategy,
            overcommit: settings.overcommit,
            subnet_pool: settings.subnet_pool,
            subnet_prefix: settings.subnet_prefix,
            log_format: LogFormat::Text,
        }
    }
}

/// Values from flags and environment; each wins over the file's.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Overrides {
    /// Configuration file (TOML).
    #[arg(long, env = "SKEIN_MASTER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Directory of the store.
    #[arg(long, env = "SKEIN_MASTER_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// TCP address for agents and remote users.
    #[arg(long, env = "SKEIN_MASTER_LISTEN")]
    pub listen: Option<SocketAddr>,
    /// Unix socket for the local operator.
    #[arg(long, env = "SKEIN_MASTER_SOCKET")]
    pub socket: Option<PathBuf>,
}

impl Config {
    /// Reads the file (a missing default one counts as empty), lays `overrides` over it, and checks the result.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        let mut config: Self = read_config(overrides.config.as_deref(), Path::new(DEFAULT_FILE))?;
        if let Some(v) = &overrides.data_dir {
            config.data_dir.clone_from(v);
        }
        if let Some(v) = overrides.listen {
            config.listen = v;
        }
        if let Some(v) = &overrides.socket {
            config.socket.clone_from(v);
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_absolute(&[("data_dir", &self.data_dir), ("socket", &self.socket)])?;
        if !(16..=28).contains(&self.subnet_prefix) {
            return Err(ConfigError::value("subnet_prefix", format!("{} is not 16 to 28", self.subnet_prefix)));
        }
        let Overcommit { cpu_percent, memory_percent } = self.overcommit;
        if let Some(wrong) = [cpu_percent, memory_percent].iter().find(|p| !OVERCOMMIT_PERCENT.contains(p)) {
            return Err(ConfigError::value("overcommit", format!("{wrong} percent is not 10 to 10000")));
        }
        if self.subnet_pool.prefix_len() > self.subnet_prefix {
            let message = format!("{} is smaller than one subnet of /{}", self.subnet_pool, self.subnet_prefix);
            return Err(ConfigError::value("subnet_pool", message));
        }
        Ok(())
    }

    /// The part that decisions depend on.
    pub fn settings(&self) -> Settings {
        Settings {
            strategy: self.strategy,
            overcommit: self.overcommit,
            subnet_pool: self.subnet_pool.trunc(),
            subnet_prefix: self.subnet_prefix,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let file = std::env::temp_dir().join(format!("skein-config-{}-{}", std::process::id(), text.len()));
        std::fs::write(&file, text).expect("the temporary directory can be written");
        let result = Config::load(&Overrides { config: Some(file.clone()), ..Overrides::default() });
        std::fs::remove_file(&file).expect("just written");
        let found = match result {
            Ok(config) => format!("ok {} {}", config.subnet_pool, config.subnet_prefix),
            Err(e) => e.to_string().replace(&file.display().to_string(), "FILE"),
        };
        assert!(found.contains(expected), "{found}\ndoes not contain\n{expected}");
    }

    #[test]
    fn a_wrong_key_is_named() {
        check("", "ok 10.64.0.0/10 20");
        check("subnet_pool = \"10.0.0.0/8\"\nsubnet_prefix = 24", "ok 10.0.0.0/8 24");
        check("subnet_prefix = 30", "configuration key `subnet_prefix`: 30 is not 16 to 28");
        check("overcommit = { cpu_percent = 150 }", "ok");
        check("overcommit = { memory_percent = 1 }", "configuration key `overcommit`: 1 percent is not 10 to 10000");
        check("overcommit = { cpus = 2 }", "unknown field `cpus`");
        check("data_dir = \"x\"", "configuration key `data_dir`: x is not an absolute path");
        check("strategy = \"fast\"", "unknown variant `fast`, expected one of `spread`, `binpack`, `random`");
        check("listne = \"[::]:1\"", "unknown field `listne`");
    }
}

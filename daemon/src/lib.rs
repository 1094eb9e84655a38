//! What `skein-master` and `skein-agent` have in common as processes: how a configuration file is read and refused, how
//! they log, how they are told to end, how they say why they failed. Knows nothing of what either does.

mod lock;

use std::{
    error::Error,
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

pub use lock::lock_soon;

use serde::{Deserialize, de::DeserializeOwned};

/// Exit code of a wrong configuration (`EX_USAGE` of sysexits.h).
pub const EXIT_CONFIG: u8 = 64;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a configuration; the message names key, line and column.
    #[error("failed to parse configuration file {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong where.
        message: String,
    },
    /// A value is out of range.
    #[error("configuration key `{key}`: {message}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

impl ConfigError {
    /// A value that is out of range.
    pub fn value(key: &'static str, message: impl Into<String>) -> Self {
        Self::Value { key, message: message.into() }
    }
}

/// Reads a TOML file into a configuration. `chosen` must be there; without it `usual` is read, and counts as empty when
/// it is missing. Keys that `T` does not know are refused if it denies them.
///
/// # Errors
/// [`ConfigError::Read`], [`ConfigError::Parse`].
pub fn read_config<T: DeserializeOwned + Default>(chosen: Option<&Path>, usual: &Path) -> Result<T, ConfigError> {
    let path = chosen.unwrap_or(usual);
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: path.to_owned(), message: e.to_string().trim_end().to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound && chosen.is_none() => Ok(T::default()),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

/// Refuses paths that depend on the working directory.
///
/// # Errors
/// [`ConfigError::Value`] with the first key whose path is relative.
pub fn check_absolute(paths: &[(&'static str, &Path)]) -> Result<(), ConfigError> {
    match paths.iter().find(|(_, path)| !path.is_absolute()) {
        Some((key, path)) => Err(ConfigError::value(key, format!("{} is not an absolute path", path.display()))),
        None => Ok(()),
    }
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object per line.
    Json,
}

/// Logs to standard error from now on; `RUST_LOG` says how much, default is `info`.
pub fn init_log(format: LogFormat) {
    use tracing_subscriber::{EnvFilter, fmt};
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// An error with its causes, on one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        write!(text, ": {cause}").expect("a String takes everything");
        source = cause.source();
    }
    text
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        write!(out, "{byte:02x}").expect("a String takes everything");
        out
    })
}

/// Says why the process ends, and gives its exit code.
#[allow(clippy::print_stderr, reason = "the process ends with this message")]
pub fn fail(error: &(dyn Error + 'static), hint: Option<&str>, code: u8) -> ExitCode {
    eprintln!("error: {}", chain(error));
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(code)
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// When signals cannot be watched.
pub async fn wait_for_signal() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // Cancel-safe: a signal that came is not lost with the other's future.
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}

/// Raises the soft limit of open descriptors to the hard one. Service managers start processes with 1,024, for the sake of
/// programs that use `select`; a master has one per agent. What cannot be raised stays, and the log says what it is.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        let soft = getrlimit(Resource::Nofile).current;
        tracing::warn!(%error, ?soft, "limit of open descriptors stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        name: String,
    }

    #[test]
    fn a_missing_usual_file_is_empty_and_a_missing_chosen_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing.toml");
        assert_eq!(read_config::<Config>(None, &missing).unwrap(), Config::default());
        let error = read_config::<Config>(Some(&missing), &missing).unwrap_err();
        assert!(chain(&error).contains("missing.toml: No such file"), "{}", chain(&error));
    }

    #[test]
    fn a_mistake_is_named_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let check = |text: &str, expected: &str| {
            std::fs::write(&file, text).unwrap();
            let error = read_config::<Config>(Some(&file), &file).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("nmae = \"x\"", "unknown field `nmae`, expected `name`");
        check("name = 1", "line 1, column 8");
        check("name = ", "c.toml");
        assert_eq!(
            check_absolute(&[("a", Path::new("/x")), ("b", Path::new("y"))]).unwrap_err().to_string(),
            "configuration key `b`: y is not an absolute path"
        );
    }
}

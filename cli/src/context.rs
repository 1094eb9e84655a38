//! Contexts: which master to talk to, and as whom.
//!
//! Owns the files under `$XDG_CONFIG_HOME/skein` (or `~/.config/skein`): `contexts/<name>.json`, readable by the user
//! alone since it holds the key, and `current`, the name of the one in use. `default` is built in: the local socket.
//! Order of choice: `--host`, `--context`, SKEIN_HOST, SKEIN_CONTEXT, the current context.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use skein_api::{
    DEFAULT_PORT, DEFAULT_SOCKET,
    client::{Client, TlsIdentity},
};

use crate::{
    compose::values::check_name,
    fail::{Failure, code},
};

/// Name of the built-in context.
pub(crate) const DEFAULT: &str = "default";

/// A master and who one is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Context {
    /// `unix:///path` or `tcp://host:port`.
    pub(crate) host: String,
    /// Name in the master's certificate, when it is not the host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) server_name: Option<String>,
    /// PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) ca_pem: String,
    /// PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) certificate_pem: String,
    /// PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) key_pem: String,
}

/// What a user said about which master is meant, by flags and environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) host: Option<String>,
    pub(crate) context: Option<String>,
    pub(crate) tls_dir: Option<PathBuf>,
    pub(crate) env_host: Option<String>,
    pub(crate) env_context: Option<String>,
}

/// Where a master listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(String, u16),
}

/// Reads `unix:///path`, `tcp://host[:port]` or `tcp://[v6]:port`.
pub(crate) fn parse_address(text: &str) -> Result<Address, Failure> {
    let bad = || {
        let message = format!(
            "expected a master's address such as unix://{DEFAULT_SOCKET} or tcp://host:{DEFAULT_PORT}, found {text:?}"
        );
        Failure::new(code::BAD_CONFIG, message, None)
    };
    if let Some(path) = text.strip_prefix("unix://") {
        return if path.starts_with('/') { Ok(Address::Unix(path.into())) } else { Err(bad()) };
    }
    let rest = text.strip_prefix("tcp://").ok_or_else(bad)?.trim_end_matches('/');
    let (host, port) = match rest.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6.split_once(']').ok_or_else(bad)?;
            (host, port.strip_prefix(':'))
        }
        None => rest.split_once(':').map_or((rest, None), |(h, p)| (h, Some(p))),
    };
    let port = port.map_or(Ok(DEFAULT_PORT), |p| p.parse().map_err(|_| bad()))?;
    if host.is_empty() || host.contains(['/', '@']) {
        return Err(bad());
    }
    Ok(Address::Tcp(host.into(), port))
}

impl Context {
    /// The built-in one.
    fn local() -> Self {
        Self { host: format!("unix://{DEFAULT_SOCKET}"), ..Self::default() }
    }

    /// A client of this master.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        match parse_address(&self.host)? {
            Address::Unix(path) => Ok(Client::unix(path)),
            Address::Tcp(host, port) => {
                if self.ca_pem.is_empty() || self.certificate_pem.is_empty() || self.key_pem.is_empty() {
                    let message =
                        format!("no certificates for {}: a master takes nothing but mutual TLS on TCP", self.host);
                    let hint = "issue them on the master's host (`skein cert issue NAME --out DIR`), then `skein context \
                                create NAME --host URL --certs DIR`, or give `--tls-dir DIR`";
                    return Err(Failure::new(code::BAD_CONFIG, message, Some(hint)));
                }
                let identity = TlsIdentity {
                    ca_pem: self.ca_pem.clone().into(),
                    certificate_pem: self.certificate_pem.clone().into(),
                    key_pem: self.key_pem.clone().into(),
                };
                Ok(Client::tls(&host, port, self.server_name.as_deref(), &identity)?)
            }
        }
    }

    /// Reads certificates from the three files of a directory, as `skein cert issue --out` writes them.
    pub(crate) fn with_certs(mut self, dir: &Path) -> Result<Self, Failure> {
        self.ca_pem = read(&dir.join("ca.pem"))?;
        self.certificate_pem = read(&dir.join("cert.pem"))?;
        self.key_pem = read(&dir.join("key.pem"))?;
        Ok(self)
    }
}

/// Reads a file that the user named.
pub(crate) fn read(path: &Path) -> Result<String, Failure> {
    let failed = |e: io::Error| Failure::new(code::BAD_CONFIG, format!("failed to read {}: {e}", path.display()), None);
    fs::read_to_string(path).map_err(failed)
}

/// Writes a file that only the user may read; refuses to replace one unless told to.
pub(crate) fn write_private(path: &Path, bytes: &[u8], replace: bool) -> Result<(), Failure> {
    let write = |path: &Path, new: bool| {
        let mut options = fs::OpenOptions::new();
        options.write(true).mode(0o600);
        if new {
            options.create_new(true)
        } else {
            options.create(true).truncate(true)
        };
        let mut file = options.open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    let done = if replace {
        // Beside and renamed: a full disk does not cost what was there.
        let beside = path.with_extension("new");
        write(&beside, false).and_then(|()| fs::rename(&beside, path))
    } else {
        write(path, true)
    };
    done.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => {
            Failure::new(code::CONFLICT, format!("{} is there already", path.display()), None)
        }
        _ => Failure::io(format!("failed to write {}", path.display()), &e),
    })
}

/// Makes a directory that only the user may enter.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), Failure> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|e| Failure::io(format!("failed to make the directory {}", path.display()), &e))
}

/// The contexts of a user.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    dir: Option<PathBuf>,
}

impl Store {
    /// The usual place, from XDG_CONFIG_HOME and HOME.
    pub(crate) fn new(xdg_config_home: Option<String>, home: Option<String>) -> Self {
        let xdg = xdg_config_home.filter(|d| d.starts_with('/')).map(PathBuf::from);
        let dir = xdg.or_else(|| Some(PathBuf::from(home.filter(|h| !h.is_empty())?).join(".config")));
        Self { dir: dir.map(|d| d.join("skein")) }
    }

    fn dir(&self) -> Result<&Path, Failure> {
        let none =
            || Failure::new(code::BAD_CONFIG, "no place for contexts: neither XDG_CONFIG_HOME nor HOME is set", None);
        self.dir.as_deref().ok_or_else(none)
    }

    fn path(&self, name: &str) -> Result<PathBuf, Failure> {
        check_name("context", name).map_err(|e| Failure::new(code::BAD_CONFIG, e, None))?;
        Ok(self.dir()?.join("contexts").join(format!("{name}.json")))
    }

    /// Name of the current context.
    pub(crate) fn current(&self) -> String {
        let text = self.dir.as_ref().and_then(|d| fs::read_to_string(d.join("current")).ok());
        text.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()).unwrap_or_else(|| DEFAULT.into())
    }

    /// A context by its name.
    pub(crate) fn get(&self, name: &str) -> Result<Context, Failure> {
        if name == DEFAULT {
            return Ok(Context::local());
        }
        let path = self.path(name)?;
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Failure::new(
                    code::NOT_FOUND,
                    format!("there is no context {name:?}"),
                    Some("skein context ls"),
                ));
            }
            Err(e) => return Err(Failure::io(format!("failed to read {}", path.display()), &e)),
        };
        serde_json::from_str(&text)
            .map_err(|e| Failure::new(code::BAD_CONFIG, format!("bad context file {}: {e}", path.display()), None))
    }

    /// Names of all contexts, sorted, the built-in one first.
    pub(crate) fn names(&self) -> Vec<String> {
        let files = self.dir.as_ref().and_then(|d| fs::read_dir(d.join("contexts")).ok());
        let name = |e: io::Result<fs::DirEntry>| Some(e.ok()?.file_name().to_str()?.strip_suffix(".json")?.to_owned());
        let mut names: Vec<String> = files.into_iter().flatten().filter_map(name).collect();
        names.sort();
        names.insert(0, DEFAULT.into());
        names
    }

    /// Keeps a context.
    pub(crate) fn create(&self, name: &str, context: &Context, replace: bool) -> Result<(), Failure> {
        self.not_default(name)?;
        let path = self.path(name)?;
        if !replace && path.exists() {
            let message = format!("there is a context {name:?} already");
            return Err(Failure::new(code::CONFLICT, message, Some("replace it with --force")));
        }
        make_private_dir(path.parent().unwrap_or(&path))?;
        let text = serde_json::to_vec_pretty(context).expect("a context has string keys only");
        write_private(&path, &text, replace)
    }

    /// Makes a context the current one.
    pub(crate) fn select(&self, name: &str) -> Result<(), Failure> {
        self.get(name)?;
        make_private_dir(self.dir()?)?;
        write_private(&self.dir()?.join("current"), format!("{name}\n").as_bytes(), true)
    }

    /// Forgets a context; the default becomes current if it was.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Failure> {
        self.not_default(name)?;
        self.get(name)?;
        if self.current() == name {
            self.select(DEFAULT)?;
        }
        let path = self.path(name)?;
        fs::remove_file(&path).map_err(|e| Failure::io(format!("failed to remove {}", path.display()), &e))
    }

    fn not_default(&self, name: &str) -> Result<(), Failure> {
        if name == DEFAULT {
            return Err(Failure::new(code::BAD_CONFIG, "the context \"default\" is built in: the local socket", None));
        }
        Ok(())
    }

    /// The master that is meant, and the name of its context if it is one.
    pub(crate) fn resolve(&self, choice: &Choice) -> Result<(Option<String>, Context), Failure> {
        let host = |host: &str| -> Result<(Option<String>, Context), Failure> {
            let context = Context { host: host.to_owned(), ..Default::default() };
            Ok((
                None,
                match &choice.tls_dir {
                    Some(dir) => context.with_certs(dir)?,
                    None => context,
                },
            ))
        };
        let named = |name: &str| Ok((Some(name.to_owned()), self.get(name)?));
        match (&choice.host, &choice.context, &choice.env_host, &choice.env_context) {
            (Some(url), ..) => host(url),
            (_, Some(name), ..) => named(name),
            (_, _, Some(url), _) => host(url),
            (_, _, _, Some(name)) => named(name),
            _ => named(&self.current()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(None, Some(dir.path().to_str().unwrap().into()));
        (dir, store)
    }

    #[test]
    fn addresses() {
        let check = |text: &str, expected: Option<Address>| assert_eq!(parse_address(text).ok(), expected, "{text}");
        check("unix:///run/s.sock", Some(Address::Unix("/run/s.sock".into())));
        check("tcp://m1", Some(Address::Tcp("m1".into(), DEFAULT_PORT)));
        check("tcp://m1:99/", Some(Address::Tcp("m1".into(), 99)));
        check("tcp://[fd00::1]:99", Some(Address::Tcp("fd00::1".into(), 99)));
        check("tcp://[fd00::1]", Some(Address::Tcp("fd00::1".into(), DEFAULT_PORT)));
        for bad in
            ["", "m1:99", "unix://x", "tcp://", "tcp://m1:x", "tcp://m1:99999", "http://m1", "tcp://a@b", "tcp://[::1"]
        {
            check(bad, None);
        }
    }

    #[test]
    fn life_of_a_context() {
        let (dir, store) = store();
        assert_eq!((store.current().as_str(), store.names()), (DEFAULT, vec![DEFAULT.to_owned()]));
        let context = Context { host: "tcp://m1:1".into(), key_pem: "secret".into(), ..Default::default() };
        store.create("prod", &context, false).unwrap();
        let file = dir.path().join(".config/skein/contexts/prod.json");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(store.get("prod").unwrap(), context);
        assert_eq!(store.create("prod", &context, false).unwrap_err().code, code::CONFLICT);
        store.create("prod", &Context { host: "tcp://m2:1".into(), ..context }, true).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        store.select("prod").unwrap();
        assert_eq!((store.current().as_str(), store.names()), ("prod", vec![DEFAULT.to_owned(), "prod".into()]));
        assert_eq!(store.resolve(&Choice::default()).unwrap().1.host, "tcp://m2:1");
        store.remove("prod").unwrap();
        assert_eq!(store.current(), DEFAULT);
        assert_eq!(store.get("prod").unwrap_err().code, code::NOT_FOUND);
        assert_eq!(store.select("prod").unwrap_err().code, code::NOT_FOUND);
        assert_eq!(store.create("../x", &Context::default(), false).unwrap_err().code, code::BAD_CONFIG);
        assert_eq!(store.remove(DEFAULT).unwrap_err().code, code::BAD_CONFIG);
    }

    #[test]
    fn order_of_choice() {
        let (_dir, store) = store();
        for name in ["a", "b", "c"] {
            store.create(name, &Context { host: format!("tcp://{name}"), ..Default::default() }, false).unwrap();
        }
        store.select("c").unwrap();
        let some = |s: &str| Some(s.to_owned());
        let mut choice = Choice {
            host: some("tcp://flag"),
            context: some("a"),
            env_host: some("tcp://env"),
            env_context: some("b"),
            ..Default::default()
        };
        let mut check = |drop: fn(&mut Choice), expected: &str| {
            assert_eq!(store.resolve(&choice).unwrap().1.host, expected);
            drop(&mut choice);
        };
        check(|c| c.host = None, "tcp://flag");
        check(|c| c.context = None, "tcp://a");
        check(|c| c.env_host = None, "tcp://env");
        check(|c| c.env_context = None, "tcp://b");
        check(|_| (), "tcp://c");
        let failure = store.get("c").unwrap().client().unwrap_err();
        assert!(failure.text.starts_with("error: no certificates for tcp://c: "), "{}", failure.text);
        assert!(Context::local().client().is_ok());
    }
}

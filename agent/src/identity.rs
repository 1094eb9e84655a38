//! Who this host is: its key, its certificate, the cluster it trusts, and how to connect to a master with them.
//!
//! The key is made here and never leaves. A directory holds `key.pem` (mode 0600), `certificate.pem`, `ca.pem` and
//! `node.json`; each is written whole or not at all.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use ring::digest;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring as provider},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use serde::{Deserialize, Serialize};
use skein_api::{MASTER_NAME, grpc::agent_client::AgentClient};
use skein_daemon::hex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

/// TCP and TLS take three round trips; between continents that is a second.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// A master that answers no ping for this long is gone, whatever TCP still believes. Below the master's detection.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// What a host remembers of its membership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Id of the node.
    pub node: String,
    /// Addresses of masters, `host:port`, tried in turn.
    pub masters: Vec<String>,
    /// SHA-256 of the CA certificate, hex: the cluster.
    pub cluster: String,
    /// Name that the host joined under.
    pub name: String,
}

/// A failure around identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("failed to use identity file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("failed to read identity file {path}: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The key or a request cannot be made.
    #[error("failed to make a key or a signing request")]
    Key(#[from] rcgen::Error),
    /// TLS does not accept the certificates.
    #[error("failed to set up TLS")]
    Tls(#[from] rustls::Error),
}

/// The identity's directory.
#[derive(Clone, Debug)]
pub struct IdentityDir(PathBuf);

fn damaged(path: &Path, reason: impl std::fmt::Display) -> IdentityError {
    IdentityError::Damaged { path: path.to_owned(), reason: reason.to_string() }
}

impl IdentityDir {
    /// The directory `identity` below the agent's state.
    pub fn new(state_dir: &Path) -> Self {
        Self(state_dir.join("identity"))
    }

    fn read(&self, name: &str) -> Result<Option<String>, IdentityError> {
        let path = self.0.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(IdentityError::File { path, source }),
        }
    }

    /// Writes a file so that after a crash it is the old one or the new one.
    fn write(&self, name: &str, text: &str) -> Result<(), IdentityError> {
        let (path, new) = (self.0.join(name), self.0.join(format!("{name}.new")));
        let write = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
            let mut options = fs::OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            fs::File::open(&self.0)?.sync_all()
        };
        write().map_err(|source| IdentityError::File { path: path.clone(), source })
    }

    /// The membership, if the host joined.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn membership(&self) -> Result<Option<Membership>, IdentityError> {
        let Some(text) = self.read("node.json")? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|e| damaged(&self.0.join("node.json"), e))
    }

    /// The host's key; made on the first call.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn ensure_key(&self) -> Result<KeyPair, IdentityError> {
        if let Some(pem) = self.read("key.pem")? {
            return KeyPair::from_pem(&pem).map_err(|e| damaged(&self.0.join("key.pem"), e));
        }
        let key = KeyPair::generate()?;
        self.write("key.pem", &key.serialize_pem())?;
        Ok(key)
    }

    /// Remembers a certificate; with `membership` also what cluster it is for.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn store(&self, certificate: &str, ca: &str, membership: Option<&Membership>) -> Result<(), IdentityError> {
        self.write("ca.pem", ca)?;
        self.write("certificate.pem", certificate)?;
        if let Some(membership) = membership {
            self.write("node.json", &serde_json::to_string_pretty(membership).expect("strings are JSON"))?;
        }
        Ok(())
    }

    /// Forgets everything (`leave`).
    ///
    /// # Errors
    /// When the directory cannot be removed.
    pub fn remove(&self) -> Result<(), IdentityError> {
        match fs::remove_dir_all(&self.0) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(IdentityError::File { path: self.0.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn certificate(&self, name: &str) -> Result<CertificateDer<'static>, IdentityError> {
        let path = self.0.join(name);
        let text = self.read(name)?.ok_or_else(|| damaged(&path, "it is missing"))?;
        CertificateDer::from_pem_slice(text.as_bytes()).map_err(|e| damaged(&path, e))
    }

    /// When the certificate began and ends, seconds since 1970.
    ///
    /// # Errors
    /// When there is none.
    pub fn validity(&self) -> Result<(i64, i64), IdentityError> {
        let certificate = self.certificate("certificate.pem")?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate)
            .map_err(|e| damaged(&self.0.join("certificate.pem"), e))?;
        let validity = parsed.validity();
        Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
    }

    /// TLS that trusts the cluster's CA and shows the node's certificate (`authenticated`), or shows none.
    ///
    /// # Errors
    /// When the files are not there or not usable.
    pub fn tls(&self, authenticated: bool) -> Result<ClientConfig, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate("ca.pem")?)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        let mut config = if authenticated {
            let key = PrivateKeyDer::try_from(self.ensure_key()?.serialize_der())
                .map_err(|e| damaged(&self.0.join("key.pem"), e))?;
            builder.with_client_auth_cert(vec![self.certificate("certificate.pem")?], key)?
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// A certificate signing request for `key`. Subject and names are the master's business.
///
/// # Errors
/// When the key cannot sign.
pub fn signing_request(key: &KeyPair) -> Result<Vec<u8>, IdentityError> {
    Ok(CertificateParams::default().serialize_request(key)?.der().to_vec())
}

/// TLS that trusts the one CA with this SHA-256 (hex), as a join token names it.
///
/// # Errors
/// When TLS cannot be set up.
pub fn pinned_tls(ca_sha256: &str) -> Result<ClientConfig, IdentityError> {
    let provider = Arc::new(provider::default_provider());
    let verifier = Arc::new(Pinned { ca_sha256: ca_sha256.to_ascii_lowercase(), provider: provider.clone() });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Accepts a chain whose CA has the pinned digest, and then only what that CA signed for a master.
#[derive(Debug)]
struct Pinned {
    ca_sha256: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |c: &&CertificateDer<'_>| hex(digest::digest(&digest::SHA256, c).as_ref()) == self.ca_sha256;
        let Some(ca) = intermediates.iter().find(pinned) else {
            return Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer));
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Why there is no connection to a master, in words that say what to do.
#[derive(Debug, thiserror::Error)]
#[error("failed to connect to the master at {address}: {reason}")]
pub struct ConnectError {
    address: String,
    reason: String,
}

/// How a master is reached: by this host's TCP, or by the network of a simulation.
pub trait Dial: Clone + Send + Sync + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Connects to `address` (`host:port`).
    fn dial(&self, address: &str) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// This host's TCP.
#[derive(Clone, Copy, Debug)]
pub struct Tcp;

impl Dial for Tcp {
    type Stream = TcpStream;

    async fn dial(&self, address: &str) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Connects to the master at `address` (`host:port`).
///
/// # Errors
/// Unreachable, another CA, an expired certificate, a clock far off: each in words.
pub async fn connect(net: &impl Dial, address: &str, tls: ClientConfig) -> Result<AgentClient<Channel>, ConnectError> {
    let failed = |reason: String| ConnectError { address: address.to_owned(), reason };
    // tonic reports a failed connector as "transport error"; the reason is in its sources.
    let connector = TlsConnector::from(Arc::new(tls));
    let (net, target) = (net.clone(), address.to_owned());
    let connector = tower::service_fn(move |_| {
        let (net, connector, target) = (net.clone(), connector.clone(), target.clone());
        async move {
            let stream = net.dial(&target).await?;
            let name = ServerName::try_from(MASTER_NAME).expect("a valid DNS name");
            Ok::<_, io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    });
    let endpoint = Endpoint::from_static("http://skein-master")
        .connect_timeout(CONNECT_WITHIN)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    match endpoint.connect_with_connector(connector).await {
        Ok(channel) => Ok(AgentClient::new(channel).max_decoding_message_size(64 << 20)),
        Err(error) => Err(failed(explain(&error))),
    }
}

/// The innermost cause of a failed connection, with what to do about the usual ones.
fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause: &(dyn std::error::Error + 'static) = error;
    loop {
        if let Some(tls) = tls_error(cause) {
            return match tls {
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                    "its certificate is not signed by the CA that the token names; \
                     hint: this master belongs to another cluster, or somebody is in between"
                        .to_owned()
                }
                rustls::Error::InvalidCertificate(
                    CertificateError::NotValidYet
                    | CertificateError::NotValidYetContext { .. }
                    | CertificateError::Expired
                    | CertificateError::ExpiredContext { .. },
                ) => "its certificate is not valid at this host's time; \
                     hint: the clock of this host or of the master is far off, set it (chronyc makestep)"
                    .to_owned(),
                other => other.to_string(),
            };
        }
        match cause.source() {
            Some(source) => cause = source,
            None => return cause.to_string(),
        }
    }
}

/// A TLS error, also inside an I/O error, which does not show it as its source.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref() {
        return Some(tls);
    }
    error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let state = tempfile::tempdir().unwrap();
        let dir = IdentityDir::new(state.path());
        let first = dir.ensure_key().unwrap().serialize_pem();
        assert_eq!(dir.ensure_key().unwrap().serialize_pem(), first);
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(state.path().join("identity/key.pem")), 0o600);
        assert_eq!(mode(state.path().join("identity")), 0o700);
        assert_eq!(dir.membership().unwrap(), None);
        dir.remove().unwrap();
        dir.remove().unwrap();
    }

    #[test]
    fn a_damaged_file_is_named() {
        let state = tempfile::tempdir().unwrap();
        let dir = IdentityDir::new(state.path());
        dir.write("node.json", "{").unwrap();
        let error = dir.membership().unwrap_err().to_string();
        assert!(error.contains("identity/node.json") && error.contains("EOF"), "{error}");
    }

    #[test]
    fn a_refused_certificate_says_what_to_do() {
        let check = |error: CertificateError, expected: &str| {
            // As it comes out of a connector: an I/O error around TLS's, which is not its source.
            let error = io::Error::other(rustls::Error::InvalidCertificate(error));
            let words = explain(&error);
            assert!(words.contains(expected), "{words}");
        };
        check(CertificateError::UnknownIssuer, "not signed by the CA that the token names");
        check(CertificateError::Expired, "the clock of this host or of the master is far off");
        check(CertificateError::NotValidYet, "the clock of this host or of the master is far off");
        check(CertificateError::Revoked, "Revoked");
        assert_eq!(explain(&io::Error::from(io::ErrorKind::ConnectionRefused)), "connection refused");
    }
}

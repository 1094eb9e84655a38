//! TLS 1.3 of the master's TCP listener: its own certificate, made anew before it ends, and the verification of
//! clients. A client without a certificate gets through the handshake and may then only join or recover.

use std::sync::{Arc, RwLock};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring as provider,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};

use crate::pki::{self, Ca};

/// The certificate that the listener shows now.
#[derive(Debug)]
pub struct Resolver(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().expect("nobody panics while holding this lock").clone())
    }
}

impl Resolver {
    /// A resolver with a new certificate.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate.
    pub fn new(ca: &Ca, names: &[String]) -> anyhow::Result<Self> {
        Ok(Self(RwLock::new(Arc::new(issue(ca, names)?))))
    }

    /// Replaces the certificate by a new one; open connections keep theirs.
    ///
    /// # Errors
    /// As [`Self::new`]; the present one stays.
    pub fn renew(&self, ca: &Ca, names: &[String]) -> anyhow::Result<()> {
        let new = Arc::new(issue(ca, names)?);
        *self.0.write().expect("nobody panics while holding this lock") = new;
        Ok(())
    }
}

fn issue(ca: &Ca, names: &[String]) -> anyhow::Result<CertifiedKey> {
    let (certificate, key) = ca.issue_master(names)?;
    let (mut chain, key) = pki::parse_pem(&certificate, &key)?;
    // A joining host knows the CA by its digest only, so the chain carries it.
    chain.push(ca.certificate());
    Ok(CertifiedKey::new(chain, provider::sign::any_supported_type(&key)?))
}

/// The listener's configuration.
///
/// # Errors
/// When the CA's certificate cannot be a trust anchor.
pub fn server_config(ca: &Ca, resolver: Arc<Resolver>) -> anyhow::Result<ServerConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate())?;
    let provider = Arc::new(provider::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Neither agents nor the typed client resume sessions: a certificate is looked at for every connection.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

//! The cluster's CA, the certificates that it signs, and join tokens.
//!
//! Keys are ECDSA P-256. A certificate's subject says who its owner is: `OU` is the role, `CN` the node's id or the
//! user's name. The master's certificate carries the fixed name [`MASTER_NAME`], which clients verify whatever address
//! they dialled: identity is the CA's word, not DNS's.

use rand::{TryRngCore as _, rngs::OsRng};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use ring::digest;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, pem::PemObject};
use skein_api::{ApiError, MASTER_NAME, TokenId};
use skein_daemon::hex;
use time::{Duration, OffsetDateTime};

/// Lifetime of the CA: ten years.
const CA_LIFETIME: Duration = Duration::days(3_650);
/// Lifetime of a node's certificate; agents renew at half of it.
pub const NODE_LIFETIME: Duration = Duration::hours(24);
/// Lifetime of the master's own certificate; made anew at each start and at half of it.
pub const MASTER_LIFETIME: Duration = Duration::hours(48);
/// Certificates begin this long ago, so that clocks may differ (a joining host's by at most five minutes).
const BACKDATE: Duration = Duration::minutes(10);
/// Bytes of a token's secret: 128 bits.
const SECRET_BYTES: usize = 16;

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A node, by its certificate.
    Node {
        /// Its id.
        id: String,
        /// SHA-256 of its public key, hex.
        key_digest: String,
    },
    /// A user, by a certificate.
    User(String),
    /// A process on this host, by the unix socket.
    Local(u32),
    /// Nobody yet: a host that wants to join.
    Anonymous,
}

/// The certificate authority.
pub struct Ca {
    certificate_pem: String,
    key: KeyPair,
}

/// A new CA: certificate and key, PEM.
///
/// # Errors
/// When the system has no randomness.
pub fn new_ca(cluster: &str) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name(cluster, "skein-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, CA_LIFETIME);
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn name(common_name: &str, role: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationalUnitName, role);
    name.push(DnType::CommonName, common_name);
    name
}

fn valid_for(params: &mut CertificateParams, lifetime: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATE;
    params.not_after = now + lifetime;
}

impl Ca {
    /// The CA of PEM texts.
    ///
    /// # Errors
    /// When they are not a CA's.
    pub fn load(certificate_pem: &str, key_pem: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::from_pem(key_pem)?;
        Issuer::from_ca_cert_pem(certificate_pem, &key)?;
        Ok(Self { certificate_pem: certificate_pem.to_owned(), key })
    }

    fn issuer(&self) -> Issuer<'static, &KeyPair> {
        Issuer::from_ca_cert_pem(&self.certificate_pem, &self.key).expect("checked when it was loaded")
    }

    /// PEM of the certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The certificate.
    pub fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.certificate_pem.as_bytes()).expect("checked when it was loaded")
    }

    /// SHA-256 of the certificate, hex: what a join token pins.
    pub fn digest(&self) -> String {
        sha256_hex(&self.certificate())
    }

    /// Signs a node's request. The subject is ours, whatever the request says; only its key is taken.
    ///
    /// # Errors
    /// When the request is malformed or its signature does not fit its key.
    pub fn sign_node(&self, csr_der: &[u8], node: &str) -> Result<String, rcgen::Error> {
        let mut request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(node, "skein-node");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        valid_for(&mut params, NODE_LIFETIME);
        request.params = params;
        Ok(request.signed_by(&self.issuer())?.pem())
    }

    fn issue(&self, mut params: CertificateParams, lifetime: Duration) -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        valid_for(&mut params, lifetime);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer())?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// A certificate and key for the master's listener, PEM.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate.
    pub fn issue_master(&self, names: &[String]) -> Result<(String, String), rcgen::Error> {
        let mut all = vec![MASTER_NAME.to_owned(), "localhost".into(), "127.0.0.1".into(), "::1".into()];
        all.extend_from_slice(names);
        let mut params = CertificateParams::new(all)?;
        params.distinguished_name = name(MASTER_NAME, "skein-master");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(params, MASTER_LIFETIME)
    }

    /// A certificate and key for a user, PEM.
    ///
    /// # Errors
    /// When the name cannot stand in a certificate.
    pub fn issue_user(&self, user: &str, lifetime_s: u64) -> Result<(String, String), rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(user, "skein-user");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params, Duration::seconds(i64::try_from(lifetime_s).unwrap_or(i64::MAX)))
    }
}

/// SHA-256, hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// SHA-256 of the public key of a signing request, hex, after checking that the request is signed by that key.
///
/// # Errors
/// When it is not a signing request or its signature is wrong.
pub fn csr_key_digest(csr_der: &[u8]) -> Result<String, rcgen::Error> {
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))?;
    Ok(sha256_hex(&request.public_key.subject_public_key_info()))
}

/// Who a verified client certificate names.
pub fn identity(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let subject = parsed.subject();
    let role = subject.iter_organizational_unit().next()?.as_str().ok()?;
    let common_name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    match role {
        "skein-node" => Some(Identity::Node { id: common_name, key_digest: sha256_hex(parsed.public_key().raw) }),
        "skein-user" => Some(Identity::User(common_name)),
        _ => None,
    }
}

/// Certificate chain and key of PEM texts, for rustls.
///
/// # Errors
/// When they are not PEM.
pub fn parse_pem(
    certificate_pem: &str,
    key_pem: &str,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), rustls_pki_types::pem::Error> {
    let chain = CertificateDer::pem_slice_iter(certificate_pem.as_bytes()).collect::<Result<_, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_slice(key_pem.as_bytes())?))
}

/// `bytes` random bytes as hex.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0; bytes];
    OsRng.try_fill_bytes(&mut buffer).expect("the system has randomness");
    hex(&buffer)
}

/// A random 64-bit number.
pub fn random_u64() -> u64 {
    OsRng.try_next_u64().expect("the system has randomness")
}

/// A new join token: public id, secret, and the whole text `SKEIN-1-<CA digest>-<id>-<secret>`.
pub fn new_token(ca_digest: &str) -> (TokenId, String, String) {
    let (id, secret) = (random_hex(6), random_hex(SECRET_BYTES));
    let text = format!("SKEIN-1-{ca_digest}-{id}-{secret}");
    (TokenId::new(id), secret, text)
}

/// Public id and hash of the secret of a token's text.
///
/// # Errors
/// `token_malformed`, and `token_foreign` when it pins another CA.
pub fn parse_token(text: &str, ca_digest: &str) -> Result<(TokenId, String), ApiError> {
    let token = skein_api::JoinToken::parse(text)?;
    if token.ca_sha256 != ca_digest {
        return Err(ApiError::new("token_foreign", "this join token belongs to another cluster: it pins another CA")
            .with_hint("skein token create, on this cluster's master"));
    }
    Ok((TokenId::new(token.id), sha256_hex(token.secret.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr() -> (KeyPair, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        (key, der)
    }

    #[test]
    fn a_signed_request_names_the_node_and_keeps_its_key() {
        let (certificate, key) = new_ca("test").unwrap();
        let ca = Ca::load(&certificate, &key).unwrap();
        let (_, request) = csr();
        let pem = ca.sign_node(&request, "node1").unwrap();
        let signed = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let expected = Identity::Node { id: "node1".into(), key_digest: csr_key_digest(&request).unwrap() };
        assert_eq!(identity(&signed), Some(expected));
        let (user, _) = ca.issue_user("eva", 60).unwrap();
        let user = CertificateDer::from_pem_slice(user.as_bytes()).unwrap();
        assert_eq!(identity(&user), Some(Identity::User("eva".into())));
        assert_eq!(identity(&ca.certificate()), None, "the CA itself is nobody");
    }

    #[test]
    fn a_request_with_a_wrong_signature_is_refused() {
        let (_, mut request) = csr();
        let last = request.len() - 1;
        request[last] ^= 1;
        assert!(csr_key_digest(&request).is_err());
        assert!(csr_key_digest(b"nonsense").is_err());
    }

    #[test]
    fn tokens() {
        let digest = sha256_hex(b"ca");
        let (id, secret, text) = new_token(&digest);
        assert_eq!(parse_token(&text, &digest).unwrap(), (id, sha256_hex(secret.as_bytes())));
        let check = |text: &str, code: &str| assert_eq!(parse_token(text, &digest).unwrap_err().code, code, "{text}");
        check("", "token_malformed");
        check("SKEIN-1-abc", "token_malformed");
        check(&text.replace("SKEIN-1", "SKEIN-9"), "token_malformed");
        check(&text[..text.len() - 1], "token_malformed");
        check(&new_token(&sha256_hex(b"other")).2, "token_foreign");
    }
}

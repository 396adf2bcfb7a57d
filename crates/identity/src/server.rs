//! The server's identity: one key for the life of the installation, and everything it signs.
//!
//! Stored form, also what is sealed into the pool (the server rebuilt from kit and pool is then the same server to its
//! agents, whatever its name and address):
//!
//! | bytes | meaning |
//! |---|---|
//! | 8 | magic `SPIDENT1` |
//! | 4 + n | length (little-endian) and DER of the private key (PKCS #8, ECDSA P-256) |
//! | 4 + n | length and DER of the self-signed certificate |
//! | 32 | BLAKE3 of all before |

use crate::certificate::{self, Role};
use crate::{BACKDATE, CERTIFICATE_LIFE, Fingerprint, IdentityError};
use model::{HostId, Timestamp};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

const MAGIC: &[u8; 8] = b"SPIDENT1";
/// Keys and certificates of ours have a few hundred bytes.
const LARGEST_PART: usize = 16 * 1024;
const ISSUER_NAME: &str = "Stillpoint server identity";

/// The key that makes this server this server. Not printed by `Debug`.
pub struct ServerIdentity {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

/// A certificate chain and its private key, for one end of TLS.
pub struct TlsIdentity {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of the leaf.
    pub key: PrivateKeyDer<'static>,
    /// When the leaf ends.
    pub not_after: Timestamp,
}

impl std::fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServerIdentity({}, key hidden)", self.fingerprint)
    }
}

fn library(what: &'static str) -> impl Fn(rcgen::Error) -> IdentityError {
    move |error| IdentityError::Library { what, reason: error.to_string() }
}

impl ServerIdentity {
    /// A new server. Its certificate has no end: the key is what is trusted.
    pub fn generate(serial: [u8; 16]) -> Result<ServerIdentity, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(library("server key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, ISSUER_NAME);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        params.key_usages =
            vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::DigitalSignature];
        params.serial_number = Some(certificate::serial(serial));
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        // RFC 5280: the end of a certificate that has no well-defined one.
        params.not_after = rcgen::date_time_ymd(9999, 12, 31);
        let made = params.self_signed(&key).map_err(library("server certificate"))?;
        let certificate = made.der().clone();
        let fingerprint = Fingerprint::of_certificate(&certificate)?;
        Ok(ServerIdentity { key, certificate, fingerprint })
    }

    /// What agents pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The self-signed certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The stored form. It holds the private key: keep it sealed or readable by the server alone.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for part in [self.key.serialized_der(), &self.certificate[..]] {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    /// Reads the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<ServerIdentity, IdentityError> {
        let damaged =
            |reason: &str| IdentityError::IdentityDamaged { bytes: bytes.len(), reason: reason.to_owned() };
        let (body, hash) = bytes.split_last_chunk::<32>().ok_or_else(|| damaged("it is too short"))?;
        if blake3::hash(body) != blake3::Hash::from_bytes(*hash) {
            return Err(damaged("its hash does not match"));
        }
        let mut rest = body.strip_prefix(MAGIC).ok_or_else(|| damaged("it does not begin with SPIDENT1"))?;
        let mut part = || {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let length = u32::from_le_bytes(*length) as usize;
            let (part, after) = after.split_at_checked(length).filter(|_| length <= LARGEST_PART)?;
            rest = after;
            Some(part)
        };
        let key = part().ok_or_else(|| damaged("the key is cut off"))?;
        let certificate = part().ok_or_else(|| damaged("the certificate is cut off"))?;
        if !rest.is_empty() {
            return Err(damaged("bytes follow the certificate"));
        }
        let key = KeyPair::from_pkcs8_der_and_sign_algo(
            &PrivatePkcs8KeyDer::from(key.to_vec()),
            &PKCS_ECDSA_P256_SHA256,
        )
        .map_err(|error| damaged(&format!("the key cannot be used: {error}")))?;
        let certificate = CertificateDer::from(certificate.to_vec());
        let parsed = certificate::parse(&certificate)?;
        if parsed.tbs_certificate.subject_pki.subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(damaged("key and certificate do not belong together"));
        }
        let fingerprint = Fingerprint::of_public_key(parsed.tbs_certificate.subject_pki.raw);
        Ok(ServerIdentity { key, certificate, fingerprint })
    }

    fn issuer(&self) -> Result<Issuer<'_, &KeyPair>, IdentityError> {
        Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(library("signature"))
    }

    /// A fresh key and certificate for the server's end of TLS.
    pub fn issue_server_leaf(&self, now: Timestamp, serial: [u8; 16]) -> Result<TlsIdentity, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(library("TLS key"))?;
        let not_after = Timestamp(now.0.saturating_add(CERTIFICATE_LIFE));
        let params = certificate::leaf(&Role::Server, now.0.saturating_sub(BACKDATE), not_after, serial)?;
        let leaf = params.signed_by(&key, &self.issuer()?).map_err(library("TLS certificate"))?;
        Ok(TlsIdentity {
            chain: vec![leaf.der().clone(), self.certificate.clone()],
            key: PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
            not_after,
        })
    }

    /// A certificate for `host` over the key of a certificate request (DER), valid [`CERTIFICATE_LIFE`] from now.
    ///
    /// Nothing is taken from the request but its key, which signed it: an agent cannot ask for a name or a use.
    pub fn issue_host_certificate(
        &self,
        request: &[u8],
        host: HostId,
        now: Timestamp,
        serial: [u8; 16],
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let request = certificate::read_request(request)?;
        let not_after = Timestamp(now.0.saturating_add(CERTIFICATE_LIFE));
        let params = certificate::leaf(&Role::Host(host), now.0.saturating_sub(BACKDATE), not_after, serial)?;
        let made =
            params.signed_by(&request.public_key, &self.issuer()?).map_err(library("host certificate"))?;
        Ok(made.der().clone())
    }
}

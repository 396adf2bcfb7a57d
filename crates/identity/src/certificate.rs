//! Certificates and certificate requests: what is written into them and read out of them.

use crate::{Fingerprint, IdentityError, RENEWAL_GRACE};
use model::{HostId, Timestamp};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const HOST_URI: &str = "stillpoint:host:";
pub(crate) const SERVER_URI: &str = "stillpoint:server";
/// Largest certificate request taken; ours have under 400 bytes.
const LARGEST_REQUEST: usize = 4096;
/// Bytes of an uncompressed point on P-256.
const P256_POINT: usize = 65;

pub(crate) enum Role {
    Server,
    Host(HostId),
}

/// Certificate serial numbers are positive.
pub(crate) fn serial(mut bytes: [u8; 16]) -> rcgen::SerialNumber {
    bytes[0] = bytes[0] & 0x7F | 0x40;
    rcgen::SerialNumber::from_slice(&bytes)
}

pub(crate) fn leaf(
    role: &Role,
    not_before: u64,
    not_after: Timestamp,
    number: [u8; 16],
) -> Result<CertificateParams, IdentityError> {
    let (uri, usage) = match role {
        Role::Server => (SERVER_URI.to_owned(), ExtendedKeyUsagePurpose::ServerAuth),
        Role::Host(host) => (format!("{HOST_URI}{host}"), ExtendedKeyUsagePurpose::ClientAuth),
    };
    // Past the year 9999 there is no way to write a date into a certificate.
    let date = |micros: u64| {
        rcgen::date_time_ymd(1970, 1, 1)
            + std::time::Duration::from_secs((micros / Timestamp::SECOND).min(253_402_300_799))
    };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, uri.clone());
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(|error: rcgen::Error| {
        IdentityError::Library { what: "certificate", reason: error.to_string() }
    })?)];
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.serial_number = Some(serial(number));
    params.not_before = date(not_before);
    params.not_after = date(not_after.0);
    Ok(params)
}

pub(crate) fn read_request(der: &[u8]) -> Result<rcgen::CertificateSigningRequestParams, IdentityError> {
    let refuse = |reason: String| IdentityError::Request { reason };
    if der.len() > LARGEST_REQUEST {
        return Err(refuse(format!("{} bytes, expected at most {LARGEST_REQUEST}", der.len())));
    }
    let request = rcgen::CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
        .map_err(|error| refuse(error.to_string()))?;
    let key = &request.public_key;
    let key_bytes = rcgen::PublicKeyData::der_bytes(key).len();
    if *key.algorithm() != PKCS_ECDSA_P256_SHA256 || key_bytes != P256_POINT {
        return Err(refuse("its key is not ECDSA P-256".to_owned()));
    }
    Ok(request)
}

/// The key in a certificate request, for recognising an agent that asks again.
pub(crate) fn key_of_request(der: &[u8]) -> Result<Fingerprint, IdentityError> {
    let request = read_request(der)?;
    Ok(Fingerprint::of_public_key(&rcgen::PublicKeyData::subject_public_key_info(&request.public_key)))
}

impl Fingerprint {
    /// The fingerprint of the key in a DER certificate.
    pub fn of_certificate(certificate: &[u8]) -> Result<Fingerprint, IdentityError> {
        let parsed = parse(certificate)?;
        Ok(Fingerprint::of_public_key(parsed.tbs_certificate.subject_pki.raw))
    }

    /// The fingerprint of the key in a certificate request, whose signature is checked.
    pub fn of_request(request: &[u8]) -> Result<Fingerprint, IdentityError> {
        key_of_request(request)
    }
}

pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => {
            Err(IdentityError::Certificate { reason: format!("{} bytes follow it", rest.len()) })
        }
        Err(error) => Err(IdentityError::Certificate { reason: error.to_string() }),
    }
}

/// The one URI that a leaf of ours carries.
pub(crate) fn uri_of<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, IdentityError> {
    let refuse = |reason: &str| IdentityError::Certificate { reason: reason.to_owned() };
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| refuse(&error.to_string()))?
        .ok_or_else(|| refuse("it names nobody"))?;
    match names.value.general_names.as_slice() {
        [GeneralName::URI(uri)] => Ok(uri),
        _ => Err(refuse("expected exactly one URI as its name")),
    }
}

/// The dates of a certificate.
pub(crate) fn validity(certificate: &X509Certificate<'_>) -> (Timestamp, Timestamp) {
    let micros =
        |seconds: i64| Timestamp(u64::try_from(seconds).unwrap_or(0).saturating_mul(Timestamp::SECOND));
    let validity = certificate.validity();
    (micros(validity.not_before.timestamp()), micros(validity.not_after.timestamp()))
}

/// What a host certificate is good for at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Everything a host may do.
    Good,
    /// It ended less than 90 days ago: it may renew, nothing else.
    RenewOnly,
    /// It ended too long ago. The host enrols again.
    TooOld,
}

/// A host certificate as the other side showed it. That it was signed by this server and that the other side holds
/// its key was checked in the handshake; what it is good for now is [`PeerCertificate::standing`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The host it speaks for.
    pub host: HostId,
    /// Its number, in hexadecimal.
    pub serial: String,
    /// First moment of validity.
    pub not_before: Timestamp,
    /// Last moment of validity.
    pub not_after: Timestamp,
    /// Its key.
    pub key: Fingerprint,
}

impl PeerCertificate {
    /// Reads a host certificate (DER). Does not check who signed it.
    pub fn read(der: &[u8]) -> Result<PeerCertificate, IdentityError> {
        let certificate = parse(der)?;
        let host = uri_of(&certificate)?
            .strip_prefix(HOST_URI)
            .and_then(|id| id.parse().ok())
            .ok_or_else(|| IdentityError::Certificate { reason: "it does not name a host".to_owned() })?;
        let (not_before, not_after) = validity(&certificate);
        Ok(PeerCertificate {
            host,
            serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            not_before,
            not_after,
            key: Fingerprint::of_public_key(certificate.tbs_certificate.subject_pki.raw),
        })
    }

    /// What it is good for at `now`. A moment before its beginning counts as good: only the server's own clock can
    /// have gone back, since the server wrote that date.
    pub fn standing(&self, now: Timestamp) -> Standing {
        match now.since(self.not_after) {
            0 => Standing::Good,
            late if late <= RENEWAL_GRACE => Standing::RenewOnly,
            _ => Standing::TooOld,
        }
    }

    /// Whether two thirds of its life are over: time to renew.
    pub fn renewal_due(&self, now: Timestamp) -> bool {
        let life = self.not_after.since(self.not_before);
        now.since(self.not_before) >= life / 3 * 2
    }
}

/// The key of an agent, made where it is used and never sent. Not printed by `Debug`.
pub struct HostKey {
    key: KeyPair,
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostKey(hidden)")
    }
}

impl HostKey {
    /// A new key.
    pub fn generate() -> Result<HostKey, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
            .map_err(|error| IdentityError::Library { what: "host key", reason: error.to_string() })?;
        Ok(HostKey { key })
    }

    /// The PKCS #8 form, for the agent's own state.
    pub fn to_pkcs8(&self) -> Vec<u8> {
        self.key.serialize_der()
    }

    /// Reads the PKCS #8 form.
    pub fn from_pkcs8(der: &[u8]) -> Result<HostKey, IdentityError> {
        KeyPair::from_pkcs8_der_and_sign_algo(
            &PrivatePkcs8KeyDer::from(der.to_vec()),
            &PKCS_ECDSA_P256_SHA256,
        )
        .map(|key| HostKey { key })
        .map_err(|error| IdentityError::Library { what: "host key", reason: error.to_string() })
    }

    /// A certificate request (DER), signed with the key.
    pub fn request(&self) -> Result<Vec<u8>, IdentityError> {
        CertificateParams::default()
            .serialize_request(&self.key)
            .map(|request| request.der().to_vec())
            .map_err(|error| IdentityError::Library {
                what: "certificate request",
                reason: error.to_string(),
            })
    }

    /// The fingerprint of its public half.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of_public_key(&rcgen::PublicKeyData::subject_public_key_info(&self.key))
    }

    /// The key as TLS takes it.
    pub fn to_tls(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.to_pkcs8()))
    }
}

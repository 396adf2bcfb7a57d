//! The two ends of mutual TLS 1.3, and nothing older.
//!
//! The agent's end ([`PinnedServer`]) ignores names: it looks for the pinned identity key in the shown chain, and asks
//! that this key signed the leaf, that the leaf is a server's (a host certificate is signed by the same key) and that
//! its dates hold within [`CLOCK_TOLERANCE`](crate::CLOCK_TOLERANCE). The server's end ([`AcceptHosts`]) takes callers
//! without a certificate (they can enrol, or use the HTTP API with a token of theirs) and those with a certificate that
//! it signed itself, whatever its dates: [`Standing`](crate::Standing) decides per request what they may do.
//!
//! Sessions are not resumed: each connection proves both keys again.

use crate::certificate::{self, SERVER_URI};
use crate::{CLOCK_TOLERANCE, Fingerprint, PeerCertificate};
use model::Timestamp;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyUsage};

/// id-kp-serverAuth and id-kp-clientAuth, DER contents.
const SERVER_AUTH: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 1];
const CLIENT_AUTH: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 2];

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn encoding(_: impl std::fmt::Display) -> Error {
    Error::InvalidCertificate(CertificateError::BadEncoding)
}

/// Whether `issuer` signed `leaf` for `usage`. Dates are checked by the caller: here it is always a moment at which the
/// leaf is valid.
fn check_chain(
    leaf: &CertificateDer<'_>,
    issuer: &CertificateDer<'_>,
    valid_at: Timestamp,
    usage: impl ExtendedKeyUsageValidator,
) -> Result<(), Error> {
    let anchor = webpki::anchor_from_trusted_cert(issuer).map_err(encoding)?;
    let leaf = EndEntityCert::try_from(leaf).map_err(encoding)?;
    let at = UnixTime::since_unix_epoch(Duration::from_micros(valid_at.0));
    leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &[anchor], &[], at, usage, None, None)
        .map(|_| ())
        .map_err(|error| match error {
            webpki::Error::UnknownIssuer => Error::InvalidCertificate(CertificateError::UnknownIssuer),
            webpki::Error::InvalidSignatureForPublicKey => {
                Error::InvalidCertificate(CertificateError::BadSignature)
            }
            _ => Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure),
        })
}

macro_rules! signatures_by_aws_lc {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            // TLS 1.2 is never offered.
            Err(Error::PeerMisbehaved(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = self.provider.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

/// The agent's check of a server.
#[derive(Debug)]
pub struct PinnedServer {
    pinned: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl PinnedServer {
    /// Accepts the server with this identity and no other.
    pub fn new(pinned: Fingerprint) -> PinnedServer {
        PinnedServer { pinned, provider: provider() }
    }
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let identity = intermediates
            .iter()
            // A chain of ours is leaf and identity; more is not worth reading.
            .take(4)
            .find(|shown| Fingerprint::of_certificate(shown) == Ok(self.pinned))
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let parsed = certificate::parse(leaf).map_err(encoding)?;
        let (not_before, not_after) = certificate::validity(&parsed);
        check_chain(leaf, identity, not_before, KeyUsage::required(SERVER_AUTH))?;
        if certificate::uri_of(&parsed).map_err(encoding)? != SERVER_URI {
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        let now = Timestamp(now.as_secs().saturating_mul(Timestamp::SECOND));
        if now.since(not_after) > CLOCK_TOLERANCE {
            return Err(Error::InvalidCertificate(CertificateError::Expired));
        }
        if not_before.since(now) > CLOCK_TOLERANCE {
            return Err(Error::InvalidCertificate(CertificateError::NotValidYet));
        }
        Ok(ServerCertVerified::assertion())
    }

    signatures_by_aws_lc!();
}

/// The server's check of callers that show a certificate.
#[derive(Debug)]
pub struct AcceptHosts {
    identity: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl AcceptHosts {
    /// Accepts host certificates that the key of `identity` (the server's self-signed certificate) signed.
    pub fn new(identity: CertificateDer<'static>) -> AcceptHosts {
        AcceptHosts { identity, provider: provider() }
    }
}

impl ClientCertVerifier for AcceptHosts {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let host = PeerCertificate::read(leaf).map_err(encoding)?;
        check_chain(leaf, &self.identity, host.not_before, KeyUsage::required(CLIENT_AUTH))?;
        Ok(ClientCertVerified::assertion())
    }

    signatures_by_aws_lc!();
}

/// The agent's end of TLS: trusts `pinned` only, and shows its own certificate if it has one.
pub fn agent_tls(
    pinned: Fingerprint,
    own: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
    time: Arc<dyn TimeProvider>,
) -> Result<rustls::ClientConfig, Error> {
    let builder = rustls::ClientConfig::builder_with_details(provider(), time)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedServer::new(pinned)));
    let mut config = match own {
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    // The name proves nothing here and would tell the network what this is.
    config.enable_sni = false;
    Ok(config)
}

/// The server's end of TLS. `leaf` gives the present certificate at each handshake.
pub fn server_tls(
    identity: CertificateDer<'static>,
    leaf: Arc<dyn rustls::server::ResolvesServerCert>,
    time: Arc<dyn TimeProvider>,
) -> Result<rustls::ServerConfig, Error> {
    let mut config = rustls::ServerConfig::builder_with_details(provider(), time)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AcceptHosts::new(identity)))
        .with_cert_resolver(leaf);
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests;

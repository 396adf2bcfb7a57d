#![allow(clippy::unwrap_used)]

use super::*;
use crate::{CERTIFICATE_LIFE, HostKey, IdentityError, RENEWAL_GRACE, ServerIdentity, Standing};
use model::HostId;

const NOW: Timestamp = Timestamp(1_800_000_000 * Timestamp::SECOND);
const HOST: HostId = HostId([3; 16]);

fn unix(at: Timestamp) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_micros(at.0))
}

fn shown(server: &ServerIdentity, pinned: Fingerprint, at: Timestamp) -> Result<ServerCertVerified, Error> {
    let leaf = server.issue_server_leaf(NOW, [1; 16]).unwrap();
    verify(&leaf.chain, pinned, at)
}

fn verify(
    chain: &[CertificateDer<'_>],
    pinned: Fingerprint,
    at: Timestamp,
) -> Result<ServerCertVerified, Error> {
    let name = ServerName::try_from("any.name").unwrap();
    PinnedServer::new(pinned).verify_server_cert(&chain[0], &chain[1..], &name, &[], unix(at))
}

#[test]
fn only_the_pinned_identity_is_trusted_and_its_leaf_within_the_tolerance() {
    let server = ServerIdentity::generate([9; 16]).unwrap();
    let other = ServerIdentity::generate([9; 16]).unwrap();
    let pin = server.fingerprint();
    assert!(shown(&server, pin, NOW).is_ok());
    assert!(shown(&other, pin, NOW).is_err());
    // A liar that shows the real identity behind a leaf of its own.
    let false_leaf = other.issue_server_leaf(NOW, [1; 16]).unwrap().chain[0].clone();
    assert!(verify(&[false_leaf, server.certificate().clone()], pin, NOW).is_err());

    let end = NOW.0 + CERTIFICATE_LIFE + CLOCK_TOLERANCE;
    assert!(shown(&server, pin, Timestamp(end)).is_ok());
    let late = shown(&server, pin, Timestamp(end + 2 * Timestamp::SECOND)).err();
    assert_eq!(late, Some(Error::InvalidCertificate(CertificateError::Expired)));
    assert!(shown(&server, pin, Timestamp(NOW.0 - CLOCK_TOLERANCE)).is_ok());
    let early = shown(&server, pin, Timestamp(NOW.0 - 2 * CLOCK_TOLERANCE)).err();
    assert_eq!(early, Some(Error::InvalidCertificate(CertificateError::NotValidYet)));
}

#[test]
fn a_host_cannot_act_as_the_server_nor_the_server_leaf_as_a_host() {
    let server = ServerIdentity::generate([9; 16]).unwrap();
    let request = HostKey::generate().unwrap().request().unwrap();
    let host = server.issue_host_certificate(&request, HOST, NOW, [5; 16]).unwrap();
    assert!(verify(&[host.clone(), server.certificate().clone()], server.fingerprint(), NOW).is_err());

    let hosts = AcceptHosts::new(server.certificate().clone());
    assert!(hosts.verify_client_cert(&host, &[], unix(NOW)).is_ok());
    let leaf = server.issue_server_leaf(NOW, [1; 16]).unwrap();
    assert!(hosts.verify_client_cert(&leaf.chain[0], &[], unix(NOW)).is_err());
    assert!(hosts.verify_client_cert(server.certificate(), &[], unix(NOW)).is_err());
    let stranger = ServerIdentity::generate([9; 16]).unwrap();
    let forged = stranger.issue_host_certificate(&request, HOST, NOW, [5; 16]).unwrap();
    assert!(hosts.verify_client_cert(&forged, &[], unix(NOW)).is_err());
}

#[test]
fn a_host_certificate_names_its_host_and_ages() {
    let server = ServerIdentity::generate([9; 16]).unwrap();
    let key = HostKey::generate().unwrap();
    let certificate = server.issue_host_certificate(&key.request().unwrap(), HOST, NOW, [0xFF; 16]).unwrap();
    let peer = PeerCertificate::read(&certificate).unwrap();
    assert_eq!((peer.host, peer.key), (HOST, key.fingerprint()));
    assert_eq!(Fingerprint::of_request(&key.request().unwrap()).unwrap(), key.fingerprint());
    assert!(peer.not_after.since(NOW) <= CERTIFICATE_LIFE);
    let after = |micros: u64| Timestamp(peer.not_after.0 + micros);
    assert_eq!(peer.standing(NOW), Standing::Good);
    assert_eq!(peer.standing(after(0)), Standing::Good);
    assert_eq!(peer.standing(after(1)), Standing::RenewOnly);
    assert_eq!(peer.standing(after(RENEWAL_GRACE)), Standing::RenewOnly);
    assert_eq!(peer.standing(after(RENEWAL_GRACE + 1)), Standing::TooOld);
    assert!(!peer.renewal_due(Timestamp(NOW.0 + 4 * Timestamp::DAY)));
    assert!(peer.renewal_due(Timestamp(NOW.0 + 5 * Timestamp::DAY)));
}

#[test]
fn requests_that_are_not_signed_by_their_key_are_refused() {
    let server = ServerIdentity::generate([9; 16]).unwrap();
    let key = HostKey::generate().unwrap();
    let good = key.request().unwrap();
    let mut refused = 0;
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        match Fingerprint::of_request(&bad) {
            Err(_) => refused += 1,
            // A bit of padding around the signature: what was signed is untouched.
            Ok(same) => assert_eq!(same, key.fingerprint(), "byte {at}"),
        }
    }
    assert!(refused > good.len() - 4, "{refused} of {}", good.len());
    let foreign = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let foreign = rcgen::CertificateParams::default().serialize_request(&foreign).unwrap();
    assert!(matches!(
        server.issue_host_certificate(foreign.der(), HOST, NOW, [5; 16]),
        Err(IdentityError::Request { .. })
    ));
}

#[test]
fn the_stored_identity_round_trips_and_every_flipped_bit_is_found() {
    let server = ServerIdentity::generate([9; 16]).unwrap();
    let bytes = server.to_bytes();
    let again = ServerIdentity::from_bytes(&bytes).unwrap();
    assert_eq!(again.fingerprint(), server.fingerprint());
    assert_eq!(server.fingerprint().to_string().parse(), Ok(server.fingerprint()));
    // What the rebuilt server issues is trusted by those who trusted the first.
    assert!(shown(&again, server.fingerprint(), NOW).is_ok());
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(ServerIdentity::from_bytes(&bad).is_err(), "byte {at}");
        assert!(ServerIdentity::from_bytes(&bytes[..at]).is_err(), "cut to {at}");
    }
}

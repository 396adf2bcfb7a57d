#![allow(clippy::unwrap_used)]
use super::*;
use environment::simulated::SimulatedFiles;
use environment::{FixedClock, SeededRandomness};
use storage_pool::kit::Recipient;
use storage_pool::{Access, Settings, World};

use crate::app::Tokens;
use crate::remote::{ApiTokens, server_identity};

const NOW: Timestamp = Timestamp(1_800_000_000_000_000);
const SERVER: Fingerprint = Fingerprint([9; 32]);

fn world(files: &SimulatedFiles) -> World {
    World {
        files: Arc::new(files.clone()),
        clock: Arc::new(FixedClock::new(NOW.0)),
        randomness: Arc::new(SeededRandomness::new(5)),
    }
}

fn pool() -> (SimulatedFiles, Recipient, Arc<Pool>) {
    let files = SimulatedFiles::new(1);
    let created =
        Pool::create(world(&files), Settings::without_safety(), [1; 16], "test", &mut |recipient| {
            Ok(recipient.clone())
        })
        .unwrap();
    (files, created.server, Arc::new(created.pool))
}

fn again(files: &SimulatedFiles, server: &Recipient) -> Arc<Pool> {
    let access = Access::Write { server: [1; 16], name: "test".to_owned() };
    Arc::new(Pool::open(world(files), server, access).unwrap())
}

fn later(seconds: u64) -> Timestamp {
    Timestamp(NOW.0 + seconds * Timestamp::SECOND)
}

fn asks(token: &TokenRecord, name: &str, key: u8, at: Timestamp) -> EnrolRequest {
    EnrolRequest {
        token_hash: token.hash.clone(),
        key: Fingerprint([key; 32]),
        host_name: name.to_owned(),
        platform: "linux x86_64".to_owned(),
        program_version: "0.1.0".to_owned(),
        fresh: HostId([key; 16]),
        now: at,
    }
}

fn certificate(host: HostId, issued: Timestamp) -> PeerCertificate {
    let begins = issued.0 - BACKDATE;
    PeerCertificate {
        host,
        serial: "01".to_owned(),
        not_before: Timestamp(begins - begins % Timestamp::SECOND),
        not_after: Timestamp(issued.0 + 7 * Timestamp::DAY),
        key: Fingerprint([1; 32]),
    }
}

fn token(register: &PoolRegister, secret: u8, count: u32) -> TokenRecord {
    register.make_token(SERVER, [secret; 20], count, None, NOW).unwrap().1
}

#[test]
fn hosts_and_tokens_survive_the_loss_of_everything_but_the_pool() {
    let (files, server, pool) = pool();
    let register = PoolRegister::open(pool.clone());
    let two = token(&register, 7, 2);
    let first = register.enrol(&asks(&two, "hv1", 1, later(1))).unwrap();
    register.issued(&certificate(first, later(1))).unwrap();
    drop((register, pool));

    let register = PoolRegister::open(again(&files, &server));
    register.admit(&certificate(first, later(1))).unwrap();
    let known = register.host(first).unwrap();
    assert_eq!(
        (known.name.as_str(), known.certificate_until),
        ("hv1", Some(certificate(first, later(1)).not_after))
    );
    // The reply was lost: the same key gets the same host, and nothing is used up.
    assert_eq!(register.enrol(&asks(&two, "hv1", 1, later(2))), Ok(first));
    let second = register.enrol(&asks(&two, "hv2", 2, later(3))).unwrap();
    assert_ne!(first, second);
    let refused = register.enrol(&asks(&two, "hv3", 3, later(4))).unwrap_err();
    assert_eq!(refused.code, Code::TokenRefused);
    assert_eq!(register.hosts().len(), 2);
}

#[test]
fn a_revoked_host_comes_back_only_with_a_token_and_only_with_new_certificates() {
    let (files, server, pool) = pool();
    let register = PoolRegister::open(pool.clone());
    let first = token(&register, 1, 1);
    let batch = token(&register, 3, 5);
    let host = register.enrol(&asks(&first, "hv1", 1, NOW)).unwrap();
    let old = certificate(host, NOW);
    register.admit(&old).unwrap();
    register.revoke(host, later(10)).unwrap();
    assert_eq!(register.admit(&old).unwrap_err().code, Code::HostRevoked);
    assert_eq!(register.issued(&old).unwrap_err().code, Code::HostRevoked);
    drop((register, pool));

    let register = PoolRegister::open(again(&files, &server));
    assert_eq!(register.admit(&old).unwrap_err().code, Code::HostRevoked);
    // Neither the token it came with, nor under another name, nor the rest of a batch from before.
    let first = register.token(&first.hash).unwrap();
    for (token, name, key) in [(&first, "hv1", 1), (&first, "other", 1), (&batch, "hv1", 7)] {
        let refused = register.enrol(&asks(token, name, key, later(15))).unwrap_err();
        assert_eq!(refused.code, Code::HostRevoked, "{name}");
    }
    register.make_token(SERVER, [2; 20], 1, None, later(20)).unwrap();
    let new = register.token(&identity::Token::hash_of(&[2; 20])).unwrap();
    let back = register.enrol(&asks(&new, "HV1", 2, later(20))).unwrap();
    assert_eq!(back, host, "its datasources go on");
    assert_eq!(register.admit(&old).unwrap_err().code, Code::HostRevoked, "a stolen key stays useless");
    register.admit(&certificate(host, later(20))).unwrap();
}

#[test]
fn a_living_hosts_name_is_not_given_away_and_odd_names_and_tokens_are_refused() {
    let (_, _, pool) = pool();
    let register = PoolRegister::open(pool.clone());
    let host = register.enrol(&asks(&token(&register, 1, 1), "hv1", 1, NOW)).unwrap();
    let many = token(&register, 2, 5);
    assert_eq!(register.enrol(&asks(&many, "Hv1", 2, NOW)).unwrap_err().code, Code::NameTaken);
    assert_eq!(register.token(&many.hash).unwrap().uses_left, 5, "a refusal uses nothing up");
    register.admit(&certificate(host, NOW)).unwrap();
    for odd in ["", "a:b", "a/b", "-x", "latest", "00112233445566778899aabbccddeeff"] {
        assert_eq!(register.enrol(&asks(&many, odd, 3, NOW)).unwrap_err().code, Code::Usage, "{odd:?}");
    }
    let expired = register.enrol(&asks(&many, "hv2", 3, later(900))).unwrap_err();
    assert_eq!(expired.code, Code::TokenRefused);
    let unknown = TokenRecord { hash: "00".to_owned(), ..many.clone() };
    assert_eq!(register.enrol(&asks(&unknown, "hv2", 3, NOW)).unwrap_err().code, Code::TokenRefused);
    for (count, seconds) in [(0, None), (MOST_HOSTS + 1, None), (1, Some(0)), (1, Some(LONGEST + 1))] {
        assert_eq!(register.make_token(SERVER, [3; 20], count, seconds, NOW).unwrap_err().code, Code::Usage);
    }
    // Old tokens go when new ones are made.
    register.make_token(SERVER, [4; 20], 1, None, Timestamp(NOW.0 + 32 * Timestamp::DAY)).unwrap();
    assert_eq!(pool.documents(TOKENS).len(), 1);
    // A host that this server never had.
    assert_eq!(register.admit(&certificate(HostId([8; 16]), NOW)).unwrap_err().code, Code::HostRevoked);
}

#[test]
fn identity_and_api_tokens_are_kept_by_the_pool_and_the_token_itself_by_nobody() {
    let (files, server, pool) = pool();
    let random = SeededRandomness::new(6);
    let identity = server_identity(&pool, &random).unwrap().fingerprint();
    let tokens = ApiTokens::open(pool.clone());
    assert!(tokens.is_empty());
    let text = tokens.issue("admin", NOW, &random).unwrap();
    assert_eq!(tokens.check(&text).as_deref(), Some("admin"));
    drop((tokens, pool));

    let pool = again(&files, &server);
    assert_eq!(server_identity(&pool, &random).unwrap().fingerprint(), identity);
    let stored = pool.document("api-token/admin").unwrap();
    assert!(!String::from_utf8_lossy(&stored).contains(text.trim_start_matches("spapi0-")));
    let tokens = ApiTokens::open(pool);
    assert_eq!(tokens.check(&text).as_deref(), Some("admin"));
    for wrong in ["", "spapi0-", &text[..text.len() - 1], &format!("{text}0"), &text.to_uppercase()] {
        assert_eq!(tokens.check(wrong), None, "{wrong:?}");
    }
    let new = tokens.issue("admin", NOW, &random).unwrap();
    assert_eq!((tokens.check(&text), tokens.check(&new).as_deref()), (None, Some("admin")));
}

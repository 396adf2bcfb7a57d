//! Enrolment tokens: the right to become a host of one server, once or a few times, for a short while.
//!
//! Text: `sp0-FINGERPRINT-SECRET-CHECK`, base 32 each. The fingerprint is the server's, so that the agent knows whom to
//! trust before it sends anything; the secret has 160 random bits; the check finds typing errors without asking a
//! server. The server keeps only [`TokenRecord`], with the hash of the secret.
//!
//! Redeeming is idempotent (INV-17): the same key of the same agent gets the same host id again without using up the
//! token, for the agent whose reply was lost.

use crate::{Fingerprint, base32};
use model::{Code, HostId, Problem, Timestamp};
use serde::{Deserialize, Serialize};

const PREFIX: &str = "sp0";
const SECRET_BYTES: usize = 20;

/// A token in clear. Shown once, never stored, not printed by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The server it is for.
    pub server: Fingerprint,
    secret: [u8; SECRET_BYTES],
}

/// How far a new token reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenScope {
    /// How many hosts it may enrol.
    pub count: u32,
    /// Microseconds from now until it ends.
    pub valid_for: u64,
    /// The only host name that may use it; any if `None`.
    pub host_name: Option<String>,
    /// The host that is enrolled again with it and keeps its id; a new host if `None`.
    pub host: Option<HostId>,
}

impl Default for TokenScope {
    /// One host, 15 minutes.
    fn default() -> TokenScope {
        TokenScope { count: 1, valid_for: 900 * Timestamp::SECOND, host_name: None, host: None }
    }
}

/// One use of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redemption {
    /// The key of the agent.
    pub key: Fingerprint,
    /// The host it became.
    pub host: HostId,
}

/// What the server keeps of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// BLAKE3 of the secret, in hexadecimal: the key to find the record by.
    pub hash: String,
    /// The first moment at which it is no longer good.
    pub expires: Timestamp,
    /// Hosts that it may still enrol.
    pub uses_left: u32,
    /// The only host name that may use it.
    #[serde(default)]
    pub host_name: Option<String>,
    /// The host that is enrolled again with it.
    #[serde(default)]
    pub host: Option<HostId>,
    /// Who used it.
    #[serde(default)]
    pub redeemed: Vec<Redemption>,
    /// When it was made. A token from before a revocation does not take the revocation back; one of which this is not
    /// known counts as that old.
    #[serde(default)]
    pub issued: Timestamp,
}

/// Why a token is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefusal {
    /// Not the form of a token, or a typing error.
    #[error("the token is mistyped or cut off: expected sp0-FINGERPRINT-SECRET-CHECK")]
    Mistyped,
    /// No such token at this server.
    #[error("this server knows no such token")]
    Unknown,
    /// Its time is over.
    #[error("the token expired")]
    Expired,
    /// It has enrolled all the hosts it may.
    #[error("the token is used up")]
    UsedUp,
    /// It is for a host of another name.
    #[error("the token is for a host of another name")]
    OtherHost,
}

impl From<TokenRefusal> for Problem {
    fn from(refusal: TokenRefusal) -> Problem {
        Problem::new(Code::TokenRefused, refusal.to_string())
    }
}

fn check(server: &Fingerprint, secret: &[u8]) -> [u8; 5] {
    let mut hasher = blake3::Hasher::new_derive_key("stillpoint 2026 enrolment token check");
    hasher.update(&server.0).update(secret);
    let mut check = [0; 5];
    hasher.finalize_xof().fill(&mut check);
    check
}

impl Token {
    /// A new token and what to store of it. `secret` must come from a generator nobody can guess.
    pub fn issue(
        server: Fingerprint,
        secret: [u8; SECRET_BYTES],
        scope: TokenScope,
        now: Timestamp,
    ) -> (Token, TokenRecord) {
        let token = Token { server, secret };
        let record = TokenRecord {
            hash: Token::hash_of(&secret),
            expires: Timestamp(now.0.saturating_add(scope.valid_for)),
            // A token that names one host can only make that one.
            uses_left: if scope.host.is_some() { 1 } else { scope.count },
            host_name: scope.host_name,
            host: scope.host,
            redeemed: Vec::new(),
            issued: now,
        };
        (token, record)
    }

    /// The secret, as it goes to the server once that has proved its identity.
    pub fn secret(&self) -> &[u8] {
        &self.secret
    }

    /// What a record of a token with this secret is found by.
    pub fn hash_of(secret: &[u8]) -> String {
        blake3::Hasher::new_derive_key("stillpoint 2026 enrolment token")
            .update(secret)
            .finalize()
            .to_hex()
            .to_string()
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let check = base32::encode(&check(&self.server, &self.secret));
        write!(f, "{PREFIX}-{}-{}-{check}", self.server, base32::encode(&self.secret))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token(for {}, secret hidden)", self.server)
    }
}

impl std::str::FromStr for Token {
    type Err = TokenRefusal;
    fn from_str(text: &str) -> Result<Token, TokenRefusal> {
        let mut parts = text.trim().split('-');
        let mut next = || parts.next().ok_or(TokenRefusal::Mistyped);
        if next()? != PREFIX {
            return Err(TokenRefusal::Mistyped);
        }
        let server = Fingerprint(base32::decode(next()?).ok_or(TokenRefusal::Mistyped)?);
        let secret = base32::decode(next()?).ok_or(TokenRefusal::Mistyped)?;
        let said: [u8; 5] = base32::decode(next()?).ok_or(TokenRefusal::Mistyped)?;
        if parts.next().is_some() || said != check(&server, &secret) {
            return Err(TokenRefusal::Mistyped);
        }
        Ok(Token { server, secret })
    }
}

impl TokenRecord {
    /// Uses the token for the agent with `key`: the record as it is to be stored, and the id of the host. `fresh` is
    /// the id of a host that is new. Store the record before the host gets its certificate.
    pub fn redeem(
        &self,
        key: Fingerprint,
        host_name: &str,
        fresh: HostId,
        now: Timestamp,
    ) -> Result<(TokenRecord, HostId), TokenRefusal> {
        if now >= self.expires {
            return Err(TokenRefusal::Expired);
        }
        if self.host_name.as_ref().is_some_and(|name| !name.eq_ignore_ascii_case(host_name)) {
            return Err(TokenRefusal::OtherHost);
        }
        if let Some(before) = self.redeemed.iter().find(|redemption| redemption.key == key) {
            return Ok((self.clone(), before.host));
        }
        let uses_left = self.uses_left.checked_sub(1).ok_or(TokenRefusal::UsedUp)?;
        let host = self.host.unwrap_or(fresh);
        let mut record = TokenRecord { uses_left, ..self.clone() };
        record.redeemed.push(Redemption { key, host });
        Ok((record, host))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000_000);
    const A: HostId = HostId([1; 16]);
    const B: HostId = HostId([2; 16]);

    fn key(n: u8) -> Fingerprint {
        Fingerprint([n; 32])
    }

    fn later(seconds: u64) -> Timestamp {
        Timestamp(NOW.0 + seconds * Timestamp::SECOND)
    }

    #[test]
    fn text_form_round_trips_and_every_typing_error_is_found() {
        let (token, record) = Token::issue(key(9), [7; 20], TokenScope::default(), NOW);
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token.clone()));
        assert!(
            !record.hash.contains(&crate::base32::encode(&[7; 20])),
            "the record must not hold the secret"
        );
        assert!(!format!("{token:?}").contains(&crate::base32::encode(&[7; 20])));
        for at in 0..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[at] = if wrong[at] == b'a' { b'b' } else { b'a' };
            let wrong = String::from_utf8(wrong).unwrap();
            assert_eq!(wrong.parse::<Token>(), Err(TokenRefusal::Mistyped), "{wrong}");
            assert_eq!(text[..at].parse::<Token>(), Err(TokenRefusal::Mistyped));
        }
    }

    #[test]
    fn single_use_ends_with_the_first_host_and_after_15_minutes() {
        let (_, record) = Token::issue(key(9), [7; 20], TokenScope::default(), NOW);
        let (used, host) = record.redeem(key(1), "hv1", A, later(899)).unwrap();
        assert_eq!((host, used.uses_left), (A, 0));
        // The same agent asks again because the answer was lost: same host, nothing used.
        assert_eq!(used.redeem(key(1), "hv1", B, later(899)).unwrap(), (used.clone(), A));
        assert_eq!(used.redeem(key(2), "hv2", B, later(1)), Err(TokenRefusal::UsedUp));
        assert_eq!(record.redeem(key(1), "hv1", A, later(900)), Err(TokenRefusal::Expired));
    }

    #[test]
    fn a_batch_enrols_its_count_and_a_bound_token_only_its_host() {
        let scope = TokenScope { count: 2, ..TokenScope::default() };
        let (_, record) = Token::issue(key(9), [7; 20], scope, NOW);
        let (record, _) = record.redeem(key(1), "a", A, NOW).unwrap();
        let (record, _) = record.redeem(key(2), "b", B, NOW).unwrap();
        assert_eq!(record.redeem(key(3), "c", A, NOW), Err(TokenRefusal::UsedUp));

        let scope =
            TokenScope { host_name: Some("HV1".into()), host: Some(A), count: 5, ..TokenScope::default() };
        let (_, record) = Token::issue(key(9), [7; 20], scope, NOW);
        assert_eq!(record.redeem(key(1), "hv2", B, NOW), Err(TokenRefusal::OtherHost));
        assert_eq!(record.redeem(key(1), "hv1", B, NOW).unwrap().1, A);
        assert_eq!(record.uses_left, 1);
    }
}

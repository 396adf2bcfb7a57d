//! Hosts and enrolment tokens as sealed documents of the pool.
//!
//! | document | what |
//! |---|---|
//! | `host/ID` | name, platform, version, revoked or not, from when on its certificates count |
//! | `token/HASH` | [`TokenRecord`]; gone some time after its end |
//!
//! A token's use is stored before the host, the host before its certificate is handed out: whatever is interrupted, the
//! same agent asking again gets the same host, and no token counts twice.
//!
//! A name belongs to one living host. Enrolling under the name of a *revoked* host gives that host back, with its id, so
//! that its datasources go on; its certificates of before stay refused.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use identity::{BACKDATE, Fingerprint, PeerCertificate, Token, TokenRecord, TokenRefusal, TokenScope};
use model::{Code, HostId, Problem, Timestamp};
use serde::{Deserialize, Serialize};
use storage_pool::Pool;

use crate::api::names;
use crate::session::{EnrolRequest, HostRegister};

const HOSTS: &str = "host/";
const TOKENS: &str = "token/";
/// Most hosts of one token.
const MOST_HOSTS: u32 = 10_000;
/// Longest life of a token.
const LONGEST: u64 = 30 * 86_400;
/// How long a used-up or expired token is kept, so that its agent can be told why it is refused.
const KEPT: u64 = 30 * Timestamp::DAY;

/// A host as the pool keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostRecord {
    pub id: HostId,
    pub name: String,
    #[serde(default)]
    pub platform: String,
    #[serde(default)]
    pub version: String,
    pub enrolled: Timestamp,
    #[serde(default)]
    pub revoked: Option<Timestamp>,
    /// Certificates that begin before this do not count: they are from before a revocation.
    #[serde(default)]
    pub certificates_from: Timestamp,
    #[serde(default)]
    pub certificate_until: Option<Timestamp>,
}

#[derive(Default)]
struct Inner {
    hosts: BTreeMap<HostId, HostRecord>,
    seen: HashMap<HostId, Timestamp>,
}

/// The register of hosts and tokens of a pool.
pub struct PoolRegister {
    pool: Arc<Pool>,
    inner: Mutex<Inner>,
}

fn put<T: Serialize>(pool: &Pool, name: &str, value: &T) -> Result<(), Problem> {
    let bytes = serde_json::to_vec(value)
        .map_err(|error| Problem::new(Code::Internal, format!("{name} cannot be written down: {error}.")))?;
    pool.put_document(name, Some(&bytes)).map_err(jobs::problem::pool)
}

impl PoolRegister {
    /// Reads it.
    pub fn open(pool: Arc<Pool>) -> PoolRegister {
        let mut inner = Inner::default();
        for (name, bytes) in pool.documents(HOSTS) {
            match serde_json::from_slice::<HostRecord>(&bytes) {
                Ok(host) => drop(inner.hosts.insert(host.id, host)),
                Err(error) => {
                    tracing::error!(%name, %error, "a host cannot be read; it must be enrolled again")
                }
            }
        }
        PoolRegister { pool, inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn token(&self, hash: &str) -> Option<TokenRecord> {
        serde_json::from_slice(&self.pool.document(&format!("{TOKENS}{hash}"))?).ok()
    }

    /// The hosts, and when each was last heard of in this run.
    pub(super) fn hosts(&self) -> Vec<(HostRecord, Option<Timestamp>)> {
        let inner = self.inner();
        inner.hosts.values().map(|host| (host.clone(), inner.seen.get(&host.id).copied())).collect()
    }

    pub(super) fn host(&self, id: HostId) -> Option<HostRecord> {
        self.inner().hosts.get(&id).cloned()
    }

    /// A host was heard of.
    pub fn saw(&self, id: HostId, now: Timestamp) {
        self.inner().seen.insert(id, now);
    }

    /// Makes a token of the server with this identity.
    pub(super) fn make_token(
        &self,
        server: Fingerprint,
        secret: [u8; 20],
        count: u32,
        valid_seconds: Option<u64>,
        now: Timestamp,
    ) -> Result<(Token, TokenRecord), Problem> {
        let mut scope = TokenScope { count, ..TokenScope::default() };
        if let Some(seconds) = valid_seconds {
            if seconds == 0 || seconds > LONGEST {
                return Err(Problem::new(
                    Code::Usage,
                    format!("A token is valid for 1 to {LONGEST} seconds, asked was for {seconds}."),
                ));
            }
            scope.valid_for = seconds * Timestamp::SECOND;
        }
        if !(1..=MOST_HOSTS).contains(&count) {
            return Err(Problem::new(
                Code::Usage,
                format!("A token enrols 1 to {MOST_HOSTS} hosts, asked was for {count}."),
            ));
        }
        let _one_at_a_time = self.inner();
        for (name, bytes) in self.pool.documents(TOKENS) {
            let old = serde_json::from_slice::<TokenRecord>(&bytes);
            if old.is_ok_and(|old| old.expires.0.saturating_add(KEPT) < now.0) {
                self.pool.put_document(&name, None).map_err(jobs::problem::pool)?;
            }
        }
        let (token, record) = Token::issue(server, secret, scope, now);
        put(&self.pool, &format!("{TOKENS}{}", record.hash), &record)?;
        Ok((token, record))
    }

    /// Revokes a host; doing it again changes nothing.
    pub(super) fn revoke(&self, id: HostId, now: Timestamp) -> Result<(), Problem> {
        let mut inner = self.inner();
        let host = inner
            .hosts
            .get(&id)
            .ok_or_else(|| Problem::new(Code::NotFound, format!("No host {id}.")).about(id.to_string()))?;
        if host.revoked.is_some() {
            return Ok(());
        }
        let revoked = HostRecord { revoked: Some(now), ..host.clone() };
        put(&self.pool, &format!("{HOSTS}{id}"), &revoked)?;
        inner.hosts.insert(id, revoked);
        Ok(())
    }
}

pub(super) fn revoked(host: &HostRecord) -> Problem {
    Problem::new(Code::HostRevoked, format!("Host {} was revoked.", host.name)).about(host.name.clone())
}

impl HostRegister for PoolRegister {
    fn enrol(&self, request: &EnrolRequest) -> Result<HostId, Problem> {
        names::check_name(&request.host_name)?;
        let mut inner = self.inner();
        let token = self.token(&request.token_hash).ok_or(TokenRefusal::Unknown)?;
        let of_name = inner.hosts.values().find(|host| host.name.eq_ignore_ascii_case(&request.host_name));
        let returning = of_name.filter(|host| host.revoked.is_some()).map(|host| host.id);
        let (used, id) =
            token.redeem(request.key, &request.host_name, returning.unwrap_or(request.fresh), request.now)?;
        // A stolen key with the token it was enrolled by, or with what is left of a batch, must not undo a revocation.
        if let Some(host) = inner.hosts.get(&id)
            && let Some(at) = host.revoked
            && token.issued <= at
        {
            return Err(revoked(host)
                .hint("A new token, made after the revocation, enrols it again: `stillpoint host token`."));
        }
        if let Some(other) = of_name
            && other.id != id
        {
            return Err(Problem::new(Code::NameTaken, format!("A host {} is enrolled already.", other.name))
                .about(other.name.clone())
                .hint(
                    "Revoke it first (`stillpoint host revoke`), or enrol under another name with --name.",
                ));
        }
        if used != token {
            put(&self.pool, &format!("{TOKENS}{}", used.hash), &used)?;
        }
        let before = inner.hosts.get(&id);
        let again = before.filter(|host| host.revoked.is_none());
        let host = HostRecord {
            id,
            name: request.host_name.clone(),
            platform: request.platform.clone(),
            version: request.program_version.clone(),
            enrolled: request.now,
            revoked: None,
            certificates_from: match (before, again) {
                (_, Some(same)) => same.certificates_from,
                (None, _) => Timestamp(0),
                // What is issued from now on begins at this second at the earliest.
                (Some(_), None) => {
                    let begins = request.now.0.saturating_sub(BACKDATE);
                    Timestamp(begins - begins % Timestamp::SECOND)
                }
            },
            certificate_until: None,
        };
        put(&self.pool, &format!("{HOSTS}{id}"), &host)?;
        inner.hosts.insert(id, host);
        Ok(id)
    }

    fn admit(&self, certificate: &PeerCertificate) -> Result<(), Problem> {
        let inner = self.inner();
        let host = inner.hosts.get(&certificate.host).ok_or_else(|| {
            Problem::new(Code::HostRevoked, format!("This server has no host {}.", certificate.host))
                .about(certificate.host.to_string())
        })?;
        if host.revoked.is_some() || certificate.not_before < host.certificates_from {
            return Err(revoked(host));
        }
        Ok(())
    }

    fn issued(&self, certificate: &PeerCertificate) -> Result<(), Problem> {
        let mut inner = self.inner();
        let Some(host) = inner.hosts.get(&certificate.host) else {
            return Err(Problem::new(
                Code::HostRevoked,
                format!("This server has no host {}.", certificate.host),
            ));
        };
        if host.revoked.is_some() {
            return Err(revoked(host));
        }
        let host = HostRecord { certificate_until: Some(certificate.not_after), ..host.clone() };
        put(&self.pool, &format!("{HOSTS}{}", host.id), &host)?;
        inner.hosts.insert(host.id, host);
        Ok(())
    }
}

#[cfg(test)]
#[path = "register_tests.rs"]
mod tests;

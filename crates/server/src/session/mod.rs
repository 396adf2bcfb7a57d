//! Sessions with agents: gRPC over mutual TLS, and who is connected.
//!
//! ```text
//! TCP --> TLS 1.3 (client certificate optional) --> HTTP: Enrollment | Agent | what the caller of `serve` adds (REST)
//!                 '-- PeerCertificate as an extension of each request     '--> SessionRegistry
//! ```
//!
//! Async lives here only. Jobs are synchronous: they hold an [`AgentSession`] and call it from their own threads.
//!
//! Who may do what (default deny; checked at every request, from the time then and the register of hosts):
//!
//! | caller | Enroll | Renew | Control, Data |
//! |---|---|---|---|
//! | no certificate | with a token | - | - |
//! | good certificate | with a token | yes | yes |
//! | expired up to 90 days | with a token | yes | refused: SP-4009, renew |
//! | expired longer | with a token | refused: SP-4009, enrol | refused: SP-4009 |
//! | revoked | with a token | refused: SP-4005 | refused; open streams end within [`SWEEP`] |
//!
//! Invariants
//! - A data stream is taken only for a job that this server opened for this very host; a job of another host and a job
//!   that does not exist get the same answer (INV-23). (must)
//! - A certificate is issued only after the register has stored that the token was used. (must)
//! - The agent's word is tamed before it is kept: texts cut, ids checked, at most [`OPEN_COMMANDS`] commands. (must)

mod agent_service;
mod enrollment;
mod gate;
mod listener;
mod registry;
mod tls;

pub use gate::Gate;
pub use listener::serve;
pub use registry::{AgentInfo, AgentSession, PendingCommand, SessionEvent, SessionRegistry};

use environment::{Clock, Randomness};
use identity::{Fingerprint, PeerCertificate, ServerIdentity, Standing};
use model::{Code, HostId, PoolId, Problem, Timestamp};
use std::sync::Arc;
use std::time::Duration;

/// How often open sessions are checked against the register: the bound on revocation (5 s) less the work.
pub const SWEEP: Duration = Duration::from_secs(2);
/// Commands of one host that may be open at once.
pub const OPEN_COMMANDS: usize = 256;

/// What an agent says of its host when it enrols. Not to be trusted, only shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolRequest {
    /// The token to redeem, by [`identity::Token::hash_of`].
    pub token_hash: String,
    /// The agent's key, for [`identity::TokenRecord::redeem`].
    pub key: Fingerprint,
    /// What the host calls itself.
    pub host_name: String,
    /// Operating system and architecture.
    pub platform: String,
    /// Version of the agent.
    pub program_version: String,
    /// The id to give to a host that is new.
    pub fresh: HostId,
    /// The server's time.
    pub now: Timestamp,
}

/// The register of hosts and tokens: the catalog, for the server. Called from blocking threads.
pub trait HostRegister: Send + Sync {
    /// Finds the token, redeems it with [`identity::TokenRecord::redeem`], stores token and host in one transaction
    /// (two agents must not share a use), and returns the host.
    fn enrol(&self, request: &EnrolRequest) -> Result<HostId, Problem>;
    /// Whether the holder of this certificate may still act: `Err` with [`Code::HostRevoked`] if its host was revoked
    /// (or the certificate was issued before a revocation that a new enrolment ended) or is not known.
    fn admit(&self, certificate: &PeerCertificate) -> Result<(), Problem>;
    /// A certificate was issued.
    fn issued(&self, certificate: &PeerCertificate) -> Result<(), Problem>;
}

/// What the sessions need of the server.
#[derive(Clone)]
pub struct SessionSettings {
    /// The key that makes this server this server.
    pub identity: Arc<ServerIdentity>,
    /// What the server calls itself, shown to agents.
    pub server_name: String,
    /// Addresses (`HOST:PORT`) under which agents find this server, best first. Agents keep the list.
    pub addresses: Vec<String>,
    /// The pool it serves.
    pub pool: PoolId,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Serial numbers, ids.
    pub randomness: Arc<dyn Randomness>,
    /// Hosts and tokens.
    pub register: Arc<dyn HostRegister>,
    /// How long a command waits for its host to come back before it fails.
    pub contact_grace: Duration,
}

impl SessionSettings {
    fn now(&self) -> Timestamp {
        Timestamp(self.clock.now_micros())
    }

    fn random(&self) -> Result<[u8; 16], Problem> {
        let mut bytes = [0; 16];
        self.randomness
            .fill(&mut bytes)
            .map_err(|error| Problem::new(Code::Internal, format!("No random numbers: {error}.")))?;
        Ok(bytes)
    }
}

/// Refuses a certificate that is not good for everything.
fn require_good(certificate: &PeerCertificate, now: Timestamp) -> Result<(), Problem> {
    let ended = || {
        format!("The certificate of host {} ended at {}.", certificate.host, certificate.not_after.rfc3339())
    };
    match certificate.standing(now) {
        Standing::Good => Ok(()),
        Standing::RenewOnly => Err(Problem::new(Code::CertificateExpired, ended())
            .about(certificate.host.to_string())
            .hint("The agent renews it by itself.")),
        Standing::TooOld => Err(too_old(certificate)),
    }
}

fn too_old(certificate: &PeerCertificate) -> Problem {
    Problem::new(
        Code::CertificateExpired,
        format!(
            "The certificate of host {} ended at {}, more than 90 days ago.",
            certificate.host,
            certificate.not_after.rfc3339()
        ),
    )
    .about(certificate.host.to_string())
}

/// Runs a call of the register where it may block.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|_| Err(Problem::new(Code::Internal, "The register of hosts stopped unexpectedly.")))
}

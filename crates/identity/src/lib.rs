//! Who is who: the server's identity key, enrolment tokens, agents' certificates, and the TLS rules built on them.
//!
//! ```text
//! ServerIdentity (one key, kept for ever) --fingerprint--> printed, put into tokens, pinned by agents
//!        |-- issues itself a TLS leaf of 7 days          (URI stillpoint:server, server authentication only)
//!        '-- issues a host certificate of up to 7 days   (URI stillpoint:host:ID, client authentication only)
//! ```
//!
//! Refuses to know: sockets, files, the catalog, the clock. Time and random numbers come in as arguments; only fresh
//! keys are made inside, by the cryptographic library.
//!
//! Invariants
//! - An agent trusts the identity key, never a name or an address (architecture, decision 8). (must)
//! - A token says which server it is for, so nothing is sent to a server that cannot prove that identity. (must)
//! - A token is stored only as its hash; it is single use and short lived unless asked otherwise. (must)
//! - A host certificate can do nothing but speak for its one host; it cannot act as the server. (must)
//! - An expired certificate may do one thing, renew, for 90 days; see [`Standing`]. (must)
//!
//! What a certificate may do is decided at every request from the time then, not at the handshake: a connection can
//! outlive its certificate, and a refusal in words is of more use than a TLS alert.

mod base32;
mod certificate;
mod fingerprint;
mod server;
mod tls;
mod token;

pub use certificate::{HostKey, PeerCertificate, Standing};
pub use fingerprint::Fingerprint;
pub use server::{ServerIdentity, TlsIdentity};
pub use tls::{AcceptHosts, PinnedServer, agent_tls, server_tls};
pub use token::{Redemption, Token, TokenRecord, TokenRefusal, TokenScope};

use model::{Code, Problem, Timestamp};

/// Days that a host certificate and the server's TLS leaf are valid.
pub const CERTIFICATE_LIFE: u64 = 7 * Timestamp::DAY;
/// How long after its end a host certificate may still be used to renew.
pub const RENEWAL_GRACE: u64 = 90 * Timestamp::DAY;
/// How far the clocks of host and server may differ before the TLS leaf of the server is refused.
///
/// The pinned key is what proves the server; the dates of the leaf only limit how long a stolen leaf key is of use. A
/// host whose clock is a day off must still be protected.
pub const CLOCK_TOLERANCE: u64 = Timestamp::DAY;
/// Certificates begin this much before they are issued, for hosts whose clock is a little behind.
pub const BACKDATE: u64 = 3_600 * Timestamp::SECOND;

/// What can be wrong with a key, certificate or request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The stored identity of the server fails its check.
    #[error("the server identity ({bytes} bytes) is damaged: {reason}")]
    IdentityDamaged {
        /// How long it is.
        bytes: usize,
        /// What does not fit.
        reason: String,
    },
    /// A certificate cannot be read or lacks what it must say.
    #[error("not a certificate of a Stillpoint host: {reason}")]
    Certificate {
        /// What is missing or wrong.
        reason: String,
    },
    /// A certificate request cannot be read, or its signature is wrong.
    #[error("not an acceptable certificate request: {reason}")]
    Request {
        /// What is missing or wrong.
        reason: String,
    },
    /// Text that is not a fingerprint.
    #[error("{text:?} is not a fingerprint: expected 52 characters a-z and 2-7")]
    Fingerprint {
        /// The beginning of what was given.
        text: String,
    },
    /// The cryptographic library refused.
    #[error("making a {what}: {reason}")]
    Library {
        /// What was being made.
        what: &'static str,
        /// What the library said.
        reason: String,
    },
}

impl From<IdentityError> for Problem {
    fn from(error: IdentityError) -> Problem {
        let code = match &error {
            IdentityError::IdentityDamaged { .. } => Code::StateDamaged,
            IdentityError::Certificate { .. } => Code::Unauthorised,
            IdentityError::Request { .. } => Code::ProtocolBroken,
            IdentityError::Fingerprint { .. } => Code::Usage,
            IdentityError::Library { .. } => Code::Internal,
        };
        Problem::new(code, error.to_string())
    }
}

//! The agent's connection: it dials out, opens no port, and comes back by itself.
//!
//! ```text
//! enrol(token) --> state folder: key, certificate, pinned server, addresses
//! run --> dial the addresses in turn --> [renew] --> Control session --> commands, each on a thread of its own
//!              ^---- backoff with jitter, as long as it takes ----'            '--> ServerLink: data streams, progress
//! ```
//!
//! The server is known by its identity key, never by name or address: nothing is sent before the handshake has proved
//! it (architecture, decision 8). The list of addresses is learnt from the server at each session, so a server that
//! moved within the list is found without a hand on the host.
//!
//! | what happens | what the agent does |
//! |---|---|
//! | no contact | next address; after all of them wait, twice as long each time up to the limit |
//! | two thirds of the certificate's life are over | renews, then opens its next connections with the new one |
//! | the certificate expired (by either clock) | renews first, then goes on |
//! | expired more than 90 days ago, revoked, no common version | says so ([`ConnectionEvent::Refused`]), tries again at the longest interval |
//! | the session breaks while commands run | they go on; the next session delivers their results |

mod commands;
mod control;
mod data;
mod dial;
mod state;

pub use control::{enrol, run};
pub use data::ServerLink;
pub use state::{AgentIdentity, AgentState};

use environment::{Clock, Randomness};
use model::{Code, HostId, Problem, Timestamp};
use protocol::v0::command;
use std::sync::Arc;
use std::time::Duration;

/// The port of a server whose address names none.
pub const DEFAULT_PORT: u16 = 7420;

/// What the connection needs to know.
#[derive(Clone)]
pub struct ConnectionSettings {
    /// What the host calls itself.
    pub host_name: String,
    /// Operating system and architecture.
    pub platform: String,
    /// Version of this program.
    pub program_version: String,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Jitter and ids.
    pub randomness: Arc<dyn Randomness>,
    /// First wait after all addresses failed.
    pub backoff_first: Duration,
    /// Longest wait.
    pub backoff_most: Duration,
    /// How often the age of the certificate is looked at.
    pub renewal_check: Duration,
    /// Called with what happens; must not block.
    pub report: Arc<dyn Fn(ConnectionEvent) + Send + Sync>,
}

impl ConnectionSettings {
    /// The usual waits: half a second doubling to a minute, the certificate's age every ten minutes.
    pub fn new(
        host_name: impl Into<String>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
        report: Arc<dyn Fn(ConnectionEvent) + Send + Sync>,
    ) -> ConnectionSettings {
        ConnectionSettings {
            host_name: host_name.into(),
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            clock,
            randomness,
            backoff_first: Duration::from_millis(500),
            backoff_most: Duration::from_secs(60),
            renewal_check: Duration::from_secs(600),
            report,
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.clock.now_micros())
    }

    /// Between half of `duration` and all of it, so that a fleet does not come back in step.
    fn jittered(&self, duration: Duration) -> Duration {
        let mut byte = [0xFF];
        // Without random numbers the full wait.
        let _ = self.randomness.fill(&mut byte);
        duration / 2 + duration / 2 * u32::from(byte[0]) / 255
    }
}

/// What happens to the connection, for the log and the status of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// A session is open.
    Connected {
        /// At this address.
        address: String,
        /// What the server calls itself.
        server_name: String,
    },
    /// The certificate was renewed.
    Renewed {
        /// Its end.
        not_after: Timestamp,
    },
    /// An address failed, or the session broke.
    Lost {
        /// Which address.
        address: String,
        /// Why.
        problem: Problem,
    },
    /// The server does not want this agent; a person must act.
    Refused {
        /// Why.
        problem: Problem,
    },
    /// A state file is damaged and the one before was used.
    Warning {
        /// Which.
        problem: Problem,
    },
}

/// What carries out the server's commands. Written by the wiring, over the providers.
pub trait Executor: Send + Sync + 'static {
    /// The providers of this host.
    fn providers(&self) -> Vec<String>;
    /// Carries out one command, on a thread of its own; JSON is the result. The list of a `SendOrder` is complete.
    /// `CancelJob` is called while the job's own command runs. A command that is sent twice is called once.
    fn command(&self, id: u64, command: command::Kind, link: &ServerLink) -> Result<String, Problem>;
}

/// Whether trying again cannot help: the server has spoken.
fn is_final(problem: &Problem) -> bool {
    !matches!(
        problem.code,
        Code::NoContact | Code::AgentUnreachable | Code::CertificateExpired | Code::ServerIdentity
    )
}

/// The host that an identity is of, for messages.
fn about_host(problem: Problem, host: HostId) -> Problem {
    if problem.object.is_empty() { problem.about(host.to_string()) } else { problem }
}

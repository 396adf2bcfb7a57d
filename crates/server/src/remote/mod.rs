//! Hosts over the network: the port of `jobs` over sessions, and what the pool remembers of hosts and tokens.
//!
//! ```text
//! jobs --ProtectedHost--> RemoteHost --commands--> AgentSession --gRPC--> agent
//!                                   '--DataChannel, one a job------------^
//! pool documents: host/ID, token/HASH, api-token/NAME, server/identity
//! ```
//!
//! Everything that must survive the loss of the catalog is a sealed document of the pool (architecture, decision 7): a
//! server rebuilt from pool and kit is the same server to its agents. When a host was last heard of is not: it is known
//! from this run only.
//!
//! Invariants
//! - What an agent says is checked before a job sees it: sizes, sectors, numbers of disks, lengths of texts. (must)
//! - A job that is dropped leaves no work behind on its host: its stream is closed and `CancelJob` sent. (must)

mod api_tokens;
mod host;
mod hosts;
mod housekeeping;
mod identity;
mod register;
mod stream;

pub use self::identity::server_identity;
pub use api_tokens::ApiTokens;
pub use host::{RemoteHost, RemoteTimes};
pub use hosts::RemoteHosts;
pub use housekeeping::{ByAge, Housekeeping};
pub use register::PoolRegister;

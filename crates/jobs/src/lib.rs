//! What the product does: protect, synchronise, check, recover, verify, prune and reclaim.
//!
//! Plain synchronous Rust over two ports: the storage pool on one side, a [`ProtectedHost`] on the other. The server
//! implements the port over an agent's session; standalone it is the agent's own code in this process.
//!
//! Refuses to know: sockets, messages, providers, the API. A host's definition of a machine is text that is kept
//! and handed back, never read.
//!
//! - [`decide`]: what a run reads and why: a pure function with its cause chain.
//! - [`synchronize`]: initial replication, synchronisation and consistency check: the same pipe with other decisions.
//! - [`recover`]: a disk of a point to a host.
//! - [`machine`]: a whole machine of a point to a host.
//! - [`scratch`]: what a view will need on its host.
//! - [`keep`]: verify, prune, reclaim.
//! - [`problem`]: what each error of the rooms below means to a person.
//!
//! Invariants
//! - A change list is used only against the point it is from, and only if nothing is in doubt (INV-22). (must)
//! - Nothing is acknowledged before the pool has committed and the host has proved that its view stood still. (must)
//! - Points that a caught tracker may have spoilt are marked before the right point is committed. (must)

pub mod decide;
pub mod keep;
pub mod machine;
pub mod port;
pub mod problem;
pub mod recover;
pub mod scratch;
mod store;
pub mod synchronize;

pub use port::{
    AgentEnd, DiskView, JobContext, LogLevel, Machine, MachineView, ProtectedHost, ReceiveOrder, Receiving,
    SendOrder, Sending, SentView, TargetEnd,
};

//! The agent: connects a host's datasources to a server.
//!
//! Wiring only. [`host`] is what a host does for an order, whoever brings it; `connection` dials a server and brings
//! its orders here; [`executor`] stands between the two. [`cpu`] is what all of it leaves to the machines of the host.

pub mod cpu;
pub mod executor;
pub mod host;

pub use executor::HostExecutor;
pub use host::{Host, Receive, Sent, Wanted};

pub mod connection;

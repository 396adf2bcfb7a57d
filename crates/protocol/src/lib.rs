//! What goes over the wire: messages between server and agent, HTTP API types, versions, golden bytes.
//!
//! - [`v0`]: the messages and gRPC services, generated from `proto/stillpoint.proto`. Version 0 until the first release.
//! - [`wire`]: between those messages and the words of `model`; limits; version negotiation; lists in pages.
//! - [`channel`]: one job's data stream as synchronous threads see it, the same at both ends.
//! - [`stream`]: the streams of one job one after another, none mistaken for another.
//! - [`machine`]: the JSON that hosts and server exchange about machines.
//! - [`api`]: the JSON of the HTTP API.
//!
//! Refuses to know: what a command does, what a payload of a data stream means, who may do what.

pub mod api;
pub mod channel;
pub mod machine;
pub mod stream;
pub mod wire;

/// Version 0 of the messages between server and agent.
#[allow(missing_docs, clippy::all)]
pub mod v0 {
    tonic::include_proto!("stillpoint.v0");
}

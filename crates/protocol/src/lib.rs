//! Messages between server and agent, HTTP API types, identities, versions, golden bytes.

pub mod api;

//! The HTTP API: `/api/v1` over [`Service`].

mod service;

pub use service::{Caller, Credentials, JobEvents, JobFilter, Right, Service};

//! The server: sessions with agents, jobs, REST API.

pub mod api;
pub mod app;
pub mod remote;
pub mod session;

//! The HTTP API: `/api/v1` over [`Service`].
//!
//! Wiring only: a request becomes one question to the [`Service`], its answer becomes JSON. Refuses: deciding anything
//! about machines, points or jobs.
//!
//! - Default deny: every route but `/version` names the [`Right`] it needs and asks [`Service::authorise`] before it
//!   looks at the body. Routes without one cannot be written: the handlers get at the service only through it.
//! - Every error is a [`model::Problem`] as JSON with a fitting HTTP status, unknown routes and broken bodies included.
//! - The service blocks; it is called on threads made for that, never on the runtime's own.
//! - The OpenAPI document is made from the very routes; `docs/openapi.json` is kept equal by a test.
//!
//! [`names`] says what a typed name means. [`service`](Service) is the port that the server implements over `jobs`.

mod input;
pub mod names;
mod routes;
mod service;
mod stream;

pub use input::Door;
pub use routes::{openapi, router};
pub use service::{Caller, Credentials, JobEvents, JobFilter, Right, Service};

#[cfg(test)]
mod tests;

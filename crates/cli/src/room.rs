//! What every command over the API is given.

use crate::client::Client;
use crate::output::Output;
use crate::program::Program;

/// What a command works with.
pub struct Room<'a> {
    /// The API.
    pub client: Client,
    /// Where output goes.
    pub output: &'a Output,
    /// What the binary adds.
    pub program: &'a dyn Program,
    /// Whether the API is this very process.
    pub standalone: bool,
}

//! `stillpoint server run`. (in work)
use cli::program::{Say, ServerOptions};
use model::{Code, Problem};

/// Runs the server until it is told to stop.
pub fn run(_options: &ServerOptions, _say: &dyn Say) -> Result<(), Problem> {
    Err(Problem::new(Code::Unsupported, "The network server is not wired yet."))
}

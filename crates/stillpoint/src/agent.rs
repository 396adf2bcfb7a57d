//! `stillpoint agent enroll` and `agent run`. (in work)
use cli::program::{AgentOptions, EnrollOptions, Say};
use model::{Code, Problem};

/// Enrols this machine.
pub fn enroll(_options: &EnrollOptions, _say: &dyn Say) -> Result<(), Problem> {
    Err(Problem::new(Code::Unsupported, "The network agent is not wired yet."))
}

/// Runs the agent until it is told to stop.
pub fn run(_options: &AgentOptions, _say: &dyn Say) -> Result<(), Problem> {
    Err(Problem::new(Code::Unsupported, "The network agent is not wired yet."))
}

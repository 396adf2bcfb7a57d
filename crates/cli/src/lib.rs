//! The command line: words in, API calls out.

pub mod program;
pub mod transport;

pub use program::Program;
pub use transport::Transport;

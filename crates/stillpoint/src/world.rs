//! The machine that this process runs on: its clock, its randomness, its name.

use std::sync::Arc;

use environment::{FolderFiles, SystemClock, SystemRandomness};
use storage_pool::World;

/// The world around the files of a pool: the machine's own clock and randomness.
pub fn world_of(files: Arc<FolderFiles>) -> World {
    World { files, clock: Arc::new(SystemClock), randomness: Arc::new(SystemRandomness) }
}

/// What this machine calls itself.
pub fn machine_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The log of a process that runs for long goes to stderr: warnings, or what `STILLPOINT_LOG` says (`info`,
/// `server=debug`).
pub fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("STILLPOINT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    // Somebody who embeds this has a log of his own.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

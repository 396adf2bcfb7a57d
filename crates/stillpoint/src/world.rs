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

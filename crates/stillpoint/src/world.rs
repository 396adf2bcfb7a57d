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

/// How libvirt is reached on this machine. `STILLPOINT_LIBVIRT_SOCKET` names another socket, `STILLPOINT_SCRATCH` a folder for
/// what running machines overwrite during a backup.
pub fn libvirt() -> datasource::libvirt::Settings {
    let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(std::path::PathBuf::from);
    let mut settings = datasource::libvirt::Settings::default();
    if let Some(socket) = path("STILLPOINT_LIBVIRT_SOCKET") {
        settings.socket = socket;
    }
    settings.scratch = path("STILLPOINT_SCRATCH");
    settings.monitor = std::env::var_os("STILLPOINT_LIBVIRT_MONITOR").is_none_or(|value| value != "off");
    settings.program = std::env::current_exe().ok();
    settings
}

/// The guard over a freeze of file systems: a process of its own, because it must outlive its maker.
pub fn thaw_guard(words: &[std::ffi::OsString]) -> std::process::ExitCode {
    let Some(watch) = datasource::libvirt::guard::Watch::from_words(words) else {
        eprintln!("The guard over a freeze is started by the agent, not by hand.");
        return std::process::ExitCode::from(2);
    };
    datasource::libvirt::guard::stand(&watch, std::io::stdin());
    std::process::ExitCode::SUCCESS
}

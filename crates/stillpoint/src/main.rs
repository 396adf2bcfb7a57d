//! The `stillpoint` program: server, agent and command line in one.
//!
//! Wiring only. What a command does is in `jobs`, `server`, `agent`; what it looks like is in `cli`.

use std::process::ExitCode;

#[cfg(unix)]
mod agent;
#[cfg(unix)]
mod deletion;
#[cfg(unix)]
mod demo;
#[cfg(unix)]
mod follow;
#[cfg(unix)]
mod local_host;
#[cfg(unix)]
mod program;
#[cfg(unix)]
mod server;
#[cfg(unix)]
mod standalone;
#[cfg(unix)]
mod world;

#[cfg(unix)]
fn main() -> ExitCode {
    let arguments: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|word| word == deletion::WORD) {
        return deletion::main();
    }
    if arguments.get(1).is_some_and(|word| word == datasource::libvirt::guard::SUBCOMMAND) {
        return world::thaw_guard(arguments.get(2..).unwrap_or_default());
    }
    // One provider for all TLS of the process; a second installation is no error.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    ExitCode::from(cli::main(arguments, &program::Stillpoint))
}

#[cfg(not(unix))]
fn main() -> ExitCode {
    eprintln!("The program for this system comes with the Windows agent; the rooms it needs build already.");
    ExitCode::FAILURE
}

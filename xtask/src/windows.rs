//! The Windows check: everything the agent needs must compile for x86_64-pc-windows-gnu.
//!
//! Only `agent` is named, cargo takes its rooms with it; `server`, `storage-pool` and `catalog` are not for Windows.
//! The standard library for the target comes from rustup, or where rustup has nothing to download from, from Debian's
//! sources (testbed/windows-toolchain.sh, kept in the user's cache).

use crate::{install, run, workspace};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const TARGET: &str = "x86_64-pc-windows-gnu";
const ROOT_ROOM: &str = "agent";

/// A toolchain that has a standard library for the target.
pub enum Toolchain {
    /// The one that runs this chore.
    Ours,
    /// An unpacked one under this prefix.
    Unpacked(PathBuf),
}

/// Gets the C compiler and the standard library for Windows; `debian` takes the unpacked toolchain in any case.
pub fn install(debian: bool) -> Result<Toolchain, String> {
    install::run(install::Group::Windows)?;
    if !debian && (ours_is_ready() || (rustup_adds() && ours_is_ready())) {
        return Ok(Toolchain::Ours);
    }
    let script = workspace::read()?.root.join("testbed").join("windows-toolchain.sh");
    let said = run::output(Command::new(script).arg("--no-wine"))?;
    let prefix = said.lines().last().ok_or("windows-toolchain.sh did not say where it put the toolchain")?;
    Ok(Toolchain::Unpacked(prefix.into()))
}

fn ours_is_ready() -> bool {
    let said = Command::new("rustc").args(["--print", "target-libdir", "--target", TARGET]).output();
    said.is_ok_and(|out| {
        let folder = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        out.status.success()
            && std::fs::read_dir(folder).is_ok_and(|mut entries| {
                entries
                    .any(|entry| entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("libstd-")))
            })
    })
}

fn rustup_adds() -> bool {
    let mut add = Command::new("rustup");
    add.args(["target", "add", TARGET]);
    // Without a network rustup tries for minutes; the other way is there.
    let mut add = run::with_deadline(add, Duration::from_secs(120));
    add.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// Checks the agent's rooms with warnings as errors, in a build folder of its own.
pub fn check(toolchain: &Toolchain) -> Result<(), String> {
    let folder = workspace::read()?.target.join("windows");
    let mut command = cargo(toolchain);
    command.args(["check", "--locked", "--keep-going", "--target", TARGET, "--package", ROOT_ROOM]);
    command.env("CARGO_TARGET_DIR", folder).env("RUSTFLAGS", "-D warnings");
    run::run(&mut command)
}

fn cargo(toolchain: &Toolchain) -> Command {
    match toolchain {
        Toolchain::Ours => run::cargo(),
        Toolchain::Unpacked(prefix) => {
            let mut command = run::cargo_at(&prefix.join("usr/bin/cargo"));
            for ours in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTDOC", "RUSTC_WRAPPER", "CARGO_BUILD_TARGET"] {
                command.env_remove(ours);
            }
            command.env("RUSTC", prefix.join("usr/bin/rustc"));
            command.env("LD_LIBRARY_PATH", prefix.join(Path::new("usr/lib")));
            command
        }
    }
}

//! The README's first command: from a clean clone to a recovered disk.

use crate::{install, run, workspace};
use std::process::Command;

/// Installs what the demo needs, builds the program and runs `stillpoint demo` with `arguments`.
pub fn run(arguments: &[&str]) -> Result<(), String> {
    install::run(install::Group::Demo)?;
    run::run(run::cargo().args(["build", "--locked", "--release", "--package", "stillpoint"]))?;
    let program = workspace::read()?.target.join("release").join("stillpoint");
    run::run(Command::new(program).arg("demo").args(arguments))
}

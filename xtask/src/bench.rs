//! The measurements: Stillpoint beside its peers and the machine's limit, in one run (docs/benchmarks.md).

use crate::{install, run, workspace};
use std::process::Command;

/// Builds what is measured and runs `bench/bench.py` with `arguments`.
pub fn run(arguments: &[&str]) -> Result<(), String> {
    install::run(install::Group::Test)?;
    for part in
        [&["--package", "stillpoint", "--package", "bench"][..], &["--package", "storage-pool", "--examples"]]
    {
        run::run(run::cargo().args(["build", "--locked", "--release"]).args(part))?;
    }
    let space = workspace::read()?;
    let release = space.target.join("release");
    let script = space.root.join("bench").join("bench.py");
    let mut command = Command::new("python3");
    command.arg(script);
    for (option, path) in [("--program", "stillpoint"), ("--floor", "bench"), ("--examples", "examples")] {
        command.arg(option).arg(release.join(path));
    }
    run::run(command.args(arguments))
}

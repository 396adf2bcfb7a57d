//! The project's chores: `cargo xtask CHORE`.
//!
//! Each chore is one file. What is policy (allowed crate edges, package lists, campaigns) stands in a table at the
//! head of its file; what cargo itself can do is left to cargo. Built by every run of the tests before anything else,
//! so it has next to no dependencies.

mod bench;
mod campaigns;
mod changelog;
mod demo;
#[cfg(test)]
mod documents;
mod install;
mod layers;
mod licences;
mod mutations;
mod night;
mod run;
mod suite;
mod windows;
mod workspace;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask CHORE

  install [--windows] [--demo]  install what build and tests need (Debian; --demo: only what the demo needs)
  test [--quick]                everything: format, layers, licences, lints, tests, Windows, campaigns, demo
  demo [ARGS...]                install, build and run `stillpoint demo ARGS...`
  bench [ARGS...]               install, build and measure beside peers and the machine's limit (docs/benchmarks.md)
  night [--minutes N] [--seed S] [--to FILE]
                                every campaign for its share of N minutes (90); appends a table to FILE
                                (night.md in the build folder)
  layers                        check crate edges, module cycles and the core's way to the outside
  licences                      check licences, banned crates and sources of every dependency (deny.toml)
  mutations [NN,NN,..]          plant the bugs of other backup programs one by one; a test must notice each
  windows [--install] [--debian-toolchain]
                                check the agent's rooms for x86_64-pc-windows-gnu
  changelog [--check]           print the changelog from its fragments
";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["install", flags @ ..] => flags_among(flags, &["--windows", "--demo"]).and_then(|()| {
            let group = if flags.contains(&"--demo") { install::Group::Demo } else { install::Group::Test };
            install::run(group)?;
            if flags.contains(&"--windows") { windows::install(false).map(drop) } else { Ok(()) }
        }),
        ["test", flags @ ..] => match flags_among(flags, &["--quick"]) {
            // The suite has the last word itself: its summary.
            Ok(()) if suite::run(flags.contains(&"--quick")) => return ExitCode::SUCCESS,
            Ok(()) => return ExitCode::FAILURE,
            Err(message) => Err(message),
        },
        ["demo", rest @ ..] => demo::run(rest),
        ["bench", rest @ ..] => bench::run(rest),
        ["night", rest @ ..] => night(rest),
        ["layers"] => layers::run(),
        ["licences"] => licences::run(),
        ["mutations"] => mutations::run(&[]),
        ["mutations", numbers] => numbers
            .split(',')
            .map(|number| number.parse().map_err(|_| format!("`{number}` is no number of a mutation")))
            .collect::<Result<Vec<u32>, String>>()
            .and_then(|numbers| mutations::run(&numbers)),
        ["windows", flags @ ..] => flags_among(flags, &["--install", "--debian-toolchain"]).and_then(|()| {
            let toolchain = windows::install(flags.contains(&"--debian-toolchain"))?;
            if flags.contains(&"--install") { Ok(()) } else { windows::check(&toolchain) }
        }),
        ["changelog", flags @ ..] => {
            flags_among(flags, &["--check"]).and_then(|()| changelog::run(flags.contains(&"--check")))
        }
        [] | ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => Err(format!("unknown chore `{}`\n\n{USAGE}", other.join(" "))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the options of the night.
fn night(words: &[&str]) -> Result<(), String> {
    let (mut minutes, mut seed, mut file) = (90, 1, workspace::read()?.target.join("night.md"));
    for pair in words.chunks(2) {
        let number = |value: &str| value.parse::<u64>().map_err(|_| format!("`{value}` is not a number"));
        match pair {
            ["--minutes", value] => minutes = number(value)?,
            ["--seed", value] => seed = number(value)?,
            ["--to", value] => file = value.into(),
            other => return Err(format!("unknown option `{}`\n\n{USAGE}", other.join(" "))),
        }
    }
    night::run(minutes, seed, &file)
}

/// Refuses a flag that the chore does not have, so that a typing mistake never runs something else.
fn flags_among(given: &[&str], known: &[&str]) -> Result<(), String> {
    match given.iter().find(|flag| !known.contains(flag)) {
        Some(flag) => Err(format!("unknown flag `{flag}`; this chore has {}", known.join(", "))),
        None => Ok(()),
    }
}

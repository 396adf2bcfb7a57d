//! Everything the README's test command promises, in the order in which it is cheapest to fail.
//!
//! A failed step does not stop the others, except that nothing is run that was not built. The last line is the sum
//! over steps and tests: `N passed, N failed`, with `, N skipped` if tests were left out.

use crate::campaigns::{CAMPAIGNS, command};
use crate::run::{self, Runner, Tally};
use crate::{changelog, install, layers, licences, windows, workspace};
use std::process::Command;
use std::time::{Duration, Instant};

/// A build from nothing takes 6 minutes on two slow cores; a step that takes much longer hangs.
const LIMIT_BUILD: Duration = Duration::from_secs(20 * 60);
/// Single tests are ended by the runner after 5 minutes (.config/nextest.toml), all together after this.
const LIMIT_TESTS: Duration = Duration::from_secs(20 * 60);
/// The demo promises two minutes.
const LIMIT_DEMO: Duration = Duration::from_secs(4 * 60);

/// Seeds of the tests that draw.
const SEEDS: [(&str, &str); 2] = [("PROPTEST_RNG_SEED", "20261122"), ("FUZZ_SEED", "20261122")];

#[derive(Default)]
struct Suite {
    steps: Vec<(String, Duration, Result<Tally, String>)>,
}

impl Suite {
    /// Runs one step and prints how long it took; true if it passed.
    fn step(&mut self, name: &str, work: impl FnOnce() -> Result<Tally, String>) -> bool {
        println!("\n== {name}");
        let started = Instant::now();
        let result = work();
        let took = started.elapsed();
        let verdict = if result.is_ok() { "passed" } else { "FAILED" };
        println!("== {name}: {verdict} in {:.1} s", took.as_secs_f64());
        if let Err(reason) = &result {
            println!("   {reason}");
        }
        let passed = result.is_ok();
        self.steps.push((name.to_owned(), took, result));
        passed
    }

    /// A step that is either right or wrong and counts as one.
    fn check(&mut self, name: &str, work: impl FnOnce() -> Result<(), String>) -> bool {
        self.step(name, || work().map(|()| Tally { passed: 1, ..Tally::default() }))
    }

    /// A test runner: its tests count, and a run without a single test is a failure.
    fn tests(&mut self, name: &str, runner: Runner, command: Command) -> bool {
        let mut sum = Tally::default();
        let passed = self.step(name, || {
            let (tally, success) = run::counted(runner, &mut run::with_deadline(command, LIMIT_TESTS))?;
            sum = tally;
            match (success, tally) {
                (true, Tally { passed: 0, .. }) => Err("no test ran".to_owned()),
                (true, Tally { failed: 0, .. }) => Ok(tally),
                _ => Err(format!("the test runner reports: {tally}")),
            }
        });
        if let Some((_, _, result @ Err(_))) = self.steps.last_mut()
            && sum.failed > 0
        {
            // The step failed because of tests that are counted one by one, so it is not counted again itself.
            *result = Ok(sum);
        }
        passed
    }

    fn summary(&self) -> Tally {
        let mut sum = Tally::default();
        println!("\n== times");
        for (name, took, result) in &self.steps {
            let tally = result.as_ref().copied().unwrap_or(Tally { failed: 1, ..Tally::default() });
            println!("{:7.1} s  {name}: {tally}", took.as_secs_f64());
            sum.add(tally);
        }
        sum
    }
}

/// Runs everything and says whether all of it passed; `quick` leaves out documentation tests, Windows, campaigns and
/// the demo.
pub fn run(quick: bool) -> bool {
    let mut suite = Suite::default();
    suite.check("install", || install::run(install::Group::Test));
    suite.check("format", || run::run(run::cargo().args(["fmt", "--all", "--check"])));
    suite.check("layers", layers::run);
    suite.check("licences", licences::run);
    suite.check("changelog", || changelog::run(true));
    suite.check("lints", || {
        let mut command = run::cargo();
        command.args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]);
        run::run(&mut run::with_deadline(command, LIMIT_BUILD))
    });
    // The shape of the command is that of the tests below, so that nothing is built twice.
    let built = suite.check("build", || {
        let mut command = run::cargo();
        command.args(["test", "--locked", "--workspace", "--no-run"]);
        run::run(&mut run::with_deadline(command, LIMIT_BUILD))
    });
    if built {
        // nextest where it is at hand: it ends hanging tests one by one. cargo's own runner otherwise, because building
        // nextest would take longer than all the tests.
        let mut command = run::cargo();
        let runner = if run::on_path("cargo-nextest") { Runner::Nextest } else { Runner::Cargo };
        command.args(match runner {
            Runner::Nextest => ["nextest", "run"].as_slice(),
            Runner::Cargo => &["test", "--lib", "--bins", "--tests"],
        });
        command.args(["--locked", "--workspace", "--no-fail-fast"]);
        // The gate repeats itself: what it finds, the next run finds again. Other seeds are for campaigns, and what they
        // find is kept beside the test. Whoever sets a seed gets that one.
        for (name, seed) in SEEDS {
            if std::env::var_os(name).is_none() {
                command.env(name, seed);
            }
        }
        suite.tests("tests", runner, command);
    }
    if built && !quick {
        suite.check("documentation", || {
            let mut command = run::cargo();
            command.args(["test", "--locked", "--workspace", "--doc"]);
            run::run(&mut run::with_deadline(command, LIMIT_TESTS))
        });
        for campaign in CAMPAIGNS {
            let Some(words) = campaign.slice else { continue };
            suite.step(&format!("campaign {}", campaign.name), || {
                if let Some(file) = campaign.missing() {
                    println!("SKIPPED: no {file} on this machine");
                    return Ok(Tally { skipped: 1, ..Tally::default() });
                }
                run::run(&mut run::with_deadline(command(words, 0, 0), campaign.limit))?;
                Ok(Tally { passed: 1, ..Tally::default() })
            });
        }
        suite.check("demo", demo);
    }
    if !quick {
        suite.check("windows", || windows::check(&windows::install(false)?));
    }
    let sum = suite.summary();
    println!("\n{sum}");
    sum.failed == 0
}

/// The demo from the development build, which is there already.
fn demo() -> Result<(), String> {
    // With the tests, so that features are resolved as for them and nothing is built twice.
    run::run(run::cargo().args(["build", "--locked", "--workspace", "--tests", "--bins"]))?;
    let program = workspace::read()?.target.join("debug").join("stillpoint");
    // A program that ignores what it does not know would pass for a demo.
    if !run::output(Command::new(&program).arg("--help"))?.contains("demo") {
        return Err(format!("{} --help does not list `demo`", program.display()));
    }
    let mut command = Command::new(program);
    command.arg("demo");
    run::run(&mut run::with_deadline(command, LIMIT_DEMO))
}

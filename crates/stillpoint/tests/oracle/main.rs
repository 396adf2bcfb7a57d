//! The oracle: `testbed/pool-reader.py`, written from the format page in another language, restores what the program
//! stored (INV-1, 7, 8; S25, S70). Where the two disagree, the page, the program or the reader is wrong.
//!
//! The reader needs two Python modules. Where they are missing these tests count as ignored, for both test runners, and
//! say so; that is why this program has a `main` of its own.
#![allow(clippy::unwrap_used)]

#[path = "../program/mod.rs"]
mod program;

mod golden;
mod machine;
mod python;

use std::panic::catch_unwind;
use std::process::ExitCode;

const TESTS: &[(&str, fn())] = &[
    ("the_reader_knows_blake3", python::the_reader_knows_blake3),
    ("every_golden_pool_is_restored", golden::every_golden_pool_is_restored),
    ("a_pool_of_the_program_is_restored", machine::a_pool_of_the_program_is_restored),
    ("damage_is_told_and_never_believed", machine::damage_is_told_and_never_believed),
];

/// What libtest's `main` does, as far as the two runners use it: `--list`, `--ignored`, `--exact`, names.
fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| words.iter().any(|word| word == flag);
    let missing = python::missing();
    if has("--list") {
        // nextest asks twice: for all tests, and for those that are ignored.
        let listed = if has("--ignored") && missing.is_none() { &[] } else { TESTS };
        for (name, _) in listed {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let names: Vec<&String> = words.iter().filter(|word| !word.starts_with("--")).collect();
    let chosen = |name: &str| {
        names.is_empty()
            || names
                .iter()
                .any(|given| if has("--exact") { *given == name } else { name.contains(given.as_str()) })
    };
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for (name, test) in TESTS.iter().filter(|(name, _)| chosen(name)) {
        if let Some(why) = &missing {
            eprintln!("NOT TESTED, {name}: {why}");
            println!("test {name} ... ignored");
            ignored += 1;
            continue;
        }
        let is_right = catch_unwind(test).is_ok();
        println!("test {name} ... {}", if is_right { "ok" } else { "FAILED" });
        if is_right { passed += 1 } else { failed += 1 }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

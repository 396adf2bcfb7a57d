//! Do the tests notice the bugs that other backup programs had? All are planted in a copy of the tree, and switched on one
//! at a time; then tests must fail.
//!
//! The bugs stand in `testbed/mutations.toml`: what happened elsewhere, what it breaks here, a piece of source text and
//! what is put in its place, and the tests that must fail. The text must occur exactly as often as it says, so a
//! mutation that no longer fits the source is an error and not a test that was left out; this program's tests check that.
//!
//! ```text
//! copy of the tree, everything planted -> build -> tests pass with nothing switched on?
//!     -> for each: switch it on -> tests fail? caught : SURVIVED
//! ```
//!
//! A condition on the environment switches a bug on, so that one build serves them all. The copy lies in the target folder,
//! is written only where it differs and has a build folder of its own.

use crate::run;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const LIST: &str = "testbed/mutations.toml";
/// Names the bug that is switched on.
const SWITCH: &str = "STILLPOINT_PLANTED";
/// A test that takes longer hangs, which is noticed too: the runner of the suite ends it.
const LIMIT: Duration = Duration::from_secs(300);
const LIMIT_BUILD: Duration = Duration::from_secs(20 * 60);

#[derive(Debug, Deserialize)]
struct List {
    mutation: Vec<Mutation>,
}

/// One planted bug.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutation {
    number: u32,
    name: String,
    /// What happened elsewhere, with program and issue.
    history: String,
    /// The invariants that it breaks here.
    breaks: String,
    file: PathBuf,
    find: String,
    put: String,
    /// How often `find` occurs.
    #[serde(default = "once")]
    times: usize,
    /// `PACKAGE TARGET FILTER`; the target is `lib` or the name of a test program.
    tests: Vec<String>,
}

fn once() -> usize {
    1
}

impl Mutation {
    /// The source of its file with the bug in it, switched off.
    fn plant(&self, source: &str) -> Result<String, String> {
        let found = source.matches(&self.find).count();
        if found != self.times {
            return Err(format!(
                "mutation {:02} {}: {} has its text {found} times, expected {}; aim it again in {LIST}",
                self.number,
                self.name,
                self.file.display(),
                self.times
            ));
        }
        let condition = format!("(std::env::var(\"{SWITCH}\").is_ok_and(|it| it == \"{}\"))", self.number);
        Ok(source.replace(&self.find, &self.put.replace("PLANTED", &condition)))
    }
}

fn read(root: &Path) -> Result<Vec<Mutation>, String> {
    let text = fs::read_to_string(root.join(LIST)).map_err(|e| format!("{LIST}: {e}"))?;
    let list: List = toml::from_str(&text).map_err(|e| format!("{LIST}: {e}"))?;
    let numbers: BTreeSet<u32> = list.mutation.iter().map(|mutation| mutation.number).collect();
    if numbers.len() != list.mutation.len() {
        return Err(format!("{LIST}: a number stands twice"));
    }
    if let Some(vague) = list.mutation.iter().find(|it| it.history.is_empty() || it.breaks.is_empty()) {
        return Err(format!(
            "{LIST}: mutation {:02} does not say what happened or what it breaks",
            vague.number
        ));
    }
    Ok(list.mutation)
}

fn root() -> PathBuf {
    // Asked for when it runs: a build folder may outlive the clone that it was built in.
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from("."), |xtask| Path::new(&xtask).join(".."))
}

/// The files that mutations change, with all of them planted.
fn planted(root: &Path, mutations: &[Mutation]) -> Result<BTreeMap<PathBuf, String>, String> {
    let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut wrong = Vec::new();
    for mutation in mutations {
        let path = root.join(&mutation.file);
        let source = match files.get(&mutation.file) {
            Some(source) => source.clone(),
            None => fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?,
        };
        match mutation.plant(&source) {
            Ok(source) => drop(files.insert(mutation.file.clone(), source)),
            Err(why) => wrong.push(why),
        }
    }
    if wrong.is_empty() { Ok(files) } else { Err(wrong.join("\n")) }
}

/// Plants the mutations, or those with these numbers, and switches them on one by one; an error if no test notices one.
pub fn run(only: &[u32]) -> Result<(), String> {
    let mut mutations = read(&root())?;
    mutations.retain(|mutation| only.is_empty() || only.contains(&mutation.number));
    if mutations.is_empty() {
        return Err(format!("{LIST} has no mutation with these numbers"));
    }
    let place = crate::workspace::read()?.target.join("mutations");
    copy(&root(), &place.join("tree"), &planted(&root(), &mutations)?)?;
    let tests: BTreeSet<&str> =
        mutations.iter().flat_map(|mutation| &mutation.tests).map(String::as_str).collect();
    for test in &tests {
        build(&place, test)?;
    }
    println!("{} mutations are planted; {} sets of tests without any of them", mutations.len(), tests.len());
    for test in &tests {
        if let Outcome::Noticed(by) = try_test(&place, test, None)? {
            return Err(format!("`{test}` fails without any mutation: {by}"));
        }
    }
    let mut survived = Vec::new();
    for mutation in &mutations {
        let started = Instant::now();
        let verdict = match notice(&place, mutation)? {
            Some(by) => format!("caught by {by}"),
            None => {
                survived.push(format!("{:02} {}", mutation.number, mutation.name));
                "SURVIVED".to_owned()
            }
        };
        let took = started.elapsed().as_secs_f64();
        println!("{:02} {}: {verdict} ({}; {took:.1} s)", mutation.number, mutation.name, mutation.breaks);
    }
    println!("{} mutations, {} survived", mutations.len(), survived.len());
    if survived.is_empty() {
        return Ok(());
    }
    Err(format!("no test noticed: {}", survived.join(", ")))
}

/// The first tests that notice a mutation.
fn notice(place: &Path, mutation: &Mutation) -> Result<Option<String>, String> {
    for test in &mutation.tests {
        if let Outcome::Noticed(by) = try_test(place, test, Some(mutation.number))? {
            return Ok(Some(by));
        }
    }
    Ok(None)
}

enum Outcome {
    Passed,
    /// By which tests.
    Noticed(String),
}

fn cargo(place: &Path, test: &str, more: &[&str]) -> Result<Command, String> {
    let mut words = test.split(' ');
    let (Some(package), Some(target)) = (words.next(), words.next()) else {
        return Err(format!("{LIST}: `{test}` is no `PACKAGE TARGET FILTER`"));
    };
    let mut command = run::cargo();
    command.current_dir(place.join("tree")).args(["test", "--quiet", "--locked", "-p", package]);
    match target {
        "lib" => command.arg("--lib"),
        other => command.args(["--test", other]),
    };
    command.args(more);
    if !more.contains(&"--no-run") {
        command.args(words);
    }
    // One seed, as in the suite, so that what is caught is caught again.
    command.envs([("PROPTEST_RNG_SEED", "20261122"), ("FUZZ_SEED", "20261122"), ("CARGO_INCREMENTAL", "1")]);
    command.env("CARGO_TARGET_DIR", place.join("target"));
    Ok(command)
}

/// Builds a test program, with everything planted.
fn build(place: &Path, test: &str) -> Result<(), String> {
    let command = cargo(place, test, &["--no-run"])?;
    let output = run::with_deadline(command, LIMIT_BUILD)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot start cargo: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("`{test}` does not build:\n{}", String::from_utf8_lossy(&output.stderr)))
}

fn try_test(place: &Path, test: &str, planted: Option<u32>) -> Result<Outcome, String> {
    let started = Instant::now();
    let mut command = cargo(place, test, &[])?;
    match planted {
        Some(number) => command.env(SWITCH, number.to_string()),
        None => command.env_remove(SWITCH),
    };
    let mut command = run::with_deadline(command, LIMIT);
    let output = command.stdin(Stdio::null()).output().map_err(|e| format!("cannot start cargo: {e}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        let ran = said
            .lines()
            .filter_map(|line| line.strip_prefix("test result: ok. "))
            .any(|rest| !rest.starts_with("0 passed"));
        return if ran { Ok(Outcome::Passed) } else { Err(format!("`{test}` runs no test")) };
    }
    if started.elapsed() >= LIMIT {
        return Ok(Outcome::Noticed(format!("{test}, which hangs")));
    }
    let failed: BTreeSet<&str> =
        said.lines().filter_map(|line| line.strip_prefix("---- ")?.strip_suffix(" stdout ----")).collect();
    if failed.is_empty() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`{test}` ended with {} and names no test:\n{said}{errors}", output.status));
    }
    Ok(Outcome::Noticed(failed.into_iter().collect::<Vec<_>>().join(", ")))
}

/// Copies what git knows of, with other contents for the files in `changed`, and nothing that is the same already, so that
/// the next build finds most of it built.
fn copy(from: &Path, to: &Path, changed: &BTreeMap<PathBuf, String>) -> Result<(), String> {
    let mut command = Command::new("git");
    command.current_dir(from).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    let listed = run::output(&mut command)?;
    let mut kept = BTreeSet::new();
    for name in listed.lines() {
        let bytes = match changed.get(Path::new(name)) {
            Some(source) => source.clone().into_bytes(),
            None => match fs::read(from.join(name)) {
                Ok(bytes) => bytes,
                // git still lists a file that was deleted.
                Err(_) => continue,
            },
        };
        let path = to.join(name);
        if fs::read(&path).ok().as_ref() != Some(&bytes) {
            write(&path, &bytes)?;
        }
        kept.insert(path);
    }
    forget_others(to, &kept)
}

/// Removes files of an earlier copy that are gone from the tree: cargo would build what lies in `tests/`.
fn forget_others(folder: &Path, kept: &BTreeSet<PathBuf>) -> Result<(), String> {
    let listed = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for path in listed.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            forget_others(&path, kept)?;
        } else if !kept.contains(&path) {
            fs::remove_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let failed = |e| format!("{}: {e}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    fs::write(path, bytes).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutation_fits_the_source_and_says_what_it_is() {
        let mutations = read(&root()).unwrap_or_else(|wrong| panic!("{wrong}"));
        assert!(mutations.len() >= 30, "{}", mutations.len());
        planted(&root(), &mutations).unwrap_or_else(|wrong| panic!("{wrong}"));
        for mutation in mutations {
            let number = mutation.number;
            assert!(mutation.put.contains("PLANTED"), "{number}");
            assert!(!mutation.tests.is_empty(), "{number}");
            for test in &mutation.tests {
                assert!(cargo(Path::new("."), test, &[]).is_ok(), "{number}: {test}");
            }
        }
    }

    /// The page of results tells of each mutation.
    #[test]
    fn the_page_lists_every_mutation() {
        let page = fs::read_to_string(root().join("docs/mutations.md")).unwrap_or_default();
        for mutation in read(&root()).unwrap_or_default() {
            let row = format!("| {:02} | {} |", mutation.number, mutation.name);
            assert!(page.contains(&row), "docs/mutations.md has no row `{row}`");
        }
    }
}

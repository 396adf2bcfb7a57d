//! Starting other programs: echoing their output, counting tests in it, and ending them when they hang.

use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// What ran, over steps and tests together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Steps and tests that did what they should.
    pub passed: u64,
    /// Steps and tests that did not.
    pub failed: u64,
    /// Tests that were left out (ignored).
    pub skipped: u64,
}

impl Tally {
    /// Adds another tally to this one.
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 { write!(f, ", {} skipped", self.skipped) } else { Ok(()) }
    }
}

/// `cargo` of the toolchain that runs this program, in the root of the workspace: chores work from whatever folder they
/// are called.
pub fn cargo() -> Command {
    cargo_at(Path::new(&std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())))
}

/// Another cargo, in the same folder.
pub fn cargo_at(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some(xtask) = std::env::var_os("CARGO_MANIFEST_DIR") {
        command.current_dir(Path::new(&xtask).join(".."));
    }
    command
}

/// Another program, in the same folder.
pub fn in_root(program: &str) -> Command {
    cargo_at(Path::new(program))
}

/// Whether `program` is on the path.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn told(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs a command to its end with our own output, input closed.
pub fn run(command: &mut Command) -> Result<(), String> {
    let status =
        command.stdin(Stdio::null()).status().map_err(|e| format!("cannot start {}: {e}", told(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", told(command))) }
}

/// Runs a command and returns what it wrote to stdout; its stderr is ours.
pub fn output(command: &mut Command) -> Result<String, String> {
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cannot start {}: {e}", told(command)))?;
    if !out.status.success() {
        return Err(format!("{} ended with {}", told(command), out.status));
    }
    String::from_utf8(out.stdout)
        .map_err(|e| format!("{} wrote something that is not UTF-8: {e}", told(command)))
}

/// Puts `timeout` of coreutils before a command, so that a hanging step ends with its whole process group and the
/// summary is still printed. Not at a terminal: there Ctrl-C must reach the children, and the person decides.
pub fn with_deadline(command: Command, limit: Duration) -> Command {
    if std::io::stdout().is_terminal() || !on_path("timeout") {
        return command;
    }
    let mut wrapped = Command::new("timeout");
    wrapped.arg("--kill-after=10").arg(limit.as_secs().to_string());
    wrapped.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(key, value),
            None => wrapped.env_remove(key),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        wrapped.current_dir(dir);
    }
    wrapped
}

/// A test runner, by the closing lines that it prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runner {
    /// `cargo test`: one line for each test program.
    Cargo,
    /// `cargo nextest`: one line in all. It repeats the output of failed tests, closing lines of theirs included.
    Nextest,
}

/// Runs a test runner, echoes it line by line and sums up the closing lines in it.
pub fn counted(runner: Runner, command: &mut Command) -> Result<(Tally, bool), String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start {}: {e}", told(command)))?;
    let (send, lines) = mpsc::channel();
    for stream in [child.stdout.take().map(boxed), child.stderr.take().map(boxed)].into_iter().flatten() {
        let send = send.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(n) if n > 0) {
                if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
    }
    drop(send);
    let mut tally = Tally::default();
    for line in lines {
        print!("{line}");
        // Echoing is best effort: a closed pipe must not turn a passing run into a failed one.
        let _ = std::io::stdout().flush();
        if let Some(found) = closing_line(runner, &line) {
            tally.add(found);
        }
    }
    let status = child.wait().map_err(|e| format!("cannot wait for {}: {e}", told(command)))?;
    Ok((tally, status.success()))
}

fn boxed(stream: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(stream)
}

/// Reads one closing line of libtest (`test result: ok. 3 passed; 0 failed; 1 ignored; ..`) or of nextest
/// (`Summary [   1.2s] 9 tests run: 8 passed (1 slow), 1 failed, 2 skipped`).
fn closing_line(runner: Runner, line: &str) -> Option<Tally> {
    let rest = match runner {
        Runner::Cargo => line.strip_prefix("test result:")?,
        Runner::Nextest => line.trim_start().strip_prefix("Summary [")?.split_once("run:")?.1,
    };
    let mut tally = Tally::default();
    for part in rest.split([',', ';', '.']) {
        let mut words = part.split_whitespace();
        if let (Some(count), Some(what)) = (words.next(), words.next()) {
            let Ok(count) = count.parse::<u64>() else { continue };
            match what {
                "passed" => tally.passed += count,
                "failed" | "exec" | "timed" => tally.failed += count,
                "ignored" | "skipped" => tally.skipped += count,
                _ => {}
            }
        }
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_closing_lines_of_both_runners() {
        let libtest = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s";
        assert_eq!(closing_line(Runner::Cargo, libtest), Some(Tally { passed: 3, failed: 2, skipped: 1 }));
        assert_eq!(closing_line(Runner::Nextest, libtest), None);
        let nextest = "     Summary [   1.234s] 12 tests run: 9 passed (1 slow, 2 flaky), 2 failed, 1 timed out, 5 skipped";
        assert_eq!(closing_line(Runner::Nextest, nextest), Some(Tally { passed: 9, failed: 3, skipped: 5 }));
        assert_eq!(closing_line(Runner::Nextest, "9 passed, 1 failed"), None);
    }

    #[test]
    fn the_summary_names_skipped_only_when_there_are_any() {
        assert_eq!(Tally { passed: 2, failed: 0, skipped: 0 }.to_string(), "2 passed, 0 failed");
        assert_eq!(Tally { passed: 2, failed: 1, skipped: 3 }.to_string(), "2 passed, 1 failed, 3 skipped");
    }
}

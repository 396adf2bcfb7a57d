//! The built program driven as a person drives it: words in, JSON lines, messages and an exit status out.
#![allow(dead_code, reason = "each test program needs its own part of it")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// What one command gave.
#[derive(Debug)]
pub struct Ran {
    /// The words, for messages.
    pub words: String,
    /// The exit status; -1 if a signal ended it.
    pub status: i32,
    /// Lines of stdout.
    pub lines: Vec<Value>,
    /// All of stderr.
    pub said: String,
}

impl Ran {
    /// Fails unless it ended with `status`.
    #[track_caller]
    pub fn expect(self, status: i32) -> Ran {
        assert_eq!(
            self.status, status,
            "`{}` ended with {}\nstdout: {:#?}\nstderr: {}",
            self.words, self.status, self.lines, self.said
        );
        self
    }

    /// The job's last line.
    #[track_caller]
    pub fn job(&self) -> &Value {
        self.last("job")
    }

    /// The error's last line.
    #[track_caller]
    pub fn error(&self) -> &Value {
        self.last("error")
    }

    #[track_caller]
    fn last(&self, kind: &str) -> &Value {
        let last =
            self.lines.last().unwrap_or_else(|| panic!("`{}` printed nothing: {}", self.words, self.said));
        assert_eq!(last["type"], kind, "`{}` ended with {last}\nstderr: {}", self.words, self.said);
        last
    }

    /// A whole number of the job's last line.
    #[track_caller]
    pub fn figure(&self, name: &str) -> u64 {
        let job = self.job();
        job[name].as_u64().unwrap_or_else(|| panic!("`{}`: no {name} in {job}", self.words))
    }

    /// Text of the job's last line.
    #[track_caller]
    pub fn text(&self, name: &str) -> &str {
        let job = self.job();
        job[name].as_str().unwrap_or_else(|| panic!("`{}`: no {name} in {job}", self.words))
    }

    /// Fails unless it ended with this status and this code, with a message and a hint that say something.
    #[track_caller]
    pub fn refused(&self, status: i32, code: &str) -> String {
        assert_eq!(self.status, status, "`{}`: {:#?}\nstderr: {}", self.words, self.lines, self.said);
        let error = self.error();
        assert_eq!(error["code"], code, "`{}`: {error}", self.words);
        let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        assert!(text("message").len() > 10, "`{}` has no clear message: {error}", self.words);
        assert!(text("hint").len() > 10, "`{}` has no hint: {error}", self.words);
        assert!(!self.said.contains("panicked"), "`{}`: {}", self.words, self.said);
        text("message")
    }
}

/// A data folder and the program on it.
#[derive(Debug, Clone)]
pub struct Pool {
    /// The data folder.
    pub data: PathBuf,
    /// The recovery kit, beside it.
    pub kit: PathBuf,
}

impl Pool {
    /// A data folder inside `folder`, not made yet.
    pub fn at(folder: &Path, name: &str) -> Pool {
        Pool { data: folder.join(name), kit: folder.join(format!("{name}-recovery-kit.txt")) }
    }

    /// Runs the program on it.
    pub fn run<W: AsRef<OsStr>>(&self, words: &[W]) -> Ran {
        let mut all: Vec<&OsStr> = vec!["--standalone".as_ref(), self.data.as_os_str()];
        all.extend(words.iter().map(AsRef::as_ref));
        run(&all)
    }

    /// Runs what must be done without a warning.
    #[track_caller]
    pub fn done<W: AsRef<OsStr>>(&self, words: &[W]) -> Ran {
        self.run(words).expect(0)
    }

    /// Recovers a disk without waiting for the target's storage.
    #[track_caller]
    pub fn recover(&self, machine: &str, point: &str, to: &Path) -> Ran {
        self.run(&words(
            &[
                "recover",
                "disk",
                machine,
                "--point",
                point,
                "--disk",
                "0",
                "--no-sync",
                "--overwrite",
                "--to",
            ],
            to,
        ))
    }

    /// The points of a machine, oldest first.
    #[track_caller]
    pub fn points(&self, machine: &str) -> Vec<Value> {
        self.done(&["recovery-point", "list", machine]).lines
    }

    /// Bytes of all files of the data folder.
    pub fn bytes(&self) -> u64 {
        files(&self.data).iter().map(|path| path.metadata().unwrap().len()).sum()
    }
}

/// Words with a path at the end.
pub fn words<'a>(words: &[&'a str], path: &'a Path) -> Vec<&'a OsStr> {
    words.iter().map(|word| OsStr::new(*word)).chain([path.as_os_str()]).collect()
}

fn command<W: AsRef<OsStr>>(words: &[W]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint"));
    for name in ["STANDALONE", "SERVER", "FINGERPRINT", "TOKEN", "TOKEN_FILE"] {
        command.env_remove(format!("STILLPOINT_{name}"));
    }
    command.arg("--json").args(words).stdin(Stdio::null());
    command
}

/// Runs the program.
pub fn run<W: AsRef<OsStr>>(words: &[W]) -> Ran {
    finish(command(words).output().unwrap(), words)
}

/// Starts the program and does not wait for it.
pub fn start<W: AsRef<OsStr>>(words: &[W]) -> Child {
    command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// What an ended program gave.
pub fn finish<W: AsRef<OsStr>>(output: std::process::Output, words: &[W]) -> Ran {
    let stdout = String::from_utf8(output.stdout).unwrap();
    Ran {
        words: words
            .iter()
            .map(|word| word.as_ref().to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" "),
        status: output.status.code().unwrap_or(-1),
        lines: stdout
            .lines()
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?} is not JSON: {error}"))
            })
            .collect(),
        said: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Every file below a folder, in order of name.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

/// Another program of the machine, which must succeed.
#[track_caller]
pub fn tool<W: AsRef<OsStr> + std::fmt::Debug>(name: &str, words: &[W]) -> String {
    let output = Command::new(name)
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}; `cargo xtask install` installs what tests need"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {words:?}: {said}");
    said
}

/// Numbers that look random and repeat with their seed (SplitMix64).
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next one.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// One below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Fills bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            let number = self.next().to_le_bytes();
            part.copy_from_slice(&number[..part.len()]);
        }
    }
}

/// A number of the environment, such as how many seeds a campaign takes.
pub fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name)
        .map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

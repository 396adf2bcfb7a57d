//! The real program as a child process: started, killed by its id, its last words read.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::network::Network;

/// No command of these tests takes a tenth of this; one that does hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program, its data folder and the folder in which it may put temporary files.
pub struct Program {
    /// A name of the program that nobody else uses, so that its processes can be told from all others, and that stays
    /// when the program is built again meanwhile.
    binary: PathBuf,
    /// The data folder.
    pub data: PathBuf,
    /// `TMPDIR` of all that is started.
    pub temporary: PathBuf,
    said: PathBuf,
    /// Server and agent, if they are processes of their own.
    pub network: Option<Network>,
}

/// A command that runs.
pub struct Running {
    child: Child,
    began: Instant,
    said: PathBuf,
    words: String,
}

/// A command that ended.
pub struct Ended {
    /// The command.
    pub words: String,
    /// Its exit status; `None` if it was killed.
    pub status: Option<i32>,
    /// Whole lines of its output.
    pub lines: Vec<Value>,
    /// What it said to a person.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Program {
    /// The program under test, working in `folder`.
    pub fn new(folder: &Path, has_network: bool) -> Program {
        let built = Path::new(env!("CARGO_BIN_EXE_stillpoint"));
        let binary = folder.join("stillpoint");
        fs::hard_link(built, &binary).or_else(|_| fs::copy(built, &binary).map(drop)).unwrap();
        let (temporary, said) = (folder.join("temporary"), folder.join("said"));
        fs::create_dir(&temporary).unwrap();
        fs::create_dir(&said).unwrap();
        let network = has_network.then(|| Network::new(binary.clone(), folder.to_owned()));
        Program { binary, data: folder.join("data"), temporary, said, network }
    }

    /// The recovery kit that was written with the data folder.
    pub fn kit(&self) -> PathBuf {
        let mut name = self.data.clone().into_os_string();
        name.push("-recovery-kit.txt");
        name.into()
    }

    /// Starts a command on the data folder.
    pub fn start(&self, words: &[String]) -> Running {
        let command = match &self.network {
            Some(network) => network.command(words),
            None => {
                let mut command = Command::new(&self.binary);
                command.arg("--json").arg("--standalone").arg(&self.data).args(words);
                command
            }
        };
        self.started(command, words)
    }

    /// Runs a command that needs no data folder to its end.
    pub fn run_alone(&self, words: &[String]) -> Ended {
        let mut command = Command::new(&self.binary);
        command.arg("--json").args(words);
        self.started(command, words).end()
    }

    fn started(&self, mut command: Command, words: &[String]) -> Running {
        // Into files, not pipes: what a killed process said stays, and nobody waits for an end of a pipe.
        let (out, err) = (self.said.join("out"), self.said.join("err"));
        let began = Instant::now();
        let child = command
            .env("TMPDIR", &self.temporary)
            .env_remove("STILLPOINT_SERVER")
            .stdin(Stdio::null())
            .stdout(File::create(out).unwrap())
            .stderr(File::create(err).unwrap())
            .spawn()
            .unwrap();
        Running { child, began, said: self.said.clone(), words: words.join(" ") }
    }

    /// Runs a command to its end.
    pub fn run(&self, words: &[String]) -> Ended {
        self.start(words).end()
    }

    /// Living processes of this program: id and command line.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // A process may end at any time between these looks.
            if fs::read_link(entry.path().join("exe")).is_ok_and(|path| path == self.binary) {
                let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                found.push((id, String::from_utf8_lossy(&words).replace('\0', " ")));
            }
        }
        found
    }

    /// Waits until nothing of the program lives that should not; what does is the answer.
    pub fn survivors(&self) -> Vec<(i32, String)> {
        let began = Instant::now();
        loop {
            let living = self.processes();
            // Server, its deletion service, agent.
            let rightly = if self.network.is_some() { 3 } else { 0 };
            if living.len() == rightly {
                return Vec::new();
            }
            if began.elapsed() > Duration::from_secs(10) {
                return living;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Kills it when it is so old, and takes its last words. It may have ended before.
    pub fn kill_at(mut self, age: Duration) -> Ended {
        std::thread::sleep(age.saturating_sub(self.began.elapsed()));
        self.child.kill().unwrap();
        self.end()
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if self.began.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                panic!("`{}` did not end within {PATIENCE:?}", self.words);
            }
            std::thread::sleep(Duration::from_micros(500));
        };
        let took = self.began.elapsed();
        let out = fs::read_to_string(self.said.join("out")).unwrap();
        // A line without its end was cut off by the kill: nobody could rely on it.
        let whole = out.rfind('\n').map_or("", |end| &out[..=end]);
        let lines = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let stderr = fs::read_to_string(self.said.join("err")).unwrap();
        Ended { words: self.words, status: status.code(), lines, stderr, took }
    }
}

impl Ended {
    /// The lines of a type.
    pub fn of_type<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.lines.iter().filter(move |line| line["type"] == kind)
    }

    /// The end of its job, if it was told and was good.
    pub fn succeeded(&self) -> Option<&Value> {
        self.of_type("job").find(|job| job["state"] == "succeeded")
    }

    /// A figure of the job that succeeded.
    pub fn figure(&self, name: &str) -> Option<&Value> {
        self.succeeded()?.get(name).filter(|value| !value.is_null())
    }

    /// The point that was acknowledged.
    pub fn point(&self) -> Option<&str> {
        // A recovery names the point that it recovered.
        self.figure("recovery_point").filter(|_| self.figure("target").is_none())?.as_str()
    }

    /// Everything it said, for messages.
    pub fn told(&self) -> String {
        let lines: Vec<String> = self.lines.iter().map(Value::to_string).collect();
        format!("`{}` ended with {:?}\n{}\n{}", self.words, self.status, lines.join("\n"), self.stderr)
    }
}

//! The real program, run as a server, as agents and as the command line, on this machine.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use environment::{Randomness, SeededRandomness};
use serde_json::Value;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_stillpoint");
pub const SOON: Duration = Duration::from_secs(60);

/// Waits until `look` sees something.
pub fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A process of the program and the JSON lines it has written.
pub struct Process {
    pub child: Child,
    pub lines: Arc<Mutex<Vec<Value>>>,
    name: String,
}

impl Process {
    /// Runs the program, in a network namespace if one is named.
    pub fn start(namespace: Option<&str>, arguments: &[&str]) -> Process {
        Process::start_after(&entering(namespace), arguments)
    }

    /// Runs the program with other words before it.
    pub fn start_after(before: &[String], arguments: &[&str]) -> Process {
        let mut command = after(before);
        clean(&mut command);
        let mut child = command.arg("--json").args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let lines: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (heard, stdout) = (Arc::clone(&lines), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line) {
                    heard.lock().unwrap().push(value);
                }
            }
        });
        Process { child, lines, name: arguments[..2].join(" ") }
    }

    /// The first line that `look` finds.
    pub fn line(&mut self, what: &str, look: impl Fn(&Value) -> bool) -> Value {
        let lines = Arc::clone(&self.lines);
        let name = self.name.clone();
        let find = || lines.lock().unwrap().iter().find(|line| look(line)).cloned();
        until(&format!("{name}: {what}"), SOON, || {
            if let Some(found) = find() {
                return Some(found);
            }
            if self.child.try_wait().unwrap().is_some() {
                // Its last words may still be on their way through the pipe.
                std::thread::sleep(Duration::from_secs(1));
                return Some(find().unwrap_or_else(|| {
                    let said = lines.lock().unwrap().clone();
                    panic!("{name} ended before {what}: {said:#?}")
                }));
            }
            None
        })
    }

    pub fn message(&mut self, text: &str) -> Value {
        self.line(text, |line| line["message"].as_str().is_some_and(|said| said.contains(text)))
    }

    /// As a power cut would, for the process alone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// As a system that shuts down would; gives the exit status.
    pub fn stop(&mut self) -> i32 {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        until(&format!("{} ends", self.name), SOON, || self.child.try_wait().unwrap()).code().unwrap_or(-1)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The words that enter a network namespace.
fn entering(namespace: Option<&str>) -> Vec<String> {
    namespace.map_or(Vec::new(), |name| ["ip", "netns", "exec", name].map(str::to_owned).to_vec())
}

/// The program, after other words.
fn after(before: &[String]) -> Command {
    let Some((first, rest)) = before.split_first() else { return Command::new(PROGRAM) };
    let mut command = Command::new(first);
    command.args(rest).arg(PROGRAM);
    command
}

fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("STILLPOINT_") {
            command.env_remove(name);
        }
    }
}

/// A server, and the words to work through it.
pub struct Server {
    pub process: Process,
    pub data: PathBuf,
    pub address: String,
    pub fingerprint: String,
    pub token: String,
    before: Vec<String>,
}

/// How a command ended.
pub struct Ended {
    pub status: i32,
    pub lines: Vec<Value>,
}

impl Ended {
    /// The one object of a type.
    pub fn get(&self, kind: &str) -> &Value {
        self.lines
            .iter()
            .rev()
            .find(|line| line["type"] == kind)
            .unwrap_or_else(|| panic!("no {kind}: {:#?}", self.lines))
    }

    pub fn code(&self) -> &str {
        self.get("error")["code"].as_str().unwrap_or_default()
    }

    pub fn good(self) -> Ended {
        assert_eq!(self.status, 0, "{:#?}", self.lines);
        self
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ended {
    clean(command);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    if !output.stderr.is_empty() {
        lines.push(Value::String(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ended { status: output.status.code().unwrap_or(-1), lines }
}

impl Server {
    pub fn start(data: &Path, more: &[&str]) -> Server {
        Server::start_in(None, data, "127.0.0.1:0", "", more)
    }

    /// `token` is that of an earlier start; a first start makes its own.
    pub fn start_in(
        namespace: Option<&str>,
        data: &Path,
        listen: &str,
        token: &str,
        more: &[&str],
    ) -> Server {
        Server::start_after(&entering(namespace), data, listen, token, more)
    }

    /// The same with any words before the program.
    pub fn start_after(before: &[String], data: &Path, listen: &str, token: &str, more: &[&str]) -> Server {
        let folder = data.display().to_string();
        let all = [&["server", "run", "--data", &folder, "--listen", listen][..], more].concat();
        let mut process = Process::start_after(before, &all);
        let hello = process.line("listening", |line| line["type"] == "listening");
        let text = |name: &str| hello[name].as_str().unwrap_or_default().to_owned();
        Server {
            process,
            data: data.to_owned(),
            address: text("listen"),
            fingerprint: text("fingerprint"),
            token: if hello["token"].is_string() { text("token") } else { token.to_owned() },
            before: before.to_vec(),
        }
    }

    /// The same server again, at the same address, after it was killed.
    pub fn again(&self) -> Server {
        Server::start_after(&self.before, &self.data, &self.address, &self.token, &[])
    }

    /// A command through this server.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.run_as(&self.fingerprint, &self.token, arguments)
    }

    pub fn run_as(&self, fingerprint: &str, token: &str, arguments: &[&str]) -> Ended {
        let mut command = after(&self.before);
        clean(&mut command);
        let token_file = self.data.with_extension("token");
        std::fs::write(&token_file, token).unwrap();
        command.args(["--json", "--server", &self.address, "--fingerprint", fingerprint]);
        // `clean` takes variables of the test's own surroundings away, not those set here.
        let output = command.args(arguments).env("STILLPOINT_TOKEN_FILE", &token_file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let mut lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        if !output.stderr.is_empty() {
            lines.push(Value::String(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        Ended { status: output.status.code().unwrap_or(-1), lines }
    }

    pub fn enrolment_token(&self, valid: &str) -> String {
        let made = self.run(&["host", "token", "--valid", valid]).good();
        let token = made.lines.iter().find_map(|line| line["token"].as_str());
        token.unwrap_or_else(|| panic!("{:#?}", made.lines)).to_owned()
    }

    pub fn host_state(&self, name: &str) -> String {
        let hosts = self.run(&["host", "list"]).good();
        let host = hosts.lines.iter().find(|line| line["name"] == name);
        host.map(|host| host["state"].as_str().unwrap().to_owned()).unwrap_or_default()
    }
}

/// An enrolled agent.
pub struct Agent {
    pub process: Process,
    pub state: PathBuf,
    before: Vec<String>,
}

pub fn enroll(namespace: Option<&str>, server: &str, token: &str, name: &str, state: &Path) -> Ended {
    enroll_after(&entering(namespace), server, token, name, state)
}

pub fn enroll_after(before: &[String], server: &str, token: &str, name: &str, state: &Path) -> Ended {
    let mut command = after(before);
    let state = state.display().to_string();
    run(command.args([
        "--json", "--server", server, "agent", "enroll", "--token", token, "--name", name, "--state", &state,
    ]))
}

impl Agent {
    pub fn enrolled(server: &Server, name: &str, state: &Path) -> Agent {
        enroll(None, &server.address, &server.enrolment_token("15m"), name, state).good();
        Agent::start(None, state)
    }

    pub fn start(namespace: Option<&str>, state: &Path) -> Agent {
        Agent::start_after(&entering(namespace), state)
    }

    pub fn start_after(before: &[String], state: &Path) -> Agent {
        let folder = state.display().to_string();
        let mut process = Process::start_after(before, &["agent", "run", "--state", &folder]);
        process.message("Connected to");
        Agent { process, state: state.to_owned(), before: before.to_vec() }
    }

    /// The same agent again, after it was killed.
    pub fn again(&self) -> Agent {
        Agent::start_after(&self.before, &self.state)
    }
}

/// A disk image whose content does not compress and follows from a seed.
pub fn image(path: &Path, bytes: u64, seed: u64) {
    let file = std::fs::File::create(path).unwrap();
    let random = SeededRandomness::new(seed);
    let mut part = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < bytes {
        random.fill(&mut part).unwrap();
        let count = (bytes - at).min(part.len() as u64) as usize;
        file.write_all_at(&part[..count], at).unwrap();
        at += count as u64;
    }
}

/// Overwrites some bytes.
pub fn change(path: &Path, at: u64, bytes: u64, seed: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let mut part = vec![0u8; bytes as usize];
    SeededRandomness::new(seed).fill(&mut part).unwrap();
    file.write_all_at(&part, at).unwrap();
}

pub fn same(a: &Path, b: &Path) -> bool {
    let hash = |path: &Path| {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(path).unwrap()).unwrap();
        hasher.finalize()
    };
    hash(a) == hash(b)
}

/// Files in a folder that are not the named ones.
pub fn strays(folder: &Path, known: &[&str]) -> Vec<String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !known.contains(&name.as_str()))
        .collect()
}

//! Server and agent as processes of their own, each killed and started again while the other stays.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What the agent's host is called.
pub const HOST: &str = "hv1";

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Server,
    Agent,
}

/// The two processes.
pub struct Network {
    binary: PathBuf,
    folder: PathBuf,
    address: String,
    fingerprint: String,
    token: String,
    server: Option<Child>,
    agent: Option<Child>,
}

impl Network {
    /// A server on a new data folder, and an agent enrolled with it.
    pub fn new(binary: PathBuf, folder: PathBuf) -> Network {
        // A port that is free now; the server must come back to it.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (fingerprint, token) = Default::default();
        let mut network = Network { binary, folder, address, fingerprint, token, server: None, agent: None };
        network.start_server();
        let mut asking = network.command(&[]);
        let made = asking.args(["host", "token"]).output().unwrap();
        let line: Value = serde_json::from_slice(&made.stdout).unwrap();
        let token = line["token"].as_str().unwrap().to_owned();
        let mut enrolling = network.plain();
        enrolling.args(["--server", &network.address, "agent", "enroll", "--token", &token, "--name", HOST]);
        let enrolled = enrolling.arg("--state").arg(network.folder.join("agent")).output().unwrap();
        assert!(enrolled.status.success(), "{enrolled:?}");
        network.start_agent();
        network.meet();
        network
    }

    fn plain(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--json").env("TMPDIR", self.folder.join("temporary"));
        command
    }

    /// A command through the server.
    pub fn command(&self, words: &[String]) -> Command {
        let mut command = self.plain();
        command.args(["--server", &self.address, "--fingerprint", &self.fingerprint]).args(words);
        command.env("STILLPOINT_TOKEN", &self.token);
        command
    }

    fn start_server(&mut self) {
        let said = self.folder.join("server-said");
        let mut command = self.plain();
        command.args([
            "server",
            "run",
            "--listen",
            &self.address,
            "--floor-points",
            "0",
            "--floor-age",
            "0s",
        ]);
        command.args(["--soft-delete", "0s", "--reclaim-hold", "0s", "--data"]).arg(self.folder.join("data"));
        // The server makes copies only where it is told that it may.
        let config = self.folder.join("server.toml");
        fs::write(&config, format!("copy_folders = [{:?}]\n", self.folder.display().to_string())).unwrap();
        command.arg("--config").arg(config);
        command
            .stdin(Stdio::null())
            .stdout(File::create(&said).unwrap())
            .stderr(File::create(&said).unwrap());
        let mut child = command.spawn().unwrap();
        let began = Instant::now();
        let hello = loop {
            let text = fs::read_to_string(&said).unwrap();
            let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            if let Some(hello) = lines.find(|line| line["type"] == "listening") {
                break hello;
            }
            let ended = child.try_wait().unwrap();
            assert!(
                ended.is_none() && began.elapsed() < Duration::from_secs(20),
                "no server: {ended:?} {text}"
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        self.fingerprint = hello["fingerprint"].as_str().unwrap().to_owned();
        if let Some(token) = hello["token"].as_str() {
            self.token = token.to_owned();
        }
        self.server = Some(child);
    }

    fn start_agent(&mut self) {
        let said = File::create(self.folder.join("agent-said")).unwrap();
        let mut command = self.plain();
        command.args(["agent", "run", "--state"]).arg(self.folder.join("agent"));
        command.stdin(Stdio::null()).stderr(said.try_clone().unwrap()).stdout(said);
        self.agent = Some(command.spawn().unwrap());
    }

    /// Kills one of the two.
    pub fn kill(&mut self, victim: Victim) {
        let child = match victim {
            Victim::Server => &mut self.server,
            Victim::Agent => &mut self.agent,
        };
        let mut child = child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it again, and waits until the two have met.
    pub fn restart(&mut self, victim: Victim) {
        match victim {
            Victim::Server => self.start_server(),
            Victim::Agent => self.start_agent(),
        }
        self.meet();
    }

    fn meet(&self) {
        let began = Instant::now();
        loop {
            let listed = self.command(&["host".to_owned(), "list".to_owned()]).output().unwrap();
            let text = String::from_utf8_lossy(&listed.stdout).into_owned();
            if text.contains("\"connected\"") {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "the agent does not come back: {text}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for child in [&mut self.agent, &mut self.server].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

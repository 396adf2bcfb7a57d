//! A long, not too wide line between agent and server: the rate it is used at, and what a cut costs.
//!
//! Server and agent run in two network namespaces that know no way to each other but a proxy of ours between them: 40 ms
//! there and back, 50 MB/s each way. Where namespaces cannot be made (no root), the same runs on the loopback interface.
//!
//! The tests take a slice: 5 s at the full rate, a cut of 3 s. `STILLPOINT_LINK_SECONDS=20 STILLPOINT_CUT_SECONDS=30`
//! is the whole campaign. A machine that is busy otherwise cannot hold the rate; the best of three counts.
#![allow(clippy::unwrap_used)]

#[path = "../network/bench.rs"]
mod bench;
mod proxy;

use bench::{Agent, SOON, Server, enroll, image, run, same, until};
use environment::{Randomness, SeededRandomness, SystemRandomness};
use proxy::Line;
use std::net::TcpListener;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RATE: u64 = 50_000_000;
const DELAY: Duration = Duration::from_millis(20);

fn seconds(name: &str, slice: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(slice)
}

/// Two namespaces, each joined to this one by a pair of interfaces; removed at the end.
struct Namespaces {
    names: [String; 2],
    net: u32,
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|output| output.status.success())
}

impl Namespaces {
    fn make() -> Option<Namespaces> {
        let id = std::process::id();
        let net = id % 16_000;
        let made = Namespaces { names: [format!("sp-server-{id}"), format!("sp-agent-{id}")], net };
        for (side, name) in made.names.iter().enumerate() {
            let (ours, theirs) = (format!("spo{side}x{net}"), format!("spi{side}x{net}"));
            let address = |end: u32| format!("{}/30", made.address(side as u32, end));
            let all = ip(&["netns", "add", name])
                && ip(&["link", "add", &ours, "type", "veth", "peer", "name", &theirs, "netns", name])
                && ip(&["addr", "add", &address(1), "dev", &ours])
                && ip(&["link", "set", &ours, "up"])
                && ip(&["-n", name, "addr", "add", &address(2), "dev", &theirs])
                && ip(&["-n", name, "link", "set", &theirs, "up"])
                && ip(&["-n", name, "link", "set", "lo", "up"]);
            if !all {
                return None;
            }
        }
        Some(made)
    }

    /// Of the pair of `side`: our end is 1, the namespace's 2.
    fn address(&self, side: u32, end: u32) -> String {
        let at = (self.net * 8 + side * 4 + end) & 0x1_FFFF;
        format!("10.{}.{}.{}", 202 + (at >> 16), (at >> 8) & 0xFF, at & 0xFF)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for (side, name) in self.names.iter().enumerate() {
            ip(&["link", "del", &format!("spo{side}x{}", self.net)]);
            ip(&["netns", "del", name]);
        }
    }
}

/// Server, line and enrolled agent.
struct Site {
    agent: Agent,
    server: Server,
    line: Line,
    _namespaces: Option<Namespaces>,
    room: tempfile::TempDir,
}

fn site() -> Site {
    let room = tempfile::tempdir().unwrap();
    let namespaces = Namespaces::make();
    println!(
        "{}",
        if namespaces.is_some() {
            "two network namespaces"
        } else {
            "loopback: namespaces cannot be made here"
        }
    );
    let own = |side, end| namespaces.as_ref().map_or("127.0.0.1".to_owned(), |made| made.address(side, end));
    let server_space = namespaces.as_ref().map(|made| made.names[0].as_str());
    let agent_space = namespaces.as_ref().map(|made| made.names[1].as_str());
    let listener = TcpListener::bind((own(1, 1), 0)).unwrap();
    // The one address under which agents find the server is the line's.
    let config = room.path().join("server.toml");
    std::fs::write(&config, format!("addresses = [\"{}\"]\n", listener.local_addr().unwrap())).unwrap();
    let config = config.display().to_string();
    let listen = format!("{}:0", own(0, 2));
    let server =
        Server::start_in(server_space, &room.path().join("data"), &listen, "", &["--config", &config]);
    let line = Line::start(listener, server.address.clone(), DELAY, RATE);
    let state = room.path().join("agent");
    if let Some(space) = agent_space {
        let port = server.address.rsplit_once(':').unwrap().1;
        let direct = run(Command::new("ip")
            .args(["netns", "exec", space, bench::PROGRAM, "--json", "--server"])
            .args([&server.address, "--fingerprint", &server.fingerprint, "status"]));
        assert_ne!(direct.status, 0, "there must be no way past the line to port {port}");
    }
    let token = server.enrolment_token("15m");
    enroll(agent_space, &line.address, &token, "far", &state).good();
    let agent = Agent::start(agent_space, &state);
    Site { agent, server, line, _namespaces: namespaces, room }
}

impl Site {
    /// Adds a machine with one disk that does not compress and begins to protect it; gives the job.
    fn protect(&self, name: &str, bytes: u64, seed: u64) -> String {
        let disk = self.room.path().join(format!("{name}.raw"));
        image(&disk, bytes, seed);
        self.server.run(&["datasource", "add-image", name, &format!("far:{}", disk.display())]).good();
        let started = self.server.run(&["protect", name, "--detach"]).good();
        started.get("job")["id"].as_str().unwrap().to_owned()
    }

    fn state(&self, job: &str) -> String {
        self.server.run(&["job", "show", job]).get("job")["state"].as_str().unwrap().to_owned()
    }

    fn end(mut self) {
        assert_eq!(self.agent.process.stop(), 0);
        assert_eq!(self.server.process.stop(), 0);
    }
}

/// One after the other: two would share processor and disk.
#[test]
fn a_long_line_is_filled_and_a_cut_costs_at_most_64_mib() {
    let site = site();
    fill(&site);
    cut(&site);
    cuts_anywhere(&site);
    site.end();
}

fn fill(site: &Site) {
    let window = Duration::from_secs(seconds("STILLPOINT_LINK_SECONDS", 5));
    let bytes = (window.as_secs() + 3) * RATE;
    let mut best = 0.0f64;
    for attempt in 0..3u64 {
        let name = format!("wide{attempt}");
        let before = site.line.up.load(Ordering::SeqCst);
        let job = site.protect(&name, bytes / MIB * MIB, 11 + attempt);
        let now = || site.line.up.load(Ordering::SeqCst);
        until("data flows", SOON, || (now() > before + RATE / 2).then_some(()));
        let (began, from) = (Instant::now(), now());
        std::thread::sleep(window);
        let rate = (now() - from) as f64 / began.elapsed().as_secs_f64();
        println!(
            "{:.1} MB/s of {} over {:.1} s",
            rate / 1e6,
            RATE / 1_000_000,
            began.elapsed().as_secs_f64()
        );
        best = best.max(rate);
        until("the job ends", SOON * 5, || (site.state(&job) != "running").then_some(()));
        assert_eq!(site.state(&job), "succeeded");
        if best >= 0.9 * RATE as f64 {
            return;
        }
    }
    panic!("at best {:.1} MB/s of {}", best / 1e6, RATE / 1_000_000);
}

fn cut(site: &Site) {
    let away = Duration::from_secs(seconds("STILLPOINT_CUT_SECONDS", 3));
    let mut seed = [0; 8];
    SystemRandomness.fill(&mut seed).unwrap();
    let seed = u64::from_le_bytes(seed);
    let bytes = 200 * MIB;
    let at = 4 * MIB + SeededRandomness::new(seed).below(bytes - 8 * MIB);
    println!("cut for {} s after {at} bytes (seed {seed})", away.as_secs());
    let before = site.line.up.load(Ordering::SeqCst);
    site.line.cut_after(at);
    let job = site.protect("cut", bytes, seed);
    until("the cut", SOON, || site.line.is_dead().then_some(()));
    std::thread::sleep(away);
    assert_eq!(site.state(&job), "running", "a job waits for its host");
    let mended = Instant::now();
    site.line.mend();
    until("the job ends", SOON * 5, || (site.state(&job) != "running").then_some(()));
    let shown = site.server.run(&["job", "show", &job]);
    assert_eq!(shown.get("job")["state"], "succeeded", "{:#?}", shown.lines);
    assert_eq!(shown.get("job")["bytes_transferred"], bytes, "each block counts once");
    let again = (site.line.up.load(Ordering::SeqCst) - before).saturating_sub(bytes);
    println!(
        "{:.1} MiB again and around the data; done {:.1} s after the cut",
        again as f64 / MIB as f64,
        mended.elapsed().as_secs_f64()
    );
    // Hashes, frames and TLS around the data are within the bound, too.
    assert!(again <= 64 * MIB, "{again} bytes were sent again");

    let target = site.room.path().join("out.raw");
    let to = format!("far:{}", target.display());
    site.server.run(&["recover", "disk", "cut", "--point", "latest", "--disk", "0", "--to", &to]).good();
    assert!(same(&target, &site.room.path().join("cut.raw")));
}

/// Short cuts at any byte of a small transfer, its first words and its farewell included, both ways.
fn cuts_anywhere(site: &Site) {
    let rounds = seconds("STILLPOINT_CUT_ROUNDS", 10);
    let mut seed = [0; 8];
    SystemRandomness.fill(&mut seed).unwrap();
    let seed = u64::from_le_bytes(seed);
    println!("{rounds} cuts each way (seed {seed})");
    let random = SeededRandomness::new(seed);
    let bytes = 3 * MIB;
    for round in 0..rounds {
        let name = format!("any{round}");
        // One in three of the cuts falls into the last words, after the data.
        let at = if round % 3 == 0 { bytes + random.below(40_000) } else { random.below(bytes) };
        let disk = site.room.path().join(format!("{name}.raw"));
        image(&disk, bytes, seed ^ round);
        site.server.run(&["datasource", "add-image", &name, &format!("far:{}", disk.display())]).good();
        site.line.cut_after(at);
        let started = site.server.run(&["protect", &name, "--detach"]).good();
        let job = started.get("job")["id"].as_str().unwrap().to_owned();
        until("cut or end", SOON, || (site.line.is_dead() || site.state(&job) != "running").then_some(()));
        site.line.mend();
        until("the job ends", SOON, || (site.state(&job) != "running").then_some(()));
        assert_eq!(site.state(&job), "succeeded", "round {round}, cut at {at}");

        let target = site.room.path().join(format!("{name}.out"));
        let to = format!("far:{}", target.display());
        connected(site);
        let recover = ["recover", "disk", &name, "--point", "latest", "--disk", "0", "--to", &to, "--detach"];
        let started = site.server.run(&recover).good();
        let job = started.get("job")["id"].as_str().unwrap().to_owned();
        std::thread::sleep(Duration::from_millis(random.below(500)));
        // Every connection ends at this instant.
        site.line.mend();
        until("the job ends", SOON, || (site.state(&job) != "running").then_some(()));
        let shown = site.server.run(&["job", "show", &job]);
        assert_eq!(shown.get("job")["state"], "succeeded", "round {round}: {:#?}", shown.lines);
        assert!(same(&target, &disk), "round {round}");
        connected(site);
    }
}

fn connected(site: &Site) {
    until("the agent is back", SOON, || (site.server.host_state("far") == "connected").then_some(()));
}

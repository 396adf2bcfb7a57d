//! Machines that move between hosts, behind a server with an agent on each (S97-S101, S105-S109).

use std::path::Path;
use std::process::Child;
use std::time::Duration;

use serde_json::Value;

use crate::hosts::{Host, Hosts, until};
use crate::processes::{Agent, Ended, Server, enroll_after};

/// A server on the first of some hosts, and an agent on each.
pub struct Network {
    pub server: Server,
    pub agents: Vec<Agent>,
}

impl Network {
    pub fn start(hosts: &[&Host]) -> Network {
        let folder = hosts[0].shared().parent().unwrap().join("server");
        std::fs::create_dir_all(&folder).unwrap();
        let server = Server::start_after(&hosts[0].enter(), &folder.join("data"), "10.77.0.1:0", "", &[]);
        let agents = hosts.iter().map(|host| {
            let (before, name) = (host.enter(), host.name());
            let state = folder.join(name);
            enroll_after(&before, &server.address, &server.enrolment_token("15m"), name, &state).good();
            Agent::start_after(&before, &state)
        });
        let agents = agents.collect();
        Network { server, agents }
    }

    /// A job that must end well.
    #[track_caller]
    pub fn done(&self, words: &[&str]) -> Value {
        self.server.run(words).good().get("job").clone()
    }

    pub fn run(&self, words: &[&str]) -> Ended {
        self.server.run(words)
    }

    /// A point made with the machine standing still, which nothing differs from.
    #[track_caller]
    pub fn right(&self, host: &Host, guest: &str) -> String {
        host.virsh(&["suspend", guest]);
        let cause = self.done(&["synchronize", guest])["cause"].as_str().unwrap().to_owned();
        assert_eq!(self.done(&["check", guest])["bytes_changed"], 0, "{cause}");
        host.virsh(&["resume", guest]);
        cause
    }
}

fn migrate(from: &Host, to: &Host, guest: &str, more: &[&str]) {
    let uri = to.uri();
    from.virsh(&[&["migrate", "--live", "--unsafe", "--persistent", guest, &uri], more].concat());
}

/// A migration that takes its time.
fn migrate_slowly(from: &Host, to: &Host, guest: &str) -> Child {
    let uri = to.uri();
    let words = ["migrate", "--live", "--unsafe", "--persistent", guest, &uri, "--bandwidth", "1"];
    let child = from.virsh_begin(&words);
    until(Duration::from_secs(30), "it is on its way", || {
        from.virsh(&["domjobinfo", guest]).contains("Outgoing migration")
    });
    child
}

#[test]
fn machines_that_move_are_found_and_their_lists_go_on_where_they_can() {
    let hosts = Hosts::start(&["a", "b"]);
    let (a, b) = (hosts.host("a"), hosts.host("b"));
    std::fs::rename(a.disk("g1"), a.shared().join("g1.qcow2")).unwrap();
    // A path that means the same on both hosts.
    a.define("g1", Path::new("/srv/shared/g1.qcow2"), 64);
    a.boot("g1");
    let mut network = Network::start(&[&a, &b]);
    network.run(&["datasource", "add-machine", "g1", "--host", "a"]).good();
    let first = network.done(&["protect", "g1"]);
    assert_eq!(first["consistency"], "file");
    network.done(&["synchronize", "g1"]);

    // Storage stays: the list goes on, from checkpoints that the other host never heard of (S100, S101).
    migrate(&a, &b, "g1", &["--undefinesource"]);
    let moved = network.done(&["synchronize", "g1"]);
    let cause = moved["cause"].as_str().unwrap();
    assert!(cause.starts_with("changed extents because: QEMU's dirty blocks of disk vda"), "{cause}");
    assert!(cause.contains("moved from host a to host b"), "{cause}");
    let cause = network.right(&b, "g1");
    assert!(cause.starts_with("changed extents") && !cause.contains("moved"), "{cause}");
    network.done(&["synchronize", "g1"]);
    assert!(b.checkpoints("g1").len() <= 2, "{:?}", b.checkpoints("g1"));

    // And back and forth, with hosts that keep a definition of what has left them.
    migrate(&b, &a, "g1", &[]);
    let cause = network.right(&a, "g1");
    assert!(cause.starts_with("changed extents") && cause.contains("moved from host b to host a"), "{cause}");
    assert_eq!(b.virsh(&["domstate", "g1"]).trim(), "shut off");
    migrate(&a, &b, "g1", &[]);
    let cause = network.right(&b, "g1");
    assert!(cause.starts_with("changed extents") && cause.contains("moved from host a to host b"), "{cause}");

    // While it is on its way a job waits, and goes on where it arrives.
    let mut moving = migrate_slowly(&b, &a, "g1");
    let started = network.run(&["synchronize", "g1", "--detach"]).good();
    let id = |line: &Value| line["job"].as_str().or(line["id"].as_str()).map(str::to_owned);
    let job = started.lines.iter().find_map(id).unwrap_or_else(|| panic!("{:#?}", started.lines));
    until(Duration::from_secs(60), "the job waits for it", || {
        let log = network.run(&["job", "log", &job]).lines;
        log.iter().any(|line| line.to_string().contains("Waiting for its end"))
    });
    b.virsh(&["migrate-setspeed", "g1", "1000"]);
    assert!(moving.wait().unwrap().success());
    let ended = network.run(&["job", "watch", &job]).good();
    let cause = ended.get("job")["cause"].as_str().unwrap();
    assert!(cause.starts_with("changed extents") && cause.contains("moved from host b to host a"), "{cause}");
    network.right(&a, "g1");

    // A migration that was given up changes nothing.
    let mut moving = migrate_slowly(&a, &b, "g1");
    a.virsh(&["domjobabort", "g1"]);
    assert!(!moving.wait().unwrap().success());
    let cause = network.right(&a, "g1");
    assert!(cause.starts_with("changed extents") && !cause.contains("moved"), "{cause}");
    for host in [&a, &b] {
        assert_eq!(host.leftovers("g1"), Vec::<String>::new());
    }

    // Storage moves, too: one comparison of everything, then lists again (S108, S109).
    a.disk_of("g2", "qcow2", 256);
    a.define("g2", Path::new("/srv/local/g2.qcow2"), 64);
    a.boot("g2");
    network.run(&["datasource", "add-machine", "g2", "--host", "a"]).good();
    network.done(&["protect", "g2"]);
    network.done(&["synchronize", "g2"]);
    let target = b.images().join("g2.qcow2").display().to_string();
    crate::program::tool("qemu-img", &["create", "-q", "-f", "qcow2", &target, "256M"]);
    migrate(&a, &b, "g2", &["--copy-storage-all", "--undefinesource"]);
    let moved = network.done(&["synchronize", "g2"]);
    let cause = moved["cause"].as_str().unwrap();
    assert!(cause.starts_with("full compare because: disk vda is another file"), "{cause}");
    assert!(cause.contains("moved from host a to host b"), "{cause}");
    let cause = network.right(&b, "g2");
    assert!(cause.starts_with("changed extents"), "{cause}");

    // Recovered through the server to the other host, by its own paths.
    let to = [
        "recover",
        "vm",
        "g2",
        "--point",
        "latest",
        "--host",
        "a",
        "--path",
        "/srv/local",
        "--name",
        "g3",
        "--start",
    ];
    let _ = std::fs::remove_file(a.serial("g2"));
    assert_eq!(network.done(&to)["machine"], "g3");
    let check = a.is_up("g3", &a.serial("g2"));
    assert!(check.starts_with("ok "), "{check}");
    a.forget("g3");

    // The agent of the host that has it is not there (S106).
    network.agents[1].process.kill();
    let told = network.run(&["synchronize", "g2"]);
    assert_eq!((told.status, told.code()), (7, "SP-4003"), "{:#?}", told.lines);
    assert!(told.get("error")["message"].to_string().contains("agent"), "{:#?}", told.lines);
}

//! Server, agents and command line as separate processes over real sockets: the main job, and what may go wrong.
#![allow(clippy::unwrap_used)]

mod bench;

use bench::{Agent, Process, SOON, Server, change, enroll, image, same, strays, until};
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_machine_of_another_host_is_protected_changed_and_recovered_byte_for_byte() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    let mut server = Server::start(&path("data"), &[]);
    let mut agent = Agent::enrolled(&server, "hv1", &path("agent"));
    std::fs::create_dir(path("vm")).unwrap();
    let disk = path("vm").join("disk.raw");
    image(&disk, 24 * MIB, 1);

    server.run(&["datasource", "add-image", "vm1", &format!("hv1:{}", text(&disk))]).good();
    let protected = server.run(&["protect", "vm1"]).good();
    assert_eq!(protected.get("job")["bytes_transferred"], 24 * MIB);
    std::fs::copy(&disk, path("first.raw")).unwrap();

    change(&disk, 5 * MIB + 4096, 4096, 2);
    change(&disk, 20 * MIB, 128 << 10, 3);
    let list = path("list.json");
    std::fs::write(&list, format!("[[{},4096],[{},131072]]", 5 * MIB + 4096, 20 * MIB)).unwrap();
    let lists = format!("0={}", text(&list));
    let run = server.run(&["synchronize", "vm1", "--changed-extents", &lists]).good();
    assert_eq!(run.get("job")["bytes_transferred"], 3 * 65536);
    // The same again by full scan: nothing moves.
    let run = server.run(&["synchronize", "vm1", "--full-scan"]).good();
    assert_eq!(run.get("job")["bytes_transferred"], 0);

    let points = server.run(&["recovery-point", "list", "vm1"]).good();
    let first = points.lines.iter().find_map(|line| line["id"].as_str()).unwrap().to_owned();
    for (point, equal) in [("latest", &disk), (first.as_str(), &path("first.raw"))] {
        let target = path(&format!("{point}.out"));
        let to = format!("hv1:{}", text(&target));
        server.run(&["recover", "disk", "vm1", "--point", point, "--disk", "0", "--to", &to]).good();
        assert!(same(&target, equal), "{point}");
        // Nothing is written over a file that exists.
        let again = server.run(&["recover", "disk", "vm1", "--point", point, "--disk", "0", "--to", &to]);
        assert_eq!((again.status, again.code()), (5, "SP-1006"));
    }
    let image_file = path("out.vhdx");
    let to = format!("hv1:{}", text(&image_file));
    server.run(&["recover", "disk", "vm1", "--point", "latest", "--disk", "0", "--to", &to]).good();
    assert_eq!(strays(&path("vm"), &["disk.raw"]), Vec::<String>::new());

    // A source that is gone is the host's own word, with its code and the file's name.
    std::fs::rename(&disk, path("away.raw")).unwrap();
    let failed = server.run(&["synchronize", "vm1"]);
    assert_eq!(failed.status, 1, "{:?}", failed.lines);
    assert!(failed.lines.iter().any(|line| line.to_string().contains("SP-2001")), "{:#?}", failed.lines);

    assert_eq!(agent.process.stop(), 0);
    assert_eq!(server.process.stop(), 0);
}

#[test]
fn who_is_not_who_he_must_be_is_refused_with_a_code_and_a_way_out() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    let server = Server::start(&path("data"), &[]);
    let other = Server::start(&path("other"), &[]);

    // The command line: wrong fingerprint, wrong and missing token.
    let wrong = server.run_as(&other.fingerprint, &server.token, &["status"]);
    assert_eq!(wrong.code(), "SP-4002", "{:#?}", wrong.lines);
    for token in [other.token.as_str(), "x"] {
        let wrong = server.run_as(&server.fingerprint, token, &["host", "list"]);
        assert_eq!(wrong.get("error")["code"], "SP-4008", "{:#?}", wrong.lines);
    }

    // Enrolment: a token of another server, an expired one, a used one, a mistyped one.
    let state = path("agent");
    let foreign = enroll(None, &server.address, &other.enrolment_token("15m"), "hv1", &state);
    assert_ne!(foreign.status, 0);
    assert!(strays(&state, &[]).iter().all(|name| !name.starts_with("identity")), "nothing was enrolled");
    let short = server.enrolment_token("1s");
    std::thread::sleep(Duration::from_millis(1500));
    let expired = enroll(None, &server.address, &short, "hv1", &state);
    assert!(expired.get("error")["message"].as_str().unwrap().contains("expired"), "{:#?}", expired.lines);
    let token = server.enrolment_token("15m");
    let mistyped = format!("{}a", &token[..token.len() - 1]);
    if mistyped != token {
        assert_ne!(enroll(None, &server.address, &mistyped, "hv1", &state).status, 0);
    }
    enroll(None, &server.address, &token, "hv1", &state).good();
    let used = enroll(None, &server.address, &token, "hv2", &path("second"));
    assert!(used.get("error")["message"].as_str().unwrap().contains("used up"), "{:#?}", used.lines);
    let taken = enroll(None, &server.address, &server.enrolment_token("15m"), "HV1", &path("second"));
    assert_eq!(taken.get("error")["code"], "SP-1009", "{:#?}", taken.lines);

    // Revoked: the session ends within five seconds, and the agent is told why when it asks again.
    let mut agent = Agent::start(None, &state);
    assert_eq!(server.host_state("hv1"), "connected");
    let began = Instant::now();
    server.run(&["host", "revoke", "hv1", "--yes"]).good();
    agent.process.message("revoked");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(server.host_state("hv1"), "revoked");
    let refused = server.run(&["datasource", "add-image", "x", "hv1:/nowhere.raw"]);
    assert_eq!(refused.get("error")["code"], "SP-4005", "{:#?}", refused.lines);
    // A token brings the same host back.
    agent.process.kill();
    enroll(None, &server.address, &server.enrolment_token("15m"), "hv1", &state).good();
    let _agent = Agent::start(None, &state);
    assert_eq!(server.host_state("hv1"), "connected");

    // A second server on the same data folder leaves the first alone.
    let data = text(&path("data"));
    let mut second = Process::start(None, &["server", "run", "--data", &data, "--listen", "127.0.0.1:0"]);
    second.line("busy", |line| line["type"] == "error" && line["code"] == "SP-3002");
    server.run(&["status"]);
}

#[test]
fn an_agent_killed_in_the_middle_leaves_nothing_behind_and_the_next_run_is_right() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    let server = Server::start(&path("data"), &[]);
    let mut agent = Agent::enrolled(&server, "hv1", &path("agent"));
    std::fs::create_dir(path("vm")).unwrap();
    let disk = path("vm").join("disk.raw");
    image(&disk, 192 * MIB, 4);
    server.run(&["datasource", "add-image", "vm1", &format!("hv1:{}", text(&disk))]).good();
    let started = server.run(&["protect", "vm1", "--detach"]).good();
    let job = started
        .lines
        .iter()
        .find_map(|line| line["id"].as_str().or(line["job"].as_str()))
        .unwrap()
        .to_owned();
    until("the transfer is under way", SOON, || {
        let packs = walk(&path("data").join("pool/packs"));
        (packs > MIB).then_some(())
    });
    agent.process.kill();
    let mut agent = Agent::start(None, &path("agent"));
    let ended = until("the job ends", SOON, || {
        let shown = server.run(&["job", "show", &job]);
        let state = shown.get("job")["state"].as_str().unwrap().to_owned();
        (state != "running").then_some((state, shown))
    });
    assert_eq!(ended.0, "failed", "{:#?}", ended.1.lines);
    assert_eq!(strays(&path("vm"), &["disk.raw"]), Vec::<String>::new(), "the restart swept");
    assert!(
        server.run(&["recovery-point", "list", "vm1"]).good().lines.iter().all(|line| line["id"].is_null())
    );

    server.run(&["protect", "vm1"]).good();
    let target = path("out.raw");
    let to = format!("hv1:{}", text(&target));
    server.run(&["recover", "disk", "vm1", "--point", "latest", "--disk", "0", "--to", &to]).good();
    assert!(same(&target, &disk));

    // Cancel: the host lets go of the disk at once, so that the next run finds it free.
    let started = server.run(&["check", "vm1", "--detach"]).good();
    let job = started
        .lines
        .iter()
        .find_map(|line| line["id"].as_str().or(line["job"].as_str()))
        .unwrap()
        .to_owned();
    server.run(&["job", "cancel", &job]);
    until("the job ends", SOON, || {
        (server.run(&["job", "show", &job]).get("job")["state"] != "running").then_some(())
    });
    server.run(&["synchronize", "vm1"]).good();
    assert_eq!(strays(&path("vm"), &["disk.raw"]), Vec::<String>::new());
    agent.process.stop();
}

#[test]
fn a_server_killed_in_the_middle_takes_its_agents_back_and_lets_their_disks_go() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    let mut server = Server::start(&path("data"), &[]);
    let _agent = Agent::enrolled(&server, "hv1", &path("agent"));
    std::fs::create_dir(path("vm")).unwrap();
    let disk = path("vm").join("disk.raw");
    image(&disk, 192 * MIB, 6);
    server.run(&["datasource", "add-image", "vm1", &format!("hv1:{}", text(&disk))]).good();
    server.run(&["protect", "vm1", "--detach"]).good();
    until("the transfer is under way", SOON, || (walk(&path("data").join("pool/packs")) > MIB).then_some(()));
    server.process.kill();
    let (address, token) = (server.address.clone(), server.token.clone());
    let server = Server::start_in(None, &path("data"), &address, &token, &[]);
    until("the agent is back", SOON, || (server.host_state("hv1") == "connected").then_some(()));
    // The agent holds the disk until it has heard that the new server knows nothing of the job.
    until("the disk is free and protected", SOON, || {
        (server.run(&["protect", "vm1"]).status == 0).then_some(())
    });
    let target = path("out.raw");
    let to = format!("hv1:{}", text(&target));
    server.run(&["recover", "disk", "vm1", "--point", "latest", "--disk", "0", "--to", &to]).good();
    assert!(same(&target, &disk));
    assert_eq!(strays(&path("vm"), &["disk.raw"]), Vec::<String>::new());
    server.run(&["pool", "verify", "--read-data"]).good();
}

fn walk(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(known) if known.is_dir() => walk(&entry.path()),
            Ok(known) => known.len(),
            Err(_) => 0,
        })
        .sum()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_server_rebuilt_from_pool_and_kit_at_another_port_is_found_again_by_its_agents() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    // Two ports that are free now; the agents learn both.
    let ports: Vec<String> = [(); 2]
        .map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
        .iter()
        .map(|listener| listener.local_addr().unwrap().to_string())
        .collect();
    let config = path("server.toml");
    std::fs::write(&config, format!("addresses = [{:?}, {:?}]\nname = \"backup\"\n", ports[0], ports[1]))
        .unwrap();
    let config = text(&config);
    let mut server = Server::start_in(None, &path("data"), &ports[0], "", &["--config", &config]);
    let mut agent = Agent::enrolled(&server, "hv1", &path("agent"));
    let disk = path("disk.raw");
    image(&disk, 8 * MIB, 5);
    server.run(&["datasource", "add-image", "vm1", &format!("hv1:{}", text(&disk))]).good();
    server.run(&["protect", "vm1"]).good();

    // The same server at its other address.
    let token = server.token.clone();
    assert_eq!(server.process.stop(), 0);
    let mut server = Server::start_in(None, &path("data"), &ports[1], &token, &["--config", &config]);
    until("the agent is back", SOON, || (server.host_state("hv1") == "connected").then_some(()));
    server.run(&["synchronize", "vm1"]).good();
    assert_eq!(server.process.stop(), 0);
    agent.process.lines.lock().unwrap().clear();

    // The machine of the server is lost. What is left: a copy of the pool, and the kit.
    copy(&path("data").join("pool"), &path("new").join("pool"));
    let kit = text(&path("data-recovery-kit.txt"));
    std::fs::rename(path("data"), path("lost")).unwrap();
    let without =
        Process::start(None, &["server", "run", "--data", &text(&path("new")), "--listen", "127.0.0.1:0"])
            .line("no key", |line| line["type"] == "error");
    assert_eq!(without["code"], "SP-3007", "{without:#?}");
    let more = ["--config", config.as_str(), "--kit", kit.as_str()];
    let mut server = Server::start_in(None, &path("new"), &ports[0], &token, &more);
    until("the agent is back", SOON, || (server.host_state("hv1") == "connected").then_some(()));
    agent.process.message("Connected to backup");
    // The administrator's token of before serves, the datasource is known, its points are there.
    let run = server.run(&["synchronize", "vm1"]).good();
    assert_eq!(run.get("job")["bytes_transferred"], 0);
    let target = path("out.raw");
    let to = format!("hv1:{}", text(&target));
    server.run(&["recover", "disk", "vm1", "--point", "latest", "--disk", "0", "--to", &to]).good();
    assert!(same(&target, &disk));
    // Taken over once; the kit is not asked for again and a folder with a key refuses it.
    assert_eq!(server.process.stop(), 0);
    let twice = Process::start(
        None,
        &[&["server", "run", "--data", &text(&path("new")), "--listen", "127.0.0.1:0"][..], &more].concat(),
    )
    .line("refused", |line| line["type"] == "error");
    assert_eq!(twice["code"], "SP-1006", "{twice:#?}");
    Server::start_in(None, &path("new"), &ports[0], &token, &["--config", &config]);
}

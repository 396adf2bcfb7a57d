//! Recovery kits and key generations by the program itself: revoked, rotated, killed; and what it says of secrets.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../program/mod.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use program::{Numbers, Pool, files, run, start, words};

const DISK: usize = 4 << 20;

struct World {
    folder: tempfile::TempDir,
    pool: Pool,
    disk: Vec<u8>,
}

impl World {
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.raw");
        let mut disk = vec![0; DISK];
        Numbers(3).fill(&mut disk);
        std::fs::write(&image, &disk).unwrap();
        let pool = Pool::at(folder.path(), "data");
        pool.done(&["datasource", "add-image", "vm", image.to_str().unwrap()]);
        pool.done(&["protect", "vm"]);
        World { folder, pool, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn change(&mut self, seed: u64) {
        Numbers(seed).fill(&mut self.disk[..128 << 10]);
        std::fs::write(self.path("disk.raw"), &self.disk).unwrap();
        self.pool.done(&["synchronize", "vm"]);
    }

    /// The newest point that a kit opens, by the pool's files and the kit alone.
    fn latest(&self, kit: &Path) -> Vec<u8> {
        let to = self.path("recovered.raw");
        let pool = self.pool.data.join("pool");
        let (pool, kit) = (pool.to_str().unwrap(), kit.to_str().unwrap());
        let said = ["recover", "disk", "--pool", pool, "--kit", kit, "--point", "latest", "--disk", "0"];
        run(&words(&[&said[..], &["--overwrite", "--no-sync", "--to"]].concat(), &to)).expect(0);
        std::fs::read(&to).unwrap()
    }
}

#[test]
fn a_revoked_kit_opens_nothing_new_and_the_others_everything() {
    let mut world = World::new();
    let (first, second) = (world.pool.kit.clone(), world.path("second.txt"));
    let before = world.disk.clone();
    let listed = world.pool.done(&["recovery-kit", "list"]).lines;
    assert_eq!(listed.len(), 2, "{listed:?}");
    let own = |line: &&serde_json::Value| line["own"] == true;
    let server = listed.iter().find(own).unwrap()["id"].as_str().unwrap().to_owned();
    let kit = listed.iter().find(|line| !own(line)).unwrap()["id"].as_str().unwrap().to_owned();
    assert!(std::fs::read_to_string(&first).unwrap().contains(&format!("recipient: {kit}")));
    // The only kit and the server's own key stay.
    world.pool.run(&["recovery-kit", "revoke", &kit, "--yes"]).refused(5, "SP-3018");
    world.pool.run(&["recovery-kit", "revoke", &server, "--yes"]).refused(5, "SP-3018");
    world.pool.run(&["recovery-kit", "revoke", "0000", "--yes"]).refused(4, "SP-1003");
    world.pool.run(&["recovery-kit", "revoke", &kit]).refused(5, "SP-1007");

    let written = world.pool.done(&words(&["pool", "export-keys", "--to"], &second));
    assert_eq!(written.lines[0]["type"], "recovery-kit");
    let made = world.pool.done(&["recovery-kit", "revoke", &kit[..8], "--yes"]).lines;
    assert_eq!((&made[0]["generation"], &made[0]["recipients"]), (&1.into(), &2.into()), "{made:?}");
    world.change(9);
    assert!(world.latest(&second) == world.disk);
    assert!(world.latest(&first) == before, "what it could open before, and nothing since");
    world.pool.run(&words(&["recovery-kit", "test"], &first)).refused(9, "SP-3008");
    world.pool.done(&words(&["recovery-kit", "test"], &second));
    world.pool.done(&["pool", "rotate-keys"]);
    world.change(10);
    assert!(world.latest(&second) == world.disk);
    world.pool.done(&["pool", "verify", "--read-data"]);
    // A second copy has the rings.
    let copy = world.path("copy");
    world.pool.done(&words(&["pool", "copy", "--to"], &copy));
    let rings = files(&copy.join("keys"))
        .iter()
        .filter(|path| path.extension().is_some_and(|it| it == "ring"))
        .count();
    assert_eq!(rings, 4);
}

/// Killed at random moments, a rotation is done or not: server and kit open everything.
#[test]
fn a_killed_rotation_loses_nobody() {
    let mut world = World::new();
    let data = world.pool.data.to_str().unwrap().to_owned();
    let mut numbers = Numbers(program::setting("SEED", 11));
    for round in 0..program::setting("KILLS", 15) {
        let mut child = start(&["--standalone", &data, "pool", "rotate-keys"]);
        std::thread::sleep(Duration::from_millis(5 + numbers.below(60)));
        child.kill().unwrap();
        child.wait().unwrap();
        world.pool.done(&["pool", "verify", "--read-data"]);
        if round % 5 == 4 {
            world.change(100 + round);
        }
        assert!(world.latest(&world.pool.kit) == world.disk, "round {round}");
    }
    world.pool.done(&["pool", "rotate-keys"]);
    world.change(7);
    assert!(world.latest(&world.pool.kit) == world.disk);
}

/// What commands say, at the most talkative, and what they leave in the data folder, holds no secret (INV-27).
#[test]
fn no_secret_is_said_or_left_lying() {
    let world = World::new();
    let kit = std::fs::read_to_string(&world.pool.kit).unwrap();
    let secret = kit.lines().find_map(|line| line.strip_prefix("secret: ")).unwrap().to_owned();
    let own = std::fs::read(world.pool.data.join("keys/server.secret")).unwrap();
    // Twin file: 16 bytes of head, then pool, recipient, secret.
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let secrets = [secret, hex(&own[48..80])];
    let second = world.path("second.txt");
    let second = second.to_str().unwrap();
    let mut said = String::new();
    for line in [
        &["recovery-kit", "list"][..],
        &["recovery-kit", "write", "--to", second],
        &["recovery-kit", "test", second],
        &["recovery-kit", "test", "disk.raw"],
        &["pool", "rotate-keys"],
        &["pool", "status"],
        &["synchronize", "vm"],
        &["pool", "verify", "--read-data"],
        &["job", "list"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_stillpoint"))
            .args(["--json", "--standalone", world.pool.data.to_str().unwrap()])
            .args(line)
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        said.push_str(&String::from_utf8_lossy(&output.stdout));
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    assert!(said.contains("key-generation"), "{said}");
    for secret in &secrets {
        assert!(!said.contains(secret), "a secret was said");
        let raw: Vec<u8> =
            (0..32).map(|at| u8::from_str_radix(&secret[2 * at..2 * at + 2], 16).unwrap()).collect();
        for path in files(&world.pool.data).iter().filter(|path| !path.ends_with("keys/server.secret")) {
            let bytes = std::fs::read(path).unwrap();
            let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
            assert!(!has(&raw) && !has(secret.as_bytes()), "{} holds a secret", path.display());
        }
    }
}

//! `pool copy` by the program itself: killed, beside a server, recovered from with the kit alone, taken over.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../network/bench.rs"]
mod bench;
#[path = "../program/mod.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::time::Duration;

use program::{Numbers, Pool, finish, run, start, tool, words};

const DISK: usize = 16 << 20;

struct World {
    folder: tempfile::TempDir,
    pool: Pool,
    disk: Vec<u8>,
}

impl World {
    /// A protected disk of noise: packs that take a moment to copy.
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.raw");
        let mut disk = vec![0; DISK];
        Numbers(7).fill(&mut disk);
        std::fs::write(&image, &disk).unwrap();
        let pool = Pool::at(folder.path(), "data");
        let image = image.to_str().unwrap();
        let safety =
            ["--floor-points", "0", "--floor-age", "0s", "--soft-delete", "0s", "--reclaim-hold", "0s"];
        pool.done(&[&["datasource", "add-image", "vm", image][..], &safety].concat());
        pool.done(&["protect", "vm"]);
        World { folder, pool, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn change(&mut self, at: usize, bytes: usize, seed: u64) {
        Numbers(seed).fill(&mut self.disk[at..at + bytes]);
        std::fs::write(self.path("disk.raw"), &self.disk).unwrap();
        self.pool.done(&["synchronize", "vm"]);
    }

    fn copy(&self, to: &Path) -> program::Ran {
        self.pool.run(&words(&["pool", "copy", "--to"], to))
    }

    /// With the copy and the kit alone, the newest point is exact.
    fn recovers(&self, copy: &Path) {
        let to = self.path("recovered.raw");
        let kit = self.pool.kit.to_str().unwrap();
        let pool = copy.to_str().unwrap();
        let said = ["recover", "disk", "--pool", pool, "--kit", kit, "--point", "latest", "--disk", "0"];
        run(&words(&[&said[..], &["--overwrite", "--no-sync", "--to"]].concat(), &to)).expect(0);
        assert!(std::fs::read(&to).unwrap() == self.disk, "other bytes from the copy");
    }
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    program::files(folder)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            (name, std::fs::read(&path).unwrap())
        })
        .filter(|(name, _)| {
            name != "writer.lock" && !name.starts_with("index/") && !name.starts_with("ballast/")
        })
        .collect()
}

#[test]
fn a_copy_is_made_goes_on_and_is_recovered_from_with_the_kit() {
    let mut world = World::new();
    let copy = world.path("second/copy");
    let planned = world.pool.done(&words(&["pool", "copy", "--dry-run", "--to"], &copy));
    assert!(planned.lines[0]["bytes_moved"].as_u64().unwrap() > DISK as u64);
    assert!(!copy.exists(), "a dry run makes nothing");
    let first = world.copy(&copy).expect(0);
    assert!(first.figure("bytes_written") > DISK as u64);
    assert_eq!(first.text("target"), copy.to_str().unwrap());
    world.recovers(&copy);
    let nothing = world.copy(&copy).expect(0);
    assert_eq!(nothing.figure("bytes_written"), 0);
    world.change(1 << 20, 128 << 10, 9);
    let second = world.copy(&copy).expect(0);
    assert!((128 << 10..1 << 20).contains(&second.figure("bytes_written")), "{:?}", second.job());
    world.recovers(&copy);
    // Everything changes, the first point goes, and what it needed leaves pool and copy.
    world.change(0, DISK, 11);
    world.pool.done(&["prune", "vm", "--keep-last", "1", "--yes"]);
    world.pool.done(&["pool", "reclaim"]);
    let third = world.copy(&copy).expect(0);
    assert!(third.figure("bytes_freed") > DISK as u64 / 2, "{:?}", third.job());
    world.recovers(&copy);
    assert_eq!(files(&copy), files(&world.pool.data.join("pool")));
    world.pool.done(&words(&["pool", "copy", "--verify", "--to"], &copy));
}

/// Killed at random moments, each next run goes on; in the end the copy is the pool's files, to the byte.
#[test]
fn a_killed_copy_goes_on() {
    let world = World::new();
    let copy = world.path("copy");
    let data = world.pool.data.to_str().unwrap();
    let mut numbers = Numbers(program::setting("SEED", 5));
    let mut killed = 0;
    for _ in 0..program::setting("KILLS", 12) {
        let limit = ["--limit", "20MB/s"];
        let said = [&["--standalone", data, "pool", "copy"][..], &limit, &["--to"]].concat();
        let mut child = start(&words(&said, &copy));
        std::thread::sleep(Duration::from_millis(30 + numbers.below(500)));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        killed += u32::from(output.status.code().is_none());
        if copy.join("pool.stillpoint").exists() {
            world.recovers(&copy);
        }
    }
    assert!(killed > 3, "only {killed} were killed before they ended");
    world.copy(&copy).expect(0);
    assert_eq!(files(&copy), files(&world.pool.data.join("pool")));
    world.recovers(&copy);
}

#[test]
fn rot_is_named_and_the_rest_goes_on() {
    let world = World::new();
    let packs = program::files(&world.pool.data.join("pool/packs"));
    let largest = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(largest).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(largest, &bytes).unwrap();
    let copy = world.path("copy");
    let ran = world.copy(&copy).expect(6);
    assert_eq!(ran.job()["warnings"][0]["code"], "SP-3001");
    let file = ran.job()["damage"][0]["file"].as_str().unwrap();
    assert_eq!(Path::new(file), largest);
    let name = largest.strip_prefix(world.pool.data.join("pool")).unwrap();
    assert!(!copy.join(name).exists());
    assert_eq!(program::files(&copy.join("packs")).len(), packs.len() - 1);
    world.pool.run(&words(&["pool", "copy", "--accept-damage", "--to"], &copy)).expect(6);
    assert_eq!(std::fs::read(copy.join(name)).unwrap(), bytes);
}

#[test]
fn no_place_for_a_copy() {
    let world = World::new();
    let data = &world.pool.data;
    std::fs::create_dir(world.path("photographs")).unwrap();
    std::fs::write(world.path("photographs/1.jpg"), b"a").unwrap();
    std::os::unix::fs::symlink(data.join("pool"), world.path("link")).unwrap();
    for place in [
        data.join("pool"),
        data.join("pool/packs/x"),
        data.join("copy"),
        world.folder.path().to_owned(),
        world.path("link"),
        world.path("link/new"),
        world.path("photographs"),
    ] {
        let before = program::files(world.folder.path());
        let message = world.copy(&place).refused(5, "SP-3016");
        assert!(message.contains(place.to_str().unwrap()), "{message}");
        assert_eq!(program::files(world.folder.path()), before, "{}", place.display());
    }
    // Another pool.
    let other = World::new();
    world.copy(&other.pool.data.join("pool")).refused(5, "SP-1005");
}

#[test]
fn a_server_goes_on_with_the_copy_and_it_is_a_copy_no_more() {
    let mut world = World::new();
    let new = world.path("new");
    let copy = new.join("pool");
    world.copy(&copy).expect(0);
    let kit = world.pool.kit.to_str().unwrap().to_owned();
    let mut server = bench::Server::start(&new, &["--kit", &kit]);
    // While it runs and afterwards: its takeover is a record that the pool does not have.
    world.copy(&copy).refused(5, "SP-3017");
    assert_eq!(server.process.stop(), 0);
    world.copy(&copy).refused(5, "SP-3017");
    world.change(0, 64 << 10, 3);
    world.copy(&copy).refused(5, "SP-3017");
    world.recovers(&{
        // The pool itself is as it was, and goes to another folder.
        let other = world.path("other");
        world.copy(&other).expect(0);
        other
    });
}

/// A server copies for callers below the folders of its configuration, as a job among others, while another process copies
/// the same pool elsewhere.
#[test]
fn a_server_copies_where_its_configuration_lets_it() {
    let world = World::new();
    let (second, config) = (world.path("second"), world.path("server.toml"));
    std::fs::write(&config, format!("copy_folders = [{:?}]\n", second.to_str().unwrap())).unwrap();
    let server = bench::Server::start(&world.pool.data, &["--config", config.to_str().unwrap()]);
    let inside = second.join("stillpoint");
    let done = server.run(&["pool", "copy", "--to", inside.to_str().unwrap()]).good();
    assert_eq!(done.get("job")["kind"], "copy-pool");
    world.recovers(&inside);
    let outside = world.path("elsewhere");
    let refused = server.run(&["pool", "copy", "--to", outside.to_str().unwrap()]);
    assert_eq!((refused.status, refused.code()), (5, "SP-4008"));
    let cunning = format!("{}/../elsewhere", second.display());
    assert_eq!(server.run(&["pool", "copy", "--to", &cunning]).status, 5);
    assert!(!outside.exists());
    // Another process beside the server.
    world.copy(&outside).expect(0);
    world.recovers(&outside);
}

/// A full disk is said, and what is there stays valid. Needs root and loop devices.
#[test]
fn a_full_disk_is_said_and_the_next_run_goes_on() {
    let world = World::new();
    let (image, mount) = (world.path("small.img"), world.path("small"));
    std::fs::File::create(&image).unwrap().set_len(12 << 20).unwrap();
    std::fs::create_dir(&mount).unwrap();
    tool("mkfs.ext4", &[Path::new("-q"), &image]);
    tool("mount", &[Path::new("-o"), Path::new("loop"), &image, &mount]);
    let copy = mount.join("copy");
    let full = finish(
        start(&words(&["--standalone", world.pool.data.to_str().unwrap(), "pool", "copy", "--to"], &copy))
            .wait_with_output()
            .unwrap(),
        &["pool copy"],
    );
    let there = program::files(&copy).len();
    let elsewhere = world.path("larger");
    tool("cp", &[Path::new("-a"), &copy, &elsewhere]);
    tool("umount", &[&mount]);
    full.refused(10, "SP-3004");
    assert!(there > 1);
    world.copy(&elsewhere).expect(0);
    world.recovers(&elsewhere);
}

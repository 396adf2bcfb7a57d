//! Wrong inputs: each a clear error with code and hint, an exit status by the table, nothing lost, nothing created.
//!
//! Needs root, loop devices and qemu-img (`cargo xtask install`).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

#[path = "../program/mod.rs"]
mod program;

use std::io::Write;
use std::path::{Path, PathBuf};

use program::{Numbers, Pool, finish, start, tool, words};

const DISK: usize = 8 << 20;

/// A protected disk, and what its point holds.
struct World {
    folder: tempfile::TempDir,
    pool: Pool,
    image: PathBuf,
    disk: Vec<u8>,
    point: String,
}

impl World {
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let (image, disk) = (folder.path().join("disk.raw"), noise(DISK));
        std::fs::write(&image, &disk).unwrap();
        let pool = Pool::at(folder.path(), "data");
        pool.done(&["datasource", "add-image", "vm", image.to_str().unwrap()]);
        let point = pool.done(&["protect", "vm"]).text("recovery_point").to_owned();
        World { folder, pool, image, disk, point }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The one point is there, alone and exact.
    #[track_caller]
    fn nothing_lost(&self, points: usize) {
        assert_eq!(self.pool.points("vm").len(), points);
        let to = self.path("check.raw");
        self.pool.recover("vm", &self.point, &to).expect(0);
        assert!(std::fs::read(&to).unwrap() == self.disk);
        std::fs::remove_file(to).unwrap();
        self.pool.done(&["pool", "verify", "--read-data"]);
    }
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut all = vec![0; bytes];
    Numbers(3).fill(&mut all);
    all
}

/// A small file system of its own, in a file.
struct Small(PathBuf);

impl Small {
    fn mount(folder: &Path, mib: u64) -> Small {
        let (file, at) = (folder.join("small.ext4"), folder.join("small"));
        std::fs::File::create(&file).unwrap().set_len(mib << 20).unwrap();
        tool("mkfs.ext4", &words(&["-q", "-m", "0"], &file));
        std::fs::create_dir(&at).unwrap();
        tool("mount", &["-o".as_ref(), "loop".as_ref(), file.as_os_str(), at.as_os_str()]);
        Small(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn images_that_are_missing_cut_or_not_allowed() {
    let world = World::new();
    // Missing from the start: nothing is added, and no data folder is made for it... unless the folder was there.
    let gone = world.path("gone.raw");
    world.pool.run(&words(&["datasource", "add-image", "other"], &gone)).refused(1, "SP-2001");
    assert_eq!(world.pool.done(&["datasource", "list"]).lines.len(), 1);
    // Missing later.
    std::fs::rename(&world.image, &gone).unwrap();
    world.pool.run(&["synchronize", "vm"]).refused(1, "SP-2001");
    std::fs::rename(&gone, &world.image).unwrap();
    // Cut short.
    for (format, word) in [("vhdx", "vhdx"), ("qcow2", "qcow2"), ("vpc", "vhd")] {
        let image = world.path(&format!("cut.{word}"));
        tool(
            "qemu-img",
            &["convert".as_ref(), "-O".as_ref(), format.as_ref(), world.image.as_os_str(), image.as_os_str()],
        );
        let length = image.metadata().unwrap().len();
        for length in [length / 2, 600, 3] {
            std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(length).unwrap();
            let added = world.pool.run(&words(&["datasource", "add-image", "cut"], &image));
            if added.status != 0 {
                added.refused(1, "SP-2002");
                continue;
            }
            // What lies behind the cut is met when it is read.
            world.pool.run(&["protect", "cut"]).refused(1, "SP-2002");
            assert!(world.pool.points("cut").is_empty());
            world.pool.done(&["datasource", "remove", "cut", "--delete-data", "--yes"]);
        }
    }
    // A backing file outside the image's folder.
    std::fs::create_dir(world.path("elsewhere")).unwrap();
    let overlay = world.path("elsewhere/overlay.qcow2");
    let backing = world.image.to_str().unwrap();
    tool("qemu-img", &words(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing], &overlay));
    world.pool.run(&words(&["datasource", "add-image", "overlay"], &overlay)).refused(5, "SP-2003");
    let known = world.pool.done(&["datasource", "list"]).lines;
    assert!(known.iter().all(|one| one["name"] != "overlay"), "{known:?}");
    let around = world.folder.path().to_str().unwrap();
    world.pool.done(&words(&["datasource", "add-image", "overlay", "--allow-backing", around], &overlay));
    world.pool.done(&["protect", "overlay"]);
    world.nothing_lost(1);
}

#[test]
fn an_image_that_grows_while_it_is_read() {
    let world = World::new();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = {
        let (stop, image) = (stop.clone(), world.image.clone());
        std::thread::spawn(move || {
            let mut file = std::fs::OpenOptions::new().append(true).open(image).unwrap();
            let mut left = 200_000;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) && left > 0 {
                file.write_all(&[1; 512]).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(200));
                left -= 1;
            }
        })
    };
    let ran = world.pool.run(&["synchronize", "vm"]);
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    writer.join().unwrap();
    if ran.status == 0 {
        // A file system with reflinks freezes it: then the point is one moment's, of which the old part is known.
        let to = world.path("frozen.raw");
        world.pool.recover("vm", ran.text("recovery_point"), &to).expect(0);
        assert!(std::fs::read(to).unwrap()[..DISK] == world.disk[..]);
        world.nothing_lost(2);
    } else {
        // In use by another program, or found to have changed.
        match ran.status {
            8 => ran.refused(8, "SP-2010"),
            _ => ran.refused(1, "SP-2004"),
        };
        world.nothing_lost(1);
    }
}

#[test]
fn keys_and_kits_that_do_not_fit() {
    let world = World::new();
    let secret = world.pool.data.join("keys/server.secret");
    let good = std::fs::read(&secret).unwrap();
    std::fs::remove_file(&secret).unwrap();
    world.pool.run(&["recovery-point", "list"]).refused(9, "SP-3007");
    std::fs::create_dir(&secret).unwrap();
    world.pool.run(&["synchronize", "vm"]).refused(9, "SP-3007");
    std::fs::remove_dir(&secret).unwrap();
    std::fs::write(&secret, &good[..100]).unwrap();
    world.pool.run(&["synchronize", "vm"]).refused(9, "SP-3008");
    std::fs::write(&secret, &good).unwrap();
    // A kit of another pool, a kit that is none, no kit.
    let other = Pool::at(world.folder.path(), "other");
    other.done(&words(&["datasource", "add-image", "vm"], &world.image));
    let text = world.path("text.txt");
    std::fs::write(&text, "not a kit").unwrap();
    let pool = world.pool.data.join("pool");
    for (kit, code) in [(&other.kit, "SP-3008"), (&text, "SP-3008"), (&world.path("none.txt"), "SP-3007")] {
        let to = world.path("glass.raw");
        program::run(&words(
            &[
                "recover",
                "disk",
                "--pool",
                pool.to_str().unwrap(),
                "--kit",
                kit.to_str().unwrap(),
                "--point",
                "latest",
                "--disk",
                "0",
                "--to",
            ],
            &to,
        ))
        .refused(9, code);
        assert!(!to.exists());
        world.pool.run(&words(&["recovery-kit", "test"], kit)).refused(9, code);
    }
    world.nothing_lost(1);
}

#[test]
fn names_targets_lists_and_what_destroys() {
    let world = World::new();
    let pool = &world.pool;
    let id = pool.done(&["pool", "status"]).lines[0]["pool"].as_str().unwrap().to_owned();
    // A mistyped data folder is not made.
    let typo = Pool::at(world.folder.path(), "dta");
    for command in [&["status"][..], &["synchronize", "vm"], &["recovery-point", "list"], &["pool", "verify"]]
    {
        typo.run(command).refused(4, "SP-1004");
        assert!(!typo.data.exists() && !typo.kit.exists());
    }
    std::fs::create_dir(&typo.data).unwrap();
    typo.run(&["synchronize", "vm"]).refused(4, "SP-1004");
    assert_eq!(std::fs::read_dir(&typo.data).unwrap().count(), 0);
    pool.run(&["--pool-id", "00112233445566778899aabbccddeeff", "status"]).refused(5, "SP-1005");
    pool.done(&["--pool-id", &id, "status"]);
    // Names.
    pool.run(&["synchronize", "nobody"]).refused(4, "SP-1003");
    pool.run(&["recovery-point", "show", "ffffffff"]).refused(4, "SP-1003");
    let to = world.path("out.raw");
    pool.recover("vm", "0123456789", &to).refused(4, "SP-1003");
    let words_of =
        |disk: &'static str| ["recover", "disk", "vm", "--point", "latest", "--disk", disk, "--to"];
    pool.run(&words(&words_of("1"), &to)).refused(4, "SP-1003");
    assert!(!to.exists());
    // Two machines, and none is named.
    pool.done(&words(&["datasource", "add-image", "vm2"], &world.image));
    pool.done(&["protect", "vm2"]);
    let (folder, kit) = (pool.data.join("pool"), pool.kit.to_str().unwrap());
    let glass = ["recover", "disk", "--pool", folder.to_str().unwrap(), "--kit", kit, "--point", "latest"];
    let said =
        program::run(&words(&[&glass[..], &["--disk", "0", "--to"]].concat(), &to)).refused(2, "SP-1002");
    assert!(said.contains("vm (") && said.contains("vm2 ("), "{said}");
    assert!(!to.exists());
    // An existing target.
    std::fs::write(&to, "somebody's").unwrap();
    pool.run(&words(&words_of("0"), &to)).refused(5, "SP-1006");
    assert_eq!(std::fs::read(&to).unwrap(), b"somebody's");
    assert!(!world.path("out.raw.partial").exists());
    // Lists.
    let list = world.path("list.json");
    let option = format!("0={}", list.display());
    let wrong = [
        "",
        "{}",
        "[[0]]",
        "[[0,-1]]",
        "[[0,1,2]]",
        "[[0,\"a\"]]",
        "[[0,9000000]]",
        "[[18446744073709551615,2]]",
    ];
    for text in wrong {
        std::fs::write(&list, text).unwrap();
        pool.run(&["synchronize", "vm", "--changed-extents", &option]).refused(2, "SP-2009");
    }
    std::fs::write(&list, "[]").unwrap();
    let other_disk = format!("1={}", list.display());
    pool.run(&["synchronize", "vm", "--changed-extents", &other_disk]).refused(2, "SP-2009");
    pool.run(&["synchronize", "vm", "--changed-extents", "0=/nowhere/list"]).refused(2, "SP-2009");
    // What destroys needs a word.
    pool.run(&["recovery-point", "delete", &world.point]).refused(5, "SP-1007");
    pool.run(&["datasource", "remove", "vm", "--delete-data"]).refused(5, "SP-1007");
    pool.run(&["prune", "--keep-last", "1"]).refused(5, "SP-1007");
    pool.run(&["pool", "reclaim", "--breaker", "100"]).refused(5, "SP-1007");
    world.nothing_lost(1);
    // Nothing as a duration needs no unit.
    pool.done(&["pool", "reclaim", "--hold", "0", "--yes"]);
}

#[test]
fn a_second_writer_on_one_pool() {
    let world = World::new();
    let big = world.path("big.raw");
    std::fs::write(&big, noise(400 << 20)).unwrap();
    world.pool.done(&words(&["datasource", "add-image", "big"], &big));
    let first = ["--standalone", world.pool.data.to_str().unwrap(), "protect", "big"];
    let child = start(&first);
    std::thread::sleep(std::time::Duration::from_millis(400));
    world.pool.run(&["synchronize", "vm"]).refused(8, "SP-3002");
    // Readers go on beside it.
    assert_eq!(world.pool.points("vm").len(), 1);
    let waited = world.pool.done(&["--wait", "synchronize", "vm"]);
    assert!(!waited.text("recovery_point").is_empty());
    finish(child.wait_with_output().unwrap(), &first).expect(0);
    world.nothing_lost(2);
}

#[test]
fn disks_that_are_full() {
    let world = World::new();
    let small = Small::mount(world.folder.path(), 12);
    let big = world.path("big.raw");
    std::fs::write(&big, noise(16 << 20)).unwrap();
    // The target's.
    world.pool.done(&words(&["datasource", "add-image", "big"], &big));
    world.pool.done(&["protect", "big"]);
    let to = small.0.join("back.raw");
    world.pool.recover("big", "latest", &to).refused(10, "SP-2007");
    assert!(!to.exists());
    for entry in std::fs::read_dir(&small.0).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::remove_file(path).unwrap();
        }
    }
    // The pool's: first a disk that fits, then one that does not.
    let pool = Pool { data: small.0.join("data"), kit: world.path("small-kit.txt") };
    let kit = pool.kit.to_str().unwrap();
    let tiny = world.path("tiny.raw");
    std::fs::write(&tiny, noise(1 << 20)).unwrap();
    pool.done(&words(&["datasource", "add-image", "tiny", "--recovery-kit", kit], &tiny));
    let point = pool.done(&["protect", "tiny"]).text("recovery_point").to_owned();
    pool.done(&words(&["datasource", "add-image", "big"], &big));
    pool.run(&["protect", "big"]).refused(10, "SP-3004");
    let back = world.path("back.raw");
    pool.recover("tiny", &point, &back).expect(0);
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&tiny).unwrap());
    pool.done(&["pool", "verify", "--read-data"]);
    assert!(pool.points("big").is_empty());
    // And it goes on as soon as what does not fit is gone.
    pool.done(&["synchronize", "tiny"]);
}

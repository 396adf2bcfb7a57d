//! Whole machines back: over the original by difference, and as machines of their own.

use std::path::Path;
use std::time::Duration;

use crate::hosts::{Host, Hosts, until};
use crate::program::{Numbers, tool};

/// A guest under load that is protected; gives its disk and a point of it with the sequence that was complete then.
fn protected(host: &Host, load: u32) -> (std::path::PathBuf, String, u64) {
    let disk = host.disk("g1");
    host.define("g1", &disk, load);
    host.boot("g1");
    host.done(&["datasource", "add-machine", "g1", "--recovery-kit", &host.pool.kit.display().to_string()]);
    host.done(&["protect", "g1"]);
    until(Duration::from_secs(60), "the load has written", || host.sequence("g1") > 3);
    let written = host.sequence("g1");
    let point = host.done(&["synchronize", "g1"]).text("recovery_point").to_owned();
    (disk, point, written)
}

/// The file that libvirt has for a disk.
fn file_of(host: &Host, guest: &str) -> String {
    let said = host.virsh(&["domblklist", guest]);
    said.lines().find_map(|line| line.trim().strip_prefix("vda")).unwrap().trim().to_owned()
}

fn checked(check: &str) -> u64 {
    check.strip_prefix("ok ").unwrap_or_else(|| panic!("{check}")).parse().unwrap()
}

/// S151, S152, T7: by difference, and what was there is kept until its time is over.
#[test]
fn the_original_goes_back_by_difference_and_what_it_was_is_kept() {
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let (disk, point, written) = protected(&host, 64);
    let (id, serial) = (host.virsh(&["domuuid", "g1"]), host.serial("g1"));
    until(Duration::from_secs(60), "the load goes on", || host.sequence("g1") > written + 10);

    // A running machine is not touched without a word, and stays on.
    let words = ["recover", "vm", "g1", "--point", &point, "--original", "--yes"];
    let told = host.run(&words).refused(8, "SP-2010");
    assert!(told.contains("--stop graceful") && told.contains("--stop now"), "{told}");
    assert_eq!(host.virsh(&["domstate", "g1"]).trim(), "running");
    let plan = host.run(&[words.as_slice(), &["--dry-run"]].concat()).expect(0);
    assert!(plan.lines[0]["steps"].to_string().contains("7 days"), "{:?}", plan.lines);

    let _ = std::fs::remove_file(&serial);
    let before = host.sequence("g1");
    let run = host.done(&[words.as_slice(), &["--stop", "now", "--start"]].concat());
    let (moved, all) = (run.figure("bytes_transferred"), run.figure("bytes_logical"));
    assert!(moved > 0 && moved * 4 < all, "{}", run.job());
    let check = checked(&host.is_up("g1", &serial));
    assert!(check >= written && check < before, "{written} <= {check} < {before}");
    assert_eq!(host.virsh(&["domuuid", "g1"]), id);
    let overlay = file_of(&host, "g1");
    assert!(overlay.contains("g1.recovered-"), "{overlay}");
    // Only what differs was written: the overlay is as large as that.
    let size = Path::new(&overlay).metadata().unwrap().len();
    assert!(size < moved + (4 << 20), "{size} for {moved}");
    assert_eq!(host.leftovers("g1").len(), 1, "the note of what was replaced: {:?}", host.leftovers("g1"));

    // It is another file now: said, compared in full, and tracked again from there.
    let run = host.done(&["synchronize", "g1"]);
    assert!(run.text("cause").contains("another file"), "{}", run.text("cause"));
    let run = host.done(&["synchronize", "g1"]);
    assert!(run.text("cause").starts_with("changed extents"), "{}", run.text("cause"));

    // Back and forth: an overlay over the overlay.
    let later = run.text("recovery_point").to_owned();
    host.done(&["recover", "vm", "g1", "--point", &point, "--original", "--yes", "--stop", "now"]);
    assert_eq!(host.virsh(&["domstate", "g1"]).trim(), "shut off");
    host.done(&["recover", "vm", "g1", "--point", &later, "--original", "--yes"]);
    let raw = host.images().join("later.raw");
    host.pool.recover("g1", &later, &raw).expect(0);
    let same = tool("qemu-img", &["compare", &raw.display().to_string(), &file_of(&host, "g1")]);
    assert!(same.contains("identical"), "{same}");
    std::fs::remove_file(&raw).unwrap();

    // When their time is over, what was replaced becomes what the machine is, while it runs, and the overlays go.
    let _ = std::fs::remove_file(&serial);
    host.boot("g1");
    for name in host.leftovers("g1") {
        let path = host.images().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut note: serde_json::Value = serde_json::from_str(&text).unwrap();
        note["until"] = 1.into();
        std::fs::write(&path, note.to_string()).unwrap();
    }
    until(Duration::from_secs(120), "everything is in one file again", || {
        host.done(&["synchronize", "g1"]);
        host.leftovers("g1").is_empty()
    });
    assert_eq!(file_of(&host, "g1"), disk.display().to_string());
    let left: Vec<_> =
        std::fs::read_dir(host.images()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["g1.qcow2"], "{left:?}");
    host.virsh(&["destroy", "g1"]);
    assert!(checked(&host.boot("g1")) >= written);
}

/// S152, S156: what libvirt keeps of a machine beside its disks comes back, and a machine that is gone, too.
#[test]
fn definition_firmware_and_left_out_disks_come_back() {
    let hosts = Hosts::start(&["a", "b"]);
    let (host, other) = (hosts.host("a"), hosts.host("b"));
    let (disk, second) = (host.disk("g1"), host.disk_of("d2", "raw", 64));
    host.virsh(&["net-define", &network(&host, "lan")]);
    host.define_with(
        "g1",
        &[&disk, &second],
        0,
        "<interface type='network'><mac address='52:54:00:11:22:33'/><source network='lan'/></interface>",
    );
    let variables = host.images().join("g1_VARS.fd");
    std::fs::write(&variables, vec![0x5a; 70_000]).unwrap();
    let loader = host.images().join("CODE.fd");
    std::fs::write(&loader, vec![0xff; 65_536]).unwrap();
    let text = host.virsh(&["dumpxml", "g1", "--inactive"]).replace(
        "</type>",
        &format!(
            "</type><loader readonly='yes' type='pflash'>{}</loader><nvram>{}</nvram>",
            loader.display(),
            variables.display()
        ),
    );
    let file = host.images().join("g1.xml");
    std::fs::write(&file, text).unwrap();
    host.virsh(&["define", &file.display().to_string()]);
    host.virsh(&["autostart", "g1"]);
    let words = ["datasource", "add-machine", "g1", "--exclude", "vdb", "--recovery-kit"];
    host.done(&[words.as_slice(), &[&host.pool.kit.display().to_string()]].concat());
    host.done(&["protect", "g1"]);

    // Elsewhere: another machine, disconnected, the disk that was left out empty.
    let there = other.with_pool_of(&host);
    let folder = other.images().display().to_string();
    let words = ["recover", "vm", "g1", "--point", "latest", "--path", &folder];
    let run = there.done(&words);
    assert_eq!(run.text("machine"), "g1-recovered");
    let text = other.virsh(&["dumpxml", "g1-recovered", "--inactive"]);
    assert!(text.contains("<link state='down'/>") && !text.contains("52:54:00:11:22:33"), "{text}");
    assert!(text.contains("g1-recovered_VARS.fd</nvram>"), "{text}");
    let found = std::fs::read(other.images().join("g1-recovered_VARS.fd")).unwrap();
    assert_eq!(found, vec![0x5a; 70_000]);
    let empty =
        tool("qemu-img", &["info", &other.images().join("g1-recovered-vdb.qcow2").display().to_string()]);
    assert!(empty.contains("virtual size: 64 MiB"), "{empty}");
    assert!(!text.contains("d2.raw"), "{text}");
    assert!(
        run.job()["notes"].to_string().contains("vdb was left out of the point: it comes back empty"),
        "{}",
        run.job()
    );
    // The same again is in the way of itself, and says what to do.
    let told = there.run(&words).refused(5, "SP-1006");
    assert!(told.contains("--name"), "{told}");

    // In a storage pool, with its own identity, its networks mapped, in another format.
    other.virsh(&["pool-define-as", "disks", "dir", "--target", &folder]);
    other.virsh(&["net-define", &network(&other, "test")]);
    let mapped = [
        "recover",
        "vm",
        "g1",
        "--point",
        "latest",
        "--path",
        "disks",
        "--identity",
        "keep",
        "--network",
        "lan=test",
        "--format",
        "raw",
    ];
    there.done(&mapped);
    assert_eq!(other.virsh(&["domuuid", "g1"]), host.virsh(&["domuuid", "g1"]));
    let text = other.virsh(&["dumpxml", "g1", "--inactive"]);
    assert!(text.contains("network='test'") && text.contains("52:54:00:11:22:33"), "{text}");
    assert!(text.contains("type='raw'") && text.contains("g1-vda.raw"), "{text}");
    let unknown = [
        "recover",
        "vm",
        "g1",
        "--point",
        "latest",
        "--path",
        &folder,
        "--name",
        "x",
        "--network",
        "wan=test",
    ];
    assert!(there.run(&unknown).refused(1, "SP-1010").contains("\"wan\""));

    // The original is gone with everything: it is made again where it was.
    host.virsh(&["undefine", "g1", "--keep-nvram"]);
    for path in [&disk, &variables] {
        std::fs::remove_file(path).unwrap();
    }
    let run = host.done(&["recover", "vm", "g1", "--point", "latest", "--original", "--yes"]);
    assert_eq!(run.text("machine"), "g1");
    assert_eq!(std::fs::read(&variables).unwrap(), vec![0x5a; 70_000]);
    assert_eq!(file_of(&host, "g1"), disk.display().to_string());
    assert!(host.virsh(&["dominfo", "g1"]).contains("Autostart:      enable"));
    assert!(host.virsh(&["dumpxml", "g1"]).contains("d2.raw"), "the disk that was left out is what it is");

    // Once more, with what somebody kept of it: a disk is not touched, variables are not written over.
    host.virsh(&["undefine", "g1", "--keep-nvram"]);
    let words = ["recover", "vm", "g1", "--point", "latest", "--original", "--yes"];
    let told = host.run(&words).refused(5, "SP-1006");
    assert!(told.contains("move it away"), "{told}");
    std::fs::remove_file(&disk).unwrap();
    std::fs::write(&variables, vec![1; 100]).unwrap();
    host.done(&words);
    assert_eq!(std::fs::read(&variables).unwrap(), vec![1; 100]);
    let text = host.virsh(&["dumpxml", "g1", "--inactive"]);
    assert!(text.contains("g1_VARS.recovered-"), "{text}");
}

fn network(host: &Host, name: &str) -> String {
    let path = host.images().join(format!("{name}.net.xml"));
    std::fs::write(&path, format!("<network><name>{name}</name></network>")).unwrap();
    path.display().to_string()
}

/// INV-21, S151: `LIBVIRT_KILLS` times killed at a random moment, the machine is the old one or the recovered one, and whole.
#[test]
fn a_killed_recovery_leaves_the_old_machine_or_the_recovered_one() {
    let kills = std::env::var("LIBVIRT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let mut numbers = Numbers(std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(2));
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let (_, first, _) = protected(&host, 64);
    until(Duration::from_secs(60), "the load goes on", || host.sequence("g1") > 20);
    host.virsh(&["suspend", "g1"]);
    let second = host.done(&["synchronize", "g1"]).text("recovery_point").to_owned();
    host.virsh(&["destroy", "g1"]);
    let content = |point: &str| {
        let raw = host.images().join(format!("{point}.raw"));
        host.pool.recover("g1", point, &raw).expect(0);
        raw
    };
    let raws = [content(&first), content(&second)];
    let is = |raw: &Path| {
        let words = ["compare", "-U", &raw.display().to_string(), &file_of(&host, "g1")].map(str::to_owned);
        std::process::Command::new("qemu-img").args(words).output().unwrap().status.success()
    };
    let mut swapped = 0;
    for kill in 0..kills {
        // From whatever it is now to the other one.
        let (now, other) = if is(&raws[0]) { (0, 1) } else { (1, 0) };
        assert!(is(&raws[now]), "kill {kill}");
        let point = [&first, &second][other];
        let mut child = host.begin(&["recover", "vm", "g1", "--point", point, "--original", "--yes"]);
        let at = numbers.below(1200);
        std::thread::sleep(Duration::from_millis(at));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is(&raws[0]) || is(&raws[1]), "kill {kill} at {at} ms: neither");
        swapped += u32::from(is(&raws[other]));
        // The next contact sweeps.
        host.done(&["synchronize", "g1"]);
        assert!(is(&raws[0]) || is(&raws[1]), "kill {kill} at {at} ms: neither after the sweep");
        let left = host.leftovers("g1");
        assert!(left.iter().all(|name| name.contains("-replaced-")), "kill {kill} at {at} ms: {left:?}");
    }
    // It still does what it should.
    host.done(&["recover", "vm", "g1", "--point", &first, "--original", "--yes"]);
    assert!(is(&raws[0]));
    for raw in &raws {
        std::fs::remove_file(raw).unwrap();
    }
    host.boot("g1");
    println!("result: {kills} kills of a recovery, {swapped} after the swap");
}

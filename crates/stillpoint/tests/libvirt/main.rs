//! Real machines on a real libvirt: QEMU without acceleration, guests with an agent and a load that checks itself.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod conformance;
mod formats;
mod hosts;
mod kills;
mod migration;
#[path = "../network/bench.rs"]
mod processes;
#[path = "../program/mod.rs"]
mod program;
mod recovery;
mod trouble;

use std::path::Path;
use std::time::Duration;

use hosts::{Host, Hosts, until};
use program::{Numbers, tool};

/// Whether the ext4 volume of a disk has a journal to replay.
fn needs_recovery(disk: &Path, host: &Host) -> bool {
    let (raw, volume) = (host.images().join("volume.raw"), host.images().join("volume.ext4"));
    let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    tool("qemu-img", &words(format!("convert -O raw {} {}", disk.display(), raw.display())));
    let part = format!("if={} of={} bs=1M skip=1 conv=sparse status=none", raw.display(), volume.display());
    tool("dd", &words(part));
    let said = tool("dumpe2fs", &["-h", &volume.display().to_string()]);
    std::fs::remove_file(raw).unwrap();
    std::fs::remove_file(volume).unwrap();
    said.contains("needs_recovery")
}

#[test]
fn a_running_machine_is_protected_by_its_changes_and_each_point_boots() {
    let hosts = Hosts::start(&["a", "b"]);
    let (host, other) = (hosts.host("a"), hosts.host("b"));
    let disk = host.disk("g1");
    host.define("g1", &disk, 64);
    assert_eq!(host.boot("g1"), "none");

    host.done(&["datasource", "add-machine", "g1", "--recovery-kit", &host.pool.kit.display().to_string()]);
    let listed = host.done(&["host", "machines"]).lines;
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (&listed[0]["power"], &listed[0]["guest_agent"], &listed[0]["disks"][0]["format"]),
        (&"running".into(), &true.into(), &"qcow2".into()),
    );

    let first = host.done(&["protect", "g1"]);
    assert_eq!(first.text("consistency"), "file", "{}", first.job());
    let mut points = vec![first.text("recovery_point").to_owned()];
    // What the guest had written and synced in full before each freeze.
    let mut written = vec![0];
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(700));
        written.push(host.sequence("g1"));
        let run = host.done(&["synchronize", "g1"]);
        let cause = run.text("cause");
        assert!(cause.starts_with("changed extents because: QEMU's dirty blocks of disk vda"), "{cause}");
        assert_eq!(run.text("consistency"), "file", "{}", run.job());
        let (listed, read) = (run.figure("bytes_listed"), run.figure("bytes_read"));
        assert!(listed > 0 && (read - run.figure("bytes_audited")) * 10 <= listed * 11, "{}", run.job());
        points.push(run.text("recovery_point").to_owned());
    }
    // The point says itself why it is what it says, and how long the guest stood still for it.
    let mut stood_still = Vec::new();
    for point in &points {
        let shown = host.done(&["recovery-point", "show", point]).lines;
        let evidence = shown[0]["evidence"].as_str().unwrap();
        let millis = evidence.split(" ms").next().and_then(|text| text.rsplit(' ').next()).unwrap();
        assert!(evidence.starts_with("the guest agent froze 1 file systems for "), "{evidence}");
        let millis = millis.parse::<u64>().unwrap();
        assert!(millis < 3000, "{evidence}");
        stood_still.push(millis);
    }
    stood_still.sort_unstable();
    println!(
        "result: the guest stood still for {} ms at the median, {stood_still:?}",
        stood_still[stood_still.len() / 2]
    );
    assert_eq!(host.leftovers("g1"), Vec::<String>::new());
    // One for the newest point, one that it was made from.
    assert_eq!(host.checkpoints("g1").len(), 2);

    // Each point is what was frozen: recovered to the other host as a machine of its own it has no journal to replay, and where it
    // boots, its own check finds everything that was written before the freeze.
    let there = other.with_pool_of(&host);
    for (number, (point, written)) in points.iter().zip(&written).enumerate() {
        let name = format!("r{number}");
        let folder = other.images().display().to_string();
        let words = ["recover", "vm", "g1", "--point", point, "--path", &folder, "--name", &name];
        let run = there.done(&words);
        assert_eq!(run.text("machine"), name, "{}", run.job());
        let disk = other.images().join(format!("{name}-vda.qcow2"));
        assert!(!needs_recovery(&disk, &host), "{point}");
        let check = other.boot(&name);
        let sequence: u64 =
            check.strip_prefix("ok ").unwrap_or_else(|| panic!("{point}: {check}")).parse().unwrap();
        assert!(sequence >= *written, "{point}: {sequence} of {written}");
        let text = other.virsh(&["dumpxml", &name, "--inactive"]);
        assert!(!text.contains(host.virsh(&["domuuid", "g1"]).trim()), "{text}");
        other.forget(&name);
        std::fs::remove_file(disk).unwrap();
    }
    assert_eq!(other.leftovers("none"), Vec::<String>::new());

    // Nothing that changed was left out: a comparison of everything with the machine standing still finds nothing.
    host.virsh(&["suspend", "g1"]);
    let paused = host.done(&["synchronize", "g1"]);
    assert_eq!(paused.text("consistency"), "crash");
    assert_eq!(host.done(&["check", "g1"]).figure("bytes_changed"), 0);
    host.virsh(&["resume", "g1"]);

    // A checkpoint that somebody removed is a reason to compare everything, and said.
    for checkpoint in host.checkpoints("g1").iter().rev() {
        host.virsh(&["checkpoint-delete", "g1", checkpoint]);
    }
    let run = host.done(&["synchronize", "g1"]);
    let cause = run.text("cause");
    assert!(cause.starts_with("full compare because: checkpoint stillpoint-"), "{cause}");
    assert!(cause.ends_with("is gone"), "{cause}");

    // Somebody took the bitmap itself away, behind libvirt's back.
    host.inside("g1", "sync");
    host.virsh(&["destroy", "g1"]);
    let bitmaps = tool("qemu-img", &["info", &disk.display().to_string()]);
    let bitmap = bitmaps.lines().find_map(|line| line.trim().strip_prefix("name: ")).unwrap().to_owned();
    tool("qemu-img", &["bitmap", "--remove", &disk.display().to_string(), &bitmap]);
    host.boot("g1");
    let run = host.done(&["synchronize", "g1"]);
    let cause = run.text("cause");
    assert!(cause.starts_with("full compare because: checkpoint stillpoint-"), "{cause}");

    // Off: its images are read; and what is recovered is the disk to the byte.
    host.virsh(&["destroy", "g1"]);
    let run = host.done(&["synchronize", "g1"]);
    assert_eq!(run.text("consistency"), "offline");
    assert!(run.text("cause").contains("the machine is off"), "{}", run.text("cause"));
    let raw = host.images().join("recovered.raw");
    host.pool.recover("g1", "latest", &raw).expect(0);
    let differ = tool("qemu-img", &["compare", &raw.display().to_string(), &disk.display().to_string()]);
    assert!(differ.contains("identical"), "{differ}");

    // On again: another image may have been put in its place meanwhile, so everything is compared once.
    host.boot("g1");
    let run = host.done(&["synchronize", "g1"]);
    assert_eq!(run.text("cause"), "full compare because: the newest point has no checkpoint");
    let run = host.done(&["synchronize", "g1"]);
    assert!(run.text("cause").starts_with("changed extents"), "{}", run.text("cause"));
    host.virsh(&["suspend", "g1"]);
    host.done(&["synchronize", "g1"]);
    assert_eq!(host.done(&["check", "g1"]).figure("bytes_changed"), 0);
}

/// S32: nobody but the guard is there to thaw, and it does at its limit.
#[test]
fn a_guest_that_stays_frozen_is_thawed_at_the_limit() {
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    host.define("g1", &host.disk("g1"), 0);
    host.boot("g1");
    let note = host.images().join("frozen");
    std::fs::write(&note, b"").unwrap();
    host.virsh(&["domfsfreeze", "g1"]);
    let mut guard = host.guard("g1", Duration::from_secs(2), &note);
    std::thread::sleep(Duration::from_millis(500));
    assert!(host.is_frozen("g1"), "before the limit it is none of the guard's");
    until(Duration::from_secs(5), "thawed", || !host.is_frozen("g1"));
    assert!(guard.wait().unwrap().success());
    assert!(!note.exists());

    // A freeze of somebody else is taken as it is, and left as it is.
    let kit = host.pool.kit.display().to_string();
    host.done(&["datasource", "add-machine", "g1", "--recovery-kit", &kit, "--freeze-wait", "1s"]);
    host.virsh(&["domfsfreeze", "g1"]);
    let run = host.done(&["protect", "g1"]);
    assert_eq!(run.text("consistency"), "crash");
    let shown = host.done(&["recovery-point", "show", run.text("recovery_point")]).lines;
    assert_eq!(shown[0]["evidence"], "somebody else has the file systems frozen already");
    assert!(host.is_frozen("g1"));
    host.virsh(&["domfsthaw", "g1"]);

    let told = host.run_without(&["host", "machines"]).error()["message"].as_str().unwrap().to_owned();
    assert!(told.contains("no hypervisor") && told.contains("STILLPOINT_LIBVIRT_SOCKET"), "{told}");
    let told = host.run_without(&["synchronize", "g1"]).error()["message"].as_str().unwrap().to_owned();
    assert!(told.contains("/nonexistent/sock"), "{told}");
}

/// INV-21, S32: `LIBVIRT_KILLS` times at a random moment.
#[test]
fn a_killed_agent_leaves_no_guest_frozen_and_nothing_behind() {
    let kills = std::env::var("LIBVIRT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let mut numbers = Numbers(std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1));
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let disk = host.disk("g1");
    host.define("g1", &disk, 64);
    host.boot("g1");
    host.done(&["datasource", "add-machine", "g1", "--recovery-kit", &host.pool.kit.display().to_string()]);
    host.done(&["protect", "g1"]);
    for kill in 0..kills {
        let mut child = host.begin(&["synchronize", "g1"]);
        let at = numbers.below(600);
        std::thread::sleep(Duration::from_millis(at));
        child.kill().unwrap();
        child.wait().unwrap();
        until(Duration::from_secs(5), &format!("thawed after kill {kill} at {at} ms"), || {
            !host.is_frozen("g1")
        });
        let run = host.done(&["synchronize", "g1"]);
        assert!(
            run.text("cause").starts_with("changed extents"),
            "kill {kill} at {at} ms: {}",
            run.text("cause")
        );
        assert_eq!(host.leftovers("g1"), Vec::<String>::new(), "kill {kill} at {at} ms");
        assert!(host.checkpoints("g1").len() <= 2, "kill {kill}: {:?}", host.checkpoints("g1"));
    }
    host.virsh(&["suspend", "g1"]);
    host.done(&["synchronize", "g1"]);
    assert_eq!(host.done(&["check", "g1"]).figure("bytes_changed"), 0);
    println!("result: {kills} kills of an agent");
}

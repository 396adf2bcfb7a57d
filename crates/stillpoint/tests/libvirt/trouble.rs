//! Trackers in trouble: each ends in a right point with the right cause (INV-22).

use std::path::Path;

use crate::hosts::{Host, Hosts};
use crate::program::tool;

/// A point made now, with the machine standing still before and after: nothing may differ from it.
fn right(host: &Host, guest: &str) -> String {
    host.virsh(&["suspend", guest]);
    let cause = host.done(&["synchronize", guest]).text("cause").to_owned();
    assert_eq!(host.done(&["check", guest]).figure("bytes_changed"), 0, "{cause}");
    host.virsh(&["resume", guest]);
    cause
}

fn listed(cause: &str) {
    assert!(cause.starts_with("changed extents because: QEMU's dirty blocks of disk vda"), "{cause}");
}

fn compared(cause: &str, why: &str) {
    assert!(cause.starts_with("full ") && cause.contains(why), "{cause}");
}

fn qemu_img(words: &[&str], disk: &Path) -> String {
    let disk = disk.display().to_string();
    tool("qemu-img", &[words, &[disk.as_str()]].concat())
}

#[test]
fn whatever_happens_to_a_tracker_the_next_point_is_right_and_says_why() {
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let disk = host.disk("g1");
    host.define("g1", &disk, 64);
    host.boot("g1");
    host.done(&["datasource", "add-machine", "g1", "--recovery-kit", &host.pool.kit.display().to_string()]);
    host.done(&["protect", "g1"]);
    listed(&right(&host, "g1"));

    // Its process died without a word: the bitmaps in the image were not written back.
    host.kill_guest("g1");
    host.boot("g1");
    compared(&right(&host, "g1"), "cannot be used");
    listed(&right(&host, "g1"));

    // A disk more, while it runs; the one that was there keeps its list.
    let second = host.disk_of("d2", "qcow2", 64);
    let words = ["attach-disk", "g1", &second.display().to_string(), "vdb", "--subdriver", "qcow2", "--live"];
    host.virsh(&words);
    let cause = right(&host, "g1");
    assert!(cause.contains("disk 1: full scan (disk 1 is new)"), "{cause}");
    let cause = right(&host, "g1");
    assert!(
        cause.contains("dirty blocks of disk vda") && cause.contains("dirty blocks of disk vdb"),
        "{cause}"
    );
    // And away again.
    host.virsh(&["detach-disk", "g1", "vdb", "--live"]);
    listed(&right(&host, "g1"));

    // Larger.
    host.virsh(&["blockresize", "g1", "vda", "520M"]);
    compared(&right(&host, "g1"), "bytes, the replica");
    listed(&right(&host, "g1"));

    // A snapshot inside the image. QEMU refuses to go back to it while there are bitmaps, which would know nothing of that; without
    // them it goes back, and everything is compared.
    host.inside("g1", "sync");
    host.virsh(&["destroy", "g1"]);
    qemu_img(&["snapshot", "-c", "before"], &disk);
    host.boot("g1");
    listed(&right(&host, "g1"));
    host.virsh(&["destroy", "g1"]);
    let back = ["snapshot", "-a", "before", &disk.display().to_string()].map(str::to_owned);
    let refused = std::process::Command::new("qemu-img").args(&back).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    let known = qemu_img(&["info"], &disk);
    for name in known.lines().filter_map(|line| line.trim().strip_prefix("name: ")) {
        let words = ["bitmap", "--remove", &disk.display().to_string(), name];
        tool("qemu-img", &words);
    }
    tool("qemu-img", &back);
    host.boot("g1");
    compared(&right(&host, "g1"), "checkpoint stillpoint-");
    listed(&right(&host, "g1"));

    // Another image in its place, of the same size, with the same bitmaps in it.
    host.virsh(&["destroy", "g1"]);
    let copy = host.images().join("copy.qcow2");
    std::fs::copy(&disk, &copy).unwrap();
    std::fs::rename(&copy, &disk).unwrap();
    host.boot("g1");
    compared(&right(&host, "g1"), "disk vda is another file than at the newest point");
    listed(&right(&host, "g1"));
    assert_eq!(host.leftovers("g1"), Vec::<String>::new());
    host.done(&["synchronize", "g1"]);
    assert!(host.checkpoints("g1").len() <= 2, "{:?}", host.checkpoints("g1"));
}

/// S24: what is made of a machine whose file systems cannot be frozen is its administrator's choice.
#[test]
fn a_machine_without_an_agent_is_refused_paused_or_taken_as_it_is_as_was_chosen() {
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    host.define("g1", &host.disk("g1"), 64);
    host.boot("g1");
    host.inside("g1", "kill $(cat /run/qga.pid)");
    let kit = host.pool.kit.display().to_string();
    let add = [
        "datasource",
        "add-machine",
        "g1",
        "--recovery-kit",
        &kit,
        "--freeze-wait",
        "1s",
        "--without-freeze",
    ];
    let add = |choice| host.done(&[add.as_slice(), &[choice]].concat());
    add("fail");
    let began = std::time::Instant::now();
    let told = host.run(&["protect", "g1"]);
    let message = told.refused(1, "SP-2011");
    assert!(message.contains("no guest agent answers"), "{message}");
    assert!(began.elapsed() >= std::time::Duration::from_secs(2), "two more attempts");
    assert_eq!(host.leftovers("g1"), Vec::<String>::new());

    add("pause");
    // Said before it is done.
    let plan = host.run(&["protect", "g1", "--dry-run"]).expect(0).lines;
    assert!(plan[0]["steps"].to_string().contains("the machine is PAUSED"), "{plan:?}");
    let run = host.done(&["protect", "g1"]);
    assert_eq!(run.text("consistency"), "crash");
    let shown = host.done(&["recovery-point", "show", run.text("recovery_point")]).lines;
    let evidence = shown[0]["evidence"].as_str().unwrap();
    assert!(evidence.contains("the machine was paused for ") && evidence.contains(" ms"), "{evidence}");
    assert_eq!(host.virsh(&["domstate", "g1"]).trim(), "running");

    add("crash");
    let run = host.done(&["synchronize", "g1"]);
    assert_eq!(run.text("consistency"), "crash");
    let standing = |host: &Host| {
        let alerts = host.run(&["alert", "list"]).expect(0).lines;
        alerts.iter().filter(|alert| alert["message"].to_string().contains("only crash-consistent")).count()
    };
    assert_eq!(standing(&host), 1, "one alert, however many points");
    // As soon as a point is file-consistent again the alert is over.
    host.virsh(&["destroy", "g1"]);
    host.boot("g1");
    assert_eq!(host.done(&["synchronize", "g1"]).text("consistency"), "file");
    assert_eq!(standing(&host), 0);
}

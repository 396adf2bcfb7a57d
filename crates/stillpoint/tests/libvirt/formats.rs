//! Disks of other formats: lists from QEMU's memory, and machines from one format to another.

use crate::hosts::Hosts;

/// docs/design/0022.
#[test]
fn raw_and_vhdx_disks_are_tracked_and_machines_change_their_format_and_boot() {
    let hosts = Hosts::start(&["a", "b"]);
    let (host, other) = (hosts.host("a"), hosts.host("b"));
    let (first, second) = (host.disk_of("g1", "vhdx", 256), host.disk_of("d2", "raw", 64));
    host.define_with("g1", &[&first, &second], 64, "");
    host.boot("g1");
    host.done(&["datasource", "add-machine", "g1", "--recovery-kit", &host.pool.kit.display().to_string()]);
    let listed = host.done(&["host", "machines"]).lines;
    assert_eq!(listed[0]["disks"][0]["format"], "vhdx", "{listed:?}");
    let run = host.done(&["protect", "g1"]);
    assert_eq!(run.text("consistency"), "file");

    let mut written = 0;
    for _ in 0..3 {
        std::thread::sleep(std::time::Duration::from_millis(1500));
        written = host.sequence("g1");
        // On the second disk as well, behind its file system's back.
        let place = "seek=$((64 + $(cat /data/seq) % 500))";
        host.said(
            "g1",
            &format!("dd if=/dev/urandom of=/dev/vdb bs=65536 count=3 {place} conv=fsync 2>/dev/null"),
        );
        let run = host.done(&["synchronize", "g1"]);
        let cause = run.text("cause");
        assert!(cause.starts_with("changed extents"), "{cause}");
        assert!(cause.contains("in memory since bitmap stillpoint-") && cause.contains("taints"), "{cause}");
        assert!(run.figure("bytes_read") - run.figure("bytes_audited") < (32 << 20), "{}", run.job());
        assert_eq!(host.leftovers("g1"), Vec::<String>::new());
    }
    host.virsh(&["suspend", "g1"]);
    host.done(&["synchronize", "g1"]);
    assert_eq!(host.done(&["check", "g1"]).figure("bytes_changed"), 0);
    host.virsh(&["resume", "g1"]);
    // A killed agent leaves nothing that the next does not remove.
    let mut child = host.begin(&["synchronize", "g1"]);
    std::thread::sleep(std::time::Duration::from_millis(400));
    child.kill().unwrap();
    child.wait().unwrap();
    let run = host.done(&["synchronize", "g1"]);
    assert!(run.text("cause").starts_with("changed extents"), "{}", run.text("cause"));
    let nodes = host.virsh(&["qemu-monitor-command", "g1", "{\"execute\":\"query-block\"}"]);
    assert!(!nodes.contains("-read-"), "{nodes}");
    assert!(nodes.matches("\"name\":\"stillpoint-").count() <= 4, "two bitmaps a disk at most: {nodes}");

    // A power cycle ends what QEMU remembered.
    host.virsh(&["destroy", "g1"]);
    host.boot("g1");
    let run = host.done(&["synchronize", "g1"]);
    let cause = run.text("cause");
    assert!(cause.starts_with("full compare") && cause.contains("started anew"), "{cause}");
    let point = host.done(&["synchronize", "g1"]).text("recovery_point").to_owned();

    // VHDX to qcow2 on the other host, where it boots.
    let there = other.with_pool_of(&host);
    let folder = other.images().display().to_string();
    let to = ["recover", "vm", "g1", "--point", &point, "--path", &folder];
    there.done(&[to.as_slice(), &["--name", "g2", "--format", "qcow2"]].concat());
    let check = other.boot("g2");
    let sequence: u64 = check.strip_prefix("ok ").unwrap_or_else(|| panic!("{check}")).parse().unwrap();
    assert!(sequence >= written, "{sequence} of {written}");
    other.forget("g2");
    // And as it was.
    there.done(&[to.as_slice(), &["--name", "g3"]].concat());
    let text = other.virsh(&["dumpxml", "g3"]);
    assert!(text.contains("type='vhd'") && text.contains("g3-vda.vhdx"), "{text}");
    assert!(other.boot("g3").starts_with("ok "));
    other.forget("g3");

    // The other way round.
    let disk = other.disk_of("g4", "qcow2", 256);
    other.define("g4", &disk, 64);
    other.boot("g4");
    there.done(&["datasource", "add-machine", "g4"]);
    there.done(&["protect", "g4"]);
    let folder = host.images().display().to_string();
    let to =
        ["recover", "vm", "g4", "--point", "latest", "--path", &folder, "--name", "g5", "--format", "vhdx"];
    host.done(&to);
    let check = host.boot("g5");
    assert!(check == "none" || check.starts_with("ok "), "qcow2 to VHDX: {check}");
}

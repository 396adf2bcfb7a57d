//! kill -9 of whatever takes part in a backup: agent, server, libvirt's daemon, the machine itself.

use std::time::Duration;

use crate::hosts::{Hosts, until};
use crate::migration::Network;
use crate::program::Numbers;

/// INV-21, S32: `LIBVIRT_KILLS` times at a random moment of a job, then everything is started again.
#[test]
fn whoever_dies_in_a_backup_the_guest_goes_on_and_the_next_point_is_right() {
    let kills: u64 = std::env::var("LIBVIRT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let mut numbers = Numbers(std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(3));
    let hosts = Hosts::start(&["a"]);
    let host = hosts.host("a");
    let disk = host.disk_of("g1", "qcow2", 256);
    host.define("g1", std::path::Path::new("/srv/local/g1.qcow2"), 64);
    assert!(disk.exists());
    host.boot("g1");
    let mut network = Network::start(&[&host]);
    network.run(&["datasource", "add-machine", "g1", "--host", "a", "--freeze-wait", "1s"]).good();
    network.done(&["protect", "g1"]);
    let mut points = 1;
    for kill in 0..kills {
        let victim = ["agent", "server", "libvirtd", "machine"][(kill % 4) as usize];
        let started = network.run(&["synchronize", "g1", "--detach"]);
        let at = numbers.below(900);
        let what = format!("kill {kill} of the {victim} at {at} ms");
        std::thread::sleep(Duration::from_millis(at));
        match victim {
            "agent" => {
                network.agents[0].process.kill();
                network.agents[0] = network.agents[0].again();
            }
            "server" => {
                network.server.process.kill();
                network.server = network.server.again();
            }
            "libvirtd" => {
                host.kill_daemon();
                std::thread::sleep(Duration::from_millis(300));
                host.restart_daemon();
            }
            _ => {
                host.kill_guest("g1");
                until(Duration::from_secs(30), &format!("{what}: it is off"), || {
                    host.virsh(&["domstate", "g1"]).trim() == "shut off"
                });
                host.boot("g1");
            }
        }
        drop(started);
        until(Duration::from_secs(60), &format!("{what}: thawed"), || host.is_thawed("g1"));
        assert_eq!(host.virsh(&["domstate", "g1"]).trim(), "running", "{what}");
        // The next contact. A job that survived is still at work, or a dead one is not given up yet.
        let mut ended = None;
        until(Duration::from_secs(180), &format!("{what}: the next job"), || {
            let run = network.run(&["synchronize", "g1"]);
            let done = run.status == 0;
            ended = Some(run);
            done
        });
        let ended = ended.unwrap();
        let job = ended.get("job");
        points += 1;
        // A machine that was killed lost what its bitmaps had not written back; every other list goes on.
        let cause = job["cause"].as_str().unwrap();
        assert!(victim == "machine" || cause.starts_with("changed extents"), "{what}: {cause}");
        assert_eq!(host.leftovers("g1"), Vec::<String>::new(), "{what}");
        let kept = host.checkpoints("g1");
        assert!(kept.len() <= 5, "{what}: {kept:?}");
    }
    let cause = network.right(&host, "g1");
    assert!(cause.starts_with("changed extents"), "{cause}");
    network.done(&["synchronize", "g1"]);
    assert!(host.checkpoints("g1").len() <= 2, "{:?}", host.checkpoints("g1"));
    // Every point that was acknowledged is there, and whole.
    let listed = network.run(&["recovery-point", "list", "g1"]).good().lines.len();
    assert!(listed >= points, "{listed} of {points}");
    network.run(&["pool", "verify", "--read-data"]).good();
    println!("result: {kills} kills of agent, server, libvirtd and machine");
}

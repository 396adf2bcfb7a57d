//! Five days of three machines, in a pool fed by change lists and one fed by full scans: every day comes back exactly,
//! no more moves than was listed, and what is there already is not stored again.

use std::path::{Path, PathBuf};

use crate::made::{convert, made, rounded, write_list};
use crate::program::Pool;

const DAYS: std::ops::RangeInclusive<u32> = 1..=5;

/// One protected machine of the test.
struct Machine {
    name: &'static str,
    /// The generator's machine whose disk it has.
    disk_of: &'static str,
    image: PathBuf,
    /// qemu-img's word and options for the image.
    format: (&'static str, Option<&'static str>),
}

fn recovered(pool: &Pool, machine: &str, point: &str, to: &Path) {
    let ran = pool.recover(machine, point, to).expect(0);
    assert_eq!(ran.text("recovery_point"), point);
}

#[test]
fn every_day_of_every_machine_comes_back_exactly() {
    let made = made();
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let raw = |machine: &str| here.join(format!("{machine}.raw"));
    let machines = [
        Machine { name: "vm1", disk_of: "vm1", image: raw("vm1"), format: ("raw", None) },
        Machine {
            name: "vm1-vhdx",
            disk_of: "vm1",
            image: here.join("vm1.vhdx"),
            format: ("vhdx", Some("subformat=dynamic")),
        },
        Machine {
            name: "vm3-vhd",
            disk_of: "vm3",
            image: here.join("vm3.vhd"),
            format: ("vpc", Some("subformat=dynamic,force_size=on")),
        },
    ];
    let listed = Pool::at(here, "by-lists");
    let scanned = Pool::at(here, "by-scans");
    let mut points: Vec<(u32, usize, String, String)> = Vec::new();

    for day in DAYS {
        for disk_of in ["vm1", "vm3"] {
            match day {
                1 => made.first_day(disk_of, &raw(disk_of)),
                _ => made.step(disk_of, day, &raw(disk_of)),
            }
        }
        for (index, machine) in machines.iter().enumerate() {
            let (format, options) = machine.format;
            if format != "raw" {
                convert(&raw(machine.disk_of), "raw", options, &machine.image, format);
            }
            let image = machine.image.to_str().unwrap();
            let (by_list, by_scan) = if day == 1 {
                let protect = |pool: &Pool| {
                    pool.done(&["datasource", "add-image", machine.name, image]);
                    pool.done(&["protect", machine.name]).text("recovery_point").to_owned()
                };
                (protect(&listed), protect(&scanned))
            } else {
                let dirty = made.dirty(machine.disk_of, day);
                let list = write_list(&dirty, &here.join("list.json"));
                let base = points
                    .iter()
                    .rev()
                    .find(|(_, of, ..)| *of == index)
                    .map(|(_, _, by_list, _)| by_list.clone())
                    .unwrap();
                let ran = listed.done(&[
                    "synchronize",
                    machine.name,
                    "--changed-extents",
                    &list,
                    "--changed-since",
                    &base,
                ]);
                assert!(ran.text("cause").starts_with("changed extents because"), "{}", ran.text("cause"));
                // No more than listed, rounded out to blocks, and 2 %.
                let (moved, most) = (ran.figure("bytes_transferred"), rounded(&dirty));
                assert!(moved <= most + most / 50, "{moved} bytes moved of {most} listed");
                eprintln!(
                    "{} day {day}: listed {most}, moved {moved} ({:.1} %), audited {}, stored {}",
                    machine.name,
                    moved as f64 * 100.0 / most as f64,
                    ran.figure("bytes_audited"),
                    ran.figure("bytes_stored")
                );
                let scan = scanned.done(&["synchronize", machine.name, "--full-scan"]);
                assert!(scan.text("cause").starts_with("full scan because"), "{}", scan.text("cause"));
                let name = |ran: &crate::program::Ran| ran.text("recovery_point").to_owned();
                (name(&ran), name(&scan))
            };
            points.push((day, index, by_list, by_scan));
        }
    }

    let back = here.join("back.raw");
    for (day, index, by_list, by_scan) in &points {
        let machine = &machines[*index];
        for (pool, point) in [(&listed, by_list), (&scanned, by_scan)] {
            recovered(pool, machine.name, point, &back);
            made.check(machine.disk_of, *day, &back);
        }
    }

    // The last day of each, in every format that can be written, read back by another program.
    for (_, index, by_list, _) in points.iter().filter(|(day, ..)| day == DAYS.end()) {
        let machine = &machines[*index];
        for (word, format) in [("vhd", "vpc"), ("vhdx", "vhdx"), ("qcow2", "qcow2")] {
            let image = here.join(format!("back.{word}"));
            recovered(&listed, machine.name, by_list, &image);
            convert(&image, format, None, &back, "raw");
            made.check(machine.disk_of, *DAYS.end(), &back);
        }
    }

    for pool in [&listed, &scanned] {
        pool.done(&["pool", "verify", "--read-data"]);
        // A disk that is there already, under another name, costs its records and nothing else.
        let before = pool.bytes();
        pool.done(&["datasource", "add-image", "vm1-again", machines[0].image.to_str().unwrap()]);
        let again = pool.done(&["protect", "vm1-again"]);
        let grown = pool.bytes().saturating_sub(before);
        eprintln!(
            "the same disk again: {before} bytes before, {grown} more, {} stored",
            again.figure("bytes_stored")
        );
        assert!(grown * 100 < before, "the same disk again took {grown} bytes on top of {before}");
        recovered(pool, "vm1-again", again.text("recovery_point"), &back);
        made.check("vm1", *DAYS.end(), &back);
    }
}

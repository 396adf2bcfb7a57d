//! A change tracker that lies: it is caught, what it helped to make is marked, and the next point is right.
//!
//! The first four runs are the generator's days; from then on the blocks of those days are written anew, one page each.
//! Every list but the first leaves out 1 % of the blocks that changed, other ones each time. `SEEDS=20` makes a campaign of it.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::made::{BLOCK, Extents, Made, blocks, is_same, made, write_list};
use crate::program::{Numbers, Pool, setting};

const MOST_RUNS: u32 = 20;

/// Changes the disk as on a day, and gives what changed and what an honest tracker would list.
fn live(made: &Made, run: u32, disk: &Path, numbers: &mut Numbers) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let day = 2 + (run - 1) % 4;
    let changed = blocks(&made.changed("vm1", day));
    if run <= 4 {
        made.step("vm1", day, disk);
    } else {
        let file = OpenOptions::new().write(true).open(disk).unwrap();
        let mut page = [0; 4096];
        for block in &changed {
            numbers.fill(&mut page);
            file.write_all_at(&page, block * BLOCK + numbers.below(BLOCK / 4096) * 4096).unwrap();
        }
    }
    (changed, blocks(&made.dirty("vm1", day)))
}

fn extents(blocks: &BTreeSet<u64>) -> Extents {
    blocks.iter().map(|block| (block * BLOCK, BLOCK)).collect()
}

/// Lives one life; gives the run that found the lie.
fn life(made: &Made, seed: u64) -> u32 {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("vm1.raw");
    let back = folder.path().join("back.raw");
    let pool = Pool::at(folder.path(), "data");
    let mut numbers = Numbers(seed);
    made.first_day("vm1", &disk);
    pool.done(&["datasource", "add-image", "vm1", disk.to_str().unwrap()]);
    let mut newest = pool.done(&["protect", "vm1"]).text("recovery_point").to_owned();
    let first = newest.clone();
    let mut in_doubt = Vec::new();
    // The first list is honest, so that there is always a point to be doubted.
    for run in 1..=MOST_RUNS + 1 {
        let (changed, mut list) = live(made, run, &disk, &mut numbers);
        let all: Vec<u64> = changed.iter().copied().collect();
        let mut missing = BTreeSet::new();
        while run > 1 && missing.len() < all.len().div_ceil(100) {
            missing.insert(all[numbers.below(all.len() as u64) as usize]);
        }
        list.retain(|block| !missing.contains(block));
        let list = write_list(&extents(&list), &folder.path().join("list.json"));
        let ran = pool.run(&["synchronize", "vm1", "--changed-extents", &list, "--changed-since", &newest]);
        if ran.text("cause").starts_with("changed extents because") {
            newest = ran.expect(0).text("recovery_point").to_owned();
            in_doubt.push(newest.clone());
            continue;
        }
        // Done, with the warning that earlier points are in doubt.
        let ran = ran.expect(3);
        return caught(made, &pool, &ran, (&first, &in_doubt), (&disk, &back), run - 1);
    }
    panic!("seed {seed}: 1 % of the changes were left out of {MOST_RUNS} lists and nobody noticed");
}

/// What must hold as soon as the tracker was caught.
fn caught(
    made: &Made,
    pool: &Pool,
    ran: &crate::program::Ran,
    (first, in_doubt): (&str, &[String]),
    (disk, back): (&Path, &Path),
    run: u32,
) -> u32 {
    let cause = ran.text("cause");
    assert!(cause.starts_with("full compare because: audit"), "{cause}");
    let newest = ran.text("recovery_point");
    for point in pool.points("vm1") {
        let id = point["id"].as_str().unwrap();
        let state = point["state"].as_str().unwrap();
        if id == first || id == newest {
            assert!(state == "committed" || state == "verified", "{point}");
        } else {
            assert!(in_doubt.iter().any(|known| known == id));
            assert_eq!(state, "suspect", "{point}");
            assert!(point["reason"].as_str().unwrap().contains("left out"), "{point}");
        }
    }
    assert!(!pool.done(&["alert", "list"]).lines.is_empty(), "no alert was raised");
    // The new point is right, and it is what `latest` means; the first one is what it was.
    assert_eq!(pool.recover("vm1", "latest", back).expect(0).text("recovery_point"), newest);
    assert!(is_same(disk, back), "the point after the find is wrong");
    pool.recover("vm1", first, back).expect(0);
    made.check("vm1", 1, back);
    // A suspect point is given only to whoever says so.
    if let Some(doubtful) = in_doubt.last() {
        pool.recover("vm1", doubtful, back).refused(6, "SP-3009");
    }
    run
}

#[test]
fn a_tracker_that_leaves_out_one_percent_is_caught() {
    let made = made();
    let seeds = setting("SEEDS", 3);
    let first = setting("FIRST_SEED", 1);
    let mut runs: Vec<u32> = (first..first + seeds)
        .map(|seed| {
            let run = life(&made, seed);
            eprintln!("seed {seed}: found in run {run}");
            run
        })
        .collect();
    runs.sort_unstable();
    let median = f64::from(runs[(runs.len() - 1) / 2] + runs[runs.len() / 2]) / 2.0;
    eprintln!("{seeds} seeds: found in runs {runs:?}, median {median}");
}

#[test]
fn a_list_against_another_point_is_never_used() {
    let made = made();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("vm1.raw");
    let back = folder.path().join("back.raw");
    let pool = Pool::at(folder.path(), "data");
    made.first_day("vm1", &disk);
    pool.done(&["datasource", "add-image", "vm1", disk.to_str().unwrap()]);
    pool.done(&["datasource", "add-image", "other", disk.to_str().unwrap()]);
    let old = pool.done(&["protect", "vm1"]).text("recovery_point").to_owned();
    let foreign = pool.done(&["protect", "other"]).text("recovery_point").to_owned();
    let nobodys = "00112233445566778899aabbccddeeff".to_owned();
    pool.done(&["synchronize", "vm1"]);
    // Every list is empty: whoever uses one makes a wrong point.
    let empty = write_list(&Vec::new(), &folder.path().join("list.json"));
    for (day, base) in (2..).zip([old, foreign, nobodys]) {
        made.step("vm1", day, &disk);
        let ran = pool.done(&["synchronize", "vm1", "--changed-extents", &empty, "--changed-since", &base]);
        let cause = ran.text("cause");
        assert!(cause.starts_with("full scan because: list is against point"), "{cause}");
        assert!(cause.contains(&base) && cause.contains("the replica is at"), "{cause}");
        pool.recover("vm1", ran.text("recovery_point"), &back).expect(0);
        made.check("vm1", day, &back);
    }
}

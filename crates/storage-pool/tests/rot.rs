//! Every kind of file damaged in every way (INV-7, 8, 10). The bytes themselves: `golden.rs`.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::time::{Duration, Instant};

use rig::golden::{self, Golden};
use rig::is_exact;
use rig::rot::{at_once, changed, flips_at_once, look, random_flips};

/// Each so-many-th bit; `ROT_STEP=1` flips every one, as the test command does in a step of its own.
#[test]
fn flipped_bits_are_named() {
    let (golden, step) = (golden::make(), rig::number("ROT_STEP").unwrap_or(17));
    let until = Instant::now() + Duration::from_secs(if step == 17 { 60 } else { 1 << 30 });
    let flipped = flips_at_once(&golden, 5, step, until, rig::cores() as u64).unwrap();
    let bits: usize = golden.snapshot.files().map(|(_, bytes)| bytes.len() * 8).sum();
    println!("\nresult: {flipped} flipped bits of {bits}");
    assert!(flipped > 5_000, "{flipped}");
    assert!(step > 1 || flipped == bits as u64, "{flipped} of {bits}");
}

/// Bits at random of a larger pool, of `ROT_POINTS` points from `SEED`, for `ROT_SECONDS`.
#[test]
fn flipped_bits_of_a_larger_pool_are_named() {
    let seed = rig::number("SEED").unwrap_or(1);
    let golden = golden::make_large(seed, rig::number("ROT_POINTS").unwrap_or(20));
    let until = Instant::now() + Duration::from_secs(rig::number("ROT_SECONDS").unwrap_or(2));
    let threads = rig::number("ROT_THREADS").unwrap_or(rig::cores() as u64);
    let flipped = at_once(threads, &|thread| random_flips(&golden, seed * 1000 + thread, until))
        .unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    println!("\nresult: {flipped} flipped bits of a larger pool");
    assert!(flipped > 0, "{flipped}");
}

fn names(golden: &Golden) -> Vec<String> {
    golden.snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name != "writer.lock").collect()
}

#[test]
fn truncated_and_emptied_files_are_named() {
    let golden = golden::make();
    for name in names(&golden) {
        let bytes = golden.snapshot.get(&name).unwrap().to_vec();
        for length in
            [0, 1, 16, 63, 64, 100, bytes.len() / 2, bytes.len() - 33, bytes.len() - 1, bytes.len() + 1]
        {
            if length == bytes.len() {
                continue;
            }
            let mut cut = bytes.clone();
            cut.resize(length, 0);
            let rig = changed(&golden, |snapshot| snapshot.insert(&name, cut));
            look(&rig, &golden, &[&name]).unwrap_or_else(|wrong| panic!("{name} cut to {length}: {wrong}"));
        }
    }
}

/// Whether its absence can show: a run is derived and rewritten, other recipients' keys are not listed anywhere.
fn absence_shows(name: &str) -> bool {
    !name.starts_with("index/") && !name.starts_with("keys/")
}

#[test]
fn deleted_files_are_named() {
    let golden = golden::make();
    let last = golden.snapshot.files().filter(|(name, _)| name.starts_with("sequence/")).count();
    let last = format!("sequence/{last:016x}.record");
    for name in names(&golden) {
        let rig = changed(&golden, |snapshot| snapshot.remove(&name));
        match rig.reader() {
            Err(error) => assert!(!absence_shows(&name) || name == "pool.stillpoint", "{name}: {error}"),
            // That the end of the sequence is gone shows only to whoever knew of it: a later run, the catalog.
            Ok(_) if name == last => {}
            Ok(_) if absence_shows(&name) => {
                look(&rig, &golden, &[&name]).unwrap_or_else(|wrong| panic!("{name} deleted: {wrong}"));
            }
            Ok(_) => look(&rig, &golden, &[]).unwrap_or_else(|wrong| panic!("{name} deleted: {wrong}")),
        }
    }
}

#[test]
fn swapped_and_duplicated_files_are_named() {
    let golden = golden::make();
    let names = names(&golden);
    for (position, one) in names.iter().enumerate() {
        for other in &names[position + 1..] {
            if one.split('/').next() != other.split('/').next() {
                continue;
            }
            let bytes = |name: &str| golden.snapshot.get(name).unwrap().to_vec();
            let rig = changed(&golden, |snapshot| {
                snapshot.insert(one, bytes(other));
                snapshot.insert(other, bytes(one));
            });
            look(&rig, &golden, &[one, other])
                .unwrap_or_else(|wrong| panic!("{one} and {other} swapped: {wrong}"));
            let rig = changed(&golden, |snapshot| snapshot.insert(one, bytes(other)));
            look(&rig, &golden, &[one]).unwrap_or_else(|wrong| panic!("{other} put over {one}: {wrong}"));
        }
    }
}

/// Copies under names that nobody gave: they are told, and nothing comes of them.
#[test]
fn copies_under_other_names_do_no_harm() {
    let golden = golden::make();
    let bytes = |name: &str| golden.snapshot.get(name).unwrap().to_vec();
    for name in names(&golden) {
        let copy = match name.split('/').next().unwrap() {
            "sequence" => "sequence/7fffffffffffffff.record".to_owned(),
            "index" => "index/ffffffffffffffff.run".to_owned(),
            "packs" => format!("packs/00/00{}.pack", &name[11..41]),
            "keys" => format!("keys/{}.key", "0".repeat(32)),
            _ => continue,
        };
        let rig = changed(&golden, |snapshot| snapshot.insert(&copy, bytes(&name)));
        look(&rig, &golden, &[&copy]).unwrap_or_else(|wrong| panic!("{name} copied to {copy}: {wrong}"));
        // A writer goes on beside it.
        let pool = rig.writer(2).unwrap();
        let order = rig::Order {
            id: model::RecoveryPointId([99; 16]),
            datasource: 3,
            base: None,
            blocks: 3,
            changes: [(0, 1), (1, 15)].into_iter().collect(),
        };
        rig::store(&pool, &order).unwrap_or_else(|error| panic!("{name} copied to {copy}: {error}"));
        drop(pool);
        let pool = rig.reader().unwrap();
        assert_eq!(is_exact(&pool, order.id, &order.changes), Ok(true));
    }
}

/// The end of the sequence is taken away, as by a roll-back of that folder: a run knows how far it went.
#[test]
fn a_sequence_cut_off_behind_a_run_is_noticed_and_not_reused() {
    let golden = golden::make();
    let points: Vec<u64> = {
        let pool = golden
            .rig
            .on(environment::simulated::SimulatedFiles::from_snapshot(1, &golden.snapshot))
            .reader();
        pool.unwrap().state().in_order().map(|point| point.number).collect()
    };
    let newest = *points.last().unwrap();
    let rig = changed(&golden, |snapshot| {
        let gone: Vec<String> = snapshot
            .files()
            .map(|(name, _)| name.to_owned())
            .filter(|name| {
                name.strip_prefix("sequence/")
                    .is_some_and(|number| u64::from_str_radix(&number[..16], 16).unwrap() >= newest)
            })
            .collect();
        gone.iter().for_each(|name| snapshot.remove(name));
    });
    let pool = rig.writer(1).unwrap();
    assert!(
        pool.state().unreadable.iter().any(|record| record.number == newest),
        "{:?}",
        pool.state().unreadable
    );
    let stopped = pool.reclaim(Default::default(), &rig.deletion());
    assert!(matches!(stopped, Err(storage_pool::PoolError::Stopped { .. })), "{stopped:?}");
    pool.put_document("x", Some(b"y")).unwrap();
    assert!(pool.record_bytes(newest).is_err(), "the number of a lost record was given out again");
    // The catalog's copy heals it.
    let copy = golden.snapshot.get(&format!("sequence/{newest:016x}.record")).unwrap();
    assert!(pool.restore_record(newest, copy).unwrap());
    let id = pool.state().order[&newest];
    assert_eq!(is_exact(&pool, id, &golden.points[&id]), Ok(true));
}

//! Bundles of records: they spare reading, and are never believed against the records (S26, INV-4, 8, 12, 16).
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;

use common::*;
use environment::Files;
use storage_pool::verify::Depth;
use storage_pool::{Damage, PoolError};

const SIZE: u64 = 4 * 65_536;

/// A pool of so many points, each with one changed block.
fn pool_of(points: u64) -> Bench {
    let bench = Bench::new(points);
    let pool = bench.writer().unwrap();
    let mut base = None;
    for turn in 0..points {
        base = Some(put(&pool, 1, base, SIZE, &BTreeMap::from([(turn % 4, turn + 1)])).unwrap());
    }
    bench
}

fn bundles(bench: &Bench) -> Vec<String> {
    let snapshot = bench.files.snapshot();
    snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.ends_with(".records")).collect()
}

fn file_damage(damage: &[Damage], name: &str) -> bool {
    let end = name.rsplit('/').next().unwrap();
    damage.iter().any(|damage| matches!(damage, Damage::File { path, .. } if path.ends_with(end)))
}

#[test]
fn the_state_is_the_same_with_and_without_them() {
    let bench = pool_of(150);
    assert!(bundles(&bench).len() > 3);
    let with = bench.reader().unwrap().state().clone();
    let mut snapshot = bench.files.snapshot();
    for name in bundles(&bench) {
        snapshot.remove(&name);
    }
    let without =
        Bench { files: environment::simulated::SimulatedFiles::from_snapshot(1, &snapshot), ..bench };
    let reader = without.reader().unwrap();
    assert!(reader.notes().is_empty());
    assert_eq!(*reader.state(), with);
    assert_eq!(with.points.len(), 150);
}

/// What opening costs: reads of records follow the records since the last bundle, not all there are.
#[test]
fn opening_reads_few_records() {
    let bench = pool_of(200);
    let head = bench.reader().unwrap().state().head;
    assert!(head > 200);
    // Every record but the newest is made unreadable: who opens does not notice, who verifies does.
    for number in 2..head - 40 {
        bench.files.flip_bit(&format!("sequence/{number:016x}.record"), 900).unwrap();
    }
    let pool = bench.reader().unwrap();
    assert!(pool.notes().is_empty(), "{:?}", pool.notes());
    assert_eq!(pool.state().points.len(), 200);
    let report = pool.verify(Depth::Structure, &mut |_, _| true).unwrap();
    assert_eq!(
        report.damage.iter().filter(|damage| !matches!(damage, Damage::Point { .. })).count() as u64,
        head - 42
    );
    // What the bundle knows stays known, and nothing is freed on its word.
    assert_eq!(pool.state().points.len(), 200);
    drop(pool);
    let pool = bench.writer().unwrap();
    let stopped = pool.reclaim(Default::default(), &bench.deletion());
    assert!(matches!(stopped, Err(PoolError::Stopped { .. })), "{stopped:?}");
}

#[test]
fn a_damaged_bundle_is_told_and_done_without() {
    let bench = pool_of(100);
    let state = bench.reader().unwrap().state().clone();
    for name in bundles(&bench) {
        let bits = bench.files.snapshot().get(&name).unwrap().len() as u64 * 8;
        for bit in (0..bits).step_by(bits as usize / 7) {
            bench.files.flip_bit(&name, bit).unwrap();
            let pool = bench.reader().unwrap();
            assert_eq!(*pool.state(), state, "{name} bit {bit}");
            let report = pool.verify(Depth::Structure, &mut |_, _| true).unwrap();
            assert!(file_damage(&report.damage, &name), "{name} bit {bit}: {:?}", report.damage);
            bench.files.flip_bit(&name, bit).unwrap();
        }
    }
}

/// A sequence that was put back from another copy of the pool has other records under the numbers that a bundle covers.
#[test]
fn a_bundle_of_another_history_is_not_believed() {
    let bench = pool_of(40);
    let early = bench.files.snapshot();
    let pool = bench.writer().unwrap();
    let base = pool.state().in_order().last().map(|point| point.id);
    for turn in 0..40 {
        put(&pool, 1, base, SIZE, &BTreeMap::from([(0, 1000 + turn)])).unwrap();
    }
    drop(pool);
    let later = bench.files.snapshot();
    // The early copy, gone on with in another way, but with the bundles of the first way still there.
    let other = Bench { files: environment::simulated::SimulatedFiles::from_snapshot(2, &early), ..bench };
    let pool = other.writer().unwrap();
    for turn in 0..40 {
        put(&pool, 2, None, SIZE, &BTreeMap::from([(1, 5000 + turn)])).unwrap();
    }
    let state = pool.state().clone();
    drop(pool);
    let mut mixed = other.files.snapshot();
    let others: Vec<String> = bundles(&other);
    others.iter().for_each(|name| mixed.remove(name));
    for (name, bytes) in later.files().filter(|(name, _)| name.ends_with(".records")) {
        mixed.insert(name, bytes.to_vec());
    }
    let mixed = Bench { files: environment::simulated::SimulatedFiles::from_snapshot(3, &mixed), ..other };
    assert_eq!(mixed.reader().unwrap().state().points, state.points);
}

#[test]
fn superseded_files_are_tidied_away() {
    let bench = pool_of(3);
    let pool = bench.writer().unwrap();
    let mut base = pool.state().in_order().last().map(|point| point.id);
    let mut asked = 0;
    for turn in 0..200 {
        base = Some(put(&pool, 1, base, SIZE, &BTreeMap::from([(turn % 4, turn + 1)])).unwrap());
        asked += u32::from(pool.tidy(&bench.deletion()).unwrap());
    }
    assert!(asked > 1 && asked < 20, "{asked}");
    let left = bench.files.list("index").unwrap().len();
    assert!(left < 70, "{left} files in the index");
    drop(pool);
    let pool = bench.reader().unwrap();
    assert!(pool.verify(Depth::ReadData, &mut |_, _| true).unwrap().is_clean());
    assert_eq!(pool.state().points.len(), 203);
}

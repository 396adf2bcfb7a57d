//! The newest points stay readable in long runs (S30): scattered leaves are written again, within a budget.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;

use common::*;
use model::RecoveryPointId;
use storage_pool::Pool;

const SIZE: u64 = 3 * 128 * 65_536;

/// Three leaves, each block in a frame of its own, changed day after day.
fn aged(bench: &Bench, days: u64) -> (std::sync::Arc<Pool>, Vec<RecoveryPointId>, BTreeMap<u64, u64>) {
    let pool = bench.writer().unwrap();
    let mut truth: BTreeMap<u64, u64> = (0..300).map(|at| (at, at + 1)).collect();
    let mut points = vec![put(&pool, 1, None, SIZE, &truth).unwrap()];
    for day in 1..=days {
        let changes: BTreeMap<u64, u64> =
            (0..20).map(|n| ((n * 7 + day * 3) % 128, day * 1000 + n)).collect();
        points.push(put(&pool, 1, points.last().copied(), SIZE, &changes).unwrap());
        truth.extend(changes);
    }
    (pool, points, truth)
}

#[test]
fn scattered_leaves_are_written_again_and_nothing_changes() {
    let bench = Bench::new(1);
    let (pool, points, truth) = aged(&bench, 10);
    let newest = *points.last().unwrap();
    let state = pool.state().clone();
    let before = pool.layout(newest).unwrap();
    assert_eq!((before.blocks, before.leaves, before.scattered), (300, 3, 3));
    let relaid = pool.relay(newest, None, u64::MAX).unwrap();
    assert_eq!((relaid.leaves, relaid.blocks), (3, 300));
    let after = pool.layout(newest).unwrap();
    assert_eq!((after.frames, after.scattered, after.jumps), (after.ideal_frames, 0, 0));
    // No record, no map, no point: where the bytes lie is nobody's business but the index's.
    assert_eq!(*pool.state(), state);
    check(&pool, newest, &truth);
    assert_eq!(pool.relay(newest, None, u64::MAX).unwrap().blocks, 0);
    drop(pool);
    let pool = bench.reader().unwrap();
    check(&pool, newest, &truth);
    assert_eq!(pool.layout(newest).unwrap(), after);
    assert!(pool.verify(storage_pool::verify::Depth::ReadData, &mut |_, _| true).unwrap().is_clean());
}

#[test]
fn no_more_is_written_than_allowed_and_the_worst_first() {
    let bench = Bench::new(2);
    let (pool, points, truth) = aged(&bench, 10);
    let newest = *points.last().unwrap();
    let relaid = pool.relay(newest, None, 150 * 65_536).unwrap();
    assert!(relaid.blocks > 0 && relaid.blocks <= 150, "{relaid:?}");
    assert_eq!(pool.relay(newest, None, 0).unwrap().blocks, 0);
    check(&pool, newest, &truth);
}

/// Cost follows the change: leaves that are as they were are not looked at.
#[test]
fn only_what_changed_is_looked_at() {
    let bench = Bench::new(3);
    let (pool, points, truth) = aged(&bench, 10);
    let (since, newest) = (points[2], *points.last().unwrap());
    let relaid = pool.relay(newest, Some(since), u64::MAX).unwrap();
    assert_eq!((relaid.leaves, relaid.blocks), (1, 128));
    assert_eq!(pool.layout(newest).unwrap().scattered, 2);
    check(&pool, newest, &truth);
}

/// Reclaim frees the old places once no point needs anything else in their packs.
#[test]
fn the_old_places_go_with_the_points_that_needed_their_neighbours() {
    let bench = Bench::new(4);
    let (pool, points, truth) = aged(&bench, 10);
    let newest = *points.last().unwrap();
    pool.relay(newest, None, u64::MAX).unwrap();
    for point in &points[..10] {
        pool.delete_point(*point, "test").unwrap();
    }
    pool.reclaim(Default::default(), &bench.deletion()).unwrap();
    let blocks = pool.space().unwrap().packs / 65_536;
    assert!(blocks < 320, "{blocks} blocks' worth of packs for 300");
    check(&pool, newest, &truth);
}

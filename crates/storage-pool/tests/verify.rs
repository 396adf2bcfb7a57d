//! Verify in its tiers: with and without keys, several packs at once, by age, and how damage that it finds is healed.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block_io::Pace;
use common::{BLOCK, Bench, block, check, put};
use environment::Files;
use storage_pool::keyless::verify_hashes;
use storage_pool::proofs::{Part, RING};
use storage_pool::verify::{Depth, VerifyOptions, VerifyReport};
use storage_pool::{Damage, Ingest, Pool, PoolError};

const DAY: u64 = 86_400;

/// Points of several machines, each with packs of its own.
fn filled(bench: &Bench, points: u8) -> Vec<(model::RecoveryPointId, BTreeMap<u64, u64>)> {
    let pool = bench.writer().unwrap();
    (1..=points)
        .map(|n| {
            let changes: BTreeMap<u64, u64> = (0..4).map(|at| (at, u64::from(n) * 10 + at)).collect();
            (put(&pool, n, None, 8 * BLOCK as u64, &changes).unwrap(), changes)
        })
        .collect()
}

fn packs(bench: &Bench) -> Vec<String> {
    let snapshot = bench.files.snapshot();
    snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.ends_with(".pack")).collect()
}

/// The largest packs hold blocks: the first frame's bytes begin behind its header.
fn block_packs(bench: &Bench) -> Vec<String> {
    let snapshot = bench.files.snapshot();
    packs(bench).into_iter().filter(|name| snapshot.get(name).unwrap().len() > BLOCK).collect()
}

const IN_FIRST_FRAME: u64 = (64 + 32 + 1000) * 8;

fn verified(pool: &Arc<Pool>, depth: Depth, threads: usize) -> VerifyReport {
    let options = VerifyOptions { threads, ..VerifyOptions::new(depth) };
    pool.verify_with(&options, &mut |_, _| true).unwrap()
}

#[test]
fn each_tier_sees_what_it_says() {
    let bench = Bench::new(1);
    filled(&bench, 3);
    let name = block_packs(&bench)[0].clone();
    bench.files.flip_bit(&name, IN_FIRST_FRAME).unwrap();
    let pool = bench.reader().unwrap();
    assert!(verified(&pool, Depth::Structure, 1).is_clean());
    for depth in [Depth::Hashes, Depth::ReadData] {
        let report = verified(&pool, depth, 1);
        assert_eq!((report.damaged_points.len(), report.good_points), (1, 2), "{report:?}");
        assert!(matches!(&report.damage[0], Damage::File { path, offset: 64, .. } if path.ends_with(&name)));
        assert!(matches!(&report.damage[1], Damage::Point { disk: 0, .. }));
    }
    // A bit of the hash itself costs nobody anything, and is told.
    bench.files.flip_bit(&name, IN_FIRST_FRAME).unwrap();
    bench.files.flip_bit(&name, (64 + 20) * 8).unwrap();
    let pool = bench.reader().unwrap();
    for depth in [Depth::Hashes, Depth::ReadData] {
        let report = verified(&pool, depth, 1);
        assert_eq!(
            (report.damage.len(), report.good_points, report.new_damage.len()),
            (1, 3, 0),
            "{report:?}"
        );
    }
}

/// A frame's length that rotted must not hide the frames behind it.
#[test]
fn a_frame_of_a_wrong_length_hides_no_other() {
    let bench = Bench::new(1);
    let points = filled(&bench, 1);
    let name = block_packs(&bench)[0].clone();
    // Frames of one block each: 128 KiB more reach past the next two.
    bench.files.flip_bit(&name, (64 + 6) * 8 + 1).unwrap();
    let third = 64 + 2 * (32 + BLOCK as u64 + 16).next_multiple_of(64);
    bench.files.flip_bit(&name, (third + 32 + 5) * 8).unwrap();
    let report = verify_hashes(&files(&bench), &VerifyOptions::new(Depth::Hashes), &mut |_, _| true).unwrap();
    let told: Vec<u64> = report.damage.iter().map(offset).collect();
    assert!(told == [64, third], "{:?}", report.damage);
    let pool = bench.reader().unwrap();
    let report = verified(&pool, Depth::ReadData, 1);
    assert_eq!(report.lost_blocks, 2, "{report:?}");
    assert_eq!(report.damaged_points, [points[0].0]);
}

fn offset(damage: &Damage) -> u64 {
    match damage {
        Damage::File { offset, .. } => *offset,
        Damage::Point { .. } => u64::MAX,
    }
}

fn files(bench: &Bench) -> Arc<dyn Files> {
    Arc::new(bench.files.clone())
}

#[test]
fn several_packs_at_once_find_the_same_in_the_same_order() {
    let bench = Bench::new(2);
    filled(&bench, 12);
    for name in block_packs(&bench).iter().step_by(3) {
        bench.files.flip_bit(name, IN_FIRST_FRAME).unwrap();
    }
    let pool = bench.reader().unwrap();
    let one = verified(&pool, Depth::ReadData, 1);
    let four = verified(&pool, Depth::ReadData, 4);
    assert_eq!(one.damage, four.damage);
    assert_eq!((one.new_damage, one.bytes_read, one.packs), (four.new_damage, four.bytes_read, four.packs));
    assert!(one.damaged_points.len() >= 4);
    // Ended early, it says what it found and proves nothing.
    let options = VerifyOptions { threads: 4, ..VerifyOptions::new(Depth::ReadData) };
    let mut left = 3;
    let ended = pool
        .verify_with(&options, &mut |_, _| {
            left -= 1;
            left > 0
        })
        .unwrap();
    assert_eq!(ended.packs, 3);
    assert!(ended.proved.is_empty() && ended.proved_points.is_empty());
}

/// No key: every file that has a hash of its own is proved; what has not is said.
#[test]
fn a_folder_is_hashed_without_any_key() {
    let bench = Bench::new(3);
    filled(&bench, 3);
    let look = || {
        let options = VerifyOptions { threads: 2, ..VerifyOptions::new(Depth::Hashes) };
        verify_hashes(&files(&bench), &options, &mut |_, _| true)
    };
    let clean = look().unwrap();
    assert!(clean.damage.is_empty(), "{clean:?}");
    assert!(clean.records >= 5 && clean.runs > 0 && clean.packs == packs(&bench).len() as u64);
    let snapshot = bench.files.snapshot();
    for (name, bytes) in snapshot.files().filter(|(name, _)| *name != "writer.lock") {
        for bit in [bytes.len() as u64 * 3, bytes.len() as u64 * 8 - 1] {
            bench.files.flip_bit(name, bit).unwrap();
            let is_named = match look() {
                Ok(report) => report
                    .damage
                    .iter()
                    .any(|damage| matches!(damage, Damage::File { path, .. } if path.ends_with(name))),
                Err(error) => error.to_string().contains(name),
            };
            bench.files.flip_bit(name, bit).unwrap();
            // Runs have keyed hashes only; they are made again of packs.
            assert_eq!(is_named, !name.ends_with(".run"), "{name}, bit {bit}");
        }
    }
    let gone = snapshot.files().map(|(name, _)| name.to_owned()).find(|name| name.starts_with("sequence/"));
    let mut without = snapshot.clone();
    without.remove(&gone.unwrap());
    let rest: Arc<dyn Files> = Arc::new(environment::simulated::SimulatedFiles::from_snapshot(1, &without));
    let report = verify_hashes(&rest, &VerifyOptions::new(Depth::Hashes), &mut |_, _| true).unwrap();
    assert_eq!(report.damage.len(), 1, "a missing record: {:?}", report.damage);
    let nothing: Arc<dyn Files> = Arc::new(environment::simulated::SimulatedFiles::new(1));
    let none = verify_hashes(&nothing, &VerifyOptions::new(Depth::Hashes), &mut |_, _| true);
    assert!(matches!(none, Err(PoolError::NoPool { .. })), "{none:?}");
}

#[derive(Default)]
struct Counted(Mutex<u64>);

impl Pace for Counted {
    fn wait(&self, bytes: u64) {
        *self.0.lock().unwrap() += bytes;
    }
}

fn due(pool: &Arc<Pool>, days: u64) -> VerifyReport {
    let options = VerifyOptions { every: Some(days * DAY), ..VerifyOptions::new(Depth::ReadData) };
    pool.verify_with(&options, &mut |_, _| true).unwrap()
}

/// Every pack is read within the period, a share a day, new ones too, and what was proved outlives a restart.
#[test]
fn everything_is_proved_within_the_period() {
    let bench = Bench::new(4);
    filled(&bench, 20);
    let all = packs(&bench).len() as u64;
    let mut read = 0;
    for day in 1..=10 {
        bench.clock.advance(Duration::from_secs(DAY));
        let pool = bench.writer().unwrap();
        let report = due(&pool, 10);
        read += report.packs;
        assert!(report.packs < all / 2, "day {day}: {} of {all}", report.packs);
        assert!(report.is_clean() && report.points == 0);
        assert!(due(&pool, 10).packs == 0, "once a day");
    }
    assert_eq!(read, all);
    let pool = bench.writer().unwrap();
    let oldest = pool.state().proofs.oldest().unwrap();
    assert_eq!(oldest.0, common::NOW + DAY * 1_000_000);
    assert_eq!(*pool.state(), *bench.reader().unwrap().state());
    // A full verify proves all of it at once.
    verified(&pool, Depth::ReadData, 2);
    assert_eq!(pool.state().proofs.oldest().unwrap().0, common::NOW + 10 * DAY * 1_000_000);
}

/// A pool that nobody ever read is due as a whole; ended early, it goes on where it stopped.
#[test]
fn an_ended_verify_goes_on_where_it_stopped() {
    let bench = Bench::new(5);
    filled(&bench, 6);
    bench.clock.advance(Duration::from_secs(40 * DAY));
    let pool = bench.writer().unwrap();
    pool.tick().unwrap();
    assert_eq!(pool.due(30 * DAY), Some(Part::WHOLE));
    let pace = Arc::new(Counted::default());
    let options = VerifyOptions {
        every: Some(30 * DAY),
        pace: Some(pace.clone()),
        ..VerifyOptions::new(Depth::ReadData)
    };
    let ended = pool.verify_with(&options, &mut |_, _| false).unwrap();
    assert_eq!(ended.packs, 1);
    assert_eq!(pool.due(30 * DAY), Some(Part::WHOLE), "a part that was not read to its end is not proved");
    let report = pool.verify_with(&options, &mut |_, _| true).unwrap();
    assert_eq!(report.packs, packs(&bench).len() as u64);
    assert_eq!(pool.due(30 * DAY), None);
    assert!(*pace.0.lock().unwrap() > report.bytes_read / 2, "reading waits for the rate");
    bench.clock.advance(Duration::from_secs(DAY));
    let next = pool.due(30 * DAY).unwrap();
    assert_eq!((next.from, next.length), (0, RING / 30));
}

/// A reader's proof is written down by whoever may write.
#[test]
fn a_readers_proof_is_handed_over() {
    let bench = Bench::new(6);
    filled(&bench, 3);
    bench.clock.advance(Duration::from_secs(31 * DAY));
    let reader = bench.reader().unwrap();
    let report = due(&reader, 30);
    assert_eq!(report.proved.iter().map(|proved| proved.part.length).sum::<u64>(), RING);
    let pool = bench.writer().unwrap();
    pool.record_verified(&report).unwrap();
    assert_eq!(pool.due(30 * DAY), None);
}

/// The whole chain: a frame rots, the verify by age names machine, disk and range, the next backup finds the source's block
/// wanted, and every point is whole again.
#[test]
fn what_a_verify_by_age_finds_is_healed_by_the_next_backup() {
    let bench = Bench::new(7);
    let points = filled(&bench, 4);
    let name = block_packs(&bench)[0].clone();
    bench.files.flip_bit(&name, IN_FIRST_FRAME).unwrap();
    let pool = bench.writer().unwrap();
    let mut found = None;
    for _ in 0..4 {
        bench.clock.advance(Duration::from_secs(DAY));
        let report = due(&pool, 4);
        if !report.is_clean() {
            assert!(found.is_none(), "told once, not each day: {report:?}");
            found = Some(report);
        }
    }
    let report = found.unwrap();
    let Some(Damage::Point { point, machine, disk: 0, range, .. }) = report.damage.last() else {
        panic!("{report:?}")
    };
    let (id, content) = points.iter().find(|(id, _)| id == point).unwrap();
    assert!(machine.starts_with("vm") && range.end - range.start == BLOCK as u64, "{report:?}");
    // What the jobs do: ask which blocks are lost, read these from the source, store them again.
    let lost = pool.point(*id).unwrap().disks[0].clone();
    let map = storage_pool::MapRoot { root: lost.root, levels: lost.levels };
    let blocks = pool.lost_blocks(bench.domain, map).unwrap();
    let expected = range.start / BLOCK as u64..range.end / BLOCK as u64;
    assert_eq!((blocks.len(), &blocks[0]), (1, &expected));
    let ingest = Ingest::begin(&pool, bench.domain).unwrap();
    let bytes = block(content[&blocks[0].start]);
    ingest.put_blocks(false, &bytes, &[*blake3::hash(&bytes).as_bytes()]).unwrap();
    ingest.settle().unwrap();
    drop(ingest);
    let report = verified(&pool, Depth::ReadData, 1);
    assert_eq!((report.good_points, report.damaged_points.len()), (4, 0), "{report:?}");
    check(&pool, *id, content);
}

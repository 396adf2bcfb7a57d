//! What a pool promises, on simulated files: points come back, share what is equal, survive damage and deletion.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;

use block_io::BlockDevice;
use common::*;
use model::RecoveryPointId;
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::verify::Depth;
use storage_pool::{Access, Damage, Pool, PoolError, Settings};

const SIZE: u64 = 300 * 65_536 + 512;

fn map(entries: &[(u64, u64)]) -> BTreeMap<u64, u64> {
    entries.iter().copied().collect()
}

/// S18, S29, S30: every point is a full image of its own.
#[test]
fn every_point_comes_back_whole_after_reopening() {
    let bench = Bench::new(1);
    let mut truth = BTreeMap::new();
    let mut points: Vec<(RecoveryPointId, BTreeMap<u64, u64>)> = Vec::new();
    for turn in 0..5u64 {
        let pool = bench.writer().unwrap();
        let changes: BTreeMap<u64, u64> = (0..20)
            .map(|n| ((n * 37 + turn * 11) % 301, if n % 5 == 4 { 0 } else { turn * 100 + n + 1 }))
            .collect();
        let base = points.last().map(|(id, _)| *id);
        let id = put(&pool, 1, base, SIZE, &changes).unwrap();
        truth.extend(changes);
        points.push((id, truth.clone()));
    }
    let pool = bench.reader().unwrap();
    assert!(pool.notes().is_empty(), "{:?}", pool.notes());
    for (id, truth) in &points {
        check(&pool, *id, truth);
    }
    assert_eq!(
        pool.state().in_order().map(|point| point.id).collect::<Vec<_>>(),
        points.iter().map(|(id, _)| *id).collect::<Vec<_>>()
    );
}

#[test]
fn a_recovery_point_is_a_block_device() {
    let bench = std::cell::RefCell::new(Vec::new());
    block_io::conformance::all(|content| {
        let new = Bench::new(content.len() as u64);
        let pool = new.writer().unwrap();
        let ingest = storage_pool::Ingest::begin(&pool, new.domain).unwrap();
        let mut editor = ingest.edit_map(None, content.len() as u64).unwrap();
        let mut nodes = ingest.nodes();
        for (at, part) in content.chunks(BLOCK).enumerate() {
            let mut bytes = part.to_vec();
            bytes.resize(BLOCK, 0);
            if bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            let ids = ingest.put_blocks(false, &bytes, &[*blake3::hash(&bytes).as_bytes()]).unwrap();
            editor.set(at as u64, Some(ids[0]), &mut nodes).unwrap();
        }
        let map = editor.finish(&mut nodes).unwrap();
        let id = put(&pool, 1, None, 512, &BTreeMap::new()).unwrap();
        let mut like = pool.point(id).unwrap();
        like.id = RecoveryPointId([9; 16]);
        let details = like.details();
        let new_point = storage_pool::NewPoint {
            datasource: like.datasource,
            machine: like.machine,
            host: details.host,
            base: None,
            captured: like.captured,
            consistency: like.consistency,
            evidence: details.evidence,
            cause: details.cause,
            job: None,
            figures: BTreeMap::new(),
            definition: String::new(),
            incomplete: false,
        };
        let disk = storage_pool::NewDisk {
            index: 0,
            size: content.len() as u64,
            sector: 512,
            map,
            description: String::new(),
            audit_next: 0,
            full_compare: storage_pool::FullCompare::Now,
        };
        let point = ingest.commit(like.id, new_point, vec![disk]).unwrap();
        let device = pool.open_disk(point.id, 0).unwrap();
        bench.borrow_mut().push(new);
        device
    });
}

/// S30, acceptance 3: the same disk under another name costs next to nothing, a changed block costs what changed.
#[test]
fn equal_content_is_stored_once() {
    let bench = Bench::new(2);
    let pool = bench.writer().unwrap();
    let content: BTreeMap<u64, u64> = (0..200).map(|n| (n, n + 1)).collect();
    let first = put(&pool, 1, None, SIZE, &content).unwrap();
    let before = pool.space().unwrap();
    assert!(before.packs > 200 * 65_536);
    put(&pool, 2, None, SIZE, &content).unwrap();
    let after = pool.space().unwrap();
    assert!(after.packs - before.packs < before.packs / 100, "{} for a clone", after.packs - before.packs);
    put(&pool, 1, Some(first), SIZE, &map(&[(7, 5000)])).unwrap();
    let third = pool.space().unwrap();
    assert!(third.packs - after.packs < 65_536 + 8_192, "{} for one block", third.packs - after.packs);
}

/// INV-16.
#[test]
fn a_second_writer_is_refused_and_a_paused_one_is_fenced() {
    let bench = Bench::new(3);
    let pool = bench.writer().unwrap();
    let other = storage_pool::World {
        files: std::sync::Arc::new(bench.files.second_process()),
        clock: bench.clock.clone(),
        randomness: bench.random.clone(),
    };
    let access = Access::Write { server: [2; 16], name: "other".to_owned() };
    assert!(matches!(Pool::open(other.clone(), &bench.server, access.clone()), Err(PoolError::Busy { .. })));
    drop(pool);

    // A writer whose lock was lost (another machine that the lock does not reach) meets the sequence.
    let stale = bench.writer().unwrap();
    let snapshot = bench.files.snapshot();
    let elsewhere = Bench {
        files: environment::simulated::SimulatedFiles::from_snapshot(9, &snapshot),
        ..bench_parts(&bench)
    };
    let new = Pool::open(elsewhere.world(), &bench.server, access).unwrap();
    assert_eq!(new.state().epoch, 2);
    drop(new);
    let moved = elsewhere.files.snapshot();
    for (name, bytes) in moved.files() {
        if snapshot.get(name).is_none() {
            let mut file = environment::Files::create(&bench.files, name).unwrap();
            file.append(bytes).unwrap();
            file.publish().unwrap();
        }
    }
    let error = put(&stale, 1, None, SIZE, &map(&[(1, 1)])).unwrap_err();
    assert!(matches!(error, PoolError::Fenced { .. }), "{error}");
}

fn bench_parts(bench: &Bench) -> Bench {
    Bench {
        files: bench.files.clone(),
        clock: bench.clock.clone(),
        random: bench.random.clone(),
        server: bench.server.clone(),
        kit: bench.kit.clone(),
        domain: bench.domain,
    }
}

/// Deletion in the fault model's order; what is left stays exact; what is freed is gone.
#[test]
fn prune_and_reclaim_free_what_no_point_needs() {
    let bench = Bench::new(4);
    let pool = bench.writer().unwrap();
    let first: BTreeMap<u64, u64> = (0..250).map(|n| (n, n + 1)).collect();
    let a = put(&pool, 1, None, SIZE, &first).unwrap();
    let changes: BTreeMap<u64, u64> = (0..125).map(|n| (n * 2, 1000 + n)).collect();
    let b = put(&pool, 1, Some(a), SIZE, &changes).unwrap();
    let mut truth = first.clone();
    truth.extend(changes);
    let before = pool.space().unwrap().packs;
    pool.delete_point(a, "test").unwrap();
    let report = pool.reclaim(ReclaimOptions::default(), &bench.deletion()).unwrap();
    assert!(report.freed_bytes > 0 && report.expired_points == 1, "{report:?}");
    let after = pool.space().unwrap().packs;
    assert!(after < before - 100 * 65_536, "{before} -> {after}: {report:?}");
    check(&pool, b, &truth);
    drop(pool);
    let pool = bench.reader().unwrap();
    assert!(pool.notes().is_empty(), "{:?}", pool.notes());
    check(&pool, b, &truth);
    drop(pool);
    let pool = bench.writer().unwrap();
    assert!(pool.verify(Depth::ReadData, &mut |_, _| true).unwrap().is_clean());
    pool.delete_point(b, "test").unwrap();
    pool.reclaim(ReclaimOptions::default(), &bench.deletion()).unwrap();
    assert_eq!(pool.space().unwrap().packs, 0);
}

/// INV-11, INV-19: a clock that jumps a century ahead frees nothing early.
#[test]
fn holds_and_soft_deletion_follow_pool_time() {
    let settings = Settings { floor_points: 0, floor_age: 0, breaker_percent: 100, ..Settings::default() };
    let bench = Bench::with(5, settings);
    let pool = bench.writer().unwrap();
    let a = put(&pool, 1, None, SIZE, &map(&[(0, 1), (1, 2)])).unwrap();
    pool.delete_point(a, "test").unwrap();
    bench.clock.jump_to(NOW + 100 * 365 * 86_400_000_000);
    let report = pool.reclaim(ReclaimOptions::default(), &bench.deletion()).unwrap();
    assert_eq!((report.expired_points, report.quarantined_bytes), (0, 0));
    pool.undelete_point(a).unwrap();
    check(&pool, a, &map(&[(0, 1), (1, 2)]));
    pool.delete_point(a, "test").unwrap();
    let tombstone = pool.state().head;
    let mut days = 0;
    while bench.files.snapshot().files().any(|(name, _)| name.starts_with("packs/")) {
        bench.clock.advance(std::time::Duration::from_secs(86_400));
        days += 1;
        pool.reclaim(ReclaimOptions::default(), &bench.deletion()).unwrap();
        assert!(days < 40);
    }
    assert_eq!(days, 17, "14 days of soft deletion and 3 of hold");

    // Nobody takes back what is gone because he cannot read that it went.
    drop(pool);
    bench.files.flip_bit(&format!("sequence/{tombstone:016x}.record"), 900).unwrap();
    let names: Vec<String> = bench.files.snapshot().files().map(|(name, _)| name.to_owned()).collect();
    let mut snapshot = bench.files.snapshot();
    names.iter().filter(|name| name.ends_with(".records")).for_each(|name| snapshot.remove(name));
    bench.files.reboot_into(&snapshot);
    let pool = bench.writer().unwrap();
    assert!(pool.point(a).unwrap().deleted.is_none(), "not known here");
    pool.delete_point(a, "test").unwrap();
    let refused = pool.undelete_point(a);
    assert!(matches!(refused, Err(PoolError::Stopped { .. })), "{refused:?}");
}

/// INV-12, breaker.
#[test]
fn reclaim_stops_at_what_it_cannot_read_and_at_the_breaker() {
    let settings = Settings { breaker_percent: 50, ..Settings::without_safety() };
    let bench = Bench::with(6, settings);
    let pool = bench.writer().unwrap();
    let a = put(&pool, 1, None, SIZE, &(0..50).map(|n| (n, n + 1)).collect()).unwrap();
    pool.delete_point(a, "test").unwrap();
    let before = bench.files.snapshot().files().count();
    let refused = pool.reclaim(ReclaimOptions::default(), &bench.deletion());
    assert!(matches!(refused, Err(PoolError::Breaker { percent: 100, allowed: 50 })), "{refused:?}");
    put(&pool, 2, None, SIZE, &map(&[(0, 700)])).unwrap();
    let last = pool.state().head;
    drop(pool);
    bench.files.flip_bit(&format!("sequence/{:016x}.record", last - 1), 900).unwrap();
    let pool = bench.writer().unwrap();
    let stopped = pool.reclaim(
        ReclaimOptions { breaker_percent: Some(100), ..ReclaimOptions::default() },
        &bench.deletion(),
    );
    assert!(matches!(stopped, Err(PoolError::Stopped { .. })), "{stopped:?}");
    assert!(bench.files.snapshot().files().count() >= before);
}

/// INV-8, INV-9, acceptance 5: damage is found, told with machine and range, healed by the next backup.
#[test]
fn rot_in_a_pack_is_named_and_healed_by_the_next_backup() {
    let bench = Bench::new(7);
    let pool = bench.writer().unwrap();
    let content: BTreeMap<u64, u64> = (0..40).map(|n| (n, n + 1)).collect();
    let a = put(&pool, 1, None, SIZE, &content).unwrap();
    let b = put(&pool, 2, None, SIZE, &map(&[(3, 900)])).unwrap();
    drop(pool);
    let pack = bench
        .files
        .snapshot()
        .files()
        .filter(|(name, _)| name.starts_with("packs/"))
        .max_by_key(|(_, bytes)| bytes.len())
        .map(|(name, _)| name.to_owned())
        .unwrap();
    bench.files.flip_bit(&pack, (64 + 32 + 5 * 65_600) * 8).unwrap();
    let pool = bench.writer().unwrap();
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert_eq!(report.damaged_points, [a], "{report:?}");
    assert!(report.damage.iter().any(|damage| matches!(damage, Damage::File { path, .. } if path.ends_with(pack.rsplit('/').next().unwrap()))));
    let lost: Vec<_> = report
        .damage
        .iter()
        .filter_map(|damage| match damage {
            Damage::Point { point, machine, range, .. } => Some((*point, machine.clone(), *range)),
            Damage::File { .. } => None,
        })
        .collect();
    assert_eq!(lost.len(), 1);
    assert_eq!((lost[0].0, lost[0].1.as_str(), lost[0].2.len()), (a, "vm1", 65_536));
    check(&pool, b, &map(&[(3, 900)]));

    let disk = pool.point(a).unwrap().disks[0].clone();
    let lost = pool
        .lost_blocks(bench.domain, storage_pool::MapRoot { root: disk.root, levels: disk.levels })
        .unwrap();
    assert_eq!(lost.len(), 1);
    let at = lost[0].start;
    let device = pool.open_disk(a, 0).unwrap();
    assert!(device.read_at(at * 65_536, &mut [0; 512]).is_err());
    // The next backup brings the same content again: stored anew, and the old point heals.
    put(&pool, 3, None, SIZE, &map(&[(0, content[&at])])).unwrap();
    check(&pool, a, &content);
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert_eq!(report.damaged_points, []);
}

/// What a recovery by difference asks of every block is answered by the map: content that is lost is still
/// known.
#[test]
fn a_disk_knows_its_blocks_by_their_hashes_without_reading_them() {
    let bench = Bench::new(7);
    let pool = bench.writer().unwrap();
    let content: BTreeMap<u64, u64> = (0..40).map(|n| (n * 3, n + 1)).collect();
    let a = put(&pool, 1, None, SIZE, &content).unwrap();
    drop(pool);
    let packs: Vec<(String, usize)> = bench
        .files
        .snapshot()
        .files()
        .filter(|(name, _)| name.starts_with("packs/"))
        .map(|(name, bytes)| (name.to_owned(), bytes.len()))
        .collect();
    let (pack, _) = packs.iter().max_by_key(|(_, length)| *length).unwrap();
    for frame in 0..40 {
        bench.files.flip_bit(pack, (64 + 32 + frame * 65_600) * 8).unwrap();
    }
    let device = bench.reader().unwrap().open_disk(a, 0).unwrap();
    let hash = |number: u64| *blake3::hash(&block(number)).as_bytes();
    let zeros = *blake3::hash(&[0; 65_536]).as_bytes();
    let mut lost = 0;
    for at in 0..device.size() / 65_536 {
        let held = content.get(&at).copied();
        lost += u64::from(device.read_hashed(at, &mut [0; 65_536]).is_err());
        assert_eq!(device.is_equal(at, None).unwrap(), held.is_none(), "block {at}");
        assert!(!device.is_equal(at, Some(&zeros)).unwrap(), "zeros have no name in a map");
        for number in 1..=40 {
            assert_eq!(device.is_equal(at, Some(&hash(number))).unwrap(), held == Some(number), "block {at}");
        }
    }
    assert!(lost > 0);
}

#[test]
fn a_damaged_run_is_made_again_and_said_so() {
    let bench = Bench::new(8);
    let pool = bench.writer().unwrap();
    let content: BTreeMap<u64, u64> = (0..40).map(|n| (n, n + 1)).collect();
    let a = put(&pool, 1, None, SIZE, &content).unwrap();
    drop(pool);
    let runs: Vec<String> = bench
        .files
        .snapshot()
        .files()
        .filter(|(name, _)| name.starts_with("index/"))
        .map(|(name, _)| name.to_owned())
        .collect();
    for (run, bit) in runs.iter().zip([40u64 * 8, 3000 * 8]) {
        bench.files.flip_bit(run, bit).unwrap();
    }
    let pool = bench.writer().unwrap();
    check(&pool, a, &content);
    let report = pool.verify(Depth::Structure, &mut |_, _| true).unwrap();
    assert!(
        report.damage.iter().all(|damage| matches!(damage, Damage::File { derived: true, .. })),
        "{report:?}"
    );
    assert!(report.damaged_points.is_empty());
    drop(pool);
    drop(bench.writer().unwrap());
    let pool = bench.reader().unwrap();
    assert!(pool.notes().is_empty(), "{:?}", pool.notes());
    check(&pool, a, &content);
}

/// A damaged record is given back from the catalog's copy.
#[test]
fn a_damaged_record_is_restored_from_its_copy() {
    let bench = Bench::new(9);
    let pool = bench.writer().unwrap();
    let a = put(&pool, 1, None, SIZE, &map(&[(0, 1)])).unwrap();
    let number = pool.point(a).unwrap().number;
    let copy = pool.record_bytes(number).unwrap();
    let b = put(&pool, 1, Some(a), SIZE, &map(&[(1, 2)])).unwrap();
    drop(pool);
    bench.files.flip_bit(&format!("sequence/{number:016x}.record"), 77).unwrap();
    let pool = bench.writer().unwrap();
    assert!(matches!(pool.point(a), Err(PoolError::NoSuchPoint(_))));
    check(&pool, b, &map(&[(0, 1), (1, 2)]));
    assert!(!pool.restore_record(number + 1, &copy).unwrap());
    assert!(!pool.restore_record(number, b"something else").unwrap());
    assert!(pool.restore_record(number, &copy).unwrap());
    check(&pool, a, &map(&[(0, 1)]));
    drop(pool);
    let pool = bench.reader().unwrap();
    check(&pool, a, &map(&[(0, 1)]));
    assert!(pool.state().unreadable.is_empty());
}

/// Break-glass: the kit and the files are enough, and nothing is written.
#[test]
fn the_kit_alone_opens_a_pool_without_writing() {
    let bench = Bench::new(10);
    let pool = bench.writer().unwrap();
    let a = put(&pool, 1, None, SIZE, &map(&[(0, 1)])).unwrap();
    drop(pool);
    let before = bench.files.snapshot();
    let pool = bench.reader().unwrap();
    check(&pool, a, &map(&[(0, 1)]));
    assert!(matches!(pool.delete_point(a, "no"), Err(PoolError::ReadOnly)));
    let after = bench.files.snapshot();
    assert_eq!(before.files().collect::<Vec<_>>(), after.files().collect::<Vec<_>>());
    let wrong = storage_pool::kit::Recipient {
        secret: storage_pool::keys::Secret::from_bytes([0; 32]),
        ..bench.kit.clone()
    };
    assert!(matches!(Pool::open(bench.world(), &wrong, Access::Read), Err(PoolError::KeyWrong { .. })));
}

/// INV-13.
#[test]
fn the_floor_keeps_the_newest_good_points() {
    let bench = Bench::with(11, Settings { floor_points: 2, ..Settings::without_safety() });
    let pool = bench.writer().unwrap();
    let mut last = None;
    let ids: Vec<RecoveryPointId> = (0..4)
        .map(|turn| {
            let id = put(&pool, 1, last, SIZE, &map(&[(turn, turn + 1)])).unwrap();
            last = Some(id);
            id
        })
        .collect();
    pool.mark_suspect(&[ids[3]], "test").unwrap();
    assert!(pool.delete_point(ids[0], "old").is_ok());
    for kept in [ids[1], ids[2]] {
        assert!(matches!(pool.delete_point(kept, "old"), Err(PoolError::Kept { .. })));
    }
    assert!(pool.delete_point(ids[3], "suspect points do not count for the floor").is_ok());
}

#[test]
fn a_typo_never_becomes_a_pool() {
    let bench = Bench::new(12);
    let empty = environment::simulated::SimulatedFiles::new(1);
    let world = storage_pool::World { files: std::sync::Arc::new(empty.clone()), ..bench.world() };
    assert!(matches!(Pool::open(world, &bench.server, Access::Read), Err(PoolError::NoPool { .. })));
    assert_eq!(empty.snapshot().files().count(), 0);
}

/// A reader that only asks for points reads no run but its ends, and no pack; a chunk opens the index.
#[test]
fn a_list_of_points_does_not_open_the_index() {
    let bench = Bench::new(21);
    let pool = bench.writer().unwrap();
    let content: BTreeMap<u64, u64> = (0..40).map(|n| (n, n + 1)).collect();
    let a = put(&pool, 1, None, SIZE, &content).unwrap();
    drop(pool);
    let snapshot = bench.files.snapshot();
    let names: Vec<&str> =
        snapshot.files().map(|(name, _)| name).filter(|name| name.starts_with("packs/")).collect();
    let pool = bench.reader().unwrap();
    assert!(pool.point(a).is_ok());
    // What goes missing now is told when the index is opened, not before.
    names.iter().for_each(|name| bench.files.delete(name).unwrap());
    assert_eq!(pool.notes().len(), names.len());
}

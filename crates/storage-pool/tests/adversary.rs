//! Ways to lose data or to have a wrong point acknowledged, each tried once.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::time::Duration;

use environment::simulated::{Failure, Operation, ReadFault, When};
use environment::{Files, NewFile};
use model::{DatasourceId, RecoveryPointId};
use rig::{Content, Order, Rig, is_exact, store};
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::verify::Depth;
use storage_pool::{Ingest, PoolError, Settings};

fn id(n: u8) -> RecoveryPointId {
    RecoveryPointId([n; 16])
}

fn order(n: u8, base: Option<u8>, blocks: u64, changes: &[(u64, u64)]) -> Order {
    Order { id: id(n), datasource: n, base: base.map(id), blocks, changes: changes.iter().copied().collect() }
}

fn content(entries: &[(u64, u64)]) -> Content {
    entries.iter().copied().collect()
}

fn rig(seed: u64) -> Rig {
    Rig::new(seed, Settings::without_safety())
}

/// Names of the packs, with the blocks' packs first: they are the larger ones here.
fn packs(rig: &Rig) -> Vec<String> {
    let snapshot = rig.files.snapshot();
    let mut packs: Vec<(usize, String)> = snapshot
        .files()
        .filter(|(name, _)| name.starts_with("packs/"))
        .map(|(name, bytes)| (bytes.len(), name.to_owned()))
        .collect();
    packs.sort();
    packs.into_iter().rev().map(|(_, name)| name).collect()
}

/// INV-9: the short hash does not cover a frame's header, the seal does.
#[test]
fn a_frame_with_a_flipped_header_is_not_shared() {
    for bit in [8 * 8, 9 * 8 + 1, 12 * 8 + 3, 12 * 8 + 20] {
        let rig = rig(1);
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(1, None, 2, &[(0, 1)])).unwrap();
        drop(pool);
        rig.files.flip_bit(&packs(&rig)[0], 64 * 8 + bit).unwrap();
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(2, None, 2, &[(1, 1)])).unwrap();
        assert_eq!(is_exact(&pool, id(2), &content(&[(1, 1)])), Ok(true), "bit {bit}");
    }
}

/// What no reader would take must not be written.
#[test]
fn frames_and_records_that_cannot_be_read_back_are_not_written() {
    let rig = rig(2);
    let pool = rig.writer(1).unwrap();
    let ingest = Ingest::begin(&pool, pool.default_domain().unwrap()).unwrap();
    let huge = vec![0u8; 16 * 65_536 + 4096];
    let refused = ingest.put_blocks(true, &huge, &[[7; 32]]);
    assert!(matches!(refused, Err(PoolError::Misuse(_))), "{refused:?}");
    drop(ingest);
    let refused = pool.put_document("large", Some(&vec![1; 33 << 20]));
    assert!(matches!(refused, Err(PoolError::Misuse(_))), "{refused:?}");
    store(&pool, &order(1, None, 2, &[(0, 1)])).unwrap();
    drop(pool);
    assert!(rig.writer(1).unwrap().state().unreadable.is_empty());
}

/// INV-5: the record has its name, but the folder could not be synced. Nothing more is written by this process; the
/// next one finds the record and goes on after it.
#[test]
fn a_record_in_doubt_stops_the_writer() {
    let rig = rig(3);
    let pool = rig.writer(1).unwrap();
    rig.files.fail(When::Next(Operation::SyncFolder), Failure::Io);
    assert!(pool.put_document("a", Some(b"1")).is_err());
    let stopped = pool.put_document("b", Some(b"2")).unwrap_err();
    assert!(stopped.to_string().contains("open the storage pool again"), "{stopped}");
    assert!(store(&pool, &order(1, None, 2, &[(0, 1)])).is_err());
    drop(pool);
    let pool = rig.writer(1).unwrap();
    pool.put_document("b", Some(b"2")).unwrap();
    rig.files.cut_power();
    rig.files.reboot(1);
    let pool = rig.writer(1).unwrap();
    assert_eq!(pool.document("a").unwrap(), b"1");
    assert!(pool.state().unreadable.is_empty());
}

/// A process was killed between the name of a pack and the sync of its folder; the next process must not build upon
/// the pack before it is durable.
#[test]
fn what_a_killed_process_left_is_made_durable_before_it_is_used() {
    for seed in 0..40 {
        let rig = rig(100 + seed);
        let pool = rig.writer(1).unwrap();
        rig.files.start_trace();
        let begin = rig.files.operations();
        store(&pool, &order(1, None, 2, &[(0, 1)])).unwrap();
        let link = rig
            .files
            .trace()
            .into_iter()
            .find(|site| site.operation == Operation::Link && site.name.starts_with("packs/"))
            .unwrap();
        drop(pool);
        // The same again, killed right behind the link.
        let again = Rig::new(100 + seed, Settings::without_safety());
        let pool = again.writer(1).unwrap();
        assert_eq!(again.files.operations(), begin);
        again.files.kill_at(link.number + 1);
        assert!(store(&pool, &order(1, None, 2, &[(0, 1)])).is_err());
        drop(pool);
        let again = again.on(again.files.second_process());
        let pool = again.writer(1).unwrap();
        store(&pool, &order(2, None, 2, &[(0, 1)])).unwrap();
        drop(pool);
        again.files.cut_power();
        again.files.reboot(seed);
        let pool = again.reader().unwrap();
        assert_eq!(is_exact(&pool, id(2), &content(&[(0, 1)])), Ok(true), "seed {seed}");
    }
}

/// Two copies of a chunk; the one that a reclaim would keep has rotted unseen.
#[test]
fn reclaim_does_not_free_the_last_good_copy() {
    for which in 0..2 {
        let rig = rig(5);
        let pool = rig.writer(1).unwrap();
        // Two jobs at once do not know of each other's blocks.
        let domain = pool.default_domain().unwrap();
        let (a, b) = (Ingest::begin(&pool, domain).unwrap(), Ingest::begin(&pool, domain).unwrap());
        for ingest in [&a, &b] {
            let block = rig::block(1);
            ingest.put_blocks(true, &block.encoded, &[block.hash]).unwrap();
        }
        a.settle().unwrap();
        b.settle().unwrap();
        drop((a, b));
        let copies = packs(&rig);
        assert_eq!(copies.len(), 2);
        store(&pool, &order(1, None, 2, &[(0, 1)])).unwrap();
        drop(pool);
        let mut copies = copies;
        copies.sort();
        rig.files.flip_bit(&copies[which], (64 + 40) * 8).unwrap();
        let pool = rig.writer(1).unwrap();
        for _ in 0..3 {
            pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
        }
        assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1)])), Ok(true), "copy {which} rotted");
    }
}

/// A pack is gone. It stays known, also after the index was written anew, so that no backup builds upon its blocks.
#[test]
fn a_missing_pack_is_not_forgotten() {
    let rig = rig(6);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1), (1, 2)])).unwrap();
    drop(pool);
    let lost = packs(&rig)[0].clone();
    rig.files.delete(&lost).unwrap();
    for n in 0..15 {
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(10 + n, None, 2, &[(0, 5 + u64::from(n))])).unwrap();
    }
    let pool = rig.writer(1).unwrap();
    assert!(pool.has_known_damage());
    let refused = store(&pool, &Order { datasource: 1, ..order(2, Some(1), 3, &[(2, 3)]) });
    assert!(matches!(refused, Err(PoolError::ChunkLost { .. })), "{refused:?}");
    // With the lost blocks stored again it goes, and the old point heals.
    store(&pool, &order(3, Some(1), 3, &[(0, 1), (1, 2), (2, 3)])).unwrap();
    assert_eq!(is_exact(&pool, id(3), &content(&[(0, 1), (1, 2), (2, 3)])), Ok(true));
    assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1), (1, 2)])), Ok(true));
    // Then nothing needs the missing pack any more, and it stops being missed.
    for _ in 0..2 {
        pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    }
    drop(pool);
    let pool = rig.writer(1).unwrap();
    assert!(!pool.has_known_damage() && pool.notes().is_empty(), "{:?}", pool.notes());
}

/// A bad sector in a file that can be made again costs no point, no backup and no reclaim.
#[test]
fn a_run_with_a_bad_sector_is_made_again() {
    let rig = rig(7);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1), (1, 2)])).unwrap();
    let runs: Vec<String> = rig
        .files
        .snapshot()
        .files()
        .map(|(name, _)| name.to_owned())
        .filter(|name| name.starts_with("index/"))
        .collect();
    runs.iter().for_each(|run| rig.files.fail_reads(run, ReadFault::Io));
    assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1), (1, 2)])), Ok(true));
    store(&pool, &order(2, None, 3, &[(0, 1), (1, 4)])).unwrap();
    pool.delete_point(id(2), "test").unwrap();
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    drop(pool);
    let pool = rig.writer(1).unwrap();
    assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1), (1, 2)])), Ok(true));
}

/// A bad sector in a pack is damage to be told, not the end of opening and verifying.
#[test]
fn a_pack_with_a_bad_sector_does_not_keep_the_rest_from_being_verified() {
    let rig = rig(8);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1), (1, 2)])).unwrap();
    let bad = packs(&rig)[0].clone();
    store(&pool, &order(2, None, 3, &[(0, 3), (1, 4)])).unwrap();
    drop(pool);
    rig.files.fail_reads(&bad, ReadFault::Io);
    let pool = rig.writer(1).unwrap();
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert_eq!(report.damaged_points, [id(1)]);
    assert_eq!(is_exact(&pool, id(2), &content(&[(0, 3), (1, 4)])), Ok(true));
    let runs: Vec<String> = rig
        .files
        .snapshot()
        .files()
        .map(|(name, _)| name.to_owned())
        .filter(|name| name.starts_with("index/"))
        .collect();
    drop(pool);
    runs.iter().for_each(|run| rig.files.delete(run).unwrap());
    let pool = rig.writer(1).unwrap();
    assert_eq!(is_exact(&pool, id(2), &content(&[(0, 3), (1, 4)])), Ok(true));
}

/// What lay behind the end of a disk does not come back when the disk grows again.
#[test]
fn a_disk_that_shrank_and_grew_has_zeros_there() {
    let rig = rig(9);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 5, &[(0, 1), (4, 2)])).unwrap();
    store(&pool, &order(2, Some(1), 3, &[(1, 3)])).unwrap();
    store(&pool, &order(3, Some(2), 5, &[])).unwrap();
    assert_eq!(is_exact(&pool, id(3), &content(&[(0, 1), (1, 3)])), Ok(true));
}

#[test]
fn a_point_is_not_made_from_an_expired_one() {
    let rig = rig(10);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1)])).unwrap();
    pool.delete_point(id(1), "test").unwrap();
    rig.clock.advance(Duration::from_secs(60));
    pool.tick().unwrap();
    let refused = store(&pool, &order(2, Some(1), 3, &[(1, 2)]));
    assert!(matches!(refused, Err(PoolError::Misuse(_))), "{refused:?}");
}

/// A read of the last record that fails once must not leave a mark for ever.
#[test]
fn a_record_that_could_not_be_read_once_is_fine_afterwards() {
    let rig = rig(11);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1)])).unwrap();
    let last = format!("sequence/{:016x}.record", pool.state().head);
    drop(pool);
    for fault in [ReadFault::Io, ReadFault::FlipBit(999)] {
        rig.files.fail_reads(&last, fault);
        let pool = rig.writer(1).unwrap();
        assert_eq!(pool.state().unreadable.len(), 1);
        store(
            &pool,
            &Order { id: RecoveryPointId(pool.random_id().unwrap()), ..order(2, None, 3, &[(0, 2)]) },
        )
        .unwrap();
        drop(pool);
        rig.files.clear_faults();
        let pool = rig.writer(1).unwrap();
        assert_eq!(pool.state().unreadable, []);
        assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1)])), Ok(true));
    }
}

/// A file of a newer program: nothing is written beside it, and a flipped bit is not taken for one.
#[test]
fn a_newer_record_keeps_this_program_from_writing() {
    let rig = rig(12);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1)])).unwrap();
    let last = format!("sequence/{:016x}.record", pool.state().head);
    drop(pool);
    let mut bytes = rig.files.read(&last, 1 << 20).unwrap();
    bytes[8] = 2;
    bytes[10] = 2;
    rig.files.set_bytes(&last, bytes.clone());
    assert!(rig.writer(1).is_ok(), "a flipped version is damage");
    let end = bytes.len() - 32;
    let hash = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(hash.as_bytes());
    rig.files.set_bytes(&last, bytes);
    assert!(matches!(rig.writer(1), Err(PoolError::TooNew { needs: 2, .. })));
    assert!(rig.reader().is_ok());
}

/// A full disk keeps nobody from opening the pool and reading from it.
#[test]
fn a_full_disk_opens() {
    let rig = rig(13);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1)])).unwrap();
    // A job was killed: its pack is in no run.
    let ingest = Ingest::begin(&pool, pool.default_domain().unwrap()).unwrap();
    let block = rig::block(9);
    ingest.put_blocks(true, &block.encoded, &[block.hash]).unwrap();
    rig.files.fail(When::Every(Operation::Link), Failure::Io);
    assert!(ingest.settle().is_err());
    drop(ingest);
    drop(pool);
    rig.files.clear_faults();
    let runs: Vec<String> = rig
        .files
        .snapshot()
        .files()
        .map(|(name, _)| name.to_owned())
        .filter(|name| name.starts_with("index/"))
        .collect();
    runs.iter().for_each(|run| rig.files.delete(run).unwrap());
    rig.files.set_capacity(Some(0));
    let pool = rig.writer(1).unwrap();
    assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1)])), Ok(true));
    assert!(matches!(store(&pool, &order(2, None, 3, &[(0, 2)])), Err(PoolError::Full { .. })));
    rig.files.set_capacity(None);
    store(&pool, &order(3, None, 3, &[(0, 2)])).unwrap();
}

/// Files of an attacker without keys: huge, sparse, under fitting names. Nothing is believed, little memory is used.
#[test]
fn hostile_files_are_damage() {
    let rig = rig(14);
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, 3, &[(0, 1)])).unwrap();
    drop(pool);
    let mut run =
        rig.files.snapshot().files().find(|(name, _)| name.starts_with("index/")).unwrap().1.to_vec();
    run[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    run[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut file: Box<dyn NewFile> = rig.files.create("index/00000000000000ff.run").unwrap();
    file.append(&run).unwrap();
    file.publish().unwrap();
    // An entry that sends a shared block to another chunk: the page's check value is keyed.
    let name = "index/0000000000000001.run";
    let mut run = rig.files.read(name, 1 << 20).unwrap();
    let page = 64;
    run[page + 19] ^= 1;
    let hash = blake3::hash(&run[page..page + 4080]);
    run[page + 4080..page + 4096].copy_from_slice(&hash.as_bytes()[..16]);
    rig.files.set_bytes(name, run);
    rig.files.set_bytes("packs/ff/ffffffffffffffffffffffffffffffff.pack", vec![0xff; 100_000]);
    rig.files.set_bytes("sequence/ffffffffffffffff.record", vec![0; 500]);
    let pool = rig.writer(1).unwrap();
    assert_eq!(is_exact(&pool, id(1), &content(&[(0, 1)])), Ok(true));
    store(&pool, &order(2, None, 3, &[(0, 1), (1, 5)])).unwrap();
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert_eq!(report.damaged_points, []);
    assert!(report.damage.len() >= 3, "{report:?}");
    assert_eq!(pool.point(id(2)).unwrap().datasource, DatasourceId([2; 16]));
}

//! Bugs that other backup programs had and that no other test here would have noticed: docs/mutations.md.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use environment::simulated::{ReadFault, SimulatedFiles};
use model::RecoveryPointId;
use rig::{NOW, Order, Rig, block, is_exact, store};
use storage_pool::format::pack;
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::{FullCompare, Ingest, NewDisk, NewPoint, PoolError, Settings};

fn order(n: u8, base: Option<u8>, changes: &[(u64, u64)]) -> Order {
    let id = |n| RecoveryPointId([n; 16]);
    Order {
        id: id(n),
        datasource: 1,
        base: base.map(id),
        blocks: 3,
        changes: changes.iter().copied().collect(),
    }
}

/// INV-8: an encoder that made something else of a block (restic #4677), or an index that names a wrong place (bupstash
/// #357). The seal fits, the content is not what its id says, so nobody gets it.
#[test]
fn a_chunk_that_is_not_what_its_id_says_is_not_read() {
    let rig = Rig::new(31, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    let like = order(1, None, &[(1, 2)]);
    store(&pool, &like).unwrap();
    let ingest = Ingest::begin(&pool, pool.default_domain().unwrap()).unwrap();
    let mut editor = ingest.edit_map(None, 2 * rig::BLOCK as u64).unwrap();
    let mut nodes = ingest.nodes();
    // The bytes of block 3 under the hash of block 1.
    let id = ingest.put_blocks(true, &block(3).encoded, &[block(1).hash]).unwrap()[0];
    editor.set(0, Some(id), &mut nodes).unwrap();
    let map = editor.finish(&mut nodes).unwrap();
    let point = pool.point(like.id).unwrap();
    let details = point.details();
    let new = NewPoint {
        datasource: point.datasource,
        machine: point.machine,
        host: details.host,
        base: None,
        captured: point.captured,
        consistency: point.consistency,
        evidence: details.evidence,
        cause: details.cause,
        job: None,
        figures: details.figures,
        definition: details.definition,
        incomplete: false,
    };
    let disk = NewDisk {
        index: 0,
        size: 2 * rig::BLOCK as u64,
        sector: 512,
        map,
        description: String::new(),
        audit_next: 0,
        full_compare: FullCompare::Now,
    };
    ingest.commit(RecoveryPointId([2; 16]), new, vec![disk]).unwrap();
    drop(pool);
    let pool = rig.reader().unwrap();
    let read = is_exact(&pool, RecoveryPointId([2; 16]), &[(0, 1)].into());
    assert!(read.is_err(), "{read:?}");
    assert_eq!(is_exact(&pool, like.id, &like.changes), Ok(true));
}

/// INV-8: two copies of a pool went on apart and were put together again. Each record is whole and authentic; that they
/// do not follow each other is what tells.
#[test]
fn records_of_two_histories_are_told_apart() {
    let rig = Rig::new(32, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1)])).unwrap();
    let head = pool.state().head;
    drop(pool);
    let before = rig.files.snapshot();
    let goes_on = |seed: u64, words: &[&str]| {
        let copy = rig.on(SimulatedFiles::from_snapshot(seed, &before));
        let pool = copy.writer(1).unwrap();
        for word in words {
            pool.put_document("policy", Some(word.as_bytes())).unwrap();
        }
        drop(pool);
        copy.files.snapshot()
    };
    let (one, mut other) = (goes_on(1, &["one", "two"]), goes_on(2, &["other"]));
    let name = format!("sequence/{:016x}.record", head + 2);
    other.insert(&name, one.get(&name).unwrap().to_vec());
    let mixed = rig.on(SimulatedFiles::from_snapshot(3, &other));
    let pool = mixed.reader().unwrap();
    let unreadable = pool.state().unreadable.clone();
    assert!(unreadable.iter().any(|record| record.number == head + 2), "{unreadable:?}");
    drop(pool);
    let pool = mixed.writer(1).unwrap();
    let stopped = pool.reclaim(Default::default(), &mixed.deletion());
    assert!(matches!(stopped, Err(PoolError::Stopped { .. })), "{stopped:?}");
}

/// INV-19: a clock that was set back does not make deleted points older.
#[test]
fn pool_time_does_not_move_when_the_clock_goes_back() {
    let rig = Rig::new(33, Settings::default());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1)])).unwrap();
    let before = pool.state().pool_time;
    for years in [1, 10, 50] {
        rig.clock.jump_to(NOW - years * 365 * 86_400_000_000);
        pool.tick().unwrap();
        assert_eq!(pool.state().pool_time, before, "{years} years back");
    }
    drop(pool);
    assert_eq!(rig.reader().unwrap().state().pool_time, before);
}

/// INV-2, INV-5: the storage took a record and gives back other bytes. Nothing is acknowledged, and nothing more is
/// written before the sequence was read anew.
#[test]
fn a_record_that_reads_back_differently_is_not_acknowledged() {
    for fault in [ReadFault::FlipBit(900), ReadFault::Instead(Vec::new()), ReadFault::Misdirected { by: 16 }]
    {
        let rig = Rig::new(34, Settings::without_safety());
        let pool = rig.writer(1).unwrap();
        let name = format!("sequence/{:016x}.record", pool.state().head + 1);
        rig.files.fail_reads(&name, fault.clone());
        let refused = pool.put_document("policy", Some(b"new"));
        assert!(refused.is_err(), "{fault:?}");
        rig.files.clear_faults();
        assert!(pool.put_document("other", Some(b"new")).is_err(), "{fault:?}");
        drop(pool);
        let pool = rig.writer(1).unwrap();
        assert!(pool.state().unreadable.is_empty());
        pool.put_document("other", Some(b"new")).unwrap();
    }
}

/// INV-3, INV-11: a backup while packs wait for their end (duplicacy #98, #335, kopia #1949). Nothing new stands on them: where
/// they are gone, the new point is whole.
#[test]
fn nothing_new_stands_on_packs_in_quarantine() {
    let rig = Rig::new(35, Settings { reclaim_hold: 3 * 86_400, ..Settings::without_safety() });
    let pool = rig.writer(1).unwrap();
    let first = order(1, None, &[(0, 2), (1, 3)]);
    store(&pool, &first).unwrap();
    pool.delete_point(first.id, "test").unwrap();
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    let waiting: Vec<_> = pool.state().quarantined.keys().copied().collect();
    assert!(!waiting.is_empty());
    let again = order(2, None, &[(0, 2), (1, 3)]);
    store(&pool, &again).unwrap();
    drop(pool);
    let mut snapshot = rig.files.snapshot();
    waiting.iter().for_each(|id| snapshot.remove(&pack::name(*id)));
    let without = rig.on(SimulatedFiles::from_snapshot(36, &snapshot)).reader().unwrap();
    assert_eq!(is_exact(&without, again.id, &again.changes), Ok(true));
}

//! Parity in packs (section 6.1): what rots within its promise is read exactly, told and stored again; what rots beyond is
//! told, and nothing is ever wrong.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use block_io::BlockDevice;
use common::{BLOCK, Bench, block, check, put};
use environment::Files;
use environment::simulated::{SimulatedFiles, Snapshot};
use model::RecoveryPointId;
use storage_pool::copy::{Copy, CopyOptions};
use storage_pool::keyless::verify_hashes;
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::verify::{Depth, VerifyOptions};
use storage_pool::{Damage, Pool, Settings, StoredAgain};

const SECTOR: usize = 4096;

struct Prepared {
    bench: Bench,
    snapshot: Snapshot,
    point: RecoveryPointId,
    content: BTreeMap<u64, u64>,
    /// The pack of blocks, its bytes without parity, and its groups.
    pack: String,
    content_bytes: usize,
    groups: usize,
}

fn prepare(percent: u32) -> Prepared {
    let settings = Settings { parity_percent: percent, ..Settings::without_safety() };
    let bench = Bench::with(1, settings);
    let pool = bench.writer().unwrap();
    assert_eq!(pool.settings().parity_percent, percent, "it is kept in the header");
    let content: BTreeMap<u64, u64> = (0..6).map(|at| (at, 1 + at)).collect();
    let point = put(&pool, 1, None, 8 * BLOCK as u64, &content).unwrap();
    drop(pool);
    let snapshot = bench.files.snapshot();
    let pack = snapshot
        .files()
        .filter(|(name, _)| name.ends_with(".pack"))
        .max_by_key(|(_, bytes)| bytes.len())
        .map(|(name, _)| name.to_owned())
        .unwrap();
    let bytes = snapshot.get(&pack).unwrap();
    let footer = &bytes[bytes.len() - 64..];
    assert_eq!(&footer[..8], b"STPPARI1");
    let content_bytes = u64::from_le_bytes(footer[8..16].try_into().unwrap()) as usize;
    let groups = u32::from_le_bytes(footer[20..24].try_into().unwrap()) as usize;
    Prepared { bench, snapshot, point, content, pack, content_bytes, groups }
}

impl Prepared {
    fn with(&self, change: impl FnOnce(&mut Vec<u8>)) -> Bench {
        let mut snapshot = self.snapshot.clone();
        let mut bytes = snapshot.get(&self.pack).unwrap().to_vec();
        change(&mut bytes);
        snapshot.insert(&self.pack, bytes);
        self.on(&snapshot)
    }

    fn on(&self, snapshot: &Snapshot) -> Bench {
        Bench {
            files: SimulatedFiles::from_snapshot(1, snapshot),
            clock: self.bench.clock.clone(),
            random: self.bench.random.clone(),
            server: self.bench.server.clone(),
            kit: self.bench.kit.clone(),
            domain: self.bench.domain,
        }
    }

    /// Whether verify names the pack, and all of the point is there; and the sectors that it rebuilt.
    fn named(&self, pool: &Arc<Pool>) -> Option<u64> {
        let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        assert_eq!(report.good_points, 1, "{report:?}");
        assert!(report.new_damage.is_empty(), "{report:?}");
        let is_named = report
            .damage
            .iter()
            .any(|damage| matches!(damage, Damage::File { path, .. } if path.ends_with(&self.pack)));
        is_named.then(|| report.repairs.iter().map(|repair| repair.sectors).sum())
    }
}

#[test]
fn a_sound_pack_is_clean_and_costs_its_percent() {
    let prepared = prepare(10);
    let pool = prepared.bench.reader().unwrap();
    let mark = pool.rebuilt_mark();
    check(&pool, prepared.point, &prepared.content);
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert!(report.is_clean() && report.repairs.is_empty(), "{report:?}");
    assert_eq!(pool.rebuilt_since(mark), []);
    assert_eq!(prepared.groups, prepared.content_bytes.div_ceil(SECTOR).div_ceil(10));
}

/// Any bit of the file: everything is read exactly, and the file is named. Each bit of a smaller one: `golden.rs`.
#[test]
fn any_flipped_bit_is_survived_and_named() {
    let prepared = prepare(10);
    let length = prepared.snapshot.get(&prepared.pack).unwrap().len();
    let every = (0..length).step_by(1499).chain(0..160).chain(length - 300..length);
    let around = prepared.content_bytes - 200..(prepared.content_bytes + 200).min(length);
    for at in every.chain(around) {
        let bench = prepared.with(|bytes| bytes[at] ^= 1 << (at % 8));
        let pool = bench.reader().unwrap();
        check(&pool, prepared.point, &prepared.content);
        let sectors = u64::from(at < prepared.content_bytes);
        assert_eq!(prepared.named(&pool), Some(sectors), "byte {at} of {length}");
    }
}

/// A hole of a sector, two that lie side by side, and a run of as many sectors as there are groups, wherever they lie.
#[test]
fn holes_within_the_promise_are_survived() {
    let prepared = prepare(10);
    let length = prepared.snapshot.get(&prepared.pack).unwrap().len();
    // Not at a multiple of a sector: two are hit, which are in different groups.
    for (size, step) in [(SECTOR, SECTOR / 2 + 64), (2 * SECTOR, 3 * SECTOR)] {
        for from in (0..length - size).step_by(step) {
            let bench = prepared.with(|bytes| bytes[from..from + size].fill(0));
            let pool = bench.reader().unwrap();
            check(&pool, prepared.point, &prepared.content);
            assert!(prepared.named(&pool).is_some(), "{size} at {from}");
        }
    }
    let run = prepared.groups * SECTOR;
    assert!(prepared.groups > 5);
    for from in (0..prepared.content_bytes - run).step_by(SECTOR) {
        let bench = prepared.with(|bytes| bytes[from..from + run].fill(0xA5));
        let pool = bench.reader().unwrap();
        check(&pool, prepared.point, &prepared.content);
        assert_eq!(prepared.named(&pool), Some(prepared.groups as u64), "at {from}");
    }
    // The parity itself cut off: nothing of the pack is lost.
    let bench = prepared.with(|bytes| bytes.truncate(prepared.content_bytes + SECTOR + 4096));
    let pool = bench.reader().unwrap();
    check(&pool, prepared.point, &prepared.content);
    assert_eq!(prepared.named(&pool), Some(0));
}

/// Two sectors of one group: lost, told, and never other bytes.
#[test]
fn beyond_the_promise_it_is_damage_and_never_wrong() {
    let prepared = prepare(1);
    let step = prepared.groups * SECTOR;
    for from in (SECTOR..prepared.content_bytes - step - SECTOR).step_by(3 * SECTOR) {
        let bench = prepared.with(|bytes| {
            bytes[from] ^= 1;
            bytes[from + step] ^= 1;
        });
        let pool = bench.reader().unwrap();
        let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        let device = pool.open_disk(prepared.point, 0).unwrap();
        let mut lost = 0;
        let mut buf = vec![0u8; BLOCK];
        for (&at, &content) in &prepared.content {
            match device.read_at(at * BLOCK as u64, &mut buf) {
                Ok(()) => assert!(buf == block(content), "wrong bytes"),
                Err(error) => {
                    assert!(error.to_string().contains("of the same group is damaged"), "{error}");
                    lost += 1;
                }
            }
        }
        assert!(lost >= 1 && report.lost_blocks == lost, "at {from}: {lost} lost, {report:?}");
    }
}

/// Every reader says what it had from parity; who looks without keys too.
#[test]
fn readers_tell_what_was_rebuilt() {
    let prepared = prepare(10);
    let id = prepared.pack[9..41].to_owned();
    let bench = prepared.with(|bytes| {
        bytes[64 + 32 + 500] ^= 1;
        bytes[4 * SECTOR + 1] ^= 1;
        // The table, behind the last frame.
        bytes[prepared.content_bytes - 100] ^= 1;
    });
    let pool = bench.reader().unwrap();
    let mark = pool.rebuilt_mark();
    check(&pool, prepared.point, &prepared.content);
    let told = pool.rebuilt_since(mark);
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].pack.to_string(), told[0].sectors >= 2), (id.clone(), true));
    let files: Arc<dyn Files> = Arc::new(bench.files.clone());
    let report = verify_hashes(&files, &VerifyOptions::new(Depth::Hashes), &mut |_, _| true).unwrap();
    assert_eq!(report.repairable.len(), 1, "{report:?}");
    assert_eq!((report.repairable[0].pack.to_string(), report.repairable[0].sectors), (id, 3));
    assert!(!report.damage.is_empty());
    // The index made again of the packs alone.
    let mut snapshot = bench.files.snapshot();
    let runs: Vec<String> =
        snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.ends_with(".run")).collect();
    runs.iter().for_each(|name| snapshot.remove(name));
    let pool = prepared.on(&snapshot).reader().unwrap();
    check(&pool, prepared.point, &prepared.content);
    let is_told = |damage: &Damage| matches!(damage, Damage::File { path, reason, .. } if path.ends_with(&prepared.pack) && reason.contains("parity"));
    assert!(pool.notes().iter().any(is_told), "{:?}", pool.notes());
}

/// A verify that may write stores it again: the next one needs no parity, and a reclaim frees the old pack.
#[test]
fn verify_stores_a_damaged_pack_again() {
    for depth in [Depth::Hashes, Depth::ReadData] {
        let prepared = prepare(10);
        let bench = prepared.with(|bytes| bytes[64 + 32 + 500] ^= 1);
        let pool = bench.writer().unwrap();
        let report = pool.verify(depth, &mut |_, _| true).unwrap();
        assert!(
            matches!(report.stored_again[..], [StoredAgain::Done { bytes, .. }] if bytes > 6 * BLOCK as u64)
        );
        assert_eq!(
            (report.good_points, report.repairs[0].sectors, report.lost_blocks),
            (1, 1, 0),
            "{report:?}"
        );
        let mark = pool.rebuilt_mark();
        check(&pool, prepared.point, &prepared.content);
        assert_eq!(pool.rebuilt_since(mark), [], "what is read is the new pack");
        let disk = pool.point(prepared.point).unwrap().disks[0].clone();
        let map = storage_pool::MapRoot { root: disk.root, levels: disk.levels };
        assert_eq!(pool.lost_blocks(bench.domain, map).unwrap(), []);
        // Nothing more to do, and still told: it lies there.
        let again = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        assert!(again.stored_again.is_empty() && !again.is_clean(), "{again:?}");
        for _ in 0..2 {
            bench.clock.advance(std::time::Duration::from_secs(1));
            pool.reclaim(ReclaimOptions::default(), &bench.deletion()).unwrap();
        }
        assert!(bench.files.snapshot().get(&prepared.pack).is_none(), "the damaged pack is gone");
        let clean = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        assert!(clean.is_clean(), "{clean:?}");
        check(&pool, prepared.point, &prepared.content);
    }
}

/// One frame beyond the promise, another within: the second is stored again, and the first is what it was.
#[test]
fn what_parity_gives_of_a_lost_pack_is_stored_again() {
    let prepared = prepare(1);
    let step = prepared.groups * SECTOR;
    let bench = prepared.with(|bytes| {
        // In the first frame twice the same group, in the last one a single sector of another group, if there is one.
        bytes[SECTOR + 1] ^= 1;
        bytes[SECTOR + step + 1] ^= 1;
    });
    let pool = bench.writer().unwrap();
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert_eq!((report.lost_blocks, report.damaged_points.len()), (1, 1), "{report:?}");
    assert!(report.stored_again.is_empty(), "{report:?}");
    // The source still has the block.
    let point = put(&pool, 2, None, 8 * BLOCK as u64, &prepared.content).unwrap();
    check(&pool, point, &prepared.content);
    check(&pool, prepared.point, &prepared.content);
}

/// The power goes at each call of storage while a verify stores again: whatever is there after it, the point is exact, and
/// the next verify ends the work.
#[test]
fn a_crash_while_storing_again_loses_nothing() {
    let prepared = prepare(10);
    let bench = prepared.with(|bytes| bytes[64 + 32 + 500] ^= 1);
    let damaged = bench.files.snapshot();
    let verify = |bench: &Bench| {
        let pool = bench.writer()?;
        pool.verify(Depth::ReadData, &mut |_, _| true)
    };
    let whole = prepared.on(&damaged);
    verify(&whole).unwrap();
    let changes = whole.files.changes();
    assert!(changes > 12, "{changes}");
    let mut states = 0;
    for change in 1..=changes {
        let bench = prepared.on(&damaged);
        bench.files.crash_at_change(change);
        let _ = verify(&bench);
        bench.files.cut_power();
        for state in bench.files.crash_states(64).states {
            let after = prepared.on(&state);
            let pool = after.reader().unwrap();
            check(&pool, prepared.point, &prepared.content);
            drop(pool);
            verify(&after).unwrap();
            let pool = after.reader().unwrap();
            let mark = pool.rebuilt_mark();
            check(&pool, prepared.point, &prepared.content);
            assert_eq!(pool.rebuilt_since(mark), [], "change {change}");
            states += 1;
        }
    }
    println!("\nresult: {states} states after {changes} places of a crash");
}

/// No room: it is said, and everything stays as it was.
#[test]
fn without_room_nothing_is_lost() {
    let settings = Settings { parity_percent: 10, reserve: Some(1 << 20), ..Settings::without_safety() };
    let bench = Bench::with(1, settings);
    let pool = bench.writer().unwrap();
    let content: BTreeMap<u64, u64> = (0..6).map(|at| (at, 1 + at)).collect();
    let point = put(&pool, 1, None, 8 * BLOCK as u64, &content).unwrap();
    drop(pool);
    let snapshot = bench.files.snapshot();
    let packs = snapshot.files().filter(|(name, _)| name.ends_with(".pack"));
    let (pack, _) = packs.max_by_key(|(_, bytes)| bytes.len()).unwrap();
    bench.files.flip_bit(pack, (64 + 32 + 500) * 8).unwrap();
    let used: u64 = snapshot.files().map(|(_, bytes)| bytes.len() as u64).sum();
    bench.files.set_capacity(Some(used + (1 << 20)));
    let pool = bench.writer().unwrap();
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert!(matches!(&report.stored_again[..], [StoredAgain::Not { .. }]), "{report:?}");
    check(&pool, point, &content);
}

/// A second copy of a damaged pack is the pack as it was.
#[test]
fn a_copy_is_whole() {
    let prepared = prepare(10);
    let length = prepared.snapshot.get(&prepared.pack).unwrap().len();
    for at in [20, 64 + 32 + 500, prepared.content_bytes - 10, prepared.content_bytes + SECTOR, length - 1] {
        let bench = prepared.with(|bytes| bytes[at] ^= 1);
        let copy = prepared.on(&Snapshot::default());
        let made = Copy::begin(bench.world(), copy.world()).unwrap();
        let report = made.run(CopyOptions::default(), None, &mut |_, _| true).unwrap();
        assert!(report.damage.is_empty(), "{report:?}");
        let [repaired] = report.repaired[..] else { panic!("{report:?}") };
        assert_eq!(repaired.sectors, u64::from(at < prepared.content_bytes), "byte {at}");
        assert!(
            copy.files.snapshot().get(&prepared.pack) == prepared.snapshot.get(&prepared.pack),
            "byte {at}"
        );
        // What is there is not copied again, and a whole look at it finds nothing.
        let again = made.run(CopyOptions { verify: true, ..CopyOptions::default() }, None, &mut |_, _| true);
        let again = again.unwrap();
        assert!(again.packs_copied == 0 && again.damage.is_empty(), "{again:?}");
    }
    let step = prepared.groups * SECTOR;
    let bench = prepared.with(|bytes| {
        bytes[SECTOR] ^= 1;
        bytes[SECTOR + step] ^= 1;
    });
    let copy = prepared.on(&Snapshot::default());
    let made = Copy::begin(bench.world(), copy.world()).unwrap();
    let report = made.run(CopyOptions::default(), None, &mut |_, _| true).unwrap();
    assert_eq!((report.damage.len(), report.repaired.len()), (1, 0), "{report:?}");
}

/// A rewriting reclaim takes what it needs of a damaged pack by its parity, and what it writes has parity of its own.
#[test]
fn reclaim_rewrites_by_parity() {
    let settings = Settings { parity_percent: 10, ..Settings::without_safety() };
    let bench = Bench::with(3, settings);
    let pool = bench.writer().unwrap();
    let all: BTreeMap<u64, u64> = (0..8).map(|at| (at, 100 + at)).collect();
    let first = put(&pool, 1, None, 8 * BLOCK as u64, &all).unwrap();
    let changes: BTreeMap<u64, u64> = (0..6).map(|at| (at, 200 + at)).collect();
    let second = put(&pool, 1, Some(first), 8 * BLOCK as u64, &changes).unwrap();
    let content: BTreeMap<u64, u64> = all.into_iter().chain(changes).collect();
    let snapshot = bench.files.snapshot();
    let packs = snapshot.files().filter(|(name, _)| name.ends_with(".pack"));
    let (pack, bytes) = packs.max_by_key(|(_, bytes)| bytes.len()).unwrap();
    // In the last of eight frames of a block each.
    let last = 64 + 7 * (32 + BLOCK + 16).next_multiple_of(64);
    assert!(bytes.len() > last + BLOCK);
    bench.files.flip_bit(pack, (last as u64 + 5000) * 8).unwrap();
    drop(pool);
    let pool = bench.writer().unwrap();
    pool.delete_point(first, "test").unwrap();
    let mark = pool.rebuilt_mark();
    for _ in 0..2 {
        bench.clock.advance(std::time::Duration::from_secs(1));
        pool.reclaim(ReclaimOptions::default(), &bench.deletion()).unwrap();
    }
    assert_eq!(pool.rebuilt_since(mark).len(), 1);
    assert!(bench.files.snapshot().get(pack).is_none(), "it was rewritten");
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert!(report.is_clean(), "{report:?}");
    check(&pool, second, &content);
    for (name, bytes) in bench.files.snapshot().files().filter(|(name, _)| name.ends_with(".pack")) {
        assert_eq!(&bytes[bytes.len() - 64..bytes.len() - 56], b"STPPARI1", "{name}");
    }
}

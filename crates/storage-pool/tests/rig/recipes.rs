//! The golden pools: one for each feature of the format, named by what it holds, made from a seed.
//!
//! `STILLPOINT_BLESS=1 cargo test -p storage-pool --test golden again` writes the fixtures anew; fixtures/golden-v1/README.md
//! says when that may be done.

use std::collections::BTreeMap;
use std::time::Duration;

use environment::simulated::SimulatedFiles;
use model::{Cause, Consistency, DatasourceId, RecoveryPointId, Timestamp};
use storage_pool::kit::Recipient;
use storage_pool::reclaim::{DeletionService, ReclaimOptions};
use storage_pool::verify::Depth;
use storage_pool::{FullCompare, Ingest, NewDisk, NewPoint, PoolError, Settings};

use super::golden::{self, Golden};
use super::{BLOCK, Content, NOW, Order, Rig, block, store};

const DAY: u64 = 86_400;

/// A golden pool.
pub struct Recipe {
    /// Its file is `NAME.tar`.
    pub name: &'static str,
    pub make: fn() -> Made,
}

/// A golden pool as it was made, and what must be found in it.
pub struct Made {
    pub golden: Golden,
    /// Disks that are not in `golden.points`.
    pub further: Vec<(RecoveryPointId, u32, Vec<u8>)>,
    /// Files that are damaged, and told as such.
    pub damaged: Vec<String>,
    /// Files that nothing reads any more: damage of them need not be told.
    pub unread: Vec<String>,
}

impl From<Golden> for Made {
    fn from(golden: Golden) -> Made {
        Made { golden, further: Vec::new(), damaged: Vec::new(), unread: Vec::new() }
    }
}

pub const RECIPES: &[Recipe] = &[
    Recipe { name: "pool", make: || golden::make().into() },
    Recipe { name: "plain", make: plain },
    Recipe { name: "cloned", make: cloned },
    Recipe { name: "frames", make: frames },
    Recipe { name: "reclaimed", make: reclaimed },
    Recipe { name: "permit-not-carried-out", make: permit_not_carried_out },
    Recipe { name: "stored-again", make: stored_again },
    Recipe { name: "restored-record", make: restored_record },
    Recipe { name: "merged-runs-and-bundles", make: merged },
    Recipe { name: "rotated-keys", make: rotated },
    Recipe { name: "kit-of-a-later-generation", make: late_kit },
    Recipe { name: "parity", make: parity },
    Recipe { name: "parity-rotten", make: parity_rotten },
];

/// A pool in the making.
struct Making {
    rig: Rig,
    points: BTreeMap<RecoveryPointId, Content>,
}

fn id(n: u8) -> RecoveryPointId {
    RecoveryPointId([n; 16])
}

impl Making {
    fn new(seed: u64) -> Making {
        Making::with(seed, Settings::without_safety())
    }

    fn with(seed: u64, settings: Settings) -> Making {
        Making { rig: Rig::new(golden::SEED + seed, settings), points: BTreeMap::new() }
    }

    /// Stores a point, in a process of its own.
    fn put(&mut self, n: u8, datasource: u8, base: Option<u8>, blocks: u64, changes: &[(u64, u64)]) {
        let order = Order {
            id: id(n),
            datasource,
            base: base.map(id),
            blocks,
            changes: changes.iter().copied().collect(),
        };
        store(&self.rig.writer(1).unwrap(), &order).unwrap();
        let mut content = base.map(|base| self.points[&id(base)].clone()).unwrap_or_default();
        content.extend(&order.changes);
        self.points.insert(order.id, content);
        self.rig.clock.advance(Duration::from_secs(600));
    }

    /// Has the files removed that others replaced.
    fn tidy(&self) {
        let pool = self.rig.writer(1).unwrap();
        pool.reclaim(ReclaimOptions::default(), &self.rig.deletion()).unwrap();
    }

    fn done(self) -> Made {
        Golden { snapshot: self.rig.files.snapshot(), rig: self.rig, points: self.points }.into()
    }

    fn files(&self, folder: &str) -> Vec<String> {
        let snapshot = self.rig.files.snapshot();
        snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.starts_with(folder)).collect()
    }
}

/// One machine, one point, a hole.
fn plain() -> Made {
    let mut making = Making::new(1);
    making.put(1, 1, None, 3, &[(0, 1), (2, 2)]);
    making.done()
}

/// A machine, its clone, and what both wrote since; maps of two levels.
fn cloned() -> Made {
    let mut making = Making::new(2);
    making.put(1, 1, None, 130, &[(0, 1), (1, 2), (64, 3), (129, 4)]);
    making.put(2, 2, None, 130, &[(0, 1), (1, 2), (64, 3), (129, 4)]);
    making.put(3, 1, Some(1), 130, &[(64, 5), (1, 0)]);
    making.put(4, 2, Some(2), 130, &[(65, 6)]);
    making.done()
}

/// Two disks in frames of every shape: sixteen blocks of zstd, one of zstd, one block as it is; a tail that fills no
/// block, and a disk of zeros.
fn frames() -> Made {
    let making = Making::new(3);
    let pool = making.rig.writer(1).unwrap();
    let ingest = Ingest::begin(&pool, pool.default_domain().unwrap()).unwrap();
    let sizes = [17 * BLOCK as u64 + 4096, 2 * BLOCK as u64, 3 << 20];
    let mut disks: Vec<Vec<u8>> = sizes.iter().map(|&size| vec![0; size as usize]).collect();
    for n in 0..16 {
        disks[0][n * BLOCK..][..32].fill(n as u8 + 1);
    }
    disks[0][16 * BLOCK..16 * BLOCK + 100].fill(77);
    disks[0][17 * BLOCK..].fill(99);
    // Nothing that would shrink.
    let mut state = 1u64;
    for byte in &mut disks[1][BLOCK..] {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 33) as u8;
    }
    let mut maps = Vec::new();
    for (disk, size) in disks.iter().zip(sizes) {
        let mut editor = ingest.edit_map(None, size).unwrap();
        let mut nodes = ingest.nodes();
        let mut padded = disk.clone();
        padded.resize(disk.len().next_multiple_of(BLOCK), 0);
        for (group, blocks) in padded.chunks(16 * BLOCK).enumerate() {
            let kept: Vec<(u64, &[u8])> = (16 * group as u64..)
                .zip(blocks.chunks(BLOCK))
                .filter(|(_, block)| block.iter().any(|&byte| byte != 0))
                .collect();
            if kept.is_empty() {
                continue;
            }
            let content: Vec<u8> = kept.iter().flat_map(|(_, block)| block.iter().copied()).collect();
            let hashes: Vec<[u8; 32]> =
                kept.iter().map(|(_, block)| *blake3::hash(block).as_bytes()).collect();
            let small = zstd::bulk::compress(&content, 1).unwrap();
            let is_zstd = small.len() < content.len();
            let encoded = if is_zstd { small } else { content };
            let ids = ingest.put_blocks(is_zstd, &encoded, &hashes).unwrap();
            for ((at, _), id) in kept.iter().zip(ids) {
                editor.set(*at, Some(id), &mut nodes).unwrap();
            }
        }
        maps.push(editor.finish(&mut nodes).unwrap());
    }
    let new = NewPoint {
        datasource: DatasourceId([1; 16]),
        machine: "vm1".to_owned(),
        host: "host".to_owned(),
        base: None,
        captured: Timestamp(NOW),
        consistency: Consistency::Crash,
        evidence: "as if".to_owned(),
        cause: Cause::new("test", ["a test"]),
        job: None,
        figures: BTreeMap::from([("bytes_read".to_owned(), 1)]),
        definition: "{}".to_owned(),
        incomplete: false,
    };
    let described = maps.into_iter().zip(sizes).zip(0..).map(|((map, size), index)| NewDisk {
        index,
        size,
        sector: 512,
        map,
        description: "{}".to_owned(),
        audit_next: 65_536,
        full_compare: FullCompare::Now,
    });
    ingest.commit(id(1), new, described.collect()).unwrap();
    drop(pool);
    let mut made = making.done();
    made.further = (0..).zip(disks).map(|(index, disk)| (id(1), index, disk)).collect();
    made
}

/// A point that is gone with its packs; what others needed of them was rewritten first.
fn reclaimed() -> Made {
    let mut making = Making::new(4);
    making.put(1, 1, None, 6, &[(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]);
    making.put(2, 1, Some(1), 6, &[(1, 7), (2, 8), (3, 9), (4, 10), (5, 0)]);
    reclaim(&mut making, 1);
    making.put(3, 2, None, 3, &[(0, 2), (1, 1)]);
    making.tidy();
    making.done()
}

/// Deletes a point, and reclaims until its packs are gone.
fn reclaim(making: &mut Making, n: u8) {
    let pool = making.rig.writer(1).unwrap();
    pool.delete_point(id(n), "golden").unwrap();
    making.points.remove(&id(n));
    for _ in 0..2 {
        making.rig.clock.advance(Duration::from_secs(DAY));
        pool.reclaim(ReclaimOptions::default(), &making.rig.deletion()).unwrap();
    }
}

/// A deletion service that is killed before it does anything.
struct Killed;

impl DeletionService for Killed {
    fn carry_out(&self, _: Option<u64>, _: &[u64]) -> Result<(), PoolError> {
        Err(PoolError::Stopped { reason: "killed".to_owned() })
    }
}

/// A reclaim ended between its permit and the removal of packs and runs.
fn permit_not_carried_out() -> Made {
    let mut making = Making::new(5);
    making.put(1, 1, None, 3, &[(0, 1), (1, 2)]);
    let before: Vec<String> =
        ["packs/", "index/"].into_iter().flat_map(|folder| making.files(folder)).collect();
    making.put(2, 2, None, 3, &[(0, 3), (1, 4)]);
    let pool = making.rig.writer(1).unwrap();
    pool.delete_point(id(1), "golden").unwrap();
    making.points.remove(&id(1));
    for _ in 0..2 {
        making.rig.clock.advance(Duration::from_secs(DAY));
        let stopped = pool.reclaim(ReclaimOptions::default(), &Killed);
        assert!(matches!(stopped, Err(PoolError::Stopped { .. })), "{stopped:?}");
    }
    drop(pool);
    let mut made = making.done();
    // What may go is not looked at any more.
    made.unread = before;
    made
}

/// A frame rotted, was recorded as damaged by the next backup, and its block was stored again.
fn stored_again() -> Made {
    let mut making = Making::new(6);
    making.put(1, 1, None, 3, &[(0, 1), (1, 2)]);
    let snapshot = making.rig.files.snapshot();
    // A pack of blocks: kind 1.
    let pack = making.files("packs/").into_iter().find(|name| snapshot.get(name).unwrap()[12] == 1).unwrap();
    making.rig.files.flip_bit(&pack, (64 + 32 + 5) * 8).unwrap();
    making.put(2, 2, None, 3, &[(2, 1)]);
    let mut made = making.done();
    made.damaged.push(pack);
    made
}

/// The record of a point is damaged, and a later record restores it.
fn restored_record() -> Made {
    let mut making = Making::new(7);
    making.put(1, 1, None, 3, &[(0, 1)]);
    making.put(2, 1, Some(1), 3, &[(1, 2)]);
    let pool = making.rig.writer(1).unwrap();
    let number = pool.point(id(1)).unwrap().number;
    let copy = pool.record_bytes(number).unwrap();
    drop(pool);
    let name = format!("sequence/{number:016x}.record");
    making.rig.files.flip_bit(&name, 1000).unwrap();
    let pool = making.rig.writer(1).unwrap();
    assert!(pool.restore_record(number, &copy).unwrap());
    drop(pool);
    making.put(3, 1, Some(2), 3, &[(2, 3)]);
    let mut made = making.done();
    // Its bytes are in the later record now.
    made.unread.push(name);
    made
}

/// So many runs and records that runs were merged, records bundled, and what that superseded removed.
fn merged() -> Made {
    let mut making = Making::new(8);
    for n in 1..=20u8 {
        let base = (n > 2).then(|| n - 2);
        making.put(n, 1 + n % 2, base, 4, &[(u64::from(n) % 4, u64::from(n))]);
    }
    making.tidy();
    making.done()
}

/// A further kit.
fn add_kit(making: &Making) -> Recipient {
    let mut kit = None;
    let pool = making.rig.writer(1).unwrap();
    pool.add_kit(&mut |new| {
        kit = Some(new.clone());
        Ok(new.clone())
    })
    .unwrap();
    kit.unwrap()
}

/// Points of three key generations. The first rotation removed a kit; a rotation between them was cut off after its ring. Every
/// byte was proved.
fn rotated() -> Made {
    let mut making = Making::new(9);
    making.put(1, 1, None, 4, &[(0, 1), (1, 2)]);
    let removed = add_kit(&making);
    making.rig.writer(1).unwrap().rotate_keys(&[removed.id]).unwrap();
    making.put(2, 1, Some(1), 4, &[(1, 3), (2, 4)]);
    let runs = making.files("index/");
    let pool = making.rig.writer(1).unwrap();
    assert_eq!(pool.rotate_keys(&[]).unwrap(), 2);
    drop(pool);
    // As if the cut had come before the records of that rotation, and so before the run after them.
    let mut snapshot = making.rig.files.snapshot();
    for name in making.files("sequence/").iter().rev().take(2) {
        snapshot.remove(name);
    }
    for name in making.files("index/").iter().filter(|name| !runs.contains(name)) {
        snapshot.remove(name);
    }
    making.rig.files = SimulatedFiles::from_snapshot(golden::SEED, &snapshot);
    assert_eq!(making.rig.writer(1).unwrap().rotate_keys(&[]).unwrap(), 3);
    making.put(3, 2, None, 4, &[(0, 1), (3, 5)]);
    let pool = making.rig.writer(1).unwrap();
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert!(report.damage.is_empty(), "{:?}", report.damage);
    drop(pool);
    making.put(4, 1, Some(2), 4, &[(0, 6)]);
    making.tidy();
    making.done()
}

/// The kit was written after the first rotation, so its key file has a later root; and the keys were rotated again since.
fn late_kit() -> Made {
    let mut making = Making::new(10);
    making.put(1, 1, None, 4, &[(0, 1), (1, 2)]);
    making.rig.writer(1).unwrap().rotate_keys(&[]).unwrap();
    making.put(2, 1, Some(1), 4, &[(1, 3)]);
    making.rig.kit = add_kit(&making);
    making.rig.writer(1).unwrap().rotate_keys(&[]).unwrap();
    making.put(3, 1, Some(2), 4, &[(2, 4)]);
    making.tidy();
    making.done()
}

/// Packs of several sectors with parity of more than one group, and small ones.
fn with_parity(seed: u64) -> Making {
    let mut making = Making::with(seed, Settings { parity_percent: 50, ..Settings::without_safety() });
    let all: Vec<(u64, u64)> = (0..24).map(|at| (at, at + 1)).collect();
    making.put(1, 1, None, 130, &all);
    making.put(2, 2, None, 3, &[(0, 1), (1, 2)]);
    making
}

fn parity() -> Made {
    let mut making = with_parity(9);
    making.put(3, 1, Some(1), 130, &[(5, 6), (6, 0)]);
    making.done()
}

/// A pack that rotted and was stored again by a verify, and others that rotted since: a bit in each of two groups, and a
/// table. All is there for who reads by parity.
fn parity_rotten() -> Made {
    let making = with_parity(10);
    let packs = making.files("packs/");
    let snapshot = making.rig.files.snapshot();
    let largest = packs.iter().max_by_key(|name| snapshot.get(name).unwrap().len()).unwrap().clone();
    making.rig.files.flip_bit(&largest, (64 + 32 + 5) * 8).unwrap();
    let pool = making.rig.writer(1).unwrap();
    let report = pool.verify(storage_pool::verify::Depth::Hashes, &mut |_, _| true).unwrap();
    assert_eq!(report.stored_again.len(), 1, "{report:?}");
    drop(pool);
    let new = making.files("packs/").into_iter().find(|name| !packs.contains(name)).unwrap();
    for byte in [64 + 32 + 7, 4096 + 100] {
        making.rig.files.flip_bit(&new, byte * 8).unwrap();
    }
    let small = packs.iter().find(|name| **name != largest).unwrap().clone();
    let bytes = snapshot.get(&small).unwrap();
    let footer = &bytes[bytes.len() - 64..];
    let content = u64::from_le_bytes(footer[8..16].try_into().unwrap());
    making.rig.files.flip_bit(&small, (content - 70) * 8).unwrap();
    let mut made = making.done();
    made.damaged = vec![largest, new, small];
    made
}

/// What a reader must find, out of the ledger and not out of the pool: the hash of every disk that can be had, and the
/// files that are damaged.
fn expected(made: &Made) -> String {
    let golden = &made.golden;
    let pool = golden.rig.on(SimulatedFiles::from_snapshot(1, &golden.snapshot)).reader().unwrap();
    let mut text = String::new();
    let mut line = |id: RecoveryPointId, index: u32, disk: &[u8]| {
        let id: String = id.0.iter().map(|byte| format!("{byte:02x}")).collect();
        text += &format!("disk {id} {index} {} {}\n", disk.len(), blake3::hash(disk));
    };
    for (id, content) in &golden.points {
        let mut disk = vec![0u8; pool.point(*id).unwrap().disks[0].size as usize];
        for (&at, &content) in content.iter().filter(|(_, content)| **content != 0) {
            let head = &block(content).head;
            disk[at as usize * BLOCK..][..head.len()].copy_from_slice(head);
        }
        line(*id, 0, &disk);
    }
    for (id, index, disk) in &made.further {
        line(*id, *index, disk);
    }
    for name in &made.damaged {
        text += &format!("damaged {name}\n");
    }
    text
}

/// Everything of it as a tar archive.
pub fn archive(made: &Made) -> Vec<u8> {
    golden::archive(&made.golden, &expected(made))
}

//! The golden pool of this format version: made from a seed, so that a change of the format shows as changed bytes.

use std::collections::BTreeMap;
use std::time::Duration;

use environment::simulated::Snapshot;
use model::RecoveryPointId;
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::{Settings, kit};

use super::{Content, Order, Rig, store};

pub const SEED: u64 = 20_260_901;

pub struct Golden {
    pub rig: Rig,
    pub snapshot: Snapshot,
    /// Every point that can be had, deleted or not.
    pub points: BTreeMap<RecoveryPointId, Content>,
}

/// Two machines that share, incremental points, a deleted point, one that is gone with its packs, a document, damage
/// of the past, packs in quarantine.
pub fn make() -> Golden {
    let settings = Settings {
        soft_delete: 86_400,
        reclaim_hold: 3_600,
        floor_points: 0,
        floor_age: 0,
        ..Settings::default()
    };
    let settings = Settings { breaker_percent: 100, reserve: Some(0), ..settings };
    let rig = Rig::new(SEED, settings);
    let pool = rig.writer(1).unwrap();
    let mut points: BTreeMap<RecoveryPointId, Content> = BTreeMap::new();
    let mut put = |n: u8, datasource: u8, base: Option<u8>, blocks: u64, changes: &[(u64, u64)]| {
        let id = |n: u8| RecoveryPointId([n; 16]);
        let order = Order {
            id: id(n),
            datasource,
            base: base.map(id),
            blocks,
            changes: changes.iter().copied().collect(),
        };
        store(&pool, &order).unwrap();
        let mut content = base.map(|base| points[&id(base)].clone()).unwrap_or_default();
        content.extend(&order.changes);
        points.insert(order.id, content);
        rig.clock.advance(Duration::from_secs(600));
        order.id
    };
    let gone = put(1, 1, None, 5, &[(0, 20), (1, 21), (2, 22)]);
    let first = put(2, 1, None, 130, &[(0, 1), (1, 2), (2, 3), (128, 4)]);
    put(3, 1, Some(2), 130, &[(1, 5), (2, 0)]);
    put(4, 2, None, 3, &[(0, 1), (1, 6), (2, 7)]);
    let deleted = put(5, 2, Some(4), 3, &[(2, 8)]);
    pool.delete_point(gone, "golden").unwrap();
    for _ in 0..2 {
        rig.clock.advance(Duration::from_secs(86_400));
        pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    }
    pool.put_document("policy", Some(b"a document of the server")).unwrap();
    pool.delete_point(deleted, "golden").unwrap();
    pool.mark_suspect(&[first], "golden").unwrap();
    drop(pool);
    points.remove(&gone);
    // A restart, as every pool has seen.
    drop(rig.writer(2).unwrap());
    Golden { snapshot: rig.files.snapshot(), rig, points }
}

/// A larger pool that is made of a seed, for campaigns: machines with many points, some deleted, reclaims between.
pub fn make_large(seed: u64, points: u64) -> Golden {
    let settings = Settings {
        floor_points: 0,
        floor_age: 0,
        breaker_percent: 100,
        reserve: Some(0),
        ..Settings::default()
    };
    let rig = Rig::new(seed, settings);
    let random = environment::SeededRandomness::new(seed ^ 0x1A26E);
    let pool = rig.writer(1).unwrap();
    let mut made: BTreeMap<RecoveryPointId, Content> = BTreeMap::new();
    let mut newest: BTreeMap<u8, RecoveryPointId> = BTreeMap::new();
    for number in 1..=points {
        let datasource = 1 + random.below(3) as u8;
        let base = newest.get(&datasource).copied();
        let mut id = [0xAA; 16];
        id[..8].copy_from_slice(&number.to_le_bytes());
        let changes: Content = (0..1 + random.below(12))
            .map(|_| (random.below(300), random.below(super::CONTENTS + 1)))
            .collect();
        let order = Order { id: RecoveryPointId(id), datasource, base, blocks: 300, changes };
        store(&pool, &order).unwrap();
        let mut content = base.map(|base| made[&base].clone()).unwrap_or_default();
        content.extend(&order.changes);
        made.insert(order.id, content);
        newest.insert(datasource, order.id);
        rig.clock.advance(Duration::from_secs(3_600));
        if number % 9 == 0
            && let Some(base) = base
        {
            pool.delete_point(base, "golden").unwrap();
            pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
        }
    }
    // Runs and bundles that others supersede are not read any more, and so not verified either.
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    let state = pool.state().clone();
    let soft_delete = pool.settings().soft_delete;
    made.retain(|id, _| state.points.get(id).is_some_and(|point| !state.is_expired(point, soft_delete)));
    drop(pool);
    Golden { snapshot: rig.files.snapshot(), rig, points: made }
}

/// The pool's files, and the kit, as a tar archive with fixed times and owners.
pub fn archive(golden: &Golden, expected: &str) -> Vec<u8> {
    let kit = kit::write(&golden.rig.kit, "fixtures");
    let mut tar = Vec::new();
    let mut add = |name: &str, bytes: &[u8]| {
        let mut head = [0u8; 512];
        head[..name.len()].copy_from_slice(name.as_bytes());
        head[100..108].copy_from_slice(b"0000644\0");
        head[108..116].copy_from_slice(b"0000000\0");
        head[116..124].copy_from_slice(b"0000000\0");
        head[124..136].copy_from_slice(format!("{:011o}\0", bytes.len()).as_bytes());
        head[136..148].copy_from_slice(b"00000000000\0");
        head[148..156].copy_from_slice(b"        ");
        head[156] = b'0';
        head[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = head.iter().map(|&byte| u32::from(byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend_from_slice(&head);
        tar.extend_from_slice(bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    };
    add("expected.txt", expected.as_bytes());
    add("recovery-kit.txt", kit.as_bytes());
    for (name, bytes) in golden.snapshot.files() {
        add(&format!("pool/{name}"), bytes);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

/// Names and bytes of the files of an archive as [`archive`] makes it.
pub fn unpack(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut at = 0;
    while at + 512 <= tar.len() && tar[at] != 0 {
        let name =
            String::from_utf8(tar[at..at + 100].split(|&byte| byte == 0).next().unwrap().to_vec()).unwrap();
        let size = std::str::from_utf8(&tar[at + 124..at + 135]).unwrap();
        let size = usize::from_str_radix(size, 8).unwrap();
        files.insert(name, tar[at + 512..at + 512 + size].to_vec());
        at += 512 + size.next_multiple_of(512);
    }
    files
}

//! The reserve and the ballast: space comes back at zero bytes free; and the accounting of space (S25 to S31).
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use environment::{FixedClock, FolderFiles, SeededRandomness};
use model::RecoveryPointId;
use rig::{Content, Order, Rig, is_exact, store};
use storage_pool::reclaim::{InProcessDeletion, ReclaimOptions};
use storage_pool::verify::Depth;
use storage_pool::{Access, Damage, Pool, PoolError, Settings, World};

fn id(n: u8) -> RecoveryPointId {
    RecoveryPointId([n; 16])
}

fn order(n: u8, base: Option<u8>, changes: &[(u64, u64)]) -> Order {
    Order {
        id: id(n),
        datasource: n,
        base: base.map(id),
        blocks: 5,
        changes: changes.iter().copied().collect(),
    }
}

fn ids(ids: &[u8]) -> BTreeSet<RecoveryPointId> {
    ids.iter().copied().map(id).collect()
}

fn used(rig: &Rig) -> u64 {
    rig.files.snapshot().files().map(|(_, bytes)| bytes.len() as u64).sum()
}

fn ballast(rig: &Rig) -> usize {
    rig.files.snapshot().files().filter(|(name, _)| name.starts_with("ballast/")).count()
}

#[test]
fn an_ingest_leaves_the_reserve() {
    let reserve = 64 << 10;
    let rig = Rig::new(1, Settings { reserve: Some(reserve), ..Settings::without_safety() });
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1), (1, 2)])).unwrap();
    rig.files.set_capacity(Some(used(&rig) + reserve));
    let refused = store(&pool, &order(2, None, &[(0, 3)]));
    assert!(matches!(refused, Err(PoolError::Reserve { .. })), "{refused:?}");
    assert!(refused.unwrap_err().to_string().contains("reclaim"));
    // What gives space back does not stop there.
    pool.delete_point(id(1), "test").unwrap();
    rig.clock.advance(Duration::from_secs(1));
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(report.freed_bytes > 0, "{report:?}");
    store(&pool, &order(2, None, &[(0, 3)])).unwrap();
}

/// Something else filled the volume to its last byte.
#[test]
fn at_zero_bytes_free_space_comes_back() {
    let rig = Rig::new(2, Settings { reserve: Some(256 << 10), ..Settings::without_safety() });
    let pool = rig.writer(1).unwrap();
    assert_eq!(ballast(&rig), 1);
    let large: Vec<(u64, u64)> = (0..5).map(|at| (at, at + 1)).collect();
    store(&pool, &order(1, None, &large)).unwrap();
    store(&pool, &order(2, None, &[(0, 1), (1, 7)])).unwrap();
    drop(pool);
    rig.files.set_capacity(Some(used(&rig)));
    let pool = rig.writer(1).unwrap();
    assert_eq!(is_exact(&pool, id(1), &large.iter().copied().collect()), Ok(true));
    assert!(matches!(pool.delete_point(id(1), "test"), Err(PoolError::Full { .. })));
    drop(pool);
    let pool = rig.writer(1).unwrap();
    assert!(pool.make_room(&rig.deletion()).unwrap());
    assert_eq!(ballast(&rig), 0);
    pool.delete_point(id(1), "test").unwrap();
    rig.clock.advance(Duration::from_secs(1));
    let before = pool.space().unwrap().packs;
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(report.freed_bytes > 0 && pool.space().unwrap().packs < before, "{report:?}");
    drop(pool);
    let pool = rig.writer(1).unwrap();
    assert_eq!(is_exact(&pool, id(2), &Content::from([(0, 1), (1, 7)])), Ok(true));
    assert!(pool.notes().is_empty(), "{:?}", pool.notes());
    // With room again, there is ballast again.
    rig.files.set_capacity(None);
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert_eq!(ballast(&rig), 1);
}

/// Every bit of ballast that rots is told, and a cut; it is nobody's loss (INV-8).
#[test]
fn damaged_ballast_is_told() {
    let rig = Rig::new(3, Settings { reserve: Some(16 << 10), ..Settings::without_safety() });
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1)])).unwrap();
    let name = "ballast/00.ballast";
    let bytes = rig.files.snapshot().get(name).unwrap().to_vec();
    assert_eq!(bytes.len(), 1024);
    let reader = rig.reader().unwrap();
    let look = |what: &str| {
        let report = reader.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        let is_told = |damage: &Damage| matches!(damage, Damage::File { path, derived: true, .. } if path.ends_with(name));
        assert!(report.damage.iter().all(is_told) && report.damage.len() == 1, "{what}: {:?}", report.damage);
        assert_eq!(report.good_points, 1);
    };
    for bit in 0..bytes.len() as u64 * 8 {
        rig.files.flip_bit(name, bit).unwrap();
        look(&format!("bit {bit}"));
        rig.files.flip_bit(name, bit).unwrap();
    }
    rig.files.set_bytes(name, bytes[..1000].to_vec());
    look("cut");
    rig.files.set_bytes(name, [&bytes[..], &[0]].concat());
    look("longer");
}

/// What the accounting says returns, returns: to the byte but for headers, tables and trailers of the packs that go.
#[test]
fn what_was_foretold_is_freed() {
    let rig = Rig::new(4, Settings { soft_delete: 60, reclaim_hold: 60, ..Settings::without_safety() });
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1), (1, 2)])).unwrap();
    store(&pool, &order(2, Some(1), &[(1, 3), (2, 4)])).unwrap();
    store(&pool, &order(3, Some(2), &[(2, 5)])).unwrap();
    store(&pool, &order(4, None, &[(0, 6), (1, 7), (2, 8)])).unwrap();
    let unique = pool.unique_bytes().unwrap();
    for n in 1..=4 {
        assert_eq!(pool.freed_bytes(&ids(&[n])).unwrap(), unique[&id(n)], "one point");
        assert!(unique[&id(n)] > 0);
    }
    // What two points share is freed by both, and by neither.
    let both = pool.freed_bytes(&ids(&[1, 2])).unwrap();
    assert!(both >= unique[&id(1)] + unique[&id(2)]);
    let all = pool.freed_bytes(&ids(&[1, 2, 3, 4])).unwrap();
    let packs = pool.space().unwrap().packs;
    let count = |pool: &Pool| {
        let chunks = 12 + 4;
        (chunks * 20 + 8 * (16 + 128)) as u64 + pool.space().unwrap().packs - packs
    };
    assert!(all <= packs && packs <= all + count(&pool), "{all} of {packs}");
    // A point deleted before counts as gone first.
    pool.delete_point(id(1), "test").unwrap();
    let rest = pool.freed_bytes(&ids(&[2])).unwrap();
    assert_eq!(rest, both - unique[&id(1)]);
    let foretold = pool.freed_bytes(&ids(&[4])).unwrap();
    pool.delete_point(id(4), "test").unwrap();
    let foretold = foretold + unique[&id(1)];
    let mut freed = 0;
    for _ in 0..3 {
        rig.clock.advance(Duration::from_secs(61));
        pool.tick().unwrap();
        let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
        freed += report.freed_bytes.saturating_sub(report.rewritten_bytes);
    }
    // Chunks that stay in a pack of which most is in use are the rest: here the node and block of point 1 alone.
    let tables = 8 * 144 + 16 * 20;
    assert!(freed <= foretold + tables, "{freed} of {foretold}");
    assert!(freed + unique[&id(1)] >= foretold, "{freed} of {foretold}");
    assert_eq!(is_exact(&pool, id(3), &Content::from([(0, 1), (1, 3), (2, 5)])), Ok(true));
}

/// A real file system of 64 MiB, filled to its last byte. Needs the right to mount; tells where it has none.
#[test]
fn a_real_volume_at_zero_bytes_free() {
    let folder = tempfile::tempdir().unwrap();
    let mount = |words: &[&str]| {
        std::process::Command::new(words[0])
            .args(&words[1..])
            .arg(folder.path())
            .stderr(std::process::Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs"]) {
        eprintln!("no right to mount here: the simulated volume stands for it");
        return;
    }
    let files = Arc::new(FolderFiles::new(folder.path().join("pool")));
    std::fs::create_dir(folder.path().join("pool")).unwrap();
    let clock = Arc::new(FixedClock::new(rig::NOW));
    let randomness = Arc::new(SeededRandomness::new(5));
    let world = World { files: files.clone(), clock: clock.clone(), randomness };
    let settings = Settings { reserve: None, ..Settings::without_safety() };
    let created = Pool::create(world.clone(), settings, [1; 16], "real", &mut |kit| Ok(kit.clone())).unwrap();
    let service =
        InProcessDeletion { world: world.clone(), removal: files, recipient: created.server.clone() };
    let pool = Arc::new(created.pool);
    assert_eq!(pool.settings().reserve, Some(1 << 20));
    store(&pool, &order(1, None, &[(0, 1), (1, 2), (2, 3)])).unwrap();
    store(&pool, &order(2, None, &[(0, 1), (1, 4)])).unwrap();
    drop(pool);
    let filler = folder.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut file, &[7; 4096]).is_ok_and(|written| written > 0) {}
    let access = Access::Write { server: [1; 16], name: "real".to_owned() };
    let pool = Arc::new(Pool::open(world, &created.server, access).unwrap());
    assert_eq!(pool.space().unwrap().free, 0);
    assert_eq!(is_exact(&pool, id(2), &Content::from([(0, 1), (1, 4)])), Ok(true));
    assert!(pool.make_room(&service).unwrap());
    let refused = store(&pool, &order(3, None, &[(0, 5)]));
    assert!(matches!(refused, Err(PoolError::Reserve { .. })), "{refused:?}");
    pool.delete_point(id(1), "test").unwrap();
    clock.advance(Duration::from_secs(1));
    let report = pool.reclaim(ReclaimOptions::default(), &service).unwrap();
    assert!(report.freed_bytes > 0, "{report:?}");
    assert_eq!(is_exact(&pool, id(2), &Content::from([(0, 1), (1, 4)])), Ok(true));
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    store(&pool, &order(3, None, &[(0, 5)])).unwrap();
    drop((pool, service));
    assert!(mount(&["umount"]));
}

//! The counts against a count from full walks, over random lives; damaged, deleted and wrong ones.
#![allow(clippy::unwrap_used)]

#[path = "../../tests/rig/mod.rs"]
mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use environment::SeededRandomness;
use model::RecoveryPointId;

use super::packs::recount;
use super::store::{Failure, Store, change, summed};
use crate::chunk::ChunkId;
use crate::format::counts::CountsTail;
use crate::format::node::Node;
use crate::map::NodeSource;
use crate::mark::Roots;
use crate::reclaim::{CountsUse, ReclaimOptions, ReclaimReport};
use crate::sorter::Sorter;
use crate::{Pool, PoolError, PoolNodes, Settings};
use rig::{CONTENTS, Content, Order, Rig, is_exact, store};

fn fine<T>(result: Result<T, Failure>) -> T {
    result.unwrap_or_else(|failure| match failure {
        Failure::Counts(reason) => panic!("{reason}"),
        Failure::Pool(error) => panic!("{error}"),
    })
}

fn on_disk(pool: &Pool) -> Store {
    fine(Store::open(&*pool.world.files, &pool.keys)).unwrap_or_default()
}

fn counts(store: &Store) -> BTreeMap<ChunkId, i64> {
    let mut sums = store.sums(None);
    let mut counts = BTreeMap::new();
    while let Some((id, count)) = fine(sums.next()) {
        if count != 0 {
            counts.insert(id, count);
        }
    }
    counts
}

/// What the counts of these roots must be, by walking each map to its end.
fn walked(pool: &Arc<Pool>, roots: &Roots) -> BTreeMap<ChunkId, i64> {
    let mut counts: BTreeMap<ChunkId, i64> = BTreeMap::new();
    let mut parents: BTreeSet<ChunkId> = BTreeSet::new();
    let nodes = PoolNodes::new(pool, pool.default_domain().unwrap());
    let mut open: Vec<(ChunkId, u8)> = Vec::new();
    for ((level, root), times) in roots {
        *counts.entry(*root).or_default() += i64::from(*times);
        open.push((*root, *level));
    }
    while let Some((id, level)) = open.pop() {
        if !parents.insert(id) {
            continue;
        }
        let node = Node::decode(&nodes.node(&id).unwrap(), level).unwrap();
        let children: BTreeSet<ChunkId> = node.children.iter().flatten().copied().collect();
        for child in children {
            *counts.entry(child).or_default() += 1;
            if level > 0 {
                open.push((child, level - 1));
            }
        }
    }
    counts
}

/// The counts on disk are those of the points that are needed now, and the figures of packs are those of the counts.
fn compare(pool: &Arc<Pool>, told: &str) {
    let moment = pool.moment(&[]).unwrap();
    let store = on_disk(pool);
    assert_eq!(store.roots, moment.roots(), "{told}");
    assert_eq!(counts(&store), walked(pool, &store.roots), "{told}");
    let counted = pool.update_counts(None).unwrap();
    assert_eq!(counted.anew, None, "{told}");
    let again = fine(recount(pool, &counted));
    assert_eq!(counted.rows, again, "{told}");
}

fn reclaim(pool: &Arc<Pool>, rig: &Rig) -> Result<ReclaimReport, PoolError> {
    pool.reclaim(ReclaimOptions::default(), &rig.deletion())
}

struct Life {
    rig: Rig,
    random: SeededRandomness,
    next: u64,
    made: BTreeMap<RecoveryPointId, (u64, Content)>,
}

impl Life {
    fn below(&self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn pick(&self, pool: &Pool, is_deleted: bool) -> Option<RecoveryPointId> {
        let state = pool.state();
        let ids: Vec<RecoveryPointId> = state
            .in_order()
            .filter(|point| point.deleted.is_some() == is_deleted)
            .map(|point| point.id)
            .collect();
        ids.get(self.below(ids.len() as u64) as usize).copied()
    }

    fn put(&mut self, pool: &Arc<Pool>) -> String {
        let base = if self.below(3) == 0 { None } else { self.pick(pool, false) };
        let (blocks, mut content) = match base.and_then(|base| self.made.get(&base)) {
            Some((blocks, content)) => (*blocks, content.clone()),
            None => ([3, 100, 129, 20_000][self.below(4) as usize], Content::new()),
        };
        let changes: Content = (0..1 + self.below(6))
            .map(|_| (self.below(blocks), if self.below(5) == 0 { 0 } else { 1 + self.below(CONTENTS) }))
            .collect();
        let mut id = [0xC0; 16];
        id[..8].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        let order = Order { id: RecoveryPointId(id), datasource: 1, base, blocks, changes };
        store(pool, &order).unwrap();
        content.extend(&order.changes);
        let told = format!("{order:?}");
        self.made.insert(order.id, (blocks, content));
        told
    }
}

/// Commits, deletions, undeletions, expiries, blocks written again, reclaims with and without hold: after each reclaim every
/// count is what a walk over all maps says, and each pack's figures are what the counts say.
#[test]
fn counts_follow_random_lives() {
    let mut all_freed = 0;
    for seed in 0..12 {
        let settings = Settings {
            soft_delete: [0, 3600][(seed % 2) as usize],
            reclaim_hold: [0, 7200][(seed / 2 % 2) as usize],
            ..Settings::without_safety()
        };
        let rig = Rig::new(seed, settings);
        let mut life =
            Life { rig, random: SeededRandomness::new(seed ^ 0xC0), next: 1, made: BTreeMap::new() };
        let mut pool = life.rig.writer(1).unwrap();
        let mut log = vec![format!("seed {seed}")];
        let mut freed = 0;
        for _ in 0..60 {
            let told = match life.below(12) {
                0..4 => life.put(&pool),
                4..6 => match life.pick(&pool, false) {
                    Some(id) => {
                        pool.delete_point(id, "test").unwrap();
                        format!("deleted {id}")
                    }
                    None => continue,
                },
                6 => match life.pick(&pool, true) {
                    Some(id) => format!("undeleted {id}: {:?}", pool.undelete_point(id).is_ok()),
                    None => continue,
                },
                7 => match life.pick(&pool, false) {
                    Some(id) => format!("{:?}", pool.relay(id, None, 1 << 22).unwrap()),
                    None => continue,
                },
                8 => {
                    life.rig.clock.advance(Duration::from_secs(1800 * (1 + life.below(4))));
                    "time passes".to_owned()
                }
                9 => {
                    drop(pool);
                    pool = life.rig.writer(1).unwrap();
                    "opened again".to_owned()
                }
                _ => {
                    let report = reclaim(&pool, &life.rig).unwrap();
                    assert_eq!(report.counts, CountsUse::Kept, "{log:#?}");
                    freed += report.freed_packs;
                    log.push(format!("{report:?}"));
                    compare(&pool, &format!("{log:#?}"));
                    continue;
                }
            };
            log.push(told);
        }
        all_freed += freed;
        for point in pool.state().clone().in_order().filter(|point| point.deleted.is_none()) {
            let (_, content) = &life.made[&point.id];
            if content.keys().all(|at| *at < 200) {
                assert_eq!(is_exact(&pool, point.id, content), Ok(true), "{log:#?}");
            }
        }
        // Files are merged as they come, and the needless ones are gone.
        let there = life.rig.files.snapshot().files().filter(|(name, _)| name.ends_with(".counts")).count();
        assert!(there <= 10, "{there} files of counts");
    }
    assert!(all_freed > 20, "{all_freed} packs were freed");
}

fn id(n: u8) -> RecoveryPointId {
    RecoveryPointId([n; 16])
}

fn order(n: u8, base: Option<u8>, changes: &[(u64, u64)]) -> Order {
    let changes = changes.iter().copied().collect();
    Order { id: id(n), datasource: 1, base: base.map(id), blocks: 200, changes }
}

/// Two points, of which the second shares with the first, and a third one of its own.
fn prepared(seed: u64) -> (Rig, Arc<Pool>) {
    let rig = Rig::new(seed, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1), (1, 2), (150, 3)])).unwrap();
    store(&pool, &order(2, Some(1), &[(1, 4)])).unwrap();
    store(&pool, &order(3, None, &[(0, 5), (150, 6)])).unwrap();
    reclaim(&pool, &rig).unwrap();
    compare(&pool, "prepared");
    (rig, pool)
}

fn count_files(rig: &Rig) -> Vec<String> {
    let snapshot = rig.files.snapshot();
    snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.ends_with(".counts")).collect()
}

#[test]
fn damaged_counts_are_made_anew_and_said() {
    let (rig, pool) = prepared(1);
    drop(pool);
    let before = rig.files.snapshot();
    let [name] = &count_files(&rig)[..] else { panic!("one file") };
    let bytes = before.get(name).unwrap().to_vec();
    let mut changed: Vec<(String, Vec<u8>)> = (0..bytes.len())
        .step_by(41)
        .map(|at| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            (format!("byte {at}"), bytes)
        })
        .collect();
    for length in [0, 10, 64, 160, bytes.len() / 2, bytes.len() - 1, bytes.len() + 1] {
        let mut bytes = bytes.clone();
        bytes.resize(length, 0);
        changed.push((format!("cut to {length}"), bytes));
    }
    let run = before.files().find(|(name, _)| name.ends_with(".run")).unwrap().1.to_vec();
    changed.push(("a run under its name".to_owned(), run));
    for (told, bytes) in changed {
        let mut snapshot = before.clone();
        snapshot.insert(name, bytes);
        let rig = rig.on(environment::simulated::SimulatedFiles::from_snapshot(1, &snapshot));
        let pool = rig.writer(1).unwrap();
        // Something to follow, so that every page is read.
        pool.delete_point(id(1), "test").unwrap();
        let report = reclaim(&pool, &rig).unwrap();
        assert!(matches!(report.counts, CountsUse::Anew(_)), "{told}: {report:?}");
        compare(&pool, &told);
        assert!(!count_files(&rig).contains(name), "{told}: the damaged file stays");
    }
}

#[test]
fn deleted_counts_are_made_again() {
    let (rig, pool) = prepared(2);
    for name in count_files(&rig) {
        rig.files.delete(&name).unwrap();
    }
    pool.delete_point(id(3), "test").unwrap();
    let report = reclaim(&pool, &rig).unwrap();
    assert!(report.freed_packs > 0, "{report:?}");
    compare(&pool, "after all were deleted");
}

/// An older state of the counts stands, as after a file was lost: what went since cannot be taken back by reading it.
#[test]
fn older_counts_follow_or_are_made_anew() {
    let (rig, pool) = prepared(3);
    let name = count_files(&rig)[0].clone();
    let old = rig.files.snapshot().get(&name).unwrap().to_vec();
    pool.delete_point(id(3), "test").unwrap();
    assert!(reclaim(&pool, &rig).unwrap().freed_packs > 0);
    store(&pool, &order(4, Some(2), &[(7, 8)])).unwrap();
    drop(pool);
    for newer in count_files(&rig) {
        rig.files.delete(&newer).unwrap();
    }
    rig.files.set_bytes(&name, old);
    let pool = rig.writer(1).unwrap();
    let report = reclaim(&pool, &rig).unwrap();
    assert!(matches!(report.counts, CountsUse::Anew(_)), "{report:?}");
    compare(&pool, "older counts");
    assert!(is_exact(&pool, id(2), &Content::from([(0, 1), (1, 4), (150, 3)])).unwrap());
}

/// Writes a file of counts that changes one count, and says of every pack what `packs` makes of it.
fn plant(pool: &Pool, chunk: ChunkId, by: i64, used: impl Fn(u32) -> u32) {
    let store = on_disk(pool);
    let below: Vec<u64> = store.files.iter().map(|file| file.number()).collect();
    let mut wrong = Sorter::new(&pool.world.files, pool.room, summed);
    wrong.push(change(&chunk, by)).unwrap();
    let packs = store.packs.iter().map(|(id, row)| {
        let mut row = *row;
        row.used = used(row.used);
        (*id, row)
    });
    let tail = CountsTail {
        damage: store.damage,
        next_order: store.next_order,
        roots: store.roots.iter().map(|((level, id), times)| (*level, *id, *times)).collect(),
        packs: packs.collect(),
    };
    let number = below.last().unwrap() + 1;
    let written = fine(pool.write_counts_as(number, &[], &wrong.finish(), &below, &tail.encode()));
    assert!(written.is_ok());
}

fn packs(rig: &Rig) -> usize {
    rig.files.snapshot().files().filter(|(name, _)| name.starts_with("packs/")).count()
}

/// Every chunk in turn counts as not needed, and all packs as empty: the mark before the permit keeps everything.
#[test]
fn a_wrong_count_frees_nothing_that_is_needed() {
    let (_, pool) = prepared(4);
    let all = counts(&on_disk(&pool));
    drop(pool);
    for (chunk, count) in all {
        let (rig, pool) = prepared(4);
        let before = packs(&rig);
        plant(&pool, chunk, -count, |_| 0);
        let report = reclaim(&pool, &rig).unwrap();
        assert!(matches!(report.counts, CountsUse::Wrong(_)), "{chunk}: {report:?}");
        assert_eq!((report.freed_packs, packs(&rig)), (0, before), "{chunk}");
        assert_eq!(report.released_packs as usize, before, "{chunk}");
        compare(&pool, "after a wrong count");
        assert_eq!(is_exact(&pool, id(1), &Content::from([(0, 1), (1, 2), (150, 3)])), Ok(true));
        assert_eq!(is_exact(&pool, id(3), &Content::from([(0, 5), (150, 6)])), Ok(true));
        let report = reclaim(&pool, &rig).unwrap();
        assert_eq!((report.counts, report.freed_packs, report.quarantined_bytes), (CountsUse::Kept, 0, 0));
    }
}

/// A count that is too high keeps garbage: a mark notices that as well, and the next reclaim frees it.
#[test]
fn a_count_that_is_too_high_is_noticed() {
    let (rig, pool) = prepared(5);
    let of_third = walked(&pool, &on_disk(&pool).roots);
    pool.delete_point(id(3), "test").unwrap();
    let left = walked(&pool, &pool.moment(&[]).unwrap().roots());
    let gone = of_third.keys().find(|id| !left.contains_key(*id)).unwrap();
    plant(&pool, *gone, 5, |used| used);
    let report = reclaim(&pool, &rig).unwrap();
    assert!(
        matches!(&report.counts, CountsUse::Wrong(reason) if reason.contains("do not need")),
        "{report:?}"
    );
    assert_eq!(report.freed_packs, 0);
    compare(&pool, "after a count that was too high");
    let report = reclaim(&pool, &rig).unwrap();
    assert_eq!(report.counts, CountsUse::Kept);
    assert!(report.freed_packs > 0, "{report:?}");
}

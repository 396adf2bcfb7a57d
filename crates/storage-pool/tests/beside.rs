//! Reclaim beside ingests and readers (INV-3, 11, 12): every interleaving of a small world, and threads.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use environment::SeededRandomness;
use environment::simulated::SimulatedFiles;
use model::RecoveryPointId;
use rig::{CONTENTS, Content, Open, Order, Rig, is_exact, store};
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::{Pool, PoolError, Settings};

fn id(n: u8) -> RecoveryPointId {
    RecoveryPointId([n; 16])
}

fn order(n: u8, datasource: u8, base: Option<u8>, changes: &[(u64, u64)]) -> Order {
    Order { id: id(n), datasource, base: base.map(id), blocks: 3, changes: changes.iter().copied().collect() }
}

/// Three actors, two points, three chunks. Two jobs begin, store or share, and commit: each is made from one of the points
/// and shares a chunk of the other. The third actor deletes both points, and reclaims.
struct Model {
    rig: Rig,
    snapshot: environment::simulated::Snapshot,
}

#[derive(Default)]
struct Job {
    open: Option<Open>,
    /// Its base was expired when it began.
    is_late: bool,
    result: Option<Result<(), PoolError>>,
}

impl Model {
    fn new(hold: u64) -> Model {
        let rig = Rig::new(7, Settings { reclaim_hold: hold, ..Settings::without_safety() });
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(1, 1, None, &[(0, 1), (1, 2)])).unwrap();
        store(&pool, &order(2, 2, None, &[(0, 3)])).unwrap();
        drop(pool);
        Model { snapshot: rig.files.snapshot(), rig }
    }

    fn run(&self, schedule: &[usize]) -> u64 {
        let rig = self.rig.on(SimulatedFiles::from_snapshot(1, &self.snapshot));
        let pool = rig.writer(1).unwrap();
        let orders = [order(11, 1, Some(1), &[(1, 0), (2, 3)]), order(12, 2, Some(2), &[(1, 1), (2, 4)])];
        let truths: [Content; 2] = [Content::from([(0, 1), (2, 3)]), Content::from([(0, 3), (1, 1), (2, 4)])];
        let mut jobs: [Job; 2] = Default::default();
        let (mut turns, mut freed) = (0, 0);
        for actor in schedule {
            let told = || format!("{schedule:?} at {actor}");
            rig.clock.advance(Duration::from_secs(1));
            if *actor == 2 {
                if turns == 0 {
                    pool.delete_point(id(1), "model").unwrap();
                    pool.delete_point(id(2), "model").unwrap();
                } else {
                    rig.clock.advance(Duration::from_secs(3600));
                    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion());
                    freed += report.unwrap_or_else(|error| panic!("{}: {error}", told())).freed_packs;
                }
                turns += 1;
                continue;
            }
            let job = &mut jobs[*actor];
            if job.result.is_some() {
                continue;
            }
            match job.open.take() {
                None => {
                    job.is_late = turns > 0;
                    // What an expired base needs may be gone already.
                    match Open::begin(&pool, orders[*actor].clone()) {
                        Ok(open) => job.open = Some(open),
                        Err(error) => job.result = Some(Err(error)),
                    }
                }
                Some(mut open) if !open.is_done() => {
                    while !open.is_done() {
                        match open.go_on() {
                            Ok(()) => {}
                            Err(error) => {
                                job.result = Some(Err(error));
                                break;
                            }
                        }
                    }
                    if job.result.is_none() {
                        open.settle().unwrap();
                        job.open = Some(open);
                    }
                }
                Some(open) => job.result = Some(open.commit()),
            }
            if let Some(Err(error)) = &job.result {
                assert!(job.is_late, "{}: {error}", told());
            }
        }
        // Nothing is under way now: whatever is needless goes, and nothing else.
        for _ in 0..3 {
            rig.clock.advance(Duration::from_secs(7200));
            pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
        }
        drop(pool);
        let pool = rig.writer(1).unwrap();
        for (job, (order, truth)) in jobs.iter().zip(orders.iter().zip(&truths)) {
            match &job.result {
                Some(Ok(())) => {
                    assert_eq!(is_exact(&pool, order.id, truth), Ok(true), "{schedule:?}: {}", order.id);
                }
                Some(Err(_)) => assert!(pool.point(order.id).is_err(), "{schedule:?}"),
                None => panic!("{schedule:?}: {} did not end", order.id),
            }
        }
        let space = pool.space().unwrap();
        assert_eq!(space.quarantined, 0, "{schedule:?}");
        let needed: u64 = jobs.iter().filter(|job| matches!(job.result, Some(Ok(())))).count() as u64;
        if needed == 0 {
            assert_eq!(space.packs, 0, "{schedule:?}: something is left that nobody needs");
        }
        assert!(pool.notes().is_empty(), "{schedule:?}: {:?}", pool.notes());
        freed
    }

    /// Every order of three steps of each job and four of the third actor.
    fn every(&self) -> (u64, u64) {
        let (mut runs, mut freed) = (0, 0);
        let mut schedule = Vec::new();
        self.extend(&mut schedule, &mut [3, 3, 4], &mut |schedule| {
            runs += 1;
            freed += self.run(schedule);
        });
        (runs, freed)
    }

    fn extend(&self, schedule: &mut Vec<usize>, left: &mut [u8; 3], each: &mut dyn FnMut(&[usize])) {
        if left.iter().all(|left| *left == 0) {
            return each(schedule);
        }
        for actor in 0..3 {
            if left[actor] > 0 {
                left[actor] -= 1;
                schedule.push(actor);
                self.extend(schedule, left, each);
                schedule.pop();
                left[actor] += 1;
            }
        }
    }
}

/// Quarantine, permit and unlinking in one reclaim.
#[test]
fn every_interleaving_without_a_hold() {
    let (runs, freed) = Model::new(0).every();
    assert_eq!(runs, 4200);
    assert!(freed > 1000, "{freed}");
}

/// Quarantine in one reclaim, permit and unlinking in a later one.
#[test]
fn every_interleaving_with_a_hold() {
    let (runs, freed) = Model::new(1800).every();
    assert_eq!(runs, 4200);
    assert!(freed > 1000, "{freed}");
}

/// A pack in quarantine waits for a job that began before, however long that runs, and not for one that began later.
#[test]
fn a_permit_waits_for_jobs_of_before_the_quarantine() {
    let rig = Rig::new(8, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, 1, None, &[(0, 1), (1, 2)])).unwrap();
    store(&pool, &order(2, 2, None, &[(0, 3)])).unwrap();
    let early = Open::begin(&pool, order(3, 3, None, &[(0, 4)])).unwrap();
    rig.clock.advance(Duration::from_secs(1));
    pool.delete_point(id(1), "test").unwrap();
    rig.clock.advance(Duration::from_secs(1));
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    // The point was there when the job began: it counts as long as the job runs.
    assert_eq!((report.quarantined_bytes, report.freed_bytes), (0, 0), "{report:?}");
    drop(early);
    let early = Open::begin(&pool, order(4, 3, None, &[(0, 5)])).unwrap();
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(report.quarantined_bytes > 0 && report.freed_bytes == 0, "{report:?}");
    assert_eq!(report.waiting_bytes, report.quarantined_bytes);
    // It does not share what is in quarantine, and neither does one that begins now.
    let late = Open::begin(&pool, order(5, 4, None, &[(0, 1)])).unwrap();
    early.commit().unwrap();
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(report.freed_bytes > 0 && report.waiting_bytes == 0, "{report:?}");
    late.commit().unwrap();
    assert_eq!(is_exact(&pool, id(5), &Content::from([(0, 1)])), Ok(true));
}

/// What a job of this moment has finished and what it shares stays out of quarantine.
#[test]
fn what_a_running_job_made_or_shares_is_pinned() {
    let rig = Rig::new(9, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, 1, None, &[(0, 1), (1, 2)])).unwrap();
    rig.clock.advance(Duration::from_secs(1));
    pool.delete_point(id(1), "test").unwrap();
    rig.clock.advance(Duration::from_secs(1));
    pool.tick().unwrap();
    // The point is expired, its packs are not in quarantine yet: they can be shared.
    let mut job = Open::begin(&pool, order(2, 2, None, &[(0, 1), (1, 7)])).unwrap();
    job.go_on().unwrap();
    job.go_on().unwrap();
    job.settle().unwrap();
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert_eq!(report.freed_bytes, 0);
    job.commit().unwrap();
    for _ in 0..2 {
        pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    }
    assert_eq!(is_exact(&pool, id(2), &Content::from([(0, 1), (1, 7)])), Ok(true));
    assert_eq!(pool.space().unwrap().quarantined, 0);
}

/// A reader of another process looked the blocks up before a reclaim moved them.
#[test]
fn a_reader_elsewhere_finds_what_a_reclaim_moved() {
    let rig = Rig::new(10, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, 1, None, &[(0, 1), (1, 2), (2, 3)])).unwrap();
    store(&pool, &order(2, 2, None, &[(0, 1)])).unwrap();
    let reader = rig.reader().unwrap();
    // It opens its index now.
    assert_eq!(is_exact(&reader, id(1), &Content::from([(0, 1), (1, 2), (2, 3)])), Ok(true));
    let other = rig.reader().unwrap();
    assert!(other.notes().is_empty());
    pool.delete_point(id(1), "test").unwrap();
    rig.clock.advance(Duration::from_secs(1));
    let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(report.rewritten_bytes > 0 && report.freed_packs > 0, "{report:?}");
    assert!(report.rewritten_bytes <= report.freed_bytes, "{report:?}");
    assert_eq!(is_exact(&other, id(2), &Content::from([(0, 1)])), Ok(true));
}

struct Line {
    content: Content,
    is_deleted: bool,
}

/// Three threads of jobs, one that deletes and reclaims without any hold, one that reads.
#[test]
fn threads_beside_a_reclaim() {
    let seconds =
        std::env::var("STILLPOINT_SLICE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let rig = Rig::new(11, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    let ledger: Mutex<BTreeMap<RecoveryPointId, Line>> = Mutex::new(BTreeMap::new());
    let next = AtomicU64::new(1);
    let end = Instant::now() + Duration::from_secs(seconds);
    let is_over = AtomicBool::new(false);
    let goes_on = || Instant::now() < end && !is_over.load(Ordering::SeqCst);
    let (freed, made, read) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let write = |machine: u8| {
        let random = SeededRandomness::new(u64::from(machine));
        let mut last: Option<RecoveryPointId> = None;
        while goes_on() {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&next.fetch_add(1, Ordering::SeqCst).to_le_bytes());
            let id = RecoveryPointId(id);
            let base = last.filter(|_| random.below(4) > 0);
            let changes: Content =
                (0..1 + random.below(4)).map(|_| (random.below(5), random.below(1 + CONTENTS))).collect();
            let mut content =
                base.map(|base| ledger.lock().unwrap()[&base].content.clone()).unwrap_or_default();
            content.extend(&changes);
            let order = Order { id, datasource: machine, base, blocks: 5, changes };
            match store(&pool, &order) {
                Ok(()) => {
                    ledger.lock().unwrap().insert(id, Line { content, is_deleted: false });
                    made.fetch_add(1, Ordering::SeqCst);
                    last = Some(id);
                }
                // Its base was expired when it began.
                Err(error) => {
                    let is_base_gone = base.is_some_and(|base| ledger.lock().unwrap()[&base].is_deleted);
                    assert!(is_base_gone, "{order:?}: {error}");
                    last = None;
                }
            }
        }
    };
    let reclaim = || {
        let random = SeededRandomness::new(99);
        while goes_on() {
            rig.clock.advance(Duration::from_millis(1));
            let victims: Vec<RecoveryPointId> = {
                let mut ledger = ledger.lock().unwrap();
                let mut live: Vec<_> = ledger.iter_mut().filter(|(_, line)| !line.is_deleted).collect();
                let most = live.len().saturating_sub(6);
                let marked = live.iter_mut().filter(|_| random.below(4) > 0).take(most);
                marked
                    .map(|(id, line)| {
                        line.is_deleted = true;
                        **id
                    })
                    .collect()
            };
            for victim in victims {
                pool.delete_point(victim, "test").unwrap();
            }
            rig.clock.advance(Duration::from_millis(1));
            let report = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
            freed.fetch_add(report.freed_packs, Ordering::SeqCst);
        }
    };
    let look = || {
        let random = SeededRandomness::new(98);
        while goes_on() {
            let ids: Vec<_> = ledger.lock().unwrap().keys().copied().collect();
            let Some(id) = ids.get(random.below(ids.len().max(1) as u64) as usize) else { continue };
            // Pinned first, then asked: what was not deleted then can be read to its end.
            let Ok(device) = pool.open_disk(*id, 0) else { continue };
            let content = {
                let ledger = ledger.lock().unwrap();
                let line = &ledger[id];
                if line.is_deleted {
                    continue;
                }
                line.content.clone()
            };
            assert_eq!(is_exact(&pool, *id, &content), Ok(true), "{id}");
            drop(device);
            read.fetch_add(1, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        let write = &write;
        let threads = [
            scope.spawn(move || write(1)),
            scope.spawn(move || write(2)),
            scope.spawn(move || write(3)),
            scope.spawn(reclaim),
            scope.spawn(look),
        ];
        let mut failed = None;
        for thread in threads {
            if let Err(panic) = thread.join() {
                is_over.store(true, Ordering::SeqCst);
                failed.get_or_insert(panic);
            }
        }
        if let Some(panic) = failed {
            std::panic::resume_unwind(panic);
        }
    });
    drop(pool);
    let pool: Arc<Pool> = rig.writer(1).unwrap();
    for (id, line) in ledger.lock().unwrap().iter().filter(|(_, line)| !line.is_deleted) {
        assert_eq!(is_exact(&pool, *id, &line.content), Ok(true), "{id}");
    }
    let figures = [&made, &read, &freed].map(|figure| figure.load(Ordering::SeqCst));
    println!("points made, read, packs freed: {figures:?}");
    assert!(figures.iter().all(|figure| *figure > 20), "{figures:?}");
}

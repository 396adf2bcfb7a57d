//! Every crash site of every operation, and every state that storage may be in there (INV-1..4).
//!
//! A workload is a pool prepared for one operation. What is enumerated of it:
//!
//! 1. The power goes at each call of storage, and storage is in each of the states that its rules allow: all of them,
//!    which the enumeration itself proves (`CrashStates::complete`).
//! 2. The process is killed at each call that changes something, and then the power goes at each call of the next
//!    process, which sees names that nobody synced.
//! 3. From each of these states, the operation is done again and the power goes at each call of that.
//! 4. From each of these, and of what comes of it, the power goes at each call of coming back, until nothing comes that
//!    was not seen: any number of cuts in a row (INV-4).
//!
//! Equal states are looked at once; `--nocapture` shows how many there are. In each the pool opens, the ledger holds, the
//! operation can be done (again), and all is verified after it. Not enumerated is what a sync leaves that failed or lied.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use environment::simulated::{Failure, Operation, SimulatedFiles, Snapshot, When};
use environment::{Randomness, SeededRandomness};
use model::RecoveryPointId;
use rig::{Content, Open, Rig, id, is_exact, order, store};
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::verify::{Depth, VerifyOptions};
use storage_pool::{Pool, PoolError, Settings};

/// More states than any site here has; the enumeration says if that is wrong.
const EVERY: usize = 4096;

fn settings() -> Settings {
    Settings { reclaim_hold: 0, ..Settings::without_safety() }
}

struct Prepared {
    rig: Rig,
    snapshot: Snapshot,
    /// Points that are there before, and must be exact after.
    ledger: BTreeMap<RecoveryPointId, Content>,
    /// Points that may be there after: whole or not at all; the operation's own and those it removes.
    doubtful: BTreeMap<RecoveryPointId, Content>,
}

/// Two points that share, ready for anything.
fn prepare() -> Prepared {
    prepare_with(settings())
}

fn prepare_with(settings: Settings) -> Prepared {
    let rig = Rig::new(1, settings);
    let pool = rig.writer(1).unwrap();
    let first = order(1, None, &[(0, 1), (1, 2), (4, 3)]);
    let second = order(2, Some(1), &[(1, 4)]);
    store(&pool, &first).unwrap();
    store(&pool, &second).unwrap();
    pool.put_document("policy", Some(b"one")).unwrap();
    drop(pool);
    let mut both = first.changes.clone();
    both.extend(&second.changes);
    Prepared {
        snapshot: rig.files.snapshot(),
        rig,
        ledger: BTreeMap::from([(id(1), first.changes), (id(2), both)]),
        doubtful: BTreeMap::new(),
    }
}

impl Prepared {
    /// A process of its own on a state of the pool. What it draws follows from `process`, and differs from what other
    /// processes drew, so that equal histories give equal bytes.
    fn on(&self, state: &Snapshot, process: u64) -> Rig {
        let random = Arc::new(SeededRandomness::new(0x5EED + process));
        Rig { random, ..self.rig.on(SimulatedFiles::from_snapshot(BEFORE, state)) }
    }
}

/// A seed whose first draw is even: a kill at a site comes before the operation has happened. Killed after it is killed
/// before the next.
const BEFORE: u64 = 2;

/// States of storage, each with whether the operation was acknowledged before it and how it came about.
type States = BTreeMap<(Snapshot, bool), String>;

/// All states after a power cut now.
fn gather(files: &SimulatedFiles, is_acknowledged: bool, told: &str, into: &mut States) {
    let found = files.crash_states(EVERY);
    assert!(found.complete, "{told}: more than {EVERY} states");
    for state in found.states {
        into.entry((state, is_acknowledged)).or_insert_with(|| told.to_owned());
    }
}

/// Enumerates the states around `operation`, as the head of this file tells, and looks at each. `done` tells from a
/// reopened pool whether an acknowledged operation is there. Returns how many states were looked at.
fn every_crash(
    prepared: &Prepared,
    operation: &dyn Fn(&Rig) -> Result<(), PoolError>,
    done: &dyn Fn(&Arc<Pool>) -> bool,
) -> u64 {
    let rig = prepared.on(&prepared.snapshot, 0);
    rig.files.start_trace();
    operation(&rig).unwrap();
    let (sites, trace) = (rig.files.operations(), rig.files.trace());
    assert!(done(&rig.reader().unwrap()));
    let mut fresh = States::new();
    for site in 1..=sites + 1 {
        let rig = prepared.on(&prepared.snapshot, 0);
        rig.files.crash_at(site);
        let is_acknowledged = operation(&rig).is_ok();
        // What is acknowledged although the crash came first must be there in every state all the same.
        assert!(is_acknowledged || site <= sites, "site {site} of {sites}");
        gather(&rig.files, is_acknowledged, &format!("site {site} of {sites}"), &mut fresh);
    }
    let killed_at = trace
        .iter()
        .filter(|site| CHANGES.contains(&site.operation))
        .flat_map(|site| [site.number, site.number + 1])
        .collect::<BTreeSet<u64>>();
    for site in killed_at {
        // The next process, cut off at its first, second, .. operation until it gets by.
        for cut in 1.. {
            let rig = prepared.on(&prepared.snapshot, 0);
            rig.files.kill_at(site);
            let is_acknowledged = operation(&rig).is_ok();
            rig.files.kill();
            let next = prepared.on(&Snapshot::default(), 1);
            let next = Rig { files: rig.files.second_process(), ..next };
            next.files.crash_at(rig.files.operations() + cut);
            drop(next.writer(1));
            let is_by = !next.files.is_off();
            let told = format!("killed at site {site} of {sites}, then cut at {cut}");
            gather(&next.files, is_acknowledged, &told, &mut fresh);
            if is_by {
                break;
            }
        }
    }
    let (mut seen, mut cuts) = (BTreeSet::new(), 1);
    while !fresh.is_empty() {
        assert!(cuts < MOST_CUTS, "{cuts} cuts in a row still lead to states that were not seen");
        for ((state, is_acknowledged), told) in &fresh {
            // A number that no other process of this history has.
            examine(prepared, &prepared.on(state, 1000), *is_acknowledged, operation, done, told);
            seen.insert((state.clone(), *is_acknowledged));
        }
        let mut next = States::new();
        for ((state, was_acknowledged), told) in &fresh {
            for cut in 1.. {
                let rig = prepared.on(state, 10 + cuts);
                rig.files.crash_at(cut);
                let is_acknowledged = match cuts {
                    1 => operation(&rig).is_ok(),
                    _ => {
                        drop(rig.writer(1));
                        false
                    }
                };
                let is_by = !rig.files.is_off();
                let told = format!("{told}, then cut at {cut}");
                gather(&rig.files, *was_acknowledged || is_acknowledged, &told, &mut next);
                if is_by {
                    break;
                }
            }
        }
        next.retain(|state, _| !seen.contains(state));
        (fresh, cuts) = (next, cuts + 1);
    }
    println!(
        "\n{sites} calls, {} different states, the last new ones after {} cuts in a row\nresult: {} crash states",
        seen.len(),
        cuts - 1,
        seen.len()
    );
    seen.len() as u64
}

/// Cuts in a row after which nothing new may come any more.
const MOST_CUTS: u64 = 12;

/// Operations after which storage is in another state than before.
const CHANGES: [Operation; 5] =
    [Operation::Link, Operation::SyncFolder, Operation::MakeFolder, Operation::Unlink, Operation::Lock];

/// One state: it opens, the ledger holds, the operation can be done again or goes on.
fn examine(
    prepared: &Prepared,
    rig: &Rig,
    is_acknowledged: bool,
    operation: &dyn Fn(&Rig) -> Result<(), PoolError>,
    done: &dyn Fn(&Arc<Pool>) -> bool,
    told: &str,
) {
    let pool = rig.writer(1).unwrap_or_else(|error| panic!("{told}: {error}"));
    assert!(pool.notes().iter().all(is_derived), "{told}: {:?}", pool.notes());
    assert!(pool.state().unreadable.is_empty(), "{told}");
    look(prepared, &pool, told);
    assert!(!is_acknowledged || done(&pool), "{told}: acknowledged and gone");
    drop(pool);
    let _ = operation(rig);
    let pool = rig.writer(1).unwrap();
    look(prepared, &pool, told);
    assert!(done(&pool), "{told}: not done by doing it again");
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert!(report.damage.iter().all(is_derived), "{told}: {report:?}");
}

fn is_derived(damage: &storage_pool::Damage) -> bool {
    matches!(damage, storage_pool::Damage::File { derived: true, .. })
}

fn look(prepared: &Prepared, pool: &Arc<Pool>, told: &str) {
    for (id, content) in &prepared.ledger {
        assert_eq!(is_exact(pool, *id, content), Ok(true), "{told}: {id}");
    }
    let there: Vec<RecoveryPointId> = pool.state().points.keys().copied().collect();
    for id in there.iter().filter(|id| !prepared.ledger.contains_key(id)) {
        let content = prepared.doubtful.get(id).unwrap_or_else(|| panic!("{told}: {id} out of nothing"));
        let point = pool.point(*id).unwrap();
        if !pool.state().is_expired(&point, 0) {
            assert_eq!(is_exact(pool, *id, content), Ok(true), "{told}: {id}");
        }
    }
}

#[test]
fn commit() {
    let mut prepared = prepare();
    let new = order(3, Some(2), &[(0, 5), (3, 6), (1, 0)]);
    let mut content = prepared.ledger[&id(2)].clone();
    content.extend(&new.changes);
    prepared.doubtful.insert(id(3), content);
    let states = every_crash(
        &prepared,
        &|rig| match store(&rig.writer(1)?, &new) {
            // Done again after a crash that left it there.
            Err(PoolError::Misuse(reason)) if reason.contains("exists") => Ok(()),
            other => other,
        },
        &|pool| pool.point(id(3)).is_ok(),
    );
    assert!(states >= 9, "{states}");
}

#[test]
fn tombstone_and_undelete() {
    let mut prepared = prepare();
    prepared.doubtful.extend(prepared.ledger.remove_entry(&id(1)));
    every_crash(&prepared, &|rig| rig.writer(1)?.delete_point(id(1), "test"), &|pool| {
        pool.point(id(1)).unwrap().deleted.is_some()
    });
}

/// Quarantine, copying, permit, unlinking and the new run, all in one reclaim without hold.
#[test]
fn reclaim() {
    let mut prepared = prepare();
    let rig = &prepared.rig;
    let pool = rig.writer(1).unwrap();
    // A pack of which little stays in use is rewritten.
    store(&pool, &order(4, None, &[(0, 10), (1, 11), (2, 12), (3, 13), (4, 14)])).unwrap();
    store(&pool, &order(5, None, &[(0, 10)])).unwrap();
    pool.delete_point(id(4), "test").unwrap();
    pool.delete_point(id(1), "test").unwrap();
    drop(pool);
    prepared.snapshot = rig.files.snapshot();
    prepared.doubtful.extend(prepared.ledger.remove_entry(&id(1)));
    prepared.doubtful.insert(id(4), Content::new());
    prepared.ledger.insert(id(5), Content::from([(0, 10)]));
    let before = prepared.snapshot.files().filter(|(name, _)| name.starts_with("packs/")).count();
    let states = every_crash(
        &prepared,
        &|rig| rig.writer(1)?.reclaim(ReclaimOptions::default(), &rig.deletion()).map(drop),
        &|pool| {
            let space = pool.space().unwrap();
            let permitted = pool.state().permitted.len();
            permitted > 2 && space.quarantined == 0 && before > permitted
        },
    );
    assert!(states >= 9, "{states}");
}

/// The volume is full, the ballast goes, a point is deleted, space comes back, ballast is made again.
#[test]
fn ballast() {
    let mut prepared = prepare_with(Settings { reserve: Some(64 << 10), ..settings() });
    prepared.doubtful.extend(prepared.ledger.remove_entry(&id(1)));
    let used = prepared.snapshot.files().map(|(_, bytes)| bytes.len() as u64).sum();
    let states = every_crash(
        &prepared,
        &|rig| {
            let pool = rig.writer(1)?;
            rig.files.set_capacity(Some(used));
            pool.make_room(&rig.deletion())?;
            let deleted = pool.delete_point(id(1), "test");
            rig.files.set_capacity(None);
            deleted?;
            pool.reclaim(ReclaimOptions::default(), &rig.deletion()).map(drop)
        },
        &|pool| pool.point(id(1)).unwrap().deleted.is_some() && pool.space().unwrap().quarantined == 0,
    );
    assert!(states > 90, "{states}");
}

/// A job that stays open while points go and a reclaim frees what they had, and commits then.
///
/// Closed only after many minutes, so it is one of the night's; the suite has the simulation, whose jobs stay open over
/// reclaims too.
#[test]
#[ignore = "takes many minutes: `cargo xtask night` runs it"]
fn commit_after_a_reclaim_beside() {
    let mut prepared = prepare();
    prepared.doubtful.extend(prepared.ledger.remove_entry(&id(1)));
    let new = order(3, Some(2), &[(0, 5), (3, 1)]);
    let mut content = prepared.ledger[&id(2)].clone();
    content.extend(&new.changes);
    prepared.doubtful.insert(id(3), content);
    let states = every_crash(
        &prepared,
        &|rig| {
            let pool = rig.writer(1)?;
            if pool.point(id(3)).is_ok() {
                return Ok(());
            }
            let mut job = Open::begin(&pool, new.clone())?;
            job.go_on()?;
            job.settle()?;
            rig.clock.advance(std::time::Duration::from_secs(1));
            pool.delete_point(id(1), "test")?;
            rig.clock.advance(std::time::Duration::from_secs(1));
            pool.reclaim(ReclaimOptions::default(), &rig.deletion())?;
            job.commit()
        },
        &|pool| pool.point(id(3)).is_ok(),
    );
    assert!(states > 100, "{states}");
}

/// Scattered blocks written once more: the packs, the run; no record.
#[test]
fn relay() {
    let mut prepared = prepare();
    let rig = &prepared.rig;
    let pool = rig.writer(1).unwrap();
    let scattered = order(4, None, &[(0, 10), (1, 11), (2, 12), (3, 13), (4, 14)]);
    store(&pool, &scattered).unwrap();
    drop(pool);
    prepared.snapshot = rig.files.snapshot();
    prepared.ledger.insert(id(4), scattered.changes);
    let states =
        every_crash(&prepared, &|rig| rig.writer(1)?.relay(id(4), None, 1 << 20).map(drop), &|pool| {
            let layout = pool.layout(id(4)).unwrap();
            layout.scattered == 0 && layout.frames == layout.ideal_frames
        });
    assert!(states >= 7, "{states}");
}

/// A new key generation for all: two ring files, two records.
#[test]
fn rotation() {
    let prepared = prepare();
    let states = every_crash(&prepared, &|rig| rig.writer(1)?.rotate_keys(&[]).map(drop), &|pool| {
        pool.state().generation > 0
            && pool.prove(&prepared.rig.kit).is_ok()
            && pool.prove(&prepared.rig.server).is_ok()
    });
    assert!(states >= 9, "{states}");
}

/// A new key generation without a kit: it is out, and everybody else is in.
#[test]
fn revocation() {
    let mut prepared = prepare();
    let mut kit = None;
    let pool = prepared.rig.writer(1).unwrap();
    pool.add_kit(&mut |new| {
        kit = Some(new.clone());
        Ok(new.clone())
    })
    .unwrap();
    drop(pool);
    let out = kit.unwrap();
    prepared.snapshot = prepared.rig.files.snapshot();
    let states = every_crash(&prepared, &|rig| rig.writer(1)?.rotate_keys(&[out.id]).map(drop), &|pool| {
        let is_in = |recipient| pool.prove(recipient).is_ok();
        let is_removed =
            pool.recipients().unwrap().iter().any(|known| known.id == out.id && known.is_removed);
        is_removed && !is_in(&out) && is_in(&prepared.rig.kit) && is_in(&prepared.rig.server)
    });
    assert!(states >= 9, "{states}");
}

#[test]
fn document() {
    let prepared = prepare();
    every_crash(&prepared, &|rig| rig.writer(1)?.put_document("policy", Some(b"two")), &|pool| {
        pool.document("policy").as_deref() == Some(b"two")
    });
}

#[test]
fn takeover() {
    let prepared = prepare();
    every_crash(&prepared, &|rig| rig.writer(2).map(drop), &|_| true);
}

#[test]
fn damage_and_the_block_stored_again() {
    let mut prepared = prepare();
    let (name, length) = prepared
        .snapshot
        .files()
        .filter(|(name, _)| name.starts_with("packs/"))
        .max_by_key(|(_, bytes)| bytes.len())
        .map(|(name, bytes)| (name.to_owned(), bytes.len()))
        .unwrap();
    assert!(length > 900);
    let mut bytes = prepared.snapshot.get(&name).unwrap().to_vec();
    bytes[64 + 100] ^= 1;
    prepared.snapshot.insert(&name, bytes);
    // The damage is older than the operation, so nothing is owed but that the new point is exact.
    prepared.doubtful.insert(id(6), Content::from([(0, 1), (1, 2)]));
    let old = std::mem::take(&mut prepared.ledger);
    let new = order(6, None, &[(0, 1), (1, 2)]);
    let fresh = |seed: u64| prepared.rig.on(SimulatedFiles::from_snapshot(seed, &prepared.snapshot));
    let rig = fresh(0);
    store(&rig.writer(1).unwrap(), &new).unwrap();
    let sites = rig.files.operations();
    for site in 1..=sites + 1 {
        let rig = fresh(site);
        rig.files.crash_at(site);
        let is_acknowledged = rig.writer(1).and_then(|pool| store(&pool, &new)).is_ok();
        rig.files.reboot(site);
        let pool = rig.writer(1).unwrap();
        if is_acknowledged || pool.point(id(6)).is_ok() {
            assert_eq!(is_exact(&pool, id(6), &new.changes), Ok(true), "site {site}");
        }
        for (id, content) in &old {
            assert_ne!(is_exact(&pool, *id, content), Ok(false), "site {site}");
        }
    }
}

/// A verify by age: its record says what was read, or the part is due again.
#[test]
fn verify_by_age() {
    let mut prepared = prepare();
    let pool = prepared.rig.writer(1).unwrap();
    drop(pool);
    prepared.rig.clock.advance(std::time::Duration::from_secs(40 * 86_400));
    prepared.snapshot = prepared.rig.files.snapshot();
    let options = VerifyOptions { every: Some(30 * 86_400), ..VerifyOptions::new(Depth::ReadData) };
    every_crash(
        &prepared,
        &|rig| rig.writer(1)?.verify_with(&options, &mut |_, _| true).map(drop),
        &|pool| pool.due(30 * 86_400).is_none(),
    );
}

#[test]
fn restored_record() {
    let mut prepared = prepare();
    let pool = prepared.rig.writer(1).unwrap();
    let number = pool.point(id(1)).unwrap().number;
    let copy = pool.record_bytes(number).unwrap();
    drop(pool);
    let name = format!("sequence/{number:016x}.record");
    prepared.rig.files.flip_bit(&name, 1000).unwrap();
    prepared.snapshot = prepared.rig.files.snapshot();
    prepared.doubtful.extend(prepared.ledger.remove_entry(&id(1)));
    let fresh = |seed: u64| prepared.rig.on(SimulatedFiles::from_snapshot(seed, &prepared.snapshot));
    let restore = |rig: &Rig| rig.writer(1)?.restore_record(number, &copy);
    let rig = fresh(0);
    assert!(restore(&rig).unwrap());
    for site in 1..=rig.files.operations() + 1 {
        let rig = fresh(site);
        rig.files.crash_at(site);
        let is_acknowledged = restore(&rig).is_ok();
        rig.files.reboot(site);
        let pool = rig.writer(1).unwrap();
        look(&prepared, &pool, "restored");
        assert!(!is_acknowledged || pool.point(id(1)).is_ok());
        drop(pool);
        restore(&rig).unwrap();
        let pool = rig.writer(1).unwrap();
        assert!(pool.state().unreadable.is_empty());
        assert_eq!(is_exact(&pool, id(1), &prepared.doubtful[&id(1)]), Ok(true));
    }
}

/// A creation that is cut off leaves no pool, or one that opens; it can be tried again in the same folder until then.
#[test]
fn creation() {
    let create = |files: &SimulatedFiles| {
        let template = Rig::new(3, settings());
        let world = template.on(files.clone()).world();
        Pool::create(world, settings(), [1; 16], "one", &mut |kit| Ok(kit.clone()))
            .map(|created| created.server)
    };
    let files = SimulatedFiles::new(1);
    create(&files).unwrap();
    for site in 1..=files.operations() + 1 {
        let files = SimulatedFiles::new(site);
        files.crash_at(site);
        let server = create(&files);
        files.reboot(site);
        match server {
            Ok(server) => {
                let rig = Rig { server, ..Rig::new(3, settings()) }.on(files);
                assert!(rig.writer(1).is_ok());
            }
            Err(_) => match create(&files) {
                Ok(_) | Err(PoolError::Exists { .. }) => {}
                Err(error) => panic!("site {site}: {error}"),
            },
        }
    }
}

/// Randomness of which every draw begins with one of few bytes, so that packs fall into few folders: a folder that a
/// failed sync left in doubt is met again soon, and not once in 256 times.
struct Few {
    drawn: SeededRandomness,
    first: u8,
}

impl Randomness for Few {
    fn fill(&self, buf: &mut [u8]) -> std::io::Result<()> {
        self.drawn.fill(buf)?;
        if let Some(first) = buf.first_mut() {
            *first %= self.first;
        }
        Ok(())
    }
}

/// What a failed sync loses is drawn, and so is where packs go: so many times for each sync.
const DRAWS: u64 = 60;

/// Every call of a commit and of a reclaim fails once, in every way (INV-5).
#[test]
fn every_call_fails_once() {
    let prepared = prepare();
    let new = order(3, Some(2), &[(0, 5), (3, 6)]);
    let mut content = prepared.ledger[&id(2)].clone();
    content.extend(&new.changes);
    let work = |rig: &Rig| {
        let pool = rig.writer(1)?;
        store(&pool, &new)?;
        pool.delete_point(id(1), "test")?;
        pool.reclaim(ReclaimOptions::default(), &rig.deletion()).map(drop)
    };
    // The draw decides where packs go, and so which calls there are; with the site, what is lost.
    let fresh = |site: u64, draw: u64| {
        let random = Arc::new(Few { drawn: SeededRandomness::new(draw), first: 4 });
        let files = SimulatedFiles::from_snapshot(site * DRAWS + draw, &prepared.snapshot);
        Rig { random, ..prepared.rig.on(files) }
    };
    let mut looked_at = 0;
    for draw in 0..DRAWS {
        let rig = fresh(0, draw);
        rig.files.start_trace();
        work(&rig).unwrap();
        for site in rig.files.trace() {
            let is_sync = matches!(site.operation, Operation::SyncFile | Operation::SyncFolder);
            // Other calls have nothing that is drawn; a failed sync that drops differs for syncs only.
            let failures: &[Failure] = match (draw, is_sync) {
                (0, true) => &[Failure::Io, Failure::IoAfter, Failure::NoSpace, Failure::SyncDropsData],
                (0, false) => &[Failure::Io, Failure::IoAfter, Failure::NoSpace],
                (_, true) => &[Failure::SyncDropsData],
                (_, false) => &[],
            };
            for &failure in failures {
                let rig = fresh(site.number, draw);
                rig.files.fail(When::At(site.number), failure);
                let told = format!("draw {draw}, site {site}, {failure:?}");
                looked_at += 1;
                let pool = match rig.writer(1) {
                    Ok(pool) => pool,
                    Err(_) => continue,
                };
                let is_stored = store(&pool, &new).is_ok();
                let _ = pool.delete_point(id(1), "test");
                let _ = pool.reclaim(ReclaimOptions::default(), &rig.deletion());
                drop(pool);
                // Something else goes on, on the same storage, with sharing.
                let second = order(7, None, &[(0, 5), (1, 4), (2, 6)]);
                let other = rig.writer(1).and_then(|pool| store(&pool, &second));
                rig.files.reboot(site.number);
                let pool = rig.reader().unwrap_or_else(|error| panic!("{told}: {error}"));
                if is_stored {
                    assert_eq!(is_exact(&pool, id(3), &content), Ok(true), "{told}");
                }
                if other.is_ok() {
                    assert_eq!(is_exact(&pool, id(7), &second.changes), Ok(true), "{told}");
                }
                assert_eq!(is_exact(&pool, id(2), &prepared.ledger[&id(2)]), Ok(true), "{told}");
            }
        }
    }
    println!("\n{looked_at} failures");
    assert!(looked_at > 3000, "{looked_at}");
}

/// The sync fails that should make the name of a new folder of packs durable. The folder stays visible, and later syncs
/// succeed without bringing it to the disk: nobody may put a pack into it, neither this process nor the next.
#[test]
fn no_pack_in_a_folder_whose_sync_failed() {
    let prepared = prepare();
    let mut lost = 0;
    for seed in 0..32 {
        let rig = |first| {
            let random = Arc::new(Few { drawn: SeededRandomness::new(seed), first });
            Rig { random, ..prepared.rig.on(SimulatedFiles::from_snapshot(seed, &prepared.snapshot)) }
        };
        let (failed, later, last) =
            (order(3, None, &[(0, 5)]), order(4, None, &[(0, 6)]), order(5, None, &[(0, 7)]));

        // Another folder can be had.
        let two = rig(2);
        let pool = two.writer(1).unwrap();
        two.files.fail(When::Next(Operation::SyncFolder), Failure::SyncDropsData);
        assert!(store(&pool, &failed).is_err());
        store(&pool, &later).unwrap();
        drop(pool);
        store(&two.writer(1).unwrap(), &last).unwrap();
        let folders = two.files.snapshot().folders().count();
        two.files.reboot(seed);
        lost += folders - two.files.snapshot().folders().count();
        let pool = two.writer(1).unwrap();
        for order in [&later, &last] {
            assert_eq!(is_exact(&pool, order.id, &order.changes), Ok(true), "seed {seed}: {}", order.id);
        }

        // None can: nothing is acknowledged.
        let one = rig(1);
        let pool = one.writer(1).unwrap();
        one.files.fail(When::Next(Operation::SyncFolder), Failure::SyncDropsData);
        assert!(store(&pool, &failed).is_err());
        assert!(store(&pool, &later).is_err(), "seed {seed}");
        drop(pool);
        assert!(store(&one.writer(1).unwrap(), &last).is_err(), "seed {seed}");
    }
    assert!((1..32).contains(&lost), "{lost}");
}

/// A folder that a reclaim emptied had packs, so its name lasts: the next process puts packs there again, and churn does
/// not use up the 256 folders.
#[test]
fn an_emptied_folder_of_packs_is_used_again() {
    let prepared = prepare();
    let random = Arc::new(Few { drawn: SeededRandomness::new(1), first: 1 });
    let rig = Rig { random, ..prepared.rig.on(SimulatedFiles::from_snapshot(1, &prepared.snapshot)) };
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(3, None, &[(0, 5)])).unwrap();
    for n in 1..=3 {
        pool.delete_point(id(n), "test").unwrap();
    }
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    drop(pool);
    assert!(rig.files.snapshot().files().all(|(name, _)| !name.starts_with("packs/")));
    assert!(rig.files.snapshot().folders().any(|folder| folder == "packs/00"));
    let again = order(4, None, &[(0, 6)]);
    store(&rig.writer(1).unwrap(), &again).unwrap();
    rig.files.reboot(1);
    assert_eq!(is_exact(&rig.reader().unwrap(), id(4), &again.changes), Ok(true));
}

/// The fourth run of a tier: it is written, and the four become one.
#[test]
fn merge_of_runs() {
    let mut prepared = prepare();
    let pool = prepared.rig.writer(1).unwrap();
    let third = order(3, Some(2), &[(2, 7)]);
    store(&pool, &third).unwrap();
    drop(pool);
    prepared.snapshot = prepared.rig.files.snapshot();
    let runs = |snapshot: &Snapshot| snapshot.files().filter(|(name, _)| name.ends_with(".run")).count();
    assert_eq!(runs(&prepared.snapshot), 3);
    let mut content = prepared.ledger[&id(2)].clone();
    content.extend(&third.changes);
    prepared.ledger.insert(id(3), content.clone());
    let fourth = order(4, Some(3), &[(0, 8), (3, 9)]);
    content.extend(&fourth.changes);
    prepared.doubtful.insert(id(4), content);
    let states = every_crash(
        &prepared,
        &|rig| {
            match store(&rig.writer(1)?, &fourth) {
                // Done again after a crash that left it there.
                Err(PoolError::Misuse(reason)) if reason.contains("exists") => {}
                other => other?,
            }
            // The new run and the one of all four.
            assert!(runs(&rig.files.snapshot()) >= 5);
            Ok(())
        },
        &|pool| pool.point(id(4)).is_ok(),
    );
    assert!(states >= 9, "{states}");
}

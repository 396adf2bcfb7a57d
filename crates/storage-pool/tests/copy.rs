//! A second copy (section 11): whatever happens on the way, it is a pool that restores what its records name (INV-1,
//! INV-3), and nothing leaves it but by a permit (INV-10, INV-15).
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use environment::simulated::{Failure, SimulatedFiles, Snapshot, When};
use model::RecoveryPointId;
use rig::{Content, Rig, id, is_exact, order, store};
use storage_pool::copy::{Copy, CopyOptions, CopyReport, plan};
use storage_pool::reclaim::{InProcessDeletion, ReclaimOptions};
use storage_pool::verify::Depth;
use storage_pool::{Damage, Pool, PoolError, Settings};

type Ledger = BTreeMap<RecoveryPointId, Content>;

/// A pool of two points that share, and what they hold.
fn source() -> (Rig, Ledger) {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &[(0, 1), (1, 2), (4, 3)])).unwrap();
    store(&pool, &order(2, Some(1), &[(1, 4)])).unwrap();
    let ledger = Ledger::from([
        (id(1), Content::from([(0, 1), (1, 2), (4, 3)])),
        (id(2), Content::from([(0, 1), (1, 4), (4, 3)])),
    ]);
    (rig, ledger)
}

/// The same pool's copy in `files`.
fn copy_of(rig: &Rig, files: SimulatedFiles) -> Rig {
    rig.on(files)
}

fn run(source: &Rig, copy: &Rig) -> Result<CopyReport, PoolError> {
    run_with(source, copy, CopyOptions::default(), &mut |_, _| true)
}

fn run_with(
    source: &Rig,
    copy: &Rig,
    options: CopyOptions,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<CopyReport, PoolError> {
    Copy::begin(source.world(), copy.world())?.run(options, None, progress)
}

/// The copy opens with the kit alone and has the ledger, to the byte.
fn has(copy: &Rig, ledger: &Ledger, told: &str) {
    let pool = copy.reader().unwrap_or_else(|error| panic!("{told}: {error}"));
    assert!(pool.state().unreadable.is_empty(), "{told}: {:?}", pool.state().unreadable);
    for (id, content) in ledger {
        assert_eq!(is_exact(&pool, *id, content), Ok(true), "{told}: {id}");
    }
    let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
    assert!(report.damage.is_empty(), "{told}: {:?}", report.damage);
}

fn packs(files: &SimulatedFiles) -> Vec<String> {
    names(&files.snapshot(), "packs/")
}

fn names(snapshot: &Snapshot, prefix: &str) -> Vec<String> {
    snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn a_copy_has_every_point_and_a_second_run_moves_nothing() {
    let (rig, ledger) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    let planned = plan(&rig.world(), &copy.world()).unwrap();
    assert!(planned.is_new && planned.packs > 0 && planned.bytes_present == 0);
    assert_eq!(copy.files.snapshot(), Snapshot::default(), "a plan touches nothing");
    let first = run(&rig, &copy).unwrap();
    assert_eq!((first.packs_copied, first.records_copied), (planned.packs, planned.records));
    assert_eq!(first.head, rig.reader().unwrap().state().head);
    has(&copy, &ledger, "first");
    let snapshot = copy.files.snapshot();
    for folder in ["keys/", "packs/", "sequence/", "pool.stillpoint"] {
        assert_eq!(names(&snapshot, folder), names(&rig.files.snapshot(), folder));
    }
    assert!(names(&snapshot, "index/").is_empty());
    let second = run(&rig, &copy).unwrap();
    assert_eq!((second.bytes_copied, second.packs_copied, second.records_copied), (0, 0, 0));
    assert_eq!(second.bytes_present, planned.pack_bytes);
    assert_eq!(copy.files.snapshot(), snapshot);
}

#[test]
fn a_later_run_moves_what_is_new() {
    let (rig, mut ledger) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    store(&rig.writer(1).unwrap(), &order(3, Some(2), &[(0, 7)])).unwrap();
    ledger.insert(id(3), Content::from([(0, 7), (1, 4), (4, 3)]));
    let planned = plan(&rig.world(), &copy.world()).unwrap();
    let report = run(&rig, &copy).unwrap();
    assert_eq!((report.records_copied, report.packs_copied), (1, 2), "{report:?}");
    assert_eq!((planned.records, planned.packs), (1, 2));
    has(&copy, &ledger, "later");
}

/// A server may take the copy over; from then on it is no copy, and says so on either side.
#[test]
fn a_copy_that_was_taken_over_is_a_pool_of_its_own() {
    let (rig, ledger) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    let pool = copy.writer(2).unwrap();
    store(&pool, &order(9, Some(2), &[(2, 9)])).unwrap();
    drop(pool);
    for round in 0..2 {
        let refused = run(&rig, &copy).unwrap_err();
        assert!(matches!(refused, PoolError::CopyDiverged { .. }), "{round}: {refused}");
        assert!(matches!(plan(&rig.world(), &copy.world()), Err(PoolError::CopyDiverged { .. })));
        // The source goes on as well: now both have records of these numbers.
        store(&rig.writer(1).unwrap(), &order(10 + round, Some(2), &[(3, 5)])).unwrap();
        store(&rig.writer(1).unwrap(), &order(20 + round, Some(2), &[(3, 6)])).unwrap();
    }
    has(&copy, &ledger, "taken over");
}

#[test]
fn only_an_empty_folder_or_this_pools_copy_will_do() {
    let (rig, _) = source();
    let other = Rig::new(77, Settings::without_safety());
    assert!(matches!(run(&rig, &other), Err(PoolError::OtherPool { .. })));
    for name in ["holiday.jpg", "packs/00/x", "sequence/0000000000000001.record", "keys/foreign.key"] {
        let files = SimulatedFiles::new(3);
        files.set_bytes(name, b"somebody's".to_vec());
        let before = files.snapshot();
        let copy = copy_of(&rig, files);
        assert!(matches!(run(&rig, &copy), Err(PoolError::NotACopy { .. })), "{name}");
        assert_eq!(copy.files.snapshot(), before, "{name}");
    }
}

#[test]
fn two_copies_into_one_folder_and_a_server_on_it_wait_for_each_other() {
    let (rig, _) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    let held = Copy::begin(rig.world(), copy.world()).unwrap();
    let other = copy.on(copy.files.second_process());
    assert!(matches!(run(&rig, &other), Err(PoolError::Busy { .. })));
    held.run(CopyOptions::default(), None, &mut |_, _| true).unwrap();
    assert!(matches!(other.writer(2), Err(PoolError::Busy { .. })));
}

/// Every crash site of a first copy and of one that goes on: what is there is no pool yet, or one that holds its ledger; the
/// next run ends it.
#[test]
fn every_crash_of_a_copy() {
    let (rig, first) = source();
    let empty = SimulatedFiles::new(1).snapshot();
    let half = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &half).unwrap();
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(3, Some(2), &[(0, 7)])).unwrap();
    store(&pool, &order(4, Some(1), &[(2, 8)])).unwrap();
    pool.put_document("policy", Some(b"one")).unwrap();
    drop(pool);
    let mut all = first.clone();
    all.insert(id(3), Content::from([(0, 7), (1, 4), (4, 3)]));
    all.insert(id(4), Content::from([(0, 1), (1, 2), (2, 8), (4, 3)]));
    let mut looked_at = 0;
    for (before, owed) in [(empty, None), (half.files.snapshot(), Some(&first))] {
        let whole = copy_of(&rig, SimulatedFiles::from_snapshot(0, &before));
        run(&rig, &whole).unwrap();
        let sites = whole.files.operations();
        for site in 1..=sites + 1 {
            let copy = copy_of(&rig, SimulatedFiles::from_snapshot(site, &before));
            copy.files.crash_at(site);
            let is_done = run(&rig, &copy).is_ok();
            for (number, state) in copy.files.crash_states(4).states.iter().enumerate() {
                let told = format!("site {site} of {sites}, state {number}");
                let again = copy_of(&rig, SimulatedFiles::from_snapshot(site, state));
                match again.reader() {
                    Ok(pool) => {
                        assert!(pool.state().unreadable.is_empty(), "{told}");
                        let there: Vec<_> = pool.state().points.keys().copied().collect();
                        for point in there {
                            assert_eq!(is_exact(&pool, point, &all[&point]), Ok(true), "{told}: {point}");
                        }
                        for point in owed.into_iter().flat_map(Ledger::keys) {
                            assert!(pool.point(*point).is_ok(), "{told}: {point}");
                        }
                    }
                    Err(PoolError::NoPool { .. }) if owed.is_none() && !is_done => {}
                    Err(error) => panic!("{told}: {error}"),
                }
                let report = run(&rig, &again).unwrap_or_else(|error| panic!("{told}: {error}"));
                assert!(report.damage.is_empty(), "{told}: {:?}", report.damage);
                has(&again, &all, &told);
                looked_at += 1;
            }
        }
    }
    assert!(looked_at > 150, "{looked_at}");
}

/// Every call at the copy fails once, in every way: an error, never a copy that says it is done and is not (INV-5).
#[test]
fn every_call_fails_once() {
    let (rig, ledger) = source();
    let whole = copy_of(&rig, SimulatedFiles::new(0));
    run(&rig, &whole).unwrap();
    for site in 1..=whole.files.operations() {
        for failure in [Failure::Io, Failure::IoAfter, Failure::NoSpace, Failure::SyncDropsData] {
            let copy = copy_of(&rig, SimulatedFiles::new(site));
            copy.files.fail(When::At(site), failure);
            let told = format!("site {site}, {failure:?}");
            let is_done = run(&rig, &copy).is_ok_and(|report| report.damage.is_empty());
            copy.files.clear_faults();
            if is_done {
                copy.files.reboot(site);
                has(&copy, &ledger, &told);
            }
            // What a failed sync of a folder lost is found missing after the next start, and moved again.
            copy.files.reboot(site);
            let report = run(&rig, &copy).unwrap_or_else(|error| panic!("{told}: {error}"));
            assert!(report.damage.is_empty(), "{told}: {:?}", report.damage);
            has(&copy, &ledger, &told);
        }
    }
}

/// A writer commits, deletes and reclaims without hold while the copy is under way, at each of its steps.
#[test]
fn beside_a_writer_and_a_reclaim_without_hold() {
    for step in 0..12 {
        let (rig, mut ledger) = source();
        // A pack of which little stays in use: reclaim moves a needed chunk out of it and lets it go.
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(4, None, &[(0, 10), (1, 11), (2, 12), (3, 13), (4, 14)])).unwrap();
        store(&pool, &order(5, None, &[(0, 10)])).unwrap();
        ledger.insert(id(5), Content::from([(0, 10)]));
        let copy = copy_of(&rig, SimulatedFiles::new(step));
        let calls = Cell::new(0);
        let report = run_with(&rig, &copy, CopyOptions::default(), &mut |_, _| {
            calls.set(calls.get() + 1);
            if calls.get() == step + 1 {
                pool.delete_point(id(4), "test").unwrap();
                store(&pool, &order(6, Some(2), &[(3, 15)])).unwrap();
                let freed = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
                assert!(freed.freed_packs > 0);
                store(&pool, &order(7, Some(6), &[(2, 16)])).unwrap();
            }
            true
        })
        .unwrap();
        assert!(calls.get() > step, "step {step} is never reached");
        drop(pool);
        assert!(report.damage.is_empty());
        let told = format!("step {step}, {} passes", report.passes);
        if report.passes > 1 {
            ledger.insert(id(6), Content::from([(0, 1), (1, 4), (3, 15), (4, 3)]));
        }
        let opened = copy.reader().unwrap();
        // Whatever the copy's records call alive can be had from it.
        let state = opened.state().clone();
        for point in state.in_order().filter(|point| !state.is_expired(point, 0)) {
            let Some(content) = ledger.get(&point.id) else { continue };
            assert_eq!(is_exact(&opened, point.id, content), Ok(true), "{told}: {}", point.id);
        }
        for point in ledger.keys() {
            assert!(state.points.contains_key(point), "{told}: {point}");
        }
        drop(opened);
        run(&rig, &copy).unwrap();
        ledger.insert(id(7), Content::from([(0, 1), (1, 4), (2, 16), (3, 15), (4, 3)]));
        ledger.insert(id(6), Content::from([(0, 1), (1, 4), (3, 15), (4, 3)]));
        has(&copy, &ledger, &told);
    }
}

/// What the source let go of leaves the copy by the same permit, never because it is missing there.
#[test]
fn a_permit_carried_out_at_the_source_is_carried_out_on_the_copy() {
    let (rig, mut ledger) = source();
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(4, None, &[(0, 10), (1, 11)])).unwrap();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    let service = InProcessDeletion {
        world: copy.world(),
        removal: Arc::new(copy.files.clone()),
        recipient: copy.server.clone(),
    };
    let let_go = |report: &CopyReport| {
        Copy::begin(rig.world(), copy.world()).unwrap().let_go(report, &rig.kit, &service).unwrap()
    };

    // A pack that is missing at the source without a permit stays.
    let before = packs(&copy.files);
    let stray = before[0].clone();
    let bytes = rig.files.snapshot().get(&stray).unwrap().to_vec();
    rig.files.delete(&stray).unwrap();
    let report = run(&rig, &copy).unwrap();
    assert_eq!(let_go(&report), 0);
    assert_eq!(packs(&copy.files), before);
    rig.files.set_bytes(&stray, bytes);

    pool.delete_point(id(4), "test").unwrap();
    let freed = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(freed.freed_bytes > 0);
    drop(pool);
    // Before its records are there nothing goes; after a run with damage neither.
    assert_eq!(let_go(&report), 0);
    let report = run(&rig, &copy).unwrap();
    let damaged = CopyReport {
        damage: vec![Damage::File { path: String::new(), offset: 0, reason: String::new(), derived: false }],
        ..report.clone()
    };
    assert_eq!(let_go(&damaged), 0);
    assert_eq!(let_go(&report), freed.freed_bytes);
    assert_eq!(packs(&copy.files), packs(&rig.files));
    ledger.remove(&id(4));
    has(&copy, &ledger, "after a permit");
}

#[test]
fn rot_at_the_source_is_named_and_not_copied() {
    let (rig, _) = source();
    for name in packs(&rig.files).into_iter().chain(names(&rig.files.snapshot(), "sequence/")) {
        let length = rig.files.snapshot().get(&name).unwrap().len() as u64;
        for byte in [0, 20, 70, length / 2, length - 40, length - 1] {
            let source = rig.on(SimulatedFiles::from_snapshot(1, &rig.files.snapshot()));
            source.files.flip_bit(&name, byte * 8 + 3).unwrap();
            let copy = copy_of(&rig, SimulatedFiles::new(2));
            let report = run(&source, &copy).unwrap();
            let told: Vec<_> = report.damage.iter().map(|damage| format!("{damage:?}")).collect();
            assert!(told.len() == 1 && told[0].contains(&name), "byte {byte} of {name}: {told:?}");
            assert!(copy.files.snapshot().get(&name).is_none(), "byte {byte} of {name} was copied");
            // The file mended, the next run has it.
            assert!(run(&rig, &copy).unwrap().damage.is_empty());
            assert!(copy.files.snapshot().get(&name).is_some());
        }
    }
}

/// With `accept_damage`, what can be had of a damaged pack can be had of the copy.
#[test]
fn a_damaged_pack_is_copied_when_that_is_asked_for() {
    let (rig, ledger) = source();
    let snapshot = rig.files.snapshot();
    let largest = packs(&rig.files).into_iter().max_by_key(|name| snapshot.get(name).unwrap().len()).unwrap();
    rig.files.flip_bit(&largest, 110 * 8).unwrap();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    let options = CopyOptions { accept_damage: true, ..CopyOptions::default() };
    let report = run_with(&rig, &copy, options, &mut |_, _| true).unwrap();
    assert_eq!(report.damage.len(), 1, "{:?}", report.damage);
    assert_eq!(copy.files.snapshot().get(&largest), rig.files.snapshot().get(&largest));
    let (one, other) = (rig.reader().unwrap(), copy.reader().unwrap());
    for (id, content) in &ledger {
        assert_eq!(is_exact(&one, *id, content).is_ok(), is_exact(&other, *id, content).is_ok(), "{id}");
    }
}

/// What was told before a permit made the packs be listed again stays told, once.
#[test]
fn damage_is_told_over_several_listings() {
    for accept_damage in [false, true] {
        let (rig, _) = source();
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(4, None, &[(0, 10), (1, 11)])).unwrap();
        pool.delete_point(id(4), "test").unwrap();
        let snapshot = rig.files.snapshot();
        // The pack of point 1: it stays.
        let kept =
            packs(&rig.files).into_iter().max_by_key(|name| snapshot.get(name).unwrap().len()).unwrap();
        rig.files.flip_bit(&kept, 110 * 8).unwrap();
        let copy = copy_of(&rig, SimulatedFiles::new(2));
        let is_freed = Cell::new(false);
        let options = CopyOptions { accept_damage, ..CopyOptions::default() };
        let report = run_with(&rig, &copy, options, &mut |done, _| {
            if done > 0 && !is_freed.replace(true) {
                pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
            }
            true
        })
        .unwrap();
        assert!(report.passes > 1);
        assert_eq!(report.damage.len(), 1, "{:?}", report.damage);
        assert_eq!(copy.files.snapshot().get(&kept).is_some(), accept_damage);
    }
}

/// A file of the copy that rotted is found by its length, its trailer, or by reading all; nobody writes over it.
#[test]
fn rot_in_the_copy_is_named() {
    let (rig, ledger) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    let whole = copy.files.snapshot();
    let name = packs(&copy.files).remove(0);
    let record = names(&whole, "sequence/").remove(1);
    let verify = CopyOptions { verify: true, ..CopyOptions::default() };
    type Rot = fn(&SimulatedFiles, &str, u64);
    let rots: [(&str, Rot, bool); 4] = [
        (&name, |files, name, length| files.truncate(name, length - 1).unwrap(), true),
        (&name, |files, name, length| files.flip_bit(name, (length - 64) * 8).unwrap(), true),
        (&name, |files, name, _| files.flip_bit(name, 100 * 8).unwrap(), false),
        (&record, |files, name, _| files.flip_bit(name, 60 * 8).unwrap(), false),
    ];
    for (name, rot, at_once) in rots {
        let copy = copy_of(&rig, SimulatedFiles::from_snapshot(3, &whole));
        rot(&copy.files, name, whole.get(name).unwrap().len() as u64);
        let rotten = copy.files.snapshot();
        let report = run(&rig, &copy).unwrap();
        assert_eq!(report.damage.len(), usize::from(at_once), "{name}: {:?}", report.damage);
        let report = run_with(&rig, &copy, verify, &mut |_, _| true).unwrap();
        assert_eq!(report.damage.len(), 1, "{name}: {:?}", report.damage);
        assert_eq!(copy.files.snapshot(), rotten);
        // As the message says: this one file taken away, the next run mends it.
        copy.files.delete(name).unwrap();
        assert!(run_with(&rig, &copy, verify, &mut |_, _| true).unwrap().damage.is_empty());
        has(&copy, &ledger, name);
    }
}

/// A pack of the source that was cut is the source's damage: nobody is told to remove the whole file, which is the copy's.
#[test]
fn a_pack_that_was_cut_at_the_source_is_not_the_copys_damage() {
    let (rig, ledger) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    for name in packs(&rig.files) {
        let bytes = rig.files.snapshot().get(&name).unwrap().to_vec();
        rig.files.set_bytes(&name, bytes[..bytes.len() - 10].to_vec());
        let report = run(&rig, &copy).unwrap();
        let told: Vec<String> = report.damage.iter().map(|one| format!("{one:?}")).collect();
        assert!(told.len() == 1 && told[0].contains(&name) && told[0].contains("keep the copy"), "{told:?}");
        rig.files.set_bytes(&name, bytes.clone());
        // The other way round it is the copy's.
        copy.files.set_bytes(&name, bytes[..bytes.len() - 10].to_vec());
        let told = run(&rig, &copy).unwrap().damage;
        assert!(told.len() == 1 && format!("{told:?}").contains("remove this one file"), "{told:?}");
        copy.files.set_bytes(&name, bytes);
    }
    has(&copy, &ledger, "after all");
}

#[test]
fn a_full_target_is_said_and_the_next_run_goes_on() {
    let (rig, ledger) = source();
    let all: u64 = rig.files.snapshot().files().map(|(_, bytes)| bytes.len() as u64).sum();
    let mut refused = 0;
    for room in (0..all).step_by(200) {
        let copy = copy_of(&rig, SimulatedFiles::new(2));
        copy.files.set_capacity(Some(room));
        match run(&rig, &copy) {
            Err(PoolError::Full { .. }) => refused += 1,
            Ok(_) => {}
            Err(error) => panic!("{room}: {error}"),
        }
        copy.files.set_capacity(None);
        run(&rig, &copy).unwrap();
        has(&copy, &ledger, &format!("{room} bytes"));
    }
    assert!(refused > 3, "{refused}");
}

#[test]
fn cancelling_leaves_what_the_next_run_goes_on_from() {
    let (rig, ledger) = source();
    for after in 0..7 {
        let copy = copy_of(&rig, SimulatedFiles::new(2));
        let left = Cell::new(after);
        let report = run_with(&rig, &copy, CopyOptions::default(), &mut |_, _| {
            left.set(left.get() - 1);
            left.get() >= 0
        })
        .unwrap();
        assert!(report.cancelled && copy.reader().is_err());
        let rest = run(&rig, &copy).unwrap();
        assert!(rest.packs_copied + report.packs_copied >= 4 && rest.bytes_present > 0 || after < 2);
        has(&copy, &ledger, "cancelled");
    }
}

// A plain copy of files, by a program that knows nothing of pools (docs/guide/second-copy.md).

/// Copies folders in this order; `between` is called before each.
fn plain_copy(rig: &Rig, folders: &[&str], between: &mut dyn FnMut(&str)) -> Rig {
    let mut copied = Snapshot::default();
    for folder in folders {
        between(folder);
        // Such a program lists a folder when it comes to it, and skips what is gone.
        for (name, bytes) in rig.files.snapshot().files().filter(|(name, _)| name.starts_with(folder)) {
            copied.insert(name, bytes.to_vec());
        }
    }
    let files = SimulatedFiles::from_snapshot(9, &copied);
    for folder in ["index", "packs", "sequence", "keys"] {
        environment::Files::make_folder(&files, folder).unwrap();
    }
    rig.on(files)
}

fn lost(copy: &Rig, ledger: &Ledger) -> usize {
    let pool = copy.reader().unwrap();
    let state = pool.state().clone();
    let there = state.in_order().filter(|point| !state.is_expired(point, 0));
    let known = there.filter_map(|point| Some((point.id, ledger.get(&point.id)?)));
    known.filter(|(id, content)| is_exact(&pool, *id, content) != Ok(true)).count()
}

const RIGHT: [&str; 4] = ["sequence/", "keys/", "packs/", "pool.stillpoint"];
/// As most programs copy: in order of name.
const BY_NAME: [&str; 4] = ["keys/", "packs/", "pool.stillpoint", "sequence/"];

#[test]
fn a_plain_copy_in_the_right_order_beside_a_writer_is_whole_and_in_order_of_name_is_not() {
    let (rig, mut ledger) = source();
    ledger.insert(id(3), Content::from([(0, 7), (1, 4), (4, 3)]));
    let copy = |order: &[&str]| {
        let rig = rig.on(SimulatedFiles::from_snapshot(5, &rig.files.snapshot()));
        plain_copy(&rig, order, &mut |next| {
            let is_between = match order == RIGHT.as_slice() {
                true => next == "packs/",
                false => next == "sequence/",
            };
            if is_between {
                store(&rig.writer(1).unwrap(), &self::order(3, Some(2), &[(0, 7)])).unwrap();
            }
        })
    };
    assert_eq!(lost(&copy(&RIGHT), &ledger), 0);
    assert_eq!(lost(&copy(&BY_NAME), &ledger), 1, "the point that came between has no packs");
}

/// With a reclaim between, the right order is not enough once the hold is shorter than the copying takes.
#[test]
fn a_plain_copy_is_whole_beside_a_reclaim_only_within_the_hold() {
    for (hold, expected) in [(0, 1), (86_400, 0)] {
        let settings = Settings { reclaim_hold: hold, ..Settings::without_safety() };
        let rig = Rig::new(1, settings);
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(4, None, &[(0, 10), (1, 11), (2, 12), (3, 13), (4, 14)])).unwrap();
        store(&pool, &order(5, None, &[(0, 10)])).unwrap();
        pool.delete_point(id(4), "test").unwrap();
        let ledger = Ledger::from([(id(5), Content::from([(0, 10)]))]);
        // The program had listed the packs already when the reclaim moved what was needed and let the old ones go.
        let listed = packs(&rig.files);
        let copy = plain_copy(&rig, &RIGHT, &mut |next| {
            if next == "packs/" {
                pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
            }
        });
        for name in packs(&copy.files).iter().filter(|name| !listed.contains(name)) {
            copy.files.delete(name).unwrap();
        }
        assert_eq!(lost(&copy, &ledger), expected, "hold {hold}");
    }
}

/// A snapshot of the volume is one moment, as after a power cut: every order of copying it is right.
#[test]
fn a_copy_of_a_snapshot_of_the_volume_is_whole() {
    let (rig, ledger) = source();
    let frozen = rig.on(SimulatedFiles::from_snapshot(5, &rig.files.snapshot()));
    store(&rig.writer(1).unwrap(), &order(3, Some(2), &[(0, 7)])).unwrap();
    let copy = plain_copy(&frozen, &BY_NAME, &mut |_| {});
    assert_eq!(lost(&copy, &ledger), 0);
}

/// `pool copy` goes on from a plain copy, and mends what it lacks.
#[test]
fn a_plain_copy_is_gone_on_from() {
    let (rig, ledger) = source();
    let copy = plain_copy(&rig, &BY_NAME, &mut |_| {});
    let name = packs(&copy.files).remove(0);
    copy.files.delete(&name).unwrap();
    let report = run(&rig, &copy).unwrap();
    assert_eq!((report.packs_copied, report.records_copied), (1, 0));
    has(&copy, &ledger, "a plain copy");
}

fn another_kit(pool: &Pool) -> storage_pool::kit::Recipient {
    let mut kit = None;
    pool.add_kit(&mut |new| {
        kit = Some(new.clone());
        Ok(new.clone())
    })
    .unwrap();
    kit.unwrap()
}

/// Rings go along: a copy of a pool whose keys were rotated opens with its kit, and with no kit that was revoked.
#[test]
fn a_copy_whose_keys_were_rotated_opens_with_its_kit() {
    let (rig, mut ledger) = source();
    let pool = rig.writer(1).unwrap();
    let out = another_kit(&pool);
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    pool.rotate_keys(&[out.id]).unwrap();
    store(&pool, &order(3, Some(2), &[(0, 7)])).unwrap();
    ledger.insert(id(3), Content::from([(0, 7), (1, 4), (4, 3)]));
    let late = another_kit(&pool);
    pool.rotate_keys(&[]).unwrap();
    store(&pool, &order(4, Some(3), &[(2, 8)])).unwrap();
    ledger.insert(id(4), Content::from([(0, 7), (1, 4), (2, 8), (4, 3)]));
    drop(pool);
    for copy in [copy, copy_of(&rig, SimulatedFiles::new(3))] {
        let report = run(&rig, &copy).unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
        assert_eq!(names(&copy.files.snapshot(), "keys/"), names(&rig.files.snapshot(), "keys/"));
        has(&copy, &ledger, "rotated");
        let copy = Rig { kit: late.clone(), ..copy };
        has(&copy, &ledger, "a kit of a later generation");
        let copy = Rig { kit: out.clone(), ..copy };
        let seen = copy.reader().unwrap();
        assert!(seen.point(id(2)).is_ok() && seen.point(id(3)).is_err());
        drop(seen);
        // A server takes it over, and revokes whom it likes.
        let pool = Rig { server: late.clone(), ..copy }.writer(7).unwrap();
        assert_eq!(pool.rotate_keys(&[rig.server.id]).unwrap(), 3);
    }
}

/// A rotation at each step of a copy: what the copy's records name can be had from it by the kit, and the next run goes on.
#[test]
fn beside_a_rotation() {
    for step in 0..12 {
        let (rig, mut ledger) = source();
        let pool = rig.writer(1).unwrap();
        let copy = copy_of(&rig, SimulatedFiles::new(step));
        let calls = Cell::new(0);
        let report = run_with(&rig, &copy, CopyOptions::default(), &mut |_, _| {
            calls.set(calls.get() + 1);
            if calls.get() == step + 1 {
                pool.rotate_keys(&[]).unwrap();
                store(&pool, &order(3, Some(2), &[(0, 7)])).unwrap();
            }
            true
        })
        .unwrap();
        assert!(report.damage.is_empty(), "step {step}: {:?}", report.damage);
        if calls.get() <= step {
            assert!(step > 4);
            break;
        }
        has(&copy, &ledger, &format!("step {step}"));
        run(&rig, &copy).unwrap();
        ledger.insert(id(3), Content::from([(0, 7), (1, 4), (4, 3)]));
        has(&copy, &ledger, &format!("step {step}, the next run"));
    }
}

/// The copy is opened for writing by the kit's holder and goes on as a pool.
#[test]
fn a_copy_goes_on_as_a_pool() {
    let (rig, mut ledger) = source();
    let copy = copy_of(&rig, SimulatedFiles::new(2));
    run(&rig, &copy).unwrap();
    let access = storage_pool::Access::Write { server: [7; 16], name: "other site".to_owned() };
    let pool = Pool::open(copy.world(), &copy.kit, access).map(Arc::new).unwrap();
    store(&pool, &order(3, Some(2), &[(0, 7)])).unwrap();
    drop(pool);
    ledger.insert(id(3), Content::from([(0, 7), (1, 4), (4, 3)]));
    has(&copy, &ledger, "goes on");
}

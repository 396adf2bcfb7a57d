#![allow(clippy::unwrap_used)]

use super::*;
use crate::conformance::{self, put};
use crate::{FolderFiles, SeededRandomness};

#[test]
fn simulated_files_conform() {
    let mut seed = 0;
    conformance::all(|| {
        seed += 1;
        SimulatedFiles::new(seed)
    });
}

#[test]
fn folder_files_conform() {
    let mut folders = Vec::new();
    conformance::all(|| {
        let folder = tempfile::tempdir().unwrap();
        let files = FolderFiles::new(folder.path());
        folders.push(folder);
        files
    });
}

fn bytes_of(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    crate::Randomness::fill(&SeededRandomness::new(seed), &mut bytes).unwrap();
    bytes
}

/// What a workload knows to have been acknowledged.
#[derive(Default)]
struct Ledger {
    published: BTreeMap<String, Vec<u8>>,
    folders: BTreeSet<String>,
    /// Began to be published or removed, without an answer.
    doubtful: BTreeMap<String, Vec<u8>>,
}

/// Makes folders, publishes and removes until the first error.
fn workload(files: &SimulatedFiles, seed: u64, ledger: &mut Ledger) -> io::Result<()> {
    let randomness = SeededRandomness::new(seed);
    for step in 0..12 {
        let folder = format!("f{}/g", randomness.below(2));
        files.make_folder(&folder)?;
        ledger.folders.insert(folder.clone());
        if randomness.below(4) == 0
            && let Some(name) = ledger.published.keys().next().cloned()
        {
            let bytes = ledger.published.remove(&name).unwrap();
            ledger.doubtful.insert(name.clone(), bytes);
            files.remove(&name)?;
            ledger.doubtful.remove(&name);
            continue;
        }
        let name = format!("{folder}/{step}");
        let bytes = bytes_of(seed + step, randomness.below(9000) as usize);
        let mut file = files.create(&name)?;
        let (first, second) = bytes.split_at(bytes.len() / 3);
        file.append(first)?;
        file.append(second)?;
        if randomness.below(4) > 0 {
            ledger.doubtful.insert(name.clone(), bytes.clone());
            file.publish()?;
            ledger.doubtful.remove(&name);
            ledger.published.insert(name, bytes);
        }
    }
    Ok(())
}

fn check(after: &Snapshot, ledger: &Ledger, replay: &str) {
    for (name, bytes) in &ledger.published {
        assert_eq!(after.get(name), Some(bytes.as_slice()), "{name} was published; {replay}");
    }
    for folder in &ledger.folders {
        assert!(after.folders().any(|found| found == folder), "folder {folder} was made; {replay}");
    }
    for (name, bytes) in after.files() {
        let known = ledger.published.get(name).or_else(|| ledger.doubtful.get(name));
        assert_eq!(known.map(Vec::as_slice), Some(bytes), "{name} must not be there like this; {replay}");
    }
}

#[test]
fn what_was_published_survives_a_cut_at_every_site() {
    let mut kinds = BTreeSet::new();
    let mut undone = 0;
    for seed in 0..6 {
        let dry = SimulatedFiles::new(seed);
        dry.start_trace();
        workload(&dry, seed, &mut Ledger::default()).unwrap();
        kinds.extend(dry.trace().iter().map(|site| site.operation));
        assert_eq!(dry.trace().last().unwrap().number, dry.operations());
        for site in 1..=dry.operations() {
            let files = SimulatedFiles::new(seed);
            let mut ledger = Ledger::default();
            files.crash_at(site);
            let error = workload(&files, seed, &mut ledger).unwrap_err();
            assert!(is_power_cut(&error), "{error}");
            assert!(is_power_cut(&files.list("").unwrap_err()));
            let replay = format!("seed {seed}, site {}", dry.trace()[site as usize - 1]);
            let states = files.crash_states(20);
            undone += usize::from(states.states.len() > 1);
            for state in &states.states {
                check(state, &ledger, &replay);
            }
            files.reboot(site);
            assert_eq!(files.operations(), site);
            check(&files.snapshot(), &ledger, &replay);
            if states.complete {
                assert!(states.states.contains(&files.snapshot()), "{replay}");
            }
            // What is there after a reboot stays.
            let now = files.snapshot();
            files.reboot(site + 1);
            assert_eq!(files.snapshot(), now);
        }
    }
    for kind in [Operation::SyncFile, Operation::Link, Operation::SyncFolder, Operation::Unlink] {
        assert!(kinds.contains(&kind), "{kind:?} was not exercised");
    }
    assert!(undone > 50, "only {undone} cuts left anything open");
}

#[test]
fn an_error_at_any_site_takes_back_nothing_acknowledged() {
    for failure in [
        Failure::Io,
        Failure::IoAfter,
        Failure::NoSpace,
        Failure::ReadOnly,
        Failure::Quota,
        Failure::SyncDropsData,
    ] {
        let dry = SimulatedFiles::new(3);
        workload(&dry, 3, &mut Ledger::default()).unwrap();
        for site in 1..=dry.operations() {
            let files = SimulatedFiles::new(3);
            files.fail(When::At(site), failure);
            let mut ledger = Ledger::default();
            let error = workload(&files, 3, &mut ledger).unwrap_err();
            assert!(!is_power_cut(&error));
            // The file of a failed sync is in doubt for ever, never a name that was acknowledged.
            files.reboot(site);
            for (name, bytes) in &ledger.published {
                assert_eq!(files.snapshot().get(name), Some(bytes.as_slice()), "{failure:?} at {site}");
            }
        }
    }
}

#[test]
fn a_name_without_a_synced_folder_may_be_there_or_not() {
    let files = SimulatedFiles::new(1);
    files.fail(When::Next(Operation::SyncFolder), Failure::Io);
    assert!(put(&files, "a", b"x").is_err());
    assert_eq!(files.read("a", 9).unwrap(), b"x");
    let states = files.crash_states(10);
    assert!(states.complete);
    assert_eq!(states.states.len(), 2);
    // Another publish in the folder syncs it.
    put(&files, "b", b"y").unwrap();
    assert_eq!(files.crash_states(10).states, [files.snapshot()]);
}

#[test]
fn a_dropped_folder_sync_is_not_healed_by_the_next() {
    let mut lost = 0;
    for seed in 0..20 {
        let files = SimulatedFiles::new(seed);
        files.fail(When::Next(Operation::SyncFolder), Failure::SyncDropsData);
        assert!(put(&files, "a", b"x").is_err());
        put(&files, "b", b"y").unwrap();
        assert_eq!(files.read("a", 9).unwrap(), b"x");
        files.reboot(0);
        lost += u32::from(files.snapshot().get("a").is_none());
        assert!(files.snapshot().get("b").is_some());
    }
    assert!((1..20).contains(&lost), "{lost} of 20");
}

#[test]
fn a_dropped_file_sync_succeeds_later_and_keeps_nothing() {
    let bytes = bytes_of(7, 20_000);
    let mut whole = 0;
    for seed in 0..30 {
        let files = SimulatedFiles::new(seed);
        let mut world = files.world();
        let caller = files.caller(&world);
        let inode = world.create(caller, "a").unwrap();
        world.append(caller, inode, "a", &bytes).unwrap();
        world.failures.push((When::Next(Operation::SyncFile), Failure::SyncDropsData));
        assert!(world.sync_file(caller, inode, "a").is_err());
        world.sync_file(caller, inode, "a").unwrap();
        world.link(caller, inode, "a").unwrap();
        world.sync_folder(caller, "").unwrap();
        drop(world);
        assert_eq!(files.read("a", 1 << 20).unwrap(), bytes, "the page cache still has it");
        files.reboot(seed);
        let after = files.snapshot().get("a").unwrap().to_vec();
        assert_eq!(after.len(), bytes.len());
        whole += u32::from(after == bytes);
    }
    assert!(whole < 5, "{whole} of 30 lost nothing");
}

#[test]
fn a_lying_sync_tears_pages_and_lengths() {
    let bytes = bytes_of(9, 10_000);
    let mut lengths = BTreeSet::new();
    let mut torn = 0;
    for seed in 0..40 {
        let files = SimulatedFiles::new(seed);
        files.fail(When::Next(Operation::SyncFile), Failure::SyncLies);
        put(&files, "a", &bytes).unwrap();
        files.reboot(seed);
        let after = files.snapshot().get("a").unwrap().to_vec();
        torn += u32::from(after != bytes[..after.len()]);
        lengths.insert(after.len());
    }
    assert!(torn > 10 && lengths.len() > 5, "{torn} torn, lengths {lengths:?}");
    let files = SimulatedFiles::new(1);
    files.fail(When::Next(Operation::SyncFile), Failure::SyncLies);
    put(&files, "a", &bytes[..600]).unwrap();
    let states = files.crash_states(1_000_000);
    assert!(states.complete);
    assert!(states.states.len() > 600, "every length, whole pages or not");
    assert!(states.states.contains(&files.snapshot()));
    assert!(!files.crash_states(10).complete);
    assert_eq!(files.crash_states(10).states.len(), 10);
}

#[test]
fn a_removal_without_a_synced_folder_may_be_undone() {
    let files = SimulatedFiles::new(1);
    put(&files, "a", b"x").unwrap();
    files.fail(When::Next(Operation::SyncFolder), Failure::Io);
    assert!(files.remove("a").is_err());
    assert!(files.open("a").is_err());
    let back: Vec<bool> =
        files.crash_states(10).states.iter().map(|state| state.get("a") == Some(b"x")).collect();
    assert_eq!(back.iter().filter(|back| **back).count(), 1);
    assert_eq!(back.len(), 2);
}

#[test]
fn the_same_seed_gives_the_same_world() {
    let run = |seed| {
        let files = SimulatedFiles::new(seed);
        files.fail(When::Every(Operation::SyncFile), Failure::SyncLies);
        files.crash_at(40);
        let _ = workload(&files, 5, &mut Ledger::default());
        files.reboot(seed);
        files.snapshot()
    };
    assert_eq!(run(8), run(8));
    assert!((0..20).any(|seed| run(seed) != run(8)));
}

#[test]
fn a_full_disk_writes_what_fits() {
    let files = SimulatedFiles::new(1);
    files.set_capacity(Some(100));
    put(&files, "a", &[1; 60]).unwrap();
    assert_eq!(files.free_bytes().unwrap(), 40);
    let mut file = files.create("b").unwrap();
    let error = file.append(&[2; 50]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(files.free_bytes().unwrap(), 0);
    drop(file);
    assert_eq!(files.free_bytes().unwrap(), 40);
    files.remove("a").unwrap();
    assert_eq!(files.free_bytes().unwrap(), 100);
}

#[test]
fn failures_meet_the_calls_they_are_meant_for() {
    let files = SimulatedFiles::new(1);
    put(&files, "a", b"x").unwrap();
    files.fail(When::EveryChange, Failure::ReadOnly);
    assert_eq!(put(&files, "b", b"").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(put(&files, "b", b"").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(files.read("a", 1).unwrap(), b"x");
    files.clear_faults();
    files.fail(When::At(files.operations() + 1), Failure::Quota);
    assert_eq!(put(&files, "b", b"").unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    put(&files, "b", b"").unwrap();
    files.fail(When::From(files.operations() + 2), Failure::Io);
    assert!(files.list("").is_ok());
    assert!(files.list("").is_err() && files.free_bytes().is_err());
}

#[test]
fn reads_go_wrong_while_the_stored_bytes_are_right() {
    let files = SimulatedFiles::new(1);
    put(&files, "a", b"0123456789").unwrap();
    put(&files, "b", b"other").unwrap();
    let read = |fault| {
        files.clear_faults();
        files.fail_reads("a", fault);
        files.read("a", 100)
    };
    assert_eq!(read(ReadFault::FlipBit(8)).unwrap(), b"0023456789");
    assert_eq!(read(ReadFault::Instead(b"old".to_vec())).unwrap(), b"old");
    assert_eq!(read(ReadFault::Misdirected { by: 3 }).unwrap(), b"3456789789");
    assert!(read(ReadFault::Io).is_err());
    assert_eq!(read(ReadFault::Missing).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(files.list("").unwrap().len(), 1);
    assert!(read(ReadFault::Unlisted).is_ok());
    assert_eq!(files.list("").unwrap().len(), 1);
    assert_eq!(files.read("b", 100).unwrap(), b"other");
    files.clear_faults();
    assert_eq!(files.read("a", 100).unwrap(), b"0123456789");
}

#[test]
fn damage_at_rest_stays_until_rolled_back() {
    let files = SimulatedFiles::new(1);
    files.make_folder("f").unwrap();
    put(&files, "f/a", &[0; 4]).unwrap();
    put(&files, "f/b", b"bb").unwrap();
    let good = files.snapshot();
    let open = files.open("f/a").unwrap();
    files.flip_bit("f/a", 9).unwrap();
    files.reboot(1);
    assert_eq!(files.snapshot().get("f/a"), Some([0, 2, 0, 0].as_slice()));
    assert!(is_power_cut(&open.len().unwrap_err()), "what was open before the cut is dead");
    files.truncate("f/a", 1).unwrap();
    files.delete("f/b").unwrap();
    files.set_bytes("g/new", b"planted".to_vec());
    assert!(files.flip_bit("f/a", 8).is_err() && files.flip_bit("f/b", 0).is_err());
    assert_eq!(files.read("g/new", 10).unwrap(), b"planted");
    assert_eq!(files.crash_states(10).states, [files.snapshot()]);
    files.restore(&good);
    assert_eq!(files.snapshot(), good);
    assert_eq!(SimulatedFiles::from_snapshot(5, &good).read("f/b", 2).unwrap(), b"bb");
    assert_eq!(good.files().count(), 2);
    assert_eq!(good.folders().collect::<Vec<_>>(), ["f"]);
}

#[test]
fn a_mount_point_without_its_volume_is_an_empty_folder() {
    let files = SimulatedFiles::new(1);
    put(&files, "a", b"x").unwrap();
    files.set_mounted(false);
    assert_eq!(files.list("").unwrap(), []);
    put(&files, "stray", b"").unwrap();
    files.set_mounted(true);
    assert_eq!(files.read("a", 1).unwrap(), b"x");
    assert!(files.open("stray").is_err());
}

#[test]
fn a_killed_process_leaves_what_it_wrote_and_no_locks() {
    let first = SimulatedFiles::new(1);
    let second = first.second_process();
    let held = first.lock("lock").unwrap();
    assert!(held.is_some() && second.lock("lock").unwrap().is_none());
    let mut unnamed = first.create("b").unwrap();
    unnamed.append(b"y").unwrap();
    first.fail(When::Next(Operation::SyncFolder), Failure::Io);
    assert!(put(&first, "a", b"x").is_err());
    first.kill();
    assert!(is_killed(&first.read("a", 1).unwrap_err()) && is_killed(&unnamed.publish().unwrap_err()));
    assert_eq!(second.read("a", 1).unwrap(), b"x");
    assert!(second.open("b").is_err());
    let mine = second.lock("lock").unwrap();
    assert!(mine.is_some());
    drop(held);
    assert!(second.lock("lock").unwrap().is_none(), "the dead process's lock let go of another's");
    second.kill_at(second.operations() + 1);
    assert!(is_killed(&second.list("").unwrap_err()));
    assert!(is_killed(&second.list("").unwrap_err()));
    let third = second.second_process();
    assert!(third.lock("lock").unwrap().is_some());
    // A lock is gone with the power, and the handle works again after it.
    third.reboot(1);
    assert!(first.lock("lock").unwrap().is_some());
}

#[test]
fn a_lock_is_on_the_file_and_not_on_its_name() {
    let files = SimulatedFiles::new(1);
    let held = files.lock("lock").unwrap();
    files.delete("lock").unwrap();
    assert!(files.lock("lock").unwrap().is_some(), "as with flock: a removed lock file locks nothing");
    drop(held);
}

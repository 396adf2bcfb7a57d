//! The real program on a file system of ours that cuts the power, fails, fills and lies (INV-1..5, 10, 15; fault model,
//! section 4).
//!
//! ```text
//! cargo test -p stillpoint --test fsx                                     a slice
//! FSX_ACCIDENTS=500 SEED=7 cargo test -p stillpoint --test fsx -- --nocapture    a campaign
//! ```
//!
//! The data folder, pool and catalog, lies on a FUSE file system in memory (`filesystem.rs`), which knows what of it is
//! on its disk (`storage.rs`). It has no unnamed files (`O_TMPFILE`), as many network and FUSE file systems have none, so
//! this is also where the pool's staging folder is used. Machines, ledger and what must hold after each accident are
//! those of the rig `kill`; because the file system itself kills the caller of a call, before or after it happened, kills
//! here come at exact steps: each call that changes something is a named point.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod filesystem;
#[path = "../kill/machines.rs"]
mod machines;
#[path = "../kill/network.rs"]
#[allow(dead_code, reason = "only the rig `kill` has server and agent apart")]
mod network;
#[path = "../kill/program.rs"]
#[allow(dead_code, reason = "the rig `kill` uses more of it")]
mod program;
mod storage;
#[path = "../kill/world.rs"]
#[allow(dead_code, reason = "the rig `kill` uses more of it")]
mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use environment::SeededRandomness;
use filesystem::Mounted;
use storage::{Call, EDQUOT, EIO, EROFS, Effect, Fault, Storage};
use world::World;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// Runs `test` with a data folder on a mounted file system; says loudly if this machine cannot.
fn on_storage(seed: u64, test: impl FnOnce(&RefCell<Mounted>, &mut World)) {
    if !filesystem::is_possible() {
        println!("SKIPPED: no /dev/fuse on this machine");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let mounted = Mounted::new(Storage::new(seed), &data, &folder.path().join("stillpoint"));
    let mounted = RefCell::new(mounted);
    let mut world = World::new(folder.path(), seed, false);
    let outcome = catch_unwind(AssertUnwindSafe(|| test(&mounted, &mut world)));
    println!("{}\nresult: {} commands disturbed, {}", world.report(), world.kills(), world.result());
    if let Err(failure) = outcome {
        println!("before the failure:\n{}\nseed {seed}", world.story());
        let last = mounted.borrow().storage().last.join("\n");
        println!("the last calls that change something:\n{last}");
        resume_unwind(failure);
    }
}

/// Accidents on storage that tells the truth.
const ACCIDENTS: [&str; 10] = [
    "killed before a call",
    "killed after a call",
    "power cut",
    "power cut",
    "a call fails",
    "a call fails, and happened",
    "a sync fails and drops",
    "no space",
    "read-only",
    "short and slow writes",
];

/// Whatever happens to storage that tells the truth, what was acknowledged is there.
#[test]
fn every_acknowledged_point_survives_storage_that_fails() {
    let (seed, accidents) = (number("SEED", 1), number("FSX_ACCIDENTS", 25));
    let (began, random) = (Instant::now(), SeededRandomness::new(seed ^ 0xF5));
    let mut met: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    println!("{accidents} accidents, seed {seed}");
    on_storage(seed, |mounted, world| {
        for accident in 1..=accidents {
            let kind = ACCIDENTS[random.below(ACCIDENTS.len() as u64) as usize];
            let mut has_met = false;
            world.disturb(&mut || plan(&mounted.borrow(), kind, accident, &random), &mut || {
                has_met = settle(&mut mounted.borrow_mut(), kind, random.next_u64())
            });
            let (planned, came) = met.entry(kind).or_default();
            (*planned, *came) = (*planned + 1, *came + u64::from(has_met));
            if accident % 10 == 0 {
                world.examine(2);
            }
        }
        world.conclude();
    });
    let sum = met.values().map(|(_, came)| came).sum::<u64>();
    println!("{sum} of {accidents} accidents came, {:.1} s", began.elapsed().as_secs_f64());
    let came = |kinds: &str| -> u64 {
        met.iter().filter(|(kind, _)| kind.contains(kinds)).map(|(_, (_, came))| came).sum()
    };
    println!(
        "result: {sum} accidents of storage, {} power cuts of the file system, {} kills at an exact call",
        came("power cut"),
        came("killed")
    );
    for (kind, (planned, came)) in met {
        println!("  {kind}: {came} of {planned}");
    }
}

/// Plans an accident, and tells it.
fn plan(mounted: &Mounted, kind: &str, number: u64, random: &SeededRandomness) -> String {
    let mut storage = mounted.storage();
    storage.forget_faults();
    // A commit has some forty calls that change something, a reclaim a hundred.
    let reach = [20, 60, 150][random.below(3) as usize];
    let after = random.below(reach);
    let once = |effect| Fault { call: None, path: "", after, times: 1, effect };
    let error = [EIO, EIO, EDQUOT][random.below(3) as usize];
    match kind {
        "killed before a call" => storage.plan(once(Effect::KilledBefore)),
        "killed after a call" => storage.plan(once(Effect::KilledAfter)),
        "power cut" => storage.plan(once(Effect::PowerCut)),
        "a call fails" => storage.plan(once(Effect::Fails(error))),
        "a call fails, and happened" => storage.plan(once(Effect::FailsAfter(EIO))),
        "a sync fails and drops" => {
            let call = [Call::SyncFile, Call::SyncFolder][random.below(2) as usize];
            let after = random.below(6);
            storage.plan(Fault { call: Some(call), path: "/pool/", after, times: 1, effect: Effect::Drops });
        }
        "no space" => {
            let most = [0, 1 << 10, 1 << 16, 4 << 20][random.below(4) as usize];
            storage.capacity = storage.used() + random.below(most + 1);
        }
        "read-only" => {
            storage.plan(Fault {
                call: None,
                path: "",
                after,
                times: u64::MAX,
                effect: Effect::Fails(EROFS),
            });
        }
        _ => {
            let call = Some(Call::Write);
            let short = Effect::Short(1 + random.below(3000) as usize);
            storage.plan(Fault { call, path: "/pool", after: 0, times: u64::MAX, effect: short });
            let slow = Effect::Slow(Duration::from_millis(20));
            storage.plan(Fault { call: Some(Call::SyncFile), path: "", after, times: 3, effect: slow });
        }
    }
    format!("accident {number}: {kind} after {after} calls")
}

/// Storage is good again. Whether the accident came.
fn settle(mounted: &mut Mounted, kind: &str, seed: u64) -> bool {
    let has_met = {
        let mut storage = mounted.storage();
        let has_met = storage.met > 0 || kind == "no space";
        storage.forget_faults();
        storage.capacity = 1 << 32;
        has_met
    };
    if kind == "power cut" || kind == "a sync fails and drops" {
        // What a failed sync dropped shows when the power goes.
        mounted.power_cut(seed);
    }
    has_met
}

/// Reads that lie: what they hid is there when they tell the truth again, and what is recovered meanwhile is exact.
#[test]
fn reads_that_lie_do_no_harm() {
    let (seed, accidents) = (number("SEED", 1), number("FSX_LIES", 6));
    let random = SeededRandomness::new(seed ^ 0xF6);
    on_storage(seed, |mounted, world| {
        for _ in 0..accidents {
            let effect = match random.below(4) {
                0 => Effect::Fails(EIO),
                1 => Effect::Flips(random.below(1 << 16) as usize),
                2 => Effect::Misdirected(4096 * (1 + random.below(4)) as usize),
                _ => Effect::Hides,
            };
            let call = if effect == Effect::Hides { Call::List } else { Call::Read };
            let path = ["/pool/packs", "/pool/index", "/pool/sequence", "/pool"][random.below(4) as usize];
            let fault = Fault { call: Some(call), path, after: random.below(12), times: 1, effect };
            println!("{fault:?}");
            mounted.borrow().storage().plan(fault);
            world.work(&mut || mounted.borrow().storage().forget_faults());
        }
        world.recover_all(false);
    });
}

/// A drive that lies about every sync, and then the power goes. Nothing is promised but that no byte is wrong.
#[test]
fn a_drive_that_lies_never_gives_wrong_bytes() {
    let (first, lives) = (number("SEED", 1), number("FSX_LIVES", 2));
    for seed in first..first + lives {
        let random = SeededRandomness::new(seed ^ 0xF7);
        on_storage(seed, |mounted, world| {
            world.work(&mut || ());
            let path = ["", "/pool", "/pool/packs", "/pool/sequence"][random.below(4) as usize];
            for call in [Call::SyncFile, Call::SyncFolder] {
                let lie = Fault { call: Some(call), path, after: 0, times: u64::MAX, effect: Effect::Lies };
                mounted.borrow().storage().plan(lie);
            }
            for _ in 0..4 {
                world.work(&mut || ());
            }
            mounted.borrow_mut().power_cut(seed);
            let (exact, lost) = world.recover_all(true);
            println!("seed {seed}, lies under `{path}`: {exact} disks exact, {lost} told as lost");
            println!("result: 1 lying drives, {exact} disks exact behind them, {lost} told as lost");
        });
    }
}

/// Every byte at which a volume can be full while a machine is protected first.
#[test]
fn a_full_volume_is_told_and_forgotten() {
    let seed = number("SEED", 1);
    on_storage(seed, |mounted, world| {
        for step in 0..number("FSX_FULL", 8) {
            let room = 1u64 << (8 + 2 * step.min(7));
            world.disturb(
                &mut || {
                    let mounted = mounted.borrow();
                    let mut storage = mounted.storage();
                    storage.capacity = storage.used() + room + step * 37;
                    format!("no space after {room} bytes")
                },
                &mut || mounted.borrow().storage().capacity = 1 << 32,
            );
        }
        world.conclude();
    });
}

/// A file system without hard links cannot give an unnamed file its name without replacing another: it is refused, and
/// the error says what is wrong.
#[test]
fn storage_without_hard_links_is_refused() {
    if !filesystem::is_possible() {
        println!("SKIPPED: no /dev/fuse on this machine");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let mut storage = Storage::new(1);
    storage.has_links = false;
    let _mounted = Mounted::new(storage, &data, &folder.path().join("stillpoint"));
    let program = program::Program::new(folder.path(), false);
    let image = folder.path().join("disk.raw");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let words = ["datasource", "add-image", "vm", image.to_str().unwrap()].map(str::to_owned);
    let ended = program.run(&words);
    assert_eq!(ended.status, Some(1), "{}", ended.told());
    let error = ended.of_type("error").next().unwrap_or_else(|| panic!("{}", ended.told()));
    assert!(error["message"].as_str().unwrap().contains("data"), "{error}");
    assert!(!ended.stderr.contains("panicked"), "{}", ended.told());
}

//! Damage at rest, one change at a time, against the golden pool: told, survived, never believed (INV-8, INV-10).

use environment::simulated::{SimulatedFiles, Snapshot};
use storage_pool::Damage;
use storage_pool::verify::Depth;

use super::golden::Golden;
use super::{Rig, is_exact};

/// Opens the damaged pool with the kit, verifies, reads every point. `changed` are the files that must be named; what
/// is wrong is the error.
pub fn look(rig: &Rig, golden: &Golden, changed: &[&str]) -> Result<(), String> {
    let pool = match rig.reader() {
        Ok(pool) => pool,
        Err(error) => {
            // Only the two small files without which nothing opens, and only for more than a bit.
            let text = error.to_string();
            let is_named = changed.iter().any(|name| text.contains(last(name)));
            let is_vital = changed.iter().any(|name| name.starts_with("keys/") || *name == "pool.stillpoint");
            return if is_named && is_vital { Ok(()) } else { Err(format!("does not open: {text}")) };
        }
    };
    let report =
        pool.verify(Depth::ReadData, &mut |_, _| true).map_err(|error| format!("verify: {error}"))?;
    for name in changed {
        let is_named = report
            .damage
            .iter()
            .any(|damage| matches!(damage, Damage::File { path, .. } if path.ends_with(last(name))));
        if !is_named {
            return Err(format!("{name} is not named: {:?}", report.damage));
        }
    }
    let state = pool.state().clone();
    for (id, content) in &golden.points {
        if !state.points.contains_key(id) {
            // Its record is damaged: that is named above, and nothing is reclaimed.
            if state.unreadable.is_empty() {
                return Err(format!("point {id} is gone"));
            }
            continue;
        }
        let is_told = report.damaged_points.contains(id);
        match is_exact(&pool, *id, content) {
            Ok(true) if !is_told => {}
            Err(_) if is_told => {}
            Ok(true) => return Err(format!("verify says that {id} is damaged, and it is exact")),
            Ok(false) => return Err(format!("point {id} has other bytes")),
            Err(error) => return Err(format!("{id} is damaged, verify did not say: {error}")),
        }
    }
    Ok(())
}

fn last(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Flips one bit after another: all whose number is `first` modulo `step`. Returns how many.
pub fn flips(golden: &Golden, first: u64, step: u64, until: std::time::Instant) -> Result<u64, String> {
    let files = SimulatedFiles::from_snapshot(1, &golden.snapshot);
    let rig = golden.rig.on(files);
    let mut number = 0u64;
    let mut flipped = 0;
    for (name, bytes) in golden.snapshot.files() {
        for bit in 0..bytes.len() as u64 * 8 {
            number += 1;
            if number % step != first % step {
                continue;
            }
            rig.files.flip_bit(name, bit).map_err(|error| error.to_string())?;
            look(&rig, golden, &[name]).map_err(|wrong| format!("bit {bit} of {name}: {wrong}"))?;
            rig.files.flip_bit(name, bit).map_err(|error| error.to_string())?;
            flipped += 1;
        }
        if std::time::Instant::now() > until {
            break;
        }
    }
    Ok(flipped)
}

/// The same on several threads. Returns how many bits were flipped in all.
pub fn flips_at_once(
    golden: &Golden,
    first: u64,
    step: u64,
    until: std::time::Instant,
    threads: u64,
) -> Result<u64, String> {
    at_once(threads, &|thread| flips(golden, first + step * thread, step * threads, until))
}

/// Runs `work` with the number of each thread and adds up.
pub fn at_once(threads: u64, work: &(dyn Fn(u64) -> Result<u64, String> + Sync)) -> Result<u64, String> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

/// Flips bits at random, one at a time, until the time is over. Returns how many.
pub fn random_flips(golden: &Golden, seed: u64, until: std::time::Instant) -> Result<u64, String> {
    let rig = golden.rig.on(SimulatedFiles::from_snapshot(1, &golden.snapshot));
    let random = environment::SeededRandomness::new(seed);
    let files: Vec<(&str, u64)> =
        golden.snapshot.files().map(|(name, bytes)| (name, bytes.len() as u64 * 8)).collect();
    let mut flipped = 0;
    while std::time::Instant::now() < until {
        // Large files and small ones alike.
        let (name, bits) = files[random.below(files.len() as u64) as usize];
        if bits == 0 {
            continue;
        }
        let bit = random.below(bits);
        rig.files.flip_bit(name, bit).map_err(|error| error.to_string())?;
        look(&rig, golden, &[name]).map_err(|wrong| format!("bit {bit} of {name}: {wrong}"))?;
        rig.files.flip_bit(name, bit).map_err(|error| error.to_string())?;
        flipped += 1;
    }
    Ok(flipped)
}

/// The golden pool with another set of files.
pub fn changed(golden: &Golden, change: impl FnOnce(&mut Snapshot)) -> Rig {
    let mut snapshot = golden.snapshot.clone();
    change(&mut snapshot);
    golden.rig.on(SimulatedFiles::from_snapshot(1, &snapshot))
}

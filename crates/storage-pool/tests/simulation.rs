//! Random lives of pools on storage that fails (INV-1..5, 9, 11, 12, 16). One life again: `examples/simulate.rs`.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::time::{Duration, Instant};

/// Seeds that once failed come first.
const KNOWN: &[u64] = &[1, 2, 1_000_037, 24_261_277, 1_000_000_248];

/// `SIM_POINTS=500000` lives until there were so many crash points, `SIM_SECONDS=600` so long, from `SEED` on, `SIM_THREADS`
/// lives at a time.
#[test]
fn lives_of_pools() {
    for seed in KNOWN {
        rig::life::live(*seed, 60).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    let points = rig::number("SIM_POINTS");
    let seconds = rig::number("SIM_SECONDS").unwrap_or(if points.is_some() { 1 << 30 } else { 5 });
    let seed = rig::number("SEED").unwrap_or(1_000_000);
    let threads = rig::number("SIM_THREADS").map_or(rig::cores(), |threads| threads as usize);
    let begin = Instant::now();
    let until = begin + Duration::from_secs(seconds);
    let (lives, figures) = rig::life::live_many(seed, 60, points.unwrap_or(u64::MAX), until, threads)
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    let points = figures.crash_points();
    println!("\n{figures:?}, {:.0} crash points a second", points as f64 / begin.elapsed().as_secs_f64());
    println!(
        "result: {points} crash points, {} power cuts, {} cuts while coming back, {} kills, {} failed calls, {lives} lives",
        figures.power_cuts, figures.cuts_coming_back, figures.kills, figures.faults
    );
    assert!(points > 200, "only {figures:?}");
}

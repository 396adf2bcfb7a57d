//! Random lives of pools on storage that fails (INV-1..5, 9, 11, 12, 16). The campaign is `examples/simulate.rs`.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::time::{Duration, Instant};

/// Seeds that once failed come first.
const KNOWN: &[u64] = &[1, 2, 1_000_037];

#[test]
fn lives_of_pools() {
    let seconds =
        std::env::var("STILLPOINT_SLICE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    for seed in KNOWN {
        rig::life::live(*seed, 60).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let (lives, figures) = rig::life::live_many(1_000_000, 60, u64::MAX, end, rig::cores())
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    println!("{lives} lives, {} crash points, {figures:?}", figures.crash_points());
    assert!(figures.crash_points() > 200, "only {figures:?}");
}

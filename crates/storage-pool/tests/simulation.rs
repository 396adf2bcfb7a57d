//! Random lives of pools on storage that fails (INV-1..5, 9, 11, 12, 16). The campaign is `examples/simulate.rs`.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::time::{Duration, Instant};

/// Seeds that once failed come first.
const KNOWN: &[u64] = &[1, 2, 1_000_037];

#[test]
fn lives_of_pools() {
    let seconds =
        std::env::var("STILLPOINT_SLICE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut crash_points = 0;
    for seed in KNOWN.iter().copied().chain(1_000_000..) {
        let figures = rig::life::live(seed, 60).unwrap_or_else(|wrong| {
            panic!("{wrong}\nreplay: cargo run -p storage-pool --example simulate -- --seed {seed} --lives 1")
        });
        crash_points += figures.crash_points;
        if Instant::now() > end {
            break;
        }
    }
    println!("{crash_points} crash points");
    assert!(crash_points > 200, "only {crash_points} crash points");
}

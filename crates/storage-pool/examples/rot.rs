//! Campaign: flips every bit of the golden pool, one at a time; or bits at random of a larger pool, for a time.
//!
//! `cargo run -p storage-pool --example rot -- [--step N] [--first N]`: every bit, or each N-th from one on.
//! `cargo run -p storage-pool --example rot -- --points N [--seconds N] [--seed S]`: bits of a pool of N points.
//! `[--threads N]`
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/rig/mod.rs"]
mod rig;

use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        words.iter().position(|word| word == name).and_then(|at| words.get(at + 1)?.parse::<u64>().ok())
    };
    let (first, step) = (value("--first").unwrap_or(0), value("--step").unwrap_or(1).max(1));
    let threads = value("--threads").unwrap_or(rig::cores() as u64).max(1);
    let seed = value("--seed").unwrap_or(1);
    let golden = match value("--points") {
        None => rig::golden::make(),
        Some(points) => rig::golden::make_large(seed, points),
    };
    let bytes: usize = golden.snapshot.files().map(|(_, bytes)| bytes.len()).sum();
    println!("{} files, {bytes} bytes", golden.snapshot.files().count());
    let begin = Instant::now();
    let until = begin + Duration::from_secs(value("--seconds").unwrap_or(1 << 30));
    let flipped = match value("--points") {
        None => rig::rot::flips_at_once(&golden, first, step, until, threads),
        Some(_) => {
            rig::rot::at_once(threads, &|thread| rig::rot::random_flips(&golden, seed * 1000 + thread, until))
        }
    };
    match flipped {
        Ok(flipped) => {
            println!("{flipped} bits in {:.0} s", begin.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(wrong) => {
            println!("{wrong}\nreplay: the same command, seed {seed}");
            ExitCode::FAILURE
        }
    }
}

//! Campaign: flips every bit of the golden pool, one at a time.
//!
//! `cargo run -p storage-pool --example rot -- [--step N] [--first N]`: every bit, or each N-th from one on.
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
    let golden = rig::golden::make();
    let bytes: usize = golden.snapshot.files().map(|(_, bytes)| bytes.len()).sum();
    println!("{} files, {bytes} bytes", golden.snapshot.files().count());
    let begin = Instant::now();
    match rig::rot::flips(&golden, first, step, begin + Duration::from_secs(1 << 30)) {
        Ok(flipped) => {
            println!("{flipped} bits in {:.0} s", begin.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(wrong) => {
            println!("{wrong}");
            ExitCode::FAILURE
        }
    }
}

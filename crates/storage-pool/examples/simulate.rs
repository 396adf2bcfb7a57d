//! Campaign: lives of pools on storage that fails, on all cores, until there were so many crash points or the time is
//! over. What counts as a crash point: `tests/rig/life.rs`.
//!
//! `cargo run -p storage-pool --example simulate -- [--points N] [--seconds N] [--seed S] [--rounds N] [--threads N]`,
//! and to repeat one life `--seed S --lives 1`.
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
    let first = value("--seed").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |since| since.as_nanos() as u64 >> 10)
    });
    let rounds = value("--rounds").unwrap_or(60);
    println!("seed {first}, {rounds} rounds a life");
    let begin = Instant::now();
    let done = if value("--lives") == Some(1) {
        rig::life::live(first, rounds).map(|figures| (1, figures))
    } else {
        let points = value("--points");
        let seconds = value("--seconds").unwrap_or(if points.is_some() { 1 << 30 } else { 60 });
        let until = begin + Duration::from_secs(seconds);
        let threads = value("--threads").map_or(rig::cores(), |threads| threads as usize);
        rig::life::live_many(first, rounds, points.unwrap_or(u64::MAX), until, threads)
    };
    match done {
        Ok((lives, figures)) => {
            let points = figures.crash_points();
            let rate = points as f64 / begin.elapsed().as_secs_f64();
            println!("{lives} lives, {figures:?}");
            println!("{points} crash points, {rate:.0} a second");
            ExitCode::SUCCESS
        }
        Err(wrong) => {
            println!("{wrong}");
            ExitCode::FAILURE
        }
    }
}

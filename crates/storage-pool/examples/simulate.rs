//! Campaign: lives of pools on storage that fails, one after another, until the time is over.
//!
//! `cargo run -p storage-pool --example simulate -- [--seconds N] [--seed S] [--lives N] [--rounds N]`
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
    let lives = value("--lives").unwrap_or(u64::MAX);
    let seconds = value("--seconds").unwrap_or(if lives == u64::MAX { 60 } else { 1 << 30 });
    println!("seed {first}, {rounds} rounds a life");
    let (begin, mut total, mut lived) = (Instant::now(), rig::life::Figures::default(), 0u64);
    while lived < lives && begin.elapsed() < Duration::from_secs(seconds) {
        let seed = first.wrapping_add(lived);
        match rig::life::live(seed, rounds) {
            Ok(figures) => {
                total.crash_points += figures.crash_points;
                total.points += figures.points;
                total.freed_packs += figures.freed_packs;
                total.fenced += figures.fenced;
            }
            Err(wrong) => {
                println!("{wrong}");
                println!(
                    "replay: cargo run -p storage-pool --example simulate -- --seed {seed} --lives 1 --rounds {rounds}"
                );
                return ExitCode::FAILURE;
            }
        }
        lived += 1;
    }
    let rate = total.crash_points as f64 / begin.elapsed().as_secs_f64();
    println!("{lived} lives, {total:?}, {rate:.0} crash points a second");
    ExitCode::SUCCESS
}

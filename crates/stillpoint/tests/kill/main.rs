//! `kill -9` of the real program at random moments: standalone, with server and agent in one process, and as server and
//! agent over the network, where one of the two is killed and started again.
//!
//! ```text
//! cargo test -p stillpoint --test kill                                    the slice: 12 and 6 kills
//! KILLS=200 SEED=7 cargo test -p stillpoint --test kill -- --nocapture    a campaign; KILLS_NETWORK: of the second
//! ```
//!
//! Data, commands and their order follow from the seed; the moment of a kill is drawn from it too, but what the program
//! does in that microsecond is the machine's business. After each kill: every acknowledged point is listed and good, the
//! next command works without a hand, nothing temporary stays, no process lives on; every tenth kill, and at the end
//! all, points are recovered and compared with the hashes of a ledger outside the product. `KEEP=1` keeps the folder.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod machines;
mod network;
mod program;
#[allow(dead_code, reason = "the rig `fsx` uses more of it")]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

#[test]
fn standalone_every_acknowledged_point_survives_kills_at_random_moments() {
    campaign(false, number("KILLS", 12));
}

#[test]
fn every_acknowledged_point_survives_kills_of_server_and_agent() {
    campaign(true, number("KILLS_NETWORK", number("KILLS", 6)));
}

fn campaign(has_network: bool, kills: u64) {
    let seed = number("SEED", 1);
    let folder = tempfile::tempdir().unwrap();
    let replay =
        format!("replay: KILLS={kills} SEED={seed} cargo test -p stillpoint --test kill -- --nocapture");
    println!("{kills} kills, seed {seed}; {replay}");
    let began = Instant::now();
    let mut world = world::World::new(folder.path(), seed, has_network);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        for kill in 1..=kills {
            world.kill(kill as u32);
            if kill % 10 == 0 {
                world.examine(3);
            }
        }
        world.conclude();
    }));
    println!("{}\n{:.1} s", world.report(), began.elapsed().as_secs_f64());
    println!("result: {} kills, {}", world.kills(), world.result());
    if let Err(failure) = outcome {
        if number("KEEP", 0) > 0 {
            println!("kept: {}", folder.keep().display());
        }
        println!("before the failure:\n{}\n{replay}", world.story());
        resume_unwind(failure);
    }
}

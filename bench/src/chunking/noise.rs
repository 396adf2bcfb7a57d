//! Data that will not shrink, told early: what the tests cost and save, and what they get wrong.

use std::path::Path;

use crate::cpu_seconds;
use crate::encode::{Early, Encoder, Level};
use crate::workload::{self, BLOCK};

const FRAME: usize = 4 * BLOCK;

fn stream(seed: u8, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut out);
    out
}

/// 192 MiB each of what a host may hold that does not shrink, and of what only looks like it.
fn made() -> Result<Vec<(&'static str, Vec<u8>)>, String> {
    const MANY: usize = 192 << 20;
    let hex = |bytes: &[u8]| bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect();
    let sixty_four = |bytes: &[u8]| bytes.iter().map(|byte| b'0' + (byte & 63)).collect();
    // Each 16 KiB stands twice in a frame: flat bytes, and half of them are superfluous.
    let twice = stream(2, MANY / 2).chunks(FRAME / 2).flat_map(|half| [half, half].concat()).collect();
    // Seven bits of noise a byte: an eighth can be saved.
    let seven = stream(3, MANY).into_iter().map(|byte| byte & 127).collect();
    Ok(vec![
        ("random", stream(1, MANY)),
        ("random, twice within a frame", twice),
        ("seven random bits a byte", seven),
        ("random, as base 64", sixty_four(&stream(4, MANY))),
        ("random, as hex", hex(&stream(5, MANY / 2))),
    ])
}

struct Outcome {
    seconds: f64,
    stored: u64,
    called_noise: u64,
    wrong: u64,
    missed: u64,
}

fn measure(data: &[u8], early: Early) -> Result<Outcome, String> {
    let mut encoder = Encoder::new(Level::Fixed(3), early, &[])?;
    let mut outcome = Outcome { seconds: 0.0, stored: 0, called_noise: 0, wrong: 0, missed: 0 };
    let mut judge = Encoder::new(Level::Fixed(3), Early::Never, &[])?;
    for frame in data.chunks(FRAME) {
        let plain = frame.to_vec();
        let began = cpu_seconds();
        let made = encoder.frame(plain, vec![])?;
        outcome.seconds += cpu_seconds() - began;
        outcome.stored += made.sealed.len() as u64;
        let shrinks = judge.frame(frame.to_vec(), vec![])?.is_zstd;
        let noise = encoder.is_noise(frame);
        outcome.called_noise += u64::from(noise);
        outcome.wrong += u64::from(noise && shrinks);
        outcome.missed += u64::from(!noise && !shrinks);
    }
    Ok(outcome)
}

pub fn run(folder: &Path) -> Result<(), String> {
    let mut sets = made()?;
    let mut packed = Vec::new();
    for vm in ["vm1", "vm3"] {
        if !folder.join(vm).exists() {
            continue;
        }
        let versions = workload::versions(folder, vm)?;
        let Some(first) = versions.first() else { continue };
        let data: Vec<u8> = first.blocks.iter().flatten().flat_map(|block| block.iter().copied()).collect();
        for part in data.chunks(8 << 20) {
            packed.extend(zstd::bulk::compress(part, 3).map_err(|error| error.to_string())?);
        }
        sets.push((if vm == "vm1" { "vm1, first day" } else { "vm3, first day" }, data));
    }
    if !packed.is_empty() {
        sets.push(("the same, as zstd files", packed));
    }
    println!("Frames of 256 KiB, zstd 3, sealed. A wrong frame would have shrunk; a missed one did not.\n");
    println!("| data | test | CPU s/GB | stored | frames called noise | wrong | missed |");
    println!("|---|---|---|---|---|---|---|");
    for (name, data) in &sets {
        for (test, early) in [("none", Early::Never), ("sample", Early::Sample), ("trial", Early::Trial)] {
            let found = measure(data, early)?;
            let frames = data.len().div_ceil(FRAME);
            println!(
                "| {name} | {test} | {:.2} | {:.4} | {} of {frames} | {} | {} |",
                found.seconds / data.len() as f64 * 1e9,
                found.stored as f64 / data.len() as f64,
                found.called_noise,
                found.wrong,
                found.missed
            );
        }
    }
    Ok(())
}

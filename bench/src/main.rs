//! `bench DISK [MIB]`: what one thread of this machine can do with the data of DISK that is not zero, in pieces of 64 KiB.
//!
//! Rates are MB (10^6 bytes) of plain data per second of a thread's own CPU time, so other work on the machine disturbs
//! them little. Two threads run side by side and their rates are averaged; the best of three counts. Prints one JSON object:
//!
//! - `pipeline_3`, `pipeline_1`: BLAKE3, zstd of that level and AES-256-GCM, one after another;
//! - `decode_3`: AES-256-GCM, zstd and BLAKE3 the other way;
//! - `nonzero_bytes`: bytes of DISK in blocks of 64 KiB that are not all zeros.

use std::fs::File;
use std::io::Read;
use std::process::ExitCode;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

const BLOCK: usize = 65_536;
/// Blocks of 1 MiB: data moves through the caches as it does in a program that reads in such pieces.
const PIECE: usize = 16 * BLOCK;
const ROUNDS: usize = 3;
const THREADS: usize = 2;

fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn key() -> Result<LessSafeKey, String> {
    UnboundKey::new(&AES_256_GCM, &[7; 32]).map(LessSafeKey::new).map_err(|_| "no AES-256-GCM".to_owned())
}

/// One sealed block: what it was sealed from is in place, with the tag behind it.
fn seal(key: &LessSafeKey, bytes: &mut Vec<u8>) -> Result<(), String> {
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key([1; 12]), Aad::empty(), bytes)
        .map_err(|_| "cannot seal".to_owned())
}

fn encode(pieces: &[Vec<u8>], level: i32) -> Result<Vec<Vec<u8>>, String> {
    let mut compressor = zstd::bulk::Compressor::new(level).map_err(|error| error.to_string())?;
    let mut sealed = Vec::new();
    for block in pieces.iter().flat_map(|piece| piece.chunks(BLOCK)) {
        let mut bytes = compressor.compress(block).map_err(|error| error.to_string())?;
        seal(&key()?, &mut bytes)?;
        sealed.push(bytes);
    }
    Ok(sealed)
}

/// Runs `work` on the parts of `items`, one a thread; the mean rate of a thread.
fn rate<T: Send + Sync + 'static>(
    items: &Arc<Vec<T>>,
    plain: usize,
    work: fn(&[&T]) -> Result<(), String>,
) -> Result<f64, String> {
    let mut best: f64 = 0.0;
    for _ in 0..ROUNDS {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let items = items.clone();
                std::thread::spawn(move || {
                    let part: Vec<&T> = items.iter().skip(number).step_by(THREADS).collect();
                    let began = cpu_seconds();
                    work(&part)?;
                    Ok::<f64, String>((part.len() * plain) as f64 / (cpu_seconds() - began) / 1e6)
                })
            })
            .collect();
        let mut sum = 0.0;
        for thread in threads {
            sum += thread.join().map_err(|_| "a thread died".to_owned())??;
        }
        best = best.max(sum / THREADS as f64);
    }
    Ok(best)
}

fn pipeline(pieces: &[&Vec<u8>], level: i32) -> Result<(), String> {
    let mut compressor = zstd::bulk::Compressor::new(level).map_err(|error| error.to_string())?;
    let mut out = Vec::with_capacity(2 * BLOCK);
    let key = key()?;
    for block in pieces.iter().flat_map(|piece| piece.chunks(BLOCK)) {
        std::hint::black_box(blake3::hash(block));
        out.clear();
        compressor.compress_to_buffer(block, &mut out).map_err(|error| error.to_string())?;
        seal(&key, &mut out)?;
        std::hint::black_box(&out);
    }
    Ok(())
}

fn decode(sealed: &[&Vec<u8>]) -> Result<(), String> {
    let mut decompressor = zstd::bulk::Decompressor::new().map_err(|error| error.to_string())?;
    let mut plain = Vec::with_capacity(BLOCK);
    let key = key()?;
    for bytes in sealed {
        let mut bytes = (*bytes).clone();
        let opened = key
            .open_in_place(Nonce::assume_unique_for_key([1; 12]), Aad::empty(), &mut bytes)
            .map_err(|_| "cannot open what was sealed".to_owned())?;
        plain.clear();
        decompressor.decompress_to_buffer(opened, &mut plain).map_err(|error| error.to_string())?;
        std::hint::black_box(blake3::hash(&plain));
    }
    Ok(())
}

fn run() -> Result<(), String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (path, most) = match words.as_slice() {
        [path] => (path, 256),
        [path, most] => (path, most.parse::<usize>().map_err(|error| format!("{most}: {error}"))?),
        _ => return Err("usage: bench DISK [MIB]".to_owned()),
    };
    let failed = |error: std::io::Error| format!("{path}: {error}");
    let mut file = File::open(path).map_err(failed)?;
    let mut pieces = Vec::new();
    let mut nonzero = 0u64;
    loop {
        let mut piece = vec![0u8; PIECE];
        let mut have = 0;
        while have < PIECE {
            match file.read(&mut piece[have..]).map_err(failed)? {
                0 => break,
                more => have += more,
            }
        }
        let used = piece[..have].chunks(BLOCK).filter(|block| block.iter().any(|&byte| byte != 0)).count();
        nonzero += (used * BLOCK) as u64;
        if used > 0 && have == PIECE && pieces.len() < most {
            pieces.push(piece);
        }
        if have < PIECE {
            break;
        }
    }
    if pieces.is_empty() {
        return Err(format!("{path}: holds no MiB of data"));
    }
    let sealed = Arc::new(encode(&pieces, 3)?);
    let pieces = Arc::new(pieces);
    println!(
        "{{\"nonzero_bytes\":{nonzero},\"pipeline_1\":{:.1},\"pipeline_3\":{:.1},\"decode_3\":{:.1}}}",
        rate(&pieces, PIECE, |part| pipeline(part, 1))?,
        rate(&pieces, PIECE, |part| pipeline(part, 3))?,
        rate(&sealed, BLOCK, decode)?,
    );
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

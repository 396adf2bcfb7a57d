//! A slice of the fuzz targets for every test run: the same bodies, seeds by our own writers, a plain mutator.
//!
//! `FUZZ_SECONDS` (default 2) is the time for each target, `FUZZ_SEED` repeats a run. The library fuzzer over the same
//! bodies is in `fuzz/`.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, missing_docs)]

#[path = "../../../fuzz/src/lib.rs"]
mod targets;

use std::sync::Arc;
use std::time::{Duration, Instant};

use block_io::{GrowableFile, MemoryFile};
use disk_image::ImageFormat;
use disk_image::probe::{NewDisk, create_writer};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// Small valid images of a format, as inputs.
fn seeds(format: ImageFormat) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for fixed in [false, true] {
        let file = Arc::new(MemoryFile::default());
        let new = NewDisk {
            size: 3 << 20,
            logical_sector_size: 512,
            fixed,
            ids: [[1; 16], [2; 16], [3; 16]],
            created: 700_000_000,
        };
        let writer = create_writer(format, file.clone() as Arc<dyn GrowableFile>, &new).unwrap();
        for (at, byte) in [(0u64, 1u8), (1 << 20, 2), ((3 << 20) - 512, 3)] {
            writer.write_at(at, &[byte; 512]).unwrap();
        }
        writer.flush().unwrap();
        drop(writer);
        for options in [0, 1, 2, 3, 0x80] {
            seeds.push(targets::encode(options, &file.to_vec()));
        }
    }
    seeds
}

fn mutate(seed: &[u8], random: &mut Random) -> Vec<u8> {
    const INTERESTING: [u64; 10] =
        [0, 1, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 40, u64::MAX, u64::MAX - 511, 1 << 62];
    let mut data = seed.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len());
        match random.below(5) {
            0 => data[at] ^= 1 << random.below(8),
            1 => data[at] = random.next() as u8,
            2 => {
                let value = INTERESTING[random.below(INTERESTING.len())];
                let bytes = if random.below(2) == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
                let width = [2, 4, 8][random.below(3)].min(data.len() - at);
                data[at..at + width].copy_from_slice(&bytes[..width]);
            }
            3 => {
                let from = random.below(data.len());
                let length = random.below(64).min(data.len() - at).min(data.len() - from);
                let part = data[from..from + length].to_vec();
                data[at..at + length].copy_from_slice(&part);
            }
            _ => data.truncate(at.max(5)),
        }
    }
    data
}

#[test]
fn hostile_images_break_no_promise() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let seconds = number("FUZZ_SECONDS", 2);
    let start = number("FUZZ_SEED", u64::from(std::process::id()) + 1);
    let formats = [
        ("probe", ImageFormat::Raw),
        ("vhd", ImageFormat::Vhd),
        ("vhdx", ImageFormat::Vhdx),
        ("qcow2", ImageFormat::Qcow2),
    ];
    for (target, format) in formats {
        let mut all = seeds(format);
        if target == "probe" {
            all.extend([ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2].into_iter().flat_map(seeds));
        }
        all.iter().for_each(|seed| targets::run(target, seed));
        let mut random = Random(start.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (until, mut runs) = (Instant::now() + Duration::from_secs(seconds), 0u64);
        while Instant::now() < until {
            let data = mutate(&all[random.below(all.len())], &mut random);
            let outcome = std::panic::catch_unwind(|| targets::run(target, &data));
            assert!(
                outcome.is_ok(),
                "target {target}, run {runs}: repeat with FUZZ_SEED={start} FUZZ_SECONDS={}",
                seconds * 10
            );
            runs += 1;
        }
        println!("{target}: {runs} inputs, seed {start}\nresult: {runs} images");
        assert!(runs > 50, "{target}: only {runs} inputs in {seconds} s");
    }
}

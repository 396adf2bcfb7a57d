//! How fast recovery points are read: `read_speed POOL KIT [READS]`, of the newest point of the first machine, disk 0.
//!
//! Prints one JSON object: reads of 4 KiB a second of one core's time, uniform over the blocks that hold data;
//! and MB (10^6 bytes of such blocks) of one core's second, read in order. The time is the
//! thread's own (Linux). The reader keeps 48 decoded frames; over gigabytes that finds nothing.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use block_io::BlockDevice;
use environment::{FolderFiles, SeededRandomness, SystemClock, SystemRandomness};
use storage_pool::{Access, Pool, World, kit};

const BLOCK: u64 = 65_536;

/// Seconds that this thread ran.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [pool, kit_path, reads @ ..] = words.as_slice() else { panic!("read_speed POOL KIT [READS]") };
    let reads: u64 = reads.first().map_or(20_000, |reads| reads.parse().unwrap());
    let kit = kit::read(&std::fs::read_to_string(kit_path).unwrap()).unwrap().recipient;
    let world = World {
        files: Arc::new(FolderFiles::new(pool)),
        clock: Arc::new(SystemClock),
        randomness: Arc::new(SystemRandomness),
    };
    let pool = Arc::new(Pool::open(world, &kit, Access::Read).unwrap());
    let point = pool.state().in_order().last().unwrap().id;
    let disk = pool.open_disk(point, 0).unwrap();
    let mut blocks = Vec::new();
    let mut at = 0;
    while let Some(range) = disk.next_allocated(at).unwrap() {
        blocks.extend(
            (range.start / BLOCK..range.end.div_ceil(BLOCK))
                .filter(|block| (block + 1) * BLOCK <= disk.size()),
        );
        at = range.end;
    }
    let random = SeededRandomness::new(1);
    let mut small = vec![0u8; 4096];
    let began = cpu();
    for _ in 0..reads {
        let block = blocks[random.below(blocks.len() as u64) as usize];
        disk.read_at(block * BLOCK + random.below(16) * 4096, &mut small).unwrap();
    }
    let small_reads = reads as f64 / (cpu() - began);
    let mut whole = vec![0u8; 16 * BLOCK as usize];
    let began = cpu();
    for run in blocks.chunk_by(|one, next| one + 1 == *next) {
        for part in run.chunks(16) {
            disk.read_at(part[0] * BLOCK, &mut whole[..part.len() * BLOCK as usize]).unwrap();
        }
    }
    let sequential = blocks.len() as f64 * BLOCK as f64 / 1e6 / (cpu() - began);
    println!(
        "{{\"random_reads_per_cpu_second\":{small_reads:.0},\"sequential_mb_per_cpu_second\":{sequential:.0},\"blocks\":{}}}",
        blocks.len()
    );
}

//! What parity costs: a file goes into a new pool with PERCENT of it as a full backup, and the packs' bytes are told, beside the time
//! that the process itself spent. With `scale` as PERCENT, 0, 1, 3 and 10 % in turn, each in a process of its own, as ratios:
//!
//!     cargo run --release -p storage-pool --example parity -- DISK PERCENT DIR
//!     cargo run --release -p storage-pool --example parity -- DISK scale DIR
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::process::Command;
use std::sync::Arc;

use environment::{FolderFiles, SystemClock, SystemRandomness};
use model::{BLOCK_BYTES, Cause, Consistency, DatasourceId, RecoveryPointId, Timestamp};
use storage_pool::{FullCompare, Ingest, NewDisk, NewPoint, Pool, Settings, World};

/// Processor seconds that this thread took, and it is the only one.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Rounds of each percentage, of which the least counts: whatever else runs only adds.
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, disk, percent, folder] = arguments.as_slice() else { return Err("DISK PERCENT DIR".into()) };
    if percent != "scale" {
        let (bytes, seconds) = backup(disk, percent.parse()?, folder)?;
        println!("{bytes} {seconds}");
        return Ok(());
    }
    let all = [0u32, 1, 3, 10];
    let mut found: BTreeMap<u32, (u64, f64)> = BTreeMap::new();
    for percent in std::iter::repeat_n(all, ROUNDS).flatten() {
        let folder = format!("{folder}/{percent}");
        let output =
            Command::new(std::env::current_exe()?).args([disk, &percent.to_string(), &folder]).output()?;
        std::fs::remove_dir_all(&folder)?;
        let text = String::from_utf8(output.stdout)?;
        let (bytes, seconds) = text.trim().split_once(' ').ok_or("the backup failed")?;
        let (bytes, seconds): (u64, f64) = (bytes.parse()?, seconds.parse()?);
        let least = found.get(&percent).map_or(seconds, |(_, before)| seconds.min(*before));
        found.insert(percent, (bytes, least));
    }
    let (bytes, seconds) = found.get(&0).copied().ok_or("nothing was measured")?;
    for (percent, (more, longer)) in &found {
        let (more, longer) = (*more as f64 / bytes as f64, longer / seconds);
        println!("{{\"parity_percent\":{percent},\"bytes_ratio\":{more:.4},\"cpu_ratio\":{longer:.3}}}");
    }
    Ok(())
}

/// A full backup of `disk` into a new pool: bytes of packs, and processor seconds.
fn backup(disk: &str, percent: u32, folder: &str) -> Result<(u64, f64), Box<dyn Error>> {
    let settings = Settings { parity_percent: percent, ..Settings::without_safety() };
    let world = World {
        files: Arc::new(FolderFiles::new(folder)),
        clock: Arc::new(SystemClock),
        randomness: Arc::new(SystemRandomness),
    };
    let created = Pool::create(world, settings, [1; 16], "parity", &mut |kit| Ok(kit.clone()))?;
    let pool = Arc::new(created.pool);
    let ingest = Ingest::begin(&pool, created.domain)?;
    let mut file = File::open(disk)?;
    let size = file.metadata()?.len();
    let (mut map, mut nodes) = (ingest.edit_map(None, size)?, ingest.nodes());
    let mut frame = vec![0u8; 4 * BLOCK_BYTES as usize];
    let mut at = 0;
    while at + 4 * BLOCK_BYTES <= size {
        file.read_exact(&mut frame)?;
        if frame.iter().any(|&byte| byte != 0) {
            let blocks = frame.chunks(BLOCK_BYTES as usize);
            let hashes: Vec<[u8; 32]> = blocks.map(|block| *blake3::hash(block).as_bytes()).collect();
            let encoded = zstd::bulk::compress(&frame, 3)?;
            for (block, id) in (at / BLOCK_BYTES..).zip(ingest.put_blocks(true, &encoded, &hashes)?) {
                map.set(block, Some(id), &mut nodes)?;
            }
        }
        at += frame.len() as u64;
    }
    let map = map.finish(&mut nodes)?;
    let point = NewPoint {
        datasource: DatasourceId([1; 16]),
        machine: "parity".to_owned(),
        host: String::new(),
        base: None,
        captured: Timestamp(1),
        consistency: Consistency::Offline,
        evidence: "an example".to_owned(),
        cause: Cause::new("example", ["an example"]),
        job: None,
        figures: BTreeMap::new(),
        definition: "{}".to_owned(),
        incomplete: false,
    };
    let disk = NewDisk {
        index: 0,
        size,
        sector: 512,
        map,
        description: "{}".to_owned(),
        audit_next: 0,
        full_compare: FullCompare::Now,
    };
    let figures = ingest.commit(RecoveryPointId([1; 16]), point, vec![disk]).map(|_| pool.space())??;
    Ok((figures.packs, cpu()))
}

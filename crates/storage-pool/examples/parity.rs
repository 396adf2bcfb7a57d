//! What parity costs: a file goes into a new pool with PERCENT of it, and the packs' bytes are told. CPU is the process's own:
//!
//!     cargo build --release -p storage-pool --example parity
//!     /usr/bin/time -f '%U + %S s' target/release/examples/parity DISK PERCENT DIR
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use environment::{FolderFiles, SystemClock, SystemRandomness};
use model::{BLOCK_BYTES, Cause, Consistency, DatasourceId, RecoveryPointId, Timestamp};
use storage_pool::{FullCompare, Ingest, NewDisk, NewPoint, Pool, Settings, World};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, disk, percent, folder] = arguments.as_slice() else { return Err("DISK PERCENT DIR".into()) };
    let settings = Settings { parity_percent: percent.parse()?, ..Settings::without_safety() };
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
    println!("{percent} %: {} bytes of packs", figures.packs);
    Ok(())
}

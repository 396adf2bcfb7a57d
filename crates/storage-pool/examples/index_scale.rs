//! The index at its limit: builds one of N chunks as a pool does, flush by flush, and measures it.
//!
//! `cargo run --release -p storage-pool --example index_scale -- [--chunks N] [--pack-chunks N] [--flush N]
//! [--lookups N] [--dir DIR] [--keep]`
//!
//! Chunks have no payload: their ids are hashes of their numbers, and every 1,000 (or `--pack-chunks`) consecutive ones
//! are one pack, of which only the packs that are looked up have a file, with a real table and without frames. Lookups come
//! in the order in which a backup of a changed disk asks: stretches of 8 to 512 consecutive chunks of one stored pack,
//! drawn anywhere in the pool, and after each a stretch of new chunks, so that a quarter of all ids is new. They go
//! the way of a backup: the tables of the packs met last, then filters, fences and a page of each run that may know.
//! One JSON line is printed; progress goes to the error stream.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use environment::{Files, FolderFiles, Removal};
use model::{DomainId, PoolId};
use storage_pool::chunk::{ChunkId, Location, PackId};
use storage_pool::format::pack::{self, PackHeader, PackKind, TableEntry, Trailer};
use storage_pool::format::run;
use storage_pool::index::{FinishedPack, Index, Tables};
use storage_pool::keys::{Keys, Secret, table_nonce};

const POOL: PoolId = PoolId([7; 16]);
const DOMAIN: DomainId = DomainId([2; 16]);

fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// The id of chunk `n`: as even as the hashes of real ones, and much cheaper.
fn chunk(n: u64) -> ChunkId {
    let (high, low) = (mix(n.wrapping_add(0x9e37_79b9_7f4a_7c15)), mix(!n));
    ChunkId((u128::from(high) << 64 | u128::from(low)).to_be_bytes())
}

fn pack_id(n: u64) -> PackId {
    PackId((u128::from(mix(n ^ 0x5555)) << 64 | u128::from(n)).to_be_bytes())
}

fn table(n: u64, chunks: std::ops::Range<u64>) -> FinishedPack {
    let header =
        PackHeader { kind: PackKind::Blocks, generation: 0, pool: POOL, domain: DOMAIN, pack: pack_id(n) };
    let place = |at: u64| Location::new(header.pack, 64 + at as u32 / 4 * (128 << 10), (at % 4) as usize).at;
    let entry = |(at, n)| TableEntry { id: chunk(n), location: place(at) };
    FinishedPack {
        header,
        length: 32 << 20,
        content: 32 << 20,
        table: (0..).zip(chunks).map(entry).collect(),
        rebuilt: Default::default(),
    }
}

/// Writes the file of a pack: header, table, trailer.
fn store(files: &dyn Files, keys: &Keys, pack: &FinishedPack) {
    let id = pack.header.pack;
    files.make_folder(&pack::folder(id)).unwrap();
    let mut file = files.create(&pack::name(id)).unwrap();
    let header = pack.header.encode();
    let mut bytes = pack::encode_table(&pack.table);
    keys.domain(DOMAIN).pack(0, id).unwrap().seal(table_nonce(64), &header, &mut bytes).unwrap();
    let trailer = Trailer {
        table_offset: 64,
        table_stored: bytes.len() as u32,
        chunks: pack.table.len() as u32,
        frames: 0,
    };
    let end = trailer.encode(&header, &bytes);
    for part in [&header[..], &bytes, &end] {
        file.append(part).unwrap();
    }
    file.publish().unwrap();
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// CPU seconds of this process.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

struct Figures {
    seconds: f64,
    cpu: f64,
    found: u64,
}

/// Asks for `lookups` ids as a backup does.
fn look(
    index: &Index,
    files: &dyn Files,
    keys: &Keys,
    stored: &[u64],
    pack_chunks: u64,
    chunks: u64,
    lookups: u64,
) -> Figures {
    let mut tables = Tables::default();
    let (mut asked, mut found, mut turn, mut new) = (0, 0, 0, 0);
    let (begin, cpu_begin) = (Instant::now(), cpu());
    while asked < lookups {
        turn += 1;
        let pack = stored[(mix(turn) % stored.len() as u64) as usize];
        let length = (8 + mix(turn ^ 77) % 505).min(pack_chunks);
        let first = pack * pack_chunks + mix(turn ^ 99) % (pack_chunks - length + 1);
        let fresh = chunks + new..chunks + new + length / 3;
        new += length / 3;
        for n in (first..first + length).chain(fresh) {
            let id = chunk(n);
            asked += 1;
            if tables.find(&id).is_some() {
                found += 1;
                continue;
            }
            if let Some(place) = index.find(&id).unwrap().first() {
                found += 1;
                if tables.meet(place.pack) {
                    tables.hold(&storage_pool::index::read_table(files, keys, place.pack).unwrap());
                }
            }
        }
    }
    assert_eq!(found + new, asked, "every old chunk and no new one is found");
    Figures { seconds: begin.elapsed().as_secs_f64(), cpu: cpu() - cpu_begin, found }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |name: &str| words.iter().position(|word| word == name).and_then(|at| words.get(at + 1));
    let value = |name: &str| word(name).and_then(|word| word.parse::<f64>().ok()).map(|value| value as u64);
    let chunks = value("--chunks").unwrap_or(2_000_000);
    let pack_chunks = value("--pack-chunks").unwrap_or(1000).max(512);
    let flush = value("--flush").unwrap_or(400_000);
    let lookups = value("--lookups").unwrap_or(3_000_000);
    let dir = tempfile::tempdir_in(word("--dir").map_or(".", String::as_str)).unwrap();
    let files = Arc::new(FolderFiles::new(dir.path()));
    let keys = Keys::new(POOL, Secret::from_bytes([1; 32]));
    for folder in ["index", "packs"] {
        files.make_folder(folder).unwrap();
    }

    let (begin, cpu_begin) = (Instant::now(), cpu());
    let mut index = Index::open(files.clone(), &keys, 0, &|_| false).unwrap();
    let packs = chunks.div_ceil(pack_chunks);
    let mut written = 0u64;
    let mut waiting = 0;
    let settle = |index: &mut Index| {
        index.flush(1).unwrap();
        let mut merged = 0;
        while let Some(build) = index.due_merge(1) {
            let built = build.write().unwrap();
            merged += built.entries();
            index.install(built);
        }
        let superseded = index.superseded();
        for number in &superseded {
            files.remove(&run::name(*number)).unwrap();
        }
        index.forget_superseded(&superseded);
        merged
    };
    for n in 0..packs {
        let pack = table(n, n * pack_chunks..((n + 1) * pack_chunks).min(chunks));
        waiting += pack.table.len() as u64;
        index.add_loose(&pack);
        if waiting >= flush || n + 1 == packs {
            written += waiting + settle(&mut index);
            waiting = 0;
            eprint!("\r{n} of {packs} packs, {:.0} s", begin.elapsed().as_secs_f64());
        }
    }
    eprintln!();
    let (build_seconds, build_cpu, build_peak) =
        (begin.elapsed().as_secs_f64(), cpu() - cpu_begin, status("VmHWM"));
    let (runs, entries) = index.size();
    assert_eq!(entries, chunks);
    let disk: u64 = files.list("index").unwrap().iter().map(|entry| entry.len).sum();

    // Files for the packs that will be looked up.
    let stored: Vec<u64> = (0..2000u64).map(|n| mix(n ^ 0xabcd) % (chunks / pack_chunks)).collect();
    let stored: std::collections::BTreeSet<u64> = stored.into_iter().collect();
    for &n in &stored {
        store(&*files, &keys, &table(n, n * pack_chunks..(n + 1) * pack_chunks));
    }
    let stored: Vec<u64> = stored.into_iter().collect();

    let cold = look(&index, &*files, &keys, &stored, pack_chunks, chunks, lookups.min(200_000));
    let warm = look(&index, &*files, &keys, &stored, pack_chunks, chunks, lookups);
    // Ids in no order at all: every one a page of a run, if it is old.
    let random_begin = cpu();
    for n in 0..200_000u64 {
        let id = chunk(mix(n) % chunks);
        assert_eq!(index.find(&id).unwrap().len(), 1);
    }
    let random = cpu() - random_begin;
    let absent_begin = cpu();
    for n in 0..1_000_000u64 {
        assert!(index.find(&chunk(u64::MAX / 2 + n)).unwrap().is_empty());
    }
    let absent = cpu() - absent_begin;
    let resident = index.resident();
    let resident_process = status("VmRSS");
    drop(index);

    let ends_begin = Instant::now();
    assert_eq!(Index::witnessed_by_ends(&*files, &keys, 0).unwrap(), 1);
    let ends_seconds = ends_begin.elapsed().as_secs_f64();
    let open_begin = Instant::now();
    let index = Index::open(files.clone(), &keys, 0, &|_| false).unwrap();
    let open_seconds = open_begin.elapsed().as_secs_f64();
    let per_chunk = |bytes: u64| bytes as f64 / chunks as f64;
    println!(
        "{{\"chunks\":{chunks},\"packs\":{packs},\"runs\":{runs},\"disk_bytes_per_chunk\":{:.3},\
         \"resident_bytes_per_chunk\":{:.3},\"process_rss_bytes\":{resident_process},\
         \"opened_resident_bytes_per_chunk\":{:.3},\
         \"ids_per_cpu_second\":{:.0},\"ids_per_second\":{:.0},\"first_200k_ids_per_second\":{:.0},\
         \"found_share\":{:.3},\"random_old_ids_per_cpu_second\":{:.0},\"new_ids_per_cpu_second\":{:.0},\
         \"build_seconds\":{build_seconds:.1},\"build_cpu_seconds\":{build_cpu:.1},\
         \"build_peak_rss_bytes\":{build_peak},\"written_entries_per_chunk\":{:.2},\
         \"open_seconds\":{open_seconds:.3},\"ends_seconds\":{ends_seconds:.5}}}",
        per_chunk(disk),
        per_chunk(resident as u64),
        per_chunk(index.resident() as u64),
        lookups as f64 / warm.cpu,
        lookups as f64 / warm.seconds,
        lookups.min(200_000) as f64 / cold.seconds,
        warm.found as f64 / lookups as f64,
        2e5 / random,
        1e6 / absent,
        written as f64 / chunks as f64,
    );
    if words.iter().any(|word| word == "--keep") {
        let kept: &Path = &dir.keep();
        eprintln!("kept in {}", kept.display());
    }
}

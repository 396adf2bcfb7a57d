//! Reclaim at its limit: how long it takes to find candidates in a pool of N chunks after a small change, by the reference
//! counts and by a full mark, and the memory of each.
//!
//! `cargo run --release -p storage-pool --example reclaim_scale -- [--chunks N] [--changed N] [--pack-chunks N] [--dir DIR]`
//!
//! Two pools are made, of N/4 and of N chunks. Blocks have no payload: their ids are hashes of their numbers, every 1,000 of
//! them are in one pack, and a pack's file is empty; the index that names them is real. Maps are real, and stored as a backup
//! stores them: one point of all blocks, a second one in which one block of a hundred differs, spread evenly, and the
//! first one deleted and expired. A process each then counts from nothing, makes a third point (stretches of eight blocks, a
//! thousandth of all unless told otherwise) and deletes the second, follows that by the counts, and marks everything. One JSON line is printed for each size,
//! and one of the slopes: peak memory at 10^9 chunks.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use environment::{Files, FolderFiles, Randomness, Removal, SystemClock, SystemRandomness};
use model::{BLOCK_BYTES, Cause, Consistency, DatasourceId, DomainId, PoolId, RecoveryPointId, Timestamp};
use storage_pool::chunk::{ChunkId, Location, PackId};
use storage_pool::format::pack::{self, PackHeader, PackKind, TableEntry};
use storage_pool::format::run;
use storage_pool::index::{FinishedPack, Index};
use storage_pool::keys::{Keys, Secret};
use storage_pool::reclaim::{CountsUse, DeletionService, ReclaimOptions};
use storage_pool::{
    Access, FullCompare, Ingest, MapRoot, NewDisk, NewPoint, Pool, PoolError, Settings, World, kit,
};

fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn chunk(n: u64) -> ChunkId {
    let (high, low) = (mix(n.wrapping_add(0x9e37_79b9_7f4a_7c15)), mix(!n));
    ChunkId((u128::from(high) << 64 | u128::from(low)).to_be_bytes())
}

fn table(pool: PoolId, domain: DomainId, n: u64, chunks: std::ops::Range<u64>) -> FinishedPack {
    let id = PackId((u128::from(mix(n ^ 0x5555)) << 64 | u128::from(n)).to_be_bytes());
    let header = PackHeader { kind: PackKind::Blocks, generation: 0, pool, domain, pack: id };
    let place = |at: u64| Location::new(id, 64 + at as u32 / 4 * (64 << 10), (at % 4) as usize).at;
    let entry = |(at, n)| TableEntry { id: chunk(n), location: place(at) };
    FinishedPack {
        header,
        length: 0,
        content: 0,
        table: (0..).zip(chunks).map(entry).collect(),
        rebuilt: Default::default(),
    }
}

/// Remembers what was drawn: the root key is among it.
struct Remembering(Mutex<Vec<Vec<u8>>>);

impl Randomness for Remembering {
    fn fill(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        SystemRandomness.fill(bytes)?;
        self.0.lock().unwrap().push(bytes.to_vec());
        Ok(())
    }
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn world(dir: &Path, randomness: Arc<dyn Randomness>) -> (Arc<FolderFiles>, World) {
    let files = Arc::new(FolderFiles::new(dir));
    (files.clone(), World { files, clock: Arc::new(SystemClock), randomness })
}

fn put(
    pool: &Arc<Pool>,
    n: u8,
    base: Option<RecoveryPointId>,
    blocks: u64,
    changes: impl Iterator<Item = (u64, u64)>,
) {
    let ingest = Ingest::begin(pool, pool.default_domain().unwrap()).unwrap();
    let map = base.map(|base| {
        let disk = pool.point(base).unwrap().disks[0].clone();
        MapRoot { root: disk.root, levels: disk.levels }
    });
    let mut editor = ingest.edit_map(map, blocks * BLOCK_BYTES).unwrap();
    let mut nodes = ingest.nodes();
    for (block, number) in changes {
        editor.set(block, Some(chunk(number)), &mut nodes).unwrap();
    }
    let map = editor.finish(&mut nodes).unwrap();
    let new = NewPoint {
        datasource: DatasourceId([1; 16]),
        machine: "large".to_owned(),
        host: "host".to_owned(),
        base,
        captured: Timestamp(0),
        consistency: Consistency::Offline,
        evidence: String::new(),
        cause: Cause::new("measurement", ["of reclaim"]),
        job: None,
        figures: BTreeMap::new(),
        definition: String::new(),
        incomplete: false,
    };
    let disk = NewDisk {
        index: 0,
        size: blocks * BLOCK_BYTES,
        sector: 512,
        map,
        description: String::new(),
        audit_next: 0,
        full_compare: FullCompare::Now,
    };
    ingest.commit(RecoveryPointId([n; 16]), new, vec![disk]).unwrap();
}

/// Makes a pool of `chunks` chunks.
fn make(dir: &Path, chunks: u64, pack_chunks: u64) {
    let begin = Instant::now();
    let drawn = Arc::new(Remembering(Mutex::new(Vec::new())));
    let (files, world) = world(dir, drawn.clone());
    let mut text = String::new();
    let created = Pool::create(world.clone(), Settings::without_safety(), [1; 16], "scale", &mut |kit| {
        text = kit::write(kit, "here");
        Ok(kit.clone())
    })
    .unwrap();
    std::fs::write(dir.join("kit.txt"), text).unwrap();
    let (id, domain, recipient) = (created.pool.id(), created.domain, created.server);
    drop(created.pool);
    // The first 32 bytes that were drawn at once are the root key.
    let root = drawn.0.lock().unwrap().iter().find(|bytes| bytes.len() == 32).unwrap().clone();
    let keys = Keys::new(id, Secret::from_bytes(root.try_into().unwrap()));
    let mut index = Index::open(files.clone(), &keys, 0, &|_| false).unwrap();
    let packs = chunks.div_ceil(pack_chunks);
    let mut waiting = 0;
    for n in 0..packs {
        let pack = table(id, domain, n, n * pack_chunks..((n + 1) * pack_chunks).min(chunks));
        let name = pack::name(pack.header.pack);
        files.make_folder(&pack::folder(pack.header.pack)).unwrap();
        std::fs::write(dir.join(name), b"").unwrap();
        waiting += pack.table.len();
        index.add_loose(&pack);
        if waiting >= 1_000_000 || n + 1 == packs {
            waiting = 0;
            index.flush(1).unwrap();
            while let Some(build) = index.due_merge(1) {
                index.install(build.write().unwrap());
            }
            let superseded = index.superseded();
            superseded.iter().for_each(|number| files.remove(&run::name(*number)).unwrap());
            index.forget_superseded(&superseded);
            eprint!("\r{n} of {packs} packs, {:.0} s", begin.elapsed().as_secs_f64());
        }
    }
    drop(index);
    let access = Access::Write { server: [1; 16], name: "scale".to_owned() };
    let pool = Arc::new(Pool::open(world, &recipient, access).unwrap());
    let blocks = chunks * 100 / 101;
    put(&pool, 1, None, blocks, (0..blocks).map(|block| (block, block)));
    let hundredth = (0..blocks).step_by(100).zip(blocks..);
    put(&pool, 2, Some(RecoveryPointId([1; 16])), blocks, hundredth);
    pool.delete_point(RecoveryPointId([1; 16]), "measured").unwrap();
    pool.tick().unwrap();
    eprintln!("\n{chunks} chunks made in {:.0} s", begin.elapsed().as_secs_f64());
}

/// What one process does with a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Counts from nothing.
    Anew,
    /// A third point, and the second one goes.
    Change,
    /// Candidates by what the counts follow.
    Follow,
    /// Candidates by a full mark.
    Mark,
}

const STEPS: [Step; 4] = [Step::Anew, Step::Change, Step::Follow, Step::Mark];

/// Seconds and peak memory of one step, and of opening the pool before it.
fn measure(dir: &Path, step: Step, changed: u64) {
    struct Nobody;
    impl DeletionService for Nobody {
        fn carry_out(&self, _: Option<u64>, _: &[u64]) -> Result<(), PoolError> {
            unreachable!("a plan removes nothing")
        }
    }
    let (_, world) = world(dir, Arc::new(SystemRandomness));
    let text = std::fs::read_to_string(dir.join("kit.txt")).unwrap();
    let recipient = kit::read(&text).unwrap().recipient;
    let access = Access::Write { server: [1; 16], name: "scale".to_owned() };
    let pool = Arc::new(Pool::open(world, &recipient, access).unwrap());
    let opened = status("VmHWM");
    let begin = Instant::now();
    if step == Step::Change {
        let second = RecoveryPointId([2; 16]);
        let blocks = pool.point(second).unwrap().disks[0].size / BLOCK_BYTES;
        let apart = (blocks * 8 / changed.max(8)).max(9);
        let begins = (0..blocks - 8).step_by(apart as usize);
        // Blocks that are stored already, at other places: nothing but maps is written.
        let changes = begins.flat_map(|at| (at..at + 8).map(move |block| (block, (block + 1) % blocks)));
        put(&pool, 3, Some(second), blocks, changes);
        pool.delete_point(second, "measured").unwrap();
        pool.tick().unwrap();
    } else {
        let options =
            ReclaimOptions { dry_run: true, mark_all: step == Step::Mark, ..ReclaimOptions::default() };
        let report = pool.reclaim(options, &Nobody).unwrap();
        assert_eq!(report.counts == CountsUse::Kept, step != Step::Mark, "{report:?}");
    }
    println!("{} {opened} {}", status("VmHWM"), begin.elapsed().as_secs_f64());
}

/// Bytes of files of a folder whose names end so.
fn bytes_of(dir: &Path, end: &str) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let wanted = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(end));
    wanted.map(|entry| entry.metadata().unwrap().len()).sum()
}

/// What one size gave: chunks, and for each step peak, peak after opening, seconds.
type Measured = (u64, Vec<(u64, u64, f64)>);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |name: &str| words.iter().position(|word| word == name).and_then(|at| words.get(at + 1));
    let value = |name: &str| word(name).and_then(|word| word.parse::<f64>().ok()).map(|value| value as u64);
    if let (Some(dir), Some(step)) = (word("--measure"), value("--step")) {
        return measure(Path::new(dir), STEPS[step as usize], value("--changed").unwrap_or(0));
    }
    let chunks = value("--chunks").unwrap_or(4_000_000).max(100_000);
    let pack_chunks = value("--pack-chunks").unwrap_or(1000);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let one = |chunks: u64| -> Measured {
        let dir = tempfile::tempdir_in(word("--dir").map_or(".", String::as_str)).unwrap();
        make(dir.path(), chunks, pack_chunks);
        let changed = value("--changed").unwrap_or(chunks / 1000);
        let mut steps = Vec::new();
        let mut counts_bytes = 0;
        for number in 0..STEPS.len() {
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            command.arg("--measure").arg(dir.path()).args(["--step", &number.to_string()]);
            let output = command.args(["--changed", &changed.to_string()]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let line = String::from_utf8(output.stdout).unwrap();
            let mut fields = line.split_whitespace().map(|field| field.parse::<f64>().unwrap());
            let mut next = || fields.next().unwrap();
            steps.push((next() as u64, next() as u64, next()));
            if number == 0 {
                counts_bytes = bytes_of(&dir.path().join("index"), ".counts");
            }
        }
        let [anew, _, follow, mark] = steps[..] else { unreachable!("four steps") };
        println!(
            "{{\"chunks\":{chunks},\"changed_blocks\":{changed},\"anew_s\":{:.2},\"follow_s\":{:.3},\"mark_s\":{:.2},\
             \"anew_peak_mib\":{:.1},\"follow_peak_mib\":{:.1},\"mark_peak_mib\":{:.1},\"opened_mib\":{:.1},\
             \"counts_bytes_a_chunk\":{:.2}}}",
            anew.2,
            follow.2,
            mark.2,
            mib(anew.0 as f64),
            mib(follow.0 as f64),
            mib(mark.0 as f64),
            mib(follow.1 as f64),
            counts_bytes as f64 / chunks as f64,
        );
        (chunks, steps)
    };
    let (few, low) = one(chunks / 4);
    let (many, high) = one(chunks);
    let at_1e9 = |step: usize| {
        let (low, high) = (low[step].0 as f64, high[step].0 as f64);
        let slope = (high - low).max(0.0) / (many - few) as f64;
        (slope, mib(high + slope * (1e9 - many as f64)))
    };
    let [(anew, anew_peak), _, (follow, follow_peak), (mark, mark_peak)] = [0, 1, 2, 3].map(at_1e9);
    println!(
        "{{\"anew_bytes_a_chunk\":{anew:.3},\"follow_bytes_a_chunk\":{follow:.3},\"mark_bytes_a_chunk\":{mark:.3},\
         \"anew_peak_mib_at_1e9\":{anew_peak:.0},\"follow_peak_mib_at_1e9\":{follow_peak:.0},\
         \"mark_peak_mib_at_1e9\":{mark_peak:.0}}}"
    );
}

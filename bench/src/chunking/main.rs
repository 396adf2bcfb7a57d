//! `chunking WORKLOAD [WORD]`: what it costs to cut, compress and keep the generator's disks in one way or another.
//!
//! WORKLOAD is a folder of `testbed/make-workload.py make` (vm1, vm2 a clone of it, vm3 with NTFS; five days each). Every
//! scheme gets the disks in that order, and only the blocks that changed, as with a list of changes. With WORD only the
//! schemes whose name has it. Prints Markdown tables; sizes are MB (10^6 bytes) as a pool would store them, with frame
//! headers, seals, filling, and table, map and index entries of each chunk. Seconds are those of a thread.
//!
//! `chunking noise WORKLOAD`: what the early tests for data that will not shrink cost, save and get wrong.

mod encode;
mod noise;
mod pool;
mod workload;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;

use encode::{Early, Level};
use pool::{Cut, Day, INDEX, Pool, Reads, Scheme};
use workload::{BLOCK, Version};

const VMS: [&str; 3] = ["vm1", "vm2", "vm3"];
const THREADS: usize = 2;

/// Processor time of this thread.
pub fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

fn schemes() -> Vec<(String, Scheme)> {
    const KIB: usize = 1024;
    let today = Scheme {
        cut: Cut::Fixed(BLOCK),
        frame: 4,
        scattered: false,
        level: Level::Fixed(3),
        early: Early::Never,
        dictionary: 0,
    };
    let mut all = vec![("today: fixed 64 KiB, frames of 4, zstd 3".to_owned(), today)];
    let mut add = |name: String, scheme: Scheme| all.push((name, scheme));
    for kib in [16, 32, 128, 256, 1024] {
        let frame = (256 / kib).max(1);
        add(format!("cut: fixed {kib} KiB"), Scheme { cut: Cut::Fixed(kib * KIB), frame, ..today });
    }
    for kib in [16, 64, 256, 1024] {
        let frame = (256 / kib).max(1);
        add(format!("cut: content, {kib} KiB"), Scheme { cut: Cut::Content(kib * KIB), frame, ..today });
    }
    for chained in [false, true] {
        let name = if chained { "over the day before" } else { "over a whole block" };
        let cut = Cut::Pages { chained };
        add(format!("cut: changed pages {name}"), Scheme { cut, ..today });
        add(format!("cut: changed pages {name}, any"), Scheme { cut, scattered: true, ..today });
    }
    add("cut: zstd patch over a whole block".to_owned(), Scheme { cut: Cut::Patch, ..today });
    for (frame, scattered) in
        [(1, false), (2, false), (8, false), (16, false), (4, true), (8, true), (16, true)]
    {
        let which = if scattered { ", any" } else { "" };
        add(format!("frame: {frame} of 64 KiB{which}"), Scheme { frame, scattered, ..today });
    }
    for frame in [4, 64] {
        let cut = Cut::Fixed(16 * KIB);
        add(format!("frame: {frame} of 16 KiB, any"), Scheme { cut, frame, scattered: true, ..today });
    }
    for (kib, frame, dictionary) in
        [(64, 1, 65_536), (64, 1, 112 * KIB), (64, 4, 112 * KIB), (16, 1, 112 * KIB)]
    {
        let name = format!("dictionary of {} KiB: {frame} of {kib} KiB", dictionary / KIB);
        add(name, Scheme { cut: Cut::Fixed(kib * KIB), frame, dictionary, ..today });
    }
    for (name, level) in [
        ("1", Level::Fixed(1)),
        ("2", Level::Fixed(2)),
        ("1 then 3", Level::Both),
        ("by sample", Level::Sampled),
    ] {
        add(format!("level: {name}"), Scheme { level, ..today });
    }
    add(
        "level: 1, frames of 8, any".to_owned(),
        Scheme { level: Level::Fixed(1), frame: 8, scattered: true, ..today },
    );
    for (name, early) in [("sample", Early::Sample), ("trial", Early::Trial)] {
        add(format!("early: {name}"), Scheme { early, ..today });
    }
    all
}

/// What a scheme did, machine by machine.
#[derive(Default, Clone)]
struct Row {
    days: [Vec<Day>; 3],
    reads: Reads,
    chunks: u64,
}

/// Every so many blocks one is a sample for the dictionary: 16 MiB altogether.
fn train(version: &Version, bytes: usize) -> Result<Vec<u8>, String> {
    let step = (version.changed.len() / 256).max(1);
    let samples: Vec<&[u8]> = version
        .changed
        .iter()
        .step_by(step)
        .filter_map(|&index| version.blocks[index].as_deref())
        .flat_map(|block| block.chunks(16 * 1024))
        .collect();
    let began = cpu_seconds();
    let trained = zstd::dict::from_samples(&samples, bytes).map_err(|error| error.to_string())?;
    eprintln!("a dictionary of {bytes} bytes took {:.1} s to train", cpu_seconds() - began);
    Ok(trained)
}

fn run(folder: &Path, word: &str) -> Result<(), String> {
    let schemes: Vec<_> = schemes()
        .into_iter()
        .enumerate()
        .filter(|(number, (name, _))| *number == 0 || name.contains(word))
        .map(|(_, scheme)| scheme)
        .collect();
    let pools: Vec<Mutex<Option<(Pool, Row)>>> = schemes.iter().map(|_| Mutex::new(None)).collect();
    for (vm, name) in VMS.iter().enumerate() {
        if !folder.join(name).exists() {
            eprintln!("{name} is not there: it is left out");
            continue;
        }
        let versions = workload::versions(folder, name)?;
        let next = Mutex::new(0);
        let work = || -> Result<(), String> {
            loop {
                let number = {
                    let mut next = next.lock().map_err(|_| "a thread died")?;
                    *next += 1;
                    *next - 1
                };
                let Some((title, scheme)) = schemes.get(number) else { return Ok(()) };
                let mut slot = pools[number].lock().map_err(|_| "a thread died")?;
                if slot.is_none() {
                    let dictionary = match scheme.dictionary {
                        0 => Vec::new(),
                        bytes => train(&versions[0], bytes)?,
                    };
                    *slot = Some((Pool::new(*scheme, dictionary)?, Row::default()));
                }
                let Some((pool, row)) = slot.as_mut() else { continue };
                pool.next_disk(vm == 0);
                for (n, version) in versions.iter().enumerate() {
                    let before = n.checked_sub(1).map(|n| &versions[n]);
                    row.days[vm].push(pool.store(version, before)?);
                }
                if let (0, Some(last)) = (vm, versions.last()) {
                    row.reads = pool.read(last)?;
                    pool.next_disk(false);
                }
                row.chunks = pool.chunks();
                eprintln!("{name}: {title}");
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| "a thread died".to_owned())?)
        })?;
    }
    let rows: Vec<Row> =
        pools.into_iter().filter_map(|slot| slot.into_inner().ok().flatten().map(|(_, row)| row)).collect();
    let names: Vec<&str> = schemes.iter().map(|(name, _)| name.as_str()).collect();
    print(&names, &rows);
    Ok(())
}

/// Bytes of a day, with the index.
fn bytes(day: &Day) -> f64 {
    (day.stored + day.chunks * INDEX) as f64
}

fn print(names: &[&str], rows: &[Row]) {
    let Some(today) = rows.first() else { return };
    println!("Stored, MB: the first day of each machine, and days 2 to 5 one by one.\n");
    println!("| scheme | vm1 | days | vm2 | days | vm3 | days | index |");
    println!("|---|---|---|---|---|---|---|---|");
    for (name, row) in names.iter().zip(rows) {
        print!("| {name} ");
        for days in &row.days {
            let each: Vec<String> = days.iter().map(|day| format!("{:.1}", bytes(day) / 1e6)).collect();
            let (first, others) = each.split_at(each.len().min(1));
            print!("| {} | {} ", first.concat(), others.join(" "));
        }
        println!("| {:.2} |", (row.chunks * INDEX) as f64 / 1e6);
    }
    println!(
        "\nAgainst today: the first day, the sum of days 2 to 5, the clone; CPU is of hashing, cutting, compressing and sealing the first day."
    );
    println!(
        "Random reads are of 4 KiB of the last day, each decoding its frame whole, or only up to its chunk.\n"
    );
    println!(
        "| scheme | vm1 | days | clone | its days | vm3 | days | CPU s/GB | KiB decoded, whole / up to | reads per CPU s | sequential MB per CPU s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for (name, row) in names.iter().zip(rows) {
        print!("| {name} ");
        for vm in 0..VMS.len() {
            let sum = |row: &Row, from: usize, to: usize| -> f64 {
                row.days[vm].iter().skip(from).take(to - from).map(bytes).sum()
            };
            print!("| {:.3} ", sum(row, 0, 1) / sum(today, 0, 1));
            print!("| {:.3} ", sum(row, 1, 99) / sum(today, 1, 99));
        }
        let first = row.days[0].first().copied().unwrap_or_default();
        let cpu = (first.cut_seconds + first.hash_seconds + first.encode_seconds) / first.plain as f64 * 1e9;
        let reads = row.reads;
        println!(
            "| {cpu:.2} | {:.0} / {:.0} | {:.0} / {:.0} | {:.0} |",
            reads.decoded_whole / 1024.0,
            reads.decoded_prefix / 1024.0,
            reads.whole_per_second,
            reads.prefix_per_second,
            reads.sequential,
        );
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["noise", folder] => noise::run(Path::new(folder)),
        [folder] => run(Path::new(folder), ""),
        [folder, word] => run(Path::new(folder), word),
        _ => Err("usage: chunking WORKLOAD [WORD] | chunking noise WORKLOAD".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("chunking: {message}");
            ExitCode::FAILURE
        }
    }
}

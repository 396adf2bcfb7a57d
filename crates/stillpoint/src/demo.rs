//! `stillpoint demo`: the main job on a real disk, told as it goes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use cli::program::{DemoOptions, PoolCreation, Say};
use environment::SeededRandomness;
use model::{BLOCK_BYTES, Code, Problem};
use protocol::api::{
    AddImage, ChangedExtents, Job, JobRequest, JobState, Protect, RecoverDisk, RecoverTarget, Synchronize,
    VerifyPool,
};
use server::api::{Caller, Service};

use crate::follow::follow;
use crate::standalone;

const NAME: &str = "demo-vm";
const MIB: u64 = 1 << 20;
/// Size of the disk that the demo makes.
const DISK_BYTES: u64 = 256 * MIB;
/// Where its only partition begins.
const PARTITION_AT: u64 = MIB;

fn failed(what: &str, error: impl std::fmt::Display) -> Problem {
    Problem::new(Code::Internal, format!("The demo cannot {what}: {error}."))
}

fn tool(command: &mut Command, input: &[u8], what: &str) -> Result<(), Problem> {
    let name = command.get_program().to_string_lossy().into_owned();
    let missing = |error: std::io::Error| {
        Problem::new(Code::Unsupported, format!("The demo cannot {what}: {name}: {error}."))
            .hint("Install the tools that make a disk: `apt-get install fdisk e2fsprogs`, or give a disk with --image.")
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input).map_err(|error| failed(what, error))?;
    }
    let output = child.wait_with_output().map_err(|error| failed(what, error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(
        what,
        format!("{name} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
    ))
}

/// Finds a tool of the system that a user's search path may lack.
fn system_tool(name: &str) -> Command {
    let place = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists());
    Command::new(place.unwrap_or_else(|| PathBuf::from(name)))
}

/// A disk with a partition table and an ext4 file system with files of several kinds.
fn make_disk(path: &Path, scratch: &Path) -> Result<(), Problem> {
    let files = scratch.join("files");
    fs::create_dir_all(&files).map_err(|error| failed("make files", error))?;
    let random = SeededRandomness::new(7);
    let text: Vec<u8> = (0..60_000u64)
        .flat_map(|line| {
            format!(
                "{line:08} unit={} state={} value={}\n",
                random.below(40),
                random.below(5),
                random.below(9_000)
            )
            .into_bytes()
        })
        .collect();
    let noise =
        |bytes: usize| -> Vec<u8> { (0..bytes / 8).flat_map(|_| random.next_u64().to_le_bytes()).collect() };
    for index in 0..12 {
        let write = |name: String, bytes: &[u8]| {
            fs::write(files.join(name), bytes).map_err(|error| failed("make files", error))
        };
        write(format!("log-{index}.txt"), &text)?;
        write(format!("picture-{index}.bin"), &noise(2 << 20))?;
        // Copies of one file: what deduplication is for.
        write(format!("copy-{index}.txt"), &text)?;
    }
    let disk = fs::File::create_new(path).map_err(|error| failed("make a disk", error))?;
    disk.set_len(DISK_BYTES).map_err(|error| failed("make a disk", error))?;
    drop(disk);
    let table =
        format!("label: gpt\nstart={}, size={}\n", PARTITION_AT / 512, (DISK_BYTES - 2 * PARTITION_AT) / 512);
    tool(system_tool("sfdisk").arg("--quiet").arg(path), table.as_bytes(), "partition a disk")?;
    let blocks = ((DISK_BYTES - 2 * PARTITION_AT) / 4096).to_string();
    tool(
        system_tool("mkfs.ext4")
            .args(["-q", "-F", "-b", "4096", "-E"])
            .arg(format!("offset={PARTITION_AT},lazy_itable_init=0"))
            .arg("-d")
            .arg(&files)
            .arg(path)
            .arg(blocks),
        b"",
        "make a file system",
    )
}

/// Changes the disk as a running machine would, and gives the ranges that changed, found by comparing with `before`.
fn change_disk(path: &Path, before: &Path, own: bool, scratch: &Path) -> Result<Vec<(u64, u64)>, Problem> {
    if own {
        let added = scratch.join("added.txt");
        let random = SeededRandomness::new(99);
        let bytes: Vec<u8> = (0..400_000).flat_map(|_| random.next_u64().to_le_bytes()).collect();
        fs::write(&added, bytes).map_err(|error| failed("change the disk", error))?;
        let device = format!("{}?offset={PARTITION_AT}", path.display());
        let commands = format!("write {} added.txt\nrm log-3.txt\nmkdir new\n", added.display());
        tool(
            system_tool("debugfs").arg("-w").arg("-f").arg("-").arg(device),
            commands.as_bytes(),
            "change the file system",
        )?;
    } else {
        // A disk whose file system is not known: some bytes in its middle, put back nowhere, on the copy only.
        let file = fs::OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(|error| failed("change the disk", error))?;
        let size = file.metadata().map_err(|error| failed("change the disk", error))?.len();
        for part in 1..=8u64 {
            let at = size / 9 * part / 512 * 512;
            let length = 8192.min(size.saturating_sub(at)) as usize;
            file.write_all_at(&vec![part as u8; length], at)
                .map_err(|error| failed("change the disk", error))?;
        }
    }
    let (mut old, mut new) = (open(before)?, open(path)?);
    let mut extents: Vec<(u64, u64)> = Vec::new();
    let (mut a, mut b) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    let mut at = 0;
    loop {
        let (x, y) = (fill(&mut old, &mut a)?, fill(&mut new, &mut b)?);
        if x == 0 && y == 0 {
            return Ok(extents);
        }
        let length = x.max(y);
        for page in (0..length).step_by(4096) {
            let end = (page + 4096).min(length);
            if a[page..end] != b[page..end] {
                match extents.last_mut() {
                    Some((start, len)) if *start + *len == at + page as u64 => *len += (end - page) as u64,
                    _ => extents.push((at + page as u64, (end - page) as u64)),
                }
            }
        }
        at += length as u64;
    }
}

fn open(path: &Path) -> Result<fs::File, Problem> {
    fs::File::open(path).map_err(|error| failed(&format!("open {}", path.display()), error))
}

fn fill(file: &mut fs::File, buf: &mut [u8]) -> Result<usize, Problem> {
    let mut done = 0;
    while done < buf.len() {
        match file.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read", error)),
        }
    }
    Ok(done)
}

fn equal(a: &Path, b: &Path) -> Result<bool, Problem> {
    let (mut one, mut other) = (open(a)?, open(b)?);
    let (mut x, mut y) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    loop {
        let (n, m) = (fill(&mut one, &mut x)?, fill(&mut other, &mut y)?);
        if n != m || x[..n] != y[..m] {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

fn copy_sparse(from: &Path, to: &Path) -> Result<(), Problem> {
    use block_io::BlockDevice;
    let wrong = |error: &dyn std::fmt::Display| failed(&format!("copy {}", from.display()), error);
    let source = block_io::FileDevice::open(from).map_err(|error| wrong(&error))?;
    let target = block_io::FileDevice::create(to, source.size()).map_err(|error| wrong(&error))?;
    let whole = block_io::ByteRange { start: 0, end: source.size() };
    let mut buf = vec![0u8; 1 << 20];
    for range in source.allocated(whole) {
        let range = range.map_err(|error| wrong(&error))?;
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(buf.len() as u64) as usize;
            source.read_at(at, &mut buf[..length]).map_err(|error| wrong(&error))?;
            block_io::WritableDevice::write_at(&target, at, &buf[..length]).map_err(|error| wrong(&error))?;
            at += length as u64;
        }
    }
    Ok(())
}

fn mib(bytes: Option<u64>) -> String {
    format!("{:.1} MiB", bytes.unwrap_or(0) as f64 / MIB as f64)
}

struct Scratch(Option<PathBuf>);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// Runs the demo.
pub fn run(options: &DemoOptions, say: &dyn Say) -> Result<(), Problem> {
    let began = Instant::now();
    let scratch = std::env::temp_dir().join(format!("stillpoint-demo-{}", std::process::id()));
    fs::create_dir_all(&scratch).map_err(|error| failed("make a scratch folder", error))?;
    let _remove = Scratch((!options.keep).then(|| scratch.clone()));
    let data = options.data.clone().unwrap_or_else(|| scratch.join("data"));
    let disk = scratch.join("disk.raw");
    let second = |began: Instant| format!("{:.1} s", began.elapsed().as_secs_f64());

    let step = Instant::now();
    match &options.image {
        None => {
            make_disk(&disk, &scratch)?;
            say.line(&format!(
                "Made a disk of {} with a partition and an ext4 file system ({}).",
                mib(Some(DISK_BYTES)),
                second(step)
            ));
        }
        Some(image) => {
            copy_sparse(image, &disk)?;
            say.line(&format!(
                "Copied {}: the demo changes only its copy ({}).",
                image.display(),
                second(step)
            ));
        }
    }
    let before = scratch.join("before.raw");
    copy_sparse(&disk, &before)?;

    let create =
        PoolCreation { recovery_kit: Some(scratch.join("recovery-kit.txt")), ..PoolCreation::default() };
    let existed = data.exists();
    let create = if options.data.is_some() { PoolCreation::default() } else { create };
    let running = standalone::open(&data, Some(standalone::settings(&create)), None, true, false, false)?;
    let service = standalone::service(&running);
    let by = Caller { name: "demo".to_owned() };
    if let Some(kit) = &running.created_kit {
        say.line(&format!(
            "Made pool {} in {} and proved its recovery kit {}.",
            running.app.pool().id(),
            data.display(),
            kit.display()
        ));
    } else if existed {
        say.line(&format!("Using pool {} in {}.", running.app.pool().id(), data.display()));
    }
    let name = free_name(&*service)?;
    let request = AddImage {
        name: name.clone(),
        host: None,
        images: vec![disk.display().to_string()],
        formats: Vec::new(),
        allow_backing: Vec::new(),
    };
    service.add_image(&by, &request)?;
    let run = |request: JobRequest| -> Result<Job, Problem> {
        let started = service.start(&by, &request)?;
        let job = follow(&*service, started.job, say)?;
        match (job.state, job.problem.clone()) {
            (JobState::Succeeded, _) if job.warnings.is_empty() => Ok(job),
            (JobState::Succeeded, _) => Err(job.warnings[0].clone()),
            (_, Some(problem)) => Err(problem),
            (state, None) => Err(failed("finish a job", state.word())),
        }
    };

    let job = run(JobRequest::Protect { datasource: name.clone(), options: Protect::default() })?;
    let figures = &job.figures;
    say.step(
        &format!(
            "Protected: {} of disk, {} read, {} stored, first recovery point {} ({:.1} s).",
            mib(figures.bytes_logical),
            mib(figures.bytes_read),
            mib(figures.bytes_stored),
            figures.recovery_point.map(|id| id.to_string()).unwrap_or_default(),
            figures.seconds.unwrap_or(0.0)
        ),
        "protected",
        serde_json::to_value(figures).unwrap_or_default(),
    );
    let first = figures.recovery_point;

    let extents = change_disk(&disk, &before, options.image.is_none(), &scratch)?;
    let listed: u64 = extents.iter().map(|(_, length)| length).sum();
    say.line(&format!("Changed the disk: {} in {} ranges.", mib(Some(listed)), extents.len()));
    let synchronize = Synchronize {
        changed_extents: vec![ChangedExtents { disk: 0, extents: extents.clone() }],
        changed_since: first.map(|id| id.to_string()),
        ..Synchronize::default()
    };
    let job = run(JobRequest::Synchronize { datasource: name.clone(), options: synchronize })?;
    let figures = &job.figures;
    let rounded = model::RangeSet::from_ranges(
        extents.iter().filter_map(|&(offset, length)| model::ByteRange::at(offset, length)).collect(),
    )
    .rounded_out(BLOCK_BYTES, u64::MAX);
    say.step(
        &format!(
            "Synchronised from the list: {} listed, {} in whole blocks, {} moved, {} audited, {} stored ({:.1} s). {}.",
            mib(figures.bytes_listed),
            mib(Some(rounded.bytes())),
            mib(figures.bytes_transferred),
            mib(figures.bytes_audited),
            mib(figures.bytes_stored),
            figures.seconds.unwrap_or(0.0),
            figures.cause.clone().unwrap_or_default()
        ),
        "synchronized",
        serde_json::to_value(figures).unwrap_or_default(),
    );
    let latest = figures.recovery_point;

    let job = run(JobRequest::VerifyPool(VerifyPool { read_data: true, ..VerifyPool::default() }))?;
    say.step(
        &format!(
            "Verified: {} read and hashed, nothing damaged ({:.1} s).",
            mib(job.figures.bytes_read),
            job.figures.seconds.unwrap_or(0.0)
        ),
        "verified",
        serde_json::to_value(&job.figures).unwrap_or_default(),
    );

    for (point, truth, word) in [(latest, &disk, "second"), (first, &before, "first")] {
        let Some(point) = point else { return Err(failed("find its point", "it has no id")) };
        let target = scratch.join(format!("recovered-{word}.raw"));
        let options = RecoverDisk {
            point: point.to_string(),
            disk: 0,
            target: RecoverTarget::Server { path: target.display().to_string() },
            format: None,
            limit: None,
            no_sync: false,
            accept_damage: false,
            overwrite: false,
            min_consistency: None,
        };
        let job = run(JobRequest::RecoverDisk { datasource: name.clone(), options })?;
        if !equal(&target, truth)? {
            return Err(Problem::new(
                Code::PoolDamaged,
                format!("The disk recovered from the {word} point differs from the disk as it was."),
            ));
        }
        say.step(
            &format!(
                "Recovered the {word} point: {} written, byte for byte the disk as it was ({:.1} s).",
                mib(job.figures.bytes_written),
                job.figures.seconds.unwrap_or(0.0)
            ),
            "recovered",
            serde_json::to_value(&job.figures).unwrap_or_default(),
        );
    }
    drop(running);
    say.line(&format!("Done in {}. The recovered disks are identical.", second(began)));
    if options.keep {
        say.line(&format!("Kept: {}.", scratch.display()));
        say.line(&format!("Try: stillpoint --standalone {} recovery-point list {name}", data.display()));
    }
    Ok(())
}

/// A name that no datasource has: the demo may run twice on one data folder.
fn free_name(service: &dyn Service) -> Result<String, Problem> {
    let known: Vec<String> =
        service.datasources(&Default::default())?.items.into_iter().map(|known| known.name).collect();
    Ok((1..)
        .map(|turn| if turn == 1 { NAME.to_owned() } else { format!("{NAME}-{turn}") })
        .find(|name| !known.contains(name))
        .unwrap_or_default())
}

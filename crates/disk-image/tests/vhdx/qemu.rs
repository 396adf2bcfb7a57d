//! Agreement with `qemu-img` and `qemu-io`, both ways. Package `qemu-utils`; the tests fail without it.
//!
//! Children and sectors of 4096 bytes are not compared with QEMU; the other tests cover them alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block_io::{BlockDevice, DiskFile, FileDevice, WritableDevice};
use disk_image::NoParents;
use disk_image::vhdx::{CreateKind, CreateOptions, Kind, Reader, Writer};

use crate::support::*;

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img (package qemu-utils)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}{errors}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A sparse raw disk with something at the edges of blocks of every size.
fn raw_disk(folder: &Path, size: u64) -> (PathBuf, Vec<(u64, Vec<u8>)>) {
    let path = folder.join("disk.raw");
    let disk = FileDevice::create(&path, size).unwrap();
    let mut numbers = Numbers(size);
    let mut content = Vec::new();
    let places = [0, 512, MIB - 512, 8 * MIB - 4096, 33 * MIB, size / 2 / 512 * 512, size - 512];
    for at in places.into_iter().filter(|at| at + 512 <= size) {
        let length = (512 * (1 + numbers.next(300))).min(size - at);
        let bytes: Vec<u8> = (0..length).map(|_| numbers.next(255) as u8 + 1).collect();
        disk.write_at(at, &bytes).unwrap();
        content.push((at, bytes));
    }
    (path, content)
}

fn reader(path: &Path) -> Reader {
    Reader::open(Arc::new(FileDevice::open(path).unwrap()), &NoParents).unwrap()
}

fn same_as_raw(device: &dyn BlockDevice, raw: &Path) {
    let raw = FileDevice::open(raw).unwrap();
    assert_eq!(device.size(), raw.size());
    let (mut ours, mut theirs) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for at in (0..raw.size()).step_by(MIB as usize) {
        let length = (raw.size() - at).min(MIB) as usize;
        device.read_at(at, &mut ours[..length]).unwrap();
        raw.read_at(at, &mut theirs[..length]).unwrap();
        assert!(ours[..length] == theirs[..length], "bytes differ in the MiB at {at}");
    }
    // What is left out of the allocated ranges must be zero in the raw disk.
    let whole = block_io::ByteRange { start: 0, end: device.size() };
    let mut ranges: Vec<_> = block_io::Allocated::new(device, whole).map(|range| range.unwrap()).collect();
    ranges.push(block_io::ByteRange { start: device.size(), end: device.size() });
    let mut last = 0;
    for range in ranges {
        for at in (last..range.start).step_by(MIB as usize) {
            let length = (range.start - at).min(MIB) as usize;
            raw.read_at(at, &mut theirs[..length]).unwrap();
            assert!(theirs[..length].iter().all(|&byte| byte == 0), "data left out near {at}");
        }
        last = range.end;
    }
}

#[test]
fn we_read_what_qemu_writes() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, _) = raw_disk(folder.path(), 70 * MIB + 512);
    for subformat in ["fixed", "dynamic"] {
        for block in ["1M", "2M", "8M", "32M", "256M"] {
            let path = folder.path().join(format!("{subformat}-{block}.vhdx"));
            let settings = format!("subformat={subformat},block_size={block}");
            qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-o", &settings, text(&raw), text(&path)]);
            let reader = reader(&path);
            let wanted = if subformat == "fixed" { Kind::Fixed } else { Kind::Dynamic };
            assert_eq!(reader.info().kind, wanted, "{settings}");
            assert_eq!(
                u64::from(reader.info().block_size),
                block[..block.len() - 1].parse::<u64>().unwrap() * MIB
            );
            assert!(reader.info().creator.starts_with("QEMU"), "{}", reader.info().creator);
            same_as_raw(&reader, &raw);
            drop(reader);
            // A writer goes on with it, and QEMU reads what comes of it.
            let file = Arc::new(DiskFile::open(&path).unwrap());
            let writer = Writer::open(file, &NoParents).unwrap();
            writer.write_at(40 * MIB + 512, &[0x5C; 70_000]).unwrap();
            writer.write_zeros(block_io::ByteRange { start: 0, end: 9 * MIB }).unwrap();
            writer.flush().unwrap();
            let changed = folder.path().join("changed.raw");
            std::fs::copy(&raw, &changed).unwrap();
            let disk = FileDevice::open_writable(&changed).unwrap();
            disk.write_at(40 * MIB + 512, &[0x5C; 70_000]).unwrap();
            disk.write_zeros(block_io::ByteRange { start: 0, end: 9 * MIB }).unwrap();
            same_as_raw(&writer, &changed);
            qemu_img(&["check", "-f", "vhdx", text(&path)]);
            qemu_img(&["compare", "-f", "vhdx", "-F", "raw", text(&path), text(&changed)]);
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn qemu_reads_what_we_write() {
    let folder = tempfile::tempdir().unwrap();
    let size = 300 * MIB + 512;
    let (raw, content) = raw_disk(folder.path(), size);
    for kind in [CreateKind::Fixed, CreateKind::Dynamic] {
        for power in 20..=28u32 {
            let path = folder.path().join(format!("{kind:?}-{power}.vhdx"));
            let file = Arc::new(DiskFile::create(&path).unwrap());
            let options = CreateOptions { block_size: 1 << power, ..options(size, kind) };
            let writer = Writer::create(file, options).unwrap();
            for (at, bytes) in &content {
                writer.write_at(*at, bytes).unwrap();
                writer.flush().unwrap();
            }
            drop(writer);
            let info = qemu_img(&["info", "-f", "vhdx", "--output=json", text(&path)]);
            assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
            assert!(info.contains(&format!("\"cluster-size\": {}", 1u64 << power)), "{info}");
            let check = qemu_img(&["check", "-f", "vhdx", text(&path)]);
            assert!(check.contains("No errors"), "{check}");
            qemu_img(&["compare", "-f", "vhdx", "-F", "raw", text(&path), text(&raw)]);
            map_agrees(&path);
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// QEMU's map never reports zeros where we report data that is not zero. (For VHDX it reports all as data.)
fn map_agrees(path: &Path) {
    let map = qemu_img(&["map", "-f", "vhdx", "--output=json", text(path)]);
    let reader = reader(path);
    let field = |line: &str, name: &str| -> Option<String> {
        let rest = line.split(&format!("\"{name}\": ")).nth(1)?;
        Some(rest.split([',', '}']).next()?.trim().to_owned())
    };
    let mut covered = 0;
    for line in map.lines() {
        let (Some(start), Some(length)) = (field(line, "start"), field(line, "length")) else { continue };
        let (start, length): (u64, u64) = (start.parse().unwrap(), length.parse().unwrap());
        covered += length;
        if field(line, "data").as_deref() != Some("true") {
            let next = reader.next_allocated(start).unwrap();
            assert!(next.is_none_or(|next| next.start >= start + length), "{line}: {next:?}");
        }
    }
    assert_eq!(covered, reader.size());
}

/// QEMU empties its log after each write, so no kill leaves one in use. The power cut is made by hand from what it
/// wrote: the BAT page is lost, the headers name the log again, and the entry itself is QEMU's.
#[test]
fn a_log_that_qemu_wrote_is_replayed_alike_by_both() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dirty.vhdx");
    qemu_img(&["create", "-f", "vhdx", "-o", "subformat=dynamic,block_size=1M", text(&path), "64M"]);
    let mut command = Command::new("qemu-io");
    command.args(["-f", "vhdx"]);
    for block in 0..20 {
        command.args(["-c".to_owned(), format!("write -P {} {}M 64k", block + 1, block * 3)]);
    }
    let output = command.arg(&path).output().expect("qemu-io (package qemu-utils)");
    assert!(output.status.success());
    let mut bytes = std::fs::read(&path).unwrap();
    let log = u64_at(&bytes, HEADERS[0] + 72);
    // Each write has an entry with a GUID of its own; the last one holds the whole page.
    let log = (log..log + MIB)
        .step_by(4096)
        .filter(|at| bytes[*at as usize..].starts_with(b"loge"))
        .last()
        .unwrap();
    let guid = bytes[log as usize + 32..][..16].to_vec();
    let page = u64_at(&bytes, log + 64 + 16);
    put(&mut bytes, page, &[0; 4096]);
    for at in HEADERS {
        put(&mut bytes, at + 48, &guid);
        reseal(&mut bytes, at, 4096);
    }
    std::fs::write(&path, &bytes).unwrap();
    let reader = reader(&path);
    assert!(reader.info().log_replayed);
    for block in 0..20u64 {
        let mut part = vec![0; 65_536];
        reader.read_at(block * 3 * MIB, &mut part).unwrap();
        assert!(part.iter().all(|&byte| u64::from(byte) == block + 1), "block {block}");
    }
    assert!(std::fs::read(&path).unwrap() == bytes, "a reader never writes");
    both_replay(folder.path(), &path);
}

/// What our writer leaves when it is stopped in a flush is replayed by QEMU.
#[test]
fn a_log_that_we_wrote_is_replayed_alike_by_both() {
    let folder = tempfile::tempdir().unwrap();
    let file = Arc::new(JournalFile::default());
    let writer = Writer::create(file.clone(), options(64 * MIB, CreateKind::Dynamic)).unwrap();
    writer.write_at(5 * MIB - 100, &[0x42; 300_000]).unwrap();
    writer.flush().unwrap();
    let dirty = (0..=file.steps())
        .rev()
        .map(|stop| file.after_crash(stop, || false))
        .find(|bytes| open(bytes).is_ok_and(|reader| reader.info().log_replayed))
        .unwrap();
    let path = folder.path().join("dirty.vhdx");
    std::fs::write(&path, &dirty).unwrap();
    both_replay(folder.path(), &path);
}

/// QEMU refuses to read a dirty image, and repairs it when it may write; then it equals what our writer repairs.
fn both_replay(folder: &Path, path: &Path) {
    let ours = folder.join("ours.vhdx");
    std::fs::copy(path, &ours).unwrap();
    let refused = Command::new("qemu-img").args(["compare", "-f", "vhdx", text(path), text(path)]).output();
    assert!(!refused.unwrap().status.success(), "QEMU refuses to read it while its log must be replayed");
    drop(Writer::open(Arc::new(DiskFile::open(&ours).unwrap()), &NoParents).unwrap());
    qemu_img(&["check", "-r", "all", "-f", "vhdx", text(path)]);
    qemu_img(&["compare", "-f", "vhdx", "-F", "vhdx", text(path), text(&ours)]);
}

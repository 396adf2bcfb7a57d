//! Agreement with qemu-img and qemu-io, both ways. Without them these tests fail: they are part of what is promised.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block_io::{Allocated, BlockDevice, ByteRange, DiskFile, FileDevice, WritableDevice};
use disk_image::NoParents;
use disk_image::vhd::{CreateOptions, Kind, Reader, SizeRule, Writer};

use crate::ID;

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed (Debian package qemu-utils): {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A sparse raw disk with data at the places that matter.
fn raw_disk(folder: &Path, size: u64) -> PathBuf {
    let path = folder.join(format!("{size}.raw"));
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (turn, at) in
        [0, 65_536, (2 << 20) - 4096, 2 << 20, size / 2 / 4096 * 4096, size - 512].into_iter().enumerate()
    {
        let length = 20_000.min(size.saturating_sub(at)) as usize;
        let bytes: Vec<u8> =
            (0..length).map(|index| (index as u8).wrapping_mul(turn as u8 + 3) | 1).collect();
        file.write_at(&bytes, at).unwrap();
    }
    path
}

/// Compares a device with a sparse file, range by range: both sides' data is looked at, and nothing else.
fn same(device: &dyn BlockDevice, raw: &Path) {
    let expected = FileDevice::open(raw).unwrap();
    assert!(device.size() >= expected.size());
    for (side, other) in [(device, &expected as &dyn BlockDevice), (&expected, device)] {
        for range in Allocated::new(side, ByteRange { start: 0, end: side.size() }) {
            let range = range.unwrap();
            let mut at = range.start;
            while at < range.end {
                let length = (range.end - at).min(1 << 20) as usize;
                let (mut a, mut b) = (vec![0; length], vec![0; length]);
                side.read_at(at, &mut a).unwrap();
                let there = (other.size().saturating_sub(at)).min(length as u64) as usize;
                if there > 0 {
                    other.read_at(at, &mut b[..there]).unwrap();
                }
                assert!(a == b, "bytes {at}..+{length} differ");
                at += length as u64;
            }
        }
    }
}

/// Sizes that are and are not a product of cylinders, heads and sectors; small ones, and ones past the geometry.
const SIZES: [u64; 7] =
    [1 << 20, 3 * (1 << 20) - 512, (10 << 20) + 512, 4 * 17 * 512 * 100, 100 << 20, 8 << 30, 140 << 30];

fn open(path: &Path) -> Reader {
    Reader::open(Arc::new(FileDevice::open(path).unwrap()), &NoParents).unwrap()
}

/// QEMU reads and writes every byte of a fixed disk, holes or not.
const MAX_FIXED: u64 = 100 << 20;

#[test]
fn images_of_qemu_read_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mut rounded = 0;
    for size in SIZES {
        let raw = raw_disk(folder.path(), size);
        for subformat in ["fixed", "dynamic"] {
            if subformat == "fixed" && size > MAX_FIXED {
                continue;
            }
            for force_size in ["on", "off"] {
                let path = folder.path().join("image.vhd");
                let options = format!("subformat={subformat},force_size={force_size}");
                run(
                    "qemu-img",
                    &["convert", "-q", "-f", "raw", "-O", "vpc", "-o", &options, text(&raw), text(&path)],
                );
                let reader = open(&path);
                let what = format!("{size} {options}");
                let word = if subformat == "fixed" { Kind::Fixed } else { Kind::Dynamic };
                assert_eq!(reader.info().kind, word, "{what}");
                let info = run("qemu-img", &["info", "--output=json", "-f", "vpc", text(&path)]);
                let info: serde_json::Value = serde_json::from_str(&info).unwrap();
                assert_eq!(info["virtual-size"], reader.size(), "{what}");
                if force_size == "on" {
                    assert_eq!(reader.size(), size, "{what}");
                }
                rounded += u32::from(reader.info().size_rule == SizeRule::Geometry && reader.size() != size);
                same(&reader, &raw);
                mapped_the_same(&reader, &path, &what);
                std::fs::remove_file(&path).unwrap();
            }
        }
        std::fs::remove_file(&raw).unwrap();
    }
    assert!(rounded >= 4, "sizes must be among these that the geometry rounds");
}

/// What we call allocated, QEMU calls data; what QEMU calls data and we do not, is zeros.
fn mapped_the_same(reader: &Reader, path: &Path, what: &str) {
    let map = run("qemu-img", &["map", "--output=json", "-f", "vpc", text(path)]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data: model::RangeSet = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == true)
        .map(|extent| {
            let start = extent["start"].as_u64().unwrap();
            ByteRange { start, end: start + extent["length"].as_u64().unwrap() }
        })
        .collect();
    let ours: model::RangeSet =
        reader.allocated(ByteRange { start: 0, end: reader.size() }).map(|range| range.unwrap()).collect();
    let more = ours.difference(&data);
    assert!(more.is_empty(), "{what}: allocated here, not in qemu: {more:?}");
    for range in data.difference(&ours).iter() {
        // Of a fixed disk QEMU calls everything data; both ends of each hole will do, `same` reads the rest.
        let length = range.len().min(1 << 20);
        for at in [range.start, range.end - length] {
            let mut bytes = vec![1; length as usize];
            reader.read_at(at, &mut bytes).unwrap();
            assert!(bytes.iter().all(|&byte| byte == 0), "{what}: data left out at {range:?}");
        }
    }
}

fn fill(writer: &Writer, raw: &Path) {
    let source = FileDevice::open(raw).unwrap();
    for range in source.allocated(ByteRange { start: 0, end: source.size() }) {
        let range = range.unwrap();
        let mut bytes = vec![0; range.len() as usize];
        source.read_at(range.start, &mut bytes).unwrap();
        writer.write_at(range.start, &bytes).unwrap();
    }
    writer.flush().unwrap();
}

#[test]
fn qemu_reads_our_images_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for size in SIZES.into_iter().chain([2040 << 30]) {
        let raw = raw_disk(folder.path(), size);
        for options in [CreateOptions::fixed(size, ID), CreateOptions::dynamic(size, ID)] {
            if options.kind == Kind::Fixed && size > MAX_FIXED {
                continue;
            }
            let path = folder.path().join("image.vhd");
            let writer = Writer::create(Arc::new(DiskFile::create(&path).unwrap()), &options).unwrap();
            fill(&writer, &raw);
            drop(writer);
            let info = run("qemu-img", &["info", "--output=json", "-f", "vpc", text(&path)]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], size, "exactly the size, {options:?}");
            run("qemu-img", &["compare", "-q", "-f", "vpc", "-F", "raw", text(&path), text(&raw)]);
            let reader = open(&path);
            same(&reader, &raw);
            mapped_the_same(&reader, &path, &format!("{options:?}"));
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::remove_file(&raw).unwrap();
    }
}

#[test]
fn qemu_and_we_write_on_in_each_others_images() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    let raw = folder.path().join("expected.raw");
    let size: u64 = 20 << 20;
    File::create(&raw).unwrap().set_len(size).unwrap();
    let writer =
        Writer::create(Arc::new(DiskFile::create(&path).unwrap()), &CreateOptions::dynamic(size, ID))
            .unwrap();
    writer.write_at(5 << 20, &[0x11; 70_000]).unwrap();
    writer.flush().unwrap();
    drop(writer);
    run("qemu-io", &["-f", "raw", "-c", &format!("write -P 0x11 {} 70000", 5 << 20), text(&raw)]);
    for (path, format) in [(&path, "vpc"), (&raw, "raw")] {
        run(
            "qemu-io",
            &[
                "-f",
                format,
                "-c",
                "write -P 0x22 1048576 65536",
                "-c",
                "write -P 0x33 15728640 512",
                text(path),
            ],
        );
    }
    same(&open(&path), &raw);
    let writer = Writer::open(Arc::new(DiskFile::open(&path).unwrap()), &NoParents).unwrap();
    writer.write_at(9 << 20, &[0x44; 4096]).unwrap();
    writer.write_at(1_048_576, &[0x55; 512]).unwrap();
    writer.write_zeros(ByteRange { start: 5 << 20, end: (5 << 20) + 4096 }).unwrap();
    writer.flush().unwrap();
    for command in ["write -P 0x44 9437184 4096", "write -P 0x55 1048576 512", "write -P 0 5242880 4096"] {
        run("qemu-io", &["-f", "raw", "-c", command, text(&raw)]);
    }
    same(&open(&path), &raw);
    run("qemu-img", &["compare", "-q", "-f", "vpc", "-F", "raw", text(&path), text(&raw)]);
}

/// QEMU opens what a crash left without the footer at its end.
#[test]
fn qemu_opens_an_image_whose_last_footer_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    let writer =
        Writer::create(Arc::new(DiskFile::create(&path).unwrap()), &CreateOptions::dynamic(8 << 20, ID))
            .unwrap();
    writer.write_at(0, &[9; 4096]).unwrap();
    writer.flush().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - 512).unwrap();
    file.set_len(length + (2 << 20)).unwrap();
    run("qemu-io", &["-f", "vpc", "-r", "-c", "read -P 9 0 4096", text(&path)]);
    assert_eq!(open(&path).size(), 8 << 20);
}

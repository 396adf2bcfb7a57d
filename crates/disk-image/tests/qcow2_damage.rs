//! Damaged and hostile images: the fixtures, each named by what is wrong (recipe: `fixtures/qcow2/make.py`), and flipped
//! bits over all tables of small images.
#![allow(clippy::unwrap_used)]

mod qcow2_common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block_io::{DeviceError, MemoryDevice, MemoryFile};
use disk_image::qcow2::{CreateOptions, Info, Reader, Writer};
use disk_image::{BlockDevice, ImageError, NoParents, WritableDevice};
use qcow2_common::{bytes, ranges};

fn fixtures() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("fixtures/qcow2")
}

fn open(name: &str) -> Result<Reader, ImageError> {
    qcow2_common::open(&fixtures(), &format!("{name}.qcow2"))
}

/// What an image is refused as.
#[derive(Clone, Copy, PartialEq, Debug)]
enum As {
    NotThisFormat,
    Damaged(&'static str),
    Unsupported,
    NotAllowed,
}

#[test]
fn refused_at_opening_under_the_right_name() {
    let expected = [
        ("magic-wrong", As::NotThisFormat, "magic"),
        ("header-cut-off", As::Damaged("header"), "ends after 71 bytes"),
        ("header-v3-cut-off", As::Damaged("header"), "ends after 100 bytes"),
        ("version-4", As::Unsupported, "version 4"),
        ("cluster-bits-8", As::Damaged("header"), "cluster_bits is 8"),
        ("cluster-bits-22", As::Unsupported, "2^22"),
        ("size-2-to-the-63", As::Damaged("header"), "less than 2^63"),
        ("size-larger-than-l1", As::Damaged("header"), "needs"),
        ("encrypted-aes", As::Unsupported, "encryption (AES)"),
        ("encrypted-luks", As::Unsupported, "encryption (LUKS)"),
        ("l1-too-short", As::Damaged("header"), "l1_size is 1"),
        ("l1-larger-than-32-mib", As::Damaged("header"), "32 MiB"),
        ("l1-past-end", As::Damaged("L1 table"), "the file ends at"),
        ("l1-offset-near-2-to-the-64", As::Damaged("L1 table"), "the file ends at"),
        ("l1-not-aligned", As::Damaged("header"), "multiple of a cluster"),
        ("header-length-105", As::Damaged("header"), "header_length is 105"),
        ("header-length-past-cluster", As::Damaged("header"), "header_length is 520"),
        ("refcount-order-7", As::Damaged("header"), "refcount_order is 7"),
        ("data-file-bit", As::NotAllowed, "external data file"),
        ("compression-bit-without-type", As::Damaged("header"), "compression_type is 0"),
        ("compression-type-2", As::Unsupported, "compression type 2"),
        ("compression-type-without-bit", As::Damaged("header"), "compression_type is 1"),
        ("extended-l2-small-clusters", As::Damaged("header"), "14 or more"),
        ("unknown-feature-without-name", As::Unsupported, "bit 40"),
        ("unknown-feature-with-name", As::Unsupported, "time travel"),
        ("extension-past-end", As::Damaged("header extension"), "passes the end"),
        ("l1-entry-reserved-bits", As::Damaged("L1 table entry"), "reserved bits"),
        ("l1-entry-past-end", As::Damaged("L1 table entry"), "the file ends at"),
        ("l1-entry-offset-0-copied", As::Damaged("L1 table entry"), "offset 0"),
        ("l1-entries-share-a-table", As::Damaged("L1 table entry"), "also that of"),
        ("backing-unstated-raw-with-qcow2-magic", As::Unsupported, "without a stated format"),
        ("backing-loop", As::Unsupported, "loop"),
        ("backing-outside", As::NotAllowed, "/etc/passwd"),
        ("backing-above", As::NotAllowed, "../make.py"),
        ("backing-nbd", As::Unsupported, "nbd"),
        ("backing-json", As::Unsupported, "json"),
        ("backing-vmdk", As::Unsupported, "vmdk"),
        ("backing-name-past-cluster", As::Damaged("header"), "first cluster"),
        ("backing-name-of-4-gib", As::Damaged("header"), "first cluster"),
        ("backing-name-not-text", As::Unsupported, "UTF-8"),
    ];
    for (name, kind, says) in expected {
        let error = open(name).err().unwrap_or_else(|| panic!("{name} was opened"));
        let found = match &error {
            ImageError::NotThisFormat { .. } => As::NotThisFormat,
            ImageError::Damaged { structure, .. } => As::Damaged(structure),
            ImageError::Unsupported { .. } => As::Unsupported,
            ImageError::NotAllowed { .. } => As::NotAllowed,
            _ => panic!("{name}: {error}"),
        };
        assert_eq!(found, kind, "{name}: {error}");
        assert!(error.to_string().contains(says), "{name}: {error}");
    }
}

#[test]
fn damage_of_one_cluster_leaves_the_rest_readable() {
    let good = bytes(&open("good-v3").unwrap());
    for (name, says) in [
        ("l2-entry-reserved-bits", "reserved bits"),
        ("l2-entry-past-end", "the file ends at"),
        ("l2-entry-at-2-to-the-55", "the file ends at"),
        ("l2-entry-offset-0-copied", "offset 0"),
        ("zero-flag-in-v2", "reserved bits"),
        ("compressed-past-end", "the file ends at"),
        ("compressed-in-header", "cannot hold"),
        ("compressed-copied", "bit 63"),
        ("compressed-garbage", "deflate"),
        ("compressed-too-short", "511 bytes"),
        ("compressed-zstd-window-of-2-gib", "zstd"),
    ] {
        let reader = open(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let error = reader.read_at(0, &mut [0; 512]).unwrap_err();
        assert!(matches!(error, DeviceError::Damaged { offset: 0, length: 512, .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(says), "{name}: {error}");
        let mut rest = vec![0u8; 1 << 16];
        reader.read_at(512, &mut rest).unwrap();
        let known = if name == "zero-flag-in-v2" { bytes(&open("good-v2").unwrap()) } else { good.clone() };
        assert!(rest == known[512..512 + rest.len()], "{name}");
    }
}

#[test]
fn what_is_strange_and_right_is_read() {
    let mut cluster = [0u8; 512];
    open("compressed-good").unwrap().read_at(0, &mut cluster).unwrap();
    assert!(cluster.starts_with(b"still water still") && cluster.ends_with(b"deepdeep"));
    // Output stops at a cluster, however much the stream has.
    open("compressed-bomb").unwrap().read_at(0, &mut cluster).unwrap();
    assert_eq!(cluster, [0; 512]);
    open("compressed-zstd-good").unwrap().read_at(0, &mut cluster).unwrap();
    assert_eq!(cluster, [b'z'; 512]);

    let corrupt = open("corrupt-bit").unwrap();
    assert!(corrupt.info().corrupt);
    assert!(bytes(&corrupt) == bytes(&open("good-v3").unwrap()));

    let backing = open("backing-unstated-qcow2").unwrap();
    assert_eq!(bytes(&backing), vec![1; 4096]);
    // Stated raw stays raw: the guest sees its own header, and nothing that this header would refer to.
    let raw = open("backing-stated-raw-with-qcow2-magic").unwrap();
    assert!(bytes(&raw).starts_with(b"QFI\xfb"));
}

#[test]
fn a_backing_file_is_refused_unless_the_caller_allows_it() {
    let file = block_io::FileDevice::open(&fixtures().join("backing-unstated-qcow2.qcow2")).unwrap();
    assert_eq!(Info::read(&file).unwrap().backing.unwrap().name, "good-v3.qcow2");
    let error = Reader::open(Arc::new(file), &NoParents).err().unwrap();
    assert!(matches!(error, ImageError::NotAllowed { .. }), "{error}");
}

#[test]
fn a_writer_refuses_every_damaged_image_and_changes_nothing() {
    let mut tried = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        // No table of these is wrong; they have what a writer does not keep, or a backing file that it refuses.
        if path.extension().is_none_or(|extension| extension != "qcow2") || name == "good-v3" {
            continue;
        }
        let before = std::fs::read(&path).unwrap();
        let file = Arc::new(MemoryFile::new(before.clone()));
        assert!(Writer::open(file.clone()).is_err(), "{name} was opened for writing");
        assert!(file.to_vec() == before, "{name} was changed");
        tried += 1;
    }
    assert!(tried > 50, "only {tried} fixtures found");
}

/// Opens, reads all and walks the allocated ranges of an image; any error is right, anything else is not.
fn survive(image: Vec<u8>) -> bool {
    let Ok(reader) = Reader::open(Arc::new(MemoryDevice::new(image)), &NoParents) else { return false };
    // A flipped size may make the disk large and sparse: its ends and its ranges are enough.
    let size = reader.size();
    let part = size.min(1 << 20) as usize;
    let mut good = reader.read_at(0, &mut vec![0u8; part]).is_ok();
    good &= reader.read_at(size - part as u64, &mut vec![0u8; part]).is_ok();
    let mut at = 0;
    for _ in 0..100_000 {
        match reader.next_allocated(at) {
            Ok(Some(range)) => {
                assert!(range.start >= at && range.start < range.end && range.end <= size, "{range:?}");
                at = range.end;
            }
            Ok(None) => return good,
            Err(_) => return false,
        }
    }
    panic!("the allocated ranges of a disk of {size} bytes do not end");
}

#[test]
fn flipped_bits_never_panic_or_loop_and_memory_stays_small() {
    let small = |name: &str| std::fs::read(fixtures().join(format!("{name}.qcow2"))).unwrap();
    let (mut refused, mut tried) = (0, 0);
    for image in [small("good-v3"), small("good-v2"), small("compressed-good"), small("compressed-zstd-good")]
    {
        // Every bit of every cluster that is not just one byte repeated: header, all tables, compressed data.
        let told: Vec<bool> =
            image.chunks(512).map(|cluster| cluster.iter().any(|&b| b != cluster[0])).collect();
        for bit in (0..image.len() * 8).filter(|bit| told[bit / 8 / 512]) {
            let mut flipped = image.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused += u32::from(!survive(flipped.clone()));
            tried += 1;
            // A writer that accepts it must be able to go on.
            if bit % 3 == 0
                && let Ok(writer) = Writer::open(Arc::new(MemoryFile::new(flipped)))
                && writer.size() <= 1 << 20
            {
                writer.write_at(0, &vec![9; writer.size() as usize]).ok();
                writer.flush().ok();
            }
        }
    }
    assert!(refused > 1000 && refused < tried, "{refused} of {tried} were refused");
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if let Some(peak) = status.lines().find_map(|line| line.strip_prefix("VmHWM:")) {
        let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(kib < 200 << 10, "{kib} KiB were used");
    }
}

#[test]
fn a_truncated_image_errors_where_bytes_are_missing() {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create(file.clone(), CreateOptions { size: 1 << 20, cluster_bits: 12 }).unwrap();
    let content: Vec<u8> = (0..1u32 << 20).map(|at| (at / 7) as u8 | 1).collect();
    writer.write_at(0, &content).unwrap();
    writer.flush().unwrap();
    let whole = file.to_vec();
    for keep in (0..whole.len()).step_by(5003) {
        let Ok(reader) = Reader::open(Arc::new(MemoryDevice::new(whole[..keep].to_vec())), &NoParents) else {
            continue;
        };
        for at in (0..1 << 20).step_by(4096) {
            let mut cluster = [0u8; 4096];
            match reader.read_at(at as u64, &mut cluster) {
                Ok(()) => {
                    assert!(cluster == content[at..at + 4096], "{keep} bytes kept: wrong bytes at {at}")
                }
                Err(error) => assert!(matches!(error, DeviceError::Damaged { .. }), "{error}"),
            }
        }
        assert_eq!(ranges(&reader).len(), 1, "what is missing is still allocated");
    }
}

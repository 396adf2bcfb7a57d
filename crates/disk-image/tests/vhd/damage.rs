//! Damaged and hostile images, named by what is wrong.
//!
//! Each is made by its recipe below and kept as `fixtures/vhd/NAME.vhd`; `UPDATE_FIXTURES=1` writes them anew.

use std::path::Path;
use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, DeviceError, MemoryDevice, MemoryFile};
use disk_image::NoParents;
use disk_image::vhd::{CreateOptions, ParentLink, Reader, Writer};

use crate::{ID, image_of, open, read_all, small};

const SIZE: u64 = 16_384;
const HEADER: usize = 512;
const TABLE: usize = 1536;

fn content() -> Vec<u8> {
    (0..SIZE as usize).map(|at| if (4096..8192).contains(&at) { 0 } else { (at % 251) as u8 + 1 }).collect()
}

fn dynamic() -> Vec<u8> {
    image_of(&content(), &small(SIZE, 4096))
}

fn fixed() -> Vec<u8> {
    image_of(&content(), &CreateOptions::fixed(SIZE, ID))
}

fn child() -> Vec<u8> {
    let file = Arc::new(MemoryFile::default());
    let link = ParentLink {
        disk: Arc::new(MemoryDevice::new(content())),
        unique_id: ID,
        time_stamp: 0,
        relative_name: "base.vhd".to_owned(),
        absolute_name: None,
    };
    Writer::create_child(file.clone(), &small(SIZE, 4096), link).unwrap();
    file.to_vec()
}

fn seal(structure: &mut [u8], field: usize) {
    structure[field..field + 4].fill(0);
    let sum = !structure.iter().fold(0u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    structure[field..field + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Changes both footers and keeps their checksums right.
fn footers(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    let last = image.len() - 512;
    for footer in [0, last] {
        if image[footer..].starts_with(b"conectix") {
            image[footer + at..footer + at + bytes.len()].copy_from_slice(bytes);
            seal(&mut image[footer..footer + 512], 64);
        }
    }
    image
}

fn header(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[HEADER + at..HEADER + at + bytes.len()].copy_from_slice(bytes);
    seal(&mut image[HEADER..HEADER + 1024], 36);
    image
}

fn entry(mut image: Vec<u8>, block: usize, entry: u32) -> Vec<u8> {
    image[TABLE + block * 4..TABLE + block * 4 + 4].copy_from_slice(&entry.to_be_bytes());
    image
}

fn flip(mut image: Vec<u8>, at: usize) -> Vec<u8> {
    image[at] ^= 0x40;
    image
}

fn from_end(image: Vec<u8>, at: usize) -> Vec<u8> {
    let last = image.len() - 512 + at;
    flip(image, last)
}

enum Expect {
    /// Opening fails with this text.
    Refused(&'static str),
    /// It opens, and all of the disk is right.
    Whole,
    /// It opens, and reading fails with this text at this byte of the disk, while block 3 is right.
    Hurt(&'static str, u64),
}
use Expect::{Hurt, Refused, Whole};

fn cases() -> Vec<(&'static str, Vec<u8>, Expect)> {
    let cut = |mut image: Vec<u8>, bytes: usize| {
        image.truncate(image.len() - bytes);
        image
    };
    let swapped = {
        let mut image = dynamic();
        let shared: [u8; 4] = image[TABLE..TABLE + 4].try_into().unwrap();
        image[TABLE + 4..TABLE + 8].copy_from_slice(&shared);
        image
    };
    vec![
        ("dynamic-good", dynamic(), Whole),
        ("fixed-good", fixed(), Whole),
        ("dynamic-footer-at-end-cut-off", cut(dynamic(), 512), Whole),
        ("dynamic-footer-at-end-wrong-checksum", from_end(dynamic(), 300), Whole),
        ("dynamic-footer-at-end-wrong-cookie", from_end(dynamic(), 0), Whole),
        ("dynamic-footer-copy-wrong-checksum", flip(dynamic(), 300), Whole),
        ("dynamic-both-footers-wrong-checksum", flip(from_end(dynamic(), 300), 300), Refused("checksum")),
        ("dynamic-both-footers-gone", flip(from_end(dynamic(), 0), 0), Refused("no cookie")),
        ("fixed-footer-wrong-checksum", from_end(fixed(), 300), Refused("checksum")),
        ("fixed-footer-gone", from_end(fixed(), 0), Refused("no cookie")),
        (
            "fixed-shorter-than-its-disk",
            footers(fixed(), 48, &(SIZE + 512).to_be_bytes()),
            Refused("only 16384 lie"),
        ),
        ("footer-disk-type-deprecated", footers(dynamic(), 60, &[0, 0, 0, 6]), Refused("Disk Type 6")),
        ("footer-version-2", footers(dynamic(), 12, &[0, 2, 0, 0]), Refused("File Format Version 2.0")),
        ("footer-size-zero", footers(dynamic(), 48, &[0; 8]), Refused("a disk of 0 bytes")),
        ("footer-size-broken-sector", footers(dynamic(), 48, &1025u64.to_be_bytes()), Refused("1025 bytes")),
        (
            "footer-size-past-2040-gib",
            footers(dynamic(), 48, &((2040u64 << 30) + 512).to_be_bytes()),
            Refused("at most 2190433320960"),
        ),
        (
            "footer-data-offset-outside",
            footers(dynamic(), 16, &[0xFF; 8]),
            Refused("points outside the file"),
        ),
        ("header-wrong-cookie", flip(dynamic(), HEADER), Refused("cxsparse")),
        (
            "header-wrong-checksum",
            flip(dynamic(), HEADER + 100),
            Refused("Dynamic Disk Header at byte 512: checksum"),
        ),
        ("header-version-2", header(dynamic(), 24, &[0, 2, 0, 0]), Refused("Header Version 2.0")),
        ("header-block-size-zero", header(dynamic(), 32, &[0; 4]), Refused("Block Size 0")),
        (
            "header-block-size-not-a-power-of-two",
            header(dynamic(), 32, &5120u32.to_be_bytes()),
            Refused("Block Size"),
        ),
        ("header-block-size-256", header(dynamic(), 32, &256u32.to_be_bytes()), Refused("Block Size 256")),
        ("header-too-few-entries", header(dynamic(), 28, &3u32.to_be_bytes()), Refused("need 4")),
        ("header-table-outside", header(dynamic(), 16, &[0xFF; 8]), Refused("outside the file")),
        (
            "header-table-larger-than-the-file",
            footers(header(dynamic(), 28, &[0xFF; 4]), 48, &(2040u64 << 30).to_be_bytes()),
            Refused("534773760 entries end outside"),
        ),
        ("table-entry-past-the-end", entry(dynamic(), 0, 0xFFFF_FFFE), Hurt("block 0 ends at byte", 0)),
        ("table-entry-into-the-footer", entry(dynamic(), 0, 0), Hurt("overlaps footer, header or table", 0)),
        ("table-entry-into-the-header", entry(dynamic(), 0, 2), Hurt("overlaps footer, header or table", 0)),
        ("table-entry-into-the-table", entry(dynamic(), 2, 3), Hurt("block 2 begins at byte 1536", 8192)),
        ("table-two-blocks-at-one-place", swapped, Refused("two blocks overlap")),
        (
            "child-without-names",
            header(header(child(), 64, &[0; 512]), 576, &[0; 192]),
            Refused("names no parent"),
        ),
        (
            "child-locator-outside",
            header(child(), 576 + 16, &[0xFF; 8]),
            Refused("\"base.vhd\", which is not allowed"),
        ),
        ("shorter-than-a-footer", vec![0x63; 100], Refused("less than a footer")),
        ("empty", Vec::new(), Refused("less than a footer")),
    ]
}

#[test]
fn damage_is_named() {
    for (name, image, expect) in cases() {
        let opened = open(image.clone());
        match expect {
            Whole => assert!(read_all(&opened.unwrap()) == content(), "{name}: wrong bytes"),
            Refused(text) if text.starts_with("two blocks") => {
                // A reader reads what the table says; a writer would write one block over the other.
                assert!(opened.is_ok());
                let error = Writer::open(Arc::new(MemoryFile::new(image)), &NoParents).err().unwrap();
                assert!(error.to_string().contains(text), "{name}: {error}");
            }
            Refused(text) => {
                let error = opened.err().unwrap_or_else(|| panic!("{name}: opened"));
                assert!(error.to_string().contains(text), "{name}: {error}");
                assert!(Writer::open(Arc::new(MemoryFile::new(image)), &NoParents).is_err(), "{name}");
            }
            Hurt(text, at) => {
                let reader = opened.unwrap();
                let error = reader.read_at(at, &mut [0; 512]).unwrap_err();
                assert!(error.to_string().contains(text), "{name}: {error}");
                let DeviceError::Damaged { offset, length, .. } = error else { panic!("{name}: {error}") };
                assert_eq!((offset, length), (at, 4096), "{name}");
                let mut last = vec![0; 4096];
                reader.read_at(12_288, &mut last).unwrap();
                assert_eq!(last, content()[12_288..], "{name}: the rest is good");
                assert!(reader.next_allocated(at).is_err(), "{name}: damage is no hole");
            }
        }
    }
}

#[test]
fn the_fixtures_are_those_of_the_recipe() {
    let folder = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("fixtures/vhd");
    for (name, image, _) in cases() {
        let path = folder.join(format!("{name}.vhd"));
        if std::env::var_os("UPDATE_FIXTURES").is_some() {
            std::fs::write(&path, &image).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == image, "{}", path.display());
    }
}

/// Reads and walks all of a disk; only errors are allowed to come of it.
fn use_all(image: Vec<u8>) {
    if let Ok(reader) = open(image.clone()) {
        let size = reader.size();
        let mut buf = vec![0; 4096];
        for at in (0..size.min(1 << 20)).step_by(4096) {
            let length = (size - at).min(4096) as usize;
            let _ = reader.read_at(at, &mut buf[..length]);
        }
        let mut at = 0;
        for _ in 0..100 {
            match reader.next_allocated(at) {
                Ok(Some(ByteRange { start, end })) => {
                    assert!(at <= start && start < end && end <= size);
                    at = end;
                }
                _ => break,
            }
        }
    }
    if let Ok(writer) = Writer::open(Arc::new(MemoryFile::new(image)), &NoParents) {
        use block_io::WritableDevice;
        let _ = writer.write_at(0, &[1; 100]);
        let _ = writer.write_at(writer.size() - 1, &[1]);
        let _ = writer.flush();
    }
}

#[test]
fn no_flipped_bit_makes_it_panic() {
    for image in [dynamic(), fixed(), child()] {
        let places: Vec<usize> = (0..image.len().min(2560)).chain(image.len() - 512..image.len()).collect();
        for at in places {
            for bit in 0..8 {
                let mut hurt = image.clone();
                hurt[at] ^= 1 << bit;
                use_all(hurt);
            }
        }
    }
}

/// The same with checksums that are right, so that every field is reached.
#[test]
fn no_sealed_lie_makes_it_panic() {
    for image in [dynamic(), fixed(), child()] {
        for value in [0u32, 1, 2, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF, 0x0001_0000] {
            for at in (8..88).step_by(4).filter(|&at| at != 64) {
                use_all(footers(image.clone(), at, &value.to_be_bytes()));
            }
            for at in (8..768).step_by(4).filter(|&at| at != 36) {
                use_all(header(image.clone(), at, &value.to_be_bytes()));
            }
            for block in 0..4 {
                use_all(entry(image.clone(), block, value));
            }
        }
    }
}

/// A file that claims the largest disk in the smallest blocks is walked with the memory of the cache.
#[test]
fn the_largest_claim_is_walked_in_bounded_memory() {
    struct Ones(Vec<u8>, u64);
    impl BlockDevice for Ones {
        fn size(&self) -> u64 {
            self.1
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
            assert!(buf.len() <= 4096, "one step asks for {} bytes", buf.len());
            DeviceError::check_bounds(offset, buf.len() as u64, self.1)?;
            for (at, byte) in (offset..).zip(buf) {
                *byte = self.0.get(at as usize).copied().unwrap_or(0xFF);
            }
            Ok(())
        }
        fn next_allocated(&self, _from: u64) -> Result<Option<ByteRange>, DeviceError> {
            Ok(None)
        }
    }
    let size = 2040u64 << 30;
    let mut image = footers(dynamic(), 48, &size.to_be_bytes());
    image = header(header(image, 28, &[0xFF; 4]), 32, &512u32.to_be_bytes());
    image.truncate(TABLE);
    let file = Ones(image, TABLE as u64 + size / 512 * 4);
    let reader = Reader::open(Arc::new(file), &NoParents).unwrap();
    assert_eq!(reader.size(), size);
    reader.read_at(size - 512, &mut [0; 512]).unwrap();
    assert_eq!(reader.next_allocated(size - (1 << 20)).unwrap(), None);
}

//! Damage by name, each with the error it must give; and damage everywhere, which must never panic.

use std::sync::Arc;

use block_io::{BlockDevice, DeviceError};
use disk_image::vhdx::{CreateKind, Reader, Writer};
use disk_image::{ImageError, ImageFormat, MAX_CHAIN};

use crate::support::*;

fn good() -> Vec<u8> {
    image(options(4 * MIB, CreateKind::Dynamic), &[(0, &[1; 512]), (2 * MIB, &[2; 512])])
}

/// Damages a good image and says what must come of it.
fn damaged(structure: &str, wanted: &str, damage: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = good();
    damage(&mut bytes);
    match refused(&bytes) {
        ImageError::Damaged { format: ImageFormat::Vhdx, structure: found, reason, .. } => {
            assert_eq!(found, structure, "{reason}");
            assert!(reason.contains(wanted), "{reason}");
        }
        other => panic!("expected damage of {structure}, found {other}"),
    }
}

fn unsupported(wanted: &str, damage: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = good();
    damage(&mut bytes);
    match refused(&bytes) {
        ImageError::Unsupported { feature, .. } => assert!(feature.contains(wanted), "{feature}"),
        other => panic!("expected something unsupported, found {other}"),
    }
}

fn in_headers(bytes: &mut [u8], at: u64, what: &[u8]) {
    for header in HEADERS {
        put(bytes, header + at, what);
        reseal(bytes, header, 4096);
    }
}

fn in_region_tables(bytes: &mut [u8], at: u64, what: &[u8]) {
    for table in REGION_TABLES {
        put(bytes, table + at, what);
        reseal(bytes, table, 65_536);
    }
}

#[test]
fn file_type_identifier() {
    for bytes in [vec![], vec![0; 100], vec![0; 3 << 20], b"vhdxfilx".repeat(200_000)] {
        assert!(matches!(refused(&bytes), ImageError::NotThisFormat { .. }));
    }
    damaged("file", "cut off", |bytes| bytes.truncate(70_000));
}

#[test]
fn one_header_damaged_the_other_is_used() {
    for (slot, header) in HEADERS.into_iter().enumerate() {
        for at in [0, 4, 8, 100] {
            let mut bytes = good();
            bytes[(header + at) as usize] ^= 0x40;
            let reader = open(&bytes).unwrap_or_else(|error| panic!("header {slot}, byte {at}: {error}"));
            assert_eq!(read_all(&reader)[..512], [1; 512]);
        }
    }
}

#[test]
fn headers() {
    damaged("header", "neither header is valid", |bytes| {
        for at in HEADERS {
            bytes[at as usize + 200] ^= 1;
        }
    });
    damaged("header", "sequence number 9 and differ", |bytes| {
        in_headers(bytes, 8, &9u64.to_le_bytes());
        put(bytes, HEADERS[0] + 16, &[0x55; 16]);
        reseal(bytes, HEADERS[0], 4096);
    });
    unsupported("version 2", |bytes| in_headers(bytes, 66, &2u16.to_le_bytes()));
    damaged("header", "multiples of 1 MiB", |bytes| in_headers(bytes, 72, &4096u64.to_le_bytes()));
    damaged("header", "outside the file", |bytes| in_headers(bytes, 72, &(1u64 << 50).to_le_bytes()));
    damaged("header", "outside the file", |bytes| in_headers(bytes, 72, &0u64.to_le_bytes()));
    damaged("header", "outside the file", |bytes| in_headers(bytes, 72, &(u64::MAX << 20).to_le_bytes()));
    damaged("header", "has no bytes", |bytes| {
        in_headers(bytes, 68, &0u32.to_le_bytes());
        in_headers(bytes, 48, &[9; 16]);
    });
    // Two equal headers, as some makers write them.
    let mut bytes = good();
    let header = bytes[HEADERS[0] as usize..][..4096].to_vec();
    put(&mut bytes, HEADERS[1], &header);
    assert!(open(&bytes).is_ok());
}

#[test]
fn region_tables() {
    for table in REGION_TABLES {
        let mut bytes = good();
        bytes[table as usize + 40_000] ^= 1;
        assert!(open(&bytes).is_ok(), "one copy is enough");
    }
    damaged("region table", "checksum", |bytes| {
        for table in REGION_TABLES {
            bytes[table as usize + 40_000] ^= 1;
        }
    });
    damaged("region table", "valid and differ", |bytes| {
        put(bytes, REGION_TABLES[1] + 16 + 24, &(2u32 << 20).to_le_bytes());
        reseal(bytes, REGION_TABLES[1], 65_536);
    });
    damaged("region table", "2048 entries", |bytes| in_region_tables(bytes, 8, &2048u32.to_le_bytes()));
    damaged("region table", "no metadata region", |bytes| in_region_tables(bytes, 8, &1u32.to_le_bytes()));
    damaged("region table", "no BAT region", |bytes| in_region_tables(bytes, 8, &0u32.to_le_bytes()));
    damaged("region table", "expected multiples", |bytes| {
        in_region_tables(bytes, 16 + 16, &512u64.to_le_bytes())
    });
    damaged("region table", "expected multiples", |bytes| {
        in_region_tables(bytes, 16 + 16, &0u64.to_le_bytes())
    });
    damaged("region table", "expected multiples", |bytes| {
        in_region_tables(bytes, 16 + 16, &(u64::MAX << 20).to_le_bytes());
    });
    damaged("region table", "overlap", |bytes| in_region_tables(bytes, 16 + 16, &METADATA.to_le_bytes()));
    damaged("region table", "overlap", |bytes| in_region_tables(bytes, 16 + 16, &LOG.to_le_bytes()));
    damaged("BAT", "the file has", |bytes| in_region_tables(bytes, 16 + 16, &(1u64 << 50).to_le_bytes()));
    damaged("metadata table", "the file has", |bytes| {
        in_region_tables(bytes, 48 + 16, &(1u64 << 50).to_le_bytes());
    });
    let region = |required: u32| {
        move |bytes: &mut Vec<u8>| {
            in_region_tables(bytes, 8, &3u32.to_le_bytes());
            in_region_tables(bytes, 80, &[0xAB; 16]);
            in_region_tables(bytes, 96, &(100 * MIB).to_le_bytes());
            in_region_tables(bytes, 104, &(MIB as u32).to_le_bytes());
            in_region_tables(bytes, 108, &required.to_le_bytes());
        }
    };
    unsupported("required region {abababab-abab-abab-abab-abababababab}", region(1));
    let mut optional = good();
    region(0)(&mut optional);
    assert!(open(&optional).is_ok(), "an unknown region that is not required is left alone");
}

/// Our writer's metadata items, in this order.
fn entry(index: u64) -> u64 {
    METADATA + 32 + index * 32
}

#[test]
fn metadata() {
    const ITEMS: u64 = METADATA + 65_536;
    damaged("metadata table", "signature", |bytes| put(bytes, METADATA, b"Metadata"));
    damaged("metadata table", "60000 entries", |bytes| put(bytes, METADATA + 10, &60_000u16.to_le_bytes()));
    for offset in [0u32, 100, 65_535, 1 << 20, u32::MAX, u32::MAX - 7] {
        damaged("metadata table", "does not lie in the region", |bytes| {
            put(bytes, entry(1) + 16, &offset.to_le_bytes());
        });
    }
    for length in [2u32 << 20, u32::MAX] {
        damaged("metadata table", "does not lie in the region", |bytes| {
            put(bytes, entry(1) + 20, &length.to_le_bytes());
        });
    }
    damaged("metadata table", "overlap", |bytes| put(bytes, entry(1) + 16, &65_540u32.to_le_bytes()));
    damaged("virtual disk size", "4 bytes, expected 8", |bytes| {
        put(bytes, entry(1) + 20, &4u32.to_le_bytes())
    });
    damaged("metadata table", "listed twice", |bytes| {
        let first: Vec<u8> = bytes[entry(0) as usize..][..16].to_vec();
        put(bytes, entry(1), &first);
    });
    damaged("metadata table", "is missing", |bytes| put(bytes, METADATA + 10, &4u16.to_le_bytes()));
    unsupported("required metadata item", |bytes| put(bytes, entry(4), &[0xCD; 16]));
    unsupported("required metadata item", |bytes| put(bytes, entry(4) + 24, &5u32.to_le_bytes()));
    for block in [0u32, 1 << 19, 3 << 20, 512 << 20] {
        damaged("file parameters", "power of two", |bytes| put(bytes, ITEMS, &block.to_le_bytes()));
    }
    unsupported("flags 0x4", |bytes| put(bytes, ITEMS + 4, &4u32.to_le_bytes()));
    damaged("metadata table", "no parent locator", |bytes| put(bytes, ITEMS + 4, &2u32.to_le_bytes()));
    for size in [(64u64 << 40) + 512, 513, u64::MAX] {
        damaged("virtual disk size", "up to 64 TiB", |bytes| put(bytes, ITEMS + 8, &size.to_le_bytes()));
    }
    damaged("BAT", "entries for a disk", |bytes| put(bytes, ITEMS + 8, &(64u64 << 40).to_le_bytes()));
    damaged("logical sector size", "520 bytes", |bytes| put(bytes, ITEMS + 32, &520u32.to_le_bytes()));
    damaged("physical sector size", "0 bytes", |bytes| put(bytes, ITEMS + 36, &0u32.to_le_bytes()));
}

#[test]
fn bat_entries() {
    let length = good().len() as u64;
    for (entry, wanted) in [
        (6 | length, "the file has"),
        (6 | (1 << 63), "the file has"),
        (6, "header section"),
        (6 | LOG, "in the log or in a region"),
        (6 | METADATA, "in the log or in a region"),
        (6 | BAT, "in the log or in a region"),
        (6 | (4 * MIB) | 8, "reserved bits"),
        (6 | (4 * MIB) | (512 << 10), "reserved bits"),
        (4, "reserved state 4"),
        (5, "reserved state 5"),
        (7 | (4 * MIB), "no parent"),
    ] {
        let mut bytes = good();
        put(&mut bytes, BAT, &entry.to_le_bytes());
        let reader = open(&bytes).unwrap();
        match reader.read_at(100, &mut [0; 10]) {
            Err(DeviceError::Damaged { offset: 0, length: MIB, reason, .. }) => {
                assert!(reason.contains(wanted), "{entry:#x}: {reason}");
            }
            other => panic!("{entry:#x}: {other:?}"),
        }
        assert!(reader.next_allocated(0).is_err());
        // The rest of the disk stays readable.
        let mut two = [0; 512];
        reader.read_at(2 * MIB, &mut two).unwrap();
        assert_eq!(two, [2; 512]);
        let file = Arc::new(block_io::MemoryFile::new(bytes.clone()));
        assert!(Writer::open(file.clone(), &disk_image::NoParents).is_err(), "not written on");
        assert!(file.to_vec() == bytes, "a refused image stays as it is");
    }
    let mut shared = good();
    let first = u64_at(&shared, BAT);
    put(&mut shared, BAT + 8, &first.to_le_bytes());
    assert!(open(&shared).is_ok());
    let file = Arc::new(block_io::MemoryFile::new(shared));
    match Writer::open(file, &disk_image::NoParents) {
        Err(ImageError::Damaged { structure: "BAT", reason, .. }) => assert!(reason.contains("two owners")),
        _ => panic!("two blocks that share a place must not be written to"),
    }
}

#[test]
fn truncated_anywhere() {
    let whole = good();
    for length in (0..whole.len()).step_by(50_021) {
        match open(&whole[..length]) {
            Err(_) => {}
            Ok(reader) => {
                let mut all = vec![0; 4 * MIB as usize];
                assert!(matches!(reader.read_at(0, &mut all), Err(DeviceError::Damaged { .. })), "{length}");
            }
        }
    }
}

fn child_of(folder: &Folder, name: &str, number: u8) -> Vec<u8> {
    let file = new_file();
    let parent = Arc::new(folder.reader(name).unwrap());
    let child = Writer::create_child(file.clone(), parent, child_options(number, name)).unwrap();
    block_io::WritableDevice::write_at(&child, 512, &[3; 512]).unwrap();
    block_io::WritableDevice::flush(&child).unwrap();
    file.to_vec()
}

fn outcome(folder: &Folder, bytes: &[u8]) -> ImageError {
    match Reader::open(device(bytes), folder) {
        Ok(_) => panic!("the chain should have been refused"),
        Err(error) => error,
    }
}

#[test]
fn parents() {
    let folder = Folder::default();
    folder.add("base.vhdx", good());
    let child = child_of(&folder, "base.vhdx", 10);
    assert!(Reader::open(device(&child), &folder).is_ok());

    // The parent was written to after the child was made.
    let file = Arc::new(block_io::MemoryFile::new(good()));
    let writer = Writer::open(file.clone(), &disk_image::NoParents).unwrap();
    block_io::WritableDevice::write_at(&writer, 0, b"x").unwrap();
    block_io::WritableDevice::flush(&writer).unwrap();
    folder.add("base.vhdx", file.to_vec());
    assert!(matches!(outcome(&folder, &child), ImageError::ParentMismatch { .. }));

    let wide = disk_image::vhdx::CreateOptions {
        logical_sector_size: 4096,
        ..options(4 * MIB, CreateKind::Dynamic)
    };
    folder.add("base.vhdx", image(wide, &[]));
    match outcome(&folder, &child) {
        ImageError::ParentMismatch { reason, .. } => assert!(reason.contains("sectors"), "{reason}"),
        other => panic!("{other}"),
    }
    folder.add("base.vhdx", vec![0; 2 << 20]);
    assert!(matches!(outcome(&folder, &child), ImageError::NotThisFormat { .. }));

    folder.add("base.vhdx", good());
    folder.files.lock().unwrap().remove("base.vhdx");
    assert!(matches!(outcome(&folder, &child), ImageError::NotAllowed { .. }));
}

#[test]
fn an_image_that_is_its_own_parent() {
    let folder = Folder::default();
    folder.add("base.vhdx", good());
    let mut child = child_of(&folder, "base.vhdx", 10);
    // The identity of the child becomes the one that it expects of its parent.
    in_headers(&mut child, 32, &id(2));
    folder.add("base.vhdx", child.clone());
    folder.asked.lock().unwrap().clear();
    match outcome(&folder, &child) {
        ImageError::Unsupported { feature, .. } => assert!(feature.contains("leads back"), "{feature}"),
        other => panic!("{other}"),
    }
    assert_eq!(folder.asked.lock().unwrap().len(), MAX_CHAIN - 1);
}

#[test]
fn parent_locators() {
    let folder = Folder::default();
    folder.add("base.vhdx", good());
    let child = child_of(&folder, "base.vhdx", 10);
    let locator = child
        .windows(16)
        .position(|w| w == b"\xB7\xEF\x4A\xB0\x9E\xD1\x81\x4A\xB7\x89\x25\xB8\xE9\x44\x59\x13");
    let locator = locator.unwrap() as u64;
    let damage = |wanted: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = child.clone();
        change(&mut bytes);
        match outcome(&folder, &bytes) {
            ImageError::Damaged { structure: "parent locator", reason, .. } => {
                assert!(reason.contains(wanted), "{reason}");
            }
            other => panic!("{other}"),
        }
    };
    damage("do not fit", &|bytes| put(bytes, locator + 18, &60_000u16.to_le_bytes()));
    damage("parent_linkage is missing", &|bytes| put(bytes, locator + 18, &0u16.to_le_bytes()));
    damage("no name of the parent", &|bytes| put(bytes, locator + 18, &1u16.to_le_bytes()));
    damage("outside the item", &|bytes| put(bytes, locator + 20, &u32::MAX.to_le_bytes()));
    damage("outside the item", &|bytes| put(bytes, locator + 24, &100_000u32.to_le_bytes()));
    damage("is cut", &|bytes| put(bytes, locator + 30, &75u16.to_le_bytes()));
    damage("not a GUID", &|bytes| put(bytes, locator + 30, &70u16.to_le_bytes()));
    damage("there twice", &|bytes| {
        let first = bytes[locator as usize + 20..][..12].to_vec();
        put(bytes, locator + 32, &first);
    });
    let mut other = child.clone();
    put(&mut other, locator, &[0; 16]);
    assert!(matches!(outcome(&folder, &other), ImageError::Unsupported { .. }));
}

#[test]
fn parent_linkage2_is_as_good_as_parent_linkage() {
    let folder = Folder::default();
    folder.add("base.vhdx", good());
    let file = new_file();
    // A name that has the form of a linkage; its key is changed below.
    let linkage = disk_image::vhdx::guid_text(&id(2));
    let options = disk_image::vhdx::ChildOptions {
        absolute_win32_path: Some(linkage.clone()),
        ..child_options(10, "base.vhdx")
    };
    Writer::create_child(file.clone(), Arc::new(folder.reader("base.vhdx").unwrap()), options).unwrap();
    let mut bytes = file.to_vec();
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let find = |bytes: &[u8], text: &str| {
        let wanted = utf16(text);
        bytes.windows(wanted.len()).position(|window| window == wanted).unwrap() as u64
    };
    let first = find(&bytes, &linkage);
    put(&mut bytes, first, &utf16("{f"));
    assert!(matches!(outcome(&folder, &bytes), ImageError::ParentMismatch { .. }));
    let key = find(&bytes, "absolute_win32_path");
    put(&mut bytes, key, &utf16("parent_linkage2"));
    let locator = METADATA + 65_536 + 40;
    assert_eq!(bytes[(locator + 20 + 24 + 8) as usize], 38, "the third entry's key length");
    put(&mut bytes, locator + 20 + 24 + 8, &30u16.to_le_bytes());
    let reader = Reader::open(device(&bytes), &folder).unwrap();
    assert_eq!(reader.info().parent.as_ref().unwrap().linkage2, Some(id(2)));
}

#[test]
fn sector_bitmaps() {
    let folder = Folder::default();
    folder.add("base.vhdx", good());
    let child = child_of(&folder, "base.vhdx", 10);
    let bitmap_entry = BAT + 4096 * 8;
    assert_eq!(u64_at(&child, bitmap_entry) & 7, 6);
    for (entry, wanted) in [
        (0u64, "no sector bitmap block"),
        (2, "has the state"),
        (6 | (1 << 40), "the file has"),
        (6 | BAT, "in the log or in a region"),
    ] {
        let mut bytes = child.clone();
        put(&mut bytes, bitmap_entry, &entry.to_le_bytes());
        let reader = Reader::open(device(&bytes), &folder).unwrap();
        match reader.read_at(0, &mut [0; 512]) {
            Err(DeviceError::Damaged { reason, .. }) => assert!(reason.contains(wanted), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Reads whatever can be read.
fn touch(reader: &Reader) {
    let mut buf = vec![0; 8192];
    for at in (0..reader.size().min(8 * MIB)).step_by(MIB as usize) {
        let length = (reader.size() - at).min(8192) as usize;
        let _ = reader.read_at(at, &mut buf[..length]);
    }
    let mut at = 0;
    for _ in 0..4 {
        match reader.next_allocated(at) {
            Ok(Some(range)) => {
                assert!(range.start >= at && range.start < range.end && range.end <= reader.size());
                at = range.end;
            }
            _ => break,
        }
    }
}

/// A device whose one byte is another.
struct Flipped {
    below: Arc<block_io::MemoryDevice>,
    at: u64,
    mask: u8,
    /// Structure to put the right checksum into after the flip, so that the flip is not found by it.
    seal: Option<(u64, u32)>,
}

impl BlockDevice for Flipped {
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.below.read_at(offset, buf)?;
        let mut set = |at: u64, change: &dyn Fn(u8) -> u8| {
            if let Some(byte) = at.checked_sub(offset).and_then(|at| buf.get_mut(at as usize)) {
                *byte = change(*byte);
            }
        };
        set(self.at, &|byte| byte ^ self.mask);
        if let Some((at, sum)) = self.seal {
            for (index, byte) in sum.to_le_bytes().into_iter().enumerate() {
                set(at + 4 + index as u64, &|_| byte);
            }
        }
        Ok(())
    }
    fn next_allocated(&self, from: u64) -> Result<Option<block_io::ByteRange>, DeviceError> {
        self.below.next_allocated(from)
    }
}

/// Every bit of every structure, and every bit again with a checksum that fits.
#[test]
fn no_flipped_bit_panics() {
    let folder = Folder::default();
    folder.add("base.vhdx", good());
    let bytes = child_of(&folder, "base.vhdx", 10);
    let below = Arc::new(block_io::MemoryDevice::new(bytes.clone()));
    let locator_end = METADATA + 65_536 + 600;
    let spans = [
        (0, 16),
        (512, 528),
        (HEADERS[0], HEADERS[0] + 80),
        (HEADERS[1], HEADERS[1] + 80),
        (REGION_TABLES[0], REGION_TABLES[0] + 88),
        (REGION_TABLES[1], REGION_TABLES[1] + 88),
        (METADATA, METADATA + 32 + 6 * 32),
        (METADATA + 65_536, locator_end),
        (BAT, BAT + 64),
        (BAT + 4096 * 8, BAT + 4096 * 8 + 8),
    ];
    let check = |start: u64, end: u64| {
        for at in start..end {
            for bit in 0..8u32 {
                let mask = 1u8 << bit;
                let sealed = HEADERS
                    .into_iter()
                    .map(|at| (at, 4096))
                    .chain(REGION_TABLES.into_iter().map(|at| (at, 65_536)))
                    .find(|(from, length)| (*from..*from + *length).contains(&at))
                    .map(|(from, length)| {
                        let mut part = bytes[from as usize..(from + length) as usize].to_vec();
                        part[(at - from) as usize] ^= mask;
                        reseal(&mut part, 0, length);
                        (from, u32::from_le_bytes(part[4..8].try_into().unwrap()))
                    });
                for seal in std::iter::once(None).chain(sealed.map(Some)) {
                    let flipped = Arc::new(Flipped { below: below.clone(), at, mask, seal });
                    if let Ok(reader) = Reader::open(flipped, &folder) {
                        touch(&reader);
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let (first, second): (Vec<_>, Vec<_>) = spans.iter().partition(|(start, _)| start / 4096 % 32 == 0);
        for half in [first, second] {
            scope.spawn(move || half.into_iter().for_each(|(start, end)| check(start, end)));
        }
    });
}

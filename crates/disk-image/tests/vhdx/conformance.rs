//! The public examination, every kind and size of image, and the meaning of every BAT state.

use std::sync::Arc;

use block_io::{Allocated, BlockDevice, ByteRange, FileDevice, WritableDevice, conformance};
use block_io::{DiskFile, GrowableFile};
use disk_image::vhdx::{CreateKind, CreateOptions, Kind, Reader, Writer};
use disk_image::{ImageError, NoParents};

use crate::support::*;

fn written(content: &[u8], options: CreateOptions) -> (Writer, Arc<block_io::MemoryFile>) {
    let file = new_file();
    let writer = Writer::create(file.clone(), options).unwrap();
    for (index, part) in content.chunks(300_032).enumerate() {
        writer.write_at(index as u64 * 300_032, part).unwrap();
    }
    (writer, file)
}

#[test]
fn reader_of_fixed_and_dynamic_images() {
    for kind in [CreateKind::Fixed, CreateKind::Dynamic] {
        conformance::all(|content| {
            let (writer, file) = written(content, options(content.len() as u64, kind));
            writer.flush().unwrap();
            open(&file.to_vec()).unwrap()
        });
    }
}

#[test]
fn reader_of_a_child_with_data_in_both() {
    conformance::all(|content| {
        let folder = Folder::default();
        let size = content.len() as u64;
        // The parent holds the first half and garbage that the child covers.
        let half = content.len() / 1024 * 512;
        let mut below = content.to_vec();
        below[half..].iter_mut().for_each(|byte| *byte ^= 0x5A);
        folder.add("base.vhdx", image(options(size, CreateKind::Dynamic), &[(0, &below)]));
        let file = new_file();
        let parent = Arc::new(folder.reader("base.vhdx").unwrap());
        let child = Writer::create_child(file.clone(), parent, child_options(10, "base.vhdx")).unwrap();
        child.write_at(half as u64, &content[half..]).unwrap();
        child.flush().unwrap();
        Reader::open(device(&file.to_vec()), &folder).unwrap()
    });
}

#[test]
fn writer_of_every_kind() {
    let size = 5 * MIB + 512;
    for kind in [CreateKind::Fixed, CreateKind::Dynamic] {
        conformance::writes(size, || Writer::create(new_file(), options(size, kind)).unwrap());
        conformance::all(|content| written(content, options(content.len() as u64, kind)).0);
    }
    let base = Arc::new(open(&image(options(size, CreateKind::Dynamic), &[])).unwrap());
    conformance::writes(size, || {
        Writer::create_child(new_file(), base.clone(), child_options(10, "base.vhdx")).unwrap()
    });
}

#[test]
fn writer_with_sectors_of_4096_bytes() {
    let size = 3 * MIB + 4096;
    let wide = CreateOptions { logical_sector_size: 4096, ..options(size, CreateKind::Dynamic) };
    conformance::writes(size, || Writer::create(new_file(), wide).unwrap());
    let base = Arc::new(open(&image(wide, &[(0, &[7; 8192])])).unwrap());
    assert_eq!(base.logical_sector_size(), 4096);
    let child = Writer::create_child(new_file(), base, child_options(10, "base.vhdx")).unwrap();
    // Not a whole sector: the rest of it comes from the parent.
    child.write_at(100, b"x").unwrap();
    let mut expected = vec![0; size as usize];
    expected[..8192].fill(7);
    expected[100] = b'x';
    conformance::examine(&child, &expected);
}

#[test]
fn every_block_size_in_a_sparse_file() {
    let folder = tempfile::tempdir().unwrap();
    for power in 20..=28u32 {
        for sector in [512, 4096] {
            let path = folder.path().join(format!("{power}-{sector}.vhdx"));
            let size = (9 << 30) + 4096;
            let options = CreateOptions {
                block_size: 1 << power,
                logical_sector_size: sector,
                ..options(size, CreateKind::Dynamic)
            };
            let writer = Writer::create(Arc::new(DiskFile::create(&path).unwrap()), options).unwrap();
            let places = [0, (4 << 30) - 4096, 4 << 30, (8 << 30) + 12_288, size - 4096];
            for (index, at) in places.into_iter().enumerate() {
                writer.write_at(at, &[index as u8 + 1; 4096]).unwrap();
            }
            writer.flush().unwrap();
            let reader = Reader::open(Arc::new(FileDevice::open(&path).unwrap()), &NoParents).unwrap();
            assert_eq!(reader.info().block_size, 1 << power);
            for (index, at) in places.into_iter().enumerate() {
                let mut bytes = [0; 4096];
                reader.read_at(at, &mut bytes).unwrap();
                assert_eq!(bytes, [index as u8 + 1; 4096], "block size 2^{power} at {at}");
                let next = reader.next_allocated(at).unwrap().unwrap();
                assert_eq!(next.start, at);
            }
            let mut zeros = [1; 512];
            reader.read_at(5 << 30, &mut zeros).unwrap();
            assert_eq!(zeros, [0; 512]);
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn a_disk_of_64_tib_needs_little_memory_and_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.vhdx");
    let size = 64 << 40;
    let file = Arc::new(DiskFile::create(&path).unwrap());
    let writer = Writer::create(file.clone(), options(size, CreateKind::Dynamic)).unwrap();
    writer.write_at(size - 512, &[9; 512]).unwrap();
    writer.write_at(1 << 45, &[8; 512]).unwrap();
    writer.flush().unwrap();
    assert!(file.len().unwrap() > 512 * MIB, "the BAT has 512 MiB");
    drop(writer);
    let device: Arc<dyn BlockDevice> = Arc::new(FileDevice::open(&path).unwrap());
    let reader = Reader::open(device, &NoParents).unwrap();
    let ranges: Vec<ByteRange> =
        Allocated::new(&reader, ByteRange { start: 0, end: size }).map(|range| range.unwrap()).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    assert!(ranges[0].start <= 1 << 45 && ranges[0].end > 1 << 45 && ranges[1].end == size, "{ranges:?}");
    assert!(ranges.iter().all(|range| range.len() <= MIB));
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
        // The other tests of this program run beside it; a BAT held whole would be 512 MiB alone.
        assert!(kib < 500 * 1024, "{kib} KiB at the peak");
    }
    let again = Writer::open(file, &NoParents).unwrap();
    again.write_at(0, &[1; 512]).unwrap();
    again.flush().unwrap();
    assert!(matches!(
        Writer::create(new_file(), options(size + 512, CreateKind::Dynamic)),
        Err(ImageError::CannotHold { .. })
    ));
}

#[test]
fn info_is_enough_to_write_the_same_again() {
    let wanted = CreateOptions {
        size: 10 * MIB,
        logical_sector_size: 4096,
        physical_sector_size: 4096,
        block_size: 8 << 20,
        ..options(0, CreateKind::Fixed)
    };
    let reader = open(&image(wanted, &[])).unwrap();
    let info = reader.info();
    assert_eq!((info.kind, info.size, info.block_size), (Kind::Fixed, 10 * MIB, 8 << 20));
    assert_eq!((info.logical_sector_size, info.physical_sector_size), (4096, 4096));
    assert_eq!((info.virtual_disk_id, info.data_write_guid, info.file_write_guid), (id(3), id(2), id(1)));
    assert_eq!(info.creator, "Stillpoint");
    assert!(!info.log_replayed);
    assert_eq!(info.parent, None);
}

/// What each BAT state means where the specification leaves no choice, and where it does.
#[test]
fn every_bat_state_with_and_without_a_parent() {
    let size = 6 * MIB;
    let folder = Folder::default();
    let below = vec![0xBB; size as usize];
    let base = image(options(size, CreateKind::Dynamic), &[(0, &below)]);
    for child in [false, true] {
        let mut bytes = if child {
            folder.add("base.vhdx", base.clone());
            let parent = Arc::new(folder.reader("base.vhdx").unwrap());
            let file = new_file();
            let writer = Writer::create_child(file.clone(), parent, child_options(10, "base.vhdx")).unwrap();
            writer.write_at(0, &vec![0xCC; size as usize]).unwrap();
            writer.flush().unwrap();
            file.to_vec()
        } else {
            base.clone()
        };
        for (block, state) in [0u64, 1, 2, 3, 6].into_iter().enumerate() {
            let at = BAT + block as u64 * 8;
            let entry = u64_at(&bytes, at) & !7 | state;
            put(&mut bytes, at, &entry.to_le_bytes());
        }
        let reader = Reader::open(device(&bytes), &folder).unwrap();
        let own = if child { 0xCC } else { 0xBB };
        let not_present = if child { 0xBB } else { 0 };
        let expected: Vec<u8> =
            [not_present, 0, 0, 0, own, own].into_iter().flat_map(|byte| vec![byte; MIB as usize]).collect();
        conformance::examine(&reader, &expected);
    }
}

#[test]
fn ranges_of_a_chain_are_exact_to_the_sector() {
    let size = 8 * MIB;
    let folder = Folder::default();
    folder.add("base.vhdx", image(options(size, CreateKind::Dynamic), &[(5 * MIB, &[1; 512])]));
    let parent = Arc::new(folder.reader("base.vhdx").unwrap());
    let file = new_file();
    let child = Writer::create_child(file.clone(), parent, child_options(10, "base.vhdx")).unwrap();
    child.write_at(1024, &[2; 512]).unwrap();
    child.write_at(8192, &[3; 1024]).unwrap();
    child.write_at(7 * MIB, &vec![4; MIB as usize]).unwrap();
    child.flush().unwrap();
    folder.add("child.vhdx", file.to_vec());
    let reader = folder.reader("child.vhdx").unwrap();
    let ranges: Vec<(u64, u64)> = Allocated::new(&reader, ByteRange { start: 0, end: size })
        .map(|range| range.unwrap())
        .map(|range| (range.start, range.end))
        .collect();
    // The memory file below the base is asked for holes: of its block only the written page is data.
    assert_eq!(ranges, [(1024, 1536), (8192, 9216), (5 * MIB, 5 * MIB + 4096), (7 * MIB, 8 * MIB)]);
    // The third generation, with another block size, sees the same.
    let grandchild = Writer::create_child(
        new_file(),
        Arc::new(reader),
        disk_image::vhdx::ChildOptions { block_size: 4 << 20, ..child_options(20, "child.vhdx") },
    )
    .unwrap();
    grandchild.write_zeros(ByteRange { start: 0, end: 4 * MIB }).unwrap();
    grandchild.write_at(4 * MIB, &[5; 100]).unwrap();
    let mut expected = vec![0; size as usize];
    expected[4 * MIB as usize..][..100].fill(5);
    expected[5 * MIB as usize..][..512].fill(1);
    expected[7 * MIB as usize..].fill(4);
    conformance::examine(&grandchild, &expected);
}

#[test]
fn parents_are_asked_for_by_name_order_and_depth() {
    let folder = Folder::default();
    folder.add("a.vhdx", image(options(MIB, CreateKind::Dynamic), &[(0, &[1; 512])]));
    for (number, name, below) in [(10, "b.vhdx", "a.vhdx"), (20, "c.vhdx", "b.vhdx")] {
        let file = new_file();
        let parent = Arc::new(folder.reader(below).unwrap());
        let options = disk_image::vhdx::ChildOptions {
            volume_path: Some(format!("\\\\?\\Volume{{26A21BDA-A627-11D7-9931-806E6F6E6963}}\\{below}")),
            ..child_options(number, below)
        };
        Writer::create_child(file.clone(), parent, options).unwrap();
        folder.add(name, file.to_vec());
    }
    folder.asked.lock().unwrap().clear();
    let reader = folder.reader("c.vhdx").unwrap();
    assert_eq!(read_all(&reader)[..512], [1; 512]);
    assert_eq!(reader.info().virtual_disk_id, id(3), "a child is the same disk");
    let asked = folder.asked.lock().unwrap();
    assert_eq!(asked.iter().map(|reference| reference.depth).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(
        asked[0].names,
        [
            ".\\b.vhdx",
            "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\b.vhdx",
            "\\\\?\\C:\\disks\\b.vhdx"
        ]
    );
    assert!(matches!(
        Reader::open(folder.files.lock().unwrap()["c.vhdx"].clone(), &NoParents),
        Err(ImageError::NotAllowed { .. })
    ));
}

#[test]
fn zeros_take_no_space_and_freed_blocks_are_used_again() {
    let size = 64 * MIB;
    let file = new_file();
    let writer = Writer::create(file.clone(), options(size, CreateKind::Dynamic)).unwrap();
    let empty = file.len().unwrap();
    writer.write_at(0, &vec![0; 3 * MIB as usize]).unwrap();
    writer.write_zeros(ByteRange { start: 100, end: size }).unwrap();
    assert_eq!(file.len().unwrap(), empty);
    assert_eq!(writer.next_allocated(0).unwrap(), None);
    for round in 1..5u8 {
        writer.write_at(2 * MIB, &vec![round; 4 * MIB as usize]).unwrap();
        writer.flush().unwrap();
        writer.write_zeros(ByteRange { start: 2 * MIB, end: 6 * MIB }).unwrap();
        writer.flush().unwrap();
        assert_eq!(file.len().unwrap(), empty + 4 * MIB);
    }
    let reader = open(&file.to_vec()).unwrap();
    assert_eq!(reader.next_allocated(0).unwrap(), None);
    assert_eq!(u64_at(&file.to_vec(), BAT + 16), 2, "PAYLOAD_BLOCK_ZERO");
}

#[test]
fn a_session_changes_the_ids_before_its_first_change_and_only_then() {
    let file = new_file();
    Writer::create(file.clone(), options(4 * MIB, CreateKind::Dynamic)).unwrap();
    let before = open(&file.to_vec()).unwrap().info().clone();
    let writer = Writer::open(file.clone(), &NoParents).unwrap();
    writer.flush().unwrap();
    assert_eq!(open(&file.to_vec()).unwrap().info(), &before);
    writer.write_at(0, b"x").unwrap();
    let after = open(&file.to_vec()).unwrap().info().clone();
    assert_ne!(after.file_write_guid, before.file_write_guid);
    assert_ne!(after.data_write_guid, before.data_write_guid);
    assert_eq!(after.virtual_disk_id, before.virtual_disk_id);
    assert_eq!(writer.info().data_write_guid, after.data_write_guid);
}

#[test]
fn what_cannot_be_created_is_said() {
    for wrong in [
        CreateOptions { size: 0, ..options(0, CreateKind::Dynamic) },
        CreateOptions { size: 513, ..options(0, CreateKind::Dynamic) },
        CreateOptions { block_size: 3 << 20, ..options(MIB, CreateKind::Dynamic) },
        CreateOptions { block_size: 512 << 20, ..options(MIB, CreateKind::Dynamic) },
        CreateOptions { block_size: 0, ..options(MIB, CreateKind::Dynamic) },
        CreateOptions { logical_sector_size: 1024, ..options(MIB, CreateKind::Dynamic) },
        CreateOptions { physical_sector_size: 0, ..options(MIB, CreateKind::Dynamic) },
    ] {
        let file = new_file();
        let result = Writer::create(file.clone(), wrong);
        assert!(matches!(result, Err(ImageError::CannotHold { .. })), "{wrong:?}");
        assert!(file.is_empty().unwrap());
    }
    let file = Arc::new(block_io::MemoryFile::new(vec![1]));
    assert!(Writer::create(file.clone(), options(MIB, CreateKind::Dynamic)).is_err());
    assert_eq!(file.to_vec(), [1], "a file that holds something is left alone");
}

//! Raw images.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use block_io::{ByteRange, DiskFile, FileDevice, GrowableFile, MemoryDevice, MemoryFile, conformance};
use disk_image::{BlockDevice, ImageError, WritableDevice, raw};

#[test]
fn conformance_of_reader_and_writer() {
    conformance::all(|content| raw::Reader::open(Arc::new(MemoryDevice::new(content.to_vec()))));
    conformance::all(|content| raw::Writer::open(Arc::new(MemoryFile::new(content.to_vec())), 512).unwrap());
    for sector in [512, 4096] {
        conformance::writes(1 << 20, || {
            raw::Writer::create(Arc::new(MemoryFile::default()), 1 << 20, sector).unwrap()
        });
    }
}

#[test]
fn a_file_that_is_not_whole_sectors_keeps_its_bytes() {
    let content: Vec<u8> = (0..1000u32).map(|at| at as u8 | 1).collect();
    let reader = raw::Reader::open(Arc::new(MemoryDevice::new(content.clone()))).with_sector_size(4096);
    conformance::examine(&reader, &content);
    assert_eq!(reader.logical_sector_size(), 4096);
    let file = Arc::new(MemoryFile::default());
    let writer = raw::Writer::create(file.clone(), 1000, 512).unwrap();
    writer.write_at(999, &[7]).unwrap();
    assert!(writer.write_at(999, &[7, 7]).is_err());
    assert_eq!(file.len().unwrap(), 1000);
}

#[test]
fn holes_stay_holes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let writer = raw::Writer::create(Arc::new(DiskFile::create(&path).unwrap()), 64 << 20, 512).unwrap();
    writer.write_at(1 << 20, &[1; 65_536]).unwrap();
    writer.write_at(9 << 20, &[2; 65_536]).unwrap();
    writer.write_zeros(ByteRange { start: 9 << 20, end: (9 << 20) + 65_536 }).unwrap();
    writer.flush().unwrap();
    let reader = raw::Reader::open(Arc::new(FileDevice::open(&path).unwrap()));
    let ranges: Vec<ByteRange> =
        reader.allocated(ByteRange { start: 0, end: 64 << 20 }).map(|range| range.unwrap()).collect();
    assert_eq!(ranges, vec![ByteRange { start: 1 << 20, end: (1 << 20) + 65_536 }]);
}

#[test]
fn a_file_with_bytes_is_not_overwritten() {
    let file = Arc::new(MemoryFile::new(vec![1; 10]));
    let error = raw::Writer::create(file.clone(), 512, 512).err().unwrap();
    assert!(matches!(error, ImageError::CannotHold { .. }), "{error}");
    assert_eq!(file.to_vec(), vec![1; 10]);
}

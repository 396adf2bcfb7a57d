//! VHD: reading, writing, damage, crashes, and agreement with qemu-img.
#![allow(clippy::unwrap_used)]

mod chain;
mod crash;
mod damage;
mod qemu;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block_io::{ByteRange, FileDevice, GrowableFile, MemoryDevice, MemoryFile, conformance};
use disk_image::vhd::{CreateOptions, Info, Kind, MAX_SIZE, Reader, SizeRule, Writer};
use disk_image::{BlockDevice, ImageError, NoParents, ParentReference, Parents, WritableDevice};

const ID: [u8; 16] = *b"0123456789abcdef";

/// Options with small blocks, so that small disks have many.
fn small(size: u64, block_size: u32) -> CreateOptions {
    CreateOptions { block_size, ..CreateOptions::dynamic(size, ID) }
}

fn image_of(content: &[u8], options: &CreateOptions) -> Vec<u8> {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create(file.clone(), options).unwrap();
    for (index, sector) in content.chunks(512).enumerate() {
        if sector.iter().any(|&byte| byte != 0) {
            writer.write_at(index as u64 * 512, sector).unwrap();
        }
    }
    writer.flush().unwrap();
    file.to_vec()
}

fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0xEE; device.size() as usize];
    device.read_at(0, &mut all).unwrap();
    all
}

fn open(image: Vec<u8>) -> Result<Reader, ImageError> {
    Reader::open(Arc::new(MemoryDevice::new(image)), &NoParents)
}

/// Parents by the first name of the reference.
#[derive(Clone, Default)]
struct Named(HashMap<String, Arc<dyn BlockDevice>>);

impl Parents for Named {
    fn open(
        &self,
        reference: &ParentReference,
    ) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        for name in &reference.names {
            if let Some(file) = self.0.get(name) {
                return Ok((file.clone(), Arc::new(self.clone())));
            }
        }
        disk_image::NoParents.open(reference)
    }
}

#[test]
fn conformance_of_the_reader() {
    for options in [
        CreateOptions::fixed(0, ID),
        CreateOptions::dynamic(0, ID),
        small(0, 512),
        small(0, 4096),
        small(0, 65_536),
    ] {
        conformance::all(|content| {
            let options = CreateOptions { size: content.len() as u64, ..options.clone() };
            open(image_of(content, &options)).unwrap()
        });
    }
}

#[test]
fn conformance_of_the_writer() {
    for options in [CreateOptions::fixed(0, ID), CreateOptions::dynamic(0, ID), small(0, 4096)] {
        for size in [1 << 20, (1 << 20) + 512] {
            conformance::writes(size, || {
                let options = CreateOptions { size, ..options.clone() };
                Writer::create(Arc::new(MemoryFile::default()), &options).unwrap()
            });
        }
    }
}

#[test]
fn conformance_on_files_with_holes() {
    let folder = tempfile::tempdir().unwrap();
    let next = AtomicU64::new(0);
    conformance::all(|content| {
        let path = folder.path().join(next.fetch_add(1, Ordering::Relaxed).to_string());
        let file = Arc::new(block_io::DiskFile::create(&path).unwrap());
        let writer = Writer::create(file, &CreateOptions::dynamic(content.len() as u64, ID)).unwrap();
        for (index, page) in content.chunks(4096).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                writer.write_at(index as u64 * 4096, page).unwrap();
            }
        }
        writer.flush().unwrap();
        Reader::open(Arc::new(FileDevice::open(&path).unwrap()), &NoParents).unwrap()
    });
}

#[test]
fn holes_inside_a_block_are_not_allocated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    let file = Arc::new(block_io::DiskFile::create(&path).unwrap());
    let writer = Writer::create(file, &CreateOptions::dynamic(64 << 20, ID)).unwrap();
    writer.write_at(6 << 20, &[1; 65_536]).unwrap();
    writer.write_at(7 << 20, &[2; 65_536]).unwrap();
    writer.write_zeros(ByteRange { start: 7 << 20, end: (7 << 20) + 65_536 }).unwrap();
    writer.flush().unwrap();
    let reader = Reader::open(Arc::new(FileDevice::open(&path).unwrap()), &NoParents).unwrap();
    let ranges: Vec<ByteRange> =
        reader.allocated(ByteRange { start: 0, end: 64 << 20 }).map(|range| range.unwrap()).collect();
    assert_eq!(ranges, vec![ByteRange { start: 6 << 20, end: (6 << 20) + 65_536 }]);
}

#[test]
fn bits_that_are_not_set_read_as_zeros_in_a_dynamic_disk() {
    let content = vec![9u8; 8192];
    let mut image = image_of(&content, &small(8192, 8192));
    let bitmap =
        image.windows(512).position(|bytes| bytes[..2] == [0xFF; 2] && bytes[2..].iter().all(|&b| b == 0xFF));
    // The table is one sector of ones too, and lies first; the bitmap ends where the data begins.
    let data = image.iter().position(|&byte| byte == 9).unwrap();
    assert!(bitmap.unwrap() < data);
    image[data - 512] = 0b1011_1111;
    let mut expected = content.clone();
    expected[512..1024].fill(0);
    conformance::examine(&open(image.clone()).unwrap(), &expected);

    // Writing a part of such a sector must not bring back what lies under it.
    let file = Arc::new(MemoryFile::new(image));
    let writer = Writer::open(file.clone(), &NoParents).unwrap();
    writer.write_at(600, &[3; 10]).unwrap();
    writer.flush().unwrap();
    expected[600..610].fill(3);
    assert_eq!(read_all(&writer), expected);
    conformance::examine(&open(file.to_vec()).unwrap(), &expected);
}

#[test]
fn what_the_image_says_about_itself() {
    let size = (10 << 20) + 512;
    let reader =
        open(image_of(&[], &CreateOptions { time_stamp: 77, ..CreateOptions::dynamic(size, ID) })).unwrap();
    let Info { kind, size_rule, current_size, original_size, block_size, unique_id, time_stamp, .. } =
        reader.info().clone();
    assert_eq!(
        (kind, size_rule, current_size, original_size),
        (Kind::Dynamic, SizeRule::CurrentSize, size, size)
    );
    assert_eq!((block_size, unique_id, time_stamp), (Some(2 << 20), ID, 77));
    assert_eq!(&reader.info().creator_application, b"win ");
}

#[test]
fn disks_that_the_format_cannot_hold_are_refused() {
    for size in [0, 511, 513, MAX_SIZE + 512, u64::MAX] {
        for options in [CreateOptions::fixed(size, ID), CreateOptions::dynamic(size, ID)] {
            let file = Arc::new(MemoryFile::default());
            let error = Writer::create(file.clone(), &options).err().unwrap();
            assert!(matches!(error, ImageError::CannotHold { .. }), "{error}");
            assert!(file.is_empty().unwrap(), "nothing is written");
        }
    }
    for block_size in [0, 1, 511, 513, 3 << 20, 1 << 31] {
        let error =
            Writer::create(Arc::new(MemoryFile::default()), &small(1 << 20, block_size)).err().unwrap();
        assert!(matches!(error, ImageError::CannotHold { .. }), "{error}");
    }
    let taken = Arc::new(MemoryFile::new(vec![1; 512]));
    assert!(Writer::create(taken.clone(), &CreateOptions::fixed(512, ID)).is_err());
    assert_eq!(taken.to_vec(), vec![1; 512]);
}

#[test]
fn footers_of_511_bytes_are_read() {
    let content: Vec<u8> = (0..8192u32).map(|at| (at % 251) as u8).collect();
    for options in [CreateOptions::fixed(8192, ID), small(8192, 4096)] {
        let mut image = image_of(&content, &options);
        image.pop();
        conformance::examine(&open(image.clone()).unwrap(), &content);
        let file = Arc::new(MemoryFile::new(image));
        let writer = Writer::open(file.clone(), &NoParents).unwrap();
        writer.write_at(0, &content[..100]).unwrap();
        writer.flush().unwrap();
        conformance::examine(&open(file.to_vec()).unwrap(), &content);
    }
}

/// The guest writes a complete VHD, a differencing one that names a parent, to the start of its fixed disk.
#[test]
fn a_footer_written_by_the_guest_of_a_fixed_disk_is_not_believed() {
    let mut guest = image_of(&[5; 4096], &small(1 << 20, 4096));
    guest.truncate(guest.len() - 512);
    guest.resize(guest.len().next_multiple_of(512), 0);
    let mut image = image_of(&guest, &CreateOptions::fixed(guest.len() as u64, ID));
    let reader = open(image.clone()).unwrap();
    assert_eq!(reader.info().kind, Kind::Fixed);
    assert_eq!(read_all(&reader), guest);
    // Nor when the footer at the end is damaged but still says what it is.
    let last = image.len() - 1;
    image[last - 400] ^= 1;
    assert!(matches!(open(image), Err(ImageError::Damaged { structure: "Hard Disk Footer", .. })));
}

#[test]
fn a_writer_goes_on_where_another_stopped() {
    for options in [CreateOptions::fixed(1 << 20, ID), small(1 << 20, 8192)] {
        let file = Arc::new(MemoryFile::default());
        let mut expected = vec![0u8; 1 << 20];
        drop(Writer::create(file.clone(), &options).unwrap());
        for turn in 0..10u8 {
            let writer = Writer::open(file.clone(), &NoParents).unwrap();
            let at = usize::from(turn) * 77_777;
            writer.write_at(at as u64, &[turn + 1; 30_000]).unwrap();
            expected[at..at + 30_000].fill(turn + 1);
            assert_eq!(read_all(&writer), expected);
            writer.flush().unwrap();
            drop(writer);
            conformance::examine(&open(file.to_vec()).unwrap(), &expected);
        }
    }
}

/// A failed flush is final (INV-5).
#[test]
fn after_a_failed_flush_nothing_is_believed() {
    struct Failing(MemoryFile, std::sync::atomic::AtomicBool);
    impl GrowableFile for Failing {
        fn len(&self) -> Result<u64, block_io::DeviceError> {
            self.0.len()
        }
        fn set_len(&self, length: u64) -> Result<(), block_io::DeviceError> {
            self.0.set_len(length)
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), block_io::DeviceError> {
            GrowableFile::read_at(&self.0, offset, buf)
        }
        fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), block_io::DeviceError> {
            GrowableFile::write_at(&self.0, offset, buf)
        }
        fn punch(&self, range: ByteRange) -> Result<(), block_io::DeviceError> {
            self.0.punch(range)
        }
        fn flush(&self) -> Result<(), block_io::DeviceError> {
            if self.1.swap(false, Ordering::Relaxed) {
                return Err(block_io::DeviceError::ReadOnly { object: "test".to_owned() });
            }
            Ok(())
        }
    }
    for options in [CreateOptions::fixed(1 << 20, ID), CreateOptions::dynamic(1 << 20, ID)] {
        let file = Arc::new(Failing(MemoryFile::default(), false.into()));
        let writer = Writer::create(file.clone(), &options).unwrap();
        writer.write_at(0, &[1; 512]).unwrap();
        file.1.store(true, Ordering::Relaxed);
        assert!(writer.flush().is_err());
        assert!(writer.flush().is_err(), "a second flush must not be believed");
        assert!(writer.write_at(0, &[1; 512]).is_err());
    }
}

#[test]
fn many_threads_write_one_disk() {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create(file.clone(), &small(1 << 20, 16_384)).unwrap();
    std::thread::scope(|scope| {
        for turn in 0..4u8 {
            let writer = &writer;
            scope.spawn(move || {
                for index in (u64::from(turn)..1 << 10).step_by(4) {
                    writer.write_at(index * 1024, &[turn + 1; 1024]).unwrap();
                    if index % 64 == 0 {
                        writer.flush().unwrap();
                    }
                }
            });
        }
    });
    writer.flush().unwrap();
    let expected: Vec<u8> = (0..1usize << 20).map(|at| (at / 1024 % 4) as u8 + 1).collect();
    assert!(read_all(&open(file.to_vec()).unwrap()) == expected);
}

//! The qcow2 writer: conformance, a model, crashes at any write, and QEMU's opinion of what it leaves.
#![allow(clippy::unwrap_used)]

mod qcow2_common;

use std::sync::{Arc, Mutex};

use block_io::{DeviceError, DiskFile, GrowableFile, MemoryDevice, MemoryFile, WritableDevice, conformance};
use disk_image::qcow2::{Base, CreateOptions, Reader, Writer};
use disk_image::{BlockDevice, ImageError, ImageFormat, NoParents};
use model::ByteRange;
use proptest::prelude::*;
use qcow2_common::{Draw, Only, check, img, io};

fn create(size: u64, cluster_bits: u32) -> (Arc<MemoryFile>, Writer) {
    let file = Arc::new(MemoryFile::default());
    let writer = Writer::create(file.clone(), CreateOptions { size, cluster_bits }).unwrap();
    (file, writer)
}

fn reader(image: Vec<u8>) -> Reader {
    Reader::open(Arc::new(MemoryDevice::new(image)), &NoParents).unwrap()
}

/// What QEMU says of an image and its content.
fn qemu_agrees(image: &[u8], content: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("image.qcow2"), image).unwrap();
    std::fs::write(folder.path().join("content.raw"), content).unwrap();
    check(folder.path(), "image.qcow2", false);
    img(folder.path(), "compare -f qcow2 -F raw image.qcow2 content.raw");
    qcow2_common::agrees(folder.path(), "image.qcow2", "written here");
}

#[test]
fn conformance_of_writer_and_reader() {
    for bits in [9, 12, 16, 21] {
        conformance::all(|content| {
            let (_, writer) = create(content.len() as u64, bits);
            writer.write_at(0, content).unwrap();
            writer
        });
        conformance::all(|content| {
            let (file, writer) = create(content.len() as u64, bits);
            for (index, piece) in content.chunks(4096).enumerate() {
                if piece.iter().any(|&byte| byte != 0) {
                    writer.write_at(index as u64 * 4096, piece).unwrap();
                }
            }
            writer.flush().unwrap();
            reader(file.to_vec())
        });
        conformance::writes((1 << 20) + 512, || create((1 << 20) + 512, bits).1);
    }
}

#[test]
fn qemu_finds_images_of_every_cluster_size_clean_and_equal() {
    for bits in 9..=21 {
        let size = (5 << 20) + 512;
        let mut content = vec![0u8; size as usize];
        let (file, writer) = create(size, bits);
        qemu_agrees(&file.to_vec(), &content);
        let mut draw = Draw(u64::from(bits));
        for turn in 1..60u64 {
            let start = draw.below(size / 512) * 512;
            let length = (draw.below(700) * 512).min(size - start);
            let range = start as usize..(start + length) as usize;
            if turn % 5 == 0 {
                writer.write_zeros(ByteRange { start, end: start + length }).unwrap();
                content[range].fill(0);
            } else {
                content[range.clone()].fill(turn as u8);
                writer.write_at(start, &content[range]).unwrap();
            }
            if turn % 20 == 0 {
                writer.flush().unwrap();
            }
        }
        writer.flush().unwrap();
        qemu_agrees(&file.to_vec(), &content);
    }
}

#[test]
fn a_disk_of_two_tebibytes_written_at_its_ends() {
    let folder = tempfile::tempdir().unwrap();
    let file = Arc::new(DiskFile::create(&folder.path().join("image.qcow2")).unwrap());
    let size = 2u64 << 40;
    let writer = Writer::create(file.clone(), CreateOptions::new(size)).unwrap();
    writer.write_at(0, &[1; 512]).unwrap();
    writer.write_at(size - 512, &[2; 512]).unwrap();
    writer.write_at(size / 2 - 256, &[3; 512]).unwrap();
    writer.flush().unwrap();
    check(folder.path(), "image.qcow2", false);
    let ours = qcow2_common::open(folder.path(), "image.qcow2").unwrap();
    assert_eq!(qcow2_common::ranges(&ours), qcow2_common::qemu_ranges(folder.path(), "image.qcow2"));
    assert!(file.len().unwrap() < 4 << 20, "a sparse disk makes a small file");
}

#[test]
fn more_tables_than_memory_holds_are_committed_on_the_way() {
    // Tables of 512 bytes for 32 KiB each: 32768 of them are held. This disk has 40960.
    let folder = tempfile::tempdir().unwrap();
    let file = Arc::new(DiskFile::create(&folder.path().join("image.qcow2")).unwrap());
    let size = 40_960u64 * 32_768;
    let writer = Writer::create(file, CreateOptions { size, cluster_bits: 9 }).unwrap();
    for table in 0..40_960u64 {
        writer.write_at(table * 32_768 + 512, &[table as u8 | 1; 512]).unwrap();
    }
    writer.flush().unwrap();
    check(folder.path(), "image.qcow2", false);
    let ours = qcow2_common::open(folder.path(), "image.qcow2").unwrap();
    for table in (0..40_960u64).step_by(997) {
        let mut found = [0u8; 1536];
        ours.read_at(table * 32_768, &mut found).unwrap();
        assert!(found[..512] == [0; 512] && found[1024..] == [0; 512]);
        assert_eq!(found[512..1024], [table as u8 | 1; 512]);
    }
}

#[test]
fn goes_on_with_an_image_of_qemu_and_moves_its_refcount_table() {
    for (options, size) in [
        ("cluster_size=512", 24u64 << 20),
        ("cluster_size=1k", 40 << 20),
        ("cluster_size=64k", 24 << 20),
        ("cluster_size=4k,preallocation=metadata", (8 << 20) + 512),
        ("cluster_size=64k,lazy_refcounts=on,compression_type=zstd", 8 << 20),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        img(path, &format!("create -q -f qcow2 -o {options} image.qcow2 {size}"));
        io(path, "image.qcow2", &["write -P 1 0 1M", "write -z 512k 128k", "write -z -u 768k 64k"]);
        let mut content = qcow2_common::qemu_bytes(path, "image.qcow2");
        let writer = Writer::open(Arc::new(DiskFile::open(&path.join("image.qcow2")).unwrap())).unwrap();
        for start in (600 << 10..size - 65_536).step_by(70_000) {
            let start = start / 512 * 512;
            content[start as usize..start as usize + 65_536].fill(start as u8 | 1);
            writer.write_at(start, &content[start as usize..start as usize + 65_536]).unwrap();
        }
        writer.flush().unwrap();
        check(path, "image.qcow2", false);
        assert!(content == qcow2_common::qemu_bytes(path, "image.qcow2"), "{options}");
        qcow2_common::agrees(path, "image.qcow2", options);
    }
}

#[test]
fn does_not_go_on_with_what_it_cannot_keep_right() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    std::fs::write(path.join("disk.raw"), vec![5u8; 1 << 20]).unwrap();
    for (line, snapshot) in [
        ("create -q -f qcow2 -o compat=0.10 image.qcow2 1M", false),
        ("create -q -f qcow2 -o extended_l2=on image.qcow2 1M", false),
        ("create -q -f qcow2 -o refcount_bits=64 image.qcow2 1M", false),
        ("create -q -f qcow2 -b disk.raw -F raw image.qcow2", false),
        ("convert -c -f raw -O qcow2 disk.raw image.qcow2", false),
        ("create -q -f qcow2 image.qcow2 1M", true),
    ] {
        img(path, line);
        if snapshot {
            img(path, "snapshot -c one image.qcow2");
        }
        let before = std::fs::read(path.join("image.qcow2")).unwrap();
        let error = Writer::open(Arc::new(DiskFile::open(&path.join("image.qcow2")).unwrap())).err().unwrap();
        assert!(matches!(error, ImageError::Unsupported { .. }), "{line}: {error}");
        assert!(before == std::fs::read(path.join("image.qcow2")).unwrap(), "{line}: was changed");
    }
}

#[test]
fn refuses_disks_that_the_format_cannot_hold() {
    let cannot = |size, cluster_bits| {
        let made = Writer::create(Arc::new(MemoryFile::default()), CreateOptions { size, cluster_bits });
        assert!(matches!(made.err(), Some(ImageError::CannotHold { .. })), "{size} in 2^{cluster_bits}");
    };
    cannot(1 << 20, 8);
    cannot(1 << 20, 22);
    cannot(1000, 16);
    cannot(128 << 30, 9);
    cannot(4 << 50, 16);
    cannot(u64::MAX - 511, 21);
    let taken = Arc::new(MemoryFile::new(vec![1]));
    assert!(Writer::create(taken.clone(), CreateOptions::new(512)).is_err());
    assert_eq!(taken.to_vec(), [1]);
}

/// A file that remembers what was durable, and gives what a crash could leave: each 512-byte piece of each write since
/// the last flush is there or not.
#[derive(Default)]
struct CrashFile {
    now: MemoryFile,
    inner: Mutex<Crash>,
}

#[derive(Default)]
struct Crash {
    durable: Vec<u8>,
    since: Vec<Change>,
    images: Vec<Vec<u8>>,
    draw: u64,
}

enum Change {
    Length(u64),
    Bytes(u64, Vec<u8>),
}

impl CrashFile {
    /// Images that crashes at the moments since the last call could have left.
    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.inner.lock().unwrap().images)
    }

    fn changed(&self, change: Change) {
        let mut inner = self.inner.lock().unwrap();
        inner.since.push(change);
        let mut draw = Draw(inner.draw);
        if draw.below(6) == 0 {
            let image = inner.crash(&mut draw);
            inner.images.push(image);
        }
        inner.draw = draw.0;
    }
}

impl Crash {
    fn crash(&self, draw: &mut Draw) -> Vec<u8> {
        let mut image = self.durable.clone();
        // Sometimes nearly all is there, sometimes nearly nothing.
        let share = draw.below(9);
        for change in &self.since {
            match change {
                Change::Length(length) if draw.below(8) < share => image.resize(*length as usize, 0),
                Change::Length(_) => {}
                Change::Bytes(offset, bytes) => {
                    let mut at = 0;
                    while at < bytes.len() {
                        let start = *offset as usize + at;
                        let length = (512 - start % 512).min(bytes.len() - at);
                        if draw.below(8) < share {
                            image.resize(image.len().max(start + length), 0);
                            image[start..start + length].copy_from_slice(&bytes[at..at + length]);
                        }
                        at += length;
                    }
                }
            }
        }
        image
    }
}

impl GrowableFile for CrashFile {
    fn len(&self) -> Result<u64, DeviceError> {
        self.now.len()
    }
    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        self.now.set_len(length)?;
        self.changed(Change::Length(length));
        Ok(())
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.now.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.now.write_at(offset, buf)?;
        self.changed(Change::Bytes(offset, buf.to_vec()));
        Ok(())
    }
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.write_at(range.start, &vec![0; range.len() as usize])
    }
    fn flush(&self) -> Result<(), DeviceError> {
        let durable = self.now.to_vec();
        let mut inner = self.inner.lock().unwrap();
        inner.durable = durable;
        inner.since.clear();
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zeros(u64, u64),
    Flush,
    Reopen,
}

const SECTORS: u64 = 1500;

/// The sectors of an image that an overlay lies over, each by the byte that fills it; smaller or larger than the overlay.
fn base() -> impl Strategy<Value = Option<Vec<u8>>> {
    let run = (prop_oneof![Just(0u8), 1..=255u8], prop_oneof![1..8usize, 1..400usize]);
    let runs = prop::collection::vec(run, 0..12);
    prop::option::of(
        runs.prop_map(|runs| runs.into_iter().flat_map(|(fill, length)| vec![fill; length]).collect()),
    )
}

fn sectors(fills: &[u8]) -> Vec<u8> {
    fills.iter().flat_map(|&byte| [byte; 512]).collect()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0..SECTORS, prop_oneof![1..8u64, 1..300u64]);
    let step = prop_oneof![
        6 => (place(), 1..=255u8).prop_map(|((at, length), fill)| Step::Write(at, length, fill)),
        2 => place().prop_map(|(at, length)| Step::Zeros(at, length)),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Each sector is filled with one byte, so a crash image is judged sector by sector: it shows what was flushed or
    /// something that was written since; never anything else, and its tables pass the examination of `Writer::open`.
    #[test]
    fn writes_equal_a_model_and_crashes_leave_only_leaks(
        steps in steps(),
        bits in prop_oneof![Just(9u32), Just(10), Just(12), Just(16)],
        base in base(),
        seed in any::<u64>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let below = sectors(base.as_deref().unwrap_or_default());
        std::fs::write(folder.path().join("base.raw"), &below).unwrap();
        let over = base.is_some().then(|| Base {
            name: folder.path().join("base.raw").to_str().unwrap().to_owned(),
            format: ImageFormat::Raw,
            disk: Arc::new(MemoryDevice::new(below.clone())),
        });
        let open = |file: Arc<dyn GrowableFile>| match &over {
            None => Writer::open(file).unwrap(),
            Some(base) => Writer::open_overlay(file, base).unwrap(),
        };
        let reader = |image: Vec<u8>| {
            Reader::open(Arc::new(MemoryDevice::new(image)), &Only(over.clone())).unwrap()
        };
        let size = SECTORS * 512;
        let file = Arc::new(CrashFile::default());
        file.inner.lock().unwrap().draw = seed;
        let options = CreateOptions { size, cluster_bits: bits };
        let mut writer = match &over {
            None => Writer::create(file.clone(), options).unwrap(),
            Some(base) => Writer::create_overlay(file.clone(), options, base).unwrap(),
        };
        file.take();
        let mut model = base.clone().unwrap_or_default();
        model.resize(SECTORS as usize, 0);
        let mut possible: Vec<Vec<u8>> = model.iter().map(|&byte| vec![byte]).collect();
        for (turn, step) in steps.iter().enumerate() {
            match *step {
                Step::Write(at, length, fill) => {
                    let end = (at + length).min(SECTORS);
                    for sector in at..end {
                        model[sector as usize] = fill;
                        possible[sector as usize].push(fill);
                    }
                    writer.write_at(at * 512, &vec![fill; (end - at) as usize * 512]).unwrap();
                }
                Step::Zeros(at, length) => {
                    let end = (at + length).min(SECTORS);
                    for sector in at..end {
                        model[sector as usize] = 0;
                        possible[sector as usize].push(0);
                    }
                    writer.write_zeros(ByteRange { start: at * 512, end: end * 512 }).unwrap();
                }
                Step::Flush => writer.flush().unwrap(),
                Step::Reopen => {
                    writer.flush().unwrap();
                    drop(writer);
                    writer = open(file.clone());
                }
            }
            for (index, image) in file.take().into_iter().enumerate() {
                let crashed = reader(image.clone());
                let all = qcow2_common::bytes(&crashed);
                for (sector, bytes) in all.chunks(512).enumerate() {
                    prop_assert!(
                        bytes.iter().all(|&byte| byte == bytes[0]) && possible[sector].contains(&bytes[0]),
                        "after {:?} sector {} holds {}, possible {:?}", step, sector, bytes[0], possible[sector]
                    );
                }
                if (turn + index) % 16 == 0 {
                    std::fs::write(folder.path().join("crashed.qcow2"), &image).unwrap();
                    check(folder.path(), "crashed.qcow2", true);
                }
                // Going on after the crash: nothing leaked is left, and all that was there still is.
                let rest = Arc::new(MemoryFile::new(image));
                let again = open(rest.clone());
                prop_assert!(qcow2_common::bytes(&again) == all);
                again.write_at(0, &[0xEE; 40_960]).unwrap();
                again.flush().unwrap();
                if (turn + index) % 16 == 0 {
                    std::fs::write(folder.path().join("again.qcow2"), rest.to_vec()).unwrap();
                    check(folder.path(), "again.qcow2", false);
                }
                let found = qcow2_common::bytes(&reader(rest.to_vec()));
                prop_assert!(found[..40_960] == [0xEE; 40_960] && found[40_960..] == all[40_960..]);
            }
            if matches!(step, Step::Flush | Step::Reopen) {
                possible = model.iter().map(|&byte| vec![byte]).collect();
            }
            conformance::examine(&writer, &sectors(&model));
        }
        writer.flush().unwrap();
        let expected = sectors(&model);
        conformance::examine(&reader(file.now.to_vec()), &expected);
        std::fs::write(folder.path().join("end.qcow2"), file.now.to_vec()).unwrap();
        check(folder.path(), "end.qcow2", false);
        prop_assert!(qcow2_common::qemu_bytes(folder.path(), "end.qcow2") == expected);
    }
}

/// Fails every flush from a given one on.
struct FailingFlush {
    below: MemoryFile,
    left: Mutex<u32>,
}

impl GrowableFile for FailingFlush {
    fn len(&self) -> Result<u64, DeviceError> {
        self.below.len()
    }
    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        self.below.set_len(length)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.below.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.below.write_at(offset, buf)
    }
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.below.punch(range)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        let mut left = self.left.lock().unwrap();
        if *left == 1 {
            *left = 9;
            return Err(DeviceError::ReadOnly { object: "test".to_owned() });
        }
        *left -= 1;
        Ok(())
    }
}

#[test]
fn a_failed_flush_is_final() {
    for fails in 4..7 {
        let file = Arc::new(FailingFlush { below: MemoryFile::default(), left: Mutex::new(fails) });
        let writer = Writer::create(file.clone(), CreateOptions::new(1 << 20)).unwrap();
        writer.write_at(0, &[1; 512]).unwrap();
        let first = writer.flush();
        writer.write_at(65_536, &[1; 512]).ok();
        if first.is_ok() {
            writer.flush().unwrap_err();
        }
        writer.flush().unwrap_err();
        writer.write_at(0, &[2; 512]).unwrap_err();
        writer.write_zeros(ByteRange { start: 0, end: 512 }).unwrap_err();
        // The file below works again; what is there is still a consistent image.
        Writer::open(Arc::new(MemoryFile::new(file.below.to_vec()))).unwrap();
    }
}

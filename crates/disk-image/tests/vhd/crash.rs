//! A writer against a model, with reopening and crashes.
//!
//! The storage keeps what was flushed apart from what was only written. A crash keeps any part of the latter, sector
//! by sector. Then each sector of the disk must hold what was flushed or one of the contents written since.

use std::sync::{Arc, Mutex};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, MemoryDevice, MemoryFile, WritableDevice};
use disk_image::NoParents;
use disk_image::vhd::{CreateOptions, Kind, ParentLink, Reader, Writer};
use proptest::prelude::*;

use crate::{ID, Named, image_of, read_all, small};

enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

struct CrashFile {
    now: MemoryFile,
    durable: Mutex<Vec<u8>>,
    since: Mutex<Vec<Change>>,
}

impl CrashFile {
    fn new(bytes: Vec<u8>) -> Arc<CrashFile> {
        Arc::new(CrashFile {
            now: MemoryFile::new(bytes.clone()),
            durable: Mutex::new(bytes),
            since: Mutex::default(),
        })
    }

    /// The bytes after a crash; `seed` chooses what had arrived.
    fn crash(&self, mut seed: u64) -> Vec<u8> {
        let mut draw = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut bytes = self.durable.lock().unwrap().clone();
        // None, all, or a share of the changes.
        let share = draw(6);
        for change in self.since.lock().unwrap().iter() {
            match change {
                Change::Length(length) if draw(5) < share => bytes.resize(*length as usize, 0),
                Change::Length(_) => {}
                Change::Write(offset, data) => {
                    let mut at = 0;
                    while at < data.len() {
                        let position = *offset as usize + at;
                        let length = (512 - position % 512).min(data.len() - at);
                        if draw(5) < share {
                            if bytes.len() < position + length {
                                bytes.resize(position + length, 0);
                            }
                            bytes[position..position + length].copy_from_slice(&data[at..at + length]);
                        }
                        at += length;
                    }
                }
            }
        }
        bytes
    }
}

impl GrowableFile for CrashFile {
    fn len(&self) -> Result<u64, DeviceError> {
        self.now.len()
    }
    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        self.since.lock().unwrap().push(Change::Length(length));
        self.now.set_len(length)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        GrowableFile::read_at(&self.now, offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        GrowableFile::write_at(&self.now, offset, buf)?;
        // Whole sectors arrive, with what they held at that moment.
        let end = (offset + buf.len() as u64).next_multiple_of(512).min(self.now.len()?);
        let first = offset / 512 * 512;
        let mut sectors = vec![0; (end - first) as usize];
        GrowableFile::read_at(&self.now, first, &mut sectors)?;
        self.since.lock().unwrap().push(Change::Write(first, sectors));
        Ok(())
    }
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.write_at(range.start, &vec![0; range.len() as usize])
    }
    fn flush(&self) -> Result<(), DeviceError> {
        *self.durable.lock().unwrap() = self.now.to_vec();
        self.since.lock().unwrap().clear();
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { at: usize, length: usize, byte: u8 },
    Zeros { at: usize, length: usize },
    Flush,
    Reopen,
    Crash(u64),
}

const SIZE: usize = 96 << 10;

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..SIZE, prop_oneof![1..600usize, 1..20_000usize], any::<bool>());
    let settle = |(at, length, whole): (usize, usize, bool)| {
        let (at, length) = if whole { (at / 512 * 512, length.next_multiple_of(512)) } else { (at, length) };
        (at, length.min(SIZE - at))
    };
    prop_oneof![
        6 => (place(), 1..=255u8)
            .prop_map(move |(place, byte)| { let (at, length) = settle(place); Step::Write { at, length, byte } }),
        2 => place().prop_map(move |place| { let (at, length) = settle(place); Step::Zeros { at, length } }),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        2 => any::<u64>().prop_map(Step::Crash),
    ]
}

/// What each sector may hold after a crash; the last one is what it holds now.
struct Model {
    sectors: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn settled(content: &[u8]) -> Model {
        Model { sectors: content.chunks(512).map(|sector| vec![sector.to_vec()]).collect() }
    }
    fn now(&self) -> Vec<u8> {
        self.sectors.iter().flat_map(|values| values.last().unwrap().clone()).collect()
    }
    fn write(&mut self, at: usize, bytes: &[u8]) {
        let mut now = self.now();
        now[at..at + bytes.len()].copy_from_slice(bytes);
        for sector in at / 512..(at + bytes.len()).div_ceil(512) {
            self.sectors[sector].push(now[sector * 512..(sector + 1) * 512].to_vec());
        }
    }
    fn flush(&mut self) {
        *self = Model::settled(&self.now());
    }
    fn crashed(&mut self, found: &[u8]) {
        for (index, (sector, values)) in found.chunks(512).zip(&self.sectors).enumerate() {
            assert!(
                values.iter().any(|value| value == sector),
                "sector {index} holds {:?}..., which was neither flushed nor written since ({} contents)",
                &sector[..8],
                values.len()
            );
        }
        *self = Model::settled(found);
    }
}

fn run(kind: Kind, block_size: u32, steps: Vec<Step>) {
    let mut parents = Named::default();
    let mut base = vec![0u8; SIZE];
    let file = CrashFile::new(Vec::new());
    let options = CreateOptions { kind, unique_id: [1; 16], ..small(SIZE as u64, block_size) };
    let writer = if kind == Kind::Differencing {
        for (at, byte) in base.iter_mut().enumerate() {
            *byte = if at / 5000 % 2 == 0 { 0xD0 | (at / 512 % 16) as u8 } else { 0 };
        }
        let image = image_of(&base, &CreateOptions::fixed(SIZE as u64, ID));
        parents.0.insert("base".to_owned(), Arc::new(MemoryDevice::new(image)));
        let disk = Arc::new(MemoryDevice::new(base.clone()));
        let link = ParentLink {
            disk,
            unique_id: ID,
            time_stamp: 0,
            relative_name: "base".to_owned(),
            absolute_name: None,
        };
        Writer::create_child(file.clone(), &options, link)
    } else {
        Writer::create(file.clone(), &options)
    };
    let mut writer = writer.unwrap();
    let mut file = file;
    let mut model = Model::settled(&base);
    for step in steps {
        match step {
            Step::Write { at, length, byte } => {
                let bytes: Vec<u8> = (0..length).map(|index| byte.wrapping_add(index as u8 / 64)).collect();
                writer.write_at(at as u64, &bytes).unwrap();
                model.write(at, &bytes);
            }
            Step::Zeros { at, length } => {
                writer.write_zeros(ByteRange { start: at as u64, end: (at + length) as u64 }).unwrap();
                model.write(at, &vec![0; length]);
            }
            Step::Flush => {
                writer.flush().unwrap();
                model.flush();
            }
            Step::Reopen => {
                writer.flush().unwrap();
                model.flush();
                drop(writer);
                writer = Writer::open(file.clone(), &parents).unwrap();
            }
            Step::Crash(seed) => {
                let bytes = file.crash(seed);
                let reader = Reader::open(Arc::new(MemoryDevice::new(bytes.clone())), &parents).unwrap();
                model.crashed(&read_all(&reader));
                file = CrashFile::new(bytes);
                writer = Writer::open(file.clone(), &parents).unwrap();
                // And again in the middle of what opening repairs.
                let bytes = file.crash(seed.rotate_left(17));
                file = CrashFile::new(bytes);
                writer = match Writer::open(file.clone(), &parents) {
                    Ok(again) => again,
                    Err(error) => panic!("a crash while opening: {error} ({} bytes)", writer.size()),
                };
            }
        }
        assert!(read_all(&writer) == model.now(), "the writer reads something else");
    }
    writer.flush().unwrap();
    let reader = Reader::open(Arc::new(MemoryDevice::new(file.now.to_vec())), &parents).unwrap();
    block_io::conformance::examine(&reader, &model.now());
    let image = file.now.to_vec();
    assert_eq!(&image[image.len() - 512..][..8], b"conectix", "the footer is at the end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_was_flushed_survives(
        kind in prop_oneof![Just(Kind::Fixed), Just(Kind::Dynamic), Just(Kind::Differencing)],
        block_size in prop_oneof![Just(512u32), Just(4096), Just(8192), Just(65_536)],
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        run(kind, block_size, steps);
    }
}

/// The file has grown and the new footer has not arrived: the copy at the front opens it, here and in QEMU.
#[test]
fn a_lost_footer_is_put_back() {
    let mut image = image_of(&[7; 4096], &small(SIZE as u64, 4096));
    let length = image.len();
    let data_end = length - 512;
    image[data_end..].fill(0);
    image.resize(length + 4608, 0);
    let reader = Reader::open(Arc::new(MemoryDevice::new(image.clone())), &NoParents).unwrap();
    assert_eq!(reader.info().footer, disk_image::vhd::FooterPlace::Front);
    let file = Arc::new(MemoryFile::new(image));
    drop(Writer::open(file.clone(), &NoParents).unwrap());
    let image = file.to_vec();
    assert_eq!(image.len(), length, "what no entry refers to is cut off");
    assert_eq!(image[..512], image[length - 512..]);
}

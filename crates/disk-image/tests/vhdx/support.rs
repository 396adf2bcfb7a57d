//! What the tests share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, MemoryDevice, MemoryFile};
use disk_image::vhdx::{ChildOptions, CreateKind, CreateOptions, Guid, Ids, Reader, Writer};
use disk_image::{ImageError, ImageFormat, NoParents, ParentReference, Parents};

pub const MIB: u64 = 1 << 20;

pub fn id(number: u8) -> Guid {
    [number; 16]
}

pub fn options(size: u64, kind: CreateKind) -> CreateOptions {
    CreateOptions {
        size,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        block_size: 1 << 20,
        kind,
        ids: Ids { file_write: id(1), data_write: id(2), virtual_disk: id(3) },
    }
}

pub fn child_options(number: u8, parent: &str) -> ChildOptions {
    ChildOptions {
        block_size: 1 << 20,
        file_write: id(number),
        data_write: id(number + 1),
        relative_path: Some(format!(".\\{parent}")),
        volume_path: None,
        absolute_win32_path: Some(format!("\\\\?\\C:\\disks\\{parent}")),
    }
}

pub fn device(bytes: &[u8]) -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::new(bytes.to_vec()))
}

pub fn open(bytes: &[u8]) -> Result<Reader, ImageError> {
    Reader::open(device(bytes), &NoParents)
}

pub fn refused(bytes: &[u8]) -> ImageError {
    match open(bytes) {
        Ok(_) => panic!("the image should have been refused"),
        Err(error) => error,
    }
}

pub fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0xAA; device.size() as usize];
    device.read_at(0, &mut bytes).unwrap();
    bytes
}

pub fn new_file() -> Arc<MemoryFile> {
    Arc::new(MemoryFile::default())
}

/// Image files by the last part of their name; what is asked for is kept.
#[derive(Default, Clone)]
pub struct Folder {
    pub files: Arc<Mutex<HashMap<String, Arc<MemoryDevice>>>>,
    pub asked: Arc<Mutex<Vec<ParentReference>>>,
}

impl Folder {
    pub fn add(&self, name: &str, bytes: Vec<u8>) {
        self.files.lock().unwrap().insert(name.to_owned(), Arc::new(MemoryDevice::new(bytes)));
    }

    pub fn reader(&self, name: &str) -> Result<Reader, ImageError> {
        let file = self.files.lock().unwrap().get(name).unwrap().clone();
        Reader::open(file, self)
    }
}

impl Parents for Folder {
    fn open(
        &self,
        reference: &ParentReference,
    ) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        self.asked.lock().unwrap().push(reference.clone());
        let name = reference.names[0].rsplit('\\').next().unwrap();
        match self.files.lock().unwrap().get(name) {
            Some(file) => Ok((file.clone(), Arc::new(self.clone()))),
            None => Err(ImageError::NotAllowed {
                format: ImageFormat::Vhdx,
                reference: name.to_owned(),
                reason: "no such file".to_owned(),
            }),
        }
    }
}

/// A dynamic image of `size` bytes in which `content` was written at the offsets given.
pub fn image(options: CreateOptions, content: &[(u64, &[u8])]) -> Vec<u8> {
    use block_io::WritableDevice;
    let file = new_file();
    let writer = Writer::create(file.clone(), options).unwrap();
    for (offset, bytes) in content {
        writer.write_at(*offset, bytes).unwrap();
    }
    writer.flush().unwrap();
    file.to_vec()
}

/// A small step of a file, as a journal of it.
#[derive(Clone)]
pub enum Step {
    Write(u64, Vec<u8>),
    Length(u64),
    Punch(ByteRange),
    Flush,
}

/// A file that remembers every step, so that a test can stop the power at any of them.
#[derive(Default)]
pub struct JournalFile {
    now: MemoryFile,
    steps: Mutex<Vec<Step>>,
}

impl JournalFile {
    pub fn steps(&self) -> usize {
        self.steps.lock().unwrap().len()
    }

    /// The file after a stop before step `stop`: everything up to the last flush before it, and of the steps after
    /// that flush what `keep` says, asked once for each sector of 512 bytes of a write and once for other steps.
    pub fn after_crash(&self, stop: usize, mut keep: impl FnMut() -> bool) -> Vec<u8> {
        let steps = self.steps.lock().unwrap();
        let steps = &steps[..stop];
        let flushed = steps.iter().rposition(|step| matches!(step, Step::Flush)).map_or(0, |at| at + 1);
        let mut bytes: Vec<u8> = Vec::new();
        for (index, step) in steps.iter().enumerate() {
            let certain = index < flushed;
            match step {
                Step::Flush => {}
                Step::Length(length) => {
                    if certain || keep() {
                        bytes.resize(*length as usize, 0);
                    }
                }
                Step::Punch(range) => {
                    if certain || keep() {
                        let end = (range.end as usize).min(bytes.len());
                        bytes[(range.start as usize).min(end)..end].fill(0);
                    }
                }
                Step::Write(offset, written) => {
                    for (sector, part) in written.chunks(512).enumerate() {
                        let at = *offset as usize + sector * 512;
                        if certain || keep() {
                            if bytes.len() < at + part.len() {
                                bytes.resize(at + part.len(), 0);
                            }
                            bytes[at..at + part.len()].copy_from_slice(part);
                        }
                    }
                }
            }
        }
        bytes
    }

    fn step(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
    }
}

impl GrowableFile for JournalFile {
    fn len(&self) -> Result<u64, DeviceError> {
        self.now.len()
    }
    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        self.step(Step::Length(length));
        self.now.set_len(length)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.now.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.step(Step::Write(offset, buf.to_vec()));
        self.now.write_at(offset, buf)
    }
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.step(Step::Punch(range));
        self.now.punch(range)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.step(Step::Flush);
        Ok(())
    }
}

/// A small generator for tests that need many numbers from one seed.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

pub fn put(bytes: &mut [u8], at: u64, what: &[u8]) {
    bytes[at as usize..at as usize + what.len()].copy_from_slice(what);
}

pub fn u64_at(bytes: &[u8], at: u64) -> u64 {
    u64::from_le_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Puts the right checksum into a structure at `at` with `length` bytes.
pub fn reseal(bytes: &mut [u8], at: u64, length: u64) {
    put(bytes, at + 4, &[0; 4]);
    let sum = crc32c::crc32c(&bytes[at as usize..(at + length) as usize]);
    put(bytes, at + 4, &sum.to_le_bytes());
}

/// Where our writer puts things.
pub const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
pub const LOG: u64 = MIB;
pub const METADATA: u64 = 2 * MIB;
pub const BAT: u64 = 3 * MIB;

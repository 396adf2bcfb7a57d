//! What the fuzz targets share: images as short lists of extents, checksums put right, and a walk over a disk.
//!
//! An image of 5 MiB that is nearly all zeros is a bad input: most mutations hit nothing. So an input is
//! [options byte][size in sectors: u32][sector: u32, length: u16, bytes]..., and checksums are made right before the
//! image is opened (unless the options say otherwise): mutations reach what lies behind them.
//!
//! [`run`] is what each target does with an input. The library fuzzer calls it here; the tests of `disk-image` call it
//! for some seconds with a mutator of their own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, WritableDevice};
use disk_image::{ImageError, ImageFormat, NoParents, ParentReference, Parents, probe, qcow2, vhd, vhdx};

const PAGE: u64 = 4096;
/// Largest file: beyond it only tables grow that are walked entry by entry.
const MAX_FILE: u64 = 256 << 20;
const STEPS: usize = 64;

/// A file of zeros with some pages.
#[derive(Clone, Default)]
struct Pages {
    size: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Pages {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (&index, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((index * PAGE).max(offset), (index * PAGE + PAGE).min(end));
            if from < to {
                let inside = (from - index * PAGE) as usize..(to - index * PAGE) as usize;
                buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&page[inside]);
            }
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) {
        let end = offset + buf.len() as u64;
        self.size = self.size.max(end);
        let mut at = offset;
        while at < end {
            let index = at / PAGE;
            let to = (index * PAGE + PAGE).min(end);
            let page = self.pages.entry(index).or_insert_with(|| vec![0; PAGE as usize]);
            page[(at - index * PAGE) as usize..(to - index * PAGE) as usize]
                .copy_from_slice(&buf[(at - offset) as usize..(to - offset) as usize]);
            if page.iter().all(|&byte| byte == 0) {
                self.pages.remove(&index);
            }
            at = to;
        }
    }
}

/// A file of the fuzzer, readable and growable.
#[derive(Default)]
pub struct SparseFile(Mutex<Pages>);

impl SparseFile {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy that later writes do not touch.
    pub fn copy(&self) -> Arc<SparseFile> {
        Arc::new(SparseFile(Mutex::new(self.pages().clone())))
    }
}

impl BlockDevice for SparseFile {
    fn size(&self) -> u64 {
        self.pages().size
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.pages().read(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let pages = self.pages();
        Ok(pages
            .pages
            .range(from / PAGE..)
            .map(|(index, _)| ByteRange {
                start: (index * PAGE).max(from),
                end: (index * PAGE + PAGE).min(pages.size),
            })
            .find(|range| range.start < range.end))
    }
}

impl GrowableFile for SparseFile {
    fn len(&self) -> Result<u64, DeviceError> {
        Ok(self.pages().size)
    }
    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        let mut pages = self.pages();
        if length < pages.size {
            pages.pages.retain(|&index, _| index * PAGE < length);
            let tail = length % PAGE;
            if tail != 0
                && let Some(page) = pages.pages.get_mut(&(length / PAGE))
            {
                page[tail as usize..].fill(0);
            }
        }
        pages.size = length;
        Ok(())
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.pages().read(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.pages().write(offset, buf);
        Ok(())
    }
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        let mut pages = self.pages();
        DeviceError::check_bounds(range.start, range.len(), pages.size)?;
        let inside: Vec<u64> =
            pages.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)).map(|p| *p.0).collect();
        for index in inside {
            let (from, to) = ((index * PAGE).max(range.start), (index * PAGE + PAGE).min(range.end));
            pages.write(from, &vec![0; (to - from) as usize]);
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// An input as it is used: what to do, and the image.
pub struct Input {
    /// Free for the target; bit 7 keeps checksums as they are.
    pub options: u8,
    /// The image.
    pub file: Arc<SparseFile>,
}

/// Reads an input; `None` if it is too short to be one.
pub fn input(data: &[u8]) -> Option<Input> {
    let (&options, rest) = data.split_first()?;
    let (size, mut rest) = rest.split_first_chunk::<4>()?;
    let size = u64::from(u32::from_le_bytes(*size)) * 512 % (MAX_FILE + 512);
    let mut pages = Pages { size, pages: BTreeMap::new() };
    while let Some((head, tail)) = rest.split_first_chunk::<6>() {
        let sector = u64::from(u32::from_le_bytes([head[0], head[1], head[2], head[3]]));
        let length = usize::from(u16::from_le_bytes([head[4], head[5]])).min(tail.len());
        let (bytes, after) = tail.split_at(length);
        let offset = sector * 512;
        let length = size.saturating_sub(offset).min(bytes.len() as u64);
        if length > 0 {
            pages.write(offset, &bytes[..length as usize]);
        }
        rest = after;
    }
    Some(Input { options, file: Arc::new(SparseFile(Mutex::new(pages))) })
}

/// The input that gives `image`. Sectors of zeros are left out, and trailing zeros of runs.
pub fn encode(options: u8, image: &[u8]) -> Vec<u8> {
    let mut input = vec![options];
    input.extend((image.len().div_ceil(512) as u32).to_le_bytes());
    for (index, sector) in image.chunks(512).enumerate() {
        if let Some(last) = sector.iter().rposition(|&byte| byte != 0) {
            input.extend((index as u32).to_le_bytes());
            input.extend((last as u16 + 1).to_le_bytes());
            input.extend(&sector[..=last]);
        }
    }
    input
}

/// Makes the checksums of footers and header of a VHD right.
pub fn seal_vhd(file: &SparseFile) {
    let mut pages = file.pages();
    let last = pages.size.saturating_sub(512);
    for (offset, length, field) in [(0u64, 512usize, 64usize), (last, 512, 64), (512, 1024, 36)] {
        let mut bytes = vec![0; length];
        if pages.read(offset, &mut bytes).is_err()
            || !(bytes.starts_with(b"conectix") || bytes.starts_with(b"cxsparse"))
        {
            continue;
        }
        bytes[field..field + 4].fill(0);
        let sum = !bytes.iter().fold(0u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
        bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
        pages.write(offset, &bytes);
    }
}

/// Makes the checksums of headers, region tables and log entries of a VHDX right.
pub fn seal_vhdx(file: &SparseFile) {
    let mut pages = file.pages();
    let mut seals: Vec<(u64, u64)> =
        vec![(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10)];
    for (&index, page) in pages.pages.range(256..) {
        if page.starts_with(b"loge") {
            let length = u32::from_le_bytes([page[8], page[9], page[10], page[11]]);
            seals.push((index * PAGE, u64::from(length).min(1 << 20)));
        }
    }
    for (offset, length) in seals {
        let mut bytes = vec![0; length as usize];
        if length < 8 || pages.read(offset, &mut bytes).is_err() {
            continue;
        }
        if ![b"head", b"regi", b"loge"].iter().any(|magic| bytes.starts_with(*magic)) {
            continue;
        }
        bytes[4..8].fill(0);
        let sum = crc32c::crc32c(&bytes);
        pages.write(offset + 4, &sum.to_le_bytes());
    }
}

/// Gives the image itself for every reference: a chain without end.
pub struct Itself(pub Arc<SparseFile>);

impl Parents for Itself {
    fn open(&self, _: &ParentReference) -> Result<(Arc<dyn BlockDevice>, Arc<dyn Parents>), ImageError> {
        Ok((self.0.clone(), Arc::new(Itself(self.0.clone()))))
    }
}

/// The parents that the options ask for.
pub fn parents(input: &Input) -> Arc<dyn Parents> {
    if input.options & 1 == 0 { Arc::new(NoParents) } else { Arc::new(Itself(input.file.copy())) }
}

/// Walks and reads a disk of hostile bytes. Errors are fine; panics, endless loops and broken promises are not.
pub fn walk(disk: &dyn BlockDevice) {
    let size = disk.size();
    let mut buf = vec![0u8; 65_536];
    let mut read = |offset: u64, length: u64| -> Option<bool> {
        let part = &mut buf[..length.min(65_536).min(size.saturating_sub(offset)) as usize];
        disk.read_at(offset, part).ok().map(|()| part.iter().all(|&byte| byte == 0))
    };
    let mut at = 0;
    for _ in 0..STEPS {
        let Ok(found) = disk.next_allocated(at) else { break };
        let (start, end) = found.map_or((size, size), |range| (range.start, range.end));
        assert!(
            at <= start && end <= size && (found.is_none() || start < end),
            "{at}: {start}..{end} of {size}"
        );
        if start > at {
            assert_ne!(read(at, (start - at).min(8192)), Some(false), "data before {start}");
            assert_ne!(read(start - 1, 1), Some(false), "data before {start}");
        }
        if found.is_none() {
            break;
        }
        let _ = read(start, end - start);
        at = end;
    }
    for offset in [0, 1, 511, size / 2, size / 3 * 2, size.saturating_sub(65_536), size.saturating_sub(1)] {
        let _ = read(offset, 65_536);
    }
    assert!(disk.read_at(size, &mut [0]).is_err(), "a read past the end");
    assert!(disk.read_at(u64::MAX, &mut [0, 0]).is_err(), "a read past the end");
}

/// Writes on in a hostile image. What `write_at` accepts must be read back.
pub fn write_on(disk: &dyn WritableDevice) {
    let size = disk.size();
    for (turn, offset) in [0, size / 2 / 512 * 512 + 100, size.saturating_sub(700)].into_iter().enumerate() {
        let length = size.saturating_sub(offset).min(700) as usize;
        let bytes = vec![turn as u8 + 1; length];
        if disk.write_at(offset, &bytes).is_ok() {
            let mut there = vec![0; length];
            if disk.read_at(offset, &mut there).is_ok() {
                assert!(there == bytes, "what was written at {offset} is not there");
            }
        }
    }
    let _ = disk.write_zeros(ByteRange { start: 0, end: size.min(5000) });
    let _ = disk.flush();
}

/// The targets by name.
pub const TARGETS: [&str; 4] = ["probe", "vhd", "vhdx", "qcow2"];

/// What the target does with an input; panics if a promise is broken.
pub fn run(target: &str, data: &[u8]) {
    let Some(input) = input(data) else { return };
    let parents = parents(&input);
    let writes = input.options & 2 != 0;
    let sealed = input.options & 0x80 == 0;
    match target {
        "probe" => run_probe(&input),
        "vhd" => {
            if sealed {
                seal_vhd(&input.file);
            }
            if let Ok(reader) = vhd::Reader::open(input.file.clone(), parents.as_ref()) {
                walk(&reader);
            }
            if let Some(Ok(writer)) = writes.then(|| vhd::Writer::open(input.file.copy(), parents.as_ref())) {
                write_on(&writer);
            }
        }
        "vhdx" => {
            if sealed {
                seal_vhdx(&input.file);
            }
            if let Ok(reader) = vhdx::Reader::open(input.file.clone(), parents.as_ref()) {
                walk(&reader);
            }
            if let Some(Ok(writer)) = writes.then(|| vhdx::Writer::open(input.file.copy(), parents.as_ref()))
            {
                write_on(&writer);
            }
        }
        "qcow2" => {
            if let Ok(reader) = qcow2::Reader::open(input.file.clone(), parents.as_ref()) {
                walk(&reader);
            }
            if let Some(Ok(writer)) = writes.then(|| qcow2::Writer::open(input.file.copy())) {
                write_on(&writer);
            }
        }
        other => panic!("there is no target {other}"),
    }
}

/// Any name, any bytes: a guest's bytes must never decide the format.
fn run_probe(input: &Input) {
    for name in ["disk", "disk.raw", "disk.img", "a.vhd.bak"] {
        let decision = probe::format_of(name, None, input.file.as_ref()).expect("a plain name");
        assert_eq!(decision.format, ImageFormat::Raw);
    }
    for name in ["disk.vhd", "disk.vhdx", "disk.qcow2", "disk.vmdk"] {
        let Ok(decision) = probe::format_of(name, None, input.file.as_ref()) else { continue };
        assert!(name.ends_with(decision.format.word()));
        if let Ok(opened) = probe::open(decision.format, input.file.clone(), &NoParents) {
            assert_eq!(opened.disk.size(), opened.info.size);
            assert!(opened.info.parents.is_empty(), "no other file may be opened here");
        }
    }
    let raw = probe::open(ImageFormat::Raw, input.file.clone(), &NoParents).expect("raw");
    walk(raw.disk.as_ref());
}

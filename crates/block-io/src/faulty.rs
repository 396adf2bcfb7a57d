//! A device that fails where a test says so.

use std::sync::Mutex;

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// What goes wrong in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Reads that touch the range fail.
    ReadFails,
    /// Writes that touch the range fail.
    WriteFails,
    /// Reads give bytes with their lowest bit flipped, and no error.
    BitsFlip,
}

/// A device with faults in given ranges.
pub struct FaultyDevice<D> {
    below: D,
    faults: Mutex<Vec<(ByteRange, Fault)>>,
}

impl<D> FaultyDevice<D> {
    /// A device without faults yet.
    pub fn new(below: D) -> FaultyDevice<D> {
        FaultyDevice { below, faults: Mutex::new(Vec::new()) }
    }

    /// Adds a fault.
    pub fn add(&self, range: ByteRange, fault: Fault) {
        self.faults().push((range, fault));
    }

    fn faults(&self) -> std::sync::MutexGuard<'_, Vec<(ByteRange, Fault)>> {
        self.faults.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn touched(&self, offset: u64, length: u64, fault: Fault) -> Vec<ByteRange> {
        let asked = ByteRange { start: offset, end: offset.saturating_add(length) };
        self.faults()
            .iter()
            .filter(|(_, kind)| *kind == fault)
            .filter_map(|(range, _)| range.intersect(&asked))
            .collect()
    }

    fn fail(&self, action: &'static str, offset: u64, length: u64) -> DeviceError {
        DeviceError::Io {
            object: "faulty device".to_owned(),
            action,
            offset,
            length,
            source: std::io::Error::other("input/output error (injected)"),
        }
    }
}

impl<D: BlockDevice> BlockDevice for FaultyDevice<D> {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.below.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let length = buf.len() as u64;
        if !self.touched(offset, length, Fault::ReadFails).is_empty() {
            return Err(self.fail("read", offset, length));
        }
        self.below.read_at(offset, buf)?;
        for range in self.touched(offset, length, Fault::BitsFlip) {
            for byte in &mut buf[(range.start - offset) as usize..(range.end - offset) as usize] {
                *byte ^= 1;
            }
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.below.next_allocated(from)
    }
}

impl<D: WritableDevice> WritableDevice for FaultyDevice<D> {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        if !self.touched(offset, buf.len() as u64, Fault::WriteFails).is_empty() {
            return Err(self.fail("write", offset, buf.len() as u64));
        }
        self.below.write_at(offset, buf)
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        if !self.touched(range.start, range.len(), Fault::WriteFails).is_empty() {
            return Err(self.fail("write", range.start, range.len()));
        }
        self.below.write_zeros(range)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.below.flush()
    }
}

//! A part of a device as a device: a partition, a volume, the payload of a fixed image.

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// `range` of a device, seen as a device of its own.
pub struct SliceDevice<D> {
    below: D,
    range: ByteRange,
}

impl<D: BlockDevice> SliceDevice<D> {
    /// The part `range` of `below`; fails if it does not lie inside.
    pub fn new(below: D, range: ByteRange) -> Result<SliceDevice<D>, DeviceError> {
        DeviceError::check_bounds(range.start, range.len(), below.size())?;
        Ok(SliceDevice { below, range })
    }

    fn shifted(&self, offset: u64, length: u64) -> Result<u64, DeviceError> {
        DeviceError::check_bounds(offset, length, self.range.len())?;
        Ok(self.range.start + offset)
    }
}

impl<D: BlockDevice> BlockDevice for SliceDevice<D> {
    fn size(&self) -> u64 {
        self.range.len()
    }

    fn logical_sector_size(&self) -> u32 {
        self.below.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let at = self.shifted(offset, buf.len() as u64)?;
        self.below.read_at(at, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.size() {
            return Ok(None);
        }
        let found = self.below.next_allocated(self.range.start + from)?;
        Ok(found.filter(|found| found.start < self.range.end).map(|found| ByteRange {
            start: found.start - self.range.start,
            end: found.end.min(self.range.end) - self.range.start,
        }))
    }
}

impl<D: WritableDevice> WritableDevice for SliceDevice<D> {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        let at = self.shifted(offset, buf.len() as u64)?;
        self.below.write_at(at, buf)
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        let at = self.shifted(range.start, range.len())?;
        self.below.write_zeros(ByteRange { start: at, end: at + range.len() })
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.below.flush()
    }
}

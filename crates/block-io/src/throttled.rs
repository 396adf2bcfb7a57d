//! A device that moves no faster than it may.

use std::sync::Arc;

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// Something that makes a caller wait until so many bytes may move. A token bucket in the product, a counter in a
/// test: this room has no clock.
pub trait Pace: Send + Sync {
    /// Returns once `bytes` may move.
    fn wait(&self, bytes: u64);
}

/// A device whose reads and writes wait for a [`Pace`].
pub struct ThrottledDevice<D> {
    below: D,
    pace: Arc<dyn Pace>,
}

impl<D> ThrottledDevice<D> {
    /// `below`, no faster than `pace` lets it.
    pub fn new(below: D, pace: Arc<dyn Pace>) -> ThrottledDevice<D> {
        ThrottledDevice { below, pace }
    }
}

impl<D: BlockDevice> BlockDevice for ThrottledDevice<D> {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.below.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.pace.wait(buf.len() as u64);
        self.below.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.below.next_allocated(from)
    }
}

impl<D: WritableDevice> WritableDevice for ThrottledDevice<D> {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.pace.wait(buf.len() as u64);
        self.below.write_at(offset, buf)
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.below.write_zeros(range)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.below.flush()
    }
}

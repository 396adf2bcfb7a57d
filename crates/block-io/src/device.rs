//! The traits and their error.

use std::sync::Arc;

use model::ByteRange;

/// Why a device could not do what was asked.
///
/// Offsets are bytes from the start of the device, as its user sees it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The range does not lie inside the device. A caller's mistake, or a table of the disk that lies.
    #[error("bytes {offset}..+{length} lie outside the device of {size} bytes")]
    OutOfBounds {
        /// Where the access began.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Bytes of the device.
        size: u64,
    },
    /// The storage below failed.
    #[error("{object}: cannot {action} {length} bytes at {offset}: {source}")]
    Io {
        /// File or device name, for a person.
        object: String,
        /// `read`, `write`, `flush`, `find data in`.
        action: &'static str,
        /// Where the access began.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The bytes are there and are not what they should be: a damaged image, a failed hash, a failed decryption.
    #[error("{object}: damaged at byte {offset}, {length} bytes: {reason}")]
    Damaged {
        /// Image, pool file or point.
        object: String,
        /// First byte of the device that cannot be had.
        offset: u64,
        /// Bytes that cannot be had.
        length: u64,
        /// What was found and what was expected.
        reason: String,
    },
    /// The device cannot be written.
    #[error("{object}: is open for reading only")]
    ReadOnly {
        /// File or device name.
        object: String,
    },
    /// The file changed its size or identity while it was open.
    #[error("{object}: changed while it was open: {reason}")]
    Changed {
        /// File or device name.
        object: String,
        /// What was expected and found.
        reason: String,
    },
}

impl DeviceError {
    /// Checks that `offset..offset + length` lies inside `size` bytes.
    pub fn check_bounds(offset: u64, length: u64, size: u64) -> Result<(), DeviceError> {
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(DeviceError::OutOfBounds { offset, length, size }),
        }
    }
}

/// A fixed number of bytes, readable at any offset.
pub trait BlockDevice: Send + Sync {
    /// Bytes of the device; constant for its life.
    fn size(&self) -> u64;

    /// Bytes of the smallest unit the disk's user addresses: 512 or 4096.
    fn logical_sector_size(&self) -> u32 {
        512
    }

    /// Fills all of `buf` from `offset`, or fails; never a short read.
    ///
    /// An empty `buf` succeeds anywhere in `0..=size`. What lies outside the device is `OutOfBounds`, never zeros.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;

    /// The first range at or after `from` that may hold data, or `None` if only zeros follow.
    ///
    /// The range is not empty, starts at or after `from` and ends within the device. It may be shorter than the
    /// whole run of data (the next call continues), so an implementation needs memory for one step only. What lies
    /// between `from` and the start of the range reads as zeros. `from` at or past the end gives `None`.
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError>;

    /// All ranges within `within` that may hold data: ascending, not empty, clipped to `within`, touching ranges
    /// merged. Each item costs one step of [`BlockDevice::next_allocated`].
    fn allocated(&self, within: ByteRange) -> Allocated<'_>
    where
        Self: Sized,
    {
        Allocated::new(self, within)
    }
}

/// A device that can be written.
pub trait WritableDevice: BlockDevice {
    /// Writes all of `buf` at `offset`, or fails. After a failure any part of the range may have been written.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError>;

    /// Makes the range read as zeros; where the storage can, without using space for it.
    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError>;

    /// Returns once all earlier writes are durable. A failed flush is final: it must not be repeated and then
    /// believed (INV-5), the whole target is in doubt.
    fn flush(&self) -> Result<(), DeviceError>;
}

/// Iterator over allocated ranges, merged and clipped. See [`BlockDevice::allocated`].
pub struct Allocated<'a> {
    device: &'a dyn BlockDevice,
    at: u64,
    end: u64,
    held: Option<ByteRange>,
}

impl<'a> Allocated<'a> {
    /// Ranges of `device` within `within`.
    pub fn new(device: &'a dyn BlockDevice, within: ByteRange) -> Allocated<'a> {
        Allocated { device, at: within.start, end: within.end.min(device.size()), held: None }
    }
}

impl Iterator for Allocated<'_> {
    type Item = Result<ByteRange, DeviceError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.at >= self.end {
                return self.held.take().map(Ok);
            }
            match self.device.next_allocated(self.at) {
                Err(error) => {
                    self.at = self.end;
                    self.held = None;
                    return Some(Err(error));
                }
                Ok(None) => self.at = self.end,
                Ok(Some(found)) => {
                    let range = ByteRange { start: found.start.max(self.at), end: found.end.min(self.end) };
                    // A found range always moves `at` forward: by contract it ends after `from`. The `max` keeps a
                    // broken implementation from looping for ever.
                    self.at = found.end.max(self.at + 1);
                    if range.start >= range.end {
                        continue;
                    }
                    match &mut self.held {
                        None => self.held = Some(range),
                        Some(held) if held.end == range.start => held.end = range.end,
                        Some(_) => return self.held.replace(range).map(Ok),
                    }
                }
            }
        }
    }
}

macro_rules! forward_device {
    ($($pointer:ty),*) => {$(
        impl<D: BlockDevice + ?Sized> BlockDevice for $pointer {
            fn size(&self) -> u64 { (**self).size() }
            fn logical_sector_size(&self) -> u32 { (**self).logical_sector_size() }
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
                (**self).read_at(offset, buf)
            }
            fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
                (**self).next_allocated(from)
            }
        }
        impl<D: WritableDevice + ?Sized> WritableDevice for $pointer {
            fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
                (**self).write_at(offset, buf)
            }
            fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> { (**self).write_zeros(range) }
            fn flush(&self) -> Result<(), DeviceError> { (**self).flush() }
        }
    )*};
}
forward_device!(&D, Box<D>, Arc<D>);

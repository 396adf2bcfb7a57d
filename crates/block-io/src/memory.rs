//! A device in memory.

use std::sync::RwLock;

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// Bytes in memory; ranges of whole zero 4 KiB pages are reported as not allocated.
pub struct MemoryDevice {
    bytes: RwLock<Vec<u8>>,
    size: u64,
    sector: u32,
}

const PAGE: usize = 4096;

impl MemoryDevice {
    /// A device holding `bytes`.
    pub fn new(bytes: Vec<u8>) -> MemoryDevice {
        MemoryDevice { size: bytes.len() as u64, bytes: RwLock::new(bytes), sector: 512 }
    }

    /// A device of `size` zero bytes.
    pub fn zeroed(size: usize) -> MemoryDevice {
        MemoryDevice::new(vec![0; size])
    }

    /// The same with another logical sector size.
    pub fn with_sector_size(mut self, sector: u32) -> MemoryDevice {
        self.sector = sector;
        self
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.read().clone()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl BlockDevice for MemoryDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.sector
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        let at = offset as usize;
        buf.copy_from_slice(&self.read()[at..at + buf.len()]);
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.size {
            return Ok(None);
        }
        let bytes = self.read();
        let first = from as usize / PAGE;
        let pages = bytes.len().div_ceil(PAGE);
        let page = |index: usize| &bytes[index * PAGE..bytes.len().min((index + 1) * PAGE)];
        let Some(start) = (first..pages).find(|&index| page(index).iter().any(|&byte| byte != 0)) else {
            return Ok(None);
        };
        let end = (start..pages).find(|&index| page(index).iter().all(|&byte| byte == 0)).unwrap_or(pages);
        Ok(Some(ByteRange {
            start: ((start * PAGE) as u64).max(from),
            end: ((end * PAGE) as u64).min(self.size),
        }))
    }
}

impl WritableDevice for MemoryDevice {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        let at = offset as usize;
        self.write()[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        DeviceError::check_bounds(range.start, range.len(), self.size)?;
        self.write()[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

//! Raw disk images: the bytes of the disk, one to one, holes kept.
//!
//! **Size.** The disk has exactly the bytes of the file, whether they are whole sectors or not: what is protected and
//! recovered is then the same file again. (QEMU shows the guest zeros up to the next sector of 512; a guest that has
//! written there has made the file longer.) A part of a sector at the end is readable and writable like the rest.
//!
//! A raw file says nothing about itself: not its sector size, which the caller knows from the machine, and not that it
//! is raw.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, WritableDevice};

use crate::{ImageError, ImageFormat};

/// The disk in a raw file.
pub struct Reader {
    file: Arc<dyn BlockDevice>,
    sector: u32,
}

impl Reader {
    /// The disk whose bytes are those of `file`; its sector size is that of `file`.
    pub fn open(file: Arc<dyn BlockDevice>) -> Reader {
        Reader { sector: file.logical_sector_size(), file }
    }

    /// The same with another logical sector size.
    pub fn with_sector_size(mut self, sector: u32) -> Reader {
        self.sector = sector;
        self
    }
}

impl BlockDevice for Reader {
    fn size(&self) -> u64 {
        self.file.size()
    }
    fn logical_sector_size(&self) -> u32 {
        self.sector
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.file.read_at(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.file.next_allocated(from)
    }
}

/// Fills a raw file.
pub struct Writer {
    file: Arc<dyn GrowableFile>,
    size: u64,
    sector: u32,
    /// A flush failed: nothing later may be believed (INV-5).
    in_doubt: AtomicBool,
}

impl Writer {
    /// Makes an empty file a disk of `size` zeros that use no space.
    pub fn create(file: Arc<dyn GrowableFile>, size: u64, sector: u32) -> Result<Writer, ImageError> {
        let length = file.len()?;
        if length != 0 {
            return Err(ImageError::CannotHold {
                format: ImageFormat::Raw,
                reason: format!("the new file is not empty but has {length} bytes"),
            });
        }
        file.set_len(size)?;
        file.flush()?;
        Ok(Writer { file, size, sector, in_doubt: AtomicBool::new(false) })
    }

    /// Goes on writing to a disk.
    pub fn open(file: Arc<dyn GrowableFile>, sector: u32) -> Result<Writer, ImageError> {
        Ok(Writer { size: file.len()?, file, sector, in_doubt: AtomicBool::new(false) })
    }

    fn believed(&self) -> Result<(), DeviceError> {
        if self.in_doubt.load(Ordering::Acquire) {
            return Err(DeviceError::Io {
                object: "raw image".to_owned(),
                action: "flush",
                offset: 0,
                length: self.size,
                source: std::io::Error::other("an earlier flush failed: the whole image is in doubt"),
            });
        }
        Ok(())
    }
}

impl BlockDevice for Writer {
    fn size(&self) -> u64 {
        self.size
    }
    fn logical_sector_size(&self) -> u32 {
        self.sector
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        self.file.read_at(offset, buf)
    }
    /// Everything: holes of a file being written are not asked for.
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        Ok((from < self.size).then_some(ByteRange { start: from, end: self.size }))
    }
}

impl WritableDevice for Writer {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        self.believed()?;
        self.file.write_at(offset, buf)
    }
    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        DeviceError::check_bounds(range.start, range.len(), self.size)?;
        self.believed()?;
        if range.is_empty() { Ok(()) } else { self.file.punch(range) }
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.believed()?;
        let flushed = self.file.flush();
        if flushed.is_err() {
            self.in_doubt.store(true, Ordering::Release);
        }
        flushed
    }
}

//! Storage that an image writer fills: it grows as the image grows.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{ByteRange, DeviceError};

/// A file that can grow, for writers of image formats.
///
/// Not a [`crate::BlockDevice`]: its length changes. Reads past the end are errors; writes past the end grow it, and
/// what lies between reads as zeros. Every method may be called from several threads.
pub trait GrowableFile: Send + Sync {
    /// Bytes now.
    fn len(&self) -> Result<u64, DeviceError>;
    /// Whether it has no bytes yet.
    fn is_empty(&self) -> Result<bool, DeviceError> {
        Ok(self.len()? == 0)
    }
    /// Grows or cuts it; what is new reads as zeros and should use no space.
    fn set_len(&self, length: u64) -> Result<(), DeviceError>;
    /// Fills all of `buf` or fails.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError>;
    /// Writes all of `buf` or fails.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError>;
    /// Makes a range inside the file read as zeros, where possible without using space.
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError>;
    /// Returns once all earlier writes are durable; a failure is final (INV-5).
    fn flush(&self) -> Result<(), DeviceError>;
}

/// A growable file of the operating system.
pub struct DiskFile {
    file: File,
    path: PathBuf,
}

impl DiskFile {
    /// Creates `path`; fails if anything of that name exists.
    pub fn create(path: &Path) -> io::Result<DiskFile> {
        let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(DiskFile { file, path: path.to_owned() })
    }

    /// Opens an existing `path` for reading and writing.
    pub fn open(path: &Path) -> io::Result<DiskFile> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        Ok(DiskFile { file, path: path.to_owned() })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn error(&self, action: &'static str, offset: u64, length: u64, source: io::Error) -> DeviceError {
        DeviceError::Io { object: self.path.display().to_string(), action, offset, length, source }
    }
}

impl GrowableFile for DiskFile {
    fn len(&self) -> Result<u64, DeviceError> {
        Ok(self.file.metadata().map_err(|source| self.error("measure", 0, 0, source))?.len())
    }

    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        self.file.set_len(length).map_err(|source| self.error("resize", length, 0, source))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        crate::file::sys::read_exact_at(&self.file, offset, buf)
            .map_err(|source| self.error("read", offset, buf.len() as u64, source))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        crate::file::sys::write_all_at(&self.file, offset, buf)
            .map_err(|source| self.error("write", offset, buf.len() as u64, source))
    }

    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        if range.is_empty() || crate::file::sys::punch_hole(&self.file, range).is_ok() {
            return Ok(());
        }
        let zeros = [0u8; 64 * 1024];
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(zeros.len() as u64);
            self.write_at(at, &zeros[..length as usize])?;
            at += length;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.file.sync_all().map_err(|source| self.error("flush", 0, 0, source))
    }
}

/// A growable file in memory.
#[derive(Default)]
pub struct MemoryFile {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryFile {
    /// A file holding `bytes`.
    pub fn new(bytes: Vec<u8>) -> MemoryFile {
        MemoryFile { bytes: Mutex::new(bytes) }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GrowableFile for MemoryFile {
    fn len(&self) -> Result<u64, DeviceError> {
        Ok(self.bytes().len() as u64)
    }

    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        self.bytes().resize(length as usize, 0);
        Ok(())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let bytes = self.bytes();
        DeviceError::check_bounds(offset, buf.len() as u64, bytes.len() as u64)?;
        buf.copy_from_slice(&bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        let mut bytes = self.bytes();
        let end = offset as usize + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(())
    }

    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        let mut bytes = self.bytes();
        DeviceError::check_bounds(range.start, range.len(), bytes.len() as u64)?;
        bytes[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl<F: GrowableFile + ?Sized> GrowableFile for std::sync::Arc<F> {
    fn len(&self) -> Result<u64, DeviceError> {
        (**self).len()
    }
    fn set_len(&self, length: u64) -> Result<(), DeviceError> {
        (**self).set_len(length)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        (**self).read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        (**self).write_at(offset, buf)
    }
    fn punch(&self, range: ByteRange) -> Result<(), DeviceError> {
        (**self).punch(range)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        (**self).flush()
    }
}

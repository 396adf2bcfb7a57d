//! A file, or a block device of the operating system, as a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// A file of fixed size; holes are reported as not allocated where the file system tells.
pub struct FileDevice {
    file: File,
    path: PathBuf,
    size: u64,
    writable: bool,
    spares_cache: bool,
}

/// Reads of this size and more are of data that is read once; smaller ones are of an image's tables, which are read
/// again and again.
const LARGE_READ: usize = 64 * 1024;

impl FileDevice {
    /// Opens `path` for reading. A block device works as well as a file.
    pub fn open(path: &Path) -> io::Result<FileDevice> {
        FileDevice::from_file(File::open(path)?, path, false)
    }

    /// Opens an existing `path` for reading and writing.
    pub fn open_writable(path: &Path) -> io::Result<FileDevice> {
        FileDevice::from_file(OpenOptions::new().read(true).write(true).open(path)?, path, true)
    }

    /// Creates `path` with `size` bytes, all of them a hole. Fails if anything of that name exists.
    pub fn create(path: &Path, size: u64) -> io::Result<FileDevice> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.set_len(size)?;
        FileDevice::from_file(file, path, true)
    }

    /// Wraps an open file; its size is taken now and stays.
    pub fn from_file(mut file: File, path: &Path, writable: bool) -> io::Result<FileDevice> {
        use std::io::Seek;
        // The end of a block device is found by seeking; its metadata says 0.
        let size = file.seek(io::SeekFrom::End(0))?;
        Ok(FileDevice { file, path: path.to_owned(), size, writable, spares_cache: false })
    }

    /// The same file, with large reads that leave the system's page cache as they found it: what was in memory stays,
    /// what was not is let go again. Where the system cannot tell what is in memory, reads are plain ones.
    ///
    /// For a file that is read once from one end to the other, such as the disk of a running machine: otherwise its
    /// pages push out those that the machines of the host use.
    pub fn sparing_cache(mut self) -> FileDevice {
        self.spares_cache = sys::read_only_what_is_asked(&self.file).is_ok();
        self
    }

    /// The name the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn error(&self, action: &'static str, offset: u64, length: u64, source: io::Error) -> DeviceError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return DeviceError::Changed {
                object: self.path.display().to_string(),
                reason: format!("it had {} bytes when it was opened and is shorter now", self.size),
            };
        }
        DeviceError::Io { object: self.path.display().to_string(), action, offset, length, source }
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        let length = buf.len();
        let result = if self.spares_cache && length >= LARGE_READ {
            sys::read_sparing_cache(&self.file, offset, buf)
        } else {
            sys::read_exact_at(&self.file, offset, buf)
        };
        result.map_err(|source| self.error("read", offset, length as u64, source))
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.size {
            return Ok(None);
        }
        let range = sys::next_data(&self.file, from, self.size)
            .map_err(|source| self.error("find data in", from, 0, source))?;
        Ok(range.map(|range| ByteRange { start: range.start.max(from), end: range.end.min(self.size) }))
    }
}

impl WritableDevice for FileDevice {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        if !self.writable {
            return Err(DeviceError::ReadOnly { object: self.path.display().to_string() });
        }
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        sys::write_all_at(&self.file, offset, buf)
            .map_err(|source| self.error("write", offset, buf.len() as u64, source))
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        if !self.writable {
            return Err(DeviceError::ReadOnly { object: self.path.display().to_string() });
        }
        DeviceError::check_bounds(range.start, range.len(), self.size)?;
        if range.is_empty() || sys::punch_hole(&self.file, range).is_ok() {
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
        self.file.sync_all().map_err(|source| self.error("flush", 0, self.size, source))
    }
}

#[cfg(unix)]
pub(crate) mod sys {
    //! What Unix gives: positioned reads, holes.
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::FileExt;

    use model::ByteRange;

    pub fn read_exact_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        file.read_exact_at(buf, offset)
    }

    pub fn write_all_at(file: &File, offset: u64, buf: &[u8]) -> io::Result<()> {
        file.write_all_at(buf, offset)
    }

    /// Switches reading ahead off. With it nobody could tell pages that it brought from those that were in use.
    #[cfg(target_os = "linux")]
    pub fn read_only_what_is_asked(file: &File) -> io::Result<()> {
        Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random)?)
    }

    #[cfg(not(target_os = "linux"))]
    pub fn read_only_what_is_asked(_file: &File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads, and lets go of the pages that were not in memory before.
    ///
    /// Each piece is first read as far as it is in memory, which also starts the reading of the rest of it from the
    /// disk; then what is missing is waited for, and let go. In a piece the first page that is missing decides about
    /// those behind it.
    #[cfg(target_os = "linux")]
    pub fn read_sparing_cache(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        use std::io::IoSliceMut;
        use std::num::NonZeroU64;

        use rustix::fs::{Advice, fadvise};
        use rustix::io::{Errno, ReadWriteFlags, preadv2};

        /// The unit of what is kept and let go.
        const PIECE: u64 = 64 * 1024;
        let mut missing: Vec<std::ops::Range<usize>> = Vec::new();
        let mut at = 0;
        while at < buf.len() {
            let begin = offset + at as u64;
            let end = buf.len().min(at + (PIECE - begin % PIECE) as usize);
            let mut piece = [IoSliceMut::new(&mut buf[at..end])];
            let found = match preadv2(file, &mut piece, begin, ReadWriteFlags::NOWAIT) {
                Ok(found) => found,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                // A file system that cannot tell (NFS, FUSE), or a system older than the question.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    return read_exact_at(file, offset, buf);
                }
                Err(error) => return Err(error.into()),
            };
            if at + found < end {
                match missing.last_mut() {
                    Some(last) if last.end == at + found => last.end = end,
                    _ => missing.push(at + found..end),
                }
            }
            at = end;
        }
        for range in &missing {
            read_exact_at(file, offset + range.start as u64, &mut buf[range.clone()])?;
        }
        for range in &missing {
            let length = NonZeroU64::new(range.len() as u64);
            // Advice: a page that stays does no harm.
            let _ = fadvise(file, offset + range.start as u64, length, Advice::DontNeed);
        }
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    pub fn read_sparing_cache(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        read_exact_at(file, offset, buf)
    }

    pub fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<ByteRange>> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        let start = match seek(file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // A block device and some file systems know no holes: everything may hold data.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return Ok(Some(ByteRange { start: from, end: size }));
            }
            Err(error) => return Err(error.into()),
        };
        if start >= size {
            return Ok(None);
        }
        let end = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end,
            Ok(_) => size,
            Err(Errno::NXIO) => size,
            Err(error) => return Err(error.into()),
        };
        Ok(Some(ByteRange { start, end }))
    }

    pub fn punch_hole(file: &File, range: ByteRange) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        fallocate(
            file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            range.start,
            range.end - range.start,
        )?;
        Ok(())
    }
}

#[cfg(windows)]
pub(crate) mod sys {
    //! What Windows gives through the standard library: positioned reads. Holes need calls that come with the
    //! Windows agent; until then everything may hold data, and zeros are found by reading.
    use std::fs::File;
    use std::io;
    use std::os::windows::fs::FileExt;

    use model::ByteRange;

    pub fn read_exact_at(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match file.seek_read(buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buf = &mut buf[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub fn write_all_at(file: &File, mut offset: u64, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match file.seek_write(buf, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    buf = &buf[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What the cache keeps is decided when a file is opened: whoever opens one asks for a sequential scan.
    pub fn read_only_what_is_asked(_file: &File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn read_sparing_cache(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        read_exact_at(file, offset, buf)
    }

    pub fn next_data(_file: &File, from: u64, size: u64) -> io::Result<Option<ByteRange>> {
        Ok(Some(ByteRange { start: from, end: size }))
    }

    pub fn punch_hole(_file: &File, _range: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

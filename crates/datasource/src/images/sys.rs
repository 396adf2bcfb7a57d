//! What the operating system tells about a file and its users.

use std::path::PathBuf;

/// What changes when a file is written to, replaced or cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Device and file number; zeros where the system has none to give.
    pub identity: (u64, u64),
    /// Bytes.
    pub length: u64,
    /// Time of the last write, in nanoseconds since 1970.
    pub modified: i128,
    /// Time of the last change of anything, which no program sets; the same as `modified` where there is none.
    pub changed: i128,
}

impl Stamp {
    /// What is different now, in words.
    pub fn difference(&self, now: &Stamp) -> Option<String> {
        if self.identity != now.identity {
            return Some("another file stands under its name".to_owned());
        }
        if self.length != now.length {
            return Some(format!("it had {} bytes and has {}", self.length, now.length));
        }
        if self.modified != now.modified || self.changed != now.changed {
            return Some("it was written to".to_owned());
        }
        None
    }
}

/// A source file, opened once and kept open.
#[derive(Debug)]
pub(super) struct OpenSource {
    /// Its name without links and `..`.
    pub path: PathBuf,
    /// The open file.
    pub file: std::fs::File,
}

#[cfg(unix)]
pub(super) use unix::*;
#[cfg(windows)]
pub(super) use windows::*;

#[cfg(unix)]
mod unix {
    use std::collections::BTreeMap;
    use std::fs::{File, Metadata};
    use std::io;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::{OpenSource, Stamp};

    /// Opens a source for reading. Nothing is locked yet.
    pub fn open(path: &Path) -> io::Result<File> {
        File::open(path)
    }

    fn stamp_of(metadata: &Metadata) -> Stamp {
        let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Stamp {
            identity: (metadata.dev(), metadata.ino()),
            length: metadata.len(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// The stamp of an open file whose pages are all clean, so that any later write shows.
    pub fn stamp(file: &File) -> io::Result<Stamp> {
        match file.sync_data() {
            // A volume that cannot be written has no dirty pages.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            result => result?,
        }
        Ok(stamp_of(&file.metadata()?))
    }

    /// The stamp of what stands under a name now. It is opened anew, for network file systems ask their server only
    /// then.
    pub fn stamp_at(path: &Path) -> io::Result<Stamp> {
        stamp(&File::open(path)?)
    }

    /// The identity of what stands under a name, links followed. It is not opened, so a pipe is not waited for.
    pub fn identity_at(path: &Path) -> Option<(u64, u64)> {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// Makes `copy` share the blocks of `source`.
    pub fn clone_into(copy: &File, source: &File) -> io::Result<()> {
        Ok(rustix::fs::ioctl_ficlone(copy, source)?)
    }

    /// Who may write to one of these files, for a person; `None` if nobody is seen.
    ///
    /// Takes a shared `flock` on each, which stays until the file is closed: whoever locks exclusively is kept out or
    /// found.
    pub fn writer_of(sources: &[&OpenSource]) -> io::Result<Option<String>> {
        for source in sources {
            match source.file.try_lock_shared() {
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => {
                    return Ok(Some(format!("another program locks {}", source.path.display())));
                }
                // Some file systems know no locks; then nobody holds one.
                Err(std::fs::TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(std::fs::TryLockError::Error(error)) => return Err(error),
            }
        }
        if let Some(found) = locked_by(sources) {
            return Ok(Some(found));
        }
        Ok(opened_by(sources))
    }

    /// Looks for locks of others in `/proc/locks`.
    ///
    /// The list names files by a device number that is not that of `stat` on every file system (Btrfs), so the name is
    /// taken from the entry of our own lock, which `fdinfo` shows.
    fn locked_by(sources: &[&OpenSource]) -> Option<String> {
        let mut names = BTreeMap::new();
        for source in sources {
            let info =
                std::fs::read_to_string(format!("/proc/self/fdinfo/{}", source.file.as_raw_fd())).ok()?;
            let own = info.lines().filter_map(|line| line.strip_prefix("lock:")).find_map(LockLine::parse);
            if let Some(own) = own {
                names.insert(own.file.to_owned(), source.path.clone());
            }
        }
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        locks.lines().filter_map(LockLine::parse).find_map(|line| {
            let path = names.get(line.file)?;
            Some(format!("{} of {}", line.writer()?, path.display()))
        })
    }

    /// `1: OFDLCK ADVISORY  READ -1 08:02:1234 100 101`
    #[derive(Debug, PartialEq, Eq)]
    pub(in crate::images) struct LockLine<'a> {
        kind: &'a str,
        access: &'a str,
        process: i64,
        file: &'a str,
        start: u64,
        end: u64,
    }

    impl<'a> LockLine<'a> {
        pub fn parse(line: &'a str) -> Option<LockLine<'a>> {
            let mut words = line.split_whitespace();
            words.next()?;
            // After the number `->` marks one that waits: it holds nothing.
            let kind = words.next().filter(|kind| *kind != "->")?;
            words.next()?;
            Some(LockLine {
                kind,
                access: words.next()?,
                process: words.next()?.parse().ok()?,
                file: words.next()?,
                start: words.next()?.parse().ok()?,
                end: words.next().map(|end| end.parse().unwrap_or(u64::MAX))?,
            })
        }

        /// Who holds it, if that one writes.
        pub fn writer(&self) -> Option<String> {
            /// QEMU: the permissions to write, to write unchanged bytes and to resize are in use.
            const QEMU_WRITES: std::ops::RangeInclusive<u64> = 101..=103;
            let by =
                || if self.process > 0 { format!(" by process {}", self.process) } else { String::new() };
            match (self.kind, self.access) {
                ("OFDLCK", "READ")
                    if self.start >= 100
                        && self.end < 300
                        && self.start <= *QEMU_WRITES.end()
                        && self.end >= *QEMU_WRITES.start() =>
                {
                    Some("a running QEMU holds the right to write".to_owned())
                }
                ("OFDLCK" | "POSIX" | "FLOCK" | "LEASE" | "DELEG", "WRITE") => {
                    Some(format!("{} for writing{} is held", self.kind.to_lowercase(), by()))
                }
                _ => None,
            }
        }
    }

    /// Looks for processes that have a file open for writing, as far as this one may see. This process does not count.
    fn opened_by(sources: &[&OpenSource]) -> Option<String> {
        let mut wanted = BTreeMap::new();
        for source in sources {
            let metadata = source.file.metadata().ok()?;
            wanted.insert((metadata.dev(), metadata.ino()), &source.path);
        }
        for process in std::fs::read_dir("/proc").ok()?.flatten() {
            let Some(number) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            if number == std::process::id() {
                continue;
            }
            let Ok(files) = std::fs::read_dir(process.path().join("fd")) else { continue };
            for open in files.flatten() {
                let Ok(metadata) = std::fs::metadata(open.path()) else { continue };
                let Some(path) = wanted.get(&(metadata.dev(), metadata.ino())) else { continue };
                let info = process.path().join("fdinfo").join(open.file_name());
                let writes = std::fs::read_to_string(info).ok().and_then(|info| {
                    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim().to_owned();
                    // The lowest two bits: 0 reads, 1 writes, 2 both.
                    Some(u32::from_str_radix(&flags, 8).ok()? & 3 != 0)
                });
                if writes == Some(true) {
                    let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                    return Some(format!(
                        "process {number} ({}) has {} open for writing",
                        name.trim().escape_debug(),
                        path.display()
                    ));
                }
            }
        }
        None
    }
}

#[cfg(windows)]
mod windows {
    use std::fs::File;
    use std::io;
    use std::os::windows::fs::{MetadataExt, OpenOptionsExt};
    use std::path::Path;

    use super::{OpenSource, Stamp};

    /// Others may read, not write, rename or delete.
    const FILE_SHARE_READ: u32 = 1;
    /// Pages that were read are the first to go, so that a scan does not push out what the host's machines use.
    const FILE_FLAG_SEQUENTIAL_SCAN: u32 = 0x0800_0000;
    /// Somebody has the file open in a way that this excludes.
    const ERROR_SHARING_VIOLATION: i32 = 32;

    /// Opens a source so that nobody may write to it until it is closed; fails if somebody may already.
    pub fn open(path: &Path) -> io::Result<File> {
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .share_mode(FILE_SHARE_READ)
            .custom_flags(FILE_FLAG_SEQUENTIAL_SCAN)
            .open(path);
        opened.map_err(|error| match error.raw_os_error() {
            Some(ERROR_SHARING_VIOLATION) => io::Error::new(io::ErrorKind::ResourceBusy, error),
            _ => error,
        })
    }

    pub fn stamp(file: &File) -> io::Result<Stamp> {
        let metadata = file.metadata()?;
        // 100 nanoseconds since 1601.
        let modified = (i128::from(metadata.last_write_time()) - 116_444_736_000_000_000) * 100;
        Ok(Stamp { identity: (0, 0), length: metadata.file_size(), modified, changed: modified })
    }

    pub fn stamp_at(path: &Path) -> io::Result<Stamp> {
        stamp(&open(path)?)
    }

    /// There is none to give: names are compared alone.
    pub fn identity_at(_path: &Path) -> Option<(u64, u64)> {
        None
    }

    /// Opening kept all writers out.
    pub fn writer_of(_sources: &[&OpenSource]) -> io::Result<Option<String>> {
        Ok(None)
    }
}

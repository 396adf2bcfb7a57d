//! A folder of files, as the pool and the state of agent and server use it.
//!
//! Names are relative to the folder, `/` between parts, never `..`. Two promises are all that is needed of a file
//! system, and no more is assumed: a file that was synced keeps its bytes over a power cut, and a name that was
//! published and whose folder was synced keeps pointing at it. There is no rename over existing data, no edit in
//! place, and nothing depends on time stamps or link counts.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The last part of the name.
    pub name: String,
    /// Bytes of the file; 0 for a folder.
    pub len: u64,
    /// Whether it is a folder.
    pub is_folder: bool,
}

/// An open file that never changes.
pub trait ReadFile: Send + Sync {
    /// Bytes of the file.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has none.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills all of `buf` or fails; past the end is `UnexpectedEof`.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// These bytes are not wanted again soon: whoever reads everything once must not push out of memory what others read
    /// often. A hint, which may do nothing.
    fn drop_cached(&self, _offset: u64, _length: u64) {}
    /// These bytes will be read soon: storage may begin with it, so that whoever reads scattered pieces waits for one of
    /// them and not for each. A hint, which may do nothing.
    fn will_read(&self, _offset: u64, _length: u64) {}
}

/// A file being written that has no name yet. Dropping it leaves nothing behind.
pub trait NewFile: Send {
    /// Appends.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Fills `buf` from what was appended.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Makes the bytes durable, gives the file its name and makes the name durable (file sync, link without
    /// replace, folder sync). `AlreadyExists` if the name is taken: then nothing changed. Any other error leaves open
    /// whether the name exists. After a failed sync nothing of the file may be trusted (INV-5).
    fn publish(self: Box<Self>) -> io::Result<()>;
}

/// A lock held until dropped.
pub trait Lock: Send + Sync {}

/// Reading and creating in one folder tree. Cannot remove, cut or overwrite anything (INV-15).
pub trait Files: Send + Sync {
    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Box<dyn ReadFile>>;
    /// What a folder holds, in order of name. A missing folder is `NotFound`.
    fn list(&self, folder: &str) -> io::Result<Vec<Entry>>;
    /// Only the names of what a folder holds, in order: asks for nothing about each of them. A missing folder is
    /// `NotFound`.
    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        Ok(self.list(folder)?.into_iter().map(|entry| entry.name).collect())
    }
    /// Makes a folder and those above it, durable; fine if it exists. Of one that existed, success does not prove that
    /// its name lasts: the sync of an earlier call may have failed, and later ones then bring nothing back (INV-5).
    fn make_folder(&self, folder: &str) -> io::Result<()>;
    /// Makes the names in a folder durable. For names that were published by a process which may have ended before
    /// its own sync; never to mend a sync that failed (INV-5). A missing folder is `NotFound`.
    fn sync_folder(&self, folder: &str) -> io::Result<()>;
    /// Begins a file that will be called `name`.
    fn create(&self, name: &str) -> io::Result<Box<dyn NewFile>>;
    /// Takes the exclusive lock `name` (the file is created empty if missing), for the life of the result. `None` if
    /// another process holds it.
    fn lock(&self, name: &str) -> io::Result<Option<Box<dyn Lock>>>;
    /// Bytes that can still be written.
    fn free_bytes(&self) -> io::Result<u64>;
    /// Bytes of the file system.
    fn total_bytes(&self) -> io::Result<u64>;
    /// The path of `name`, for messages.
    fn display(&self, name: &str) -> String;

    /// All bytes of a file of at most `limit` bytes.
    fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.open(name)?;
        let len = file.len()?;
        if len > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} has {len} bytes, expected at most {limit}", self.display(name)),
            ));
        }
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// The right to remove. Only the deletion service holds it for a pool.
pub trait Removal: Files {
    /// Removes a file and makes that durable. A missing file is fine.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// A folder of the operating system.
pub struct FolderFiles {
    root: PathBuf,
}

impl FolderFiles {
    /// The tree below `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> FolderFiles {
        FolderFiles { root: root.into() }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &str) -> PathBuf {
        let mut path = self.root.clone();
        path.extend(name.split('/').filter(|part| !part.is_empty() && *part != "." && *part != ".."));
        path
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(path)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

impl ReadFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        positioned::read_exact_at(self, offset, buf)
    }

    #[cfg(target_os = "linux")]
    fn drop_cached(&self, offset: u64, length: u64) {
        advise(self, offset, length, rustix::fs::Advice::DontNeed);
    }

    #[cfg(target_os = "linux")]
    fn will_read(&self, offset: u64, length: u64) {
        advise(self, offset, length, rustix::fs::Advice::WillNeed);
    }
}

/// A length of zero would mean all of the file.
#[cfg(target_os = "linux")]
fn advise(file: &File, offset: u64, length: u64, advice: rustix::fs::Advice) {
    if let Some(length) = std::num::NonZeroU64::new(length) {
        // Advice: where it is not taken, nothing is lost.
        let _ = rustix::fs::fadvise(file, offset, Some(length), advice);
    }
}

mod positioned {
    use std::fs::File;
    use std::io;

    #[cfg(unix)]
    pub fn read_exact_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
    }

    #[cfg(windows)]
    pub fn read_exact_at(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(file, buf, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => {
                    buf = &mut buf[count..];
                    offset += count as u64;
                }
            }
        }
        Ok(())
    }
}

/// Gives an unnamed file its name.
enum Naming {
    /// The file has no name at all (`O_TMPFILE`): a crash leaves nothing.
    #[cfg(unix)]
    Unnamed,
    /// The file system knows no unnamed files: it stands under `STAGING` until it is linked. What a crash leaves
    /// there, `FolderFiles::sweep_staging` removes at the next start.
    Staged(PathBuf),
}

/// Folder for files without a name yet, where the file system needs one.
const STAGING: &str = "staging";

struct FolderNewFile {
    file: File,
    naming: Naming,
    target: PathBuf,
    length: u64,
}

impl FolderFiles {
    fn begin(&self, target: PathBuf) -> io::Result<FolderNewFile> {
        let folder = target.parent().unwrap_or(&self.root).to_owned();
        #[cfg(unix)]
        {
            use rustix::fs::{Mode, OFlags};
            use rustix::io::Errno;
            match rustix::fs::open(
                &folder,
                OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
                Mode::from(0o600),
            ) {
                Ok(file) => {
                    return Ok(FolderNewFile {
                        file: file.into(),
                        naming: Naming::Unnamed,
                        target,
                        length: 0,
                    });
                }
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let staging = self.root.join(STAGING);
        std::fs::create_dir_all(&staging)?;
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let staged = staging.join(format!("{}-{next}", std::process::id()));
        let _ = std::fs::remove_file(&staged);
        let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&staged)?;
        let _ = folder;
        Ok(FolderNewFile { file, naming: Naming::Staged(staged), target, length: 0 })
    }

    /// Removes what a crash left in the staging folder. Only for the holder of the writer's lock.
    pub fn sweep_staging(&self) -> io::Result<u64> {
        let mut removed = 0;
        match std::fs::read_dir(self.root.join(STAGING)) {
            Ok(entries) => {
                for entry in entries {
                    std::fs::remove_file(entry?.path())?;
                    removed += 1;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(removed)
    }
}

impl NewFile for FolderNewFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        use std::io::Write;
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        positioned::read_exact_at(&self.file, offset, buf)
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        self.file.sync_all()?;
        match &self.naming {
            #[cfg(unix)]
            Naming::Unnamed => {
                use rustix::fs::{AtFlags, CWD, linkat};
                use std::os::fd::AsRawFd;
                let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(CWD, &unnamed, CWD, &self.target, AtFlags::SYMLINK_FOLLOW)?;
            }
            Naming::Staged(staged) => std::fs::hard_link(staged, &self.target)?,
        }
        if let Some(folder) = self.target.parent() {
            sync_folder(folder)?;
        }
        Ok(())
    }
}

impl Drop for FolderNewFile {
    fn drop(&mut self) {
        match &self.naming {
            #[cfg(unix)]
            Naming::Unnamed => {}
            Naming::Staged(staged) => {
                let _ = std::fs::remove_file(staged);
            }
        }
    }
}

struct FolderLock {
    _file: File,
}
impl Lock for FolderLock {}

impl Files for FolderFiles {
    fn open(&self, name: &str) -> io::Result<Box<dyn ReadFile>> {
        Ok(Box::new(File::open(self.path(name))?))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(self.path(folder))? {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                // Removed between the listing and now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let Ok(name) = entry.file_name().into_string() else { continue };
            let is_folder = metadata.is_dir();
            entries.push(Entry { name, len: if is_folder { 0 } else { metadata.len() }, is_folder });
        }
        entries.sort();
        Ok(entries)
    }

    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.path(folder))? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    fn make_folder(&self, folder: &str) -> io::Result<()> {
        let path = self.path(folder);
        let new_root = !self.root.is_dir();
        std::fs::create_dir_all(&path)?;
        // A folder that exists may stand there from a call that failed before its sync, so syncs are never saved.
        for above in path.ancestors().skip(1) {
            if above.starts_with(&self.root) {
                sync_folder(above)?;
            } else {
                if new_root {
                    sync_folder(if above.as_os_str().is_empty() { Path::new(".") } else { above })?;
                }
                break;
            }
        }
        Ok(())
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        sync_folder(&self.path(folder))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn NewFile>> {
        Ok(Box::new(self.begin(self.path(name))?))
    }

    fn lock(&self, name: &str) -> io::Result<Option<Box<dyn Lock>>> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path(name))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(FolderLock { _file: file }))),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn free_bytes(&self) -> io::Result<u64> {
        #[cfg(unix)]
        {
            let stat = rustix::fs::statvfs(&self.root)?;
            Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
        }
        #[cfg(not(unix))]
        Err(io::ErrorKind::Unsupported.into())
    }

    fn total_bytes(&self) -> io::Result<u64> {
        #[cfg(unix)]
        {
            let stat = rustix::fs::statvfs(&self.root)?;
            Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
        }
        #[cfg(not(unix))]
        Err(io::ErrorKind::Unsupported.into())
    }

    fn display(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

impl Removal for FolderFiles {
    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        path.parent().map_or(Ok(()), sync_folder)
    }
}

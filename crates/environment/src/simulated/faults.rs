//! What can go wrong, and where.

use std::io;

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// Open of a file.
    Open,
    /// Length of an open file.
    Measure,
    /// Read of an open or a new file.
    Read,
    /// Listing of a folder.
    List,
    /// Begin of a new file.
    Create,
    /// Append to a new file.
    Append,
    /// Sync of a new file: first step of `publish`.
    SyncFile,
    /// The new file gets its name: second step of `publish`.
    Link,
    /// Sync of a folder: third step of `publish`, last of `remove` and `make_folder`.
    SyncFolder,
    /// One new folder.
    MakeFolder,
    /// A name goes: first step of `remove`.
    Unlink,
    /// A lock is tried.
    Lock,
    /// Free space is asked for.
    FreeBytes,
}

/// One operation that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its number, from 1.
    pub number: u64,
    /// What it was.
    pub operation: Operation,
    /// The file or folder.
    pub name: String,
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {}", self.number, self.operation, self.name)
    }
}

/// Which operations a failure meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum When {
    /// The operation of this number, once.
    At(u64),
    /// The operation that is the change of this number, once.
    AtChange(u64),
    /// The operation of this number and all after it.
    From(u64),
    /// The next operation of this kind, once.
    Next(Operation),
    /// Every operation of this kind.
    Every(Operation),
    /// Every operation that would change something: the volume went read-only.
    EveryChange,
}

/// How an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// EIO, and nothing happened.
    Io,
    /// EIO, although it happened.
    IoAfter,
    /// ENOSPC; of an append a part may be written.
    NoSpace,
    /// EROFS.
    ReadOnly,
    /// EDQUOT; of an append a part may be written.
    Quota,
    /// A sync gives EIO and throws the unsynced changes away; later syncs succeed. Anything but a sync: EIO.
    SyncDropsData,
    /// A sync succeeds without doing anything: a drive that lies. Anything but a sync happens as usual.
    SyncLies,
}

impl Failure {
    pub(super) fn error(self) -> io::Error {
        // The numbers of Linux; elsewhere the kind must do.
        let (number, kind) = match self {
            Failure::Io | Failure::IoAfter | Failure::SyncDropsData | Failure::SyncLies => {
                (5, io::ErrorKind::Other)
            }
            Failure::NoSpace => (28, io::ErrorKind::StorageFull),
            Failure::ReadOnly => (30, io::ErrorKind::ReadOnlyFilesystem),
            Failure::Quota => (122, io::ErrorKind::QuotaExceeded),
        };
        if cfg!(target_os = "linux") { io::Error::from_raw_os_error(number) } else { kind.into() }
    }
}

/// How reads of one file go wrong, while what is stored is as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadFault {
    /// This bit reads as its opposite.
    FlipBit(u64),
    /// Other bytes are read: an old state, or another file's.
    Instead(Vec<u8>),
    /// The file is not there, nor in listings.
    Missing,
    /// The file can be opened and is in no listing.
    Unlisted,
    /// A read of offset `o` gives what stands at `o + by`, as far as there is something.
    Misdirected {
        /// Bytes between the place asked for and the place read.
        by: u64,
    },
    /// EIO.
    Io,
}

/// The error of every operation between a power cut and the reboot, and of what was open before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("power cut at operation {at}")]
pub struct PowerCut {
    /// Operations at the cut.
    pub at: u64,
}

/// The error of every operation of a process that was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the process was killed at operation {at}")]
pub struct Killed {
    /// Operations when it was noticed.
    pub at: u64,
}

/// Whether `error` is a [`PowerCut`].
pub fn is_power_cut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<PowerCut>())
}

/// Whether `error` is a [`Killed`].
pub fn is_killed(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Killed>())
}

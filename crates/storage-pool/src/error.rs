//! What can go wrong in a pool, one variant for each thing a caller treats differently.

use std::io;

use model::{ByteRange, DomainId, PoolId, RecoveryPointId};

/// An error of the pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The file system failed.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file.
        path: String,
        /// `read`, `write`, `list`, `lock` ...
        action: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
    /// No space is left for the pool.
    #[error("{path}: no space left in the storage pool")]
    Full {
        /// The file being written.
        path: String,
    },
    /// Storing more would take room that is kept for giving space back.
    #[error(
        "{path}: {free} bytes are free on the volume, and {reserve} are reserved for deleting and reclaiming: make room on \
         it, or prune and reclaim"
    )]
    Reserve {
        /// The pool.
        path: String,
        /// Bytes free.
        free: u64,
        /// The reserve.
        reserve: u64,
    },
    /// The folder holds no pool.
    #[error("{path} holds no storage pool")]
    NoPool {
        /// The folder.
        path: String,
    },
    /// The folder holds a pool already.
    #[error("{path} holds a storage pool already")]
    Exists {
        /// The folder.
        path: String,
    },
    /// The pool is another one.
    #[error("the storage pool is {found}, expected {expected}")]
    OtherPool {
        /// What was asked for.
        expected: PoolId,
        /// What is there.
        found: PoolId,
    },
    /// A file's bytes contradict its hash or its own structure.
    #[error("{path}: damaged at byte {offset}: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// Where.
        offset: u64,
        /// What was found and what was expected.
        reason: String,
    },
    /// A file needs a newer program.
    #[error("{path}: needs pool version {needs}, this program reads up to {reads}")]
    TooNew {
        /// The file.
        path: String,
        /// Version in the file.
        needs: u16,
        /// Version of the program.
        reads: u16,
    },
    /// The key file of this recipient is missing.
    #[error("{path}: no key of the pool for recipient {recipient}")]
    KeyMissing {
        /// Where it should be.
        path: String,
        /// Whose.
        recipient: String,
    },
    /// The secret does not open the pool.
    #[error("the key does not fit this storage pool: {reason}")]
    KeyWrong {
        /// What does not fit.
        reason: String,
    },
    /// Another writer has the pool.
    #[error("{path}: another writer is using the storage pool")]
    Busy {
        /// The lock file.
        path: String,
    },
    /// Another server wrote to the pool since.
    #[error("another server wrote record {number} of the storage pool: this process may no longer write")]
    Fenced {
        /// The number that was taken.
        number: u64,
    },
    /// This pool was opened for reading.
    #[error("the storage pool is open for reading only")]
    ReadOnly,
    /// A chunk is in no index, or every copy of it is damaged.
    #[error("chunk {chunk} cannot be had: {reason}")]
    ChunkLost {
        /// Its id in hex.
        chunk: String,
        /// Why.
        reason: String,
    },
    /// The point does not exist.
    #[error("recovery point {0} is not in the storage pool")]
    NoSuchPoint(RecoveryPointId),
    /// The point has no such disk.
    #[error("recovery point {point} has no disk {disk}; it has {disks}")]
    NoSuchDisk {
        /// The point.
        point: RecoveryPointId,
        /// Asked for.
        disk: u32,
        /// How many it has.
        disks: usize,
    },
    /// The domain does not exist.
    #[error("the storage pool has no domain {0}")]
    NoSuchDomain(DomainId),
    /// Prune or reclaim met something unreadable and changed nothing.
    #[error("stopped without changing anything: {reason}")]
    Stopped {
        /// What cannot be read.
        reason: String,
    },
    /// Too much would be freed.
    #[error("{percent} % of the storage pool would be freed, the breaker allows {allowed} %")]
    Breaker {
        /// What would be freed.
        percent: u64,
        /// The limit.
        allowed: u64,
    },
    /// The point is kept by the floor or a hold.
    #[error("recovery point {point} is kept: {reason}")]
    Kept {
        /// The point.
        point: RecoveryPointId,
        /// Why.
        reason: String,
    },
    /// A recipient cannot be removed.
    #[error("recipient {recipient} is not removed: {reason}")]
    RecipientKept {
        /// Who.
        recipient: String,
        /// Why.
        reason: String,
    },
    /// The folder for a copy holds something else.
    #[error("{path} holds no copy of this storage pool: {reason}")]
    NotACopy {
        /// The folder.
        path: String,
        /// What it holds.
        reason: String,
    },
    /// Somebody wrote to a copy, so it is none any more.
    #[error("{path} is no copy of this storage pool any more: it has record {number}, and {reason}")]
    CopyDiverged {
        /// The folder of the copy.
        path: String,
        /// The first record that differs, seen from the end.
        number: u64,
        /// How it differs.
        reason: String,
    },
    /// A caller's mistake, or a contradiction inside this program.
    #[error("{0}")]
    Misuse(String),
}

impl PoolError {
    /// Wraps an I/O error of `path`; a full disk becomes [`PoolError::Full`].
    pub(crate) fn io(path: String, action: &'static str, source: io::Error) -> PoolError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => PoolError::Full { path },
            _ => PoolError::Io { path, action, source },
        }
    }
}

/// Damage found by verify or by reading, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// A file is damaged, missing or unreadable.
    File {
        /// The file.
        path: String,
        /// Where, if known.
        offset: u64,
        /// What was found.
        reason: String,
        /// Whether it can be made again from others.
        derived: bool,
    },
    /// Bytes of a disk of a point cannot be had.
    Point {
        /// The point.
        point: RecoveryPointId,
        /// The machine's name.
        machine: String,
        /// The disk, from 0.
        disk: u32,
        /// The bytes of the disk.
        range: ByteRange,
        /// Why.
        reason: String,
    },
}

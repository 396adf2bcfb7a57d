//! VHDX: fixed, dynamic and differencing images, read and written as \[MS-VHDX\] version 8.0 (April 2024) says.
//!
//! [`Reader`] is a [`BlockDevice`](crate::BlockDevice) of the disk inside an image file and of its parents; [`Writer`]
//! creates an image, or goes on with one, and is a [`WritableDevice`](crate::WritableDevice). [`Info`] is what a
//! recovery must know to give back the same format and geometry.
//!
//! | file | structure | section |
//! |---|---|---|
//! | `header` | file type identifier, two headers | 2.2.1, 2.2.2 |
//! | `region_table` | two region tables | 2.2.3 |
//! | `log` | active sequence, replay; one entry to write | 2.3 |
//! | `replayed` | the file as it is after the replay, in memory | 2.3.3 |
//! | `bat` | entries, where a block of the disk lies | 2.4, 2.5 |
//! | `metadata` | metadata table and items | 2.6 |
//! | `parent_locator` | names and identity of the parent | 2.6.2.6 |
//! | `mapping` | disk offset to bytes: BAT, sector bitmaps, parent | 2.4, 2.5 |
//!
//! Refuses
//! - a file without one valid header or region table, or with two valid ones that contradict each other;
//! - regions and metadata items that are required and unknown; unknown flags of the file parameters;
//! - a log that is in use and holds no valid sequence, another version, or describes a longer file than there is. A
//!   log is never ignored: without it the BAT is wrong. A reader replays it in memory, a writer into the file;
//! - reserved BAT states and bits, and blocks that are misaligned, outside the file or inside another structure. As
//!   the BAT is never read whole, this is found at the access, as [`DeviceError::Damaged`](crate::DeviceError);
//! - a parent whose `DataWriteGuid` is not the one the child was made from.
//!
//! Meaning of the BAT states. Where the specification leaves a choice this program always takes zeros, so that a
//! disk reads equal twice:
//!
//! | state | fixed and dynamic | differencing |
//! |---|---|---|
//! | 0 not present | zeros | parent |
//! | 1 undefined, 2 zero, 3 unmapped | zeros | zeros, *not* the parent |
//! | 6 fully present | this file | this file, bitmap not asked |
//! | 7 partially present | damaged | by sector bitmap: this file or the parent |
//! | 4, 5 | damaged | damaged |
//!
//! Memory, whatever the image says (a 64 TiB disk with blocks of 1 MiB has a BAT of 512 MiB):
//! - BAT and sector bitmaps: [`CACHED_PAGES`] pages of 64 KiB per image of the chain;
//! - a log that is replayed: at most [`MAX_REPLAYED_LOG`], held twice while the image is opened (three times
//!   by a writer), and checked with a bounded number of passes;
//! - metadata table 64 KiB, parent locator 1 MiB, at most [`MAX_CHAIN`](crate::MAX_CHAIN) images;
//! - a writer: one bit per MiB of file while it is opened, [`MAX_DIRTY_PAGES`] changed pages, and a list of at most
//!   65,536 free blocks.
//!
//! # How a writer stays consistent
//!
//! Payload is written in place at once. A block gets its place at the end of the file (or where a block was freed
//! *and* the freeing was flushed), so until a flush no structure in the file knows it. BAT and sector bitmap changes
//! wait in memory and reach the file through the log (2.3), all changes of one flush in one log entry:
//!
//! 1. flush: the payload and the length of the file are durable;
//! 2. write the log entry under a new `LogGuid`; flush;
//! 3. write that `LogGuid` into the header that is not current, which becomes current; flush;
//! 4. write the changed pages to their places; flush;
//! 5. write a zero `LogGuid` into the other header; flush; then the same into the first.
//!
//! A stop before 3 is complete leaves the state of the last flush: blocks written since lie in nobody's land. A stop
//! after 3 and before 5 leaves a log that every VHDX implementation must replay. A header that is torn fails its
//! checksum and the other one is valid, as only one is ever written between two flushes. So a sector that is torn in
//! the BAT is always covered by the log, and a torn log is never in use. After every flush the image is clean: tools
//! that cannot replay a log can read it.
//!
//! Invariants
//! - No BAT entry in the file names a block whose payload is not durable. (must: else a crash shows garbage)
//! - A freed block is not used again before the BAT without it is durable. (must: else two offsets of the disk share it)
//! - `FileWriteGuid` and `DataWriteGuid` change before the first change of a session. (must: a child made from the
//!   old content must refuse the new)

mod bat;
mod bytes;
mod guid;
mod header;
mod log;
mod mapping;
mod metadata;
mod parent_locator;
mod reader;
mod region_table;
mod replayed;
mod writer;
mod writer_open;

pub use guid::{guid_from_text, guid_text};
pub use mapping::CACHED_PAGES;
pub use parent_locator::ParentLocator;
pub use reader::Reader;
pub use writer::{ChildOptions, CreateKind, CreateOptions, Ids, MAX_DIRTY_PAGES, Writer};

use crate::{ImageError, ImageFormat};

/// Bytes of the largest disk (2.6.2.2).
pub const MAX_SIZE: u64 = 64 << 40;
/// Bytes of the smallest payload block (2.6.2.1).
pub const MIN_BLOCK_SIZE: u32 = 1 << 20;
/// Bytes of the largest payload block (2.6.2.1).
pub const MAX_BLOCK_SIZE: u32 = 256 << 20;
/// Block size that Hyper-V gives a new dynamic disk.
pub const DYNAMIC_BLOCK_SIZE: u32 = 32 << 20;
/// Block size that Hyper-V gives a new differencing disk.
pub const DIFFERENCING_BLOCK_SIZE: u32 = 2 << 20;
/// Bytes of the longest log that is replayed. Hyper-V and QEMU make logs of 1 MiB; a longer one was never seen, and
/// a header may state 4 GiB.
pub const MAX_REPLAYED_LOG: u32 = 64 << 20;
/// Bytes of the longest image file that a log may describe or a writer goes on with: twice the largest disk.
pub(crate) const MAX_FILE: u64 = 128 << 40;
/// All structures are aligned to this (2.1).
pub(crate) const MIB: u64 = 1 << 20;
/// Unit of the log, and of a change that waits in a writer (2.3.1).
pub(crate) const LOG_SECTOR: u64 = 4096;

/// A GUID in the byte order of the file: the first three fields little-endian.
pub type Guid = [u8; 16];

/// How the blocks of an image come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every block has its place from the start (`LeaveBlockAllocated`).
    Fixed,
    /// A block gets its place when it is first written.
    Dynamic,
    /// Holds what differs from a parent.
    Differencing,
}

/// What an image says about itself: enough to write one of the same format and geometry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Fixed, dynamic or differencing.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a payload block.
    pub block_size: u32,
    /// Bytes of a logical sector of the disk: 512 or 4096.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector of the disk: 512 or 4096.
    pub physical_sector_size: u32,
    /// Identity of the disk; stays when the image is copied or gets a child.
    pub virtual_disk_id: Guid,
    /// Identity of the content of the file.
    pub file_write_guid: Guid,
    /// Identity of the content of the disk: a child checks it.
    pub data_write_guid: Guid,
    /// Program that made the file; text for diagnosis only.
    pub creator: String,
    /// Where the parent of a differencing image is.
    pub parent: Option<ParentLocator>,
    /// Whether the image was not closed cleanly, and its log was replayed.
    pub log_replayed: bool,
}

pub(crate) fn damaged(structure: &'static str, offset: u64, reason: impl Into<String>) -> ImageError {
    ImageError::Damaged { format: ImageFormat::Vhdx, structure, offset, reason: reason.into() }
}

pub(crate) fn unsupported(feature: impl Into<String>) -> ImageError {
    ImageError::Unsupported { format: ImageFormat::Vhdx, feature: feature.into() }
}

pub(crate) fn cannot_hold(reason: impl Into<String>) -> ImageError {
    ImageError::CannotHold { format: ImageFormat::Vhdx, reason: reason.into() }
}

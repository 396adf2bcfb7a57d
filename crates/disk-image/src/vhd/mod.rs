//! VHD, after Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0.
//!
//! | file | structure |
//! |---|---|
//! | `footer.rs` | Hard Disk Footer: kind, size, identity; where it is found |
//! | `header.rs` | Dynamic Disk Header and Parent Locator Entries |
//! | `blocks.rs` | Block Allocation Table and sector bitmaps: where a byte of the disk lies |
//! | `reader.rs` | [`Reader`] |
//! | `writer.rs` | [`Writer`] |
//!
//! Refuses: sizes above [`MAX_SIZE`], deprecated kinds, major versions other than 1, logical sectors other than 512.
//!
//! Decisions where the specification and the programs in use disagree
//! - **Size.** See [`SizeRule`].
//! - **Bits that are not set in the bitmap of a dynamic disk** read as zeros, as the specification says and as
//!   VirtualBox, XenServer and DiscUtils do. QEMU ignores the bitmap, but sets all its bits whenever it writes into
//!   a block, so both rules give the same bytes for its images; XenServer leaves stale bytes of the volume below
//!   under such bits, where only this rule is right. Our writer sets all bits of a new block too: every reader
//!   agrees about its images.
//! - **Time stamp of the parent.** It is the modification time of the parent *file*, which is not stored inside the
//!   parent and which every copy changes. The unique id decides; the stamp is given in [`Info`] for callers that know
//!   the time of the file and want to warn.
//! - **Footer.** The one at the end rules. Its copy at the front is used only if the one at the end is missing or
//!   damaged and does not itself say "fixed": the first sector of a fixed disk belongs to the guest, who could write
//!   anything there, a header that names a parent file included.
//!
//! Memory: [`CACHE_BYTES`](blocks::CACHE_BYTES) for each image of a chain while reading; the writer holds the whole
//! block allocation table and refuses larger ones than [`MAX_WRITER_TABLE`].

mod blocks;
mod footer;
mod header;
mod reader;
mod writer;

pub use blocks::CACHE_BYTES;
pub use footer::{Geometry, SizeRule, has_cookie};
pub use reader::Reader;
pub use writer::{CreateOptions, MAX_WRITER_TABLE, ParentLink, Writer};

use crate::{ImageError, ImageFormat};

/// Bytes of a sector; the format knows no other.
pub(crate) const SECTOR: u64 = 512;

/// Largest disk: 2040 GiB, the limit of the specification and of Windows. (Sectors of the file are counted in 32
/// bits, and bitmaps and tables must find room too.)
pub const MAX_SIZE: u64 = 2040 << 30;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All bytes of the disk, then the footer.
    Fixed,
    /// Blocks are present once written; the rest reads as zeros.
    Dynamic,
    /// Blocks hold what differs from a parent.
    Differencing,
}

impl Kind {
    /// The word of the specification.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Fixed => "fixed",
            Kind::Dynamic => "dynamic",
            Kind::Differencing => "differencing",
        }
    }
}

/// Which of the two footers was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FooterPlace {
    /// The one at the end of the file.
    End,
    /// The copy at the front, because the one at the end is missing or damaged.
    Front,
}

/// What an image says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Fixed, dynamic or differencing.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Which field gave the size.
    pub size_rule: SizeRule,
    /// "Current Size" of the footer, in bytes.
    pub current_size: u64,
    /// "Original Size" of the footer, in bytes.
    pub original_size: u64,
    /// "Disk Geometry" of the footer.
    pub geometry: Geometry,
    /// Bytes of a block; `None` for a fixed disk.
    pub block_size: Option<u32>,
    /// "Unique Id" of the footer.
    pub unique_id: [u8; 16],
    /// "Parent Unique ID" of the header of a differencing disk.
    pub parent_unique_id: Option<[u8; 16]>,
    /// "Parent Time Stamp": modification time of the parent file when the child was made, seconds since 2000 UTC.
    pub parent_time_stamp: Option<u32>,
    /// Names of the parent in the order they are tried; guest-supplied text.
    pub parent_names: Vec<String>,
    /// "Creator Application": `win `, `vpc `, `qemu`, ...
    pub creator_application: [u8; 4],
    /// "Creator Version".
    pub creator_version: u32,
    /// "Creator Host OS": `Wi2k` or `Mac `.
    pub creator_host_os: [u8; 4],
    /// "Time Stamp": when the image was created, seconds since 2000 UTC.
    pub time_stamp: u32,
    /// The machine was in saved state.
    pub saved_state: bool,
    /// Which footer was used.
    pub footer: FooterPlace,
}

pub(crate) fn damaged(structure: &'static str, offset: u64, reason: impl Into<String>) -> ImageError {
    ImageError::Damaged { format: ImageFormat::Vhd, structure, offset, reason: reason.into() }
}

pub(crate) fn unsupported(feature: impl Into<String>) -> ImageError {
    ImageError::Unsupported { format: ImageFormat::Vhd, feature: feature.into() }
}

/// Big-endian fields of structures of fixed length. What lies outside reads as 0; offsets are constants of the
/// specification, so this never happens.
pub(crate) fn be_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map_or(0, u64::from_be_bytes)
}
pub(crate) fn be_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map_or(0, u32::from_be_bytes)
}
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

/// The checksum of footer and header: the complement of the sum of all bytes, those of the checksum counted as 0.
pub(crate) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(at, _)| !(field..field + 4).contains(at))
        .fold(0u32, |sum, (_, &byte)| sum.wrapping_add(u32::from(byte)));
    !sum
}

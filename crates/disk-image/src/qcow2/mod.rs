//! qcow2, versions 2 and 3: QEMU's copy-on-write images, after QEMU `docs/interop/qcow2`.
//!
//! [`Reader`] shows the active state of an image, with its backing chain, as a [`BlockDevice`]. [`Writer`] fills a
//! version 3 image, alone or as an overlay of a [`Base`], and can go on with one after a crash. All numbers in the file
//! are big-endian.
//!
//! | file | structure of the specification |
//! |---|---|
//! | `header` | Header, Header extensions, Feature name table, Backing file name |
//! | `entry` | L1 and L2 table entries, Extended L2 Entries, addresses of a guest offset |
//! | `tables` | reading tables through a bounded cache |
//! | `compressed` | Compressed clusters: deflate, zstd |
//! | `backing` | which file the backing file is, and of which format; the base of an overlay |
//! | `reader` | Cluster mapping, for reading |
//! | `writer`, `refcounts`, `examine` | Host cluster management, and the order of writing |
//!
//! Read: cluster sizes 512 bytes to 2 MiB, every refcount width (refcounts are not needed to read), zero clusters,
//! compressed clusters, extended L2 entries, backing files, internal snapshots (only the active state is shown), images
//! that were not closed cleanly: the `dirty` bit only says that refcounts may be stale.
//!
//! The `corrupt` bit does not refuse an image. QEMU sets it when it met a broken table and forbids further writing
//! until a repair; it still reads such an image, and the guest's bytes found through the active tables are those that
//! the guest itself saw. A machine in that state needs its backup most. Every entry that is used is checked here in any
//! case, and [`Info::corrupt`] lets the caller say so.
//!
//! Refuses
//! - encryption, external data files, unknown incompatible features (under their name from the feature name table),
//! - backing files that the caller's [`Parents`](crate::Parents) does not open, and a backing file whose format
//!   is neither stated nor plain from name *and* magic (INV-25),
//! - reserved bits that are set, tables or clusters that do not lie in the file, L2 tables used twice.
//!
//! Limits, all of them above what QEMU makes: L1 table 32 MiB, refcount table 8 MiB, disk 2^63 - 1 bytes, chain
//! [`MAX_CHAIN`](crate::MAX_CHAIN). Memory of a reader: 2 MiB of table pages, one decompressed cluster (2 MiB), one
//! compressed cluster while it is decompressed (4 MiB, and up to 8 MiB of zstd window); opening checks the L1 table
//! with at most 32 MiB for a moment.
//!
//! Invariants
//! - What a reader leaves out of its allocated ranges is unallocated or a zero (sub)cluster in *this* layer and, where
//!   unallocated, in all layers below. (must)
//! - On disk, a cluster is never referenced before its refcount is durable, nor before its content is. (must: a crash
//!   leaks clusters at worst)

mod backing;
mod compressed;
mod entry;
mod examine;
mod header;
mod reader;
mod refcounts;
mod tables;
#[cfg(test)]
mod tests;
mod writer;

use block_io::BlockDevice;

use crate::{ImageError, ImageFormat};

pub use backing::Base;
pub use reader::Reader;
pub use writer::{CreateOptions, Writer};

/// Largest L1 table: QEMU's own limit. 4 Mi entries reach 2 PiB with clusters of 64 KiB.
const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table: QEMU's own limit.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Largest virtual size: offsets of files are signed 64-bit numbers everywhere.
const MAX_SIZE: u64 = i64::MAX as u64;

/// How compressed clusters of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Deflate without a header, window of 4 KiB. Called `zlib` by QEMU.
    Deflate,
    /// Zstandard.
    Zstd,
}

/// The reference from an image to its backing file, as it stands in the image. Guest-supplied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name: relative to the image, absolute, or a QEMU protocol.
    pub name: String,
    /// The format as QEMU writes it: `raw`, `qcow2`, `vpc`, `vhdx`, ...; `None` if the image does not say.
    pub format: Option<String>,
}

/// What an image says about itself: enough to make another of the same format and geometry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u32,
    /// Compression of compressed clusters, whether there are any or not.
    pub compression: Compression,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// Bits of a reference count.
    pub refcount_bits: u32,
    /// Whether refcounts may be written lazily.
    pub lazy_refcounts: bool,
    /// The image was not closed: refcounts may be stale.
    pub dirty: bool,
    /// QEMU found the image's tables damaged at some time.
    pub corrupt: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The backing file, if there is one.
    pub backing: Option<Backing>,
}

impl Info {
    /// Reads the header of an image only: backing files are not opened.
    pub fn read(file: &dyn BlockDevice) -> Result<Info, ImageError> {
        Ok(header::Header::read(file)?.info())
    }
}

fn damaged(structure: &'static str, offset: u64, reason: impl Into<String>) -> ImageError {
    ImageError::Damaged { format: ImageFormat::Qcow2, structure, offset, reason: reason.into() }
}

fn unsupported(feature: impl Into<String>) -> ImageError {
    ImageError::Unsupported { format: ImageFormat::Qcow2, feature: feature.into() }
}

fn cannot_hold(reason: impl Into<String>) -> ImageError {
    ImageError::CannotHold { format: ImageFormat::Qcow2, reason: reason.into() }
}

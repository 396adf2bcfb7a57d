//! Disk image formats: raw, VHD, VHDX and qcow2, read and written over [`block_io`]. No `unsafe`.
//!
//! Usable as a library: a reader takes any [`BlockDevice`] that holds the bytes of an image file and *is* a
//! [`BlockDevice`] of the disk inside; a writer fills any [`GrowableFile`] and is a [`WritableDevice`].
//!
//! Refuses to know where bytes live: parents and backing files are opened by the caller through [`Parents`], which
//! decides what may be opened. Nothing found inside an image is ever used as a path by this room.
//!
//! | module | format | specification |
//! |---|---|---|
//! | [`raw`] | raw with holes | - |
//! | [`vhd`] | VHD: fixed, dynamic, differencing | Virtual Hard Disk Image Format Specification 1.0 |
//! | [`vhdx`] | VHDX: fixed, dynamic, differencing, log replay | \[MS-VHDX\] |
//! | [`qcow2`] | qcow2 v2 and v3 | QEMU `docs/interop/qcow2.txt` |
//! | [`probe`] | which format a file is: explicit choice, or name *and* magic | |
//!
//! Invariants
//! - Nothing read from an image is trusted: checked arithmetic, no panic, memory bounded by the limits each module
//!   states, whatever the bytes say. (must)
//! - A reader never writes, not even to replay a log: replay goes to an overlay in memory. (must)
//! - A format is never chosen by guest bytes alone (INV-25): a raw disk that starts with a qcow2 magic stays raw. (must)
//! - After a writer's `flush` returns, a reader sees everything written before; after a crash at any moment a writer
//!   that reopens the file sees at least what was flushed. (must: a recovery is continued)

use std::sync::Arc;

pub use block_io::{BlockDevice, DeviceError, GrowableFile, WritableDevice};

pub mod probe;
pub mod qcow2;
pub mod raw;
pub mod vhd;
pub mod vhdx;

/// A disk image format, as `--format` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// The bytes of the disk, one to one.
    Raw,
    /// Microsoft Virtual Hard Disk, up to 2040 GiB.
    Vhd,
    /// Microsoft Virtual Hard Disk v2, up to 64 TiB.
    Vhdx,
    /// QEMU copy-on-write, version 2 or 3.
    Qcow2,
}

impl ImageFormat {
    /// The word used on the command line and in files.
    pub fn word(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Vhd => "vhd",
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

impl std::str::FromStr for ImageFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<ImageFormat, String> {
        [ImageFormat::Raw, ImageFormat::Vhd, ImageFormat::Vhdx, ImageFormat::Qcow2]
            .into_iter()
            .find(|format| format.word() == text)
            .ok_or_else(|| format!("{text:?} is not an image format: expected raw, vhd, vhdx or qcow2"))
    }
}

/// Why an image cannot be opened or written. Offsets are bytes from the start of the image file.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file below failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is not of the format it should be.
    #[error("is not a {format} image: {reason}", format = .format.word())]
    NotThisFormat {
        /// What was expected.
        format: ImageFormat,
        /// What was found, and where.
        reason: String,
    },
    /// It is of the format, and contradicts its specification.
    #[error("{format} image is damaged: {structure} at byte {offset}: {reason}", format = .format.word())]
    Damaged {
        /// The format.
        format: ImageFormat,
        /// The structure under the name its specification uses.
        structure: &'static str,
        /// Where it begins in the file.
        offset: u64,
        /// What was found and what was expected.
        reason: String,
    },
    /// It uses a part of the format that is not supported, and reading on would give wrong bytes.
    #[error("{format} image uses what is not supported: {feature}", format = .format.word())]
    Unsupported {
        /// The format.
        format: ImageFormat,
        /// The feature, under the name its specification uses.
        feature: String,
    },
    /// It points to another file, and the caller did not allow that one.
    #[error("{format} image refers to {reference:?}, which is not allowed: {reason}", format = .format.word())]
    NotAllowed {
        /// The format.
        format: ImageFormat,
        /// The reference as it stands in the image; guest-supplied text.
        reference: String,
        /// Why not.
        reason: String,
    },
    /// The parent of a differencing image is not the one it was made from.
    #[error("the parent of the {format} image is another file: {reason}", format = .format.word())]
    ParentMismatch {
        /// The format.
        format: ImageFormat,
        /// Identity expected and found.
        reason: String,
    },
    /// A disk of these properties cannot be written in this format.
    #[error("a {format} image cannot hold this disk: {reason}", format = .format.word())]
    CannotHold {
        /// The format.
        format: ImageFormat,
        /// The limit that is passed.
        reason: String,
    },
}

/// A reference from an image to the file below it, as it stands in the image. Guest-supplied: never open it blindly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentReference {
    /// The format of the image that holds the reference.
    pub child: ImageFormat,
    /// Possible names in the order to try: relative path first, then absolute ones. With `/` or `\` as written.
    pub names: Vec<String>,
    /// The format the reference states for the parent, if it states one.
    pub format: Option<ImageFormat>,
    /// How many images lie above the wanted one; bounded by [`MAX_CHAIN`].
    pub depth: usize,
}

/// Longest chain of differencing images or backing files that is followed: longer ones were never seen, and a loop
/// must end.
pub const MAX_CHAIN: usize = 64;

/// The file of a parent, and what resolves the references found in it.
pub type OpenedParent = (Arc<dyn BlockDevice>, Arc<dyn Parents>);

/// Opens the files that images refer to. The caller decides what may be opened and how names are resolved.
pub trait Parents {
    /// The file that `reference` means, and the `Parents` that resolves references found in *that* file (relative
    /// names are relative to the file that holds them). Refusal is [`ImageError::NotAllowed`].
    fn open(&self, reference: &ParentReference) -> Result<OpenedParent, ImageError>;
}

/// Refuses every reference: for images that must stand alone.
pub struct NoParents;

impl Parents for NoParents {
    fn open(&self, reference: &ParentReference) -> Result<OpenedParent, ImageError> {
        Err(ImageError::NotAllowed {
            format: reference.child,
            reference: reference.names.first().cloned().unwrap_or_default(),
            reason: "no other file may be opened here".to_owned(),
        })
    }
}

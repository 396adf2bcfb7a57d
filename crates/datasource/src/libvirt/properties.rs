//! Names of properties of a disk's description.

/// The disk's name in the machine.
pub(super) const TARGET: &str = "target";
/// Its image file.
pub(super) const FILE: &str = "file";
/// The identity of that file.
pub(super) const INODE: &str = "inode";
/// The checkpoint or bitmap that was made with the view.
pub(super) const MARK: &str = "checkpoint";
/// Older ones that were still there, with spaces between.
pub(super) const KEPT: &str = "kept";

//! Reference counts: which chunks and packs nothing needs, at the cost of what came and went (section 7.1).
//!
//! The count of a chunk is the number of different needed nodes that have it among their children, and of needed disks of
//! which it is the root. Nothing is counted while points are committed and deleted: a reclaim compares the roots of the points
//! that are needed now with those that were counted last, and follows the difference down ([`update`]). What is on disk
//! ([`store`]) is derived, and thrown away at the first doubt.
//!
//! Refuses: deciding that anything may be removed. Counts only make candidates; the mark before the permit is what decides, and
//! compares itself with them.
//!
//! Invariants
//! - The counts are exactly those of the roots that stand with them. (should: a mark notices, and they are made anew)
//! - One file makes an update count, so it counts or does not. (should)

mod packs;
mod store;
#[cfg(test)]
mod tests;
mod update;

pub(crate) use packs::{Counted, contradicts};
pub(crate) use store::{Failure, examine, superseded};

/// What became of the reference counts in a reclaim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CountsUse {
    /// They followed what came and went since the last reclaim.
    #[default]
    Kept,
    /// They could not be used, for this reason, and were made anew.
    Anew(String),
    /// A mark found them wrong: nothing was unlinked, and they were made anew.
    Wrong(String),
    /// There was no room for them, this process may not write, or it was asked for: everything was marked instead.
    Unused,
}

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

//! The states in which storage may be after a power cut.
//!
//! One function walks over everything uncertain and asks `choose` at each fork; a random chooser draws one state, an
//! odometer over the answers visits all of them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Snapshot;
use super::torn_write::{Choose, torn_pages};
use super::world::{Inode, Node, World, parent_of};
use crate::SeededRandomness;

/// Distinct states after a power cut.
#[derive(Debug, Clone)]
pub struct CrashStates {
    /// The states, each once.
    pub states: Vec<Snapshot>,
    /// Whether these are all there are; otherwise a sample.
    pub complete: bool,
}

pub(super) fn after_cut(world: &World, choose: &mut Choose<'_>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    // Names are in order, so a folder is decided before what is in it.
    for (name, state) in world.mounted_names() {
        let node = match state.on_disk.as_slice() {
            [] => continue,
            [only] => *only,
            several => several[choose(several.len() as u64) as usize],
        };
        let parent = parent_of(name);
        if !parent.is_empty() && !snapshot.folders.contains(parent) {
            continue;
        }
        match node {
            None => {}
            Some(Node::Folder) => {
                snapshot.folders.insert(name.clone());
            }
            Some(Node::File(inode)) => {
                if let Some(inode) = world.inodes.get(&inode) {
                    snapshot.files.insert(name.clone(), stored(inode, choose));
                }
            }
        }
    }
    snapshot
}

/// What of a file is on disk.
fn stored(inode: &Inode, choose: &mut Choose<'_>) -> Arc<Vec<u8>> {
    if inode.lost.is_empty() && inode.dirty_from >= inode.content.len() {
        return inode.content.clone();
    }
    let mut bytes = inode.content.to_vec();
    for (at, lost) in &inode.lost {
        bytes[*at..*at + lost.len()].copy_from_slice(lost);
    }
    for (at, page) in torn_pages(&inode.content, inode.dirty_from, choose) {
        bytes[at..at + page.len()].copy_from_slice(&page);
    }
    if inode.dirty_from < bytes.len() {
        // The length is written on its own: it may be old, new, or that of any write between.
        let unsynced = (bytes.len() - inode.dirty_from) as u64;
        match choose(3) {
            0 => {}
            1 => bytes.truncate(inode.dirty_from),
            _ => bytes.truncate(inode.dirty_from + choose(unsynced) as usize),
        }
    }
    Arc::new(bytes)
}

pub(super) fn states(world: &World, limit: usize) -> CrashStates {
    let mut found = BTreeSet::new();
    let mut answers: Vec<(u64, u64)> = Vec::new();
    // Different answers may lead to equal states; so many walks are worth their time.
    for _ in 0..limit.saturating_mul(16).max(64) {
        let mut step = 0;
        let snapshot = after_cut(world, &mut |bound| {
            if step == answers.len() {
                answers.push((0, bound));
            }
            step += 1;
            answers[step - 1].0
        });
        found.insert(snapshot);
        if found.len() > limit {
            break;
        }
        while answers.last().is_some_and(|(answer, bound)| answer + 1 >= *bound) {
            answers.pop();
        }
        match answers.last_mut() {
            Some((answer, _)) => *answer += 1,
            None => return CrashStates { states: found.into_iter().collect(), complete: true },
        }
    }
    // Too many: everything kept, everything lost, and random ones between.
    let randomness = SeededRandomness::new(world.seed);
    let mut sample = BTreeSet::from([
        after_cut(world, &mut |bound| bound.saturating_sub(1)),
        after_cut(world, &mut |_| 0),
    ]);
    for _ in 0..limit.saturating_mul(4) {
        if sample.len() >= limit {
            break;
        }
        sample.insert(after_cut(world, &mut |bound| randomness.below(bound)));
    }
    CrashStates { states: sample.into_iter().take(limit).collect(), complete: false }
}

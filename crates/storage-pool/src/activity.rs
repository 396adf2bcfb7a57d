//! What goes on in a pool at the moment, as far as a reclaim beside it must know.
//!
//! Invariants
//! - A pack that a running ingest made or shares is not put into quarantine: the look at the pins and the record are one
//!   step, and so are the look at the state and the pin. (must)
//! - What was not expired when the oldest ingest or reader began counts as needed (INV-11). (must)
//! - A pack in quarantine gets no permit while an ingest runs that began before its quarantine. (must: a second wall
//!   behind the first)

use std::collections::{BTreeMap, HashSet};

use crate::chunk::PackId;

/// Everything under way.
#[derive(Default)]
pub(crate) struct Activity {
    next: u64,
    running: BTreeMap<u64, Running>,
    is_reclaiming: bool,
    /// Packs of ingests that ended since the reclaim under way began: it may have looked at the points before their
    /// commit.
    ended: HashSet<PackId>,
}

struct Running {
    /// Pool time when it began.
    began: u64,
    /// The last record then.
    head: u64,
    /// Whether it writes; a reader only keeps points from being taken for expired.
    is_ingest: bool,
    /// Packs that it made or shares.
    packs: HashSet<PackId>,
}

impl Activity {
    /// Something begins at this pool time, after record `head`. Its number.
    pub fn begin(&mut self, began: u64, head: u64, is_ingest: bool) -> u64 {
        self.next += 1;
        self.running.insert(self.next, Running { began, head, is_ingest, packs: HashSet::new() });
        self.next
    }

    /// Something ended.
    pub fn end(&mut self, number: u64) {
        if let Some(running) = self.running.remove(&number)
            && self.is_reclaiming
        {
            self.ended.extend(running.packs);
        }
    }

    /// Keeps a pack for what has this number.
    pub fn pin(&mut self, number: u64, pack: PackId) {
        if let Some(running) = self.running.get_mut(&number) {
            running.packs.insert(pack);
        }
    }

    /// A reclaim begins. False if one is under way.
    pub fn begin_reclaim(&mut self) -> bool {
        !std::mem::replace(&mut self.is_reclaiming, true)
    }

    /// The reclaim ended.
    pub fn end_reclaim(&mut self) {
        self.is_reclaiming = false;
        self.ended = HashSet::new();
    }

    /// Whether something under way made or shares `pack`.
    pub fn is_pinned(&self, pack: PackId) -> bool {
        self.ended.contains(&pack) || self.running.values().any(|running| running.packs.contains(&pack))
    }

    /// Whether an ingest is under way.
    pub fn has_ingest(&self) -> bool {
        self.running.values().any(|running| running.is_ingest)
    }

    /// Whether an ingest is under way that began before record `number`.
    pub fn has_ingest_before(&self, number: u64) -> bool {
        self.running.values().any(|running| running.is_ingest && running.head < number)
    }

    /// Pool time when the oldest of what is under way began.
    pub fn oldest(&self) -> Option<u64> {
        self.running.values().map(|running| running.began).min()
    }
}

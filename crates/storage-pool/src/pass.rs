//! Saying that something is under way in a pool; see [`mod@crate::activity`].

use std::sync::Arc;

use crate::chunk::{Location, PackId};
use crate::pool::Pool;

/// An ingest or a reader is under way, until this is dropped.
pub(crate) struct Pass {
    pool: Arc<Pool>,
    number: u64,
    /// Pool time when it began.
    pub began: u64,
}

impl Pass {
    /// Keeps a pack that this ingest makes.
    pub fn pin(&self, pack: PackId) {
        self.pool.activity().pin(self.number, pack);
    }

    /// Keeps the pack of a frame, if the frame may be used for a new point: one step, so that no quarantine comes between.
    pub fn pin_healthy(&self, place: Location) -> bool {
        let mut activity = self.pool.activity();
        let is_healthy = self.pool.state().is_healthy(place.pack, place.frame());
        if is_healthy {
            activity.pin(self.number, place.pack);
        }
        is_healthy
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.pool.activity().end(self.number);
    }
}

/// A reclaim is under way, until this is dropped.
pub(crate) struct ReclaimPass<'p> {
    pool: &'p Pool,
}

impl Drop for ReclaimPass<'_> {
    fn drop(&mut self) {
        self.pool.activity().end_reclaim();
    }
}

impl Pool {
    fn enter(self: &Arc<Self>, is_ingest: bool) -> Pass {
        let mut activity = self.activity();
        let (began, head) = {
            let state = self.state();
            (state.pool_time, state.head)
        };
        let number = activity.begin(began, head, is_ingest);
        Pass { pool: self.clone(), number, began }
    }

    /// An ingest begins.
    pub(crate) fn enter_ingest(self: &Arc<Self>) -> Pass {
        self.enter(true)
    }

    /// Somebody begins to read points.
    pub(crate) fn enter_reading(self: &Arc<Self>) -> Pass {
        self.enter(false)
    }

    /// A reclaim begins, if none is under way.
    pub(crate) fn enter_reclaim(&self) -> Option<ReclaimPass<'_>> {
        self.activity().begin_reclaim().then_some(ReclaimPass { pool: self })
    }
}

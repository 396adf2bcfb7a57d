//! Saying that something is under way in a pool; see [`mod@crate::activity`].

use std::sync::{Arc, MutexGuard, PoisonError};

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

/// Nothing is under way that seals packs, and nothing begins to, until this is dropped.
pub(crate) struct AlonePass<'p> {
    _reclaim: ReclaimPass<'p>,
    _sealing: MutexGuard<'p, ()>,
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

    /// An ingest begins. It waits for a rotation that is under way: some hundred milliseconds.
    pub(crate) fn enter_ingest(self: &Arc<Self>) -> Pass {
        let _sealing = self.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        self.enter(true)
    }

    /// A rotation begins, if neither an ingest nor a reclaim is under way: no pack is begun under the older root and ended
    /// after it.
    pub(crate) fn enter_alone(&self) -> Option<AlonePass<'_>> {
        let sealing = self.sealing.lock().unwrap_or_else(PoisonError::into_inner);
        let reclaim = self.enter_reclaim()?;
        let is_idle = !self.activity().has_ingest();
        is_idle.then_some(AlonePass { _reclaim: reclaim, _sealing: sealing })
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

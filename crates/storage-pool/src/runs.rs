//! Keeping the runs of the index: what is in none becomes durable, tiers are merged, packs that went are left out.

use std::sync::{PoisonError, TryLockError};

use crate::chunk::PackId;
use crate::error::PoolError;
use crate::index::{Build, Index};
use crate::pool::Pool;
use crate::sequence;

impl Pool {
    /// Makes what is in no run durable in one, and merges runs where a tier is full.
    pub(crate) fn flush_index(&self) -> Result<(), PoolError> {
        self.change_runs(|index, head| index.flush(head))?;
        match self.merge_runs() {
            // Nothing waits for a merge; it is due again later.
            Err(PoolError::Full { .. }) => Ok(()),
            merged => merged,
        }
    }

    /// Merges runs while some are due. Ingests, restores and flushes go on meanwhile.
    fn merge_runs(&self) -> Result<(), PoolError> {
        let _merging = match self.merging.try_lock() {
            Ok(merging) => merging,
            Err(TryLockError::Poisoned(merging)) => merging.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        loop {
            let head = self.state().head;
            let Some(build) = self.index().due_merge(head) else { return Ok(()) };
            match build.write() {
                Ok(built) => self.index_mut().install(built),
                Err(error) => {
                    self.heed_naming(&error);
                    self.index_mut().heal(error)?;
                    self.change_runs(|index, head| index.flush(head))?;
                }
            }
        }
    }

    /// Makes the index forget packs that have a permit. Ingests and readers go on meanwhile.
    pub(crate) fn drop_packs(&self, is_gone: &dyn Fn(PackId) -> bool) -> Result<(), PoolError> {
        let _merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.write_without(is_gone);
        // On a full disk the runs stay: what they say of packs with a permit is not used.
        if !matches!(written, Err(PoolError::Full { .. })) {
            written?;
        }
        self.index_mut().forget(is_gone);
        Ok(())
    }

    fn write_without(&self, is_gone: &dyn Fn(PackId) -> bool) -> Result<(), PoolError> {
        self.write_runs(&|index, head| index.due_rewrite(head, &|pack| !is_gone(pack)))
    }

    /// Writes all runs as one under key generation `generation`, which is about to begin.
    pub(crate) fn renew_index(&self, generation: u16) -> Result<(), PoolError> {
        let _merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_runs(&|index, head| index.renewed(head, generation))
    }

    fn write_runs(&self, due: &dyn Fn(&Index, u64) -> Option<Build>) -> Result<(), PoolError> {
        self.change_runs(|index, head| index.flush(head))?;
        loop {
            let head = self.state().head;
            let build = due(&self.index(), head);
            match build.map(Build::write) {
                None => return Ok(()),
                Some(Ok(built)) => {
                    self.index_mut().install(built);
                    return Ok(());
                }
                // A run that cannot be read is not merged: its packs are read anew.
                Some(Err(error)) => {
                    self.heed_naming(&error);
                    self.index_mut().heal(error)?;
                    self.change_runs(|index, head| index.flush(head))?;
                }
            }
        }
    }

    fn change_runs(
        &self,
        write: impl FnOnce(&mut Index, u64) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        let head = self.state().head;
        let result = write(&mut self.index_mut(), head);
        if let Err(error) = &result {
            self.heed_naming(error);
        }
        result
    }

    /// If a name may not last, nothing more is written (INV-5).
    pub(crate) fn heed_naming(&self, error: &PoolError) {
        if let PoolError::Io { action: sequence::NAMING, .. } = error {
            self.break_writer(error);
        }
    }
}

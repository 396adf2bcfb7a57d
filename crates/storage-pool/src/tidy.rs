//! Having the deletion service remove what newer derived files have made needless, between reclaims.
//!
//! Runs and bundles are merged all the time and superseded ones stay until somebody who may unlink takes them. Reclaim
//! does; a pool on which nothing is ever reclaimed would keep all of them.

use crate::bundle;
use crate::deletion::DeletionService;
use crate::error::PoolError;
use crate::pool::Pool;

/// So many needless files are left lying before the service is asked: it reads every record first.
const MANY: u64 = 32;
/// One more for so many records, because reading them is what a removal costs.
const RECORDS_EACH: u64 = 64;

impl Pool {
    /// Has superseded runs and bundles removed, once there are many. Returns whether the service was asked.
    pub fn tidy(&self, service: &dyn DeletionService) -> Result<bool, PoolError> {
        let runs = self.index().superseded();
        let bundles = bundle::superseded_names(&*self.world.files)?.len();
        let enough = MANY + self.state().head / RECORDS_EACH;
        if ((runs.len() + bundles) as u64) < enough {
            return Ok(false);
        }
        service.carry_out(None, &runs)?;
        self.index_mut().forget_superseded(&runs);
        Ok(true)
    }
}

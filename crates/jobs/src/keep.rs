//! Keeping the pool: which points a prune drops, and why each stays.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{DatasourceId, Problem, RecoveryPointId, Timestamp};
use storage_pool::state::Point;
use storage_pool::{MapRoot, Pool};

use crate::problem;

/// A point with the reason why it stays or goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The point.
    pub point: Point,
    /// Why.
    pub why: String,
}

/// What a prune would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrunePlan {
    /// Points that stay.
    pub kept: Vec<Marked>,
    /// Points that go.
    pub removed: Vec<Marked>,
}

/// Plans a prune: keep the last `keep_last` good points of each machine; without a rule everything stays (no stored
/// policy means keep everything). The pool's floor holds whatever the rule says (INV-13).
pub fn plan_prune(
    pool: &Arc<Pool>,
    machine: Option<DatasourceId>,
    keep_last: Option<u32>,
) -> Result<PrunePlan, Problem> {
    let state = pool.state().clone();
    let mut plan = PrunePlan::default();
    let mut good_seen: BTreeMap<DatasourceId, u32> = BTreeMap::new();
    // A point of which something is lost takes no good point's place: the older whole ones are all there is.
    let is_damaged = |point: &Point| -> Result<bool, Problem> {
        let lost = |disk: &storage_pool::state::PointDisk| {
            let map = MapRoot { root: disk.root, levels: disk.levels };
            pool.lost_blocks(point.domain, map).map(|lost| !lost.is_empty())
        };
        for disk in &point.disks {
            if lost(disk).map_err(problem::pool)? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let floor = pool.floor(machine);
    let live = state
        .in_order()
        .rev()
        .filter(|point| point.deleted.is_none() && machine.is_none_or(|machine| point.datasource == machine));
    for point in live {
        let is_good = point.suspect.is_none() && !point.incomplete && !is_damaged(point)?;
        let seen = good_seen.entry(point.datasource).or_default();
        let rank = *seen;
        *seen += u32::from(is_good);
        let mark = |why: String| Marked { point: point.clone(), why };
        let Some(keep) = keep_last else {
            plan.kept.push(mark("no policy is stored: everything is kept".to_owned()));
            continue;
        };
        if is_good && rank < keep {
            plan.kept.push(mark(format!("one of the last {keep} good points")));
        } else if let Some(why) = floor.keeps(point) {
            plan.kept.push(mark(format!("retention floor: {why}")));
        } else if !is_good && rank == 0 {
            // Nothing newer is good: a bad point may be all there is.
            plan.kept.push(mark("there is no newer good point".to_owned()));
        } else {
            plan.removed.push(mark(format!("not among the last {keep} good points")));
        }
    }
    plan.kept.reverse();
    plan.removed.reverse();
    Ok(plan)
}

/// Carries a plan out, and gives the ids of the points it soft-deleted.
pub fn prune(pool: &Arc<Pool>, plan: &PrunePlan) -> Result<Vec<RecoveryPointId>, Problem> {
    let mut deleted = Vec::new();
    for marked in &plan.removed {
        pool.delete_point(marked.point.id, &marked.why).map_err(problem::pool)?;
        deleted.push(marked.point.id);
    }
    Ok(deleted)
}

/// When the space of points deleted now returns at the earliest, by this clock.
pub fn space_returns(pool: &Pool, now: Timestamp) -> Timestamp {
    let settings = pool.settings();
    Timestamp(now.0 + (settings.soft_delete + settings.reclaim_hold) * Timestamp::SECOND)
}

//! The ledger: what each point must hold, known from outside the pool.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use block_io::BlockDevice;
use model::{JobId, RecoveryPointId};
use storage_pool::Pool;

/// Which points may have ranges that cannot be had, after something rotted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    None,
    /// All but the newest.
    Older,
    Any,
}

#[derive(Default)]
pub struct Ledger {
    /// What the disks were at the frozen moment of each job, whatever became of it.
    sent: BTreeMap<JobId, Vec<Vec<u8>>>,
    acknowledged: BTreeSet<RecoveryPointId>,
    deleted: BTreeSet<RecoveryPointId>,
}

impl Ledger {
    pub fn sent(&mut self, job: JobId, disks: Vec<Vec<u8>>) {
        self.sent.insert(job, disks);
    }

    pub fn acknowledge(&mut self, point: RecoveryPointId) {
        self.acknowledged.insert(point);
    }

    pub fn delete(&mut self, point: RecoveryPointId) {
        self.deleted.insert(point);
    }

    pub fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// Forgets points that a rolled back pool cannot know.
    pub fn roll_back(&mut self, pool: &Arc<Pool>) {
        let state = pool.state();
        self.acknowledged.retain(|id| state.points.contains_key(id));
    }

    /// Compares every point, acknowledged or not, with its disks at its time. Points that are suspect may differ, points
    /// that were deleted may be gone. Where bytes rotted, a range may be told to be lost, but never be wrong.
    pub fn examine(&self, pool: &Arc<Pool>, lost: Lost) -> Result<(), String> {
        let state = pool.state().clone();
        for id in &self.acknowledged {
            if !state.points.contains_key(id) {
                return Err(format!("acknowledged point {id} is gone"));
            }
        }
        let newest = state.in_order().next_back().map(|point| point.id);
        for point in state.in_order().filter(|point| point.suspect.is_none()) {
            let is_deleted = point.deleted.is_some() || self.deleted.contains(&point.id);
            let may_be_lost = lost == Lost::Any || lost == Lost::Older && newest != Some(point.id);
            let job = point.details().job.ok_or("a point without a job")?;
            let disks = self.sent.get(&job).ok_or_else(|| format!("nobody sent point {}", point.id))?;
            if disks.len() != point.machine_disks().count() {
                return Err(format!(
                    "point {} has {} disks of {}",
                    point.id,
                    point.machine_disks().count(),
                    disks.len()
                ));
            }
            for (disk, truth) in point.machine_disks().zip(disks) {
                let device = pool.open_disk(point.id, disk.index).map_err(|error| error.to_string())?;
                if device.size() != truth.len() as u64 {
                    return Err(format!("point {}: {} bytes of {}", point.id, device.size(), truth.len()));
                }
                for (number, block) in truth.chunks(super::BLOCK).enumerate() {
                    let mut found = vec![0; block.len()];
                    match device.read_at((number * super::BLOCK) as u64, &mut found) {
                        Ok(()) if found == block => {}
                        Ok(()) => {
                            return Err(format!(
                                "point {} ({}), disk {}: block {number} is wrong",
                                point.id,
                                point.details().cause,
                                disk.index
                            ));
                        }
                        Err(_) if may_be_lost || is_deleted => {}
                        Err(error) => return Err(format!("point {}: {error}", point.id)),
                    }
                }
            }
        }
        Ok(())
    }
}

//! Space accounting: which stored bytes a point has to itself, and what deleting points gives back.
//!
//! Exact, in stored bytes: each needed chunk is looked at once, in its newest sound place, with the share that it has in the
//! stored bytes of its frame. What a reclaim really frees is that and the tables of the packs, less what stays in packs of
//! which too much is in use to be rewritten, and give or take what rewriting encodes differently.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use model::RecoveryPointId;

use crate::chunk::Location;
use crate::error::PoolError;
use crate::index::{View, ViewPlace};
use crate::mark::{NEED, SEVERAL, alone, highest};
use crate::packs;
use crate::pool::Pool;
use crate::sorter::{Combine, Sorter, distinct};
use crate::state::Point;

/// Owners of [`Pool::freed_bytes`]: points deleted already, those asked for, all others.
const DELETED: u64 = 0;
const ASKED: u64 = 1;

impl Pool {
    /// For each point that is not expired, the stored bytes that no other such point needs. One walk over all maps.
    pub fn unique_bytes(self: &Arc<Self>) -> Result<HashMap<RecoveryPointId, u64>, PoolError> {
        let state = self.state().clone();
        let soft_delete = self.settings().soft_delete;
        let live: HashMap<u64, RecoveryPointId> = state
            .in_order()
            .filter(|point| !state.is_expired(point, soft_delete))
            .map(|point| (point.number, point.id))
            .collect();
        let owner = |point: &Point| live.contains_key(&point.number).then_some(point.number);
        let mut bytes = self.stored_bytes(&owner, alone)?;
        bytes.remove(&SEVERAL);
        Ok(live.iter().map(|(number, id)| (*id, bytes.get(number).copied().unwrap_or(0))).collect())
    }

    /// Stored bytes that return if these points are deleted, once they are expired and reclaimed: what no other point
    /// needs, but for those that were deleted before and expire first.
    pub fn freed_bytes(self: &Arc<Self>, points: &BTreeSet<RecoveryPointId>) -> Result<u64, PoolError> {
        let soft_delete = self.settings().soft_delete;
        let owner = |point: &Point| {
            let state = self.state();
            if state.is_expired(point, soft_delete) {
                return None;
            }
            Some(match (points.contains(&point.id), &point.deleted) {
                (true, None) => ASKED,
                (_, Some(_)) => DELETED,
                (false, None) => SEVERAL,
            })
        };
        Ok(self.stored_bytes(&owner, highest)?.get(&ASKED).copied().unwrap_or(0))
    }

    /// Stored bytes by owner.
    fn stored_bytes(
        self: &Arc<Self>,
        owner: &dyn Fn(&Point) -> Option<u64>,
        owners: Combine<NEED>,
    ) -> Result<HashMap<u64, u64>, PoolError> {
        loop {
            match self.try_stored_bytes(owner, owners) {
                Err(
                    error @ (PoolError::Damaged { .. } | PoolError::TooNew { .. } | PoolError::Io { .. }),
                ) => {
                    self.index_mut().heal(error)?;
                }
                done => return done,
            }
        }
    }

    fn try_stored_bytes(
        self: &Arc<Self>,
        owner: &dyn Fn(&Point) -> Option<u64>,
        owners: Combine<NEED>,
    ) -> Result<HashMap<u64, u64>, PoolError> {
        // What has one owner, in order of place: pack, place, owner. What several share is nobody's.
        let mut owned: Sorter<16> = Sorter::new(&self.world.files, self.room, distinct);
        let mut packs = Vec::new();
        self.owned(owner, owners, &mut |view: &View, owner, places: &[ViewPlace]| {
            if packs.is_empty() {
                packs.clone_from(&view.packs);
            }
            let is_sound = |place: &&ViewPlace| {
                view.packs.get(place.pack as usize).is_some_and(|(id, info)| {
                    info.present && self.state().is_healthy(*id, Location { pack: *id, at: place.at }.frame())
                })
            };
            let Some(place) = places.iter().rev().find(is_sound).filter(|_| owner != SEVERAL) else {
                return Ok(());
            };
            let mut record = [0; 16];
            record[..4].copy_from_slice(&place.pack.to_be_bytes());
            record[4..8].copy_from_slice(&place.at.to_be_bytes());
            record[8..].copy_from_slice(&owner.to_be_bytes());
            owned.push(record)
        })?;
        let owned = owned.finish();
        let mut owned = owned.read();
        let mut bytes: HashMap<u64, u64> = HashMap::new();
        let mut last: Option<(u32, HashMap<u32, u64>)> = None;
        while let Some(record) = owned.next()? {
            let number =
                |at: usize| u32::from_be_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
            let (pack, at) = (number(0), number(4));
            let owner = u64::from(number(8)) << 32 | u64::from(number(12));
            if last.as_ref().is_none_or(|(open, _)| *open != pack) {
                let Some((id, _)) = packs.get(pack as usize) else { continue };
                // A pack whose table cannot be read is told by verify; what it holds counts as nothing here.
                let table = self.read_table(*id);
                last = Some((pack, table.map(|table| packs::shares(&table)).unwrap_or_default()));
            }
            let share = last.as_ref().and_then(|(_, shares)| shares.get(&at)).copied().unwrap_or(0);
            *bytes.entry(owner).or_default() += share;
        }
        Ok(bytes)
    }
}

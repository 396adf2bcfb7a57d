//! Recovery points for people: states, names, differences.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::PoisonError;

use jobs::machine::StoredDisk;
use model::{Code, Consistency, DatasourceId, PointState, Problem, RecoveryPointId, Timestamp};
use protocol::api::{self, DiskDiff, PointDiff, RecoveryPoint, Time};
use storage_pool::state::Point;
use storage_pool::{Floor, MapRoot};

use super::App;
use crate::api::names::{self, NamedPoint};

/// Stored bytes that only one point uses, by point.
pub(crate) type UniqueBytes = std::collections::HashMap<RecoveryPointId, u64>;

/// Lists of a pool with more points neither count what is unique to each nor look whether all packs are there, unless
/// the index is open anyway: the cost of both follows the pool. What uses or shows one point does both.
pub(crate) const MOST_COUNTED: usize = 1000;

impl App {
    /// What only one point uses; counted once for each head of the sequence. Nothing where it cannot be counted: verify
    /// tells why.
    pub(crate) fn unique_bytes(&self) -> UniqueBytes {
        let head = self.pool().state().head;
        let mut known = self.unique.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some((at, bytes)) if *at == head => bytes.clone(),
            _ => {
                let bytes = self.pool().unique_bytes().unwrap_or_default();
                *known = Some((head, bytes.clone()));
                bytes
            }
        }
    }

    /// Points of which something cannot be had.
    pub(crate) fn damaged_points(&self) -> BTreeSet<RecoveryPointId> {
        if self.pool().has_known_damage() { self.walk_for_damage() } else { BTreeSet::new() }
    }

    /// Walks the maps, once for each head.
    fn walk_for_damage(&self) -> BTreeSet<RecoveryPointId> {
        let pool = self.pool();
        let head = pool.state().head;
        let mut known = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, points)) = &*known
            && *at == head
        {
            return points.clone();
        }
        let state = pool.state().clone();
        let lost = |point: &&Point| {
            point.disks.iter().any(|disk| {
                let map = MapRoot { root: disk.root, levels: disk.levels };
                pool.lost_blocks(point.domain, map).map_or(true, |lost| !lost.is_empty())
            })
        };
        let points: BTreeSet<RecoveryPointId> = state
            .in_order()
            .filter(|point| !state.is_expired(point, pool.settings().soft_delete))
            .filter(lost)
            .map(|point| point.id)
            .collect();
        *known = Some((head, points.clone()));
        points
    }

    /// Whether lists count and look at everything.
    pub(crate) fn is_counted(&self) -> bool {
        self.pool().state().points.len() <= MOST_COUNTED
    }

    /// Some of what [`App::points_of`] gives, for a list: those at the places `some` of it. Also how many there are.
    pub(crate) fn listed_points(
        &self,
        datasource: Option<DatasourceId>,
        some: Range<usize>,
    ) -> (Vec<(Point, PointState)>, usize) {
        let is_at_hand = self.is_counted() || self.pool().has_known_damage_at_hand();
        let damaged = if is_at_hand { self.damaged_points() } else { BTreeSet::new() };
        self.with_states(datasource, &damaged, some)
    }

    /// Points of a machine, or of all, with their states, oldest first. Expired ones are left out.
    pub(crate) fn points_of(&self, datasource: Option<DatasourceId>) -> Vec<(Point, PointState)> {
        self.with_states(datasource, &self.damaged_points(), 0..usize::MAX).0
    }

    fn with_states(
        &self,
        datasource: Option<DatasourceId>,
        damaged: &BTreeSet<RecoveryPointId>,
        some: Range<usize>,
    ) -> (Vec<(Point, PointState)>, usize) {
        let soft_delete = self.pool().settings().soft_delete;
        let state = self.pool().state();
        let (mut points, mut total) = (Vec::new(), 0);
        for point in state.in_order().filter(|point| datasource.is_none_or(|it| point.datasource == it)) {
            if state.is_expired(point, soft_delete) {
                continue;
            }
            if some.contains(&total) {
                let is_damaged = damaged.contains(&point.id);
                let is = jobs::recover::state_in(&state, soft_delete, point, is_damaged);
                points.push((point.clone(), is));
            }
            total += 1;
        }
        (points, total)
    }

    /// The point that was typed.
    pub(crate) fn find_point(
        &self,
        text: &str,
        datasource: Option<&super::StoredDatasource>,
        min_consistency: Option<Consistency>,
    ) -> Result<(Point, PointState), Problem> {
        let mut points = self.points_of(datasource.map(|datasource| datasource.id));
        let named: Vec<NamedPoint> = points
            .iter()
            .map(|(point, state)| NamedPoint {
                id: point.id,
                time: point.captured,
                state: *state,
                consistency: point.consistency,
            })
            .collect();
        let of = datasource.map(|datasource| datasource.name.as_str());
        let at = names::point(text, of, &named, min_consistency)?;
        Ok(points.swap_remove(at))
    }

    pub(crate) fn api_point(&self, point: &Point, state: PointState, unique: Option<u64>) -> RecoveryPoint {
        self.api_point_over(&self.pool().floor(Some(point.datasource)), point, state, unique)
    }

    /// The same for one of many points, all over the floor of one moment.
    pub(crate) fn api_point_over(
        &self,
        floor: &Floor,
        point: &Point,
        state: PointState,
        unique: Option<u64>,
    ) -> RecoveryPoint {
        let pool = self.pool();
        let settings = pool.settings();
        let reason = match state {
            PointState::Suspect => point.suspect.clone().unwrap_or_default(),
            PointState::Damaged => {
                "some of its bytes are damaged in the pool; `pool verify` lists them".to_owned()
            }
            PointState::SoftDeleted => point.deleted.as_ref().map(|(_, why)| why.clone()).unwrap_or_default(),
            PointState::Incomplete => "some of the machine's disks are missing".to_owned(),
            _ => String::new(),
        };
        let details = point.details();
        let undelete_until = point.deleted.as_ref().map(|(since, _)| {
            let waited = pool.state().pool_time.saturating_sub(*since);
            let left = (settings.soft_delete * Timestamp::SECOND).saturating_sub(waited);
            Time(Timestamp(self.parts.clock.now_micros() + left))
        });
        let expires_why = match (&point.deleted, floor.keeps(point)) {
            (Some((_, why)), _) => format!("deleted: {why}"),
            (None, Some(why)) => format!("retention floor: {why}"),
            _ => "no policy is stored: it is kept".to_owned(),
        };
        RecoveryPoint {
            id: point.id,
            datasource: point.datasource,
            datasource_name: point.machine.clone(),
            time: Time(point.captured),
            sequence: point.number,
            consistency: point.consistency,
            state,
            reason,
            disks: point
                .machine_disks()
                .zip(&details.descriptions)
                .map(|(disk, description)| api::PointDisk {
                    disk: disk.index,
                    bytes: disk.size,
                    format: super::mapping::image_format(description),
                    sector_bytes: disk.sector,
                })
                .collect(),
            expires: undelete_until,
            expires_why,
            locked_until: None,
            undelete_until,
            bytes_unique: unique,
            verified_at: point.verified.map(Time),
            tested_at: None,
            cause: details.cause.to_string(),
            evidence: details.evidence,
        }
    }

    /// What differs between two points of one machine, from their maps.
    pub(crate) fn point_diff(&self, a: &Point, b: &Point) -> Result<PointDiff, Problem> {
        if a.datasource != b.datasource {
            return Err(Problem::new(
                Code::Usage,
                format!(
                    "{} is of {}, {} is of {}: points of one machine can be compared.",
                    a.id, a.machine, b.id, b.machine
                ),
            ));
        }
        let mut disks = Vec::new();
        let indexes: BTreeSet<u32> =
            a.machine_disks().chain(b.machine_disks()).map(|disk| disk.index).collect();
        for index in indexes {
            let (one, other) = (StoredDisk::of(a, index), StoredDisk::of(b, index));
            let set = jobs::machine::differing(self.pool(), one, other).map_err(jobs::problem::pool)?;
            disks.push(DiskDiff {
                disk: index,
                bytes_changed: set.bytes(),
                extents: set.iter().map(|range| (range.start, range.len())).collect(),
            });
        }
        Ok(PointDiff { a: a.id, b: b.id, disks })
    }
}

//! The full mark: which chunks the points need, a bit for each entry of the index (section 9.2).
//!
//! Maps are walked level by level and not point by point: the ids of one level are sorted, looked up in one pass over the
//! index, and their nodes are read in order of location, which gives the ids of the level below. Each node is read once
//! however many points share it, nothing is read at random, and no set of ids is held: what does not fit goes to files
//! without a name. If there is no room for those either, the blocks are done in several passes.
//!
//! Refuses: going on when a record or a node cannot be read (INV-12).
//!
//! Invariants
//! - What a point needs that is not expired, or was not when the oldest ingest or reader under way began, is marked
//!   (INV-11). (must)
//! - Every chunk of a point of the state that was looked at is in the view that was looked at: the state comes first. (must)

use std::collections::BTreeMap;
use std::sync::Arc;

use model::RecoveryPointId;

use crate::chunk::{ChunkId, ChunkKind, Location};
use crate::error::PoolError;
use crate::format::node::{MAX_LEVELS, Node};
use crate::index::{Bits, FinishedPack, View, ViewPlace};
use crate::pool::Pool;
use crate::sorter::{Combine, Room, Sorted, Sorter, distinct};
use crate::state::{Point, State};

/// A chunk that is needed, and what of (u64, big-endian).
pub(crate) const NEED: usize = 24;
/// A node to be read: position of its pack, place, its id, what needs it.
pub(crate) const NODE: usize = 32;

/// What is needed.
pub(crate) struct Marks {
    /// The index as it was.
    pub view: View,
    /// The bit of an entry is set if a point needs its chunk.
    pub bits: Bits,
    /// Points whose soft-delete period is over, for everybody.
    pub expired: u64,
    /// The roots of all that was marked.
    pub roots: Roots,
}

/// Roots of maps with their levels, and of how many disks each is.
pub(crate) type Roots = BTreeMap<(u8, ChunkId), u32>;

/// What a reclaim looks at: the points at one moment, and then the index.
pub(crate) struct Moment {
    /// What the records say.
    pub state: State,
    /// Pool time when the oldest of what is under way began.
    at: u64,
    /// The index.
    pub view: View,
    /// Points whose soft-delete period is over, for everybody.
    pub expired: u64,
    soft_delete: u64,
}

impl Moment {
    /// Points that count as needed.
    fn needed(&self) -> impl Iterator<Item = &Point> {
        needed(&self.state, self.at, self.soft_delete)
    }

    /// Roots of the maps of needed points.
    pub fn roots(&self) -> Roots {
        let mut roots = Roots::new();
        for disk in self.needed().flat_map(|point| &point.disks) {
            let level = disk.levels.checked_sub(1).filter(|level| *level < MAX_LEVELS);
            if let (Some(level), Some(root)) = (level, disk.root) {
                *roots.entry((level, root)).or_default() += 1;
            }
        }
        roots
    }
}

fn need(id: &ChunkId, owner: u64) -> [u8; NEED] {
    let mut record = [0; NEED];
    record[..16].copy_from_slice(&id.0);
    record[16..].copy_from_slice(&owner.to_be_bytes());
    record
}

fn of_need(record: &[u8; NEED]) -> (ChunkId, u64) {
    let (mut id, mut owner) = ([0; 16], [0; 8]);
    id.copy_from_slice(&record[..16]);
    owner.copy_from_slice(&record[16..]);
    (ChunkId(id), u64::from_be_bytes(owner))
}

/// Several owners of one chunk are as the highest of them.
pub(crate) fn highest(record: &mut [u8; NEED], other: &[u8; NEED]) -> bool {
    let ((id, owner), (other, more)) = (of_need(record), of_need(other));
    let is_same = id == other;
    if is_same {
        *record = need(&id, owner.max(more));
    }
    is_same
}

/// More than one owner.
pub(crate) const SEVERAL: u64 = u64::MAX;

/// Several owners of one chunk are [`SEVERAL`].
pub(crate) fn alone(record: &mut [u8; NEED], other: &[u8; NEED]) -> bool {
    let ((id, owner), (other, more)) = (of_need(record), of_need(other));
    let is_same = id == other;
    if is_same && owner != more {
        *record = need(&id, SEVERAL);
    }
    is_same
}

pub(crate) fn node(place: ViewPlace, id: &ChunkId, owner: u64) -> [u8; NODE] {
    let mut record = [0; NODE];
    record[..4].copy_from_slice(&place.pack.to_be_bytes());
    record[4..8].copy_from_slice(&place.at.to_be_bytes());
    record[8..].copy_from_slice(&need(id, owner));
    record
}

pub(crate) fn of_node(record: &[u8; NODE]) -> (ViewPlace, ChunkId, u64) {
    let number = |at: usize| u32::from_be_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
    let mut rest = [0; NEED];
    rest.copy_from_slice(&record[8..]);
    let (id, owner) = of_need(&rest);
    (ViewPlace { pack: number(0), at: number(4) }, id, owner)
}

/// Points that count as needed.
pub(crate) fn needed(state: &State, at: u64, soft_delete: u64) -> impl Iterator<Item = &Point> {
    state.in_order().filter(move |point| !state.is_expired_at(point, soft_delete, at))
}

impl Pool {
    /// Marks every chunk that a point needs, and gives the marks to `look`, which changes nothing. Where a run of the
    /// index turns out to be damaged, that is healed and everything done again. `more` are tables of packs that the index
    /// does not name.
    pub(crate) fn with_marks<T>(
        self: &Arc<Self>,
        more: &[FinishedPack],
        mut look: impl FnMut(&Marks) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        loop {
            match self.mark(more, self.room).and_then(|marks| look(&marks)) {
                Err(
                    error @ (PoolError::Damaged { .. } | PoolError::TooNew { .. } | PoolError::Io { .. }),
                ) => {
                    self.index_mut().heal(error)?;
                }
                done => return done,
            }
        }
    }

    /// The points and the index at one moment; refused if a record cannot be read (INV-12).
    pub(crate) fn moment(&self, more: &[FinishedPack]) -> Result<Moment, PoolError> {
        // Bundles spare the reading of records, but nothing is freed on their word.
        self.recheck_records()?;
        // First what is under way and the time together, then the state, then the index: whoever begins later does so at a
        // later time, and what is committed later is of packs that are pinned.
        let at = {
            let activity = self.activity();
            let now = self.state().pool_time;
            activity.oldest().map_or(now, |oldest| oldest.min(now))
        };
        let state = self.state().clone();
        if let Some(record) = state.unreadable.first() {
            return Err(PoolError::Stopped { reason: format!("{}: {}", record.path, record.reason) });
        }
        let view = self.index().view(more)?;
        let soft_delete = self.settings().soft_delete;
        let expired = state.in_order().filter(|point| state.is_expired(point, soft_delete)).count() as u64;
        Ok(Moment { state, at, view, expired, soft_delete })
    }

    fn mark(self: &Arc<Self>, more: &[FinishedPack], room: Room) -> Result<Marks, PoolError> {
        let moment = self.moment(more)?;
        let mut bits = Bits::of(&moment.view);
        let mut walk = Walk { room, ..Walk::of(self, &moment) };
        walk.all(moment.needed().map(|point| (point, 0)), Some(&mut bits), &mut |_, _, _| Ok(()))?;
        let roots = moment.roots();
        Ok(Marks { view: moment.view, bits, expired: moment.expired, roots })
    }

    /// Tells `each` of every chunk that points need: its owner and its places, newest last. `owner` gives the owner of a
    /// point, none if the point does not count; `owners` says what several are.
    pub(crate) fn owned(
        self: &Arc<Self>,
        owner: &dyn Fn(&Point) -> Option<u64>,
        owners: Combine<NEED>,
        each: &mut Owned<'_>,
    ) -> Result<(), PoolError> {
        let state = self.state().clone();
        let view = self.index().view(&[])?;
        let points = state.in_order().filter_map(|point| Some((point, owner(point)?)));
        let mut walk = Walk { pool: self, view: &view, state: &state, room: self.room, owners };
        walk.all(points, None, &mut |_, owner, places| each(&view, owner, places))
    }

    /// The first point that needs a node, for people: a walk that is only made when something is wrong already.
    fn whose(self: &Arc<Self>, state: &State, wanted: &ChunkId) -> Option<(RecoveryPointId, String)> {
        needed(state, state.pool_time, self.settings().soft_delete).find_map(|point| {
            let is_needed = point.disks.iter().any(|disk| {
                let nodes = crate::pool::PoolNodes::new(self, point.domain);
                let map = crate::map::MapRoot { root: disk.root, levels: disk.levels };
                let mut is_needed = false;
                crate::map::MapReader::new(nodes, map).walk(
                    &mut |node, level| {
                        is_needed |= node == *wanted;
                        level > 0
                    },
                    &mut |_, _| {},
                    &mut |_, _| {},
                );
                is_needed
            });
            is_needed.then(|| (point.id, point.machine.clone()))
        })
    }
}

/// Told of each chunk once: the view, its owner, its places.
pub(crate) type Owned<'o> = dyn FnMut(&View, u64, &[ViewPlace]) -> Result<(), PoolError> + 'o;

/// Told of each chunk once: its id, its owner, its places.
type Visit<'v> = dyn FnMut(&ChunkId, u64, &[ViewPlace]) -> Result<(), PoolError> + 'v;

/// Reads nodes of the points of a state by a view of the index.
pub(crate) struct Walk<'w> {
    pool: &'w Arc<Pool>,
    view: &'w View,
    state: &'w State,
    room: Room,
    owners: Combine<NEED>,
}

impl<'w> Walk<'w> {
    /// A walk at a moment.
    pub fn of(pool: &'w Arc<Pool>, moment: &'w Moment) -> Walk<'w> {
        Walk { pool, view: &moment.view, state: &moment.state, room: pool.room, owners: highest }
    }

    /// The place where a node is read: the newest one that is not known to be damaged; whether it can be read shows.
    pub fn place(&self, places: &[ViewPlace]) -> Option<ViewPlace> {
        let is_there = |place: &&ViewPlace| {
            self.view.packs.get(place.pack as usize).is_some_and(|(pack, info)| {
                let frame = Location { pack: *pack, at: place.at }.frame();
                info.present && self.state.is_undamaged(*pack, frame)
            })
        };
        places.iter().rev().find(is_there).or(places.last()).copied()
    }

    fn sorter(&self) -> Sorter<NEED> {
        Sorter::new(&self.pool.world.files, self.room, self.owners)
    }

    /// Everything that points need, level by level.
    fn all<'p>(
        &mut self,
        points: impl Iterator<Item = (&'p Point, u64)>,
        mut bits: Option<&mut Bits>,
        visit: &mut Visit<'_>,
    ) -> Result<(), PoolError> {
        let mut levels: Vec<Sorter<NEED>> = (0..MAX_LEVELS).map(|_| self.sorter()).collect();
        for (point, owner) in points {
            for disk in &point.disks {
                let level = usize::from(disk.levels).checked_sub(1).and_then(|level| levels.get_mut(level));
                if let (Some(root), Some(level)) = (disk.root, level) {
                    level.push(need(&root, owner))?;
                }
            }
        }
        let mut below: Option<Sorter<NEED>> = None;
        for level in (0..MAX_LEVELS).rev() {
            let Some(mut ids) = levels.pop() else { break };
            if let Some(children) = below.take() {
                let children = children.finish();
                let mut children = children.read();
                while let Some(child) = children.next()? {
                    ids.push(child)?;
                }
            }
            let mut nodes = Sorter::new(&self.pool.world.files, self.room, distinct);
            self.look_up(&ids.finish(), bits.as_deref_mut(), visit, Some(&mut nodes))?;
            let nodes = nodes.finish();
            if level == 0 {
                self.blocks(&nodes, 0..1 << 32, bits.as_deref_mut(), visit)?;
            } else if !nodes.is_empty() {
                let mut children = self.sorter();
                self.children(&nodes, level, &(0..1 << 32), &mut children)?;
                below = Some(children);
            }
        }
        Ok(())
    }

    /// Visits chunks and sets their bits; if they are nodes, also says where each of them is read.
    fn look_up(
        &self,
        ids: &Sorted<NEED>,
        mut bits: Option<&mut Bits>,
        visit: &mut Visit<'_>,
        mut nodes: Option<&mut Sorter<NODE>>,
    ) -> Result<(), PoolError> {
        let mut join = self.view.join();
        let mut places = Vec::new();
        let mut ids = ids.read();
        while let Some(record) = ids.next()? {
            let (id, owner) = of_need(&record);
            places.clear();
            join.find(&id, &mut places, bits.as_deref_mut())?;
            visit(&id, owner, &places)?;
            let Some(nodes) = nodes.as_deref_mut() else { continue };
            match self.place(&places) {
                Some(place) => nodes.push(node(place, &id, owner))?,
                None => return Err(self.stopped(&id, "it is in no pack")),
            }
        }
        Ok(())
    }

    /// A node that cannot be had, and which point needs it.
    pub fn stopped(&self, id: &ChunkId, reason: impl std::fmt::Display) -> PoolError {
        let whose = self.pool.whose(self.state, id).map_or_else(String::new, |(point, machine)| {
            format!(", which a map of {machine} ({point}) needs")
        });
        PoolError::Stopped { reason: format!("map node {id}{whose}: {reason}") }
    }

    /// Reads nodes in order of location, and adds those of their children whose ids begin with four bytes in `range`.
    fn children(
        &self,
        nodes: &Sorted<NODE>,
        level: u8,
        range: &std::ops::Range<u64>,
        children: &mut Sorter<NEED>,
    ) -> Result<(), PoolError> {
        let mut nodes = nodes.read();
        while let Some(record) = nodes.next()? {
            let (place, id, owner) = of_node(&record);
            let found = self.read(place, &id, level).map_err(|reason| self.stopped(&id, reason))?;
            for child in found.children.iter().flatten() {
                let [a, b, c, d, ..] = child.0;
                if range.contains(&u64::from(u32::from_be_bytes([a, b, c, d]))) {
                    children.push(need(child, owner))?;
                }
            }
        }
        Ok(())
    }

    /// Visits the blocks that leaves name. If their ids fit neither into memory nor onto the disk, one half after the
    /// other: the leaves are read again for each.
    fn blocks(
        &self,
        leaves: &Sorted<NODE>,
        range: std::ops::Range<u64>,
        mut bits: Option<&mut Bits>,
        visit: &mut Visit<'_>,
    ) -> Result<(), PoolError> {
        let mut blocks = self.sorter();
        match self.children(leaves, 0, &range, &mut blocks) {
            Err(PoolError::Full { .. }) if range.end - range.start > 1 => {
                drop(blocks);
                let middle = range.start.midpoint(range.end);
                self.blocks(leaves, range.start..middle, bits.as_deref_mut(), visit)?;
                self.blocks(leaves, middle..range.end, bits, visit)
            }
            done => {
                done?;
                self.look_up(&blocks.finish(), bits, visit, None)
            }
        }
    }

    /// A node, from the place that was found, or from any other copy; or why it cannot be read.
    pub fn read(&self, place: ViewPlace, id: &ChunkId, level: u8) -> Result<Node, String> {
        let Some((pack, info)) = self.view.packs.get(place.pack as usize) else {
            return Err("its pack is not known".to_owned());
        };
        let keys = self.pool.domain_keys(info.domain);
        let mut bytes = Vec::new();
        let place = Location { pack: *pack, at: place.at };
        let is_read = info.present
            && self
                .pool
                .try_place(&keys, ChunkKind::Node, id, place, &mut |node, _| bytes.extend_from_slice(node))
                .is_ok();
        if !is_read {
            bytes.clear();
            self.pool
                .read_chunk(&keys, ChunkKind::Node, id, &mut |node| bytes.extend_from_slice(node))
                .map_err(|error| error.to_string())?;
        }
        Node::decode(&bytes, level).map_err(|error| format!("{error:?}"))
    }
}

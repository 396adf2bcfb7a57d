//! Keeping the latest points readable in long runs (S30: recovery must not get slower with the age of a pool).
//!
//! Each daily increment puts the blocks that changed into packs of its day, so after months the blocks of one machine lie
//! in the packs of many days: a recovery reads small pieces here and there, and decodes frames of which most blocks are
//! old. So a leaf of the newest map (128 blocks, 8 MiB of disk) whose blocks lie in too many frames is written again: its
//! blocks, in their order, into new packs. Ids do not change, so no map, no point and no record does; the chunk merely
//! has a second place. Readers keep to the pack that they were in, and so stay in the new one; reclaim frees the old place
//! as soon as nothing else in its pack is needed.
//!
//! Refuses: writing more than it was allowed; touching what it cannot prove.
//!
//! Invariants
//! - What is written again was read and compared with its id first: a damaged chunk is never copied. (must)
//! - A crash leaves packs that no map needs, as after any job. (must)

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use model::RecoveryPointId;

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::PoolError;
use crate::frame::BLOCK;
use crate::ingest::Ingest;
use crate::map::{MapReader, MapRoot};
use crate::pool::{Pool, PoolNodes};

/// The figure of a point that tells how many bytes changed.
const CHANGED: &str = "bytes_changed";
/// Adjacent blocks that are encoded together.
const FRAME: usize = 4;
/// A leaf is written again when its blocks lie in so many times the frames that they would need.
const SCATTERED: usize = 2;

/// How the blocks of a point lie in the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    /// Blocks that are not zeros.
    pub blocks: u64,
    /// Frames that hold them.
    pub frames: u64,
    /// Frames that would hold them if each run of adjacent blocks were written anew.
    pub ideal_frames: u64,
    /// How often a reader in the order of the disk goes from one pack to another.
    pub jumps: u64,
    /// Leaves of the map, and of these the scattered ones.
    pub leaves: u64,
    /// Leaves whose blocks lie in too many frames.
    pub scattered: u64,
}

/// What one pass wrote again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Relaid {
    /// Leaves.
    pub leaves: u64,
    /// Blocks.
    pub blocks: u64,
    /// Bytes of new packs.
    pub stored: u64,
}

/// Blocks with their chunks, ascending.
type Blocks = Vec<(u64, ChunkId)>;
/// What a leaf saves for its size, most first; its disk and first block.
type Order = (std::cmp::Reverse<usize>, usize, u64);

/// The blocks of one leaf.
struct Leaf {
    blocks: Blocks,
    places: Vec<Location>,
    ideal: usize,
}

impl Leaf {
    fn frames(&self) -> usize {
        self.places.iter().map(|place| (place.pack, place.frame())).collect::<BTreeSet<_>>().len()
    }

    fn is_scattered(&self) -> bool {
        self.frames() >= self.ideal * SCATTERED
    }
}

/// Frames that runs of adjacent blocks take.
fn ideal(blocks: &[(u64, ChunkId)]) -> usize {
    blocks.chunk_by(|one, next| one.0 + 1 == next.0).map(|run| run.len().div_ceil(FRAME)).sum()
}

/// After so many points of a machine its newest one is looked at.
pub const EVERY: usize = 8;
/// Of the bytes that changed since the last look, one part in so many may be written again.
const SHARE: u64 = 4;

impl Pool {
    /// The leaves of a point that differ from those of `since`; all of them without it.
    fn leaves(
        self: &Arc<Self>,
        point: RecoveryPointId,
        since: Option<RecoveryPointId>,
        each: &mut dyn FnMut(usize, Leaf),
    ) -> Result<(), PoolError> {
        let point = self.point(point)?;
        let since =
            since.map(|since| self.point(since)).transpose()?.filter(|since| since.domain == point.domain);
        for (number, disk) in point.disks.iter().enumerate() {
            let before = since.as_ref().and_then(|since| {
                let disk = since
                    .disks
                    .iter()
                    .find(|other| other.index == disk.index && other.levels == disk.levels)?;
                disk.root
            });
            let nodes = PoolNodes::new(self, point.domain);
            let map = MapReader::new(nodes, MapRoot { root: disk.root, levels: disk.levels });
            map.changed_leaves(before, &mut |first, node| {
                let blocks: Blocks = (first..)
                    .zip(node.children.iter())
                    .filter_map(|(block, chunk)| chunk.map(|chunk| (block, chunk)))
                    .collect();
                let places = self.places(&blocks)?;
                let ideal = ideal(&blocks);
                each(number, Leaf { blocks, places, ideal });
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Keeps the newest point of a machine readable in long runs: after every [`EVERY`]th point, the leaves that changed
    /// since the last look and lie scattered are written again, within a share of what changed. Cost follows the change.
    ///
    /// `None` if it is not this point's turn.
    pub fn keep_readable(self: &Arc<Self>, point: RecoveryPointId) -> Result<Option<Relaid>, PoolError> {
        let (since, changed) = {
            let state = self.state();
            let Some(newest) = state.points.get(&point) else { return Ok(None) };
            let of_machine = state
                .in_order()
                .rev()
                .filter(|other| other.datasource == newest.datasource)
                .collect::<Vec<_>>();
            if of_machine.first().is_none_or(|first| first.id != point) || of_machine.len() % EVERY != 0 {
                return Ok(None);
            }
            let is_there =
                |other: &&&crate::state::Point| !state.is_expired(other, self.settings().soft_delete);
            let Some(since) = of_machine.iter().skip(1).take(EVERY).rfind(is_there) else {
                return Ok(None);
            };
            let changed = of_machine
                .iter()
                .take(EVERY)
                .filter_map(|point| point.details().figures.remove(CHANGED))
                .sum::<u64>();
            (since.id, changed)
        };
        self.relay(point, Some(since), changed / SHARE).map(Some)
    }

    /// The place of each block that a reader takes: the newest one that is not known to be damaged.
    fn places(&self, blocks: &[(u64, ChunkId)]) -> Result<Vec<Location>, PoolError> {
        let mut places = Vec::with_capacity(blocks.len());
        for (_, chunk) in blocks {
            let found = self.find(chunk)?;
            let state = self.state();
            let place = found.iter().find(|place| state.is_healthy(place.pack, place.frame()));
            places.push(*place.ok_or_else(|| PoolError::ChunkLost {
                chunk: chunk.to_string(),
                reason: "no copy of it is known to be sound".to_owned(),
            })?);
        }
        Ok(places)
    }

    /// How the blocks of a point lie in the pool.
    pub fn layout(self: &Arc<Self>, point: RecoveryPointId) -> Result<Layout, PoolError> {
        let mut layout = Layout::default();
        let mut frames: BTreeSet<(PackId, u32)> = BTreeSet::new();
        let mut last: Option<PackId> = None;
        self.leaves(point, None, &mut |_, leaf| {
            layout.leaves += 1;
            layout.scattered += u64::from(leaf.is_scattered());
            layout.blocks += leaf.blocks.len() as u64;
            layout.ideal_frames += leaf.ideal as u64;
            for place in &leaf.places {
                frames.insert((place.pack, place.frame()));
                layout.jumps +=
                    u64::from(last.replace(place.pack).is_some_and(|before| before != place.pack));
            }
        })?;
        layout.frames = frames.len() as u64;
        Ok(layout)
    }

    /// Writes the most scattered leaves of a point again, of those that differ from the leaves of `since` if given, up to
    /// `budget` bytes of content.
    pub fn relay(
        self: &Arc<Self>,
        point: RecoveryPointId,
        since: Option<RecoveryPointId>,
        budget: u64,
    ) -> Result<Relaid, PoolError> {
        let domain = self.point(point)?.domain;
        // The worst first: what saves most frames for each block written.
        let mut found: BTreeMap<Order, Blocks> = BTreeMap::new();
        let mut held = 0u64;
        self.leaves(point, since, &mut |disk, leaf| {
            if !leaf.is_scattered() {
                return;
            }
            let Some(first) = leaf.blocks.first().map(|(block, _)| *block) else { return };
            let saved = (leaf.frames() - leaf.ideal) * 1024 / leaf.blocks.len().max(1);
            held += (leaf.blocks.len() * BLOCK) as u64;
            found.insert((std::cmp::Reverse(saved), disk, first), leaf.blocks);
            // No more is remembered than can be written.
            while let Some(last) = found.last_entry()
                && held - (last.get().len() * BLOCK) as u64 >= budget
            {
                held -= (last.remove().len() * BLOCK) as u64;
            }
        })?;
        let mut chosen: Vec<(usize, u64, Blocks)> =
            found.into_iter().map(|((_, disk, first), blocks)| (disk, first, blocks)).collect();
        chosen.sort_unstable_by_key(|(disk, first, _)| (*disk, *first));
        let mut relaid = Relaid::default();
        let mut left = budget;
        if chosen.is_empty() {
            return Ok(relaid);
        }
        let keys = self.domain_keys(domain);
        let ingest = Ingest::begin(self, domain)?;
        let mut written = HashSet::new();
        for (_, _, blocks) in chosen {
            let bytes = (blocks.len() * BLOCK) as u64;
            if bytes > left {
                continue;
            }
            left -= bytes;
            let blocks: Blocks = blocks.into_iter().filter(|(_, chunk)| written.insert(*chunk)).collect();
            for run in blocks.chunk_by(|one, next| one.0 + 1 == next.0) {
                for frame in run.chunks(FRAME) {
                    let mut content = Vec::with_capacity(frame.len() * BLOCK);
                    for (_, chunk) in frame {
                        self.read_chunk(&keys, ChunkKind::Block, chunk, &mut |bytes| {
                            content.extend_from_slice(bytes);
                        })?;
                    }
                    let ids: Vec<ChunkId> = frame.iter().map(|(_, chunk)| *chunk).collect();
                    ingest.put_again(&content, &ids)?;
                }
            }
            relaid.leaves += 1;
            relaid.blocks += blocks.len() as u64;
        }
        ingest.settle()?;
        relaid.stored = ingest.figures().stored;
        Ok(relaid)
    }
}

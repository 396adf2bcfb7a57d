//! Verify: stored bytes against their hashes, and what damage means for whom.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use model::{BLOCK_BYTES, ByteRange, RecoveryPointId};

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::{Damage, PoolError};
use crate::format::pack::{self, PackKind};
use crate::format::payload::{self, Kind};
use crate::format::twin;
use crate::kit::RecipientId;
use crate::map::{MapReader, MapRoot, NodeSource};
use crate::packs;
use crate::pool::{HEADER_NAME, Pool, PoolNodes, key_name};
use prost::Message;

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Headers, tables, records, maps, and that every chunk that a point names is in a pack that is there.
    Structure,
    /// Every stored byte: hashed, unsealed, decoded, and each chunk compared with its id.
    ReadData,
}

/// What verify found.
#[derive(Debug, Clone, Default)]
pub struct VerifyReport {
    /// All damage: files first, then what it means for points.
    pub damage: Vec<Damage>,
    /// Points examined: all that are not expired.
    pub points: u64,
    /// Points of which everything can be had.
    pub good_points: u64,
    /// Points with lost ranges.
    pub damaged_points: Vec<RecoveryPointId>,
    /// Packs examined.
    pub packs: u64,
    /// Bytes of pack files read.
    pub bytes_read: u64,
    /// Blocks of 64 KiB that points name and that cannot be had, each counted once.
    pub lost_blocks: u64,
    /// Frames that are damaged and were not known to be, by pack; none named if the pack as a whole is lost.
    pub new_damage: Vec<(PackId, Vec<u32>)>,
    /// Points that were proved whole by reading every byte.
    pub proved_points: Vec<RecoveryPointId>,
}

impl VerifyReport {
    /// Whether anything is wrong.
    pub fn is_clean(&self) -> bool {
        self.damage.is_empty()
    }
}

/// Told how far verify is.
pub trait VerifyProgress {
    /// `done` of `total` bytes of packs were read. False cancels.
    fn update(&mut self, done: u64, total: u64) -> bool;
}

impl<F: FnMut(u64, u64) -> bool> VerifyProgress for F {
    fn update(&mut self, done: u64, total: u64) -> bool {
        self(done, total)
    }
}

impl Pool {
    /// Verifies the pool. Where this process may write, newly found damage is recorded, so that no new point uses it,
    /// and points that were proved whole are recorded as verified.
    ///
    /// Cancelling by `progress` gives what was found so far, and records no point as verified.
    pub fn verify(
        self: &Arc<Self>,
        depth: Depth,
        progress: &mut dyn VerifyProgress,
    ) -> Result<VerifyReport, PoolError> {
        let mut report = VerifyReport { damage: self.notes().to_vec(), ..VerifyReport::default() };
        for found in self.recheck_records()? {
            let is_same = |known: &Damage| {
                matches!((known, &found),
                (Damage::File { path: one, .. }, Damage::File { path: other, .. }) if one == other)
            };
            if !report.damage.iter().any(is_same) {
                report.damage.push(found);
            }
        }
        self.verify_small_files(&mut report)?;
        let runs = self.index().examine();
        for damage in &runs {
            if let Damage::File { path, .. } = damage {
                self.index_mut().discard(path);
            }
            if !report.damage.contains(damage) {
                report.damage.push(damage.clone());
            }
        }
        if !runs.is_empty() && self.is_writable() {
            self.flush_index()?;
        }

        let state = self.state().clone();
        let known: BTreeMap<PackId, crate::index::PackInfo> =
            self.index().packs().iter().map(|(id, info)| (*id, *info)).collect();
        let total: u64 = known.values().map(|info| info.length).sum();
        let mut bad: HashMap<PackId, BTreeSet<u32>> = state.damaged.clone();
        let mut done = 0;
        let mut cancelled = false;
        for (id, info) in &known {
            if state.permitted.contains_key(id) {
                continue;
            }
            if !info.present {
                bad.insert(*id, BTreeSet::new());
                continue;
            }
            let found = match depth {
                Depth::Structure => self.examine_structure(*id),
                Depth::ReadData => self.examine_data(*id, info.domain, info.kind)?,
            };
            if depth == Depth::ReadData {
                // What was recorded may have been one failed read; what counts is what was read now.
                bad.remove(id);
            }
            report.packs += 1;
            report.bytes_read += found.read;
            done += info.length;
            if !found.damage.is_empty() {
                // A pack whose table is damaged still serves its frames; one of which the frames cannot be found does not.
                let is_new = found.frames.iter().any(|frame| state.is_healthy(*id, *frame))
                    || found.is_lost && state.damaged.get(id).is_none_or(|frames| !frames.is_empty());
                report.damage.extend(found.damage.iter().cloned());
                let entry = bad.entry(*id).or_default();
                if found.is_lost {
                    entry.clear();
                } else {
                    entry.extend(&found.frames);
                }
                let nothing_lost = found.frames.is_empty() && !found.is_lost;
                if nothing_lost && entry.is_empty() {
                    bad.remove(id);
                }
                if is_new {
                    let frames =
                        if found.is_lost { Vec::new() } else { found.frames.iter().copied().collect() };
                    report.new_damage.push((*id, frames));
                }
            }
            if !progress.update(done, total) {
                cancelled = true;
                break;
            }
        }
        self.verify_points(&bad, &mut report)?;
        if depth == Depth::ReadData && !cancelled {
            let damaged: HashSet<RecoveryPointId> = report.damaged_points.iter().copied().collect();
            report.proved_points = state
                .in_order()
                .filter(|point| {
                    !damaged.contains(&point.id) && !state.is_expired(point, self.settings().soft_delete)
                })
                .map(|point| point.id)
                .collect();
        }
        if self.is_writable() {
            self.record_verified(&report)?;
        }
        Ok(report)
    }

    /// Records what a verify found: damage, so that no new point uses it, and points that were proved whole. A reader
    /// that verified beside a writer hands its report to the next one who may write.
    pub fn record_verified(&self, report: &VerifyReport) -> Result<(), PoolError> {
        for (pack, frames) in &report.new_damage {
            let state = self.state().clone();
            let is_known = match frames.as_slice() {
                [] => state.damaged.get(pack).is_some_and(BTreeSet::is_empty),
                frames => frames.iter().all(|frame| !state.is_healthy(*pack, *frame)),
            };
            // Reclaim may have let the pack go meanwhile.
            if is_known || !self.index().packs().contains_key(pack) {
                continue;
            }
            let record = payload::Damage {
                pack: pack.0.to_vec(),
                frames: frames.clone(),
                reason: "found by verify".to_owned(),
            };
            self.append(Kind::Damage, &record)?;
        }
        let state = self.state().clone();
        let points: Vec<u8> = report
            .proved_points
            .iter()
            .filter(|id| state.points.contains_key(*id))
            .flat_map(|id| id.0)
            .collect();
        if !points.is_empty() {
            let record = payload::PointsMark { points, reason: "every byte read and hashed".to_owned() };
            self.append(Kind::Verified, &record)?;
        }
        Ok(())
    }

    /// The header, and the key files of every recipient: their bytes and whose they are, not whether anybody's secret
    /// fits.
    fn verify_small_files(&self, report: &mut VerifyReport) -> Result<(), PoolError> {
        let files = &self.world.files;
        let mut add = |path: String, reason: String| {
            let is_known = report
                .damage
                .iter()
                .any(|known| matches!(known, Damage::File { path: other, .. } if *other == path));
            if !is_known {
                report.damage.push(Damage::File { path, offset: 0, reason, derived: false });
            }
        };
        let twin = |name: &str, magic| match files.read(name, twin::MAX_BYTES) {
            Err(error) => Err(error.to_string()),
            Ok(bytes) => twin::decode(magic, &bytes).map_err(|error| format!("{error:?}")),
        };
        let mut check = |name: &str, magic, fits: &dyn Fn(&[u8]) -> bool| {
            let wrong = match twin(name, magic) {
                Err(reason) => Some(reason),
                Ok(twin) if !fits(&twin.content) => Some("belongs to another pool or recipient".to_owned()),
                Ok(twin) => twin.damage.map(|damage| format!("{damage:?}; the other copy serves")),
            };
            if let Some(reason) = wrong {
                add(files.display(name), reason);
            }
        };
        check(HEADER_NAME, twin::POOL, &|content| {
            payload::Header::decode(content).is_ok_and(|header| header.pool == self.id().0)
        });
        let entries =
            files.list("keys").map_err(|source| PoolError::io(files.display("keys"), "list", source))?;
        for entry in entries {
            let name = format!("keys/{}", entry.name);
            check(&name, twin::KEY, &|content| {
                let id = content.get(16..32).and_then(|id| <[u8; 16]>::try_from(id).ok());
                content.len() == 100
                    && content[..16] == self.id().0
                    && id.is_some_and(|id| key_name(RecipientId(id)) == name)
            });
        }
        Ok(())
    }

    fn examine_structure(&self, id: PackId) -> Examined {
        let path = self.world.files.display(&pack::name(id));
        match packs::read_table(&*self.world.files, &self.keys, id) {
            Ok(table) => Examined { read: table.table.len() as u64 * 20 + 128, ..Examined::default() },
            // The frames may all be right: only reading them tells.
            Err(error) => Examined {
                damage: vec![Damage::File { path, offset: 0, reason: error.to_string(), derived: false }],
                ..Examined::default()
            },
        }
    }

    /// Every byte of a pack: hashes first, then each chunk against its id, where the table or a run tells the ids.
    fn examine_data(
        &self,
        id: PackId,
        domain: model::DomainId,
        kind: PackKind,
    ) -> Result<Examined, PoolError> {
        let files = &*self.world.files;
        let path = files.display(&pack::name(id));
        // A sector that cannot be read is damage like any other; which frames it costs shows below.
        let walked = packs::examine(files, self.id(), id).unwrap_or_else(|error| packs::PackExamination {
            damaged: vec![(0, error.to_string())],
            ..packs::PackExamination::default()
        });
        let mut examined = Examined { read: walked.length, is_lost: false, ..Examined::default() };
        let damage =
            |offset: u64, reason: String| Damage::File { path: path.clone(), offset, reason, derived: false };
        examined.damage.extend(walked.damaged.iter().map(|(offset, reason)| damage(*offset, reason.clone())));
        examined.frames.extend(&walked.frames);

        let mut places: BTreeMap<u32, Vec<(ChunkId, Location)>> = BTreeMap::new();
        let mut add = |chunk: ChunkId, location: u32| {
            let place = Location { pack: id, at: location };
            places.entry(place.frame()).or_default().push((chunk, place));
        };
        match packs::read_table(files, &self.keys, id) {
            Ok(table) => table.table.iter().for_each(|entry| add(entry.id, entry.location)),
            Err(_) => {
                let known = self.for_each_chunk(Vec::new, |known, chunk, place| {
                    if place.pack == id {
                        known.push((chunk, place.at));
                    }
                })?;
                known.into_iter().for_each(|(chunk, at)| add(chunk, at));
            }
        }
        let keys = self.domain_keys(domain);
        let chunk_kind = match kind {
            PackKind::Blocks => ChunkKind::Block,
            PackKind::Nodes => ChunkKind::Node,
        };
        self.forget_pack(id);
        for (frame, chunks) in places {
            let Some((_, first)) = chunks.first() else { continue };
            let reason = match self.reader.decoded(*first, domain, kind) {
                Err(error) => Some(error.to_string()),
                Ok(decoded) => chunks.iter().find_map(|(chunk, place)| {
                    let Some(bytes) = decoded.chunk(place.slot()) else {
                        return Some(format!("the frame has no chunk {}", place.slot()));
                    };
                    (keys.chunk_id(chunk_kind, blake3::hash(bytes).as_bytes()) != *chunk)
                        .then(|| format!("the chunk in place {} is not {chunk}", place.slot()))
                }),
            };
            match reason {
                Some(reason) => {
                    if examined.frames.insert(frame) {
                        examined.damage.push(damage(u64::from(frame), reason));
                    }
                }
                // Rot in its padding or in the hash for those without a key: told above, and costs nobody anything.
                None => {
                    examined.frames.remove(&frame);
                }
            }
        }
        Ok(examined)
    }

    /// What bad frames mean: every lost range of every point that is not expired.
    fn verify_points(
        self: &Arc<Self>,
        bad: &HashMap<PackId, BTreeSet<u32>>,
        report: &mut VerifyReport,
    ) -> Result<(), PoolError> {
        let state = self.state().clone();
        let is_good = |place: &Location| {
            bad.get(&place.pack).is_none_or(|frames| !frames.is_empty() && !frames.contains(&place.frame()))
        };
        // Answers are kept, and subtrees in which nothing is lost are walked once for all points that share them.
        let mut answers: HashMap<ChunkId, bool> = HashMap::new();
        let mut clean: HashSet<(ChunkId, u8)> = HashSet::new();
        let mut lost_blocks: HashSet<ChunkId> = HashSet::new();
        for point in state.in_order() {
            if state.is_expired(point, self.settings().soft_delete) {
                continue;
            }
            report.points += 1;
            let mut is_damaged = false;
            for disk in &point.disks {
                let source = CheckedNodes {
                    nodes: PoolNodes { pool: self.clone(), keys: self.domain_keys(point.domain) },
                    is_good: &is_good,
                };
                let map = MapReader::new(source, MapRoot { root: disk.root, levels: disk.levels });
                let mut lost: Vec<(ByteRange, String)> = Vec::new();
                let mut failed = None;
                let lost_cell = std::cell::RefCell::new(&mut lost);
                let mut visited = Vec::new();
                map.walk(
                    &mut |node, level| {
                        let fresh = !clean.contains(&(node, level));
                        if fresh {
                            visited.push((node, level));
                        }
                        fresh
                    },
                    &mut |block, chunk| {
                        let good = match answers.get(&chunk) {
                            Some(&good) => good,
                            None => match self.find(&chunk) {
                                Ok(places) => {
                                    let good = places.iter().any(&is_good);
                                    // Damaged chunks are few; remembering the good ones would cost memory for each
                                    // block of the pool.
                                    if !good {
                                        answers.insert(chunk, good);
                                    }
                                    good
                                }
                                Err(error) => {
                                    failed.get_or_insert(error);
                                    false
                                }
                            },
                        };
                        if !good {
                            lost_blocks.insert(chunk);
                            let start = block.saturating_mul(BLOCK_BYTES).min(disk.size);
                            let end = start.saturating_add(BLOCK_BYTES).min(disk.size);
                            let range = ByteRange { start, end };
                            push_merged(
                                &mut lost_cell.borrow_mut(),
                                range,
                                "its chunk is damaged or missing",
                            );
                        }
                    },
                    &mut |blocks, error| {
                        let start = blocks.start.saturating_mul(BLOCK_BYTES).min(disk.size);
                        let end = blocks.end.saturating_mul(BLOCK_BYTES).min(disk.size);
                        lost_cell.borrow_mut().push((ByteRange { start, end }, format!("map: {error}")));
                    },
                );
                if let Some(error) = failed {
                    return Err(error);
                }
                if lost.is_empty() {
                    clean.extend(visited);
                } else {
                    is_damaged = true;
                    report.damage.extend(lost.into_iter().map(|(range, reason)| Damage::Point {
                        point: point.id,
                        machine: point.machine.clone(),
                        disk: disk.index,
                        range,
                        reason,
                    }));
                }
            }
            if is_damaged {
                report.damaged_points.push(point.id);
            } else {
                report.good_points += 1;
            }
        }
        report.lost_blocks = lost_blocks.len() as u64;
        Ok(())
    }

    /// Whether any damage is recorded or any pack is missing: only then blocks need a look of their own.
    pub fn has_known_damage(&self) -> bool {
        let index = self.index();
        !self.state().damaged.is_empty()
            || index.has_unlisted()
            || index.packs().values().any(|info| !info.present)
    }

    /// Blocks of a map that cannot be used for a new point: their chunk, or a node above them, is damaged or missing.
    /// Looks at the recorded damage and the index; reads the map only if there is any damage at all.
    pub fn lost_blocks(
        self: &Arc<Self>,
        domain: model::DomainId,
        map: MapRoot,
    ) -> Result<Vec<std::ops::Range<u64>>, PoolError> {
        if !self.has_known_damage() {
            return Ok(Vec::new());
        }
        let state = self.state().clone();
        let is_good = |place: &Location| state.is_healthy(place.pack, place.frame());
        let source = CheckedNodes {
            nodes: PoolNodes { pool: self.clone(), keys: self.domain_keys(domain) },
            is_good: &is_good,
        };
        let map = MapReader::new(source, map);
        let lost = std::cell::RefCell::new(Vec::new());
        let mut failed = None;
        map.walk(
            &mut |_, _| true,
            &mut |block, chunk| match self.find(&chunk) {
                Ok(places) if places.iter().any(is_good) => {}
                Ok(_) => lost.borrow_mut().push(block..block + 1),
                Err(error) => {
                    failed.get_or_insert(error);
                }
            },
            &mut |blocks, _| lost.borrow_mut().push(blocks),
        );
        failed.map_or(Ok(lost.into_inner()), Err)
    }
}

fn push_merged(lost: &mut Vec<(ByteRange, String)>, range: ByteRange, reason: &str) {
    match lost.last_mut() {
        Some((last, known)) if last.end == range.start && known == reason => last.end = range.end,
        _ => lost.push((range, reason.to_owned())),
    }
}

/// Nodes, but only from places that are not known to be bad: a node that was read into a cache before its frame rotted
/// must not count as there.
struct CheckedNodes<'a> {
    nodes: PoolNodes,
    is_good: &'a (dyn Fn(&Location) -> bool + Sync),
}

impl NodeSource for CheckedNodes<'_> {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, PoolError> {
        let places = self.nodes.pool.find(id)?;
        if !places.iter().any(self.is_good) {
            let reason = if places.is_empty() { "it is in no pack" } else { "every copy is damaged" };
            return Err(PoolError::ChunkLost { chunk: id.to_string(), reason: reason.to_owned() });
        }
        self.nodes.node(id)
    }
}

#[derive(Default)]
struct Examined {
    damage: Vec<Damage>,
    frames: BTreeSet<u32>,
    is_lost: bool,
    read: u64,
}

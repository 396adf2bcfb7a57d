//! Verify: stored bytes against their hashes, and what damage means for whom.
//!
//! Three tiers, each with all of the one before: structure; hashes, which need no key; every byte opened, decoded and
//! compared with the id of its chunk. [`crate::keyless`] is the second for a folder of which nobody has the keys.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use block_io::Pace;
use model::{BLOCK_BYTES, ByteRange, RecoveryPointId, Timestamp};

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::{Damage, PoolError};
use crate::examine::{self, PackExamination, Reading};
use crate::format::key::KeyFile;
use crate::format::pack::{self, FrameHeader, PackKind};
use crate::format::payload::{self, Kind};
use crate::format::ring::{self, Ring};
use crate::format::twin;
use crate::frame::{self, Decoder};
use crate::in_order::in_order;
use crate::index::PackInfo;
use crate::keys::frame_nonce;
use crate::map::{MapReader, MapRoot, NodeSource};
use crate::pool::{HEADER_NAME, Pool, PoolNodes, key_name};
use crate::proofs::{self, Part, Proof, place};
use crate::repair::{Repair, StoredAgain};
use crate::rings::is_ring_proved;
use crate::state::{self, State};
use prost::Message;

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Headers, tables, records, maps, and that every chunk that a point names is in a pack that is there.
    Structure,
    /// Every stored byte of the packs is hashed. A frame that does not fit its hash is opened to tell whom that costs.
    Hashes,
    /// Every stored byte: hashed, unsealed, decoded, and each chunk compared with its id.
    ReadData,
}

/// How a pool is verified.
#[derive(Clone)]
pub struct VerifyOptions {
    /// How much is read.
    pub depth: Depth,
    /// Packs that are read at the same time. What is found is in order all the same.
    pub threads: usize,
    /// How fast packs are read; as fast as it goes if absent.
    pub pace: Option<Arc<dyn Pace>>,
    /// Only what is due so that everything is read every so many seconds (section 9.5); all of it if absent.
    pub every: Option<u64>,
}

impl VerifyOptions {
    /// One pack at a time, as fast as it goes.
    pub fn new(depth: Depth) -> VerifyOptions {
        VerifyOptions { depth, threads: 1, pace: None, every: None }
    }

    fn reading(&self) -> Reading<'_> {
        Reading { proves_all: self.depth == Depth::ReadData, drops_cache: true, pace: self.pace.as_deref() }
    }
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
    /// Damaged packs of which parity gives something. Whoever may write stores that again.
    pub repairs: Vec<Repair>,
    /// What became of these, where this process may write.
    pub stored_again: Vec<StoredAgain>,
    /// Points that were proved whole by reading every byte.
    pub proved_points: Vec<RecoveryPointId>,
    /// What was read to the last byte, and is not recorded yet.
    pub proved: Vec<ProvedPart>,
}

/// A part of the pool that was read to the last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProvedPart {
    /// Which.
    pub part: Part,
    /// Packs in it.
    pub packs: u64,
    /// Bytes of their files.
    pub bytes: u64,
}

impl VerifyReport {
    /// Takes in what was found in a pack.
    fn note(&mut self, id: PackId, found: Examined, state: &State, bad: &mut HashMap<PackId, BTreeSet<u32>>) {
        self.packs += 1;
        self.bytes_read += found.read;
        self.repairs.extend(found.repair);
        // A pack whose table is damaged still serves its frames.
        if !found.frames.is_empty() {
            if found.frames.iter().any(|frame| state.is_healthy(id, *frame)) {
                self.new_damage.push((id, found.frames.iter().copied().collect()));
            }
            let entry = bad.entry(id);
            match entry {
                // All of it is bad already.
                Entry::Occupied(whole) if whole.get().is_empty() => {}
                entry => entry.or_default().extend(&found.frames),
            }
        }
        self.damage.extend(found.damage);
    }

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
    /// Verifies the pool, one pack at a time; see [`Pool::verify_with`].
    pub fn verify(
        self: &Arc<Self>,
        depth: Depth,
        progress: &mut dyn VerifyProgress,
    ) -> Result<VerifyReport, PoolError> {
        self.verify_with(&VerifyOptions::new(depth), progress)
    }

    /// Verifies the pool. Where this process may write, newly found damage is recorded, so that no new point uses it,
    /// and points that were proved whole are recorded as verified.
    ///
    /// Cancelling by `progress` gives what was found so far, and records no point as verified. With
    /// [`VerifyOptions::every`] points are looked at only if damage was found that was not known, and the index is read
    /// once a round.
    pub fn verify_with(
        self: &Arc<Self>,
        options: &VerifyOptions,
        progress: &mut dyn VerifyProgress,
    ) -> Result<VerifyReport, PoolError> {
        let depth = options.depth;
        // What is there now stays needed for as long as this runs, whatever expires meanwhile.
        let _pass = self.enter_reading();
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
        let due = options.every.map(|every| self.due(every));
        let due = match due {
            Some(None) => return Ok(report),
            Some(due) => due,
            None => None,
        };
        let is_index_due = due.is_none_or(|due| due.holds(0));
        if depth != Depth::Structure && is_index_due {
            let reserve = self.settings().reserve.unwrap_or(0);
            report.damage.extend(crate::reserve::examine(&*self.world.files, self.id(), reserve)?);
        }
        if is_index_due {
            report.damage.extend(crate::counts::examine(&*self.world.files, &self.keys)?);
        }
        let runs = if is_index_due { self.index().examine() } else { Vec::new() };
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
        let known: BTreeMap<PackId, PackInfo> =
            self.index().packs().iter().map(|(id, info)| (*id, *info)).collect();
        let mut bad: HashMap<PackId, BTreeSet<u32>> = state.damaged.clone();
        let mut packs = Vec::new();
        let mut is_any_gone = false;
        for (id, info) in &known {
            if state.permitted.contains_key(id) {
                continue;
            }
            if !info.present {
                is_any_gone |= state.damaged.get(id).is_none_or(|frames| !frames.is_empty());
                bad.insert(*id, BTreeSet::new());
            } else if due.is_none_or(|due| due.holds(place(*id))) {
                packs.push((*id, *info));
            }
        }
        if let Some(due) = due {
            packs.sort_by_key(|(id, _)| (due.distance(place(*id)), *id));
        }
        let total: u64 = packs.iter().map(|(_, info)| info.length).sum();
        let mut done = 0;
        let mut failed = None;
        let examine = |(id, info): &(PackId, PackInfo), decoder: &mut Option<Decoder>| {
            self.examine_pack(*id, info, options, decoder)
        };
        let threads = if depth == Depth::Structure { 1 } else { options.threads };
        let mut is_whole = true;
        for part in pieces(due, total) {
            let from = packs.partition_point(|(id, _)| part.before(*id));
            let end = packs.partition_point(|(id, _)| !part.after(*id));
            let packs = packs.get(from..end).unwrap_or_default();
            let seen = |(id, info): &(PackId, PackInfo), found: Result<Examined, PoolError>| match found {
                Err(error) => {
                    failed = Some(error);
                    false
                }
                // A reclaim let the pack go while it was being read: nothing is damaged.
                Ok(found) if !found.damage.is_empty() && self.let_go(*id) => {
                    done += info.length;
                    progress.update(done, total)
                }
                Ok(found) => {
                    if depth == Depth::ReadData {
                        // What was recorded may have been one failed read; what counts is what was read now.
                        bad.remove(id);
                    }
                    done += info.length;
                    report.note(*id, found, &state, &mut bad);
                    progress.update(done, total)
                }
            };
            is_whole = in_order(packs, threads, || None, examine, seen)?;
            if let Some(error) = failed {
                return Err(error);
            }
            if !is_whole {
                break;
            }
            if depth == Depth::ReadData {
                let bytes = packs.iter().map(|(_, info)| info.length).sum();
                report.proved.push(ProvedPart { part: part.part, packs: packs.len() as u64, bytes });
            }
            if due.is_some() && self.is_writable() {
                // A stop does not lose what was done so far.
                let stored = self.record_verified(&report)?;
                report.stored_again.extend(stored);
                report.proved.clear();
            }
        }
        if due.is_none() || is_any_gone || !report.new_damage.is_empty() {
            self.verify_points(&bad, &mut report)?;
        }
        if depth == Depth::ReadData && due.is_none() && is_whole {
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
            let stored = self.record_verified(&report)?;
            report.stored_again.extend(stored);
        }
        Ok(report)
    }

    /// What must be proved now so that everything is, every so many seconds.
    pub fn due(&self, every: u64) -> Option<Part> {
        let state = self.state();
        let time = self.world.clock.now_micros();
        let since = time.saturating_sub(state.last_time).min(state::MAX_STEP);
        let now = Proof { pool_time: state.pool_time.saturating_add(since), time };
        let created = Proof { pool_time: 0, time: self.created().0 };
        state.proofs.due(now, created, every.saturating_mul(Timestamp::SECOND))
    }

    /// Records what a verify found: damage, so that no new point uses it, and points that were proved whole; and stores
    /// again what packs give only by their parity, before that is recorded. A reader that verified beside a writer hands
    /// its report to the next one who may write.
    pub fn record_verified(&self, report: &VerifyReport) -> Result<Vec<StoredAgain>, PoolError> {
        let mut stored = Vec::new();
        for repair in &report.repairs {
            stored.extend(self.store_again(repair)?);
        }
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
        for ProvedPart { part, packs, bytes } in report.proved.iter().copied() {
            let record = payload::Proved { from: part.from, length: part.length, packs, bytes };
            self.append(Kind::Proved, &record)?;
        }
        Ok(stored)
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
                Ok(twin) if !fits(&twin.content) => {
                    Some("belongs to another pool or recipient, or is not proved by a root key".to_owned())
                }
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
        let rings = self.state().rings.clone();
        for entry in entries {
            let name = format!("keys/{}", entry.name);
            match ring::generation(&entry.name) {
                Some(generation) => check(&name, twin::RING, &|content| {
                    let is_ours = Ring::decode(content).is_ok_and(|ring| {
                        let is_proved = is_ring_proved(&ring, &self.keys).unwrap_or(false);
                        ring.pool == self.id() && ring.generation == generation && is_proved
                    });
                    let stated = rings.get(&generation);
                    is_ours
                        && stated.is_none_or(|stated| {
                            stated.as_slice() == blake3::hash(content).as_bytes().as_slice()
                        })
                }),
                None => check(&name, twin::KEY, &|content| {
                    KeyFile::decode(content).is_ok_and(|file| {
                        // A generation that this recipient does not reach is another's business.
                        let proved =
                            !self.keys.knows(file.generation) || self.is_proved(&file).unwrap_or(false);
                        proved && file.pool == self.id() && key_name(file.recipient) == name
                    })
                }),
            }
        }
        Ok(())
    }

    fn examine_structure(&self, id: PackId) -> Examined {
        let path = self.world.files.display(&pack::name(id));
        match self.read_table(id) {
            Ok(table) if !table.rebuilt.is_empty() => Examined {
                read: table.table.len() as u64 * 20 + 128,
                damage: vec![Damage::File {
                    path,
                    offset: 0,
                    reason: format!(
                        "{} sectors of its header or table were rebuilt from parity",
                        table.rebuilt.len()
                    ),
                    derived: false,
                }],
                ..Examined::default()
            },
            Ok(table) => Examined { read: table.table.len() as u64 * 20 + 128, ..Examined::default() },
            // The frames may all be right: only reading them tells.
            Err(error) => Examined {
                damage: vec![Damage::File { path, offset: 0, reason: error.to_string(), derived: false }],
                ..Examined::default()
            },
        }
    }

    fn examine_pack(
        &self,
        id: PackId,
        info: &PackInfo,
        options: &VerifyOptions,
        decoder: &mut Option<Decoder>,
    ) -> Result<Examined, PoolError> {
        match options.depth {
            Depth::Structure => Ok(self.examine_structure(id)),
            Depth::Hashes | Depth::ReadData => {
                self.examine_data(id, info.domain, info.kind, options.reading(), decoder)
            }
        }
    }

    /// Every byte of a pack against its hash, and each chunk against its id, where the table or a run tells the ids.
    fn examine_data(
        &self,
        id: PackId,
        domain: model::DomainId,
        kind: PackKind,
        reading: Reading<'_>,
        decoder: &mut Option<Decoder>,
    ) -> Result<Examined, PoolError> {
        let files = &*self.world.files;
        let path = files.display(&pack::name(id));
        let mut places: BTreeMap<u32, Vec<(ChunkId, Location)>> = BTreeMap::new();
        let mut add = |chunk: ChunkId, location: u32| {
            let place = Location { pack: id, at: location };
            places.entry(place.frame()).or_default().push((chunk, place));
        };
        let mut generation = None;
        match self.read_table(id) {
            Ok(table) => {
                generation = Some(table.header.generation);
                table.table.iter().for_each(|entry| add(entry.id, entry.location));
            }
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
        let seal = match generation {
            Some(generation) => keys.pack(generation, id)?,
            // Its header may be what is damaged; a pack that cannot be read at all is damage like any other.
            None => self
                .reader
                .seal_key(id, domain, places.keys().copied())
                .or_else(|_| keys.pack(self.keys.generation(), id))?,
        };
        let chunk_kind = match kind {
            PackKind::Blocks => ChunkKind::Block,
            PackKind::Nodes => ChunkKind::Node,
        };
        let is_chunk = |chunk: &ChunkId, slot: usize, bytes: Option<&[u8]>| match bytes {
            None => Err(format!("the frame has no chunk {slot}")),
            Some(bytes) if keys.chunk_id(chunk_kind, blake3::hash(bytes).as_bytes()) != *chunk => {
                Err(format!("the chunk in place {slot} is not {chunk}"))
            }
            Some(_) => Ok(()),
        };
        let decoder = match decoder {
            Some(decoder) => decoder,
            none => none.insert(Decoder::new().map_err(PoolError::Misuse)?),
        };
        let mut prove = |at: u32, header: &FrameHeader, head: &[u8], sealed: &mut [u8]| {
            let chunks = places.get(&at)?;
            let Some(plain) = seal.open(frame_nonce(u64::from(at)), head, sealed) else {
                return Some(Err("the seal of the frame does not fit its bytes".to_owned()));
            };
            Some(decoder.decode(header.codec, plain, header.decoded as usize).and_then(|content| {
                let spans = frame::spans(kind, usize::from(header.chunks), content, content.len())
                    .map_err(|error| format!("{error:?}"))?;
                chunks.iter().try_for_each(|(chunk, place)| {
                    let bytes = spans.get(place.slot()).and_then(|span| content.get(span.clone()));
                    is_chunk(chunk, place.slot(), bytes)
                })
            }))
        };
        // What cannot be read at all is damage like any other; which frames it costs shows below.
        let walked =
            examine::examine(files, self.id(), id, reading, Some(&mut prove)).unwrap_or_else(|error| {
                PackExamination { damaged: vec![(0, error.to_string())], ..PackExamination::default() }
            });
        let mut examined = Examined { read: walked.length, frames: walked.frames, ..Examined::default() };
        let sectors = walked.sectors.len() as u64;
        if !walked.sectors.is_empty() {
            self.reader.rebuilt.note(id, walked.sectors);
            self.forget_pack(id);
        }
        if sectors > 0 || walked.is_whole && !walked.damaged.is_empty() {
            examined.repair =
                Some(Repair { pack: id, sectors, frames: walked.rebuilt, is_whole: walked.is_whole });
        }
        let damage =
            |offset: u64, reason: String| Damage::File { path: path.clone(), offset, reason, derived: false };
        examined.damage.extend(walked.damaged.into_iter().map(|(offset, reason)| damage(offset, reason)));
        let missed: Vec<_> = places.into_iter().filter(|(frame, _)| !walked.met.contains(frame)).collect();
        if !missed.is_empty() {
            self.forget_pack(id);
        }
        for (frame, chunks) in missed {
            let Some((_, first)) = chunks.first() else { continue };
            let proved =
                self.reader.decoded(*first, domain, kind, true).map_err(|error| error.to_string()).and_then(
                    |decoded| {
                        chunks.iter().try_for_each(|(chunk, place)| {
                            is_chunk(chunk, place.slot(), decoded.chunk(place.slot()))
                        })
                    },
                );
            if let Err(reason) = proved {
                examined.frames.insert(frame);
                examined.damage.push(damage(u64::from(frame), reason));
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

    /// The same without opening the index for it, whose cost follows the pool: until something else has opened it, packs
    /// that nobody has missed yet are not missed.
    pub fn has_known_damage_at_hand(&self) -> bool {
        !self.state().damaged.is_empty() || self.is_index_open() && self.has_known_damage()
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

/// So many bytes of packs are read between two records of a verify by age.
const PIECE: u64 = 1 << 30;

/// A part of what a verify reads, before it is recorded.
struct Piece {
    part: Part,
    /// What is due, and where in it the part begins; all if absent.
    within: Option<(Part, u64)>,
}

impl Piece {
    /// Whether a pack comes before it.
    fn before(&self, id: PackId) -> bool {
        self.within.is_some_and(|(due, from)| due.distance(place(id)) < from)
    }

    /// Whether a pack comes after it.
    fn after(&self, id: PackId) -> bool {
        self.within.is_some_and(|(due, from)| due.distance(place(id)) >= from + self.part.length)
    }
}

/// What is due, in pieces of about [`PIECE`] bytes.
fn pieces(due: Option<Part>, total: u64) -> Vec<Piece> {
    let Some(due) = due else { return vec![Piece { part: Part::WHOLE, within: None }] };
    let count = total.div_ceil(PIECE).clamp(1, (due.length / proofs::LEAST).max(1));
    let each = due.length / count;
    (0..count)
        .filter_map(|number| {
            let from = number * each;
            let length = if number + 1 == count { due.length - from } else { each };
            let part = Part::new((due.from + from) % proofs::RING, length)?;
            Some(Piece { part, within: Some((due, from)) })
        })
        .collect()
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

/// What was found in a pack.
#[derive(Default)]
struct Examined {
    damage: Vec<Damage>,
    /// Frames that are damaged and cannot be had.
    frames: BTreeSet<u32>,
    /// What parity gives of it.
    repair: Option<Repair>,
    read: u64,
}

//! Reclaim: freeing what no point needs, in the one allowed order (section 9.2).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use environment::Removal;
use model::{RecoveryPointId, Timestamp};

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::PoolError;
use crate::format::pack::{self, PackKind};
use crate::format::payload::{self, Kind};
use crate::format::run;
use crate::frame;
use crate::index::PackInfo;
use crate::keys::Keys;
use crate::map::{MapReader, MapRoot};
use crate::packs::{self, PackWriter};
use crate::pool::{Pool, PoolNodes, World};
use crate::sequence;

/// A pack with less than this share of its stored bytes in use is rewritten, in percent.
pub const REWRITE_BELOW_PERCENT: u64 = 60;

/// Most packs that one record names: 16 MB.
const PACKS_A_RECORD: usize = 1 << 20;

/// What a reclaim may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReclaimOptions {
    /// Seconds of hold instead of the pool's; only longer ones count.
    pub hold: Option<u64>,
    /// Percent of the pool that may be freed instead of the pool's breaker.
    pub breaker_percent: Option<u32>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a reclaim did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReclaimReport {
    /// Points whose soft-delete period is over.
    pub expired_points: u64,
    /// Bytes of packs put into quarantine.
    pub quarantined_bytes: u64,
    /// Bytes copied out of packs with little use.
    pub rewritten_bytes: u64,
    /// Bytes of packs in quarantine whose hold is not over.
    pub held_bytes: u64,
    /// Seconds of pool time until the next of these may go.
    pub held_for: u64,
    /// Bytes of files removed.
    pub freed_bytes: u64,
    /// Packs removed.
    pub freed_packs: u64,
    /// Packs taken out of quarantine because something needs them again.
    pub released_packs: u64,
    /// Bytes of all packs before.
    pub pool_bytes: u64,
}

/// Unlinks what a permit allows. In the product a process of its own; see [`run_deletion_service`].
pub trait DeletionService {
    /// Carries out the permit with this record number, and removes these superseded runs.
    fn carry_out(&self, permit: Option<u64>, runs: &[u64]) -> Result<(), PoolError>;
}

/// Marks of what is in use.
struct Marks {
    chunks: HashSet<ChunkId>,
    expired: u64,
}

impl Pool {
    /// Every chunk that a point needs. Anything that cannot be read stops everything (INV-12).
    fn mark(self: &Arc<Self>) -> Result<Marks, PoolError> {
        // Bundles spare the reading of records, but nothing is freed on their word.
        self.recheck_records()?;
        let state = self.state().clone();
        if let Some(record) = state.unreadable.first() {
            return Err(PoolError::Stopped { reason: format!("{}: {}", record.path, record.reason) });
        }
        let mut chunks = HashSet::new();
        let mut expired = 0;
        for point in state.in_order() {
            if state.is_expired(point, self.settings().soft_delete) {
                expired += 1;
                continue;
            }
            for disk in &point.disks {
                let nodes = PoolNodes { pool: self.clone(), keys: self.domain_keys(point.domain) };
                let map = MapReader::new(nodes, MapRoot { root: disk.root, levels: disk.levels });
                let mut lost = None;
                let cell = std::cell::RefCell::new(&mut chunks);
                map.walk(
                    &mut |node, _| cell.borrow_mut().insert(node),
                    &mut |_, chunk| {
                        cell.borrow_mut().insert(chunk);
                    },
                    &mut |_, error| {
                        lost.get_or_insert(error);
                    },
                );
                if let Some(error) = lost {
                    return Err(PoolError::Stopped {
                        reason: format!(
                            "the map of disk {} of {} ({}): {error}",
                            disk.index, point.machine, point.id
                        ),
                    });
                }
            }
        }
        Ok(Marks { chunks, expired })
    }

    /// Frees what no point needs. Refused as busy while a backup is under way.
    pub fn reclaim(
        self: &Arc<Self>,
        options: ReclaimOptions,
        service: &dyn DeletionService,
    ) -> Result<ReclaimReport, PoolError> {
        if !self.is_writable() && !options.dry_run {
            return Err(PoolError::ReadOnly);
        }
        let _pass = self.enter_reclaim().ok_or(PoolError::Busy { path: self.path() })?;
        if !options.dry_run {
            // Pool time stands still between records: let it come up to now before it is asked.
            self.tick()?;
        }
        self.finish_permits(options, service)?;

        let mut report = ReclaimReport::default();
        let marks = self.mark()?;
        report.expired_points = marks.expired;

        // What each pack holds that is in use. A chunk with several copies is in use in the first healthy one only.
        let state = self.state().clone();
        let mut used: BTreeMap<PackId, Vec<(ChunkId, Location)>> =
            self.index().packs().keys().map(|id| (*id, Vec::new())).collect();
        let lengths: BTreeMap<PackId, PackInfo> = self
            .index()
            .packs()
            .iter()
            // A missing pack frees nothing, but goes through the same steps: then nothing asks for it any more.
            .map(|(id, info)| (*id, PackInfo { length: if info.present { info.length } else { 0 }, ..*info }))
            .collect();
        report.pool_bytes = lengths.values().map(|info| info.length).sum();
        type Homes = (BTreeMap<ChunkId, Location>, Vec<(ChunkId, Location)>);
        let (homes, doubtful): Homes =
            self.for_each_chunk(Homes::default, |(homes, doubtful), id, place| {
                let Some(info) = lengths.get(&place.pack).filter(|_| marks.chunks.contains(&id)) else {
                    return;
                };
                let is_damaged = !info.present
                    || state
                        .damaged
                        .get(&place.pack)
                        .is_some_and(|frames| frames.is_empty() || frames.contains(&place.frame()));
                if is_damaged {
                    doubtful.push((id, place));
                    return;
                }
                let rank = |place: &Location| (state.quarantined.contains_key(&place.pack), *place);
                homes.entry(id).and_modify(|home| *home = (*home).min_by(place, rank)).or_insert(place);
            })?;
        for (id, place) in &homes {
            used.entry(place.pack).or_default().push((*id, *place));
        }
        // The only copies of a needed chunk may lie in damaged frames: kept, for whatever can still be made of them.
        for (id, place) in doubtful {
            if !homes.contains_key(&id) {
                used.entry(place.pack).or_default().push((id, place));
            }
        }

        // Candidates: packs without use, and after copying what is used, packs with little use.
        let mut empty = Vec::new();
        let mut sparse = Vec::new();
        for (id, chunks) in &used {
            let Some(info) = lengths.get(id) else { continue };
            if state.quarantined.contains_key(id) || state.permitted.contains_key(id) {
                continue;
            }
            if chunks.is_empty() {
                empty.push(*id);
                continue;
            }
            if state.damaged.contains_key(id) || !info.present {
                continue;
            }
            let live = self.live_share(*id, chunks)?;
            if live * 100 < REWRITE_BELOW_PERCENT * info.length {
                sparse.push(*id);
            }
        }
        if !options.dry_run {
            sparse = self.sound_only(sparse, &used, &lengths)?;
        }
        let freed: u64 =
            empty.iter().chain(&sparse).filter_map(|id| lengths.get(id)).map(|info| info.length).sum();
        let allowed = u64::from(options.breaker_percent.unwrap_or(self.settings().breaker_percent));
        if report.pool_bytes > 0 && freed * 100 > allowed * report.pool_bytes {
            return Err(PoolError::Breaker { percent: freed * 100 / report.pool_bytes, allowed });
        }
        if options.dry_run {
            report.quarantined_bytes = freed;
            return Ok(report);
        }
        if !sparse.is_empty() {
            let moving: Vec<(ChunkId, Location)> =
                sparse.iter().filter_map(|id| used.get(id)).flatten().copied().collect();
            report.rewritten_bytes = self.copy_out(&moving, &lengths)?;
        }
        let mut quarantine = empty;
        quarantine.extend(sparse);
        quarantine.sort_unstable();
        for part in quarantine.chunks(PACKS_A_RECORD) {
            let record = payload::Packs {
                packs: part.iter().flat_map(|id| id.0).collect(),
                bytes: freed,
                rewritten: report.rewritten_bytes,
            };
            self.append(Kind::Quarantine, &record)?;
            report.quarantined_bytes = freed;
        }
        self.permit(options, service, &mut report)?;
        Ok(report)
    }

    /// Of these packs, those of which everything that is used can be read. Damage of the others is recorded: they stay,
    /// for whatever can still be made of them.
    fn sound_only(
        &self,
        packs: Vec<PackId>,
        used: &BTreeMap<PackId, Vec<(ChunkId, Location)>>,
        about: &BTreeMap<PackId, PackInfo>,
    ) -> Result<Vec<PackId>, PoolError> {
        let mut sound = Vec::new();
        for id in packs {
            let (Some(chunks), Some(info)) = (used.get(&id), about.get(&id)) else { continue };
            let frames: BTreeSet<u32> = chunks.iter().map(|(_, place)| place.frame()).collect();
            let damaged: Vec<u32> = frames
                .into_iter()
                .filter(|&at| !self.reader.is_sound(Location::new(id, at, 0), info.domain))
                .collect();
            if damaged.is_empty() {
                sound.push(id);
                continue;
            }
            let record = payload::Damage {
                pack: id.0.to_vec(),
                frames: damaged,
                reason: "it could not be read or did not fit its seal when a reclaim wanted to copy it"
                    .to_owned(),
            };
            self.append(Kind::Damage, &record)?;
        }
        Ok(sound)
    }

    /// Stored bytes of the frames of a pack that hold used chunks.
    fn live_share(&self, id: PackId, chunks: &[(ChunkId, Location)]) -> Result<u64, PoolError> {
        let table = match packs::read_table(&*self.world.files, &self.keys, id) {
            Ok(table) => table,
            Err(error @ PoolError::Io { .. }) => return Err(error),
            // A damaged table: leave the pack alone.
            Err(_) => return Ok(u64::MAX / 200),
        };
        let mut frames: BTreeMap<u32, u64> = BTreeMap::new();
        for entry in &table.table {
            frames.entry(Location { pack: id, at: entry.location }.frame()).or_default();
        }
        let starts: Vec<u32> = frames.keys().copied().collect();
        let end = table.length as u32;
        for (position, start) in starts.iter().enumerate() {
            let next = starts.get(position + 1).copied().unwrap_or(end);
            frames.insert(*start, u64::from(next.saturating_sub(*start)));
        }
        let mut chunks_in: BTreeMap<u32, u64> = BTreeMap::new();
        for entry in &table.table {
            *chunks_in.entry(Location { pack: id, at: entry.location }.frame()).or_default() += 1;
        }
        let mut live = 0;
        for (_, place) in chunks {
            let span = frames.get(&place.frame()).copied().unwrap_or(0);
            live += span / chunks_in.get(&place.frame()).copied().unwrap_or(1).max(1);
        }
        Ok(live)
    }

    /// Copies chunks into new packs, durable and indexed. Each is decoded and compared with its id on the way.
    fn copy_out(
        self: &Arc<Self>,
        moving: &[(ChunkId, Location)],
        packs: &BTreeMap<PackId, PackInfo>,
    ) -> Result<u64, PoolError> {
        let mut by_target: BTreeMap<(model::DomainId, u16), Vec<(ChunkId, Location)>> = BTreeMap::new();
        for (id, place) in moving {
            if let Some(info) = packs.get(&place.pack) {
                by_target.entry((info.domain, info.kind as u16)).or_default().push((*id, *place));
            }
        }
        let mut written = 0;
        for ((domain, kind), mut chunks) in by_target {
            let Some(kind) = PackKind::of(kind) else { continue };
            chunks.sort_by_key(|(_, place)| *place);
            let keys = self.domain_keys(domain);
            let (chunk_kind, group) = match kind {
                PackKind::Blocks => (ChunkKind::Block, 4),
                PackKind::Nodes => (ChunkKind::Node, pack::MAX_CHUNKS),
            };
            let mut writer: Option<PackWriter> = None;
            for part in chunks.chunks(group) {
                let mut contents = Vec::with_capacity(part.len());
                for (id, _) in part {
                    let mut content = Vec::new();
                    self.read_chunk(&keys, chunk_kind, id, &mut |bytes| content.extend_from_slice(bytes))?;
                    contents.push(content);
                }
                let ids: Vec<ChunkId> = part.iter().map(|(id, _)| *id).collect();
                let (codec, encoded, decoded) = match kind {
                    PackKind::Blocks => {
                        let joined = contents.concat();
                        let (codec, encoded) = frame::encode(self.settings().zstd_level, &joined);
                        (codec, encoded, joined.len())
                    }
                    PackKind::Nodes => {
                        let joined = frame::join_nodes(&contents);
                        let length = joined.len();
                        (frame::PLAIN, joined, length)
                    }
                };
                if writer.is_none() {
                    let id = PackId(self.world.random_id()?);
                    writer = Some(PackWriter::begin(self.world.files.clone(), self.id(), &keys, kind, id)?);
                }
                if let Some(open) = &mut writer {
                    open.put(codec, &encoded, decoded as u32, &ids)?;
                    if open.length() >= packs::PACK_BYTES
                        && let Some(full) = writer.take()
                    {
                        let finished = self.finish_pack(full)?;
                        written += finished.length;
                        self.index_mut().add_loose(&finished);
                    }
                }
            }
            if let Some(last) = writer {
                let finished = self.finish_pack(last)?;
                written += finished.length;
                self.index_mut().add_loose(&finished);
            }
        }
        self.flush_index()?;
        Ok(written)
    }

    /// Packs whose hold is over get a permit, after a second mark; then they are unlinked.
    fn permit(
        self: &Arc<Self>,
        options: ReclaimOptions,
        service: &dyn DeletionService,
        report: &mut ReclaimReport,
    ) -> Result<(), PoolError> {
        let hold = options.hold.unwrap_or(0).max(self.settings().reclaim_hold) * Timestamp::SECOND;
        let state = self.state().clone();
        let about: BTreeMap<PackId, PackInfo> =
            self.index().packs().iter().map(|(id, info)| (*id, *info)).collect();
        let length = |id: &PackId| about.get(id).filter(|info| info.present).map_or(0, |info| info.length);
        let mut due = Vec::new();
        for (id, quarantined) in &state.quarantined {
            let waited = state.pool_time.saturating_sub(quarantined.since);
            if waited >= hold {
                due.push(*id);
            } else {
                report.held_bytes += length(id);
                let left = (hold - waited).div_ceil(Timestamp::SECOND);
                report.held_for = if report.held_for == 0 { left } else { report.held_for.min(left) };
            }
        }
        if !due.is_empty() {
            // The re-check: a chunk in use that has no other copy, read and proved now, keeps its pack. So a copy that
            // rotted unseen never costs the one that is right.
            let marks = self.mark()?;
            let is_due: HashSet<PackId> = due.iter().copied().collect();
            let inside = self.for_each_chunk(Vec::new, |inside, id, place| {
                if marks.chunks.contains(&id) && is_due.contains(&place.pack) {
                    inside.push((id, place.pack));
                }
            })?;
            let mut proved: HashMap<(PackId, u32), bool> = HashMap::new();
            let mut needed: HashSet<PackId> = HashSet::new();
            for (id, pack) in inside {
                if needed.contains(&pack) || !about.get(&pack).is_some_and(|info| info.present) {
                    continue;
                }
                let has_other = self.find(&id)?.into_iter().any(|place| {
                    !is_due.contains(&place.pack)
                        && state.is_healthy(place.pack, place.frame())
                        && about.get(&place.pack).is_some_and(|info| {
                            *proved
                                .entry((place.pack, place.frame()))
                                .or_insert_with(|| self.reader.is_sound(place, info.domain))
                        })
                });
                if !has_other {
                    needed.insert(pack);
                }
            }
            let released: Vec<PackId> = due.iter().copied().filter(|id| needed.contains(id)).collect();
            due.retain(|id| !needed.contains(id));
            if !released.is_empty() {
                report.released_packs = released.len() as u64;
                let record = payload::Packs {
                    packs: released.iter().flat_map(|id| id.0).collect(),
                    bytes: 0,
                    rewritten: 0,
                };
                self.append(Kind::Release, &record)?;
            }
        }
        for part in due.chunks(PACKS_A_RECORD) {
            let bytes = part.iter().map(length).sum();
            let record =
                payload::Packs { packs: part.iter().flat_map(|id| id.0).collect(), bytes, rewritten: 0 };
            let number = self.append(Kind::Permit, &record)?;
            report.freed_bytes += bytes;
            report.freed_packs += part.len() as u64;
            self.index_mut().set_leftover(part, true);
            self.after_permit(number, part, service)?;
        }
        Ok(())
    }

    fn after_permit(
        &self,
        permit: u64,
        gone: &[PackId],
        service: &dyn DeletionService,
    ) -> Result<(), PoolError> {
        let is_gone: HashSet<PackId> = gone.iter().copied().collect();
        // New run first, so that no moment has an index without a chunk that is there; the old ones last.
        self.write_run(|index, head| index.rewrite(head, &|pack| !is_gone.contains(&pack)))?;
        gone.iter().for_each(|pack| self.forget_pack(*pack));
        let superseded = self.index().superseded();
        service.carry_out(Some(permit), &superseded)?;
        let mut index = self.index_mut();
        index.set_leftover(gone, false);
        index.forget_superseded(&superseded);
        Ok(())
    }

    /// Carries out permits that a crash interrupted.
    fn finish_permits(
        self: &Arc<Self>,
        options: ReclaimOptions,
        service: &dyn DeletionService,
    ) -> Result<(), PoolError> {
        if options.dry_run {
            return Ok(());
        }
        let state = self.state().clone();
        let mut open: BTreeMap<u64, Vec<PackId>> = BTreeMap::new();
        for pack in self.index().leftovers() {
            if let Some(permit) = state.permitted.get(pack) {
                open.entry(*permit).or_default().push(*pack);
            }
        }
        if !open.is_empty() {
            // A writer that could not read the permit may have shared what it names since.
            let marks = self.mark()?;
            for pack in open.values().flatten() {
                let Ok(table) = packs::read_table(&*self.world.files, &self.keys, *pack) else { continue };
                for entry in table.table.iter().filter(|entry| marks.chunks.contains(&entry.id)) {
                    let places = self.find(&entry.id)?;
                    if !places.iter().any(|place| state.is_healthy(place.pack, place.frame())) {
                        let reason =
                            format!("a point needs chunk {} of pack {pack}, which has a permit", entry.id);
                        return Err(PoolError::Stopped { reason });
                    }
                }
            }
        }
        for (permit, packs) in open {
            self.after_permit(permit, &packs, service)?;
        }
        let superseded = self.index().superseded();
        if superseded.is_empty() {
            return Ok(());
        }
        service.carry_out(None, &superseded)?;
        self.index_mut().forget_superseded(&superseded);
        Ok(())
    }
}

trait MinBy {
    fn min_by<K: Ord>(self, other: Self, key: impl Fn(&Self) -> K) -> Self;
}
impl MinBy for Location {
    fn min_by<K: Ord>(self, other: Location, key: impl Fn(&Location) -> K) -> Location {
        if key(&other) < key(&self) { other } else { self }
    }
}

/// The deletion service: reads the permit from the pool itself and unlinks exactly what it names.
///
/// It believes nothing it is told but numbers: the packs come from the sealed record, and a run is unlinked only if a
/// readable run supersedes it.
pub fn run_deletion_service(
    world: &World,
    removal: &dyn Removal,
    recipient: &crate::kit::Recipient,
    permit: Option<u64>,
    runs: &[u64],
) -> Result<(), PoolError> {
    let (root, _) = crate::pool::unwrap_root(world, recipient)?;
    let keys = Keys::new(recipient.pool, root);
    let state = sequence::load(&*world.files, &keys)?;
    if let Some(record) = state.unreadable.first() {
        return Err(PoolError::Stopped { reason: format!("{}: {}", record.path, record.reason) });
    }
    let io = |name: &str, source| PoolError::io(world.files.display(name), "remove", source);
    if let Some(permit) = permit {
        for (pack, number) in &state.permitted {
            if *number == permit {
                let name = pack::name(*pack);
                removal.remove(&name).map_err(|source| io(&name, source))?;
            }
        }
    }
    for name in crate::bundle::superseded(&*world.files, &keys)? {
        removal.remove(&name).map_err(|source| io(&name, source))?;
    }
    if runs.is_empty() {
        return Ok(());
    }
    let permitted = state.permitted;
    let index = crate::index::Index::open(world.files.clone(), &keys, &|pack| permitted.contains_key(&pack))?;
    let superseded = index.superseded();
    for number in runs.iter().filter(|number| superseded.contains(number)) {
        let name = run::name(*number);
        removal.remove(&name).map_err(|source| io(&name, source))?;
    }
    Ok(())
}

/// A deletion service in this process: for simulations and tests.
pub struct InProcessDeletion {
    /// The pool's world.
    pub world: World,
    /// The right to remove.
    pub removal: Arc<dyn Removal>,
    /// A way into the pool.
    pub recipient: crate::kit::Recipient,
}

impl DeletionService for InProcessDeletion {
    fn carry_out(&self, permit: Option<u64>, runs: &[u64]) -> Result<(), PoolError> {
        run_deletion_service(&self.world, &*self.removal, &self.recipient, permit, runs)
    }
}

/// What the pool holds, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// All packs.
    pub packs: u64,
    /// Of these, in quarantine.
    pub quarantined: u64,
    /// Index runs.
    pub index: u64,
    /// Records.
    pub sequence: u64,
    /// Free on the pool's file system.
    pub free: u64,
    /// Size of the pool's file system.
    pub total: u64,
}

impl Pool {
    /// What the pool holds.
    pub fn space(&self) -> Result<SpaceReport, PoolError> {
        let mut report = SpaceReport::default();
        let state = self.state().clone();
        for (id, info) in self.index().packs().iter().filter(|(_, info)| info.present) {
            report.packs += info.length;
            if state.quarantined.contains_key(id) {
                report.quarantined += info.length;
            }
        }
        let sum = |folder: &str| -> Result<u64, PoolError> {
            let entries = self
                .world
                .files
                .list(folder)
                .map_err(|source| PoolError::io(self.world.files.display(folder), "list", source))?;
            Ok(entries.iter().map(|entry| entry.len).sum())
        };
        report.index = sum("index")?;
        report.sequence = sum("sequence")?;
        report.free =
            self.world.files.free_bytes().map_err(|source| PoolError::io(self.path(), "measure", source))?;
        report.total =
            self.world.files.total_bytes().map_err(|source| PoolError::io(self.path(), "measure", source))?;
        Ok(report)
    }

    /// For each point that is not expired, the bytes of blocks (64 KiB each, before compression) that no other such
    /// point uses. One walk over all maps; parts that points share are walked once.
    pub fn unique_bytes(self: &Arc<Self>) -> std::collections::HashMap<RecoveryPointId, u64> {
        let state = self.state().clone();
        let live: Vec<&crate::state::Point> =
            state.in_order().filter(|point| !state.is_expired(point, self.settings().soft_delete)).collect();
        // Who uses a chunk: one point by its place, or several. A node that a second point shares makes everything
        // below it shared; since a first walk may have called parts of it one's own, it is walked once more.
        const SEVERAL: u32 = u32::MAX;
        let mut nodes: std::collections::HashMap<ChunkId, u32> = std::collections::HashMap::new();
        let mut blocks: std::collections::HashMap<ChunkId, u32> = std::collections::HashMap::new();
        let own = |users: &mut std::collections::HashMap<ChunkId, u32>, id: ChunkId, place: u32| -> u32 {
            let user = users.entry(id).or_insert(place);
            let before = *user;
            if before != place {
                *user = SEVERAL;
            }
            before
        };
        for (point, place) in live.iter().zip(0u32..) {
            for disk in &point.disks {
                let source = PoolNodes { pool: self.clone(), keys: self.domain_keys(point.domain) };
                let map = MapReader::new(source, MapRoot { root: disk.root, levels: disk.levels });
                map.walk(
                    &mut |node, _| own(&mut nodes, node, place) != SEVERAL,
                    &mut |_, chunk| {
                        own(&mut blocks, chunk, place);
                    },
                    &mut |_, _| {},
                );
            }
        }
        let mut bytes = vec![0u64; live.len()];
        for place in blocks.into_values().filter(|place| *place != SEVERAL) {
            bytes[place as usize] += model::BLOCK_BYTES;
        }
        live.iter().zip(bytes).map(|(point, bytes)| (point.id, bytes)).collect()
    }
}

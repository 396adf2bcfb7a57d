//! Reclaim: freeing what no point needs, in the one allowed order (section 9.2).
//!
//! Beside ingests and readers of this process, without a lock that they wait for. What keeps every acknowledged point whole:
//!
//! | what could be lost | what keeps it |
//! |---|---|
//! | a pack that a job finished and no point names yet | pinned from before it has its name until the job ends, and if that is amid a reclaim, until the reclaim ends |
//! | a chunk of an old pack that a job shares | pinned in the step that finds the pack healthy; quarantine looks at the pins in the step that records |
//! | the same, if a pin were missed | no permit while an ingest runs that began before the quarantine; whoever began later does not share what is in quarantine; the mark before the permit sees what the others committed |
//! | what a job takes over from its base | a point counts as needed if it was not expired when the oldest ingest or reader began; a base that was expired then is refused at the commit |
//! | all of these at once | the commit looks again, in the step that records the point |
//! | a chunk that a reader is about to read | a rewritten chunk is in the index before its old pack goes; whoever finds the file gone looks it up again |
//!
//! Where candidates come from: the reference counts ([`mod@crate::counts`]), which follow what came and went. They decide nothing;
//! the mark before the permit does, and is compared with them.
//!
//! Refuses: beginning beside another reclaim; freeing anything when a record or a node cannot be read (INV-12); freeing
//! more than the breaker allows.
//!
//! Invariants
//! - Packs are unlinked only by a permit, which comes after a quarantine, its hold, and a full mark made after both
//!   (INV-11). (must)
//! - The last sound copy of a needed chunk stays: a copy elsewhere counts if it is read and fits its seal now. (must)
//! - Rewriting writes no more than it frees. (should)

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use model::Timestamp;

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
pub use crate::counts::CountsUse;
use crate::counts::{self, Counted, Failure};
pub use crate::deletion::{DeletionService, InProcessDeletion, run_deletion_service};
use crate::error::PoolError;
use crate::format::pack::{self, PackHeader, PackKind};
use crate::format::payload::{self, Kind};
use crate::frame;
use crate::index::{FinishedPack, PackInfo, View, ViewPlace};
use crate::mark::Marks;
use crate::packs::{self, PackWriter};
use crate::places::Proof;
use crate::pool::Pool;
use crate::sorter::{Sorted, Sorter, distinct};
use crate::state::State;

/// A pack with less than this share of its stored bytes in use is rewritten, in percent, as long as all rewriting writes
/// no more than it frees.
pub const REWRITE_BELOW_PERCENT: u64 = 60;
/// Only packs with less than this share of their chunks in use are looked at that closely, in percent.
const LOOK_BELOW_PERCENT: u64 = 80;
/// Most packs that one reclaim rewrites: 256 GiB are read for them.
const REWRITES: usize = 8192;
/// Most packs that are looked at that closely where counts are kept.
const LOOKS: usize = 2 * REWRITES;
/// Tables that are held at once when a permit is carried out late: 100 MB.
const TABLES_TOGETHER: usize = 2000;

/// Most packs that one record names: 16 MB.
const PACKS_A_RECORD: usize = 1 << 20;

/// What a reclaim may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReclaimOptions {
    /// Seconds of hold instead of the pool's; only longer ones count.
    pub hold: Option<u64>,
    /// Percent of the pool that may be freed instead of the pool's breaker.
    pub breaker_percent: Option<u32>,
    /// Only say what would be done. Where this process may write, the reference counts are kept up to date all the same.
    pub dry_run: bool,
    /// Find candidates by a full mark, whatever the reference counts say. For doubt and for measurements.
    pub mark_all: bool,
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
    /// Of these, bytes of packs whose hold is over: a job that began before their quarantine still runs, or it is not
    /// known what they hold.
    pub waiting_bytes: u64,
    /// Bytes of files removed.
    pub freed_bytes: u64,
    /// Packs removed.
    pub freed_packs: u64,
    /// Packs taken out of quarantine because something needs them again.
    pub released_packs: u64,
    /// Bytes of all packs before.
    pub pool_bytes: u64,
    /// What became of the reference counts.
    pub counts: CountsUse,
}

/// What a reclaim wants to let go of.
#[derive(Default)]
struct Candidates {
    expired: u64,
    /// Bytes of all packs.
    pool: u64,
    /// Packs of which nothing is needed.
    empty: Vec<(PackId, u64)>,
    /// Packs of which little is needed.
    sparse: Vec<Sparse>,
}

/// A pack of which little is needed.
struct Sparse {
    id: PackId,
    length: u64,
    /// What is needed: the places of the home copies.
    used: BTreeSet<u32>,
}

/// What is known of a pack while candidates are looked for.
#[derive(Clone, Copy, Default)]
struct Tally {
    /// Chunks in it.
    chunks: u32,
    /// Those that are needed and have their home here.
    used: u32,
}

/// A used place: position of its pack in the view, place.
type Used = [u8; 8];

impl Pool {
    /// Frees what no point needs, beside backups, restores and verifies. Refused as busy beside another reclaim.
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
            self.make_room(service)?;
            // Pool time stands still between records: let it come up to now before it is asked.
            match self.tick() {
                // Without room for that it stands still, and frees what was due already.
                Ok(()) | Err(PoolError::Full { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.finish_permits(options, service)?;

        let mut report = ReclaimReport::default();
        let counted = self.counted(options, &mut report)?;
        let (found, mut counted) = match counted {
            Some((counted, found)) => (found, Some(counted)),
            None => (self.with_marks(&[], |marks| self.candidates(marks))?, None),
        };
        (report.expired_points, report.pool_bytes) = (found.expired, found.pool);
        let mut sparse = if options.dry_run { found.sparse } else { self.sound_only(found.sparse)? };
        let freed: u64 = found.empty.iter().map(|(_, length)| length).sum::<u64>()
            + sparse.iter().map(|pack| pack.length).sum::<u64>();
        let allowed = u64::from(options.breaker_percent.unwrap_or(self.settings().breaker_percent));
        if report.pool_bytes > 0 && freed * 100 > allowed * report.pool_bytes {
            return Err(PoolError::Breaker { percent: freed * 100 / report.pool_bytes, allowed });
        }
        if options.dry_run {
            report.quarantined_bytes = freed;
            return Ok(report);
        }
        report.rewritten_bytes = match self.copy_out(&sparse) {
            // No room to copy: what is empty goes first, and gives some.
            Err(PoolError::Full { .. }) => {
                sparse.clear();
                0
            }
            copied => copied?,
        };
        if report.rewritten_bytes > 0 && counted.is_some() {
            // Before the old packs go, so that nothing of theirs is to be moved when they are gone.
            match self.update_counts(None) {
                Ok(after) => counted = Some(after),
                Err(PoolError::Full { .. } | PoolError::Reserve { .. }) => sparse.clear(),
                Err(error) => return Err(error),
            }
        }
        let mut packs = found.empty;
        packs.extend(sparse.iter().map(|pack| (pack.id, pack.length)));
        packs.sort_unstable();
        report.quarantined_bytes = self.quarantine(packs, report.rewritten_bytes)?;
        self.permit(options, service, counted.as_ref(), &mut report)?;
        if let Some(counted) = &counted
            && counted.store.has_needless(&*self.world.files)?
        {
            service.carry_out(None, &[])?;
        }
        self.make_ballast()?;
        Ok(report)
    }

    /// Candidates by the reference counts, brought up to date; none if there is no room to do so.
    fn counted(
        self: &Arc<Self>,
        options: ReclaimOptions,
        report: &mut ReclaimReport,
    ) -> Result<Option<(Counted, Candidates)>, PoolError> {
        report.counts = CountsUse::Unused;
        if !self.is_writable() || options.mark_all {
            return Ok(None);
        }
        let mut distrusted = None;
        loop {
            let is_again = distrusted.is_some();
            let counted = match self.update_counts(distrusted.take()) {
                Ok(counted) => counted,
                Err(PoolError::Full { .. } | PoolError::Reserve { .. } | PoolError::Exists { .. }) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            match self.counted_candidates(&counted) {
                Ok(found) => {
                    report.counts = counted.anew.clone().map_or(CountsUse::Kept, CountsUse::Anew);
                    return Ok(Some((counted, found)));
                }
                Err(Failure::Counts(reason)) if !is_again => distrusted = Some(reason),
                Err(Failure::Counts(reason)) => return Err(PoolError::Stopped { reason }),
                Err(Failure::Pool(PoolError::Full { .. })) => return Ok(None),
                Err(Failure::Pool(error)) => self.index_mut().heal(error)?,
            }
        }
    }

    /// Packs without use, and those with so little that copying it pays, by the figures that the counts keep.
    fn counted_candidates(&self, counted: &Counted) -> Result<Candidates, Failure> {
        let (view, state) = (counted.view(), counted.state());
        let mut found = Candidates { expired: counted.expired(), ..Candidates::default() };
        let tallies = counted.rows.iter().map(|row| Tally { chunks: row.entries, used: row.used });
        let mut may_be_sparse = self.sort_out(view, state, tallies, &mut found);
        may_be_sparse.sort_unstable();
        may_be_sparse.truncate(LOOKS);
        if may_be_sparse.is_empty() {
            return Ok(found);
        }
        let packs: Vec<usize> = may_be_sparse.into_iter().map(|(_, at)| at).collect();
        let used = self.needed_places(counted, &packs)?;
        self.choose(view, &used, &mut found)?;
        Ok(found)
    }

    /// Puts packs into quarantine, but for those that something under way makes or shares. Gives their bytes.
    fn quarantine(&self, mut packs: Vec<(PackId, u64)>, rewritten: u64) -> Result<u64, PoolError> {
        // Held over the record: nobody pins a pack between the look and the record.
        let activity = self.activity();
        packs.retain(|(id, _)| !activity.is_pinned(*id));
        let bytes = packs.iter().map(|(_, length)| length).sum();
        for part in packs.chunks(PACKS_A_RECORD) {
            let packs = part.iter().flat_map(|(id, _)| id.0).collect();
            self.append(Kind::Quarantine, &payload::Packs { packs, bytes, rewritten })?;
        }
        Ok(bytes)
    }

    /// Packs without use, and those with so little that copying it pays. Holds a few numbers for each pack, and nothing
    /// for a chunk.
    fn candidates(&self, marks: &Marks) -> Result<Candidates, PoolError> {
        let state = self.state().clone();
        let view = &marks.view;
        let mut found = Candidates { expired: marks.expired, ..Candidates::default() };
        let pack = |place: &ViewPlace| view.packs.get(place.pack as usize);
        // A chunk with several copies is needed in one only: the newest sound one that is not on its way out.
        let is_sound = |place: &&ViewPlace| {
            pack(place).is_some_and(|(id, info)| {
                info.present
                    && !state.permitted.contains_key(id)
                    && state.is_undamaged(*id, Location { pack: *id, at: place.at }.frame())
            })
        };
        let stays =
            |place: &&ViewPlace| pack(place).is_some_and(|(id, _)| !state.quarantined.contains_key(id));
        let home = |places: &[ViewPlace]| -> Option<ViewPlace> {
            let sound = || places.iter().rev().filter(|place| is_sound(place));
            sound().find(|place| stays(place)).or(sound().next()).copied()
        };
        let mut tallies = vec![Tally::default(); view.packs.len()];
        let mut groups = view.groups(&marks.bits)?;
        while let Some((_, is_needed, places)) = groups.next()? {
            let home = home(places);
            for place in places {
                let Some(tally) = tallies.get_mut(place.pack as usize) else { continue };
                tally.chunks += 1;
                // If there are only damaged copies, all are kept, for whatever can still be made of them.
                let is_home = home.is_none_or(|home| home == *place);
                tally.used += u32::from(is_needed && is_home);
            }
        }
        let mut may_be_sparse = vec![false; tallies.len()];
        for (_, at) in self.sort_out(view, &state, tallies.into_iter(), &mut found) {
            if let Some(may) = may_be_sparse.get_mut(at) {
                *may = true;
            }
        }
        if !may_be_sparse.contains(&true) {
            return Ok(found);
        }
        let mut used: Sorter<8> = Sorter::new(&self.world.files, self.room, distinct);
        let mut groups = view.groups(&marks.bits)?;
        while let Some((_, is_needed, places)) = groups.next()? {
            if is_needed
                && let Some(place) = home(places)
                && may_be_sparse.get(place.pack as usize) == Some(&true)
            {
                let mut record: Used = [0; 8];
                record[..4].copy_from_slice(&place.pack.to_be_bytes());
                record[4..].copy_from_slice(&place.at.to_be_bytes());
                match used.push(record) {
                    // No room to sort, and none to copy to: what is empty goes first.
                    Err(PoolError::Full { .. }) => return Ok(found),
                    pushed => pushed?,
                }
            }
        }
        self.choose(view, &used.finish(), &mut found)?;
        Ok(found)
    }

    /// Finds the packs without use. Gives those with little, as thousandths of their chunks and position in the view.
    fn sort_out(
        &self,
        view: &View,
        state: &State,
        tallies: impl Iterator<Item = Tally>,
        found: &mut Candidates,
    ) -> Vec<(u64, usize)> {
        found.pool = view.packs.iter().filter(|(_, info)| info.present).map(|(_, info)| info.length).sum();
        let activity = self.activity();
        let mut may_be_sparse = Vec::new();
        for (at, ((id, info), tally)) in view.packs.iter().zip(tallies).enumerate() {
            let is_on_its_way = state.quarantined.contains_key(id) || state.permitted.contains_key(id);
            if is_on_its_way || activity.is_pinned(*id) {
                continue;
            }
            // A missing pack frees nothing, but goes through the same steps: then nothing asks for it any more.
            let length = if info.present { info.length } else { 0 };
            let (used, chunks) = (u64::from(tally.used), u64::from(tally.chunks));
            if used == 0 {
                found.empty.push((*id, length));
            } else if info.present
                && !state.damaged.contains_key(id)
                && used * 100 < chunks * LOOK_BELOW_PERCENT
            {
                may_be_sparse.push((used * 1000 / chunks.max(1), at));
            }
        }
        may_be_sparse
    }

    /// Of packs and their used places, those of which so little is in use that copying it pays.
    fn choose(&self, view: &View, used: &Sorted<8>, found: &mut Candidates) -> Result<(), PoolError> {
        let mut sparse = Vec::new();
        self.each_pack(view, used, &mut |at, id, length, used| {
            let live = self.live_bytes(id, &used)?;
            if live * 100 < REWRITE_BELOW_PERCENT * length {
                sparse.push((live * 1000 / length.max(1), at, live, length));
            }
            Ok(())
        })?;
        // The emptiest first, and no more than what that frees.
        sparse.sort_unstable();
        let (mut freed, mut written) = (found.empty.iter().map(|(_, length)| length).sum::<u64>(), 0);
        let chosen: BTreeSet<u32> = sparse
            .into_iter()
            .take(REWRITES)
            .take_while(|(_, _, live, length)| {
                written += live;
                freed += length.saturating_sub(*live);
                written <= freed
            })
            .map(|(_, at, ..)| at)
            .collect();
        self.each_pack(view, used, &mut |at, id, length, used| {
            if chosen.contains(&at) {
                found.sparse.push(Sparse { id, length, used });
            }
            Ok(())
        })
    }

    /// Goes through used places, pack by pack.
    fn each_pack(
        &self,
        view: &View,
        used: &Sorted<8>,
        each: &mut dyn FnMut(u32, PackId, u64, BTreeSet<u32>) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        let mut reader = used.read();
        let mut open: Option<(u32, BTreeSet<u32>)> = None;
        loop {
            let next = reader.next()?.map(|[a, b, c, d, e, f, g, h]| {
                (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
            });
            if let Some((pack, at)) = next
                && let Some((same, places)) = &mut open
                && *same == pack
            {
                places.insert(at);
                continue;
            }
            if let Some((at, places)) = open.take()
                && let Some((id, info)) = view.packs.get(at as usize)
            {
                each(at, *id, info.length, places)?;
            }
            let Some((pack, at)) = next else { return Ok(()) };
            open = Some((pack, BTreeSet::from([at])));
        }
    }

    /// Of these packs, those of which everything that is used can be read, if need be by parity. Damage of the others is
    /// recorded: they stay, for whatever can still be made of them.
    fn sound_only(&self, packs: Vec<Sparse>) -> Result<Vec<Sparse>, PoolError> {
        let mut sound = Vec::new();
        for pack in packs {
            let Some(info) = self.index().packs().get(&pack.id).copied() else { continue };
            let frames: BTreeSet<u32> =
                pack.used.iter().map(|&at| Location { pack: pack.id, at }.frame()).collect();
            let damaged: Vec<u32> = frames
                .into_iter()
                .filter(|&at| !self.reader.is_there(Location::new(pack.id, at, 0), info.domain))
                .collect();
            if damaged.is_empty() {
                sound.push(pack);
                continue;
            }
            let record = payload::Damage {
                pack: pack.id.0.to_vec(),
                frames: damaged,
                reason: "it could not be read or did not fit its seal when a reclaim wanted to copy it"
                    .to_owned(),
            };
            self.append(Kind::Damage, &record)?;
        }
        Ok(sound)
    }

    /// Stored bytes of chunks of a pack: the share of each in its frame, and in the pack's parity.
    fn live_bytes(&self, id: PackId, used: &BTreeSet<u32>) -> Result<u64, PoolError> {
        let table = match self.read_table(id) {
            Ok(table) => table,
            Err(error @ PoolError::Io { .. }) => return Err(error),
            // A damaged table: leave the pack alone.
            Err(_) => return Ok(u64::MAX / 2000),
        };
        let shares = packs::shares(&table);
        let live: u64 = used.iter().filter_map(|at| shares.get(at)).sum();
        // Both what is written and what is freed have their parity with them.
        Ok((u128::from(live) * u128::from(table.length) / u128::from(table.content.max(1))) as u64)
    }

    /// Copies what is used of packs into new packs, durable and indexed. Each chunk is decoded and compared with its id on
    /// the way. Gives the bytes written.
    fn copy_out(self: &Arc<Self>, packs: &[Sparse]) -> Result<u64, PoolError> {
        let mut writers: BTreeMap<(model::DomainId, u16), PackWriter> = BTreeMap::new();
        let mut written = 0;
        let mut finish = |writer: PackWriter| -> Result<(), PoolError> {
            let finished = self.finish_pack(writer)?;
            written += finished.length;
            self.index_mut().add_loose(&finished);
            Ok(())
        };
        for pack in packs {
            let table = self.read_table(pack.id)?;
            let PackHeader { domain, kind, .. } = table.header;
            let keys = self.domain_keys(domain);
            let (chunk_kind, group) = match kind {
                PackKind::Blocks => (ChunkKind::Block, 4),
                PackKind::Nodes => (ChunkKind::Node, pack::MAX_CHUNKS),
            };
            let ids: Vec<ChunkId> = table
                .table
                .iter()
                .filter(|entry| pack.used.contains(&entry.location))
                .map(|entry| entry.id)
                .collect();
            if ids.len() != pack.used.len() {
                return Err(PoolError::Stopped {
                    reason: format!(
                        "the table of pack {} has {} of {} chunks that the index names",
                        pack.id,
                        ids.len(),
                        pack.used.len()
                    ),
                });
            }
            for part in ids.chunks(group) {
                let mut contents = Vec::with_capacity(part.len());
                for id in part {
                    let mut content = Vec::new();
                    self.read_chunk(&keys, chunk_kind, id, &mut |bytes| content.extend_from_slice(bytes))?;
                    contents.push(content);
                }
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
                let target = (domain, kind as u16);
                let mut writer = match writers.remove(&target) {
                    Some(writer) => writer,
                    None => {
                        let id = self.new_pack()?;
                        PackWriter::begin(self.world.files.clone(), self.id(), &keys, kind, id)?
                    }
                };
                writer.parity = self.settings().parity_percent;
                writer.put(codec, &encoded, decoded as u32, part)?;
                if writer.length() >= packs::PACK_BYTES {
                    finish(writer)?;
                } else {
                    writers.insert(target, writer);
                }
            }
        }
        writers.into_values().try_for_each(finish)?;
        if !packs.is_empty() {
            self.flush_index()?;
        }
        Ok(written)
    }

    /// Packs whose hold is over, and before whose quarantine nothing began that still runs, get a permit after a second
    /// mark; then they are unlinked.
    fn permit(
        self: &Arc<Self>,
        options: ReclaimOptions,
        service: &dyn DeletionService,
        counted: Option<&Counted>,
        report: &mut ReclaimReport,
    ) -> Result<(), PoolError> {
        let hold = options.hold.unwrap_or(0).max(self.settings().reclaim_hold) * Timestamp::SECOND;
        let mut due = Vec::new();
        {
            // Before the mark looks at the points: what ended until now has its commit among them.
            let activity = self.activity();
            let state = self.state();
            let index = self.index();
            let known = |id: &PackId| index.packs().get(id).filter(|info| info.present);
            for (id, quarantined) in &state.quarantined {
                let length = known(id).map_or(0, |info| info.length);
                let waited = state.pool_time.saturating_sub(quarantined.since);
                if waited < hold {
                    report.held_bytes += length;
                    let left = (hold - waited).div_ceil(Timestamp::SECOND);
                    report.held_for = if report.held_for == 0 { left } else { report.held_for.min(left) };
                } else if activity.has_ingest_before(quarantined.number) || index.is_unlisted(*id) {
                    report.held_bytes += length;
                    report.waiting_bytes += length;
                } else {
                    due.push((*id, length));
                }
            }
        }
        if due.is_empty() {
            return Ok(());
        }
        let is_due: HashSet<PackId> = due.iter().map(|(id, _)| *id).collect();
        let (needed, wrong) = self.with_marks(&[], |marks| {
            let wrong = counted.and_then(|counted| counts::contradicts(counted, marks, &is_due).transpose());
            let needed = match self.needed_of(marks, &is_due, true) {
                // No room to sort: in no order, then.
                Err(PoolError::Full { .. }) => self.needed_of(marks, &is_due, false),
                done => done,
            };
            Ok((needed?, wrong.transpose()?))
        })?;
        let released: Vec<PackId> = is_due.intersection(&needed).copied().collect();
        due.retain(|(id, _)| !needed.contains(id));
        if !released.is_empty() {
            report.released_packs = released.len() as u64;
            let packs = released.iter().flat_map(|id| id.0).collect();
            self.append(Kind::Release, &payload::Packs { packs, bytes: 0, rewritten: 0 })?;
        }
        if let Some(found) = wrong {
            // The mark alone decides, but what made it differ is not understood: the next one may let go of the rest.
            report.held_bytes += due.iter().map(|(_, length)| length).sum::<u64>();
            let reason = match &found {
                CountsUse::Wrong(reason) | CountsUse::Anew(reason) => reason.clone(),
                CountsUse::Kept | CountsUse::Unused => String::new(),
            };
            report.counts = found;
            return match self.update_counts(Some(reason)) {
                Ok(_)
                | Err(PoolError::Full { .. } | PoolError::Reserve { .. } | PoolError::Exists { .. }) => {
                    Ok(())
                }
                Err(error) => Err(error),
            };
        }
        for part in due.chunks(PACKS_A_RECORD) {
            let bytes = part.iter().map(|(_, length)| length).sum();
            let packs: Vec<PackId> = part.iter().map(|(id, _)| *id).collect();
            let ids = packs.iter().flat_map(|id| id.0).collect();
            let number = self.append(Kind::Permit, &payload::Packs { packs: ids, bytes, rewritten: 0 })?;
            report.freed_bytes += bytes;
            report.freed_packs += part.len() as u64;
            self.index_mut().set_leftover(&packs, true);
            self.after_permit(number, &packs, service)?;
        }
        Ok(())
    }

    /// Which of the due packs hold a chunk that is needed and of which no copy elsewhere can be read and fits its seal now.
    /// So a copy that rotted unseen never costs the one that is right.
    fn needed_of(
        &self,
        marks: &Marks,
        due: &HashSet<PackId>,
        is_sorted: bool,
    ) -> Result<HashSet<PackId>, PoolError> {
        let view = &marks.view;
        let is_due: Vec<bool> =
            view.packs.iter().map(|(id, info)| info.present && due.contains(id)).collect();
        let at = |place: &ViewPlace| place.pack as usize;
        let location = |place: &ViewPlace| {
            view.packs.get(at(place)).map(|(id, info)| (Location { pack: *id, at: place.at }, info))
        };
        let is_other = |place: &&ViewPlace| {
            location(place).is_some_and(|(location, info)| {
                info.present
                    && !due.contains(&location.pack)
                    && self.state().is_healthy(location.pack, location.frame())
            })
        };
        let has_sound_copy = |id: &ChunkId| -> Result<bool, PoolError> {
            Ok(self.find(id)?.into_iter().any(|place| {
                !due.contains(&place.pack)
                    && self.state().is_healthy(place.pack, place.frame())
                    && self.proof(place, id).is_some()
            }))
        };
        let mut needed = vec![false; view.packs.len()];
        // Other places, in their order, so that each frame is read once: place, due pack, chunk.
        let mut others: Sorter<28> = Sorter::new(&self.world.files, self.room, distinct);
        let mut groups = view.groups(&marks.bits)?;
        while let Some((id, is_needed, places)) = groups.next()? {
            if !is_needed {
                continue;
            }
            for place in places.iter().filter(|place| is_due.get(at(place)) == Some(&true)) {
                let Some(needed) = needed.get_mut(at(place)) else { continue };
                match places.iter().rev().find(is_other) {
                    _ if *needed => {}
                    None => *needed = true,
                    Some(other) => {
                        let mut record = [0; 28];
                        record[..4].copy_from_slice(&other.pack.to_be_bytes());
                        record[4..8].copy_from_slice(&other.at.to_be_bytes());
                        record[8..12].copy_from_slice(&place.pack.to_be_bytes());
                        record[12..].copy_from_slice(&id.0);
                        if is_sorted {
                            others.push(record)?;
                        } else {
                            *needed = !has_sound_copy(&id)?;
                        }
                    }
                }
            }
        }
        let others = others.finish();
        let mut others = others.read();
        let mut last: Option<(PackId, u32)> = None;
        while let Some(record) = others.next()? {
            let number =
                |at: usize| u32::from_be_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
            let Some(needed) = needed.get_mut(number(8) as usize).filter(|needed| !**needed) else {
                continue;
            };
            let Some((place, _)) = location(&ViewPlace { pack: number(0), at: number(4) }) else {
                continue;
            };
            if last == Some((place.pack, place.frame())) {
                continue;
            }
            let mut id = ChunkId([0; 16]);
            id.0.copy_from_slice(&record[12..]);
            match self.proof(place, &id) {
                // All that is in the frame.
                Some(Proof::Frame) => last = Some((place.pack, place.frame())),
                Some(Proof::Chunk) => {}
                None => *needed = !has_sound_copy(&id)?,
            }
        }
        let packs = view.packs.iter().zip(needed);
        Ok(packs.filter(|(_, needed)| *needed).map(|((id, _), _)| *id).collect())
    }

    fn after_permit(
        &self,
        permit: u64,
        gone: &[PackId],
        service: &dyn DeletionService,
    ) -> Result<(), PoolError> {
        let is_gone: HashSet<PackId> = gone.iter().copied().collect();
        // New run first, so that no moment has an index without a chunk that is there; the old ones last.
        self.drop_packs(&|pack| is_gone.contains(&pack))?;
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
        // A writer that could not read the permit may have shared what it names since.
        let leftovers: Vec<PackId> = open.values().flatten().copied().collect();
        for part in leftovers.chunks(TABLES_TOGETHER) {
            let read = |pack: &PackId| self.read_table(*pack).ok();
            let tables: Vec<FinishedPack> = part.iter().filter_map(read).collect();
            let part: HashSet<PackId> = part.iter().copied().collect();
            self.with_marks(&tables, |marks| {
                let mut groups = marks.view.groups(&marks.bits)?;
                while let Some((id, is_needed, places)) = groups.next()? {
                    let places = || {
                        places
                            .iter()
                            .filter_map(|place| Some((place, marks.view.packs.get(place.pack as usize)?)))
                    };
                    let Some((_, (left, _))) = places().find(|(_, (pack, _))| part.contains(pack)) else {
                        continue;
                    };
                    let is_healthy = |(place, (pack, info)): (&ViewPlace, &(PackId, PackInfo))| {
                        let frame = Location { pack: *pack, at: place.at }.frame();
                        info.present && self.state().is_healthy(*pack, frame)
                    };
                    if is_needed && !places().any(is_healthy) {
                        let reason = format!("a point needs chunk {id} of pack {left}, which has a permit");
                        return Err(PoolError::Stopped { reason });
                    }
                }
                Ok(())
            })?;
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
}

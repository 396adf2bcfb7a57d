//! Which pack holds a chunk: runs on disk (section 7) and what is newer than they.
//!
//! Runs stand in tiers: one is written of what is loose, and [`FAN`] of about the same size are merged into one, as a
//! stream and outside of the index's lock. What grows with the pool's chunks stays on disk, but for the fences (8 bytes
//! for 185 chunks) and the filters (12 bits a chunk, each read at the first look into its partition).
//!
//! Everything here can be made again from packs. A damaged run is given up and its packs are read; a damaged filter is
//! made again of its pages.

mod build;
mod run_file;
mod tables;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use environment::Files;
use model::DomainId;

use crate::chunk::{ChunkId, Location, PackId};
use crate::error::{Damage, PoolError};
use crate::format::pack::{self, PackHeader, PackKind};
use crate::format::run::{self, RunEntry, RunPack};
use crate::keys::Keys;
use crate::packs;
use crate::world::names_in;

pub use crate::packs::{FinishedPack, read_table};
use build::Naming;
pub use build::{Build, Built};
use run_file::Ends;
pub(crate) use run_file::{Cursor, Run};
pub use tables::Tables;
pub(crate) use view::{Bits, View, ViewPlace};

/// So many runs of a tier are merged into one of the next.
pub const FAN: usize = 4;
/// A run of fewer entries is written anew as soon as a pack of it goes; a larger one when an eighth of its packs did.
const SMALL: u64 = 1 << 20;

/// Tier of a run: all below 2^18 entries are in the lowest, and each has four times the entries of the one before.
fn tier(entries: u64) -> u32 {
    (entries >> 16).checked_ilog2().unwrap_or(0) / 2
}

/// Runs with a higher number do not steer what the next one is called, if anybody may have made them.
const FAR_NUMBER: u64 = 1 << 48;

/// A pack that the index knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackInfo {
    /// Key domain.
    pub domain: DomainId,
    /// What its chunks are.
    pub kind: PackKind,
    /// Key generation of its table: that of the newest root whose holders alone can have said what it holds.
    pub generation: u16,
    /// Bytes of its file.
    pub length: u64,
    /// Whether the file was there when the pool was opened.
    pub present: bool,
}

impl PackInfo {
    /// The same as a run names it.
    fn named(&self, pack: PackId) -> RunPack {
        let PackInfo { domain, kind, generation, length, .. } = *self;
        RunPack { pack, domain, kind, generation, length }
    }
}

/// The index of a pool.
pub struct Index {
    files: Arc<dyn Files>,
    keys: Keys,
    runs: Vec<Arc<Run>>,
    next_number: Arc<AtomicU64>,
    loose: HashMap<ChunkId, Location>,
    /// Further places of loose chunks that have several.
    loose_copies: HashMap<ChunkId, Vec<Location>>,
    loose_packs: BTreeSet<PackId>,
    packs: HashMap<PackId, PackInfo>,
    superseded: BTreeSet<u64>,
    /// Runs that cannot be read; the next run that is written replaces them.
    damaged_runs: BTreeSet<u64>,
    /// Packs that a permit allows to be missing and that are still there.
    leftovers: BTreeSet<PackId>,
    /// Packs that are there and of which no run and no table tells what they hold.
    unlisted: BTreeSet<PackId>,
    /// Highest record that a readable run knew of.
    witnessed: u64,
    damage: Vec<Damage>,
    /// Why nothing could be opened: the path and the reason.
    closed: Option<(String, String)>,
}

impl Index {
    /// Opens all runs, lists all packs, and reads the tables of packs that no readable run names. `gone` are packs that
    /// a permit allows to be missing; they are left out.
    ///
    /// Damage of runs is no error: what they said is read from the packs. Damage of packs is noted.
    ///
    /// Runs of an older key generation than `generation` are not believed, and replaced by the next one: who was removed when
    /// that one began can make them, and what they say decides what a backup need not send and what is freed.
    pub fn open(
        files: Arc<dyn Files>,
        keys: &Keys,
        generation: u16,
        gone: &dyn Fn(PackId) -> bool,
    ) -> Result<Index, PoolError> {
        let list = |folder: &str| match files.list(folder) {
            Ok(entries) => Ok(entries),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(PoolError::io(files.display(folder), "list", source)),
        };
        let mut index = Index::empty(files.clone(), keys);
        // Runs before packs: a run names only packs that were there before it.
        let mut runs = Vec::new();
        let (mut unreadable, mut older) = (Vec::new(), Vec::new());
        for number in names_in(&*files, "index")?.iter().filter_map(|name| run::number(name)) {
            let run = Ends::read(&*files, keys, number).and_then(|ends| match ends.generation < generation {
                true => Ok(None),
                false => Run::of_ends(ends).map(Some),
            });
            match run {
                Ok(None) => {
                    // Whoever was removed does not use up the numbers either.
                    if number < FAR_NUMBER {
                        index.next_number.fetch_max(number + 1, Ordering::SeqCst);
                    }
                    older.push(number);
                }
                Ok(Some(run)) => {
                    index.next_number.fetch_max(number.saturating_add(1), Ordering::SeqCst);
                    index.witnessed = index.witnessed.max(run.head.ends.witnessed);
                    index.superseded.extend(&run.head.superseded);
                    runs.push(run);
                }
                // A reclaim beside this reader removed it after the listing: its packs are named by a newer run or loose.
                Err(PoolError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => unreadable.push((number, error)),
            }
        }
        for (number, error) in unreadable {
            if index.superseded.contains(&number) {
                continue;
            }
            index.damaged_runs.insert(number);
            index.damage.push(Damage::File {
                path: files.display(&run::name(number)),
                offset: 0,
                reason: error.to_string(),
                derived: true,
            });
        }
        let superseded = &index.superseded;
        index.damaged_runs.extend(older.into_iter().filter(|number| !superseded.contains(number)));
        for run in runs {
            if index.superseded.contains(&run.number()) {
                continue;
            }
            for pack in run.head.packs.iter().filter(|pack| !gone(pack.pack)) {
                index.packs.insert(
                    pack.pack,
                    PackInfo {
                        domain: pack.domain,
                        kind: pack.kind,
                        generation: pack.generation,
                        length: pack.length,
                        present: false,
                    },
                );
            }
            index.runs.push(Arc::new(run));
        }
        for folder in list("packs")?.iter().filter(|entry| entry.is_folder) {
            for entry in list(&format!("packs/{}", folder.name))? {
                let Some(id) = pack::id(&entry.name) else { continue };
                let path = format!("packs/{}/{}", folder.name, entry.name);
                if pack::name(id) != path {
                    index.damage.push(Damage::File {
                        path: files.display(&path),
                        offset: 0,
                        reason: format!("is not where it belongs, {}", pack::name(id)),
                        derived: false,
                    });
                    continue;
                }
                if gone(id) {
                    index.leftovers.insert(id);
                    continue;
                }
                if let Some(known) = index.packs.get_mut(&id) {
                    known.present = true;
                    if known.length != entry.len {
                        index.damage.push(Damage::File {
                            path: files.display(&pack::name(id)),
                            offset: entry.len.min(known.length),
                            reason: format!("has {} bytes, expected {}", entry.len, known.length),
                            derived: false,
                        });
                    }
                    continue;
                }
                match packs::read_table(&*files, keys, id) {
                    Ok(table) => index.add_table(&table),
                    // A reclaim beside this reader removed it after the listing.
                    Err(PoolError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                    // One bad sector must not keep every other pack from being read.
                    Err(error) => {
                        index.unlisted.insert(id);
                        index.damage.push(Damage::File {
                            path: files.display(&pack::name(id)),
                            offset: 0,
                            reason: format!("not in any index, and its table cannot be read: {error}"),
                            derived: false,
                        });
                    }
                }
            }
        }
        for (id, info) in index.packs.iter().filter(|(_, info)| !info.present) {
            index.damage.push(Damage::File {
                path: files.display(&pack::name(*id)),
                offset: 0,
                reason: format!("the pack of {} bytes is missing", info.length),
                derived: false,
            });
        }
        Ok(index)
    }

    fn empty(files: Arc<dyn Files>, keys: &Keys) -> Index {
        Index {
            files,
            keys: keys.clone(),
            runs: Vec::new(),
            next_number: Arc::new(AtomicU64::new(1)),
            loose: HashMap::new(),
            loose_copies: HashMap::new(),
            loose_packs: BTreeSet::new(),
            packs: HashMap::new(),
            superseded: BTreeSet::new(),
            damaged_runs: BTreeSet::new(),
            leftovers: BTreeSet::new(),
            unlisted: BTreeSet::new(),
            witnessed: 0,
            damage: Vec::new(),
            closed: None,
        }
    }

    /// The index of a reader that could not open it: whatever is asked of it fails with `error`.
    pub fn closed(files: Arc<dyn Files>, keys: &Keys, error: PoolError) -> Index {
        let path = files.display("index");
        let reason = error.to_string();
        let mut index = Index::empty(files, keys);
        index.damage.push(Damage::File {
            path: path.clone(),
            offset: 0,
            reason: format!("cannot be opened: {reason}"),
            derived: false,
        });
        index.closed = Some((path, reason));
        index
    }

    fn is_open(&self) -> Result<(), PoolError> {
        let Some((path, reason)) = &self.closed else { return Ok(()) };
        let source = std::io::Error::other(reason.clone());
        Err(PoolError::Io { path: path.clone(), action: "open", source })
    }

    /// Damage noted while opening.
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Every pack.
    pub fn packs(&self) -> &HashMap<PackId, PackInfo> {
        &self.packs
    }

    /// First bytes of the ids of packs that are there.
    pub fn folders_with_packs(&self) -> impl Iterator<Item = u8> {
        self.packs.iter().filter(|(_, info)| info.present).map(|(id, _)| id.0[0])
    }

    /// Highest record that a readable run knew of: a sequence that ends before has lost records.
    pub fn witnessed(&self) -> u64 {
        self.witnessed
    }

    /// Whether there are packs of which it is not known what they hold: no readable run names them, and their tables
    /// could not be read. Chunks that are found nowhere may be in them.
    pub fn has_unlisted(&self) -> bool {
        !self.unlisted.is_empty()
    }

    /// Whether it is not known what this pack holds, though it is there.
    pub fn is_unlisted(&self, pack: PackId) -> bool {
        self.unlisted.contains(&pack)
    }

    /// Packs that a permit allows to be missing and that are still there.
    pub fn leftovers(&self) -> &BTreeSet<PackId> {
        &self.leftovers
    }

    /// The deletion service was asked to remove these packs, or has removed them.
    pub fn set_leftover(&mut self, packs: &[PackId], is_there: bool) {
        for pack in packs {
            if is_there {
                self.leftovers.insert(*pack);
            } else {
                self.leftovers.remove(pack);
            }
        }
    }

    /// Packs that no run names, and whose folder may not be durable yet when another process made them.
    pub fn loose_packs(&self) -> &BTreeSet<PackId> {
        &self.loose_packs
    }

    /// If `error` is of a run that cannot be read, gives that run up; any other error comes back.
    pub fn heal(&mut self, error: PoolError) -> Result<(), PoolError> {
        let path = match &error {
            PoolError::Damaged { path, .. } | PoolError::TooNew { path, .. } | PoolError::Io { path, .. } => {
                path
            }
            _ => return Err(error),
        };
        // One failed read is no damage yet: a run that can be read now stays.
        if matches!(error, PoolError::Io { .. }) && self.reads_again(path) {
            return Ok(());
        }
        if self.discard(path) { Ok(()) } else { Err(error) }
    }

    fn reads_again(&self, path: &str) -> bool {
        self.runs.iter().find(|run| run.path == path).is_some_and(|run| run.examine().is_empty())
    }

    /// Damaged runs that the next run may replace: all, unless there are packs of which only such a run tells what they
    /// hold. Then their files stay, for a start that can read them.
    fn replaceable(&self) -> Vec<u64> {
        if self.unlisted.is_empty() { self.damaged_runs.iter().copied().collect() } else { Vec::new() }
    }

    fn replaced(&mut self, runs: &[u64]) {
        for number in runs {
            self.damaged_runs.remove(number);
            self.superseded.insert(*number);
        }
    }

    /// Gives up the run whose file is `path` because a page of it cannot be read, and reads what it said from its
    /// packs. Whether there was such a run.
    pub fn discard(&mut self, path: &str) -> bool {
        let Some(position) = self.runs.iter().position(|run| run.path == path) else { return false };
        let run = self.runs.remove(position);
        self.damaged_runs.insert(run.number());
        self.damage.push(Damage::File {
            path: path.to_owned(),
            offset: run::HEADER as u64,
            reason: "a page or filter cannot be read or does not match its hash".to_owned(),
            derived: true,
        });
        for pack in &run.head.packs {
            if !self.packs.get(&pack.pack).is_some_and(|info| info.present) {
                continue;
            }
            match packs::read_table(&*self.files, &self.keys, pack.pack) {
                Ok(table) => self.add_table(&table),
                Err(error) => {
                    // Nobody knows what is in it, so nobody may think that nothing is: a reclaim sees only known packs.
                    if !self.runs.iter().any(|run| run.head.packs.iter().any(|other| other.pack == pack.pack))
                    {
                        self.packs.remove(&pack.pack);
                        self.unlisted.insert(pack.pack);
                    }
                    self.damage.push(Damage::File {
                        path: self.files.display(&pack::name(pack.pack)),
                        offset: 0,
                        reason: format!("its index is damaged, and its table cannot be read: {error}"),
                        derived: false,
                    });
                }
            }
        }
        true
    }

    /// Adds the chunks of a pack that was there, and tells if its table had to be rebuilt.
    fn add_table(&mut self, pack: &FinishedPack) {
        if !pack.rebuilt.is_empty() {
            self.damage.push(Damage::File {
                path: self.files.display(&pack::name(pack.header.pack)),
                offset: 0,
                reason: format!(
                    "{} sectors of its header or table were rebuilt from parity",
                    pack.rebuilt.len()
                ),
                derived: false,
            });
        }
        self.add_loose(pack);
    }

    /// Adds the chunks of a pack that became durable.
    pub fn add_loose(&mut self, pack: &FinishedPack) {
        let id = pack.header.pack;
        self.packs.insert(
            id,
            PackInfo {
                domain: pack.header.domain,
                kind: pack.header.kind,
                generation: pack.header.generation,
                length: pack.length,
                present: true,
            },
        );
        self.loose_packs.insert(id);
        self.unlisted.remove(&id);
        for entry in &pack.table {
            let place = Location { pack: id, at: entry.location };
            let first = *self.loose.entry(entry.id).or_insert(place);
            if first != place {
                let copies = self.loose_copies.entry(entry.id).or_default();
                if !copies.contains(&place) {
                    copies.push(place);
                }
            }
        }
    }

    fn loose_places(&self) -> impl Iterator<Item = (ChunkId, Location)> {
        let copies =
            self.loose_copies.iter().flat_map(|(id, places)| places.iter().map(|place| (*id, *place)));
        self.loose.iter().map(|(id, place)| (*id, *place)).chain(copies)
    }

    /// Every place where a chunk is said to be, newest first. A damaged page of a run is an error: the caller cannot
    /// know what it said.
    pub fn find(&self, id: &ChunkId) -> Result<Vec<Location>, PoolError> {
        self.is_open()?;
        let mut found = Vec::new();
        if let Some(first) = self.loose.get(id) {
            found.extend(self.loose_copies.get(id).into_iter().flatten().rev());
            found.push(*first);
        }
        for run in self.runs.iter().rev() {
            // A run names its packs in the order in which they came.
            let before = found.len();
            run.find(id, &mut found)?;
            found[before..].reverse();
        }
        found.retain(|location| self.packs.get(&location.pack).is_some_and(|info| info.present));
        Ok(found)
    }

    /// Every chunk in every place.
    pub fn for_each(&self, mut each: impl FnMut(ChunkId, Location)) -> Result<(), PoolError> {
        self.is_open()?;
        for run in &self.runs {
            run.for_each(&mut each)?;
        }
        self.loose_places().for_each(|(id, place)| each(id, place));
        Ok(())
    }

    /// The index as it is now, to be read from end to end beside whoever changes it. `more` are tables of packs that it
    /// does not name.
    pub(crate) fn view(&self, more: &[FinishedPack]) -> Result<View, PoolError> {
        self.is_open()?;
        let mut view = View::default();
        let mut naming = Naming::default();
        for run in &self.runs {
            view.add(run, naming.add_run(run, |id| self.packs.contains_key(&id)));
        }
        let loose = self.loose_packs.iter().filter_map(|id| {
            let info = self.packs.get(id)?;
            Some(info.named(*id))
        });
        let more_packs = more.iter().map(|table| {
            let PackHeader { pack, domain, kind, generation, .. } = table.header;
            RunPack { pack, domain, kind, generation, length: table.length }
        });
        for pack in loose.chain(more_packs) {
            naming.add(pack);
        }
        let known: Vec<RunPack> = self.packs.iter().map(|(id, info)| info.named(*id)).collect();
        // A pack of which no run and no table says a chunk is a pack all the same.
        for pack in known {
            naming.add(pack);
        }
        let of_more = more.iter().flat_map(|table| {
            let pack = table.header.pack;
            table.table.iter().map(move |entry| (entry.id, Location { pack, at: entry.location }))
        });
        let mut extra: Vec<RunEntry> =
            self.loose_places().chain(of_more).filter_map(|(id, place)| naming.entry(id, place)).collect();
        extra.sort_unstable();
        extra.dedup();
        view.extra = extra;
        view.packs = naming
            .packs
            .iter()
            .map(|pack| {
                let info = self.packs.get(&pack.pack).copied();
                let RunPack { domain, kind, generation, length, .. } = *pack;
                (pack.pack, info.unwrap_or(PackInfo { domain, kind, generation, length, present: false }))
            })
            .collect();
        Ok(view)
    }

    /// Reads every page and filter of every run; damage as [`Damage::File`].
    pub fn examine(&self) -> Vec<Damage> {
        self.runs.iter().flat_map(|run| run.examine()).collect()
    }

    /// A run of `runs` and of what is loose. Packs that the index does not know, and those that `keep` does not keep,
    /// are left out; missing ones stay named, so that it stays known that they are.
    fn build(&self, head: u64, runs: &[Arc<Run>], with_loose: bool, keep: &dyn Fn(PackId) -> bool) -> Build {
        let mut naming = Naming::default();
        let runs = runs
            .iter()
            .map(|run| (run.clone(), naming.add_run(run, |id| self.packs.contains_key(&id) && keep(id))))
            .collect();
        let mut loose: Vec<RunEntry> = Vec::new();
        if with_loose {
            for id in self.loose_packs.iter().filter(|id| keep(**id)) {
                let Some(info) = self.packs.get(id) else { continue };
                naming.add(info.named(*id));
            }
            loose = self.loose_places().filter_map(|(id, place)| naming.entry(id, place)).collect();
            loose.sort_unstable();
        }
        Build {
            files: self.files.clone(),
            keys: self.keys.clone(),
            next_number: self.next_number.clone(),
            head,
            packs: naming.packs,
            runs,
            loose,
            superseded: Vec::new(),
            generation: self.keys.generation(),
        }
    }

    /// Takes a written run into use instead of those that it replaces.
    pub fn install(&mut self, built: Built) {
        let is_replaced = |run: &Arc<Run>| built.superseded.contains(&run.number());
        // What was flushed while it was written is newer.
        let newer = self.runs.iter().rev().take_while(|run| run.number() > built.run.number()).count();
        self.runs.retain(|run| !is_replaced(run));
        let at = self.runs.len().saturating_sub(newer);
        self.replaced(&built.superseded);
        self.runs.insert(at, built.run);
    }

    fn clear_loose(&mut self) {
        self.loose = HashMap::new();
        self.loose_copies = HashMap::new();
        self.loose_packs.clear();
    }

    /// Writes loose packs into a run. Durable when it returns. `head` is the last record, which must be durable.
    pub fn flush(&mut self, head: u64) -> Result<(), PoolError> {
        let superseded = self.replaceable();
        if self.loose_packs.is_empty() && superseded.is_empty() {
            return Ok(());
        }
        let built = Build { superseded, ..self.build(head, &[], true, &|_| true) }.write()?;
        self.install(built);
        self.clear_loose();
        Ok(())
    }

    /// The merge that is due, if any: [`FAN`] runs of one tier into one. It is written without the index, and then
    /// installed.
    pub fn due_merge(&self, head: u64) -> Option<Build> {
        let mut tiers: HashMap<u32, Vec<Arc<Run>>> = HashMap::new();
        for run in &self.runs {
            tiers.entry(tier(run.head.ends.entries)).or_default().push(run.clone());
        }
        let (_, runs) =
            tiers.into_iter().filter(|(_, runs)| runs.len() >= FAN).min_by_key(|(tier, _)| *tier)?;
        let superseded = runs.iter().map(|run| run.number()).collect();
        Some(Build { superseded, ..self.build(head, &runs, false, &|_| true) })
    }

    /// The run without the packs that `keep` does not keep, of those runs that name them; none if there is none. A large
    /// run stays as it is until an eighth of its packs went: what it says of them is not used. What is loose must have
    /// been flushed. Written without the index, and then installed.
    pub fn due_rewrite(&self, head: u64, keep: &dyn Fn(PackId) -> bool) -> Option<Build> {
        let stays = |id: PackId| self.packs.contains_key(&id) && keep(id);
        let is_touched = |run: &&Arc<Run>| {
            let packs = run.head.packs.len();
            let gone = run.head.packs.iter().filter(|pack| !stays(pack.pack)).count();
            gone > 0 && (run.head.ends.entries < SMALL || gone * 8 >= packs)
        };
        let touched: Vec<Arc<Run>> = self.runs.iter().filter(is_touched).cloned().collect();
        if touched.is_empty() {
            return None;
        }
        let superseded = touched.iter().map(|run| run.number()).chain(self.replaceable()).collect();
        Some(Build { superseded, ..self.build(head, &touched, false, keep) })
    }

    /// All runs as one, under key generation `generation`; none if there is none. What is loose must have been flushed. It
    /// also names what the older ones had replaced, since nobody believes those any more.
    pub fn renewed(&self, head: u64, generation: u16) -> Option<Build> {
        let replaced = self.runs.iter().map(|run| run.number()).chain(self.replaceable());
        let superseded = replaced.chain(self.superseded.iter().copied()).collect();
        (!self.runs.is_empty()).then(|| Build {
            superseded,
            generation,
            ..self.build(head, &self.runs, false, &|_| true)
        })
    }

    /// Forgets packs that have a permit.
    pub fn forget(&mut self, gone: &dyn Fn(PackId) -> bool) {
        self.packs.retain(|id, _| !gone(*id));
        self.loose_packs.retain(|id| !gone(*id));
        self.loose_copies.values_mut().for_each(|places| places.retain(|place| !gone(place.pack)));
        let copies = &mut self.loose_copies;
        self.loose.retain(|id, place| {
            if gone(place.pack) {
                match copies.get_mut(id).and_then(Vec::pop) {
                    Some(other) => *place = other,
                    None => return false,
                }
            }
            true
        });
        self.loose_copies.retain(|_, places| !places.is_empty());
    }

    /// Bytes that the index keeps in memory now, hash tables by their capacity.
    pub fn resident(&self) -> usize {
        let loose = self.loose.capacity() * (size_of::<(ChunkId, Location)>() + 1);
        let packs = self.packs.capacity() * (size_of::<(PackId, PackInfo)>() + 1);
        loose + packs + self.runs.iter().map(|run| run.resident()).sum::<usize>()
    }

    /// How many runs stand, and their entries.
    pub fn size(&self) -> (usize, u64) {
        (self.runs.len(), self.runs.iter().map(|run| run.head.ends.entries).sum())
    }

    /// What [`Index::witnessed`] says, of the ends of the runs alone; of those of `generation` and later.
    pub fn witnessed_by_ends(files: &dyn Files, keys: &Keys, generation: u16) -> Result<u64, PoolError> {
        let names = names_in(files, "index")?;
        let numbers = names.iter().filter_map(|name| run::number(name));
        let ends = numbers.filter_map(|number| Ends::read(files, keys, number).ok());
        let ends = ends.filter(|ends| ends.generation >= generation);
        Ok(ends.map(|ends| ends.ends.witnessed).max().unwrap_or(0))
    }

    /// Numbers of runs that others replaced and whose files may still be there, and of damaged runs whose packs
    /// are all named elsewhere.
    pub fn superseded(&self) -> Vec<u64> {
        self.superseded.iter().copied().collect()
    }

    /// The files of these runs are gone.
    pub fn forget_superseded(&mut self, runs: &[u64]) {
        runs.iter().for_each(|number| {
            self.superseded.remove(number);
        });
    }
}

//! Which pack holds a chunk: runs on disk (section 7) and what is newer than they.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use environment::{Files, ReadFile};
use model::DomainId;

use crate::chunk::{ChunkId, Location, PackId};
use crate::error::{Damage, PoolError};
use crate::format::FormatError;
use crate::format::pack::{self, PackKind};
use crate::format::run::{self, PAGE, RunEntry, RunHead, RunPack};
use crate::keys::Keys;
use crate::packs::{self, FinishedPack};
use crate::sequence::{self, Unpublished};

/// More runs than this are merged into one by the next writer.
pub const MAX_RUNS: usize = 12;

/// A pack that the index knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackInfo {
    /// Key domain.
    pub domain: DomainId,
    /// What its chunks are.
    pub kind: PackKind,
    /// Bytes of its file.
    pub length: u64,
    /// Whether the file was there when the pool was opened.
    pub present: bool,
}

struct Run {
    head: RunHead,
    key: [u8; 32],
    file: Box<dyn ReadFile>,
    path: String,
}

impl Run {
    fn open(files: &dyn Files, keys: &Keys, number: u64) -> Result<Run, PoolError> {
        let key = keys.run(number);
        let name = run::name(number);
        let path = files.display(&name);
        let io = |source| PoolError::io(path.clone(), "read", source);
        let format = |error: FormatError| error.in_file(path.clone());
        let file = files.open(&name).map_err(io)?;
        let length = file.len().map_err(io)?;
        let mut fixed = [0u8; 64];
        if length < 96 {
            return Err(format(FormatError::at(length, "the run is cut off")));
        }
        file.read_exact_at(0, &mut fixed).map_err(io)?;
        let head_length = run::head_length(&fixed).map_err(format)?;
        if head_length > length {
            return Err(format(FormatError::at(12, "the run is shorter than its head")));
        }
        let mut bytes = vec![0u8; head_length as usize];
        file.read_exact_at(0, &mut bytes).map_err(io)?;
        let head = run::decode_head(&key, &bytes, length).map_err(format)?;
        if head.pool != keys.pool() || head.number != number {
            return Err(format(FormatError::at(16, format!("is run {} of pool {}", head.number, head.pool))));
        }
        Ok(Run { head, key, file, path })
    }

    fn page(&self, index: u64) -> Result<Vec<RunEntry>, PoolError> {
        let mut bytes = [0u8; PAGE];
        let at = self.head.pages_at + index * PAGE as u64;
        self.file
            .read_exact_at(at, &mut bytes)
            .map_err(|source| PoolError::io(self.path.clone(), "read", source))?;
        run::decode_page(&self.key, &self.head, index, &bytes)
            .map_err(|error| error.in_file(self.path.clone()))
    }

    fn find(&self, id: &ChunkId, found: &mut Vec<Location>) -> Result<(), PoolError> {
        let prefix = run::prefix(id);
        // The id may begin in the page before the first fence that is not below it, and fill several pages.
        let mut page = self.head.fences.partition_point(|&fence| fence < prefix).saturating_sub(1);
        while page < self.head.fences.len() && self.head.fences[page] <= prefix {
            let entries = self.page(page as u64)?;
            let from = entries.partition_point(|entry| entry.id < *id);
            for entry in entries[from..].iter().take_while(|entry| entry.id == *id) {
                if let Some(pack) = self.head.packs.get(entry.pack as usize) {
                    found.push(Location { pack: pack.pack, at: entry.location });
                }
            }
            page += 1;
        }
        Ok(())
    }

    fn for_each(&self, mut each: impl FnMut(ChunkId, Location)) -> Result<(), PoolError> {
        for page in 0..self.head.fences.len() as u64 {
            for entry in self.page(page)? {
                if let Some(pack) = self.head.packs.get(entry.pack as usize) {
                    each(entry.id, Location { pack: pack.pack, at: entry.location });
                }
            }
        }
        Ok(())
    }
}

/// The index of a pool.
pub struct Index {
    files: Arc<dyn Files>,
    keys: Keys,
    runs: Vec<Arc<Run>>,
    next_number: u64,
    loose: HashMap<ChunkId, Vec<Location>>,
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
}

impl Index {
    /// Opens all runs, lists all packs, and reads the tables of packs that no readable run names. `gone` are packs that
    /// a permit allows to be missing; they are left out.
    ///
    /// Damage of runs is no error: what they said is read from the packs. Damage of packs is noted.
    pub fn open(
        files: Arc<dyn Files>,
        keys: &Keys,
        gone: &dyn Fn(PackId) -> bool,
    ) -> Result<Index, PoolError> {
        let list = |folder: &str| match files.list(folder) {
            Ok(entries) => Ok(entries),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(PoolError::io(files.display(folder), "list", source)),
        };
        let mut index = Index {
            files: files.clone(),
            keys: keys.clone(),
            runs: Vec::new(),
            next_number: 1,
            loose: HashMap::new(),
            loose_packs: BTreeSet::new(),
            packs: HashMap::new(),
            superseded: BTreeSet::new(),
            damaged_runs: BTreeSet::new(),
            leftovers: BTreeSet::new(),
            unlisted: BTreeSet::new(),
            witnessed: 0,
            damage: Vec::new(),
        };
        // Runs before packs: a run names only packs that were there before it.
        let mut runs = Vec::new();
        let mut unreadable = Vec::new();
        for entry in list("index")? {
            let Some(number) = run::number(&entry.name) else { continue };
            match Run::open(&*files, keys, number) {
                Ok(run) => {
                    index.next_number = index.next_number.max(number.saturating_add(1));
                    index.witnessed = index.witnessed.max(run.head.witnessed);
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
        for run in runs {
            if index.superseded.contains(&run.head.number) {
                continue;
            }
            for pack in run.head.packs.iter().filter(|pack| !gone(pack.pack)) {
                index.packs.insert(
                    pack.pack,
                    PackInfo { domain: pack.domain, kind: pack.kind, length: pack.length, present: false },
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
                    Ok(table) => index.add_loose(&table),
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

    /// Damage noted while opening.
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Every pack.
    pub fn packs(&self) -> &HashMap<PackId, PackInfo> {
        &self.packs
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
        self.runs
            .iter()
            .find(|run| run.path == path)
            .is_some_and(|run| (0..run.head.fences.len() as u64).all(|page| run.page(page).is_ok()))
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
        self.damaged_runs.insert(run.head.number);
        self.damage.push(Damage::File {
            path: path.to_owned(),
            offset: run.head.pages_at,
            reason: "a page cannot be read or does not match its hash".to_owned(),
            derived: true,
        });
        for pack in &run.head.packs {
            if !self.packs.get(&pack.pack).is_some_and(|info| info.present) {
                continue;
            }
            match packs::read_table(&*self.files, &self.keys, pack.pack) {
                Ok(table) => self.add_loose(&table),
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

    /// Adds the chunks of a pack that became durable.
    pub fn add_loose(&mut self, pack: &FinishedPack) {
        let id = pack.header.pack;
        self.packs.insert(
            id,
            PackInfo {
                domain: pack.header.domain,
                kind: pack.header.kind,
                length: pack.length,
                present: true,
            },
        );
        self.loose_packs.insert(id);
        self.unlisted.remove(&id);
        for entry in &pack.table {
            let place = Location { pack: id, at: entry.location };
            let places = self.loose.entry(entry.id).or_default();
            if !places.contains(&place) {
                places.push(place);
            }
        }
    }

    /// Every place where a chunk is said to be, newest first. A damaged page of a run is an error: the caller cannot
    /// know what it said.
    pub fn find(&self, id: &ChunkId) -> Result<Vec<Location>, PoolError> {
        let mut found = self.loose.get(id).cloned().unwrap_or_default();
        found.reverse();
        for run in self.runs.iter().rev() {
            run.find(id, &mut found)?;
        }
        found.retain(|location| self.packs.get(&location.pack).is_some_and(|info| info.present));
        Ok(found)
    }

    /// Every chunk in every place.
    pub fn for_each(&self, mut each: impl FnMut(ChunkId, Location)) -> Result<(), PoolError> {
        for run in &self.runs {
            run.for_each(&mut each)?;
        }
        for (id, places) in &self.loose {
            places.iter().for_each(|place| each(*id, *place));
        }
        Ok(())
    }

    /// Reads every page of every run; damage as [`Damage::File`].
    pub fn examine(&self) -> Vec<Damage> {
        let mut damage = Vec::new();
        for run in &self.runs {
            for page in 0..run.head.fences.len() as u64 {
                if let Err(error) = run.page(page) {
                    damage.push(Damage::File {
                        path: run.path.clone(),
                        offset: run.head.pages_at + page * PAGE as u64,
                        reason: error.to_string(),
                        derived: true,
                    });
                }
            }
        }
        damage
    }

    /// Writes loose packs into a run; where too many runs stand, all of them into one. Durable when it returns.
    /// `head` is the last record, which must be durable.
    pub fn flush(&mut self, head: u64) -> Result<(), PoolError> {
        let replaced = self.replaceable();
        if self.loose_packs.is_empty() && replaced.is_empty() {
            return Ok(());
        }
        if self.runs.len() >= MAX_RUNS {
            return self.rewrite(head, &|_| true);
        }
        let packs: Vec<PackId> = self.loose_packs.iter().copied().collect();
        let entries = self.loose.iter().flat_map(|(id, places)| places.iter().map(|place| (*id, *place)));
        let entries = entries.collect();
        let run = self.write(head, &packs, entries, &replaced)?;
        self.runs.push(Arc::new(run));
        self.loose.clear();
        self.loose_packs.clear();
        self.replaced(&replaced);
        Ok(())
    }

    /// Writes one run of all packs that `keep` keeps, superseding every other. Packs that are missing stay named, so
    /// that it stays known that they are.
    pub fn rewrite(&mut self, head: u64, keep: &dyn Fn(PackId) -> bool) -> Result<(), PoolError> {
        let (kept, entries) = loop {
            let kept: BTreeSet<PackId> = self.packs.keys().copied().filter(|id| keep(*id)).collect();
            let mut entries = Vec::new();
            let read = self.for_each(|id, place| {
                if kept.contains(&place.pack) {
                    entries.push((id, place));
                }
            });
            // A run that cannot be read is not merged: its packs are read anew.
            match read {
                Ok(()) => break (kept, entries),
                Err(error) => self.heal(error)?,
            }
        };
        let superseded: Vec<u64> =
            self.runs.iter().map(|run| run.head.number).chain(self.replaceable()).collect();
        let listed: Vec<PackId> = kept.iter().copied().collect();
        let run = self.write(head, &listed, entries, &superseded)?;
        self.replaced(&superseded);
        self.runs = vec![Arc::new(run)];
        self.loose.clear();
        self.loose_packs.clear();
        self.packs.retain(|id, _| kept.contains(id));
        Ok(())
    }

    fn write(
        &mut self,
        head: u64,
        packs: &[PackId],
        places: Vec<(ChunkId, Location)>,
        superseded: &[u64],
    ) -> Result<Run, PoolError> {
        let positions: HashMap<PackId, u32> =
            packs.iter().zip(0u32..).map(|(id, position)| (*id, position)).collect();
        let mut entries: Vec<RunEntry> = places
            .into_iter()
            .filter_map(|(id, place)| {
                Some(RunEntry { id, pack: *positions.get(&place.pack)?, location: place.at })
            })
            .collect();
        entries.sort_unstable();
        entries.dedup();
        let listed: Vec<RunPack> = packs
            .iter()
            .filter_map(|id| {
                let info = self.packs.get(id)?;
                Some(RunPack { pack: *id, domain: info.domain, kind: info.kind, length: info.length })
            })
            .collect();
        loop {
            let number = self.next_number;
            let name = run::name(number);
            let path = self.files.display(&name);
            let next = number.checked_add(1).ok_or_else(|| PoolError::Exists { path: path.clone() })?;
            let bytes = run::encode(
                &self.keys.run(number),
                self.keys.pool(),
                number,
                head,
                &listed,
                superseded,
                &entries,
            );
            self.next_number = next;
            match sequence::publish(&*self.files, &name, &bytes) {
                Ok(()) => return Run::open(&*self.files, &self.keys, number),
                // A file that is no readable run stands there.
                Err(Unpublished::Taken) => {}
                Err(failed) => return Err(failed.into_error(path)),
            }
        }
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

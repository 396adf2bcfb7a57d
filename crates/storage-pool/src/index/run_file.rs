//! One run on disk: found in by filter and fence, read by page.

use std::sync::{Arc, OnceLock};

use environment::{Files, ReadFile};
use model::PoolId;

use crate::chunk::{ChunkId, Location};
use crate::error::{Damage, PoolError};
use crate::format::FormatError;
use crate::format::run::{
    self, Filter, PAGE, PAGE_ENTRIES, PARTITION_PAGES, PagesOf, RunEnds, RunEntry, RunHead, TRAILER,
};
use crate::keys::Keys;

/// Pages that a cursor reads at once.
const TOGETHER: u64 = 32;

/// A run. Its fences and packs are in memory from the start; a partition's filter from the first look into it.
pub(crate) struct Run {
    pub head: RunHead,
    key: [u8; 32],
    file: Box<dyn ReadFile>,
    pub path: String,
    /// First 8 bytes of the first id of each partition.
    starts: Vec<u64>,
    filters: Vec<OnceLock<Filter>>,
}

/// Header and trailer of a run, and the file they are of.
pub(super) struct Ends {
    pub ends: RunEnds,
    /// Key generation of the file.
    pub generation: u16,
    key: [u8; 32],
    file: Box<dyn ReadFile>,
    path: String,
}

impl Ends {
    /// Reads 160 bytes of run `number`.
    pub fn read(files: &dyn Files, keys: &Keys, number: u64) -> Result<Ends, PoolError> {
        let key = |generation| keys.run(generation, number);
        Ends::read_as(PagesOf::Places, files, &key, keys.pool(), number, &run::name(number))
    }

    fn read_as(
        of: PagesOf,
        files: &dyn Files,
        key: &dyn Fn(u16) -> Result<[u8; 32], PoolError>,
        pool: PoolId,
        number: u64,
        name: &str,
    ) -> Result<Ends, PoolError> {
        let path = files.display(name);
        let io = |source| PoolError::io(path.clone(), "read", source);
        let format = |error: FormatError| error.in_file(path.clone());
        let file = files.open(name).map_err(io)?;
        let length = file.len().map_err(io)?;
        let Some(at) = length.checked_sub(TRAILER as u64).filter(|&at| at >= run::HEADER as u64) else {
            return Err(format(FormatError::at(length, "the run is cut off")));
        };
        let mut header = [0u8; run::HEADER];
        let mut trailer = [0u8; TRAILER];
        file.read_exact_at(0, &mut header).map_err(io)?;
        file.read_exact_at(at, &mut trailer).map_err(io)?;
        let generation = run::generation(of, &header).map_err(format)?;
        let key = key(generation)?;
        let ends = RunEnds::decode(of, &key, &header, &trailer, length).map_err(format)?;
        if ends.pool != pool || ends.number != number {
            return Err(format(FormatError::at(16, format!("is run {} of pool {}", ends.number, ends.pool))));
        }
        Ok(Ends { ends, generation, key, file, path })
    }
}

impl Run {
    pub fn open(files: &dyn Files, keys: &Keys, number: u64) -> Result<Run, PoolError> {
        Run::of_ends(Ends::read(files, keys, number)?)
    }

    /// A file of counts.
    pub fn open_counts(files: &dyn Files, keys: &Keys, number: u64) -> Result<Run, PoolError> {
        let name = run::counts_name(number);
        let key = |generation| keys.counts(generation, number);
        Run::of_ends(Ends::read_as(PagesOf::Counts, files, &key, keys.pool(), number, &name)?)
    }

    pub(super) fn of_ends(Ends { ends, key, file, path, .. }: Ends) -> Result<Run, PoolError> {
        let (at, length) = ends.tail();
        let mut bytes = vec![0u8; length as usize];
        file.read_exact_at(at, &mut bytes).map_err(|source| PoolError::io(path.clone(), "read", source))?;
        let head = RunHead::decode(&key, ends, &bytes).map_err(|error| error.in_file(path.clone()))?;
        let starts: Vec<u64> = head.fences.iter().step_by(PARTITION_PAGES as usize).copied().collect();
        let filters = starts.iter().map(|_| OnceLock::new()).collect();
        Ok(Run { head, key, file, path, starts, filters })
    }

    pub fn number(&self) -> u64 {
        self.head.ends.number
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), PoolError> {
        self.file.read_exact_at(at, bytes).map_err(|source| PoolError::io(self.path.clone(), "read", source))
    }

    fn in_file(&self, error: FormatError) -> PoolError {
        error.in_file(self.path.clone())
    }

    fn read_filter(&self, partition: u64) -> Result<Filter, PoolError> {
        let (at, length) = self.head.filter_at(partition);
        let mut bytes = vec![0u8; length as usize];
        self.read(at, &mut bytes)?;
        self.head.decode_filter(&self.key, partition, &bytes).map_err(|error| self.in_file(error))
    }

    /// The filter of a partition. A damaged one is made again of its pages, so that it never hides a chunk; the next
    /// verify tells of it.
    fn filter(&self, partition: usize) -> Result<Option<&Filter>, PoolError> {
        let Some(held) = self.filters.get(partition) else { return Ok(None) };
        if let Some(filter) = held.get() {
            return Ok(Some(filter));
        }
        let filter = match self.read_filter(partition as u64) {
            Ok(filter) => filter,
            Err(_) => {
                let begin = partition as u64 * PARTITION_PAGES;
                let mut keys = Vec::new();
                for page in begin..(begin + PARTITION_PAGES).min(self.head.pages()) {
                    self.page(page, |page| {
                        keys.extend(
                            (0..page.len())
                                .filter_map(|at| page.entry(at))
                                .map(|entry| run::filter_key(&entry.id)),
                        );
                        Ok(())
                    })?;
                }
                Filter::of(&keys)
            }
        };
        Ok(Some(held.get_or_init(|| filter)))
    }

    fn page<T>(
        &self,
        page: u64,
        look: impl FnOnce(run::Page<'_>) -> Result<T, FormatError>,
    ) -> Result<T, PoolError> {
        let mut bytes = [0u8; PAGE];
        self.read(self.head.page_at(page), &mut bytes)?;
        self.head.decode_page(&self.key, page, &bytes).and_then(look).map_err(|error| self.in_file(error))
    }

    fn location(&self, entry: &RunEntry) -> Option<Location> {
        let pack = self.head.packs.get(entry.pack as usize)?;
        Some(Location { pack: pack.pack, at: entry.location })
    }

    /// Adds every place of `id`, in the order in which the run names their packs.
    pub fn find(&self, id: &ChunkId, found: &mut Vec<Location>) -> Result<(), PoolError> {
        let (prefix, key) = (run::prefix(id), run::filter_key(id));
        // The id may begin in the partition before the first one that does not start below it, and fill several.
        let mut partition = self.starts.partition_point(|&start| start < prefix).saturating_sub(1);
        while self.starts.get(partition).is_some_and(|&start| start <= prefix) {
            if self.filter(partition)?.is_none_or(|filter| filter.may_hold(key)) {
                self.find_in(partition, prefix, id, found)?;
            }
            partition += 1;
        }
        Ok(())
    }

    fn find_in(
        &self,
        partition: usize,
        prefix: u64,
        id: &ChunkId,
        found: &mut Vec<Location>,
    ) -> Result<(), PoolError> {
        let begin = partition * PARTITION_PAGES as usize;
        let fences = self.head.fences.get(begin..).unwrap_or_default();
        let fences = &fences[..fences.len().min(PARTITION_PAGES as usize)];
        let mut at = fences.partition_point(|&fence| fence < prefix).saturating_sub(1);
        while fences.get(at).is_some_and(|&fence| fence <= prefix) {
            self.page((begin + at) as u64, |page| {
                let first = page.position(id);
                let same = (first..page.len()).map_while(|at| page.entry(at).filter(|entry| entry.id == *id));
                found.extend(same.filter_map(|entry| self.location(&entry)));
                Ok(())
            })?;
            at += 1;
        }
        Ok(())
    }

    pub fn for_each(self: &Arc<Self>, mut each: impl FnMut(ChunkId, Location)) -> Result<(), PoolError> {
        let mut cursor = Cursor::new(self.clone());
        while let Some(entry) = cursor.next()? {
            if let Some(place) = self.location(&entry) {
                each(entry.id, place);
            }
        }
        Ok(())
    }

    /// Whether every page and filter can be read and fits.
    pub fn examine(&self) -> Vec<Damage> {
        let damage = |offset: u64, error: PoolError| Damage::File {
            path: self.path.clone(),
            offset,
            reason: error.to_string(),
            derived: true,
        };
        let pages = (0..self.head.pages())
            .filter_map(|page| Some(damage(self.head.page_at(page), self.page(page, |_| Ok(())).err()?)));
        let partitions = if self.head.has_filters() { self.head.partitions() } else { 0 };
        let filters = (0..partitions)
            .filter_map(|at| Some(damage(self.head.filter_at(at).0, self.read_filter(at).err()?)));
        pages.chain(filters).collect()
    }

    /// Bytes that it keeps in memory now.
    pub fn resident(&self) -> usize {
        let filters: usize = self.filters.iter().filter_map(|held| held.get()).map(Filter::bytes).sum();
        let head = &self.head;
        head.packs.capacity() * size_of::<run::RunPack>()
            + (head.fences.capacity() + head.superseded.capacity() + self.starts.capacity()) * 8
            + self.filters.capacity() * size_of::<OnceLock<Filter>>()
            + filters
    }
}

/// Reads a run from its first entry to its last, a few pages at a time, or jumps from one id to a higher one.
pub(crate) struct Cursor {
    run: Arc<Run>,
    next_page: u64,
    bytes: Vec<u8>,
    /// Pages of `bytes` not yet decoded.
    from: usize,
    entries: Vec<RunEntry>,
    at: usize,
    /// Pages to be read at once next: few after a jump, more while one follows another.
    together: u64,
}

impl Cursor {
    pub fn new(run: Arc<Run>) -> Cursor {
        let (bytes, entries) = (Vec::new(), Vec::new());
        Cursor { run, next_page: 0, bytes, from: 0, entries, at: 0, together: TOGETHER }
    }

    pub fn next(&mut self) -> Result<Option<RunEntry>, PoolError> {
        loop {
            if let Some(entry) = self.entries.get(self.at) {
                self.at += 1;
                return Ok(Some(*entry));
            }
            if !self.turn()? {
                return Ok(None);
            }
        }
    }

    /// Where among the entries of the run the one stands that [`Cursor::next`] gave last.
    pub fn position(&self) -> u64 {
        self.next_page.saturating_sub(1) * PAGE_ENTRIES as u64 + self.at.saturating_sub(1) as u64
    }

    /// Goes on to the first entry that is not below `id`, which is not below any id before.
    pub fn seek(&mut self, id: &ChunkId) -> Result<(), PoolError> {
        loop {
            if self.entries.last().is_some_and(|last| last.id >= *id) {
                let rest = self.entries.get(self.at..).unwrap_or_default();
                self.at += rest.partition_point(|entry| entry.id < *id);
                return Ok(());
            }
            let prefix = run::prefix(id);
            let page = self.run.head.fences.partition_point(|&fence| fence < prefix).saturating_sub(1) as u64;
            if page > self.next_page {
                let (pages, _) = self.bytes.as_chunks::<PAGE>();
                let held = pages.len().saturating_sub(self.from) as u64;
                let skipped = page - self.next_page;
                if skipped < held {
                    self.from += skipped as usize;
                } else {
                    (self.from, self.together) = (pages.len(), 1);
                }
                self.next_page = page;
            }
            if !self.turn()? {
                return Ok(());
            }
        }
    }

    /// Decodes the next page. False behind the last one.
    fn turn(&mut self) -> Result<bool, PoolError> {
        self.entries.clear();
        self.at = 0;
        loop {
            let (pages, _) = self.bytes.as_chunks::<PAGE>();
            if let Some(page) = pages.get(self.from) {
                let decoded = self.run.head.decode_page(&self.run.key, self.next_page, page);
                let decoded = decoded.map_err(|error| self.run.in_file(error))?;
                self.entries.extend((0..decoded.len()).filter_map(|at| decoded.entry(at)));
                self.from += 1;
                self.next_page += 1;
                return Ok(true);
            }
            let pages = self.run.head.pages_together(self.next_page, self.together);
            if pages == 0 {
                return Ok(false);
            }
            self.together = (self.together * 2).min(TOGETHER);
            self.bytes.resize(pages as usize * PAGE, 0);
            self.run.read(self.run.head.page_at(self.next_page), &mut self.bytes)?;
            self.from = 0;
        }
    }
}

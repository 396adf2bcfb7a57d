//! The files of reference counts (section 7.1): opened together, read as sums, made needless by newer ones.

use std::sync::Arc;

use environment::Files;

use crate::chunk::{ChunkId, PackId};
use crate::error::{Damage, PoolError};
use crate::format::counts::{CountsTail, GONE, PackRow};
use crate::format::run::{RunEntry, counts_name, counts_number};
use crate::index::{Cursor, Run};
use crate::keys::Keys;
use crate::mark::Roots;
use crate::sorter::{Reader, Sorted};
use crate::world::names_in;

/// An id and how much its count changes.
pub(super) const CHANGE: usize = 24;
/// Added to a change, so that its bytes sort as it does.
const BIAS: u64 = 1 << 63;
/// Changes on disk have 48 bits.
const HALF: i64 = 1 << 47;

/// Why counts cannot be had.
pub(crate) enum Failure {
    /// They are damaged or wrong: to be thrown away.
    Counts(String),
    /// Something else.
    Pool(PoolError),
}

impl From<PoolError> for Failure {
    fn from(error: PoolError) -> Failure {
        Failure::Pool(error)
    }
}

pub(super) fn change(id: &ChunkId, by: i64) -> [u8; CHANGE] {
    let mut record = [0; CHANGE];
    record[..16].copy_from_slice(&id.0);
    record[16..].copy_from_slice(&(by as u64 ^ BIAS).to_be_bytes());
    record
}

pub(super) fn of_change(record: &[u8; CHANGE]) -> (ChunkId, i64) {
    let (mut id, mut by) = ([0; 16], [0; 8]);
    id.copy_from_slice(&record[..16]);
    by.copy_from_slice(&record[16..]);
    (ChunkId(id), (u64::from_be_bytes(by) ^ BIAS) as i64)
}

/// Changes of one chunk are added up.
pub(super) fn summed(record: &mut [u8; CHANGE], other: &[u8; CHANGE]) -> bool {
    let ((id, by), (other, more)) = (of_change(record), of_change(other));
    let is_same = id == other;
    if is_same {
        *record = change(&id, by.saturating_add(more));
    }
    is_same
}

/// The entry of a change on disk; none if it does not fit.
pub(super) fn entry(id: ChunkId, by: i64) -> Option<RunEntry> {
    let bits = (-HALF..HALF).contains(&by).then_some(by as u64)?;
    Some(RunEntry { id, pack: bits as u32 & 0xFF_FFFF, location: (bits >> 24) as u32 & 0xFF_FFFF })
}

fn of_entry(entry: &RunEntry) -> i64 {
    let bits = u64::from(entry.location) << 24 | u64::from(entry.pack);
    // The highest of 48 bits is the sign.
    ((bits << 16) as i64) >> 16
}

/// Packs by id, ascending.
pub(super) type Packs = Vec<(PackId, PackRow)>;

/// What is known of a pack.
pub(super) fn row(packs: &Packs, id: PackId) -> Option<(usize, PackRow)> {
    let at = packs.binary_search_by_key(&id, |(pack, _)| *pack).ok()?;
    packs.get(at).map(|(_, row)| (at, *row))
}

/// The counts as they are on disk.
#[derive(Default)]
pub(crate) struct Store {
    /// Oldest first.
    pub(super) files: Vec<Arc<Run>>,
    /// What they are the counts of.
    pub(crate) roots: Roots,
    pub(super) packs: Packs,
    pub(super) damage: [u8; 32],
    pub(super) next_order: u64,
}

fn tail(run: &Run) -> Result<CountsTail, PoolError> {
    CountsTail::decode(&run.head.more).map_err(|error| error.in_file(run.path.clone()))
}

/// What files say of packs, the last one of each.
pub(super) fn packs_of(files: &[Arc<Run>]) -> Result<Packs, PoolError> {
    let mut packs = Packs::new();
    for file in files {
        packs.extend(tail(file)?.packs);
    }
    // Stable, so what was said last of a pack stands last.
    packs.sort_by_key(|(pack, _)| *pack);
    packs.reverse();
    packs.dedup_by_key(|(pack, _)| *pack);
    packs.reverse();
    packs.retain(|(_, row)| row.flags & GONE == 0);
    Ok(packs)
}

/// Numbers of the files that are there, ascending.
pub(super) fn numbers(files: &dyn Files) -> Result<Vec<u64>, PoolError> {
    let mut numbers: Vec<u64> =
        names_in(files, "index")?.iter().filter_map(|name| counts_number(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

impl Store {
    /// The counts that the file of the highest number ends of which everything can be opened. Those of an older file are as
    /// right, of older points.
    pub fn open(files: &dyn Files, keys: &Keys) -> Result<Option<Store>, Failure> {
        let mut wrong = None;
        for number in numbers(files)?.into_iter().rev() {
            match Store::ended_by(files, keys, number) {
                Ok(store) => return Ok(Some(store)),
                Err(error) => {
                    wrong.get_or_insert(error.to_string());
                }
            }
        }
        wrong.map_or(Ok(None), |reason| Err(Failure::Counts(reason)))
    }

    fn ended_by(files: &dyn Files, keys: &Keys, number: u64) -> Result<Store, PoolError> {
        let top = Run::open_counts(files, keys, number)?;
        let CountsTail { damage, next_order, roots, .. } = tail(&top)?;
        let mut runs = Vec::new();
        for below in &top.head.superseded {
            runs.push(Arc::new(Run::open_counts(files, keys, *below)?));
        }
        runs.push(Arc::new(top));
        let packs = packs_of(&runs)?;
        let roots = roots.into_iter().map(|(level, id, times)| ((level, id), times)).collect();
        Ok(Store { files: runs, roots, packs, damage, next_order })
    }

    /// Whether nothing was counted yet.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Reads the counts in order of ids; with what `fresh` changes, if it is given.
    pub fn sums<'s>(&self, fresh: Option<&'s Sorted<CHANGE>>) -> Sums<'s> {
        Sums::of_files(&self.files, fresh)
    }

    /// Whether files are there that are not of these counts and older.
    pub fn has_needless(&self, files: &dyn Files) -> Result<bool, PoolError> {
        let used: Vec<u64> = self.files.iter().map(|file| file.number()).collect();
        let newest = used.last().copied().unwrap_or(0);
        Ok(numbers(files)?.iter().any(|number| *number < newest && !used.contains(number)))
    }
}

/// The highest number of a file that can be opened; 0 if there is none. What cannot be opened is passed over, whatever it is
/// called.
pub(super) fn newest(files: &dyn Files, keys: &Keys) -> Result<u64, PoolError> {
    let found = numbers(files)?.into_iter().rev().find(|at| Run::open_counts(files, keys, *at).is_ok());
    Ok(found.unwrap_or(0))
}

/// Names of files that newer counts, which can be opened, have made needless.
pub(crate) fn superseded(files: &dyn Files, keys: &Keys) -> Result<Vec<String>, PoolError> {
    let Ok(Some(store)) = Store::open(files, keys) else { return Ok(Vec::new()) };
    let used: Vec<u64> = store.files.iter().map(|file| file.number()).collect();
    let newest = used.last().copied().unwrap_or(0);
    let needless = numbers(files)?.into_iter().filter(|number| *number < newest && !used.contains(number));
    Ok(needless.map(counts_name).collect())
}

/// Reads every page of every file, also of those that are needless.
pub(crate) fn examine(files: &dyn Files, keys: &Keys) -> Result<Vec<Damage>, PoolError> {
    let mut damage = Vec::new();
    for number in numbers(files)? {
        let path = files.display(&counts_name(number));
        match Run::open_counts(files, keys, number).and_then(|run| tail(&run).map(|_| run)) {
            Ok(run) => damage.extend(run.examine()),
            // The deletion service removed it after the listing.
            Err(PoolError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                damage.push(Damage::File { path, offset: 0, reason: error.to_string(), derived: true });
            }
        }
    }
    Ok(damage)
}

enum Source<'s> {
    File(Cursor),
    Fresh(Reader<'s, CHANGE>),
}

impl Source<'_> {
    fn next(&mut self) -> Result<Option<(ChunkId, i64)>, Failure> {
        match self {
            Source::File(cursor) => match cursor.next() {
                Ok(entry) => Ok(entry.map(|entry| (entry.id, of_entry(&entry)))),
                Err(error) => Err(Failure::Counts(error.to_string())),
            },
            Source::Fresh(reader) => Ok(reader.next()?.map(|record| of_change(&record))),
        }
    }

    /// The first change that is not of an id below `id`.
    fn seek(&mut self, id: &ChunkId) -> Result<Option<(ChunkId, i64)>, Failure> {
        if let Source::File(cursor) = self {
            cursor.seek(id).map_err(|error| Failure::Counts(error.to_string()))?;
            return self.next();
        }
        loop {
            match self.next()? {
                Some((next, _)) if next < *id => {}
                found => return Ok(found),
            }
        }
    }
}

/// Counts in order of ids: each chunk's, or those of ids that ascend.
pub(crate) struct Sums<'s> {
    sources: Vec<Source<'s>>,
    /// The next change of each source; none before the first look.
    heads: Vec<Option<Option<(ChunkId, i64)>>>,
}

impl<'s> Sums<'s> {
    pub(super) fn of_files(files: &[Arc<Run>], fresh: Option<&'s Sorted<CHANGE>>) -> Sums<'s> {
        let files = files.iter().map(|file| Source::File(Cursor::new(file.clone())));
        let sources: Vec<Source<'s>> = files.chain(fresh.map(|fresh| Source::Fresh(fresh.read()))).collect();
        Sums { heads: sources.iter().map(|_| None).collect(), sources }
    }

    /// The count of `id`, which is not below any id before.
    pub fn of(&mut self, id: &ChunkId) -> Result<i64, Failure> {
        let mut count = 0i64;
        for (source, head) in self.sources.iter_mut().zip(&mut self.heads) {
            let is_below = match head {
                None => true,
                Some(found) => found.is_some_and(|(found, _)| found < *id),
            };
            if is_below {
                *head = Some(source.seek(id)?);
            }
            if let Some(Some((found, by))) = *head
                && found == *id
            {
                count = count.saturating_add(by);
            }
        }
        if count < 0 {
            return Err(Failure::Counts(format!("chunk {id} has a count of {count}")));
        }
        Ok(count)
    }

    /// The next chunk and the sum of its changes.
    pub fn next(&mut self) -> Result<Option<(ChunkId, i64)>, Failure> {
        for (source, head) in self.sources.iter_mut().zip(&mut self.heads) {
            if head.is_none() {
                *head = Some(source.next()?);
            }
        }
        let Some(id) = self.heads.iter().filter_map(|head| Some(head.flatten()?.0)).min() else {
            return Ok(None);
        };
        let mut sum = 0i64;
        for (source, head) in self.sources.iter_mut().zip(&mut self.heads) {
            if let Some(Some((found, by))) = *head
                && found == id
            {
                sum = sum.saturating_add(by);
                *head = Some(source.next()?);
            }
        }
        Ok(Some((id, sum)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_keep_their_sign_on_disk_and_in_order() {
        let id = ChunkId([7; 16]);
        for by in [0, 1, -1, 128, -128, HALF - 1, -HALF, 1 << 24, -(1 << 24), 77_777_777_777] {
            let entry = entry(id, by).map(|entry| of_entry(&entry));
            assert_eq!(entry, Some(by));
            assert_eq!(of_change(&change(&id, by)), (id, by));
        }
        assert_eq!(entry(id, HALF), None);
        assert_eq!(entry(id, -HALF - 1), None);
        assert!(change(&id, -1) < change(&id, 0) && change(&id, 0) < change(&id, 1));
    }
}

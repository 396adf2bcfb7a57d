//! Making a run of others: a merge that reads and writes as a stream.
//!
//! In memory are a few pages of each source, the filter keys of one partition and the list of packs; never the entries.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use environment::Files;

use super::run_file::{Cursor, Run};
use crate::chunk::{ChunkId, Location, PackId};
use crate::error::PoolError;
use crate::format::run::{self, PagesOf, RunEntry, RunPack, RunWriter};
use crate::keys::Keys;
use crate::sequence::{self, Unpublished};

/// Bytes that are collected before they are written.
const WRITE_BYTES: usize = 1 << 20;
/// Position of a pack that the new run does not name.
pub(super) const DROPPED: u32 = u32::MAX;

/// A run to be written, and what of. Needs nothing of the index while it is written.
pub struct Build {
    pub(super) files: Arc<dyn Files>,
    pub(super) keys: Keys,
    pub(super) next_number: Arc<AtomicU64>,
    /// Number of the last record, which is durable.
    pub(super) head: u64,
    pub(super) packs: Vec<RunPack>,
    /// Runs, and which position in `packs` each of their packs has.
    pub(super) runs: Vec<(Arc<Run>, Vec<u32>)>,
    /// What is in no run, in order.
    pub(super) loose: Vec<RunEntry>,
    pub(super) superseded: Vec<u64>,
    /// Key generation of the new run.
    pub(super) generation: u16,
}

/// A run that was written and is durable.
pub struct Built {
    pub(super) run: Arc<Run>,
    pub(super) superseded: Vec<u64>,
}

impl Built {
    /// Its entries.
    pub fn entries(&self) -> u64 {
        self.run.head.ends.entries
    }
}

/// The packs of a new run while it is put together.
#[derive(Default)]
pub(super) struct Naming {
    pub packs: Vec<RunPack>,
    positions: HashMap<PackId, u32>,
}

impl Naming {
    pub fn add(&mut self, pack: RunPack) -> u32 {
        *self.positions.entry(pack.pack).or_insert_with(|| {
            self.packs.push(pack);
            self.packs.len() as u32 - 1
        })
    }

    /// Adds those packs of a run that `keep` keeps; the positions of all of them.
    pub fn add_run(&mut self, run: &Run, keep: impl Fn(PackId) -> bool) -> Vec<u32> {
        let packs = run.head.packs.iter();
        packs.map(|pack| if keep(pack.pack) { self.add(*pack) } else { DROPPED }).collect()
    }

    /// The entry of a chunk in a named pack.
    pub fn entry(&self, id: ChunkId, place: Location) -> Option<RunEntry> {
        Some(RunEntry { id, pack: *self.positions.get(&place.pack)?, location: place.at })
    }
}

enum Source<'b> {
    Run(Cursor, &'b [u32]),
    Loose(std::slice::Iter<'b, RunEntry>),
}

impl Source<'_> {
    fn next(&mut self) -> Result<Option<RunEntry>, PoolError> {
        match self {
            Source::Loose(entries) => Ok(entries.next().copied()),
            Source::Run(cursor, positions) => loop {
                let Some(entry) = cursor.next()? else { return Ok(None) };
                match positions.get(entry.pack as usize) {
                    None | Some(&DROPPED) => {}
                    Some(&pack) => return Ok(Some(RunEntry { pack, ..entry })),
                }
            },
        }
    }
}

impl Build {
    /// Writes the run; durable when it returns. Takes long: not under the lock of the index.
    pub fn write(self) -> Result<Built, PoolError> {
        if self.packs.len() > run::MAX_PACKS {
            return Err(PoolError::Misuse(format!("{} packs in one run", self.packs.len())));
        }
        loop {
            let number = self.next_number.load(Ordering::SeqCst);
            let name = run::name(number);
            let path = self.files.display(&name);
            let next = number.checked_add(1).ok_or_else(|| PoolError::Exists { path: path.clone() })?;
            if self.next_number.compare_exchange(number, next, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                continue;
            }
            match self.write_as(number, &name) {
                Ok(()) => {
                    let run = Arc::new(Run::open(&*self.files, &self.keys, number)?);
                    return Ok(Built { run, superseded: self.superseded });
                }
                // A file that is no readable run stands there.
                Err(Unpublished::Taken) => {}
                Err(failed) => return Err(failed.into_error(path)),
            }
        }
    }

    fn write_as(&self, number: u64, name: &str) -> Result<(), Unpublished> {
        let failed = |source| Unpublished::Failed(PoolError::io(self.files.display(name), "write", source));
        let mut file = self.files.create(name).map_err(failed)?;
        let generation = self.generation;
        let key = self.keys.run(generation, number).map_err(Unpublished::Failed)?;
        let mut writer = RunWriter::new(PagesOf::Places, key, generation, self.keys.pool(), number);
        let mut sources: Vec<Source<'_>> = self
            .runs
            .iter()
            .map(|(run, positions)| Source::Run(Cursor::new(run.clone()), positions))
            .chain((!self.loose.is_empty()).then(|| Source::Loose(self.loose.iter())))
            .collect();
        let mut heads = BinaryHeap::with_capacity(sources.len());
        for (at, source) in sources.iter_mut().enumerate() {
            if let Some(entry) = source.next().map_err(Unpublished::Failed)? {
                heads.push(Reverse((entry, at)));
            }
        }
        let mut last = None;
        while let Some(mut top) = heads.peek_mut() {
            let Reverse((entry, at)) = *top;
            let next = match sources.get_mut(at) {
                Some(source) => source.next().map_err(Unpublished::Failed)?,
                None => None,
            };
            match next {
                Some(next) => *top = Reverse((next, at)),
                None => drop(std::collections::binary_heap::PeekMut::pop(top)),
            }
            if last.replace(entry) == Some(entry) {
                continue;
            }
            if !writer.push(&entry) {
                return Err(Unpublished::Failed(PoolError::Misuse(format!(
                    "chunk {} at {:#x} of pack {} does not fit a run",
                    entry.id, entry.location, entry.pack
                ))));
            }
            if writer.ready() >= WRITE_BYTES {
                writer.take(|bytes| file.append(bytes)).map_err(failed)?;
            }
        }
        writer.finish(&self.packs, &self.superseded, self.head, &[]);
        writer.take(|bytes| file.append(bytes)).map_err(failed)?;
        sequence::publish_file(&*self.files, name, file)
    }
}

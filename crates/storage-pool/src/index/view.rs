//! The index at one moment, read from end to end: by ids that ascend, and as groups of places.
//!
//! Runs never change and are held open, so whoever flushes, merges or drops packs meanwhile does not disturb a view.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::PackInfo;
use super::run_file::{Cursor, Run};
use crate::chunk::{ChunkId, PackId};
use crate::error::PoolError;
use crate::format::run::RunEntry;

/// A place of a chunk in a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ViewPlace {
    /// Position of its pack in the view.
    pub pack: u32,
    /// Where in the pack.
    pub at: u32,
}

/// Runs, what is in none of them, and all packs.
#[derive(Default)]
pub(crate) struct View {
    /// Oldest first; for each pack of a run its position here.
    runs: Vec<(Arc<Run>, Vec<u32>)>,
    /// What is in no run, in order.
    pub(super) extra: Vec<RunEntry>,
    /// Packs, in the order in which they came as far as that is known.
    pub packs: Vec<(PackId, PackInfo)>,
}

/// A bit for each entry of a view.
pub(crate) struct Bits(Vec<Vec<u64>>);

impl Bits {
    /// All clear.
    pub fn of(view: &View) -> Bits {
        let words = |entries: u64| vec![0; entries.div_ceil(64) as usize];
        let runs = view.runs.iter().map(|(run, _)| words(run.head.ends.entries));
        Bits(runs.chain(std::iter::once(words(view.extra.len() as u64))).collect())
    }

    /// Clear for every view.
    pub fn none() -> Bits {
        Bits(Vec::new())
    }

    fn set(&mut self, source: usize, entry: u64) {
        if let Some(word) = self.0.get_mut(source).and_then(|words| words.get_mut((entry / 64) as usize)) {
            *word |= 1 << (entry % 64);
        }
    }

    fn get(&self, source: usize, entry: u64) -> bool {
        let word = self.0.get(source).and_then(|words| words.get((entry / 64) as usize));
        word.is_some_and(|word| word & 1 << (entry % 64) != 0)
    }
}

enum Source<'v> {
    Run(Cursor, &'v [u32]),
    Extra(&'v [RunEntry], usize),
}

impl Source<'_> {
    /// The next entry that is in a pack of the view, and which entry of its source it is.
    fn next(&mut self) -> Result<Option<(ChunkId, ViewPlace, u64)>, PoolError> {
        match self {
            Source::Extra(entries, at) => {
                let found = entries
                    .get(*at)
                    .map(|entry| (entry.id, ViewPlace { pack: entry.pack, at: entry.location }, *at as u64));
                *at += 1;
                Ok(found)
            }
            Source::Run(cursor, positions) => loop {
                let Some(entry) = cursor.next()? else { return Ok(None) };
                match positions.get(entry.pack as usize) {
                    None | Some(&super::build::DROPPED) => {}
                    Some(&pack) => {
                        let place = ViewPlace { pack, at: entry.location };
                        return Ok(Some((entry.id, place, cursor.position())));
                    }
                }
            },
        }
    }

    fn seek(&mut self, id: &ChunkId) -> Result<(), PoolError> {
        match self {
            Source::Extra(entries, at) => {
                *at += entries.get(*at..).unwrap_or_default().partition_point(|entry| entry.id < *id);
                Ok(())
            }
            Source::Run(cursor, _) => cursor.seek(id),
        }
    }
}

impl View {
    pub(super) fn add(&mut self, run: &Arc<Run>, positions: Vec<u32>) {
        self.runs.push((run.clone(), positions));
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let runs = self.runs.iter().map(|(run, positions)| Source::Run(Cursor::new(run.clone()), positions));
        runs.chain(std::iter::once(Source::Extra(&self.extra, 0))).collect()
    }

    /// Looks ids up that ascend.
    pub fn join(&self) -> Join<'_> {
        let sources = self.sources();
        Join { heads: sources.iter().map(|_| Head::Unread).collect(), sources }
    }

    /// Every chunk with all of its places.
    pub fn groups<'v>(&'v self, bits: &'v Bits) -> Result<Groups<'v>, PoolError> {
        let mut groups =
            Groups { sources: self.sources(), heads: BinaryHeap::new(), bits, places: Vec::new() };
        for source in 0..groups.sources.len() {
            groups.push(source)?;
        }
        Ok(groups)
    }
}

enum Head {
    Unread,
    At(ChunkId, ViewPlace, u64),
    End,
}

/// Finds ids that ascend.
pub(crate) struct Join<'v> {
    sources: Vec<Source<'v>>,
    heads: Vec<Head>,
}

impl Join<'_> {
    /// Adds every place of `id` to `places`, newest last, and sets its bits.
    pub fn find(
        &mut self,
        id: &ChunkId,
        places: &mut Vec<ViewPlace>,
        mut bits: Option<&mut Bits>,
    ) -> Result<(), PoolError> {
        for (at, (source, head)) in self.sources.iter_mut().zip(&mut self.heads).enumerate() {
            let is_below = match head {
                Head::Unread => true,
                Head::At(found, ..) => *found < *id,
                Head::End => false,
            };
            if is_below {
                source.seek(id)?;
                *head = source.next()?.map_or(Head::End, |(id, place, entry)| Head::At(id, place, entry));
            }
            while let Head::At(found, place, entry) = head
                && *found == *id
            {
                places.push(*place);
                if let Some(bits) = bits.as_deref_mut() {
                    bits.set(at, *entry);
                }
                *head = source.next()?.map_or(Head::End, |(id, place, entry)| Head::At(id, place, entry));
            }
        }
        Ok(())
    }
}

/// A chunk, whether its bit is set, and its places.
pub(crate) type Group<'g> = (ChunkId, bool, &'g [ViewPlace]);

/// Gives chunks in order of their ids.
pub(crate) struct Groups<'v> {
    sources: Vec<Source<'v>>,
    heads: BinaryHeap<Reverse<(ChunkId, usize, ViewPlace, u64)>>,
    bits: &'v Bits,
    places: Vec<ViewPlace>,
}

impl Groups<'_> {
    fn push(&mut self, source: usize) -> Result<(), PoolError> {
        if let Some((id, place, entry)) =
            self.sources.get_mut(source).map(Source::next).transpose()?.flatten()
        {
            self.heads.push(Reverse((id, source, place, entry)));
        }
        Ok(())
    }

    /// The next chunk, whether its bit is set, and its places, newest last.
    pub fn next(&mut self) -> Result<Option<Group<'_>>, PoolError> {
        let Some(Reverse((id, ..))) = self.heads.peek().copied() else { return Ok(None) };
        self.places.clear();
        let mut is_set = false;
        while let Some(Reverse((same, source, place, entry))) = self.heads.peek().copied()
            && same == id
        {
            self.heads.pop();
            self.places.push(place);
            is_set |= self.bits.get(source, entry);
            self.push(source)?;
        }
        Ok(Some((id, is_set, &self.places)))
    }
}

//! Sorting more than memory should hold: sorted segments in files without a name, merged while they are read.
//!
//! A file without a name is gone with the process that wrote it, so nothing here needs tidying away. Records that say the
//! same are made one at every step, so what is on disk follows what is different and not what was pushed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use environment::{Files, NewFile};

use crate::error::PoolError;

/// So many segments of one size are merged into one.
const FAN: usize = 8;
/// Bytes that are written and read at once.
const TOGETHER: usize = 256 << 10;
/// The name that a spilled segment would have. It never gets one.
const NAME: &str = "index/spill";

/// How many records a sorter holds in memory before it spills some.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room(pub usize);

impl Default for Room {
    /// 24 MB of what a mark sorts.
    fn default() -> Room {
        Room(1 << 20)
    }
}

/// Takes the second record into the first, if the two say the same of one thing.
pub(crate) type Combine<const N: usize> = fn(&mut [u8; N], &[u8; N]) -> bool;

/// Records stay as they are; equal ones become one.
pub(crate) fn distinct<const N: usize>(record: &mut [u8; N], other: &[u8; N]) -> bool {
    record == other
}

struct Segment {
    file: Box<dyn NewFile>,
    bytes: u64,
    /// How often its records were merged.
    tier: u32,
}

/// Takes records in any order.
pub(crate) struct Sorter<const N: usize> {
    files: Arc<dyn Files>,
    /// Records that are held before some are spilled.
    room: usize,
    combine: Combine<N>,
    held: Vec<[u8; N]>,
    segments: Vec<Segment>,
}

impl<const N: usize> Sorter<N> {
    pub fn new(files: &Arc<dyn Files>, room: Room, combine: Combine<N>) -> Sorter<N> {
        Sorter { files: files.clone(), room: room.0.max(2), combine, held: Vec::new(), segments: Vec::new() }
    }

    pub fn push(&mut self, record: [u8; N]) -> Result<(), PoolError> {
        if self.held.len() >= self.room {
            self.settle();
            // What is half empty now takes some more before it is worth a segment.
            if self.held.len() > self.room / 2 {
                self.spill()?;
            }
        }
        self.held.push(record);
        Ok(())
    }

    fn settle(&mut self) {
        self.held.sort_unstable();
        let combine = self.combine;
        self.held.dedup_by(|next, first| combine(first, next));
    }

    fn spill(&mut self) -> Result<(), PoolError> {
        let held = std::mem::take(&mut self.held);
        let whole = Sorted { held, segments: Vec::new(), combine: self.combine };
        self.segments.push(self.write(&whole, 0)?);
        self.held = whole.held;
        self.held.clear();
        loop {
            let Some(last) = self.segments.last().map(|segment| segment.tier) else { return Ok(()) };
            let alike = self.segments.iter().rev().take_while(|segment| segment.tier == last).count();
            if alike < FAN {
                return Ok(());
            }
            let segments = self.segments.split_off(self.segments.len() - alike);
            let merged = Sorted { held: Vec::new(), segments, combine: self.combine };
            self.segments.push(self.write(&merged, last + 1)?);
        }
    }

    fn write(&self, records: &Sorted<N>, tier: u32) -> Result<Segment, PoolError> {
        let failed = |source| PoolError::io(self.files.display(NAME), "write", source);
        let mut file = self.files.create(NAME).map_err(failed)?;
        let mut bytes = 0;
        let mut ready = Vec::with_capacity(TOGETHER + N);
        let mut reader = records.read();
        while let Some(record) = reader.next()? {
            ready.extend_from_slice(&record);
            if ready.len() >= TOGETHER {
                file.append(&ready).map_err(failed)?;
                bytes += ready.len() as u64;
                ready.clear();
            }
        }
        file.append(&ready).map_err(failed)?;
        Ok(Segment { file, bytes: bytes + ready.len() as u64, tier })
    }

    /// Everything that was pushed.
    pub fn finish(mut self) -> Sorted<N> {
        self.settle();
        Sorted { held: self.held, segments: self.segments, combine: self.combine }
    }
}

/// Records in order, to be read as often as needed.
pub(crate) struct Sorted<const N: usize> {
    held: Vec<[u8; N]>,
    segments: Vec<Segment>,
    combine: Combine<N>,
}

impl<const N: usize> Sorted<N> {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty() && self.segments.is_empty()
    }

    /// Reads from the first record on.
    pub fn read(&self) -> Reader<'_, N> {
        let files =
            self.segments.iter().map(|segment| Source::File { segment, next: 0, bytes: Vec::new(), at: 0 });
        let sources: Vec<Source<'_, N>> =
            files.chain(std::iter::once(Source::Memory(self.held.iter()))).collect();
        Reader { sources, heads: BinaryHeap::new(), is_begun: false, combine: self.combine }
    }
}

enum Source<'s, const N: usize> {
    Memory(std::slice::Iter<'s, [u8; N]>),
    File { segment: &'s Segment, next: u64, bytes: Vec<u8>, at: usize },
}

impl<const N: usize> Source<'_, N> {
    fn next(&mut self) -> Result<Option<[u8; N]>, PoolError> {
        match self {
            Source::Memory(records) => Ok(records.next().copied()),
            Source::File { segment, next, bytes, at } => {
                if *at >= bytes.len() {
                    let length = (segment.bytes - *next).min((TOGETHER / N * N) as u64);
                    if length == 0 {
                        return Ok(None);
                    }
                    bytes.resize(length as usize, 0);
                    segment
                        .file
                        .read_exact_at(*next, bytes)
                        .map_err(|source| PoolError::io(NAME.to_owned(), "read", source))?;
                    (*next, *at) = (*next + length, 0);
                }
                let record = bytes.get(*at..).and_then(|rest| rest.first_chunk::<N>()).copied();
                *at += N;
                Ok(record)
            }
        }
    }
}

/// Reads sorted records.
pub(crate) struct Reader<'s, const N: usize> {
    sources: Vec<Source<'s, N>>,
    heads: BinaryHeap<Reverse<([u8; N], usize)>>,
    is_begun: bool,
    combine: Combine<N>,
}

impl<const N: usize> Reader<'_, N> {
    fn pop(&mut self) -> Result<Option<[u8; N]>, PoolError> {
        let Some(Reverse((record, source))) = self.heads.pop() else { return Ok(None) };
        if let Some(next) = self.sources.get_mut(source).map(Source::next).transpose()?.flatten() {
            self.heads.push(Reverse((next, source)));
        }
        Ok(Some(record))
    }

    /// The next record.
    pub fn next(&mut self) -> Result<Option<[u8; N]>, PoolError> {
        if !self.is_begun {
            self.is_begun = true;
            for (at, source) in self.sources.iter_mut().enumerate() {
                if let Some(record) = source.next()? {
                    self.heads.push(Reverse((record, at)));
                }
            }
        }
        let Some(mut record) = self.pop()? else { return Ok(None) };
        while let Some(Reverse((next, _))) = self.heads.peek() {
            if !(self.combine)(&mut record, next) {
                break;
            }
            self.pop()?;
        }
        Ok(Some(record))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use environment::SeededRandomness;
    use environment::simulated::SimulatedFiles;

    fn files() -> (SimulatedFiles, Arc<dyn Files>) {
        let files = SimulatedFiles::new(1);
        files.make_folder("index").unwrap();
        (files.clone(), Arc::new(files))
    }

    fn sum(record: &mut [u8; 2], other: &[u8; 2]) -> bool {
        if record[0] == other[0] {
            record[1] = record[1].wrapping_add(other[1]);
        }
        record[0] == other[0]
    }

    #[test]
    fn what_is_spilled_comes_back_in_order_and_once() {
        let (_, files) = files();
        for (room, count) in [(1000, 500), (2, 3), (16, 5000), (100, 20_000)] {
            let random = SeededRandomness::new(room as u64);
            let mut sorter = Sorter::<2>::new(&files, Room(room), distinct);
            let mut truth = std::collections::BTreeSet::new();
            for _ in 0..count {
                let record = [random.below(256) as u8, random.below(9) as u8];
                sorter.push(record).unwrap();
                truth.insert(record);
            }
            let sorted = sorter.finish();
            for _ in 0..2 {
                let mut reader = sorted.read();
                let mut found = Vec::new();
                while let Some(record) = reader.next().unwrap() {
                    found.push(record);
                }
                assert!(found.iter().eq(truth.iter()), "{room} {count}");
            }
        }
    }

    #[test]
    fn equal_keys_are_summed_over_all_segments() {
        let (_, files) = files();
        let mut sorter = Sorter::<2>::new(&files, Room(4), sum);
        for n in 0..200u8 {
            sorter.push([n % 7, 1]).unwrap();
        }
        let sorted = sorter.finish();
        let mut reader = sorted.read();
        let mut total = 0;
        while let Some([_, count]) = reader.next().unwrap() {
            total += u32::from(count);
        }
        assert_eq!(total, 200);
    }

    #[test]
    fn a_full_disk_is_told_and_leaves_nothing() {
        let (disk, files) = files();
        let mut sorter = Sorter::<2>::new(&files, Room(4), distinct);
        disk.set_capacity(Some(0));
        let full = (0..100u8).find_map(|n| sorter.push([n, 0]).err());
        assert!(matches!(full, Some(PoolError::Full { .. })), "{full:?}");
        assert_eq!(disk.snapshot().files().count(), 0);
    }
}

//! Extents of a metadata context, made of answers that may lie, and what is gathered from them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::{ByteRange, RangeSet};

use crate::NbdError;
use crate::reply::Extent;
use crate::wire;

/// Bytes that one block status asks for. The request has no payload, so it may be larger than the largest block
/// ("Block size constraints"); not larger, so that a slow server answers before it counts as silent.
pub(crate) const STATUS_BYTES: u64 = 1 << 30;
/// Most answers that one walk takes. Ours: a server that advances by a sector each time must not keep us for ever.
pub(crate) const MAX_ANSWERS: u32 = 1 << 22;
/// Most dirty ranges that are kept apart: 64 MiB of memory. Beyond, close ones are merged (see [`Dirty`]).
const MAX_RANGES: usize = 1 << 22;

/// A piece of the disk with one set of status flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) range: ByteRange,
    pub(crate) flags: u32,
}

/// Extents as runs from `start`, neighbours with equal bits of `mask` merged. The answer must pass `from` and must
/// not pass `size`.
pub(crate) fn runs(
    extents: &[Extent],
    start: u64,
    from: u64,
    size: u64,
    mask: u32,
) -> Result<Vec<Run>, NbdError> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = start;
    for extent in extents {
        let end = at.checked_add(u64::from(extent.length)).filter(|end| *end <= size).ok_or_else(|| {
            NbdError::protocol(
                "a block status",
                format!("descriptors that end within the disk of {size} bytes"),
                format!("{} bytes at {at}", extent.length),
            )
        })?;
        let flags = extent.flags & mask;
        match runs.last_mut() {
            Some(last) if last.flags == flags => last.range.end = end,
            _ => runs.push(Run { range: ByteRange { start: at, end }, flags }),
        }
        at = end;
    }
    if at <= from {
        return Err(NbdError::protocol(
            "a block status",
            format!("descriptors that pass byte {from}"),
            format!("an end at {at}"),
        ));
    }
    Ok(runs)
}

/// The last answer about allocation, so that a walk costs one request for many steps.
#[derive(Default)]
pub(crate) struct LastAnswer {
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    runs: Arc<Vec<Run>>,
    /// Counts writes, at their beginning and their end.
    writes: u64,
}

impl LastAnswer {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, if it tells of byte `at`; and the count to give to [`LastAnswer::keep`].
    pub(crate) fn about(&self, at: u64) -> (Option<Arc<Vec<Run>>>, u64) {
        let held = self.held();
        let first = held.runs.first().map_or(u64::MAX, |run| run.range.start);
        let end = held.runs.last().map_or(0, |run| run.range.end);
        ((first <= at && at < end).then(|| Arc::clone(&held.runs)), held.writes)
    }

    /// Keeps an answer, unless something was written since it was asked for: it may tell of the time before.
    pub(crate) fn keep(&self, runs: Arc<Vec<Run>>, asked_at: u64) {
        let mut held = self.held();
        if held.writes == asked_at {
            held.runs = runs;
        }
    }

    /// To be called before and after every write.
    pub(crate) fn written(&self) {
        let mut held = self.held();
        held.writes = held.writes.wrapping_add(1);
        held.runs = Arc::default();
    }
}

/// Dirty ranges with bounded memory. When they are too many, all are rounded out to a unit that doubles until they
/// are not: more than is dirty, never less.
pub(crate) struct Dirty {
    ranges: Vec<ByteRange>,
    most: usize,
    unit: u64,
    size: u64,
}

impl Dirty {
    pub(crate) fn new(size: u64) -> Dirty {
        Dirty { ranges: Vec::new(), most: MAX_RANGES, unit: model::BLOCK_BYTES, size }
    }

    /// Ranges come in ascending order.
    pub(crate) fn add(&mut self, run: &Run) {
        if run.flags & wire::STATE_DIRTY == 0 {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if last.end >= run.range.start => last.end = last.end.max(run.range.end),
            _ => self.ranges.push(run.range),
        }
        while self.ranges.len() > self.most && self.unit < self.size {
            let set = RangeSet::from_ranges(std::mem::take(&mut self.ranges));
            self.ranges = set.rounded_out(self.unit, self.size).as_slice().to_vec();
            if self.ranges.len() > self.most / 2 {
                self.unit = self.unit.saturating_mul(2);
            }
        }
    }

    pub(crate) fn finish(self) -> RangeSet {
        RangeSet::from_ranges(self.ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(lengths: &[(u32, u32)]) -> Vec<Extent> {
        lengths.iter().map(|&(length, flags)| Extent { length, flags }).collect()
    }

    #[test]
    fn runs_merge_and_bits_outside_the_mask_do_not_count() {
        let found = runs(&extents(&[(10, 1), (10, 3), (5, 0)]), 100, 100, 125, 1).expect("runs");
        let expected = [
            Run { range: ByteRange { start: 100, end: 120 }, flags: 1 },
            Run { range: ByteRange { start: 120, end: 125 }, flags: 0 },
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn an_answer_that_passes_the_disk_or_does_not_advance_is_refused() {
        assert!(runs(&extents(&[(26, 0)]), 100, 100, 125, 1).is_err());
        assert!(runs(&[], 100, 100, 125, 1).is_err());
        assert!(runs(&extents(&[(10, 0)]), 100, 110, 125, 1).is_err());
        assert!(runs(&extents(&[(u32::MAX, 0)]), u64::MAX - 5, 0, u64::MAX, 1).is_err());
    }

    #[test]
    fn too_many_dirty_ranges_become_coarser_and_lose_nothing() {
        let size = 1 << 30;
        let mut dirty = Dirty { most: 16, ..Dirty::new(size) };
        let mut exact = Vec::new();
        for index in 0..10_000u64 {
            let range = ByteRange { start: index * 100_000, end: index * 100_000 + 512 };
            dirty.add(&Run { range, flags: 1 });
            exact.push(range);
            assert!(dirty.ranges.len() <= 17);
        }
        let found = dirty.finish();
        assert!(RangeSet::from_ranges(exact).difference(&found).is_empty());
        assert!(found.iter().all(|range| range.end <= size));
    }

    #[test]
    fn an_answer_from_before_a_write_is_not_kept() {
        let last = LastAnswer::default();
        let run = Run { range: ByteRange { start: 0, end: 10 }, flags: 0 };
        let (_, asked_at) = last.about(0);
        last.written();
        last.keep(Arc::new(vec![run]), asked_at);
        assert!(last.about(0).0.is_none());
        let (_, asked_at) = last.about(0);
        last.keep(Arc::new(vec![run]), asked_at);
        assert!(last.about(9).0.is_some());
        assert!(last.about(10).0.is_none());
        last.written();
        assert!(last.about(9).0.is_none());
    }
}

//! Which blocks that a change tracker calls unchanged a run reads all the same (INV-22).
//!
//! A tracker is a hint. Every run audits max([`AUDIT_MIN_BYTES`], [`AUDIT_PERCENT`] % of the listed bytes) of blocks
//! that the list leaves out: first the neighbours of listed ranges, where a tracker with a rounding or an
//! off-by-one fault errs, then the rest, rotating over allocated data so that everything is read in time.

use crate::{BLOCK_BYTES, ByteRange, RangeSet};

/// The least that a run audits.
pub const AUDIT_MIN_BYTES: u64 = 8 << 20;
/// The share of the listed bytes that a run audits, if that is more.
pub const AUDIT_PERCENT: u64 = 10;

/// What a run audits and where the next one goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditChoice {
    /// Whole blocks to read, none of them listed.
    pub ranges: RangeSet,
    /// Offset at which the rotation of the next run starts.
    pub next: u64,
}

/// Chooses the audited blocks of a run.
///
/// `listed` is the list of changed extents; `allocated` gives, for an offset, the next range of the disk that may
/// hold data (as `BlockDevice::next_allocated`), or `None` past the last; `rotation` is [`AuditChoice::next`] of the
/// run before. A quarter of the budget at the most goes to neighbours, so that the rotation always moves.
pub fn choose<E>(
    disk_size: u64,
    listed: &RangeSet,
    rotation: u64,
    mut allocated: impl FnMut(u64) -> Result<Option<ByteRange>, E>,
) -> Result<AuditChoice, E> {
    let listed = listed.rounded_out(BLOCK_BYTES, disk_size);
    let budget = (listed.bytes() / 100 * AUDIT_PERCENT).max(AUDIT_MIN_BYTES).div_ceil(BLOCK_BYTES);

    let mut chosen = Vec::new();
    let neighbour_budget = budget / 4;
    // Where there are more neighbours than budget, they are drawn evenly over the list, shifted by the rotation.
    let neighbours: Vec<u64> = listed
        .iter()
        .flat_map(|range| {
            [range.start.checked_sub(BLOCK_BYTES), (range.end < disk_size).then_some(range.end)]
        })
        .flatten()
        .filter(|&start| !listed.contains(start))
        .collect();
    let step = (neighbours.len() as u64).div_ceil(neighbour_budget.max(1)).max(1);
    let shift = (rotation / BLOCK_BYTES) % step;
    for &start in neighbours.iter().skip(shift as usize).step_by(step as usize) {
        chosen.push(ByteRange { start, end: (start + BLOCK_BYTES).min(disk_size) });
    }
    let taken = RangeSet::from_ranges(chosen.clone());
    let mut left = budget.saturating_sub(taken.bytes().div_ceil(BLOCK_BYTES));

    let begin = if rotation >= disk_size { 0 } else { rotation / BLOCK_BYTES * BLOCK_BYTES };
    let mut at = begin;
    let mut wrapped = false;
    while left > 0 {
        let end_of_turn = if wrapped { begin } else { disk_size };
        let next =
            if at < end_of_turn { allocated(at)?.filter(|range| range.start < end_of_turn) } else { None };
        let Some(found) = next else {
            if wrapped {
                break;
            }
            wrapped = true;
            at = 0;
            continue;
        };
        let mut start = found.start.max(at) / BLOCK_BYTES * BLOCK_BYTES;
        start = start.max(at / BLOCK_BYTES * BLOCK_BYTES);
        while start < found.end.min(end_of_turn) && left > 0 {
            if !listed.contains(start) && !taken.contains(start) {
                chosen.push(ByteRange { start, end: (start + BLOCK_BYTES).min(disk_size) });
                left -= 1;
            }
            start += BLOCK_BYTES;
        }
        at = start;
    }
    Ok(AuditChoice { ranges: RangeSet::from_ranges(chosen), next: if at >= disk_size { 0 } else { at } })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn whole(size: u64) -> impl FnMut(u64) -> Result<Option<ByteRange>, ()> {
        move |from| Ok((from < size).then_some(ByteRange { start: from, end: size }))
    }

    #[test]
    fn reads_the_budget_and_never_what_is_listed() {
        let size = 256 * MIB;
        let listed: RangeSet =
            [ByteRange { start: 3 * MIB, end: 5 * MIB }, ByteRange { start: 100, end: 200 }]
                .into_iter()
                .collect();
        let choice = choose(size, &listed, 0, whole(size)).unwrap_or_else(|()| unreachable!());
        assert_eq!(choice.ranges.bytes(), AUDIT_MIN_BYTES);
        assert!(choice.ranges.intersection(&listed.rounded_out(BLOCK_BYTES, size)).is_empty());
        assert!(
            choice.ranges.contains(5 * MIB)
                && choice.ranges.contains(3 * MIB - 1)
                && choice.ranges.contains(BLOCK_BYTES)
        );
    }

    #[test]
    fn a_long_list_raises_the_budget_to_a_tenth() {
        let size = 4096 * MIB;
        let listed: RangeSet = [ByteRange { start: 0, end: 1000 * MIB }].into_iter().collect();
        let choice = choose(size, &listed, 0, whole(size)).unwrap_or_else(|()| unreachable!());
        assert_eq!(choice.ranges.bytes(), 100 * MIB);
    }

    #[test]
    fn the_rotation_reads_everything_in_turn() {
        let size = 64 * MIB + 512;
        let listed: RangeSet = [ByteRange { start: MIB, end: 2 * MIB }].into_iter().collect();
        let (mut seen, mut rotation) = (RangeSet::new(), 0);
        for _ in 0..13 {
            let choice = choose(size, &listed, rotation, whole(size)).unwrap_or_else(|()| unreachable!());
            seen = seen.union(&choice.ranges);
            rotation = choice.next;
        }
        assert_eq!(seen.bytes(), size - MIB);
    }

    #[test]
    fn a_small_disk_is_read_whole_and_an_empty_one_not_at_all() {
        let listed = RangeSet::new();
        let choice = choose(MIB, &listed, 5 * MIB, whole(MIB)).unwrap_or_else(|()| unreachable!());
        assert_eq!(choice.ranges.bytes(), MIB);
        let choice = choose(MIB, &listed, 0, |_| Ok::<_, ()>(None)).unwrap_or_else(|()| unreachable!());
        assert!(choice.ranges.is_empty());
    }
}

//! Byte ranges and ordered sets of them.

use serde::{Deserialize, Serialize};

/// Bytes from `start` up to, not including, `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// First byte after the range; never less than `start`.
    pub end: u64,
}

impl ByteRange {
    /// `length` bytes from `start`; `None` if the end would pass the largest offset.
    pub fn at(start: u64, length: u64) -> Option<ByteRange> {
        Some(ByteRange { start, end: start.checked_add(length)? })
    }

    /// Bytes in the range.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// What both have; `None` if that is nothing.
    pub fn intersect(&self, other: &ByteRange) -> Option<ByteRange> {
        let both = ByteRange { start: self.start.max(other.start), end: self.end.min(other.end) };
        (!both.is_empty()).then_some(both)
    }

    /// The smallest range of whole units of `unit` bytes that holds it, cut at `limit`.
    pub fn rounded_out(&self, unit: u64, limit: u64) -> ByteRange {
        ByteRange {
            start: self.start / unit * unit,
            end: self.end.checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(limit),
        }
    }
}

/// A set of bytes as ascending ranges that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RangeSet {
    ranges: Vec<ByteRange>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> RangeSet {
        RangeSet::default()
    }

    /// The union of `ranges`, which may come in any order, overlap or be empty.
    pub fn from_ranges(mut ranges: Vec<ByteRange>) -> RangeSet {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable();
        let mut merged: Vec<ByteRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        RangeSet { ranges: merged }
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> std::slice::Iter<'_, ByteRange> {
        self.ranges.iter()
    }

    /// The ranges, ascending.
    pub fn as_slice(&self) -> &[ByteRange] {
        &self.ranges
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(ByteRange::len).sum()
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether `offset` is in the set.
    pub fn contains(&self, offset: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= offset);
        after > 0 && self.ranges[after - 1].end > offset
    }

    /// Bytes in either.
    pub fn union(&self, other: &RangeSet) -> RangeSet {
        RangeSet::from_ranges(self.ranges.iter().chain(&other.ranges).copied().collect())
    }

    /// Bytes in both.
    pub fn intersection(&self, other: &RangeSet) -> RangeSet {
        let (mut a, mut b) = (0, 0);
        let mut both = Vec::new();
        while let (Some(x), Some(y)) = (self.ranges.get(a), other.ranges.get(b)) {
            both.extend(x.intersect(y));
            if x.end <= y.end {
                a += 1;
            } else {
                b += 1;
            }
        }
        RangeSet { ranges: both }
    }

    /// Bytes of `self` that are not in `other`.
    pub fn difference(&self, other: &RangeSet) -> RangeSet {
        let mut left = Vec::new();
        let mut next = 0;
        for range in &self.ranges {
            let mut at = range.start;
            while next < other.ranges.len() && other.ranges[next].end <= at {
                next += 1;
            }
            let mut turn = next;
            while at < range.end {
                match other.ranges.get(turn) {
                    Some(hole) if hole.start < range.end => {
                        if hole.start > at {
                            left.push(ByteRange { start: at, end: hole.start });
                        }
                        at = at.max(hole.end);
                        turn += 1;
                    }
                    _ => {
                        left.push(ByteRange { start: at, end: range.end });
                        at = range.end;
                    }
                }
            }
        }
        RangeSet { ranges: left }
    }

    /// The set in whole units of `unit` bytes, cut at `limit`.
    pub fn rounded_out(&self, unit: u64, limit: u64) -> RangeSet {
        RangeSet::from_ranges(self.ranges.iter().map(|range| range.rounded_out(unit, limit)).collect())
    }
}

impl FromIterator<ByteRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(ranges: I) -> RangeSet {
        RangeSet::from_ranges(ranges.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        ranges.iter().map(|&(start, end)| ByteRange { start, end }).collect()
    }

    /// The slow truth: one bool a byte.
    fn bits(set: &RangeSet) -> Vec<bool> {
        (0..64).map(|at| set.iter().any(|range| range.start <= at && at < range.end)).collect()
    }

    #[test]
    fn set_operations_agree_with_one_bool_a_byte() {
        let mut seed = 1u64;
        let mut draw = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..2_000 {
            let mut make = || -> RangeSet {
                (0..draw(6))
                    .map(|_| {
                        let start = draw(60);
                        ByteRange { start, end: start + draw(9) }
                    })
                    .map(|range| ByteRange { start: range.start, end: range.end.min(64) })
                    .collect()
            };
            let (a, b) = (make(), make());
            let zip = |f: fn(bool, bool) -> bool| {
                bits(&a).iter().zip(bits(&b)).map(|(&x, y)| f(x, y)).collect::<Vec<_>>()
            };
            assert_eq!(bits(&a.union(&b)), zip(|x, y| x || y), "{a:?} {b:?}");
            assert_eq!(bits(&a.intersection(&b)), zip(|x, y| x && y), "{a:?} {b:?}");
            assert_eq!(bits(&a.difference(&b)), zip(|x, y| x && !y), "{a:?} {b:?}");
            for at in 0..64 {
                assert_eq!(a.contains(at), bits(&a)[at as usize]);
            }
        }
    }

    #[test]
    fn touching_ranges_merge_and_empty_ones_vanish() {
        assert_eq!(set(&[(5, 7), (1, 3), (3, 5), (9, 9)]), set(&[(1, 7)]));
        assert_eq!(set(&[(0, 10), (2, 3)]).bytes(), 10);
    }

    #[test]
    fn rounding_out_stops_at_the_limit() {
        let range = ByteRange { start: 70_000, end: 130_000 };
        assert_eq!(range.rounded_out(65_536, 130_500), ByteRange { start: 65_536, end: 130_500 });
        let last = ByteRange { start: u64::MAX - 3, end: u64::MAX };
        assert_eq!(last.rounded_out(4096, u64::MAX).end, u64::MAX);
    }
}

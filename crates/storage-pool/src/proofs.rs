//! Proof by age (section 9.5): which part of all pack ids was read when, and what is due now.
//!
//! Pack ids are random, so a part of their space is that part of the pool's bytes, and the schedule needs no list of packs:
//! a few ranges and times, whatever the pool's size.
//!
//! Invariants
//! - After a run that proved all that was due, everything is proved again within the period, if runs go on. (must)
//! - A clock that jumps never makes a proof look younger than pool time says (INV-19). (must)

use std::collections::BTreeMap;

use model::Timestamp;

use crate::chunk::PackId;

/// Places on the ring: the first four bytes of a pack id.
pub const RING: u64 = 1 << 32;
/// Smallest part that a record names: a round has at most so many records.
pub const LEAST: u64 = RING / 1024;

/// Where a pack is on the ring.
pub fn place(id: PackId) -> u64 {
    u64::from(u32::from_be_bytes([id.0[0], id.0[1], id.0[2], id.0[3]]))
}

/// A part of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The first place.
    pub from: u64,
    /// How many places; it may go on at 0.
    pub length: u64,
}

impl Part {
    /// All of it.
    pub const WHOLE: Part = Part { from: 0, length: RING };

    /// The part, if it is one.
    pub fn new(from: u64, length: u64) -> Option<Part> {
        (from < RING && (LEAST..=RING).contains(&length)).then_some(Part { from, length })
    }

    /// Whether a place is in it.
    pub fn holds(&self, place: u64) -> bool {
        self.distance(place) < self.length
    }

    /// How far behind its beginning a place is.
    pub fn distance(&self, place: u64) -> u64 {
        (place + RING - self.from) % RING
    }

    fn end(&self) -> u64 {
        (self.from + self.length) % RING
    }
}

/// When a part was proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Pool time.
    pub pool_time: u64,
    /// The writer's time.
    pub time: u64,
}

impl Proof {
    /// How long ago. A writer's time that lies ahead says nothing; pool time goes on all the same.
    fn age(&self, now: &Proof) -> u64 {
        let by_records = now.pool_time.saturating_sub(self.pool_time);
        by_records.max(now.time.saturating_sub(self.time))
    }
}

/// What was proved when.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proofs {
    /// Disjoint ranges: first place, the place behind the last, when. What is in none was never proved.
    ranges: BTreeMap<u64, (u64, Proof)>,
    /// Where the next part begins.
    next: u64,
}

impl Proofs {
    /// A part was proved.
    pub fn add(&mut self, part: Part, proof: Proof) {
        let end = part.from + part.length;
        self.cover(part.from, end.min(RING), proof);
        if end > RING {
            self.cover(0, end - RING, proof);
        }
        self.next = part.end();
    }

    fn cover(&mut self, from: u64, end: u64, proof: Proof) {
        let over: Vec<(u64, u64, Proof)> = self
            .ranges
            .range(..end)
            .filter(|(_, (other, _))| *other > from)
            .map(|(first, (other, when))| (*first, *other, *when))
            .collect();
        for (first, other, when) in over {
            self.ranges.remove(&first);
            if first < from {
                self.ranges.insert(first, (from, when));
            }
            if other > end {
                self.ranges.insert(end, (other, when));
            }
        }
        self.ranges.insert(from, (end, proof));
    }

    /// All ranges without a gap; never proved is proved at `created`.
    fn all(&self, created: Proof) -> Vec<(u64, u64, Proof)> {
        let mut all = Vec::with_capacity(self.ranges.len() + 2);
        let mut at = 0;
        for (&from, &(end, proof)) in &self.ranges {
            if at < from {
                all.push((at, from, created));
            }
            all.push((from, end, proof));
            at = end;
        }
        if at < RING {
            all.push((at, RING, created));
        }
        all
    }

    /// What must be proved now so that, if a round goes on evenly from here, nothing gets older than `every` microseconds.
    /// `created` stands for what was never proved.
    pub fn due(&self, now: Proof, created: Proof, every: u64) -> Option<Part> {
        let turned = Part { from: self.next, length: RING };
        let mut needed = 0u128;
        for (from, end, proof) in self.all(created) {
            // A place so far away comes up when that share of the period has passed; by then it is that much older.
            let behind = |end: u64| match turned.distance(end) {
                0 => RING,
                distance => distance,
            };
            let age = u128::from(proof.age(&now));
            let mut need = |end: u64| {
                let then = age * u128::from(RING) / u128::from(every.max(1)) + u128::from(behind(end));
                needed = needed.max(then.saturating_sub(u128::from(RING)));
            };
            need(end);
            if from < self.next && self.next < end {
                need(self.next);
            }
        }
        Part::new(self.next, u64::try_from(needed).unwrap_or(RING).min(RING))
    }

    /// When the part was proved that waits longest; `None` if some was never.
    pub fn oldest(&self) -> Option<Timestamp> {
        let never = Proof { pool_time: 0, time: 0 };
        self.all(never).iter().map(|(.., proof)| proof.time).min().filter(|&time| time > 0).map(Timestamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = Timestamp::DAY;
    const EVERY: u64 = 30 * DAY;

    fn at(day: u64) -> Proof {
        Proof { pool_time: day * DAY, time: 1_000 * DAY + day * DAY }
    }

    /// Oldest age of any place, in days.
    fn oldest(proofs: &Proofs, now: u64) -> u64 {
        proofs.all(at(0)).iter().map(|(.., proof)| proof.age(&at(now)) / DAY).max().unwrap_or(0)
    }

    #[test]
    fn an_even_share_each_day_and_nothing_older_than_the_period() {
        let mut proofs = Proofs::default();
        let mut most = 0;
        for day in 1..400 {
            if let Some(part) = proofs.due(at(day), at(0), EVERY) {
                most = most.max(part.length);
                proofs.add(part, at(day));
            }
            assert!(oldest(&proofs, day) <= 30, "day {day}: {proofs:?}");
        }
        assert!(most <= RING / 30 + 2, "{most}");
        assert!(proofs.ranges.len() < 40);
    }

    #[test]
    fn what_an_interrupted_run_left_is_due_the_next_time() {
        let mut proofs = Proofs::default();
        for day in 1..400 {
            if let Some(part) = proofs.due(at(day), at(0), EVERY) {
                // Every third day only a part is done, every seventh nothing.
                let length = if day % 3 == 0 { part.length / 2 } else { part.length };
                if day % 7 != 0
                    && let Some(done) = Part::new(part.from, length)
                {
                    proofs.add(done, at(day));
                }
            }
            assert!(oldest(&proofs, day) <= 32, "day {day}: {}", oldest(&proofs, day));
        }
    }

    #[test]
    fn a_full_proof_starts_the_round_anew_and_an_old_pool_is_due_at_once() {
        let mut proofs = Proofs::default();
        assert_eq!(proofs.due(at(100), at(0), EVERY), Some(Part::WHOLE));
        proofs.add(Part::WHOLE, at(100));
        assert_eq!(proofs.due(at(100), at(0), EVERY), None);
        let next = proofs.due(at(101), at(0), EVERY).map(|part| (part.from, part.length));
        assert_eq!(next, Some((0, RING / 30)));
        assert_eq!(proofs.oldest(), Some(Timestamp(at(100).time)));
    }

    /// INV-19: a clock that jumps ahead and back makes work, and never hides that a proof is due.
    #[test]
    fn a_clock_that_jumped_hides_nothing() {
        let mut proofs = Proofs::default();
        let ahead = Proof { pool_time: 3 * DAY, time: 40_000 * DAY };
        let part = proofs.due(ahead, at(0), EVERY);
        assert_eq!(part, Some(Part::WHOLE), "too early does no harm");
        proofs.add(Part::WHOLE, ahead);
        assert_eq!(proofs.due(at(4), at(0), EVERY).map(|part| part.length), Some(RING / 30));
        assert_eq!(proofs.due(at(33), at(0), EVERY), Some(Part::WHOLE));
    }

    #[test]
    fn parts_wrap_and_overlap() {
        let mut proofs = Proofs::default();
        let part = Part { from: RING - LEAST, length: 2 * LEAST };
        proofs.add(part, at(1));
        assert!(part.holds(RING - 1) && part.holds(LEAST - 1) && !part.holds(LEAST));
        assert_eq!(proofs.ranges.len(), 2);
        proofs.add(Part { from: LEAST / 2, length: RING - LEAST }, at(2));
        let all = proofs.all(at(0));
        assert_eq!(all.iter().map(|(from, end, _)| end - from).sum::<u64>(), RING);
        assert!(all.windows(2).all(|pair| pair[0].1 == pair[1].0), "{all:?}");
        assert_eq!(proofs.oldest(), Some(Timestamp(at(1).time)));
        assert_eq!(Part::new(0, LEAST - 1), None);
        assert_eq!(Part::new(RING, LEAST), None);
    }
}

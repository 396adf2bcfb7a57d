//! What was rebuilt from parity lately: readers go on as if nothing had happened, and still somebody must be told.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::chunk::PackId;

/// Sectors of a pack that were rebuilt from its parity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repaired {
    /// The pack.
    pub pack: PackId,
    /// Different sectors of 4 KiB.
    pub sectors: u64,
}

/// So many sectors are remembered; who loses more has other worries, and verify counts them again.
const REMEMBERED: usize = 1 << 16;

/// Sectors that were rebuilt, each with the turn in which that was last.
#[derive(Default)]
pub(crate) struct Rebuilt(Mutex<Turns>);

#[derive(Default)]
struct Turns {
    turn: u64,
    held: BTreeMap<(PackId, u32), u64>,
}

impl Rebuilt {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, pack: PackId, sectors: impl IntoIterator<Item = u32>) {
        let mut turns = self.turns();
        let turn = turns.turn;
        for sector in sectors {
            if turns.held.len() < REMEMBERED || turns.held.contains_key(&(pack, sector)) {
                turns.held.insert((pack, sector), turn);
            }
        }
    }

    /// What is noted from now on is asked for by the number that this gives.
    pub(crate) fn mark(&self) -> u64 {
        let mut turns = self.turns();
        turns.turn += 1;
        turns.turn
    }

    /// What was rebuilt since a mark, in order of pack.
    pub(crate) fn since(&self, mark: u64) -> Vec<Repaired> {
        let turns = self.turns();
        let mut found: Vec<Repaired> = Vec::new();
        for ((pack, _), _) in turns.held.iter().filter(|(_, turn)| **turn >= mark) {
            match found.last_mut() {
                Some(last) if last.pack == *pack => last.sectors += 1,
                _ => found.push(Repaired { pack: *pack, sectors: 1 }),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_asks_for_what_came_since_and_sectors_count_once() {
        let (rebuilt, [one, two]) = (Rebuilt::default(), [PackId([1; 16]), PackId([2; 16])]);
        let first = rebuilt.mark();
        rebuilt.note(one, [7, 8]);
        rebuilt.note(one, [8]);
        let second = rebuilt.mark();
        rebuilt.note(two, [7]);
        rebuilt.note(one, [7]);
        let told = |pack, sectors| Repaired { pack, sectors };
        assert_eq!(rebuilt.since(first), [told(one, 2), told(two, 1)]);
        assert_eq!(rebuilt.since(second), [told(one, 1), told(two, 1)]);
        assert_eq!(rebuilt.since(rebuilt.mark()), []);
    }
}

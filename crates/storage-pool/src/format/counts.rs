//! What the tail of a file of reference counts has besides (section 7.1): roots and packs.

use super::{FormatError, take, u32_at, u64_at};
use crate::chunk::{ChunkId, PackId};

/// Bytes before the roots.
const HEAD: usize = 48;
/// Bytes of a root and of a pack.
const ROOT: usize = 24;
const PACK: usize = 40;
/// The pack is in quarantine.
pub const QUARANTINED: u32 = 1;
/// The pack is missing.
pub const MISSING: u32 = 2;
/// The pack is not known any more: nothing that older files say of it counts.
pub const GONE: u32 = 4;

/// What the counts say of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackRow {
    /// Packs that were met later have a higher one.
    pub order: u64,
    /// Places of chunks in it.
    pub entries: u32,
    /// Those that are the home of a needed chunk.
    pub used: u32,
    /// [`QUARANTINED`], [`MISSING`], [`GONE`].
    pub flags: u32,
}

/// How many disks have a map with this root, and its level.
pub type RootRow = (u8, ChunkId, u32);

/// Roots that are counted, and packs of which something changed since the files below.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CountsTail {
    /// Hash of the recorded damage.
    pub damage: [u8; 32],
    /// The order of the next pack that is met.
    pub next_order: u64,
    /// Ascending.
    pub roots: Vec<RootRow>,
    /// Packs.
    pub packs: Vec<(PackId, PackRow)>,
}

impl CountsTail {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.roots.len() * ROOT + self.packs.len() * PACK);
        bytes.extend_from_slice(&self.damage);
        bytes.extend_from_slice(&self.next_order.to_le_bytes());
        bytes.extend_from_slice(&(self.roots.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.packs.len() as u32).to_le_bytes());
        for (level, id, times) in &self.roots {
            bytes.extend_from_slice(&id.0);
            bytes.extend_from_slice(&[*level, 0, 0, 0]);
            bytes.extend_from_slice(&times.to_le_bytes());
        }
        for (pack, row) in &self.packs {
            bytes.extend_from_slice(&pack.0);
            bytes.extend_from_slice(&row.order.to_le_bytes());
            bytes.extend_from_slice(&row.entries.to_le_bytes());
            bytes.extend_from_slice(&row.used.to_le_bytes());
            bytes.extend_from_slice(&row.flags.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
        }
        bytes
    }

    /// What stands in `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<CountsTail, FormatError> {
        let (roots, packs) = (u32_at(bytes, 40)? as usize, u32_at(bytes, 44)? as usize);
        let expected = HEAD as u64 + roots as u64 * ROOT as u64 + packs as u64 * PACK as u64;
        if bytes.len() as u64 != expected {
            let found =
                format!("{} bytes of {roots} roots and {packs} packs, expected {expected}", bytes.len());
            return Err(FormatError::at(0, found));
        }
        let mut tail = CountsTail {
            damage: take(bytes, 0)?,
            next_order: u64_at(bytes, 32)?,
            roots: Vec::with_capacity(roots),
            packs: Vec::with_capacity(packs),
        };
        let mut at = HEAD;
        for _ in 0..roots {
            let [level, 0, 0, 0] = take::<4>(bytes, at + 16)? else {
                return Err(FormatError::at(at as u64, "reserved bytes of a root are not zero"));
            };
            tail.roots.push((level, ChunkId(take(bytes, at)?), u32_at(bytes, at + 20)?));
            at += ROOT;
        }
        for _ in 0..packs {
            let row = PackRow {
                order: u64_at(bytes, at + 16)?,
                entries: u32_at(bytes, at + 24)?,
                used: u32_at(bytes, at + 28)?,
                flags: u32_at(bytes, at + 32)?,
            };
            tail.packs.push((PackId(take(bytes, at)?), row));
            at += PACK;
        }
        Ok(tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_round_trips_and_other_lengths_are_damage() {
        let row = PackRow { order: 7, entries: 1000, used: 3, flags: QUARANTINED };
        let tail = CountsTail {
            damage: [9; 32],
            next_order: 8,
            roots: vec![(0, ChunkId([1; 16]), 2), (6, ChunkId([2; 16]), 1)],
            packs: vec![(PackId([3; 16]), row), (PackId([4; 16]), PackRow { flags: GONE, ..row })],
        };
        let bytes = tail.encode();
        assert_eq!(CountsTail::decode(&bytes), Ok(tail));
        for length in 0..bytes.len() {
            assert!(CountsTail::decode(&bytes[..length]).is_err(), "{length}");
        }
        assert!(CountsTail::decode(&[bytes, vec![0]].concat()).is_err());
        assert!(CountsTail::decode(&[0xFF; 64]).is_err());
    }
}

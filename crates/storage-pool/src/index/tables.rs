//! Tables of the packs met last, in memory: what lies side by side on a disk mostly lies in one pack, so one table
//! answers for many blocks, and the runs are asked once a pack instead of once a block.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::chunk::{ChunkId, Location, PackId};
use crate::packs::FinishedPack;

/// Most bytes of all tables: those of about 250 packs.
const MAX_BYTES: usize = 6 << 20;
/// Most tables: an id that is in none asks each of them.
const MAX_TABLES: usize = 48;
/// Packs that are remembered as met, without their table.
const MET: usize = 16;
const FREE: u32 = u32::MAX;

/// The table of one pack: its entries in order of id, and where to begin to look.
struct Table {
    pack: PackId,
    entries: Vec<(ChunkId, u32)>,
    /// For each value of the first bits of an id, the first entry that is not below it.
    starts: Vec<u32>,
    shift: u32,
}

impl Table {
    fn new(pack: &FinishedPack) -> Table {
        let mut entries: Vec<(ChunkId, u32)> =
            pack.table.iter().map(|entry| (entry.id, entry.location)).collect();
        entries.sort_unstable();
        let bits = entries.len().max(2).ilog2();
        let shift = 32 - bits;
        let mut starts = vec![FREE; (1 << bits) + 1];
        for (at, (id, _)) in entries.iter().enumerate().rev() {
            if let Some(start) = starts.get_mut((first(id) >> shift) as usize) {
                *start = at as u32;
            }
        }
        let mut next = entries.len() as u32;
        for start in starts.iter_mut().rev() {
            if *start == FREE {
                *start = next;
            }
            next = *start;
        }
        Table { pack: pack.header.pack, entries, starts, shift }
    }

    fn find(&self, id: &ChunkId) -> Option<Location> {
        let bucket = (first(id) >> self.shift) as usize;
        let (from, to) = (*self.starts.get(bucket)?, *self.starts.get(bucket + 1)?);
        let same = self.entries.get(from as usize..to as usize)?;
        same.iter().find(|(other, _)| other == id).map(|&(_, at)| Location { pack: self.pack, at })
    }

    fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<(ChunkId, u32)>() + self.starts.capacity() * 4
    }
}

fn first(id: &ChunkId) -> u32 {
    (u128::from_be_bytes(id.0) >> 96) as u32
}

/// The tables held, the last one used first.
#[derive(Default)]
pub struct Tables {
    held: VecDeque<Arc<Table>>,
    bytes: usize,
    met: VecDeque<PackId>,
}

impl Tables {
    /// Where the tables say that a chunk is.
    pub fn find(&mut self, id: &ChunkId) -> Option<Location> {
        let (at, place) = self.held.iter().enumerate().find_map(|(at, table)| Some((at, table.find(id)?)))?;
        // A disk is read or stored from one pack for a while: that one is asked first.
        if at > 0
            && let Some(table) = self.held.remove(at)
        {
            self.held.push_front(table);
        }
        Some(place)
    }

    /// Notes that a chunk was found in `pack`. Whether its table is worth reading: it was met before, a while ago.
    pub fn meet(&mut self, pack: PackId) -> bool {
        if self.held.iter().any(|table| table.pack == pack) {
            return false;
        }
        if let Some(at) = self.met.iter().position(|met| *met == pack) {
            self.met.remove(at);
            return true;
        }
        self.met.push_front(pack);
        self.met.truncate(MET);
        false
    }

    /// Holds the table of a pack; the one unused for longest goes.
    pub fn hold(&mut self, pack: &FinishedPack) {
        self.forget(pack.header.pack);
        let table = Arc::new(Table::new(pack));
        self.bytes += table.bytes();
        self.held.push_front(table);
        while self.held.len() > MAX_TABLES || self.bytes > MAX_BYTES && self.held.len() > 1 {
            let Some(last) = self.held.pop_back() else { break };
            self.bytes -= last.bytes().min(self.bytes);
        }
    }

    /// Lets the table of a pack go, which is going away.
    pub fn forget(&mut self, pack: PackId) {
        let bytes = &mut self.bytes;
        self.held.retain(|table| {
            let stays = table.pack != pack;
            *bytes -= if stays { 0 } else { table.bytes().min(*bytes) };
            stays
        });
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

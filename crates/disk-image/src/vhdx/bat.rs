//! BAT entries (2.5.1) and the geometry that says which entry belongs to which block (2.4, 2.5).

use super::{MIB, MIN_BLOCK_SIZE};

/// Sizes of an image, and what follows from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a payload block.
    pub(crate) block: u64,
    /// Bytes of a logical sector.
    pub(crate) sector: u64,
    /// Whether blocks may lie in a parent.
    pub(crate) differencing: bool,
}

impl Geometry {
    /// Payload blocks for one sector bitmap block: a bitmap has 2^23 bits.
    pub(crate) fn ratio(&self) -> u64 {
        (self.sector << 23) / self.block.max(MIN_BLOCK_SIZE.into())
    }

    /// Payload blocks of the disk.
    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Entries of the BAT. A fixed or dynamic image ends with its last payload block, a differencing one with its
    /// last bitmap block.
    pub(crate) fn entries(&self) -> u64 {
        let (blocks, ratio) = (self.blocks(), self.ratio());
        match blocks {
            0 => 0,
            _ if self.differencing => blocks.div_ceil(ratio) * (ratio + 1),
            _ => blocks + (blocks - 1) / ratio,
        }
    }

    /// Index of the entry of payload block `block`: one bitmap entry follows each full chunk.
    pub(crate) fn payload_entry(&self, block: u64) -> u64 {
        block + block / self.ratio()
    }

    /// Index of the entry of the bitmap block for payload block `block`.
    pub(crate) fn bitmap_entry(&self, block: u64) -> u64 {
        let ratio = self.ratio();
        block / ratio * (ratio + 1) + ratio
    }

    /// Bytes of the bitmap of one payload block.
    pub(crate) fn bitmap_bytes(&self) -> u64 {
        self.block / self.sector / 8
    }

    /// Where the bits of `block` begin in its bitmap block.
    pub(crate) fn bitmap_offset(&self, block: u64) -> u64 {
        block % self.ratio() * self.bitmap_bytes()
    }

    /// Bytes of the disk that `block` holds: the last block may reach past the end of the disk.
    pub(crate) fn used_bytes(&self, block: u64) -> u64 {
        self.size.saturating_sub(block * self.block).min(self.block)
    }
}

/// State of a payload block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    NotPresent,
    Undefined,
    Zero,
    Unmapped,
    FullyPresent,
    PartiallyPresent,
}

/// An entry: bits 0..3 state, 3..20 reserved, 20..64 place in the file in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) state: State,
    /// Bytes from the start of the file; means something only when present.
    pub(crate) offset: u64,
}

impl Entry {
    /// Takes an entry apart; `Err` says what is wrong with it.
    pub(crate) fn parse(raw: u64) -> Result<Entry, String> {
        if raw & 0xF_FFF8 != 0 {
            return Err(format!("BAT entry {raw:#018x} has reserved bits set"));
        }
        let state = match raw & 7 {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            3 => State::Unmapped,
            6 => State::FullyPresent,
            7 => State::PartiallyPresent,
            _ => return Err(format!("BAT entry {raw:#018x} has the reserved state {}", raw & 7)),
        };
        Ok(Entry { state, offset: raw & !(MIB - 1) })
    }

    /// The entry as it stands in the file.
    pub(crate) fn raw(self) -> u64 {
        let state = match self.state {
            State::NotPresent => 0,
            State::Undefined => 1,
            State::Zero => 2,
            State::Unmapped => 3,
            State::FullyPresent => 6,
            State::PartiallyPresent => 7,
        };
        self.offset & !(MIB - 1) | state
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn geometry(size: u64, block: u64, sector: u64, differencing: bool) -> Geometry {
        Geometry { size, block, sector, differencing }
    }

    #[test]
    fn every_block_and_sector_size_interleaves_without_gap_or_overlap() {
        for sector in [512, 4096] {
            for power in 20..=28 {
                let g = geometry(64 << 40, 1 << power, sector, true);
                assert_eq!(g.ratio() * g.block, sector << 23, "a chunk");
                assert_eq!(g.bitmap_bytes() * g.ratio(), MIB, "a bitmap block");
                assert_eq!(g.payload_entry(g.ratio() - 1) + 1, g.bitmap_entry(0));
                assert_eq!(g.bitmap_entry(0) + 1, g.payload_entry(g.ratio()));
                assert_eq!(g.bitmap_entry(g.blocks() - 1) + 1, g.entries());
                let dynamic = Geometry { differencing: false, ..g };
                assert_eq!(dynamic.payload_entry(g.blocks() - 1) + 1, dynamic.entries());
            }
        }
    }

    #[test]
    fn sizes_at_the_edge_of_a_chunk() {
        let chunk = 4u64 << 30;
        let entries = |size, differencing| geometry(size, 1 << 20, 512, differencing).entries();
        assert_eq!((entries(0, false), entries(0, true)), (0, 0));
        assert_eq!((entries(512, false), entries(512, true)), (1, 4097));
        assert_eq!((entries(chunk, false), entries(chunk, true)), (4096, 4097));
        assert_eq!((entries(chunk + 512, false), entries(chunk + 512, true)), (4098, 8194));
        assert_eq!(geometry(chunk + 512, 1 << 20, 512, false).used_bytes(4096), 512);
    }

    #[test]
    fn entries_survive_a_round_trip_and_reserved_ones_are_refused() {
        for raw in [0, 1, 2, 3, 6 | 5 << 20, 7 | 1 << 63] {
            assert_eq!(Entry::parse(raw).unwrap().raw(), raw);
        }
        for raw in [4, 5, 8, 6 | 1 << 19] {
            assert!(Entry::parse(raw).is_err(), "{raw:#x}");
        }
    }
}

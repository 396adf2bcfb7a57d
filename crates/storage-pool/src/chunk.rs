//! Ids of chunks and packs, and locations.

/// Name of a chunk: section 3.2.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub [u8; 16]);

/// Name of a pack: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId(pub [u8; 16]);

fn hex(bytes: &[u8; 16], f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl std::fmt::Display for ChunkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        hex(&self.0, f)
    }
}
impl std::fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        hex(&self.0, f)
    }
}
impl std::fmt::Display for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        hex(&self.0, f)
    }
}
impl std::fmt::Debug for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        hex(&self.0, f)
    }
}
impl std::str::FromStr for PackId {
    type Err = model::id::NotAnId;
    fn from_str(text: &str) -> Result<PackId, model::id::NotAnId> {
        text.parse::<model::JobId>().map(|id| PackId(id.0))
    }
}

/// Where a chunk is: a pack, and in it a packed frame and place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Location {
    /// The pack.
    pub pack: PackId,
    /// The frame's offset divided by 64, times 16, plus the chunk's place in it: 24 bits (section 6).
    pub at: u32,
}

/// Locations are below this.
pub const LOCATION_END: u32 = 1 << 24;
/// Frames begin before this byte of a pack, so that a location fits.
pub const FRAMES_END: u32 = 64 << 20;

impl Location {
    /// The chunk in place `slot` of the frame at byte `frame`, a multiple of 64 below [`FRAMES_END`], of `pack`.
    pub fn new(pack: PackId, frame: u32, slot: usize) -> Location {
        Location { pack, at: (frame >> 6) << 4 | (slot as u32 & 15) }
    }

    /// Offset of the frame in the pack's file.
    pub fn frame(self) -> u32 {
        (self.at >> 4) << 6
    }

    /// Place of the chunk in the frame.
    pub fn slot(self) -> usize {
        (self.at & 15) as usize
    }
}

/// What a chunk is; part of what its id is made from, so that a block can never stand for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ChunkKind {
    /// 65,536 bytes of a disk.
    Block = 1,
    /// A map node.
    Node = 2,
}

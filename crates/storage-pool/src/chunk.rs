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

/// Where a chunk is: a pack, and in it a frame's offset with the chunk's place in the low 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Location {
    /// The pack.
    pub pack: PackId,
    /// Frame offset and place.
    pub at: u32,
}

impl Location {
    /// Offset of the frame in the pack's file.
    pub fn frame(self) -> u32 {
        self.at & !15
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

//! Hashes of blocks, and the proof that a block was hashed here.

use crate::{BLOCK, BlockHash};

/// The hash of one block. `block` is 64 KiB; the tail of a disk is padded with zeros by the caller.
pub fn hash_block(block: &[u8]) -> BlockHash {
    BlockHash(*blake3::hash(block).as_bytes())
}

/// Whether all bytes are zero. Whole words at a time, so that a scan of zeros costs memory speed.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, &byte| all | byte) == 0)
        && chunks.remainder().iter().all(|&byte| byte == 0)
}

/// Hashes that this process computed itself from the blocks they stand for.
///
/// Only the hasher makes one, and no message decodes to one: what came over a wire is hashed again by whoever
/// receives it. In one process it saves the server the second hashing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed(Vec<BlockHash>);

impl Hashed {
    /// Takes over hashes that the hasher computed a moment ago. Private to this crate: whoever calls it vouches
    /// that they were computed by [`hash_block`] from the very bytes that are sent along.
    pub(crate) fn vouched(hashes: Vec<BlockHash>) -> Hashed {
        Hashed(hashes)
    }

    /// Hashes whole blocks.
    pub fn of(blocks: &[u8]) -> Hashed {
        Hashed(blocks.chunks_exact(BLOCK).map(hash_block).collect())
    }

    /// The hashes, in the order of the blocks.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.0
    }
}

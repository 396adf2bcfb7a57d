//! Map nodes (section 8).

use super::{FormatError, take};
use crate::chunk::ChunkId;

/// Children of a node.
pub const FANOUT: u64 = 128;
/// Bytes before the first child id.
const HEAD: usize = 20;
/// Most bytes of a node.
pub const MAX_BYTES: usize = HEAD + 16 * FANOUT as usize;
/// Levels that the largest disk of 2^64 bytes needs: 48 bits of blocks, 7 bits a level.
pub const MAX_LEVELS: u8 = 7;

/// A node: the id of each child, absent where its part of the disk is zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// 0 for a leaf, whose children are blocks.
    pub level: u8,
    /// One for each child.
    pub children: Box<[Option<ChunkId>; FANOUT as usize]>,
}

impl Node {
    /// A node without children.
    pub fn empty(level: u8) -> Node {
        Node { level, children: Box::new([None; FANOUT as usize]) }
    }

    /// Whether no child is present.
    pub fn is_empty(&self) -> bool {
        self.children.iter().all(Option::is_none)
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; HEAD];
        bytes[0] = 1;
        bytes[1] = self.level;
        for (index, child) in self.children.iter().enumerate() {
            if let Some(id) = child {
                bytes[4 + index / 8] |= 1 << (index % 8);
                bytes.extend_from_slice(&id.0);
            }
        }
        bytes
    }

    /// The node in `bytes`, which must be of `level`.
    pub fn decode(bytes: &[u8], level: u8) -> Result<Node, FormatError> {
        let [version, found, 0, 0] = take::<4>(bytes, 0)? else {
            return Err(FormatError::at(2, "reserved bytes of a map node are not zero"));
        };
        if version != 1 {
            return Err(FormatError::TooNew(u16::from(version)));
        }
        if found != level {
            return Err(FormatError::at(1, format!("map node of level {found}, expected {level}")));
        }
        let bitmap: [u8; 16] = take(bytes, 4)?;
        let mut node = Node::empty(level);
        let mut at = HEAD;
        for (index, child) in node.children.iter_mut().enumerate() {
            if bitmap[index / 8] & (1 << (index % 8)) != 0 {
                *child = Some(ChunkId(take(bytes, at)?));
                at += 16;
            }
        }
        if at != bytes.len() {
            return Err(FormatError::at(
                at as u64,
                format!("map node of {} bytes, expected {at}", bytes.len()),
            ));
        }
        Ok(node)
    }
}

/// Levels of the map of a disk of `blocks` blocks.
pub fn levels(blocks: u64) -> u8 {
    let (mut levels, mut reach) = (1u8, FANOUT);
    while reach < blocks {
        levels += 1;
        reach = reach.saturating_mul(FANOUT);
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_round_trip() {
        let mut node = Node::empty(2);
        assert_eq!(Node::decode(&node.encode(), 2), Ok(node.clone()));
        for index in [0, 7, 8, 64, 127] {
            node.children[index] = Some(ChunkId([index as u8 + 1; 16]));
        }
        let bytes = node.encode();
        assert_eq!(bytes.len(), HEAD + 5 * 16);
        assert_eq!(Node::decode(&bytes, 2), Ok(node));
        assert!(Node::decode(&bytes, 1).is_err());
        assert!(Node::decode(&bytes[..bytes.len() - 1], 2).is_err());
        assert!(Node::decode(&[bytes.clone(), vec![0]].concat(), 2).is_err());
    }

    #[test]
    fn levels_of_known_disks() {
        for (blocks, expected) in
            [(0, 1), (1, 1), (128, 1), (129, 2), (1 << 14, 2), ((1 << 14) + 1, 3), (1 << 30, 5), (1 << 48, 7)]
        {
            assert_eq!(levels(blocks), expected, "{blocks}");
        }
    }
}

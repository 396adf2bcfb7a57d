//! Maps: the tree from block to chunk (section 8).

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::chunk::ChunkId;
use crate::error::PoolError;
use crate::format::node::{FANOUT, Node, levels};

/// Where nodes come from.
pub trait NodeSource: Send + Sync {
    /// The bytes of node `id`, proved to be it.
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, PoolError>;
}

/// Where new nodes go.
pub trait NodeSink {
    /// Keeps a node; equal nodes have equal ids.
    fn put_node(&mut self, bytes: Vec<u8>) -> Result<ChunkId, PoolError>;
}

/// The map of a disk: its root and height.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRoot {
    /// None for a disk of zeros.
    pub root: Option<ChunkId>,
    /// Levels of nodes.
    pub levels: u8,
}

impl MapRoot {
    /// The map of `blocks` blocks of zeros.
    pub fn zeros(blocks: u64) -> MapRoot {
        MapRoot { root: None, levels: levels(blocks) }
    }
}

/// Nodes kept in memory by a reader: 4096 leaves are 32 GiB of disk and 8 MiB of memory.
const CACHED_NODES: usize = 4096;

/// Reads a map.
pub struct MapReader<S> {
    source: S,
    map: MapRoot,
    cache: Mutex<HashMap<ChunkId, Arc<Node>>>,
}

fn shift(level: u8) -> u32 {
    7 * u32::from(level)
}

fn child_index(block: u64, level: u8) -> usize {
    (block.checked_shr(shift(level)).unwrap_or(0) % FANOUT) as usize
}

fn reach(levels: u8) -> u64 {
    1u64.checked_shl(shift(levels)).unwrap_or(u64::MAX)
}

impl<S: NodeSource> MapReader<S> {
    /// The map under `map`.
    pub fn new(source: S, map: MapRoot) -> MapReader<S> {
        MapReader { source, map, cache: Mutex::new(HashMap::new()) }
    }

    /// Root and height.
    pub fn root(&self) -> MapRoot {
        self.map
    }

    fn node(&self, id: &ChunkId, level: u8) -> Result<Arc<Node>, PoolError> {
        let cached = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        if let Some(node) = cached
            && node.level == level
        {
            return Ok(node);
        }
        let bytes = self.source.node(id)?;
        let node = Node::decode(&bytes, level).map_err(|error| PoolError::ChunkLost {
            chunk: id.to_string(),
            reason: format!("map node: {error:?}"),
        })?;
        let node = Arc::new(node);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHED_NODES {
            cache.clear();
        }
        cache.insert(*id, node.clone());
        Ok(node)
    }

    /// The chunk of `block`; none for zeros.
    pub fn get(&self, block: u64) -> Result<Option<ChunkId>, PoolError> {
        if block >= reach(self.map.levels) {
            return Ok(None);
        }
        let mut id = self.map.root;
        for level in (0..self.map.levels).rev() {
            let Some(node) = id else { return Ok(None) };
            id = self.node(&node, level)?.children[child_index(block, level)];
        }
        Ok(id)
    }

    /// The first block at or after `from` that is not zeros, with its chunk.
    pub fn next_present(&self, from: u64) -> Result<Option<(u64, ChunkId)>, PoolError> {
        let Some(root) = self.map.root else { return Ok(None) };
        if from >= reach(self.map.levels) {
            return Ok(None);
        }
        self.next_in(&root, self.map.levels - 1, 0, from)
    }

    fn next_in(
        &self,
        id: &ChunkId,
        level: u8,
        base: u64,
        from: u64,
    ) -> Result<Option<(u64, ChunkId)>, PoolError> {
        let node = self.node(id, level)?;
        let first = if from <= base { 0 } else { child_index(from - base, level) };
        for (index, child) in node.children.iter().enumerate().skip(first) {
            let Some(child) = child else { continue };
            let start = base + ((index as u64) << shift(level));
            if level == 0 {
                return Ok(Some((start, *child)));
            }
            if let Some(found) = self.next_in(child, level - 1, start, from)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Calls `each(first block, leaf)` for the leaves that the map under `before`, of the same height, does not have at
    /// the same place. What both maps share is not read.
    pub(crate) fn changed_leaves(
        &self,
        before: Option<ChunkId>,
        each: &mut dyn FnMut(u64, &Node) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        match self.map.root {
            Some(root) => self.changed_in(&root, before, self.map.levels - 1, 0, each),
            None => Ok(()),
        }
    }

    fn changed_in(
        &self,
        id: &ChunkId,
        before: Option<ChunkId>,
        level: u8,
        base: u64,
        each: &mut dyn FnMut(u64, &Node) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        if before == Some(*id) {
            return Ok(());
        }
        let node = self.node(id, level)?;
        if level == 0 {
            return each(base, &node);
        }
        let before = before.map(|before| self.node(&before, level)).transpose()?;
        for (index, child) in node.children.iter().enumerate() {
            let Some(child) = child else { continue };
            let start = base + ((index as u64) << shift(level));
            let before = before.as_ref().and_then(|before| before.children[index]);
            self.changed_in(child, before, level - 1, start, each)?;
        }
        Ok(())
    }

    /// Visits every node and block below the root. `node` is told of each node before its children and may skip it by
    /// returning false; `lost` is told of nodes that cannot be read, with the blocks they cover.
    pub fn walk(
        &self,
        node: &mut dyn FnMut(ChunkId, u8) -> bool,
        block: &mut dyn FnMut(u64, ChunkId),
        lost: &mut dyn FnMut(std::ops::Range<u64>, PoolError),
    ) {
        if let Some(root) = self.map.root {
            self.walk_in(&root, self.map.levels - 1, 0, node, block, lost);
        }
    }

    fn walk_in(
        &self,
        id: &ChunkId,
        level: u8,
        base: u64,
        node: &mut dyn FnMut(ChunkId, u8) -> bool,
        block: &mut dyn FnMut(u64, ChunkId),
        lost: &mut dyn FnMut(std::ops::Range<u64>, PoolError),
    ) {
        if !node(*id, level) {
            return;
        }
        match self.node(id, level) {
            Err(error) => lost(base..base.saturating_add(reach(level + 1)), error),
            Ok(found) => {
                for (index, child) in found.children.iter().enumerate() {
                    let Some(child) = child else { continue };
                    let start = base + ((index as u64) << shift(level));
                    if level == 0 {
                        block(start, *child);
                    } else {
                        self.walk_in(child, level - 1, start, node, block, lost);
                    }
                }
            }
        }
    }
}

/// Changed leaves that an editor holds before it turns the lowest ones into nodes: 8192 leaves are 64 GiB of disk.
const HELD_LEAVES: usize = 8192;

/// Makes a new map out of another by changing blocks.
pub struct MapEditor<S> {
    base: MapReader<S>,
    /// Changed nodes by level and position among the nodes of that level.
    changed: Vec<BTreeMap<u64, Node>>,
    levels: u8,
}

impl<S: NodeSource> MapEditor<S> {
    /// Begins with `base`, which must have the height of a map of `blocks` blocks.
    pub fn new(source: S, base: MapRoot, blocks: u64) -> Result<MapEditor<S>, PoolError> {
        let levels = levels(blocks);
        if base.levels != levels {
            return Err(PoolError::Misuse(format!("a map of {} levels for {blocks} blocks", base.levels)));
        }
        Ok(MapEditor {
            base: MapReader::new(source, base),
            changed: vec![BTreeMap::new(); usize::from(levels)],
            levels,
        })
    }

    /// Blocks that a map of this height can name.
    pub fn reach(&self) -> u64 {
        reach(self.levels)
    }

    /// The map as it was.
    pub fn base(&self) -> &MapReader<S> {
        &self.base
    }

    /// The node of `level` that covers `block`, changed or not.
    fn load(&self, level: u8, block: u64) -> Result<Node, PoolError> {
        let position = block.checked_shr(shift(level + 1)).unwrap_or(0);
        if let Some(node) = self.changed[usize::from(level)].get(&position) {
            return Ok(node.clone());
        }
        let id =
            if level + 1 == self.levels { self.base.root().root } else { self.load_child(level + 1, block)? };
        match id {
            None => Ok(Node::empty(level)),
            Some(id) => Ok((*self.base.node(&id, level)?).clone()),
        }
    }

    fn load_child(&self, level: u8, block: u64) -> Result<Option<ChunkId>, PoolError> {
        let position = block.checked_shr(shift(level + 1)).unwrap_or(0);
        if let Some(node) = self.changed[usize::from(level)].get(&position) {
            return Ok(node.children[child_index(block, level)]);
        }
        let id =
            if level + 1 == self.levels { self.base.root().root } else { self.load_child(level + 1, block)? };
        match id {
            None => Ok(None),
            Some(id) => Ok(self.base.node(&id, level)?.children[child_index(block, level)]),
        }
    }

    /// The chunk of `block` in the new map so far.
    pub fn get(&self, block: u64) -> Result<Option<ChunkId>, PoolError> {
        self.load_child(0, block)
    }

    /// Puts a chunk, or zeros, at `block`.
    pub fn set(
        &mut self,
        block: u64,
        chunk: Option<ChunkId>,
        sink: &mut dyn NodeSink,
    ) -> Result<(), PoolError> {
        let position = block / FANOUT;
        if !self.changed[0].contains_key(&position) {
            if self.load_child(0, block)? == chunk {
                return Ok(());
            }
            if self.changed[0].len() >= HELD_LEAVES {
                self.settle_leaves(sink)?;
            }
            let leaf = self.load(0, block)?;
            self.changed[0].insert(position, leaf);
        }
        if let Some(leaf) = self.changed[0].get_mut(&position) {
            leaf.children[child_index(block, 0)] = chunk;
        }
        Ok(())
    }

    /// Makes `blocks` zeros; returns how many held data.
    pub fn zero(&mut self, blocks: std::ops::Range<u64>, sink: &mut dyn NodeSink) -> Result<u64, PoolError> {
        let mut held = 0;
        let mut at = blocks.start;
        while at < blocks.end {
            // Whole parts without data are passed over at the highest level that shows it.
            if let Some(skip) = self.empty_span(at)? {
                at = at.saturating_add(skip);
                continue;
            }
            if self.get(at)?.is_some() {
                held += 1;
                self.set(at, None, sink)?;
            }
            at += 1;
        }
        Ok(held)
    }

    /// How many of `blocks` hold data.
    pub fn occupied(&self, blocks: std::ops::Range<u64>) -> Result<u64, PoolError> {
        let mut held = 0;
        let mut at = blocks.start;
        while at < blocks.end {
            if let Some(skip) = self.empty_span(at)? {
                at = at.saturating_add(skip);
                continue;
            }
            held += u64::from(self.get(at)?.is_some());
            at += 1;
        }
        Ok(held)
    }

    /// If `block` lies in a part of the map that has no node, the number of blocks up to the end of that part.
    fn empty_span(&self, block: u64) -> Result<Option<u64>, PoolError> {
        for level in (0..self.levels).rev() {
            let span = reach(level + 1);
            let position = block.checked_shr(shift(level + 1)).unwrap_or(0);
            let below_changed = (0..=level).any(|lower| {
                let first = block / span * span;
                let from = first.checked_shr(shift(lower + 1)).unwrap_or(0);
                let to = (first.saturating_add(span - 1)).checked_shr(shift(lower + 1)).unwrap_or(0);
                self.changed[usize::from(lower)].range(from..=to).next().is_some()
            });
            let _ = position;
            if below_changed {
                continue;
            }
            let id = if level + 1 == self.levels {
                self.base.root().root
            } else {
                self.load_child(level + 1, block)?
            };
            if id.is_none() {
                return Ok(Some(span - block % span));
            }
        }
        Ok(None)
    }

    fn settle(
        &mut self,
        level: u8,
        position: u64,
        node: &Node,
        sink: &mut dyn NodeSink,
    ) -> Result<(), PoolError> {
        let id = if node.is_empty() { None } else { Some(sink.put_node(node.encode())?) };
        let first_block = position.checked_shl(shift(level + 1)).unwrap_or(0);
        let parent = level + 1;
        let parent_position = first_block.checked_shr(shift(parent + 1)).unwrap_or(0);
        if !self.changed[usize::from(parent)].contains_key(&parent_position) {
            let loaded = self.load(parent, first_block)?;
            self.changed[usize::from(parent)].insert(parent_position, loaded);
        }
        if let Some(node) = self.changed[usize::from(parent)].get_mut(&parent_position) {
            node.children[child_index(first_block, parent)] = id;
        }
        Ok(())
    }

    /// Turns the lower half of the held leaves into nodes: announcements come in ascending order.
    fn settle_leaves(&mut self, sink: &mut dyn NodeSink) -> Result<(), PoolError> {
        if self.levels == 1 {
            return Ok(());
        }
        for _ in 0..HELD_LEAVES / 2 {
            let Some((position, leaf)) = self.changed[0].pop_first() else { break };
            self.settle(0, position, &leaf, sink)?;
        }
        Ok(())
    }

    /// Keeps every changed node and gives the new map.
    pub fn finish(mut self, sink: &mut dyn NodeSink) -> Result<MapRoot, PoolError> {
        for level in 0..self.levels - 1 {
            while let Some((position, node)) = self.changed[usize::from(level)].pop_first() {
                self.settle(level, position, &node, sink)?;
            }
        }
        let root = match self.changed[usize::from(self.levels - 1)].pop_first() {
            None => self.base.root().root,
            Some((_, node)) if node.is_empty() => None,
            Some((_, node)) => Some(sink.put_node(node.encode())?),
        };
        Ok(MapRoot { root, levels: self.levels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Nodes(Mutex<HashMap<ChunkId, Vec<u8>>>);

    impl NodeSource for Arc<Nodes> {
        fn node(&self, id: &ChunkId) -> Result<Vec<u8>, PoolError> {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(id)
                .cloned()
                .ok_or_else(|| PoolError::ChunkLost { chunk: id.to_string(), reason: "not there".to_owned() })
        }
    }

    impl NodeSink for Arc<Nodes> {
        fn put_node(&mut self, bytes: Vec<u8>) -> Result<ChunkId, PoolError> {
            let id = ChunkId(crate::format::short_hash(&[&bytes]));
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, bytes);
            Ok(id)
        }
    }

    #[test]
    fn random_edits_agree_with_a_plain_table() {
        for (seed, blocks) in [(1u64, 1u64), (2, 100), (3, 129), (4, 70_000), (5, 1 << 30)] {
            let random = environment::SeededRandomness::new(seed);
            let mut nodes = Arc::new(Nodes::default());
            let mut truth: BTreeMap<u64, ChunkId> = BTreeMap::new();
            let mut map = MapRoot::zeros(blocks);
            for _ in 0..6 {
                let before = nodes.0.lock().unwrap_or_else(PoisonError::into_inner).len();
                let mut editor = MapEditor::new(nodes.clone(), map, blocks).unwrap_or_else(|e| panic!("{e}"));
                let edits = 1 + random.below(60);
                for _ in 0..edits {
                    let at = random.below(blocks);
                    if random.below(4) == 0 {
                        let end = (at + 1 + random.below(40_000)).min(blocks);
                        let expected = truth.range(at..end).count() as u64;
                        assert_eq!(editor.occupied(at..end).unwrap_or(u64::MAX), expected);
                        assert_eq!(editor.zero(at..end, &mut nodes).unwrap_or(u64::MAX), expected);
                        truth.retain(|block, _| !(at..end).contains(block));
                    } else {
                        let chunk = ChunkId([1 + random.below(255) as u8; 16]);
                        for block in at..(at + 1 + random.below(3)).min(blocks) {
                            editor.set(block, Some(chunk), &mut nodes).unwrap_or_else(|e| panic!("{e}"));
                            truth.insert(block, chunk);
                            assert_eq!(editor.get(block).unwrap_or(None), Some(chunk));
                        }
                    }
                }
                map = editor.finish(&mut nodes).unwrap_or_else(|e| panic!("{e}"));
                let added = nodes.0.lock().unwrap_or_else(PoisonError::into_inner).len() - before;
                assert!(
                    added as u64 <= edits * 400 * u64::from(map.levels),
                    "{added} nodes for {edits} edits"
                );
                let reader = MapReader::new(nodes.clone(), map);
                let mut found = BTreeMap::new();
                let mut at = 0;
                while let Some((block, chunk)) = reader.next_present(at).unwrap_or_else(|e| panic!("{e}")) {
                    found.insert(block, chunk);
                    at = block + 1;
                }
                assert_eq!(found, truth, "seed {seed}");
                for (block, chunk) in &truth {
                    assert_eq!(reader.get(*block).unwrap_or(None), Some(*chunk));
                }
            }
            let mut editor = MapEditor::new(nodes.clone(), map, blocks).unwrap_or_else(|e| panic!("{e}"));
            editor.zero(0..blocks, &mut nodes).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(
                editor.finish(&mut nodes).map(|map| map.root).unwrap_or(map.root),
                None,
                "all zeros cost nothing"
            );
        }
    }

    #[test]
    fn one_changed_block_of_64_tib_makes_one_node_a_level() {
        let blocks = 1u64 << 30;
        let mut nodes = Arc::new(Nodes::default());
        let mut editor =
            MapEditor::new(nodes.clone(), MapRoot::zeros(blocks), blocks).unwrap_or_else(|e| panic!("{e}"));
        editor.set(123_456_789, Some(ChunkId([1; 16])), &mut nodes).unwrap_or_else(|e| panic!("{e}"));
        let map = editor.finish(&mut nodes).unwrap_or_else(|e| panic!("{e}"));
        let all = nodes.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!((map.levels, all.len()), (5, 5));
        assert!(all.values().map(Vec::len).sum::<usize>() < 11_000);
    }
}

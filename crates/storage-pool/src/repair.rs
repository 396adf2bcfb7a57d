//! Storing again what a pack can only give by its parity (section 6.1).
//!
//! A pack is never written into, nor over. What a damaged one still gives goes into a new pack, in this order: new pack → run →
//! record that the old one is damaged. A crash before the record leaves the old pack, which is read by its parity as before,
//! and a pack that nothing needs more than that; the next verify goes on. From the record on the new copies are the ones that
//! count, and reclaim frees the old pack like any other of which nothing is used.
//!
//! Refuses: storing a chunk that does not fit its seal and its id; less room than the reserve.

use std::collections::BTreeSet;

use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::PoolError;
use crate::format::pack::PackKind;
use crate::format::payload::{self, Kind};
use crate::format::{FormatError, pack};
use crate::frame;
use crate::packs::PackWriter;
use crate::pool::Pool;

/// What verify found in a pack with parity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The pack.
    pub pack: PackId,
    /// Sectors of 4 KiB that were rebuilt from parity; 0 where only the parity is damaged.
    pub sectors: u64,
    /// Frames of which only parity gives the bytes.
    pub frames: BTreeSet<u32>,
    /// Whether all that the pack holds can be had, so that all of it is stored again.
    pub is_whole: bool,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredAgain {
    /// What it holds and what nothing else had is in new packs of so many bytes; the old one is recorded as damaged.
    Done {
        /// The damaged pack.
        pack: PackId,
        /// Bytes of the new one; 0 if others had it all.
        bytes: u64,
    },
    /// It was not, for this reason; it is read by its parity as before.
    Not {
        /// The damaged pack.
        pack: PackId,
        /// Why.
        reason: String,
    },
}

impl Pool {
    /// Stores again what a pack gives only by its parity, and records the pack, or these frames of it, as damaged. `None` if
    /// there was nothing left to do.
    pub(crate) fn store_again(&self, found: &Repair) -> Result<Option<StoredAgain>, PoolError> {
        // Its parity gave sectors, and no frame whole: what is damaged of it is recorded as that, and there is nothing to store.
        if !found.is_whole && found.frames.is_empty() {
            return Ok(None);
        }
        let is_done = {
            let state = self.state();
            state.quarantined.contains_key(&found.pack)
                || state.permitted.contains_key(&found.pack)
                || state.damaged.get(&found.pack).is_some_and(BTreeSet::is_empty)
        };
        if is_done || !self.index().packs().get(&found.pack).is_some_and(|info| info.present) {
            return Ok(None);
        }
        let (stored, reason) = match self.copy_whole(found) {
            Ok(bytes) => (
                StoredAgain::Done { pack: found.pack, bytes },
                format!(
                    "{} sectors were rebuilt from parity, and what it held is stored again",
                    found.sectors
                ),
            ),
            // Storage that fails must be heard: nothing is known of what was written.
            Err(error @ (PoolError::Io { .. } | PoolError::Fenced { .. } | PoolError::ReadOnly)) => {
                return Err(error);
            }
            Err(error) => (
                StoredAgain::Not { pack: found.pack, reason: error.to_string() },
                "its bytes had to be rebuilt from parity".to_owned(),
            ),
        };
        // Not stored again, its frames are still not for new points: the next backup stores their blocks.
        let frames: Vec<u32> = match (&stored, found.is_whole) {
            (StoredAgain::Done { .. }, true) => Vec::new(),
            _ => found.frames.iter().copied().collect(),
        };
        let is_all = frames.is_empty();
        if is_all && matches!(stored, StoredAgain::Not { .. }) {
            return Ok(Some(stored));
        }
        let is_news = is_all || frames.iter().any(|frame| self.state().is_healthy(found.pack, *frame));
        if is_news {
            self.append(Kind::Damage, &payload::Damage { pack: found.pack.0.to_vec(), frames, reason })?;
            self.forget_pack(found.pack);
        }
        Ok(is_news.then_some(stored))
    }

    /// Copies frames of a pack as they are encoded into a new one, durable and indexed: all, or those that parity gave. What
    /// another pack has sound is left out. Gives the bytes of the new pack.
    fn copy_whole(&self, found: &Repair) -> Result<u64, PoolError> {
        let id = found.pack;
        self.forget_pack(id);
        let table = self.read_table(id)?;
        let (kind, domain) = (table.header.kind, table.header.domain);
        let keys = self.domain_keys(domain);
        let chunk_kind = match kind {
            PackKind::Blocks => ChunkKind::Block,
            PackKind::Nodes => ChunkKind::Node,
        };
        let path = || self.world.files.display(&pack::name(id));
        let place = |location: u32| Location { pack: id, at: location };
        let mut entries = table.table;
        entries.sort_unstable_by_key(|entry| entry.location);
        let mut writer: Option<PackWriter> = None;
        for chunks in
            entries.chunk_by(|one, next| place(one.location).frame() == place(next.location).frame())
        {
            let Some(first) = chunks.first().map(|entry| place(entry.location)) else { continue };
            let is_asked = found.is_whole || found.frames.contains(&first.frame());
            if !is_asked || self.others_have(id, chunks.iter().map(|entry| &entry.id))? {
                continue;
            }
            let wrong = |reason: String| FormatError::at(u64::from(first.frame()), reason).in_file(path());
            let (header, encoded) = self.reader.encoded(first, domain)?;
            let content = frame::decode(header.codec, &encoded, header.decoded as usize).map_err(wrong)?;
            let spans = frame::spans(kind, usize::from(header.chunks), &content, content.len())
                .map_err(|error| error.in_file(path()))?;
            let mut ids = Vec::with_capacity(spans.len());
            for (slot, span) in spans.into_iter().enumerate() {
                let bytes = content.get(span).unwrap_or_default();
                let chunk = keys.chunk_id(chunk_kind, blake3::hash(bytes).as_bytes());
                let is_named = chunks
                    .get(slot)
                    .is_some_and(|entry| entry.id == chunk && place(entry.location).slot() == slot);
                if !is_named {
                    return Err(wrong(format!(
                        "the chunk in place {slot} is not the one that the table names"
                    )));
                }
                ids.push(chunk);
            }
            let parity = writer.as_ref().map_or(0, PackWriter::parity_bytes);
            self.leave_reserve(encoded.len() as u64 + parity)?;
            let open = match &mut writer {
                Some(open) => open,
                none => {
                    let new = self.new_pack()?;
                    let files = self.world.files.clone();
                    let new = PackWriter::begin(files, self.id(), &keys, kind, new)?;
                    none.insert(new)
                }
            };
            open.parity = self.settings().parity_percent;
            open.put(header.codec, &encoded, header.decoded, &ids)?;
        }
        let Some(writer) = writer else { return Ok(0) };
        let finished = self.finish_pack(writer)?;
        self.index_mut().add_loose(&finished);
        self.flush_index()?;
        Ok(finished.length)
    }

    /// Whether each of these chunks is in another pack too, where it is read and fits its seal now.
    fn others_have<'c>(
        &self,
        id: PackId,
        chunks: impl Iterator<Item = &'c ChunkId>,
    ) -> Result<bool, PoolError> {
        for chunk in chunks {
            let is_there = self.find(chunk)?.into_iter().any(|place| {
                place.pack != id
                    && self.state().is_healthy(place.pack, place.frame())
                    && self.proof(place, chunk).is_some()
            });
            if !is_there {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

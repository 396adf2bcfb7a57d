//! Where the chunks of a pool are, and what they hold: every read of a chunk goes through here, and is proved by the chunk's id.

use std::io;
use std::sync::{MutexGuard, PoisonError};

use crate::bundle;
use crate::chunk::{ChunkId, ChunkKind, Location, PackId};
use crate::error::PoolError;
use crate::format::pack::PackKind;
use crate::index::{Index, Tables};
use crate::keys::DomainKeys;
use crate::pool::{LOOKS, Pool};
use crate::state::State;

/// Bytes of a frame in a pack that storage is told of: its length stands in its header only, and most are shorter.
const FRAME_GUESS: u32 = 96 << 10;

/// What proves that a chunk can be counted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// The seal of its frame, and so of all that is in it.
    Frame,
    /// Its own content.
    Chunk,
}

impl Pool {
    /// Every place of a chunk; a run that cannot be read is given up and read anew from the packs.
    pub(crate) fn find(&self, id: &ChunkId) -> Result<Vec<Location>, PoolError> {
        loop {
            let found = self.index().find(id);
            match found {
                Err(error) => self.index_mut().heal(error)?,
                found => return found,
            }
        }
    }

    /// Places of a chunk among which a backup looks for one that it may share. What `is_good` likes in the tables of the
    /// packs met last is enough; otherwise every place, as [`Pool::find`] says.
    pub(crate) fn find_near(
        &self,
        id: &ChunkId,
        is_good: impl Fn(&Location) -> bool,
    ) -> Result<Vec<Location>, PoolError> {
        if let Some(place) = self.tables().find(id).filter(is_good) {
            return Ok(vec![place]);
        }
        let places = self.find(id)?;
        if let Some(place) = places.first() {
            self.meet(place.pack);
        }
        Ok(places)
    }

    /// Every chunk in every place, after [`Pool::find`]'s manner. `begin` is called before each attempt.
    pub(crate) fn for_each_chunk<T>(
        &self,
        begin: impl Fn() -> T,
        mut each: impl FnMut(&mut T, ChunkId, Location),
    ) -> Result<T, PoolError> {
        loop {
            let mut found = begin();
            let read = self.index().for_each(|id, place| each(&mut found, id, place));
            match read {
                Err(error) => self.index_mut().heal(error)?,
                Ok(()) => return Ok(found),
            }
        }
    }

    /// The content of a chunk, proved by its id; from whichever copy is right.
    pub(crate) fn read_chunk(
        &self,
        keys: &DomainKeys,
        kind: ChunkKind,
        id: &ChunkId,
        out: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PoolError> {
        self.read_as(keys, kind, id, true, &mut |bytes, _| out(bytes))
    }

    /// The content of a block of which a part is wanted, and nothing near it soon: no more of its frame is decoded than needed.
    pub(crate) fn read_lone_block(
        &self,
        keys: &DomainKeys,
        id: &ChunkId,
        out: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PoolError> {
        self.read_as(keys, ChunkKind::Block, id, false, &mut |bytes, _| out(bytes))
    }

    /// The same, with the plain hash that was computed for the proof.
    pub(crate) fn read_hashed(
        &self,
        keys: &DomainKeys,
        kind: ChunkKind,
        id: &ChunkId,
        out: &mut dyn FnMut(&[u8], &[u8; 32]),
    ) -> Result<(), PoolError> {
        self.read_as(keys, kind, id, true, out)
    }

    /// Tells storage which frames will be read for these blocks, so that it begins with all of them. A hint: what is wrong
    /// is found by whoever reads.
    pub(crate) fn will_read(&self, keys: &DomainKeys, ids: impl Iterator<Item = ChunkId>) {
        let places = ids.filter_map(|id| self.find_near(&id, |_| true).ok()?.first().copied());
        let mut frames: Vec<(PackId, u32)> = places.map(|place| (place.pack, place.frame())).collect();
        frames.sort_unstable();
        frames.dedup();
        let is_joined =
            |one: &(PackId, u32), next: &(PackId, u32)| one.0 == next.0 && next.1 - one.1 <= FRAME_GUESS;
        for run in frames.chunk_by(is_joined) {
            if let (Some(&(pack, first)), Some(&(_, last))) = (run.first(), run.last()) {
                self.reader.will_read(pack, keys.domain, first..last.saturating_add(FRAME_GUESS));
            }
        }
    }

    fn read_as(
        &self,
        keys: &DomainKeys,
        kind: ChunkKind,
        id: &ChunkId,
        whole: bool,
        out: &mut dyn FnMut(&[u8], &[u8; 32]),
    ) -> Result<(), PoolError> {
        let held = self.tables().find(id);
        if let Some(place) = held
            && self.try_place(keys, kind, id, place, whole, out).is_ok()
        {
            return Ok(());
        }
        let mut reasons = Vec::new();
        let mut tried: Vec<Location> = Vec::new();
        for look in 0..LOOKS {
            // A reclaim beside this reader may have let a pack go after it was found; its chunks are elsewhere then.
            let places = match look {
                0 => self.find(id)?,
                _ => self.look_again(id)?,
            };
            let places: Vec<Location> = places.into_iter().filter(|place| !tried.contains(place)).collect();
            if places.is_empty() {
                break;
            }
            for place in places {
                match self.try_place(keys, kind, id, place, whole, out) {
                    Ok(()) => {
                        if kind == ChunkKind::Block {
                            self.meet(place.pack);
                        }
                        return Ok(());
                    }
                    Err(error) => reasons.push(error.to_string()),
                }
                tried.push(place);
            }
            if !tried.iter().any(|place| self.is_gone(place.pack)) {
                break;
            }
        }
        if reasons.is_empty() {
            reasons.push("it is in no pack".to_owned());
        }
        Err(PoolError::ChunkLost { chunk: id.to_string(), reason: reasons.join("; ") })
    }

    /// What proves now that the chunk at `place` can be counted on, if anything does. The seal of its frame is enough, except
    /// where a recipient that was removed since could have made it.
    pub(crate) fn proof(&self, place: Location, id: &ChunkId) -> Option<Proof> {
        let info = self.index().packs().get(&place.pack).copied()?;
        let sealed = self.reader.sealed_under(place, info.domain)?;
        // The seal says what is in the frame, and the table that this is the chunk: neither may be of an older key.
        if sealed.min(info.generation) >= self.keys.generation() {
            return Some(Proof::Frame);
        }
        let kind = match info.kind {
            PackKind::Blocks => ChunkKind::Block,
            PackKind::Nodes => ChunkKind::Node,
        };
        let read = self.try_place(&self.domain_keys(info.domain), kind, id, place, true, &mut |_, _| {});
        read.is_ok().then_some(Proof::Chunk)
    }

    /// Whether the file of a pack is not there any more.
    fn is_gone(&self, pack: PackId) -> bool {
        let opened = self.world.files.open(&crate::format::pack::name(pack));
        matches!(opened, Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether a pack is gone because a reclaim let it go, here or in the process that writes.
    pub(crate) fn let_go(&self, pack: PackId) -> bool {
        let has_permit = |state: &State| state.permitted.contains_key(&pack);
        if self.is_writable() {
            return has_permit(&self.state());
        }
        self.is_gone(pack)
            && bundle::load_bundled(&*self.world.files, &self.keys)
                .is_ok_and(|(fresh, ..)| has_permit(&fresh))
    }

    /// Every place of a chunk, in the index as it is now. A writer's own is; a reader opens it anew.
    fn look_again(&self, id: &ChunkId) -> Result<Vec<Location>, PoolError> {
        if !self.is_writable() {
            self.learn_rings()?;
            let state = bundle::load_bundled(&*self.world.files, &self.keys)?.0;
            let gone = |pack| state.permitted.contains_key(&pack);
            let fresh = Index::open(self.world.files.clone(), &self.keys, state.generation, &gone)?;
            *self.index_mut() = fresh;
        }
        self.find(id)
    }

    pub(crate) fn try_place(
        &self,
        keys: &DomainKeys,
        kind: ChunkKind,
        id: &ChunkId,
        place: Location,
        whole: bool,
        out: &mut dyn FnMut(&[u8], &[u8; 32]),
    ) -> Result<(), PoolError> {
        let pack_kind = match kind {
            ChunkKind::Block => PackKind::Blocks,
            ChunkKind::Node => PackKind::Nodes,
        };
        let frame = self.reader.decoded(place, keys.domain, pack_kind, whole)?;
        let wrong = |reason: String| PoolError::Damaged {
            path: self.world.path(&crate::format::pack::name(place.pack)),
            offset: u64::from(place.frame()),
            reason,
        };
        let chunk = frame
            .chunk(place.slot())
            .ok_or_else(|| wrong(format!("the frame has no chunk {}", place.slot())))?;
        let hash = blake3::hash(chunk);
        if keys.chunk_id(kind, hash.as_bytes()) != *id {
            return Err(wrong(format!("the chunk in place {} is not {id}", place.slot())));
        }
        out(chunk, hash.as_bytes());
        Ok(())
    }

    pub(crate) fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk was found in `pack`: if others were lately, its table is read, because more will follow.
    pub(crate) fn meet(&self, pack: PackId) {
        if !self.tables().meet(pack) {
            return;
        }
        let known = self.index().packs().get(&pack).map(|info| info.generation);
        if let Ok(table) = self.read_table(pack)
            && known == Some(table.header.generation)
        {
            self.tables().hold(&table);
        }
    }
}

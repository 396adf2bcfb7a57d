//! The pool as the receiving end of a transfer sees it.

use std::ops::Range;

use storage_pool::{Ingest, JobNodes, MapEditor, MapReader, PoolError};
use transfer::{BlockHash, Codec, Frame, Store, StoreError, Verdict};

/// One disk of a job.
pub(crate) struct StoreDisk {
    /// The new map.
    pub editor: MapEditor<JobNodes>,
    /// The replica's map where the new one could not begin with it because the disk's size changed.
    pub other_base: Option<MapReader<JobNodes>>,
}

/// One job's store over the pool.
pub(crate) struct PoolStore {
    pub ingest: Ingest,
    pub disks: Vec<StoreDisk>,
    /// Whether any damage is known: only then each unchanged block is looked up.
    pub doubtful: bool,
}

fn failed(error: PoolError) -> StoreError {
    StoreError(Box::new(error))
}

impl PoolStore {
    fn disk(&mut self, disk: u32) -> Result<&mut StoreDisk, StoreError> {
        self.disks
            .get_mut(disk as usize)
            .ok_or_else(|| failed(PoolError::Misuse(format!("the job has no disk {disk}"))))
    }
}

impl Store for PoolStore {
    fn announce(&mut self, disk: u32, block: u64, hash: &BlockHash) -> Result<Verdict, StoreError> {
        let id = self.ingest.chunk_id(&hash.0);
        let state = self.disk(disk)?;
        let mut current = state.editor.get(block).map_err(failed)?;
        if current != Some(id)
            && let Some(base) = &state.other_base
        {
            current = base.get(block).map_err(failed)?;
        }
        let mut nodes = self.ingest.nodes();
        if current == Some(id) && (!self.doubtful || self.ingest.is_usable(&id).map_err(failed)?) {
            self.disk(disk)?.editor.set(block, Some(id), &mut nodes).map_err(failed)?;
            return Ok(Verdict::Unchanged);
        }
        if self.ingest.is_in_job(&id).map_err(failed)? {
            self.disk(disk)?.editor.set(block, Some(id), &mut nodes).map_err(failed)?;
            return Ok(Verdict::InJob);
        }
        Ok(Verdict::Wanted)
    }

    fn equals(&mut self, disk: u32, block: u64, hash: &BlockHash) -> Result<bool, StoreError> {
        let id = self.ingest.chunk_id(&hash.0);
        Ok(self.disk(disk)?.editor.get(block).map_err(failed)? == Some(id))
    }

    fn zero(&mut self, disk: u32, blocks: Range<u64>) -> Result<u64, StoreError> {
        let mut nodes = self.ingest.nodes();
        self.disk(disk)?.editor.zero(blocks, &mut nodes).map_err(failed)
    }

    fn occupied(&mut self, disk: u32, blocks: Range<u64>) -> Result<u64, StoreError> {
        self.disk(disk)?.editor.occupied(blocks).map_err(failed)
    }

    fn put(&mut self, disk: u32, places: &[u64], frame: Frame) -> Result<(), StoreError> {
        let hashes: Vec<[u8; 32]> = frame.hashes.iter().map(|hash| hash.0).collect();
        let is_zstd = frame.codec == Codec::Zstd;
        let ids = self.ingest.put_blocks(is_zstd, &frame.bytes, &hashes).map_err(failed)?;
        let mut nodes = self.ingest.nodes();
        let state = self.disk(disk)?;
        for (place, id) in places.iter().zip(ids) {
            state.editor.set(*place, Some(id), &mut nodes).map_err(failed)?;
        }
        Ok(())
    }
}

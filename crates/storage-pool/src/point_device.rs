//! A disk of a recovery point as a block device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block_io::{BlockDevice, ByteRange, DeviceError};
use model::{BLOCK_BYTES, RecoveryPointId};

use crate::chunk::ChunkKind;
use crate::error::PoolError;
use crate::frame::BLOCK;
use crate::keys::DomainKeys;
use crate::map::{MapReader, MapRoot};
use crate::pass::Pass;
use crate::pool::{Pool, PoolNodes};

/// Longest run that one step of `next_allocated` gives: it needs one look into the map for each block.
const STEP_BLOCKS: u64 = 1024;

/// A disk of a recovery point: random access, read-only.
pub struct PointDevice {
    pool: Arc<Pool>,
    keys: Arc<DomainKeys>,
    map: MapReader<PoolNodes>,
    size: u64,
    sector: u32,
    name: String,
    /// Where the last read ended: one that goes on there is one of many.
    end: AtomicU64,
    /// The point does not expire for a reclaim while it is being read.
    _pass: Pass,
}

impl Pool {
    /// Disk `disk` of a point.
    pub fn open_disk(self: &Arc<Self>, point: RecoveryPointId, disk: u32) -> Result<PointDevice, PoolError> {
        let pass = self.enter_reading();
        let point = self.point(point)?;
        let found = point.disks.iter().find(|found| found.index == disk).ok_or(PoolError::NoSuchDisk {
            point: point.id,
            disk,
            disks: point.disks.len(),
        })?;
        let keys = self.domain_keys(point.domain);
        let nodes = PoolNodes { pool: self.clone(), keys: keys.clone() };
        Ok(PointDevice {
            pool: self.clone(),
            keys,
            map: MapReader::new(nodes, MapRoot { root: found.root, levels: found.levels }),
            size: found.size,
            sector: found.sector,
            end: AtomicU64::new(0),
            name: format!("disk {disk} of recovery point {} of {}", point.id, point.machine),
            _pass: pass,
        })
    }
}

impl PointDevice {
    fn damaged(&self, block: u64, error: PoolError) -> DeviceError {
        let offset = block * BLOCK_BYTES;
        let length = BLOCK_BYTES.min(self.size - offset.min(self.size));
        DeviceError::Damaged { object: self.name.clone(), offset, length, reason: error.to_string() }
    }
}

impl PointDevice {
    /// Fills `buf` with whole blocks from block `first` on and gives the plain hash of each, computed from these very bytes
    /// when they were proved. The tail of the disk is padded with zeros, as it is stored.
    pub fn read_hashed(&self, first: u64, buf: &mut [u8]) -> Result<Vec<[u8; 32]>, DeviceError> {
        let mut hashes = Vec::with_capacity(buf.len() / BLOCK);
        for (block, part) in (first..).zip(buf.chunks_exact_mut(BLOCK)) {
            match self.map.get(block).map_err(|error| self.damaged(block, error))? {
                None => {
                    part.fill(0);
                    hashes.push(*blake3::hash(part).as_bytes());
                }
                Some(chunk) => self
                    .pool
                    .read_hashed(&self.keys, ChunkKind::Block, &chunk, &mut |bytes, hash| {
                        part.copy_from_slice(bytes);
                        hashes.push(*hash);
                    })
                    .map_err(|error| self.damaged(block, error))?,
            }
        }
        Ok(hashes)
    }
}

impl PointDevice {
    /// Whether block `block` has this plain hash, or is all zeros if there is none. Only the map is looked
    /// at, so it is known of content that cannot be read any more, too.
    pub fn is_equal(&self, block: u64, hash: Option<&[u8; 32]>) -> Result<bool, DeviceError> {
        let held = self.map.get(block).map_err(|error| self.damaged(block, error))?;
        Ok(held == hash.map(|hash| self.keys.chunk_id(ChunkKind::Block, hash)))
    }
}

impl PointDevice {
    /// These blocks will be read soon. A hint, which costs a look into map and index for each of them.
    pub fn will_read(&self, blocks: std::ops::Range<u64>) {
        self.pool.will_read(&self.keys, blocks.filter_map(|block| self.map.get(block).ok().flatten()));
    }
}

impl BlockDevice for PointDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.sector
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size)?;
        let goes_on = self.end.swap(offset + buf.len() as u64, Ordering::Relaxed) == offset;
        let is_lone = !goes_on && buf.len() < BLOCK;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let block = at / BLOCK_BYTES;
            let inside = (at % BLOCK_BYTES) as usize;
            let part = &mut buf[done..];
            let length = part.len().min(BLOCK - inside);
            let part = &mut part[..length];
            match self.map.get(block).map_err(|error| self.damaged(block, error))? {
                None => part.fill(0),
                Some(chunk) => {
                    let mut copy = |bytes: &[u8]| part.copy_from_slice(&bytes[inside..inside + length]);
                    let read = match is_lone {
                        true => self.pool.read_lone_block(&self.keys, &chunk, &mut copy),
                        false => self.pool.read_chunk(&self.keys, ChunkKind::Block, &chunk, &mut copy),
                    };
                    read.map_err(|error| self.damaged(block, error))?;
                }
            }
            done += length;
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.size {
            return Ok(None);
        }
        let first = from / BLOCK_BYTES;
        let start = match self.map.next_present(first) {
            Ok(None) => return Ok(None),
            Ok(Some((block, _))) => block,
            // A part of the map is lost. What it covers may hold data: say so, so that reading it tells what is lost,
            // block by block, and the rest is still found.
            Err(_) => first,
        };
        let mut end = start + 1;
        while end - start < STEP_BLOCKS && matches!(self.map.get(end), Ok(Some(_))) {
            end += 1;
        }
        let range =
            ByteRange { start: (start * BLOCK_BYTES).max(from), end: (end * BLOCK_BYTES).min(self.size) };
        Ok((!range.is_empty()).then_some(range))
    }
}

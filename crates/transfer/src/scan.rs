//! Reading a frozen disk: which blocks, in what order, and the memory that what was read may take.
//!
//! Holes are skipped before they are read; what is read and turns out to be all zeros is announced as zeros. Both
//! directions read through here: the agent its frozen view, the server a recovery point.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use block_io::{BlockDevice, DeviceError};
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use model::{BLOCK_BYTES, ByteRange, RangeSet, audit_choice};

use crate::hasher::is_zero;
use crate::message::Run;
use crate::{BLOCK, BlockHash, blocks_of, hash_block};

/// Blocks of one read: 1 MiB, where a disk reads at its full rate and one read costs little memory.
pub(crate) const READ_BLOCKS: u64 = 16;

/// Why reading stopped early.
#[derive(Debug)]
pub(crate) enum ScanError {
    Device(u32, DeviceError),
    /// Nobody wants the rest.
    Stopped,
}

/// Bytes of read blocks that may be in memory at a time.
pub(crate) struct Budget {
    limit: u64,
    used: Mutex<u64>,
    freed: Condvar,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Arc<Budget> {
        Arc::new(Budget { limit, used: Mutex::new(0), freed: Condvar::new() })
    }

    /// Waits for `bytes`; `None` once `stop` is set (and [`Budget::wake`] was called).
    pub(crate) fn take(self: &Arc<Budget>, bytes: u64, stop: &AtomicBool) -> Option<Permit> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        // A request above the limit is let through alone instead of waiting for ever.
        while !stop.load(Ordering::SeqCst) && *used > 0 && used.saturating_add(bytes) > self.limit {
            used = self.freed.wait(used).unwrap_or_else(PoisonError::into_inner);
        }
        if stop.load(Ordering::SeqCst) {
            return None;
        }
        *used = used.saturating_add(bytes);
        Some(Permit { budget: Arc::clone(self), bytes })
    }

    /// Lets waiters look at their stop flag.
    pub(crate) fn wake(&self) {
        let _used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        self.freed.notify_all();
    }
}

/// Bytes taken from a [`Budget`], given back when dropped.
pub(crate) struct Permit {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Permit {
    /// Takes `bytes` of it out as a permit of their own.
    pub(crate) fn split(&mut self, bytes: u64) -> Permit {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Permit { budget: Arc::clone(&self.budget), bytes }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut used = self.budget.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used = used.saturating_sub(self.bytes);
        self.budget.freed.notify_all();
    }
}

/// Blocks as they were read.
pub(crate) enum Piece {
    Data { disk: u32, first: u64, audited: bool, data: Vec<u8>, permit: Permit },
    Zeros { disk: u32, first: u64, blocks: u64, audited: bool },
}

/// Calls `see(blocks, may hold data)` for all of `blocks`, ascending and without a gap. Runs with data are merged up
/// to [`READ_BLOCKS`], so that a scattered allocation is not read in crumbs.
pub(crate) fn walk<E>(
    device: &dyn BlockDevice,
    blocks: Range<u64>,
    mut see: impl FnMut(Range<u64>, bool) -> Result<(), E>,
) -> Result<(), E>
where
    E: From<DeviceError>,
{
    let mut at = blocks.start;
    let mut held = at..at;
    while at < blocks.end {
        let found = device.next_allocated(at.saturating_mul(BLOCK_BYTES))?;
        let (start, end) = match found {
            None => (blocks.end, blocks.end),
            Some(range) => {
                let start = (range.start / BLOCK_BYTES).clamp(at, blocks.end);
                (start, range.end.div_ceil(BLOCK_BYTES).clamp(start, blocks.end).max(at + 1).min(blocks.end))
            }
        };
        if start > at || held.end - held.start >= READ_BLOCKS {
            if !held.is_empty() {
                see(held, true)?;
            }
            held = start..start;
        }
        if start > at {
            see(at..start, false)?;
        }
        if end > start {
            held.end = end;
        }
        at = end;
    }
    if held.is_empty() { Ok(()) } else { see(held, true) }
}

/// Reads one disk's blocks and hands them on.
pub(crate) struct DiskReader<'a> {
    pub(crate) disk: u32,
    pub(crate) device: &'a dyn BlockDevice,
    pub(crate) budget: &'a Arc<Budget>,
    pub(crate) stop: &'a AtomicBool,
    pub(crate) out: &'a Sender<Piece>,
    pub(crate) bytes_read: &'a AtomicU64,
}

/// An error of a disk that is known from around.
struct Here(ScanErrorKind);

enum ScanErrorKind {
    Device(DeviceError),
    Stopped,
}

impl From<DeviceError> for Here {
    fn from(error: DeviceError) -> Here {
        Here(ScanErrorKind::Device(error))
    }
}

impl DiskReader<'_> {
    fn named(&self, result: Result<(), Here>) -> Result<(), ScanError> {
        result.map_err(|Here(kind)| match kind {
            ScanErrorKind::Device(error) => ScanError::Device(self.disk, error),
            ScanErrorKind::Stopped => ScanError::Stopped,
        })
    }

    fn send(&self, piece: Piece) -> Result<(), Here> {
        if self.stop.load(Ordering::SeqCst) {
            return Err(Here(ScanErrorKind::Stopped));
        }
        self.out.send(piece).map_err(|_| Here(ScanErrorKind::Stopped))
    }

    fn zeros(&self, blocks: Range<u64>, audited: bool) -> Result<(), Here> {
        let piece =
            Piece::Zeros { disk: self.disk, first: blocks.start, blocks: blocks.end - blocks.start, audited };
        self.send(piece)
    }

    fn data(&self, blocks: Range<u64>, audited: bool) -> Result<(), Here> {
        let size = self.device.size();
        let mut at = blocks.start;
        while at < blocks.end {
            // Up to a multiple of 1 MiB, so that frames of adjacent blocks lie in one buffer.
            let end = ((at / READ_BLOCKS + 1) * READ_BLOCKS).min(blocks.end);
            let count = end - at;
            let Some(permit) = self.budget.take(count * BLOCK_BYTES, self.stop) else {
                return Err(Here(ScanErrorKind::Stopped));
            };
            let mut data = vec![0; count as usize * BLOCK];
            let offset = at * BLOCK_BYTES;
            let length = (size - offset.min(size)).min(count * BLOCK_BYTES) as usize;
            self.device.read_at(offset, &mut data[..length])?;
            self.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
            self.send(Piece::Data { disk: self.disk, first: at, audited, data, permit })?;
            at = end;
        }
        Ok(())
    }

    fn blocks(&self, blocks: Range<u64>) -> Result<(), Here> {
        walk(
            self.device,
            blocks,
            |run, data| {
                if data { self.data(run, false) } else { self.zeros(run, false) }
            },
        )
    }

    /// Every block of the disk from `first` on.
    pub(crate) fn full(&self, first: u64) -> Result<(), ScanError> {
        self.named(self.blocks(first..blocks_of(self.device.size())))
    }

    /// The blocks that `listed` touches.
    pub(crate) fn listed(&self, listed: &RangeSet) -> Result<(), ScanError> {
        let size = self.device.size();
        self.named(
            listed.rounded_out(BLOCK_BYTES, size).iter().try_for_each(|range| self.blocks(block_run(range))),
        )
    }

    /// Audits blocks that `listed` leaves out (INV-22); returns where the next run's audit begins.
    ///
    /// Holes that the rotation passes are announced as zeros without reading, so that the server sees blocks that it
    /// holds and the source lost; a sparse disk costs no more for it.
    pub(crate) fn audit(
        &self,
        listed: &RangeSet,
        rotation: u64,
        bytes_audited: &AtomicU64,
    ) -> Result<u64, ScanError> {
        let size = self.device.size();
        let choice = audit_choice::choose(size, listed, rotation, |from| self.device.next_allocated(from))
            .map_err(|error| ScanError::Device(self.disk, error))?;
        for range in choice.ranges.iter() {
            self.named(self.data(block_run(range), true))?;
            bytes_audited.fetch_add(range.len(), Ordering::Relaxed);
        }
        let begin = if rotation >= size { 0 } else { rotation / BLOCK_BYTES * BLOCK_BYTES };
        let windows = if choice.next > begin {
            vec![ByteRange { start: begin, end: choice.next }]
        } else {
            vec![ByteRange { start: begin, end: size }, ByteRange { start: 0, end: choice.next }]
        };
        let known = listed.rounded_out(BLOCK_BYTES, size).union(&choice.ranges);
        for window in windows.iter().filter(|window| !window.is_empty()) {
            let result = walk(self.device, block_run(window), |run, data| {
                if data {
                    return Ok(());
                }
                let hole = ByteRange {
                    start: run.start * BLOCK_BYTES,
                    end: run.end.saturating_mul(BLOCK_BYTES).min(size),
                };
                let unknown = RangeSet::from_ranges(vec![hole]).difference(&known);
                unknown.iter().try_for_each(|range| self.zeros(block_run(range), true))
            });
            self.named(result)?;
        }
        Ok(choice.next)
    }
}

fn block_run(range: &ByteRange) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

/// One announcement with the data that may be asked for.
pub(crate) struct Batch {
    pub(crate) disk: u32,
    pub(crate) audited: bool,
    pub(crate) runs: Vec<Run>,
    pub(crate) data: BatchData,
}

/// The blocks with content of an announcement, in its order.
#[derive(Default)]
pub(crate) struct BatchData {
    chunks: Vec<Bytes>,
    /// Chunk, and offset in it, of each block.
    blocks: Vec<(u32, u32)>,
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) places: Vec<u64>,
    permits: Vec<Permit>,
}

impl BatchData {
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// The bytes of blocks `indexes` one after another; shared where they lie so already.
    pub(crate) fn join(&self, indexes: &[u16]) -> Bytes {
        let at = |index: &u16| self.blocks.get(usize::from(*index)).copied().unwrap_or_default();
        let slice = |chunk: u32, start: u32, length: usize| {
            self.chunks
                .get(chunk as usize)
                .map(|bytes| bytes.slice(start as usize..(start as usize + length).min(bytes.len())))
                .unwrap_or_default()
        };
        let Some(first) = indexes.first().map(at) else { return Bytes::new() };
        let adjacent = indexes.iter().enumerate().all(|(n, index)| {
            let (chunk, offset) = at(index);
            chunk == first.0 && offset as usize == first.1 as usize + n * BLOCK
        });
        if adjacent {
            return slice(first.0, first.1, indexes.len() * BLOCK);
        }
        let mut joined = Vec::with_capacity(indexes.len() * BLOCK);
        for index in indexes {
            let (chunk, offset) = at(index);
            joined.extend_from_slice(&slice(chunk, offset, BLOCK));
        }
        joined.into()
    }

    /// Hashes the blocks of one read and adds those with content; `place(block, hash or zero)` hears of every one.
    pub(crate) fn add(
        &mut self,
        first: u64,
        data: Vec<u8>,
        permit: Permit,
        place: impl FnMut(u64, Option<BlockHash>),
    ) {
        let hashed =
            data.chunks_exact(BLOCK).map(|block| (!is_zero(block)).then(|| hash_block(block))).collect();
        self.add_hashed(first, data, hashed, permit, place);
    }

    /// The same for blocks that were hashed when they were read; `None` for zeros.
    pub(crate) fn add_hashed(
        &mut self,
        first: u64,
        data: Vec<u8>,
        hashed: Vec<Option<BlockHash>>,
        mut permit: Permit,
        mut place: impl FnMut(u64, Option<BlockHash>),
    ) {
        let zeros = hashed.iter().filter(|hash| hash.is_none()).count();
        // Blocks of zeros give their memory back at once, so what is kept must not hold on to it.
        let data = if zeros == 0 {
            data
        } else {
            let kept = data.chunks_exact(BLOCK).zip(&hashed).filter(|(_, hash)| hash.is_some());
            let mut packed = Vec::with_capacity((hashed.len() - zeros) * BLOCK);
            kept.for_each(|(block, _)| packed.extend_from_slice(block));
            packed
        };
        let chunk = self.chunks.len() as u32;
        let mut offset = 0;
        for (block, hash) in (first..).zip(hashed) {
            if let Some(hash) = hash {
                self.blocks.push((chunk, offset));
                self.hashes.push(hash);
                self.places.push(block);
                offset += BLOCK as u32;
            }
            place(block, hash);
        }
        if offset > 0 {
            self.chunks.push(data.into());
            self.permits.push(permit.split(u64::from(offset)));
        }
    }
}

/// Adds a block or a run of zeros to the end of `runs`, merged with the last run where they touch.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    match (runs.last_mut(), run) {
        (Some(Run::Data { first, hashes }), Run::Data { first: next, hashes: more })
            if *first + hashes.len() as u64 == next =>
        {
            hashes.extend(more);
        }
        (Some(Run::Zeros { first, blocks }), Run::Zeros { first: next, blocks: more })
            if *first + *blocks == next =>
        {
            *blocks += more;
        }
        (_, run) => runs.push(run),
    }
}

/// Hashes pieces and gathers them into announcements of at most `most` blocks plus one read.
pub(crate) fn gather(pieces: &Receiver<Piece>, out: &Sender<Batch>, most: usize) {
    let empty = || Batch { disk: 0, audited: false, runs: Vec::new(), data: BatchData::default() };
    let mut batch = empty();
    for piece in pieces {
        let (disk, audited) = match &piece {
            Piece::Data { disk, audited, .. } | Piece::Zeros { disk, audited, .. } => (*disk, *audited),
        };
        let other = (disk, audited) != (batch.disk, batch.audited);
        let full = batch.data.len() >= most || batch.runs.len() >= MOST_RUNS;
        if !batch.runs.is_empty()
            && (other || full)
            && out.send(std::mem::replace(&mut batch, empty())).is_err()
        {
            return;
        }
        (batch.disk, batch.audited) = (disk, audited);
        match piece {
            Piece::Zeros { first, blocks, .. } => push_run(&mut batch.runs, Run::Zeros { first, blocks }),
            Piece::Data { first, data, permit, .. } => {
                let Batch { runs, data: held, .. } = &mut batch;
                held.add(first, data, permit, |block, hash| {
                    let run = match hash {
                        Some(hash) => Run::Data { first: block, hashes: vec![hash] },
                        None => Run::Zeros { first: block, blocks: 1 },
                    };
                    push_run(runs, run);
                });
            }
        }
    }
    if !batch.runs.is_empty() {
        // Nobody left to hear it is no failure of ours: the receiver knows why it left.
        let _ = out.send(batch);
    }
}

/// Runs at which an announcement is sent; one read adds at most 16 more.
pub(crate) const MOST_RUNS: usize = 256;

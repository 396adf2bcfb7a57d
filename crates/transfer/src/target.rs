//! The agent's end of recovering: writes what the server sends, and proves it.
//!
//! A fresh target is known to hold only zeros. A target with content (an interrupted recovery, a recovery by
//! difference) reads and hashes its own blocks and announces them, holes without reading; the server, which
//! knows the point's hashes without decoding anything, answers which blocks are right, which become zeros,
//! and sends the rest.
//!
//! ```text
//! reader -> hasher --Announce, at most so many without an answer--> server
//!                                       Keep | Zeros | Frame <----- server, in the order of the blocks
//! ```
//!
//! Each block is checked against its hash before it is written. At the end everything is flushed and what was
//! written is read back: with the hashes of the blocks that were right it must give the digest of the whole
//! disk.
//!
//! `next` is the block below which everything is done. After a cut it is all that must be known.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use block_io::{BlockDevice, DeviceError, WritableDevice};
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use model::{BLOCK_BYTES, ByteRange};

use crate::digest::ContentDigest;
use crate::hasher::is_zero;
use crate::message::{FromTarget, Run, ToTarget};
use crate::scan::{Budget, DiskReader, MOST_RUNS, Piece, READ_BLOCKS, ScanError, push_run, walk};
use crate::steer::Order;
use crate::{BLOCK, BlockHash, Connector, Link, LinkError, Payload, Steer, blocks_of, hash_block};

/// What is known of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetSettings {
    /// Whether it held only zeros at the start.
    pub fresh: bool,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetReport {
    /// Bytes of the recovered disk.
    pub bytes_logical: u64,
    /// Bytes of the target that were read to be compared.
    pub bytes_compared: u64,
    /// Bytes written, zeros apart.
    pub bytes_written: u64,
    /// Bytes that became zeros.
    pub bytes_zeroed: u64,
    /// Whether everything was proved: what was written by being read back, the rest by being compared.
    pub verified: bool,
    /// Links used after the first.
    pub reconnects: u64,
}

/// Why a recovery ended on the agent.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The target could not be written or read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No link, and none to come.
    #[error(transparent)]
    Link(LinkError),
    /// A person or the server cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The server ended the transfer.
    #[error("the server refused the transfer: {0}")]
    Refused(String),
    /// The server sent what cannot be.
    #[error("the server broke the protocol: {0}")]
    ProtocolBroken(String),
    /// What was read back differs from what was sent.
    #[error("the recovered disk was read back and differs from what was sent")]
    NotVerified,
}

enum Stop {
    Cut,
    Error(TargetError),
}

impl From<LinkError> for Stop {
    fn from(why: LinkError) -> Stop {
        match why {
            LinkError::Cut(_) => Stop::Cut,
            LinkError::Cancelled => Stop::Error(TargetError::Cancelled),
        }
    }
}

impl From<DeviceError> for Stop {
    fn from(error: DeviceError) -> Stop {
        Stop::Error(error.into())
    }
}

fn broken<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Error(TargetError::ProtocolBroken(what.into())))
}

type TargetLink = Arc<dyn Link<FromTarget, ToTarget>>;

/// Writes one recovered disk.
pub struct Target<'a> {
    device: &'a dyn WritableDevice,
    settings: TargetSettings,
    steer: Steer,
    next: u64,
    /// Blocks before `next` that were right, as they were hashed before anything was written.
    kept: ContentDigest,
    written: Marks,
    /// The digest that was asked to be proved, once it is.
    proved: Option<[u8; 32]>,
    report: TargetReport,
    /// Blocks that are read for one announcement.
    pub(crate) announced_blocks: u64,
}

/// Blocks that are read for one announcement: 16 MiB, so that few answers are waited for, and each soon.
const ANNOUNCED_BLOCKS: u64 = 256;
/// Announcements without an answer: with the one at work 144 MiB of disk, which a distant server needs to be
/// busy. Less than [`crate::message::MAX_OPEN_ANNOUNCEMENTS`].
const OPEN_ANNOUNCEMENTS: usize = 8;
/// Bytes that are read and not hashed.
const READ_AHEAD_BYTES: u64 = 8 << 20;

/// One link's blocks.
struct Receiving {
    size: u64,
    end: u64,
    /// End of the message before.
    after: u64,
    /// What was announced of the blocks from `after` on, the first run perhaps only in its rest.
    announced: VecDeque<Run>,
    more: Receiver<Vec<Run>>,
}

impl Receiving {
    /// Goes on to block `to`; `each` hears of the blocks with content that were announced on the way.
    fn advance(&mut self, to: u64, mut each: impl FnMut(u64, &BlockHash)) -> Result<(), Stop> {
        while self.after < to {
            let Some(run) = self.announced.front() else {
                match self.more.try_recv() {
                    Ok(runs) => self.announced.extend(runs),
                    Err(_) => return broken(format!("block {} was not announced", self.after)),
                }
                continue;
            };
            let end = run.blocks().map_or(self.end, |blocks| blocks.end);
            let stop = end.min(to);
            if let Run::Data { first, hashes } = run {
                let passed = (*first..).zip(hashes).skip(self.after.saturating_sub(*first) as usize);
                passed.take_while(|(block, _)| *block < stop).for_each(|(block, hash)| each(block, hash));
            }
            self.after = stop;
            if stop == end {
                self.announced.pop_front();
            }
        }
        Ok(())
    }
}

/// Blocks that this process wrote, a bit each: 2 MiB for a disk of a TiB.
#[derive(Default)]
struct Marks(Vec<u64>);

impl Marks {
    fn add(&mut self, blocks: Range<u64>) {
        let words = blocks.end.div_ceil(64) as usize;
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        for block in blocks {
            if let Some(word) = self.0.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
    }

    fn contains(&self, block: u64) -> bool {
        self.0.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// The next marked blocks that touch, from `from` on.
    fn next(&self, from: u64) -> Option<Range<u64>> {
        let end = self.0.len() as u64 * 64;
        let mut at = from;
        while at < end && !self.contains(at) {
            // Words without a mark at once.
            let word = self.0.get((at / 64) as usize).map_or(0, |word| word >> (at % 64));
            at += u64::from(word.trailing_zeros()).min(64 - at % 64);
        }
        let start = at;
        while self.contains(at) {
            at += 1;
        }
        (start < at).then_some(start..at)
    }
}

impl<'a> Target<'a> {
    /// A target that writes to `device`.
    pub fn new(device: &'a dyn WritableDevice, settings: TargetSettings, steer: Steer) -> Target<'a> {
        Target {
            device,
            settings,
            steer,
            next: 0,
            kept: ContentDigest::default(),
            written: Marks::default(),
            proved: None,
            report: TargetReport::default(),
            announced_blocks: ANNOUNCED_BLOCKS,
        }
    }

    /// Receives everything, over as many links as it takes.
    pub fn run(
        &mut self,
        connector: &mut dyn Connector<FromTarget, ToTarget>,
    ) -> Result<TargetReport, TargetError> {
        let current: Arc<Mutex<Option<TargetLink>>> = Arc::default();
        let hook = Arc::clone(&current);
        let _watch = self.steer.watch(move |order| {
            if let (Order::Cancel, Some(link)) =
                (order, &*hook.lock().unwrap_or_else(PoisonError::into_inner))
            {
                link.close(LinkError::Cancelled);
            }
        });
        let mut links = 0;
        loop {
            if self.steer.is_cancelled() {
                return Err(TargetError::Cancelled);
            }
            let link = match connector.reconnect() {
                Ok(link) => TargetLink::from(link),
                // The server knows that we are done and has gone; only its farewell was lost.
                Err(LinkError::Cut(_)) if self.proved.is_some() => return Ok(self.report.clone()),
                Err(LinkError::Cancelled) => return Err(TargetError::Cancelled),
                Err(why) => return Err(TargetError::Link(why)),
            };
            *current.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&link));
            let result = self.serve(&*link);
            if let Err(Stop::Error(error)) = &result {
                // The server may be gone already; it notices that by itself.
                let _ = link.send(FromTarget::Abort { reason: error.to_string() });
            }
            link.close(match &result {
                _ if self.steer.is_cancelled() => LinkError::Cancelled,
                _ => LinkError::Cut("the agent is done".to_owned()),
            });
            self.report.reconnects = links;
            links += 1;
            match result {
                Ok(()) => return Ok(self.report.clone()),
                Err(_) if self.steer.is_cancelled() => return Err(TargetError::Cancelled),
                Err(Stop::Cut) => {}
                Err(Stop::Error(error)) => return Err(error),
            }
        }
    }

    fn serve(&mut self, link: &dyn Link<FromTarget, ToTarget>) -> Result<(), Stop> {
        let size = self.device.size();
        link.send(FromTarget::Hello { size, next: self.next, fresh: self.settings.fresh })?;
        let (size, from) = match link.receive()? {
            ToTarget::Begin { size, from } => (size, from),
            ToTarget::Refused { reason } => return Err(Stop::Error(TargetError::Refused(reason))),
            _ => return Err(Stop::Cut),
        };
        let end = blocks_of(size);
        if size > self.device.size() || from > end || (from != self.next && from != 0) {
            return broken(format!(
                "it would send {size} bytes from block {from} to a target of {} bytes that is at block {}",
                self.device.size(),
                self.next,
            ));
        }
        if from < self.next {
            self.kept = ContentDigest::default();
            self.proved = None;
        }
        self.report.bytes_logical = size;
        self.next = from;
        let (announced_in, more) = bounded(OPEN_ANNOUNCEMENTS);
        let state = Receiving { size, end, after: from, announced: VecDeque::new(), more };
        if self.settings.fresh {
            // What the server takes for granted.
            if from < end {
                let zeros = vec![Run::Zeros { first: from, blocks: end - from }];
                // The channel is empty.
                let _ = announced_in.try_send(zeros);
            }
            return self.receive(link, state);
        }
        let device = Seen { device: self.device, size };
        let (budget, stop, bytes_read) =
            (Budget::new(READ_AHEAD_BYTES), AtomicBool::new(false), AtomicU64::new(0));
        let failed = OnceLock::new();
        let (pieces_in, pieces) = bounded(2);
        let blocks = self.announced_blocks;
        let result = std::thread::scope(|scope| {
            let (budget, stop, bytes_read, failed, device) = (&budget, &stop, &bytes_read, &failed, &device);
            scope.spawn(move || {
                let reader = DiskReader { disk: 0, device, budget, stop, out: &pieces_in, bytes_read };
                if let Err(ScanError::Device(_, error)) = reader.full(from) {
                    // Whoever waits for the server's next message waits in vain now.
                    let _ = link.send(FromTarget::Abort { reason: error.to_string() });
                    let _ = failed.set(error);
                    link.close(LinkError::Cut("the target cannot be read".to_owned()));
                }
            });
            scope.spawn(move || announce(link, &pieces, &announced_in, blocks));
            let result = self.receive(link, state);
            stop.store(true, Ordering::SeqCst);
            budget.wake();
            result
        });
        self.report.bytes_compared += bytes_read.into_inner();
        match (result, failed.into_inner()) {
            (Err(Stop::Cut), Some(error)) => Err(error.into()),
            (result, _) => result,
        }
    }

    /// Does what the server says, until it closes.
    fn receive(&mut self, link: &dyn Link<FromTarget, ToTarget>, mut state: Receiving) -> Result<(), Stop> {
        loop {
            if self.steer.is_cancelled() {
                return Err(Stop::Error(TargetError::Cancelled));
            }
            match link.receive()? {
                ToTarget::Begin { .. } => {}
                ToTarget::Keep { after, end } => {
                    self.go_on(&mut state, after, end..end)?;
                }
                ToTarget::Zeros { after, first, blocks } => {
                    let end = first.saturating_add(blocks);
                    if self.go_on(&mut state, after, first..end)? {
                        self.zero(state.size, first..end)?;
                    }
                }
                ToTarget::Frame { after, first, hashes, payload } => {
                    let end = first.saturating_add(hashes.len() as u64);
                    if self.go_on(&mut state, after, first..end)? {
                        self.write(state.size, first..end, &hashes, &payload)?;
                        link.send(FromTarget::Written { next: end })?;
                    }
                }
                ToTarget::End { digest, verify, sync } => {
                    if state.after != state.end {
                        // Messages of this link are missing.
                        return Err(Stop::Cut);
                    }
                    self.prove(state.size, digest, verify, sync)?;
                    link.send(FromTarget::Done { digest })?;
                }
                ToTarget::Closed if self.proved.is_some() => return Ok(()),
                ToTarget::Closed => return broken("it closed before the end"),
                ToTarget::Refused { reason } => return Err(Stop::Error(TargetError::Refused(reason))),
            }
        }
    }

    /// Goes on from block `after` to the end of `changed`, keeping what is before it; false for a message
    /// that comes again. Whoever gets true makes the change, or fails for good.
    fn go_on(&mut self, state: &mut Receiving, after: u64, changed: Range<u64>) -> Result<bool, Stop> {
        if after < state.after {
            return Ok(false);
        }
        if after > state.after {
            return Err(Stop::Cut);
        }
        let Range { start, end } = changed;
        if start < after || end < start || end == after || end > state.end {
            return broken(format!(
                "blocks {start} to {end} came, expected some from {after} to at most {}",
                state.end
            ));
        }
        state.advance(start, |block, hash| {
            // What was written before a cut is not proved by what the system's memory holds of it.
            if !self.written.contains(block) {
                self.kept.add(block, hash);
            }
        })?;
        state.advance(end, |_, _| {})?;
        self.next = end;
        Ok(true)
    }

    fn write(
        &mut self,
        size: u64,
        blocks: Range<u64>,
        hashes: &[BlockHash],
        payload: &Payload,
    ) -> Result<(), Stop> {
        let plain: Bytes = match payload.open_checked(hashes) {
            Ok(plain) => plain,
            Err(error) => return broken(format!("blocks from {}: {error}", blocks.start)),
        };
        let offset = blocks.start * BLOCK_BYTES;
        let length = size.saturating_sub(offset).min(plain.len() as u64) as usize;
        self.written.add(blocks);
        self.device.write_at(offset, &plain[..length])?;
        self.report.bytes_written += length as u64;
        Ok(())
    }

    fn zero(&mut self, size: u64, blocks: Range<u64>) -> Result<(), Stop> {
        let end = blocks.end.saturating_mul(BLOCK_BYTES).min(size);
        let range = ByteRange { start: blocks.start * BLOCK_BYTES, end };
        self.written.add(blocks);
        self.device.write_zeros(range)?;
        self.report.bytes_zeroed += range.len();
        Ok(())
    }

    /// Reads blocks, the tail of the disk padded with zeros.
    fn read(&self, size: u64, first: u64, blocks: usize) -> Result<Vec<u8>, DeviceError> {
        let mut data = vec![0; blocks * BLOCK];
        let offset = first * BLOCK_BYTES;
        let length = size.saturating_sub(offset).min(data.len() as u64) as usize;
        self.device.read_at(offset, &mut data[..length])?;
        Ok(data)
    }

    /// Flushes, reads back and compares, once.
    fn prove(&mut self, size: u64, digest: [u8; 32], verify: bool, sync: bool) -> Result<(), Stop> {
        if self.proved == Some(digest) {
            return Ok(());
        }
        if sync {
            self.device.flush()?;
        }
        if verify {
            let mut found = self.kept.clone();
            let device = Seen { device: self.device, size };
            let end = blocks_of(size);
            let mut at = 0;
            // Nothing of a fresh target was compared.
            let all = |at| (self.settings.fresh && at < end).then_some(at..end);
            while let Some(run) = all(at).or_else(|| self.written.next(at)) {
                at = run.end;
                self.read_back(&device, run, &mut found)?;
            }
            if found.finish(size) != digest {
                return Err(Stop::Error(TargetError::NotVerified));
            }
            self.report.verified = true;
        }
        self.proved = Some(digest);
        Ok(())
    }

    fn read_back(&self, device: &Seen, blocks: Range<u64>, found: &mut ContentDigest) -> Result<(), Stop> {
        walk(device, blocks, |run, data| {
            let mut at = run.start;
            while data && at < run.end {
                if self.steer.is_cancelled() {
                    return Err(Stop::Error(TargetError::Cancelled));
                }
                let count = READ_BLOCKS.min(run.end - at);
                let blocks = self.read(device.size, at, count as usize)?;
                for (place, block) in (at..).zip(blocks.chunks_exact(BLOCK)) {
                    if !is_zero(block) {
                        found.add(place, &hash_block(block));
                    }
                }
                at += count;
            }
            Ok(())
        })
    }
}

/// Hashes what was read and announces it, `blocks` read ones at a time. `announced` hears of it first, and
/// its bound is the number of announcements without an answer.
fn announce(
    link: &dyn Link<FromTarget, ToTarget>,
    pieces: &Receiver<Piece>,
    announced: &Sender<Vec<Run>>,
    blocks: u64,
) {
    let tell = |runs: Vec<Run>| {
        announced.send(runs.clone()).is_ok() && link.send(FromTarget::Announce { runs }).is_ok()
    };
    let (mut runs, mut read) = (Vec::new(), 0);
    for piece in pieces {
        match piece {
            Piece::Zeros { first, blocks, .. } => push_run(&mut runs, Run::Zeros { first, blocks }),
            Piece::Data { first, data, .. } => {
                for (block, bytes) in (first..).zip(data.chunks_exact(BLOCK)) {
                    push_run(
                        &mut runs,
                        match is_zero(bytes) {
                            true => Run::Zeros { first: block, blocks: 1 },
                            false => Run::Data { first: block, hashes: vec![hash_block(bytes)] },
                        },
                    );
                }
                read += (data.len() / BLOCK) as u64;
            }
        }
        if read >= blocks || runs.len() >= MOST_RUNS {
            read = 0;
            if !tell(std::mem::take(&mut runs)) {
                // Whoever receives knows why.
                return;
            }
        }
    }
    if !runs.is_empty() {
        tell(runs);
    }
}

/// The reading half of a writable device: as many bytes as the recovered disk has.
struct Seen<'a> {
    device: &'a dyn WritableDevice,
    size: u64,
}

impl BlockDevice for Seen<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.device.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.device.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let found = self.device.next_allocated(from)?;
        let inside = found.map(|range| ByteRange { start: range.start, end: range.end.min(self.size) });
        Ok(inside.filter(|range| range.start < range.end))
    }
}

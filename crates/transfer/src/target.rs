//! The agent's end of recovering: writes what the server sends, and proves it.
//!
//! A fresh target is known to hold only zeros: frames are written, the rest is left. A target with content (an
//! interrupted recovery, a recovery by difference) compares announced hashes with its own blocks, asks for what
//! differs and zeroes what should be zero. Each block is checked against its hash before it is written; at the end
//! everything is flushed, read back and compared as a whole.
//!
//! `next` is the block below which everything is done. After a cut it is all that must be known.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, DeviceError, WritableDevice};
use bytes::Bytes;
use model::{BLOCK_BYTES, ByteRange};

use crate::digest::ContentDigest;
use crate::hasher::is_zero;
use crate::message::{Bitmap, FromTarget, Run, ToTarget};
use crate::scan::{READ_BLOCKS, walk};
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
    /// Bytes written, zeros apart.
    pub bytes_written: u64,
    /// Bytes that became zeros.
    pub bytes_zeroed: u64,
    /// Whether everything was read back and was equal.
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
    /// The digest that was asked to be proved, once it is.
    proved: Option<[u8; 32]>,
    report: TargetReport,
}

/// An announcement whose blocks have not all come.
struct Waiting {
    end: u64,
    wanted: VecDeque<(u64, BlockHash)>,
}

struct Receiving {
    size: u64,
    end: u64,
    hashes_first: bool,
    /// First block that was not announced.
    announced: u64,
    /// End of the frame before.
    after: u64,
    waiting: VecDeque<Waiting>,
}

impl<'a> Target<'a> {
    /// A target that writes to `device`.
    pub fn new(device: &'a dyn WritableDevice, settings: TargetSettings, steer: Steer) -> Target<'a> {
        Target { device, settings, steer, next: 0, proved: None, report: TargetReport::default() }
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
        let (size, from, hashes_first) = match link.receive()? {
            ToTarget::Begin { size, from, hashes_first } => (size, from, hashes_first),
            ToTarget::Refused { reason } => return Err(Stop::Error(TargetError::Refused(reason))),
            _ => return Err(Stop::Cut),
        };
        if size > self.device.size() || from > self.next || (!hashes_first && !self.settings.fresh) {
            return broken(format!(
                "it would send {size} bytes from block {from} (hashes first: {hashes_first}) to a target of {} \
                 bytes that is at block {} (fresh: {})",
                self.device.size(),
                self.next,
                self.settings.fresh
            ));
        }
        self.report.bytes_logical = size;
        self.next = from;
        let mut state = Receiving {
            size,
            end: blocks_of(size),
            hashes_first,
            announced: from,
            after: from,
            waiting: VecDeque::new(),
        };
        loop {
            if self.steer.is_cancelled() {
                return Err(Stop::Error(TargetError::Cancelled));
            }
            match link.receive()? {
                ToTarget::Begin { .. } => {}
                ToTarget::Announce { runs } if state.hashes_first => {
                    self.announced(link, &mut state, &runs)?
                }
                ToTarget::Announce { .. } => return broken("hashes for a fresh target"),
                ToTarget::Frame { after, first, hashes, payload } => {
                    self.frame(link, &mut state, after, first, &hashes, &payload)?;
                }
                ToTarget::End { digest, verify, sync } => {
                    let done = if state.hashes_first { state.announced } else { state.end };
                    if !state.waiting.is_empty() || done != state.end {
                        // Frames of this link are missing.
                        return Err(Stop::Cut);
                    }
                    self.next = state.end;
                    self.prove(size, digest, verify, sync)?;
                    link.send(FromTarget::Done { digest })?;
                }
                ToTarget::Closed if self.proved.is_some() => return Ok(()),
                ToTarget::Closed => return broken("it closed before the end"),
                ToTarget::Refused { reason } => return Err(Stop::Error(TargetError::Refused(reason))),
            }
        }
    }

    fn announced(
        &mut self,
        link: &dyn Link<FromTarget, ToTarget>,
        state: &mut Receiving,
        runs: &[Run],
    ) -> Result<(), Stop> {
        let ranges: Option<Vec<_>> = runs.iter().map(Run::blocks).collect();
        let (first, end) = match ranges.as_deref() {
            Some([first, .., last]) => (first.start, last.end),
            Some([only]) => (only.start, only.end),
            _ => return broken("an announcement of nothing"),
        };
        if end <= state.announced {
            return Ok(());
        }
        if first > state.announced {
            return Err(Stop::Cut);
        }
        let contiguous = ranges.iter().flatten().try_fold(state.announced, |at, range| {
            (range.start == at && range.start < range.end).then_some(range.end)
        });
        if contiguous != Some(end) || end > state.end {
            return broken(format!(
                "announced were blocks {first} to {end}, expected from {} to at most {}",
                state.announced, state.end
            ));
        }
        let mut bits = Vec::new();
        let mut wanted = VecDeque::new();
        for run in runs {
            match run {
                Run::Zeros { first, blocks } => self.make_zero(state.size, *first, first + blocks)?,
                Run::Data { first, hashes } => {
                    let places: Vec<u64> = (*first..).take(hashes.len()).collect();
                    for (places, hashes) in
                        places.chunks(READ_BLOCKS as usize).zip(hashes.chunks(READ_BLOCKS as usize))
                    {
                        let start = places.first().copied().unwrap_or_default();
                        let own = self.read(state.size, start, places.len())?;
                        for ((block, &place), &hash) in own.chunks_exact(BLOCK).zip(places).zip(hashes) {
                            let differs = hash_block(block) != hash;
                            bits.push(differs);
                            if differs {
                                wanted.push_back((place, hash));
                            }
                        }
                    }
                }
            }
        }
        state.announced = end;
        state.waiting.push_back(Waiting { end, wanted });
        link.send(FromTarget::Wanted { first, blocks: Bitmap::new(bits) })?;
        self.settle(link, state)
    }

    /// Tells the server how far everything is done.
    fn settle(&mut self, link: &dyn Link<FromTarget, ToTarget>, state: &mut Receiving) -> Result<(), Stop> {
        let before = self.next;
        while let Some(front) = state.waiting.front() {
            if !front.wanted.is_empty() {
                break;
            }
            self.next = front.end;
            state.waiting.pop_front();
        }
        if self.next > before {
            link.send(FromTarget::Written { next: self.next })?;
        }
        Ok(())
    }

    fn frame(
        &mut self,
        link: &dyn Link<FromTarget, ToTarget>,
        state: &mut Receiving,
        after: u64,
        first: u64,
        hashes: &[BlockHash],
        payload: &Payload,
    ) -> Result<(), Stop> {
        if after < state.after {
            return Ok(());
        }
        if after > state.after {
            return Err(Stop::Cut);
        }
        let end = first.checked_add(hashes.len() as u64).filter(|&end| end <= state.end);
        let Some(end) = end.filter(|_| first >= after && !hashes.is_empty()) else {
            return broken(format!(
                "a frame of {} blocks from {first}, expected from {after} to at most {}",
                hashes.len(),
                state.end
            ));
        };
        if state.hashes_first {
            let Some(waiting) = state.waiting.front_mut() else {
                return broken(format!("block {first} was not asked for"));
            };
            for (place, hash) in (first..).zip(hashes) {
                if waiting.wanted.pop_front() != Some((place, *hash)) {
                    return broken(format!("block {place} was not asked for, or has another hash"));
                }
            }
        }
        let plain: Bytes = match payload.open_checked(hashes) {
            Ok(plain) => plain,
            Err(error) => return broken(format!("blocks from {first}: {error}")),
        };
        let offset = first * BLOCK_BYTES;
        let length = state.size.saturating_sub(offset).min(plain.len() as u64) as usize;
        self.device.write_at(offset, &plain[..length])?;
        self.report.bytes_written += length as u64;
        state.after = end;
        if state.hashes_first {
            return self.settle(link, state);
        }
        self.next = end;
        Ok(link.send(FromTarget::Written { next: end })?)
    }

    /// Reads blocks, the tail of the disk padded with zeros.
    fn read(&self, size: u64, first: u64, blocks: usize) -> Result<Vec<u8>, DeviceError> {
        let mut data = vec![0; blocks * BLOCK];
        let offset = first * BLOCK_BYTES;
        let length = size.saturating_sub(offset).min(data.len() as u64) as usize;
        self.device.read_at(offset, &mut data[..length])?;
        Ok(data)
    }

    fn make_zero(&mut self, size: u64, first: u64, end: u64) -> Result<(), Stop> {
        let mut zeroed = 0;
        walk(&Seen(self.device), first..end, |run, data| {
            let mut at = run.start;
            while data && at < run.end {
                let count = READ_BLOCKS.min(run.end - at);
                if !is_zero(&self.read(size, at, count as usize)?) {
                    let range =
                        ByteRange { start: at * BLOCK_BYTES, end: ((at + count) * BLOCK_BYTES).min(size) };
                    self.device.write_zeros(range)?;
                    zeroed += range.len();
                }
                at += count;
            }
            Ok::<(), DeviceError>(())
        })?;
        self.report.bytes_zeroed += zeroed;
        Ok(())
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
            let mut found = ContentDigest::default();
            walk(&Seen(self.device), 0..blocks_of(size), |run, data| {
                let mut at = run.start;
                while data && at < run.end {
                    if self.steer.is_cancelled() {
                        return Err(Stop::Error(TargetError::Cancelled));
                    }
                    let count = READ_BLOCKS.min(run.end - at);
                    let blocks = self.read(size, at, count as usize)?;
                    for (place, block) in (at..).zip(blocks.chunks_exact(BLOCK)) {
                        if !is_zero(block) {
                            found.add(place, &hash_block(block));
                        }
                    }
                    at += count;
                }
                Ok(())
            })?;
            if found.finish(size) != digest {
                return Err(Stop::Error(TargetError::NotVerified));
            }
            self.report.verified = true;
        }
        self.proved = Some(digest);
        Ok(())
    }
}

/// The reading half of a writable device.
struct Seen<'a>(&'a dyn WritableDevice);

impl BlockDevice for Seen<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.0.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.0.next_allocated(from)
    }
}

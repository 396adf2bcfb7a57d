//! The server's end of protecting: takes announcements, asks for what it lacks, believes nothing else.
//!
//! ```text
//! numbered message: expected number? --no, lower--> repeated: ignored
//!                        |        `---no, higher--> something got lost: the link is given up, resume finds it
//!                        v
//! Announce --> Store::announce, zero   --> open batch --frames--> Store::put --> Received
//!  audited --> Store::equals, occupied --> differs: FullCompare, until FullBegins comes
//! FullBegins --> every block of every disk once more, in order
//! Finish --> nothing open, all covered, digests equal --> Finished
//! ```
//!
//! The state outlives links: [`Reception::serve`] is called again with the next one. An agent can be anyone who
//! stole its key: whatever it sends is checked against what it announced, what was asked for and the sizes that the
//! job knows; the worst it can do is to describe its own disks wrongly.
//!
//! Invariants
//! - A block is stored only after its bytes were hashed by the server or by the hasher in this process. (must)
//! - A full pass announces every block of every disk exactly once. (must: a gap would keep old bytes)
//! - After a find of the audit nothing finishes without a full pass. (must: INV-22)
//! - A message's effect is whole before anything is said about it. (must: a link may break at any word)

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use model::{BLOCK_BYTES, ByteRange, RangeSet};

use crate::digest::digest_runs;
use crate::message::{Bitmap, MAX_OPEN_BATCHES, ReadDisk, Report, Run, ToAgent, ToServer};
use crate::steer::Order;
use crate::{
    BlockHash, Figures, Link, LinkError, Payload, Progress, Steer, Store, StoreError, Verdict, blocks_of,
};

/// Which blocks of a disk the job counts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectedMode {
    /// All of them.
    Full,
    /// At least these bytes; what else is announced comes from the agent's own list.
    Extents {
        /// Bytes that must be announced: what the server wants read again.
        required: RangeSet,
    },
    /// The agent says at the beginning: all of them, or those of its host's tracker and at least these.
    Tracked {
        /// Bytes that must be announced in either case.
        required: RangeSet,
    },
}

/// What the server knows of a disk before the transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedDisk {
    /// Its bytes.
    pub size: u64,
    /// Which blocks must come.
    pub mode: ExpectedMode,
}

/// A block that nothing called changed and that differs from the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditFinding {
    /// Index of the disk.
    pub disk: u32,
    /// Index of the block; of the first of the run, where a hole is occupied in the replica.
    pub block: u64,
}

/// Where the source differs from the replica before the job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// For each disk, whole blocks cut at the disk's end.
    pub ranges: Vec<RangeSet>,
    /// Whether there were more ranges than are listed: the last one of the disk was stretched to cover them.
    pub merged: bool,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// The transfer is complete.
    Finished(Figures),
    /// The link broke or lost messages; serve the next one.
    Cut,
}

/// Why a transfer ended on the server. All are final.
#[derive(Debug, thiserror::Error)]
pub enum ReceptionError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The agent did what no right agent does.
    #[error("the agent broke the protocol: {0}")]
    ProtocolBroken(String),
    /// The agent gave up.
    #[error("the agent gave up: {0}")]
    Agent(String),
    /// A person cancelled, on either side.
    #[error("cancelled")]
    Cancelled,
    /// An earlier connection ended the transfer.
    #[error("the transfer failed before: {0}")]
    FailedBefore(String),
}

/// Most findings and ranges that are remembered.
const MOST_REMEMBERED: usize = 4096;
/// A right agent needs one announcement of the end, or two where messages crossed.
const MOST_EARLY_FINISHES: u32 = 8;

type AgentLink = Arc<dyn Link<ToAgent, ToServer>>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    /// Nothing to send: unchanged, or placed from this job.
    Settled,
    Asked,
    /// The same content is on its way for another place.
    Deferred,
    Stored,
}

struct OpenBatch {
    disk: u32,
    places: Vec<u64>,
    hashes: Vec<BlockHash>,
    blocks: Vec<Block>,
    missing: usize,
}

struct DiskState {
    size: u64,
    full: bool,
    /// Whether the agent chooses between a list and everything, and has not yet said which.
    open: bool,
    /// How the agent said that it reads.
    stated: Option<ReadDisk>,
    required: RangeSet,
    /// First block that may be announced next, audits apart.
    cursor: u64,
    differing: Vec<ByteRange>,
    /// What the pass before counted as changed.
    counted: RangeSet,
}

/// Receives one transfer into a store.
pub struct Reception<'a> {
    store: &'a mut dyn Store,
    progress: &'a dyn Progress,
    steer: Steer,
    disks: Vec<DiskState>,
    next: u64,
    open: BTreeMap<u64, OpenBatch>,
    /// Content that was asked for, and other places that wait for it.
    coming: HashMap<BlockHash, Vec<(u64, u16)>>,
    digest: blake3::Hasher,
    findings: Vec<AuditFinding>,
    full_compare: Option<(u32, String)>,
    full_reason: Option<String>,
    early_finishes: u32,
    figures: Figures,
    merged: bool,
    finished: bool,
    failed: Option<String>,
}

/// Why a connection is not served further.
enum Stop {
    Cut,
    Error(ReceptionError),
}

impl From<LinkError> for Stop {
    fn from(why: LinkError) -> Stop {
        match why {
            LinkError::Cut(_) => Stop::Cut,
            LinkError::Cancelled => Stop::Error(ReceptionError::Cancelled),
        }
    }
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Stop {
        Stop::Error(error.into())
    }
}

fn broken<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Error(ReceptionError::ProtocolBroken(what.into())))
}

impl<'a> Reception<'a> {
    /// A reception of these disks into `store`.
    pub fn new(
        store: &'a mut dyn Store,
        disks: Vec<ExpectedDisk>,
        progress: &'a dyn Progress,
        steer: Steer,
    ) -> Reception<'a> {
        let figures =
            Figures { bytes_logical: disks.iter().map(|disk| disk.size).sum(), ..Figures::default() };
        let disks = disks.into_iter().map(|disk| {
            let open = matches!(disk.mode, ExpectedMode::Tracked { .. });
            let (full, required) = match disk.mode {
                ExpectedMode::Full => (true, RangeSet::new()),
                ExpectedMode::Extents { required } | ExpectedMode::Tracked { required } => {
                    (false, required.rounded_out(BLOCK_BYTES, u64::MAX / BLOCK_BYTES * BLOCK_BYTES))
                }
            };
            DiskState {
                size: disk.size,
                full,
                open,
                stated: None,
                required,
                cursor: 0,
                differing: Vec::new(),
                counted: RangeSet::new(),
            }
        });
        Reception {
            store,
            progress,
            steer,
            disks: disks.collect(),
            next: 0,
            open: BTreeMap::new(),
            coming: HashMap::new(),
            digest: blake3::Hasher::new(),
            findings: Vec::new(),
            full_compare: None,
            full_reason: None,
            early_finishes: 0,
            figures,
            merged: false,
            finished: false,
            failed: None,
        }
    }

    /// Serves one link until the transfer is complete, the link breaks, or the transfer fails for good.
    pub fn serve(&mut self, link: AgentLink) -> Result<Served, ReceptionError> {
        if let Some(why) = &self.failed {
            let _ = link.send(ToAgent::Refused { reason: why.clone() });
            return Err(ReceptionError::FailedBefore(why.clone()));
        }
        let steered = Arc::clone(&link);
        let watch = self.steer.watch(move |order| match order {
            Order::Cancel => steered.close(LinkError::Cancelled),
            // A link that cannot take it is cut; the next one begins with the window of then.
            Order::Window(bytes) => drop(steered.send(ToAgent::Window { bytes })),
        });
        let result = self.run(&*link);
        drop(watch);
        let error = match result {
            Ok(()) => return Ok(Served::Finished(self.figures.clone())),
            Err(_) if self.steer.is_cancelled() => ReceptionError::Cancelled,
            Err(Stop::Cut) => {
                link.close(LinkError::Cut("given up by the server".to_owned()));
                return Ok(Served::Cut);
            }
            Err(Stop::Error(error)) => error,
        };
        self.failed = Some(error.to_string());
        // Best effort: the agent also sees the link end.
        let _ = link.send(ToAgent::Refused { reason: error.to_string() });
        Err(error)
    }

    /// What the audits found.
    pub fn findings(&self) -> &[AuditFinding] {
        &self.findings
    }

    /// Why the agent announced everything although that was not ordered: a find of the audit, or its own reason.
    pub fn full_reason(&self) -> Option<&str> {
        self.full_reason.as_deref()
    }

    /// How the agent said that it reads each disk, once it did.
    pub fn stated(&self) -> Vec<Option<ReadDisk>> {
        self.disks.iter().map(|disk| disk.stated.clone()).collect()
    }

    /// Where the source differs from the replica before the job.
    pub fn differences(&self) -> Differences {
        let ranges = self.disks.iter().map(|disk| {
            let cut = |range: &ByteRange| ByteRange { start: range.start, end: range.end.min(disk.size) };
            disk.differing.iter().map(cut).collect()
        });
        Differences { ranges: ranges.collect(), merged: self.merged }
    }

    /// The figures so far.
    pub fn figures(&self) -> &Figures {
        &self.figures
    }

    fn run(&mut self, link: &dyn Link<ToAgent, ToServer>) -> Result<(), Stop> {
        let ToServer::Hello { next, disks } = link.receive()? else {
            // The rest of an older link, or a lost hello.
            return Err(Stop::Cut);
        };
        if disks.len() != self.disks.len() {
            return broken(format!("it has {} disks, expected {}", disks.len(), self.disks.len()));
        }
        if next < self.next {
            return broken(format!("it is at batch {next}, received were {}", self.next));
        }
        for (index, (found, expected)) in disks.into_iter().zip(&mut self.disks).enumerate() {
            if found.size != expected.size {
                return broken(format!("disk {index} has {} bytes, expected {}", found.size, expected.size));
            }
            match &expected.stated {
                Some(stated) if *stated != found => {
                    return broken(format!("disk {index} is read in another way than at first"));
                }
                Some(_) => {}
                None if expected.open => {
                    (expected.open, expected.full) = (false, found.full);
                    expected.stated = Some(found);
                }
                // What was ordered is held against the announcements, whatever is said here.
                None => expected.stated = Some(found),
            }
        }
        let open = self.open.keys().copied().collect();
        link.send(ToAgent::Resume { next: self.next, finished: self.finished, open })?;
        if self.finished {
            return Ok(());
        }
        if self.steer.window() != u64::MAX {
            link.send(ToAgent::Window { bytes: self.steer.window() })?;
        }
        if let Some((disk, reason)) = self.full_compare.clone() {
            link.send(ToAgent::FullCompare { disk, reason })?;
        }
        for (&batch, open) in &self.open {
            let blocks = open.blocks.iter().map(|block| *block == Block::Asked).collect();
            link.send(ToAgent::Wanted { batch, blocks: Bitmap::new(blocks) })?;
        }
        while !self.finished {
            if self.steer.is_cancelled() {
                return Err(Stop::Error(ReceptionError::Cancelled));
            }
            self.message(link, link.receive()?)?;
            self.progress.update(&self.figures);
        }
        Ok(())
    }

    /// Whether a numbered message is the next one; a repeated one is not, a later one means that some were lost.
    fn is_next(&mut self, batch: u64) -> Result<bool, Stop> {
        match batch.cmp(&self.next) {
            std::cmp::Ordering::Less => Ok(false),
            std::cmp::Ordering::Greater => Err(Stop::Cut),
            std::cmp::Ordering::Equal => {
                self.next = self.next.saturating_add(1);
                Ok(true)
            }
        }
    }

    fn message(&mut self, link: &dyn Link<ToAgent, ToServer>, message: ToServer) -> Result<(), Stop> {
        match message {
            // A repeated one; a new agent process would have a new link.
            ToServer::Hello { .. } => Ok(()),
            ToServer::Abort { reason } => Err(Stop::Error(ReceptionError::Agent(reason))),
            ToServer::Announce { batch, disk, audited, runs } => {
                if !self.is_next(batch)? {
                    return Ok(());
                }
                if self.open.len() >= MAX_OPEN_BATCHES {
                    return broken(format!("more than {MAX_OPEN_BATCHES} batches are open"));
                }
                self.check_runs(disk, audited, &runs)?;
                if audited {
                    self.audit(link, batch, disk, &runs)
                } else {
                    self.announce(link, batch, disk, runs)
                }
            }
            ToServer::Frame { batch, indexes, payload } => self.frame(link, batch, &indexes, payload),
            ToServer::FullBegins { batch, reason } => {
                if !self.is_next(batch)? {
                    return Ok(());
                }
                if self.full_reason.is_some() {
                    return broken("a full pass began twice");
                }
                self.full_compare = None;
                self.full_reason = Some(reason);
                self.digest = blake3::Hasher::new();
                self.figures.bytes_announced = 0;
                for disk in &mut self.disks {
                    (disk.full, disk.cursor) = (true, 0);
                    disk.counted = RangeSet::from_ranges(disk.differing.clone());
                }
                Ok(link.send(ToAgent::Received { batch })?)
            }
            ToServer::Finish { batch, report } => {
                if !self.is_next(batch)? {
                    return Ok(());
                }
                self.finish(link, batch, report)
            }
        }
    }

    /// Checks that an announcement lies on the disk and goes on where the one before ended.
    fn check_runs(&mut self, disk: u32, audited: bool, runs: &[Run]) -> Result<(), Stop> {
        let Some(state) = self.disks.get_mut(disk as usize) else {
            return broken(format!("disk {disk} announced, there are {}", self.disks.len()));
        };
        let end = blocks_of(state.size);
        for run in runs {
            let Some(range) = run.blocks().filter(|range| range.end <= end && range.start < range.end) else {
                return broken(format!("disk {disk} has {end} blocks, announced was {}", shown(run)));
            };
            if audited {
                continue;
            }
            let skips_required = || {
                let skipped = ByteRange { start: state.cursor * BLOCK_BYTES, end: range.start * BLOCK_BYTES };
                overlaps(&state.required, &skipped)
            };
            let gap = range.start > state.cursor;
            if range.start < state.cursor || (gap && (state.full || skips_required())) {
                return broken(format!(
                    "disk {disk}: block {} announced, expected was block {}",
                    range.start, state.cursor
                ));
            }
            state.cursor = range.end;
            self.figures.bytes_announced += (range.end - range.start) * BLOCK_BYTES;
        }
        Ok(())
    }

    fn announce(
        &mut self,
        link: &dyn Link<ToAgent, ToServer>,
        batch: u64,
        disk: u32,
        runs: Vec<Run>,
    ) -> Result<(), Stop> {
        digest_runs(&mut self.digest, disk, &runs);
        let mut open =
            OpenBatch { disk, places: Vec::new(), hashes: Vec::new(), blocks: Vec::new(), missing: 0 };
        for run in runs {
            match run {
                Run::Zeros { first, blocks } => self.zeros(disk, first..first + blocks)?,
                Run::Data { first, hashes } => {
                    for (place, hash) in (first..).zip(hashes) {
                        let block = match self.store.announce(disk, place, &hash)? {
                            Verdict::Unchanged => Block::Settled,
                            Verdict::InJob => {
                                self.differs(disk, place..place + 1, BLOCK_BYTES);
                                Block::Settled
                            }
                            Verdict::Wanted => {
                                self.differs(disk, place..place + 1, BLOCK_BYTES);
                                open.missing += 1;
                                let index = open.blocks.len() as u16;
                                self.ask(batch, index, hash)
                            }
                        };
                        open.places.push(place);
                        open.hashes.push(hash);
                        open.blocks.push(block);
                    }
                }
            }
        }
        if open.missing == 0 {
            return Ok(link.send(ToAgent::Received { batch })?);
        }
        let asked: Vec<bool> = open.blocks.iter().map(|block| *block == Block::Asked).collect();
        self.open.insert(batch, open);
        if asked.contains(&true) {
            link.send(ToAgent::Wanted { batch, blocks: Bitmap::new(asked) })?;
        }
        Ok(())
    }

    /// Asks for content, or waits with it for the same content that is on its way.
    fn ask(&mut self, batch: u64, index: u16, hash: BlockHash) -> Block {
        match self.coming.get_mut(&hash) {
            Some(waiting) => {
                waiting.push((batch, index));
                Block::Deferred
            }
            None => {
                self.coming.insert(hash, Vec::new());
                Block::Asked
            }
        }
    }

    fn zeros(&mut self, disk: u32, blocks: Range<u64>) -> Result<(), Stop> {
        let held = self.store.zero(disk, blocks.clone())?;
        if held > 0 {
            self.differs(disk, blocks, held.saturating_mul(BLOCK_BYTES));
        }
        Ok(())
    }

    fn differs(&mut self, disk: u32, blocks: Range<u64>, bytes: u64) {
        let Some(state) = self.disks.get_mut(disk as usize) else { return };
        let range = ByteRange { start: blocks.start * BLOCK_BYTES, end: blocks.end * BLOCK_BYTES };
        // A second pass meets again what the first one found.
        let only = RangeSet::from_ranges(vec![range]);
        if !state.counted.is_empty() && only.difference(&state.counted).is_empty() {
            return;
        }
        self.figures.bytes_changed += bytes;
        let full = state.differing.len() >= MOST_REMEMBERED;
        match state.differing.last_mut() {
            Some(last) if last.start <= range.start && range.start <= last.end => {
                last.end = last.end.max(range.end);
            }
            Some(last) if full => {
                *last = ByteRange { start: last.start.min(range.start), end: last.end.max(range.end) };
                self.merged = true;
            }
            _ => state.differing.push(range),
        }
    }

    fn audit(
        &mut self,
        link: &dyn Link<ToAgent, ToServer>,
        batch: u64,
        disk: u32,
        runs: &[Run],
    ) -> Result<(), Stop> {
        let mut found = Vec::new();
        for run in runs {
            match run {
                Run::Zeros { first, blocks } => {
                    if self.store.occupied(disk, *first..*first + *blocks)? > 0 {
                        found.push(*first);
                    }
                }
                Run::Data { first, hashes } => {
                    for (place, hash) in (*first..).zip(hashes) {
                        self.figures.bytes_audited += BLOCK_BYTES;
                        if !self.store.equals(disk, place, hash)? {
                            found.push(place);
                        }
                    }
                }
            }
        }
        let left = MOST_REMEMBERED.saturating_sub(self.findings.len());
        self.findings.extend(found.iter().take(left).map(|&block| AuditFinding { disk, block }));
        if let (Some(first), true) =
            (found.first(), self.full_reason.is_none() && self.full_compare.is_none())
        {
            let reason = format!("block {first} differs from the replica and was not listed as changed");
            self.full_compare = Some((disk, reason.clone()));
            link.send(ToAgent::FullCompare { disk, reason })?;
        }
        Ok(link.send(ToAgent::Received { batch })?)
    }

    fn frame(
        &mut self,
        link: &dyn Link<ToAgent, ToServer>,
        batch: u64,
        indexes: &[u16],
        payload: Payload,
    ) -> Result<(), Stop> {
        let Some(open) = self.open.get(&batch) else {
            if batch >= self.next {
                return Err(Stop::Cut);
            }
            // Received completely: a repeated frame.
            return Ok(());
        };
        let ascending = indexes.iter().zip(indexes.iter().skip(1)).all(|(one, next)| one < next);
        let blocks: Option<Vec<(Block, u64, BlockHash)>> = indexes
            .iter()
            .map(|&index| {
                let index = usize::from(index);
                Some((*open.blocks.get(index)?, *open.places.get(index)?, *open.hashes.get(index)?))
            })
            .collect();
        let Some(blocks) = blocks.filter(|blocks| ascending && !blocks.is_empty()) else {
            return broken(format!("a frame of batch {batch} names blocks {indexes:?}"));
        };
        if let Some(unasked) =
            blocks.iter().find(|(block, ..)| matches!(block, Block::Settled | Block::Deferred))
        {
            return broken(format!("a frame of batch {batch} brings block {}, not asked for", unasked.1));
        }
        if blocks.iter().all(|(block, ..)| *block == Block::Stored) {
            return Ok(());
        }
        if blocks.iter().any(|(block, ..)| *block == Block::Stored) {
            return broken(format!("a frame of batch {batch} mixes new and received blocks"));
        }
        let hashes: Vec<BlockHash> = blocks.iter().map(|(.., hash)| *hash).collect();
        let places: Vec<u64> = blocks.iter().map(|(_, place, _)| *place).collect();
        if let Err(error) = payload.check(&hashes) {
            return broken(format!("disk {}, block {}: {error}", open.disk, places.first().unwrap_or(&0)));
        }
        let disk = open.disk;
        self.figures.bytes_transferred += places.len() as u64 * BLOCK_BYTES;
        self.figures.bytes_on_wire += payload.bytes().len() as u64;
        self.store.put(disk, &places, payload.into_frame(hashes.clone()))?;
        for &index in indexes {
            self.settle(batch, index, Block::Stored);
        }
        let mut touched = vec![batch];
        let mut again: BTreeMap<u64, Vec<u16>> = BTreeMap::new();
        for hash in &hashes {
            for (waiting, index) in self.coming.remove(hash).unwrap_or_default() {
                let Some(other) = self.open.get(&waiting) else { continue };
                let Some(&place) = other.places.get(usize::from(index)) else { continue };
                let disk = other.disk;
                match self.store.announce(disk, place, hash)? {
                    Verdict::Wanted => {
                        // The store keeps no copy to share (it may forget): ask for one after all.
                        let block = self.ask(waiting, index, *hash);
                        if let Some(slot) = self
                            .open
                            .get_mut(&waiting)
                            .and_then(|other| other.blocks.get_mut(usize::from(index)))
                        {
                            *slot = block;
                        }
                        if block == Block::Asked {
                            again.entry(waiting).or_default().push(index);
                        }
                    }
                    Verdict::InJob | Verdict::Unchanged => self.settle(waiting, index, Block::Settled),
                }
                touched.push(waiting);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        // The state first and the words after it: where the link breaks between two words, the next hello tells all.
        let is_whole = |open: &BTreeMap<u64, OpenBatch>, batch: &u64| {
            open.get(batch).is_some_and(|open| open.missing == 0)
        };
        touched.retain(|batch| is_whole(&self.open, batch) && self.open.remove(batch).is_some());
        for (batch, indexes) in again {
            let Some(open) = self.open.get(&batch) else { continue };
            let bits = (0..open.blocks.len()).map(|index| indexes.contains(&(index as u16))).collect();
            link.send(ToAgent::Wanted { batch, blocks: Bitmap::new(bits) })?;
        }
        for batch in touched {
            link.send(ToAgent::Received { batch })?;
        }
        Ok(())
    }

    fn settle(&mut self, batch: u64, index: u16, to: Block) {
        let Some(open) = self.open.get_mut(&batch) else { return };
        if let Some(block) = open.blocks.get_mut(usize::from(index)) {
            *block = to;
            open.missing = open.missing.saturating_sub(1);
        }
    }

    fn finish(&mut self, link: &dyn Link<ToAgent, ToServer>, batch: u64, report: Report) -> Result<(), Stop> {
        if !self.open.is_empty() {
            return broken(format!("it finished while {} batches lack data", self.open.len()));
        }
        if let Some((disk, reason)) = self.full_compare.clone() {
            self.early_finishes += 1;
            if self.early_finishes > MOST_EARLY_FINISHES {
                return broken("it finished again and again without the full compare it was asked for");
            }
            link.send(ToAgent::FullCompare { disk, reason })?;
            return Ok(link.send(ToAgent::Received { batch })?);
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let end = blocks_of(disk.size);
            let rest = ByteRange {
                start: disk.cursor.saturating_mul(BLOCK_BYTES),
                end: end.saturating_mul(BLOCK_BYTES),
            };
            if (disk.full && disk.cursor != end) || overlaps(&disk.required, &rest) {
                return broken(format!("disk {index} was announced up to block {} of {end}", disk.cursor));
            }
        }
        if self.digest.finalize() != report.digest {
            return broken("the digest of its announcements is not that of what arrived");
        }
        let rotations = report.next_rotations;
        let on_disk = |(next, disk): (&u64, &DiskState)| *next <= disk.size;
        if rotations.len() != self.disks.len() || !rotations.iter().zip(&self.disks).all(on_disk) {
            return broken("the next rotations do not fit the disks");
        }
        self.figures.bytes_listed = report.bytes_listed;
        self.figures.bytes_read = report.bytes_read;
        self.figures.bytes_audited = report.bytes_audited;
        self.figures.bytes_transferred_again = report.bytes_again;
        self.figures.next_rotations = rotations;
        self.finished = true;
        // A link that breaks here loses nothing: the next hello is answered with `finished`.
        Ok(link.send(ToAgent::Finished)?)
    }
}

fn shown(run: &Run) -> String {
    match run {
        Run::Data { first, hashes } => format!("block {first} and {} in all", hashes.len()),
        Run::Zeros { first, blocks } => format!("{blocks} blocks of zeros from {first}"),
    }
}

fn overlaps(set: &RangeSet, range: &ByteRange) -> bool {
    let after = set.as_slice().partition_point(|held| held.end <= range.start);
    set.as_slice().get(after).is_some_and(|held| held.start < range.end) && !range.is_empty()
}

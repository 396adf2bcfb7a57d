//! The server's end of recovering: reads a recovery point and sends what the target lacks.
//!
//! ```text
//! existing content: Announce --> compared with the point --> what differs is read --> Keep | Zeros | Frame
//! fresh target:     the same for one that holds zeros everywhere, without announcing them
//! both:             <-- Written (everything below is done);  at the end: End --> Done --> Closed
//! ```
//!
//! Only what differs is read and decoded, so damage to what the target has does not matter. Blocks go out in
//! ascending order. What was sent and not written is at most the window; after a cut the target says where it
//! stands and it goes on from there. The digest of the whole content grows as blocks are compared or read for
//! the first time; the target computes its own.
//!
//! Damaged blocks that the target lacks fail the delivery, or, where damage is accepted, are left as zeros
//! and listed exactly.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block_io::{BlockDevice, DeviceError, Pace};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use model::{BLOCK_BYTES, ByteRange, RangeSet};

use crate::digest::ContentDigest;
use crate::frame::Packer;
use crate::hasher::is_zero;
use crate::message::{FromTarget, MAX_OPEN_ANNOUNCEMENTS, Run, ToTarget};
use crate::scan::{BatchData, Budget, Permit, READ_BLOCKS};
use crate::steer::Order;
use crate::{BLOCK, BlockHash, FRAME_BLOCKS, Figures, Link, LinkError, Progress, Steer, blocks_of};

/// How a point is delivered.
#[derive(Clone)]
pub struct DeliverySettings {
    /// Bytes that may be sent and not written.
    pub window_bytes: u64,
    /// zstd level of frames; `None` sends plain, as fits a local network.
    pub compress: Option<i32>,
    /// Whether the target reads back what it wrote and compares the whole.
    pub verify: bool,
    /// Whether the target flushes at the end.
    pub sync: bool,
    /// Whether to go on over damaged blocks and list them.
    pub accept_damage: bool,
    /// Waited for before each frame, by its encoded bytes.
    pub pace: Option<Arc<dyn Pace>>,
}

impl Default for DeliverySettings {
    fn default() -> DeliverySettings {
        DeliverySettings {
            window_bytes: 32 << 20,
            compress: None,
            verify: true,
            sync: true,
            accept_damage: false,
            pace: None,
        }
    }
}

/// What was delivered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeliveryReport {
    /// Counted as for protect; `bytes_read` is what was decoded, `bytes_changed` are the blocks that the
    /// target lacked.
    pub figures: Figures,
    /// Bytes of the disk that could not be read and are zeros in the target.
    pub lost: RangeSet,
    /// Whether the target proved all of it.
    pub verified: bool,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivered {
    /// The target has everything.
    Finished(DeliveryReport),
    /// The link broke or lost messages; serve the next one.
    Cut,
}

/// Why a delivery ended. All are final.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// The point could not be read. `Damaged` says exactly which bytes.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The target is smaller than the disk.
    #[error("the target has {found} bytes, the disk needs {expected}")]
    TargetTooSmall {
        /// Bytes of the disk.
        expected: u64,
        /// Bytes of the target.
        found: u64,
    },
    /// What the target read back is not what was sent.
    #[error("the target read back other bytes than it was sent")]
    NotVerified,
    /// The agent did what no right agent does.
    #[error("the agent broke the protocol: {0}")]
    ProtocolBroken(String),
    /// The agent gave up.
    #[error("the agent gave up: {0}")]
    Agent(String),
    /// A person cancelled, on either side.
    #[error("cancelled")]
    Cancelled,
}

type TargetLink = dyn Link<ToTarget, FromTarget>;

/// Delivers one recovery point's disk to one target.
pub struct Delivery<'a> {
    point: &'a dyn PointDisk,
    settings: DeliverySettings,
    progress: &'a dyn Progress,
    steer: Steer,
    digest: ContentDigest,
    /// First block that is not in the digest.
    digest_to: u64,
    /// First block that was never sent.
    sent_to: u64,
    report: DeliveryReport,
}

enum Stop {
    Cut,
    Error(DeliveryError),
}

impl From<LinkError> for Stop {
    fn from(why: LinkError) -> Stop {
        match why {
            LinkError::Cut(_) => Stop::Cut,
            LinkError::Cancelled => Stop::Error(DeliveryError::Cancelled),
        }
    }
}

fn broken<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Error(DeliveryError::ProtocolBroken(what.into())))
}

/// Blocks as they were read, each with its hash.
struct Blocks {
    bytes: Vec<u8>,
    hashes: Vec<BlockHash>,
}

/// A disk of a recovery point, as a store gives it.
pub trait PointDisk: BlockDevice {
    /// Fills `buf` with whole blocks from block `first` on and gives the hash of each, computed by this process from these very
    /// bytes: a store that proves what it reads has it already. The tail of the disk is padded with zeros.
    fn read_hashed(&self, first: u64, buf: &mut [u8]) -> Result<Vec<BlockHash>, DeviceError>;
    /// Whether block `block` has this hash, or is all zeros if there is none. Asked for every block that a
    /// target has, so nothing is to be read for it; `Damaged` where it is not known what the block was.
    fn is_equal(&self, block: u64, hash: Option<&BlockHash>) -> Result<bool, DeviceError>;
    /// These blocks will be read soon. A hint, which may do nothing.
    fn will_read(&self, _blocks: Range<u64>) {}
}

/// What the reader hands over, ascending and without a gap.
enum Read {
    /// The target has it: `hashes` of each block, none for zeros.
    Same {
        first: u64,
        blocks: u64,
        hashes: Vec<BlockHash>,
    },
    /// Zeros where the target has something else.
    Zeros {
        first: u64,
        blocks: u64,
    },
    Lost {
        first: u64,
        range: ByteRange,
        over_zeros: bool,
    },
    Data {
        first: u64,
        data: Blocks,
        permit: Permit,
        over_zeros: bool,
    },
    /// The end of an announcement.
    Compared,
    Failed(Stop),
}

enum Event {
    Incoming(Result<FromTarget, LinkError>),
    /// More was announced than may be.
    Flood,
    Steered,
}

/// Blocks that were sent and are not written.
struct Outstanding {
    end: u64,
    /// Its memory counts until the target wrote it.
    _data: BatchData,
}

impl<'a> Delivery<'a> {
    /// A delivery of `point`.
    pub fn new(
        point: &'a dyn PointDisk,
        settings: DeliverySettings,
        progress: &'a dyn Progress,
        steer: Steer,
    ) -> Delivery<'a> {
        let figures = Figures { bytes_logical: point.size(), ..Figures::default() };
        Delivery {
            point,
            settings,
            progress,
            steer,
            digest: ContentDigest::default(),
            digest_to: 0,
            sent_to: 0,
            report: DeliveryReport { figures, ..DeliveryReport::default() },
        }
    }

    /// What could not be read so far.
    pub fn lost(&self) -> &RangeSet {
        &self.report.lost
    }

    /// Serves one link until the target has everything, the link breaks, or the delivery fails for good.
    pub fn serve(&mut self, link: Arc<TargetLink>) -> Result<Delivered, DeliveryError> {
        let (events_in, events) = bounded(8192);
        let (announced_in, announced) = bounded(MAX_OPEN_ANNOUNCEMENTS);
        let (steered, steered_events) = (Arc::clone(&link), events_in.clone());
        let watch = self.steer.watch(move |order| {
            if order == Order::Cancel {
                steered.close(LinkError::Cancelled);
            }
            // Where the channel is full the driver has enough events to look at the handle.
            let _ = steered_events.try_send(Event::Steered);
        });
        let budget = Budget::new(self.settings.window_bytes);
        let stop = AtomicBool::new(false);
        let result = std::thread::scope(|scope| {
            let inbox = Arc::clone(&link);
            scope.spawn(move || {
                loop {
                    let message = inbox.receive();
                    let last = message.is_err();
                    let event = match message {
                        Ok(FromTarget::Announce { runs }) => match announced_in.try_send(runs) {
                            // Nobody waits for them where everything was announced.
                            Ok(()) | Err(TrySendError::Disconnected(_)) => continue,
                            Err(TrySendError::Full(_)) => Event::Flood,
                        },
                        message => Event::Incoming(message),
                    };
                    if events_in.send(event).is_err() || last {
                        return;
                    }
                }
            });
            let result = self.run(scope, &*link, &events, announced, &budget, &stop);
            stop.store(true, Ordering::SeqCst);
            budget.wake();
            if let Err(Stop::Error(error)) = &result {
                // Best effort: the agent also sees the link end.
                let _ = link.send(ToTarget::Refused { reason: error.to_string() });
            }
            link.close(match &result {
                _ if self.steer.is_cancelled() => LinkError::Cancelled,
                _ => LinkError::Cut("the server is done".to_owned()),
            });
            drop(events);
            result
        });
        drop(watch);
        match result {
            Ok(()) => Ok(Delivered::Finished(self.report.clone())),
            Err(_) if self.steer.is_cancelled() => Err(DeliveryError::Cancelled),
            Err(Stop::Cut) => Ok(Delivered::Cut),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    fn run<'scope>(
        &mut self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        link: &TargetLink,
        events: &Receiver<Event>,
        announced: Receiver<Vec<Run>>,
        budget: &'scope Arc<Budget>,
        stop: &'scope AtomicBool,
    ) -> Result<(), Stop>
    where
        'a: 'scope,
    {
        let (size, end) = (self.point.size(), blocks_of(self.point.size()));
        let Event::Incoming(hello) = self.wait(events)? else { return Err(Stop::Cut) };
        let FromTarget::Hello { size: target, next, fresh } = hello? else { return Err(Stop::Cut) };
        if target < size {
            return Err(Stop::Error(DeliveryError::TargetTooSmall { expected: size, found: target }));
        }
        if next > end {
            return broken(format!("it has {next} blocks, there are {end}"));
        }
        // What this delivery never saw is not in its digest: a target that knows more begins again.
        let from = if next <= self.digest_to { next } else { 0 };
        link.send(ToTarget::Begin { size, from })?;

        let announced = if fresh { zeros_announced(from, end) } else { announced };
        let reads = start_reading(scope, self.point, from, announced, budget, stop);
        let mut sending = Sending {
            link,
            packer: Packer::new(self.settings.compress),
            outstanding: VecDeque::new(),
            at: from,
            after: from,
            written: from,
        };
        let mut reads = Some(reads);
        loop {
            self.progress.update(&self.report.figures);
            if self.steer.is_cancelled() {
                return Err(Stop::Error(DeliveryError::Cancelled));
            }
            let paused = self.steer.window() == 0;
            let event = match reads.as_ref().filter(|_| !paused && sending.outstanding.len() < 4096) {
                Some(source) => select! {
                    recv(source) -> read => {
                        match read {
                            Ok(read) => self.take(&mut sending, read)?,
                            Err(_) => reads = None,
                        }
                        continue;
                    },
                    recv(events) -> event => event.map_err(|_| Stop::Cut)?,
                },
                None if reads.is_none() && sending.outstanding.is_empty() => break,
                None => events.recv().map_err(|_| Stop::Cut)?,
            };
            match event {
                Event::Steered => {}
                Event::Flood => return broken("it announces more than may wait for an answer"),
                Event::Incoming(message) => self.answer(&mut sending, message?)?,
            }
        }
        if sending.at != end || self.digest_to != end {
            // The reader was stopped; only a cancel does that.
            return Err(Stop::Cut);
        }
        let digest = self.digest.finish(size);
        link.send(ToTarget::End { digest, verify: self.settings.verify, sync: self.settings.sync })?;
        loop {
            match self.wait(events)? {
                Event::Steered | Event::Flood => {}
                Event::Incoming(message) => match message? {
                    FromTarget::Done { digest: found } if found == digest => break,
                    FromTarget::Done { .. } => return Err(Stop::Error(DeliveryError::NotVerified)),
                    FromTarget::Abort { reason } => return Err(Stop::Error(DeliveryError::Agent(reason))),
                    _ => {}
                },
            }
        }
        self.report.verified = self.settings.verify;
        // The target is done whether or not it hears so.
        let _ = link.send(ToTarget::Closed);
        Ok(())
    }

    fn wait(&self, events: &Receiver<Event>) -> Result<Event, Stop> {
        let event = events.recv().map_err(|_| Stop::Cut)?;
        if self.steer.is_cancelled() {
            return Err(Stop::Error(DeliveryError::Cancelled));
        }
        Ok(event)
    }

    fn take(&mut self, sending: &mut Sending<'_>, read: Read) -> Result<(), Stop> {
        match read {
            Read::Failed(stop) => return Err(stop),
            Read::Lost { range, .. } if !self.settings.accept_damage => {
                return Err(Stop::Error(DeliveryError::Device(DeviceError::Damaged {
                    object: "the recovery point".to_owned(),
                    offset: range.start,
                    length: range.len(),
                    reason: "the stored block cannot be read".to_owned(),
                })));
            }
            Read::Lost { first, range, over_zeros } => {
                self.report.lost = self.report.lost.union(&RangeSet::from_ranges(vec![range]));
                self.advance(sending, first + 1);
                if !over_zeros {
                    sending.zeros(first..first + 1)?;
                }
            }
            Read::Zeros { first, blocks } => {
                self.advance(sending, first + blocks);
                sending.zeros(first..first + blocks)?;
            }
            Read::Same { first, blocks, hashes } => {
                let digest_to = self.digest_to;
                for (block, hash) in (first..).zip(&hashes).filter(|(block, _)| *block >= digest_to) {
                    self.digest.add(block, hash);
                }
                self.advance(sending, first + blocks);
            }
            Read::Compared => sending.keep()?,
            Read::Data { first, data, permit, over_zeros } => {
                let Blocks { bytes, hashes } = data;
                let end = first + (bytes.len() / BLOCK) as u64;
                self.report.figures.bytes_read += bytes.len() as u64;
                let blocks = bytes.chunks_exact(BLOCK).zip(hashes);
                let hashes = blocks.map(|(block, hash)| (!is_zero(block)).then_some(hash)).collect();
                let mut held = BatchData::default();
                let (digest, digest_to) = (&mut self.digest, self.digest_to);
                held.add_hashed(first, bytes, hashes, permit, |block, hash| {
                    if let Some(hash) = hash
                        && block >= digest_to
                    {
                        digest.add(block, &hash);
                    }
                });
                self.advance(sending, end);
                self.send_blocks(sending, first..end, &held, over_zeros)?;
                if let Some(last) = held.places.last() {
                    sending.outstanding.push_back(Outstanding { end: last + 1, _data: held });
                }
            }
        }
        Ok(())
    }

    fn advance(&mut self, sending: &mut Sending<'_>, to: u64) {
        self.report.figures.bytes_announced += to.saturating_sub(self.digest_to) * BLOCK_BYTES;
        sending.at = to;
        self.digest_to = self.digest_to.max(to);
    }

    /// Packs and sends the blocks of `range`, adjacent ones together; those that `data` leaves out are zeros.
    fn send_blocks(
        &mut self,
        sending: &mut Sending<'_>,
        range: Range<u64>,
        data: &BatchData,
        over_zeros: bool,
    ) -> Result<(), Stop> {
        let all: Vec<u16> = (0..data.len() as u16).collect();
        let place = |index: u16| data.places.get(usize::from(index)).copied().unwrap_or_default();
        let adjacent = all.chunk_by(|&one, &next| place(one) + 1 == place(next));
        let mut at = range.start;
        for group in adjacent.flat_map(|run| run.chunks(FRAME_BLOCKS)) {
            let Some(&lead) = group.first() else { continue };
            let first = place(lead);
            let end = first + group.len() as u64;
            if !over_zeros {
                sending.zeros(at..first)?;
            }
            at = end;
            let hashes: Vec<_> =
                group.iter().filter_map(|&index| data.hashes.get(usize::from(index)).copied()).collect();
            let payload = sending.packer.pack(data.join(group), hashes.clone());
            if let Some(pace) = &self.settings.pace {
                pace.wait(payload.bytes().len() as u64);
            }
            let bytes = group.len() as u64 * BLOCK_BYTES;
            let new = end.saturating_sub(self.sent_to.max(first)) * BLOCK_BYTES;
            let figures = &mut self.report.figures;
            figures.bytes_changed += new;
            figures.bytes_transferred += new;
            figures.bytes_transferred_again += bytes - new;
            figures.bytes_on_wire += payload.bytes().len() as u64;
            self.sent_to = self.sent_to.max(end);
            sending.link.send(ToTarget::Frame { after: sending.after, first, hashes, payload })?;
            sending.after = end;
        }
        if over_zeros { Ok(()) } else { sending.zeros(at..range.end) }
    }

    fn answer(&mut self, sending: &mut Sending<'_>, message: FromTarget) -> Result<(), Stop> {
        match message {
            FromTarget::Hello { .. } => Ok(()),
            FromTarget::Abort { reason } => Err(Stop::Error(DeliveryError::Agent(reason))),
            FromTarget::Done { .. } => broken("it is done before everything was sent"),
            FromTarget::Written { next } => {
                if next > sending.at {
                    return broken(format!("it wrote up to block {next}, sent was up to {}", sending.at));
                }
                sending.written = sending.written.max(next);
                sending.release();
                Ok(())
            }
            // Goes to the reader.
            FromTarget::Announce { .. } => Ok(()),
        }
    }
}

/// The state of one link.
struct Sending<'l> {
    link: &'l TargetLink,
    packer: Packer,
    outstanding: VecDeque<Outstanding>,
    /// Where the reader is.
    at: u64,
    /// End of the message before.
    after: u64,
    /// The highest `next` that the target told.
    written: u64,
}

impl Sending<'_> {
    /// Lets go of what is written.
    fn release(&mut self) {
        let written = self.written;
        while self.outstanding.front().is_some_and(|front| front.end <= written) {
            self.outstanding.pop_front();
        }
    }

    /// Has `blocks` made zeros.
    fn zeros(&mut self, blocks: Range<u64>) -> Result<(), Stop> {
        if blocks.is_empty() {
            return Ok(());
        }
        let count = blocks.end - blocks.start;
        self.link.send(ToTarget::Zeros { after: self.after, first: blocks.start, blocks: count })?;
        self.after = blocks.end;
        Ok(())
    }

    /// Says that there is nothing more to change so far.
    fn keep(&mut self) -> Result<(), Stop> {
        if self.after < self.at {
            self.link.send(ToTarget::Keep { after: self.after, end: self.at })?;
            self.after = self.at;
        }
        Ok(())
    }
}

/// The announcement of a fresh target, which need not make it.
fn zeros_announced(from: u64, end: u64) -> Receiver<Vec<Run>> {
    let (announced_in, announced) = bounded(1);
    // The channel is empty.
    let _ = announced_in.try_send(vec![Run::Zeros { first: from, blocks: end.saturating_sub(from) }]);
    announced
}

/// Where an announcement ends that goes on at block `at` of `end`; `None` for one that comes again.
fn announced_end(runs: &[Run], at: u64, end: u64) -> Result<Option<u64>, Stop> {
    let ranges: Option<Vec<_>> = runs.iter().map(Run::blocks).collect();
    let (first, last) = match ranges.as_deref() {
        Some([first, .., last]) => (first.start, last.end),
        Some([only]) => (only.start, only.end),
        _ => return broken("an announcement of nothing"),
    };
    if last <= at {
        return Ok(None);
    }
    if first > at {
        return Err(Stop::Cut);
    }
    let contiguous = ranges
        .iter()
        .flatten()
        .try_fold(at, |at, range| (range.start == at && range.start < range.end).then_some(range.end));
    if contiguous != Some(last) || last > end {
        return broken(format!("it announced blocks {first} to {last}, expected from {at} to at most {end}"));
    }
    Ok(Some(last))
}

/// Threads that read the point side by side: decoding is most of the work, and a store that must seek answers several
/// questions sooner than one after another.
const READERS: usize = 4;
/// Reads of 1 MiB that are under way or wait for those before them.
const READS_AHEAD: usize = 8;

/// What the point is made of, in order; data is still being read.
enum Queued {
    Now(Read),
    Later {
        first: u64,
        count: u64,
        permit: Permit,
        over_zeros: bool,
        reply: Receiver<Result<Blocks, DeviceError>>,
    },
}

/// One read of adjacent blocks.
struct Task {
    first: u64,
    count: u64,
    reply: Sender<Result<Blocks, DeviceError>>,
}

fn read_blocks(point: &dyn PointDisk, first: u64, count: u64) -> Result<Blocks, DeviceError> {
    let mut bytes = vec![0; count as usize * BLOCK];
    let hashes = point.read_hashed(first, &mut bytes)?;
    if hashes.len() as u64 != count {
        let reason = format!("{} blocks have {} hashes", count, hashes.len());
        let (offset, length) = (first * BLOCK_BYTES, count * BLOCK_BYTES);
        return Err(DeviceError::Damaged { object: "the recovery point".to_owned(), offset, length, reason });
    }
    Ok(Blocks { bytes, hashes })
}

/// Starts the threads that compare what is announced from block `from` on with `point`, read what differs and
/// hand over what they find, in order.
fn start_reading<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    point: &'scope dyn PointDisk,
    from: u64,
    announced: Receiver<Vec<Run>>,
    budget: &'scope Arc<Budget>,
    stop: &'scope AtomicBool,
) -> Receiver<Read> {
    let (reads_in, reads) = bounded(2);
    let (queue, queued) = bounded(READS_AHEAD);
    let (tasks, tasks_out) = bounded::<Task>(READS_AHEAD);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(READERS);
    for _ in 0..threads {
        let tasks = tasks_out.clone();
        scope.spawn(move || {
            for Task { first, count, reply } in tasks {
                // Whoever asked may have gone meanwhile.
                let _ = reply.send(read_blocks(point, first, count));
            }
        });
    }
    scope.spawn(move || in_order(point, &queued, &reads_in));
    let reader = PointReader { point, budget, stop, queue, tasks };
    scope.spawn(move || reader.run(from, &announced));
    reads
}

/// Hands on what is queued, waiting for the reads; where one fails by damage, block by block.
fn in_order(point: &dyn PointDisk, queued: &Receiver<Queued>, out: &Sender<Read>) {
    for item in queued {
        let read = match item {
            Queued::Now(read) => read,
            Queued::Later { first, count, mut permit, over_zeros, reply } => match reply.recv() {
                Ok(Ok(data)) => Read::Data { first, data, permit, over_zeros },
                Ok(Err(DeviceError::Damaged { .. })) => {
                    for block in first..first + count {
                        let read = match read_blocks(point, block, 1) {
                            Ok(data) => {
                                let permit = permit.split(BLOCK_BYTES);
                                Read::Data { first: block, data, permit, over_zeros }
                            }
                            Err(DeviceError::Damaged { .. }) => {
                                let start = block * BLOCK_BYTES;
                                let end = (start + BLOCK_BYTES).min(point.size());
                                Read::Lost { first: block, range: ByteRange { start, end }, over_zeros }
                            }
                            Err(error) => Read::Failed(Stop::Error(error.into())),
                        };
                        let failed = matches!(read, Read::Failed(_));
                        if out.send(read).is_err() || failed {
                            return;
                        }
                    }
                    continue;
                }
                Ok(Err(error)) => Read::Failed(Stop::Error(error.into())),
                // The thread that was to read is gone, and the scope says why.
                Err(_) => return,
            },
        };
        let failed = matches!(read, Read::Failed(_));
        // If nobody listens, nobody asks why.
        if out.send(read).is_err() || failed {
            return;
        }
    }
}

/// Data of which storage is told before it is read, at most: what a point got in many increments lies scattered, and a storage
/// that is asked for one piece after the other answers each after its latency.
const TOLD_AHEAD: u64 = (16 << 20) / BLOCK_BYTES;

/// Announced zeros beyond so many blocks are passed over where the point has zeros, too; to look for its next
/// data costs as much as to compare that many blocks, or more.
const PASSED_OVER: u64 = 64;

/// What comes next. Storage has been told of it, unless the reading threads waited for it.
#[derive(Default)]
struct Ahead {
    parts: VecDeque<Part>,
    /// Blocks that are still to be read.
    data: u64,
}

enum Part {
    Now(Read),
    Data { blocks: Range<u64>, over_zeros: bool },
}

/// What a block of the point is to a target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compared {
    /// What it has.
    Same,
    /// Zeros, which it has not.
    Zeros,
    /// To be read.
    Other,
}

struct PointReader<'s> {
    point: &'s dyn PointDisk,
    budget: &'s Arc<Budget>,
    stop: &'s AtomicBool,
    queue: Sender<Queued>,
    tasks: Sender<Task>,
}

/// The reasons to end early.
enum ReadStop {
    Failed(Stop),
    Gone,
}

impl From<Stop> for ReadStop {
    fn from(stop: Stop) -> ReadStop {
        ReadStop::Failed(stop)
    }
}

impl From<DeviceError> for ReadStop {
    fn from(error: DeviceError) -> ReadStop {
        ReadStop::Failed(Stop::Error(error.into()))
    }
}

impl PointReader<'_> {
    fn run(&self, from: u64, announced: &Receiver<Vec<Run>>) {
        let mut ahead = Ahead::default();
        let result = self.read_from(from, announced, &mut ahead);
        let caught_up = self.catch_up(&mut ahead, 0);
        if let (Err(ReadStop::Failed(stop)), Ok(())) = (result, caught_up) {
            // If nobody listens, nobody asks why.
            let _ = self.queue.send(Queued::Now(Read::Failed(stop)));
        }
    }

    fn read_from(
        &self,
        from: u64,
        announced: &Receiver<Vec<Run>>,
        ahead: &mut Ahead,
    ) -> Result<(), ReadStop> {
        let end = blocks_of(self.point.size());
        let mut at = from;
        while at < end {
            let runs = match announced.try_recv() {
                Ok(runs) => runs,
                Err(_) => {
                    // The target may be waiting for an answer to what is ahead.
                    self.catch_up(ahead, 0)?;
                    announced.recv().map_err(|_| ReadStop::Gone)?
                }
            };
            let Some(to) = announced_end(&runs, at, end)? else { continue };
            for run in &runs {
                self.compare(ahead, run)?;
            }
            ahead.parts.push_back(Part::Now(Read::Compared));
            at = to;
        }
        Ok(())
    }

    /// Finds what differs from what the target says it has.
    fn compare(&self, ahead: &mut Ahead, run: &Run) -> Result<(), ReadStop> {
        let (first, end, hashes) = match run {
            Run::Data { first, hashes } => (*first, first + hashes.len() as u64, Some(hashes)),
            Run::Zeros { first, blocks } => (*first, first + blocks, None),
        };
        let hash = |block: u64| hashes.and_then(|hashes| hashes.get((block - first) as usize));
        let (mut at, mut alike, mut kind) = (first, first..first, Compared::Same);
        while at < end {
            let found = self.compare_block(at, hash(at))?;
            // Reads end at multiples of 1 MiB, so that frames of adjacent blocks lie in one buffer.
            if found != kind || (kind == Compared::Other && at % READ_BLOCKS == 0) {
                self.compared(ahead, run, std::mem::replace(&mut alike, at..at), kind)?;
                kind = found;
            }
            at += 1;
            if found == Compared::Same && hashes.is_none() && end - at > PASSED_OVER {
                at = self.next_data(at)?.min(end);
            }
            alike.end = at;
        }
        self.compared(ahead, run, alike, kind)
    }

    fn compare_block(&self, block: u64, hash: Option<&BlockHash>) -> Result<Compared, DeviceError> {
        let is_equal = |hash| match self.point.is_equal(block, hash) {
            // What it was is lost with its place in the map, which whoever reads it finds.
            Err(DeviceError::Damaged { .. }) => Ok(false),
            known => known,
        };
        Ok(match is_equal(hash)? {
            true => Compared::Same,
            false if hash.is_some() && is_equal(None)? => Compared::Zeros,
            false => Compared::Other,
        })
    }

    /// The first block from `at` on that may hold data.
    fn next_data(&self, at: u64) -> Result<u64, DeviceError> {
        match self.point.next_allocated(at.saturating_mul(BLOCK_BYTES)) {
            Ok(None) => Ok(u64::MAX),
            Ok(Some(range)) => Ok((range.start / BLOCK_BYTES).max(at)),
            // Even the map of holes is damaged: block by block.
            Err(DeviceError::Damaged { .. }) => Ok(at),
            Err(error) => Err(error),
        }
    }

    /// Puts blocks that are all alike behind what is there already; tells storage of those to be read, and
    /// reads what is far enough in front.
    fn compared(
        &self,
        ahead: &mut Ahead,
        run: &Run,
        blocks: Range<u64>,
        kind: Compared,
    ) -> Result<(), ReadStop> {
        if blocks.is_empty() {
            return Ok(());
        }
        let (first, count) = (blocks.start, blocks.end - blocks.start);
        match kind {
            Compared::Same => {
                let hashes = match run {
                    Run::Data { first: start, hashes } => {
                        hashes.iter().skip((first - start) as usize).take(count as usize).copied().collect()
                    }
                    Run::Zeros { .. } => Vec::new(),
                };
                ahead.parts.push_back(Part::Now(Read::Same { first, blocks: count, hashes }));
            }
            Compared::Zeros => {
                ahead.parts.push_back(Part::Now(Read::Zeros { first, blocks: count }));
            }
            Compared::Other => {
                // Threads that have nothing to do get this at once, and storage hears of it from them.
                if !self.tasks.is_empty() {
                    self.point.will_read(blocks.clone());
                }
                let over_zeros = matches!(run, Run::Zeros { .. });
                ahead.parts.push_back(Part::Data { blocks, over_zeros });
                ahead.data += count;
                self.catch_up(ahead, TOLD_AHEAD)?;
            }
        }
        Ok(())
    }

    /// Reads until no more than `left` blocks of data are ahead, and what keeps the reading threads busy.
    fn catch_up(&self, ahead: &mut Ahead, left: u64) -> Result<(), ReadStop> {
        while left == 0 || ahead.data > left || self.tasks.is_empty() {
            match ahead.parts.pop_front() {
                None => break,
                Some(Part::Now(read)) => self.send(Queued::Now(read))?,
                Some(Part::Data { blocks, over_zeros }) => {
                    ahead.data -= blocks.end - blocks.start;
                    self.data(blocks, over_zeros)?;
                }
            }
        }
        Ok(())
    }

    fn send(&self, item: Queued) -> Result<(), ReadStop> {
        self.queue.send(item).map_err(|_| ReadStop::Gone)
    }

    fn data(&self, blocks: Range<u64>, over_zeros: bool) -> Result<(), ReadStop> {
        let (first, count) = (blocks.start, blocks.end - blocks.start);
        let permit = self.budget.take(count * BLOCK_BYTES, self.stop).ok_or(ReadStop::Gone)?;
        let (reply, answer) = bounded(1);
        self.tasks.send(Task { first, count, reply }).map_err(|_| ReadStop::Gone)?;
        self.send(Queued::Later { first, count, permit, over_zeros, reply: answer })
    }
}

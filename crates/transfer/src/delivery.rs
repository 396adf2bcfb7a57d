//! The server's end of recovering: reads a recovery point and sends what the target lacks.
//!
//! ```text
//! fresh target:     reader --> Frame, Frame ...            what frames leave out is zeros
//! existing content: reader --> Announce --Wanted--> Frame  the target makes its own zeros
//! both:             <-- Written (everything below is done);  at the end: End --> Done --> Closed
//! ```
//!
//! Blocks go out in ascending order. What was sent and not written is at most the window; after a cut the target
//! says where it stands and the point is read again from there. The digest of the whole content grows as blocks
//! are read for the first time, and the target computes its own from what it reads back.
//!
//! Damaged blocks fail the delivery, or, where damage is accepted, are left as zeros and listed exactly.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block_io::{BlockDevice, DeviceError, Pace};
use crossbeam_channel::{Receiver, Sender, bounded, select};
use model::{BLOCK_BYTES, ByteRange, RangeSet};

use crate::digest::ContentDigest;
use crate::frame::Packer;
use crate::hasher::is_zero;
use crate::message::{FromTarget, MAX_RUNS, Run, ToTarget};
use crate::scan::{BatchData, Budget, Permit, READ_BLOCKS, push_run, walk};
use crate::steer::Order;
use crate::{BLOCK, BlockHash, FRAME_BLOCKS, Figures, Link, LinkError, Progress, Steer, blocks_of};

/// How a point is delivered.
#[derive(Clone)]
pub struct DeliverySettings {
    /// Bytes that may be sent and not written.
    pub window_bytes: u64,
    /// zstd level of frames; `None` sends plain, as fits a local network.
    pub compress: Option<i32>,
    /// Whether the target reads everything back and compares.
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
    /// Counted as for protect; `bytes_changed` are the blocks that the target lacked.
    pub figures: Figures,
    /// Bytes of the disk that could not be read and are zeros in the target.
    pub lost: RangeSet,
    /// Whether the target read everything back and it was equal.
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
    /// These blocks will be read soon. A hint, which may do nothing.
    fn will_read(&self, _blocks: Range<u64>) {}
}

/// What the reader hands over, ascending and without a gap.
enum Read {
    Zeros { first: u64, blocks: u64 },
    Lost { first: u64, range: ByteRange },
    Data { first: u64, data: Blocks, permit: Permit },
    Failed(DeviceError),
}

enum Event {
    Incoming(Result<FromTarget, LinkError>),
    Steered,
}

/// Blocks that were announced or sent and are not written.
struct Outstanding {
    first: u64,
    end: u64,
    /// Still needed until the target says which it wants.
    data: BatchData,
    /// The frames went out; false while the answer to an announcement is missing.
    sent: bool,
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
                    if events_in.send(Event::Incoming(message)).is_err() || last {
                        return;
                    }
                }
            });
            let result = self.run(scope, &*link, &events, &budget, &stop);
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
        // What this delivery never read is not in its digest: a target that knows more begins again.
        let from = next.min(self.digest_to);
        link.send(ToTarget::Begin { size, from, hashes_first: !fresh })?;

        let reads = start_reading(scope, self.point, from, budget, stop);
        let mut sending = Sending {
            link,
            fresh,
            packer: Packer::new(self.settings.compress),
            outstanding: VecDeque::new(),
            runs: Vec::new(),
            runs_first: from,
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
                            Err(_) => {
                                reads = None;
                                sending.flush_runs(BatchData::default())?;
                            }
                        }
                        continue;
                    },
                    recv(events) -> event => event.map_err(|_| Stop::Cut)?,
                },
                None if reads.is_none() && sending.outstanding.is_empty() => break,
                None => events.recv().map_err(|_| Stop::Cut)?,
            };
            if let Event::Incoming(message) = event {
                self.answer(&mut sending, message?)?;
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
                Event::Steered => {}
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
            Read::Failed(error) => return Err(Stop::Error(error.into())),
            Read::Lost { range, .. } if !self.settings.accept_damage => {
                return Err(Stop::Error(DeliveryError::Device(DeviceError::Damaged {
                    object: "the recovery point".to_owned(),
                    offset: range.start,
                    length: range.len(),
                    reason: "the stored block cannot be read".to_owned(),
                })));
            }
            Read::Lost { first, range } => {
                self.report.lost = self.report.lost.union(&RangeSet::from_ranges(vec![range]));
                self.pass_zeros(sending, first, 1)?;
            }
            Read::Zeros { first, blocks } => self.pass_zeros(sending, first, blocks)?,
            Read::Data { first, data, permit } => {
                let Blocks { bytes, hashes } = data;
                let count = (bytes.len() / BLOCK) as u64;
                self.report.figures.bytes_read += bytes.len() as u64;
                let blocks = bytes.chunks_exact(BLOCK).zip(hashes);
                let hashes = blocks.map(|(block, hash)| (!is_zero(block)).then_some(hash)).collect();
                let mut held = BatchData::default();
                let (digest, digest_to) = (&mut self.digest, self.digest_to);
                let runs = &mut sending.runs;
                held.add_hashed(first, bytes, hashes, permit, |block, hash| {
                    let run = match hash {
                        Some(hash) => {
                            if block >= digest_to {
                                digest.add(block, &hash);
                            }
                            Run::Data { first: block, hashes: vec![hash] }
                        }
                        None => Run::Zeros { first: block, blocks: 1 },
                    };
                    push_run(runs, run);
                });
                self.advance(sending, first + count);
                if sending.fresh {
                    sending.runs.clear();
                    let all: Vec<u16> = (0..held.len() as u16).collect();
                    self.send_blocks(sending, &held, &all)?;
                    if held.len() > 0 {
                        sending.outstanding.push_back(Outstanding {
                            first,
                            end: sending.after,
                            data: held,
                            sent: true,
                        });
                    }
                } else {
                    sending.flush_runs(held)?;
                }
            }
        }
        Ok(())
    }

    fn pass_zeros(&mut self, sending: &mut Sending<'_>, first: u64, blocks: u64) -> Result<(), Stop> {
        self.advance(sending, first + blocks);
        if !sending.fresh {
            push_run(&mut sending.runs, Run::Zeros { first, blocks });
            if sending.runs.len() >= MAX_RUNS / 2 {
                sending.flush_runs(BatchData::default())?;
            }
        }
        Ok(())
    }

    fn advance(&mut self, sending: &mut Sending<'_>, to: u64) {
        self.report.figures.bytes_announced += to.saturating_sub(self.digest_to) * BLOCK_BYTES;
        sending.at = to;
        self.digest_to = self.digest_to.max(to);
    }

    /// Packs and sends blocks of `data`, adjacent ones together.
    fn send_blocks(
        &mut self,
        sending: &mut Sending<'_>,
        data: &BatchData,
        which: &[u16],
    ) -> Result<(), Stop> {
        let place = |index: u16| data.places.get(usize::from(index)).copied().unwrap_or_default();
        let adjacent = which.chunk_by(|&one, &next| place(one) + 1 == place(next));
        for group in adjacent.flat_map(|run| run.chunks(FRAME_BLOCKS)) {
            let Some(&lead) = group.first() else { continue };
            let first = place(lead);
            let end = first + group.len() as u64;
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
        Ok(())
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
            FromTarget::Wanted { first, blocks } => {
                let Some(index) = sending.outstanding.iter().position(|waiting| !waiting.sent) else {
                    return Ok(());
                };
                let Some(waiting) = sending.outstanding.get_mut(index) else { return Ok(()) };
                if waiting.first > first {
                    // An answer that comes twice.
                    return Ok(());
                }
                if waiting.first < first {
                    return Err(Stop::Cut);
                }
                if waiting.data.len() != blocks.len() {
                    return broken(format!(
                        "it answered for {} blocks from block {first}, announced were {}",
                        blocks.len(),
                        waiting.data.len()
                    ));
                }
                waiting.sent = true;
                let data = std::mem::take(&mut waiting.data);
                let which: Vec<u16> = blocks.ones().map(|index| index as u16).collect();
                self.send_blocks(sending, &data, &which)?;
                // Its memory counts until the target wrote it.
                if let Some(waiting) = sending.outstanding.get_mut(index) {
                    waiting.data = data;
                }
                // An answer that was overtaken by the word that its blocks are done.
                sending.release();
                Ok(())
            }
        }
    }
}

/// The state of one link.
struct Sending<'l> {
    link: &'l TargetLink,
    fresh: bool,
    packer: Packer,
    outstanding: VecDeque<Outstanding>,
    runs: Vec<Run>,
    runs_first: u64,
    at: u64,
    after: u64,
    /// The highest `next` that the target told.
    written: u64,
}

impl Sending<'_> {
    /// Lets go of what is answered and written.
    fn release(&mut self) {
        let written = self.written;
        while self.outstanding.front().is_some_and(|front| front.sent && front.end <= written) {
            self.outstanding.pop_front();
        }
    }

    fn flush_runs(&mut self, data: BatchData) -> Result<(), Stop> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let runs = std::mem::take(&mut self.runs);
        let first = std::mem::replace(&mut self.runs_first, self.at);
        self.link.send(ToTarget::Announce { runs })?;
        self.outstanding.push_back(Outstanding { first, end: self.at, data, sent: false });
        Ok(())
    }
}

/// Threads that read the point side by side: decoding is most of the work, and a store that must seek answers several
/// questions sooner than one after another.
const READERS: usize = 4;
/// Reads of 1 MiB that are under way or wait for those before them.
const READS_AHEAD: usize = 8;

/// What the point is made of, in order; data is still being read.
enum Queued {
    Now(Read),
    Later { first: u64, count: u64, permit: Permit, reply: Receiver<Result<Blocks, DeviceError>> },
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

/// Starts the threads that read `point` from block `from` on and hand over what they find, in order.
fn start_reading<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    point: &'scope dyn PointDisk,
    from: u64,
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
    scope.spawn(move || reader.run(from));
    reads
}

/// Hands on what is queued, waiting for the reads; where one fails by damage, block by block.
fn in_order(point: &dyn PointDisk, queued: &Receiver<Queued>, out: &Sender<Read>) {
    for item in queued {
        let read = match item {
            Queued::Now(read) => read,
            Queued::Later { first, count, mut permit, reply } => match reply.recv() {
                Ok(Ok(data)) => Read::Data { first, data, permit },
                Ok(Err(DeviceError::Damaged { .. })) => {
                    for block in first..first + count {
                        let read = match read_blocks(point, block, 1) {
                            Ok(data) => {
                                let permit = permit.split(BLOCK_BYTES);
                                Read::Data { first: block, data, permit }
                            }
                            Err(DeviceError::Damaged { .. }) => {
                                let start = block * BLOCK_BYTES;
                                let end = (start + BLOCK_BYTES).min(point.size());
                                Read::Lost { first: block, range: ByteRange { start, end } }
                            }
                            Err(error) => Read::Failed(error),
                        };
                        let failed = matches!(read, Read::Failed(_));
                        if out.send(read).is_err() || failed {
                            return;
                        }
                    }
                    continue;
                }
                Ok(Err(error)) => Read::Failed(error),
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

/// What comes next. Storage has been told of it, unless the reading threads waited for it.
#[derive(Default)]
struct Ahead {
    /// Blocks, and whether they may hold data.
    pieces: VecDeque<(Range<u64>, bool)>,
    data: u64,
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
    Device(DeviceError),
    Gone,
}

impl From<DeviceError> for ReadStop {
    fn from(error: DeviceError) -> ReadStop {
        ReadStop::Device(error)
    }
}

impl PointReader<'_> {
    fn run(&self, from: u64) {
        let result = self.read_from(from);
        if let Err(ReadStop::Device(error)) = result {
            // If nobody listens, nobody asks why.
            let _ = self.queue.send(Queued::Now(Read::Failed(error)));
        }
    }

    fn read_from(&self, from: u64) -> Result<(), ReadStop> {
        let end = blocks_of(self.point.size());
        let mut at = from;
        let mut ahead = Ahead::default();
        loop {
            let start = at;
            let result = walk(self.point, start..end, |run, data| {
                at = run.end;
                self.tell(&mut ahead, run, data)
            });
            match result {
                // Where even the map of holes is damaged: read on block by block, all of it counts as data.
                Err(ReadStop::Device(DeviceError::Damaged { .. })) if start < end => {
                    let stop = (at + READ_BLOCKS).min(end);
                    self.tell(&mut ahead, at..stop, true)?;
                    at = stop;
                }
                Ok(()) => at = end,
                Err(stop) => {
                    self.catch_up(&mut ahead, 0)?;
                    return Err(stop);
                }
            }
            if at >= end {
                return self.catch_up(&mut ahead, 0);
            }
        }
    }

    /// Tells storage of `blocks` and puts them behind what is told already; reads what is far enough in front.
    fn tell(&self, ahead: &mut Ahead, blocks: Range<u64>, data: bool) -> Result<(), ReadStop> {
        if !data {
            ahead.pieces.push_back((blocks, false));
            return Ok(());
        }
        let mut at = blocks.start;
        while at < blocks.end {
            let end = ((at / READ_BLOCKS + 1) * READ_BLOCKS).min(blocks.end);
            // Threads that have nothing to do get this at once, and storage hears of it from them.
            if !self.tasks.is_empty() {
                self.point.will_read(at..end);
            }
            ahead.pieces.push_back((at..end, true));
            ahead.data += end - at;
            self.catch_up(ahead, TOLD_AHEAD)?;
            at = end;
        }
        Ok(())
    }

    /// Reads until no more than `left` blocks of data are ahead, and what keeps the reading threads busy.
    fn catch_up(&self, ahead: &mut Ahead, left: u64) -> Result<(), ReadStop> {
        while left == 0 || ahead.data > left || self.tasks.is_empty() {
            let Some((blocks, data)) = ahead.pieces.pop_front() else { break };
            if data {
                ahead.data -= blocks.end - blocks.start;
                self.data(blocks)?;
            } else {
                let blocks = Read::Zeros { first: blocks.start, blocks: blocks.end - blocks.start };
                self.send(Queued::Now(blocks))?;
            }
        }
        Ok(())
    }

    fn send(&self, item: Queued) -> Result<(), ReadStop> {
        self.queue.send(item).map_err(|_| ReadStop::Gone)
    }

    fn data(&self, blocks: Range<u64>) -> Result<(), ReadStop> {
        let (first, count) = (blocks.start, blocks.end - blocks.start);
        let permit = self.budget.take(count * BLOCK_BYTES, self.stop).ok_or(ReadStop::Gone)?;
        let (reply, answer) = bounded(1);
        self.tasks.send(Task { first, count, reply }).map_err(|_| ReadStop::Gone)?;
        self.send(Queued::Later { first, count, permit, reply: answer })
    }
}

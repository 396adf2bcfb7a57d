//! The agent's end of protecting: reads a frozen view, announces hashes, sends what is asked for.
//!
//! ```text
//! reader --1 MiB--> gather (hash) --batches--> driver --wanted blocks--> packers (zstd) --frames--> driver --> link
//!                                                ^------------- answers -------------- receiver <------------ link
//! ```
//!
//! The driver owns all state and is the only one that sends. A pass ends when everything announced is received; an
//! audit that finds a difference ends the pass early and a full one follows over the same frozen view (INV-22).
//! After a cut the driver says hello on a new link and goes on with what the server has not received; what was
//! read stays in memory until then, so nothing is read twice.
//!
//! Invariants
//! - Frames that were sent and not received never exceed the window. (must)
//! - Blocks in memory never exceed `hold_bytes` plus one announcement. (must)
//! - A batch keeps its number and content for ever. (must: the server takes each number once)

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;

use block_io::{BlockDevice, DeviceError, Pace};
use bytes::Bytes;
use crossbeam_channel::{Receiver, bounded, select, unbounded};
use model::{BLOCK_BYTES, Cause, RangeSet};

use crate::digest::digest_runs;
use crate::frame::Packer;
use crate::message::{Bitmap, MAX_OPEN_BATCHES, ReadDisk, Report, ToAgent, ToServer};
use crate::scan::{Batch, BatchData, Budget, DiskReader, Piece, READ_BLOCKS, ScanError, gather};
use crate::steer::Order;
use crate::{BlockHash, FRAME_BLOCKS, Link, LinkError, Payload, Steer};

/// Makes links, one after another. How often, after what pause and how long, is its business.
pub trait Connector<Out, In>: Send {
    /// A new link to the same transfer, or why there will be none.
    fn reconnect(&mut self) -> Result<Box<dyn Link<Out, In>>, LinkError>;
}

/// Which blocks of a disk are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Every block.
    Full {
        /// Why.
        cause: Cause,
    },
    /// The listed ones, and an audit of some others.
    Extents {
        /// Bytes that changed since the point that the replica is at.
        listed: RangeSet,
        /// Where the audit begins: what the run before gave.
        rotation: u64,
    },
    /// What the host's own tracker lists, if it can. The host turns this into one of the others before it sends.
    Tracked {
        /// The host's description of the disk at the point that the replica is at: it says since when.
        base: String,
        /// Where the audit begins.
        rotation: u64,
    },
}

/// What to do with one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOrder {
    /// Which blocks are read.
    pub mode: Mode,
    /// Bytes that the server wants read again, besides.
    pub heal: RangeSet,
    /// What the host says of why it reads so, where the choice was its own; empty otherwise.
    pub because: String,
}

/// How much memory, wire and processor a sender takes.
#[derive(Clone)]
pub struct SenderSettings {
    /// Bytes of frames, before compression, that may be sent and not received.
    pub window_bytes: u64,
    /// Bytes of read blocks that may be in memory.
    pub hold_bytes: u64,
    /// Blocks of one announcement, roughly.
    pub batch_blocks: usize,
    /// Threads that compress.
    pub workers: usize,
    /// zstd level; `None` sends plain.
    pub level: Option<i32>,
    /// Waited for before each frame, by its encoded bytes.
    pub pace: Option<Arc<dyn Pace>>,
}

impl Default for SenderSettings {
    /// 32 MiB on their way fill 50 MB/s over 40 ms many times over and keep a cut's loss under 64 MiB; 4 MiB an
    /// announcement keep the answers coming.
    fn default() -> SenderSettings {
        SenderSettings {
            window_bytes: 32 << 20,
            hold_bytes: 32 << 20,
            batch_blocks: 64,
            workers: 2,
            level: Some(3),
            pace: None,
        }
    }
}

/// What a sender did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SenderReport {
    /// What was told to the server.
    pub report: Report,
    /// Block data sent, before compression, every time it was sent.
    pub bytes_sent: u64,
    /// The same, encoded.
    pub bytes_on_wire: u64,
    /// Why everything was compared, if an audit asked for it.
    pub full_compare: Option<String>,
    /// Links used after the first.
    pub reconnects: u64,
}

/// Why a transfer ended on the agent.
#[derive(Debug, thiserror::Error)]
pub enum SenderError {
    /// The frozen view could not be read.
    #[error("disk {disk}: {source}")]
    Device {
        /// Index of the disk.
        disk: u32,
        /// What failed.
        source: DeviceError,
    },
    /// No link, and none to come.
    #[error(transparent)]
    Link(LinkError),
    /// A person or the server cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The server ended the transfer.
    #[error("the server refused the transfer: {0}")]
    Refused(String),
    /// The server said something that makes no sense here.
    #[error("the server broke the protocol: {0}")]
    ProtocolBroken(String),
    /// The server remembers less than it acknowledged, so this transfer cannot be continued.
    #[error("the server expects batch {found}, expected was {expected}: it lost this transfer")]
    Forgotten {
        /// The oldest batch that is not received.
        expected: u64,
        /// What the server would take next.
        found: u64,
    },
    /// A thread of the pipeline died.
    #[error("the reading thread stopped without a result")]
    Thread,
}

/// Sends the disks of one frozen view.
pub struct Sender {
    disks: Vec<(Arc<dyn BlockDevice>, DiskOrder)>,
    settings: SenderSettings,
    steer: Steer,
}

type ServerLink = Arc<dyn Link<ToServer, ToAgent>>;

enum Event {
    Incoming(u64, Result<ToAgent, LinkError>),
    Packed(Vec<Packed>),
    Cancelled,
}

struct Packed {
    generation: u64,
    batch: u64,
    indexes: Vec<u16>,
    payload: Payload,
}

struct Job {
    generation: u64,
    batch: u64,
    indexes: Vec<u16>,
    plain: Bytes,
    hashes: Vec<BlockHash>,
}

impl Job {
    fn pack(self, packer: &mut Packer) -> Packed {
        let Job { generation, batch, indexes, plain, hashes } = self;
        Packed { generation, batch, indexes, payload: packer.pack(plain, hashes) }
    }
}

/// Frames that a worker hands over together at most.
const PACKED_AT_ONCE: usize = 4;

enum PassEnd {
    Done,
    Full(String),
}

/// A numbered message that the server has not received.
struct Unacked {
    message: Numbered,
    /// Blocks whose data left at least once.
    sent: Vec<bool>,
    in_flight: u64,
}

enum Numbered {
    Announce(Batch),
    Other(ToServer),
}

impl Sender {
    /// A sender for these disks, in the order of their indexes.
    pub fn new(disks: Vec<(Arc<dyn BlockDevice>, DiskOrder)>, mut settings: SenderSettings) -> Sender {
        settings.batch_blocks = settings.batch_blocks.clamp(1, 256);
        settings.workers = settings.workers.max(1);
        let batch = batch_bytes(&settings);
        // A batch is received as a whole, so the window holds at least one; the gatherer may hold one more.
        settings.window_bytes = settings.window_bytes.max(batch);
        settings.hold_bytes = settings.hold_bytes.max(3 * batch);
        Sender { disks, settings, steer: Steer::new() }
    }

    /// The handle that cancels or throttles this end.
    pub fn steer(&self) -> Steer {
        self.steer.clone()
    }

    /// Transfers everything, over as many links as it takes.
    pub fn run(&self, connector: &mut dyn Connector<ToServer, ToAgent>) -> Result<SenderReport, SenderError> {
        let (events_in, events) = bounded(8192);
        let (jobs, jobs_out) = unbounded::<Job>();
        let budget = Budget::new(self.settings.hold_bytes);
        let cancel_events = events_in.clone();
        let current: Arc<Mutex<Option<ServerLink>>> = Arc::default();
        let current_hook = Arc::clone(&current);
        let _watch = self.steer.watch(move |order| {
            if order == Order::Cancel {
                if let Some(link) = &*current_hook.lock().unwrap_or_else(PoisonError::into_inner) {
                    link.close(LinkError::Cancelled);
                }
                // A full channel is no loss: the driver asks the handle after each event.
                let _ = cancel_events.try_send(Event::Cancelled);
            }
        });
        std::thread::scope(|scope| {
            let workers = self.settings.workers;
            for _ in 0..workers {
                let (jobs, events) = (jobs_out.clone(), events_in.clone());
                scope.spawn(move || {
                    let mut packer = Packer::new(self.settings.level);
                    for first in &jobs {
                        let mut packed = vec![first.pack(&mut packer)];
                        // As long as nobody waits for it, several at once: each word between threads costs both of them.
                        while packed.len() < PACKED_AT_ONCE && jobs.len() >= PACKED_AT_ONCE * workers {
                            let Ok(next) = jobs.try_recv() else { break };
                            packed.push(next.pack(&mut packer));
                        }
                        if events.send(Event::Packed(packed)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(jobs_out);
            let mut driver = Driver {
                sender: self,
                scope,
                connector,
                current,
                link: None,
                generation: 0,
                resumed: false,
                events_in,
                events,
                jobs,
                next: 0,
                announced_to: 0,
                unacked: BTreeMap::new(),
                queue: VecDeque::new(),
                in_flight: 0,
                server_window: u64::MAX,
                digest: blake3::Hasher::new(),
                full: None,
                full_asked: None,
                finished: false,
                bytes_read: AtomicU64::new(0),
                bytes_audited: AtomicU64::new(0),
                bytes_again: 0,
                out: SenderReport::default(),
                budget,
            };
            let result = driver.transfer();
            if let (Err(error), Some(link)) = (&result, &driver.link) {
                // The server may be gone already; it notices that by itself.
                let _ = link.send(ToServer::Abort { reason: error.to_string() });
            }
            if let Some(link) = &driver.link {
                link.close(match result {
                    Err(SenderError::Cancelled) => LinkError::Cancelled,
                    _ => LinkError::Cut("the agent is done".to_owned()),
                });
            }
            result.map(|()| driver.out)
        })
    }
}

/// Bytes of the largest announcement that `gather` makes.
fn batch_bytes(settings: &SenderSettings) -> u64 {
    (settings.batch_blocks as u64 + READ_BLOCKS) * BLOCK_BYTES
}

struct Driver<'scope, 'env, 'c> {
    sender: &'env Sender,
    scope: &'scope Scope<'scope, 'env>,
    connector: &'c mut dyn Connector<ToServer, ToAgent>,
    current: Arc<Mutex<Option<ServerLink>>>,
    link: Option<ServerLink>,
    generation: u64,
    /// Whether the server answered this link's hello.
    resumed: bool,
    events_in: crossbeam_channel::Sender<Event>,
    events: Receiver<Event>,
    jobs: crossbeam_channel::Sender<Job>,
    /// The number of the next batch.
    next: u64,
    /// All numbers below were sent on this link or received.
    announced_to: u64,
    unacked: BTreeMap<u64, Unacked>,
    /// Blocks to pack and send: batch and adjacent indexes.
    queue: VecDeque<(u64, Vec<u16>)>,
    in_flight: u64,
    server_window: u64,
    digest: blake3::Hasher,
    /// Why the pass is a full one although it was not ordered so.
    full: Option<String>,
    full_asked: Option<String>,
    finished: bool,
    bytes_read: AtomicU64,
    bytes_audited: AtomicU64,
    bytes_again: u64,
    out: SenderReport,
    budget: Arc<Budget>,
}

/// Ends a pass's threads however the pass ends.
struct StopPass(Arc<AtomicBool>, Arc<Budget>);

impl Drop for StopPass {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        self.1.wake();
    }
}

impl<'scope, 'env> Driver<'scope, 'env, '_> {
    fn transfer(&mut self) -> Result<(), SenderError> {
        self.connect()?;
        let orders = self.sender.disks.iter().map(|(_, order)| order);
        let bytes_listed = orders.clone().map(|order| match &order.mode {
            Mode::Extents { listed, .. } => listed.bytes(),
            Mode::Full { .. } | Mode::Tracked { .. } => 0,
        });
        self.out.report.bytes_listed = bytes_listed.sum();
        let mut rotations: Vec<u64> = orders
            .map(|order| match order.mode {
                Mode::Extents { rotation, .. } => rotation,
                Mode::Full { .. } | Mode::Tracked { .. } => 0,
            })
            .collect();
        // A lone pass, and at most one full one after it: a full pass audits nothing.
        while let PassEnd::Full(reason) = self.pass(&mut rotations)? {
            self.digest = blake3::Hasher::new();
            self.out.full_compare = Some(reason.clone());
            self.full = Some(reason.clone());
            let batch = self.next;
            self.push(Numbered::Other(ToServer::FullBegins { batch, reason }), 0)?;
        }
        self.out.report.next_rotations = rotations;
        self.out.reconnects = self.generation.saturating_sub(1);
        Ok(())
    }

    /// Announces and sends everything that is ordered, then finishes.
    fn pass(&mut self, rotations: &mut Vec<u64>) -> Result<PassEnd, SenderError> {
        let stop = Arc::new(AtomicBool::new(false));
        let _stop = StopPass(Arc::clone(&stop), Arc::clone(&self.budget));
        let (pieces_in, pieces) = bounded(4);
        let (batches_in, batches) = bounded(2);
        let most = self.sender.settings.batch_blocks;
        self.scope.spawn(move || gather(&pieces, &batches_in, most));
        let (sender, full, budget) = (self.sender, self.full.is_some(), Arc::clone(&self.budget));
        let rotations_in = rotations.clone();
        let reader = self.scope.spawn(move || {
            let (read, audited) = (AtomicU64::new(0), AtomicU64::new(0));
            let mut next = rotations_in;
            let result = read_pass(sender, full, &budget, &stop, &pieces_in, (&read, &audited), &mut next);
            (result, next, read.into_inner(), audited.into_inner())
        });

        let mut batches = Some(batches);
        let mut end = None;
        while end.is_none() {
            if let Some(reason) = self.full_asked.take().filter(|_| self.full.is_none()) {
                end = Some(PassEnd::Full(reason));
                break;
            }
            let room = self.resumed && self.unacked.len() < MAX_OPEN_BATCHES / 2;
            match batches.as_ref().filter(|_| room) {
                Some(source) => {
                    let events = self.events.clone();
                    select! {
                        recv(source) -> batch => match batch {
                            Ok(batch) => {
                                let blocks = batch.data.len();
                                if !batch.audited {
                                    digest_runs(&mut self.digest, batch.disk, &batch.runs);
                                }
                                self.push(Numbered::Announce(batch), blocks)?;
                            }
                            Err(_) => batches = None,
                        },
                        recv(events) -> event => self.event(event.map_err(|_| SenderError::Thread)?)?,
                    }
                }
                None if batches.is_none() && self.unacked.is_empty() && self.resumed => {
                    end = Some(PassEnd::Done)
                }
                None => {
                    let event = self.events.recv().map_err(|_| SenderError::Thread)?;
                    self.event(event)?;
                }
            }
        }
        // A pass that is given up: its reader ends at the closed channel.
        drop(batches);
        _stop.0.store(matches!(end, Some(PassEnd::Full(_))), Ordering::SeqCst);
        self.budget.wake();
        let (result, next, read, audited) = reader.join().map_err(|_| SenderError::Thread)?;
        self.bytes_read.fetch_add(read, Ordering::Relaxed);
        self.bytes_audited.fetch_add(audited, Ordering::Relaxed);
        match (result, end) {
            (_, Some(PassEnd::Full(reason))) => Ok(PassEnd::Full(reason)),
            (Ok(()), _) => {
                *rotations = next;
                self.finish(rotations)
            }
            (Err(ScanError::Device(disk, source)), _) => Err(SenderError::Device { disk, source }),
            (Err(ScanError::Stopped), _) => Err(SenderError::Thread),
        }
    }

    fn finish(&mut self, rotations: &[u64]) -> Result<PassEnd, SenderError> {
        let batch = self.next;
        self.out.report = Report {
            digest: *self.digest.finalize().as_bytes(),
            bytes_listed: self.out.report.bytes_listed,
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_audited: self.bytes_audited.load(Ordering::Relaxed),
            bytes_again: self.bytes_again,
            next_rotations: rotations.to_vec(),
        };
        let report = self.out.report.clone();
        self.push(Numbered::Other(ToServer::Finish { batch, report }), 0)?;
        loop {
            if self.finished {
                return Ok(PassEnd::Done);
            }
            if let Some(reason) = self.full_asked.take().filter(|_| self.full.is_none()) {
                return Ok(PassEnd::Full(reason));
            }
            let event = self.events.recv().map_err(|_| SenderError::Thread)?;
            self.event(event)?;
        }
    }

    /// Gives a message its number and sends it.
    fn push(&mut self, message: Numbered, blocks: usize) -> Result<(), SenderError> {
        let number = self.next;
        self.next += 1;
        self.unacked.insert(number, Unacked { message, sent: vec![false; blocks], in_flight: 0 });
        self.announce()
    }

    /// Sends what has a number and was not sent on this link.
    fn announce(&mut self) -> Result<(), SenderError> {
        while self.resumed && self.announced_to < self.next {
            let number = self.announced_to;
            let message = match self.unacked.get(&number).map(|unacked| &unacked.message) {
                None => None,
                Some(Numbered::Other(message)) => Some(message.clone()),
                Some(Numbered::Announce(batch)) => Some(ToServer::Announce {
                    batch: number,
                    disk: batch.disk,
                    audited: batch.audited,
                    runs: batch.runs.clone(),
                }),
            };
            self.announced_to += 1;
            if let Some(message) = message {
                self.send(message)?;
            }
        }
        Ok(())
    }

    /// Sends, or goes on with a new link.
    fn send(&mut self, message: ToServer) -> Result<(), SenderError> {
        let Some(link) = &self.link else { return Err(SenderError::Thread) };
        match link.send(message) {
            Ok(()) => Ok(()),
            Err(why) => self.broken(why),
        }
    }

    fn broken(&mut self, why: LinkError) -> Result<(), SenderError> {
        match why {
            LinkError::Cancelled => Err(SenderError::Cancelled),
            LinkError::Cut(_) => self.connect(),
        }
    }

    fn connect(&mut self) -> Result<(), SenderError> {
        self.resumed = false;
        loop {
            if let Some(old) = self.link.take() {
                old.close(LinkError::Cut("replaced by a new link".to_owned()));
            }
            if self.sender.steer.is_cancelled() {
                return Err(SenderError::Cancelled);
            }
            let link: ServerLink = Arc::from(self.connector.reconnect().map_err(|why| match why {
                LinkError::Cancelled => SenderError::Cancelled,
                cut => SenderError::Link(cut),
            })?);
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&link));
            self.generation += 1;
            self.queue.clear();
            self.in_flight = 0;
            self.server_window = u64::MAX;
            for unacked in self.unacked.values_mut() {
                unacked.in_flight = 0;
            }
            self.link = Some(Arc::clone(&link));
            let disks = self.sender.disks.iter().map(|(device, order)| ReadDisk {
                size: device.size(),
                full: !matches!(order.mode, Mode::Extents { .. }),
                because: order.because.clone(),
            });
            let disks = disks.collect();
            if link.send(ToServer::Hello { next: self.next, disks }).is_err() {
                continue;
            }
            let (events, generation) = (self.events_in.clone(), self.generation);
            self.scope.spawn(move || {
                loop {
                    let message = link.receive();
                    let last = message.is_err();
                    if events.send(Event::Incoming(generation, message)).is_err() || last {
                        return;
                    }
                }
            });
            return Ok(());
        }
    }

    fn event(&mut self, event: Event) -> Result<(), SenderError> {
        if self.sender.steer.is_cancelled() {
            return Err(SenderError::Cancelled);
        }
        match event {
            Event::Cancelled => Ok(()),
            Event::Incoming(generation, _) if generation != self.generation => Ok(()),
            Event::Incoming(_, Err(why)) => self.broken(why),
            Event::Incoming(_, Ok(message)) => self.message(message),
            Event::Packed(frames) => frames.into_iter().try_for_each(|frame| {
                // A link that broke on the one before makes the others those of an old one.
                if frame.generation != self.generation {
                    return Ok(());
                }
                self.packed(frame.batch, frame.indexes, frame.payload)
            }),
        }
    }

    fn message(&mut self, message: ToAgent) -> Result<(), SenderError> {
        match message {
            ToAgent::Resume { next, finished, open } => return self.resume(next, finished, &open),
            ToAgent::Refused { reason } => return Err(SenderError::Refused(reason)),
            _ if !self.resumed => {
                // Only a repeated or reordered message can come before the answer to our hello.
                return self.broken(LinkError::Cut("answer out of order".to_owned()));
            }
            ToAgent::Wanted { batch, blocks } => self.wanted(batch, &blocks)?,
            ToAgent::Received { batch } => {
                if batch >= self.announced_to {
                    return Err(SenderError::ProtocolBroken(format!(
                        "batch {batch} received before it was sent"
                    )));
                }
                if let Some(done) = self.unacked.remove(&batch) {
                    self.in_flight = self.in_flight.saturating_sub(done.in_flight);
                    self.queue.retain(|(queued, _)| *queued != batch);
                }
            }
            ToAgent::Window { bytes } => self.server_window = bytes,
            ToAgent::FullCompare { disk, reason } => {
                self.full_asked = Some(format!("disk {disk}: {reason}"));
            }
            ToAgent::Finished => {
                let asked = self
                    .unacked
                    .values()
                    .any(|unacked| matches!(unacked.message, Numbered::Other(ToServer::Finish { .. })));
                if !asked {
                    return Err(SenderError::ProtocolBroken("finished before all was sent".to_owned()));
                }
                self.finished = true;
            }
        }
        self.pump()
    }

    fn resume(&mut self, next: u64, finished: bool, open: &[u64]) -> Result<(), SenderError> {
        if self.resumed {
            return Ok(());
        }
        let oldest = self.unacked.keys().next().copied().unwrap_or(self.next);
        if next < oldest || next > self.next {
            return Err(SenderError::Forgotten { expected: oldest, found: next });
        }
        let finish = self
            .unacked
            .values()
            .any(|unacked| matches!(unacked.message, Numbered::Other(ToServer::Finish { .. })));
        self.unacked.retain(|number, _| *number >= next || open.contains(number));
        self.announced_to = next;
        self.resumed = true;
        if finished {
            if !finish {
                return Err(SenderError::ProtocolBroken("finished before all was sent".to_owned()));
            }
            self.finished = true;
        }
        self.announce()?;
        self.pump()
    }

    fn wanted(&mut self, batch: u64, blocks: &Bitmap) -> Result<(), SenderError> {
        if batch >= self.announced_to {
            return Err(SenderError::ProtocolBroken(format!("batch {batch} wanted before it was sent")));
        }
        // Received already: a repeated message.
        let Some(unacked) = self.unacked.get(&batch) else { return Ok(()) };
        let Numbered::Announce(announced) = &unacked.message else {
            return Err(SenderError::ProtocolBroken(format!("batch {batch} has no blocks to want")));
        };
        if blocks.len() != announced.data.len() {
            return Err(SenderError::ProtocolBroken(format!(
                "{} blocks of batch {batch} wanted or not, it has {}",
                blocks.len(),
                announced.data.len()
            )));
        }
        let mut group: Vec<u16> = Vec::new();
        for index in blocks.ones() {
            let place = |index: u16| announced.data.places.get(usize::from(index)).copied();
            let index = index as u16;
            let is_near = group
                .last()
                .and_then(|&last| place(index)?.checked_sub(place(last)?))
                .is_some_and(|distance| distance <= NEAR_BLOCKS);
            if !group.is_empty() && (!is_near || group.len() == FRAME_BLOCKS) {
                self.queue.push_back((batch, std::mem::take(&mut group)));
            }
            group.push(index);
        }
        if !group.is_empty() {
            self.queue.push_back((batch, group));
        }
        Ok(())
    }

    /// Hands to the packers what the window allows.
    fn pump(&mut self) -> Result<(), SenderError> {
        let settings = &self.sender.settings;
        let least = batch_bytes(settings);
        let limit = |asked: u64| if asked == 0 { 0 } else { asked.max(least) };
        let window =
            settings.window_bytes.min(limit(self.server_window)).min(limit(self.sender.steer.window()));
        while let Some((batch, indexes)) = self.queue.front() {
            let bytes = indexes.len() as u64 * BLOCK_BYTES;
            if self.in_flight + bytes > window {
                break;
            }
            let Some(unacked) = self.unacked.get_mut(batch) else {
                self.queue.pop_front();
                continue;
            };
            if let Numbered::Announce(announced) = &unacked.message {
                let data: &BatchData = &announced.data;
                let hash = |index: &u16| data.hashes.get(usize::from(*index)).copied();
                let job = Job {
                    generation: self.generation,
                    batch: *batch,
                    plain: data.join(indexes),
                    hashes: indexes.iter().filter_map(hash).collect(),
                    indexes: indexes.clone(),
                };
                unacked.in_flight += bytes;
                self.in_flight += bytes;
                self.jobs.send(job).map_err(|_| SenderError::Thread)?;
            }
            self.queue.pop_front();
        }
        Ok(())
    }

    fn packed(&mut self, batch: u64, indexes: Vec<u16>, payload: Payload) -> Result<(), SenderError> {
        let Some(unacked) = self.unacked.get_mut(&batch) else { return Ok(()) };
        for &index in &indexes {
            match unacked.sent.get_mut(usize::from(index)) {
                Some(sent) if *sent => self.bytes_again += BLOCK_BYTES,
                Some(sent) => *sent = true,
                None => {}
            }
        }
        if let Some(pace) = &self.sender.settings.pace {
            pace.wait(payload.bytes().len() as u64);
        }
        self.out.bytes_sent += indexes.len() as u64 * BLOCK_BYTES;
        self.out.bytes_on_wire += payload.bytes().len() as u64;
        self.send(ToServer::Frame { batch, indexes, payload })
    }
}

/// Blocks of which one comes at most so many behind the other are packed together: small changes side by side compress better
/// than each alone, and who reads one of them soon reads the others.
const NEAR_BLOCKS: u64 = 16;

/// Reads all disks as ordered, or in full.
fn read_pass(
    sender: &Sender,
    full: bool,
    budget: &Arc<Budget>,
    stop: &AtomicBool,
    out: &crossbeam_channel::Sender<Piece>,
    (bytes_read, bytes_audited): (&AtomicU64, &AtomicU64),
    rotations: &mut [u64],
) -> Result<(), ScanError> {
    for (disk, ((device, order), next)) in sender.disks.iter().zip(rotations).enumerate() {
        let reader = DiskReader { disk: disk as u32, device, budget, stop, out, bytes_read };
        match &order.mode {
            Mode::Extents { listed, rotation } if !full => {
                let wanted = listed.union(&order.heal);
                reader.listed(&wanted)?;
                *next = reader.audit(&wanted, *rotation, bytes_audited)?;
            }
            _ => reader.full(0)?,
        }
    }
    Ok(())
}

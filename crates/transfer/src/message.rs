//! The messages of both transfers and their bytes on the wire, protocol version 0.
//!
//! In one process messages travel as these values. Over a network each is one opaque byte string of at most
//! [`MAX_MESSAGE_BYTES`]: version (u8), kind (u8), then the fields in the order of the table. Integers are
//! little-endian; `bool` is one byte, 0 or 1; a *list* is a u16 count and its entries; *text* is a u16 length and
//! UTF-8 of at most [`MAX_TEXT_BYTES`]. Nothing may follow the last field.
//!
//! | direction | kind | message | fields |
//! |---|---|---|---|
//! | to server | 1 | Hello | next u64, disks: list of (size u64, full bool, because text) |
//! | | 2 | Announce | batch u64, disk u32, audited bool, list of runs |
//! | | 3 | Frame | batch u64, indexes: list of u16, payload |
//! | | 4 | FullBegins | batch u64, reason text |
//! | | 5 | Finish | batch u64, digest 32 bytes, listed u64, read u64, audited u64, again u64, rotations: list of u64 |
//! | | 6 | Abort | reason text |
//! | to agent | 1 | Resume | next u64, finished bool, open: list of u64 |
//! | | 2 | Wanted | batch u64, bitmap |
//! | | 3 | Received | batch u64 |
//! | | 4 | Window | bytes u64 |
//! | | 5 | FullCompare | disk u32, reason text |
//! | | 6 | Finished | |
//! | | 7 | Refused | reason text |
//! | to target | 1 | Begin | size u64, from u64 |
//! | | 2 | Keep | after u64, end u64 |
//! | | 3 | Frame | after u64, first u64, hashes: list of 32 bytes, payload |
//! | | 4 | End | digest 32 bytes, verify bool, sync bool |
//! | | 5 | Closed | |
//! | | 6 | Refused | reason text |
//! | | 7 | Zeros | after u64, first u64, blocks u64 |
//! | from target | 1 | Hello | size u64, next u64, fresh bool |
//! | | 2 | Announce | list of runs |
//! | | 3 | Written | next u64 |
//! | | 4 | Done | digest 32 bytes |
//! | | 5 | Abort | reason text |
//!
//! A *run* is a tag: 0, first block u64, list of 32-byte hashes; or 1, first block u64, number of blocks u64 (all
//! zeros). A *payload* is codec u8 (0 plain, 1 zstd), blocks u8, length u32, bytes. A *bitmap* is a u16 count of
//! bits and that many bits, lowest first, the unused bits of the last byte zero.
//!
//! Decoding refuses what breaks a limit; what a message means is checked by whoever receives it.

use bytes::{BufMut, Bytes, BytesMut};

use crate::wire::{Reader, WireError, put_count, put_text};
use crate::{BLOCK, BlockHash, Codec, FRAME_BLOCKS, Payload};

/// The version of these messages.
pub const PROTOCOL_VERSION: u8 = 0;
/// Most bytes of one message.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Most disks of one transfer.
pub const MAX_DISKS: usize = 1024;
/// Most runs of one announcement.
pub const MAX_RUNS: usize = 1024;
/// Most blocks announced by hash in one announcement: 1024 of them are 64 MiB of data that both ends remember.
pub const MAX_BATCH_BLOCKS: usize = 1024;
/// Most batches that may be announced and not received at a time.
pub const MAX_OPEN_BATCHES: usize = 512;
/// Most announcements of a target that the server keeps until it comes to them.
pub const MAX_OPEN_ANNOUNCEMENTS: usize = 32;
/// Most bytes of a text.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Most bytes of a disk's reason: those of all disks fit one message.
pub const MAX_BECAUSE_BYTES: usize = 512;

/// Adjacent blocks in an announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// Blocks with content: their hashes, from block `first` on.
    Data {
        /// Index of the first block.
        first: u64,
        /// One hash a block.
        hashes: Vec<BlockHash>,
    },
    /// Blocks that are all zeros.
    Zeros {
        /// Index of the first block.
        first: u64,
        /// How many.
        blocks: u64,
    },
}

impl Run {
    /// Index of the first block and of the first after the run; `None` if that is no number.
    pub(crate) fn blocks(&self) -> Option<std::ops::Range<u64>> {
        match self {
            Run::Data { first, hashes } => Some(*first..first.checked_add(hashes.len() as u64)?),
            Run::Zeros { first, blocks } => Some(*first..first.checked_add(*blocks)?),
        }
    }
}

/// One bit for each announced block with content, in the order of the announcement.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bitmap {
    bits: Vec<bool>,
}

impl Bitmap {
    /// A bitmap of these bits.
    pub fn new(bits: Vec<bool>) -> Bitmap {
        Bitmap { bits }
    }

    /// How many bits there are, set or not.
    pub fn len(&self) -> usize {
        self.bits.len()
    }

    /// Whether there is no bit at all.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    /// The indexes of the set bits, ascending.
    pub fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        self.bits.iter().enumerate().filter_map(|(index, &bit)| bit.then_some(index))
    }
}

/// A disk, and how the agent reads it: the same on every connection of a transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadDisk {
    /// Its bytes.
    pub size: u64,
    /// Whether every block will be announced; otherwise those of a list.
    pub full: bool,
    /// Where the choice was the host's: why it reads so.
    pub because: String,
}

/// What the agent counted, and its digest of all that it announced.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// BLAKE3 over the announcements of the last pass, audits left out.
    pub digest: [u8; 32],
    /// Bytes of the change lists.
    pub bytes_listed: u64,
    /// Bytes read from the frozen view.
    pub bytes_read: u64,
    /// Bytes read for audits.
    pub bytes_audited: u64,
    /// Bytes of blocks sent a second time.
    pub bytes_again: u64,
    /// Where the audit of the next run begins, for each disk.
    pub next_rotations: Vec<u64>,
}

/// Protect: agent to server.
///
/// Announce, FullBegins and Finish carry ascending numbers without a gap (`batch`), the same ones after a cut.
#[derive(Debug, Clone, PartialEq)]
pub enum ToServer {
    /// First on every connection.
    Hello {
        /// The number after the last one used.
        next: u64,
        /// Each disk, and how it is read.
        disks: Vec<ReadDisk>,
    },
    /// What some blocks hold.
    Announce {
        /// Its number.
        batch: u64,
        /// Index of the disk.
        disk: u32,
        /// Whether nothing says that the blocks changed: they are compared only.
        audited: bool,
        /// The blocks.
        runs: Vec<Run>,
    },
    /// Blocks of an announcement that were asked for.
    Frame {
        /// The announcement.
        batch: u64,
        /// Which of its blocks with content, ascending.
        indexes: Vec<u16>,
        /// Their bytes.
        payload: Payload,
    },
    /// From here on every block of every disk is announced, whatever was before.
    FullBegins {
        /// Its number.
        batch: u64,
        /// Why.
        reason: String,
    },
    /// All is announced and received.
    Finish {
        /// Its number.
        batch: u64,
        /// What the agent counted.
        report: Report,
    },
    /// The agent cannot go on.
    Abort {
        /// Why.
        reason: String,
    },
}

/// Protect: server to agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    /// The answer to Hello. For each open batch a Wanted follows.
    Resume {
        /// The number that the server takes next.
        next: u64,
        /// Whether the transfer is finished.
        finished: bool,
        /// Announced batches with blocks that are still missing.
        open: Vec<u64>,
    },
    /// Blocks to send. May come more than once for a batch.
    Wanted {
        /// The announcement.
        batch: u64,
        /// Which of its blocks.
        blocks: Bitmap,
    },
    /// Everything of this batch is in the store.
    Received {
        /// Its number.
        batch: u64,
    },
    /// How many bytes of frames may be on their way from now on; 0 is a pause.
    Window {
        /// Bytes before compression.
        bytes: u64,
    },
    /// An audited block differs: announce everything.
    FullCompare {
        /// The disk.
        disk: u32,
        /// What differs.
        reason: String,
    },
    /// The transfer is complete.
    Finished,
    /// The server ends the transfer for good.
    Refused {
        /// Why.
        reason: String,
    },
}

/// Recover: server to agent. In order; a repeated or reordered message is noticed by its block numbers.
///
/// Keep, Zeros and Frame go on where the one before ended (`after`), and blocks that they pass over stay as
/// they are.
#[derive(Debug, Clone, PartialEq)]
pub enum ToTarget {
    /// The answer to Hello.
    Begin {
        /// Bytes of the recovered disk.
        size: u64,
        /// Where it goes on: the target's `next`, or 0 to begin again.
        from: u64,
    },
    /// The blocks are right as they are.
    Keep {
        /// The end of the message before, or `from`.
        after: u64,
        /// Index of the first block that is not meant.
        end: u64,
    },
    /// Blocks to make zeros.
    Zeros {
        /// The end of the message before, or `from`.
        after: u64,
        /// Index of the first block.
        first: u64,
        /// How many.
        blocks: u64,
    },
    /// Adjacent blocks to write.
    Frame {
        /// The end of the message before, or `from`.
        after: u64,
        /// Index of the first block.
        first: u64,
        /// One hash a block.
        hashes: Vec<BlockHash>,
        /// Their bytes.
        payload: Payload,
    },
    /// All blocks were sent.
    End {
        /// Digest of the whole content.
        digest: [u8; 32],
        /// Whether to read back what was written and compare the whole.
        verify: bool,
        /// Whether to flush.
        sync: bool,
    },
    /// The server knows that the target is done.
    Closed,
    /// The server ends the transfer for good.
    Refused {
        /// Why.
        reason: String,
    },
}

/// Recover: agent to server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromTarget {
    /// First on every connection.
    Hello {
        /// Bytes of the target.
        size: u64,
        /// All blocks before this one are done.
        next: u64,
        /// Whether the target held only zeros at the start.
        fresh: bool,
    },
    /// What a target with content holds in the next blocks, contiguous with the announcement before.
    Announce {
        /// The blocks.
        runs: Vec<Run>,
    },
    /// All blocks before `next` are done. The answer to each frame.
    Written {
        /// Index of the first block that is not done.
        next: u64,
    },
    /// Flushed, and if asked for read back.
    Done {
        /// Digest of what was found and read back; the server's own if nothing was to be verified.
        digest: [u8; 32],
    },
    /// The agent cannot go on.
    Abort {
        /// Why.
        reason: String,
    },
}

fn begin(kind: u8, capacity: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(capacity.saturating_add(64));
    out.put_u8(PROTOCOL_VERSION);
    out.put_u8(kind);
    out
}

fn open(bytes: Bytes) -> Result<(u8, Reader), WireError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLong { found: bytes.len(), limit: MAX_MESSAGE_BYTES });
    }
    let mut reader = Reader::new(bytes);
    let found = reader.u8("version")?;
    if found != PROTOCOL_VERSION {
        return Err(WireError::Version { expected: PROTOCOL_VERSION, found });
    }
    let kind = reader.u8("kind")?;
    Ok((kind, reader))
}

fn unknown(kind: u8, allowed: &'static str) -> WireError {
    WireError::Value { what: "kind", at: 1, found: kind.into(), allowed }
}

fn put_numbers(out: &mut BytesMut, numbers: &[u64]) {
    put_count(out, numbers.len());
    for &number in numbers {
        out.put_u64_le(number);
    }
}

fn numbers(reader: &mut Reader, what: &'static str, limit: usize) -> Result<Vec<u64>, WireError> {
    let count = reader.count(what, limit, 8)?;
    (0..count).map(|_| reader.u64(what)).collect()
}

fn put_hashes(out: &mut BytesMut, hashes: &[BlockHash]) {
    put_count(out, hashes.len());
    for hash in hashes {
        out.put_slice(&hash.0);
    }
}

fn hashes(reader: &mut Reader, limit: usize) -> Result<Vec<BlockHash>, WireError> {
    let count = reader.count("hashes", limit, 32)?;
    (0..count).map(|_| reader.hash("hash").map(BlockHash)).collect()
}

fn put_runs(out: &mut BytesMut, runs: &[Run]) {
    put_count(out, runs.len());
    for run in runs {
        match run {
            Run::Data { first, hashes } => {
                out.put_u8(0);
                out.put_u64_le(*first);
                put_hashes(out, hashes);
            }
            Run::Zeros { first, blocks } => {
                out.put_u8(1);
                out.put_u64_le(*first);
                out.put_u64_le(*blocks);
            }
        }
    }
}

fn runs(reader: &mut Reader) -> Result<Vec<Run>, WireError> {
    let count = reader.count("runs", MAX_RUNS, 11)?;
    let mut left = MAX_BATCH_BLOCKS;
    let mut runs = Vec::with_capacity(count);
    for _ in 0..count {
        let at = reader.at();
        let tag = reader.u8("run")?;
        let first = reader.u64("first block")?;
        runs.push(match tag {
            0 => {
                let hashes = hashes(reader, left)?;
                left -= hashes.len();
                Run::Data { first, hashes }
            }
            1 => Run::Zeros { first, blocks: reader.u64("blocks")? },
            found => {
                return Err(WireError::Value { what: "run", at, found: found.into(), allowed: "0 or 1" });
            }
        });
    }
    Ok(runs)
}

fn runs_bytes(runs: &[Run]) -> usize {
    let run_bytes = |run: &Run| match run {
        Run::Data { hashes, .. } => 11 + 32 * hashes.len(),
        Run::Zeros { .. } => 17,
    };
    runs.iter().map(run_bytes).sum()
}

fn put_payload(out: &mut BytesMut, payload: &Payload) {
    out.put_u8(match payload.codec() {
        Codec::Plain => 0,
        Codec::Zstd => 1,
    });
    out.put_u8(u8::try_from(payload.blocks()).unwrap_or(u8::MAX));
    out.put_u32_le(u32::try_from(payload.bytes().len()).unwrap_or(u32::MAX));
    out.put_slice(payload.bytes());
}

fn payload(reader: &mut Reader) -> Result<Payload, WireError> {
    let at = reader.at();
    let codec = match reader.u8("codec")? {
        0 => Codec::Plain,
        1 => Codec::Zstd,
        found => return Err(WireError::Value { what: "codec", at, found: found.into(), allowed: "0 or 1" }),
    };
    let at = reader.at();
    let blocks = usize::from(reader.u8("blocks")?);
    if blocks == 0 || blocks > FRAME_BLOCKS {
        return Err(WireError::Value { what: "blocks", at, found: blocks as u64, allowed: "1 to 4" });
    }
    let at = reader.at();
    let length = reader.u32("length")?;
    let right = match codec {
        Codec::Plain => length as usize == blocks * BLOCK,
        Codec::Zstd => (length as usize) < blocks * BLOCK,
    };
    if !right {
        let allowed = "plain: 64 KiB a block; zstd: less than that";
        return Err(WireError::Value { what: "length", at, found: length.into(), allowed });
    }
    let bytes = reader.slice("payload", length as usize)?;
    Ok(Payload::unproved(codec, bytes, blocks))
}

fn put_bitmap(out: &mut BytesMut, bitmap: &Bitmap) {
    put_count(out, bitmap.bits.len());
    for eight in bitmap.bits.chunks(8) {
        out.put_u8(eight.iter().enumerate().fold(0, |byte, (bit, &set)| byte | (u8::from(set) << bit)));
    }
}

fn bitmap(reader: &mut Reader) -> Result<Bitmap, WireError> {
    let at = reader.at();
    let count = reader.count("bitmap", MAX_BATCH_BLOCKS, 0)?;
    let bytes = reader.slice("bitmap", count.div_ceil(8))?;
    let bit = |index: usize| bytes.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
    if (count..bytes.len() * 8).any(bit) {
        return Err(WireError::Value {
            what: "bitmap",
            at,
            found: count as u64,
            allowed: "unused bits zero",
        });
    }
    Ok(Bitmap { bits: (0..count).map(bit).collect() })
}

fn text_message(kind: u8, reason: &str) -> BytesMut {
    let mut out = begin(kind, reason.len().min(MAX_TEXT_BYTES));
    put_text(&mut out, reason, MAX_TEXT_BYTES);
    out
}

impl ToServer {
    /// The bytes of the message. A payload is copied once.
    pub fn encode(&self) -> Bytes {
        let out = match self {
            ToServer::Hello { next, disks } => {
                let mut out = begin(1, disks.len() * 64);
                out.put_u64_le(*next);
                put_count(&mut out, disks.len());
                for disk in disks {
                    out.put_u64_le(disk.size);
                    out.put_u8(disk.full.into());
                    put_text(&mut out, &disk.because, MAX_BECAUSE_BYTES);
                }
                out
            }
            ToServer::Announce { batch, disk, audited, runs } => {
                let mut out = begin(2, runs_bytes(runs));
                out.put_u64_le(*batch);
                out.put_u32_le(*disk);
                out.put_u8((*audited).into());
                put_runs(&mut out, runs);
                out
            }
            ToServer::Frame { batch, indexes, payload } => {
                let mut out = begin(3, payload.bytes().len());
                out.put_u64_le(*batch);
                put_count(&mut out, indexes.len());
                for &index in indexes {
                    out.put_u16_le(index);
                }
                put_payload(&mut out, payload);
                out
            }
            ToServer::FullBegins { batch, reason } => {
                let mut out = begin(4, reason.len().min(MAX_TEXT_BYTES));
                out.put_u64_le(*batch);
                put_text(&mut out, reason, MAX_TEXT_BYTES);
                out
            }
            ToServer::Finish { batch, report } => {
                let mut out = begin(5, 80 + report.next_rotations.len() * 8);
                out.put_u64_le(*batch);
                out.put_slice(&report.digest);
                out.put_u64_le(report.bytes_listed);
                out.put_u64_le(report.bytes_read);
                out.put_u64_le(report.bytes_audited);
                out.put_u64_le(report.bytes_again);
                put_numbers(&mut out, &report.next_rotations);
                out
            }
            ToServer::Abort { reason } => text_message(6, reason),
        };
        out.freeze()
    }

    /// The message of these bytes, from anyone.
    pub fn decode(bytes: Bytes) -> Result<ToServer, WireError> {
        let (kind, mut reader) = open(bytes)?;
        let r = &mut reader;
        let message = match kind {
            1 => {
                let next = r.u64("next")?;
                let count = r.count("disks", MAX_DISKS, 11)?;
                let mut disks = Vec::with_capacity(count);
                for _ in 0..count {
                    disks.push(ReadDisk {
                        size: r.u64("size")?,
                        full: r.bool("full")?,
                        because: r.text("because", MAX_BECAUSE_BYTES)?,
                    });
                }
                ToServer::Hello { next, disks }
            }
            2 => ToServer::Announce {
                batch: r.u64("batch")?,
                disk: r.u32("disk")?,
                audited: r.bool("audited")?,
                runs: runs(r)?,
            },
            3 => {
                let batch = r.u64("batch")?;
                let count = r.count("indexes", FRAME_BLOCKS, 2)?;
                let indexes = (0..count).map(|_| r.u16("index")).collect::<Result<_, _>>()?;
                ToServer::Frame { batch, indexes, payload: payload(r)? }
            }
            4 => ToServer::FullBegins { batch: r.u64("batch")?, reason: r.text("reason", MAX_TEXT_BYTES)? },
            5 => ToServer::Finish {
                batch: r.u64("batch")?,
                report: Report {
                    digest: r.hash("digest")?,
                    bytes_listed: r.u64("listed")?,
                    bytes_read: r.u64("read")?,
                    bytes_audited: r.u64("audited")?,
                    bytes_again: r.u64("again")?,
                    next_rotations: numbers(r, "rotations", MAX_DISKS)?,
                },
            },
            6 => ToServer::Abort { reason: r.text("reason", MAX_TEXT_BYTES)? },
            other => return Err(unknown(other, "1 to 6")),
        };
        reader.end()?;
        Ok(message)
    }
}

impl ToAgent {
    /// The bytes of the message.
    pub fn encode(&self) -> Bytes {
        let out = match self {
            ToAgent::Resume { next, finished, open } => {
                let mut out = begin(1, open.len() * 8);
                out.put_u64_le(*next);
                out.put_u8((*finished).into());
                put_numbers(&mut out, open);
                out
            }
            ToAgent::Wanted { batch, blocks } => {
                let mut out = begin(2, blocks.len() / 8);
                out.put_u64_le(*batch);
                put_bitmap(&mut out, blocks);
                out
            }
            ToAgent::Received { batch } => {
                let mut out = begin(3, 0);
                out.put_u64_le(*batch);
                out
            }
            ToAgent::Window { bytes } => {
                let mut out = begin(4, 0);
                out.put_u64_le(*bytes);
                out
            }
            ToAgent::FullCompare { disk, reason } => {
                let mut out = begin(5, reason.len().min(MAX_TEXT_BYTES));
                out.put_u32_le(*disk);
                put_text(&mut out, reason, MAX_TEXT_BYTES);
                out
            }
            ToAgent::Finished => begin(6, 0),
            ToAgent::Refused { reason } => text_message(7, reason),
        };
        out.freeze()
    }

    /// The message of these bytes, from anyone.
    pub fn decode(bytes: Bytes) -> Result<ToAgent, WireError> {
        let (kind, mut reader) = open(bytes)?;
        let r = &mut reader;
        let message = match kind {
            1 => ToAgent::Resume {
                next: r.u64("next")?,
                finished: r.bool("finished")?,
                open: numbers(r, "open", MAX_OPEN_BATCHES)?,
            },
            2 => ToAgent::Wanted { batch: r.u64("batch")?, blocks: bitmap(r)? },
            3 => ToAgent::Received { batch: r.u64("batch")? },
            4 => ToAgent::Window { bytes: r.u64("bytes")? },
            5 => ToAgent::FullCompare { disk: r.u32("disk")?, reason: r.text("reason", MAX_TEXT_BYTES)? },
            6 => ToAgent::Finished,
            7 => ToAgent::Refused { reason: r.text("reason", MAX_TEXT_BYTES)? },
            other => return Err(unknown(other, "1 to 7")),
        };
        reader.end()?;
        Ok(message)
    }
}

impl ToTarget {
    /// The bytes of the message. A payload is copied once.
    pub fn encode(&self) -> Bytes {
        let out = match self {
            ToTarget::Begin { size, from } => {
                let mut out = begin(1, 0);
                out.put_u64_le(*size);
                out.put_u64_le(*from);
                out
            }
            ToTarget::Keep { after, end } => {
                let mut out = begin(2, 0);
                out.put_u64_le(*after);
                out.put_u64_le(*end);
                out
            }
            ToTarget::Frame { after, first, hashes, payload } => {
                let mut out = begin(3, payload.bytes().len() + hashes.len() * 32);
                out.put_u64_le(*after);
                out.put_u64_le(*first);
                put_hashes(&mut out, hashes);
                put_payload(&mut out, payload);
                out
            }
            ToTarget::End { digest, verify, sync } => {
                let mut out = begin(4, 0);
                out.put_slice(digest);
                out.put_u8((*verify).into());
                out.put_u8((*sync).into());
                out
            }
            ToTarget::Closed => begin(5, 0),
            ToTarget::Refused { reason } => text_message(6, reason),
            ToTarget::Zeros { after, first, blocks } => {
                let mut out = begin(7, 0);
                out.put_u64_le(*after);
                out.put_u64_le(*first);
                out.put_u64_le(*blocks);
                out
            }
        };
        out.freeze()
    }

    /// The message of these bytes, from anyone.
    pub fn decode(bytes: Bytes) -> Result<ToTarget, WireError> {
        let (kind, mut reader) = open(bytes)?;
        let r = &mut reader;
        let message = match kind {
            1 => ToTarget::Begin { size: r.u64("size")?, from: r.u64("from")? },
            2 => ToTarget::Keep { after: r.u64("after")?, end: r.u64("end")? },
            3 => ToTarget::Frame {
                after: r.u64("after")?,
                first: r.u64("first block")?,
                hashes: hashes(r, FRAME_BLOCKS)?,
                payload: payload(r)?,
            },
            4 => {
                ToTarget::End { digest: r.hash("digest")?, verify: r.bool("verify")?, sync: r.bool("sync")? }
            }
            5 => ToTarget::Closed,
            6 => ToTarget::Refused { reason: r.text("reason", MAX_TEXT_BYTES)? },
            7 => ToTarget::Zeros {
                after: r.u64("after")?,
                first: r.u64("first block")?,
                blocks: r.u64("blocks")?,
            },
            other => return Err(unknown(other, "1 to 7")),
        };
        reader.end()?;
        Ok(message)
    }
}

impl FromTarget {
    /// The bytes of the message.
    pub fn encode(&self) -> Bytes {
        let out = match self {
            FromTarget::Hello { size, next, fresh } => {
                let mut out = begin(1, 0);
                out.put_u64_le(*size);
                out.put_u64_le(*next);
                out.put_u8((*fresh).into());
                out
            }
            FromTarget::Announce { runs } => {
                let mut out = begin(2, runs_bytes(runs));
                put_runs(&mut out, runs);
                out
            }
            FromTarget::Written { next } => {
                let mut out = begin(3, 0);
                out.put_u64_le(*next);
                out
            }
            FromTarget::Done { digest } => {
                let mut out = begin(4, 0);
                out.put_slice(digest);
                out
            }
            FromTarget::Abort { reason } => text_message(5, reason),
        };
        out.freeze()
    }

    /// The message of these bytes, from anyone.
    pub fn decode(bytes: Bytes) -> Result<FromTarget, WireError> {
        let (kind, mut reader) = open(bytes)?;
        let r = &mut reader;
        let message = match kind {
            1 => FromTarget::Hello { size: r.u64("size")?, next: r.u64("next")?, fresh: r.bool("fresh")? },
            2 => FromTarget::Announce { runs: runs(r)? },
            3 => FromTarget::Written { next: r.u64("next")? },
            4 => FromTarget::Done { digest: r.hash("digest")? },
            5 => FromTarget::Abort { reason: r.text("reason", MAX_TEXT_BYTES)? },
            other => return Err(unknown(other, "1 to 5")),
        };
        reader.end()?;
        Ok(message)
    }
}

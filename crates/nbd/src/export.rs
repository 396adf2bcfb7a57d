//! An export as a device.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block_io::{BlockDevice, DeviceError, WritableDevice};
use model::{ByteRange, RangeSet};

use crate::NbdError;
use crate::connection::{Connection, PATIENCE};
use crate::error::ENOTSUP;
use crate::extents::{self, Dirty, LastAnswer, Run};
use crate::handshake::{Agreed, BlockSizes, Handshake, Listed, bitmap_context};
use crate::reply::Answer;
use crate::stream::{Address, Stream, Until};
use crate::wire::{self, Command, Request};

/// Zeros that one `NBD_CMD_WRITE_ZEROES` asks for: it has no payload, but a server that has to write them must not
/// count as silent.
const ZEROES_BYTES: u64 = 256 << 20;
/// Zeros that are sent at once to a server that has no such command.
const ZERO_BUFFER: u64 = 1 << 20;
/// More connections than any server gains from.
const MAX_CONNECTIONS: u32 = 16;

/// How to open an export.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the export; the empty one is the server's default.
    pub export: String,
    /// Ask for `base:allocation`. Without it, or where the server has it not, everything counts as allocated.
    pub allocation: bool,
    /// Names of bitmaps for [`Export::dirty`]; each must be offered.
    pub bitmaps: Vec<String>,
    /// Whether to write. Without, a writable export is read only.
    pub writable: bool,
    /// Bytes of a sector as the disk's user addresses it, 512 or 4096: the protocol does not tell.
    pub sector_size: u32,
    /// Connections to share the work, 1 to 16. More than one only where the server says that it can.
    pub connections: u32,
    /// How long the server may be silent while something is awaited; ten times as long while it flushes. Not zero.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            export: String::new(),
            allocation: true,
            bitmaps: Vec::new(),
            writable: false,
            sector_size: 512,
            connections: 1,
            timeout: Duration::from_secs(60),
        }
    }
}

/// Names of the exports that a server shows.
pub fn list(address: &Address, timeout: Duration) -> Result<Vec<Listed>, NbdError> {
    let stream = Stream::connect(address, timeout)?;
    Handshake::begin(until(&stream, timeout), timeout)?.list()
}

fn until(stream: &Stream, timeout: Duration) -> Until<'_> {
    Until { stream, end: Instant::now() + timeout.saturating_mul(PATIENCE).min(MAX_HANDSHAKE) }
}

/// However large the timeout: a day is for ever, and a moment that far away can be named.
const MAX_HANDSHAKE: Duration = Duration::from_secs(24 * 60 * 60);

/// An open export of an NBD server.
///
/// The protocol does not tell the sectors that the disk's user addresses: [`Options::sector_size`] does. Requests that do
/// not fit the server's smallest block are widened; writes then read first what lies around them.
pub struct Export {
    object: String,
    agreed: Agreed,
    sector_size: u32,
    writable: bool,
    connections: Vec<Connection>,
    turn: AtomicUsize,
    last: LastAnswer,
    /// Writes of parts of blocks: two in one block must not lose each other.
    parts: Mutex<()>,
    flush_failed: AtomicBool,
}

impl Export {
    /// Connects and agrees on everything `options` names.
    pub fn connect(address: &Address, options: &Options) -> Result<Export, NbdError> {
        let (first, agreed) = Export::one(address, options)?;
        let mut connections = vec![first];
        if agreed.flags & wire::FLAG_CAN_MULTI_CONN != 0 {
            for _ in 1..options.connections.min(MAX_CONNECTIONS) {
                let (next, same) = Export::one(address, options)?;
                if (same.size, same.flags, same.blocks) != (agreed.size, agreed.flags, agreed.blocks) {
                    return Err(NbdError::handshake(
                        format!("the same export on each connection: {agreed:?}"),
                        format!("{same:?}"),
                    ));
                }
                connections.push(next);
            }
        }
        Ok(Export {
            object: format!("NBD export `{}` at {address}", options.export),
            sector_size: options.sector_size,
            writable: options.writable && agreed.flags & wire::FLAG_READ_ONLY == 0,
            agreed,
            connections,
            turn: AtomicUsize::new(0),
            last: LastAnswer::default(),
            parts: Mutex::new(()),
            flush_failed: AtomicBool::new(false),
        })
    }

    fn one(address: &Address, options: &Options) -> Result<(Connection, Agreed), NbdError> {
        let stream = Stream::connect(address, options.timeout)?;
        let agreed = Handshake::begin(until(&stream, options.timeout), options.timeout)?.open(
            &options.export,
            options.allocation,
            &options.bitmaps,
        )?;
        Ok((Connection::start(stream, &agreed, options.timeout)?, agreed))
    }

    /// Whether the server refuses writes to the export.
    pub fn is_read_only(&self) -> bool {
        self.agreed.flags & wire::FLAG_READ_ONLY != 0
    }

    /// The sizes of requests that were agreed on.
    pub fn block_sizes(&self) -> BlockSizes {
        self.agreed.blocks
    }

    /// Whether the server tells what is allocated.
    pub fn tells_allocation(&self) -> bool {
        self.offers(wire::ALLOCATION)
    }

    /// Connections in use.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The dirty ranges of a bitmap that was named in [`Options::bitmaps`], over the whole disk.
    ///
    /// They are exact up to 4 Mi ranges (64 MiB of memory); beyond, close ones are merged, so that more is dirty and
    /// never less. A disk that takes more than 4 Mi answers is an error, and so is every answer that does not advance.
    pub fn dirty(&self, bitmap: &str) -> Result<RangeSet, NbdError> {
        let name = bitmap_context(bitmap);
        if !self.offers(&name) {
            return Err(NbdError::NoContext { name });
        }
        let mut dirty = Dirty::new(self.agreed.size);
        let mut at = 0;
        for _ in 0..extents::MAX_ANSWERS {
            if at >= self.agreed.size {
                return Ok(dirty.finish());
            }
            for run in self.status(&name, at, wire::STATE_DIRTY)? {
                dirty.add(&run);
                at = run.range.end;
            }
        }
        Err(too_many_answers(at))
    }

    fn offers(&self, context: &str) -> bool {
        self.agreed.contexts.iter().any(|(_, name)| name == context)
    }

    /// Runs of a context around and after `from`. They pass `from`.
    fn status(&self, context: &str, from: u64, mask: u32) -> Result<Vec<Run>, NbdError> {
        let start = from - from % u64::from(self.agreed.blocks.minimum);
        let length = (self.agreed.size - start).min(extents::STATUS_BYTES);
        let connection = self.connection()?;
        let id =
            connection.context(context).ok_or_else(|| NbdError::NoContext { name: context.to_owned() })?;
        let request = request(Command::BlockStatus, 0, start, length)?;
        match connection.call(request, &[], Some(id))? {
            Answer::Extents(found) => extents::runs(&found, start, from, self.agreed.size, mask),
            _ => Err(wrong_answer()),
        }
    }

    /// All connections carry one device: when one has failed, none is used.
    fn connection(&self) -> Result<&Connection, NbdError> {
        if let Some(failure) = self.connections.iter().find_map(Connection::failure) {
            return Err(failure);
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.connections.len().max(1);
        self.connections
            .get(turn)
            .ok_or_else(|| NbdError::Closed { reason: "there is no connection".to_owned() })
    }

    fn call(
        &self,
        command: Command,
        flags: u16,
        range: ByteRange,
        payload: &[u8],
    ) -> Result<Answer, NbdError> {
        self.connection()?.call(request(command, flags, range.start, range.len())?, payload, None)
    }

    /// Pieces of at most `most` bytes that, after the first, begin at multiples of the preferred block size.
    fn pieces(&self, range: ByteRange, most: u64) -> impl Iterator<Item = ByteRange> + use<> {
        let preferred = u64::from(self.agreed.blocks.preferred);
        let unit = if preferred <= most { preferred } else { 1 };
        let mut at = range.start;
        std::iter::from_fn(move || {
            let most_end = at.saturating_add(most);
            let end = if most_end >= range.end { range.end } else { most_end - most_end % unit };
            let piece = ByteRange { start: at, end };
            at = end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    fn read_range(&self, wanted: ByteRange, buf: &mut [u8]) -> Result<(), NbdError> {
        let wide = wanted.rounded_out(u64::from(self.agreed.blocks.minimum), self.agreed.size);
        for piece in self.pieces(wide, u64::from(self.agreed.blocks.maximum)) {
            let Answer::Data(data) = self.call(Command::Read, 0, piece, &[])? else {
                return Err(wrong_answer());
            };
            let Some(both) = piece.intersect(&wanted) else { continue };
            let (Some(target), Some(source)) =
                (slice_mut(buf, both, wanted.start), slice(&data, both, piece.start))
            else {
                return Err(wrong_answer());
            };
            target.copy_from_slice(source);
        }
        Ok(())
    }

    /// Flags of commands that write: where the server has no flush, each is durable at once ("Transmission flags").
    fn write_flags(&self) -> u16 {
        let flush = self.agreed.flags & wire::FLAG_SEND_FLUSH != 0;
        let fua = self.agreed.flags & wire::FLAG_SEND_FUA != 0;
        if !flush && fua { wire::CMD_FLAG_FUA } else { 0 }
    }

    fn write_range(&self, range: ByteRange, buf: &[u8]) -> Result<(), NbdError> {
        let [head, middle, tail] = split(range, u64::from(self.agreed.blocks.minimum));
        let source = |part: ByteRange| slice(buf, part, range.start).ok_or_else(wrong_answer);
        for part in [head, tail] {
            self.write_part(part, source(part)?)?;
        }
        for piece in self.pieces(middle, u64::from(self.agreed.blocks.maximum)) {
            self.call(Command::Write, self.write_flags(), piece, source(piece)?)?;
        }
        Ok(())
    }

    /// A part of one block: the rest of it is read and written back.
    fn write_part(&self, part: ByteRange, bytes: &[u8]) -> Result<(), NbdError> {
        if part.is_empty() {
            return Ok(());
        }
        let block = part.rounded_out(u64::from(self.agreed.blocks.minimum), self.agreed.size);
        let _turn = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let Answer::Data(mut data) = self.call(Command::Read, 0, block, &[])? else {
            return Err(wrong_answer());
        };
        slice_mut(&mut data, part, block.start).ok_or_else(wrong_answer)?.copy_from_slice(bytes);
        self.call(Command::Write, self.write_flags(), block, &data).map(drop)
    }

    fn zero_range(&self, range: ByteRange) -> Result<(), NbdError> {
        let [head, middle, tail] = split(range, u64::from(self.agreed.blocks.minimum));
        let zeros = vec![0; usize::try_from(ZERO_BUFFER.min(range.len())).unwrap_or(0)];
        for part in [head, tail] {
            self.write_part(part, slice(&zeros, part, part.start).ok_or_else(wrong_answer)?)?;
        }
        let mut can = self.agreed.flags & wire::FLAG_SEND_WRITE_ZEROES != 0;
        for piece in self.pieces(middle, ZEROES_BYTES) {
            if can {
                match self.call(Command::WriteZeroes, self.write_flags(), piece, &[]) {
                    Ok(_) => continue,
                    Err(NbdError::Server { errno: ENOTSUP, .. }) => can = false,
                    Err(error) => return Err(error),
                }
            }
            for small in self.pieces(piece, ZERO_BUFFER.min(u64::from(self.agreed.blocks.maximum))) {
                let source = slice(&zeros, small, small.start).ok_or_else(wrong_answer)?;
                self.call(Command::Write, self.write_flags(), small, source)?;
            }
        }
        Ok(())
    }

    fn flush_all(&self) -> Result<(), NbdError> {
        if self.agreed.flags & wire::FLAG_SEND_FLUSH != 0 {
            // "Request types", `NBD_CMD_FLUSH`: offset and length are zero. With several connections one is enough:
            // that is what `NBD_FLAG_CAN_MULTI_CONN` promises.
            return self.call(Command::Flush, 0, ByteRange { start: 0, end: 0 }, &[]).map(drop);
        }
        if self.write_flags() != 0 {
            return self.connection().map(drop);
        }
        Err(NbdError::protocol("a flush", "a server that can make writes durable", "neither flush nor FUA"))
    }

    fn allocated_from(&self, from: u64) -> Result<Option<ByteRange>, NbdError> {
        let mut at = from;
        for _ in 0..extents::MAX_ANSWERS {
            if at >= self.agreed.size {
                return Ok(None);
            }
            let (held, asked_at) = self.last.about(at);
            let runs = match held {
                Some(held) => held,
                None => {
                    let runs = Arc::new(self.status(wire::ALLOCATION, at, wire::STATE_ZERO)?);
                    self.last.keep(Arc::clone(&runs), asked_at);
                    runs
                }
            };
            let first = runs.partition_point(|run| run.range.end <= at);
            for run in runs.iter().skip(first) {
                if run.flags & wire::STATE_ZERO == 0 {
                    return Ok(Some(ByteRange { start: run.range.start.max(at), end: run.range.end }));
                }
                at = run.range.end;
            }
        }
        Err(too_many_answers(at))
    }

    fn device_error(&self, action: &'static str, range: ByteRange, error: NbdError) -> DeviceError {
        DeviceError::Io {
            object: self.object.clone(),
            action,
            offset: range.start,
            length: range.len(),
            source: error.into(),
        }
    }

    fn bounds(&self, offset: u64, length: u64) -> Result<ByteRange, DeviceError> {
        DeviceError::check_bounds(offset, length, self.agreed.size)?;
        Ok(ByteRange { start: offset, end: offset.saturating_add(length) })
    }

    fn writing(&self) -> Result<(), DeviceError> {
        if self.writable { Ok(()) } else { Err(DeviceError::ReadOnly { object: self.object.clone() }) }
    }
}

impl BlockDevice for Export {
    fn size(&self) -> u64 {
        self.agreed.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.sector_size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let range = self.bounds(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        self.read_range(range, buf).map_err(|error| self.device_error("read", range, error))
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.agreed.size {
            return Ok(None);
        }
        let rest = ByteRange { start: from, end: self.agreed.size };
        if !self.tells_allocation() {
            return Ok(Some(rest));
        }
        self.allocated_from(from)
            .map_err(|error| self.device_error("find data in", ByteRange { start: from, end: from }, error))
    }
}

impl WritableDevice for Export {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        self.writing()?;
        let range = self.bounds(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        self.last.written();
        let done = self.write_range(range, buf);
        self.last.written();
        done.map_err(|error| self.device_error("write", range, error))
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        self.writing()?;
        self.bounds(range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        self.last.written();
        let done = self.zero_range(range);
        self.last.written();
        done.map_err(|error| self.device_error("write", range, error))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.writing()?;
        let all = ByteRange { start: 0, end: self.agreed.size };
        // INV-5: a second flush would succeed, because the server has dropped what it could not write.
        if self.flush_failed.load(Ordering::Acquire) {
            let error = NbdError::Closed { reason: "an earlier flush failed".to_owned() };
            return Err(self.device_error("flush", all, error));
        }
        self.flush_all().map_err(|error| {
            self.flush_failed.store(true, Ordering::Release);
            self.device_error("flush", all, error)
        })
    }
}

/// Parts of `range`: within its first block, whole blocks, within its last block. Each may be empty.
fn split(range: ByteRange, block: u64) -> [ByteRange; 3] {
    let head_end = range.start.checked_next_multiple_of(block).unwrap_or(range.end).min(range.end);
    let tail_start = (range.end - range.end % block).max(head_end);
    [
        ByteRange { start: range.start, end: head_end },
        ByteRange { start: head_end, end: tail_start },
        ByteRange { start: tail_start, end: range.end },
    ]
}

fn place(part: ByteRange, start: u64) -> Option<std::ops::Range<usize>> {
    let from = usize::try_from(part.start.checked_sub(start)?).ok()?;
    let to = usize::try_from(part.end.checked_sub(start)?).ok()?;
    Some(from..to)
}

/// Bytes of `part` in a buffer that begins at `start`.
fn slice(buf: &[u8], part: ByteRange, start: u64) -> Option<&[u8]> {
    buf.get(place(part, start)?)
}

fn slice_mut(buf: &mut [u8], part: ByteRange, start: u64) -> Option<&mut [u8]> {
    buf.get_mut(place(part, start)?)
}

fn request(command: Command, flags: u16, offset: u64, length: u64) -> Result<Request, NbdError> {
    let length = u32::try_from(length).map_err(|_| {
        NbdError::protocol("a request", "less than 4 GiB, as its length has 32 bits", length.to_string())
    })?;
    Ok(Request { command, flags, offset, length })
}

/// Cannot happen: the kind and length of an answer follow from the request. An error all the same, as a panic would
/// take more with it than one disk.
fn wrong_answer() -> NbdError {
    NbdError::protocol("an answer", "what the request is answered by", "something else")
}

fn too_many_answers(at: u64) -> NbdError {
    NbdError::protocol(
        "a block status",
        format!("the whole disk in {} answers", extents::MAX_ANSWERS),
        format!("an end at byte {at}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_split_at_whole_blocks() {
        let range = |start, end| ByteRange { start, end };
        for (whole, parts) in [
            (range(0, 512), [range(0, 0), range(0, 512), range(512, 512)]),
            (range(5, 7), [range(5, 7), range(7, 7), range(7, 7)]),
            (range(5, 515), [range(5, 512), range(512, 512), range(512, 515)]),
            (range(0, 3), [range(0, 0), range(0, 0), range(0, 3)]),
            (range(1, 2000), [range(1, 512), range(512, 1536), range(1536, 2000)]),
        ] {
            assert_eq!(split(whole, 512), parts, "{whole:?}");
        }
        assert_eq!(split(range(5, 7), 1), [range(5, 5), range(5, 7), range(7, 7)]);
    }
}

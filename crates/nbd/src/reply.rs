//! Replies of the transmission phase, after "Simple reply message", "Structured reply chunk message" and "Structured
//! reply types".
//!
//! An error of a function here means that the stream cannot be followed any further. What the server refuses in order
//! is an outcome of one request.

use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::NbdError;
use crate::wire::{self, Command, Request, u16_from, u32_from, u64_from};

/// One descriptor of `NBD_REPLY_TYPE_BLOCK_STATUS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) length: u32,
    pub(crate) flags: u32,
}

/// What a request brought.
#[derive(Debug)]
pub(crate) enum Answer {
    Done,
    Data(Vec<u8>),
    Extents(Vec<Extent>),
}

/// Head of a message from the server, both kinds in one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Head {
    Simple { errno: u32 },
    Chunk { flags: u16, kind: u16, length: u32 },
}

/// Reads the head and the cookie of the next message.
pub(crate) fn head(from: &mut impl Read) -> io::Result<Result<(Head, u64), NbdError>> {
    match u32_from(from)? {
        wire::SIMPLE_REPLY_MAGIC => {
            let errno = u32_from(from)?;
            Ok(Ok((Head::Simple { errno }, u64_from(from)?)))
        }
        wire::STRUCTURED_REPLY_MAGIC => {
            let flags = u16_from(from)?;
            let kind = u16_from(from)?;
            let cookie = u64_from(from)?;
            Ok(Ok((Head::Chunk { flags, kind, length: u32_from(from)? }, cookie)))
        }
        magic => Ok(Err(NbdError::protocol(
            "a reply",
            format!("magic {:#x} or {:#x}", wire::SIMPLE_REPLY_MAGIC, wire::STRUCTURED_REPLY_MAGIC),
            format!("{magic:#x}"),
        ))),
    }
}

/// Most separate pieces of one read that have come while others are missing. Ours: chunks may come in any order, and
/// memory must not grow with their number. Pieces that touch count once, so an answer in order is always one.
const MAX_PIECES: usize = 4096;

/// A reply that is being put together.
#[derive(Debug)]
pub(crate) struct Gathering {
    request: Request,
    structured: bool,
    /// Metadata contexts of the connection.
    contexts: Vec<u32>,
    buffer: Vec<u8>,
    /// Ranges of `buffer` that are filled: start and end, apart from each other.
    filled: BTreeMap<usize, usize>,
    wanted: Option<u32>,
    seen: Vec<u32>,
    extents: Vec<Extent>,
    error: Option<NbdError>,
    errors: u32,
}

impl Gathering {
    /// `contexts` are all those of the connection, `wanted` is the one whose extents are kept.
    pub(crate) fn new(
        request: Request,
        structured: bool,
        contexts: &[u32],
        wanted: Option<u32>,
    ) -> Gathering {
        let bytes = if request.command == Command::Read { request.length as usize } else { 0 };
        Gathering {
            request,
            structured,
            contexts: contexts.to_vec(),
            buffer: vec![0; bytes],
            filled: BTreeMap::new(),
            wanted,
            seen: Vec::new(),
            extents: Vec::new(),
            error: None,
            errors: 0,
        }
    }

    /// Reads the rest of one message. `true` if the reply is whole.
    pub(crate) fn take(&mut self, head: Head, from: &mut impl Read) -> Result<bool, Broken> {
        match head {
            Head::Simple { errno } => {
                let needs_chunks = match self.request.command {
                    Command::Read => self.structured,
                    Command::BlockStatus => true,
                    _ => false,
                };
                // "Simple reply message": never for what has a payload, once structured replies are agreed on. An
                // error to a block status carries none.
                if needs_chunks && !(errno != 0 && self.request.command == Command::BlockStatus) {
                    return Err(wrong("a simple reply", "a structured reply", self.request.command.name()));
                }
                if errno != 0 {
                    self.error = Some(self.request.failed(errno, String::new()));
                } else if self.request.command == Command::Read {
                    from.read_exact(&mut self.buffer)?;
                    self.filled.insert(0, self.buffer.len());
                }
                Ok(true)
            }
            Head::Chunk { .. } if !self.structured => {
                Err(wrong("a reply", "a simple reply, as agreed on", "a structured one"))
            }
            Head::Chunk { flags, kind, length } => {
                let done = flags & wire::REPLY_FLAG_DONE != 0;
                self.chunk(kind, length, done, from)?;
                Ok(done)
            }
        }
    }

    fn chunk(&mut self, kind: u16, length: u32, done: bool, from: &mut impl Read) -> Result<(), Broken> {
        match (kind, self.request.command) {
            (wire::REPLY_NONE, _) if length == 0 && done => Ok(()),
            (wire::REPLY_NONE, _) => {
                Err(wrong("a chunk without content", "no payload, and the last chunk", length))
            }
            (wire::REPLY_OFFSET_DATA, Command::Read) => self.data(length, from),
            (wire::REPLY_OFFSET_HOLE, Command::Read) => self.hole(length, from),
            (wire::REPLY_BLOCK_STATUS, Command::BlockStatus) => self.status(length, from),
            _ if kind & wire::REPLY_ERROR_BIT != 0 => self.failure(kind, length, from),
            (kind, command) => Err(wrong(
                "a chunk",
                "a type that answers the request",
                format!("type {kind} to `{}`", command.name()),
            )),
        }
    }

    fn data(&mut self, length: u32, from: &mut impl Read) -> Result<(), Broken> {
        // "Structured reply types": at least 9, and within the request.
        let bytes = match length.checked_sub(8) {
            Some(bytes) if bytes > 0 && bytes <= self.request.length => bytes,
            _ => {
                return Err(wrong(
                    "a data chunk",
                    format!("9 to {} bytes", u64::from(self.request.length) + 8),
                    length,
                ));
            }
        };
        let offset = u64_from(from)?;
        let (start, end) = self.fill(offset, bytes)?;
        if let Some(target) = self.buffer.get_mut(start..end) {
            from.read_exact(target)?;
        }
        Ok(())
    }

    fn hole(&mut self, length: u32, from: &mut impl Read) -> Result<(), Broken> {
        if length != 12 {
            return Err(wrong("a hole chunk", "12 bytes", length));
        }
        let offset = u64_from(from)?;
        let bytes = u32_from(from)?;
        // The buffer began as zeros and pieces never overlap.
        self.fill(offset, bytes).map(drop)
    }

    /// Notes `bytes` at `offset` of the export as come; gives their place in the buffer.
    fn fill(&mut self, offset: u64, bytes: u32) -> Result<(usize, usize), Broken> {
        let place = offset.checked_sub(self.request.offset).and_then(|start| {
            let end = start.checked_add(u64::from(bytes))?;
            let fits = bytes > 0 && end <= u64::from(self.request.length);
            fits.then_some((usize::try_from(start).ok()?, usize::try_from(end).ok()?))
        });
        let Some((start, end)) = place else {
            return Err(wrong(
                "a content chunk",
                format!("bytes within {}..+{}", self.request.offset, self.request.length),
                format!("{offset}..+{bytes}"),
            ));
        };
        let before = self.filled.range(..=start).next_back().map(|(&start, &end)| (start, end));
        let after = self.filled.range(start..).next().map(|(&start, &end)| (start, end));
        let overlaps =
            before.is_some_and(|(_, filled)| filled > start) || after.is_some_and(|(filled, _)| filled < end);
        if overlaps {
            return Err(wrong(
                "a content chunk",
                "bytes that have not come yet",
                format!("{offset}..+{bytes}"),
            ));
        }
        let (mut piece_start, mut piece_end) = (start, end);
        if let Some((earlier, _)) = before.filter(|(_, filled)| *filled == start) {
            piece_start = earlier;
        }
        if let Some((later, later_end)) = after.filter(|(later, _)| *later == end) {
            self.filled.remove(&later);
            piece_end = later_end;
        }
        self.filled.insert(piece_start, piece_end);
        if self.filled.len() > MAX_PIECES {
            return Err(wrong("a read", format!("at most {MAX_PIECES} separate pieces"), "more"));
        }
        Ok((start, end))
    }

    fn status(&mut self, length: u32, from: &mut impl Read) -> Result<(), Broken> {
        let count = match length.checked_sub(4) {
            Some(rest) if rest > 0 && rest % 8 == 0 && rest / 8 <= wire::MAX_DESCRIPTORS => rest / 8,
            _ => {
                return Err(wrong(
                    "a block status chunk",
                    format!("4 bytes and 8 for each of 1 to {} descriptors", wire::MAX_DESCRIPTORS),
                    length,
                ));
            }
        };
        let context = u32_from(from)?;
        if !self.contexts.contains(&context) || self.seen.contains(&context) {
            return Err(wrong(
                "a block status chunk",
                format!("each of the contexts {:?} once", self.contexts),
                context,
            ));
        }
        self.seen.push(context);
        let mut covered = 0u64;
        for _ in 0..count {
            let extent = Extent { length: u32_from(from)?, flags: u32_from(from)? };
            // "Request types", `NBD_CMD_BLOCK_STATUS`: only the last descriptor may reach past the request.
            if extent.length == 0 || covered >= u64::from(self.request.length) {
                return Err(wrong(
                    "a block status chunk",
                    format!("descriptors that are not empty and begin within {} bytes", self.request.length),
                    format!("{} bytes at {covered}", extent.length),
                ));
            }
            covered = covered.saturating_add(u64::from(extent.length));
            if self.wanted == Some(context) {
                self.extents.push(extent);
            }
        }
        Ok(())
    }

    fn failure(&mut self, kind: u16, length: u32, from: &mut impl Read) -> Result<(), Broken> {
        self.errors += 1;
        if self.errors > wire::MAX_ERROR_CHUNKS {
            return Err(wrong("a reply", format!("at most {} error chunks", wire::MAX_ERROR_CHUNKS), "more"));
        }
        let needed = if kind == wire::REPLY_ERROR_OFFSET { 14 } else { 6 };
        if length < needed || length > wire::MAX_ERROR_PAYLOAD {
            return Err(wrong(
                "an error chunk",
                format!("{needed} to {} bytes", wire::MAX_ERROR_PAYLOAD),
                length,
            ));
        }
        let mut payload = vec![0; length as usize];
        from.read_exact(&mut payload)?;
        let mut rest = payload.as_slice();
        let errno = u32_from(&mut rest)?;
        let said = usize::from(u16_from(&mut rest)?);
        let room = length.saturating_sub(needed) as usize;
        let Some((message, mut rest)) = rest.split_at_checked(said).filter(|_| said <= room) else {
            return Err(wrong("an error chunk", format!("a message of at most {room} bytes"), said));
        };
        if errno == 0 {
            return Err(wrong("an error chunk", "an error number", 0));
        }
        let mut message = wire::text(message);
        if kind == wire::REPLY_ERROR_OFFSET {
            let offset = u64_from(&mut rest)?;
            let inside = offset
                .checked_sub(self.request.offset)
                .is_some_and(|within| within < u64::from(self.request.length));
            if !inside {
                return Err(wrong(
                    "an error chunk",
                    format!("an offset within {}..+{}", self.request.offset, self.request.length),
                    offset,
                ));
            }
            if message.is_empty() {
                message.push_str(crate::error::errno_name(errno));
            }
            message = format!("{message}, at byte {offset}");
        }
        // The first error says most; the request has failed as a whole.
        if self.error.is_none() {
            self.error = Some(self.request.failed(errno, message));
        }
        Ok(())
    }

    /// The outcome of a reply that is whole. The outer error: the server claims success for what it did not send.
    pub(crate) fn finish(self) -> Result<Result<Answer, NbdError>, NbdError> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        match self.request.command {
            Command::Read => {
                let whole = self.buffer.is_empty()
                    || (self.filled.len() == 1 && self.filled.get(&0) == Some(&self.buffer.len()));
                if !whole {
                    let come: usize = self.filled.iter().map(|(start, end)| end - start).sum();
                    return Err(NbdError::protocol(
                        "a read",
                        format!("all {} bytes at {}", self.request.length, self.request.offset),
                        format!("{come} bytes and the end of the reply"),
                    ));
                }
                Ok(Ok(Answer::Data(self.buffer)))
            }
            Command::BlockStatus => {
                // A context that is left out must not look clean.
                if let Some(missing) = self.wanted.filter(|id| !self.seen.contains(id)) {
                    return Err(NbdError::protocol(
                        "a block status",
                        format!("descriptors of context {missing}"),
                        "none",
                    ));
                }
                Ok(Ok(Answer::Extents(self.extents)))
            }
            _ => Ok(Ok(Answer::Done)),
        }
    }
}

/// Why the stream cannot be followed any further.
#[derive(Debug)]
pub(crate) enum Broken {
    Socket(io::Error),
    Protocol(NbdError),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Broken {
        Broken::Socket(error)
    }
}

fn wrong(place: &'static str, expected: impl Into<String>, found: impl ToString) -> Broken {
    Broken::Protocol(NbdError::protocol(place, expected, found.to_string()))
}

#[cfg(test)]
mod tests;

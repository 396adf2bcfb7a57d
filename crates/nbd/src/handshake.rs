//! Handshake phase: from the first byte to the transmission phase, after "Newstyle negotiation", "Fixed newstyle
//! negotiation" and "Option types" of the specification.
//!
//! Order of options: structured replies, metadata contexts, then `NBD_OPT_GO`. A server that does not know `GO` gets
//! `NBD_OPT_EXPORT_NAME`, one that is not fixed newstyle gets nothing else.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::NbdError;
use crate::wire::{self, array, u16_from, u32_from, u64_from};

/// What a server says of an export, and what was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) size: u64,
    /// "Transmission flags".
    pub(crate) flags: u16,
    pub(crate) blocks: BlockSizes,
    pub(crate) structured: bool,
    /// Number and name of every context that was asked for and is offered.
    pub(crate) contexts: Vec<(u32, String)>,
}

/// "Block size constraints" of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths of requests are multiples of it: a power of two, at most 64 KiB.
    pub minimum: u32,
    /// Offsets and lengths should be multiples of it: a power of two.
    pub preferred: u32,
    /// Largest payload of one request that we send: the server's limit, and never more than 32 MiB.
    pub maximum: u32,
}

impl BlockSizes {
    /// A minimum of 1 is what a server that names nothing should support ("Block size constraints").
    const DEFAULT: BlockSizes =
        BlockSizes { minimum: 1, preferred: wire::DEFAULT_PREFERRED, maximum: wire::MAX_PAYLOAD };

    fn checked(minimum: u32, preferred: u32, maximum: u32) -> Result<BlockSizes, NbdError> {
        let good = minimum.is_power_of_two()
            && minimum <= wire::MAX_MINIMUM
            && preferred.is_power_of_two()
            && preferred >= minimum
            && maximum >= minimum
            && (maximum == u32::MAX || maximum.is_multiple_of(minimum));
        if !good {
            return Err(NbdError::handshake(
                "a minimum block size that is a power of two up to 65536, a preferred one not below it, and a \
                 largest payload that is a multiple of the minimum",
                format!("{minimum}, {preferred}, {maximum}"),
            ));
        }
        let most = maximum.min(wire::MAX_PAYLOAD);
        let unit = if preferred <= most { preferred } else { minimum };
        Ok(BlockSizes { minimum, preferred, maximum: most / unit * unit })
    }
}

/// An entry of [`list`](crate::list).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name to open it by.
    pub name: String,
    /// Text of the server for a person; often empty.
    pub description: String,
}

/// One handshake on one connection.
pub(crate) struct Handshake<S> {
    stream: S,
    timeout: Duration,
    fixed: bool,
    no_zeroes: bool,
}

enum Reply {
    Ack,
    Data(u32, Vec<u8>),
    Refused(u32, String),
}

const ANSWER: &str = "answer the handshake";

impl<S: Read + Write> Handshake<S> {
    /// Exchanges magic numbers and flags.
    pub(crate) fn begin(stream: S, timeout: Duration) -> Result<Handshake<S>, NbdError> {
        let mut shake = Handshake { stream, timeout, fixed: false, no_zeroes: false };
        let magic = shake.take(|from| u64_from(from))?;
        if magic != wire::INIT_MAGIC {
            return Err(NbdError::handshake(format!("magic {:#x}", wire::INIT_MAGIC), format!("{magic:#x}")));
        }
        let style = shake.take(|from| u64_from(from))?;
        if style == wire::OLDSTYLE_MAGIC {
            return Err(NbdError::handshake(
                "newstyle negotiation",
                "an oldstyle server without export names",
            ));
        }
        if style != wire::OPTION_MAGIC {
            return Err(NbdError::handshake(
                format!("magic {:#x}", wire::OPTION_MAGIC),
                format!("{style:#x}"),
            ));
        }
        let flags = shake.take(|from| u16_from(from))?;
        shake.fixed = flags & wire::FLAG_FIXED_NEWSTYLE != 0;
        shake.no_zeroes = flags & wire::FLAG_NO_ZEROES != 0;
        let ours = flags & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        shake.send(&u32::from(ours).to_be_bytes())?;
        Ok(shake)
    }

    /// Agrees on an export. `allocation` asks for `base:allocation` and may come back without it; each of `bitmaps`
    /// must be offered.
    pub(crate) fn open(
        &mut self,
        export: &str,
        allocation: bool,
        bitmaps: &[String],
    ) -> Result<Agreed, NbdError> {
        let agreed = self.haggle(export, allocation, bitmaps);
        if let Err(NbdError::Handshake { .. } | NbdError::NoSuchExport { .. } | NbdError::NoContext { .. }) =
            &agreed
        {
            self.abort();
        }
        agreed
    }

    fn haggle(&mut self, export: &str, allocation: bool, bitmaps: &[String]) -> Result<Agreed, NbdError> {
        check_string("name of an export", export)?;
        let mut names: Vec<String> = bitmaps.iter().map(|name| bitmap_context(name)).collect();
        if allocation {
            names.push(wire::ALLOCATION.to_owned());
        }
        for name in &names {
            check_string("name of a metadata context", name)?;
        }
        let structured = self.fixed && self.structured_replies()?;
        let contexts =
            if structured && !names.is_empty() { self.meta_contexts(export, &names)? } else { Vec::new() };
        for name in bitmaps.iter().map(|name| bitmap_context(name)) {
            if !contexts.iter().any(|(_, offered)| *offered == name) {
                return Err(NbdError::NoContext { name });
            }
        }
        let gone = if self.fixed { self.go(export)? } else { None };
        let (size, flags, blocks) = match gone {
            Some(gone) => gone,
            None => self.export_name(export)?,
        };
        if flags & wire::FLAG_HAS_FLAGS == 0 {
            return Err(NbdError::handshake("transmission flags with bit 0 set", format!("{flags:#06x}")));
        }
        // Offsets of files are signed 64-bit numbers on every system that serves one.
        if size > i64::MAX as u64 || !size.is_multiple_of(u64::from(blocks.minimum)) {
            return Err(NbdError::handshake(
                format!(
                    "a size up to 2^63 - 1 that is a multiple of the minimum block size {}",
                    blocks.minimum
                ),
                format!("{size} bytes"),
            ));
        }
        Ok(Agreed { size, flags, blocks, structured, contexts })
    }

    /// Names of the exports, in the server's order.
    pub(crate) fn list(&mut self) -> Result<Vec<Listed>, NbdError> {
        if !self.fixed {
            return Err(NbdError::handshake("a fixed newstyle server, which can list", "newstyle"));
        }
        self.option(wire::OPT_LIST, &[])?;
        let mut listed = Vec::new();
        for _ in 0..wire::MAX_OPTION_REPLIES {
            match self.reply(wire::OPT_LIST)? {
                Reply::Ack => {
                    self.abort();
                    return Ok(listed);
                }
                Reply::Data(wire::REP_SERVER, data) => listed.push(server_entry(&data)?),
                Reply::Data(kind, _) => return Err(unexpected("NBD_REP_SERVER", kind)),
                Reply::Refused(kind, message) => return Err(refused("a list of exports", kind, &message)),
            }
        }
        Err(too_many())
    }

    fn structured_replies(&mut self) -> Result<bool, NbdError> {
        self.option(wire::OPT_STRUCTURED_REPLY, &[])?;
        match self.reply(wire::OPT_STRUCTURED_REPLY)? {
            Reply::Ack => Ok(true),
            Reply::Refused(wire::REP_ERR_SHUTDOWN, message) => {
                Err(refused("structured replies", wire::REP_ERR_SHUTDOWN, &message))
            }
            Reply::Refused(..) => Ok(false),
            Reply::Data(kind, _) => Err(unexpected("NBD_REP_ACK", kind)),
        }
    }

    fn meta_contexts(&mut self, export: &str, names: &[String]) -> Result<Vec<(u32, String)>, NbdError> {
        let mut data = Vec::new();
        push_string(&mut data, export)?;
        data.extend_from_slice(&narrow(names.len())?.to_be_bytes());
        for name in names {
            push_string(&mut data, name)?;
        }
        self.option(wire::OPT_SET_META_CONTEXT, &data)?;
        let mut contexts: Vec<(u32, String)> = Vec::new();
        // One more than asked for: the acknowledgement.
        for _ in 0..=names.len() {
            match self.reply(wire::OPT_SET_META_CONTEXT)? {
                Reply::Ack => return Ok(contexts),
                Reply::Data(wire::REP_META_CONTEXT, data) => {
                    let context = meta_context(&data)?;
                    let known = contexts.iter().any(|(id, name)| *id == context.0 || *name == context.1);
                    if known || !names.contains(&context.1) {
                        return Err(NbdError::handshake(
                            "each metadata context that was asked for once, with a number of its own",
                            format!("`{}` with number {}", wire::text(context.1.as_bytes()), context.0),
                        ));
                    }
                    contexts.push(context);
                }
                Reply::Data(kind, _) => return Err(unexpected("NBD_REP_META_CONTEXT", kind)),
                Reply::Refused(wire::REP_ERR_UNSUP, _) => return Ok(Vec::new()),
                Reply::Refused(wire::REP_ERR_UNKNOWN, message) => return Err(no_such(export, &message)),
                Reply::Refused(kind, message) => return Err(refused("metadata contexts", kind, &message)),
            }
        }
        Err(too_many())
    }

    /// `None` if the server does not know the option.
    fn go(&mut self, export: &str) -> Result<Option<(u64, u16, BlockSizes)>, NbdError> {
        let mut data = Vec::new();
        push_string(&mut data, export)?;
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&wire::INFO_BLOCK_SIZE.to_be_bytes());
        self.option(wire::OPT_GO, &data)?;
        let mut facts = None;
        let mut blocks = BlockSizes::DEFAULT;
        for _ in 0..wire::MAX_OPTION_REPLIES {
            match self.reply(wire::OPT_GO)? {
                Reply::Ack => {
                    let (size, flags) = facts.ok_or_else(|| {
                        NbdError::handshake("NBD_INFO_EXPORT before the acknowledgement", "none")
                    })?;
                    return Ok(Some((size, flags, blocks)));
                }
                Reply::Data(wire::REP_INFO, data) => {
                    let mut from = data.as_slice();
                    let short = |_| NbdError::handshake("a whole NBD_REP_INFO", format!("{data:02x?}"));
                    match u16_from(&mut from).map_err(short)? {
                        wire::INFO_EXPORT => {
                            facts = Some((
                                u64_from(&mut from).map_err(short)?,
                                u16_from(&mut from).map_err(short)?,
                            ));
                        }
                        wire::INFO_BLOCK_SIZE => {
                            blocks = BlockSizes::checked(
                                u32_from(&mut from).map_err(short)?,
                                u32_from(&mut from).map_err(short)?,
                                u32_from(&mut from).map_err(short)?,
                            )?;
                        }
                        // "Option types": a client ignores information it does not know.
                        _ => {}
                    }
                }
                Reply::Data(kind, _) => return Err(unexpected("NBD_REP_INFO", kind)),
                Reply::Refused(wire::REP_ERR_UNSUP, _) => return Ok(None),
                Reply::Refused(wire::REP_ERR_UNKNOWN, message) => return Err(no_such(export, &message)),
                Reply::Refused(kind, message) => {
                    return Err(refused(&format!("export `{export}`"), kind, &message));
                }
            }
        }
        Err(too_many())
    }

    fn export_name(&mut self, export: &str) -> Result<(u64, u16, BlockSizes), NbdError> {
        self.option(wire::OPT_EXPORT_NAME, export.as_bytes())?;
        let size = match u64_from(&mut self.stream) {
            // The option has no error reply: a server that does not have the export ends the session.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(no_such(export, "it closed the connection when asked for it"));
            }
            size => size.map_err(|error| wire::broken(&error, ANSWER, self.timeout))?,
        };
        let flags = self.take(|from| u16_from(from))?;
        if !self.no_zeroes {
            self.take(|from| array::<{ wire::RESERVED_ZEROES }>(from))?;
        }
        Ok((size, flags, BlockSizes::DEFAULT))
    }

    /// "Termination of the session during option haggling": ends it in order. The server may be gone already.
    fn abort(&mut self) {
        let _ = self.option(wire::OPT_ABORT, &[]);
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        let mut message = Vec::with_capacity(16 + data.len());
        message.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&narrow(data.len())?.to_be_bytes());
        message.extend_from_slice(data);
        self.send(&message)
    }

    fn reply(&mut self, option: u32) -> Result<Reply, NbdError> {
        let magic = self.take(|from| u64_from(from))?;
        if magic != wire::OPTION_REPLY_MAGIC {
            return Err(NbdError::handshake(
                format!("option reply magic {:#x}", wire::OPTION_REPLY_MAGIC),
                format!("{magic:#x}"),
            ));
        }
        let answered = self.take(|from| u32_from(from))?;
        let kind = self.take(|from| u32_from(from))?;
        let length = self.take(|from| u32_from(from))?;
        if answered != option || length > wire::MAX_OPTION_REPLY {
            return Err(NbdError::handshake(
                format!("a reply to option {option} of at most {} bytes", wire::MAX_OPTION_REPLY),
                format!("a reply to option {answered} of {length} bytes"),
            ));
        }
        let mut data = vec![0; length as usize];
        self.take(|from| from.read_exact(&mut data))?;
        Ok(match kind {
            wire::REP_ACK => Reply::Ack,
            _ if kind & wire::REP_ERROR_BIT != 0 => Reply::Refused(kind, wire::text(&data)),
            _ => Reply::Data(kind, data),
        })
    }

    fn take<T>(&mut self, read: impl FnOnce(&mut S) -> io::Result<T>) -> Result<T, NbdError> {
        read(&mut self.stream).map_err(|error| wire::broken(&error, ANSWER, self.timeout))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        self.stream
            .write_all(bytes)
            .map_err(|error| wire::broken(&error, "take what the handshake sends", self.timeout))
    }
}

/// The context of a bitmap, after QEMU `docs/interop/nbd`.
pub(crate) fn bitmap_context(name: &str) -> String {
    format!("{}{name}", wire::DIRTY_BITMAP)
}

fn server_entry(data: &[u8]) -> Result<Listed, NbdError> {
    let wrong = || NbdError::handshake("NBD_REP_SERVER with a name", format!("{} bytes", data.len()));
    let mut from = data;
    let length = u32_from(&mut from).map_err(|_| wrong())?;
    let (name, description) = from.split_at_checked(length as usize).ok_or_else(wrong)?;
    let name = std::str::from_utf8(name).map_err(|_| wrong())?.to_owned();
    Ok(Listed { name, description: wire::text(description) })
}

fn meta_context(data: &[u8]) -> Result<(u32, String), NbdError> {
    let wrong = || NbdError::handshake("NBD_REP_META_CONTEXT with a name", format!("{} bytes", data.len()));
    let mut from = data;
    let id = u32_from(&mut from).map_err(|_| wrong())?;
    Ok((id, std::str::from_utf8(from).map_err(|_| wrong())?.to_owned()))
}

/// "Conventions": a string is at most 4096 bytes and holds no NUL.
fn check_string(what: &str, string: &str) -> Result<(), NbdError> {
    if string.len() > wire::MAX_STRING || string.contains('\0') {
        return Err(NbdError::handshake(
            format!("a {what} of at most {} bytes without NUL", wire::MAX_STRING),
            format!("{} bytes", string.len()),
        ));
    }
    Ok(())
}

fn push_string(data: &mut Vec<u8>, string: &str) -> Result<(), NbdError> {
    data.extend_from_slice(&narrow(string.len())?.to_be_bytes());
    data.extend_from_slice(string.as_bytes());
    Ok(())
}

fn narrow(length: usize) -> Result<u32, NbdError> {
    u32::try_from(length)
        .map_err(|_| NbdError::handshake("less than 4 GiB to send", format!("{length} bytes")))
}

fn no_such(export: &str, message: &str) -> NbdError {
    NbdError::NoSuchExport { name: export.to_owned(), message: message.to_owned() }
}

fn refused(what: &str, kind: u32, message: &str) -> NbdError {
    // "Option reply types".
    let name = match kind & !wire::REP_ERROR_BIT {
        1 => "the option is not supported",
        2 => "forbidden by the server's policy",
        3 => "the option is invalid",
        4 => "not supported on the server's platform",
        5 => "TLS is required, which is not supported here",
        6 => "the export is unknown",
        7 => "the server is being shut down",
        8 => "block sizes are required",
        9 => "the option is too big",
        _ => "refused",
    };
    NbdError::handshake(what, format!("{name} (reply {kind:#x}): {message}"))
}

fn unexpected(expected: &str, kind: u32) -> NbdError {
    NbdError::handshake(expected, format!("reply type {kind:#x}"))
}

fn too_many() -> NbdError {
    NbdError::handshake("an end of the replies to an option", "more replies than are read")
}

#[cfg(test)]
mod tests;

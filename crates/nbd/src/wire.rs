//! Numbers and messages of the protocol. All numbers are big-endian.
//!
//! Names in quotation marks are sections of the NBD protocol specification (`doc/proto.md` of the NBD project).

use std::io::{self, Read};
use std::time::Duration;

use crate::NbdError;

/// "Newstyle negotiation": `NBDMAGIC`, the first eight bytes of every server.
pub(crate) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "Newstyle negotiation": `IHAVEOPT`, the next eight, and the head of every option.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
/// "Oldstyle negotiation": what an old server sends instead.
pub(crate) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// "Fixed newstyle negotiation": the head of every reply to an option.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// "Request message".
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// "Simple reply message".
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// "Structured reply chunk message".
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// "Handshake flags" and "Client flags": the same bits in both.
pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const FLAG_NO_ZEROES: u16 = 1 << 1;
/// "Newstyle negotiation": reserved bytes after the answer to `NBD_OPT_EXPORT_NAME`.
pub(crate) const RESERVED_ZEROES: usize = 124;

/// "Transmission flags".
pub(crate) const FLAG_HAS_FLAGS: u16 = 1 << 0;
pub(crate) const FLAG_READ_ONLY: u16 = 1 << 1;
pub(crate) const FLAG_SEND_FLUSH: u16 = 1 << 2;
pub(crate) const FLAG_SEND_FUA: u16 = 1 << 3;
pub(crate) const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(crate) const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// "Option types".
pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_ABORT: u32 = 2;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const OPT_SET_META_CONTEXT: u32 = 10;

/// "Option reply types". Bit 31 marks errors.
pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_META_CONTEXT: u32 = 4;
pub(crate) const REP_ERROR_BIT: u32 = 1 << 31;
pub(crate) const REP_ERR_UNSUP: u32 = REP_ERROR_BIT + 1;
pub(crate) const REP_ERR_UNKNOWN: u32 = REP_ERROR_BIT + 6;
pub(crate) const REP_ERR_SHUTDOWN: u32 = REP_ERROR_BIT + 7;

/// "Option types", `NBD_OPT_INFO` and `NBD_OPT_GO`: information types.
pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

/// "Conventions": no string is longer.
pub(crate) const MAX_STRING: usize = 4096;
/// Largest data of a reply to an option: a name and a description ("Option reply types", `NBD_REP_SERVER`) of
/// [`MAX_STRING`] each, their lengths, and room for fields that are not known yet.
pub(crate) const MAX_OPTION_REPLY: u32 = 2 * MAX_STRING as u32 + 64;
/// Most replies to one option. Ours: it bounds a list of exports to 80 MiB at the worst.
pub(crate) const MAX_OPTION_REPLIES: usize = 10_000;

/// "Command flags".
pub(crate) const CMD_FLAG_FUA: u16 = 1 << 0;
/// "Structured reply flags".
pub(crate) const REPLY_FLAG_DONE: u16 = 1 << 0;
/// "Structured reply types". Bit 15 marks errors.
pub(crate) const REPLY_NONE: u16 = 0;
pub(crate) const REPLY_OFFSET_DATA: u16 = 1;
pub(crate) const REPLY_OFFSET_HOLE: u16 = 2;
pub(crate) const REPLY_BLOCK_STATUS: u16 = 5;
pub(crate) const REPLY_ERROR_BIT: u16 = 1 << 15;
pub(crate) const REPLY_ERROR_OFFSET: u16 = REPLY_ERROR_BIT + 2;
/// Largest payload of an error chunk: number, message length, message, offset, and room for unknown fields.
pub(crate) const MAX_ERROR_PAYLOAD: u32 = MAX_STRING as u32 + 64;
/// Most error chunks in one reply. Ours: "Structured reply types" names no limit.
pub(crate) const MAX_ERROR_CHUNKS: u32 = 1024;
/// Most descriptors of one context in one answer to `NBD_CMD_BLOCK_STATUS`. Ours: "Request types" names no limit;
/// QEMU sends at most 2^17.
pub(crate) const MAX_DESCRIPTORS: u32 = 1 << 20;

/// "Block size constraints": what a client should keep to where the server names nothing.
pub(crate) const MAX_PAYLOAD: u32 = 1 << 25;
/// "Block size constraints": the preferred size where the server names nothing.
pub(crate) const DEFAULT_PREFERRED: u32 = 1 << 12;
/// "Block size constraints": no minimum is larger.
pub(crate) const MAX_MINIMUM: u32 = 1 << 16;

/// "Metadata contexts": `base:allocation`; this bit alone promises zeros, `NBD_STATE_HOLE` does not.
pub(crate) const STATE_ZERO: u32 = 1 << 1;
pub(crate) const ALLOCATION: &str = "base:allocation";
/// QEMU `docs/interop/nbd`: one context for each exported bitmap, and its only bit.
pub(crate) const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
pub(crate) const STATE_DIRTY: u32 = 1 << 0;

/// "Request types".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    WriteZeroes = 6,
    BlockStatus = 7,
}

impl Command {
    /// For messages: "cannot ...".
    pub(crate) fn name(self) -> &'static str {
        match self {
            Command::Read => "read",
            Command::Write => "write",
            Command::Disconnect => "disconnect",
            Command::Flush => "flush",
            Command::WriteZeroes => "write zeros over",
            Command::BlockStatus => "tell the block status of",
        }
    }
}

/// What is asked, without cookie and payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) command: Command,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    /// "Request message".
    pub(crate) fn encode(&self, cookie: u64) -> Vec<u8> {
        let mut message = Vec::with_capacity(28);
        message.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        message.extend_from_slice(&self.flags.to_be_bytes());
        message.extend_from_slice(&(self.command as u16).to_be_bytes());
        message.extend_from_slice(&cookie.to_be_bytes());
        message.extend_from_slice(&self.offset.to_be_bytes());
        message.extend_from_slice(&self.length.to_be_bytes());
        message
    }

    pub(crate) fn failed(&self, errno: u32, message: String) -> NbdError {
        let message = if message.is_empty() { errno_text(errno) } else { message };
        NbdError::Server {
            errno,
            message,
            command: self.command.name(),
            offset: self.offset,
            length: u64::from(self.length),
        }
    }
}

fn errno_text(errno: u32) -> String {
    crate::error::errno_name(errno).to_owned()
}

/// Reads exactly `N` bytes.
pub(crate) fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(crate) fn u16_from(from: &mut impl Read) -> io::Result<u16> {
    array(from).map(u16::from_be_bytes)
}

pub(crate) fn u32_from(from: &mut impl Read) -> io::Result<u32> {
    array(from).map(u32::from_be_bytes)
}

pub(crate) fn u64_from(from: &mut impl Read) -> io::Result<u64> {
    array(from).map(u64::from_be_bytes)
}

/// A text of the server, for a person: not longer than a string may be, and nothing that moves a cursor.
pub(crate) fn text(bytes: &[u8]) -> String {
    let bytes = bytes.get(..MAX_STRING).unwrap_or(bytes);
    let replace = |letter: char| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter };
    String::from_utf8_lossy(bytes).chars().map(replace).collect()
}

/// What a failure of the socket means while `what` is awaited.
pub(crate) fn broken(error: &io::Error, what: &'static str, waited: Duration) -> NbdError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => NbdError::TimedOut { what, waited },
        io::ErrorKind::UnexpectedEof => {
            NbdError::Closed { reason: format!("the server ended it and did not {what}") }
        }
        _ => NbdError::Closed { reason: format!("the server could not {what}: {error}") },
    }
}

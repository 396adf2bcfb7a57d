//! A client of libvirt's RPC protocol over its local socket: one call at a time, each with a time limit.
//!
//! A packet is: length u32 (with itself), program u32, version u32, procedure u32, type u32 (0 call, 1 reply, 2 event), serial
//! u32, status u32 (0 ok, 1 error), then XDR. Source of numbers and layouts: what libvirt's own client of 9.0 says to its
//! daemon; libvirt never gives a number out twice. See docs/design/0020-libvirt.md.
//!
//! Refuses to know: what the calls are for.
//!
//! Invariants
//! - After a call that did not end in time, or an answer that makes no sense, the connection says nothing more: the next
//!   answer could be another call's. (must)

mod calls;
mod xdr;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(super) use calls::{Checkpoint, Domain, Kept, State};
use xdr::{Reader, Writer};

/// The program of libvirt's general calls.
const REMOTE: u32 = 0x2000_8086;
/// The program of calls that only QEMU has.
const QEMU: u32 = 0x2000_8087;
/// The version of both programs.
const VERSION: u32 = 1;
/// Bytes of a packet before its payload, the length included.
const HEADER: usize = 28;
/// The largest packet that libvirt sends or takes (`VIR_NET_MESSAGE_MAX`).
const MAX_PACKET: usize = 32 << 20;
/// How long a plain question may take.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// For calls that libvirt itself lets wait up to 30 s for another job of the machine.
const WAIT: Duration = Duration::from_secs(40);
/// For calls that start and stop processes.
const CHANGE: Duration = Duration::from_secs(120);

/// Why libvirt could not be asked, or what it answered instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// No daemon at the socket.
    #[error("no libvirt daemon answers at {path}: {reason}")]
    Connect {
        /// The socket.
        path: String,
        /// The system's word.
        reason: String,
    },
    /// The daemon went away or the connection was given up before.
    #[error("the connection to libvirt is lost: {0}")]
    Lost(String),
    /// No answer in time.
    #[error("libvirt did not answer {call} within {seconds} s")]
    TimedOut {
        /// The call.
        call: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The answer makes no sense.
    #[error("libvirt's answer cannot be understood: {0}")]
    Protocol(String),
    /// libvirt refused.
    #[error("{message}")]
    Refused {
        /// `virErrorNumber`.
        code: i32,
        /// libvirt's words.
        message: String,
    },
}

impl LibvirtError {
    /// `VIR_ERR_NO_DOMAIN`.
    pub(super) const NO_DOMAIN: i32 = 42;
    /// `VIR_ERR_OPERATION_INVALID`: not in this state, no such job.
    pub(super) const INVALID: i32 = 55;
    /// `VIR_ERR_OPERATION_TIMEOUT`: another job of the machine held it for 30 s.
    pub(super) const BUSY: i32 = 68;
    /// `VIR_ERR_OPERATION_UNSUPPORTED`.
    pub(super) const UNSUPPORTED: i32 = 84;
    /// `VIR_ERR_CHECKPOINT_INCONSISTENT`: a bitmap is missing or broken.
    pub(super) const INCONSISTENT: i32 = 109;
    /// `VIR_ERR_NO_DOMAIN_CHECKPOINT`.
    pub(super) const NO_CHECKPOINT: i32 = 103;
    /// `VIR_ERR_NO_DOMAIN_BACKUP`.
    pub(super) const NO_BACKUP: i32 = 104;

    /// The code of a refusal.
    pub(super) fn code(&self) -> Option<i32> {
        match self {
            LibvirtError::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// One conversation with a daemon.
pub(super) struct Connection {
    stream: UnixStream,
    path: PathBuf,
    serial: u32,
    broken: Option<String>,
}

struct Packet {
    procedure: u32,
    kind: u32,
    serial: u32,
    status: u32,
    payload: Vec<u8>,
}

impl Connection {
    /// Connects and opens the system's QEMU driver.
    pub(super) fn open(path: &Path) -> Result<Connection, LibvirtError> {
        let stream = UnixStream::connect(path).map_err(|error| LibvirtError::Connect {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        let mut connection = Connection { stream, path: path.to_owned(), serial: 0, broken: None };
        connection.authenticate()?;
        connection.open_driver("qemu:///system")?;
        Ok(connection)
    }

    /// Another conversation with the same daemon.
    pub(super) fn another(&self) -> Result<Connection, LibvirtError> {
        Connection::open(&self.path)
    }

    fn call(
        &mut self,
        (program, procedure, name): (u32, u32, &'static str),
        arguments: Writer,
        limit: Duration,
    ) -> Result<Vec<u8>, LibvirtError> {
        if let Some(why) = &self.broken {
            return Err(LibvirtError::Lost(why.clone()));
        }
        let result = self.exchange(program, procedure, name, arguments.done(), limit);
        match &result {
            Ok(_) | Err(LibvirtError::Refused { .. }) => {}
            Err(error) => self.broken = Some(error.to_string()),
        }
        result
    }

    fn exchange(
        &mut self,
        program: u32,
        procedure: u32,
        name: &'static str,
        payload: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>, LibvirtError> {
        let deadline = Instant::now() + limit;
        let late = || LibvirtError::TimedOut { call: name, seconds: limit.as_secs() };
        let length = HEADER.saturating_add(payload.len());
        if length > MAX_PACKET {
            return Err(LibvirtError::Protocol(format!("{name} with {length} bytes, at most {MAX_PACKET}")));
        }
        self.serial = self.serial.wrapping_add(1);
        let mut packet = Vec::with_capacity(length);
        for word in [length as u32, program, VERSION, procedure, 0, self.serial, 0] {
            packet.extend_from_slice(&word.to_be_bytes());
        }
        packet.extend_from_slice(&payload);
        self.stream.set_write_timeout(Some(limit)).map_err(lost)?;
        self.stream.write_all(&packet).map_err(lost)?;
        loop {
            let Some(packet) = self.receive(deadline)? else { return Err(late()) };
            match packet.kind {
                // No event is asked for on a conversation of calls.
                2 => {}
                1 if packet.serial == self.serial && packet.procedure == procedure => {
                    return match packet.status {
                        0 => Ok(packet.payload),
                        _ => Err(refusal(&packet.payload)?),
                    };
                }
                kind => {
                    return Err(LibvirtError::Protocol(format!(
                        "a packet of kind {kind}, procedure {}, serial {}; expected was the answer to {name}, serial {}",
                        packet.procedure, packet.serial, self.serial
                    )));
                }
            }
        }
    }

    /// The next packet; nothing if none begins before `deadline`.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Packet>, LibvirtError> {
        let mut header = [0; HEADER];
        if !self.fill(&mut header, deadline)? {
            return Ok(None);
        }
        let mut words =
            header.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        let mut next = || words.next().unwrap_or_default();
        let length = next() as usize;
        let (_, _, procedure, kind, serial, status) = (next(), next(), next(), next(), next(), next());
        if !(HEADER..=MAX_PACKET).contains(&length) {
            return Err(LibvirtError::Protocol(format!("a packet of {length} bytes")));
        }
        // Read in pieces, so that a length alone takes no memory.
        let mut payload = Vec::new();
        let mut left = length - HEADER;
        while left > 0 {
            let at = payload.len();
            let piece = left.min(1 << 16);
            payload.resize(at + piece, 0);
            let part = payload.get_mut(at..).unwrap_or_default();
            if !self.fill(part, deadline)? {
                return Err(LibvirtError::Lost("an answer broke off".to_owned()));
            }
            left -= piece;
        }
        Ok(Some(Packet { procedure, kind, serial, status, payload }))
    }

    /// Fills `buf`; false if the deadline passes before the first byte.
    fn fill(&mut self, buf: &mut [u8], deadline: Instant) -> Result<bool, LibvirtError> {
        let mut at = 0;
        while at < buf.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return if at == 0 {
                    Ok(false)
                } else {
                    Err(LibvirtError::Lost("an answer broke off".to_owned()))
                };
            }
            self.stream.set_read_timeout(Some(left)).map_err(lost)?;
            match self.stream.read(buf.get_mut(at..).unwrap_or_default()) {
                Ok(0) => return Err(LibvirtError::Lost("the daemon closed it".to_owned())),
                Ok(read) => at += read,
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock
                            | std::io::ErrorKind::TimedOut
                            | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(lost(error)),
            }
        }
        Ok(true)
    }
}

fn lost(error: std::io::Error) -> LibvirtError {
    LibvirtError::Lost(error.to_string())
}

/// `remote_error`: code, domain, message, and more that says the same.
fn refusal(payload: &[u8]) -> Result<LibvirtError, LibvirtError> {
    let mut reader = Reader::new(payload);
    let code = reader.i32("error code")?;
    reader.i32("error domain")?;
    let message = reader.optional("error message")?.unwrap_or_else(|| format!("error {code}"));
    Ok(LibvirtError::Refused { code, message })
}

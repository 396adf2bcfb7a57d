//! The error of the client, and what of it a device tells.

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Why an export could not be opened or used.
///
/// It can be copied: one broken connection fails every request that waits on it, all with the same cause. Texts of the
/// server in it are cut and hold no control characters.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NbdError {
    /// No connection to the server.
    #[error("cannot connect to the NBD server at {address}: {source}")]
    Connect {
        /// Where the server should be.
        address: String,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// The server said something else than the handshake allows, or refused an option.
    #[error("handshake with the NBD server: expected {expected}, found {found}")]
    Handshake {
        /// What had to come.
        expected: String,
        /// What came.
        found: String,
    },
    /// The server has no export of that name, or does not show it to us.
    #[error("the NBD server has no export `{name}`: {message}")]
    NoSuchExport {
        /// The name asked for.
        name: String,
        /// What the server said.
        message: String,
    },
    /// The export does not offer a metadata context: a bitmap that is not there, or was not asked for.
    #[error("the NBD export does not offer the metadata context `{name}`")]
    NoContext {
        /// The full name, such as `qemu:dirty-bitmap:NAME`.
        name: String,
    },
    /// The server broke the protocol.
    #[error("the NBD server broke the protocol in {place}: expected {expected}, found {found}")]
    Protocol {
        /// Which message.
        place: &'static str,
        /// What had to come.
        expected: String,
        /// What came.
        found: String,
    },
    /// The server could not do what was asked.
    #[error("the NBD server cannot {command} {length} bytes at {offset}: error {errno}: {message}")]
    Server {
        /// Number of the protocol ("Error values"), those of Linux.
        errno: u32,
        /// What the server said, or the name of the number.
        message: String,
        /// `read`, `write`, ...
        command: &'static str,
        /// Where the request began.
        offset: u64,
        /// Bytes of the request.
        length: u64,
    },
    /// The server was silent for too long, or did not finish one answer in ten times as long.
    #[error("the NBD server did not {what} within {waited:?}")]
    TimedOut {
        /// What it should have done.
        what: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The connection is gone.
    #[error("the connection to the NBD server is closed: {reason}")]
    Closed {
        /// What ended it.
        reason: String,
    },
}

impl NbdError {
    pub(crate) fn protocol(
        place: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> NbdError {
        NbdError::Protocol { place, expected: expected.into(), found: found.into() }
    }

    pub(crate) fn handshake(expected: impl Into<String>, found: impl Into<String>) -> NbdError {
        NbdError::Handshake { expected: expected.into(), found: found.into() }
    }

    /// What a later request is told of a connection that this error ended.
    pub(crate) fn closed_by(&self) -> NbdError {
        match self {
            NbdError::Closed { .. } => self.clone(),
            other => NbdError::Closed { reason: format!("an earlier request failed: {other}") },
        }
    }
}

/// "Error values": of the numbers, those that decide something here.
pub(crate) const EPERM: u32 = 1;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const ENOTSUP: u32 = 95;
pub(crate) const ESHUTDOWN: u32 = 108;

/// "Error values": the names of the numbers, for messages.
pub(crate) fn errno_name(errno: u32) -> &'static str {
    match errno {
        EPERM => "operation not permitted",
        5 => "input/output error",
        12 => "cannot allocate memory",
        EINVAL => "invalid argument",
        ENOSPC => "no space left on device",
        75 => "value too large",
        ENOTSUP => "operation not supported",
        ESHUTDOWN => "server is being shut down",
        _ => "an error without a name in the protocol",
    }
}

impl From<NbdError> for io::Error {
    fn from(error: NbdError) -> io::Error {
        let kind = match &error {
            NbdError::Connect { source, .. } => source.kind(),
            NbdError::TimedOut { .. } => io::ErrorKind::TimedOut,
            NbdError::Closed { .. } => io::ErrorKind::ConnectionAborted,
            NbdError::Handshake { .. } | NbdError::Protocol { .. } => io::ErrorKind::InvalidData,
            NbdError::NoSuchExport { .. } | NbdError::NoContext { .. } => io::ErrorKind::NotFound,
            NbdError::Server { errno, .. } => match *errno {
                EPERM => io::ErrorKind::PermissionDenied,
                EINVAL => io::ErrorKind::InvalidInput,
                ENOSPC => io::ErrorKind::StorageFull,
                ENOTSUP => io::ErrorKind::Unsupported,
                _ => io::ErrorKind::Other,
            },
        };
        io::Error::new(kind, error)
    }
}

//! Where a server is, and the open socket to it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
#[cfg(unix)]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::NbdError;

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    #[cfg(unix)]
    Unix(PathBuf),
    /// `host:port`; the port reserved for NBD is 10809 ("Newstyle negotiation").
    Tcp(String),
}

impl fmt::Display for Address {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(unix)]
            Address::Unix(path) => write!(out, "unix:{}", path.display()),
            Address::Tcp(place) => write!(out, "tcp:{place}"),
        }
    }
}

/// A connected socket. Reading and writing go on at the same time from different threads.
#[derive(Debug)]
pub(crate) enum Stream {
    #[cfg(unix)]
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! on_socket {
    ($stream:expr, $socket:ident => $call:expr) => {
        match $stream {
            #[cfg(unix)]
            Stream::Unix($socket) => $call,
            Stream::Tcp($socket) => $call,
        }
    };
}

impl Stream {
    /// Connects; reads and writes on it give up after `timeout` without a byte.
    pub(crate) fn connect(address: &Address, timeout: Duration) -> Result<Stream, NbdError> {
        let open = || -> io::Result<Stream> {
            let stream = match address {
                #[cfg(unix)]
                Address::Unix(path) => Stream::Unix(connect_unix(path.clone(), timeout)?),
                Address::Tcp(place) => Stream::Tcp(connect_tcp(place, timeout)?),
            };
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(timeout)?;
            Ok(stream)
        };
        open().map_err(|source| NbdError::Connect { address: address.to_string(), source: Arc::new(source) })
    }

    pub(crate) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        on_socket!(self, socket => socket.set_read_timeout(timeout))
    }

    pub(crate) fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        on_socket!(self, socket => socket.set_write_timeout(Some(timeout)))
    }

    /// Ends both directions; a thread that reads or writes wakes up.
    pub(crate) fn shutdown(&self) {
        // Fails only on a socket that is no longer connected, which is what is wanted.
        let _ = on_socket!(self, socket => socket.shutdown(Shutdown::Both));
    }
}

/// `connect` on a unix socket waits for as long as the server does not accept and has no timeout of its own, so
/// another thread waits. It ends with the server at the latest.
#[cfg(unix)]
fn connect_unix(path: PathBuf, timeout: Duration) -> io::Result<UnixStream> {
    let (done, connected) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new().name("nbd-connect".to_owned()).spawn(move || {
        // Nobody waits any more if this fails: the socket is closed again.
        let _ = done.send(UnixStream::connect(path));
    })?;
    match connected.recv_timeout(timeout) {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("not accepted within {timeout:?}"))),
    }
}

fn connect_tcp(place: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in place.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(socket) => {
                // Requests are small and each is waited for.
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        on_socket!(self, socket => (&*socket).read(buf))
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        on_socket!(self, socket => (&*socket).write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream that ends at a moment, however busy it is: a server must not feed a handshake byte by byte for ever.
pub(crate) struct Until<'a> {
    pub(crate) stream: &'a Stream,
    pub(crate) end: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if Instant::now() >= self.end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.read(buf)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if Instant::now() >= self.end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

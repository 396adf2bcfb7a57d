//! A client of network block devices, after the NBD protocol specification (`doc/proto.md` of the NBD project).
//!
//! [`Export`] shows an export of an NBD server as a [`BlockDevice`](block_io::BlockDevice), and as a
//! [`WritableDevice`](block_io::WritableDevice) where it may be written: the frozen view of a running machine in QEMU's
//! server, or a disk that is being recovered. [`Export::dirty`] gives what changed according to a bitmap of QEMU, and
//! [`list()`] the names of the exports. Sockets block; one thread for each connection reads replies.
//!
//! | file | part of the specification |
//! |---|---|
//! | `wire` | numbers, "Request message" |
//! | `stream` | sockets, and their timeouts |
//! | `handshake` | "Newstyle negotiation", "Fixed newstyle negotiation", "Option types", "Block size constraints" |
//! | `reply` | "Simple reply message", "Structured reply chunk message", "Structured reply types" |
//! | `connection` | "Transmission": requests in flight, cookies, timeouts, the farewell |
//! | `extents` | "Metadata contexts" and QEMU's bitmaps |
//! | `export` | the device, "Block size constraints" of requests |
//!
//! Refuses
//! - oldstyle servers, TLS (use a unix socket, or a tunnel), extended headers,
//! - sizes above 2^63 - 1, and those that are not a multiple of the server's smallest block,
//! - a bitmap that was asked for and is not offered: nothing may look clean because nobody looked,
//! - every message that the specification does not allow at its place; the connection then ends for all its requests.
//!
//! Limits towards a hostile server: replies to one option 10,000 of at most 8 KiB; payload of a request 32 MiB, and a
//! reply is never larger than what was asked for; separate pieces of one read 4096; error chunks in a reply 1024, each
//! at most 4 KiB; descriptors of a block status 2^20 for each context, of which one context is kept (8 MiB); answers in
//! one walk 2^22; dirty ranges kept apart 2^22 (64 MiB). Silence ends a connection after the timeout (a flush: after
//! ten), and one request or handshake ends after ten timeouts however busy the server is.
//!
//! Invariants
//! - Only what the server calls `NBD_STATE_ZERO` is left out of the allocated ranges; a hole alone is not. (must)
//! - A read or a walk over a bitmap that does not cover all that was asked for fails. (must: INV-22)
//! - After a failure nothing more is sent on the connection, and no request waits. (must)
//! - After a failed flush every later flush fails. (must: INV-5)

mod connection;
mod error;
mod export;
mod extents;
mod handshake;
mod reply;
mod stream;
mod wire;

pub use error::NbdError;
pub use export::{Export, Options, list};
pub use handshake::{BlockSizes, Listed};
pub use stream::Address;

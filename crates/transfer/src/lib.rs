//! Both ends of moving blocks between a host and the server.
//!
//! ```text
//! protect:  Sender (agent)  --hashes-->  Reception (server) --which of these?--> Store (the pool, behind a trait)
//!                           <--wanted--
//!                           --frames-->  decoded, hashed, compared with what was announced, then stored
//! recover:  Target (agent)  --hashes-->  Delivery (server) --equal to the point's?--> PointDisk (the pool)
//!                           <--frames--  written, read again, compared
//! ```
//!
//! Refuses to know: sockets, the pool, providers, clocks. A [`Link`] carries messages, whatever it is made of; a
//! [`Store`] keeps blocks; a `BlockDevice` is read or written.
//!
//! Invariants
//! - The server believes no hash: a block counts only after the server hashed the decoded bytes, or in one process
//!   when the hasher's own [`Hashed`] says so. (must)
//! - "I have it" is answered only for the same disk's latest replica, at the same block, or for a block of this very
//!   job (decision 1): an agent cannot learn what others hold. (must)
//! - What is not covered by an announcement keeps the replica's content; a full scan announces every block, holes as
//!   runs of zeros. (must)
//! - Data in flight is bounded by credits; a cut loses at most that (INV-17: resuming gives the same point). (must)

mod delivery;
mod digest;
mod encoded;
mod figures;
mod frame;
mod hasher;
mod link;
pub mod message;
mod reception;
mod scan;
mod sender;
mod steer;
mod target;
mod wire;

#[cfg(test)]
mod tests;

pub use delivery::{Delivered, Delivery, DeliveryError, DeliveryReport, DeliverySettings, PointDisk};
pub use encoded::{Encoded, Message, Wire};
pub use figures::{Figures, Progress, Silent};
pub use frame::Payload;
pub use hasher::{Hashed, hash_block};
pub use link::pair;
pub use reception::{
    AuditFinding, Differences, ExpectedDisk, ExpectedMode, Reception, ReceptionError, Served,
};
pub use sender::{Connector, DiskOrder, Mode, Sender, SenderError, SenderReport, SenderSettings};
pub use steer::Steer;
pub use target::{Target, TargetError, TargetReport, TargetSettings};
pub use wire::WireError;

/// Bytes of a block, as a buffer length.
pub(crate) const BLOCK: usize = model::BLOCK_BYTES as usize;

/// Blocks of a disk of `size` bytes, the last one perhaps only partly on the disk.
pub(crate) fn blocks_of(size: u64) -> u64 {
    size.div_ceil(model::BLOCK_BYTES)
}

/// BLAKE3 of the 64 KiB of a block (the tail of a disk padded with zeros).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

/// How the bytes of a [`Frame`] are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Plain,
    /// One zstd frame.
    Zstd,
}

/// Most blocks in one frame: four of 64 KiB compress nearly as well as a megabyte and a random read decodes little.
pub const FRAME_BLOCKS: usize = 4;

/// One to [`FRAME_BLOCKS`] blocks, encoded together.
#[derive(Debug, Clone)]
pub struct Frame {
    /// How `bytes` is encoded.
    pub codec: Codec,
    /// The encoded blocks, one after another; decoded it is exactly `hashes.len()` blocks of 64 KiB.
    pub bytes: bytes::Bytes,
    /// The hash of each block, proved by whoever made the frame in this process.
    pub hashes: Vec<BlockHash>,
}

/// Why a link carries nothing any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The connection broke; it may come back.
    #[error("the connection broke: {0}")]
    Cut(String),
    /// The other side, or a person, cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// A two-way channel of messages with bounded buffers. Sending waits while the other side does not read.
pub trait Link<Out, In>: Send + Sync {
    /// Hands over a message, or says why it can never arrive.
    fn send(&self, message: Out) -> Result<(), LinkError>;
    /// Waits for the next message.
    fn receive(&self) -> Result<In, LinkError>;
    /// Ends the link for both sides and wakes whoever waits in it, from any thread.
    ///
    /// Sending fails with `why` at once. Receiving still gives what was sent before, then fails with `why` (the
    /// far side of a network may see a plain `Cut` instead). Closing twice keeps the first reason.
    fn close(&self, why: LinkError);
}

/// What the server does with one announced block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The replica's block at this place, as this job left it so far, is the same already: nothing changes.
    Unchanged,
    /// A block of this very job has this content: the server uses it.
    InJob,
    /// The content must be sent.
    Wanted,
}

/// Why the server's store failed. Final for the job.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// The server's side of the store, as one job uses it. Implemented over the pool by `jobs`, in memory by the tests.
///
/// One job, one store, one thread. Block indexes count units of `model::BLOCK_BYTES` from the start of the disk.
pub trait Store: Send {
    /// Compares an announced block with the replica and with what this job stored, and where the answer is
    /// `InJob` puts that block in its place. May be asked again for a block that was `Wanted` before.
    fn announce(&mut self, disk: u32, block: u64, hash: &BlockHash) -> Result<Verdict, StoreError>;
    /// Whether the replica's block equals `hash`; changes nothing. For audited blocks.
    fn equals(&mut self, disk: u32, block: u64, hash: &BlockHash) -> Result<bool, StoreError>;
    /// Makes `blocks` zeros; returns how many of them held data before.
    fn zero(&mut self, disk: u32, blocks: std::ops::Range<u64>) -> Result<u64, StoreError>;
    /// How many of `blocks` hold data in the replica; changes nothing. For audited holes.
    fn occupied(&mut self, disk: u32, blocks: std::ops::Range<u64>) -> Result<u64, StoreError>;
    /// Stores a frame whose blocks were asked for and proved, and puts block `n` of it at `places[n]`.
    fn put(&mut self, disk: u32, places: &[u64], frame: Frame) -> Result<(), StoreError>;
}

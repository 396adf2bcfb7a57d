//! Storage pool: chunks, replicas and recovery points on disk.
//!
//! Does not know virtual machines, schedules or people; see `jobs` for those. What must survive the loss of the catalog
//! comes here as sealed documents that the pool keeps and does not read.
//!
//! Bytes on disk: docs/formats/storage-pool.md, normative. Only [`mod@format`] reads or writes them.
//!
//! - [`Pool`] opens, creates and reads a pool; its state is a pure function of the records of one sequence ([`state`]).
//! - [`Ingest`] is one job's way in: blocks into packs, maps ([`map`]), and one record that makes it all count.
//! - [`PointDevice`] is a disk of a recovery point, as a `BlockDevice`.
//! - [`verify`] proves stored bytes, [`keyless`] as far as that goes without keys, [`proofs`] says when again; [`reclaim`]
//!   frees what no point needs, through a deletion service of its own.
//! - Packs may carry parity ([`format::parity`]); what is damaged and can be rebuilt is told by [`Pool::rebuilt_since`], and
//!   stored again by a verify that may write.
//! - [`mod@copy`] keeps a second copy of the encrypted files.
//! - [`kit`] is the recovery kit: with it and the pool's files nothing else is needed.
//!
//! Invariants
//! - A recovery point names only chunks that are durable and indexed (INV-2, INV-3). (must: breaking it loses data)
//! - Nothing is renamed over, edited in place or cut; only the deletion service unlinks (INV-15). (must)
//! - One writer: the next record's number can be taken once (INV-16). (must)
//! - Every chunk of a pack is in a run (should: the next start indexes loose packs)
//!
//! | running \ starting | ingest | verify, read | reclaim | second writer |
//! |---|---|---|---|---|
//! | ingest | beside it: own packs, one index | beside it | beside it: what the ingest made or shares is pinned | refused by the lock, fenced by the sequence |
//! | verify, read | beside it | beside it | beside it: what they began with does not expire; a chunk that moved is looked up again | beside it |
//! | reclaim | beside it: what is in quarantine is not shared | beside it | refused as busy | refused |
//!
//! Nothing waits for a reclaim, and a reclaim waits for nothing: what it may not touch yet is left for the next one. The
//! rules are at the head of [`mod@reclaim`].

// The world of the tests, in tests/rig, also serves those inside.
#[cfg(test)]
extern crate self as storage_pool;

mod account;
mod activity;
mod bundle;
pub mod chunk;
pub mod copy;
mod counts;
pub mod deletion;
pub mod error;
mod examine;
mod floor;
pub mod format;
mod frame;
mod in_order;
pub mod index;
mod ingest;
pub mod keyless;
pub mod keys;
pub mod kit;
pub mod layout;
pub mod map;
mod mark;
mod packs;
mod parity;
mod pass;
mod places;
mod point_device;
mod pool;
pub mod proofs;
mod rebuilt;
pub mod recipients;
pub mod reclaim;
mod repair;
mod reserve;
mod rings;
mod runs;
mod sequence;
mod sorter;
pub mod state;
mod tidy;
pub mod verify;
mod world;

pub use error::{Damage, PoolError};
pub use floor::Floor;
pub use ingest::{FullCompare, Ingest, IngestFigures, JobNodes, NewDisk, NewPoint};
pub use map::{MapEditor, MapReader, MapRoot};
pub use packs::PACK_BYTES;
pub use point_device::PointDevice;
pub use pool::{Access, Created, Pool, PoolHeader, PoolNodes, Settings, World, key_name, read_header};
pub use rebuilt::Repaired;
pub use repair::{Repair, StoredAgain};

//! Payloads of records and of the pool header: protobuf messages (sections 4 and 5.2).
//!
//! Field numbers are never given out twice. An unknown field is ignored; an unknown kind is not.

use prost::Message;
use prost::bytes::Bytes;

/// Kinds of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
#[allow(missing_docs, reason = "section 5 tells what each is")]
pub enum Kind {
    Created = 1,
    Takeover = 2,
    Domain = 3,
    Point = 4,
    Tombstone = 5,
    Undelete = 6,
    Quarantine = 7,
    Permit = 8,
    Document = 9,
    Damage = 10,
    Suspect = 11,
    Verified = 12,
    Restored = 13,
    Tick = 14,
    Release = 15,
    Proved = 16,
    Rotation = 17,
}

impl Kind {
    /// The kind of a number, if this version knows it.
    pub fn of(number: u16) -> Option<Kind> {
        use Kind::*;
        [
            Created, Takeover, Domain, Point, Tombstone, Undelete, Quarantine, Permit, Document, Damage,
            Suspect, Verified, Restored, Tick, Release, Proved, Rotation,
        ]
        .into_iter()
        .find(|&kind| kind as u16 == number)
    }
}

/// The pool header.
#[derive(Clone, PartialEq, Message)]
pub struct Header {
    /// Pool id.
    #[prost(bytes = "vec", tag = "1")]
    pub pool: Vec<u8>,
    /// Microseconds since 1970.
    #[prost(uint64, tag = "2")]
    pub created: u64,
    /// Fixed for ever.
    #[prost(message, optional, tag = "3")]
    pub settings: Option<Settings>,
}

/// Settings fixed at creation. Times in seconds.
#[derive(Clone, PartialEq, Message)]
pub struct Settings {
    /// How long a deleted point can be had back.
    #[prost(uint64, tag = "1")]
    pub soft_delete: u64,
    /// How long a pack is quarantined before it is unlinked.
    #[prost(uint64, tag = "2")]
    pub reclaim_hold: u64,
    /// The newest good points of a machine that nothing deletes.
    #[prost(uint32, tag = "3")]
    pub floor_points: u32,
    /// Points younger than this are not deleted.
    #[prost(uint64, tag = "4")]
    pub floor_age: u64,
    /// Share of the pool that one reclaim may free.
    #[prost(uint32, tag = "5")]
    pub breaker_percent: u32,
    /// zstd level of what the server encodes itself.
    #[prost(int32, tag = "6")]
    pub zstd_level: i32,
    /// Bytes that ingests leave free on the volume.
    #[prost(uint64, tag = "7")]
    pub reserve: u64,
    /// Parity of packs, in percent of their bytes; 0 for none.
    #[prost(uint32, tag = "8")]
    pub parity_percent: u32,
}

/// Takeover (2).
#[derive(Clone, PartialEq, Message)]
pub struct Takeover {
    /// Random id of the server's data folder.
    #[prost(bytes = "vec", tag = "1")]
    pub server: Vec<u8>,
    /// Its name, for people.
    #[prost(string, tag = "2")]
    pub name: String,
}

/// Domain (3).
#[derive(Clone, PartialEq, Message)]
pub struct Domain {
    /// Domain id.
    #[prost(bytes = "vec", tag = "1")]
    pub domain: Vec<u8>,
    /// For people.
    #[prost(string, tag = "2")]
    pub label: String,
}

/// One disk of a point.
#[derive(Clone, PartialEq, Message)]
pub struct Disk {
    /// From 0.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// 512 or 4096.
    #[prost(uint32, tag = "3")]
    pub sector: u32,
    /// Chunk id of the map's root; empty for a disk of zeros.
    #[prost(bytes = "vec", tag = "4")]
    pub root: Vec<u8>,
    /// Levels of the map.
    #[prost(uint32, tag = "5")]
    pub levels: u32,
    /// What recovery needs to make the image again (JSON of the provider); the pool does not read it.
    #[prost(string, tag = "6")]
    pub description: String,
    /// Where the audit goes on.
    #[prost(uint64, tag = "7")]
    pub audit_next: u64,
    /// When the disk was last read in full, by the point that did; empty if never.
    #[prost(bytes = "vec", tag = "8")]
    pub full_compare: Vec<u8>,
}

/// A recovery point (4).
#[derive(Clone, PartialEq, Message)]
pub struct Point {
    /// Point id.
    #[prost(bytes = "vec", tag = "1")]
    pub point: Vec<u8>,
    /// The machine.
    #[prost(bytes = "vec", tag = "2")]
    pub datasource: Vec<u8>,
    /// The machine's name at that time.
    #[prost(string, tag = "3")]
    pub machine: String,
    /// Its host's name at that time.
    #[prost(string, tag = "4")]
    pub host: String,
    /// Key domain.
    #[prost(bytes = "vec", tag = "5")]
    pub domain: Vec<u8>,
    /// The point it was made from; empty for the first.
    #[prost(bytes = "vec", tag = "6")]
    pub base: Vec<u8>,
    /// When the view was frozen, microseconds since 1970.
    #[prost(uint64, tag = "7")]
    pub captured: u64,
    /// `application`, `file`, `crash`, `offline`.
    #[prost(string, tag = "8")]
    pub consistency: String,
    /// Why that level.
    #[prost(string, tag = "9")]
    pub evidence: String,
    /// What was done.
    #[prost(string, tag = "10")]
    pub decision: String,
    /// Why.
    #[prost(string, repeated, tag = "11")]
    pub because: Vec<String>,
    /// The disks.
    #[prost(message, repeated, tag = "12")]
    pub disks: Vec<Disk>,
    /// The job that made it.
    #[prost(bytes = "vec", tag = "13")]
    pub job: Vec<u8>,
    /// Figures of the job, by name.
    #[prost(btree_map = "string, uint64", tag = "14")]
    pub figures: std::collections::BTreeMap<String, u64>,
    /// Definition of the machine (JSON of the provider).
    #[prost(string, tag = "15")]
    pub definition: String,
    /// Whether disks are missing.
    #[prost(bool, tag = "16")]
    pub incomplete: bool,
}

/// What every opening of a pool needs of a [`Disk`]; decoding skips the rest.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs, reason = "the fields of the same numbers in Disk")]
pub struct DiskHead {
    #[prost(uint32, tag = "1")]
    pub index: u32,
    #[prost(uint64, tag = "2")]
    pub size: u64,
    #[prost(uint32, tag = "3")]
    pub sector: u32,
    #[prost(bytes = "bytes", tag = "4")]
    pub root: Bytes,
    #[prost(uint32, tag = "5")]
    pub levels: u32,
    #[prost(uint64, tag = "7")]
    pub audit_next: u64,
    #[prost(bytes = "bytes", tag = "8")]
    pub full_compare: Bytes,
}

/// What every opening of a pool needs of a [`Point`]; decoding skips the rest.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs, reason = "the fields of the same numbers in Point")]
pub struct PointHead {
    #[prost(bytes = "bytes", tag = "1")]
    pub point: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub datasource: Bytes,
    #[prost(string, tag = "3")]
    pub machine: String,
    #[prost(bytes = "bytes", tag = "5")]
    pub domain: Bytes,
    #[prost(bytes = "bytes", tag = "6")]
    pub base: Bytes,
    #[prost(uint64, tag = "7")]
    pub captured: u64,
    #[prost(string, tag = "8")]
    pub consistency: String,
    #[prost(message, repeated, tag = "12")]
    pub disks: Vec<DiskHead>,
    #[prost(bool, tag = "16")]
    pub incomplete: bool,
}

/// Tombstone (5) and undelete (6).
#[derive(Clone, PartialEq, Message)]
pub struct PointMark {
    /// The point.
    #[prost(bytes = "vec", tag = "1")]
    pub point: Vec<u8>,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Quarantine (7), permit (8), release (15).
#[derive(Clone, PartialEq, Message)]
pub struct Packs {
    /// Pack ids of 16 bytes, one after another.
    #[prost(bytes = "vec", tag = "1")]
    pub packs: Vec<u8>,
    /// Bytes of their files.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// Bytes of them that were still in use and were copied to other packs first.
    #[prost(uint64, tag = "3")]
    pub rewritten: u64,
}

/// Rotation (17): from this record on everything is sealed under a new root. Sealed under it itself.
#[derive(Clone, PartialEq, Message)]
pub struct Rotation {
    /// The new key generation.
    #[prost(uint32, tag = "1")]
    pub generation: u32,
    /// Hash of its ring file.
    #[prost(bytes = "vec", tag = "2")]
    pub ring: Vec<u8>,
    /// Recipients removed by it, 16 bytes each.
    #[prost(bytes = "vec", tag = "3")]
    pub removed: Vec<u8>,
}

/// Document (9).
#[derive(Clone, PartialEq, Message)]
pub struct Document {
    /// Its name, such as `datasource/<id>`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its bytes; the pool does not read them.
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
    /// Whether this version says that the document is gone.
    #[prost(bool, tag = "3")]
    pub removed: bool,
}

/// Damage (10).
#[derive(Clone, PartialEq, Message)]
pub struct Damage {
    /// The pack.
    #[prost(bytes = "vec", tag = "1")]
    pub pack: Vec<u8>,
    /// Offsets of damaged frames; none means the whole pack.
    #[prost(uint32, repeated, tag = "2")]
    pub frames: Vec<u32>,
    /// What was found.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Suspect (11) and verified (12).
#[derive(Clone, PartialEq, Message)]
pub struct PointsMark {
    /// Point ids of 16 bytes, one after another.
    #[prost(bytes = "vec", tag = "1")]
    pub points: Vec<u8>,
    /// Why, for people.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Proved (16).
#[derive(Clone, PartialEq, Message)]
pub struct Proved {
    /// The first four bytes of a pack id, as a big-endian number: the first of the part.
    #[prost(uint64, tag = "1")]
    pub from: u64,
    /// How many of them; the part may go on at 0.
    #[prost(uint64, tag = "2")]
    pub length: u64,
    /// Packs that were read, for people.
    #[prost(uint64, tag = "3")]
    pub packs: u64,
    /// Bytes of their files, for people.
    #[prost(uint64, tag = "4")]
    pub bytes: u64,
}

/// Restored (13).
#[derive(Clone, PartialEq, Message)]
pub struct Restored {
    /// Number of the record whose file is damaged.
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// The bytes that file should have.
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
}

/// The 16-byte ids in `bytes`.
pub fn ids(bytes: &[u8]) -> Option<Vec<[u8; 16]>> {
    bytes.len().is_multiple_of(16).then(|| bytes.as_chunks::<16>().0.to_vec())
}

//! The tongue of Stillpoint: nouns, typed ids, units and pure decisions.
//!
//! Everything here is a plain value or a pure function over plain values. No I/O, no clock, no threads: time and
//! randomness come in as arguments. Every other room speaks in these words.
//!
//! - [`range`]: byte ranges and lists of them.
//! - [`id`]: typed ids. An id of one thing cannot be given for an id of another.
//! - [`inventory`]: machines as their hosts see them.
//! - [`time`]: points in time as microseconds since 1970, UTC.
//! - [`point`]: what a recovery point says about itself: consistency, state, cause.
//! - [`recovery`]: a whole machine to be recovered, step by step.
//! - [`problem`]: every error code that a person can meet, with cause, remedy and exit status.

pub mod audit_choice;
pub mod id;
pub mod inventory;
pub mod noise;
pub mod point;
pub mod problem;
pub mod range;
pub mod recovery;
pub mod time;

pub use id::{DatasourceId, DomainId, HostId, JobId, PoolId, RecoveryPointId};
pub use inventory::{HostDisk, HostMachine, Power};
pub use point::{Cause, Consistency, PointState, Unfrozen};
pub use problem::{Code, ExitStatus, Problem};
pub use range::{ByteRange, RangeSet};
pub use recovery::{
    BaseImage, CompletedMachine, Identity, MachineRecovery, Network, Place, PreparedDisk, PreparedMachine,
    RecoveredDisk, Stop,
};
pub use time::Timestamp;

/// Bytes of one block of a protected disk: the unit that is hashed, compared, deduplicated and asked for.
///
/// 64 KiB: a database that writes 8 KiB here and there stores 2.3 to 2.6 times less a day than with blocks of 1 MiB
/// and more, and random reads decode little. The tail of a disk that is not a multiple counts as padded with zeros.
pub const BLOCK_BYTES: u64 = 64 * 1024;

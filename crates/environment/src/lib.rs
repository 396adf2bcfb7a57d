//! Files, clock and randomness as traits: the real ones, and simulated ones that crash and lie.
//!
//! Core rooms take the world through these traits only, so that the same code runs on a real disk and in a
//! deterministic simulation. What a file system promises is stated per method; what it does not promise, the
//! simulation takes away.

mod clock;
mod files;
mod randomness;

pub mod conformance;
pub mod simulated;

pub use clock::{Clock, FixedClock, SystemClock};
pub use files::{Entry, Files, FolderFiles, Lock, NewFile, ReadFile, Removal};
pub use randomness::{Randomness, SeededRandomness, SystemRandomness};

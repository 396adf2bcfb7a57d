//! Real disks over days: the workload generator's machines in three formats, by change lists and by full scans.
//!
//! Needs root, loop devices, python3 and qemu-img (`cargo xtask install`).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

#[path = "../program/mod.rs"]
mod program;

mod days;
mod made;
mod tracker;

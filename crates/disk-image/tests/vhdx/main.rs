//! VHDX examined from outside: conformance, crashes, logs, damage, and agreement with `qemu-img`.
#![allow(clippy::unwrap_used)]

mod conformance;
mod crash;
mod damage;
mod log;
mod qemu;
mod support;

//! VHD of hostile bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stillpoint_fuzz::run("vhd", data));

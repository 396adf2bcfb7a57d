//! Little-endian fields of buffers whose length the caller has fixed, and the checksum of all VHDX structures.

use super::Guid;

/// Two bytes at `at`; zero outside the buffer.
pub(crate) fn u16_at(buf: &[u8], at: usize) -> u16 {
    array_at(buf, at).map_or(0, u16::from_le_bytes)
}

/// Four bytes at `at`; zero outside the buffer.
pub(crate) fn u32_at(buf: &[u8], at: usize) -> u32 {
    array_at(buf, at).map_or(0, u32::from_le_bytes)
}

/// Eight bytes at `at`; zero outside the buffer.
pub(crate) fn u64_at(buf: &[u8], at: usize) -> u64 {
    array_at(buf, at).map_or(0, u64::from_le_bytes)
}

/// A GUID at `at`; the nil GUID outside the buffer.
pub(crate) fn guid_at(buf: &[u8], at: usize) -> Guid {
    array_at(buf, at).unwrap_or_default()
}

fn array_at<const N: usize>(buf: &[u8], at: usize) -> Option<[u8; N]> {
    buf.get(at..)?.first_chunk::<N>().copied()
}

/// Puts `bytes` at `at` of a structure that is being built.
pub(crate) fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}

/// CRC-32C of `buf` with its own checksum field, at 4..8 in every VHDX structure, taken as zero.
pub(crate) fn checksum(buf: &[u8]) -> u32 {
    let head = crc32c::crc32c(buf.get(..4).unwrap_or_default());
    let head = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(head, buf.get(8..).unwrap_or_default())
}

/// Whether the checksum field of `buf` is right.
pub(crate) fn checksum_fits(buf: &[u8]) -> bool {
    u32_at(buf, 4) == checksum(buf)
}

/// Fills in the checksum field of a finished structure.
pub(crate) fn seal(buf: &mut [u8]) {
    let sum = checksum(buf);
    put(buf, 4, &sum.to_le_bytes());
}

//! Dynamic Disk Header ("Dynamic Disk Header Format"): 1024 bytes of dynamic and differencing images.
//!
//! | offset | size | meaning |
//! |---|---|---|
//! | 0   | 8   | cookie `cxsparse` |
//! | 8   | 8   | data offset: unused, all ones |
//! | 16  | 8   | table offset: where the Block Allocation Table lies, bytes from the start of the file |
//! | 24  | 4   | header version: 1.0 |
//! | 28  | 4   | max table entries |
//! | 32  | 4   | block size, bytes without the bitmap; a power of two times 512 |
//! | 36  | 4   | checksum |
//! | 40  | 16  | parent unique id |
//! | 56  | 4   | parent time stamp |
//! | 64  | 512 | parent Unicode name, UTF-16 big-endian |
//! | 576 | 192 | eight Parent Locator Entries of 24 bytes |
//!
//! Parent Locator Entry: platform code (4), platform data space (4), platform data length (4), reserved (4),
//! platform data offset (8). Windows writes the UTF-16 of locators little-endian, some other programs big-endian.

use block_io::BlockDevice;

use super::{SECTOR, be_u32, be_u64, checksum, damaged, take, unsupported};
use crate::ImageError;

pub(crate) const COOKIE: &[u8; 8] = b"cxsparse";
pub(crate) const BYTES: usize = 1024;
pub(crate) const NAME: &str = "Dynamic Disk Header";
const CHECKSUM_AT: usize = 36;
const LOCATORS_AT: usize = 576;

/// Longest name that is read from a locator, in bytes: Windows knows no path above 32767 UTF-16 units.
const MAX_LOCATOR_BYTES: u32 = 65_534;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Locator {
    pub(crate) platform: [u8; 4],
    /// Bytes of the name.
    pub(crate) length: u32,
    /// Bytes from the start of the file.
    pub(crate) offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) table_offset: u64,
    pub(crate) max_table_entries: u32,
    pub(crate) block_size: u32,
    pub(crate) parent_unique_id: [u8; 16],
    pub(crate) parent_time_stamp: u32,
    pub(crate) parent_unicode_name: String,
    pub(crate) locators: Vec<Locator>,
}

impl Header {
    pub(crate) fn read(file: &dyn BlockDevice, offset: u64) -> Result<Header, ImageError> {
        if offset.checked_add(BYTES as u64).is_none_or(|end| end > file.size()) {
            return Err(damaged(
                NAME,
                offset,
                format!("Data Offset of the footer points outside the file of {} bytes", file.size()),
            ));
        }
        let mut bytes = [0u8; BYTES];
        file.read_at(offset, &mut bytes)?;
        if !bytes.starts_with(COOKIE) {
            return Err(damaged(NAME, offset, "no cookie \"cxsparse\""));
        }
        let (stored, computed) = (be_u32(&bytes, CHECKSUM_AT), checksum(&bytes, CHECKSUM_AT));
        if stored != computed {
            return Err(damaged(NAME, offset, format!("checksum {stored:#010x}, expected {computed:#010x}")));
        }
        let version = be_u32(&bytes, 24);
        if version >> 16 != 1 {
            return Err(unsupported(format!("Header Version {}.{}", version >> 16, version & 0xFFFF)));
        }
        let header = Header {
            table_offset: be_u64(&bytes, 16),
            max_table_entries: be_u32(&bytes, 28),
            block_size: be_u32(&bytes, 32),
            parent_unique_id: take(&bytes, 40),
            parent_time_stamp: be_u32(&bytes, 56),
            parent_unicode_name: utf16(&bytes[64..576], u16::from_be_bytes),
            locators: bytes[LOCATORS_AT..LOCATORS_AT + 192]
                .chunks_exact(24)
                .map(|entry| Locator {
                    platform: take(entry, 0),
                    length: be_u32(entry, 8),
                    offset: be_u64(entry, 16),
                })
                .filter(|locator| locator.platform != [0; 4])
                .collect(),
        };
        if !header.block_size.is_power_of_two() || u64::from(header.block_size) < SECTOR {
            return Err(damaged(
                NAME,
                offset,
                format!("Block Size {}, expected a power of two, 512 or more", header.block_size),
            ));
        }
        Ok(header)
    }

    pub(crate) fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0u8; BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, COOKIE);
        put(8, &[0xFF; 8]);
        put(16, &self.table_offset.to_be_bytes());
        put(24, &0x0001_0000u32.to_be_bytes());
        put(28, &self.max_table_entries.to_be_bytes());
        put(32, &self.block_size.to_be_bytes());
        put(40, &self.parent_unique_id);
        put(56, &self.parent_time_stamp.to_be_bytes());
        // The field ends with a zero, so 255 units of a long name.
        for (index, unit) in self.parent_unicode_name.encode_utf16().take(255).enumerate() {
            put(64 + index * 2, &unit.to_be_bytes());
        }
        for (index, locator) in self.locators.iter().take(8).enumerate() {
            let at = LOCATORS_AT + index * 24;
            put(at, &locator.platform);
            put(at + 4, &(u64::from(locator.length).div_ceil(SECTOR) as u32).to_be_bytes());
            put(at + 8, &locator.length.to_be_bytes());
            put(at + 16, &locator.offset.to_be_bytes());
        }
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Names of the parent in the order to try: relative to the child, absolute, file URL, name in the header.
    ///
    /// A locator that cannot be read is left out while another one names the parent: each is a full alternative.
    pub(crate) fn parent_names(&self, file: &dyn BlockDevice) -> Result<Vec<String>, ImageError> {
        let mut names: Vec<String> = Vec::new();
        for platform in [b"W2ru", b"W2ku", b"MacX"] {
            for locator in self.locators.iter().filter(|locator| locator.platform == *platform) {
                let inside = locator.offset.checked_add(u64::from(locator.length));
                if locator.length > MAX_LOCATOR_BYTES || inside.is_none_or(|end| end > file.size()) {
                    continue;
                }
                let mut bytes = vec![0u8; locator.length as usize];
                file.read_at(locator.offset, &mut bytes)?;
                names.push(if platform == b"MacX" { file_url(&bytes) } else { utf16_either(&bytes) });
            }
        }
        names.push(self.parent_unicode_name.clone());
        names.retain(|name| !name.is_empty());
        let mut unique: Vec<String> = Vec::new();
        for name in names {
            if !unique.contains(&name) {
                unique.push(name);
            }
        }
        Ok(unique)
    }
}

/// Text up to the first zero unit.
fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units: Vec<u16> =
        bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).take_while(|&unit| unit != 0).collect();
    String::from_utf16_lossy(&units)
}

/// Little-endian, unless the zero bytes of Latin text say the opposite.
fn utf16_either(bytes: &[u8]) -> String {
    let zeros = |odd: usize| bytes.iter().skip(odd).step_by(2).filter(|&&byte| byte == 0).count();
    utf16(bytes, if zeros(0) > zeros(1) { u16::from_be_bytes } else { u16::from_le_bytes })
}

/// The path of a `file://` URL (RFC 2396), escapes resolved.
fn file_url(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = text.strip_prefix(b"file://").unwrap_or(text);
    let mut path = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let escaped = text
            .get(at + 1..at + 3)
            .filter(|_| byte == b'%')
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        path.push(escaped.unwrap_or(byte));
        at += if escaped.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&path).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use block_io::MemoryDevice;

    use super::*;

    #[test]
    fn encoded_headers_read_equal() {
        let header = Header {
            table_offset: 4096,
            max_table_entries: 7,
            block_size: 1 << 21,
            parent_unique_id: [3; 16],
            parent_time_stamp: 99,
            parent_unicode_name: "grün.vhd".to_owned(),
            locators: vec![Locator { platform: *b"W2ru", length: 20, offset: 2048 }],
        };
        let file = MemoryDevice::new(header.encode().to_vec());
        assert_eq!(Header::read(&file, 0).unwrap(), header);
    }

    #[test]
    fn names_in_both_byte_orders_and_as_url() {
        let text = ".\\base.vhd";
        let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
        assert_eq!(utf16_either(&little), text);
        assert_eq!(utf16_either(&big), text);
        assert_eq!(utf16_either(&[0x41]), "");
        assert_eq!(file_url(b"file://./a%20b%zz%4"), "./a b%zz%4");
    }
}

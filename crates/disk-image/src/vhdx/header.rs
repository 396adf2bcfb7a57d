//! File type identifier (2.2.1) and the two headers (2.2.2).

use block_io::BlockDevice;

use super::bytes::{checksum_fits, guid_at, put, seal, u16_at, u32_at, u64_at};
use super::{Guid, LOG_SECTOR, MIB, damaged, unsupported};
use crate::{ImageError, ImageFormat};

/// Where the two headers are.
pub(crate) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_BYTES: usize = 4096;
const SIGNATURE: &[u8; 8] = b"vhdxfile";

/// One header. All integers little-endian.
///
/// | offset | size | meaning |
/// |---|---|---|
/// | 0  | 4  | `head` |
/// | 4  | 4  | CRC-32C of the 4 KiB |
/// | 8  | 8  | sequence number: the higher of two valid headers is current |
/// | 16 | 16 | FileWriteGuid |
/// | 32 | 16 | DataWriteGuid |
/// | 48 | 16 | LogGuid, zero if there is nothing to replay |
/// | 64 | 2  | log version, 0 |
/// | 66 | 2  | version, 1 |
/// | 68 | 4  | bytes of the log, a multiple of 1 MiB |
/// | 72 | 8  | where the log is, a multiple of 1 MiB |
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) file_write_guid: Guid,
    pub(crate) data_write_guid: Guid,
    pub(crate) log_guid: Guid,
    pub(crate) log_version: u16,
    pub(crate) version: u16,
    pub(crate) log_length: u32,
    pub(crate) log_offset: u64,
}

impl Header {
    fn parse(buf: &[u8]) -> Result<Header, String> {
        if buf.get(..4) != Some(b"head") {
            return Err("the signature is not \"head\"".to_owned());
        }
        if !checksum_fits(buf) {
            return Err("the checksum is wrong".to_owned());
        }
        Ok(Header {
            sequence: u64_at(buf, 8),
            file_write_guid: guid_at(buf, 16),
            data_write_guid: guid_at(buf, 32),
            log_guid: guid_at(buf, 48),
            log_version: u16_at(buf, 64),
            version: u16_at(buf, 66),
            log_length: u32_at(buf, 68),
            log_offset: u64_at(buf, 72),
        })
    }

    /// The 4 KiB of the file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut buf = vec![0; HEADER_BYTES];
        put(&mut buf, 0, b"head");
        put(&mut buf, 8, &self.sequence.to_le_bytes());
        put(&mut buf, 16, &self.file_write_guid);
        put(&mut buf, 32, &self.data_write_guid);
        put(&mut buf, 48, &self.log_guid);
        put(&mut buf, 64, &self.log_version.to_le_bytes());
        put(&mut buf, 66, &self.version.to_le_bytes());
        put(&mut buf, 68, &self.log_length.to_le_bytes());
        put(&mut buf, 72, &self.log_offset.to_le_bytes());
        seal(&mut buf);
        buf
    }

    /// Whether the image was not closed cleanly.
    pub(crate) fn log_in_use(&self) -> bool {
        self.log_guid != [0; 16]
    }

    fn check(&self, offset: u64, file: u64) -> Result<(), ImageError> {
        if self.version != 1 {
            return Err(unsupported(format!("version {} in the header, only 1 is known", self.version)));
        }
        if self.log_in_use() && self.log_version != 0 {
            return Err(unsupported(format!("log version {} with a log in use", self.log_version)));
        }
        let length = u64::from(self.log_length);
        if !length.is_multiple_of(MIB) || !self.log_offset.is_multiple_of(MIB) {
            let reason =
                format!("log at {} with {length} bytes, expected multiples of 1 MiB", self.log_offset);
            return Err(damaged("header", offset, reason));
        }
        let end = self.log_offset.checked_add(length);
        if length > 0 && (self.log_offset < MIB || end.is_none_or(|end| end > file)) {
            let reason =
                format!("log at {} with {length} bytes, outside the file of {file} bytes", self.log_offset);
            return Err(damaged("header", offset, reason));
        }
        if self.log_in_use() && length == 0 {
            return Err(damaged("header", offset, "a log is in use and has no bytes"));
        }
        Ok(())
    }
}

/// The header that is current, and which of the two it is.
pub(crate) struct Current {
    pub(crate) header: Header,
    pub(crate) slot: usize,
}

/// Bytes of the file type identifier that say who made the file.
pub(crate) fn identifier_bytes(creator: &str) -> Vec<u8> {
    let mut buf = vec![0; 8 + 512];
    put(&mut buf, 0, SIGNATURE);
    for (index, unit) in creator.encode_utf16().take(255).enumerate() {
        put(&mut buf, 8 + index * 2, &unit.to_le_bytes());
    }
    buf
}

/// Checks the file type identifier; gives the creator's text.
pub(crate) fn read_identifier(file: &dyn BlockDevice) -> Result<String, ImageError> {
    let not = |reason: String| ImageError::NotThisFormat { format: ImageFormat::Vhdx, reason };
    let mut buf = [0; 8 + 512];
    if file.size() < buf.len() as u64 {
        return Err(not(format!("the file has {} bytes, a VHDX has more than 1 MiB", file.size())));
    }
    file.read_at(0, &mut buf)?;
    let (signature, creator) = buf.split_at(8);
    if signature != SIGNATURE {
        return Err(not(format!(
            "it begins with {:?}, not with \"vhdxfile\"",
            String::from_utf8_lossy(signature)
        )));
    }
    if file.size() < MIB {
        return Err(damaged("file", 0, format!("cut off after {} bytes, inside the first MiB", file.size())));
    }
    let units = creator.chunks_exact(2).map(|pair| u16_at(pair, 0)).take_while(|&unit| unit != 0);
    Ok(char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect())
}

/// Reads both headers and finds the current one.
pub(crate) fn read_current(file: &dyn BlockDevice) -> Result<Current, ImageError> {
    let read = |slot: usize| -> Result<Result<Header, String>, ImageError> {
        let mut buf = vec![0; HEADER_BYTES];
        file.read_at(HEADERS[slot], &mut buf)?;
        Ok(Header::parse(&buf))
    };
    let (header, slot) = match (read(0)?, read(1)?) {
        (Err(first), Err(second)) => {
            let reason = format!("neither header is valid: first, {first}; second, {second}");
            return Err(damaged("header", HEADERS[0], reason));
        }
        (Ok(first), Err(_)) => (first, 0),
        (Err(_), Ok(second)) => (second, 1),
        (Ok(first), Ok(second)) if first.sequence > second.sequence => (first, 0),
        (Ok(first), Ok(second)) if second.sequence > first.sequence => (second, 1),
        // Some makers write the same header twice: no choice is needed.
        (Ok(first), Ok(second)) if first == second => (first, 0),
        (Ok(first), Ok(_)) => {
            let reason = format!("both headers have sequence number {} and differ", first.sequence);
            return Err(damaged("header", HEADERS[0], reason));
        }
    };
    header.check(HEADERS[slot], file.size())?;
    Ok(Current { header, slot })
}

const _: () = assert!(HEADER_BYTES as u64 == LOG_SECTOR);

//! Region tables (2.2.3): where BAT and metadata are. Two copies.

use block_io::{BlockDevice, ByteRange};

use super::bytes::{checksum_fits, guid_at, put, seal, u32_at, u64_at};
use super::guid::{guid_text, known};
use super::{Guid, MIB, damaged, unsupported};
use crate::ImageError;

/// Where the two copies are.
pub(crate) const TABLES: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_BYTES: usize = 64 << 10;
const MAX_ENTRIES: u32 = 2047;

const BAT: Guid = known(0x2DC2_7766, 0xF623, 0x4200, [0x9D, 0x64, 0x11, 0x5E, 0x9B, 0xFD, 0x4A, 0x08]);
const METADATA: Guid = known(0x8B7C_A206, 0x4790, 0x4B9A, [0xB8, 0xFE, 0x57, 0x5F, 0x05, 0x0F, 0x88, 0x6E]);

/// Entry of 32 bytes: GUID, offset in the file u64, length u32, required u32 (bit 0).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    guid: Guid,
    range: ByteRange,
    required: bool,
}

/// The regions of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) bat: ByteRange,
    pub(crate) metadata: ByteRange,
    /// All regions, the unknown ones that are not required included: no block may lie in them.
    pub(crate) all: Vec<ByteRange>,
}

fn parse(buf: &[u8], offset: u64) -> Result<Vec<Entry>, ImageError> {
    let wrong = |reason: String| Err(damaged("region table", offset, reason));
    if buf.get(..4) != Some(b"regi") {
        return wrong("the signature is not \"regi\"".to_owned());
    }
    if !checksum_fits(buf) {
        return wrong("the checksum is wrong".to_owned());
    }
    let count = u32_at(buf, 8);
    if count > MAX_ENTRIES {
        return wrong(format!("{count} entries, at most {MAX_ENTRIES} fit"));
    }
    let mut entries = Vec::new();
    for entry in buf.get(16..).unwrap_or_default().chunks_exact(32).take(count as usize) {
        let guid = guid_at(entry, 0);
        let (start, length) = (u64_at(entry, 16), u64::from(u32_at(entry, 24)));
        let range = match ByteRange::at(start, length) {
            Some(range)
                if start >= MIB && start.is_multiple_of(MIB) && length.is_multiple_of(MIB) && length > 0 =>
            {
                range
            }
            _ => {
                return wrong(format!(
                    "region {} at {start} with {length} bytes: expected multiples of 1 MiB after the first MiB",
                    guid_text(&guid)
                ));
            }
        };
        entries.push(Entry { guid, range, required: u32_at(entry, 28) & 1 == 1 });
    }
    Ok(entries)
}

/// Reads and compares both copies. One damaged copy is tolerated, two that contradict each other are not.
pub(crate) fn read(file: &dyn BlockDevice, log: ByteRange) -> Result<Regions, ImageError> {
    let copy = |slot: usize| -> Result<Result<Vec<Entry>, ImageError>, ImageError> {
        let mut buf = vec![0; TABLE_BYTES];
        file.read_at(TABLES[slot], &mut buf)?;
        Ok(parse(&buf, TABLES[slot]))
    };
    let (entries, offset) = match (copy(0)?, copy(1)?) {
        (Ok(first), Ok(second)) if first == second => (first, TABLES[0]),
        (Ok(_), Ok(_)) => {
            return Err(damaged("region table", TABLES[0], "the two copies are valid and differ"));
        }
        (Ok(first), Err(_)) => (first, TABLES[0]),
        (Err(_), Ok(second)) => (second, TABLES[1]),
        (Err(first), Err(_)) => return Err(first),
    };
    check(&entries, offset, log)
}

fn check(entries: &[Entry], offset: u64, log: ByteRange) -> Result<Regions, ImageError> {
    let wrong = |reason: String| Err(damaged("region table", offset, reason));
    let (mut bat, mut metadata) = (None, None);
    for entry in entries {
        let place = match entry.guid {
            BAT => &mut bat,
            METADATA => &mut metadata,
            _ if entry.required => {
                return Err(unsupported(format!("required region {}", guid_text(&entry.guid))));
            }
            _ => continue,
        };
        if place.replace(entry.range).is_some() {
            return wrong(format!("region {} is listed twice", guid_text(&entry.guid)));
        }
    }
    let mut all: Vec<ByteRange> = entries.iter().map(|entry| entry.range).collect();
    if !log.is_empty() {
        all.push(log);
    }
    all.sort_by_key(|range| range.start);
    for pair in all.windows(2) {
        if let [a, b] = pair
            && a.end > b.start
        {
            return wrong(format!(
                "regions or log overlap: {}..{} and {}..{}",
                a.start, a.end, b.start, b.end
            ));
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok(Regions { bat, metadata, all }),
        (None, _) => wrong("there is no BAT region".to_owned()),
        (_, None) => wrong("there is no metadata region".to_owned()),
    }
}

/// The 64 KiB of a new image.
pub(crate) fn bytes(bat: ByteRange, metadata: ByteRange) -> Vec<u8> {
    let mut buf = vec![0; TABLE_BYTES];
    put(&mut buf, 0, b"regi");
    put(&mut buf, 8, &2u32.to_le_bytes());
    for (index, (guid, range)) in [(BAT, bat), (METADATA, metadata)].into_iter().enumerate() {
        let at = 16 + index * 32;
        put(&mut buf, at, &guid);
        put(&mut buf, at + 16, &range.start.to_le_bytes());
        put(&mut buf, at + 24, &(range.len() as u32).to_le_bytes());
        put(&mut buf, at + 28, &1u32.to_le_bytes());
    }
    seal(&mut buf);
    buf
}

//! Log (2.3): the active sequence of an image that was not closed cleanly, and one entry for a writer.
//!
//! An entry is a run of 4 KiB sectors in the ring of the log. First descriptors, 64 bytes of entry header in front
//! of them, then one data sector for each data descriptor:
//!
//! | offset in the entry header | size | meaning |
//! |---|---|---|
//! | 0  | 4  | `loge` |
//! | 4  | 4  | CRC-32C of the entry |
//! | 8  | 4  | bytes of the entry |
//! | 12 | 4  | tail: where the oldest entry that is still needed begins, from the start of the log |
//! | 16 | 8  | sequence number, not 0 |
//! | 24 | 4  | number of descriptors |
//! | 32 | 16 | LogGuid of the header |
//! | 48 | 8  | FlushedFileOffset: the file had at least so many bytes, durable |
//! | 56 | 8  | LastFileOffset: all structures fit into so many bytes |
//!
//! A file shorter than FlushedFileOffset lost something and is refused. One shorter than LastFileOffset is extended:
//! its growth was not durable yet when the power went.

use block_io::{BlockDevice, ByteRange};

use super::bytes::{checksum_fits, guid_at, put, seal, u32_at, u64_at};
use super::header::Header;
use super::region_table::TABLES;
use super::replayed::Replayed;
use super::{Guid, LOG_SECTOR, MAX_FILE, MAX_REPLAYED_LOG, MIB, damaged, unsupported};
use crate::ImageError;

const SECTOR: usize = LOG_SECTOR as usize;
const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;

/// The log of an image, whole, and how much more of it may be checked.
struct Ring {
    bytes: Vec<u8>,
    guid: Guid,
    /// Bytes that may still be checksummed. Headers that a log is full of can each state the length of the whole log;
    /// in an honest log the entries of one `LogGuid` fill it hardly more than once.
    budget: u64,
    /// What was found at each sector, so that none is checked twice.
    known: Vec<Option<Option<Entry>>>,
}

/// A valid entry.
#[derive(Clone, Copy)]
struct Entry {
    at: usize,
    length: usize,
    tail: usize,
    sequence: u64,
    flushed: u64,
    last: u64,
}

impl Ring {
    fn sector(&self, at: usize, index: usize) -> &[u8] {
        let start = (at + index * SECTOR) % self.bytes.len();
        self.bytes.get(start..start + SECTOR).unwrap_or_default()
    }

    /// The entry as one piece.
    fn entry_bytes(&self, at: usize, length: usize) -> Vec<u8> {
        (0..length / SECTOR).flat_map(|index| self.sector(at, index)).copied().collect()
    }

    /// The entry at `at`, if there is a valid one. `Err` only when the budget is used up.
    fn entry(&mut self, at: usize) -> Result<Option<Entry>, String> {
        if let Some(Some(known)) = self.known.get(at / SECTOR) {
            return Ok(*known);
        }
        let found = self.check_entry(at)?;
        if let Some(known) = self.known.get_mut(at / SECTOR) {
            *known = Some(found);
        }
        Ok(found)
    }

    fn check_entry(&mut self, at: usize) -> Result<Option<Entry>, String> {
        let head = self.sector(at, 0);
        let length = u32_at(head, 8) as usize;
        let tail = u32_at(head, 12) as usize;
        let sequence = u64_at(head, 16);
        let descriptors = u32_at(head, 24) as usize;
        let (flushed, last) = (u64_at(head, 48), u64_at(head, 56));
        let plausible = head.get(..4) == Some(b"loge")
            && guid_at(head, 32) == self.guid
            && length >= SECTOR
            && length.is_multiple_of(SECTOR)
            && length <= self.bytes.len()
            && tail.is_multiple_of(SECTOR)
            && tail < self.bytes.len()
            && sequence != 0
            && u32_at(head, 28) == 0
            && flushed.is_multiple_of(MIB)
            && last.is_multiple_of(MIB)
            && descriptor_sectors(descriptors).is_some_and(|sectors| sectors * SECTOR <= length);
        if !plausible {
            return Ok(None);
        }
        self.budget =
            self.budget.checked_sub(length as u64).ok_or("it is full of entries that overlap each other")?;
        let bytes = self.entry_bytes(at, length);
        if !checksum_fits(&bytes) || writes(&bytes).is_none() {
            return Ok(None);
        }
        Ok(Some(Entry { at, length, tail, sequence, flushed, last }))
    }

    /// The newest sequence that is valid and complete, oldest entry first.
    fn active_sequence(&mut self) -> Result<Option<Vec<Entry>>, String> {
        let mut best: Option<Vec<Entry>> = None;
        let mut start = 0;
        while start < self.bytes.len() {
            let mut sequence: Vec<Entry> = Vec::new();
            let (mut at, mut covered) = (start, 0);
            while covered < self.bytes.len() {
                let Some(entry) = self.entry(at)? else { break };
                let follows =
                    sequence.last().is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
                if !follows || covered + entry.length > self.bytes.len() {
                    break;
                }
                covered += entry.length;
                at = (at + entry.length) % self.bytes.len();
                sequence.push(entry);
            }
            let next = start + SECTOR;
            let Some(head) = sequence.last() else {
                start = next;
                continue;
            };
            let tail = sequence.iter().position(|entry| entry.at == head.tail);
            // A run that starts later within this one would end in the same head.
            start = if tail.is_some() && at > start { at.max(next) } else { next };
            let Some(tail) = tail else { continue };
            let newer =
                best.as_ref().and_then(|best| best.last()).is_none_or(|best| head.sequence > best.sequence);
            if newer {
                best = Some(sequence.split_off(tail));
            }
        }
        Ok(best)
    }
}

/// Sectors that `count` descriptors need: 126 fit into the first, 128 into each other.
fn descriptor_sectors(count: usize) -> Option<usize> {
    Some((count.checked_mul(DESCRIPTOR)?.checked_add(ENTRY_HEADER)?).div_ceil(SECTOR))
}

/// One write that an entry describes; `None` stands for zeros.
type Write = (ByteRange, Option<Box<[u8]>>);

/// All writes of an entry, or `None` if it contradicts itself.
fn writes(entry: &[u8]) -> Option<Vec<Write>> {
    let sequence = u64_at(entry, 16);
    let count = u32_at(entry, 24) as usize;
    let mut data_at = descriptor_sectors(count)?.checked_mul(SECTOR)?;
    let descriptors = entry.get(ENTRY_HEADER..)?.chunks_exact(DESCRIPTOR).take(count);
    let mut found = Vec::new();
    for descriptor in descriptors {
        let offset = u64_at(descriptor, 16);
        if u64_at(descriptor, 24) != sequence || !offset.is_multiple_of(LOG_SECTOR) {
            return None;
        }
        match descriptor.get(..4)? {
            b"zero" => {
                let length = u64_at(descriptor, 8);
                if !length.is_multiple_of(LOG_SECTOR) {
                    return None;
                }
                found.push((ByteRange::at(offset, length)?, None));
            }
            b"desc" => {
                let sector = entry.get(data_at..)?.get(..SECTOR)?;
                data_at += SECTOR;
                let high = u32_at(sector, 4);
                let low = u32_at(sector, SECTOR - 4);
                if sector.get(..4)? != b"data" || u64::from(high) << 32 | u64::from(low) != sequence {
                    return None;
                }
                let mut bytes: Box<[u8]> = sector.into();
                put(&mut bytes, 0, descriptor.get(8..16)?);
                put(&mut bytes, SECTOR - 4, descriptor.get(4..8)?);
                found.push((ByteRange::at(offset, LOG_SECTOR)?, Some(bytes)));
            }
            _ => return None,
        }
    }
    (data_at == entry.len()).then_some(found)
}

/// Replays the log of `header`, if one is in use, over `file`.
pub(crate) fn replay<D: BlockDevice>(file: D, header: &Header) -> Result<Replayed<D>, ImageError> {
    let mut replayed = Replayed::new(file);
    if !header.log_in_use() {
        return Ok(replayed);
    }
    let wrong = |reason: String| damaged("log", header.log_offset, reason);
    if header.log_length > MAX_REPLAYED_LOG {
        return Err(unsupported(format!(
            "a log of {} bytes that must be replayed, at most {MAX_REPLAYED_LOG} are",
            header.log_length
        )));
    }
    let mut bytes = vec![0; header.log_length as usize];
    replayed.read_at(header.log_offset, &mut bytes)?;
    let budget = 4 * bytes.len() as u64 + (16 << 20);
    let known = vec![None; bytes.len() / SECTOR];
    let mut ring = Ring { bytes, guid: header.log_guid, budget, known };
    let sequence = ring
        .active_sequence()
        .map_err(wrong)?
        .ok_or_else(|| wrong("it is in use and holds no valid sequence of entries".to_owned()))?;
    let Some(head) = sequence.last() else { return Ok(replayed) };
    if replayed.size() < head.flushed {
        return Err(damaged(
            "file",
            replayed.size(),
            format!("cut off: it has {} bytes, the log says {} were durable", replayed.size(), head.flushed),
        ));
    }
    if head.last > MAX_FILE {
        return Err(wrong(format!("it says the file has {} bytes", head.last)));
    }
    let log = ByteRange { start: header.log_offset, end: header.log_offset + u64::from(header.log_length) };
    let mut size = head.last;
    for entry in &sequence {
        let writes = writes(&ring.entry_bytes(entry.at, entry.length)).unwrap_or_default();
        for (range, content) in writes {
            // The headers are the one thing never written through the log, and the log does not describe itself.
            let allowed =
                range.start >= TABLES[0] && range.end <= MAX_FILE && range.intersect(&log).is_none();
            if !allowed && !range.is_empty() {
                let reason = format!("an entry writes to {}..{}", range.start, range.end);
                return Err(wrong(reason));
            }
            size = size.max(range.end);
            match content {
                Some(bytes) => replayed.put(range.start, bytes),
                None if range.is_empty() => {}
                None => replayed.zero(range),
            }
        }
    }
    replayed.extend(size);
    Ok(replayed)
}

/// Most pages that [`entry_bytes`] can hold in a log of `length` bytes.
pub(crate) fn pages_that_fit(length: u32) -> usize {
    let sectors = length as usize / SECTOR;
    // One descriptor sector more for each 126 data sectors is never too few.
    sectors - sectors.div_ceil(126).min(sectors)
}

/// One entry, a sequence of its own at the start of the log, that puts `pages` of 4 KiB in their places.
pub(crate) fn entry_bytes<'a>(
    guid: &Guid,
    file: u64,
    pages: impl ExactSizeIterator<Item = (u64, &'a [u8])>,
) -> Vec<u8> {
    let sequence = 1u64;
    let count = pages.len();
    let table = (count * DESCRIPTOR + ENTRY_HEADER).div_ceil(SECTOR) * SECTOR;
    let mut entry = vec![0; table + count * SECTOR];
    let length = entry.len() as u32;
    put(&mut entry, 0, b"loge");
    put(&mut entry, 8, &length.to_le_bytes());
    put(&mut entry, 16, &sequence.to_le_bytes());
    put(&mut entry, 24, &(count as u32).to_le_bytes());
    put(&mut entry, 32, guid);
    put(&mut entry, 48, &file.to_le_bytes());
    put(&mut entry, 56, &file.to_le_bytes());
    for (index, (offset, page)) in pages.enumerate() {
        let at = ENTRY_HEADER + index * DESCRIPTOR;
        put(&mut entry, at, b"desc");
        put(&mut entry, at + 4, &page[SECTOR - 4..]);
        put(&mut entry, at + 8, &page[..8]);
        put(&mut entry, at + 16, &offset.to_le_bytes());
        put(&mut entry, at + 24, &sequence.to_le_bytes());
        let data = table + index * SECTOR;
        put(&mut entry, data, page);
        put(&mut entry, data, b"data");
        put(&mut entry, data + 4, &0u32.to_le_bytes());
        put(&mut entry, data + SECTOR - 4, &(sequence as u32).to_le_bytes());
    }
    seal(&mut entry);
    entry
}

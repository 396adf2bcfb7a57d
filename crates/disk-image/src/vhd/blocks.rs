//! Block Allocation Table and sector bitmaps: where each byte of a dynamic or differencing disk lies.
//!
//! A table entry is the sector of the file at which a block begins, or all ones. A block is a bitmap (one bit for
//! each sector, the highest bit of a byte first, padded to whole sectors) and then the sectors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, DeviceError};

use super::header::{self, Header};
use super::{SECTOR, be_u32, damaged};
use crate::ImageError;

/// An entry of a block that is not there.
pub(crate) const UNUSED: u32 = u32::MAX;

const PAGE: u64 = 4096;
const PAGES: usize = 128;

/// Bytes of table and bitmap pages held for one open image.
pub const CACHE_BYTES: usize = PAGE as usize * PAGES;

/// What the header says, checked against footer and file.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    /// Bytes of one bitmap, whole sectors.
    pub(crate) bitmap_bytes: u64,
    pub(crate) table_offset: u64,
    /// Blocks of the disk; the table may have more entries, which mean nothing.
    pub(crate) blocks: u64,
    /// Where the Dynamic Disk Header lies.
    header_offset: u64,
}

impl Tables {
    pub(crate) fn new(
        header: &Header,
        header_offset: u64,
        size: u64,
        file_size: u64,
    ) -> Result<Tables, ImageError> {
        let block_size = u64::from(header.block_size);
        let blocks = size.div_ceil(block_size);
        if u64::from(header.max_table_entries) < blocks {
            return Err(damaged(
                header::NAME,
                header_offset,
                format!(
                    "Max Table Entries {}, but {size} bytes in blocks of {block_size} need {blocks}",
                    header.max_table_entries
                ),
            ));
        }
        let table_end = header.table_offset.checked_add(blocks * 4);
        if table_end.is_none_or(|end| end > file_size) {
            return Err(damaged(
                "Block Allocation Table",
                header.table_offset,
                format!("{blocks} entries end outside the file of {file_size} bytes"),
            ));
        }
        Ok(Tables {
            size,
            block_size,
            bitmap_bytes: bitmap_bytes(block_size),
            table_offset: header.table_offset,
            blocks,
            header_offset,
        })
    }

    /// Bytes of the disk in a block; the last one may have less.
    pub(crate) fn used(&self, block: u64) -> u64 {
        self.block_size.min(self.size.saturating_sub(block * self.block_size))
    }

    /// Where a block begins in a file of `file_size` bytes. A block that overlaps the structures before it, or that
    /// the file does not hold, is damage.
    pub(crate) fn place(&self, block: u64, entry: u32, file_size: u64) -> Result<Option<u64>, DeviceError> {
        if entry == UNUSED {
            return Ok(None);
        }
        let start = u64::from(entry) * SECTOR;
        let end = start + self.bitmap_bytes + self.used(block);
        let overlaps = |at: u64, bytes: u64| start < at.saturating_add(bytes) && at < end;
        let reason = if end > file_size {
            format!("ends at byte {end} of a file of {file_size} bytes")
        } else if overlaps(0, SECTOR)
            || overlaps(self.header_offset, header::BYTES as u64)
            || overlaps(self.table_offset, self.blocks * 4)
        {
            format!("begins at byte {start} of the file and overlaps footer, header or table")
        } else {
            return Ok(Some(start));
        };
        Err(DeviceError::Damaged {
            object: "vhd image".to_owned(),
            offset: block * self.block_size,
            length: self.used(block),
            reason: format!("Block Allocation Table: block {block} {reason}"),
        })
    }
}

pub(crate) fn bitmap_bytes(block_size: u64) -> u64 {
    (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
}

/// Where a run of bytes of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Zeros,
    Parent,
    /// At this byte of the file.
    File(u64),
}

/// What the walk over a disk needs of its tables.
pub(crate) trait Blocks {
    fn tables(&self) -> &Tables;
    fn has_parent(&self) -> bool;
    /// Where a block begins in the file.
    fn start_of(&self, block: u64) -> Result<Option<u64>, DeviceError>;
    /// Bytes of the bitmap of the block that begins at `start`.
    fn bitmap(&self, block: u64, start: u64, at: u64, buf: &mut [u8]) -> Result<(), DeviceError>;
}

/// The source of byte `offset` and where the run of that source ends: at most at `end`, at least one byte on.
pub(crate) fn run(blocks: &impl Blocks, offset: u64, end: u64) -> Result<(Source, u64), DeviceError> {
    let tables = blocks.tables();
    let absent = if blocks.has_parent() { Source::Parent } else { Source::Zeros };
    let mut block = offset / tables.block_size;
    let Some(start) = blocks.start_of(block)? else {
        while (block + 1) * tables.block_size < end && blocks.start_of(block + 1)?.is_none() {
            block += 1;
        }
        return Ok((absent, ((block + 1) * tables.block_size).min(end)));
    };
    let block_offset = block * tables.block_size;
    let end = end.min(block_offset + tables.block_size);
    let first = (offset - block_offset) / SECTOR;
    let sectors = (end - block_offset).div_ceil(SECTOR);
    let mut piece = [0u8; 512];
    let mut sector = first;
    let mut present = None;
    'scan: while sector < sectors {
        let at = sector / 8;
        let length = (sectors.div_ceil(8) - at).min(piece.len() as u64);
        let piece = &mut piece[..length as usize];
        blocks.bitmap(block, start, at, piece)?;
        for (index, &byte) in piece.iter().enumerate() {
            let from = (at + index as u64) * 8;
            if present == Some(byte == 0xFF) && (byte == 0xFF || byte == 0) {
                sector = from + 8;
                continue;
            }
            for bit in sector.max(from) - from..8 {
                let set = byte & (0x80 >> bit) != 0;
                if *present.get_or_insert(set) != set {
                    sector = from + bit;
                    break 'scan;
                }
            }
            sector = from + 8;
        }
    }
    let run_end = (block_offset + sector * SECTOR).min(end);
    let source = match present {
        Some(true) => Source::File(start + tables.bitmap_bytes + (offset - block_offset)),
        _ => absent,
    };
    Ok((source, run_end))
}

/// Pages of tables and bitmaps, read once, the least recently used dropped.
pub(crate) struct MetadataCache {
    file: Arc<dyn BlockDevice>,
    pages: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    pages: HashMap<u64, (u64, Arc<[u8]>)>,
    clock: u64,
}

impl MetadataCache {
    pub(crate) fn new(file: Arc<dyn BlockDevice>) -> MetadataCache {
        MetadataCache { file, pages: Mutex::default() }
    }

    fn page(&self, index: u64) -> Result<Arc<[u8]>, DeviceError> {
        {
            let mut held = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            held.clock += 1;
            let clock = held.clock;
            if let Some((used, page)) = held.pages.get_mut(&index) {
                *used = clock;
                return Ok(page.clone());
            }
        }
        let offset = index * PAGE;
        let length = self.file.size().saturating_sub(offset).min(PAGE);
        let mut bytes = vec![0u8; length as usize];
        self.file.read_at(offset, &mut bytes)?;
        let page: Arc<[u8]> = bytes.into();
        let mut held = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if held.pages.len() >= PAGES
            && let Some(oldest) =
                held.pages.iter().min_by_key(|(_, (used, _))| *used).map(|(&index, _)| index)
        {
            held.pages.remove(&oldest);
        }
        let clock = held.clock;
        held.pages.insert(index, (clock, page.clone()));
        Ok(page)
    }

    pub(crate) fn read(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.file.size())?;
        while !buf.is_empty() {
            let page = self.page(offset / PAGE)?;
            let within = (offset % PAGE) as usize;
            let length = buf.len().min(PAGE as usize - within);
            let (part, rest) = buf.split_at_mut(length);
            match page.get(within..within + length) {
                Some(bytes) => part.copy_from_slice(bytes),
                None => {
                    return Err(DeviceError::OutOfBounds {
                        offset,
                        length: length as u64,
                        size: self.file.size(),
                    });
                }
            }
            buf = rest;
            offset += length as u64;
        }
        Ok(())
    }

    pub(crate) fn entry(&self, tables: &Tables, block: u64) -> Result<u32, DeviceError> {
        let mut bytes = [0u8; 4];
        self.read(tables.table_offset + block * 4, &mut bytes)?;
        Ok(be_u32(&bytes, 0))
    }
}

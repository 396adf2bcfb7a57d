//! From an offset of the disk to bytes: through BAT and sector bitmaps to this file, the parent, or zeros.
//!
//! Shared by reader and writer. Structures are read page by page through a small cache, never whole.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError};

use super::MIB;
use super::bat::{Entry, Geometry, State};
use super::bytes::u64_at;

/// Pages of 64 KiB of BAT and sector bitmaps that are held for one image.
pub const CACHED_PAGES: usize = 32;
const PAGE: u64 = 64 << 10;

struct Page {
    bytes: Vec<u8>,
    used: u64,
    zero: bool,
}

/// Pages of the structures of a file that were read last.
#[derive(Default)]
struct Pages {
    held: HashMap<u64, Page>,
    clock: u64,
}

impl Pages {
    fn page(&mut self, file: &dyn BlockDevice, index: u64) -> Result<&Page, DeviceError> {
        self.clock += 1;
        let clock = self.clock;
        if !self.held.contains_key(&index) {
            let start = index * PAGE;
            let mut bytes = vec![0; PAGE as usize];
            let present = file.size().saturating_sub(start).min(PAGE) as usize;
            file.read_at(start, &mut bytes[..present])?;
            if self.held.len() >= CACHED_PAGES
                && let Some(oldest) = self.held.iter().min_by_key(|(_, page)| page.used).map(|(&at, _)| at)
            {
                self.held.remove(&oldest);
            }
            let zero = bytes.iter().all(|&byte| byte == 0);
            self.held.insert(index, Page { bytes, used: clock, zero });
        }
        let page = self.held.entry(index).or_insert_with(|| Page { bytes: Vec::new(), used: 0, zero: true });
        page.used = clock;
        Ok(page)
    }
}

/// Where the content of a payload block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the parent.
    Parent,
    /// Nowhere: zeros.
    Zeros,
    /// In this file from this offset.
    Here(u64),
    /// Sector by sector in this file from `payload` or in the parent, by the bits from `bitmap` of this file.
    Mixed { payload: u64, bitmap: u64 },
}

/// An image file seen as a disk.
pub(crate) struct Mapping<F> {
    pub(crate) file: F,
    pub(crate) geometry: Geometry,
    /// Where the BAT begins in the file.
    pub(crate) bat: u64,
    /// Regions and log, ascending: no block may lie there.
    pub(crate) taken: Vec<ByteRange>,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    pages: Mutex<Pages>,
}

impl<F: BlockDevice> Mapping<F> {
    pub(crate) fn new(
        file: F,
        geometry: Geometry,
        bat: u64,
        taken: Vec<ByteRange>,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Mapping<F> {
        Mapping { file, geometry, bat, taken, parent, pages: Mutex::default() }
    }

    fn with_page<T>(&self, offset: u64, use_page: impl FnOnce(&Page) -> T) -> Result<T, DeviceError> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(use_page(pages.page(&self.file, offset / PAGE)?))
    }

    /// Takes over a change of the file that lies within one page.
    pub(crate) fn changed(&self, offset: u64, bytes: &[u8]) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(page) = pages.held.get_mut(&(offset / PAGE)) {
            let at = (offset % PAGE) as usize;
            page.bytes[at..at + bytes.len()].copy_from_slice(bytes);
            page.zero = false;
        }
    }

    /// Bytes of BAT entry `index` in the file.
    pub(crate) fn entry_offset(&self, index: u64) -> u64 {
        self.bat + index * 8
    }

    fn damaged(&self, block: u64, reason: String) -> DeviceError {
        DeviceError::Damaged {
            object: "VHDX image".to_owned(),
            offset: block * self.geometry.block,
            length: self.geometry.used_bytes(block),
            reason,
        }
    }

    fn entry(&self, block: u64, index: u64) -> Result<Entry, DeviceError> {
        let offset = self.entry_offset(index);
        let raw = self.with_page(offset, |page| u64_at(&page.bytes, (offset % PAGE) as usize))?;
        Entry::parse(raw).map_err(|reason| self.damaged(block, reason))
    }

    /// The entry of payload block `block`; what it names is checked only by [`Mapping::place`].
    pub(crate) fn payload_entry(&self, block: u64) -> Result<Entry, DeviceError> {
        self.entry(block, self.geometry.payload_entry(block))
    }

    /// Where the sector bitmap block for `block` is, if there is one.
    pub(crate) fn bitmap_block(&self, block: u64) -> Result<Option<u64>, DeviceError> {
        let entry = self.entry(block, self.geometry.bitmap_entry(block))?;
        match entry.state {
            State::NotPresent => Ok(None),
            State::FullyPresent => {
                self.check_place(block, "sector bitmap block", entry.offset, MIB)?;
                Ok(Some(entry.offset))
            }
            other => Err(self.damaged(block, format!("the sector bitmap block has the state {other:?}"))),
        }
    }

    fn check_place(&self, block: u64, what: &str, start: u64, length: u64) -> Result<(), DeviceError> {
        let size = self.file.size();
        let end = match start.checked_add(length) {
            Some(end) if end <= size => end,
            _ => {
                return Err(self.damaged(
                    block,
                    format!("its {what} at byte {start} needs {length} bytes, the file has {size}"),
                ));
            }
        };
        if start < MIB {
            return Err(
                self.damaged(block, format!("its {what} lies at byte {start}, in the header section"))
            );
        }
        let before = self.taken.partition_point(|taken| taken.end <= start);
        if self.taken.get(before).is_some_and(|taken| taken.start < end) {
            return Err(
                self.damaged(block, format!("its {what} at byte {start} lies in the log or in a region"))
            );
        }
        Ok(())
    }

    /// Where the content of `block` is, checked.
    pub(crate) fn place(&self, block: u64) -> Result<Place, DeviceError> {
        let entry = self.payload_entry(block)?;
        let used = self.geometry.used_bytes(block);
        match entry.state {
            State::NotPresent if self.geometry.differencing => Ok(Place::Parent),
            State::NotPresent | State::Undefined | State::Zero | State::Unmapped => Ok(Place::Zeros),
            State::FullyPresent => {
                self.check_place(block, "payload", entry.offset, used)?;
                Ok(Place::Here(entry.offset))
            }
            State::PartiallyPresent if self.geometry.differencing => {
                self.check_place(block, "payload", entry.offset, used)?;
                match self.bitmap_block(block)? {
                    Some(bitmap) => Ok(Place::Mixed {
                        payload: entry.offset,
                        bitmap: bitmap + self.geometry.bitmap_offset(block),
                    }),
                    None => Err(self
                        .damaged(block, "it is partially present and has no sector bitmap block".to_owned())),
                }
            }
            State::PartiallyPresent => {
                Err(self.damaged(block, "it is partially present in an image that has no parent".to_owned()))
            }
        }
    }

    /// Whether the sector at `at` is in this file, and up to where (at most `to`) the answer is the same. Offsets are
    /// bytes within the block.
    fn run(&self, bitmap: u64, at: u64, to: u64) -> Result<(bool, u64), DeviceError> {
        let sector = self.geometry.sector;
        let (first, last) = (at / sector, to.div_ceil(sector));
        let byte = |index: u64| {
            let offset = bitmap + index / 8;
            self.with_page(offset, |page| page.bytes.get((offset % PAGE) as usize).copied().unwrap_or(0))
        };
        let here = byte(first)? >> (first % 8) & 1 == 1;
        let whole = if here { 0xFF } else { 0 };
        let mut index = first + 1;
        while index < last {
            let bits = byte(index)?;
            if index.is_multiple_of(8) && bits == whole {
                index += 8;
            } else if (bits >> (index % 8) & 1 == 1) == here {
                index += 1;
            } else {
                break;
            }
        }
        Ok((here, (index * sector).min(to)))
    }

    fn read_parent(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let Some(parent) = &self.parent else {
            buf.fill(0);
            return Ok(());
        };
        // A child may have been made larger than its parent.
        let there = parent.size().saturating_sub(offset).min(buf.len() as u64);
        let (inside, beyond) = buf.split_at_mut(there as usize);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { parent.read_at(offset, inside) }
    }

    /// See [`BlockDevice::read_at`].
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.geometry.size)?;
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (block, within) = (at / self.geometry.block, at % self.geometry.block);
            let length = (self.geometry.block - within).min(rest.len() as u64);
            let (part, after) = rest.split_at_mut(length as usize);
            match self.place(block)? {
                Place::Parent => self.read_parent(at, part)?,
                Place::Zeros => part.fill(0),
                Place::Here(payload) => self.file.read_at(payload + within, part)?,
                Place::Mixed { payload, bitmap } => {
                    let (mut from, to) = (within, within + length);
                    let mut part = part;
                    while from < to {
                        let (here, end) = self.run(bitmap, from, to)?;
                        let (piece, others) = part.split_at_mut((end - from) as usize);
                        if here {
                            self.file.read_at(payload + from, piece)?;
                        } else {
                            self.read_parent(block * self.geometry.block + from, piece)?;
                        }
                        part = others;
                        from = end;
                    }
                }
            }
            rest = after;
            at += length;
        }
        Ok(())
    }

    /// The first allocated range of the parent at or after `from`, remembered in `seen` while it lies ahead.
    fn parent_next(
        &self,
        from: u64,
        seen: &mut Option<Option<ByteRange>>,
    ) -> Result<Option<ByteRange>, DeviceError> {
        if let Some(known) = seen
            && known.is_none_or(|range| range.end > from)
        {
            return Ok(*known);
        }
        let found = match &self.parent {
            Some(parent) => parent.next_allocated(from)?,
            None => None,
        };
        *seen = Some(found);
        Ok(found)
    }

    /// See [`BlockDevice::next_allocated`]. Holes of the file that the file knows are left out as well, so a fixed
    /// image in a sparse file is as cheap to back up as a dynamic one.
    pub(crate) fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let size = self.geometry.size;
        let mut at = from;
        let mut parent_seen = None;
        while at < size {
            let (block, within) = (at / self.geometry.block, at % self.geometry.block);
            let start = block * self.geometry.block;
            let end = start + self.geometry.used_bytes(block);
            if let Some(block) = self.skip_empty_page(block)? {
                at = block * self.geometry.block;
                continue;
            }
            let clip = |range: ByteRange| -> Option<ByteRange> {
                let range = ByteRange { start: range.start.max(at), end: range.end.min(end) };
                (!range.is_empty()).then_some(range)
            };
            let found = match self.place(block)? {
                Place::Zeros => None,
                Place::Parent => {
                    let next = self.parent_next(at, &mut parent_seen)?;
                    next.and_then(clip)
                }
                Place::Here(payload) => {
                    let next = self.file.next_allocated(payload + within)?;
                    next.filter(|range| range.start < payload + (end - start))
                        .and_then(|range| clip(shifted(range, payload, start, end - start)))
                }
                Place::Mixed { payload, bitmap } => {
                    let (here, run_end) = self.run(bitmap, within, end - start)?;
                    let run_end = start + run_end;
                    let next = if here {
                        self.file
                            .next_allocated(payload + within)?
                            .filter(|range| range.start < payload + (run_end - start))
                            .map(|range| shifted(range, payload, start, end - start))
                    } else {
                        self.parent_next(at, &mut parent_seen)?
                    };
                    let range = next
                        .map(|range| ByteRange { start: range.start.max(at), end: range.end.min(run_end) })
                        .filter(|range| !range.is_empty());
                    if range.is_none() {
                        at = run_end;
                        continue;
                    }
                    range
                }
            };
            if found.is_some() {
                return Ok(found);
            }
            at = end;
        }
        Ok(None)
    }

    /// If the BAT page that holds the entry of `block` is all zero in an image without a parent: the first block
    /// whose entry lies after it. An empty disk of 64 TiB is 8192 pages instead of 64 million entries.
    pub(crate) fn skip_empty_page(&self, block: u64) -> Result<Option<u64>, DeviceError> {
        if self.geometry.differencing {
            return Ok(None);
        }
        let offset = self.entry_offset(self.geometry.payload_entry(block));
        if !self.with_page(offset, |page| page.zero)? {
            return Ok(None);
        }
        let next_index = ((offset / PAGE + 1) * PAGE - self.bat) / 8;
        let (ratio, chunk) = (self.geometry.ratio(), self.geometry.ratio() + 1);
        // An index that is a bitmap entry counts for the first block of the next chunk.
        let next = next_index / chunk * ratio + (next_index % chunk).min(ratio);
        Ok(Some(next.max(block + 1)))
    }
}

/// A range of the file within a payload as a range of the disk.
fn shifted(range: ByteRange, payload: u64, start: u64, length: u64) -> ByteRange {
    ByteRange {
        start: start + range.start.saturating_sub(payload),
        end: start + range.end.saturating_sub(payload).min(length),
    }
}

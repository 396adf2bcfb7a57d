//! Changes kept in memory above a device that stays as it is.

use std::collections::BTreeMap;
use std::sync::RwLock;

use crate::{BlockDevice, ByteRange, DeviceError, WritableDevice};

/// Bytes of one page of the overlay: the sector size of the logs that are replayed into it.
const PAGE: u64 = 4096;

/// A device seen through changes that are held in memory, page by page, and never reach it.
pub struct OverlayDevice<D> {
    below: D,
    pages: RwLock<BTreeMap<u64, Box<[u8]>>>,
}

impl<D: BlockDevice> OverlayDevice<D> {
    /// An overlay without changes.
    pub fn new(below: D) -> OverlayDevice<D> {
        OverlayDevice { below, pages: RwLock::new(BTreeMap::new()) }
    }

    /// Bytes of memory held for changes.
    pub fn held_bytes(&self) -> u64 {
        self.pages().len() as u64 * PAGE
    }

    fn pages(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<u64, Box<[u8]>>> {
        self.pages.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn read_page_below(&self, index: u64) -> Result<Box<[u8]>, DeviceError> {
        let start = index * PAGE;
        let mut page = vec![0u8; PAGE as usize].into_boxed_slice();
        let present = (self.below.size() - start).min(PAGE) as usize;
        self.below.read_at(start, &mut page[..present])?;
        Ok(page)
    }
}

impl<D: BlockDevice> BlockDevice for OverlayDevice<D> {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.below.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.below.read_at(offset, buf)?;
        if buf.is_empty() {
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        for (index, page) in self.pages().range(offset / PAGE..end.div_ceil(PAGE)) {
            let from = (index * PAGE).max(offset);
            let to = ((index + 1) * PAGE).min(end);
            let inside = (from - index * PAGE) as usize..(to - index * PAGE) as usize;
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&page[inside]);
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        if from >= self.size() {
            return Ok(None);
        }
        let below = self.below.next_allocated(from)?;
        let page = self.pages().range(from / PAGE..).next().map(|(index, _)| ByteRange {
            start: (index * PAGE).max(from),
            end: ((index + 1) * PAGE).min(self.size()),
        });
        Ok(match (below, page) {
            (Some(below), Some(page)) if page.start < below.start => Some(page),
            (None, page) => page,
            (below, _) => below,
        })
    }
}

impl<D: BlockDevice> WritableDevice for OverlayDevice<D> {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.size())?;
        if buf.is_empty() {
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        let mut pages = self.pages.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        for index in offset / PAGE..end.div_ceil(PAGE) {
            let page = match pages.entry(index) {
                std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
                std::collections::btree_map::Entry::Vacant(gap) => gap.insert(self.read_page_below(index)?),
            };
            let from = (index * PAGE).max(offset);
            let to = ((index + 1) * PAGE).min(end);
            let inside = (from - index * PAGE) as usize..(to - index * PAGE) as usize;
            page[inside].copy_from_slice(&buf[(from - offset) as usize..(to - offset) as usize]);
        }
        Ok(())
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        let zeros = vec![0u8; PAGE as usize];
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(PAGE);
            self.write_at(at, &zeros[..length as usize])?;
            at += length;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

//! Reads L1 and L2 tables page by page, so that memory does not depend on what an image claims.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, DeviceError};

use super::header::be64;

/// Bytes of a page; entries are aligned, so none crosses a page.
const PAGE: u64 = 16 << 10;
/// Pages kept: 2 MiB, the L2 tables of 16 GiB of disk with clusters of 64 KiB.
const PAGES: usize = 128;

/// Pages of tables, the most recently used ones.
pub(super) struct Tables {
    file: Arc<dyn BlockDevice>,
    pages: Mutex<Pages>,
}

#[derive(Default)]
struct Pages {
    held: HashMap<u64, (Arc<[u8]>, u64)>,
    clock: u64,
}

impl Tables {
    pub fn new(file: Arc<dyn BlockDevice>) -> Tables {
        Tables { file, pages: Mutex::default() }
    }

    /// The number at `offset` of the file, a multiple of 8.
    pub fn entry(&self, offset: u64) -> Result<u64, DeviceError> {
        let page = self.page(offset / PAGE)?;
        be64(&page, (offset % PAGE) as usize).ok_or(DeviceError::OutOfBounds {
            offset,
            length: 8,
            size: self.file.size(),
        })
    }

    fn page(&self, index: u64) -> Result<Arc<[u8]>, DeviceError> {
        {
            let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            pages.clock += 1;
            let now = pages.clock;
            if let Some((page, used)) = pages.held.get_mut(&index) {
                *used = now;
                return Ok(page.clone());
            }
        }
        // Read without the lock: another thread may read the same page, which costs time and nothing else.
        let start = index * PAGE;
        let length = self.file.size().saturating_sub(start).min(PAGE);
        let mut bytes = vec![0u8; length as usize];
        self.file.read_at(start, &mut bytes)?;
        let page: Arc<[u8]> = bytes.into();
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.held.len() >= PAGES {
            let oldest = pages.held.iter().min_by_key(|(_, (_, used))| *used).map(|(&index, _)| index);
            if let Some(oldest) = oldest {
                pages.held.remove(&oldest);
            }
        }
        let now = pages.clock;
        pages.held.insert(index, (page.clone(), now));
        Ok(page)
    }
}

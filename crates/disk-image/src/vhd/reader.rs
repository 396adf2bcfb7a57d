//! Reading a VHD.

use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError};

use super::blocks::{self, Blocks, MetadataCache, Source, Tables};
use super::footer;
use super::header::{self, Header};
use super::{Info, Kind, SECTOR, damaged};
use crate::{ImageError, ImageFormat, MAX_CHAIN, ParentReference, Parents};

/// Blocks that one step of a walk over a parent may pass. Without it each step would walk the rest of the table.
const STEP_BLOCKS: u64 = 4096;

/// The disk inside a VHD file.
pub struct Reader {
    file: Arc<dyn BlockDevice>,
    info: Info,
    body: Body,
}

enum Body {
    Fixed,
    Sparse(Sparse),
}

struct Sparse {
    file_size: u64,
    tables: Tables,
    cache: MetadataCache,
    parent: Option<Parent>,
}

struct Parent {
    disk: Arc<Reader>,
    /// The last answer about allocated ranges: from `.0` on, nothing comes before `.1`. Keeps many small gaps of the
    /// child from walking the same empty part of the parent again.
    last: Mutex<Option<(u64, Option<ByteRange>)>>,
}

/// What is common to opening for reading and for writing.
pub(super) struct Opened {
    pub(super) info: Info,
    pub(super) found: footer::Found,
    /// Header, where it lies, and the tables; `None` for a fixed disk.
    pub(super) sparse: Option<(Header, Tables)>,
    pub(super) parent: Option<Arc<Reader>>,
}

pub(super) fn open(
    file: &dyn BlockDevice,
    parents: &dyn Parents,
    depth: usize,
) -> Result<Opened, ImageError> {
    let found = footer::find(file)?;
    let footer = &found.footer;
    let kind = footer.kind()?;
    let (size, size_rule) = footer.size(found.offset)?;
    let mut info = Info {
        kind,
        size,
        size_rule,
        current_size: footer.current_size,
        original_size: footer.original_size,
        geometry: footer.geometry,
        block_size: None,
        unique_id: footer.unique_id,
        parent_unique_id: None,
        parent_time_stamp: None,
        parent_names: Vec::new(),
        creator_application: footer.creator_application,
        creator_version: footer.creator_version,
        creator_host_os: footer.creator_host_os,
        time_stamp: footer.time_stamp,
        saved_state: footer.saved_state,
        footer: found.place,
    };
    if kind == Kind::Fixed {
        if size > found.offset {
            return Err(damaged(
                "Hard Disk Footer",
                found.offset,
                format!("a fixed disk of {size} bytes, but only {} lie before the footer", found.offset),
            ));
        }
        return Ok(Opened { info, found, sparse: None, parent: None });
    }
    let header = Header::read(file, footer.data_offset)?;
    let tables = Tables::new(&header, footer.data_offset, size, file.size())?;
    info.block_size = Some(header.block_size);
    let mut parent = None;
    if kind == Kind::Differencing {
        info.parent_unique_id = Some(header.parent_unique_id);
        info.parent_time_stamp = Some(header.parent_time_stamp);
        info.parent_names = header.parent_names(file)?;
        parent = Some(open_parent(&info, header.parent_unique_id, footer.data_offset, parents, depth)?);
    }
    Ok(Opened { info, found, sparse: Some((header, tables)), parent })
}

fn open_parent(
    info: &Info,
    id: [u8; 16],
    header_offset: u64,
    parents: &dyn Parents,
    depth: usize,
) -> Result<Arc<Reader>, ImageError> {
    if info.parent_names.is_empty() {
        return Err(damaged(header::NAME, header_offset, "a differencing disk that names no parent"));
    }
    if depth + 1 >= MAX_CHAIN {
        return Err(ImageError::NotAllowed {
            format: ImageFormat::Vhd,
            reference: info.parent_names.first().cloned().unwrap_or_default(),
            reason: format!("the chain of parents is longer than {MAX_CHAIN} images, or a loop"),
        });
    }
    let (file, above) = parents.open(&ParentReference {
        child: ImageFormat::Vhd,
        names: info.parent_names.clone(),
        format: Some(ImageFormat::Vhd),
        depth: depth + 1,
    })?;
    let parent = Reader::open_at(file, above.as_ref(), depth + 1)?;
    if parent.info.unique_id != id {
        return Err(ImageError::ParentMismatch {
            format: ImageFormat::Vhd,
            reason: format!("unique id {} was found, {} is expected", hex(&parent.info.unique_id), hex(&id)),
        });
    }
    Ok(Arc::new(parent))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Reader {
    /// Opens the image in `file`; parents of a differencing disk come from `parents`.
    pub fn open(file: Arc<dyn BlockDevice>, parents: &dyn Parents) -> Result<Reader, ImageError> {
        Reader::open_at(file, parents, 0)
    }

    fn open_at(
        file: Arc<dyn BlockDevice>,
        parents: &dyn Parents,
        depth: usize,
    ) -> Result<Reader, ImageError> {
        let opened = open(file.as_ref(), parents, depth)?;
        let body = match opened.sparse {
            None => Body::Fixed,
            Some((_, tables)) => Body::Sparse(Sparse {
                file_size: file.size(),
                tables,
                cache: MetadataCache::new(file.clone()),
                parent: opened.parent.map(|disk| Parent { disk, last: Mutex::default() }),
            }),
        };
        Ok(Reader { file, info: opened.info, body })
    }

    /// What the image says about itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The parent of a differencing disk.
    pub fn parent(&self) -> Option<&Reader> {
        match &self.body {
            Body::Sparse(Sparse { parent: Some(parent), .. }) => Some(&parent.disk),
            _ => None,
        }
    }
}

impl Blocks for Sparse {
    fn tables(&self) -> &Tables {
        &self.tables
    }
    fn has_parent(&self) -> bool {
        self.parent.is_some()
    }
    fn start_of(&self, block: u64) -> Result<Option<u64>, DeviceError> {
        self.tables.place(block, self.cache.entry(&self.tables, block)?, self.file_size)
    }
    fn bitmap(&self, _block: u64, start: u64, at: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.cache.read(start + at, buf)
    }
}

impl Parent {
    /// The first range that may hold data and begins before `end`.
    fn allocated_before(&self, from: u64, end: u64) -> Result<Option<ByteRange>, DeviceError> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match last {
            Some((asked, Some(range))) if asked <= from && from < range.end => {
                Some(ByteRange { start: range.start.max(from), end: range.end })
            }
            Some((asked, None)) if asked <= from => None,
            _ => {
                let found = self.disk.next_allocated(from)?;
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((from, found));
                found
            }
        };
        Ok(found
            .map(|range| ByteRange { start: range.start, end: range.end.min(end) })
            .filter(|range| range.start < range.end))
    }
}

/// Reads from a parent that may be smaller than its child: what it lacks is zeros.
pub(super) fn read_parent(parent: &dyn BlockDevice, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
    let present = parent.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    let (there, missing) = buf.split_at_mut(present);
    missing.fill(0);
    if there.is_empty() {
        return Ok(());
    }
    parent.read_at(offset, there)
}

impl BlockDevice for Reader {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn logical_sector_size(&self) -> u32 {
        SECTOR as u32
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.info.size)?;
        let Body::Sparse(sparse) = &self.body else { return self.file.read_at(offset, buf) };
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let (source, run_end) = blocks::run(sparse, at, end)?;
            let (part, after) = rest.split_at_mut((run_end - at) as usize);
            match (source, &sparse.parent) {
                (Source::File(position), _) => self.file.read_at(position, part)?,
                (Source::Parent, Some(parent)) => read_parent(parent.disk.as_ref(), at, part)?,
                _ => part.fill(0),
            }
            rest = after;
            at = run_end;
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let size = self.info.size;
        if from >= size {
            return Ok(None);
        }
        let clip = |range: Option<ByteRange>, end: u64| {
            range
                .map(|range| ByteRange { start: range.start, end: range.end.min(end) })
                .filter(|range| range.start < range.end)
        };
        let Body::Sparse(sparse) = &self.body else {
            return Ok(clip(self.file.next_allocated(from)?, size));
        };
        let mut at = from;
        while at < size {
            let step_end = at.saturating_add(STEP_BLOCKS.saturating_mul(sparse.tables.block_size)).min(size);
            let (source, end) = blocks::run(sparse, at, step_end)?;
            let found = match (source, &sparse.parent) {
                // Holes of the file are zeros too, so the answer is as fine as the storage below can tell.
                (Source::File(position), _) => {
                    let found = clip(self.file.next_allocated(position)?, position + (end - at));
                    found.map(|range| ByteRange {
                        start: at + range.start.saturating_sub(position),
                        end: at + (range.end - position),
                    })
                }
                (Source::Parent, Some(parent)) => parent.allocated_before(at, end)?,
                _ => None,
            };
            if found.is_some() {
                return Ok(found);
            }
            at = end;
        }
        Ok(None)
    }
}

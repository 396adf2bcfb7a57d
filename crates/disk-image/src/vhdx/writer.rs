//! Writing an image. The order of writes is argued on the page of the module above.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, WritableDevice};

use super::bat::{Entry, Geometry, State as BlockState};
use super::guid::derived;
use super::header::{HEADERS, Header, identifier_bytes};
use super::mapping::{Mapping, Place};
use super::metadata::Metadata;
use super::region_table::TABLES;
use super::{
    Guid, Info, Kind, LOG_SECTOR, MAX_BLOCK_SIZE, MAX_FILE, MAX_SIZE, MIB, MIN_BLOCK_SIZE, ParentLocator,
    Reader, cannot_hold, log, region_table,
};
use crate::ImageError;

/// Changed pages of 4 KiB that wait for a flush; one more makes the writer flush by itself. So many fit into one
/// entry of the smallest log.
pub const MAX_DIRTY_PAGES: usize = 224;
/// Pages that one change of one block can touch: 16 of a bitmap of 64 KiB, two BAT entries, and what is cut by edges.
const PAGES_PER_CHANGE: usize = 24;
/// Free blocks that are remembered for use; further ones are given back to the file system and stay holes.
const MAX_FREE: usize = 65_536;
/// Bytes of the log of a new image.
const LOG_BYTES: u64 = MIB;
const CREATOR: &str = "Stillpoint";

/// Ids of a new image; the caller has the randomness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// First `FileWriteGuid`.
    pub file_write: Guid,
    /// First `DataWriteGuid`: what a child made from this image will name.
    pub data_write: Guid,
    /// Identity of the disk.
    pub virtual_disk: Guid,
}

/// Kinds of image without a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreateKind {
    /// Every block gets its place at once; the file has its final length, as a hole.
    Fixed,
    /// A block gets its place when it is first written.
    Dynamic,
}

/// What a new image without a parent should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk: a multiple of the logical sector size, up to 64 TiB.
    pub size: u64,
    /// 512 or 4096.
    pub logical_sector_size: u32,
    /// 512 or 4096.
    pub physical_sector_size: u32,
    /// Bytes of a payload block: a power of two from 1 to 256 MiB.
    pub block_size: u32,
    /// Fixed or dynamic.
    pub kind: CreateKind,
    /// New ids.
    pub ids: Ids,
}

/// What a new differencing image should be. Size, sector sizes and disk id are the parent's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildOptions {
    /// Bytes of a payload block: a power of two from 1 to 256 MiB; needs not be the parent's.
    pub block_size: u32,
    /// First `FileWriteGuid`.
    pub file_write: Guid,
    /// First `DataWriteGuid`.
    pub data_write: Guid,
    /// Name of the parent relative to the child's folder, with `\`.
    pub relative_path: Option<String>,
    /// Name of the parent by volume GUID.
    pub volume_path: Option<String>,
    /// Name of the parent by drive letter or share.
    pub absolute_win32_path: Option<String>,
}

/// The image file with the changes of its structures that are not in it yet.
pub(crate) struct Live {
    pub(crate) file: Arc<dyn GrowableFile>,
    pub(crate) length: u64,
    /// Pages of 4 KiB by their offset.
    pub(crate) dirty: BTreeMap<u64, Box<[u8]>>,
}

impl Live {
    pub(crate) fn new(file: Arc<dyn GrowableFile>) -> Result<Live, DeviceError> {
        let length = file.len()?;
        Ok(Live { file, length, dirty: BTreeMap::new() })
    }

    pub(crate) fn set_length(&mut self, length: u64) -> Result<(), DeviceError> {
        if length != self.length {
            self.file.set_len(length)?;
            self.length = length;
        }
        Ok(())
    }
}

impl BlockDevice for Live {
    fn size(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.length)?;
        self.file.read_at(offset, buf)?;
        let end = offset + buf.len() as u64;
        for (&at, page) in self.dirty.range(offset / LOG_SECTOR * LOG_SECTOR..end) {
            let (from, to) = (at.max(offset), (at + LOG_SECTOR).min(end));
            let inside = &page[(from - at) as usize..(to - at) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(inside);
        }
        Ok(())
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        Ok((from < self.length).then_some(ByteRange { start: from, end: self.length }))
    }
}

/// New ids for the first change of a session that goes on with an image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Session {
    pub(crate) file_write: Guid,
    pub(crate) data_write: Guid,
}

/// Everything of a writer, behind its lock.
pub(crate) struct State {
    pub(crate) mapping: Mapping<Live>,
    pub(crate) header: Header,
    pub(crate) slot: usize,
    /// First byte after all structures of the file.
    pub(crate) end: u64,
    /// Blocks that nobody uses: free in the durable BAT, and holes.
    pub(crate) free: Vec<u64>,
    /// Blocks that the durable BAT may still name.
    pub(crate) freed: Vec<u64>,
    /// Ids that the first change of this session will put into the headers.
    pub(crate) session: Option<Session>,
    pub(crate) failed: bool,
}

/// A VHDX image that is being filled.
pub struct Writer {
    info: Info,
    state: Mutex<State>,
}

impl Writer {
    /// Makes a new image in an empty `file`. It is valid and durable when this returns.
    pub fn create(file: Arc<dyn GrowableFile>, options: CreateOptions) -> Result<Writer, ImageError> {
        let kind = match options.kind {
            CreateKind::Fixed => Kind::Fixed,
            CreateKind::Dynamic => Kind::Dynamic,
        };
        let metadata = Metadata {
            kind,
            size: options.size,
            block_size: options.block_size,
            logical_sector_size: options.logical_sector_size,
            physical_sector_size: options.physical_sector_size,
            virtual_disk_id: options.ids.virtual_disk,
            parent: None,
        };
        Writer::lay_out(file, metadata, options.ids.file_write, options.ids.data_write, None)
    }

    /// Makes a new differencing image above `parent` in an empty `file`.
    pub fn create_child(
        file: Arc<dyn GrowableFile>,
        parent: Arc<Reader>,
        options: ChildOptions,
    ) -> Result<Writer, ImageError> {
        let below = parent.info();
        let locator = ParentLocator {
            linkage: below.data_write_guid,
            linkage2: None,
            relative_path: options.relative_path,
            volume_path: options.volume_path,
            absolute_win32_path: options.absolute_win32_path,
        };
        if locator.names().is_empty() {
            return Err(cannot_hold("a differencing image needs a name of its parent"));
        }
        let metadata = Metadata {
            kind: Kind::Differencing,
            size: below.size,
            block_size: options.block_size,
            logical_sector_size: below.logical_sector_size,
            physical_sector_size: below.physical_sector_size,
            virtual_disk_id: below.virtual_disk_id,
            parent: Some(locator),
        };
        Writer::lay_out(file, metadata, options.file_write, options.data_write, Some(parent))
    }

    /// First MiB, log, metadata, BAT, then payload. The file type identifier comes last: a file that was left half
    /// made is no VHDX.
    fn lay_out(
        file: Arc<dyn GrowableFile>,
        metadata: Metadata,
        file_write_guid: Guid,
        data_write_guid: Guid,
        parent: Option<Arc<Reader>>,
    ) -> Result<Writer, ImageError> {
        check_options(&metadata)?;
        let length = file.len()?;
        if length != 0 {
            return Err(cannot_hold(format!("the file already has {length} bytes")));
        }
        let geometry = Geometry {
            size: metadata.size,
            block: metadata.block_size.into(),
            sector: metadata.logical_sector_size.into(),
            differencing: metadata.kind == Kind::Differencing,
        };
        let log = ByteRange { start: MIB, end: MIB + LOG_BYTES };
        let items = ByteRange { start: log.end, end: log.end + MIB };
        let bat_bytes = (geometry.entries() * 8).next_multiple_of(MIB);
        let bat = ByteRange { start: items.end, end: items.end + bat_bytes };
        let fixed = metadata.kind == Kind::Fixed;
        let end = bat.end + if fixed { geometry.blocks() * geometry.block } else { 0 };
        let header = Header {
            sequence: 1,
            file_write_guid,
            data_write_guid,
            log_guid: [0; 16],
            log_version: 0,
            version: 1,
            log_length: LOG_BYTES as u32,
            log_offset: log.start,
        };
        let item_bytes = metadata.bytes()?;
        let table = region_table::bytes(bat, items);
        let mut live = Live::new(file)?;
        live.set_length(end)?;
        live.file.write_at(HEADERS[0], &header.bytes())?;
        let header = Header { sequence: 2, ..header };
        live.file.write_at(HEADERS[1], &header.bytes())?;
        for offset in TABLES {
            live.file.write_at(offset, &table)?;
        }
        live.file.write_at(items.start, &item_bytes)?;
        if fixed {
            write_fixed_bat(live.file.as_ref(), &geometry, bat)?;
        }
        live.file.flush()?;
        live.file.write_at(0, &identifier_bytes(CREATOR))?;
        live.file.flush()?;
        let info = Info {
            kind: metadata.kind,
            size: metadata.size,
            block_size: metadata.block_size,
            logical_sector_size: metadata.logical_sector_size,
            physical_sector_size: metadata.physical_sector_size,
            virtual_disk_id: metadata.virtual_disk_id,
            file_write_guid,
            data_write_guid,
            creator: CREATOR.to_owned(),
            parent: metadata.parent,
            log_replayed: false,
        };
        let mapping =
            Mapping::new(live, geometry, bat.start, vec![log, items, bat], parent.map(|parent| parent as _));
        let state = State {
            mapping,
            header,
            slot: 1,
            end,
            free: Vec::new(),
            freed: Vec::new(),
            session: None,
            failed: false,
        };
        Ok(Writer::from_state(info, state))
    }

    pub(crate) fn from_state(info: Info, state: State) -> Writer {
        Writer { info, state: Mutex::new(state) }
    }

    /// What the image says about itself, the ids of this moment included.
    pub fn info(&self) -> Info {
        let state = self.state();
        Info {
            file_write_guid: state.header.file_write_guid,
            data_write_guid: state.header.data_write_guid,
            ..self.info.clone()
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_options(metadata: &Metadata) -> Result<(), ImageError> {
    for sector in [metadata.logical_sector_size, metadata.physical_sector_size] {
        if !matches!(sector, 512 | 4096) {
            return Err(cannot_hold(format!("sectors of {sector} bytes, only 512 and 4096 are possible")));
        }
    }
    let block = metadata.block_size;
    if !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block) || !block.is_power_of_two() {
        return Err(cannot_hold(format!(
            "blocks of {block} bytes, expected a power of two from 1 to 256 MiB"
        )));
    }
    let (size, sector) = (metadata.size, u64::from(metadata.logical_sector_size));
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(sector) {
        return Err(cannot_hold(format!(
            "a disk of {size} bytes, expected a multiple of {sector} up to 64 TiB"
        )));
    }
    Ok(())
}

/// Every block gets its place, in order. A BAT of 512 MiB is written piece by piece.
fn write_fixed_bat(file: &dyn GrowableFile, geometry: &Geometry, bat: ByteRange) -> Result<(), DeviceError> {
    let chunk = geometry.ratio() + 1;
    let entries = geometry.entries();
    let per_piece = MIB / 8;
    for first in (0..entries).step_by(per_piece as usize) {
        let mut piece = Vec::with_capacity(MIB as usize);
        for index in first..(first + per_piece).min(entries) {
            let raw = match index % chunk {
                within if within == chunk - 1 => 0,
                within => {
                    let block = index / chunk * (chunk - 1) + within;
                    let offset = bat.end + block * geometry.block;
                    Entry { state: BlockState::FullyPresent, offset }.raw()
                }
            };
            piece.extend_from_slice(&raw.to_le_bytes());
        }
        file.write_at(bat.start + first * 8, &piece)?;
    }
    Ok(())
}

fn all_zero(buf: &[u8]) -> bool {
    buf.iter().all(|&byte| byte == 0)
}

impl State {
    fn live(&mut self) -> &mut Live {
        &mut self.mapping.file
    }

    fn geometry(&self) -> Geometry {
        self.mapping.geometry
    }

    fn check_alive(&self) -> Result<(), DeviceError> {
        if !self.failed {
            return Ok(());
        }
        Err(DeviceError::Io {
            object: "VHDX image".to_owned(),
            action: "write",
            offset: 0,
            length: 0,
            source: std::io::Error::other("an earlier flush failed: what is durable is in doubt"),
        })
    }

    /// Writes the header that is not current; it becomes current. Durable when this returns.
    pub(crate) fn update_header(&mut self, log_guid: Guid) -> Result<(), DeviceError> {
        self.write_header(log_guid)?;
        self.live().file.flush()
    }

    fn write_header(&mut self, log_guid: Guid) -> Result<(), DeviceError> {
        self.header.sequence = self.header.sequence.wrapping_add(1);
        self.header.log_guid = log_guid;
        self.slot = 1 - self.slot;
        let bytes = self.header.bytes();
        let offset = HEADERS[self.slot];
        self.live().file.write_at(offset, &bytes)
    }

    /// Before the first change of a session: new ids in both headers (2.2.2.1).
    fn begin(&mut self) -> Result<(), DeviceError> {
        self.check_alive()?;
        let Some(session) = self.session else { return Ok(()) };
        self.header.file_write_guid = session.file_write;
        self.header.data_write_guid = session.data_write;
        self.update_header([0; 16])?;
        self.update_header([0; 16])?;
        self.session = None;
        Ok(())
    }

    /// Changes `bytes` of a structure; they reach the file with the next commit.
    fn change(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let page = at / LOG_SECTOR * LOG_SECTOR;
            let (part, after) = rest.split_at(((page + LOG_SECTOR - at) as usize).min(rest.len()));
            if !self.mapping.file.dirty.contains_key(&page) {
                let mut held = vec![0; LOG_SECTOR as usize];
                self.mapping.file.read_at(page, &mut held)?;
                self.mapping.file.dirty.insert(page, held.into());
            }
            if let Some(held) = self.mapping.file.dirty.get_mut(&page) {
                let within = (at - page) as usize;
                held[within..within + part.len()].copy_from_slice(part);
            }
            self.mapping.changed(at, part);
            at += part.len() as u64;
            rest = after;
        }
        Ok(())
    }

    fn set_payload_entry(&mut self, block: u64, state: BlockState, offset: u64) -> Result<(), DeviceError> {
        let at = self.mapping.entry_offset(self.geometry().payload_entry(block));
        self.change(at, &Entry { state, offset }.raw().to_le_bytes())
    }

    /// Makes sure that one more change of a block fits into the log.
    fn make_room(&mut self) -> Result<(), DeviceError> {
        let limit = MAX_DIRTY_PAGES.min(log::pages_that_fit(self.header.log_length));
        if self.mapping.file.dirty.len() + PAGES_PER_CHANGE > limit || self.freed.len() >= MAX_FREE {
            self.commit()?;
        }
        Ok(())
    }

    /// A place of `length` zero bytes that nobody uses.
    fn allocate(&mut self, length: u64) -> Result<u64, DeviceError> {
        let block = self.geometry().block;
        if length == block
            && let Some(offset) = self.free.pop()
        {
            let needed = self.live().length.max(offset + block);
            self.live().set_length(needed)?;
            return Ok(offset);
        }
        let offset = self.end;
        let end = offset + length;
        if end > MAX_FILE {
            return Err(DeviceError::OutOfBounds { offset, length, size: MAX_FILE });
        }
        // What lies after the last structure is left over from before a crash: cut off, so that growth gives zeros.
        let cut = self.live().length.min(offset);
        self.live().set_length(cut)?;
        self.live().set_length(end)?;
        self.end = end;
        Ok(offset)
    }

    /// Sets or clears the bits of the sectors `within` of a block.
    fn set_bits(&mut self, bitmap: u64, within: ByteRange, here: bool) -> Result<(), DeviceError> {
        let sector = self.geometry().sector;
        let (first, last) = (within.start / sector, within.end.div_ceil(sector));
        let (from, to) = (first / 8, last.div_ceil(8));
        let mut bytes = vec![0; (to - from) as usize];
        self.mapping.file.read_at(bitmap + from, &mut bytes)?;
        for index in first..last {
            let byte = &mut bytes[(index / 8 - from) as usize];
            let bit = 1u8 << (index % 8);
            *byte = if here { *byte | bit } else { *byte & !bit };
        }
        self.change(bitmap + from, &bytes)
    }

    /// The bitmap of `block`, all clear; its bitmap block is made if there is none.
    fn fresh_bitmap(&mut self, block: u64) -> Result<u64, DeviceError> {
        let geometry = self.geometry();
        match self.mapping.bitmap_block(block)? {
            Some(start) => {
                // Bits of a block that was not partially present are left over and mean nothing.
                let bitmap = start + geometry.bitmap_offset(block);
                self.set_bits(bitmap, ByteRange { start: 0, end: geometry.block }, false)?;
                Ok(bitmap)
            }
            None => {
                let start = self.allocate(MIB)?;
                let at = self.mapping.entry_offset(geometry.bitmap_entry(block));
                let entry = Entry { state: BlockState::FullyPresent, offset: start };
                self.change(at, &entry.raw().to_le_bytes())?;
                Ok(start + geometry.bitmap_offset(block))
            }
        }
    }

    /// `bytes` at `within` of `block`, widened to whole sectors with what the disk holds there.
    fn whole_sectors(&self, block: u64, within: u64, bytes: &[u8]) -> Result<(u64, Vec<u8>), DeviceError> {
        let geometry = self.geometry();
        let end = within + bytes.len() as u64;
        let start = within / geometry.sector * geometry.sector;
        let mut wide = vec![0; (end.next_multiple_of(geometry.sector) - start) as usize];
        if wide.len() != bytes.len() {
            self.mapping.read_at(block * geometry.block + start, &mut wide)?;
        }
        let at = (within - start) as usize;
        wide[at..at + bytes.len()].copy_from_slice(bytes);
        Ok((start, wide))
    }

    fn parent_is_zero(&self, at: u64, length: u64) -> Result<bool, DeviceError> {
        match &self.mapping.parent {
            None => Ok(true),
            Some(parent) => Ok(parent.next_allocated(at)?.is_none_or(|next| next.start >= at + length)),
        }
    }

    /// Writes a part of one block.
    fn write_block(&mut self, block: u64, within: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.make_room()?;
        let geometry = self.geometry();
        let whole = bytes.len() as u64 == geometry.used_bytes(block);
        match self.mapping.place(block)? {
            Place::Here(payload) => self.live().file.write_at(payload + within, bytes),
            Place::Zeros if all_zero(bytes) => Ok(()),
            Place::Parent
                if all_zero(bytes)
                    && self.parent_is_zero(block * geometry.block + within, bytes.len() as u64)? =>
            {
                Ok(())
            }
            place @ (Place::Zeros | Place::Parent) if whole || place == Place::Zeros => {
                let payload = self.allocate(geometry.block)?;
                self.live().file.write_at(payload + within, bytes)?;
                self.set_payload_entry(block, BlockState::FullyPresent, payload)
            }
            Place::Zeros | Place::Parent => {
                let (start, wide) = self.whole_sectors(block, within, bytes)?;
                let payload = self.allocate(geometry.block)?;
                self.live().file.write_at(payload + start, &wide)?;
                let bitmap = self.fresh_bitmap(block)?;
                self.set_bits(bitmap, ByteRange { start, end: start + wide.len() as u64 }, true)?;
                self.set_payload_entry(block, BlockState::PartiallyPresent, payload)
            }
            Place::Mixed { payload, bitmap } => {
                let (start, wide) = self.whole_sectors(block, within, bytes)?;
                self.live().file.write_at(payload + start, &wide)?;
                self.set_bits(bitmap, ByteRange { start, end: start + wide.len() as u64 }, true)
            }
        }
    }

    /// Makes a part of one block read as zeros.
    fn zero_block(&mut self, block: u64, within: u64, length: u64, fixed: bool) -> Result<(), DeviceError> {
        self.make_room()?;
        let geometry = self.geometry();
        let place = self.mapping.place(block)?;
        if let Place::Here(payload) = place
            && (fixed || length != geometry.used_bytes(block))
        {
            let start = payload + within;
            return self.live().file.punch(ByteRange { start, end: start + length });
        }
        let state = self.mapping.payload_entry(block)?.state;
        match place {
            // Other programs may show old bytes for these two: from now on it is zeros for all.
            Place::Zeros if matches!(state, BlockState::Undefined | BlockState::Unmapped) => {
                self.set_payload_entry(block, BlockState::Zero, 0)
            }
            Place::Zeros => Ok(()),
            Place::Here(payload) | Place::Mixed { payload, .. } if length == geometry.used_bytes(block) => {
                self.set_payload_entry(block, BlockState::Zero, 0)?;
                self.freed.push(payload);
                Ok(())
            }
            Place::Parent if self.parent_is_zero(block * geometry.block + within, length)? => Ok(()),
            Place::Parent if length == geometry.used_bytes(block) => {
                self.set_payload_entry(block, BlockState::Zero, 0)
            }
            Place::Here(_) | Place::Parent | Place::Mixed { .. } => {
                let zeros = vec![0; length.min(MIB) as usize];
                let (mut at, end) = (within, within + length);
                while at < end {
                    let part = (end - at).min(MIB);
                    self.write_block(block, at, &zeros[..part as usize])?;
                    at += part;
                }
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        self.check_alive()?;
        self.commit()
    }

    /// Makes everything so far durable and visible. A failure is final.
    fn commit(&mut self) -> Result<(), DeviceError> {
        let done = self.commit_steps();
        self.failed |= done.is_err();
        done
    }

    fn commit_steps(&mut self) -> Result<(), DeviceError> {
        if !self.mapping.file.dirty.is_empty() {
            // The log states the length of the file, in MiB.
            let length = self.live().length.next_multiple_of(MIB);
            self.live().set_length(length)?;
        }
        let file = self.live().file.clone();
        file.flush()?;
        if self.mapping.file.dirty.is_empty() {
            return Ok(());
        }
        let guid = derived(&self.header.file_write_guid, self.header.sequence, "log");
        let pages = self.mapping.file.dirty.iter().map(|(&at, page)| (at, &page[..]));
        file.write_at(self.header.log_offset, &log::entry_bytes(&guid, self.mapping.file.length, pages))?;
        file.flush()?;
        self.update_header(guid)?;
        for (&at, page) in &self.mapping.file.dirty {
            file.write_at(at, page)?;
        }
        file.flush()?;
        self.mapping.file.dirty.clear();
        self.update_header([0; 16])?;
        // So that no header names a log any more. The next commit begins with a flush, before it touches the log.
        self.write_header([0; 16])?;
        for offset in std::mem::take(&mut self.freed) {
            let end = (offset + self.geometry().block).min(self.live().length);
            file.punch(ByteRange { start: offset, end })?;
            if self.free.len() < MAX_FREE {
                self.free.push(offset);
            }
        }
        Ok(())
    }
}

/// The parts of `range` that lie in one block each: block, first byte within it, bytes.
fn by_block(range: ByteRange, block: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let (index, within) = (at / block, at % block);
        let length = (block - within).min(range.end.checked_sub(at)?);
        at += length;
        (length > 0).then_some((index, within, length))
    })
}

impl BlockDevice for Writer {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.info.logical_sector_size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.state().mapping.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.state().mapping.next_allocated(from)
    }
}

impl WritableDevice for Writer {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.info.size)?;
        if buf.is_empty() {
            return Ok(());
        }
        let mut state = self.state();
        state.begin()?;
        let mut rest = buf;
        let range = ByteRange { start: offset, end: offset + buf.len() as u64 };
        for (block, within, length) in by_block(range, self.info.block_size.into()) {
            let (part, after) = rest.split_at(length as usize);
            state.write_block(block, within, part)?;
            rest = after;
        }
        Ok(())
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        DeviceError::check_bounds(range.start, range.len(), self.info.size)?;
        if range.is_empty() {
            return Ok(());
        }
        let mut state = self.state();
        state.begin()?;
        for (block, within, length) in by_block(range, self.info.block_size.into()) {
            state.zero_block(block, within, length, self.info.kind == Kind::Fixed)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.state().flush()
    }
}

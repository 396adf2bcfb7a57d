//! Writing a VHD.
//!
//! Layout of a new dynamic disk: copy of the footer, header, parent locators, block allocation table, blocks, footer.
//! Blocks begin so that their sectors lie on multiples of 4096 bytes of the file: a hole of the disk is then a hole
//! of the file.
//!
//! Order of writes, so that a crash at any moment leaves an image that holds what was flushed:
//! 1. A new block goes to the end of the blocks. First the footer is written behind it, which grows the file; then
//!    the bitmap and the data. No table entry refers to it yet.
//! 2. Sectors that a bitmap does not show yet are written in place; the new bitmap stays in memory.
//! 3. `flush` makes all of that durable, *then* writes bitmaps and table entries, then makes those durable.
//!
//! The footer at the end can be torn by a crash in step 1 (the file may have grown, and the footer not have arrived).
//! Its copy at the front is written once, at creation, and never again: it is what the specification provides for
//! this case, and QEMU and our reader open by it. `open` puts the footer at the end back in its place, and cuts off
//! blocks that no table entry refers to.
//!
//! Footer fields: creator `win `, for which Windows and every version of QEMU take the exact current size (QEMU's own
//! `qem2` says the same, but only to QEMU). Geometry as the appendix calculates it, for BIOS use only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError, GrowableFile, WritableDevice};

use super::blocks::{self, Blocks, Source, Tables, UNUSED, bitmap_bytes};
use super::footer::{self, Footer, Geometry};
use super::header::{self, Header, Locator};
use super::reader::{self, read_parent};
use super::{FooterPlace, Info, Kind, MAX_SIZE, SECTOR, SizeRule, damaged, unsupported};
use crate::{ImageError, ImageFormat, Parents};

/// Bytes of the largest block allocation table that the writer opens: that of the largest disk in blocks of 512 KiB,
/// the smallest that Windows makes.
pub const MAX_WRITER_TABLE: u64 = 16 << 20;

/// Largest block that the writer opens. Windows makes 512 KiB and 2 MiB; larger ones were never seen, and their
/// bitmaps would take memory.
const MAX_WRITER_BLOCK: u64 = 64 << 20;

/// Bytes of changed bitmaps held between flushes; more make the writer flush by itself.
const MAX_CHANGED_BITMAPS: usize = 4 << 20;

const DEFAULT_BLOCK: u32 = 2 << 20;
const ALIGNMENT: u64 = 4096;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the disk: whole sectors of 512.
    pub size: u64,
    /// [`Kind::Fixed`] or [`Kind::Dynamic`]; a differencing disk is made by [`Writer::create_child`].
    pub kind: Kind,
    /// Bytes of a block; 2 MiB is what Windows takes.
    pub block_size: u32,
    /// "Unique Id".
    pub unique_id: [u8; 16],
    /// "Time Stamp": seconds since 2000-01-01 UTC.
    pub time_stamp: u32,
}

impl CreateOptions {
    /// A dynamic disk with blocks of 2 MiB.
    pub fn dynamic(size: u64, unique_id: [u8; 16]) -> CreateOptions {
        CreateOptions { size, kind: Kind::Dynamic, block_size: DEFAULT_BLOCK, unique_id, time_stamp: 0 }
    }

    /// A fixed disk.
    pub fn fixed(size: u64, unique_id: [u8; 16]) -> CreateOptions {
        CreateOptions { kind: Kind::Fixed, ..CreateOptions::dynamic(size, unique_id) }
    }
}

/// The parent of a new differencing disk.
#[derive(Clone)]
pub struct ParentLink {
    /// The disk of the parent.
    pub disk: Arc<dyn BlockDevice>,
    /// "Unique Id" of its footer.
    pub unique_id: [u8; 16],
    /// Modification time of its file, seconds since 2000-01-01 UTC.
    pub time_stamp: u32,
    /// Its path relative to the child, as Windows writes it (`.\base.vhd`).
    pub relative_name: String,
    /// Its absolute path.
    pub absolute_name: Option<String>,
}

/// Fills a VHD file.
pub struct Writer {
    file: Arc<dyn GrowableFile>,
    info: Info,
    parent: Option<Arc<dyn BlockDevice>>,
    /// `None` for a fixed disk.
    state: Option<Mutex<State>>,
    /// A flush failed: nothing later may be believed (INV-5).
    in_doubt: AtomicBool,
}

/// The tables of a dynamic or differencing disk as they will be after the next flush.
struct State {
    file: Arc<dyn GrowableFile>,
    tables: Tables,
    has_parent: bool,
    footer: [u8; footer::BYTES],
    table: Vec<u32>,
    /// Blocks of which every sector is present: nothing is to be looked up for them.
    full: Vec<bool>,
    /// First byte behind the last block, where the footer lies.
    end: u64,
    changed_entries: BTreeSet<u64>,
    changed_bitmaps: BTreeMap<u64, Vec<u8>>,
}

/// A growable file seen as it is now.
struct View<'a> {
    file: &'a dyn GrowableFile,
    size: u64,
}

impl BlockDevice for View<'_> {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.file.read_at(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        Ok((from < self.size).then_some(ByteRange { start: from, end: self.size }))
    }
}

fn cannot_hold(reason: String) -> ImageError {
    ImageError::CannotHold { format: ImageFormat::Vhd, reason }
}

impl Writer {
    /// Makes a fixed or dynamic image in an empty file; durable when it returns.
    pub fn create(file: Arc<dyn GrowableFile>, options: &CreateOptions) -> Result<Writer, ImageError> {
        match options.kind {
            Kind::Differencing => Err(cannot_hold("a differencing disk needs a parent".to_owned())),
            Kind::Fixed | Kind::Dynamic => Writer::create_any(file, options, None),
        }
    }

    /// Makes a differencing image above `parent` in an empty file. `options.kind` is not looked at.
    pub fn create_child(
        file: Arc<dyn GrowableFile>,
        options: &CreateOptions,
        parent: ParentLink,
    ) -> Result<Writer, ImageError> {
        let options = CreateOptions { kind: Kind::Differencing, ..options.clone() };
        Writer::create_any(file, &options, Some(parent))
    }

    fn create_any(
        file: Arc<dyn GrowableFile>,
        options: &CreateOptions,
        parent: Option<ParentLink>,
    ) -> Result<Writer, ImageError> {
        let CreateOptions { size, kind, block_size, unique_id, time_stamp } = *options;
        if size == 0 || size % SECTOR != 0 || size > MAX_SIZE {
            return Err(cannot_hold(format!(
                "{size} bytes; a VHD has whole sectors of {SECTOR} bytes, at most {MAX_SIZE} bytes"
            )));
        }
        let valid_block = block_size.is_power_of_two()
            && (SECTOR..=MAX_WRITER_BLOCK).contains(&u64::from(block_size))
            && size.div_ceil(u64::from(block_size)) * 4 <= MAX_WRITER_TABLE;
        if kind != Kind::Fixed && !valid_block {
            return Err(cannot_hold(format!(
                "blocks of {block_size} bytes; expected a power of two up to {MAX_WRITER_BLOCK} that makes a table of \
                 at most {MAX_WRITER_TABLE} bytes"
            )));
        }
        let length = file.len()?;
        if length != 0 {
            return Err(cannot_hold(format!("the new file is not empty but has {length} bytes")));
        }
        let footer = Footer {
            features: 2,
            version: 0x0001_0000,
            data_offset: if kind == Kind::Fixed { u64::MAX } else { SECTOR },
            time_stamp,
            creator_application: *b"win ",
            creator_version: 0x000A_0000,
            creator_host_os: *b"Wi2k",
            original_size: size,
            current_size: size,
            geometry: Geometry::for_sectors(size / SECTOR),
            disk_type: Footer::disk_type_of(kind),
            unique_id,
            saved_state: false,
        };
        let mut info = Info {
            kind,
            size,
            size_rule: SizeRule::CurrentSize,
            current_size: size,
            original_size: size,
            geometry: footer.geometry,
            block_size: None,
            unique_id,
            parent_unique_id: None,
            parent_time_stamp: None,
            parent_names: Vec::new(),
            creator_application: footer.creator_application,
            creator_version: footer.creator_version,
            creator_host_os: footer.creator_host_os,
            time_stamp,
            saved_state: false,
            footer: FooterPlace::End,
        };
        let footer = footer.encode();
        if kind == Kind::Fixed {
            file.set_len(size + SECTOR)?;
            file.write_at(size, &footer)?;
            file.flush()?;
            return Ok(Writer { file, info, parent: None, state: None, in_doubt: AtomicBool::new(false) });
        }

        info.block_size = Some(block_size);
        let blocks = size.div_ceil(u64::from(block_size));
        let mut header = Header {
            table_offset: 0,
            max_table_entries: blocks as u32,
            block_size,
            parent_unique_id: [0; 16],
            parent_time_stamp: 0,
            parent_unicode_name: String::new(),
            locators: Vec::new(),
        };
        let mut at = SECTOR + header::BYTES as u64;
        if let Some(link) = &parent {
            let absolute = link.absolute_name.as_deref();
            let name = absolute.unwrap_or(&link.relative_name);
            header.parent_unique_id = link.unique_id;
            header.parent_time_stamp = link.time_stamp;
            header.parent_unicode_name = name.rsplit(['\\', '/']).next().unwrap_or(name).to_owned();
            info.parent_unique_id = Some(link.unique_id);
            info.parent_time_stamp = Some(link.time_stamp);
            let names = [(*b"W2ru", Some(link.relative_name.as_str())), (*b"W2ku", absolute)];
            for (platform, name) in names.into_iter().filter_map(|(platform, name)| Some((platform, name?))) {
                let text: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
                file.write_at(at, &text)?;
                header.locators.push(Locator { platform, length: text.len() as u32, offset: at });
                info.parent_names.push(name.to_owned());
                at = (at + text.len() as u64).next_multiple_of(SECTOR);
            }
        }
        header.table_offset = at;
        let table_bytes = (blocks * 4).next_multiple_of(SECTOR);
        let end = at + table_bytes;
        let tables = Tables::new(&header, SECTOR, size, end + SECTOR)?;
        let ones = vec![0xFFu8; table_bytes.min(64 << 10) as usize];
        while at < end {
            let piece = (end - at).min(ones.len() as u64);
            file.write_at(at, &ones[..piece as usize])?;
            at += piece;
        }
        file.write_at(end, &footer)?;
        file.write_at(SECTOR, &header.encode())?;
        file.write_at(0, &footer)?;
        file.flush()?;
        let state = State {
            file: file.clone(),
            has_parent: parent.is_some(),
            footer,
            table: vec![UNUSED; blocks as usize],
            full: vec![false; blocks as usize],
            end,
            changed_entries: BTreeSet::new(),
            changed_bitmaps: BTreeMap::new(),
            tables,
        };
        Ok(Writer {
            file,
            info,
            parent: parent.map(|link| link.disk),
            state: Some(Mutex::new(state)),
            in_doubt: AtomicBool::new(false),
        })
    }

    /// Opens an image to write on, after a crash as well: puts a missing footer back and cuts off blocks that were
    /// never entered into the table.
    ///
    /// Refuses disks of XenServer: they carry a second bitmap of blocks that would become wrong.
    pub fn open(file: Arc<dyn GrowableFile>, parents: &dyn Parents) -> Result<Writer, ImageError> {
        let file_size = file.len()?;
        let view = View { file: file.as_ref(), size: file_size };
        let opened = reader::open(&view, parents, 0)?;
        let parent = opened.parent.map(|parent| parent as Arc<dyn BlockDevice>);
        let Some((header, tables)) = opened.sparse else {
            return Ok(Writer {
                file,
                info: opened.info,
                parent,
                state: None,
                in_doubt: AtomicBool::new(false),
            });
        };
        if opened.info.creator_application == *b"tap\0" {
            return Err(unsupported("writing to a disk of XenServer, which has a batmap"));
        }
        let table_bytes = tables.blocks * 4;
        if table_bytes > MAX_WRITER_TABLE || tables.block_size > MAX_WRITER_BLOCK {
            return Err(unsupported(format!(
                "writing to a disk with blocks of {} bytes and a table of {table_bytes} bytes",
                tables.block_size
            )));
        }
        let mut bytes = vec![0u8; table_bytes as usize];
        file.read_at(tables.table_offset, &mut bytes)?;
        let table: Vec<u32> = bytes.chunks_exact(4).map(|entry| super::be_u32(entry, 0)).collect();
        drop(bytes);

        let mut end = (tables.table_offset + u64::from(header.max_table_entries) * 4)
            .min(file_size)
            .max(opened.found.footer.data_offset + header::BYTES as u64);
        for locator in &header.locators {
            end = end.max(locator.offset.saturating_add(u64::from(locator.length)).min(file_size));
        }
        let whole = tables.bitmap_bytes + tables.block_size;
        let mut starts = Vec::new();
        for (block, &entry) in (0u64..).zip(&table) {
            if let Some(start) = tables.place(block, entry, file_size)? {
                starts.push(start);
                end = end.max(start + whole);
            }
        }
        starts.sort_unstable();
        if let Some(pair) = starts.windows(2).find(|pair| pair[1] - pair[0] < whole) {
            return Err(damaged(
                "Block Allocation Table",
                tables.table_offset,
                format!("two blocks overlap: they begin at bytes {} and {}", pair[0], pair[1]),
            ));
        }
        let end = end.next_multiple_of(SECTOR);

        // Never touch the only good footer: the other one is made durable first.
        let footer = opened.found.footer.encode();
        let settled = opened.found.place == FooterPlace::End && file_size == end + SECTOR;
        if !settled {
            if opened.found.place == FooterPlace::End && !opened.found.front_equal {
                file.write_at(0, &footer)?;
                file.flush()?;
            }
            file.write_at(end, &footer)?;
            file.flush()?;
            file.set_len(end + SECTOR)?;
            file.flush()?;
        } else if !opened.found.front_equal {
            file.write_at(0, &footer)?;
            file.flush()?;
        }

        let state = State {
            file: file.clone(),
            has_parent: parent.is_some(),
            footer,
            full: vec![false; table.len()],
            table,
            end,
            changed_entries: BTreeSet::new(),
            changed_bitmaps: BTreeMap::new(),
            tables,
        };
        Ok(Writer {
            file,
            info: opened.info,
            parent,
            state: Some(Mutex::new(state)),
            in_doubt: AtomicBool::new(false),
        })
    }

    /// What the image says about itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    fn believed(&self) -> Result<(), DeviceError> {
        if self.in_doubt.load(Ordering::Acquire) {
            return Err(DeviceError::Io {
                object: "vhd image".to_owned(),
                action: "flush",
                offset: 0,
                length: 0,
                source: std::io::Error::other("an earlier flush failed: the whole image is in doubt"),
            });
        }
        Ok(())
    }

    fn flush_state(&self, state: &mut State) -> Result<(), DeviceError> {
        self.believed()?;
        let flushed = state.flush();
        if flushed.is_err() {
            self.in_doubt.store(true, Ordering::Release);
        }
        flushed
    }

    /// Writes a part of one block.
    fn write_in_block(&self, state: &Mutex<State>, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        let mut held = lock(state);
        let (block, start) = held.allocate_for(offset)?;
        let position = start + held.tables.bitmap_bytes + offset % held.tables.block_size;
        if held.is_full(block, start)? {
            drop(held);
            return self.file.write_at(position, buf);
        }
        // Whole sectors only: what a sector lacks comes from where it reads today.
        let first = offset / SECTOR * SECTOR;
        let end = (offset + buf.len() as u64).next_multiple_of(SECTOR);
        if first == offset && end == offset + buf.len() as u64 {
            self.file.write_at(position, buf)?;
        } else {
            let mut whole = vec![0u8; (end - first) as usize];
            self.read_locked(&held, first, &mut whole[..SECTOR as usize])?;
            let last = whole.len() - SECTOR as usize;
            self.read_locked(&held, end - SECTOR, &mut whole[last..])?;
            let lead = (offset - first) as usize;
            whole[lead..lead + buf.len()].copy_from_slice(buf);
            self.file.write_at(position - (offset - first), &whole)?;
        }
        self.show(&mut held, block, start, first, end)
    }

    /// Notes sectors as present, and flushes when too much is held that only a flush can write.
    fn show(
        &self,
        state: &mut State,
        block: u64,
        start: u64,
        first: u64,
        end: u64,
    ) -> Result<(), DeviceError> {
        state.show(block, start, first, end)?;
        if state.changed_bitmaps.len() * state.tables.bitmap_bytes as usize > MAX_CHANGED_BITMAPS {
            self.flush_state(state)?;
        }
        Ok(())
    }

    /// Makes whole sectors of one block read as zeros.
    fn zero_in_block(&self, state: &Mutex<State>, offset: u64, end: u64) -> Result<(), DeviceError> {
        let mut held = lock(state);
        let block = offset / held.tables.block_size;
        let present = held.start_of(block)?;
        if present.is_none() {
            let below = match &self.parent {
                Some(parent) => parent.next_allocated(offset)?.is_some_and(|range| range.start < end),
                None => false,
            };
            if !below {
                return Ok(());
            }
        }
        let (block, start) = held.allocate_for(offset)?;
        let position = start + held.tables.bitmap_bytes + offset % held.tables.block_size;
        if present.is_some() {
            self.file.punch(ByteRange { start: position, end: position + (end - offset) })?;
        }
        if held.has_parent { self.show(&mut held, block, start, offset, end) } else { Ok(()) }
    }

    fn read_locked(&self, state: &State, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let (source, run_end) = blocks::run(state, at, end)?;
            let (part, after) = rest.split_at_mut((run_end - at) as usize);
            self.read_source(source, at, part)?;
            rest = after;
            at = run_end;
        }
        Ok(())
    }

    fn read_source(&self, source: Source, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        match (source, &self.parent) {
            (Source::File(position), _) => self.file.read_at(position, buf),
            (Source::Parent, Some(parent)) => read_parent(parent.as_ref(), offset, buf),
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Blocks for State {
    fn tables(&self) -> &Tables {
        &self.tables
    }
    fn has_parent(&self) -> bool {
        self.has_parent
    }
    fn start_of(&self, block: u64) -> Result<Option<u64>, DeviceError> {
        let entry = self.table.get(block as usize).copied().unwrap_or(UNUSED);
        // All entries were checked when the image was opened.
        Ok((entry != UNUSED).then_some(u64::from(entry) * SECTOR))
    }
    fn bitmap(&self, block: u64, start: u64, at: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        if self.full.get(block as usize).copied().unwrap_or(false) {
            buf.fill(0xFF);
            return Ok(());
        }
        match self
            .changed_bitmaps
            .get(&block)
            .and_then(|bytes| bytes.get(at as usize..at as usize + buf.len()))
        {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => self.file.read_at(start + at, buf)?,
        }
        Ok(())
    }
}

impl State {
    /// The block of a byte and where it begins, which it does from now on.
    fn allocate_for(&mut self, offset: u64) -> Result<(u64, u64), DeviceError> {
        let block = offset / self.tables.block_size;
        if let Some(start) = self.start_of(block)? {
            return Ok((block, start));
        }
        let bitmap = bitmap_bytes(self.tables.block_size);
        let start = (self.end + bitmap).next_multiple_of(ALIGNMENT) - bitmap;
        let end = start + bitmap + self.tables.block_size;
        let entry = u32::try_from(start / SECTOR).ok().filter(|&entry| entry != UNUSED);
        let Some((entry, known)) = entry.zip(self.table.get_mut(block as usize)) else {
            return Err(DeviceError::Damaged {
                object: "vhd image".to_owned(),
                offset,
                length: self.tables.block_size,
                reason: format!("no room for a block: the file has {} bytes", self.end),
            });
        };
        self.file.write_at(end, &self.footer)?;
        let present = if self.has_parent { 0 } else { 0xFF };
        self.file.write_at(start, &vec![present; bitmap as usize])?;
        *known = entry;
        if let Some(full) = self.full.get_mut(block as usize) {
            *full = !self.has_parent;
        }
        self.end = end;
        self.changed_entries.insert(block);
        Ok((block, start))
    }

    /// The bitmap of a block as it will be after the next flush.
    fn whole_bitmap(&self, block: u64, start: u64) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0u8; self.tables.bitmap_bytes as usize];
        self.bitmap(block, start, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Whether every sector of the block is present.
    fn is_full(&mut self, block: u64, start: u64) -> Result<bool, DeviceError> {
        let known = self.full.get(block as usize).copied().unwrap_or(false);
        if known || self.changed_bitmaps.contains_key(&block) {
            return Ok(known);
        }
        let bitmap = self.whole_bitmap(block, start)?;
        Ok(self.note_full(block, &bitmap))
    }

    fn note_full(&mut self, block: u64, bitmap: &[u8]) -> bool {
        let sectors = (self.tables.used(block) / SECTOR) as usize;
        let (whole, rest) = (sectors / 8, sectors % 8);
        let full = bitmap.iter().take(whole).all(|&byte| byte == 0xFF)
            && (rest == 0 || bitmap.get(whole).is_some_and(|&byte| byte.leading_ones() as usize >= rest));
        if let Some(known) = self.full.get_mut(block as usize) {
            *known = full;
        }
        full
    }

    /// Notes that the sectors from `first` to `end` of the disk, all in `block`, are present.
    fn show(&mut self, block: u64, start: u64, first: u64, end: u64) -> Result<(), DeviceError> {
        if self.full.get(block as usize).copied().unwrap_or(false) {
            return Ok(());
        }
        let mut bitmap = match self.changed_bitmaps.remove(&block) {
            Some(bitmap) => bitmap,
            None => self.whole_bitmap(block, start)?,
        };
        let base = block * self.tables.block_size;
        for sector in (first - base) / SECTOR..(end - base) / SECTOR {
            if let Some(byte) = bitmap.get_mut((sector / 8) as usize) {
                *byte |= 0x80 >> (sector % 8);
            }
        }
        self.note_full(block, &bitmap);
        self.changed_bitmaps.insert(block, bitmap);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        self.file.flush()?;
        if self.changed_bitmaps.is_empty() && self.changed_entries.is_empty() {
            return Ok(());
        }
        for (&block, bitmap) in &self.changed_bitmaps {
            if let Some(start) = self.start_of(block)? {
                self.file.write_at(start, bitmap)?;
            }
        }
        // Neighbouring entries in one write.
        let mut run: Option<(u64, Vec<u8>)> = None;
        for &block in &self.changed_entries {
            let entry = self.table.get(block as usize).copied().unwrap_or(UNUSED).to_be_bytes();
            match &mut run {
                Some((first, bytes)) if *first + bytes.len() as u64 / 4 == block => bytes.extend(entry),
                _ => {
                    if let Some((first, bytes)) = run.replace((block, entry.to_vec())) {
                        self.file.write_at(self.tables.table_offset + first * 4, &bytes)?;
                    }
                }
            }
        }
        if let Some((first, bytes)) = run {
            self.file.write_at(self.tables.table_offset + first * 4, &bytes)?;
        }
        self.file.flush()?;
        self.changed_bitmaps.clear();
        self.changed_entries.clear();
        Ok(())
    }
}

impl BlockDevice for Writer {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn logical_sector_size(&self) -> u32 {
        SECTOR as u32
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.info.size)?;
        let Some(state) = &self.state else { return self.file.read_at(offset, buf) };
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            // Blocks never move, so the data can be read after the lock is given back.
            let (source, run_end) = blocks::run(&*lock(state), at, end)?;
            let (part, after) = rest.split_at_mut((run_end - at) as usize);
            self.read_source(source, at, part)?;
            rest = after;
            at = run_end;
        }
        Ok(())
    }

    /// As fine as tables and bitmaps: holes of a file being written are not asked for.
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let size = self.info.size;
        if from >= size {
            return Ok(None);
        }
        let Some(state) = &self.state else { return Ok(Some(ByteRange { start: from, end: size })) };
        let mut at = from;
        while at < size {
            let (source, end) = blocks::run(&*lock(state), at, size)?;
            let found = match (source, &self.parent) {
                (Source::File(_), _) => Some(ByteRange { start: at, end }),
                (Source::Parent, Some(parent)) => parent
                    .next_allocated(at)?
                    .map(|range| ByteRange { start: range.start.max(at), end: range.end.min(end) })
                    .filter(|range| range.start < range.end),
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

impl WritableDevice for Writer {
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DeviceError> {
        DeviceError::check_bounds(offset, buf.len() as u64, self.info.size)?;
        self.believed()?;
        let (Some(state), Some(block_size)) = (&self.state, self.info.block_size) else {
            return self.file.write_at(offset, buf);
        };
        let block_size = u64::from(block_size);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let length = (block_size - at % block_size).min(rest.len() as u64);
            let (part, after) = rest.split_at(length as usize);
            self.write_in_block(state, at, part)?;
            rest = after;
            at += length;
        }
        Ok(())
    }

    fn write_zeros(&self, range: ByteRange) -> Result<(), DeviceError> {
        DeviceError::check_bounds(range.start, range.len(), self.info.size)?;
        self.believed()?;
        if range.is_empty() {
            return Ok(());
        }
        let (Some(state), Some(block_size)) = (&self.state, self.info.block_size) else {
            return self.file.punch(range);
        };
        let block_size = u64::from(block_size);
        let mut at = range.start;
        while at < range.end {
            let end = ((at / block_size + 1) * block_size).min(range.end);
            let (first, last) = (at.next_multiple_of(SECTOR), end / SECTOR * SECTOR);
            let zeros = [0u8; SECTOR as usize];
            if first < last {
                self.write_in_block_unless_zero(state, at, &zeros[..(first - at) as usize])?;
                self.zero_in_block(state, first, last)?;
                self.write_in_block_unless_zero(state, last, &zeros[..(end - last) as usize])?;
            } else {
                // Inside one sector, or across one border.
                let middle = first.min(end);
                self.write_in_block_unless_zero(state, at, &zeros[..(middle - at) as usize])?;
                self.write_in_block_unless_zero(state, middle, &zeros[..(end - middle) as usize])?;
            }
            at = end;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.believed()?;
        match &self.state {
            Some(state) => self.flush_state(&mut lock(state)),
            None => {
                let flushed = self.file.flush();
                if flushed.is_err() {
                    self.in_doubt.store(true, Ordering::Release);
                }
                flushed
            }
        }
    }
}

impl Writer {
    /// Writes zeros over a part of one sector; costs nothing where it is zero already.
    fn write_in_block_unless_zero(
        &self,
        state: &Mutex<State>,
        offset: u64,
        zeros: &[u8],
    ) -> Result<(), DeviceError> {
        let mut there = [0u8; SECTOR as usize];
        let Some(there) = there.get_mut(..zeros.len()) else { return Ok(()) };
        self.read_at(offset, there)?;
        if there.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        self.write_in_block(state, offset, zeros)
    }
}

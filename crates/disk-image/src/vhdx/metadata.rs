//! Metadata region (2.6): a table of items, and the items this format knows.

use block_io::{BlockDevice, ByteRange};

use super::bytes::{guid_at, put, u16_at, u32_at};
use super::guid::{guid_text, known};
use super::parent_locator::ParentLocator;
use super::{Guid, Kind, MAX_BLOCK_SIZE, MAX_SIZE, MIB, MIN_BLOCK_SIZE, damaged, unsupported};
use crate::ImageError;

const TABLE_BYTES: u64 = 64 << 10;
const MAX_ENTRIES: u16 = 2047;
const MAX_USER_ENTRIES: usize = 1024;

const FILE_PARAMETERS: Guid =
    known(0xCAA1_6737, 0xFA36, 0x4D43, [0xB3, 0xB6, 0x33, 0xF0, 0xAA, 0x44, 0xE7, 0x6B]);
const DISK_SIZE: Guid = known(0x2FA5_4224, 0xCD1B, 0x4876, [0xB2, 0x11, 0x5D, 0xBE, 0xD8, 0x3B, 0xF4, 0xB8]);
const DISK_ID: Guid = known(0xBECA_12AB, 0xB2E6, 0x4523, [0x93, 0xEF, 0xC3, 0x09, 0xE0, 0x00, 0xC7, 0x46]);
const LOGICAL_SECTOR: Guid =
    known(0x8141_BF1D, 0xA96F, 0x4709, [0xBA, 0x47, 0xF2, 0x33, 0xA8, 0xFA, 0xAB, 0x5F]);
const PHYSICAL_SECTOR: Guid =
    known(0xCDA3_48C7, 0x445D, 0x4471, [0x9C, 0xC9, 0xE9, 0x88, 0x52, 0x51, 0xC5, 0x56]);
const PARENT_LOCATOR: Guid =
    known(0xA8D3_5F2D, 0xB30B, 0x454D, [0xAB, 0xF7, 0xD3, 0xD8, 0x48, 0x34, 0xAB, 0x0C]);

/// What the known items say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    pub(crate) block_size: u32,
    pub(crate) logical_sector_size: u32,
    pub(crate) physical_sector_size: u32,
    pub(crate) virtual_disk_id: Guid,
    pub(crate) parent: Option<ParentLocator>,
}

/// Entry of 32 bytes: item id, offset from the region u32, length u32, flags u32 (0 user, 1 virtual disk, 2 required).
struct Entry {
    id: Guid,
    range: ByteRange,
    user: bool,
}

struct Items<'a> {
    file: &'a dyn BlockDevice,
    region: ByteRange,
    entries: Vec<Entry>,
}

impl Items<'_> {
    fn read_table(file: &dyn BlockDevice, region: ByteRange) -> Result<Items<'_>, ImageError> {
        let wrong = |reason: String| damaged("metadata table", region.start, reason);
        if region.end > file.size() {
            let reason = format!("the region ends at {}, the file has {} bytes", region.end, file.size());
            return Err(wrong(reason));
        }
        let mut buf = vec![0; TABLE_BYTES as usize];
        file.read_at(region.start, &mut buf)?;
        if buf.get(..8) != Some(b"metadata") {
            return Err(wrong("the signature is not \"metadata\"".to_owned()));
        }
        let count = u16_at(&buf, 10);
        if count > MAX_ENTRIES {
            return Err(wrong(format!("{count} entries, at most {MAX_ENTRIES} fit")));
        }
        let mut entries: Vec<Entry> = Vec::new();
        for entry in buf.get(32..).unwrap_or_default().chunks_exact(32).take(count.into()) {
            let (id, flags) = (guid_at(entry, 0), u32_at(entry, 24));
            let (offset, length) = (u64::from(u32_at(entry, 16)), u64::from(u32_at(entry, 20)));
            let (user, required) = (flags & 1 == 1, flags & 4 == 4);
            let name = guid_text(&id);
            let in_region = offset >= TABLE_BYTES && offset + length <= region.len();
            if length > MIB || !(in_region || offset == 0 && length == 0) {
                let reason = format!(
                    "item {name} at {offset} with {length} bytes does not lie in the region of {} bytes",
                    region.len()
                );
                return Err(wrong(reason));
            }
            let is_known = !user
                && [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR]
                    .contains(&id);
            if required && !is_known {
                return Err(unsupported(format!("required metadata item {name}")));
            }
            entries.push(Entry { id, range: ByteRange { start: offset, end: offset + length }, user });
        }
        entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
        for pair in entries.windows(2) {
            if let [a, b] = pair
                && a.range.end > b.range.start
            {
                return Err(wrong(format!("items {} and {} overlap", guid_text(&a.id), guid_text(&b.id))));
            }
        }
        if entries.iter().filter(|entry| entry.user).count() > MAX_USER_ENTRIES {
            return Err(wrong(format!("more than {MAX_USER_ENTRIES} user items")));
        }
        Ok(Items { file, region, entries })
    }

    /// The bytes of a system item and where they are.
    fn find(&self, id: Guid) -> Result<Option<(Vec<u8>, u64)>, ImageError> {
        let mut found = self.entries.iter().filter(|entry| entry.id == id && !entry.user);
        let Some(entry) = found.next() else { return Ok(None) };
        if found.next().is_some() {
            let reason = format!("item {} is listed twice", guid_text(&id));
            return Err(damaged("metadata table", self.region.start, reason));
        }
        let offset = self.region.start + entry.range.start;
        let mut buf = vec![0; entry.range.len() as usize];
        self.file.read_at(offset, &mut buf)?;
        Ok(Some((buf, offset)))
    }

    fn fixed<const N: usize>(&self, id: Guid, name: &'static str) -> Result<([u8; N], u64), ImageError> {
        let Some((buf, offset)) = self.find(id)? else {
            let reason = format!("the required item {name} is missing");
            return Err(damaged("metadata table", self.region.start, reason));
        };
        match buf.first_chunk::<N>() {
            Some(bytes) => Ok((*bytes, offset)),
            None => Err(damaged(name, offset, format!("{} bytes, expected {N}", buf.len()))),
        }
    }

    fn sector_size(&self, id: Guid, name: &'static str) -> Result<u32, ImageError> {
        let (bytes, offset) = self.fixed(id, name)?;
        match u32::from_le_bytes(bytes) {
            size @ (512 | 4096) => Ok(size),
            size => Err(damaged(name, offset, format!("{size} bytes, expected 512 or 4096"))),
        }
    }
}

/// Reads the metadata region.
pub(crate) fn read(file: &dyn BlockDevice, region: ByteRange) -> Result<Metadata, ImageError> {
    let items = Items::read_table(file, region)?;
    let (parameters, offset) = items.fixed::<8>(FILE_PARAMETERS, "file parameters")?;
    let (block_size, flags) = (u32_at(&parameters, 0), u32_at(&parameters, 4));
    if !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) || !block_size.is_power_of_two() {
        let reason = format!("block size {block_size}, expected a power of two from 1 MiB to 256 MiB");
        return Err(damaged("file parameters", offset, reason));
    }
    let kind = match flags {
        0 => Kind::Dynamic,
        1 => Kind::Fixed,
        2 | 3 => Kind::Differencing,
        _ => return Err(unsupported(format!("flags {flags:#x} in the file parameters"))),
    };
    let logical_sector_size = items.sector_size(LOGICAL_SECTOR, "logical sector size")?;
    let physical_sector_size = items.sector_size(PHYSICAL_SECTOR, "physical sector size")?;
    let (size, offset) = items.fixed::<8>(DISK_SIZE, "virtual disk size")?;
    let size = u64::from_le_bytes(size);
    if size > MAX_SIZE || !size.is_multiple_of(logical_sector_size.into()) {
        let reason = format!("{size} bytes, expected a multiple of {logical_sector_size} up to 64 TiB");
        return Err(damaged("virtual disk size", offset, reason));
    }
    let (virtual_disk_id, _) = items.fixed::<16>(DISK_ID, "virtual disk ID")?;
    let parent = match (kind, items.find(PARENT_LOCATOR)?) {
        (Kind::Differencing, Some((buf, offset))) => Some(ParentLocator::parse(&buf, offset)?),
        (Kind::Differencing, None) => {
            let reason = "the image has a parent and no parent locator";
            return Err(damaged("metadata table", region.start, reason));
        }
        // Left over from a time when the image had a parent: it has none now.
        (_, _) => None,
    };
    Ok(Metadata {
        kind,
        size,
        block_size,
        logical_sector_size,
        physical_sector_size,
        virtual_disk_id,
        parent,
    })
}

impl Metadata {
    /// The region of a new image, up to the end of its last item. Fails if the parent locator is too long for it.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>, ImageError> {
        let (user_visible, file_only) = (0b110u32, 0b100u32);
        let flags: u32 = match self.kind {
            Kind::Dynamic => 0,
            Kind::Fixed => 1,
            Kind::Differencing => 2,
        };
        let parameters = [self.block_size.to_le_bytes(), flags.to_le_bytes()].concat();
        let mut items = vec![
            (FILE_PARAMETERS, file_only, parameters),
            (DISK_SIZE, user_visible, self.size.to_le_bytes().to_vec()),
            (DISK_ID, user_visible, self.virtual_disk_id.to_vec()),
            (LOGICAL_SECTOR, user_visible, self.logical_sector_size.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR, user_visible, self.physical_sector_size.to_le_bytes().to_vec()),
        ];
        if let Some(parent) = &self.parent {
            items.push((PARENT_LOCATOR, file_only, parent.bytes()?));
        }
        let mut buf = vec![0; TABLE_BYTES as usize];
        put(&mut buf, 0, b"metadata");
        put(&mut buf, 10, &(items.len() as u16).to_le_bytes());
        for (index, (id, flags, bytes)) in items.iter().enumerate() {
            let (at, offset) = (32 + index * 32, buf.len());
            put(&mut buf, at, id);
            put(&mut buf, at + 16, &(offset as u32).to_le_bytes());
            put(&mut buf, at + 20, &(bytes.len() as u32).to_le_bytes());
            put(&mut buf, at + 24, &flags.to_le_bytes());
            buf.extend_from_slice(bytes);
        }
        if buf.len() as u64 > MIB {
            return Err(super::cannot_hold("the names of the parent do not fit into the metadata region"));
        }
        Ok(buf)
    }
}

//! Reading an image and its parents.

use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, DeviceError};

use super::bat::Geometry;
use super::header::{self, Current};
use super::mapping::Mapping;
use super::metadata::Metadata;
use super::region_table::Regions;
use super::replayed::Replayed;
use super::{Info, Kind, damaged, guid_text, log, metadata, region_table, unsupported};
use crate::{ImageError, ImageFormat, MAX_CHAIN, ParentReference, Parents};

/// The structures of one image file, read and checked.
pub(crate) struct Opened<D> {
    pub(crate) creator: String,
    pub(crate) current: Current,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
    pub(crate) geometry: Geometry,
    pub(crate) file: Replayed<D>,
}

impl<D: BlockDevice> Opened<D> {
    /// Reads all structures but the BAT, after the log was replayed in memory.
    pub(crate) fn read(file: D) -> Result<Opened<D>, ImageError> {
        let creator = header::read_identifier(&file)?;
        let current = header::read_current(&file)?;
        let file = log::replay(file, &current.header)?;
        let start = current.header.log_offset;
        let log = ByteRange { start, end: start.saturating_add(current.header.log_length.into()) };
        let regions = region_table::read(&file, log)?;
        let metadata = metadata::read(&file, regions.metadata)?;
        let geometry = Geometry {
            size: metadata.size,
            block: metadata.block_size.into(),
            sector: metadata.logical_sector_size.into(),
            differencing: metadata.kind == Kind::Differencing,
        };
        let needed = geometry.entries() * 8;
        if needed > regions.bat.len() {
            let reason = format!(
                "the region has {} bytes, {} entries for a disk of {} bytes need {needed}",
                regions.bat.len(),
                geometry.entries(),
                geometry.size
            );
            return Err(damaged("BAT", regions.bat.start, reason));
        }
        let end = regions.bat.start + needed;
        if end > file.size() {
            let reason = format!("it needs the file up to byte {end}, the file has {} bytes", file.size());
            return Err(damaged("BAT", regions.bat.start, reason));
        }
        Ok(Opened { creator, current, regions, metadata, geometry, file })
    }

    pub(crate) fn info(&self) -> Info {
        let (header, metadata) = (&self.current.header, &self.metadata);
        Info {
            kind: metadata.kind,
            size: metadata.size,
            block_size: metadata.block_size,
            logical_sector_size: metadata.logical_sector_size,
            physical_sector_size: metadata.physical_sector_size,
            virtual_disk_id: metadata.virtual_disk_id,
            file_write_guid: header.file_write_guid,
            data_write_guid: header.data_write_guid,
            creator: self.creator.clone(),
            parent: metadata.parent.clone(),
            log_replayed: header.log_in_use(),
        }
    }

    /// Opens the parent that the metadata names, if one is named. `depth` images lie above it.
    pub(crate) fn parent(
        &self,
        parents: &dyn Parents,
        depth: usize,
    ) -> Result<Option<Arc<Reader>>, ImageError> {
        let Some(locator) = &self.metadata.parent else { return Ok(None) };
        if depth >= MAX_CHAIN {
            return Err(unsupported(format!(
                "a chain of more than {MAX_CHAIN} images, or one that leads back to itself"
            )));
        }
        let reference = ParentReference {
            child: ImageFormat::Vhdx,
            names: locator.names(),
            format: Some(ImageFormat::Vhdx),
            depth,
        };
        let (file, grandparents) = parents.open(&reference)?;
        let structures = Opened::read(file)?;
        let found = structures.current.header.data_write_guid;
        // Checked before the grandparents are opened: a wrong parent must not lead anywhere.
        if !locator.fits(&found) {
            return Err(mismatch(format!(
                "its DataWriteGuid is {}, the child was made from {}",
                guid_text(&found),
                guid_text(&locator.linkage)
            )));
        }
        let sector = structures.metadata.logical_sector_size;
        if sector != self.metadata.logical_sector_size {
            return Err(mismatch(format!(
                "its logical sectors have {sector} bytes, those of the child {}",
                self.metadata.logical_sector_size
            )));
        }
        let parent = Reader::from_structures(structures, grandparents.as_ref(), depth + 1)?;
        Ok(Some(Arc::new(parent)))
    }
}

fn mismatch(reason: String) -> ImageError {
    ImageError::ParentMismatch { format: ImageFormat::Vhdx, reason }
}

/// A VHDX image, and the images below it, as the disk inside.
pub struct Reader {
    info: Info,
    parent: Option<Arc<Reader>>,
    mapping: Mapping<Replayed<Arc<dyn BlockDevice>>>,
}

impl Reader {
    /// Opens the image in `file`. Parents of a differencing image are opened through `parents`.
    ///
    /// The file is never written. It must stay as it is while the reader lives.
    pub fn open(file: Arc<dyn BlockDevice>, parents: &dyn Parents) -> Result<Reader, ImageError> {
        Reader::from_structures(Opened::read(file)?, parents, 1)
    }

    fn from_structures(
        structures: Opened<Arc<dyn BlockDevice>>,
        parents: &dyn Parents,
        depth: usize,
    ) -> Result<Reader, ImageError> {
        let parent = structures.parent(parents, depth)?;
        let info = structures.info();
        let mapping = Mapping::new(
            structures.file,
            structures.geometry,
            structures.regions.bat.start,
            structures.regions.all,
            parent.clone().map(|parent| parent as _),
        );
        Ok(Reader { info, parent, mapping })
    }

    /// What the image says about itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The image below a differencing one.
    pub fn parent(&self) -> Option<&Arc<Reader>> {
        self.parent.as_ref()
    }
}

impl BlockDevice for Reader {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.info.logical_sector_size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.mapping.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.mapping.next_allocated(from)
    }
}

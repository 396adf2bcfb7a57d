//! From the bytes of image files to the disk inside, and its description.

use std::path::Path;
use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, DeviceError};
use disk_image::probe::{self, ImageInfo};
use disk_image::{ImageFormat, Parents};

use crate::{DiskDescription, ImageSource, ProviderError};

/// A disk whose image does not record its sector size.
struct WithSector {
    disk: Box<dyn BlockDevice>,
    sector: u32,
}

impl BlockDevice for WithSector {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn logical_sector_size(&self) -> u32 {
        self.sector
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.disk.read_at(offset, buf)
    }
    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.disk.next_allocated(from)
    }
}

/// Opens the disk of `image`, whose file is `file`.
pub(super) fn open(
    image: &ImageSource,
    file: Arc<dyn BlockDevice>,
    parents: &dyn Parents,
) -> Result<(Arc<dyn BlockDevice>, ImageInfo), ProviderError> {
    let shown = image.path.display().to_string();
    let refused = |reason: String| ProviderError::Format { object: shown.clone(), reason };
    let explicit = image.format.as_deref().map(str::parse::<ImageFormat>).transpose().map_err(refused)?;
    let failed = |error| ProviderError::from_source_image(shown.clone(), error);
    let format =
        probe::format_of(&image.path.to_string_lossy(), explicit, file.as_ref()).map_err(failed)?.format;
    let opened = probe::open(format, file, parents).map_err(failed)?;
    let info = opened.info;
    let disk: Arc<dyn BlockDevice> = match image.sector {
        None => Arc::from(opened.disk),
        Some(sector) if sector == info.logical_sector_size => Arc::from(opened.disk),
        Some(sector @ (512 | 4096)) if matches!(format, ImageFormat::Raw | ImageFormat::Qcow2) => {
            Arc::new(WithSector { disk: opened.disk, sector })
        }
        Some(sector) => {
            return Err(refused(format!(
                "a sector size of {sector} was given, the {} image has {}",
                format.word(),
                info.logical_sector_size
            )));
        }
    };
    Ok((disk, info))
}

/// What is kept about a disk.
pub(super) fn describe(
    number: usize,
    path: &Path,
    disk: &dyn BlockDevice,
    info: &ImageInfo,
    chain: usize,
) -> DiskDescription {
    let mut properties: std::collections::BTreeMap<String, String> =
        info.details.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    properties.insert("kind".to_owned(), info.kind.to_owned());
    if let Some(bytes) = info.block_size {
        properties.insert("block_size".to_owned(), bytes.to_string());
    }
    if let Some(id) = &info.disk_id {
        properties.insert("disk_id".to_owned(), id.iter().map(|byte| format!("{byte:02x}")).collect());
    }
    if info.not_closed {
        properties.insert("not_closed".to_owned(), "true".to_owned());
    }
    DiskDescription {
        key: format!("disk{number}"),
        file_name: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        format: info.format.word().to_owned(),
        size: disk.size(),
        sector: disk.logical_sector_size(),
        chain: chain as u32,
        tracked: false,
        properties,
    }
}

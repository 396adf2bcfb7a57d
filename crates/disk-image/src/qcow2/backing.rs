//! The backing file: which file it is, which format it has, and its bytes as the layer below.
//!
//! The format is what the image states. If it states none, name *and* magic must agree (INV-25): a guest can write a
//! qcow2 header at the start of its raw disk, and a reader that believes it would hand out any file of the host.

use std::sync::{Arc, Mutex, PoisonError};

use block_io::{BlockDevice, ByteRange, DeviceError};

use super::header::MAX_BACKING_NAME;
use super::{Backing, cannot_hold, damaged, unsupported};
use crate::{ImageError, ImageFormat, MAX_CHAIN, ParentReference, Parents};

/// Magics of disk image formats at their offsets. A file with one of them is not taken for raw unless it is stated.
const MAGICS: [(usize, &[u8]); 10] = [
    (0, b"QFI\xfb"),
    (0, b"vhdxfile"),
    (0, b"conectix"),
    (0, b"KDMV"),
    (0, b"COWD"),
    (0, b"# Disk DescriptorFile"),
    (0, b"QED\0"),
    (0, b"WithoutFreeSpace"),
    (0, b"WithouFreSpacExt"),
    (64, &[0x7f, 0x10, 0xda, 0xbe]),
];

/// What an overlay lies over: an image of any format that is never written.
#[derive(Clone)]
pub struct Base {
    /// The name that the overlay's header gives for it. QEMU resolves a relative one in the overlay's folder, so only an
    /// absolute one lets the overlay be moved.
    pub name: String,
    /// Its format. It is stated in the overlay, so that nobody has to guess it from bytes of a guest (INV-25).
    pub format: ImageFormat,
    /// The disk inside it, through its whole chain. Its bytes must stay as they are as long as the overlay is used.
    pub disk: Arc<dyn BlockDevice>,
}

impl Base {
    /// The reference to it as a header holds it.
    pub(super) fn reference(&self) -> Result<Backing, ImageError> {
        let cannot = |reason: &str| cannot_hold(format!("its backing file {:?} {reason}", self.name));
        if self.name.is_empty() || self.name.len() as u64 > MAX_BACKING_NAME {
            return Err(cannot(&format!("has a name not of 1 to {MAX_BACKING_NAME} bytes")));
        }
        if self.name.contains('\0') || plain_name(&self.name).ok() != Some(self.name.as_str()) {
            return Err(cannot(
                "has a name that would not be taken for that of a file; give an absolute path",
            ));
        }
        Ok(Backing { name: self.name.clone(), format: Some(written_format(self.format).to_owned()) })
    }
}

/// The layer below, as a device of its own size.
pub(super) struct Below {
    device: Arc<dyn BlockDevice>,
    /// The last answer of `next_allocated`: from where it was asked, and what was found. Runs of one layer ask the
    /// layer below again and again; without it a sparse chain costs the square of its tables.
    answer: Mutex<Option<(u64, Option<ByteRange>)>>,
}

impl Below {
    pub fn new(device: Arc<dyn BlockDevice>) -> Below {
        Below { device, answer: Mutex::new(None) }
    }

    /// Reads from the layer; what lies past its end are zeros.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let present = self.device.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, outside) = buf.split_at_mut(present);
        outside.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        self.device.read_at(offset, inside)
    }

    /// As [`BlockDevice::next_allocated`].
    pub fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((asked, found)) = *answer
            && from >= asked
        {
            match found {
                None => return Ok(None),
                Some(range) if from < range.end => {
                    return Ok(Some(ByteRange { start: range.start.max(from), end: range.end }));
                }
                Some(_) => {}
            }
        }
        let found = self.device.next_allocated(from)?;
        *answer = Some((from, found));
        Ok(found)
    }
}

/// A backing file that was found.
pub(super) struct BackingFile {
    pub file: Arc<dyn BlockDevice>,
    pub format: ImageFormat,
    /// Opens what the file itself refers to.
    pub parents: Arc<dyn Parents>,
    /// Images above it.
    pub depth: usize,
}

/// Finds the backing file of an image that has `depth` images above it.
pub(super) fn find(
    backing: &Backing,
    parents: &dyn Parents,
    depth: usize,
) -> Result<BackingFile, ImageError> {
    let depth = depth.saturating_add(1);
    if depth >= MAX_CHAIN {
        return Err(unsupported(format!(
            "a chain of more than {MAX_CHAIN} backing files, or a loop of them"
        )));
    }
    let name = plain_name(&backing.name)?;
    let stated = backing.format.as_deref().map(stated_format).transpose()?;
    let reference =
        ParentReference { child: ImageFormat::Qcow2, names: vec![name.to_owned()], format: stated, depth };
    let (file, parents) = parents.open(&reference)?;
    let format = match stated {
        Some(format) => format,
        None => unstated_format(name, file.as_ref())?,
    };
    Ok(BackingFile { file, format, parents, depth })
}

/// The name as a path, if it is one.
fn plain_name(name: &str) -> Result<&str, ImageError> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let scheme = name.split(['/', '\\']).next().unwrap_or_default().split_once(':').map(|(scheme, _)| scheme);
    match scheme {
        // One letter is a drive of Windows.
        Some(scheme) if scheme.len() > 1 => Err(unsupported(format!("a backing file behind {scheme:?}"))),
        _ if name.is_empty() => Err(damaged("header", 8, "the backing file name is empty")),
        _ => Ok(name),
    }
}

/// Formats under the names QEMU writes.
fn stated_format(word: &str) -> Result<ImageFormat, ImageError> {
    match word {
        "raw" | "file" | "host_device" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        "vpc" => Ok(ImageFormat::Vhd),
        "vhdx" => Ok(ImageFormat::Vhdx),
        other => Err(unsupported(format!("a backing file of format {other:?}"))),
    }
}

/// The name that QEMU knows a format by.
fn written_format(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vhd => "vpc",
        ImageFormat::Vhdx => "vhdx",
    }
}

fn unstated_format(name: &str, file: &dyn BlockDevice) -> Result<ImageFormat, ImageError> {
    let mut start = [0u8; 128];
    let present = file.size().min(start.len() as u64) as usize;
    file.read_at(0, start.get_mut(..present).unwrap_or_default())?;
    let found = MAGICS
        .iter()
        .find(|(at, magic)| start.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map(|(_, magic)| *magic);
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    match (found, extension.as_deref()) {
        (None, _) => Ok(ImageFormat::Raw),
        (Some(b"QFI\xfb"), Some("qcow2" | "qcow" | "qcw")) => Ok(ImageFormat::Qcow2),
        (Some(b"vhdxfile"), Some("vhdx")) => Ok(ImageFormat::Vhdx),
        (Some(b"conectix"), Some("vhd" | "vpc")) => Ok(ImageFormat::Vhd),
        _ => Err(unsupported(
            "a backing file without a stated format, whose name and magic do not agree on one \
             (state it with `qemu-img rebase -u -b NAME -F FORMAT`)",
        )),
    }
}

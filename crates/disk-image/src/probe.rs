//! Which format a file is, and opening whatever it is.
//!
//! A format is chosen by the caller's explicit word, or by the file's name *and* its magic together; never by bytes
//! that a guest could have written (INV-25). A raw disk belongs to the guest from its first byte to its last: one
//! that begins with the magic of qcow2 and names `/etc/shadow` as its backing file must stay a raw disk.
//!
//! | name ends in | magic fits | decision |
//! |---|---|---|
//! | `.vhd`, `.avhd`, `.vhdx`, `.avhdx`, `.qcow2`, `.qcow` | yes | that format |
//! | the same | no | refused; the format has to be given |
//! | `.vmdk`, `.vdi`, `.qed`, ... | - | refused: a container that is not read must not pass as the bytes of a disk |
//! | anything else | not looked at | raw |
//!
//! The magic of VHD is at the end of the file; the one of its front copy counts as well (see [`vhd`]).

use std::sync::Arc;

use crate::{BlockDevice, GrowableFile, ImageError, ImageFormat, NoParents, Parents, WritableDevice};
use crate::{qcow2, raw, vhd, vhdx};

/// Why a format was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The caller said so.
    Explicit,
    /// Name and magic agree.
    NameAndMagic,
    /// The name is not one of a container.
    PlainName,
}

/// A chosen format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// The format to open the file as.
    pub format: ImageFormat,
    /// Why.
    pub reason: Reason,
    /// The file was taken as raw, and has the magic of this container: worth a warning to a person, who may have
    /// misnamed the file, and no ground to decide otherwise.
    pub looks_like: Option<ImageFormat>,
}

/// Extensions of names, lower case, and the container they stand for.
const EXTENSIONS: [(&str, ImageFormat); 6] = [
    ("vhd", ImageFormat::Vhd),
    ("avhd", ImageFormat::Vhd),
    ("vhdx", ImageFormat::Vhdx),
    ("avhdx", ImageFormat::Vhdx),
    ("qcow2", ImageFormat::Qcow2),
    ("qcow", ImageFormat::Qcow2),
];

/// Containers that are not read. Their bytes are not those of a disk.
const FOREIGN: [&str; 7] = ["vmdk", "vdi", "qed", "vhds", "ova", "hdd", "dmg"];

/// Decides what `file`, called `file_name` (a path will do), is.
pub fn format_of(
    file_name: &str,
    explicit: Option<ImageFormat>,
    file: &dyn BlockDevice,
) -> Result<Decision, ImageError> {
    if let Some(format) = explicit {
        return Ok(Decision { format, reason: Reason::Explicit, looks_like: None });
    }
    let name = file_name.rsplit(['/', '\\']).next().unwrap_or(file_name);
    let extension =
        name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase()).unwrap_or_default();
    if FOREIGN.contains(&extension.as_str()) {
        return Err(ImageError::NotThisFormat {
            format: ImageFormat::Raw,
            reason: format!(
                "its name ends in .{extension}, a container that is not read; give the format raw explicitly if the \
                 file does hold the bytes of a disk"
            ),
        });
    }
    let named = EXTENSIONS.iter().find(|(word, _)| *word == extension).map(|&(_, format)| format);
    let Some(format) = named else {
        let containers = [ImageFormat::Qcow2, ImageFormat::Vhdx, ImageFormat::Vhd];
        let mut looks_like = None;
        for container in containers {
            if looks_like.is_none() && has_magic(container, file)? {
                looks_like = Some(container);
            }
        }
        return Ok(Decision { format: ImageFormat::Raw, reason: Reason::PlainName, looks_like });
    };
    if has_magic(format, file)? {
        return Ok(Decision { format, reason: Reason::NameAndMagic, looks_like: None });
    }
    let (magic, place) = match format {
        ImageFormat::Qcow2 => ("QFI\\xfb", "at byte 0"),
        ImageFormat::Vhdx => ("vhdxfile", "at byte 0"),
        ImageFormat::Vhd | ImageFormat::Raw => ("conectix", "in its last sector or at byte 0"),
    };
    Err(ImageError::NotThisFormat {
        format,
        reason: format!(
            "its name ends in .{extension}, and it has no \"{magic}\" {place}; give the format explicitly if the name \
             does not say what it is"
        ),
    })
}

fn has_magic(format: ImageFormat, file: &dyn BlockDevice) -> Result<bool, ImageError> {
    let magic: &[u8] = match format {
        ImageFormat::Raw => return Ok(true),
        ImageFormat::Vhd => return vhd::has_cookie(file),
        ImageFormat::Vhdx => b"vhdxfile",
        ImageFormat::Qcow2 => b"QFI\xfb",
    };
    if file.size() < magic.len() as u64 {
        return Ok(false);
    }
    let mut head = [0u8; 8];
    let head = &mut head[..magic.len()];
    file.read_at(0, head)?;
    Ok(head == magic)
}

/// What an image says about itself, in the same words for every format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// The format.
    pub format: ImageFormat,
    /// `raw`, `fixed`, `dynamic`, `differencing`, `v2`, `v3`.
    pub kind: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector_size: u32,
    /// Bytes of the unit of allocation; `None` for raw and fixed VHD.
    pub block_size: Option<u32>,
    /// Identity of the disk, where the format has one.
    pub disk_id: Option<[u8; 16]>,
    /// Names of the image below, in the order they are tried; empty for an image that stands alone. Guest-supplied.
    pub parents: Vec<String>,
    /// The image was not closed cleanly; what was needed to read it right has been done in memory.
    pub not_closed: bool,
    /// Everything else worth keeping, by the name the specification uses, for people and for rebuilding an image of
    /// the same properties.
    pub details: Vec<(&'static str, String)>,
}

/// An opened image: the disk inside, and what the image says about itself.
pub struct Opened {
    /// The disk.
    pub disk: Box<dyn BlockDevice>,
    /// What the image says.
    pub info: ImageInfo,
}

/// Opens the disk in `file`, an image of `format`. Files it refers to come from `parents`.
pub fn open_reader(
    format: ImageFormat,
    file: Arc<dyn BlockDevice>,
    parents: &dyn Parents,
) -> Result<Box<dyn BlockDevice>, ImageError> {
    Ok(open(format, file, parents)?.disk)
}

/// The same, and what the image says about itself.
pub fn open(
    format: ImageFormat,
    file: Arc<dyn BlockDevice>,
    parents: &dyn Parents,
) -> Result<Opened, ImageError> {
    Ok(match format {
        ImageFormat::Raw => {
            let disk = raw::Reader::open(file);
            let info = ImageInfo {
                format,
                kind: "raw",
                size: disk.size(),
                logical_sector_size: disk.logical_sector_size(),
                block_size: None,
                disk_id: None,
                parents: Vec::new(),
                not_closed: false,
                details: Vec::new(),
            };
            Opened { disk: Box::new(disk), info }
        }
        ImageFormat::Vhd => {
            let disk = vhd::Reader::open(file, parents)?;
            let info = vhd_info(disk.info());
            Opened { disk: Box::new(disk), info }
        }
        ImageFormat::Vhdx => {
            let disk = vhdx::Reader::open(file, parents)?;
            let info = vhdx_info(disk.info());
            Opened { disk: Box::new(disk), info }
        }
        ImageFormat::Qcow2 => {
            let disk = qcow2::Reader::open(file, parents)?;
            let info = qcow2_info(&disk.info());
            Opened { disk: Box::new(disk), info }
        }
    })
}

fn vhd_info(info: &vhd::Info) -> ImageInfo {
    let text = |bytes: &[u8; 4]| bytes.escape_ascii().to_string();
    let mut details = vec![
        ("Creator Application", text(&info.creator_application)),
        ("Creator Version", format!("{:#010x}", info.creator_version)),
        ("Creator Host OS", text(&info.creator_host_os)),
        ("Original Size", info.original_size.to_string()),
        ("Current Size", info.current_size.to_string()),
        (
            "Disk Geometry",
            format!(
                "{}/{}/{}",
                info.geometry.cylinders, info.geometry.heads, info.geometry.sectors_per_track
            ),
        ),
        ("Time Stamp", info.time_stamp.to_string()),
    ];
    if let Some(id) = &info.parent_unique_id {
        details.push(("Parent Unique ID", hex(id)));
    }
    ImageInfo {
        format: ImageFormat::Vhd,
        kind: info.kind.word(),
        size: info.size,
        logical_sector_size: 512,
        block_size: info.block_size,
        disk_id: Some(info.unique_id),
        parents: info.parent_names.clone(),
        not_closed: info.footer == vhd::FooterPlace::Front,
        details,
    }
}

fn vhdx_info(info: &vhdx::Info) -> ImageInfo {
    ImageInfo {
        format: ImageFormat::Vhdx,
        kind: match info.kind {
            vhdx::Kind::Fixed => "fixed",
            vhdx::Kind::Dynamic => "dynamic",
            vhdx::Kind::Differencing => "differencing",
        },
        size: info.size,
        logical_sector_size: info.logical_sector_size,
        block_size: Some(info.block_size),
        disk_id: Some(info.virtual_disk_id),
        parents: info.parent.as_ref().map(|parent| parent.names()).unwrap_or_default(),
        not_closed: info.log_replayed,
        details: vec![
            ("PhysicalSectorSize", info.physical_sector_size.to_string()),
            ("FileWriteGuid", hex(&info.file_write_guid)),
            ("DataWriteGuid", hex(&info.data_write_guid)),
            ("Creator", info.creator.clone()),
        ],
    }
}

fn qcow2_info(info: &qcow2::Info) -> ImageInfo {
    let mut details = vec![
        ("cluster_size", info.cluster_size.to_string()),
        (
            "compression_type",
            match info.compression {
                qcow2::Compression::Deflate => "zlib",
                qcow2::Compression::Zstd => "zstd",
            }
            .to_owned(),
        ),
        ("extended_l2", info.extended_l2.to_string()),
        ("refcount_bits", info.refcount_bits.to_string()),
        ("lazy_refcounts", info.lazy_refcounts.to_string()),
        ("corrupt", info.corrupt.to_string()),
        ("nb_snapshots", info.snapshots.to_string()),
    ];
    let mut parents = Vec::new();
    if let Some(backing) = &info.backing {
        parents.push(backing.name.clone());
        if let Some(format) = &backing.format {
            details.push(("backing_format", format.clone()));
        }
    }
    ImageInfo {
        format: ImageFormat::Qcow2,
        kind: if info.version == 2 { "v2" } else { "v3" },
        size: info.virtual_size,
        logical_sector_size: 512,
        block_size: Some(info.cluster_size),
        disk_id: None,
        parents,
        not_closed: info.dirty,
        details,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The disk that a new image is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewDisk {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector: 512 or 4096. VHD holds 512 only; raw and qcow2 do not record it, there it is the
    /// machine's configuration that says.
    pub logical_sector_size: u32,
    /// All blocks have their place from the start (VHD and VHDX); otherwise they come as they are written.
    pub fixed: bool,
    /// A new random id for each of: disk, file, data. (VHD: the first; VHDX: all; raw and qcow2: none.)
    pub ids: [[u8; 16]; 3],
    /// Now, as seconds since 2000-01-01 UTC (VHD).
    pub created: u32,
}

/// Makes an image of `format` in an empty file.
pub fn create_writer(
    format: ImageFormat,
    file: Arc<dyn GrowableFile>,
    new: &NewDisk,
) -> Result<Box<dyn WritableDevice>, ImageError> {
    let [disk_id, file_id, data_id] = new.ids;
    if !matches!(new.logical_sector_size, 512 | 4096)
        || (format == ImageFormat::Vhd && new.logical_sector_size != 512)
    {
        return Err(ImageError::CannotHold {
            format,
            reason: format!(
                "its logical sectors have {} bytes, expected 512{}",
                new.logical_sector_size,
                if format == ImageFormat::Vhd { "" } else { " or 4096" }
            ),
        });
    }
    Ok(match format {
        ImageFormat::Raw => Box::new(raw::Writer::create(file, new.size, new.logical_sector_size)?),
        ImageFormat::Vhd => {
            let options = if new.fixed { vhd::CreateOptions::fixed } else { vhd::CreateOptions::dynamic };
            let options = vhd::CreateOptions { time_stamp: new.created, ..options(new.size, disk_id) };
            Box::new(vhd::Writer::create(file, &options)?)
        }
        ImageFormat::Vhdx => Box::new(vhdx::Writer::create(
            file,
            vhdx::CreateOptions {
                size: new.size,
                logical_sector_size: new.logical_sector_size,
                physical_sector_size: 4096,
                block_size: vhdx::DYNAMIC_BLOCK_SIZE,
                kind: if new.fixed { vhdx::CreateKind::Fixed } else { vhdx::CreateKind::Dynamic },
                ids: vhdx::Ids { file_write: file_id, data_write: data_id, virtual_disk: disk_id },
            },
        )?),
        ImageFormat::Qcow2 => Box::new(qcow2::Writer::create(file, qcow2::CreateOptions::new(new.size))?),
    })
}

/// Opens an image that stands alone to write on, after a crash as well.
///
/// `logical_sector_size` is for formats that do not record it.
pub fn open_writer(
    format: ImageFormat,
    file: Arc<dyn GrowableFile>,
    logical_sector_size: u32,
) -> Result<Box<dyn WritableDevice>, ImageError> {
    Ok(match format {
        ImageFormat::Raw => Box::new(raw::Writer::open(file, logical_sector_size)?),
        ImageFormat::Vhd => Box::new(vhd::Writer::open(file, &NoParents)?),
        ImageFormat::Vhdx => Box::new(vhdx::Writer::open(file, &NoParents)?),
        ImageFormat::Qcow2 => Box::new(qcow2::Writer::open(file)?),
    })
}

//! Header, header extensions, feature name table and backing file name: the first cluster of the file.

use block_io::BlockDevice;

use super::entry::Layout;
use super::{Backing, Compression, Info, MAX_L1_BYTES, MAX_SIZE, damaged, unsupported};
use crate::{ImageError, ImageFormat};

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header.
const V2_LENGTH: u64 = 72;
/// Least bytes of a version 3 header.
const V3_LENGTH: u64 = 104;
/// Longest name of a backing file.
pub(super) const MAX_BACKING_NAME: u64 = 1023;
/// Bytes of an entry of the feature name table.
const FEATURE_NAME_ENTRY: usize = 48;

/// Bits of `incompatible_features`.
pub(super) const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

/// Types of header extensions.
const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// A checked header. Offsets are bytes from the start of the file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub layout: Layout,
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub snapshots: u32,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub compression: Compression,
    pub backing: Option<Backing>,
    /// Whether there is a bitmaps extension.
    pub bitmaps: bool,
}

/// Numbers of a byte string; past its end is `None`.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl Header {
    /// Reads and checks everything in the first cluster, and that the L1 table lies in the file.
    pub(super) fn read(file: &dyn BlockDevice) -> Result<Header, ImageError> {
        let mut start = [0u8; V3_LENGTH as usize + 1];
        let present = file.size().min(start.len() as u64) as usize;
        file.read_at(0, start.get_mut(..present).unwrap_or_default())?;
        if !start.starts_with(&MAGIC) {
            return Err(ImageError::NotThisFormat {
                format: ImageFormat::Qcow2,
                reason: format!(
                    "expected magic \"QFI\\xfb\" at byte 0, found {:02x?}",
                    start.get(..present.min(4)).unwrap_or_default()
                ),
            });
        }
        let need = |length: u64| {
            if file.size() < length {
                return Err(damaged(
                    "header",
                    0,
                    format!("the file ends after {} bytes, the header has {length}", file.size()),
                ));
            }
            Ok(())
        };
        need(V2_LENGTH)?;
        let (u32_at, u64_at) =
            (|at| be32(&start, at).unwrap_or_default(), |at| be64(&start, at).unwrap_or_default());
        let version = u32_at(4);
        if !matches!(version, 2 | 3) {
            return Err(unsupported(format!("version {version}; versions 2 and 3 are")));
        }
        let cluster_bits = u32_at(20);
        if cluster_bits < 9 {
            return Err(damaged("header", 20, format!("cluster_bits is {cluster_bits}, must be 9 or more")));
        }
        if cluster_bits > 21 {
            return Err(unsupported(format!("clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are")));
        }
        let cluster_size = 1u64 << cluster_bits;
        let (mut incompatible, mut compatible, mut autoclear) = (0, 0, 0);
        let (mut refcount_order, mut length, mut compression_type) = (4, V2_LENGTH, 0);
        if version == 3 {
            need(V3_LENGTH)?;
            incompatible = u64_at(72);
            compatible = u64_at(80);
            autoclear = u64_at(88);
            refcount_order = u32_at(96);
            length = u64::from(u32_at(100));
            if length < V3_LENGTH || !length.is_multiple_of(8) || length > cluster_size {
                return Err(damaged(
                    "header",
                    100,
                    format!(
                        "header_length is {length}, must be a multiple of 8 from {V3_LENGTH} to {cluster_size}"
                    ),
                ));
            }
            need(length)?;
            if length > V3_LENGTH {
                compression_type = start.last().copied().unwrap_or_default();
            }
        }
        let mut first = vec![0u8; file.size().min(cluster_size) as usize];
        file.read_at(0, &mut first)?;
        let backing_at = u64_at(8);
        let extensions = Extensions::parse(&first, length, backing_at)?;

        let unknown = incompatible & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            let names: Vec<String> = (0..64u8)
                .filter(|bit| unknown & (1 << bit) != 0)
                .map(|bit| match extensions.feature_name(bit) {
                    Some(name) => format!("{name:?} (incompatible feature bit {bit})"),
                    None => format!("incompatible feature bit {bit}, which the image does not name"),
                })
                .collect();
            return Err(unsupported(names.join(", ")));
        }
        match u32_at(32) {
            0 => {}
            1 => return Err(unsupported("encryption (AES)")),
            2 => return Err(unsupported("encryption (LUKS)")),
            method => return Err(unsupported(format!("encryption (method {method})"))),
        }
        if incompatible & DATA_FILE != 0 {
            return Err(ImageError::NotAllowed {
                format: ImageFormat::Qcow2,
                reference: extensions.data_file.unwrap_or_default(),
                reason: "the guest's data lies in an external data file; such images are not read".to_owned(),
            });
        }
        let compression = match (incompatible & COMPRESSION_TYPE != 0, compression_type) {
            (false, 0) => Compression::Deflate,
            (true, 1) => Compression::Zstd,
            (true, 2..) => return Err(unsupported(format!("compression type {compression_type}"))),
            (bit, _) => {
                return Err(damaged(
                    "header",
                    104,
                    format!("compression_type is {compression_type} and its incompatible feature bit {bit}"),
                ));
            }
        };
        if refcount_order > 6 {
            return Err(damaged(
                "header",
                96,
                format!("refcount_order is {refcount_order}, must not exceed 6"),
            ));
        }
        let extended = incompatible & EXTENDED_L2 != 0;
        if extended && cluster_bits < 14 {
            return Err(damaged(
                "header",
                20,
                format!("cluster_bits is {cluster_bits}, must be 14 or more with extended L2 entries"),
            ));
        }
        let size = u64_at(24);
        if size > MAX_SIZE {
            return Err(damaged("header", 24, format!("size is {size}, must be less than 2^63")));
        }
        let layout = Layout { version, cluster_bits, extended, size };
        let backing = backing_name(&first, backing_at, u64::from(u32_at(16)))?
            .map(|name| Backing { name, format: extensions.backing_format });
        let header = Header {
            layout,
            l1_offset: u64_at(40),
            l1_entries: u32_at(36),
            refcount_table_offset: u64_at(48),
            refcount_table_clusters: u32_at(56),
            snapshots: u32_at(60),
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            compression,
            backing,
            bitmaps: extensions.bitmaps,
        };
        header.check_l1(file.size())?;
        Ok(header)
    }

    fn check_l1(&self, file_size: u64) -> Result<(), ImageError> {
        let needed = self.layout.l1_entries();
        let bytes = u64::from(self.l1_entries) * 8;
        if u64::from(self.l1_entries) < needed {
            return Err(damaged(
                "header",
                36,
                format!(
                    "l1_size is {}, a disk of {} bytes needs {needed}",
                    self.l1_entries, self.layout.size
                ),
            ));
        }
        if bytes > MAX_L1_BYTES {
            return Err(damaged("header", 36, format!("l1_size is {}, larger than 32 MiB", self.l1_entries)));
        }
        if bytes == 0 {
            return Ok(());
        }
        if self.l1_offset == 0 || !self.l1_offset.is_multiple_of(self.layout.cluster_size()) {
            return Err(damaged(
                "header",
                40,
                format!("l1_table_offset is {}, must be a multiple of a cluster", self.l1_offset),
            ));
        }
        if self.l1_offset.checked_add(bytes).is_none_or(|end| end > file_size) {
            return Err(damaged(
                "L1 table",
                self.l1_offset,
                format!("it has {bytes} bytes, the file ends at {file_size}"),
            ));
        }
        Ok(())
    }

    pub(super) fn info(&self) -> Info {
        Info {
            version: self.layout.version,
            virtual_size: self.layout.size,
            cluster_size: 1 << self.layout.cluster_bits,
            compression: self.compression,
            extended_l2: self.layout.extended,
            refcount_bits: 1 << self.refcount_order,
            lazy_refcounts: self.compatible & 1 != 0,
            dirty: self.incompatible & DIRTY != 0,
            corrupt: self.incompatible & CORRUPT != 0,
            snapshots: self.snapshots,
            backing: self.backing.clone(),
        }
    }
}

/// What the header extensions say.
#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    feature_names: Vec<u8>,
    bitmaps: bool,
}

impl Extensions {
    /// `first` is the first cluster, as far as the file has it. The area ends with its end mark, at the backing file
    /// name, or with the cluster.
    fn parse(first: &[u8], header_length: u64, backing_at: u64) -> Result<Extensions, ImageError> {
        let area_end = match usize::try_from(backing_at) {
            Ok(at) if at > 0 => at.min(first.len()),
            _ => first.len(),
        };
        let area = first.get(..area_end).unwrap_or_default();
        let mut found = Extensions::default();
        let mut at = header_length as usize;
        while let (Some(kind), Some(length)) = (be32(area, at), be32(area, at.saturating_add(4))) {
            if kind == EXTENSION_END {
                break;
            }
            let start = at.saturating_add(8);
            let end = start.saturating_add(length as usize);
            let Some(data) = area.get(start..end) else {
                return Err(damaged(
                    "header extension",
                    at as u64,
                    format!(
                        "type {kind:#010x} has {length} bytes and passes the end of its area at {area_end}"
                    ),
                ));
            };
            let text = || {
                String::from_utf8(data.to_vec()).map_err(|_| {
                    damaged("header extension", at as u64, format!("type {kind:#010x} is not UTF-8 text"))
                })
            };
            match kind {
                EXTENSION_BACKING_FORMAT => found.backing_format = Some(text()?),
                EXTENSION_DATA_FILE => found.data_file = Some(text()?),
                EXTENSION_FEATURE_NAMES => found.feature_names = data.to_vec(),
                EXTENSION_BITMAPS => found.bitmaps = true,
                _ => {}
            }
            at = end.next_multiple_of(8);
        }
        Ok(found)
    }

    /// The name of an incompatible feature.
    fn feature_name(&self, bit: u8) -> Option<String> {
        let entry =
            self.feature_names.chunks_exact(FEATURE_NAME_ENTRY).find(|entry| entry.starts_with(&[0, bit]))?;
        let name = entry.get(2..)?;
        let name = name.split(|&byte| byte == 0).next()?;
        Some(String::from_utf8_lossy(name).into_owned())
    }
}

fn backing_name(first: &[u8], at: u64, length: u64) -> Result<Option<String>, ImageError> {
    if at == 0 || length == 0 {
        return Ok(None);
    }
    let bytes = usize::try_from(at)
        .ok()
        .zip(usize::try_from(length).ok())
        .filter(|_| length <= MAX_BACKING_NAME)
        .and_then(|(at, length)| first.get(at..at.checked_add(length)?));
    let Some(bytes) = bytes else {
        return Err(damaged(
            "header",
            8,
            format!("the backing file name, bytes {at}..+{length}, does not lie in the first cluster"),
        ));
    };
    match String::from_utf8(bytes.to_vec()) {
        Ok(name) => Ok(Some(name)),
        Err(_) => Err(unsupported("a backing file name that is not UTF-8 text")),
    }
}

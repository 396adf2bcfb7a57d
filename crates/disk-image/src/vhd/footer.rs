//! Hard Disk Footer ("Hard Disk Footer Format"): 512 bytes at the end of every image, and a copy at the front of
//! dynamic and differencing ones.
//!
//! | offset | size | meaning |
//! |---|---|---|
//! | 0  | 8  | cookie `conectix` |
//! | 8  | 4  | features; bit 1 always set |
//! | 12 | 4  | file format version, major and minor: 1.0 |
//! | 16 | 8  | data offset: where the Dynamic Disk Header lies, bytes from the start of the file |
//! | 24 | 4  | time stamp, seconds since 2000-01-01 UTC |
//! | 28 | 4  | creator application |
//! | 32 | 4  | creator version |
//! | 36 | 4  | creator host OS |
//! | 40 | 8  | original size, bytes |
//! | 48 | 8  | current size, bytes |
//! | 56 | 4  | disk geometry: cylinders (2), heads (1), sectors per track (1) |
//! | 60 | 4  | disk type: 2 fixed, 3 dynamic, 4 differencing |
//! | 64 | 4  | checksum |
//! | 68 | 16 | unique id |
//! | 84 | 1  | saved state |
//!
//! All numbers are big-endian. Virtual PC before 2004 wrote 511 bytes; the missing last byte counts as 0.

use block_io::BlockDevice;

use super::{FooterPlace, Kind, MAX_SIZE, SECTOR, be_u32, be_u64, checksum, damaged, take, unsupported};
use crate::{ImageError, ImageFormat};

pub(crate) const COOKIE: &[u8; 8] = b"conectix";
pub(crate) const BYTES: usize = 512;
const CHECKSUM_AT: usize = 64;
const NAME: &str = "Hard Disk Footer";

/// Sectors of the largest geometry that can be stated: 65535 cylinders, 16 heads, 255 sectors per track.
pub(crate) const MAX_GEOMETRY: Geometry = Geometry { cylinders: 65535, heads: 16, sectors_per_track: 255 };

/// "Disk Geometry" of the footer: cylinders, heads, sectors per track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors of one track.
    pub sectors_per_track: u8,
}

impl Geometry {
    /// Sectors that can be addressed.
    pub fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors_per_track)
    }

    /// The geometry that the appendix "CHS Calculation" gives for a number of sectors. It rounds down: the product
    /// is at most the number of sectors.
    pub fn for_sectors(sectors: u64) -> Geometry {
        let sectors = sectors.min(MAX_GEOMETRY.sectors());
        // Tried in this order: the old BIOS limits first, larger tracks only for disks that need them.
        let (heads, track) = if sectors >= 65535 * 16 * 63 {
            (16, 255)
        } else {
            let tracks = sectors / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if heads <= 16 && tracks < heads * 1024 {
                (heads, 17)
            } else if sectors / 31 < 16 * 1024 {
                (16, 31)
            } else {
                (16, 63)
            }
        };
        Geometry {
            cylinders: u16::try_from(sectors / track / heads).unwrap_or(u16::MAX),
            heads: heads as u8,
            sectors_per_track: track as u8,
        }
    }
}

/// Which field of the footer states the size of the disk.
///
/// Virtual PC, Virtual Server and QEMU without `force_size` give the guest what the *geometry* says, everything else
/// what *current size* says. A geometry at its maximum cannot say more, and one of zero says nothing: then current
/// size counts for all. Creators nobody knows count as current size, as in QEMU since 10.1 (older ones: geometry):
/// current size is never the smaller one in practice, so a wrong guess adds zeros and loses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeRule {
    /// Cylinders times heads times sectors.
    Geometry,
    /// The field "Current Size".
    CurrentSize,
}

/// Creators whose disks are as large as their geometry says.
const GEOMETRY_CREATORS: [&[u8; 4]; 3] = [b"vpc ", b"vs  ", b"qemu"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) features: u32,
    pub(crate) version: u32,
    pub(crate) data_offset: u64,
    pub(crate) time_stamp: u32,
    pub(crate) creator_application: [u8; 4],
    pub(crate) creator_version: u32,
    pub(crate) creator_host_os: [u8; 4],
    pub(crate) original_size: u64,
    pub(crate) current_size: u64,
    pub(crate) geometry: Geometry,
    pub(crate) disk_type: u32,
    pub(crate) unique_id: [u8; 16],
    pub(crate) saved_state: bool,
}

/// Why 512 bytes are no footer.
enum Fault {
    NoCookie,
    Checksum { stored: u32, computed: u32 },
}

impl Footer {
    fn parse(bytes: &[u8; BYTES]) -> Result<Footer, Fault> {
        if !bytes.starts_with(COOKIE) {
            return Err(Fault::NoCookie);
        }
        let (stored, computed) = (be_u32(bytes, CHECKSUM_AT), checksum(bytes, CHECKSUM_AT));
        if stored != computed {
            return Err(Fault::Checksum { stored, computed });
        }
        Ok(Footer {
            features: be_u32(bytes, 8),
            version: be_u32(bytes, 12),
            data_offset: be_u64(bytes, 16),
            time_stamp: be_u32(bytes, 24),
            creator_application: take(bytes, 28),
            creator_version: be_u32(bytes, 32),
            creator_host_os: take(bytes, 36),
            original_size: be_u64(bytes, 40),
            current_size: be_u64(bytes, 48),
            geometry: Geometry {
                cylinders: u16::from_be_bytes(take(bytes, 56)),
                heads: take::<1>(bytes, 58)[0],
                sectors_per_track: take::<1>(bytes, 59)[0],
            },
            disk_type: be_u32(bytes, 60),
            unique_id: take(bytes, 68),
            saved_state: take::<1>(bytes, 84)[0] != 0,
        })
    }

    pub(crate) fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0u8; BYTES];
        let fields: [(usize, &[u8]); 15] = [
            (0, COOKIE),
            (8, &self.features.to_be_bytes()),
            (12, &self.version.to_be_bytes()),
            (16, &self.data_offset.to_be_bytes()),
            (24, &self.time_stamp.to_be_bytes()),
            (28, &self.creator_application),
            (32, &self.creator_version.to_be_bytes()),
            (36, &self.creator_host_os),
            (40, &self.original_size.to_be_bytes()),
            (48, &self.current_size.to_be_bytes()),
            (56, &self.geometry.cylinders.to_be_bytes()),
            (58, &[self.geometry.heads, self.geometry.sectors_per_track]),
            (60, &self.disk_type.to_be_bytes()),
            (68, &self.unique_id),
            (84, &[u8::from(self.saved_state)]),
        ];
        for (at, field) in fields {
            bytes[at..at + field.len()].copy_from_slice(field);
        }
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    pub(crate) fn disk_type_of(kind: Kind) -> u32 {
        match kind {
            Kind::Fixed => 2,
            Kind::Dynamic => 3,
            Kind::Differencing => 4,
        }
    }

    pub(crate) fn kind(&self) -> Result<Kind, ImageError> {
        match self.disk_type {
            2 => Ok(Kind::Fixed),
            3 => Ok(Kind::Dynamic),
            4 => Ok(Kind::Differencing),
            other => Err(unsupported(format!(
                "Disk Type {other} (2 fixed, 3 dynamic and 4 differencing are read; 5 and 6 are deprecated)"
            ))),
        }
    }

    /// Bytes of the disk and the field that says so; checked against the limit of the format.
    pub(crate) fn size(&self, offset: u64) -> Result<(u64, SizeRule), ImageError> {
        let by_geometry = GEOMETRY_CREATORS.contains(&&self.creator_application)
            && self.geometry != MAX_GEOMETRY
            && self.geometry.sectors() != 0;
        let (size, rule) = if by_geometry {
            (self.geometry.sectors() * SECTOR, SizeRule::Geometry)
        } else {
            (self.current_size, SizeRule::CurrentSize)
        };
        if size == 0 || size > MAX_SIZE || size % SECTOR != 0 {
            return Err(damaged(
                NAME,
                offset,
                format!(
                    "a disk of {size} bytes; expected whole sectors of {SECTOR}, at most {MAX_SIZE} bytes"
                ),
            ));
        }
        Ok((size, rule))
    }
}

/// The footer that rules, and where it was found.
pub(crate) struct Found {
    pub(crate) footer: Footer,
    pub(crate) place: FooterPlace,
    /// Where the footer used lies.
    pub(crate) offset: u64,
    /// The copy at the front is a good footer and equal (asked of dynamic and differencing disks only).
    pub(crate) front_equal: bool,
}

/// Whether the file has the cookie where a VHD has it: in its last sector, or at its front.
pub fn has_cookie(file: &dyn BlockDevice) -> Result<bool, ImageError> {
    let Some((tail, _)) = read_tail(file)? else { return Ok(false) };
    Ok(tail.starts_with(COOKIE) || read_front(file)?.starts_with(COOKIE))
}

/// The last footer-sized bytes and where they begin; `None` if the file is too short to hold one.
fn read_tail(file: &dyn BlockDevice) -> Result<Option<([u8; BYTES], u64)>, ImageError> {
    let Some(offset) = file.size().checked_sub(BYTES as u64) else { return Ok(None) };
    let mut tail = [0u8; BYTES];
    file.read_at(offset, &mut tail)?;
    if !tail.starts_with(COOKIE) && tail[1..].starts_with(COOKIE) {
        tail.rotate_left(1);
        tail[BYTES - 1] = 0;
        return Ok(Some((tail, offset + 1)));
    }
    Ok(Some((tail, offset)))
}

fn read_front(file: &dyn BlockDevice) -> Result<[u8; BYTES], ImageError> {
    let mut front = [0u8; BYTES];
    file.read_at(0, &mut front)?;
    Ok(front)
}

/// Finds the footer. See the head of the module for the order and why.
pub(crate) fn find(file: &dyn BlockDevice) -> Result<Found, ImageError> {
    let not_vhd = |reason: String| ImageError::NotThisFormat { format: ImageFormat::Vhd, reason };
    let Some((tail, tail_offset)) = read_tail(file)? else {
        return Err(not_vhd(format!("the file has {} bytes, less than a footer", file.size())));
    };
    let end = Footer::parse(&tail);
    let fixed = be_u32(&tail, 60) == Footer::disk_type_of(Kind::Fixed);
    let found = match end {
        Ok(footer) => {
            let front_equal = !fixed && read_front(file)? == tail;
            Found { footer, place: FooterPlace::End, offset: tail_offset, front_equal }
        }
        Err(fault) => {
            if let Fault::Checksum { stored, computed } = fault
                && fixed
            {
                return Err(damaged(NAME, tail_offset, wrong_checksum(stored, computed)));
            }
            let front = read_front(file)?;
            match (Footer::parse(&front), fault) {
                (Ok(footer), _) if footer.disk_type != Footer::disk_type_of(Kind::Fixed) => {
                    Found { footer, place: FooterPlace::Front, offset: 0, front_equal: true }
                }
                (_, Fault::Checksum { stored, computed }) => {
                    return Err(damaged(NAME, tail_offset, wrong_checksum(stored, computed)));
                }
                (Err(Fault::Checksum { stored, computed }), Fault::NoCookie) => {
                    return Err(damaged(NAME, 0, wrong_checksum(stored, computed)));
                }
                (_, Fault::NoCookie) => {
                    return Err(not_vhd(format!(
                        "no cookie \"conectix\" at byte {tail_offset} (the last sector), nor a copy at byte 0"
                    )));
                }
            }
        }
    };
    if found.footer.version >> 16 != 1 {
        return Err(unsupported(format!(
            "File Format Version {}.{} (1.0 is read)",
            found.footer.version >> 16,
            found.footer.version & 0xFFFF
        )));
    }
    Ok(found)
}

fn wrong_checksum(stored: u32, computed: u32) -> String {
    format!("checksum {stored:#010x}, expected {computed:#010x}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Numbers from the appendix, worked by hand.
    #[test]
    fn geometry_as_the_appendix_calculates() {
        let of = |sectors| {
            let geometry = Geometry::for_sectors(sectors);
            (geometry.cylinders, geometry.heads, geometry.sectors_per_track)
        };
        assert_eq!(of(2048), (30, 4, 17));
        assert_eq!(of(20_480), (301, 4, 17));
        assert_eq!(of(204_800), (1003, 12, 17));
        assert_eq!(of(2_097_152), (2080, 16, 63));
        assert_eq!(of(65_535 * 16 * 63), (16_191, 16, 255));
        assert_eq!(of(u64::MAX), (65_535, 16, 255));
        for sectors in [1u64, 67, 68, 17 * 4 * 1024 - 1, 17 * 16 * 1024, 31 * 16 * 1024, 1 << 28] {
            assert!(Geometry::for_sectors(sectors).sectors() <= sectors);
        }
    }

    fn footer(creator: &[u8; 4], geometry: Geometry, current_size: u64) -> Footer {
        Footer {
            features: 2,
            version: 0x0001_0000,
            data_offset: u64::MAX,
            time_stamp: 1,
            creator_application: *creator,
            creator_version: 0,
            creator_host_os: *b"Wi2k",
            original_size: current_size,
            current_size,
            geometry,
            disk_type: 2,
            unique_id: [7; 16],
            saved_state: false,
        }
    }

    #[test]
    fn size_by_creator() {
        let current = 10 << 20;
        let geometry = Geometry::for_sectors(current / 512);
        assert!(geometry.sectors() * 512 < current);
        for creator in [b"vpc ", b"qemu", b"vs  "] {
            let size = footer(creator, geometry, current).size(0).unwrap();
            assert_eq!(size, (geometry.sectors() * 512, SizeRule::Geometry));
            let size = footer(creator, MAX_GEOMETRY, current).size(0).unwrap();
            assert_eq!(size, (current, SizeRule::CurrentSize));
        }
        for creator in [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"????"] {
            let size = footer(creator, geometry, current).size(0).unwrap();
            assert_eq!(size, (current, SizeRule::CurrentSize));
        }
    }

    #[test]
    fn a_size_past_the_limit_or_of_broken_sectors_is_damage() {
        for current in [0, 511, 513, MAX_SIZE + 512, u64::MAX] {
            assert!(footer(b"win ", MAX_GEOMETRY, current).size(0).is_err(), "{current}");
        }
        assert!(footer(b"win ", MAX_GEOMETRY, MAX_SIZE).size(0).is_ok());
    }

    #[test]
    fn encoded_footers_parse_equal() {
        let footer = footer(b"win ", Geometry::for_sectors(9999), 9999 * 512);
        assert_eq!(Footer::parse(&footer.encode()).ok(), Some(footer));
    }
}

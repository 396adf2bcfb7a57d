//! Packs (section 6).

use model::{DomainId, PoolId};

use super::{FormatError, check_head, head, take, u16_at, u32_at, u64_at};
use crate::chunk::{ChunkId, PackId};

const MAGIC: &[u8; 8] = b"STPPACK1";
const END: &[u8; 8] = b"STPPEND1";
const FRAME: [u8; 4] = *b"FRM1";
/// Bytes of header and of trailer.
pub const HEADER: usize = 64;
/// Bytes of a frame's header.
pub const FRAME_HEADER: usize = 32;
/// Frames begin at multiples of this, so that a location fits 24 bits.
pub const ALIGN: u64 = 64;
/// Most chunks in a frame.
pub const MAX_CHUNKS: usize = 16;
/// Most decoded bytes of a frame: 16 blocks.
pub const MAX_DECODED: u32 = 16 * 65_536;
/// Most stored bytes of a frame: nothing is stored that encoding made larger, plus the tag.
pub const MAX_STORED: u32 = MAX_DECODED + 16 + 512;

/// Largest pack that is read; writers end theirs at an eighth of this.
pub const MAX_PACK: u64 = 256 << 20;

/// What a pack's chunks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum PackKind {
    /// Blocks of 65,536 bytes.
    Blocks = 1,
    /// Map nodes.
    Nodes = 2,
}

impl PackKind {
    /// The kind of a number.
    pub fn of(number: u16) -> Option<PackKind> {
        match number {
            1 => Some(PackKind::Blocks),
            2 => Some(PackKind::Nodes),
            _ => None,
        }
    }
}

/// Head of a pack file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackHeader {
    /// What its chunks are.
    pub kind: PackKind,
    /// Key generation under which it is sealed.
    pub generation: u16,
    /// The pool.
    pub pool: PoolId,
    /// The key domain.
    pub domain: DomainId,
    /// The pack; equals the file name.
    pub pack: PackId,
}

impl PackHeader {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..12].copy_from_slice(&head(MAGIC));
        bytes[12..14].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[14..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.pool.0);
        bytes[32..48].copy_from_slice(&self.domain.0);
        bytes[48..64].copy_from_slice(&self.pack.0);
        bytes
    }

    /// The header in `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<PackHeader, FormatError> {
        check_head(bytes, MAGIC)?;
        let kind =
            PackKind::of(u16_at(bytes, 12)?).ok_or_else(|| FormatError::at(12, "unknown kind of pack"))?;
        Ok(PackHeader {
            kind,
            generation: u16_at(bytes, 14)?,
            pool: PoolId(take(bytes, 16)?),
            domain: DomainId(take(bytes, 32)?),
            pack: PackId(take(bytes, 48)?),
        })
    }
}

/// Head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Sealed bytes, tag included.
    pub stored: u32,
    /// 0 plain, 1 zstd.
    pub codec: u8,
    /// Chunks in it.
    pub chunks: u8,
    /// Bytes when decoded.
    pub decoded: u32,
    /// Short hash of the sealed bytes.
    pub hash: [u8; 16],
}

impl FrameHeader {
    /// Its bytes.
    pub fn encode(&self) -> [u8; FRAME_HEADER] {
        let mut bytes = [0u8; FRAME_HEADER];
        bytes[..4].copy_from_slice(&FRAME);
        bytes[4..8].copy_from_slice(&self.stored.to_le_bytes());
        bytes[8] = self.codec;
        bytes[9] = self.chunks;
        bytes[12..16].copy_from_slice(&self.decoded.to_le_bytes());
        bytes[16..].copy_from_slice(&self.hash);
        bytes
    }

    /// The header in `bytes`; `offset` is where it stands in the file, for the error.
    pub fn decode(bytes: &[u8], offset: u64) -> Result<FrameHeader, FormatError> {
        let bad = |reason: String| FormatError::at(offset, reason);
        if take::<4>(bytes, 0).map_err(|_| bad("the frame's header is cut off".to_owned()))? != FRAME {
            return Err(bad("no frame begins here".to_owned()));
        }
        let header = FrameHeader {
            stored: u32_at(bytes, 4)?,
            codec: take::<1>(bytes, 8)?[0],
            chunks: take::<1>(bytes, 9)?[0],
            decoded: u32_at(bytes, 12)?,
            hash: take(bytes, 16)?,
        };
        if header.stored < 16 || header.stored > MAX_STORED || header.decoded > MAX_DECODED {
            return Err(bad(format!("frame of {} bytes, {} decoded", header.stored, header.decoded)));
        }
        if header.chunks == 0
            || usize::from(header.chunks) > MAX_CHUNKS
            || header.codec > 1
            || u16_at(bytes, 10)? != 0
        {
            return Err(bad(format!("frame of {} chunks, codec {}", header.chunks, header.codec)));
        }
        Ok(header)
    }
}

/// Bytes that a frame of `stored` sealed bytes takes, padding included.
pub fn frame_span(stored: u32) -> u64 {
    (FRAME_HEADER as u64 + u64::from(stored)).next_multiple_of(ALIGN)
}

/// An entry of the table of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableEntry {
    /// The chunk.
    pub id: ChunkId,
    /// Frame and place, as in [`crate::chunk::Location`].
    pub location: u32,
}

/// The table's bytes before sealing.
pub fn encode_table(entries: &[TableEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * 20);
    for entry in entries {
        bytes.extend_from_slice(&entry.id.0);
        bytes.extend_from_slice(&entry.location.to_le_bytes());
    }
    bytes
}

/// Bytes that a table of so many chunks takes in the file.
pub fn table_bytes(chunks: usize) -> u64 {
    chunks as u64 * 20 + crate::keys::TAG as u64
}

/// The table in unsealed `bytes`.
pub fn decode_table(bytes: &[u8]) -> Result<Vec<TableEntry>, FormatError> {
    let (entries, rest) = bytes.as_chunks::<20>();
    if !rest.is_empty() {
        return Err(FormatError::at(0, "the table of chunks is not a multiple of 20 bytes"));
    }
    entries
        .iter()
        .map(|entry| {
            let location = u32_at(entry, 16)?;
            if location >= crate::chunk::LOCATION_END {
                return Err(FormatError::at(
                    0,
                    format!("the table names location {location:#x}, of 24 bits"),
                ));
            }
            Ok(TableEntry { id: ChunkId(take(entry, 0)?), location })
        })
        .collect()
}

/// End of a pack file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Where the sealed table begins.
    pub table_offset: u64,
    /// Its sealed bytes.
    pub table_stored: u32,
    /// Chunks in the table.
    pub chunks: u32,
    /// Frames before it.
    pub frames: u32,
}

impl Trailer {
    /// Its bytes, with the hash over header and sealed table.
    pub fn encode(&self, header: &[u8; HEADER], sealed_table: &[u8]) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..8].copy_from_slice(END);
        bytes[8..16].copy_from_slice(&self.table_offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.table_stored.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.chunks.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.frames.to_le_bytes());
        let mut hasher = blake3::Hasher::new();
        hasher.update(header).update(sealed_table).update(&bytes[..32]);
        bytes[32..].copy_from_slice(hasher.finalize().as_bytes());
        bytes
    }

    /// The trailer in `bytes` of a file of `length` bytes; its hash is checked by [`Trailer::check`].
    pub fn decode(bytes: &[u8; HEADER], length: u64) -> Result<Trailer, FormatError> {
        let at = length.saturating_sub(HEADER as u64);
        if length > MAX_PACK {
            return Err(FormatError::at(0, format!("a pack of {length} bytes, at most {MAX_PACK} are read")));
        }
        if bytes[..8] != *END || bytes[28..32] != [0; 4] {
            return Err(FormatError::at(at, "no trailer: the pack is cut off or overwritten"));
        }
        let trailer = Trailer {
            table_offset: u64_at(bytes, 8)?,
            table_stored: u32_at(bytes, 16)?,
            chunks: u32_at(bytes, 20)?,
            frames: u32_at(bytes, 24)?,
        };
        let end = trailer.table_offset.checked_add(u64::from(trailer.table_stored));
        let expected = u64::from(trailer.chunks) * 20 + 16;
        if end != Some(at)
            || trailer.table_offset < HEADER as u64
            || u64::from(trailer.table_stored) != expected
        {
            return Err(FormatError::at(at, "the trailer contradicts the length of the file"));
        }
        Ok(trailer)
    }

    /// Whether the hash in `bytes` fits header and sealed table.
    pub fn check(bytes: &[u8; HEADER], header: &[u8], sealed_table: &[u8]) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header).update(sealed_table).update(&bytes[..32]);
        hasher.finalize().as_bytes()[..] == bytes[32..]
    }
}

/// Folder of a pack.
pub fn folder(pack: PackId) -> String {
    format!("packs/{:02x}", pack.0[0])
}

/// Name of a pack in the pool's folder.
pub fn name(pack: PackId) -> String {
    format!("{}/{pack}.pack", folder(pack))
}

/// Pack of the last part of a name.
pub fn id(name: &str) -> Option<PackId> {
    name.strip_suffix(".pack")?.parse().ok()
}

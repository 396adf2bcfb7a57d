//! Parity of a pack (section 6.1).

use super::{FormatError, short_hash, take, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"STPPARI1";
/// Bytes of a sector.
pub const SECTOR: u64 = 4096;
/// Bytes of the footer, which stands at both ends of the parity.
pub const FOOTER: usize = 64;
/// Bytes of a sector's hash.
pub const HASH: usize = 8;
/// Most parity that a pool can have, in percent.
pub const MAX_PERCENT: u32 = 50;
/// Largest file of a pack with its parity that is read.
pub const MAX_FILE: u64 = 2 * super::pack::MAX_PACK;

/// Where everything is in a pack with parity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the pack without its parity.
    pub content: u64,
    /// Sectors of these; the last one is padded with zeros.
    pub sectors: u32,
    /// Sectors of parity.
    pub groups: u32,
}

impl Layout {
    /// The layout of `content` bytes with `percent` of parity, at least one sector of it.
    pub fn new(content: u64, percent: u32) -> Option<Layout> {
        let sectors = u32::try_from(content.div_ceil(SECTOR)).ok().filter(|&sectors| sectors > 0)?;
        let groups = u64::from(sectors) * u64::from(percent.min(MAX_PERCENT));
        Some(Layout { content, sectors, groups: u32::try_from(groups.div_ceil(100)).ok()?.max(1) })
    }

    /// Bytes of the hashes.
    pub fn hashes(&self) -> u64 {
        (u64::from(self.sectors) + u64::from(self.groups)) * HASH as u64
    }

    /// Where the first footer stands; the first hashes follow it.
    pub fn first(&self) -> u64 {
        self.content.next_multiple_of(SECTOR)
    }

    /// Where the sectors of parity begin.
    pub fn parity(&self) -> u64 {
        (self.first() + FOOTER as u64 + self.hashes()).next_multiple_of(SECTOR)
    }

    /// Where the second hashes begin; the last footer follows them.
    pub fn second(&self) -> u64 {
        self.parity() + u64::from(self.groups) * SECTOR
    }

    /// Bytes of the file.
    pub fn file(&self) -> u64 {
        self.second() + self.hashes() + FOOTER as u64
    }
}

/// A footer's bytes.
pub fn encode(layout: &Layout, hashes: &[u8]) -> [u8; FOOTER] {
    let mut bytes = [0u8; FOOTER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&layout.content.to_le_bytes());
    bytes[16..20].copy_from_slice(&layout.sectors.to_le_bytes());
    bytes[20..24].copy_from_slice(&layout.groups.to_le_bytes());
    bytes[32..48].copy_from_slice(&short_hash(&[hashes]));
    let own = short_hash(&[&bytes[..48]]);
    bytes[48..].copy_from_slice(&own);
    bytes
}

/// The layout in a footer, and the short hash of its hashes. Whether it fits the file is the caller's to ask.
pub fn decode(bytes: &[u8]) -> Result<(Layout, [u8; 16]), FormatError> {
    if take::<8>(bytes, 0)? != *MAGIC {
        return Err(FormatError::at(0, "no parity begins or ends here"));
    }
    if take::<16>(bytes, 48)? != short_hash(&[&bytes[..48]]) || u64_at(bytes, 24)? != 0 {
        return Err(FormatError::at(0, "the footer of the parity does not fit its hash"));
    }
    let layout =
        Layout { content: u64_at(bytes, 8)?, sectors: u32_at(bytes, 16)?, groups: u32_at(bytes, 20)? };
    let most = u64::from(layout.sectors).div_ceil(2).max(1);
    let is_consistent = layout.content <= super::pack::MAX_PACK
        && layout.content >= 2 * super::pack::HEADER as u64
        && u64::from(layout.sectors) == layout.content.div_ceil(SECTOR)
        && (1..=most).contains(&u64::from(layout.groups));
    if !is_consistent {
        return Err(FormatError::at(8, "the footer of the parity contradicts itself"));
    }
    Ok((layout, take(bytes, 32)?))
}

/// A sector's hash.
pub fn sector_hash(sector: &[u8]) -> [u8; HASH] {
    let mut hash = [0u8; HASH];
    hash.copy_from_slice(&blake3::hash(sector).as_bytes()[..HASH]);
    hash
}

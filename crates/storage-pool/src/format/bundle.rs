//! Bundles: many records in one sealed file (section 5.1). Derived from the records, and never more than they say.

use model::PoolId;

use super::{FormatError, check_head, head, take, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"STPBUNDL";
/// Bytes before the sealed content.
pub const HEADER: usize = 72;
const HASH: usize = 32;
/// Bytes of a record in a bundle besides its payload.
const RECORD: usize = 22;
/// Most bytes of records in one bundle: it is in memory as a whole.
pub const MAX_CONTENT: usize = 32 << 20;
/// Largest file that is read.
pub const MAX_BYTES: u64 = (MAX_CONTENT + HEADER + HASH + HASH + crate::keys::TAG) as u64;

/// The clear part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BundleHeader {
    /// Key generation under which it is sealed.
    pub generation: u16,
    /// The pool.
    pub pool: PoolId,
    /// Number of the first record.
    pub first: u64,
    /// Number of the last record.
    pub last: u64,
    /// Makes the bundle's key its own.
    pub salt: [u8; 16],
}

impl BundleHeader {
    /// Bytes 0..72 for a sealed content of `sealed` bytes.
    pub fn encode(&self, sealed: usize) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..12].copy_from_slice(&head(MAGIC));
        bytes[12..14].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.pool.0);
        bytes[32..40].copy_from_slice(&self.first.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.last.to_le_bytes());
        bytes[48..64].copy_from_slice(&self.salt);
        bytes[64..].copy_from_slice(&(sealed as u64).to_le_bytes());
        bytes
    }
}

/// A whole file from header and sealed content.
pub fn encode(header: &[u8; HEADER], sealed: &[u8]) -> Vec<u8> {
    let mut bytes = header.to_vec();
    bytes.extend_from_slice(sealed);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

/// Header, its bytes and the sealed content of a file whose hash is right.
pub fn decode(bytes: &[u8]) -> Result<(BundleHeader, [u8; HEADER], &[u8]), FormatError> {
    let end = bytes.len().saturating_sub(HASH);
    if bytes.len() < HEADER + HASH || take::<HASH>(bytes, end)? != *blake3::hash(&bytes[..end]).as_bytes() {
        return Err(FormatError::at(0, "the bundle does not match its hash"));
    }
    check_head(bytes, MAGIC)?;
    let raw: [u8; HEADER] = take(bytes, 0)?;
    if u16_at(bytes, 14)? != 0 {
        return Err(FormatError::at(14, "reserved bytes are not zero"));
    }
    if u64_at(bytes, 64)? != (end - HEADER) as u64 {
        return Err(FormatError::at(64, format!("a content of {} bytes is there", end - HEADER)));
    }
    let header = BundleHeader {
        generation: u16_at(bytes, 12)?,
        pool: PoolId(take(bytes, 16)?),
        first: u64_at(bytes, 32)?,
        last: u64_at(bytes, 40)?,
        salt: take(bytes, 48)?,
    };
    if header.first == 0 || header.last < header.first {
        return Err(FormatError::at(32, format!("records {} to {}", header.first, header.last)));
    }
    Ok((header, raw, &bytes[HEADER..end]))
}

/// A record in a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bundled<'a> {
    /// As in its header.
    pub epoch: u64,
    /// As in its header.
    pub time: u64,
    /// As in its header.
    pub kind: u16,
    /// Its payload.
    pub payload: &'a [u8],
}

/// Adds a record to a content.
pub fn push(content: &mut Vec<u8>, record: &Bundled<'_>) {
    content.extend_from_slice(&record.epoch.to_le_bytes());
    content.extend_from_slice(&record.time.to_le_bytes());
    content.extend_from_slice(&record.kind.to_le_bytes());
    content.extend_from_slice(&(record.payload.len() as u32).to_le_bytes());
    content.extend_from_slice(record.payload);
}

/// Bytes that a record takes in a content.
pub fn cost(payload: usize) -> usize {
    RECORD + payload
}

/// Calls `each` for the `count` records of an opened content; returns the bytes of the records, and the hash of the last
/// one's file, which stands at the end.
pub fn records<'a>(
    content: &'a [u8],
    count: u64,
    mut each: impl FnMut(Bundled<'a>) -> Result<(), FormatError>,
) -> Result<(&'a [u8], [u8; HASH]), FormatError> {
    let mut at = 0usize;
    for _ in 0..count {
        let length = u32_at(content, at + 18)? as usize;
        let from = at + RECORD;
        let payload = from
            .checked_add(length)
            .and_then(|end| content.get(from..end))
            .ok_or_else(|| FormatError::at(at as u64, format!("a payload of {length} bytes is cut off")))?;
        each(Bundled {
            epoch: u64_at(content, at)?,
            time: u64_at(content, at + 8)?,
            kind: u16_at(content, at + 16)?,
            payload,
        })?;
        at = from + length;
    }
    if content.len() != at + HASH {
        return Err(FormatError::at(at as u64, "the content is longer or shorter than its records"));
    }
    Ok((&content[..at], take(content, at)?))
}

/// Name of the bundle of these records in the pool's folder.
pub fn name(first: u64, last: u64) -> String {
    format!("index/{first:016x}-{last:016x}.records")
}

/// First and last number of a bundle by the last part of its name.
pub fn span(name: &str) -> Option<(u64, u64)> {
    let (first, last) = name.strip_suffix(".records")?.split_once('-')?;
    let number = |digits: &str| {
        (digits.len() == 16 && digits.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c)))
            .then(|| u64::from_str_radix(digits, 16).ok())
            .flatten()
    };
    let (first, last) = (number(first)?, number(last)?);
    (first > 0 && first <= last).then_some((first, last))
}

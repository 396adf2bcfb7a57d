//! Bytes on disk: docs/formats/storage-pool.md. Nothing outside this folder knows an offset.
//!
//! Every decoder takes untrusted bytes: checked arithmetic, no panic, memory bounded by the length of the file.

pub mod ballast;
pub mod bundle;
pub mod counts;
pub mod key;
pub mod node;
pub mod pack;
pub mod parity;
pub mod payload;
pub mod record;
pub mod ring;
pub mod run;
pub mod twin;

/// The version this program reads and writes.
pub const VERSION: u16 = 1;

/// Why bytes are not what they should be; the caller adds the file's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormatError {
    /// A newer program wrote it.
    TooNew(u16),
    /// Damage at a byte.
    Damaged {
        /// Offset in the file.
        offset: u64,
        /// Expected and found.
        reason: String,
    },
}

impl FormatError {
    /// Damage at `offset`.
    pub fn at(offset: u64, reason: impl Into<String>) -> FormatError {
        FormatError::Damaged { offset, reason: reason.into() }
    }

    /// With the file's name.
    pub fn in_file(self, path: String) -> crate::PoolError {
        match self {
            FormatError::TooNew(needs) => crate::PoolError::TooNew { path, needs, reads: VERSION },
            FormatError::Damaged { offset, reason } => crate::PoolError::Damaged { path, offset, reason },
        }
    }
}

/// `N` bytes at `at`, or damage.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], FormatError> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or_else(|| FormatError::at(bytes.len() as u64, format!("ends before byte {}", at + N)))
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Result<u16, FormatError> {
    take(bytes, at).map(u16::from_le_bytes)
}
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Result<u32, FormatError> {
    take(bytes, at).map(u32::from_le_bytes)
}
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Result<u64, FormatError> {
    take(bytes, at).map(u64::from_le_bytes)
}

/// Magic and versions, as at the head of every file.
pub(crate) fn check_head(bytes: &[u8], magic: &[u8; 8]) -> Result<(), FormatError> {
    let found: [u8; 8] = take(bytes, 0)?;
    if &found != magic {
        return Err(FormatError::at(0, format!("magic is {found:02x?}, expected {magic:02x?}")));
    }
    match (u16_at(bytes, 8)?, u16_at(bytes, 10)?) {
        (VERSION, VERSION) => Ok(()),
        (0, _) | (_, 0) => Err(FormatError::at(8, "version 0")),
        (read, write) => Err(FormatError::TooNew(read.max(write))),
    }
}

pub(crate) fn head(magic: &[u8; 8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes
}

pub(crate) fn short_hash(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut short = [0u8; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    short
}

//! Records of the sequence (section 5).

use model::PoolId;

use super::{FormatError, check_head, head, take, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"STPRECRD";
/// Bytes before the payload.
pub const HEADER: usize = 112;
/// Largest record that is read: a point of a machine with many disks takes kilobytes; a quarantine or permit of a
/// million packs 16 MB.
pub const MAX_BYTES: u64 = 64 << 20;
/// Largest record that is written, but for one that restores another and so must hold it.
pub const MAX_NEW_BYTES: u64 = 32 << 20;
/// What stands for the hash of the record before when that record could not be read.
pub const UNKNOWN: [u8; 32] = [0; 32];

/// The clear part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What it is; see [`super::payload`].
    pub kind: u16,
    /// Key generation under which it is sealed.
    pub generation: u16,
    /// The pool.
    pub pool: PoolId,
    /// Its number; equals the file name.
    pub number: u64,
    /// Takeovers so far.
    pub epoch: u64,
    /// The writer's time, microseconds since 1970.
    pub time: u64,
    /// Hash of the file before.
    pub previous: [u8; 32],
    /// Makes the record key its own.
    pub salt: [u8; 16],
}

impl RecordHeader {
    /// Bytes 0..112 for a sealed payload of `sealed` bytes.
    pub fn encode(&self, sealed: usize) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..12].copy_from_slice(&head(MAGIC));
        bytes[12..14].copy_from_slice(&self.kind.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.pool.0);
        bytes[32..40].copy_from_slice(&self.number.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.time.to_le_bytes());
        bytes[56..88].copy_from_slice(&self.previous);
        bytes[88..104].copy_from_slice(&self.salt);
        bytes[104..108].copy_from_slice(&(sealed as u32).to_le_bytes());
        bytes
    }
}

/// A whole file from header and sealed payload.
pub fn encode(header: &[u8; HEADER], sealed: &[u8]) -> Vec<u8> {
    let mut bytes = header.to_vec();
    bytes.extend_from_slice(sealed);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

/// Header and sealed payload of a file whose hash is right.
pub fn decode(bytes: &[u8]) -> Result<(RecordHeader, [u8; HEADER], &[u8]), FormatError> {
    // Magic and the hash at the end are the same in every version, so that damage is not taken for a newer version.
    if take::<8>(bytes, 0)? == *MAGIC {
        let end = bytes.len().saturating_sub(32);
        if bytes.len() < HEADER + 32 || take::<32>(bytes, end)? != *blake3::hash(&bytes[..end]).as_bytes() {
            return Err(FormatError::at(0, "the record does not match its hash"));
        }
    }
    check_head(bytes, MAGIC)?;
    let raw: [u8; HEADER] = take(bytes, 0)?;
    let sealed = u32_at(bytes, 104)? as usize;
    let end = HEADER.checked_add(sealed).filter(|&end| end + 32 == bytes.len()).ok_or_else(|| {
        FormatError::at(104, format!("payload of {sealed} bytes in a file of {} bytes", bytes.len()))
    })?;
    if u32_at(bytes, 108)? != 0 {
        return Err(FormatError::at(108, "reserved bytes are not zero"));
    }
    let header = RecordHeader {
        kind: u16_at(bytes, 12)?,
        generation: u16_at(bytes, 14)?,
        pool: PoolId(take(bytes, 16)?),
        number: u64_at(bytes, 32)?,
        epoch: u64_at(bytes, 40)?,
        time: u64_at(bytes, 48)?,
        previous: take(bytes, 56)?,
        salt: take(bytes, 88)?,
    };
    Ok((header, raw, &bytes[HEADER..end]))
}

/// Name of record `number` in the pool's folder.
pub fn name(number: u64) -> String {
    format!("sequence/{number:016x}.record")
}

/// Number of a record by the last part of its name.
pub fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".record")?;
    (digits.len() == 16 && digits.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c)))
        .then(|| u64::from_str_radix(digits, 16).ok())
        .flatten()
}

//! Ring files (section 3.4): the root of a key generation for every recipient, and the roots before it.

use model::PoolId;

use super::{FormatError, take, u16_at};
use crate::kit::RecipientId;

/// Bytes before the sealed older roots.
pub const HEADER: usize = 48;
/// Bytes of an entry.
pub const ENTRY: usize = 136;
/// Bytes of an entry that its seal covers.
pub const ENTRY_HEAD: usize = 88;
/// Bytes of an older root: its generation and itself.
pub const OLDER: usize = 34;
/// Bytes of a proof: its generation and itself.
pub const PROOF: usize = 18;

/// A root wrapped for one recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingEntry {
    /// Whose.
    pub recipient: RecipientId,
    /// 1 server, 2 recovery kit.
    pub kind: u16,
    /// The recipient's public key.
    pub public: [u8; 32],
    /// The public key made for this wrap.
    pub once: [u8; 32],
    /// The root, sealed.
    pub sealed: [u8; 48],
}

impl RingEntry {
    /// The bytes that the seal covers.
    pub fn head(&self) -> [u8; ENTRY_HEAD] {
        let mut bytes = [0u8; ENTRY_HEAD];
        bytes[..16].copy_from_slice(&self.recipient.0);
        bytes[16..18].copy_from_slice(&self.kind.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.public);
        bytes[56..].copy_from_slice(&self.once);
        bytes
    }
}

/// Content of a ring file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ring {
    /// The pool.
    pub pool: PoolId,
    /// The key generation.
    pub generation: u16,
    /// Makes the key of the older roots its own.
    pub salt: [u8; 16],
    /// The older roots, sealed under this generation.
    pub older: Vec<u8>,
    /// For each recipient.
    pub entries: Vec<RingEntry>,
    /// By each older generation: that whoever made the ring had its root.
    pub proofs: Vec<(u16, [u8; 16])>,
}

/// Bytes of so many older roots, sealed.
pub fn sealed_older(generations: usize) -> usize {
    generations * OLDER + crate::keys::TAG
}

impl Ring {
    /// The bytes that the seal of the older roots covers.
    pub fn head(&self) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..16].copy_from_slice(&self.pool.0);
        bytes[16..18].copy_from_slice(&self.generation.to_le_bytes());
        bytes[18..20].copy_from_slice(&(self.entries.len() as u16).to_le_bytes());
        bytes[20..22].copy_from_slice(&(self.proofs.len() as u16).to_le_bytes());
        bytes[32..].copy_from_slice(&self.salt);
        bytes
    }

    /// What the proof by an older generation has to be, by its key: over everything before the proofs.
    pub fn proof_of(&self, key: &[u8; 32]) -> [u8; 16] {
        let content = self.encode();
        let end = content.len() - self.proofs.len() * PROOF;
        let mut proof = [0u8; 16];
        proof.copy_from_slice(&blake3::keyed_hash(key, &content[..end]).as_bytes()[..16]);
        proof
    }

    /// The content of the twin file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.head().to_vec();
        bytes.extend_from_slice(&self.older);
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.head());
            bytes.extend_from_slice(&entry.sealed);
        }
        for (generation, proof) in &self.proofs {
            bytes.extend_from_slice(&generation.to_le_bytes());
            bytes.extend_from_slice(proof);
        }
        bytes
    }

    /// The ring in the content of a twin file.
    pub fn decode(bytes: &[u8]) -> Result<Ring, FormatError> {
        let (entries, generations) = (usize::from(u16_at(bytes, 18)?), usize::from(u16_at(bytes, 20)?));
        let older = sealed_older(generations);
        let proofs_at = HEADER + older + entries * ENTRY;
        if bytes.len() != proofs_at + generations * PROOF {
            let found = format!("{entries} entries and {generations} generations in {} bytes", bytes.len());
            return Err(FormatError::at(18, found));
        }
        if take::<10>(bytes, 22)? != [0; 10] {
            return Err(FormatError::at(22, "reserved bytes are not zero"));
        }
        let entry = |at: usize| -> Result<RingEntry, FormatError> {
            if take::<6>(bytes, at + 18)? != [0; 6] {
                return Err(FormatError::at(at as u64, "reserved bytes are not zero"));
            }
            Ok(RingEntry {
                recipient: RecipientId(take(bytes, at)?),
                kind: u16_at(bytes, at + 16)?,
                public: take(bytes, at + 24)?,
                once: take(bytes, at + 56)?,
                sealed: take(bytes, at + ENTRY_HEAD)?,
            })
        };
        let proof = |at: usize| -> Result<(u16, [u8; 16]), FormatError> {
            Ok((u16_at(bytes, at)?, take(bytes, at + 2)?))
        };
        Ok(Ring {
            pool: PoolId(take(bytes, 0)?),
            generation: u16_at(bytes, 16)?,
            salt: take(bytes, 32)?,
            older: bytes.get(HEADER..HEADER + older).unwrap_or_default().to_vec(),
            entries: (0..entries).map(|n| entry(HEADER + older + n * ENTRY)).collect::<Result<_, _>>()?,
            proofs: (0..generations).map(|n| proof(proofs_at + n * PROOF)).collect::<Result<_, _>>()?,
        })
    }
}

/// Names of the two files of a generation's ring: one is enough.
pub fn names(generation: u16) -> [String; 2] {
    [format!("keys/{generation:04x}.ring"), format!("keys/{generation:04x}-again.ring")]
}

/// Generation of a ring file by the last part of its name.
pub fn generation(name: &str) -> Option<u16> {
    let digits = name.strip_suffix(".ring")?;
    let digits = digits.strip_suffix("-again").unwrap_or(digits);
    (digits.len() == 4 && digits.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c)))
        .then(|| u16::from_str_radix(digits, 16).ok())
        .flatten()
}

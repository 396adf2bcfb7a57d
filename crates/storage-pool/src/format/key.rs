//! Key files (section 3.1): a root wrapped for one recipient.

use model::PoolId;

use super::{FormatError, take, u16_at};
use crate::kit::RecipientId;

/// Bytes of the content.
pub const CONTENT: usize = 148;
/// Bytes of it that the seal covers.
pub const HEAD: usize = 40;
/// Bytes of it that the proof covers.
pub const PROVED: usize = 132;

/// Content of a key file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// The pool.
    pub pool: PoolId,
    /// Whose.
    pub recipient: RecipientId,
    /// 1 server, 2 recovery kit.
    pub kind: u16,
    /// Key generation of the root.
    pub generation: u16,
    /// Nonce of the seal.
    pub nonce: [u8; 12],
    /// The root, sealed.
    pub sealed: [u8; 48],
    /// The recipient's public key.
    pub public: [u8; 32],
    /// Shows that whoever made the file had the root.
    pub proof: [u8; 16],
}

impl KeyFile {
    /// The bytes that the seal covers.
    pub fn head(&self) -> [u8; HEAD] {
        let mut bytes = [0u8; HEAD];
        bytes[..16].copy_from_slice(&self.pool.0);
        bytes[16..32].copy_from_slice(&self.recipient.0);
        bytes[32..34].copy_from_slice(&self.kind.to_le_bytes());
        bytes[34..36].copy_from_slice(&self.generation.to_le_bytes());
        bytes
    }

    /// What the proof has to be, by its key.
    pub fn proof_of(&self, key: &[u8; 32]) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(&self.encode()[..PROVED]);
        let mut proof = [0u8; 16];
        proof.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        proof
    }

    /// The content of the twin file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.head().to_vec();
        bytes.extend_from_slice(&self.nonce);
        bytes.extend_from_slice(&self.sealed);
        bytes.extend_from_slice(&self.public);
        bytes.extend_from_slice(&self.proof);
        bytes
    }

    /// The key file in the content of a twin file.
    pub fn decode(bytes: &[u8]) -> Result<KeyFile, FormatError> {
        if bytes.len() != CONTENT {
            return Err(FormatError::at(12, format!("{} bytes of content, expected {CONTENT}", bytes.len())));
        }
        if take::<4>(bytes, 36)? != [0; 4] {
            return Err(FormatError::at(36, "reserved bytes are not zero"));
        }
        Ok(KeyFile {
            pool: PoolId(take(bytes, 0)?),
            recipient: RecipientId(take(bytes, 16)?),
            kind: u16_at(bytes, 32)?,
            generation: u16_at(bytes, 34)?,
            nonce: take(bytes, 40)?,
            sealed: take(bytes, 52)?,
            public: take(bytes, 100)?,
            proof: take(bytes, 132)?,
        })
    }
}

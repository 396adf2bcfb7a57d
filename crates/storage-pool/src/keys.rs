//! Keys and seals (section 3).

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use environment::Randomness;
use model::{DomainId, PoolId};

use crate::chunk::{ChunkId, ChunkKind, PackId};
use crate::error::PoolError;

/// Bytes that a seal adds.
pub const TAG: usize = 16;

/// 32 secret bytes. Never shown; wiped when dropped as far as the compiler lets it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(crate) [u8; 32]);

impl Secret {
    /// New random bytes.
    pub fn random(randomness: &dyn Randomness) -> std::io::Result<Secret> {
        let mut bytes = [0u8; 32];
        randomness.fill(&mut bytes)?;
        Ok(Secret(bytes))
    }

    /// The secret of `bytes`, as read from a file of the data folder or a kit.
    pub fn from_bytes(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// The bytes, to be written to a protected file.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0 = [0; 32];
        std::hint::black_box(&self.0);
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

fn derive(context: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// An AES-256-GCM key.
pub struct SealKey(LessSafeKey);

impl SealKey {
    fn new(key: &[u8; 32]) -> Result<SealKey, PoolError> {
        UnboundKey::new(&AES_256_GCM, key)
            .map(|key| SealKey(LessSafeKey::new(key)))
            .map_err(|_| PoolError::Misuse("AES-256-GCM refused a key of 32 bytes".to_owned()))
    }

    /// Seals `bytes` in place and appends the tag.
    pub fn seal(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut Vec<u8>) -> Result<(), PoolError> {
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), bytes)
            .map_err(|_| PoolError::Misuse("AES-256-GCM could not seal".to_owned()))
    }

    /// Opens `bytes` in place; `None` if the tag does not fit.
    pub fn open<'a>(&self, nonce: [u8; 12], aad: &[u8], bytes: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.0.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), bytes).ok()
    }
}

/// Key under which a recipient's copy of the root key is wrapped.
pub fn wrap_key(secret: &Secret, pool: PoolId) -> Result<SealKey, PoolError> {
    SealKey::new(&derive("stillpoint pool v1 wrap key", &[&secret.0, &pool.0]))
}

/// The pool's root key and what follows from it.
#[derive(Clone, Debug)]
pub struct Keys {
    pool: PoolId,
    root: Secret,
}

impl Keys {
    /// The keys of `pool` with `root`.
    pub fn new(pool: PoolId, root: Secret) -> Keys {
        Keys { pool, root }
    }

    /// The pool they belong to.
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    pub(crate) fn root(&self) -> &Secret {
        &self.root
    }

    /// Key of the record with `salt`; used once, with nonce zero.
    pub fn record(&self, salt: &[u8; 16]) -> Result<SealKey, PoolError> {
        SealKey::new(&derive("stillpoint pool v1 record key", &[&self.root.0, &self.pool.0, salt]))
    }

    /// Key of the bundle with `salt`; used once, with nonce zero.
    pub fn bundle(&self, salt: &[u8; 16]) -> Result<SealKey, PoolError> {
        SealKey::new(&derive("stillpoint pool v1 bundle key", &[&self.root.0, &self.pool.0, salt]))
    }

    /// Key of the hashes of run `number`.
    pub fn run(&self, number: u64) -> [u8; 32] {
        derive("stillpoint pool v1 run key", &[&self.root.0, &self.pool.0, &number.to_le_bytes()])
    }

    /// Key of the hashes of the file of counts `number`.
    pub fn counts(&self, number: u64) -> [u8; 32] {
        derive("stillpoint pool v1 counts key", &[&self.root.0, &self.pool.0, &number.to_le_bytes()])
    }

    /// Keys of a domain.
    pub fn domain(&self, domain: DomainId) -> DomainKeys {
        DomainKeys {
            pool: self.pool,
            domain,
            id: derive("stillpoint pool v1 id key", &[&self.root.0, &self.pool.0, &domain.0]),
            data: Secret(derive("stillpoint pool v1 data key", &[&self.root.0, &self.pool.0, &domain.0])),
        }
    }
}

/// Id key and data key of a domain.
#[derive(Clone)]
pub struct DomainKeys {
    pool: PoolId,
    /// The domain.
    pub domain: DomainId,
    id: [u8; 32],
    data: Secret,
}

impl DomainKeys {
    /// Chunk id of content with this plain hash.
    pub fn chunk_id(&self, kind: ChunkKind, hash: &[u8; 32]) -> ChunkId {
        let mut input = [0u8; 33];
        input[0] = kind as u8;
        input[1..].copy_from_slice(hash);
        let mut id = [0u8; 16];
        id.copy_from_slice(&blake3::keyed_hash(&self.id, &input).as_bytes()[..16]);
        ChunkId(id)
    }

    /// Key of a pack.
    pub fn pack(&self, pack: PackId) -> Result<SealKey, PoolError> {
        SealKey::new(&derive("stillpoint pool v1 pack key", &[&self.data.0, &self.pool.0, &pack.0]))
    }
}

/// Nonce of the frame at `offset`.
pub fn frame_nonce(offset: u64) -> [u8; 12] {
    let mut nonce = [0u8; 12];
    nonce[..8].copy_from_slice(&offset.to_le_bytes());
    nonce
}

/// Nonce of the table at `offset`.
pub fn table_nonce(offset: u64) -> [u8; 12] {
    let mut nonce = frame_nonce(offset);
    nonce[8..].copy_from_slice(b"TBL1");
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers, so that a library change that alters a key or seal cannot pass (INV-7).
    #[test]
    fn known_answers() {
        let pool = PoolId([7; 16]);
        let keys = Keys::new(pool, Secret([1; 32]));
        let domain = keys.domain(DomainId([2; 16]));
        let id = domain.chunk_id(ChunkKind::Block, &[3; 32]);
        assert_ne!(id, domain.chunk_id(ChunkKind::Node, &[3; 32]));
        assert_ne!(id, keys.domain(DomainId([4; 16])).chunk_id(ChunkKind::Block, &[3; 32]));
        assert_eq!(id.to_string(), KNOWN_ID);
        let mut sealed = b"known".to_vec();
        domain
            .pack(PackId([5; 16]))
            .and_then(|key| key.seal(frame_nonce(64), b"aad", &mut sealed))
            .unwrap_or(());
        assert_eq!(sealed.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), KNOWN_SEAL);
    }
    const KNOWN_ID: &str = "578a1673ab2c4af353a74bfd122c8c7e";
    const KNOWN_SEAL: &str = "5ff355f3cc6f7b207b5960a7aafeea258ffe30b8f6";
}

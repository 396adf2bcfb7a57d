//! Keys and seals (section 3).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey, X25519};
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

/// Told of each seal: the hash of its key, and its nonce.
pub type SealWatch = fn(key: [u8; 32], nonce: [u8; 12]);

static WATCH: OnceLock<SealWatch> = OnceLock::new();

/// Has every seal of this process told to `watch`, for good: the instrument of the test that no nonce is used twice under
/// one key. False if there is a watch already.
pub fn watch_seals(watch: SealWatch) -> bool {
    WATCH.set(watch).is_ok()
}

/// An AES-256-GCM key.
pub struct SealKey {
    key: LessSafeKey,
    /// Hash of the key, where somebody watches.
    watched: Option<[u8; 32]>,
}

impl SealKey {
    fn new(key: &[u8; 32]) -> Result<SealKey, PoolError> {
        let watched = WATCH.get().map(|_| *blake3::hash(key).as_bytes());
        UnboundKey::new(&AES_256_GCM, key)
            .map(|key| SealKey { key: LessSafeKey::new(key), watched })
            .map_err(|_| PoolError::Misuse("AES-256-GCM refused a key of 32 bytes".to_owned()))
    }

    /// Seals `bytes` in place and appends the tag.
    pub fn seal(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut Vec<u8>) -> Result<(), PoolError> {
        if let Some((watch, key)) = WATCH.get().zip(self.watched) {
            watch(key, nonce);
        }
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), bytes)
            .map_err(|_| PoolError::Misuse("AES-256-GCM could not seal".to_owned()))
    }

    /// Opens `bytes` in place; `None` if the tag does not fit.
    pub fn open<'a>(&self, nonce: [u8; 12], aad: &[u8], bytes: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), bytes).ok()
    }
}

/// Key under which a recipient's copy of the root key is wrapped.
pub fn wrap_key(secret: &Secret, pool: PoolId) -> Result<SealKey, PoolError> {
    SealKey::new(&derive("stillpoint pool v1 wrap key", &[&secret.0, &pool.0]))
}

/// A recipient's way to be given a key by somebody who does not know its secret: X25519.
pub struct RecipientKey(PrivateKey);

fn no_agreement<E>(_: E) -> PoolError {
    PoolError::Misuse("X25519 refused a key of 32 bytes".to_owned())
}

impl RecipientKey {
    /// The key that follows from a recipient's secret.
    pub fn of(secret: &Secret, pool: PoolId) -> Result<RecipientKey, PoolError> {
        RecipientKey::new(&derive("stillpoint pool v1 recipient key", &[&secret.0, &pool.0]))
    }

    /// A key for one wrap, of random bytes.
    pub fn for_once(randomness: &dyn Randomness) -> Result<RecipientKey, PoolError> {
        let secret = Secret::random(randomness)
            .map_err(|source| PoolError::io("a key".to_owned(), "draw random bytes for", source))?;
        RecipientKey::new(&secret.0)
    }

    fn new(bytes: &[u8; 32]) -> Result<RecipientKey, PoolError> {
        PrivateKey::from_private_key(&X25519, bytes).map(RecipientKey).map_err(no_agreement)
    }

    /// What others may know of it.
    pub fn public(&self) -> Result<[u8; 32], PoolError> {
        let public = self.0.compute_public_key().map_err(no_agreement)?;
        public.as_ref().try_into().map_err(no_agreement)
    }

    /// The key that wraps the root of `generation` between `once` and `recipient`, of whom one is this and the other is
    /// `other`. An error for a public key that would give everybody the same secret.
    pub fn wrap_key(
        &self,
        other: &[u8; 32],
        once: &[u8; 32],
        recipient: &[u8; 32],
        pool: PoolId,
        generation: u16,
    ) -> Result<SealKey, PoolError> {
        let refused = || PoolError::KeyWrong { reason: "a recipient's public key is none".to_owned() };
        agreement::agree(&self.0, UnparsedPublicKey::new(&X25519, other), refused(), |shared| {
            let generation = generation.to_le_bytes();
            let parts: [&[u8]; 5] = [shared, once, recipient, &pool.0, &generation];
            SealKey::new(&derive("stillpoint pool v1 ring wrap key", &parts))
        })
    }
}

/// The pool's root keys, one for each generation that a recipient can reach, and what follows from them. Clones share them.
#[derive(Clone)]
pub struct Keys {
    pool: PoolId,
    roots: Arc<RwLock<BTreeMap<u16, Secret>>>,
    /// What is sealed from now on is sealed under this generation.
    generation: Arc<AtomicU16>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({}, generation {})", self.pool, self.generation())
    }
}

impl Keys {
    /// The keys of `pool` with the first `root`, generation 0.
    pub fn new(pool: PoolId, root: Secret) -> Keys {
        Keys::of(pool, BTreeMap::from([(0, root)]))
    }

    pub(crate) fn of(pool: PoolId, roots: BTreeMap<u16, Secret>) -> Keys {
        Keys { pool, roots: Arc::new(RwLock::new(roots)), generation: Arc::new(AtomicU16::new(0)) }
    }

    /// The pool they belong to.
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    /// The generation under which is sealed now.
    pub fn generation(&self) -> u16 {
        self.generation.load(Ordering::SeqCst)
    }

    /// From now on is sealed under `generation`: the sequence says so.
    pub(crate) fn seal_under(&self, generation: u16) {
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// The newest generation that can be reached; the one that records are sealed under, or a later one of which a cut left
    /// only the ring.
    pub(crate) fn newest(&self) -> u16 {
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.last_key_value().map_or(0, |(generation, _)| *generation)
    }

    /// The newest generation below `generation` that can be reached.
    pub(crate) fn newest_below(&self, generation: u16) -> Option<u16> {
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.range(..generation).next_back().map(|(generation, _)| *generation)
    }

    /// Every generation that can be reached.
    pub(crate) fn roots(&self) -> BTreeMap<u16, Secret> {
        self.roots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn knows(&self, generation: u16) -> bool {
        self.roots.read().unwrap_or_else(PoisonError::into_inner).contains_key(&generation)
    }

    pub(crate) fn learn(&self, generation: u16, root: Secret) {
        self.roots.write().unwrap_or_else(PoisonError::into_inner).insert(generation, root);
    }

    pub(crate) fn root(&self, generation: u16) -> Result<Secret, PoolError> {
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots.get(&generation).cloned().ok_or_else(|| PoolError::KeyWrong {
            reason: format!(
                "it is sealed under key generation {generation}, of which this recipient has no key: it was removed, or \
                 keys/{generation:04x}.ring is missing"
            ),
        })
    }

    fn derived(&self, context: &str, generation: u16, part: &[u8]) -> Result<[u8; 32], PoolError> {
        Ok(derive(context, &[&self.root(generation)?.0, &self.pool.0, part]))
    }

    /// Key of the record with `salt`; used once, with nonce zero.
    pub fn record(&self, generation: u16, salt: &[u8; 16]) -> Result<SealKey, PoolError> {
        SealKey::new(&self.derived("stillpoint pool v1 record key", generation, salt)?)
    }

    /// Key of the bundle with `salt`; used once, with nonce zero.
    pub fn bundle(&self, generation: u16, salt: &[u8; 16]) -> Result<SealKey, PoolError> {
        SealKey::new(&self.derived("stillpoint pool v1 bundle key", generation, salt)?)
    }

    /// Key of the older roots in the ring with `salt`; used once, with nonce zero.
    pub fn ring(&self, generation: u16, salt: &[u8; 16]) -> Result<SealKey, PoolError> {
        SealKey::new(&self.derived("stillpoint pool v1 ring key", generation, salt)?)
    }

    /// Key of the proof that a key file was made by somebody who had the root.
    pub fn proof(&self, generation: u16) -> Result<[u8; 32], PoolError> {
        self.derived("stillpoint pool v1 recipient proof key", generation, &[])
    }

    /// Key of the proof that the ring of a later generation was made by somebody who had this root.
    pub fn ring_proof(&self, generation: u16) -> Result<[u8; 32], PoolError> {
        self.derived("stillpoint pool v1 ring proof key", generation, &[])
    }

    /// Key of the hashes of run `number`.
    pub fn run(&self, generation: u16, number: u64) -> Result<[u8; 32], PoolError> {
        self.derived("stillpoint pool v1 run key", generation, &number.to_le_bytes())
    }

    /// Key of the hashes of the file of counts `number`.
    pub fn counts(&self, generation: u16, number: u64) -> Result<[u8; 32], PoolError> {
        self.derived("stillpoint pool v1 counts key", generation, &number.to_le_bytes())
    }

    /// Keys of a domain. The id key is the first generation's for ever, so that equal content keeps its id.
    pub fn domain(&self, domain: DomainId) -> DomainKeys {
        // Whoever has no first root has no way into the pool at all: see `recipients::open`.
        let id = self.derived("stillpoint pool v1 id key", 0, &domain.0).unwrap_or_default();
        DomainKeys { keys: self.clone(), domain, id }
    }
}

/// Id key and data keys of a domain.
#[derive(Clone)]
pub struct DomainKeys {
    keys: Keys,
    /// The domain.
    pub domain: DomainId,
    id: [u8; 32],
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

    /// The generation under which new packs are sealed.
    pub fn generation(&self) -> u16 {
        self.keys.generation()
    }

    /// Key of a pack.
    pub fn pack(&self, generation: u16, pack: PackId) -> Result<SealKey, PoolError> {
        let data = Secret(self.keys.derived("stillpoint pool v1 data key", generation, &self.domain.0)?);
        SealKey::new(&derive("stillpoint pool v1 pack key", &[&data.0, &self.keys.pool.0, &pack.0]))
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
            .pack(0, PackId([5; 16]))
            .and_then(|key| key.seal(frame_nonce(64), b"aad", &mut sealed))
            .unwrap_or(());
        assert_eq!(sealed.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), KNOWN_SEAL);
    }

    /// The same of what wraps a later root, computed by another implementation of X25519 and BLAKE3, from both sides.
    #[test]
    fn known_answers_of_a_ring() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let pool = PoolId([7; 16]);
        let recipient = RecipientKey::of(&Secret([1; 32]), pool).unwrap_or_else(|error| panic!("{error}"));
        let once = RecipientKey::new(&[5; 32]).unwrap_or_else(|error| panic!("{error}"));
        let public = recipient.public().unwrap_or_default();
        let once_public = once.public().unwrap_or_default();
        assert_eq!(hex(&public), "1d65b908115be5d30b7061f0f8241eca04d23bd35372f18a94576bbe23418d16");
        for key in [
            once.wrap_key(&public, &once_public, &public, pool, 3),
            recipient.wrap_key(&once_public, &once_public, &public, pool, 3),
        ] {
            let mut sealed = b"known".to_vec();
            key.and_then(|key| key.seal([0; 12], b"aad", &mut sealed)).unwrap_or(());
            assert_eq!(hex(&sealed), "fc633ef50ea8f38655aa7b0c67b230813dbb47b51c");
        }
        // A public key that gives everybody the same secret is refused.
        assert!(once.wrap_key(&[0; 32], &once_public, &public, pool, 3).is_err());
    }

    const KNOWN_ID: &str = "578a1673ab2c4af353a74bfd122c8c7e";
    const KNOWN_SEAL: &str = "5ff355f3cc6f7b207b5960a7aafeea258ffe30b8f6";
}

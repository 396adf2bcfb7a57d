//! The way from a recipient's secret to every root key: key files and rings (sections 3.1 and 3.4).
//!
//! ```text
//! secret --unwraps--> key file: root of generation g --\
//!    '--unwraps--> its entry in ring n: root of generation n --opens--> the older roots in that ring
//! ```
//!
//! Invariants
//! - A ring that is not proved by the newest root below it is as if it were not there: nothing that whoever was removed makes
//!   with the older roots is believed. (must)

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use model::PoolId;

use crate::error::{Damage, PoolError};
use crate::format::key::KeyFile;
use crate::format::ring::{self, Ring};
use crate::format::twin;
use crate::keys::{Keys, RecipientKey, Secret, wrap_key};
use crate::kit::{Recipient, RecipientId};
use crate::world::{World, key_name};

/// What a recipient is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum RecipientKind {
    /// A server's data folder.
    Server = 1,
    /// A recovery kit.
    Kit = 2,
}

impl RecipientKind {
    pub(crate) fn of(number: u16) -> Option<RecipientKind> {
        match number {
            1 => Some(RecipientKind::Server),
            2 => Some(RecipientKind::Kit),
            _ => None,
        }
    }
}

fn damaged(path: String, damage: &crate::format::FormatError) -> Damage {
    let (offset, reason) = match damage {
        crate::format::FormatError::Damaged { offset, reason } => (*offset, reason.clone()),
        crate::format::FormatError::TooNew(version) => (0, format!("one copy needs version {version}")),
    };
    Damage::File { path, offset, reason: format!("{reason}; the other copy serves"), derived: false }
}

pub(crate) fn random<const N: usize>(world: &World, name: &str) -> Result<[u8; N], PoolError> {
    let mut bytes = [0u8; N];
    world
        .randomness
        .fill(&mut bytes)
        .map_err(|source| PoolError::io(world.files.display(name), "draw random bytes for", source))?;
    Ok(bytes)
}

/// Bytes of the key file that wraps the newest root for `recipient`.
pub(crate) fn wrap_root(
    world: &World,
    recipient: &Recipient,
    kind: RecipientKind,
    keys: &Keys,
) -> Result<Vec<u8>, PoolError> {
    let generation = keys.generation();
    let mut file = KeyFile {
        pool: recipient.pool,
        recipient: recipient.id,
        kind: kind as u16,
        generation,
        nonce: random(world, &key_name(recipient.id))?,
        sealed: [0; 48],
        public: RecipientKey::of(&recipient.secret, recipient.pool)?.public()?,
        proof: [0; 16],
    };
    let key = wrap_key(&recipient.secret, recipient.pool)?;
    file.sealed = sealed_root(&keys.root(generation)?, |bytes| key.seal(file.nonce, &file.head(), bytes))?;
    file.proof = file.proof_of(&keys.proof(generation)?);
    Ok(twin::encode(twin::KEY, &file.encode()))
}

pub(crate) fn sealed_root(
    root: &Secret,
    seal: impl FnOnce(&mut Vec<u8>) -> Result<(), PoolError>,
) -> Result<[u8; 48], PoolError> {
    let mut bytes = root.expose().to_vec();
    seal(&mut bytes)?;
    bytes.try_into().map_err(|_| PoolError::Misuse("a sealed root of another length".to_owned()))
}

pub(crate) fn read_key_file(world: &World, id: RecipientId) -> Result<(KeyFile, Option<Damage>), PoolError> {
    let name = key_name(id);
    let path = world.files.display(&name);
    let bytes = world.files.read(&name, twin::MAX_BYTES).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PoolError::KeyMissing { path: path.clone(), recipient: id.to_string() },
        _ => PoolError::io(path.clone(), "read", source),
    })?;
    let twin = twin::decode(twin::KEY, &bytes).map_err(|error| error.in_file(path.clone()))?;
    let file = KeyFile::decode(&twin.content).map_err(|error| error.in_file(path.clone()))?;
    Ok((file, twin.damage.map(|damage| damaged(path, &damage))))
}

/// The root key in a recipient's key file, its generation, and what is wrong with one copy of the file.
fn unwrap_root(world: &World, recipient: &Recipient) -> Result<(u16, Secret, Option<Damage>), PoolError> {
    let (file, damage) = read_key_file(world, recipient.id)?;
    let wrong = |reason: &str| PoolError::KeyWrong {
        reason: format!("{}: {reason}", world.files.display(&key_name(recipient.id))),
    };
    if file.pool != recipient.pool || file.recipient != recipient.id {
        return Err(wrong("the key file belongs to another pool or recipient"));
    }
    let mut sealed = file.sealed;
    let root = wrap_key(&recipient.secret, recipient.pool)?
        .open(file.nonce, &file.head(), &mut sealed)
        .and_then(|root| <[u8; 32]>::try_from(&*root).ok())
        .ok_or_else(|| wrong("the secret does not open it"))?;
    Ok((file.generation, Secret::from_bytes(root), damage))
}

/// Generations of the rings that are there.
pub(crate) fn ring_generations(world: &World) -> Result<BTreeSet<u16>, PoolError> {
    let entries = world
        .files
        .list("keys")
        .map_err(|source| PoolError::io(world.files.display("keys"), "list", source))?;
    Ok(entries.iter().filter_map(|entry| ring::generation(&entry.name)).collect())
}

/// The ring in one of its files, its hash, and damage of one copy in it.
fn read_ring_file(
    world: &World,
    pool: PoolId,
    generation: u16,
    name: &str,
) -> Result<(Ring, [u8; 32], Option<Damage>), PoolError> {
    let path = world.files.display(name);
    let bytes = world
        .files
        .read(name, twin::MAX_BYTES)
        .map_err(|source| PoolError::io(path.clone(), "read", source))?;
    let twin = twin::decode(twin::RING, &bytes).map_err(|error| error.in_file(path.clone()))?;
    let ring = Ring::decode(&twin.content).map_err(|error| error.in_file(path.clone()))?;
    if ring.pool != pool || ring.generation != generation {
        let reason = format!("is ring {} of pool {}", ring.generation, ring.pool);
        return Err(PoolError::Damaged { path, offset: 16, reason });
    }
    let hash = *blake3::hash(&twin.content).as_bytes();
    Ok((ring, hash, twin.damage.map(|damage| damaged(path, &damage))))
}

/// The ring of a generation from whichever file is right, its hash, and what is wrong with the files.
pub(crate) fn read_ring(
    world: &World,
    pool: PoolId,
    generation: u16,
) -> (Option<(Ring, [u8; 32])>, Vec<Damage>) {
    let mut found = None;
    let mut damage = Vec::new();
    for name in ring::names(generation) {
        match read_ring_file(world, pool, generation, &name) {
            Ok((ring, hash, wrong)) => {
                damage.extend(wrong);
                found.get_or_insert((ring, hash));
            }
            Err(error) => damage.push(Damage::File {
                path: world.files.display(&name),
                offset: 0,
                reason: error.to_string(),
                derived: false,
            }),
        }
    }
    (found, damage)
}

/// What a recipient's secret opens.
pub(crate) struct OpenedKeys {
    /// All roots that it reaches.
    pub keys: Keys,
    /// Damage of its key file.
    pub damage: Vec<Damage>,
    /// Damage of rings, by generation. That of a ring which no record names is nobody's loss: a rotation was cut off.
    pub rings: BTreeMap<u16, Vec<Damage>>,
}

/// All roots that a recipient reaches, and damage met on the way.
pub(crate) fn open(world: &World, recipient: &Recipient) -> Result<OpenedKeys, PoolError> {
    let (generation, root, key_damage) = unwrap_root(world, recipient)?;
    let keys = Keys::of(recipient.pool, BTreeMap::from([(generation, root)]));
    let rings = reach(world, recipient, generation, &keys)?;
    // Without the first root no chunk has a name.
    keys.root(0).map_err(|_| PoolError::KeyWrong {
        reason: format!(
            "the first root key cannot be reached from generation {generation}: {} is missing or damaged",
            world.files.display(&ring::names(generation)[0])
        ),
    })?;
    Ok(OpenedKeys { keys, damage: key_damage.into_iter().collect(), rings })
}

/// Learns what the rings that are there give a recipient whose key file has the root of `generation`. Returns damage, by
/// generation.
///
/// A later ring is believed if it is proved by the newest root below it that is known: whoever was removed has an older one.
fn reach(
    world: &World,
    recipient: &Recipient,
    generation: u16,
    keys: &Keys,
) -> Result<BTreeMap<u16, Vec<Damage>>, PoolError> {
    let mut damage = BTreeMap::new();
    let rings = ring_generations(world)?;
    if rings.is_empty() {
        return Ok(damage);
    }
    let own = RecipientKey::of(&recipient.secret, recipient.pool)?;
    for number in rings {
        let (ring, mut wrong) = read_ring(world, recipient.pool, number);
        if let Some((ring, _)) = ring
            && number >= generation
        {
            if number > generation && !is_ring_proved(&ring, keys)? {
                wrong.push(unproved(world, number));
            } else {
                if !keys.knows(number)
                    && let Some(root) = root_for(&ring, recipient.id, &own)
                {
                    keys.learn(number, root);
                }
                if keys.knows(number) {
                    older_roots(&ring, keys)?;
                }
            }
        }
        if !wrong.is_empty() {
            damage.insert(number, wrong);
        }
    }
    Ok(damage)
}

/// [`reach`] of a recipient whose pool is being opened.
pub(crate) fn look_again(
    world: &World,
    recipient: &Recipient,
    keys: &Keys,
) -> Result<BTreeMap<u16, Vec<Damage>>, PoolError> {
    let (generation, _, _) = unwrap_root(world, recipient)?;
    reach(world, recipient, generation, keys)
}

/// Whether whoever made a ring had the newest root below it that is known.
pub(crate) fn is_ring_proved(ring: &Ring, keys: &Keys) -> Result<bool, PoolError> {
    let Some(newest) = keys.newest_below(ring.generation) else { return Ok(true) };
    let Some((_, proof)) = ring.proofs.iter().find(|(generation, _)| *generation == newest) else {
        return Ok(false);
    };
    Ok(ring.proof_of(&keys.ring_proof(newest)?) == *proof)
}

fn unproved(world: &World, number: u16) -> Damage {
    let reason =
        "is not proved by the key generation before it: nobody who could open the storage pool made it";
    let path = world.files.display(&ring::names(number)[0]);
    Damage::File { path, offset: 0, reason: reason.to_owned(), derived: false }
}

/// The root that a ring has for a recipient; none if it was not let in.
fn root_for(ring: &Ring, id: RecipientId, own: &RecipientKey) -> Option<Secret> {
    let entry = ring.entries.iter().find(|entry| entry.recipient == id)?;
    let key = own.wrap_key(&entry.once, &entry.once, &entry.public, ring.pool, ring.generation).ok()?;
    let mut sealed = entry.sealed;
    let root = key.open([0; 12], &entry.head(), &mut sealed)?;
    <[u8; 32]>::try_from(&*root).ok().map(Secret::from_bytes)
}

/// Learns the older roots of a ring whose own root is known.
fn older_roots(ring: &Ring, keys: &Keys) -> Result<(), PoolError> {
    let mut sealed = ring.older.clone();
    // A ring that somebody else made opens for nobody; its records do not either, and are told.
    let Some(older) = keys.ring(ring.generation, &ring.salt)?.open([0; 12], &ring.head(), &mut sealed) else {
        return Ok(());
    };
    let (roots, _) = older.as_chunks::<{ ring::OLDER }>();
    for root in roots {
        let generation = u16::from_le_bytes([root[0], root[1]]);
        if let Ok(bytes) = <[u8; 32]>::try_from(&root[2..])
            && !keys.knows(generation)
        {
            keys.learn(generation, Secret::from_bytes(bytes));
        }
    }
    Ok(())
}

//! Who can open a pool: key files, rings, rotation (section 3).
//!
//! ```text
//! secret --unwraps--> key file: root of generation g --\
//!    '--unwraps--> its entry in ring n: root of generation n --opens--> the older roots in that ring
//! ```
//!
//! Refuses: removing whoever asks, removing the last recovery kit, and wrapping a new root for anybody of whom it is not proved
//! that a holder of the present root let him in.
//!
//! Invariants
//! - Ring files have no effect until the record of the rotation is there. (must)
//! - A recipient that is not removed reaches every root after a rotation as before it. (must: INV-1)
//! - What was removed reaches no root of a generation made since, and nothing that it makes with the older ones is believed. (must)

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::PoisonError;

use model::PoolId;

use crate::error::{Damage, PoolError};
use crate::format::key::KeyFile;
use crate::format::payload::{self, Kind};
use crate::format::ring::{self, ENTRY, HEADER, OLDER, PROOF, Ring, RingEntry};
use crate::format::twin;
use crate::keys::{Keys, RecipientKey, Secret, wrap_key};
use crate::kit::{Recipient, RecipientId};
use crate::pool::{Pool, World, key_name};
use crate::sequence::{self, Unpublished};

/// Bytes of a copy in a twin file besides its content, with room for the tag of a ring's older roots.
const TWIN_REST: usize = 48 + crate::keys::TAG;

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
    fn of(number: u16) -> Option<RecipientKind> {
        match number {
            1 => Some(RecipientKind::Server),
            2 => Some(RecipientKind::Kit),
            _ => None,
        }
    }
}

/// Somebody who can open the pool, or could.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownRecipient {
    /// Who.
    pub id: RecipientId,
    /// What.
    pub kind: RecipientKind,
    /// Removed: cannot open what was written since.
    pub is_removed: bool,
    /// The one by whom this process opened the pool.
    pub is_own: bool,
    public: [u8; 32],
}

fn damaged(path: String, damage: &crate::format::FormatError) -> Damage {
    let (offset, reason) = match damage {
        crate::format::FormatError::Damaged { offset, reason } => (*offset, reason.clone()),
        crate::format::FormatError::TooNew(version) => (0, format!("one copy needs version {version}")),
    };
    Damage::File { path, offset, reason: format!("{reason}; the other copy serves"), derived: false }
}

fn random<const N: usize>(world: &World, name: &str) -> Result<[u8; N], PoolError> {
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

fn sealed_root(
    root: &Secret,
    seal: impl FnOnce(&mut Vec<u8>) -> Result<(), PoolError>,
) -> Result<[u8; 48], PoolError> {
    let mut bytes = root.expose().to_vec();
    seal(&mut bytes)?;
    bytes.try_into().map_err(|_| PoolError::Misuse("a sealed root of another length".to_owned()))
}

fn read_key_file(world: &World, id: RecipientId) -> Result<(KeyFile, Option<Damage>), PoolError> {
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
fn ring_generations(world: &World) -> Result<BTreeSet<u16>, PoolError> {
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

impl Pool {
    /// Whether a recipient's secret opens all of this pool.
    pub fn prove(&self, recipient: &Recipient) -> Result<(), PoolError> {
        let opened = open(&self.world, recipient)?;
        opened.keys.root(self.state().generation).map(drop)
    }

    /// Adds a recipient: a further recovery kit. `keep_kit` as in [`Pool::create`].
    pub fn add_kit(
        &self,
        keep_kit: &mut dyn FnMut(&Recipient) -> Result<Recipient, PoolError>,
    ) -> Result<RecipientId, PoolError> {
        self.add_recipient(RecipientKind::Kit, keep_kit)
    }

    /// Adds a recipient. `keep` puts its secret into its place, reads it back from there and returns what it read.
    pub fn add_recipient(
        &self,
        kind: RecipientKind,
        keep: &mut dyn FnMut(&Recipient) -> Result<Recipient, PoolError>,
    ) -> Result<RecipientId, PoolError> {
        if !self.is_writable() {
            return Err(PoolError::ReadOnly);
        }
        let _changing = self.recipients.lock().unwrap_or_else(PoisonError::into_inner);
        let id = RecipientId(self.world.random_id()?);
        let secret = Secret::from_bytes(random(&self.world, &key_name(id))?);
        let new = Recipient { pool: self.id(), id, secret };
        let bytes = wrap_root(&self.world, &new, kind, &self.keys)?;
        self.world.publish(&key_name(id), &bytes)?;
        let read_back = keep(&new)?;
        self.prove(&read_back)?;
        Ok(id)
    }

    /// Who can open the pool, and who was removed.
    pub fn recipients(&self) -> Result<Vec<KnownRecipient>, PoolError> {
        let state = self.state().clone();
        let known = |id: RecipientId, kind: u16, public: [u8; 32]| {
            Some(KnownRecipient {
                id,
                kind: RecipientKind::of(kind)?,
                is_removed: state.removed.contains(&id),
                is_own: id == self.recipient.id,
                public,
            })
        };
        let mut found: BTreeMap<RecipientId, KnownRecipient> = BTreeMap::new();
        // A key file in the folder is no proof that anybody let its owner in: a removed recipient could put one there. What
        // proves it is the present root, in the file or by the ring.
        let entries = self
            .world
            .files
            .list("keys")
            .map_err(|source| PoolError::io(self.world.files.display("keys"), "list", source))?;
        for entry in entries {
            let Some(id) = entry.name.strip_suffix(".key").and_then(|name| name.parse().ok()) else {
                continue;
            };
            let file = match read_key_file(&self.world, id) {
                Ok((file, _)) => file,
                // Neither of its copies opens the pool for anybody.
                Err(PoolError::Damaged { .. } | PoolError::KeyMissing { .. }) => continue,
                // Whoever it is may be able to read it, and must not be left out of a ring.
                Err(error) => return Err(error),
            };
            let is_proved = self.is_proved(&file)?;
            let counts = file.generation == state.generation || state.removed.contains(&id);
            if is_proved && counts && file.recipient == id {
                found.extend(known(id, file.kind, file.public).map(|it| (id, it)));
            }
        }
        if state.generation > 0 {
            let (ring, _) = read_ring(&self.world, self.id(), state.generation);
            let stated = state.rings.get(&state.generation);
            let Some((ring, _)) = ring.filter(|(_, hash)| stated.is_some_and(|stated| stated == hash)) else {
                let path = self.world.files.display(&ring::names(state.generation)[0]);
                return Err(PoolError::Stopped {
                    reason: format!("{path} is not the ring that the record of its rotation names"),
                });
            };
            for entry in ring.entries {
                found
                    .extend(known(entry.recipient, entry.kind, entry.public).map(|it| (entry.recipient, it)));
            }
        }
        Ok(found.into_values().collect())
    }

    /// Whether whoever made a key file had the root that it wraps.
    pub(crate) fn is_proved(&self, file: &KeyFile) -> Result<bool, PoolError> {
        Ok(file.pool == self.id()
            && self.keys.knows(file.generation)
            && file.proof_of(&self.keys.proof(file.generation)?) == file.proof)
    }

    /// Begins a new key generation without `removed`: whatever is written from now on is sealed under a new root that only
    /// the others reach. Nothing is rewritten. Refused as busy while a backup is under way.
    pub fn rotate_keys(&self, removed: &[RecipientId]) -> Result<u16, PoolError> {
        if !self.is_writable() {
            return Err(PoolError::ReadOnly);
        }
        // No pack is begun under the older root and ended after the record.
        let _pass = self.enter_alone().ok_or(PoolError::Busy { path: self.path() })?;
        let _changing = self.recipients.lock().unwrap_or_else(PoisonError::into_inner);
        self.recheck_records()?;
        if let Some(record) = self.state().unreadable.first() {
            return Err(PoolError::Stopped { reason: format!("{}: {}", record.path, record.reason) });
        }
        // What a rotation before this one left without its record is known to others, so a later ring must be proved by it too.
        self.learn_rings()?;
        let mut wanted: Vec<KnownRecipient> =
            self.recipients()?.into_iter().filter(|known| !known.is_removed).collect();
        let refused = |id: &RecipientId, reason: &str| {
            Err(PoolError::RecipientKept { recipient: id.to_string(), reason: reason.to_owned() })
        };
        for id in removed {
            match wanted.iter().position(|known| known.id == *id) {
                None => return refused(id, "the storage pool has no such recipient"),
                Some(at) if wanted[at].is_own => return refused(id, "it is the one at work"),
                Some(at) => drop(wanted.remove(at)),
            }
        }
        if let Some(id) = removed.first()
            && !wanted.iter().any(|known| known.kind == RecipientKind::Kit)
        {
            return refused(id, "no recovery kit would be left; write another one first");
        }
        let (generation, hash) = self.new_ring(&wanted)?;
        let record = payload::Rotation {
            generation: u32::from(generation),
            ring: hash.to_vec(),
            removed: removed.iter().flat_map(|id| id.0).collect(),
        };
        self.append_under(Kind::Rotation, Some(generation), |_| Ok(Some(&record)))?;
        self.forget_bundles();
        // The rotation is done; a second record says so, in case that the first rots while it is the last one.
        let _ = self.tick();
        Ok(generation)
    }

    /// Learns the rings that came since this pool was opened.
    pub(crate) fn learn_rings(&self) -> Result<(), PoolError> {
        look_again(&self.world, &self.recipient, &self.keys).map(drop)
    }

    /// Number of the next ring. The numbers have no gaps, and a number that somebody used is not used again, also where his
    /// rotation was cut off.
    fn next_generation(&self) -> Result<u16, PoolError> {
        let failed = |action| move |source| PoolError::io(self.world.files.display("keys"), action, source);
        // A ring that others have seen must not vanish in a power cut when a later one is built on it.
        self.world.files.sync_folder("keys").map_err(failed("sync"))?;
        let newest = self.keys.newest().max(self.state().generation);
        let there = ring_generations(&self.world)?;
        for name in there.iter().filter(|number| **number > newest).flat_map(|number| ring::names(*number)) {
            match self.world.files.read(&name, twin::MAX_BYTES) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // Others may be able to read it, and would then ask for its proof.
                read => drop(
                    read.map_err(|source| PoolError::io(self.world.files.display(&name), "read", source))?,
                ),
            }
        }
        (newest..=u16::MAX)
            .skip(1)
            .find(|number| !there.contains(number))
            .ok_or_else(|| PoolError::Misuse("there are no more key generations".to_owned()))
    }

    /// Makes a new root, and the ring that wraps it, durable and read back.
    fn new_ring(&self, wanted: &[KnownRecipient]) -> Result<(u16, [u8; 32]), PoolError> {
        let generation = self.next_generation()?;
        let names = ring::names(generation);
        let root = Secret::from_bytes(random(&self.world, &names[0])?);
        let roots = self.keys.roots();
        let content = HEADER + roots.len() * (OLDER + PROOF) + wanted.len() * ENTRY;
        if 2 * (content + TWIN_REST) as u64 > twin::MAX_BYTES {
            let (recipients, generations) = (wanted.len(), roots.len());
            return Err(PoolError::Misuse(format!(
                "{}: a ring for {recipients} recipients with {generations} older generations is too long; revoke \
                 recipients that nobody uses, or make a new storage pool",
                self.world.files.display(&names[0])
            )));
        }
        let mut older = Vec::new();
        for (number, root) in &roots {
            older.extend_from_slice(&number.to_le_bytes());
            older.extend_from_slice(root.expose());
        }
        let alone = Keys::of(self.id(), BTreeMap::from([(generation, root.clone())]));
        let mut ring = Ring {
            pool: self.id(),
            generation,
            salt: random(&self.world, &names[0])?,
            older: Vec::new(),
            entries: Vec::with_capacity(wanted.len()),
            proofs: roots.keys().map(|number| (*number, [0; 16])).collect(),
        };
        for known in wanted {
            let once = RecipientKey::for_once(&*self.world.randomness)?;
            let mut entry = RingEntry {
                recipient: known.id,
                kind: known.kind as u16,
                public: known.public,
                once: once.public()?,
                sealed: [0; 48],
            };
            let key = once.wrap_key(&known.public, &entry.once, &known.public, self.id(), generation)?;
            entry.sealed = sealed_root(&root, |bytes| key.seal([0; 12], &entry.head(), bytes))?;
            ring.entries.push(entry);
        }
        alone.ring(generation, &ring.salt)?.seal([0; 12], &ring.head(), &mut older)?;
        ring.older = older;
        let proofs =
            |(number, _): &(u16, [u8; 16])| Ok((*number, ring.proof_of(&self.keys.ring_proof(*number)?)));
        ring.proofs = ring.proofs.iter().map(proofs).collect::<Result<_, PoolError>>()?;
        let content = ring.encode();
        let bytes = twin::encode(twin::RING, &content);
        for name in &names {
            sequence::publish(&*self.world.files, name, &bytes).map_err(|failed| {
                if let Unpublished::Doubtful(error) = &failed {
                    self.break_writer(error);
                }
                failed.into_error(self.world.files.display(name))
            })?;
            let back = self.world.files.read(name, twin::MAX_BYTES);
            let read = |source| PoolError::io(self.world.files.display(name), "read back", source);
            if back.map_err(read)? != bytes {
                let reason = "what was read back is not what was written".to_owned();
                return Err(PoolError::Damaged { path: self.world.files.display(name), offset: 0, reason });
            }
        }
        self.keys.learn(generation, root);
        Ok((generation, *blake3::hash(&content).as_bytes()))
    }
}

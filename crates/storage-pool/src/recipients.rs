//! Who can open a pool: recipients listed, let in and removed, and rotation (section 3.4).
//!
//! How a secret leads to the roots: [`mod@crate::rings`].
//!
//! Refuses: removing whoever asks, removing the last recovery kit, and wrapping a new root for anybody of whom it is not proved
//! that a holder of the present root let him in.
//!
//! Invariants
//! - Ring files have no effect until the record of the rotation is there. (must)
//! - A recipient that is not removed reaches every root after a rotation as before it. (must: INV-1)
//! - What was removed reaches no root of a generation made since. (must)

use std::collections::BTreeMap;
use std::io;
use std::sync::PoisonError;

use crate::error::PoolError;
use crate::format::key::KeyFile;
use crate::format::payload::{self, Kind};
use crate::format::ring::{self, ENTRY, HEADER, OLDER, PROOF, Ring, RingEntry};
use crate::format::twin;
use crate::keys::{Keys, RecipientKey, Secret};
use crate::kit::{Recipient, RecipientId};
use crate::pool::{Pool, key_name};
pub use crate::rings::RecipientKind;
use crate::rings::{
    look_again, open, random, read_key_file, read_ring, ring_generations, sealed_root, wrap_root,
};
use crate::sequence::{self, Unpublished};

/// Bytes of a copy in a twin file besides its content, with room for the tag of a ring's older roots.
const TWIN_REST: usize = 48 + crate::keys::TAG;

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
        // After a rotation that may or may not have happened, a key for the generation before would open nothing later.
        self.check_writer()?;
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
        // The index first, under the new root: runs of an older generation are not believed once the record is there, and only
        // they know of packs that are missing.
        self.renew_index(generation)?;
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

//! Recipients, key generations and nonces (section 3): who can open what, after every cut, and never two seals alike.
#![allow(clippy::unwrap_used, missing_docs)]

mod rig;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock};

use block_io::BlockDevice;
use environment::Randomness;
use environment::simulated::{Failure, SimulatedFiles, Snapshot, When};
use model::BLOCK_BYTES;
use prost::Message;
use rig::{Open, Rig, id, is_exact, order, store};
use storage_pool::chunk::{ChunkKind, Location};
use storage_pool::format::bundle::{self, BundleHeader, Bundled};
use storage_pool::format::key::KeyFile;
use storage_pool::format::pack::{self, PackHeader, PackKind, TableEntry, Trailer};
use storage_pool::format::payload::{self, Kind};
use storage_pool::format::record::{self, RecordHeader};
use storage_pool::format::ring::{self, Ring, RingEntry};
use storage_pool::format::run::{self, PagesOf, RunPack, RunWriter};
use storage_pool::format::twin;
use storage_pool::keys::{Keys, RecipientKey, Secret, TAG, table_nonce, wrap_key};
use storage_pool::kit::{Recipient, RecipientId};
use storage_pool::recipients::RecipientKind;
use storage_pool::reclaim::ReclaimOptions;
use storage_pool::verify::Depth;
use storage_pool::{Access, Damage, Ingest, Pool, PoolError, Settings, World};

fn add_kit(pool: &Pool) -> Recipient {
    let mut kit = None;
    pool.add_kit(&mut |new| {
        kit = Some(new.clone());
        Ok(new.clone())
    })
    .unwrap();
    kit.unwrap()
}

fn reader(rig: &Rig, recipient: &Recipient) -> Result<Arc<Pool>, PoolError> {
    Pool::open(rig.world(), recipient, Access::Read).map(Arc::new)
}

/// What a recipient can have: `Some(true)` exact, `Some(false)` not, `None` not known to it.
fn can_have(pool: &Arc<Pool>, point: u8, content: &[(u64, u64)]) -> Option<bool> {
    pool.point(id(point)).ok()?;
    Some(is_exact(pool, id(point), &content.iter().copied().collect()) == Ok(true))
}

const FIRST: [(u64, u64); 3] = [(0, 1), (1, 2), (4, 3)];
const SECOND: [(u64, u64); 3] = [(0, 1), (1, 4), (4, 3)];

/// A pool with the first point.
fn stored() -> (Rig, Arc<Pool>) {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(1, None, &FIRST)).unwrap();
    (rig, pool)
}

fn rotated() -> (Rig, Recipient) {
    let (rig, pool) = stored();
    let other = add_kit(&pool);
    assert_eq!(pool.rotate_keys(&[other.id]).unwrap(), 1);
    store(&pool, &order(2, Some(1), &[(1, 4)])).unwrap();
    (rig, other)
}

#[test]
fn after_a_rotation_everybody_left_has_everything_and_who_was_removed_nothing_new() {
    let (rig, removed) = rotated();
    for recipient in [&rig.server, &rig.kit] {
        let pool = reader(&rig, recipient).unwrap();
        assert!(pool.state().unreadable.is_empty());
        assert_eq!((can_have(&pool, 1, &FIRST), can_have(&pool, 2, &SECOND)), (Some(true), Some(true)));
        pool.prove(recipient).unwrap();
        let report = pool.verify(Depth::ReadData, &mut |_, _| true).unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
    }
    // As said: what it could open before it still can; nothing of later.
    let pool = reader(&rig, &removed).unwrap();
    assert_eq!((can_have(&pool, 1, &FIRST), can_have(&pool, 2, &SECOND)), (Some(true), None));
    assert!(pool.state().unreadable.iter().all(|record| record.generation == Some(1)));
    drop(pool);
    let access = Access::Write { server: [9; 16], name: "removed".to_owned() };
    let refused = Pool::open(rig.world(), &removed, access).err().unwrap();
    assert!(
        matches!(&refused, PoolError::KeyWrong { reason } if reason.contains("generation 1")),
        "{refused}"
    );
    assert!(matches!(rig.writer(1).unwrap().prove(&removed), Err(PoolError::KeyWrong { .. })));
}

/// Equal content keeps its chunk id over a rotation, so it is not stored again; nothing old is rewritten.
#[test]
fn a_rotation_rewrites_nothing_and_dedup_goes_on() {
    let (rig, pool) = stored();
    let before = rig.files.snapshot();
    pool.rotate_keys(&[]).unwrap();
    for (name, bytes) in before.files() {
        assert_eq!(rig.files.snapshot().get(name), Some(bytes), "{name}");
    }
    let packs = || {
        let snapshot = rig.files.snapshot();
        snapshot
            .files()
            .filter(|(name, _)| name.starts_with("packs/"))
            .map(|(_, bytes)| bytes.len())
            .collect::<Vec<_>>()
    };
    let stored = packs();
    store(&pool, &order(2, None, &FIRST)).unwrap();
    assert_eq!(packs(), stored, "the same content is stored again");
    store(&pool, &order(3, Some(2), &[(1, 4)])).unwrap();
    assert!(packs().len() > stored.len());
    // A reclaim that copies out of old packs seals anew, under the newest root.
    pool.delete_point(id(1), "test").unwrap();
    pool.delete_point(id(2), "test").unwrap();
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert_eq!(can_have(&rig.reader().unwrap(), 3, &SECOND), Some(true));
}

#[test]
fn who_comes_after_a_rotation_has_everything_and_goes_on_over_the_next() {
    let (rig, _) = rotated();
    let pool = rig.writer(1).unwrap();
    let late = add_kit(&pool);
    for round in 0..3u8 {
        let seen = reader(&rig, &late).unwrap();
        assert_eq!((can_have(&seen, 1, &FIRST), can_have(&seen, 2, &SECOND)), (Some(true), Some(true)));
        assert!(seen.state().unreadable.is_empty(), "{round}");
        assert_eq!(pool.rotate_keys(&[]).unwrap(), 2 + u16::from(round));
        store(&pool, &order(10 + round, Some(2), &[(2, 8 + u64::from(round))])).unwrap();
    }
    let seen = reader(&rig, &late).unwrap();
    assert_eq!(can_have(&seen, 12, &[(0, 1), (1, 4), (2, 10), (4, 3)]), Some(true));
}

#[test]
fn the_list_tells_who_can_open_and_who_was_removed() {
    let (rig, removed) = rotated();
    let pool = rig.writer(1).unwrap();
    let late = add_kit(&pool);
    let all: BTreeMap<RecipientId, (RecipientKind, bool, bool)> = pool
        .recipients()
        .unwrap()
        .into_iter()
        .map(|known| (known.id, (known.kind, known.is_removed, known.is_own)))
        .collect();
    let expected = BTreeMap::from([
        (rig.server.id, (RecipientKind::Server, false, true)),
        (rig.kit.id, (RecipientKind::Kit, false, false)),
        (late.id, (RecipientKind::Kit, false, false)),
        (removed.id, (RecipientKind::Kit, true, false)),
    ]);
    assert_eq!(all, expected);
}

#[test]
fn who_must_stay_is_not_removed() {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    let files = rig.files.snapshot();
    for (remove, why) in [
        (rig.server.id, "at work"),
        (rig.kit.id, "no recovery kit would be left"),
        (RecipientId([1; 16]), "no such"),
    ] {
        let refused = pool.rotate_keys(&[remove]).unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
    }
    assert_eq!(rig.files.snapshot(), files);
    add_kit(&pool);
    pool.rotate_keys(&[rig.kit.id]).unwrap();
    assert!(matches!(pool.prove(&rig.kit), Err(PoolError::KeyWrong { .. })));
}

/// A key file put into the folder by somebody without the present root lets nobody in: no ring is made for it.
#[test]
fn a_key_file_of_an_older_root_is_not_let_in() {
    let (rig, removed) = rotated();
    // The removed recipient still knows the old root: in a copy of the pool from before it adds a recipient of its own.
    let old = Rig::new(1, Settings::without_safety());
    let pool = old.writer(1).unwrap();
    let smuggled = add_kit(&pool);
    let name = format!("keys/{}.key", smuggled.id);
    let bytes = old.files.snapshot().get(&name).unwrap().to_vec();
    rig.files.set_bytes(&name, bytes);
    let pool = rig.writer(1).unwrap();
    assert!(pool.recipients().unwrap().iter().all(|known| known.id != smuggled.id));
    pool.rotate_keys(&[]).unwrap();
    store(&pool, &order(3, Some(2), &[(0, 9)])).unwrap();
    for out in [&smuggled, &removed] {
        assert!(pool.prove(out).is_err());
        if let Ok(seen) = reader(&rig, out) {
            assert_eq!(can_have(&seen, 3, &[]), None);
        }
    }
}

/// Ring files lost, damaged, of another pool or put back: told, and never the older root taken for the newest (INV-8).
#[test]
fn a_missing_ring_is_told_and_one_of_two_is_enough() {
    let (rig, _) = rotated();
    let rings = ["keys/0001.ring", "keys/0001-again.ring"];
    let whole = rig.files.snapshot();
    for name in rings {
        for spoil in [0, 1, 2] {
            let rig = rig.on(SimulatedFiles::from_snapshot(2, &whole));
            match spoil {
                0 => rig.files.delete(name).unwrap(),
                1 => rig.files.truncate(name, 40).unwrap(),
                _ => rig.files.flip_bit(name, 500).unwrap(),
            }
            let pool = rig.writer(1).unwrap();
            assert_eq!(can_have(&pool, 2, &SECOND), Some(true), "{name}");
            let report = pool.verify(Depth::Structure, &mut |_, _| true).unwrap();
            let is_named =
                |damage: &Damage| matches!(damage, Damage::File { path, .. } if path.ends_with(name));
            assert!(report.damage.iter().any(is_named), "{name}, {spoil}: {:?}", report.damage);
        }
    }
    for name in rings {
        rig.files.delete(name).unwrap();
    }
    let refused = rig.writer(1).err().unwrap();
    assert!(matches!(&refused, PoolError::KeyWrong { reason } if reason.contains("0001.ring")), "{refused}");
    let pool = rig.reader().unwrap();
    assert_eq!((can_have(&pool, 1, &FIRST), can_have(&pool, 2, &SECOND)), (Some(true), None));
    assert!(!pool.notes().is_empty());
}

/// Every bit of every file of `keys/` of a rotated pool: told by verify, and the pool opens all the same.
#[test]
fn every_flipped_bit_of_key_files_is_told() {
    let (rig, _) = rotated();
    let snapshot = rig.files.snapshot();
    let rig = rig.on(SimulatedFiles::from_snapshot(2, &snapshot));
    for (name, bytes) in snapshot.files().filter(|(name, _)| name.starts_with("keys/")) {
        for bit in (0..bytes.len() as u64 * 8).step_by(3) {
            rig.files.flip_bit(name, bit).unwrap();
            let pool = rig.reader().unwrap_or_else(|error| panic!("bit {bit} of {name}: {error}"));
            let report = pool.verify(Depth::Structure, &mut |_, _| true).unwrap();
            let is_named =
                |damage: &Damage| matches!(damage, Damage::File { path, .. } if path.ends_with(name));
            assert!(report.damage.iter().any(is_named), "bit {bit} of {name}");
            rig.files.flip_bit(name, bit).unwrap();
        }
    }
}

/// Every crash site of a rotation that removes somebody: the pool opens for all who stay with everything they had; done again
/// it is done; and what is acknowledged holds (INV-1, INV-4).
#[test]
fn every_crash_of_a_rotation() {
    let (rig, pool) = stored();
    store(&pool, &order(2, Some(1), &[(1, 4)])).unwrap();
    let other = add_kit(&pool);
    drop(pool);
    let before = rig.files.snapshot();
    let fresh = |seed: u64| rig.on(SimulatedFiles::from_snapshot(seed, &before));
    let is_removed = |rig: &Rig| {
        let pool = rig.writer(1).unwrap();
        let all = pool.recipients().unwrap();
        all.iter().any(|known| known.id == other.id && known.is_removed)
    };
    let operation = |rig: &Rig| rig.writer(1)?.rotate_keys(&[other.id]).map(drop);
    let counted = fresh(0);
    operation(&counted).unwrap();
    let sites = counted.files.operations();
    let mut looked_at = 0;
    for site in 1..=sites + 1 {
        let cut = fresh(site);
        cut.files.crash_at(site);
        let is_done = operation(&cut).is_ok();
        for (number, state) in cut.files.crash_states(6).states.iter().enumerate() {
            let told = format!("site {site} of {sites}, state {number}");
            let again = rig.on(SimulatedFiles::from_snapshot(site, state));
            for recipient in [&rig.server, &rig.kit] {
                let pool = reader(&again, recipient).unwrap_or_else(|error| panic!("{told}: {error}"));
                assert!(pool.state().unreadable.is_empty(), "{told}");
                assert_eq!(
                    (can_have(&pool, 1, &FIRST), can_have(&pool, 2, &SECOND)),
                    (Some(true), Some(true))
                );
            }
            assert!(!is_done || is_removed(&again), "{told}: acknowledged and not removed");
            if !is_removed(&again) {
                operation(&again).unwrap_or_else(|error| panic!("{told}: {error}"));
            }
            assert!(is_removed(&again), "{told}");
            let pool = again.writer(1).unwrap();
            store(&pool, &order(3, Some(2), &[(0, 9)])).unwrap();
            drop(pool);
            let outside = reader(&again, &other).unwrap();
            assert_eq!(can_have(&outside, 3, &[]), None, "{told}: it was removed");
            assert_eq!(
                can_have(&again.reader().unwrap(), 3, &[(0, 9), (1, 4), (4, 3)]),
                Some(true),
                "{told}"
            );
            looked_at += 1;
        }
    }
    assert!(looked_at > 40, "{looked_at}");
}

/// Every call of a rotation fails once, in every way (INV-5).
#[test]
fn every_call_of_a_rotation_fails_once() {
    let rig = Rig::new(1, Settings::without_safety());
    store(&rig.writer(1).unwrap(), &order(1, None, &FIRST)).unwrap();
    let before = rig.files.snapshot();
    let counted = rig.on(SimulatedFiles::from_snapshot(0, &before));
    counted.writer(1).unwrap().rotate_keys(&[]).unwrap();
    for site in 1..=counted.files.operations() {
        for failure in [Failure::Io, Failure::IoAfter, Failure::NoSpace, Failure::SyncDropsData] {
            let told = format!("site {site}, {failure:?}");
            let rig = rig.on(SimulatedFiles::from_snapshot(site, &before));
            rig.files.fail(When::At(site), failure);
            let stored = rig.writer(1).and_then(|pool| {
                let rotated = pool.rotate_keys(&[]);
                store(&pool, &order(2, Some(1), &[(1, 4)]))?;
                rotated
            });
            rig.files.clear_faults();
            rig.files.reboot(site);
            for recipient in [&rig.server, &rig.kit] {
                let pool = reader(&rig, recipient).unwrap_or_else(|error| panic!("{told}: {error}"));
                assert_eq!(can_have(&pool, 1, &FIRST), Some(true), "{told}");
                if stored.is_ok() {
                    let unreadable = &pool.state().unreadable;
                    assert_eq!(can_have(&pool, 2, &SECOND), Some(true), "{told}: {unreadable:?}");
                }
            }
        }
    }
}

/// A server that was fenced rotates nothing; both that did, did so one after the other (INV-16).
#[test]
fn a_fenced_server_rotates_nothing() {
    let rig = Rig::new(1, Settings::without_safety());
    let stale = rig.writer(1).unwrap();
    store(&stale, &order(1, None, &FIRST)).unwrap();
    let world = rig.world_of(Arc::new(rig::Elsewhere(rig.files.second_process())));
    let access = Access::Write { server: [2; 16], name: "elsewhere".to_owned() };
    let new = Pool::open(world, &rig.server, access).map(Arc::new).unwrap();
    assert!(matches!(stale.rotate_keys(&[]), Err(PoolError::Fenced { .. })));
    assert!(new.rotate_keys(&[]).is_ok());
    store(&new, &order(2, Some(1), &[(1, 4)])).unwrap();
    let pool = rig.reader().unwrap();
    assert!(pool.state().unreadable.is_empty());
    assert_eq!(can_have(&pool, 2, &SECOND), Some(true));
}

/// Bundles of before a rotation are not believed after it: whoever was removed could still make one.
#[test]
fn bundles_of_an_older_generation_are_not_believed() {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    for n in 0..40u8 {
        pool.put_document("a", Some(&[n])).unwrap();
    }
    let bundles = |rig: &Rig| {
        let snapshot = rig.files.snapshot();
        let names = snapshot.files().map(|(name, _)| name.to_owned());
        names.filter(|name| name.ends_with(".records")).collect::<Vec<_>>()
    };
    let old = bundles(&rig);
    assert!(!old.is_empty());
    pool.rotate_keys(&[]).unwrap();
    for n in 0..40u8 {
        pool.put_document("b", Some(&[n])).unwrap();
    }
    assert!(bundles(&rig).len() > old.len());
    drop(pool);
    let with = rig.reader().unwrap().state().clone();
    let mut snapshot = rig.files.snapshot();
    bundles(&rig).iter().for_each(|name| snapshot.remove(name));
    let without = rig.on(SimulatedFiles::from_snapshot(3, &snapshot));
    assert_eq!(with, *without.reader().unwrap().state());
}

/// What whoever was removed can make: all of it from the files, and the root that its own key file gives.
struct Removed<'r> {
    rig: &'r Rig,
    /// Root 0, and later ones that it makes up.
    keys: BTreeMap<u16, Secret>,
}

impl<'r> Removed<'r> {
    fn new(rig: &'r Rig, recipient: &Recipient) -> Removed<'r> {
        let bytes = rig.files.snapshot().get(&format!("keys/{}.key", recipient.id)).unwrap().to_vec();
        let file = KeyFile::decode(&twin::decode(twin::KEY, &bytes).unwrap().content).unwrap();
        let mut sealed = file.sealed;
        let key = wrap_key(&recipient.secret, recipient.pool).unwrap();
        let root = key.open(file.nonce, &file.head(), &mut sealed).unwrap();
        let root = Secret::from_bytes((&*root).try_into().unwrap());
        Removed { rig, keys: BTreeMap::from([(file.generation, root)]) }
    }

    fn keys(&self, generation: u16) -> Keys {
        // The only public way to keys is that of a first root; what is derived from it names no generation.
        Keys::new(self.rig.server.pool, self.keys[&generation].clone())
    }

    fn head(&self) -> (u64, [u8; 32]) {
        let snapshot = self.rig.files.snapshot();
        let (name, bytes) =
            snapshot.files().filter(|(name, _)| name.starts_with("sequence/")).last().unwrap();
        (record::number(name.strip_prefix("sequence/").unwrap()).unwrap(), *blake3::hash(bytes).as_bytes())
    }

    /// Puts a record behind the last one, in the chain of hashes.
    fn append(&self, generation: u16, kind: Kind, payload: &impl Message) -> u64 {
        self.append_at(rig::NOW, generation, kind, payload)
    }

    fn append_at(&self, time: u64, generation: u16, kind: Kind, payload: &impl Message) -> u64 {
        let (head, previous) = self.head();
        let header = RecordHeader {
            kind: kind as u16,
            generation,
            pool: self.rig.server.pool,
            number: head + 1,
            epoch: 1,
            time,
            previous,
            salt: [9; 16],
        };
        let mut sealed = payload.encode_to_vec();
        let raw = header.encode(sealed.len() + TAG);
        self.keys(generation).record(0, &header.salt).unwrap().seal([0; 12], &raw, &mut sealed).unwrap();
        self.rig.files.set_bytes(&record::name(head + 1), record::encode(&raw, &sealed));
        head + 1
    }

    /// A bundle of all records, in which nothing happens.
    fn bundle(&self, generation: u16) {
        let (head, hash) = self.head();
        let mut content = Vec::new();
        for _ in 1..=head {
            let nothing = Bundled { epoch: 1, time: rig::NOW, kind: Kind::Tick as u16, payload: &[] };
            bundle::push(&mut content, &nothing);
        }
        content.extend_from_slice(&hash);
        let pool = self.rig.server.pool;
        let header = BundleHeader { generation, pool, first: 1, last: head, salt: [8; 16] };
        let raw = header.encode(content.len() + TAG);
        self.keys(generation).bundle(0, &header.salt).unwrap().seal([0; 12], &raw, &mut content).unwrap();
        self.rig.files.set_bytes(&bundle::name(1, head), bundle::encode(&raw, &content));
    }

    /// A ring of a root of its own for server and kit, proved by every root that it has.
    fn ring(&mut self, generation: u16) {
        let root = Secret::from_bytes([0xBD; 32]);
        let pool = self.rig.server.pool;
        let mut older: Vec<u8> = Vec::new();
        for (number, root) in &self.keys {
            older.extend_from_slice(&number.to_le_bytes());
            older.extend_from_slice(root.expose());
        }
        let proofs = self.keys.keys().map(|number| (*number, [0; 16])).collect();
        let mut made =
            Ring { pool, generation, salt: [7; 16], older: Vec::new(), entries: Vec::new(), proofs };
        let salt = made.salt;
        let own = Keys::new(pool, root.clone());
        own.ring(0, &salt).unwrap().seal([0; 12], &made.head_for(2), &mut older).unwrap();
        made.older = older;
        for recipient in [&self.rig.server, &self.rig.kit] {
            let once = RecipientKey::for_once(&*self.rig.random).unwrap();
            let public = RecipientKey::of(&recipient.secret, pool).unwrap().public().unwrap();
            let mut entry = RingEntry {
                recipient: recipient.id,
                kind: 2,
                public,
                once: once.public().unwrap(),
                sealed: [0; 48],
            };
            let mut sealed = root.expose().to_vec();
            once.wrap_key(&public, &entry.once, &public, pool, generation)
                .unwrap()
                .seal([0; 12], &entry.head(), &mut sealed)
                .unwrap();
            entry.sealed = sealed.try_into().unwrap();
            made.entries.push(entry);
        }
        let proofs = made.proofs.iter();
        made.proofs = proofs
            .map(|(number, _)| (*number, made.proof_of(&self.keys(*number).ring_proof(0).unwrap())))
            .collect();
        for name in ring::names(generation) {
            self.rig.files.set_bytes(&name, twin::encode(twin::RING, &made.encode()));
        }
        self.keys.insert(generation, root);
    }

    /// A run that takes the place of all others, says of every pack that it holds nothing, and has seen many records.
    fn run(&self) {
        let snapshot = self.rig.files.snapshot();
        let (mut packs, mut superseded) = (Vec::new(), Vec::new());
        for (name, bytes) in snapshot.files() {
            if let Some(("index", file)) = name.rsplit_once('/') {
                superseded.extend(run::number(file));
            } else if name.starts_with("packs/") {
                let PackHeader { pack, domain, kind, generation, .. } =
                    PackHeader::decode(&bytes[..pack::HEADER]).unwrap();
                packs.push(RunPack { pack, domain, kind, generation, length: bytes.len() as u64 });
            }
        }
        packs.sort_by_key(|pack| pack.pack);
        let (pool, number) = (self.rig.server.pool, superseded.iter().max().unwrap() + 1);
        let key = self.keys(0).run(0, number).unwrap();
        let mut writer = RunWriter::new(PagesOf::Places, key, 0, pool, number);
        writer.finish(&packs, &superseded, u64::MAX / 2, &[]);
        let mut bytes = Vec::new();
        writer.take(|ready| std::io::Write::write_all(&mut bytes, ready)).unwrap();
        self.rig.files.set_bytes(&run::name(number), bytes);
    }
}

/// Gives a genuine pack of blocks of the newest generation a table of the oldest one that names its chunks for content `says`.
fn forge_table(out: &Removed<'_>, says: u64) {
    let snapshot = out.rig.files.snapshot();
    let is_wanted = |(_, bytes): &(&str, &[u8])| {
        PackHeader::decode(&bytes[..pack::HEADER])
            .is_ok_and(|header| header.generation == 1 && header.kind == PackKind::Blocks)
    };
    let (name, bytes) =
        snapshot.files().filter(|(name, _)| name.starts_with("packs/")).find(is_wanted).unwrap();
    let end = bytes.len() - pack::HEADER;
    let mut trailer = Trailer::decode(bytes[end..].try_into().unwrap(), bytes.len() as u64).unwrap();
    let header = PackHeader { generation: 0, ..PackHeader::decode(&bytes[..pack::HEADER]).unwrap() };
    let keys = out.keys(0).domain(header.domain);
    let id = keys.chunk_id(ChunkKind::Block, &rig::block(says).hash);
    let place = Location::new(header.pack, pack::HEADER as u32, 0);
    let mut table = pack::encode_table(&[TableEntry { id, location: place.at }]);
    let raw = header.encode();
    keys.pack(0, header.pack).unwrap().seal(table_nonce(trailer.table_offset), &raw, &mut table).unwrap();
    (trailer.table_stored, trailer.chunks) = (table.len() as u32, 1);
    let mut forged = bytes[..trailer.table_offset as usize].to_vec();
    forged[..pack::HEADER].copy_from_slice(&raw);
    forged.extend_from_slice(&table);
    forged.extend_from_slice(&trailer.encode(&raw, &table));
    out.rig.files.set_bytes(name, forged);
}

/// A pack whose block has the id of content `says` and holds content `holds`: made in a copy of the pool as it was before the
/// removal, and put into `rig`, its run not.
fn forged_pack(rig: &Rig, before: &Snapshot, (says, holds): (u64, u64)) {
    let old = rig.on(SimulatedFiles::from_snapshot(77, before));
    let pool = old.writer(1).unwrap();
    let ingest = Ingest::begin(&pool, pool.default_domain().unwrap()).unwrap();
    ingest.put_blocks(true, &rig::block(holds).encoded, &[rig::block(says).hash]).unwrap();
    ingest.settle().unwrap();
    let after = old.files.snapshot();
    let made = after.files().filter(|(name, _)| name.starts_with("packs/") && before.get(name).is_none());
    assert_eq!(made.map(|(name, bytes)| rig.files.set_bytes(name, bytes.to_vec())).count(), 1);
}

trait HeadFor {
    fn head_for(&self, entries: usize) -> [u8; ring::HEADER];
}
impl HeadFor for Ring {
    /// Its head when it has so many entries.
    fn head_for(&self, entries: usize) -> [u8; ring::HEADER] {
        let mut head = self.head();
        head[18..20].copy_from_slice(&(entries as u16).to_le_bytes());
        head
    }
}

/// Copies of damaged records are read whatever generation they are sealed under, because they prove themselves. What else their
/// record says does not: no time passes by it, so no hold ends (INV-19).
#[test]
fn a_removed_recipient_makes_no_time_pass() {
    let (rig, removed) = rotated();
    let before = rig.reader().unwrap().state().pool_time;
    let out = Removed::new(&rig, &removed);
    let first = rig.files.snapshot().get(&record::name(1)).unwrap().to_vec();
    let copy = payload::Restored { number: 1, bytes: first };
    for step in 1..=5 {
        out.append_at(rig::NOW + step * 3 * 86_400 * 1_000_000, 0, Kind::Restored, &copy);
    }
    let pool = rig.reader().unwrap();
    assert!(pool.state().unreadable.is_empty(), "{:?}", pool.state().unreadable);
    assert_eq!(pool.state().pool_time, before);
    drop(pool);
    // Nor by the next record that the server writes.
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(3, Some(2), &[(0, 9)])).unwrap();
    assert_eq!(pool.state().pool_time, before);
}

/// The first sector of a pack of an older generation is gone, and with it header and first frame: the other frames are had as
/// before, and a verify names the one that is lost and no other.
#[test]
fn a_pack_of_an_older_generation_survives_the_loss_of_its_first_sector() {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    let content: Vec<(u64, u64)> = (0..5).map(|at| (at, at + 1)).collect();
    store(&pool, &order(1, None, &content)).unwrap();
    pool.rotate_keys(&[]).unwrap();
    drop(pool);
    let snapshot = rig.files.snapshot();
    let is_pack = |(name, _): &(&str, &[u8])| name.starts_with("packs/");
    let (name, bytes) = snapshot.files().filter(is_pack).max_by_key(|(_, bytes)| bytes.len()).unwrap();
    let mut wrong = bytes.to_vec();
    wrong[..100].fill(0);
    rig.files.set_bytes(name, wrong);
    let pool = rig.reader().unwrap();
    let disk = pool.open_disk(id(1), 0).unwrap();
    let had = (0..5).filter(|block| disk.read_at(block * BLOCK_BYTES, &mut [0; 64]).is_ok()).count();
    assert!((1..5).contains(&had), "{had} of 5 blocks");
}

/// Whoever was removed and can write to the folder: records, bundles and rings that it makes change nothing (INV-8).
#[test]
fn what_a_removed_recipient_writes_is_not_believed() {
    let (rig, removed) = rotated();
    let before = rig.files.snapshot();
    let whole = rig.reader().unwrap().state().clone();
    let mark = payload::PointMark { point: id(2).0.to_vec(), reason: "forged".to_owned() };
    let look = |rig: &Rig, told: &str, is_told: bool| {
        for pool in [rig.reader().unwrap(), reader(rig, &rig.server).unwrap()] {
            let state = pool.state().clone();
            assert_eq!(state.points, whole.points, "{told}");
            assert_eq!((state.generation, &state.removed), (1, &whole.removed), "{told}");
            assert_eq!(!state.unreadable.is_empty(), is_told, "{told}: {:?}", state.unreadable);
            assert_eq!(can_have(&pool, 2, &SECOND), Some(true), "{told}");
        }
    };

    let out = Removed::new(&rig, &removed);
    let number = out.append(0, Kind::Tombstone, &mark);
    look(&rig, "a record of the older generation", true);
    let pool = rig.writer(1).unwrap();
    let record = pool.state().unreadable[0].clone();
    assert!(record.number == number && record.reason.contains("newest root key"), "{record:?}");
    let stopped = pool.reclaim(ReclaimOptions::default(), &rig.deletion());
    assert!(matches!(stopped, Err(PoolError::Stopped { .. })), "{stopped:?}");
    // Backups go on behind it.
    store(&pool, &order(3, Some(2), &[(0, 9)])).unwrap();
    drop(pool);
    assert_eq!(can_have(&rig.reader().unwrap(), 3, &[(0, 9), (1, 4), (4, 3)]), Some(true));

    let other = rig.on(SimulatedFiles::from_snapshot(2, &before));
    Removed::new(&other, &removed).bundle(0);
    look(&other, "a bundle of the older generation", false);

    let other = rig.on(SimulatedFiles::from_snapshot(3, &before));
    let mut out = Removed::new(&other, &removed);
    out.ring(2);
    look(&other, "a ring", false);
    out.bundle(2);
    look(&other, "a bundle under a ring of its own", false);
    // Its ring stands in nobody's way.
    let pool = other.writer(1).unwrap();
    let report = pool.verify(Depth::Structure, &mut |_, _| true).unwrap();
    let is_named = |damage: &Damage| matches!(damage, Damage::File { path, .. } if path.ends_with(".ring"));
    assert!(report.damage.iter().any(is_named), "{:?}", report.damage);
    assert_eq!(pool.rotate_keys(&[]).unwrap(), 3);
    store(&pool, &order(3, Some(2), &[(0, 9)])).unwrap();
    drop(pool);
    for recipient in [&rig.server, &rig.kit] {
        assert_eq!(can_have(&reader(&other, recipient).unwrap(), 3, &[(0, 9), (1, 4), (4, 3)]), Some(true));
    }

    let other = rig.on(SimulatedFiles::from_snapshot(4, &before));
    let mut out = Removed::new(&other, &removed);
    out.ring(2);
    let record = payload::Rotation { generation: 2, ring: vec![0; 32], removed: rig.kit.id.0.to_vec() };
    out.append(2, Kind::Rotation, &record);
    look(&other, "a rotation of its own", true);
}

/// The instrument of the test above makes what is believed where nobody was removed: its forgeries are real ones.
#[test]
fn the_same_from_somebody_who_was_not_removed_is_believed() {
    let rig = Rig::new(1, Settings::without_safety());
    store(&rig.writer(1).unwrap(), &order(1, None, &FIRST)).unwrap();
    let before = rig.files.snapshot();
    let mut holder = Removed::new(&rig, &rig.kit);
    holder.append(0, Kind::Tombstone, &payload::PointMark { point: id(1).0.to_vec(), reason: String::new() });
    assert!(rig.reader().unwrap().point(id(1)).unwrap().deleted.is_some());
    holder.ring(1);
    holder.append(1, Kind::Tick, &payload::PointMark::default());
    let pool = rig.reader().unwrap();
    assert!(pool.state().unreadable.is_empty(), "{:?}", pool.state().unreadable);
    assert_eq!(pool.state().generation, 1);
    let other = rig.on(SimulatedFiles::from_snapshot(2, &before));
    Removed::new(&other, &rig.kit).bundle(0);
    assert!(other.reader().unwrap().state().points.is_empty());
}

/// What a removed recipient says of the packs decides neither what is freed nor what a backup leaves out (INV-8, INV-9).
#[test]
fn a_removed_recipient_makes_no_run_and_no_pack_that_counts() {
    let begin = || {
        let rig = Rig::new(1, Settings::without_safety());
        let empty = rig.files.snapshot();
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(1, None, &FIRST)).unwrap();
        let other = add_kit(&pool);
        (rig, pool, other, empty)
    };
    let reclaimed = |rig: &Rig| {
        let pool = rig.writer(1).unwrap();
        for _ in 0..4 {
            pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
            pool.tick().unwrap();
        }
    };

    let (rig, pool, other, _) = begin();
    assert_eq!(pool.rotate_keys(&[other.id]).unwrap(), 1);
    drop(pool);
    Removed::new(&rig, &other).run();
    assert_eq!(can_have(&rig.reader().unwrap(), 1, &FIRST), Some(true), "a run beside a reader");
    reclaimed(&rig);
    assert_eq!(can_have(&rig.reader().unwrap(), 1, &FIRST), Some(true), "a run before a reclaim");

    // Of a block that a backup brings, and of one that a point needs.
    for says in [8, 1] {
        let (rig, pool, other, empty) = begin();
        assert_eq!(pool.rotate_keys(&[other.id]).unwrap(), 1);
        drop(pool);
        forged_pack(&rig, &empty, (says, 9));
        let pool = rig.writer(1).unwrap();
        store(&pool, &order(2, None, &[(0, says), (3, 5)])).unwrap();
        drop(pool);
        for told in ["before a reclaim", "after it"] {
            let pool = rig.reader().unwrap();
            assert_eq!(can_have(&pool, 1, &FIRST), Some(true), "content {says}, {told}");
            assert_eq!(can_have(&pool, 2, &[(0, says), (3, 5)]), Some(true), "content {says}, {told}");
            drop(pool);
            reclaimed(&rig);
        }
    }
}

/// A true frame under a forged table is no proof of what the table says.
#[test]
fn a_table_of_a_removed_recipient_proves_nothing() {
    let (rig, removed) = rotated();
    let out = Removed::new(&rig, &removed);
    forge_table(&out, 8);
    // Without a run everybody must read the table.
    let runs: Vec<String> = rig.files.snapshot().files().map(|(name, _)| name.to_owned()).collect();
    let mut snapshot = rig.files.snapshot();
    runs.iter().filter(|name| name.ends_with(".run")).for_each(|name| snapshot.remove(name));
    let rig = rig.on(SimulatedFiles::from_snapshot(5, &snapshot));
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(3, None, &[(0, 8), (3, 5)])).unwrap();
    drop(pool);
    assert_eq!(can_have(&rig.reader().unwrap(), 3, &[(0, 8), (3, 5)]), Some(true));
    assert_eq!(can_have(&rig.reader().unwrap(), 1, &FIRST), Some(true));
}

/// That a pack is missing is known to the index alone, so a rotation that is cut off anywhere keeps it.
#[test]
fn a_rotation_forgets_no_missing_pack() {
    let (rig, pool) = stored();
    drop(pool);
    let mut snapshot = rig.files.snapshot();
    let packs = snapshot.files().map(|(name, _)| name.to_owned()).filter(|name| name.starts_with("packs/"));
    packs.collect::<Vec<_>>().iter().for_each(|name| snapshot.remove(name));
    for site in 1.. {
        let rig = rig.on(SimulatedFiles::from_snapshot(2 + site, &snapshot));
        rig.files.crash_at(site);
        if let Ok(pool) = rig.writer(1) {
            assert!(pool.has_known_damage());
            let _ = pool.rotate_keys(&[]);
        }
        let was_cut = rig.files.is_off();
        rig.files.cut_power();
        for state in rig.files.crash_states(500).states {
            let rig = rig.on(SimulatedFiles::from_snapshot(1, &state));
            assert!(rig.writer(1).unwrap().has_known_damage(), "cut at {site}");
            assert!(rig.reader().unwrap().has_known_damage(), "cut at {site}");
        }
        if !was_cut {
            assert!(site > 50, "{site}");
            break;
        }
    }
}

/// The forgeries of the test above are believed where nobody was removed.
#[test]
fn the_same_run_and_pack_count_where_nobody_was_removed() {
    let (rig, pool) = stored();
    drop(pool);
    let before = rig.files.snapshot();
    forged_pack(&rig, &before, (8, 9));
    store(&rig.writer(1).unwrap(), &order(2, None, &[(0, 8)])).unwrap();
    assert_eq!(can_have(&rig.reader().unwrap(), 2, &[(0, 8)]), Some(false));
    Removed::new(&rig, &rig.kit).run();
    assert_eq!(can_have(&rig.reader().unwrap(), 1, &FIRST), Some(false));
}

/// The index is written again with the rotation: the opening after it reads no tables of packs.
#[test]
fn the_runs_of_a_rotated_pool_are_of_its_generation() {
    let (rig, _) = rotated();
    let runs = |rig: &Rig| {
        let snapshot = rig.files.snapshot();
        let runs = snapshot.files().filter(|(name, _)| name.ends_with(".run"));
        runs.map(|(_, bytes)| {
            run::generation(PagesOf::Places, bytes[..run::HEADER].try_into().unwrap()).unwrap()
        })
        .collect::<Vec<_>>()
    };
    assert!(runs(&rig).contains(&1), "{:?}", runs(&rig));
    let pool = rig.writer(1).unwrap();
    pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(runs(&rig).iter().all(|generation| *generation == 1), "{:?}", runs(&rig));
}

/// A reader that is open while a writer rotates, and a reclaim moves what it reads into packs under the new root.
#[test]
fn a_reader_goes_on_beside_a_rotation() {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    store(&pool, &order(4, None, &[(0, 10), (1, 11), (2, 12), (3, 13), (4, 14)])).unwrap();
    store(&pool, &order(5, None, &[(0, 10)])).unwrap();
    let (fresh, used) = (rig.reader().unwrap(), rig.reader().unwrap());
    assert_eq!(can_have(&used, 5, &[(0, 10)]), Some(true));
    pool.rotate_keys(&[]).unwrap();
    pool.delete_point(id(4), "test").unwrap();
    let freed = pool.reclaim(ReclaimOptions::default(), &rig.deletion()).unwrap();
    assert!(freed.freed_packs > 0 && freed.rewritten_bytes > 0, "{freed:?}");
    for pool in [&fresh, &used] {
        assert_eq!(can_have(pool, 5, &[(0, 10)]), Some(true));
    }
}

/// No pack is begun under the older root and ended after the rotation.
#[test]
fn a_rotation_waits_for_nobody_and_is_refused_beside_a_backup() {
    let rig = Rig::new(1, Settings::without_safety());
    let pool = rig.writer(1).unwrap();
    let mut job = Open::begin(&pool, order(1, None, &FIRST)).unwrap();
    job.go_on().unwrap();
    let before = rig.files.snapshot();
    assert!(matches!(pool.rotate_keys(&[]), Err(PoolError::Busy { .. })));
    assert_eq!(rig.files.snapshot(), before);
    job.commit().unwrap();
    pool.rotate_keys(&[]).unwrap();
    assert_eq!(can_have(&rig.reader().unwrap(), 1, &FIRST), Some(true));
}

/// The record of a rotation rots: the one behind it says the same, and nobody goes on under the older root.
#[test]
fn one_damaged_record_does_not_take_a_rotation_back() {
    let (rig, removed) = rotated();
    let rotation = rig.reader().unwrap().state().rotated;
    let before = rig.files.snapshot();
    for number in [rotation, rotation + 1] {
        // Nothing else came after it.
        let mut snapshot = before.clone();
        let later: Vec<String> = snapshot
            .files()
            .map(|(name, _)| name.to_owned())
            .filter(|name| {
                name.starts_with("index/")
                    || *name > record::name(rotation + 1) && name.starts_with("sequence/")
            })
            .collect();
        later.iter().for_each(|name| snapshot.remove(name));
        let rig = rig.on(SimulatedFiles::from_snapshot(2, &snapshot));
        rig.files.flip_bit(&record::name(number), 900).unwrap();
        store(&rig.writer(1).unwrap(), &order(9, Some(1), &[(0, 9)])).unwrap();
        assert_eq!(can_have(&rig.reader().unwrap(), 9, &[(0, 9), (1, 2), (4, 3)]), Some(true), "{number}");
        assert_eq!(can_have(&reader(&rig, &removed).unwrap(), 9, &[]), None, "{number}");
    }
    // A crash came between the two: the next writer adds the second.
    let mut snapshot = before.clone();
    let later: Vec<String> = snapshot
        .files()
        .map(|(name, _)| name.to_owned())
        .filter(|name| {
            name.starts_with("index/") || *name > record::name(rotation) && name.starts_with("sequence/")
        })
        .collect();
    later.iter().for_each(|name| snapshot.remove(name));
    let rig = rig.on(SimulatedFiles::from_snapshot(3, &snapshot));
    assert_eq!(rig.writer(1).unwrap().state().head, rotation + 1);
    assert_eq!(rig.writer(1).unwrap().state().head, rotation + 1);
}

// Nonces.

/// Keys and nonces of all seals, and how many had both alike.
#[derive(Default)]
struct Seen {
    seals: HashSet<([u8; 32], [u8; 12])>,
    repeated: u64,
}

static SEEN: OnceLock<Mutex<Seen>> = OnceLock::new();

fn watch(key: [u8; 32], nonce: [u8; 12]) {
    let seen = SEEN.get_or_init(Mutex::default);
    let mut seen = seen.lock().unwrap();
    if !seen.seals.insert((key, nonce)) {
        seen.repeated += 1;
    }
}

/// Draws the same bytes for ever.
struct Stuck;

impl Randomness for Stuck {
    fn fill(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        bytes.fill(7);
        Ok(())
    }
}

/// Lives of a pool, with power cuts, kills, takeovers, reclaims and rotations: no two seals of any of them have key and nonce
/// alike. The instrument itself is tried with randomness that repeats itself, which must be noticed.
///
/// In a process of its own (nextest) or beside the other tests: all of them seal under keys that nobody else has.
#[test]
fn no_nonce_is_used_twice_under_one_key() {
    assert!(storage_pool::keys::watch_seals(watch), "somebody watches already");
    let mut lives = 0;
    for seed in 1_000..1_040 {
        rig::life::live(seed, 12).unwrap_or_else(|wrong| panic!("{wrong}"));
        lives += 1;
    }
    let (seals, repeated) = {
        let seen = SEEN.get().unwrap().lock().unwrap();
        (seen.seals.len(), seen.repeated)
    };
    assert_eq!(repeated, 0, "{repeated} of {seals} seals in {lives} lives repeat a nonce");
    assert!(seals > 2_000, "{seals}");

    let rig = Rig::new(5, Settings::without_safety());
    let world = World { randomness: Arc::new(Stuck), ..rig.world() };
    let access = Access::Write { server: [1; 16], name: "stuck".to_owned() };
    let pool = Pool::open(world, &rig.server, access).unwrap();
    pool.put_document("a", Some(b"1")).unwrap();
    pool.put_document("a", Some(b"2")).unwrap();
    assert!(SEEN.get().unwrap().lock().unwrap().repeated > 0, "the instrument notices nothing");
}

/// No error, no debug output of anything that holds secrets shows them (INV-27).
#[test]
fn secrets_are_in_no_error_and_no_debug_output() {
    let (rig, removed) = rotated();
    let shown = |it: &dyn std::fmt::Debug| format!("{it:?}");
    let mut said = vec![shown(&rig.server), shown(&rig.kit), shown(&removed)];
    let pool = rig.writer(1).unwrap();
    said.push(shown(&pool.recipients().unwrap()));
    said.push(shown(&*pool.state()));
    let wrong = Recipient { secret: removed.secret.clone(), ..rig.kit.clone() };
    for error in [
        pool.prove(&removed).err(),
        pool.prove(&wrong).err(),
        pool.rotate_keys(&[rig.server.id]).err(),
        reader(&rig, &wrong).err(),
        Pool::open(rig.world(), &removed, Access::Write { server: [9; 16], name: String::new() }).err(),
    ] {
        let error = error.unwrap();
        said.push(format!("{error} {error:?}"));
    }
    for secret in [&rig.server.secret, &rig.kit.secret, &removed.secret] {
        let hex: String = secret.expose().iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{:?}", secret.expose());
        for text in &said {
            assert!(!text.contains(&hex) && !text.contains(list.trim_matches(['[', ']'])), "{text}");
        }
    }
    // What seals and hashes is in the files; the secrets themselves are in none.
    for (name, bytes) in rig.files.snapshot().files() {
        for secret in [&rig.server.secret, &rig.kit.secret] {
            assert!(!bytes.windows(32).any(|part| part == secret.expose()), "{name}");
        }
    }
}

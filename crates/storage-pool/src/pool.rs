//! Opening, creating and reading a pool.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use environment::{Files, Lock};
use model::{DatasourceId, DomainId, PoolId, RecoveryPointId, Timestamp};
use prost::Message;
use prost::bytes::Bytes;

use crate::activity::Activity;
use crate::bundle::{self, Span};
use crate::chunk::{ChunkId, ChunkKind, PackId};
use crate::error::{Damage, PoolError};
use crate::floor::{self, Floor};
use crate::format::parity;
use crate::format::payload::{self, Kind};
use crate::format::twin;
use crate::index::{Index, Tables};
use crate::keys::{DomainKeys, Keys, Secret};
use crate::kit::{Recipient, RecipientId};
use crate::map::NodeSource;
use crate::packs::{self, FinishedPack, PackReader, PackWriter};
use crate::rebuilt::Repaired;
use crate::rings::{self, RecipientKind, wrap_root};
use crate::sequence::{self, Appender, Tip, Unpublished};
use crate::sorter::Room;
use crate::state::{Point, State};
pub use crate::world::{World, key_name};

/// Settings fixed at creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Seconds for which a deleted point can be had back.
    pub soft_delete: u64,
    /// Seconds between quarantine and unlinking.
    pub reclaim_hold: u64,
    /// Newest good points of a machine that nothing deletes.
    pub floor_points: u32,
    /// Points younger than these seconds are not deleted.
    pub floor_age: u64,
    /// Share of the pool's bytes that one reclaim may free.
    pub breaker_percent: u32,
    /// zstd level of what the server encodes itself.
    pub zstd_level: i32,
    /// Bytes that ingests leave free on the volume; none at creation for a hundredth of the volume, 1 MiB to 1 GiB.
    pub reserve: Option<u64>,
    /// Parity that packs get, in percent of their bytes (section 6.1); 0 for none.
    pub parity_percent: u32,
}

impl Default for Settings {
    /// The safe ones: soft delete 14 days, hold 3 days, the last 3 good points and everything younger than a day kept,
    /// half of the pool at most freed at once.
    fn default() -> Settings {
        Settings {
            soft_delete: 14 * 86_400,
            reclaim_hold: 3 * 86_400,
            floor_points: 3,
            floor_age: 86_400,
            breaker_percent: 50,
            zstd_level: 3,
            reserve: None,
            parity_percent: 0,
        }
    }
}

impl Settings {
    /// Nothing is held back: for tests and benches.
    pub fn without_safety() -> Settings {
        Settings {
            soft_delete: 0,
            reclaim_hold: 0,
            floor_points: 0,
            floor_age: 0,
            breaker_percent: 100,
            zstd_level: 3,
            reserve: Some(0),
            parity_percent: 0,
        }
    }
}

/// The reserve where none was asked for: a hundredth of the volume, between 1 MiB and 1 GiB.
fn default_reserve(files: &dyn Files) -> u64 {
    const LIMITS: (u64, u64) = (1 << 20, 1 << 30);
    files.total_bytes().map_or(LIMITS.1, |total| (total / 100).clamp(LIMITS.0, LIMITS.1))
}

/// How a pool is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Nothing is written, no lock is taken: beside a writer, or from a read-only mount.
    Read,
    /// As the one writer.
    Write {
        /// Random id of this server's data folder.
        server: [u8; 16],
        /// Its name, for people.
        name: String,
    },
}

/// Name of the pool's header.
pub const HEADER_NAME: &str = "pool.stillpoint";
pub(crate) const LOCK_NAME: &str = "writer.lock";

struct Writer {
    appender: Appender,
    /// Bundles that count, and the record before which no new one is tried.
    bundles: Vec<Span>,
    bundle_after: u64,
    /// Why nothing may be written any more: what this process believes and what storage holds may differ.
    broken: Option<String>,
    _lock: Box<dyn Lock>,
}

/// An open pool.
pub struct Pool {
    pub(crate) world: World,
    pub(crate) keys: Keys,
    settings: Settings,
    created: Timestamp,
    state: RwLock<State>,
    /// Opened at once by a writer, and by a reader when something asks for a chunk or a pack.
    index: OnceLock<OpenIndex>,
    /// Held by whoever replaces runs.
    pub(crate) merging: Mutex<()>,
    pub(crate) reader: PackReader,
    writer: Option<Mutex<Writer>>,
    activity: Mutex<Activity>,
    /// What a mark may hold in memory.
    pub(crate) room: Room,
    domains: Mutex<HashMap<DomainId, Arc<DomainKeys>>>,
    pub(crate) tables: Mutex<Tables>,
    /// First bytes of pack ids whose folders are there and have durable names.
    pack_folders: Mutex<BTreeSet<u8>>,
    /// By whom the pool was opened.
    pub(crate) recipient: Recipient,
    /// Held by whoever changes who can open the pool.
    pub(crate) recipients: Mutex<()>,
    /// Held by a rotation, and for a moment by an ingest that begins.
    pub(crate) sealing: Mutex<()>,
    notes: Vec<Damage>,
}

/// The index, and what was damaged when it was opened.
struct OpenIndex {
    index: RwLock<Index>,
    damage: Vec<Damage>,
}

impl From<Index> for OpenIndex {
    fn from(index: Index) -> OpenIndex {
        OpenIndex { damage: index.damage().to_vec(), index: RwLock::new(index) }
    }
}

/// Ids drawn for a pack until one falls into a folder that can be used. If one of the 256 can, it is missed once in
/// e^16.
const FOLDER_DRAWS: usize = 4096;

/// How often a reader looks again when a writer went on beside it.
pub(crate) const LOOKS: usize = 4;

/// A pool that was just created, and who can open it.
pub struct Created {
    /// The pool, open for writing.
    pub pool: Pool,
    /// The server's own way in; its secret goes into the data folder.
    pub server: Recipient,
    /// The domain that everything goes into by default.
    pub domain: DomainId,
}

impl Pool {
    /// Creates a pool in an empty folder.
    ///
    /// `keep_kit` is given the recovery kit's recipient, must put it into a safe place *outside* the folder, read it
    /// back from there and return what it read: the kit is proved before a pool exists. If it fails, nothing is made.
    pub fn create(
        world: World,
        settings: Settings,
        server: [u8; 16],
        name: &str,
        keep_kit: &mut dyn FnMut(&Recipient) -> Result<Recipient, PoolError>,
    ) -> Result<Created, PoolError> {
        let io = |name: &str, action, source| PoolError::io(world.path(name), action, source);
        for folder in ["", "sequence", "packs", "index", "keys"] {
            match world.files.list(folder) {
                // Keys without anything else are what a creation left behind that was cut off.
                Ok(entries) if !matches!(folder, "" | "keys") && !entries.is_empty() => {
                    return Err(PoolError::Exists { path: world.path(folder) });
                }
                Ok(entries) if entries.iter().any(|entry| entry.name == HEADER_NAME) => {
                    return Err(PoolError::Exists { path: world.path(HEADER_NAME) });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(io(folder, "list", source)),
            }
        }
        let pool = PoolId(world.random_id()?);
        let secret = || {
            Secret::random(&*world.randomness)
                .map_err(|source| io(HEADER_NAME, "draw random bytes for", source))
        };
        let root = secret()?;
        let server_recipient = Recipient { pool, id: RecipientId(world.random_id()?), secret: secret()? };
        let kit = Recipient { pool, id: RecipientId(world.random_id()?), secret: secret()? };
        let read_back = keep_kit(&kit)?;
        if read_back.pool != pool || read_back.id != kit.id || read_back.secret != kit.secret {
            return Err(PoolError::KeyWrong {
                reason: "the recovery kit read back is not the one written".to_owned(),
            });
        }

        for folder in ["keys", "sequence", "packs", "index"] {
            world.files.make_folder(folder).map_err(|source| io(folder, "create", source))?;
        }
        let keys = Keys::new(pool, root);
        let all = [(&server_recipient, RecipientKind::Server), (&read_back, RecipientKind::Kit)];
        for (recipient, kind) in all {
            let bytes = wrap_root(&world, recipient, kind, &keys)?;
            world.publish(&key_name(recipient.id), &bytes)?;
            rings::open(&world, recipient)?;
        }
        let created = world.clock.now_micros();
        let header = payload::Header {
            pool: pool.0.to_vec(),
            created,
            settings: Some(payload::Settings {
                soft_delete: settings.soft_delete,
                reclaim_hold: settings.reclaim_hold,
                floor_points: settings.floor_points,
                floor_age: settings.floor_age,
                breaker_percent: settings.breaker_percent,
                zstd_level: settings.zstd_level,
                reserve: settings.reserve.unwrap_or_else(|| default_reserve(&*world.files)),
                parity_percent: settings.parity_percent.min(parity::MAX_PERCENT),
            }),
        };
        // The header comes last of the files that never change: a folder without it is no pool.
        world.publish(HEADER_NAME, &twin::encode(twin::POOL, &header.encode_to_vec()))?;
        let access = Access::Write { server, name: name.to_owned() };
        let pool = Pool::open(world, &server_recipient, access)?;
        let domain = pool.create_domain("default")?;
        pool.make_ballast()?;
        Ok(Created { pool, server: server_recipient, domain })
    }

    /// Opens a pool.
    ///
    /// For writing this takes the lock, and where another server wrote last, takes over by a record. Damage found on
    /// the way is in [`Pool::notes`]; what is derived is made again and said there.
    pub fn open(world: World, recipient: &Recipient, access: Access) -> Result<Pool, PoolError> {
        let (header, header_damage) = read_header(&world)?;
        if header.id != recipient.pool {
            return Err(PoolError::OtherPool { expected: recipient.pool, found: header.id });
        }
        let mut notes: Vec<Damage> = header_damage.into_iter().collect();
        let mut opened = rings::open(&world, recipient)?;
        notes.append(&mut opened.damage);
        let keys = opened.keys.clone();

        let lock = match &access {
            Access::Read => None,
            Access::Write { .. } => {
                let path = world.path(LOCK_NAME);
                let lock = world
                    .files
                    .lock(LOCK_NAME)
                    .map_err(|source| PoolError::io(path.clone(), "lock", source))?;
                Some(lock.ok_or(PoolError::Busy { path })?)
            }
        };
        let io = |name: &str, action, source| PoolError::io(world.path(name), action, source);
        if lock.is_some() {
            // A process that was killed may have published names and not made them durable; nothing may be built upon
            // a record or a run that a power cut could still take away.
            for folder in ["sequence", "index"] {
                world.files.sync_folder(folder).map_err(|source| io(folder, "sync", source))?;
            }
        }
        // The state first, then the index: a reader beside a writer must find every chunk that a point names. If a
        // writer went on between the two, the state is read again.
        let (mut state, mut bundles, mut bundle_damage) = bundle::load_bundled(&*world.files, &keys)?;
        for _ in 0..LOOKS {
            // A writer may have rotated the keys between the look at the rings and that at the records.
            let newest = keys.newest();
            if !state.unreadable.iter().any(|record| record.generation.is_some()) {
                break;
            }
            opened.rings = rings::look_again(&world, recipient, &keys)?;
            if keys.newest() == newest {
                break;
            }
            (state, bundles, bundle_damage) = bundle::load_bundled(&*world.files, &keys)?;
        }
        let mut index = None;
        for _ in 0..LOOKS {
            let (witnessed, is_sound) = if lock.is_some() {
                let gone = |pack| state.permitted.contains_key(&pack);
                let opened = index.insert(Index::open(world.files.clone(), &keys, state.generation, &gone)?);
                (opened.witnessed(), opened.damage().is_empty())
            } else {
                (Index::witnessed_by_ends(&*world.files, &keys, state.generation)?, true)
            };
            let head = state.head;
            if is_sound && witnessed <= head {
                break;
            }
            let again = bundle::load_bundled(&*world.files, &keys)?;
            let is_same = again.0.head == head;
            if !is_same {
                (state, bundles, bundle_damage) = again;
            }
            state.expect_head(witnessed, |number| world.path(&crate::format::record::name(number)));
            if is_same {
                break;
            }
        }
        keys.seal_under(state.generation);
        if lock.is_some() {
            // Whoever was removed, or lacks a ring, must not go on with the older root.
            if let Some((record, generation)) =
                state.unreadable.iter().find_map(|record| Some((record, record.generation?)))
            {
                keys.root(generation)
                    .map_err(|error| PoolError::KeyWrong { reason: format!("{}: {error}", record.path) })?;
            }
            if let Some((record, needs)) =
                state.unreadable.iter().find_map(|record| Some((record, record.needs?)))
            {
                let reads = crate::format::VERSION;
                return Err(PoolError::TooNew { path: record.path.clone(), needs, reads });
            }
            let folders: BTreeSet<String> = index
                .iter()
                .flat_map(|index| index.loose_packs())
                .map(|pack| crate::format::pack::folder(*pack))
                .collect();
            for folder in folders {
                world.files.sync_folder(&folder).map_err(|source| io(&folder, "sync", source))?;
            }
        }
        let counts = |generation: &u16| state.rings.contains_key(generation) || !state.unreadable.is_empty();
        let rings = opened.rings.into_iter().filter(|(generation, _)| counts(generation));
        notes.extend(rings.flat_map(|(_, damage)| damage));
        notes.extend(bundle_damage);
        notes.extend(record_damage(&state));
        let reader = PackReader::new(world.files.clone(), keys.clone());
        let appender =
            |world: &World| Appender::new(world.files.clone(), keys.clone(), world.randomness.clone());
        let writer = lock.map(|lock| {
            let appender = appender(&world);
            Mutex::new(Writer { appender, bundles, bundle_after: 0, broken: None, _lock: lock })
        });
        let is_writer = writer.is_some();
        let pack_folders = index.iter().flat_map(Index::folders_with_packs).collect();
        let pool = Pool {
            keys,
            settings: header.settings,
            created: header.created,
            state: RwLock::new(state),
            index: index.map_or_else(OnceLock::new, |index| OnceLock::from(OpenIndex::from(index))),
            merging: Mutex::new(()),
            reader,
            writer,
            activity: Mutex::new(Activity::default()),
            // A reader leaves no file, not even one without a name.
            room: if is_writer { Room::default() } else { Room(usize::MAX) },
            domains: Mutex::new(HashMap::new()),
            tables: Mutex::new(Tables::default()),
            pack_folders: Mutex::new(pack_folders),
            recipient: recipient.clone(),
            recipients: Mutex::new(()),
            sealing: Mutex::new(()),
            notes,
            world,
        };
        if let Access::Write { server, name } = access {
            if pool.state().head == 0 {
                pool.append(Kind::Created, &payload::PointMark::default())?;
            }
            if pool.state().server != server {
                pool.append(Kind::Takeover, &payload::Takeover { server: server.to_vec(), name })?;
            }
            // The end of a rotation that was cut off after its record.
            let is_last = |state: &State| state.rotated == state.head;
            if is_last(&pool.state()) {
                pool.tick()?;
            }
            // Chunks of a job that was killed, and of runs that were damaged, get an index again. A full disk does not
            // keep a pool from being opened: they are in memory.
            match pool.flush_index() {
                Ok(()) | Err(PoolError::Full { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(pool)
    }

    /// Damage met while opening. Opens the index, where nothing has asked for it yet.
    pub fn notes(&self) -> Vec<Damage> {
        self.notes.iter().chain(&self.open_index().damage).cloned().collect()
    }

    /// The same without opening the index for it, whose cost follows the pool.
    pub fn notes_at_hand(&self) -> Vec<Damage> {
        if self.is_index_open() { self.notes() } else { self.notes.clone() }
    }

    /// The pool's id.
    pub fn id(&self) -> PoolId {
        self.keys.pool()
    }

    /// When it was created.
    pub fn created(&self) -> Timestamp {
        self.created
    }

    /// Settings fixed at creation.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Lets a reclaim hold so many records of what it sorts in memory, instead of a million. For tests and measurements.
    pub fn limit_sorting(&mut self, records: usize) {
        self.room = Room(records);
    }

    /// The folder, for messages.
    pub fn path(&self) -> String {
        self.world.path("")
    }

    /// Whether this process may write.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// What the sequence says now.
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_index(&self) -> &OpenIndex {
        self.index.get_or_init(|| {
            let (mut permitted, mut head, mut generation) = {
                let state = self.state();
                (state.permitted.clone(), state.head, state.generation)
            };
            for _ in 0..LOOKS {
                let gone = |pack| permitted.contains_key(&pack);
                let opened = match Index::open(self.world.files.clone(), &self.keys, generation, &gone) {
                    Ok(index) if !index.damage().is_empty() => index,
                    Ok(index) => return index.into(),
                    Err(error) => return Index::closed(self.world.files.clone(), &self.keys, error).into(),
                };
                // What is missing may have been removed by a reclaim after this pool was opened for reading, and what cannot
                // be read may be sealed under a key generation that began since.
                let _ = self.learn_rings();
                match bundle::load_bundled(&*self.world.files, &self.keys) {
                    Ok((fresh, ..)) if fresh.head != head => {
                        (head, permitted, generation) = (fresh.head, fresh.permitted, fresh.generation)
                    }
                    _ => return opened.into(),
                }
            }
            let error = PoolError::Busy { path: self.world.path("index") };
            Index::closed(self.world.files.clone(), &self.keys, error).into()
        })
    }

    pub(crate) fn is_index_open(&self) -> bool {
        self.index.get().is_some()
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.open_index().index.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.open_index().index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a record; see [`Appender::append`].
    pub(crate) fn append(&self, kind: Kind, payload: &impl Message) -> Result<u64, PoolError> {
        self.append_if(kind, |_| Ok(Some(payload))).map(Option::unwrap_or_default)
    }

    /// Appends the record that `decide` makes of the state, if any, with nothing between its look and the record.
    pub(crate) fn append_if<M: std::ops::Deref<Target: Message + Sized>>(
        &self,
        kind: Kind,
        decide: impl FnOnce(&State) -> Result<Option<M>, PoolError>,
    ) -> Result<Option<u64>, PoolError> {
        self.append_under(kind, None, decide)
    }

    /// The same, sealed under a key generation that begins with it.
    pub(crate) fn append_under<M: std::ops::Deref<Target: Message + Sized>>(
        &self,
        kind: Kind,
        begins: Option<u16>,
        decide: impl FnOnce(&State) -> Result<Option<M>, PoolError>,
    ) -> Result<Option<u64>, PoolError> {
        let mut writer = self.writer()?;
        self.bundle(&mut writer);
        self.is_trusted(&writer)?;
        let (record, tip) = {
            let state = self.state();
            let Some(record) = decide(&state)? else { return Ok(None) };
            let generation = begins.unwrap_or(state.generation);
            (record, Tip { head: state.head, hash: state.head_hash, epoch: state.epoch, generation })
        };
        let time = self.world.clock.now_micros();
        let appended = writer.appender.append(tip, time, kind, &*record).map_err(|failed| {
            if failed.is_doubtful {
                writer.broken.get_or_insert(failed.error.to_string());
            }
            failed.error
        })?;
        let number = appended.tip.head;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        (state.head, state.head_hash) = (number, appended.tip.hash);
        state.generation = state.generation.max(appended.tip.generation);
        self.keys.seal_under(state.generation);
        state.apply(number, appended.tip.epoch, time, kind as u16, &Bytes::from(appended.payload)).map_err(
            |reason| {
                writer.broken.get_or_insert(reason.clone());
                PoolError::Misuse(format!(
                    "{}: {reason}",
                    self.world.path(&crate::format::record::name(number))
                ))
            },
        )?;
        Ok(Some(number))
    }

    /// Gives records that are in no bundle one, now and then. Before a record, not after it: what was just acknowledged
    /// does not wait for it, and a failure of what is derived must not look like one of the record.
    fn bundle(&self, writer: &mut Writer) {
        let head = self.state().head;
        if head < writer.bundle_after || !self.state().unreadable.is_empty() {
            return;
        }
        match bundle::extend(&*self.world.files, &self.keys, &*self.world.randomness, &writer.bundles, head) {
            Ok(Some(spans)) => writer.bundles = spans,
            Ok(None) => {
                let covered = writer.bundles.last().map_or(0, |span| span.last);
                if head - covered.min(head) >= bundle::BUNDLE_RECORDS {
                    writer.bundle_after = head + bundle::BUNDLE_RECORDS;
                }
            }
            Err(Unpublished::Doubtful(error)) => {
                writer.broken.get_or_insert(error.to_string());
            }
            // A full disk, say: it is tried again later, and the records themselves are there.
            Err(_) => writer.bundle_after = head + bundle::BUNDLE_RECORDS,
        }
    }

    /// Bundles of an older key generation are not believed; new ones begin at the first record.
    pub(crate) fn forget_bundles(&self) {
        if let Some(writer) = &self.writer {
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.bundles.clear();
            writer.bundle_after = 0;
        }
    }

    /// Reads every record again, also those that a bundle covers, and every bundle. What cannot be read is named in the
    /// state from then on, and in the answer.
    pub fn recheck_records(&self) -> Result<Vec<Damage>, PoolError> {
        // No record between the reading and the comparison; a reader has none of its own.
        let _writer =
            self.writer.as_ref().map(|writer| writer.lock().unwrap_or_else(PoisonError::into_inner));
        let mut fresh = sequence::load(&*self.world.files, &self.keys)?;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        fresh.expect_head(state.head, |number| self.world.path(&crate::format::record::name(number)));
        // A last record that could not be read when the pool was opened has no hash to compare.
        let is_end_unread = state.unreadable.iter().any(|record| record.number == state.head);
        let is_same_end = fresh.head == state.head && (fresh.head_hash == state.head_hash || is_end_unread);
        if is_same_end && fresh.unreadable.is_empty() {
            // Where the two differ, the records are right.
            *state = fresh;
        } else {
            // Records of another server after ours must not become the end that we append to: we are fenced, and stay so
            // (INV-16). What a bundle or this process knows of a damaged record stays known, and is freed by nobody.
            let head = state.head;
            // A record that could not be read when the state was made is not in it, though it can be read now.
            let fresh = fresh.unreadable.into_iter().filter(|record| record.number <= head);
            let news: Vec<_> = fresh
                .filter(|record| state.unreadable.iter().all(|known| known.number != record.number))
                .collect();
            state.unreadable.extend(news);
        }
        let mut damage = record_damage(&state);
        drop(state);
        damage.extend(bundle::examine(&*self.world.files, &self.keys)?);
        Ok(damage)
    }

    /// The right to write, if there is still nothing in doubt.
    fn writer(&self) -> Result<MutexGuard<'_, Writer>, PoolError> {
        let writer =
            self.writer.as_ref().ok_or(PoolError::ReadOnly)?.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_trusted(&writer)?;
        Ok(writer)
    }

    /// Refuses if nothing may be written any more, before something is begun that is sealed or handed out.
    pub(crate) fn check_writer(&self) -> Result<(), PoolError> {
        self.writer().map(drop)
    }

    fn is_trusted(&self, writer: &Writer) -> Result<(), PoolError> {
        let Some(reason) = &writer.broken else { return Ok(()) };
        Err(PoolError::Io {
            path: self.path(),
            action: "write",
            source: io::Error::other(format!(
                "an earlier write may or may not have happened ({reason}); open the storage pool again"
            )),
        })
    }

    pub(crate) fn break_writer(&self, error: &PoolError) {
        if let Some(writer) = &self.writer {
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.broken.get_or_insert(error.to_string());
        }
    }

    /// A fresh id for a pack, in a folder whose name is durable.
    ///
    /// A folder that is there is no proof of that: where the sync failed that should have made its name durable, by this
    /// process or by one before, the name stays visible, and every later sync succeeds without bringing it to the disk
    /// (INV-5). A pack in it would go with it at the next power cut. So a folder is used that this process made anew, or
    /// that has or had packs: none of them was begun before the name was durable. Any other is left alone and another id
    /// drawn.
    pub(crate) fn new_pack(&self) -> Result<PackId, PoolError> {
        // Held over the making: a failed sync of `packs` takes all names there that were not durable yet, and whoever
        // waits here has none.
        let mut durable = self.pack_folders.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..FOLDER_DRAWS {
            let id = PackId(self.world.random_id()?);
            if durable.contains(&id.0[0]) {
                return Ok(id);
            }
            let folder = crate::format::pack::folder(id);
            let failed = |action, source| PoolError::io(self.world.path(&folder), action, source);
            match self.world.files.names(&folder) {
                Ok(_) if !self.had_packs(id.0[0]) => continue,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.world.files.make_folder(&folder).map_err(|source| failed("create", source))?;
                }
                Err(source) => return Err(failed("list", source)),
            }
            durable.insert(id.0[0]);
            return Ok(id);
        }
        let reason = "its folders are empty and may not last over a power cut; stop the server and remove \
                      those that are empty";
        Err(PoolError::io(self.world.path("packs"), "make a pack in", io::Error::other(reason)))
    }

    /// Whether a pack was let go of whose id begins with this byte.
    fn had_packs(&self, first: u8) -> bool {
        let (mut low, mut high) = ([0; 16], [0xff; 16]);
        (low[0], high[0]) = (first, first);
        self.state().permitted.range(PackId(low)..=PackId(high)).next().is_some()
    }

    /// Makes a pack durable. If its name may not last, that is recorded, as far as storage lets us, and nothing more
    /// is written (INV-5).
    pub(crate) fn finish_pack(&self, pack: PackWriter) -> Result<FinishedPack, PoolError> {
        let id = pack.id();
        let failed = match pack.finish() {
            Ok(finished) => return Ok(finished),
            Err(failed) => failed,
        };
        if let Unpublished::Doubtful(error) = &failed {
            // A failed sync of a folder may have lost every name in it that was not durable yet.
            let mut doubtful: Vec<PackId> =
                self.index().loose_packs().iter().copied().filter(|pack| pack.0[0] == id.0[0]).collect();
            doubtful.push(id);
            let record = payload::Damage {
                pack: doubtful.iter().flat_map(|pack| pack.0).collect(),
                frames: Vec::new(),
                reason: format!("its name may not last over a power cut: {error}"),
            };
            // Where this fails too, the writer is broken all the same.
            let _ = self.append(Kind::Damage, &record);
            self.break_writer(error);
        }
        Err(failed.into_error(self.world.path(&crate::format::pack::name(id))))
    }

    /// A fresh random id.
    pub fn random_id(&self) -> Result<[u8; 16], PoolError> {
        self.world.random_id()
    }

    /// Adds a key domain.
    pub fn create_domain(&self, label: &str) -> Result<DomainId, PoolError> {
        let id = DomainId(self.world.random_id()?);
        self.append(Kind::Domain, &payload::Domain { domain: id.0.to_vec(), label: label.to_owned() })?;
        Ok(id)
    }

    /// The domain that everything goes into by default: the first one.
    pub fn default_domain(&self) -> Result<DomainId, PoolError> {
        let state = self.state();
        let labelled = state.domains.iter().find(|(_, label)| *label == "default").map(|(id, _)| *id);
        // The record of the domain may be damaged; the points say which one it was.
        labelled
            .or_else(|| state.in_order().next().map(|point| point.domain))
            .ok_or_else(|| PoolError::Misuse("the storage pool has no domain".to_owned()))
    }

    /// Writes a new version of a document, or removes it. The pool keeps it sealed and does not read it.
    pub fn put_document(&self, name: &str, bytes: Option<&[u8]>) -> Result<(), PoolError> {
        if self.state().documents.get(name).map(Vec::as_slice) == bytes {
            return Ok(());
        }
        let record = payload::Document {
            name: name.to_owned(),
            bytes: bytes.unwrap_or_default().to_vec(),
            removed: bytes.is_none(),
        };
        self.append(Kind::Document, &record).map(drop)
    }

    /// Newest version of a document.
    pub fn document(&self, name: &str) -> Option<Vec<u8>> {
        self.state().documents.get(name).cloned()
    }

    /// All documents whose names begin with `prefix`.
    pub fn documents(&self, prefix: &str) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        state
            .documents
            .range(prefix.to_owned()..)
            .take_while(|(name, _)| name.starts_with(prefix))
            .map(|(name, bytes)| (name.clone(), bytes.clone()))
            .collect()
    }

    /// Lets pool time go on (section 9.3).
    pub fn tick(&self) -> Result<(), PoolError> {
        self.append(Kind::Tick, &payload::PointMark::default()).map(drop)
    }

    /// A point that is not expired.
    pub fn point(&self, id: RecoveryPointId) -> Result<Point, PoolError> {
        self.state().points.get(&id).cloned().ok_or(PoolError::NoSuchPoint(id))
    }

    /// Marks points as possibly holding old bytes (INV-22).
    pub fn mark_suspect(&self, points: &[RecoveryPointId], reason: &str) -> Result<(), PoolError> {
        if points.is_empty() {
            return Ok(());
        }
        let record = payload::PointsMark {
            points: points.iter().flat_map(|id| id.0).collect(),
            reason: reason.to_owned(),
        };
        self.append(Kind::Suspect, &record).map(drop)
    }

    /// Soft-deletes a point. The floor is the caller's policy *and* the pool's: a point that the floor keeps is refused.
    pub fn delete_point(&self, id: RecoveryPointId, reason: &str) -> Result<(), PoolError> {
        let record = payload::PointMark { point: id.0.to_vec(), reason: reason.to_owned() };
        self.append_if(Kind::Tombstone, |state| {
            let point = state.points.get(&id).ok_or(PoolError::NoSuchPoint(id))?;
            if point.deleted.is_some() {
                return Ok(None);
            }
            let now = self.world.clock.now_micros();
            match Floor::of(state, self.floor_terms(), now, Some(point.datasource)).keeps(point) {
                Some(reason) => Err(PoolError::Kept { point: id, reason }),
                None => Ok(Some(&record)),
            }
        })
        .map(drop)
    }

    /// Takes a soft deletion back, as long as the point is not expired. Refused while a record cannot be read: it may have
    /// deleted the point earlier, and its packs may be gone.
    pub fn undelete_point(&self, id: RecoveryPointId) -> Result<(), PoolError> {
        if !self.state().unreadable.is_empty() {
            self.recheck_records()?;
        }
        let record = payload::PointMark { point: id.0.to_vec(), reason: String::new() };
        // A reclaim decides by the same state, so the look and the record must be one step.
        self.append_if(Kind::Undelete, |state| {
            let point = state.points.get(&id).ok_or(PoolError::NoSuchPoint(id))?;
            if point.deleted.is_none() {
                return Ok(None);
            }
            if let Some(record) = state.unreadable.first() {
                let reason = format!(
                    "{}: {}; it may say that the point is gone already: give the record back from a copy, then try again",
                    record.path, record.reason
                );
                return Err(PoolError::Stopped { reason });
            }
            if state.is_expired(point, self.settings.soft_delete) {
                return Err(PoolError::Misuse(format!(
                    "recovery point {id} is expired: its soft-delete period is over and its space may be gone"
                )));
            }
            Ok(Some(&record))
        })
        .map(drop)
    }

    /// What the retention floor keeps now, of `machine` or of every machine.
    pub fn floor(&self, machine: Option<DatasourceId>) -> Floor {
        Floor::of(&self.state(), self.floor_terms(), self.world.clock.now_micros(), machine)
    }

    fn floor_terms(&self) -> floor::Terms {
        floor::Terms { points: self.settings.floor_points, age: self.settings.floor_age }
    }

    /// Exact bytes of a record, for a copy elsewhere.
    pub fn record_bytes(&self, number: u64) -> Result<Vec<u8>, PoolError> {
        sequence::raw(&*self.world.files, number).map_err(|source| {
            PoolError::io(self.world.path(&crate::format::record::name(number)), "read", source)
        })
    }

    /// Whether `bytes` are record `number` of this pool, whole and authentic.
    pub fn is_record(&self, number: u64, bytes: &[u8]) -> bool {
        sequence::is_record(&self.keys, number, bytes)
    }

    /// Gives the pool back a record whose file is damaged or missing, from a copy kept elsewhere. False if the copy is
    /// not that record, or the file is fine.
    pub fn restore_record(&self, number: u64, bytes: &[u8]) -> Result<bool, PoolError> {
        let is_damaged = self.state().unreadable.iter().any(|record| record.number == number);
        if !is_damaged || !sequence::is_record(&self.keys, number, bytes) {
            return Ok(false);
        }
        self.append(Kind::Restored, &payload::Restored { number, bytes: bytes.to_vec() })?;
        // What the record says takes effect at its own place in the order: read everything again, with no other record
        // between.
        let _writer = self.writer()?;
        let mut state = sequence::load(&*self.world.files, &self.keys)?;
        let head = self.state().head;
        state.expect_head(head, |number| self.world.path(&crate::format::record::name(number)));
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(true)
    }

    pub(crate) fn domain_keys(&self, domain: DomainId) -> Arc<DomainKeys> {
        let mut domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        domains.entry(domain).or_insert_with(|| Arc::new(self.keys.domain(domain))).clone()
    }

    /// A mark for [`Pool::rebuilt_since`].
    pub fn rebuilt_mark(&self) -> u64 {
        self.reader.rebuilt.mark()
    }

    /// What anybody who read from this pool since a mark met damaged and had from parity.
    pub fn rebuilt_since(&self, mark: u64) -> Vec<Repaired> {
        self.reader.rebuilt.since(mark)
    }

    /// Header and table of a pack; that parity was needed for them is told like any other.
    pub(crate) fn read_table(&self, id: PackId) -> Result<FinishedPack, PoolError> {
        let table = packs::read_table(&*self.world.files, &self.keys, id)?;
        if !table.rebuilt.is_empty() {
            self.reader.rebuilt.note(id, table.rebuilt.iter().copied());
        }
        Ok(table)
    }

    pub(crate) fn forget_pack(&self, pack: PackId) {
        self.reader.forget(pack);
        self.tables().forget(pack);
    }

    /// What goes on. Taken before the writer's lock and the state's; nothing begins, ends or pins while it is held.
    pub(crate) fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nodes of a domain, read from the pool.
pub struct PoolNodes {
    pub(crate) pool: Arc<Pool>,
    pub(crate) keys: Arc<DomainKeys>,
}

impl PoolNodes {
    /// Nodes of `domain`.
    pub fn new(pool: &Arc<Pool>, domain: DomainId) -> PoolNodes {
        PoolNodes { pool: pool.clone(), keys: pool.domain_keys(domain) }
    }
}

impl NodeSource for PoolNodes {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, PoolError> {
        let mut bytes = Vec::new();
        self.pool.read_chunk(&self.keys, ChunkKind::Node, id, &mut |node| bytes.extend_from_slice(node))?;
        Ok(bytes)
    }
}

/// What the header of a pool says.
pub struct PoolHeader {
    /// Its id.
    pub id: PoolId,
    /// When it was created.
    pub created: Timestamp,
    /// Settings fixed then.
    pub settings: Settings,
}

fn record_damage(state: &State) -> Vec<Damage> {
    let damage = |record: &crate::state::Unreadable| Damage::File {
        path: record.path.clone(),
        offset: 0,
        reason: record.reason.clone(),
        derived: false,
    };
    state.unreadable.iter().map(damage).collect()
}

/// Reads the header of the pool in `world`, and what is wrong with one of its copies.
pub fn read_header(world: &World) -> Result<(PoolHeader, Option<Damage>), PoolError> {
    let path = world.path(HEADER_NAME);
    let bytes = world.files.read(HEADER_NAME, twin::MAX_BYTES).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PoolError::NoPool { path: world.path("") },
        _ => PoolError::io(path.clone(), "read", source),
    })?;
    let twin = twin::decode(twin::POOL, &bytes).map_err(|error| error.in_file(path.clone()))?;
    let damaged = |reason: String| PoolError::Damaged { path: path.clone(), offset: 16, reason };
    let header = payload::Header::decode(&twin.content[..]).map_err(|error| damaged(error.to_string()))?;
    let settings = header.settings.ok_or_else(|| damaged("no settings".to_owned()))?;
    let id = PoolId::try_from(&header.pool[..]).map_err(|error| damaged(error.to_string()))?;
    let header = PoolHeader {
        id,
        created: Timestamp(header.created),
        settings: Settings {
            soft_delete: settings.soft_delete,
            reclaim_hold: settings.reclaim_hold,
            floor_points: settings.floor_points,
            floor_age: settings.floor_age,
            breaker_percent: settings.breaker_percent,
            zstd_level: settings.zstd_level,
            reserve: Some(settings.reserve),
            parity_percent: settings.parity_percent.min(parity::MAX_PERCENT),
        },
    };
    Ok((header, twin.damage.map(|damage| twin_damage(path, &damage))))
}

fn twin_damage(path: String, damage: &crate::format::FormatError) -> Damage {
    let (offset, reason) = match damage {
        crate::format::FormatError::Damaged { offset, reason } => (*offset, reason.clone()),
        crate::format::FormatError::TooNew(version) => (0, format!("one copy needs version {version}")),
    };
    Damage::File { path, offset, reason: format!("{reason}; the other copy serves"), derived: false }
}

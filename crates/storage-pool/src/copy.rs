//! A second copy: the encrypted files of a pool moved into another folder, beside whatever runs (section 11).
//!
//! Needs no key: every file is held against what it says of itself, so rot is named and not copied. Refuses: a folder that
//! holds anything else, a copy that somebody wrote to, and writing over a file that is there.
//!
//! Invariants
//! - A copy with a header opens, and has everything that the points of its records need and the source had. (must)
//! - Nothing of a copy is removed here; [`Copy::let_go`] asks the deletion service for what the copy's own records
//!   permit. (must: INV-10, INV-15)
//! - A file has its final name in the copy only when it is whole, read back, and synced. (must)
//!
//! | running \ starting | copy | anything at the source | a server on the copy |
//! |---|---|---|---|
//! | copy | refused by the copy's lock | beside it: a permit makes it list again | refused by the copy's lock |

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

use block_io::Pace;
use environment::{Entry, Lock, NewFile, ReadFile};
use model::PoolId;

use crate::chunk::PackId;
use crate::error::{Damage, PoolError};
use crate::examine::{self, PackExamination, Reading};
use crate::format::parity::MAX_FILE;
use crate::format::payload::Kind;
use crate::format::record::{self, RecordHeader};
use crate::format::{pack, ring, twin};
use crate::kit::Recipient;
use crate::parity::{self, Parity, Rebuilder};
use crate::pool::{HEADER_NAME, LOCK_NAME, World, read_header};
use crate::rebuilt::Repaired;
use crate::reclaim::DeletionService;
use crate::sequence::{self, Unpublished};

/// Bytes moved at once: what a cancel waits for at most, and what a rate limit lets through in one piece.
const PIECE: usize = 1 << 20;

/// How often a permit makes a copy list again before it gives up: each time only what is new is moved.
const PASSES: u32 = 64;

/// Folders of a pool that a copy has. The one of the index stays empty: runs and bundles are made again from what is copied.
const FOLDERS: [&str; 4] = ["keys", "packs", "sequence", "index"];

/// What may lie in the folder of a copy that has no header yet.
const EXPECTED: [&str; 7] = ["keys", "packs", "sequence", "index", "staging", LOCK_NAME, "lost+found"];

/// How a copy is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Reads and hashes also what the copy has already.
    pub verify: bool,
    /// Copies damaged packs as they are, for what can be had of them.
    pub accept_damage: bool,
}

/// What a copy did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Bytes of files that were moved.
    pub bytes_copied: u64,
    /// Packs of these.
    pub packs_copied: u64,
    /// Records of these.
    pub records_copied: u64,
    /// Bytes of packs that the copy had.
    pub bytes_present: u64,
    /// Number of the last record of the copy.
    pub head: u64,
    /// How often the packs were listed: more than once if a permit came between.
    pub passes: u32,
    /// Files that could not be copied, on either side.
    pub damage: Vec<Damage>,
    /// Packs that are damaged at the source, and whole in the copy: parity gave what was missing.
    pub repaired: Vec<Repaired>,
    /// Bytes of packs that left the copy.
    pub bytes_freed: u64,
    /// Whether it was cancelled before its end.
    pub cancelled: bool,
}

impl CopyReport {
    /// Once, however often the packs are listed.
    fn tell(&mut self, found: Damage) {
        if !self.damage.contains(&found) {
            self.damage.push(found);
        }
    }
}

/// What a copy would move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyPlan {
    /// Packs to move.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Records to move.
    pub records: u64,
    /// Their bytes.
    pub record_bytes: u64,
    /// Bytes of packs that the copy has.
    pub bytes_present: u64,
    /// Whether the folder becomes a copy only now.
    pub is_new: bool,
}

/// A copy being made, with the copy's lock.
pub struct Copy {
    source: World,
    target: World,
    pool: PoolId,
    _lock: Box<dyn Lock>,
}

/// How a run goes on: its limit, and whom to tell.
struct Course<'a> {
    pace: Option<&'a dyn Pace>,
    progress: &'a mut dyn FnMut(u64, u64) -> bool,
    done: u64,
    total: u64,
}

impl Course<'_> {
    /// Before `bytes` move. False: cancelled.
    fn moves(&mut self, bytes: u64) -> bool {
        if let Some(pace) = self.pace {
            pace.wait(bytes);
        }
        self.counts(bytes)
    }

    /// The same for what was counted before.
    fn moves_again(&mut self, bytes: u64) -> bool {
        if let Some(pace) = self.pace {
            pace.wait(bytes);
        }
        self.counts(0)
    }

    fn counts(&mut self, bytes: u64) -> bool {
        self.done += bytes;
        (self.progress)(self.done, self.total.max(self.done))
    }
}

/// What became of one file.
enum Moved {
    Bytes(u64),
    /// So many bytes, of which sectors were rebuilt.
    Repaired(u64, Repaired),
    Damaged(Damage),
    /// It was let go of since it was listed.
    Gone,
    Cancelled,
}

fn damage(path: String, offset: u64, reason: impl Into<String>) -> Damage {
    Damage::File { path, offset, reason: reason.into(), derived: false }
}

fn failed(world: &World, name: &str, action: &'static str, source: io::Error) -> PoolError {
    PoolError::io(world.files.display(name), action, source)
}

/// What a folder holds; nothing if it is not there.
fn list(world: &World, folder: &str) -> Result<Vec<Entry>, PoolError> {
    match world.files.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listed => listed.map_err(|source| failed(world, folder, "list", source)),
    }
}

/// Magic of a file of `keys/`.
fn key_magic(name: &str) -> &'static [u8; 8] {
    if ring::generation(name).is_some() { twin::RING } else { twin::KEY }
}

fn packs_in(world: &World, folder: &str) -> Result<BTreeMap<PackId, u64>, PoolError> {
    let entries = list(world, folder)?;
    let packs = entries.iter().filter(|entry| !entry.is_folder);
    // A pack in the folder of another's first byte is found by nobody.
    Ok(packs
        .filter_map(|entry| Some((pack::id(&entry.name)?, entry.len)))
        .filter(|(id, _)| pack::folder(*id) == folder)
        .collect())
}

fn records_in(world: &World) -> Result<BTreeMap<u64, u64>, PoolError> {
    let entries = list(world, "sequence")?;
    let records = entries.iter().filter_map(|entry| Some((record::number(&entry.name)?, entry.len)));
    Ok(records.filter(|(number, _)| *number > 0).collect())
}

/// The record in `bytes`, if it is whole and record `number` of `pool`.
fn header_of(pool: PoolId, number: u64, bytes: &[u8]) -> Result<RecordHeader, String> {
    let (header, ..) = record::decode(bytes).map_err(|error| format!("{error:?}"))?;
    if header.pool != pool || header.number != number {
        return Err(format!("is record {} of pool {}", header.number, header.pool));
    }
    Ok(header)
}

fn record_at(world: &World, pool: PoolId, number: u64) -> Result<(RecordHeader, Vec<u8>), String> {
    let bytes =
        world.files.read(&record::name(number), record::MAX_BYTES).map_err(|error| error.to_string())?;
    Ok((header_of(pool, number, &bytes)?, bytes))
}

/// Whether a folder may become, or is, a copy of `pool`; true if it has its header.
fn check_target(target: &World, pool: PoolId) -> Result<bool, PoolError> {
    let path = || target.files.display("");
    let entries = list(target, "")?;
    if entries.iter().any(|entry| entry.name == HEADER_NAME) {
        let (header, _) = read_header(target)?;
        if header.id != pool {
            return Err(PoolError::OtherPool { expected: pool, found: header.id });
        }
        return Ok(true);
    }
    let not_a_copy = |what: String| PoolError::NotACopy { path: path(), reason: what };
    if let Some(other) = entries.iter().find(|entry| !EXPECTED.contains(&entry.name.as_str())) {
        return Err(not_a_copy(format!("it holds {} and no pool", other.name)));
    }
    // What an interrupted first run left begins with key files, and those say whose they are.
    let mut is_known = false;
    for entry in list(target, "keys")? {
        let name = format!("keys/{}", entry.name);
        let content = target.files.read(&name, twin::MAX_BYTES).ok();
        let content = content.and_then(|bytes| twin::decode(key_magic(&entry.name), &bytes).ok());
        match content.and_then(|twin| twin.content.get(..16).map(<[u8]>::to_vec)) {
            Some(id) if id == pool.0 => is_known = true,
            _ => return Err(not_a_copy(format!("{name} is no key file of pool {pool}"))),
        }
    }
    for folder in ["packs", "sequence", "index"] {
        if !is_known && !list(target, folder)?.is_empty() {
            return Err(not_a_copy(format!("{folder} is not empty and there is no key file of pool {pool}")));
        }
    }
    Ok(false)
}

/// The copy holds records that the source has not, or others under their numbers.
fn check_history(source: &World, target: &World, pool: PoolId) -> Result<(), PoolError> {
    let (ours, theirs) = (records_in(source)?, records_in(target)?);
    let went_on = |number: u64, reason: &str| {
        Err(PoolError::CopyDiverged { path: target.files.display(""), number, reason: reason.to_owned() })
    };
    let last = theirs.last_key_value().map_or(0, |(number, _)| *number);
    let ours_end = ours.last_key_value().map_or(0, |(number, _)| *number);
    if last > ours_end {
        return went_on(last, "the storage pool has no such record");
    }
    for number in theirs.keys().rev() {
        // A record that cannot be read on one side says nothing; an earlier one does.
        let (Ok((_, one)), Ok((_, other))) =
            (record_at(source, pool, *number), record_at(target, pool, *number))
        else {
            continue;
        };
        if one != other {
            return went_on(*number, "it is not the storage pool's record of that number");
        }
        break;
    }
    Ok(())
}

/// What a copy would move, without touching the target.
pub fn plan(source: &World, target: &World) -> Result<CopyPlan, PoolError> {
    let (header, _) = read_header(source)?;
    let mut plan = CopyPlan { is_new: !check_target(target, header.id)?, ..CopyPlan::default() };
    check_history(source, target, header.id)?;
    for folder in pack_folders(source)? {
        let there = packs_in(target, &folder)?;
        for (id, length) in packs_in(source, &folder)? {
            if there.contains_key(&id) {
                plan.bytes_present += length;
            } else {
                plan.packs += 1;
                plan.pack_bytes += length;
            }
        }
    }
    let there = records_in(target)?;
    for (_, length) in records_in(source)?.iter().filter(|(number, _)| !there.contains_key(number)) {
        plan.records += 1;
        plan.record_bytes += length;
    }
    Ok(plan)
}

fn pack_folders(world: &World) -> Result<Vec<String>, PoolError> {
    let entries = list(world, "packs")?;
    let folders = entries.iter().filter(|entry| entry.is_folder);
    Ok(folders.map(|entry| format!("packs/{}", entry.name)).collect())
}

impl Copy {
    /// Looks at both sides and takes the copy's lock. The folder is made if it is missing.
    pub fn begin(source: World, target: World) -> Result<Copy, PoolError> {
        let (header, _) = read_header(&source)?;
        let pool = header.id;
        check_target(&target, pool)?;
        for folder in FOLDERS {
            target
                .files
                .make_folder(folder)
                .map_err(|source| failed(&target, folder, "make the folder", source))?;
        }
        let lock =
            target.files.lock(LOCK_NAME).map_err(|source| failed(&target, LOCK_NAME, "lock", source))?;
        let lock = lock.ok_or_else(|| PoolError::Busy { path: target.files.display(LOCK_NAME) })?;
        // Whoever held the lock until now may have made something else of the folder.
        check_target(&target, pool)?;
        check_history(&source, &target, pool)?;
        Ok(Copy { source, target, pool, _lock: lock })
    }

    /// Brings the copy up to the source, in the order of section 11. An error leaves a copy that serves as it did, and the
    /// next run goes on. `progress` is told bytes done and bytes to do; false cancels.
    pub fn run(
        &self,
        options: CopyOptions,
        pace: Option<&dyn Pace>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<CopyReport, PoolError> {
        let mut report = CopyReport::default();
        let mut course = Course { pace, progress, done: 0, total: 0 };
        self.settle()?;
        let records = loop {
            report.passes += 1;
            // A record whose name a power cut could still take away there must not be the copy's for ever.
            self.source
                .files
                .sync_folder("sequence")
                .map_err(|source| failed(&self.source, "sequence", "sync", source))?;
            let records = records_in(&self.source)?;
            report.bytes_present = 0;
            self.copy_keys(&mut report)?;
            if !self.copy_packs(options, &mut course, &mut report)? {
                report.cancelled = true;
                return Ok(report);
            }
            // A rotation since then: no pack is in the copy without the ring of its key generation.
            self.copy_keys(&mut report)?;
            if !self.permits_since(&records)? {
                break records;
            }
            if report.passes >= PASSES {
                return Err(PoolError::Busy { path: self.source.files.display("sequence") });
            }
        };
        if !self.copy_records(&records, options, &mut course, &mut report)? {
            report.cancelled = true;
            return Ok(report);
        }
        self.copy_header()?;
        Ok(report)
    }

    /// A run before may have ended between link and sync; nothing is built on a name that a power cut could take away.
    fn settle(&self) -> Result<(), PoolError> {
        let mut folders: Vec<String> = ["", "keys", "sequence", "packs"].map(str::to_owned).to_vec();
        folders.extend(pack_folders(&self.target)?);
        for folder in folders {
            self.target
                .files
                .sync_folder(&folder)
                .map_err(|source| failed(&self.target, &folder, "sync", source))?;
        }
        Ok(())
    }

    /// Whether a pack may have been let go of since the records were listed.
    fn permits_since(&self, known: &BTreeMap<u64, u64>) -> Result<bool, PoolError> {
        let now = records_in(&self.source)?;
        // What cannot be read may be a permit.
        Ok(now.keys().filter(|number| !known.contains_key(number)).any(|number| {
            record_at(&self.source, self.pool, *number)
                .map_or(true, |(header, _)| header.kind == Kind::Permit as u16)
        }))
    }

    fn copy_keys(&self, report: &mut CopyReport) -> Result<(), PoolError> {
        // A ring whose name a power cut could still take away at the source must not stand in the way of the next one of
        // that number for ever.
        self.source
            .files
            .sync_folder("keys")
            .map_err(|source| failed(&self.source, "keys", "sync", source))?;
        for entry in list(&self.source, "keys")? {
            let name = format!("keys/{}", entry.name);
            let path = self.source.files.display(&name);
            let bytes = match self.source.files.read(&name, twin::MAX_BYTES) {
                Ok(bytes) => bytes,
                Err(error) => {
                    report.tell(damage(path, 0, error.to_string()));
                    continue;
                }
            };
            // A copy of a file that is half right would look right for ever.
            match twin::decode(key_magic(&entry.name), &bytes) {
                Ok(twin) if twin.damage.is_some() => {
                    report.tell(damage(path, 0, "one of its two copies is damaged"));
                    continue;
                }
                Ok(twin) if twin.content.get(..16) != Some(&self.pool.0[..]) => {
                    report.tell(damage(path, 16, "belongs to another pool"));
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    report.tell(damage(path, 0, format!("{error:?}")));
                    continue;
                }
            }
            match self.target.files.read(&name, twin::MAX_BYTES) {
                Ok(there) if there == bytes => {}
                Ok(_) => report.tell(self.differs(&name)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.publish(&name, &bytes)?;
                    report.bytes_copied += bytes.len() as u64;
                }
                Err(error) => report.tell(damage(self.target.files.display(&name), 0, error.to_string())),
            }
        }
        Ok(())
    }

    /// A file of the copy that is not what it should be: nobody may write over it.
    fn differs(&self, name: &str) -> Damage {
        let reason = "is damaged in the copy; remove this one file there and copy again";
        damage(self.target.files.display(name), 0, reason)
    }

    fn publish(&self, name: &str, bytes: &[u8]) -> Result<(), PoolError> {
        sequence::publish(&*self.target.files, name, bytes)
            .map_err(|failed| failed.into_error(self.target.files.display(name)))
    }

    /// Moves packs that the copy lacks. False: cancelled.
    fn copy_packs(
        &self,
        options: CopyOptions,
        course: &mut Course<'_>,
        report: &mut CopyReport,
    ) -> Result<bool, PoolError> {
        let folders = pack_folders(&self.source)?;
        course.total = course.done;
        for folder in &folders {
            let there = packs_in(&self.target, folder)?;
            let packs = packs_in(&self.source, folder)?;
            let to_read = packs.iter().filter(|(id, _)| options.verify || !there.contains_key(id));
            course.total += to_read.map(|(_, length)| length).sum::<u64>();
        }
        for folder in &folders {
            let there = packs_in(&self.target, folder)?;
            let packs = packs_in(&self.source, folder)?;
            if packs.keys().any(|id| !there.contains_key(id)) {
                self.target
                    .files
                    .make_folder(folder)
                    .map_err(|source| failed(&self.target, folder, "make the folder", source))?;
            }
            for (id, length) in packs {
                if let Some(found) = there.get(&id) {
                    // Of two lengths, the one whose file fits itself in every byte is right.
                    let whole = options.verify || *found != length;
                    let is_right = self.is_right(id, *found, whole)?;
                    if options.verify && !course.counts(length) {
                        return Ok(false);
                    }
                    let name = pack::name(id);
                    match is_right {
                        true if *found == length => report.bytes_present += length,
                        true => {
                            let reason = format!(
                                "has {length} bytes; its copy has {found}, and fits itself in every byte: keep the copy, and \
                                 verify the pool"
                            );
                            report.tell(damage(self.source.files.display(&name), length.min(*found), reason));
                        }
                        false => report.tell(self.differs(&name)),
                    }
                    continue;
                }
                match self.copy_pack(id, options, course)? {
                    Moved::Bytes(bytes) => {
                        report.bytes_copied += bytes;
                        report.packs_copied += 1;
                    }
                    Moved::Repaired(bytes, repaired) => {
                        report.bytes_copied += bytes;
                        report.packs_copied += 1;
                        report.repaired.push(repaired);
                    }
                    Moved::Damaged(found) => report.tell(found),
                    Moved::Gone => {}
                    Moved::Cancelled => return Ok(false),
                }
            }
        }
        Ok(true)
    }

    /// Whether a pack of the copy is what it should be: by its trailer, or by every byte.
    fn is_right(&self, id: PackId, length: u64, whole: bool) -> Result<bool, PoolError> {
        if whole {
            let found = examine::examine(&*self.target.files, self.pool, id, Reading::default(), None)?;
            return Ok(found.damaged.is_empty());
        }
        let name = pack::name(id);
        let read = |source| failed(&self.target, &name, "read", source);
        let file = self.target.files.open(&name).map_err(read)?;
        let mut end = [0u8; pack::HEADER];
        let content = match parity::find(&|at, buf| file.read_exact_at(at, buf), length) {
            Some(found) if found.layout.file() != length => return Ok(false),
            Some(found) => found.layout.content,
            None => length,
        };
        let Some(at) = content.checked_sub(pack::HEADER as u64) else { return Ok(false) };
        match file.read_exact_at(at, &mut end) {
            Ok(()) => Ok(pack::Trailer::decode(&end, content).is_ok()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(read(error)),
        }
    }

    /// Moves one pack, reads it back from the unnamed file, and gives it its name if every byte fits its hash. One that is
    /// damaged and can be rebuilt from its parity is copied as it was.
    fn copy_pack(
        &self,
        id: PackId,
        options: CopyOptions,
        course: &mut Course<'_>,
    ) -> Result<Moved, PoolError> {
        let name = pack::name(id);
        let path = self.source.files.display(&name);
        let unreadable = |error: io::Error| Moved::Damaged(damage(path.clone(), 0, error.to_string()));
        let file = match self.source.files.open(&name) {
            Ok(file) => file,
            // A permit let it go. One that came after the records were listed makes us list again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Moved::Gone),
            Err(error) => return Ok(unreadable(error)),
        };
        let length = match file.len() {
            Ok(length) if length <= MAX_FILE => length,
            Ok(length) => {
                return Ok(Moved::Damaged(damage(path, 0, format!("a pack of {length} bytes"))));
            }
            Err(error) => return Ok(unreadable(error)),
        };
        let write = |source| failed(&self.target, &name, "write", source);
        let mut new = self.target.files.create(&name).map_err(write)?;
        let mut piece = vec![0u8; PIECE.min(length as usize)];
        let mut at = 0;
        while at < length {
            let size = (length - at).min(PIECE as u64);
            if !course.moves(size) {
                return Ok(Moved::Cancelled);
            }
            let part = &mut piece[..size as usize];
            if let Err(error) = file.read_exact_at(at, part) {
                let repaired = self.copy_rebuilt(id, &*file, length, course)?;
                return Ok(repaired.unwrap_or_else(|| Moved::Damaged(damage(path, at, error.to_string()))));
            }
            new.append(part).map_err(write)?;
            at += size;
        }
        let found = self.examine(new.as_ref(), id, length)?;
        if let Some((offset, reason)) = found.damaged.first() {
            if let Some(repaired) = self.copy_rebuilt(id, &*file, length, course)? {
                return Ok(repaired);
            }
            let reason = match found.damaged.len() {
                1 => reason.clone(),
                more => format!("{reason}; {more} damages in all"),
            };
            let of_this_pack = found.damaged.iter().all(|(offset, _)| *offset >= pack::HEADER as u64);
            if options.accept_damage && of_this_pack {
                self.publish_file(&name, new)?;
                return Ok(Moved::Damaged(damage(path, *offset, format!("{reason}; copied as it is"))));
            }
            return Ok(Moved::Damaged(damage(path, *offset, format!("{reason}; not copied"))));
        }
        self.publish_file(&name, new)?;
        Ok(Moved::Bytes(length))
    }

    /// Moves one pack through its parity, and makes that again: the same bytes as they were. `None` if it cannot be rebuilt.
    fn copy_rebuilt(
        &self,
        id: PackId,
        file: &dyn ReadFile,
        length: u64,
        course: &mut Course<'_>,
    ) -> Result<Option<Moved>, PoolError> {
        let name = pack::name(id);
        let read = |at: u64, buf: &mut [u8]| file.read_exact_at(at, buf);
        let Some(parity) = Parity::load(&read, length) else { return Ok(None) };
        let rebuilder = Rebuilder::new(&parity, &read);
        let write = |source| failed(&self.target, &name, "write", source);
        let mut new = self.target.files.create(&name).map_err(write)?;
        let content = parity.layout().content;
        let mut piece = vec![0u8; PIECE.min(content as usize)];
        let mut at = 0;
        while at < content {
            let size = (content - at).min(PIECE as u64);
            // Its bytes were counted when they were tried first.
            if !course.moves_again(size) {
                return Ok(Some(Moved::Cancelled));
            }
            let part = &mut piece[..size as usize];
            if rebuilder.read_at(at, part).is_err() {
                return Ok(None);
            }
            new.append(part).map_err(write)?;
            at += size;
        }
        let bytes = content + parity::append_as(&mut *new, parity.layout()).map_err(write)?;
        let found = self.examine(new.as_ref(), id, bytes)?;
        if !found.damaged.is_empty() {
            return Ok(None);
        }
        self.publish_file(&name, new)?;
        let sectors = rebuilder.sectors().len() as u64;
        Ok(Some(Moved::Repaired(bytes, Repaired { pack: id, sectors })))
    }

    fn examine(&self, file: &dyn NewFile, id: PackId, length: u64) -> Result<PackExamination, PoolError> {
        // What the copy's own storage cannot read back is no damage of the source.
        let error = RefCell::new(None);
        let read = |at: u64, buf: &mut [u8]| {
            file.read_exact_at(at, buf).map_err(|source| {
                let kind = source.kind();
                error.borrow_mut().get_or_insert(source);
                kind.into()
            })
        };
        let found = examine::examine_bytes(&read, length, (self.pool, id), Reading::default(), None);
        match error.into_inner() {
            Some(source) => Err(failed(&self.target, &pack::name(id), "read back", source)),
            None => Ok(found),
        }
    }

    fn publish_file(&self, name: &str, file: Box<dyn NewFile>) -> Result<(), PoolError> {
        sequence::publish_file(&*self.target.files, name, file)
            .map_err(|failed| failed.into_error(self.target.files.display(name)))
    }

    /// Moves records in order. False: cancelled.
    fn copy_records(
        &self,
        records: &BTreeMap<u64, u64>,
        options: CopyOptions,
        course: &mut Course<'_>,
        report: &mut CopyReport,
    ) -> Result<bool, PoolError> {
        let there = records_in(&self.target)?;
        for (&number, &length) in records {
            let name = record::name(number);
            let has = there.get(&number);
            if has.is_some_and(|found| *found == length) && !options.verify {
                report.head = number;
                continue;
            }
            if !course.moves(length) {
                return Ok(false);
            }
            let bytes = match record_at(&self.source, self.pool, number) {
                Ok((_, bytes)) => bytes,
                Err(reason) => {
                    // Later records say more than none: a reader names the gap, and a record may mend it (kind 13).
                    report.tell(damage(self.source.files.display(&name), 0, format!("{reason}; not copied")));
                    continue;
                }
            };
            report.head = number;
            if has.is_some() {
                if record_at(&self.target, self.pool, number).map(|(_, there)| there) != Ok(bytes) {
                    report.tell(self.differs(&name));
                }
                continue;
            }
            match sequence::publish(&*self.target.files, &name, &bytes) {
                Ok(()) => {}
                // Somebody whom the lock does not reach writes there.
                Err(Unpublished::Taken) => {
                    return Err(PoolError::CopyDiverged {
                        path: self.target.files.display(""),
                        number,
                        reason: "it was written while the copy was under way".to_owned(),
                    });
                }
                Err(other) => return Err(other.into_error(self.target.files.display(&name))),
            }
            report.bytes_copied += length;
            report.records_copied += 1;
        }
        Ok(true)
    }

    fn copy_header(&self) -> Result<(), PoolError> {
        if self.target.files.open(HEADER_NAME).is_ok() {
            return Ok(());
        }
        let read = |source| failed(&self.source, HEADER_NAME, "read", source);
        let bytes = self.source.files.read(HEADER_NAME, twin::MAX_BYTES).map_err(read)?;
        let path = self.source.files.display(HEADER_NAME);
        let header = twin::decode(twin::POOL, &bytes).map_err(|error| error.in_file(path))?;
        // A header of which one copy is damaged still has its content, and a copy without a header is none.
        self.publish(HEADER_NAME, &twin::encode(twin::POOL, &header.content))
    }

    /// Has packs removed from the copy that the source let go of: permitted by the copy's own records, and gone at the
    /// source. Only after a run that found no damage. Returns their bytes.
    pub fn let_go(
        &self,
        report: &CopyReport,
        recipient: &Recipient,
        service: &dyn DeletionService,
    ) -> Result<u64, PoolError> {
        if report.cancelled || !report.damage.is_empty() {
            return Ok(0);
        }
        let keys = crate::rings::open(&self.target, recipient)?.keys;
        let state = sequence::load(&*self.target.files, &keys)?;
        if !state.unreadable.is_empty() {
            return Ok(0);
        }
        let mut open: BTreeMap<u64, u64> = BTreeMap::new();
        let mut kept: BTreeSet<u64> = BTreeSet::new();
        for folder in pack_folders(&self.target)? {
            let ours = packs_in(&self.source, &folder)?;
            for (id, length) in packs_in(&self.target, &folder)? {
                let Some(permit) = state.permitted.get(&id) else { continue };
                *open.entry(*permit).or_default() += length;
                // A permit that is not carried out there may yet be found to name what a point needs.
                if ours.contains_key(&id) {
                    kept.insert(*permit);
                }
            }
        }
        let mut freed = 0;
        for (permit, bytes) in open.into_iter().filter(|(permit, _)| !kept.contains(permit)) {
            service.carry_out(Some(permit), &[])?;
            freed += bytes;
        }
        Ok(freed)
    }
}

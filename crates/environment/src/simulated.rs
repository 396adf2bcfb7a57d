//! A folder tree in memory that loses, tears, lies and fails as storage does, the same way for the same seed.
//!
//! It implements [`Files`] and [`Removal`] after section 4 of the fault model. Not a file system: it promises no more
//! than the trait's contract, and takes everything else away.
//!
//! - **Sites.** Every call is one or several numbered operations, from 1. `publish` is three: sync of the file, link
//!   of the name, sync of the folder; `remove` two; `make_folder` one for each new folder and one for each sync.
//!   [`SimulatedFiles::operations`] tells the count, [`SimulatedFiles::trace`] the list, so a test runs a workload
//!   once, and then once more for every site.
//! - **Power cuts.** [`SimulatedFiles::crash_at`] stops the world at a site; [`SimulatedFiles::reboot`] draws one of
//!   the states that storage may be in, and [`SimulatedFiles::crash_states`] lists all of them for small workloads.
//!   Open files and locks of before the cut are dead.
//! - **Kills.** [`SimulatedFiles::kill_at`] ends one process: its locks and unnamed files go, all else stays visible.
//! - **Faults.** [`Failure`] at a site, once or from then on; [`ReadFault`] of one file; little space; a mount point
//!   that is an empty folder.
//! - **Damage at rest.** Flipped bits, cut and deleted files, a tree rolled back to a [`Snapshot`].
//!
//! What a power cut may do
//!
//! | state at the cut | may be after it |
//! |---|---|
//! | file without a name | gone, always |
//! | name linked or removed, folder not synced since | any state of that name since the last sync |
//! | name in a folder whose own name was lost | gone |
//! | bytes not synced (only after a sync that lied) | each page of 512 or 4096 bytes there, zeros or rubbish; the length anything in between |
//! | bytes and names of a failed sync | decided at the failure; every later sync "succeeds" and changes nothing |
//! | synced bytes under a name whose folder was synced | the same (must) |

mod crash;
mod faults;
mod torn_write;
mod world;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Entry, Files, Lock, NewFile, ReadFile, Removal};

pub use crash::CrashStates;
pub use faults::{Failure, Killed, Operation, PowerCut, ReadFault, Site, When, is_killed, is_power_cut};
use world::{Caller, World, normal, parent_of};

/// The visible content of a tree at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Snapshot {
    files: BTreeMap<String, Arc<Vec<u8>>>,
    folders: BTreeSet<String>,
}

impl Snapshot {
    /// Names and bytes of all files, in order of name.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// Names of all folders but the root.
    pub fn folders(&self) -> impl Iterator<Item = &str> {
        self.folders.iter().map(String::as_str)
    }

    /// The bytes of one file.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.files.get(&normal(name)).map(|bytes| bytes.as_slice())
    }

    /// Puts a file into the snapshot, with the folders above it.
    pub fn insert(&mut self, name: &str, bytes: Vec<u8>) {
        let name = normal(name);
        let mut above = parent_of(&name);
        while !above.is_empty() {
            self.folders.insert(above.to_owned());
            above = parent_of(above);
        }
        self.files.insert(name, Arc::new(bytes));
    }

    /// Takes a file out of the snapshot.
    pub fn remove(&mut self, name: &str) {
        self.files.remove(&normal(name));
    }
}

/// A simulated folder tree as one process sees it. Clones are the same process.
#[derive(Clone)]
pub struct SimulatedFiles {
    world: Arc<Mutex<World>>,
    process: u64,
}

impl SimulatedFiles {
    /// An empty tree whose every accident follows from `seed`.
    pub fn new(seed: u64) -> SimulatedFiles {
        SimulatedFiles { world: Arc::new(Mutex::new(World::new(seed))), process: 1 }
    }

    /// A tree that durably holds `snapshot`.
    pub fn from_snapshot(seed: u64, snapshot: &Snapshot) -> SimulatedFiles {
        let files = SimulatedFiles::new(seed);
        files.world().install(snapshot);
        files
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn caller(&self, world: &World) -> Caller {
        Caller { process: self.process, boot: world.boot }
    }

    /// Another process on the same tree: a second server, or the same one started again after a kill.
    pub fn second_process(&self) -> SimulatedFiles {
        let process = self.world().new_process();
        SimulatedFiles { world: self.world.clone(), process }
    }

    // Sites

    /// How many operations there were.
    pub fn operations(&self) -> u64 {
        self.world().operations
    }

    /// How many operations there were that change something: those that make, write, sync, name or remove.
    pub fn changes(&self) -> u64 {
        self.world().changes
    }

    /// Begins to write down every operation.
    pub fn start_trace(&self) {
        self.world().trace = Some(Vec::new());
    }

    /// The operations since [`SimulatedFiles::start_trace`].
    pub fn trace(&self) -> Vec<Site> {
        self.world().trace.clone().unwrap_or_default()
    }

    // Crashes

    /// Cuts the power at operation `site`: it takes effect in part or not at all, and it and everything after it
    /// fail with [`PowerCut`].
    pub fn crash_at(&self, site: u64) {
        self.world().crash_at = Some(site);
    }

    /// The same at the operation that is change number `change` (see [`SimulatedFiles::changes`]).
    pub fn crash_at_change(&self, change: u64) {
        self.world().crash_at_change = Some(change);
    }

    /// Forgets plans for power cuts.
    pub fn forget_crashes(&self) {
        let mut world = self.world();
        (world.crash_at, world.crash_at_change) = (None, None);
    }

    /// Cuts the power now.
    pub fn cut_power(&self) {
        self.world().off = true;
    }

    /// Whether the power is cut.
    pub fn is_off(&self) -> bool {
        self.world().off
    }

    /// Comes back after a power cut (it cuts the power first if that did not happen yet) in one of the states that
    /// storage may be in, chosen by `seed`. Plans for crashes are forgotten, faults stay.
    pub fn reboot(&self, seed: u64) {
        let mut world = self.world();
        let randomness = crate::SeededRandomness::new(seed);
        let snapshot = crash::after_cut(&world, &mut |bound| randomness.below(bound));
        world.install(&snapshot);
    }

    /// Comes back after a power cut in the given state, one of [`SimulatedFiles::crash_states`].
    pub fn reboot_into(&self, snapshot: &Snapshot) {
        self.world().install(snapshot);
    }

    /// The distinct states in which storage may be after a power cut now: all of them, or a sample if there are
    /// more than `limit`. The world stays as it is.
    pub fn crash_states(&self, limit: usize) -> CrashStates {
        crash::states(&self.world(), limit)
    }

    /// Ends this process at operation `site`, which happens or not: calls of this handle and its clones fail with
    /// [`Killed`], what it wrote stays visible.
    pub fn kill_at(&self, site: u64) {
        self.world().kill_at.insert(self.process, site);
    }

    /// The same at the operation that is change number `change`.
    pub fn kill_at_change(&self, change: u64) {
        self.world().kill_at_change.insert(self.process, change);
    }

    /// Ends this process now. Its locks are free, its unnamed files gone.
    pub fn kill(&self) {
        self.world().kill(self.process);
    }

    // Faults

    /// Plans a failure.
    pub fn fail(&self, when: When, failure: Failure) {
        self.world().failures.push((when, failure));
    }

    /// How many planned failures did not come yet, or come again.
    pub fn planned_failures(&self) -> usize {
        self.world().failures.len()
    }

    /// Makes reads of one file go wrong from now on; what is stored stays as it is.
    pub fn fail_reads(&self, name: &str, fault: ReadFault) {
        self.world().read_faults.entry(normal(name)).or_default().push(fault);
    }

    /// Forgets all planned failures and read faults.
    pub fn clear_faults(&self) {
        let mut world = self.world();
        world.failures.clear();
        world.read_faults.clear();
    }

    /// Sets how many bytes all files together may have; `None` for no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.world().capacity = bytes;
    }

    /// Takes the tree away, leaving the empty folder of its mount point, or brings it back.
    pub fn set_mounted(&self, mounted: bool) {
        self.world().set_mounted(mounted);
    }

    // Looking, and damage at rest

    /// What the tree shows now, mounted or not, faults of reading left out.
    pub fn snapshot(&self) -> Snapshot {
        self.world().visible()
    }

    /// Rolls the tree back (or forward) to `snapshot`; durable at once. Open files keep their bytes.
    pub fn restore(&self, snapshot: &Snapshot) {
        self.world().restore(snapshot);
    }

    /// Flips bit `bit` of a file, counted from the lowest bit of its first byte.
    pub fn flip_bit(&self, name: &str, bit: u64) -> io::Result<()> {
        self.change(name, |bytes| match bytes.get_mut((bit / 8) as usize) {
            Some(byte) => {
                *byte ^= 1 << (bit % 8);
                Ok(())
            }
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("no bit {bit}"))),
        })
    }

    /// Cuts a file to `length` bytes, or fills it up with zeros.
    pub fn truncate(&self, name: &str, length: u64) -> io::Result<()> {
        self.change(name, |bytes| {
            bytes.resize(length as usize, 0);
            Ok(())
        })
    }

    /// Replaces the bytes of a file, or makes it; no operation, durable at once.
    pub fn set_bytes(&self, name: &str, bytes: Vec<u8>) {
        let mut world = self.world();
        let mut snapshot = world.visible();
        snapshot.insert(name, bytes);
        world.restore(&snapshot);
    }

    /// Deletes a file behind everybody's back; no operation, durable at once.
    pub fn delete(&self, name: &str) -> io::Result<()> {
        self.world().delete(&normal(name))
    }

    fn change(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> io::Result<()> {
        self.world().edit(&normal(name), edit)
    }
}

impl Files for SimulatedFiles {
    fn open(&self, name: &str) -> io::Result<Box<dyn ReadFile>> {
        let name = normal(name);
        let mut world = self.world();
        let caller = self.caller(&world);
        let inode = world.open(caller, &name)?;
        Ok(Box::new(OpenFile { world: self.world.clone(), caller, inode, name }))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Entry>> {
        let mut world = self.world();
        let caller = self.caller(&world);
        world.list(caller, &normal(folder))
    }

    fn make_folder(&self, folder: &str) -> io::Result<()> {
        let mut world = self.world();
        let caller = self.caller(&world);
        world.make_folder(caller, &normal(folder))
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        let mut world = self.world();
        let caller = self.caller(&world);
        world.sync_folder(caller, &normal(folder))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn NewFile>> {
        let name = normal(name);
        let mut world = self.world();
        let caller = self.caller(&world);
        let inode = world.create(caller, &name)?;
        Ok(Box::new(Unnamed { world: self.world.clone(), caller, inode, name }))
    }

    fn lock(&self, name: &str) -> io::Result<Option<Box<dyn Lock>>> {
        let mut world = self.world();
        let caller = self.caller(&world);
        Ok(match world.lock(caller, &normal(name))? {
            Some(inode) => Some(Box::new(HeldLock { world: self.world.clone(), caller, inode })),
            None => None,
        })
    }

    fn total_bytes(&self) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let mut world = self.world();
        let caller = self.caller(&world);
        world.free_bytes(caller)
    }

    fn display(&self, name: &str) -> String {
        format!("simulated:/{}", normal(name))
    }
}

impl Removal for SimulatedFiles {
    fn remove(&self, name: &str) -> io::Result<()> {
        let mut world = self.world();
        let caller = self.caller(&world);
        world.remove(caller, &normal(name))
    }
}

fn locked(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

struct OpenFile {
    world: Arc<Mutex<World>>,
    caller: Caller,
    inode: u64,
    name: String,
}

impl ReadFile for OpenFile {
    fn len(&self) -> io::Result<u64> {
        locked(&self.world).length(self.caller, self.inode, &self.name)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        locked(&self.world).read(self.caller, self.inode, &self.name, offset, buf)
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        locked(&self.world).close(self.inode);
    }
}

struct Unnamed {
    world: Arc<Mutex<World>>,
    caller: Caller,
    inode: u64,
    name: String,
}

impl NewFile for Unnamed {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        locked(&self.world).append(self.caller, self.inode, &self.name, bytes)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        locked(&self.world).read(self.caller, self.inode, &self.name, offset, buf)
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        let mut world = locked(&self.world);
        world.sync_file(self.caller, self.inode, &self.name)?;
        world.link(self.caller, self.inode, &self.name)?;
        world.sync_folder(self.caller, parent_of(&self.name))
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        locked(&self.world).close(self.inode);
    }
}

struct HeldLock {
    world: Arc<Mutex<World>>,
    caller: Caller,
    inode: u64,
}

impl Lock for HeldLock {}

impl Drop for HeldLock {
    fn drop(&mut self) {
        locked(&self.world).unlock(self.caller, self.inode);
    }
}

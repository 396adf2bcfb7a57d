//! What lies behind the file system: files and folders as programs see them, and what of them is on the disk.
//!
//! | done | may be after a power cut |
//! |---|---|
//! | bytes written, not synced | each page of 4096 bytes there or not, new pages also as zeros; old length or new |
//! | name made, removed or renamed, folder not synced | each change there or not |
//! | file or folder synced | the same (must), unless the sync lied |
//! | sync failed | each page and name decided at the failure; later syncs succeed and bring nothing back |
//!
//! A [`Fault`] says which call it meets and what becomes of it. Everything drawn follows from the seed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use environment::SeededRandomness;

const PAGE: usize = 4096;
/// The root folder's number.
pub const ROOT: u64 = 1;

/// A kind of call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Open,
    Read,
    List,
    Create,
    Write,
    Resize,
    SyncFile,
    SyncFolder,
    Link,
    Rename,
    Unlink,
    MakeFolder,
}

impl Call {
    /// Whether it changes what is seen or what is on the disk.
    pub fn changes(self) -> bool {
        !matches!(self, Call::Open | Call::Read | Call::List)
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this error number and did nothing.
    Fails(i32),
    /// It happens, and fails with this error number.
    FailsAfter(i32),
    /// A sync that succeeds and does nothing.
    Lies,
    /// A sync that fails with EIO, and what was not on the disk is decided now.
    Drops,
    /// At most so many bytes are read or written.
    Short(usize),
    /// It takes so long.
    Slow(Duration),
    /// A read gives bytes with this one flipped, counted from its beginning.
    Flips(usize),
    /// A read gives what stands this many bytes further on, as far as there is something.
    Misdirected(usize),
    /// A listing leaves out every second name.
    Hides,
    /// The calling program is killed and the call does not happen.
    KilledBefore,
    /// The calling program is killed and the call happens.
    KilledAfter,
    /// The power goes: the call happens as far as the disk is concerned, and nobody hears of it.
    PowerCut,
}

/// A planned fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Which calls; `None` for all that change something.
    pub call: Option<Call>,
    /// Only of paths that contain this.
    pub path: &'static str,
    /// So many such calls pass before it.
    pub after: u64,
    /// It meets so many calls.
    pub times: u64,
    pub effect: Effect,
}

enum Node {
    File(File),
    Folder(Folder),
}

#[derive(Default)]
struct File {
    bytes: Vec<u8>,
    /// What is on the disk.
    disk: Vec<u8>,
    /// Pages that differ there, as far as anybody knows.
    dirty: BTreeSet<usize>,
    links: u32,
    handles: u64,
}

#[derive(Default)]
struct Folder {
    entries: BTreeMap<String, u64>,
    disk: BTreeMap<String, u64>,
    /// Changes since the last sync. What one call changes is there or not as a whole.
    pending: Vec<Vec<(String, Option<u64>)>>,
}

/// What the kernel asks of a node.
pub struct Facts {
    pub number: u64,
    pub is_folder: bool,
    pub size: u64,
    pub links: u32,
    pub mode: u16,
    pub changed: SystemTime,
}

/// An error number.
pub type Errno = i32;
pub const ENOENT: Errno = 2;
pub const EIO: Errno = 5;
pub const EEXIST: Errno = 17;
pub const ENOTDIR: Errno = 20;
pub const EISDIR: Errno = 21;
pub const ENOSPC: Errno = 28;
pub const EROFS: Errno = 30;
pub const ENOTEMPTY: Errno = 39;
pub const EOPNOTSUPP: Errno = 95;
pub const EDQUOT: Errno = 122;

/// The storage.
pub struct Storage {
    nodes: BTreeMap<u64, Node>,
    modes: BTreeMap<u64, (u16, SystemTime)>,
    /// The last path of each node, for faults.
    paths: BTreeMap<u64, String>,
    next: u64,
    random: SeededRandomness,
    faults: Vec<Fault>,
    /// Bytes that all files together may have.
    pub capacity: u64,
    /// The power is gone: every call fails.
    pub is_off: bool,
    /// Hard links are not known here.
    pub has_links: bool,
    /// Calls that met a fault.
    pub met: u64,
    /// Calls that change something.
    pub changes: u64,
    /// The last calls that change something, for the message of a failure.
    pub last: Vec<String>,
}

impl Storage {
    /// Empty storage.
    pub fn new(seed: u64) -> Storage {
        Storage {
            nodes: BTreeMap::from([(ROOT, Node::Folder(Folder::default()))]),
            modes: BTreeMap::new(),
            paths: BTreeMap::from([(ROOT, String::new())]),
            next: ROOT + 1,
            random: SeededRandomness::new(seed),
            faults: Vec::new(),
            capacity: 1 << 32,
            is_off: false,
            has_links: true,
            met: 0,
            changes: 0,
            last: Vec::new(),
        }
    }

    /// Plans a fault.
    pub fn plan(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    /// Forgets all planned faults.
    pub fn forget_faults(&mut self) {
        self.faults.clear();
        self.met = 0;
    }

    /// Bytes of all files.
    pub fn used(&self) -> u64 {
        self.nodes
            .values()
            .map(|node| match node {
                Node::File(file) => file.bytes.len() as u64,
                Node::Folder(_) => 0,
            })
            .sum()
    }

    /// Counts a call on `node` (or a new `name` in it) and finds the fault that it meets.
    pub fn meets(&mut self, call: Call, node: u64, name: &str) -> Result<Option<Effect>, Errno> {
        if self.is_off {
            return Err(EIO);
        }
        let path = format!("{}/{name}", self.paths.get(&node).map_or("", String::as_str));
        let path = path.trim_end_matches('/');
        if call.changes() {
            self.changes += 1;
            if self.last.len() >= 40 {
                self.last.remove(0);
            }
            self.last.push(format!("{call:?} {path}"));
        }
        let met = self.faults.iter_mut().find_map(|fault| {
            let fits = fault.call.map_or(call.changes(), |wanted| wanted == call);
            if !fits || fault.times == 0 || !path.contains(fault.path) {
                return None;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return None;
            }
            fault.times -= 1;
            Some(fault.effect.clone())
        });
        if let Some(effect) = &met {
            self.met += 1;
            self.last.push(format!("  ^ {effect:?}"));
            self.is_off |= *effect == Effect::PowerCut;
        }
        Ok(met)
    }

    fn folder(&mut self, number: u64) -> Result<&mut Folder, Errno> {
        match self.nodes.get_mut(&number) {
            Some(Node::Folder(folder)) => Ok(folder),
            Some(Node::File(_)) => Err(ENOTDIR),
            None => Err(ENOENT),
        }
    }

    fn file(&mut self, number: u64) -> Result<&mut File, Errno> {
        match self.nodes.get_mut(&number) {
            Some(Node::File(file)) => Ok(file),
            Some(Node::Folder(_)) => Err(EISDIR),
            None => Err(ENOENT),
        }
    }

    pub fn facts(&self, number: u64) -> Result<Facts, Errno> {
        let (is_folder, size, links) = match self.nodes.get(&number).ok_or(ENOENT)? {
            Node::File(file) => (false, file.bytes.len() as u64, file.links),
            Node::Folder(_) => (true, 4096, 2),
        };
        let usual = (if is_folder { 0o755 } else { 0o644 }, SystemTime::UNIX_EPOCH);
        let (mode, changed) = self.modes.get(&number).copied().unwrap_or(usual);
        Ok(Facts { number, is_folder, size, links, mode, changed })
    }

    pub fn look_up(&mut self, folder: u64, name: &str) -> Result<u64, Errno> {
        if self.is_off {
            return Err(EIO);
        }
        self.folder(folder)?.entries.get(name).copied().ok_or(ENOENT)
    }

    pub fn set_mode(&mut self, number: u64, mode: u16) {
        let changed = SystemTime::now();
        self.modes.insert(number, (mode, changed));
    }

    fn touched(&mut self, number: u64) {
        let mode = self.facts(number).map_or(0o644, |facts| facts.mode);
        self.set_mode(number, mode);
    }

    fn change(&mut self, folder: u64, changes: Vec<(String, Option<u64>)>) -> Result<(), Errno> {
        let folder = self.folder(folder)?;
        for (name, node) in &changes {
            match node {
                Some(node) => folder.entries.insert(name.clone(), *node),
                None => folder.entries.remove(name),
            };
        }
        folder.pending.push(changes);
        Ok(())
    }

    fn named(&mut self, folder: u64, name: &str, number: u64) {
        let path = format!("{}/{name}", self.paths.get(&folder).map_or("", String::as_str));
        self.paths.insert(number, path);
    }

    /// Makes a file or a folder.
    pub fn make(&mut self, folder: u64, name: &str, is_folder: bool, mode: u16) -> Result<u64, Errno> {
        if self.folder(folder)?.entries.contains_key(name) {
            return Err(EEXIST);
        }
        let number = self.next;
        self.next += 1;
        let node = match is_folder {
            true => Node::Folder(Folder::default()),
            false => Node::File(File { links: 1, ..File::default() }),
        };
        self.nodes.insert(number, node);
        self.set_mode(number, mode);
        self.named(folder, name, number);
        self.change(folder, vec![(name.to_owned(), Some(number))])?;
        Ok(number)
    }

    pub fn link(&mut self, number: u64, folder: u64, name: &str) -> Result<(), Errno> {
        if !self.has_links {
            return Err(EOPNOTSUPP);
        }
        if self.folder(folder)?.entries.contains_key(name) {
            return Err(EEXIST);
        }
        self.file(number)?.links += 1;
        self.named(folder, name, number);
        self.change(folder, vec![(name.to_owned(), Some(number))])
    }

    pub fn unlink(&mut self, folder: u64, name: &str) -> Result<(), Errno> {
        let number = self.look_up(folder, name)?;
        match self.nodes.get_mut(&number) {
            Some(Node::Folder(gone)) if !gone.entries.is_empty() => return Err(ENOTEMPTY),
            Some(Node::File(file)) => file.links = file.links.saturating_sub(1),
            _ => {}
        }
        self.change(folder, vec![(name.to_owned(), None)])
    }

    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str), replaces: bool) -> Result<(), Errno> {
        let number = self.look_up(from.0, from.1)?;
        match self.look_up(to.0, to.1) {
            Ok(_) if !replaces => return Err(EEXIST),
            Ok(old) => {
                if let Ok(file) = self.file(old) {
                    file.links = file.links.saturating_sub(1);
                }
            }
            Err(ENOENT) => {}
            Err(error) => return Err(error),
        }
        self.named(to.0, to.1, number);
        let (gone, come) = ((from.1.to_owned(), None), (to.1.to_owned(), Some(number)));
        if from.0 == to.0 {
            return self.change(from.0, vec![gone, come]);
        }
        self.change(to.0, vec![come])?;
        self.change(from.0, vec![gone])
    }

    pub fn opened(&mut self, number: u64) {
        if let Ok(file) = self.file(number) {
            file.handles += 1;
        }
    }

    pub fn closed(&mut self, number: u64) {
        if let Ok(file) = self.file(number) {
            file.handles = file.handles.saturating_sub(1);
            // On the disk a name may still stand for it; only what never had another than a removed one goes.
            if file.handles == 0 && file.links == 0 {
                file.bytes.clear();
                file.bytes.shrink_to_fit();
            }
        }
    }

    pub fn read(&mut self, number: u64, at: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let bytes = &self.file(number)?.bytes;
        let from = usize::try_from(at).map_or(bytes.len(), |at| at.min(bytes.len()));
        Ok(bytes[from..bytes.len().min(from + length)].to_vec())
    }

    /// Writes as much as there is room for; an error if there is none.
    pub fn write(&mut self, number: u64, at: u64, data: &[u8]) -> Result<usize, Errno> {
        let free = self.capacity.saturating_sub(self.used()) as usize;
        let at = usize::try_from(at).map_err(|_| EIO)?;
        let file = self.file(number)?;
        let room = file.bytes.len().saturating_add(free);
        let end = (at + data.len()).min(room);
        if end <= at && !data.is_empty() {
            return Err(ENOSPC);
        }
        if file.bytes.len() < end {
            let from = file.bytes.len();
            file.bytes.resize(end, 0);
            file.dirty.extend(from / PAGE..=(end - 1) / PAGE);
        }
        file.bytes[at..end].copy_from_slice(&data[..end - at]);
        if end > at {
            file.dirty.extend(at / PAGE..=(end - 1) / PAGE);
        }
        self.touched(number);
        Ok(end - at)
    }

    pub fn resize(&mut self, number: u64, size: u64) -> Result<(), Errno> {
        let (free, size) = (self.capacity.saturating_sub(self.used()), size as usize);
        let file = self.file(number)?;
        let before = file.bytes.len();
        if size.saturating_sub(before) as u64 > free {
            return Err(ENOSPC);
        }
        file.bytes.resize(size, 0);
        let (from, to) = (before.min(size), before.max(size));
        file.dirty.extend(from / PAGE..=to.saturating_sub(1).max(from) / PAGE);
        self.touched(number);
        Ok(())
    }

    /// Brings a file or folder to the disk; with `drops`, only a part of it, and the rest is given up.
    pub fn sync(&mut self, number: u64, drops: bool) -> Result<(), Errno> {
        let random = SeededRandomness::new(self.random.next_u64());
        match self.nodes.get_mut(&number).ok_or(ENOENT)? {
            Node::File(file) => {
                file.disk = file.after_cut(drops.then_some(&random));
                file.dirty.clear();
            }
            Node::Folder(folder) => {
                folder.disk = folder.after_cut(drops.then_some(&random));
                folder.pending.clear();
            }
        }
        Ok(())
    }

    pub fn names(&mut self, folder: u64) -> Result<Vec<(String, u64)>, Errno> {
        Ok(self.folder(folder)?.entries.iter().map(|(name, node)| (name.clone(), *node)).collect())
    }

    /// The storage as a power cut may leave it, with power again.
    pub fn after_power_cut(&self, seed: u64) -> Storage {
        let mut after = Storage::new(seed);
        after.next = self.next;
        (after.capacity, after.has_links) = (self.capacity, self.has_links);
        after.last.clone_from(&self.last);
        after.last.push("  ^ the power is back".to_owned());
        let mut open = vec![(ROOT, String::new())];
        let mut links: BTreeMap<u64, u32> = BTreeMap::new();
        while let Some((number, path)) = open.pop() {
            after.paths.insert(number, path.clone());
            if let Some(mode) = self.modes.get(&number) {
                after.modes.insert(number, *mode);
            }
            match self.nodes.get(&number) {
                Some(Node::Folder(folder)) => {
                    let entries = folder.after_cut(Some(&after.random));
                    for (name, node) in &entries {
                        *links.entry(*node).or_default() += 1;
                        if links[node] == 1 {
                            open.push((*node, format!("{path}/{name}")));
                        }
                    }
                    let folder = Folder { disk: entries.clone(), entries, pending: Vec::new() };
                    after.nodes.insert(number, Node::Folder(folder));
                }
                Some(Node::File(file)) => {
                    let bytes = file.after_cut(Some(&after.random));
                    let file = File { disk: bytes.clone(), bytes, ..File::default() };
                    after.nodes.insert(number, Node::File(file));
                }
                None => {}
            }
        }
        for (number, count) in links {
            if let Ok(file) = after.file(number) {
                file.links = count;
            }
        }
        after
    }
}

impl File {
    /// What of it is on the disk: all, or what is drawn.
    fn after_cut(&self, draw: Option<&SeededRandomness>) -> Vec<u8> {
        let Some(random) = draw else { return self.bytes.clone() };
        let mut disk = self.disk.clone();
        if self.dirty.is_empty() {
            return disk;
        }
        // The length is written on its own.
        let length = if random.below(2) == 0 { disk.len() } else { self.bytes.len() };
        disk.resize(length, 0);
        for page in &self.dirty {
            let (from, to) = (page * PAGE, ((page + 1) * PAGE).min(length).min(self.bytes.len()));
            if from < to && random.below(2) == 0 {
                disk[from..to].copy_from_slice(&self.bytes[from..to]);
            }
        }
        disk
    }
}

impl Folder {
    /// What of it is on the disk: all, or what is drawn.
    fn after_cut(&self, draw: Option<&SeededRandomness>) -> BTreeMap<String, u64> {
        let Some(random) = draw else { return self.entries.clone() };
        let mut disk = self.disk.clone();
        for (name, node) in self.pending.iter().filter(|_| random.below(2) == 0).flatten() {
            match node {
                Some(node) => disk.insert(name.clone(), *node),
                None => disk.remove(name),
            };
        }
        disk
    }
}

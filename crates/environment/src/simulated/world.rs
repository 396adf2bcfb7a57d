//! The state of the simulated storage, and each operation on it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use super::Snapshot;
use super::faults::{Failure, Killed, Operation, PowerCut, ReadFault, Site, When};
use super::torn_write::torn_pages;
use crate::{Entry, SeededRandomness};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    File(u64),
    Folder,
}

/// A name with its history since its folder was last synced.
#[derive(Debug, Clone)]
pub(super) struct Name {
    /// What everybody sees.
    pub visible: Option<Node>,
    /// What a power cut may leave, oldest first; never empty.
    pub on_disk: Vec<Option<Node>>,
    /// Whether a sync of the folder would change `on_disk`.
    pub dirty: bool,
}

/// The bytes of a file. They only grow.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub content: Arc<Vec<u8>>,
    /// Bytes from here on were never synced.
    pub dirty_from: usize,
    /// What a failed sync left on disk in place of the content: offset and bytes.
    pub lost: Vec<(usize, Vec<u8>)>,
    /// Open handles.
    handles: u64,
    /// Whether a name stands for it, or may after a power cut.
    named: bool,
}

/// Who calls: a process, in the time between two power cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caller {
    pub process: u64,
    pub boot: u64,
}

/// How an operation goes on.
enum Course {
    /// As it should.
    Normal,
    /// It does nothing and fails.
    Before(io::Error),
    /// It happens and fails.
    After(io::Error),
    /// The power goes while it runs: it may be seen after the reboot, nothing of it is sure.
    Cut(io::Error),
    /// A sync that fails and throws away.
    Drops(io::Error),
    /// A sync that does nothing.
    Lies,
}

/// Free space without a limit.
const PLENTY: u64 = 1 << 50;

pub(super) struct World {
    pub seed: u64,
    pub names: BTreeMap<String, Name>,
    /// The names of the tree while it is not mounted.
    unmounted: Option<BTreeMap<String, Name>>,
    pub inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    dirty_names: BTreeSet<String>,
    used: u64,
    pub capacity: Option<u64>,
    pub operations: u64,
    pub changes: u64,
    pub trace: Option<Vec<Site>>,
    pub boot: u64,
    pub off: bool,
    pub crash_at: Option<u64>,
    pub crash_at_change: Option<u64>,
    pub kill_at: BTreeMap<u64, u64>,
    pub kill_at_change: BTreeMap<u64, u64>,
    killed: BTreeSet<u64>,
    processes: u64,
    /// Locked inodes and who holds them. A lock is on the file, not on its name, as with `flock`.
    locks: BTreeMap<u64, Caller>,
    pub failures: Vec<(When, Failure)>,
    pub read_faults: BTreeMap<String, Vec<ReadFault>>,
    randomness: SeededRandomness,
}

/// A name with single `/` between parts and neither `.` nor `..`, as `FolderFiles` reads it.
pub(super) fn normal(name: &str) -> String {
    let parts: Vec<&str> =
        name.split('/').filter(|part| !part.is_empty() && *part != "." && *part != "..").collect();
    parts.join("/")
}

pub(super) fn parent_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn not_found(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("simulated:/{name} does not exist"))
}

impl World {
    pub fn new(seed: u64) -> World {
        World {
            seed,
            names: BTreeMap::new(),
            unmounted: None,
            inodes: BTreeMap::new(),
            next_inode: 1,
            dirty_names: BTreeSet::new(),
            used: 0,
            capacity: None,
            operations: 0,
            changes: 0,
            trace: None,
            boot: 1,
            off: false,
            crash_at: None,
            crash_at_change: None,
            kill_at: BTreeMap::new(),
            kill_at_change: BTreeMap::new(),
            killed: BTreeSet::new(),
            processes: 1,
            locks: BTreeMap::new(),
            failures: Vec::new(),
            read_faults: BTreeMap::new(),
            randomness: SeededRandomness::new(seed),
        }
    }

    pub fn new_process(&mut self) -> u64 {
        self.processes += 1;
        self.processes
    }

    pub fn kill(&mut self, process: u64) {
        self.killed.insert(process);
        self.kill_at.remove(&process);
        self.kill_at_change.remove(&process);
        self.locks.retain(|_, holder| holder.process != process);
    }

    /// Counts the operation and finds out what becomes of it.
    fn step(&mut self, caller: Caller, operation: Operation, name: &str) -> io::Result<Course> {
        if self.off || caller.boot != self.boot {
            return Err(io::Error::other(PowerCut { at: self.operations }));
        }
        if self.killed.contains(&caller.process) {
            return Err(io::Error::other(Killed { at: self.operations }));
        }
        self.operations += 1;
        let number = self.operations;
        if let Some(trace) = &mut self.trace {
            trace.push(Site { number, operation, name: name.to_owned() });
        }
        let changes = matches!(
            operation,
            Operation::Create
                | Operation::Append
                | Operation::SyncFile
                | Operation::Link
                | Operation::SyncFolder
                | Operation::MakeFolder
                | Operation::Unlink
        );
        self.changes += u64::from(changes);
        // Once its number has come, a plan for a change holds for whatever comes next.
        let change = self.changes;
        let is_reached = |plan: Option<u64>| plan.is_some_and(|at| at <= change);
        if self.crash_at.is_some_and(|at| at <= number) || is_reached(self.crash_at_change) {
            self.off = true;
            return Ok(Course::Cut(io::Error::other(PowerCut { at: number })));
        }
        if self.kill_at.get(&caller.process).is_some_and(|at| *at <= number)
            || is_reached(self.kill_at_change.get(&caller.process).copied())
        {
            self.kill(caller.process);
            let error = io::Error::other(Killed { at: number });
            return Ok(if self.randomness.below(2) == 0 {
                Course::Before(error)
            } else {
                Course::After(error)
            });
        }
        let met = self.failures.iter().position(|(when, _)| match when {
            When::At(at) => *at == number,
            When::AtChange(at) => changes && *at == change,
            When::From(at) => *at <= number,
            When::Next(kind) | When::Every(kind) => *kind == operation,
            When::EveryChange => changes,
        });
        let Some(met) = met else { return Ok(Course::Normal) };
        let (when, failure) = self.failures[met].clone();
        if matches!(when, When::At(_) | When::AtChange(_) | When::Next(_)) {
            self.failures.remove(met);
        }
        let sync = matches!(operation, Operation::SyncFile | Operation::SyncFolder);
        Ok(match failure {
            Failure::IoAfter => Course::After(failure.error()),
            Failure::SyncDropsData if sync => Course::Drops(failure.error()),
            Failure::SyncLies if sync => Course::Lies,
            Failure::SyncLies => Course::Normal,
            _ => Course::Before(failure.error()),
        })
    }

    /// For operations that only look: done or failed, nothing between.
    fn look(&mut self, caller: Caller, operation: Operation, name: &str) -> io::Result<()> {
        match self.step(caller, operation, name)? {
            Course::Normal | Course::Lies => Ok(()),
            Course::Before(error) | Course::After(error) | Course::Cut(error) | Course::Drops(error) => {
                Err(error)
            }
        }
    }

    fn node(&self, name: &str) -> Option<Node> {
        if name.is_empty() { Some(Node::Folder) } else { self.names.get(name)?.visible }
    }

    fn need_folder(&self, folder: &str) -> io::Result<()> {
        match self.node(folder) {
            Some(Node::Folder) => Ok(()),
            Some(Node::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(not_found(folder)),
        }
    }

    fn has_fault(&self, name: &str, fault: &ReadFault) -> bool {
        self.read_faults.get(name).is_some_and(|faults| faults.contains(fault))
    }

    /// Lets `name` stand for something else, not yet durable.
    fn set(&mut self, name: &str, node: Option<Node>) {
        let state = self.names.entry(name.to_owned()).or_insert(Name {
            visible: None,
            on_disk: vec![None],
            dirty: false,
        });
        let former = std::mem::replace(&mut state.visible, node);
        // After a dropped sync the visible file may be in no state of the disk; nobody can see it any more now.
        let orphan = !state.on_disk.contains(&former);
        state.on_disk.push(node);
        state.dirty = true;
        self.dirty_names.insert(name.to_owned());
        if orphan {
            self.unname(former);
        }
    }

    /// Releases an inode that no name and no handle needs.
    fn collect(&mut self, inode: u64) {
        if self.inodes.get(&inode).is_some_and(|found| found.handles == 0 && !found.named)
            && let Some(gone) = self.inodes.remove(&inode)
        {
            self.used = self.used.saturating_sub(gone.content.len() as u64);
        }
    }

    pub fn close(&mut self, inode: u64) {
        if let Some(found) = self.inodes.get_mut(&inode) {
            found.handles = found.handles.saturating_sub(1);
        }
        self.collect(inode);
    }

    // Reading

    pub fn open(&mut self, caller: Caller, name: &str) -> io::Result<u64> {
        self.look(caller, Operation::Open, name)?;
        if self.has_fault(name, &ReadFault::Missing) {
            return Err(not_found(name));
        }
        match self.node(name) {
            Some(Node::File(inode)) => {
                if let Some(found) = self.inodes.get_mut(&inode) {
                    found.handles += 1;
                }
                Ok(inode)
            }
            Some(Node::Folder) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(not_found(name)),
        }
    }

    /// The bytes a reader of `name` gets.
    fn readable(&self, inode: u64, name: &str) -> io::Result<Arc<Vec<u8>>> {
        let mut content = self.inodes.get(&inode).ok_or_else(|| not_found(name))?.content.clone();
        for fault in self.read_faults.get(name).into_iter().flatten() {
            match fault {
                ReadFault::Io => return Err(Failure::Io.error()),
                ReadFault::Instead(other) => content = Arc::new(other.clone()),
                ReadFault::FlipBit(bit) => {
                    if let Some(byte) = Arc::make_mut(&mut content).get_mut((bit / 8) as usize) {
                        *byte ^= 1 << (bit % 8);
                    }
                }
                ReadFault::Missing | ReadFault::Unlisted | ReadFault::Misdirected { .. } => {}
            }
        }
        Ok(content)
    }

    pub fn length(&mut self, caller: Caller, inode: u64, name: &str) -> io::Result<u64> {
        self.look(caller, Operation::Measure, name)?;
        Ok(self.readable(inode, name)?.len() as u64)
    }

    pub fn read(
        &mut self,
        caller: Caller,
        inode: u64,
        name: &str,
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        self.look(caller, Operation::Read, name)?;
        let content = self.readable(inode, name)?;
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= content.len() as u64);
        let Some(end) = end else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        buf.copy_from_slice(&content[offset as usize..end as usize]);
        for fault in self.read_faults.get(name).into_iter().flatten() {
            if let ReadFault::Misdirected { by } = fault {
                for (index, byte) in buf.iter_mut().enumerate() {
                    let place = offset.saturating_add(index as u64).saturating_add(*by);
                    if let Some(other) = usize::try_from(place).ok().and_then(|at| content.get(at)) {
                        *byte = *other;
                    }
                }
            }
        }
        Ok(())
    }

    pub fn list(&mut self, caller: Caller, folder: &str) -> io::Result<Vec<Entry>> {
        self.look(caller, Operation::List, folder)?;
        self.need_folder(folder)?;
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut entries = Vec::new();
        for (name, state) in self.names.range(prefix.clone()..) {
            let Some(rest) = name.strip_prefix(&prefix) else { break };
            if rest.contains('/')
                || self.has_fault(name, &ReadFault::Missing)
                || self.has_fault(name, &ReadFault::Unlisted)
            {
                continue;
            }
            match state.visible {
                None => {}
                Some(Node::Folder) => {
                    entries.push(Entry { name: rest.to_owned(), len: 0, is_folder: true });
                }
                Some(Node::File(inode)) => {
                    let len = self.inodes.get(&inode).map_or(0, |inode| inode.content.len() as u64);
                    entries.push(Entry { name: rest.to_owned(), len, is_folder: false });
                }
            }
        }
        entries.sort();
        Ok(entries)
    }

    pub fn free_bytes(&mut self, caller: Caller) -> io::Result<u64> {
        self.look(caller, Operation::FreeBytes, "")?;
        Ok(self.free())
    }

    fn free(&self) -> u64 {
        self.capacity.map_or(PLENTY, |capacity| capacity.saturating_sub(self.used))
    }

    // Creating

    pub fn create(&mut self, caller: Caller, name: &str) -> io::Result<u64> {
        // An unnamed file that nobody holds is nothing: before and after are the same.
        self.look(caller, Operation::Create, name)?;
        self.need_folder(parent_of(name))?;
        let inode = self.new_inode(Arc::default());
        if let Some(inode) = self.inodes.get_mut(&inode) {
            inode.handles = 1;
        }
        Ok(inode)
    }

    fn new_inode(&mut self, content: Arc<Vec<u8>>) -> u64 {
        let number = self.next_inode;
        self.next_inode += 1;
        self.used += content.len() as u64;
        let dirty_from = content.len();
        self.inodes.insert(number, Inode { content, dirty_from, lost: Vec::new(), handles: 0, named: false });
        number
    }

    pub fn append(&mut self, caller: Caller, inode: u64, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (mut wanted, error) = match self.step(caller, Operation::Append, name)? {
            Course::Normal | Course::Lies => (bytes.len() as u64, None),
            Course::After(error) => (bytes.len() as u64, Some(error)),
            Course::Before(error) | Course::Cut(error) | Course::Drops(error) => {
                (self.randomness.below(bytes.len() as u64 + 1), Some(error))
            }
        };
        let free = self.free();
        let full = wanted > free;
        wanted = wanted.min(free);
        let Some(found) = self.inodes.get_mut(&inode) else { return Err(not_found(name)) };
        Arc::make_mut(&mut found.content).extend_from_slice(&bytes[..wanted as usize]);
        self.used += wanted;
        match error {
            Some(error) => Err(error),
            None if full => Err(Failure::NoSpace.error()),
            None => Ok(()),
        }
    }

    pub fn sync_file(&mut self, caller: Caller, inode: u64, name: &str) -> io::Result<()> {
        let course = self.step(caller, Operation::SyncFile, name)?;
        let Some(found) = self.inodes.get_mut(&inode) else { return Err(not_found(name)) };
        match course {
            Course::Normal => {
                found.dirty_from = found.content.len();
                Ok(())
            }
            Course::After(error) => {
                found.dirty_from = found.content.len();
                Err(error)
            }
            Course::Lies => Ok(()),
            Course::Before(error) | Course::Cut(error) => Err(error),
            Course::Drops(error) => {
                let randomness = &self.randomness;
                let torn = torn_pages(&found.content, found.dirty_from, &mut |bound| randomness.below(bound));
                found.lost.extend(torn);
                found.dirty_from = found.content.len();
                Err(error)
            }
        }
    }

    pub fn link(&mut self, caller: Caller, inode: u64, name: &str) -> io::Result<()> {
        let error = match self.step(caller, Operation::Link, name)? {
            Course::Normal | Course::Lies => None,
            Course::After(error) | Course::Cut(error) => Some(error),
            Course::Before(error) | Course::Drops(error) => return Err(error),
        };
        self.need_folder(parent_of(name))?;
        if name.is_empty() || self.node(name).is_some() {
            return Err(error.unwrap_or_else(|| io::ErrorKind::AlreadyExists.into()));
        }
        if let Some(found) = self.inodes.get_mut(&inode) {
            found.named = true;
        }
        self.set(name, Some(Node::File(inode)));
        error.map_or(Ok(()), Err)
    }

    pub fn sync_folder(&mut self, caller: Caller, folder: &str) -> io::Result<()> {
        let (drops, error) = match self.step(caller, Operation::SyncFolder, folder)? {
            Course::Normal => (false, None),
            Course::After(error) => (false, Some(error)),
            Course::Drops(error) => (true, Some(error)),
            Course::Lies => return Ok(()),
            Course::Before(error) | Course::Cut(error) => return Err(error),
        };
        self.need_folder(folder)?;
        let dirty: Vec<String> =
            self.dirty_names.iter().filter(|name| parent_of(name) == folder).cloned().collect();
        for name in dirty {
            self.settle(&name, drops);
        }
        error.map_or(Ok(()), Err)
    }

    /// Makes one state of a name durable: the visible one, or any.
    fn settle(&mut self, name: &str, any: bool) {
        self.dirty_names.remove(name);
        let Some(state) = self.names.get_mut(name) else { return };
        let node = if any {
            state.on_disk[self.randomness.below(state.on_disk.len() as u64) as usize]
        } else {
            state.visible
        };
        let former = std::mem::replace(&mut state.on_disk, vec![node]);
        state.dirty = false;
        let keep = [state.visible, node];
        if keep == [None, None] {
            self.names.remove(name);
        }
        for old in former.into_iter().filter(|old| !keep.contains(old)) {
            self.unname(old);
        }
    }

    fn unname(&mut self, node: Option<Node>) {
        if let Some(Node::File(inode)) = node {
            if let Some(found) = self.inodes.get_mut(&inode) {
                found.named = false;
            }
            self.collect(inode);
        }
    }

    pub fn make_folder(&mut self, caller: Caller, folder: &str) -> io::Result<()> {
        let mut path = String::new();
        for part in folder.split('/').filter(|part| !part.is_empty()) {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
            match self.node(&path) {
                Some(Node::Folder) => continue,
                Some(Node::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
                None => {}
            }
            match self.step(caller, Operation::MakeFolder, &path)? {
                Course::Normal | Course::Lies => self.set(&path, Some(Node::Folder)),
                Course::After(error) | Course::Cut(error) => {
                    self.set(&path, Some(Node::Folder));
                    return Err(error);
                }
                Course::Before(error) | Course::Drops(error) => return Err(error),
            }
        }
        // A folder that exists may stand there from a call that failed before its sync, so syncs are never saved.
        let mut above = folder;
        while !above.is_empty() {
            above = parent_of(above);
            self.sync_folder(caller, above)?;
        }
        Ok(())
    }

    pub fn remove(&mut self, caller: Caller, name: &str) -> io::Result<()> {
        let error = match self.step(caller, Operation::Unlink, name)? {
            Course::Normal | Course::Lies => None,
            Course::After(error) | Course::Cut(error) => Some(error),
            Course::Before(error) | Course::Drops(error) => return Err(error),
        };
        match self.node(name) {
            Some(Node::File(_)) => self.set(name, None),
            Some(Node::Folder) => return Err(error.unwrap_or_else(|| io::ErrorKind::IsADirectory.into())),
            None => return error.map_or(Ok(()), Err),
        }
        match error {
            Some(error) => Err(error),
            None => self.sync_folder(caller, parent_of(name)),
        }
    }

    // Locks

    pub fn lock(&mut self, caller: Caller, name: &str) -> io::Result<Option<u64>> {
        let error = match self.step(caller, Operation::Lock, name)? {
            Course::Normal | Course::Lies => None,
            Course::After(error) | Course::Cut(error) => Some(error),
            Course::Before(error) | Course::Drops(error) => return Err(error),
        };
        self.need_folder(parent_of(name))?;
        let inode = match self.node(name) {
            Some(Node::File(inode)) => inode,
            Some(Node::Folder) => return Err(io::ErrorKind::IsADirectory.into()),
            None => {
                let inode = self.new_inode(Arc::default());
                if let Some(found) = self.inodes.get_mut(&inode) {
                    found.named = true;
                }
                self.set(name, Some(Node::File(inode)));
                inode
            }
        };
        if let Some(error) = error {
            return Err(error);
        }
        if self.locks.contains_key(&inode) {
            return Ok(None);
        }
        self.locks.insert(inode, caller);
        if let Some(found) = self.inodes.get_mut(&inode) {
            found.handles += 1;
        }
        Ok(Some(inode))
    }

    pub fn unlock(&mut self, caller: Caller, inode: u64) {
        if self.locks.get(&inode) == Some(&caller) {
            self.locks.remove(&inode);
        }
        self.close(inode);
    }

    // Whole trees

    pub fn set_mounted(&mut self, mounted: bool) {
        match (mounted, self.unmounted.take()) {
            (true, Some(names)) => self.names = names,
            (false, None) => self.unmounted = Some(std::mem::take(&mut self.names)),
            (_, unmounted) => self.unmounted = unmounted,
        }
        self.dirty_names =
            self.names.iter().filter(|(_, state)| state.dirty).map(|(name, _)| name.clone()).collect();
    }

    /// The names of the tree itself, mounted or not.
    pub fn mounted_names(&self) -> &BTreeMap<String, Name> {
        self.unmounted.as_ref().unwrap_or(&self.names)
    }

    pub fn visible(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (name, state) in self.mounted_names() {
            match state.visible {
                None => {}
                Some(Node::Folder) => {
                    snapshot.folders.insert(name.clone());
                }
                Some(Node::File(inode)) => {
                    if let Some(inode) = self.inodes.get(&inode) {
                        snapshot.files.insert(name.clone(), inode.content.clone());
                    }
                }
            }
        }
        snapshot
    }

    /// Lets the tree durably be `snapshot`; what is open stays open.
    pub fn restore(&mut self, snapshot: &Snapshot) {
        self.set_mounted(true);
        self.dirty_names.clear();
        let former = std::mem::take(&mut self.names);
        for folder in &snapshot.folders {
            self.put(folder, Node::Folder);
        }
        for (name, content) in &snapshot.files {
            // An unchanged file keeps its inode, and so its lock.
            let same = former.get(name).and_then(|state| match state.visible {
                Some(Node::File(inode)) => Some(inode),
                _ => None,
            });
            let same = same.filter(|inode| {
                self.inodes.get(inode).is_some_and(|found| {
                    found.content == *content && found.lost.is_empty() && found.dirty_from == content.len()
                })
            });
            let inode = same.unwrap_or_else(|| self.new_inode(content.clone()));
            if let Some(found) = self.inodes.get_mut(&inode) {
                found.named = true;
            }
            self.put(name, Node::File(inode));
        }
        for (name, state) in former {
            let kept = self.names.get(&name).and_then(|state| state.visible);
            for old in state.on_disk.into_iter().chain([state.visible]).filter(|old| *old != kept) {
                self.unname(old);
            }
        }
    }

    fn put(&mut self, name: &str, node: Node) {
        self.names
            .insert(name.to_owned(), Name { visible: Some(node), on_disk: vec![Some(node)], dirty: false });
    }

    /// Power is back: the tree is `snapshot`, and nothing of before is open.
    pub fn install(&mut self, snapshot: &Snapshot) {
        self.boot += 1;
        self.off = false;
        self.crash_at = None;
        self.crash_at_change = None;
        self.kill_at.clear();
        self.kill_at_change.clear();
        self.killed.clear();
        self.locks.clear();
        self.unmounted = None;
        self.names.clear();
        self.inodes.clear();
        self.used = 0;
        self.restore(snapshot);
    }

    pub fn edit(&mut self, name: &str, edit: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> io::Result<()> {
        let Some(Node::File(inode)) = self.node(name) else { return Err(not_found(name)) };
        let Some(found) = self.inodes.get_mut(&inode) else { return Err(not_found(name)) };
        let before = found.content.len() as u64;
        edit(Arc::make_mut(&mut found.content))?;
        let after = found.content.len();
        found.dirty_from = found.dirty_from.min(after);
        if before != after as u64 {
            found.dirty_from = after;
            found.lost.clear();
        }
        self.used = (self.used + after as u64).saturating_sub(before);
        Ok(())
    }

    pub fn delete(&mut self, name: &str) -> io::Result<()> {
        let Some(Node::File(_)) = self.node(name) else { return Err(not_found(name)) };
        self.set(name, None);
        self.settle(name, false);
        Ok(())
    }
}

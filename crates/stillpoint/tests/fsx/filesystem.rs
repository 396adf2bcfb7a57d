//! The file system that the kernel sees: every call is asked of the [`Storage`], and meets its faults there.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::storage::{Call, EIO, Effect, Errno, Facts, Storage};

/// Whether this machine has FUSE at all.
pub fn is_possible() -> bool {
    Path::new("/dev/fuse").exists()
}

/// Names and sizes may change behind the kernel's back (a fault), so it is to ask each time.
const TTL: Duration = Duration::ZERO;

/// Storage with a mounted file system on it.
pub struct Mounted {
    pub storage: Arc<Mutex<Storage>>,
    place: PathBuf,
    /// The only program that a fault may kill.
    victim: PathBuf,
    session: Option<BackgroundSession>,
}

impl Mounted {
    /// Mounts `storage` at the empty folder `place`.
    pub fn new(storage: Storage, place: &Path, victim: &Path) -> Mounted {
        let storage = Arc::new(Mutex::new(storage));
        let mut mounted =
            Mounted { storage, place: place.to_owned(), victim: victim.to_owned(), session: None };
        mounted.mount();
        mounted
    }

    fn mount(&mut self) {
        let owner = std::fs::metadata("/proc/self").unwrap();
        let system = System {
            storage: self.storage.clone(),
            victim: self.victim.clone(),
            owner: (owner.uid(), owner.gid()),
        };
        let mut config = Config::default();
        config.mount_options =
            vec![MountOption::FSName("stillpoint-fsx".to_owned()), MountOption::Subtype("fsx".to_owned())];
        // A slow call must not hold up all others.
        config.n_threads = Some(2);
        let session = fuser::spawn_mount(system, &self.place, &config);
        self.session = Some(session.unwrap_or_else(|error| {
            panic!(
                "mounting at {}: {error}; `cargo xtask install` installs fusermount3",
                self.place.display()
            )
        }));
    }

    pub fn storage(&self) -> MutexGuard<'_, Storage> {
        locked(&self.storage)
    }

    /// The power comes back: the disk is what the cut left of it, and the kernel knows nothing any more.
    pub fn power_cut(&mut self, seed: u64) {
        self.unmount();
        let after = self.storage().after_power_cut(seed);
        self.storage = Arc::new(Mutex::new(after));
        self.mount();
    }

    fn unmount(&mut self) {
        if let Some(session) = self.session.take() {
            // A process that was killed may still be on its way out.
            session.umount_and_join().unwrap();
        }
    }
}

fn locked(storage: &Mutex<Storage>) -> MutexGuard<'_, Storage> {
    storage.lock().unwrap_or_else(PoisonError::into_inner)
}

struct System {
    storage: Arc<Mutex<Storage>>,
    victim: PathBuf,
    owner: (u32, u32),
}

/// How a call that met its fault goes on.
enum Course {
    Goes,
    FailsAfter(Errno),
    Short(usize),
    Flips(usize),
    Misdirected(usize),
    Hides,
    Lies,
    Drops,
}

impl System {
    /// Asks for the fault of a call, and waits, kills or fails with it.
    fn course(&self, request: &Request, call: Call, node: u64, name: &str) -> Result<Course, Errno> {
        let effect = locked(&self.storage).meets(call, node, name)?;
        Ok(match effect {
            None => Course::Goes,
            Some(Effect::Fails(error)) => return Err(error),
            Some(Effect::FailsAfter(error)) => Course::FailsAfter(error),
            Some(Effect::Lies) => Course::Lies,
            Some(Effect::Drops) => Course::Drops,
            Some(Effect::Short(bytes)) => Course::Short(bytes),
            Some(Effect::Flips(byte)) => Course::Flips(byte),
            Some(Effect::Misdirected(bytes)) => Course::Misdirected(bytes),
            Some(Effect::Hides) => Course::Hides,
            Some(Effect::Slow(time)) => {
                std::thread::sleep(time);
                Course::Goes
            }
            Some(Effect::KilledBefore) => {
                self.kill(request.pid());
                return Err(EIO);
            }
            Some(Effect::KilledAfter) => {
                self.kill(request.pid());
                Course::Goes
            }
            // What is not a sync reaches the disk perhaps; a sync that nobody hears of did nothing for sure.
            Some(Effect::PowerCut) if matches!(call, Call::SyncFile | Call::SyncFolder) => return Err(EIO),
            Some(Effect::PowerCut) => Course::FailsAfter(EIO),
        })
    }

    /// Kills the program that calls, if it is the one under test.
    fn kill(&self, caller: u32) {
        // The number is that of a thread; a signal to it ends its whole process.
        let is_victim =
            std::fs::read_link(format!("/proc/{caller}/exe")).is_ok_and(|path| path == self.victim);
        let caller = i32::try_from(caller).ok().and_then(Pid::from_raw).filter(|_| is_victim);
        if let Some(caller) = caller {
            let _ = kill_process(caller, Signal::KILL);
        }
    }

    /// A call that changes something, with its fault.
    fn changing<T>(
        &self,
        request: &Request,
        (call, node, name): (Call, u64, &str),
        act: impl FnOnce(&mut Storage) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match self.course(request, call, node, name)? {
            Course::FailsAfter(error) => {
                act(&mut locked(&self.storage))?;
                Err(error)
            }
            _ => act(&mut locked(&self.storage)),
        }
    }

    fn sync(&self, request: &Request, call: Call, node: u64) -> Result<(), Errno> {
        match self.course(request, call, node, "")? {
            Course::Lies => Ok(()),
            Course::Drops => {
                locked(&self.storage).sync(node, true)?;
                Err(EIO)
            }
            Course::FailsAfter(error) => {
                locked(&self.storage).sync(node, false)?;
                Err(error)
            }
            _ => locked(&self.storage).sync(node, false),
        }
    }

    fn attributes(&self, facts: &Facts) -> FileAttr {
        FileAttr {
            ino: INodeNo(facts.number),
            size: facts.size,
            blocks: facts.size.div_ceil(512),
            atime: facts.changed,
            mtime: facts.changed,
            ctime: facts.changed,
            crtime: facts.changed,
            kind: if facts.is_folder { FileType::Directory } else { FileType::RegularFile },
            perm: facts.mode,
            nlink: facts.links,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn entry(&self, number: Result<u64, Errno>, reply: ReplyEntry) {
        match number.and_then(|number| locked(&self.storage).facts(number)) {
            Ok(facts) => reply.entry(&TTL, &self.attributes(&facts), Generation(0)),
            Err(error) => reply.error(number_of(error)),
        }
    }
}

fn number_of(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error)
}

fn done(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(number_of(error)),
    }
}

fn text(name: &OsStr) -> &str {
    // The program makes no other names.
    name.to_str().unwrap_or("?")
}

impl Filesystem for System {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = locked(&self.storage).look_up(parent.0, text(name));
        self.entry(number, reply);
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let facts = {
            let storage = locked(&self.storage);
            if storage.is_off { Err(EIO) } else { storage.facts(node.0) }
        };
        match facts {
            Ok(facts) => reply.attr(&TTL, &self.attributes(&facts)),
            Err(error) => reply.error(number_of(error)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let result = self.changing(request, (Call::Resize, node.0, ""), |storage| {
            if let Some(mode) = mode {
                storage.set_mode(node.0, (mode & 0o7777) as u16);
            }
            if let Some(size) = size {
                storage.resize(node.0, size)?;
            }
            storage.facts(node.0)
        });
        match result {
            Ok(facts) => reply.attr(&TTL, &self.attributes(&facts)),
            Err(error) => reply.error(number_of(error)),
        }
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let name = text(name);
        let made = self.changing(request, (Call::MakeFolder, parent.0, name), |storage| {
            storage.make(parent.0, name, true, (mode & !umask & 0o7777) as u16)
        });
        self.entry(made, reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = text(name);
        let act = |storage: &mut Storage| storage.unlink(parent.0, name);
        done(self.changing(request, (Call::Unlink, parent.0, name), act), reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink(request, parent, name, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (text(name), text(new_name));
        let act = |storage: &mut Storage| {
            storage.rename(
                (parent.0, from),
                (new_parent.0, to),
                !flags.contains(RenameFlags::RENAME_NOREPLACE),
            )
        };
        done(self.changing(request, (Call::Rename, new_parent.0, to), act), reply);
    }

    fn link(&self, request: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = text(name);
        let linked = self.changing(request, (Call::Link, parent.0, name), |storage| {
            storage.link(node.0, parent.0, name).map(|()| node.0)
        });
        self.entry(linked, reply);
    }

    fn open(&self, request: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.course(request, Call::Open, node.0, "") {
            Ok(Course::FailsAfter(error)) | Err(error) => reply.error(number_of(error)),
            Ok(_) => {
                locked(&self.storage).opened(node.0);
                reply.opened(FileHandle(0), FopenFlags::empty());
            }
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let name = text(name);
        let made = self.changing(request, (Call::Create, parent.0, name), |storage| {
            let number = storage.make(parent.0, name, false, (mode & !umask & 0o7777) as u16)?;
            storage.opened(number);
            storage.facts(number)
        });
        match made {
            Ok(facts) => {
                let attributes = self.attributes(&facts);
                reply.created(&TTL, &attributes, Generation(0), FileHandle(0), FopenFlags::empty());
            }
            Err(error) => reply.error(number_of(error)),
        }
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        at: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size as usize;
        let course = match self.course(request, Call::Read, node.0, "") {
            Ok(Course::FailsAfter(error)) | Err(error) => return reply.error(number_of(error)),
            Ok(course) => course,
        };
        let mut storage = locked(&self.storage);
        let read = match course {
            Course::Short(most) => storage.read(node.0, at, size.min(most)),
            Course::Misdirected(bytes) => storage.read(node.0, at, size).and_then(|mut right| {
                let other = storage.read(node.0, at + bytes as u64, size)?;
                right[..other.len()].copy_from_slice(&other);
                Ok(right)
            }),
            Course::Flips(byte) => storage.read(node.0, at, size).map(|mut bytes| {
                let length = bytes.len();
                if length > 0 {
                    bytes[byte % length] ^= 1;
                }
                bytes
            }),
            _ => storage.read(node.0, at, size),
        };
        drop(storage);
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(number_of(error)),
        }
    }

    fn write(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        at: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.course(request, Call::Write, node.0, "").and_then(|course| match course {
            Course::Short(most) => {
                locked(&self.storage).write(node.0, at, &data[..data.len().min(most.max(1))])
            }
            Course::FailsAfter(error) => {
                // A part of it stands there.
                locked(&self.storage).write(node.0, at, &data[..data.len() / 2])?;
                Err(error)
            }
            _ => locked(&self.storage).write(node.0, at, data),
        });
        match written {
            Ok(bytes) => reply.written(bytes as u32),
            Err(error) => reply.error(number_of(error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        node: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        locked(&self.storage).closed(node.0);
        reply.ok();
    }

    fn fsync(&self, request: &Request, node: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.sync(request, Call::SyncFile, node.0), reply);
    }

    fn fsyncdir(&self, request: &Request, node: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(self.sync(request, Call::SyncFolder, node.0), reply);
    }

    fn readdir(
        &self,
        request: &Request,
        node: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let course = match self.course(request, Call::List, node.0, "") {
            Ok(Course::FailsAfter(error)) | Err(error) => return reply.error(number_of(error)),
            Ok(course) => course,
        };
        let mut storage = locked(&self.storage);
        let mut names = match storage.names(node.0) {
            Ok(names) => names,
            Err(error) => return reply.error(number_of(error)),
        };
        if matches!(course, Course::Hides) {
            let mut number = 0;
            names.retain(|_| {
                number += 1;
                number % 2 == 0
            });
        }
        for (index, (name, number)) in (1..).zip(names).skip(offset as usize) {
            let is_folder = storage.facts(number).is_ok_and(|facts| facts.is_folder);
            let kind = if is_folder { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(number), index, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let storage = locked(&self.storage);
        let free = storage.capacity.saturating_sub(storage.used()) / 512;
        reply.statfs(storage.capacity / 512, free, free, 1 << 20, 1 << 20, 512, 255, 512);
    }
}

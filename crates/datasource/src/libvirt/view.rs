//! The view of a running machine: a backup job of libvirt, read over NBD.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use model::{Consistency, JobId};
use nbd::{Address, Export, Options};

use super::definition::{self, Disk};
use super::guard::{Guard, Watch, thaw};
use super::rpc::{Connection, Domain, LibvirtError, State};
use super::{CHECKPOINT, DESCRIPTION, FILE_MARK, Settings, failed};
use crate::{
    Changed, DiskDescription, FreezeMethod, FreezeRequest, FrozenDisk, FrozenView, MachineDescription,
    MachineSpec, ProviderError, Source,
};

/// How long a restart of libvirt's daemon may take, and the end of a job.
const RESTART: Duration = Duration::from_secs(30);
/// How long QEMU may take to make checkpoint and copies of all disks.
const BEGIN: Duration = Duration::from_secs(60);
/// Checkpoints that may gather while no run has a base.
const MOST_KEPT: usize = 4;
/// A socket's path has at most 107 bytes on Linux.
const SOCKET_PATH: usize = 107;

/// Names of properties of a disk's description.
pub(super) const TARGET: &str = "target";
pub(super) const FILE: &str = "file";
pub(super) const INODE: &str = "inode";
pub(super) const MARK: &str = "checkpoint";

/// A view that QEMU keeps.
pub struct LibvirtView {
    description: MachineDescription,
    consistency: Consistency,
    method: FreezeMethod,
    disks: Vec<FrozenDisk>,
    job: Running,
}

/// A machine as libvirt has it now, and the conversation about it.
pub(super) struct Found {
    pub(super) connection: Connection,
    pub(super) domain: Domain,
    pub(super) state: State,
}

/// The one view of a machine that is there at a time, of all agents of this host.
pub(super) struct Claim {
    uuid: [u8; 16],
    claimed: Arc<Mutex<BTreeSet<[u8; 16]>>>,
    /// Locked as long as it is open; gone with the process.
    _lock: Option<File>,
}

impl Claim {
    /// Nothing if the machine has a view already.
    pub(super) fn of(
        uuid: [u8; 16],
        notes: &Path,
        claimed: &Arc<Mutex<BTreeSet<[u8; 16]>>>,
    ) -> Option<Claim> {
        // Where no file can be locked, the machines of this process are still told apart.
        let _ = std::fs::create_dir_all(notes);
        let lock = File::create(notes.join(format!("claim-{}", super::guard::hex(&uuid)))).ok();
        if let Some(Err(TryLockError::WouldBlock)) = lock.as_ref().map(File::try_lock) {
            return None;
        }
        let is_new = claimed.lock().unwrap_or_else(PoisonError::into_inner).insert(uuid);
        is_new.then(|| Claim { uuid, claimed: claimed.clone(), _lock: lock })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.uuid);
    }
}

/// A running backup job; dropping it ends the job, and with it export, socket and scratch files.
struct Running {
    connection: Mutex<Connection>,
    domain: Domain,
    files: Vec<PathBuf>,
    watch: Option<Reserve>,
    _claim: Claim,
}

impl Running {
    /// The machine's backup job. libvirt may be restarted meanwhile: the job lives in QEMU, and a daemon is waited for.
    fn ask(&self) -> Result<Option<String>, LibvirtError> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        loop {
            match connection.backup(&self.domain) {
                Err(error) if error.code().is_none() && began.elapsed() < RESTART => {
                    std::thread::sleep(Duration::from_millis(500));
                    if let Ok(another) = connection.another() {
                        *connection = another;
                    }
                }
                other => return other,
            }
        }
    }

    /// Whether the machine's backup job is there, and is ours.
    fn is_alive(&self) -> Result<bool, LibvirtError> {
        let Some(job) = self.ask()? else { return Ok(false) };
        let named = definition::files_of(&job);
        Ok(self.files.iter().all(|file| named.iter().any(|name| Path::new(name) == file)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.watch.take();
        let is_over = match self.is_alive() {
            Ok(true) => {
                let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
                end(&mut connection, &self.domain).is_ok()
            }
            Ok(false) => true,
            Err(_) => false,
        };
        // What a living job writes to stays where the next sweep finds it.
        if is_over {
            remove(&self.files);
        }
    }
}

/// Ends the machine's backup job and waits until it is gone.
pub(super) fn end(connection: &mut Connection, domain: &Domain) -> Result<(), LibvirtError> {
    match connection.abort_job(domain) {
        // It ended by itself meanwhile.
        Err(error) if error.code() == Some(LibvirtError::INVALID) => {}
        other => other?,
    }
    let began = Instant::now();
    while connection.backup(domain)?.is_some() {
        if began.elapsed() > RESTART {
            return Err(LibvirtError::Lost("the backup job does not end".to_owned()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Ends the job before its scratch space is full: QEMU would fail the guest's own writes then.
struct Reserve {
    stop: mpsc::Sender<()>,
}

/// Bytes that stay free where QEMU keeps what the machine overwrites.
const RESERVE: u64 = 512 << 20;

/// The folder that a job's own folder is in.
fn around(file: &Path) -> &Path {
    file.parent().and_then(Path::parent).unwrap_or(Path::new("/"))
}

/// Bytes free for a scratch file.
fn free(file: &Path) -> std::io::Result<u64> {
    let found = rustix::fs::statvfs(around(file))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

impl Reserve {
    fn watch(connection: Connection, domain: Domain, files: Vec<PathBuf>) -> Reserve {
        let (stop, stopped) = mpsc::channel();
        std::thread::spawn(move || {
            let mut connection = connection;
            while stopped.recv_timeout(Duration::from_millis(500)) == Err(mpsc::RecvTimeoutError::Timeout) {
                if files.iter().any(|file| free(file).is_ok_and(|free| free < RESERVE)) {
                    if connection.abort_job(&domain).is_err()
                        && let Ok(another) = connection.another()
                    {
                        connection = another;
                        continue;
                    }
                    return;
                }
            }
        });
        Reserve { stop }
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // A thread that ended by itself needs no word.
        let _ = self.stop.send(());
    }
}

/// Removes files of a job that is over; libvirt removed them already unless it died.
pub(super) fn remove(files: &[PathBuf]) {
    for file in files {
        let _ = std::fs::remove_file(file);
    }
    for folder in files.iter().filter_map(|file| file.parent()) {
        if is_marked(folder) {
            // Only when nothing is in it any more.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Begins the names of the folders of one machine. Short, because a socket's path must be.
fn own_mark(machine: &MachineSpec) -> String {
    format!("{FILE_MARK}{}-", machine.id.to_string().get(..8).unwrap_or_default())
}

/// Removes what killed jobs of a machine left in these folders. Nobody else may have a view of it.
pub(super) fn remove_left(machine: &MachineSpec, folders: &BTreeSet<PathBuf>) -> Vec<String> {
    let mark = own_mark(machine);
    let mut removed = Vec::new();
    for entry in folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(&mark) {
            continue;
        }
        let folder = entry.path();
        let files: Vec<PathBuf> = std::fs::read_dir(&folder)
            .map(|files| files.flatten().map(|file| file.path()).collect())
            .unwrap_or_default();
        remove(&files);
        if std::fs::remove_dir(&folder).is_ok() || !folder.exists() {
            removed.push(folder.display().to_string());
        }
    }
    removed
}

/// Whether a folder is one of ours.
pub(super) fn is_marked(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FILE_MARK))
}

impl FrozenView for LibvirtView {
    fn description(&self) -> &MachineDescription {
        &self.description
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn method(&self) -> &FreezeMethod {
        &self.method
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn verify_unchanged(&self) -> Result<(), ProviderError> {
        let object = self.description.name.clone();
        match self.job.is_alive() {
            Ok(true) => Ok(()),
            Ok(false) => Err(ProviderError::Changed {
                object,
                reason: "its backup job ended by itself: scratch space ran full, the machine stopped or moved, or \
                         somebody ended it"
                    .to_owned(),
            }),
            Err(error) => Err(failed(&object, &error)),
        }
    }
}

/// The disks that are protected.
pub(super) fn chosen(
    machine: &MachineSpec,
    exclude: &[String],
    text: &str,
) -> Result<Vec<Disk>, ProviderError> {
    let mut disks = definition::disks(&machine.name, text)?;
    disks.retain(|disk| !exclude.contains(&disk.target) && !disk.is_no_state);
    if let Some((disk, why)) = disks.iter().find_map(|disk| Some((disk, disk.unprotected.as_ref()?))) {
        return Err(ProviderError::Unsupported {
            object: machine.name.clone(),
            reason: format!(
                "disk {} cannot be protected: {why}; leave it out when the machine is added: --exclude {}",
                disk.target, disk.target
            ),
        });
    }
    if disks.is_empty() {
        return Err(ProviderError::Unsupported {
            object: machine.name.clone(),
            reason: "has no disk that can be protected".to_owned(),
        });
    }
    Ok(disks)
}

/// What is kept about a disk.
pub(super) fn describe(disk: &Disk, size: u64, mark: Option<&str>) -> DiskDescription {
    let file = disk.file.clone().unwrap_or_default();
    let mut properties = std::collections::BTreeMap::new();
    properties.insert(TARGET.to_owned(), disk.target.clone());
    properties.insert("bus".to_owned(), disk.bus.clone());
    if let Some(inode) = inode(&file) {
        properties.insert(INODE.to_owned(), inode.to_string());
    }
    if let Some(mark) = mark {
        properties.insert(MARK.to_owned(), mark.to_owned());
    }
    properties.insert(FILE.to_owned(), file.clone());
    DiskDescription {
        key: format!("disk-{}", disk.target),
        file_name: Path::new(&file)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        format: disk.format.clone(),
        size,
        sector: disk.sector.unwrap_or(512),
        chain: disk.chain,
        tracked: true,
        properties,
    }
}

fn inode(file: &str) -> Option<u64> {
    std::fs::metadata(file).ok().map(|found| found.ino())
}

/// The checkpoint that holds what changed on `disk` since the view of `base`, or why there is none.
fn base_of(
    connection: &mut Connection,
    domain: &Domain,
    disk: &Disk,
    base: Option<&DiskDescription>,
) -> Result<Result<String, String>, LibvirtError> {
    let Some(base) = base else { return Ok(Err("the newest point does not say since when".to_owned())) };
    let known = |name: &str| base.properties.get(name).map(String::as_str);
    let Some(mark) = known(MARK) else { return Ok(Err("the newest point has no checkpoint".to_owned())) };
    if !mark.starts_with(CHECKPOINT) {
        return Ok(Err(format!("{mark:?} is no checkpoint of ours")));
    }
    let file = disk.file.as_deref().unwrap_or_default();
    let now = inode(file).map(|inode| inode.to_string());
    if known(TARGET) != Some(&disk.target) || known(FILE) != Some(file) || known(INODE) != now.as_deref() {
        return Ok(Err(format!("disk {} is another file than at the newest point", disk.target)));
    }
    let size = connection.block_info(domain, &disk.target)?.capacity;
    if base.size != size {
        return Ok(Err(format!("disk {} has {size} bytes, {} at the newest point", disk.target, base.size)));
    }
    let checkpoint = super::rpc::Checkpoint(mark.to_owned());
    let Some(text) = connection.checkpoint_definition(domain, &checkpoint)? else {
        return Ok(Err(format!("checkpoint {mark} is gone")));
    };
    if !definition::tracked_disks(&text).contains(&disk.target) {
        return Ok(Err(format!("checkpoint {mark} has no bitmap of disk {}", disk.target)));
    }
    Ok(Ok(mark.to_owned()))
}

/// The words for a backup job.
struct Request {
    job: JobId,
    socket: PathBuf,
    scratch: Vec<PathBuf>,
}

impl Request {
    fn new(machine: &MachineSpec, job: JobId, disks: &[Disk], settings: &Settings) -> Request {
        let folder = |disk: &Disk| {
            let file = Path::new(disk.file.as_deref().unwrap_or("/"));
            settings
                .scratch
                .clone()
                .or_else(|| file.parent().map(Path::to_owned))
                .unwrap_or_else(|| "/".into())
        };
        let own = format!("{}{job}", own_mark(machine));
        let scratch: Vec<PathBuf> = disks
            .iter()
            .enumerate()
            .map(|(number, disk)| folder(disk).join(&own).join(format!("{number}.qcow2")))
            .collect();
        let near = scratch.first().and_then(|file| file.parent()).map(|folder| folder.join("nbd.sock"));
        let socket = near
            .filter(|path| path.as_os_str().len() <= SOCKET_PATH)
            .unwrap_or_else(|| Path::new("/var/tmp").join(&own).join("nbd.sock"));
        Request { job, socket, scratch }
    }

    /// Makes the folders that QEMU writes to: its user's, whom the running machine's image belongs to, and nobody else's.
    fn make_folders(&self, disks: &[Disk]) -> Result<(), ProviderError> {
        let image = disks.first().and_then(|disk| disk.file.as_deref()).unwrap_or("/");
        let owner =
            std::fs::metadata(image).map_err(|error| ProviderError::source(image, "look at it", &error))?;
        for file in self.files() {
            let Some(folder) = file.parent() else { continue };
            let made = match std::fs::DirBuilder::new().mode(0o700).create(folder) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                made => made,
            };
            made.and_then(|()| std::os::unix::fs::chown(folder, Some(owner.uid()), Some(owner.gid())))
                .map_err(|error| {
                    ProviderError::source(
                        folder.display().to_string(),
                        "make a folder for scratch space",
                        &error,
                    )
                })?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files = self.scratch.clone();
        files.push(self.socket.clone());
        files
    }

    /// Which disks have a bitmap: QEMU keeps one in a qcow2 file, and in no other.
    fn is_tracked(disk: &Disk) -> bool {
        disk.format == "qcow2"
    }

    fn mark(&self) -> String {
        format!("{CHECKPOINT}{}", self.job)
    }

    fn backup(&self, all: &[Disk], disks: &[Disk], bases: &[Result<String, String>]) -> String {
        let text = definition::escaped;
        let mut out = format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>",
            text(&self.socket.display().to_string())
        );
        for ((disk, base), scratch) in disks.iter().zip(bases).zip(&self.scratch) {
            let mode = match base {
                Ok(base) => format!("backupmode='incremental' incremental='{}'", text(base)),
                Err(_) => "backupmode='full'".to_owned(),
            };
            out.push_str(&format!(
                "<disk name='{}' backup='yes' type='file' {mode}><scratch file='{}'/></disk>",
                text(&disk.target),
                text(&scratch.display().to_string())
            ));
        }
        for disk in all.iter().filter(|disk| !disks.iter().any(|chosen| chosen.target == disk.target)) {
            out.push_str(&format!("<disk name='{}' backup='no'/>", text(&disk.target)));
        }
        out.push_str("</disks></domainbackup>");
        out
    }

    /// Nothing where no disk can have a bitmap.
    fn checkpoint(&self, machine: &MachineSpec, all: &[Disk], disks: &[Disk]) -> Option<String> {
        let is_kept = |disk: &Disk| {
            Request::is_tracked(disk) && disks.iter().any(|chosen| chosen.target == disk.target)
        };
        if !all.iter().any(is_kept) {
            return None;
        }
        let mut out = format!(
            "<domaincheckpoint><name>{}</name><description>{}</description><disks>",
            self.mark(),
            definition::escaped(&description(machine))
        );
        for disk in all {
            let kind = if is_kept(disk) { "bitmap" } else { "no" };
            out.push_str(&format!(
                "<disk name='{}' checkpoint='{kind}'/>",
                definition::escaped(&disk.target)
            ));
        }
        out.push_str("</disks></domaincheckpoint>");
        Some(out)
    }
}

/// Whether the file systems stood still over the checkpoint, and the words for it.
struct Stillness {
    consistency: Consistency,
    evidence: String,
}

/// Begins the job, with the guest's file systems frozen if they can be.
fn begin(
    connection: &mut Connection,
    domain: &Domain,
    state: State,
    settings: &Settings,
    mut start: impl FnMut(&mut Connection) -> Result<(), LibvirtError>,
) -> Result<Stillness, LibvirtError> {
    let crash = |why: String| Stillness { consistency: Consistency::Crash, evidence: why };
    if state == State::Paused {
        start(connection)?;
        return Ok(crash("the machine was paused; nothing was written, nothing was flushed".to_owned()));
    }
    match connection.agent(domain, "{\"execute\":\"guest-fsfreeze-status\"}", 5) {
        Err(error) => {
            // A time limit that passed ends the conversation.
            if error.code().is_none() {
                *connection = connection.another()?;
            }
            start(connection)?;
            return Ok(crash(format!("no guest agent answers ({error}), so no file system was frozen")));
        }
        // Whoever froze it thaws it.
        Ok(status) if status.contains("frozen") => {
            start(connection)?;
            return Ok(crash("somebody else has the file systems frozen already".to_owned()));
        }
        Ok(_) => {}
    }
    let watch = Watch {
        socket: settings.socket.clone(),
        uuid: domain.uuid,
        limit: settings.freeze_limit,
        note: settings.notes.join(format!("frozen-{}", super::guard::hex(&domain.uuid))),
    };
    let noted = std::fs::create_dir_all(&settings.notes).and_then(|()| std::fs::write(&watch.note, b""));
    if let Err(error) = noted {
        start(connection)?;
        return Ok(crash(format!(
            "nothing was frozen, because no note of it could be left in {}: {error}",
            settings.notes.display()
        )));
    }
    let guard = match Guard::post(&watch, settings.program.as_deref()) {
        Ok(guard) => guard,
        Err(error) => {
            // Nothing is frozen, so nothing may say so.
            let _ = std::fs::remove_file(&watch.note);
            start(connection)?;
            return Ok(crash(format!("nothing was frozen: {error}")));
        }
    };
    let began = Instant::now();
    let frozen = connection.freeze(domain, settings.freeze_limit);
    let started = match &frozen {
        Ok(_) => start(connection),
        Err(_) => Ok(()),
    };
    // Thawed whatever happened: also a freeze that seemed to fail may have come about.
    let thawed = connection.thaw(domain, settings.freeze_limit);
    let held = began.elapsed();
    // A freeze without an answer may come about after a thaw; then thawing goes on until it cannot any more.
    let is_answered = match &frozen {
        Ok(_) => true,
        Err(error) => error.code().is_some(),
    };
    let is_thawed = (is_answered && thawed.is_ok()) || thaw(&watch, is_answered, || false);
    let in_time = if is_thawed {
        let _ = std::fs::remove_file(&watch.note);
        guard.dismiss()
    } else {
        drop(guard);
        false
    };
    if !is_thawed {
        return Err(LibvirtError::Lost(
            "file systems of the guest may still be frozen and could not be thawed: thaw them in the guest \
             (`fsfreeze -u`), or start it anew"
                .to_owned(),
        ));
    }
    if frozen.is_err() || thawed.is_err() {
        *connection = connection.another()?;
    }
    started?;
    let limit = settings.freeze_limit.as_secs_f32();
    Ok(match (frozen, thawed) {
        (Err(error), _) => {
            start(connection)?;
            crash(format!("the freeze of the file systems failed: {error}"))
        }
        (Ok(frozen), Ok(thawed)) if in_time && frozen > 0 && thawed >= frozen => Stillness {
            consistency: Consistency::File,
            evidence: format!(
                "the guest agent froze {frozen} file systems for {} ms; the checkpoint was made meanwhile",
                held.as_millis()
            ),
        },
        (Ok(frozen), Ok(thawed)) => crash(format!(
            "the freeze did not hold: {frozen} file systems were frozen, {thawed} of them still after {} ms (limit {limit} s)",
            held.as_millis()
        )),
        (Ok(_), Err(error)) => crash(format!("the freeze is not proved to have held: {error}")),
    })
}

/// A view of a running machine.
pub(super) fn freeze(
    Found { mut connection, domain, state }: Found,
    machine: &MachineSpec,
    exclude: &[String],
    request: &FreezeRequest,
    settings: &Settings,
    claim: Claim,
) -> Result<LibvirtView, ProviderError> {
    let told = |error: &LibvirtError| failed(&machine.name, error);
    let text = connection.definition(&domain, false).map_err(|error| told(&error))?;
    let all = definition::disks(&machine.name, &text)?;
    let disks = chosen(machine, exclude, &text)?;
    let words = Request::new(machine, request.job, &disks, settings);
    if let Some(job) = connection.backup(&domain).map_err(|error| told(&error))? {
        return Err(ProviderError::Locked {
            object: machine.name.clone(),
            reason: format!(
                "another backup job of it runs ({})",
                definition::files_of(&job).first().cloned().unwrap_or_default()
            ),
        });
    }
    for file in &words.scratch {
        let folder = around(file).display().to_string();
        let free = free(file)
            .map_err(|error| ProviderError::source(folder.clone(), "look at its free space", &error))?;
        if free < 2 * RESERVE {
            return Err(ProviderError::Unsupported {
                object: machine.name.clone(),
                reason: format!(
                    "{folder} has {free} bytes free; a backup of a running machine begins with {} at least, because it keeps \
                     there what the machine overwrites meanwhile",
                    2 * RESERVE
                ),
            });
        }
    }
    let mut bases = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let since = request.since.get(number).and_then(Option::as_ref);
        bases.push(base_of(&mut connection, &domain, disk, since).map_err(|error| told(&error))?);
    }
    let checkpoint = words.checkpoint(machine, &all, &disks);
    if let Err(error) = words.make_folders(&disks) {
        remove(&words.files());
        return Err(error);
    }
    let mut untracked: Option<String> = None;
    let still = begin(&mut connection, &domain, state, settings, |connection| {
        let backup = words.backup(&all, &disks, &bases);
        match connection.backup_begin(&domain, &backup, checkpoint.as_deref(), BEGIN) {
            Err(LibvirtError::Refused { message, .. }) if bases.iter().any(Result::is_ok) => {
                // A base that libvirt or QEMU does not take is no reason for no point: everything is compared.
                for base in &mut bases {
                    if let Ok(mark) = base {
                        *base = Err(format!("checkpoint {mark} cannot be used: {message}"));
                    }
                }
                let backup = words.backup(&all, &disks, &bases);
                connection.backup_begin(&domain, &backup, checkpoint.as_deref(), BEGIN)
            }
            other => other,
        }
        .or_else(|error| {
            let LibvirtError::Refused { message, .. } = &error else { return Err(error) };
            if checkpoint.is_none() {
                return Err(error);
            }
            // A point without a checkpoint is better than none: the next one is compared in full.
            untracked = Some(message.clone());
            let backup = words.backup(&all, &disks, &bases);
            connection.backup_begin(&domain, &backup, None, BEGIN)
        })
    });
    let mut still = match still {
        Ok(still) => still,
        Err(error) => {
            // Begun or not: what carries our mark is taken away.
            let job = Running {
                connection: Mutex::new(connection),
                domain,
                files: words.files(),
                watch: None,
                _claim: claim,
            };
            drop(job);
            return Err(told(&error));
        }
    };
    let watch = connection
        .another()
        .map(|another| Reserve::watch(another, domain.clone(), words.scratch.clone()))
        .map_err(|error| told(&error));
    let (watch, unwatched) = match watch {
        Ok(watch) => (Some(watch), None),
        Err(error) => (None, Some(error)),
    };
    let job =
        Running { connection: Mutex::new(connection), domain, files: words.files(), watch, _claim: claim };
    if let Some(error) = unwatched {
        return Err(error);
    }

    let mut frozen = Vec::new();
    for (disk, base) in disks.iter().zip(&bases) {
        let bitmap = format!("backup-{}", disk.target);
        let options = Options {
            export: disk.target.clone(),
            bitmaps: if base.is_ok() { vec![bitmap.clone()] } else { Vec::new() },
            connections: 2,
            ..Options::default()
        };
        let object = format!("{} disk {}", machine.name, disk.target);
        let unread = |error: nbd::NbdError| ProviderError::Read {
            object: object.clone(),
            reason: format!("QEMU's NBD server: {error}"),
        };
        let export = Export::connect(&Address::Unix(words.socket.clone()), &options).map_err(unread)?;
        let changed = match base {
            Err(because) => Changed::Unknown { because: because.clone() },
            Ok(mark) => match export.dirty(&bitmap) {
                Ok(ranges) => Changed::Listed {
                    ranges,
                    because: format!("QEMU's dirty blocks of disk {} since checkpoint {mark}", disk.target),
                },
                Err(error) => {
                    Changed::Unknown { because: format!("checkpoint {mark} cannot be read: {error}") }
                }
            },
        };
        let mark = (Request::is_tracked(disk) && untracked.is_none()).then(|| words.mark());
        let size = block_io::BlockDevice::size(&export);
        let description = describe(disk, size, mark.as_deref());
        frozen.push(FrozenDisk { description, device: Arc::new(export), changed });
    }
    let description = MachineDescription {
        id: machine.id,
        name: job.domain.name.clone(),
        provider: "libvirt".to_owned(),
        disks: frozen.iter().map(|disk| disk.description.clone()).collect(),
    };
    match &untracked {
        None => forget_others(&job, machine, &words.mark(), &bases),
        Some(message) => {
            still
                .evidence
                .push_str(&format!("; no checkpoint could be made, so changes are not tracked: {message}"));
        }
    }
    Ok(LibvirtView {
        description,
        consistency: still.consistency,
        method: FreezeMethod::Checkpoint { evidence: still.evidence },
        disks: frozen,
        job,
    })
}

/// What says whose a checkpoint is.
fn description(machine: &MachineSpec) -> String {
    match &machine.source {
        Source::Libvirt(source) => format!("{DESCRIPTION}{} {}", source.owner, machine.id),
        Source::Images(_) => format!("{DESCRIPTION}{}", machine.id),
    }
}

/// Removes our checkpoints of this machine but the one just made and the bases. libvirt folds what they tracked into the
/// one before.
fn forget_others(job: &Running, machine: &MachineSpec, mark: &str, bases: &[Result<String, String>]) {
    let mut connection = job.connection.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(checkpoints) = connection.checkpoints(&job.domain) else { return };
    // A run that reads everything is not told which one the newest point needs, and may yet fail.
    let ours = checkpoints.iter().filter(|checkpoint| checkpoint.0.starts_with(CHECKPOINT)).count();
    if bases.iter().all(Result::is_err) && ours <= MOST_KEPT {
        return;
    }
    for checkpoint in checkpoints {
        let name = checkpoint.0.as_str();
        let is_needed = name == mark || bases.iter().any(|base| base.as_deref() == Ok(name));
        if is_needed || !name.starts_with(CHECKPOINT) {
            continue;
        }
        let Ok(Some(text)) = connection.checkpoint_definition(&job.domain, &checkpoint) else { continue };
        if definition::text(&text, &["description"]) == Some(description(machine)) {
            // One that cannot be removed now is tried again by the next run.
            let _ = connection.delete_checkpoint(&job.domain, &checkpoint, false);
        }
    }
}

/// The view of a stopped machine: its image files, under the names that its running self has.
pub(super) struct Stopped {
    inner: Box<dyn FrozenView>,
    description: MachineDescription,
    disks: Vec<FrozenDisk>,
}

impl Stopped {
    pub(super) fn new(inner: Box<dyn FrozenView>, disks: &[Disk], name: &str) -> Stopped {
        let mut frozen = Vec::new();
        for (found, disk) in inner.disks().iter().zip(disks) {
            let mut description = describe(disk, found.description.size, None);
            description.sector = found.description.sector;
            description.chain = found.description.chain;
            for (name, value) in &found.description.properties {
                description.properties.entry(name.clone()).or_insert_with(|| value.clone());
            }
            // No checkpoint is carried on from an older point: an image of then that was put back while the machine is off
            // has that bitmap too, and it knows nothing of what was written in between.
            frozen.push(FrozenDisk {
                description,
                device: found.device.clone(),
                changed: Changed::Unknown { because: "the machine is off: its images were read".to_owned() },
            });
        }
        let description = MachineDescription {
            id: inner.description().id,
            name: name.to_owned(),
            provider: "libvirt".to_owned(),
            disks: frozen.iter().map(|disk| disk.description.clone()).collect(),
        };
        Stopped { inner, description, disks: frozen }
    }
}

impl FrozenView for Stopped {
    fn description(&self) -> &MachineDescription {
        &self.description
    }

    fn consistency(&self) -> Consistency {
        self.inner.consistency()
    }

    fn method(&self) -> &FreezeMethod {
        self.inner.method()
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn verify_unchanged(&self) -> Result<(), ProviderError> {
        self.inner.verify_unchanged()
    }
}

//! The view of a running machine: a backup job of libvirt, read over NBD.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::{Consistency, DatasourceId, JobId};
use nbd::{Address, Export, Options};

use super::claim::Claim;
use super::definition::{self, Disk};
use super::guard::{Guard, Watch, thaw};
use super::rpc::{Connection, Domain, LibvirtError, State};
use super::{CHECKPOINT, DESCRIPTION, Settings, failed, scratch};
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

/// A running backup job; dropping it ends the job, and with it export, socket and scratch files.
struct Running {
    connection: Mutex<Connection>,
    domain: Domain,
    files: Vec<PathBuf>,
    watch: Option<scratch::Reserve>,
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
            scratch::remove(&self.files);
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
    mut disks: Vec<Disk>,
) -> Result<Vec<Disk>, ProviderError> {
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
    if !Request::is_tracked(disk) {
        return Ok(Err(format!("QEMU keeps no list of changes in a {} image", disk.format)));
    }
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
        let own = format!("{}{job}", scratch::own_mark(machine));
        let scratch: Vec<PathBuf> = disks
            .iter()
            .enumerate()
            .map(|(number, disk)| folder(disk).join(&own).join(format!("{number}{}", scratch::SCRATCH)))
            .collect();
        let near = scratch.first().and_then(|file| file.parent()).map(|folder| folder.join(scratch::SOCKET));
        let socket = near
            .filter(|path| path.as_os_str().len() <= scratch::SOCKET_PATH)
            .unwrap_or_else(|| Path::new("/var/tmp").join(&own).join(scratch::SOCKET));
        Request { job, socket, scratch }
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
        machine: DatasourceId(domain.uuid),
        limit: settings.freeze_limit,
        note: settings.frozen_note(DatasourceId(domain.uuid)),
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
    let disks = chosen(machine, exclude, all.clone())?;
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
    scratch::check_room(&machine.name, &words.scratch)?;
    let mut bases = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let since = request.since.get(number).and_then(Option::as_ref);
        bases.push(base_of(&mut connection, &domain, disk, since).map_err(|error| told(&error))?);
    }
    let checkpoint = words.checkpoint(machine, &all, &disks);
    if let Err(error) = scratch::make_folders(
        &words.files(),
        disks.first().and_then(|disk| disk.file.as_deref()).unwrap_or("/"),
    ) {
        scratch::remove(&words.files());
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
    // From here on, begun or not, what carries our mark goes with the job.
    let mut job = Running {
        connection: Mutex::new(connection),
        domain,
        files: words.files(),
        watch: None,
        _claim: claim,
    };
    let mut still = still.map_err(|error| told(&error))?;
    let another = job.connection.lock().unwrap_or_else(PoisonError::into_inner).another();
    let another = another.map_err(|error| told(&error))?;
    job.watch = Some(scratch::Reserve::watch(another, job.domain.clone(), words.scratch.clone()));

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

/// Removes our checkpoints of this machine but the one just made and the bases. The bitmap of each goes on from its own moment,
/// so none loses anything by it.
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
            let _ = connection.delete_checkpoint(&job.domain, &checkpoint);
        }
    }
}

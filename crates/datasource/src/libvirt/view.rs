//! The view of a running machine: a backup job of libvirt, read over NBD.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::Consistency;
use nbd::{Address, Export, Options};

use super::base::{adopt, base_of, inode};
use super::claim::Claim;
use super::configuration::Configuration;
use super::definition::{self, Disk};
use super::monitor::{self, Node};
use super::properties::{FILE, INODE, KEPT, MARK, TARGET};
use super::request::{self, Base, Request, keeps_bitmaps};
use super::rpc::{Connection, Domain, LibvirtError, State};
use super::still::{Begun, Moment};
use super::volumes::{Place, Volumes};
use super::{CHECKPOINT, Settings, failed, keeps_swap, scratch, swap};
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

/// A view that QEMU keeps.
pub struct LibvirtView {
    description: MachineDescription,
    consistency: Consistency,
    method: FreezeMethod,
    disks: Vec<FrozenDisk>,
    configuration: String,
    job: Running,
    /// Why it is no view any more: what came back after a failure may be another job.
    broken: Mutex<Option<String>>,
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
    /// Bitmaps that were copied for reading, each with its node.
    copies: Vec<(Node, String)>,
    watch: Option<scratch::Reserve>,
    _place: Place,
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

    /// Removes the bitmaps and the checkpoint of an attempt without a view.
    fn forget_marks(&self, nodes: &[&Node], bitmap: &str, checkpoint: Option<String>) {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(true) = scratch::is_ours(&mut connection, &self.domain, &self.files) {
            let _ = end(&mut connection, &self.domain);
        }
        for node in nodes {
            let _ = monitor::remove(&mut connection, &self.domain, node, bitmap);
        }
        if let Some(name) = checkpoint {
            let _ = connection.delete_checkpoint(&self.domain, &super::rpc::Checkpoint(name), false);
        }
    }

    /// Whether the machine's backup job is there, and is ours.
    fn is_alive(&self) -> Result<bool, LibvirtError> {
        Ok(self.ask()?.is_some_and(|job| scratch::writes_to(&job, &self.files)))
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
            let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
            for (node, copy) in &self.copies {
                let _ = remove_bitmap(&mut connection, &self.domain, node, copy);
            }
        }
    }
}

/// Removes a bitmap; the export that showed it goes a moment after its job.
fn remove_bitmap(
    connection: &mut Connection,
    domain: &Domain,
    node: &Node,
    name: &str,
) -> Result<(), LibvirtError> {
    for _ in 0..20 {
        if monitor::remove(connection, domain, node, name)?.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
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

    fn configuration(&self) -> &str {
        &self.configuration
    }

    fn verify_unchanged(&self) -> Result<(), ProviderError> {
        let object = self.description.name.clone();
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if broken.is_none() {
            *broken = match self.job.is_alive() {
                Ok(true) => return Ok(()),
                Ok(false) => Some(
                    "its backup job ended by itself: scratch space ran full, the machine stopped or moved, or somebody ended it"
                        .to_owned(),
                ),
                Err(error) => Some(format!("whether its backup job goes on is not known: {error}")),
            };
        }
        Err(ProviderError::Changed { object, reason: broken.clone().unwrap_or_default() })
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

/// Begins the names of bitmaps in QEMU's memory that are this pool's and this machine's. They have no description.
fn own_bitmaps(machine: &MachineSpec) -> String {
    let owner = match &machine.source {
        Source::Libvirt(source) => source.owner.get(..8).unwrap_or_default(),
        Source::Images(_) => "",
    };
    format!("{CHECKPOINT}{owner}-{}-", machine.id.to_string().get(..8).unwrap_or_default())
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

/// Disks of a running machine whose changes QEMU can list from its memory: by their place, their nodes, or why there is none.
struct Memory {
    nodes: Vec<Result<Node, String>>,
}

impl Memory {
    fn look(
        connection: &mut Connection,
        domain: &Domain,
        disks: &[Disk],
        settings: &Settings,
    ) -> Result<Memory, LibvirtError> {
        let all = |why: &str| Memory { nodes: disks.iter().map(|_| Err(why.to_owned())).collect() };
        // QEMU's monitor is left alone where nothing needs it: a command taints the machine.
        if disks.iter().all(keeps_bitmaps) {
            return Ok(all("its format keeps them"));
        }
        if !settings.monitor {
            return Ok(all("STILLPOINT_LIBVIRT_MONITOR=off"));
        }
        let nodes = match monitor::nodes(connection, domain) {
            Ok(Ok(nodes)) => nodes,
            Ok(Err(why)) => return Ok(all(&why)),
            Err(error) if error.code().is_some() => return Ok(all(&error.to_string())),
            Err(error) => return Err(error),
        };
        let found = disks.iter().map(|disk| {
            let alias = disk.alias.as_deref().unwrap_or_default();
            let node = nodes.iter().find(|node| node.is_of(alias));
            match node {
                None => Err(format!("QEMU names no device {alias:?}")),
                Some(node) if !node.is_image(&disk.format) => {
                    Err("something lies between the device and its image".to_owned())
                }
                Some(node) => Ok(node.clone()),
            }
        });
        Ok(Memory { nodes: found.collect() })
    }

    fn node(&self, number: usize) -> Result<&Node, &str> {
        match self.nodes.get(number) {
            Some(Ok(node)) => Ok(node),
            Some(Err(why)) => Err(why),
            None => Err("the disk is not known"),
        }
    }
}

/// Whether a live migration of the machine runs, here or to here.
fn is_migrating(connection: &mut Connection, domain: &Domain) -> Result<bool, LibvirtError> {
    // VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN is 4, .._OUT 5.
    match connection.operation(domain) {
        Ok(operation) => Ok(matches!(operation, 4 | 5)),
        // Only where it arrives.
        Err(error) if error.code() == Some(LibvirtError::UNSUPPORTED) => Ok(true),
        Err(error) if error.code().is_some() => Ok(false),
        Err(error) => Err(error),
    }
}

fn migrating(machine: &MachineSpec) -> ProviderError {
    ProviderError::Migrating {
        object: machine.name.clone(),
        reason: "a live migration of it runs, so no checkpoint can be made".to_owned(),
    }
}

/// A view of a running machine.
pub(super) fn freeze(
    Found { mut connection, domain, state }: Found,
    machine: &MachineSpec,
    exclude: &[String],
    request: &FreezeRequest,
    (settings, volumes): (&Settings, &Volumes),
    claim: Claim,
) -> Result<LibvirtView, ProviderError> {
    let told = |error: LibvirtError| match error.code() {
        // Another job had it for 30 s. Ours would have been seen before.
        Some(LibvirtError::BUSY) => migrating(machine),
        _ => failed(&machine.name, &error),
    };
    if is_migrating(&mut connection, &domain).map_err(told)? {
        return Err(migrating(machine));
    }
    let text = connection.definition(&domain, false).map_err(told)?;
    let all = definition::disks(&machine.name, &text)?;
    let disks = chosen(machine, exclude, all.clone())?;
    let words = Request::new(machine, request.job, &disks, settings);
    if let Some(job) = connection.backup(&domain).map_err(told)? {
        return Err(ProviderError::Locked {
            object: machine.name.clone(),
            reason: format!(
                "another backup job of it runs ({})",
                definition::files_of(&job).first().cloned().unwrap_or_default()
            ),
        });
    }
    let folders: Vec<PathBuf> = words.scratch.iter().map(|file| scratch::around(file).to_owned()).collect();
    let place = volumes.enter(&machine.name, request.job, &folders, request.scratch_bytes)?;
    // It may have waited, and somebody may have changed the machine meanwhile.
    let text = connection.definition(&domain, false).map_err(told)?;
    if connection.state(&domain).map_err(told)? != state || definition::disks(&machine.name, &text)? != all {
        return Err(ProviderError::Changed {
            object: machine.name.clone(),
            reason: "its power or its disks were changed while the backup waited for room on the host"
                .to_owned(),
        });
    }
    let memory = Memory::look(&mut connection, &domain, &disks, settings).map_err(told)?;
    adopt(&mut connection, &domain, machine, &disks, &request.since).map_err(told)?;
    let (mut bases, mut sizes) = (Vec::new(), Vec::new());
    for (number, disk) in disks.iter().enumerate() {
        let since = request.since.get(number).and_then(Option::as_ref);
        let node = memory.node(number);
        bases.push(base_of(&mut connection, &domain, disk, node, since).map_err(told)?);
        sizes.push(match node {
            Ok(node) => node.size,
            Err(_) => connection.block_info(&domain, &disk.target).map_err(told)?.capacity,
        });
    }
    let checkpoint = words.checkpoint(machine, &all, &disks);
    let image = disks.first().and_then(|disk| disk.file.as_deref()).unwrap_or("/");
    let made = scratch::make_folders(&words.files(), image)
        .and_then(|()| scratch::make_files(words.scratch.iter().zip(&sizes), image));
    if let Err(error) = made {
        scratch::remove(&words.files());
        return Err(error);
    }
    // Before the view, so that it has every change since: what was written in between is in the view and listed once more.
    let own = own_bitmaps(machine);
    let new = format!("{own}{}", request.job);
    let in_memory: Vec<&Node> = memory.nodes.iter().flatten().collect();
    let mut unlisted = match in_memory.is_empty() {
        true => None,
        false => monitor::add(&mut connection, &domain, &in_memory, &new).map_err(told)?.err(),
    };
    let mut untracked: Option<String> = None;
    let mut moment = Moment { connection, domain: &domain, settings };
    let begun = moment.begin(state, request, |connection| {
        let backup = words.backup(&all, &disks, &bases);
        match connection.backup_begin(&domain, &backup, checkpoint.as_deref(), BEGIN) {
            Err(LibvirtError::Refused { message, .. })
                if bases.iter().any(|base| matches!(base, Base::Checkpoint(_))) =>
            {
                // A base that libvirt or QEMU does not take is no reason for no point: everything is compared.
                for base in &mut bases {
                    if let Base::Checkpoint(mark) = base {
                        *base = Base::None(format!("checkpoint {mark} cannot be used: {message}"));
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
    let connection = moment.connection;
    // From here on, begun or not, what carries our mark goes with the job.
    let mut job = Running {
        connection: Mutex::new(connection),
        domain,
        files: words.files(),
        copies: Vec::new(),
        watch: None,
        _place: place,
        _claim: claim,
    };
    let ended = match begun {
        Ok(Begun::Still(still)) => Ok(still),
        Ok(Begun::NotFrozen(reason)) => {
            Err(ProviderError::NotFrozen { object: machine.name.clone(), reason })
        }
        Err(error) => Err(told(error)),
    };
    let mut still = match ended {
        Ok(still) => still,
        Err(error) => {
            // Without a view its marks serve nothing, and the next attempt has the same names.
            job.forget_marks(&in_memory, &new, checkpoint.as_ref().map(|_| words.mark()));
            return Err(error);
        }
    };
    let after = job.connection.lock().unwrap_or_else(PoisonError::into_inner).definition(&job.domain, false);
    let after = definition::disks(&machine.name, &after.map_err(told)?)?;
    for (disk, base) in disks.iter().zip(&mut bases) {
        let is_same = after.iter().any(|now| now.target == disk.target && now.file == disk.file);
        if matches!(base, Base::Memory(_)) && !is_same {
            *base = Base::None(format!("disk {} was moved to another file while the job began", disk.target));
        }
    }
    let another = job.connection.lock().unwrap_or_else(PoisonError::into_inner).another();
    let another = another.map_err(told)?;
    job.watch = Some(scratch::Reserve::watch(another, job.domain.clone(), words.scratch.clone()));

    let (mut frozen, mut swapped) = (Vec::new(), 0);
    for (number, (disk, base)) in disks.iter().zip(&mut bases).enumerate() {
        let shown = show(&mut job, disk, base, memory.node(number), &own, &words)?;
        let options = Options {
            export: shown.export,
            bitmaps: shown.bitmap.clone().into_iter().collect(),
            sector_size: disk.sector.unwrap_or(512),
            connections: 2,
            ..Options::default()
        };
        let object = format!("{} disk {}", machine.name, disk.target);
        let unread = |error: nbd::NbdError| ProviderError::Read {
            object: object.clone(),
            reason: format!("QEMU's NBD server: {error}"),
        };
        let export = Export::connect(&Address::Unix(words.socket.clone()), &options).map_err(unread)?;
        let changed = match (&*base, &shown.bitmap) {
            (Base::None(because), _) => Changed::Unknown { because: because.clone() },
            (Base::Checkpoint(mark) | Base::Memory(mark), Some(bitmap)) => match export.dirty(bitmap) {
                Ok(ranges) => Changed::Listed {
                    ranges,
                    because: match base {
                        Base::Memory(_) => format!(
                            "QEMU's dirty blocks of disk {} in memory since bitmap {mark} (by its monitor, which taints the \
                             machine)",
                            disk.target
                        ),
                        _ => format!("QEMU's dirty blocks of disk {} since checkpoint {mark}", disk.target),
                    },
                },
                Err(error) => {
                    Changed::Unknown { because: format!("checkpoint {mark} cannot be read: {error}") }
                }
            },
            (Base::Checkpoint(mark) | Base::Memory(mark), None) => {
                Changed::Unknown { because: format!("checkpoint {mark} is not shown") }
            }
        };
        let mark = match (keeps_bitmaps(disk), memory.node(number)) {
            (true, _) => untracked.is_none().then(|| words.mark()),
            (false, Ok(_)) => unlisted.is_none().then(|| new.clone()),
            (false, Err(_)) => None,
        };
        let size = block_io::BlockDevice::size(&export);
        let mut description = describe(disk, size, mark.as_deref());
        if let Some(kept) = base.mark() {
            description.properties.insert(KEPT.to_owned(), kept.to_owned());
        }
        let mut disk = FrozenDisk { description, device: Arc::new(export), changed };
        let since = request.since.get(number).and_then(Option::as_ref);
        swapped += swap::leave_out(&mut disk, since, keeps_swap(machine));
        frozen.push(disk);
    }
    if swapped > 0 {
        still.evidence.push_str(&format!("; {swapped} bytes of swap partitions were left out"));
    }
    let description = MachineDescription {
        id: machine.id,
        name: job.domain.name.clone(),
        provider: "libvirt".to_owned(),
        disks: frozen.iter().map(|disk| disk.description.clone()).collect(),
    };
    if let Some(message) = untracked.take() {
        still
            .evidence
            .push_str(&format!("; no checkpoint could be made, so changes are not tracked: {message}"));
    } else {
        forget_checkpoints(&job, machine, &words.mark(), &bases);
    }
    if let Some(why) = unlisted.take() {
        still.evidence.push_str(&format!(
            "; no bitmap could be made in QEMU's memory, so changes are not tracked: {why}"
        ));
    }
    forget_bitmaps(&job, &memory, &own, &new, &bases);
    let configuration = {
        let mut connection = job.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = Configuration::capture(&mut connection, &job.domain, &disks, &settings.tpm);
        let (configuration, missing) = kept.map_err(told)?;
        for missing in missing {
            still.evidence.push_str(&format!("; not kept with the point: {missing}"));
        }
        configuration.encode()?
    };
    Ok(LibvirtView {
        configuration,
        description,
        consistency: still.consistency,
        method: FreezeMethod::Checkpoint { evidence: still.evidence },
        disks: frozen,
        job,
        broken: Mutex::new(None),
    })
}

/// Where a disk's view and its list are read.
struct Shown {
    export: String,
    bitmap: Option<String>,
}

/// Lets QEMU show a disk's list beside its view. Where that fails the base is none.
fn show(
    job: &mut Running,
    disk: &Disk,
    base: &mut Base,
    node: Result<&Node, &str>,
    own: &str,
    words: &Request,
) -> Result<Shown, ProviderError> {
    let plain = |bitmap| Shown { export: disk.target.clone(), bitmap };
    let (mark, node) = match (&*base, node) {
        (Base::None(_), _) => return Ok(plain(None)),
        (Base::Checkpoint(_), _) => return Ok(plain(Some(format!("backup-{}", disk.target)))),
        (Base::Memory(mark), Ok(node)) => (mark.clone(), node),
        (Base::Memory(_), Err(why)) => {
            *base = Base::None(why.to_owned());
            return Ok(plain(None));
        }
    };
    let told = |error: LibvirtError| failed(&job.domain.name, &error);
    let copy = format!("{own}read-{}", words.job);
    let export = format!("{own}{}", disk.target);
    let shown = {
        let mut connection = job.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let text = connection.backup(&job.domain).map_err(told)?.unwrap_or_default();
        match definition::view_index(&text, &disk.target) {
            None => Err("libvirt does not tell the view's node".to_owned()),
            Some(index) => {
                let view = format!("libvirt-{index}-format");
                monitor::export(&mut connection, &job.domain, node, &mark, &copy, &view, &export)
                    .map_err(told)?
            }
        }
    };
    job.copies.push((node.clone(), copy.clone()));
    Ok(match shown {
        Ok(()) => Shown { export, bitmap: Some(copy) },
        Err(why) => {
            *base = Base::None(format!("bitmap {mark} cannot be used: {why}"));
            plain(None)
        }
    })
}

/// Removes our checkpoints of this machine but the one just made and the bases. The bitmap of each goes on from its own moment,
/// so none loses anything by it.
fn forget_checkpoints(job: &Running, machine: &MachineSpec, mark: &str, bases: &[Base]) {
    let mut connection = job.connection.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(checkpoints) = connection.checkpoints(&job.domain) else { return };
    // A run that reads everything is not told which one the newest point needs, and may yet fail.
    let ours = checkpoints.iter().filter(|checkpoint| checkpoint.0.starts_with(CHECKPOINT)).count();
    if bases.iter().all(|base| base.mark().is_none()) && ours <= MOST_KEPT {
        return;
    }
    for checkpoint in checkpoints {
        let name = checkpoint.0.as_str();
        let is_needed = name == mark || bases.iter().any(|base| base.mark() == Some(name));
        if is_needed || !name.starts_with(CHECKPOINT) {
            continue;
        }
        let Ok(Some(text)) = connection.checkpoint_definition(&job.domain, &checkpoint) else { continue };
        if definition::text(&text, &["description"]) != Some(request::description(machine)) {
            continue;
        }
        // One that cannot be removed now is tried again by the next run.
        if connection.delete_checkpoint(&job.domain, &checkpoint, false).is_err() {
            forget_lost(&mut connection, &job.domain, machine, &checkpoint, &text);
        }
    }
}

/// Removes what is left of a checkpoint whose bitmap is gone: libvirt's note of it.
fn forget_lost(
    connection: &mut Connection,
    domain: &Domain,
    machine: &MachineSpec,
    checkpoint: &super::rpc::Checkpoint,
    text: &str,
) {
    let targets = definition::tracked_disks(text);
    let named = targets.iter().map(|target| (target.as_str(), true));
    let again = request::checkpoint(machine, &checkpoint.0, named, true);
    // libvirt itself says that a bitmap is missing or broken; while one is there its note must stay, or nobody removes it.
    if let Err(error) = connection.redefine_checkpoint(domain, &again)
        && error.code() == Some(LibvirtError::INCONSISTENT)
    {
        let _ = connection.delete_checkpoint(domain, checkpoint, true);
    }
}

/// The same for bitmaps in QEMU's memory.
fn forget_bitmaps(job: &Running, memory: &Memory, own: &str, new: &str, bases: &[Base]) {
    let mut connection = job.connection.lock().unwrap_or_else(PoisonError::into_inner);
    for (node, base) in memory.nodes.iter().zip(bases) {
        let Ok(node) = node else { continue };
        let known = node.bitmaps(own);
        if base.mark().is_none() && known.len() <= MOST_KEPT {
            continue;
        }
        for name in known {
            if name != new && base.mark() != Some(&name) {
                let _ = monitor::remove(&mut connection, &job.domain, node, &name);
            }
        }
    }
}

/// Removes bitmaps of a killed run that were copied for reading only. No job may run.
pub(super) fn sweep_copies(
    connection: &mut Connection,
    domain: &Domain,
    machine: &MachineSpec,
    disks: &[Disk],
    settings: &Settings,
) -> Result<bool, LibvirtError> {
    let memory = Memory::look(connection, domain, disks, settings)?;
    let copies = format!("{}read-", own_bitmaps(machine));
    let mut any = false;
    for node in memory.nodes.iter().flatten() {
        for name in node.bitmaps(&copies) {
            remove_bitmap(connection, domain, node, &name)?;
            any = true;
        }
    }
    Ok(any)
}

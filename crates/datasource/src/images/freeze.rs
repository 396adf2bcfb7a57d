//! Making a view of all disks at one moment. The ways are told in the parent module.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use block_io::{BlockDevice, FileDevice};
use model::{Consistency, DatasourceId, JobId};

use super::formats;
use super::parents::{Chain, Opener};
#[cfg(unix)]
use super::scratch;
use super::sys::{self, OpenSource, Stamp};
use crate::{
    Changed, DiskDescription, FreezeMethod, FrozenDisk, FrozenView, ImageSource, ImagesSource,
    MachineDescription, MachineSpec, ProviderError, Source,
};

/// How often a view is tried while the files change under it.
const ATTEMPTS: u32 = 5;

/// A file written to this short a time ago may be written to again without its time stamp changing: stamps are as
/// coarse as a tick, 10 ms at most on Linux, up to 2 s are never seen on file systems that hold images.
const TICKS: Duration = Duration::from_millis(25);

/// A view of a machine of image files.
pub struct ImagesView {
    description: MachineDescription,
    consistency: Consistency,
    method: FreezeMethod,
    disks: Vec<FrozenDisk>,
    /// In place: the files with their stamps at the beginning. They stay open, and so locked.
    watched: Vec<(OpenSource, Stamp)>,
    /// The first change that was seen.
    changed: Mutex<Option<(String, String)>>,
}

impl ImagesView {
    /// In place: the files of the view with their stamps at the beginning.
    pub(super) fn watched(&self) -> impl Iterator<Item = (&Path, &Stamp)> {
        self.watched.iter().map(|(source, stamp)| (source.path.as_path(), stamp))
    }

    /// In place: who may write to the files now, for a person.
    pub(super) fn writer(&self) -> Result<Option<String>, ProviderError> {
        writer_of(&self.watched.iter().map(|(source, _)| source).collect::<Vec<_>>())
    }
}

impl FrozenView for ImagesView {
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
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        for (source, before) in &self.watched {
            if changed.is_some() {
                break;
            }
            let object = source.path.display().to_string();
            let difference = match sys::stamp_at(&source.path) {
                Ok(now) => before.difference(&now),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Some("it is gone".to_owned()),
                Err(error) => return Err(ProviderError::source(object, "look at it again", &error)),
            };
            if let Some(reason) = difference {
                *changed = Some((object, reason));
            }
        }
        match &*changed {
            None => Ok(()),
            Some((object, reason)) => {
                Err(ProviderError::Changed { object: object.clone(), reason: reason.clone() })
            }
        }
    }
}

/// Opens a source file: an ordinary file, under its true name.
fn open_source(path: &Path) -> Result<OpenSource, ProviderError> {
    let shown = || path.display().to_string();
    let failed = |error: &io::Error| match error.kind() {
        io::ErrorKind::ResourceBusy => ProviderError::Locked {
            object: shown(),
            reason: "another program has it open for writing".to_owned(),
        },
        _ => ProviderError::source(shown(), "open it", error),
    };
    // Asked before opening, for opening a pipe waits for its other end.
    let kind = std::fs::metadata(path).map_err(|error| failed(&error))?;
    if !kind.is_file() {
        return Err(ProviderError::Unsupported {
            object: shown(),
            reason: "is not an ordinary file: only of files it can be proved that nobody writes to them"
                .to_owned(),
        });
    }
    let file = sys::open(path).map_err(|error| failed(&error))?;
    Ok(OpenSource { path: path.to_owned(), file })
}

fn device(source: &OpenSource) -> Result<Arc<dyn BlockDevice>, ProviderError> {
    let failed =
        |error: io::Error| ProviderError::source(source.path.display().to_string(), "open it", &error);
    let file = source.file.try_clone().map_err(failed)?;
    Ok(Arc::new(FileDevice::from_file(file, &source.path, false).map_err(failed)?.sparing_cache()))
}

/// Copies a file without copying its bytes. `Err` tells why that cannot be done here.
#[cfg(unix)]
fn reflink(source: &OpenSource, job: JobId, number: u32) -> Result<Arc<dyn BlockDevice>, String> {
    let folder = source.path.parent().unwrap_or(Path::new("/"));
    let copy = scratch::create(folder, job, number)
        .map_err(|error| format!("no temporary file can be made in {}: {error}", folder.display()))?;
    sys::clone_into(&copy, &source.file).map_err(|error| {
        format!("the file system of {} makes no reflinks: {error}", source.path.display())
    })?;
    let copy = FileDevice::from_file(copy, &source.path, false).map_err(|error| error.to_string())?;
    Ok(Arc::new(copy.sparing_cache()))
}

#[cfg(not(unix))]
fn reflink(_source: &OpenSource, _job: JobId, _number: u32) -> Result<Arc<dyn BlockDevice>, String> {
    Err("this system makes no reflinks".to_owned())
}

/// Finds out which files the chains have, reading them in place or, so that a running machine does not disturb, in
/// clones.
struct Finding {
    /// The job of the clones; `None` to read in place.
    clones: Option<JobId>,
    /// Whether any file was read in place.
    in_place: AtomicBool,
    found: Mutex<BTreeMap<PathBuf, OpenSource>>,
}

impl Opener for Finding {
    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>, ProviderError> {
        let source = open_source(path)?;
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let number = found.len() as u32;
        let clone = self.clones.and_then(|job| reflink(&source, job, number).ok());
        self.in_place.fetch_or(clone.is_none(), Ordering::Relaxed);
        let device = clone.map_or_else(|| device(&source), Ok)?;
        found.entry(path.to_owned()).or_insert(source);
        Ok(device)
    }
}

/// Gives files that were prepared, and no others.
struct Prepared {
    devices: BTreeMap<PathBuf, Arc<dyn BlockDevice>>,
}

impl Opener for Prepared {
    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>, ProviderError> {
        self.devices.get(path).cloned().ok_or_else(|| ProviderError::Changed {
            object: path.display().to_string(),
            reason: "it became part of the chain of images only now".to_owned(),
        })
    }
}

/// The images' true names.
fn true_paths(images: &ImagesSource, machine: &MachineSpec) -> Result<Vec<PathBuf>, ProviderError> {
    if images.disks.is_empty() {
        return Err(ProviderError::Unsupported {
            object: machine.name.clone(),
            reason: "has no disks".to_owned(),
        });
    }
    let mut paths = Vec::new();
    for image in &images.disks {
        let shown = image.path.display().to_string();
        let path = std::fs::canonicalize(&image.path)
            .map_err(|error| ProviderError::source(shown.clone(), "find it", &error))?;
        if paths.contains(&path) {
            return Err(ProviderError::Unsupported {
                object: shown,
                reason: "is given twice for one machine".to_owned(),
            });
        }
        paths.push(path);
    }
    Ok(paths)
}

/// Opens all disks over what `opener` gives.
fn open_disks(
    images: &ImagesSource,
    paths: &[PathBuf],
    opener: &Arc<dyn Opener>,
) -> Result<Vec<FrozenDisk>, ProviderError> {
    let mut disks = Vec::new();
    for (number, (image, path)) in images.disks.iter().zip(paths).enumerate() {
        let chain = Chain::new(opener.clone(), path, &images.allow_backing);
        let file = chain.open(path)?;
        let (device, info) = formats::open(image, file, &chain.parents())
            .map_err(|error| chain.take_failure().unwrap_or(error))?;
        let description: DiskDescription =
            formats::describe(number, &image.path, device.as_ref(), &info, chain.length());
        let because = "images without a hypervisor have no change tracker".to_owned();
        disks.push(FrozenDisk { description, device, changed: Changed::Unknown { because } });
    }
    Ok(disks)
}

fn describe(machine: &MachineSpec, disks: &[FrozenDisk]) -> MachineDescription {
    MachineDescription {
        id: machine.id,
        name: machine.name.clone(),
        provider: "images".to_owned(),
        disks: disks.iter().map(|disk| disk.description.clone()).collect(),
    }
}

/// Looks at the images where they are.
pub(super) fn inspect(
    machine: &MachineSpec,
    images: &ImagesSource,
) -> Result<MachineDescription, ProviderError> {
    let paths = true_paths(images, machine)?;
    let opener: Arc<dyn Opener> =
        Arc::new(Finding { clones: None, in_place: AtomicBool::new(false), found: Mutex::default() });
    Ok(describe(machine, &open_disks(images, &paths, &opener)?))
}

/// The stamps of all files, and whether each is so old that any further write would show.
fn look(sources: &[OpenSource]) -> Result<Vec<(Stamp, bool)>, ProviderError> {
    let mut stamps = Vec::new();
    for source in sources {
        let stamp = sys::stamp(&source.file).map_err(|error| {
            ProviderError::source(source.path.display().to_string(), "look at it", &error)
        })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128);
        let settled = now - stamp.changed.max(stamp.modified) > TICKS.as_nanos() as i128
            // A stamp from the future tells nothing about now; it will still differ after a write.
            || stamp.changed > now + TICKS.as_nanos() as i128;
        stamps.push((stamp, settled));
    }
    Ok(stamps)
}

/// Waits until no file was written to within the last ticks; gives up when they go on being written.
fn look_at_rest(sources: &[OpenSource]) -> Result<Vec<(Stamp, bool)>, ProviderError> {
    for _ in 0..8 {
        let stamps = look(sources)?;
        if stamps.iter().all(|(_, settled)| *settled) {
            return Ok(stamps);
        }
        std::thread::sleep(TICKS);
    }
    look(sources)
}

/// The files that did not stand still between two looks, with what is different.
fn moved(sources: &[OpenSource], before: &[(Stamp, bool)], after: &[(Stamp, bool)]) -> Vec<(String, String)> {
    let mut moved = Vec::new();
    for ((source, (before, settled)), (after, _)) in sources.iter().zip(before).zip(after) {
        let reason = before
            .difference(after)
            .or_else(|| (!settled).then(|| "it is written to all the time".to_owned()));
        if let Some(reason) = reason {
            moved.push((source.path.display().to_string(), reason));
        }
    }
    moved
}

fn writer(sources: &[OpenSource]) -> Result<Option<String>, ProviderError> {
    writer_of(&sources.iter().collect::<Vec<_>>())
}

fn writer_of(sources: &[&OpenSource]) -> Result<Option<String>, ProviderError> {
    sys::writer_of(sources).map_err(|error| {
        let object = sources.first().map(|source| source.path.display().to_string()).unwrap_or_default();
        ProviderError::source(object, "find out who uses it", &error)
    })
}

/// A view in place of one image, which something is to be made over.
pub(super) fn stand(image: &ImageSource, allow_backing: &[PathBuf]) -> Result<ImagesView, ProviderError> {
    let images = ImagesSource { disks: vec![image.clone()], allow_backing: allow_backing.to_vec() };
    let machine = MachineSpec {
        id: DatasourceId([0; 16]),
        name: image.path.display().to_string(),
        source: Source::Images(images.clone()),
    };
    freeze(&machine, &images, Err("an overlay is made over the image itself"))
}

/// A view of all disks at one moment: in clones made for a job, or in place, with the reason why there are to be no
/// clones.
pub(super) fn freeze(
    machine: &MachineSpec,
    images: &ImagesSource,
    clones: Result<JobId, &str>,
) -> Result<ImagesView, ProviderError> {
    let mut last = None;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(TICKS * attempt);
        }
        match try_freeze(machine, images, clones) {
            Err(error @ ProviderError::Changed { .. }) => last = Some(error),
            result => return result,
        }
    }
    Err(last.unwrap_or_else(|| ProviderError::Changed {
        object: machine.name.clone(),
        reason: "its images do not stand still".to_owned(),
    }))
}

fn try_freeze(
    machine: &MachineSpec,
    images: &ImagesSource,
    clones: Result<JobId, &str>,
) -> Result<ImagesView, ProviderError> {
    let paths = true_paths(images, machine)?;
    let finding =
        Arc::new(Finding { clones: clones.ok(), in_place: AtomicBool::new(false), found: Mutex::default() });
    let opener: Arc<dyn Opener> = finding.clone();
    let found = open_disks(images, &paths, &opener);
    let sources: Vec<OpenSource> =
        std::mem::take(&mut *finding.found.lock().unwrap_or_else(PoisonError::into_inner))
            .into_values()
            .collect();
    if let Err(error) = found {
        // What looks damaged may only have been half written: whoever writes is the true reason.
        if matches!(error, ProviderError::Format { .. })
            && finding.in_place.load(Ordering::Relaxed)
            && let Some(reason) = writer(&sources)?
        {
            let object = error.object().to_owned();
            return Err(ProviderError::Locked { object, reason: format!("{reason}; as it is now, {error}") });
        }
        return Err(error);
    }

    let before = look_at_rest(&sources)?;
    let in_use = writer(&sources)?;
    let because = match clones {
        Err(because) => because.to_owned(),
        Ok(job) => match clone_all(&sources, job) {
            Ok(clones) => {
                let moved = moved(&sources, &before, &look(&sources)?);
                if let [_, (object, reason), ..] = moved.as_slice() {
                    let reason = format!("several of the machine's files were changed at once: {reason}");
                    return Err(ProviderError::Changed { object: object.clone(), reason });
                }
                let opener: Arc<dyn Opener> = Arc::new(Prepared { devices: clones });
                let disks = open_disks(images, &paths, &opener)?;
                let still = in_use.is_none() && moved.is_empty();
                return Ok(ImagesView {
                    description: describe(machine, &disks),
                    consistency: if still { Consistency::Offline } else { Consistency::Crash },
                    method: FreezeMethod::Reflink,
                    disks,
                    watched: Vec::new(),
                    changed: Mutex::default(),
                });
            }
            Err(because) => because,
        },
    };

    if let Some(reason) = in_use {
        return Err(ProviderError::Locked {
            object: machine.name.clone(),
            reason: format!("{reason}; it cannot be frozen in use: {because}"),
        });
    }
    let mut devices = BTreeMap::new();
    for source in &sources {
        devices.insert(source.path.clone(), device(source)?);
    }
    let opener: Arc<dyn Opener> = Arc::new(Prepared { devices });
    let disks = open_disks(images, &paths, &opener)?;
    if let Some((object, reason)) = moved(&sources, &before, &look(&sources)?).into_iter().next() {
        return Err(ProviderError::Changed { object, reason });
    }
    Ok(ImagesView {
        description: describe(machine, &disks),
        consistency: Consistency::Offline,
        method: FreezeMethod::InPlace { because },
        disks,
        watched: sources.into_iter().zip(before).map(|(source, (stamp, _))| (source, stamp)).collect(),
        changed: Mutex::default(),
    })
}

/// Clones every file, or tells why not.
fn clone_all(sources: &[OpenSource], job: JobId) -> Result<BTreeMap<PathBuf, Arc<dyn BlockDevice>>, String> {
    let mut clones = BTreeMap::new();
    for (number, source) in sources.iter().enumerate() {
        clones.insert(source.path.clone(), reflink(source, job, number as u32)?);
    }
    Ok(clones)
}

//! The file that a disk is recovered into.
//!
//! While it is filled it is called `FILE.partial`, and `FILE.partial.state` beside it says which disk of which point it
//! will be. An interrupted recovery of the same disk goes on with it; whatever else stands there is left alone.
//!
//! Order of writing: state file (synced, folder synced), then the image, then [`RecoveryTarget::finish`]: image synced,
//! renamed without replacing, folder synced, state file removed. A crash at any moment leaves either nothing, or a
//! partial file with its state, or the whole file, at worst with a state file that nothing belongs to; the next
//! recovery to the same place removes that one, even if it is refused because the file is there.
//!
//! *By difference*: the image that is there stays as it is, and the partial file is a qcow2 overlay of it. Its state also
//! holds what the files below it were like, so one that was begun over other bytes is never continued; and before it
//! gets its name they are proved to have stayed so.
//!
//! The state file: one line of JSON and one line with its BLAKE3 hash in hexadecimal.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block_io::{DiskFile, WritableDevice};
use disk_image::probe::{self, NewDisk};
use disk_image::{ImageError, ImageFormat, qcow2};
use model::RecoveryPointId;
use serde::{Deserialize, Serialize};

use crate::ProviderError;

/// An image to write an overlay over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseImage {
    /// Its file; of a chain the uppermost.
    pub path: PathBuf,
    /// Its format. The overlay states it, so that QEMU does not guess it from the guest's bytes either.
    pub format: ImageFormat,
    /// Folders besides the image's own in which (and below which) its backing files and parents may lie.
    pub allow_backing: Vec<PathBuf>,
}

/// The files below an overlay as they were when it was begun: what an interrupted one is continued by.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseState {
    /// The name in the overlay's header.
    pub path: String,
    pub format: String,
    /// The files below it, and itself.
    pub files: Vec<FileState>,
}

/// As a stamp, without the device: its number may be another after the host has been started anew.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileState {
    pub path: String,
    pub size: u64,
    pub inode: u64,
    pub modified: i128,
    pub changed: i128,
}

/// The image below an overlay, opened by who knows images: its files are watched.
pub(crate) trait Below: Send + Sync {
    /// As the overlay's writer wants it.
    fn base(&self) -> &qcow2::Base;
    /// What its files are like.
    fn state(&self) -> BaseState;
    /// Whether what stands at `path` is one of the files, under this or another name.
    fn holds(&self, path: &Path) -> bool;
    /// Proves that the files are as they were when they were opened, and that nobody is about to write to them.
    fn verify_unchanged(&self) -> Result<(), ProviderError>;
}

/// Opens an image to write an overlay over.
pub(crate) type OpenBelow<'a> = &'a dyn Fn(&BaseImage) -> Result<Box<dyn Below>, ProviderError>;

/// What is to be recovered where.
#[derive(Debug, Clone)]
pub struct TargetRequest {
    /// The file that will be there in the end.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// The disk it is to hold. Ids and time are those of a new image; one that is continued keeps its own.
    pub new: NewDisk,
    /// The point that is recovered.
    pub point: RecoveryPointId,
    /// The disk's key within it.
    pub disk: String,
    /// Whether an existing file, and a partial file of another recovery, may be replaced.
    pub overwrite: bool,
    /// The image to write a qcow2 overlay over; without it the file holds the whole disk.
    pub over: Option<BaseImage>,
}

/// A recovery in progress. Dropping it leaves the partial file, to be continued.
pub struct RecoveryTarget {
    path: PathBuf,
    partial: PathBuf,
    state: PathBuf,
    overwrite: bool,
    is_raw: bool,
    fresh: bool,
    device: Arc<dyn WritableDevice>,
    /// What the file is an overlay of.
    base: Option<Box<dyn Below>>,
    /// Held while this recovery lives, so that no second one fills the same file.
    _lock: File,
}

/// What a partial file is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    version: u32,
    point: RecoveryPointId,
    disk: String,
    format: String,
    size: u64,
    sector: u32,
    fixed: bool,
    /// What it is an overlay of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<BaseState>,
}

/// More than any state file has, that of an overlay of the longest chain included.
const STATE_LIMIT: u64 = 1 << 20;

impl State {
    fn of(request: &TargetRequest, base: Option<&dyn Below>) -> State {
        State {
            // Whoever knows version 1 only must not take an overlay for the whole disk.
            version: if base.is_some() { 2 } else { 1 },
            point: request.point,
            disk: request.disk.clone(),
            format: request.format.word().to_owned(),
            size: request.new.size,
            sector: request.new.logical_sector_size,
            fixed: request.new.fixed,
            base: base.map(Below::state),
        }
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let body = serde_json::to_string(self)?;
        Ok(format!("{body}\n{}\n", blake3::hash(body.as_bytes()).to_hex()).into_bytes())
    }

    /// What a partial file is instead of `wanted`, for a person.
    fn differs_from(&self, wanted: &State) -> String {
        let part = format!("holds a part of disk {} of point {}", self.disk, self.point);
        match (&self.base, &wanted.base) {
            (Some(old), Some(new)) if old.path == new.path && old != new => format!(
                "{part} over {} as it was before somebody wrote to it, and cannot be continued; remove it",
                old.path
            ),
            (Some(old), _) => format!("{part} over {}", old.path),
            (None, Some(_)) => format!("{part}, not over another image"),
            (None, None) => part,
        }
    }

    fn decode(bytes: &[u8]) -> Option<State> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (body, hash) = text.strip_suffix('\n')?.split_once('\n')?;
        if hash != blake3::hash(body.as_bytes()).to_hex().as_str() {
            return None;
        }
        serde_json::from_str(body).ok()
    }
}

/// `path` with more at the end of its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder_of(path))?.sync_all() } else { Ok(()) }
}

/// Whether anything of this name exists, a dangling link included.
fn exists(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl RecoveryTarget {
    /// Continues the recovery of the same disk if it was interrupted, otherwise begins it.
    pub(crate) fn open(
        request: &TargetRequest,
        below: OpenBelow<'_>,
    ) -> Result<RecoveryTarget, ProviderError> {
        let shown = request.path.display().to_string();
        let failed = |action: &'static str| {
            let shown = shown.clone();
            move |error: io::Error| ProviderError::target(shown, action, &error)
        };
        if request.path.file_name().is_none() {
            return Err(ProviderError::TargetWrite {
                object: shown,
                reason: "is not the name of a file".to_owned(),
            });
        }
        if exists(&request.path).map_err(failed("look at it"))? {
            let kind = std::fs::symlink_metadata(&request.path).map_err(failed("look at it"))?;
            if !request.overwrite || !kind.is_file() {
                sweep_state(&request.path);
                let reason = if kind.is_file() { "exists" } else { "exists and is not an ordinary file" };
                return Err(ProviderError::TargetExists { object: shown, reason: reason.to_owned() });
            }
        }
        let partial = beside(&request.path, ".partial");
        let state = beside(&request.path, ".partial.state");
        let base = request
            .over
            .as_ref()
            .map(|base| open_base(request, base, below, [&partial, &state]))
            .transpose()?;

        let mut lock = lock_state(&state).map_err(failed("make its state file"))?.ok_or_else(|| {
            ProviderError::TargetBusy {
                object: partial.display().to_string(),
                reason: "another recovery is writing to it".to_owned(),
            }
        })?;
        let mut found = Vec::new();
        (&mut lock).take(STATE_LIMIT).read_to_end(&mut found).map_err(failed("read its state file"))?;
        let wanted = State::of(request, base.as_deref());
        let known = State::decode(&found);
        let has_partial = exists(&partial).map_err(failed("look at its partial file"))?;
        if has_partial && known.as_ref() != Some(&wanted) {
            if !request.overwrite {
                let reason = match &known {
                    Some(other) => other.differs_from(&wanted),
                    None => "exists, and no intact state file says what it is".to_owned(),
                };
                if known.is_none() && found.is_empty() {
                    // We made the state file just now.
                    let _ = std::fs::remove_file(&state);
                }
                return Err(ProviderError::TargetExists { object: partial.display().to_string(), reason });
            }
            std::fs::remove_file(&partial).map_err(failed("remove its old partial file"))?;
        }
        let continued = known.as_ref() == Some(&wanted) && has_partial;
        if known.as_ref() != Some(&wanted) {
            write_state(&mut lock, &wanted).map_err(failed("write its state file"))?;
            sync_folder(&state).map_err(failed("sync its folder"))?;
        }

        let mut device = None;
        if continued {
            let kind = std::fs::symlink_metadata(&partial).map_err(failed("look at its partial file"))?;
            if !kind.is_file() {
                return Err(ProviderError::TargetExists {
                    object: partial.display().to_string(),
                    reason: "is not an ordinary file".to_owned(),
                });
            }
            let file = DiskFile::open(&partial).map_err(failed("open its partial file"))?;
            let opened = open_writer(request, base.as_deref(), Arc::new(file));
            match opened {
                Ok(writer) if writer.size() == request.new.size => device = Some(writer),
                // It was cut off before it was an image; nothing is lost with it.
                Ok(_) | Err(_) => {
                    std::fs::remove_file(&partial).map_err(failed("remove its broken partial file"))?;
                }
            }
        }
        let fresh = device.is_none() && base.is_none();
        let device = match device {
            Some(device) => device,
            None => {
                let file = DiskFile::create(&partial).map_err(failed("make its partial file"))?;
                let made = create_writer(request, base.as_deref(), Arc::new(file));
                match made {
                    Ok(writer) => writer,
                    Err(error) => {
                        // Nothing of it is worth continuing.
                        let _ = std::fs::remove_file(&partial);
                        let _ = std::fs::remove_file(&state);
                        return Err(ProviderError::from_target_image(shown, error));
                    }
                }
            }
        };
        Ok(RecoveryTarget {
            path: request.path.clone(),
            partial,
            state,
            overwrite: request.overwrite,
            is_raw: request.format == ImageFormat::Raw,
            fresh,
            device: Arc::from(device),
            base,
            _lock: lock,
        })
    }

    /// The disk to fill.
    pub fn device(&self) -> Arc<dyn WritableDevice> {
        self.device.clone()
    }

    /// Whether the disk is known to read as zeros everywhere: nothing was continued, and it lies over no other image.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// The file that is being filled.
    pub fn partial_path(&self) -> &Path {
        &self.partial
    }

    /// Gives the file its name; with `sync` everything is durable before and after. On failure the partial file stays.
    ///
    /// Without `sync` the image's own tables are still written out, and only the wait for the disk is left out where
    /// the format allows that: raw.
    pub fn finish(self, sync: bool) -> Result<(), ProviderError> {
        let shown = self.path.display().to_string();
        // What replaces another file is durable before it does: a power cut must not lose both.
        let sync = sync || self.overwrite;
        if !sync && self.is_raw {
            return self.finish_name(false);
        }
        self.device.flush().map_err(|error| ProviderError::from_target_device(shown, &error))?;
        if let Some(base) = &self.base {
            base.verify_unchanged()?;
        }
        self.finish_name(sync)
    }

    fn finish_name(self, sync: bool) -> Result<(), ProviderError> {
        let shown = self.path.display().to_string();
        let failed = |action: &'static str| {
            let shown = shown.clone();
            move |error: io::Error| ProviderError::target(shown, action, &error)
        };
        if self.overwrite {
            std::fs::rename(&self.partial, &self.path).map_err(failed("give it its name"))?;
        } else {
            rename_without_replacing(&self.partial, &self.path).map_err(failed("give it its name"))?;
        }
        if sync {
            sync_folder(&self.path).map_err(failed("sync its folder"))?;
        }
        remove_if_there(&self.state).map_err(failed("remove its state file"))
    }

    /// Gives the recovery up: removes what it wrote. Not for an interruption, which is to be continued.
    pub fn discard(self) -> Result<(), ProviderError> {
        let shown = self.path.display().to_string();
        let failed =
            |error: io::Error| ProviderError::target(shown.clone(), "remove its partial file", &error);
        remove_if_there(&self.partial).map_err(failed)?;
        remove_if_there(&self.state).map_err(failed)
    }
}

/// Opens what the target is to be an overlay of. None of its files may be one that the recovery writes or replaces.
fn open_base(
    request: &TargetRequest,
    base: &BaseImage,
    below: OpenBelow<'_>,
    ours: [&Path; 2],
) -> Result<Box<dyn Below>, ProviderError> {
    if request.format != ImageFormat::Qcow2 {
        return Err(ProviderError::TargetFormat {
            object: request.path.display().to_string(),
            reason: format!(
                "an overlay is a qcow2 image, and the format {} was asked for",
                request.format.word()
            ),
        });
    }
    let opened = below(base)?;
    for path in [request.path.as_path()].into_iter().chain(ours) {
        if opened.holds(path) {
            return Err(ProviderError::TargetExists {
                object: path.display().to_string(),
                reason: format!(
                    "is {} itself, or a file below it, which must stay as it is; choose another name",
                    base.path.display()
                ),
            });
        }
    }
    Ok(opened)
}

fn create_writer(
    request: &TargetRequest,
    base: Option<&dyn Below>,
    file: Arc<DiskFile>,
) -> Result<Box<dyn WritableDevice>, ImageError> {
    let Some(base) = base else { return probe::create_writer(request.format, file, &request.new) };
    let options = qcow2::CreateOptions::new(request.new.size);
    Ok(Box::new(qcow2::Writer::create_overlay(file, options, base.base())?))
}

fn open_writer(
    request: &TargetRequest,
    base: Option<&dyn Below>,
    file: Arc<DiskFile>,
) -> Result<Box<dyn WritableDevice>, ImageError> {
    let Some(base) = base else {
        return probe::open_writer(request.format, file, request.new.logical_sector_size);
    };
    Ok(Box::new(qcow2::Writer::open_overlay(file, base.base())?))
}

/// Removes the state file of a recovery that was cut off after the file had got its name. Only one that we wrote, and
/// that nobody holds; what stands in the way stays.
fn sweep_state(path: &Path) {
    let (partial, state) = (beside(path, ".partial"), beside(path, ".partial.state"));
    if !exists(&state).is_ok_and(|it| it) || exists(&partial).is_ok_and(|it| it) {
        return;
    }
    let Ok(Some(mut lock)) = lock_state(&state) else { return };
    let mut found = Vec::new();
    let is_ours =
        (&mut lock).take(STATE_LIMIT).read_to_end(&mut found).is_ok() && State::decode(&found).is_some();
    // Under the lock: nobody has begun a partial file since.
    if is_ours && exists(&partial).is_ok_and(|it| !it) {
        let _ = std::fs::remove_file(&state);
    }
}

/// Whether a recovery is writing the file of this name now.
#[cfg(unix)]
pub(crate) fn is_being_filled(path: &Path) -> bool {
    let state = beside(path, ".partial.state");
    exists(&state).is_ok_and(|it| it) && matches!(lock_state(&state), Ok(None))
}

/// Opens or makes the state file and locks it; `None` if another recovery holds it.
fn lock_state(path: &Path) -> io::Result<Option<File>> {
    // Again when the file that was locked had just been removed by the recovery that held it.
    for _ in 0..100 {
        // A link that stands there would be followed, and a file made at its end.
        if std::fs::symlink_metadata(path).is_ok_and(|named| !named.is_file()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
            Err(std::fs::TryLockError::Error(error)) => return Err(error),
        }
        if is_at(&file, path)? {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let open = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(not(unix))]
fn is_at(_file: &File, path: &Path) -> io::Result<bool> {
    exists(path)
}

/// The state file is ours and nothing depends on what it held, so it is written in place.
fn write_state(file: &mut File, state: &State) -> io::Result<()> {
    use std::io::Seek;
    file.set_len(0)?;
    file.seek(io::SeekFrom::Start(0))?;
    file.write_all(&state.encode()?)?;
    file.sync_all()
}

#[cfg(target_os = "linux")]
fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => link_and_remove(from, to),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    link_and_remove(from, to)
}

/// A link is never made over an existing name.
fn link_and_remove(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::hard_link(from, to)?;
    std::fs::remove_file(from)
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;

//! What a recovery in progress will have made, and what a finished one replaced: a file beside the machine's disks.
//!
//! It outlives kills and power cuts, and is all that the sweep knows. It is written as a whole or not at all.

use std::io::Write;
use std::path::{Path, PathBuf};

use model::{DatasourceId, JobId, RecoveryPointId};
use serde::{Deserialize, Serialize};

use crate::ProviderError;

/// Begins the name of the note of a recovery to the original that is in progress; the machine's mark follows.
const IN_PROGRESS: &str = ".stillpoint-recovery-";
/// Begins the name of the note of what was replaced; the machine's mark and the job's follow.
const REPLACED: &str = ".stillpoint-replaced-";
/// Begins the name of the note of a recovery to a machine of its own; its name follows.
const ELSEWHERE: &str = ".stillpoint-recovered-";
/// A note holds a definition and some paths.
const MOST_BYTES: u64 = 8 << 20;

/// A disk written as a difference to another image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Overlay {
    /// Its name in the machine.
    pub(super) target: String,
    /// The file with the difference.
    pub(super) file: PathBuf,
    /// The image below: what the disk was.
    pub(super) base: PathBuf,
    /// Its format.
    pub(super) base_format: String,
    /// The image below when the machine had been stopped: inode, bytes, times of writing and of change.
    pub(super) stamp: Option<Stamp>,
}

/// What changes with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of a file now.
    pub(super) fn of(path: &Path) -> Option<Stamp> {
        use std::os::unix::fs::MetadataExt;
        let found = std::fs::metadata(path).ok()?;
        Some(Stamp {
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// A file or folder that takes the place of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Exchange {
    /// Where it must be in the end.
    pub(super) place: PathBuf,
    /// Where it is made.
    pub(super) new: PathBuf,
    /// Where the former one goes.
    pub(super) old: PathBuf,
}

/// The note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) job: JobId,
    pub(super) point: RecoveryPointId,
    /// The machine that the recovery makes, or makes anew.
    pub(super) machine: DatasourceId,
    pub(super) overlays: Vec<Overlay>,
    /// Other files that it makes: full images, firmware variables.
    pub(super) files: Vec<PathBuf>,
    /// State of the TPM.
    pub(super) tpm: Option<Exchange>,
    /// Whether the machine ran, and was stopped for the recovery.
    pub(super) was_running: bool,
    /// The definition that is replaced.
    pub(super) before: String,
    /// How long what is replaced is kept, in seconds.
    pub(super) keep_seconds: u64,
    /// When that is over, in seconds since 1970; nothing before the swap.
    pub(super) until: Option<u64>,
}

/// The beginning of an id, short enough for names.
pub(super) fn short(id: &[u8; 16]) -> String {
    DatasourceId(*id).to_string().get(..8).unwrap_or_default().to_owned()
}

/// The note of a recovery to the original, in the folder of its first disk.
pub(super) fn in_progress(folder: &Path, machine: DatasourceId) -> PathBuf {
    folder.join(format!("{IN_PROGRESS}{}", short(&machine.0)))
}

/// The note of a recovery to a machine of this name.
pub(super) fn elsewhere(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{ELSEWHERE}{name}"))
}

/// Notes of what was replaced of a machine, in any order.
pub(super) fn replaced(folder: &Path, machine: DatasourceId) -> Vec<PathBuf> {
    let begin = format!("{REPLACED}{}-", short(&machine.0));
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let names = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&begin));
    names.map(|entry| entry.path()).collect()
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> ProviderError {
    let shown = path.display().to_string();
    move |error| ProviderError::target(shown, action, &error)
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), ProviderError> {
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(folder, "sync it"))
}

/// Writes a file as a whole: another name, synced, then its own.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> Result<(), ProviderError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let _ = std::fs::remove_file(&new);
    let write = || -> std::io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    write().map_err(failed(path, "write it"))?;
    path.parent().map_or(Ok(()), sync_folder)
}

impl Note {
    /// The note there, if there is one that is ours.
    pub(super) fn read(path: &Path) -> Result<Option<Note>, ProviderError> {
        use std::os::unix::fs::MetadataExt;
        let found = match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(failed(path, "look at it"))?,
        };
        // Anybody may write to some folders: a note of somebody else removes nothing.
        if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() || found.len() > MOST_BYTES
        {
            return Err(ProviderError::TargetExists {
                object: path.display().to_string(),
                reason: "stands where the note of a recovery belongs, and is none of this program".to_owned(),
            });
        }
        let text = std::fs::read(path).map_err(failed(path, "read it"))?;
        serde_json::from_slice(&text).map(Some).map_err(|error| ProviderError::Format {
            object: path.display().to_string(),
            reason: format!("the note of a recovery cannot be read: {error}; move it away to go on"),
        })
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), ProviderError> {
        let text = serde_json::to_vec_pretty(self).map_err(|error| ProviderError::Format {
            object: path.display().to_string(),
            reason: error.to_string(),
        })?;
        write_whole(path, &text)
    }

    /// From now on it says what was replaced.
    pub(super) fn settle(mut self, path: &Path, now: u64) -> Result<(), ProviderError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        self.until = Some(now.saturating_add(self.keep_seconds));
        let name = format!("{REPLACED}{}-{}", short(&self.machine.0), short(&self.job.0));
        self.write(&folder.join(name))?;
        remove(path)?;
        sync_folder(folder)
    }
}

/// Removes a file that may be gone.
pub(super) fn remove(path: &Path) -> Result<(), ProviderError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(path, "remove it")(error)),
        _ => Ok(()),
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_whole_or_not_there_and_becomes_one_of_what_was_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let machine = DatasourceId([0xab; 16]);
        let path = in_progress(folder.path(), machine);
        assert_eq!(Note::read(&path).unwrap(), None);
        let note = Note {
            job: JobId([1; 16]),
            point: RecoveryPointId([2; 16]),
            machine,
            overlays: vec![Overlay {
                target: "vda".to_owned(),
                file: "/a/x".into(),
                base: "/a/y".into(),
                base_format: "raw".to_owned(),
                stamp: None,
            }],
            files: vec!["/a/z".into()],
            tpm: None,
            was_running: false,
            before: "<domain/>".to_owned(),
            keep_seconds: 100,
            until: None,
        };
        note.write(&path).unwrap();
        assert_eq!(Note::read(&path).unwrap().as_ref(), Some(&note));
        note.clone().settle(&path, 1000).unwrap();
        assert!(!path.exists());
        let replaced = replaced(folder.path(), machine);
        assert_eq!(replaced.len(), 1);
        assert_eq!(Note::read(&replaced[0]).unwrap(), Some(Note { until: Some(1100), ..note }));
        assert!(super::replaced(folder.path(), DatasourceId([0xcd; 16])).is_empty());

        std::fs::write(&path, b"{").unwrap();
        assert!(Note::read(&path).unwrap_err().to_string().contains("move it away"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(Note::read(&path).is_err());
    }
}

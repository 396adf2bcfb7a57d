//! Recovery of a whole machine (docs/design/0021): prepare, then its disks, then complete.
//!
//! Invariants
//! - Until libvirt has taken the new definition over, the machine that was there is as it was. (must)
//! - Whether that has happened is read from libvirt, never from memory: every step can be done again after a kill. (must)
//! - Nothing goes that no note names; nothing is replaced that is not ours. (must)

mod elsewhere;
mod merge;
mod note;
mod original;
mod rewrite;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use model::{CompletedMachine, DatasourceId, MachineRecovery, Place, PreparedMachine, RecoveredDisk};

use super::Settings;
use super::configuration::{Configuration, NVRAM, TPM};
use super::properties::TARGET;
use super::rpc::Connection;
use crate::{DiskDescription, MachineSpec, ProviderError};
use note::{Exchange, sync_folder, write_whole};

/// Bytes that stay free beside what a recovery writes.
const RESERVE: u64 = 512 << 20;

/// A conversation about one recovery.
struct Talk<'a> {
    settings: &'a Settings,
    connection: Connection,
    recovery: &'a MachineRecovery,
    spec: MachineSpec,
    configuration: Configuration,
}

impl Talk<'_> {
    fn refused(&self, reason: impl Into<String>) -> ProviderError {
        ProviderError::Unsupported { object: self.recovery.machine_name.clone(), reason: reason.into() }
    }

    /// The disks with what their point says of them.
    fn disks(&self) -> Result<Vec<(&RecoveredDisk, DiskDescription, String)>, ProviderError> {
        let described = self.recovery.disks.iter().map(|disk| {
            let description: DiskDescription =
                serde_json::from_str(&disk.description).map_err(|error| ProviderError::Format {
                    object: self.recovery.machine_name.clone(),
                    reason: format!("disk {} of the point is not described: {error}", disk.disk),
                })?;
            let target = description.properties.get(TARGET).cloned().ok_or_else(|| {
                self.refused(format!("disk {} of the point has no name in the machine", disk.disk))
            })?;
            Ok((disk, description, target))
        });
        described.collect()
    }

    /// Writes the firmware variables of the point.
    fn write_nvram(&self, path: &Path) -> Result<bool, ProviderError> {
        let Some(content) = self.configuration.file(NVRAM)? else { return Ok(false) };
        write_whole(path, &content)?;
        Ok(true)
    }

    /// Writes the TPM's state of the point into a folder of its own.
    fn write_tpm(&self, folder: &Path) -> Result<(), ProviderError> {
        let failed =
            |error: std::io::Error| ProviderError::target(folder.display().to_string(), "make it", &error);
        if folder.exists() {
            std::fs::remove_dir_all(folder).map_err(failed)?;
        }
        std::fs::create_dir_all(folder).map_err(failed)?;
        for name in self.configuration.names(TPM) {
            let file = name.strip_prefix(TPM).unwrap_or_default();
            // A name from a pool: no way out of the folder.
            if file.is_empty() || file.contains('/') || file.starts_with('.') {
                continue;
            }
            if let Some(content) = self.configuration.file(name)? {
                write_whole(&folder.join(file), &content)?;
            }
        }
        sync_folder(folder)
    }

    fn has_tpm(&self) -> bool {
        self.configuration.names(TPM).next().is_some()
    }
}

/// Refuses a recovery for which there is no room. What goes to one file system is summed.
fn check_room(machine: &str, needs: &[(PathBuf, u64)]) -> Result<(), ProviderError> {
    let mut sums: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (folder, bytes) in needs {
        let shown = folder.display().to_string();
        let found =
            std::fs::metadata(folder).map_err(|error| ProviderError::target(shown, "look at it", &error))?;
        let sum = sums.entry(found.dev()).or_insert_with(|| (folder.clone(), 0));
        sum.1 = sum.1.saturating_add(*bytes);
    }
    for (folder, bytes) in sums.values() {
        let found = rustix::fs::statvfs(folder).map_err(|error| {
            ProviderError::target(folder.display().to_string(), "look at its free space", &error.into())
        })?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        let needed = bytes.saturating_add(RESERVE);
        if free < needed {
            return Err(ProviderError::TargetFull {
                object: folder.display().to_string(),
                reason: format!(
                    "the recovery of {machine} needs {bytes} bytes there and leaves {RESERVE} free; {free} are free: make \
                     room for {} more",
                    needed - free
                ),
            });
        }
    }
    Ok(())
}

/// The machine is not made of disks that are not there, nor of some of them.
fn check_files(talk: &Talk<'_>, prepared: &PreparedMachine) -> Result<(), ProviderError> {
    let asked: Vec<u32> = talk.recovery.disks.iter().map(|disk| disk.disk).collect();
    let found: Vec<u32> = prepared.disks.iter().map(|disk| disk.disk).collect();
    if asked != found {
        return Err(talk.refused(format!("disks {asked:?} are recovered, and disks {found:?} were prepared")));
    }
    match prepared.disks.iter().find(|disk| !Path::new(&disk.path).is_file()) {
        None => Ok(()),
        Some(gone) => Err(ProviderError::TargetWrite {
            object: gone.path.clone(),
            reason: "the disk that was recovered there is gone: run the recovery again".to_owned(),
        }),
    }
}

fn talk<'a>(settings: &'a Settings, recovery: &'a MachineRecovery) -> Result<Talk<'a>, ProviderError> {
    let name = &recovery.machine_name;
    let spec = serde_json::from_str(&recovery.spec).map_err(|error| ProviderError::Format {
        object: name.clone(),
        reason: format!("its definition cannot be read: {error}"),
    })?;
    crate::libvirt::source(&spec)?;
    if recovery.disks.is_empty() {
        return Err(ProviderError::Unsupported {
            object: name.clone(),
            reason: "the point has no disks".to_owned(),
        });
    }
    let configuration = Configuration::decode(name, &recovery.configuration)?;
    let connection = Connection::open(&settings.socket).map_err(|error| super::failed(name, &error))?;
    Ok(Talk { settings, connection, recovery, spec, configuration })
}

/// Checks, and says where the disks go.
pub(super) fn prepare(
    settings: &Settings,
    recovery: &MachineRecovery,
    new: DatasourceId,
) -> Result<PreparedMachine, ProviderError> {
    let mut talk = talk(settings, recovery)?;
    match &recovery.place {
        Place::Original { stop } => original::prepare(&mut talk, *stop),
        Place::Elsewhere { folder, format } => {
            elsewhere::prepare(&mut talk, folder.as_deref(), format.as_deref(), new)
        }
    }
}

/// Makes the machine.
pub(super) fn complete(
    settings: &Settings,
    recovery: &MachineRecovery,
    prepared: &PreparedMachine,
) -> Result<CompletedMachine, ProviderError> {
    let mut talk = talk(settings, recovery)?;
    match &recovery.place {
        Place::Original { .. } => original::complete(&mut talk, prepared),
        Place::Elsewhere { .. } => elsewhere::complete(&mut talk, prepared),
    }
}

/// Removes what was made, unless the machine was made of it.
pub(super) fn abandon(
    settings: &Settings,
    recovery: &MachineRecovery,
    prepared: &PreparedMachine,
) -> Result<(), ProviderError> {
    match &recovery.place {
        Place::Original { .. } => original::abandon(&mut talk(settings, recovery)?, prepared),
        // Whole disks and parts of them are worth the way: the same command goes on with them.
        Place::Elsewhere { .. } => Ok(()),
    }
}

pub(super) use original::sweep;

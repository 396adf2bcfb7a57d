//! To a machine of its own: full images in a folder of this host, and a new definition.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use disk_image::ImageFormat;
use disk_image::probe::NewDisk;
use model::{CompletedMachine, DatasourceId, Identity, Network, PreparedDisk, PreparedMachine};

use super::note::{self, Note, remove};
use super::rewrite::{Changes, NewSource, networks, rewritten};
use super::{Exchange, Talk, check_room};
use crate::libvirt::configuration::{self, dashed};
use crate::libvirt::definition;
use crate::{ProviderError, TargetRequest};

/// Where libvirt's own tools put disks.
const FOLDER: &str = "/var/lib/libvirt/images";

fn file(folder: &Path, name: &str, what: &str, extension: &str) -> PathBuf {
    folder.join(format!("{name}-{what}.{extension}"))
}

fn nvram(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}_VARS.fd"))
}

/// Checks everything, writes the note.
pub(super) fn prepare(
    talk: &mut Talk<'_>,
    folder: Option<&str>,
    format: Option<&str>,
    new: DatasourceId,
) -> Result<PreparedMachine, ProviderError> {
    let name = match (&talk.recovery.name, talk.recovery.identity) {
        (Some(name), _) => name.clone(),
        (None, Identity::Keep) => talk.recovery.machine_name.clone(),
        (None, Identity::New) => format!("{}-recovered", talk.recovery.machine_name),
    };
    if name.trim().is_empty() || name.contains(['/', '\n', '\0']) || name.starts_with('.') {
        return Err(talk.refused(format!(
            "{name:?} cannot be the name of a machine: no slash, no line feed, no dot at its beginning; choose one with --name"
        )));
    }
    if let Some(unknown) = format.filter(|format| format.parse::<ImageFormat>().is_err()) {
        return Err(
            talk.refused(format!("{unknown:?} is no format of disks: --format raw, vhd, vhdx or qcow2"))
        );
    }
    let told = |error| crate::libvirt::failed(&name, &error);
    let folder = match folder {
        Some(pool) if !pool.starts_with('/') => talk.connection.pool_folder(pool).map_err(told)?,
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(FOLDER),
    };
    if !folder.is_dir() {
        return Err(ProviderError::TargetWrite {
            object: folder.display().to_string(),
            reason: "is no folder of this host; make it, or name another one with --path".to_owned(),
        });
    }
    let path = note::elsewhere(&folder, &name);
    let earlier = Note::read(&path)?.filter(|note| note.point == talk.recovery.point);
    let id = match (talk.recovery.identity, &earlier) {
        (Identity::Keep, _) => talk.recovery.machine,
        // The same command again: the same machine.
        (Identity::New, Some(note)) if note.machine != talk.recovery.machine => note.machine,
        (Identity::New, _) => new,
    };
    if let Some(other) = talk.connection.domain(&id.0).map_err(told)? {
        return Err(ProviderError::TargetExists {
            object: other.name,
            reason: "is a machine of this host with that identity already: recover with --original, or with --identity new"
                .to_owned(),
        });
    }
    if talk.connection.domain_named(&name).map_err(told)?.is_some() {
        return Err(ProviderError::TargetExists {
            object: name,
            reason: "is the name of a machine of this host already: choose another one with --name"
                .to_owned(),
        });
    }
    let mut notes = Vec::new();
    let mut disks = Vec::new();
    let mut files = Vec::new();
    let mut needed = 0u64;
    for (disk, description, target) in talk.disks()? {
        let format = format.unwrap_or(&description.format).to_owned();
        let path = file(&folder, &name, &target, &format);
        let is_done = path.exists();
        if !is_done {
            needed = needed.saturating_add(disk.data_bytes);
        }
        files.push(path.clone());
        disks.push(PreparedDisk {
            disk: disk.disk,
            path: path.display().to_string(),
            format,
            over: None,
            is_done,
        });
    }
    for left in &talk.configuration.left_out {
        match left.bytes {
            Some(_) => {
                files.push(file(&folder, &name, &left.target, "qcow2"));
                notes.push(format!("Disk {} was left out of the point: it comes back empty.", left.target));
            }
            None => notes.push(format!(
                "Disk {} was left out of the point and its size is not known: the machine has none.",
                left.target
            )),
        }
    }
    if definition::nvram(&talk.configuration.definition).is_some() {
        files.push(nvram(&folder, &name));
    }
    if earlier.is_none()
        && let Some(there) = files.iter().find(|file| file.exists())
    {
        return Err(ProviderError::TargetExists {
            object: there.display().to_string(),
            reason: "is there already; choose another --path or --name, or move it away".to_owned(),
        });
    }
    match &talk.recovery.network {
        Network::Disconnect => notes.push("Its network adapters are disconnected.".to_owned()),
        Network::Map(map) => {
            let has = networks(&talk.configuration.definition);
            if let Some(unknown) = map.keys().find(|name| !has.contains(name)) {
                return Err(talk.refused(format!(
                    "no adapter of it is connected to {unknown:?}, so it cannot be mapped; they are connected to: {}",
                    if has.is_empty() { "nothing".to_owned() } else { has.join(", ") }
                )));
            }
        }
        Network::Keep => {}
    }
    check_room(&name, &[(folder.clone(), needed)])?;
    let tpm = configuration::tpm_folder(&talk.settings.tpm, &id.0, &talk.configuration.definition);
    let tpm = tpm.filter(|_| talk.has_tpm()).map(|place| Exchange {
        new: place.clone(),
        old: place.clone(),
        place,
    });
    let note = Note {
        job: talk.recovery.job,
        point: talk.recovery.point,
        machine: id,
        overlays: Vec::new(),
        files,
        tpm,
        was_running: false,
        before: String::new(),
        keep_seconds: 0,
        until: None,
    };
    note.write(&path)?;
    Ok(PreparedMachine { id, name, disks, stopped: false, notes })
}

/// An empty disk in the place of one that was left out.
fn empty_disk(talk: &Talk<'_>, path: &Path, bytes: u64) -> Result<(), ProviderError> {
    if path.exists() {
        return Ok(());
    }
    let request = TargetRequest {
        path: path.to_owned(),
        format: ImageFormat::Qcow2,
        new: NewDisk { size: bytes, logical_sector_size: 512, fixed: false, ids: [[0; 16]; 3], created: 0 },
        point: talk.recovery.point,
        disk: "left-out".to_owned(),
        overwrite: false,
        over: None,
    };
    crate::images::target(&request)?.finish(true)
}

/// Defines the machine.
pub(super) fn complete(
    talk: &mut Talk<'_>,
    prepared: &PreparedMachine,
) -> Result<CompletedMachine, ProviderError> {
    let (id, name) = (prepared.id, prepared.name.clone());
    let told = |error| crate::libvirt::failed(&name, &error);
    super::check_files(talk, prepared)?;
    let first = prepared.disks.first().ok_or_else(|| talk.refused("the point has no disks"))?;
    let folder = Path::new(&first.path).parent().unwrap_or(Path::new("/")).to_owned();
    let path = note::elsewhere(&folder, &name);
    let known = talk.connection.domain(&id.0).map_err(told)?;
    let domain = match known {
        // The answer to an earlier call was lost.
        Some(domain) if domain.name == name => domain,
        Some(other) => {
            return Err(ProviderError::TargetExists {
                object: other.name,
                reason: "came to have the identity of the recovered machine meanwhile".to_owned(),
            });
        }
        None => define(talk, prepared, &folder).map_err(|error| match error {
            ProviderError::Read { object, reason } => ProviderError::Unsupported {
                object,
                reason: format!(
                    "libvirt does not take over its definition: {reason}; its disks are whole and stay: the same command goes \
                     on from there when the cause is gone, or remove {}",
                    folder.join(format!("{name}-*")).display()
                ),
            },
            other => other,
        })?,
    };
    remove(&path)?;
    if talk.recovery.start {
        talk.connection.start(&domain).map_err(told)?;
    }
    Ok(CompletedMachine { id, name, started: talk.recovery.start, notes: Vec::new() })
}

fn define(
    talk: &mut Talk<'_>,
    prepared: &PreparedMachine,
    folder: &Path,
) -> Result<crate::libvirt::rpc::Domain, ProviderError> {
    let name = prepared.name.as_str();
    let mut disks = BTreeMap::new();
    for (disk, (_, _, target)) in prepared.disks.iter().zip(talk.disks()?) {
        disks.insert(target, NewSource::File { path: disk.path.clone(), format: disk.format.clone() });
    }
    for left in &talk.configuration.left_out {
        let source = match left.bytes {
            Some(bytes) => {
                let path = file(folder, name, &left.target, "qcow2");
                empty_disk(talk, &path, bytes)?;
                NewSource::File { path: path.display().to_string(), format: "qcow2".to_owned() }
            }
            None => NewSource::Gone,
        };
        disks.insert(left.target.clone(), source);
    }
    let mut variables = None;
    if definition::nvram(&talk.configuration.definition).is_some() {
        let path = nvram(folder, name);
        if talk.write_nvram(&path)? {
            variables = Some(path.display().to_string());
        }
    }
    let tpm = configuration::tpm_folder(&talk.settings.tpm, &prepared.id.0, &talk.configuration.definition);
    if let Some(place) = tpm.filter(|_| talk.has_tpm()) {
        talk.write_tpm(&place)?;
    }
    let changes = Changes {
        name,
        uuid: dashed(&prepared.id.0),
        disks,
        eject: true,
        nvram: variables,
        network: &talk.recovery.network,
        new_addresses: talk.recovery.identity == Identity::New,
    };
    let definition = rewritten(&talk.configuration.definition, &changes)?;
    talk.connection.define(&definition).map_err(|error| crate::libvirt::failed(name, &error))
}

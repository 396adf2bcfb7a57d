//! The words for a backup job: which disks, since when, and where its files are.

use std::path::{Path, PathBuf};

use model::JobId;

use super::definition::{self, Disk};
use super::{CHECKPOINT, Settings, scratch};
use crate::{MachineSpec, Source};

/// Begins the description of every checkpoint of ours; the pool's and the datasource's id follow.
const DESCRIPTION: &str = "stillpoint ";

/// What a list begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    /// Nothing, and why: everything is compared.
    None(String),
    /// A checkpoint of libvirt, whose bitmap is in the image.
    Checkpoint(String),
    /// A bitmap in QEMU's memory.
    Memory(String),
}

impl Base {
    /// The name of the checkpoint or bitmap.
    pub(super) fn mark(&self) -> Option<&str> {
        match self {
            Base::None(_) => None,
            Base::Checkpoint(mark) | Base::Memory(mark) => Some(mark),
        }
    }
}

/// The words for a backup job.
pub(super) struct Request {
    pub(super) job: JobId,
    pub(super) socket: PathBuf,
    pub(super) scratch: Vec<PathBuf>,
}

/// What says whose a checkpoint is.
pub(super) fn description(machine: &MachineSpec) -> String {
    match &machine.source {
        Source::Libvirt(source) => format!("{DESCRIPTION}{} {}", source.owner, machine.id),
        Source::Images(_) => format!("{DESCRIPTION}{}", machine.id),
    }
}

/// The definition of a checkpoint of these disks.
pub(super) fn checkpoint<'a>(
    machine: &MachineSpec,
    name: &str,
    disks: impl Iterator<Item = (&'a str, bool)>,
    is_known: bool,
) -> String {
    let mut out = format!(
        "<domaincheckpoint><name>{}</name><description>{}</description>{}<disks>",
        definition::escaped(name),
        definition::escaped(&description(machine)),
        // libvirt wants a time for one that it is to know again, and does not use it.
        if is_known { "<creationTime>1</creationTime>" } else { "" },
    );
    for (target, has_bitmap) in disks {
        let kind = if has_bitmap { "bitmap" } else { "no" };
        let target = definition::escaped(target);
        out.push_str(&format!("<disk name='{target}' checkpoint='{kind}'/>"));
    }
    out.push_str("</disks></domaincheckpoint>");
    out
}

/// Whether the format of a disk keeps bitmaps itself: QEMU has them in a qcow2 file, and in no other.
pub(super) fn keeps_bitmaps(disk: &Disk) -> bool {
    disk.format == "qcow2"
}

impl Request {
    pub(super) fn new(machine: &MachineSpec, job: JobId, disks: &[Disk], settings: &Settings) -> Request {
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

    pub(super) fn files(&self) -> Vec<PathBuf> {
        let mut files = self.scratch.clone();
        files.push(self.socket.clone());
        files
    }

    /// Name of the checkpoint of this job.
    pub(super) fn mark(&self) -> String {
        format!("{CHECKPOINT}{}", self.job)
    }

    pub(super) fn backup(&self, all: &[Disk], disks: &[Disk], bases: &[Base]) -> String {
        let text = definition::escaped;
        let mut out = format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>",
            text(&self.socket.display().to_string())
        );
        for ((disk, base), scratch) in disks.iter().zip(bases).zip(&self.scratch) {
            let mode = match base {
                Base::Checkpoint(base) => format!("backupmode='incremental' incremental='{}'", text(base)),
                Base::Memory(_) | Base::None(_) => "backupmode='full'".to_owned(),
            };
            out.push_str(&format!(
                "<disk name='{}' backup='yes' type='file' {mode}><driver type='qcow2'/><scratch file='{}'/></disk>",
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

    /// Nothing where no disk can have a bitmap in its image.
    pub(super) fn checkpoint(&self, machine: &MachineSpec, all: &[Disk], disks: &[Disk]) -> Option<String> {
        let is_kept =
            |disk: &Disk| keeps_bitmaps(disk) && disks.iter().any(|chosen| chosen.target == disk.target);
        let named = all.iter().map(|disk| (disk.target.as_str(), is_kept(disk)));
        all.iter().any(is_kept).then(|| checkpoint(machine, &self.mark(), named, false))
    }
}

//! Machines made of image files: raw, VHD, VHDX and qcow2, with their backing files and parents.
//!
//! **Freezing**, in this order:
//! 1. *Reflink*: each file of each chain is cloned (`FICLONE`) into a file without a name in the same folder. One
//!    clone is atomic. Several show one moment if at most one of the files changed between the looks before the first
//!    and after the last clone: then all the others were, all that time, as they were when that one was cloned.
//!    The view is `offline` if nobody had a file open for writing and none changed, otherwise `crash`.
//! 2. *In place*, where the file system has no reflinks: refused as in use if anybody may write; then the files are
//!    read where they are, and [`FrozenView::verify_unchanged`](crate::FrozenView::verify_unchanged) compares identity,
//!    length and both time stamps of every file with those of the beginning. The view is `offline`.
//! 3. Otherwise refused, with the reason.
//!
//! **Who uses a file** ([`sys`]): QEMU tells by open-file-description locks on single bytes (byte 100 + n: permission n
//! is used, 200 + n: permission n is not shared with others; 1 is writing, 2 writing unchanged bytes, 3 resizing), so
//! a read lock over byte 101, 102 or 103 is a running writer. Besides that any write lock of another, a lease for
//! writing, and any process that has the file open for writing, as far as `/proc` shows. On Windows the file is
//! opened so that nobody may write meanwhile.
//!
//! **Time stamps** prove rest because the kernel sets them at every `write`; bytes written through a mapping set them
//! when the page becomes dirty, so the file is synced first, which makes all its pages clean. A stamp is as coarse as a
//! tick: a file written to within the last ticks is looked at again later. A file system that lets its owner turn
//! back the change time, or whose server tells clients late, is not defended against.
//!
//! **References** ([`parents`]) are followed only into the image's own folder and folders that were allowed.
//!
//! **Overlays** ([`base`]): the image that a disk is recovered over is a view in place as well, and gets the same proof.
//!
//! Clones and leftovers: a clone has no name, or loses it at once where the file system insists on one; a crash in
//! between leaves `.stillpoint-frozen-<job>-<n>`, held by a lock while its process lives and swept by name after.

mod base;
mod formats;
mod freeze;
mod parents;
mod scratch;
mod sys;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use freeze::ImagesView;
pub use scratch::MARK;

use model::{CompletedMachine, DatasourceId, MachineRecovery, PreparedMachine};

use crate::{
    FreezeRequest, FrozenView, ImagesSource, MachineDescription, MachineSpec, Provider, ProviderError,
    RecoveryTarget, Source, Swept, TargetRequest,
};

/// The provider of machines made of image files.
#[derive(Debug, Clone, Default)]
pub struct Images {
    /// Takes the second way at once, for tests and for file systems whose clones are not to be trusted.
    never_reflink: bool,
}

impl Images {
    /// The provider.
    pub fn new() -> Images {
        Images::default()
    }

    /// The provider that reads images in place only.
    pub fn without_reflinks() -> Images {
        Images { never_reflink: true }
    }
}

/// Begins or continues the recovery of a disk; what it may be an overlay of is an image.
pub(crate) fn target(request: &TargetRequest) -> Result<RecoveryTarget, ProviderError> {
    RecoveryTarget::open(request, &|image| Ok(Box::new(base::OpenBase::open(image)?)))
}

fn source(machine: &MachineSpec) -> Result<&ImagesSource, ProviderError> {
    match &machine.source {
        Source::Images(images) => Ok(images),
        Source::Libvirt(_) => Err(ProviderError::Unsupported {
            object: machine.name.clone(),
            reason: "is no machine of image files".to_owned(),
        }),
    }
}

impl Provider for Images {
    fn name(&self) -> &'static str {
        "images"
    }

    fn inventory(&self) -> Result<Vec<model::HostMachine>, ProviderError> {
        Ok(Vec::new())
    }

    fn inspect(&self, machine: &MachineSpec) -> Result<MachineDescription, ProviderError> {
        freeze::inspect(machine, source(machine)?)
    }

    fn freeze(
        &self,
        machine: &MachineSpec,
        request: &FreezeRequest,
    ) -> Result<Box<dyn FrozenView>, ProviderError> {
        let clones = if self.never_reflink { Err("reflinks are switched off") } else { Ok(request.job) };
        Ok(Box::new(freeze::freeze(machine, source(machine)?, clones)?))
    }

    fn recovery_target(&self, request: &TargetRequest) -> Result<RecoveryTarget, ProviderError> {
        target(request)
    }

    fn prepare_machine(
        &self,
        recovery: &MachineRecovery,
        _new: DatasourceId,
    ) -> Result<PreparedMachine, ProviderError> {
        Err(ProviderError::Unsupported {
            object: recovery.machine_name.clone(),
            reason: "it is a set of image files and has no definition that a machine could be made of; recover its disks: \
                     `stillpoint recover disk`"
                .to_owned(),
        })
    }

    fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        _prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, ProviderError> {
        Err(ProviderError::Unsupported {
            object: recovery.machine_name.clone(),
            reason: "a set of image files was never prepared to be a machine".to_owned(),
        })
    }

    fn abandon_machine(
        &self,
        _recovery: &MachineRecovery,
        _prepared: &PreparedMachine,
    ) -> Result<(), ProviderError> {
        Ok(())
    }

    fn sweep(&self, machines: &[MachineSpec]) -> Result<Swept, ProviderError> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for machine in machines {
            let images = source(machine)?;
            for image in &images.disks {
                // A missing image has no leftovers that could be told from its path; its folder may still have.
                let path = std::fs::canonicalize(&image.path).unwrap_or_else(|_| image.path.clone());
                folders.extend(path.parent().map(Path::to_owned));
            }
            folders.extend(images.allow_backing.iter().cloned());
        }
        scratch::sweep(folders)
    }
}

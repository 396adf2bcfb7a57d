//! One view of a machine at a time, of all agents of this host.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::{MachineSpec, ProviderError};

/// The right to the one view of a machine: a lock on a file, so it ends with the process that has it.
pub(super) struct Claim {
    _lock: File,
}

impl Claim {
    /// Nothing if somebody else has it. `notes` is the folder of notes.
    pub(super) fn of(machine: &MachineSpec, notes: &Path) -> Result<Option<Claim>, ProviderError> {
        let path = notes.join(format!("claim-{}", machine.id));
        let failed = |error: &std::io::Error| ProviderError::Read {
            object: path.display().to_string(),
            reason: format!("cannot lock it, so nothing keeps other agents away; run as root: {error}"),
        };
        std::fs::create_dir_all(notes).map_err(|error| failed(&error))?;
        let lock = File::create(&path).map_err(|error| failed(&error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(Claim { _lock: lock })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(failed(&error)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{LibvirtSource, Source};

    #[test]
    fn a_machine_is_claimed_once_and_others_are_free() {
        let notes = tempfile::tempdir().unwrap();
        let machine = |id| MachineSpec {
            id: model::DatasourceId([id; 16]),
            name: "web".to_owned(),
            source: Source::Libvirt(LibvirtSource::default()),
        };
        let first = Claim::of(&machine(1), &notes.path().join("new")).unwrap().unwrap();
        assert!(Claim::of(&machine(1), &notes.path().join("new")).unwrap().is_none());
        assert!(Claim::of(&machine(2), &notes.path().join("new")).unwrap().is_some());
        drop(first);
        assert!(Claim::of(&machine(1), &notes.path().join("new")).unwrap().is_some());
        std::fs::write(notes.path().join("file"), b"").unwrap();
        let told = Claim::of(&machine(1), &notes.path().join("file")).err().unwrap().to_string();
        assert!(told.contains("claim-") && told.contains("as root"), "{told}");
    }
}

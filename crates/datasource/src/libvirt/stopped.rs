//! The view of a stopped machine.

use model::Consistency;

use super::definition::Disk;
use super::view::describe;
use super::{keeps_swap, swap};
use crate::{Changed, FreezeMethod, FrozenDisk, FrozenView, MachineDescription, MachineSpec, ProviderError};

/// The view of a stopped machine: its image files, under the names that its running self has.
pub(super) struct Stopped {
    inner: Box<dyn FrozenView>,
    description: MachineDescription,
    disks: Vec<FrozenDisk>,
    configuration: String,
}

impl Stopped {
    pub(super) fn new(
        inner: Box<dyn FrozenView>,
        machine: &MachineSpec,
        disks: &[Disk],
        name: &str,
        configuration: String,
    ) -> Stopped {
        let mut frozen = Vec::new();
        for (found, disk) in inner.disks().iter().zip(disks) {
            let mut description = describe(disk, found.description.size, None);
            description.sector = found.description.sector;
            description.chain = found.description.chain;
            for (name, value) in &found.description.properties {
                description.properties.entry(name.clone()).or_insert_with(|| value.clone());
            }
            // No checkpoint is carried on from an older point: an image of then that was put back while the machine is off
            // has that bitmap too, and it knows nothing of what was written in between.
            let mut disk = FrozenDisk {
                description,
                device: found.device.clone(),
                changed: Changed::Unknown { because: "the machine is off: its images were read".to_owned() },
            };
            swap::leave_out(&mut disk, None, keeps_swap(machine));
            frozen.push(disk);
        }
        let description = MachineDescription {
            id: inner.description().id,
            name: name.to_owned(),
            provider: "libvirt".to_owned(),
            disks: frozen.iter().map(|disk| disk.description.clone()).collect(),
        };
        Stopped { inner, description, disks: frozen, configuration }
    }
}

impl FrozenView for Stopped {
    fn description(&self) -> &MachineDescription {
        &self.description
    }

    fn consistency(&self) -> Consistency {
        self.inner.consistency()
    }

    fn method(&self) -> &FreezeMethod {
        self.inner.method()
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn configuration(&self) -> &str {
        &self.configuration
    }

    fn verify_unchanged(&self) -> Result<(), ProviderError> {
        self.inner.verify_unchanged()
    }
}

//! Machines that a host knows by itself.

use serde::{Deserialize, Serialize};

use crate::DatasourceId;

/// Whether a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// It runs.
    Running,
    /// It is there and stands still.
    Paused,
    /// It is off.
    Off,
}

impl Power {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Power::Running => "running",
            Power::Paused => "paused",
            Power::Off => "off",
        }
    }
}

/// A machine of a hypervisor, as its host sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMachine {
    /// Its identity, from the hypervisor.
    pub id: DatasourceId,
    /// Its name now.
    pub name: String,
    /// `libvirt`, `hyperv`.
    pub provider: String,
    /// Whether it runs.
    pub power: Power,
    /// Whether an agent in the guest answers; nothing where it has none or does not run.
    pub guest_agent: Option<bool>,
    /// Its disks; removable media are not among them.
    pub disks: Vec<HostDisk>,
}

/// A disk of such a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDisk {
    /// Its name in the machine: `vda`.
    pub name: String,
    /// Where its bytes are: a path, or words for another kind of storage.
    pub storage: String,
    /// `raw`, `qcow2`, `vhdx`, ...
    pub format: String,
    /// `virtio`, `scsi`, `sata`, ...
    pub bus: String,
    /// Its bytes; nothing if they cannot be told.
    pub bytes: Option<u64>,
    /// Image files of its chain.
    pub chain: u32,
    /// Why it cannot be protected, if so.
    pub unprotected: Option<String>,
}

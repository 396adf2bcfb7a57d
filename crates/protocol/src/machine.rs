//! What server and host tell each other about machines, as JSON inside commands and their results.
//!
//! - The definition of a machine made of image files, as the server first writes it and the host reads it. Afterwards
//!   it is text that only hosts read. `datasource::MachineSpec` is the reading side; a test of the agent holds the two
//!   together.
//! - [`MachineReport`], the result of `Inspect`, and [`SentReport`], the result of `SendOrder`. The result of `ListInventory`
//!   is a list of `model::HostMachine`, that of `RecoverMachine` stands at [`MachineStep`], of every other command it is `null`.

use model::{Consistency, DatasourceId, MachineRecovery, PoolId, PreparedMachine};
use serde::{Deserialize, Serialize};

/// A disk as its host sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// Bytes.
    pub size: u64,
    /// 512 or 4096.
    pub sector: u32,
    /// What recovery needs to make the same kind of file again: text that only a host reads.
    pub description: String,
    /// Whether the host may know what changed since a view that it sent before.
    #[serde(default)]
    pub tracked: bool,
}

/// A machine as its host sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineReport {
    /// Its disks, in an order that stays.
    pub disks: Vec<DiskReport>,
}

/// What a host sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentReport {
    /// The machine at the frozen moment.
    pub machine: MachineReport,
    /// How far that moment can be trusted.
    pub consistency: Consistency,
    /// Why that far.
    pub evidence: String,
    /// What else the machine is, text that only a host reads; empty where there is nothing.
    #[serde(default)]
    pub configuration: String,
}

/// A step of the recovery of a whole machine: the text of `RecoverMachine`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub enum MachineStep {
    /// Check, and say where the disks go. The result is a `model::PreparedMachine`.
    Prepare {
        /// What is recovered.
        recovery: MachineRecovery,
    },
    /// Make a machine of the disks. The result is a `model::CompletedMachine`.
    Complete {
        /// What is recovered.
        recovery: MachineRecovery,
        /// What was prepared.
        prepared: PreparedMachine,
    },
    /// Remove what was made. The result is `null`.
    Abandon {
        /// What is recovered.
        recovery: MachineRecovery,
        /// What was prepared.
        prepared: PreparedMachine,
    },
}

/// One image file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Absolute path on the host.
    pub path: String,
    /// `raw`, `vhd`, `vhdx`, `qcow2`; by name and magic if absent.
    pub format: Option<String>,
}

/// The definition of a machine of the provider `images`.
pub fn images_definition(
    id: DatasourceId,
    name: &str,
    images: &[ImageFile],
    allow_backing: &[String],
) -> String {
    let disks: Vec<serde_json::Value> = images
        .iter()
        .map(|image| match &image.format {
            Some(format) => serde_json::json!({ "path": image.path, "format": format }),
            None => serde_json::json!({ "path": image.path }),
        })
        .collect();
    serde_json::json!({
        "id": id,
        "name": name,
        "source": { "provider": "images", "disks": disks, "allow_backing": allow_backing },
    })
    .to_string()
}

/// The definition of a machine of the provider `libvirt`, protected in the pool `owner`; `exclude` names disks that are left out.
pub fn libvirt_definition(
    id: DatasourceId,
    name: &str,
    exclude: &[String],
    keep_swap: bool,
    owner: PoolId,
) -> String {
    serde_json::json!({
        "id": id,
        "name": name,
        "source": {
            "provider": "libvirt", "exclude": exclude, "keep_swap": keep_swap, "owner": owner.to_string(),
        },
    })
    .to_string()
}

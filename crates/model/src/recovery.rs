//! What is asked of a host that recovers a whole machine, and what it answers.
//!
//! Three steps: prepare, then each disk, then complete; or abandon. Every step carries all that it needs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{DatasourceId, JobId, RecoveryPointId};

/// Where a machine is recovered to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "to")]
pub enum Place {
    /// To the machine that it is a point of.
    Original {
        /// How that machine is stopped if it runs; it must be off already if absent.
        stop: Option<Stop>,
    },
    /// To a machine of its own.
    Elsewhere {
        /// The folder for its disks, or the name of the hypervisor's storage pool; where the hypervisor keeps disks if absent.
        folder: Option<String>,
        /// Format of its disks; each as it was if absent.
        format: Option<String>,
    },
}

/// How a running machine is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// The guest is asked to shut down.
    Graceful,
    /// Its power is cut.
    Now,
}

/// Who the recovered machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    /// Another machine: new id, new network addresses of its adapters.
    New,
    /// The same machine.
    Keep,
}

/// What its adapters are connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// To what they were.
    Keep,
    /// To nothing.
    Disconnect,
    /// To other networks: by name of the one that it was, the one that it becomes.
    Map(BTreeMap<String, String>),
}

/// A disk of the point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveredDisk {
    /// Its number in the point, from 0.
    pub disk: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical sector.
    pub sector: u32,
    /// Its description in the point, text of the provider.
    pub description: String,
    /// Bytes that hold data: what a full image needs.
    pub data_bytes: u64,
    /// Bytes that differ from the newest point: what a difference needs at least.
    pub changed_bytes: u64,
}

/// A whole machine to be recovered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecovery {
    /// The job.
    pub job: JobId,
    /// The point.
    pub point: RecoveryPointId,
    /// The machine that it is a point of.
    pub machine: DatasourceId,
    /// Its name then.
    pub machine_name: String,
    /// The provider's definition of it as a datasource.
    pub spec: String,
    /// What the provider kept beside the disks.
    pub configuration: String,
    /// The disks.
    pub disks: Vec<RecoveredDisk>,
    /// Where to.
    pub place: Place,
    /// Its name; chosen by the provider if absent.
    pub name: Option<String>,
    /// Who it is.
    pub identity: Identity,
    /// What its adapters are connected to.
    pub network: Network,
    /// Whether it is started in the end.
    pub start: bool,
    /// How long replaced disks are kept, in seconds.
    pub keep_seconds: u64,
}

impl MachineRecovery {
    /// Seven days (T7).
    pub const KEEP_SECONDS: u64 = 7 * 86_400;
}

/// The image that a recovered disk is a difference to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseImage {
    /// Path on the host.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Folders in which images below it may lie.
    #[serde(default)]
    pub folders: Vec<String>,
}

/// Where a disk goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedDisk {
    /// Its number in the point.
    pub disk: u32,
    /// The file, a path of the host.
    pub path: String,
    /// Its format.
    pub format: String,
    /// The image below; a full image if absent.
    pub over: Option<BaseImage>,
    /// Whether it is there already, from the same recovery that was cut off later.
    #[serde(default)]
    pub is_done: bool,
}

/// What a host has prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedMachine {
    /// The recovered machine's identity.
    pub id: DatasourceId,
    /// Its name.
    pub name: String,
    /// Where each disk goes.
    pub disks: Vec<PreparedDisk>,
    /// Whether the machine ran and was stopped.
    pub stopped: bool,
    /// What people should know, a sentence each.
    pub notes: Vec<String>,
}

/// A recovered machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletedMachine {
    /// Its identity.
    pub id: DatasourceId,
    /// Its name.
    pub name: String,
    /// Whether it was started.
    pub started: bool,
    /// What people should know, a sentence each.
    pub notes: Vec<String>,
}

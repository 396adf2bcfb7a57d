//! The contract between the agent and the providers of machines.

use std::path::PathBuf;
use std::sync::Arc;

use block_io::{BlockDevice, DeviceError};
use model::{
    CompletedMachine, Consistency, DatasourceId, HostMachine, JobId, MachineRecovery, PreparedMachine,
    RangeSet, Unfrozen,
};
use serde::{Deserialize, Serialize};

use crate::{ProviderError, RecoveryTarget, TargetRequest};

/// What is protected, as the caller keeps it: the identity and where the machine is to be found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The machine's identity. A hypervisor gives one; a machine of image files gets a random one when it is added, and
    /// keeps it here.
    pub id: DatasourceId,
    /// Its name for people.
    pub name: String,
    /// Where it is.
    pub source: Source,
}

/// Where a machine is, by provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "provider", rename_all = "kebab-case")]
pub enum Source {
    /// It is a set of image files.
    Images(ImagesSource),
    /// It is a machine of libvirt, of the UUID that is its identity.
    Libvirt(LibvirtSource),
}

/// A machine of libvirt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibvirtSource {
    /// Disks that are left out, by their names in the machine: `vdb`.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Whether the inside of swap partitions is protected, too.
    #[serde(default)]
    pub keep_swap: bool,
    /// Who protects it: the pool's id. Two pools may protect one machine, each with checkpoints of its own.
    #[serde(default)]
    pub owner: String,
}

/// A machine made of image files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesSource {
    /// Its disks, in an order that stays: a disk is known by its place.
    pub disks: Vec<ImageSource>,
    /// Folders besides each image's own in which (and below which) backing files and parents may lie.
    #[serde(default)]
    pub allow_backing: Vec<PathBuf>,
}

/// One disk in an image file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// The image file; of a chain the uppermost.
    pub path: PathBuf,
    /// `raw`, `vhd`, `vhdx` or `qcow2`; without it name *and* magic must agree.
    #[serde(default)]
    pub format: Option<String>,
    /// Logical sector size of a raw disk, if it is not 512.
    #[serde(default)]
    pub sector: Option<u32>,
}

/// What a provider found a machine to be. The server keeps it with the point without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// The machine's identity.
    pub id: DatasourceId,
    /// Its name.
    pub name: String,
    /// `images`, `libvirt`, `hyperv`.
    pub provider: String,
    /// Its disks.
    pub disks: Vec<DiskDescription>,
}

/// A disk and the file it came from: enough to make the same kind of file again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDescription {
    /// Names the disk within its machine for ever: `disk0`, `disk1`.
    pub key: String,
    /// Name of the image file, without its folder. Text from a host: never a path to open.
    pub file_name: String,
    /// `raw`, `vhd`, `vhdx` or `qcow2`.
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector.
    pub sector: u32,
    /// How many image files the chain has, the uppermost included.
    pub chain: u32,
    /// Whether the provider may know what changed since a view that it gave before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tracked: bool,
    /// Properties of the image in words of its format (`subformat`, `block-size`, ...), for making one like it.
    #[serde(default)]
    pub properties: std::collections::BTreeMap<String, String>,
}

/// What a view is made for.
#[derive(Debug, Clone)]
pub struct FreezeRequest {
    /// The job: part of the mark of everything temporary.
    pub job: JobId,
    /// The consistency to aim at. The view says what it reached; less than wanted is the caller's to judge.
    pub wanted: Consistency,
    /// What is made of a running machine whose file systems cannot be frozen.
    pub unfrozen: Unfrozen,
    /// Whether it will be asked again before that: then there is no view without a freeze, unless trying again is in vain.
    pub may_retry: bool,
    /// Bytes that the machine is predicted to overwrite while the view stands; 0 where nothing is known.
    pub scratch_bytes: u64,
    /// For each disk, in the order of the last look: its description in the view since which changes are wanted.
    pub since: Vec<Option<DiskDescription>>,
}

/// What changed on a disk since the view that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// The tracker cannot tell.
    Unknown {
        /// Why.
        because: String,
    },
    /// These bytes at most.
    Listed {
        /// The bytes.
        ranges: RangeSet,
        /// By what, and since when.
        because: String,
    },
}

/// How a view stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FreezeMethod {
    /// Copies that share their blocks with the files: the machine may go on.
    Reflink,
    /// The files themselves, found at rest and watched.
    InPlace {
        /// Why they could not be copied without cost.
        because: String,
    },
    /// The hypervisor keeps what the running machine overwrites.
    Checkpoint {
        /// What was frozen, by whom and for how long, or why nothing was.
        evidence: String,
    },
}

/// One disk of a view.
#[derive(Clone)]
pub struct FrozenDisk {
    /// What it is.
    pub description: DiskDescription,
    /// Its bytes.
    pub device: Arc<dyn BlockDevice>,
    /// What changed since the view that was asked for.
    pub changed: Changed,
}

/// All disks of a machine at one moment. Dropping it takes away whatever it needed on the host.
pub trait FrozenView: Send + Sync {
    /// The machine as it was then.
    fn description(&self) -> &MachineDescription;
    /// How far the moment can be trusted.
    fn consistency(&self) -> Consistency;
    /// How it was done.
    fn method(&self) -> &FreezeMethod;
    /// The disks, in the order of the description. The devices must not be used after the view is gone.
    fn disks(&self) -> &[FrozenDisk];
    /// Proves that the view was still all the time until now. Must be called, and succeed, after the last read and
    /// before anything read from the view is committed. May be called often; once it failed it goes on failing.
    fn verify_unchanged(&self) -> Result<(), ProviderError>;

    /// What else the machine was at that moment, text of the provider: its definition, firmware variables. Empty where the
    /// disks are everything.
    fn configuration(&self) -> &str {
        ""
    }

    /// What a failed read of one of the disks means. A file that changed explains every other error: what looks
    /// damaged may only have been half written.
    fn explain(&self, disk: &DiskDescription, error: &DeviceError) -> ProviderError {
        match self.verify_unchanged() {
            Err(changed) => changed,
            Ok(()) => ProviderError::from_source_device(disk.file_name.clone(), error),
        }
    }
}

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// What was removed, for the log.
    pub removed: Vec<String>,
    /// What could not be done, for the log; it is tried again by the next sweep.
    pub troubles: Vec<String>,
    /// What carries our mark and is in use by a living job.
    pub in_use: Vec<String>,
}

/// A kind of host with machines on it. Every method may be called from several threads. What every provider must do is
/// examined by [`conformance`](crate::conformance).
pub trait Provider: Send + Sync {
    /// `images`, `libvirt`, `hyperv`.
    fn name(&self) -> &'static str;

    /// The machines that the host knows. A provider that only knows what it is told answers with nothing.
    fn inventory(&self) -> Result<Vec<HostMachine>, ProviderError>;

    /// Looks at a machine without disturbing it: its disks exist, can be read, and refer to nothing forbidden.
    fn inspect(&self, machine: &MachineSpec) -> Result<MachineDescription, ProviderError>;

    /// Makes a view of all disks at one moment, or says why there is none. Never waits for a guest without a limit.
    fn freeze(
        &self,
        machine: &MachineSpec,
        request: &FreezeRequest,
    ) -> Result<Box<dyn FrozenView>, ProviderError>;

    /// Begins or continues the recovery of a disk.
    fn recovery_target(&self, request: &TargetRequest) -> Result<RecoveryTarget, ProviderError>;

    /// Checks everything that can be checked before a whole machine is recovered, stops the machine if told to, and says
    /// where its disks go. `new` is the identity of a machine that gets a new one.
    fn prepare_machine(
        &self,
        recovery: &MachineRecovery,
        new: DatasourceId,
    ) -> Result<PreparedMachine, ProviderError>;

    /// Makes a machine of the disks that were received. Until it has succeeded, what was there is as it was; once its one
    /// deciding step is done, it ends well or the sweep ends it.
    fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, ProviderError>;

    /// Removes what a recovery made, unless it was completed.
    fn abandon_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<(), ProviderError>;

    /// Removes what crashed jobs left for these machines: only what carries our mark and no living job holds. To be
    /// called at start; may run beside living jobs.
    fn sweep(&self, machines: &[MachineSpec]) -> Result<Swept, ProviderError>;
}

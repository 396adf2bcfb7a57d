//! The port to hosts, and what a running job tells its surroundings.

use std::sync::Arc;
use std::time::Duration;

use model::{
    BaseImage, CompletedMachine, Consistency, DatasourceId, HostMachine, JobId, MachineRecovery,
    PreparedMachine, Problem, RecoveryPointId, Unfrozen,
};
use transfer::message::{FromTarget, ToAgent, ToServer, ToTarget};
use transfer::{DiskOrder, Link, LinkError, Steer};

/// A machine as the server keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its identity; a rename keeps it.
    pub id: DatasourceId,
    /// Its present name.
    pub name: String,
    /// Its host's name; empty for the server's own machine.
    pub host: String,
    /// The provider's definition of it: text that only the host reads.
    pub definition: String,
    /// What is made of it when it runs and its file systems cannot be frozen.
    pub unfrozen: Unfrozen,
    /// How long to wait before each of two more attempts to freeze it.
    pub freeze_wait: Duration,
    /// What became of it since its newest point, for the cause of the next one: that it moved to another host.
    pub news: Option<String>,
}

/// A disk as its host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskView {
    /// Bytes.
    pub size: u64,
    /// 512 or 4096.
    pub sector: u32,
    /// What recovery needs to make the same kind of file again: text that only a host reads.
    pub description: String,
    /// Whether the host may know what changed since a view that it sent before.
    pub tracked: bool,
}

/// A machine as its host sees it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineView {
    /// Its disks, in an order that stays.
    pub disks: Vec<DiskView>,
}

/// What a host is to send.
#[derive(Clone)]
pub struct SendOrder {
    /// The job.
    pub job: JobId,
    /// The machine.
    pub machine: Machine,
    /// For each disk, which blocks to announce.
    pub disks: Vec<DiskOrder>,
    /// The consistency to aim at.
    pub wanted: Consistency,
    /// Whether the order is given again if the machine cannot be frozen now.
    pub may_retry: bool,
    /// Bytes that the machine is predicted to overwrite while its view stands; 0 if nothing is known.
    pub scratch_bytes: u64,
    /// Cancels and throttles.
    pub steer: Steer,
}

/// What a host sent, told after the last byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentView {
    /// The machine at the frozen moment.
    pub view: MachineView,
    /// How far that moment can be trusted.
    pub consistency: Consistency,
    /// Why that far.
    pub evidence: String,
    /// What else the machine is, text that only a host reads; empty where there is nothing.
    pub configuration: String,
}

/// The server's end of a link to a sending agent.
pub type AgentEnd = Arc<dyn Link<ToAgent, ToServer>>;
/// The server's end of a link to a receiving agent.
pub type TargetEnd = Arc<dyn Link<ToTarget, FromTarget>>;

/// A host at work on a send order. Dropping it ends the work and frees the frozen view.
pub trait Sending: Send {
    /// The first link, or after a cut the next one. Waits for it.
    fn link(&mut self) -> Result<AgentEnd, LinkError>;
    /// Why the host itself gave up, if it did: better than "the link broke".
    fn failure(&mut self) -> Option<Problem>;
    /// After the transfer: the host proves that its view stood still until now, or the job fails.
    fn conclude(self: Box<Self>) -> Result<SentView, Problem>;
}

/// What a host is to write.
#[derive(Clone)]
pub struct ReceiveOrder {
    /// The job.
    pub job: JobId,
    /// The point that is recovered.
    pub point: RecoveryPointId,
    /// Its disk, from 0.
    pub disk: u32,
    /// The file that will be there in the end; a path of that host.
    pub path: String,
    /// `raw`, `vhd`, `vhdx` or `qcow2`.
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// 512 or 4096.
    pub sector: u32,
    /// The disk's description in the point.
    pub description: String,
    /// The image that the file is a difference to; a full image if absent.
    pub over: Option<BaseImage>,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
    /// Whether to wait for the target's disk at the end.
    pub sync: bool,
    /// Cancels and throttles.
    pub steer: Steer,
}

/// A host at work on a receive order. Dropping it leaves the partial file, to be continued.
pub trait Receiving: Send {
    /// The first link, or after a cut the next one. Waits for it.
    fn link(&mut self) -> Result<TargetEnd, LinkError>;
    /// Why the host itself gave up, if it did.
    fn failure(&mut self) -> Option<Problem>;
    /// After the transfer: the file gets its name.
    fn conclude(self: Box<Self>) -> Result<(), Problem>;
}

/// A host with machines, as jobs use it. May be called from several threads.
pub trait ProtectedHost: Send + Sync {
    /// The machines that the host knows by itself.
    fn machines(&self) -> Result<Vec<HostMachine>, Problem>;
    /// Looks at a machine without disturbing it.
    fn inspect(&self, machine: &Machine) -> Result<MachineView, Problem>;
    /// Freezes a machine and begins to send.
    fn send(&self, order: SendOrder) -> Result<Box<dyn Sending>, Problem>;
    /// Begins or continues the recovery of a disk into a file.
    fn receive(&self, order: ReceiveOrder) -> Result<Box<dyn Receiving>, Problem>;
    /// Checks what can be checked before a whole machine is recovered, and says where its disks go.
    fn prepare_machine(&self, recovery: &MachineRecovery) -> Result<PreparedMachine, Problem>;
    /// Makes a machine of the disks that were received. Until this is done, what was there is as it was.
    fn complete_machine(
        &self,
        recovery: &MachineRecovery,
        prepared: &PreparedMachine,
    ) -> Result<CompletedMachine, Problem>;
    /// Removes what a recovery made that will not be completed.
    fn abandon_machine(&self, recovery: &MachineRecovery, prepared: &PreparedMachine) -> Result<(), Problem>;
}

/// How much a line of a job's log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// For the record.
    Info,
    /// Less than asked.
    Warning,
    /// Failed.
    Error,
}

/// A running job, as the code that does its work sees it.
pub trait JobContext: Send + Sync {
    /// Its id.
    fn id(&self) -> JobId;
    /// Cancels and throttles it.
    fn steer(&self) -> &Steer;
    /// A new phase begins, with so many bytes to go if known.
    fn phase(&self, name: &str, total: Option<u64>);
    /// So many bytes of the phase are done; blocks moved, stored, found in the pool already.
    fn progress(&self, done: u64, transferred: u64, stored: u64, deduplicated: u64);
    /// A line for the job's log.
    fn log(&self, level: LogLevel, line: String);
    /// Waits, unless the job is cancelled meanwhile.
    fn wait(&self, duration: Duration) -> Result<(), Problem>;
    /// Something people must know beyond this job.
    fn alert(&self, problem: Problem);
}

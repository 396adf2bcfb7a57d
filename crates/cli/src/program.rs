//! What the command line cannot do over the API: what must run before there is a server.
//!
//! The binary implements [`Program`]; the command line itself speaks HTTP only. The methods block and are called
//! outside of any runtime. They write what a person shall read through [`Say`], never to stdout by themselves.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use model::{PoolId, Problem};
use protocol::api::{DiskFormat, RateLimit};

use crate::transport::Transport;

/// Settings of a pool, fixed when it is created. Absent means the pool's own safe default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolCreation {
    /// Where the recovery kit goes; outside the data folder.
    pub recovery_kit: Option<PathBuf>,
    /// Verified points of a machine that always stay.
    pub floor_points: Option<u32>,
    /// Seconds for which every point stays.
    pub floor_seconds: Option<u64>,
    /// Seconds for which a deleted point can be had back.
    pub soft_delete_seconds: Option<u64>,
    /// Seconds between quarantine and deletion.
    pub reclaim_hold_seconds: Option<u64>,
    /// Bytes of the volume that backups leave free.
    pub reserve_bytes: Option<u64>,
    /// Parity inside packs, in percent of their bytes.
    pub parity_percent: Option<u32>,
}

/// How to open a data folder standalone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandaloneOptions {
    /// The data folder.
    pub folder: PathBuf,
    /// Create the folder and the pool if there is none; `None`: a missing or empty folder is `DataFolderMissing`.
    pub create: Option<PoolCreation>,
    /// Refuse any other pool with `OtherPool`.
    pub pool: Option<PoolId>,
    /// Whether the command writes to the pool. A reader takes no lock.
    pub writes: bool,
    /// Wait for another writer instead of failing with `PoolBusy`.
    pub wait: bool,
    /// Percent of one core that the host's part of the work may take.
    pub cpu_limit: Option<u32>,
    /// Take a pool that is older than the catalog knows as it is now, instead of failing with `PoolRolledBack`: only
    /// `catalog rebuild` says so.
    pub accepts_older_pool: bool,
}

/// A data folder opened standalone: server and agent in this process.
pub struct Standalone {
    /// The way to its API.
    pub transport: Arc<dyn Transport>,
    /// The pool.
    pub pool: PoolId,
    /// Where the recovery kit was written, if the pool was created just now.
    pub created_kit: Option<PathBuf>,
    /// Ends it in order when dropped, after the transport: closes the catalog, lets the lock go.
    pub guard: Box<dyn Send>,
}

/// `stillpoint demo`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DemoOptions {
    /// The data folder; a temporary one if absent.
    pub data: Option<PathBuf>,
    /// The disk; makes its own if absent.
    pub image: Option<PathBuf>,
    /// Leave the data folder behind.
    pub keep: bool,
}

/// `stillpoint server run`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// The data folder; created if missing.
    pub data: PathBuf,
    /// Address and port to listen on; the default port on all addresses if absent.
    pub listen: Option<String>,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// Settings if the pool is created now.
    pub create: PoolCreation,
    /// Refuse any other pool.
    pub pool: Option<PoolId>,
    /// Take over the pool that lies in the data folder with its recovery kit.
    pub kit: Option<PathBuf>,
}

/// `stillpoint agent enroll`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrollOptions {
    /// The server's address.
    pub server: String,
    /// The enrolment token.
    pub token: String,
    /// The agent's state folder; the system's usual one if absent.
    pub state: Option<PathBuf>,
    /// The name it shall have; the machine's own if absent.
    pub name: Option<String>,
}

/// `stillpoint agent run`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentOptions {
    /// The agent's state folder; the system's usual one if absent.
    pub state: Option<PathBuf>,
    /// Protect at the priority of other programs.
    pub normal_priority: bool,
    /// Percent of one core that the agent may take.
    pub cpu_limit: Option<u32>,
}

/// `stillpoint recover disk --pool DIR --kit FILE`: program, kit, pool, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakGlass {
    /// The pool's folder, possibly mounted read-only.
    pub pool: PathBuf,
    /// The recovery kit.
    pub kit: PathBuf,
    /// As typed; may be absent if the pool has one machine.
    pub datasource: Option<String>,
    /// As typed, `@TIME` in RFC 3339 UTC.
    pub point: String,
    /// The disk's number.
    pub disk: u32,
    /// The file to write.
    pub target: PathBuf,
    /// Its format; by file name if absent.
    pub format: Option<DiskFormat>,
    /// How fast at most.
    pub limit: Option<RateLimit>,
    /// End without waiting for the disk.
    pub no_sync: bool,
    /// Write all that is good.
    pub accept_damage: bool,
    /// Replace an existing file.
    pub overwrite: bool,
    /// Refuse a point of less consistency.
    pub min_consistency: Option<model::Consistency>,
}

/// `stillpoint pool verify --hashes --pool DIR`: a folder, and no key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyFolder {
    /// The pool's folder, possibly mounted read-only.
    pub pool: PathBuf,
    /// How fast at most.
    pub limit: Option<RateLimit>,
}

/// What the methods of [`Program`] say while they work.
pub trait Say: Send + Sync {
    /// A line for a person: on stderr, or as a `{"type":"message"}` line on stdout with `--json`.
    fn line(&self, text: &str);
    /// A step that ended, with its figures: a line for a person, or with `--json` the object, `type` added.
    fn step(&self, human: &str, kind: &str, figures: serde_json::Value);
    /// How far a long step is. Shown only on a terminal.
    fn progress(&self, progress: &protocol::api::Progress);
    /// Set once Ctrl-C was pressed.
    fn cancelled(&self) -> &AtomicBool;
}

/// A file on this machine that a remote server's disk is written into.
pub trait LocalTarget: Send {
    /// Where an interrupted recovery of the same point and disk to the same file can go on; 0 for a new one.
    fn resume_at(&self) -> u64;
    /// Writes. Offsets only rise; what is left out reads as zeros.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Problem>;
    /// Gives the file its name, and unless told otherwise makes it durable.
    fn finish(self: Box<Self>, sync: bool) -> Result<(), Problem>;
}

/// What to write into a [`LocalTarget`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalTargetOptions {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Bytes of the disk.
    pub bytes: u64,
    /// Logical sector size.
    pub sector_bytes: u32,
    /// What is written, for telling a resumable partial file from a foreign one: point and disk.
    pub content: String,
    /// Replace an existing file.
    pub overwrite: bool,
}

/// What the binary adds to the command line.
pub trait Program: Send + Sync {
    /// Version for `stillpoint version`.
    fn version(&self) -> String;
    /// Opens a data folder in this process.
    fn open_standalone(&self, options: &StandaloneOptions) -> Result<Standalone, Problem>;
    /// Runs the demo. An error is a demo that failed.
    fn demo(&self, options: &DemoOptions, say: &dyn Say) -> Result<(), Problem>;
    /// Runs the server until it is told to stop.
    fn server_run(&self, options: &ServerOptions, say: &dyn Say) -> Result<(), Problem>;
    /// Enrols this machine.
    fn agent_enroll(&self, options: &EnrollOptions, say: &dyn Say) -> Result<(), Problem>;
    /// Runs the agent until it is told to stop.
    fn agent_run(&self, options: &AgentOptions, say: &dyn Say) -> Result<(), Problem>;
    /// Recovers a disk with pool and kit alone. The answer is the job it would have been: state, figures, warnings.
    fn break_glass(&self, options: &BreakGlass, say: &dyn Say) -> Result<protocol::api::Job, Problem>;
    /// Hashes the files of a pool without any key. The answer is the job it would have been.
    fn verify_folder(&self, options: &VerifyFolder, say: &dyn Say) -> Result<protocol::api::Job, Problem>;
    /// Opens a file on this machine for a disk of a remote server. `TargetExists` unless `overwrite`.
    fn local_target(&self, options: &LocalTargetOptions) -> Result<Box<dyn LocalTarget>, Problem>;
    /// The name under which this machine is enrolled, if it is. A path without HOST: is then this host's.
    fn this_host(&self) -> Option<String>;
    /// The way to a server whose identity key has this fingerprint: [`crate::transport::Https`] with its TLS rules.
    fn connect(&self, server: &str, fingerprint: &str) -> Result<Arc<dyn Transport>, Problem>;
    /// An absolute form of a path on this machine, without following links or touching the disk.
    fn absolute(&self, path: &Path) -> Result<PathBuf, Problem> {
        std::path::absolute(path).map_err(|error| {
            Problem::new(model::Code::Usage, format!("{}: not a usable path: {error}.", path.display()))
        })
    }
}

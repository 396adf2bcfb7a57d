//! The words: every command and option, defined once. Help, completions and the reference come from here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use model::{Consistency, Identity, Network, PoolId, Stop, Unfrozen};
use protocol::api::DiskFormat;

use crate::read;

/// Protects virtual machines and recovers them.
#[derive(Debug, Parser)]
#[command(name = "stillpoint", disable_version_flag = true, max_term_width = 110, subcommand_required = true)]
pub struct Words {
    /// What holds for every command.
    #[command(flatten)]
    pub globals: Globals,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Globals {
    /// Work on this data folder in this process, without a server
    #[arg(long, global = true, value_name = "DIR", env = "STILLPOINT_STANDALONE", hide_env_values = true)]
    pub standalone: Option<PathBuf>,
    /// Work through this server
    #[arg(long, global = true, value_name = "URL", env = "STILLPOINT_SERVER", hide_env_values = true)]
    pub server: Option<String>,
    /// Fingerprint of the server's identity key
    #[arg(long, global = true, value_name = "TEXT", env = "STILLPOINT_FINGERPRINT", hide_env_values = true)]
    pub fingerprint: Option<String>,
    /// Print one JSON object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Show times in UTC
    #[arg(long, global = true)]
    pub utc: bool,
    /// Refuse any other pool
    #[arg(long, global = true, value_name = "ID")]
    pub pool_id: Option<PoolId>,
    /// Wait for another writer instead of ending with status 8
    #[arg(long, global = true)]
    pub wait: bool,
    /// Percent of one core that protecting and recovering may take (agent run, --standalone)
    #[arg(long, global = true, value_name = "N", env = "STILLPOINT_CPU_LIMIT", hide_env_values = true)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub cpu_limit: Option<u32>,
}

/// How a command treats its job.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct JobArgs {
    /// Print the job's id and do not wait for it
    #[arg(long)]
    pub detach: bool,
    /// Show the plan and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Settings that a pool gets when it is created, for good.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "If the pool is created")]
pub struct CreationArgs {
    /// Where the recovery kit goes, outside the data folder
    #[arg(long, value_name = "FILE")]
    pub recovery_kit: Option<PathBuf>,
    /// Verified points of a machine that always stay
    #[arg(long, value_name = "N")]
    pub floor_points: Option<u32>,
    /// For how long every point stays, such as 7d or 0s
    #[arg(long, value_name = "DURATION", value_parser = read::duration)]
    pub floor_age: Option<u64>,
    /// For how long a deleted point can be had back
    #[arg(long, value_name = "DURATION", value_parser = read::duration)]
    pub soft_delete: Option<u64>,
    /// How long reclaim waits between quarantine and deletion
    #[arg(long, value_name = "DURATION", value_parser = read::duration)]
    pub reclaim_hold: Option<u64>,
    /// Room on the volume that backups leave free, such as 1GiB or 0
    #[arg(long, value_name = "SIZE", value_parser = read::size)]
    pub reserve: Option<u64>,
    /// Parity inside the pool's files against small rot, in percent of their bytes; none otherwise
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=50))]
    pub parity: Option<u32>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Protect, change, verify and recover a VM disk, told in plain words as it goes
    Demo {
        /// The data folder; a temporary one otherwise
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// The disk; otherwise one is made
        #[arg(long, value_name = "DISK")]
        image: Option<PathBuf>,
        /// Leave the data folder behind
        #[arg(long)]
        keep: bool,
    },
    /// Show everything on one screen
    Status {
        /// End with 0 if all is well, 1 for a warning, 2 if critical, 3 if unknown
        #[arg(long)]
        check: bool,
    },
    /// The server
    #[command(subcommand)]
    Server(ServerCommand),
    /// Enrolled hosts
    #[command(subcommand)]
    Host(HostCommand),
    /// The protection agent on this machine
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Machines to protect
    #[command(subcommand, alias = "ds")]
    Datasource(DatasourceCommand),
    /// Make the initial replica of a machine, verify it, make the first recovery point
    Protect {
        /// NAME, HOST/NAME or a unique prefix of its id
        datasource: String,
        /// The protection group; the default group otherwise
        #[arg(long)]
        group: Option<String>,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Create a recovery point
    Synchronize(SynchronizeArgs),
    /// Compare a machine's disks with their replica
    #[command(alias = "consistency-check")]
    Check {
        /// NAME, HOST/NAME or a unique prefix of its id
        datasource: String,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Recovery points
    #[command(subcommand, alias = "rp")]
    RecoveryPoint(PointCommand),
    /// Recover from a recovery point
    #[command(subcommand)]
    Recover(RecoverCommand),
    /// The storage pool
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Drop recovery points by retention
    Prune {
        /// Only this one; all otherwise
        datasource: Option<String>,
        /// Keep the last N points instead of the stored policy
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        keep_last: Option<u32>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Jobs
    #[command(subcommand)]
    Job(JobCommand),
    /// Alerts
    #[command(subcommand)]
    Alert(AlertCommand),
    /// The server's database
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// The recovery kit: what opens the pool when all else is lost
    #[command(subcommand)]
    RecoveryKit(KitCommand),
    /// Print completions for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
    /// Tell cause and remedy of an error code
    Explain {
        /// Such as SP-1042
        code: String,
    },
}

/// `server ..`
#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Run the server
    Run {
        /// The data folder; created if missing
        #[arg(long, value_name = "DIR")]
        data: PathBuf,
        /// Address and port
        #[arg(long, value_name = "ADDR")]
        listen: Option<String>,
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Take over the pool that was copied or mounted as DIR/pool, with its recovery kit
        #[arg(long, value_name = "FILE")]
        kit: Option<PathBuf>,
        #[command(flatten)]
        create: CreationArgs,
    },
}

/// `host ..`
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List enrolled hosts
    List,
    /// List the machines of a host, and what of them can be protected
    Machines {
        /// Name, id or unique prefix of an enrolled host; the server's own machine otherwise
        host: Option<String>,
    },
    /// Make an enrolment token
    Token {
        /// How many hosts it may enrol
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// For how long it is valid
        #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = read::duration)]
        valid: u64,
    },
    /// Revoke a host's certificate
    Revoke {
        /// Name, id or unique prefix
        host: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// `agent ..`
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Enrol this machine with a server
    Enroll {
        /// The enrolment token
        #[arg(long, env = "STILLPOINT_ENROLMENT_TOKEN", hide_env_values = true)]
        token: String,
        /// The name it shall have; the machine's own otherwise
        #[arg(long)]
        name: Option<String>,
        /// The agent's state folder
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
    },
    /// Run the agent
    Run {
        /// The agent's state folder
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
        /// Protect at the priority of other programs instead of a low one
        #[arg(long)]
        normal_priority: bool,
    },
}

/// `datasource ..`
#[derive(Debug, Subcommand)]
pub enum DatasourceCommand {
    /// Add a machine that is a set of image files
    AddImage {
        /// The name it shall have
        name: String,
        /// Its disks in order (raw, vhd, vhdx, qcow2): FILE, or HOST:FILE on an enrolled host
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        /// Format of all images; by file name and magic otherwise
        #[arg(long, value_parser = read::format)]
        format: Option<DiskFormat>,
        /// A further folder in which backing files may lie
        #[arg(long, value_name = "DIR")]
        allow_backing: Vec<PathBuf>,
        #[command(flatten)]
        create: CreationArgs,
    },
    /// Add a machine of a hypervisor; `host machines` lists them
    AddMachine {
        /// Its name on its host, or its id
        machine: String,
        /// The enrolled host; the server's own machine otherwise
        #[arg(long, value_name = "HOST")]
        host: Option<String>,
        /// A disk to leave out, by its name in the machine; a recovered machine has it empty
        #[arg(long, value_name = "DISK")]
        exclude: Vec<String>,
        /// Protect the inside of swap partitions, too
        #[arg(long)]
        keep_swap: bool,
        /// If it runs and its file systems cannot be frozen: no point, pause it for the checkpoint, or a crash-consistent
        /// point and an alert; crash if absent. Adding it again changes this
        #[arg(long, value_name = "fail|pause|crash")]
        without_freeze: Option<Unfrozen>,
        /// How long to wait before each of two more attempts to freeze it; 5m if absent
        #[arg(long, value_name = "DURATION", value_parser = read::duration)]
        freeze_wait: Option<u64>,
        #[command(flatten)]
        create: CreationArgs,
    },
    /// List machines
    List,
    /// Show a machine
    Show {
        /// NAME, HOST/NAME or a unique prefix of its id
        datasource: String,
    },
    /// Remove a machine
    #[command(group(clap::ArgGroup::new("data").required(true).args(["keep_data", "delete_data"])))]
    Remove {
        /// NAME, HOST/NAME or a unique prefix of its id
        datasource: String,
        /// Its recovery points stay
        #[arg(long)]
        keep_data: bool,
        /// Its recovery points are deleted; they can be had back for a while
        #[arg(long)]
        delete_data: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        job: JobArgs,
    },
}

/// `synchronize ..`
#[derive(Debug, Clone, Args)]
pub struct SynchronizeArgs {
    /// NAME, HOST/NAME or a unique prefix of its id
    pub datasource: String,
    /// A change tracker's list: JSON [[offset,length],..] in bytes. A disk without one is scanned in full
    #[arg(long, value_name = "DISK=FILE")]
    pub changed_extents: Vec<String>,
    /// The recovery point the lists are against
    #[arg(long, value_name = "POINT", requires = "changed_extents")]
    pub changed_since: Option<String>,
    /// Read everything
    #[arg(long, conflicts_with = "changed_extents")]
    pub full_scan: bool,
    /// Refuse to make a point of less: application, file, crash or offline
    #[arg(long, value_name = "LEVEL")]
    pub min_consistency: Option<Consistency>,
    /// How the job is treated.
    #[command(flatten)]
    pub job: JobArgs,
}

/// `recovery-point ..`
#[derive(Debug, Subcommand)]
pub enum PointCommand {
    /// List recovery points, oldest first
    List {
        /// Only of this machine
        datasource: Option<String>,
    },
    /// Show a recovery point
    Show {
        /// Id or unique prefix; with --datasource also latest and @TIME
        point: String,
        /// The machine
        #[arg(long)]
        datasource: Option<String>,
    },
    /// Tell what differs between two recovery points
    Diff {
        /// The first
        a: String,
        /// The second
        b: String,
    },
    /// Delete a recovery point; it can be had back for a while
    Delete {
        /// Id or unique prefix
        point: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Take a deletion back
    Undelete {
        /// Id or unique prefix
        point: String,
    },
    /// Create a recovery point
    #[command(hide = true)]
    Create(SynchronizeArgs),
}

/// `recover ..`
#[derive(Debug, Subcommand)]
pub enum RecoverCommand {
    /// Recover a disk into a file
    Disk(RecoverDiskArgs),
    /// Recover a whole machine: in place of the original, or as one of its own
    #[command(alias = "machine")]
    Vm(RecoverVmArgs),
}

/// `recover vm ..`
#[derive(Debug, Clone, Args)]
#[command(group(clap::ArgGroup::new("target").required(true).multiple(true).args(["original", "host", "path", "name"])))]
pub struct RecoverVmArgs {
    /// NAME, HOST/NAME or a unique prefix of its id
    pub datasource: String,
    /// Id, unique prefix, latest, or @TIME (the last one at or before)
    #[arg(long)]
    pub point: String,
    /// Replace the disks of the original by what differs; they are kept for 7 days
    #[arg(long, conflicts_with_all = ["host", "path", "name", "identity", "format"])]
    pub original: bool,
    /// To this enrolled host, as a machine of its own; standalone: this machine
    #[arg(long)]
    pub host: Option<String>,
    /// Folder on the host, or storage pool of its hypervisor, for its disks
    #[arg(long, value_name = "DIR")]
    pub path: Option<String>,
    /// Its name; NAME-recovered if the identity is new
    #[arg(long)]
    pub name: Option<String>,
    /// A machine of its own is another one (new) or the same (keep)
    #[arg(long, value_name = "new|keep", value_parser = read::identity)]
    pub identity: Option<Identity>,
    /// keep, disconnect, or OLD=NEW,.. to connect adapters to other networks; disconnect if absent, keep with --original
    #[arg(long, value_name = "keep|disconnect|MAP", value_parser = read::network)]
    pub network: Option<Network>,
    /// raw, vhd, vhdx or qcow2; as it was otherwise
    #[arg(long, value_parser = read::format)]
    pub format: Option<DiskFormat>,
    /// How a running original is stopped: the guest is asked, or its power is cut
    #[arg(long, value_name = "graceful|now", requires = "original", value_parser = read::stop)]
    pub stop: Option<Stop>,
    /// Start the machine in the end
    #[arg(long)]
    pub start: bool,
    /// How fast at most: 50MB/s, 400Mbit/s, 50MB/s@mon-fri/08:00-18:00
    #[arg(long, value_name = "RATE")]
    pub limit: Option<String>,
    /// Refuse a point of less: application, file, crash or offline
    #[arg(long, value_name = "LEVEL")]
    pub min_consistency: Option<Consistency>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// How the job is treated.
    #[command(flatten)]
    pub job: JobArgs,
}

/// `recover disk ..`
#[derive(Debug, Clone, Args)]
pub struct RecoverDiskArgs {
    /// NAME, HOST/NAME or a unique prefix of its id
    #[arg(required_unless_present = "pool")]
    pub datasource: Option<String>,
    /// Id, unique prefix, latest, or @TIME (the last one at or before)
    #[arg(long)]
    pub point: String,
    /// Number of the disk, from 0
    #[arg(long, value_name = "N")]
    pub disk: u32,
    /// The file to write: FILE, or HOST:FILE on an enrolled host
    #[arg(long, value_name = "FILE")]
    pub to: String,
    /// raw, vhd, vhdx or qcow2; by the file's name otherwise
    #[arg(long, value_parser = read::format)]
    pub format: Option<DiskFormat>,
    /// How fast at most: 50MB/s, 400Mbit/s, 50MB/s@mon-fri/08:00-18:00
    #[arg(long, value_name = "RATE")]
    pub limit: Option<String>,
    /// End without waiting for the target's disk
    #[arg(long)]
    pub no_sync: bool,
    /// Write all that is good of a damaged point, list what is lost, end with status 6
    #[arg(long)]
    pub accept_damage: bool,
    /// Replace an existing file
    #[arg(long)]
    pub overwrite: bool,
    /// Refuse a point of less: application, file, crash or offline
    #[arg(long, value_name = "LEVEL")]
    pub min_consistency: Option<Consistency>,
    /// Recover with this pool and the kit alone: no server, no lock, no write
    #[arg(long, value_name = "DIR", requires = "kit")]
    pub pool: Option<PathBuf>,
    /// The recovery kit
    #[arg(long, value_name = "FILE", requires = "pool")]
    pub kit: Option<PathBuf>,
    /// How the job is treated.
    #[command(flatten)]
    pub job: JobArgs,
}

/// `pool ..`
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Show how the pool is
    Status,
    /// Check stored bytes against their hashes
    Verify(VerifyArgs),
    /// Free chunks that nothing needs
    Reclaim {
        /// How long chunks wait in quarantine
        #[arg(long, value_name = "DURATION", value_parser = read::duration)]
        hold: Option<u64>,
        /// The largest share of the pool that may go
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
        breaker: Option<u8>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Make or continue a second copy of the pool: encrypted packs and records only
    Copy {
        /// The copy's folder on the server's machine; made if missing
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// How fast at most: 50MB/s, 400Mbit/s, 50MB/s@mon-fri/08:00-18:00
        #[arg(long, value_name = "RATE")]
        limit: Option<String>,
        /// Read and hash also what the copy has already
        #[arg(long)]
        verify: bool,
        /// Copy damaged packs as they are, for what can be had of them
        #[arg(long)]
        accept_damage: bool,
        #[command(flatten)]
        job: JobArgs,
    },
    /// Seal what is written from now on under a new root key; nothing is rewritten
    RotateKeys,
    /// Write the recovery kit
    #[command(hide = true)]
    ExportKeys(KitWriteArgs),
}

/// `pool verify ..`
#[derive(Debug, Clone, Args)]
#[command(group(clap::ArgGroup::new("depth").args(["hashes", "read_data", "due"])))]
pub struct VerifyArgs {
    /// Hash all data, not structure alone
    #[arg(long)]
    pub hashes: bool,
    /// Read all data: hash, decrypt, decode and compare
    #[arg(long)]
    pub read_data: bool,
    /// As --read-data, but only what is due now, so that everything is read once in --every
    #[arg(long)]
    pub due: bool,
    /// The period of --due; 30 days otherwise
    #[arg(long, value_name = "DURATION", value_parser = read::duration, requires = "due")]
    pub every: Option<u64>,
    /// How fast stored bytes are read at most: 50MB/s, 400Mbit/s, 50MB/s@mon-fri/08:00-18:00
    #[arg(long, value_name = "RATE")]
    pub limit: Option<String>,
    /// Hash the files of this pool's folder: no server, no key, no lock, no write
    #[arg(long, value_name = "DIR", requires = "hashes", conflicts_with_all = ["read_data", "due"])]
    pub pool: Option<PathBuf>,
    /// How the job is treated.
    #[command(flatten)]
    pub job: JobArgs,
}

/// `job ..`
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List jobs, newest first
    List {
        /// Only those that failed
        #[arg(long)]
        failed: bool,
        /// Only the last so long, such as 24h
        #[arg(long, value_name = "DURATION", value_parser = read::duration)]
        since: Option<u64>,
    },
    /// Show a job
    Show {
        /// Id or unique prefix
        job: String,
    },
    /// Follow a job until it ends
    Watch {
        /// Id or unique prefix
        job: String,
    },
    /// Read a job's log
    Log {
        /// Id or unique prefix
        job: String,
    },
    /// Cancel a job
    Cancel {
        /// Id or unique prefix
        job: String,
    },
}

/// `alert ..`
#[derive(Debug, Subcommand)]
pub enum AlertCommand {
    /// List alerts, newest first
    List {
        /// Acknowledged ones too
        #[arg(long)]
        all: bool,
    },
    /// Take note of an alert
    Ack {
        /// Its number
        alert: u64,
    },
}

/// `catalog ..`
#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Make the catalog's derived tables again from the pool alone
    Rebuild {
        #[command(flatten)]
        job: JobArgs,
    },
}

/// `recovery-kit write ..`
#[derive(Debug, Clone, Args)]
pub struct KitWriteArgs {
    /// The file to write, outside the data folder
    #[arg(long, value_name = "PATH")]
    pub to: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    pub overwrite: bool,
}

/// `recovery-kit ..`
#[derive(Debug, Subcommand)]
pub enum KitCommand {
    /// Write the recovery kit and prove it
    Write(KitWriteArgs),
    /// List who can open the pool: servers and recovery kits
    List,
    /// Keep a lost or stolen kit from opening what is written from now on
    Revoke {
        /// Id or unique prefix, as `recovery-kit list` shows it and the kit's line `recipient` has it
        recipient: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Open the pool with nothing but the kit
    Test {
        /// The kit; where it was last written otherwise
        kit: Option<PathBuf>,
    },
}

/// Other programs' words, and ours for them.
pub const FOREIGN: &[(&str, &str)] = &[
    ("backup", "stillpoint synchronize DATASOURCE"),
    ("snapshot", "stillpoint synchronize DATASOURCE"),
    ("sync", "stillpoint synchronize DATASOURCE"),
    ("snapshots", "stillpoint recovery-point list"),
    ("forget", "stillpoint prune DATASOURCE --keep-last N"),
    ("gc", "stillpoint pool reclaim"),
    ("restore", "stillpoint recover disk DATASOURCE --point latest --disk 0 --to FILE"),
    ("init", "stillpoint --standalone DIR datasource add-image NAME IMAGE"),
    ("repository", "stillpoint pool status"),
    ("verify", "stillpoint pool verify --read-data"),
    ("scrub", "stillpoint pool verify --read-data"),
];

//! Jobs: what is asked for, what is planned, how far it is, how it ended.

use model::{Consistency, DatasourceId, Identity, JobId, Network, Problem, RecoveryPointId, Stop, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{DiskFormat, ProblemBody, RemoveData, Time};

/// Body of `protect`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Protect {
    /// The protection group; the default group if absent.
    #[serde(default)]
    pub group: Option<String>,
}

/// Body of `synchronize`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Synchronize {
    /// Lists of an outside change tracker. A disk without one is scanned in full.
    #[serde(default)]
    pub changed_extents: Vec<ChangedExtents>,
    /// The point the lists are against; against the newest point if absent, which the cause then says.
    #[serde(default)]
    pub changed_since: Option<String>,
    /// Read everything, whatever lists say.
    #[serde(default)]
    pub full_scan: bool,
    /// Refuse to make a point of less consistency.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub min_consistency: Option<Consistency>,
}

/// What an outside change tracker says about one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangedExtents {
    /// The disk's number, from 0.
    pub disk: u32,
    /// `[offset, length]` in bytes, in any order.
    #[schema(value_type = Vec<Vec<u64>>)]
    pub extents: Vec<(u64, u64)>,
}

/// Where a recovered disk goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", tag = "on", deny_unknown_fields)]
pub enum RecoverTarget {
    /// To a file of the server's own machine. Standalone only: a server on the network refuses it.
    Server {
        /// Absolute path.
        path: String,
    },
    /// To a file of an enrolled host, through its agent.
    Host {
        /// The host's name or id.
        host: String,
        /// Absolute path there.
        path: String,
    },
}

/// Body of `recover disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverDisk {
    /// The point: id, unique prefix, `latest`, `@TIME` (RFC 3339).
    pub point: String,
    /// The disk's number, from 0.
    pub disk: u32,
    /// Where it goes.
    pub target: RecoverTarget,
    /// The format of the file; by the target's file name if absent, otherwise raw.
    #[serde(default)]
    pub format: Option<DiskFormat>,
    /// How fast at most.
    #[serde(default)]
    pub limit: Option<RateLimit>,
    /// End without waiting for the target's disk.
    #[serde(default)]
    pub no_sync: bool,
    /// Write all that is good of a damaged or suspect point, and list what is lost.
    #[serde(default)]
    pub accept_damage: bool,
    /// Replace an existing file.
    #[serde(default)]
    pub overwrite: bool,
    /// Refuse a point of less consistency.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub min_consistency: Option<Consistency>,
}

/// Where a recovered machine goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", tag = "to", deny_unknown_fields)]
pub enum MachineTarget {
    /// To the machine that it is a point of, whose disks are replaced.
    Original {
        /// How that machine is stopped if it runs: `graceful` or `now`. Without it a running machine is refused.
        #[serde(default)]
        #[schema(value_type = Option<String>)]
        stop: Option<Stop>,
    },
    /// To a machine of its own.
    Host {
        /// An enrolled host's name or id. Standalone, and only there, it may be absent: this machine.
        #[serde(default)]
        host: Option<String>,
        /// Absolute path of a folder there, or the name of a storage pool of its hypervisor; where the hypervisor keeps disks if
        /// absent.
        #[serde(default)]
        path: Option<String>,
        /// Format of its disks; each as it was if absent.
        #[serde(default)]
        format: Option<DiskFormat>,
    },
}

/// Body of `recover vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverMachine {
    /// The point: id, unique prefix, `latest`, `@TIME` (RFC 3339).
    pub point: String,
    /// Where it goes.
    pub target: MachineTarget,
    /// Its name; the original's, or NAME-recovered with a new identity, if absent.
    #[serde(default)]
    pub name: Option<String>,
    /// `new` or `keep`; a machine of its own gets a new one if absent. The original keeps its own.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub identity: Option<Identity>,
    /// `"keep"`, `"disconnect"` or `{"map": {"OLD": "NEW"}}`; a machine of its own is disconnected if absent.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub network: Option<Network>,
    /// Start it in the end.
    #[serde(default)]
    pub start: bool,
    /// How fast at most.
    #[serde(default)]
    pub limit: Option<RateLimit>,
    /// Refuse a point of less consistency.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub min_consistency: Option<Consistency>,
}

/// A rate, and when it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// Only in these hours; always if absent.
    #[serde(default)]
    pub hours: Option<LimitHours>,
}

/// Hours of the week, in the zone of whoever typed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitHours {
    /// Monday to Sunday.
    pub days: [bool; 7],
    /// First minute of the day.
    pub from_minute: u16,
    /// First minute after; at or before `from_minute` means on the next day.
    pub to_minute: u16,
    /// Seconds east of UTC.
    pub offset_seconds: i32,
}

impl RateLimit {
    /// The limit in force at `now`; `None` if there is none then.
    pub fn at(&self, now: Timestamp) -> Option<u64> {
        let Some(hours) = self.hours else { return Some(self.bytes_per_second) };
        let local = (now.0 / Timestamp::SECOND) as i64 + i64::from(hours.offset_seconds);
        let minute = local.rem_euclid(86_400) / 60;
        // 1970-01-01 was a Thursday.
        let weekday = (local.div_euclid(86_400) + 3).rem_euclid(7) as usize;
        let day = |day: usize| hours.days.get(day % 7).copied().unwrap_or(false);
        let (from, to) = (i64::from(hours.from_minute), i64::from(hours.to_minute));
        let inside = if from < to {
            day(weekday) && (from..to).contains(&minute)
        } else {
            (day(weekday) && minute >= from) || (day(weekday + 6) && minute < to)
        };
        inside.then_some(self.bytes_per_second)
    }
}

/// Body of `pool verify`. At most one of `hashes`, `read_data` and `due`; none: structure alone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyPool {
    /// Also hash every stored byte.
    #[serde(default)]
    pub hashes: bool,
    /// Also hash, decrypt and decode every stored byte and compare it with what it should be.
    #[serde(default)]
    pub read_data: bool,
    /// As `read_data`, but only what is due now so that everything is read once in `every_seconds`.
    #[serde(default)]
    pub due: bool,
    /// The period of `due`; 30 days if absent.
    #[serde(default)]
    pub every_seconds: Option<u64>,
    /// How fast stored bytes are read at most.
    #[serde(default)]
    pub limit: Option<RateLimit>,
}

impl VerifyPool {
    /// The period of `due` where none is said: 30 days.
    pub const EVERY_SECONDS: u64 = 30 * 86_400;
}

/// Body of `pool reclaim`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// Seconds between quarantine and deletion; the pool's own hold if absent. Never less than the pool allows.
    #[serde(default)]
    pub hold_seconds: Option<u64>,
    /// The largest share of the pool that may go, in percent.
    #[serde(default)]
    pub breaker_percent: Option<u8>,
}

/// Body of `pool copy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyPool {
    /// Absolute path of the copy's folder on the server's machine: below one of its `copy_folders`; standalone anywhere
    /// outside the data folder.
    pub to: String,
    /// How fast at most.
    #[serde(default)]
    pub limit: Option<RateLimit>,
    /// Read and hash also what the copy has already.
    #[serde(default)]
    pub verify: bool,
    /// Copy damaged packs as they are, for what can be had of them.
    #[serde(default)]
    pub accept_damage: bool,
}

/// Body of `prune`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Prune {
    /// One datasource; all if absent.
    #[serde(default)]
    pub datasource: Option<String>,
    /// Keep the last so many points instead of the stored policy. The retention floor holds anyway.
    #[serde(default)]
    pub keep_last: Option<u32>,
}

/// Every job that can be asked for. Names in it are as typed; the server resolves them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum JobRequest {
    /// Initial replication, its verification, the first recovery point.
    Protect {
        /// As typed.
        datasource: String,
        /// How.
        options: Protect,
    },
    /// A new recovery point.
    Synchronize {
        /// As typed.
        datasource: String,
        /// How.
        options: Synchronize,
    },
    /// Source against replica.
    Check {
        /// As typed.
        datasource: String,
    },
    /// A disk of a point into a file.
    RecoverDisk {
        /// As typed.
        datasource: String,
        /// What, where to, how.
        options: RecoverDisk,
    },
    /// A whole machine of a point.
    RecoverMachine {
        /// As typed.
        datasource: String,
        /// What, where to, how.
        options: RecoverMachine,
    },
    /// A datasource is forgotten.
    RemoveDatasource {
        /// As typed.
        datasource: String,
        /// What becomes of its points.
        data: RemoveData,
    },
    /// Stored bytes against their hashes.
    VerifyPool(VerifyPool),
    /// Unreferenced chunks are freed.
    Reclaim(Reclaim),
    /// Points are dropped by retention.
    Prune(Prune),
    /// Encrypted packs and records are moved into a second copy.
    CopyPool(CopyPool),
    /// The catalog's derived tables are made again from the pool.
    RebuildCatalog,
}

impl JobRequest {
    /// What kind of job it starts.
    pub fn kind(&self) -> JobKind {
        match self {
            JobRequest::Protect { .. } => JobKind::Protect,
            JobRequest::Synchronize { .. } => JobKind::Synchronize,
            JobRequest::Check { .. } => JobKind::Check,
            JobRequest::RecoverDisk { .. } => JobKind::RecoverDisk,
            JobRequest::RecoverMachine { .. } => JobKind::RecoverMachine,
            JobRequest::RemoveDatasource { .. } => JobKind::RemoveDatasource,
            JobRequest::VerifyPool(_) => JobKind::Verify,
            JobRequest::Reclaim(_) => JobKind::Reclaim,
            JobRequest::Prune(_) => JobKind::Prune,
            JobRequest::CopyPool(_) => JobKind::CopyPool,
            JobRequest::RebuildCatalog => JobKind::RebuildCatalog,
        }
    }
}

/// What a job would do. Answer to `?dry_run=true`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// Kind of the job.
    pub kind: JobKind,
    /// What it is about, resolved: a datasource's name, a point, the pool.
    #[serde(default)]
    pub object: String,
    /// Decision and findings, as the job's own cause would say.
    #[serde(default)]
    pub cause: String,
    /// What will be done, one sentence a step, in order.
    pub steps: Vec<String>,
    /// Bytes that will be read at the source, about.
    #[serde(default)]
    pub bytes_read: Option<u64>,
    /// Bytes that will move, about.
    #[serde(default)]
    pub bytes_moved: Option<u64>,
    /// Bytes that the pool or the target needs, about.
    #[serde(default)]
    pub bytes_needed: Option<u64>,
    /// Bytes that come free, about.
    #[serde(default)]
    pub bytes_freed: Option<u64>,
    /// Seconds it will take, about.
    #[serde(default)]
    pub seconds: Option<u64>,
    /// Points that stay, each with the reason, for what removes points.
    #[serde(default)]
    pub kept: Vec<PlannedPoint>,
    /// Points that go, each with the reason.
    #[serde(default)]
    pub removed: Vec<PlannedPoint>,
}

/// A point in a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedPoint {
    /// The point.
    #[schema(value_type = String)]
    pub id: RecoveryPointId,
    /// Its machine's name.
    pub datasource: String,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub time: Time,
    /// Why it stays or goes.
    pub why: String,
}

/// Kind of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Initial replication.
    Protect,
    /// A new recovery point.
    Synchronize,
    /// Consistency check.
    Check,
    /// A disk into a file.
    RecoverDisk,
    /// A whole machine.
    RecoverMachine,
    /// A datasource is forgotten.
    RemoveDatasource,
    /// Stored bytes against their hashes.
    Verify,
    /// Unreferenced chunks are freed.
    Reclaim,
    /// Points are dropped by retention.
    Prune,
    /// A second copy of the pool.
    CopyPool,
    /// The catalog is made again.
    RebuildCatalog,
}

impl JobKind {
    /// The word used in API and screens.
    pub fn word(self) -> &'static str {
        match self {
            JobKind::Protect => "protect",
            JobKind::Synchronize => "synchronize",
            JobKind::Check => "check",
            JobKind::RecoverDisk => "recover-disk",
            JobKind::RecoverMachine => "recover-machine",
            JobKind::RemoveDatasource => "remove-datasource",
            JobKind::Verify => "verify",
            JobKind::Reclaim => "reclaim",
            JobKind::Prune => "prune",
            JobKind::CopyPool => "copy-pool",
            JobKind::RebuildCatalog => "rebuild-catalog",
        }
    }
}

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for its turn.
    Queued,
    /// Is at work.
    Running,
    /// Ended as it should; there may be warnings.
    Succeeded,
    /// Ended with a problem.
    Failed,
    /// Was cancelled; nothing of it is left.
    Cancelled,
}

impl JobState {
    /// Whether nothing more will come.
    pub fn ended(self) -> bool {
        matches!(self, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }

    /// The word used in API and screens.
    pub fn word(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Succeeded => "succeeded",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
        }
    }
}

/// A job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// The job.
    #[schema(value_type = String)]
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// How far it is.
    pub state: JobState,
    /// The datasource it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub datasource: Option<DatasourceId>,
    /// That datasource's name when the job started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datasource_name: Option<String>,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Time,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Time>,
    /// What was less than asked although it succeeded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<ProblemBody>)]
    pub warnings: Vec<Problem>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<ProblemBody>)]
    pub problem: Option<Problem>,
    /// What it counted.
    #[serde(flatten)]
    pub figures: Figures,
}

impl Job {
    /// What a command that waited for it returns to the shell.
    pub fn exit_status(&self) -> model::ExitStatus {
        match self.state {
            JobState::Cancelled => model::ExitStatus::Cancelled,
            JobState::Failed => self.problem.as_ref().map_or(model::ExitStatus::Failed, Problem::exit_status),
            _ if self.warnings.iter().any(|w| w.exit_status() == model::ExitStatus::Damaged) => {
                model::ExitStatus::Damaged
            }
            _ if !self.warnings.is_empty() => model::ExitStatus::Warnings,
            _ => model::ExitStatus::Done,
        }
    }
}

/// Figures of a job. Only those that its kind counts are present.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Figures {
    /// Seconds from start to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Bytes of the disks as the machine sees them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_logical: Option<u64>,
    /// Bytes that the change lists name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_listed: Option<u64>,
    /// Bytes read at the source, or in the pool by `verify`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_read: Option<u64>,
    /// Bytes read although the tracker calls them unchanged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_audited: Option<u64>,
    /// Bytes that differ from the replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_changed: Option<u64>,
    /// Block data from agent to server, before compression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_transferred: Option<u64>,
    /// Bytes by which the pool grew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_stored: Option<u64>,
    /// What people should know of what was done, a sentence each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The machine that was made, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// That machine's identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub machine_id: Option<DatasourceId>,
    /// Bytes written to the target of a recovery or a copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_written: Option<u64>,
    /// Bytes that could not be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_lost: Option<u64>,
    /// Sectors of 4 KiB of the pool that were damaged and rebuilt from parity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sectors_repaired: Option<u64>,
    /// Bytes that came free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_freed: Option<u64>,
    /// Bytes that will come free, not before `returns_at`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_returning: Option<u64>,
    /// When that space returns at the earliest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub returns_at: Option<Time>,
    /// Points that were dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub points_removed: Option<u64>,
    /// Points that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub points_kept: Option<u64>,
    /// Why it read what it read: `full scan because: list is against point X, the replica is at Y`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// The point that was made or used.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub recovery_point: Option<RecoveryPointId>,
    /// When that point was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub time: Option<Time>,
    /// That point's consistency.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub consistency: Option<Consistency>,
    /// There was nothing to do: it was protected before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub already: Option<bool>,
    /// The file that was written, or the folder of the copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// What is damaged, at most [`Figures::DAMAGE_ITEMS`] of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<Damage>,
    /// Further damage that is not listed here; the job's log has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage_unlisted: Option<u64>,
}

impl Figures {
    /// The most entries of `damage`; more would make a job's line unreadable, the log takes the rest.
    pub const DAMAGE_ITEMS: usize = 10_000;
}

/// A range of a machine's disk, or a file of the pool, that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Damage {
    /// The file of the pool, relative to it; empty if not known.
    #[serde(default)]
    pub file: String,
    /// The machine's name; empty if the file belongs to no machine.
    #[serde(default)]
    pub datasource: String,
    /// The point.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub recovery_point: Option<RecoveryPointId>,
    /// The disk's number.
    #[serde(default)]
    pub disk: Option<u32>,
    /// First byte of the disk that is lost.
    #[serde(default)]
    pub offset: u64,
    /// Bytes lost; 0 if it is no range of a disk.
    #[serde(default)]
    pub length: u64,
    /// What was found and what was expected.
    pub reason: String,
}

/// How far a running job is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// What it is doing: `reading`, `transferring`, `verifying` ...
    pub phase: String,
    /// Bytes of this phase that are done.
    pub bytes_done: u64,
    /// Bytes of this phase, if known.
    #[serde(default)]
    pub bytes_total: Option<u64>,
    /// Block data moved so far.
    #[serde(default)]
    pub bytes_transferred: u64,
    /// Bytes that the pool grew so far.
    #[serde(default)]
    pub bytes_stored: u64,
    /// Bytes that were already in the pool.
    #[serde(default)]
    pub bytes_deduplicated: u64,
    /// Bytes a second, lately.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Seconds to go, about.
    #[serde(default)]
    pub seconds_left: Option<u64>,
}

/// A line of a job's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobLogLine {
    /// Its number within the job, from 1.
    pub line: u64,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Time,
    /// How much it matters.
    pub level: LogLevel,
    /// One sentence.
    pub message: String,
}

/// How much a log line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// For the record.
    Info,
    /// Less than asked.
    Warning,
    /// Failed.
    Error,
}

/// One line of `GET /jobs/{id}/events`. The last one is `job`, with the job as it ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", tag = "type")]
pub enum JobEvent {
    /// How far it is; only the newest is worth anything.
    Progress(Progress),
    /// A line was added to its log.
    Log(JobLogLine),
    /// It ended.
    Job(Box<Job>),
    /// The events cannot be followed further; the job itself goes on.
    Error(ProblemBody),
}

/// Answer to the start of a job. The job may have ended already, for example when there was nothing to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// The job.
    pub job: Job,
}

//! What travels over the HTTP API (`/api/v1`), and what the command line prints with `--json`.
//!
//! One set of shapes for both: a `--json` line is the API's object with a `"type"` in front, so a script sees the
//! same fields either way. Sizes are bytes, durations seconds, times RFC 3339 UTC. Requests refuse unknown fields; answers
//! may gain fields, so readers ignore what they do not know.
//!
//! Refuses: behaviour. Names are resolved, plans made and jobs run behind the server's `api::Service`.

use model::{
    Code, Consistency, DatasourceId, HostId, JobId, PointState, PoolId, Problem, RecoveryPointId, Timestamp,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// Where every path of the API begins.
pub const BASE: &str = "/api/v1";
/// Items of a page when the caller asks for no number.
pub const PAGE_ITEMS: u32 = 100;
/// The most items of a page.
pub const PAGE_ITEMS_MAX: u32 = 1_000;

/// A point in time, on the wire as `2026-11-22T21:56:27Z`: whole seconds, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub Timestamp);

impl From<Timestamp> for Time {
    fn from(at: Timestamp) -> Time {
        Time(at)
    }
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.rfc3339())
    }
}

impl std::str::FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Time, String> {
        parse_time(text).ok_or_else(|| {
            format!("{text:?} is not a time: expected RFC 3339 UTC such as 2026-11-22T21:56:27Z")
        })
    }
}

/// Accepts exactly what [`Timestamp::rfc3339`] writes.
fn parse_time(text: &str) -> Option<Time> {
    let bytes = text.as_bytes();
    if bytes.len() != 20 || !text.is_ascii() {
        return None;
    }
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':'), (19, b'Z')];
    if separators.iter().any(|&(at, c)| bytes.get(at) != Some(&c)) {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<u64> {
        let digits = text.get(from..to)?;
        if digits.bytes().all(|c| c.is_ascii_digit()) { digits.parse().ok() } else { None }
    };
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let month_days = match month {
        2 => 28 + u64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if year < 1970 || day == 0 || day > month_days || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    // Days since 1970 by years that begin on 1 March, the inverse of `Timestamp::rfc3339`.
    let shifted_year = if month <= 2 { year - 1 } else { year };
    let month_index = (month + 9) % 12;
    let day_of_era_base = shifted_year * 365 + shifted_year / 4 - shifted_year / 100 + shifted_year / 400;
    let days = day_of_era_base + (153 * month_index + 2) / 5 + day - 1 - 719_468;
    Some(Time(Timestamp((days * 86_400 + hour * 3_600 + minute * 60 + second) * Timestamp::SECOND)))
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The items, in the list's own order.
    pub items: Vec<T>,
    /// Give it as `after` to get the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Which part of a list.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PageQuery {
    /// `next` of the page before; from the start if absent.
    pub after: Option<String>,
    /// At most so many items; [`PAGE_ITEMS`] if absent, never more than [`PAGE_ITEMS_MAX`].
    pub limit: Option<u32>,
}

impl PageQuery {
    /// The number of items to give.
    pub fn items(&self) -> u32 {
        self.limit.unwrap_or(PAGE_ITEMS).clamp(1, PAGE_ITEMS_MAX)
    }
}

// ---- Datasources -------------------------------------------------------------------------------------------------

/// How far the protection of a datasource has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DatasourceState {
    /// Known, and nothing more.
    Unprotected,
    /// Its initial replication has begun and is not verified yet.
    Replicating,
    /// It has a verified replica.
    Protected,
    /// It was removed; its points are kept.
    Removed,
}

/// A protected machine, or one that can be protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Datasource {
    /// The machine's own id; a rename keeps it.
    #[schema(value_type = String)]
    pub id: DatasourceId,
    /// Its present name.
    pub name: String,
    /// The host it is on; the server's own machine if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// `images`, and later `hyperv`, `libvirt` ...
    pub provider: String,
    /// How far its protection has come.
    pub state: DatasourceState,
    /// Its protection group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Its disks, by number.
    pub disks: Vec<DatasourceDisk>,
    /// Recovery points it has, soft-deleted ones not counted.
    pub recovery_points: u64,
    /// What `latest` means now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latest: Option<PointBrief>,
}

/// A disk of a datasource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DatasourceDisk {
    /// Its number, from 0.
    pub disk: u32,
    /// Its image file on the host; empty if not known.
    #[serde(default)]
    pub path: String,
    /// `raw`, `vhd`, `vhdx`, `qcow2`.
    pub format: String,
    /// Bytes that the machine sees.
    pub bytes: u64,
}

/// The few words about a recovery point that fit into another row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointBrief {
    /// The point.
    #[schema(value_type = String)]
    pub id: RecoveryPointId,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub time: Time,
    /// How far it can be trusted.
    #[schema(value_type = String)]
    pub consistency: Consistency,
    /// Its state.
    #[schema(value_type = String)]
    pub state: PointState,
}

/// A disk image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk's bytes as they are; holes where the file system can.
    Raw,
    /// Virtual Hard Disk, dynamic.
    Vhd,
    /// Virtual Hard Disk v2, dynamic.
    Vhdx,
    /// QEMU's format, version 3.
    Qcow2,
}

impl DiskFormat {
    /// Every format.
    pub const ALL: [DiskFormat; 4] = [DiskFormat::Raw, DiskFormat::Vhd, DiskFormat::Vhdx, DiskFormat::Qcow2];

    /// The word used in files, API and screens.
    pub fn word(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Vhd => "vhd",
            DiskFormat::Vhdx => "vhdx",
            DiskFormat::Qcow2 => "qcow2",
        }
    }
}

impl std::str::FromStr for DiskFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<DiskFormat, String> {
        DiskFormat::ALL
            .into_iter()
            .find(|format| format.word() == text)
            .ok_or_else(|| format!("{text:?} is not a disk format: expected raw, vhd, vhdx or qcow2"))
    }
}

/// A machine made of image files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddImage {
    /// The name it shall have.
    pub name: String,
    /// The enrolled host that has the files; the server's own machine if absent.
    #[serde(default)]
    pub host: Option<String>,
    /// The image files, absolute paths on that host; disk 0 first.
    pub images: Vec<String>,
    /// Formats by disk; what is missing is found by file name and magic.
    #[serde(default)]
    pub formats: Vec<DiskFormat>,
    /// Folders in which backing files and parents may lie, besides the image's own.
    #[serde(default)]
    pub allow_backing: Vec<String>,
}

/// What becomes of the recovery points of a datasource that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RemoveData {
    /// They stay by their own retention.
    Keep,
    /// They are soft-deleted.
    Delete,
}

// ---- Job requests ------------------------------------------------------------------------------------------------

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

/// Body of `pool verify`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyPool {
    /// Also read and hash every stored byte.
    #[serde(default)]
    pub read_data: bool,
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
            JobRequest::RemoveDatasource { .. } => JobKind::RemoveDatasource,
            JobRequest::VerifyPool(_) => JobKind::Verify,
            JobRequest::Reclaim(_) => JobKind::Reclaim,
            JobRequest::Prune(_) => JobKind::Prune,
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

// ---- Jobs --------------------------------------------------------------------------------------------------------

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
    /// A datasource is forgotten.
    RemoveDatasource,
    /// Stored bytes against their hashes.
    Verify,
    /// Unreferenced chunks are freed.
    Reclaim,
    /// Points are dropped by retention.
    Prune,
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
            JobKind::RemoveDatasource => "remove-datasource",
            JobKind::Verify => "verify",
            JobKind::Reclaim => "reclaim",
            JobKind::Prune => "prune",
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
    /// Bytes written to the target of a recovery.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_written: Option<u64>,
    /// Bytes that could not be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_lost: Option<u64>,
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
    /// The file that was written.
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

// ---- Recovery points ---------------------------------------------------------------------------------------------

/// A recovery point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RecoveryPoint {
    /// The point.
    #[schema(value_type = String)]
    pub id: RecoveryPointId,
    /// Its machine.
    #[schema(value_type = String)]
    pub datasource: DatasourceId,
    /// Its machine's name.
    pub datasource_name: String,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub time: Time,
    /// Its place in the pool's order, which no clock can change.
    pub sequence: u64,
    /// How far it can be trusted.
    #[schema(value_type = String)]
    pub consistency: Consistency,
    /// Its state.
    #[schema(value_type = String)]
    pub state: PointState,
    /// Why it is suspect, damaged or incomplete; empty otherwise.
    #[serde(default)]
    pub reason: String,
    /// Its disks.
    pub disks: Vec<PointDisk>,
    /// When its retention ends; absent if never.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires: Option<Time>,
    /// Which rule keeps it, or lets it go.
    #[serde(default)]
    pub expires_why: String,
    /// Nobody can delete it before.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub locked_until: Option<Time>,
    /// Until when a soft-deleted point can be had back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub undelete_until: Option<Time>,
    /// Stored bytes that only this point needs, if counted.
    #[serde(default)]
    pub bytes_unique: Option<u64>,
    /// When all its bytes were last read and hashed.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub verified_at: Option<Time>,
    /// When a machine was last started from it.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub tested_at: Option<Time>,
    /// Why the job that made it read what it read.
    #[serde(default)]
    pub cause: String,
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointDisk {
    /// Its number, from 0.
    pub disk: u32,
    /// Bytes that the machine saw.
    pub bytes: u64,
    /// The format it had at the source.
    pub format: String,
    /// Logical sector size.
    pub sector_bytes: u32,
}

/// What differs between two points in one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskDiff {
    /// The disk's number.
    pub disk: u32,
    /// Bytes of the blocks that differ.
    pub bytes_changed: u64,
    /// `[offset, length]` in bytes, ascending, whole blocks.
    #[schema(value_type = Vec<Vec<u64>>)]
    pub extents: Vec<(u64, u64)>,
}

/// What differs between two points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointDiff {
    /// The first.
    #[schema(value_type = String)]
    pub a: RecoveryPointId,
    /// The second.
    #[schema(value_type = String)]
    pub b: RecoveryPointId,
    /// By disk.
    pub disks: Vec<DiskDiff>,
}

/// Allocated ranges of a point's disk, one page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AllocatedPage {
    /// Bytes of the disk.
    pub bytes: u64,
    /// `[offset, length]` in bytes, ascending. What lies between reads as zeros.
    #[schema(value_type = Vec<Vec<u64>>)]
    pub extents: Vec<(u64, u64)>,
    /// Ask again from here; absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

// ---- Pool, hosts, alerts, state ----------------------------------------------------------------------------------

/// How the pool is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    /// The pool.
    #[schema(value_type = String)]
    pub pool: PoolId,
    /// Its folder on the server.
    pub path: String,
    /// Bytes of its volume.
    pub bytes_total: u64,
    /// Bytes free on its volume.
    pub bytes_free: u64,
    /// Bytes of its files.
    pub bytes_stored: u64,
    /// Bytes of all points' disks as their machines saw them.
    pub bytes_logical: u64,
    /// Bytes that wait in quarantine.
    pub bytes_quarantined: u64,
    /// Machines with points.
    pub datasources: u64,
    /// Points, soft-deleted ones not counted.
    pub recovery_points: u64,
    /// Number of the newest record of its sequence.
    pub sequence: u64,
    /// Days until it is full, by the growth so far; absent if not foreseeable.
    #[serde(default)]
    pub days_until_full: Option<u64>,
    /// Verified points of a machine that always stay.
    pub floor_points: u32,
    /// Seconds for which every point stays.
    pub floor_seconds: u64,
    /// Seconds for which a deleted point can be had back.
    pub soft_delete_seconds: u64,
    /// Seconds between quarantine and deletion.
    pub reclaim_hold_seconds: u64,
    /// Whether a known damage waits to be healed.
    pub damaged: bool,
}

/// Whether a host is heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Its agent has an open session.
    Connected,
    /// Its agent has not been heard of lately.
    Silent,
    /// Its certificate was revoked.
    Revoked,
}

/// An enrolled host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// The host.
    #[schema(value_type = String)]
    pub id: HostId,
    /// Its name.
    pub name: String,
    /// Whether it is heard of.
    pub state: HostState,
    /// Version of its agent.
    #[serde(default)]
    pub version: String,
    /// Its operating system.
    #[serde(default)]
    pub platform: String,
    /// When its agent was last heard of.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_seen: Option<Time>,
    /// When its certificate ends.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub certificate_until: Option<Time>,
}

/// Asks for an enrolment token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeToken {
    /// How many hosts it may enrol.
    #[serde(default = "one")]
    pub count: u32,
    /// Seconds for which it is valid; 900 if absent.
    #[serde(default)]
    pub valid_seconds: Option<u64>,
}

fn one() -> u32 {
    1
}

/// An enrolment token; shown once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenMade {
    /// The token. It carries the fingerprint of the server's identity key.
    pub token: String,
    /// How many hosts it may enrol.
    pub count: u32,
    /// When it ends.
    #[schema(value_type = String, format = DateTime)]
    pub valid_until: Time,
    /// Fingerprint of the server's identity key.
    pub fingerprint: String,
}

/// How much an alert matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Someone should look at it.
    Warning,
    /// Data is in danger.
    Critical,
}

/// An alert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Alert {
    /// Its number.
    pub id: u64,
    /// How much it matters.
    pub severity: Severity,
    /// The code of its cause.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub code: Option<Code>,
    /// One sentence.
    pub message: String,
    /// What it is about.
    #[serde(default)]
    pub object: String,
    /// When it was first raised.
    #[schema(value_type = String, format = DateTime)]
    pub raised_at: Time,
    /// When somebody took note.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub acknowledged_at: Option<Time>,
}

/// How well everything is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Nothing to do.
    Ok,
    /// Somebody should look.
    Warning,
    /// Data is in danger.
    Critical,
    /// It cannot be told.
    Unknown,
}

impl Health {
    /// The status of `status --check`, as monitoring programs expect it.
    pub fn check_status(self) -> u8 {
        match self {
            Health::Ok => 0,
            Health::Warning => 1,
            Health::Critical => 2,
            Health::Unknown => 3,
        }
    }

    /// The word used in API and screens.
    pub fn word(self) -> &'static str {
        match self {
            Health::Ok => "ok",
            Health::Warning => "warning",
            Health::Critical => "critical",
            Health::Unknown => "unknown",
        }
    }
}

/// One screen about everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// How well everything is.
    pub health: Health,
    /// The pool.
    #[schema(value_type = String)]
    pub pool: PoolId,
    /// Objectives that are breached, one sentence each.
    pub breached: Vec<String>,
    /// Machines with their last good points.
    pub datasources: Vec<Datasource>,
    /// Jobs at work.
    pub running: Vec<Job>,
    /// Jobs that failed in the last 24 hours.
    pub failed: Vec<Job>,
    /// Hosts not heard of.
    pub silent_hosts: Vec<String>,
    /// Alerts nobody took note of.
    pub open_alerts: u64,
    /// Days until the pool is full; absent if not foreseeable.
    #[serde(default)]
    pub days_until_full: Option<u64>,
    /// Bytes free on the pool's volume.
    pub bytes_free: u64,
}

/// Asks for a recovery kit, or for the test of one. The path is the server's: standalone only.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KitFile {
    /// Absolute path; for a test, the place where it was last written if absent.
    #[serde(default)]
    pub path: Option<String>,
    /// Replace an existing file.
    #[serde(default)]
    pub overwrite: bool,
}

/// A recovery kit that was written or tested.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KitReport {
    /// Where it lies.
    pub path: String,
    /// The pool it opens.
    #[schema(value_type = String)]
    pub pool: PoolId,
    /// Whether the pool was opened with nothing but the kit just now.
    pub proved: bool,
}

/// What the server is. The only answer that needs no token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Version of the program.
    pub version: String,
    /// Version of the API.
    pub api: String,
}

/// The body of every answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// The stable code, `SP-` and four digits.
    #[schema(value_type = String)]
    pub code: Code,
    /// What happened, where, what was expected.
    pub message: String,
    /// What it is about; empty if nothing.
    #[serde(default)]
    pub object: String,
    /// What to do next.
    #[serde(default)]
    pub hint: String,
}

impl From<Problem> for ProblemBody {
    fn from(p: Problem) -> ProblemBody {
        ProblemBody { code: p.code, message: p.message, object: p.object, hint: p.hint }
    }
}

impl From<ProblemBody> for Problem {
    fn from(p: ProblemBody) -> Problem {
        Problem { code: p.code, message: p.message, object: p.object, hint: p.hint }
    }
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;

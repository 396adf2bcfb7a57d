//! What travels over the HTTP API (`/api/v1`), and what the command line prints with `--json`.
//!
//! One set of shapes for both: a `--json` line is the API's object with a `"type"` in front, so a script sees the
//! same fields either way. Sizes are bytes, durations seconds, times RFC 3339 UTC. Requests refuse unknown fields; answers
//! may gain fields, so readers ignore what they do not know.
//!
//! Refuses: behaviour. Names are resolved, plans made and jobs run behind the server's `api::Service`.

use model::{
    Code, Consistency, DatasourceId, HostId, PointState, PoolId, Problem, RecoveryPointId, Timestamp,
    Unfrozen,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

mod job;

pub use job::*;

/// Where every path of the API begins.
pub const BASE: &str = "/api/v1";
/// Items of a page when the caller asks for no number.
pub const PAGE_ITEMS: u32 = 100;
/// The most items of a page.
pub const PAGE_ITEMS_MAX: u32 = 10_000;

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

/// An answer to somebody in the same process: the value itself, beside an empty body. Long lists cost more as text, there and
/// back, than they cost to make.
#[derive(Debug, Clone)]
pub struct Direct(std::sync::Arc<dyn std::any::Any + Send + Sync>);

impl Direct {
    /// Takes `value` along.
    pub fn new<T: Send + Sync + 'static>(value: T) -> Direct {
        Direct(std::sync::Arc::new(value))
    }

    /// The value, if it is of this type and nobody else has it.
    pub fn take<T: Send + Sync + 'static>(self) -> Option<T> {
        self.0.downcast::<T>().ok().and_then(std::sync::Arc::into_inner)
    }
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

/// A machine that a host knows by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ListedMachine {
    /// Its identity, from the hypervisor; as a datasource it has the same.
    #[schema(value_type = String)]
    pub id: DatasourceId,
    /// Its name.
    pub name: String,
    /// The enrolled host; nothing for the server's own machine.
    #[serde(default)]
    pub host: Option<String>,
    /// `libvirt`, `hyperv`.
    pub provider: String,
    /// `running`, `paused`, `off`.
    pub power: String,
    /// Whether an agent in the guest answers; nothing where it has none or does not run.
    #[serde(default)]
    pub guest_agent: Option<bool>,
    /// Whether it is a datasource already.
    pub is_datasource: bool,
    /// Its disks.
    pub disks: Vec<ListedDisk>,
}

/// A disk of such a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ListedDisk {
    /// Its name in the machine.
    pub name: String,
    /// Where its bytes are.
    pub storage: String,
    /// Its image format.
    pub format: String,
    /// Its bus.
    pub bus: String,
    /// Its bytes, if they can be told.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Image files of its chain.
    pub chain: u32,
    /// Why it cannot be protected, if so.
    #[serde(default)]
    pub unprotected: Option<String>,
}

/// A machine of a hypervisor, to be a datasource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddMachine {
    /// Its name on its host, or its id.
    pub machine: String,
    /// The enrolled host; the server's own machine if absent.
    #[serde(default)]
    pub host: Option<String>,
    /// Disks to leave out, by their names in the machine. A recovered machine has them empty.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Protect the inside of swap partitions, too.
    #[serde(default)]
    pub keep_swap: bool,
    /// What is made of it when it runs and its file systems cannot be frozen: `fail`, `pause`, or `crash` if absent. Adding the
    /// same machine again changes it.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub without_freeze: Option<Unfrozen>,
    /// Seconds before each of two more attempts to freeze it; 300 if absent.
    #[serde(default)]
    pub freeze_wait_seconds: Option<u64>,
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
    /// Why its view can be trusted as far as its consistency says.
    #[serde(default)]
    pub evidence: String,
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
    /// Parity of its packs, in percent of their bytes; 0 for none.
    #[serde(default)]
    pub parity_percent: u32,
    /// Whether a known damage waits to be healed.
    pub damaged: bool,
    /// Every stored byte was read and proved since then; absent if some never was since it was stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub proved_since: Option<Time>,
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
    /// When its cause was gone.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub resolved_at: Option<Time>,
}

impl Alert {
    /// Whether somebody should still look: nobody took note, and its cause is not gone.
    pub fn stands(&self) -> bool {
        self.acknowledged_at.is_none() && self.resolved_at.is_none()
    }
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
    /// Its recipient's id: 32 hex digits.
    pub recipient: String,
    /// Whether the pool was opened with nothing but the kit just now.
    pub proved: bool,
}

/// Whose key opens the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RecipientKind {
    /// A server's data folder.
    Server,
    /// A recovery kit.
    RecoveryKit,
}

/// Somebody who can open the pool, or could.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Recipient {
    /// As in the line `recipient` of a recovery kit: 32 hex digits.
    pub id: String,
    /// What it is.
    pub kind: RecipientKind,
    /// Revoked: it opens what it could open before, and nothing written since.
    pub revoked: bool,
    /// This server's own.
    pub own: bool,
}

/// A new key generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyGeneration {
    /// Its number; a pool begins with 0.
    pub generation: u32,
    /// The recipient that was revoked by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<String>,
    /// How many can open what is written from now on.
    pub recipients: u64,
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

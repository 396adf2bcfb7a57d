//! What the sequence says: a pure function of its records.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use model::{Consistency, DatasourceId, DomainId, JobId, RecoveryPointId, Timestamp};
use prost::Message;
use prost::bytes::Bytes;

use crate::chunk::{ChunkId, PackId};
use crate::format::payload::{self, Kind};
use crate::proofs::{Part, Proof, Proofs};

/// Longest time between two records that counts as pool time (section 9.3).
pub const MAX_STEP: u64 = 3 * Timestamp::DAY;

/// A disk of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointDisk {
    /// From 0.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// 512 or 4096.
    pub sector: u32,
    /// Root of its map; none for zeros.
    pub root: Option<ChunkId>,
    /// Levels of its map.
    pub levels: u8,
    /// Where the audit goes on.
    pub audit_next: u64,
    /// The point that read this disk in full last.
    pub full_compare: Option<RecoveryPointId>,
}

/// Records missing from the end that are named one by one.
const MOST_MISSING: usize = 4096;

/// Index of what a point keeps of its machine beside the disks: definition, firmware variables. In everything that the pool does it is a disk
/// like the others; it is none for people.
pub const CONFIGURATION: u32 = u32::MAX;

/// A recovery point as the pool keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its record's number: the order of points.
    pub number: u64,
    /// Its id.
    pub id: RecoveryPointId,
    /// The machine.
    pub datasource: DatasourceId,
    /// The machine's name then.
    pub machine: String,
    /// Key domain.
    pub domain: DomainId,
    /// The point it was made from.
    pub base: Option<RecoveryPointId>,
    /// When the view was frozen.
    pub captured: Timestamp,
    /// How far the view can be trusted.
    pub consistency: Consistency,
    /// The disks.
    pub disks: Vec<PointDisk>,
    /// Whether disks are missing.
    pub incomplete: bool,
    /// Payload of its record: opening a pool of many points does not take apart what few commands ask for.
    record: Bytes,
    /// Soft-deleted at this pool time, and why.
    pub deleted: Option<(u64, String)>,
    /// May hold old bytes, and why.
    pub suspect: Option<String>,
    /// When every byte was read and hashed last.
    pub verified: Option<Timestamp>,
    /// Number of the record that changed anything of this last.
    pub changed: u64,
}

/// What a point's record says besides, for those who ask: see [`Point::details`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PointDetails {
    /// The host's name then.
    pub host: String,
    /// Why the view can be trusted as far as it can.
    pub evidence: String,
    /// What was done, and why.
    pub cause: model::Cause,
    /// The job that made it.
    pub job: Option<JobId>,
    /// Figures of that job.
    pub figures: BTreeMap<String, u64>,
    /// Definition of the machine.
    pub definition: String,
    /// What recovery needs to make the image of each disk again, in the order of the point's disks.
    pub descriptions: Vec<String>,
}

impl Point {
    /// The machine's disks, without its configuration.
    pub fn machine_disks(&self) -> impl Iterator<Item = &PointDisk> {
        self.disks.iter().filter(|disk| disk.index != CONFIGURATION)
    }

    /// The machine's configuration, if the point has it.
    pub fn configuration(&self) -> Option<&PointDisk> {
        self.disks.iter().find(|disk| disk.index == CONFIGURATION)
    }

    /// The rest of its record, taken apart now. Nothing where it is no message, which no writer makes: such a record
    /// counts as unreadable when it is read, and only a bundle could still give it.
    pub fn details(&self) -> PointDetails {
        let record = payload::Point::decode(self.record.clone()).unwrap_or_default();
        PointDetails {
            host: record.host,
            evidence: record.evidence,
            cause: model::Cause { decision: record.decision, because: record.because },
            job: JobId::try_from(&record.job[..]).ok(),
            figures: record.figures,
            definition: record.definition,
            descriptions: record.disks.into_iter().map(|disk| disk.description).collect(),
        }
    }
}

/// A pack in quarantine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// Pool time of the record.
    pub since: u64,
    /// Number of the record.
    pub number: u64,
}

/// A record that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Its number.
    pub number: u64,
    /// The file.
    pub path: String,
    /// Why.
    pub reason: String,
    /// The version that it needs, if that is why.
    pub needs: Option<u16>,
    /// The key generation of which this recipient has no key, if that is why.
    pub generation: Option<u16>,
}

/// Everything the sequence says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// Number of the last record; 0 before the first.
    pub head: u64,
    /// Hash of the last record's file.
    pub head_hash: [u8; 32],
    /// Takeovers so far.
    pub epoch: u64,
    /// Data folder that took over last.
    pub server: Vec<u8>,
    /// Pool time (section 9.3), microseconds.
    pub pool_time: u64,
    /// Writer's time of the last record.
    pub last_time: u64,
    /// Domains and their labels.
    pub domains: BTreeMap<DomainId, String>,
    /// Points by id. Expired points stay, for their history.
    pub points: BTreeMap<RecoveryPointId, Point>,
    /// Points in order of their numbers.
    pub order: BTreeMap<u64, RecoveryPointId>,
    /// Newest version of each document.
    pub documents: BTreeMap<String, Vec<u8>>,
    /// Packs in quarantine.
    pub quarantined: BTreeMap<PackId, Quarantined>,
    /// Packs that may be unlinked, by the number of the permit.
    pub permitted: BTreeMap<PackId, u64>,
    /// Damaged frames by pack; an empty set means the whole pack.
    pub damaged: HashMap<PackId, BTreeSet<u32>>,
    /// Which packs were proved when.
    pub proofs: Proofs,
    /// Key generation that is sealed under: the newest of any record.
    pub generation: u16,
    /// Number of the last rotation's record.
    pub rotated: u64,
    /// Hash of the content of each generation's ring, as its rotation says.
    pub rings: BTreeMap<u16, Vec<u8>>,
    /// Recipients that were removed.
    pub removed: BTreeSet<crate::kit::RecipientId>,
    /// Records that cannot be read.
    pub unreadable: Vec<Unreadable>,
}

impl State {
    /// Applies a record whose payload was opened. An error means that it counts as unreadable.
    pub fn apply(
        &mut self,
        number: u64,
        epoch: u64,
        time: u64,
        kind: u16,
        bytes: &Bytes,
    ) -> Result<(), String> {
        let kind = Kind::of(kind).ok_or_else(|| format!("kind {kind} is not known to this version"))?;
        self.pass_time(time);
        match kind {
            Kind::Created | Kind::Tick => {}
            Kind::Takeover => {
                let record: payload::Takeover = decode(bytes)?;
                self.epoch = epoch.max(self.epoch);
                self.server = record.server;
            }
            Kind::Domain => {
                let record: payload::Domain = decode(bytes)?;
                let id = DomainId::try_from(&record.domain[..]).map_err(|error| error.to_string())?;
                self.domains.insert(id, record.label);
            }
            Kind::Point => {
                let point = point(number, bytes)?;
                self.order.insert(number, point.id);
                self.points.insert(point.id, point);
            }
            Kind::Tombstone => {
                let record: payload::PointMark = decode(bytes)?;
                let since = self.pool_time;
                // The point's own record may be unreadable; then there is nothing to mark.
                if let Some(point) = self.point_mut(&record.point)?
                    && point.deleted.is_none()
                {
                    point.deleted = Some((since, record.reason));
                    point.changed = number;
                }
            }
            Kind::Undelete => {
                let record: payload::PointMark = decode(bytes)?;
                if let Some(point) = self.point_mut(&record.point)? {
                    point.deleted = None;
                    point.changed = number;
                }
            }
            Kind::Quarantine => {
                let record: payload::Packs = decode(bytes)?;
                for pack in packs(&record.packs)? {
                    self.quarantined.entry(pack).or_insert(Quarantined { since: self.pool_time, number });
                }
            }
            Kind::Release => {
                let record: payload::Packs = decode(bytes)?;
                for pack in packs(&record.packs)? {
                    self.quarantined.remove(&pack);
                }
            }
            Kind::Permit => {
                let record: payload::Packs = decode(bytes)?;
                for pack in packs(&record.packs)? {
                    self.quarantined.remove(&pack);
                    self.damaged.remove(&pack);
                    self.permitted.insert(pack, number);
                }
            }
            Kind::Document => {
                let record: payload::Document = decode(bytes)?;
                if record.removed {
                    self.documents.remove(&record.name);
                } else {
                    self.documents.insert(record.name, record.bytes);
                }
            }
            Kind::Damage => {
                let record: payload::Damage = decode(bytes)?;
                for pack in packs(&record.pack)? {
                    let whole = self.damaged.get(&pack).is_some_and(BTreeSet::is_empty);
                    let frames = self.damaged.entry(pack).or_default();
                    if record.frames.is_empty() {
                        frames.clear();
                    } else if !whole {
                        frames.extend(&record.frames);
                    }
                }
            }
            Kind::Suspect => {
                let record: payload::PointsMark = decode(bytes)?;
                for id in payload::ids(&record.points).ok_or("ids of points are cut off")? {
                    if let Some(point) = self.points.get_mut(&RecoveryPointId(id)) {
                        point.suspect = Some(record.reason.clone());
                        point.changed = number;
                    }
                }
            }
            Kind::Verified => {
                let record: payload::PointsMark = decode(bytes)?;
                for id in payload::ids(&record.points).ok_or("ids of points are cut off")? {
                    if let Some(point) = self.points.get_mut(&RecoveryPointId(id)) {
                        point.verified = Some(Timestamp(time));
                        point.changed = number;
                    }
                }
            }
            Kind::Proved => {
                let record: payload::Proved = decode(bytes)?;
                let part = Part::new(record.from, record.length)
                    .ok_or_else(|| format!("a part of {} pack ids from {}", record.length, record.from))?;
                self.proofs.add(part, Proof { pool_time: self.pool_time, time });
            }
            Kind::Rotation => {
                let record: payload::Rotation = decode(bytes)?;
                let generation =
                    u16::try_from(record.generation).map_err(|_| "a key generation past 65535".to_owned())?;
                self.generation = self.generation.max(generation);
                self.rotated = number;
                self.rings.insert(generation, record.ring);
                let removed = payload::ids(&record.removed).ok_or("ids of recipients are cut off")?;
                self.removed.extend(removed.into_iter().map(crate::kit::RecipientId));
            }
            // Its content was applied in the place of the record that it restores.
            Kind::Restored => {
                decode::<payload::Restored>(bytes)?;
            }
        }
        Ok(())
    }

    /// Names the records up to `head` that should be there, or the first of very many: something durable knows of record
    /// `head`.
    pub(crate) fn expect_head(&mut self, head: u64, path: impl Fn(u64) -> String) {
        if head <= self.head {
            return;
        }
        let told: BTreeSet<u64> = self.unreadable.iter().map(|known| known.number).collect();
        for number in (self.head + 1..=head).take(MOST_MISSING) {
            // A file under that name which is no record is told of already.
            if !told.contains(&number) {
                let reason = "is missing from the end of the sequence".to_owned();
                self.unreadable.push(Unreadable {
                    number,
                    path: path(number),
                    reason,
                    needs: None,
                    generation: None,
                });
            }
        }
        self.unreadable.sort_by_key(|record| record.number);
        self.head = head;
        self.head_hash = crate::format::record::UNKNOWN;
    }

    /// Pool time moves with the writer's time (section 9.3).
    fn pass_time(&mut self, time: u64) {
        if self.last_time != 0 {
            self.pool_time += time.saturating_sub(self.last_time).min(MAX_STEP);
        }
        self.last_time = time;
    }

    fn point_mut(&mut self, id: &[u8]) -> Result<Option<&mut Point>, String> {
        let id = RecoveryPointId::try_from(id).map_err(|error| error.to_string())?;
        Ok(self.points.get_mut(&id))
    }

    /// Points in order, oldest first.
    pub fn in_order(&self) -> impl DoubleEndedIterator<Item = &Point> {
        self.order.values().filter_map(|id| self.points.get(id))
    }

    /// Whether a soft-deleted point's period is over.
    pub fn is_expired(&self, point: &Point, soft_delete_seconds: u64) -> bool {
        self.is_expired_at(point, soft_delete_seconds, self.pool_time)
    }

    /// Whether a soft-deleted point's period was over at pool time `at`, for whoever began then.
    pub fn is_expired_at(&self, point: &Point, soft_delete_seconds: u64, at: u64) -> bool {
        point.deleted.as_ref().is_some_and(|(since, _)| {
            at.checked_sub(*since)
                .is_some_and(|passed| passed >= soft_delete_seconds.saturating_mul(Timestamp::SECOND))
        })
    }

    /// Whether a frame may be used for new points.
    pub fn is_healthy(&self, pack: PackId, frame: u32) -> bool {
        if self.quarantined.contains_key(&pack) || self.permitted.contains_key(&pack) {
            return false;
        }
        self.is_undamaged(pack, frame)
    }

    /// Whether no damage of a frame is recorded.
    pub fn is_undamaged(&self, pack: PackId, frame: u32) -> bool {
        self.damaged.get(&pack).is_none_or(|frames| !frames.is_empty() && !frames.contains(&frame))
    }
}

fn decode<M: Message + Default>(bytes: &Bytes) -> Result<M, String> {
    M::decode(bytes.clone()).map_err(|error| error.to_string())
}

fn packs(bytes: &[u8]) -> Result<Vec<PackId>, String> {
    Ok(payload::ids(bytes).ok_or("ids of packs are cut off")?.into_iter().map(PackId).collect())
}

fn point(number: u64, bytes: &Bytes) -> Result<Point, String> {
    let record: payload::PointHead = decode(bytes)?;
    let text = |error: model::id::NotAnId| error.to_string();
    let optional = |bytes: &[u8]| -> Result<Option<RecoveryPointId>, String> {
        if bytes.is_empty() { Ok(None) } else { RecoveryPointId::try_from(bytes).map(Some).map_err(text) }
    };
    let disks = record
        .disks
        .into_iter()
        .map(|disk| {
            let root = if disk.root.is_empty() {
                None
            } else {
                Some(ChunkId(disk.root[..].try_into().map_err(|_| "a map's root is not a chunk id")?))
            };
            let blocks = disk.size.div_ceil(model::BLOCK_BYTES);
            if disk.levels != u32::from(crate::format::node::levels(blocks))
                || !matches!(disk.sector, 512 | 4096)
            {
                return Err(format!(
                    "disk {} of {} bytes with {} map levels",
                    disk.index, disk.size, disk.levels
                ));
            }
            Ok(PointDisk {
                index: disk.index,
                size: disk.size,
                sector: disk.sector,
                root,
                levels: disk.levels as u8,
                audit_next: disk.audit_next,
                full_compare: optional(&disk.full_compare)?,
            })
        })
        .collect::<Result<Vec<_>, String>>()?;
    Ok(Point {
        number,
        id: RecoveryPointId::try_from(&record.point[..]).map_err(text)?,
        datasource: DatasourceId::try_from(&record.datasource[..]).map_err(text)?,
        machine: record.machine,
        domain: DomainId::try_from(&record.domain[..]).map_err(text)?,
        base: optional(&record.base)?,
        captured: Timestamp(record.captured),
        consistency: record.consistency.parse()?,
        disks,
        incomplete: record.incomplete,
        record: bytes.clone(),
        deleted: None,
        suspect: None,
        verified: None,
        changed: number,
    })
}

/// Whether the whole payload of a point's record is what [`Point::details`] can take apart.
pub(crate) fn is_whole_point(bytes: &Bytes) -> Result<(), String> {
    let record: payload::Point = decode(bytes)?;
    if !record.job.is_empty() {
        JobId::try_from(&record.job[..]).map_err(|error| error.to_string())?;
    }
    Ok(())
}

//! A disk of a recovery point to a file of a host.

use std::sync::Arc;

use block_io::{BlockDevice, ByteRange, DeviceError, Pace};
use model::{BaseImage, Code, Consistency, PointState, Problem, RangeSet};
use storage_pool::state::{Point, State};
use storage_pool::{PointDevice, Pool};
use transfer::{BlockHash, Delivered, Delivery, DeliverySettings, Figures, LinkError, PointDisk, Progress};

use crate::port::{JobContext, LogLevel, ProtectedHost, ReceiveOrder};
use crate::problem;

/// What is recovered, where to and how.
#[derive(Clone)]
pub struct Recovery {
    /// The point.
    pub point: Point,
    /// Its disk, from 0.
    pub disk: u32,
    /// The file, a path of the host.
    pub path: String,
    /// Its format.
    pub format: String,
    /// The image that the file is a difference to; a full image if absent.
    pub over: Option<BaseImage>,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
    /// Whether the target's disk is waited for.
    pub sync: bool,
    /// Whether to write all that is good and list the rest.
    pub accept_damage: bool,
    /// Less is refused.
    pub min_consistency: Option<Consistency>,
    /// How fast at most.
    pub pace: Option<Arc<dyn Pace>>,
    /// zstd level on the way; none in one process.
    pub compress: Option<i32>,
}

/// What was recovered.
#[derive(Debug, Clone)]
pub struct Recovered {
    /// What moved.
    pub figures: Figures,
    /// Bytes of the disk that could not be had and are zeros in the file.
    pub lost: RangeSet,
    /// Whether the file was read back and was equal.
    pub verified: bool,
}

/// The state of a point as people see it.
pub fn state_of(pool: &Pool, point: &Point, is_damaged: bool) -> PointState {
    state_in(&pool.state(), pool.settings().soft_delete, point, is_damaged)
}

/// The same for a pool that says `state` and keeps soft-deleted points for `soft_delete` seconds.
pub fn state_in(state: &State, soft_delete: u64, point: &Point, is_damaged: bool) -> PointState {
    match point {
        point if state.is_expired(point, soft_delete) => PointState::Expired,
        point if point.deleted.is_some() => PointState::SoftDeleted,
        _ if is_damaged => PointState::Damaged,
        point if point.suspect.is_some() => PointState::Suspect,
        point if point.incomplete => PointState::Incomplete,
        point if point.verified.is_some() => PointState::Verified,
        _ => PointState::Committed,
    }
}

struct Reported<'a> {
    context: &'a dyn JobContext,
}

impl Progress for Reported<'_> {
    fn update(&self, figures: &Figures) {
        self.context.progress(figures.bytes_announced, figures.bytes_transferred, 0, 0);
    }
}

/// Refuses a point that is less than asked for, or suspect.
pub(crate) fn check_usable(
    point: &Point,
    min_consistency: Option<Consistency>,
    accept_damage: bool,
) -> Result<(), Problem> {
    if let Some(least) = min_consistency
        && point.consistency < least
    {
        return Err(Problem::new(
            Code::PointNotUsable,
            format!(
                "Recovery point {} is {}-consistent, asked for was at least {}.",
                point.id,
                point.consistency.word(),
                least.word()
            ),
        )
        .hint("Choose another point, or a lower --min-consistency."));
    }
    if let Some(reason) = &point.suspect
        && !accept_damage
    {
        return Err(Problem::new(
            Code::PointNotUsable,
            format!("Recovery point {} is suspect: {reason}.", point.id),
        )
        .about(point.id.to_string()));
    }
    Ok(())
}

/// Runs a recovery.
pub fn run(
    pool: &Arc<Pool>,
    host: &dyn ProtectedHost,
    recovery: &Recovery,
    context: &dyn JobContext,
) -> Result<Recovered, Problem> {
    let point = &recovery.point;
    check_usable(point, recovery.min_consistency, recovery.accept_damage)?;
    let found =
        point.machine_disks().zip(point.details().descriptions).find(|(disk, _)| disk.index == recovery.disk);
    let (disk, description) = found.ok_or_else(|| {
        Problem::new(
            Code::NotFound,
            format!(
                "Recovery point {} has no disk {}; it has {} disks, from 0.",
                point.id,
                recovery.disk,
                point.machine_disks().count()
            ),
        )
    })?;
    let device = PoolDisk(pool.open_disk(point.id, recovery.disk).map_err(problem::pool)?);
    let order = ReceiveOrder {
        job: context.id(),
        point: point.id,
        disk: recovery.disk,
        path: recovery.path.clone(),
        format: recovery.format.clone(),
        size: disk.size,
        sector: disk.sector,
        description,
        over: recovery.over.clone(),
        overwrite: recovery.overwrite,
        sync: recovery.sync,
        steer: context.steer().clone(),
    };
    context.phase("recovering", Some(disk.size));
    let mut receiving = host.receive(order)?;
    let settings = DeliverySettings {
        compress: recovery.compress,
        // What was not waited for is read back from memory, which proves nothing about the disk.
        verify: recovery.sync,
        sync: recovery.sync,
        accept_damage: recovery.accept_damage,
        pace: recovery.pace.clone(),
        ..DeliverySettings::default()
    };
    let reported = Reported { context };
    let mut delivery = Delivery::new(&device, settings, &reported, context.steer().clone());
    let report = loop {
        let link = receiving.link().map_err(|why| {
            receiving.failure().unwrap_or_else(|| match why {
                LinkError::Cancelled => problem::cancelled(),
                LinkError::Cut(why) => Problem::new(
                    Code::AgentUnreachable,
                    format!("The protection agent is unreachable: {why}."),
                ),
            })
        })?;
        match delivery.serve(link) {
            Ok(Delivered::Finished(report)) => break report,
            Ok(Delivered::Cut) => {
                if let Some(problem) = receiving.failure() {
                    return Err(problem);
                }
                context.log(LogLevel::Warning, "The link broke; waiting for it to come back.".to_owned());
            }
            Err(error) => {
                let said = receiving.failure();
                return Err(problem::delivery(error, said));
            }
        }
    };
    receiving.conclude()?;
    for range in report.lost.iter() {
        context.log(
            LogLevel::Warning,
            format!(
                "Lost: bytes {}..{} of disk {} ({} bytes), zeros in {}.",
                range.start,
                range.end,
                recovery.disk,
                range.len(),
                recovery.path
            ),
        );
    }
    Ok(Recovered { figures: report.figures, lost: report.lost, verified: report.verified })
}

/// A disk of a point as the delivery reads it: the hashes by which the pool proved its blocks go along.
struct PoolDisk(PointDevice);

impl BlockDevice for PoolDisk {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.0.logical_sector_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_at(offset, buf)
    }

    fn next_allocated(&self, from: u64) -> Result<Option<ByteRange>, DeviceError> {
        self.0.next_allocated(from)
    }
}

impl PointDisk for PoolDisk {
    fn read_hashed(&self, first: u64, buf: &mut [u8]) -> Result<Vec<BlockHash>, DeviceError> {
        Ok(self.0.read_hashed(first, buf)?.into_iter().map(BlockHash).collect())
    }

    fn is_equal(&self, block: u64, hash: Option<&BlockHash>) -> Result<bool, DeviceError> {
        self.0.is_equal(block, hash.map(|hash| &hash.0))
    }

    fn will_read(&self, blocks: std::ops::Range<u64>) {
        self.0.will_read(blocks);
    }
}

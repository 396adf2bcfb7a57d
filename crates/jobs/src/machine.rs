//! A whole machine of a recovery point to a host: prepare, each disk, complete (docs/design/0021).
//!
//! Until a host has completed, what was there is as it was; a recovery that fails is abandoned.

use std::sync::Arc;

use block_io::{BlockDevice, Pace};
use model::{
    BLOCK_BYTES, ByteRange, Code, CompletedMachine, Consistency, DomainId, Identity, MachineRecovery,
    Network, Place, PreparedMachine, Problem, RangeSet, RecoveredDisk,
};
use storage_pool::state::{CONFIGURATION, Point, PointDisk};
use storage_pool::{MapReader, MapRoot, Pool, PoolError, PoolNodes};

use crate::port::{JobContext, LogLevel, ProtectedHost};
use crate::problem;
use crate::recover::{self, Recovery};

/// A configuration is text of some kilobytes, and firmware variables.
const CONFIGURATION_BYTES: u64 = 16 << 20;

/// What is recovered, where to and how.
#[derive(Clone)]
pub struct WholeMachine {
    /// The point.
    pub point: Point,
    /// Where to.
    pub place: Place,
    /// Its name; chosen by the host if absent.
    pub name: Option<String>,
    /// Who it is.
    pub identity: Identity,
    /// What its adapters are connected to.
    pub network: Network,
    /// Whether it is started in the end.
    pub start: bool,
    /// Less is refused.
    pub min_consistency: Option<Consistency>,
    /// How fast at most.
    pub pace: Option<Arc<dyn Pace>>,
    /// zstd level on the way; none in one process.
    pub compress: Option<i32>,
}

/// What was recovered.
#[derive(Debug, Clone)]
pub struct RecoveredMachine {
    /// The machine.
    pub machine: CompletedMachine,
    /// What moved, of all disks.
    pub figures: transfer::Figures,
    /// The files of its disks.
    pub files: Vec<String>,
    /// What people should know, a sentence each.
    pub notes: Vec<String>,
}

/// A disk of a point in the pool: its domain, its map, its bytes.
#[derive(Debug, Clone, Copy)]
pub struct StoredDisk {
    domain: DomainId,
    map: MapRoot,
    size: u64,
}

impl StoredDisk {
    /// A disk of no bytes in the same domain.
    pub fn without_data(self) -> StoredDisk {
        StoredDisk { map: MapRoot { root: None, levels: 1 }, size: 0, ..self }
    }

    /// The disk with this index; one of no bytes if the point has none.
    pub fn of(point: &Point, index: u32) -> StoredDisk {
        let disk = point.disks.iter().find(|disk| disk.index == index);
        let map = disk.map_or(MapRoot { root: None, levels: 1 }, |disk| MapRoot {
            root: disk.root,
            levels: disk.levels,
        });
        StoredDisk { domain: point.domain, map, size: disk.map_or(0, |disk| disk.size) }
    }
}

/// Where two disks differ, from their maps. Domains name the same bytes differently, so across two of them all that is there differs.
pub fn differing(pool: &Arc<Pool>, a: StoredDisk, b: StoredDisk) -> Result<RangeSet, PoolError> {
    let open = |disk: StoredDisk| MapReader::new(PoolNodes::new(pool, disk.domain), disk.map);
    let (one, other, size) = (open(a), open(b), a.size.max(b.size));
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let (next, also) = (one.next_present(at)?, other.next_present(at)?);
        let Some(block) = [next, also].into_iter().flatten().map(|(block, _)| block).min() else { break };
        let content = |found: Option<(u64, _)>| found.filter(|(at, _)| *at == block).map(|(_, chunk)| chunk);
        if content(next) != content(also) {
            let start = block * BLOCK_BYTES;
            ranges.push(ByteRange { start, end: (start + BLOCK_BYTES).min(size) });
        }
        at = block + 1;
    }
    Ok(ranges.into_iter().collect())
}

fn configuration(pool: &Arc<Pool>, point: &Point) -> Result<String, Problem> {
    let missing = |why: &str| {
        Problem::new(Code::PointNotUsable, format!("Recovery point {} {why}.", point.id))
            .about(point.id.to_string())
            .hint("Its disks can be recovered one by one: `stillpoint recover disk`.")
    };
    let Some(stored) = point.configuration() else {
        return Err(missing("does not hold the machine's definition, only its disks"));
    };
    let length = usize::try_from(stored.size.min(CONFIGURATION_BYTES)).unwrap_or_default();
    let mut text = vec![0; length];
    let device = pool.open_disk(point.id, CONFIGURATION).map_err(problem::pool)?;
    device
        .read_at(0, &mut text)
        .map_err(|error| missing(&format!("has a damaged definition of the machine: {error}")))?;
    String::from_utf8(text).map_err(|_| missing("has a definition of the machine that is no text"))
}

/// What is asked of the host.
fn asked(
    pool: &Arc<Pool>,
    whole: &WholeMachine,
    newest: Option<&Point>,
    context: &dyn JobContext,
) -> Result<MachineRecovery, Problem> {
    let point = &whole.point;
    let details = point.details();
    let disk = |(disk, description): (&PointDisk, String)| -> Result<RecoveredDisk, Problem> {
        let stored = StoredDisk::of(point, disk.index);
        let data = differing(pool, stored, stored.without_data()).map_err(problem::pool)?;
        let changed = match newest {
            Some(newest) => {
                differing(pool, stored, StoredDisk::of(newest, disk.index)).map_err(problem::pool)?
            }
            None => data.clone(),
        };
        Ok(RecoveredDisk {
            disk: disk.index,
            size: disk.size,
            sector: disk.sector,
            description,
            data_bytes: data.bytes(),
            changed_bytes: changed.bytes(),
        })
    };
    Ok(MachineRecovery {
        job: context.id(),
        point: point.id,
        machine: point.datasource,
        machine_name: point.machine.clone(),
        spec: details.definition,
        configuration: configuration(pool, point)?,
        disks: point.machine_disks().zip(details.descriptions).map(disk).collect::<Result<_, Problem>>()?,
        place: whole.place.clone(),
        name: whole.name.clone(),
        identity: whole.identity,
        network: whole.network.clone(),
        start: whole.start,
        keep_seconds: MachineRecovery::KEEP_SECONDS,
    })
}

/// Runs the recovery of a machine. `newest` is the newest point of it.
pub fn run(
    pool: &Arc<Pool>,
    host: &dyn ProtectedHost,
    whole: &WholeMachine,
    newest: Option<&Point>,
    context: &dyn JobContext,
) -> Result<RecoveredMachine, Problem> {
    recover::check_usable(&whole.point, whole.min_consistency, false)?;
    let recovery = asked(pool, whole, newest, context)?;
    context.phase("preparing", None);
    let prepared = host.prepare_machine(&recovery)?;
    let outcome = fill_and_complete(pool, host, whole, &recovery, &prepared, context);
    if let Err(problem) = &outcome
        && matches!(whole.place, Place::Original { .. })
    {
        // A swap that was asked for and whose answer got lost may have happened: the host looks before it removes anything.
        if let Err(left) = host.abandon_machine(&recovery, &prepared) {
            context.log(
                LogLevel::Warning,
                format!(
                    "What was made before \"{}\" stays until the host is swept: {}",
                    problem.message, left.message
                ),
            );
        }
    }
    outcome
}

fn fill_and_complete(
    pool: &Arc<Pool>,
    host: &dyn ProtectedHost,
    whole: &WholeMachine,
    recovery: &MachineRecovery,
    prepared: &PreparedMachine,
    context: &dyn JobContext,
) -> Result<RecoveredMachine, Problem> {
    for note in &prepared.notes {
        context.log(LogLevel::Info, note.clone());
    }
    let mut figures = transfer::Figures::default();
    let mut files = Vec::new();
    for disk in &prepared.disks {
        files.push(disk.path.clone());
        if disk.is_done {
            context.log(LogLevel::Info, format!("Disk {} is at {} already, whole.", disk.disk, disk.path));
            continue;
        }
        let against = match &disk.over {
            Some(base) => format!(", as a difference to {}", base.path),
            None => String::new(),
        };
        context.log(
            LogLevel::Info,
            format!("Disk {} goes to {} ({}{against}).", disk.disk, disk.path, disk.format),
        );
        let order = Recovery {
            point: whole.point.clone(),
            disk: disk.disk,
            path: disk.path.clone(),
            format: disk.format.clone(),
            over: disk.over.clone(),
            overwrite: false,
            sync: true,
            accept_damage: false,
            min_consistency: whole.min_consistency,
            pace: whole.pace.clone(),
            compress: whole.compress,
        };
        let recovered = recover::run(pool, host, &order, context)?;
        figures.bytes_logical += recovered.figures.bytes_logical;
        figures.bytes_read += recovered.figures.bytes_read;
        figures.bytes_transferred += recovered.figures.bytes_transferred;
        figures.bytes_on_wire += recovered.figures.bytes_on_wire;
    }
    if context.steer().is_cancelled() {
        return Err(problem::cancelled());
    }
    context.phase("completing", None);
    // The answer can get lost after the machine was made; asked again, the host says what is.
    let machine = host.complete_machine(recovery, prepared).or_else(|problem| {
        if problem.code != Code::AgentUnreachable {
            return Err(problem);
        }
        context.log(LogLevel::Warning, format!("{} Asking again.", problem.message));
        host.complete_machine(recovery, prepared)
    })?;
    for note in &machine.notes {
        context.log(LogLevel::Info, note.clone());
    }
    let notes = prepared.notes.iter().chain(&machine.notes).cloned().collect();
    Ok(RecoveredMachine { machine, figures, files, notes })
}

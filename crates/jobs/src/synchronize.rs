//! Initial replication, synchronisation and consistency check: one pipe, three decisions.
//!
//! ```text
//! inspect -> plan -> freeze and send -> receive -> [full compare] -> view stood still -> prove -> commit
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{BLOCK_BYTES, ByteRange, Code, Consistency, Problem, RangeSet, RecoveryPointId, Timestamp};
use storage_pool::state::{CONFIGURATION, Point, State};
use storage_pool::{FullCompare, Ingest, MapRoot, NewDisk, NewPoint, Pool};
use transfer::{
    Differences, DiskOrder, ExpectedDisk, ExpectedMode, Figures, Mode, Progress, Reception, Served,
};

use crate::decide::{self, Plan, Read, Refusal, Replica, ReplicaDisk, Wish};
use crate::port::{JobContext, LogLevel, Machine, MachineView, ProtectedHost, SendOrder};
use crate::problem;
use crate::scratch::{Churn, VIEW_MILLIS};
use crate::store::{PoolStore, StoreDisk};

/// Document of the pool that says up to which record no point may be the base of a change list: set when a pool was
/// found older than it had been.
pub const DOUBT_DOCUMENT: &str = "doubt/change-lists-before";

/// What a run did.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The new point.
    pub point: Point,
    /// What moved.
    pub figures: Figures,
    /// Bytes by which the pool's packs grew.
    pub stored: u64,
    /// Where the source differed from the replica.
    pub differences: Differences,
    /// Points that are in doubt since this run.
    pub suspects: Vec<RecoveryPointId>,
}

/// The newest point of a machine that its next point can be made from, with what is known against it.
///
/// A deleted point serves no more, even while it could be had back: what it names may be reclaimed. A suspect one does:
/// content is compared, not believed. Only change lists need more.
pub fn replica(pool: &Arc<Pool>, machine: model::DatasourceId) -> Result<Option<(Point, Replica)>, Problem> {
    let state = pool.state().clone();
    let soft_delete = pool.settings().soft_delete;
    let Some(point) = state
        .in_order()
        .rev()
        .filter(|point| point.datasource == machine)
        .find(|point| !state.is_expired(point, soft_delete) && point.deleted.is_none())
        .cloned()
    else {
        return Ok(None);
    };
    let mut disks = BTreeMap::new();
    let mut descriptions = point.details().descriptions.into_iter();
    for disk in point.machine_disks() {
        let map = MapRoot { root: disk.root, levels: disk.levels };
        let lost = pool.lost_blocks(point.domain, map).map_err(problem::pool)?;
        // A lost node is a part of the map that cannot be built upon.
        let map_is_lost = lost.iter().any(|blocks| blocks.end - blocks.start > 1);
        let damaged = lost
            .iter()
            .map(|blocks| ByteRange {
                start: blocks.start.saturating_mul(BLOCK_BYTES),
                end: blocks.end.saturating_mul(BLOCK_BYTES).min(disk.size),
            })
            .collect();
        let known = ReplicaDisk {
            size: disk.size,
            rotation: disk.audit_next,
            damaged: (!map_is_lost).then_some(damaged),
            description: descriptions.next().unwrap_or_default(),
        };
        disks.insert(disk.index, known);
    }
    let doubt = doubt(pool, &state, &point);
    let replica = Replica { point: point.id, disks, doubt };
    Ok(Some((point, replica)))
}

/// Why a change list against `point` proves nothing, if so.
fn doubt(pool: &Pool, state: &State, point: &Point) -> Option<String> {
    if let Some(reason) = &point.suspect {
        return Some(format!("the newest point is suspect ({reason})"));
    }
    if let Some(newer) = state.in_order().rev().find(|other| other.datasource == point.datasource)
        && newer.id != point.id
    {
        return Some(format!("the newest point {} was deleted, the list may be against it", newer.id));
    }
    if state.unreadable.iter().any(|record| record.number > point.number) {
        return Some(
            "a record of the pool after the newest point cannot be read, it may be a newer point".to_owned(),
        );
    }
    // A document that cannot be understood doubts everything.
    let before: u64 = pool.document(DOUBT_DOCUMENT).map_or(0, |bytes| {
        String::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX)
    });
    (point.number <= before)
        .then(|| "the pool was found older than it had been, so newer points may be lost".to_owned())
}

/// What a run would do; reads the host's view of the machine and the pool's, changes nothing.
pub fn plan(
    pool: &Arc<Pool>,
    host: &dyn ProtectedHost,
    machine: &Machine,
    wish: &Wish,
) -> Result<(Plan, MachineView, Option<Point>), Problem> {
    let view = host.inspect(machine)?;
    let found = replica(pool, machine.id)?;
    let (point, replica) = found.unzip();
    let plan =
        decide::plan(wish, &view.disks, replica.as_ref()).map_err(|refusal| refuse(machine, &refusal))?;
    Ok((plan, view, point))
}

fn refuse(machine: &Machine, refusal: &Refusal) -> Problem {
    let problem = match refusal {
        Refusal::NoSuchDisk(disk) => Problem::new(
            Code::ChangedExtents,
            format!("A list of changed extents is for disk {disk}, which {} does not have.", machine.name),
        ),
        Refusal::OutsideDisk { disk, size, range } => Problem::new(
            Code::ChangedExtents,
            format!(
                "The list of changed extents of disk {disk} names bytes {}..{}, the disk has {size}.",
                range.start, range.end
            ),
        ),
        Refusal::NotProtected => {
            Problem::new(Code::ReplicaNotReady, format!("{} has no verified replica yet.", machine.name))
                .hint(format!("Run `stillpoint protect {}` first.", machine.name))
        }
    };
    problem.about(machine.name.clone())
}

/// Somebody else made or judged points of the machine while this run made one.
fn overtaken(machine: &Machine) -> Problem {
    Problem::new(
        Code::SourceBusy,
        format!("Another job changed the replica of {} while this one ran.", machine.name),
    )
    .about(machine.name.clone())
}

/// Refuses a run whose ground has moved: its plan trusted a replica that is not the newest, or not trusted, any more.
/// Whoever starts jobs lets one of a machine run at a time; this is for the day when that fails.
fn prove_ground(pool: &Pool, machine: &Machine, base: Option<&Point>) -> Result<(), Problem> {
    let state = pool.state();
    let is_newer = |point: &Point| base.is_none_or(|base| point.number > base.number);
    let newer = state.in_order().rev().find(|point| point.datasource == machine.id).filter(|p| is_newer(p));
    // Before the run there may have been newer ones that are deleted, and expired ones where there is no base.
    let came = newer.is_some_and(|point| point.deleted.is_none());
    let judged = base.is_some_and(|base| {
        state.points.get(&base.id).is_none_or(|now| now.suspect.is_some() != base.suspect.is_some())
    });
    if came || judged { Err(overtaken(machine)) } else { Ok(()) }
}

struct Reported<'a> {
    context: &'a dyn JobContext,
    nodes: storage_pool::JobNodes,
}

impl Progress for Reported<'_> {
    fn update(&self, figures: &Figures) {
        let pool = self.nodes.figures();
        self.context.progress(
            figures.bytes_announced,
            figures.bytes_transferred,
            pool.stored,
            pool.duplicate_blocks,
        );
    }
}

/// How often a machine is tried to be frozen again before its datasource's choice counts.
pub const FREEZE_RETRIES: u32 = 2;

/// Runs a wish to a committed point.
///
/// A machine that cannot be frozen is tried again twice; then what its datasource chose for that counts.
pub fn run(
    pool: &Arc<Pool>,
    host: &dyn ProtectedHost,
    machine: &Machine,
    wish: &Wish,
    now: &dyn Fn() -> Timestamp,
    context: &dyn JobContext,
) -> Result<Outcome, Problem> {
    for left in (1..=FREEZE_RETRIES).rev() {
        match run_once(pool, host, machine, wish, now, true, context) {
            Err(problem) if problem.code == Code::NotFrozen => {
                let again = format!(
                    "{} Trying again in {} s; {left} attempts are left.",
                    problem.message,
                    machine.freeze_wait.as_secs()
                );
                context.log(LogLevel::Warning, again);
                context.phase("waiting for the guest", None);
                context.wait(machine.freeze_wait)?;
            }
            other => return other,
        }
    }
    run_once(pool, host, machine, wish, now, false, context)
}

fn run_once(
    pool: &Arc<Pool>,
    host: &dyn ProtectedHost,
    machine: &Machine,
    wish: &Wish,
    now: &dyn Fn() -> Timestamp,
    may_retry: bool,
    context: &dyn JobContext,
) -> Result<Outcome, Problem> {
    let captured = now();
    let (_, view, seen) = plan(pool, host, machine, wish)?;
    let domain = match &seen {
        Some(point) => point.domain,
        None => pool.default_domain().map_err(problem::pool)?,
    };
    let ingest = Ingest::begin(pool, domain).map_err(problem::pool)?;
    // Points may have gone since the plan. From here on a reclaim counts what is not expired as needed for as long as
    // this job runs, so what counts is what the replica is now.
    let (base, replica) = replica(pool, machine.id)?.unzip();
    let plan =
        decide::plan(wish, &view.disks, replica.as_ref()).map_err(|refusal| refuse(machine, &refusal))?;
    if base.as_ref().is_some_and(|point| point.domain != domain) {
        return Err(overtaken(machine));
    }
    context.log(LogLevel::Info, format!("Plan: {}.", plan.cause));
    let mut disks = Vec::new();
    for (index, (disk, planned)) in view.disks.iter().zip(&plan.disks).enumerate() {
        let known =
            base.as_ref().and_then(|point| point.disks.iter().find(|known| known.index as usize == index));
        let map = known
            .filter(|_| planned.keep_map)
            .map(|known| MapRoot { root: known.root, levels: known.levels });
        let mut editor = ingest.edit_map(map, disk.size).map_err(problem::pool)?;
        let begins_with_map = map.is_some_and(|map| map == editor.base().root());
        if let Some(known) = known
            && known.size > disk.size
            && begins_with_map
        {
            // The disk shrank: what lay behind its end is no part of it any more.
            let mut nodes = ingest.nodes();
            editor
                .zero(disk.size.div_ceil(BLOCK_BYTES)..known.size.div_ceil(BLOCK_BYTES), &mut nodes)
                .map_err(problem::pool)?;
        }
        let other_base = map.filter(|_| !begins_with_map).map(|map| ingest.read_map(map));
        disks.push(StoreDisk { editor, other_base });
    }
    let doubtful = pool.has_known_damage();
    let mut store = PoolStore { ingest, disks, doubtful };

    // What a host's tracker lists is known when the view stands, so then there is no total.
    let total = view.disks.iter().zip(&plan.disks).map(|(disk, planned)| match &planned.read {
        Read::Full => Some(disk.size),
        Read::Extents(list) => Some(list.rounded_out(BLOCK_BYTES, disk.size).bytes()),
        Read::Tracked { .. } => None,
    });
    context.phase("transferring", total.sum());
    let orders = plan.disks.iter().map(|planned| DiskOrder {
        mode: match &planned.read {
            Read::Full => Mode::Full { cause: planned.cause.clone() },
            Read::Extents(listed) => Mode::Extents { listed: listed.clone(), rotation: planned.rotation },
            Read::Tracked { base } => Mode::Tracked { base: base.clone(), rotation: planned.rotation },
        },
        heal: planned.heal.clone(),
        because: String::new(),
    });
    let order = SendOrder {
        job: context.id(),
        machine: machine.clone(),
        disks: orders.collect(),
        wanted: Consistency::Application,
        may_retry,
        scratch_bytes: scratch_bytes(pool, machine, &view, &plan),
        steer: context.steer().clone(),
    };
    let began = now();
    let mut sending = host.send(order)?;
    let expected = view.disks.iter().zip(&plan.disks).map(|(disk, planned)| ExpectedDisk {
        size: disk.size,
        mode: match &planned.read {
            Read::Full => ExpectedMode::Full,
            Read::Extents(list) => ExpectedMode::Extents { required: list.union(&planned.heal) },
            Read::Tracked { .. } => ExpectedMode::Tracked { required: planned.heal.clone() },
        },
    });
    let reported = Reported { context, nodes: store.ingest.nodes() };
    let mut reception = Reception::new(&mut store, expected.collect(), &reported, context.steer().clone());
    let figures = loop {
        let link = sending.link().map_err(|why| {
            let said = sending.failure();
            match why {
                transfer::LinkError::Cancelled => said.unwrap_or_else(problem::cancelled),
                transfer::LinkError::Cut(why) => said.unwrap_or_else(|| {
                    Problem::new(
                        Code::AgentUnreachable,
                        format!("The protection agent is unreachable: {why}."),
                    )
                    .about(machine.name.clone())
                }),
            }
        })?;
        match reception.serve(link) {
            Ok(Served::Finished(figures)) => break figures,
            Ok(Served::Cut) => {
                if let Some(problem) = sending.failure() {
                    return Err(problem);
                }
                context.log(LogLevel::Warning, "The link broke; waiting for it to come back.".to_owned());
            }
            Err(error) => return Err(problem::reception(error, sending.failure())),
        }
    };
    let findings = reception.findings().to_vec();
    let full_reason = reception.full_reason().map(str::to_owned);
    let differences = reception.differences();
    let stated = reception.stated();
    drop(reception);
    let plan = decide::stated(plan, &stated);

    context.phase("proving", None);
    let sent = sending.conclude()?;
    if sent.view.disks.len() != view.disks.len()
        || sent.view.disks.iter().zip(&view.disks).any(|(now, then)| now.size != then.size)
    {
        return Err(Problem::new(
            Code::SourceChanged,
            format!("The disks of {} changed while the job began.", machine.name),
        )
        .about(machine.name.clone()));
    }

    prove_ground(pool, machine, base.as_ref())?;

    // The tracker was caught: every point it helped to make is in doubt, before anything else is said (INV-22).
    let mut suspects = Vec::new();
    if let Some(first) = findings.first() {
        suspects = points_in_doubt(pool, machine.id);
        let reason = format!(
            "the change list of a later run left out block {} of disk {}, which had changed",
            first.block, first.disk
        );
        pool.mark_suspect(&suspects, &reason).map_err(problem::pool)?;
        let told = match suspects.len() {
            0 => "no earlier point was made from its lists".to_owned(),
            count => format!("{count} points are suspect"),
        };
        // Said before the commit, which may fail: so it promises nothing of this run's point.
        context.log(
            LogLevel::Warning,
            format!("The audit found a change that the list left out ({reason}); {told}."),
        );
        context.alert(
            Problem::new(Code::PointNotUsable, format!("The change tracker of {} left out changes: {told}.", machine.name))
                .about(machine.name.clone())
                .hint("A point made by or after this job is right, everything was compared for it. Distrust the tracker until its cause is found."),
        );
    }

    let was_full = full_reason.is_some();
    let mut cause = match &full_reason {
        Some(reason) => {
            let mut because = vec![format!("audit: {reason}")];
            because.push(format!("the plan was: {}", plan.cause));
            model::Cause { decision: "full compare".to_owned(), because }
        }
        None => plan.cause.clone(),
    };
    cause.because.extend(machine.news.clone());
    let PoolStore { ingest, disks, .. } = store;
    let mut new_disks = Vec::new();
    let mut nodes = ingest.nodes();
    for (index, (disk, state)) in sent.view.disks.iter().zip(disks).enumerate() {
        let planned = &plan.disks[index];
        let map = state.editor.finish(&mut nodes).map_err(problem::pool)?;
        let before = base
            .as_ref()
            .and_then(|point| point.disks.iter().find(|known| known.index as usize == index))
            .and_then(|known| known.full_compare);
        let compared = was_full || planned.read == Read::Full;
        new_disks.push(NewDisk {
            index: index as u32,
            size: disk.size,
            sector: disk.sector,
            map,
            description: disk.description.clone(),
            audit_next: figures.next_rotations.get(index).copied().unwrap_or(0),
            full_compare: if compared { FullCompare::Now } else { FullCompare::At(before) },
        });
    }
    if !sent.configuration.is_empty() {
        let text = sent.configuration.as_bytes();
        new_disks.push(ingest.put_text(CONFIGURATION, text).map_err(problem::pool)?);
    }
    ingest.settle().map_err(problem::pool)?;
    if matches!(wish, Wish::Protect) {
        // The replica counts as usable only when it is proved whole (S15, S16): what was announced equals what was
        // received (the transfer's digest), every block of the maps is in a sound pack, and the packs read back right.
        let prove = || -> Result<(), storage_pool::PoolError> {
            ingest.prove_packs()?;
            new_disks.iter().try_for_each(|disk| ingest.prove_map(disk.map).map(drop))
        };
        prove().map_err(|error| {
            Problem::new(
                Code::InitialReplicationBroken,
                format!("The initial replica of {} did not verify: {error}.", machine.name),
            )
            .about(machine.name.clone())
        })?;
    }
    if context.steer().is_cancelled() {
        return Err(problem::cancelled());
    }
    let stored = ingest.figures().stored;
    let id = RecoveryPointId(pool.random_id().map_err(problem::pool)?);
    let new = NewPoint {
        datasource: machine.id,
        machine: machine.name.clone(),
        host: machine.host.clone(),
        base: base.as_ref().map(|point| point.id),
        captured,
        consistency: sent.consistency,
        evidence: sent.evidence,
        cause,
        job: Some(context.id()),
        figures: figure_map(&figures, stored, now().since(began) / (Timestamp::SECOND / 1000)),
        definition: machine.definition.clone(),
        incomplete: false,
    };
    let point = ingest.commit(id, new, new_disks).map_err(problem::pool)?;
    context.log(
        LogLevel::Info,
        format!(
            "Committed recovery point {}: {}, {}.",
            point.id,
            point.consistency.word(),
            point.details().cause
        ),
    );
    Ok(Outcome { point, figures, stored, differences, suspects })
}

/// Points of a machine that were made from change lists since everything was last read.
fn points_in_doubt(pool: &Pool, machine: model::DatasourceId) -> Vec<RecoveryPointId> {
    let state = pool.state();
    let is_full = |point: &&Point| point.machine_disks().all(|disk| disk.full_compare == Some(point.id));
    let newest_full = state.in_order().rev().filter(|point| point.datasource == machine).find(is_full);
    let proved_up_to = newest_full.map_or(0, |point| point.number);
    let since: Vec<&Point> =
        state.in_order().filter(|point| point.datasource == machine && point.number > proved_up_to).collect();
    // A point whose record cannot be read now may be had back from a copy: then it must be suspect as well.
    let unread = since.iter().filter_map(|point| point.base).filter(|base| !state.points.contains_key(base));
    let mut doubtful: Vec<RecoveryPointId> =
        since.iter().filter(|point| point.suspect.is_none()).map(|point| point.id).collect();
    doubtful.extend(unread);
    doubtful
}

/// What the view will need on its host, as far as earlier points tell.
fn scratch_bytes(pool: &Pool, machine: &Machine, view: &MachineView, plan: &Plan) -> u64 {
    let state = pool.state();
    let points = state.in_order().filter(|point| point.datasource == machine.id && point.deleted.is_none());
    let Some(churn) = Churn::measured(points) else { return 0 };
    let size = view.disks.iter().map(|disk| disk.size).sum();
    let last = state.in_order().rev().find(|point| point.datasource == machine.id);
    let changed = last.and_then(|point| point.details().figures.get("bytes_read").copied()).unwrap_or(size);
    let read = view.disks.iter().zip(&plan.disks).map(|(disk, planned)| match &planned.read {
        Read::Full => disk.size,
        Read::Extents(list) => list.bytes(),
        Read::Tracked { .. } => changed.min(disk.size),
    });
    churn.scratch(size, read.sum())
}

fn figure_map(figures: &Figures, stored: u64, view_millis: u64) -> BTreeMap<String, u64> {
    [
        (VIEW_MILLIS, view_millis),
        ("bytes_logical", figures.bytes_logical),
        ("bytes_listed", figures.bytes_listed),
        ("bytes_read", figures.bytes_read),
        ("bytes_audited", figures.bytes_audited),
        ("bytes_changed", figures.bytes_changed),
        ("bytes_transferred", figures.bytes_transferred),
        ("bytes_stored", stored),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// Bytes that differ, for a report.
pub fn differing_bytes(differences: &Differences) -> u64 {
    differences.ranges.iter().map(RangeSet::bytes).sum()
}

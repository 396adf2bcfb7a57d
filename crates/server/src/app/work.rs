//! What each kind of job does, from the request to its figures.

use std::collections::BTreeMap;
use std::sync::Arc;

use block_io::Pace;
use jobs::decide::Wish;
use jobs::recover::Recovery;
use jobs::{JobContext, LogLevel, keep, synchronize};
use model::{ByteRange, Code, Power, Problem, RangeSet, Timestamp, Unfrozen};
use protocol::api::{
    self, Figures, Job, JobKind, JobRequest, Plan, PlannedPoint, RateLimit, RecoverDisk, RecoverTarget,
    RemoveData, Started, Synchronize, Time,
};
use storage_pool::StoredAgain;
use storage_pool::reclaim::{CountsUse, ReclaimOptions};
use storage_pool::verify::{Depth, VerifyOptions};

use super::runner::{Done, RunningJob, Work};
use super::{App, StoredDatasource};

impl App {
    fn wish(&self, datasource: &StoredDatasource, options: &Synchronize) -> Result<Wish, Problem> {
        let mut lists = BTreeMap::new();
        for list in &options.changed_extents {
            let ranges: Option<Vec<ByteRange>> =
                list.extents.iter().map(|&(offset, length)| ByteRange::at(offset, length)).collect();
            let ranges = ranges.ok_or_else(|| {
                Problem::new(
                    Code::ChangedExtents,
                    format!("The list of disk {} names bytes past any disk.", list.disk),
                )
            })?;
            if lists.insert(list.disk, RangeSet::from_ranges(ranges)).is_some() {
                return Err(Problem::new(Code::ChangedExtents, format!("Disk {} has two lists.", list.disk)));
            }
        }
        let since = match &options.changed_since {
            None => None,
            // A point that is not there any more is no error: the list is against something else, and the plan says so.
            Some(text) => match self.find_point(text, Some(datasource), None) {
                Ok((point, _)) => Some(point.id),
                Err(problem) => match text.parse() {
                    Ok(id) => Some(id),
                    Err(_) => return Err(problem),
                },
            },
        };
        Ok(Wish::Synchronize { lists, since, full_scan: options.full_scan })
    }

    fn living(&self, text: &str) -> Result<StoredDatasource, Problem> {
        let datasource = self.find_datasource(text)?;
        if datasource.removed {
            return Err(Problem::new(
                Code::NotFound,
                format!("{} was removed; its points are kept.", datasource.name),
            )
            .about(datasource.name));
        }
        Ok(datasource)
    }

    pub(crate) fn start_job(self: &Arc<Self>, request: &JobRequest) -> Result<Started, Problem> {
        let app = self.clone();
        let job = match request {
            JobRequest::Protect { datasource, .. } => {
                let datasource = self.living(datasource)?;
                if self.points_of(Some(datasource.id)).iter().any(|(point, _)| point.deleted.is_none()) {
                    let figures = Figures { already: Some(true), ..Figures::default() };
                    let job = self.runner.keep_ended(
                        JobKind::Protect,
                        (datasource.id, datasource.name),
                        figures,
                    )?;
                    return Ok(Started { job });
                }
                self.start_run(JobKind::Protect, datasource, Wish::Protect, None)?
            }
            JobRequest::Synchronize { datasource, options } => {
                let datasource = self.living(datasource)?;
                let wish = self.wish(&datasource, options)?;
                self.start_run(JobKind::Synchronize, datasource, wish, options.min_consistency)?
            }
            JobRequest::Check { datasource } => {
                let datasource = self.living(datasource)?;
                self.start_run(JobKind::Check, datasource, Wish::Check, None)?
            }
            JobRequest::RecoverDisk { datasource, options } => self.start_recovery(datasource, options)?,
            JobRequest::RecoverMachine { datasource, options } => {
                self.start_machine_recovery(datasource, options)?
            }
            JobRequest::RemoveDatasource { datasource, data } => {
                self.writable()?;
                let datasource = self.living(datasource)?;
                let data = *data;
                let about = Some((datasource.id, datasource.name.clone()));
                self.runner.start(
                    JobKind::RemoveDatasource,
                    about,
                    true,
                    Box::new(move |job| app.remove(&datasource, data, job)),
                )?
            }
            JobRequest::VerifyPool(options) => {
                let options = verify_options(options)?;
                let (limit, clock) = (options.limit, self.parts.clock.clone());
                let pace = limit.map(|limit| -> Arc<dyn Pace> { Arc::new(TokenBucket::new(limit, clock)) });
                self.start_verify(options, pace)?
            }
            JobRequest::Reclaim(options) => {
                self.writable()?;
                let options = reclaim_options(options, false);
                self.start_reading(
                    JobKind::Reclaim,
                    None,
                    false,
                    Box::new(move |job| app.reclaim(options, job)),
                )?
            }
            JobRequest::Prune(options) => {
                self.writable()?;
                let machine =
                    options.datasource.as_deref().map(|text| self.find_datasource(text)).transpose()?;
                let keep_last = options.keep_last;
                let about = machine.as_ref().map(|machine| (machine.id, machine.name.clone()));
                let id = machine.map(|machine| machine.id);
                self.runner.start(
                    JobKind::Prune,
                    about,
                    false,
                    Box::new(move |job| app.prune(id, keep_last, job)),
                )?
            }
            JobRequest::CopyPool(options) => self.start_copy(options)?,
            JobRequest::RebuildCatalog => {
                self.writable()?;
                self.runner.start(
                    JobKind::RebuildCatalog,
                    None,
                    false,
                    Box::new(move |job| app.rebuild_catalog(job)),
                )?
            }
        };
        Ok(Started { job })
    }

    /// Starts a job that reads from the pool: what of that had to be rebuilt from parity is told with what it did.
    pub(super) fn start_reading(
        self: &Arc<Self>,
        kind: JobKind,
        about: Option<(model::DatasourceId, String)>,
        exclusive: bool,
        work: Work,
    ) -> Result<Job, Problem> {
        let app = self.clone();
        let telling: Work = Box::new(move |job| {
            let mark = app.pool().rebuilt_mark();
            let outcome = work(job);
            let rebuilt = app.pool().rebuilt_since(mark);
            for found in &rebuilt {
                let name = storage_pool::format::pack::name(found.pack);
                let line = format!("{name}: {} sectors were damaged and rebuilt from parity.", found.sectors);
                job.log(LogLevel::Warning, line);
            }
            let sectors = rebuilt.iter().map(|found| found.sectors).sum::<u64>();
            outcome.map(|mut done| {
                done.figures.sectors_repaired = (sectors > 0).then_some(sectors);
                done
            })
        });
        self.runner.start(kind, about, exclusive, telling)
    }

    /// Starts a verify whose options are right.
    pub(crate) fn start_verify(
        self: &Arc<Self>,
        options: api::VerifyPool,
        pace: Option<Arc<dyn Pace>>,
    ) -> Result<Job, Problem> {
        let app = self.clone();
        let depth = match (options.hashes, options.read_data || options.due) {
            (_, true) => Depth::ReadData,
            (true, false) => Depth::Hashes,
            (false, false) => Depth::Structure,
        };
        let every = options.every_seconds.unwrap_or(api::VerifyPool::EVERY_SECONDS);
        let options =
            VerifyOptions { depth, threads: verify_threads(), pace, every: options.due.then_some(every) };
        self.start_reading(JobKind::Verify, None, false, Box::new(move |job| app.verify(&options, job)))
    }

    fn start_run(
        self: &Arc<Self>,
        kind: JobKind,
        datasource: StoredDatasource,
        wish: Wish,
        min_consistency: Option<model::Consistency>,
    ) -> Result<Job, Problem> {
        self.writable()?;
        let app = self.clone();
        let about = Some((datasource.id, datasource.name.clone()));
        self.start_reading(
            kind,
            about,
            true,
            Box::new(move |job| {
                let _turn = job.turn(datasource.host)?;
                let outcome = app.synchronized(&datasource, &wish, job)?;
                app.tell_of_freeze(&datasource, &outcome.point);
                let mut figures = super::mapping::transfer_figures(&outcome.figures, outcome.stored);
                figures.cause = Some(outcome.point.details().cause.to_string());
                figures.recovery_point = Some(outcome.point.id);
                figures.time = Some(Time(outcome.point.captured));
                figures.consistency = Some(outcome.point.consistency);
                let mut warnings = Vec::new();
                if !outcome.suspects.is_empty() {
                    warnings.push(Problem::new(
                        Code::LowerConsistency,
                        format!(
                            "The audit caught the change tracker leaving out changes: {} earlier points are suspect, this one is right.",
                            outcome.suspects.len()
                        ),
                    ));
                }
                if let Some(least) = min_consistency
                    && outcome.point.consistency < least
                {
                    warnings.push(Problem::new(
                        Code::LowerConsistency,
                        format!("The point is {}-consistent, asked for was {}.", outcome.point.consistency.word(), least.word()),
                    ));
                }
                app.forget_damaged();
                // The point is committed: a catalog that cannot follow is mended at the next start, and does not make the
                // job a failure.
                if let Err(problem) = app.parts.history.sync(app.pool()) {
                    warnings.push(problem);
                }
                // Neither is where the blocks of the newest point lie, and files that are needless and stay a while.
                match app.pool().keep_readable(outcome.point.id) {
                    Ok(Some(relaid)) if relaid.blocks > 0 => {
                        tracing::info!(blocks = relaid.blocks, stored = relaid.stored, "scattered blocks written again");
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!("scattered blocks stay where they are for now: {error}"),
                }
                if let Err(error) = app.pool().tidy(&*app.parts.deletion) {
                    tracing::warn!("superseded index files stay for now: {error}");
                }
                Ok(Done { figures, warnings })
            }),
        )
    }

    /// An alert that stands while the points of a machine are only crash-consistent although it runs.
    fn tell_of_freeze(&self, datasource: &StoredDatasource, point: &storage_pool::state::Point) {
        if datasource.provider == "images" {
            return;
        }
        let now = Timestamp(self.parts.clock.now_micros());
        let problem = Problem::new(
            Code::LowerConsistency,
            format!("The points of {} are only crash-consistent.", datasource.name),
        )
        .about(datasource.name.clone());
        if point.consistency == model::Consistency::Crash {
            self.parts.history.raise(api::Severity::Warning, &problem, now);
        } else {
            self.parts.history.resolve(&problem, now);
        }
    }

    fn start_recovery(self: &Arc<Self>, datasource: &str, options: &RecoverDisk) -> Result<Job, Problem> {
        let datasource = self.find_datasource(datasource)?;
        let (point, state) = self.find_point(&options.point, Some(&datasource), options.min_consistency)?;
        let (host, path) = match &options.target {
            RecoverTarget::Server { path } => {
                if !self.parts.hosts.is_standalone() {
                    return Err(Problem::new(
                        Code::Unauthorised,
                        "A server on the network does not write to its own files for a caller.",
                    )
                    .hint("Recover to HOST:PATH of an enrolled host, or to a path of your own machine."));
                }
                (None, path.clone())
            }
            RecoverTarget::Host { host, path } => {
                (self.find_host(Some(host))?.map(|host| host.0), path.clone())
            }
        };
        let named = options.format.map(|format| format.word().to_owned());
        let format = named.unwrap_or_else(|| {
            let lower = path.to_ascii_lowercase();
            ["qcow2", "vhdx", "vhd"]
                .into_iter()
                .find(|word| lower.ends_with(&format!(".{word}")))
                .unwrap_or("raw")
                .to_owned()
        });
        let pace = options
            .limit
            .map(|limit| -> Arc<dyn Pace> { Arc::new(TokenBucket::new(limit, self.parts.clock.clone())) });
        let recovery = Recovery {
            point: point.clone(),
            disk: options.disk,
            path: path.clone(),
            format,
            over: None,
            overwrite: options.overwrite,
            sync: !options.no_sync,
            accept_damage: options.accept_damage,
            min_consistency: options.min_consistency,
            pace,
            compress: host.map(|_| 1),
        };
        let app = self.clone();
        let about = Some((datasource.id, datasource.name.clone()));
        self.start_reading(
            JobKind::RecoverDisk,
            about,
            false,
            Box::new(move |job| {
                job.log(
                    LogLevel::Info,
                    format!(
                        "Recovering disk {} of {} from point {} of {} ({}, {}) to {path}.",
                        recovery.disk,
                        point.machine,
                        point.id,
                        point.captured.rfc3339(),
                        point.consistency.word(),
                        state.word()
                    ),
                );
                let host = app.parts.hosts.host(host)?;
                let recovered = jobs::recover::run(app.pool(), &*host, &recovery, job)?;
                let lost = recovered.lost.bytes();
                let mut figures = Figures {
                    bytes_logical: Some(recovered.figures.bytes_logical),
                    bytes_transferred: Some(recovered.figures.bytes_transferred),
                    bytes_written: Some(recovered.figures.bytes_transferred),
                    bytes_lost: Some(lost),
                    recovery_point: Some(point.id),
                    time: Some(Time(point.captured)),
                    consistency: Some(point.consistency),
                    target: Some(path.clone()),
                    ..Figures::default()
                };
                let mut warnings = Vec::new();
                if lost > 0 {
                    let damage: Vec<storage_pool::Damage> = recovered
                        .lost
                        .iter()
                        .map(|range| storage_pool::Damage::Point {
                            point: point.id,
                            machine: point.machine.clone(),
                            disk: recovery.disk,
                            range: *range,
                            reason: "damaged in the pool; zeros in the file".to_owned(),
                        })
                        .collect();
                    super::mapping::list_damage(&mut figures, &damage);
                    warnings.push(super::mapping::damage_warning(format!(
                        "{lost} bytes in {} ranges are lost and are zeros in {path}.",
                        damage.len()
                    )));
                }
                if let Some(reason) = &point.suspect {
                    warnings.push(Problem::new(
                        Code::LowerConsistency,
                        format!("The point is suspect: {reason}."),
                    ));
                }
                Ok(Done { figures, warnings })
            }),
        )
    }

    fn remove(
        &self,
        datasource: &StoredDatasource,
        data: RemoveData,
        job: &RunningJob,
    ) -> Result<Done, Problem> {
        let mut removed = 0;
        let mut kept = 0;
        let mut warnings = Vec::new();
        for (point, _) in self.points_of(Some(datasource.id)) {
            if point.deleted.is_some() {
                continue;
            }
            if data == RemoveData::Keep {
                kept += 1;
                continue;
            }
            match self.pool().delete_point(point.id, "the datasource was removed with its data") {
                Ok(()) => removed += 1,
                // The last points of a machine that is gone stay, whatever is asked (INV-13).
                Err(error @ storage_pool::PoolError::Kept { .. }) => {
                    kept += 1;
                    job.log(LogLevel::Info, format!("{error}."));
                }
                Err(error) => return Err(jobs::problem::pool(error)),
            }
        }
        if kept > 0 && data == RemoveData::Delete {
            warnings.push(Problem::new(
                Code::PointLocked,
                format!("{kept} points stay: the retention floor keeps them."),
            ));
        }
        self.store_datasource(&StoredDatasource { removed: true, ..datasource.clone() })?;
        self.parts.history.sync(self.pool())?;
        let returns = keep::space_returns(self.pool(), Timestamp(self.parts.clock.now_micros()));
        Ok(Done {
            figures: Figures {
                points_removed: Some(removed),
                points_kept: Some(kept),
                returns_at: (removed > 0).then_some(Time(returns)),
                ..Figures::default()
            },
            warnings,
        })
    }

    fn verify(&self, options: &VerifyOptions, job: &RunningJob) -> Result<Done, Problem> {
        job.phase("verifying", None);
        let steer = job.steer().clone();
        let mut report = self
            .pool()
            .verify_with(options, &mut |done: u64, _total: u64| {
                job.progress(done, 0, 0, 0);
                !steer.is_cancelled()
            })
            .map_err(jobs::problem::pool)?;
        if !self.pool().is_writable() {
            report.stored_again = self.hand_over(&report, job);
        }
        for stored in &report.stored_again {
            let name = storage_pool::format::pack::name;
            match stored {
                StoredAgain::Done { pack, bytes } => job.log(
                    LogLevel::Info,
                    format!(
                        "{}: what it holds is stored again, in {bytes} bytes; reclaim frees it.",
                        name(*pack)
                    ),
                ),
                StoredAgain::Not { pack, reason } => job.log(
                    LogLevel::Warning,
                    format!("{}: is not stored again, and is read by its parity: {reason}.", name(*pack)),
                ),
            }
        }
        if steer.is_cancelled() {
            return Err(jobs::problem::cancelled());
        }
        report.damage.extend(self.parts.folder.examine());
        report.damage.extend(self.parts.history.examine(self.pool()));
        self.forget_damaged();
        self.parts.history.sync(self.pool())?;
        for damage in &report.damage {
            let line = super::mapping::damage(damage);
            job.log(
                LogLevel::Error,
                match damage {
                    storage_pool::Damage::File { .. } => {
                        format!("{}: byte {}: {}.", line.file, line.offset, line.reason)
                    }
                    storage_pool::Damage::Point { point, .. } => format!(
                        "{}: point {point}: disk {}: bytes {}..{}: {}.",
                        line.datasource,
                        line.disk.unwrap_or(0),
                        line.offset,
                        line.offset + line.length,
                        line.reason
                    ),
                },
            );
        }
        let mut figures = Figures {
            bytes_read: Some(report.bytes_read),
            points_kept: (report.points > 0 || options.every.is_none()).then_some(report.good_points),
            ..Figures::default()
        };
        super::mapping::list_damage(&mut figures, &report.damage);
        let mut warnings = Vec::new();
        if !report.is_clean() {
            let lost = report.lost_blocks * model::BLOCK_BYTES;
            figures.bytes_lost = Some(lost);
            warnings.push(super::mapping::damage_warning(format!(
                "{} damages found; {} of {} points are whole, {} are damaged, {lost} bytes are lost.",
                report.damage.len(),
                report.good_points,
                report.points,
                report.damaged_points.len()
            )));
            if !report.repairs.is_empty() {
                let done = report.stored_again.iter().filter(|one| matches!(one, StoredAgain::Done { .. }));
                warnings.push(super::mapping::damage_warning(format!(
                    "{} sectors in {} packs were rebuilt from parity; {} packs are stored again.",
                    report.repairs.iter().map(|repair| repair.sectors).sum::<u64>(),
                    report.repairs.len(),
                    done.count()
                )));
            }
        }
        Ok(Done { figures, warnings })
    }

    /// A reader verified beside whoever may write. What it found is recorded in a moment of its own, if nobody writes
    /// just now: without the record the next run would build on damaged blocks, with it they are stored again.
    fn hand_over(&self, report: &storage_pool::verify::VerifyReport, job: &RunningJob) -> Vec<StoredAgain> {
        let is_empty = report.new_damage.is_empty()
            && report.repairs.is_empty()
            && report.proved_points.is_empty()
            && report.proved.is_empty();
        if is_empty {
            return Vec::new();
        }
        let folder = &self.parts.folder;
        let world = storage_pool::World {
            files: Arc::new(environment::FolderFiles::new(folder.pool())),
            clock: self.parts.clock.clone(),
            randomness: self.parts.randomness.clone(),
        };
        let options = super::FolderOptions { create: None, pool: Some(self.pool().id()), writes: true };
        let recorded = folder
            .open(&world, &options, "verify")
            .and_then(|opened| opened.pool.record_verified(report).map_err(jobs::problem::pool));
        recorded.unwrap_or_else(|problem| {
            job.log(LogLevel::Warning, format!("What was found is not recorded: {}", problem.message));
            Vec::new()
        })
    }

    fn reclaim(&self, options: ReclaimOptions, job: &RunningJob) -> Result<Done, Problem> {
        job.phase("reclaiming", None);
        let report = self.pool().reclaim(options, &*self.parts.deletion).map_err(|error| match error {
            storage_pool::PoolError::Busy { .. } => {
                Problem::new(Code::PoolBusy, "Another reclaim is under way; nothing was freed.")
                    .hint("Run it again when `stillpoint job list` shows no reclaim running.")
            }
            error => jobs::problem::pool(error),
        })?;
        let now = self.parts.clock.now_micros();
        job.log(
            LogLevel::Info,
            format!(
                "{} points expired; {} bytes quarantined, {} rewritten, {} in {} packs freed, {} packs released, {} bytes on hold.",
                report.expired_points,
                report.quarantined_bytes,
                report.rewritten_bytes,
                report.freed_bytes,
                report.freed_packs,
                report.released_packs,
                report.held_bytes
            ),
        );
        match &report.counts {
            CountsUse::Kept => {}
            CountsUse::Unused => job.log(
                LogLevel::Info,
                "There was no room for the reference counts: all recovery points were looked at instead.".to_owned(),
            ),
            CountsUse::Anew(reason) => job.log(
                LogLevel::Warning,
                format!("The reference counts could not be used and were made anew: {reason}."),
            ),
            CountsUse::Wrong(reason) => job.log(
                LogLevel::Warning,
                format!(
                    "The reference counts were wrong, so nothing was removed, and they were made anew; the next reclaim \
                     goes on: {reason}."
                ),
            ),
        }
        if report.waiting_bytes > 0 {
            job.log(
                LogLevel::Info,
                format!(
                    "Of these, {} bytes wait for jobs that were running before they were quarantined.",
                    report.waiting_bytes
                ),
            );
        }
        Ok(Done {
            figures: Figures {
                bytes_freed: Some(report.freed_bytes),
                bytes_returning: (report.held_bytes > 0).then_some(report.held_bytes),
                returns_at: (report.held_bytes > 0)
                    .then(|| Time(Timestamp(now + report.held_for * Timestamp::SECOND))),
                bytes_stored: Some(report.rewritten_bytes),
                ..Figures::default()
            },
            warnings: Vec::new(),
        })
    }

    fn prune(
        &self,
        machine: Option<model::DatasourceId>,
        keep_last: Option<u32>,
        job: &RunningJob,
    ) -> Result<Done, Problem> {
        let plan = keep::plan_prune(self.pool(), machine, keep_last)?;
        for marked in &plan.removed {
            job.log(
                LogLevel::Info,
                format!("{} of {} goes: {}.", marked.point.id, marked.point.machine, marked.why),
            );
        }
        let freed = self.freed_by(&plan);
        self.pool().make_room(&*self.parts.deletion).map_err(jobs::problem::pool)?;
        let deleted = keep::prune(self.pool(), &plan)?;
        self.parts.history.sync(self.pool())?;
        let returns = keep::space_returns(self.pool(), Timestamp(self.parts.clock.now_micros()));
        Ok(Done {
            figures: Figures {
                points_removed: Some(deleted.len() as u64),
                points_kept: Some(plan.kept.len() as u64),
                bytes_returning: freed.filter(|_| !deleted.is_empty()),
                returns_at: (!deleted.is_empty()).then_some(Time(returns)),
                ..Figures::default()
            },
            warnings: Vec::new(),
        })
    }

    /// Stored bytes that return when the points of a plan are gone; none where that cannot be counted.
    fn freed_by(&self, plan: &keep::PrunePlan) -> Option<u64> {
        let points = plan.removed.iter().map(|marked| marked.point.id).collect();
        self.pool().freed_bytes(&points).ok()
    }

    fn rebuild_catalog(&self, job: &RunningJob) -> Result<Done, Problem> {
        let lines = self.parts.history.rebuild(self.pool())?;
        for line in lines {
            job.log(LogLevel::Info, line);
        }
        Ok(Done {
            figures: Figures { points_kept: Some(self.points_of(None).len() as u64), ..Figures::default() },
            warnings: Vec::new(),
        })
    }

    pub(crate) fn plan_job(&self, request: &JobRequest) -> Result<Plan, Problem> {
        let mut plan = Plan {
            kind: request.kind(),
            object: String::new(),
            cause: String::new(),
            steps: Vec::new(),
            bytes_read: None,
            bytes_moved: None,
            bytes_needed: None,
            bytes_freed: None,
            seconds: None,
            kept: Vec::new(),
            removed: Vec::new(),
        };
        match request {
            JobRequest::Protect { datasource, .. } => {
                self.plan_run(&mut plan, &self.living(datasource)?, &Wish::Protect)?
            }
            JobRequest::Synchronize { datasource, options } => {
                let datasource = self.living(datasource)?;
                let wish = self.wish(&datasource, options)?;
                self.plan_run(&mut plan, &datasource, &wish)?;
            }
            JobRequest::Check { datasource } => {
                self.plan_run(&mut plan, &self.living(datasource)?, &Wish::Check)?
            }
            JobRequest::RecoverDisk { datasource, options } => {
                let datasource = self.find_datasource(datasource)?;
                let (point, state) =
                    self.find_point(&options.point, Some(&datasource), options.min_consistency)?;
                plan.object = datasource.name;
                let size =
                    point.machine_disks().find(|disk| disk.index == options.disk).map(|disk| disk.size);
                plan.bytes_needed = size;
                plan.steps = vec![
                    format!(
                        "Open disk {} of point {} ({}, {}).",
                        options.disk,
                        point.id,
                        point.consistency.word(),
                        state.word()
                    ),
                    "Write it beside the target, read it back, compare, then give it its name.".to_owned(),
                ];
            }
            JobRequest::RecoverMachine { datasource, options } => {
                self.plan_machine_recovery(&mut plan, datasource, options)?;
            }
            JobRequest::RemoveDatasource { datasource, data } => {
                let datasource = self.living(datasource)?;
                plan.object.clone_from(&datasource.name);
                let floor = self.pool().floor(Some(datasource.id));
                for (point, _) in self.points_of(Some(datasource.id)) {
                    let (list, why) = match (data, floor.keeps(&point)) {
                        (RemoveData::Keep, _) => (&mut plan.kept, "its data is kept".to_owned()),
                        (RemoveData::Delete, Some(why)) => {
                            (&mut plan.kept, format!("retention floor: {why}"))
                        }
                        (RemoveData::Delete, None) => {
                            (&mut plan.removed, "the datasource goes with its data".to_owned())
                        }
                    };
                    list.push(planned(&point, why));
                }
                plan.steps = vec![format!("Forget {}.", datasource.name)];
            }
            JobRequest::VerifyPool(options) => {
                plan.object = "the pool".to_owned();
                let options = verify_options(options)?;
                let packs = || self.pool().space().map(|space| space.packs).unwrap_or(0);
                if options.due {
                    let every = options.every_seconds.unwrap_or(api::VerifyPool::EVERY_SECONDS);
                    let places = self.pool().due(every).map_or(0, |part| part.length);
                    let share = (u128::from(places) * u128::from(packs())) >> 32;
                    plan.bytes_read = Some(u64::try_from(share).unwrap_or(u64::MAX));
                    plan.steps = vec![
                        "Check records and keys.".to_owned(),
                        format!(
                            "Read, decode and compare {} % of the packs.",
                            places.saturating_mul(100) >> 32
                        ),
                    ];
                } else {
                    plan.bytes_read = (options.read_data || options.hashes).then(packs);
                    plan.steps = vec!["Check headers, tables, records and maps.".to_owned()];
                }
                if options.hashes {
                    plan.steps.push("Hash every stored byte.".to_owned());
                }
                if options.read_data {
                    plan.steps.push("Read and hash every stored byte.".to_owned());
                }
            }
            JobRequest::Reclaim(options) => {
                plan.object = "the pool".to_owned();
                let report = self
                    .pool()
                    .reclaim(reclaim_options(options, true), &*self.parts.deletion)
                    .map_err(jobs::problem::pool)?;
                plan.bytes_freed = Some(report.quarantined_bytes);
                plan.steps = vec![format!(
                    "Quarantine packs of {} bytes; unlink them when their hold is over.",
                    report.quarantined_bytes
                )];
            }
            JobRequest::Prune(options) => {
                let machine =
                    options.datasource.as_deref().map(|text| self.find_datasource(text)).transpose()?;
                plan.object = machine
                    .as_ref()
                    .map_or_else(|| "all machines".to_owned(), |machine| machine.name.clone());
                let found =
                    keep::plan_prune(self.pool(), machine.map(|machine| machine.id), options.keep_last)?;
                let list = |marked: Vec<keep::Marked>| {
                    marked.into_iter().map(|marked| planned(&marked.point, marked.why)).collect()
                };
                plan.steps =
                    vec![format!("Soft-delete {} points, keep {}.", found.removed.len(), found.kept.len())];
                plan.bytes_freed = self.freed_by(&found);
                if let Some(bytes) = plan.bytes_freed.filter(|_| !found.removed.is_empty()) {
                    let now = Timestamp(self.parts.clock.now_micros());
                    let returns = Time(keep::space_returns(self.pool(), now));
                    plan.steps.push(format!("{bytes} bytes return by a reclaim after {returns}."));
                }
                plan.kept = list(found.kept);
                plan.removed = list(found.removed);
            }
            JobRequest::CopyPool(options) => self.plan_copy(&mut plan, options)?,
            JobRequest::RebuildCatalog => {
                plan.steps = vec!["Make the derived tables again from the pool.".to_owned()]
            }
        }
        Ok(plan)
    }

    fn plan_run(&self, plan: &mut Plan, datasource: &StoredDatasource, wish: &Wish) -> Result<(), Problem> {
        let host = self.parts.hosts.host(datasource.host)?;
        let (found, view, _) = synchronize::plan(self.pool(), &*host, &datasource.machine(), wish)?;
        plan.object.clone_from(&datasource.name);
        plan.cause = found.cause.to_string();
        let mut total = 0;
        for (index, (disk, planned)) in view.disks.iter().zip(&found.disks).enumerate() {
            let bytes = match &planned.read {
                // What the host's tracker will list is not known yet.
                jobs::decide::Read::Full | jobs::decide::Read::Tracked { .. } => disk.size,
                jobs::decide::Read::Extents(list) => list.rounded_out(model::BLOCK_BYTES, disk.size).bytes(),
            };
            total += bytes;
            plan.steps.push(format!(
                "Disk {index}: {}; read at most {bytes} bytes, move what differs.",
                planned.cause
            ));
        }
        plan.bytes_read = Some(total);
        // A set of image files is known to no hypervisor.
        if datasource.provider != "images"
            && let Some(machine) = host.machines()?.into_iter().find(|machine| machine.id == datasource.id)
        {
            plan.steps.push(stillness(&machine, datasource.unfrozen));
        }
        Ok(())
    }
}

/// How a machine will come to stand still, said before it is done: nobody's machine is paused by surprise (S24).
fn stillness(machine: &model::HostMachine, unfrozen: Unfrozen) -> String {
    let otherwise = match unfrozen {
        Unfrozen::Fail => "the job fails after two retries",
        Unfrozen::Pause => "the machine is PAUSED for the instant of the checkpoint, after two retries",
        Unfrozen::Crash => "the point is crash-consistent, after two retries, and an alert stands",
    };
    match (machine.power, machine.guest_agent) {
        (Power::Off, _) => format!("{} is off: its images are read at rest.", machine.name),
        (Power::Paused, _) => format!(
            "{} is paused already, so its guest agent cannot freeze: the point is crash-consistent.",
            machine.name
        ),
        (_, Some(true)) => format!(
            "{} runs with a guest agent, which freezes its file systems for the checkpoint; if it does not: {otherwise}.",
            machine.name
        ),
        _ => format!("{} runs and no guest agent of it is connected: {otherwise}.", machine.name),
    }
}

/// Packs that a verify reads at the same time.
pub(crate) fn verify_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(4)
}

/// The options of a verify, if they go together.
fn verify_options(options: &api::VerifyPool) -> Result<api::VerifyPool, Problem> {
    let depths = [options.hashes, options.read_data, options.due];
    if depths.iter().filter(|&&depth| depth).count() > 1 {
        return Err(Problem::new(Code::Usage, "Only one of hashes, read_data and due can be asked for."));
    }
    if options.every_seconds.is_some() && !options.due {
        return Err(Problem::new(Code::Usage, "A period goes with what is due only.").hint("Add --due."));
    }
    if options.every_seconds.is_some_and(|every| every < 3600) {
        return Err(Problem::new(Code::Usage, "The period is less than an hour."));
    }
    Ok(options.clone())
}

fn planned(point: &storage_pool::state::Point, why: String) -> PlannedPoint {
    PlannedPoint { id: point.id, datasource: point.machine.clone(), time: Time(point.captured), why }
}

fn reclaim_options(options: &api::Reclaim, dry_run: bool) -> ReclaimOptions {
    ReclaimOptions {
        hold: options.hold_seconds,
        breaker_percent: options.breaker_percent.map(u32::from),
        dry_run,
        ..ReclaimOptions::default()
    }
}

/// Lets bytes through at a rate that may depend on the hour.
pub(crate) struct TokenBucket {
    limit: RateLimit,
    clock: Arc<dyn environment::Clock>,
    /// Monotonic time until which what was let through fills the rate.
    paid_until: std::sync::Mutex<u64>,
}

impl TokenBucket {
    pub(crate) fn new(limit: RateLimit, clock: Arc<dyn environment::Clock>) -> TokenBucket {
        let now = clock.monotonic_micros();
        TokenBucket { limit, clock, paid_until: std::sync::Mutex::new(now) }
    }
}

/// How far ahead of its rate a burst may be: a tenth of a second.
const BURST_MICROS: u64 = 100_000;

impl Pace for TokenBucket {
    fn wait(&self, bytes: u64) {
        let Some(rate) = self.limit.at(Timestamp(self.clock.now_micros())) else { return };
        let cost =
            u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(rate.max(1))).unwrap_or(u64::MAX / 4);
        let now = self.clock.monotonic_micros();
        let wait = {
            let mut paid = self.paid_until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *paid = (*paid).max(now.saturating_sub(BURST_MICROS)).saturating_add(cost);
            paid.saturating_sub(now)
        };
        if wait > 0 {
            self.clock.sleep(std::time::Duration::from_micros(wait));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_who_would_be_paused() {
        let said = |power, guest_agent, unfrozen| {
            let machine = model::HostMachine {
                id: model::DatasourceId([1; 16]),
                name: "web".to_owned(),
                provider: "libvirt".to_owned(),
                power,
                guest_agent,
                disks: Vec::new(),
            };
            stillness(&machine, unfrozen)
        };
        let paused = "web runs and no guest agent of it is connected: the machine is PAUSED";
        assert!(said(Power::Running, Some(false), Unfrozen::Pause).starts_with(paused));
        assert!(said(Power::Running, None, Unfrozen::Pause).starts_with(paused));
        assert!(!said(Power::Running, Some(false), Unfrozen::Crash).contains("PAUSED"));
        let frozen = said(Power::Running, Some(true), Unfrozen::Pause);
        assert!(frozen.contains("freezes") && frozen.contains("if it does not: the machine is PAUSED"));
        assert!(said(Power::Off, None, Unfrozen::Pause).contains("at rest"));
        assert!(said(Power::Paused, Some(true), Unfrozen::Pause).contains("crash-consistent"));
    }
}

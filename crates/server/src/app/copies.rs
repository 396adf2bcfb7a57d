//! `pool copy`: where a copy may lie, the job that makes it, and what unlinks in it.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use block_io::Pace;
use environment::FolderFiles;
use jobs::{JobContext, LogLevel};
use model::{Code, Problem};
use protocol::api::{CopyPool, Figures, Job, JobKind, Plan};
use storage_pool::copy::{self, Copy, CopyOptions};
use storage_pool::reclaim::DeletionService;
use storage_pool::{PoolError, World};

use super::runner::{Done, RunningJob};
use super::work::TokenBucket;
use super::{App, read_secret};

/// Unlinks in a copy of the pool what the copy's own records permit.
pub trait CopyDeletion: Send + Sync {
    /// Carries out the permit with this number in the copy in `folder`.
    fn carry_out_in(&self, folder: &Path, permit: Option<u64>) -> Result<(), PoolError>;
}

/// Where copies may lie, and what unlinks in them.
pub struct Copies {
    /// Folders below which a caller over the network may have copies; standalone any place will do.
    pub folders: Vec<PathBuf>,
    /// What unlinks.
    pub deletion: Arc<dyn CopyDeletion>,
}

/// The deletion service of one copy.
struct InCopy<'a> {
    deletion: &'a dyn CopyDeletion,
    folder: &'a Path,
}

impl DeletionService for InCopy<'_> {
    fn carry_out(&self, permit: Option<u64>, _runs: &[u64]) -> Result<(), PoolError> {
        self.deletion.carry_out_in(self.folder, permit)
    }
}

/// The path with every link resolved, also where its end is not there yet.
fn resolved(path: &Path) -> Option<PathBuf> {
    if path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    let there = path.ancestors().find_map(|above| Some((above, std::fs::canonicalize(above).ok()?)));
    let (above, real) = there?;
    Some(real.join(path.strip_prefix(above).ok()?))
}

impl App {
    fn copy_folder(&self, text: &str) -> Result<PathBuf, Problem> {
        let refused = |why: String| Problem::new(Code::NotACopy, why).about(text);
        let folder = resolved(Path::new(text))
            .filter(|folder| folder.is_absolute())
            .ok_or_else(|| refused(format!("{text} is not the absolute path of a folder.")))?;
        let own = &self.parts.folder;
        for (place, what) in [(own.root.clone(), "the data folder"), (own.pool(), "the storage pool")] {
            let place = resolved(&place).unwrap_or(place);
            if folder.starts_with(&place) {
                let place = place.display();
                return Err(refused(format!("{text} is in {what} {place}: a copy there is lost with it.")));
            }
            if place.starts_with(&folder) {
                let place = place.display();
                return Err(refused(format!("{text} holds {what} {place}, so it is no place for a copy.")));
            }
        }
        let is_allowed = |allowed: &PathBuf| resolved(allowed).is_some_and(|above| folder.starts_with(above));
        if !self.parts.hosts.is_standalone() && !self.parts.copies.folders.iter().any(is_allowed) {
            return Err(Problem::new(
                Code::Unauthorised,
                format!("{text} is in no folder that this server's configuration has for copies."),
            )
            .about(text)
            .hint("Add it to `copy_folders` in the server's configuration file, or run the command on the server with --standalone."));
        }
        Ok(folder)
    }

    /// The pool's own files and those of a copy.
    fn copy_worlds(&self, folder: &Path) -> (World, World) {
        let world = |folder: &Path| World {
            files: Arc::new(FolderFiles::new(folder)),
            clock: self.parts.clock.clone(),
            randomness: self.parts.randomness.clone(),
        };
        (world(&self.parts.folder.pool()), world(folder))
    }

    pub(super) fn plan_copy(&self, plan: &mut Plan, request: &CopyPool) -> Result<(), Problem> {
        let folder = self.copy_folder(&request.to)?;
        let (source, target) = self.copy_worlds(&folder);
        let found = copy::plan(&source, &target).map_err(jobs::problem::pool)?;
        plan.object = folder.display().to_string();
        plan.bytes_moved = Some(found.pack_bytes + found.record_bytes);
        plan.bytes_needed = plan.bytes_moved;
        plan.bytes_read = Some(
            found.pack_bytes + found.record_bytes + if request.verify { found.bytes_present } else { 0 },
        );
        plan.steps = vec![
            if found.is_new { "Make a new copy." } else { "Go on with the copy that is there." }.to_owned(),
            format!("Move {} packs of {} bytes, each read back and hashed.", found.packs, found.pack_bytes),
            format!("Then {} records of {} bytes, in order.", found.records, found.record_bytes),
        ];
        Ok(())
    }

    pub(super) fn start_copy(self: &Arc<Self>, request: &CopyPool) -> Result<Job, Problem> {
        let folder = self.copy_folder(&request.to)?;
        let pace = request.limit.map(|limit| TokenBucket::new(limit, self.parts.clock.clone()));
        let options = CopyOptions { verify: request.verify, accept_damage: request.accept_damage };
        let app = self.clone();
        let work = Box::new(move |job: &RunningJob| app.copy_to(&folder, options, pace.as_ref(), job));
        self.runner.start(JobKind::CopyPool, None, false, work)
    }

    fn copy_to(
        &self,
        folder: &Path,
        options: CopyOptions,
        pace: Option<&TokenBucket>,
        job: &RunningJob,
    ) -> Result<Done, Problem> {
        let problem = jobs::problem::pool;
        let (source, target) = self.copy_worlds(folder);
        let planned = copy::plan(&source, &target).map_err(problem)?;
        let total = planned.pack_bytes + planned.record_bytes;
        job.phase("copying", Some(total + if options.verify { planned.bytes_present } else { 0 }));
        let copy = Copy::begin(source, target).map_err(problem)?;
        // What a run before was writing when it was killed, on a file system without unnamed files: the lock is ours.
        if let Err(error) = FolderFiles::new(folder).sweep_staging() {
            let place = folder.join("staging");
            job.log(LogLevel::Warning, format!("{} cannot be swept: {error}.", place.display()));
        }
        let steer = job.steer().clone();
        let mut report = copy
            .run(options, pace.map(|pace| pace as &dyn Pace), &mut |done, _| {
                job.progress(done, done, 0, 0);
                !steer.is_cancelled()
            })
            .map_err(problem)?;
        if report.cancelled {
            return Err(Problem::new(Code::Cancelled, "The copy was cancelled; what is there stays valid.")
                .hint("The same command goes on."));
        }
        let mut warnings = Vec::new();
        let deletion = InCopy { deletion: &*self.parts.copies.deletion, folder };
        let (recipient, _, _) = read_secret(&self.parts.folder.root)?;
        match copy.let_go(&report, &recipient, &deletion) {
            Ok(freed) => report.bytes_freed = freed,
            // The copy is whole; that it is larger than it need be is no failure of it.
            Err(error) => {
                job.log(LogLevel::Warning, format!("Packs that may leave the copy stay for now: {error}."));
            }
        }
        job.log(
            LogLevel::Info,
            format!(
                "{} packs and {} records moved; the copy holds records up to {}; {} bytes of packs were there; listed {} times; {} bytes left it.",
                report.packs_copied,
                report.records_copied,
                report.head,
                report.bytes_present,
                report.passes,
                report.bytes_freed
            ),
        );
        let mut figures = Figures {
            bytes_written: Some(report.bytes_copied),
            bytes_freed: Some(report.bytes_freed),
            target: Some(folder.display().to_string()),
            ..Figures::default()
        };
        for repaired in &report.repaired {
            let name = storage_pool::format::pack::name(repaired.pack);
            let line = format!(
                "{name}: is damaged here; {} sectors were rebuilt from parity, and the copy is whole.",
                repaired.sectors
            );
            job.log(LogLevel::Warning, line);
        }
        if !report.repaired.is_empty() {
            let sectors = report.repaired.iter().map(|repaired| repaired.sectors).sum();
            figures.sectors_repaired = Some(sectors);
            warnings.push(super::mapping::damage_warning(format!(
                "{} packs are damaged here and whole in the copy: {sectors} sectors were rebuilt from parity. A verify stores \
                 them again here.",
                report.repaired.len()
            )));
        }
        super::mapping::list_damage(&mut figures, &report.damage);
        if !report.damage.is_empty() {
            warnings.push(super::mapping::damage_warning(format!(
                "{} files are not in the copy as they should be; everything else is.",
                report.damage.len()
            )));
        }
        Ok(Done { figures, warnings })
    }
}
